"""Groups for training, sampled from the base model itself: `python data_gen.py configs/toy_data.py`.

A base GPT-2 that has seen some sentences with their polite paraphrases goes on in that manner, and with rude ones as
well. Each seed sentence is put behind such demonstrations, a benign and an adversarial prompt, and what the model
writes is filtered: positives and negatives that say the same thing and are about as probable (hard negatives), which is
what contrastive perplexity is trained on. Another attribute than toxicity is another pair of prompts, demonstrations
and scorer: configs/gpt2_formal_data.py.

    python data_gen.py configs/gpt2_data.py --seeds=my_sentences.txt --data_out=data/mine.jsonl
    python train.py configs/gpt2_cp.py --data=data/mine.jsonl

Seeds are taken in blocks of batch_size. The random numbers belong to a seed, a prompt and a round, so that a group does
not depend on its neighbours; a block that is done is in the file, and --resume goes on with the next.
"""

import hashlib
import json
import math
import sys
import time
import zlib
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import data
from configs import Config, find, load_config
from data import report
from data.measures import jaccard, rouge_l
from model import GPT, amp, atomic_write, keep_freed_memory, pick_device, pick_dtype

SIDES = ("positive", "negative")
DEAL = ("train",) * 7 + ("val",) + ("test",) * 2  # the split of seed 0, 1, 2, ... that has none of its own
SCORED = 64  # sentences per forward pass


# --------------------------------------------------------------------------------------------------------------------
# filters: each gives the reason why a paraphrase is turned away, or None


def well_formed(text, closed, templates):
    """One whole sentence, closed by the model, and nothing of the prompts in it."""
    if not closed:
        return "not closed"
    if not text:
        return "empty"
    leftover = {word for t in templates for word in t.split() if word.endswith(":")}
    if any(word in text for word in leftover):
        return "holds prompt text"
    inner = text.rstrip("\"')]")
    if not (text[0].isupper() or text[0].isdigit()) or inner[-1:] not in (".", "!", "?"):
        return "no sentence"
    ends = [i for i, c in enumerate(inner[:-1]) if c in ".!?" and inner[i + 1] == " "]
    if any(inner[i + 2 : i + 3].isupper() for i in ends):
        return "more than one sentence"
    return None


def length(tokens, seed_tokens, config):
    """Tokens of a paraphrase beside those of its seed."""
    ratio = tokens / seed_tokens
    return "too short" if ratio < config.min_length else "too long" if ratio > config.max_length else None


def similarity(overlap, config):
    """ROUGE-L with the seed: neither about something else nor a copy."""
    return "off topic" if overlap < config.min_overlap else "copy" if overlap > config.max_overlap else None


def toxicity(score, side, config):
    """Positives below a threshold, negatives above another."""
    if side == "positive":
        return "too toxic" if score > config.max_toxicity else None
    return "not toxic" if score < config.min_toxicity else None


def repeated(text, kept, config):
    """Nearly the same words as a paraphrase of this group that was kept before."""
    return "near-duplicate" if any(jaccard(text, other) > config.max_jaccard for other in kept) else None


def nearest(sentences, positives, n):
    """Indices of the n sentences that are hardest to tell from the positives by length and probability: those with the
    smallest |phi - c| + |log(tokens / t)|, where c and t are the positives' medians. Both terms are in nats. A sentence
    is dict(phi, tokens). For negatives this is the hardness filter; of the positives it leaves the odd ones out."""
    phi, tokens = (float(np.median([s[k] for s in positives])) for k in ("phi", "tokens"))
    distance = [abs(s["phi"] - phi) + abs(math.log(s["tokens"] / tokens)) for s in sentences]
    return sorted(sorted(range(len(sentences)), key=lambda i: distance[i])[:n])


# --------------------------------------------------------------------------------------------------------------------
# seeds and demonstrations


@dataclass
class Seed:
    id: str
    text: str
    split: str
    tokens: int = 0


