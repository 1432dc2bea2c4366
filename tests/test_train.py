"""The loop and the commands: small runs of the real thing, in seconds."""

import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import train
from configs import Config, changed, load_config
from engine import device
from loss import OBJECTIVES, contrastive_perplexity
from measures import Setup, report, training
from measures.groups import measure_groups
from measures.samples import (
    continue_prompts,
    cut_prompts,
    decode,
    draw_samples,
    measure_model,
    measure_samples,
    sample_harmless,
)
from measures.scorers import get_scorer
from model import GPT, GPTConfig

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
READMES = [ROOT / folder / "README.md" for folder in ("", "configs")]
UNSHIPPED = shutil.ignore_patterns("__pycache__", "downloads")
FEW = "--anchor_texts=4 --anchor_batch=4 --anchor_tokens=16".split()
SMALL = "--eval_samples=25 --eval_groups=4 --sample_tokens=12 --batch_size=4".split()


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A toy base of a few seconds: knows the words, not the grammar."""
    out = tmp_path_factory.mktemp("base")
    flags = ["--max_steps=30", "--warmup_steps=3", "--n_layer=1", "--n_embd=48", "--n_head=2", f"--out_dir={out}"]
    train.train(load_config("train", [str(ROOT / "configs/toy_base.py"), "--eval_interval=0", *SMALL, *flags]))
    return out / "best.pt"


@pytest.fixture(autouse=True)
def quick_closing(monkeypatch):
    monkeypatch.setattr(training, "CLOSING", 25)


def cp_config(base, out, *flags):
    steps = ["--max_steps=6", "--warmup_steps=1", "--eval_interval=3"]
    where = [f"--init_from={base}", f"--out_dir={out}"]
    return load_config("train", [str(ROOT / "configs/toy_cp.py"), *where, *SMALL, *steps, *flags])


@pytest.fixture(scope="session")
def few_groups(tmp_path_factory):
    """A dozen groups as a file, for the larger models."""
    path, groups = tmp_path_factory.mktemp("groups") / "groups.jsonl", data.load_groups("toy")
    few = [g for split in data.SPLITS for g in groups[split][: 8 if split == "train" else 2]]
    path.write_text("".join(json.dumps(vars(g)) + "\n" for g in few))
    return path


def state(path):
    return torch.load(path, weights_only=True)


def records(out):
    return [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]


def steps_of(out):
    return [r for r in records(out) if r["split"] == "train"]


def assert_same(a, b):
    assert a.keys() == b.keys()
    for k in a:
        assert torch.equal(a[k], b[k]), k


# --------------------------------------------------------------------------------------------------------------------
# one run


def test_a_run_writes_what_it_says(base, tmp_path, capsys):
    summary = train.train(cp_config(base, tmp_path / "run"))
    out = capsys.readouterr().out
    for word in (
        "model ",
        "device ",
        "data ",
        "steps ",
        "settings ",
        "base",
        "tuned",
        "free samples",
        "after toxic prompts",
    ):
        assert word in out, word
    assert "no effect " not in out
    assert f"written to {tmp_path / 'run'}: {', '.join(train.WRITTEN)}" in out
    for name in train.WRITTEN:
        assert (tmp_path / "run" / name).is_file() and name in out
    assert not list((tmp_path / "run").glob("*.tmp"))
    shown = [n if p != "prompted" else f"{n}_prompted" for p, ns in report.CLOSING_ROWS.items() for n in ns]
    promised = "toxicity_fraction toxicity_fraction_prompted ppl_positive ppl_negative rank_accuracy signed_gap"
    for side in ("base", "tuned"):
        for key in {*shown, *promised.split(), "sample_ppl_base", "dist_2", "repetition"}:
            assert math.isfinite(summary[side][key]), key
    for names in report.CLOSING_ROWS.values():
        assert all(report.MEASURES[name].label.strip() in out for name in names)
    assert {"config", "seconds", "tokens_per_second", "device", "versions"} <= summary.keys()
    assert json.loads((tmp_path / "run/summary.json").read_text()) == summary
    log = records(tmp_path / "run")
    assert [r["step"] for r in log if r["split"] == "val"] == [0, 3, 6]
    assert [r["step"] for r in log if r["split"] == "train"] == list(range(6))


@pytest.mark.parametrize(
    ("flags", "idle"),
    [
        ((), ""),
        (("--objective=ipo", "--beta=1"), "tau"),
        (("--objective=ipo", "--margin=1", "--lora_alpha=8", "--anchor_texts=9"), "tau margin anchor_texts lora_alpha"),
        (("--objective=margin", "--margin=1", "--lora_alpha=8", "--lora_rank=2"), "tau"),
        (("--cp_weight=0", "--score=ppl", "--anchor_batch=9", "--anchor_kl=1"), "tau"),
    ],
)
def test_settings_without_effect_are_told(base, tmp_path, flags, idle):
    """toy_cp.py sets tau."""
    config = cp_config(base, tmp_path, *flags)
    names = changed(config).keys() & training.without_effect(config, train.arguments(config).keys())
    assert names == set(idle.split())


def test_the_loss_falls_and_the_gap_grows(base, tmp_path):
    train.train(cp_config(base, tmp_path, "--max_steps=40", "--eval_interval=0", "--lr=5e-3"))
    log = records(tmp_path)
    loss = [r["loss"] for r in log if r["split"] == "train"]
    gap = [r["signed_gap"] for r in log if r["split"] == "val"]
    assert np.mean(loss[-5:]) < np.mean(loss[:5]) - 0.5
    assert gap[1] > gap[0] + 0.2


def test_same_seed_same_run_other_seed_other_run(base, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train.train(cp_config(base, tmp_path / name, f"--seed={seed}"))
    a, b, c = (state(tmp_path / n / "last.pt")["model"] for n in "abc")
    assert_same(a, b)
    assert not torch.equal(a["lm_head.weight"], c["lm_head.weight"])
    assert records(tmp_path / "a") == records(tmp_path / "b")


def stop_after(steps, config):
    """Train, and press Ctrl-C in the last of so many steps: it is finished and saved."""
    real = train.update

    def update(run, *args):
        if run.step == steps - 1:
            signal.raise_signal(signal.SIGINT)
        return real(run, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "update", update)
        assert train.train(config) is None
    assert state(Path(config.out_dir) / "last.pt")["step"] == steps


@pytest.mark.parametrize(("lr", "stop", "best"), [("--lr=1e-3", 4, 3), ("--lr=1e-2", 3, 6)])
def test_resume_is_exact(base, tmp_path, lr, stop, best):
    """2N steps equal N, and N after resuming, bit for bit: weights, optimiser, log; wherever it stopped, and also where
    the best step was before that."""
    train.train(cp_config(base, tmp_path / "whole", lr))
    stop_after(stop, cp_config(base, tmp_path / "parts", lr))
    train.train(cp_config(base, tmp_path / "parts", lr, "--resume"))
    whole, parts = (state(tmp_path / n / "last.pt") for n in ("whole", "parts"))
    assert_same(whole["model"], parts["model"])
    for i, s in whole["optimizer"]["state"].items():
        assert_same(s, parts["optimizer"]["state"][i])
    whole, parts = (state(tmp_path / n / "best.pt") for n in ("whole", "parts"))
    assert_same(whole["model"], parts["model"])
    assert whole["cost"] == parts["cost"] and whole["step"] == parts["step"] == best
    assert records(tmp_path / "whole") == records(tmp_path / "parts")


def test_ctrl_c_saves_and_resume_ends_as_if_nothing_had_happened(base, tmp_path):
    """SIGINT to the real command in mid-run; then --resume; against an undisturbed run, with a cosine schedule."""
    steps = ["--max_steps=40", "--warmup_steps=1", "--eval_interval=20"]
    command = [sys.executable, "train.py", "configs/toy_cp.py", f"--init_from={base}", *SMALL, *steps]
    env = os.environ | {"PYTHONUNBUFFERED": "1"}
    subprocess.run([*command, f"--out_dir={tmp_path / 'whole'}"], cwd=ROOT, check=True, capture_output=True, env=env)
    parts = tmp_path / "parts"
    process = subprocess.Popen(
        [*command, f"--out_dir={parts}"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    deadline = time.time() + 60
    while time.time() < deadline and not ((parts / "log.jsonl").exists() and len(records(parts)) > 8):
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and b"--resume goes on" in out
    stopped = state(parts / "last.pt")["step"]
    assert 0 < stopped < 40 and not (parts / "summary.json").exists()

    again = subprocess.run([*command, f"--out_dir={parts}"], cwd=ROOT, capture_output=True, text=True)
    assert (
        again.returncode == 1 and "holds an unfinished run: add --resume" in again.stderr
    )  # never overwritten unasked
    subprocess.run([*command, f"--out_dir={parts}", "--resume"], cwd=ROOT, check=True, capture_output=True)
    assert_same(state(tmp_path / "whole/last.pt")["model"], state(parts / "last.pt")["model"])
    assert records(tmp_path / "whole") == records(parts)


@pytest.fixture(scope="module")
def stopped(base, tmp_path_factory):
    """The folder of a run stopped at step 4, whose best step was 3."""
    out = tmp_path_factory.mktemp("stopped") / "run"
    stop_after(4, cp_config(base, out))
    return out


def wider(saved):
    """The same with another model's tensors."""
    saved["model"] = GPT(GPTConfig(537, 128, 32, 1, 2)).state_dict()
    saved["model_config"] |= dict(n_embd=32)


