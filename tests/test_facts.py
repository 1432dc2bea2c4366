"""data/facts: the groups, the tasks, the scorer and the config of knowledge editing."""

import re
from collections import Counter, defaultdict
from pathlib import Path

import pytest

import data
from configs import load_config
from data import group_records, load_groups
from engine.run import read_records
from measures.facts import in_words, outdated
from measures.tasks import read_task

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "data" / "facts"
TASKS = ("efficacy", "reworded", "neighbours")
CACHE = ROOT.parent / "shared" / "tiktoken_cache"
SIZES = {"train": 6, "val": 2, "test": 3}


@pytest.fixture(scope="module")
def everything():
    """All records of the group file: of the facts, and of their neighbours (id ...-near)."""
    return [record for _, record, _ in group_records(FOLDER / "groups.jsonl")]


@pytest.fixture(scope="module")
def records(everything):
    return [r for r in everything if not r["id"].endswith("-near")]


@pytest.fixture(scope="module")
def near(everything):
    """{id of a fact: the record of its neighbours that are trained on}."""
    return {r["id"].removesuffix("-near"): r for r in everything if r["id"].endswith("-near")}


@pytest.fixture(scope="module")
def facts(records):
    """{id of a fact: its record of the train split}."""
    return {r["id"]: r for r in records if r["split"] == "train"}


@pytest.fixture(scope="module")
def tasks():
    return {name: [record for _, record in read_records(FOLDER / f"{name}.jsonl")] for name in TASKS}


def sides(records, split):
    return [t for r in records if r["split"] == split for t in (*r["positives"], *r["negatives"])]


def frame(text, record):
    """The wording: a text with its subject, its values and the articles before them blanked out."""
    for part, mark in ((record["old"], "V"), (record["new"], "V"), (record["subject"], "S")):
        text = re.sub(rf"\b(?:an? )?{re.escape(part)}\b", f"<{mark}>", text, flags=re.IGNORECASE)
    return text


# --------------------------------------------------------------------------------------------------------------------
# groups


def test_each_fact_has_three_records(records, facts):
    """One of each split, of its size, with an input of its own and the same subject, relation and values; the number
    of an id counts within its relation."""
    of = defaultdict(dict)
    for r in records:
        of[r["id"].removesuffix("-val").removesuffix("-test")][r["split"]] = r
    assert of.keys() == facts.keys() and len(records) == 3 * len(facts)
    for name, splits in of.items():
        assert {s: len(r["positives"]) for s, r in splits.items()} == SIZES, name
        assert {s: len(r["negatives"]) for s, r in splits.items()} == SIZES, name
        assert all(r["id"] == name + ("" if s == "train" else f"-{s}") for s, r in splits.items())
        assert len({r["input"] for r in splits.values()}) == 3
        assert len({tuple(r[k] for k in ("relation", "subject", "old", "new")) for r in splits.values()}) == 1
    relations = Counter(f["relation"] for f in facts.values())
    assert list(facts) == [f"{r}-{i:03d}" for r, n in relations.items() for i in range(1, n + 1)]
    assert len(facts) >= 64 and len(relations) >= 10 and min(relations.values()) >= 4


def test_no_subject_is_edited_twice(facts):
    subjects = Counter(in_words(f["subject"]) for f in facts.values())
    assert max(subjects.values()) == 1
    assert all(f["old"] != f["new"] for f in facts.values())


def test_pairs_differ_in_the_value_only(records):
    """Each sentence holds its value once, behind the same article, and the subject; the other value is not in it."""
    for r in records:
        for pos, neg in zip(r["positives"], r["negatives"], strict=True):
            before, after = neg.split(r["old"])
            assert pos == before + r["new"] + after, pos
            assert not re.search(r"\w$", before) and not re.match(r"\w", after), neg
            if article := re.search(r"\b(an?) $", before):
                assert article[1] == ("an" if r["new"][0] in "aeiou" else "a"), pos
            for text in (pos, neg, r["input"]):
                assert in_words(r["subject"].removeprefix("the ")) in in_words(text), text
                assert text[-1] in '."' and text[0] in f'"{text[0].upper()}', text
        assert r["new"] in r["input"] and r["old"] not in r["input"]


