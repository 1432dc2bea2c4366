"""Checks and speeds on a GPU, beside the CPU and beside plain transformers. Made for five minutes on an H100.

    python tests/gpu.py --out=gpu.json               # all sections: first the checks, then the speeds
    python tests/gpu.py --sections=scores,step       # only these
    python tests/gpu.py --device=cpu --small         # all that needs no GPU, in tiny sizes, in a minute

Weights are random, nothing is downloaded. `training` and `compiled` run train.py in processes of their own; they need
GPT-2's tokenizer, two files in the folder TIKTOKEN_CACHE_DIR. A section that fails or takes too long is reported, and
the next one begins. The file of --out is written anew after each. Exits with 1 if anything failed or differs.
"""

import argparse
import copy
import gc
import inspect
import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
import traceback
import warnings
from collections import Counter
from contextlib import nullcontext, suppress
from functools import cached_property
from pathlib import Path
from unittest.mock import patch

import torch
from torch.autograd import DeviceType
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import data
import engine.attention
from engine import head
from engine.device import amp, keep_freed_memory, pick_device
from loss import contrastive_perplexity, token_mean
from model import GPT, GPTConfig

ROOT = Path(__file__).resolve().parents[1]
BEGAN, LIMIT = time.time(), 340  # seconds for everything; what does not fit is left out
SHAPES = {"gpt2": (12, 12, 768), "gpt2-medium": (24, 16, 1024), "gpt2-large": (36, 20, 1280)}  # layers, heads, width
G, P, N = 6, 5, 5  # groups, positives, negatives of a contrastive step, as in configs/gpt2_cp.py
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
ONLY_CUDA = "only on CUDA"


class OutOfTime(BaseException):
    """A section's time is over. No Exception, so that no handler inside a section swallows it."""


class Bench:
    """What all sections share: the device, the sizes, and what is made once."""

    def __init__(self, device, small, folder):
        self.device, self.small, self.folder, self.cuda = device, small, Path(folder), device.type == "cuda"
        self.new = 6 if small else 20  # tokens of a sample

    def config(self, name="gpt2"):
        if self.small:
            return GPTConfig(vocab_size=1000, n_positions=128, n_embd=64, n_layer=2, n_head=2)
        return GPTConfig(**dict(zip(("n_layer", "n_head", "n_embd"), SHAPES[name], strict=True)))

    def drop(self):
        """Give back what nobody holds any more, so that the next peak of memory, and the next process, are clean."""
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()

    @cached_property
    def rate(self):
        """FLOP per second of one large bf16 product: what this card gives, to measure all else by."""
        n = 256 if self.small else 8192
        a, b = (torch.randn(n, n, device=self.device, dtype=BF16) for _ in range(2))
        return 2 * n**3 / (speed(self, lambda: a @ b)["median_ms"] / 1000)


# --------------------------------------------------------------------------------------------------------------------
# models, texts, clocks


def build(config, device="cpu"):
    torch.manual_seed(0)
    with torch.device(device):  # made where it is used: a CPU takes long to draw a large one
        return GPT(config)


@torch.no_grad()
def like_trained(model, logits, sharp=1.0):
    """Add `logits` (V,) to what a random model gives, by one direction u of the embedding and the last norm: common
    tokens above rare ones and all far below zero, as GPT-2 has them, and where half precision gets difficult. `sharp`
    strengthens what the blocks do and what it does to the logits, or else the commonest token would always win."""
    gain, net, logits = 40.0, model.transformer, logits.to(model.device)
    u = F.normalize(torch.randn(model.config.n_embd, generator=torch.Generator().manual_seed(1)), dim=0)
    u = u.to(model.device)
    net.wte.weight += (logits / gain)[:, None] * u
    net.wpe.weight -= (logits.softmax(0) @ logits / gain) * u  # the blocks shall not see what all tokens share
    net.ln_f.bias += gain * u
    net.ln_f.weight *= sharp
    for p in net.h.parameters():
        p *= sharp
    return model


