"""The output head: log-probabilities over a large vocabulary, exact enough for perplexities, in bounded memory.

Shapes: N positions, C channels, V vocabulary. Of N x V numbers at most KEEP are kept, for the backward pass; logits
exist for a chunk of positions at a time.
"""

import torch
from torch.nn import functional as F

CHUNK = 2**23  # logits computed at once: 32 MiB in fp32, and as much again for each step from them to the loss
KEEP = 2**27  # numbers (N x V) kept for the backward pass; of more positions than that they are computed again
LARGER = {"cuda": 8}  # CHUNK and KEEP are so many times as large there
SLICE = 1024  # of the vocabulary, in one fp32 product on a CPU
ALIGN = {"cuda": 64}  # rows of the weights, see cast_weight


def limit(numbers, tensor):
    """CHUNK or KEEP where the tensor is."""
    return numbers * LARGER.get(tensor.device.type, 1)


def compute_dtype(tensor):
    """The dtype of matrix products: autocast's where it is on, else the tensor's own."""
    device = tensor.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tensor.dtype


def cast_weight(weight, dtype=None):
    """weight (V, C) in the dtype of products, and rows of zeros up to a multiple of ALIGN: on a GPU half precision is
    slow where the rows of its matrices, here 50257 logits each, do not begin at multiples of 16 bytes."""
    more, weight = -len(weight) % ALIGN.get(weight.device.type, 1), weight.to(dtype or compute_dtype(weight))
    return F.pad(weight, (0, 0, 0, more)) if more else weight


def fp32_logits(h, weight):
    """h (N, C) @ weight.T (V, C) -> (N, V) in fp32, also where the product runs in half precision.

    GPT-2's raw logits sit at -35 to -100, where neighbouring bf16 numbers lie up to 0.5 apart, while the objective
    lives on differences of 0.1 nat. A half-precision product is accurate inside and only rounded on the way out, so
    a second one fetches what the first rounded away. On CUDA one product can leave the rounding out.
    """
    if h.is_cuda and h.dtype != torch.float32:
        return torch.mm(h, weight.t(), out_dtype=torch.float32)
    if h.is_cpu and h.dtype == torch.float32:  # with AVX2 one product is half as fast
        logits = h.new_empty(len(h), len(weight))
        for part, rows in zip(logits.split(SLICE, 1), weight.split(SLICE), strict=True):
            torch.mm(h, rows.t(), out=part)
        return logits
    logits = h @ weight.t()
    if h.dtype == torch.float32:
        return logits
    return logits.float().add_(torch.addmm(logits, h, weight.t(), beta=-1))


def logits_about(level, h, weight, out=None):
    """h @ weight.T minus level (N, 1), (N, V) in half precision. It is this difference that is rounded: near the level
    one product is nearly exact."""
    return torch.addmm((-level).expand(-1, len(weight)), h, weight.t(), out=out)


def bf16_on_cpu(tensor):
    """Whether fp32_logits would take two products where one about a level will do."""
    return tensor.is_cpu and tensor.dtype == torch.bfloat16


