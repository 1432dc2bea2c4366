"""Steering against literal versions of its equations: one row, one token at a time, the whole text read again."""

import json
import math
import shlex
from functools import partial

import numpy as np
import pytest
import torch
from test_eval import TOY_CP, evaluation, network, quick  # noqa: F401
from test_model import LONG, prompts, tiny

import data
from configs import Config
from engine.sampling import sample
from measures.decoding import DExperts, Reversal, Sasa, fit_margin, make_steering, prefixes
from model import GPT, GPTConfig, Rows

END = 60  # the last token of LONG's vocabulary
TOXIC, NEUTRAL = [END, 7, 8, 9, 10], [END, 11, 12]
NAMES = ("dexperts", "anti_only", "sasa", "reversal", "no_neutral")


@pytest.fixture(scope="module")
def net():
    return tiny(LONG, std=0.15)


@pytest.fixture(scope="module")
def experts():
    """One smaller than the steered model, with a shorter context, and one larger."""
    small = GPTConfig(vocab_size=61, n_positions=64, n_embd=16, n_layer=1, n_head=2)
    return dict(expert=tiny(small, 2, 0.3), anti_expert=tiny(LONG, 3, 0.15))


def framed():
    """Three prompts of 1, 9 and 20 tokens that begin with the end token."""
    idx, lengths = prompts()
    idx[:, 0] = END
    return idx, lengths


def classifier(net):
    g = torch.Generator().manual_seed(3)
    return torch.randn(net.config.n_embd, generator=g), torch.tensor(0.3)


def method(name, net, experts, strength):
    """What GPT.generate takes as steer."""
    w, b = classifier(net)
    made = dict(
        dexperts=partial(DExperts, **experts),
        anti_only=partial(DExperts, anti_expert=experts["anti_expert"]),
        sasa=partial(Sasa, w=w, b=b, end=END, candidates=8),
        reversal=partial(Reversal, toxic=TOXIC, neutral=NEUTRAL),
        no_neutral=partial(Reversal, toxic=TOXIC, neutral=[END]),
    )
    return partial(made[name], strength=strength)


# --------------------------------------------------------------------------------------------------------------------
# literal versions: text (T,) and the length of its prompt -> logits (V,) of the next token


def literal_dexperts(text, prompt, net, experts, strength):
    base, up, down = (m(text[None])[0, -1] for m in (net, experts["expert"], experts["anti_expert"]))
    return base + strength * (up - down)


def literal_anti_only(text, prompt, net, experts, strength):
    base, down = (m(text[None])[0, -1] for m in (net, experts["anti_expert"]))
    return base + strength * (base - down)


def literal_sasa(text, prompt, net, experts, strength):
    """Every candidate appended, and the whole text read."""
    w, b = classifier(net)
    margin = lambda text: (net.hidden(text[None], torch.arange(len(text)))[0, -1] * w).sum() + b
    logits = net(text[None])[0, -1]
    out = logits.clone()
    for t in logits.argsort(descending=True)[:8].tolist():
        if t != END:
            out[t] += strength * (margin(torch.cat([text, torch.tensor([t])])) - margin(text))
    return out


