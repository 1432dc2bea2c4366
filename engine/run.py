"""A run's folder and files: whole or absent, errors in one line, held by one process; kept results; Ctrl-C."""

import errno
import hashlib
import json
import os
import platform
import re
import signal
import threading
import uuid
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

try:
    import fcntl
except ImportError:  # Windows: there, nothing stops a second process
    fcntl = None


# ---- reading -------------------------------------------------------------------------------------------------------


def read_text(path, what="file", hint="check the path"):
    """A UTF-8 text file without its byte order mark; lines end with a line feed. Raises FileNotFoundError, OSError or
    ValueError with one line."""
    try:
        if not Path(path).is_file():
            found = f"{path} is a folder, wanted a {what}" if Path(path).is_dir() else f"no {what} at {path}"
            raise FileNotFoundError(f"{found}: {hint}")
        content = Path(path).read_bytes()
    except PermissionError as e:
        raise OSError(f"{path} cannot be read ({e.strerror}): {hint}") from e
    try:
        return content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as e:
        line = content.count(b"\n", 0, e.start) + 1
        how = "unpack it first, it is a gzip file" if content[:2] == b"\x1f\x8b" else "save it as UTF-8"
        raise ValueError(f"{path}:{line}: not UTF-8 text (byte 0x{content[e.start]:02x}): {how}") from e


def parse_json(text, where, hint="mend it"):
    """A JSON value. Raises ValueError that begins with `where` and ends with the hint."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as e:
        reason = "nested too deeply" if isinstance(e, RecursionError) else e
        raise ValueError(f"{where}: not JSON ({reason}): {hint}") from e
    if re.search(r"\\u[dD][89a-fA-F]", text):  # a code for half of a character: is the other half there?
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as e:
            half = f"\\u{ord(e.object[e.start]):04x}"
            raise ValueError(f"{where}: {half} is half of a character, a lone surrogate: delete or replace it") from e
    return value


def read_json(path, hint="copy it again from where it came from"):
    """The object in a JSON file. Raises as read_text does."""
    value = parse_json(read_text(path, "JSON file", hint), path, hint)
    if not isinstance(value, dict):
        raise ValueError(f"{path}: wanted a JSON object, got {type(value).__name__}: {hint}")
    return value


def read_records(path, what="file", hint="check the path", of=dict, cut=False):
    """[(where, record)] of a file with one JSON value a line, or of a JSON array; `where` is 'file:line' or 'file, item
    n', a record is of the type, or the types, `of`. With `cut`, a last line without its end does not count: a kill cut
    it. Raises as read_text does."""
    return parse_records(read_text(path, what, hint), path, hint, of, cut)


def parse_records(text, path, hint="check the path", of=dict, cut=False):
    """What read_records makes of a file's text."""
    if text.lstrip().startswith("["):
        records = [(f"{path}, item {i}", record) for i, record in enumerate(parse_json(text, path, hint), 1)]
    else:
        lines = text.split("\n")[: -1 if cut else None]
        records = [(f"{path}:{i}", parse_json(s, f"{path}:{i}", hint)) for i, s in enumerate(lines, 1) if s.strip()]
    for where, record in records:
        if not isinstance(record, of):
            raise ValueError(f"{where}: wanted a JSON object, got {type(record).__name__}: {hint}")
    return records


PART = r"\.[0-9a-f]{8}\.tmp$"  # ends the names of files that are being written


# ---- writing -------------------------------------------------------------------------------------------------------


@contextmanager
def _writing(path):
    """Turns whatever goes wrong while `path` is written into one line that names it."""
    try:
        yield
    except (OSError, RuntimeError) as e:
        cause = e if isinstance(e, OSError) else e.__context__  # torch.save turns a full disk into a RuntimeError
        if not isinstance(cause, OSError):
            raise
        full = cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        advice = "make room; what was there is whole, and the same command goes on" if full else "give another place"
        in_way = cause.errno in (errno.EEXIST, errno.ENOTDIR)
        reason = "a file is where a folder is wanted" if in_way else cause.strerror or first_line(cause)
        raise OSError(f"{path} cannot be written ({reason}): {advice}") from e


def atomic_write(path, write):
    """Call write(file) on a temporary neighbour of `path`, then rename: what is there is always whole, old or new, also
    if several processes write at once. `write` may also be the content itself, str or bytes. OSError in one line."""
    path = Path(path)
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    with _writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
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


