"""Groups for training, sampled from the base model itself.

A base GPT-2 goes on as its prompt began: behind demonstrations of polite paraphrases it writes
polite ones, behind rude ones rude ones. Each seed sentence is put behind both. What comes is
filtered by form, length, words in common with the seed, toxicity and near-duplicates (rejection
sampling). Of the negatives that pass, those closest to the positives in length and log-perplexity
are kept: hard negatives. For another attribute than toxicity see configs/gpt2_formal_data.py.

    python data_gen.py configs/gpt2_data.py --seeds=my_sentences.txt --out_dir=out/mine
    python train.py configs/gpt2_cp.py --data=out/mine/groups.jsonl --n_neg=1 --out_dir=out/mine_cp

A group depends on its own random numbers, not on its neighbours. Each block of seeds is written to
the log, then its groups to groups.jsonl; --resume goes on behind the last whole block of the log.
"""

from configs import before_torch, find, load_config, one_line_errors

if __name__ == "__main__":
    before_torch("data_gen", __doc__)

import json
import math
import time
import zlib
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import data.toy
from data.prompts import answer, closing_tokens, few_shot, form_filter, prompt_for, unquoted
from engine.run import Log, held
from measures import open_setup, report
from measures.groups import frames, scores
from measures.samples import decode
from measures.statistics import jaccard, word_overlap
from train import starting_model

SIDES = ("positive", "negative")
LOOSER = {"too short": "lower --min_length", "too long": "raise --max_length", "off topic": "lower --min_overlap"}
LOOSER |= {"copy": "raise --temperature", "too toxic": "raise --max_toxicity", "not toxic": "lower --min_toxicity"}
SURPLUS = 2  # sampling for a prompt stops at SURPLUS times the wanted number, so that there is a choice
MAX_JACCARD = 0.8  # of the words of two paraphrases in a group; more is a near-duplicate
MAX_SAME = 0.9  # of the words of a seed and a paraphrase; more is a copy
CHOICE = 20  # groups are drawn for each demonstration that is shown, so that there is a choice
DEALT = ("train",) * 7 + ("val",) + ("test",) * 2  # splits of seeds that have none of their own, in turn


# ---- filters, form_filter first: each returns why a paraphrase is rejected, or None --------------------------------


def length_filter(ratio, config):
    return "too short" if ratio < config.min_length else "too long" if ratio > config.max_length else None


def meaning_filter(seed, text, config):
    if word_overlap(seed, text) < config.min_overlap:
        return "off topic"
    return "copy" if jaccard(seed, text) > MAX_SAME else None


def toxicity_filter(toxicity, side, config):
    if side == "positive":
        return "too toxic" if toxicity > config.max_toxicity else None
    return "not toxic" if toxicity < config.min_toxicity else None


def closest_to_positives(samples, positives, n):
    """The n samples with the smallest |phi - m| + |log(tokens / t)|, in nats. m and t are medians of the positives, not
    the mean of the loss: one odd paraphrase must not decide."""
    phi, tokens = (float(np.median([s[key] for s in positives])) for key in ("phi", "tokens"))
    distance = [abs(s["phi"] - phi) + abs(math.log(s["tokens"] / tokens)) for s in samples]
    chosen = sorted(range(len(samples)), key=lambda i: distance[i])[:n]
    return [samples[i] for i in sorted(chosen)]  # in the order in which they were sampled


# ---- sampling one block of seeds -----------------------------------------------------------------------------------


@dataclass
class Seed:
    """A sentence to paraphrase, and what has become of its samples so far."""

    id: str
    text: str
    split: str
    tokens: int = 0
    max_new: int = 0  # tokens of a sample
    accepted: dict = field(default_factory=lambda: {side: [] for side in SIDES})
    outcomes: dict = field(default_factory=lambda: {side: Counter() for side in SIDES})  # why rejected, or "accepted"


class Sampler:
    """The base model, which has read the demonstrations of both prompts."""

    def __init__(self, config, seeds):
        self.config, self.wanted = config, dict(positive=config.n_pos, negative=config.n_neg)
        self.templates = dict(positive=config.positive_prompt, negative=config.negative_prompt)
        demos, self.shown = draw_demonstrations(config, seeds)
        self.setup = open_setup(config, {"model": config.init_from}, build=lambda _, tok: starting_model(config, tok))
        self.model, self.tokenizer = self.setup.models["model"], self.setup.tokenizer
        tokens = {side: [self.tokenizer.eot_token, *self.tokenizer.encode_ordinary(demos[side])] for side in SIDES}
        longest, context = max(map(len, tokens.values())), self.model.config.n_positions
        print(f"prompts      {config.shots} demonstrations from {config.demos}, {longest} tokens")
        if longest >= context:
            raise ValueError(f"{config.shots} demonstrations take {longest} tokens of {context}: lower --shots")
        self.room = context - longest
        self.stop = {side: closing_tokens(self.templates[side], self.tokenizer) for side in SIDES}
        with self.setup.amp():
            self.prefix = {side: self.model.read_prefix(tokens[side]) for side in SIDES}


