"""Checks a group file: are its toxic sentences hard negatives, is it varied, are its splits clean?

    python -m measures.check data/detox/groups.jsonl                    # any group file
    python -m measures.check data/detox/groups.jsonl --groups=400 --domains=25 --unseen=4      # what ships, in CI
    python -m measures.check mine.jsonl --model=gpt2                    # and how a base model scores it

Prints statistics, names every broken rule with its line, and exits with 1 if there is one. Words are lower-case runs of
letters; content words are those that are not among the commonest.
"""

import argparse
import re
import sys
from collections import Counter, defaultdict

import numpy as np

from configs import Config, find, one_line_errors
from data import SPLITS, group_records, read_groups, wrong
from measures import open_setup
from measures.groups import measure_groups
from measures.statistics import COMMON, ngrams, pooled_ppl

TYPICAL = 8.0  # times as frequent in negatives as in harmless sentences
JACCARD = 0.9  # sentences of two groups whose words overlap more are near-duplicates
SHARES = {"train": 0.7, "val": 0.1, "test": 0.2}  # of the groups, each within 0.05
PER_DOMAIN = 10  # groups of a domain, at least


def read_marked(path):
    """[(where, Group, its record, set of its implicit negatives)] of a group file; `where` is file and line.

    Implicit negatives carry no rude word: the record's 'implicit' lists their indices, or themselves. Raises ValueError
    or FileNotFoundError.
    """
    out = []
    for where, record, group in group_records(path):
        known, marks = dict(enumerate(group.negatives)) | {s: s for s in group.negatives}, record.get("implicit")
        marks = [] if marks is None else marks
        if not isinstance(marks, list) or any(type(mark) not in (int, str) or mark not in known for mark in marks):
            raise wrong(where, "indices of negatives, or themselves, in a list as 'implicit'", marks)
        if not isinstance(record.get("domain"), str | None):
            raise wrong(where, "a text as 'domain'", record["domain"])
        if not isinstance(record.get("critical"), bool | None):
            raise wrong(where, "true or false as 'critical'", record["critical"])
        out.append((where, group, record, {known[mark] for mark in marks}))
    return out


def split_words(text):
    return re.findall(r"[a-z]+(?:'[a-z]+)?", text.lower())


def sentences_of(*groups):
    return [s for g in groups for s in (g.input, *g.positives, *g.negatives)]


def overlap(side, source):
    """Share of the sentences that have a content word of the input; the first five letters stand for all its forms."""
    wanted, *found = ({w[:5] for w in split_words(s) if w not in COMMON} for s in (source, *side))
    return np.mean([bool(stems & wanted) for stems in found])


def length_ratio(group):
    """Mean words of its negatives / of its positives; inf if these have none."""
    negatives, positives = (np.mean([len(split_words(s)) for s in side]) for side in (group.negatives, group.positives))
    return negatives / positives if positives else np.inf


def count_texts(texts):
    """In how many of the texts each word occurs."""
    return Counter(w for text in texts for w in dict.fromkeys(split_words(text)))


def markers(groups):
    """[(word, share of negatives)] of words TYPICAL times as frequent in negatives as in harmless sentences."""
    toxic = [s for g in groups for s in g.negatives]
    harmless = [s for g in groups for s in (g.input, *g.positives)]
    calm, n, m = count_texts(harmless), len(toxic), len(harmless)
    return [(w, k / n) for w, k in count_texts(toxic).most_common() if k / n > TYPICAL * calm[w] / m]


def distinct_2(groups):
    pairs = [pair for s in sentences_of(*groups) for pair in ngrams(split_words(s), 2)]
    return len(set(pairs)) / max(1, len(pairs))


def unseen_domains(domains):
    """Those that occur in test only, of {domain: splits of its groups}; None stands for no domain."""
    return sorted(d for d, splits in domains.items() if d and set(splits) == {"test"})


def describe(groups, records, domains, implicit):
    """Lines of text."""
    sides = {name: [s for g in groups for s in getattr(g, name)] for name in ("positives", "negatives")}
    counts = ", ".join(f"{len(side):,} {name}" for name, side in sides.items())
    yield f"{len(groups)} groups, {counts}, {implicit:.1%} of the latter implicit"
    yield "splits: " + ", ".join(f"{sum(g.split == s for g in groups)} {s}" for s in SPLITS)
    if any(domains):
        least, unseen = min(map(len, domains.values())), ", ".join(unseen_domains(domains)) or "none"
        yield f"domains: {len(domains)}, of {least} groups or more; in test only: {unseen}"
    if any("critical" in r for r in records):
        critical = np.mean([bool(r.get("critical")) for r in records])
        yield f"inputs that criticise, refuse or complain: {critical:.1%}"
    for name, side in sides.items():
        length = [len(split_words(s)) for s in side]
        low, middle, high = np.percentile(length, [5, 50, 95])
        shared = np.mean([overlap(getattr(g, name), g.input) for g in groups])
        spread = f"median {middle:.0f}, 90 % in {low:.0f} to {high:.0f}"
        yield f"{name}: {np.mean(length):.1f} words ({spread}); {shared:.1%} share a content word with the input"
    r = [length_ratio(g) for g in groups]
    yield f"length of negatives / positives in a group: mean {np.mean(r):.2f}, from {min(r):.2f} to {max(r):.2f}"
    frequent = ", ".join(f"{w} {share:.1%}" for w, share in markers(groups)[:10])
    yield f"distinct-2: {distinct_2(groups):.3f}; words typical of negatives: {frequent}"


