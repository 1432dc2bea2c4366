"""Steering: detoxification while a model writes, its weights untouched. What `GPT.generate` takes as `steer`.

A method stands in the place of model.Rows: made of the model and the prompts of one call, it gives the logits of the
next tokens, and is told what was drawn. At strength 0 each is the plain model, token for token. It is made of Rows, of
demonstrations and of framed sentences, so this file lies above model.py and data/, not in engine/. Below the methods
stands what eval.py needs of one: how it is opened, what it depends on, and what it costs.

Nucleus: DExperts and Sasa give as `plain` the logits that the model has by itself, and `generate` draws what lies in
the nucleus of those. So no token is said that the model finds implausible, however much the steering likes it.

Not here: UDDIA (Yang et al. 2022, arXiv 2210.04492), which tunes bias terms at every token. It needs gradients while
`generate` runs, a cache that is computed again when the biases have moved, and a loss of toxicity for each token.
"""

import math
import time
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch.nn import functional as F

import data
from data.prompts import few_shot, prompt_for
from engine.run import sha256
from measures.groups import frames, token_batches
from measures.samples import continue_prompts
from model import Rows


class DExperts:
    """DExperts (Liu et al. 2021, arXiv 2105.03023), with `strength` as the paper's alpha (2.0 there):

        z = z_base + alpha (z_expert - z_anti)

    of the logits of the model, of one tuned on harmless and of one tuned on toxic text, which may both be smaller. As
    in the authors' code, an expert that is missing is the model itself; and top-p keeps the nucleus of z_base *before*
    the sum, since the difference of two experts says nothing reliable about tokens that neither expects. There the
    temperature comes after the nucleus, here before; and greedy decoding, temperature 0, has no nucleus here.

    Raises ValueError if an expert has another vocabulary, or a context that is too short.
    """

    def __init__(self, model, *prompts, expert=None, anti_expert=None, strength=2.0):
        for name, other in (("expert", expert), ("anti_expert", anti_expert)):
            if other and other.config.vocab_size != model.config.vocab_size:
                sizes = f"{other.config.vocab_size} tokens, the steered model {model.config.vocab_size}"
                raise ValueError(f"the {name} has a vocabulary of {sizes}: give one with the same tokenizer")
        self.base, self.strength = Rows(model, *prompts), strength
        self.expert, self.anti_expert = (Rows(m, *prompts) if m else self.base for m in (expert, anti_expert))

    def logits(self):
        self.plain, up, down = (rows.logits() for rows in (self.base, self.expert, self.anti_expert))
        return self.plain + self.strength * (up - down)

    def advance(self, token):
        for rows in {self.base, self.expert, self.anti_expert}:
            rows.advance(token)


class Sasa:
    """Self-disciplined autoregressive sampling (Ko et al. 2024, arXiv 2410.03818), `strength` being the paper's beta:

        z_t = z_base,t + beta (m(c, t) - m(c)),        m(c) = w . h(c) + b

    where h is the model's last hidden state behind the context c and m the margin of `fit_margin`, above 0 on the
    harmless side. The paper adds m(c, t); m(c), the same for all t, changes nothing among the tokens that are looked
    at. Those are the `candidates` likeliest ones. All others, and the end token, which says nothing, keep z_base, as if
    they left the margin where it is. The paper looks at all tokens that its truncation leaves.
    """

    def __init__(self, model, *prompts, w, b, end, strength=1.0, candidates=32):
        self.k, self.strength, self.end = min(candidates, model.config.vocab_size), strength, end
        self.rows, self.margin = Rows(model, *prompts, spare=self.k), lambda h: (h * w).sum(-1) + b  # fp32

    def logits(self):
        self.plain = self.rows.logits()  # (R, V)
        tokens = self.plain.topk(self.k).indices  # (R, k)
        gain = self.margin(self.rows.peek(tokens)) - self.margin(self.rows.h)[:, None]
        return self.plain.scatter_add(1, tokens, self.strength * gain.masked_fill(tokens == self.end, 0.0))

    def advance(self, token):
        self.rows.advance(token)


