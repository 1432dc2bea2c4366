"""GPT-2 from scratch: forward pass, sentence scores, generation, and weights in and out.

The network follows Radford et al. 2019 in nanoGPT's manner: pre-norm blocks, learned positions, an output head tied
to the token embedding, and the *tanh* form of GELU, which is what OpenAI trained with. Module names equal those of
the published checkpoints, so that loading is one plain loop. There is no dropout: a score must not depend on luck.

Shapes: B sequences, T positions, C channels (n_embd), V vocabulary, N positions that are really used.
"""

import ctypes
import hashlib
import http.client
import json
import math
import mmap
import os
import platform
import struct
import urllib.error
import urllib.parse
import urllib.request
import zipfile
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn as nn
from torch.nn import functional as F
from tqdm import tqdm

# name -> repository that publishes it, n_layer, n_head, n_embd
PUBLISHED = {
    "distilgpt2": ("distilbert/distilgpt2", 6, 12, 768),
    "gpt2": ("openai-community/gpt2", 12, 12, 768),
    "gpt2-medium": ("openai-community/gpt2-medium", 24, 16, 1024),
    "gpt2-large": ("openai-community/gpt2-large", 36, 20, 1280),
    "gpt2-xl": ("openai-community/gpt2-xl", 48, 25, 1600),
}
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
CHUNK = 2**23  # logits computed at once by the head: 32 MiB in fp32, whatever B, T and V are
KEEP = 2**27  # softmax numbers kept for the backward pass; more positions than that are computed again


@dataclass
class GPTConfig:
    """The network's shape; the names are those of the published config.json."""

    vocab_size: int = 50257
    n_positions: int = 1024  # longest context, in tokens
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12


class Attention(nn.Module):
    """Causal self-attention. x is (B, T, C), or (N, C) without its padding if `pack` says where the rows belong."""

    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x, pack=None, cache=None):
        qkv = self.c_attn(x)
        mask = shared = None
        if pack is not None:  # only attention needs the rectangle; all else in the network works position by position
            index, B, T, mask = pack
            qkv = qkv.new_zeros(B * T, qkv.size(-1)).index_copy(0, index, qkv).view(B, T, -1)
        B, T, C3 = qkv.shape
        q, k, v = qkv.view(B, T, 3, self.n_head, -1).unbind(2)  # each (B, T, nh, hs)
        if cache is not None:
            keys, values, at, mask, shared = cache  # (B, Tmax, nh, hs) twice, (B, T), (B, 1, T, Tk), see _attend
            rows = torch.arange(B, device=x.device)[:, None]
            keys[rows, at], values[rows, at] = k, v
            k, v = keys[:, : mask.size(-1)], values[:, : mask.size(-1)]
        y = _attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask, shared)
        y = y.transpose(1, 2).reshape(B, T, C3 // 3)
        return self.c_proj(y if pack is None else y.view(B * T, -1)[index])


def _attend(q, k, v, mask, shared=None):
    """Attention over (B, nh, T, hs), causal if there is no mask (B, 1, Tq, Tk). `shared` holds the keys and values,
    (nh, Tp, hs) each, of a prefix that all rows have before their own."""
    if q.device.type == "cpu":  # where half-precision attention takes three times as long as fp32
        with torch.autocast("cpu", enabled=False):
            q, k, v = q.float(), k.float(), v.float()
            return _attend_shared(q, k, v, mask, *shared) if shared else _sdpa(q, k, v, mask)
    return _attend_shared(q, k, v, mask, *shared) if shared else _sdpa(q, k, v, mask)


def _sdpa(q, k, v, mask):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)


def _attend_shared(q, k, v, mask, keys, values):
    """Attention to a shared prefix and to the row's own past: the rows are so many queries in one product with the
    prefix, which is neither copied nor read once per row."""
    B, nh, T, hs = q.shape
    keys, values, q = keys.to(q.dtype), values.to(q.dtype), q / math.sqrt(hs)
    flat = q.transpose(0, 1).reshape(nh, B * T, hs)
    before = (flat @ keys.transpose(1, 2)).view(nh, B, T, -1).transpose(0, 1)  # (B, nh, T, Tp)
    own = (q @ k.transpose(2, 3)).masked_fill(~mask, -math.inf)  # (B, nh, T, Tk)
    p = torch.cat([before, own], -1).softmax(-1, dtype=torch.float32).to(q.dtype)
    before, own = p.split([keys.size(1), k.size(2)], -1)
    y = (before.transpose(0, 1).reshape(nh, B * T, -1) @ values).view(nh, B, T, hs).transpose(0, 1)
    return y + own @ v


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


