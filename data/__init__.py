"""What is learned from: tokenizers, groups of paraphrases, documents, and batches of them.

A group is an input sentence with harmless and toxic paraphrases of it; the formats are in `read_groups`.
"""

import json
import zlib
from dataclasses import dataclass

import numpy as np
import tiktoken
import torch
from torch.nn import functional as F

from configs import find
from data import toy, toy_facts
from engine.run import read_records, read_text

SPLITS = ("train", "val", "test")
WIDTH = 8  # rows are padded to a multiple of this: few widths, so that compiled shapes repeat


@dataclass
class Group:
    id: str
    input: str
    positives: list[str]
    negatives: list[str]
    split: str
    paired: bool = False  # negatives[i] is positives[i] with one thing changed: the same i are drawn of both


def get_tokenizer(name):
    """A tiktoken.Encoding: 'gpt2', or 'toy' for the toy world's own words. Raises ConnectionError without a network."""
    if name == "toy":
        return toy.tokenizer()
    try:
        return tiktoken.get_encoding(name)
    except ValueError as e:
        raise ValueError(f"no tokenizer {name!r}: gpt2 or toy") from e
    except OSError as e:  # requests' errors are OSErrors too
        raise ConnectionError(
            f"the {name} tokenizer's two files could not be fetched ({type(e).__name__}): set TIKTOKEN_CACHE_DIR to a "
            "folder that holds vocab.bpe, named 6d1cbeee0f20b3d9449abfede4726ed8212e3aee, and encoder.json, named "
            "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6; configs/toy_cp.py needs no download"
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
    return torch.tensor([[*s, *[0] * (T - len(s))] for s in sequences]), lengths


def wrong(where, wanted, got, hint=""):
    """The error of all readers: 'file:line: wanted ..., got ...', with the beginning of the value as JSON."""
    return ValueError(f"{where}: wanted {wanted}, got {json.dumps(got, ensure_ascii=False)[:80]}" + hint)


def is_score(x):
    """Whether it is a number in [0, 1], or a missing one: null or NaN."""
    return x is None or (type(x) in (int, float) and not (x < 0 or x > 1))  # the type of true is bool


def read_groups(path, setting=""):
    """Groups from a file. Raises ValueError or FileNotFoundError naming file and line.

    Ours, JSON lines: {"id", "input", "positives": [...], "negatives": [...], "split": "train" | "val" | "test"}, and
    "paired": true if negatives[i] is positives[i] with one thing changed; others are ignored. The paper's release, one
    JSON array: {"input", "paraphrases", "paraphrases_toxic"}, lists or {text: score}. Without ids, the position
    counts; without splits, a hash of the input decides (70 / 10 / 20 %).
    """
    return [group for _, _, group in group_records(path, setting)]


def group_records(path, setting=""):
    """[(where, record, Group)] of a group file: `read_groups` with what else a record holds."""
    hint = f'give a .jsonl of groups, {{"input", "positives", "negatives"}} a line{setting and f", or --{setting}=toy"}'
    records = read_records(path, "group file", hint)
    if not records:
        raise ValueError(f"{path} holds no groups: {hint}")
    out, ids, splits = [], {}, {}  # where an id is; splits by input
    for number, (where, record) in enumerate(records, 1):
        group = _group(record, where, number)
        if group.id in ids:
            raise wrong(where, f"another id than {ids[group.id]} has", group.id)
        if (other := splits.setdefault(group.input, group.split)) != group.split:
            raise wrong(where, f"split {other!r}, as another group with this input has", group.split)
        ids[group.id] = where
        out.append((where, record, group))
    return out


def _group(record, where, number):
    released = "paraphrases" in record and "positives" not in record
    names = ("paraphrases", "paraphrases_toxic") if released else ("positives", "negatives")
    if missing := [k for k in ("input", *names) if k not in record]:
        raise wrong(where, f"a field {missing[0]!r}", record)
    is_sentence = lambda x: isinstance(x, str) and x.strip()
    if not is_sentence(record["input"]):
        raise wrong(where, "a sentence as 'input'", record["input"])
    for name in names:
        side = record[name]
        if not isinstance(side, list | (dict if released else list)) or not side:
            raise wrong(where, f"a list of sentences as {name!r}", side)
        if bad := [x for x in side if not is_sentence(x)]:
            raise wrong(where, f"sentences in the list {name!r}", bad[0])
    positives, negatives = (list(record[name]) for name in names)
    if both := set(positives) & set(negatives):
        raise wrong(where, "sentences either harmless or toxic", min(both), ": it is in both lists, take it out of one")
    tenth = zlib.crc32(record["input"].encode()) % 10
    split = record.get("split", ("val", "test", "test", *["train"] * 7)[tenth])
    if split not in SPLITS:
        raise wrong(where, f"one of {', '.join(SPLITS)} as 'split'", split)
    name = record.get("id")
    if not isinstance(name, str | int | None):
        raise wrong(where, "a text or a whole number as 'id'", name)
    paired = record.get("paired", False)
    if type(paired) is not bool:
        raise wrong(where, "true or false as 'paired'", paired)
    if paired and len(positives) != len(negatives):
        counts = dict(positives=len(positives), negatives=len(negatives))
        raise wrong(where, "as many negatives as positives in a 'paired' group", counts)
    return Group(str(number if name is None else name), record["input"], positives, negatives, split, paired)


def load_groups(name, setting="data"):
    """Groups by split, {'train': [Group], 'val': ..., 'test': ...}, from a file or a toy world's name."""
    worlds = dict(toy=toy.groups, toy_facts=toy_facts.groups)
    groups = worlds[name]() if name in worlds else read_groups(find(name), setting)
    return {split: [g for g in groups if g.split == split] for split in SPLITS}


def load_documents(name, seed):
    """Texts for language modelling, {'train': [str], 'val': [str]}.

    'toy' writes its own; of a group file, inputs, positives and negatives count; in a text file every line is one
    document, blank lines are skipped and each twentieth one is held out.
    """
    if name == "toy":
        return {"train": toy.documents(12_000, seed), "val": toy.documents(400, seed, split="val")}
    path = find(name)
    if path.suffix.lower() in (".jsonl", ".json"):
        groups = load_groups(path)
        return {s: [t for g in groups[s] for t in (g.input, *g.positives, *g.negatives)] for s in ("train", "val")}
    text = read_text(path, "text file", "give a .txt, a .jsonl of groups, or --data=toy")
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    if len(lines) < 20:
        raise ValueError(f"{name}: {len(lines)} lines with text, wanted at least 20 (one document a line)")
    return {"train": [t for i, t in enumerate(lines) if i % 20], "val": lines[::20]}


@dataclass
class Batch:
    """One forward pass. `ids` are the groups' or documents'; weight is how much of a step's mean it makes up."""

    ids: list
    idx: torch.Tensor  # (B, T); for groups B = G * (P + N), group by group, positives first
    lengths: torch.Tensor  # (B,)
    weight: int  # groups, or scored tokens of documents
    start: torch.Tensor = None  # (B,) of an anchor's texts: scored from this position on
    anchor: "Batch" = None  # texts that go along
    base: torch.Tensor = None  # (B,) phi under the frozen base, if that is wanted

    @property
    def tokens(self):
        """Scored tokens."""
        return int((self.lengths - 1).sum())

    def rows(self):
        """(idx, lengths, start) of its own B rows and, behind them, of the anchor's; start is 1 where none is set."""
        parts = [self, self.anchor] if self.anchor else [self]
        T = max(part.idx.size(1) for part in parts)
        idx = torch.cat([F.pad(part.idx, (0, T - part.idx.size(1))) for part in parts])
        start = torch.cat([torch.ones_like(p.lengths) if p.start is None else p.start for p in parts])
        return idx, torch.cat([part.lengths for part in parts]), start


class Batches:
    """The endless, shuffled sequence of batches: batches[i] is a pure function of data, settings, seed and i.

    So a run resumes by its step alone, and k batches of B/k hold what one of B holds. Items are reshuffled every
    epoch. An item is a group, a text, or a framed list of ids. With groups (n_pos, n_neg > 0), P positives and N
    negatives are drawn without replacement each time, of a paired group the negatives that belong to the positives; and
    n_random negatives of other groups are put behind them.
    """

    def __init__(self, items, tokenizer, batch_size, seed, max_tokens, n_pos=0, n_neg=0, n_random=0, starts=None):
        if batch_size > len(items):
            raise ValueError(f"batch_size={batch_size}, but there are only {len(items)} training items: lower it")
        self.batch_size, self.seed, self.sizes, self.n_random = batch_size, seed, (n_pos, n_neg), n_random
        self.ids = [item.id if n_pos else f"document {i}" for i, item in enumerate(items)]
        texts = [(item.positives, item.negatives) if n_pos else ([item],) for item in items]
        encode = lambda t: t[:max_tokens] if isinstance(t, list) else frame(t, tokenizer, max_tokens)
        self.paired = [n_pos > 0 and item.paired for item in items]
        self.encoded = [[[encode(t) for t in side] for side in sides] for sides in texts]
        self.truncated = sum(s[-1] != tokenizer.eot_token for sides in self.encoded for side in sides for s in side)
        self.epoch, self.order = None, None
        self.starts = starts  # of the items
        self.anchor = None  # Batches of texts that go along, one with each batch
        self.base = None  # {tuple(row): phi under the frozen base}; what it lacks is NaN

    def _item(self, k):
        """Index of the k-th item of the endless sequence."""
        epoch, i = divmod(k, len(self.ids))
        if epoch != self.epoch:
            self.epoch, self.order = epoch, np.random.default_rng([self.seed, 0, epoch]).permutation(len(self.ids))
        return int(self.order[i])

    def __getitem__(self, i):
        numbers = range(i * self.batch_size, (i + 1) * self.batch_size)
        items, rows = [self._item(k) for k in numbers], []
        for k, item in zip(numbers, items, strict=True):
            if not self.sizes[0]:  # a text: nothing to draw
                rows += self.encoded[item][0]
                continue
            rng = np.random.default_rng([self.seed, 1, k])
            order = rng.permutation(len(self.encoded[item][0])) if self.paired[item] else None  # one for both sides
            for side, n in zip(self.encoded[item], self.sizes, strict=True):
                drawn = rng.choice(len(side), n, replace=False) if order is None else order[:n]
                rows += [side[j] for j in drawn]
            for other in rng.choice(len(self.ids) - 1, self.n_random):  # negatives of any group but this one
                side = self.encoded[other + (other >= item)][1]
                rows.append(side[rng.integers(len(side))])
        batch = Batch([self.ids[item] for item in items], *pad(rows), weight=len(items))
        if not self.sizes[0]:
            batch.weight = batch.tokens
        batch.start = torch.tensor([self.starts[item] for item in items]) if self.starts else None
        batch.anchor = self.anchor[i] if self.anchor else None
        batch.base = torch.tensor([self.base.get(tuple(row), float("nan")) for row in rows]) if self.base else None
        return batch


def check_sizes(groups, n_pos, n_neg):
    """Raise ValueError if a group has fewer than P positives or N negatives."""
    if small := [g for g in groups if len(g.positives) < n_pos or len(g.negatives) < n_neg]:
        g = small[0]
        raise ValueError(
            f"--n_pos={n_pos} and --n_neg={n_neg} want more than {len(small)} groups have, such as {g.id!r} with "
            f"{len(g.positives)} positives and {len(g.negatives)} negatives: lower them, or take these groups out"
        )


def open_data(config, tokenizer, n_positions):
    """(training batches, validation items, groups by split). Prints the counts."""
    max_tokens = min(config.max_tokens, n_positions + 1)  # the last token is predicted, never read
    if config.objective == "lm":
        texts, groups = load_documents(config.data, config.seed), {}
        batches = Batches(texts["train"], tokenizer, config.batch_size, config.seed, max_tokens)
        held_out = [frame(t, tokenizer, max_tokens) for t in texts["val"][: config.eval_groups]]
        counts = f"{len(texts['train']):,} documents to train on, {len(held_out)} to validate"
    else:
        groups = load_groups(config.data)
        if missing := [s for s in SPLITS if not groups[s]]:
            raise ValueError(f"{config.data} has no groups of split {missing[0]!r}, which training needs: add some")
        check_sizes(groups["train"], config.n_pos, config.n_neg)
        sizes = (config.n_pos, config.n_neg, config.n_random)
        batches = Batches(groups["train"], tokenizer, config.batch_size, config.seed, max_tokens, *sizes)
        held_out = groups["val"][: config.eval_groups]
        counts = ", ".join(f"{len(groups[s])} {s}" for s in SPLITS) + " groups"
    cut = f"; {batches.truncated} sentences cut at {max_tokens} tokens" if batches.truncated else ""
    print(f"data         {config.data}: {counts}{cut}")
    return batches, held_out, groups
