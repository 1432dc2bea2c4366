"""Tokenizers, groups, batches, paraphrase prompts and toxicity scorers: what the scripts share.

A group is an input sentence with harmless and toxic paraphrases of it; the formats are in `read_groups`.
"""

import json
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tiktoken
import torch

from data.scorers import get_scorer  # noqa: F401, for users of this package

SPLITS = ("train", "val", "test")
WIDTH = 8  # rows are padded to a multiple of this: few widths, so that compiled shapes repeat


@dataclass
class Group:
    id: str
    input: str
    positives: list[str]
    negatives: list[str]
    split: str


# --------------------------------------------------------------------------------------------------------------------
# tokens


def get_tokenizer(name):
    """A tiktoken.Encoding: 'gpt2', or 'toy' for the toy world's own words. Raises ConnectionError without a network."""
    if name == "toy":
        from data import toy

        return toy.tokenizer()
    try:
        return tiktoken.get_encoding(name)
    except ValueError as e:
        raise ValueError(f"no tokenizer {name!r}: gpt2 or toy") from e
    except OSError as e:  # requests' errors are OSErrors too
        raise ConnectionError(
            f"the {name} tokenizer's two files could not be fetched ({type(e).__name__}): set TIKTOKEN_CACHE_DIR to a "
            "folder that holds them; configs/toy_cp.py needs no download"
        ) from e


def frame(text, tokenizer, max_tokens):
    """Token ids `<|endoftext|> text <|endoftext|>`, at most max_tokens. Raises ValueError on empty text.

    A text that is too long keeps its start, and gets no end token: it does not end there.
    """
    tokens = tokenizer.encode_ordinary(text)
    if not tokens:
        raise ValueError("empty text has no score")
    return [tokenizer.eot_token, *tokens, tokenizer.eot_token][:max_tokens]


def pad(sequences):
    """Right-pad lists of ids. Returns idx (B, T) int64, T a multiple of WIDTH plus one, and lengths (B,), both on CPU.

    The extra column is the last token, which is only predicted, never read. The pad id is 0 and never matters.
    """
    lengths = torch.tensor([len(s) for s in sequences])
    T = 1 + -(-(int(lengths.max()) - 1) // WIDTH) * WIDTH
    idx = torch.zeros(len(sequences), T, dtype=torch.long)
    for row, s in zip(idx, sequences, strict=True):
        row[: len(s)] = torch.tensor(s)
    return idx, lengths


# --------------------------------------------------------------------------------------------------------------------
# prompts: a base GPT-2 follows examples, not instructions, so a prompt is some demonstrations and the beginning of one


def prompt_for(template, sentence):
    """The beginning of one more demonstration: the template up to {output}. Quotation marks in it become single."""
    return template.split("{output}")[0].format(input=unquoted(sentence))


def unquoted(sentence):
    return " ".join(sentence.replace('"', "'").split())


def closing_tokens(template, tokenizer):
    """Ids that end an answer: tokens with the mark that follows {output}, or a line break, and the end token."""
    marks = {template.split("{output}")[1][0].encode(), b"\n"}
    holds = lambda t: any(m in tokenizer.decode_single_token_bytes(t) for m in marks)  # noqa: E731
    return [t for t in range(tokenizer.n_vocab - 1) if holds(t)] + [tokenizer.eot_token]


def answer(template, text):
    """(answer, whether it was closed) of what a model wrote behind `prompt_for`."""
    text, closed, _ = text.partition(template.split("{output}")[1][0])
    return text.split("\n")[0].strip(), bool(closed)


# --------------------------------------------------------------------------------------------------------------------
# reading


def read_groups(path):
    """Groups from a file. Raises ValueError or FileNotFoundError naming file and line.

    Ours, JSON lines: {"id", "input", "positives": [...], "negatives": [...], "split": "train" | "val" | "test"}; other
    fields are ignored. The paper's release, one JSON array: {"input", "paraphrases", "paraphrases_toxic"}, lists or
    {text: score}. Without ids, the position counts; without splits, a hash of the input decides (70 / 10 / 20 %).
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no group file at {path}: give a .jsonl of groups, or --data=toy")
    text = read_text(path)
    if text.lstrip().startswith("["):
        try:
            records = [(f"{path}, item {i}", record) for i, record in enumerate(json.loads(text), 1)]
        except (ValueError, RecursionError) as e:
            raise ValueError(f"{path}: not a JSON array ({e})") from e
    else:
        records = read_json_lines(path)
    if not records:
        raise ValueError(f"{path} holds no groups")
    groups, ids, splits = [], set(), {}
    for number, (where, record) in enumerate(records, 1):
        group = _group(record, where, number)
        if group.id in ids:
            raise ValueError(f"{where}: id {group.id!r} appears twice")
        if splits.setdefault(group.input, group.split) != group.split:
            raise ValueError(f"{where}: the input of {group.id!r} is also in split {splits[group.input]!r}")
        ids.add(group.id)
        groups.append(group)
    return groups


def read_text(path):
    """A UTF-8 text file. Raises FileNotFoundError or ValueError with one line."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no file at {path}: check the path")
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        raise ValueError(f"{path}: not UTF-8 text ({e})") from e


