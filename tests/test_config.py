"""configs: one check for files and flags, errors of one line, and no setting that nothing reads."""

import ast
import importlib
import inspect
import json
import os
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from configs import (
    MAY_CHANGE,
    MESSAGE,
    NOT_IDENTITY,
    SETTINGS,
    Config,
    before_torch,
    changed,
    check_resumable,
    check_value,
    load_config,
    one_line_errors,
    read_config_file,
)
from engine.run import write_json
from loss import OBJECTIVES

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ("train", "eval", "data_gen")
CONFIG_FILES = sorted(p for p in (ROOT / "configs").glob("*.py") if p.name != "__init__.py")


def of(script):
    """The settings that a script reads."""
    return [name for name, f in SETTINGS.items() if script in f.metadata["scripts"]]


@pytest.fixture
def config_file(tmp_path):
    """Writes lines to a config file in a folder of its own, and returns its path as text."""

    def write(*lines, name="mine.py"):
        (tmp_path / name).write_text("\n".join(("# A config of a test.", *lines)) + "\n")
        return str(tmp_path / name)

    return write


@pytest.fixture
def refused(capsys):
    """Loads bad arguments: exit status 2, one line on stderr, nothing on stdout. Returns the line."""

    def load(*argv, script="train"):
        with pytest.raises(SystemExit) as e:
            load_config(script, list(argv))
        out, err = capsys.readouterr()
        assert e.value.code == 2 and out == ""
        assert err.count("\n") == 1 and err.endswith("\n") and "Traceback" not in err
        return err

    return load


def python(*argv, cwd):
    """A fresh interpreter that loads a config, in working folder cwd, with the project's folder not on its path."""
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); from configs import load_config\n"
        f"sys.path.remove({str(ROOT)!r}); import json; print(json.dumps(vars(load_config('train'))))"
    )
    return subprocess.run([sys.executable, "-c", code, *argv], cwd=cwd, capture_output=True, text=True, timeout=60)


# --------------------------------------------------------------------------------------------------------------------
# one check for files and flags


@pytest.mark.parametrize(
    ("name", "in_file", "as_flag", "says"),
    [
        # the wrong type
        ("max_steps", "'many'", "many", "max_steps wants a whole number, got 'many'"),
        ("max_steps", "1.5", "1.5", "max_steps wants a whole number, got"),
        ("max_steps", "200.0", "200.0", "max_steps wants a whole number, got"),
        ("max_steps", "True", "True", "max_steps wants a whole number, got"),
        ("tau", "'warm'", "warm", "tau wants a number, got 'warm'"),
        ("tau", "False", "False", "tau wants a number, got"),
        ("tau", "''", "", "tau wants a number, got ''"),
        ("resume", "'perhaps'", "perhaps", "resume wants True or False, got 'perhaps'"),
        ("resume", "1", "1", "resume wants True or False, got"),
        # outside the range
        ("tau", "0", "0", "tau must be more than 0, got 0.0"),
        ("tau", "-1.0", "-1.0", "tau must be more than 0, got -1.0"),
        ("max_steps", "0", "0", "max_steps must be at least 1, got 0"),
        ("hold_weight", "-0.5", "-0.5", "hold_weight must be at least 0, got -0.5"),
        ("top_p", "1.5", "1.5", "top_p must be at most 1, got 1.5"),
        ("max_steps", "10**399", "1" + "0" * 399, "max_steps must be at most 2147483647, got a number of 400 digits"),
        ("k", "2**31", str(2**31), "k must be at most 2147483647, got a number of 10 digits"),
        ("tau", "10**400", "1e400", "tau "),
        # no text
        ("out_dir", "' '", " ", "out_dir is empty (an unset variable of the shell?): name a folder"),
        ("data", "'a\\udc80'", "a\udc80", "data wants text in UTF-8, got 'a\\udc80'"),
        ("data", "'a\\0'", "a\0", "data wants text in UTF-8, got 'a\\x00'"),
        ("lr", "float('nan')", "nan", "lr must be a finite number, got nan"),
        ("lr", "float('inf')", "inf", "lr must be a finite number, got inf"),
        ("weight_decay", "-float('inf')", "-inf", "weight_decay must be a finite number, got -inf"),
        # not among the words
        ("variant", "'papr'", "papr", "variant wants one of paper, released, got 'papr': did you mean paper?"),
        ("objective", "'x'", "x", "margin, positive_only, toxic_only, negative_only, lm, got 'x'\n"),
        # unknown, with the nearest name
        ("taus", "1", "1", "unknown setting 'taus': did you mean tau?"),
        ("warmup", "5", "5", "unknown setting 'warmup': did you mean warmup_steps?"),
        ("zzz", "5", "5", "unknown setting 'zzz': --help lists all"),
        # cross-checks
        ("warmup_steps", "200", "200", "warmup_steps=200 must be smaller than max_steps=200"),
        ("min_length", "2", "2", "min_length=2.0 is above max_length=1.6: nothing could pass"),
        ("distance", "'signed'", "signed", "variant=released works only with distance=abs"),
        ("n_pos", "1", "1", "leave_one_out compares a positive with the others of its group: n_pos must be at least 2"),
        ("positive_prompt", "'{input}'", "{input}", "positive_prompt must hold {input}, then {output}, then a closing"),
        (
            "negative_prompt",
            "'{input} {output}'",
            "{input} {output}",
            "negative_prompt must hold {input}, then {output}",
        ),
        ("n_head", "3", "3", "n_embd=128 must be a multiple of n_head=3"),
        ("init_from", "'scratch'", "scratch", "objective=cp tunes a model: init_from must name one"),
    ],
)
def test_file_and_flags_are_refused_alike(config_file, refused, name, in_file, as_flag, says):
    """The same bad setting from a file, from --key=value and from --key value: the same one line.

    Cross-checks rely on these values; they are set here.
    """
    script = "data_gen" if name in SETTINGS and "train" not in SETTINGS[name].metadata["scripts"] else "train"
    others = dict(lr=5e-5, max_steps=200, n_embd=128, max_length=1.6)
    others |= dict(variant="released") if name == "distance" else dict(leave_one_out=True) if name == "n_pos" else {}
    rest = [f"--{k}={v}" for k, v in others.items() if k != name and k in of(script)]
    assert says in refused(config_file(f"{name} = {in_file}"), *rest, script=script)
    assert says in refused(f"--{name}={as_flag}", *rest, script=script)
    if as_flag and not as_flag.startswith("-"):
        assert says in refused(*rest, f"--{name}", as_flag, script=script)