def logit_chunks(h, weight, V=None):
    """Yields (slice of rows, their first V fp32 logits) of h (N, C), CHUNK numbers at a time, without gradients."""
    n = max(1, limit(CHUNK, h) // weight.size(0))
    for i in range(0, len(h), n):
        rows = slice(i, i + n)
        yield rows, fp32_logits(h[rows], weight)[:, :V]


def nll(h, weight, target):
    """-log softmax(h @ weight.T)[target] for h (N, C), weight (V, C), target (N,) int64 -> (N,) fp32, nats."""
    return _HeadLoss.apply(h, weight, target, None, torch.is_grad_enabled())


def kl(h, weight, h_base, weight_base):
    """KL(q || p) of p = softmax(h @ weight.T) and q = softmax(h_base @ weight_base.T), a constant -> (N,) fp32."""
    return _HeadLoss.apply(h, weight, h_base, weight_base, torch.is_grad_enabled())


class _HeadLoss(torch.autograd.Function):
    """Cross-entropy to the tokens `truth` (N,), or KL to a base model of hidden states `truth` (N, C) -> (N,) fp32.

    With p the softmax, q the one-hot token or the base's softmax, and g the incoming gradient,
    d/dh = g (p - q) weight and d/dweight = (p - q)^T (g h). So p (of KL: p - q) is all that the backward pass needs. It
    is kept in the products' dtype, or beyond KEEP numbers computed again.
    """

    @staticmethod
    def forward(ctx, h, weight, truth, weight_base, with_grad):
        ctx.dtype = compute_dtype(weight)
        keep = with_grad and any(ctx.needs_input_grad) and len(h) * len(weight) <= limit(KEEP, h)
        with torch.autocast(h.device.type, enabled=False):
            h_, weight_, truth_, weight_base_ = _cast(ctx.dtype, h, weight, truth, weight_base)
            kept = h_.new_empty(len(h), len(weight_)) if keep else None
            losses = _losses(h_, weight_, truth_, weight_base_, len(weight), kept)
        ctx.save_for_backward(h, weight, truth, weight_base, kept)
        return losses

    @staticmethod
    def backward(ctx, grad):
        h, weight, truth, weight_base, kept = ctx.saved_tensors
        with torch.autocast(h.device.type, enabled=False):
            h_, weight_, truth_, weight_base_ = _cast(ctx.dtype, h, weight, truth, weight_base)
            dh, gh = torch.empty_like(h), h * grad[:, None]
            dweight = None  # stays so where the embedding is frozen
            n = max(1, limit(KEEP, h) // len(weight))  # at least N if it was kept
            for i in range(0, len(h), n):
                rows, residual = slice(i, i + n), kept
                if residual is None:
                    residual = h_.new_empty(len(h_[rows]), len(weight_))
                    _losses(h_[rows], weight_, truth_[rows], weight_base_, len(weight), residual)
                dh[rows] = residual @ weight_
                if ctx.needs_input_grad[1]:
                    part = (residual.t() @ gh[rows].to(ctx.dtype))[: len(weight)]
                    dweight = part.to(weight.dtype) if dweight is None else dweight.add_(part)
            if weight_base is None:  # q is one-hot: its part of the products is a row of the weights
                dh -= weight[truth]
                if dweight is not None:
                    dweight.index_add_(0, truth, gh, alpha=-1)
            dh *= grad[:, None]
        return dh, dweight, None, None, None


def _cast(dtype, h, weight, truth, weight_base):
    truth, base = (truth, None) if weight_base is None else (truth.to(dtype), cast_weight(weight_base, dtype))
    return h.to(dtype), cast_weight(weight, dtype), truth, base


def _losses(h, weight, truth, weight_base, V, residual):
    """Losses (N,), chunk by chunk. The softmax p (of KL: p - q) goes into residual (N, V or more) unless it is None."""
    if weight_base is None and bf16_on_cpu(h):
        return _nll_of_one_product(h, weight, truth, residual)
    losses = []
    for rows, logits in logit_chunks(h, weight):
        logp = _log_softmax(logits, V)
        if weight_base is not None:
            logq = _log_softmax(fp32_logits(truth[rows], weight_base), V)
            q = logq.exp()
            losses.append(logq.sub_(logp).mul_(q).sum(-1))
            if residual is not None:
                residual[rows] = logp.exp_().sub_(q)
        else:
            losses.append(-logp.gather(1, truth[rows, None])[:, 0])
            if residual is not None:
                torch.exp(logp, out=residual[rows])
    return torch.cat(losses)


def _nll_of_one_product(h, weight, target, p):
    """nll (N,) fp32 on a CPU, in half precision; the softmax goes into p (N, V) unless it is None.

    The logits are those about the target's. A token that matters to a target of nll 4 lies at most 4 above it, and is
    off by at most 0.008. In a GPT-2 of 30 M parameters that makes 0.002 nats a token, a quarter of what the half
    precision of all before it does, and less than 0.003 in the mean of any of 400 sentences.
    """
    room = h.new_empty(min(len(h), max(1, CHUNK // len(weight))), len(weight)) if p is None else p
    losses, n = [], len(room)
    for i in range(0, len(h), n):
        rows, t = h[i : i + n], target[i : i + n, None]
        own = (rows.float() * weight[t[:, 0]].float()).sum(1, keepdim=True).to(h.dtype)
        logits = logits_about(own, rows, weight, out=room[: len(rows)])
        loss = -torch.softmax(logits, -1, out=logits).gather(1, t)[:, 0].float().log()
        # Far above the target bf16 is coarse, and its p may be too small for a float: those rows are made exact.
        far = (loss > 16).nonzero()[:, 0]
        for part, exact in logit_chunks(rows[far], weight):
            logp = exact.log_softmax(-1)
            loss[far[part]] = -logp.gather(1, t[far[part]])[:, 0]
            logits[far[part]] = logp.exp_().to(h.dtype)
        losses.append(loss)
    return torch.cat(losses)


def _log_softmax(logits, V):
    """Over the first V columns; the padding gets no mass. In place of a slice, which log_softmax would copy first."""
    logits[:, V:] = -1e30
    return logits.log_softmax(-1)
