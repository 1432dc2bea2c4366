"""Weights that are changed by arithmetic in the place of training."""

import torch
from torch.nn import functional as F


@torch.no_grad()
def task_vector(model, tuned, strength):
    """theta - strength (theta_tuned - theta): away from a model that was tuned on what is unwanted (task arithmetic,
    Ilharco et al. 2023, arXiv 2212.04089). Raises ValueError if that model has other shapes."""
    mine, other = dict(model.named_parameters()), dict(tuned.named_parameters())
    if {k: p.shape for k, p in mine.items()} != {k: p.shape for k, p in other.items()}:
        raise ValueError("edit_model is a model of another size: give one that was tuned from --init_from")
    for name, p in mine.items():
        p -= strength * (other[name].to(p.device) - p)


@torch.no_grad()
def profs(model, pos, neg, directions, first):
    """ProFS (Uppaal et al. 2024, arXiv 2405.13967): what the MLPs of the blocks from `first` on write loses the
    directions in which the hidden states of a pair differ most, W <- (I - V V^T) W. V (C, directions) are the leading
    right singular vectors of the differences, from which the mean state of the positives, common to all text, has been
    projected out.

    pos, neg: mean hidden states behind each block, see `block_states`; row i of both is a pair. Shape: (blocks, M, C)
    """
    for block, x, y in list(zip(model.transformer.h, pos, neg, strict=True))[first:]:
        mean = F.normalize(x.mean(0), dim=0)  # (C,)
        difference = y - x
        difference = difference - (difference @ mean)[:, None] * mean  # (M, C)
        v = torch.linalg.svd(difference, full_matrices=False).Vh[:directions].t()  # (C, directions)
        weight = block.mlp.c_proj.weight  # (C, 4 C)
        weight -= v @ (v.t() @ weight)


@torch.no_grad()
def block_states(model, idx, lengths):
    """Mean over its tokens of a row's hidden states behind each block. Framed rows as in GPT.sequence_nll, idx (B, T),
    lengths (B,) -> (blocks, B, C)."""
    seen, T = [], int(lengths.max()) - 1  # the last token is predicted, never read
    hooks = [b.register_forward_hook(lambda _, args, out: seen.append(out)) for b in model.transformer.h]
    try:
        model.hidden(idx[:, :T], torch.arange(T, device=idx.device))
    finally:
        for hook in hooks:
            hook.remove()
    count = (lengths - 1).to(idx.device)[:, None]  # padding stands on the right, where no real token sees it
    read = torch.arange(T, device=idx.device) < count  # (B, T)
    return torch.stack([(states * read[..., None]).sum(1) / count for states in seen])
