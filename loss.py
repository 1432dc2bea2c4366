"""Every objective, as a pure function of sentence scores: no model, no files. Anchors: train.py.

The paper's method comes first. Its rivals stand below it; OBJECTIVES, at the end, lists all with their sources.

Contrastive perplexity (Klein & Nabi, ACL 2025, arXiv 2401.08491) in a dozen lines. Group i holds harmless sentences
P_i and toxic ones N_i that say the same thing. A sentence's score is its log-perplexity under the model,

    phi(x) = -(1/n) sum_k log p(x_k | x_<k),            in nats per token; PPL(x) = exp(phi(x)).

The harmless ones share a centroid (in the paper: prototype), their mean score. A sentence resembles it if it lies near:

    c_i = mean of phi(x) over x in P_i,                 s(x, c) = exp(-|phi(x) - c| / tau).

Of all the similarity to the centroid in a group, the harmless sentences are to have the whole (J = 1):

    J_i = sum_{P_i} s(x, c_i) / (sum_{P_i} s(x, c_i) + alpha sum_{N_i} s(x, c_i)),      L = -mean_i log J_i.

With a_i = log sum_{P_i} s and b_i = log alpha + log sum_{N_i} s this is L = mean_i softplus(b_i - a_i), and both are
log-sum-exps of -|phi - c| / tau: that form is what is computed, since it neither over- nor underflows.

Differences from the paper (Eq. 1 to 6), and from the code released with it:

1. The paper's score is the perplexity itself, exp(phi) (Eq. 1): 'ppl' of `scaled`. Here it is its logarithm, as in the
   released code: a GPT-2's perplexities of sentences lie in the hundreds, where exp(-|difference|) is 0 for nearly all.
2. The paper's s(x, c) is (1/tau) exp(-|phi - c|) (Eq. 4). That tau cancels in J; here it divides the distance. Beyond
   a distance of tau * log(alpha |N| / |P|) the pull on a negative fades as exp(-distance / tau).
3. The released code, variant='released': exp(-|phi - ref|) / tau is a *logit*, so logits lie between 0 and 1/tau; alpha
   is added to those of negatives, a factor e^alpha (by default e^100; from e^10 on the gradient hardly depends on it);
   ref is the mean over the positives of the whole micro-batch; the cross-entropy, summed over all positives as targets,
   is divided by |P| + 1 + R, where R counts toxic sentences of other groups (here they are among N, and R is 0). It
   also averages over padding; that is not reproduced.
4. |phi - c| has two sides: a negative that starts *below* the centroid is pushed further down, and toxic text becomes
   more likely. Watch `signed_gap`. distance='signed' is the alternative: a negative's distance is phi - c without the
   bars, so that every negative is pushed up. (Positives keep the bars: they gather round c.)
5. c_i carries gradient: negatives move it as well, and with it all positives. detach_centroid=True cuts that path.
6. Nothing in J keeps the model a language model. A common shift of all scores is free, since the centroid shifts along,
   and no negative is ever unlikely enough. The anchors of train.py, which are not in the paper, hold it. On the
   positives: nll_weight, their mean phi, which also teaches their style; or hold_weight, the mean of (phi - phi of the
   frozen base)^2, which keeps every c_i where the base has it, so that only the negatives move. On harmless texts that
   the base has written itself, since the positives are short and of one kind: anchor_nll, their nll per token, and
   anchor_kl, KL from the base.
"""

import math

import torch
from torch.nn import functional as F


