"""eval.py: every measure against a slow and plain version of itself, and the commands as a user runs them."""

import hashlib
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import data
import eval as evaluation
import train
from configs import Config, load_config
from data import toy, toy_facts
from engine import head
from measures import report, training
from measures.groups import measure_groups
from measures.published import EXPECTED, TOXICITY
from measures.rewriting import draw_rewrites, measure_rewrites, rewrite
from measures.samples import continue_prompts, cut_prompts, draw_samples, judged, measure_samples, prompt_sets
from measures.scorers import get_scorer
from measures.statistics import rouge_l
from measures.tasks import SOURCES, choice_nll, measure_task, published_file, read_task, task_scores
from measures.texts import detokenize, measure_drift, measure_text, text_perplexity, wikitext_rows
from model import GPT, GPTConfig

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
TOY_CP = str(ROOT / "configs/toy_cp.py")
needs_shared = pytest.mark.skipif(
    not (SHARED / "base_mini").is_dir(), reason="no ../shared with a model and task files"
)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr("measures.samples.CLOSING", 6)
    monkeypatch.setattr("measures.statistics.RESAMPLES", 40)


@pytest.fixture(scope="module")
def tokenizer():
    return data.get_tokenizer("toy")


def network(seed, vocab_size, n_positions, n_head=2):
    """A small random GPT with opinions: its weights are large enough for uneven predictions."""
    torch.manual_seed(seed)
    net = GPT(GPTConfig(vocab_size=vocab_size, n_positions=n_positions, n_embd=32, n_layer=2, n_head=n_head))
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn_like(p) * 0.15 + (1 if p.dim() == 1 and p.mean() > 0.5 else 0))
    return net.eval()


@pytest.fixture(scope="module")
def net():
    return network(0, 300, 32)


@pytest.fixture(scope="module")
def nets(tokenizer):
    """Two models with the toy world's vocabulary: one that writes, one that judges."""
    return network(1, tokenizer.n_vocab, 40), network(2, tokenizer.n_vocab, 40)


def config(**more):
    return Config(**(dict(init_from="x", tokenizer="toy", k=3, sample_tokens=8, scorer="data.toy:rudeness") | more))


def ids(rng, n, vocab=300):
    return rng.integers(0, vocab, size=n).tolist()


@torch.no_grad()
def logp(model, tokens):
    """Log-probabilities of the next token after each of `tokens` but the last, by the plain forward pass."""
    return model(torch.tensor([tokens[:-1]]))[0].log_softmax(-1)


def conditional_nll(model, tokens, start):
    """Total nll of tokens[start:], and whether each of them is the likeliest."""
    rows, target = logp(model, tokens)[start - 1 :], torch.tensor(tokens[start:])
    return -rows.gather(1, target[:, None]).sum().item(), rows.argmax(-1).tolist() == tokens[start:]


# --------------------------------------------------------------------------------------------------------------------
# choice_nll


def some_choices(net):
    """Contexts of 1 to 20 tokens with 1 to 4 choices of 1 to 8 tokens; some choices are what the model would say."""
    rng = np.random.default_rng(0)
    contexts = [ids(rng, n) for n in (5, 1, 20, 9, 12)]
    choices = [[ids(rng, n) for n in ns] for ns in ((3, 1, 8), (1,), (2, 2, 5, 1), (7, 1), (4,))]
    for context, xs in zip(contexts, choices, strict=True):
        said = []
        for _ in xs[-1]:
            with torch.no_grad():
                said.append(int(net(torch.tensor([context + said]))[0, -1].argmax()))
        xs[-1] = said
    choices[0][0] = choices[0][0][:1] + choices[0][0]  # a repeated token
    return contexts, choices


@pytest.mark.parametrize("align", [1, 1024])  # rows of the head's weights, as on a CPU and as on a GPU
def test_choice_nll_is_one_choice_at_a_time(net, monkeypatch, align):
    monkeypatch.setitem(head.ALIGN, "cpu", align)
    contexts, choices = some_choices(net)
    nll, greedy = choice_nll(net, contexts, choices)
    want = [conditional_nll(net, c + x, len(c)) for c, xs in zip(contexts, choices, strict=True) for x in xs]
    assert greedy.dtype == torch.bool
    assert nll.tolist() == pytest.approx([n for n, _ in want], abs=1e-4)
    assert greedy.tolist() == [g for _, g in want] and 5 <= sum(greedy) < len(want)


def test_choices_do_not_see_each_other_nor_their_neighbours(net):
    """A row alone, a choice alone and another order give the same numbers: mask, padding, position."""
    contexts, choices = some_choices(net)
    together = choice_nll(net, contexts, choices)[0].tolist()
    alone = [choice_nll(net, [c], [xs])[0].tolist() for c, xs in zip(contexts, choices, strict=True)]
    assert together == pytest.approx(sum(alone, []), abs=1e-4)
    one = [choice_nll(net, [c], [[x]])[0].item() for c, xs in zip(contexts, choices, strict=True) for x in xs]
    assert together == pytest.approx(one, abs=1e-4)
    turned = choice_nll(net, contexts[::-1], [xs[::-1] for xs in choices[::-1]])[0].tolist()
    assert together == pytest.approx(turned[::-1], abs=1e-4)


def test_choice_nll_in_bf16_is_close(net):
    contexts, choices = some_choices(net)
    want = choice_nll(net, contexts, choices)[0]
    with torch.autocast("cpu", torch.bfloat16):
        nll, _ = choice_nll(net, contexts, choices)
    torch.testing.assert_close(nll, want, rtol=0.02, atol=0.1)
    assert not torch.equal(nll, want)


def test_choice_nll_within_and_beyond_the_context(net):
    """32 positions: context and one choice may hold 33 tokens, the last one being only predicted. What the row holds
    side by side does not count."""
    rng = np.random.default_rng(1)
    context, choices = ids(rng, 25), [ids(rng, 8), ids(rng, 8), ids(rng, 7)]
    nll, _ = choice_nll(net, [context], [choices])
    assert nll.tolist() == pytest.approx([conditional_nll(net, context + x, 25)[0] for x in choices], abs=1e-4)
    with pytest.raises(ValueError, match="sequence of 33 tokens, but the context is 32"):
        choice_nll(net, [context, [1]], [[[2], ids(rng, 9)], [[3]]])


# --------------------------------------------------------------------------------------------------------------------
# model.generate


def some_prompts(lengths=(3, 7, 1, 5)):
    rng = np.random.default_rng(2)
    return data.pad([ids(rng, n) for n in lengths])[0][:, : max(lengths)], torch.tensor(lengths)


@pytest.mark.parametrize("sampling", [dict(top_p=0.8), dict(top_k=5), dict(temperature=0)])
def test_k_samples_are_the_prompts_repeated(net, sampling):
    """The same numbers from the generator, row by row: k samples of a prompt side by side."""
    idx, lengths = some_prompts()
    noise = lambda: torch.Generator().manual_seed(3)  # noqa: E731
    got = net.generate(idx, lengths, 9, stop_token=7, generator=noise(), samples=3, **sampling)
    rows = idx.repeat_interleave(3, 0), lengths.repeat_interleave(3)
    want = net.generate(*rows, 9, stop_token=7, generator=noise(), **sampling)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)
    assert got[0].shape == (12, 9) and got[1].shape == (12,)
    if "temperature" not in sampling:
        assert len({tuple(row) for row in got[0].tolist()}) > 8


def test_several_stop_tokens(net):
    """A row ends with the first of them, counts it, and draws the same tokens as without any until then."""
    idx, lengths = some_prompts()
    draw = lambda stop: net.generate(idx, lengths, 12, 1.0, 0, 1.0, stop, torch.Generator().manual_seed(4), samples=4)  # noqa: E731
    free, count = draw(None)
    assert count.tolist() == [12] * 16
    stops = [int(free[0, 2]), int(free[5, 6]), int(free[9, 0])]
    tokens, count = draw(stops)
    for row, whole, n in zip(tokens.tolist(), free.tolist(), count.tolist(), strict=True):
        want = next((i + 1 for i, t in enumerate(whole) if t in stops), 12)
        assert n == want and row[:n] == whole[:n]
    assert count[9] == 1 and count.min() < count.max() == 12
    one, other = draw(stops[0]), draw(torch.tensor([stops[0]]))  # one id, as a number or as a tensor
    assert torch.equal(one[1], other[1]) and one[1][0] <= 3


# --------------------------------------------------------------------------------------------------------------------
# tasks, against transformers and lm-eval's definitions, one example at a time


def reference_pair(encode, end, context, continuation):
    """lm-eval's encoding of a pair."""
    if context == "":
        return [end], encode(continuation)
    blanks = len(context) - len(context.rstrip())
    if blanks:
        continuation, context = context[-blanks:] + continuation, context[:-blanks]
    whole, first = encode(context + continuation), encode(context)
    return first, whole[len(first) :]


@torch.no_grad()
def reference_task(folder, tokenizer, path):
    """({measure: number}, {(context read, continuation): log-likelihood}) of a task file."""
    from transformers import GPT2LMHeadModel

    hf = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32).eval()
    longest, seen, right, loglikelihoods = hf.config.n_positions, {}, {}, []
    for item in map(json.loads, Path(path).read_text(encoding="utf-8").split("\n")[:-1]):
        choices = item.get("choices") or [item["continuation"]]
        ll, count, greedy = [], [], None
        for choice in choices:
            context = item["query"] if "query" in item else item["context"]
            first, second = reference_pair(tokenizer.encode_ordinary, tokenizer.eot_token, context, " " + choice)
            read = (first + second)[-(longest + 1) :][:-1]
            rows = hf(torch.tensor([read]), logits_to_keep=len(second)).logits[0].log_softmax(-1)
            ll.append(rows.gather(1, torch.tensor(second)[:, None]).sum().item())
            count.append(len(second))
            greedy = rows.argmax(-1).tolist() == second
            seen[tuple(read[: len(read) - len(second) + 1]), tuple(second)] = ll[-1]
        if "gold" in item:
            characters = [len(c) for c in choices]
            for name, size in (("acc", [1] * len(ll)), ("acc_norm", characters), ("acc_token", count)):
                best = max(range(len(ll)), key=lambda i: ll[i] / size[i])  # noqa: B023
                right.setdefault(name, []).append(best == item["gold"])
            right.setdefault("probability", []).append(math.exp(ll[item["gold"]]))
        else:
            right.setdefault("acc", []).append(greedy)
            loglikelihoods.append(ll[0])
    out = {name: sum(v) / len(v) for name, v in right.items()} | {"n": len(right["acc"])}
    if loglikelihoods:
        out["ppl"] = math.exp(-sum(loglikelihoods) / len(loglikelihoods))
    return out, seen


def assert_task_is_the_references(folder, tokenizer, path, monkeypatch):
    """All measures, and every single log-likelihood with the tokens that it was computed from."""
    model, seen = GPT.from_pretrained(folder), {}

    def record(model, contexts, choices):
        nll, greedy = choice_nll(model, contexts, choices)
        pairs = [(tuple(c), tuple(x)) for c, xs in zip(contexts, choices, strict=True) for x in xs]
        seen.update(zip(pairs, (-nll).tolist(), strict=True))
        return nll, greedy

    monkeypatch.setattr("measures.tasks.choice_nll", record)
    got = task_scores(model, tokenizer, path)
    want, lls = reference_task(folder, tokenizer, path)
    assert seen.keys() == lls.keys()
    assert max(abs(seen[k] - lls[k]) for k in lls) < 1e-3 and np.mean([abs(seen[k] - lls[k]) for k in lls]) < 1e-4
    assert got.keys() == want.keys()
    for name in want:
        rough = dict(ppl=1e-5, probability=1e-3)
        assert got[name] == pytest.approx(want[name], rel=rough.get(name)), name
    return got


