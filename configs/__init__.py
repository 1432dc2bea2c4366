"""The settings of all scripts: one dataclass, one loader, one check for files and flags alike.

A config file is plain Python: `name = value` lines, and `from configs.other import *` to build on another one. It is
executed, so run only files that you trust. `python train.py configs/toy_cp.py --tau=0.5` loads the file, then the
flags; `python train.py --help` lists the settings that train.py reads. Nothing here imports torch: help is immediate.
"""

import argparse
import difflib
import inspect
import io
import itertools
import json
import math
import operator
import os
import re
import shlex
import sys
import textwrap
import traceback
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MESSAGE = 600  # characters of an error message: one names an address, a path and two ways out
LARGEST = 2**31 - 1  # of whole numbers
STARTS = (
    "a published name, a folder or file of GPT-2 weights, a checkpoint .pt, a config .py (whose model is made if it is "
    "missing), or 'scratch'"
)
EVAL, TRAIN_EVAL, TRAIN_GEN, EVAL_GEN = "eval", "train eval", "train data_gen", "eval data_gen"
ALL = "train eval data_gen"


def setting(default, remark, scripts=None, *, group, usual, above=None, low=None, high=None, among=""):
    """One setting: default, remark (unit, what 0 means), the scripts that read it if not the usual ones of its group,
    and its range: > above, >= low, <= high, one of the words `among`, which may be {word: what it means}."""
    among = dict.fromkeys(among.split()) if isinstance(among, str) else among
    metadata = dict(remark=remark, group=group, scripts=(scripts or usual).split(), among=among)
    return field(default=default, metadata=metadata | dict(above=above, low=low, high=high))


def objectives():
    """{name: source} of OBJECTIVES in loss.py, which is read and not imported, since it imports torch."""
    table = (ROOT / "loss.py").read_text(encoding="utf-8").split("\nOBJECTIVES = {")[1].split("\n}")[0]
    return dict(re.findall(r'^    "(\w+)":[^#\n]*(?:# *(.*))?$', table, re.MULTILINE))


_run = partial(setting, group="the run", usual=ALL)
_model = partial(setting, group="the model", usual="train")
_data = partial(setting, group="the data", usual="train")
_objective = partial(setting, group="the objective", usual="train")
_edit = partial(setting, group="weights edited in the place of training", usual="train")
_anchor = partial(setting, group="anchors: what holds the language", usual="train")
_optimiser = partial(setting, group="the optimiser (AdamW)", usual="train")
_measure = partial(setting, group="measuring", usual=TRAIN_EVAL)
_prompt = partial(setting, group="paraphrasing", usual=EVAL_GEN)
_gen = partial(setting, group="groups from the base model", usual="data_gen")
_eval = partial(setting, group="what to compare, and how", usual="eval")
_steer = partial(setting, group="steering: what the tuned side of eval.py is sampled by", usual="eval")
_command = partial(setting, group="other commands of eval.py", usual="eval")


