"""loss.py against slow, literal loops of its equations, numbers worked out by hand, and the limits."""

import inspect
import itertools
import math
import random

import pytest
import torch

from configs import SETTINGS
from loss import OBJECTIVES, contrastive_perplexity, diagnose, scaled, token_mean

VARIANTS = ("paper", "released")
DISTANCES = ("abs", "signed")
SCORES = ("nll", "ppl")  # sum wants numbers of tokens: test_scaled, test_train.py
SHAPES = ((1, 1, 1), (1, 3, 2), (3, 1, 4), (2, 5, 5))  # (G, P, N)


def draw(G, P, N, seed=0):
    """Scores as lists, about where a language model's lie. pos (G, P), neg (G, N), nats per token."""
    rng = random.Random(seed)
    pos = [[rng.uniform(1.0, 3.0) for _ in range(P)] for _ in range(G)]
    return pos, [[rng.uniform(0.5, 5.0) for _ in range(N)] for _ in range(G)]


def tensors(pos, neg, dtype=torch.float64):
    """Leaf tensors of two lists of lists."""
    return (torch.tensor(side, dtype=dtype, requires_grad=True) for side in (pos, neg))


def contrast(pos, neg, score="nll", **settings):
    """The loss as train.py computes it, of phi."""
    return contrastive_perplexity(*(scaled(phi, None, score) for phi in (pos, neg)), **settings)[0]


def value(pos, neg, **settings):
    """The loss of two lists of lists as a float, computed in float64."""
    return contrast(*tensors(pos, neg), **settings).item()


def gradients(pos, neg, dtype=torch.float64, **settings):
    """(loss, d loss / d pos, d loss / d neg) of two lists of lists."""
    pos, neg = tensors(pos, neg, dtype)
    loss = contrast(pos, neg, **settings)
    loss.backward()
    return loss.detach(), pos.grad, neg.grad


def paper_loop(pos, neg, tau, alpha, distance="abs", score="nll", centroids=None):
    """- mean_i log J_i, term by term. centroids: held at these values instead of the means of the positives."""
    total = 0.0
    for i, (p, n) in enumerate(zip(pos, neg, strict=True)):
        if score == "ppl":
            p, n = [math.exp(x) for x in p], [math.exp(x) for x in n]
        c = sum(p) / len(p) if centroids is None else centroids[i]
        harmless = sum(math.exp(-abs(x - c) / tau) for x in p)
        toxic = sum(math.exp(-(x - c if distance == "signed" else abs(x - c)) / tau) for x in n)
        total += -math.log(harmless / (harmless + alpha * toxic))
    return total / len(pos)


def released_loop(pos, neg, tau, alpha):
    """The released code's loss, row by row: a similarity as a logit, one reference for the batch, multi-hot targets."""
    flat = [x for p in pos for x in p]
    ref = sum(flat) / len(flat)
    total = 0.0
    for p, n in zip(pos, neg, strict=True):
        logits = [math.exp(-abs(x - ref)) / tau for x in p] + [math.exp(-abs(x - ref)) / tau + alpha for x in n]
        targets = [1.0] * len(p) + [0.0] * len(n)
        z = sum(math.exp(v) for v in logits)
        cross_entropy = sum(-t * math.log(math.exp(v) / z) for t, v in zip(targets, logits, strict=True))
        total += cross_entropy / (len(p) + 1)
    return total / len(pos)


# --------------------------------------------------------------------------------------------------------------------
# the equations


@pytest.mark.parametrize(("G", "P", "N"), SHAPES)
def test_paper_equals_a_slow_loop(G, P, N):
    """The log-sum-exp form is the paper's ratio of sums, for each tau, alpha, distance and score."""
    for seed, (tau, alpha, distance, score) in enumerate(
        itertools.product((0.1, 0.3, 1.0, 4.0), (0.5, 1.0, 1.1, 20.0), DISTANCES, SCORES)
    ):
        if score == "ppl":
            tau = 10 * tau  # perplexities lie further apart; the loop would underflow
        pos, neg = draw(G, P, N, seed)
        got = value(pos, neg, tau=tau, alpha=alpha, distance=distance, score=score)
        want = paper_loop(pos, neg, tau, alpha, distance, score)
        assert got == pytest.approx(want, rel=1e-10, abs=1e-12), (tau, alpha, distance, score)