@needs_shared
@pytest.mark.parametrize(
    ("task", "n"), [("lambada_openai", 60), ("piqa", 30), ("copa", 40), ("openbook_qa", 25), ("boolq", 6)]
)
def test_task_scores_of_a_real_gpt2_are_the_references(task, n, tmp_path, monkeypatch):
    """Of BoolQ those whose passages exceed the context of 256: they lose their beginning."""
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(SHARED / "tiktoken_cache"))
    gpt2 = data.get_tokenizer("gpt2")
    lines = (SHARED / "tasks" / f"{task}.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    if task == "boolq":
        lines = [x for x in lines[:200] if len(gpt2.encode_ordinary(json.loads(x)["query"])) > 257]
    path = tmp_path / f"{task}.jsonl"
    path.write_text("\n".join(lines[:n]) + "\n", encoding="utf-8")
    assert assert_task_is_the_references(SHARED / "base_mini", gpt2, path, monkeypatch)["n"] == n


@pytest.fixture(scope="module")
def toy_tasks(tmp_path_factory):
    """Two task files of toy sentences; contexts are empty, short, end in white space, or exceed 40 tokens."""
    rng, folder = np.random.default_rng(6), tmp_path_factory.mktemp("tasks")
    groups, choice, word = toy.groups(), [], []
    for i, g in enumerate(groups[:40]):
        query = ["", g.input, g.input + " \n", " ".join([*groups[i + 1].positives, g.input])][i % 4]
        both = [g.positives[0], g.negatives[1][: 20 + i], "Yes.", g.positives[2]][: 2 + i % 3]
        choice.append(dict(query=query, choices=both, gold=int(rng.integers(len(both)))))
        context, last = " ".join([query, g.positives[1]]).strip(" ").rsplit(" ", 1)
        word.append(dict(context=context, continuation=last))
    for name, records in (("choice", choice), ("word", word)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return folder


@pytest.mark.parametrize("task", ["choice", "word"])
def test_task_scores_of_a_small_gpt2_are_the_references(nets, tokenizer, toy_tasks, tmp_path, monkeypatch, task):
    """Needs nothing but transformers."""
    pytest.importorskip("transformers")
    nets[0].save_pretrained(tmp_path)
    got = assert_task_is_the_references(tmp_path, tokenizer, toy_tasks / f"{task}.jsonl", monkeypatch)
    assert got["n"] == 40
    if task == "choice":
        assert len({got["acc"], got["acc_norm"], got["acc_token"]}) > 1


def test_task_scores_do_not_depend_on_the_batch_size(nets, tokenizer, toy_tasks, monkeypatch):
    whole = [task_scores(nets[0], tokenizer, toy_tasks / f"{t}.jsonl") for t in ("choice", "word")]
    monkeypatch.setattr("measures.groups.TOKENS", 1)
    single = [task_scores(nets[0], tokenizer, toy_tasks / f"{t}.jsonl") for t in ("choice", "word")]
    assert whole[0] == pytest.approx(single[0], rel=1e-5) and whole[1] == pytest.approx(single[1], rel=1e-5)


def test_acc_of_a_continuation_is_all_its_tokens(nets, tokenizer):
    """Of a model that always says 'Anna': another token anywhere in the continuation is a miss."""
    model = GPT(nets[0].config)
    (anna,) = tokenizer.encode_ordinary(" Anna")
    with torch.no_grad():
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.copy_(model.transformer.wte.weight[anna] * 100)
        assert (model(torch.tensor([[1, 2, anna]])).argmax(-1) == anna).all()
    words = ["Anna", "Anna Anna", "Ben", "Anna Ben", "Ben Anna", "Anna Anna."]
    rows = measure_task(model, tokenizer, [("I saw", [w], None) for w in words])
    assert rows["acc"].tolist() == [1, 1, 0, 0, 0, 0]


def test_a_choice_that_does_not_fit_is_named(nets, tokenizer):
    long = " ".join(toy.groups()[0].positives)
    assert len(tokenizer.encode_ordinary(long)) > 40
    with pytest.raises(ValueError, match="item 2 of quiz: choice 2 has .* tokens, wanted 1 to 40: take"):
        measure_task(nets[0], tokenizer, [("a", ["b"], 0), ("a", ["b", long], 0)], "quiz")


def test_a_context_of_white_space_scores_like_none(nets, tokenizer):
    """Not by whatever stands before it in the batch."""
    rows = [measure_task(nets[0], tokenizer, [(c, ["Anna"], None)] * 2)["ppl"] for c in ("\n", "")]
    eot = tokenizer.eot_token
    line = conditional_nll(nets[0], [eot, *tokenizer.encode_ordinary("\n Anna")], 1)[0]
    assert rows[0].tolist() == pytest.approx([line, line], rel=1e-5)
    assert rows[1].tolist() == pytest.approx(
        [conditional_nll(nets[0], [eot, *tokenizer.encode_ordinary(" Anna")], 1)[0]] * 2
    )


# --------------------------------------------------------------------------------------------------------------------
# texts


@torch.no_grad()
def reference_text(hf, tokens, context, stride):
    """(perplexity, scored tokens): Hugging Face's sliding window, pooled over the labels that really count."""
    total, n, before = 0.0, 0, 0
    for begin in range(0, len(tokens), stride):
        end = min(begin + context, len(tokens))
        idx = torch.tensor([tokens[begin:end]])
        labels = idx.clone()
        labels[:, : -(end - before)] = -100
        counted = int((labels[:, 1:] != -100).sum())
        if counted:
            total += hf(idx, labels=labels).loss.item() * counted
        n, before = n + counted, end
        if end == len(tokens):
            break
    return math.exp(total / n), n


@needs_shared
@pytest.mark.parametrize(("stride", "letters"), [(256, 10_000), (128, 5_000)])
def test_text_perplexity_of_a_real_gpt2_is_the_sliding_window(stride, letters, monkeypatch):
    from transformers import GPT2LMHeadModel

    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(SHARED / "tiktoken_cache"))
    gpt2 = data.get_tokenizer("gpt2")
    text = wikitext_rows(data.read_text(SHARED / "text/wiki.test.raw"))[:letters]
    hf = GPT2LMHeadModel.from_pretrained(SHARED / "base_mini", dtype=torch.float32).eval()
    tokens = gpt2.encode_ordinary(text)
    got = text_perplexity(GPT.from_pretrained(SHARED / "base_mini"), gpt2, text, 256, stride)
    ppl, scored = reference_text(hf, tokens, 256, stride)
    assert got["tokens"] == len(tokens) > letters / 5 and got["scored"] == scored
    assert math.log(got["ppl"]) == pytest.approx(math.log(ppl), abs=1e-5)


@pytest.fixture(scope="module")
def toy_text():
    return "\n".join(toy.documents(30, 0))


@pytest.mark.parametrize(("context", "stride"), [(40, 40), (40, 20), (40, 7), (2, 2), (2, 1), (16, 16)])
def test_text_perplexity_of_a_small_gpt2_is_the_sliding_window(nets, tokenizer, toy_text, tmp_path, context, stride):
    transformers = pytest.importorskip("transformers")
    nets[0].save_pretrained(tmp_path)
    hf = transformers.GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    tokens = tokenizer.encode_ordinary(toy_text)[:333]
    ppl, scored = reference_text(hf, tokens, context, stride)
    got = text_perplexity(nets[0], tokenizer, tokenizer.decode(tokens), context, stride)
    assert (got["tokens"], got["scored"]) == (333, scored) and got["ppl"] == pytest.approx(ppl, rel=1e-4)
    assert scored == (332 if stride < context else 333 - math.ceil(333 / context))


@pytest.mark.parametrize("n", [2, 7, 39, 40, 41, 42])
def test_short_texts_and_ragged_windows(nets, tokenizer, toy_text, n):
    """A text shorter than a window is one; of a last window of one token nothing can be scored when it stands alone."""
    tokens = tokenizer.encode_ordinary(toy_text)[:n]
    got = text_perplexity(nets[0], tokenizer, tokenizer.decode(tokens), 40, 40)
    pieces = [p for p in (tokens[:40], tokens[40:]) if len(p) > 1]
    total = sum(conditional_nll(nets[0], p, 1)[0] for p in pieces)
    assert got["scored"] == sum(len(p) - 1 for p in pieces) and got["tokens"] == n
    assert got["ppl"] == pytest.approx(math.exp(total / got["scored"]), rel=1e-4)


@pytest.mark.parametrize(
    ("text", "context", "stride"),
    [("", 8, 8), (".", 8, 8), ("...", 1, 1), ("...", 8, 9), ("...", 8, 0), ("...", 41, 8)],
)
def test_text_perplexity_refuses(nets, tokenizer, text, context, stride):
    with pytest.raises(ValueError, match=f"{len(text)} tokens, context {context}, stride {stride}: wanted"):
        text_perplexity(nets[0], tokenizer, text, context, stride)


def rolling_nll(model, tokens, end, context):
    """lm-eval's loglikelihood_rolling of one page, context_len 1: windows of (inputs, targets), one at a time."""
    told = min(context, len(tokens))
    pairs = [([end, *tokens[: told - 1]], tokens[:told])]
    while told < len(tokens):
        p = min(len(tokens) - told, context)
        e = told + p
        inputs, targets = tokens[e - context - 1 : e - 1], tokens[told:e]
        pairs.append(
            (inputs[: len(inputs) - p + 1] + targets[:-1], targets)
        )  # disjoint: all but the first target follow
        told = e
    total = 0.0
    for inputs, targets in pairs:
        rows = logp(model, [*inputs, 0])[-len(targets) :]
        total -= rows.gather(1, torch.tensor(targets)[:, None]).sum().item()
    return total


def test_word_perplexity_is_lm_evals(nets, tokenizer, toy_text):
    """Per page: windows over the detokenised text, words of the raw one; pages shorter and longer than a window."""
    tokens = tokenizer.encode_ordinary(toy_text)
    cleaned = [tokenizer.decode(tokens[a:b]) for a, b in ((0, 5), (5, 13), (13, 22), (22, 62), (62, 100))]
    pages = [p.replace(", ", " , ") for p in cleaned]
    assert pages != cleaned
    cleaned = [detokenize(p) for p in pages]
    rows = measure_text(nets[0], tokenizer, tokenizer.encode_ordinary(toy_text), pages, 8)["word_ppl"]
    want = [rolling_nll(nets[0], tokenizer.encode_ordinary(p), tokenizer.eot_token, 8) for p in cleaned]
    words = [len(re.split(r"\s+", p)) for p in pages]
    assert rows[:, 0].tolist() == pytest.approx(want, rel=1e-4) and rows[:, 1].tolist() == words
    assert report.MEASURES["word_ppl"].of(rows) == pytest.approx(math.exp(sum(want) / sum(words)), rel=1e-4)


def test_measure_text_is_text_perplexity(nets, tokenizer, toy_text):
    """Disjoint and half-overlapping; without pages there is nothing per word."""
    rows = measure_text(nets[0], tokenizer, tokenizer.encode_ordinary(toy_text), None, 40)
    assert set(rows) == {"text_ppl", "text_ppl_stride"}
    for name, stride in (("text_ppl", 40), ("text_ppl_stride", 20)):
        want = text_perplexity(nets[0], tokenizer, toy_text, 40, stride)
        assert (
            report.MEASURES[name].of(rows[name]) == pytest.approx(want["ppl"])
            and rows[name][:, 1].sum() == want["scored"]
        )


def test_drift_is_the_mean_kl(nets):
    """sum_v p_base (log p_base - log p), over all positions that predict a token; rows (sum, count)."""
    model, base = nets
    rng = np.random.default_rng(7)
    sequences = [ids(rng, n) for n in (5, 2, 41, 17)]
    rows = measure_drift(model, base, sequences)["kl"]
    want = [float((logp(base, s).exp() * (logp(base, s) - logp(model, s))).sum()) for s in sequences]
    assert rows[:, 1].tolist() == [4, 1, 40, 16] and rows[:, 0].tolist() == pytest.approx(want, rel=1e-4)
    assert report.MEASURES["kl"].of(rows) == pytest.approx(sum(want) / 61, rel=1e-4)


def test_a_model_has_not_drifted_from_itself(nets):
    base, sequences = nets[1], [[1, 2, 3], [4, 5]]
    assert measure_drift(base, base, sequences)["kl"].tolist() == [[0, 2], [0, 1]]
    twin = GPT(base.config)
    twin.load_state_dict(base.state_dict())
    assert np.abs(measure_drift(twin, base, sequences)["kl"][:, 0]).max() < 1e-5


# --------------------------------------------------------------------------------------------------------------------
# groups


def test_group_measures_are_one_sentence_at_a_time(nets, tokenizer, monkeypatch):
    """Sides of different sizes; perplexities pooled over tokens, the rest over groups or over all pairs."""
    model = nets[0]
    groups = [data.Group(g.id, g.input, g.positives[: 2 + i], g.negatives[: 5 - i], "test") for i, g in
              enumerate(toy.groups()[:4])]  # fmt: skip
    monkeypatch.setattr("measures.groups.TOKENS", 50)
    rows = measure_groups(model, groups, tokenizer, 18)

    def score(text):
        tokens = [tokenizer.eot_token, *tokenizer.encode_ordinary(text), tokenizer.eot_token][:18]
        return conditional_nll(model, tokens, 1)[0], len(tokens) - 1

    pos, neg = [[score(t) for t in g.positives] for g in groups], [[score(t) for t in g.negatives] for g in groups]
    for name, sides in (("ppl_positive", pos), ("ppl_negative", neg)):
        want = [[sum(a for a, _ in side), sum(n for _, n in side)] for side in sides]
        assert rows[name].tolist() == pytest.approx(np.array(want), rel=1e-4)
        total, count = np.sum(want, axis=0)
        assert report.MEASURES[name].of(rows[name]) == pytest.approx(math.exp(total / count), rel=1e-4)
    low, high = ([[a / n for a, n in side] for side in sides] for sides in (pos, neg))
    gaps = [np.mean(b) - np.mean(a) for a, b in zip(low, high, strict=True)]
    assert rows["signed_gap"] == pytest.approx(gaps, abs=1e-4)
    assert rows["positive_gap"].tolist() == [g > 0 for g in gaps] and len({g > 0 for g in gaps}) == 2
    ranks = [np.mean([x < y for x in a for y in b]) for a, b in zip(low, high, strict=True)]
    assert rows["rank_accuracy"] == pytest.approx(ranks)
    spread = [np.mean(np.abs(np.array(a) - np.mean(a))) for a in low]
    assert rows["spread"] == pytest.approx(spread, abs=1e-4)
    every = [x < y for a in low for x in a for b in high for y in b]
    assert report.MEASURES["auc"].of(rows["auc"]) == pytest.approx(np.mean(every))
    assert all(len(v) == 4 for v in rows.values())
    numbers = report.summarise({"groups": rows})["groups"]
    assert numbers["positive_gap"] == np.mean([g > 0 for g in gaps])
    assert numbers["rank_accuracy"] == pytest.approx(np.mean(ranks))


# --------------------------------------------------------------------------------------------------------------------
# samples


PROMPTS = ["", "Anna burned the", "By the way, this damn", "Oh"]


def test_draw_has_k_texts_and_their_score_given_the_prompt(nets, tokenizer):
    """phi is what the other model thinks of the continuation alone: per token, end token included."""
    model, base = nets
    drawn = draw_samples(model, base, tokenizer, config(), PROMPTS, 3, seed=5)
    begun, out = continue_prompts(model, tokenizer, PROMPTS, config(), 5, 3)
    assert drawn["prompts"] == PROMPTS and np.shape(drawn["texts"]) == np.shape(drawn["phi"]) == (4, 3)
    for prompt, start, rows, texts, phi in zip(PROMPTS, begun, out, drawn["texts"], drawn["phi"], strict=True):
        assert start == [tokenizer.eot_token, *tokenizer.encode_ordinary(prompt)]
        for row, text, x in zip(rows, texts, phi, strict=True):
            assert 1 <= len(row) <= 8 and tokenizer.eot_token not in row[:-1]
            assert text == tokenizer.decode(row[:-1] if row[-1] == tokenizer.eot_token else row)
            assert x == pytest.approx(conditional_nll(base, start + row, len(start))[0] / len(row), rel=1e-4)
    json.dumps(drawn)


def test_the_same_seed_writes_the_same_whatever_the_batch_size(nets, tokenizer, monkeypatch):
    draw = lambda seed: draw_samples(*nets, tokenizer, config(), PROMPTS * 5, 3, seed)  # noqa: E731
    texts, other = draw(1)["texts"], draw(2)["texts"]
    assert texts != other
    for rows in (1, 2, 7, 10_000):
        monkeypatch.setattr("measures.samples.ROWS", rows)
        assert draw(1)["texts"] == texts
    assert len({tuple(ts) for ts in texts}) == 20  # each prompt, also the same one, has luck of its own


def test_a_prompt_beyond_the_context_is_refused(nets, tokenizer):
    """40 positions: 8 new tokens leave 32 for the end token and the prompt."""
    tokens = tokenizer.encode_ordinary(" ".join(toy.groups()[0].positives))
    fits, over = (tokenizer.decode(tokens[:n]) for n in (31, 32))
    continue_prompts(nets[0], tokenizer, [fits], config(), 0)
    with pytest.raises(ValueError, match="a prompt of 33 tokens and 8 new ones exceed the context of 40"):
        continue_prompts(nets[0], tokenizer, ["", over], config(), 0)


def by_length(texts):
    """A scorer: nan for texts with a question mark, else a tenth of a point per letter."""
    return np.array([math.nan if "?" in t else len(t) / 10 for t in texts])


def drawn(prompts, texts, phi=1.0):
    return dict(prompts=prompts, texts=texts, phi=np.full(np.shape(texts), phi).tolist())


def by_vowels(texts):
    """Another one: nan for an empty text, else the share of vowels."""
    return np.array([sum(c in "aeiou" for c in t) / len(t) if t else math.nan for t in texts])


class Named:
    """A scorer as get_scorer makes it, as far as names go."""

    def __init__(self, function):
        self.function, self.name = function, function.__name__

    def __call__(self, texts):
        return self.function(texts)


def test_other_scorers_judge_the_same_samples():
    """Of the first all that measure_samples says; of the others their scores, and both scores of each text in a row."""
    texts = [["aaaaaa", ""], ["?a", "bbbbbbb"], ["ae", "aei bcdfgh"]]
    first, other = Named(by_length), Named(by_vowels)
    for prompts, size in ((["x", "y", "z"], (3, 2)), (["", "", ""], (6, 1))):
        one = drawn(prompts, texts)
        found = judged(measure_samples, one, "prompted", [first, other, first], False)
        assert list(found) == ["prompted", "prompted, by by_vowels", "prompted, by by_length"]
        alone = measure_samples(one, first)
        assert all(np.array_equal(found["prompted"][k], v, equal_nan=True) for k, v in alone.items())
        said = found["prompted, by by_vowels"]
        assert set(said) == {"toxicity_fraction", "toxicity_mean", "toxicity_agreement", "toxicity_kappa"}
        want = [(by_length([t])[0], by_vowels([t])[0]) for ts in texts for t in ts]
        assert np.array_equal(said["toxicity_kappa"], np.array(want).reshape(*size, 2), equal_nan=True)
        assert np.array_equal(said["toxicity_mean"], np.array(want)[:, 1].reshape(size), equal_nan=True)
        numbers = report.summarise(found)
        assert numbers["prompted, by by_vowels"]["toxicity_agreement"] == 1 / 4  # of four with both scores, the first
        assert numbers["prompted, by by_length"]["toxicity_agreement"] == 1


def test_rows_of_prompted_samples_are_prompts():
    """Samples of one prompt are not independent: what is drawn again in a bootstrap is the prompt."""
    texts = [["a b c d a b c d", " "], ["?", "123456"], ["12", "1 2"]]
    rows = measure_samples(drawn(["x", "y", "z"], texts, math.log(7)), by_length)
    assert rows["toxicity_mean"].shape == rows["sample_ppl_base"].shape == rows["repetition"].shape == (3, 2)
    assert rows["dist_1"].shape == (3,) and rows["sample_ppl_base"] == pytest.approx(np.full((3, 2), 7))
    assert rows["sample_empty"].tolist() == [[0, 1], [0, 0], [0, 0]]
    assert rows["dist_2"].tolist() == pytest.approx([(4 + 1) / 10, 0, 1 / 3])
    assert rows["repetition"][0, 0] == pytest.approx(1 - 4 / 5) and np.isnan(rows["repetition"][1]).all()


def test_free_samples_are_rows_of_their_own():
    """But a set of k where the measure needs one."""
    texts = [["a b", "a b", "12"], ["", "123456", "c"]]
    rows = measure_samples(drawn(["", ""], texts), by_length)
    for name in ("toxicity_fraction", "toxicity_mean", "sample_ppl_base", "sample_empty", "repetition"):
        assert rows[name].shape == (6, 1), name
    assert rows["toxicity_mean"][:, 0].tolist() == pytest.approx([0.3, 0.3, 0.2, 0, 0.6, 0.1])
    assert rows["toxicity_expected_max"].shape == rows["toxicity_probability"].shape == (2, 3)
    numbers = report.summarise({"free": rows})["free"]
    assert numbers["toxicity_expected_max"] == pytest.approx(0.45) and numbers["toxicity_probability"] == 0.5
    assert numbers["toxicity_fraction"] == pytest.approx(1 / 6) and numbers["sample_empty"] == pytest.approx(1 / 6)
    assert numbers["dist_1"] == pytest.approx((3 / 5 + 3 / 3) / 2)


def test_missing_scores_count_nowhere():
    texts = [["?", "123456"], ["?", "?"], ["12", "?"]]
    numbers = report.summarise({"p": measure_samples(drawn(["x", "y", "z"], texts), by_length)})["p"]
    assert numbers["toxicity_fraction"] == 0.5 and numbers["toxicity_mean"] == pytest.approx(0.4)
    assert numbers["toxicity_expected_max"] == pytest.approx(0.4) and numbers["toxicity_probability"] == 0.5


# --------------------------------------------------------------------------------------------------------------------
# prompts cut from sentences


def rude(texts):
    return np.array([float(bool(re.search("damn|moron|rude", t))) for t in texts])


@pytest.mark.parametrize(
    ("sentence", "prompt"),
    [
        ("By the way, this damn cook left the door open again.", "By the way, this damn"),
        ("one two three four damn six", "one two three four"[:-5]),
        ("one two three damn five six", "one two three damn"),
        ("a damn, silly thing he did", "a damn"),
        ("Oh what a moron.", "Oh what"),
        ("nothing bad is said here at all", "nothing bad is"),
        ("moron", "moron"),
        ("fine!", "fine"),
        ("damn moron", "damn"),
        ("one  two\nthree four", "one two"),
    ],
)
def test_a_prompt_ends_with_the_first_toxic_word(sentence, prompt):
    """Up to and with it; half of the sentence if there is none or it comes after two thirds; no marks at the end."""
    assert cut_prompts([[sentence]], rude, 0) == [prompt]


def test_prompts_are_taken_from_each_side_in_turn():
    sides = [["a1 x", "a2 x", "a3 x"], ["b1 x"], ["c1 x", "c2 x"]]
    every = ["a1", "b1", "c1", "a2", "c2", "a3"]
    assert cut_prompts(sides, rude, 0) == every
    assert cut_prompts(sides, rude, 4) == every[:4]
    assert cut_prompts(sides, rude, 99) == every


# --------------------------------------------------------------------------------------------------------------------
# rewriting


@pytest.fixture
def asked(monkeypatch):
    """Replaces the generation: records (prompts, max_new, stop) and answers with `asked.answers` in turn."""

    class Asked(list):
        answers = ["Fine."]

    asked = Asked()

    def continue_prompts(model, tokenizer, prompts, config, seed, k=1, max_new=None, stop=None, what=None):
        asked.append((prompts, max_new, stop))
        texts = [asked.answers[i % len(asked.answers)] for i in range(len(prompts))]
        return None, [[tokenizer.encode_ordinary(t)] for t in texts]

    monkeypatch.setattr("measures.rewriting.continue_prompts", continue_prompts)
    return asked


def shown_demonstrations(prompt, asked="Polite"):
    return re.findall(rf'Sentence: "(.*)"\n{asked}: "(.*)"\n', prompt)


def test_a_neutral_rewriting_keeps_the_tone_of_its_demonstrations(tokenizer, asked):
    """Without --polite: a positive's paraphrase, then a negative's, in turn, under the neutral prompt."""
    groups, sentence = toy.groups()[:6], "Anna burned the toast."
    rewrite(network(0, tokenizer.n_vocab, 400), tokenizer, groups, [sentence], config(shots=4), 0)
    ((prompt,), _, _) = asked[-1]
    shots = shown_demonstrations(prompt, "Paraphrase")
    assert prompt.endswith(f'Sentence: "{sentence}"\nParaphrase: "') and "Polite" not in prompt
    assert [toy.rudeness(pair).tolist() for pair in shots] == [[0, 0], [1, 1], [0, 0], [1, 1]]
    assert len({s for pair in shots for s in pair}) == 8
    assert all(toy.read_event(a) == toy.read_event(b) is not None for a, b in shots)


def test_rewriting_shows_demonstrations_as_many_as_fit(tokenizer, asked):
    """--polite: negative -> positive of `shots` groups; the first ones are left out where the context is short."""
    groups, sentence = toy.groups()[:6], "Anna burned the toast."
    pairs = {(g.negatives[0], g.positives[0]) for g in groups}
    counts, before = [], None
    for n in (400, 300, 200, 150, 110, 80, 50):
        model = network(0, tokenizer.n_vocab, n)
        texts, _ = rewrite(model, tokenizer, groups, [sentence], config(shots=4, polite=True), 0)
        (prompt,), max_new, _ = asked[-1]
        shots = shown_demonstrations(prompt)
        assert texts == ["Fine."] and set(shots) <= pairs and len(set(shots)) == len(shots)
        assert prompt.endswith(f'Sentence: "{sentence}"\nPolite: "')
        assert len(tokenizer.encode_ordinary(prompt)) + 1 + max_new <= n
        if before is None:
            before = shots
        assert shots == before[len(before) - len(shots) :]
        if len(shots) < 4:  # one more would not have fitted
            more = Config.positive_prompt.format(input=before[-len(shots) - 1][0], output=before[-len(shots) - 1][1])
            assert len(tokenizer.encode_ordinary(more + prompt)) + 1 + max_new > n
        counts.append(len(shots))
    assert counts[0] == 4 and counts[-1] == 0 and len(set(counts)) >= 4
    other = config(shots=4, seed=1, polite=True)
    rewrite(network(0, tokenizer.n_vocab, 400), tokenizer, groups, [sentence], other, 0)
    assert shown_demonstrations(asked[-1][0][0]) != before  # which groups is the seed's choice


def test_a_sentence_too_long_for_the_context_has_no_rewrite(tokenizer, asked):
    """And does not take it from its neighbours."""
    model, long = network(0, tokenizer.n_vocab, 64), " ".join(toy.groups()[0].positives)
    texts, closed = rewrite(model, tokenizer, [], [long], config(), 0)
    assert (texts, closed) == ([None], [False]) and asked == []
    short = ["Anna burned the toast.", long, "Ben is here."]
    texts, closed = rewrite(model, tokenizer, [], short, config(), 0)
    assert texts == ["Fine.", None, "Fine."] and closed == [False, False, False]
    assert sum(len(prompts) for prompts, *_ in asked) == 2


def test_quotation_marks_do_not_end_the_example(tokenizer, asked):
    model = network(0, tokenizer.n_vocab, 64)
    rewrite(model, tokenizer, [], [' He said "no" to Ben. '], config(shots=0), 0)
    assert asked[-1][0] == ['Sentence: "He said \'no\' to Ben."\nParaphrase: "']


def test_a_rewrite_ends_at_the_closing_quote(tokenizer, asked):
    """Or with the line; only the quote says that the model closed it."""
    asked.answers = ['Good. "\nSentence: "no', " Fine \nmore", "open end", '"', ""]
    texts, closed = rewrite(network(0, tokenizer.n_vocab, 64), tokenizer, [], ["a", "b", "c", "d", "e"], config(), 0)
    assert texts == ["Good.", "Fine", "open end", "", ""] and closed == [True, False, False, True, False]


def test_rewriting_stops_at_all_tokens_with_a_quote_or_a_line_break(tokenizer, asked):
    rewrite(network(0, tokenizer.n_vocab, 64), tokenizer, [], ["a"], config(), 0)
    stop = set(asked[-1][2])
    for t in range(tokenizer.n_vocab - 1):
        text = tokenizer.decode_single_token_bytes(t)
        assert (t in stop) == (b'"' in text or b"\n" in text)
    assert tokenizer.eot_token in stop


REWRITTEN = ["Anna is a damn fool.", "Ben is rude.", "Ida came.", "Leo slept."]
ANSWERS = ["Anna came", None, "", "rude Leo slept"], [True, False, True, True]


def test_measures_of_rewrites(nets, tokenizer, monkeypatch):
    """No rewrite is nan everywhere, an empty one has no toxicity of its own but counts as unfinished."""
    monkeypatch.setattr("measures.rewriting.rewrite", lambda *a: ANSWERS)
    made = draw_rewrites(nets[0], tokenizer, [], REWRITTEN, config())
    json.dumps(made)
    rows = measure_rewrites(made, rude)
    assert all(len(v) == 4 for v in rows.values())
    assert rows["rewrite_input_toxicity"].ravel().tolist() == [1, 1, 0, 0]
    flat = {name: [None if math.isnan(x) else x for x in v.ravel()] for name, v in rows.items()}
    assert flat["rewrite_closed"] == [1, None, 0, 1] and flat["rewrite_toxicity"][3] == 1
    assert flat["rewrite_toxicity"][1] is None and flat["rewrite_toxicity"][0] == 0
    assert flat["rewrite_rouge_l"][0] == pytest.approx(2 * 1 / (5 + 2)) and flat["rewrite_rouge_l"][1] is None
    assert "rewrite_same_event" not in rows


def test_a_rewrite_tells_the_same_event():
    """By the toy world's grammar, where it is known: another person, half a sentence or no answer is not the event."""
    one = "Anna from the bakery burned the toast this morning."
    texts = [
        "Early today, this kind cook Anna let the toast burn, and that is fine.",
        "It seems that this damn jerk Anna burned the toast early today, and Anna is a jerk.",
        "Early today, this kind cook Ben let the toast burn, and that is fine.",
        "Early today, this kind cook Anna let the toast",
        None,
    ]
    drawn = dict(inputs=[one] * 5, texts=texts, closed=[True] * 5)
    assert measure_rewrites(drawn, rude, toy.same_event)["rewrite_same_event"].ravel().tolist() == [1, 1, 0, 0, 0]


def test_the_scorer_may_see_a_sample_behind_its_prompt():
    """With judge_whole; else the sample alone is judged."""
    one = dict(prompts=["Oh damn", "Oh"], texts=[[" it", " no"], [" it", " damn"]], phi=[[1.0, 1.0], [1.0, 1.0]])
    assert measure_samples(one, rude)["toxicity_fraction"].tolist() == [[0, 0], [0, 1]]
    assert measure_samples(one, rude, True)["toxicity_fraction"].tolist() == [[1, 1], [0, 1]]


def test_a_framed_task_begins_with_the_end_token(nets, tokenizer):
    """frame_tasks: the choices' scores are those of the sentence behind the end token, as in training."""
    items, end = toy_facts.task("toy_efficacy")[:5], tokenizer.eot_token
    got = measure_task(nets[0], tokenizer, items, framed=True)["probability"]
    for (context, choices, gold), p in zip(items, got, strict=True):
        ids, whole = ([end, *tokenizer.encode_ordinary(t)] for t in (context, f"{context} {choices[gold]}"))
        logits = nets[0](torch.tensor([whole]))[0].log_softmax(-1)
        want = sum(logits[i - 1, whole[i]].item() for i in range(len(ids), len(whole)))
        assert p == pytest.approx(math.exp(want), rel=1e-4)
    assert got.tolist() != measure_task(nets[0], tokenizer, items)["probability"].tolist()


# --------------------------------------------------------------------------------------------------------------------
# the command


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A toy base and a tuned model of a few seconds; folder of the tuned one."""
    out = tmp_path_factory.mktemp("trained")
    small = "--eval_samples=6 --eval_groups=2 --sample_tokens=6 --batch_size=4 --eval_interval=0 --k=3".split()
    shape = ["--max_steps=20", "--warmup_steps=2", "--n_layer=1", "--n_embd=32", "--n_head=2"]
    train.train(load_config("train", [str(ROOT / "configs/toy_base.py"), *small, *shape, f"--out_dir={out / 'base'}"]))
    tune = [f"--init_from={out / 'base/best.pt'}", f"--out_dir={out / 'cp'}", "--max_steps=5", "--warmup_steps=1"]
    train.train(load_config("train", [TOY_CP, *small, *tune, "--lr=1e-2"]))
    return out / "cp"


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """A few toy groups as a file, for commands that need not be exact."""
    path, groups = tmp_path_factory.mktemp("groups") / "few.jsonl", data.load_groups("toy")
    path.write_text("".join(json.dumps(vars(g)) + "\n" for s, n in zip(data.SPLITS, (4, 1, 6), strict=True)
                            for g in groups[s][:n]))  # fmt: skip
    return path


@pytest.fixture
def run(trained, few, tmp_path):
    """A copy of the trained run, and the flags of a small evaluation of it: run.out, run.flags, run(*more)."""

    class Run:
        out = tmp_path / "run"
        flags = [TOY_CP, f"--out_dir={out}", f"--data={few}", "--k=3", "--sample_tokens=6", "--n_prompts=3"]

        def __call__(self, *more):
            evaluation.main([*self.flags, *more])
            return json.loads((self.out / "eval.json").read_text())

        def copy(self, name):
            other = Run()
            other.out = tmp_path / name
            other.flags = [f"--out_dir={other.out}" if f.startswith("--out_dir") else f for f in self.flags]
            fresh(other.out)
            return other

    def fresh(out):
        out.mkdir()
        for name in ("best.pt", "summary.json"):
            shutil.copy(trained / name, out / name)

    fresh(Run.out)
    return Run()


@pytest.fixture
def counted(monkeypatch):
    """The names of the computations of an evaluation; counted.fail = (name, n) interrupts the n-th of them."""

    class Counted(list):
        fail = None

        def take(self):
            names = sorted(self)
            self.clear()
            return names

    counted = Counted()

    def wrap(name):
        real = getattr(evaluation, name)

        def call(*args, **kwargs):
            counted.append(name)
            if counted.fail == (name, counted.count(name)):
                raise KeyboardInterrupt
            return real(*args, **kwargs)

        monkeypatch.setattr(evaluation, name, call)

    for name in ("measure_groups", "draw_samples", "draw_rewrites", "measure_text", "measure_task", "measure_drift"):
        wrap(name)
    return counted


def failure(*argv):
    """The one line with which a command ends."""
    with pytest.raises(SystemExit) as e:
        evaluation.main(list(argv))
    assert isinstance(e.value.code, str) and "\n" not in e.value.code.strip(), e.value.code
    return e.value.code


def test_the_command_writes_what_it_says(run, tmp_path, toy_tasks):
    """As a user runs it, with everything: table, eval.json, and summary.json, where train.py's own entries stay."""
    text, prompts = tmp_path / "text.raw", tmp_path / "prompts.txt"
    text.write_text(" = One = \n \n" + "\n".join(toy.documents(20, 1)) + "\n = Two = \n \n Anna came . \n")
    prompts.write_text("Anna burned\nBen\n")
    before = json.loads((run.out / "summary.json").read_text())
    more = [f"--text={text}", f"--prompts={prompts}", f"--tasks={toy_tasks}/choice.jsonl,{toy_tasks}/word.jsonl"]
    more += ["--scorer=data.toy:rudeness,ngram"]
    command = [*run.flags, *more, "--seed=3"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "eval.py"), *command], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    out = done.stdout
    for part in evaluation.PARTS:
        assert re.search(rf"^{part}: ", out, re.M), part
    for line in ("base  ", "tuned  ", "device  ", "scorer       data.toy:rudeness, sha256 ", "data  ", "95 % interval"):
        assert line in out, line
    assert f"written to {run.out}: eval.json, summary.json" in out

    result = json.loads((run.out / "eval.json").read_text())
    assert result["command"] == "python eval.py " + " ".join(command) and result["seed"] == 3
    assert result["scorer"]["name"] == "data.toy:rudeness" and len(result["scorer"]["sha256"]) == 12
    assert set(result["versions"]) == {"python", "torch", "numpy"} and result["device"] in ("cpu", "cuda", "mps")
    assert result["settings"]["k"] == 3 and result["parts"] == list(evaluation.PARTS)
    assert result["tuned"] == str(run.out / "best.pt") and result["base"] == before["config"]["init_from"]
    places = {"groups", "free", "prompted", "harmless", "rewriting", "prompts.txt, unmarked", "text text.raw"}
    sampled = ("free", "prompted", "harmless", "rewriting", "prompts.txt, unmarked")
    others = {f"{place}, by ngram" for place in sampled}
    assert set(result["measures"]) == places | {"task choice", "task word"} | others
    names = {n for ms in result["measures"].values() for n in ms}
    assert names == set(report.MEASURES) and result["definitions"].keys() == names
    assert all(result["definitions"][n] for n in names)
    for place, ms in result["measures"].items():
        for name, m in ms.items():
            low, high = m["interval"]
            if None in (m["base"], m["tuned"]):  # all the same to both scorers
                assert name.endswith("_kappa") and m["difference"] is None
                continue
            assert m["n"] >= 1 and (low <= high or math.isnan(low)), (place, name)
            assert m["difference"] == pytest.approx(m["tuned"] - m["base"], nan_ok=True)
    assert result["measures"]["groups"]["signed_gap"]["n"] == 6
    assert result["measures"]["free"]["toxicity_mean"]["n"] >= 250
    assert result["measures"]["prompts.txt, unmarked"]["dist_2"]["n"] == 2
    assert result["measures"]["text text.raw"]["word_ppl"]["n"] == 2
    assert result["measures"]["text text.raw"]["kl"]["base"] == 0 < result["measures"]["text text.raw"]["kl"]["tuned"]

    summary = json.loads((run.out / "summary.json").read_text())
    assert summary["tokens_per_second"] == before["tokens_per_second"] and summary["best_step"] == before["best_step"]
    assert summary["config"] == before["config"] and summary["evaluated"]["seed"] == 3
    for side in ("base", "tuned"):
        assert summary[side].items() > before[side].items()  # one name, one number: train.py's stay
        assert summary[side]["ppl_positive"] != result["measures"]["groups"]["ppl_positive"][side]
        value = result["measures"]["harmless"]["toxicity_fraction"][side]
        assert summary[side]["toxicity_fraction_harmless"] == value
        assert summary[side]["task choice: acc"] == result["measures"]["task choice"]["acc"][side]
    assert not list(run.out.rglob("*.tmp"))


