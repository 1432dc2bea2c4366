"""Every objective, as a pure function of sentence scores: no model, no files, no settings. Anchors: train.py.

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

1. The paper's score is the perplexity itself, exp(phi) (Eq. 1): score='ppl'. Here it is its logarithm, as in the
   released code: a GPT-2's perplexities of sentences lie in the hundreds, where exp(-|difference|) is 0 for nearly all.
2. The paper's s(x, c) is (1/tau) exp(-|phi - c|) (Eq. 4). That tau cancels in J; here it divides the distance. Beyond
   a distance of tau * log(alpha |N| / |P|) the pull on a negative fades as exp(-distance / tau).
3. The released code, variant='released': exp(-|phi - ref|) / tau is a *logit*, so logits lie between 0 and 1/tau; alpha
   is added to those of negatives, a factor e^alpha (by default e^100; from e^10 on the gradient hardly depends on it);
   ref is the mean over the positives of the whole micro-batch; the cross-entropy, summed over all positives as targets,
   is divided by |P| + 1 + R, where R counts toxic sentences of other groups (0 here). It also averages over padding;
   that is not reproduced.
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
    pos, neg, tau=1.0, alpha=1.0, variant="paper", distance="abs", detach_centroid=False, score="nll"
):
    """Contrastive perplexity of G groups.

    Args:
        pos: scores phi of the positives, nats per token. Shape: (G, P)
        neg: scores phi of the negatives. Shape: (G, N)
        tau: temperature, in units of the score; > 0.
        alpha: weight of the negatives, a factor for 'paper', added to a logit for 'released'; > 0.
        variant: 'paper' (module docstring) or 'released' (difference 3).
        distance: 'abs', or 'signed' for the negatives (difference 4).
        detach_centroid: no gradient through the prototype (difference 5).
        score: 'nll' takes distances between phi, 'ppl' between exp(phi) (difference 1), which overflows at phi = 88.

    Returns:
        (loss, diagnostics): a scalar, the mean over groups, and a dict of detached (G,) tensors, see `diagnose`, with
        the loss of each group as 'loss'.

    Raises:
        ValueError: on misshapen scores or settings outside their range.
    """
    _check(pos, neg, tau, alpha, variant, distance, score)
    diagnostics = diagnose(pos, neg)
    if score == "ppl":
        pos, neg = pos.exp(), neg.exp()

    centroid = pos.mean() if variant == "released" else pos.mean(1, keepdim=True)  # scalar, or (G, 1)
    if detach_centroid:
        centroid = centroid.detach()
    d_pos = (pos - centroid).abs()  # (G, P)
    d_neg = neg - centroid if distance == "signed" else (neg - centroid).abs()  # (G, N)

    if variant == "paper":
        a = torch.logsumexp(-d_pos / tau, dim=1)  # log sum_P s(x, c_i)           (G,)
        b = torch.logsumexp(-d_neg / tau, dim=1) + math.log(alpha)  # log alpha sum_N s(x, c_i)     (G,)
        losses = -F.logsigmoid(a - b)  # -log J_i
    else:
        logits = torch.cat([torch.exp(-d_pos) / tau, torch.exp(-d_neg) / tau + alpha], dim=1)  # (G, P + N)
        losses = -logits.log_softmax(1)[:, : pos.size(1)].sum(1) / (pos.size(1) + 1)
    return losses.mean(), diagnostics | {"loss": losses.detach()}


def _check(pos, neg, tau, alpha, variant, distance, score):
    if pos.dim() != 2 or neg.dim() != 2 or len(pos) != len(neg) or not pos.numel() or not neg.numel():
        raise ValueError(f"scores must be (G, P) and (G, N), got {tuple(pos.shape)} and {tuple(neg.shape)}")
    if not (tau > 0 and alpha > 0):
        raise ValueError(f"tau and alpha must be > 0, got tau={tau}, alpha={alpha}")
    for name, value, known in (
        ("variant", variant, ("paper", "released")),
        ("distance", distance, ("abs", "signed")),
        ("score", score, ("nll", "ppl")),
    ):
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


def language_modelling(nll, tokens):
    """Next-token loss: the mean over tokens. nll (B,) in nats per token, tokens (B,), the number scored -> ()."""
    return (nll * tokens).sum() / tokens.sum()
