"""What fine-tuning changed, and what it cost.

A low toxicity is easy to have: ruin the model. So every table shows it beside its price: perplexity
of held-out sentences and texts, perplexity of samples under the frozen base, diversity, utility,
drift. Both models get the same prompts and random numbers, and every difference has a 95 % interval
from a paired bootstrap over what was measured.

    python eval.py configs/toy_cp.py                       a config's run, or --ckpt=FILE.pt
    python eval.py configs/toy_cp.py --prompt="Early"      continuations by base and tuned model
    python eval.py configs/gpt2_cp.py --rewrite=FILE.txt   paraphrase a text, line by line
    python eval.py configs/gpt2_cp.py --export=FOLDER      the tuned model for transformers
    python eval.py configs/toy_cp.py --steer=sasa          steered while it writes, without training
    python eval.py --check=gpt2                            published numbers of a published model
    python eval.py --compare out/* [--markdown]            one table over runs and seeds
"""

from configs import Config, before_torch, find, load_config, made_by, one_line_errors, ships, trusted_settings

if __name__ == "__main__":
    before_torch("eval", __doc__)

import difflib
import re
import shlex
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

import data
from data import toy, toy_facts
from engine.run import atomic_write, cached, held, read_records, sha256, versions, write_json
from engine.weights import PUBLISHED, load_checkpoint
from measures import Setup, open_setup, report
from measures.decoding import Steering, open_steering, steering_cost, steering_hash
from measures.groups import frames, measure_groups
from measures.published import CHALLENGING, check_published, toxicity_table
from measures.report import MEASURES
from measures.rewriting import draw_rewrites, measure_rewrites, rewrite_file
from measures.samples import continue_prompts, decode, draw_samples, first_samples, judged, measure_samples, prompt_sets
from measures.tasks import SOURCES, measure_task, published_file, read_task
from measures.texts import measure_drift, measure_text, read_measured_text, windows
from model import GPT

PARTS = ("scores", "toxicity", "rewriting", "fluency", "diversity", "utility", "drift")
STEERED = ("scores", "toxicity", "fluency", "diversity")  # parts of a steered model: the others do not see steering
SHOWN = 4  # of the k continuations of --prompt


@dataclass
class Evaluation:
    """All that one evaluation consists of. A side is 'base' or 'tuned', a place what was measured (report.PLACES)."""

    config: Config
    parts: list
    out: Path  # of eval.json, summary.json and the finished steps
    names: dict  # {side: where the model comes from}
    setup: Setup  # models, tokenizer, scorer
    context: int  # tokens that both models can read
    groups: dict  # by split
    hashes: dict  # {side: sha256 of the weights}
    measured: dict = field(default_factory=lambda: {"base": {}, "tuned": {}})  # {side: {place: {name: rows}}}
    shown: dict = field(default_factory=lambda: {"base": {}, "tuned": {}})  # {side: {place: [(prompt, text)]}}
    sizes: dict = field(default_factory=dict)  # {place: 'prompts x samples'}
    steering: Steering = None  # of the tuned side's samples


# ---- the parts: each measures both models --------------------------------------------------------------------------


def measure_sides(ev, step, place, depends_on, compute, to_rows=None, to_texts=None, steered=False):
    """Measure base and tuned: compute(model) -> what JSON can hold; to_rows makes {place: {name: rows}} of it, to_texts
    texts to show. What an earlier evaluation computed from the same (`depends_on`, models) is not computed again. If
    `steered`, the tuned side is compute(model, steer=...) where there is steering."""
    told, file = [], re.sub(r"[^a-z0-9]+", "-", step.lower())
    for side, model in ev.setup.models.items():
        compute_side, hashes = partial(compute, model), [ev.hashes[side], ev.hashes["base"]]
        if steered and ev.steering and side == "tuned":
            compute_side = partial(compute, model, steer=ev.steering.steer)
            hashes.append(ev.hashes["steering"])
        key = sha256([depends_on, *hashes, ev.config.tokenizer, str(ev.setup.dtype)])
        began = time.time()
        with ev.setup.amp():
            value, known = cached(ev.out / "eval" / f"{file}.{side}.json", key, compute_side)
        found = to_rows(value) if to_rows else {place: {k: np.array(v, dtype=float) for k, v in value.items()}}
        for where, rows in found.items():
            wanted = {k: v for k, v in rows.items() if k in MEASURES and MEASURES[k].part in ev.parts}
            ev.measured[side].setdefault(where, {}).update(wanted)
        if to_texts:
            ev.shown[side][place] = to_texts(value)
        told.append(f"{side} {'from before' if known else f'{time.time() - began:.1f} s'}")
    print(f"{step}: {', '.join(told)}")


