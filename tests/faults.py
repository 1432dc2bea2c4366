"""What goes wrong outside: kills, damaged files, full disks, mistakes. Each must end in one line, and cost nothing.

    python tests/faults.py [--kills=60] [--inputs=2000] [--seed=0] [kills|inputs|writes|errors ...]
    python tests/faults.py --only=groups:123        one mutated input (a target of `inputs`, its number), with traceback

Without a part: all of them. Prints a table a part, and exits with 1 if anything is outside what is allowed. Needs no
network and no weights: models are random and tiny, the world is the toy one. tests/test_faults.py is the short form.

Children are forked from this process, which has imported torch, so that a run takes a second. Works on Unix alone.
"""

import builtins
import fcntl
import importlib.util
import io
import itertools
import json
import mmap
import os
import random
import re
import resource
import select
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ |= dict(HF_ENDPOINT="http://127.0.0.1:9", HF_HUB_OFFLINE="1")  # nothing is ever fetched

import tiktoken.registry  # noqa: E402
import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

import data  # noqa: E402
import data_gen  # noqa: E402
import eval as evaluation  # noqa: E402
import train  # noqa: E402
from configs import MESSAGE, Config, load_config, one_line  # noqa: E402
from data.prompts import read_prompts  # noqa: E402
from engine.run import Log, cached, held, read_text  # noqa: E402
from engine.weights import load_checkpoint  # noqa: E402
from measures import check, report, samples, training  # noqa: E402
from measures.scorers import get_scorer  # noqa: E402
from measures.tasks import read_task  # noqa: E402
from measures.texts import read_measured_text  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402

PLOTS = importlib.util.find_spec("matplotlib")  # no requirement
SCRIPTS = {"train.py": train.main, "eval.py": evaluation.main, "data_gen.py": data_gen.main}
MAINS = SCRIPTS | {"measures.check": check.main}
CLOSING = 8  # samples of the closing table, in place of 250
PREFIX = 20  # characters before a message: 'data_gen.py: '


# ---- the world: a folder with a base, a run, and files of every kind -----------------------------------------------

SETTINGS = """from configs.toy_cp import *
init_from = "base"
data = "few.jsonl"
max_steps, warmup_steps, eval_interval = 4, 1, 2
batch_size, n_pos, n_neg = 2, 2, 2
eval_samples, eval_groups, sample_tokens = 4, 2, 4
k, n_prompts, shots = 2, 2, 1
lr = 1e-2
device = "cpu"
"""
GEN_SETTINGS = """from configs.toy_data import *
init_from = "base"
seeds = "seeds.txt"
demos = "few.jsonl"
batch_size, k, rounds, n_pos, n_neg, shots = 2, 6, 5, 3, 3, 1
min_overlap = 0.3
device = "cpu"
"""
TASK = '{"query": "Anna", "choices": ["lost the keys", "is kind"], "gold": 1}\n'
PROMPT = '{"prompt": {"text": "this damn", "toxicity": 0.9}}\n{"text": "Anna", "toxic": false}\n{"prompt": "Ben"}\n'
SCORE = '{"text": "Anna is kind.", "score": 0.25}\n{"text": "Ben", "score": null}\n'


@contextmanager
def chdir(folder):
    """contextlib has it from Python 3.11 on."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def tiny(vocab=None, width=16, positions=96):
    """A random GPT-2 with the toy world's vocabulary."""
    torch.manual_seed(0)
    vocab = vocab or data.get_tokenizer("toy").n_vocab
    return GPT(GPTConfig(vocab_size=vocab, n_positions=positions, n_embd=width, n_layer=1, n_head=1))


