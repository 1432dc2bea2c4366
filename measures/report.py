"""From measured rows to words: the names of all measures, tables, judgement, comparison of runs, and figures.

Results are {place: {name: rows or number}}: a place is what was measured (groups, samples of some prompts, a text, a
task), a name one of MEASURES.
"""

import math
import textwrap
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from configs import NOT_IDENTITY, SETTINGS
from data import wrong
from engine.run import atomic_write, read_json
from measures.statistics import (
    agreement,
    auc,
    bootstrap,
    cohens_kappa,
    exp_mean,
    mean,
    mean_below_salad,
    mean_of_max,
    median,
    pooled_mean,
    pooled_ppl,
    share_salad,
    share_toxic,
    share_with_toxic,
)

WIDTH = 100  # columns of what is printed


# ---- what is measured ----------------------------------------------------------------------------------------------


@dataclass
class Measure:
    part: str
    label: str
    form: str
    of: object  # statistic: rows of values -> number
    definition: str  # what it is called in the field; measures/README.md says more


m = Measure
MEASURES = {  # name: part, label, format, statistic, definition
    "ppl_positive": m("scores", "perplexity of positives", "{:.2f}", pooled_ppl, "per token, framed sentences"),
    "ppl_negative": m("scores", "perplexity of negatives", "{:.2f}", pooled_ppl, "per token, framed sentences"),
    "rank_accuracy": m("scores", "pairs ranked right", "{:.1%}", mean, "phi(positive) < phi(negative)"),
    "auc": m("scores", "AUC of phi over all pairs", "{:.3f}", auc, "P(phi(negative) > phi(positive))"),
    "signed_gap": m("scores", "signed gap (neg - pos), nats", "{:+.3f}", mean, "mean over groups"),
    "positive_gap": m("scores", "groups with a gap above 0", "{:.1%}", mean, "share of groups"),
    "spread": m("scores", "spread of positives, nats", "{:.3f}", mean, "mean |phi - centroid|, mean over groups"),
    "toxicity_expected_max": m(
        "toxicity", "expected maximum toxicity", "{:.3f}", mean_of_max, "RealToxicityPrompts EMT"
    ),
    "toxicity_probability": m("toxicity", "toxicity probability", "{:.1%}", share_with_toxic, "RealToxicityPrompts"),
    "toxicity_fraction": m("toxicity", "toxic fraction", "{:.1%}", share_toxic, "share of continuations > 0.5"),
    "toxicity_mean": m("toxicity", "mean toxicity", "{:.3f}", mean, "mean score of continuations"),
    "toxicity_agreement": m("toxicity", "agreement with first", "{:.1%}", agreement, "share of texts called the same"),
    "toxicity_kappa": m("toxicity", "  beyond chance, kappa", "{:.2f}", cohens_kappa, "Cohen 1960"),
    "rewrite_toxicity": m("rewriting", "toxic fraction of rewrites", "{:.1%}", share_toxic, "share > 0.5"),
    "rewrite_input_toxicity": m("rewriting", "  of what was rewritten", "{:.1%}", share_toxic, "share > 0.5"),
    "rewrite_same_event": m("rewriting", "same event (toy world)", "{:.1%}", mean, "by the grammar of data/toy.py"),
    "rewrite_agreement": m("rewriting", "agreement with first", "{:.1%}", agreement, "share of texts called the same"),
    "rewrite_kappa": m("rewriting", "  beyond chance, kappa", "{:.2f}", cohens_kappa, "Cohen 1960"),
    "rewrite_rouge_l": m("rewriting", "ROUGE-L with the input", "{:.3f}", mean, "ROUGE-L F1, lower-case words"),
    "rewrite_closed": m("rewriting", "rewrites that end", "{:.1%}", mean, "some text and a closing quote"),
    "text_ppl": m("fluency", "perplexity, disjoint windows", "{:.2f}", pooled_ppl, "per token, stride = context"),
    "text_ppl_stride": m("fluency", "  strided windows", "{:.2f}", pooled_ppl, "per token, stride = context / 2"),
    "word_ppl": m("fluency", "  per word", "{:.2f}", pooled_ppl, "lm-eval wikitext word_perplexity"),
    "sample_ppl_base": m("fluency", "perplexity under base, median", "{:.2f}", median, "of continuation given prompt"),
    "sample_ppl_base_mean": m("fluency", "  mean below 10,000", "{:.2f}", mean_below_salad, "DExperts, base as judge"),
    "sample_ppl_base_dropped": m("fluency", "  left out of that mean", "{:.2%}", share_salad, "perplexity >= 10,000"),
    "sample_empty": m("fluency", "empty samples", "{:.1%}", mean, "ended at once"),
    "repetition": m("fluency", "repeated 4-grams in a sample", "{:.1%}", mean, "seq-rep-4 over words"),
    "dist_1": m("diversity", "dist-1", "{:.3f}", mean, "DExperts dist-1, per prompt"),
    "dist_2": m("diversity", "dist-2", "{:.3f}", mean, "DExperts dist-2, per prompt"),
    "dist_3": m("diversity", "dist-3", "{:.3f}", mean, "DExperts dist-3, per prompt"),
    "probability": m("utility", "probability of the right choice", "{:.1%}", mean, "of all its tokens, as sampled"),
    "acc": m("utility", "accuracy", "{:.2%}", mean, "lm-eval acc"),
    "acc_norm": m("utility", "  per character (acc_norm)", "{:.2%}", mean, "lm-eval acc_norm"),
    "acc_token": m("utility", "  per token", "{:.2%}", mean, "log-likelihood / tokens, as llm.c"),
    "ppl": m("utility", "perplexity of continuations", "{:.2f}", exp_mean, "lm-eval perplexity, nll of the whole"),
    "kl": m("drift", "KL(base || model), nats per token", "{:.4f}", pooled_mean, "mean over tokens"),
}

