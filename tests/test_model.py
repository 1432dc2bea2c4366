"""model.py against references: transformers' GPT-2 for logits, files and greedy text, slow loops for the scores."""

import json
import math
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import GPT2Config, GPT2LMHeadModel

import model as model_py
from model import GPT, GPTConfig, load_checkpoint

BASE_MINI = Path(__file__).resolve().parents[2] / "shared" / "base_mini"
EOT = 36  # <|endoftext|> of the tiny models below: the last token, as in GPT-2
TINY = GPTConfig(vocab_size=37, n_positions=24, n_embd=16, n_layer=2, n_head=2)


@torch.no_grad()
def scatter(net, std=0.3):
    """Large weights everywhere, biases and norms included, so that no swapped, dropped or misplaced tensor can hide."""
    for name, p in net.named_parameters():
        if p.dim() == 1 and name.endswith("weight"):
            p.uniform_(0.5, 1.5)
        else:
            p.normal_(std=std)
    return net


def tiny(config=TINY, seed=0, std=0.3):
    torch.manual_seed(seed)
    return scatter(GPT(config), std)


def reference(seed=0, std=0.3, **shape):
    """transformers' GPT-2 with scattered weights; the shape of TINY where nothing else is said."""
    torch.manual_seed(seed)
    shape = vars(TINY) | shape
    ends = dict(bos_token_id=shape["vocab_size"] - 1, eos_token_id=shape["vocab_size"] - 1)
    return scatter(GPT2LMHeadModel(GPT2Config(**shape, **ends)), std).eval()


def batch(vocab=37, n=5, longest=20, seed=1, pad=0):
    """Framed, right-padded rows of unequal lengths, one of them full and one as short as can be."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, longest, (n,), generator=g)
    lengths[0], lengths[-1] = longest, 2
    idx = torch.randint(vocab - 1, (n, longest), generator=g)
    idx[:, 0] = vocab - 1
    idx[torch.arange(n), lengths - 1] = vocab - 1
    return idx.masked_fill(torch.arange(longest) >= lengths[:, None], pad), lengths


def max_diff(a, b):
    return (a - b).abs().max().item()


# --------------------------------------------------------------------------------------------------------------------
# forward pass


@pytest.mark.parametrize(
    "shape",
    [
        dict(n_layer=1, n_head=1, n_embd=8, vocab_size=11, n_positions=4),
        dict(n_layer=2, n_head=4, n_embd=32, vocab_size=101, n_positions=16),
        dict(n_layer=5, n_head=3, n_embd=48, vocab_size=257, n_positions=33),
        dict(n_layer=3, n_head=2, n_embd=128, vocab_size=50257, n_positions=64),
    ],
    ids=lambda s: "x".join(map(str, s.values())),
)
def test_logits_equal_transformers(tmp_path, shape):
    """Every position's logits, for one token and for a full context: the network is GPT-2."""
    hf = reference(**shape)
    hf.save_pretrained(tmp_path)
    ours = GPT.from_pretrained(tmp_path)
    for length in (1, shape["n_positions"]):
        idx = torch.randint(shape["vocab_size"], (2, length))
        with torch.no_grad():
            logits, want = ours(idx), hf(idx).logits
        assert logits.shape == (2, length, shape["vocab_size"]) and logits.dtype == torch.float32
        assert want.std() > 0.5 and max_diff(logits, want) < 1e-4


def test_logits_equal_transformers_at_124M(tmp_path):
    """The published shape, its MLPs driven to where tanh GELU and erf GELU part: only the tanh form may pass."""
    torch.manual_seed(0)
    hf = GPT2LMHeadModel(GPT2Config()).eval()
    with torch.no_grad():
        for name, p in hf.named_parameters():
            if name.endswith(("c_fc.weight", "mlp.c_proj.weight")):
                p.mul_(2.5 if name.endswith("c_fc.weight") else 6)
            elif name.endswith("bias"):
                p.normal_(std=0.1)
        hf.transformer.ln_f.weight.mul_(5)  # logits of standard deviation 2.8, to make the difference larger
    hf.save_pretrained(tmp_path)
    ours = GPT.from_pretrained(tmp_path)
    for file in tmp_path.iterdir():
        file.unlink()  # 500 MB that pytest would otherwise keep
    idx = torch.randint(50257, (1, 12))
    with torch.no_grad():
        logits, want = ours(idx), hf(idx).logits
        for block in hf.transformer.h:
            block.mlp.act = torch.nn.GELU()
        exact = hf(idx).logits
    assert ours.num_parameters() == 124_439_808
    assert max_diff(logits, want) < 1e-4
    assert max_diff(logits, exact) > 1e-3


@pytest.mark.parametrize(
    ("name", "millions"),
    [("distilgpt2", 81.9), ("gpt2", 124.4), ("gpt2-medium", 354.8), ("gpt2-large", 774.0), ("gpt2-xl", 1557.6)],
)
def test_parameter_counts(name, millions):
    """The published sizes, with the tied head counted once."""
    _, n_layer, n_head, n_embd = model_py.PUBLISHED[name]
    with torch.device("meta"):
        net = GPT(GPTConfig(n_layer=n_layer, n_head=n_head, n_embd=n_embd))
    assert net.num_parameters() / 1e6 == pytest.approx(millions, abs=0.05)


def test_no_dropout():
    """Two passes in train mode are equal: no score and no gradient depends on luck."""
    net, (idx, lengths) = tiny().train(), batch()
    assert torch.equal(net(idx), net(idx))
    assert torch.equal(net.sequence_nll(idx, lengths), net.sequence_nll(idx, lengths))


def test_context_is_respected():
    """One token too many is refused with both numbers; a full context passes."""
    net = tiny()
    assert net(torch.zeros(1, 24, dtype=torch.long)).shape == (1, 24, 37)
    with pytest.raises(ValueError, match="25 tokens.*24"):
        net(torch.zeros(1, 25, dtype=torch.long))


def test_initialisation():
    """GPT-2's: 0.02, residual projections 0.02 / sqrt(2 * layers), zero biases: training from scratch relies on it."""
    torch.manual_seed(0)
    net = GPT(GPTConfig(vocab_size=500, n_positions=64, n_embd=128, n_layer=8, n_head=2))
    for name, p in net.named_parameters():
        if p.dim() == 2:
            assert p.std().item() == pytest.approx(0.005 if name.endswith("c_proj.weight") else 0.02, rel=0.05), name
        else:
            assert torch.equal(p, torch.zeros_like(p) if name.endswith("bias") else torch.ones_like(p)), name


