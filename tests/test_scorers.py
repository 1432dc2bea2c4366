"""measures.scorers: which names stand for a scorer, what is refused of its answers, and what is remembered."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest

from data import toy
from measures import get_scorer
from measures.scorers import get_scorers


@pytest.fixture
def scorer(tmp_path, monkeypatch):
    """Writes a module with the body of `def score(texts)` into a fresh working folder and returns its scorer's name.

    The module's `calls` holds the texts of every call.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])  # get_scorer adds ''; put the old path back afterwards

    def write(body):
        name = f"scorer_of_{tmp_path.name}"
        monkeypatch.delitem(sys.modules, name, raising=False)
        head = "import numpy as np\n\ncalls = []\n\n\ndef score(texts):\n    calls.append(list(texts))\n"
        (tmp_path / f"{name}.py").write_text(f"{head}    return {body}\n")
        return f"{name}:score"

    return write


def calls(name):
    return sys.modules[name.split(":")[0]].calls


LENGTHS = "[len(t) / 10 for t in texts]"


# --------------------------------------------------------------------------------------------------------------------
# names


def test_the_toy_scorer():
    """data.toy:rudeness is 1.0 for each rude word, whatever its case, and 0.0 else, also for part of a longer word."""
    score = get_scorer("data.toy:rudeness")
    for word in toy.RUDE_WORDS:
        got = score([f"Anna, {word}!", f"Anna is {word.upper()}.", "Anna came.", "", f"Anna q{word}."])
        assert got.tolist() == [1.0, 1.0, 0.0, 0.0, 0.0]
    assert score([]).shape == (0,)


def test_a_scorer_of_the_working_folder(scorer):
    """A module that lies where the command is run is found; a list is as good as an array."""
    score = get_scorer(scorer(LENGTHS))
    got = score(["abc", "", "0123456789"])
    assert isinstance(got, np.ndarray) and got.dtype == float and got.tolist() == [0.3, 0.0, 1.0]
    assert score(("ab", "c")).tolist() == [0.2, 0.1]


def test_name_and_hash(scorer):
    """A scorer says its name and a hash of the file that defines it: another text of the file, another hash."""
    name = scorer(LENGTHS)
    first = get_scorer(name)
    assert first.name == name and len(first.hash) == 12
    assert get_scorer(scorer(LENGTHS)).hash == first.hash
    assert get_scorer(scorer("[0.5 for t in texts]")).hash != first.hash
    assert get_scorer("ngram").name == "ngram" and get_scorer("ngram").hash != get_scorer("data.toy:rudeness").hash


def test_the_hash_covers_the_weights_beside_the_module(scorer, tmp_path):
    name = scorer(LENGTHS)
    weights = tmp_path / (name.split(":")[0] + ".npz")
    hashes = {get_scorer(name).hash}
    for content in (b"one", b"two"):
        weights.write_bytes(content)
        hashes.add(get_scorer(name).hash)
    assert len(hashes) == 3