def test_all_weights_zero(config_file, refused):
    """cp without any term has nothing to train on, from file and flags; lm does not use the weights."""
    says = "cp_weight, nll_weight, hold_weight, anchor_kl and anchor_nll are all 0"
    zero = ("cp_weight = 0", "nll_weight = 0", "hold_weight = 0.0", "anchor_kl = 0", "anchor_nll = 0")
    assert says in refused(config_file(*zero))
    assert says in refused("--cp_weight=0", "--nll_weight=0", "--hold_weight=0", "--anchor_kl=0", "--anchor_nll=0")
    assert load_config("train", [config_file(*zero), "--objective=lm"]).cp_weight == 0


@pytest.mark.parametrize("name", ["cp_weight", "nll_weight", "hold_weight", "anchor_kl", "anchor_nll"])
def test_any_one_weight_is_enough(name):
    """--cp_weight=0 --nll_weight=0 --anchor_nll=1 has something to train on; it used to be refused."""
    argv = ["--cp_weight=0", "--nll_weight=0", f"--{name}=1"]
    assert getattr(load_config("train", argv), name) == 1.0


def test_an_int_is_a_fine_float(config_file):
    """tau = 1 and --tau=1 are 1.0, a float: config.json looks the same for all three ways to write it."""
    for argv in ([config_file("tau = 1")], ["--tau=1"], ["--tau", "1"]):
        tau = load_config("train", argv).tau
        assert tau == 1.0 and type(tau) is float


@pytest.mark.parametrize("name", [n for n, f in SETTINGS.items() if f.type in (int, float)])
def test_ranges(name):
    """Each number's bounds: `low` and `high` themselves are fine, `above` is not, one further is refused."""
    f = SETTINGS[name]
    low, above, high = (f.metadata[k] for k in ("low", "above", "high"))
    assert low is not None or above is not None, f"{name} has no lower bound"
    for good in (low, high):
        assert good is None or check_value(name, good) == good
    for bad in (above, None if low is None else low - 1, None if high is None else high + 1):
        if bad is not None:
            with pytest.raises(ValueError, match=f"{name} must be"):
                check_value(name, bad)