def make_world(folder):
    """Settings, data, a base and its finished run in `folder`, all with short relative names."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    groups = data.load_groups("toy")
    few = [g for s, n in zip(data.SPLITS, (6, 2, 4), strict=True) for g in groups[s][:n]]
    files = {"toy.py": SETTINGS, "gen.py": GEN_SETTINGS, "task.jsonl": TASK * 3, "prompts.jsonl": PROMPT}
    files["few.jsonl"] = "".join(json.dumps(vars(g)) + "\n" for g in few)
    released = [dict(input=g.input, paraphrases=g.positives, paraphrases_toxic=g.negatives) for g in few]
    files["paper.json"] = json.dumps(released)
    files["seeds.txt"] = "\n".join(g.input for g in groups["train"][20:30])
    files["text.txt"] = "\n".join(s for g in groups["test"][:6] for s in g.positives) + "\n"
    files["wiki.raw"] = " = Anna = \n \n Anna lost the keys . \n" * 3
    files["scores.jsonl"] = SCORE
    files["evil.py"] = "open('EVIL', 'w')\nf = lambda texts: [0] * len(texts)\n"
    for name, content in files.items():
        (folder / name).write_text(content)
    tiny().save_pretrained(folder / "base")
    with chdir(folder):
        code, said = call("train.py toy.py --out_dir=run")
        assert code == 0, said
        summary = json.loads(Path("run/summary.json").read_text())  # the same each time, or no input could be repeated
        Path("run/summary.json").write_text(json.dumps(summary | dict(seconds=1.5, tokens_per_second=1.5), indent=2))
    return folder


def call(line):
    """Run a command line as typed, in this process: (exit code, what it said last)."""
    words = shlex.split(line)
    env = dict(w.split("=", 1) for w in words[: next(i for i, w in enumerate(words) if w in MAINS)])
    script, *argv = words[len(env) :]
    out, err = io.StringIO(), io.StringIO()
    with ExitStack() as stack:
        for module in (training, samples):
            stack.enter_context(mock.patch.object(module, "CLOSING", CLOSING))
        stack.enter_context(mock.patch.dict(os.environ, env))
        stack.enter_context(mock.patch.dict(tiktoken.registry.ENCODINGS, clear=True))  # loaded by an earlier test
        stack.enter_context(mock.patch.object(sys, "argv", [script, *argv]))
        stack.enter_context(mock.patch.object(sys, "stdin", io.StringIO()))
        stack.enter_context(redirect_stdout(out))
        stack.enter_context(redirect_stderr(err))
        code = exit_code(lambda: MAINS[script](argv), err)
    said = (err.getvalue() if code else out.getvalue()).strip()
    return code, said.split("\r")[-1].strip() if "\r" in said else said


def exit_code(work, err):
    """Do it as the interpreter would: its exit code; an exit message, or a traceback, goes to err."""
    try:
        work()
        return 0
    except SystemExit as e:
        if isinstance(e.code, str):
            err.write(f"\r{e.code}\n")  # behind a progress bar
            return 1
        return e.code or 0
    except BaseException:
        err.write(traceback.format_exc())
        return 1


# ---- errors: every mistake of a user -------------------------------------------------------------------------------

# A command as typed, and a word that must occur in what it says. `train.py toy.py` alone would be a run of a second.
CASES = [
    # settings
    ("train.py toy.py --tua=1", "did you mean tau"),
    ("train.py toy.py --zzz=1", "--help"),
    ("train.py toy.py --tau=x", "tau wants a number"),
    ("train.py toy.py --tau=", "tau"),
    ("train.py toy.py --tau=nan", "tau"),
    ("train.py toy.py --tau=1e999", "tau"),
    ("train.py toy.py --tau=0", "tau must be more than 0"),
    ("train.py toy.py --seed=-1", "seed"),
    ("train.py toy.py --seed=1.5", "seed wants a whole number"),
    ("train.py toy.py --seed=99999999999", "seed"),
    (f"train.py toy.py --seed={'9' * 5000}", "seed"),
    ("train.py toy.py --resume=maybe", "resume"),
    ("train.py toy.py --objective=pc", "objective wants one of cp, dpo"),
    ("train.py toy.py --variant=relased", "did you mean released"),
    ("train.py toy.py --max_steps=4 --warmup_steps=4", "warmup_steps"),
    ("train.py toy.py --max_steps=0", "max_steps"),
    ("train.py toy.py --batch_size=0", "batch_size"),
    ("train.py toy.py --batch_size=99", "batch_size"),
    ("train.py toy.py --top_p=1.5", "top_p"),
    ("train.py toy.py --cp_weight=0 --nll_weight=0", "nothing to train on"),
    ("train.py toy.py --variant=released --distance=signed", "distance"),
    ("train.py toy.py --init_from=scratch", "scratch"),
    ("train.py toy.py --objective=lm --init_from=scratch --n_embd=10 --n_head=3", "n_embd"),
    ("train.py toy.py --ckpt=x.pt", "eval.py"),
    ("eval.py toy.py --tau=1", "train.py"),
    ("data_gen.py gen.py --parts=scores", "eval.py"),
    ("data_gen.py toy.py", "train.py"),
    ("train.py gen.py", "data_gen.py"),
    ("train.py toy.py gen.py", "gen.py"),
    ("train.py toy.py tau=1", "tau=1"),
    ("train.py toy.py --out_dir=", "out_dir"),
    ("eval.py toy.py --out_dir=", "out_dir"),
    ("data_gen.py gen.py --out_dir=", "out_dir"),
    ("train.py toy.py --tau", "tau"),
    ("train.py toy.py --=1", "--"),
    # config files
    ("train.py nowhere.py", "nowhere.py"),
    ("train.py few.jsonl", "few.jsonl"),
    ("train.py base", "base"),
    ("train.py syntax.py", "syntax.py"),
    ("train.py unknown.py", "did you mean tau"),
    ("train.py wrong.py", "wrong.py"),
    ("train.py latin.py", "latin.py"),
    ("train.py raises.py", "raises.py"),
    ("train.py toy.py --init_from=nowhere.py", "nowhere.py"),
    ("train.py toy.py --init_from=syntax.py", "syntax.py"),
    ("train.py toy.py --init_from=gen.py", "gen.py"),
    # devices
    (f"train.py toy.py --device={'mps' if torch.cuda.is_available() else 'cuda'}", "device"),
    ("train.py toy.py --device=gpu", "device"),
    ("train.py toy.py --dtype=float16", "float16"),
    ("train.py toy.py --tokenizer=llama", "tokenizer"),
    # the model to start from
    ("train.py toy.py --init_from=gpt3", "gpt3"),
    ("train.py toy.py --init_from=nowhere", "nowhere"),
    ("train.py toy.py --init_from=nowhere.pt", "nowhere.pt"),
    ("train.py toy.py --init_from=empty", "empty"),
    ("train.py toy.py --init_from=trainer", "trainer"),
    ("train.py toy.py --init_from=lora", "lora"),
    ("train.py toy.py --init_from=pickled.bin", "pickled.bin"),
    ("train.py toy.py --init_from=nanogpt.pt", "nanogpt.pt"),
    ("train.py toy.py --init_from=nanogpt.bin", "nanogpt.bin"),
    ("train.py toy.py --init_from=rasbt.bin", "rasbt.bin"),
    ("train.py toy.py --init_from=rasbt.pth", "rasbt.pth"),
    ("train.py toy.py --init_from=odd.safetensors", "odd.safetensors"),
    ("train.py toy.py --init_from=other", "vocabulary of 300"),
    ("train.py toy.py --init_from=cut.safetensors", "cut.safetensors"),
    ("train.py toy.py --init_from=cut.bin", "cut.bin"),
    ("train.py toy.py --init_from=cut.pt", "cut.pt"),
    ("train.py toy.py --init_from=zero.pt", "zero.pt"),
    ("train.py toy.py --init_from=few.jsonl", "few.jsonl"),
    ("train.py toy.py --init_from=gptj", "gptj"),
    ("train.py toy.py --init_from=half_config", "half_config"),
    ("train.py toy.py --init_from=pointer", "pointer"),
    ("train.py toy.py --init_from=nan", "nan"),
    ("HF_HUB_OFFLINE=1 HF_HUB_CACHE=hub train.py toy.py --init_from=gpt2", "HF_HUB_OFFLINE"),
    ("HF_HUB_OFFLINE= HF_HUB_CACHE=hub train.py toy.py --init_from=gpt2-medium", "127.0.0.1:9"),
    ("HF_HUB_CACHE=hub HF_ENDPOINT=nonsense HF_HUB_OFFLINE= train.py toy.py --init_from=gpt2", "nonsense"),
    ("TIKTOKEN_CACHE_DIR=tik HTTPS_PROXY=http://127.0.0.1:9 train.py toy.py --tokenizer=gpt2", "tokenizer"),
    # data
    ("train.py toy.py --data=nowhere.jsonl", "nowhere.jsonl"),
    ("train.py toy.py --data=base", "base"),
    ("train.py toy.py --data=zero.jsonl", "zero.jsonl"),
    ("train.py toy.py --data=text.txt", "text.txt"),
    ("train.py toy.py --data=scores.csv", "scores.csv"),
    ("train.py toy.py --data=nan.jsonl", "nan.jsonl:1"),
    ("train.py toy.py --data=both.jsonl", "both.jsonl:1"),
    ("train.py toy.py --data=twice.jsonl", "twice.jsonl:2"),
    ("train.py toy.py --data=utf16.jsonl", "utf16.jsonl"),
    ("train.py toy.py --data=surrogate.jsonl", "surrogate.jsonl"),
    ("train.py toy.py --data=deep.jsonl", "deep.jsonl"),
    ("train.py toy.py --data=few.jsonl.gz", "few.jsonl.gz"),
    ("train.py toy.py --data=train_only.jsonl", "train_only.jsonl"),
    ("train.py toy.py --n_pos=9", "n_pos"),
    ("train.py toy.py --objective=lm --data=short.txt", "short.txt"),
    ("train.py toy.py --objective=lm --data=base", "base"),
    ("train.py toy.py --scorer=nowhere:f", "nowhere:f"),
    ("train.py toy.py --scorer=math:pi", "math:pi"),
    ("train.py toy.py --scorer=math:sqrt", "math:sqrt"),
    ("train.py toy.py --scorer=zzz", "zzz"),
    ("train.py toy.py --scorer=file:scores.jsonl", "scores.jsonl"),
    ("train.py toy.py --scorer=ngram,data.toy:rudeness", "takes one scorer"),
    # checkpoints, and out_dir
    ("train.py toy.py --resume --out_dir=out/none", "last.pt"),
    ("train.py toy.py --out_dir=half", "add --resume"),
    ("train.py toy.py --resume --out_dir=narrow", "narrow"),
    ("train.py toy.py --resume --out_dir=renamed", "renamed"),
    ("train.py toy.py --resume --out_dir=half_dictionary", "half_dictionary"),
    ("train.py toy.py --resume --out_dir=no_best", "best.pt"),
    ("train.py toy.py --resume --out_dir=half --max_steps=1 --warmup_steps=0", "max_steps"),
    ("train.py toy.py --resume --out_dir=half --n_pos=3 --freeze_embeddings", "half"),
    ("train.py toy.py --resume --out_dir=half --init_from=wide", "half"),
    ("train.py toy.py --resume --out_dir=cut_last", "last.pt"),
    ("train.py toy.py --resume --out_dir=cut_log", "log.jsonl"),
    ("train.py toy.py --resume --out_dir=cut_config", "config.json"),
    ("train.py toy.py --out_dir=base", "base"),
    ("train.py toy.py --out_dir=foreign", "foreign"),
    ("train.py toy.py --out_dir=few.jsonl", "few.jsonl"),
    ("train.py toy.py --out_dir=few.jsonl/run", "few.jsonl"),
    ("train.py toy.py --out_dir=/proc/none/run", "/proc/none/run"),
    ("train.py toy.py --out_dir=busy", "in use by process"),
    ("data_gen.py gen.py --out_dir=busy", "in use by process"),
    ("eval.py toy.py --out_dir=busy", "in use by process"),
    (f"train.py toy.py --out_dir={'x' * 300}", "xxx"),
    ("data_gen.py gen.py --out_dir=base", "base"),
    # eval.py
    ("eval.py toy.py --out_dir=out/none", "best.pt"),
    ("eval.py toy.py --ckpt=nowhere.pt", "nowhere.pt"),
    ("eval.py toy.py --ckpt=cut.pt", "cut.pt"),
    ("eval.py --ckpt=nanogpt.pt", "nanogpt.pt"),
    ("eval.py --ckpt=evil.pt", "evil"),
    ("eval.py --ckpt=evil_scorer.pt", "evil"),
    ("eval.py --ckpt=nonsense.pt", "nonsense.pt"),
    ("eval.py toy.py --ckpt=base", "--base"),
    ("eval.py toy.py --ckpt=scratch.pt", "--base"),
    ("eval.py toy.py --out_dir=run --base=nowhere", "nowhere"),
    ("eval.py toy.py --out_dir=run --base=other", "vocabulary of 300"),
    ("eval.py toy.py --out_dir=gone_base", "gone"),
    ("eval.py toy.py --out_dir=run --parts=scors", "did you mean scores"),
    ("eval.py toy.py --out_dir=run --parts=zzz", "zzz"),
    ("eval.py toy.py --out_dir=run --prompts=nowhere.txt", "nowhere.txt"),
    ("eval.py toy.py --out_dir=run --prompts=zero.jsonl", "zero.jsonl"),
    ("eval.py toy.py --out_dir=run --prompts=bad_prompts.jsonl", "bad_prompts.jsonl:2"),
    ("eval.py toy.py --out_dir=run --prompts=ninety.jsonl", "ninety.jsonl"),
    ("eval.py toy.py --out_dir=run --prompts=long.txt --parts=toxicity", "long.txt"),
    ("eval.py toy.py --out_dir=run --tasks=nowhere.jsonl", "nowhere.jsonl"),
    ("eval.py toy.py --out_dir=run --tasks=few.jsonl", "few.jsonl"),
    ("eval.py toy.py --out_dir=run --tasks=gold.jsonl", "gold.jsonl"),
    ("eval.py toy.py --out_dir=run --tasks=zero.jsonl", "zero.jsonl"),
    ("eval.py toy.py --out_dir=run --tasks=long_task.jsonl", "long_task"),
    ("eval.py toy.py --out_dir=run --text=nowhere.txt", "nowhere.txt"),
    ("eval.py toy.py --out_dir=run --text=zero.jsonl", "zero.jsonl"),
    ("eval.py toy.py --out_dir=run --text=base", "base"),
    ("eval.py toy.py --out_dir=run --scorer=file:ninety.jsonl", "ninety.jsonl"),
    ("eval.py toy.py --out_dir=run --scorer=file:scores.csv", "scores.csv"),
    ("eval.py toy.py --out_dir=run --scorer=file:base", "base"),
    ("eval.py toy.py --out_dir=run --scorer=ngram,nowhere:f", "nowhere:f"),
    ("eval.py toy.py --out_dir=run --protocol=challenging --prompts=few.jsonl", "few.jsonl"),
    ("eval.py toy.py --out_dir=run --data=train_only.jsonl", "train_only.jsonl"),
    ("eval.py toy.py --out_dir=bad_summary", "summary.json"),
    ("eval.py toy.py --out_dir=run --rewrite=nowhere.txt", "nowhere.txt"),
    ("eval.py toy.py --out_dir=run --rewrite=zero.jsonl", "zero.jsonl"),
    ("eval.py toy.py --out_dir=run --rewrite=base", "base"),
    ("eval.py toy.py --out_dir=run --export=base", "base"),
    ("eval.py toy.py --out_dir=run --export=few.jsonl", "few.jsonl"),
    ("eval.py toy.py --out_dir=run --export=few.jsonl/x", "few.jsonl"),
    ("eval.py toy.py --out_dir=run --prompt='" + "Anna " * 200 + "'", "context"),
    ("eval.py toy.py --out_dir=run --plot=few.jsonl/x.png --parts=scores", "few.jsonl" if PLOTS else "matplotlib"),
    ("eval.py --check=gpt3", "gpt3"),
    ("eval.py --check", "check"),
    ("eval.py --compare", "compare"),
    ("eval.py --compare nowhere", "nothing to compare"),
    ("eval.py --compare bad_summary", "nothing to compare"),
    ("eval.py --compare run --seed=1", "--seed"),
    # data_gen.py
    ("data_gen.py gen.py --seeds=", "--seeds"),
    ("data_gen.py gen.py --seeds=nowhere.txt", "nowhere.txt"),
    ("data_gen.py gen.py --seeds=zero.jsonl", "zero.jsonl"),
    ("data_gen.py gen.py --seeds=blank.txt", "blank.txt"),
    ("data_gen.py gen.py --seeds=base", "base"),
    ("data_gen.py gen.py --seeds=long.txt", "too long"),
    ("data_gen.py gen.py --seeds=latin.txt", "latin.txt"),
    ("data_gen.py gen.py --demos=nowhere.jsonl", "nowhere.jsonl"),
    ("data_gen.py gen.py --demos=few.jsonl --shots=99", "shots"),
    ("data_gen.py gen.py --shots=6", "shots"),
    ("data_gen.py gen.py --positive_prompt=polite", "positive_prompt"),
    ("data_gen.py gen.py --negative_prompt={output}{input}.", "negative_prompt"),
    ("data_gen.py gen.py --min_length=3 --max_length=2", "min_length"),
    ("data_gen.py gen.py --min_toxicity=2", "min_toxicity"),
    ("data_gen.py gen.py --scorer=file:scores.jsonl", "scores.jsonl"),
    ("data_gen.py gen.py --rounds=1 --batch_size=9 --out_dir=out/none", "no group is complete"),
    ("data_gen.py gen.py --out_dir=made", "add --resume"),
    ("data_gen.py gen.py --out_dir=made --resume --k=5", "another k"),
    ("data_gen.py gen.py --out_dir=logless --resume", "groups.jsonl"),
    ("data_gen.py gen.py --out_dir=cut_groups_log --resume", "groups.log.jsonl"),
    # measures.check
    ("measures.check nowhere.jsonl", "nowhere.jsonl"),
    ("measures.check nan.jsonl", "nan.jsonl"),
    ("TIKTOKEN_CACHE_DIR=tik HTTPS_PROXY=http://127.0.0.1:9 measures.check few.jsonl --model=nowhere", "tokenizer"),
]


def spoil(folder):
    """All that the cases name, beside the world: damaged and foreign files, odd runs; in the working folder."""
    few = Path("few.jsonl").read_text()
    group = json.loads(few.split("\n")[0])
    files = {
        "syntax.py": "tau = = 1\n", "unknown.py": "tua = 1\n", "wrong.py": "tau = 'x'\n", "raises.py": "tau = 1 / 0\n",
        "zero.jsonl": "", "zero.pt": "", "blank.txt": " \n\n \n", "short.txt": "One line.\n",
        "scores.csv": "text,score\nAnna,0.5\n", "nan.jsonl": json.dumps(group | dict(positives=[float("nan")])),
        "both.jsonl": json.dumps(group | dict(negatives=group["positives"])),
        "twice.jsonl": (json.dumps(group) + "\n") * 2,
        "surrogate.jsonl": few.replace('"input": "', '"input": "\\ud800'),
        "deep.jsonl": "[" * 100_000, "long.txt": "Anna lost the keys again and again " * 60 + ".\n",
        "train_only.jsonl": "".join(line + "\n" for line in few.splitlines() if '"split": "train"' in line),
        "bad_prompts.jsonl": '{"text": "Anna"}\n{"text": 7}\n',
        "ninety.jsonl": '{"text": "Anna", "score": 90, "toxicity": "90"}\n',
        "gold.jsonl": '{"query": "Anna", "choices": ["a"], "gold": 3}\n',
        "long_task.jsonl": json.dumps(dict(query="Anna", choices=["lost the keys " * 99], gold=0)),
    }  # fmt: skip
    for name, content in files.items():
        Path(name).write_text(content)
    Path("latin.py").write_bytes("scorer = 'für'\n".encode("latin-1"))
    Path("latin.txt").write_bytes("Für Anna.\n".encode("latin-1"))
    Path("utf16.jsonl").write_bytes(few.encode("utf-16"))
    Path("few.jsonl.gz").write_bytes(b"\x1f\x8b\x08\x00" + random.Random(0).randbytes(99))
    for name in ("empty", "foreign", "hub", "tik"):
        Path(name).mkdir()
    Path("foreign/thesis.tex").write_text("years of work")
    spoil_models(torch.load("run/best.pt", weights_only=True))
    spoil_runs(torch.load("run/last.pt", weights_only=True))


def spoil_models(saved):
    """Weight files of other origins, and damaged ones."""
    for name, model in dict(wide=tiny(width=32), other=tiny(300), odd=tiny(width=200)).items():
        model.save_pretrained(name)
    shutil.move("odd/model.safetensors", "odd.safetensors")
    weights, tensors = Path("base/model.safetensors").read_bytes(), tiny().state_dict()
    for name in ("trainer/checkpoint-4", "lora", "gptj", "half_config", "pointer"):
        shutil.copytree("base", name)
    shutil.move("lora/model.safetensors", "lora/adapter_model.safetensors")
    shutil.move("lora/config.json", "lora/adapter_config.json")
    Path("gptj/config.json").write_text(Path("base/config.json").read_text().replace('"gpt2"', '"gptj"'))
    Path("half_config/config.json").write_text(Path("base/config.json").read_text()[:60])
    Path("pointer/model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    Path("cut.safetensors").write_bytes(weights[: len(weights) // 2])
    torch.save(torch.nn.Linear(2, 2), "pickled.bin")
    nano = {k: v for k, v in tensors.items() if not k.endswith("bias")}
    torch.save(dict(model=nano, model_args=dict(bias=False), iter_num=1), "nanogpt.pt")
    torch.save(nano, "nanogpt.bin")
    rasbt = {
        k.replace("transformer.wte", "tok_emb").replace("transformer.h", "trf_blocks"): v for k, v in tensors.items()
    }
    torch.save(rasbt, "rasbt.bin"), torch.save(rasbt, "rasbt.pth"), torch.save(tensors, "cut.bin")
    os.truncate("cut.bin", os.path.getsize("cut.bin") // 2)
    nan = tiny()
    torch.nn.init.constant_(nan.transformer.ln_f.weight, float("nan"))
    nan.save_pretrained("nan")
    shutil.copy("run/best.pt", "cut.pt"), os.truncate("cut.pt", 5000)
    torch.save(saved | dict(config=saved["config"] | dict(init_from="evil.py")), "evil.pt")
    torch.save(saved | dict(config=saved["config"] | dict(scorer="evil:f")), "evil_scorer.pt")
    torch.save(saved | dict(config=saved["config"] | dict(init_from="scratch")), "scratch.pt")
    torch.save(saved | dict(config=[1, 2], model_config=None), "nonsense.pt")


def spoil_runs(last):
    """Folders of runs in which something is missing, foreign or damaged."""
    names = "half narrow renamed half_dictionary no_best cut_last cut_log cut_config bad_summary gone_base busy".split()
    best = torch.load("run/best.pt", weights_only=True)
    for name in names:
        shutil.copytree("run", name)
        if name.split("_")[0] not in ("bad", "gone", "busy"):
            Path(name, "summary.json").unlink()
            torch.save(last | dict(step=2), f"{name}/last.pt")
            torch.save(best | dict(step=2), f"{name}/best.pt")  # which may be of a later step
    torch.save(last | dict(step=2, model=tiny(width=32).state_dict()), "narrow/last.pt")
    shutil.copy("run/best.pt", "renamed/last.pt")
    torch.save({k: v for k, v in last.items() if k != "optimizer"}, "half_dictionary/last.pt")
    Path("no_best/best.pt").unlink(), os.truncate("cut_last/last.pt", 5000)
    Path("cut_log/log.jsonl").write_text('{"step": 0\n{"split": 1}\n[]\n')
    Path("cut_config/config.json").write_text('{"out_dir": ')
    Path("bad_summary/summary.json").write_text('{"tuned": ')
    torch.save(best | dict(config=best["config"] | dict(init_from="gone")), "gone_base/best.pt")
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()), mock.patch.object(GPT, "generate", parrot()):
        for name in ("made", "logless", "cut_groups_log"):
            data_gen.main(["gen.py", f"--out_dir={name}"])
    Path("logless/groups.log.jsonl").unlink()
    Path("cut_groups_log/groups.log.jsonl").write_text('{"seed": 0}\n[1]\n')


def parrot():
    """A generation that knows the toy world, since no random model writes a group."""
    from test_data_gen import parrot

    return parrot


def tree():
    """{file: content} of all that must stay as it is: no locks, and not what eval.py keeps of a run."""
    kept = (".lock", "eval.json", "scores.jsonl", "summary.json")
    files = (p for p in Path().rglob("*") if p.is_file() and (len(p.parts) == 1 or p.name not in kept))
    return {str(p): p.read_bytes() for p in sorted(files) if not {"__pycache__", "eval", "out"} & {*p.parts}}


def error_rows(folder, cases=CASES):
    """Yields (command, what was said, exit code, what is wrong with that) of each case."""
    with chdir(make_world(folder)):
        spoil(folder)
        with held("busy"):
            before = tree()
            for line, word in cases:
                shutil.rmtree("out", ignore_errors=True)
                code, said = call(line)
                wrong = [] if code in (1, 2) else ["ended well"]
                wrong += [f"{said.count(chr(10)) + 1} lines"] if "\n" in said else []
                wrong += ["a traceback"] if "Traceback" in said else []
                wrong += [f"{len(said)} characters"] if len(said) > MESSAGE + PREFIX else []
                wrong += [f"does not say {word!r}"] if word not in said else []
                wrong += ["EXECUTED"] if Path("EVIL").exists() else []
                after = tree()
                if changed := [f for f in {*before, *after} if before.get(f) != after.get(f)]:
                    wrong.append(f"touched {', '.join(sorted(changed)[:3])}")
                    restore(before, changed)
                yield line, said, code, "; ".join(wrong)


def restore(before, changed):
    for name in changed:
        put(name, before[name]) if name in before else Path(name).unlink()


# ---- inputs: mutated files and flags -------------------------------------------------------------------------------

NONSENSE = [
    None,
    True,
    False,
    -1,
    0,
    1,
    7,
    2**31,
    10**6,
    10**9,
    10**400,
    0.5,
    1e9,
    1e308,
    -0.0,
    float("inf"),
    float("nan"),
]
NONSENSE += ["", " ", "x", "1", "NaN", "\ud800", "\x00", "ё" * 300, "../x", [], [None], [[]], {}, {"x": 1}, ["a", 1]]
SECONDS, MEMORY = 5, 2**30  # of one input
FOLDER = None  # the content of an input that is a folder in the file's place


def mutate_bytes(rng, raw):
    """One change of the kind that disks, editors and downloads make."""
    i, j = sorted(rng.randrange(len(raw) + 1) for _ in "ab")
    lines = raw.split(b"\n")
    match rng.randrange(16):
        case 0:
            return raw[:i]
        case 1:
            return raw[:i] + raw[j:]
        case 2:
            return raw[:j] + raw[i:j] + raw[j:]
        case 3:
            rng.shuffle(lines)
            return b"\n".join(lines)
        case 4:
            return b"\xef\xbb\xbf" + raw
        case 5:
            return raw.replace(b"\n", rng.choice([b"\r\n", b"\r", b"\n\n", b" "]))
        case 6:
            return raw[:i] + rng.choice([b"\x00", b"\xff", b"\xc3", b"\xed\xa0\x80", b"\\ud800", b"\\u0000"]) + raw[i:]
        case 7:
            return raw.decode("utf-8", "replace").encode(rng.choice(["utf-16", "utf-16-le", "utf-7", "utf-32"]))
        case 8:
            return raw[:i] + rng.choice([b"[", b"{", b'{"a":', b"(", b'"']) * rng.choice([1, 50, 50_000]) + raw[i:]
        case 9:
            return raw[:i] + rng.choice([b"9" * 400, b"9" * 5000, b"1e999", b"NaN", b"-Infinity", b"null"]) + raw[j:]
        case 10:
            return rng.choice([b"", b"\n", b"\x00" * 99, b"[]", b"{}", b"[{}]", b"null", b"0", rng.randbytes(99)])
        case 11:
            return FOLDER
        case 12:
            return raw + raw[i:]
        case _:
            changed = bytearray(raw)
            for _ in range(rng.choice([1, 1, 3, 30]) if raw else 0):
                changed[rng.randrange(len(raw))] = rng.randrange(256)
            return bytes(changed)


def mutate_value(rng, value, nonsense=NONSENSE):
    """A copy of nested dicts and lists in which one value is replaced, missing, renamed or doubled."""
    if not isinstance(value, dict | list) or not value or rng.random() < 0.04:
        return rng.choice(nonsense)
    key = rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
    copy = value.copy()
    if (what := rng.random()) < 0.6:
        copy[key] = mutate_value(rng, value[key], nonsense)
    elif what < 0.8:
        copy[key] = rng.choice(nonsense)
    elif what < 0.9:
        del copy[key]
    elif isinstance(copy, dict):
        copy[rng.choice(["x", "", "0", *value])] = copy.pop(key)
    else:
        copy.insert(key, rng.choice([copy[key], *nonsense]))
    return copy


def or_bytes(mutate):
    """Sometimes bytes are changed instead, and always in what has lost its structure."""

    def change(rng, raw, **how):
        if rng.random() > 0.35:
            with suppress(Exception):
                return mutate(rng, raw, **how)
        return mutate_bytes(rng, raw)

    return change


@or_bytes
def mutate_json(rng, raw):
    """A value of a line, or of the whole file, replaced."""
    lines = [raw] if raw[:1] == b"[" or raw.count(b"\n") < 2 or raw[:2] == b"{\n" else raw.split(b"\n")
    i = rng.choice([n for n, line in enumerate(lines) if line.strip()])
    lines[i] = json.dumps(mutate_value(rng, json.loads(lines[i])), ensure_ascii=rng.random() < 0.5).encode(
        errors="replace"
    )
    return b"\n".join(lines)


@or_bytes
def mutate_tensors(rng, raw, legacy=False):
    """The same of a file that torch.save wrote; tensors become others, too."""
    others = [torch.zeros(3), torch.zeros(2, 2), torch.zeros(537, 16).half(), torch.full((16,), float("nan"))]
    others += [torch.zeros(16, dtype=torch.long), torch.zeros(0), torch.tensor(1), torch.zeros(537, 16).to_sparse()]
    others += [torch.zeros(16, dtype=torch.complex64), torch.zeros(537, 16, device="meta")]
    value, file = mutate_value(rng, torch.load(io.BytesIO(raw), weights_only=True), NONSENSE + others), io.BytesIO()
    torch.save(value, file, _use_new_zipfile_serialization=not legacy)
    return file.getvalue()


@or_bytes
def mutate_safetensors(rng, raw):
    """The header's values replaced."""
    n = struct.unpack("<Q", raw[:8])[0]
    header = json.dumps(mutate_value(rng, json.loads(raw[8 : 8 + n]))).encode()
    return struct.pack("<Q", len(header)) + header + raw[8 + n :]