def no_moments(saved):
    saved["optimizer"]["state"][1]["exp_avg"] = torch.zeros(3)


@pytest.mark.parametrize(
    ("change", "flags", "says"),
    [
        (None, ["--max_steps=3"], "last.pt is at step 4, beyond --max_steps=3: raise it"),
        (None, ["--tau=7"], "last.pt was made with --tau=0.2: give the same with --resume, or another --out_dir"),
        (None, ["--seed=1", "--hold_weight=1"], "last.pt was made with --seed=0, --hold_weight=0.0: give the same"),
        (wider, [], "last.pt is a model of another size: give the --init_from that this run began with"),
        (no_moments, [], "last.pt is damaged, its optimizer's state is not this model's"),
        (
            lambda saved: saved.pop("optimizer"),
            [],
            "last.pt has no usable 'optimizer' state, so it cannot be resumed",
        ),
        (lambda saved: saved.update(step="4"), [], "last.pt: step wants a whole number of at least 0, got '4'"),
        (lambda saved: saved.update(best=3), [], "last.pt has no usable 'best'"),
        (lambda saved: saved["optimizer"].update(state=[]), [], "its optimizer's state is not this model's"),
        ("best.pt is missing", [], "best.pt is missing, which belongs to"),
        ("best.pt is last.pt", [], "last.pt has no usable 'optimizer'"),
        ("best.pt of a later step", [], "best.pt is not this run's, by its cost and step"),
        ("cut", [], "last.pt cannot be read"),
        ("nothing", [], "nothing to resume, there is no"),
    ],
)
def test_resume_checks_what_it_finds(base, stopped, tmp_path, change, flags, says):
    """Before anything is computed, in one line; and what is there stays as it is."""
    out = shutil.copytree(stopped, tmp_path / "run")
    best, last = out / "best.pt", out / "last.pt"
    if callable(change):
        change(saved := state(last))
        torch.save(saved, last)
    elif change == "best.pt is missing":
        best.unlink()
    elif change == "best.pt is last.pt":
        shutil.copy(best, last)
    elif change == "best.pt of a later step":
        torch.save(state(best) | dict(step=5), best)
    elif change == "cut":
        last.write_bytes(last.read_bytes()[:5000])
    elif change == "nothing":
        last.unlink()
    before = {p: p.read_bytes() for p in out.iterdir() if p.name != ".lock"}
    with pytest.raises((ValueError, FileNotFoundError)) as e:
        train.train(cp_config(base, out, "--resume", *flags))
    assert says in str(e.value) and "\n" not in str(e.value)
    assert {p: p.read_bytes() for p in out.iterdir() if p.name != ".lock"} == before


def test_what_a_resumed_run_may_change(base, stopped, tmp_path, capsys):
    """How it is optimised from here on: said, and done."""
    out = shutil.copytree(stopped, tmp_path / "run")
    train.train(cp_config(base, out, "--resume", "--max_steps=5", "--lr=1e-5", "--weight_decay=0.1"))
    assert "from step 4, with another max_steps, lr, weight_decay" in capsys.readouterr().out
    saved = state(out / "last.pt")
    assert saved["step"] == 5 and saved["optimizer"]["param_groups"][0]["weight_decay"] == 0.1


def test_a_failing_scorer_costs_no_training(base, tmp_path, monkeypatch):
    """What a scorer raises in the last validation ends the run, and the steps before it are kept."""
    out, calls = tmp_path / "run", []

    def failing(texts):
        calls.append(1)
        if (out / "last.pt").is_file() and state(out / "last.pt")["step"] == 6:
            raise OSError("the service is down")
        return np.zeros(len(texts))

    monkeypatch.setattr("data.toy.rudeness", failing)
    with pytest.raises(ValueError, match="the service is down"):
        train.train(cp_config(base, out))
    monkeypatch.undo()
    assert state(out / "last.pt")["step"] == 6 and calls


def test_no_memory_for_the_last_samples_costs_no_training(base, tmp_path, monkeypatch, capsys):
    """One line that says what to lower, and --resume has nothing left to do but to measure."""
    out, real = tmp_path / "run", GPT.generate
    flags = [f"--init_from={base}", f"--out_dir={out}", *SMALL, "--max_steps=6", "--warmup_steps=1"]

    def generate(self, *args, **kwargs):
        if (out / "last.pt").is_file() and state(out / "last.pt")["step"] == 6:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return real(self, *args, **kwargs)

    monkeypatch.setattr(GPT, "generate", generate)
    with pytest.raises(SystemExit) as e:
        train.main([str(ROOT / "configs/toy_cp.py"), *flags])
    assert re.match(r"train\.py: out of memory \(CUDA .*\): halve --batch_size .*--eval_samples$", str(e.value))
    monkeypatch.undo()
    train.main([str(ROOT / "configs/toy_cp.py"), *flags, "--resume"])
    assert "from step 6" in capsys.readouterr().out and (out / "summary.json").is_file()


def test_the_price_chooses_the_checkpoint(base, tmp_path, monkeypatch, capsys):
    """Language that gets dearer with each validation: the first is kept, and the run says why; if it is free, the
    last."""
    for price, best in ((2, 3), (0, 6)):
        seen = []
        cost = lambda m, base, price, seen=seen: seen.append(m) or price * len(seen) or -len(seen)
        monkeypatch.setattr(report, "selection_cost", cost)
        train.train(cp_config(base, tmp_path / f"{price}", f"--price={price}"))
        said = "what came after step 3 cost more than it gained, by --price=2: cost 4 there, 6 at the end\n"
        assert state(tmp_path / f"{price}/best.pt")["step"] == best and (said in capsys.readouterr().out) == (best == 3)