def contrastive_perplexity(
    pos, neg, tau=1.0, alpha=1.0, variant="paper", distance="abs", detach_centroid=False, leave_one_out=False
):
    """Contrastive perplexity of G groups.

    Args:
        pos: scores phi of the positives, nats per token, or others (`scaled`). Shape: (G, P)
        neg: scores phi of the negatives. Shape: (G, N)
        tau: temperature, in units of the score; > 0.
        alpha: weight of the negatives, a factor for 'paper', added to a logit for 'released'; > 0.
        variant: 'paper' (module docstring) or 'released' (difference 3).
        distance: 'abs', or 'signed' for the negatives (difference 4).
        detach_centroid: no gradient through the centroid (difference 5).
        leave_one_out: a positive's distance is that from the mean of the *other* positives, which is P / (P - 1) times
            its distance from the mean of all: positives gather more closely, nothing else changes. P > 1.

    Returns:
        (loss, diagnostics): a scalar, the mean over groups, and a dict of detached (G,) tensors, see `diagnose`, with
        the loss of each group as 'loss'.

    Raises:
        ValueError: on misshapen scores or settings outside their range.
    """
    _check(pos, neg, tau, alpha, variant, distance)
    if leave_one_out and pos.size(1) < 2:
        raise ValueError("leave_one_out compares a positive with the others of its group: P must be at least 2")
    centroid = pos.mean() if variant == "released" else pos.mean(1, keepdim=True)  # scalar, or (G, 1)
    if detach_centroid:
        centroid = centroid.detach()
    d_pos = (pos - centroid).abs()  # (G, P)
    if leave_one_out:
        n = pos.numel() if variant == "released" else pos.size(1)
        d_pos = d_pos * (n / (n - 1))
    d_neg = neg - centroid if distance == "signed" else (neg - centroid).abs()  # (G, N)

    if variant == "paper":
        a = torch.logsumexp(-d_pos / tau, dim=1)  # log sum_P s(x, c_i)           (G,)
        b = torch.logsumexp(-d_neg / tau, dim=1) + math.log(alpha)  # log alpha sum_N s(x, c_i)     (G,)
        losses = -F.logsigmoid(a - b)  # -log J_i
    else:
        logits = torch.cat([torch.exp(-d_pos) / tau, torch.exp(-d_neg) / tau + alpha], dim=1)  # (G, P + N)
        losses = -logits.log_softmax(1)[:, : pos.size(1)].sum(1) / (pos.size(1) + 1)
    return losses.mean(), diagnose(pos, neg) | {"loss": losses.detach()}


def _check_shapes(pos, neg):
    if pos.dim() != 2 or neg.dim() != 2 or len(pos) != len(neg) or not pos.numel() or not neg.numel():
        raise ValueError(f"scores must be (G, P) and (G, N), got {tuple(pos.shape)} and {tuple(neg.shape)}")


def _check(pos, neg, tau, alpha, variant, distance):
    _check_shapes(pos, neg)
    if not (tau > 0 and alpha > 0):
        raise ValueError(f"tau and alpha must be > 0, got tau={tau}, alpha={alpha}")
    for name, value, known in (("variant", variant, ("paper", "released")), ("distance", distance, ("abs", "signed"))):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
    if variant == "released" and distance == "signed":
        raise ValueError("variant='released' has no signed distance: its exp(-d) would overflow")


def diagnose(pos, neg):
    """What the scores of each group look like. pos (G, P), neg (G, N) -> dict of detached (G,) tensors.

    centroid        mean phi of the positives, c_i
    spread          mean |phi - c_i| of the positives
    separation      mean |phi - c_i| of the negatives
    signed_gap      mean phi of the negatives minus c_i: below 0, toxic text is the *likelier* one
    rank_accuracy   share of (positive, negative) pairs with phi(positive) < phi(negative)
    below           share of the negatives below c_i, which distance='abs' pushes the wrong way
    """
    pos, neg = pos.detach(), neg.detach()
    centroid = pos.mean(1, keepdim=True)
    return {
        "centroid": centroid[:, 0],
        "spread": (pos - centroid).abs().mean(1),
        "separation": (neg - centroid).abs().mean(1),
        "signed_gap": (neg - centroid).mean(1),
        "rank_accuracy": (pos[:, :, None] < neg[:, None, :]).float().mean((1, 2)),
        "below": (neg < centroid).float().mean(1),
    }