def mutate_flags(rng, words):
    """Words of a command line, some of them nonsense."""
    names = [*Config.__dataclass_fields__, "x", "", "é", "-", "config", "help_"]
    values = ["", " ", "--", "-1", "0", "9" * 400, "9" * 5000, "nan", "inf", "1e999", "True", "false", "\ud800", "\x00"]
    values += [
        "x" * 5000,
        "é",
        "None",
        "[]",
        "1.5",
        "0x10",
        "1_000",
        "=",
        "a=b",
        "\n",
        "gpt2",
        "toy.py",
        "{input}{output}.",
    ]
    words = list(words)
    for _ in range(rng.choice([1, 1, 2, 3])):
        word = f"--{rng.choice(names)}" + rng.choice(["=", "=", "=", " ", ""]) + rng.choice(values)
        word = rng.choice([word, word, word, word, rng.choice(values)])
        words[(i := rng.randrange(len(words) + 1)) : i] = word.split(" ", 1) if rng.random() < 0.5 else [word]
    return [w for w in words if w not in ("-h", "--help")]


def load_model(path):
    GPT.from_pretrained(path, data.get_tokenizer("toy").n_vocab)


def load_folder(path):
    load_model(str(Path(path).parent))


def command(line, *patches):
    """A reader that is a whole command, with (object, name, stand-in) of what need not run."""

    def read(path):
        with ExitStack() as stack:
            for patch in patches:
                stack.enter_context(mock.patch.object(*patch))
            code, said = call(line)
        if "Traceback" in said:
            raise RuntimeError(f"traceback: {said.splitlines()[-1]}")
        if code not in (0, 130):
            raise SystemExit(said)

    return read