class GPT(nn.Module):
    """GPT-2. `model(idx)` gives the logits of all positions; `sequence_nll` the scores that the objectives use."""

    def __init__(self, config):
        super().__init__()
        if config.n_embd % config.n_head:
            raise ValueError(f"n_embd={config.n_embd} is not a multiple of n_head={config.n_head}")
        self.config = config
        self.compiled_hidden = None  # train.py puts torch.compile(model.hidden) here where that pays
        self.transformer = nn.ModuleDict(
            dict(
                wte=nn.Embedding(config.vocab_size, config.n_embd),
                wpe=nn.Embedding(config.n_positions, config.n_embd),
                h=nn.ModuleList(Block(config) for _ in range(config.n_layer)),
                ln_f=nn.LayerNorm(config.n_embd, eps=1e-5),
            )
        )
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

    def hidden(self, idx, pos, pack=None, cache=None):
        """Last hidden states of tokens idx at positions pos: (B, T) -> (B, T, C), or packed (N,) -> (N, C)."""
        x = self.transformer.wte(idx) + self.transformer.wpe(pos)
        for i, block in enumerate(self.transformer.h):
            x = block(x, pack, None if cache is None else cache[i])
        return self.transformer.ln_f(x)

    def forward(self, idx):
        """Logits of every position. Shape: idx (B, T) int64 -> (B, T, V)."""
        self._check_length(idx.size(1))
        return self.lm_head(self.hidden(idx, torch.arange(idx.size(1), device=idx.device)))

    def _check_length(self, length):
        if length > self.config.n_positions:
            raise ValueError(f"sequence of {length} tokens, but the context is {self.config.n_positions}: shorten it")

    # ------------------------------------------------------------------------------------------------------------
    # scores

    def _scored(self, idx, lengths, start=None):
        """Hidden states at the positions that predict a scored token: (N, C), with their row and column, (N,) each, and
        the number of such tokens in a row (B,). Scored are the real tokens from position `start` (B,) on, default 1."""
        B, T = idx.size(0), idx.size(1) - 1
        if lengths.shape != (B,) or lengths.min() < 2 or lengths.max() > T + 1:
            raise ValueError(f"lengths must be ({B},) in 2..{T + 1} (start token included), got {lengths.tolist()}")
        self._check_length(int(lengths.max()) - 1)
        used = torch.arange(T, device=lengths.device) < lengths[:, None] - 1
        index = used.flatten().nonzero()[:, 0].to(idx.device)  # (N,) into B*T
        rows, cols = index // T, index % T
        hidden = self.compiled_hidden or self.hidden
        h, count = hidden(idx[rows, cols], cols, pack=(index, B, T, None)), (lengths - 1).to(idx.device)
        if start is not None:
            start = start.to(idx.device).clamp(min=1)
            keep = cols + 1 >= start[rows]
            h, rows, cols, count = h[keep], rows[keep], cols[keep], lengths.to(idx.device) - start
            if (count < 1).any():
                raise ValueError("nothing to score: `start` lies behind the end of a row")
        return h, rows, cols, count

    def sequence_nll(self, idx, lengths, start=None):
        """Score phi: the mean negative log-likelihood per scored token.

        idx (B, T) int64 holds framed, right-padded rows `<|endoftext|> t_1 ... t_n <|endoftext|> pad...`, and lengths
        (B,) their real lengths. All real tokens but the first are scored. The mask comes from lengths alone, so a
        score changes neither with its neighbours nor with the amount or kind of padding. `start` (B,) scores only
        from that position on, for the perplexity of a continuation given its prompt.

        Shape: (B,) nats, fp32. Memory does not grow with B * T * V: the head runs only where a token is scored, in
        chunks. Keep lengths on the CPU: then nothing waits for the GPU. Raises ValueError on impossible lengths.
        """
        h, rows, cols, count = self._scored(idx, lengths, start)
        nll = _HeadNLL.apply(h, self.lm_head.weight, idx[rows, cols + 1], torch.is_grad_enabled())  # (N,)
        return (_row_sums(nll, rows, idx.size(0)) / count).float()

    def sequence_kl(self, base, idx, lengths, start=None):
        """Mean KL(base || self) per scored token: how far this model moved from `base` on these texts.

        Shapes as in `sequence_nll`; (B,) nats, fp32, differentiable in self only, chunked as the head is.
        """
        with torch.no_grad():
            h_base = base._scored(idx, lengths, start)[0]
        h, rows, _, count = self._scored(idx, lengths, start)

        per_token = _HeadKL.apply(h, self.lm_head.weight, h_base, base.lm_head.weight, torch.is_grad_enabled())
        return (_row_sums(per_token, rows, idx.size(0)) / count).float()

    @torch.no_grad()
    def mean_hidden(self, idx, lengths):
        """Mean of the last hidden states over the real tokens but the last. Shapes as in `sequence_nll` -> (B, C)."""
        h, rows, _, count = self._scored(idx, lengths)
        return (_row_sums(h, rows, len(idx)) / count[:, None]).float()

    @torch.no_grad()
    def choice_nll(self, contexts, choices):
        """Score the possible continuations of some contexts; every context is computed once for all its choices.

        contexts: B lists of token ids; choices: B lists of lists of ids, none of them empty. A row holds the context
        and behind it its choices, side by side: positions go on from the context for each, and a mask hides them from
        each other. Returns (nll, greedy), one entry per choice, row by row: its total negative log-likelihood, nats
        (M,), and whether each of its tokens is the likeliest one (M,) bool. Raises ValueError on a row too long.
        """
        if not all(contexts) or not all(x for xs in choices for x in xs):
            raise ValueError("a context or a choice is empty: a context begins with the end token at least")
        width = [len(c) + sum(len(x) - 1 for x in xs) for c, xs in zip(contexts, choices, strict=True)]
        B, T = len(contexts), max(width)
        idx, pos, part = (torch.full((B, T), fill) for fill in (0, 0, -1))  # part: 0 context, 1.. choices, -1 padding
        source, target, owner = [], [], []  # of every scored token: where it is predicted, what it is, whose it is
        for b, (context, xs) in enumerate(zip(contexts, choices, strict=True)):
            self._check_length(len(context) + max(map(len, xs)) - 1)
            tokens, at, parts = list(context), list(range(len(context))), [0] * len(context)
            for i, x in enumerate(xs, 1):
                source += [b * T + len(context) - 1, *range(b * T + len(tokens), b * T + len(tokens) + len(x) - 1)]
                target += x
                owner += [owner[-1] + 1 if owner else 0] * len(x)
                tokens += x[:-1]
                at += range(len(context), len(context) + len(x) - 1)
                parts += [i] * (len(x) - 1)
            for table, values in ((idx, tokens), (pos, at), (part, parts)):
                table[b, : width[b]] = torch.tensor(values)
        idx, pos, part = idx.to(self.device), pos.to(self.device), part.to(self.device)
        mask = None
        if max(map(len, choices)) > 1:  # else the row is an ordinary text
            mask = (part[:, None] == 0) | (part[:, None] == part[:, :, None])
            mask = (mask & (pos[:, None] <= pos[:, :, None]))[:, None]  # (B, 1, Tq, Tk)
        index = (part >= 0).flatten().nonzero()[:, 0]
        h = self.hidden(idx.flatten()[index], pos.flatten()[index], pack=(index, B, T, mask))  # (N, C)
        row = torch.empty(B * T, dtype=torch.long, device=self.device)
        row[index] = torch.arange(len(index), device=self.device)
        source, target, owner = (torch.tensor(x, device=self.device) for x in (source, target, owner))
        nll, top = _nll_and_top(h[row[source]], self.lm_head.weight, target)
        M = int(owner[-1]) + 1
        return _row_sums(nll, owner, M), _row_sums(~top, owner, M) == 0

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
    ):
        """Continue every row of idx (B, T), right-padded, of real lengths (B,), `samples` times.

        temperature 0 is greedy; top_k 0 and top_p 1 keep the whole distribution. A row stops at its stop_token, one
        id or several. The prompt is computed once for all its samples, and what `prefix` (see `read_prefix`) holds
        comes before each prompt. The random numbers are drawn row by row from `generator` (on the CPU), so that rows in
        one batch of B or in B batches of one, on any device, see the same; or they are given in its place, uniform in
        (0, 1), of shape (B * samples, max_new_tokens, 4).

        Returns (tokens, count): (B * samples, max_new_tokens) int64, the samples of a row side by side, and
        (B * samples,), how many of them are real, the stop token included. Raises ValueError if prompt and
        continuation do not fit the context.
        """
        B, T = idx.shape
        skip = prefix[0][0].size(1) if prefix else 0
        self._check_length(skip + T + max_new_tokens)
        if lengths.shape != (B,) or lengths.min() < 1 or lengths.max() > T:
            raise ValueError(f"lengths must be ({B},) in 1..{T}, got {lengths.tolist()}")
        device, c, R = idx.device, self.config, B * samples
        at = torch.arange(T, device=device).expand(B, T)
        lengths = lengths.to(device)
        given = isinstance(generator, torch.Tensor)
        noise = (generator if given else torch.rand(R, max_new_tokens, 4, generator=generator)).to(device)
        tokens = torch.zeros(R, max_new_tokens, dtype=torch.long, device=device)
        count = torch.zeros(R, dtype=torch.long, device=device)
        running = torch.ones(R, dtype=torch.bool, device=device)
        stops = torch.tensor([], dtype=torch.long) if stop_token is None else torch.as_tensor(stop_token).view(-1)
        stops = stops.to(device)
        head = self.lm_head.weight.to(_compute_dtype(self.lm_head.weight))
        kv, prefix = self._empty_cache(B, T + max_new_tokens), prefix or [None] * c.n_layer

        for i in range(max_new_tokens):
            # Row b's next token always sits at lengths[b] + i, over what was padding: no gap, no shifted position.
            mask = (torch.arange(T + i, device=device) <= at[:, :, None])[:, None]  # (B, 1, Tq, Tk)
            cache = [(k, v, at, mask, shared) for (k, v), shared in zip(kv, prefix, strict=True)]
            h = self.hidden(idx, at + skip, cache=cache)
            if i == 0:
                h = h[torch.arange(B, device=device), lengths - 1][:, None].repeat_interleave(samples, 0)
                lengths = lengths.repeat_interleave(samples)
                if samples > 1:
                    kv = [(k.repeat_interleave(samples, 0), v.repeat_interleave(samples, 0)) for k, v in kv]
            logits = _fp32_logits(h[:, 0].to(head.dtype), head)
            token = _sample(logits, temperature, top_k, top_p, noise[:, i])
            tokens[running, i] = token[running]
            count += running
            running = running & ~torch.isin(token, stops)
            if not running.any():
                break
            idx, at = token[:, None], (lengths + i)[:, None]
        return tokens, count

    def _empty_cache(self, B, T):
        """Room for the keys and values of every block: [(k, v)], each (B, T, nh, hs)."""
        shape = (B, T, self.config.n_head, self.config.n_embd // self.config.n_head)
        new = lambda: torch.zeros(shape, dtype=_compute_dtype(self.lm_head.weight), device=self.device)  # noqa: E731
        return [(new(), new()) for _ in range(self.config.n_layer)]

    @torch.no_grad()
    def read_prefix(self, tokens):
        """What `generate` needs of T tokens that many prompts begin with: keys and values, [(k, v)] of (nh, T, hs)."""
        self._check_length(len(tokens))
        at = torch.arange(len(tokens), device=self.device)[None]  # (1, T)
        kv, mask = self._empty_cache(*at.shape), (at[:, None] <= at[:, :, None])[:, None]  # (1, 1, T, T)
        idx = torch.tensor([tokens], device=self.device)
        self.hidden(idx, at, cache=[(k, v, at, mask, None) for k, v in kv])
        return [(k[0].transpose(0, 1), v[0].transpose(0, 1)) for k, v in kv]

    # ------------------------------------------------------------------------------------------------------------
    # weights in and out

    @classmethod
    def from_pretrained(cls, name_or_path, vocab_size=None):
        """A GPT from a published name (see PUBLISHED), a local folder or file in the `transformers` layout
        (.safetensors or .bin; fp32, fp16 or bf16), or a checkpoint of train.py (.pt). Weights become fp32.

        A local path wins over a published name only if it is written as one ('./gpt2'). With `vocab_size`, a model of
        another vocabulary is refused. Raises FileNotFoundError, ConnectionError or ValueError with one line: what was
        wanted, what came, what to do.
        """
        path = Path(name_or_path)
        if str(name_or_path) in PUBLISHED:
            _, n_layer, n_head, n_embd = PUBLISHED[str(name_or_path)]
            config = GPTConfig(n_layer=n_layer, n_head=n_head, n_embd=n_embd)
            tensors = _read_weights(_find_or_download(str(name_or_path)))
        elif path.suffix == ".pt":
            saved = load_checkpoint(path)
            config, tensors = GPTConfig(**saved["model_config"]), saved["model"]
        else:
            file, config = _find_local(path)
            tensors = _read_weights(file)
            config = config or _infer_config(tensors, file)
        if vocab_size not in (None, config.vocab_size):
            raise ValueError(
                f"{name_or_path} has a vocabulary of {config.vocab_size}, the tokenizer one of {vocab_size}: give the "
                "--tokenizer that the model was trained with"
            )
        model = cls(config)
        _copy_weights(model, tensors, str(name_or_path), transposed=path.suffix != ".pt")
        return model

    def save_pretrained(self, folder):
        """Write config.json and model.safetensors (fp32) so that `transformers` loads the folder as a GPT-2."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {k: (v.t() if _is_conv1d(k) else v) for k, v in self.state_dict().items() if k != "lm_head.weight"}
        _write_safetensors(folder / "model.safetensors", tensors)
        config = asdict(self.config) | dict(
            model_type="gpt2", architectures=["GPT2LMHeadModel"], activation_function="gelu_new"
        )
        config |= dict(bos_token_id=self.config.vocab_size - 1, eos_token_id=self.config.vocab_size - 1)
        config |= dict(layer_norm_epsilon=1e-5, tie_word_embeddings=True, dtype="float32")
        atomic_write(folder / "config.json", lambda f: f.write(json.dumps(config, indent=2).encode()))


# --------------------------------------------------------------------------------------------------------------------
# the output head


def _compute_dtype(tensor):
    """The dtype of matrix products: autocast's where it is on, else the tensor's own."""
    device = tensor.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tensor.dtype


def _fp32_logits(h, weight):
    """h (N, C) @ weight.T (V, C) -> (N, V) in fp32, also where the product runs in half precision.

    GPT-2's raw logits sit at -35 to -100, where neighbouring bf16 numbers lie up to 0.5 apart, while the objective
    lives on differences of 0.1 nat. A half-precision product is accurate inside and only rounded on the way out, so
    a second one fetches what the first rounded away.
    """
    logits = h @ weight.t()
    if h.dtype == torch.float32:
        return logits
    return logits.float().add_(torch.addmm(logits, h, weight.t(), beta=-1))


def _nll_and_probs(h, weight, target, probs):
    """nll (N,) of h (N, C), chunk by chunk; the softmax goes into probs (N, V) unless that is None."""
    n, nll = max(1, CHUNK // weight.size(0)), []
    for i in range(0, len(h), n):
        logits = _fp32_logits(h[i : i + n], weight)
        if probs is None:
            nll.append(F.cross_entropy(logits, target[i : i + n], reduction="none"))
            continue
        logits.sub_(logits.amax(-1, keepdim=True))  # first, since numbers near -100 have few digits behind the point
        wanted = logits.gather(1, target[i : i + n, None])
        total = logits.exp_().sum(-1, keepdim=True)
        nll.append((total.log() - wanted)[:, 0])
        probs[i : i + n] = logits.div_(total)
    return torch.cat(nll)


def _row_sums(values, rows, n):
    """Sums (n, ...) of the values (N, ...) of each row, in double precision: no sum shall depend on batching."""
    dtype = torch.float32 if values.device.type == "mps" else torch.float64
    return torch.zeros(n, *values.shape[1:], dtype=dtype, device=values.device).index_add(0, rows, values.to(dtype))


def _nll_and_top(h, weight, target):
    """nll (N,) of h (N, C) as the head gives it, and whether each target is the likeliest token (N,) bool."""
    dtype = _compute_dtype(weight)
    h, weight, n, nll, top = h.to(dtype), weight.to(dtype), max(1, CHUNK // weight.size(0)), [], []
    for i in range(0, len(h), n):
        logits, want = _fp32_logits(h[i : i + n], weight), target[i : i + n]
        nll.append(F.cross_entropy(logits, want, reduction="none"))
        top.append(logits.argmax(-1) == want)
    return torch.cat(nll), torch.cat(top)


class _HeadNLL(torch.autograd.Function):
    """-log softmax(h @ weight.T)[target] for h (N, C), weight (V, C), target (N,) -> (N,) fp32.

    With p the softmax and g the incoming gradient, d/dh = g (p - onehot) weight and d/dweight = (p - onehot)^T (g h):
    p is all that the backward pass needs. It is kept in the products' dtype up to KEEP numbers and computed again
    beyond, so that memory has a bound that depends on neither B, T nor V.
    """

    @staticmethod
    def forward(ctx, h, weight, target, with_grad):
        ctx.dtype = _compute_dtype(weight)
        with torch.autocast(h.device.type, enabled=False):
            h_, weight_ = h.to(ctx.dtype), weight.to(ctx.dtype)
            keep = with_grad and any(ctx.needs_input_grad) and len(h) * len(weight) <= KEEP
            probs = h_.new_empty(len(h), len(weight)) if keep else None
            nll = _nll_and_probs(h_, weight_, target, probs)
        ctx.save_for_backward(h, weight, target, probs)
        return nll

    @staticmethod
    def backward(ctx, grad):
        h, weight, target, kept = ctx.saved_tensors
        with torch.autocast(h.device.type, enabled=False):
            h_, weight_ = h.to(ctx.dtype), weight.to(ctx.dtype)
            dh, gh = torch.empty_like(h), h * grad[:, None]
            dweight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None  # None: the embedding is frozen
            n = len(h) if kept is not None else max(1, KEEP // len(weight))
            for i in range(0, len(h), n):
                rows, probs = slice(i, i + n), kept
                if probs is None:
                    probs = h_.new_empty(len(h_[rows]), len(weight))
                    _nll_and_probs(h_[rows], weight_, target[rows], probs)
                dh[rows] = probs @ weight_
                if dweight is not None:
                    dweight += (gh[rows].to(ctx.dtype).t() @ probs).t()
            dh = (dh - weight[target]) * grad[:, None]
            if dweight is not None:
                dweight.index_add_(0, target, gh, alpha=-1)
        return dh, dweight, None, None


def _kl_and_difference(h, weight, h_base, weight_base, difference):
    """KL(q || p) (N,) of p, the softmax of h @ weight.T, and q, the base's; p - q goes into `difference` (N, V)."""
    n, kl = max(1, CHUNK // weight.size(0)), []
    for i in range(0, len(h), n):
        logp = _fp32_logits(h[i : i + n], weight).log_softmax(-1)
        logq = _fp32_logits(h_base[i : i + n], weight_base).log_softmax(-1)
        q = logq.exp()
        kl.append((logq.sub_(logp)).mul_(q).sum(-1))
        if difference is not None:
            difference[i : i + n] = logp.exp_().sub_(q)
    return torch.cat(kl)


class _HeadKL(torch.autograd.Function):
    """KL(q || p) of q = softmax(h_base @ weight_base.T) and p = softmax(h @ weight.T), (N,) fp32.

    As _HeadNLL, with q in the place of one target: d/dh = g (p - q) weight and d/dweight = (p - q)^T (g h). The base is
    a constant.
    """

    @staticmethod
    def forward(ctx, h, weight, h_base, weight_base, with_grad):
        ctx.dtype = _compute_dtype(weight)
        with torch.autocast(h.device.type, enabled=False):
            both = [x.to(ctx.dtype) for x in (h, weight, h_base, weight_base)]
            keep = with_grad and any(ctx.needs_input_grad) and len(h) * len(weight) <= KEEP
            difference = both[0].new_empty(len(h), len(weight)) if keep else None
            kl = _kl_and_difference(*both, difference)
        ctx.save_for_backward(h, weight, h_base, weight_base, difference)
        return kl

    @staticmethod
    def backward(ctx, grad):
        h, weight, h_base, weight_base, kept = ctx.saved_tensors
        with torch.autocast(h.device.type, enabled=False):
            h_, weight_, h_base_, weight_base_ = (x.to(ctx.dtype) for x in (h, weight, h_base, weight_base))
            dh, gh = torch.empty_like(h), h * grad[:, None]
            dweight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None  # None: the embedding is frozen
            n = len(h) if kept is not None else max(1, KEEP // len(weight))
            for i in range(0, len(h), n):
                rows, difference = slice(i, i + n), kept
                if difference is None:
                    difference = h_.new_empty(len(h_[rows]), len(weight))
                    _kl_and_difference(h_[rows], weight_, h_base_[rows], weight_base_, difference)
                dh[rows] = difference @ weight_
                if dweight is not None:
                    dweight += (gh[rows].to(ctx.dtype).t() @ difference).t()
            dh *= grad[:, None]
        return dh, dweight, None, None, None


def _sample(logits, temperature, top_k, top_p, noise):
    """One token per row of logits (B, V) fp32, from uniform noise (B, R) -> (B,).

    The nucleus is the smallest set of tokens whose mass reaches top_p. A token belongs to it if all likelier ones
    together weigh less than top_p; so draw from the whole distribution and draw again what falls outside. That sorts
    nothing: 50,000 numbers a row are slow to sort. Rows without luck in R draws are sorted after all.
    """
    if temperature == 0:
        return logits.argmax(-1)
    probs = (logits / temperature).softmax(-1)
    if top_k:
        probs = probs.masked_fill(probs < probs.topk(min(top_k, probs.size(-1))).values[:, -1:], 0.0)
        probs = probs / probs.sum(-1, keepdim=True)
    out = torch.empty(len(probs), dtype=torch.long, device=probs.device)
    left, cdf = torch.arange(len(probs), device=probs.device), probs.cumsum(-1)
    for u in noise.unbind(1):
        token = torch.searchsorted(cdf, u[left, None] * cdf[:, -1:], right=True).clamp_(max=probs.size(-1) - 1)
        likelier = probs.masked_fill(probs <= probs.gather(1, token), 0.0).sum(-1)
        outside = (likelier >= top_p) & (top_p < 1)
        out[left[~outside]] = token[~outside, 0]
        left, probs, cdf = left[outside], probs[outside], cdf[outside]
        if not len(left):
            return out
    probs, order = probs.sort(-1, descending=True)
    cdf = probs.cumsum(-1)
    size = ((cdf - probs) < top_p).sum(-1, keepdim=True).clamp_(min=1)
    pick = torch.searchsorted(cdf, noise[left, -1:] * cdf.gather(1, size - 1), right=True).minimum(size - 1)
    out[left] = order.gather(1, pick)[:, 0]
    return out


# --------------------------------------------------------------------------------------------------------------------
# device and dtype


def pick_device(wanted="auto"):
    """The torch device: as wanted, else the fastest there is. Raises ValueError if it is not there."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if wanted != "auto" and not there[wanted]:
        raise ValueError(f"device={wanted} is not available here: --device=auto takes what is")
    return torch.device(wanted if wanted != "auto" else next(d for d, ok in there.items() if ok))


def pick_dtype(wanted, device, width):
    """(dtype of matrix products, the reason for it): half precision where the hardware is fast at it."""
    if wanted == "float16" and device.type != "cuda":
        raise ValueError(f"dtype=float16 needs loss scaling on cuda, this run is on {device}: bfloat16 or float32")
    if wanted != "auto":
        return getattr(torch, wanted), "as set"
    if device.type == "cuda":
        if torch.cuda.get_device_capability()[0] >= 8:
            return torch.bfloat16, "this GPU has bf16"
        return torch.float16, "this GPU has no bf16; with loss scaling"
    if device.type == "mps":
        return torch.float32, "the safe choice on mps"
    if width < 256:
        return torch.float32, "so narrow a model gains nothing from bf16 on a CPU"
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text() if cpuinfo.is_file() else ""
    if flag := next((f for f in ("amx_bf16", "avx512_bf16") if f in flags), None):
        return torch.bfloat16, f"this CPU has {flag}"
    return torch.float32, "this CPU has no fast bf16"


def amp(device, dtype):
    """The context in which matrix products run in dtype."""
    return torch.autocast(device.type, dtype) if dtype != torch.float32 else nullcontext()


def keep_freed_memory():
    """Let glibc keep large freed blocks: to map and clear them anew in every step costs a quarter of its time."""
    if platform.libc_ver()[0] == "glibc":
        libc, M_TRIM_THRESHOLD, M_MMAP_MAX = ctypes.CDLL(None), -1, -4
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)


# --------------------------------------------------------------------------------------------------------------------
# files


def atomic_write(path, write):
    """Call write(file) on a temporary neighbour of `path`, then rename: what is there is always whole, old or new."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".tmp")
    with open(part, "wb") as f:
        write(f)
        f.flush()
        os.fsync(f.fileno())
    os.replace(part, path)


def load_checkpoint(path):
    """A .pt file of train.py (tensors and plain types only, so it cannot run code). Raises with one clear line."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}: train one first, or check the path")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:
        raise ValueError(f"{path} is not a readable checkpoint ({first_line(e)}): it may be cut off") from e
    if not isinstance(saved, dict) or not {"model", "model_config"} <= saved.keys():
        raise ValueError(f"{path} is no checkpoint of train.py: give weights of another origin as .safetensors or .bin")
    return saved


def _is_conv1d(name):
    """The four weights per block that GPT-2 stores as (in, out), the transpose of nn.Linear's (out, in)."""
    return name.endswith(("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight"))


def _copy_weights(model, tensors, source, transposed):
    """Copy `tensors` into `model`; a missing, extra or misshapen tensor is an error that names it."""
    found = {}
    for key, tensor in tensors.items():
        key = key.removeprefix("transformer.") if not key.startswith("lm_head.") else key
        if not key.endswith((".attn.bias", ".attn.masked_bias")):  # causal masks that old files store as buffers
            found[key if key.startswith("lm_head.") else "transformer." + key] = tensor
    want = model.state_dict()
    if "transformer.wte.weight" in found:
        found.setdefault("lm_head.weight", found["transformer.wte.weight"])
    if missing := [k for k in want if k not in found]:
        raise ValueError(f"{source}: tensor {missing[0]} is missing ({len(missing)} in all): not a whole GPT-2 file")
    if extra := sorted(found.keys() - want.keys()):
        raise ValueError(f"{source}: unexpected tensor {extra[0]} ({len(extra)} in all): more layers than the config?")
    for key, target in want.items():
        if transposed and _is_conv1d(key):
            found[key] = found[key].t()
        if (shape := found[key].shape) != target.shape:
            raise ValueError(f"{source}: tensor {key} has shape {tuple(shape)}, wanted {tuple(target.shape)}")
    if not torch.equal(found["lm_head.weight"], found["transformer.wte.weight"]):
        raise ValueError(f"{source}: lm_head.weight differs from transformer.wte.weight, but GPT-2 ties them")
    with torch.no_grad():
        for key, target in want.items():
            target.copy_(found[key])


def _find_local(path):
    """Weight file and config (None if there is no config.json beside it) for a local folder or file."""
    if path.is_dir():
        file = next((path / n for n in WEIGHT_FILES if (path / n).is_file()), None)
        if file is None:
            raise FileNotFoundError(f"{path} holds neither {' nor '.join(WEIGHT_FILES)}: is it a GPT-2 folder?")
    elif path.is_file():
        file = path
    else:
        raise FileNotFoundError(
            f"no model {str(path)!r}: give one of {', '.join(PUBLISHED)}, a folder or file with GPT-2 weights, "
            "a checkpoint (.pt) or a config (.py)"
        )
    if not (file.parent / "config.json").is_file():
        return file, None
    try:
        saved = json.loads((file.parent / "config.json").read_text())
        shape = {n: int(saved[n]) for n in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")}
    except KeyError as e:
        raise ValueError(f"{file.parent}/config.json lacks {e.args[0]}: is it a GPT-2's?") from e
    except (ValueError, TypeError) as e:
        raise ValueError(f"{file.parent}/config.json is not a GPT-2's: {e}") from e
    want = {"model_type": "gpt2", "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "n_inner": None}
    want |= {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "tie_word_embeddings": True}
    for key, value in want.items():
        if saved.get(key, value) not in (value, 4 * shape["n_embd"] if key == "n_inner" else value):
            raise ValueError(f"{file.parent}/config.json: {key}={saved[key]!r}, but GPT-2 has {value!r}")
    return file, GPTConfig(**shape)


def _infer_config(tensors, file):
    """The shape of a lone weight file; heads are 64 wide, as in all published sizes."""
    shapes = {k.removeprefix("transformer."): v.shape for k, v in tensors.items()}
    if "wte.weight" not in shapes or "wpe.weight" not in shapes:
        raise ValueError(f"{file}: tensor wte.weight or wpe.weight is missing: not a GPT-2 file")
    (V, C), n_layer = shapes["wte.weight"], sum(k.endswith(".ln_1.weight") for k in shapes)
    return GPTConfig(V, shapes["wpe.weight"][0], C, n_layer, max(1, C // 64))


def _read_weights(file):
    try:
        if file.suffix == ".safetensors":
            return _read_safetensors(file)
        # files from before 2020 are no zip archives, and cannot be mapped
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as e:
        raise ValueError(f"{file} cannot be read as weights ({first_line(e)}): fetch it again") from e
    if not isinstance(tensors, dict) or not all(isinstance(t, torch.Tensor) for t in tensors.values()):
        raise ValueError(f"{file} holds no table of tensors: give the weights (a state dict), nothing else")
    return tensors


def first_line(e):
    """An exception's message, cut to one line; its type if it has none."""
    return (str(e).splitlines() or [type(e).__name__])[0]


def _read_safetensors(file):
    """name -> tensor, mapped from the file without a copy. Format: 8-byte little-endian header length, JSON, bytes."""
    dtypes = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "U8": torch.uint8, "BOOL": torch.bool}
    with open(file, "rb") as f:
        size = os.fstat(f.fileno()).st_size
        head = struct.unpack("<Q", f.read(8))[0] if size >= 8 else size
        if head > size - 8:
            raise ValueError(f"header of {head} bytes in a file of {size}")
        try:
            header = json.loads(f.read(head))
        except ValueError as e:
            raise ValueError("the header is not JSON") from e
        data = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_COPY)
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        try:
            dtype, shape, (begin, end) = dtypes[entry["dtype"]], entry["shape"], entry["data_offsets"]
        except (KeyError, TypeError, ValueError) as e:
            raise ValueError(f"tensor {name} has an unreadable entry {entry}") from e
        n = math.prod(shape)
        if not 0 <= begin <= end <= size - 8 - head or end - begin != n * dtype.itemsize:
            raise ValueError(f"tensor {name} has another size or lies outside the file")
        flat = (
            torch.frombuffer(data, dtype=dtype, count=n, offset=8 + head + begin) if n else torch.empty(0, dtype=dtype)
        )
        tensors[name] = flat.view(shape)
    return tensors


def _write_safetensors(path, tensors):
    tensors = {k: v.detach().float().cpu().contiguous() for k, v in tensors.items()}
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, t in tensors.items():
        end = offset + t.numel() * 4
        header[name] = {"dtype": "F32", "shape": list(t.shape), "data_offsets": [offset, end]}
        offset = end
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)  # tensors start at a multiple of 8

    def write(f):
        f.write(struct.pack("<Q", len(head)) + head)
        for t in tensors.values():
            f.write(t.numpy().tobytes())

    atomic_write(path, write)


# --------------------------------------------------------------------------------------------------------------------
# the published files: hub cache first, then a checked download into that same cache


def hub_cache():
    home = Path(os.environ.get("HF_HOME") or "~/.cache/huggingface").expanduser()
    return Path(os.environ.get("HF_HUB_CACHE") or home / "hub").expanduser()


def _find_or_download(name):
    repo = PUBLISHED[name][0]
    folder = hub_cache() / ("models--" + repo.replace("/", "--"))
    for file in WEIGHT_FILES:
        if found := sorted(folder.glob(f"snapshots/*/{file}")):
            return found[-1]
    target = folder / "snapshots" / "main" / WEIGHT_FILES[0]
    url = f"{os.environ.get('HF_ENDPOINT') or 'https://huggingface.co'}/{repo}/resolve/main/{WEIGHT_FILES[0]}"
    try:
        return download(url, target)
    except OSError as e:
        raise ConnectionError(
            f"{name}: {url} could not be fetched ({e}). Put that file at {target}, or give its folder as "
            "--init_from=FOLDER; configs/toy_cp.py needs no download"
        ) from e


class _StopAtRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args):
        return None


def download(url, target, sha256=None):
    """Fetch url into target: progress bar, resume of a part already there, size and sha256 check, atomic rename.

    The hub states size and sha256 in X-Linked-Size and X-Linked-Etag of its first answer, which is a redirect; a
    server without them is checked by Content-Length alone, and that is said, unless the caller knows the `sha256`.
    Raises OSError with one clear line.
    """
    target = Path(target)
    part = target.with_name(target.name + ".part")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        opener, request = urllib.request.build_opener(_StopAtRedirect), urllib.request.Request(url, method="HEAD")
        with opener.open(request, timeout=10) as r:
            headers = r.headers
    except urllib.error.HTTPError as e:
        if e.code not in (301, 302, 303, 307, 308):
            raise OSError(f"HTTP {e.code} {e.reason}") from e
        headers = e.headers
    except (OSError, ValueError, http.client.HTTPException) as e:
        raise OSError(f"no answer: {getattr(e, 'reason', None) or repr(e)}") from e
    sha = (headers.get("X-Linked-Etag") or "").strip('W/"')
    sha = sha256 or (sha if len(sha) == 64 else None)
    size = int(headers.get("X-Linked-Size") or (0 if headers.get("Location") else headers.get("Content-Length") or 0))
    if size and part.exists() and part.stat().st_size > size:
        part.unlink()
    have = part.stat().st_size if part.exists() else 0
    if not size or have < size:
        _fetch(url, part, have, size, target.name)
    digest = hashlib.sha256()
    with open(part, "rb") as f:
        while block := f.read(2**20):
            digest.update(block)
    if sha and digest.hexdigest() != sha:
        part.unlink()
        raise OSError(f"sha256 is {digest.hexdigest()[:12]}..., wanted {sha[:12]}...; thrown away, run again")
    if not sha:
        print(f"note: the server states no sha256 for {target.name}; only its size was checked")
    os.replace(part, target)
    return target


def _fetch(url, part, have, size, label):
    """Append what is missing to `part`. Raises OSError if less or more comes than was stated."""
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        with urllib.request.urlopen(request, timeout=30) as r:
            done = have if r.status == 206 else 0  # a server without ranges starts over
            size = size or done + int(r.headers.get("Content-Length") or 0)
            bar = tqdm(desc=label, total=size or None, initial=done, unit="B", unit_scale=True)
            with open(part, "ab" if done else "wb") as f, bar:
                while block := r.read(2**18):
                    f.write(block)
                    bar.update(len(block))
    except urllib.error.HTTPError as e:
        if e.code == 416:  # the part is no beginning of this file
            part.unlink()
        raise OSError(f"HTTP {e.code} {e.reason}; run again") from e
    except (OSError, http.client.HTTPException) as e:
        raise OSError(f"cut off ({getattr(e, 'reason', e)}); run again to resume") from e
    got = part.stat().st_size
    if size and got < size:
        raise OSError(f"cut off at {got} of {size} bytes; run again to resume")
    if size and got > size:
        part.unlink()
        raise OSError(f"{got} bytes came, {size} were stated; thrown away, run again")
