"""engine/run.py: files that are whole or absent, a log that survives a kill, Ctrl-C; and engine/device.py's context."""

import json
import os
import resource
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from test_model import tiny

from engine.device import amp
from engine.run import (
    Log,
    atomic_write,
    first_interrupt,
    first_line,
    held,
    parse_json,
    read_json,
    read_records,
    read_text,
    versions,
    write_json,
)
from engine.weights import load_checkpoint

# --------------------------------------------------------------------------------------------------------------------
# files


@pytest.mark.parametrize("content", ["Zürich\n", "Zürich\n".encode(), lambda f: f.write("Zürich\n".encode())])
def test_atomic_write(tmp_path, content):
    """Text, bytes or a function that writes; folders are made, what was there is replaced, nothing else stays."""
    path = tmp_path / "a" / "b" / "x.txt"
    for _ in range(2):
        atomic_write(str(path), content)
        assert path.read_bytes() == "Zürich\n".encode() and os.listdir(path.parent) == ["x.txt"]


def test_failed_write_leaves_the_old_file(tmp_path):
    """A write that breaks off half-way must not cost the last good checkpoint."""
    (tmp_path / "x").write_bytes(b"old")

    def broken(f):
        f.write(b"half")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        atomic_write(tmp_path / "x", broken)
    assert (tmp_path / "x").read_bytes() == b"old" and os.listdir(tmp_path) == ["x"]


def test_two_writers_at_once(tmp_path):
    """Two runs of a sweep that write one file (refs/main, a converted task) do not stumble over each other.

    One begins and ends while the other is half-way. With one temporary name for both, the later one renamed a file that
    was gone, or cut short.
    """
    path = tmp_path / "x"

    def slow(f):
        f.write(b"the slow ")
        f.flush()
        atomic_write(path, "the quick one")
        assert path.read_bytes() == b"the quick one"
        f.write(b"one")

    atomic_write(path, slow)
    assert path.read_bytes() == b"the slow one" and os.listdir(tmp_path) == ["x"]


def test_write_json_is_strict(tmp_path):
    """What is no number is null: Python's own NaN would be refused by every other reader."""
    write_json(tmp_path / "x.json", {"a": [1, float("nan"), {"b": float("-inf")}], "c": "NaN", "d": 0.1})

    def refuse(word):
        raise AssertionError(word)

    text = (tmp_path / "x.json").read_text()
    want = {"a": [1, None, {"b": None}], "c": "NaN", "d": 0.1}
    assert json.loads(text, parse_constant=refuse) == want and text.endswith("}\n")


def test_checkpoint_comes_back(tmp_path):
    """What train.py saves, tensors and plain types, is what it gets."""
    model = tiny()
    saved = {"model": model.state_dict(), "model_config": vars(model.config), "step": 3, "best": None}
    atomic_write(tmp_path / "x.pt", lambda f: torch.save(saved, f))
    again, weights = load_checkpoint(str(tmp_path / "x.pt")), saved.pop("model")
    assert all(torch.equal(x, weights[k]) for k, x in again.pop("model").items()) and again == saved


@pytest.mark.parametrize(
    ("e", "want"), [(ValueError("one\ntwo"), "one"), (ValueError(), "ValueError"), (KeyError("a"), "'a'")]
)
def test_first_line(e, want):
    assert first_line(e) == want


