"""The one training loop: `python train.py configs/toy_cp.py` (contrastive perplexity, or language modelling).

Reads from top to bottom: the model to start from, the objective, then a run: set up, fit, close.
`python train.py --help` lists every setting.
"""

import copy
import json
import math
import signal
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import data
import eval as evaluation
from configs import Config, as_json, changed, find, load_config
from data import report
from loss import contrastive_perplexity, language_modelling
from model import (
    GPT,
    GPTConfig,
    amp,
    atomic_write,
    first_line,
    keep_freed_memory,
    load_checkpoint,
    pick_device,
    pick_dtype,
)

WRITTEN = ("best.pt", "last.pt", "log.jsonl", "config.json", "summary.json")
MACHINE = ("device", "dtype", "compile", "resume")  # settings that say where and how a run happens, not what it is


# --------------------------------------------------------------------------------------------------------------------
# the model to start from


def starting_model(config, tokenizer):
    """The model that `init_from` names, on the CPU. A config file's model is trained first if it is missing."""
    source = config.init_from
    if source == "scratch":
        torch.manual_seed(config.seed)
        shape = dict(n_layer=config.n_layer, n_head=config.n_head, n_embd=config.n_embd)
        return GPT(GPTConfig(vocab_size=tokenizer.n_vocab, n_positions=config.n_positions, **shape))
    if source.endswith(".py"):
        source = made_by(source, config)
    return GPT.from_pretrained(find(source), tokenizer.n_vocab)


def differ(config, saved):
    """Names of the settings that a saved run has otherwise; one that it does not know had its default."""
    return [
        f.name
        for f in fields(config)
        if f.name not in MACHINE and saved.get(f.name, f.default) != getattr(config, f.name)
    ]


def made_by(path, config):
    """The checkpoint that a config file makes. Its run comes first if that is missing, and goes on if it is unfinished.

    Raises ValueError if the folder holds the run of other settings.
    """
    wanted = load_config([path, *(f"--{k}={getattr(config, k)}" for k in MACHINE if k != "resume")])
    out = Path(wanted.out_dir)
    if (out / "config.json").is_file():
        made = json.loads((out / "config.json").read_text())
        if other := differ(wanted, made):
            raise ValueError(
                f"{out} was made with another {', '.join(other)} than {path} says: delete that folder, or name its "
                f"checkpoint, --init_from={out / 'best.pt'}"
            )
        if (out / "summary.json").is_file() and (out / "best.pt").is_file():
            return str(out / "best.pt")
        wanted.resume = (out / "last.pt").is_file()
    print(f"=== {path} comes first: it makes the model to start from ===\n")
    if train(wanted) is None:
        sys.exit(130)  # Ctrl-C
    print(f"\n=== {out / 'best.pt'} is made; now the run itself ===\n")
    return str(out / "best.pt")


# --------------------------------------------------------------------------------------------------------------------
# the objective


def objective(model, base, batch, config):
    """Loss of one batch, and the parts of it to log. MODIFY HERE: an objective sees sentence scores, nothing else."""
    idx = batch.idx.to(model.device, non_blocking=True)  # (B, T)
    phi = model.sequence_nll(idx, batch.lengths)  # (B,)
    if config.objective == "lm":
        return language_modelling(phi, (batch.lengths - 1).to(phi.device)), {}

    phi = phi.view(len(batch.ids), config.n_pos + config.n_neg)
    pos, neg = phi[:, : config.n_pos], phi[:, config.n_pos :]  # (G, P), (G, N)
    cp, diagnostics = contrastive_perplexity(
        pos, neg, config.tau, config.alpha, config.variant, config.distance, config.detach_centroid, config.score
    )
    loss = config.cp_weight * cp + config.nll_weight * pos.mean()
    log = {"cp": cp.detach(), "nll": pos.detach().mean()}
    log |= {k: diagnostics[k].mean() for k in ("spread", "separation", "signed_gap", "rank_accuracy")}
    if config.kl_weight:
        rows = [r for r in range(len(idx)) if r % (config.n_pos + config.n_neg) < config.n_pos]
        kl = model.sequence_kl(base, idx[rows], batch.lengths[rows]).mean()
        loss, log["kl"] = loss + config.kl_weight * kl, kl.detach()
    if anchor := batch.anchor:
        rows = anchor.idx.to(model.device, non_blocking=True), anchor.lengths, anchor.start
        count = (anchor.lengths - anchor.start).to(model.device)
        if config.anchor_kl:
            kl = language_modelling(model.sequence_kl(base, *rows), count)
            loss, log["anchor_kl"] = loss + config.anchor_kl * kl, kl.detach()
        if config.anchor_nll:
            nll = language_modelling(model.sequence_nll(*rows), count)
            loss, log["anchor_nll"] = loss + config.anchor_nll * nll, nll.detach()
    return loss, log