def sampling_noise(config, seed, side, number, length):
    """Uniform random numbers (k, length, 4) of a seed, a prompt and a round. A longer draw begins with the shorter."""
    key = [config.seed, zlib.crc32(seed.id.encode()), SIDES.index(side), number]
    draw = np.random.default_rng(key).random((length, config.k, 4), dtype=np.float32)
    return torch.from_numpy(draw).transpose(0, 1)


def sample_answers(sampler, seeds, side, number):
    """Round `number` of a prompt: a list of k answers (text, closed) to each seed."""
    c, template, longest = sampler.config, sampler.templates[side], max(s.max_new for s in seeds)
    idx, lengths = data.pad([sampler.tokenizer.encode_ordinary(prompt_for(template, s.text)) for s in seeds])
    idx = idx[:, : int(lengths.max())].to(sampler.model.device)  # (B, T)
    noise = torch.cat([sampling_noise(c, s, side, number, longest) for s in seeds])  # (B * k, longest, 4)
    how = (longest, c.temperature, 0, c.top_p, sampler.stop[side], noise, c.k, sampler.prefix[side])
    tokens, count = (x.tolist() for x in sampler.model.generate(idx, lengths, *how))
    cut = [row[: min(n, seeds[i // c.k].max_new)] for i, (row, n) in enumerate(zip(tokens, count, strict=True))]
    answers = [answer(template, decode(sampler.tokenizer, row)) for row in cut]
    return [answers[i : i + c.k] for i in range(0, len(answers), c.k)]


def filter_answers(sampler, seed, side, number, answers):
    """Add the answers that pass all filters to those that the seed has, and count what becomes of each."""
    c, templates, passed = sampler.config, sampler.templates.values(), []
    accepted, outcomes = seed.accepted[side], seed.outcomes[side]
    for i, (text, closed) in enumerate(answers):
        tokens, reason = len(sampler.tokenizer.encode_ordinary(text)), form_filter(text, closed, templates)
        if reason := reason or length_filter(tokens / seed.tokens, c) or meaning_filter(seed.text, text, c):
            outcomes[reason] += 1
        else:
            overlap = round(word_overlap(seed.text, text), 4)
            passed.append(dict(text=text, prompt=side, round=number, sample=i, tokens=tokens, overlap=overlap))
    toxicity = sampler.setup.scorer([s["text"] for s in passed])  # in one call, of few texts: it may be slow
    for s, value in zip(passed, toxicity, strict=True):
        twin = any(jaccard(s["text"], a["text"]) > MAX_JACCARD for a in accepted) and "near-duplicate"
        reason = toxicity_filter(value, side, c) or twin
        outcomes[reason or "accepted"] += 1
        if not reason:
            accepted.append(s | dict(toxicity=round(float(value), 4)))


def sample_block(sampler, seeds):
    """All rounds of some seeds. Returns their records for the log."""
    with sampler.setup.amp():
        for number in range(sampler.config.rounds):
            for side in SIDES:
                if active := [s for s in seeds if len(s.accepted[side]) < SURPLUS * sampler.wanted[side]]:
                    for s, answers in zip(active, sample_answers(sampler, active, side, number), strict=True):
                        filter_answers(sampler, s, side, number, answers)
        samples = [sample for s in seeds for side in SIDES for sample in s.accepted[side]]
        texts = [s["text"] for s in samples]
        phi = scores(sampler.model, frames(texts, sampler.tokenizer, sampler.model, math.inf))
    for sample, value in zip(samples, phi, strict=True):
        sample["phi"] = round(float(value), 4)
    return [log_record(sampler, s) for s in seeds]


def log_record(sampler, seed):
    """A seed's line of the log: what became of its samples, and its group or `why` it has none."""
    c, accepted = sampler.config, seed.accepted
    why = " and ".join(f"too few {side}s" for side in SIDES if len(accepted[side]) < sampler.wanted[side])
    record = dict(id=seed.id, why=why, counts=seed.outcomes)
    if not why:
        positives = closest_to_positives(accepted["positive"], accepted["positive"], c.n_pos)  # without the odd ones
        negatives = closest_to_positives(accepted["negative"], positives, c.n_neg)
        mean = lambda samples: np.mean([[s["tokens"], s["phi"]] for s in samples], axis=0).round(4).tolist()
        record["match"] = dict(positives=mean(positives), before=mean(accepted["negative"]), after=mean(negatives))
        texts = dict(positives=[s.pop("text") for s in positives], negatives=[s.pop("text") for s in negatives])
        sampling = dict(seed=c.seed, model=c.init_from, positives=positives, negatives=negatives)
        record["group"] = dict(id=seed.id, input=seed.text, **texts, split=seed.split, sampling=sampling)
    return with_sum(record)


def with_sum(record):
    """A record and the CRC-32 of it: a resumed run builds on what the log says."""
    return record | dict(crc32=zlib.crc32(json.dumps(record, sort_keys=True).encode()))


# ---- seeds and demonstrations --------------------------------------------------------------------------------------


def read_seeds(config):
    """([Seed], number of repeats) of a text file, a group file (which gives id and split) or the toy world."""
    path, hint = Path(config.seeds), "give a text with one sentence a line, or a group file"
    if config.seeds == "toy":
        found = [(f"toy-seed-{i:04d}", text, DEALT[i % 10]) for i, text in enumerate(data.toy.seeds())]
    elif not config.seeds:
        raise ValueError(f"no seeds: {hint}, as --seeds=FILE")
    elif path.suffix.lower() in (".jsonl", ".json"):
        found = [(g.id, g.input, g.split) for g in data.read_groups(find(path), "seeds")]
    else:
        lines = data.read_text(find(path), "text file", hint).split("\n")
        lines = [(n, line) for n, line in enumerate(lines, 1) if line.strip()]
        found = [(f"{path.stem}-{n:04d}", line, DEALT[i % 10]) for i, (n, line) in enumerate(lines)]
    if not found:
        raise ValueError(f"{config.seeds} holds no sentence: {hint}")
    seeds = {}
    for name, text, split in found:
        seeds.setdefault(unquoted(text).lower(), Seed(name, unquoted(text), split))
    return list(seeds.values()), len(found) - len(seeds)


def draw_demonstrations(config, seeds):
    """({side: text}, inputs shown): the same groups for both prompts, those whose paraphrases are nearest to the input.
    Groups whose input is a seed come last."""
    groups = data.load_groups(config.demos, "demos")["train"]
    if len(groups) < config.shots:
        raise ValueError(f"{config.demos} has {len(groups)} groups of split train: lower --shots={config.shots}")
    rng, texts = np.random.default_rng([config.seed, 8]), {s.text for s in seeds}
    is_seed = lambda g: unquoted(g.input) in texts
    near = lambda g, text: (same := jaccard(g.input, text)) * (same <= MAX_JACCARD)  # a copy would teach to copy
    best = lambda g: {side: max(getattr(g, side + "s"), key=lambda text: near(g, text)) for side in SIDES}
    drawn = sorted((groups[i] for i in rng.permutation(len(groups))), key=is_seed)[: CHOICE * config.shots]
    shown = sorted(drawn, key=lambda g: (is_seed(g), -sum(near(g, text) for text in best(g).values())))[: config.shots]
    pairs = {side: [(g.input, best(g)[side]) for g in shown] for side in SIDES}
    demos = {side: few_shot(getattr(config, side + "_prompt"), pairs[side]) for side in SIDES}
    return demos, {unquoted(g.input) for g in shown}


def usable_seeds(sampler, seeds):
    """(seeds that can be used, {why not: number of the others})."""
    usable, left_out, encode = [], Counter(), sampler.tokenizer.encode_ordinary
    for seed in seeds:
        seed.tokens = len(encode(seed.text))
        seed.max_new = int(sampler.config.max_length * seed.tokens) + 1  # a closing mark behind the longest that passes
        prompt = max(len(encode(prompt_for(template, seed.text))) for template in sampler.templates.values())
        if seed.text in sampler.shown:
            left_out["is a demonstration"] += 1
        elif prompt + seed.max_new > sampler.room:
            left_out["too long for the context"] += 1
        else:
            usable.append(seed)
    if usable:
        return usable, left_out
    why = ", ".join(f"{n} {reason}" for reason, n in left_out.items())
    raise ValueError(f"none of the {len(seeds)} seeds can be used ({why}): lower --shots, or give shorter ones")


# ---- the run and its report ----------------------------------------------------------------------------------------


def open_log(path, config, seeds):
    """The log: a line of settings and seeds, which must be the same in a resumed run, then a record a seed."""
    first = {k: v for k, v in asdict(config).items() if k not in ("out_dir", "resume", "device", "compile")}
    first["seeds"] += f", crc32 {zlib.crc32(repr([(s.id, s.text, s.split) for s in seeds]).encode())}"
    log = Log(path)
    before, *records = log.records or [first]
    if damaged := [r.get("id") for r in records if r != with_sum({k: v for k, v in r.items() if k != "crc32"})]:
        raise ValueError(f"{path}: the record of {damaged[0]} is damaged: give another --out_dir")
    if others := ", ".join(f"{k} ({before.get(k)!r})" for k in first if before.get(k) != first[k]):
        raise ValueError(f"{path} was made with another {others}: give the same, or another --out_dir")
    whole = records if len(records) == len(seeds) else records[: len(records) // config.batch_size * config.batch_size]
    log.rewrite([first, *whole])
    return log


def generate_groups(config):
    """The whole run. Returns the records of all seeds. Raises ValueError if no group is complete."""
    began, out = time.time(), Path(config.out_dir)
    groups_file, log_file = out / "groups.jsonl", out / "groups.log.jsonl"
    there = [file for file in (groups_file, log_file) if file.exists()]
    if there and not config.resume:
        raise ValueError(f"{there[0]} exists: add --resume to go on with it, or give another --out_dir, or delete it")
    if there == [groups_file]:
        raise ValueError(f"{log_file} is missing, without which {groups_file} cannot go on: give another --out_dir")
    seeds, repeats = read_seeds(config)
    sampler = Sampler(config, seeds)
    seeds, left_out = usable_seeds(sampler, seeds)
    log = open_log(log_file, config, seeds)
    done = len(log.records) - 1
    derived = [r["group"] for r in log.records if "group" in r]
    groups = Log(groups_file, records=derived)  # what is there may be cut, or ahead of the log
    left_out += Counter({"repeats another": repeats})
    notes = [f"{n} left out: {why}" for why, n in left_out.items()] + [f"{done} are done"] * bool(done)
    print(report.wrap("; ".join([f"{config.seeds}: {len(seeds)}", *notes]), "seeds        "))
    print(f"groups       {config.n_pos} + {config.n_neg}, from {config.rounds} rounds of {config.k} samples at most\n")
    bar = tqdm(range(done, len(seeds), config.batch_size), unit="block", dynamic_ncols=True)
    for i in bar:
        block = sample_block(sampler, seeds[i : i + config.batch_size])
        log.write(*block)
        groups.write(*[r["group"] for r in block if "group" in r])
        bar.set_postfix(groups=len(groups.records), refresh=False)
        if i == 0 and (problem := nothing_accepted(block)):
            bar.write(report.wrap(f"NOTE {problem}. Going on: Ctrl-C stops"))
    records = log.records[1:]
    print_report(records, groups.records, config.seed)
    print(f"\n{time.time() - began:.0f} s in all\nwritten to {config.out_dir}: {groups_file.name}, {log_file.name}")
    if not groups.records:
        raise ValueError("no group is complete: " + (nothing_accepted(records) or "raise --rounds or lower --n_pos"))
    return records


def count_outcomes(records, side):
    return sum((Counter(r["counts"][side]) for r in records), Counter())


def nothing_accepted(records):
    """What to say if not one sample so far became a positive, or a negative; else None."""
    for side in SIDES:
        if not (count := count_outcomes(records, side))["accepted"]:
            why = ", ".join(f"{n} {reason}" for reason, n in count.most_common(3))
            advice = LOOSER.get(max(count, key=count.get, default=""), "give more --shots, or a better --init_from")
            return f"none of {count.total()} samples became a {side} ({why}): {advice}"


def print_report(records, groups, seed):
    """What became of seeds and samples, how close negatives and positives are, and three groups."""
    outcomes = Counter(r["why"] or "complete" for r in records)
    print(f"\n{len(records)} seeds: " + ", ".join(f"{n} {why}" for why, n in outcomes.most_common()))
    counts = [count_outcomes(records, side) for side in SIDES]
    cells = lambda reason: [f"{n[reason]} {n[reason] / max(1, n.total()):7.1%}" for n in counts]
    rows = [[reason, *cells(reason)] for reason, _ in sum(counts, Counter()).most_common()]
    print("\n" + report.format_table(["what became of the samples", *SIDES], rows))
    if groups:
        means = np.array([list(r["match"].values()) for r in records if "match" in r])  # (G, 3, 2): tokens, phi
        distance = abs(means[:, 1:] - means[:, :1]).mean(0)  # of negatives before and after the choice
        passed, kept = (f"{tokens:.2f} tokens and {phi:.2f} nats of phi" for tokens, phi in distance)
        print("\n" + report.wrap(f"negatives are {kept} from the positives of their group; all that passed, {passed}"))
    for i in sorted(np.random.default_rng([seed, 9]).permutation(len(groups))[:3]):
        print("\n" + report.wrap(f"{groups[i]['id']}: {groups[i]['input']}"))
        for sign, name in (("+", "positives"), ("-", "negatives")):
            for text, sampling in zip(groups[i][name], groups[i]["sampling"][name], strict=True):
                print(report.wrap(text, f"  {sign} {sampling['phi']:5.2f}  "))


def main(argv=None):
    with one_line_errors("data_gen.py", "finished blocks are kept, the same command with --resume goes on"):
        config = load_config("data_gen", argv)
        with held(config.out_dir):
            generate_groups(config)


if __name__ == "__main__":
    main()