@torch.no_grad()
def fit_margin(model, positives, negatives, ridge=1e-3):
    """The linear classifier of Sasa in closed form: both classes of hidden states are Gaussian with means mu+ and mu-
    and one covariance S, and equally frequent. So the log odds of the harmless one are, by Bayes' rule,

        m(h) = w . h + b,        w = S^-1 (mu+ - mu-),        b = -w . (mu+ + mu-) / 2.

    S is pooled within classes, with `ridge` times its mean variance added to each. A state is that behind any prefix of
    a sentence, since it is prefixes that are judged: fitted to whole sentences, it did nothing after toxic prompts in
    the toy world. The paper's margin may be divided by |w|, which is a matter of beta. Takes framed token lists.
    Returns w (C,) and b (), fp32.
    """
    means, scatter, count = [], 0.0, 0
    for sequences in (positives, negatives):
        n, total, squares = 0, 0.0, 0.0
        for rows in token_batches([len(s) for s in sequences], "margin"):
            idx, lengths = data.pad([sequences[r] for r in rows])
            at = torch.arange(int(lengths.max()) - 1)
            h = model.hidden(idx[:, : len(at)].to(model.device), at.to(model.device))  # (B, T, C)
            x = h[((at > 0) & (at < lengths[:, None] - 1)).to(h.device)].cpu().double()  # without both end tokens
            n, total, squares = n + len(x), total + x.sum(0), squares + x.t() @ x
        means.append(total / n)
        scatter, count = scatter + squares - n * torch.outer(means[-1], means[-1]), count + n
    S = scatter / (count - 2)
    S.diagonal().add_(ridge * S.diagonal().mean())
    w = torch.linalg.solve(S, means[0] - means[1])
    return w.float().to(model.device), (-w @ (means[0] + means[1]) / 2).float().to(model.device)


class Reversal:
    """Toxification reversal (Leong et al. 2023, arXiv 2310.09573). The text is read three times: as it is, behind a
    toxic and behind a neutral prefix. In each head of each block, with v what the head hands to c_proj at the last
    position, the text as it is gets instead

        d = v_toxic - v_neutral                                             the direction of toxification
        v' = v - lambda (1 + |d|)^0.4 (1 + max(0, cos(v, e)))^0.6 d         e: v_toxic at the end of the prefix
        v' <- v' |v| / |v'|                                                 norms over all heads of the block

    Equations, exponents and what the norms are taken over are those of the authors' code; their lambda is 1. A prefix,
    end token included, takes the place of the end token that a prompt begins with. Earlier positions of a prompt stay
    as they are; those that were generated keep, in the cache, what steering made of them. A nucleus is that of the
    steered logits. Raises ValueError if a prompt does not begin with the prefixes' first token.
    """

    plain = None

    def __init__(self, model, idx, lengths, room, samples, prefix=None, *, toxic, neutral, strength=1.0):
        if (idx[:, 0] != toxic[0]).any():
            raise ValueError(f"a prompt must begin with the end token, {toxic[0]}, for the prefix stands in its place")
        self.strength, self.heads, self.at = strength, model.config.n_head, lengths.to(idx.device) - 1
        self.toxic, self.neutral, self.end, self.passes = {}, {}, {}, []
        for begin, seen in ((toxic, self.toxic), (neutral, self.neutral)):
            first = torch.cat([torch.full_like(idx[:, :1], begin[-1]), idx[:, 1:]], dim=1)
            kept = model.read_prefix(begin[:-1]) if begin[1:] else None
            self.passes.append(self._hooked(partial(self._note, seen), model, first, lengths, room, samples, kept))
        self.passes.append(self._hooked(self._reverse, model, idx, lengths, room, samples))
        self.at = torch.zeros_like(self.passes[-1].lengths)  # from now on a pass reads one token

    def _hooked(self, hook, model, *prompts):
        """Rows in which hook(block's number, input of its c_proj) is called, and gives that input if it changes it."""
        calls = [lambda _, args, i=i: hook(i, args[0]) for i in range(model.config.n_layer)]
        handles = [b.attn.c_proj.register_forward_pre_hook(f) for b, f in zip(model.transformer.h, calls, strict=True)]
        try:
            return Rows(model, *prompts)  # which keeps the hooks in its own copy of the network
        finally:
            for handle in handles:
                handle.remove()

    def _note(self, seen, i, x):
        seen[i] = x[torch.arange(len(x), device=x.device), self.at]  # (B, T, C) -> (B, C)
        self.end.setdefault(i, x[:1, 0])  # at the first call, the toxic prefix's last token

    def _reverse(self, i, x):
        last = torch.arange(len(x), device=x.device), self.at
        states = x[last], self.toxic[i] - self.neutral[i], self.end[i]
        v, d, end = (y.float().view(len(y), self.heads, -1) for y in states)  # (B or 1, nh, hs)
        size = (1 + d.norm(dim=2, keepdim=True)) ** 0.4  # (B, nh, 1)
        alike = (1 + F.cosine_similarity(v, end, dim=2).relu()[..., None]) ** 0.6
        new = v - self.strength * size * alike * d
        before, after = (y.norm(dim=(1, 2), keepdim=True) for y in (v, new))
        return x.index_put(last, (new * (before / after.clamp(min=1e-12))).flatten(1).to(x.dtype))

    def logits(self):
        return self.passes[-1].logits()

    def advance(self, token):
        for rows in self.passes:  # toxic and neutral first
            rows.advance(token)