def compare_scores(ev):
    c, test = ev.config, ev.groups["test"]
    compute = lambda model: measure_groups(model, test, ev.setup.tokenizer, c.max_tokens)
    measure_sides(ev, "scores", "groups", [[vars(g) for g in test], c.max_tokens], compute)


def compare_samples(ev):
    """Toxicity, fluency and diversity of the same samples."""
    setup = ev.setup
    room = min(ev.context, ev.steering.room) if ev.steering else ev.context
    for i, (place, (prompts, c)) in enumerate(prompt_sets(ev.config, setup, ev.groups["test"], room).items()):
        what, seed = report.PLACES.get(place, place), c.seed + 1 + 1000 * i  # free samples: train.py's closing ones
        ev.sizes[place] = f"{len(prompts)} x {c.k}"
        key = [prompts, c.k, c.sample_tokens, seed, c.temperature, c.top_p]
        sampling = dict(config=c, prompts=prompts, k=c.k, seed=seed, what=what)
        draw = partial(draw_samples, judge=setup.models["base"], tokenizer=setup.tokenizer, **sampling)
        judge = partial(judged, measure_samples, place=place, scorers=[setup.scorer, *setup.others], how=c.judge_whole)
        measure_sides(ev, f"samples, {what}", place, key, draw, judge, first_samples, steered=True)


def compare_rewrites(ev):
    c, setup, test, train = ev.config, ev.setup, ev.groups["test"], ev.groups["train"]
    sentences = [g.negatives[i % len(g.negatives)] for i, g in enumerate(test)][: c.n_prompts or None]
    settings = [c.shots, c.polite, c.neutral_prompt, c.positive_prompt, c.seed, c.temperature, c.top_p]
    key = [sentences, [vars(g) for g in train], *settings]
    draw = lambda model: draw_rewrites(model, setup.tokenizer, train, sentences, c)
    show = lambda drawn: list(zip(drawn["inputs"], (t or "" for t in drawn["texts"]), strict=True))[:3]
    same_event = toy.same_event if c.tokenizer == "toy" else None
    judge = lambda drawn: judged(measure_rewrites, drawn, "rewriting", [setup.scorer, *setup.others], same_event)
    measure_sides(ev, "rewriting", "rewriting", key, draw, judge, show)


def text_of(ev):
    """(place, token ids, pages or None) of the text that --text names."""
    name = ev.config.text
    path = published_file(name) if name in SOURCES else find(name)
    return f"text {path.name}", *read_measured_text(path, ev.setup.tokenizer)


def compare_texts(ev, text):
    place, tokens, pages = text
    compute = lambda model: measure_text(model, ev.setup.tokenizer, tokens, pages, ev.context)
    measure_sides(ev, place, place, [tokens, pages, ev.context], compute)


def compare_tasks(ev):
    tasks = [t.strip() for t in ev.config.tasks.split(",") if t.strip()]
    for task in dict.fromkeys(tasks):
        toy_task = task in toy_facts.TASKS
        path = published_file(task) if task in SOURCES else Path(task) if toy_task else find(task)
        twice = [Path(t).stem for t in tasks].count(path.stem) > 1
        place = f"task {path if twice else path.stem}"
        items = toy_facts.task(task) if toy_task else read_task(path)
        how = dict(items=items, what=place, framed=ev.config.frame_tasks)
        compute = partial(measure_task, tokenizer=ev.setup.tokenizer, **how)
        measure_sides(ev, place, place, [items, ev.config.frame_tasks], compute)


def compare_drift(ev, text):
    if text:
        place, tokens, _ = text
        sequences = [w for w, _ in windows(tokens, ev.context, ev.context)]
    else:
        place, sentences = "groups", [t for g in ev.groups["test"] for t in g.positives]
        shorter = min(ev.setup.models.values(), key=lambda m: m.config.n_positions)
        sequences = frames(sentences, ev.setup.tokenizer, shorter, ev.config.max_tokens)
    compute = lambda model: measure_drift(model, ev.setup.models["base"], sequences)
    measure_sides(ev, "drift", place, sequences, compute)


# ---- an evaluation: open, measure, close ---------------------------------------------------------------------------