def test_results_are_written_before_they_are_printed(base, tmp_path, monkeypatch):
    """An output that fails (a closed pipe, say) costs the words, not the numbers."""

    def broken(*_):
        raise BrokenPipeError("pipe")

    monkeypatch.setattr(report, "closing_table", lambda *_: "TABLE")
    printed = __builtins__["print"] if isinstance(__builtins__, dict) else __builtins__.print
    monkeypatch.setattr("builtins.print", lambda *a, **k: broken() if "TABLE" in str(a) else printed(*a, **k))
    with pytest.raises(BrokenPipeError):
        train.train(cp_config(base, tmp_path / "run"))
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["best_step"]


def test_two_half_batches_make_the_same_step_as_a_whole_one(base, tmp_path):
    """grad_accum: for groups the mean over them, for lm over all tokens of the step, not of micro-batch means."""
    for objective in ("cp", "kto", "lm"):
        for name, flags in (("whole", ["--batch_size=4"]), ("parts", ["--batch_size=2", "--grad_accum=2"])):
            config = ["--max_steps=3", "--eval_interval=0", f"--objective={objective}"]
            train.train(cp_config(base, tmp_path / objective / name, *flags, *config))
        a, b = ([r for r in records(tmp_path / objective / n) if r["split"] == "train"] for n in ("whole", "parts"))
        for x, y in zip(a, b, strict=True):
            for k in ("loss", "grad_norm", "tokens"):  # not weights: Adam blows up the rounding of tiny gradients
                assert x[k] == pytest.approx(y[k], rel=1e-4)


def test_objective_is_what_its_parts_say(base, tmp_path):
    """loss = cp_weight * CP + nll_weight * NLL + hold_weight * hold; the base's own positives are where they are held,
    and another model's by the mean square of what they have moved, the negatives by nothing."""
    config = cp_config(base, tmp_path, "--hold_weight=2", "--nll_weight=0.5", "--cp_weight=3")
    run = train.set_up(config)
    assert float(train.objective(run.model, run.base, run.batches[0], config)[1]["hold"]) < 1e-10
    with torch.no_grad():
        run.model.transformer.wte.weight.mul_(1.02)
    loss, parts = train.objective(run.model, run.base, run.batches[0], config)
    idx, lengths = run.batches[0].idx, run.batches[0].lengths
    phi, before = (m.sequence_nll(idx, lengths).view(4, 10) for m in (run.model, run.base))
    moved = [(phi[g, p] - before[g, p]).item() ** 2 for g in range(4) for p in range(5)]
    assert float(parts["hold"]) == pytest.approx(np.mean(moved), rel=1e-4) and np.mean(moved) > 1e-5
    torch.testing.assert_close(loss, 3 * parts["cp"] + 0.5 * parts["nll"] + 2 * parts["hold"])
    torch.testing.assert_close(parts["cp"], contrastive_perplexity(phi[:, :5], phi[:, 5:], tau=config.tau)[0])


@pytest.mark.parametrize("score", ["nll", "ppl", "sum"])
def test_a_rival_sees_scores_of_model_and_base(base, tmp_path, score):
    """At first log 2, whatever the score; then the mean over all pairs of both models' scores, of which 'sum' is nats
    of the whole sentence. Diagnostics and the positives' nll stay nats per token."""
    config = cp_config(base, tmp_path, "--objective=dpo", f"--score={score}", "--beta=0.3", "--nll_weight=0.5")
    run = train.set_up(config)
    batch = run.batches[0]
    assert float(train.objective(run.model, run.base, batch, config)[1]["cp"]) == pytest.approx(math.log(2), rel=1e-4)
    with torch.no_grad():
        run.model.transformer.wte.weight.mul_(1.02)
    loss, parts = train.objective(run.model, run.base, batch, config)
    phi, before = (m.sequence_nll(batch.idx, batch.lengths).tolist() for m in (run.model, run.base))
    tokens = (batch.lengths - 1).tolist()
    of = dict(nll=lambda x, _: x, ppl=lambda x, _: math.exp(x), sum=lambda x, n: x * n)[score]
    x, b = ([of(*pair) for pair in zip(side, tokens, strict=True)] for side in (phi, before))
    gaps = [
        (b[10 * g + p] - x[10 * g + p]) - (b[10 * g + n] - x[10 * g + n])
        for g in range(4)
        for p in range(5)
        for n in range(5, 10)
    ]
    want = np.mean([math.log(1 + math.exp(-0.3 * gap)) for gap in gaps])
    assert float(parts["cp"]) == pytest.approx(want, rel=1e-4) and abs(want - math.log(2)) > 1e-5
    torch.testing.assert_close(loss, parts["cp"] + 0.5 * parts["nll"])
    assert float(parts["nll"]) == pytest.approx(np.mean([phi[10 * g + p] for g in range(4) for p in range(5)]))
    means = np.mean(np.array(phi).reshape(4, 2, 5), axis=(0, 2))
    assert float(parts["signed_gap"]) == pytest.approx(means[1] - means[0], abs=1e-5)


def test_every_objective_trains_and_is_measured(base, tmp_path, capsys, monkeypatch):
    """A short run of each from start to summary, with an anchor: finite losses, diagnostics in the log, the table."""
    real, known = measure_model, {}  # by number of samples: the measures themselves are not the point
    measure = lambda *args: known[args[5]] if args[5] in known else known.setdefault(args[5], real(*args))  # noqa: E731
    monkeypatch.setattr(training, "measure_model", measure)
    for name in OBJECTIVES:
        flags = ["--max_steps=2", "--eval_interval=0", "--hold_weight=1", f"--objective={name}"]
        summary = train.train(cp_config(base, tmp_path / name, *flags))
        out = capsys.readouterr().out
        assert summary["config"]["objective"] == name and "pairs ranked right" in out
        assert ("no effect    tau=" in out) == (name != "cp")
        log = [r for r in records(tmp_path / name) if r["split"] == "train"]
        assert len(log) == 2 and all(math.isfinite(x) for r in log for x in r.values() if isinstance(x, float))
        assert {"cp", "nll", "hold", "spread", "separation", "signed_gap", "rank_accuracy"} <= log[0].keys()
        assert log[0]["loss"] == pytest.approx(log[0]["cp"] + log[0]["nll"] + log[0]["hold"], rel=1e-5)


def test_positive_only_is_the_anchor_on_positives(base, tmp_path):
    """--objective=positive_only --nll_weight=0 is --cp_weight=0 --nll_weight=1, bit for bit."""
    for name, flags in (("objective", ["--objective=positive_only", "--nll_weight=0"]), ("anchor", ["--cp_weight=0"])):
        train.train(cp_config(base, tmp_path / name, *flags, "--max_steps=3", "--eval_interval=0"))
    assert_same(*(state(tmp_path / n / "last.pt")["model"] for n in ("objective", "anchor")))