@pytest.mark.parametrize(("G", "P", "N"), SHAPES)
def test_released_equals_a_slow_loop(G, P, N):
    """variant='released' is the released code's loss (difference 3 of loss.py), random negatives and padding apart."""
    for seed, (tau, alpha) in enumerate(itertools.product((0.1, 0.5, 1.0, 3.0), (0.5, 1.0, 10.0, 100.0))):
        pos, neg = draw(G, P, N, seed)
        got = value(pos, neg, tau=tau, alpha=alpha, variant="released")
        assert got == pytest.approx(released_loop(pos, neg, tau, alpha), rel=1e-10), (tau, alpha)


def test_paper_by_hand():
    """pos (1, 2), neg (3.5), tau 1, alpha 2: c = 1.5, distances 0.5, 0.5 and 2.

    2 exp(-0.5) = 1.213061 of harmless resemblance, 2 exp(-2) = 0.270671 of toxic: J = 0.817574, -log J = 0.201414.
    With tau = 0.5: 2 exp(-1) = 0.735759 and 2 exp(-4) = 0.036631, J = 0.952574, -log J = 0.048587.
    """
    assert value([[1.0, 2.0]], [[3.5]], tau=1.0, alpha=2.0) == pytest.approx(0.201414, abs=1e-6)
    assert value([[1.0, 2.0]], [[3.5]], tau=0.5, alpha=2.0) == pytest.approx(0.048587, abs=1e-6)


def test_released_by_hand():
    """pos (1, 2), neg (3.5), tau 1, alpha 2: logits exp(-0.5) = 0.606531 twice, and exp(-2) + 2 = 2.135335.

    log(2 e^0.606531 + e^2.135335) = 2.495517, so that either positive costs 1.888986: 2 * 1.888986 / 3 = 1.259324.
    """
    got = value([[1.0, 2.0]], [[3.5]], tau=1.0, alpha=2.0, variant="released")
    assert got == pytest.approx(1.259324, abs=1e-6)


def test_ppl_by_hand():
    """score='ppl' measures between exp(phi): phi = log 1, log 3 and log 6 are perplexities 1, 3 and 6, so c = 2.

    Distances 1, 1 and 4; with tau 2: 2 exp(-0.5) = 1.213061 and exp(-2) = 0.135335, -log J = 0.105769.
    """
    got = value([[0.0, math.log(3)]], [[math.log(6)]], tau=2.0, alpha=1.0, score="ppl")
    assert got == pytest.approx(0.105769, abs=1e-6)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradcheck(variant, distance, score):
    """Gradients equal finite differences in float64, through the prototype as well, for every variant."""
    if variant == "released" and distance == "signed":
        with pytest.raises(ValueError, match="no signed distance"):
            value([[1.0, 2.0]], [[3.0]], variant=variant, distance=distance)
        return
    settings = dict(tau=0.7, alpha=1.3, variant=variant, distance=distance, score=score)
    pos, neg = tensors(*draw(2, 3, 4, seed=5))
    assert torch.autograd.gradcheck(lambda p, n: contrast(p, n, **settings), (pos, neg))


@pytest.mark.parametrize("distance", DISTANCES)
def test_detach_centroid(distance):
    """A held prototype changes the positives' gradients only; they equal finite differences about a constant c_i."""
    pos, neg = draw(2, 3, 4, seed=1)
    free, p_free, n_free = gradients(pos, neg, tau=0.5, distance=distance)
    held, p_held, n_held = gradients(pos, neg, tau=0.5, distance=distance, detach_centroid=True)
    assert held == free and torch.equal(n_held, n_free)
    assert (p_held - p_free).abs().max() > 0.01

    centroids, h = [sum(p) / len(p) for p in pos], 1e-6
    for g, k in itertools.product(range(2), range(3)):
        ends = []
        for step in (h, -h):
            moved = [list(p) for p in pos]
            moved[g][k] += step
            ends.append(paper_loop(moved, neg, 0.5, 1.0, distance, centroids=centroids))
        assert p_held[g, k].item() == pytest.approx((ends[0] - ends[1]) / (2 * h), abs=1e-7)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("P", [2, 5])
