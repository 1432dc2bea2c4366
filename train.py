"""The one training loop: contrastive perplexity, one of its rivals, or language modelling.

Reads from top to bottom: the objective, the loop, its set-up and its close, and whole runs.

    python train.py configs/toy_cp.py                       no download, no GPU, a minute and a half
    python train.py configs/gpt2_cp.py --tau=0.5 --out_dir=out/tau0.5
"""

from configs import Config, before_torch, check_resumable, check_shares, find, load_config, one_line_errors, swept

if __name__ == "__main__":
    before_torch("train", __doc__)

import copy
import inspect
import math
import shlex
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tqdm import tqdm

import data
from engine import edits, ranks
from engine.device import compile_if_it_pays
from engine.resume import begin_folder, is_finished, restore, save, saved_state
from engine.run import Log, first_interrupt, first_line, held, versions, write_json
from engine.weights import lora_record
from loss import OBJECTIVES, diagnose, scaled, token_mean
from measures import Setup, open_setup, report
from measures.groups import frames, hidden_states, scores
from measures.samples import sample_harmless
from measures.training import close_lm, close_tuning, print_plan, validate, validation_line
from model import GPT, GPTConfig

WRITTEN = ("best.pt", "last.pt", "log.jsonl", "config.json", "summary.json")


@dataclass
class Run:
    """All that one experiment consists of."""

    config: Config
    out: Path
    setup: Setup  # tokenizer, scorer, device, dtype
    model: GPT
    base: GPT  # the model as it started, frozen: judge of the samples, and what rivals and anchors compare with
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    batches: data.Batches
    held_out: list  # groups, or token lists (lm), of the validation
    groups: dict  # by split; test is for the closing table. Empty for lm
    log: Log = None  # log.jsonl
    step: int = 0  # the next one to be done
    base_measures: dict = None  # of the base, on the validation
    best: dict = None  # cost and step of best.pt
    lora: dict = None  # what its checkpoints say of the base beneath
    skipped: int = 0  # attempts at a step that overflowed in fp16
    tokens: int = 0  # scored in training since the start or resumption
    seconds: float = 0.0  # of the steps since then


# ---- the objective -------------------------------------------------------------------------------------------------


def objective(model, base, batch, config):
    """Loss of one batch, and the parts of it to log, of which 'cp' is the objective that was chosen, whichever it is.

    Rows of idx: group after group, its P positives, then its N negatives; B = G (P + N).
    """
    idx, lengths, start = batch.rows()  # the groups' B rows, then those of the anchor, in one forward pass
    idx, B = idx.to(model.device, non_blocking=True), len(batch.idx)
    states, anchor = model.read(idx, lengths, start).split(B)
    phi = model.nll(states)  # (B,)
    if config.objective == "lm":
        return token_mean(phi, states.count), {}

    sides = lambda x: x.view(len(batch.ids), -1).tensor_split([config.n_pos], dim=1)  # (G, P), (G, N)
    pos, neg = sides(phi)
    given = vars(config) | dict(zip(("pos", "neg"), sides(scaled(phi, states.count, config.score)), strict=True))
    if batch.base is not None:
        before = batch.base.to(phi.device)  # (B,)
        given |= zip(("base_pos", "base_neg"), sides(scaled(before, states.count, config.score)), strict=True)
    cp = OBJECTIVES[config.objective](**{name: given[name] for name in arguments(config) if name in given})
    loss = config.cp_weight * cp + config.nll_weight * pos.mean()  # over sentences; anchor_*: over tokens
    log, diagnostics = {"cp": cp.detach(), "nll": pos.detach().mean()}, diagnose(pos, neg)
    log |= {k: diagnostics[k].mean() for k in ("spread", "separation", "signed_gap", "rank_accuracy")}
    if config.hold_weight:
        hold = (pos - sides(before)[0]).square().mean()
        loss, log["hold"] = loss + config.hold_weight * hold, hold.detach()
    if config.anchor_kl:
        kl = token_mean(model.kl(anchor, base, idx[B:], lengths[B:], start[B:]), anchor.count)
        loss, log["anchor_kl"] = loss + config.anchor_kl * kl, kl.detach()
    if config.anchor_nll:
        nll = token_mean(model.nll(anchor), anchor.count)
        loss, log["anchor_nll"] = loss + config.anchor_nll * nll, nll.detach()
    return loss, log