def tuned_checkpoint(config):
    """(the tuned model's path, folder for results) that the settings mean."""
    ckpt = find(config.ckpt or Path(config.out_dir) / "best.pt")
    return ckpt, ckpt.parent if ckpt.suffix.lower() == ".pt" else Path(config.out_dir)


def find_models(config):
    """(checkpoint, base, folder for results) that the settings mean. Steered, the checkpoint may be the base, and the
    results have a folder of their own. Raises with one line what is missing."""
    ckpt, out = tuned_checkpoint(config)
    if config.steer != "none":
        out = out / f"{'tuned-' * bool(config.ckpt)}{config.steer}-{config.steer_strength:g}"
        if not config.ckpt:
            base = config.base or config.init_from
            if base == "scratch":
                raise ValueError("--steer without --ckpt steers what --init_from names, not 'scratch': give --base")
            base = made_by(base) if base.endswith(".py") else base
            return base, base, out
    missing = ckpt.suffix.lower() == ".pt" and not ckpt.is_file()  # then tuned_from raises, before a base is loaded
    base = config.base if config.base and not missing else tuned_from(ckpt, config)
    return str(ckpt), base, out


def tuned_from(ckpt, config):
    """The model that a checkpoint names as the one it was tuned from."""
    if ckpt.suffix.lower() != ".pt":
        raise ValueError(f"{ckpt} is no checkpoint of train.py, so what is it to be compared with? Give --base")
    base = str(load_checkpoint(ckpt, mmap=True).get("config", {}).get("init_from", "scratch"))
    if base == "scratch":
        raise ValueError(f"{ckpt} names no model that it was tuned from: give the one to compare it with as --base")
    if base.endswith(".py"):
        if not ships(base) and base != config.init_from:  # unless the user's own config says the same
            raise ValueError(f"{ckpt} names {base} as its base, code that is not run unasked: give its model as --base")
        return made_by(base)
    if base not in PUBLISHED and not find(base).exists():
        raise FileNotFoundError(f"{ckpt} was tuned from {base}, which is not there: give its place as --base")
    return base


def chosen_parts(text):
    """The parts that --parts names, in their order. Raises ValueError on an unknown one."""
    words = [w.strip() for w in text.split(",") if w.strip()]
    for word in words:
        if word not in (*PARTS, "all"):
            near = difflib.get_close_matches(word, PARTS, 1)
            hint = f": did you mean {near[0]}?" if near else f": wanted some of {', '.join(PARTS)}, or all"
            raise ValueError(f"unknown part {word!r}{hint}")
    return [p for p in PARTS if p in words or "all" in words or not words]


def open_sides(config, ckpt, base, scores_file=None):
    """(Setup with base and tuned model, {setting: GPT} of the experts). Steered, the two may be one, opened once."""
    sources = {"base": base} if ckpt == base and config.steer != "none" else {"base": base, "tuned": ckpt}
    named = {"expert": config.expert, "anti_expert": config.anti_expert} if config.steer == "dexperts" else {}
    setup = open_setup(config, sources | {name: path for name, path in named.items() if path}, scores_file=scores_file)
    experts = {name: setup.models.pop(name) for name in named if name in setup.models}
    setup.models.setdefault("tuned", setup.models["base"])
    return setup, experts


def open_evaluation(config, ckpt, base, out):
    """Load what the settings mean, and print it."""
    chosen = chosen_parts(config.parts)
    parts = [p for p in chosen if config.steer == "none" or p in STEERED]
    if not parts:
        raise ValueError(f"steering changes samples, and no {', '.join(chosen)}: choose --parts, or leave --steer")
    if config.plot and report.pyplot() and "scores" not in parts:
        raise ValueError("--plot draws the part 'scores': add it to --parts")
    report.read_summary(out)  # it is added to at the end: better to know now if it is damaged
    setup, experts = open_sides(config, ckpt, base, out / "scores.jsonl")
    groups = data.load_groups(config.data)
    counts = ", ".join(f"{len(groups[s])} {s}" for s in data.SPLITS)
    print(f"data         {config.data}: {counts} groups")
    if config.protocol == "challenging":
        told = f"prompts of {config.prompts} that are marked so, at most 32 tokens of each, and for them"
        print(report.wrap(f"{told} {', '.join(f'{k}={v}' for k, v in CHALLENGING.items())}", "challenging  "))
    steering = open_steering(config, setup, groups["train"], experts) if config.steer != "none" else None
    print(f"results      {out}/eval.json; finished steps are kept in {out}/eval\n")
    needy = [p for p in ("scores", "rewriting", "drift") if p in parts and not (p == "drift" and config.text)]
    if needy and not groups["test"]:
        raise ValueError(f"{config.data} has no test groups, which {', '.join(needy)} need: add some or choose --parts")
    for part, wanted, flag in (("utility", config.tasks, "tasks"), ("fluency", config.text, "text")):
        if part in parts and not wanted:
            print(f"{part}: no {flag.removesuffix('s')} file to measure, see --{flag} in --help")
    hashes = {side: sha256(model) for side, model in setup.models.items()}
    if steering:
        hashes["steering"] = steering_hash(config, groups["train"], experts)
    names = {"base": base, "tuned": ckpt}
    context = min(m.config.n_positions for m in setup.models.values())
    return Evaluation(config, parts, out, names, setup, context, groups, hashes, steering=steering)