def read_base_run(path):
    with mock.patch.object(train, "train", lambda config: {}):
        train.trained_by("base_run.py", Config(init_from="base_run.py"))


def read_folder(path):
    with held(Path(path).parent):
        pass


def read_busy_folder(path):
    with open(path, "rb") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        read_folder(path)


def read_card(path):
    report.model_card(report.read_summary(Path(path).parent), "x")


def read_cache(path):
    value, _ = cached(Path(path), "k", lambda: dict(x=[1.0]))
    assert isinstance(value, dict), f"a cache gave {value!r}"


def read_checked(path):
    check.check_file(path, mock.Mock(groups=0, domains=0, unseen=0))


def read_flags(words):
    load_config(("train", "eval", "data_gen")[len("".join(words)) % 3], words)


@dataclass
class Target:
    """What reads a mutated file: the file in the world, how it is mutated, whole files that are, and what is tried."""

    file: str
    mutate: object
    read: object  # of the path
    samples: list = ()  # the file itself
    share: int = 1  # of that many inputs one is tried: it takes long
    fresh: str = ""  # a folder that each input finds as it was
    names: tuple = ()  # what an error may name instead of the file


NO_FIT = (train, "fit", lambda run: False)
RESUME = "train.py toy.py --resume --out_dir=half"
GEN = "data_gen.py gen.py --out_dir=made --resume"
EVAL = "eval.py toy.py --out_dir=evaluated --parts=scores"


