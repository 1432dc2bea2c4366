"""A token from the logits of each row, by temperature, top-k and top-p, from given random numbers."""

import math

import torch


def sample(logits, temperature, top_k, top_p, noise, plain=None):
    """One token per row of logits (B, V) fp32, from uniform noise (B, R) -> (B,). The nucleus is that of `plain`, other
    logits, if these are given.

    The nucleus is the smallest set of tokens whose mass reaches top_p. A token belongs to it if all likelier ones
    together weigh less than top_p; so draw from the whole distribution and draw again what falls outside. That sorts
    nothing: 50,000 numbers a row are slow to sort. Rows without luck in R draws are sorted after all.
    """
    if temperature == 0:
        return logits.argmax(-1)
    probs = (logits / temperature if temperature != 1 else logits).softmax(-1)
    if top_k:
        probs = probs.masked_fill(probs < probs.topk(min(top_k, probs.size(-1))).values[:, -1:], 0.0)
        probs = probs / probs.sum(-1, keepdim=True)
    cdf = probs.cumsum(-1)
    at = noise * cdf[:, -1:]
    drawn = torch.searchsorted(cdf, at, right=True).clamp_(max=probs.size(-1) - 1)  # (B, R)
    token = drawn[:, 0].clone()
    if top_p >= 1:
        return token
    likely = probs if plain is None else (plain / temperature).softmax(-1)
    weigh = lambda x, p: torch.gt(x, p[:, None], out=torch.empty_like(x)).mul_(x).sum(-1)  # twice as fast as a mask
    beyond = lambda x, tokens: torch.stack([weigh(x, p) >= top_p for p in x.gather(1, tokens).unbind(1)], 1)
    left = beyond(likely, drawn[:, :1])[:, 0].nonzero()[:, 0]  # a GPU is waited for here and once more
    outside = beyond(likely[left], drawn[left, 1:])
    token[left] = drawn[left, 1:].gather(1, outside.int().argmin(1, keepdim=True))[:, 0]  # the first one inside
    left = left[outside.all(1)]
    if not len(left):
        return token
    likely, cdf, last, at = likely[left], cdf[left], drawn[left, -1:], at[left, -1:]
    ranked, order = likely.sort(-1, descending=True)
    mass = ranked.cumsum(-1)
    size = ((mass - ranked) < top_p).sum(-1, keepdim=True).clamp_(min=1)
    # The last draw as a new number: where it fell in the mass outside, for nothing more is known of it.
    rest = probs[left].masked_fill(likely >= ranked.gather(1, size - 1), 0.0).cumsum(-1)
    u = (rest.gather(1, last) - cdf.gather(1, last) + at) / rest[:, -1:]
    if plain is not None:  # from logits: inside, the mass may be too small for a float
        inside = torch.arange(ranked.size(-1), device=ranked.device) < size
        mass = (logits[left] / temperature).gather(1, order).masked_fill(~inside, -math.inf).softmax(-1).cumsum(-1)
    pick = torch.searchsorted(mass, u.clamp(0, 1) * mass.gather(1, size - 1), right=True).minimum(size - 1)
    token[left] = order.gather(1, pick)[:, 0]
    return token