def test_impossible_heads():
    """Heads of unequal width do not exist: refused with both numbers."""
    with pytest.raises(ValueError, match="n_embd=16.*n_head=3"):
        GPT(GPTConfig(n_embd=16, n_head=3))


# --------------------------------------------------------------------------------------------------------------------
# scores


@torch.no_grad()
def slow_nll(net, idx, lengths, start=None):
    """Design section 3, word by word: one prefix, one log_softmax, one token at a time."""
    means = []
    for b, n in enumerate(lengths.tolist()):
        first = 1 if start is None else max(1, int(start[b]))
        row = idx[b : b + 1, :n]
        terms = [-net(row[:, :k])[0, -1].float().log_softmax(-1)[row[0, k]] for k in range(first, n)]
        means.append(sum(terms) / len(terms))
    return torch.stack(means)


def plain_nll(net, idx, lengths, start=None):
    """The same by plain autograd over the whole (B, T, V) logits."""
    nll = F.cross_entropy(net(idx[:, :-1]).transpose(1, 2), idx[:, 1:], reduction="none")
    at = torch.arange(1, idx.size(1))
    scored = (at < lengths[:, None]) & (at >= (torch.ones_like(lengths) if start is None else start)[:, None])
    return (nll * scored).sum(1) / scored.sum(1)


def test_nll_equals_slow_loop():
    """phi is the mean over all real tokens but the first, in nats, fp32."""
    net, (idx, lengths) = tiny(), batch()
    nll = net.sequence_nll(idx, lengths)
    assert nll.shape == (5,) and nll.dtype == torch.float32
    torch.testing.assert_close(nll, slow_nll(net, idx, lengths), atol=1e-5, rtol=1e-5)


def test_nll_equals_transformers_loss(tmp_path):
    """transformers' loss with labels=input_ids is the same mean, for sequences without padding."""
    hf = reference()
    hf.save_pretrained(tmp_path)
    idx, lengths = batch()
    nll = GPT.from_pretrained(tmp_path).sequence_nll(idx, lengths)
    for b, n in enumerate(lengths.tolist()):
        row = idx[b : b + 1, :n]
        assert nll[b].item() == pytest.approx(hf(row, labels=row).loss.item(), abs=1e-5)


@pytest.mark.parametrize("pad", [0, 7, EOT])
def test_nll_ignores_pad_id(pad):
    """The mask comes from lengths, so that any id may pad: the scores are equal to the last bit."""
    net, (idx, lengths) = tiny(), batch()
    other = idx.masked_fill(torch.arange(20) >= lengths[:, None], pad)
    assert torch.equal(net.sequence_nll(idx, lengths), net.sequence_nll(other, lengths))


@pytest.mark.parametrize("more", [1, 4])
def test_nll_ignores_amount_of_padding(more):
    net, (idx, lengths) = tiny(), batch()
    assert max_diff(net.sequence_nll(F.pad(idx, (0, more)), lengths), net.sequence_nll(idx, lengths)) < 1e-6


def test_nll_ignores_neighbours_and_order():
    """A row scores the same alone without padding, and anywhere in any batch."""
    net, (idx, lengths) = tiny(), batch()
    nll, order = net.sequence_nll(idx, lengths), torch.tensor([3, 0, 4, 2, 1])
    assert max_diff(net.sequence_nll(idx[order], lengths[order]), nll[order]) < 1e-6
    for b, n in enumerate(lengths.tolist()):
        alone = net.sequence_nll(idx[b : b + 1, :n], lengths[b : b + 1])
        assert max_diff(alone, nll[b : b + 1]) < 1e-6


def test_nll_scores_endoftext_inside_the_text():
    """<|endoftext|> in the middle is a token like others: not the end, not padding."""
    net = tiny()
    idx = torch.tensor([[EOT, 4, EOT, 9, EOT, EOT, EOT, EOT]])
    lengths = torch.tensor([5])
    nll = net.sequence_nll(idx, lengths)
    logp = net(idx).log_softmax(-1)[0]
    by_hand = -(logp[0, 4] + logp[1, EOT] + logp[2, 9] + logp[3, EOT]) / 4
    assert nll.item() == pytest.approx(by_hand.item(), abs=1e-5)
    assert (net.sequence_nll(idx, torch.tensor([3])) - nll).abs().item() > 1e-2


@pytest.mark.parametrize("lengths", [[20, 0], [20, 1], [20, 21], [20], [20, 5, 5], [[20, 5]]], ids=str)
def test_nll_refuses_bad_lengths(lengths):
    """No length may be guessed or clipped in silence, and an empty mean must not become 0 or NaN."""
    with pytest.raises(ValueError, match=r"lengths must be \(2,\) in 2\.\.20"):
        tiny().sequence_nll(batch()[0][:2], torch.tensor(lengths))


def test_nll_refuses_more_than_the_context():
    """The model reads all but the last token, so that 25 tokens fit a context of 24 and 26 do not."""
    net = tiny()
    fits = torch.zeros(1, 25, dtype=torch.long)
    want = plain_nll(net, fits, torch.tensor([25]))
    torch.testing.assert_close(net.sequence_nll(fits, torch.tensor([25])), want, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="25 tokens.*24"):
        net.sequence_nll(F.pad(fits, (0, 1)), torch.tensor([26]))


def test_nll_from_start():
    """`start` b scores only from position b on, with all before it read; 0 and 1 are the whole row."""
    net, (idx, lengths) = tiny(), batch()
    start = torch.minimum(torch.tensor([7, 0, 2, 5, 1]), lengths - 1)
    got = net.sequence_nll(idx, lengths, start=start)
    torch.testing.assert_close(got, slow_nll(net, idx, lengths, start), atol=1e-5, rtol=1e-5)
    assert max_diff(net.sequence_nll(idx, lengths, start=lengths * 0), net.sequence_nll(idx, lengths)) < 1e-6
    last = net.sequence_nll(idx, lengths, start=lengths - 1)
    logp = net(idx).log_softmax(-1)[torch.arange(5), lengths - 2, EOT]
    torch.testing.assert_close(last, -logp, atol=1e-5, rtol=1e-5)