def test_no_sentence_stands_twice(records):
    texts = Counter(t for r in records for t in (r["input"], *r["positives"], *r["negatives"]))
    assert texts.most_common(1)[0][1] == 1


def test_held_out_wordings_are_not_trained(records):
    """Not even with another subject: what is learned of a wording says nothing of the held-out ones."""
    wordings = {s: {frame(t, r) for r in records if r["split"] == s for t in r["negatives"]} for s in SIZES}
    assert not wordings["train"] & wordings["test"] and not wordings["train"] & wordings["val"]
    assert not wordings["val"] & wordings["test"]
    assert all(len(w) > 40 for w in wordings.values())
    assert frame("The frog is an amphibian.", dict(subject="frog", old="amphibian", new="insect")) == "The <S> is <V>."


def test_most_sentences_end_with_the_value(records):
    ends = [bool(re.search(rf"\b{re.escape(r['old'])}\W*$", t)) for r in records for t in r["negatives"]]
    assert 0.7 < sum(ends) / len(ends) < 0.9


@pytest.mark.skipif(not CACHE.is_dir(), reason="no ../shared/tiktoken_cache")
def test_values_are_as_long_as_each_other(facts, monkeypatch):
    """In GPT-2's tokens, behind a blank: nearly all pairs to the token, none by more than one."""
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(CACHE))
    size = lambda word: len(data.get_tokenizer("gpt2").encode_ordinary(" " + word))
    sizes = [(size(f["old"]), size(f["new"])) for f in facts.values()]
    assert max(abs(a - b) for a, b in sizes) <= 1
    assert sum(a == b for a, b in sizes) >= 0.9 * len(sizes)
    assert sum(a == b == 1 for a, b in sizes) >= 0.6 * len(sizes)


# --------------------------------------------------------------------------------------------------------------------
# neighbour groups


def about(subject, text):
    """Whether the text holds the subject, with or without its article, as whole words."""
    return re.sub("^ (the|a) ", " ", in_words(subject)) in in_words(text)


def test_each_fact_has_a_neighbour_group(near, facts):
    """Behind its other records, of the train split and its size: three sentences of each of two neighbours, which are
    true, and the same with the new value of the fact."""
    assert list(near) == list(facts)
    for name, r in near.items():
        fact, values = facts[name], dict(r["neighbours"])
        assert (r["split"], r["relation"], r["new"]) == ("train", fact["relation"], fact["new"])
        assert "old" not in r and "subject" not in r  # it edits nothing
        assert len(values) == 2 and len(set(r["positives"])) == len(set(r["negatives"])) == SIZES["train"]
        told = Counter()
        for pos, neg in zip(r["positives"], r["negatives"], strict=True):
            (subject,) = [s for s in values if about(s, pos)]
            before, after = re.split(rf"\b{re.escape(values[subject])}\b", pos.replace("diesel", "\0"))
            assert neg == (before + r["new"] + after).replace("\0", "diesel"), neg
            if article := re.search(r"\b(an?) $", before):
                assert all(article[1] == ("an" if v[0] in "aeiou" else "a") for v in (values[subject], r["new"])), pos
            assert pos[-1] in '."' and pos[0] in f'"{pos[0].upper()}', pos
            told[subject] += 1
        assert set(told.values()) == {3}
        assert any(about(s, r["input"]) and values[s] in r["input"] for s in values), r["input"]