def test_leave_one_out(variant, P):
    """Each positive's distance is that from the mean of the others, term by term; negatives' from the mean of all."""
    pos, neg = draw(2, P, 4, seed=1)
    want, flat = 0.0, [x for side in pos for x in side]
    for p, n in zip(pos, neg, strict=True):
        every = flat if variant == "released" else p
        c = sum(every) / len(every)
        near = [abs(x - (sum(every) - x) / (len(every) - 1)) for x in p]
        far = [abs(x - c) for x in n]
        if variant == "paper":
            a, b = (sum(math.exp(-d / 0.5) for d in side) for side in (near, far))
            want -= math.log(a / (a + 1.2 * b)) / 2
        else:
            logits = [math.exp(-d) / 0.5 for d in near] + [math.exp(-d) / 0.5 + 1.2 for d in far]
            norm = math.log(sum(math.exp(x) for x in logits))
            want -= sum(x - norm for x in logits[:P]) / (P + 1) / 2
    assert value(pos, neg, tau=0.5, alpha=1.2, variant=variant, leave_one_out=True) == pytest.approx(want, abs=1e-9)
    with pytest.raises(ValueError, match="leave_one_out .*P must be at least 2"):
        value([[1.0]], [[2.0]], leave_one_out=True)


def test_detach_centroid_in_the_released_variant():
    """There as well: the same loss and negatives' gradients, other ones for the positives."""
    pos, neg = draw(2, 3, 4, seed=1)
    free, p_free, n_free = gradients(pos, neg, variant="released")
    held, p_held, n_held = gradients(pos, neg, variant="released", detach_centroid=True)
    assert held == free and torch.equal(n_held, n_free)
    assert (p_held - p_free).abs().max() > 1e-3


def test_released_gradient_forgets_alpha():
    """From alpha about 10 on, the released gradient is the same to 3 digits, while the loss grows by P/(P+1) * 90."""
    pos, neg = draw(3, 5, 5, seed=2)
    ten, p_ten, n_ten = gradients(pos, neg, alpha=10.0, variant="released")
    hundred, p_hundred, n_hundred = gradients(pos, neg, alpha=100.0, variant="released")
    for a, b in ((p_ten, p_hundred), (n_ten, n_hundred)):
        assert (a - b).abs().max() < 1e-3 * b.abs().max()
    assert (hundred - ten).item() == pytest.approx(5 / 6 * 90, rel=1e-3)


# --------------------------------------------------------------------------------------------------------------------
# limits


@pytest.mark.parametrize(("P", "N", "alpha", "tau"), [(1, 1, 1.0, 1.0), (5, 5, 1.1, 0.3), (2, 7, 3.0, 0.01)])
def test_identical_scores(P, N, alpha, tau):
    """Nothing to tell apart: J = P / (P + alpha N), whatever tau, distance and score."""
    for distance, score in itertools.product(DISTANCES, SCORES):
        got = value([[2.5] * P], [[2.5] * N], tau=tau, alpha=alpha, distance=distance, score=score)
        assert got == pytest.approx(math.log(1 + alpha * N / P), rel=1e-12)


def test_one_far_negative():
    """A negative 1e4 nats away is out of sight: loss near 0, nothing pulls at it, nothing overflows (float32)."""
    for distance in DISTANCES:
        loss, p, n = gradients([[1.0, 1.2, 1.1]], [[1e4]], torch.float32, tau=0.3, distance=distance)
        assert 0 <= loss < 1e-6
        assert n.item() == 0 and torch.isfinite(p).all() and p.abs().max() < 1e-6


def test_all_distances_huge():
    """Positives and negatives all 1e4 from the prototype, float32: exp(-1e4) is 0 there, the loss still log 2.

    The form sum / sum would be 0 / 0. Three positives at 0, three at 2e4: c = 1e4, and six negatives at 0 or 2e4.
    """
    scores = [[0.0] * 3 + [2e4] * 3]
    loss, p, n = gradients(scores, scores, torch.float32)
    assert loss.item() == pytest.approx(math.log(2), rel=1e-6)
    assert torch.isfinite(p).all() and torch.isfinite(n).all()
    loss, p, n = gradients(scores, scores, torch.float32, variant="released")
    assert torch.isfinite(loss) and torch.isfinite(p).all() and torch.isfinite(n).all()


def test_far_below_with_signed_distance():
    """A negative 1e4 nats below costs 1e4 / tau (signed) with gradient -1 / tau, and no overflow in float32."""
    loss, _, n = gradients([[1e4]], [[0.0]], torch.float32, tau=0.5, distance="signed")
    assert loss.item() == pytest.approx(2e4, rel=1e-6)
    assert n.item() == pytest.approx(-2.0)


def test_tiny_tau():
    """tau = 1e-3, float32: only the nearest count, d / tau up to thousands of nats. pos (1, 2), c = 1.5.

    Negative at 1.4: log-resemblances -0.1 / tau = -100 against -500 + log 2, loss 400 - log 2. At 4.5: loss 0.
    """
    loss, p, n = gradients([[1.0, 2.0]], [[1.4]], torch.float32, tau=1e-3)
    assert loss.item() == pytest.approx(400 - math.log(2), rel=1e-5)
    assert torch.isfinite(p).all() and n.item() == pytest.approx(1000, rel=1e-5)  # pushed down, off the centroid
    loss, p, n = gradients([[1.0, 2.0]], [[4.5]], torch.float32, tau=1e-3)
    assert loss.item() == 0 and not p.any() and not n.any()