@dataclass
class Config:
    """Every setting with its type, default and remark. `load_config` is the way to make one."""

    out_dir: str = _run("out/run", "folder for all that a run writes: new, empty, or of such a run")
    seed: int = _run(0, "seeds the initial weights, the data order and all sampling", low=0)
    resume: bool = _run(False, "go on with the unfinished run in out_dir, as if it had not stopped", TRAIN_GEN)
    sweep: str = _run("", "train each combination, in out_dir's subfolders: 'tau=0.1,0.3 seed=0,1,2'", "train")
    device: str = _run("auto", "auto takes cuda, else mps, else cpu", among="auto cuda mps cpu")
    dtype: str = _run("auto", "of matrix products; trained weights stay float32", among="auto float32 bfloat16 float16")
    compile: str = _run("auto", "torch.compile; auto: cuda, from 2,000 steps", "train", among="auto yes no")

    init_from: str = _model("gpt2", "model to start from: " + STARTS, TRAIN_GEN)
    tokenizer: str = _model("gpt2", "gpt2, or toy for the toy world's words", ALL, among="gpt2 toy")
    n_layer: int = _model(4, "blocks of a model from scratch", low=1)
    n_head: int = _model(4, "attention heads of a model from scratch", low=1)
    n_embd: int = _model(128, "width of a model from scratch, a multiple of n_head", low=1)
    n_positions: int = _model(128, "context of a model from scratch, tokens", low=4)

    data: str = _data(
        "toy", "group file, 'toy' or 'toy_facts'; for objective=lm also text, one document a line", TRAIN_EVAL
    )
    n_pos: int = _data(5, "P, positives drawn per group and step", TRAIN_GEN, low=1)
    n_neg: int = _data(5, "N, negatives drawn per group and step", TRAIN_GEN, low=1)
    n_random: int = _data(0, "negatives of other groups added to a group's N, easy ones", low=0)
    max_tokens: int = _data(128, "longer sentences lose their end; both end tokens included", TRAIN_EVAL, low=3)

    objective: str = _objective(
        "cp", "what is minimised; equations: loss.py", among=objectives() | dict(lm="next-token loss of documents")
    )
    cp_weight: float = _objective(1.0, "weight of the objective, cp or another; 0: anchors alone", low=0)
    score: str = _objective("nll", "of a sentence: nats per token, perplexity, or sum of nats", among="nll ppl sum")
    tau: float = _objective(1.0, "cp: temperature, nats: how far negatives are pushed away", above=0)
    alpha: float = _objective(1.0, "cp, kto: weight of the negatives against the positives", above=0)
    variant: str = _objective("paper", "cp: the paper's equation or the released code's", among="paper released")
    distance: str = _objective("abs", "cp: signed pushes every negative up, not only away", among="abs signed")
    detach_centroid: bool = _objective(False, "cp: no gradient through the positives' mean score")
    leave_one_out: bool = _objective(False, "cp: a positive is compared with the mean of the others")
    beta: float = _objective(
        2.0,
        "dpo, ipo, dpop, nca, kto, simpo, cpo: 1 / the gap that is enough. With score=sum about a sentence's length "
        "smaller: 0.1",
        above=0,
    )
    margin: float = _objective(0.5, "margin, simpo: gap between negatives and positives that is asked for", low=0)
    penalty: float = _objective(50.0, "dpop: gap that a positive loses by what it has become less likely", low=0)

    nll_weight: float = _anchor(1.0, "weight of the positives' mean nll; 0 disables", low=0)
    hold_weight: float = _anchor(0.0, "weight of (phi - the base's phi)^2 of the positives; 0 disables", low=0)
    anchor_kl: float = _anchor(0.0, "weight of KL(base || model) on texts the base wrote itself; 0 disables", low=0)
    anchor_nll: float = _anchor(0.0, "weight of the mean nll of texts the base wrote itself; 0 disables", low=0)
    anchor_texts: int = _anchor(256, "texts that the base writes before training; none is toxic to the scorer", low=1)
    anchor_prompted: float = _anchor(0.5, "share of these texts that continue a toxic beginning", low=0, high=1)
    anchor_tokens: int = _anchor(128, "longest of these texts, tokens", low=1)
    anchor_batch: int = _anchor(6, "of these texts in each forward pass", low=1)

    edit: str = _edit("none", "what changes the weights, see engine/edits.py", among="none task_vector profs")
    edit_model: str = _edit("", "task_vector: model tuned on toxic text, by --objective=toxic_only for instance")
    edit_strength: float = _edit(1.0, "task_vector: how far away from that model", low=0)
    edit_directions: int = _edit(2, "profs: directions that are taken out of each MLP", low=1)
    edit_from: float = _edit(0.4, "profs: share of the blocks, from the first on, that are left alone", low=0, high=1)

    max_steps: int = _optimiser(200, "optimiser steps", low=1)
    batch_size: int = _optimiser(6, "groups or documents a forward pass; of data_gen, seeds a block", TRAIN_GEN, low=1)
    grad_accum: int = _optimiser(1, "forward passes per step, batch_size each; torchrun's processes share them", low=1)
    lr: float = _optimiser(5e-5, "peak learning rate; a cosine takes it to 0", above=0)
    warmup_steps: int = _optimiser(10, "steps of linear warm-up; 0 disables", low=0)
    weight_decay: float = _optimiser(0.0, "on matrices only; 0 disables", low=0)
    grad_clip: float = _optimiser(1.0, "largest gradient norm; 0 disables", low=0)
    freeze_embeddings: bool = _optimiser(False, "hold token and position embeddings still")
    lora_rank: int = _optimiser(0, "train LoRA matrices of this rank in place of the weights; 0: the weights", low=0)
    lora_alpha: float = _optimiser(16.0, "what LoRA adds is scaled by alpha / rank", above=0)
    lora_targets: str = _optimiser("all", "which matrices of a block get them", among="all attn mlp")

    scorer: str = _measure(
        "ngram",
        "judge of toxicity: ngram, module:function, or file:SCORES.jsonl (eval.py); eval.py takes several, with commas "
        "between, and shows how far the others agree with the first",
        ALL,
    )
    eval_interval: int = _measure(50, "steps between validations; 0: first and last step only", "train", low=0)
    eval_groups: int = _measure(40, "groups or documents that a validation scores", "train", low=1)
    price: float = _measure(1.0, "best.pt has least toxicity + price * what it costs in language", "train", low=0)
    eval_samples: int = _measure(100, "samples of each kind, free and prompted, per validation", "train", low=1)
    k: int = _measure(25, "samples per prompt; of data_gen, per seed and round", ALL, low=1)
    sample_tokens: int = _measure(20, "longest sample, tokens", low=1)
    judge_whole: bool = _measure(False, "the scorer sees a sample behind its prompt, not the sample alone")
    temperature: float = _measure(1.0, "of sampling; 0 is greedy", ALL, low=0)
    top_p: float = _measure(0.9, "nucleus of sampling; 1 keeps all", ALL, above=0, high=1)

    shots: int = _prompt(4, "demonstrations before a sentence that is to be paraphrased", low=0)
    neutral_prompt: str = _prompt('Sentence: "{input}"\nParaphrase: "{output}"\n', "one that keeps the tone", EVAL)
    polite: bool = _prompt(False, "rewriting asks for politeness, by positive_prompt and rude demonstrations", EVAL)
    positive_prompt: str = _prompt('Sentence: "{input}"\nPolite: "{output}"\n', "a demonstration of a positive")
    negative_prompt: str = _prompt('Sentence: "{input}"\nRude: "{output}"\n', "the same of a negative")

    seeds: str = _gen("", "sentences to paraphrase: text file, one a line; a group file's inputs; or 'toy'")
    demos: str = _gen("data/detox/groups.jsonl", "groups whose train split demonstrates, or 'toy'")
    rounds: int = _gen(8, "rounds of k samples before a seed is given up", low=1)
    min_length: float = _gen(0.6, "tokens of a paraphrase / tokens of its seed, at least", low=0)
    max_length: float = _gen(1.6, "tokens of a paraphrase / tokens of its seed, at most", above=0)
    min_overlap: float = _gen(0.5, "content words in common with the seed, at least: else off topic", low=0, high=1)
    max_toxicity: float = _gen(0.3, "the scorer's toxicity of a positive, at most", low=0, high=1)
    min_toxicity: float = _gen(0.5, "the scorer's toxicity of a negative, at least", low=0, high=1)

    ckpt: str = _eval("", "the tuned model: checkpoint, folder or name; '' means out_dir/best.pt")
    base: str = _eval("", "what it is compared with; '' means the model that it was tuned from")
    parts: str = _eval("all", "scores,toxicity,rewriting,fluency,diversity,utility,drift, or some of them")
    prompts: str = _eval("data/prompts.jsonl", "plain lines, or JSON lines as in RealToxicityPrompts; '' for none")
    protocol: str = _eval(
        "none",
        "of that file, challenging: those that RealToxicityPrompts marks so, cut at 32 tokens, 20 greedy tokens after "
        "each, and published numbers beside ours",
        among="none challenging",
    )
    n_prompts: int = _eval(50, "prompts of each kind, from that file and from the test split; 0 takes all", low=0)
    text: str = _eval("", "text file for perplexity and drift (.raw: WikiText), or wikitext2; '' for none")
    tasks: str = _eval(
        "", "task files, or lambada, piqa, hellaswag, toy_efficacy, toy_reworded, toy_neighbours, with commas between"
    )
    frame_tasks: bool = _eval(False, "a task's contexts begin with the end token, as sentences do; lm-eval's do not")
    plot: str = _eval("", "FILE.png: scores, and curves beside it; of --sweep, toxicity against its price", TRAIN_EVAL)

    steer: str = _steer(
        "none", "see measures/decoding.py; without --ckpt of the base", among="none dexperts sasa reversal"
    )
    steer_strength: float = _steer(1.0, "how far; 0 is the plain model. Papers: dexperts 2, reversal 1", low=0)
    expert: str = _steer("", "dexperts: model tuned on harmless text; '' takes the steered one itself")
    anti_expert: str = _steer("", "dexperts: model tuned on toxic text; '' takes the steered one itself")

    prompt: str = _command("", "show k continuations by base and tuned model; without a value, ask for prompts")
    rewrite: str = _command("", "paraphrase this text file, line by line, with the tuned model; politely with --polite")
    export: str = _command("", "write the tuned model for transformers, with a model card, into this folder")
    check: str = _command("", "measure this published model against its published numbers, for instance gpt2")

    def __post_init__(self):
        for name in SETTINGS:
            setattr(self, name, check_value(name, getattr(self, name)))
        if not self.out_dir.strip():
            raise ValueError("out_dir is empty (an unset variable of the shell?): name a folder")
        if self.warmup_steps >= self.max_steps:
            raise ValueError(f"warmup_steps={self.warmup_steps} must be smaller than max_steps={self.max_steps}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd={self.n_embd} must be a multiple of n_head={self.n_head}")
        weights = ("cp_weight", "nll_weight", "hold_weight", "anchor_kl", "anchor_nll")
        if self.objective != "lm" and not any(getattr(self, w) for w in weights):
            raise ValueError(f"{', '.join(weights[:-1])} and {weights[-1]} are all 0: nothing to train on")
        for name in ("neutral_prompt", "positive_prompt", "negative_prompt"):
            value = getattr(self, name).replace("\\n", "\n")  # as one writes it in a flag
            if not re.fullmatch(r"[^{}]*\{input\}[^{}]*\{output\}[^{}]+", value):
                wanted = f"{name} must hold {{input}}, then {{output}}, then a closing mark"
                raise ValueError(f"{wanted}, as {SETTINGS[name].default!r} does, got {value!r:.60}")
            setattr(self, name, value)
        if self.min_length > self.max_length:
            raise ValueError(f"min_length={self.min_length} is above max_length={self.max_length}: nothing could pass")
        if self.leave_one_out and self.n_pos < 2:
            raise ValueError("leave_one_out compares a positive with the others of its group: n_pos must be at least 2")
        if self.variant == "released" and self.distance == "signed":
            raise ValueError("variant=released works only with distance=abs: leave distance, or take variant=paper")
        if self.objective != "lm" and self.init_from == "scratch":
            wanted = f"objective={self.objective} tunes a model: init_from must name one"
            raise ValueError(f"{wanted}, not 'scratch' (or --objective=lm)")
        if self.edit != "none" and (self.lora_rank or self.objective == "lm"):
            raise ValueError(
                f"edit={self.edit} changes all weights, by groups: it takes --lora_rank=0, and no objective=lm"
            )
        if self.edit == "task_vector" and not self.edit_model:
            raise ValueError("edit=task_vector goes away from a model tuned on toxic text: name it as edit_model")
        if self.protocol == "challenging" and not self.prompts:
            raise ValueError("protocol=challenging takes --prompts=prompts.jsonl, the file of RealToxicityPrompts")
        if self.steer == "dexperts" and not (self.expert or self.anti_expert):
            raise ValueError("steer=dexperts wants the models that it compares: give --expert, --anti_expert, or both")
        if self.lora_rank and self.init_from == "scratch":
            raise ValueError("lora_rank adds to a model: init_from must name one, not 'scratch' (or --lora_rank=0)")

    def differing(self, saved):
        """Names of train.py's settings, NOT_IDENTITY aside, that a saved run (a dict) had with another value; what
        it does not name had its default."""
        mine = {n: f.default for n, f in SETTINGS.items() if "train" in f.metadata["scripts"] and n not in NOT_IDENTITY}
        return [n for n, default in mine.items() if saved.get(n, default) != getattr(self, n)]


