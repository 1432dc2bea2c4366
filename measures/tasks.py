"""Tasks: multiple choice and last words, in the published files and by the definitions of lm-eval.

"lm-eval" is EleutherAI's evaluation harness, whose definitions the published numbers follow.
"""

import hashlib
import io
import json
import math
import re
import zipfile
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from configs import ROOT
from data import wrong
from engine import head
from engine.run import atomic_write, read_records
from engine.weights import download
from measures.groups import token_batches
from measures.report import MEASURES
from model import Pack, row_sums

# name -> address and sha256 of the published file
SOURCES = {
    "lambada": (
        "https://huggingface.co/datasets/EleutherAI/lambada_openai/resolve/900124bf3b8235c6daf21033af9948b3f07346c4/data/lambada_test_en.jsonl",
        "4aa8d02cd17c719165fc8a7887fddd641f43fcafa4b1c806ca8abc31fabdb226",
    ),
    "piqa": (
        "https://storage.googleapis.com/ai2-mosaic/public/physicaliqa/physicaliqa-train-dev.zip",
        "54d32a04f59a7e354396f321723c8d7ec35cc6b08506563d8d1ffcc15ce98ddd",
    ),
    "hellaswag": (
        "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl",
        "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588",
    ),
    "wikitext2": (
        "https://huggingface.co/datasets/ggml-org/ci/resolve/927b3642933080f1b0e811e2f916e14c292992f9/wikitext-2-raw-v1.zip",
        "ef7edb566e3e2b2d31b29c1fdb0c89a4cc683597484c3dc2517919c615435a11",
    ),
}


def read_task(path):
    """Items of a task file, [(context, [choice, ...], gold)]: {"query", "choices", "gold"} a line, where the likeliest
    choice is to be the gold one, or {"context", "continuation"}, where gold is None: the one continuation is to be
    foretold. Raises ValueError naming the line.
    """
    items, hint = [], "give a .jsonl as measures/README.md describes it"
    for where, record in read_records(path, "task file", hint):
        if "continuation" in record:
            context, choices, gold = record.get("context"), [record["continuation"]], None
        else:
            context, choices, gold = record.get("query"), record.get("choices"), record.get("gold")
        ok = isinstance(context, str) and isinstance(choices, list) and choices
        if not ok or not all(isinstance(c, str) and c.strip() for c in choices):
            raise wrong(where, "'query', 'choices' and 'gold', or 'context' and 'continuation'", record)
        if "continuation" not in record and not (type(gold) is int and 0 <= gold < len(choices)):
            raise wrong(where, f"the number of a choice, 0 to {len(choices) - 1}, as 'gold'", gold)
        items.append((context, choices, gold))
    if not items:
        raise ValueError(f"{path} holds no items: {hint}")
    if len({gold is None for *_, gold in items}) > 1:
        raise ValueError(f"{path} mixes choices and continuations: one kind a file")
    return items


def split_tokens(tokenizer, context, continuation, framed=False):
    """(context ids, continuation ids), split as lm-eval does: white space at the context's end goes to the
    continuation, both are encoded together, and the continuation is what follows the context's own ids. An empty
    context becomes the end token; if `framed`, every one begins with it.
    """
    whole, ids = tokenizer.encode_ordinary(context + continuation), tokenizer.encode_ordinary(context.rstrip())
    return [tokenizer.eot_token] * (framed or not ids) + ids, whole[len(ids) :]


