"""engine/run.py: files that are whole or absent, a log that survives a kill, Ctrl-C; and engine/device.py's context."""

import json
import os
import signal
import threading

import pytest
import torch

from engine.device import amp
from engine.run import Log, atomic_write, first_interrupt, first_line, load_checkpoint, versions, write_json

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
    saved = {"model": {"w": torch.ones(2)}, "model_config": {"n_layer": 1}, "step": 3, "best": None}
    atomic_write(tmp_path / "x.pt", lambda f: torch.save(saved, f))
    again = load_checkpoint(str(tmp_path / "x.pt"))
    assert torch.equal(again.pop("model")["w"], torch.ones(2)) and again == {k: saved[k] for k in saved if k != "model"}


@pytest.mark.parametrize(
    ("e", "want"), [(ValueError("one\ntwo"), "one"), (ValueError(), "ValueError"), (KeyError("a"), "'a'")]
)
def test_first_line(e, want):
    assert first_line(e) == want


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