SETTINGS = {f.name: f for f in fields(Config)}
LIMITS = dict(above=(operator.gt, "more than"), low=(operator.ge, "at least"), high=(operator.le, "at most"))


def check_value(name, value, script=None):
    """`value` with the type of that setting, or ValueError; an int is a fine float. As a flag of `script` it is text,
    which is converted, and must be one that this script reads."""
    if name not in SETTINGS or (script and script not in SETTINGS[name].metadata["scripts"]):
        raise unknown(name, script)
    wanted, m, original = SETTINGS[name].type, SETTINGS[name].metadata, value
    try:
        if script and wanted is not str:
            value = {"true": True, "false": False}[value.lower()] if wanted is bool else wanted(value)
        elif wanted is float and type(value) is int:
            value = float(value)
    except (KeyError, ValueError, OverflowError):
        pass  # what is wrong with it is said below
    if type(value) is not wanted:
        most = f" of at most {LARGEST}" * str(original).isdigit()  # Python reads 4,300 digits
        what = {bool: "True or False", int: "a whole number" + most, float: "a number", str: "text"}[wanted]
        raise ValueError(f"{name} wants {what}, got {original!r:.60}")
    if m["among"] and value not in m["among"]:
        near = ["cuda"] if value == "gpu" else difflib.get_close_matches(value, m["among"], 1)
        hint = f": did you mean {near[0]}?" if near else ""
        raise ValueError(f"{name} wants one of {', '.join(m['among'])}, got {value!r:.60}{hint}")
    if wanted is float and not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {value}")
    if wanted is int and abs(value) > LARGEST:
        raise ValueError(f"{name} must be at most {LARGEST}, got a number of {len(str(abs(value)))} digits")
    for limit, (holds, rule) in LIMITS.items():
        if m[limit] is not None and not holds(value, m[limit]):
            raise ValueError(f"{name} must be {rule} {m[limit]}, got {value}")
    if wanted is str and any("\ud800" <= c <= "\udfff" or c == "\0" for c in value):
        raise ValueError(f"{name} wants text in UTF-8, got {value!r:.60}")
    return value