def test_nll_refuses_start_behind_the_end():
    net, (idx, lengths) = tiny(), batch()
    start = torch.ones_like(lengths)
    start[2] = lengths[2]
    with pytest.raises(ValueError, match="nothing to score"):
        net.sequence_nll(idx, lengths, start=start)


# (CHUNK, KEEP) in numbers of a vocabulary of 37: as shipped; small chunks, kept; recomputed in blocks that are smaller
# or larger than the chunks; one row at a time because not even one fits
LIMITS = [(2**23, 2**27), (37 * 3, 2**27), (37 * 2, 37 * 7), (37 * 8 + 5, 37 * 3 + 1), (1, 1)]


@pytest.mark.parametrize("with_start", [False, True])
@pytest.mark.parametrize(("chunk", "keep"), LIMITS)
def test_nll_gradient_equals_plain_autograd(monkeypatch, chunk, keep, with_start):
    """The hand-written backward pass, for every parameter and with another weight for each row."""
    monkeypatch.setattr(model_py, "CHUNK", chunk)
    monkeypatch.setattr(model_py, "KEEP", keep)
    net, (idx, lengths) = tiny(), batch()
    start = torch.minimum(torch.tensor([7, 0, 2, 5, 1]), lengths - 1) if with_start else None
    weight = torch.tensor([1.0, -2.0, 0.5, 3.0, -0.7])
    grads = []
    for score in (net.sequence_nll(idx, lengths, start), plain_nll(net, idx, lengths, start)):
        grads.append(torch.autograd.grad((weight * score).sum(), list(net.parameters())))
        if len(grads) == 1:
            first = score.detach()
    torch.testing.assert_close(first, score.detach(), atol=1e-5, rtol=1e-5)
    for (name, _), got, want in zip(net.named_parameters(), *grads, strict=True):
        assert want.abs().max() > 1e-3, name
        assert max_diff(got, want) < 1e-5 * max(1.0, want.abs().max().item()), name


def test_nll_is_exact_in_bf16():
    """Raw logits near -70, where bf16's steps are 0.5: rounding them would cost more than an objective can bear.

    A constant direction in ln_f's bias and in wte moves all logits by -70 and leaves every probability as it is, as in
    the published weights. Mean error in nats: about 0.002 here, 20 times that for bf16 logits -> log_softmax.
    """
    net = tiny(GPTConfig(vocab_size=500, n_positions=64, n_embd=64, n_layer=2, n_head=2), std=0.1)
    with torch.no_grad():
        net.transformer.wte.weight.normal_(std=0.15)
        net.transformer.wte.weight[:, 0] = 8.0
        net.transformer.ln_f.weight[0], net.transformer.ln_f.bias[0] = 0.0, -8.75
    idx, lengths = batch(500, n=16, longest=30)
    with torch.no_grad():
        logits, exact = net(idx), net.sequence_nll(idx, lengths)
        with torch.autocast("cpu", torch.bfloat16):
            half, naive = net.sequence_nll(idx, lengths), plain_nll_of(net(idx), idx, lengths)
    assert -100 < logits.min() and logits.max() < -35
    assert half.dtype == torch.float32
    error, naive_error = (half - exact).abs(), (naive - exact).abs()
    assert error.max() < 0.05
    ratio = (naive_error.mean() / error.mean()).item()
    assert ratio > 4, f"bf16 logits are only {ratio:.1f} times worse than ours"


def plain_nll_of(logits, idx, lengths):
    """Mean NLL of logits (B, T, V) in their own dtype, as a careless scorer computes it."""
    nll = -logits.log_softmax(-1)[:, :-1].gather(2, idx[:, 1:, None])[..., 0].float()
    return (nll * (torch.arange(1, idx.size(1)) < lengths[:, None])).sum(1) / (lengths - 1)


@pytest.mark.parametrize(("chunk", "keep"), [LIMITS[0], (37 * 8 + 5, 37 * 3 + 1)])
def test_nll_gradient_in_bf16(monkeypatch, chunk, keep):
    """Under autocast the gradient points where the fp32 one does (cosine > 0.999), for every parameter."""
    monkeypatch.setattr(model_py, "CHUNK", chunk)
    monkeypatch.setattr(model_py, "KEEP", keep)
    net, (idx, lengths) = tiny(std=0.15), batch()
    want = torch.autograd.grad(net.sequence_nll(idx, lengths).sum(), list(net.parameters()))
    with torch.autocast("cpu", torch.bfloat16):
        nll = net.sequence_nll(idx, lengths)
    got = torch.autograd.grad(nll.sum(), list(net.parameters()))
    for (name, _), a, b in zip(net.named_parameters(), got, want, strict=True):
        if b.abs().max() < 1e-4:
            continue
        assert a.dtype == torch.float32 and F.cosine_similarity(a.flatten(), b.flatten(), dim=0) > 0.999, name


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation returned."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.numel = max([self.numel] + [t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor)])
        return out


def test_nll_memory_has_a_bound(monkeypatch):
    """With V = 1000 and N = 295 scored tokens, N * V numbers exist nowhere: neither computed at once nor saved."""
    V, C, N = 1000, 8, 295
    monkeypatch.setattr(model_py, "CHUNK", 5 * V)
    monkeypatch.setattr(model_py, "KEEP", 7 * V)
    net = tiny(GPTConfig(vocab_size=V, n_positions=64, n_embd=C, n_layer=1, n_head=1))
    idx, lengths = torch.randint(V, (5, 60)), torch.tensor([60] * 5)
    saved = {}

    def note(t):
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes() // 4
        return t

    with Largest() as largest, torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        net.sequence_nll(idx, lengths).sum().backward()
    assert int((lengths - 1).sum()) == N
    assert largest.numel < N * V / 25  # the embedding has V * C = N * V / 37, the MLP's activation N * 4 * C
    assert 0 < sum(saved.values()) < N * V / 4

    monkeypatch.setattr(model_py, "KEEP", N * V)  # room enough: the probabilities are kept, which shows the measure
    with Largest() as largest:
        net.sequence_nll(idx, lengths).sum().backward()
    assert largest.numel == N * V


def test_kl_of_a_model_with_itself_is_zero():
    net, (idx, lengths) = tiny(), batch()
    assert net.sequence_kl(net, idx, lengths).abs().max() < 1e-6