def test_huge_tau():
    """tau = 1e3: everything resembles everything, so the loss tends to log(1 + alpha N / P), from above or below."""
    pos, neg = draw(2, 5, 5)
    loss, p, n = gradients(pos, neg, torch.float32, tau=1e3, alpha=1.1)
    assert loss.item() == pytest.approx(math.log(2.1), abs=2e-3)
    assert 0 < p.abs().max() < 1e-3 and 0 < n.abs().max() < 1e-3


def test_one_positive():
    """P = 1: the positive is its own prototype, at distance 0. L = log(1 + alpha sum exp(-|n - p| / tau))."""
    neg = [1.5, 2.6, 4.0]
    want = math.log(1 + 1.1 * sum(math.exp(-abs(x - 2.0) / 0.4) for x in neg))
    loss, p, n = gradients([[2.0]], [neg], tau=0.4, alpha=1.1)
    assert loss.item() == pytest.approx(want, rel=1e-12)
    assert p.item() == pytest.approx(-n.sum().item(), rel=1e-12)  # it moves by its prototype alone


# --------------------------------------------------------------------------------------------------------------------
# what must not matter


@pytest.mark.parametrize("variant", VARIANTS)
def test_order_does_not_matter(variant):
    """The same loss for groups in another order, and for sentences in another order within their group."""
    pos, neg = draw(4, 3, 5, seed=3)
    want = value(pos, neg, tau=0.4, variant=variant)
    assert value(pos[::-1], neg[::-1], tau=0.4, variant=variant) == pytest.approx(want, rel=1e-12)
    turned = [p[1:] + p[:1] for p in pos], [n[::-1] for n in neg]
    assert value(*turned, tau=0.4, variant=variant) == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("distance", DISTANCES)
def test_common_shift_does_not_matter(distance):
    """Only differences within a group count (difference 6: hence the anchors), so gradients sum to 0."""
    pos, neg = draw(3, 3, 5, seed=4)
    want = value(pos, neg, tau=0.4, distance=distance)
    shifts = (0.7, -11.0, 100.0)
    moved = [[[x + s for x in row] for row, s in zip(side, shifts, strict=True)] for side in (pos, neg)]
    assert value(*moved, tau=0.4, distance=distance) == pytest.approx(want, rel=1e-10)
    _, p, n = gradients(pos, neg, tau=0.4, distance=distance)
    torch.testing.assert_close(p.sum(1) + n.sum(1), torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-12)


def test_paper_does_not_mix_groups():
    """The loss of a batch is the mean of its groups' losses alone, which are the diagnostics' 'loss'."""
    pos, neg = draw(4, 3, 5, seed=6)
    alone = [value([p], [n], tau=0.4) for p, n in zip(pos, neg, strict=True)]
    loss, diagnostics = contrastive_perplexity(*tensors(pos, neg), tau=0.4)
    assert loss.item() == pytest.approx(sum(alone) / 4, rel=1e-12)
    assert diagnostics["loss"].tolist() == pytest.approx(alone, rel=1e-12)


def test_released_mixes_groups():
    """There the prototype is the whole batch's, so the loss of a group depends on the company: 0.1 and more here.

    Where all groups have one mean score, the two agree.
    """
    pos, neg = [[1.0, 1.2], [3.0, 3.4]], [[2.0, 2.5], [3.1, 5.0]]
    settings = dict(tau=0.4, alpha=1.0, variant="released")
    alone = [value([p], [n], **settings) for p, n in zip(pos, neg, strict=True)]
    assert abs(value(pos, neg, **settings) - sum(alone) / 2) > 0.1
    pos = [[2.0, 2.4], [1.4, 3.0]]
    alone = [value([p], [n], **settings) for p, n in zip(pos, neg, strict=True)]
    assert value(pos, neg, **settings) == pytest.approx(sum(alone) / 2, rel=1e-12)