def unknown(key, script=None):
    """The error for a key that is no setting, or none of this script, with the nearest name or the right script."""
    if key in SETTINGS:
        scripts = " and ".join(f"{s}.py" for s in SETTINGS[key].metadata["scripts"])
        return ValueError(f"{key} is a setting of {scripts}, {script}.py does not read it")
    near = difflib.get_close_matches(key, SETTINGS, 1)
    return ValueError(f"unknown setting {key!r:.60}: " + (f"did you mean {near[0]}?" if near else "--help lists all"))


def find(path):
    """`path` as given, or else below the project's folder, so that scripts run from anywhere. A bare word is a name."""
    written, path = str(path), Path(path)
    if path.name == str(path) != written:  # Path makes 'gpt2' of './gpt2'
        path = path.absolute()
    named = path.name == str(path) and not path.suffix
    return path if named or path.exists() or not (ROOT / path).exists() else ROOT / path


def read_config_file(path):
    """The settings that a config file assigns, as a dict. Raises FileNotFoundError or ValueError."""
    path = find(path)
    if path.suffix != ".py" or not path.is_file():
        hint = "wanted a .py; --data= takes data, --init_from= a model" if path.exists() else "try configs/toy_cp.py"
        raise FileNotFoundError(f"no config file {str(path)!r}: {hint}")
    names = {}
    try:
        exec(compile(path.read_bytes(), str(path), "exec"), names)
    except Exception as e:
        lines = [str(frame.lineno) for frame in traceback.extract_tb(e.__traceback__) if frame.filename == str(path)]
        hint = ": save it as UTF-8" if "'utf-8' codec" in str(e) else ""
        raise ValueError(f"{':'.join([str(path), *lines[-1:]])}: {type(e).__name__}: {e}{hint}") from e
    names = {k: v for k, v in names.items() if not k.startswith("_") and not inspect.ismodule(v)}
    for key, value in names.items():
        try:
            names[key] = check_value(key, value)
        except ValueError as e:
            raise ValueError(f"{path}: {e}") from e
    return names