@pytest.mark.parametrize("chunk", [2**23, 37 * 3, 1])
def test_kl_equals_slow_loop(monkeypatch, chunk):
    """KL(base || self), mean over scored tokens: the direction and the mask, in chunks of any size."""
    monkeypatch.setattr(model_py, "CHUNK", chunk)
    net, base, (idx, lengths) = tiny(), tiny(seed=3), batch()
    got = net.sequence_kl(base, idx, lengths)
    assert got.shape == (5,) and got.dtype == torch.float32
    for b, n in enumerate(lengths.tolist()):
        terms = []
        for k in range(1, n):
            p, q = (m(idx[b : b + 1, :k])[0, -1].log_softmax(-1) for m in (base, net))
            terms.append((p.exp() * (p - q)).sum())
        assert got[b].item() == pytest.approx((sum(terms) / len(terms)).item(), rel=1e-5, abs=1e-5)


def test_kl_gradient_flows_only_to_self(monkeypatch):
    """The base stays untouched; every parameter of self gets what plain autograd gives."""
    monkeypatch.setattr(model_py, "CHUNK", 37 * 3)
    net, base, (idx, lengths) = tiny(), tiny(seed=3), batch()
    net.sequence_kl(base, idx, lengths).sum().backward()
    assert all(p.grad is None for p in base.parameters())
    logp, logp_base = net(idx[:, :-1]).log_softmax(-1), base(idx[:, :-1]).log_softmax(-1).detach()
    scored = torch.arange(1, idx.size(1)) < lengths[:, None]
    kl = ((logp_base.exp() * (logp_base - logp)).sum(-1) * scored).sum(1) / (lengths - 1)
    for (name, p), want in zip(
        net.named_parameters(), torch.autograd.grad(kl.sum(), list(net.parameters())), strict=True
    ):
        assert want.abs().max() > 1e-3, name
        assert max_diff(p.grad, want) < 1e-5 * max(1.0, want.abs().max().item()), name


@pytest.mark.parametrize("keep", [2**27, 37 * 3])
def test_kl_in_bf16_and_in_parts_is_close(monkeypatch, keep):
    """The backward pass with the kept difference, and with one that is computed again."""
    net, base, (idx, lengths) = tiny(), tiny(seed=3), batch()
    net.sequence_kl(base, idx, lengths).sum().backward()
    want = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    monkeypatch.setattr(model_py, "KEEP", keep)
    net.sequence_kl(base, idx, lengths).sum().backward()
    assert all(max_diff(p.grad, w) < 1e-5 for p, w in zip(net.parameters(), want, strict=True))
    net.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        net.sequence_kl(base, idx, lengths).sum().backward()
    assert all(max_diff(p.grad, w) < 0.1 * w.abs().max() for p, w in zip(net.parameters(), want, strict=True))


@pytest.mark.parametrize("score", ["nll", "kl"])
def test_a_frozen_head_leaves_the_other_gradients_alone(score):
    net, base, (idx, lengths) = tiny(), tiny(seed=3), batch()
    value = lambda: net.sequence_nll(idx, lengths) if score == "nll" else net.sequence_kl(base, idx, lengths)  # noqa: E731
    value().sum().backward()
    want = {name: p.grad.clone() for name, p in net.named_parameters()}
    net.zero_grad()
    net.transformer.wte.requires_grad_(False)
    value().sum().backward()
    assert net.lm_head.weight.grad is None
    for name, p in net.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.grad, want[name])


# --------------------------------------------------------------------------------------------------------------------
# generation

LONG = GPTConfig(vocab_size=61, n_positions=128, n_embd=32, n_layer=2, n_head=4)


def prompts(seed=5):
    """Three prompts of 1, 9 and 20 tokens, padded with a token that must not be read."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([9, 20, 1])
    idx = torch.randint(61, (3, 20), generator=g)
    return idx.masked_fill(torch.arange(20) >= lengths[:, None], 13), lengths


@torch.no_grad()
def argmax_loop(logits_of, prompt, n):
    """n greedy tokens after prompt, the whole text read again for each; and the narrowest lead of a winner."""
    text, lead = prompt[None], math.inf
    for _ in range(n):
        best = logits_of(text)[0, -1].topk(2)
        lead = min(lead, (best.values[0] - best.values[1]).item())
        text = torch.cat([text, best.indices[None, :1]], dim=1)
    return text[0, len(prompt) :], lead


def test_greedy_cached_equals_uncached():
    """100 tokens for prompts of unequal lengths in one batch: cache, mask and positions are right."""
    net, (idx, lengths) = tiny(LONG, seed=1), prompts()
    tokens, count = net.generate(idx, lengths, 100, temperature=0)
    assert tokens.shape == (3, 100) and count.tolist() == [100] * 3
    for b, n in enumerate(lengths.tolist()):
        want, lead = argmax_loop(net, idx[b, :n], 100)
        assert lead > 1e-4, "a near tie: rounding decides, choose another seed"
        assert len(set(want.tolist())) > 10
        assert tokens[b].tolist() == want.tolist()


def test_greedy_equals_transformers(tmp_path):
    """The same text as transformers' logits give, token for token over 100 tokens."""
    hf = reference(seed=1, **vars(LONG))
    hf.save_pretrained(tmp_path)
    idx, lengths = prompts()
    tokens, _ = GPT.from_pretrained(tmp_path).generate(idx, lengths, 100, temperature=0)
    for b, n in enumerate(lengths.tolist()):
        want, lead = argmax_loop(lambda text: hf(text).logits, idx[b, :n], 100)
        assert lead > 1e-4 and len(set(want.tolist())) > 10
        assert tokens[b].tolist() == want.tolist()


def test_stop_token_ends_a_row():
    """A row ends with its stop token, which is counted; the others go on as if nothing had happened."""
    net, (idx, lengths) = tiny(LONG), prompts()
    free, _ = net.generate(idx, lengths, 60, temperature=0)
    stop = free[0, 10].item()
    tokens, count = net.generate(idx, lengths, 60, temperature=0, stop_token=stop)
    ends = [row.index(stop) + 1 if stop in row else 60 for row in free.tolist()]
    assert count.tolist() == ends and ends[0] <= 11 and len(set(ends)) > 1
    for b, n in enumerate(ends):
        assert tokens[b, :n].tolist() == free[b, :n].tolist() and not tokens[b, n:].any()