def convert(name, data):
    """The bytes of a published file -> the text of ours: a task file's lines, or WikiText-2's test text."""
    if name == "wikitext2":
        return _member(data, "wiki.test.raw")
    rows = _member(data, "dev.jsonl") if name == "piqa" else data.decode("utf-8")
    rows = [json.loads(line) for line in rows.split("\n") if line.strip()]
    if name == "lambada":
        pairs = (row["text"].rsplit(" ", 1) for row in rows)
        records = [dict(context=context, continuation=word) for context, word in pairs]
    elif name == "piqa":
        golds = [int(x) for x in _member(data, "dev-labels.lst").split()]
        records = [
            dict(query=f"Question: {row['goal']}\nAnswer:", choices=[row["sol1"], row["sol2"]], gold=gold)
            for row, gold in zip(rows, golds, strict=True)
        ]
    else:
        records = [
            dict(
                query=_hellaswag(f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"),
                choices=[_hellaswag(ending) for ending in row["endings"]],
                gold=int(row["label"]),
            )
            for row in rows
        ]
    return "".join(json.dumps(record) + "\n" for record in records)


def _member(data, name):
    """A text file of a zip archive."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return archive.read(next(n for n in archive.namelist() if n.endswith(name))).decode("utf-8")


def _hellaswag(text):
    """WikiHow's marks taken out, as lm-eval does."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def published_file(name):
    """The file of a task or text that is published under a name (SOURCES): downloaded, checked, converted if missing.
    Raises ConnectionError with one line."""
    folder = ROOT / "data" / "downloads"
    file = folder / ("wiki.test.raw" if name == "wikitext2" else f"{name}.jsonl")
    if not file.is_file():
        url, sha256 = SOURCES[name]
        source = folder / url.rsplit("/", 1)[1]
        try:
            if not source.is_file():  # else somebody put it there
                download(url, source, sha256)
        except OSError as e:
            raise ConnectionError(f"{name}: {url} could not be fetched ({e}). Put that file into {folder}") from e
        if hashlib.sha256(source.read_bytes()).hexdigest() != sha256:
            raise ValueError(f"{source} is not the published file (its sha256 differs): delete it, or fetch {url}")
        atomic_write(file, convert(name, source.read_bytes()))
    return file


@torch.no_grad()
def choice_nll(model, contexts, choices):
    """Score the possible continuations of some contexts; every context is computed once for all its choices.

    contexts: B lists of token ids; choices: B lists of lists of ids, none of them empty. A row holds the context and
    behind it its choices, side by side: positions go on from the context for each, and a mask hides them from each
    other. Returns (nll, greedy), one entry per choice, row by row: its total negative log-likelihood, nats (M,), and
    whether each of its tokens is the likeliest one (M,) bool. Raises ValueError on a row too long.
    """
    if not all(contexts) or not all(x for xs in choices for x in xs):
        raise ValueError("a context or a choice is empty: a context begins with the end token at least")
    B, T = len(contexts), max(len(c) + sum(len(x) - 1 for x in xs) for c, xs in zip(contexts, choices, strict=True))
    idx, pos, part, source, target, owner = (x.to(model.device) for x in _lay_side_by_side(contexts, choices, B, T))
    model.check_length(int(pos.max()) + 1)
    mask = None
    if max(map(len, choices)) > 1:  # else the row is an ordinary text
        mask = (part[:, None] == 0) | (part[:, None] == part[:, :, None])
        mask = (mask & (pos[:, None] <= pos[:, :, None]))[:, None]  # (B, 1, Tq, Tk)
    index = (part >= 0).flatten().nonzero()[:, 0]
    h = model.hidden(idx.flatten()[index], pos.flatten()[index], Pack(index, B, T, mask))  # (N, C)
    row = torch.empty(B * T, dtype=torch.long, device=model.device)
    row[index] = torch.arange(len(index), device=model.device)
    weight = head.cast_weight(model.lm_head.weight)
    h = h[row[source]].to(weight.dtype)
    nll, top = torch.empty(len(h), device=h.device), torch.empty(len(h), dtype=torch.bool, device=h.device)
    for rows, logits in head.logit_chunks(h, weight, model.config.vocab_size):
        nll[rows] = F.cross_entropy(logits, target[rows], reduction="none")
        top[rows] = logits.argmax(-1) == target[rows]
    M = int(owner[-1]) + 1
    return row_sums(nll, owner, M), row_sums(~top, owner, M) == 0


def _lay_side_by_side(contexts, choices, B, T):
    """Tokens, positions and parts (B, T) of the rows of `choice_nll`, where part is 0 in the context, 1.. in a choice
    and -1 in the padding; and of every scored token where it is predicted (in B * T), what it is, and whose: (S,)."""
    idx, pos, part = torch.zeros(B, T).long(), torch.zeros(B, T).long(), torch.full((B, T), -1)
    source, target, owner = [], [], []
    for b, (context, xs) in enumerate(zip(contexts, choices, strict=True)):
        n = len(context)
        tokens, at, parts = list(context), list(range(n)), [0] * n
        for i, x in enumerate(xs, 1):
            source += [b * T + n - 1, *range(b * T + len(tokens), b * T + len(tokens) + len(x) - 1)]
            target += x
            owner += [owner[-1] + 1 if owner else 0] * len(x)
            tokens += x[:-1]
            at += range(n, n + len(x) - 1)
            parts += [i] * (len(x) - 1)
        for table, values in ((idx, tokens), (pos, at), (part, parts)):
            table[b, : len(values)] = torch.tensor(values)
    return idx, pos, part, torch.tensor(source), torch.tensor(target), torch.tensor(owner)


def measure_task(model, tokenizer, items, what="task", framed=False):
    """Items of `read_task` -> {name: rows}, one row per item, by the definitions of lm-eval: acc, acc_norm, acc_token
    of multiple choice, and the probability that sampling writes the right choice; acc and ppl of continuations. A
    context too long loses its start. framed: see `split_tokens`."""
    limit, jobs = model.config.n_positions + 1, []  # the last token is only predicted
    for i, (context, choices, _) in enumerate(items):
        pairs = [split_tokens(tokenizer, context, " " + c, framed) for c in choices]
        sizes = [len(choice) for _, choice in pairs]
        room = limit - max(sizes)
        if not all(sizes) or room < 1:
            n = min(sizes) and max(sizes)  # an empty one first
            told = f"item {i + 1} of {what}: choice {sizes.index(n) + 1} has {n} tokens, wanted 1 to {limit - 1}"
            raise ValueError(f"{told}: take that item out")
        if len(pairs[0][0]) <= room:  # one row: the context once, its choices side by side
            jobs.append((pairs[0][0], [choice for _, choice in pairs], [(i, j) for j in range(len(pairs))]))
        else:  # what is cut off depends on the choice
            for j, (ids, choice) in enumerate(pairs):
                jobs.append((ids[-(limit - len(choice)) :], [choice], [(i, j)]))
    nll, greedy, tokens = {}, {}, {}
    for rows in token_batches([len(c) + sum(map(len, xs)) for c, xs, _ in jobs], what):
        values = choice_nll(model, [jobs[r][0] for r in rows], [jobs[r][1] for r in rows])
        keys = [key for r in rows for key in jobs[r][2]]
        for key, x, top in zip(keys, *(v.tolist() for v in values), strict=True):
            nll[key], greedy[key] = x, top
        tokens |= {key: len(x) for r in rows for key, x in zip(jobs[r][2], jobs[r][1], strict=True)}
    if items[0][2] is None:
        return dict(
            acc=np.array([float(greedy[i, 0]) for i in range(len(items))]),
            ppl=np.array([nll[i, 0] for i in range(len(items))]),
        )
    out = {"acc": [], "acc_norm": [], "acc_token": [], "probability": []}
    for i, (_, choices, gold) in enumerate(items):
        cost = np.array([nll[i, j] for j in range(len(choices))])
        characters, n = np.array([len(c) for c in choices]), np.array([tokens[i, j] for j in range(len(choices))])
        for name, x in (("acc", cost), ("acc_norm", cost / characters), ("acc_token", cost / n)):
            out[name].append(float(np.argmin(x) == gold))
        out["probability"].append(math.exp(-cost[gold]))
    return {name: np.array(v) for name, v in out.items()}


def task_scores(model, tokenizer, path):
    """One task file -> {'acc', 'acc_norm', 'acc_token', 'n'}, or {'acc', 'ppl', 'n'} of continuations."""
    items = read_task(path)
    rows = measure_task(model, tokenizer, items, Path(path).stem)
    return {name: MEASURES[name].of(v) for name, v in rows.items()} | {"n": len(items)}