def made_by(path):
    """The checkpoint that a config file has made; nothing is trained. Raises FileNotFoundError if it is missing."""
    path = find(path)
    best = Path(read_config_file(path).get("out_dir", SETTINGS["out_dir"].default)) / "best.pt"
    if not best.is_file():
        command = shlex.join(["python", "train.py", str(path)])
        raise FileNotFoundError(f"the base, {best}, is missing: {command} makes it, or give --base")
    return str(best)


# A checkpoint may be a stranger's, so it must not choose where something is written or which code is run: its UNTRUSTED
# settings are ignored, and a scorer that is not among SCORERS is refused.
UNTRUSTED = "out_dir ckpt base plot steer expert anti_expert prompt rewrite export check".split()
SCORERS = ("ngram", "data.toy:rudeness", "measures.formal:informality")


def ships(init_from):
    """Whether the base that a checkpoint names runs no code of others: it is a model, or a config file in configs/."""
    return not init_from.endswith(".py") or find(init_from).resolve().parent == ROOT / "configs"


def trusted_settings(saved, path, flags):
    """The settings `saved` in the checkpoint `path` without the untrusted ones. Raises ValueError on a wrong value, or
    on a scorer that does not ship unless the user's `flags` name one."""
    if saved.get("scorer", "ngram") not in SCORERS and "scorer" not in flags:
        raise ValueError(f"{path} names the scorer {saved['scorer']!r}, which is not imported unasked: give --scorer")
    distrusted = UNTRUSTED if ships(str(saved.get("init_from", ""))) else [*UNTRUSTED, "init_from"]
    try:
        return {k: check_value(k, v) for k, v in saved.items() if k in SETTINGS and k not in distrusted}
    except ValueError as e:
        raise ValueError(f"{path}: {e}: give another checkpoint, or a config as well") from e