WANTED = "wanted ngram, module:function, or file:SCORES.jsonl"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("rudeness", f"scorer 'rudeness': {WANTED}"),
        ("data.toy:", f"scorer 'data.toy:': {WANTED}"),
        (":rudeness", f"scorer ':rudeness': {WANTED}"),
        ("file:", f"scorer 'file:': {WANTED}"),
        ("", f"scorer '': {WANTED}"),
        ("no_such_module:f", "scorer 'no_such_module:f' cannot be loaded: ModuleNotFoundError: No module named"),
        (
            "data.toy:rude",
            "scorer 'data.toy:rude' cannot be loaded: AttributeError: module 'data.toy' has no",
        ),
        ("data.toy:RUDE_WORDS", "scorer 'data.toy:RUDE_WORDS' is a "),
    ],
)
def test_scorers_that_cannot_be_loaded(monkeypatch, name, says):
    """Bad name, missing module, missing function: a ValueError when it is chosen, not after an hour of training."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(ValueError) as e:
        get_scorer(name)
    assert str(e.value).startswith(says)


def test_a_module_that_breaks_while_it_is_imported(scorer, tmp_path):
    name = scorer("1 / 0")
    path = tmp_path / (name.split(":")[0] + ".py")
    path.write_text("raise RuntimeError('no licence')\n" + path.read_text())
    with pytest.raises(ValueError, match="cannot be loaded: RuntimeError: no licence"):
        get_scorer(name)


# --------------------------------------------------------------------------------------------------------------------
# answers


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("[0.5]", "gave values of shape (1,) for 3 texts"),
        ("[[0.5], [0.5], [0.5]]", "gave values of shape (3, 1) for 3 texts"),
        ("0.5", "gave values of shape () for 3 texts"),
        ("None", "gave values of shape () for 3 texts"),
        ("[0.1, float('nan'), 0.3]", "gave nan for 'two'"),
        ("[0.1, None, 0.3]", "gave nan for 'two'"),
        ("[0.1, 0.2, 1.01]", "gave 1.01 for 'three'"),
        ("np.array([-0.01, 0.2, 7.0])", "gave -0.01 for 'one'"),
        ("[0.1, float('inf'), 0.3]", "gave inf for 'two'"),
        ("[0.1, 'high', 0.3]", "failed on 3 texts: ValueError: could not convert string to float"),
        ("1 / 0", "failed on 3 texts: ZeroDivisionError: division by zero"),
        ("texts[3]", "failed on 3 texts: IndexError"),
    ],
)
def test_bad_scores(scorer, tmp_path, body, says):
    """A failure, a wrong count, a missing value or one outside [0, 1] is an error that names the scorer and the text
    it is about, never a 0; and nothing of it gets into the cache."""
    name = scorer(body)
    score = get_scorer(name, tmp_path / "cache.jsonl")
    for _ in range(2):  # nor is it remembered
        with pytest.raises(ValueError) as e:
            score(["one", "two", "three"])
        assert says in str(e.value) and repr(name) in str(e.value)
    assert not (tmp_path / "cache.jsonl").exists()


def test_the_ends_of_the_scale_are_fine(scorer):
    """0 and 1 themselves, as whole numbers or truth values."""
    assert get_scorer(scorer("[0, 1, True]"))(["a", "b", "c"]).tolist() == [0.0, 1.0, 1.0]


def test_ctrl_c_in_a_scorer_is_no_failure_of_it(scorer):
    name = scorer("(0 for _ in ()).throw(KeyboardInterrupt)")  # exec() would end pytest itself with 130
    with pytest.raises(KeyboardInterrupt):
        get_scorer(name)(["a"])


def test_each_text_is_judged_once(scorer):
    """Duplicates, in one call or later ones, get the same score without another call."""
    name = scorer(LENGTHS)
    score = get_scorer(name)
    assert score(["a", "bb", "a", "a"]).tolist() == [0.1, 0.2, 0.1, 0.1]
    assert score(["bb", "ccc", "a"]).tolist() == [0.2, 0.3, 0.1]
    assert calls(name) == [["a", "bb"], ["ccc"]]


def test_many_texts_in_portions(scorer, monkeypatch):
    """In order, whatever their number: what is lost when a scorer fails is one portion at most."""
    monkeypatch.setattr("measures.scorers.ROWS", 4)
    name = scorer("[int(t) / 10 for t in texts]")
    texts = [str(i) for i in range(10)]
    assert get_scorer(name)(texts).tolist() == [i / 10 for i in range(10)]
    assert [len(c) for c in calls(name)] == [4, 4, 2]


# --------------------------------------------------------------------------------------------------------------------
# the cache


def test_the_cache_answers_for_the_function(scorer, tmp_path):
    """A second scorer with that file asks only for what is new; the same texts need no call at all."""
    name, cache = scorer(LENGTHS), tmp_path / "folder" / "cache.jsonl"
    texts = ["a", 'zwei "ü"\n', "\u2028"]
    first = get_scorer(name, cache)(texts)
    again = get_scorer(name, cache)
    assert again(texts).tolist() == first.tolist() and len(calls(name)) == 1
    again([*texts, "new"])
    assert calls(name) == [texts, ["new"]]
    records = [json.loads(line) for line in cache.read_text().split("\n")[:-1]]
    assert [r["text"] for r in records] == [*texts, "new"]
    assert {(r["scorer"], r["hash"]) for r in records} == {(name, again.hash)}


def test_another_scorer_does_not_believe_the_cache(scorer, tmp_path):
    """Neither a changed function of the same name nor another one beside it; and each keeps its own."""
    cache = tmp_path / "cache.jsonl"
    name = scorer(LENGTHS)
    assert get_scorer(name, cache)(["abc"]).tolist() == [0.3]
    assert get_scorer("data.toy:rudeness", cache)(["abc"]).tolist() == [0.0]
    changed = scorer("[0.9 for t in texts]")
    assert get_scorer(changed, cache)(["abc"]).tolist() == [0.9] and calls(changed) == [["abc"]]
    back = scorer(LENGTHS)
    assert get_scorer(back, cache)(["abc"]).tolist() == [0.3] and calls(back) == []


@pytest.mark.parametrize("cut", [1, 15, None])
def test_a_cut_last_line_costs_only_itself(scorer, tmp_path, cut):
    """Killed while writing: what was whole stays, the cut text is judged again, and the file is whole afterwards."""
    name, cache = scorer(LENGTHS), tmp_path / "cache.jsonl"
    get_scorer(name, cache)(["a", "bb", "ccc"])
    whole = cache.read_text()
    lines = whole.splitlines(keepends=True)
    last = lines[-1][:cut] if cut else lines[-1].removesuffix("\n")
    cache.write_text("".join(lines[:-1]) + last)
    assert get_scorer(name, cache)(["a", "bb", "ccc"]).tolist() == [0.1, 0.2, 0.3]
    assert calls(name)[1:] == [["ccc"]] and cache.read_text() == whole


def test_what_was_judged_before_a_failure_is_kept(scorer, tmp_path, monkeypatch):
    monkeypatch.setattr("measures.scorers.ROWS", 2)
    name = scorer("[1 / len(t) for t in texts]")
    with pytest.raises(ValueError, match="ZeroDivisionError"):
        get_scorer(name, tmp_path / "c.jsonl")(["a", "bb", "", "c"])
    assert get_scorer(name, tmp_path / "c.jsonl")(["a", "bb"]).tolist() == [1, 0.5]
    assert len(calls(name)) == 2


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"\n{}\n\n", ":2: wanted {"),
        (b"{\n", ":1: not JSON ("),
        (b"\x00\x00\n", ":1: not JSON ("),
        (b'{"text": "a", "score": 2}\n', ":1: wanted {"),
        (b"\xff\n", ":1: not UTF-8 text (byte 0xff)"),
        (b"[]", ": wanted JSON lines, to which others can be added, got an array"),
    ],
)
def test_a_damaged_cache_is_named(scorer, tmp_path, content, says):
    cache = tmp_path / "cache.jsonl"
    cache.write_bytes(content)
    with pytest.raises(ValueError) as e:
        get_scorer(scorer(LENGTHS), cache)
    assert str(e.value).startswith(f"{cache}{says}")
    assert str(e.value).endswith(": delete this file, its scores are made again")
    assert cache.read_bytes() == content


def test_a_cache_with_the_line_ends_of_windows_is_known(scorer, tmp_path):
    name, cache = scorer(LENGTHS), tmp_path / "cache.jsonl"
    get_scorer(name, cache)(["a", "bb"])
    cache.write_bytes(b"\xef\xbb\xbf" + cache.read_bytes().replace(b"\n", b"\r\n"))
    again = get_scorer(name, cache)
    assert again(["a", "bb", "ccc"]).tolist() == [0.1, 0.2, 0.3] and calls(name) == [["a", "bb"], ["ccc"]]
    assert get_scorer(name, cache)(["ccc"]).tolist() == [0.3] and len(calls(name)) == 2


def test_a_cache_that_cannot_be_written_is_one_line(scorer, tmp_path):
    (tmp_path / "file").write_text("")
    cache = tmp_path / "file" / "cache.jsonl"
    with pytest.raises(OSError, match=f"{cache} cannot be written .*: give another place"):
        get_scorer(scorer(LENGTHS), cache)(["a"])


@pytest.mark.parametrize("cut", [None, 20])
def test_two_scorers_share_the_cache(scorer, tmp_path, cut):
    """Each finds its own scores of the same texts again, also behind a line that a kill has cut."""
    names, cache = f"{scorer(LENGTHS)},data.toy:rudeness", tmp_path / "cache.jsonl"
    texts = [["Anna", "a moron"], ["a moron", "Ben"], ["Ben", "Carla"]]
    want = [[[0.4, 0.7], [0.7, 0.3], [0.3, 0.5]], [[0, 1], [1, 0], [0, 0]]]
    for _ in range(2):
        pair = get_scorers(names, cache)
        assert [[one(some).tolist() for some in texts] for one in pair] == want
        records = [json.loads(line) for line in cache.read_text().splitlines()]
        assert len(records) == len({(r["scorer"], r["text"]) for r in records}) == 8
    assert sum(map(len, calls(pair[0].name))) == 4
    if cut:  # the last record is of the second one
        cache.write_text(cache.read_text()[:-cut])
        again = get_scorers(names, cache)
        assert [[one(some).tolist() for some in texts] for one in again] == want
        assert sum(map(len, calls(pair[0].name))) == 4 and len(cache.read_text().splitlines()) == 8


@pytest.mark.parametrize(
    ("names", "want"),
    [
        ("ngram", ["ngram"]),
        ("ngram,data.toy:rudeness", ["ngram", "data.toy:rudeness"]),
        ("data.toy:rudeness, ngram,data.toy:rudeness,ngram", ["data.toy:rudeness", "ngram"]),
        ("file:out/tau=1,seed=0/s.jsonl,ngram", ["file:out/tau=1,seed=0/s.jsonl", "ngram"]),
        ("ngram,file:a.jsonl,file:b,ngrams.jsonl", ["ngram", "file:a.jsonl", "file:b,ngrams.jsonl"]),
    ],
)
def test_names_with_commas_between(names, want):
    """Each once, in order. The folders of a sweep have commas in their names."""
    assert [one.name for one in get_scorers(names)] == want


@pytest.mark.parametrize("names", ["ngram,", ",ngram", "ngram,rude", "ngram,,data.toy:rudeness"])
def test_a_list_with_an_unknown_name_is_one_line(names):
    with pytest.raises(ValueError, match="wanted ngram, module:function, or file:SCORES.jsonl$"):
        get_scorers(names)


DETOXIFY = """from detoxify import Detoxify
model = Detoxify("original")
toxicity = lambda texts: model.predict(texts)["toxicity"]
"""


STUB = """made = []


