"""GPT-2 from scratch: forward pass, sentence scores, generation.

The network follows Radford et al. 2019 in nanoGPT's manner: pre-norm blocks, learned positions, an output head tied
to the token embedding, and the *tanh* form of GELU, which is what OpenAI trained with. Module names equal those of
the published checkpoints, so that their weights go in by name. There is no dropout: a score must not depend on luck.

Shapes: B sequences, T positions, C channels (n_embd), V vocabulary, N positions that are really used.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
import torch.nn as nn
from torch.nn import functional as F

from engine import attention, head
from engine.sampling import sample
from engine.weights import Uninitialised, copy_weights, cut_vocabulary, load_weights, save_folder


@dataclass
class GPTConfig:
    """The network's shape; the names are those of the published config.json."""

    vocab_size: int = 50257
    n_positions: int = 1024  # longest context, in tokens
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12


class Pack(NamedTuple):
    """Where N packed positions belong in B rows of T. `index` (N,) holds their places in the flattened rectangle. A
    `mask` (B, 1, T, T) stands in for causal attention. `varlen`, without a mask, is torch's attention over packed rows
    where it can be had, and `cu_seqlens` (B + 1,) int32 what it takes: where each row begins, and N."""

    index: torch.Tensor
    B: int
    T: int
    mask: torch.Tensor = None
    varlen: Callable = None
    cu_seqlens: torch.Tensor = None


class Cache(NamedTuple):
    """Of one block, while B rows are continued: the keys and values kv (2, B, nh, Tmax, hs); where those of the tokens
    (B, T) that are read now go, rows and columns, broadcast to (B, T); the mask (B, 1, T, Tk), added to the scores of
    the first Tk columns; and keys and values (nh, Tp, hs) of a prefix that all rows have, or None."""

    kv: torch.Tensor
    rows: torch.Tensor
    columns: torch.Tensor
    mask: torch.Tensor
    prefix: tuple


class States(NamedTuple):
    """Hidden states h (N, C) that predict the N scored tokens of some rows, one row after another; the rows and the
    tokens, (N,) each; and how many a row has, count (B,), with `sizes` its copy on the CPU."""

    h: torch.Tensor
    rows: torch.Tensor
    tokens: torch.Tensor
    count: torch.Tensor
    sizes: torch.Tensor

    def means(self, values):
        """Means (B,) fp32 of the values (N,) of each row."""
        return (row_sums(values, self.rows, len(self.sizes)) / self.count).float()

    def split(self, B):
        """The States of the first B rows and those of the others."""
        n = int(self.sizes[:B].sum())
        parts = (x.split([k, len(x) - k]) for x, k in zip(self, (n, n, n, B, B), strict=True))
        first, others = map(States._make, zip(*parts, strict=True))
        return first, others._replace(rows=others.rows - B)


class Attention(nn.Module):
    """Causal self-attention. x is (B, T, C), or (N, C) without its padding if a Pack says where the rows belong."""

    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x, pack=None, cache=None):
        qkv = self.c_attn(x)
        mask = prefix = None
        if pack is not None:
            index, B, T, mask, varlen, cu_seqlens = pack
            if varlen and qkv.dtype in (torch.float16, torch.bfloat16):
                q, k, v = qkv.view(len(x), 3, self.n_head, -1).unbind(1)  # each (N, nh, hs)
                y = varlen(q, k, v, cu_seqlens, cu_seqlens, T, T, window_size=(-1, 0))  # nothing to the right: causal
                return self.c_proj(y.flatten(1))
            # Only attention needs the rectangle; all else works position by position, without padding. Rows are padded
            # on the right and attention is causal, so that no real token sees padding.
            qkv = qkv.new_zeros(B * T, qkv.size(-1)).index_copy(0, index, qkv).view(B, T, -1)
        B, T, C3 = qkv.shape
        q, k, v = qkv.view(B, T, 3, self.n_head, -1).permute(2, 0, 3, 1, 4)  # each (B, nh, T, hs)
        if cache is not None:
            kv, rows, columns, mask, prefix = cache
            kv[:, rows, :, columns] = qkv.view(B, T, 3, self.n_head, -1)[:, :, 1:].to(kv.dtype)
            k, v = kv[:, :, :, : mask.size(-1)]
        y = attention.attend(q, k, v, mask, prefix).transpose(1, 2).reshape(B, T, C3 // 3)
        return self.c_proj(y if pack is None else y.view(B * T, -1).index_select(0, index))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=1e-5)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=1e-5)
        self.mlp = MLP(config)

    def forward(self, x, pack=None, cache=None):
        x = x + self.attn(self.ln_1(x), pack, cache)
        return x + self.mlp(self.ln_2(x))


