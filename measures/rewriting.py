"""Rewriting, the paper's own experiment: a model paraphrases toxic sentences.

By default the prompt is neutral ("Paraphrase"), so that a base model keeps the tone, and a lower toxicity is the tuned
model's doing. --polite asks for politeness: then the prompt does part of the work.
"""

import numpy as np
from tqdm import tqdm

import data
from configs import find
from data.prompts import answer, closing_tokens, few_shot, prompt_for
from engine.run import Log, atomic_write, held, read_text, sha256
from measures import open_setup, report
from measures.samples import continue_prompts, decode, first_three, tell
from measures.statistics import rouge_l


def rewrite(model, tokenizer, groups, sentences, config, seed, what="rewriting"):
    """Ask the model for a paraphrase of each sentence, after `shots` demonstrations from the groups (as many as fit):
    of a positive and of a negative in turn, or if `polite`, negative -> positive. Returns (texts, closed): None for a
    sentence too long for the context, and whether the model closed the quotation.
    """
    template = config.positive_prompt if config.polite else config.neutral_prompt
    begins = [prompt_for(template, s) for s in sentences]
    size = lambda text: len(tokenizer.encode_ordinary(text))
    room, budgets = model.config.n_positions - 1, [8 + int(1.5 * size(s)) for s in sentences]
    fits = [i for i, begin in enumerate(begins) if size(begin) + budgets[i] <= room]
    if long := [repr(s[:60]) for i, s in enumerate(sentences) if i not in fits]:
        tell(f"too long to be rewritten: {first_three(long)}")
    budget = max((budgets[i] for i in fits), default=0)  # tokens of the longest rewrite
    chosen = np.random.default_rng([config.seed, 4]).permutation(len(groups))[: config.shots]
    if config.polite:
        shots = [(groups[i].negatives[0], groups[i].positives[0]) for i in chosen]
    else:
        sides = [(groups[i].positives, groups[i].negatives)[n % 2] for n, i in enumerate(chosen)]
        shots = [(side[0], side[-1]) for side in sides]
    prompts = {}
    for i in fits:
        options = [few_shot(template, shots[j:]) + begins[i] for j in range(len(shots) + 1)]
        prompts[i] = next((p for p in options if size(p) + budget <= room), options[-1])
    texts, closed = [None] * len(sentences), [False] * len(sentences)
    if prompts:
        stop = closing_tokens(template, tokenizer)
        _, out = continue_prompts(model, tokenizer, list(prompts.values()), config, seed, 1, budget, stop, what)
        for i, (tokens,) in zip(prompts, out, strict=True):
            texts[i], closed[i] = answer(template, decode(tokenizer, tokens))
    return texts, closed


def draw_rewrites(model, tokenizer, groups, sentences, config):
    """Rewrites of the sentences, as `measure_rewrites` reads them."""
    texts, closed = rewrite(model, tokenizer, groups, sentences, config, config.seed + 5)
    return dict(inputs=sentences, texts=texts, closed=closed)


def measure_rewrites(drawn, scorer, same_event=None):
    """What `draw_rewrites` gave -> {name: rows}; one row per sentence, nan where there was no room for it.
    same_event(inputs, texts) -> array says whether a rewrite tells what its input tells, where that can be known."""
    texts = drawn["texts"]
    there = [i for i, t in enumerate(texts) if t is not None]
    toxicity, overlap, closed = np.full((3, len(texts), 1), np.nan)
    toxicity[there, 0] = scorer([texts[i] for i in there])
    overlap[there, 0] = [rouge_l(drawn["inputs"][i], texts[i]) for i in there]
    closed[there, 0] = [bool(drawn["closed"][i] and texts[i]) for i in there]
    rows = dict(
        rewrite_toxicity=toxicity,
        rewrite_input_toxicity=scorer(drawn["inputs"])[:, None],
        rewrite_rouge_l=overlap,
        rewrite_closed=closed,
    )
    if same_event:
        rows["rewrite_same_event"] = same_event(drawn["inputs"], [t or "" for t in texts])[:, None]
    return rows


def rewrite_file(config, ckpt, out):
    """--rewrite=FILE: a paraphrase of each line by the model at `ckpt` (a polite one with --polite). The folder `out`
    gets rewritten.txt (line by line as in FILE; an empty line where there is no answer) and, with toxicity and overlap,
    rewritten.jsonl. An interrupted run goes on."""
    hint, n = "give a text, line by line", 32  # lines that are rewritten, and kept, at once
    lines = read_text(find(config.rewrite), "text file", hint).removesuffix("\n").split("\n")
    texts = [line.strip() for line in lines if line.strip()]
    if not texts:
        raise ValueError(f"{config.rewrite} holds no text: {hint}")
    setup, groups = open_setup(config, {"tuned": ckpt}), data.load_groups(config.data)["train"]
    model, scorer = setup.models["tuned"], setup.scorer
    how = [config.shots, config.polite, config.neutral_prompt, config.positive_prompt, config.temperature]
    how += [config.top_p, config.seed, str(setup.dtype)]
    run = sha256([sha256(model), texts, *how, scorer.name, scorer.hash, [vars(g) for g in groups]])
    record = lambda a, b, x, y: dict(run=run, input=a, output=b, toxicity_input=x, toxicity=y, rouge_l=rouge_l(a, b))
    with held(out, others=True), tqdm(total=len(texts), desc="rewriting", delay=1) as bar:
        log = Log(out / "rewritten.jsonl", lambda r: r["run"] == run, hint="delete this file, it is made again")
        log.rewrite(log.records[: len(log.records) // n * n])
        bar.update(len(log.records))
        for i in range(len(log.records), len(texts), n):
            some = texts[i : i + n]
            with setup.amp():
                answers, _ = rewrite(model, setup.tokenizer, groups, some, config, config.seed + i, what=None)
            answers = [a or "" for a in answers]
            log.write(*map(record, some, answers, scorer(some).tolist(), scorer(answers).tolist()))
            bar.update(len(some))
        answers = iter(r["output"] for r in log.records)
        atomic_write(out / "rewritten.txt", "".join((next(answers) if line.strip() else "") + "\n" for line in lines))
    for r in log.records[:10]:
        print(report.wrap(r["input"], "  ") + "\n" + report.wrap(r["output"], "    -> "))
    answered = [r for r in log.records if r["output"]]
    before, after = (sum(r[k] > 0.5 for r in answered) for k in ("toxicity_input", "toxicity"))
    silent = len(texts) - len(answered)
    print(f"\n{len(texts)} lines, {silent} without an answer; of the others {before} were toxic, {after} are now")
    print(f"written to {out}: rewritten.txt, rewritten.jsonl")