@pytest.mark.parametrize("name", [n for n, f in SETTINGS.items() if f.metadata["among"]])
def test_among(name):
    """Each of the words is accepted, its capitals are not."""
    f = SETTINGS[name]
    for word in f.metadata["among"]:
        assert check_value(name, word) == word
        with pytest.raises(ValueError, match=f"{name} wants one of"):
            check_value(name, word.upper())


def test_the_class_checks_as_well():
    """Config(...) in a notebook is held to the same rules as a file."""
    assert Config(tau=1).tau == 1.0
    with pytest.raises(ValueError, match="tau must be more than 0"):
        Config(tau=0)
    with pytest.raises(ValueError, match="warmup_steps=30 must be smaller than max_steps=20"):
        Config(warmup_steps=30, max_steps=20)
    assert Config(warmup_steps=19, max_steps=20).warmup_steps == 19
    assert Config(min_length=0.8, max_length=0.8).min_length == 0.8
    assert Config(objective="lm", init_from="scratch").init_from == "scratch"


# --------------------------------------------------------------------------------------------------------------------
# flags


@pytest.mark.parametrize(
    ("argv", "name", "want"),
    [
        (["--tau=0.5"], "tau", 0.5),
        (["--tau", "0.5"], "tau", 0.5),
        (["--lr=2e-5"], "lr", 2e-5),
        (["--n_pos", "3"], "n_pos", 3),
        (["--resume"], "resume", True),
        (["--resume=True"], "resume", True),
        (["--resume=False"], "resume", False),
        (["--resume", "false"], "resume", False),
        (["--detach_centroid", "--tau=0.5"], "detach_centroid", True),
        (["--detach_centroid", "--tau=0.5"], "tau", 0.5),
        (["--resume", "configs/toy_cp.py"], "resume", True),
        (["--out_dir=a=b=c"], "out_dir", "a=b=c"),
        (["--out_dir", "a=b"], "out_dir", "a=b"),
        (["--out_dir=--tau=1"], "out_dir", "--tau=1"),
        (["--tau=1", "--tau=2"], "tau", 2.0),
    ],
)
def test_ways_to_write_a_flag(argv, name, want):
    """--key=value, --key value and a bare boolean; a value may hold '='; of two flags the later one counts."""
    got = getattr(load_config("train", argv), name)
    assert got == want and type(got) is type(want)


@pytest.mark.parametrize(
    ("argv", "want"),
    [
        (["--prompt"], "-"),
        (["--prompt", "--seed=1"], "-"),
        (["--prompt", "configs/toy_cp.py"], "-"),
        (["--prompt", "So there I was"], "So there I was"),
        (["--prompt=So there I was"], "So there I was"),
        (["--prompts", "configs/x.txt"], ""),
        ([], ""),
    ],
)
def test_a_bare_prompt_means_the_terminal(argv, want):
    """--prompt without a value asks for prompts, '-'; with one it is the prompt, blanks and all."""
    assert load_config("eval", argv).prompt == want


def test_a_template_in_a_flag():
    r"""A line break is written \n in a shell; in a file it is one already."""
    argv = [r'--positive_prompt={input}\n"{output}"\n']
    assert load_config("eval", argv).positive_prompt == '{input}\n"{output}"\n'


def test_flags_win_wherever_they_stand(config_file):
    """nanoGPT lets a file that comes after a flag undo it; here the order does not matter."""
    path = config_file("tau = 0.9", "n_pos = 2")
    for argv in ([path, "--tau=0.5"], ["--tau=0.5", path], ["--tau", "0.5", path], ["--lr=1e-4", path, "--tau", "0.5"]):
        config = load_config("train", argv)
        assert (config.tau, config.n_pos) == (0.5, 2), argv


def test_a_flag_that_equals_the_default_wins_too(config_file):
    """--tau=<default> against a file with another tau: a flag counts because it is given, not because it differs."""
    default = SETTINGS["tau"].default
    assert load_config("train", [config_file("tau = 0.9"), f"--tau={default}"]).tau == default


def test_no_arguments_are_the_defaults():
    """No file, no flag: the defaults, which pass their own checks."""
    assert all(load_config(script, []) == Config() for script in SCRIPTS)
    assert all(getattr(Config(), name) == f.default for name, f in SETTINGS.items())