def arguments(config):
    """What the chosen objective wants, by name: scores and settings. Nothing for lm."""
    return inspect.signature(OBJECTIVES[config.objective]).parameters if config.objective != "lm" else {}


def learning_rate(step, config):
    """Linear warm-up, then a cosine from lr down to 0."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / (config.warmup_steps + 1)
    progress = (step - config.warmup_steps) / (config.max_steps - config.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * progress)) * config.lr


# ---- the loop ------------------------------------------------------------------------------------------------------


def fit(run):
    """The training loop. Returns True, or False if Ctrl-C ended it early (then last.pt holds that step)."""
    config, first = run.config, ranks.first()
    run.base_measures = validate(run, run.base) if first else None
    bar = tqdm(total=config.max_steps, initial=run.step, unit="step", dynamic_ncols=True, disable=not first)
    with bar, first_interrupt() as stop:
        while True:
            # ---- measure and save: at the first step, now and then, and at the last
            step, last = run.step, run.step == config.max_steps
            due = step == 0 or last or (config.eval_interval and step % config.eval_interval == 0)
            stopped = ranks.any_of(stop)
            if first and (due or stopped):  # before the validation, which may fail: a scorer is anybody's code
                state = dict(optimizer=run.optimizer.state_dict(), scaler=run.scaler.state_dict())
                save(run.out / "last.pt", run.model, step, run.lora, asdict(config), best=run.best, **state)
            if first and due:
                m = run.base_measures if step == 0 else validate(run, run.model)
                cost = report.selection_cost(m, run.base_measures, config.price)
                run.log.write(dict(step=step, split="val", cost=cost, **m))
                bar.write(validation_line(step, cost, m))
                if step and (run.best is None or cost < run.best["cost"]):
                    run.best = {"cost": cost, "step": step}
                    save(run.out / "best.pt", run.model, step, run.lora, asdict(config), cost=cost, measures=m)
            if last or stopped or (due and ranks.any_of(stop)):  # where the others wait while the first one measures
                return last

            # ---- one optimiser step, on batches that depend on the step alone: so a run can be resumed
            start, n = time.perf_counter(), config.grad_accum
            batches = [run.batches[step * n + i] for i in range(n)]
            record = optimise(run, batches, learning_rate(step, config))
            run.step += 1

            # ---- log
            tokens = sum(b.tokens for b in batches)
            run.tokens, run.seconds = run.tokens + tokens, run.seconds + time.perf_counter() - start
            if first:
                run.log.write(dict(step=step, split="train", **record, lr=learning_rate(step, config), tokens=tokens))
            shown = {k: f"{record[k]:.3f}" for k in ("loss", "nll", "signed_gap") if k in record}
            if run.skipped:
                shown["skipped"] = run.skipped
            bar.set_postfix(shown | {"tok/s": f"{run.tokens / run.seconds:,.0f}"}, refresh=False)
            bar.update()


def optimise(run, batches, lr):
    """One optimiser step. Returns what to log."""
    while True:
        try:
            record = backward(run, batches)
        except FloatingPointError:
            raise
        except Exception as e:
            if run.model.compiled_hidden is None:
                raise
            run.model.compiled_hidden = None  # whatever the compiler's trouble is, the run does not depend on it
            run.optimizer.zero_grad()
            tqdm.write(f"compile      off from here (it failed: {first_line(e)[:60]}); slower, otherwise the same")
            continue
        record["grad_norm"] = update(run, batches, lr)
        if math.isfinite(record["grad_norm"]):
            return record if not run.scaler.is_enabled() else record | {"skipped": run.skipped}
        run.skipped += 1  # fp16 overflowed, and the scaler left the step out: again, scaled by half


def backward(run, batches):
    """Forward and backward in grad_accum parts, whose weighted mean is that of the whole (but the centroid of
    variant=released and the anchors' means over tokens are each part's own). Each process does its share of the parts
    and ends with the gradients of all. Returns what to log."""
    record, weight = {}, sum(b.weight for b in batches)
    for batch in ranks.mine(batches):
        share = batch.weight / weight
        with run.setup.amp():
            loss, parts = objective(run.model, run.base, batch, run.config)
        run.scaler.scale(loss * share).backward()
        parts = {"loss": loss.detach(), **parts}
        for k, v in zip(parts, torch.stack(list(parts.values())).tolist(), strict=True):  # one wait for the GPU
            record[k] = record.get(k, 0.0) + share * v
    record = ranks.total(record)
    stop_unless_finite("loss", record["loss"], run, batches)
    ranks.add_gradients(run.model)
    return record


def update(run, batches, lr):
    """Clip, step, zero. Returns the norm of the gradient."""
    for group in run.optimizer.param_groups:
        group["lr"] = lr
    run.scaler.unscale_(run.optimizer)
    norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), run.config.grad_clip or math.inf).item()
    scale = run.scaler.get_scale()
    run.scaler.step(run.optimizer)
    run.scaler.update()
    # A scale that fell was too high, and the step was left out; below 1 the fault is no longer the scale's.
    if run.scaler.get_scale() >= scale or scale < 1:
        stop_unless_finite("gradient norm", norm, run, batches)
    run.optimizer.zero_grad()
    return norm


def stop_unless_finite(what, value, run, batches):
    if not math.isfinite(value):
        ids = ", ".join(i for b in batches for i in b.ids)
        where = f"{what} is {value} at step {run.step}, in {ids}"
        if run.step == 0 and run.config.init_from != "scratch":
            raise FloatingPointError(f"{where}: {run.config.init_from} may hold NaNs: try another --init_from")
        advice = "look at these sentences, or --resume with a smaller --lr"
        raise FloatingPointError(f"{where}. The last checkpoint, {run.out / 'last.pt'}, is from before: {advice}")


# ---- set up --------------------------------------------------------------------------------------------------------


def starting_model(config, tokenizer):
    """The model that `init_from` names, on the CPU. A config file's model is trained first if it is missing."""
    source = config.init_from
    if source == "scratch":
        torch.manual_seed(config.seed)
        shape = dict(n_layer=config.n_layer, n_head=config.n_head, n_embd=config.n_embd)
        return GPT(GPTConfig(vocab_size=tokenizer.n_vocab, n_positions=config.n_positions, **shape))
    if source.endswith(".py"):
        source = trained_by(source, config)
    return GPT.from_pretrained(find(source), tokenizer.n_vocab)