def reading_targets():
    """{name: Target} of the readers and loaders, in the world as `extend` leaves it."""
    lines, tensors, some, groups = mutate_json, mutate_tensors, mutate_bytes, ["few.jsonl", "paper.json"]
    judge, refs = "data.toy:rudeness", "hub/models--openai-community--gpt2/refs/main"
    return {
        "groups": Target("x.jsonl", lines, data.load_groups, groups),
        "checked groups": Target("x.jsonl", lines, read_checked, groups),
        "prompts": Target("x.jsonl", lines, read_prompts, ["prompts.jsonl", "seeds.txt"]),
        "tasks": Target("x.jsonl", lines, read_task, ["task.jsonl", "last_words.jsonl"]),
        "scores": Target("x.jsonl", lines, lambda path: get_scorer(f"file:{path}"), ["scores.jsonl"]),
        "score cache": Target("x.jsonl", lines, lambda path: get_scorer(judge, path), ["cache.jsonl"]),
        "documents": Target("x.txt", some, lambda path: data.load_documents(path, 0), ["text.txt"]),
        "documents of groups": Target("x.jsonl", lines, lambda path: data.load_documents(path, 0), groups),
        "text": Target("x.txt", some, read_text_measured, ["text.txt"]),
        "wikitext": Target("x.raw", some, read_text_measured, ["wiki.raw"]),
        "seeds": Target("x.txt", some, read_seeds, ["seeds.txt"]),
        "seeds of groups": Target("x.jsonl", lines, read_seeds, groups),
        "lines to rewrite": Target("x.txt", some, read_text, ["seeds.txt"]),
        "config": Target("x.py", some, lambda path: load_config("train", [path]), ["plain.py"]),
        "flags": Target("", mutate_flags, read_flags),
        "model config": Target("base/config.json", lines, load_folder, names=("base:",)),
        "safetensors": Target("base/model.safetensors", mutate_safetensors, load_folder, names=("base",)),
        "index": Target("sharded/model.safetensors.index.json", lines, load_folder, names=("sharded",)),
        "bin": Target("bin/pytorch_model.bin", tensors, load_folder, names=("bin",)),
        "old bin": Target("bin/pytorch_model.bin", partial(tensors, legacy=True), load_folder, names=("bin",)),
        "checkpoint": Target("x.pt", tensors, load_model, ["run/best.pt"]),
        "log": Target("x.jsonl", lines, lambda path: Log(path, keep=lambda r: r["step"] < 3), ["run/log.jsonl"]),
        "config of a run": Target("half/config.json", lines, read_folder, names=("half",)),
        "config of a base": Target("base_run/config.json", lines, read_base_run, names=("base_run",)),
        "model card": Target("run/summary.json", lines, read_card),
        "eval cache": Target("x.json", lines, read_cache, ["evaluated/eval/scores.base.json"]),
        "lock": Target("half/.lock", some, read_busy_folder, names=("half",)),
        "hub": Target(refs, some, lambda path: GPT.from_pretrained("gpt2"), names=("gpt2",)),
    }