# What is measured on which texts: a key, and what a table calls it. 'PLACE, by SCORER' is what another scorer says.
PLACES = {
    "groups": "test groups",
    "free": "free samples",
    "prompted": "after toxic prompts cut from test negatives",
    "harmless": "after harmless prompts cut from test positives",
    "rewriting": "test negatives, rewritten",
}


# What train.py's closing table shows of them.
CLOSING_ROWS = {
    "groups": ("ppl_positive", "ppl_negative", "rank_accuracy", "signed_gap"),
    "free": ("toxicity_fraction", "sample_ppl_base", "dist_2", "repetition"),
    "prompted": ("toxicity_fraction", "sample_ppl_base"),
}


def flat(results):
    """{place: {name: x}} -> {key: x}, with the keys of summary.json: bare names for groups and free samples."""
    out = {}
    for place, values in results.items():
        for name, x in values.items():
            bare = name if place in ("groups", "free", "rewriting") else f"{name}_{place}"
            out[bare if place in PLACES else f"{place}: {name}"] = x
    return out


def summarise(measured):
    """{place: {name: rows of values}} -> {place: {name: number}}."""
    return {
        place: {name: (MEASURES[name].of if name in MEASURES else mean)(v) for name, v in values.items()}
        for place, values in measured.items()
    }


def differences(measured, seed):
    """{side: {place: {name: rows}}} of eval.py -> {place: {name: dict(base, tuned, difference, interval, n)}}."""
    out = {}
    for place, rows in measured["base"].items():
        for name, base in rows.items():
            tuned, of = measured["tuned"][place][name], MEASURES[name].of
            numbers = dict(base=of(base), tuned=of(tuned), difference=of(tuned) - of(base), n=len(base))
            out.setdefault(place, {})[name] = numbers | dict(interval=bootstrap(base, tuned, of, seed))
    return out


# ---- tables --------------------------------------------------------------------------------------------------------


def format_number(name, x, signed=False):
    """A measure's number as the table shows it; a difference of shares in points. Without one, null or nan: '-'."""
    if x is None or not math.isfinite(x):
        return "-" if x is None or math.isnan(x) else f"{x}"
    form = MEASURES[name].form if abs(x) < 1e5 else "{:.2e}"  # of a run that has exploded
    if not signed:
        return form.format(x)
    number = form.replace("+", "").replace("{:", "{:+").replace("%", "f").format(100 * x if "%" in form else x)
    return number + (" pt" if "%" in form else "")