def learning_rate(step, config):
    """Linear warm-up, then a cosine from lr down to min_lr."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / (config.warmup_steps + 1)
    progress = (step - config.warmup_steps) / (config.max_steps - config.warmup_steps)
    return config.min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (config.lr - config.min_lr)


# --------------------------------------------------------------------------------------------------------------------
# a run: set up


@dataclass
class Run:
    """All that one experiment consists of."""

    config: Config
    out: Path
    model: GPT
    base: GPT  # the model as it started, frozen: judge of the samples, and anchor of kl_weight
    dtype: torch.dtype
    tokenizer: object
    scorer: object
    batches: data.Batches
    held_out: list  # groups (cp) or token lists (lm) of the validation
    test: list  # groups of the closing table
    optimizer: torch.optim.Optimizer = None
    scaler: torch.amp.GradScaler = None
    step: int = 0  # the next one to be done
    best: dict = None  # cost and step of best.pt
    tokens: int = 0  # scored in training, and the seconds that it took, since the start or resumption
    seconds: float = 0.0

    def amp(self):
        return amp(self.model.device, self.dtype)


def set_up(config):
    """Build a Run, print what it will do, and continue an earlier one if asked to."""
    out, device = Path(config.out_dir), pick_device(config.device)
    if device.type == "cpu":
        keep_freed_memory()
    saved = earlier(out, config.resume)
    tokenizer, scorer = data.get_tokenizer(config.tokenizer), data.get_scorer(config.scorer)
    if not scorer.function:
        raise ValueError(f"scorer {scorer.name!r} cannot judge samples while they are made: that is for eval.py")
    model = starting_model(config, tokenizer).to(device)
    dtype, reason = pick_dtype(config.dtype, device, model.config.n_embd)
    batches, held_out, test = open_data(config, tokenizer, model.config.n_positions)
    base = copy.deepcopy(model).requires_grad_(False)
    if config.objective == "cp" and config.anchor_kl + config.anchor_nll:
        with amp(device, dtype):
            batches.anchor = own_texts(base, tokenizer, scorer, config, data.load_groups(config.data)["train"])
    run = Run(config, out, model, base, dtype, tokenizer, scorer, batches, held_out, test)

    if config.freeze_embeddings:
        model.transformer.wte.requires_grad_(False)  # the output head too: it is tied
        model.transformer.wpe.requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices, vectors = [p for p in trained if p.dim() >= 2], [p for p in trained if p.dim() < 2]
    groups = [dict(params=matrices, weight_decay=config.weight_decay), dict(params=vectors, weight_decay=0.0)]
    run.optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), fused=True)
    run.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    if saved:
        model.load_state_dict(saved["model"])
        run.optimizer.load_state_dict(saved["optimizer"])
        run.scaler.load_state_dict(saved["scaler"])
        run.step, run.best = saved["step"], saved["best"]
        other = differ(config, saved["config"])
        print(f"resume       {out}, from step {run.step}" + (f", with another {', '.join(other)}" if other else ""))

    out.mkdir(parents=True, exist_ok=True)
    for name in (*(WRITTEN if not saved else ()), "summary.json", "eval.json"):
        (out / name).unlink(missing_ok=True)
    atomic_write(out / "config.json", lambda f: f.write(as_json(config).encode()))
    announce(run, reason, try_compile(run))
    return run


def earlier(out, resume):
    """The state to resume from, or None. An unfinished run is never overwritten unasked."""
    if resume:
        return load_checkpoint(out / "last.pt")
    if (out / "last.pt").is_file() and not (out / "summary.json").is_file():
        if step := load_checkpoint(out / "last.pt")["step"]:
            raise ValueError(
                f"{out} holds an unfinished run at step {step}: add --resume to go on with it, or give another "
                "--out_dir, or delete the folder"
            )
    elif (out / "summary.json").is_file():
        print(f"{out} holds a finished run, which this one replaces")
    return None


def open_data(config, tokenizer, n_positions):
    """(training batches, validation items, test groups). Prints the counts."""
    max_tokens = min(config.max_tokens, n_positions + 1)  # the last token is predicted, never read
    if config.objective == "lm":
        texts, groups = data.load_documents(config.data, config.seed)
        batches = data.Batches(texts["train"], tokenizer, config.batch_size, config.seed, max_tokens)
        held_out = [data.frame(t, tokenizer, max_tokens) for t in texts["val"][: config.eval_groups]]
        print(f"data         {config.data}: {len(texts['train']):,} documents to train on, {len(held_out)} to validate")
    else:
        groups = data.load_groups(config.data)
        if missing := [s for s in data.SPLITS if not groups[s]]:
            raise ValueError(f"{config.data} has no groups of split {missing[0]!r}: training needs train, val and test")
        enough, dropped = data.enough(groups["train"], config.n_pos, config.n_neg, config.drop_small)
        sizes = (config.n_pos, config.n_neg)
        batches = data.Batches(enough, tokenizer, config.batch_size, config.seed, max_tokens, *sizes)
        held_out = groups["val"][: config.eval_groups]
        counts = ", ".join(f"{len(groups[s])} {s}" for s in data.SPLITS)
        print(f"data         {config.data}: {counts} groups" + (f"; {dropped} too small, left out" if dropped else ""))
    cut = f"; {batches.truncated} sentences cut at {max_tokens} tokens" if batches.truncated else ""
    print(f"             {batches.padding():.0%} of the positions are padding, computed in attention only{cut}")
    return batches, held_out, groups["test"]


def own_texts(base, tokenizer, scorer, config, groups):
    """Batches of texts that the base writes itself, drawn from its whole distribution: from nothing, or from where the
    negatives of the groups become toxic (then only what follows counts). What the scorer calls toxic is left out and
    drawn again: that need not stay. Raises ValueError if hardly anything else comes."""
    begins = evaluation.cut_prompts([g.negatives for g in groups], scorer, 0)
    room = base.config.n_positions - 1 - max(len(tokenizer.encode_ordinary(b)) for b in begins)
    n, longest, whole = (
        config.anchor_texts,
        min(config.anchor_tokens, room),
        replace(config, temperature=1.0, top_p=1.0),
    )
    rng, texts, starts = np.random.default_rng([config.seed, 2]), [], []
    for attempt in range(10):
        prompts = [str(b) if rng.random() < config.anchor_prompted else "" for b in rng.choice(begins, n)]
        how = (whole, config.seed + attempt, 1, longest, None, "the base's own texts")
        begun, rows = evaluation.generate(base, tokenizer, prompts, *how)
        toxic = scorer([evaluation.decode(tokenizer, row) for (row,) in rows]) > 0.5
        kept = [(start, row) for start, (row,), x in zip(begun, rows, toxic, strict=True) if not x]
        texts += [start + row for start, row in kept]
        starts += [len(start) for start, _ in kept]
        if len(texts) >= n:
            sizes = (config.anchor_batch, config.seed, base.config.n_positions + 1)
            return data.Batches(texts[:n], tokenizer, *sizes, starts=starts[:n])
    raise ValueError(f"of {10 * n} texts of the base {config.scorer} calls all but {len(texts)} toxic")


def try_compile(run):
    """Compile the network where that pays; if it fails, say why and go on without. Returns what to print."""
    if run.config.compile == "no" or (run.config.compile == "auto" and run.model.device.type != "cuda"):
        return "off" if run.config.compile == "no" else f"off (gains nothing on {run.model.device.type})"
    run.model.compiled_hidden = torch.compile(run.model.hidden)
    try:
        with run.amp():
            objective(run.model, run.base, run.batches[0], run.config)[0].backward()
        outcome = "on"
    except Exception as e:  # whatever the compiler's trouble is, the run does not depend on it
        run.model.compiled_hidden = None
        outcome = f"off (it failed here: {first_line(e)[:100]}); slower, otherwise the same"
    run.model.zero_grad()
    return outcome


def announce(run, reason, compiled):
    c, some = run.config, [run.batches[i] for i in range(5)]
    tokens = sum(b.tokens for b in some) / len(some) * c.grad_accum
    what = f"groups of {c.n_pos} + {c.n_neg}" if c.objective == "cp" else "documents"
    print(f"model        {c.init_from}: {run.model.num_parameters() / 1e6:.1f} M parameters, {run.model.config}")
    print(f"device       {run.model.device}, products in {str(run.dtype)[6:]}: {reason}; torch.compile {compiled}")
    print(
        f"steps        {c.max_steps} of {c.batch_size} x {c.grad_accum} {what}, some {tokens:,.0f} scored tokens each"
    )
    print("settings     " + ", ".join(f"{k}={v}" for k, v in changed(c).items()) + " (all others: defaults)\n")


# --------------------------------------------------------------------------------------------------------------------
# a run: the loop


def validate(run, model):
    """Measures on held-out data, the same data and random numbers at every call."""
    with run.amp():
        if run.config.objective == "lm":
            phi, tokens = evaluation.scores(model, run.held_out), np.array([len(s) - 1 for s in run.held_out])
            return {"val_nll": float((phi * tokens).sum() / tokens.sum())}
        args = (run.held_out, run.tokenizer, run.scorer, run.config, run.config.eval_samples, run.config.seed)
        return report.flat(evaluation.evaluate(model, run.base, *args)[0])


def fit(run):
    """The training loop. Returns True, or False if Ctrl-C ended it early (then last.pt holds that step)."""
    config, model = run.config, run.model
    base_measures = validate(run, run.base)
    log = Log(run.out / "log.jsonl", run.step)
    bar = tqdm(total=config.max_steps, initial=run.step, unit="step", dynamic_ncols=True)
    with bar, first_interrupt() as stop:
        while True:
            # ---- measure: at the first step, now and then, and at the last
            step, last = run.step, run.step == config.max_steps
            due = step == 0 or last or (config.eval_interval and step % config.eval_interval == 0)
            if due:
                m = base_measures if step == 0 else validate(run, model)
                cost = m["val_nll"] if config.objective == "lm" else report.cost(m, base_measures)
                log.write(step=step, split="val", cost=cost, **m)
                bar.write(progress(step, cost, m))
                if step and (run.best is None or cost < run.best["cost"]):
                    run.best = {"cost": cost, "step": step}
                    save(run, "best.pt", measures=m)
            if due or stop:
                state = {"optimizer": run.optimizer.state_dict(), "scaler": run.scaler.state_dict()}
                save(run, "last.pt", best=run.best, **state)
            if last or stop:
                return last

            # ---- forward and backward, in grad_accum parts whose mean is that of the whole
            start = time.perf_counter()
            micro = [run.batches[step * config.grad_accum + i] for i in range(config.grad_accum)]
            record, weight = {}, sum(b.weight for b in micro)
            for batch in micro:
                share = batch.weight / weight
                with run.amp():
                    loss, parts = objective(model, run.base, batch, config)
                run.scaler.scale(loss * share).backward()
                parts = {"loss": loss.detach(), **parts}
                for k, v in zip(parts, torch.stack(list(parts.values())).tolist(), strict=True):  # one wait for the GPU
                    record[k] = record.get(k, 0.0) + share * v
            stop_unless_finite("loss", record["loss"], run, micro)

            # ---- update
            for group in run.optimizer.param_groups:
                group["lr"] = learning_rate(step, config)
            run.scaler.unscale_(run.optimizer)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip or math.inf).item()
            if not run.scaler.is_enabled():  # a scaler skips such a step by itself, and scales down
                stop_unless_finite("gradient norm", norm, run, micro)
            run.scaler.step(run.optimizer)
            run.scaler.update()
            run.optimizer.zero_grad()

            # ---- log
            tokens = sum(b.tokens for b in micro)
            run.tokens, run.seconds = run.tokens + tokens, run.seconds + time.perf_counter() - start
            log.write(step=step, split="train", **record, grad_norm=norm, lr=group["lr"], tokens=tokens)
            shown = {k: f"{record[k]:.3f}" for k in ("loss", "nll", "signed_gap") if k in record}
            bar.set_postfix(shown | {"tok/s": f"{run.tokens / run.seconds:,.0f}"}, refresh=False)
            bar.update()
            run.step += 1


def stop_unless_finite(what, value, run, micro):
    if not math.isfinite(value):
        ids = ", ".join(i for b in micro for i in b.ids)
        raise FloatingPointError(
            f"{what} is {value} at step {run.step}, in {ids}. The last checkpoint, {run.out / 'last.pt'}, is from "
            "before: look at these sentences, or --resume with a smaller --lr"
        )


def progress(step, cost, m):
    """One line of a validation."""
    if "val_nll" in m:
        return f"step {step:5d} | validation nll {m['val_nll']:.4f}, perplexity {math.exp(m['val_nll']):.2f}"
    return (
        f"step {step:5d} | toxic {m['toxicity_fraction']:.0%} free, {m['toxicity_fraction_prompted']:.0%} prompted | "
        f"ppl {m['ppl_positive']:.2f} positives {m['ppl_negative']:.2f} negatives {m['sample_ppl_base']:.2f} samples | "
        f"gap {m['signed_gap']:+.2f} | dist-2 {m['dist_2']:.2f} | cost {cost:.3f}"
    )


def save(run, name, **more):
    """A checkpoint of tensors and plain types, written atomically."""
    state = dict(model=run.model.state_dict(), model_config=asdict(run.model.config), step=run.step)
    state |= dict(config=asdict(run.config), tokenizer=run.config.tokenizer, **more)
    atomic_write(run.out / name, lambda f: torch.save(state, f))


class Log:
    """log.jsonl: one JSON object a line. Records from `step` on are dropped first: they are about to be made again."""

    def __init__(self, path, step):
        lines = path.read_text().splitlines() if step and path.exists() else []
        whole = [line for line in lines if line.endswith("}")]  # a kill may have cut the last one
        keep = [line for line in whole if json.loads(line)["step"] < step]
        atomic_write(path, lambda f: f.write("".join(line + "\n" for line in keep).encode()))
        self.path = path

    def write(self, **record):
        with open(self.path, "a") as f:
            f.write(json.dumps(record) + "\n")


@contextmanager
def first_interrupt():
    """A list that fills at the first Ctrl-C, so that the step in hand is finished and saved; the second one exits."""
    stop = []

    def handle(*_):
        if stop:
            raise KeyboardInterrupt
        stop.append(True)

    if threading.current_thread() is not threading.main_thread():  # signals are the main thread's
        yield stop
        return
    before = signal.signal(signal.SIGINT, handle)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


# --------------------------------------------------------------------------------------------------------------------
# a run: the end


def close(run, began):
    """Measure the base, the best and the last model on the test groups; print table, samples and warnings.

    Returns the summary, which summary.json holds as well.
    """
    c, columns, shown = run.config, {}, {}
    tuned = GPT.from_pretrained(run.out / "best.pt").to(run.model.device)
    judge = tuned if c.init_from == "scratch" else run.base  # an untrained network is no judge
    for title, model in (("base", run.base), ("tuned", tuned), ("last", run.model)):
        if title != "last" or run.best["step"] != c.max_steps:
            args = (run.test, run.tokenizer, run.scorer, c, evaluation.CLOSING, c.seed + 1)  # not validation's noise
            with run.amp():
                columns[title], shown[title] = evaluation.evaluate(model, judge, *args)
    print(f"\nbase: {c.init_from} | tuned: {run.out / 'best.pt'}, step {run.best['step']} of {c.max_steps}")
    print(f"{len(run.test)} test groups, {evaluation.CLOSING} samples of each kind; toxic: {c.scorer} > 0.5")
    print(f"python eval.py --ckpt={run.out / 'best.pt'} measures more, with intervals\n")
    print(report.table(columns, report.CLOSING_ROWS))
    print(report.samples(shown))
    columns = {title: report.flat(places) for title, places in columns.items()}

    warnings = []
    if c.objective == "cp":
        for title in [t for t in columns if t != "base"]:
            warnings += [f"{title}: {w}" for w in report.warnings(columns[title], columns["base"])]
    for w in warnings:
        print(f"\nWARNING {w}")

    speed = run.tokens / run.seconds if run.seconds else None
    summary = columns | dict(warnings=warnings, best_step=run.best["step"], config=asdict(c), tokens_per_second=speed)
    summary |= dict(device=str(run.model.device), dtype=str(run.dtype)[6:], versions=evaluation.versions())
    summary["seconds"] = seconds = time.time() - began
    evaluation.write_json(run.out / "summary.json", summary)
    print(f"\n{seconds:.0f} s in all" + (f", {speed:,.0f} scored tokens per second of training" if speed else ""))
    print("written: " + ", ".join(str(run.out / name) for name in WRITTEN))
    return summary


def train(config):
    """Run one experiment. Returns its summary, or None if Ctrl-C ended it early."""
    began = time.time()
    run = set_up(config)
    if fit(run):
        return close(run, began)
    print(f"\nstopped before step {run.step}; {run.out / 'last.pt'} is saved: the same command with --resume goes on")
    return None


def main(argv=None):
    config = load_config(argv, description=__doc__)
    try:
        finished = train(config)
    except (ValueError, OSError, FloatingPointError) as e:
        sys.exit(f"train.py: {e}")
    except KeyboardInterrupt:  # outside the loop, or a second one in it
        sys.exit("\ntrain.py: interrupted; what was saved last is whole")
    if finished is None:
        sys.exit(130)


if __name__ == "__main__":
    main()