def zipf(V, slope=2.5, offset=-60.0):
    """Logits of common to rare tokens, in random order: with this slope 27 apart for GPT-2's vocabulary."""
    rank = torch.randperm(V, generator=torch.Generator().manual_seed(2)) + 1
    return offset - slope * rank.log()


def sentences(n, low, high, V):
    """n framed rows of `low` to `high` tokens, common ones more often: idx (n, T), lengths (n,)."""
    generator = torch.Generator().manual_seed(0)
    weight, size = zipf(V, 1.1, 0.0).exp(), torch.randint(low, high + 1, (n,), generator=generator).tolist()
    return data.pad([[V - 1, *torch.multinomial(weight, k, True, generator=generator).tolist(), V - 1] for k in size])


def speed(s, function, warm=5, n=10):
    """Time of a call, the first and the later ones, and the peak of all memory on the device meanwhile."""
    warm, n, ms = (1, 2, []) if s.small else (warm, n, [])
    wait = torch.cuda.synchronize if s.cuda else lambda: None
    if s.cuda:
        torch.cuda.reset_peak_memory_stats()
    for _ in range(warm + n):
        wait()
        start = time.perf_counter()
        function()
        wait()
        ms.append(1000 * (time.perf_counter() - start))
    peak = dict(peak_gb=torch.cuda.max_memory_allocated() / 2**30) if s.cuda else {}
    return dict(first_ms=ms[0], median_ms=statistics.median(ms[warm:])) | peak


def counted(s, function):
    """One call under the profiler: kernels, their time, calls that wait for the GPU, and the costliest kernels."""
    if not s.cuda:
        return ONLY_CUDA
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as prof:
        function()
        torch.cuda.synchronize()
    events = [e for e in prof.key_averages() if not getattr(e, "is_user_annotation", False)]
    gpu = [e for e in events if e.device_type == DeviceType.CUDA and not e.key.startswith("Optimizer.")]
    gpu.sort(key=lambda e: -e.self_device_time_total)
    calls = {e.key: e.count for e in events if e.device_type == DeviceType.CPU}
    names = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaMemcpyAsync", "cudaMalloc")
    names += ("aten::item", "aten::_local_scalar_dense", "aten::nonzero")
    row = dict(kernels=sum(e.count for e in gpu if not e.key.startswith("Mem")))
    row |= dict(gpu_ms=sum(e.self_device_time_total for e in gpu) / 1000) | {name: calls.get(name, 0) for name in names}
    return row | dict(top=[f"{e.self_device_time_total / 1000:7.3f} ms {e.count:5d} x {e.key[:200]}" for e in gpu[:12]])


def waits(s, function, tokens=1):
    """How often the CPU waited for the GPU, per token or step, and in which lines, as torch's debug mode sees it."""
    if not s.cuda:
        return ONLY_CUDA
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            function()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    lines = [f"{Path(w.filename).name}:{w.lineno}" for w in caught if "called a synchronizing" in str(w.message)]
    return dict(waits=len(lines) / tokens, top=[f"{n} x {line}" for line, n in Counter(lines).most_common(12)])


def verdict(value, limit):
    return dict(verdict="ok" if value <= limit else "DIFFERS")  # nan differs


def first_line(e):
    return f"{type(e).__name__}: {(str(e).splitlines() or [''])[0]}"[:300]


# --------------------------------------------------------------------------------------------------------------------
# checks


