"""Several processes on one run, as torchrun starts them. All of torch.distributed is here; one process does without.

Why not DistributedDataParallel: it averages gradients behind every forward of the module that it wraps. A step here
calls other methods than forward, several times, and adds up gradients once, after its last backward pass.
"""

import os
import re
import sys
from contextlib import contextmanager, redirect_stdout
from datetime import timedelta
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from engine.run import first_line

PATIENCE = timedelta(days=30)  # others wait while the first measures; the end of a process they notice at once
_here = SimpleNamespace(rank=0, count=1)


def first():
    """Whether this process is the one that downloads, writes, prints and measures."""
    return _here.rank == 0


def count():
    return _here.count


def mine(items):
    """This process's share of a list, every count-th item."""
    return items[_here.rank :: _here.count]


@contextmanager
def joined():
    """Be one of the processes that torchrun started. What the others print goes nowhere; one failure is told."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    store, rank, n = next(rendezvous("env://"))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=n, timeout=PATIENCE)
    _here.rank, _here.count = rank, n
    try:
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere if rank else sys.stdout):
            yield
        _wait()  # until the first one has measured and written
        dist.destroy_process_group()
    except BaseException:
        if store.add("failures", 1) > 1:
            sys.exit(1)  # another one says why
        if rank:
            print(file=sys.stderr)  # behind the first one's progress bar
        raise
    finally:
        _here.rank, _here.count = 0, 1


@contextmanager
def alone():
    """In this block the process works without the others, which wait for it."""
    before = _here.rank, _here.count
    _here.rank, _here.count = 0, 1
    try:
        yield
    finally:
        _here.rank, _here.count = before


@contextmanager
def first_before_others():
    """The first process goes through this block, then the others do."""
    if not first():
        _wait()
    yield
    if first():
        _wait()


def from_first(make):
    """make(), called by the first process alone, for all."""
    value = [make() if first() else None]
    _together(lambda: dist.broadcast_object_list(value, device=torch.device("cpu")))
    return value[0]


def any_of(flag):
    """Whether the flag is set in any process."""
    return total({"flag": float(bool(flag))})["flag"] > 0


def total(numbers):
    """The sum over all processes of each number in a dict."""
    values = torch.tensor(list(numbers.values()), dtype=torch.float64)
    _together(lambda: dist.all_reduce(values))
    return dict(zip(numbers, values.tolist(), strict=True))


def add_gradients(model):
    """Make each gradient the sum over all processes, in all of them the same to the bit."""
    for p in model.parameters():
        if p.grad is not None:
            _together(lambda grad=p.grad: dist.all_reduce(grad))


def _wait():
    _together(dist.barrier)


def _together(operation):
    """What all processes do at the same time; one alone does nothing. OSError in one line if another one is gone."""
    if _here.count == 1:
        return
    try:
        operation()
    except RuntimeError as e:
        why = re.sub(r"^\[\S*\] |\. .*", "", first_line(e))[:80]  # its first sentence, without the place in torch
        lost = f"lost touch with another process of this run ({why})"
        raise ConnectionError(f"{lost}: what was saved last is whole, --resume goes on") from e
