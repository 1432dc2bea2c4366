"""The settings of all scripts: one dataclass, one loader, one check for files and flags alike.

A config file is plain Python: `name = value` lines, and `from configs.other import *` to build on another one.
`python train.py configs/toy_cp.py --tau=0.5` loads the file, then the flags. Every setting, its default and its
meaning: `python train.py --help`.
"""

import argparse
import difflib
import inspect
import json
import math
import re
import sys
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def setting(default, remark, above=None, low=None, high=None, among=None):
    """One setting: default, remark (unit, what 0 means) and range: > above, >= low, <= high, one of `among`."""
    return field(default=default, metadata=dict(remark=remark, above=above, low=low, high=high, among=among))


@dataclass
class Config:
    """Every setting with its type, default and remark. `load_config` is the way to make one."""

    # the run
    out_dir: str = setting("out/run", "folder for checkpoints, log.jsonl, config.json and summary.json")
    seed: int = setting(0, "seeds the initial weights, the data order and all sampling", low=0, high=2**31 - 1)
    resume: bool = setting(False, "go on from out_dir/last.pt, exactly as if the run had not stopped")
    device: str = setting("auto", "auto takes cuda, else mps, else cpu", among=("auto", "cuda", "mps", "cpu"))
    dtype: str = setting(
        "auto", "of matrix products; weights stay fp32", among=("auto", "float32", "bfloat16", "float16")
    )
    compile: str = setting("auto", "torch.compile; auto means on cuda only", among=("auto", "yes", "no"))

    # the model
    init_from: str = setting(
        "gpt2", "published name, folder or file of GPT-2 weights, checkpoint .pt, config .py, or 'scratch'"
    )
    n_layer: int = setting(4, "blocks; this and the next three only for init_from=scratch", low=1)
    n_head: int = setting(4, "attention heads", low=1)
    n_embd: int = setting(128, "width, a multiple of n_head", low=1)
    n_positions: int = setting(128, "context, tokens", low=4)
    tokenizer: str = setting("gpt2", "gpt2, or toy for the toy world's words", among=("gpt2", "toy"))

    # the data
    data: str = setting("toy", "groups .jsonl or .json, for lm also text .txt (one document a line), or 'toy'")
    n_pos: int = setting(5, "P, positives drawn per group and step", low=1)
    n_neg: int = setting(5, "N, negatives drawn per group and step", low=1)
    drop_small: bool = setting(False, "leave out groups with fewer than P or N sentences; otherwise they are an error")
    max_tokens: int = setting(
        128, "longer sentences lose their end and are counted; start and end token included", low=3
    )

    # the objective: 'lm' is next-token loss; 'cp' is cp_weight * CP + nll_weight * NLL + kl_weight * KL, plus anchors
    objective: str = setting("cp", "cp: contrastive perplexity; lm: language modelling", among=("cp", "lm"))
    cp_weight: float = setting(1.0, "weight of the contrastive term; 0 leaves plain fine-tuning on positives", low=0)
    tau: float = setting(0.3, "temperature, nats: how far negatives are pushed", above=0)
    alpha: float = setting(1.0, "weight of the negatives", above=0)
    variant: str = setting("paper", "the paper's equation, or the released code's", among=("paper", "released"))
    distance: str = setting("abs", "signed pushes every negative up", among=("abs", "signed"))
    detach_centroid: bool = setting(False, "no gradient through the positives' mean score")
    score: str = setting("nll", "distances between log-perplexities, or between perplexities", among=("nll", "ppl"))
    nll_weight: float = setting(1.0, "weight of the positives' mean nll, nats per token; 0 disables", low=0)
    kl_weight: float = setting(0.0, "weight of KL(base || model) on the positives, nats per token; 0 disables", low=0)
    anchor_kl: float = setting(0.0, "weight of the same KL on texts that the base wrote itself; 0 disables", low=0)
    anchor_nll: float = setting(0.0, "weight of the nll of these texts, nats per token; 0 disables", low=0)
    anchor_texts: int = setting(
        256, "how many it writes for that before training; none that the scorer calls toxic", low=1
    )
    anchor_prompted: float = setting(0.5, "share of them that go on from the beginning of a toxic one", low=0, high=1)
    anchor_tokens: int = setting(128, "longest of them, tokens", low=1)
    anchor_batch: int = setting(6, "of them in each forward pass", low=1)

    # the optimiser (AdamW)
    freeze_embeddings: bool = setting(
        False, "tokens and positions stay as they are: AdamW moves rare ones as far as any"
    )
    max_steps: int = setting(200, "optimiser steps", low=1)
    batch_size: int = setting(6, "groups (cp) or documents (lm) per forward pass", low=1)
    grad_accum: int = setting(1, "forward passes per step: a step sees batch_size * grad_accum", low=1)
    lr: float = setting(5e-5, "peak learning rate", above=0)
    min_lr: float = setting(0.0, "learning rate at the last step", low=0)
    warmup_steps: int = setting(10, "linear warm-up, steps; 0 disables", low=0)
    weight_decay: float = setting(0.0, "on matrices only; 0 disables", low=0)
    beta1: float = setting(0.9, "AdamW", low=0, high=0.9999)
    beta2: float = setting(0.98, "AdamW", low=0, high=0.9999)
    grad_clip: float = setting(1.0, "largest gradient norm; 0 disables", low=0)

    # measuring
    eval_interval: int = setting(50, "steps between validations; 0: only at the first and the last step", low=0)
    eval_groups: int = setting(40, "groups (cp) or documents (lm) that a validation scores", low=1)
    eval_samples: int = setting(100, "samples of each kind, free and prompted, per validation", low=1)
    k: int = setting(25, "samples per prompt; free samples are taken in sets of k", low=1)
    sample_tokens: int = setting(20, "longest sample, tokens", low=1)
    temperature: float = setting(1.0, "of samples; 0 is greedy", low=0)
    top_p: float = setting(0.9, "nucleus of samples; 1 keeps all", above=0, high=1)
    scorer: str = setting("ngram", "toxicity of texts: ngram (built in), module:function, or file:SCORES.jsonl")

    # paraphrasing, in eval.py and data_gen.py: demonstrations in this form, then the beginning of one more
    shots: int = setting(4, "demonstrations before a sentence to paraphrase", low=0)
    positive_prompt: str = setting(
        'Sentence: "{input}"\nPolite: "{output}"\n', "asks for a positive; what follows {output} closes it"
    )
    negative_prompt: str = setting('Sentence: "{input}"\nRude: "{output}"\n', "asks for a negative")

    # data_gen.py only: groups of n_pos + n_neg, from batch_size seeds at a time, k samples of each per round
    seeds: str = setting("", "sentences to paraphrase: text file, one a line, or the inputs of a group file, or 'toy'")
    n_seeds: int = setting(0, "of them, drawn at random; 0 takes all", low=0)
    data_out: str = setting("", "the group file to write; '' means out_dir/groups.jsonl")
    demos: str = setting("data/detox/groups.jsonl", "groups whose train split demonstrates; 'toy' for the toy world's")
    rounds: int = setting(8, "rounds of k samples before a seed is given up", low=1)
    surplus: int = setting(2, "sentences to look for, times n_pos and n_neg: the positives' nearest are kept", low=1)
    min_length: float = setting(0.6, "tokens of a paraphrase / tokens of its seed, at least", low=0)
    max_length: float = setting(1.6, "the same, at most", above=0)
    min_overlap: float = setting(0.3, "ROUGE-L with the seed, at least: less says something else", low=0, high=1)
    max_overlap: float = setting(0.85, "the same, at most: more is a copy", low=0, high=1)
    max_jaccard: float = setting(0.8, "shared words / all words of two paraphrases of a group, at most", low=0, high=1)
    max_toxicity: float = setting(0.3, "scorer's toxicity of a positive, at most", low=0, high=1)
    min_toxicity: float = setting(0.5, "scorer's toxicity of a negative, at least", low=0, high=1)

    # eval.py only
    ckpt: str = setting("", "the tuned model: checkpoint, folder or name; '' means out_dir/best.pt")
    base: str = setting("", "what it is compared with; '' means the model that the checkpoint was tuned from")
    parts: str = setting("all", "scores,toxicity,rewriting,fluency,diversity,utility,drift, or some of them")
    prompts: str = setting("data/prompts.jsonl", "prompts, plain or RealToxicityPrompts' JSON lines; '' for none")
    n_prompts: int = setting(50, "prompts of each kind, from that file and from the test split; 0 takes all", low=0)
    text: str = setting("", "text file for perplexity and drift (.raw: WikiText), or wikitext2; '' for none")
    text_tokens: int = setting(0, "tokens of that text, from its beginning; 0 takes all", low=0)
    tasks: str = setting("", "task files, or lambada, piqa, hellaswag, with commas between; '' for none")
    rewrite: str = setting("", "only rewrite this text file politely, line by line, with the tuned model")
    plot: str = setting("", "also draw the scores of the test split into this .png (needs matplotlib)")
    check: str = setting("", "only measure this published model against its published numbers, for instance gpt2")

    def __post_init__(self):
        for f in fields(self):
            setattr(self, f.name, check(f, getattr(self, f.name)))
        if self.warmup_steps >= self.max_steps:
            raise ValueError(f"warmup_steps={self.warmup_steps} must be smaller than max_steps={self.max_steps}")
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr={self.min_lr} must not be larger than lr={self.lr}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd={self.n_embd} must be a multiple of n_head={self.n_head}")
        if self.objective == "cp" and not self.cp_weight + self.nll_weight + self.kl_weight:
            raise ValueError("cp_weight, nll_weight and kl_weight are all 0: nothing to train on")
        for name in ("positive_prompt", "negative_prompt"):
            setattr(self, name, getattr(self, name).replace("\\n", "\n"))  # as one writes it in a flag
            if not re.fullmatch(r"[^{}]*\{input\}[^{}]*\{output\}[^{}]+", getattr(self, name)):
                got = getattr(self, name)
                raise ValueError(f"{name} must hold {{input}}, then {{output}}, then a closing mark, got {got!r}")
        for low, high in (("min_length", "max_length"), ("min_overlap", "max_overlap")):
            if getattr(self, low) > getattr(self, high):
                raise ValueError(
                    f"{low}={getattr(self, low)} is above {high}={getattr(self, high)}: nothing could pass"
                )
        if self.variant == "released" and self.distance == "signed":
            raise ValueError("variant=released has no signed distance: leave distance=abs")
        if self.objective == "cp" and self.init_from == "scratch":
            raise ValueError("objective=cp tunes a model that exists: init_from must name one, not 'scratch'")