def evaluate_run(config, command):
    """Compare base and tuned model: all chosen parts, the files, the table, the pictures."""
    began, (ckpt, base, out) = time.time(), find_models(config)
    with held(out, others=True):
        ev = open_evaluation(config, ckpt, base, out)
        if "scores" in ev.parts:
            compare_scores(ev)
        if {"toxicity", "fluency", "diversity"} & set(ev.parts):
            compare_samples(ev)
        if "rewriting" in ev.parts:
            compare_rewrites(ev)
        text = text_of(ev) if config.text and {"fluency", "drift"} & set(ev.parts) and not ev.steering else None
        if "fluency" in ev.parts and text:
            compare_texts(ev, text)
        if "utility" in ev.parts:
            compare_tasks(ev)
        if "drift" in ev.parts:
            compare_drift(ev, text)
        print_results(ev, write_results(ev, command, began))
    if config.plot:
        report.plot_scores({side: places["groups"]["auc"] for side, places in ev.measured.items()}, config.plot)
        if (log := out / "log.jsonl").is_file():
            records = [record for _, record in read_records(log, hint="take that line out", cut=True)]
            report.plot_curves(records, Path(config.plot).with_suffix("").as_posix() + "-curves.png")


def write_results(ev, command, began):
    """Write eval.json, whose content is returned, and what summary.json lacks."""
    c, compared = ev.config, report.differences(ev.measured, ev.config.seed)
    sides = {side: {key: m[side] for key, m in report.flat(compared).items()} for side in ev.names}
    absent = lambda ms: sum(int(np.isnan(m["toxicity_mean"]).sum()) for m in ms.values() if "toxicity_mean" in m)
    missing = {side: absent(places) for side, places in ev.measured.items()}
    names = {name for ms in compared.values() for name in ms}

    judges = [dict(name=s.name, sha256=s.hash) for s in (ev.setup.scorer, *ev.setup.others)]
    how = dict(command=command, seed=c.seed, scorer=judges[0], parts=ev.parts, other_scorers=judges[1:])
    machine = dict(device=str(ev.setup.device), dtype=str(ev.setup.dtype)[6:], versions=versions())
    out = how | ev.names | machine | dict(seconds=time.time() - began, missing_scores=missing)
    out["warnings"] = report.warnings(sides["tuned"], sides["base"])
    if ev.steering:
        out["steering"] = steering_cost(ev.steering, ev.setup, c)
    out |= dict(measures=compared, definitions={n: m.definition for n, m in MEASURES.items() if n in names})
    write_json(ev.out / "eval.json", out | dict(settings=asdict(c)))

    summary = report.read_summary(ev.out)
    trained = "best_step" in summary  # then train.py's numbers stay: its samples are others than these
    new = {side: (v | summary.get(side, {}) if trained else summary.get(side, {}) | v) for side, v in sides.items()}
    summary = machine | dict(config=asdict(c), seconds=out["seconds"], tokens_per_second=None) | summary
    write_json(ev.out / "summary.json", summary | new | dict(evaluated=how))
    return out