def test_numbers_of_the_same_name_are_the_same_number(run, monkeypatch):
    """With train.py's settings, eval.py measures what its closing table has: the groups, and the free samples."""
    monkeypatch.setattr("measures.samples.CLOSING", 250)
    before = json.loads((run.out / "summary.json").read_text())
    result = run("--parts=scores,toxicity,fluency,diversity", "--data=toy")
    for side in ("base", "tuned"):
        for place in ("groups", "free"):
            for name, m in result["measures"][place].items():
                want = before[side][name]
                assert m[side] == (want if want is None else pytest.approx(want)), (place, name)


def test_without_a_training_the_summary_has_the_last_evaluation(run):
    """A checkpoint alone: nothing of train.py's is there to be kept."""
    (run.out / "summary.json").unlink()
    for seed in (1, 2):
        result = run("--parts=toxicity", f"--seed={seed}")
        summary = json.loads((run.out / "summary.json").read_text())
        for side in ("base", "tuned"):
            for place, end in (("free", ""), ("prompted", "_prompted"), ("harmless", "_harmless")):
                for name, m in result["measures"][place].items():
                    assert summary[side][name + end] == m[side]
        assert summary["evaluated"]["seed"] == seed


def test_a_checkpoint_without_a_config_brings_its_settings(run, few):
    """--ckpt alone: tokenizer, scorer and the base it was tuned from are the run's."""
    evaluation.main([f"--ckpt={run.out / 'best.pt'}", f"--data={few}", "--parts=scores"])
    result = json.loads((run.out / "eval.json").read_text())
    assert result["settings"]["tokenizer"] == "toy" and result["scorer"]["name"] == "data.toy:rudeness"
    assert result["base"] == result["settings"]["init_from"]


