"""model.py and its output head against references: transformers' GPT-2 for logits and text, slow loops for scores."""

import math
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import GPT2Config, GPT2LMHeadModel

import model
from engine import attention, head, weights
from engine.sampling import sample
from model import GPT, GPTConfig

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
    ("name", "n_layer", "n_head", "n_embd", "millions"),
    [
        ("distilgpt2", 6, 12, 768, 81.9),
        ("gpt2", 12, 12, 768, 124.4),
        ("gpt2-medium", 24, 16, 1024, 354.8),
        ("gpt2-large", 36, 20, 1280, 774.0),
        ("gpt2-xl", 48, 25, 1600, 1557.6),
    ],
)
def test_published_shapes(monkeypatch, name, n_layer, n_head, n_embd, millions):
    """The published sizes, with the tied head counted once. The shape of a file without config.json is read off it."""
    shape = dict(vocab_size=50257, n_positions=1024, n_embd=n_embd, n_layer=n_layer, n_head=n_head)
    with torch.device("meta"):
        net = GPT(GPTConfig(**shape))
    assert net.num_parameters() / 1e6 == pytest.approx(millions, abs=0.05)
    monkeypatch.setattr(weights, "_find_published", lambda name: Path(f"{name}.safetensors"))
    monkeypatch.setattr(weights, "_read", lambda file: net.state_dict())
    assert weights.load_weights(name)[0] == shape


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
    monkeypatch.setattr(head, "CHUNK", chunk)
    monkeypatch.setattr(head, "KEEP", keep)
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


@pytest.mark.parametrize("keep", [True, False])
def test_nll_of_one_half_precision_product(monkeypatch, keep):
    """Near the exact values for targets as likely as can be and far less likely than a float can say, each row with
    another level of its logits, in one block or several; and the softmax that is kept for the backward pass."""
    V, C = 50, 32
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(V, C, generator=g)
    h = torch.randn(40, C, generator=g) * torch.tensor([0.3, 1.0, 3.0, 30.0]).repeat(10)[:, None]
    weight[:, 0], h[:, 0] = 8.0, torch.linspace(-12, 4, 40)  # levels from -96 to 32
    weight, h, target = weight.bfloat16(), h.bfloat16(), torch.randint(V, (40,), generator=g)
    monkeypatch.setattr(head, "CHUNK", 7 * V)
    p = torch.empty(40, V, dtype=torch.bfloat16) if keep else None
    exact = (h.double() @ weight.double().t()).log_softmax(-1)
    target[::3] = exact[::3].argmax(1)
    want, got = -exact.gather(1, target[:, None])[:, 0], head._losses(h, weight, target, None, V, p)
    assert got.dtype == torch.float32 and want.max() > 200 and want.min() < 1e-3
    assert ((got - want).abs() < 0.004 + 0.004 * want).all()
    assert not keep or (p.double() - exact.exp()).abs().max() < 0.02


def test_logits_in_half_precision_while_sampling():
    """Raw logits near -70, in bf16: up to a constant those of fp32, and near the likeliest to a few hundredths."""
    net = tiny(GPTConfig(vocab_size=500, n_positions=64, n_embd=64, n_layer=2, n_head=2), std=0.1)
    with torch.no_grad():
        net.transformer.wte.weight.normal_()
        net.transformer.wte.weight[:, 0] = 8.0
        net.transformer.ln_f.weight[0], net.transformer.ln_f.bias[0] = 0.0, -8.75
        with torch.autocast("cpu", torch.bfloat16):
            rows = model.Rows(net, *prompts(), 5)
            got = rows.logits().double()
        exact = rows.h.bfloat16().double() @ net.lm_head.weight.bfloat16().double().t()
    assert exact.max() < -30
    got, want = (x.log_softmax(-1) for x in (got, exact))
    near = want > want.amax(1, keepdim=True) - 3
    assert near.sum() > 3 and 0 < max_diff(got[near], want[near]) < 0.05 < max_diff(exact.bfloat16(), exact)


def test_logits_in_slices_of_the_vocabulary():
    h, weight = torch.randn(3, 8), torch.randn(2 * head.SLICE + 1, 8)
    assert max_diff(head.fp32_logits(h, weight), h @ weight.t()) < 1e-5