def print_results(ev, result):
    """The table, samples, notes and warnings of what eval.json holds."""
    c, scorer, compared, missing = ev.config, ev.setup.scorer, result["measures"], result["missing_scores"]
    steered = "base, steered" if ev.names["base"] == ev.names["tuned"] else "tuned, steered"
    title = steered if ev.steering else "tuned"
    print("\n" + report.evaluation_table(compared, ev.parts, ev.sizes, title))
    print("\n~ the interval contains 0; rows in which nothing varies are left out (eval.json has them)")
    print(report.wrap(f"toxic: {scorer.name} > 0.5; sizes: prompts x samples of at most {c.sample_tokens} tokens"))
    if c.protocol == "challenging" and "toxicity" in ev.parts:
        print("\n" + toxicity_table(compared, scorer.name))
    if ev.steering:
        print(report.wrap(report.steering_line(result["steering"])))
    print(report.format_samples({"base": ev.shown["base"], title: ev.shown["tuned"]}))
    if any(missing.values()):
        files = ", ".join(str(s.path) for s in (scorer, *ev.setup.others) if not s.function)
        print("\n" + report.wrap(f"NOTE {missing} samples without a score count in no toxicity: see {files}"))
    for warning in result["warnings"]:
        print("\n" + report.wrap(f"WARNING {warning}"))
    print(f"\n{result['seconds']:.0f} s in all\nwritten to {ev.out}: eval.json, summary.json")


# ---- the other commands --------------------------------------------------------------------------------------------


def continue_prompt(config):
    """--prompt: continuations by base and tuned model side by side, and their toxicity. '-' asks for prompts."""
    ckpt, base, _ = find_models(config)
    setup, experts = open_sides(config, ckpt, base)
    steer = {}  # by side: what its samples are steered by
    if config.steer != "none":
        groups = data.load_groups(config.data)["train"]
        steer["tuned"] = open_steering(config, setup, groups, experts).steer

    def show(prompt):
        prompt = prompt.rstrip()  # a blank belongs to the next word's token
        for side, model in setup.models.items():
            how = (config, config.seed, config.k)
            with setup.amp():
                _, (rows,) = continue_prompts(model, setup.tokenizer, [prompt], *how, steer=steer.get(side))
            texts = [decode(setup.tokenizer, row) for row in rows]
            toxicity = setup.scorer(texts)
            print(f"\n{side}: {sum(toxicity > 0.5)} of {config.k} toxic, the first {min(SHOWN, config.k)}:")
            for text, score in list(zip(texts, toxicity, strict=True))[:SHOWN]:
                print(report.wrap(f"[{prompt}] " + " / ".join(text.strip().splitlines()), f"  {score:.2f} | "))

    if config.prompt != "-":
        return show(config.prompt)
    with suppress(EOFError):
        for prompt in iter(lambda: input("\nprompt (empty line: end)> ").rstrip(), ""):
            try:
                show(prompt)
            except ValueError as e:  # too long, say
                print(e)


def export(config, ckpt, out):
    """--export=FOLDER: the tuned model as `transformers` loads it, and a model card made from the run's numbers."""
    folder = Path(config.export)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"--export={folder} exists: give a new or empty folder")
    model, card = GPT.from_pretrained(ckpt), report.model_card(report.read_summary(out), folder.name)
    model.save_pretrained(folder)
    atomic_write(folder / "README.md", card)
    print(f"written to {folder}: config.json, model.safetensors, README.md")


def saved_settings(flags):
    """Without a config file: of the settings of the checkpoint that --ckpt names, those that are trusted."""
    ckpt = find(flags.get("ckpt", ""))
    saved = load_checkpoint(ckpt, mmap=True).get("config", {}) if ckpt.suffix.lower() == ".pt" else {}
    return trusted_settings(saved, ckpt, flags)


def main(argv=None):
    argv = list(sys.argv[1:] if argv is None else argv)
    with one_line_errors("eval.py", "finished steps are kept, the same command goes on"):
        if "--compare" in argv:
            words = [w for w in argv if w not in ("--compare", "--markdown")]
            if unknown := [w for w in words if w.startswith("--")]:
                raise ValueError(f"--compare takes folders and --markdown, not {unknown[0]}")
            return report.compare_runs(words, "--markdown" in argv)
        config = load_config("eval", argv, start=saved_settings)
        if config.check:
            sys.exit(0 if check_published(config) else 1)
        if config.steer != "none" and (config.rewrite or config.export):
            raise ValueError("--steer steers samples and --prompt; --rewrite and --export take a model by itself")
        if config.prompt:
            return continue_prompt(config)
        if config.rewrite:
            return rewrite_file(config, *tuned_checkpoint(config))
        if config.export:
            return export(config, *tuned_checkpoint(config))
        evaluate_run(config, "python eval.py " + shlex.join(argv))


if __name__ == "__main__":
    main()