def heads(block, x):
    """What each head of a block says at each position, by loops: x (T, C) -> (T, nh, hs)."""
    (T, C), nh = x.shape, block.attn.n_head
    q, k, v = (y.view(T, nh, C // nh) for y in block.attn.c_attn(block.ln_1(x)).split(C, dim=1))
    out = torch.zeros(T, nh, C // nh)
    for t in range(T):
        for h in range(nh):
            weights = torch.stack([q[t, h] @ k[s, h] / math.sqrt(C // nh) for s in range(t + 1)]).softmax(0)
            out[t, h] = sum(weights[s] * v[s, h] for s in range(t + 1))
    return out


def through(net, text, change):
    """Hidden states (T, C) of a text; change(block's number, heads (T, nh, hs)) -> heads."""
    x = net.transformer.wte(text) + net.transformer.wpe(torch.arange(len(text)))
    for i, block in enumerate(net.transformer.h):
        x = x + block.attn.c_proj(change(i, heads(block, x)).flatten(1))
        x = x + block.mlp(block.ln_2(x))
    return net.transformer.ln_f(x)


def literal_reversal(text, prompt, net, experts, strength, neutral=tuple(NEUTRAL)):
    """The equations of Reversal's docstring at the prompt's last position and at all that were generated."""
    said = {}
    for name, begin in (("toxic", TOXIC), ("neutral", neutral)):
        keep = lambda i, v, name=name: said.setdefault((name, i), v)
        through(net, torch.cat([torch.tensor(begin), text[1:]]), keep)

    def reverse(i, v):
        v, end = v.clone(), said["toxic", i][len(TOXIC) - 1]
        for t in range(prompt - 1, len(text)):
            new = torch.zeros_like(v[t])
            for h in range(v.size(1)):
                d = said["toxic", i][len(TOXIC) - 1 + t, h] - said["neutral", i][len(neutral) - 1 + t, h]
                cosine = (v[t, h] @ end[h] / v[t, h].norm() / end[h].norm()).item()
                scale = (1 + d.norm()) ** 0.4 * (1 + max(0.0, cosine)) ** 0.6
                new[h] = v[t, h] - strength * scale * d
            v[t] = new * v[t].flatten().norm() / new.flatten().norm()
        return v

    return net.lm_head(through(net, text, reverse))[-1]


LITERAL = dict(
    dexperts=literal_dexperts,
    anti_only=literal_anti_only,
    sasa=literal_sasa,
    reversal=literal_reversal,
    no_neutral=partial(literal_reversal, neutral=(END,)),
)


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_logits_are_the_literal_ones(net, experts, name, samples):
    """Of prompts of different lengths in one batch, at every step of texts that are given."""
    (idx, lengths), steps = framed(), 5
    said = torch.randint(END, (3 * samples, steps), generator=torch.Generator().manual_seed(9))
    rows = method(name, net, experts, 0.7)(net, idx, lengths, steps, samples, None)
    for i in range(steps):
        got = rows.logits()
        for r in range(3 * samples):
            n = int(lengths[r // samples])
            text = torch.cat([idx[r // samples, :n], said[r, :i]])
            want = LITERAL[name](text, n, net, experts, 0.7)
            assert (got[r] - want).abs().max() < 2e-4, (r, i)
            assert (want - net(text[None])[0, -1]).abs().max() > 0.05, "steering that does nothing"
            if rows.plain is not None:
                assert (rows.plain[r] - net(text[None])[0, -1]).abs().max() < 1e-4
        rows.advance(said[:, i])
    assert not any(m._forward_pre_hooks for m in net.modules())


SAMPLING = [dict(), dict(temperature=0.7, top_p=0.9), dict(top_p=0.3), dict(temperature=0)]
noise = lambda seed=7: torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("how", SAMPLING, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_strength_0_is_plain_sampling(net, experts, name, how):
    (idx, lengths), how = framed(), how | dict(samples=2, stop_token=3)
    want, count = net.generate(idx, lengths, 25, **how, generator=noise())
    for strength in (0.0, 1.0):
        got, n = net.generate(idx, lengths, 25, **how, generator=noise(), steer=method(name, net, experts, strength))
        assert (torch.equal(got, want) and torch.equal(n, count)) == (strength == 0)


@pytest.mark.parametrize("how", SAMPLING, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_steered_rows_do_not_see_their_neighbours(net, experts, name, how):
    """In a batch, with samples, or alone: the same tokens from the same random numbers."""
    (idx, lengths), how = framed(), how | dict(steer=method(name, net, experts, 0.6))
    together, _ = net.generate(idx, lengths, 20, **how, samples=2, generator=noise())
    one = noise()
    for b, n in enumerate(lengths.tolist()):
        for s in range(2):
            alone, _ = net.generate(idx[b : b + 1, :n], lengths[b : b + 1], 20, **how, generator=one)
            assert alone[0].tolist() == together[2 * b + s].tolist()


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_is_close(net, experts, name):
    idx, lengths = framed()
    with torch.no_grad():
        want = method(name, net, experts, 0.5)(net, idx, lengths, 3, 1, None).logits()
        with torch.autocast("cpu", torch.bfloat16):
            rows = method(name, net, experts, 0.5)(net, idx, lengths, 3, 1, None)
            got = rows.logits()
            rows.advance(got.argmax(-1))
            assert rows.logits().isfinite().all()
    got, want = got.log_softmax(-1), want.log_softmax(-1)  # logits may differ by a constant
    assert 0 < (got - want).abs().mean() < 0.1 * want.std()


@pytest.mark.parametrize("top_p", [0.3, 0.8])
def test_the_nucleus_is_of_the_plain_logits(top_p):
    """Frequencies of 20,000 draws; and, where steering wants nothing of the nucleus, draws from it all the same."""
    g = torch.Generator().manual_seed(2)
    plain, shift = torch.randn(30, generator=g) * 2, torch.randn(30, generator=g) * 3
    order = plain.argsort(descending=True).tolist()
    size = next(k for k in range(1, 31) if plain.softmax(0)[order[:k]].sum() >= top_p)
    for scale in (1.0, 200.0):
        shifted, inside = plain + shift, torch.zeros(30, dtype=torch.bool)
        inside[order[:size]] = True
        shifted = torch.where(inside, shifted, shifted + (scale > 1) * scale)
        want = shifted.masked_fill(~inside, -math.inf).softmax(0)
        u = torch.rand(20_000, 4, generator=g)
        drawn = sample(shifted.expand(20_000, -1), 1.0, 0, top_p, u, plain.expand(20_000, -1))
        got = torch.bincount(drawn, minlength=30) / 20_000
        assert not got[~inside].any() and (got - want).abs().max() < 4 * 0.5 / 20_000**0.5


def test_looking_ahead_leaves_no_trace(net):
    """States behind candidates are those of the whole text read with each; and rows go on as if nothing had been tried,
    to the last position that the context has."""
    (idx, lengths), g = framed(), torch.Generator().manual_seed(1)
    with torch.no_grad():
        plain, looked = Rows(net, idx, lengths, 108), Rows(net, idx, lengths, 108, spare=16)
        texts = [idx[b, :n] for b, n in enumerate(lengths.tolist())]
        for i in range(108):
            tokens = torch.randint(61, (3, 16), generator=g)
            h = looked.peek(tokens)
            assert h.shape == (3, 16, 32)
            for b in range(3) if i in (0, 1, 50, 107) else ():
                for c in range(16):
                    text = torch.cat([texts[b], tokens[b, c : c + 1]])
                    assert (net.hidden(text[None], torch.arange(len(text)))[0, -1] - h[b, c]).abs().max() < 1e-4
            for rows in (plain, looked):
                rows.advance(tokens[:, 0])
            assert (plain.h - looked.h).abs().max() < 1e-5
            texts = [torch.cat([text, t]) for text, t in zip(texts, tokens[:, :1], strict=True)]


def test_the_margin_is_linear_discriminant_analysis():
    """log N(h; mu+, S) - log N(h; mu-, S), with the densities written out, of states collected one prefix at a time."""
    net, g = tiny(LONG, std=0.15), torch.Generator().manual_seed(4)
    draw = lambda n: [END, *torch.randint(END, (n,), generator=g).tolist(), END]
    sides = [[draw(n) for n in (3, 9, 4, 12, 7, 8)], [draw(n) for n in (5, 2, 14, 6, 9)]]
    w, b = fit_margin(net, *sides, ridge=0.05)
    states = []
    with torch.no_grad():
        for sequences in sides:
            prefixes = [torch.tensor([s[:k]]) for s in sequences for k in range(2, len(s))]
            states.append(np.array([net.hidden(x, torch.arange(x.size(1)))[0, -1].tolist() for x in prefixes]))
    means = [x.mean(0) for x in states]
    off = np.concatenate([x - m for x, m in zip(states, means, strict=True)])
    S = sum(np.outer(x, x) for x in off) / (len(off) - 2)
    S = S + 0.05 * np.mean(np.diag(S)) * np.eye(len(S))
    log_density = lambda h, mu: (
        -0.5 * ((h - mu) @ np.linalg.inv(S) @ (h - mu) + np.linalg.slogdet(S)[1] + len(h) * math.log(2 * math.pi))
    )
    for h in np.concatenate(states):
        want = log_density(h, means[0]) - log_density(h, means[1])
        assert torch.tensor(h).float() @ w + b == pytest.approx(want, abs=2e-3 * (1 + abs(want)))
    right = [(torch.tensor(x).float() @ w + b > 0).float().mean().item() for x in states]
    assert right[0] > 0.6 > 0.4 > right[1]


def test_prefixes_ask_for_both_tones():
    tokenizer, groups = data.get_tokenizer("toy"), data.load_groups("toy")["train"]
    config = Config(init_from="x", tokenizer="toy", shots=2)
    toxic, neutral = prefixes(config, tokenizer, groups)
    assert toxic[0] == neutral[0] == tokenizer.eot_token
    texts = [tokenizer.decode(p[1:]) for p in (toxic, neutral)]
    assert texts[0].endswith('\nRude: "') and texts[1].endswith('\nPolite: "')
    assert [t.count("Sentence:") for t in texts] == [3, 3]
    inputs = [[part.split('"')[0] for part in t.split('Sentence: "')[1:]] for t in texts]
    assert inputs[0] == inputs[1] and len({*inputs[0]}) == 3
    assert {g.input for g in groups} >= {*inputs[0]}
    said = [
        [part.split('"')[0] for part in t.split(f'{word}: "')[1:-1]]
        for t, word in zip(texts, ("Rude", "Polite"), strict=True)
    ]
    for side, sentences in zip(("negatives", "positives"), said, strict=True):
        assert len(sentences) == 2 and all(any(s in getattr(g, side) for g in groups) for s in sentences)


# --------------------------------------------------------------------------------------------------------------------
# bad input


def test_what_does_not_fit_is_one_line(net, experts):
    idx, lengths = framed()
    other = network(0, 50, 64)
    with pytest.raises(ValueError, match="the anti_expert has a vocabulary of 50 tokens, the steered model 61"):
        net.generate(idx, lengths, 5, steer=partial(DExperts, anti_expert=other))
    with pytest.raises(ValueError, match="sequence of 70 tokens, but the context is 64"):
        net.generate(idx, lengths, 50, steer=partial(DExperts, **experts))
    for name in ("sasa", "reversal"):
        with pytest.raises(ValueError, match="but the context is 128"):
            net.generate(idx, lengths, 109, steer=method(name, net, experts, 1.0))
    with pytest.raises(ValueError, match="must begin with the end token, 60"):
        net.generate(*prompts(), 5, steer=method("reversal", net, experts, 1.0))
    for more in (dict(top_k=3), dict(prefix=net.read_prefix([1, 2]))):
        with pytest.raises(ValueError, match="neither prefix nor top_k"):
            net.generate(idx, lengths, 5, **more, steer=method("sasa", net, experts, 1.0))
    assert not any(m._forward_pre_hooks for m in net.modules())


def test_settings_that_cannot_be():
    tokenizer, groups = data.get_tokenizer("toy"), data.load_groups("toy")["train"]
    config = lambda **more: Config(init_from="x", tokenizer="toy", **more)
    with pytest.raises(ValueError, match="give --expert, --anti_expert, or both"):
        config(steer="dexperts")
    for name in ("sasa", "reversal"):
        with pytest.raises(ValueError, match=f"--steer={name} learns from train groups"):
            make_steering(config(steer=name), network(0, tokenizer.n_vocab, 128), tokenizer, [], {})
    with pytest.raises(ValueError, match="exceed the context of 64: lower --shots"):
        make_steering(config(steer="reversal"), network(0, tokenizer.n_vocab, 64), tokenizer, groups, {})


# --------------------------------------------------------------------------------------------------------------------
# eval.py


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random toy model as the base, and two of its kind as experts."""
    out, n = tmp_path_factory.mktemp("steered"), data.get_tokenizer("toy").n_vocab
    for seed, name in enumerate(("base", "up", "down")):
        network(seed, n, 128).save_pretrained(out / name)
    return out


def steered(folder, *flags):
    """eval.json of a steered evaluation of the base."""
    few = ["--k=3", "--n_prompts=4", "--sample_tokens=6", "--seed=1", f"--out_dir={folder / 'run'}"]
    words = [TOY_CP, *few, f"--base={folder / 'base'}", *flags]
    evaluation.main(words)
    method, strength = (next(f.split("=")[1] for f in flags if f.startswith(k)) for k in ("--steer=", "--steer_str"))
    tuned = "tuned-" * any(f.startswith("--ckpt=") for f in flags)
    return json.loads((folder / "run" / f"{tuned}{method}-{strength}" / "eval.json").read_text())


@pytest.mark.parametrize("name", ["dexperts", "sasa", "reversal"])
def test_the_base_beside_itself_steered(folder, capsys, name):
    flags = [f"--steer={name}"]
    flags += [f"--expert={folder / 'up'}", f"--anti_expert={folder / 'down'}"] if name == "dexperts" else []
    result = steered(folder, *flags, "--steer_strength=2")
    said = capsys.readouterr().out
    assert "base, steered |" in said and "steered by" in said and "1,000 tokens take" in said
    assert result["parts"] == ["scores", "toxicity", "fluency", "diversity"] and result["base"] == result["tuned"]
    sizes = dict(dexperts=2 * GPT.from_pretrained(folder / "up").num_parameters(), sasa=33, reversal=0)
    assert result["steering"]["parameters"] == sizes[name] and f"{name}, strength 2" in result["steering"]["method"]
    seconds = result["steering"]["seconds_per_1000_tokens"]
    assert 0 < seconds["base"] < seconds["tuned"]
    assert result["measures"]["groups"]["ppl_positive"]["difference"] == 0
    assert result["measures"]["prompted"]["sample_ppl_base_mean"]["difference"] != 0
    steered(folder, *flags, "--steer_strength=2")
    assert "samples, free samples: base from before, tuned from before" in capsys.readouterr().out
    plain = steered(folder, *flags, "--steer_strength=0")
    assert all(m["difference"] == 0 for ms in plain["measures"].values() for m in ms.values())


def test_steps_are_kept_for_the_same_steering_alone(folder, capsys):
    """The same folder, another method with the same name of the folder: only the steered side is measured again."""
    flags = ["--steer=dexperts", "--steer_strength=1", f"--anti_expert={folder / 'down'}"]
    one = steered(folder, *flags)
    capsys.readouterr()
    two = steered(folder, *flags, f"--expert={folder / 'up'}")
    assert "samples, free samples: base from before, tuned 0." in capsys.readouterr().out
    assert one["measures"]["free"] != two["measures"]["free"]
    steered(folder, "--steer=dexperts", "--steer_strength=3", f"--anti_expert={folder / 'down'}")
    capsys.readouterr()
    evaluation.main(["--compare", *(str(folder / f"run/dexperts-{n}") for n in (1, 3))])  # no two seeds of one thing
    said = capsys.readouterr().out
    assert "steer_strength=1.0" in said and "steer_strength=3.0" in said and "±" not in said.split("mean ±")[0]


def test_a_tuned_model_may_be_steered(folder, capsys):
    result = steered(folder, "--steer=sasa", "--steer_strength=3", f"--ckpt={folder / 'up'}")
    assert "tuned, steered |" in capsys.readouterr().out and result["tuned"].endswith("up")
    assert result["measures"]["groups"]["ppl_positive"]["difference"] != 0
    evaluation.main([TOY_CP, f"--base={folder / 'base'}", f"--ckpt={folder / 'up'}", "--k=2", "--prompt=Early"])
    plain = capsys.readouterr().out
    how = ["--steer=sasa", "--steer_strength=30", f"--base={folder / 'base'}", f"--ckpt={folder / 'up'}"]
    evaluation.main([TOY_CP, *how, "--k=2", "--prompt=Early"])
    steered_out = capsys.readouterr().out
    sides = [text.split("\nbase:")[1].split("\ntuned:") for text in (plain, steered_out)]
    assert sides[0][0] == sides[1][0] and sides[0][1] != sides[1][1]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--steer=sasa --rewrite=x.txt", "--rewrite and --export take a model by itself"),
        ("--steer=sasa --parts=drift,utility", "no utility, drift: choose --parts"),
        ("--steer=dexperts --anti_expert=nowhere/x.pt", "no checkpoint at"),
        ("--steer=saas", "did you mean sasa"),
        ("--steer=dexperts", "give --expert, --anti_expert, or both"),
    ],
)
def test_bad_flags_are_one_line(folder, capsys, flags, words):
    with pytest.raises(SystemExit) as stop:
        evaluation.main([TOY_CP, f"--base={folder / 'base'}", f"--out_dir={folder / 'bad'}", *shlex.split(flags)])
    said = f"{stop.value} {capsys.readouterr().err}"
    assert words in said and said.count("eval.py:") == 1