@torch.no_grad()
def scores(s, out):
    """phi, phi from the fourth token on, and KL to a neighbour: the device in three dtypes against the CPU in fp32."""
    V = s.config().vocab_size
    idx, lengths = sentences(8 if s.small else 64, 8, 60, V)

    def measured(model, base, idx):
        start, kl = torch.full_like(lengths, 4), model.sequence_kl(base, idx, lengths)
        return dict(phi=model.sequence_nll(idx, lengths), start=model.sequence_nll(idx, lengths, start), kl=kl)

    for kind in ("plain", "like trained"):
        model = build(s.config()) if kind == "plain" else like_trained(build(s.config()), zipf(V))
        base, logits = copy.deepcopy(model), model(idx[:8])
        for p in base.parameters():
            p += 0.002 * torch.randn_like(p)
        mean, spread = logits.mean(-1), logits.amax(-1) - logits.amin(-1)
        out[f"{kind}, logits"] = dict(lowest_mean=mean.min(), highest_mean=mean.max(), range=spread.mean())
        want, there = measured(model, base, idx), [copy.deepcopy(m).to(s.device) for m in (model, base)]
        for dtype in (FP32, BF16, FP16):
            with amp(s.device, dtype):
                got = measured(*there, idx.to(s.device))
            for name, value in want.items():
                diff = (got[name].cpu() - value).abs().max().item()
                row = dict(max_diff=diff, of=value.mean()) | verdict(diff, 1e-3 if dtype == FP32 else 0.02)
                out[f"{kind}, {str(dtype)[6:]}, {name}"] = row
    there, idx = [m.to(s.device) for m in (model, base)], idx.to(s.device)
    out["waits, all three"] = waits(s, lambda: measured(*there, idx))


def contrast(phi):
    phi = phi.view(G, P + N)
    return contrastive_perplexity(phi[:, :P], phi[:, P:], distance="signed")[0] + phi[:, :P].mean()


def gradients(s, out):
    """One contrastive step: the device's fp32 gradient against the CPU's, and the direction of half precision's."""
    V = s.config().vocab_size
    idx, lengths = sentences(G * (P + N), 8, 40, V)
    model = like_trained(build(s.config()), zipf(V))
    there = copy.deepcopy(model).to(s.device)

    def grads(model, dtype, scale=1.0):
        model.zero_grad()
        with amp(model.device, dtype):
            loss = contrast(model.sequence_nll(idx.to(model.device), lengths))
        (loss * scale).backward()
        return loss.item(), {n: p.grad.cpu() / scale for n, p in model.named_parameters()}

    loss, want = grads(model, FP32)
    for dtype, scale in ((FP32, 1.0), (BF16, 1.0), (FP16, 1024.0)):
        value, got = grads(there, dtype, scale)
        relative = {n: ((got[n] - g).norm() / g.norm()).item() for n, g in want.items()}
        worst = max(relative, key=lambda n: math.inf if math.isnan(relative[n]) else relative[n])
        dot = lambda a, b: sum((a[n] * b[n]).sum(dtype=torch.float64).item() for n in a)  # noqa: E731
        cosine = dot(got, want) / math.sqrt(dot(got, got) * dot(want, want))
        row = dict(loss=value, loss_cpu=loss, worst_relative=relative[worst], worst=worst, cosine=cosine)
        out[str(dtype)[6:]] = row | (verdict(relative[worst], 1e-3) if dtype == FP32 else verdict(1 - cosine, 0.01))


def generate(s, out):
    """Tokens in fp32, device against CPU. After a near tie a row goes another way for good, so the verdict is about the
    tokens up to there: three in a hundred may be such a tie."""
    V, rows = s.config().vocab_size, 4 if s.small else 12
    model = like_trained(build(s.config()), zipf(V), sharp=6.0)
    there = copy.deepcopy(model).to(s.device)
    idx, lengths = sentences(rows, 6, 14, V)
    noise = torch.rand(rows, s.new, 4, generator=torch.Generator().manual_seed(4))
    before = sentences(1, 40, 40, V)[0][0, :41].tolist()
    cases = {"sampled": {}, "greedy": dict(temperature=0.0), "noise given": dict(generator=noise)}
    cases |= {"4 samples": dict(samples=4)}
    for name, case in cases.items():
        got = []
        for m in (model, there):
            how = dict(top_p=0.9, stop_token=V - 1, generator=torch.Generator().manual_seed(3)) | case
            got.append([x.cpu() for x in m.generate(idx.to(m.device), lengths, s.new, **how)])
        (want, count), (tokens, count_there) = got
        same, counts = tokens == want, (count == count_there).float().mean()
        ties = (~same.all(1)).sum().item()
        row = dict(equal_tokens=same.float().mean(), equal_rows=same.all(1).float().mean(), equal_counts=counts)
        ties_a_token = ties / (same.cumprod(1).sum().item() + ties)
        out[name] = row | dict(ties_a_token=ties_a_token, distinct=len(want.unique())) | verdict(ties_a_token, 0.03)
    # A prefix that is read once, against the same tokens in front of every prompt, both on the device: behind 40 random
    # tokens this model is so chaotic that weights changed by 1e-6 turn 8 tokens in a hundred, and the CPU is no judge.
    how = dict(temperature=0.0, stop_token=V - 1)
    shared, _ = there.generate(idx.to(s.device), lengths, s.new, prefix=there.read_prefix(before), **how)
    front = torch.tensor([before]).expand(rows, -1)
    whole, _ = there.generate(torch.cat([front, idx], 1).to(s.device), lengths + len(before), s.new, **how)
    ties = (shared != whole).any(1).sum().item()
    ties_a_token = ties / ((shared == whole).cumprod(1).sum().item() + ties)
    out["prefix or prompt"] = dict(ties_a_token=ties_a_token) | verdict(ties_a_token, 0.03)


