"""configs: one check for files and flags, errors of one line, and no setting that nothing reads."""

import ast
import json
import re
import subprocess
import sys
from dataclasses import asdict, fields
from pathlib import Path

import pytest

from configs import Config, as_json, changed, check, load_config, read_config_file

ROOT = Path(__file__).resolve().parents[1]
FIELDS = {f.name: f for f in fields(Config)}
CONFIG_FILES = sorted(p for p in (ROOT / "configs").glob("*.py") if p.name != "__init__.py")


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

    def load(*argv):
        with pytest.raises(SystemExit) as e:
            load_config(list(argv))
        out, err = capsys.readouterr()
        assert e.value.code == 2 and out == ""
        assert err.count("\n") == 1 and err.endswith("\n") and "Traceback" not in err
        return err

    return load


def python(*argv, cwd):
    """A fresh interpreter that loads a config, in working folder cwd, with the project's folder not on its path."""
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); from configs import as_json, load_config\n"
        f"sys.path.remove({str(ROOT)!r}); print(as_json(load_config()))"
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
        ("kl_weight", "-0.5", "-0.5", "kl_weight must be at least 0, got -0.5"),
        ("top_p", "1.5", "1.5", "top_p must be at most 1, got 1.5"),
        ("lr", "float('nan')", "nan", "lr must be a finite number, got nan"),
        ("lr", "float('inf')", "inf", "lr must be a finite number, got inf"),
        ("min_lr", "-float('inf')", "-inf", "min_lr must be a finite number, got -inf"),
        # not among the words
        ("variant", "'papr'", "papr", "variant wants one of paper, released, got 'papr': did you mean paper?"),
        ("objective", "'x'", "x", "objective wants one of cp, lm, got 'x'\n"),
        # unknown, with the nearest name
        ("taus", "1", "1", "unknown setting 'taus': did you mean tau?"),
        ("warmup", "5", "5", "unknown setting 'warmup': did you mean warmup_steps?"),
        ("zzz", "5", "5", "unknown setting 'zzz'; --help lists all"),
        # cross-checks
        ("warmup_steps", "200", "200", "warmup_steps=200 must be smaller than max_steps=200"),
        ("min_lr", "1", "1", "min_lr=1.0 must not be larger than lr=5e-05"),
        ("n_head", "3", "3", "n_embd=128 must be a multiple of n_head=3"),
        ("init_from", "'scratch'", "scratch", "objective=cp tunes a model that exists"),
    ],
)
def test_file_and_flags_are_refused_alike(config_file, refused, name, in_file, as_flag, says):
    """The same bad setting from a file, from --key=value and from --key value: the same one line.

    Cross-checks rely on these defaults: lr=5e-5, max_steps=200, n_embd=128; they are set here.
    """
    others = dict(lr=5e-5, max_steps=200, n_embd=128)
    others.pop(name, None)
    rest = [f"--{k}={v}" for k, v in others.items()]
    assert says in refused(config_file(f"{name} = {in_file}"), *rest)
    assert says in refused(f"--{name}={as_flag}", *rest)
    if as_flag and not as_flag.startswith("-"):
        assert says in refused(*rest, f"--{name}", as_flag)


def test_all_weights_zero(config_file, refused):
    """cp without any term has nothing to train on, from file and flags; lm does not use the weights."""
    says = "cp_weight, nll_weight and kl_weight are all 0"
    zero = ("cp_weight = 0", "nll_weight = 0", "kl_weight = 0.0")
    assert says in refused(config_file(*zero))
    assert says in refused("--cp_weight=0", "--nll_weight=0", "--kl_weight=0")
    assert load_config([config_file(*zero), "--objective=lm"]).cp_weight == 0


def test_an_int_is_a_fine_float(config_file):
    """tau = 1 and --tau=1 are 1.0, a float: config.json looks the same for all three ways to write it."""
    for argv in ([config_file("tau = 1")], ["--tau=1"], ["--tau", "1"]):
        tau = load_config(argv).tau
        assert tau == 1.0 and type(tau) is float


@pytest.mark.parametrize("name", [n for n, f in FIELDS.items() if f.type in (int, float)])
def test_ranges(name):
    """Each number's bounds: `low` and `high` themselves are fine, `above` is not, one further is refused."""
    f = FIELDS[name]
    low, above, high = (f.metadata[k] for k in ("low", "above", "high"))
    assert low is not None or above is not None, f"{name} has no lower bound"
    for good in (low, high):
        assert good is None or check(f, good) == good
    for bad in (above, None if low is None else low - 1, None if high is None else high + 1):
        if bad is not None:
            with pytest.raises(ValueError, match=f"{name} must be"):
                check(f, bad)


@pytest.mark.parametrize("name", [n for n, f in FIELDS.items() if f.metadata["among"]])
def test_among(name):
    """Each of the words is accepted, its capitals are not."""
    f = FIELDS[name]
    for word in f.metadata["among"]:
        assert check(f, word) == word
        with pytest.raises(ValueError, match=f"{name} wants one of"):
            check(f, word.upper())