def test_generate_stops_early_when_all_rows_have():
    """No pass through the network is spent on rows that are done."""
    net, (idx, lengths) = tiny(LONG), prompts()
    stop = net.generate(idx[:1], lengths[:1], 1, temperature=0)[0].item()
    passes, hidden = [], net.hidden
    net.hidden = lambda *args, **kwargs: passes.append(1) or hidden(*args, **kwargs)
    tokens, count = net.generate(idx[:1], lengths[:1], 60, temperature=0, stop_token=stop)
    assert count.tolist() == [1] and tokens[0, 0] == stop and len(passes) == 1


SAMPLING = [dict(), dict(temperature=0.7, top_p=0.9), dict(temperature=1.3, top_k=5), dict(top_k=8, top_p=0.5)]


@pytest.mark.parametrize("how", SAMPLING, ids=str)
def test_sampling_repeats_from_a_seed(how):
    net, (idx, lengths) = tiny(LONG, std=0.15), prompts()
    a, b, c = (
        net.generate(idx, lengths, 40, **how, generator=torch.Generator().manual_seed(seed))[0] for seed in (7, 7, 8)
    )
    assert torch.equal(a, b) and not torch.equal(a, c)


@pytest.mark.parametrize("how", SAMPLING, ids=str)
def test_sampling_in_one_batch_equals_single_rows(how):
    """Rows that draw from one generator in order say the same alone and together, also when one stops early."""
    net, (idx, lengths) = tiny(LONG, std=0.15), prompts()
    together, count = net.generate(idx, lengths, 40, **how, stop_token=3, generator=torch.Generator().manual_seed(7))
    one = torch.Generator().manual_seed(7)
    for b, n in enumerate(lengths.tolist()):
        alone, n_alone = net.generate(idx[b : b + 1, :n], lengths[b : b + 1], 40, **how, stop_token=3, generator=one)
        assert alone[0].tolist() == together[b].tolist() and n_alone.item() == count[b].item()


def test_top_k_1_is_greedy():
    net, (idx, lengths) = tiny(LONG), prompts()
    greedy, _ = net.generate(idx, lengths, 60, temperature=0)
    assert torch.equal(net.generate(idx, lengths, 60, top_k=1)[0], greedy)


def test_generate_refuses_more_than_the_context():
    """20 + 108 tokens fit 128 exactly; one more does not."""
    net, (idx, lengths) = tiny(LONG), prompts()
    assert net.generate(idx, lengths, 108, temperature=0)[1].tolist() == [108] * 3
    with pytest.raises(ValueError, match="129 tokens.*128"):
        net.generate(idx, lengths, 109, temperature=0)


def expected(logits, temperature=1.0, top_k=0, top_p=1.0):
    """What must be drawn from, by a plain loop: the likeliest tokens until their mass reaches top_p."""
    probs = (logits.double() / temperature).softmax(-1)
    order = probs.argsort(descending=True).tolist()[: top_k or None]
    total = sum(probs[i].item() for i in order)
    out, mass = torch.zeros(len(logits), dtype=torch.float64), 0.0
    for i in order:
        out[i] = probs[i]
        mass += probs[i].item() / total
        if mass >= top_p:
            break
    return out / out.sum()


def drawn(logits, n, **how):
    """Frequencies of n draws, with four numbers of noise each as `generate` has them."""
    how = dict(temperature=1.0, top_k=0, top_p=1.0) | how
    noise = torch.rand(n, 4, generator=torch.Generator().manual_seed(1)).split(2000)
    tokens = torch.cat([model_py._sample(logits.expand(len(u), -1), **how, noise=u) for u in noise])
    return torch.bincount(tokens, minlength=len(logits)).double() / n


@pytest.mark.parametrize(
    "how",
    [
        dict(),
        dict(temperature=0.5),
        dict(top_k=4),
        dict(top_p=0.8),
        dict(top_p=0.05),
        dict(temperature=2.0, top_k=10, top_p=0.7),
    ],
    ids=str,
)
def test_sample_follows_the_distribution(how):
    """Exactly the tokens of the nucleus, each as often as its share says (20,000 draws)."""
    logits = torch.randn(30, generator=torch.Generator().manual_seed(2)) * 2
    want, got = expected(logits, **how), drawn(logits, 20_000, **how)
    assert set(got.nonzero()[:, 0].tolist()) <= set(want.nonzero()[:, 0].tolist())
    assert max_diff(got, want) < 4 * 0.5 / 20_000**0.5  # four standard errors


@pytest.mark.parametrize(("spread", "top_p"), [(0.1, 0.3), (0.1, 0.97), (3.0, 0.5), (1.0, 0.9)])
def test_sample_from_a_wide_nucleus(spread, top_p):
    """V = 5000: narrow and wide nuclei, flat and peaked distributions."""
    logits = torch.randn(5000, generator=torch.Generator().manual_seed(2)) * spread
    want, got = expected(logits, top_p=top_p), drawn(logits, 4000, top_p=top_p)
    nucleus = want > 0
    outside = got[~nucleus].sum().item()
    assert outside < 2 / 4000  # one token at the border may be decided by fp32 rounding
    order = want.argsort(descending=True)  # single tokens are too rare to compare: compare the mass of the first n
    assert max_diff(got[order].cumsum(0), want[order].cumsum(0)) < 1.95 / 4000**0.5  # Kolmogorov-Smirnov, p = 0.001


def test_sample_rows_are_independent():
    """A peaked row and a flat row in one call take different paths and get what each gets alone."""
    g = torch.Generator().manual_seed(2)
    logits = torch.randn(6, 5000, generator=g) * torch.tensor([5, 0.1, 3, 0.01, 0.5, 8])[:, None]
    noise = torch.rand(6, 4, generator=g)
    alone = [model_py._sample(logits[b : b + 1], 1.0, 0, 0.95, noise[b : b + 1]).item() for b in range(6)]
    assert model_py._sample(logits, 1.0, 0, 0.95, noise).tolist() == alone


@pytest.mark.parametrize("noise", [0.0, 1 - 2**-24])
@pytest.mark.parametrize("top_p", [0.5, 1.0])
def test_sample_at_the_ends_of_the_noise(noise, top_p):
    """Noise of 0 and the largest number below 1 draw the first and the last token of the nucleus, none outside it.

    At 0 and top_p 0.5 every draw is token 0, which is outside: the rows are sorted after all, likeliest first.
    """
    logits = torch.tensor([[0.2, 0.4, 0.1, 0.3]]).log()
    want = {0.5: 1, 1.0: 0}[top_p] if noise == 0 else 3
    assert model_py._sample(logits, 1.0, 0, top_p, torch.full((1, 4), noise)).item() == want


