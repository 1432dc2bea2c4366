"""What fine-tuning changed, and what it cost: `python eval.py configs/toy_cp.py`.

Toxicity alone can be had for nothing, by ruining the model. So every table shows it beside its price: perplexity of
held-out sentences and texts, perplexity of the samples under the frozen base, diversity, utility, drift. Base and tuned
model get the same prompts and the same random numbers, and every difference has a 95 % interval from a paired bootstrap
over what was measured (groups, prompts, items, windows).

    python eval.py configs/toy_cp.py                            a config's run, or --ckpt=FILE.pt [--base=gpt2]
    python eval.py configs/gpt2_cp.py --parts=utility --tasks=lambada,piqa
    python eval.py configs/gpt2_cp.py --rewrite=comments.txt    rewrite a text file politely, line by line
    python eval.py --check=gpt2                                 are the published numbers of a published model met?
    python eval.py --compare out/* [--markdown]                 one table over runs, mean and spread over seeds
"""

import difflib
import hashlib
import json
import math
import platform
import re
import sys
import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import data
from configs import ROOT, Config, find, load_config, read_config_file
from data import benchmarks, report
from data.measures import bootstrap, dist_n, pooled_ppl, repetition, rouge_l
from loss import contrastive_perplexity
from model import GPT, amp, atomic_write, download, keep_freed_memory, load_checkpoint, pick_device, pick_dtype

CLOSING = 250  # free samples, and prompted ones in train.py's closing table
TOKENS = 8192  # positions per forward pass
ROWS = 256  # rows per generated batch
PARTS = ("scores", "toxicity", "rewriting", "fluency", "diversity", "utility", "drift")


# --------------------------------------------------------------------------------------------------------------------
# scores