def read_json_lines(path):
    """[(where, record)] of a file with one JSON object a line; `where` is 'file:line'. Raises ValueError naming it."""
    records = []
    for i, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as e:
                raise ValueError(f"{path}:{i}: not JSON ({e})") from e
            if not isinstance(record, dict):
                raise ValueError(f"{path}:{i}: wanted a JSON object, got {type(record).__name__}")
            records.append((f"{path}:{i}", record))
    return records


def _group(record, where, number):
    if not isinstance(record, dict):
        raise ValueError(f"{where}: wanted a JSON object, got {type(record).__name__}")
    released = "paraphrases" in record and "positives" not in record
    names = ("paraphrases", "paraphrases_toxic") if released else ("positives", "negatives")
    if missing := [k for k in ("input", *names) if k not in record]:
        raise ValueError(f"{where}: field {missing[0]!r} is missing")
    if not isinstance(record["input"], str) or not record["input"].strip():
        raise ValueError(f"{where}: 'input' must be a sentence, got {record['input']!r}")
    sides = []
    for name in names:
        side = record[name]
        if not isinstance(side, list | (dict if released else list)) or not side:
            raise ValueError(f"{where}: {name!r} must be a list of sentences, got {side!r}")
        for sentence in side:
            if not isinstance(sentence, str) or not sentence.strip():
                raise ValueError(f"{where}: {name!r} holds {sentence!r}, wanted a sentence")
        sides.append(list(side))
    if both := set(sides[0]) & set(sides[1]):
        raise ValueError(f"{where}: {sorted(both)[0]!r} is both harmless and toxic")
    h = zlib.crc32(record["input"].encode(errors="replace")) % 10
    split = record.get("split", "val" if h == 0 else "test" if h < 3 else "train")
    if split not in SPLITS:
        raise ValueError(f"{where}: split must be one of {', '.join(SPLITS)}, got {split!r}")
    name = record.get("id")
    return Group(str(number if name is None else name), record["input"], *sides, split)


def load_groups(name):
    """Groups by split, {'train': [Group], 'val': ..., 'test': ...}, from a file or the toy world ('toy')."""
    if name == "toy":
        from data import toy

        groups = toy.groups()
    else:
        groups = read_groups(name)
    return {split: [g for g in groups if g.split == split] for split in SPLITS}


def load_documents(name, seed):
    """Texts for language modelling, {'train': [str], 'val': [str]}, and the groups by split if there are any.

    'toy' writes its own; of a group file, inputs, positives and negatives count; in a text file every line is one
    document, blank lines are skipped and each twentieth one is held out.
    """
    if name == "toy":
        from data import toy

        return {"train": toy.documents(12_000, seed), "val": toy.documents(400, seed, split="val")}, load_groups(name)
    if Path(name).suffix in (".jsonl", ".json"):
        groups = load_groups(name)
        texts = {s: [t for g in groups[s] for t in (g.input, *g.positives, *g.negatives)] for s in ("train", "val")}
        return texts, groups
    if not Path(name).is_file():
        raise FileNotFoundError(f"no text file at {name}: give a .txt, a .jsonl of groups, or --data=toy")
    lines = [line.strip() for line in read_text(name).split("\n") if line.strip()]
    if len(lines) < 20:
        raise ValueError(f"{name}: {len(lines)} lines with text, wanted at least 20 (one document a line)")
    val = lines[::20]
    return {"train": [t for i, t in enumerate(lines) if i % 20], "val": val}, {s: [] for s in SPLITS}