def test_plain_causal_attention_is_torch_s():
    q, k, v = (torch.randn(3, 2, 9, 4, requires_grad=True) for _ in range(3))
    by = torch.randn(3, 2, 9, 4)
    want = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    got = attention._plain_causal(q, k, v)
    assert max_diff(got, want) < 1e-6
    for a, b in zip(*(torch.autograd.grad((by * y).sum(), (q, k, v)) for y in (got, want)), strict=True):
        assert max_diff(a, b) < 1e-6


def plain_nll_of(logits, idx, lengths):
    """Mean NLL of logits (B, T, V) in their own dtype, as a careless scorer computes it."""
    nll = -logits.log_softmax(-1)[:, :-1].gather(2, idx[:, 1:, None])[..., 0].float()
    return (nll * (torch.arange(1, idx.size(1)) < lengths[:, None])).sum(1) / (lengths - 1)


@pytest.mark.parametrize(("chunk", "keep"), [LIMITS[0], (37 * 8 + 5, 37 * 3 + 1)])
def test_nll_gradient_in_bf16(monkeypatch, chunk, keep):
    """Under autocast the gradient points where the fp32 one does (cosine > 0.999), for every parameter."""
    monkeypatch.setattr(head, "CHUNK", chunk)
    monkeypatch.setattr(head, "KEEP", keep)
    net, (idx, lengths) = tiny(std=0.15), batch()
    want = torch.autograd.grad(net.sequence_nll(idx, lengths).sum(), list(net.parameters()))
    with torch.autocast("cpu", torch.bfloat16):
        nll = net.sequence_nll(idx, lengths)
    got = torch.autograd.grad(nll.sum(), list(net.parameters()))
    for (name, _), a, b in zip(net.named_parameters(), got, want, strict=True):
        if b.abs().max() < 1e-4:
            continue
        assert a.dtype == torch.float32 and F.cosine_similarity(a.flatten(), b.flatten(), dim=0) > 0.999, name


@pytest.mark.parametrize(("keep", "larger"), [(2**27, 1), (37 * 3, 1), (37 * 30, 8)])
def test_padding_of_the_vocabulary_changes_nothing(monkeypatch, keep, larger):
    """As on a GPU, where rows of zeros follow the head's weights: 37 tokens in 64 columns, no mass behind the 37th. And
    where more is kept than on a CPU."""
    monkeypatch.setattr(head, "KEEP", keep)
    monkeypatch.setitem(head.LARGER, "cpu", larger)
    net, base, (idx, lengths) = tiny(), tiny(seed=3), batch()
    how = dict(
        max_new_tokens=9, samples=20, generator=torch.rand(100, 9, 4, generator=torch.Generator().manual_seed(4))
    )
    how["generator"][0] = 1 - 2**-24

    def measured():
        nll, kl = net.sequence_nll(idx, lengths), net.sequence_kl(base, idx, lengths)
        with torch.no_grad():
            scored = net.sequence_nll(idx, lengths)
        grads = [g for x in (nll, kl) for g in torch.autograd.grad(x.sum(), list(net.parameters()))]
        return [nll, kl, scored, *grads, *net.generate(idx[:, :9], lengths.clamp(max=9), **how)]

    want = measured()
    monkeypatch.setitem(head.ALIGN, "cpu", 64)
    padded = head.cast_weight(net.lm_head.weight)
    assert padded.shape == (64, 16) and torch.equal(padded[:37], net.lm_head.weight) and not padded[37:].any()
    for a, b in zip(measured(), want, strict=True):
        assert max_diff(a, b) <= 1e-5 * max(1.0, b.abs().max().item())


def one_row_after_another(q, k, v, cu_seqlens, cu_seqlens_k, longest, longest_k, window_size):
    """What torch's packed attention (N, nh, hs) computes, row by row."""
    assert torch.equal(cu_seqlens, cu_seqlens_k) and cu_seqlens.dtype == torch.int32
    assert cu_seqlens.diff().max() <= longest == longest_k
    assert cu_seqlens[0] == 0 and cu_seqlens[-1] == len(q) == len(k) == len(v) and window_size == (-1, 0)
    rows = zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True)
    sides = ([x[a:b].transpose(0, 1).float() for x in (q, k, v)] for a, b in rows)
    return torch.cat([F.scaled_dot_product_attention(*s, is_causal=True).transpose(0, 1) for s in sides]).to(q.dtype)