def command_targets():
    """The same of whole commands, which must live with what they read."""
    lines, tensors, parroting = mutate_json, mutate_tensors, (GPT, "generate", parrot())
    half, made = dict(fresh="half", names=("half",)), dict(fresh="made")
    scored = dict(fresh="evaluated", names=("evaluated",))
    checkpoint = command("eval.py --ckpt=x.pt --data=few.jsonl --parts=scores")
    rewriting, drawing = command("eval.py toy.py --out_dir=evaluated --rewrite=seeds.txt"), f"{EVAL} --plot=out/x.png"
    return {
        "eval.py of a checkpoint": Target("x.pt", tensors, checkpoint, ["run/best.pt"], 4),
        "last.pt": Target("half/last.pt", tensors, command(RESUME, NO_FIT), **half),
        "last.pt, going on": Target("half/last.pt", tensors, command(RESUME), share=10, **half),
        "log, going on": Target("half/log.jsonl", lines, command(RESUME), share=20, **half),
        "log, drawn": Target("evaluated/log.jsonl", lines, command(drawing), share=50, **scored),
        "summary": Target("run/summary.json", lines, command("eval.py --compare run"), names=("run",)),
        "summary, going on": Target("evaluated/summary.json", lines, command(EVAL), share=20, **scored),
        "eval cache, going on": Target("evaluated/eval/scores.base.json", lines, command(EVAL), share=20, **scored),
        "rewritten lines": Target("evaluated/rewritten.jsonl", lines, rewriting, share=20, **scored),
        "log of groups": Target("made/groups.log.jsonl", lines, command(GEN, parroting), share=10, **made),
        "groups, going on": Target("made/groups.jsonl", lines, command(GEN, parroting), share=10, **made),
    }


def targets():
    return reading_targets() | command_targets()


def read_text_measured(path):
    read_measured_text(path, data.get_tokenizer("toy"))


def read_seeds(path):
    data_gen.read_seeds(Config(seeds=path))


def extend():
    """What the targets need beside the world. For the working folder."""
    shutil.copytree("run", "half"), Path("half/summary.json").unlink()
    for name in ("last.pt", "best.pt"):
        torch.save(torch.load(f"run/{name}", weights_only=True) | dict(step=2), f"half/{name}")
    shutil.copytree("base", "bin"), Path("bin/model.safetensors").unlink()
    torch.save(
        {k: v.t() if "c_" in k and v.dim() == 2 else v for k, v in tiny().state_dict().items()}, "bin/pytorch_model.bin"
    )
    shutil.copytree("run", "evaluated"), shutil.copytree("run", "base_run")
    Path("base_run.py").write_text(SETTINGS + "out_dir = 'base_run'\n")
    config = json.loads(Path("run/config.json").read_text()) | dict(out_dir="base_run")
    Path("base_run/config.json").write_text(json.dumps(config, indent=2))
    for line in ("--parts=scores", "--rewrite=seeds.txt"):
        code, said = call(f"eval.py toy.py --out_dir=evaluated {line}")
        assert code == 0, said
    Path("plain.py").write_text("# A config.\nout_dir = 'x'\ntau = 0.5\nmax_steps = 30\nresume = False\ndata = 'toy'\n")
    Path("last_words.jsonl").write_text('{"context": "Anna lost", "continuation": "the keys"}\n' * 3)
    with open("cache.jsonl", "w") as f:
        f.writelines(json.dumps(dict(text=t, score=0.5, scorer="data.toy:rudeness", hash="0")) + "\n" for t in "abc")
    shutil.copytree("base", "sharded")
    shutil.move("sharded/model.safetensors", "sharded/part.safetensors")
    names = tiny().state_dict().keys() - {"lm_head.weight"}
    index = dict(metadata=dict(total_size=1), weight_map=dict.fromkeys(sorted(names), "part.safetensors"))
    Path("sharded/model.safetensors.index.json").write_text(json.dumps(index))
    for name in ("refs", "snapshots"):
        Path("hub/models--openai-community--gpt2", name).mkdir(parents=True)
    shutil.copytree("base", "hub/models--openai-community--gpt2/snapshots/abc")
    Path("hub/models--openai-community--gpt2/refs/main").write_text("abc"), Path("half/.lock").write_text("123 on here")
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()), mock.patch.object(GPT, "generate", parrot()):
        data_gen.main(["gen.py", "--out_dir=made"])
    for folder in ("half", "evaluated", "made"):
        shutil.copytree(folder, f"pristine/{folder}")


class TooLong(BaseException):
    """Raised by the alarm; nothing that catches Exception stops it."""


def late(*_):
    raise TooLong(f"still running after {SECONDS} s")


def try_input(target, seed, name, number):
    """Make input `number` of a target and read it: 'read', 'one line', or what is wrong."""
    rng = random.Random(f"{seed} {name} {number}")
    if target.fresh:
        shutil.rmtree(target.fresh)
        shutil.copytree(f"pristine/{target.fresh}", target.fresh)
    if target.file:
        content = rng.choice(target.samples)
        for _ in range(rng.choice([1, 1, 1, 2])):
            content = content if content is FOLDER else target.mutate(rng, content)
        put(target.file, content)
    argument = target.file or target.mutate(rng, rng.choice([["plain.py", "--tau=0.5"], ["--seed", "1"], []]))
    err, began = io.StringIO(), time.perf_counter()
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        with redirect_stderr(err):
            target.read(argument)
        said = None
    except (ValueError, OSError) as e:
        said = one_line(e)
    except SystemExit as e:
        said = e.code if isinstance(e.code, str) else err.getvalue().rstrip("\n")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    if time.perf_counter() - began > SECONDS:
        return late()
    if said is None:
        return "read"
    if "\n" in said or len(said) > MESSAGE + PREFIX:
        return f"{said.count(chr(10)) + 1} lines, {len(said)} characters: {said[:200]}"
    if target.file and not any(n in said for n in (Path(target.file).name, *target.names)):
        return f"does not name the file: {said}"
    return "one line"


def put(file, content):
    """The content of a file, or a folder in its place."""
    shutil.rmtree(file) if Path(file).is_dir() else Path(file).unlink(missing_ok=True)
    Path(file).mkdir() if content is FOLDER else Path(file).write_bytes(content)


def try_inputs(name, target, seed, start, n, tell, now):
    """In a child: inputs start to n; tell(line) what happened, `now` shows which one is on."""
    with open("/proc/self/statm") as f:
        limit = int(f.read().split()[0]) * mmap.PAGESIZE + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    signal.signal(signal.SIGALRM, late)
    target.samples = [Path(s).read_bytes() for s in target.samples or filter(None, [target.file])]
    os.environ["HF_HUB_CACHE"] = "hub"
    with open(os.devnull, "w") as nothing, redirect_stdout(nothing):
        for i in range(start, n):
            now[:4] = struct.pack("<I", i)
            try:
                outcome = try_input(target, seed, name, i)
            except BaseException as e:
                where = traceback.extract_tb(e.__traceback__)[-1]
                outcome = f"{type(e).__name__}: {str(e)[:160]} ({Path(where.filename).name}:{where.lineno})"
            tell(json.dumps([i, outcome]))


def watch_inputs(name, target, seed, n):
    """{kind of outcome: (the first one, [numbers])} of n inputs of a target, in children; one that hangs or dies is an
    outcome, and the next child goes on behind it."""
    found, start, now = {}, 0, mmap.mmap(-1, 4)
    while start < n:
        with open("told.txt", "w+", buffering=1) as told:
            if not (pid := os.fork()):
                with ExitStack() as stack:
                    stack.callback(os._exit, 1)
                    tqdm.set_lock(threading.RLock())
                    try_inputs(name, target, seed, start, n, lambda line: told.write(line + "\n"), now)
                    told.flush()
                    os._exit(0)
            last, since, state = -1, time.time(), (0, 0)
            while state[0] == 0 and time.time() - since < 3 * SECONDS:
                time.sleep(0.002)
                state = os.waitpid(pid, os.WNOHANG)
                at = struct.unpack("<I", now[:4])[0]
                last, since = (at, time.time()) if at != last else (last, since)
            if state[0] == 0:
                os.kill(pid, signal.SIGKILL), os.waitpid(pid, 0)
            told.seek(0)
            for number, outcome in map(json.loads, told.read().splitlines()):
                told_of = outcome.split("(")[-1] if "Error" in outcome[:30] else outcome[:90]
                kind = re.sub(r"'.*?'|\".*?\"|\S*\d\S*", "*", told_of)  # without its values
                found.setdefault(kind, (outcome, []))[1].append(number)
        start = last + 1
        if state[0] == 0 or state[1]:
            what = "hangs" if state[0] == 0 else f"dies, with wait status {state[1]}"
            found.setdefault(what, (what, []))[1].append(last)
    return found