@pytest.mark.parametrize("k", [2, 3, 6])
def test_gradient_accumulation(k):
    """k micro-batches of G / k groups, each loss times 1 / k: the same loss and the same gradients as one batch."""
    pos, neg = draw(6, 3, 5, seed=7)
    whole, p_whole, n_whole = gradients(pos, neg, tau=0.4)
    p, n = tensors(pos, neg)
    total = 0.0
    for rows in range(0, 6, 6 // k):
        part = slice(rows, rows + 6 // k)
        loss = contrastive_perplexity(p[part], n[part], tau=0.4)[0] / k
        loss.backward()
        total += loss.item()
    assert total == pytest.approx(whole.item(), rel=1e-12)
    torch.testing.assert_close(p.grad, p_whole, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(n.grad, n_whole, rtol=1e-12, atol=1e-15)


# --------------------------------------------------------------------------------------------------------------------
# directions


def test_where_negatives_are_pushed():
    """A step goes against the gradient: 'abs' pushes a negative below the centroid further down (difference 4).

    'signed' pushes it up. A negative above the centroid goes up with both.
    """
    pos, neg = [[2.0, 2.4]], [[1.8, 3.0]]  # c = 2.2: one negative below, one above
    _, _, n_abs = gradients(pos, neg, tau=0.5)
    _, _, n_signed = gradients(pos, neg, tau=0.5, distance="signed")
    assert n_abs[0, 0] > 0.1 and n_abs[0, 1] < -0.1
    assert n_signed[0, 0] < -0.1 and n_signed[0, 1] < -0.1


@pytest.mark.parametrize("variant", VARIANTS)
def test_positives_gather(variant):
    """With a held prototype either positive is pulled to it: the lower one up, the upper one down."""
    _, p, _ = gradients([[1.0, 3.0]], [[2.2, 2.5]], tau=0.5, variant=variant, detach_centroid=True)
    assert p[0, 0] < -0.01 and p[0, 1] > 0.01


# --------------------------------------------------------------------------------------------------------------------
# diagnostics, refusals, language modelling


def test_diagnostics_by_hand():
    """pos (1, 2, 3), neg (1.5, 4, 2.5): c = 2, 6 of 9 pairs right, one of three negatives below. A tie is wrong."""
    pos, neg = tensors([[1.0, 2.0, 3.0], [5.0, 5.0, 5.0]], [[1.5, 4.0, 2.5], [5.0, 5.0, 3.0]])
    want = dict(
        centroid=[2, 5],
        spread=[2 / 3, 0],
        separation=[1, 2 / 3],
        signed_gap=[2 / 3, -2 / 3],
        rank_accuracy=[2 / 3, 0],
        below=[1 / 3, 1 / 3],
    )
    got = diagnose(pos, neg)
    assert set(got) == set(want)
    for name, numbers in want.items():
        assert got[name].tolist() == pytest.approx(numbers, abs=1e-7), name


@pytest.mark.parametrize("variant", VARIANTS)
def test_diagnostics_come_with_the_loss(variant):
    """Detached, one number per group, the loss of each group among them."""
    pos, neg = tensors(*draw(3, 2, 4, seed=8))
    loss, diagnostics = contrastive_perplexity(pos, neg, variant=variant)
    assert loss.shape == () and loss.requires_grad
    assert set(diagnostics) == {*diagnose(pos, neg), "loss"}
    for name, numbers in diagnostics.items():
        assert numbers.shape == (3,) and not numbers.requires_grad, name
    assert diagnostics["loss"].mean().item() == pytest.approx(loss.item(), rel=1e-12)
    assert torch.equal(diagnostics["centroid"], pos.detach().mean(1))


@pytest.mark.parametrize(
    ("pos", "neg"),
    [((3,), (3,)), ((2, 3), (3, 3)), ((2, 0), (2, 3)), ((2, 3), (2, 0)), ((0, 3), (0, 3)), ((2, 3, 1), (2, 3))],
)
def test_bad_shapes(pos, neg):
    """Scores that are not (G, P) and (G, N), with at least one of each, are refused; both shapes are named."""
    with pytest.raises(ValueError, match=r"scores must be \(G, P\) and \(G, N\), got") as e:
        contrastive_perplexity(torch.zeros(pos), torch.zeros(neg))
    assert str(pos) in str(e.value) and str(neg) in str(e.value)


@pytest.mark.parametrize(
    "settings",
    [dict(tau=0.0), dict(tau=-1.0), dict(tau=math.nan), dict(alpha=0.0), dict(alpha=-1.0), dict(alpha=math.nan)],
)
def test_bad_numbers(settings):
    """tau and alpha must be > 0, in either variant; the number is named."""
    for variant in VARIANTS:
        with pytest.raises(ValueError, match=f"must be > 0, got .*={next(iter(settings.values()))}"):
            contrastive_perplexity(torch.zeros(1, 2), torch.zeros(1, 2), variant=variant, **settings)


@pytest.mark.parametrize("function", [contrastive_perplexity, *OBJECTIVES.values()], ids=lambda f: f.__name__)
def test_one_default(function):
    """A loss called by hand is the loss that train.py computes: tau was 0.3 in a config and 1.0 here for a while. And
    all arguments are scores or settings of the objective, so that train.py has them."""
    arguments = inspect.signature(function).parameters
    assert list(arguments)[:2] == ["pos", "neg"]
    for name in arguments.keys() - {"pos", "neg", "base_pos", "base_neg"}:
        assert SETTINGS[name].metadata["group"] == "the objective", name
        if function is not OBJECTIVES["cp"]:  # which has no defaults of its own
            default = arguments[name].default
            assert default == SETTINGS[name].default and type(default) is SETTINGS[name].type, name


@pytest.mark.parametrize("name", ["variant", "distance"])
def test_unknown_words(name):
    """A word that is none of the known ones is refused, with the known ones."""
    with pytest.raises(ValueError, match=f"{name} must be one of .*, got 'papr'"):
        contrastive_perplexity(torch.zeros(1, 2), torch.zeros(1, 2), **{name: "papr"})


def test_scaled():
    """phi = 0.5 nats of 4 tokens: itself, e^0.5 = 1.648721, and 2 nats of the whole sentence."""
    phi, tokens = torch.tensor([0.5, 1.0]), torch.tensor([4, 3])
    for score, want in dict(nll=[0.5, 1.0], ppl=[1.648721, math.e], sum=[2.0, 3.0]).items():
        assert scaled(phi, tokens, score).tolist() == pytest.approx(want, rel=1e-6)
    assert set(SETTINGS["score"].metadata["among"]) == {"nll", "ppl", "sum"}
    with pytest.raises(ValueError, match="score must be one of nll, ppl, sum, got 'mean'"):
        scaled(phi, tokens, "mean")


def test_token_mean():
    """The mean over tokens, not over documents: (3 * 1 + 1 * 3) / 4 = 1.5, with gradients tokens / all tokens."""
    nll = torch.tensor([1.0, 3.0], requires_grad=True)
    loss = token_mean(nll, torch.tensor([3, 1]))
    loss.backward()
    assert loss.item() == 1.5 and nll.grad.tolist() == [0.75, 0.25]


# --------------------------------------------------------------------------------------------------------------------
# rivals: p and n are the scores of one pair, bp and bn those of the base


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def log_odds(score):
    likelihood = math.exp(-score)
    return math.log(likelihood / (1 - likelihood))


def dpo_pair(p, n, bp, bn, beta):
    """From the ratios of probabilities, as the paper writes it."""
    ratio = lambda x, b: math.log(math.exp(-x) / math.exp(-b))
    return -math.log(sigmoid(beta * ratio(p, bp) - beta * ratio(n, bn)))


def dpop_pair(p, n, bp, bn, beta, penalty):
    ratio = lambda x, b: math.log(math.exp(-x) / math.exp(-b))
    charge = penalty * max(0.0, math.log(math.exp(-bp) / math.exp(-p)))
    return -math.log(sigmoid(beta * (ratio(p, bp) - ratio(n, bn) - charge)))


def nca_pair(p, n, bp, bn, beta):
    chosen, rejected = beta * (bp - p), beta * (bn - n)
    return -math.log(sigmoid(chosen)) - 0.5 * math.log(sigmoid(-chosen)) - 0.5 * math.log(sigmoid(-rejected))


def simpo_pair(p, n, bp, bn, beta, margin):
    gamma = beta * margin
    return -math.log(sigmoid(beta * -p - beta * -n - gamma))


SIZES = dict(beta=1.7, margin=0.6, penalty=3.0, alpha=0.7)  # none of them a default
PAIRS = {  # name: the loss of a pair
    "dpo": dpo_pair,
    "ipo": lambda p, n, bp, bn, beta: ((bp - p) - (bn - n) - 1 / (2 * beta)) ** 2,
    "dpop": dpop_pair,
    "nca": nca_pair,
    "simpo": simpo_pair,
    "cpo": lambda p, n, bp, bn, beta: -math.log(sigmoid(beta * -p - beta * -n)),
    "orpo": lambda p, n, bp, bn: -math.log(sigmoid(log_odds(p) - log_odds(n))),
    "margin": lambda p, n, bp, bn, margin: max(0.0, margin - (n - p)),
    "positive_only": lambda p, n, bp, bn: p,
    "toxic_only": lambda p, n, bp, bn: n,
    "negative_only": lambda p, n, bp, bn: -n,
}
RIVALS = [name for name in OBJECTIVES if name != "cp"]


def settings_of(name):
    return {k: v for k, v in SIZES.items() if k in inspect.signature(OBJECTIVES[name]).parameters}


def kto_loop(pos, neg, base_pos, base_neg, beta, alpha, still=None):
    """Sentence by sentence. still: (pos, neg) of which the estimate of KL is, since no gradient goes through it."""
    total = 0.0
    for i in range(len(pos)):
        p, n = still[0][i] if still else pos[i], still[1][i] if still else neg[i]
        moved = [b - x for x, b in zip([*p, *n], [*base_pos[i], *base_neg[i]], strict=True)]
        z = max(0.0, sum(moved) / len(moved))
        values = [1 - sigmoid(beta * ((b - x) - z)) for x, b in zip(pos[i], base_pos[i], strict=True)]
        values += [alpha * (1 - sigmoid(beta * (z - (b - x)))) for x, b in zip(neg[i], base_neg[i], strict=True)]
        total += sum(values) / len(values)
    return total / len(pos)


def rival_loop(name, pos, neg, base_pos, base_neg, still=None):
    """The mean over groups of the mean over all pairs of a group, one after the other."""
    if name == "kto":
        return kto_loop(pos, neg, base_pos, base_neg, **settings_of(name), still=still)
    total, settings = 0.0, settings_of(name)
    for p_row, n_row, bp_row, bn_row in zip(pos, neg, base_pos, base_neg, strict=True):
        pairs = itertools.product(zip(p_row, bp_row, strict=True), zip(n_row, bn_row, strict=True))
        values = [PAIRS[name](p, n, bp, bn, **settings) for (p, bp), (n, bn) in pairs]
        total += sum(values) / len(values)
    return total / len(pos)


def rival(name, pos, neg, base_pos, base_neg, **settings):
    """An objective, of tensors or lists, with the base's scores if it wants them."""
    given = dict(zip(("pos", "neg", "base_pos", "base_neg"), (pos, neg, base_pos, base_neg), strict=True))
    wanted = inspect.signature(OBJECTIVES[name]).parameters
    as_tensor = lambda x: x if isinstance(x, torch.Tensor) else torch.tensor(x, dtype=torch.float64)
    return OBJECTIVES[name](**{k: as_tensor(x) for k, x in given.items() if k in wanted}, **settings)


def draw_rivals(G, P, N, seed=0):
    """Scores of a model and of its base, from which it has moved up and down."""
    pos, neg = draw(G, P, N, seed)
    rng = random.Random(f"base {seed}")
    return pos, neg, *([[x + rng.uniform(-0.6, 0.9) for x in row] for row in side] for side in (pos, neg))


def test_all_rivals_have_a_reference():
    assert set(RIVALS) == {*PAIRS, "kto"}


@pytest.mark.parametrize("name", RIVALS)
@pytest.mark.parametrize(("G", "P", "N"), SHAPES)
def test_a_rival_equals_a_slow_loop(name, G, P, N):
    """Value, and gradients against finite differences of the loop, entry by entry."""
    for seed in range(2):
        scores = draw_rivals(G, P, N, seed)
        pos, neg = tensors(*scores[:2])
        loss = rival(name, pos, neg, *scores[2:], **settings_of(name))
        assert loss.item() == pytest.approx(rival_loop(name, *scores), rel=1e-10, abs=1e-12)
        got, h = torch.autograd.grad(loss, (pos, neg), allow_unused=True, materialize_grads=True), 1e-5
        for side in (0, 1):
            for g, k in itertools.product(range(G), range((P, N)[side])):
                ends = []
                for step in (h, -h):
                    moved = [[list(row) for row in s] for s in scores]
                    moved[side][g][k] += step
                    ends.append(rival_loop(name, *moved, still=scores[:2]))
                assert got[side][g, k].item() == pytest.approx((ends[0] - ends[1]) / (2 * h), abs=1e-6), (side, g, k)


def test_kto_has_groups_on_both_sides_of_zero():
    """The estimate of KL is cut at 0: the draws above hold groups with either sign, or the cut would not be tested."""
    signs = set()
    for seed, shape in itertools.product(range(2), SHAPES):
        pos, neg, base_pos, base_neg = (torch.tensor(s) for s in draw_rivals(*shape, seed))
        signs |= set(torch.cat([base_pos - pos, base_neg - neg], 1).mean(1).sign().tolist())
    assert signs == {1.0, -1.0}


@pytest.mark.parametrize(
    ("name", "settings", "want"),
    [
        ("dpo", dict(beta=2.0), 0.513015),  # log(1 + e^-0.4)
        ("ipo", dict(beta=2.0), 0.0025),  # (0.2 - 0.25)^2
        ("dpop", dict(beta=2.0, penalty=5.0), 1.037488),  # the positive fell by 0.1: log(1 + e^-(2 (0.2 - 0.5)))
        ("nca", dict(beta=2.0), 1.315952),  # log(1 + e^0.2) + log(1 + e^-0.2) / 2 + log(1 + e^-0.6) / 2
        ("kto", dict(beta=2.0, alpha=0.5), 0.363503),  # z = 0: (0.549834 + 0.5 * 0.354344) / 2
        ("simpo", dict(beta=2.0, margin=0.3), 0.513015),  # log(1 + e^-(2 (0.5 - 0.3)))
        ("cpo", dict(beta=2.0), 0.313262),  # log(1 + e^-1)
        ("orpo", {}, 0.424359),  # odds 0.374631 and 0.198034: log(1 + 0.198034 / 0.374631)
        ("margin", dict(margin=0.8), 0.3),
        ("positive_only", {}, 1.3),
        ("toxic_only", {}, 1.8),
        ("negative_only", {}, -1.8),
    ],
)
def test_a_rival_by_hand(name, settings, want):
    """Positive 1.3 (base 1.2), negative 1.8 (base 1.5): gap 0.5, u = -0.1 and -0.3, gap of u 0.2."""
    got = rival(name, [[1.3]], [[1.8]], [[1.2]], [[1.5]], **settings).item()
    assert got == pytest.approx(want, abs=1e-6)


@pytest.mark.parametrize(
    ("name", "want"),
    [("dpo", math.log(2)), ("dpop", math.log(2)), ("nca", 2 * math.log(2)), ("kto", 0.5), ("ipo", 1 / 16)],
)
def test_first_loss_of_those_that_have_a_base(name, want):
    """Model = base: nothing has moved, so the loss is the same whatever the scores."""
    pos, neg = draw(2, 3, 4)
    assert rival(name, pos, neg, pos, neg).item() == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("name", RIVALS)
def test_where_a_rival_begins_to_pull(name):
    """At the base, positives become likelier and negatives less likely, if anything; a gap is closed by either. But
    toxic_only pulls the other way: it is what an edit goes away from."""
    pos, neg = tensors([[2.0, 2.4]], [[2.1, 2.3]])
    loss = rival(name, pos, neg, pos.detach(), neg.detach())
    p, n = torch.autograd.grad(loss, (pos, neg), allow_unused=True, materialize_grads=True)
    assert (p > 0).all() if name not in ("negative_only", "toxic_only") else not p.any()
    assert (n > 0).all() if name == "toxic_only" else not n.any() if name == "positive_only" else (n < 0).all()


@pytest.mark.parametrize("name", RIVALS)
def test_a_rival_stays_finite(name):
    """Scores 1e4 apart, either way, in float32: no overflow in loss or gradient."""
    for p, n in ((1.0, 1e4), (1e4, 1.0)):
        pos, neg = tensors([[p]], [[n]], torch.float32)
        loss = rival(name, pos, neg, torch.ones(1, 1), torch.ones(1, 1))
        grads = torch.autograd.grad(loss, (pos, neg), allow_unused=True, materialize_grads=True)
        assert all(torch.isfinite(x).all() for x in (loss, *grads))


@pytest.mark.parametrize("name", RIVALS)
def test_a_rival_does_not_mix_groups(name):
    """The loss of a batch is the mean of its groups' losses: a step does not depend on how it is cut into batches."""
    scores = draw_rivals(4, 2, 3, seed=9)
    alone = [rival(name, *([row] for row in rows)).item() for rows in zip(*scores, strict=True)]
    assert rival(name, *scores).item() == pytest.approx(sum(alone) / 4, rel=1e-12)


@pytest.mark.parametrize("name", [n for n in RIVALS if not n.endswith("_only") and n not in ("kto", "nca")])
def test_pairs_of_other_groups_are_refused(name):
    """Scores of 2 and of 3 groups make no pairs; of 1 and 3 they would, silently."""
    for G in (2, 1):
        with pytest.raises(ValueError, match=r"scores must be \(G, P\) and \(G, N\), got"):
            rival(name, *(torch.ones(g, 2) for g in (G, 3, G, 3)))
