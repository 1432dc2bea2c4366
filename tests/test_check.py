"""measures.check: each rule is broken once and named with its line, and a good file passes."""

import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from measures.check import check_file, read_marked

ROOT = Path(__file__).resolve().parents[1]
ANY = Namespace(groups=0, domains=0, unseen=0)
SUBJECTS = (
    "Anna Ben Carla David Emma Felix Greta Henry Ida Jonas Leo Mona Nora Oskar Paula Rita Sven Tilda Uwe Vera".split()
)
VERBS = "paints washes mends carries locks opens counts sells trims waters sorts folds hides moves cleans".split()
THINGS = (
    "fence window kettle ladder basket blanket carpet drawer engine faucet garden hammer island jacket keyboard".split()
)


def group(i, split="train", **changes):
    """A group of sentences that share nothing with those of other groups but a few short words."""
    who, does, what = SUBJECTS[i % 20], VERBS[i % 15], THINGS[(i * 7 + i // 15) % 15]
    word = lambda j: "".join(chr(97 + (i * 31 + j * 17 + k * 5) % 26) for k in range(6))  # noqa: E731
    side = lambda start: [  # noqa: E731
        f"{who} {does} {word(j)} {word(j + 50)} {what} {word(j + 100)}." for j in range(start, start + 6)
    ]
    record = dict(id=f"g-{i}", domain=f"d{i % 3}", critical=i % 2 == 0, input=f"{who} {does} the {what} {word(200)}.")
    return record | dict(positives=side(0), negatives=side(10), implicit=[0], split=split) | changes


def written(tmp_path, records):
    path = tmp_path / "groups.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


def broken(tmp_path, records, wanted=ANY):
    return check_file(written(tmp_path, records), wanted)[1]


def good(n=12):
    return [group(i, ("train", "train", "val", "test")[i % 4]) for i in range(n)]


def test_a_good_file_passes_and_is_described(tmp_path):
    told, wrong = check_file(written(tmp_path, good()), ANY)
    assert wrong == []
    text = "\n".join(told)
    assert "12 groups, 72 positives, 72 negatives, 16.7% of the latter implicit" in text
    assert "splits: 6 train, 3 val, 3 test" in text and "domains: 3, of 4 groups or more; in test only: none" in text
    assert "criticise, refuse or complain: 50.0%" in text and "positives: 6.0 words" in text


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (dict(positives=group(1)["positives"][:5]), "5 positives, wanted at least 6"),
        (dict(positives=["你好", "您好"]), "negatives are inf times as long as positives"),
        (dict(negatives=group(1)["negatives"][:1] * 6), "a sentence stands twice among the negatives"),
        (
            dict(positives=[f"Wholly other words, number {w}." for w in "abcdef"]),
            "0% of the positives share a content word",
        ),
        (
            dict(negatives=[s + " Then much more text follows here." for s in group(1)["negatives"]]),
            "times as long as positives",
        ),
    ],
)
def test_a_broken_group_is_named_with_its_line(tmp_path, changes, says):
    records = good()
    records[1] |= changes
    wrong = broken(tmp_path, records)
    assert any(f"groups.jsonl:2: g-1: {says}" in w or ("groups.jsonl:2: g-1: " in w and says in w) for w in wrong), (
        wrong
    )


IMPLICIT = "indices of negatives, or themselves, in a list as 'implicit'"


@pytest.mark.parametrize(
    ("field", "value", "wanted"),
    [
        *(("implicit", x, IMPLICIT) for x in ([6], [-1], "all", [None], [[1]], [{"a": 1}], {"0": 1}, 0, True, [True])),
        *(("implicit", x, IMPLICIT) for x in ([1.0], [10**400], [["a"] * 100])),
        *(("domain", x, "a text as 'domain'") for x in (["a"], {"a": 1}, 3)),
        ("critical", "false", "true or false as 'critical'"),
    ],
)
def test_bad_fields(tmp_path, field, value, wanted):
    """Such a file cannot be read."""
    records = good()
    records[1][field] = value
    with pytest.raises(ValueError) as e:
        broken(tmp_path, records)
    assert str(e.value) == f"{tmp_path}/groups.jsonl:2: wanted {wanted}, got {json.dumps(value)[:80]}"