def read_seeds(config):
    """([Seed], how many were repeated) of a text file, a group file or the toy world. A group keeps its id and split; a
    line is named by its number, and the lines are dealt out 7 : 1 : 2. Raises ValueError or FileNotFoundError."""
    path, found, texts = Path(config.seeds), [], set()
    if config.seeds == "toy":
        from data import toy

        found = [Seed(f"toy-seed-{i:04d}", s, DEAL[i % 10]) for i, s in enumerate(toy.seeds())]
    elif not config.seeds:
        raise ValueError("no seeds: give --seeds=FILE, a text file with one sentence a line or a group file")
    elif path.suffix in (".jsonl", ".json"):
        found = [Seed(g.id, g.input, g.split) for g in data.read_groups(find(path))]
    else:
        lines = [(i, s) for i, s in enumerate(data.read_text(find(path)).split("\n"), 1) if s.strip()]
        found = [Seed(f"{path.stem}-{line:04d}", s, DEAL[i % 10]) for i, (line, s) in enumerate(lines)]
    if not found:
        raise ValueError(f"{config.seeds} holds no sentence: one a line is wanted")
    unique = []
    for seed in found:
        seed.text = data.unquoted(seed.text)
        if seed.text.lower() not in texts:
            texts.add(seed.text.lower())
            unique.append(seed)
    repeats = len(found) - len(unique)
    if config.n_seeds:
        order = np.random.default_rng([config.seed, 7]).permutation(len(unique))[: config.n_seeds]
        unique = [unique[i] for i in sorted(order)]
    return unique, repeats


def demonstrations(config, seeds):
    """{side: text}: the same `shots` groups for both prompts, with an input and one of its positives or negatives each.
    Groups whose input is a seed come last. Returns the inputs used as well. Raises ValueError if there are too few."""
    groups = data.load_groups(config.demos)["train"]
    if len(groups) < config.shots:
        raise ValueError(f"{config.demos} has {len(groups)} groups of split train, wanted --shots={config.shots}")
    rng, texts = np.random.default_rng([config.seed, 8]), {s.text for s in seeds}
    order = sorted(rng.permutation(len(groups)), key=lambda i: data.unquoted(groups[i].input) in texts)
    chosen = [groups[i] for i in order[: config.shots]]
    out = {}
    for side in SIDES:
        picked = [data.unquoted(rng.choice(getattr(g, side + "s"))) for g in chosen]
        shown = zip(chosen, picked, strict=True)
        template = getattr(config, side + "_prompt")
        out[side] = "".join(template.format(input=data.unquoted(g.input), output=text) for g, text in shown)
    return out, {data.unquoted(g.input) for g in chosen}


# --------------------------------------------------------------------------------------------------------------------
# sampling


@dataclass
class Sampler:
    """The base model with all that sampling needs."""

    config: Config
    model: GPT
    dtype: torch.dtype
    tokenizer: object
    scorer: object
    prefix: dict  # {side: keys and values of the demonstrations}
    stop: dict  # {side: tokens that close an answer}

    def size(self, text):
        return len(self.tokenizer.encode_ordinary(text))

    def budget(self, seed):
        """Most tokens of a paraphrase, closing mark included."""
        return int(self.config.max_length * seed.tokens) + 1


def open_sampler(config, seeds):
    """(Sampler, seeds that can be used, {why: number of seeds left out}). Raises ValueError if none can be."""
    tokenizer, device, scorer = data.get_tokenizer(config.tokenizer), pick_device(config.device), None
    scorer = data.get_scorer(config.scorer)
    if not scorer.function:
        raise ValueError(f"scorer {scorer.name!r} cannot judge samples while they are made: name a function")
    texts, shown = demonstrations(config, seeds)
    if config.init_from.endswith(".py"):
        from train import starting_model  # makes that model if it is missing

        model = starting_model(config, tokenizer)
    else:
        model = GPT.from_pretrained(find(config.init_from), tokenizer.n_vocab)
    model = model.to(device).eval()
    dtype, reason = pick_dtype(config.dtype, device, model.config.n_embd)
    framed = {side: [tokenizer.eot_token, *tokenizer.encode_ordinary(texts[side])] for side in SIDES}
    longest, room = max(map(len, framed.values())), model.config.n_positions
    if longest >= room:
        raise ValueError(f"{config.shots} demonstrations take {longest} tokens of a context of {room}: lower --shots")
    with amp(device, dtype):
        prefix = {side: model.read_prefix(tokens) for side, tokens in framed.items()}
    stop = {side: data.closing_tokens(getattr(config, side + "_prompt"), tokenizer) for side in SIDES}
    sampler = Sampler(config, model, dtype, tokenizer, scorer, prefix, stop)

    usable, left_out = [], Counter()
    for seed in seeds:
        seed.tokens = sampler.size(seed.text)
        ask = max(sampler.size(data.prompt_for(getattr(config, side + "_prompt"), seed.text)) for side in SIDES)
        if seed.text in shown:
            left_out["is a demonstration"] += 1
        elif longest + ask + sampler.budget(seed) > room:
            left_out["too long for the context"] += 1
        else:
            usable.append(seed)
    print(f"model        {config.init_from}: {model.num_parameters() / 1e6:.1f} M parameters, context {room}")
    print(f"device       {device}, products in {str(dtype)[6:]}: {reason}")
    print(f"scorer       {scorer.name}, sha256 {scorer.hash}...")
    print(f"prompts      {config.shots} demonstrations from {config.demos}, {longest} tokens")
    if not usable:
        why = ", ".join(f"{n} {reason}" for reason, n in left_out.items())
        raise ValueError(f"none of the {len(seeds)} seeds can be used ({why}): lower --shots, or give shorter ones")
    return sampler, usable, left_out