class Detoxify:
    def __init__(self, model_type):
        made.append(model_type)

    def predict(self, text):
        assert isinstance(text, list)
        return dict(toxicity=[len(t) / 100 for t in text], insult=[1.0] * len(text))
"""


def test_the_three_lines_for_detoxify(tmp_path, monkeypatch):
    """As measures/README.md has them, against a stub with its interface: a list of texts in, lists by class out."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    for module, content in (("detoxify", STUB), ("judge", DETOXIFY)):
        monkeypatch.setitem(sys.modules, module, None)  # so that it is what it was afterwards
        del sys.modules[module]
        (tmp_path / f"{module}.py").write_text(content)
    score = get_scorer("judge:toxicity", tmp_path / "cache.jsonl")
    assert score(["", "a" * 50, "a" * 100]).tolist() == [0, 0.5, 1] and sys.modules["detoxify"].made == ["original"]
    shown = (Path(__file__).parents[1] / "measures" / "README.md").read_text()
    assert "".join(f"      {line}\n" for line in DETOXIFY.splitlines()) in shown and "judge:toxicity" in shown


# --------------------------------------------------------------------------------------------------------------------
# a file of scores


def test_export_and_import(tmp_path):
    """Unknown texts are written with a null and are nan; filled in by others, they count. Nothing is written twice."""
    file = tmp_path / "out" / "scores.jsonl"
    score = get_scorer(f"file:{file}")
    texts = ["one", "zwei ü\n", "one", "three"]
    for _ in range(2):
        assert np.isnan(score(texts)).all()
    assert score.function is None and np.isnan(get_scorer(f"file:{file}")(texts)).all()
    records = [json.loads(line) for line in file.read_text().splitlines()]
    assert records == [dict(text=t, score=None) for t in ("one", "zwei ü\n", "three")]

    filled = [dict(text="one", score=0.25), dict(text="zwei ü\n", score=1, model="any"), records[2]]
    file.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in filled), encoding="utf-8")
    new = get_scorer(f"file:{file}")
    got = new([*texts, "four"])
    assert got[:3].tolist() == [0.25, 1, 0.25] and np.isnan(got[3:]).all()
    assert [json.loads(line)["text"] for line in file.read_text().splitlines()] == ["one", "zwei ü\n", "three", "four"]
    assert new.hash != score.hash  # another content is another scorer


