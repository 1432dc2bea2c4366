"""Speed and memory on a CPU: each job here, and as one writes it plainly with transformers.

    python tests/bench.py                            # everything; a quiet machine with 16 GB
    python tests/bench.py --jobs=cp,lambada          # only the jobs whose names begin so
    python tests/bench.py --small --rounds=1         # tiny sizes: does everything run?

Each side of a job is a process of its own, which loads the model and runs one round that does not count. Then the
sides take turns, so that a machine that gets slower favours neither; while one runs, the others wait. Figures are
medians over the rounds, of ratios too; memory is the most that was resident in a round, without what loading takes.
Weights are random, of GPT-2's size and the same on both sides. Losses and task results must agree.

Of the matrix rate, the speed of one large product, a side reaches the share that these operations make up: 2 per
weight of the blocks for a token that is read, 2 per weight of the output head for one that is scored or drawn. A
training step takes three times as many. What many rows begin with could be read once and counts once, on both sides.
"""

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from statistics import mean, median
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch.utils.benchmark import Timer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gpu import plain_nll

import data
import train
from configs import ROOT, load_config
from engine.device import amp, keep_freed_memory
from engine.run import versions
from measures import Setup
from measures.tasks import measure_task, read_task, split_tokens
from model import GPT, GPTConfig

CPU, FP32, BF16 = torch.device("cpu"), torch.float32, torch.bfloat16

# A job is a pair of functions, ours(s, dtype, ...) and plain(s, dtype, ...), where s holds the flags. They load the
# model and return the function of one round. That one returns `units`, how many of the job's units it did, and, ours,
# their `flop`; where both sides must come to the same, also a `value`; and `seconds` if it has a clock of its own.


def shape(s):
    return GPTConfig(n_positions=128, n_embd=64, n_layer=2, n_head=2) if s.small else GPTConfig()


def draw(s, *size):
    """The same random tokens in every process."""
    return torch.randint(0, shape(s).vocab_size, size, generator=torch.Generator().manual_seed(0))


def transformers_model(s):
    from transformers import GPT2LMHeadModel

    return GPT2LMHeadModel.from_pretrained(s.model).float().eval()  # without dropout, as here


def flop(model, read, scored):
    """Operations forward, for so many tokens."""
    head = model.transformer.wte.weight.numel()
    return 2 * (model.num_parameters() - head - model.transformer.wpe.weight.numel()) * read + 2 * head * scored


# ---- training steps: forward, backward, clipping, AdamW ------------------------------------------------------------


def step_ours(s, dtype, objective, model=None):
    """cp: 6 groups of 5 + 5 sentences of 8 to 40 tokens and both end tokens, all weights trained, no anchors.
    lm: three texts as long as the context."""
    model = model or GPT.from_pretrained(s.model)
    without = ["--hold_weight=0", "--anchor_kl=0", "--lora_rank=0", "--nll_weight=1"]
    flags = ["configs/gpt2_cp.py", *without] if objective == "cp" else ["--objective=lm", "--batch_size=3"]
    config = load_config("train", flags)
    lengths = torch.full((3,), shape(s).n_positions)
    if objective == "cp":
        config.batch_size = 1 if s.small else 6
        rows = config.batch_size * (config.n_pos + config.n_neg)
        lengths = torch.randint(10, 43, (rows,), generator=torch.Generator().manual_seed(0))
    rows = draw(s, len(lengths), int(lengths.max())).tolist()
    idx, lengths = data.pad([row[:n] for row, n in zip(rows, lengths.tolist(), strict=True)])
    batch = data.Batch(["random"] * config.batch_size, idx, lengths, weight=1)
    setup, scaler = Setup({}, None, None, CPU, dtype), torch.amp.GradScaler("cpu", enabled=False)
    run = train.Run(config, None, setup, model, None, train.make_optimizer(model, config), scaler, None, None, None)
    operations = 3 * flop(model, batch.tokens, batch.tokens)

    def one():
        loss = train.backward(run, [batch])["loss"]
        train.update(run, [batch], 1e-5)
        return dict(units=batch.tokens, flop=operations, value=loss)

    return one


class Plain(NamedTuple):
    """In the place of model.States: the rows themselves."""

    idx: torch.Tensor
    lengths: torch.Tensor
    count: torch.Tensor

    def split(self, _):
        return self, None


def step_plain(s, dtype, objective):
    model = transformers_model(s)
    model.read = lambda idx, lengths, start: Plain(idx[:, : int(lengths.max())], lengths, lengths - 1)
    model.nll = lambda rows: plain_nll(model, rows.idx, rows.lengths)
    return step_ours(s, dtype, objective, model)


