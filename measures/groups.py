"""Scores of sentences, and what they say of groups: perplexities, the signed gap, the ranking."""

import numpy as np
import torch
from tqdm import tqdm

import data
from engine.edits import block_states
from loss import diagnose

TOKENS = 8192  # positions per forward pass


def token_batches(lengths, what):
    """Index lists over rows of these lengths, longest first, each of at most TOKENS positions; with a progress bar."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    with tqdm(total=len(lengths), desc=what, leave=False, delay=1) as bar:
        while order:
            n = max(1, TOKENS // lengths[order[0]])
            yield order[:n]
            bar.update(len(order[:n]))
            order = order[n:]


@torch.no_grad()
def scores(model, sequences, starts=None, what="scores"):
    """phi of token lists (see GPT.sequence_nll), from position `starts` on if given. Returns an array (len,), nats."""
    phi = np.empty(len(sequences))
    for rows in token_batches([len(s) for s in sequences], what):
        idx, lengths = data.pad([sequences[r] for r in rows])
        start = None if starts is None else torch.tensor([starts[r] for r in rows])
        phi[rows] = model.sequence_nll(idx.to(model.device), lengths, start).cpu()
    return phi


def hidden_states(model, sequences):
    """Mean hidden states of token lists behind each block, see `block_states` -> (blocks, len, C)."""
    shape = model.config.n_layer, len(sequences), model.config.n_embd
    states = torch.empty(shape, device=model.device)
    for rows in token_batches([len(s) for s in sequences], "hidden states"):
        idx, lengths = data.pad([sequences[r] for r in rows])
        states[:, rows] = block_states(model, idx.to(model.device), lengths)
    return states


def frames(texts, tokenizer, model, max_tokens):
    """Framed token lists of texts, cut to max_tokens and to what the model's context can score."""
    return [data.frame(t, tokenizer, min(max_tokens, model.config.n_positions + 1)) for t in texts]


def measure_groups(model, groups, tokenizer, max_tokens):
    """Scores of all sentences of the groups -> {name: rows}, one row per group; see loss.diagnose."""
    sides = [side for g in groups for side in (g.positives, g.negatives)]
    sequences = frames([t for side in sides for t in side], tokenizer, model, max_tokens)
    cuts, longest = np.cumsum([len(side) for side in sides])[:-1], max(map(len, sides))
    phi = np.split(scores(model, sequences), cuts)
    tokens = np.split(np.array([len(s) - 1 for s in sequences]), cuts)
    rows = {}
    for i in range(0, len(sides), 2):
        pos, neg = (torch.tensor(p)[None] for p in phi[i : i + 2])
        row = {name: v.item() for name, v in diagnose(pos, neg).items()}
        row |= dict(positive_gap=row["signed_gap"] > 0, auc=np.full((longest, 2), np.nan))
        for column, name in enumerate(("ppl_positive", "ppl_negative")):
            p, n = phi[i + column], tokens[i + column]
            row[name] = [p @ n, n.sum()]
            row["auc"][: len(p), column] = p
        for name, v in row.items():
            rows.setdefault(name, []).append(v)
    return {name: np.array(v, dtype=float) for name, v in rows.items()}