def load_config(script, argv=None, start=None, said=""):
    """Settings from `[config.py] --key=value ...` (also `--key value`, and a bare `--key` for True), checked. Without a
    config file they start from start(flags), a dict, if that is given.

    script: 'train', 'eval' or 'data_gen'. Prints one line, which begins with `said`, and exits with 2 on bad input.
    """
    parser = argparse.ArgumentParser(prog=f"{script}.py", allow_abbrev=False, add_help=False)
    parser.add_argument("config", nargs="?")
    plain = lambda message: re.sub(r"argument (--\w+): expected one argument", r"\1 wants a value: \1=...", message)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {one_line(plain(message))}\n")  # without the usage
    for name in SETTINGS:
        parser.add_argument(f"--{name}", default=argparse.SUPPRESS)
    words = list(sys.argv[1:] if argv is None else argv)
    bare = {f"--{f.name}": "true" for f in SETTINGS.values() if f.type is bool} | {"--prompt": "-"}
    for i, word in enumerate(words):  # a bare --resume means True, a bare --prompt the terminal
        after = (words[i + 1 :] or ["--"])[0]
        if word in bare and (after.startswith("--") or after.endswith(".py")):
            words[i] = f"{word}={bare[word]}"
    args, rest = parser.parse_known_args(words)
    flags = {name: value if isinstance(value, str) else "--" for name, value in vars(args).items() if value is not None}
    path = flags.pop("config", None)
    try:
        for word in rest:
            if word.startswith("--"):
                raise unknown(word[2:].split("=")[0])
            name = word.lstrip("-")
            hint = f"did you mean --{name}?" if name.split("=")[0] in SETTINGS else f"that is {path}"
            raise ValueError(f"{word!r:.60} is neither --name=value nor the one config file: {hint}")
        flags = {name: check_value(name, value, script) for name, value in flags.items()}
        if path:
            begin = read_config_file(path)
            other = "train" if script == "data_gen" else "data_gen"  # eval.py takes the configs of train.py
            if key := next((k for k in begin if SETTINGS[k].metadata["scripts"] == [other]), None):
                hint = "it trains no model" if said else f"python {other}.py {path}"
                raise ValueError(f"{path} is for {other}.py (it sets {key}): {hint}")
        else:
            begin = start(flags) if start else {}
        config = Config(**(begin | flags))
        if script != "eval" and "," in config.scorer:
            raise ValueError(f"{script}.py takes one scorer, got {config.scorer!r:.60}: only eval.py compares several")
        return config
    except (ValueError, OSError) as e:
        parser.exit(2, f"{parser.prog}: {one_line(f'{said}{e}')}\n")


def before_torch(script, doc):
    """The first line of a script, before torch is imported (that takes seconds): answers --help with the script's
    docstring and its settings, in named groups, and exits."""
    # Threads that spin long while they wait slow down a job beside them: of two toy runs on two cores a step takes 0.5
    # to 1.3 s, with less patience 0.4 s. Alone a step takes 4 % longer at most.
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    first = os.environ.get("RANK", "0") == "0"  # of the processes that torchrun starts: it speaks for all
    if script != "train" and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        sys.exit(f"{script}.py runs in one process, on one device: start it with python" if first else 0)
    if not {"-h", "--help"} & set(sys.argv[1:]):
        return
    if not first:
        sys.exit()
    print(f"{doc.strip()}\n\nusage: python {script}.py [config.py] [--setting=value ...]")
    group = None
    for f in SETTINGS.values():
        if script in f.metadata["scripts"]:
            if group != (group := f.metadata["group"]):
                print(f"\n{group}")
            default = json.dumps(f.default, ensure_ascii=False) if f.type is str else f.default
            words, explained = f.metadata["among"], any(f.metadata["among"].values())
            among = f" [{', '.join(words)}]" if words and not explained else ""
            remark = f"{f.metadata['remark']}{among}; default {default}"
            print(textwrap.fill(remark, 98, initial_indent=f"  --{f.name:<18} ", subsequent_indent=" " * 23))
            if explained:
                for word, what in words.items():
                    print(f"{'':7}{word:<13} {what}")
    sys.exit(0)