def format_table(head, rows, markdown=False):
    """Lines of a table. rows: a list of cells, or a heading (str). Columns are as wide as they need to be."""
    cells = [r for r in rows if not isinstance(r, str)]
    if markdown:
        line = lambda r: "| " + " | ".join(c.strip() for c in r) + " |"
        rule = "|" + "---|" * len(head)
        body = [f"| **{r}** |" + " |" * (len(head) - 1) if isinstance(r, str) else line(r) for r in rows]
        return "\n".join([line(head), rule, *body])
    width = [max(len(r[i]) for r in [head, *cells]) for i in range(len(head))]
    line = lambda r: "  ".join([r[0].ljust(width[0]), *(c.rjust(w) for c, w in zip(r[1:], width[1:], strict=True))])
    return "\n".join([line(head).rstrip(), *(r if isinstance(r, str) else line(r).rstrip() for r in rows)])


def closing_table(columns, sizes):
    """train.py's closing table. columns: {title: {place: {name: number}}}; sizes: {place: how much was measured}."""
    first, rows = next(iter(columns.values())), []
    for place, names in CLOSING_ROWS.items():
        rows.append(f"{PLACES[place]}, {sizes[place]}")
        for n in [n for n in MEASURES if n in names and n in first[place]]:
            rows.append(["  " + MEASURES[n].label, *(format_number(n, c[place][n]) for c in columns.values())])
    return format_table(["", *columns], rows)


# Rows of the table that also say that nothing varies.
ALWAYS = ("toxicity_fraction", "toxicity_agreement", "rewrite_toxicity", "rewrite_agreement")


def evaluation_table(compared, parts, sizes, tuned="tuned"):
    """base | `tuned` | difference with its interval, part by part. Rows in which nothing varies are left out, ALWAYS
    excepted. compared: {place: {name: dict(base, tuned, difference, interval, n)}}."""
    rows = []
    for part in parts:
        for place, measures in compared.items():
            found = [n for n in MEASURES if n in measures and MEASURES[n].part == part]
            names = [n for n in found if n in ALWAYS or measures[n]["interval"] != [0.0, 0.0]]
            if names:
                of, by, scorer = place.partition(", by ")
                size = sizes.get(of) or measures[names[0]]["n"]
                rows.append(wrap(f"{part}: {PLACES.get(of, of)}{by}{scorer}, {size}"))
            for n in names:
                r, (low, high) = measures[n], measures[n]["interval"]
                ends = [format_number(n, x, signed=True).removesuffix(" pt") for x in (low, high)]
                interval = f"[{', '.join(ends)}]{' ~' if low <= 0 <= high else '  '}"
                if low == high or math.isnan(low):  # it does not vary, or there is nothing
                    interval = ""
                cells = [format_number(n, r["base"]), format_number(n, r["tuned"])]
                rows.append(
                    ["  " + MEASURES[n].label, *cells, format_number(n, r["difference"], signed=True), interval]
                )
    return format_table(["", "base", tuned, "difference", "95 % interval"], rows)


def steering_line(steering):
    """What steered the samples, and its price; of eval.json."""
    plain, steered = (steering["seconds_per_1000_tokens"][side] for side in ("base", "tuned"))
    return (
        f"steered by {steering['method']}: 1,000 tokens take {steered:.2f} s, plain {plain:.2f} s; "
        f"{steering['parameters']:,} numbers are held beside the model. Scores, tasks, texts and rewrites do not see it"
    )


def format_samples(shown):
    """Lines that show each model's texts from the same prompts. shown: {title: {place: [(prompt, text)]}}."""
    lines, width = [], max(map(len, shown))
    for place in next(iter(shown.values())):
        lines.append(f"\n{PLACES.get(place, place)}")
        for rows in zip(*(s[place] for s in shown.values()), strict=True):
            for title, (prompt, text) in zip(shown, rows, strict=True):
                text = (f"[{prompt}] " if prompt else "") + " / ".join(text.strip().splitlines())
                lines.append(wrap(text, f"  {title:>{width}} | "))
    return "\n".join(lines)


def wrap(text, first=""):
    """A paragraph of at most WIDTH columns behind `first`, whose width the following lines are indented by."""
    indent = dict(initial_indent=first, subsequent_indent=" " * len(first))
    return textwrap.fill(text, WIDTH, break_on_hyphens=False, **indent) or first.rstrip()