def test_a_file_of_scores_without_a_line_break_at_its_end_is_not_cut(tmp_path):
    """Unlike a cache it is somebody's work: the last line counts."""
    file = tmp_path / "scores.jsonl"
    file.write_text('{"text": "a", "score": 0.5}')
    assert get_scorer(f"file:{file}")(["a"]).tolist() == [0.5]
    assert file.read_text() == '{"text": "a", "score": 0.5}'


def test_an_export_begins_on_a_line_of_its_own(tmp_path):
    """Also where the file that was filled in does not end with a line break, as editors and json.dump leave it."""
    file = tmp_path / "scores.jsonl"
    file.write_text('{"text": "a", "score": 0.5}')
    got = get_scorer(f"file:{file}")(["a", "b"])
    assert got[0] == 0.5 and math.isnan(got[1])
    assert [json.loads(line)["text"] for line in file.read_text().splitlines()] == ["a", "b"]


def test_a_file_of_scores_is_found_from_any_folder(tmp_path, monkeypatch):
    """As data= is. A folder is no such file; a new file lies where it was named."""
    monkeypatch.setattr("configs.ROOT", tmp_path / "project")
    (tmp_path / "project" / "data").mkdir(parents=True)
    (tmp_path / "project" / "data" / "scores.jsonl").write_text('{"text": "a", "score": 0.5}\n')
    monkeypatch.chdir(tmp_path)
    assert get_scorer("file:data/scores.jsonl")(["a"]).tolist() == [0.5]
    with pytest.raises(FileNotFoundError, match="project/data is a folder, wanted a score file: give a .jsonl"):
        get_scorer("file:project/data")
    get_scorer("file:new/scores.jsonl")(["a"])
    assert (tmp_path / "new" / "scores.jsonl").is_file()


