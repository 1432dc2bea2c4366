"""What train.py measures and prints besides its steps: what it will do, validations, what it has changed. A `run` is
its Run."""

import math
import shlex

import numpy as np

from configs import SETTINGS, changed
from measures import report
from measures.groups import scores
from measures.samples import CLOSING, continue_prompts, decode, measure_model


def print_plan(run, compiled, arguments):
    """Print what will be done. `arguments`: those of the objective."""
    config = run.config
    if config.edit != "none":
        print(f"edit         {config.edit}, in the place of all steps")
    else:
        trained = sum(p.numel() for p in run.model.parameters() if p.requires_grad) / 1e6
        tokens = sum(run.batches[i].tokens for i in range(5)) / 5 * config.grad_accum
        what = f"groups of {config.n_pos} + {config.n_neg}" if config.objective != "lm" else "documents"
        steps = f"{config.max_steps} of {config.batch_size} x {config.grad_accum} {what}"
        print(f"compile      {compiled}")
        print(f"trained      {trained:.2f} M of {run.base.num_parameters() / 1e6:.1f} M parameters")
        print(f"steps        {steps}, some {tokens:,.0f} scored tokens each")
    settings = {k: f"{k}={v}" for k, v in changed(config).items()}
    print(report.wrap(", ".join(settings.values()) + " (all others: defaults)", "settings     "))
    if idle := [settings[k] for k in settings.keys() & without_effect(config, arguments)]:
        print(report.wrap(", ".join(sorted(idle)), "no effect    "))
    print()


def without_effect(config, arguments):
    """Names of settings that a run with these others does not read: an ablation of them would show nothing."""
    names = {name for name, f in SETTINGS.items() if f.metadata["group"] == "the objective" and name not in arguments}
    names -= {"objective", "cp_weight", "score"}
    if config.cp_weight == 0:
        names |= arguments & SETTINGS.keys()
    if not config.lora_rank:
        names |= {"lora_alpha", "lora_targets"}
    if not config.anchor_kl + config.anchor_nll:
        names |= {"anchor_texts", "anchor_prompted", "anchor_tokens", "anchor_batch"}
    return names


def validate(run, model):
    """Measures on held-out data, the same data and random numbers at every call."""
    with run.setup.amp():
        if run.config.objective == "lm":
            phi, tokens = scores(model, run.held_out), np.array([len(s) - 1 for s in run.held_out])
            return {"val_nll": float((phi * tokens).sum() / tokens.sum())}
        n, seed = run.config.eval_samples, run.config.seed
        return report.flat(measure_model(model, run.base, run.held_out, run.setup, run.config, n, seed)[0])


def validation_line(step, cost, m):
    if "val_nll" in m:
        return f"step {step:5d} | validation nll {m['val_nll']:.4f}, perplexity {math.exp(m['val_nll']):.2f}"
    return (
        f"step {step:5d} | toxic free {m['toxicity_fraction']:.0%} prompted {m['toxicity_fraction_prompted']:.0%} | "
        f"ppl pos {m['ppl_positive']:.3g} neg {m['ppl_negative']:.3g} free {m['sample_ppl_base']:.3g} | "
        f"cost {cost:.3g}"
    )


def close_tuning(run, tuned):
    """Measure the base, the best and the last model on the test groups. Returns (summary, lines to print): table,
    samples, warnings."""
    c, groups, columns, shown = run.config, run.groups["test"], {}, {}
    for title, model in (("base", run.base), ("tuned", tuned), ("last", run.model)):
        if title != "last" or run.best["step"] != c.max_steps:
            seed = c.seed + 1  # not the validation's random numbers
            columns[title], shown[title] = measure_model(model, run.base, groups, run.setup, c, CLOSING, seed)
    sizes = dict(groups=f"{len(groups)}", free=f"{CLOSING}", prompted=f"{CLOSING} x 1")
    more = f"python eval.py --ckpt={shlex.quote(str(run.out / 'best.pt'))}"
    lines = [f"toxic: {c.scorer} > 0.5 | more, with intervals: {more}\n"]
    if "last" in columns:
        last = [r["cost"] for r in run.log.records if r["split"] == "val"][-1]
        costs = f"cost {run.best['cost']:.3g} there, {last:.3g} at the end"
        past = f"what came after step {run.best['step']} cost more than it gained, by --price={c.price:g}: {costs}"
        lines.insert(0, past)
    lines += [report.closing_table(columns, sizes), report.format_samples(shown)]
    summary, told = {title: report.flat(places) for title, places in columns.items()}, []
    for title in [t for t in columns if t != "base"]:
        told += [f"{title}: {w}" for w in report.warnings(summary[title], summary["base"])]
    lines += ["\n" + report.wrap(f"WARNING {w}") for w in told]
    return summary | dict(warnings=told), lines


def close_lm(run, tuned):
    """Validation perplexity before and after, and three samples. Returns (summary, lines to print)."""
    nll = dict(base=run.base_measures["val_nll"], tuned=run.best["cost"])
    summary = {title: dict(val_nll=x, val_ppl=math.exp(x)) for title, x in nll.items()}
    lines = ["validation perplexity: base {base[val_ppl]:.2f}, tuned {tuned[val_ppl]:.2f}\n".format(**summary)]
    _, rows = continue_prompts(tuned, run.setup.tokenizer, [""] * 3, run.config, run.config.seed + 1)
    return summary, lines + [report.wrap(decode(run.setup.tokenizer, row), "  | ") for (row,) in rows]