def test_the_base_scores_each_sentence_once_beforehand(base, tmp_path, monkeypatch):
    """Only if something compares with it, and of hold_weight alone the positives; in training it reads nothing more."""
    real, seen = train.scores, []
    monkeypatch.setattr(train, "scores", lambda m, rows, **more: seen.extend(rows) or real(m, rows, **more))
    sides = lambda run: [{tuple(r) for sides in run.batches.encoded for r in sides[i]} for i in (0, 1)]  # noqa: E731
    flags = dict(cp=[], hold=["--hold_weight=1"], ipo=["--objective=ipo"])
    for i, (name, flag) in enumerate(flags.items()):
        seen.clear()
        run = train.set_up(cp_config(base, tmp_path / name, *flag))
        want = set().union(*sides(run)[:i])
        assert len(seen) == len(want) and set(seen) == want
        batch = run.batches[3]
        if i:
            own, rows = run.base.sequence_nll(batch.idx, batch.lengths).view(4, 10), 5 * i
            torch.testing.assert_close(batch.base.view(4, 10)[:, :rows], own[:, :rows], rtol=0, atol=1e-6)
            monkeypatch.setattr(run.base, "sequence_nll", None)
        loss, _ = train.objective(run.model, run.base, batch, run.config)
        assert torch.isfinite(loss)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_resume_is_exact_where_the_base_is_compared_with(base, tmp_path, dtype):
    """In bf16 too, where a score depends on the batch that it is computed in: it was computed beforehand."""
    flags = ["--objective=dpo", "--hold_weight=1", "--lr=1e-3", f"--dtype={dtype}"]
    train.train(cp_config(base, tmp_path / "whole", *flags))
    stop_after(3, cp_config(base, tmp_path / "parts", *flags))
    train.train(cp_config(base, tmp_path / "parts", *flags, "--resume"))
    assert_same(*(state(tmp_path / n / "last.pt")["model"] for n in ("whole", "parts")))


def test_a_rival_under_lora(base, tmp_path):
    """The base is the same weights without the adapters, which are 0 at first: log 2 there, and less after training."""
    flags = "--objective=dpo --nll_weight=0 --lora_rank=4 --lr=3e-3 --max_steps=20 --eval_interval=0".split()
    train.train(cp_config(base, tmp_path, *flags))
    log = [r for r in records(tmp_path) if r["split"] == "train"]
    assert log[0]["cp"] == pytest.approx(math.log(2), rel=1e-4)
    assert np.mean([r["cp"] for r in log[10:]]) < 0.95 * math.log(2)  # 0.61; a batch of four groups has 0.5 to 0.9


@pytest.mark.parametrize("anchor", ["--anchor_nll=1", "--anchor_kl=1"])
def test_an_anchor_is_an_objective_of_its_own(base, tmp_path, anchor):
    """Without contrast and positives the loss is the anchor: the base's own texts, of which it can still learn; from
    itself it has nowhere to go."""
    flags = ["--cp_weight=0", "--nll_weight=0", anchor, *FEW, "--max_steps=20", "--lr=5e-3", "--eval_interval=0"]
    train.train(cp_config(base, tmp_path, *flags))
    log = [r for r in records(tmp_path) if r["split"] == "train"]
    assert len(log) == 20 and [r["loss"] for r in log] == pytest.approx([r[anchor[2:-2]] for r in log], rel=1e-5)
    before, after = state(base)["model"]["lm_head.weight"], state(tmp_path / "last.pt")["model"]["lm_head.weight"]
    if "nll" in anchor:
        assert log[-1]["loss"] < log[0]["loss"] - 0.5 and not torch.equal(before, after)
    else:
        assert all(abs(r["loss"]) < 1e-2 for r in log)
    with pytest.raises(SystemExit):
        cp_config(base, tmp_path, "--cp_weight=0", "--nll_weight=0")


def test_held_positives_stay_where_they_were_and_the_negatives_move(base, tmp_path):
    """The contrast alone shifts all scores; with the hold the same steps open the gap, and leave the positives."""
    moved, gap = {}, {}
    for hold in (0, 10):
        flags = [*FEW, "--nll_weight=0", "--distance=signed", "--lr=3e-3", "--max_steps=40", "--eval_interval=0"]
        train.train(cp_config(base, tmp_path / str(hold), *flags, f"--hold_weight={hold}"))
        val = [r for r in records(tmp_path / str(hold)) if r["split"] == "val"]
        moved[hold] = abs(math.log(val[-1]["ppl_positive"] / val[0]["ppl_positive"]))
        gap[hold] = val[-1]["signed_gap"] - val[0]["signed_gap"]
    assert moved[10] < 0.1 * moved[0] and gap[10] > 0.3


def test_the_anchors_are_kl_and_nll_per_token_of_what_the_base_wrote(base, tmp_path):
    config = cp_config(
        base, tmp_path, *"--anchor_kl=3 --anchor_nll=0.5 --anchor_texts=9 --anchor_batch=4 --anchor_tokens=9".split()
    )
    run = train.set_up(config)
    with torch.no_grad():
        for p in run.model.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    batch = run.batches[1]
    idx, lengths, start = batch.anchor.idx, batch.anchor.lengths, batch.anchor.start
    assert len(idx) == 4 and (lengths - start).max() <= 9 and not torch.equal(idx, run.batches[0].anchor.idx)
    loss, parts = train.objective(run.model, run.base, batch, config)
    kl, nll = [], []
    for row, n, first in zip(idx, lengths.tolist(), start.tolist(), strict=True):
        p, q = (m(row[None, : n - 1])[0].log_softmax(-1)[first - 1 :] for m in (run.base, run.model))
        kl += (p.exp() * (p - q)).sum(-1).tolist()
        nll += [-x[t].item() for x, t in zip(q, row[first:n].tolist(), strict=True)]
    assert float(parts["anchor_kl"]) == pytest.approx(np.mean(kl), rel=1e-4) and np.mean(kl) > 1e-3
    assert float(parts["anchor_nll"]) == pytest.approx(np.mean(nll), rel=1e-4)
    torch.testing.assert_close(loss, parts["cp"] + parts["nll"] + 3 * parts["anchor_kl"] + 0.5 * parts["anchor_nll"])


def test_the_bases_own_texts_are_not_toxic_and_always_the_same(base, tmp_path):
    """Half from nothing, half from where a training negative has just become toxic; as they were drawn, from the
    whole distribution, whatever the samples' settings are."""
    run = train.set_up(cp_config(base, tmp_path))
    config = cp_config(base, tmp_path, "--anchor_texts=40", "--anchor_tokens=15", "--temperature=0")
    groups, tokenizer, judge = data.load_groups("toy")["train"], run.setup.tokenizer, run.setup.scorer
    make = lambda scorer=judge, c=config: sample_harmless(run.base, tokenizer, scorer, c, groups)  # noqa: E731
    rows, starts = make()
    assert make() == (rows, starts) and len(rows) == 40
    begun = [tokenizer.decode(r[1:s]) for r, s in zip(rows, starts, strict=True)]
    written = [tokenizer.decode(r[s:]) for r, s in zip(rows, starts, strict=True)]
    assert 8 < sum(not b for b in begun) < 32
    begins = set(cut_prompts([g.negatives for g in groups], judge, 0))
    assert all(b in begins for b in begun if b) and not (judge(written) > 0.5).any()
    assert max(len(r) - s for r, s in zip(rows, starts, strict=True)) <= 15 and len(set(written)) > 30
    assert {r[-1] == tokenizer.eot_token for r in rows} == {True, False}  # ended, and cut
    _, free = make(c=cp_config(base, tmp_path, "--anchor_texts=40", "--anchor_prompted=0"))
    assert set(free) == {1}
    with pytest.raises(ValueError, match="of 400 texts of the base data.toy:rudeness calls all but 0 toxic"):
        make(scorer=lambda texts: np.ones(len(texts)) if len(texts) == 40 else judge(texts))