def set_up(config):
    """Build a Run, print what it will do, and continue an unfinished one if asked to."""
    with ranks.first_before_others():  # the first makes or downloads what is missing, the others find it
        out = Path(config.out_dir)
        if saved := saved_state(out, config.resume):
            check_resumable(config, saved["config"], out / "last.pt", saved["step"])
        setup = open_setup(config, {"model": config.init_from}, build=lambda _, tok: starting_model(config, tok))
    model = setup.models["model"]
    batches, held_out, groups = data.open_data(config, setup.tokenizer, model.config.n_positions)

    # ---- the frozen base
    shared = {id(p): p for p in model.parameters()} if config.lora_rank else {}  # frozen in both: one copy will do
    base, lora = copy.deepcopy(model, shared), None
    if config.lora_rank:
        lora = lora_record(base.source, base.state_dict(), config.lora_alpha / config.lora_rank)
        torch.manual_seed(config.seed)
        model.add_lora(config.lora_rank, config.lora_alpha, config.lora_targets)
    for p in base.requires_grad_(False).matrices():  # cast once: autocast would cast what is frozen at every use
        p.data = p.data.to(setup.dtype)
    if config.objective != "lm" and config.edit == "none":
        with setup.amp():
            ask_base(base, batches, setup, config, groups["train"])

    # ---- what is trained, and by what
    if config.freeze_embeddings:
        model.transformer.wte.requires_grad_(False)  # the output head too: it is tied
        model.transformer.wpe.requires_grad_(False)
    # From 2^10: the usual 2^16 overflows at first, and with 60 steps there are none to spare.
    scaler = torch.amp.GradScaler(setup.device.type, 2.0**10, enabled=setup.dtype == torch.float16)
    optimizer = make_optimizer(model, config)
    # See `optimise` for what happens if the compiler fails.
    model.compiled_hidden, told = compile_if_it_pays(model.hidden, config.compile, setup.device, config.max_steps)
    run = Run(config, out, setup, model, base, optimizer, scaler, batches, held_out, groups, lora=lora)

    # ---- where it begins
    if config.edit != "none":
        edit(run)
    elif saved:
        restore(model, optimizer, scaler, saved, out / "last.pt")
        run.step, run.best = saved["step"], saved["best"]
        names = config.differing(saved["config"])
        print(f"resume       {out}, from step {run.step}" + (f", with another {', '.join(names)}" if names else ""))
    if ranks.first():
        run.log = begin_folder(out, asdict(config), run.step if saved else None)
    print_plan(run, told, arguments(config).keys())
    return run