def check(f, value, flag=False):
    """`value` with the type of dataclass field f, or ValueError. A flag's text is converted; an int is a fine float."""
    wanted, m, original = f.type, f.metadata, value
    try:
        if flag and wanted is not str:
            value = {"true": True, "false": False}[value.lower()] if wanted is bool else wanted(value)
        elif wanted is float and type(value) is int:
            value = float(value)
    except (KeyError, ValueError, OverflowError):
        pass  # what is wrong with it is said below
    if type(value) is not wanted:
        what = {bool: "True or False", int: "a whole number", float: "a number", str: "text"}[wanted]
        raise ValueError(f"{f.name} wants {what}, got {original!r}")
    if m["among"] and value not in m["among"]:
        near = difflib.get_close_matches(str(value), m["among"], 1)
        hint = f": did you mean {near[0]}?" if near else ""
        raise ValueError(f"{f.name} wants one of {', '.join(m['among'])}, got {value!r}{hint}")
    if wanted in (int, float):
        for ok, rule in (
            (math.isfinite(value), "a finite number"),
            (m["above"] is None or value > m["above"], f"more than {m['above']}"),
            (m["low"] is None or value >= m["low"], f"at least {m['low']}"),
            (m["high"] is None or value <= m["high"], f"at most {m['high']}"),
        ):
            if not ok:
                raise ValueError(f"{f.name} must be {rule}, got {value}")
    return value