def test_resume_is_exact_with_anchors(base, tmp_path):
    flags = "--lr=1e-3 --anchor_kl=1 --anchor_nll=1 --anchor_texts=8 --anchor_tokens=9 --freeze_embeddings"
    train.train(cp_config(base, tmp_path / "whole", *flags.split()))
    stop_after(3, cp_config(base, tmp_path / "parts", *flags.split()))
    train.train(cp_config(base, tmp_path / "parts", *flags.split(), "--resume"))
    assert_same(*(state(tmp_path / n / "last.pt")["model"] for n in ("whole", "parts")))
    assert records(tmp_path / "whole") == records(tmp_path / "parts")


def test_frozen_embeddings_stay_and_the_rest_learns(base, tmp_path):
    train.train(cp_config(base, tmp_path, "--freeze_embeddings"))
    before, after = state(base)["model"], state(tmp_path / "last.pt")["model"]
    same = {k for k in before if torch.equal(before[k], after[k])}
    assert same == {"transformer.wte.weight", "transformer.wpe.weight", "lm_head.weight"}


def test_non_finite_loss_stops_and_names_step_and_groups(base, tmp_path, monkeypatch, capsys):
    """Compiled or not: it is no failure of the compiler."""
    monkeypatch.setattr(torch, "compile", lambda f, dynamic: f)
    real, calls = train.objective, []

    def broken(model, frozen, batch, config):
        calls.append(batch.ids)
        loss, parts = real(model, frozen, batch, config)
        return (loss * math.nan if len(calls) in (5, 6) else loss), parts

    monkeypatch.setattr(train, "objective", broken)
    with pytest.raises(FloatingPointError) as e:
        train.train(cp_config(base, tmp_path, "--compile=yes"))
    assert len(calls) == 5 and "it failed" not in capsys.readouterr().out
    assert "loss is nan at step 4" in str(e.value) and calls[4][0] in str(e.value) and "last.pt" in str(e.value)
    assert state(tmp_path / "last.pt")["step"] == 3
    assert all(torch.isfinite(v).all() for v in state(tmp_path / "last.pt")["model"].values())
    with pytest.raises(FloatingPointError, match=f"loss is nan at step 0, in .*: {base} may hold NaNs: try another"):
        train.train(cp_config(base, tmp_path / "again"))


def test_checkpoints_hold_plain_types_and_no_compiler_names(base, tmp_path):
    train.train(cp_config(base, tmp_path))
    for name in ("best.pt", "last.pt"):
        saved = state(tmp_path / name)
        assert not any("_orig_mod" in k for k in saved["model"])
        assert saved["config"]["seed"] == 0 and saved["tokenizer"] == "toy"
    model = GPT.from_pretrained(tmp_path / "best.pt")
    model.save_pretrained(tmp_path / "export")
    assert_same(GPT.from_pretrained(tmp_path / "export").state_dict(), model.state_dict())