def test_marks_are_indices_or_sentences_and_null_is_none(tmp_path):
    records = good()
    records[1] |= dict(implicit=[1, records[1]["negatives"][1], records[1]["negatives"][2]], domain=None, critical=None)
    records[2] |= dict(implicit=None)
    marked = [implicit for *_, implicit in read_marked(written(tmp_path, records))]
    assert marked[1] == {*records[1]["negatives"][1:3]} and marked[2] == set() and len(marked[3]) == 1


def test_a_sentence_in_two_groups_is_found_also_when_changed_a_little(tmp_path):
    records, long = good(), "This rather long sentence about one bridge has eleven different plain words inside."
    records[2]["positives"][0] = long + " " + records[2]["input"]
    records[7]["negatives"][3] = (long + " " + records[2]["input"]).replace("inside.", "inside, yes.")
    assert any(
        "groups.jsonl:8: g-7: 'This rather long" in w and f"repeats {tmp_path}/groups.jsonl:3, " in w
        for w in broken(tmp_path, records)
    )
    records[7]["negatives"][3] = "Something else entirely stands at this place, " + records[7]["input"]
    assert not any("repeats" in w for w in broken(tmp_path, records))


def test_a_worn_phrase_a_worn_insult_and_little_variety_are_found(tmp_path):
    records = good()
    for r in records:
        r["negatives"] = [s[:-1] + ", you blockhead of the very first order." for s in r["negatives"]]
        r["positives"] = [s[:-1] + ", as we all know by now, dear friends." for s in r["positives"]]
    wrong = "\n".join(broken(tmp_path, records))
    assert "72 sentences hold '" in wrong and "wanted at most 1%" in wrong
    assert "100.0% of the negatives hold 'blockhead'" in wrong and "distinct-2 is 0." in wrong


def test_few_implicit_negatives_are_found(tmp_path):
    records = good()
    for r in records[1:]:
        del r["implicit"]
    assert any("1.4% of the negatives are implicit, wanted at least 15%" in w for w in broken(tmp_path, records))


def test_sizes_and_splits(tmp_path):
    wanted = Namespace(groups=400, domains=25, unseen=4)
    wrong = "\n".join(broken(tmp_path, good(), wanted))
    for says in (
        "12 groups, wanted at least 400",
        "3 domains, wanted at least 25",
        "domain 'd0' has 4 groups",
        "50% of the groups are train",
    ):
        assert says in wrong
    assert "0 domains occur in test only, wanted at least 4" in wrong
    records = good()
    records[3]["domain"] = "held"
    assert "in test only: held" in "\n".join(check_file(written(tmp_path, records), ANY)[0])


def test_the_command(tmp_path):
    path = written(tmp_path, good())
    run = lambda *argv: subprocess.run(  # noqa: E731
        [sys.executable, "-m", "measures.check", *argv], cwd=ROOT, capture_output=True, text=True
    )
    done = run(str(path))
    assert done.returncode == 0 and "no rule is broken" in done.stdout
    done = run(str(path), "--groups=400")
    assert done.returncode == 1 and "wanted at least 400" in done.stdout
    done = run(str(tmp_path / "none.jsonl"))
    assert (
        done.returncode == 1
        and done.stderr.startswith("measures.check: no group file at")
        and done.stderr.count("\n") == 1
    )
    path.write_text("7\n")
    done = run(str(path))
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"measures.check: {path}:1: wanted a JSON object, got int: give a .jsonl of groups")
    path.write_text("[" + json.dumps({"input": "A.", "paraphrases": ["B."], "paraphrases_toxic": ["C."]}) + "]")
    assert ", item 1: 1: 1 positives, wanted at least 6" in run(str(path)).stdout