def test_start_stands_for_the_file(config_file):
    """Without a config file the settings start from start(flags), and flags win over it; with one it is not asked."""
    asked = []
    start = lambda flags: asked.append(flags) or {"tau": 0.9, "seed": 5}
    config = load_config("train", ["--tau=0.5"], start=start)
    assert (config.tau, config.seed, asked) == (0.5, 5, [{"tau": 0.5}])
    assert load_config("train", [config_file("seed = 7")], start=start).seed == 7 and len(asked) == 1


def test_abbreviations_are_unknown(refused):
    """--max is not guessed to be one of the settings that begin so."""
    assert "unknown setting 'resum': did you mean resume?" in refused("--resum")
    assert "unknown setting 'max_step': did you mean max_steps?" in refused("--max_step=3")


def test_stray_words(config_file, refused):
    """A second positional word is named, and so is a flag with one dash or none."""
    path, says = config_file("tau = 1"), "is neither --name=value nor the one config file: "
    assert f"'second.py' {says}that is {path}" in refused(path, "second.py")
    for word in ("-tau", "tau=1"):
        assert f"'{word}' {says}did you mean --{word.lstrip('-')}?" in refused(path, word)
    assert "--tau wants a value: --tau=..." in refused(path, "--tau")


# --------------------------------------------------------------------------------------------------------------------
# files


def test_missing_file(refused, tmp_path):
    """A file that is not there, a folder and a file that is no .py are refused by name."""
    (tmp_path / "settings.yaml").write_text("tau: 1\n")
    for path in ("configs/nowhere.py", str(tmp_path), str(tmp_path / "settings.yaml"), "7"):
        assert f"no config file {path!r}" in refused(path)


def test_syntax_error_names_the_file(config_file, refused):
    """What Python says of a broken file, with the file's path and the line."""
    path = config_file("tau = (")
    assert (line := refused(path)) and f"{path}: SyntaxError" in line and "line 2" in line


def test_an_error_in_a_file_names_the_file(config_file, refused):
    """A file that raises, or imports what is not there, or assigns what is no setting."""
    path = config_file("tau = 1 / 0")
    assert f"{path}:2: ZeroDivisionError: division by zero" in refused(path)
    path = config_file("from configs.nowhere import *")
    assert f"{path}:2: ModuleNotFoundError: No module named 'configs.nowhere'" in refused(path)
    path = config_file("taus = 1")
    assert f"{path}: unknown setting 'taus': did you mean tau?" in refused(path)


def test_helpers_in_a_file(config_file):
    """Imported modules and names with an underscore are the file's own affair."""
    path = config_file("import math", "_half = 0.5", "tau = _half * math.sqrt(4)")
    assert read_config_file(path) == {"tau": 1.0}


def test_reading_a_file_leaves_the_path_alone(config_file, refused):
    """sys.path is as before, after a good file and after a bad one."""
    before = list(sys.path)
    read_config_file(config_file("tau = 1"))
    refused(config_file("tau = 1 / 0"))
    assert sys.path == before


def test_import_star_from_another_folder(config_file, tmp_path):
    """`from configs.toy_base import *` works in any working folder, and what follows it wins.

    In a fresh interpreter, since here the project's folder is on the path anyway.
    """
    config_file("from configs.toy_base import *", "out_dir = 'out/other'", name="child.py")
    done = python("child.py", "--seed=7", cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == ""
    want = asdict(Config(**(read_config_file(ROOT / "configs" / "toy_base.py") | {"out_dir": "out/other", "seed": 7})))
    assert json.loads(done.stdout) == want


def test_shipped_configs_are_found_from_another_folder(tmp_path, monkeypatch):
    """configs/toy_cp.py means the project's if the working folder has none of that name, else the nearer one."""
    monkeypatch.chdir(tmp_path)
    shipped = read_config_file("configs/toy_cp.py")
    assert shipped == read_config_file(ROOT / "configs" / "toy_cp.py") and shipped
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "toy_cp.py").write_text("tau = 0.125\n")
    assert read_config_file("configs/toy_cp.py") == {"tau": 0.125}