@contextmanager
def small_files(size=1000):
    """No file may grow beyond `size` bytes, as on a full disk. Nothing of pytest's own may be written meanwhile."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("size", [500, 2_000, 100_000])
def test_no_room(tmp_path, size):
    """A checkpoint that does not fit is one line with its path, nothing half stays, and the old one is whole. torch
    says it by an OSError or by a RuntimeError, depending on where the file ends."""
    path = tmp_path / "x.pt"
    path.write_bytes(b"old")
    with pytest.raises(OSError, match=r"x\.pt cannot be written \(File too large\): make room") as e, small_files():
        atomic_write(path, lambda f: torch.save(dict(a=torch.zeros(size)), f))
    assert "\n" not in str(e.value) and path.read_bytes() == b"old" and os.listdir(tmp_path) == ["x.pt"]


def test_no_room_for_the_lock(tmp_path):
    with pytest.raises(OSError, match=f"{tmp_path} cannot be written"), small_files(0):
        with held(tmp_path):
            pass


def test_no_room_for_the_log(tmp_path):
    log = Log(tmp_path / "log.jsonl")
    with pytest.raises(OSError, match=r"log\.jsonl cannot be written \(File too large\)"), small_files():
        log.write(*({"step": i} for i in range(100)))
    whole = Log(log.path).records  # the line that was cut is dropped
    assert whole == [{"step": i} for i in range(len(whole))] and 50 < len(whole) < 100


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"\xef\xbb\xbfa\nb\n", "a\nb\n"),
        (b"a\r\nb\r\n", "a\nb\n"),
        (b"a\rb", "a\nb"),
        ("Zürich\u2028x".encode(), "Zürich\u2028x"),
        (b"", ""),
    ],
)
def test_read_text(tmp_path, content, text):
    """As editors on any system save it: a byte order mark and the kind of line end are not part of a text."""
    (tmp_path / "x").write_bytes(content)
    assert read_text(tmp_path / "x") == text


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"a\nb\xff\n", ":2: not UTF-8 text (byte 0xff): save it as UTF-8"),
        ("a".encode("utf-16"), ":1: not UTF-8 text"),
        (b"\x1f\x8b\x08", ":1: not UTF-8 text (byte 0x8b): unpack it first, it is a gzip file"),
        (b"\xed\xa0\x80", ":1: not UTF-8 text"),  # half of a character
    ],
)
def test_read_text_names_the_line(tmp_path, content, says):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(ValueError) as e:
        read_text(tmp_path / "x")
    assert str(e.value).startswith(f"{tmp_path / 'x'}{says}")
    nowhere = tmp_path / "nowhere"
    for wrong, found in ((nowhere, f"no list at {nowhere}"), (tmp_path, f"{tmp_path} is a folder, wanted a list")):
        with pytest.raises(FileNotFoundError, match=f"^{found}: write one$"):
            read_text(wrong, "list", "write one")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "x.json: not JSON (Expecting"),
        ("[" * 100_000, "x.json: not JSON (nested too deeply): mend it"),
        ('"\\ud83d"', "x.json: \\ud83d is half of a character"),
        ('{"\\uDE00": 1}', "x.json: \\ude00 is half of a character"),
        ("9" * 5000, "x.json: not JSON (Exceeds the limit"),
    ],
)
def test_parse_json(text, says):
    with pytest.raises(ValueError) as e:
        parse_json(text, "x.json")
    assert str(e.value).startswith(says)
    assert parse_json('"\\ud83d\\ude00 \\\\ud800 \\u00fc"', "x") == "\U0001f600 \\ud800 ü"  # both halves; no code


def test_read_records(tmp_path):
    """Lines or an array; what is asked for, or file and line."""
    path = tmp_path / "x.jsonl"
    path.write_text('\n{"a": 1}\n\n{"a": 2}')
    assert read_records(path) == [(f"{path}:2", {"a": 1}), (f"{path}:4", {"a": 2})]
    assert read_records(path, cut=True) == [(f"{path}:2", {"a": 1})]
    path.write_text('[{"a": 1},\n"b"]')
    assert read_records(path, of=(dict, str)) == [(f"{path}, item 1", {"a": 1}), (f"{path}, item 2", "b")]
    with pytest.raises(ValueError, match=f"{path}, item 2: wanted a JSON object, got str"):
        read_records(path)
    with pytest.raises(ValueError, match=f"{path}: wanted a JSON object, got list"):
        read_json(path)


# --------------------------------------------------------------------------------------------------------------------
# a run's folder


def content(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name[0] != "."}


@pytest.mark.parametrize(
    "files",
    [
        {"config.json": '{"model_type": "gpt2"}', "model.safetensors": "weights"},
        {"thesis.txt": "words"},
        {"toy_cp/config.json": '{"out_dir": "out/toy_cp"}'},  # a folder of runs is no run's
    ],
)
def test_a_folder_of_others_is_left_alone(tmp_path, files):
    """A model folder, a folder of texts, the folder above: nothing in it is touched, nothing is added."""
    for name, text in files.items():
        atomic_write(tmp_path / name, text)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=f"{tmp_path} holds .*give a new or empty folder as --out_dir"):
        with held(tmp_path):
            pass
    assert sorted(tmp_path.rglob("*")) == before
    with held(tmp_path, others=True):  # of eval.py, whose results lie beside a checkpoint
        pass
    assert {name: text.decode() for name, text in content(tmp_path).items()} == files


@pytest.mark.parametrize(
    "files", [{}, {"config.json": '{"out_dir": "x"}'}, {"groups.log.jsonl": ""}, {".DS_Store": ""}]
)
def test_a_folder_of_ours(tmp_path, files):
    """New, empty, or a run's own: what killed writes left goes, all else stays."""
    for name, text in files.items():
        atomic_write(tmp_path / "run" / name, text)
    if files:
        (tmp_path / "run" / "best.pt.0123abcd.tmp").write_bytes(b"half")
    before = {k: v for k, v in content(tmp_path).items() if not k.endswith(".tmp")}
    with held(tmp_path / "run"):
        assert content(tmp_path) == before


@pytest.mark.parametrize("text", ["{", "[]", '"out_dir"'])
def test_a_damaged_config(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=f"{tmp_path / 'config.json'}: "):
        with held(tmp_path):
            pass


HOLD = "import sys, time; sys.path.insert(0, sys.argv[2])\nfrom engine.run import held\n"
HOLD += "with held(sys.argv[1]):\n    print('held', flush=True)\n    time.sleep(60)"


def test_two_processes_in_one_folder(tmp_path):
    """The second one is refused and told who is there; the first one's death, however sudden, lets the next one in."""
    command = [sys.executable, "-c", HOLD, str(tmp_path), str(Path(__file__).resolve().parents[1])]
    first = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert first.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=f"in use by process {first.pid} on .*wait for it, or give another"):
            with held(tmp_path):
                pass
    finally:
        first.kill()
        first.wait()
    with held(tmp_path), pytest.raises(ValueError, match=f"in use by process {os.getpid()} on "):
        with held(tmp_path):
            pass
    with held(tmp_path):
        pass


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(OSError, match=f"{path} cannot be written \\("):
            with held(path):
                pass


