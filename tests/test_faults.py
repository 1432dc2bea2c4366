"""What goes wrong outside, in a minute: the short form of tests/faults.py, and a run's folder against two processes."""

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import faults
import pytest
import torch

from configs import MESSAGE
from engine.run import held

ROOT = Path(__file__).resolve().parents[1]
HOLD = """
import sys, time
from engine.run import held
with held(sys.argv[1]):
    print("held", flush=True), time.sleep(60)
"""


@pytest.fixture
def world(tmp_path, monkeypatch):
    """The small world, as the working folder."""
    folder = faults.make_world(tmp_path / "world")
    monkeypatch.chdir(folder)
    return folder


def python(*argv, cwd, **env):
    """A real command with few samples. Its environment is `env` alone, beside what python itself needs."""
    keep = {k: os.environ[k] for k in ("PATH", "LD_LIBRARY_PATH", "OMP_NUM_THREADS") if k in os.environ}
    command = [sys.executable, str(ROOT / "tests/faults.py"), "child", *argv]
    done = subprocess.run(command, cwd=cwd, env=keep | env, capture_output=True, stdin=subprocess.DEVNULL, timeout=100)
    return done.returncode, done.stdout, done.stderr


def test_every_mistake_of_a_user_is_one_line(tmp_path):
    """The whole table: exit code 1 or 2, the word that helps, nothing executed, nothing that was there touched."""
    wrong = []
    for line, said, code, why in faults.error_rows(tmp_path / "world"):
        wrong += [f"$ python {line}\n{said[-300:]}\n-> {code}: {why}"] if why else []
    assert not wrong, "\n\n".join(["", *wrong])
    assert len(faults.CASES) >= 90


@pytest.mark.parametrize("part", [["inputs", "--inputs=60"], ["kills", "--kills=6", "--seed=1"], ["disk"]])
def test_the_long_form_in_short(part):
    """Mutated inputs are read or refused in one line; killed runs, and those on a full disk, end as undisturbed ones.
    In a process of its own: children are forked, which a process with running threads does not survive."""
    command = [sys.executable, str(ROOT / "tests/faults.py"), *part]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0 and " 0 outside what is allowed" in done.stdout, done.stdout[-3000:] + done.stderr


# --------------------------------------------------------------------------------------------------------------------
# a run's folder belongs to one process


def holder(folder):
    """A process that holds the folder."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_process_is_refused_until_the_first_is_gone(world, tmp_path):
    process = holder(tmp_path / "run")
    code, _, err = python("train.py", "toy.py", f"--out_dir={tmp_path / 'run'}", cwd=world)
    lines = err.decode().strip().split("\n")
    assert code == 1 and len(lines) == 1 and f"in use by process {process.pid} " in lines[0], lines
    process.send_signal(signal.SIGKILL), process.wait()
    with held(tmp_path / "run"):
        pass


def test_two_in_one_process(tmp_path):
    with held(tmp_path), pytest.raises(ValueError, match=f"in use by process {os.getpid()} "), held(tmp_path):
        pass
    with held(tmp_path):
        pass


@pytest.mark.parametrize("script", ["train.py toy.py", "data_gen.py gen.py"])
def test_folders_of_others_are_refused_untouched(world, script):
    """A model's folder, whose config.json would be overwritten, and anything else; hidden files do not count."""
    (world / "mine").mkdir(), (world / "mine/thesis.tex").write_text("years of work")
    before = {p: p.read_bytes() for p in world.rglob("*") if p.is_file() and p.name != ".lock"}
    for folder in ("base", "mine", "."):
        code, said = faults.call(f"{script} --out_dir={folder}")
        assert code == 1 and f"{folder} holds " in said and "no run of this project" in said, said
    assert {p: p.read_bytes() for p in world.rglob("*") if p.is_file() and p.name != ".lock"} == before
    (world / "new").mkdir(), (world / "new/.gitkeep").write_text("")
    with held("new"):
        pass


@pytest.mark.parametrize("script", ["train.py toy.py", "data_gen.py gen.py", "eval.py toy.py"])
def test_an_empty_out_dir_is_refused(world, script):
    before = sorted(world.rglob("*"))
    code, said = faults.call(f"{script} --out_dir=")
    assert code == 2 and "out_dir" in said and "\n" not in said and sorted(world.rglob("*")) == before


# --------------------------------------------------------------------------------------------------------------------
# terminals, letters, folders


RUSSIAN = "Анна забыла ключи."


def speak_russian(world):
    """Groups, prompts and texts in letters that few encodings have."""
    for name in ("few.jsonl", "prompts.jsonl"):
        file = Path(world, name)
        file.write_text(file.read_text().replace("Anna", "Анна").replace("Ben", "Бен 🙂"), encoding="utf-8")


@pytest.mark.parametrize(("encoding", "script"), [("cp1252", "train.py"), ("ascii", "eval.py")])
def test_output_that_cannot_be_encoded_ends_well(world, encoding, script):
    speak_russian(world)
    out = world / ("run" if script == "eval.py" else "out/ru")
    more = [f"--out_dir={out}", *["--prompts=prompts.jsonl"] * (script == "eval.py")]
    code, said, err = python(script, "toy.py", *more, cwd=world, PYTHONIOENCODING=encoding)
    assert code == 0 and b"?" in said, err[-500:]
    assert json.loads((out / "summary.json").read_text("utf-8"))["best_step"]
    assert (out / "eval.json").is_file() == (script == "eval.py")


def test_a_poor_environment_and_an_odd_folder(world):
    """LANG=C, no HOME, no terminal; an out_dir with blanks and foreign letters, in commands that can be pasted."""
    out = "out/mein Lauf (für Анна)"
    code, said, err = python("train.py", "toy.py", f"--out_dir={out}", cwd=world, LANG="C")
    assert code == 0 and Path(out, "summary.json").is_file(), err[-500:]
    told = [line for line in said.decode().splitlines() if "python eval.py" in line]
    assert told and f"--ckpt={out}/best.pt" in shlex.split(told[0].split("python", 1)[1]), told


def test_messages_are_short_and_their_limit_is_kept(world):
    """However long a value or a path is."""
    for line in (f"train.py toy.py --init_from={'x/' * 2000}", f"train.py toy.py --tau={'9' * 4999}x"):
        code, said = faults.call(line)
        assert code in (1, 2) and len(said) <= MESSAGE + faults.PREFIX and "\n" not in said


def test_nothing_is_executed_that_a_checkpoint_names(world):
    """evil.py leaves a trace when it is run, as a config or as a scorer."""
    saved = torch.load("run/best.pt", weights_only=True)
    for name, value in (("init_from", "evil.py"), ("scorer", "evil:f")):
        torch.save(saved | dict(config=saved["config"] | {name: value}), "evil.pt")
        code, said = faults.call("eval.py --ckpt=evil.pt --parts=scores")
        assert code in (1, 2) and "evil" in said and not Path("EVIL").exists()