def input_rows(n, seed, folder, only=None):
    """Yields (target, read, one line, [(what is wrong, numbers)], seconds) of each target."""
    with chdir(make_world(folder)):
        extend()
        for name, target in targets().items():
            if only in (None, name) and (PLOTS or name != "log, drawn"):
                began, there = time.time(), Path(target.file or "none")
                before = there.read_bytes() if there.is_file() else None
                found = watch_inputs(name, target, seed, max(2, n // target.share))
                good = [len(found.pop(key, ("", []))[1]) for key in ("read", "one line")]
                if before is not None:
                    put(target.file, before)
                yield name, *good, list(found.values()), time.time() - began


# ---- children that run a script ------------------------------------------------------------------------------------


def in_child(script, argv, before=None):
    """What a child does: the script, with a short closing and, for data_gen.py, a base that can paraphrase."""
    training.CLOSING = samples.CLOSING = CLOSING
    tqdm.set_lock(threading.RLock())  # its own is shared by all children, and one that is killed never lets go
    if script == "data_gen.py":
        quick = parrot()
        GPT.generate = lambda *args: time.sleep(0.01) or quick(*args)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if before:
        before()
    return exit_code(lambda: SCRIPTS[script](list(argv)), sys.stderr)


def fork(script, argv, cwd, before):
    """(pid, file that holds what it prints) of a child of this process."""
    read, write = os.pipe()
    sys.stdout.flush(), sys.stderr.flush()
    if pid := os.fork():
        os.close(write)
        return pid, read
    code = 99
    try:
        os.chdir(cwd)
        os.dup2(write, 1), os.dup2(write, 2), os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.stdin, sys.stdout, sys.stderr = (open(fd, mode) for fd, mode in enumerate("rww"))
        code = in_child(script, argv, before)
        sys.stdout.flush(), sys.stderr.flush()
    finally:
        os._exit(code)


def start(script, argv, cwd):
    """The same in a fresh interpreter, with its start-up."""
    child = [sys.executable, __file__, "child", script, *argv]
    process = subprocess.Popen(
        child, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
    )
    return process.pid, os.dup(process.stdout.fileno())


def run(script, argv, cwd, kill_after=None, before=None, fresh=False):
    """Run a script in a child, and kill it after so many seconds. Returns (exit code, what it said last, seconds); the
    code is -9 if it was killed."""
    began, said = time.time(), b""
    pid, pipe = start(script, argv, cwd) if fresh else fork(script, argv, cwd, before)
    end = began + (kill_after if kill_after is not None else 300)
    while select.select([pipe], [], [], max(0, end - time.time()))[0]:
        if not (some := os.read(pipe, 65536)):
            break
        said += some
    else:
        os.kill(pid, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    os.close(pipe)
    lines = [line for line in said.decode(errors="replace").replace("\r", "\n").split("\n") if line.strip()]
    return code, lines[-1] if lines else "", time.time() - began


# ---- kills: at any moment, then again ------------------------------------------------------------------------------

BASE = """from configs.toy_base import *
n_layer, n_head, n_embd, n_positions = 1, 1, 16, 96
max_steps, warmup_steps, eval_interval = 6, 1, 2
batch_size, eval_groups, sample_tokens = 2, 4, 4
data = "few.jsonl"
out_dir = "out/base"
"""
KINDS = {  # of runs: script, words, the file whose presence asks for --resume
    "train": ("train.py", ["cp.py"], "out/cp/last.pt"),
    "data_gen": ("data_gen.py", ["gen.py", "--out_dir=out/gen"], "out/gen/groups.log.jsonl"),
    "eval": (
        "eval.py",
        "toy.py --out_dir=run --tasks=task.jsonl --text=text.txt --prompts=prompts.jsonl".split(),
        None,
    ),
}
# What two runs of the same may have otherwise. last.pt is written before its step is measured.
UNLIKE = ("seconds", "tokens_per_second", "command", "resume", "best", "param_groups")


def prepare(folder):
    """The folder from which each run begins."""
    make_world(folder)
    Path(folder, "base.py").write_text(BASE)
    cp = SETTINGS.replace('"base"', '"base.py"').replace("max_steps, w", "max_steps, w") + "max_steps = 9\n"
    Path(folder, "cp.py").write_text(cp + "out_dir = 'out/cp'\n")
    return folder


def same_part(value):
    """What must be equal: no times; tensors as their bytes; nan equals nan."""
    if isinstance(value, dict):
        return {k: same_part(v) for k, v in value.items() if k not in UNLIKE}
    if isinstance(value, torch.Tensor):
        return f"{value.dtype} {tuple(value.shape)} {value.numpy().tobytes().hex()}"
    return [same_part(v) for v in value] if isinstance(value, list | tuple) else repr(value)


def results(folder):
    """{file: its comparable content} of all that runs have made below `folder`; config.json says how, not what."""
    found = {}
    for path in sorted(p for part in ("out", "run") for p in Path(folder, part).rglob("*") if p.is_file()):
        name = str(path.relative_to(folder))
        if path.suffix == ".pt":
            saved = torch.load(path, weights_only=True)
            found[name] = same_part({k: v for k, v in saved.items()})
        elif path.name in ("summary.json", "eval.json", "config.json"):
            found[name] = same_part(json.loads(path.read_text()))
        elif path.name != ".lock":
            found[name] = path.read_bytes()
    return found


def differences(whole, got):
    """The files that differ, and how, as text; '' if none does."""
    wrong = [f"{n} is {'left over' if n in got else 'missing'}" for n in sorted(whole.keys() ^ got.keys())]
    for name in sorted(whole.keys() & got.keys()):
        if (a := whole[name]) != (b := got[name]):
            keys = [str(k) for k in {*a, *b} if a.get(k) != b.get(k)][:3] if isinstance(a, dict) else []
            wrong.append(f"{name} differs {' '.join(sorted(keys))}".rstrip())
    return ", ".join(wrong)


def command_of(kind, cwd, said="", rng=None):
    """(script, words) of the next try: with --resume if there is what to resume, or if the last error asked for it."""
    script, argv, there = KINDS[kind]
    resume = there and Path(cwd, there).exists() and ("add --resume" in said or rng is None or rng.random() < 0.7)
    return script, [*argv, "--resume"] if resume else argv


def go_on(kind, cwd, whole, said="", rng=None):
    """Repeat the command until it ends well: '' if its results are those of an undisturbed run, else what is not."""
    for _ in range(3):
        code, said, _ = run(*command_of(kind, cwd, said, rng), cwd)
        if code == 0:
            return differences(whole, results(cwd))
        if "add --resume" not in said:
            break
    return f"does not go on: [{code}] {said}"


def undisturbed(folder, kinds=KINDS):
    """(start folder, {kind: (results, seconds)}) of whole runs below `folder`."""
    whole, begin = {}, prepare(Path(folder, "start"))
    for kind in kinds:
        cwd = shutil.copytree(begin, Path(folder, f"whole_{kind}"))
        code, said, seconds = run(*command_of(kind, cwd), cwd)
        assert code == 0, f"{kind}: {said}"
        whole[kind] = results(cwd), seconds
    return begin, whole


def kill_runs(n, seed, folder, whole=None, fresh_each=5):
    """Yields (kind, number, 'killed at', what is wrong) of n runs, each killed once to three times. Every fifth one is
    a real process, which may die in its start-up. `whole` is what `undisturbed` gave."""
    begin, whole = whole or undisturbed(folder)
    for i in range(n):
        rng, kind = random.Random(f"{seed} kill {i}"), list(KINDS)[i % len(KINDS)]
        cwd, fresh = shutil.copytree(begin, Path(folder, f"kill_{i}")), i % fresh_each == fresh_each - 1
        at, said = [], ""
        for _ in range(rng.choice([1, 1, 2, 3])):
            moment = rng.uniform(0, whole[kind][1] + 3 * fresh)
            code, said, _ = run(*command_of(kind, cwd, said, rng), cwd, moment, fresh=fresh)
            at.append(f"{moment:.2f}{'' if code == -9 else f' [{code}]'}")
        wrong = go_on(kind, cwd, whole[kind][0], said, rng)
        yield kind, i, f"{', '.join(at)} of {whole[kind][1]:.2f} s{', fresh' * fresh}", wrong
        shutil.rmtree(cwd)


# ---- writes: killed in each, and refused by a full disk ------------------------------------------------------------


class Half:
    """A file, of the first text written to which only half arrives, before the process dies."""

    def __init__(self, file):
        self.file = file

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def write(self, text):
        self.file.write(text[: len(text) // 2])
        self.file.flush()
        os.kill(os.getpid(), signal.SIGKILL)


def die_at(name, n, when):
    """In a child: SIGKILL at the n-th call of a function that writes, 'before' it, 'after' it or in its 'half'."""
    owner = builtins if name == "open" else os
    real, count = getattr(owner, name), itertools.count(1)

    def call(*args, **kwargs):
        if name == "open" and "a" not in str(kwargs.get("mode", args[1:2])) or ".lock" in str(args[0]):
            return real(*args, **kwargs)
        mine = next(count) == n
        if mine and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        value = real(*args, **kwargs)
        if mine and when == "half":
            return Half(value)
        if mine:
            os.kill(os.getpid(), signal.SIGKILL)
        return value

    setattr(owner, name, call)


def limit_after(n, size):
    """In a child: after n renamed files none may grow beyond `size` bytes."""
    real, count = os.replace, itertools.count(1)
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))  # noqa: E731

    def replace(*args):
        real(*args)
        if next(count) == n:
            limit()

    os.replace = replace
    if not n:
        limit()


POINTS = [
    ("fsync", "before"),
    ("fsync", "after"),
    ("replace", "after"),
    ("open", "half"),
    ("open", "after"),
    ("unlink", "after"),
]


def write_kills(begin, whole, folder, kinds=KINDS, points=POINTS):
    """Yields (kind, where, n, what is wrong): killed at each call of what writes, and resumed."""
    for kind in kinds:
        for name, when in points:
            for n in itertools.count(1, 4 if kind == "eval" else 1):  # that takes long
                cwd = shutil.copytree(begin, Path(folder, "write"))
                code, said, _ = run(*command_of(kind, cwd), cwd, before=partial(die_at, name, n, when))
                wrong = go_on(kind, cwd, whole[kind][0]) if code == -9 else differences(whole[kind][0], results(cwd))
                shutil.rmtree(cwd)
                if code == -9 or wrong:
                    yield kind, f"killed {when} {name}", n, wrong
                if code != -9:
                    break


def refused(kind, cwd, code, said, whole):
    """What is wrong with a run that could not write; and with the next one, which can."""
    if code == 0:
        return differences(whole, results(cwd))
    wrong = [f"[{code}] {said}"] if code != 1 or "Traceback" in said or len(said) > MESSAGE + PREFIX else []
    wrong += [] if any(n.rsplit("/")[-1] in said for n in (*whole, "groups", ".lock")) else [f"names no file: {said}"]
    if left := [p.name for p in Path(cwd).rglob("*.tmp")]:
        wrong.append(f"left {left[0]}")
    for path in Path(cwd, "out").rglob("*.pt"):
        try:
            load_checkpoint(path)
        except ValueError as e:
            wrong.append(f"damaged: {e}")
    return "; ".join(wrong)


def full_disks(begin, whole, folder, kinds=KINDS, sizes=(0, 300, 3000, 30_000, 60_000), after=(0, 3, 9, 20)):
    """Yields (kind, limit, n renames before it, what is wrong): a limit on the size of files, then none."""
    for kind in kinds:
        for size, n in itertools.product(sizes, after):
            cwd = shutil.copytree(begin, Path(folder, "full"))
            code, said, _ = run(*command_of(kind, cwd), cwd, before=partial(limit_after, n, size))
            wrong = refused(kind, cwd, code, said, whole[kind][0])
            if code:
                again = go_on(kind, cwd, whole[kind][0])
                wrong += f"; then {again}" if again else ""
            shutil.rmtree(cwd)
            yield kind, f"files of {size} bytes [{code}]", n, wrong.strip("; ")


def full_tmpfs(begin, whole, folder, kinds=KINDS, rooms=(0, 8, 40, 120, 240)):
    """The same on a small file system of its own, where root may mount one: `rooms` kB are free. A test of the real
    ENOSPC."""
    cwd = Path(folder, "small")
    for kind, room in itertools.product(kinds, rooms):
        cwd.mkdir(exist_ok=True)
        mount = ["mount", "-t", "tmpfs", "-o"]
        if subprocess.run([*mount, "size=64m", "none", str(cwd)], capture_output=True).returncode:
            return
        try:
            shutil.copytree(begin, cwd, dirs_exist_ok=True)
            used = os.statvfs(cwd)
            used = (used.f_blocks - used.f_bfree) * used.f_frsize
            remount = lambda size: subprocess.run(["mount", "-o", f"remount,size={size}", str(cwd)], check=True)  # noqa: E731
            remount(used + room * 1024)
            code, said, _ = run(*command_of(kind, cwd), cwd)
            wrong = refused(kind, cwd, code, said, whole[kind][0])
            remount("64m")
            if code:
                again = go_on(kind, cwd, whole[kind][0])
                wrong += f"; then {again}" if again else ""
            yield kind, f"{room} kB free [{code}]", 0, wrong.strip("; ")
        finally:
            subprocess.run(["umount", "-l", str(cwd)], check=True)


# ---- the command ---------------------------------------------------------------------------------------------------

PARTS = ("errors", "inputs", "kills", "writes")


def print_errors(options, folder):
    bad = 0
    for line, said, code, wrong in error_rows(folder):
        print(f"$ python {line[:200]}\n{said[-600:]}\n-> {code}" + (f"    WRONG: {wrong}" if wrong else "") + "\n")
        bad += bool(wrong)
    print(f"errors: {len(CASES)} mistakes, {bad} outside what is allowed\n")
    return bad


def print_inputs(options, folder):
    bad, seed = 0, options["seed"]
    for name, read, lines, found, seconds in input_rows(int(options["inputs"]), seed, folder):
        faults = sum(len(numbers) for _, numbers in found)
        print(f"{name:22} {read:6} read {lines:6} one line {faults:6} faults {seconds:6.1f} s", flush=True)
        for what, numbers in found:
            print(f"    {len(numbers)} x --seed={seed} --only='{name}:{numbers[0]}' {what}")
        bad += faults
    print(f"inputs: {bad} outside what is allowed\n")
    return bad


def print_kills(options, folder):
    bad = 0
    for kind, i, at, wrong in kill_runs(int(options["kills"]), options["seed"], folder):
        print(f"{kind:9} {i:4}  killed at {at}  {wrong or 'as undisturbed'}", flush=True)
        bad += bool(wrong)
    print(f"kills: {options['kills']} runs, {bad} outside what is allowed\n")
    return bad


def print_writes(options, folder):
    begin, whole = undisturbed(folder)
    rows = itertools.chain(*(f(begin, whole, folder) for f in (full_disks, full_tmpfs, write_kills)))
    return print_rows(rows)


def print_disk(options, folder):
    """A few of `writes`, for CI."""
    begin, whole = undisturbed(folder, ("train", "data_gen"))
    cases = (("train", 30_000, 9), ("data_gen", 3000, 3))
    full = (full_disks(begin, whole, folder, [kind], [size], [n]) for kind, size, n in cases)
    return print_rows(itertools.chain(*full, write_kills(begin, whole, folder, ["train"], [("fsync", "before")])))


def print_rows(rows):
    bad = 0
    for kind, where, n, wrong in rows:
        print(f"{kind:9} {where:28} {n:4}  {wrong or 'as undisturbed afterwards'}", flush=True)
        bad += bool(wrong)
    print(f"writes: {bad} outside what is allowed\n")
    return bad


def print_one(name, number, seed, folder):
    """One mutated input, in this process, with its traceback."""
    with chdir(make_world(folder)):
        extend()
        target = targets()[name]
        target.samples = [Path(s).read_bytes() for s in target.samples or filter(None, [target.file])]
        os.environ["HF_HUB_CACHE"] = "hub"
        signal.signal(signal.SIGALRM, late)
        try:
            print(try_input(target, seed, name, number))
        finally:
            if target.file and Path(target.file).is_file():
                print(f"the input: {Path(target.file).read_bytes()[:1500]}")


def main(argv):
    options = dict(kills="60", inputs="2000", seed="0")
    options |= dict(w[2:].split("=", 1) for w in argv if w.startswith("--"))
    parts = [w for w in argv if not w.startswith("--")] or PARTS
    with tempfile.TemporaryDirectory() as folder:
        if "only" in options:
            name, number = options["only"].rsplit(":", 1)
            return print_one(name, int(number), options["seed"], f"{folder}/one")
        bad = 0
        for part in parts:
            began = time.time()
            bad += globals()[f"print_{part}"](options, f"{folder}/{part}")
            print(f"{part} took {time.time() - began:.0f} s\n")
    return bool(bad)


if __name__ == "__main__":
    if sys.argv[1:2] == ["child"]:
        sys.exit(in_child(sys.argv[2], sys.argv[3:]))
    sys.exit(main(sys.argv[1:]))