def scaled(phi, tokens, score):
    """What the objectives see of phi (B,), nats per token, of sentences of `tokens` (B,) scored tokens -> (B,).

    'nll': phi. 'ppl': exp(phi), as in the paper (difference 1); it overflows at phi = 88. 'sum': phi * tokens, nats of
    the whole sentence, as in DPO: there temperatures and gaps are about a sentence's length larger, and beta smaller.
    """
    if score not in ("nll", "ppl", "sum"):
        raise ValueError(f"score must be one of nll, ppl, sum, got {score!r}")
    return phi if score == "nll" else phi.exp() if score == "ppl" else phi * tokens


def token_mean(means, tokens):
    """Mean over all tokens of rows, from their means per token (B,) and numbers of tokens (B,) -> (). Of nll it is the
    next-token loss of language modelling."""
    return (means * tokens).sum() / tokens.sum()


# ---- rivals --------------------------------------------------------------------------------------------------------
# Each takes scores pos (G, P) and neg (G, N), those of the frozen base where it compares with it, and gives a scalar:
# the mean over groups, and where it compares pairs, over all P x N of a group. A score is a negative log-probability.
# Against the base a sentence has u = base - score, its log-probability minus that under the base. `gap` is
# score(negative) - score(positive), and `gap of u` is u(positive) - u(negative), both of a pair: a good model has them
# large.
#
# beta is 1 / (the gap at which the pull fades). A gap of mean nlls is a sentence's length smaller than one of sums, so
# beta is as much larger: --score=sum --beta=0.1 --nll_weight=0 is DPO as published, --score=nll --beta=2 its form per
# token. With a beta of 0.1 on means the pull hardly fades, which wrecks the model. nll_weight, on by default, adds the
# positives' nll.


def _gaps(pos, neg):
    """gap of every pair. pos (G, P), neg (G, N) -> (G, P, N)."""
    _check_shapes(pos, neg)
    return neg[:, None, :] - pos[:, :, None]


def cp(pos, neg, tau, alpha, variant, distance, detach_centroid, leave_one_out):
    """The loss of `contrastive_perplexity` without the diagnostics."""
    return contrastive_perplexity(pos, neg, tau, alpha, variant, distance, detach_centroid, leave_one_out)[0]


def dpo(pos, neg, base_pos, base_neg, beta=2.0):
    """-log sigmoid(beta * gap of u), Eq. 7. log 2 as long as the model is the base."""
    return -F.logsigmoid(beta * _gaps(pos - base_pos, neg - base_neg)).mean()


def ipo(pos, neg, base_pos, base_neg, beta=2.0):
    """(gap of u - 1 / (2 beta))^2, Eq. 17 (its tau is beta): the gap has a goal, and does not grow beyond it. By
    default that is a quarter of a nat; beta 0.25 asks for two, and that is what it takes (configs/gpt2_ipo.py)."""
    return (_gaps(pos - base_pos, neg - base_neg) - 1 / (2 * beta)).square().mean()


def dpop(pos, neg, base_pos, base_neg, beta=2.0, penalty=50.0):
    """-log sigmoid(beta * (gap of u - penalty * max(0, -u(positive)))): DPO that charges for positives which have
    become less likely than under the base. penalty is the paper's lambda."""
    fallen = F.relu(pos - base_pos)[:, :, None]  # (G, P, 1)
    return -F.logsigmoid(beta * (_gaps(pos - base_pos, neg - base_neg) - penalty * fallen)).mean()


def nca(pos, neg, base_pos, base_neg, beta=2.0):
    """-log s(r+) - log s(-r+) / 2 - log s(-r-) / 2, s = sigmoid, r = beta u. Each side moves against the base alone:
    positives rise until r+ = log 2, and cannot fall with the negatives. The paper's form for pairs."""
    up, down = beta * (base_pos - pos), beta * (base_neg - neg)
    return -F.logsigmoid(up).mean() - 0.5 * F.logsigmoid(-up).mean() - 0.5 * F.logsigmoid(-down).mean()