def test_bad_input_from_a_fresh_interpreter(tmp_path):
    """The real thing: status 2, nothing on stdout, one line on stderr."""
    done = python("--tua=1", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines() == ["train.py: unknown setting 'tua': did you mean tau?"]


def scripts_for(path):
    """The scripts that a shipped config is for, by its name."""
    return ("data_gen",) if path.stem.endswith("_data") else ("train", "eval")


@pytest.mark.parametrize("path", CONFIG_FILES, ids=lambda p: p.name)
def test_shipped_configs_load(path):
    """Each one passes the checks, changes something, and begins with a comment that says what it is for."""
    assert re.match(r"# \w", path.read_text())
    assert all(changed(load_config(script, [str(path)])) for script in scripts_for(path))


@pytest.mark.parametrize("path", CONFIG_FILES, ids=lambda p: p.name)
def test_shipped_configs_name_what_exists(path):
    """The scorer is a function that can be imported; files that ship are there; a config .py to start from loads."""
    settings = read_config_file(path)
    if ":" in (scorer := settings.get("scorer", "")):
        module, function = scorer.split(":")
        assert callable(getattr(importlib.import_module(module), function))
    for name in ("data", "seeds", "demos", "prompts", "text"):
        assert (value := settings.get(name, "")) in ("", "toy", "toy_facts") or (ROOT / value).is_file(), (name, value)
    if (source := settings.get("init_from", "")).endswith(".py"):
        assert load_config("train", [source]).out_dir


# --------------------------------------------------------------------------------------------------------------------
# each script its own settings


def test_settings_are_well_described():
    """A remark, a group and a script each; a group's settings stand together, and so do its scripts in order."""
    for name, f in SETTINGS.items():
        scripts = f.metadata["scripts"]
        assert f.metadata["remark"] and f.metadata["group"], name
        assert scripts == [s for s in SCRIPTS if s in scripts] and scripts, name
    groups = [f.metadata["group"] for f in SETTINGS.values()]
    assert len({*groups}) == 1 + sum(a != b for a, b in zip(groups, groups[1:], strict=False))


@pytest.mark.parametrize("script", SCRIPTS)
def test_flags_of_another_script_are_refused(refused, script):
    """A flag that nothing would read: the error names who does. The right ones are taken, with their defaults."""
    for name, f in SETTINGS.items():
        flag = f"--{name}={f.default}"
        if name in of(script):
            assert load_config(script, [flag]) == Config(), name
        else:
            scripts = " and ".join(f"{s}.py" for s in f.metadata["scripts"])
            says = f"{script}.py: {name} is a setting of {scripts}, {script}.py does not read it\n"
            assert refused(flag, script=script) == says


def test_a_protocol_needs_its_prompts(refused):
    says = "protocol=challenging takes --prompts=prompts.jsonl, the file of RealToxicityPrompts"
    assert says in refused("--protocol=challenging", "--prompts=", script="eval")


@pytest.mark.parametrize("script", ["train", "data_gen"])
def test_one_scorer_but_for_eval(refused, config_file, script):
    """Several are compared by eval.py alone: in a flag as in a file."""
    said = "takes one scorer, got 'ngram,data.toy:rudeness': only eval.py compares several"
    assert f"{script}.py {said}" in refused("--scorer=ngram,data.toy:rudeness", script=script)
    assert f"{script}.py {said}" in refused(str(config_file("scorer = 'ngram,data.toy:rudeness'")), script=script)
    assert load_config("eval", ["--scorer=ngram,data.toy:rudeness"]).scorer == "ngram,data.toy:rudeness"


def test_flags_of_another_script_by_hand(refused):
    """What the check above says, for three that are easily confused."""
    assert refused("--tau=1", script="eval") == "eval.py: tau is a setting of train.py, eval.py does not read it\n"
    line = refused("--ckpt", "x.pt", script="train")
    assert line == "train.py: ckpt is a setting of eval.py, train.py does not read it\n"
    line = refused("--init_from=gpt2", script="eval")
    assert line == "eval.py: init_from is a setting of train.py and data_gen.py, eval.py does not read it\n"
    assert "prompt is a setting of eval.py" in refused("--prompt", script="data_gen")


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("path", CONFIG_FILES, ids=lambda p: p.name)
def test_configs_of_another_script_are_refused(refused, path, script):
    """With the command that would have been right; eval.py takes the configs of train.py."""
    if script in scripts_for(path):
        return
    line = refused(str(path), script=script)
    right = scripts_for(path)[0]
    assert re.fullmatch(rf"{script}\.py: {path} is for {right}\.py \(it sets \w+\): python {right}\.py {path}\n", line)
    key = re.search(r"it sets (\w+)", line)[1]
    assert SETTINGS[key].metadata["scripts"] == [right] and key in read_config_file(path)


def test_a_config_may_hold_what_two_scripts_read(config_file):
    """A run's file says how eval.py is to measure it, too; what all scripts share belongs to none."""
    both = config_file("tau = 0.5", "n_prompts = 7", "shots = 1")
    assert load_config("train", [both]).n_prompts == load_config("eval", [both]).n_prompts == 7
    shared = config_file("seed = 3", "scorer = 'data.toy:rudeness'")
    assert all(load_config(script, [shared]).seed == 3 for script in SCRIPTS)


GONE = "surplus n_seeds max_jaccard max_overlap data_out drop_small min_lr beta1 beta2 text_tokens".split()


@pytest.mark.parametrize("name", GONE)
def test_deleted_settings_are_unknown(config_file, refused, name):
    """An old config or command is refused by name, never read in part."""
    for script in SCRIPTS:
        assert f"{script}.py: unknown setting '{name}'" in refused(f"--{name}=1", script=script)
        assert f"unknown setting '{name}'" in refused(config_file(f"{name} = 1"), script=script)


# --------------------------------------------------------------------------------------------------------------------
# what is printed and written


def squeezed(text):
    """Without white space: --help may break a line anywhere."""
    return re.sub(r"\s", "", text)


@pytest.fixture
def helped(monkeypatch, capsys):
    """Calls a script that does nothing with words that ask for help: status 0. Returns what it prints."""

    def call(script, *argv):
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *argv])
        monkeypatch.setenv("GOMP_SPINCOUNT", "7")
        with pytest.raises(SystemExit) as e:
            before_torch(script, "\nWhat the script does.\n")
        out, err = capsys.readouterr()
        assert e.value.code == 0 and err == ""
        return out

    return call


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_lists_everything(helped, script):
    """Each setting that the script reads under its group's title, once, and no other, with its remark, its words and
    its default. At most 100 columns wide.
    """
    out = helped(script, "--help")
    assert out.startswith("What the script does.\n")
    assert max(map(len, out.split("\n"))) <= 100
    assert f"\n\nusage: python {script}.py [config.py]" in out
    listed, titles, group = {}, [], None
    for line in out[out.index("usage:") :].split("\n")[1:]:
        if found := re.match(r"  --(\w+) ", line):
            assert found[1] not in listed and group == SETTINGS[found[1]].metadata["group"], line
            listed[name := found[1]] = line
        elif line.startswith(" " * 7):
            listed[name] += line
        elif line and not line.startswith(" "):
            group = line
            titles.append(line)
    assert list(listed) == of(script) and len({*titles}) == len(titles)
    for name, text in listed.items():
        f = SETTINGS[name]
        default = json.dumps(f.default, ensure_ascii=False) if f.type is str else str(f.default)
        words = f.metadata["among"]
        among = f"[{', '.join(words)}]" if words and not any(words.values()) else ""
        explained = "" if among else "".join(word + what for word, what in words.items())
        assert squeezed(text) == squeezed(f"--{name}{f.metadata['remark']}{among};default{default}{explained}"), name
    if script == "train":
        assert listed["objective"].count("arXiv") == len(OBJECTIVES) - 2  # all but plain fine-tuning, on either side


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_wins(helped, flag):
    """Also beside a config and flags that would be refused."""
    assert "--tau" in helped("train", "nowhere.py", "--tau=0", flag)