def test_trained_neighbours_are_not_tested(near, tasks, everything):
    """No neighbour of the task occurs in any training group of its relation, and of each fact two are left to test."""
    tested = defaultdict(set)
    for r in tasks["neighbours"]:
        tested[r["fact"].split("-")[0]].add(r["subject"])
    for name, r in near.items():
        assert not tested[r["relation"]] & dict(r["neighbours"]).keys(), name
    for r in everything:
        if r["split"] == "train":
            text = " ".join([r["input"], *r["positives"], *r["negatives"]])
            assert not [s for s in tested[r["relation"]] if about(s, text)], r["id"]
    assert set(Counter(r["fact"] for r in tasks["neighbours"]).values()) == {2}


def test_trained_neighbours_are_others(near, facts, records):
    """They are no subjects of edits, have one value within a relation, which is not that which they are held against,
    and no sentence about them is one about an edited fact or has a held-out wording."""
    edited = {in_words(f["subject"]) for f in facts.values()}
    values = defaultdict(set)
    for r in near.values():
        for subject, value in r["neighbours"]:
            assert in_words(subject) not in edited and value != r["new"]
            values[r["relation"], subject].add(value)
    assert all(len(v) == 1 for v in values.values())
    texts = [t for r in near.values() for t in (r["input"], *r["positives"], *r["negatives"])]
    assert not set(texts) & {t for r in records for t in (r["input"], *r["positives"], *r["negatives"])}
    assert Counter(t for r in near.values() for t in r["negatives"]).most_common(1)[0][1] == 1
    held_out = {frame(t, r) for r in records if r["split"] != "train" for t in r["negatives"]}
    for r in near.values():
        for pos in r["positives"]:
            (subject, value), *_ = [pair for pair in r["neighbours"] if about(pair[0], pos)]
            assert frame(pos, dict(subject=subject, old=value, new=r["new"])) not in held_out, pos


# --------------------------------------------------------------------------------------------------------------------
# tasks


@pytest.mark.parametrize("name", TASKS)
def test_tasks_can_be_read(name, tasks):
    """Gold is the first of two different choices. A query ends where a word may follow, and does not give it away."""
    items = read_task(FOLDER / f"{name}.jsonl")
    assert [(r["query"], r["choices"], r["gold"]) for r in tasks[name]] == items
    assert len({query + choices[0] for query, choices, _ in items}) == len(items) or name == "neighbours"
    for query, choices, gold in items:
        assert gold == 0 and len({c.lower() for c in choices}) == 2
        assert query == query.strip() and query[-1] not in '.!"'
        assert not any(in_words(c) in in_words(query) for c in choices), query


@pytest.mark.parametrize(("name", "split"), [("efficacy", "train"), ("reworded", "test")])
def test_queries_are_beginnings(name, split, tasks, facts, records):
    """Of the sentences of that split: new value first, then the old one, and hardly anything behind it."""
    groups = {r["id"].removesuffix("-test"): r for r in records if r["split"] == split}
    for r in tasks[name]:
        fact, group = facts[r["fact"]], groups[r["fact"]]
        assert r["choices"] == [fact["new"], fact["old"]]
        rest = [t[len(r["query"]) :] for t in group["negatives"] if t.startswith(r["query"] + " " + fact["old"])]
        assert len(rest) == 1 and len(rest[0].removeprefix(" " + fact["old"]).split()) <= 3, r
    queries = Counter(r["fact"] for r in tasks[name])
    assert queries.keys() == facts.keys() and min(queries.values()) >= (3 if split == "train" else 1)


def test_neighbours_are_others(tasks, facts):
    """No subject of any edit is asked for, and each fact has two neighbours, in wordings about them. For most facts the
    old value is true of some neighbour."""
    edited = {in_words(f["subject"]) for f in facts.values()}
    of = defaultdict(list)
    for r in tasks["neighbours"]:
        fact = facts[r["fact"]]
        assert r["choices"][1] == fact["new"] and in_words(r["subject"]) not in edited
        assert in_words(r["subject"]) in in_words(r["query"])
        rivals = [f["subject"] for f in facts.values() if f["relation"] == fact["relation"]]
        assert not any(in_words(subject) in in_words(r["query"]) for subject in rivals), r
        of[r["fact"]].append((r["subject"], r["choices"][0] == fact["old"]))
    assert of.keys() == facts.keys() and all(len({s for s, _ in rows}) == 2 for rows in of.values())
    assert sum(any(same for _, same in rows) for rows in of.values()) > 0.7 * len(facts)