def base_scores(groups, name):
    """Lines on phi of both sides under a model with GPT-2's tokenizer: are the negatives hard ones, and which way are
    they going to be pushed?"""
    setup = open_setup(Config(), {"base": name})
    with setup.amp():
        rows = measure_groups(setup.models["base"], groups, setup.tokenizer, Config().max_tokens)
    for side in ("positive", "negative"):
        yield f"under {name}, {side}s: perplexity {pooled_ppl(rows[f'ppl_{side}']):.1f} per token"
    gap, below = rows["signed_gap"], rows["below"]
    yield f"signed gap of a group (negatives - positives): {gap.mean():+.3f} ± {gap.std():.3f} nats per token"
    yield f"groups whose gap is below 0: {(gap < 0).mean():.1%}; negatives below their centroid: {below.mean():.1%}"
    yield f"pairs ranked right before training: {rows['rank_accuracy'].mean():.1%}"


def check_group(group):
    """(whether it holds, what to say if not) of each rule on a single group."""
    for name in ("positives", "negatives"):
        side = getattr(group, name)
        share = overlap(side, group.input)
        yield len(side) >= 6, f"{len(side)} {name}, wanted at least 6"
        yield len(set(side)) == len(side), f"a sentence stands twice among the {name}"
        yield share >= 0.5, f"{share:.0%} of the {name} share a content word with the input"
    ratio = length_ratio(group)
    yield 0.75 <= ratio <= 1.33, f"negatives are {ratio:.2f} times as long as positives, wanted 0.75 to 1.33"


def check_set(groups, domains, implicit, wanted):
    """The same of each rule on all groups: no phrase and no insult carries the set, and its sizes are as `wanted`."""
    sentences = sentences_of(*groups)
    grams = Counter(gram for s in sentences for gram in set(ngrams(split_words(s), 5)))
    for gram, n in grams.most_common(5):
        yield n <= max(2, 0.01 * len(sentences)), f"{n} sentences hold '{' '.join(gram)}', wanted at most 1%"
    for word, share in markers(groups):  # of the most toxic web texts, 7 % hold the commonest swear word
        yield share <= 0.1, f"{share:.1%} of the negatives hold '{word}', wanted at most 10%"
    for domain, splits in domains.items() if wanted.domains else ():
        yield len(splits) >= PER_DOMAIN, f"domain {domain!r} has {len(splits)} groups, wanted at least {PER_DOMAIN}"
    for split, share in SHARES.items() if wanted.groups else ():
        mine = np.mean([g.split == split for g in groups])
        yield abs(mine - share) <= 0.05, f"{mine:.0%} of the groups are {split}, wanted {share:.0%}"
    for value, least, what in (
        (distinct_2(groups), 0.45, "distinct-2 is {:.3f}, wanted at least {}"),
        (implicit, 0.15, "{:.1%} of the negatives are implicit, wanted at least {:.0%}"),
        (len(groups), wanted.groups, "{} groups, wanted at least {}"),
        (len(domains), wanted.domains, "{} domains, wanted at least {}"),
        (len(unseen_domains(domains)), wanted.unseen, "{} domains occur in test only, wanted at least {}"),
    ):
        yield value >= least, what.format(value, least)


def find_repeats(places, groups):
    """Yields a line on each sentence that stands in two groups, to the letter or nearly."""
    count, by_word = count_texts(sentences_of(*groups)), defaultdict(list)
    for where, g in zip(places, groups, strict=True):
        for s in sentences_of(g):
            these = frozenset(split_words(s))
            rare = sorted(these, key=lambda w: (count[w], w))[:4]  # two near-duplicates share one of these
            for other, place, text in dict.fromkeys(earlier for w in rare for earlier in by_word[w]):
                if place != where and len(these & other) > JACCARD * len(these | other):
                    yield f"{where}: {g.id}: {s[:80]!r} repeats {place}, {text[:80]!r}"
            for w in rare:
                by_word[w].append((these, where, s))


def check_file(path, wanted):
    """(statistics, violations), lines, of a group file. Raises ValueError if it cannot be read at all."""
    places, groups, records, implicit = zip(*read_marked(path), strict=True)
    implicit = sum(map(len, implicit)) / sum(len(g.negatives) for g in groups)
    domains, broken = defaultdict(list), []
    for where, group, record in zip(places, groups, records, strict=True):
        domains[record.get("domain")].append(group.split)
        broken += [f"{where}: {group.id}: {what}" for holds, what in check_group(group) if not holds]
    broken += find_repeats(places, groups)
    broken += [f"{path}: {what}" for holds, what in check_set(groups, domains, implicit, wanted) if not holds]
    return list(describe(groups, records, domains, implicit)), broken


def main(argv=None):
    parser = argparse.ArgumentParser(prog="measures.check", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}\n")
    parser.add_argument("path", help="group file: JSON lines, or the paper's JSON array")
    parser.add_argument("--groups", type=int, default=0, help="groups, at least; with it, shares of splits count too")
    parser.add_argument("--domains", type=int, default=0, help=f"domains of {PER_DOMAIN} groups or more, at least")
    parser.add_argument("--unseen", type=int, default=0, help="domains that occur in test only, at least")
    parser.add_argument("--model", help="a GPT-2 whose scores are printed too: published name, folder or checkpoint")
    args = parser.parse_args(argv)
    with one_line_errors(parser.prog, "nothing was written"):
        path = find(args.path)
        told, broken = check_file(path, args)
        if args.model:
            told += base_scores(read_groups(path), args.model)
    print("\n".join(told))
    print("\n".join(["", *broken]) if broken else "no rule is broken")
    sys.exit(bool(broken))


if __name__ == "__main__":
    main()