def test_versions():
    assert versions()["torch"] == torch.__version__ and set(versions()) == {"python", "torch", "numpy"}


# --------------------------------------------------------------------------------------------------------------------
# the log


def on_disk(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_log(tmp_path):
    """Each record is on disk as soon as it is written, a line each; opened again, the log goes on behind them."""
    path = tmp_path / "new" / "log.jsonl"
    log = Log(path)
    assert path.read_text() == "" and log.records == []
    log.write({"step": 0})
    log.write({"step": 1}, {"step": 2})
    assert on_disk(path) == log.records == [{"step": i} for i in range(3)]
    again = Log(path)
    again.write({"step": 3})
    assert on_disk(path) == again.records == [{"step": i} for i in range(4)]
    again.write()
    assert len(on_disk(path)) == 4


def test_log_keeps_what_it_is_told_to(tmp_path):
    """A resumed run makes the later records again: they leave the file at once."""
    path = tmp_path / "log.jsonl"
    Log(path).write(*({"step": i} for i in range(5)))
    log = Log(path, lambda record: record["step"] < 3)
    assert on_disk(path) == log.records == [{"step": i} for i in range(3)]


@pytest.mark.parametrize("cut", [1, 5, 12])
def test_a_cut_last_line_is_dropped(tmp_path, cut):
    """A kill in the midst of a write: all whole lines count, and the next record begins a line of its own."""
    path = tmp_path / "log.jsonl"
    Log(path).write({"step": 0}, {"step": 1})
    path.write_text(path.read_text()[:-cut] if cut < 12 else path.read_text() + '{"step"')
    log = Log(path)
    log.write({"step": 7})
    assert on_disk(path) == log.records == [{"step": 0}, *([{"step": 1}] if cut == 12 else []), {"step": 7}]


@pytest.mark.parametrize(
    ("line", "says"),
    [("{'step': 1}", "not JSON (Expecting property"), ("", None), ("[1]", "wanted a JSON object, got list")],
)
def test_a_broken_line_is_named(tmp_path, line, says):
    """Somebody has edited the file: by file and line, whatever `keep` would keep, and nothing is lost."""
    path = tmp_path / "log.jsonl"
    path.write_text(text := f'{{"step": 0}}\n{line}\n{{"step": 2}}\n')
    if says is None:
        assert Log(path).records == [{"step": 0}, {"step": 2}]  # a blank line is no harm
        return
    for keep in (None, lambda record: record["step"] < 1):
        with pytest.raises(ValueError) as e:
            Log(path, keep)
        assert str(e.value).startswith(f"{path}:2: {says}") and path.read_text() == text


@pytest.mark.parametrize("before", [None, '{"step": 0}\n', "no JSON\n"])
def test_log_of_given_records(tmp_path, before):
    """What is at the path is neither read nor kept."""
    path = tmp_path / "log.jsonl"
    if before:
        path.write_text(before)
    log = Log(path, records=[{"a": 1}])
    log.write({"a": 2})
    assert on_disk(path) == log.records == [{"a": 1}, {"a": 2}]
    assert (
        on_disk(path) == Log(path, records=log.records).records and Log(path, records=[]).records == on_disk(path) == []
    )


def test_log_is_rewritten(tmp_path):
    log = Log(tmp_path / "log.jsonl")
    log.write({"a": 1}, {"a": 2})
    log.rewrite([{"a": 3}])
    assert on_disk(log.path) == log.records == [{"a": 3}] and os.listdir(tmp_path) == ["log.jsonl"]


# --------------------------------------------------------------------------------------------------------------------
# Ctrl-C


def test_the_first_interrupt_asks_the_second_one_stops():
    """The step in hand is finished; who presses twice means it. Afterwards Ctrl-C is what it was before."""
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        with first_interrupt() as stop:
            assert not stop
            signal.raise_signal(signal.SIGINT)
            assert stop
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
    with first_interrupt() as stop:
        assert not stop
    assert signal.getsignal(signal.SIGINT) is before


def test_interrupts_are_the_main_threads():
    """In another thread (a notebook's, a test's) signals cannot be caught: nothing breaks, and nothing is changed."""
    before, seen = signal.getsignal(signal.SIGINT), []

    def work():
        with first_interrupt() as stop:
            seen.append(list(stop))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [[]] and signal.getsignal(signal.SIGINT) is before


# --------------------------------------------------------------------------------------------------------------------
# precision (what is picked when: test_train.py)


def test_amp():
    """Products run in half precision inside and only there; float32 changes nothing."""
    a = torch.ones(2, 2)
    with amp(torch.device("cpu"), torch.bfloat16):
        assert (a @ a).dtype == torch.bfloat16
    with amp(torch.device("cpu"), torch.float32):
        assert (a @ a).dtype == torch.float32
    assert (a @ a).dtype == torch.float32