# --------------------------------------------------------------------------------------------------------------------
# batches


@dataclass
class Batch:
    """One forward pass. `ids` are the groups' or documents'; weight is how much of a step's mean it makes up."""

    ids: list
    idx: torch.Tensor  # (B, T); for groups B = G * (P + N), group by group, positives first
    lengths: torch.Tensor  # (B,)
    weight: int  # groups, or scored tokens of documents
    start: torch.Tensor = None  # (B,) of texts: scored from this position on; 1 is all of them
    anchor: "Batch" = None  # texts that go along

    @property
    def tokens(self):
        """Scored tokens."""
        return int((self.lengths - 1).sum())


class Batches:
    """The endless, shuffled sequence of batches: batches[i] is a pure function of data, settings, seed and i.

    So a run resumes by its step alone, and k batches of B/k hold what one of B holds. Items are reshuffled every
    epoch. An item is a group, a text, or a framed list of ids. With groups (n_pos, n_neg > 0), P positives and N
    negatives are drawn without replacement each time.
    """

    def __init__(self, items, tokenizer, batch_size, seed, max_tokens, n_pos=0, n_neg=0, starts=None):
        if batch_size > len(items):
            raise ValueError(f"batch_size={batch_size}, but there are only {len(items)} training items: lower it")
        self.batch_size, self.seed, self.sizes = batch_size, seed, (n_pos, n_neg)
        self.ids = [item.id if n_pos else f"document {i}" for i, item in enumerate(items)]
        texts = [(item.positives, item.negatives) if n_pos else ([item],) for item in items]
        encode = lambda t: t[:max_tokens] if isinstance(t, list) else frame(t, tokenizer, max_tokens)  # noqa: E731
        self.encoded = [[[encode(t) for t in side] for side in sides] for sides in texts]
        flat = [s for sides in self.encoded for side in sides for s in side]
        self.truncated = sum(s[-1] != tokenizer.eot_token for s in flat)
        self.epoch, self.order = None, None
        self.starts = starts  # of the items
        self.anchor = None  # Batches of texts that go along, one with each batch

    def _item(self, k):
        """Index of the k-th item of the endless sequence."""
        epoch, i = divmod(k, len(self.ids))
        if epoch != self.epoch:
            self.epoch, self.order = epoch, np.random.default_rng([self.seed, 0, epoch]).permutation(len(self.ids))
        return int(self.order[i])

    def __getitem__(self, i):
        ids, rows, starts = [], [], []
        for k in range(i * self.batch_size, (i + 1) * self.batch_size):
            item = self._item(k)
            ids.append(self.ids[item])
            if not self.sizes[0]:
                rows.append(self.encoded[item][0][0])
                starts.append(self.starts[item] if self.starts else 1)
                continue
            rng = np.random.default_rng([self.seed, 1, k])
            for side, n in zip(self.encoded[item], self.sizes, strict=True):
                rows += [side[j] for j in rng.choice(len(side), n, replace=False)]
        idx, lengths = pad(rows)
        start = torch.tensor(starts) if starts else None
        batch = Batch(ids, idx, lengths, len(ids), start, self.anchor[i] if self.anchor else None)
        if not self.sizes[0]:
            batch.weight = batch.tokens
        return batch

    def padding(self, n=20):
        """Share of padding among the positions of the first n batches."""
        batches = [self[i] for i in range(n)]
        return 1 - sum(b.tokens for b in batches) / sum(b.idx[:, 1:].numel() for b in batches)


def enough(groups, n_pos, n_neg, drop):
    """The groups with at least P positives and N negatives. A smaller one is a ValueError, or dropped and counted.

    Returns (groups, number dropped).
    """
    large, small = [], []
    for g in groups:
        (large if len(g.positives) >= n_pos and len(g.negatives) >= n_neg else small).append(g)
    if small and not drop:
        g = small[0]
        raise ValueError(
            f"group {g.id!r} has {len(g.positives)} positives and {len(g.negatives)} negatives, wanted {n_pos} and "
            f"{n_neg} ({len(small)} such groups): lower --n_pos / --n_neg, or --drop_small"
        )
    return large, len(small)