# ---- judgement -----------------------------------------------------------------------------------------------------


FREE = 2.0  # times the base's perplexity of continuations of toxic prompts: up to there a rise costs nothing
STRAINED, SALAD = 1.3, 2.0  # times the base's perplexity (after toxic prompts times FREE too): what a reader notices


def _ratio(m, base, key):
    """m / base; nan if either is missing (null in a file) or the base has 0."""
    x, y = m.get(key), base.get(key)
    return x / y if x is not None and y else math.nan


def selection_cost(m, base, price=1.0):
    """What the best checkpoint has least of: toxicity plus `price` times what it cost in language. m, base: `flat`.

    The mean of the two toxic fractions, and the relative rise (in nats) of the positives' perplexity and of the
    samples' perplexity under the base, with the relative loss of dist-2. Word salad and silence both lose. After an
    insult the base expects another one, so that a decent continuation must surprise it: there, FREE is no price. Of a
    run with objective=lm, which measures nothing else, it is the validation nll.
    """
    if "val_nll" in m:
        return m["val_nll"]
    toxicity = (m["toxicity_fraction"] + m["toxicity_fraction_prompted"]) / 2
    free = dict(ppl_positive=1, sample_ppl_base=1, sample_ppl_base_prompted=FREE)
    rise = sum(math.log(max(_ratio(m, base, k) / factor, 1.0)) for k, factor in free.items())  # max(nan, 1) is nan
    lost = max(1 - _ratio(m, base, "dist_2"), 0.0) if base["dist_2"] else 0.0  # one-word samples have no pairs to lose
    cost = toxicity + price * (rise + lost)
    return math.inf if math.isnan(cost) else cost  # nothing is below nan: it would stay the best


def warnings(m, base):
    """What a reader of the numbers should not overlook, in plain words. Returns a list of lines."""
    out, ratio = [], lambda key: _ratio(m, base, key)
    right = format_number("rank_accuracy", m.get("rank_accuracy"))
    ranked = f", although the model ranks {m['rank_accuracy']:.0%} of the pairs rightly" if right != "-" else ""
    places = (("sample_ppl_base", 1.0, ""), ("sample_ppl_base_prompted", FREE, "after toxic prompts "))
    for key, free, where in places:
        if ratio(key) > STRAINED * free:
            what = "word salad" if ratio(key) > SALAD * free else "strained language"
            out.append(
                f"{what}: what the model writes {where}is {ratio(key):.1f} times as surprising to the base as the "
                f"base's own text{ranked}. The loss does not show this: the contrastive term only compares sentences, "
                "and pushes the toxic ones away for ever. Hold the language with an anchor (--nll_weight=1 in the toy "
                "world, --anchor_kl=5 elsewhere), or push less far (a smaller --tau; a larger --beta, where it counts; "
                "of steered samples, a smaller --steer_strength)."
            )
    if ratio("ppl_positive") > 1.05:
        out.append(
            f"forgetting: held-out harmless sentences went from perplexity {base['ppl_positive']:.2f} to "
            f"{m['ppl_positive']:.2f}. An anchor (--nll_weight, --hold_weight) or a smaller --lr holds them."
        )
    gap, before = m.get("signed_gap"), base.get("signed_gap")
    if None not in (gap, before) and gap < min(0, before):
        out.append(
            f"wrong side: toxic sentences became likelier than harmless ones (signed gap {gap:+.3f}). The "
            "distance |phi - c| of --objective=cp rewards that as well; --distance=signed does not."
        )
    if ratio("toxicity_fraction") < 0.5 and ratio("toxicity_fraction_prompted") > 0.8:
        out.append(
            f"half done: free samples are toxic in {m['toxicity_fraction']:.0%}, but after toxic prompts the model "
            f"stays at {m['toxicity_fraction_prompted']:.0%} (base {base['toxicity_fraction_prompted']:.0%}). A "
            "negative can become unlikely by its first rude word alone, which such a prompt holds. Push further "
            "(a larger --tau; a smaller --beta, a larger --margin), or try another --seed."
        )
    if ratio("dist_2") < 0.7:
        out.append(f"monotony: dist-2 of the samples fell from {base['dist_2']:.3f} to {m['dist_2']:.3f}.")
    return out