# --------------------------------------------------------------------------------------------------------------------
# the real training loop


def worker(report, *flags):
    """train.py with a clock on its phases, in a process of its own. What is known is written after each of them.

    A step ends when its numbers have come from the GPU, so the first one lies before first_step_done and not in `loop`.
    Clocks start when all is imported; set_up includes sample_harmless, close and validate are sums.
    """
    import train

    ends, began = [], time.time()
    row = {"began": began}

    def note():
        if torch.cuda.is_available():
            row["peak_gb"] = torch.cuda.max_memory_allocated() / 2**30
        Path(report).write_text(json.dumps(row))

    def clocked(name, function):
        def inner(*args, **kwargs):
            start = time.time()
            try:
                return function(*args, **kwargs)
            finally:
                row[name] = row.get(name, 0) + time.time() - start
                note()

        return inner

    def stamped(log, *records, write=train.Log.write):
        for record in records:
            if record["split"] == "train":
                ends.append(time.time())
                done, loop = ends[0] - began, ends[-1] - ends[0]
                row.update(steps=len(ends), loss=record["loss"], first_step_done=done, loop=loop)
                row["skipped"] = record.get("skipped", 0)  # by the loss scaling
                if len(ends) > 1:
                    row["step_ms"] = 1000 * statistics.median(b - a for a, b in zip(ends, ends[1:], strict=False))
        note()
        write(log, *records)

    for name in {"set_up", "sample_harmless", "validate", "save", "close"} & vars(train).keys():
        setattr(train, name, clocked(name, getattr(train, name)))
    train.Log.write = stamped
    train.main(list(flags))


def no_tokenizer():
    """Why train.py cannot run, or None. It would only wait for a network that may not be there."""
    cache = Path(os.environ.get("TIKTOKEN_CACHE_DIR") or Path(tempfile.gettempdir()) / "data-gym-cache")
    there = cache.is_dir() and len(list(cache.iterdir())) >= 2
    return None if there else f"skipped: {cache} does not hold GPT-2's tokenizer, see TIKTOKEN_CACHE_DIR"


def starting_point(s):
    """Flags that name a random model, made once, and the data. It has the word frequencies of the shipped positives, so
    that its own texts, which training anchors it to, are not all taken for toxic."""
    folder, groups = s.folder / "model", ROOT / "data/detox/groups.jsonl"
    if not folder.is_dir():
        tokenizer, config = data.get_tokenizer("gpt2"), s.config()
        texts = [t for g in data.load_groups(groups)["train"] for t in g.positives]
        ids = torch.tensor([t for text in texts for t in data.frame(text, tokenizer, 128)[1:]])
        config.vocab_size = tokenizer.n_vocab
        count = torch.bincount(ids, minlength=tokenizer.n_vocab) + 0.001
        count[tokenizer.eot_token] *= 0.1  # longer texts, as GPT-2 writes them
        like_trained(build(config), (count / count.sum()).log() - 60).save_pretrained(folder)
    if not s.small:
        return [f"--init_from={folder}"]
    few = [g for split in data.load_groups(groups).values() for g in split[:8]]
    (s.folder / "few.jsonl").write_text("".join(json.dumps(vars(g)) + "\n" for g in few))
    sizes = ["--max_steps=6", "--eval_samples=5", "--sample_tokens=1", "--anchor_texts=32", "--anchor_tokens=8"]
    return [f"--init_from={folder}", f"--data={s.folder / 'few.jsonl'}", *sizes]