def unknown(key):
    """The error for a key that is no setting, with the nearest name."""
    near = difflib.get_close_matches(key, [f.name for f in fields(Config)], 1)
    return ValueError(f"unknown setting {key!r}" + (f": did you mean {near[0]}?" if near else "; --help lists all"))


def find(path):
    """`path` as given, or else below the project's folder, so that scripts run from anywhere. A bare word is a name."""
    path = Path(path)
    named = path.name == str(path) and not path.suffix  # 'gpt2', not './gpt2'
    return path if named or path.exists() or not (ROOT / path).exists() else ROOT / path


def read_config_file(path):
    """The settings that a config file assigns, as a dict. Raises FileNotFoundError or ValueError."""
    path = find(path)
    if path.suffix != ".py" or not path.is_file():
        raise FileNotFoundError(f"no config file {str(path)!r}: for instance configs/toy_cp.py")
    names = {}
    sys.path.insert(0, str(ROOT))  # for `from configs.other import *`
    try:
        exec(compile(path.read_text(), str(path), "exec"), names)
    except Exception as e:
        raise ValueError(f"{path}: {type(e).__name__}: {e}") from e
    finally:
        sys.path.remove(str(ROOT))
    names = {k: v for k, v in names.items() if not k.startswith("_") and not inspect.ismodule(v)}
    settings = {f.name: f for f in fields(Config)}
    for key, value in names.items():
        if key not in settings:
            raise ValueError(f"{path}: {unknown(key)}")
        try:
            names[key] = check(settings[key], value)
        except ValueError as e:
            raise ValueError(f"{path}: {e}") from e
    return names