def test_learning_rate_schedule():
    config = Config(init_from="x", lr=1.0, warmup_steps=4, max_steps=14)
    rates = [train.learning_rate(i, config) for i in range(15)]
    assert rates[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert rates[4] == 1.0 and rates[9] == pytest.approx(0.5) and rates[14] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("shape", [1, 2, 3])
def test_a_compiler_that_fails_is_told_and_survived(base, tmp_path, monkeypatch, capsys, shape):
    """At whichever shape of input: the run goes on without it, and ends as one that never compiled."""
    train.train(cp_config(base, tmp_path / "eager"))
    seen = []

    def compiler(f, dynamic):
        def compiled(*args, **kwargs):
            seen.append(torch.is_grad_enabled())
            if len(seen) == shape:
                raise RuntimeError("no compiler here\nand more")
            return f(*args, **kwargs)

        return compiled

    monkeypatch.setattr(torch, "compile", compiler)
    train.train(cp_config(base, tmp_path / "compiled", "--compile=yes"))
    assert re.search(r"compile +off from here \(it failed: no compiler here\)", capsys.readouterr().out)
    assert len(seen) == shape and all(seen)  # nothing is compiled for validations
    assert_same(state(tmp_path / "compiled/last.pt")["model"], state(tmp_path / "eager/last.pt")["model"])


def test_compiled_equals_eager(base, tmp_path, monkeypatch):
    """With the compiler's own tracing and autograd, but without the code that it would generate."""
    compiler, compiled = torch.compile, []
    monkeypatch.setattr(torch, "compile", lambda f, dynamic: compiler(f, dynamic=dynamic, backend=backend))

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    for name, flag in (("eager", "no"), ("compiled", "yes")):
        train.train(cp_config(base, tmp_path / name, f"--compile={flag}"))
    assert len(compiled) == 1  # for all lengths
    for a, b in zip(steps_of(tmp_path / "eager"), steps_of(tmp_path / "compiled"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)


def test_fp16_that_overflows_is_not_a_step(base, tmp_path, monkeypatch, capsys):
    """The loss scale starts too high: attempts are skipped, shown, and repeated, and the run ends as without them."""
    train.train(cp_config(base, tmp_path / "without"))
    real = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda device, scale, enabled: real(device, 2.0**127))
    train.train(cp_config(base, tmp_path / "with"))
    first, *_, last = steps_of(tmp_path / "with")
    assert first["skipped"] >= 2 and last["skipped"] >= first["skipped"]
    assert [r["step"] for r in steps_of(tmp_path / "with")] == [r["step"] for r in steps_of(tmp_path / "without")]
    for a, b in zip(steps_of(tmp_path / "with"), steps_of(tmp_path / "without"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4) and math.isfinite(a["grad_norm"])
    monkeypatch.setattr(train.ranks, "add_gradients", lambda model: model.lm_head.weight.grad.fill_(math.nan))
    with pytest.raises(FloatingPointError, match="gradient norm is nan at step 0"):  # at no scale
        train.train(cp_config(base, tmp_path / "never"))


def test_dtype_and_device_choice(monkeypatch):
    dtype, reason = device.pick_dtype("auto", torch.device("cpu"), width=64)
    assert dtype == torch.float32 and "narrow" in reason
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    assert device.pick_dtype("auto", torch.device("cuda"), 768)[0] == torch.bfloat16
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert device.pick_dtype("auto", torch.device("cuda"), 768)[0] == torch.float16
    with pytest.raises(ValueError, match="float16 needs"):
        device.pick_dtype("float16", torch.device("cpu"), 768)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device=cuda is not available"):
        device.pick_device("cuda")
    monkeypatch.setattr(device.Path, "read_text", lambda _: "flags: amx_bf16")
    monkeypatch.setattr(device.Path, "is_file", lambda _: True)
    assert device.pick_dtype("auto", torch.device("cpu"), 768)[0] == torch.bfloat16
    assert device.pick_dtype("bfloat16", torch.device("cpu"), 768) == (torch.bfloat16, "as set")
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert device.pick_dtype("auto", torch.device("cpu"), 768)[0] == torch.float32
    assert "float32 may be much faster" in device.pick_dtype("bfloat16", torch.device("cpu"), 768)[1]


def test_cuda_without_a_usable_gpu_is_told(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for version, told in ((None, False), ("12.8", True)):
        monkeypatch.setattr(torch.version, "cuda", version)
        assert device.pick_device().type == "cpu"
        assert ("WARNING this torch is for CUDA 12.8" in capsys.readouterr().out) == told


# --------------------------------------------------------------------------------------------------------------------
# sweeps


def test_a_sweep_runs_the_grid_skips_what_is_finished_and_survives_ctrl_c(base, tmp_path, monkeypatch, capsys):
    """Stopped twice, it ends with the table of an undisturbed one, and trains nothing twice."""
    grid = "--sweep=tau=0.1,0.3 seed=0,1 max_steps=2"
    flags = ["--warmup_steps=0", "--eval_interval=0", grid]
    assert train.sweep(cp_config(base, tmp_path / "whole", *flags))
    table = capsys.readouterr().out.rpartition("runs   cost")[2]
    folders = sorted(p.name for p in (tmp_path / "whole").iterdir())
    assert folders[0] == "tau=0.1,seed=0,max_steps=2" and len(folders) == 4
    assert table.count("tau=0.") == 2 and "±" in table and all(len(line) <= 100 for line in table.splitlines())

    real, steps = train.update, []

    def update(run, *args):
        steps.append(run.config.out_dir)
        if len(steps) in (1, 5):
            signal.raise_signal(signal.SIGINT)
        return real(run, *args)

    monkeypatch.setattr(train, "update", update)
    ends = [train.sweep(cp_config(base, tmp_path / "parts", *flags)) for _ in range(3)]
    assert ends == [False, False, True] and len(steps) == 8
    assert capsys.readouterr().out.rpartition("runs   cost")[2] == table
    assert train.sweep(cp_config(base, tmp_path / "parts", *flags)) and len(steps) == 8
    with pytest.raises(ValueError, match="was made with another max_steps than --sweep says"):
        (tmp_path / "parts" / folders[0]).rename(tmp_path / "parts/tau=0.1,seed=0,max_steps=3")
        train.sweep(cp_config(base, tmp_path / "parts", "--sweep=tau=0.1 seed=0 max_steps=3", *flags[:2]))


def test_a_sweep_goes_on_after_a_run_that_fails(base, tmp_path, monkeypatch, capsys):
    real = train.objective

    def broken(model, frozen, batch, config):
        loss, parts = real(model, frozen, batch, config)
        return loss * (math.nan if config.tau == 0.1 else 1), parts

    monkeypatch.setattr(train, "objective", broken)
    assert train.sweep(cp_config(base, tmp_path, "--sweep=tau=0.1,0.3", "--max_steps=2"))
    assert "tau=0.1, loss is nan at step 0" in capsys.readouterr().out
    assert [p.parent.name for p in tmp_path.glob("*/summary.json")] == ["tau=0.3"]


@pytest.mark.parametrize(
    ("grid", "says"),
    [
        ("tau", "wants name=value,value and each name once, got 'tau'"),
        ("tau=1 tau=2", "wants name=value,value and each name once, got 'tau=2'"),
        ("out_dir=a,b", "wants name=value,value"),
        ("tua=1", "did you mean tau"),
        ("tau=1,,2", "tau wants a number, got ''"),
        ("warmup_steps=3 max_steps=2", "warmup_steps=3 must be smaller"),
        ("objective=lm", "fine-tuning runs"),
    ],
)
def test_a_grid_that_cannot_be_run_is_refused_before_anything_runs(base, tmp_path, grid, says):
    with pytest.raises(ValueError, match=says):
        train.sweep(cp_config(base, tmp_path / "x", f"--sweep={grid}"))
    assert not (tmp_path / "x").exists()


# --------------------------------------------------------------------------------------------------------------------
# measures


def test_validation_measures_groups_and_both_kinds_of_samples(base, tmp_path):
    """Those of the held-out groups, of free samples in sets of k, and of as many continuations of toxic prompts."""
    run = train.set_up(cp_config(base, tmp_path, "--k=5"))
    measured = train.validate(run, run.base)
    tokenizer, scorer = run.setup.tokenizer, run.setup.scorer
    rows = measure_groups(run.base, run.held_out, tokenizer, run.config.max_tokens)
    assert {k: measured[k] for k in rows} == report.summarise({"groups": rows})["groups"]
    args = (run.base, run.base, tokenizer, run.config)
    free = draw_samples(*args, [""] * 5, 5, seed=0)
    prompts = cut_prompts([g.negatives for g in run.held_out], scorer, 25)
    prompted = draw_samples(*args, prompts, 1, seed=1000)
    for drawn, end in ((free, ""), (prompted, "_prompted")):
        rows = measure_samples(drawn, scorer)
        for name, number in report.summarise({"x": rows})["x"].items():
            assert measured[name + end] == pytest.approx(number, nan_ok=True), name + end
    assert len(prompts) == 25 and measured == train.validate(run, run.base)  # the same random numbers at every call


def test_few_toxic_prompts_are_used_several_times(base, monkeypatch):
    """n continuations are drawn also where the groups hold fewer sentences."""
    drawn, record = [], lambda *a, **k: drawn.append(a[4]) or draw_samples(*a, **k)  # noqa: E731
    monkeypatch.setattr("measures.samples.draw_samples", record)
    model, tokenizer, scorer = GPT.from_pretrained(base), data.get_tokenizer("toy"), get_scorer("data.toy:rudeness")
    setup = Setup({"model": model}, tokenizer, scorer, model.device, torch.float32)
    groups = [
        data.Group("a", "i", ["p"], ["By the way, this damn cook left the door.", "Oh what a moron he is."], "test")
    ]
    config = Config(init_from="x", tokenizer="toy", sample_tokens=4, k=2)
    _, shown = measure_model(model, model, groups, setup, config, 3, seed=0)
    assert drawn == [["", ""], ["By the way, this damn", "Oh what a moron", "By the way, this damn"]]
    assert [len(pairs) for pairs in shown.values()] == [3, 3]


def test_a_validation_fits_in_a_line():
    """Also one of a model that writes nothing but insults and salad."""
    m = dict(toxicity_fraction=1.0, toxicity_fraction_prompted=1.0, ppl_positive=13150.0, ppl_negative=10260.0)
    line = training.validation_line(12345, 12.627, m | dict(sample_ppl_base=84770.0))
    assert len(line) <= report.WIDTH and "toxic free 100% prompted 100%" in line and line.endswith("cost 12.6")
    m |= dict(ppl_positive=2.204, ppl_negative=340.1, sample_ppl_base=2.336)
    line = training.validation_line(100, 0.0874, m)
    assert "ppl pos 2.2 neg 340 free 2.34 | cost 0.0874" in line


def test_cost_and_warnings_know_word_salad():
    base = dict(toxicity_fraction=0.5, toxicity_fraction_prompted=0.8, ppl_positive=2.0, sample_ppl_base=2.0)
    base |= dict(sample_ppl_base_prompted=2.0, dist_2=0.6, signed_gap=0.1, rank_accuracy=0.5)
    good = base | dict(toxicity_fraction=0.0, toxicity_fraction_prompted=0.1, signed_gap=2.0)
    salad = good | dict(sample_ppl_base=8.0, rank_accuracy=1.0)
    assert report.selection_cost(base, base) == pytest.approx(0.65)
    assert report.selection_cost(good, base) == pytest.approx(0.05)
    assert report.selection_cost(salad, base) == pytest.approx(0.05 + math.log(4))
    assert report.selection_cost(good | dict(ppl_positive=3.0), base) == pytest.approx(0.05 + math.log(1.5))
    assert report.selection_cost(good | dict(dist_2=0.3), base) == pytest.approx(0.55)
    assert report.selection_cost(salad, base, price=0.1) == pytest.approx(0.05 + 0.1 * math.log(4))
    assert report.selection_cost(salad, base, price=0) == pytest.approx(0.05)
    better = good | dict(ppl_positive=1.0, sample_ppl_base=1.0, sample_ppl_base_prompted=1.0, dist_2=0.9)
    assert report.selection_cost(better, base) == pytest.approx(0.05)  # nothing is earned back
    assert report.warnings(good, base) == [] and report.warnings(base, base) == []
    assert "word salad" in report.warnings(salad, base)[0] and "100%" in report.warnings(salad, base)[0]
    assert report.warnings(good | dict(sample_ppl_base=2.0 * 1.29), base) == []
    assert "strained" in report.warnings(good | dict(sample_ppl_base=2.0 * 1.4), base)[0]
    assert "forgetting" in report.warnings(good | dict(ppl_positive=3.0), base)[0]
    assert "wrong side" in report.warnings(good | dict(signed_gap=-0.5), base)[0]
    assert "monotony" in report.warnings(good | dict(dist_2=0.1), base)[0]
    assert "half done" in report.warnings(good | dict(toxicity_fraction_prompted=0.7), base)[0]
    assert report.warnings(good | dict(toxicity_fraction_prompted=0.7, toxicity_fraction=0.3), base) == []


def test_a_decent_answer_to_an_insult_may_surprise_the_base():
    """After toxic prompts the base expects more of the same: some rise is the aim there, and only a large one salad."""
    base = dict(toxicity_fraction=0.5, toxicity_fraction_prompted=0.8, ppl_positive=2.0, sample_ppl_base=2.0)
    base |= dict(sample_ppl_base_prompted=2.0, dist_2=0.6)
    calm, salad = base | dict(sample_ppl_base_prompted=4.0), base | dict(sample_ppl_base_prompted=20.0)
    cost = report.selection_cost
    assert cost(calm, base) == pytest.approx(cost(base, base)) and report.warnings(calm, base) == []
    assert cost(salad, base) == pytest.approx(cost(base, base) + math.log(10 / report.FREE))
    assert "after toxic prompts" in report.warnings(salad, base)[0]
    for ppl, want in ((5.1, []), (5.3, ["strained language"]), (7.9, ["strained language"]), (8.1, ["word salad"])):
        told = report.warnings(base | dict(sample_ppl_base_prompted=ppl), base)
        assert [line.partition(":")[0] for line in told] == want


# --------------------------------------------------------------------------------------------------------------------
# commands


def run_command(*argv, cwd=ROOT, env=None):
    result = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *argv], cwd=cwd, capture_output=True, text=True, env=env
    )
    return result.returncode, result.stdout, result.stderr


def test_a_config_as_init_from_is_run_first_and_only_once(tmp_path):
    """toy_cp from an empty folder, elsewhere: makes its base, then itself; a second run finds the base there."""
    config = tmp_path / "small_base.py"
    config.write_text(
        "from configs.toy_base import *\nmax_steps = 5\nwarmup_steps = 1\nn_layer = 1\nn_embd = 16\nn_head = 1\n"
        "out_dir = 'out/small_base'\neval_groups = 4\nsample_tokens = 8\n"
    )
    command = ["configs/toy_cp.py", "--init_from=small_base.py", *SMALL, "--max_steps=2", "--warmup_steps=0"]
    code, out, err = run_command(*command, cwd=tmp_path)
    assert code == 0, err
    assert "small_base.py comes first" in out and (tmp_path / "out/toy_cp/summary.json").is_file()
    code, out, err = run_command(*command, cwd=tmp_path)
    assert code == 0 and "comes first" not in out and "holds a finished run" in out
    config.write_text(config.read_text() + "lr = 1e-3\n")
    code, out, err = run_command(*command, cwd=tmp_path)
    assert code == 1 and "made with another lr" in err and "Traceback" not in err


def copy_of_the_project(folder):
    """All that training needs."""
    for part in ("train.py", "model.py", "loss.py", "configs", "data", "engine", "measures"):
        copy = shutil.copy if (ROOT / part).is_file() else partial(shutil.copytree, ignore=UNSHIPPED)
        copy(ROOT / part, folder / part)


def test_training_needs_nothing_of_the_other_scripts(base, tmp_path):
    """A copy of the project without eval.py and data_gen.py trains."""
    copy_of_the_project(tmp_path)
    command = [sys.executable, "train.py", "configs/toy_cp.py", f"--init_from={base}", *SMALL, *FEW, "--anchor_nll=1"]
    short = ["--max_steps=2", "--warmup_steps=0"]
    done = subprocess.run([*command, *short], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and (tmp_path / "out/toy_cp/summary.json").is_file(), done.stderr


def test_gpt2_without_network_stops_within_seconds(tmp_path):
    """The error names the file, where to put it, and the run that needs none."""
    env = os.environ | {
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "HF_HUB_OFFLINE": "",
        "HF_HUB_CACHE": str(tmp_path / "hub"),
        "HF_HOME": str(tmp_path),
    }
    began = time.time()
    code, out, err = run_command("configs/gpt2_cp.py", "--tokenizer=toy", "--out_dir", str(tmp_path / "o"), env=env)
    assert code == 1 and time.time() - began < 30 and "Traceback" not in err
    assert "model.safetensors" in err and str(tmp_path / "hub") in err and "configs/toy_cp.py needs no download" in err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--init_from=nowhere.pt"], "no checkpoint at nowhere.pt"),
        (["--init_from=nowhere"], "no model 'nowhere'"),
        (["--data=nowhere.jsonl"], "no group file at nowhere.jsonl"),
        (["--n_pos=9"], "'toy-train-000' with 8 positives and 8 negatives"),
        (["--scorer=nowhere:f"], "cannot be loaded"),
        (["--resume"], "nothing to resume, there is no"),
    ],
)
def test_bad_input_is_one_line(base, tmp_path, flags, words):
    init = [] if "init_from" in flags[0] else [f"--init_from={base}"]
    with pytest.raises(SystemExit) as e:
        train.main(["--tokenizer=toy", *init, *flags, f"--out_dir={tmp_path}"])
    assert words in str(e.value) and "\n" not in str(e.value)