# --------------------------------------------------------------------------------------------------------------------
# weights in


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A folder as transformers writes it, the reference's logits for one input, and that input. Read only."""
    folder = tmp_path_factory.mktemp("published")
    hf = reference(n_embd=128)  # two heads of 64, as a lone file is taken to have
    hf.save_pretrained(folder)
    idx = torch.randint(37, (2, 24))
    with torch.no_grad():
        return folder, hf(idx).logits, idx


def write(folder, tensors, file="model.safetensors", config=None):
    """A weight file, with config.json beside it if there is one."""
    if file.endswith(".safetensors"):
        save_file({k: v.contiguous().clone() for k, v in tensors.items()}, folder / file)
    else:
        torch.save(tensors, folder / file)
    if config is not None:
        (folder / "config.json").write_text(config)
    return folder


def loads_equal(path, want, idx, tolerance=1e-4):
    net = GPT.from_pretrained(path)
    assert all(p.dtype == torch.float32 and p.requires_grad for p in net.parameters())
    assert net.lm_head.weight is net.transformer.wte.weight
    with torch.no_grad():
        assert max_diff(net(idx), want) < tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("prefix", ["transformer.", ""], ids=["prefix", "no prefix"])
def test_reads_every_layout(tmp_path, published, prefix, file, dtype):
    """Both key layouts, both formats, three dtypes: the parameters are the file's numbers, exactly, in fp32."""
    folder, _, _ = published
    tensors = load_file(folder / "model.safetensors")
    tensors = {prefix + k.removeprefix("transformer."): v.to(dtype) for k, v in tensors.items()}
    write(tmp_path, tensors, file, (folder / "config.json").read_text())
    net = GPT.from_pretrained(str(tmp_path))
    for key, value in net.state_dict().items():
        want = tensors[prefix + key.removeprefix("transformer.").replace("lm_head", "wte")].float()
        conv1d = want.dim() == 2 and ("attn.c" in key or "mlp.c" in key)
        assert value.dtype == torch.float32 and torch.equal(value, want.t() if conv1d else want), key


def test_reads_a_whole_folder(published):
    folder, want, idx = published
    loads_equal(folder, want, idx)


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin", "other.safetensors", "other.bin"])
def test_reads_a_lone_file(tmp_path, published, file):
    """Without config.json the shape comes from the tensors, with heads 64 wide."""
    folder, want, idx = published
    write(tmp_path, load_file(folder / "model.safetensors"), file)
    loads_equal(tmp_path / file, want, idx)
    assert vars(GPT.from_pretrained(tmp_path / file).config) == vars(TINY) | dict(n_embd=128)


def test_reads_a_file_beside_its_config(tmp_path, published):
    """A file's own config.json wins over the guess: here four heads of 32."""
    hf = reference(n_embd=128, n_head=4)
    hf.save_pretrained(tmp_path)
    idx = published[2]
    with torch.no_grad():
        loads_equal(tmp_path / "model.safetensors", hf(idx).logits, idx)


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_reads_files_with_head_and_masks(tmp_path, published, file):
    """A stored lm_head.weight is accepted; the causal masks that old files hold are skipped."""
    folder, want, idx = published
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"].clone()
    for i in range(2):
        tensors[f"transformer.h.{i}.attn.bias"] = torch.ones(1, 1, 24, 24, dtype=(torch.uint8, torch.bool)[i]).tril()
        tensors[f"transformer.h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    write(tmp_path, tensors, file, (folder / "config.json").read_text())
    loads_equal(tmp_path, want, idx)


def test_refuses_an_untied_head(tmp_path, published):
    """Two different embeddings cannot both be kept; dropping one in silence would load another model."""
    folder = published[0]
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"] + 1
    with pytest.raises(ValueError, match=r"lm_head\.weight differs"):
        GPT.from_pretrained(write(tmp_path, tensors, config=(folder / "config.json").read_text()))


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize(
    ("change", "key"),
    [
        ("drop", "transformer.h.1.mlp.c_fc.bias"),
        ("drop", "transformer.wpe.weight"),
        ("drop", "transformer.ln_f.weight"),
        ("add", "transformer.h.2.ln_1.weight"),
        ("add", "score.weight"),
        ("shape", "transformer.h.0.attn.c_attn.weight"),
        ("shape", "transformer.wpe.weight"),
        ("transpose", "transformer.h.0.mlp.c_proj.weight"),
    ],
)
def test_names_the_wrong_tensor(tmp_path, published, file, change, key):
    """Missing, extra or misshapen: an error with the tensor's name, never a half-loaded model."""
    folder = published[0]
    tensors = load_file(folder / "model.safetensors")
    if change == "drop":
        del tensors[key]
    elif change == "add":
        tensors[key] = torch.ones(128)
    else:
        tensors[key] = tensors[key].t() if change == "transpose" else tensors[key][:-1]
    with pytest.raises(ValueError) as error:
        GPT.from_pretrained(write(tmp_path, tensors, file, (folder / "config.json").read_text()))
    assert key in str(error.value) and "\n" not in str(error.value)
    if change in ("shape", "transpose"):
        assert "wanted (" in str(error.value)


def reheadered(raw, change):
    """The bytes of a safetensors file after `change` has been applied to its parsed header."""
    size = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + size])
    header = change(header) or header
    head = json.dumps(header).encode()
    return struct.pack("<Q", len(head)) + head + raw[8 + size :]


def set_entry(**values):
    return lambda header: header["transformer.wpe.weight"].update(values)