def trained(s, name, dtype, seconds, compile="no"):
    """One run of train.py with configs/gpt2_cp.py -> what to report of it. Times in seconds."""
    report, text, folder = s.folder / f"{name}.json", s.folder / f"{name}.txt", s.folder / name
    flags = ["configs/gpt2_cp.py", f"--out_dir={folder}", *starting_point(s), f"--device={s.device.type}"]
    command = [sys.executable, __file__, "worker", str(report), *flags]
    began = time.time()
    with open(text, "w") as f:
        how = dict(stdout=f, stderr=subprocess.STDOUT, cwd=ROOT, start_new_session=True)
        how["env"] = os.environ | {"TORCH_LOGS": "recompiles", "PYTHONUNBUFFERED": "1"}
        process = subprocess.Popen([*command, f"--dtype={dtype}", f"--compile={compile}"], **how)
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = f"killed after {seconds:.0f} s"
        finally:
            if process.poll() is None:  # with its children: a compiler has some
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    lines = [x for x in text.read_text(errors="replace").replace("\r", "\n").splitlines() if x.strip()]
    row = dict(exit=code, seconds=time.time() - began) | (json.loads(report.read_text()) if report.is_file() else {})
    row |= dict(imports=row.pop("began") - began) if "began" in row else {}
    row["device"] = next((line[13:] for line in lines if line.startswith("device  ")), "")
    row |= {word: sum(word in line for line in lines) for word in ("Recompiling", "recompile_limit")}
    shutil.rmtree(folder, ignore_errors=True)  # gigabytes
    return row if code == 0 else row | dict(verdict="FAILED", last_lines=lines[-12:])


def training(s, out):
    """configs/gpt2_cp.py in each dtype."""
    if note := no_tokenizer():
        out["all"] = note
        return
    for dtype in ("bfloat16", "float16", "float32") if s.cuda else ("float32",):
        out[dtype] = trained(s, dtype, dtype, 60)


def compiled(s, out):
    """The same with torch.compile. Last of all, since nobody knows how long a compiler takes."""
    note = no_tokenizer() if s.cuda else ONLY_CUDA
    out["bfloat16"] = note or trained(s, "compiled", "bfloat16", min(100, left() - 3), compile="yes")


# --------------------------------------------------------------------------------------------------------------------
# speeds