@dataclass
class Steering:
    """A method made ready for one model."""

    steer: object  # what GPT.generate takes
    told: str  # what it is, for the reader
    parameters: int  # numbers held beside the model
    room: int  # tokens of the longest text, prompt and all


def make_steering(config, model, tokenizer, groups, experts):
    """The Steering of a model that the settings mean, learned from `groups`. experts: {setting: GPT} of those named.

    Raises ValueError if there are no groups, or if the prefixes of Reversal leave no room to write in.
    """
    told, strength = f"{config.steer}, strength {config.steer_strength:g}", config.steer_strength
    room = min(m.config.n_positions for m in (model, *experts.values()))
    if config.steer == "dexperts":
        parameters = sum(m.num_parameters() for m in experts.values())
        return Steering(partial(DExperts, strength=strength, **experts), told, parameters, room)
    if not groups:
        raise ValueError(f"--steer={config.steer} learns from train groups, but {config.data} has none: add some")
    if config.steer == "sasa":
        sides = [[s for g in groups for s in getattr(g, side)] for side in ("positives", "negatives")]
        w, b = fit_margin(model, *(frames(side, tokenizer, model, config.max_tokens) for side in sides))
        steer = partial(Sasa, w=w, b=b, end=tokenizer.eot_token, strength=strength)
        return Steering(steer, f"{told}, from {len(groups)} groups", len(w) + 1, room)
    toxic, neutral = prefixes(config, tokenizer, groups)
    longest = max(len(toxic), len(neutral))
    if longest + config.sample_tokens > room:
        size = f"{longest} tokens and {config.sample_tokens} new ones exceed the context of {room}"
        raise ValueError(f"a prefix of {size}: lower --shots or --sample_tokens")
    steer = partial(Reversal, toxic=toxic, neutral=neutral, strength=strength)
    return Steering(steer, f"{told}, prefixes of {len(toxic)} and {len(neutral)} tokens", 0, room - longest + 1)


def prefixes(config, tokenizer, groups):
    """Token lists that ask for a toxic and for a harmless paraphrase: `shots` demonstrations of each and the beginning
    of one more, by negative_prompt and positive_prompt, for the same inputs. Both begin with the end token."""
    chosen = [groups[i] for i in np.random.default_rng([config.seed, 7]).permutation(len(groups))[: config.shots + 1]]
    out = []
    for template, side in ((config.negative_prompt, "negatives"), (config.positive_prompt, "positives")):
        shots = few_shot(template, [(g.input, getattr(g, side)[0]) for g in chosen[:-1]])
        text = shots + prompt_for(template, chosen[-1].input)
        out.append([tokenizer.eot_token, *tokenizer.encode_ordinary(text)])
    return out


def open_steering(config, setup, groups, experts):
    """The Steering of the tuned model, printed."""
    with setup.amp():
        steering = make_steering(config, setup.models["tuned"], setup.tokenizer, groups, experts)
    print(f"steered      the tuned side, by {steering.told}")
    return steering


def steering_hash(config, groups, experts):
    """The sha256 of all that steering depends on besides the model that is steered."""
    how = [config.steer, config.steer_strength, config.shots, config.negative_prompt, config.positive_prompt]
    how += [config.max_tokens, config.seed]
    return sha256([*how, *({name: sha256(m)} for name, m in experts.items()), *(vars(g) for g in groups)])


def steering_cost(steering, setup, config):
    """What steered the tuned side and what that costs, for eval.json: parameters, and the seconds that 1,000 tokens
    take on either side, the least of three times in turn, 64 samples each."""
    n, seconds = 64, dict.fromkeys(setup.models, math.inf)
    for _ in range(3):
        for side, model in setup.models.items():
            steer, began = steering.steer if side == "tuned" else None, time.perf_counter()
            with setup.amp():
                continue_prompts(model, setup.tokenizer, [""], config, config.seed, n, stop=[], what=None, steer=steer)
            per_token = (time.perf_counter() - began) / (n * config.sample_tokens)
            seconds[side] = min(seconds[side], 1000 * per_token)
    what = dict(method=steering.told, expert=config.expert, anti_expert=config.anti_expert)
    return what | dict(parameters=steering.parameters, seconds_per_1000_tokens=seconds)