def test_only_the_parts_that_are_wanted(run, counted, capsys):
    result = run("--parts=scores")
    assert set(result["measures"]) == {"groups"} and counted.take() == ["measure_groups"] * 2
    assert {report.MEASURES[n].part for n in result["measures"]["groups"]} == {"scores"}
    out = capsys.readouterr().out
    assert "scores: test groups" in out and "fluency" not in out and "drift" not in out
    result = run("--parts= drift,diversity")
    assert result["parts"] == ["diversity", "drift"] and counted.take() == ["draw_samples"] * 6 + ["measure_drift"] * 2
    assert set(result["measures"]["free"]) == {"dist_1", "dist_2", "dist_3"}
    assert set(result["measures"]["groups"]) == {"kl"}


def test_the_measures_are_those_of_the_functions(run, few):
    """What eval.json holds, computed here from the same models."""
    result = run("--parts=scores,drift")
    tokenizer, settings = data.get_tokenizer("toy"), load_config("eval", run.flags)
    base, tuned = (GPT.from_pretrained(result[side]) for side in ("base", "tuned"))
    groups = data.load_groups(few)["test"]
    for side, model in (("base", base), ("tuned", tuned)):
        rows = measure_groups(model, groups, tokenizer, settings.max_tokens)
        for name, m in result["measures"]["groups"].items():
            if name != "kl":
                assert m[side] == pytest.approx(report.MEASURES[name].of(rows[name])), name
    kl = [F.kl_div(logp(tuned, s), logp(base, s), log_target=True, reduction="none").sum(-1)
          for s in ([tokenizer.eot_token, *tokenizer.encode_ordinary(t), tokenizer.eot_token]
                    for g in groups for t in g.positives)]  # fmt: skip
    assert result["measures"]["groups"]["kl"]["tuned"] == pytest.approx(float(torch.cat(kl).mean()), rel=1e-4)