def test_nan_is_a_missing_score_and_marks_of_windows_change_nothing(tmp_path):
    file = tmp_path / "SCORES.JSONL"
    lines = ['{"text": "a", "score": NaN}', '{"text": "b", "score": null}', '{"text": "c", "score": 0.5}']
    file.write_bytes(("\ufeff" + "\r\n".join(lines)).encode())
    got = get_scorer(f"file:{file}")(["a", "b", "c", "d"])
    assert np.isnan(got).tolist() == [True, True, False, True] and got[2] == 0.5
    assert np.isnan(get_scorer(f"file:{file}")(["d", "a"])).all() and len(file.read_text().splitlines()) == 4


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "not JSON"),
        ('{"text": "b", "score": Infinity}', "wanted"),
        ('{"text": "b", "score": true}', "wanted"),
        ('{"text": "\\ud800", "score": 1}', "half of a character"),
        ('{"txt": "' + "b" * 10**6 + '"}', 'or null}, got {"txt": "' + "b" * 71),
        ('{"text": "b"}', "wanted"),
        ('{"score": 0.5}', "wanted"),
        ('["b", 0.5]', "wanted"),
        ('{"text": "b", "score": "high"}', "wanted"),
        ('{"text": "b", "score": [0.5]}', "wanted"),
        ('{"text": ["b"], "score": 0.5}', "wanted"),
        ('{"text": "b", "score": 1.5}', "wanted"),
        ('{"text": "b", "score": -0.1}', "wanted"),
    ],
)
def test_a_bad_line_is_named_by_file_and_number(tmp_path, line, says):
    file = tmp_path / "scores.jsonl"
    file.write_text('{"text": "a", "score": 0.5}\n\n' + line + "\n")
    with pytest.raises(ValueError) as e:
        get_scorer(f"file:{file}")
    assert str(e.value).startswith(f"{file}:3: ") and says in str(e.value) and len(str(e.value)) < 400