class LoRA(nn.Module):
    """A linear layer, frozen, plus a product of low rank that is trained: W x + b + alpha / rank B A x (Hu et al. 2021,
    arXiv 2106.09685). B starts at 0, so that at first nothing has changed."""

    def __init__(self, linear, rank, alpha):
        super().__init__()
        self.linear, self.scale = linear.requires_grad_(False), alpha / rank
        a, device = torch.randn(rank, linear.in_features) / math.sqrt(linear.in_features), linear.weight.device
        self.lora_a = nn.Parameter(a.to(device))
        self.lora_b = nn.Parameter(torch.zeros(linear.out_features, rank, device=device))

    def forward(self, x):
        return self.linear(x) + F.linear(F.linear(x, self.lora_a), self.lora_b) * self.scale


class GPT(nn.Module):
    """GPT-2. `model(idx)` gives the logits of all positions; `sequence_nll` the scores that the objectives use."""

    def __init__(self, config):
        super().__init__()
        if config.n_embd % config.n_head:
            raise ValueError(f"n_embd={config.n_embd} is not a multiple of n_head={config.n_head}")
        self.config = config
        self.compiled_hidden = None  # train.py puts torch.compile(model.hidden) here where it pays; for training only
        self.transformer = nn.Module()
        self.transformer.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.transformer.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.transformer.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.transformer.ln_f = nn.LayerNorm(config.n_embd, eps=1e-5)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight  # tied
        for name, p in self.named_parameters():  # GPT-2's initialisation; residual projections scaled with the depth
            if p.dim() == 2:
                std = 0.02 / math.sqrt(2 * config.n_layer) if name.endswith("c_proj.weight") else 0.02
                nn.init.normal_(p, std=std)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    @property
    def device(self):
        return self.lm_head.weight.device

    def num_parameters(self):
        return sum(p.numel() for p in self.parameters())

    def add_lora(self, rank, alpha, targets="all"):
        """Freeze all weights, and put LoRA around the matrices of every block: 'all', 'attn' or 'mlp'."""
        self.requires_grad_(False)
        parts = ("attn", "mlp") if targets == "all" else (targets,)
        for module in [getattr(block, part) for block in self.transformer.h for part in parts]:
            for name, linear in list(module.named_children()):
                setattr(module, name, LoRA(linear, rank, alpha))

    def matrices(self):
        """Weights and biases of the blocks' linear layers: those that autocast casts."""
        return [p for name, p in self.transformer.h.named_parameters() if ".ln_" not in name]

    def trained_state(self):
        """The state dict of what is trained: LoRA's matrices alone if there are any."""
        state = self.state_dict()
        return {k: v for k, v in state.items() if ".lora_" in k} or state

    def hidden(self, idx, pos, pack=None, cache=None):
        """Last hidden states of tokens idx at positions pos: (B, T) -> (B, T, C), or packed (N,) -> (N, C)."""
        x = self.transformer.wte(idx) + self.transformer.wpe(pos)
        for i, block in enumerate(self.transformer.h):
            x = block(x, pack, None if cache is None else cache[i])
        return self.transformer.ln_f(x)

    def forward(self, idx):
        """Logits of every position. Shape: idx (B, T) int64 -> (B, T, V)."""
        self.check_length(idx.size(1))
        return self.lm_head(self.hidden(idx, torch.arange(idx.size(1), device=idx.device)))

    def check_length(self, length):
        if length > self.config.n_positions:
            raise ValueError(f"sequence of {length} tokens, but the context is {self.config.n_positions}: shorten it")

    # ------------------------------------------------------------------------------------------------------------
    # scores

    def read(self, idx, lengths, start=None):
        """The States of framed, right-padded rows, see `sequence_nll`. Raises ValueError on impossible lengths."""
        B, T = idx.size(0), idx.size(1) - 1
        if lengths.shape != (B,) or lengths.min() < 2 or lengths.max() > T + 1:
            raise ValueError(f"lengths must be ({B},) in 2..{T + 1} (start token included), got {lengths.tolist()}")
        self.check_length(int(lengths.max()) - 1)
        lengths, start = lengths.cpu(), torch.ones(B).long() if start is None else start.cpu().clamp(min=1)
        if (lengths <= start).any():
            raise ValueError("nothing to score: `start` lies behind the end of a row")
        sizes, cu_seqlens = lengths - start, F.pad((lengths - 1).cumsum(0), (1, 0))
        rows, cols = (torch.arange(T) < lengths[:, None] - 1).nonzero().unbind(1)  # (N,) each
        keep = (cols + 1 >= start[rows]).nonzero()[:, 0]
        flat = torch.cat([rows, cols, keep, sizes, cu_seqlens])  # in one copy, pinned so that nothing waits for it
        flat = (flat.pin_memory() if idx.is_cuda else flat).to(idx.device, non_blocking=True)
        rows, cols, keep, count, cu_seqlens = flat.split([len(rows), len(rows), len(keep), B, B + 1])
        varlen = attention.varlen(idx.device, self.config.n_embd // self.config.n_head)
        hidden = self.compiled_hidden if self.compiled_hidden and torch.is_grad_enabled() else self.hidden
        h = hidden(idx[rows, cols], cols, Pack(rows * T + cols, B, T, None, varlen, cu_seqlens.int()))
        if len(keep) < len(h):
            h, rows, cols = (x.index_select(0, keep) for x in (h, rows, cols))
        return States(h, rows, idx[rows, cols + 1], count, sizes)

    def nll(self, states):
        """Mean negative log-likelihood per scored token of a row (B,), nats, fp32."""
        return states.means(head.nll(states.h, self.lm_head.weight, states.tokens))

    def kl(self, states, base, idx, lengths, start=None):
        """Mean KL(base || self) per scored token of a row (B,), nats, fp32; differentiable in self only. `states` are
        self's of these rows, which base reads here."""
        with torch.no_grad():
            h_base = base.read(idx, lengths, start).h
        return states.means(head.kl(states.h, self.lm_head.weight, h_base, base.lm_head.weight))

    def sequence_nll(self, idx, lengths, start=None):
        """Score phi: the mean negative log-likelihood per scored token.

        idx (B, T) int64 holds framed, right-padded rows `<|endoftext|> t_1 ... t_n <|endoftext|> pad...`, and lengths
        (B,) their real lengths. All real tokens but the first are scored. The mask comes from lengths alone, so that
        neighbours, and the amount and kind of padding, change no score by more than rounding. `start` (B,) scores only
        from that position on, for the perplexity of a continuation given its prompt.

        Shape: (B,) nats, fp32. Memory for logits is bounded, see engine/head.py. Keep lengths on the CPU: then
        nothing waits for the GPU. Raises ValueError on impossible lengths.
        """
        return self.nll(self.read(idx, lengths, start))

    def sequence_kl(self, base, idx, lengths, start=None):
        """Mean KL(base || self) per scored token: how far this model moved from `base` on these texts.

        Shapes as in `sequence_nll`; (B,) nats, fp32, differentiable in self only, chunked as the head is.
        """
        return self.kl(self.read(idx, lengths, start), base, idx, lengths, start)

    # ------------------------------------------------------------------------------------------------------------
    # generation

    @torch.no_grad()
    def generate(
        self,
        idx,
        lengths,
        max_new_tokens,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        stop_token=None,
        generator=None,
        samples=1,
        prefix=None,
        steer=None,
    ):
        """Continue every row of idx (B, T), right-padded, of real lengths (B,), `samples` times, side by side.

        temperature 0 is greedy; top_k 0 and top_p 1 keep the whole distribution. A row stops at its stop_token, one
        id or several. A prompt is computed once for all its samples, behind what `prefix` (see `read_prefix`) holds.
        Random numbers are drawn row by row from `generator` (on the CPU), so that rows in a batch of B or in B batches
        of one, on any device, see the same. Or `generator` is a tensor of them (R, max_new_tokens, 4), see `sample`.
        `steer`, a method of measures/decoding.py, stands in for `Rows`; top_p may then be of other logits, its `plain`.
        Returns tokens (R, max_new_tokens) int64, R = B * samples, and (R,), how many of them are real, the stop token
        included. Raises ValueError if prompt and continuation do not fit the context.
        """
        if steer and (prefix or top_k):
            raise ValueError("steer goes with neither prefix nor top_k: leave them out")
        rows = (steer or Rows)(self, idx, lengths, max_new_tokens, samples, prefix)
        device, R = idx.device, len(idx) * samples
        if not isinstance(generator, torch.Tensor):
            generator = torch.rand(R, max_new_tokens, 4, generator=generator)
        noise, ends = generator.to(device), torch.zeros(self.config.vocab_size, dtype=torch.bool, device=device)
        tokens = torch.zeros(R, max_new_tokens, dtype=torch.long, device=device)
        running, count = torch.ones(R, dtype=torch.bool, device=device), tokens.new_zeros(R)
        ends[[] if stop_token is None else stop_token] = True
        for i in range(max_new_tokens):
            token = sample(rows.logits(), temperature, top_k, top_p, noise[:, i], rows.plain)
            tokens[:, i] = token * running
            count, running = count + running, running & ~ends[token]
            if i == max_new_tokens - 1 or ((idx.is_cpu or i % 8 == 7) and not running.any()):  # any() waits for a GPU
                break
            rows.advance(token)
        return tokens, count

    @torch.no_grad()
    def read_prefix(self, tokens):
        """What `generate` needs of T tokens that many prompts begin with: keys and values, [(k, v)] of (nh, T, hs)."""
        rows = Rows(self, torch.tensor([tokens], device=self.device), torch.tensor([len(tokens)]), 0)
        return [tuple(kv[:, 0, :, : len(tokens)]) for kv, _ in rows.caches]

    def _cast(self, dtype):
        """A copy that shares all but the weights of the blocks' matrices: autocast casts a frozen one at every use."""
        matrices = {id(p) for p in self.matrices()}
        return copy.deepcopy(self, {id(p): p.to(dtype) if id(p) in matrices else p for p in self.parameters()})

    # ------------------------------------------------------------------------------------------------------------
    # weights in and out

    @classmethod
    def from_pretrained(cls, name_or_path, vocab_size=None):
        """A GPT from a published name, a local folder or file in the `transformers` layout (.safetensors, .bin, .pt)
        or a checkpoint of train.py, nanoGPT or the DPO reference implementation. Weights become fp32.

        A local path wins over a published name only if it is written as one ('./gpt2'). With `vocab_size`, padding
        behind a vocabulary of GPT-2's is dropped, and another vocabulary refused. Raises FileNotFoundError,
        ConnectionError or ValueError with one line: what was wanted, what came, what to do.
        """
        shape, tensors = load_weights(name_or_path)
        if vocab_size not in (None, shape["vocab_size"]):
            shape, tensors = cut_vocabulary(shape, tensors, vocab_size, name_or_path)
        with torch.device("meta"), Uninitialised():  # shapes only: memory comes with the tensors, once they are checked
            model = cls(GPTConfig(**shape))
        copy_weights(model, tensors, str(name_or_path))
        model.source = str(name_or_path)
        return model

    def save_pretrained(self, folder):
        """Write config.json and model.safetensors (fp32) so that `transformers` loads the folder as a GPT-2."""
        save_folder(folder, asdict(self.config), self.state_dict())


class Rows:
    """R = B * samples rows that a model continues side by side. `h` (R, C) are the hidden states of their last tokens;
    caches, one a block, hold kv and prefix of a `Cache`."""

    plain = None  # of a method that steers: the logits (R, V) whose nucleus is drawn from

    def __init__(self, model, idx, lengths, room, samples=1, prefix=None, spare=0):
        """Read prompts, given as `generate` has them. `room` tokens can follow, and `peek` look at `spare`."""
        (B, T), c, device = idx.shape, model.config, idx.device
        model.check_length(T + room + (prefix[0][0].size(1) if prefix else 0))
        if lengths.shape != (B,) or lengths.min() < 1 or lengths.max() > T:
            raise ValueError(f"lengths must be ({B},) in 1..{T}, got {lengths.tolist()}")
        self.weight, self.width, self.V = head.cast_weight(model.lm_head.weight), T, c.vocab_size
        self.net, lengths = model._cast(self.weight.dtype), lengths.to(device)
        self.mean = model.lm_head.weight.mean(0).to(self.weight.dtype) if head.bf16_on_cpu(self.weight) else None
        shape = (2, B, c.n_head, -(-(T + room + spare) // 16) * 16, c.n_embd // c.n_head)  # a GPU reads masks by 16
        self.caches = [(self.weight.new_zeros(shape), part) for part in prefix or [None] * c.n_layer]
        at = torch.arange(T, device=device).expand(B, T)
        h = self._hidden(idx, at, at, T)
        self.h, self.lengths = h[torch.arange(B, device=device), lengths - 1], lengths
        if samples > 1:
            self.h, self.lengths = (x.repeat_interleave(samples, 0) for x in (self.h, lengths))
            self.caches = [(kv.repeat_interleave(samples, 1), part) for kv, part in self.caches]

    def logits(self):
        """Of the next tokens, fp32 (R, V), up to a constant for each row, which sampling does not see."""
        h = self.h.to(self.weight.dtype)
        if self.mean is None:
            return head.fp32_logits(h, self.weight)[:, : self.V]
        # The likeliest tokens lie about 12 above the mean in a language model. Near that level one product is exact
        # enough: of a GPT-2 of 30 M parameters 0.49 % of the greedy tokens differ from fp32, by exact logits 0.47.
        level = (h @ self.mean + 12)[:, None]
        return head.logits_about(level, h, self.weight).float()

    def advance(self, token):
        """Read one more token (R,) of each row, over what was padding: no gap, no shifted position."""
        self.width, at = self.width + 1, self.lengths[:, None]
        self.h, self.lengths = self._hidden(token[:, None], at, at, self.width)[:, 0], self.lengths + 1

    def peek(self, tokens):
        """Hidden states (R, k, C) behind each of k tokens (R, k) that could be next."""
        at = self.lengths[:, None].expand_as(tokens)  # all of them; columns are behind the rows, written over later
        own = self.width + torch.arange(tokens.size(1), device=tokens.device).expand_as(tokens)
        return self._hidden(tokens, at, own, self.width + tokens.size(1))

    def _hidden(self, idx, at, own, width):
        """Hidden states of tokens idx at positions `at`, kept in columns `own`, (B, T) each, of the first `width`."""
        kv, prefix = self.caches[0]
        column = torch.arange(kv.size(3), device=idx.device)
        hide = (column >= at[:, None, :, None]) & (column != own[:, None, :, None])  # all but its past and itself
        mask = torch.where(hide, -math.inf, 0.0).to(kv.dtype)[..., :width]  # (B, 1, T, width)
        rows = torch.arange(len(idx), device=idx.device)[:, None]
        pos = at + prefix[0].size(1) if prefix else at
        return self.net.hidden(idx, pos, cache=[Cache(kv, rows, own, mask, part) for kv, part in self.caches])


# --------------------------------------------------------------------------------------------------------------------


def row_sums(values, rows, n):
    """Sums (n,) of the values (N,) of each row, in double precision (not on mps), so that no order of them shows."""
    dtype = torch.float32 if values.device.type == "mps" else torch.float64
    return torch.zeros(n, dtype=dtype, device=values.device).index_add(0, rows, values.to(dtype))