def batches(lengths):
    """Index lists over rows of these lengths, longest first, each of at most TOKENS positions."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    while order:
        n = max(1, TOKENS // lengths[order[0]])
        yield order[:n]
        order = order[n:]


@torch.no_grad()
def scores(model, sequences, starts=None, what="scores"):
    """phi of token lists (see GPT.sequence_nll), from position `starts` on if given. Returns an array (len,), nats."""
    phi = np.empty(len(sequences))
    with tqdm(total=len(sequences), desc=what, leave=False, delay=1) as bar:
        for rows in batches([len(s) for s in sequences]):
            idx, lengths = data.pad([sequences[r] for r in rows])
            start = None if starts is None else torch.tensor([starts[r] for r in rows])
            phi[rows] = model.sequence_nll(idx.to(model.device), lengths, start).cpu()
            bar.update(len(rows))
    return phi


def frames(texts, tokenizer, model, config):
    return [data.frame(t, tokenizer, min(config.max_tokens, model.config.n_positions + 1)) for t in texts]


def measure_groups(model, groups, tokenizer, config):
    """Scores of all sentences of the groups -> {name: rows}, one row per group."""
    sides = [side for g in groups for side in (g.positives, g.negatives)]
    sequences = frames([t for side in sides for t in side], tokenizer, model, config)
    cuts, longest = np.cumsum([len(side) for side in sides])[:-1], max(map(len, sides))
    phi = np.split(scores(model, sequences), cuts)
    tokens = np.split(np.array([len(s) - 1 for s in sequences]), cuts)
    rows = {}
    for i in range(0, len(sides), 2):
        pos, neg = (torch.tensor(p)[None] for p in phi[i : i + 2])
        settings = (config.tau, config.alpha, config.variant, config.distance)
        _, diagnostics = contrastive_perplexity(pos, neg, *settings, score=config.score)
        row = {name: v.item() for name, v in diagnostics.items()}
        row |= dict(positive_gap=row["signed_gap"] > 0, auc=np.full((longest, 2), np.nan))
        for column, name in enumerate(("ppl_positive", "ppl_negative")):
            p, n = phi[i + column], tokens[i + column]
            row[name] = [p @ n, n.sum()]
            row["auc"][: len(p), column] = p
        for name, v in row.items():
            rows.setdefault(name, []).append(v)
    return {name: np.array(v, dtype=float) for name, v in rows.items()}


# --------------------------------------------------------------------------------------------------------------------
# samples: toxicity, fluency, diversity


def generate(model, tokenizer, prompts, config, seed, k=1, max_new=None, stop=None, what="samples"):
    """k continuations of each prompt, lists of token ids. Returns (begun, continuations): the prompts' ids with an end
    token before them, and P lists of k lists. The same seed gives the same samples, whatever the batch size."""
    max_new = max_new or config.sample_tokens
    begun = [[tokenizer.eot_token, *tokenizer.encode_ordinary(p)] for p in prompts]
    longest, room = max(map(len, begun)), model.config.n_positions - max_new
    if longest > room:
        raise ValueError(
            f"a prompt of {longest} tokens and {max_new} new ones exceed the context of {model.config.n_positions}: "
            "lower --sample_tokens or --shots, or shorten it"
        )
    generator, out, n = torch.Generator().manual_seed(seed), [], max(1, ROWS // k)
    with tqdm(total=len(begun) * k, desc=what, leave=False, delay=1, disable=what is None) as bar:
        for i in range(0, len(begun), n):
            idx, lengths = data.pad(begun[i : i + n])
            idx = idx[:, : int(lengths.max())].to(model.device)
            sampling = (config.temperature, 0, config.top_p, tokenizer.eot_token if stop is None else stop, generator)
            tokens, count = model.generate(idx, lengths, max_new, *sampling, samples=k)
            rows = [row[:n] for row, n in zip(tokens.tolist(), count.tolist(), strict=True)]
            out += [rows[j : j + k] for j in range(0, len(rows), k)]
            bar.update(len(rows))
    return begun, out


def decode(tokenizer, tokens):
    return tokenizer.decode([t for t in tokens if t != tokenizer.eot_token])


def draw(model, base, tokenizer, config, prompts, k, seed, what="samples"):
    """k samples of each prompt ('' is a free sample) and their phi under the base, given the prompt: P lists of k."""
    begun, out = generate(model, tokenizer, prompts, config, seed, k, what=what)
    texts = [[decode(tokenizer, row) for row in rows] for rows in out]
    sequences = [start + row for start, rows in zip(begun, out, strict=True) for row in rows]
    phi = scores(base, sequences, [len(start) for start in begun for _ in range(k)], what + ", judged by the base")
    return dict(prompts=prompts, texts=texts, phi=phi.reshape(-1, k).tolist())


def measure_samples(drawn, scorer):
    """What `draw` gave -> {name: rows}. Rows are prompts, since samples of one prompt are no independent draws; free
    samples are, so each of them is a row of those measures that do not need a set of k."""
    texts, ppl = drawn["texts"], np.exp(drawn["phi"])
    toxicity = scorer([t for ts in texts for t in ts]).reshape(ppl.shape)
    single = dict(
        toxicity_fraction=toxicity,
        toxicity_mean=toxicity,
        sample_ppl_base=ppl,
        sample_ppl_base_mean=ppl,
        sample_ppl_base_dropped=ppl,
        sample_empty=np.array([[float(not t.strip()) for t in ts] for ts in texts]),
        repetition=np.array([[repetition(t) for t in ts] for ts in texts]),
    )
    if not any(drawn["prompts"]):
        single = {name: v.reshape(-1, 1) for name, v in single.items()}
    sets = {f"dist_{n}": np.array([dist_n(ts, n) for ts in texts]) for n in (1, 2, 3)}
    return single | sets | dict(toxicity_expected_max=toxicity, toxicity_probability=toxicity)


def cut_prompts(sides, scorer, n):
    """n beginnings of the sentences, one of each side in turn: up to and with the first word that makes the scorer say
    toxic (> 0.5), or half of the sentence if there is none or it comes too late for a continuation (after two thirds).
    """
    deepest = max(map(len, sides))
    sentences = [side[j] for j in range(deepest) for side in sides if j < len(side)][: n or None]
    prefixes = [[" ".join(t.split()[:k]) for k in range(1, len(t.split()) + 1)] for t in sentences]
    toxic = iter(scorer([p for ps in prefixes for p in ps]) > 0.5)
    prompts = []
    for ps in prefixes:
        first = next((k for k, hit in enumerate([next(toxic) for _ in ps], 1) if hit), len(ps))
        prompts.append(ps[(first if first <= 2 * len(ps) / 3 else max(1, len(ps) // 2)) - 1].rstrip(",.;:!?"))
    return prompts


def free_sets(n, k):
    """As many empty prompts as make n free samples in sets of k."""
    return [""] * -(-n // k)


def evaluate(model, base, groups, tokenizer, scorer, config, n, seed):
    """The measures of train.py: of the groups, of n free samples in sets of k, and of one continuation of each of n
    toxic prompts cut from the groups. Returns ({place: {name: number}}, {place: [(prompt, text)]} to show)."""
    sets = {"free": (free_sets(n, config.k), config.k)}
    if groups:
        prompts = cut_prompts([g.negatives for g in groups], scorer, n)
        sets["prompted"] = ([prompts[i % len(prompts)] for i in range(n)], 1)
    measured, shown = {"groups": measure_groups(model, groups, tokenizer, config)} if groups else {}, {}
    for i, (place, (prompts, k)) in enumerate(sets.items()):
        drawn = draw(model, base, tokenizer, config, prompts, k, seed + 1000 * i)
        measured[place], shown[place] = measure_samples(drawn, scorer), to_show(drawn)
    return report.summarise(measured), shown


def to_show(drawn):
    """Three (prompt, sample): of the first three prompts, or three of the only one."""
    prompts, texts = drawn["prompts"], drawn["texts"]
    pairs = [(p, ts[i]) for i in range(len(texts[0])) for p, ts in zip(prompts, texts, strict=True)]
    return pairs[:3]


# --------------------------------------------------------------------------------------------------------------------
# rewriting


def rewrite(model, tokenizer, groups, sentences, config, seed, what="rewriting"):
    """Ask the model for a polite paraphrase of each sentence, in the prompt format of data_gen.py, after `shots`
    demonstrations (negative -> positive of the groups; as many of them as fit). Returns (texts, closed): None for a
    sentence too long for the context, and whether the model closed the quotation.
    """
    template = config.positive_prompt
    begins = [data.prompt_for(template, s) for s in sentences]
    size = lambda text: len(tokenizer.encode_ordinary(text))  # noqa: E731
    room, budgets = model.config.n_positions - 1, [8 + int(1.5 * size(s)) for s in sentences]
    fits = [i for i, begin in enumerate(begins) if size(begin) + budgets[i] <= room]
    budget = max((budgets[i] for i in fits), default=0)  # tokens of the longest rewrite
    chosen = np.random.default_rng([config.seed, 4]).permutation(len(groups))[: config.shots]
    shots = [(groups[i].negatives[0], groups[i].positives[0]) for i in chosen]
    shots = [template.format(input=negative, output=positive) for negative, positive in shots]
    prompts = {}
    for i in fits:
        options = ["".join(shots[j:]) + begins[i] for j in range(len(shots) + 1)]
        prompts[i] = next((p for p in options if size(p) + budget <= room), options[-1])
    texts, closed = [None] * len(sentences), [False] * len(sentences)
    if prompts:
        stop = data.closing_tokens(template, tokenizer)
        _, out = generate(model, tokenizer, list(prompts.values()), config, seed, 1, budget, stop, what)
        for i, (tokens,) in zip(prompts, out, strict=True):
            texts[i], closed[i] = data.answer(template, decode(tokenizer, tokens))
    return texts, closed


def draw_rewrites(model, base, tokenizer, groups, sentences, config):
    """Rewrites of the sentences and their cosines with their own and with the next input."""
    texts, closed = rewrite(model, tokenizer, groups, sentences, config, config.seed + 5)
    kept = [i for i, t in enumerate(texts) if t]
    cosines = np.full((2, len(texts)), np.nan)
    if kept:
        inputs, outputs = (mean_hidden(base, tokenizer, config, x) for x in (sentences, [texts[i] for i in kept]))
        for row, shift in enumerate((0, 1)):
            other = inputs[[(i + shift) % len(sentences) for i in kept]]
            cosines[row, kept] = torch.cosine_similarity(outputs, other).numpy()
    return dict(inputs=sentences, texts=texts, closed=closed, cosines=cosines.tolist())


@torch.no_grad()
def mean_hidden(model, tokenizer, config, texts):
    """Mean-pooled last hidden states (len(texts), C) on the CPU."""
    sequences = frames(texts, tokenizer, model, config)
    out = torch.empty(len(sequences), model.config.n_embd)
    for rows in batches([len(s) for s in sequences]):
        idx, lengths = data.pad([sequences[r] for r in rows])
        out[rows] = model.mean_hidden(idx.to(model.device), lengths).cpu()
    return out


def measure_rewrites(drawn, scorer):
    """What `draw_rewrites` gave -> {name: rows}; one row per sentence, nan where there was no room for it."""
    texts, cosines = drawn["texts"], np.array(drawn["cosines"], dtype=float)
    there = [i for i, t in enumerate(texts) if t is not None]
    blank = np.full((len(texts), 1), np.nan)
    toxicity, overlap, closed = blank.copy(), blank.copy(), blank.copy()
    toxicity[there, 0] = scorer([texts[i] for i in there])
    overlap[there, 0] = [rouge_l(drawn["inputs"][i], texts[i]) for i in there]
    closed[there, 0] = [bool(drawn["closed"][i] and texts[i]) for i in there]
    return dict(
        rewrite_toxicity=toxicity,
        rewrite_input_toxicity=scorer(drawn["inputs"])[:, None],
        rewrite_rouge_l=overlap,
        rewrite_cosine=cosines[0],
        rewrite_cosine_other=cosines[1],
        rewrite_closed=closed,
    )


# --------------------------------------------------------------------------------------------------------------------
# texts: perplexity and drift


def window_nll(model, pieces, what="perplexity"):
    """(total nll, tokens) of each window, (W, 2)."""
    count = np.array([len(tokens) - start for tokens, start in pieces])
    phi = scores(model, [tokens for tokens, _ in pieces], [start for _, start in pieces], what)
    return np.stack([phi * count, count], axis=1)


def text_perplexity(model, tokenizer, text, context, stride):
    """Token perplexity of a text: 'ppl' pooled over windows, 'tokens' of the text, 'scored' of them. No end token is
    put before it. Raises ValueError if the text or the context is too short or the context too long."""
    tokens = tokenizer.encode_ordinary(text)
    if len(tokens) < 2 or not 2 <= context <= model.config.n_positions or not 1 <= stride <= context:
        raise ValueError(
            f"{len(tokens)} tokens, context {context}, stride {stride}: wanted at least 2 tokens, 2 <= context <= "
            f"{model.config.n_positions} and 1 <= stride <= context"
        )
    rows = window_nll(model, benchmarks.windows(tokens, context, stride))
    return dict(ppl=pooled_ppl(rows), tokens=len(tokens), scored=int(rows[:, 1].sum()))


def read_measured_text(path, tokenizer, limit=0):
    """(token ids, pages or None) of a text file, at most `limit` tokens if that is not 0. A .raw file is WikiText: the
    hub's framing, and the pages of lm-eval, whole ones until the limit is reached."""
    text, pages = data.read_text(path), None
    if str(path).endswith(".raw"):
        text, pages = benchmarks.wikitext_rows(text), benchmarks.wikitext_pages(text)
    tokens = tokenizer.encode_ordinary(text)
    if len(tokens) < 2:
        raise ValueError(f"{path} holds no text to measure")
    if limit and pages:
        ends = np.cumsum([len(tokenizer.encode_ordinary(page)) for page in pages])
        pages = pages[: 1 + int((ends < limit).sum())]
    return tokens[: limit or None], pages