def test_the_class_checks_as_well():
    """Config(...) in a notebook is held to the same rules as a file."""
    assert Config(tau=1).tau == 1.0
    with pytest.raises(ValueError, match="tau must be more than 0"):
        Config(tau=0)
    with pytest.raises(ValueError, match="warmup_steps=30 must be smaller than max_steps=20"):
        Config(warmup_steps=30, max_steps=20)
    assert Config(warmup_steps=19, max_steps=20).warmup_steps == 19
    assert Config(min_lr=1e-3, lr=1e-3).min_lr == 1e-3
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
        (["--drop_small", "--tau=0.5"], "drop_small", True),
        (["--drop_small", "--tau=0.5"], "tau", 0.5),
        (["--out_dir=a=b=c"], "out_dir", "a=b=c"),
        (["--out_dir", "a=b"], "out_dir", "a=b"),
        (["--out_dir=--tau=1"], "out_dir", "--tau=1"),
        (["--tau=1", "--tau=2"], "tau", 2.0),
    ],
)
def test_ways_to_write_a_flag(argv, name, want):
    """--key=value, --key value and a bare boolean; a value may hold '='; of two flags the later one counts."""
    got = getattr(load_config(argv), name)
    assert got == want and type(got) is type(want)


def test_flags_win_wherever_they_stand(config_file):
    """nanoGPT lets a file that comes after a flag undo it; here the order does not matter."""
    path = config_file("tau = 0.9", "n_pos = 2")
    for argv in ([path, "--tau=0.5"], ["--tau=0.5", path], ["--tau", "0.5", path], ["--lr=1e-4", path, "--tau", "0.5"]):
        config = load_config(argv)
        assert (config.tau, config.n_pos) == (0.5, 2), argv


def test_a_flag_that_equals_the_default_wins_too(config_file):
    """--tau=<default> against a file with another tau: a flag counts because it is given, not because it differs."""
    default = FIELDS["tau"].default
    assert load_config([config_file("tau = 0.9"), f"--tau={default}"]).tau == default


def test_no_arguments_are_the_defaults():
    """No file, no flag: the defaults, which pass their own checks."""
    assert load_config([]) == Config()
    assert all(getattr(Config(), name) == f.default for name, f in FIELDS.items())


def test_abbreviations_are_unknown(refused):
    """--max is not guessed to be one of the settings that begin so."""
    assert "unknown setting 'resum': did you mean resume?" in refused("--resum")
    assert "unknown setting 'max_step': did you mean max_steps?" in refused("--max_step=3")


def test_stray_words(config_file, refused):
    """A second positional word is named, and so is a flag with one dash."""
    path = config_file("tau = 1")
    assert "'second.py' is neither a setting nor the one config file" in refused(path, "second.py")
    assert "'-tau' is neither a setting nor the one config file" in refused(path, "-tau")


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
    assert f"{path}: ZeroDivisionError: division by zero" in refused(path)
    path = config_file("from configs.nowhere import *")
    assert f"{path}: ModuleNotFoundError: No module named 'configs.nowhere'" in refused(path)
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
    assert done.stderr.splitlines() == ["-c: unknown setting 'tua': did you mean tau?"]


@pytest.mark.parametrize("path", CONFIG_FILES, ids=lambda p: p.name)
def test_shipped_configs_load(path):
    """Each one passes the checks, changes something, and begins with a comment that says what it is for."""
    assert re.match(r"# \w", path.read_text())
    assert changed(load_config([str(path)]))


# --------------------------------------------------------------------------------------------------------------------
# what is printed and written


def test_help_lists_everything(capsys, monkeypatch):
    """Status 0, and a line for every setting with its remark, its words and its default."""
    monkeypatch.setenv("COLUMNS", "1000")  # no line breaks within a remark
    with pytest.raises(SystemExit) as e:
        load_config(["--help"], description="What the script does.")
    out, err = capsys.readouterr()
    assert e.value.code == 0 and err == "" and "What the script does." in out
    out = re.sub(r"\n {6,}", " ", out)  # a remark may begin on the line below a long name
    lines = dict(re.findall(r"^  --(\w+)(.*)$", out, re.M))
    assert set(lines) == set(FIELDS)
    for name, f in FIELDS.items():
        assert f" {f.metadata['remark']}" in lines[name], name
        assert lines[name].endswith("(default: " + str(f.default).replace("\n", "\\n") + ")"), name
        assert all(word in lines[name] for word in f.metadata["among"] or ()), name


def test_changed_gives_what_differs():
    """Only settings with another value than the default, in their order; giving the default is no change."""
    assert changed(Config()) == {}
    assert changed(Config(tau=FIELDS["tau"].default)) == {}
    assert list(changed(Config(tau=7, seed=3)).items()) == [("seed", 3), ("tau", 7.0)]


def test_as_json_round_trips():
    """config.json holds every setting, and Config makes the same of it."""
    config = Config(tau=0.7, resume=True, out_dir='a "quoted" = ü', lr=1 / 3, max_steps=12345)
    text = as_json(config)
    assert text.endswith("}\n") and set(json.loads(text)) == set(FIELDS)
    assert Config(**json.loads(text)) == config


# --------------------------------------------------------------------------------------------------------------------
# no setting without a reader


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
    assert settings_read(source) & set(FIELDS) == want


@pytest.fixture(scope="module")
def all_read():
    """What the scripts and data/ read, together."""
    files = [ROOT / "train.py", ROOT / "eval.py", ROOT / "data_gen.py", *(ROOT / "data").glob("*.py")]
    return set().union(*(settings_read(p.read_text()) for p in files if p.exists()))


@pytest.mark.parametrize("name", FIELDS)
def test_every_setting_is_read(all_read, name):
    """An option that does nothing is worse than none (17 of 61 in the paper's release).

    model.py is left out on purpose: it knows no settings, and its own config has fields of the same names.
    """
    assert name in all_read, f"nothing reads the setting {name!r}"