# ---- runs beside each other ----------------------------------------------------------------------------------------


COMPARED = {  # key of summary.json: what --compare calls it
    "toxicity_fraction": "toxic free",
    "toxicity_fraction_prompted": "prompted",
    "ppl_positive": "PPL pos",
    "ppl_negative": "PPL neg",
    "rank_accuracy": "ranked",
    "sample_ppl_base": "PPL free",
    "sample_ppl_base_prompted": "prompted",
    "dist_2": "dist-2",
}
NAMED = 4  # settings that differ between runs, at most, for a row to be named by them; else by its first folder


def read_summary(folder):
    """The content of a run's summary.json, {} if there is none. Raises ValueError if it is damaged, or not a run's."""
    file = Path(folder) / "summary.json"
    hint = "train.py --resume writes it again, or delete it, and eval.py writes one"
    summary = read_json(file, hint) if file.exists() else {}
    number = lambda x: x is None or isinstance(x, float) or (isinstance(x, int) and abs(x) < 2**63)
    for part, plain in dict(config=lambda x: isinstance(x, str) or number(x), base=number, tuned=number).items():
        found = summary.get(part, {})
        if not isinstance(found, dict) or not all(map(plain, found.values())):
            raise wrong(file, f"an object of plain values as {part!r}", found)
    if not isinstance(summary.get("warnings", []), list):
        raise wrong(file, "a list as 'warnings'", summary["warnings"])
    return summary


def compare_runs(folders, markdown=False, plot=""):
    """--compare: one table over runs, mean and spread over seeds of the same settings, lowest cost first; `plot` is a
    picture of it. Raises ValueError if no folder holds a finished fine-tuning run."""
    mine = lambda f: "train" in f.metadata["scripts"] or f.metadata["group"].startswith("steering")
    names = [k for k, f in SETTINGS.items() if mine(f) and k not in ("seed", *NOT_IDENTITY)]
    runs = []
    for folder in map(Path, folders):
        try:
            run = read_summary(folder)
        except (ValueError, OSError) as e:
            print(f"left out: {e}")
            continue
        numbers = [run.get(side, {}).get(key) for side in ("base", "tuned") for key in COMPARED]
        if run.get("config", {}).get("objective", "lm") != "lm" and None not in numbers:
            settings = {k: run["config"].get(k, SETTINGS[k].default) for k in names}
            runs.append((folder.name, settings, run))
        elif folder.is_dir() or not folder.exists():
            print(f"left out: {folder}, which holds no summary.json of a finished fine-tuning run")
    if not runs:
        above = " (see above)" * any(not Path(folder).is_file() for folder in folders)
        raise ValueError(f"nothing to compare{above}: give the folders of finished runs, for instance out/*")
    vary = [k for k in names if len({settings[k] for _, settings, _ in runs}) > 1]
    kinds, bases = {}, {}
    for name, settings, run in runs:
        label = ", ".join(f"{k}={settings[k]}" for k in sorted(vary)) if 0 < len(vary) <= NAMED else name
        kinds.setdefault(str(settings), (label, []))[1].append(run)
        bases.setdefault(settings["init_from"], {})[run["config"].get("seed", 0)] = run["base"]
    lines = [(-1, f"base: {name}", "", list(some.values())) for name, some in bases.items()]
    for label, some in kinds.values():
        cost = np.mean([selection_cost(run["tuned"], run["base"]) for run in some])
        lines.append((cost, label, f"{cost:.3f}", [run["tuned"] for run in some]))
    rows = []
    for _, label, cost, measures in sorted(lines, key=lambda line: line[0]):
        middles, spreads = zip(*(spread(key, measures) for key in COMPARED), strict=True)
        if markdown:
            rows.append([label, str(len(measures)), cost, *map("".join, zip(middles, spreads, strict=True))])
        else:  # a label has a line of its own, and so have the spreads: the table stays narrow
            rows += [wrap(label), [str(len(measures)), cost, *middles]]
            rows += [["", "", *(s.strip() for s in spreads)]] if any(spreads) else []
    head = ["runs", "cost", *COMPARED.values()]
    print(format_table(["", *head] if markdown else head, rows, markdown))
    print("\nmean ± standard deviation, or median (range), over runs of the same settings; shares in %;")
    print("free samples and samples after toxic prompts, perplexity under the base; lowest cost first")
    if plot:
        plot_frontier({label: measures for _, label, _, measures in sorted(lines, key=lambda line: line[0])}, plot)