def test_threads_do_not_spin_long(monkeypatch, capsys):
    """Unless the user wants it otherwise; and without --help nothing is printed, and the script goes on."""
    monkeypatch.setattr(sys, "argv", ["train.py", "configs/toy_cp.py"])
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    assert before_torch("train", "") is None and os.environ["GOMP_SPINCOUNT"] == "7"
    monkeypatch.delenv("GOMP_SPINCOUNT")
    assert before_torch("train", "") is None and os.environ["GOMP_SPINCOUNT"] == "20000"
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_does_not_wait_for_torch(tmp_path, script):
    """The real command, from another folder: what the script is for, with examples, and its settings, before torch is
    imported (that takes seconds)."""
    argv = [sys.executable, "-X", "importtime", str(ROOT / f"{script}.py"), "--help"]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    lines, imported = done.stdout.split("\n"), {line.split("|")[-1].strip() for line in done.stderr.split("\n")}
    assert done.returncode == 0 and "configs" in imported
    assert "torch" not in imported
    assert [line for line in lines if len(line) > 100] == []
    assert f"usage: python {script}.py [config.py]" in done.stdout and "--out_dir" in done.stdout
    assert f"    python {script}.py configs/" in done.stdout
    assert lines[0] == (ast.get_docstring(ast.parse((ROOT / f"{script}.py").read_text())) or "?").split("\n")[0]