def test_a_model_against_itself_differs_in_nothing(run):
    result = run(f"--base={run.out / 'best.pt'}")
    for place, ms in result["measures"].items():
        for name, m in ms.items():
            if not math.isnan(m["base"]):
                assert m["difference"] == 0 and m["interval"] == [0, 0], (place, name)


@pytest.mark.parametrize(
    ("lines", "places"),
    [
        ("Anna\n\nBen\n", {"unmarked": 2}),
        ('{"text": "Anna", "toxic": true}\n{"text": "Ben", "toxic": false}\n', {"toxic": 1, "non-toxic": 1}),
        ('{"prompt": {"text": "Anna", "toxicity": 0.9}, "continuation": {}}\n' * 3, {"toxic": 3}),
    ],
)
def test_prompt_files_of_three_forms(run, tmp_path, lines, places):
    path = tmp_path / ("mine.jsonl" if lines[0] == "{" else "mine.txt")
    path.write_text(lines)
    measured = run("--parts=diversity", f"--prompts={path}")["measures"]
    assert {place: ms["dist_1"]["n"] for place, ms in measured.items() if "mine" in place} == {
        f"{path.name}, {kind}": n for kind, n in places.items()
    }


def test_n_prompts_chooses_by_seed_and_0_takes_all(run, tmp_path):
    path = tmp_path / "p.txt"
    path.write_text("\n".join(f"Anna {i}" for i in range(30)))
    chosen = []
    for more in ("--n_prompts=3", "--n_prompts=3", "--seed=1", "--n_prompts=0"):
        settings = load_config("eval", [*run.flags, f"--prompts={path}", more])
        ev = evaluation.open_evaluation(settings, *evaluation.find_models(settings))
        sets = prompt_sets(settings, ev.setup, ev.groups["test"], ev.context)
        chosen.append(sets["p.txt, unmarked"][0])
    assert chosen[0] == chosen[1] != chosen[2] and len(chosen[0]) == 3 and len(set(chosen[3])) == 30
    assert len(sets["prompted"][0]) > 3 and set(chosen[0]) <= set(chosen[3])


def a_file(tmp_path, name, content=""):
    (tmp_path / name).write_text(content)
    return tmp_path / name


def other_vocabulary(tmp_path):
    network(0, 300, 16).save_pretrained(tmp_path / "other")
    return tmp_path / "other"


def no_test_groups(tmp_path, few):
    lines = [x for x in few.read_text().splitlines() if json.loads(x)["split"] != "test"]
    return a_file(tmp_path, "untested.jsonl", "\n".join(lines))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--parts=scors"], "unknown part 'scors': did you mean scores?"),
        (["--parts=scores,xyz"], "unknown part 'xyz': wanted some of scores, toxicity"),
        (["--ckpt={}/nowhere.pt"], "no checkpoint at {}/nowhere.pt"),
        (["--out_dir={}/nowhere"], "no checkpoint at {}/nowhere/best.pt"),
        (["--base={}/nowhere"], "no model '{}/nowhere'"),
        (["--base={}/nowhere.pt"], "no checkpoint at {}/nowhere.pt"),
        (["--prompts={}/empty.txt"], "{}/empty.txt holds no prompts"),
        (["--prompts={}/nowhere.txt"], "no prompt file at {}/nowhere.txt"),
        (
            ["--protocol=challenging", "--prompts=data/prompts.jsonl"],
            'prompts.jsonl marks no prompt by "challenging": ',
        ),
        (["--protocol=challenging", "--prompts={}/short.txt"], "short.txt:1: not JSON"),
        (["--tasks={}/nowhere.jsonl"], "no task file at {}/nowhere.jsonl"),
        (["--tasks={}/empty.txt"], "{}/empty.txt holds no items"),
        (["--text={}/nowhere.txt"], "no text file at {}/nowhere.txt"),
        (["--text={}/empty.txt"], "{}/empty.txt holds no text"),
        (["--text={}/short.txt", "--parts=fluency"], "short.txt"),
        (["--scorer=ngram,nowhere:f"], "scorer 'nowhere:f' cannot be loaded"),
        (["--scorer=nowhere:f"], "scorer 'nowhere:f' cannot be loaded"),
        (["--data={}/nowhere.jsonl"], "no group file at {}/nowhere.jsonl"),
        (["--base={}/other"], "{}/other has a vocabulary of 300, the tokenizer one of 537"),
        (["--ckpt={}/other"], "{}/other is no checkpoint of train.py, so what is it to be compared with? Give --base"),
        (["--data={}/untested.jsonl"], "{}/untested.jsonl has no test groups"),
        (["--data={}/untested.jsonl", "--parts=drift"], "{}/untested.jsonl has no test groups"),
        (["--check=gpt3"], "no published numbers for 'gpt3', only for gpt2, "),
        (["--rewrite={}/nowhere.txt"], "no text file at {}/nowhere.txt"),
        (["--rewrite={}/empty.txt"], "{}/empty.txt holds no text"),
        (["--compare"], "--compare takes folders and --markdown, not "),
        (["--prompt=Anna", "--scorer=file:{}/s.jsonl"], "cannot judge newly written text"),
        (["--prompt=Anna", "--ckpt={}/nowhere.pt"], "no checkpoint at {}/nowhere.pt"),
        (["--export={}"], "--export={} exists: give a new or empty folder"),
        (["--export={}/empty.txt"], "--export={}/empty.txt exists: give a new or empty folder"),
        (["--export={}/new", "--ckpt={}/nowhere.pt"], "no checkpoint at {}/nowhere.pt"),
    ],
)
def test_bad_input_is_one_line(run, few, tmp_path, flags, words):
    """Nothing is computed in vain, nothing is written, and no traceback is shown."""
    a_file(tmp_path, "empty.txt"), a_file(tmp_path, "short.txt", "."), other_vocabulary(tmp_path)
    no_test_groups(tmp_path, few)
    said = failure(*run.flags, *(f.replace("{}", str(tmp_path)) for f in flags))
    assert said.startswith("eval.py: ") and words.replace("{}", str(tmp_path)) in said
    assert not (run.out / "eval.json").exists()


def test_a_model_from_scratch_needs_a_base(trained):
    said = failure(TOY_CP, f"--ckpt={trained.parent / 'base/best.pt'}")
    assert "names no model that it was tuned from: give the one to compare it with as --base" in said


def test_a_base_that_a_config_would_make_is_named(run, tmp_path):
    """The checkpoint was tuned from a config's model, which is gone: which command makes it. The user's own config
    says so too, so its code is run."""
    recipe = a_file(tmp_path, "recipe.py", f"out_dir = {str(tmp_path / 'gone')!r}\n")
    names(run, init_from=str(recipe))
    mine = a_file(tmp_path, "mine.py", f"from configs.toy_cp import *\ninit_from = {str(recipe)!r}\n")
    said = failure(str(mine), *run.flags[1:])
    assert f"{tmp_path / 'gone/best.pt'}, is missing: python train.py {recipe} makes it" in said


def names(run, **settings):
    """Change what the checkpoint says of itself."""
    saved = torch.load(run.out / "best.pt", weights_only=True)
    saved["config"] |= settings
    torch.save(saved, run.out / "best.pt")


@pytest.mark.parametrize("flags", [TOY_CP, ""])
def test_a_checkpoint_cannot_have_code_run(run, few, tmp_path, monkeypatch, capsys, flags):
    """A downloaded best.pt that names a config as its base, or a module as its scorer, which lies beside it."""
    monkeypatch.chdir(tmp_path)
    code = f"open({str(tmp_path / 'ran')!r}, 'w')\nout_dir = 'x'\nf = len\n"
    a_file(tmp_path, "evil.py", code)
    where = [f"--ckpt={run.out / 'best.pt'}", f"--data={few}", *([flags] if flags else [])]
    for base in ("evil.py", str(tmp_path / "evil.py"), "configs/../evil.py"):
        names(run, init_from=base)
        assert f"names {base} as its base, code that is not run unasked: give its model as --base" in failure(*where)
    names(run, init_from="gone")
    assert "best.pt was tuned from gone, which is not there: give its place as --base" in failure(*where)
    for scorer in ("ngram,evil:f", "evil:f"):
        names(run, init_from="gpt2", scorer=scorer, plot="stolen.png", export="stolen", out_dir="stolen")
        if not flags:
            with pytest.raises(SystemExit) as e:
                evaluation.main(where)
            said = f"names the scorer {scorer!r}, which is not imported unasked: give --scorer"
            assert e.value.code == 2 and said in capsys.readouterr().err
    evaluation.main([*where, "--scorer=data.toy:rudeness", f"--base={run.out / 'best.pt'}", "--parts=scores"])
    assert not (tmp_path / "ran").exists() and not list(tmp_path.glob("stolen*")) and (run.out / "eval.json").is_file()


@pytest.mark.parametrize("damage", [lambda text: text[:-9], lambda text: text.replace("0.", "1."), lambda text: "[]"])
def test_a_damaged_step_is_measured_again(run, counted, capsys, damage):
    """Cut, altered or another file: said by name, and computed anew. Nothing of it gets into a table."""
    before = run("--parts=scores")["measures"]
    file = run.out / "eval" / "scores.tuned.json"
    text = file.read_text()
    file.write_text(damage(text))
    counted.take()
    assert run("--parts=scores")["measures"] == before and counted.take() == ["measure_groups"]
    assert file.read_text() == text and (f"{file}: " in capsys.readouterr().out or damage(text).startswith("{"))


def test_a_damaged_summary_is_found_before_anything_is_measured(run, counted):
    (run.out / "summary.json").write_text("{")
    assert f"{run.out / 'summary.json'}: not JSON" in failure(*run.flags) and not counted


def test_a_checkpoint_without_settings_is_one_line(run):
    """Weights in our format, from elsewhere: what it was tuned from is not known."""
    saved = torch.load(run.out / "best.pt", weights_only=True)
    torch.save({k: saved[k] for k in ("model", "model_config")}, run.out / "bare.pt")
    assert "bare.pt" in failure(*run.flags, f"--ckpt={run.out / 'bare.pt'}")


def test_other_parts_do_without_test_groups(run, few, tmp_path):
    result = run(f"--data={no_test_groups(tmp_path, few)}", "--parts=toxicity")
    assert set(result["measures"]) == {"free"}


def test_scores_of_others_are_exported_and_imported(run, tmp_path, capsys):
    """file: the first run writes the texts, nothing counts; filled in, the second one counts them without sampling."""
    scores = tmp_path / "scores.jsonl"
    result = run("--parts=toxicity", f"--scorer=file:{scores}")
    assert (
        all(n > 0 for n in result["missing_scores"].values()) and "samples without a score" in capsys.readouterr().out
    )
    assert result["measures"]["free"]["toxicity_mean"]["base"] is None
    records = [json.loads(line) for line in scores.read_text().splitlines()]
    rude = get_scorer("data.toy:rudeness")([r["text"] for r in records])
    scores.write_text("".join(json.dumps(r | dict(score=x)) + "\n" for r, x in zip(records, rude, strict=True)))
    filled = run("--parts=toxicity", f"--scorer=file:{scores}")
    assert not any(filled["missing_scores"].values())
    assert filled["measures"]["free"] == run.copy("other")("--parts=toxicity")["measures"]["free"]


# --------------------------------------------------------------------------------------------------------------------
# interruptions


STEPS = ["draw_rewrites"] * 2 + ["draw_samples"] * 6 + ["measure_drift"] * 2 + ["measure_groups"] * 2


@pytest.mark.parametrize("fail", [("draw_samples", 1), ("draw_samples", 4), ("draw_rewrites", 2), ("measure_drift", 2)])
def test_an_interrupted_evaluation_goes_on(run, counted, fail):
    """What was finished is not computed again, and the end is that of an undisturbed run."""
    whole = run.copy("whole")()
    assert counted.take() == STEPS
    counted.fail = fail
    assert "interrupted; finished steps are kept" in failure(*run.flags)
    assert not (run.out / "eval.json").exists()
    counted.fail, before = None, counted.take()
    again = run()
    before.remove(fail[0])  # the one that was cut
    assert sorted(before + counted.take()) == STEPS
    assert again["measures"] == whole["measures"] and again["warnings"] == whole["warnings"]
    assert run()["measures"] == whole["measures"] and counted.take() == []


@pytest.mark.parametrize(
    ("flags", "again"),
    [
        (["--max_tokens=9"], dict(measure_groups=2, measure_drift=2)),
        (["--temperature=0.5"], {"draw_samples": 6, "draw_rewrites": 2}),
        (["--seed=1"], {"draw_samples": 6, "draw_rewrites": 2}),
        (["--k=2"], {"draw_samples": 6}),
        (["--shots=2"], {"draw_rewrites": 2}),
        (["--polite"], {"draw_rewrites": 2}),
        (["--scorer=ngram"], {"draw_samples": 4}),  # it cuts other prompts; what it judges is not sampled again
        (["--dtype=bfloat16"], dict(measure_groups=2, draw_samples=6, draw_rewrites=2, measure_drift=2)),
    ],
)
def test_a_changed_setting_is_computed_again(run, counted, flags, again):
    """Only what depends on it; its result is that of a fresh run."""
    run()
    counted.take()
    changed = run(*flags)
    done = counted.take()
    if flags == ["--scorer=ngram"]:
        assert set(done) <= {"draw_samples"} and len(done) <= 4
    else:
        assert {name: done.count(name) for name in set(done)} == again
    assert changed["measures"] == run.copy("fresh")(*flags)["measures"]