def kto(pos, neg, base_pos, base_neg, beta=2.0, alpha=1.0):
    """Mean over the sentences of 1 - sigmoid(beta (u - z)) for positives, alpha (1 - sigmoid(beta (z - u))) for
    negatives: no pairs. z, without gradient, estimates KL(model || base): here the mean u of the group, at least 0, and
    not of the micro-batch, so that a step does not depend on how it is cut. alpha is the paper's lambda_U."""
    up, down = base_pos - pos, base_neg - neg
    z = torch.cat([up, down], dim=1).mean(1, keepdim=True).clamp(min=0).detach()  # (G, 1)
    return torch.cat([torch.sigmoid(beta * (z - up)), alpha * torch.sigmoid(beta * (down - z))], dim=1).mean()


def simpo(pos, neg, beta=2.0, margin=0.5):
    """-log sigmoid(beta * (gap - margin)), Eq. 6, on means: score=nll. The paper's gamma is beta * margin."""
    return -F.logsigmoid(beta * (_gaps(pos, neg) - margin)).mean()


def cpo(pos, neg, beta=2.0):
    """-log sigmoid(beta * gap): DPO without a base, published with --score=sum. Its other term is nll_weight=1."""
    return -F.logsigmoid(beta * _gaps(pos, neg)).mean()


def orpo(pos, neg):
    """-log sigmoid(log odds(positive) - log odds(negative)), odds = p / (1 - p), log p = -score, Eq. 7, on means. Its
    other term is nll_weight=1, and its lambda is cp_weight (0.1 there). Scores must be > 0."""
    against = lambda x: x + torch.log(-torch.expm1(-x))  # -log odds
    return -F.logsigmoid(_gaps(against(pos), against(neg))).mean()


def margin(pos, neg, margin=0.5):
    """max(0, margin - gap): pairs that are far enough apart are left alone."""
    return F.relu(margin - _gaps(pos, neg)).mean()


def positive_only(pos, neg):
    """Mean score of the positives: plain fine-tuning. With --nll_weight=0 the run is that of --cp_weight=0."""
    return pos.mean()


def negative_only(pos, neg):
    """Minus the mean score of the negatives: gradient ascent on their nll, without end."""
    return -neg.mean()


def toxic_only(pos, neg):
    """Mean score of the negatives: fine-tuning on toxic text. --edit=task_vector subtracts what that taught."""
    return neg.mean()


# What --objective chooses. MODIFY HERE: one function and one line. A function gets what its arguments are named after:
# pos, neg, base_pos and base_neg are scores, a setting's name is that setting (configs/__init__.py). -> a scalar.
# `train.py --help` prints the remarks behind the names.
# Left out: unlikelihood training (arXiv 1908.04319), which needs the log-probability of each token.
OBJECTIVES = {
    "cp": cp,  # contrastive perplexity, Klein & Nabi 2025, arXiv 2401.08491: module docstring
    "dpo": dpo,  # direct preference optimisation, Rafailov et al. 2023, arXiv 2305.18290
    "ipo": ipo,  # identity preference optimisation, Azar et al. 2023, arXiv 2310.12036
    "dpop": dpop,  # DPO-positive (Smaug), Pal et al. 2024, arXiv 2402.13228
    "nca": nca,  # noise contrastive alignment, Chen et al. 2024, arXiv 2402.05369
    "kto": kto,  # Kahneman-Tversky optimisation, Ethayarajh et al. 2024, arXiv 2402.01306
    "simpo": simpo,  # simple preference optimisation, Meng et al. 2024, arXiv 2405.14734
    "cpo": cpo,  # contrastive preference optimisation, Xu et al. 2024, arXiv 2401.08417
    "orpo": orpo,  # odds ratio preference optimisation, Hong et al. 2024, arXiv 2403.07691
    "margin": margin,  # hinge, the rank loss of SLiC-HF, Zhao et al. 2023, arXiv 2305.10425
    "positive_only": positive_only,  # fine-tuning
    "toxic_only": toxic_only,  # fine-tuning on the negatives
    "negative_only": negative_only,  # unlearning by gradient ascent, Jang et al. 2022, arXiv 2210.01504
}
