"""Files that are whole or absent, JSON lines, checkpoints, the log of a run, and Ctrl-C."""

import json
import os
import platform
import signal
import sys
import threading
import uuid
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch


def atomic_write(path, write):
    """Call write(file) on a temporary neighbour of `path`, then rename: what is there is always whole, old or new, also
    if several processes write at once. `write` may also be the content itself, str or bytes."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with open(part, "wb") as f:
            if callable(write):
                write(f)
            else:
                f.write(write.encode() if isinstance(write, str) else write)
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_json(path, value):
    """Strict JSON: what is not a finite number becomes null."""
    value = json.loads(json.dumps(value), parse_constant=lambda _: None)
    atomic_write(path, json.dumps(value, indent=2) + "\n")


def read_text(path, what="file", hint="check the path"):
    """A UTF-8 text file. Raises FileNotFoundError or ValueError with one line."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no {what} at {path}: {hint}")
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        raise ValueError(f"{path}: not UTF-8 text ({e})") from e


def read_json_lines(path, cut=False):
    """[(where, record)] of a file with one JSON object a line; `where` is 'file:line'. Raises ValueError naming it.
    With `cut`, a last line without its end does not count: a kill cut it."""
    lines, records = read_text(path).split("\n"), []
    for i, line in enumerate(lines[:-1] if cut else lines, 1):
        if line.strip():
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as e:
                raise ValueError(f"{path}:{i}: not JSON ({e})") from e
            if not isinstance(record, dict):
                raise ValueError(f"{path}:{i}: wanted a JSON object, got {type(record).__name__}")
            records.append((f"{path}:{i}", record))
    return records


def versions():
    return dict(python=platform.python_version(), torch=torch.__version__, numpy=np.__version__)


def first_line(e):
    """An exception's message, cut to one line; its type if it has none."""
    return (str(e).splitlines() or [type(e).__name__])[0]


def load_checkpoint(path):
    """A .pt file of train.py (tensors and plain types only, so it cannot run code). Raises with one clear line."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}: train one first, or check the path")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:
        raise ValueError(f"{path} is not a readable checkpoint ({first_line(e)}): it may be cut off") from e
    if not isinstance(saved, dict) or not {"model", "model_config"} <= saved.keys():
        raise ValueError(f"{path} is no checkpoint of train.py: give weights of another origin as .safetensors or .bin")
    return saved


class Log:
    """A file with one JSON object a line, written as the run goes; `records` are all that it holds.

    It begins with the records that are given, or with those of the file that keep(record) is true of: without `keep`
    with all. A last line that a kill has cut is dropped, any other that is no JSON object a ValueError.
    """

    def __init__(self, path, keep=None, records=None):
        self.path = Path(path)
        if records is None:
            found = read_json_lines(path, cut=True) if self.path.is_file() else []
            records = [record for _, record in found if keep is None or keep(record)]
        self.rewrite(records)

    def rewrite(self, records):
        self.records = records
        atomic_write(self.path, "".join(json.dumps(r) + "\n" for r in records))

    def write(self, *records):
        self.records += records
        with open(self.path, "a", encoding="utf-8") as f:
            f.write("".join(json.dumps(r) + "\n" for r in records))


@contextmanager
def one_line_errors(command, kept):
    """Bad input ends a command in one line, Ctrl-C in one that says what is kept."""
    try:
        yield
    except (ValueError, OSError, FloatingPointError) as e:
        sys.exit(f"{command}: {' '.join(str(e).split())}")
    except KeyboardInterrupt:
        sys.exit(f"\n{command}: interrupted; {kept}")


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