def test_attention_over_packed_rows_is_attention_over_the_rectangle(monkeypatch):
    """Under autocast, where a GPU may have it; in fp32 the rectangle is taken."""
    net, (idx, lengths), start = tiny(std=0.15), batch(), torch.tensor([3, 1, 1, 2, 1])

    def measured():
        with torch.autocast("cpu", torch.bfloat16):
            nll = net.sequence_nll(idx, lengths, start)
        return [nll, *torch.autograd.grad(nll.sum(), list(net.parameters()))]

    want, exact, calls = measured(), net.sequence_nll(idx, lengths), []
    note = lambda *args, **kwargs: calls.append(1) or one_row_after_another(*args, **kwargs)
    monkeypatch.setattr(attention, "varlen", lambda device, width: note if width == 8 else None)
    got = measured()
    assert len(calls) == TINY.n_layer
    assert max_diff(got[0], want[0]) < 0.02
    for a, b in zip(got[1:], want[1:], strict=True):
        assert b.abs().max() < 1e-4 or F.cosine_similarity(a.flatten(), b.flatten(), dim=0) > 0.999
    assert torch.equal(net.sequence_nll(idx, lengths), exact) and len(calls) == TINY.n_layer


def test_where_attention_over_packed_rows_is_taken(monkeypatch):
    """On CUDA from sm80 on, and for widths of a head that its kernels have; they raise an error on others. And where it
    can be causal by a window: in torch 2.11 and newer."""
    varlen = pytest.importorskip("torch.nn.attention.varlen", reason="new in torch 2.10")
    found, cuda = attention.varlen.__wrapped__, torch.device("cuda")
    newer, older = (lambda q, k, v, window_size: q), (lambda q, k, v, is_causal: q)
    for capability, function, there in (((8, 0), newer, True), ((8, 0), older, False), ((7, 5), newer, False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        monkeypatch.setattr(varlen, "varlen_attn", function)
        assert [found(cuda, width) is function for width in (8, 64, 256)] == [there] * 3
        assert not any(found(cuda, width) for width in (6, 12, 264)) and found(torch.device("cpu"), 64) is None


@pytest.mark.parametrize("B", [1, 3, 5])
def test_states_of_some_rows_and_of_the_others(B):
    """One forward pass for two batches gives what two give, gradients included."""
    net, base, (idx, lengths), start = tiny(), tiny(seed=3), batch(), torch.tensor([3, 1, 1, 2, 1])
    first, others = net.read(idx, lengths, start).split(B)
    assert first.rows.max() == B - 1 and len(others.count) == 5 - B
    got = [net.nll(first)]
    want = [net.sequence_nll(idx[:B], lengths[:B], start[:B])]
    if B < 5:
        rows = idx[B:], lengths[B:], start[B:]
        got.append(net.kl(others, base, *rows))
        want.append(net.sequence_kl(base, *rows))
    for a, b in zip(got, want, strict=True):
        assert max_diff(a, b) < 1e-5
    grads = [torch.autograd.grad(sum(x.sum() for x in xs), list(net.parameters())) for xs in (got, want)]
    for a, b in zip(*grads, strict=True):
        assert max_diff(a, b) <= 1e-5 * max(1.0, b.abs().max().item())


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
    monkeypatch.setattr(head, "CHUNK", 5 * V)
    monkeypatch.setattr(head, "KEEP", 7 * V)
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

    monkeypatch.setattr(head, "KEEP", N * V)  # room enough: the probabilities are kept, which shows the measure
    with Largest() as largest:
        net.sequence_nll(idx, lengths).sum().backward()
    assert largest.numel == N * V


def test_kl_of_a_model_with_itself_is_zero():
    net, (idx, lengths) = tiny(), batch()
    assert net.sequence_kl(net, idx, lengths).abs().max() < 1e-6


@pytest.mark.parametrize("chunk", [2**23, 37 * 3, 1])
def test_kl_equals_slow_loop(monkeypatch, chunk):
    """KL(base || self), mean over scored tokens: the direction and the mask, in chunks of any size."""
    monkeypatch.setattr(head, "CHUNK", chunk)
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
    monkeypatch.setattr(head, "CHUNK", 37 * 3)
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
    monkeypatch.setattr(head, "KEEP", keep)
    net.sequence_kl(base, idx, lengths).sum().backward()
    assert all(max_diff(p.grad, w) < 1e-5 for p, w in zip(net.parameters(), want, strict=True))
    net.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        net.sequence_kl(base, idx, lengths).sum().backward()
    assert all(max_diff(p.grad, w) < 0.1 * w.abs().max() for p, w in zip(net.parameters(), want, strict=True))


@pytest.mark.parametrize("score", ["nll", "kl"])
def test_a_frozen_head_leaves_the_other_gradients_alone(score):
    net, base, (idx, lengths) = tiny(), tiny(seed=3), batch()
    value = lambda: net.sequence_nll(idx, lengths) if score == "nll" else net.sequence_kl(base, idx, lengths)
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


class Casts(TorchDispatchMode):
    """Counts conversions to another dtype, by shape."""

    def __init__(self):
        super().__init__()
        self.shapes = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket is torch.ops.aten._to_copy and out.dtype != args[0].dtype:
            self.shapes[tuple(args[0].shape)] += 1
        return out


@pytest.mark.parametrize("frozen", [False, True])
def test_generate_casts_weights_once_and_the_cache_never(monkeypatch, frozen):
    """Under autocast, of a frozen model too; and the text is that of a model whose every use casts anew."""
    net, (idx, lengths) = tiny(LONG).requires_grad_(not frozen), prompts()
    weights = Counter(tuple(p.shape) for n, p in net.named_parameters() if p.dim() == 2 and "wpe" not in n)
    how = dict(generator=torch.rand(3, 12, 4, generator=torch.Generator().manual_seed(4)), top_p=0.9)
    with torch.autocast("cpu", torch.bfloat16), Casts() as casts:
        tokens, _ = net.generate(idx, lengths, 12, **how)
    assert {shape: n for shape, n in casts.shapes.items() if shape in weights} == weights
    assert all(
        math.prod(shape) <= 3 * 20 * 4 * 32 for shape in casts.shapes.keys() - weights.keys()
    )  # the prompts' MLP
    assert not any(len(shape) >= 4 and shape[-2] > 20 for shape in casts.shapes)
    monkeypatch.setattr("model.copy.deepcopy", lambda net, memo: net)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(net.generate(idx, lengths, 12, **how)[0], tokens)


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
    tokens = torch.cat([sample(logits.expand(len(u), -1), **how, noise=u) for u in noise])
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


def test_a_draw_after_four_outside_is_fair():
    """6 rows in 100 have no luck four times. A fourth number that was used again would always draw token 1: it lies
    in the upper half."""
    logits = torch.tensor([0.26, 0.25, 0.245, 0.245]).log()
    got = drawn(logits, 100_000, top_p=0.5)
    assert max_diff(got, expected(logits, top_p=0.5)) < 4 * 0.5 / 100_000**0.5 and not got[2:].any()


class Reads(TorchDispatchMode):
    """Counts what a GPU would be waited for: numbers that are read, and choices of unknown size."""

    n = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        aten, packet = torch.ops.aten, func.overloadpacket
        chosen = packet in (aten.index, aten.index_put_, aten.index_put) and any(
            x is not None and x.dtype == torch.bool for x in args[1]
        )
        self.n += chosen or packet in (aten.nonzero, aten._local_scalar_dense, aten.equal, aten._unique2)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("top_p", "most"), [(1.0, 0), (0.9, 2), (0.1, 2)])
def test_sample_hardly_waits(top_p, most):
    logits, noise = torch.randn(300, 50), torch.rand(300, 4)
    with Reads() as reads:
        sample(logits, 0.9, 0, top_p, noise)
    assert reads.n == most


def test_sample_rows_are_independent():
    """A peaked row and a flat row in one call take different paths and get what each gets alone."""
    g = torch.Generator().manual_seed(2)
    logits = torch.randn(6, 5000, generator=g) * torch.tensor([5, 0.1, 3, 0.01, 0.5, 8])[:, None]
    noise = torch.rand(6, 4, generator=g)
    alone = [sample(logits[b : b + 1], 1.0, 0, 0.95, noise[b : b + 1]).item() for b in range(6)]
    assert sample(logits, 1.0, 0, 0.95, noise).tolist() == alone


@pytest.mark.parametrize("noise", [0.0, 1 - 2**-24])
@pytest.mark.parametrize("top_p", [0.5, 1.0])
def test_sample_at_the_ends_of_the_noise(noise, top_p):
    """Noise of 0 and the largest number below 1 draw the first and the last token of the nucleus, none outside it.

    At 0 and top_p 0.5 every draw is token 0, which is outside: the rows are sorted after all, likeliest first.
    """
    logits = torch.tensor([[0.2, 0.4, 0.1, 0.3]]).log()
    want = {0.5: 1, 1.0: 0}[top_p] if noise == 0 else 3
    assert sample(logits, 1.0, 0, top_p, torch.full((1, 4), noise)).item() == want


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