def ask_base(base, batches, setup, config, groups):
    """Give the batches what the frozen base has to say before the first step: its phi of the groups' sentences, and
    texts of its own. All phi beforehand and not as they come: in bf16 one depends a little on its batch, and a resumed
    run would make other batches."""
    compares = {"base_pos", "base_neg"} & arguments(config).keys()
    if compares or config.hold_weight:  # hold_weight needs the positives alone
        sentences = [row for sides in batches.encoded for side in sides[: 2 if compares else 1] for row in side]
        rows = list(dict.fromkeys(map(tuple, sentences)))  # each once
        batches.base = dict(zip(rows, scores(base, rows, what="scores of the base").tolist(), strict=True))
    if config.anchor_kl or config.anchor_nll:
        texts, starts = ranks.from_first(lambda: sample_harmless(base, setup.tokenizer, setup.scorer, config, groups))
        sizes = (config.anchor_batch, config.seed, base.config.n_positions + 1)
        batches.anchor = data.Batches(texts, setup.tokenizer, *sizes, starts=starts)


def edit(run):
    """Change the weights as config.edit says, instead of training."""
    c, tokenizer = run.config, run.setup.tokenizer
    if c.edit == "task_vector":
        edits.task_vector(run.model, GPT.from_pretrained(find(c.edit_model), tokenizer.n_vocab), c.edit_strength)
    else:
        pairs = [pair for g in run.groups["train"] for pair in zip(g.positives, g.negatives, strict=False)]
        rows = [frames(texts, tokenizer, run.model, c.max_tokens) for texts in zip(*pairs, strict=True)]
        pos, neg = (hidden_states(run.model, side) for side in rows)  # (blocks, M, C) each
        edits.profs(run.model, pos, neg, c.edit_directions, round(c.edit_from * len(pos)))
    run.step = c.max_steps


