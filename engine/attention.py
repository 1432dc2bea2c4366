"""Attention, by whatever computes it fastest: torch's own, torch's over packed rows, or plain products.

Shapes: B rows, nh heads of hs channels each, T positions, N packed positions.
"""

import inspect
import math
from functools import lru_cache

import torch
from torch.nn import functional as F


def attend(q, k, v, mask, prefix):
    """Attention over (B, nh, T, hs), causal if there is no mask (B, 1, Tq, Tk). `prefix` holds the keys and values,
    (nh, Tp, hs) each, of tokens that all rows have before their own."""
    if prefix:
        return _behind_prefix(q, k, v, mask, *prefix)
    if q.is_cpu and q.dtype == torch.bfloat16 and torch.is_grad_enabled() and mask is None:
        return _plain_causal(q, k, v)  # the backward pass of torch's own takes eight times as long
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)


def _plain_causal(q, k, v):
    """Causal attention over (B, nh, T, hs), with all T x T probabilities at once."""
    B, nh, T, hs = q.shape
    q, k, v = (x.reshape(B * nh, T, hs) for x in (q, k, v))
    causal = q.new_full((T, T), -math.inf).triu(1)
    p = torch.baddbmm(causal, q, k.transpose(1, 2), alpha=1 / math.sqrt(hs)).softmax(-1)
    return (p @ v).view(B, nh, T, hs)


def _behind_prefix(q, k, v, mask, keys, values):
    """Attention to a shared prefix and to the row's own past. The queries of all rows meet the prefix in one product,
    for which it is neither copied nor read once per row."""
    B, nh, T, hs = q.shape
    keys, values, q = keys.to(q.dtype), values.to(q.dtype), q / math.sqrt(hs)
    flat = q.transpose(0, 1).reshape(nh, B * T, hs)
    before = (flat @ keys.transpose(1, 2)).view(nh, B, T, -1).transpose(0, 1)  # (B, nh, T, Tp)
    own = q @ k.transpose(2, 3) + mask  # (B, nh, T, Tk)
    p = torch.cat([before, own], -1).softmax(-1, dtype=torch.float32).to(q.dtype)
    before, own = p.split([keys.size(1), k.size(2)], -1)
    y = (before.transpose(0, 1).reshape(nh, B * T, -1) @ values).view(nh, B, T, hs).transpose(0, 1)
    return y + own @ v


@lru_cache
def varlen(device, width):
    """torch's attention over packed rows, for half precision and heads of this width, or None where it is missing: it
    is there on CUDA from sm80 on, for widths that are multiples of 8 up to 256, in torch 2.11 or newer."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0) or width % 8 or width > 256:
        return None
    try:
        from torch.nn.attention.varlen import varlen_attn  # late: it takes a second
    except ImportError:
        return None
    return varlen_attn if "window_size" in inspect.signature(varlen_attn).parameters else None