# ---- sampling: `new` tokens behind prompts of 32 -------------------------------------------------------------------
# `before` are what data_gen.py's demonstrations take, with which all its prompts begin. There a round is one block of
# seeds under one of the two prompts; plain code takes one sentence after the other, and its round is one of them.


def sample_ours(s, dtype, rows, samples=1, new=64, before=0):
    model, idx, new = GPT.from_pretrained(s.model), draw(s, rows // s.part, 32 // s.part), new // s.part
    lengths, n = torch.full((len(idx),), idx.size(1)), len(idx) * samples
    with amp(CPU, dtype):  # data_gen.py reads it once a run: not part of a round
        prefix = model.read_prefix(draw(s, before // s.part).tolist()) if before else None

    def one():
        with amp(CPU, dtype):
            model.generate(idx, lengths, new, top_p=0.9, samples=samples, prefix=prefix)
        return dict(units=n * new, flop=flop(model, idx.numel() + n * (new - 1), n * new))

    return one


def sample_plain(s, dtype, rows, samples=1, new=64, before=0):
    model, idx, new = transformers_model(s), draw(s, rows // s.part, 32 // s.part), new // s.part
    idx = torch.cat([draw(s, before // s.part), idx[0]])[None] if before else idx
    model.generation_config.eos_token_id = None  # so that every sample has all its tokens
    how = dict(do_sample=True, top_p=0.9, top_k=0, pad_token_id=0, num_return_sequences=samples, max_new_tokens=new)

    def one():
        with amp(CPU, dtype):
            out = model.generate(idx, attention_mask=torch.ones_like(idx), **how)
        return dict(units=len(out) * (out.size(1) - idx.size(1)))

    return one


# ---- tasks: 64 items of LAMBADA or PIQA ----------------------------------------------------------------------------


def task_items(s, task):
    """(tokenizer, items as of read_task). Made-up ones are as long as the published ones: contexts of LAMBADA have
    82 ± 13 of GPT-2's tokens and those of PIQA 10.5 ± 4, PIQA's choices 24 ± 24."""
    rng, n = random.Random(0), 64 // s.part
    if file := getattr(s, task):
        items = read_task(file)
        return data.get_tokenizer("gpt2"), rng.sample(items, min(n, len(items)))
    # Their texts are numbers, so that they need no vocabulary, which would have to be downloaded.
    numbers = SimpleNamespace(eot_token=0, encode_ordinary=lambda text: [int(word) for word in text.split()])
    text = lambda n: " ".join(str(rng.randrange(1, shape(s).vocab_size)) for _ in range(n))
    about = lambda mu, sigma: text(max(2, min(shape(s).n_positions // 3, round(rng.lognormvariate(mu, sigma)))))
    if task == "lambada":
        return numbers, [(about(4.4, 0.15), [text(rng.choices((1, 2, 3), (78, 18, 4))[0])], None) for _ in range(n)]
    return numbers, [(about(2.3, 0.4), [about(2.8, 0.8), about(2.8, 0.8)], rng.randrange(2)) for _ in range(n)]


def task_ours(s, dtype, task):
    model, (tokenizer, items) = GPT.from_pretrained(s.model), task_items(s, task)
    pairs = [[split_tokens(tokenizer, context, " " + c) for c in choices] for context, choices, _ in items]
    scored = sum(len(choice) for row in pairs for _, choice in row)
    read = scored + sum(len(row[0][0]) - len(row) for row in pairs)  # a context once; of a choice not the last token

    def one():
        with amp(CPU, dtype):
            value = measure_task(model, tokenizer, items)["ppl" if task == "lambada" else "acc"].mean()
        return dict(units=len(items), flop=flop(model, read, scored), value=value)

    return one


def task_plain(s, dtype, task):
    """For every item and choice one forward pass with all logits."""
    model, (tokenizer, items) = transformers_model(s), task_items(s, task)

    @torch.no_grad()
    def nll(context, choice):
        context, target = split_tokens(tokenizer, context, " " + choice)
        idx = torch.tensor([[*context, *target][-(model.config.n_positions + 1) : -1]])
        with amp(CPU, dtype):
            logp = model(idx).logits[0, -len(target) :].float().log_softmax(-1)
        return -logp.gather(1, torch.tensor(target)[:, None]).double().sum().item()

    def one():
        scored = [[nll(context, choice) for choice in choices] for context, choices, _ in items]
        right = [row.index(min(row)) == gold for row, (*_, gold) in zip(scored, items, strict=True)]
        return dict(units=len(items), value=mean(row[0] for row in scored) if task == "lambada" else mean(right))

    return one


def start(s, dtype):
    """From `python train.py` to the line of the first step in the log: imports, data, a validation, that step."""

    def one():
        with tempfile.TemporaryDirectory() as folder:
            log, began = Path(folder, "run/log.jsonl"), time.perf_counter()
            command = [sys.executable, "train.py", "configs/toy_base.py", f"--out_dir={log.parent}", "--device=cpu"]
            with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) as process:
                while not (log.is_file() and '"train"' in log.read_text()):
                    assert process.poll() is None, "train.py ended before its first step"
                    time.sleep(0.01)
                row = dict(units=1, seconds=time.perf_counter() - began, peak_mb=peak_mb(process.pid))
                process.kill()
        return row

    return one


# ---- processes that take turns -------------------------------------------------------------------------------------

SIDES = ("here", "plain", "kept")  # the last one is plain with the allocator told to keep freed memory, as ours is
CP = (step_ours, step_plain, step_plain)
LM, SAMPLE, TASK = CP[:2], (sample_ours, sample_plain), (task_ours, task_plain)
JOBS = {  # title, unit, functions, dtype, what else they take
    "cp-fp32": ("CP step, fp32", "scored tokens/s", CP, FP32, dict(objective="cp")),
    "cp-bf16": ("CP step, bf16", "scored tokens/s", CP, BF16, dict(objective="cp")),
    "lm-bf16": ("lm step, bf16", "scored tokens/s", LM, BF16, dict(objective="lm")),
    "sample16-fp32": ("sampling, 16 rows, fp32", "tokens/s", SAMPLE, FP32, dict(rows=16)),
    "sample16-bf16": ("sampling, 16 rows, bf16", "tokens/s", SAMPLE, BF16, dict(rows=16)),
    "sample128-fp32": ("sampling, 128 rows, fp32", "tokens/s", SAMPLE, FP32, dict(rows=128)),
    "sample128-bf16": ("sampling, 128 rows, bf16", "tokens/s", SAMPLE, BF16, dict(rows=128)),
    "groups-bf16": ("data_gen.py, bf16", "tokens/s", SAMPLE, BF16, dict(rows=16, samples=16, new=32, before=600)),
    "lambada-fp32": ("LAMBADA, fp32", "items/s", TASK, FP32, dict(task="lambada")),
    "piqa-fp32": ("PIQA, fp32", "items/s", TASK, FP32, dict(task="piqa")),
    "start": ("start to first step", "s", (start,), None, {}),
}


def peak_mb(process="self"):
    """Most memory that was resident, in MB of 2^20 bytes; None where there is no /proc."""
    with suppress(OSError):
        return int(re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{process}/status").read_text())[1]) / 1024


def child(name, side, flags):
    """Load the model, then run a round for every line that comes in. What a round gave goes out as a line of JSON."""
    replies, sys.stdout = sys.stdout, sys.stderr  # where libraries may print
    _, _, functions, dtype, how = JOBS[name]
    if side != "plain":
        keep_freed_memory()
    one = functions[SIDES.index(side)](SimpleNamespace(**json.loads(flags)), dtype, **how)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak of memory begins anew
    for _ in sys.stdin:
        began = time.perf_counter()
        row = one()
        row = dict(seconds=time.perf_counter() - began, peak_mb=peak_mb()) | row
        print(json.dumps(row | dict(per_second=row["units"] / row["seconds"])), file=replies, flush=True)


def launch(name, side, s):
    """The process of a side."""
    quiet = dict(TQDM_DISABLE="1", TRANSFORMERS_VERBOSITY="error", HF_HUB_OFFLINE="1")
    env = os.environ | quiet | dict(OMP_NUM_THREADS=str(torch.get_num_threads()))  # of train.py as well
    command = [sys.executable, __file__, "child", name, side, json.dumps(vars(s))]
    return subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def ask(process):
    """One round of a side."""
    print("go", file=process.stdin, flush=True)
    line = process.stdout.readline()
    return json.loads(line) if line else sys.exit(f"bench.py: {' '.join(process.args[3:5])} ended early, see above")


def matrix_rate(dtype, n):
    """GFLOP per second of an (n, n) product."""
    a, b = torch.randn(2, n, n).to(dtype)
    timer = Timer("a @ b", globals=dict(a=a, b=b), num_threads=torch.get_num_threads())
    return 2e-9 * n**3 / timer.timeit(3).median


def measure(name, s):
    """All rounds of a job -> its row of the report."""
    title, unit, functions, dtype, _ = JOBS[name]
    sides, rates, processes = SIDES[: len(functions)], [], {}
    rounds = {side: [] for side in sides}
    try:
        processes |= {side: launch(name, side, s) for side in sides}
        first = {side: ask(process) for side, process in processes.items()}
        for i in range(s.rounds):
            rates += [matrix_rate(dtype, 256 if s.small else 2048)] if dtype else []
            for side in sides[:: -1 if i % 2 else 1]:
                rounds[side].append(ask(processes[side]))
    finally:
        for process in processes.values():
            process.kill()
            process.wait()
    row = dict(title=title, unit=unit, gflop_per_second=median(rates) if rates else None)
    for side, ms in rounds.items():
        row[side] = m = {key: median(x[key] for x in ms) for key in ("seconds", "per_second")}
        m["peak_mb"] = ms[-1]["peak_mb"]
        if rates:
            m["share"] = m["per_second"] * first["here"]["flop"] / first["here"]["units"] / median(rates) / 1e9
        if side != "here":
            m["ratios"] = [a["per_second"] / b["per_second"] for a, b in zip(rounds["here"], ms, strict=True)]
            m["ratio"] = median(m["ratios"])
    if "value" in first["here"]:
        a, b = row["values"] = [first[side]["value"] for side in ("here", "plain")]
        row["agree"] = abs(a - b) <= (1e-3 if dtype == FP32 else 0.02) * abs(a)
    return row


def table(rows):
    """At most 100 columns wide."""
    lines = [f"{'':58}{'times as fast':16}{'memory, MB':>14}{'of the rate':>12}"]
    lines += [f"{'here':>48}{'plain':>8}  {'(lowest-highest)':16}{'here':>7}{'plain':>7}{'here':>6}{'plain':>6}"]
    cell = lambda m, key, form, width: f"{format(m[key], form) if m.get(key) is not None else '':>{width}}"
    for row in rows:
        key = "seconds" if row["unit"] == "s" else "per_second"
        for side in [side for side in ("plain", "kept") if side in row] or [None]:
            both = row["here"], row.get(side, {})
            title = "  ... where plain keeps freed memory" if side == "kept" else f"{row['title']:24} {row['unit']}"
            ratio = (
                "{:.2f} ({:.2f}-{:.2f})".format(*(f(row[side]["ratios"]) for f in (median, min, max))) if side else ""
            )
            cells = [*(cell(m, key, ",.1f", 8) for m in both), f"  {ratio if row.get('agree', True) else 'DIFFER':16}"]
            cells += [*(cell(m, "peak_mb", ",.0f", 7) for m in both), *(cell(m, "share", ".0%", 6) for m in both)]
            lines.append(f"{title:40}" + "".join(cells))
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", default="", help=f"beginnings of names, with commas: {', '.join(JOBS)}")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--small", action="store_true", help="tiny sizes: does everything run?")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of every process (%(default)s)")
    parser.add_argument("--lambada", help="file of items as measures/README.md describes it, in place of made-up ones")
    parser.add_argument("--piqa", help="the same")
    s = parser.parse_args()
    if unknown := [word for word in s.jobs.split(",") if not any(name.startswith(word) for name in JOBS)]:
        parser.error(f"no job {unknown[0]!r}: {', '.join(JOBS)}")
    torch.set_num_threads(s.threads)
    torch.manual_seed(0)
    began, rows, s.part = time.time(), {}, 8 if s.small else 1
    with tempfile.TemporaryDirectory() as s.model:
        GPT(shape(s)).save_pretrained(s.model)
        for name in [name for name in JOBS if name.startswith(tuple(s.jobs.split(",")))]:
            rows[name] = measure(name, s)
            print(f"{name} is done, {time.time() - began:.0f} s", file=sys.stderr)
    print(table(rows.values()))
    rates = [(str(JOBS[name][3])[6:], row["gflop_per_second"]) for name, row in rows.items() if JOBS[name][3]]
    print(", ".join(["the rate", *(f"{rate:,.0f} GFLOP/s in {dtype}" for dtype, rate in dict(rates).items())]))
    known = dict(small=s.small, rounds=s.rounds, threads=s.threads, cores=os.cpu_count(), seconds=time.time() - began)
    print(json.dumps(known | dict(versions=versions(), jobs=rows)))
    sys.exit(not all(row.get("agree", True) for row in rows.values()))


if __name__ == "__main__":
    child(*sys.argv[2:]) if sys.argv[1:2] == ["child"] else main()