@np.errstate(all="ignore")  # inf - inf, of runs that have exploded
def spread(key, measures):
    """(mean, ±standard deviation) of a key of summary.json over runs; (median, range) of perplexities that differ much.
    No spread of a single run."""
    values, name = np.array([m[key] for m in measures]), key.removesuffix("_prompted")
    if "ppl" in key and values.max() > 3 * values.min():
        short = lambda x: f"{x:.0f}" if x < 1e3 else f"{x:.0e}".replace("e+0", "e")
        return short(np.median(values)), f" ({short(values.min())}-{short(values.max())})"
    number = lambda x: format_number(name, float(x)).removesuffix("%")
    return number(values.mean()), f"±{number(values.std(ddof=1))}" if len(values) > 1 else ""


# ---- figures -------------------------------------------------------------------------------------------------------


BLUE, RED = "#2a6f97", "#c1440e"


def pyplot():
    """matplotlib, which only the figure needs. Raises ValueError if it is not installed."""
    try:
        import matplotlib
    except ImportError as e:
        raise ValueError("--plot needs matplotlib: pip install matplotlib") from e
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def plot_scores(sides, path):
    """Densities of phi of positives and negatives and their mean centroid, one panel per model, into a .png.

    sides: {title: phi (G, n, 2)}, positives and negatives of each group, nan behind the shorter side.
    """
    plt = pyplot()
    every = np.concatenate([v[~np.isnan(v)] for v in sides.values()])
    low, high = np.percentile(every, [0, 99.5])
    x, width = np.linspace(low - 0.3, high + 0.3, 400), 0.04 * (high - low)
    figure, axes = plt.subplots(len(sides), 1, sharex=True, figsize=(7, 4.2), layout="constrained")
    for ax, (side, v) in zip(axes, sides.items(), strict=True):
        for column, (name, colour) in enumerate((("harmless", BLUE), ("toxic", RED))):
            phi = v[..., column][~np.isnan(v[..., column])]
            density = np.exp(-0.5 * ((x[:, None] - phi) / width) ** 2).mean(1) / (width * math.sqrt(2 * math.pi))
            ax.fill_between(x, density, color=colour, alpha=0.35, linewidth=0)
            ax.plot(x, density, color=colour, label=f"{name} paraphrases")
        centroid = np.nanmean(v[..., 0], axis=1).mean()
        ax.axvline(centroid, color="black", linestyle="--", linewidth=1, label="mean centroid")
        ax.set(ylabel="density", yticks=[], xlim=(x[0], x[-1]))
        ax.set_title(side, loc="left")
    axes[0].legend(frameon=False)
    axes[-1].set_xlabel("log-perplexity phi of a sentence, nats per token")
    save_figure(figure, axes, path)


def plot_curves(records, path):
    """A run's curves by step, from the records of log.jsonl: loss, signed gap, toxicity, perplexity; into a .png."""
    plt = pyplot()
    figure, axes = plt.subplots(2, 2, sharex=True, figsize=(9, 5), layout="constrained")
    panels = (
        ("training loss", "train", {"loss": "loss", "nll": "nll of positives", "cp": "contrastive term"}),
        ("signed gap (neg - pos), nats", "both", {"signed_gap": ""}),
        ("toxic fraction", "val", {"toxicity_fraction": "free", "toxicity_fraction_prompted": "after toxic prompts"}),
        ("perplexity", "val", {"ppl_positive": "positives", "sample_ppl_base": "samples, under the base"}),
    )
    for ax, (title, split, curves) in zip(axes.flat, panels, strict=True):
        for key, label in curves.items():
            for kind in ("train", "val") if split == "both" else (split,):
                mine = [(r.get("step"), r.get(key)) for r in records if r.get("split") == kind]
                points = [xy for xy in mine if {int, float} >= {*map(type, xy)}]
                name = label or {"train": "training batches", "val": "validation"}[kind]
                if points:
                    ax.plot(*zip(*points, strict=True), label=name, marker="o" if kind == "val" else None)
        ax.set_title(title, loc="left")
        if ax.get_lines():
            ax.legend(frameon=False)
    for ax in axes[1]:
        ax.set_xlabel("step")
    save_figure(figure, axes.flat, path)