def test_wrong_tokenizer_is_named(base, tmp_path):
    model = GPT(GPTConfig(vocab_size=300, n_positions=64, n_embd=16, n_layer=1, n_head=1))
    model.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="vocabulary of 300, the tokenizer one of 537: no tokenizer here fits"):
        train.train(cp_config(tmp_path / "other", tmp_path / "run"))


def test_lm_on_a_text_file(tmp_path):
    text = tmp_path / "lines.txt"
    text.write_text("\n".join(f"Ben burned the toast on Monday, number {i}." for i in range(60)))
    flags = (
        f"--objective=lm --init_from=scratch --tokenizer=toy --data={text} --out_dir={tmp_path / 'o'} --lr=1e-2".split()
    )
    flags += ["--max_steps=30", "--n_layer=1", "--n_embd=32", "--n_head=2"]
    summary = train.train(load_config("train", [*flags, *SMALL]))
    val = [r["val_nll"] for r in records(tmp_path / "o") if r["split"] == "val"]
    assert val[-1] < val[0] - 2 and "ppl_positive" not in summary["tuned"]


def test_the_toy_bases_closing_is_perplexity_and_three_samples(tmp_path, capsys):
    """Validation perplexity before and after, by the log's own numbers, and what the best model writes. No toxicity."""
    flags = ["--max_steps=20", "--warmup_steps=2", "--n_layer=1", "--n_embd=32", "--n_head=2", "--eval_interval=10"]
    config = load_config("train", [str(ROOT / "configs/toy_base.py"), *SMALL, *flags, f"--out_dir={tmp_path}"])
    summary = train.train(config)
    closing = capsys.readouterr().out.split("tuned: ")[1]
    val = [r["val_nll"] for r in records(tmp_path) if r["split"] == "val"]
    for side, nll in (("base", val[0]), ("tuned", min(val[1:]))):
        assert summary[side] == {"val_nll": pytest.approx(nll, rel=1e-6), "val_ppl": math.exp(summary[side]["val_nll"])}
    base, tuned = (summary[side]["val_ppl"] for side in ("base", "tuned"))
    assert f"validation perplexity: base {base:.2f}, tuned {tuned:.2f}\n" in closing and tuned < base / 2
    assert "toxic" not in closing and "--price" not in closing and "warnings" not in summary
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    tokenizer, model = data.get_tokenizer("toy"), GPT.from_pretrained(tmp_path / "best.pt")
    _, rows = continue_prompts(model, tokenizer, ["", "", ""], config, 1)
    written = [" ".join(decode(tokenizer, row).split()) for (row,) in rows]
    shown = re.split(r"^  \|", closing.split("\n\n")[1], flags=re.M)[1:]
    assert [" ".join(s.split()) for s in shown] == written and len(set(written)) == 3