def load_config(argv=None, description=None, start=None):
    """Settings from `[config.py] --key=value ...` (also `--key value`, and a bare `--key` for True), checked. Without a
    config file they start from start(flags), a dict, if that is given.

    Exits with one line on bad input, as argparse does; `--help` prints every setting.
    """
    parser = argparse.ArgumentParser(
        usage="%(prog)s [config.py] [--setting=value ...]",
        description=description,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", nargs="?", help="a config file, for instance configs/toy_cp.py")
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}\n")  # one line, without the usage
    for f in fields(Config):
        among = f" [{', '.join(f.metadata['among'])}]" if f.metadata["among"] else ""
        default = str(f.default).replace("\n", "\\n")
        remark = f"{f.metadata['remark']}{among} (default: {default})".replace("%", "%%")
        parser.add_argument(f"--{f.name}", metavar=f.type.__name__.upper(), default=argparse.SUPPRESS, help=remark)
    words = list(sys.argv[1:] if argv is None else argv)
    switches = {f"--{f.name}" for f in fields(Config) if f.type is bool}
    for i, word in enumerate(words):  # a bare --resume means True
        after = (words[i + 1 :] or ["--"])[0]
        if word in switches and (after.startswith("--") or after.endswith(".py")):
            words[i] = f"{word}=true"
    args, rest = parser.parse_known_args(words)
    flags = vars(args)
    path = flags.pop("config")
    try:
        for word in rest:
            if word.startswith("--"):
                raise unknown(word[2:].split("=")[0])
            raise ValueError(f"{word!r} is neither a setting nor the one config file")
        settings = {f.name: f for f in fields(Config)}
        flags = {k: check(settings[k], v, flag=True) for k, v in flags.items()}
        begin = read_config_file(path) if path else start(flags) if start else {}
        return Config(**(begin | flags))
    except (ValueError, FileNotFoundError) as e:
        parser.exit(2, f"{parser.prog}: {' '.join(str(e).split())}\n")


def changed(config):
    """The settings that differ from the defaults, as a dict."""
    return {f.name: getattr(config, f.name) for f in fields(Config) if getattr(config, f.name) != f.default}


def as_json(config):
    return json.dumps(asdict(config), indent=2) + "\n"