def one_line(e):
    """An exception's message in one line of at most MESSAGE characters; what is left out is its middle."""
    text = " ".join(str(e).split()) or type(e).__name__
    return text if len(text) <= MESSAGE else f"{text[: MESSAGE // 2]} ... {text[-MESSAGE // 2 :]}"


@contextmanager
def one_line_errors(command, kept):
    """What a script runs in: bad input ends it in one line, Ctrl-C in one that says what is kept. Letters that its
    output cannot encode are replaced."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # tests and notebooks have others
            stream.reconfigure(errors="replace")
    try:
        yield
    except (ValueError, OSError, FloatingPointError) as e:
        sys.exit(f"{command}: {one_line(e)}")
    except RuntimeError as e:
        if "out of memory" not in str(e) and "can't allocate memory" not in str(e):  # of a GPU, of a CPU
            raise
        advice = "halve --batch_size and double --grad_accum, or lower --k and --eval_samples"
        sys.exit(f"{command}: out of memory ({one_line(str(e)[:150])}): {advice}")
    except KeyboardInterrupt:
        sys.exit(f"\n{command}: interrupted; {kept}")


def changed(config):
    """The settings that differ from the defaults, as a dict."""
    return {name: getattr(config, name) for name, f in SETTINGS.items() if getattr(config, name) != f.default}


# Settings that say where and how a run happens, not what it is; and those that it may be resumed with another value of.
NOT_IDENTITY = ("out_dir", "sweep", "plot", "resume", "device", "dtype", "compile")
MAY_CHANGE = "max_steps batch_size grad_accum lr warmup_steps weight_decay grad_clip eval_interval".split()


def swept(config):
    """The settings of every run that config.sweep means, the last list varying fastest. Raises ValueError."""
    grid = {}
    for word in config.sweep.split():
        name, equals, values = word.partition("=")
        if not equals or name in ("out_dir", "sweep", "resume", "plot") or name in grid:
            raise ValueError(f"--sweep wants name=value,value and each name once, got {word!r:.60}")
        grid[name] = [(v, check_value(name, v, "train")) for v in values.split(",")]
    runs = []
    for point in itertools.product(*grid.values()):
        folder = ",".join(f"{name}={text}" for name, (text, _) in zip(grid, point, strict=True)).replace("/", "_")
        values = {name: value for name, (_, value) in zip(grid, point, strict=True)}
        runs.append(replace(config, sweep="", plot="", out_dir=str(Path(config.out_dir) / folder), **values))
    if any(run.objective == "lm" for run in runs):
        raise ValueError("--sweep compares fine-tuning runs, and objective=lm is none: run them one by one")
    return runs


def check_resumable(config, saved, path, step):
    """Raise ValueError if `path`, a run's last.pt with the settings `saved`, is of another run than `config` means, or
    at a step beyond max_steps."""
    if names := [n for n in config.differing(saved) if n not in MAY_CHANGE]:
        there = ", ".join(f"--{n}={shlex.quote(str(saved.get(n, SETTINGS[n].default)))}" for n in names[:5])
        raise ValueError(
            f"{path} was made with {there}{' and more' * bool(names[5:])}: give the same with --resume, or another "
            "--out_dir"
        )
    if step > config.max_steps:
        raise ValueError(f"{path} is at step {step}, beyond --max_steps={config.max_steps}: raise it")


def check_shares(config, n):
    """Raise ValueError if n processes cannot share the forward passes of a step equally."""
    if config.grad_accum % n:
        sizes = ["batch_size", "anchor_batch"] if config.anchor_kl + config.anchor_nll else ["batch_size"]
        same = [f"--{name}={max(1, getattr(config, name) * config.grad_accum // n)}" for name in sizes]
        raise ValueError(
            f"{n} processes share the forward passes of a step, so --grad_accum={config.grad_accum} must be a multiple "
            f"of {n}: --grad_accum={n} {' '.join(same)} is a step of this size"
        )
