"""The house rules, read off the sources: who may import whom, how long a function may be, which script reads what."""

import ast
import sys
from pathlib import Path

import pytest
from test_config import objective_settings, settings_read

from configs import SETTINGS

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ("train", "eval", "data_gen")
MAY_IMPORT = {  # each from the project; the scripts everything but each other
    "configs": {"configs"},
    "loss": set(),
    "engine": {"engine"},
    "model": {"engine"},
    "data": {"configs", "model", "engine", "data"},
    "measures": {"configs", "loss", "engine", "model", "data", "measures"},
}
PARTS = {*MAY_IMPORT, *SCRIPTS}
FILES = sorted(p for part in PARTS for p in (ROOT.glob(f"{part}.py"), (ROOT / part).rglob("*.py")) for p in p)
LONGEST = 50  # lines of a function, from `def` to its last
STILL_LONGER = set()  # as "file:name"; none may be added


def part(path):
    """The part of the project that a file belongs to: its folder, or its own name at the top."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(tree):
    """(module, names, whether it is inside a function) of every import in a tree; `import a.b` has no names."""
    inside = {id(n) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef | ast.Lambda) for n in ast.walk(f)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, [], id(node) in inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import: name the module in full"
            yield node.module, [alias.name for alias in node.names], id(node) in inside


def parse(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def name_of(path):
    return str(path.relative_to(ROOT))


def test_top_level():
    """Five scripts and five folders hold all of the project's Python."""
    assert {p.stem for p in ROOT.glob("*.py")} == {*SCRIPTS, "model", "loss"}
    folders = {p.name for p in ROOT.iterdir() if p.is_dir() and p.name[0] != "." and any(p.glob("*.py"))}
    assert folders == {"configs", "data", "engine", "measures", "tests"}
    assert len(FILES) == len({*FILES}) > 20


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports(path):
    """Imports go one way: a reader of the loss, the engine or the settings need not know what is built upon them. And
    none stands inside a function."""
    mine = part(path)
    for module, names, inside in imports(parse(path)):
        theirs = module.split(".")[0]
        if theirs not in PARTS:
            assert mine != "loss" or theirs in ("math", "torch"), f"loss.py needs torch alone, not {module}"
            continue
        if mine in SCRIPTS:
            allowed = theirs not in SCRIPTS or (mine, module, names) == ("data_gen", "train", ["starting_model"])
        else:
            allowed = theirs in MAY_IMPORT[mine]
        assert allowed, f"{mine} must not import {module} {names}"
        assert not inside, f"import {module} at the top, not inside a function"


def test_settings_need_no_torch():
    """configs/ lives on the standard library: --help must not wait."""
    outside = {m.split(".")[0] for p in FILES if part(p) == "configs" for m, *_ in imports(parse(p))}
    assert outside - {"configs"} <= sys.stdlib_module_names


def test_no_function_is_longer_than_a_screen():
    """From `def` to the last line. One that has become shorter leaves the list."""
    longer = {}
    for path in FILES:
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.FunctionDef) and (n := node.end_lineno - node.lineno + 1) > LONGEST:
                longer[f"{name_of(path)}:{node.name}"] = n
    assert longer.keys() == STILL_LONGER, longer


# --------------------------------------------------------------------------------------------------------------------
# settings and their scripts


def modules(module, names):
    """Files that `import module` or `from module import names` opens: the module, and those of the names that are."""
    for dotted in (module, *(f"{module}.{name}" for name in names)):
        place = ROOT / dotted.replace(".", "/")
        yield from (p for p in (place.with_suffix(".py"), place / "__init__.py") if p in FILES)


def sources(script):
    """The texts that a script consists of: its own and those of all modules that it imports, directly or not. Of
    train.py, from which data_gen.py takes one function, that function alone."""
    todo, seen = [ROOT / f"{script}.py"], set()
    while todo:
        path = todo.pop()
        if path in seen:
            continue
        seen.add(path)
        text = path.read_text(encoding="utf-8")
        if part(path) == "train" != script:
            start = next(n for n in ast.parse(text).body if getattr(n, "name", "") == "starting_model")
            yield ast.get_source_segment(text, start)
            continue
        yield text
        todo += [p for module, names, _ in imports(ast.parse(text)) for p in modules(module, names)]


@pytest.fixture(scope="module")
def read():
    """What each script reads off its config."""
    found = {script: set().union(*map(settings_read, sources(script))) for script in SCRIPTS}
    found["train"] |= objective_settings()
    return found


@pytest.mark.parametrize(("name", "script"), [(n, s) for n, f in SETTINGS.items() for s in f.metadata["scripts"]])
def test_each_script_reads_its_settings(read, name, script):
    """--help lists a setting under a script, and the script takes the flag: then it must do something there."""
    assert name in read[script], f"{script}.py does not read {name}"
