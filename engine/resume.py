"""The folder of a training run: how one begins, its checkpoints, and what it goes on from, read and checked before
anything is computed."""

import math
import shlex
from dataclasses import asdict
from pathlib import Path

import torch

from engine.run import Log, atomic_write, read_json, write_json
from engine.weights import load_checkpoint


def is_finished(config, hint, source):
    """Whether out_dir holds the finished run of these settings. If it holds an unfinished one, config.resume is set.
    Raises ValueError, with the hint, if it holds a run of other settings than `source` says."""
    out = Path(config.out_dir)
    if (out / "config.json").is_file():
        if names := config.differing(read_json(out / "config.json", hint)):
            raise ValueError(f"{out} was made with another {', '.join(names)} than {source} says: {hint}")
        if (out / "summary.json").is_file() and (out / "best.pt").is_file():
            return True
        config.resume = (out / "last.pt").is_file()
    return False


def saved_state(folder, resume):
    """The content of a folder's last.pt if its run is to be resumed, with cost and step of the best.pt beside it as
    "best"; else None. Raises FileNotFoundError or ValueError with one line if it cannot be resumed, and ValueError if
    the folder holds an unfinished run and `resume` is off: none is overwritten unasked."""
    path, file = folder / "last.pt", folder / "best.pt"
    if not resume:
        if (folder / "summary.json").is_file():
            print(f"{folder} holds a finished run, which this one replaces")
        elif path.is_file():
            ways = "add --resume to go on with it, or give another --out_dir, or delete it"
            raise ValueError(f"{folder} holds an unfinished run: {ways}")
        return None
    if not path.is_file():
        raise FileNotFoundError(f"nothing to resume, there is no {path}: leave --resume out, or check --out_dir")
    saved = load_checkpoint(path)
    kinds = dict(step=int, config=dict, optimizer=dict, scaler=dict, best=dict | None)
    if wrong := [k for k, kind in kinds.items() if k not in saved or not isinstance(saved[k], kind)]:
        raise ValueError(
            f"{path} has no usable {wrong[0]!r} state, so it cannot be resumed: start in another --out_dir, from these "
            f"weights with --init_from={shlex.quote(str(path))}"
        )
    if saved["best"] and not file.is_file():
        raise FileNotFoundError(f"{file} is missing, which belongs to {path}: put it back, or give another --out_dir")
    if saved["best"] or file.is_file():  # of an earlier validation, or of this very step's: then a kill came after it
        best = load_checkpoint(file, mmap=True)
        if not isinstance(best.get("cost"), float) or best.get("step", math.inf) > saved["step"]:
            raise ValueError(f"{file} is not this run's, by its cost and step: start in another --out_dir")
        saved["best"] = dict(cost=best["cost"], step=best["step"])
    return saved


def restore(model, optimizer, scaler, saved, path):
    """Put a saved state into a model, its AdamW and its scaler, whose settings (lr, weight decay, ...) stay. Raises
    ValueError with one line if it is that of another model."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    moments, mine = saved["optimizer"].get("state"), model.trained_state()
    if {k: v.shape for k, v in saved["model"].items()} != {k: v.shape for k, v in mine.items()}:
        raise ValueError(f"{path} is a model of another size: give the --init_from that this run began with")
    fits = isinstance(moments, dict) and set(moments) in (set(), set(range(len(params))))
    if not (fits and all(_fits(moments[i], params[i]) for i in moments)):
        raise ValueError(f"{path} is damaged, its optimizer's state is not this model's: start in another --out_dir")
    model.load_state_dict(saved["model"], strict=False)
    optimizer.load_state_dict(dict(state=moments, param_groups=optimizer.state_dict()["param_groups"]))
    if saved["scaler"].keys() == scaler.state_dict().keys():  # not if the run goes on in another dtype
        scaler.load_state_dict(saved["scaler"])


def begin_folder(folder, settings, step):
    """Begin a run's folder (step None), or go on in it at `step`: delete results that no longer hold, of a new run the
    checkpoints too, write config.json, and return the log. In this order a kill leaves nothing that a later run would
    take for its own."""
    path, begins = folder / "log.jsonl", step is None
    if not begins:
        hint = "take that line out (only figures need it), or give another --out_dir"
        log = Log(path, lambda r: r["step"] < step, hint=hint)  # later ones are made again
    for name in ("last.pt", "summary.json", "eval.json") if begins else ("summary.json", "eval.json"):
        (folder / name).unlink(missing_ok=True)
    write_json(folder / "config.json", settings)
    if begins:
        (folder / "best.pt").unlink(missing_ok=True)
        log = Log(path, records=[])
    return log


def save(path, model, step, lora, settings, **more):
    """A checkpoint of tensors and plain types, written atomically. lora is a `lora_record`, or None."""
    state = dict(model=model.trained_state(), model_config=asdict(model.config), step=step)
    state |= dict(lora=lora) if lora else {}
    state |= dict(config=settings, tokenizer=settings["tokenizer"], **more)
    atomic_write(path, lambda f: torch.save(state, f))


def _fits(moments, p):
    """Whether these are AdamW's moments of a parameter."""
    shapes = dict(step=(), exp_avg=p.shape, exp_avg_sq=p.shape)
    found = [moments.get(key) if isinstance(moments, dict) else None for key in shapes]
    return all(
        isinstance(x, torch.Tensor) and x.shape == shape and x.is_floating_point()
        for x, shape in zip(found, shapes.values(), strict=True)
    )