def test_changed_gives_what_differs():
    """Only settings with another value than the default, in their order; giving the default is no change."""
    assert changed(Config()) == {}
    assert changed(Config(tau=SETTINGS["tau"].default)) == {}
    assert list(changed(Config(tau=7, seed=3)).items()) == [("seed", 3), ("tau", 7.0)]


def test_config_json_round_trips(tmp_path):
    """config.json holds every setting, and Config makes the same of it."""
    config = Config(tau=0.7, resume=True, out_dir='a "quoted" = ü', lr=1 / 3, max_steps=12345)
    write_json(tmp_path / "config.json", asdict(config))
    text = (tmp_path / "config.json").read_text()
    assert text.endswith("}\n") and set(json.loads(text)) == set(SETTINGS)
    assert Config(**json.loads(text)) == config


@pytest.mark.parametrize("name", NOT_IDENTITY)
def test_where_a_run_happens_is_not_what_it_is(name):
    """Another folder, device or precision is the same run."""
    other = {bool: True, str: [*SETTINGS[name].metadata["among"], "", "elsewhere"][1]}[SETTINGS[name].type]
    assert Config().differing(asdict(Config()) | {name: other}) == []


def test_differing_settings():
    """By name; what an older run's file does not hold had its default, and what it holds besides is no matter."""
    saved = asdict(Config(tau=0.5))
    assert Config().differing(saved) == ["tau"] and Config(tau=0.5).differing(saved) == []
    del saved["alpha"], saved["tau"]
    assert Config(alpha=2).differing(saved | {"beta1": 0.9}) == ["alpha"]
    assert Config(tau=0.5).differing(saved) == ["tau"]


def test_only_what_the_script_reads_differs():
    """What eval.py and data_gen.py measure and sample with does not make another training run."""
    assert Config(prompts="", parts="drift", rounds=3).differing(asdict(Config())) == []


@pytest.mark.parametrize("name", sorted({*of("train")} - {*NOT_IDENTITY}))
def test_what_a_run_may_be_resumed_with(name):
    """How it is optimised from here on; all else would make the second half another run's."""
    value = getattr(Config(), name)
    saved = asdict(Config()) | {name: f"not {value}"}
    if name in MAY_CHANGE:
        return check_resumable(Config(), saved, "last.pt", 0)
    with pytest.raises(ValueError, match=f"^last.pt was made with --{name}='not .*': give the same with --resume, or"):
        check_resumable(Config(), saved, "last.pt", 0)


def test_many_other_settings_are_one_line():
    saved = {name: f"not {value}" for name, value in asdict(Config()).items()}
    with pytest.raises(ValueError, match="--hold_weight|and more: give the same") as e:
        check_resumable(Config(), saved, "last.pt", 0)
    assert str(e.value).count("--") == 5 + 2 and len(str(e.value)) < MESSAGE


# --------------------------------------------------------------------------------------------------------------------
# how a script ends


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (ValueError("one\n  two"), "train.py: one two"),
        (OSError("x" * 5000), ("x" * 300) + " ... " + ("x" * 300)),
        (ValueError(), "train.py: ValueError"),
        (FloatingPointError("loss is nan"), "train.py: loss is nan"),
        (
            RuntimeError("CUDA out of memory. Tried to allocate"),
            "train.py: out of memory (CUDA out of memory. Tried to",
        ),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "halve --batch_size"),
        (KeyboardInterrupt(), "\ntrain.py: interrupted; all is kept"),
    ],
)
def test_bad_input_ends_in_one_line(error, says):
    with pytest.raises(SystemExit) as e:
        with one_line_errors("train.py", "all is kept"):
            raise error
    assert says in e.value.code and "\n" not in e.value.code.strip()