def make_optimizer(model, config):
    """AdamW, without weight decay on vectors (biases and layer norms)."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        dict(params=[p for p in trained if p.dim() >= 2], weight_decay=config.weight_decay),
        dict(params=[p for p in trained if p.dim() < 2], weight_decay=0.0),
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.98), fused=True)


# ---- close ---------------------------------------------------------------------------------------------------------


def close(run, began):
    """Measure what the run has changed, write summary.json, which is returned, then print it."""
    c, setup, ckpt = run.config, run.setup, run.out / "best.pt"
    tuned = GPT.from_pretrained(ckpt).to(setup.device)
    with setup.amp():
        summary, told = close_lm(run, tuned) if c.objective == "lm" else close_tuning(run, tuned)
    seconds, speed = time.time() - began, run.tokens / run.seconds if run.seconds else None
    summary |= dict(best_step=run.best["step"], config=asdict(c), tokens_per_second=speed, device=str(setup.device))
    summary |= dict(dtype=str(setup.dtype)[6:], versions=versions(), seconds=seconds)
    write_json(run.out / "summary.json", summary)
    print(f"\nbase: {c.init_from} | tuned: {ckpt}, step {run.best['step']} of {c.max_steps}")
    print("\n".join(told))
    print(f"\n{seconds:.0f} s in all" + (f", {speed:,.0f} scored tokens per second of training" if speed else ""))
    print(f"written to {run.out}: {', '.join(WRITTEN)}")
    return summary


# ---- whole runs: one, the one that makes its base, a sweep's -------------------------------------------------------


def train(config):
    """Run one experiment. Returns its summary ({} in all processes but the first), or None if Ctrl-C ended it early."""
    began = time.time()
    check_shares(config, ranks.count())
    with held(config.out_dir) if ranks.first() else nullcontext():
        run = set_up(config)
        if fit(run):
            return close(run, began) if ranks.first() else {}
    print(f"\nstopped before step {run.step}; {run.out / 'last.pt'} is saved: the same command with --resume goes on")
    return None


def trained_by(path, config):
    """The checkpoint that a config file makes: trained now if it is missing, gone on with if it is unfinished.
    Raises ValueError if its folder holds the run of other settings."""
    machine = [f"--{name}={getattr(config, name)}" for name in ("device", "dtype", "compile")]
    wanted = load_config("train", [path, *machine], said=f"--init_from={path}: ")
    best = Path(wanted.out_dir) / "best.pt"
    hint = f"delete that folder, or name its checkpoint, --init_from={shlex.quote(str(best))}"
    if not is_finished(wanted, hint, path):
        print(f"=== {path} comes first: it makes the model to start from ===\n")
        with ranks.alone():
            if train(wanted) is None:
                sys.exit(130)  # Ctrl-C
        print(f"\n=== {best} is made; now the run itself ===\n")
    return best


def sweep(config):
    """Train what --sweep lists, one run after another; those that are finished stay as they are, an unfinished one goes
    on. Then the table over all of them, and the picture. Returns False if Ctrl-C ended it early."""
    runs, failed = swept(config), []
    if config.plot:
        report.pyplot()  # better to know now if there is none
    for i, run in enumerate(runs, 1):
        if is_finished(run, "delete that folder, or give another --out_dir", "--sweep"):
            continue
        print(f"\n=== {i} of {len(runs)}: {run.out_dir} ===\n")
        try:
            if train(run) is None:
                return False
        except FloatingPointError as e:  # a result as well: the others are not to wait for it
            failed.append(f"left out: {run.out_dir}, {e}")
            print(failed[-1])
    if ranks.first():
        print("\n".join(["", *failed]))
        report.compare_runs([run.out_dir for run in runs], plot=config.plot)
    return True


def main(argv=None):
    with one_line_errors("train.py", "what was saved last is whole"):  # outside the loop, or a second Ctrl-C in it
        with ranks.joined():
            config = ranks.from_first(lambda: load_config("train", argv))
            if config.plot and not config.sweep:
                raise ValueError("--plot draws a --sweep; of one run: python eval.py --plot=FILE.png")
            done = sweep(config) if config.sweep else train(config) is not None
        if not done:
            sys.exit(130)


if __name__ == "__main__":
    main()