DAMAGE = {
    "cut in the tensors": lambda raw: raw[:-100],
    "cut in the header": lambda raw: raw[:50],
    "cut in the length": lambda raw: raw[:5],
    "empty": lambda raw: b"",
    "an error page": lambda raw: b"<!DOCTYPE html><html><body>Not found</body></html>",
    "garbage header": lambda raw: raw[:8] + b"\xff" * 64 + raw[72:],
    "header is a list": lambda raw: reheadered(raw, list),
    "offsets behind the end": lambda raw: reheadered(raw, set_entry(data_offsets=[10**9, 10**9 + 24 * 128 * 4])),
    "offsets negative": lambda raw: reheadered(raw, set_entry(data_offsets=[-24 * 128 * 4, 0])),
    "offsets reversed": lambda raw: reheadered(raw, set_entry(data_offsets=[24 * 128 * 4, 0])),
    "shape larger than its bytes": lambda raw: reheadered(raw, set_entry(shape=[240, 128])),
    "shape negative": lambda raw: reheadered(raw, set_entry(shape=[-24, -128])),
    "unknown dtype": lambda raw: reheadered(raw, set_entry(dtype="F8_E4M3")),
    "no dtype": lambda raw: reheadered(raw, lambda header: header["transformer.wpe.weight"].pop("dtype") and None),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_refuses_a_damaged_safetensors_file(tmp_path, published, damage):
    """One line that names the file: no crash in a reader, no read outside the file, no half-loaded model."""
    raw = (published[0] / "model.safetensors").read_bytes()
    file = tmp_path / "model.safetensors"
    file.write_bytes(damage(raw))
    with pytest.raises(ValueError) as error:
        GPT.from_pretrained(file)
    assert str(file) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name", [n for n in DAMAGE if n.startswith(("offsets beh", "offsets neg", "offsets rev", "shape l"))]
)
def test_bad_offsets_name_the_tensor(tmp_path, published, name):
    file = tmp_path / "model.safetensors"
    file.write_bytes(DAMAGE[name]((published[0] / "model.safetensors").read_bytes()))
    with pytest.raises(ValueError, match=r"tensor transformer\.wpe\.weight .*fetch it again"):
        GPT.from_pretrained(file)


class Bomb:
    """Pickles to a call of a function, as a hostile weight file would."""

    def __reduce__(self):
        return (Path.touch, (Path("bomb-went-off"),))


@pytest.mark.parametrize(
    ("file", "damage"),
    [("pytorch_model.bin", d) for d in ("cut", "text", "empty", "bomb")]
    + [("model.pt", d) for d in ("cut", "text", "bomb")],
)
def test_refuses_a_damaged_pickle(tmp_path, monkeypatch, published, file, damage):
    """A .bin or .pt that is cut, not one at all, or would run code: an error that names it, and nothing runs."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / file
    torch.save({"wte.weight": Bomb()} if damage == "bomb" else load_file(published[0] / "model.safetensors"), path)
    if damage != "bomb":
        path.write_bytes({"cut": path.read_bytes()[:-5000], "text": b"not found", "empty": b""}[damage])
    with pytest.raises(ValueError) as error:
        GPT.from_pretrained(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "bomb-went-off").exists()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("activation_function", "gelu"),
        ("model_type", "llama"),
        ("layer_norm_epsilon", 1e-6),
        ("n_inner", 100),
        ("scale_attn_weights", False),
        ("scale_attn_by_inverse_layer_idx", True),
        ("tie_word_embeddings", False),
    ],
)
def test_refuses_what_is_no_gpt2(tmp_path, published, key, value):
    """A config.json that asks for other arithmetic than ours is refused by name instead of loaded wrongly."""
    folder = published[0]
    config = json.loads((folder / "config.json").read_text()) | {key: value}
    write(tmp_path, load_file(folder / "model.safetensors"), config=json.dumps(config))
    with pytest.raises(ValueError, match=f"config.json: {key}={value!r}"):
        GPT.from_pretrained(tmp_path)


def test_accepts_the_usual_inner_width(tmp_path, published):
    """n_inner = 4 * n_embd says what null says."""
    folder, want, idx = published
    config = json.loads((folder / "config.json").read_text()) | {"n_inner": 512}
    loads_equal(write(tmp_path, load_file(folder / "model.safetensors"), config=json.dumps(config)), want, idx)


@pytest.mark.parametrize("key", ["vocab_size", "n_positions", "n_layer", "n_head"])
def test_names_what_the_config_lacks(tmp_path, published, key):
    folder = published[0]
    config = json.loads((folder / "config.json").read_text())
    del config[key]
    write(tmp_path, load_file(folder / "model.safetensors"), config=json.dumps(config))
    with pytest.raises(ValueError, match=f"config.json lacks {key}"):
        GPT.from_pretrained(tmp_path)


@pytest.mark.parametrize(("n_layer", "message"), [(1, "unexpected tensor"), (3, "is missing")])
def test_refuses_a_config_of_other_depth(tmp_path, published, n_layer, message):
    folder = published[0]
    config = json.loads((folder / "config.json").read_text()) | {"n_layer": n_layer}
    write(tmp_path, load_file(folder / "model.safetensors"), config=json.dumps(config))
    with pytest.raises(ValueError, match=message):
        GPT.from_pretrained(tmp_path)


def test_nonexistent_paths(tmp_path):
    """The error repeats what was asked for and lists what could have been."""
    with pytest.raises(FileNotFoundError, match="no model 'gpt3'.*gpt2-xl"):
        GPT.from_pretrained("gpt3")
    with pytest.raises(FileNotFoundError, match="nowhere.safetensors"):
        GPT.from_pretrained(tmp_path / "nowhere.safetensors")
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*nowhere\.pt"):
        GPT.from_pretrained(tmp_path / "nowhere.pt")


def test_folder_without_weights(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors nor pytorch_model\.bin"):
        GPT.from_pretrained(tmp_path)


@pytest.mark.parametrize("saved", [{"weights": torch.ones(2)}, [1, 2], torch.ones(2)], ids=["dict", "list", "tensor"])
def test_pt_that_is_no_checkpoint(tmp_path, saved):
    torch.save(saved, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"x\.pt is .*checkpoint of train\.py"):
        GPT.from_pretrained(tmp_path / "x.pt")


def test_reads_a_checkpoint(tmp_path):
    """A .pt as train.py writes it holds our own layout, nothing transposed: bit for bit the same model."""
    net = tiny()
    path = tmp_path / "new" / "ckpt.pt"
    state = {"model": net.state_dict(), "model_config": vars(net.config), "step": 3}
    model_py.atomic_write(path, lambda f: torch.save(state, f))
    again, (idx, lengths) = GPT.from_pretrained(path), batch()
    assert again.config == net.config and load_checkpoint(path)["step"] == 3
    assert torch.equal(again.sequence_nll(idx, lengths), net.sequence_nll(idx, lengths))


def test_square_weights_are_not_confused(tmp_path):
    """attn.c_proj is square, so that no shape check sees a forgotten or a doubled transpose: the values must."""
    net = tiny()
    torch.save({"model": net.state_dict(), "model_config": vars(net.config)}, tmp_path / "x.pt")
    net.save_pretrained(tmp_path)
    want = net.transformer.h[0].attn.c_proj.weight
    for path in (tmp_path / "x.pt", tmp_path):
        assert torch.equal(GPT.from_pretrained(path).transformer.h[0].attn.c_proj.weight, want)
    stored = load_file(tmp_path / "model.safetensors")["transformer.h.0.attn.c_proj.weight"]
    assert torch.equal(stored, want.t()) and not torch.equal(want, want.t())


# --------------------------------------------------------------------------------------------------------------------
# weights out


def test_transformers_loads_what_we_save(tmp_path):
    """No missing, unexpected or mismatched key, and the same logits."""
    net = tiny(LONG)
    net.save_pretrained(tmp_path / "new" / "folder")
    hf, info = GPT2LMHeadModel.from_pretrained(tmp_path / "new" / "folder", output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert hf.config.activation_function == "gelu_new" and hf.dtype == torch.float32
    assert hf.config.eos_token_id == hf.config.bos_token_id == 60
    idx = torch.randint(61, (2, 128))
    with torch.no_grad():
        assert max_diff(hf.eval()(idx).logits, net(idx)) < 1e-5


def test_round_trip_is_bit_equal(tmp_path):
    """Saved and loaded again: every tensor to the last bit, the same config, and no temporary file left."""
    net = tiny(LONG)
    net.save_pretrained(tmp_path)
    again = GPT.from_pretrained(tmp_path)
    assert again.config == net.config
    for (name, a), b in zip(net.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert sorted(f.name for f in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_loaded_weights_do_not_hold_on_to_the_file(tmp_path):
    """The tensors are mapped from the file while reading; training them must change neither it nor a second model."""
    tiny().save_pretrained(tmp_path)
    raw = (tmp_path / "model.safetensors").read_bytes()
    a, b = GPT.from_pretrained(tmp_path), GPT.from_pretrained(tmp_path)
    with torch.no_grad():
        for p in a.parameters():
            p.add_(1.0)
    assert (tmp_path / "model.safetensors").read_bytes() == raw
    assert torch.equal(b.lm_head.weight, tiny().lm_head.weight)


def test_failed_write_leaves_the_old_file(tmp_path):
    """A write that breaks off half-way must not cost the last good checkpoint."""
    (tmp_path / "x").write_bytes(b"old")

    def broken(f):
        f.write(b"half")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        model_py.atomic_write(tmp_path / "x", broken)
    assert (tmp_path / "x").read_bytes() == b"old"


# --------------------------------------------------------------------------------------------------------------------
# real weights


@pytest.mark.skipif(not BASE_MINI.is_dir(), reason=f"no {BASE_MINI}: it is lent beside the checkout, not shipped")
def test_base_mini():
    """A trained model in fp16: logits, scores and greedy text equal transformers', also where its logits lie low."""
    ours = GPT.from_pretrained(BASE_MINI)
    hf = GPT2LMHeadModel.from_pretrained(BASE_MINI, dtype=torch.float32).eval()
    text = torch.tensor([[50256, 464, 3797, 3332, 319, 262, 2603, 290, 3114, 503, 262, 4324, 13, 50256]])
    idx, lengths = torch.cat([text, text.roll(3, 1)]), torch.tensor([14, 9])
    with torch.no_grad():
        want = hf(idx).logits
        assert max_diff(ours(idx), want) < 1e-4
        nll = ours.sequence_nll(idx, lengths)
        for b, n in enumerate(lengths.tolist()):
            assert nll[b].item() == pytest.approx(
                hf(idx[b : b + 1, :n], labels=idx[b : b + 1, :n]).loss.item(), abs=1e-4
            )
        with torch.autocast("cpu", torch.bfloat16):
            assert max_diff(ours.sequence_nll(idx, lengths), nll) < 0.05
        assert nll[0] < 7 < math.log(50257)  # it has learned English: a shuffled load would score worse than chance
    greedy, _ = ours.generate(idx[:, :6], torch.tensor([6, 4]), 20, temperature=0)
    for b, n in enumerate((6, 4)):
        assert greedy[b].tolist() == argmax_loop(lambda x: hf(x).logits, idx[b, :n], 20)[0].tolist()