def test_a_mistake_of_ours_keeps_its_traceback():
    for error in (RuntimeError("mat1 and mat2 shapes"), KeyError("step"), AttributeError("x")):
        with pytest.raises(type(error)):
            with one_line_errors("train.py", ""):
                raise error


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_output_never_fails_for_its_encoding(encoding):
    """Russian samples on a Windows pipe: letters that it has no code for become question marks."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\nfrom configs import one_line_errors\n"
    code += "with one_line_errors('x', ''):\n    print('Привет, Zürich ±')\n    raise ValueError('Ошибка')"
    env = os.environ | {"PYTHONIOENCODING": encoding}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=env)
    assert done.returncode == 1 and done.stdout.startswith(b"??????, Z") and done.stderr.strip() == b"x: ??????"


def test_a_config_with_marks_of_an_editor(config_file):
    """A byte order mark and Windows line ends."""
    path = config_file("tau = 0.5")
    Path(path).write_bytes(b"\xef\xbb\xbftau = 0.25\r\nalpha = 2.0\r\n")
    config = load_config("train", [path])
    assert config.tau == 0.25 and config.alpha == 2.0


# --------------------------------------------------------------------------------------------------------------------
# no setting without a reader (each script's own ones: test_house.py)


def settings_read(source):
    """The names that Python source reads off a config: config.name, run.config.name, c.name after c = run.config, and
    getattr(config, "name"). Not model.config, which is a network's shape and has fields of the same names.
    """
    tree, names = ast.parse(source), {"config"}

    def is_config(node):
        match node:
            case ast.Name(id=name):
                return name in names
            case ast.Attribute(value=ast.Name(id="model") | ast.Attribute(attr="model")):
                return False
            case ast.Attribute(attr="config"):
                return True
        return False

    for node in ast.walk(tree):
        match node:
            case ast.Assign(targets=[ast.Tuple(elts=targets)], value=ast.Tuple(elts=values)):
                pairs = zip(targets, values, strict=True)
            case ast.Assign(targets=[target], value=value):
                pairs = [(target, value)]
            case _:
                continue
        names |= {target.id for target, value in pairs if isinstance(target, ast.Name) and is_config(value)}
    found = set()
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=value, attr=name, ctx=ast.Load()) if is_config(value):
                found.add(name)
            case ast.Call(func=ast.Name(id="getattr"), args=[value, ast.Constant(value=name), *_]) if is_config(value):
                found.add(name)
    return found


def objective_settings():
    """What train.py gives to the objectives by the names of their arguments."""
    return {name for f in OBJECTIVES.values() for name in inspect.signature(f).parameters} & set(SETTINGS)


def test_objectives_are_found_in_the_source():
    """configs/ reads the table off loss.py without running it: the very names, in their order, and lm."""
    assert list(SETTINGS["objective"].metadata["among"]) == [*OBJECTIVES, "lm"]


@pytest.mark.parametrize(
    ("source", "want"),
    [
        ("x = config.tau + other.alpha", {"tau"}),
        ("run.config.tau", {"tau"}),
        ("c, n = run.config, 3\nc.tau", {"tau"}),
        ('getattr(config, "tau")', {"tau"}),
        ("model.config.n_head + run.model.config.n_embd", set()),
        ('x = 1  # config.tau\ny = "config.alpha"\nconfig.lr = 2', set()),
    ],
)
def test_settings_read_finds_reading_only(source, want):
    """The search behind the next test is not satisfied by comments, texts, assignments or a model's config."""
    assert settings_read(source) & set(SETTINGS) == want


@pytest.fixture(scope="module")
def all_read():
    """What the scripts, data/ and measures/ read, together."""
    folders = [p for folder in ("data", "measures") for p in (ROOT / folder).glob("*.py")]
    files = [*(ROOT / f"{script}.py" for script in SCRIPTS), *folders]
    return set(objective_settings()).union(*(settings_read(p.read_text()) for p in files))


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_is_read(all_read, name):
    """An option that does nothing is worse than none (17 of 61 in the paper's release).

    model.py is left out on purpose: it knows no settings, and its own config has fields of the same names.
    """
    assert name in all_read, f"nothing reads the setting {name!r}"