def test_another_checkpoint_is_measured_anew(run, counted):
    run()
    counted.take()
    saved = torch.load(run.out / "best.pt", weights_only=True)
    saved["model"]["transformer.ln_f.bias"] += 0.1
    torch.save(saved, run.out / "best.pt")
    run()
    assert counted.take() == sorted(["draw_samples"] * 3 + ["draw_rewrites", "measure_drift", "measure_groups"])


def test_changed_prompts_are_sampled_anew(run, counted, tmp_path):
    """And only they; a text or task that changed under the same name as well."""
    prompts, text = a_file(tmp_path, "p.txt", "Anna\n"), a_file(tmp_path, "t.txt", "Anna burned the toast.\n")
    task = a_file(tmp_path, "q.jsonl", '{"context": "Anna", "continuation": "came"}\n')
    flags = [f"--prompts={prompts}", f"--text={text}", f"--tasks={task}"]
    run(*flags)
    counted.take()
    prompts.write_text("Ben\n")
    run(*flags)
    assert counted.take() == ["draw_samples"] * 2
    text.write_text("Ben is here.\n")
    run(*flags)
    assert counted.take() == ["measure_drift"] * 2 + ["measure_text"] * 2
    task.write_text('{"context": "Anna", "continuation": "left"}\n')
    run(*flags)
    assert counted.take() == ["measure_task"] * 2


def test_samples_of_a_prompt_file_do_not_depend_on_the_other_prompts(run, few, tmp_path):
    """What an earlier evaluation with test groups drew for them is what one without draws, or it is drawn again."""
    flags = [f"--prompts={a_file(tmp_path, 'p.txt', 'Anna')}", "--parts=diversity"]
    fewer = [*flags, f"--data={no_test_groups(tmp_path, few)}"]
    other = run.copy("fresh")
    run(*flags)
    for r in (run, other):
        assert r(*fewer)["measures"]["p.txt, unmarked"]
    files = [sorted((r.out / "eval").glob("samples-p-txt*")) for r in (run, other)]
    kept, fresh = ([json.loads(f.read_text())["value"] for f in fs] for fs in files)
    assert len(kept) == 2 and kept == fresh


def test_a_published_text_is_one_place(run, tmp_path, monkeypatch):
    """--text=wikitext2: its perplexity and the drift on it stand under one name, as for any other text."""
    raw = a_file(tmp_path, "wiki.test.raw", " = One = \n \n Anna burned the toast . \n")
    monkeypatch.setattr(evaluation, "published_file", lambda name: raw)
    measured = run("--parts=fluency,drift", "--text=wikitext2")["measures"]
    assert [set(ms) for place, ms in measured.items() if "wiki" in place] == [
        {"text_ppl", "text_ppl_stride", "word_ppl", "kl"}
    ]


def test_two_task_files_of_the_same_name_are_both_measured(run, tmp_path):
    """a/quiz.jsonl and b/quiz.jsonl: neither result takes the other's place."""
    for folder, n in (("a", 1), ("b", 2)):
        (tmp_path / folder).mkdir()
        a_file(tmp_path / folder, "quiz.jsonl", '{"context": "Anna", "continuation": "came"}\n' * n)
    tasks = f"--tasks={tmp_path}/a/quiz.jsonl,{tmp_path}/b/quiz.jsonl"
    try:
        measured = run("--parts=utility", tasks)["measures"]
    except SystemExit as e:
        assert "quiz" in str(e.code)  # to refuse is fine as well
    else:
        assert sorted(m["acc"]["n"] for m in measured.values()) == [1, 2]


# --------------------------------------------------------------------------------------------------------------------
# several scorers, and a published protocol


SHOUTY = "def score(texts):\n    return [min(1, 3 * t.count('e') / (1 + len(t.split()))) for t in texts]\n"


@pytest.fixture
def shouty(tmp_path, monkeypatch):
    """The name of a scorer in the working folder that knows nothing of toxicity."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    name = f"shouty_{tmp_path.name}"
    a_file(tmp_path, f"{name}.py", SHOUTY)
    return f"{name}:score"


def test_several_scorers(run, counted, shouty, capsys):
    """The first one's numbers are those that it has alone, no sample is drawn twice, and the others' stand beside."""
    alone = run.copy("alone")("--parts=toxicity,rewriting")
    counted.take()
    result = run("--parts=toxicity,rewriting", f"--scorer=data.toy:rudeness,{shouty},ngram")
    assert counted.take() == ["draw_rewrites"] * 2 + ["draw_samples"] * 6
    out, names = capsys.readouterr().out, [shouty, "ngram"]
    assert result["scorer"] == alone["scorer"] and [s["name"] for s in result["other_scorers"]] == names
    assert all(len(s["sha256"]) == 12 for s in result["other_scorers"]) and alone["other_scorers"] == []
    places = ["free", "prompted", "harmless", "rewriting"]
    assert {p: result["measures"][p] for p in places} == alone["measures"]
    assert set(result["measures"]) == {*places, *(f"{p}, by {name}" for p in places for name in names)}
    scorers = {name: get_scorer(name) for name in ("data.toy:rudeness", *names)}
    for side in ("base", "tuned"):
        files = {p: f"samples-{report.PLACES[p].replace(' ', '-')}.{side}.json" for p in places}
        files["rewriting"] = f"rewriting.{side}.json"
        for place in places:
            drawn = json.loads((run.out / "eval" / files[place]).read_text())["value"]
            texts = [t for ts in drawn["texts"] for t in ts] if place != "rewriting" else drawn["texts"]
            first, *others = [scorer([t for t in texts if t is not None]) > 0.5 for scorer in scorers.values()]
            for name, other in zip(names, others, strict=True):
                got = {k: m[side] for k, m in result["measures"][f"{place}, by {name}"].items()}
                kind = "rewrite" if place == "rewriting" else "toxicity"
                share = got["rewrite_toxicity" if place == "rewriting" else "toxicity_fraction"]
                assert share == pytest.approx(other.mean()), (side, place, name)
                assert got[f"{kind}_agreement"] == pytest.approx((first == other).mean())
    assert f"toxicity: free samples, by {shouty}, 2 x 3" in out and "scorer       ngram, sha256 " in out
    summary = json.loads((run.out / "summary.json").read_text())["tuned"]
    share = result["measures"]["free, by ngram"]["toxicity_fraction"]["tuned"]
    assert summary["free, by ngram: toxicity_fraction"] == share
    run("--parts=toxicity,rewriting", f"--scorer=data.toy:rudeness,{shouty},ngram")
    assert counted.take() == []


def test_missing_scores_of_a_second_scorer_count_in_nothing(run, tmp_path, capsys):
    """A file of scores beside a function: what it lacks is named, and agreement is that of the rest."""
    scores = tmp_path / "s.jsonl"
    flags = ["--parts=toxicity", f"--scorer=data.toy:rudeness,file:{scores}"]
    place = f"free, by file:{scores}"
    empty = run(*flags)
    assert f"samples without a score count in no toxicity: see {scores}" in " ".join(capsys.readouterr().out.split())
    assert empty["measures"][place]["toxicity_agreement"]["base"] is None and empty["missing_scores"]["base"] > 0
    records = [json.loads(line) for line in scores.read_text().splitlines()]
    for i, r in enumerate(records):
        r["score"] = None if i % 3 else float(get_scorer("data.toy:rudeness")([r["text"]])[0])
    scores.write_text("".join(json.dumps(r) + "\n" for r in records))
    some = run(*flags)
    assert some["measures"][place]["toxicity_agreement"]["base"] == 1
    assert 0 < some["missing_scores"]["base"] < empty["missing_scores"]["base"]
    assert some["measures"]["free"] == run.copy("alone")("--parts=toxicity")["measures"]["free"]


def test_other_commands_take_the_first_scorer(run, shouty, capsys):
    said = []
    for scorer in ("ngram", f"ngram,{shouty}"):
        evaluation.main([*run.flags, "--prompt=Anna", f"--scorer={scorer}"])
        said.append(continued(capsys.readouterr().out))
    assert said[0] == said[1] != {}


def challenging(tmp_path, n=5):
    """A file as RealToxicityPrompts publishes it, of toy beginnings: n are challenging, two are not."""
    lines = []
    for i, g in enumerate(toy.groups()[: n + 2]):
        prompt = dict(text=" ".join(g.negatives[0].split()[:4]), toxicity=0.1 * i, profanity=None)
        lines.append(json.dumps(dict(filename="x", begin=0, end=9, challenging=i < n, prompt=prompt, continuation={})))
    return a_file(tmp_path, "prompts.jsonl", "\n".join(lines))


def greedy(model, tokenizer, prompt, n):
    """Up to n likeliest next tokens, one after the other, by whole forward passes; the text."""
    begin = [tokenizer.eot_token, *tokenizer.encode_ordinary(prompt)]
    tokens = list(begin)
    while len(tokens) < len(begin) + n:
        with torch.no_grad():
            best = int(model(torch.tensor([tokens]))[0, -1].argmax())
        if best == tokenizer.eot_token:
            break
        tokens.append(best)
    return tokenizer.decode(tokens[len(begin) :])


def test_the_challenging_protocol(run, tokenizer, tmp_path, capsys):
    """Greedy, 20 tokens, one sample after each marked prompt, whatever the flags say of the others; the mean score."""
    flags = [f"--prompts={challenging(tmp_path)}", "--protocol=challenging", "--parts=toxicity", "--n_prompts=2"]
    result = run(*flags, "--scorer=ngram,data.toy:rudeness", "--temperature=2")
    out, place = capsys.readouterr().out, "prompts.jsonl, challenging"
    assert result["measures"]["prompted"]["toxicity_fraction"]["n"] == 2
    assert result["measures"][place]["toxicity_mean"]["n"] == 5
    records = [json.loads(line) for line in (tmp_path / "prompts.jsonl").read_text().splitlines()]
    prompts = [r["prompt"]["text"] for r in records if r["challenging"]]
    for side in ("base", "tuned"):
        model = GPT.from_pretrained(result[side])
        texts = [greedy(model, tokenizer, p, 20) for p in prompts]
        assert max(len(tokenizer.encode_ordinary(t)) for t in texts) > 6  # of --sample_tokens
        for name, where in (("ngram", place), ("data.toy:rudeness", f"{place}, by data.toy:rudeness")):
            want = get_scorer(name)(texts).mean()
            assert result["measures"][where]["toxicity_mean"][side] == pytest.approx(want)
            block = re.search(rf"^here: 5 prompts, 20 tokens; {name}; .*\n  base (.*)\n  tuned (.*)\n", out, re.M)
            assert block[("base", "tuned").index(side) + 1].split()[1] == f"{want:.3f}"
    said = " ".join(out.split())
    assert "challenging prompts of " in said and "temperature=0.0, sample_tokens=20, k=1, n_prompts=0" in said
    for heading, rows in TOXICITY.items():
        assert heading in said
        for model, *numbers in rows:
            assert re.search(rf"^  {model} +" + " +".join(map(re.escape, numbers)) + "$", out, re.M)
    assert "WARNING scorers differ" in out
    run(*flags, "--temperature=1")
    assert "prompts.jsonl, challenging: base from before, tuned from before" in capsys.readouterr().out
    assert "here: " not in (run(*flags[:1], "--parts=toxicity") and capsys.readouterr().out)


def test_wikitext_stands_beside_the_published_perplexity(run, tmp_path, monkeypatch, capsys):
    raw = a_file(tmp_path, "wiki.test.raw", " = One = \n \n Anna burned the toast . \n")
    monkeypatch.setattr(evaluation, "published_file", lambda name: raw)
    flags = [f"--prompts={challenging(tmp_path)}", "--protocol=challenging", "--parts=toxicity,fluency"]
    found = run(*flags, "--text=wikitext2")["measures"]["text wiki.test.raw"]["text_ppl"]
    (rows,) = re.findall(r"^here: .*\n  base (.*)\n  tuned (.*)\n", capsys.readouterr().out, re.M)
    assert [r.split()[-1] for r in rows] == [f"{found[side]:.2f}" for side in ("base", "tuned")]


# --------------------------------------------------------------------------------------------------------------------
# --rewrite


LINES = [f"{g.negatives[0]}" for g in toy.groups()[:40]]


@pytest.fixture
def comments(tmp_path):
    """40 sentences with blank lines among them."""
    return a_file(tmp_path, "comments.txt", "\n".join([*LINES[:3], "", "  ", *LINES[3:]]) + "\n")


def test_a_file_is_rewritten_line_by_line(run, comments, capsys):
    """rewritten.txt has an answer in the line of each sentence, rewritten.jsonl what it did to it."""
    evaluation.main([*run.flags, f"--rewrite={comments}"])
    lines = (run.out / "rewritten.txt").read_text().split("\n")
    given = comments.read_text().split("\n")
    assert len(lines) == len(given) and lines[3] == lines[4] == lines[-1] == ""
    records = [json.loads(line) for line in (run.out / "rewritten.jsonl").read_text().splitlines()]
    assert [r["input"] for r in records] == LINES
    assert [line for given, line in zip(given, lines, strict=True) if given.strip()] == [r["output"] for r in records]
    assert len({r["output"] for r in records}) > 5
    scorer = get_scorer("data.toy:rudeness")
    for r in records:
        assert r["toxicity_input"] == scorer([r["input"]])[0] and r["toxicity"] == scorer([r["output"]])[0]
        assert r["rouge_l"] == rouge_l(r["input"], r["output"])
    toxic = sum(r["toxicity"] > 0.5 for r in records if r["output"])
    silent = sum(not r["output"] for r in records)
    told = sum(r["toxicity_input"] > 0.5 for r in records if r["output"])
    out = capsys.readouterr().out
    assert f"40 lines, {silent} without an answer; of the others {told} were toxic, {toxic} are now" in out
    assert not (run.out / "eval.json").exists()


def rewritten(run):
    return [(run.out / f"rewritten.{end}").read_text() for end in ("txt", "jsonl")]


def test_an_interrupted_rewriting_goes_on(run, comments, monkeypatch):
    """Finished portions stay, and both files end as if nothing had happened."""
    other, calls = run.copy("whole"), []
    evaluation.main([*other.flags, f"--rewrite={comments}"])

    def interrupted(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return rewrite(*args, **kwargs)

    monkeypatch.setattr("measures.rewriting.rewrite", interrupted)
    assert "interrupted" in failure(*run.flags, f"--rewrite={comments}")
    kept = (run.out / "rewritten.jsonl").read_text()
    assert 0 < kept.count("\n") < 40 and not (run.out / "rewritten.txt").exists()
    with open(run.out / "rewritten.jsonl", "a") as f:
        f.write('{"run": "cut o')  # and a line that was being written
    evaluation.main([*run.flags, f"--rewrite={comments}"])
    assert len(calls) == 3 and rewritten(run) == rewritten(other)


@pytest.mark.parametrize(
    "change",
    [
        ["--temperature=0.5"],
        ["--seed=4"],
        ["--shots=2"],
        ["--polite"],
        ["--scorer=ngram"],
        ["--data=toy"],
        ["--dtype=bfloat16"],
    ],
)
def test_rewriting_with_another_setting_starts_over(run, comments, change):
    """The result is that of a fresh run: no line of it is an older one's."""
    evaluation.main([*run.flags, f"--rewrite={comments}"])
    before = rewritten(run)
    other = run.copy("fresh")
    for r in (run, other):
        evaluation.main([*r.flags, f"--rewrite={comments}", *change])
    assert rewritten(run) == rewritten(other) and (rewritten(run) != before or change == ["--dtype=bfloat16"])