def measure_text(model, tokenizer, tokens, pages, context):
    """Perplexities of a text -> {name: rows}; one row per window, for word_ppl per page."""
    out = {}
    for name, stride in (("text_ppl", context), ("text_ppl_stride", context // 2)):
        what = f"text, windows of {context}, stride {stride}"
        out[name] = window_nll(model, benchmarks.windows(tokens, context, stride), what)
    if pages:
        cleaned = [[tokenizer.eot_token, *tokenizer.encode_ordinary(benchmarks.detokenize(p))] for p in pages]
        pieces = [benchmarks.page_windows(tokens, context) for tokens in cleaned]
        nll = window_nll(model, [w for ws in pieces for w in ws], "pages")[:, 0]
        totals = [part.sum() for part in np.split(nll, np.cumsum([len(ws) for ws in pieces])[:-1])]
        out["word_ppl"] = np.array([[t, len(re.split(r"\s+", p))] for t, p in zip(totals, pages, strict=True)])
    return out


@torch.no_grad()
def measure_drift(model, base, sequences):
    """KL(base || model) -> {'kl': rows}, one row (sum, tokens) per token list."""
    total, count = np.zeros(len(sequences)), np.array([len(s) - 1 for s in sequences])
    if model is base:
        return {"kl": np.stack([total, count], axis=1)}
    with tqdm(total=len(sequences), desc="drift", leave=False, delay=1) as bar:
        for rows in batches([len(s) for s in sequences]):
            idx, lengths = data.pad([sequences[r] for r in rows])
            total[rows] = model.sequence_kl(base, idx.to(model.device), lengths).cpu()
            bar.update(len(rows))
    return {"kl": np.stack([total * count, count], axis=1)}


# --------------------------------------------------------------------------------------------------------------------
# utility


def measure_task(model, tokenizer, items, what="task"):
    """Items of data.benchmarks.read_task -> {name: rows}, one row per item, by the definitions of lm-eval: acc,
    acc_norm and acc_token of multiple choice, acc and ppl of continuations. A context too long loses its start."""
    limit, jobs = model.config.n_positions + 1, []  # the last token is only predicted
    for i, (context, choices, _) in enumerate(items):
        pairs = [benchmarks.split_tokens(tokenizer, context, " " + c) for c in choices]
        room = limit - max(len(choice) for _, choice in pairs)
        if not all(choice for _, choice in pairs) or room < 1:
            raise ValueError(
                f"item {i + 1} of {what}: a choice is empty or longer than the context of {limit - 1} tokens"
            )
        if len(pairs[0][0]) <= room:  # one row: the context once, its choices side by side
            jobs.append((pairs[0][0], [choice for _, choice in pairs], [(i, j) for j in range(len(pairs))]))
        else:  # what is cut off depends on the choice
            for j, (ids, choice) in enumerate(pairs):
                jobs.append((ids[-(limit - len(choice)) :], [choice], [(i, j)]))
    nll, greedy, tokens = {}, {}, {}
    with tqdm(total=len(items), desc=what, leave=False, delay=1) as bar:
        for rows in batches([len(c) + sum(map(len, xs)) for c, xs, _ in jobs]):
            values = model.choice_nll([jobs[r][0] for r in rows], [jobs[r][1] for r in rows])
            keys = [key for r in rows for key in jobs[r][2]]
            for key, x, top in zip(keys, *(v.tolist() for v in values), strict=True):
                nll[key], greedy[key] = x, top
            tokens |= {key: len(x) for r in rows for key, x in zip(jobs[r][2], jobs[r][1], strict=True)}
            bar.update(len(rows))
    if items[0][2] is None:
        return dict(
            acc=np.array([float(greedy[i, 0]) for i in range(len(items))]),
            ppl=np.array([nll[i, 0] for i in range(len(items))]),
        )
    out = {"acc": [], "acc_norm": [], "acc_token": []}
    for i, (_, choices, gold) in enumerate(items):
        cost = np.array([nll[i, j] for j in range(len(choices))])
        characters, n = np.array([len(c) for c in choices]), np.array([tokens[i, j] for j in range(len(choices))])
        for name, x in (("acc", cost), ("acc_norm", cost / characters), ("acc_token", cost / n)):
            out[name].append(float(np.argmin(x) == gold))
    return {name: np.array(v) for name, v in out.items()}


def task_scores(model, tokenizer, path):
    """One task file -> {'acc', 'acc_norm', 'acc_token', 'n'}, or {'acc', 'ppl', 'n'} of continuations."""
    items = benchmarks.read_task(path)
    rows = measure_task(model, tokenizer, items, Path(path).stem)
    return {name: report.MEASURES[name].of(v) for name, v in rows.items()} | {"n": len(items)}


def published(name):
    """The file of a task or text that is published under a name; downloaded, checked and converted if missing."""
    folder = ROOT / "data" / "downloads"
    file = folder / ("wiki.test.raw" if name == "wikitext2" else f"{name}.jsonl")
    if not file.is_file():
        url, sha256 = benchmarks.SOURCES[name]
        source = folder / url.rsplit("/", 1)[1]
        try:
            if not source.is_file():  # else somebody put it there
                download(url, source, sha256)
        except OSError as e:
            raise ConnectionError(f"{name}: {url} could not be fetched ({e}). Put that file into {folder}") from e
        if hashlib.sha256(source.read_bytes()).hexdigest() != sha256:
            raise ValueError(f"{source} is not the published file (its sha256 differs): delete it, or fetch {url}")
        text = benchmarks.convert(name, source.read_bytes())
        atomic_write(file, lambda f: f.write(text.encode()))
    return file


# --------------------------------------------------------------------------------------------------------------------
# an evaluation: what to compare, step by step


@dataclass
class Evaluation:
    """All that one evaluation consists of."""

    config: Config
    out: Path  # of eval.json, summary.json and the finished steps
    names: dict  # {'base': ..., 'tuned': ...}: where the models come from
    models: dict  # the same -> GPT
    tokenizer: object
    scorer: object
    dtype: torch.dtype
    groups: dict  # by split
    measured: dict = field(default_factory=lambda: {"base": {}, "tuned": {}})  # {side: {place: {name: rows}}}
    shown: dict = field(default_factory=lambda: {"base": {}, "tuned": {}})  # {side: {place: [(prompt, text)]}}


def run_of(config):
    """(checkpoint, base, folder for results) that the settings mean. Raises with one line what is missing."""
    ckpt = find(config.ckpt or Path(config.out_dir) / "best.pt")
    out = ckpt.parent if ckpt.suffix == ".pt" else Path(config.out_dir)
    if config.base:
        return str(ckpt), config.base, out
    if ckpt.suffix != ".pt":
        raise ValueError(f"{ckpt} is no checkpoint of train.py, so what is it to be compared with? Give --base")
    base = load_checkpoint(ckpt).get("config", {}).get("init_from", "scratch")
    if base == "scratch":
        raise ValueError(f"{ckpt} names no model that it was tuned from: give the one to compare it with as --base")
    if base.endswith(".py"):
        path, base = base, Path(read_config_file(base)["out_dir"]) / "best.pt"
        if not base.is_file():
            raise FileNotFoundError(f"the base, {base}, is missing: python train.py {path} makes it, or give --base")
    return str(ckpt), str(base), out


def open_evaluation(config):
    """Load what the settings mean, and print it."""
    ckpt, base, out = run_of(config)
    tokenizer, device = data.get_tokenizer(config.tokenizer), pick_device(config.device)
    names = {"base": base, "tuned": ckpt}
    models = {side: GPT.from_pretrained(find(name), tokenizer.n_vocab).to(device) for side, name in names.items()}
    dtype, reason = pick_dtype(config.dtype, device, models["base"].config.n_embd)
    scorer = data.get_scorer(config.scorer, out / "scores.jsonl")
    groups = data.load_groups(config.data)
    print(f"base         {base}")
    print(f"tuned        {ckpt}, {models['tuned'].num_parameters() / 1e6:.1f} M parameters")
    print(f"device       {device}, products in {str(dtype)[6:]}: {reason}")
    print(f"scorer       {scorer.name}, sha256 {scorer.hash}...")
    counts = ", ".join(f"{len(groups[s])} {s}" for s in data.SPLITS)
    print(f"data         {config.data}: {counts} groups")
    print(f"results      {out}/eval.json; finished steps are kept in {out}/eval\n")
    return Evaluation(config, out, names, models, tokenizer, scorer, dtype, groups)


def chosen_parts(text):
    """The parts that --parts names, in their order. Raises ValueError on an unknown one."""
    words = [w.strip() for w in text.split(",") if w.strip()]
    for word in words:
        if word not in (*PARTS, "all"):
            near = difflib.get_close_matches(word, PARTS, 1)
            hint = f": did you mean {near[0]}?" if near else f": wanted some of {', '.join(PARTS)}, or all"
            raise ValueError(f"unknown part {word!r}{hint}")
    return [p for p in PARTS if p in words or "all" in words or not words]


def fingerprint(x):
    """sha256 of a model's parameters, or of anything that JSON can hold."""
    digest = hashlib.sha256()
    if isinstance(x, GPT):
        for p in x.parameters():
            digest.update(p.detach().float().cpu().numpy().tobytes())
    else:
        digest.update(json.dumps(x, sort_keys=True).encode())
    return digest.hexdigest()


def remember(path, key, compute):
    """(compute(), False), or (what an earlier call left at `path` for the same key, True)."""
    if path.is_file():
        saved = json.loads(path.read_text())
        if saved["key"] == key:
            return saved["value"], True
    value = compute()
    atomic_write(path, lambda f: f.write(json.dumps(dict(key=key, value=value)).encode()))
    return value, False


def prompt_sets(ev):
    """{place: prompts} of the samples: none, cut from the test split, and those of the prompt file."""
    c, sets = ev.config, {"free": free_sets(CLOSING, ev.config.k)}
    if ev.groups["test"]:
        cutter = ev.scorer if ev.scorer.function else data.get_scorer("ngram")  # a file of scores knows no beginnings
        for place, side in (("prompted", "negatives"), ("harmless", "positives")):
            sets[place] = cut_prompts([getattr(g, side) for g in ev.groups["test"]], cutter, c.n_prompts)
    if c.prompts:
        path = find(c.prompts)
        for kind, prompts in benchmarks.read_prompts(path).items():
            order = np.random.default_rng([c.seed, 6]).permutation(len(prompts))[: c.n_prompts or None]
            sets[f"{path.name}, {kind}"] = [prompts[i] for i in sorted(order)]
    return sets


def steps(ev, parts):
    """Yield (name, key, compute, use): compute(model) gives what JSON can hold, `key` what it depends on besides the
    models, and use(value) turns it into ({place: {name: rows}}, {place: texts to show})."""
    c, tokenizer, base, test = ev.config, ev.tokenizer, ev.models["base"], ev.groups["test"]
    if needy := [p for p in ("scores", "rewriting", "drift") if p in parts and not (p == "drift" and c.text)]:
        if not test:
            raise ValueError(f"{c.data} has no test groups, which {' and '.join(needy)} need: choose other --parts")
    plain = lambda rows: {k: v.tolist() for k, v in rows.items()}  # noqa: E731
    arrays = lambda place: lambda value: ({place: {k: np.array(v, dtype=float) for k, v in value.items()}}, {})  # noqa: E731
    sampling = [c.temperature, c.top_p]
    if "scores" in parts:
        objective = [c.max_tokens, c.tau, c.alpha, c.variant, c.distance, c.score]
        key = [[vars(g) for g in test], *objective]
        yield "scores", key, lambda model: plain(measure_groups(model, test, tokenizer, c)), arrays("groups")
    if {"toxicity", "fluency", "diversity"} & set(parts):
        for i, (place, prompts) in enumerate(prompt_sets(ev).items()):
            seed = c.seed + 1 + 1000 * i  # free samples: those of train.py's closing table
            what = report.PLACES.get(place, place)
            yield (
                f"samples, {what}",
                [prompts, c.k, c.sample_tokens, seed, *sampling],
                lambda model, a=(prompts, c.k, seed, what): draw(model, base, tokenizer, c, *a),
                lambda value, place=place: ({place: measure_samples(value, ev.scorer)}, {place: to_show(value)}),
            )
    if "rewriting" in parts:
        sentences = [g.negatives[i % len(g.negatives)] for i, g in enumerate(test)][: c.n_prompts or None]
        sources = ev.groups["train"]
        yield (
            "rewriting",
            [sentences, [vars(g) for g in sources], c.shots, c.positive_prompt, c.max_tokens, c.seed, *sampling],
            lambda model: draw_rewrites(model, base, tokenizer, sources, sentences, c),
            lambda v: (
                {"rewriting": measure_rewrites(v, ev.scorer)},
                {"rewriting": list(zip(v["inputs"], (t or "" for t in v["texts"]), strict=True))[:3]},
            ),
        )
    context = min(m.config.n_positions for m in ev.models.values())
    if c.text:
        path = published(c.text) if c.text in benchmarks.SOURCES else find(c.text)
        tokens, pages = read_measured_text(path, tokenizer, c.text_tokens)
        text = f"text {path.name}" + (f", first {len(tokens):,} tokens" if len(tokens) == c.text_tokens else "")
    if c.text and "fluency" in parts:
        compute = lambda model: plain(measure_text(model, tokenizer, tokens, pages, context))  # noqa: E731
        yield f"text {path.name}", [tokens, pages, context], compute, arrays(text)
    tasks = [t.strip() for t in c.tasks.split(",") if t.strip()] if "utility" in parts else []
    for task in dict.fromkeys(tasks):
        path = published(task) if task in benchmarks.SOURCES else find(task)
        place = f"task {path.stem if [Path(t).stem for t in tasks].count(path.stem) < 2 else path}"
        items = benchmarks.read_task(path)
        compute = lambda model, a=(items, place): plain(measure_task(model, tokenizer, *a))  # noqa: E731
        yield place, items, compute, arrays(place)
    if "drift" in parts:
        place = "groups"
        if c.text:
            place = text
            sequences = [w for w, _ in benchmarks.windows(tokens, context, context)]
        else:
            shorter = min(ev.models.values(), key=lambda m: m.config.n_positions)
            sequences = frames([t for g in test for t in g.positives], tokenizer, shorter, c)
        yield "drift", sequences, lambda model: plain(measure_drift(model, base, sequences)), arrays(place)


def measure(ev, parts):
    """Take all steps for base and tuned; what an earlier, interrupted evaluation finished is not done again."""
    prints = {side: fingerprint(model) for side, model in ev.models.items()}
    for name, key, compute, use in steps(ev, parts):
        told = []
        for side, model in ev.models.items():
            file = ev.out / "eval" / f"{re.sub(r'[^a-z0-9]+', '-', name.lower())}.{side}.json"
            identity = fingerprint([key, prints[side], prints["base"], ev.config.tokenizer, str(ev.dtype)])
            began = time.time()
            with amp(model.device, ev.dtype):
                value, kept = remember(file, identity, lambda model=model: compute(model))  # noqa: B023
            measured, shown = use(value)
            for place, rows in measured.items():
                mine = ev.measured[side].setdefault(place, {})
                mine |= {k: v for k, v in rows.items() if k in report.MEASURES and report.MEASURES[k].part in parts}
            ev.shown[side] |= shown
            told.append(f"{side} {'from before' if kept else f'{time.time() - began:.1f} s'}")
        print(f"{name}: {', '.join(told)}")


# --------------------------------------------------------------------------------------------------------------------
# the commands


def versions():
    return dict(python=platform.python_version(), torch=torch.__version__, numpy=np.__version__)


def write_json(path, value):
    """Strict JSON: what is not a finite number becomes null."""
    value = json.loads(json.dumps(value), parse_constant=lambda _: None)
    atomic_write(path, lambda f: f.write((json.dumps(value, indent=2) + "\n").encode()))


def compare_sides(ev):
    """{place: {name: dict(base, tuned, difference, interval, n)}}."""
    out = {}
    for place, rows in ev.measured["base"].items():
        for name, base in rows.items():
            tuned, of = ev.measured["tuned"][place][name], report.MEASURES[name].of
            numbers = dict(base=of(base), tuned=of(tuned), difference=of(tuned) - of(base), n=len(base))
            out.setdefault(place, {})[name] = numbers | dict(interval=bootstrap(base, tuned, of, ev.config.seed))
    return out


def close(ev, parts, command, began):
    """Print table, samples and warnings; write eval.json and update summary.json."""
    c, compared = ev.config, compare_sides(ev)
    print("\n" + report.evaluation_table(compared, parts))
    print(
        f"\n~ the interval contains 0. Toxic: {ev.scorer.name} > 0.5; {c.k} samples a prompt, {c.sample_tokens} tokens"
    )
    print(report.samples(ev.shown))
    sides = {side: {p: {n: m[side] for n, m in ms.items()} for p, ms in compared.items()} for side in ev.models}
    sides = {side: report.flat(places) for side, places in sides.items()}
    missing = {}
    for side, places in ev.measured.items():
        missing[side] = sum(
            int(np.isnan(places[p]["toxicity_mean"]).sum()) for p in places if "toxicity_mean" in places[p]
        )
    if any(missing.values()):
        print(f"\nNOTE {missing} samples without a score count in no toxicity; {ev.scorer.path} lists them")
    told = report.warnings(sides["tuned"], sides["base"])
    for w in told:
        print(f"\nWARNING {w}")

    names = {n for ms in compared.values() for n in ms}
    how = dict(command=command, seed=c.seed, scorer=dict(name=ev.scorer.name, sha256=ev.scorer.hash), parts=parts)
    machine = dict(device=str(ev.models["base"].device), dtype=str(ev.dtype)[6:], versions=versions())
    out = how | ev.names | machine | dict(seconds=time.time() - began, missing_scores=missing, warnings=told)
    out |= dict(measures=compared, definitions={n: m.definition for n, m in report.MEASURES.items() if n in names})
    write_json(ev.out / "eval.json", out | dict(settings=asdict(c)))
    file = ev.out / "summary.json"
    summary = json.loads(file.read_text()) if file.is_file() else {}
    summary = machine | dict(config=asdict(c), seconds=out["seconds"], tokens_per_second=None) | summary
    summary |= {side: summary.get(side, {}) | values for side, values in sides.items()} | dict(evaluated=how)
    write_json(file, summary)
    print(f"\n{out['seconds']:.0f} s in all\nwritten: {ev.out / 'eval.json'}, {file}")
    return out


def evaluate_run(config, command):
    """Compare base and tuned model: all chosen parts, the table, the files. Returns the content of eval.json."""
    began, parts = time.time(), chosen_parts(config.parts)
    if config.plot and report.pyplot() and "scores" not in parts:
        raise ValueError("--plot draws the part 'scores': add it to --parts")
    ev = open_evaluation(config)
    for part, wanted, flag in (("utility", config.tasks, "tasks"), ("fluency", config.text, "text")):
        if part in parts and not wanted:
            print(f"{part}: no {flag.removesuffix('s')} file to measure, see --{flag} in --help")
    measure(ev, parts)
    out = close(ev, parts, command, began)
    if config.plot:
        report.plot({side: places["groups"]["auc"] for side, places in ev.measured.items()}, config.plot)
    return out


def rewrite_file(config):
    """--rewrite=FILE: a polite version of each line by the tuned model, into rewritten.txt (line by line as in FILE; an
    empty line where there is no answer) and, with toxicity and overlap, rewritten.jsonl. An interrupted run goes on."""
    lines, n = data.read_text(config.rewrite).removesuffix("\n").split("\n"), 32
    texts = [line.strip() for line in lines if line.strip()]
    if not texts:
        raise ValueError(f"{config.rewrite} holds no text")
    ckpt = find(config.ckpt or Path(config.out_dir) / "best.pt")
    out = ckpt.parent if ckpt.suffix == ".pt" else Path(config.out_dir)
    tokenizer, device = data.get_tokenizer(config.tokenizer), pick_device(config.device)
    model = GPT.from_pretrained(find(ckpt), tokenizer.n_vocab).to(device)
    dtype, _ = pick_dtype(config.dtype, device, model.config.n_embd)
    scorer, groups = data.get_scorer(config.scorer), data.load_groups(config.data)["train"]
    how = [
        config.shots,
        config.positive_prompt,
        config.temperature,
        config.top_p,
        config.seed,
        str(dtype),
        scorer.name,
        scorer.hash,
    ]
    key = fingerprint([fingerprint(model), texts, how, [vars(g) for g in groups]])
    file, records = out / "rewritten.jsonl", []
    if file.is_file():
        records = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n")[:-1]]
        records = [r for r in records if r["run"] == key]
        records = records[: len(records) // n * n]
    atomic_write(file, lambda f: f.write("".join(json.dumps(r) + "\n" for r in records).encode()))
    with tqdm(total=len(texts), initial=len(records), desc="rewriting", delay=1) as bar:
        for i in range(len(records), len(texts), n):
            some = texts[i : i + n]
            with amp(device, dtype):
                answers, _ = rewrite(model, tokenizer, groups, some, config, config.seed + i, what=None)
            answers = [a or "" for a in answers]
            rows = zip(some, answers, scorer(some).tolist(), scorer(answers).tolist(), strict=True)
            new = [
                dict(run=key, input=s, output=a, toxicity_input=before, toxicity=after, rouge_l=rouge_l(s, a))
                for s, a, before, after in rows
            ]
            with open(file, "a", encoding="utf-8") as f:
                f.write("".join(json.dumps(r) + "\n" for r in new))
            records += new
            bar.update(len(new))
    answers = iter(r["output"] for r in records)
    whole = "".join((next(answers) if line.strip() else "") + "\n" for line in lines)
    atomic_write(out / "rewritten.txt", lambda f: f.write(whole.encode()))
    for r in records[:10]:
        print(f"  {r['input']}\n    -> {r['output']}")
    before, after = (sum(r[k] > 0.5 for r in records if r["output"]) for k in ("toxicity_input", "toxicity"))
    silent = sum(not r["output"] for r in records)
    print(f"\n{len(records)} lines, {silent} without an answer; of the others {before} were toxic, {after} are now")
    print(f"written: {out / 'rewritten.txt'}, {file}")


def self_check(config):
    """--check=NAME: measure a published model (or --base=FOLDER in its place) in fp32 against published numbers.
    Returns True if all are within their tolerance; what could not be measured fails."""
    if config.check not in benchmarks.EXPECTED:
        raise ValueError(f"no published numbers for {config.check!r}, only for {', '.join(benchmarks.EXPECTED)}")
    expected = benchmarks.EXPECTED[config.check]
    tokenizer = data.get_tokenizer("gpt2")
    model = GPT.from_pretrained(find(config.base or config.check), tokenizer.n_vocab).to(pick_device(config.device))
    measured, rows, good = {}, [], True
    for source in dict.fromkeys(e[0] for e in expected):
        try:
            path = published(source)
        except OSError as e:
            print(f"not measured: {e}")
            continue
        if source == "wikitext2":
            measured[source] = measure_text(
                model, tokenizer, *read_measured_text(path, tokenizer), model.config.n_positions
            )
        else:
            measured[source] = measure_task(model, tokenizer, benchmarks.read_task(path), source)
    for source, name, published_, tolerance, where in expected:
        value = report.MEASURES[name].of(measured[source][name]) if source in measured else math.nan
        ok = abs(value - published_) <= tolerance
        good &= ok
        cells = [report.cell(name, x) for x in (value, published_, tolerance)]
        verdict = "ok" if ok else "DIFFERS" if source in measured else "not measured"
        rows.append([f"{source}: {report.MEASURES[name].label.strip()}", *cells, verdict, where])
    print(report.lay_out([config.check, "measured", "published", "tolerance", "", "source"], rows))
    return good


# --------------------------------------------------------------------------------------------------------------------


def saved_settings(flags):
    """Without a config file, the settings of the checkpoint that --ckpt names."""
    ckpt = flags.get("ckpt", "")
    if not ckpt.endswith(".pt"):
        return {}
    known = {f.name for f in fields(Config)}
    return {k: v for k, v in load_checkpoint(find(ckpt)).get("config", {}).items() if k in known}


def main(argv=None):
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        if "--compare" in argv:
            return report.compare([w for w in argv if w != "--compare"])
        config = load_config(argv, description=__doc__, start=saved_settings)
        keep_freed_memory()
        if config.check:
            sys.exit(0 if self_check(config) else 1)
        if config.rewrite:
            return rewrite_file(config)
        evaluate_run(config, "python eval.py " + " ".join(argv))
    except (ValueError, OSError) as e:
        sys.exit(f"eval.py: {e}")
    except KeyboardInterrupt:
        sys.exit("\neval.py: interrupted; finished steps are kept, the same command goes on")


if __name__ == "__main__":
    main()