def stepper(s, model, loss):
    """One whole optimiser step as a function; loss() runs under bf16 autocast."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=True)

    def step():
        with amp(s.device, BF16):
            value = loss()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def rated(s, run, tokens, T, c):
    """Speed of a step that scores so many tokens of T positions. Its share of the card's rate counts, forward and
    backward, two operations per weight and causal attention; what is computed twice does not count twice."""
    row = speed(s, run)
    flop = 6 * (12 * c.n_layer * c.n_embd**2 + c.vocab_size * c.n_embd) + 6 * c.n_layer * c.n_embd * T
    per_second = tokens / (row["median_ms"] / 1000)
    return row | dict(tokens_per_second=per_second, share=per_second * flop / s.rate)


def plain_model(s, **dtype):
    from transformers import GPT2Config, GPT2LMHeadModel

    no_dropout = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    shape = vars(s.config()) | dict(bos_token_id=s.config().vocab_size - 1, eos_token_id=s.config().vocab_size - 1)
    return GPT2LMHeadModel(GPT2Config(**shape, **no_dropout)).to(s.device, **dtype)


def plain_nll(model, idx, lengths):
    """The scores as everybody writes them: the whole rectangle, all logits, cross-entropy in fp32."""
    mask = torch.arange(idx.size(1), device=idx.device) < lengths.to(idx.device)[:, None]
    logits = model(idx, attention_mask=mask.long()).logits[:, :-1].float()
    nll = F.cross_entropy(logits.flatten(0, 1), idx[:, 1:].flatten(), reduction="none").view(len(idx), -1)
    return (nll * mask[:, 1:]).sum(1) / mask[:, 1:].sum(1)


def step(s, out):
    """The contrastive step by model size, in bf16 and not compiled, with LoRA, with attention over the rectangle of all
    rows, and beside transformers."""
    out["matrix rate"] = dict(tflops=s.rate / 1e12)
    idx, lengths = sentences(G * (P + N), 8, 40, s.config().vocab_size)
    tokens, T = int((lengths - 1).sum()), float(lengths.float().mean())
    out["attention over packed rows"] = str(bool(engine.attention.varlen(s.device, 64)))
    for name in (*SHAPES, "LoRA", "rectangle", "transformers"):
        config = s.config(name if name in SHAPES else "gpt2")
        if name == "transformers":
            model, short = plain_model(s), idx[:, : int(lengths.max())].to(s.device)
            run = stepper(s, model, lambda model=model, short=short: contrast(plain_nll(model, short, lengths)))
        else:
            model = build(config, s.device)
            if name == "LoRA":
                model.add_lora(8, 16.0)
            loss = lambda m=model: contrast(m.sequence_nll(idx.to(s.device, non_blocking=True), lengths))  # noqa: E731
            run = stepper(s, model, loss)
        rectangle = patch.object(engine.attention, "varlen", lambda device, width: None)
        with rectangle if name == "rectangle" else nullcontext():
            out[name] = rated(s, run, tokens, T, config)
        if name in ("gpt2", "transformers"):
            out[f"{name}, calls"], out[f"{name}, waits"] = counted(s, run), waits(s, run)
        model = run = loss = None
        s.drop()
    ratio = out["gpt2"]["tokens_per_second"] / out["transformers"]["tokens_per_second"]
    out["gpt2 / transformers"] = dict(speed=ratio)


def lm(s, out):
    """Language modelling on whole contexts, as it is and compiled."""
    config, (B, T) = s.config(), (2, 64) if s.small else (8, 1024)
    idx = torch.randint(0, config.vocab_size, (B, T + 1), generator=torch.Generator().manual_seed(0)).to(s.device)
    lengths, model = torch.full((B,), T + 1), build(config, s.device)
    run = stepper(s, model, lambda: token_mean(model.sequence_nll(idx, lengths), (lengths - 1).to(s.device)))
    out["as it is"] = rated(s, run, B * T, T, config)
    out["calls"] = counted(s, run)
    shipped = head.CHUNK
    for power in (20, 22, 24) if s.cuda else (10,):  # on CUDA a chunk is eight times as large
        head.CHUNK = 2**power
        out[f"chunks of 2**{power + 3 * s.cuda}"] = rated(s, run, B * T, T, config)
    head.CHUNK = shipped
    if s.cuda:
        model.compiled_hidden = torch.compile(model.hidden)
    out["compiled"] = rated(s, run, B * T, T, config) if s.cuda else ONLY_CUDA


def sampling(s, out):
    """Tokens per second at 256 and 2,048 rows, under bf16 autocast, beside transformers' generate in bf16."""
    V, T, few = s.config().vocab_size, 16, 8 if s.small else 256
    model = like_trained(build(s.config(), s.device), zipf(V), sharp=6.0)
    prompts = torch.randint(0, V, (2048, T), generator=torch.Generator().manual_seed(0)).to(s.device)

    def ours(rows, samples, new=s.new):
        generator, lengths = torch.Generator().manual_seed(0), torch.full((rows // samples,), T)
        with amp(s.device, BF16):
            model.generate(prompts[: len(lengths)], lengths, new, 1.0, 0, 0.9, None, generator, samples)

    def row(function, rows):
        m = speed(s, function, warm=1, n=3)
        rate = rows * s.new / (m["median_ms"] / 1000)
        return m | dict(tokens_per_second=rate, seconds_for_500k_tokens=25 * 1000 * 20 / rate)

    for rows, samples in ((few, 8), (few, 1), (8 * few, 8), (8 * few, 1)):
        out[f"{rows} rows, {samples} a prompt"] = row(lambda r=rows, k=samples: ours(r, k), rows)
    out["4 tokens, calls"] = counted(s, lambda: ours(few, 8, 4))
    out["4 tokens, waits"] = waits(s, lambda: ours(few, 8, 4), tokens=4)
    plain, idx = plain_model(s, dtype=BF16).eval(), prompts[:few]
    how = dict(do_sample=True, top_p=0.9, top_k=0, max_new_tokens=s.new, min_new_tokens=s.new, pad_token_id=0)
    call = lambda: plain.generate(idx, attention_mask=torch.ones_like(idx), **how)  # noqa: E731
    out[f"{few} rows, transformers"] = row(call, few)


def attention(s, out):
    """Each backend on a step's rectangle and on one new token of many rows. cuDNN makes a plan for every new shape."""
    B, nh, hs = (4, 2, 32) if s.small else (60, 12, 64)
    cases = {"causal": (40, 40), "causal, new T": (48, 48), "masked": (40, 40), "one token": (1, 37)}
    cases |= {"one token, new T": (1, 38)}
    for name, (T, Tk) in cases.items():
        q, k, v = torch.randn(B, Tk, 3, nh, hs, device=s.device, dtype=BF16, requires_grad=True).unbind(2)
        qkv, causal = [x.transpose(1, 2) for x in (q[:, :T], k, v)], name.startswith("causal")  # as model.py has them
        mask = None if causal else torch.ones(B, 1, T, Tk, dtype=torch.bool, device=s.device).tril(Tk - T)
        for backend in ("default", "FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH", "CUDNN_ATTENTION"):
            chosen = nullcontext() if backend == "default" else sdpa_kernel(getattr(SDPBackend, backend))
            with warnings.catch_warnings(), chosen:
                warnings.simplefilter("ignore")  # they say why a backend cannot; one line of the error is enough
                try:
                    row = attended(s, qkv, mask)
                except RuntimeError as e:
                    row = first_line(e)
                with suppress(Exception):  # a private function, which may go
                    if backend == "default":
                        row["takes"] = SDPBackend(torch._fused_sdp_choice(*qkv, mask, 0.0, causal)).name
            out[f"{name}, {backend.split('_')[0].lower()}"] = row
    try:
        from torch.nn.attention.varlen import varlen_attn

        out["varlen_attn"] = f"there: {inspect.signature(varlen_attn)}"
    except ImportError as e:
        out["varlen_attn"] = first_line(e)


def attended(s, qkv, mask):
    call = lambda: F.scaled_dot_product_attention(*qkv, mask, is_causal=mask is None)  # noqa: E731

    def both():
        y = call()
        torch.autograd.grad(y, qkv, torch.ones_like(y))

    with torch.no_grad():
        row = speed(s, call)
    if qkv[0].size(2) > 1:
        row |= {f"both_{name}": value for name, value in speed(s, both).items()}
    return {name: value for name, value in row.items() if name.endswith("ms")}


# --------------------------------------------------------------------------------------------------------------------
# the whole


SECTIONS = dict(scores=40, gradients=40, generate=40, training=160)  # seconds after which each is stopped
SECTIONS |= dict(step=60, lm=80, sampling=45, attention=20, compiled=105)


def left():
    return LIMIT - (time.time() - BEGAN)


def machine(s):
    known = dict(device=str(s.device), small=s.small, python=sys.version.split()[0], torch=torch.__version__)
    known |= dict(cores=os.cpu_count(), threads=torch.get_num_threads())
    if s.cuda:
        p, cuda = torch.cuda.get_device_properties(0), torch.backends.cuda
        known |= dict(name=p.name, memory_gb=p.total_memory / 2**30, cuda=torch.version.cuda)
        known |= dict(cudnn=torch.backends.cudnn.version(), cudnn_attention=cuda.cudnn_sdp_enabled())
        known |= dict(tf32=cuda.matmul.allow_tf32, fp32_products=torch.get_float32_matmul_precision())
        known |= dict(bf16_reduction=cuda.matmul.allow_bf16_reduced_precision_reduction)
    return known


def run_section(s, name):
    """{'seconds', 'results', and 'error' and 'traceback' if it failed}. What it had found by then is kept."""

    def ring(*_):
        raise OutOfTime(f"stopped after {time.time() - start:.0f} s")

    results, start, failed = {}, time.time(), {}
    try:
        if left() < 10:
            raise OutOfTime("no time was left for it")
        signal.signal(signal.SIGALRM, ring)
        signal.setitimer(signal.ITIMER_REAL, min(SECTIONS[name], left()), 10)  # again, should the first one be lost
        globals()[name](s, results)
    except (Exception, OutOfTime) as e:
        signal.setitimer(signal.ITIMER_REAL, 0)
        failed = dict(error=first_line(e), traceback=traceback.format_exc().splitlines()[-14:])
    signal.setitimer(signal.ITIMER_REAL, 0)
    s.drop()
    return dict(seconds=time.time() - start, results=results) | failed


def tidy(x):
    """What JSON can hold: tensors become numbers, numbers keep five digits, nan and infinity become words."""
    if isinstance(x, dict):
        return {k: tidy(v) for k, v in x.items()}
    if isinstance(x, list):
        return [tidy(v) for v in x]
    x = x.item() if isinstance(x, torch.Tensor) else x
    return x if not isinstance(x, float) else float(f"{x:.5g}") if math.isfinite(x) else str(x)


def table(result):
    """All of it as lines of at most 100 columns."""
    lines = []
    for section, row in {"machine": {"results": {"": result["machine"]}}, **result["sections"]}.items():
        lines += ["", section + (f", {row['seconds']} s" if "seconds" in row else "")]
        for name, value in row["results"].items():
            value = value if isinstance(value, dict) else {"": value}
            text = "  ".join(f"{k} {v}".strip() for k, v in value.items() if not isinstance(v, list))
            lines += textwrap.wrap(f"  {name:32} {text}", 100, subsequent_indent=" " * 35)
            lines += [f"      {item}"[:100] for v in value.values() if isinstance(v, list) for item in v]
        if "error" in row:
            lines += [line[:100] for line in (f"  FAILED: {row['error']}", *(f"    {x}" for x in row["traceback"]))]
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--small", action="store_true", help="tiny sizes: does everything run?")
    parser.add_argument("--out", help="file for all results, JSON")
    parser.add_argument("--sections", default=",".join(SECTIONS), help="some of them, with commas (default: all)")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("no GPU here: --device=cpu --small runs all that needs none")
    if unknown := set(args.sections.split(",")) - set(SECTIONS):
        parser.error(f"no section {unknown.pop()!r}: {', '.join(SECTIONS)}")
    os.environ["HF_HUB_OFFLINE"] = "1"
    if "TIKTOKEN_CACHE_DIR" in os.environ:  # train.py runs in the project's folder
        os.environ["TIKTOKEN_CACHE_DIR"] = str(Path(os.environ["TIKTOKEN_CACHE_DIR"]).resolve())
    keep_freed_memory()
    bad = 0
    with tempfile.TemporaryDirectory() as folder:
        s = Bench(pick_device(args.device), args.small, folder)
        result = {"machine": machine(s), "sections": {}}
        for name in [name for name in SECTIONS if name in args.sections.split(",")]:
            result["sections"][name] = row = tidy(run_section(s, name))
            bad += "error" in row
            bad += sum(
                isinstance(x, dict) and x.get("verdict") in ("DIFFERS", "FAILED") for x in row["results"].values()
            )
            print(f"== {name}, {row['seconds']} s", flush=True)
            if args.out:
                Path(args.out).write_text(
                    json.dumps(tidy(result) | {"bad": bad, "seconds": time.time() - BEGAN}, indent=1)
                )
    print(table(tidy(result)))
    print(f"\n{time.time() - BEGAN:.0f} s in all; {bad or 'nothing'} failed or differ{'' if bad else 's'}")
    sys.exit(bool(bad))


if __name__ == "__main__":
    worker(*sys.argv[2:]) if sys.argv[1:2] == ["worker"] else main()