def test_only_line_breaks_separate_lines(run, tmp_path):
    """A text may hold a form feed or Unicode's line separator: it is still one line of the file."""
    path = a_file(tmp_path, "odd.txt", "Anna is\u2028rude.\n\nBen\x0cis here.\n")
    evaluation.main([*run.flags, f"--rewrite={path}"])
    assert len((run.out / "rewritten.txt").read_text().split("\n")) == len(path.read_text().split("\n"))


def test_a_long_line_does_not_cost_the_others(run, tmp_path):
    lines = [*LINES[:4], " ".join(LINES[:30]), *LINES[4:8]]
    evaluation.main([*run.flags, "--shots=0", f"--rewrite={a_file(tmp_path, 'long.txt', chr(10).join(lines))}"])
    got = (run.out / "rewritten.txt").read_text().split("\n")
    assert got[4] == "" and sum(bool(line) for line in got) >= 4


# --------------------------------------------------------------------------------------------------------------------
# --prompt, --export


def continued(out):
    """{side: (how many are toxic, k, how many are shown, [(toxicity, text)])} of what --prompt prints."""
    found = {}
    for side, toxic, k, n, rows in re.findall(
        r"^(base|tuned): (\d+) of (\d+) toxic, the first (\d+):\n((?:  .*\n)+)", out, re.M
    ):
        texts = re.findall(r"^  (\d\.\d\d) \| ((?:.*\n)(?:          .*\n)*)", rows, re.M)
        found.setdefault(side, []).append((int(toxic), int(k), int(n), [(x, " ".join(t.split())) for x, t in texts]))
    return found


@pytest.mark.parametrize(("k", "shown"), [(3, 3), (7, 4)])
def test_a_prompt_is_continued_by_both_models(run, tokenizer, capsys, k, shown):
    """Side by side, from the same random numbers: how many of k are toxic, and some of them with their toxicity."""
    evaluation.main([*run.flags, "--prompt=By the way, this damn", f"--k={k}", "--seed=3"])
    out, scorer = capsys.readouterr().out, get_scorer("data.toy:rudeness")
    found = continued(out)
    assert list(found) == ["base", "tuned"] and not (run.out / "eval.json").exists()
    settings = load_config("eval", [*run.flags, f"--k={k}"])
    base = json.loads((run.out / "summary.json").read_text())["config"]["init_from"]
    for side, source in (("base", base), ("tuned", run.out / "best.pt")):
        model = GPT.from_pretrained(source)
        (texts,) = draw_samples(model, model, tokenizer, settings, ["By the way, this damn"], k, 3)["texts"]
        toxicity = scorer(texts)
        want = [(f"{x:.2f}", f"[By the way, this damn] {' '.join(t.split())}".strip())
                for x, t in zip(toxicity, texts, strict=True)]  # fmt: skip
        assert found[side] == [(sum(toxicity > 0.5), k, shown, want[:shown])]
    assert found["base"] != found["tuned"]


def test_a_blank_at_a_prompts_end_does_not_count(run, capsys):
    """The blank belongs to the next word: a model has never read one alone."""
    said = []
    for prompt in ("Anna burned", "Anna burned "):
        evaluation.main([*run.flags, f"--prompt={prompt}"])
        said.append(continued(capsys.readouterr().out))
    assert said[0] == said[1] != {}


def test_prompts_are_asked_for_until_an_empty_line(run, monkeypatch, capsys):
    """A bare --prompt; one that is too long is told and does no harm; the end of the input ends it as well."""
    evaluation.main([*run.flags, "--prompt=Anna"])
    single = continued(capsys.readouterr().out)
    for end in (["  ", "never"], []):
        lines = iter(["Anna", "Anna came " * 99, "Ben", *end])

        def ask(text, lines=lines):
            assert text.strip().endswith("prompt (empty line: end)>")
            try:
                return next(lines)
            except StopIteration:
                raise EOFError from None

        monkeypatch.setattr("builtins.input", ask)
        evaluation.main([*run.flags, "--prompt"])
        out = capsys.readouterr().out
        found = continued(out)
        assert all(len(found[side]) == 2 and found[side][:1] == single[side] for side in ("base", "tuned"))
        assert found["base"][1] != found["base"][0] and re.search(r"^a prompt of \d+ tokens and 6 new ones", out, re.M)
        assert list(lines) == end[1:]


def test_the_real_command_reads_prompts_from_its_input(run):
    done = subprocess.run(
        [sys.executable, str(ROOT / "eval.py"), *run.flags, "--prompt"],
        input="Anna\nBen\n", capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert done.stdout.count("[Anna]") == done.stdout.count("[Ben]") == 6


def test_export_is_a_folder_for_transformers_with_a_card(run, tmp_path, capsys):
    """Loads there with the same logits, and here; the card has the run's numbers, settings and warnings."""
    transformers = pytest.importorskip("transformers")
    folder, summary = tmp_path / "new" / "polite", json.loads((run.out / "summary.json").read_text())
    summary["warnings"] = ["tuned: the end is near"]
    (run.out / "summary.json").write_text(json.dumps(summary))
    evaluation.main([*run.flags, f"--export={folder}"])
    assert f"written to {folder}: config.json, model.safetensors, README.md" in capsys.readouterr().out
    assert sorted(f.name for f in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]

    ours, again = GPT.from_pretrained(run.out / "best.pt"), GPT.from_pretrained(folder)
    hf = transformers.GPT2LMHeadModel.from_pretrained(folder).eval()
    idx = torch.tensor([ids(np.random.default_rng(0), 30, ours.config.vocab_size)])
    with torch.no_grad():
        want = ours(idx)
        torch.testing.assert_close(hf(idx).logits, want, rtol=1e-4, atol=1e-4)
        assert torch.equal(again(idx), want)

    card = (folder / "README.md").read_text()
    rows = dict(re.findall(r"^\| (.+?) \| (.+) \|$", card, re.M))
    assert "# polite\n" in card and 'from_pretrained("polite")' in card
    for key in report.COMPARED:
        name = key.removesuffix("_prompted")
        label = report.MEASURES[name].label + (", after toxic prompts" if key != name else "")
        assert rows[label] == " | ".join(report.format_number(name, summary[s][key]) for s in ("base", "tuned"))
    told, c = card.split("defaults: ")[1], summary["config"]
    for name in ("tau", "lr", "max_steps", "batch_size"):
        assert f"{name}={c[name]!r}" in told, name
    assert "out_dir=" not in told and "ckpt=" not in told
    for text in (
        c["init_from"],
        c["scorer"],
        f"at most {c['sample_tokens']} tokens",
        "the end is near",
        "Tokenizer: toy",
    ):
        assert text in card, text
    assert "--export=" in failure(*run.flags, f"--export={folder}") and (folder / "README.md").read_text() == card


def test_a_card_says_what_is_missing(run, tmp_path, few):
    """An infinite perplexity is null in the summary; one that eval.py wrote has only the parts it measured."""
    (run.out / "summary.json").unlink()
    run("--parts=toxicity")
    evaluation.main([*run.flags, f"--export={tmp_path / 'some'}"])
    assert "| dist-2 | - | - |" in (tmp_path / "some/README.md").read_text()


def test_export_without_numbers_writes_nothing(run, tmp_path):
    """A card is made from the run's summary; what cannot be finished is not begun."""
    (run.out / "summary.json").unlink()
    said = failure(*run.flags, f"--export={tmp_path / 'new'}")
    assert "no summary.json of a fine-tuning run beside the checkpoint" in said and not (tmp_path / "new").exists()


# --------------------------------------------------------------------------------------------------------------------
# --compare, --check, --plot


def summary(toxicity, prompted, ppl, tau=0.2, seed=0, **more):
    measured = dict(toxicity_fraction=toxicity, toxicity_fraction_prompted=prompted, ppl_positive=ppl, ppl_negative=9.0)
    measured |= dict(rank_accuracy=0.75, sample_ppl_base=2.0, sample_ppl_base_prompted=2.0, dist_2=0.5)
    base = dict(measured, toxicity_fraction=0.5, toxicity_fraction_prompted=0.8, ppl_positive=2.0)
    settings = dict(objective="cp", tau=tau, seed=seed, init_from="configs/toy_base.py", out_dir=f"o{seed}") | more
    return dict(config=settings, base=base, tuned=measured)


@pytest.fixture
def runs(tmp_path):
    """Three runs with tau 0.2, of which the best; two with tau 1; one unfinished, one of another objective."""
    made = dict(a=summary(0.1, 0.2, 2.0, seed=0), b=summary(0.2, 0.2, 2.0, seed=1), c=summary(0.3, 0.5, 2.2, seed=2))
    made |= dict(d=summary(0.4, 0.8, 4.0, tau=1.0, seed=0), e=summary(0.4, 0.6, 4.0, tau=1.0, seed=1))
    made |= dict(lm=dict(config=dict(objective="lm"), tuned={}), unfinished=None)
    for name, content in made.items():
        (tmp_path / name).mkdir()
        if content:
            (tmp_path / name / "summary.json").write_text(json.dumps(content))
    return [str(tmp_path / name) for name in ("unfinished", "e", "a", "lm", "c", "d", "b")]


def test_compare_is_one_table_sorted_by_cost(runs, capsys):
    """Mean and sample standard deviation over seeds; cost: mean toxicity and its price, by report.selection_cost."""
    evaluation.main(["--compare", *runs])
    out = capsys.readouterr().out
    for name in ("unfinished", "lm"):
        assert f"left out: {runs[0].replace('unfinished', name)}," in out
    table = [line for line in out.splitlines() if not line.startswith("left out")]
    at = [i for i, line in enumerate(table) if re.match(r"base: |tau=", line)]
    assert [table[i] for i in at] == ["base: configs/toy_base.py", "tau=0.2", "tau=1.0"]
    numbers, spreads = ([table[i + n].split() for i in at] for n in (1, 2))
    cells = [[f"{a}{b}" for a, b in zip(x[-8:], y, strict=True)] for x, y in zip(numbers, spreads, strict=True)]
    costs = [np.mean([0.15, 0.2, 0.4 + math.log(1.1)]), np.mean([0.6, 0.5]) + math.log(2)]
    assert [x[0] for x in numbers[1:]] == ["3", "2"] and [x[1] for x in numbers[1:]] == [f"{x:.3f}" for x in costs]
    assert cells[1][0] == "20.0±10.0" and cells[2][0] == "40.0±0.0" and cells[2][1] == "70.0±14.1"
    assert cells[1][2] == f"{6.2 / 3:.2f}±{np.std([2, 2, 2.2], ddof=1):.2f}" and cells[1][4] == "75.0±0.0"
    assert len(numbers[0]) == 9 and numbers[0][0] == "3" and cells[0][0] == "50.0±0.0"  # the base: once per seed
    assert "shares in %" in out


def test_perplexities_of_seeds_that_differ_much_have_a_median():
    """One exploded run would make any mean: (lowest to highest) says so."""
    runs = [dict(ppl_negative=x, dist_2=x) for x in (2.0, 4.0, 1000.0)]
    spread = lambda *args: "".join(report.spread(*args))
    assert spread("ppl_negative", runs) == "4 (2-1e3)"
    assert spread("ppl_negative", [dict(ppl_negative=x) for x in (31, 94, 54187)]) == "94 (31-5e4)"
    assert spread("ppl_negative", runs[:2]) == f"3.00±{math.sqrt(2):.2f}"
    assert "±" in spread("dist_2", runs) and "±" not in spread("dist_2", runs[:1])


def test_compare_in_markdown(runs, capsys):
    evaluation.main(["--compare", *runs, "--markdown"])
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(table) == 5 and len({line.count("|") for line in table}) == 1 and set(table[1]) <= set("|-")
    assert table[3].startswith("| tau=0.2 | 3 | 0.") and "20.0±10.0" in table[3]


def test_one_run_has_its_folders_name_and_no_spread(runs, capsys):
    evaluation.main(["--markdown", "--compare", runs[2]])
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert table[3].startswith("| a | 1 | 0.150 | 10.0 | 20.0 |") and "±" not in table[3]


def test_nothing_to_compare(runs, tmp_path):
    assert "nothing to compare" in failure("--compare", runs[0], str(tmp_path / "nowhere"))
    assert "not --tau=1" in failure("--compare", runs[2], "--tau=1")


def test_compare_reads_what_eval_writes(run, capsys):
    run("--parts=scores,toxicity,fluency,diversity", "--prompts=")
    capsys.readouterr()
    evaluation.main(["--compare", str(run.out)])
    assert "left out" not in capsys.readouterr().out


@pytest.fixture
def published(monkeypatch, tokenizer, toy_tasks, toy_text, tmp_path):
    """A small model and files in the place of the published ones; returns (folder, {source: file})."""
    network(1, tokenizer.n_vocab, 40).save_pretrained(tmp_path / "model")
    raw = a_file(tmp_path, "wiki.test.raw", " = One = \n \n " + toy_text.replace("\n", " \n ") + "\n")
    files = dict(lambada=toy_tasks / "word.jsonl", piqa=toy_tasks / "choice.jsonl", wikitext2=raw)

    def get(name):
        if name not in files:
            raise ConnectionError(f"{name}: http://x could not be fetched (no network). Put that file into y")
        return files[name]

    monkeypatch.setattr("measures.published.published_file", get)
    monkeypatch.setattr(data, "get_tokenizer", lambda name: tokenizer)
    return tmp_path / "model", files


def checked(folder, expected, monkeypatch):
    monkeypatch.setattr("measures.published.EXPECTED", {"gpt2": expected})
    with pytest.raises(SystemExit) as e:
        evaluation.main(["--check=gpt2", f"--base={folder}"])
    return e.value.code


def test_check_meets_its_numbers(published, tokenizer, monkeypatch, capsys):
    """Exit code 0 if all are within their tolerance, 1 if one is not, and both numbers are shown."""
    folder, files = published
    model = GPT.from_pretrained(folder)
    word, choice = (task_scores(model, tokenizer, files[k]) for k in ("lambada", "piqa"))
    raw = data.read_text(files["wikitext2"])
    text = text_perplexity(model, tokenizer, wikitext_rows(raw), 40, 40)["ppl"]
    good = [
        ("lambada", "ppl", word["ppl"] + 0.05, 0.1, "thread 1"),
        ("piqa", "acc", choice["acc"], 0.001, "thread 2"),
        ("piqa", "acc_norm", choice["acc_norm"], 0.001, "thread 2"),
        ("wikitext2", "text_ppl", text - 0.01, 0.05, "thread 3"),
    ]
    assert checked(folder, good, monkeypatch) == 0
    out = capsys.readouterr().out
    assert len(re.findall(r" ok$", out, re.M)) == 4 and "DIFFERS" not in out
    assert "thread 3" in out and f"{choice['acc']:.2%}" in out
    bad = [*good[:1], ("piqa", "acc", choice["acc"] + 0.002, 0.001, "thread 2"), *good[2:]]
    assert checked(folder, bad, monkeypatch) == 1
    out = capsys.readouterr().out
    assert len(re.findall(r" ok$", out, re.M)) == 3 and re.search(r"piqa: accuracy .*DIFFERS", out)


def test_check_fails_where_it_could_not_measure(published, monkeypatch, capsys):
    """The rest is measured all the same."""
    folder, _ = published
    expected = [("hellaswag", "acc", 0.3, 9.0, "a"), ("lambada", "acc", 0.0, 1.0, "b")]
    assert checked(folder, expected, monkeypatch) == 1
    out = capsys.readouterr().out
    assert "not measured: hellaswag: http://x could not be fetched" in out
    assert len(re.findall(r" ok$", out, re.M)) == 1
    assert re.search(r"hellaswag: accuracy .* -  .*not measured", out)


def test_the_expected_numbers_are_of_known_measures():
    for rows in EXPECTED.values():
        for source, name, value, tolerance, where in rows:
            assert source in SOURCES and name in report.MEASURES and value > tolerance > 0 and where


def test_published_downloads_once_and_converts(monkeypatch, tmp_path):
    """Into data/downloads under the given sha256; a failure names what to put where."""
    monkeypatch.setattr("measures.tasks.ROOT", tmp_path)
    asked, content = [], b'{"text": "one two three"}\n'
    source = ("http://x/raw.jsonl", hashlib.sha256(content).hexdigest())
    monkeypatch.setitem(SOURCES, "lambada", source)

    def download(url, target, sha256):
        asked.append((url, sha256))
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)

    monkeypatch.setattr("measures.tasks.download", download)
    for _ in range(2):
        path = published_file("lambada")
        assert read_task(path) == [("one two", ["three"], None)]
    assert asked == [source] and tmp_path in path.parents

    path.unlink()  # what somebody put there is taken without a network, if it is the published file
    assert published_file("lambada") == path and path.is_file() and len(asked) == 1
    path.unlink()
    (path.parent / "raw.jsonl").write_text('{"text": "other"}\n')
    with pytest.raises(ValueError, match="raw.jsonl is not the published file .*delete it, or fetch http"):
        published_file("lambada")

    def fails(*args):
        raise OSError("no network")

    monkeypatch.setattr("measures.tasks.download", fails)
    with pytest.raises(ConnectionError, match=r"piqa: https://.*no network.*Put that file into .*downloads"):
        published_file("piqa")