@pytest.mark.parametrize("sampling", [dict(top_p=0.8), dict(top_k=5), dict(temperature=0)])
def test_a_prefix_read_once_is_the_beginning_of_every_prompt(sampling):
    net = GPT(LONG)
    for p in net.parameters():
        p.data.mul_(3)  # so that attention matters
    prefix, (idx, lengths) = list(range(7, 40)), batch()
    idx = idx % LONG.vocab_size
    whole = torch.cat([torch.tensor(prefix).expand(len(idx), -1), idx], 1)
    random = torch.rand(3 * len(idx), 9, 4, generator=torch.Generator().manual_seed(1))
    how = dict(max_new_tokens=9, stop_token=5, generator=random, samples=3, **sampling)
    want, count = net.generate(whole, lengths + len(prefix), **how)
    got, n = net.generate(idx, lengths, prefix=net.read_prefix(prefix), **how)
    assert torch.equal(got, want) and torch.equal(n, count)
    other, _ = net.generate(idx, lengths, **how)
    assert not torch.equal(other, want)
    with torch.autocast("cpu", torch.bfloat16):
        got, _ = net.generate(idx, lengths, prefix=net.read_prefix(prefix), **how)
    assert (got == want).float().mean() > 0.5


def test_a_prefix_counts_towards_the_context():
    net, (idx, lengths) = GPT(LONG), batch()
    with pytest.raises(ValueError, match="context is 128"):
        net.generate(idx % 61, lengths, 20, prefix=net.read_prefix([1] * 105))
    with pytest.raises(ValueError, match="context is 128"):
        net.read_prefix([1] * 129)


def test_noise_may_be_given():
    net, (idx, lengths) = GPT(LONG), batch()
    seeded = net.generate(idx % 61, lengths, 6, generator=torch.Generator().manual_seed(4), samples=2)
    random = torch.rand(2 * len(idx), 6, 4, generator=torch.Generator().manual_seed(4))
    given = net.generate(idx % 61, lengths, 6, generator=random, samples=2)
    assert torch.equal(seeded[0], given[0])
