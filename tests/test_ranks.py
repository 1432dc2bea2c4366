"""Several processes on one run: the numbers of one process, one voice, and one end."""

import json
import math
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import faults
import pytest
import torch
import torch.distributed as dist

import data
import train
from engine.device import pick_device

ROOT = Path(__file__).resolve().parents[1]
STEPS = "--batch_size=1 --grad_accum=4 --lr=1e-3 --max_steps=10"  # of four passes: two processes round otherwise
ANCHORS = "--anchor_nll=0.5 --anchor_texts=4 --anchor_batch=1 --anchor_tokens=8 --hold_weight=0.1"

if sys.argv[0] == "-c":  # this is the process that others are forked off: what takes them long, once
    data.get_tokenizer("toy")


def child(rank, port, folder, words, act):
    """A process as torchrun starts it. What it says goes into a file; act: (what happens, in which process, at which
    step)."""
    os.environ |= dict(RANK=f"{rank}", WORLD_SIZE="2", LOCAL_RANK=f"{rank}", LOCAL_WORLD_SIZE="2")
    os.environ |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=f"{port}", TORCHELASTIC_USE_AGENT_STORE="True")
    os.chdir(folder)
    said = os.open(f"said{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(said, 1), os.dup2(said, 2)
    sys.stdout, sys.stderr = open(1, "w"), open(2, "w")
    torch.set_num_threads(1)
    happens, where, when = act
    real = train.backward

    def backward(run, batches):
        if run.step == when and rank == where:
            if happens == "error":
                raise ValueError("this is the error")
            if happens == "nan":
                run.model.transformer.ln_f.weight.data.fill_(math.nan)
            else:
                os.kill(os.getpid(), happens)
        return real(run, batches)

    train.backward = backward
    code = faults.in_child("train.py", words)
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(code)


@pytest.fixture(scope="module")
def processes():
    """processes(folder, line, act) -> (exit codes, what each of two said, without progress bars and gloo's own lines)
    when both have ended. They are forked off a process that has imported what takes long, and has no threads."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_ranks", "torch._dynamo"])

    def run(folder, line, act=("", 0, -1)):
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # torchrun's
        them = [context.Process(target=child, args=(r, store.port, str(folder), line.split(), act)) for r in (0, 1)]
        for p in them:
            p.start()
        for p in them:
            p.join(90)
        codes = [p.exitcode for p in them]  # None of one that still runs
        for p in them:
            p.kill()
        said = [(Path(folder) / f"said{r}").read_text().replace("\r", "\n").split("\n") for r in (0, 1)]
        return codes, [[s for s in lines if s.strip() and "%|" not in s and "[Gloo]" not in s] for lines in said]

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
        yield run


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = faults.make_world(tmp_path_factory.mktemp("ranks") / "world")
    (folder / "base.py").write_text(faults.BASE)
    return folder


def call(world, line):
    with faults.chdir(world):
        code, said = faults.call(line)
    assert code == 0, said


def training(out):
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if k != "split"} for r in rows if r["split"] == "train"]


def assert_same_training(a, b):
    """Every number of every step within 1e-5, and the same of them."""
    a, b = training(a), training(b)
    assert [r["step"] for r in a] == [r["step"] for r in b] == list(range(len(a))) != []
    for mine, theirs in zip(a, b, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5, abs=1e-5)


# --------------------------------------------------------------------------------------------------------------------
# the numbers of one process


def test_two_are_one_interrupted_and_resumed(processes, world):
    """Ctrl-C in one process stops both behind the same step; one or two go on as if nothing had happened. With anchors,
    and a base that is made on the way, once. The first process alone speaks and writes."""
    line = f"toy.py --init_from=base.py {STEPS} {ANCHORS} --out_dir="
    codes, said = processes(world, line + "by_two", (signal.SIGINT, 1, 7))
    assert codes == [130, 130] and said[1] == [] and "stopped before step 8;" in said[0][-1], said
    assert sum("comes first" in s for s in said[0]) == 1 and len(training(world / "out/base")) == 6
    assert torch.load(world / "by_two/last.pt", weights_only=True)["step"] == 8
    shutil.copytree(world / "by_two", world / "by_one")
    codes, said = processes(world, line + "by_two --resume")
    assert codes == [0, 0] and said[1] == [] and sum(s.startswith("resume ") for s in said[0]) == 1, said
    call(world, f"train.py {line}by_one --resume")
    call(world, f"train.py {line}whole")
    for name in ("by_one", "by_two"):
        assert_same_training(world / "whole", world / name)
    files = {p.name for p in (world / "by_two").iterdir()} - {".lock"}
    assert files == {*train.WRITTEN} and len(training(world / "by_two")) == 10


def test_two_are_one_by_tokens(processes, world):
    """Documents weigh by their tokens: those of all processes."""
    line = f"base.py {STEPS} --out_dir="
    call(world, f"train.py {line}lm1")
    assert processes(world, line + "lm2")[0] == [0, 0]
    assert_same_training(world / "lm1", world / "lm2")


# --------------------------------------------------------------------------------------------------------------------
# one end


@pytest.mark.parametrize(
    ("flags", "act", "code", "says"),
    [
        ("", ("error", 1, 2), 1, "train.py: this is the error"),
        ("", ("nan", 1, 2), 1, "train.py: loss is nan at step 2, in "),
        ("", (signal.SIGKILL, 1, 2), -signal.SIGKILL, "train.py: lost touch with another process"),
        ("--tua=1", ("", 0, -1), 2, "did you mean tau"),
        ("--grad_accum=3", ("", 0, -1), 1, "--grad_accum=3 must be a multiple of 2"),
    ],
    ids="error nan killed flag shares".split(),
)
def test_a_failure_ends_all_and_is_told_once(processes, world, tmp_path, flags, act, code, says):
    codes, said = processes(world, f"toy.py {STEPS} --out_dir={tmp_path} {flags}", act)
    assert code in codes and set(codes) <= {code, 1}, (codes, said)
    told = [s for lines in said for s in lines if "train.py" in s and "python eval.py" not in s]
    assert len(told) == 1 and says in told[0] and "Traceback" not in str(said), said


def test_torchrun_ends_all_when_one_is_killed(world):
    """The real command, within 30 s."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", ROOT / "train.py"]
    words = f"toy.py {STEPS} --max_steps=100000 --eval_interval=0 --out_dir=killed".split()
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([*command, *words], cwd=world, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    log, end = world / "killed/log.jsonl", time.time() + 120
    while time.time() < end and process.poll() is None and not (log.is_file() and len(training(log.parent)) > 2):
        time.sleep(0.1)
    first = int((world / "killed/.lock").read_text().split()[0])  # whose folder it is
    os.kill(first, signal.SIGKILL)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 1 and b"SIGKILL" in said, said.decode()


@pytest.mark.parametrize("script", ["eval", "data_gen"])
def test_the_other_scripts_refuse(script):
    for rank in "01":
        command, env = [sys.executable, f"{script}.py"], os.environ | dict(RANK=rank, WORLD_SIZE="2")
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
        told = f"{script}.py runs in one process, on one device: start it with python\n"
        assert (done.returncode, done.stdout, done.stderr) == ((0, "", "") if rank == "1" else (1, "", told))


def test_a_process_wants_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="2 processes want a GPU each, here are 1: lower --nproc_per_node"):
        pick_device("cuda")
    assert pick_device("cpu").type == "cpu"
