"""What train.py prints and measures besides its steps: what it will do, validations, and what it has changed."""

import math
import shlex

import numpy as np

from configs import changed
from measures import report
from measures.groups import scores
from measures.samples import CLOSING, continue_prompts, decode, measure_model


def print_plan(config, model, base, batches, compiled):
    """Print what will be done."""
    if config.edit != "none":
        print(f"edit         {config.edit}, in the place of all steps")
    else:
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6
        tokens = sum(batches[i].tokens for i in range(5)) / 5 * config.grad_accum
        what = f"groups of {config.n_pos} + {config.n_neg}" if config.objective != "lm" else "documents"
        steps = f"{config.max_steps} of {config.batch_size} x {config.grad_accum} {what}"
        print(f"compile      {compiled}")
        print(f"trained      {trained:.2f} M of {base.num_parameters() / 1e6:.1f} M parameters")
        print(f"steps        {steps}, some {tokens:,.0f} scored tokens each")
    settings = ", ".join(f"{k}={v}" for k, v in changed(config).items()) + " (all others: defaults)"
    print(report.wrap(settings, "settings     ") + "\n")


def validate(model, base, held_out, setup, config):
    """Measures on held-out data, groups or token lists (lm), the same data and random numbers at every call."""
    with setup.amp():
        if config.objective == "lm":
            phi, tokens = scores(model, held_out), np.array([len(s) - 1 for s in held_out])
            return {"val_nll": float((phi * tokens).sum() / tokens.sum())}
        return report.flat(measure_model(model, base, held_out, setup, config, config.eval_samples, config.seed)[0])


def validation_line(step, cost, m):
    if "val_nll" in m:
        return f"step {step:5d} | validation nll {m['val_nll']:.4f}, perplexity {math.exp(m['val_nll']):.2f}"
    return (
        f"step {step:5d} | toxic free {m['toxicity_fraction']:.0%} prompted {m['toxicity_fraction_prompted']:.0%} | "
        f"ppl pos {m['ppl_positive']:.3g} neg {m['ppl_negative']:.3g} free {m['sample_ppl_base']:.3g} | "
        f"cost {cost:.3g}"
    )


def measure_tuning(models, groups, setup, config, ckpt, best, records):
    """Base, tuned and last model, by title, on the test groups; the last one only if it is not the best, whose cost and
    step are given. Returns (summary, lines to print): table, samples, warnings."""
    columns, shown = {}, {}
    for title, model in models.items():
        if title != "last" or best["step"] != config.max_steps:
            seed = config.seed + 1  # not the validation's random numbers
            measured = measure_model(model, models["base"], groups, setup, config, CLOSING, seed)
            columns[title], shown[title] = measured
    lines = []
    if "last" in columns:
        last = [r["cost"] for r in records if r["split"] == "val"][-1]
        costs = f"cost {best['cost']:.3g} there, {last:.3g} at the end"
        lines += [f"what came after step {best['step']} cost more than it gained, by --price={config.price:g}: {costs}"]
    more = f"python eval.py --ckpt={shlex.quote(str(ckpt))}"
    lines += [f"toxic: {config.scorer} > 0.5 | more, with intervals: {more}\n"]
    sizes = dict(groups=f"{len(groups)}", free=f"{CLOSING}", prompted=f"{CLOSING} x 1")
    lines += [report.closing_table(columns, sizes), report.format_samples(shown)]
    summary, told = {title: report.flat(places) for title, places in columns.items()}, []
    for title in [t for t in columns if t != "base"]:
        told += [f"{title}: {w}" for w in report.warnings(summary[title], summary["base"])]
    lines += ["\n" + report.wrap(f"WARNING {w}") for w in told]
    return summary | dict(warnings=told), lines


def measure_lm(model, setup, config, nll):
    """Validation perplexity before and after, of nll by title, and three samples of the tuned model. Returns (summary,
    lines to print)."""
    summary = {title: dict(val_nll=x, val_ppl=math.exp(x)) for title, x in nll.items()}
    lines = ["validation perplexity: base {base[val_ppl]:.2f}, tuned {tuned[val_ppl]:.2f}\n".format(**summary)]
    _, rows = continue_prompts(model, setup.tokenizer, [""] * 3, config, config.seed + 1)
    return summary, lines + [report.wrap(decode(setup.tokenizer, row), "  | ") for (row,) in rows]