def noise(config, seed, side, number, length):
    """Uniform random numbers (k, length, 4) of a seed, a prompt and a round. A longer draw begins with the shorter."""
    words = [config.seed, zlib.crc32(seed.id.encode()), SIDES.index(side), number]
    draw = np.random.default_rng(words).random((length, config.k, 4), dtype=np.float32)
    return torch.from_numpy(draw).transpose(0, 1)


@torch.no_grad()
def sample(sampler, seeds, side, number):
    """Round `number` of a prompt: k answers to each seed, lists of (text, closed)."""
    c, tokenizer, model = sampler.config, sampler.tokenizer, sampler.model
    template, longest = getattr(c, side + "_prompt"), max(map(sampler.budget, seeds))
    idx, lengths = data.pad([tokenizer.encode_ordinary(data.prompt_for(template, s.text)) for s in seeds])
    idx = idx[:, : int(lengths.max())].to(model.device)
    random = torch.cat([noise(c, s, side, number, longest) for s in seeds])
    how = (longest, c.temperature, 0, c.top_p, sampler.stop[side], random, c.k, sampler.prefix[side])
    tokens, count = model.generate(idx, lengths, *how)
    rows, answers = zip(tokens.tolist(), count.tolist(), strict=True), []
    for i, (row, n) in enumerate(rows):
        kept = [t for t in row[: min(n, sampler.budget(seeds[i // c.k]))] if t != tokenizer.eot_token]
        answers.append(data.answer(template, tokenizer.decode(kept)))
    return [answers[i : i + c.k] for i in range(0, len(answers), c.k)]


def accept(sampler, seed, side, number, answers, kept, counts):
    """Put what passes the filters into `kept` and count what does not, by its reason."""
    c, templates = sampler.config, (sampler.config.positive_prompt, sampler.config.negative_prompt)
    candidates = []
    for i, (text, closed) in enumerate(answers):
        tokens, overlap = sampler.size(text), rouge_l(seed.text, text)
        reason = well_formed(text, closed, templates) or length(tokens, seed.tokens, c) or similarity(overlap, c)
        if reason:
            counts[reason] += 1
        else:
            candidates.append(dict(text=text, round=number, sample=i, tokens=tokens, rouge_l=round(overlap, 4)))
    scores = sampler.scorer([s["text"] for s in candidates]) if candidates else []
    for s, score in zip(candidates, scores, strict=True):
        reason = toxicity(score, side, c) or repeated(s["text"], [k["text"] for k in kept], c)
        counts[reason or "accepted"] += 1
        if not reason:
            kept.append(s | dict(toxicity=round(float(score), 4)))


def make_block(sampler, seeds):
    """All rounds for some seeds -> one record of each: what was accepted, what was chosen, and why the rest was not."""
    c = sampler.config
    wanted = dict(positive=c.n_pos * c.surplus, negative=c.n_neg * c.surplus)
    kept = {s.id: {side: [] for side in SIDES} for s in seeds}
    counts = {s.id: {side: Counter() for side in SIDES} for s in seeds}
    with amp(sampler.model.device, sampler.dtype):
        for number in range(c.rounds):
            for side in SIDES:
                open_ = [s for s in seeds if len(kept[s.id][side]) < wanted[side]]
                for s, answers in zip(open_, sample(sampler, open_, side, number) if open_ else [], strict=True):
                    accept(sampler, s, side, number, answers, kept[s.id][side], counts[s.id][side])
        sentences = [k for s in seeds for side in SIDES for k in kept[s.id][side]]
        for k, value in zip(sentences, phi(sampler, [k["text"] for k in sentences]), strict=True):
            k["phi"] = round(value, 4)
    return [record(c, s, kept[s.id], counts[s.id]) for s in seeds]


@torch.no_grad()
def phi(sampler, texts):
    """Score of each sentence alone, as training sees it: nats per token."""
    model, out = sampler.model, []
    framed = [data.frame(t, sampler.tokenizer, model.config.n_positions + 1) for t in texts]
    for i in range(0, len(framed), SCORED):
        idx, lengths = data.pad(framed[i : i + SCORED])
        out += model.sequence_nll(idx.to(model.device), lengths).tolist()
    return out


def record(config, seed, kept, counts):
    """A seed's line of the log: its group, or why there is none."""
    wanted = dict(positive=config.n_pos, negative=config.n_neg)
    why = " and ".join(f"too few {side}s" for side in SIDES if len(kept[side]) < wanted[side])
    out = dict(id=seed.id, why=why, counts={side: dict(counts[side]) for side in SIDES})
    if why:
        return out
    positives = [kept["positive"][i] for i in nearest(kept["positive"], kept["positive"], config.n_pos)]
    negatives = [kept["negative"][i] for i in nearest(kept["negative"], positives, config.n_neg)]
    mean = lambda rows: [round(float(np.mean([s[k] for s in rows])), 4) for k in ("tokens", "phi")]  # noqa: E731
    out["match"] = dict(positives=mean(positives), before=mean(kept["negative"]), after=mean(negatives))
    sampling = dict(seed=config.seed, model=config.init_from)
    for name, rows in (("positives", positives), ("negatives", negatives)):
        sampling[name] = [{"prompt": name[:-1]} | {k: v for k, v in s.items() if k != "text"} for s in rows]
    texts = dict(positives=[s["text"] for s in positives], negatives=[s["text"] for s in negatives])
    out["group"] = dict(id=seed.id, input=seed.text, **texts, split=seed.split, sampling=sampling)
    return out


# --------------------------------------------------------------------------------------------------------------------
# a run: two files, the groups and beside them a log with one line per seed


def log_of(path):
    return path.with_name(path.stem + ".log.jsonl")


def identity(config, seeds):
    """The first line of the log: what must be the same for a run to go on."""
    settings = {k: v for k, v in asdict(config).items() if k not in ("resume", "out_dir", "data_out", "device")}
    digest = hashlib.sha256(json.dumps([asdict(s) for s in seeds], sort_keys=True).encode()).hexdigest()
    return dict(settings=settings, seeds=digest)


def earlier(path, head, config, total):
    """Records of the blocks that an earlier run finished, with both files cut back to them. Raises ValueError if there
    is a file that is not to be continued, or that was made otherwise."""
    log = log_of(path)
    if not config.resume and (there := [f for f in (path, log) if f.exists()]):
        raise ValueError(f"{there[0]} exists: add --resume to go on with it, or give another --data_out, or delete it")
    if path.exists() and not log.exists():
        raise ValueError(f"{path} cannot go on without its log, {log}: give another --data_out, or delete it")
    records, groups = [], []
    if log.exists():
        lines = data.read_text(log).split("\n")[:-1]  # a kill may have cut the last one
        before = json.loads(lines[0]) if lines else {}
        if before != head:
            was, now = before.get("settings", {}), head["settings"]
            other = ", ".join(k for k in now if was.get(k) != now[k]) or "seeds"
            raise ValueError(f"{path} was made with another {other}: give another --data_out, or delete it")
        records = [json.loads(line) for line in lines[1:]]
        if len(records) < total:
            records = records[: len(records) // config.batch_size * config.batch_size]
        complete = sum(not r["why"] for r in records)
        groups = data.read_text(path).split("\n")[:complete]
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, lambda f: f.write("".join(g + "\n" for g in groups).encode()))
    atomic_write(log, lambda f: f.write("".join(json.dumps(r) + "\n" for r in [head, *records]).encode()))
    return records


def append(path, rows):
    with open(path, "a", encoding="utf-8") as f:
        f.write("".join(json.dumps(r) + "\n" for r in rows))


def total(records, side):
    """Samples of a prompt by what became of them."""
    return sum((Counter(r["counts"][side]) for r in records), Counter())


def nothing_passes(records):
    """What to say if of all samples so far not one became a positive, or a negative; else ''."""
    for side in SIDES:
        count = total(records, side)
        if not count["accepted"]:
            why = ", ".join(f"{n} {reason}" for reason, n in count.most_common(3))
            return (
                f"none of {count.total()} samples became a {side} ({why}): loosen the filter that says so (--help), "
                "give more --shots, or a better model as --init_from"
            )
    return ""


def generate_groups(config):
    """The whole run. Returns the records of all seeds. Raises ValueError if no group was completed."""
    began, path = time.time(), Path(config.data_out or Path(config.out_dir) / "groups.jsonl")
    if path.suffix != ".jsonl":
        raise ValueError(f"--data_out={path} must end in .jsonl")
    seeds, repeats = read_seeds(config)
    sampler, seeds, left_out = open_sampler(config, seeds)
    left_out |= {"repeats another": repeats} if repeats else {}
    records = earlier(path, identity(config, seeds), config, len(seeds))
    told = "".join(f"; {n} left out: {why}" for why, n in left_out.items())
    print(f"seeds        {config.seeds}: {len(seeds)}{told}" + (f"; {len(records)} are done" if records else ""))
    print(f"groups       {config.n_pos} + {config.n_neg}, from {config.rounds} rounds of {config.k} samples at most\n")
    with tqdm(total=len(seeds), initial=len(records), unit="seed", dynamic_ncols=True) as bar:
        for i in range(len(records), len(seeds), config.batch_size):
            block = make_block(sampler, seeds[i : i + config.batch_size])
            append(path, [r.pop("group") for r in block if not r["why"]])
            append(log_of(path), block)
            records += block
            if i == 0 and (words := nothing_passes(records)):
                bar.write(f"NOTE {words}. Going on: Ctrl-C stops")
            bar.set_postfix(groups=sum(not r["why"] for r in records), refresh=False)
            bar.update(len(block))
    print(summary(records))
    examples([json.loads(line) for line in data.read_text(path).split("\n") if line], config.seed)
    print(f"\n{time.time() - began:.0f} s in all\nwritten: {path}, {log_of(path)}")
    if all(r["why"] for r in records):
        words = nothing_passes(records) or "give more --rounds, a smaller --n_pos and --n_neg, or a better --init_from"
        raise ValueError(f"no group is complete: {words}")
    return records


# --------------------------------------------------------------------------------------------------------------------
# the closing report


def summary(records):
    """Tables: what became of the seeds and of the samples, and how well positives and negatives match."""
    n, matches = len(records), [r["match"] for r in records if not r["why"]]
    outcome = Counter(r["why"] or "complete" for r in records)
    rows = [[why, str(m), f"{m / n:.0%}"] for why, m in outcome.most_common()]
    parts = [report.lay_out([f"{n} seeds", "groups", "share"], rows)]
    count = {side: total(records, side) for side in SIDES}
    reasons = sorted(set().union(*count.values()), key=lambda w: (w != "accepted", -sum(c[w] for c in count.values())))
    share = lambda side, w: f"{count[side][w] / max(1, count[side].total()):.1%}"  # noqa: E731
    rows = [[w, *(x for side in SIDES for x in (str(count[side][w]), share(side, w)))] for w in reasons]
    rows.append(["samples", *(x for side in SIDES for x in (str(count[side].total()), ""))])
    parts.append(report.lay_out(["what became of the samples", "positive", "", "negative", ""], rows))
    if matches:
        middle = {k: np.array([m[k] for m in matches]) for k in ("positives", "before", "after")}
        apart = lambda k: np.abs(middle[k] - middle["positives"]).mean(0)  # noqa: E731
        names = dict(positives="positives", before="negatives that passed", after="negatives that were kept")
        rows = [
            [
                names[k],
                *(f"{x:.2f}" for x in middle[k].mean(0)),
                *(f"{x:.2f}" if k != "positives" else "" for x in apart(k)),
            ]
            for k in names
        ]
        head = ["mean over groups", "tokens", "phi", "|difference| of tokens", "of phi"]
        parts.append(report.lay_out(head, rows))
    return "\n" + "\n\n".join(parts)


def examples(groups, seed):
    """Print three groups."""
    for i in sorted(np.random.default_rng([seed, 9]).permutation(len(groups))[:3]):
        g = groups[i]
        print(f"\n{g['id']}: {g['input']}")
        for sign, name in (("+", "positives"), ("-", "negatives")):
            for text, s in zip(g[name], g["sampling"][name], strict=True):
                print(f"  {sign} {s['phi']:5.2f}  {text}")


def main(argv=None):
    try:
        config = load_config(argv, description=__doc__)
        keep_freed_memory()
        generate_groups(config)
    except (ValueError, OSError) as e:
        sys.exit(f"data_gen.py: {e}")
    except KeyboardInterrupt:
        sys.exit("\ndata_gen.py: interrupted; finished blocks are kept, the same command with --resume goes on")


if __name__ == "__main__":
    main()