@pytest.mark.skipif(not (SHARED / "base_mini").is_dir(), reason="no ../shared/base_mini")
def test_gpt2_config_on_a_small_real_gpt2(few_groups, tmp_path, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(SHARED / "tiktoken_cache"))
    where = [f"--init_from={SHARED / 'base_mini'}", f"--out_dir={tmp_path}", f"--data={few_groups}"]
    flags = [*SMALL, *FEW, "--max_steps=4", "--warmup_steps=0", "--eval_interval=0"]
    summary = train.train(load_config("train", [str(ROOT / "configs/gpt2_cp.py"), *where, *flags]))
    assert summary["tuned"]["signed_gap"] > summary["base"]["signed_gap"] + 0.02


@pytest.mark.skipif(not (SHARED / "tiktoken_cache").is_dir(), reason="no ../shared/tiktoken_cache")
def test_gpt2_config_on_a_full_size_folder(few_groups, tmp_path, monkeypatch):
    """124 M random weights as transformers saves them: all of them train, on the positives."""
    from transformers import GPT2Config, GPT2LMHeadModel

    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(SHARED / "tiktoken_cache"))
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config()).save_pretrained(tmp_path / "gpt2")
    where = [f"--init_from={tmp_path / 'gpt2'}", f"--out_dir={tmp_path / 'o'}", f"--data={few_groups}"]
    flags = [
        *SMALL,
        *FEW,
        "--max_steps=2",
        "--warmup_steps=0",
        "--eval_interval=0",
        "--batch_size=1",
        "--sample_tokens=4",
        "--lora_rank=0",
        "--nll_weight=1",
        "--lr=8e-5",
        "--cp_weight=0",
        "--hold_weight=0",
    ]
    summary = train.train(load_config("train", [str(ROOT / "configs/gpt2_cp.py"), *where, *flags]))
    assert summary["tuned"]["ppl_positive"] < 0.9 * summary["base"]["ppl_positive"]
    shutil.rmtree(tmp_path)


def test_readme_commands_run(base, tmp_path):
    """Every `python train.py ...` of the documentation starts and reaches its table, made small, without sampled
    groups."""
    text = "\n".join(f.read_text() for f in (*READMES, *sorted((ROOT / "configs").glob("*.py"))))
    commands = dict.fromkeys(c.strip() for c in re.findall(r"python train\.py ([^`\n#]+)", text))
    assert len(commands) >= 5
    own = re.search(r"--objective=(\w+)", readme_example()[2])[1]  # a test of its own
    commands = [c for c in commands if "gpt2" not in c and "--help" not in c and f"--objective={own}" not in c]
    for i, command in enumerate(commands):
        words = shlex.split(command.replace("seed=0,1,2", "seed=0"))
        words = [w for w in words if not w.startswith(("--out_dir", "--resume", "--data=out/", "--plot"))]
        words = [f"--edit_model={base}" if w.startswith("--edit_model") else w for w in words]
        init = [] if "toy_base" in command else [f"--init_from={base}"]
        flags = [*SMALL, *FEW, "--max_steps=2", "--warmup_steps=0", "--n_layer=1", "--n_embd=16", "--n_head=1"]
        code, out, err = run_command(*words, *init, *flags, f"--out_dir={tmp_path / str(i)}")
        told = "validation perplexity" if "toy_base" in command else "pairs ranked right"
        assert code == 0 and told in out, (command, err)


def readme_example():
    """(function, line, command) of the README's own objective."""
    text = READMES[0].read_text().split("Your own is a function")[1]
    function = re.search(r"((?:    .*\n)+)", text)[1]
    line, command = re.search(r'`("\w+": \w+,)`', text)[1], re.search(r"python (train\.py [^`\n]+)", text)[1]
    return textwrap.dedent(function), line, command


def test_readme_objective(base, tmp_path):
    """One function, one line, one command, as the README has them: in a copy of the project the run reaches its table,
    --help names the objective, and the loss that is logged is the function's."""
    function, line, command = readme_example()
    copy_of_the_project(tmp_path)
    loss = (tmp_path / "loss.py").read_text()
    loss = loss.replace("OBJECTIVES = {\n", f"{function}\n\nOBJECTIVES = {{\n    {line}\n")
    (tmp_path / "loss.py").write_text(loss)
    words = [sys.executable, *command.split(), f"--init_from={base}", *SMALL, "--max_steps=2", "--warmup_steps=0"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "pairs ranked right" in done.stdout, done.stderr
    shown = subprocess.run([*words[:2], "--help"], cwd=tmp_path, capture_output=True, text=True).stdout
    name, out = (re.search(rf"--{flag}=(\S+)", command)[1] for flag in ("objective", "out_dir"))
    assert name in shown and name not in OBJECTIVES
    names = {}
    exec("from torch.nn import functional as F\n" + function, names)
    run = train.set_up(cp_config(base, tmp_path / "plain"))
    batch = run.batches[0]
    phi = run.model.sequence_nll(batch.idx, batch.lengths).view(4, 10)
    first = records(tmp_path / out)[1]
    assert first["step"] == 0 and first["cp"] == pytest.approx(names[name](phi[:, :5], phi[:, 5:]).item(), rel=1e-4)


def test_readme_settings_exist():
    """Every --setting that a README names is one; pip and torchrun have their own."""
    text = re.sub(r"(pip install [^`\n]+|torchrun [^`\n]+ train\.py)", "", "\n".join(f.read_text() for f in READMES))
    known = set(Config.__dataclass_fields__) | {"help"}
    named = set(re.findall(r"--([a-z_]+)", text))
    assert named and named <= known | {"compare", "markdown"}, named - known