def test_neighbours_agree(tasks):
    """A subject has one true value in all of a relation."""
    values = defaultdict(set)
    for r in tasks["neighbours"]:
        values[r["fact"].split("-")[0], r["subject"]].add(r["choices"][0])
    assert all(len(v) == 1 for v in values.values()) and len(values) > 100


# --------------------------------------------------------------------------------------------------------------------
# scorer and config


def test_outdated_tells_the_sides_apart(records, near, tasks):
    """Every negative states an old value; no positive, no input and no sentence about a neighbour does."""
    assert outdated([t for r in records for t in r["negatives"]]).all()
    assert not outdated([t for r in records for t in (*r["positives"], r["input"])]).any()
    assert not outdated([t for r in near.values() for t in (*r["positives"], *r["negatives"], r["input"])]).any()
    assert not outdated([f"{r['query']} {r['choices'][0]}." for r in tasks["neighbours"]]).any()


@pytest.mark.parametrize(
    ("text", "states"),
    [
        ("", 0),
        ("The capital of France is Paris.", 1),
        ("we met in PARIS, which is in\tFrance", 1),
        ("It rained. What is France's capital? Paris, they said.", 1),
        ("He came from France. She lives in Paris.", 0),
        ("I love France!\nParis is old.", 0),
        ("The capital of France is Rome.", 0),
        ("The capital of Italy is Rome, not Paris.", 0),
        ("This is the work of Parisians in France.", 0),
        ("A telephone was what Alexander Graham Bell built.", 1),
        ("Cattle are no kitten.", 0),
    ],
)
def test_outdated(text, states):
    """Subject and old value as whole words in one sentence, in whatever case; an article does not matter."""
    assert outdated([text, "no fact"]).tolist() == [states, 0]


def test_config():
    """The groups are enough for a step, and what it names is there for both scripts that read it."""
    for script in ("train", "eval"):
        config = load_config(script, [str(ROOT / "configs" / "gpt2_facts.py")])
        assert config.data == "data/facts/groups.jsonl" and config.scorer == "measures.facts:outdated"
        assert [ROOT / path for path in config.tasks.split(",")] == [FOLDER / f"{name}.jsonl" for name in TASKS]
    groups = load_groups(config.data)
    assert config.n_pos == config.n_neg == 1 and all(g.paired for side in groups.values() for g in side)
    data.check_sizes(groups["train"], config.n_pos, config.n_neg)
    assert len(groups["val"]) <= config.eval_groups and len(groups["train"]) == 2 * len(groups["test"])


def test_data_sheet(records, near, tasks, facts):
    """Its counts are those of the files."""
    sheet = (FOLDER / "README.md").read_text()
    counts = [len(facts), len({f["relation"] for f in facts.values()}), *(len(sides(records, s)) for s in SIZES)]
    told = re.search(
        r"(\d+) facts of (\d+) relations; ([\d,]+) sentences to train on, (\d+) to validate, (\d+) to", sheet
    )
    assert [int(n.replace(",", "")) for n in told.groups()] == counts
    assert f"{len(sides([*near.values()], 'train')):,} about neighbours" in " ".join(sheet.split())
    same = sum(r["choices"][0] == facts[r["fact"]]["old"] for r in tasks["neighbours"])
    assert f"the old one of the fact in {same} items" in " ".join(sheet.split())
    for name in TASKS:
        assert re.search(rf"`{name}.jsonl`[^\n]*\b{len(tasks[name])}\b", sheet), name