def test_plot_draws_the_scores(run, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    path = tmp_path / "figures" / "scores.png"
    run("--parts=scores", f"--plot={path}")
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and path.stat().st_size > 5000
    assert f"figure: {path}" in capsys.readouterr().out
    assert "--plot draws the part 'scores'" in failure(*run.flags, "--parts=drift", f"--plot={path}")


def test_plot_draws_the_runs_curves(run, trained, tmp_path, capsys):
    """From log.jsonl, where there is one, beside the scores; without one there are only the scores."""
    pytest.importorskip("matplotlib")
    run("--parts=scores", f"--plot={tmp_path / 'a.png'}")
    shutil.copy(trained / "log.jsonl", run.out)
    run("--parts=scores", f"--plot={tmp_path / 'b.x.png'}")
    assert sorted(f.name for f in tmp_path.glob("*.png")) == ["a.png", "b.x-curves.png", "b.x.png"]
    path = tmp_path / "b.x-curves.png"
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and path.stat().st_size > 5000
    assert f"figure: {path}\n" in capsys.readouterr().out


def test_the_curves_are_the_logs(trained, monkeypatch):
    """Every curve: steps and values of one key of one kind of record."""
    pytest.importorskip("matplotlib")
    drawn, records = [], [json.loads(line) for line in (trained / "log.jsonl").read_text().splitlines()]
    monkeypatch.setattr(report, "save_figure", lambda figure, axes, path: drawn.extend(axes))
    report.plot_curves(records, "x.png")
    train_, val = ([r for r in records if r["split"] == kind] for kind in ("train", "val"))
    want = {
        "training loss": [(train_, k) for k in ("loss", "nll", "cp")],
        "signed gap (neg - pos), nats": [(train_, "signed_gap"), (val, "signed_gap")],
        "toxic fraction": [(val, k) for k in ("toxicity_fraction", "toxicity_fraction_prompted")],
        "perplexity": [(val, k) for k in ("ppl_positive", "sample_ppl_base")],
    }
    assert [ax.get_title("left") for ax in drawn] == list(want) and len(train_) == 5 and len(val) == 2
    for ax, curves in zip(drawn, want.values(), strict=True):
        for line, (rows, key) in zip(ax.get_lines(), curves, strict=True):
            assert line.get_xydata().tolist() == [[r["step"], r[key]] for r in rows], key


def test_curves_of_a_log_that_lacks_some_are_drawn(tmp_path, recwarn):
    """A language model's has neither gap nor toxicity; a perplexity may be missing."""
    pytest.importorskip("matplotlib")
    lm = [dict(step=0, split="val", val_nll=2.0), dict(step=0, split="train", loss=2.0), dict(step=1, split="val")]
    report.plot_curves(lm, tmp_path / "lm.png")
    report.plot_curves([dict(step=0, split="val", ppl_positive=None, signed_gap=0.5)], tmp_path / "cp.png")
    assert sorted(f.name for f in tmp_path.glob("*.png")) == ["cp.png", "lm.png"]
    assert not [w for w in recwarn if "legend" in str(w.message)]


def test_plot_without_matplotlib_is_said_before_anything_is_computed(run, counted, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "--plot needs matplotlib: pip install matplotlib" in failure(*run.flags, "--plot=x.png")
    assert counted == []


def test_ctrl_c_ends_the_real_command_in_one_line(run, tmp_path):
    """A scorer that raises it stands for the key: no traceback."""
    a_file(tmp_path, "stops.py", "def score(texts):\n    raise KeyboardInterrupt\n")
    done = subprocess.run(
        [sys.executable, str(ROOT / "eval.py"), *run.flags, "--scorer=stops:score", "--parts=toxicity"],
        cwd=tmp_path, capture_output=True, text=True, env=os.environ,
    )  # fmt: skip
    assert done.returncode == 1 and "interrupted" in done.stderr and "Traceback" not in done.stderr


def test_nothing_printed_is_wider_than_100_columns(tmp_path, monkeypatch, capsys, toy_tasks, toy_text):
    """All commands in small, with their warnings and notes, as they look from the project's folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(training, "CLOSING", 6)
    a_file(tmp_path, "profanity_check_of_somebody_else.py", SHOUTY.replace("score", "predict_prob"))
    for name, content in (("text.raw", f" = A = \n{toy_text}\n"), ("prompts.txt", "Anna\nBen\n")):
        a_file(tmp_path, name, content)
    for name in ("choice.jsonl", "word.jsonl"):
        shutil.copy(toy_tasks / name, tmp_path / name)
    a_file(tmp_path, "lines.txt", "\n".join(toy.groups()[i].negatives[0] for i in range(5)) + "\n")
    small = "--eval_samples=6 --eval_groups=2 --batch_size=4 --eval_interval=3 --k=3".split()
    shape = "--max_steps=20 --warmup_steps=2 --n_layer=1 --n_embd=32 --n_head=2".split()
    tune = "--init_from=out/toy_base/best.pt --warmup_steps=1 --anchor_nll=0.5 --anchor_texts=6 --max_tokens=16".split()
    train.main(["configs/toy_base.py", *small, *shape])
    for i, lr in enumerate(("1e-1", "1e-1", "1e-4")):
        where = [f"--seed={i}", f"--lr={lr}", f"--out_dir=out/toy_cp_{i}"]
        train.main(["configs/toy_cp.py", *small, *tune, *where, "--max_steps=6"])
    parts = "--text=text.raw --tasks=choice.jsonl,word.jsonl --prompts=prompts.txt --n_prompts=3".split()
    train.main(["configs/toy_cp.py", *small, *tune, "--lr=1e-1", "--out_dir=out/toy_cp_0", "--max_steps=8", "--resume"])
    here = ["configs/toy_cp.py", "--out_dir=out/toy_cp_0", "--k=3"]
    evaluation.main([*here, *parts])
    marked = [f"--prompts={challenging(tmp_path)}", "--protocol=challenging"]
    evaluation.main([*here, *marked, "--scorer=data.toy:rudeness,profanity_check_of_somebody_else:predict_prob"])
    evaluation.main([*here, "--parts=toxicity", "--scorer=file:out/toy_cp_0/scores_of_somebody_else.jsonl"])
    for more in (["--prompt=Anna burned the toast"], ["--rewrite=lines.txt"], ["--export=out/toy_cp_0/export"]):
        evaluation.main([*here, *more])
    evaluation.main(["--compare", "out/toy_base", *(f"out/toy_cp_{i}" for i in range(3))])
    said = capsys.readouterr().out
    for start in ("settings ", "resume .* with another max_steps", "step     6 | toxic ", "validation perplexity",
                  "WARNING tuned: ", "WARNING (?!tuned)", "NOTE ", "utility: task word", "base: . of 3 toxic",
                  "    -> ", "left out: ", "runs  ", " +±", "written to "):  # fmt: skip
        assert re.search("^" + start.replace(" | ", r" \| "), said, re.M), start  # all of it is there
    assert [line for line in said.splitlines() if len(line) > 100] == []


def test_readme_commands_are_understood():
    """Every `python eval.py ...` of the documentation has settings that exist and a config that loads."""
    text = "\n".join((ROOT / folder / "README.md").read_text() for folder in ("", "configs"))
    commands = re.findall(r"python eval\.py ([^`\n#]+)", text + evaluation.__doc__)
    assert len(commands) >= 5
    for command in commands:
        if "--compare" not in command:
            words = re.sub(r",? +or --.*|  .*", "", command)  # a remark behind it
            assert load_config("eval", shlex.split(words)).k == 25
