"""Texts: perplexity under the definitions that published numbers have, and drift from the base model.

"lm-eval" is EleutherAI's evaluation harness.
"""

import re

import numpy as np
import torch

import data
from engine.run import read_text
from measures.groups import scores, token_batches
from measures.statistics import pooled_ppl


def window_nll(model, pieces, what="perplexity"):
    """(total nll, tokens) of each window, (W, 2)."""
    count = np.array([len(tokens) - start for tokens, start in pieces])
    phi = scores(model, [tokens for tokens, _ in pieces], [start for _, start in pieces], what)
    return np.stack([phi * count, count], axis=1)


def text_perplexity(model, tokenizer, text, context, stride):
    """Token perplexity of a text: 'ppl' pooled over windows, 'tokens' of the text, 'scored' of them. No end token is
    put before it. Raises ValueError if the text or the context is too short or the context too long."""
    tokens = tokenizer.encode_ordinary(text)
    if len(tokens) < 2 or not 2 <= context <= model.config.n_positions or not 1 <= stride <= context:
        raise ValueError(
            f"{len(tokens)} tokens, context {context}, stride {stride}: wanted at least 2 tokens, 2 <= context <= "
            f"{model.config.n_positions} and 1 <= stride <= context"
        )
    rows = window_nll(model, windows(tokens, context, stride))
    return dict(ppl=pooled_ppl(rows), tokens=len(tokens), scored=int(rows[:, 1].sum()))


def read_measured_text(path, tokenizer):
    """(token ids, pages or None) of a text file. A .raw file is WikiText: the hub's framing, and lm-eval's pages."""
    text, pages = read_text(path, "text file", "give a .txt, or a .raw of WikiText"), None
    if str(path).lower().endswith(".raw"):
        text, pages = wikitext_rows(text), wikitext_pages(text)
    tokens = tokenizer.encode_ordinary(text)
    if len(tokens) < 2:
        raise ValueError(f"{path} holds no text to measure: two tokens are needed at least")
    return tokens, pages


def measure_text(model, tokenizer, tokens, pages, context):
    """Perplexities of a text -> {name: rows}; one row per window, for word_ppl per page."""
    out = {}
    for name, stride in (("text_ppl", context), ("text_ppl_stride", context // 2)):
        what = f"text, windows of {context}, stride {stride}"
        out[name] = window_nll(model, windows(tokens, context, stride), what)
    if pages:
        cleaned = [[tokenizer.eot_token, *tokenizer.encode_ordinary(detokenize(p))] for p in pages]
        pieces = [page_windows(tokens, context) for tokens in cleaned]
        nll = window_nll(model, [piece for some in pieces for piece in some], "pages")[:, 0]
        totals = [part.sum() for part in np.split(nll, np.cumsum([len(some) for some in pieces])[:-1])]
        out["word_ppl"] = np.array([[t, len(re.split(r"\s+", p))] for t, p in zip(totals, pages, strict=True)])
    return out


@torch.no_grad()
def measure_drift(model, base, sequences):
    """KL(base || model) -> {'kl': rows}, one row (sum, tokens) per token list."""
    total, count = np.zeros(len(sequences)), np.array([len(s) - 1 for s in sequences])
    if model is base:
        return {"kl": np.stack([total, count], axis=1)}
    for rows in token_batches([len(s) for s in sequences], "drift"):
        idx, lengths = data.pad([sequences[r] for r in rows])
        total[rows] = model.sequence_kl(base, idx.to(model.device), lengths).cpu()
    return {"kl": np.stack([total * count, count], axis=1)}


def wikitext_rows(raw):
    """The text of a wiki.*.raw file under the hub's framing: its rows are the file's lines, empty for blank ones, and
    perplexity scripts join them by blank lines. (The test file then has 287,644 GPT-2 tokens.)"""
    lines = raw.removesuffix("\n").split("\n")
    return "\n\n".join(line + "\n" if line.strip() else "" for line in lines)


def wikitext_pages(raw):
    """The pages of a wiki.*.raw file as lm-eval cuts them: before each line that looks like a first-level heading.
    (So the test file has 62 pages, not 60: two of its formulas look like one.)"""
    pages = [[]]
    for line in raw.split("\n"):
        mark = line.replace("= = =", "===").replace("= =", "==").strip()
        if mark.startswith("= ") and mark.endswith(" ="):
            pages.append([])
        pages[-1].append(line)
    return [page for page in map("\n".join, pages) if page.strip()]


# Ordered replacements that turn WikiText's spaced-out tokens into ordinary text, lm-eval's.
DETOKENIZE = [(re.escape(a), b) for a, b in (("s '", "s'"), (" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", "."))]
DETOKENIZE += [(f" {re.escape(mark)} ", f"{mark} ") for mark in ":;.!?,"]
DETOKENIZE += [(rf"\{a}\s*([^\{b}]*?)\s*\{b}", rf"{a}\1{b}") for a, b in ("()", "[]", "{}", '""', "''")]
DETOKENIZE += [("= = = =", "===="), ("= = =", "==="), ("= =", "=="), (" ° ", "°"), (" \n", "\n"), ("\n ", "\n")]
DETOKENIZE += [(" N ", " 1 "), (" 's", "'s")]


def detokenize(page):
    for pattern, replacement in DETOKENIZE:
        page = re.sub(pattern, replacement, page)
    return page


def windows(tokens, context, stride):
    """[(token list, first scored position)]: windows of at most `context` tokens, `stride` apart, that score each
    token but the first once, in the earliest window that has a token before it. (At stride = context, the first token
    of every window has none.)"""
    out, done = [], 1
    for begin in range(0, len(tokens), stride):
        end = min(begin + context, len(tokens))
        start = max(done, begin + 1)
        if start < end:
            out.append((tokens[begin:end], start - begin))
        done = end
        if end == len(tokens):
            break
    return out


def page_windows(tokens, context):
    """The same as lm-eval's rolling windows do it: `tokens` begin with an end token, each window scores up to `context`
    new ones after at least one old one, and the last window is filled up with old ones."""
    out = []
    for done in range(1, len(tokens), context):
        end = min(done + context, len(tokens))
        begin = max(0, end - context - 1)
        out.append((tokens[begin:end], done - begin))
    return out
