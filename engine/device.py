"""Where and in which precision things are computed."""

import ctypes
import os
import platform
from pathlib import Path

import torch


def pick_device(wanted="auto"):
    """The torch device: as wanted, else the fastest there is. Raises ValueError if it is not there."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if wanted != "auto" and not there[wanted]:
        raise ValueError(f"device={wanted} is not available here: --device=auto takes the best there is")
    device = torch.device(wanted if wanted != "auto" else next(d for d, ok in there.items() if ok))
    if wanted == "auto" and device.type == "cpu" and torch.version.cuda:
        print(f"WARNING this torch is for CUDA {torch.version.cuda}, but finds no GPU it can use: see nvidia-smi")
    n = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # processes that torchrun started on this machine
    if n > (gpus := dict(cuda=torch.cuda.device_count(), mps=1).get(device.type, n)):
        raise ValueError(f"{n} processes want a GPU each, here are {gpus}: lower --nproc_per_node, or --device=cpu")
    if device.type == "cuda":
        if n > 1:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        # cuDNN's attention plans anew for every shape, 40 ms and up to 1.3 s each: a third of a short run on an H200.
        torch.backends.cuda.enable_cudnn_sdp(False)
        # Partial sums in bf16 are too coarse for an objective that lives on differences of 0.1 nat.
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    return device


def pick_dtype(wanted, device, width):
    """(dtype of matrix products, the reason for it): half precision where the hardware is fast at it."""
    if wanted == "float16" and device.type != "cuda":
        raise ValueError(f"dtype=float16 needs cuda, this run is on {device}: use --dtype=bfloat16 or --dtype=float32")
    if wanted != "auto":
        slow = device.type == "cpu" and wanted == "bfloat16" and not _fast_bf16()
        return getattr(torch, wanted), "as set" + "; float32 may be much faster, this CPU has no fast bf16" * slow
    if device.type == "cuda":
        if torch.cuda.get_device_capability()[0] >= 8:
            return torch.bfloat16, "this GPU has bf16"
        return torch.float16, "this GPU has no bf16; with loss scaling"
    if device.type == "mps":
        return torch.float32, "the safe choice on mps"
    if width < 256:
        return torch.float32, "so narrow a model gains nothing from bf16 on a CPU"
    if flag := _fast_bf16():
        return torch.bfloat16, f"this CPU has {flag}"
    return torch.float32, "this CPU has no fast bf16"


def _fast_bf16():
    """What makes bf16 fast on this CPU, or None."""
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text() if cpuinfo.is_file() else ""
    flag = next((f for f in ("amx_bf16", "avx512_bf16") if f in flags), None)
    return flag if torch.backends.mkldnn.is_available() else None  # without oneDNN the products would not use it


def compile_if_it_pays(function, wanted, device, steps):
    """(torch.compile of a function or None, what to say of it): as wanted, else where the wait for it pays."""
    if wanted == "no":
        return None, "off"
    if wanted == "auto" and device.type != "cuda":
        return None, f"off (gains nothing on {device.type})"
    if wanted == "auto" and steps < 2000:
        return None, "off (so few steps do not repay a minute of compiling)"
    compiled = torch.compile(function, dynamic=True)  # once, not for every length
    return compiled, "on: the first step takes a minute longer"


def amp(device, dtype):
    """The context in which matrix products run in dtype."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def keep_freed_memory():
    """Let glibc keep large freed blocks: to map and clear them anew in every step costs a quarter of its time."""
    if platform.libc_ver()[0] == "glibc":
        libc, M_TRIM_THRESHOLD, M_MMAP_MAX = ctypes.CDLL(None), -1, -4
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)