def strict_json(value, **how):
    """JSON text in which what is not a finite number is null."""
    return json.dumps(json.loads(json.dumps(value), parse_constant=lambda _: None), **how)


def write_json(path, value):
    atomic_write(path, strict_json(value, indent=2) + "\n")


class Log:
    """A file with one JSON object a line, written as the run goes; `records` are all that it holds.

    It begins with the records that are given, or with those of the file that keep(record) is true of: without `keep`
    with all. A last line that a kill has cut is dropped, any other that is no JSON object a ValueError with the hint.
    """

    def __init__(self, path, keep=lambda record: True, records=None, hint="give another --out_dir"):
        self.path = Path(path)
        if records is None:
            found, records = read_records(path, hint=hint, cut=True) if self.path.is_file() else [], []
            for where, record in found:
                try:
                    records += [record] if keep(record) else []
                except (KeyError, TypeError) as e:
                    raise ValueError(f"{where}: no record of this log: {hint}") from e
        self.rewrite(records)

    def rewrite(self, records):
        self.records = records
        atomic_write(self.path, "".join(strict_json(r) + "\n" for r in records))

    def write(self, *records):
        self.records += records
        append(self.path, "".join(strict_json(r) + "\n" for r in records))


def append(path, text):
    """Add text to a file, which is made if it is missing, and its folder. OSError in one line."""
    with _writing(path):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a", encoding="utf-8") as f:
            f.write(text)


# ---- a run's folder ------------------------------------------------------------------------------------------------


@contextmanager
def held(folder, others=False):
    """Hold a folder for this process until the block, or the process, ends; a second process is refused. The folder is
    made if it is missing, and what killed writes have left in it is removed.

    Raises ValueError if it is in use, or if it holds something else than a run of ours, which would be overwritten
    (unless `others`), and OSError if it cannot be written.
    """
    folder = Path(folder)
    with _writing(folder):
        there = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
    files = [name for name in there if not re.search(PART, name) and name[0] != "."]
    mine = others or "groups.log.jsonl" in files  # of data_gen.py; a config.json may also be a model's
    hint = 'give another --out_dir, or, if that was a run, write {"out_dir": ""} into it'
    mine = mine or ("config.json" in files and "out_dir" in read_json(folder / "config.json", hint))
    if files and not mine:
        more = f" and {len(files) - 1} other file{'s' * (len(files) > 2)}" if files[1:] else ""
        lost = " (groups.log.jsonl is missing)" * ("groups.jsonl" in files)
        raise ValueError(
            f"{folder} holds {files[0]}{more}, but no run of this project{lost}, and a run might overwrite it: give a "
            "new or empty folder as --out_dir"
        )
    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "a+", errors="replace")
    with lock:
        try:
            if fcntl:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            lock.seek(0)
            owner = lock.read().strip()
            raise ValueError(f"{folder} is in use by process {owner}: wait for it, or give another --out_dir") from e
        except OSError:  # a file system without locks
            pass
        with _writing(folder):  # without a buffer, which would be written again when the file is closed
            os.truncate(lock.fileno(), 0)
            os.write(lock.fileno(), f"{os.getpid()} on {platform.node()}".encode())
        for part in [*folder.glob("*.tmp"), *folder.glob("eval/*.tmp")]:
            if re.search(PART, part.name):
                part.unlink()
        yield


def sha256(x):
    """Of a model's parameters, or of anything that JSON can hold."""
    digest = hashlib.sha256()
    if isinstance(x, torch.nn.Module):
        for p in x.parameters():
            digest.update(p.detach().float().cpu().numpy().tobytes())
    else:
        digest.update(json.dumps(x, sort_keys=True).encode())
    return digest.hexdigest()


def cached(path, key, compute):
    """(compute(), False), or (what an earlier call left at `path` for the same key, True). Arrays become lists."""
    saved = {}
    if path.is_file():
        try:
            saved = read_json(path, "measured again")
        except ValueError as e:
            print(e)
    if saved.get("key") == sha256([key, saved.get("value")]):  # so an altered value does not count either
        return saved["value"], True
    value = json.loads(json.dumps(compute(), default=np.ndarray.tolist))
    atomic_write(path, json.dumps(dict(key=sha256([key, value]), value=value)))
    return value, False


def versions():
    return dict(python=platform.python_version(), torch=torch.__version__, numpy=np.__version__)


def first_line(e):
    """An exception's message, cut to one line; its type if it has none."""
    return (str(e).splitlines() or [type(e).__name__])[0]


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