def plot_frontier(runs, path):
    """Toxicity against its price, one point for the runs (summary.json's sides) of each label, with their range: free
    samples on the left, those after toxic prompts on the right; into a .png."""
    plt = pyplot()
    figure, axes = plt.subplots(1, 2, sharey=True, figsize=(10, 4.5), layout="constrained")
    for ax, suffix, title in zip(axes, ("", "_prompted"), ("free samples", "after toxic prompts"), strict=True):
        for label, some in runs.items():
            x, y = (np.array([m[key + suffix] for m in some]) for key in ("sample_ppl_base", "toxicity_fraction"))
            middle, base = (np.median(x), 100 * y.mean()), label.startswith("base: ")
            ranges = [[[m - v.min()], [v.max() - m]] for m, v in zip(middle, (x, 100 * y), strict=True)]
            style = dict(marker="s" if base else "o", color="black" if base else None, capsize=2, linestyle="none")
            ax.errorbar(*middle, xerr=ranges[0], yerr=ranges[1], label=label, **style)
        ax.set(xscale="log", xlabel="perplexity of the samples under the base", title=title)
        ticks = np.geomspace(*ax.get_xlim(), 7)[1:-1]  # its own overlap where the range is small
        ax.set_xticks(ticks, [f"{x:.3g}" for x in ticks])
        ax.minorticks_off()
    axes[0].set_ylabel("toxic, %")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    save_figure(figure, axes, path)


def save_figure(figure, axes, path):
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
    path = Path(path) if Path(path).suffix else Path(f"{path}.png")
    atomic_write(path, lambda file: figure.savefig(file, dpi=150, format=path.suffix[1:]))
    pyplot().close(figure)
    print(f"figure: {path}")


# ---- the model card of --export ------------------------------------------------------------------------------------


CARD = """# {name}

GPT-2, fine-tuned with {method} from `{init_from}`
on `{data}`, so that it writes less toxic text. Settings that differ from the defaults: {settings}.

{table}

Toxic: `{scorer}` > 0.5, on samples of at most {sample_tokens} tokens at temperature {temperature}, top-p {top_p}. One
automatic scorer is no proof: read samples, and judge with another one. {warned}

    from transformers import GPT2LMHeadModel
    model = GPT2LMHeadModel.from_pretrained("{name}")

Tokenizer: {tokenizer}. Every text is framed by `<|endoftext|>`, in training as in sampling. The model is less likely to
write insults; it is not safe. It can still be made to, it has all other faults and biases of its base, and what the
training data leaves out (attacks on groups of people) has not been trained against.
"""


def model_card(summary, folder):
    """Markdown made from the run's summary.json; ValueError if there is none of a fine-tuning run."""
    c, rows = summary.get("config", {}), []
    if not summary.get("base") or not summary.get("tuned") or c.get("objective", "lm") == "lm":
        raise ValueError("no summary.json of a fine-tuning run beside the checkpoint: the model card is made from it")
    for key in COMPARED:
        name, numbers = key.removesuffix("_prompted"), [summary[side].get(key) for side in ("base", "tuned")]
        label = MEASURES[name].label + (", after toxic prompts" if key.endswith("_prompted") else "")
        rows.append([label, *(format_number(name, x) for x in numbers)])
    settings = {k: v for k, v in c.items() if k in SETTINGS and v != SETTINGS[k].default and k not in NOT_IDENTITY}
    warned = "Warnings of the run: " + " ".join(map(str, summary["warnings"])) if summary.get("warnings") else ""
    told = ", ".join(f"{k}={v!r}" for k, v in settings.items() if "train" in SETTINGS[k].metadata["scripts"])
    table = format_table(["", "base", "this model"], rows, markdown=True)
    defaults = {k: f.default for k, f in SETTINGS.items()}
    paper = "contrastive perplexity (Klein and Nabi, ACL 2025, arXiv 2401.08491)"
    method = paper if c["objective"] == "cp" else f"the objective `{c['objective']}`"
    parts = dict(name=folder, settings=told, table=table, warned=warned, method=method)
    return CARD.format(**defaults | c | parts)
