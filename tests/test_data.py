"""data: readers and their errors, framing and padding, batches as pure functions, and the toy world."""

import json
import random
import re
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import torch

import data
from configs import Config
from data import (
    WIDTH,
    Batches,
    Group,
    check_sizes,
    frame,
    load_documents,
    load_groups,
    pad,
    read_groups,
    toy,
    toy_facts,
)
from data.prompts import answer, closing_tokens, few_shot, prompt_for, unquoted

CACHE = Path(__file__).parents[2] / "shared" / "tiktoken_cache"


@pytest.fixture(scope="module")
def tokenizer():
    return data.get_tokenizer("toy")


@pytest.fixture
def write(tmp_path):
    """Writes a file and returns its path: text as it is, a list of records as JSON lines or, for .json, one array."""

    def to(content, name="groups.jsonl"):
        if not isinstance(content, str):
            lines = [json.dumps(record) for record in content]
            content = "[" + ",\n".join(lines) + "]" if name.endswith(".json") else "\n".join(lines) + "\n"
        (tmp_path / name).write_text(content, encoding="utf-8")
        return tmp_path / name

    return to


def record(i, **more):
    """A group in our format; record(i, id=...) changes a field, record(i, split=None) leaves it out."""
    base = dict(id=f"g{i}", input=f"in {i}", positives=[f"kind {i}"], negatives=[f"rude {i}"], split="train")
    return {k: v for k, v in (base | more).items() if v is not None}


def release(i, **more):
    """A group in the paper's released format."""
    return dict(input=f"in {i}", paraphrases=[f"kind {i}"], paraphrases_toxic=[f"rude {i}"]) | more


# --------------------------------------------------------------------------------------------------------------------
# groups from files


def test_our_format(write):
    """Every field arrives, in the file's order; optional fields and blank lines are ignored; ids may be numbers."""
    first = record(0, positives=["a", "b"], negatives=["c", "d", "e"], split="test", domain="office", scores=[0.1])
    path = write("\n" + json.dumps(first) + "\n\n  \n" + json.dumps(record(1, id=7, split="val")))
    assert read_groups(path) == [
        Group("g0", "in 0", ["a", "b"], ["c", "d", "e"], "test"),
        Group("7", "in 1", ["kind 1"], ["rude 1"], "val"),
    ]
    assert read_groups(str(path)) == read_groups(path)
    path = write("\n".join(json.dumps(record(i, paired=i == 1)) for i in range(3)))
    assert [g.paired for g in read_groups(path)] == [False, True, False]


def test_released_format(write):
    """One JSON array; paraphrases as lists or as {text: score} mappings, whose keys count, in their order."""
    scored = release(1, paraphrases={"b": 0.1, "a": 0.2}, paraphrases_toxic={"d": 0.9, "c": 0.8}, other={"x": 1})
    path = write([release(0), scored], "release.json")
    assert [(g.input, g.positives, g.negatives) for g in read_groups(path)] == [
        ("in 0", ["kind 0"], ["rude 0"]),
        ("in 1", ["b", "a"], ["d", "c"]),
    ]


def test_the_content_decides_not_the_ending(write):
    """Our format in a .json file, the release's in a .jsonl one, and with blanks before the bracket."""
    ours = json.dumps(record(0))
    assert read_groups(write(ours + "\n", "ours.json"))[0].id == "g0"
    assert read_groups(write("\n [" + json.dumps(release(0)) + "]", "release.jsonl"))[0].positives == ["kind 0"]


def test_text_beyond_ascii(write):
    """UTF-8 in, UTF-8 out, escaped or not."""
    for ascii_only in (True, False):
        text = json.dumps(record(0, input="Zürich 你好 🙂"), ensure_ascii=ascii_only)
        assert read_groups(write(text))[0].input == "Zürich 你好 🙂"


@pytest.mark.parametrize("name", ["ours.jsonl", "release.json"])
def test_ids_and_splits_are_filled_in(write, name):
    """Without ids the position counts, without splits a hash of the input alone. 40 are pinned.

    (Python's own hash() would change from process to process.) 1000 inputs split 70 / 10 / 20 %, here within 3 points.
    """
    make = release if name.endswith(".json") else lambda i: record(i, id=None, split=None)
    path = write([make(i) for i in range(1000)], name)
    groups = read_groups(path)
    assert [g.id for g in groups] == [str(i) for i in range(1, 1001)]
    pinned = dict.fromkeys((14, 15, 22, 29, 37), "val") | dict.fromkeys((3, 7, 16, 18, 21, 39), "test")
    assert [g.split for g in groups[:40]] == [pinned.get(i, "train") for i in range(40)]
    assert groups == read_groups(path)
    for split, share in (("train", 700), ("val", 100), ("test", 200)):
        assert abs(sum(g.split == split for g in groups) - share) <= 30
    turned = read_groups(write([make(i) for i in reversed(range(1000))], name))
    assert {g.input: g.split for g in turned} == {g.input: g.split for g in groups}


def test_given_splits_and_ids_are_kept_in_the_released_format(write):
    """They are not part of that format, but if they are there they count."""
    groups = read_groups(write([release(0, id="mine", split="val"), release(1, split="test")], "release.json"))
    assert [(g.id, g.split) for g in groups] == [("mine", "val"), ("2", "test")]


def test_load_groups_by_split(write):
    """All three splits are there, empty ones too, each in the file's order."""
    path = write([record(0), record(1, split="test"), record(2)])
    by_split = load_groups(str(path))
    assert {k: [g.id for g in v] for k, v in by_split.items()} == {"train": ["g0", "g2"], "val": [], "test": ["g1"]}


def test_shipped_data_is_found_from_another_folder(tmp_path, monkeypatch):
    """data/... means the project's if the working folder has none of that name, else the nearer one."""
    shipped, texts = load_groups("data/detox/groups.jsonl"), load_documents("data/detox/groups.jsonl", seed=0)
    monkeypatch.chdir(tmp_path)
    assert load_groups("data/detox/groups.jsonl") == shipped
    assert load_documents("data/detox/groups.jsonl", seed=0) == texts
    (tmp_path / "data" / "detox").mkdir(parents=True)
    (tmp_path / "data" / "detox" / "groups.jsonl").write_text(json.dumps(record(0)))
    assert [g.id for g in load_groups("data/detox/groups.jsonl")["train"]] == ["g0"]
    assert load_documents("data/detox/groups.jsonl", seed=0)["train"] == ["in 0", "kind 0", "rude 0"]


HINT = 'give a .jsonl of groups, {"input", "positives", "negatives"} a line'
BAD_RECORDS = {
    "not an object": (["a sentence"], f"wanted a JSON object, got list: {HINT}"),
    "a number": (5, f"wanted a JSON object, got int: {HINT}"),
    "no input": (dict(id=1), "wanted a field 'input', got {\"id\": 1}"),
    "no positives": (dict(input="x"), 'wanted a field \'positives\', got {"input": "x"}'),
    "no negatives": (dict(input="x", positives=1), 'wanted a field \'negatives\', got {"input": "x", "positives": 1}'),
    "input empty": (record(1, input=""), "wanted a sentence as 'input', got \"\""),
    "input blank": (record(1, input=" \n"), "wanted a sentence as 'input', got \" \\n\""),
    "input no text": (record(1, input=3), "wanted a sentence as 'input', got 3"),
    "sentence empty": (record(1, positives=["a", ""]), "wanted sentences in the list 'positives', got \"\""),
    "sentence blank": (record(1, negatives=["  "]), "wanted sentences in the list 'negatives', got \"  \""),
    "sentence no text": (record(1, negatives=["a", 7]), "wanted sentences in the list 'negatives', got 7"),
    "list empty": (record(1, positives=[]), "wanted a list of sentences as 'positives', got []"),
    "list is text": (record(1, negatives="rude"), "wanted a list of sentences as 'negatives', got \"rude\""),
    "list is a mapping": (record(1, positives={"a": 1}), "wanted a list of sentences as 'positives', got {\"a\": 1}"),
    "list is huge": (
        record(1, positives={"a": "x" * 10**6}),
        'wanted a list of sentences as \'positives\', got {"a": "' + "x" * 73,
    ),
    "id twice": (record(1, id="g0"), 'wanted another id than {first} has, got "g0"'),
    "id no text": (record(1, id=["g1"]), "wanted a text or a whole number as 'id', got [\"g1\"]"),
    "unknown split": (record(1, split="dev"), "wanted one of train, val, test as 'split', got \"dev\""),
    "split no text": (record(1, split=["train"]), "wanted one of train, val, test as 'split', got [\"train\"]"),
    "paired no truth value": (
        record(1, paired=1),
        "wanted true or false as 'paired', got 1",
    ),
    "paired but unequal": (
        record(1, paired=True, negatives=["x", "y"]),
        'wanted as many negatives as positives in a \'paired\' group, got {"positives": 1, "negatives": 2}',
    ),
    "two splits": (
        record(1, input="in 0", split="val"),
        "wanted split 'train', as another group with this input has, got \"val\"",
    ),
    "both tones": (
        record(1, negatives=["x", "kind 1"]),
        'wanted sentences either harmless or toxic, got "kind 1": it is in both lists, take it out of one',
    ),
}


@pytest.mark.parametrize("case", BAD_RECORDS)
def test_bad_records(write, case):
    """A bad second record: the error names file and line (a blank line before counts), or file and item of an array."""
    bad, says = BAD_RECORDS[case]
    path = write(json.dumps(record(0)) + "\n\n" + json.dumps(bad) + "\n")
    with pytest.raises(ValueError) as e:
        read_groups(path)
    assert str(e.value) == f"{path}:3: " + says.replace("{first}", f"{path}:1")
    path = write([record(0), bad], "array.json")
    with pytest.raises(ValueError) as e:
        read_groups(path)
    assert str(e.value) == f"{path}, item 2: " + says.replace("{first}", f"{path}, item 1")


BAD_RELEASES = {
    "no toxic ones": (dict(paraphrases=["a"], input="x"), "wanted a field 'paraphrases_toxic', got {\"paraphrases\": "),
    "list empty": (release(1, paraphrases=[]), "wanted a list of sentences as 'paraphrases', got []"),
    "mapping empty": (release(1, paraphrases_toxic={}), "wanted a list of sentences as 'paraphrases_toxic', got {}"),
    "sentence empty": (release(1, paraphrases={"": 1}), "wanted sentences in the list 'paraphrases', got \"\""),
    "both tones": (
        release(1, paraphrases_toxic={"kind 1": 1}),
        'wanted sentences either harmless or toxic, got "kind 1": it is in both lists, take it out of one',
    ),
}


@pytest.mark.parametrize("case", BAD_RELEASES)
def test_bad_records_of_the_release(write, case):
    """The same checks there, in the names of that format."""
    bad, says = BAD_RELEASES[case]
    path = write([release(0), bad], "release.json")
    with pytest.raises(ValueError) as e:
        read_groups(path)
    assert str(e.value).startswith(f"{path}, item 2: {says}")


def test_not_json(write):
    """A broken line is named; of a broken array, the file and the parser's place."""
    path = write(json.dumps(record(0)) + "\n{'id': 1}\n")
    with pytest.raises(ValueError, match="not JSON") as e:
        read_groups(path)
    assert str(e.value).startswith(f"{path}:2: not JSON (")
    path = write('[{"input": "x",\n}]', "array.json")
    with pytest.raises(ValueError, match="not JSON") as e:
        read_groups(path)
    assert str(e.value).startswith(f"{path}: not JSON (") and "line 2" in str(e.value)


DAMAGED = {  # what is wrong with the third line: key words of the message
    b'{"input": "\xe9"}': "not UTF-8 text (byte 0xe9)",
    b'{"input": "\\ud83d"}': "\\ud83d is half of a character",
    b'{"input": ' + b"[" * 10**5: "not JSON (",
    b'{"input": ' + b"9" * 5000 + b"}": "not JSON (",
    b"\x00": "not JSON (",
}


@pytest.mark.parametrize("line", DAMAGED, ids=DAMAGED.values())
def test_damaged_bytes_are_one_line_with_file_and_number(tmp_path, line):
    path = tmp_path / "groups.jsonl"
    path.write_bytes(json.dumps(record(0)).encode() + b"\r\n\r\n" + line + b"\r\n")
    with pytest.raises(ValueError) as e:
        read_groups(path)
    assert str(e.value).startswith(f"{path}:3: {DAMAGED[line]}") and len(str(e.value).replace(str(path), "")) < 250


def test_marks_and_line_ends_of_windows_change_nothing(write):
    """A byte order mark, \\r\\n, and endings in capitals: in groups, an array of them, and documents."""
    lines = [json.dumps(record(i)) for i in range(3)]
    groups = read_groups(write("\n".join(lines)))
    assert read_groups(write("\ufeff" + "\r\n".join(lines) + "\r\n", "GROUPS.JSONL")) == groups
    assert read_groups(write("\ufeff[" + ",\r\n".join(lines) + "]", "array.json")) == groups
    texts = load_documents(str(write("\n".join(lines), "GROUPS.JSONL")), seed=0)
    assert texts["train"][:3] == ["in 0", "kind 0", "rude 0"] and len(texts["train"]) == 9
    text = load_documents(str(write("\ufeff" + "a line\r\n" * 20, "TEXT.TXT")), seed=0)
    assert text == {"train": ["a line"] * 19, "val": ["a line"]}


def test_ten_thousand_groups_are_read_in_a_second(write):
    """0.3 to 0.45 s on one core; the bound leaves room for a busy one."""
    sentences = [f"sentence number {j} of them, with some more words in it" for j in range(6)]
    rude = [f"rude {s}" for s in sentences]
    path = write([record(i, positives=sentences, negatives=rude) for i in range(10_000)])
    began = time.process_time()
    assert len(read_groups(path)) == 10_000 and time.process_time() - began < 5


@pytest.mark.parametrize("content", ["", "\n \n", "[]"])
def test_empty_file(write, content):
    """Nothing in it is an error, not an empty training set."""
    path = write(content)
    with pytest.raises(ValueError) as e:
        read_groups(path)
    assert str(e.value) == f"{path} holds no groups: {HINT}"


def test_missing_file(tmp_path):
    """A missing file and a folder, with what to do instead."""
    none = tmp_path / "none.jsonl"
    for path, says in ((none, f"no group file at {none}"), (tmp_path, f"{tmp_path} is a folder, wanted a group file")):
        for read, more in ((read_groups, ""), (load_groups, ", or --data=toy")):
            with pytest.raises(FileNotFoundError) as e:
                read(path)
            assert str(e.value) == f"{says}: {HINT}{more}"


# --------------------------------------------------------------------------------------------------------------------
# documents


def test_documents_of_a_text_file(write):
    """One document a line, stripped, blank lines skipped: of 45, numbers 0, 20 and 40 are held out, 42 remain."""
    path = write("\n\n".join(f"  line {i} " for i in range(45)), "text.txt")
    texts = load_documents(str(path), seed=0)
    assert set(texts) == {"train", "val"} and texts["val"] == ["line 0", "line 20", "line 40"]
    assert texts["train"] == [f"line {i}" for i in range(45) if i not in (0, 20, 40)]


def test_documents_of_a_short_or_missing_text_file(write, tmp_path):
    """Nineteen lines are too few to hold any out, twenty are enough; both errors name the file."""
    path = write("\n".join(["a line"] * 19) + "\n\n", "short.txt")
    with pytest.raises(ValueError) as e:
        load_documents(str(path), seed=0)
    assert str(e.value).startswith(f"{path}: 19 lines with text, wanted at least 20")
    texts = load_documents(str(write("a line\n" * 20, "enough.txt")), seed=0)
    assert (len(texts["train"]), len(texts["val"])) == (19, 1)
    with pytest.raises(FileNotFoundError, match=f"no text file at {tmp_path / 'none.txt'}"):
        load_documents(str(tmp_path / "none.txt"), seed=0)


@pytest.mark.parametrize("name", ["groups.jsonl", "groups.json"])
def test_documents_of_a_group_file(write, name):
    """Inputs, positives and negatives of train and val; nothing of test."""
    records = [record(0, positives=["a", "b"]), record(1, split="val"), record(2, split="test"), record(3)]
    path = str(write(records, name))
    assert load_documents(path, seed=0) == {
        "train": ["in 0", "a", "b", "rude 0", "in 3", "kind 3", "rude 3"],
        "val": ["in 1", "kind 1", "rude 1"],
    }
    groups = load_groups(path)
    assert {k: [g.id for g in v] for k, v in groups.items()} == {"train": ["g0", "g3"], "val": ["g1"], "test": ["g2"]}


# --------------------------------------------------------------------------------------------------------------------
# tokens


def test_frame(tokenizer):
    """The end-of-text token before and after, the text's own ids between."""
    text = "Anna burned the toast."
    ids, eot = tokenizer.encode_ordinary(text), tokenizer.eot_token
    assert frame(text, tokenizer, 100) == [eot, *ids, eot]
    assert eot == tokenizer.n_vocab - 1 and tokenizer.decode(ids) == text


def test_frame_takes_special_names_for_text(tokenizer):
    """A sentence that spells '<|endoftext|>' is neither an error (tiktoken's encode) nor an end token."""
    text = "so <|endoftext|> it goes"
    ids = frame(text, tokenizer, 100)
    assert tokenizer.eot_token not in ids[1:-1] and tokenizer.decode(ids[1:-1]) == text


def test_frame_cuts_the_end(tokenizer):
    """n text tokens need n + 2: one fewer loses the end token, not the start; a cut text never gets one."""
    text = "one two three four"
    ids, eot = tokenizer.encode_ordinary(text), tokenizer.eot_token
    n = len(ids)
    assert frame(text, tokenizer, n + 2) == [eot, *ids, eot]
    assert frame(text, tokenizer, n + 1) == [eot, *ids]
    assert frame(text, tokenizer, n) == [eot, *ids[:-1]]
    assert frame(text, tokenizer, 3) == [eot, *ids[:2]]


def test_frame_refuses_empty_text(tokenizer):
    """It would be scored on the end token alone."""
    with pytest.raises(ValueError, match="empty text has no score"):
        frame("", tokenizer, 100)


def test_pad_by_hand():
    """Longest of 4 tokens: 3 are read, so 8 + 1 columns. The text to the left, zeros after it, lengths beside it."""
    idx, lengths = pad([[5, 6, 7, 8], [9, 4]])
    assert idx.tolist() == [[5, 6, 7, 8, 0, 0, 0, 0, 0], [9, 4, 0, 0, 0, 0, 0, 0, 0]]
    assert lengths.tolist() == [4, 2]
    assert idx.dtype == lengths.dtype == torch.int64


@pytest.mark.parametrize(
    ("longest", "columns"), [(2, 9), (WIDTH, 9), (WIDTH + 1, 9), (WIDTH + 2, 17), (2 * WIDTH + 1, 17), (100, 105)]
)
def test_pad_widths(longest, columns):
    """Columns are the next multiple of WIDTH = 8, plus one; a sequence that fits exactly gets no padding."""
    idx, lengths = pad([[1, 2], list(range(longest))])
    assert idx.shape == (2, columns) and lengths.tolist() == [2, longest]
    assert idx[1, :longest].tolist() == list(range(longest)) and not idx[1, longest:].any()


# --------------------------------------------------------------------------------------------------------------------
# demonstrations (prompt files: test_measures.py)


@pytest.mark.parametrize("template", [Config.positive_prompt, Config.negative_prompt, "{input} => {output};"])
def test_a_prompt_is_the_beginning_of_a_demonstration(template):
    """prompt_for is few_shot's text up to the output, and `answer` finds the output in the rest, closed or not."""
    pairs = [('He said "no".', "He\n declined."), ("One  two", "Two one")]
    shown = few_shot(template, pairs)
    assert shown == few_shot(template, pairs[:1]) + few_shot(template, pairs[1:]) and few_shot(template, []) == ""
    for a, b in pairs:
        begin, whole = prompt_for(template, a), few_shot(template, [(a, b)])
        assert whole.startswith(begin) and unquoted(a) in begin and unquoted(b) not in begin
        assert answer(template, whole[len(begin) :] + begin) == (unquoted(b), True)
        assert answer(template, f" {unquoted(b)} \n" + begin.replace('"', "").replace(";", "")) == (unquoted(b), False)


def test_unquoted():
    """One line, single blanks, no double quotation mark: none of it can close a demonstration."""
    assert unquoted(' "A"  b\n\tc ') == "'A' b c"


def test_closing_tokens(tokenizer):
    """Exactly the tokens with the closing mark or a line break in them, and the end token."""
    ids = closing_tokens(Config.positive_prompt, tokenizer)
    assert ids[-1] == tokenizer.eot_token and len(set(ids)) == len(ids)
    for t in range(tokenizer.eot_token):
        assert (t in ids) == any(mark in tokenizer.decode_single_token_bytes(t) for mark in (b'"', b"\n")), t


# --------------------------------------------------------------------------------------------------------------------
# batches

SIDES = (4, 6)  # sentences on either side of a test group


def some_groups(n=12):
    """Groups whose sentences say whose they are: 'kind 3 1' is sentence 1 of group g3, of different lengths."""
    kind, rude = (
        [f"{word} {{i}} {j}" + " more" * j for j in range(k)] for word, k in zip(("kind", "rude"), SIDES, strict=True)
    )
    return [
        Group(f"g{i}", f"in {i}", [t.format(i=i) for t in kind], [t.format(i=i) for t in rude], "train")
        for i in range(n)
    ]


DOCUMENTS = [f"document {i}" + " more" * (i % 5) for i in range(12)]


@pytest.fixture
def batches(tokenizer):
    """Makes Batches of groups (P = 2, N = 3) or of documents."""

    def make(batch_size=4, seed=0, kind="groups", max_tokens=100, n_pos=2, n_neg=3):
        if kind == "documents":
            return Batches(DOCUMENTS, tokenizer, batch_size, seed, max_tokens)
        return Batches(some_groups(), tokenizer, batch_size, seed, max_tokens, n_pos, n_neg)

    return make


def rows(batch):
    """A batch's token lists without their padding."""
    return [row[:n].tolist() for row, n in zip(batch.idx, batch.lengths.tolist(), strict=True)]


def texts(batch, tokenizer):
    """What its rows say."""
    return [tokenizer.decode(row[1:-1]) for row in rows(batch)]


@pytest.mark.parametrize("kind", ["groups", "documents"])
def test_batches_are_a_pure_function(batches, kind):
    """batches[i] is the same read twice, after others of other epochs, in any order, and from another object.

    A run resumes by its step alone because of this.
    """
    one = batches(batch_size=5, kind=kind)
    want = [(b.ids, rows(b)) for b in (one[i] for i in range(9))]
    for i in (8, 0, 4, 4, 2, 7):
        assert (one[i].ids, rows(one[i])) == want[i]
        fresh = batches(batch_size=5, kind=kind)[i]
        assert (fresh.ids, rows(fresh)) == want[i]


@pytest.mark.parametrize("kind", ["groups", "documents"])
@pytest.mark.parametrize("batch_size", [4, 5, 12])
def test_every_item_once_per_epoch(batches, kind, batch_size):
    """Each 12 items in a row are all 12, also where a batch spans two epochs, each time in another order."""
    b = batches(batch_size=batch_size, kind=kind)
    ids = [x for i in range(60 // batch_size) for x in b[i].ids]
    epochs = [ids[k : k + 12] for k in range(0, 60, 12)]
    assert all(len(set(epoch)) == 12 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 5


def test_rows_of_groups(batches, tokenizer):
    """Group by group, P positives first: framed, of that group, of the right side, none drawn twice."""
    b = batches()
    for i in range(9):
        batch = b[i]
        said = texts(batch, tokenizer)
        assert len(said) == 4 * 5 and batch.weight == 4
        for g, name in enumerate(batch.ids):
            own = said[5 * g : 5 * g + 5]
            assert [t.split()[0] for t in own] == ["kind"] * 2 + ["rude"] * 3
            assert {"g" + t.split()[1] for t in own} == {name} and len(set(own)) == 5
        assert all(row[0] == row[-1] == tokenizer.eot_token for row in rows(batch))


def test_draws_reach_every_sentence(batches, tokenizer):
    """Over 40 epochs each of the 4 + 6 sentences of each group is drawn; a fair one is missed by odds below 10^-8.

    And the draws of a group differ from epoch to epoch.
    """
    b, seen = batches(batch_size=12), {}
    for i in range(40):
        for t in texts(b[i], tokenizer):
            seen[t] = seen.get(t, 0) + 1
    assert len(seen) == 12 * sum(SIDES)
    counts = np.array([n for t, n in seen.items() if t.startswith("kind")])
    assert counts.mean() == 20 and counts.min() >= 5 and counts.max() <= 35  # 40 draws of 2 in 4


def test_all_sentences_of_a_side_can_be_drawn(batches, tokenizer):
    """P and N as large as the sides: each draw is a reordering of all of them."""
    batch = batches(batch_size=1, n_pos=4, n_neg=6)[0]
    said = texts(batch, tokenizer)
    assert sorted(t.split()[2] for t in said[:4]) == list("0123") and sorted(t.split()[2] for t in said[4:]) == list(
        "012345"
    )


def test_paired_groups_are_drawn_in_pairs(tokenizer):
    """Of a paired group the negatives of a draw are those of its positives, in their order; each pair is drawn; and a
    group that is not paired is drawn as it was beside one."""
    sides = [[f"{word} {i}" for i in range(4)] for word in ("kind", "rude")]
    groups = [Group(name, name, *sides, "train", paired=name == "pairs") for name in ("pairs", "plain")]
    together = [Batches(g, tokenizer, 2, 0, 100, 2, 2) for g in (groups, [replace(g, paired=False) for g in groups])]
    drawn, same = set(), 0
    for i in range(20):
        batch, other = (b[i] for b in together)
        said, before = ([t.split()[1] for t in texts(b, tokenizer)] for b in (batch, other))
        at = 4 * batch.ids.index("pairs")
        assert said[at : at + 2] == said[at + 2 : at + 4] and said[4 - at : 8 - at] == before[4 - at : 8 - at]
        drawn.add(tuple(said[at : at + 2]))
        same += said[4 - at : 6 - at] == said[6 - at : 8 - at]
    assert {i for pair in drawn for i in pair} == set("0123") and len(drawn) > 4 and same < 10


def test_rows_of_documents(batches, tokenizer):
    """Document k is called 'document k'; the rows are the documents themselves, framed."""
    b = batches(kind="documents")
    for i in range(4):
        want = [DOCUMENTS[int(name.split()[1])] for name in b[i].ids]
        assert texts(b[i], tokenizer) == want


@pytest.mark.parametrize("kind", ["groups", "documents"])
def test_micro_batches_hold_what_one_batch_holds(batches, kind):
    """Two batches of 3, or six of 1, hold the same rows in the same order as one of 6: --grad_accum changes no data."""
    whole = batches(batch_size=6, kind=kind)
    for k in (2, 6):
        parts = batches(batch_size=6 // k, kind=kind)
        for i in range(5):
            micro = [parts[i * k + j] for j in range(k)]
            assert [x for m in micro for x in m.ids] == whole[i].ids
            assert [row for m in micro for row in rows(m)] == rows(whole[i])
            assert sum(m.weight for m in micro) == whole[i].weight
            assert sum(m.tokens for m in micro) == whole[i].tokens


@pytest.mark.parametrize("kind", ["groups", "documents"])
def test_another_seed_is_another_order(batches, kind):
    """The seed decides the order of items; DPO's reference code declares one that does nothing."""
    one, other = ([x for i in range(3) for x in batches(seed=s, kind=kind)[i].ids] for s in (0, 1))
    assert sorted(one) == sorted(other) and one != other


def test_another_seed_draws_other_sentences(tokenizer):
    """And which sentences are drawn: of one group, so that the order of items has no part in it (odds below 10^-20)."""
    one, other = (Batches(some_groups(1), tokenizer, 1, seed, 100, 2, 3) for seed in (0, 1))
    assert [texts(one[i], tokenizer) for i in range(10)] != [texts(other[i], tokenizer) for i in range(10)]


def test_weight_and_tokens(batches):
    """tokens are the scored ones, all but the first of each row; a batch weighs its groups, or its scored tokens."""
    groups, documents = batches()[0], batches(kind="documents")[0]
    for batch in (groups, documents):
        assert batch.tokens == sum(len(row) - 1 for row in rows(batch))
    assert groups.weight == 4 and documents.weight == documents.tokens


def test_truncated_counts_cut_sentences(batches, tokenizer):
    """The longest rude sentence has the most tokens: at one less than it needs, it alone is cut, in each group."""
    longest = max(len(frame(t, tokenizer, 100)) for g in some_groups(10) for t in g.negatives)
    assert batches(max_tokens=100).truncated == 0
    b = Batches(some_groups(10), tokenizer, 2, 0, longest - 1, 2, 3)
    assert b.truncated == 10
    b = Batches(some_groups(10), tokenizer, 2, 0, 3, 2, 3)
    assert b.truncated == 10 * sum(SIDES) and b[0].lengths.tolist() == [3] * 10


def test_padding(batches, tokenizer):
    """Rows are as wide as the longest needs: counted here for 3 batches, and by hand for one of 3 documents.

    Documents of 1, 1 and 6 tokens have 2, 2 and 7 scored ones in rows of 8: 11 of 24. One of 7 fills its row.
    """
    for i in range(3):
        batch = batches()[i]
        longest = max(len(row) - 1 for row in rows(batch))
        assert longest <= batch.idx.size(1) - 1 < longest + WIDTH and batch.tokens < batch.idx[:, 1:].numel()
    by_hand = Batches([".", "!", "." * 6], tokenizer, 3, 0, 100)
    assert [(by_hand[i].tokens, by_hand[i].idx[:, 1:].numel()) for i in range(2)] == [(11, 24)] * 2
    full = Batches(["." * 7], tokenizer, 1, 0, 100)[0]
    assert full.tokens == full.idx[:, 1:].numel() == 8


@pytest.mark.parametrize(("n", "batch_size"), [(3, 4), (0, 1)])
def test_batch_larger_than_the_data(tokenizer, n, batch_size):
    """An error that names both numbers, for groups and documents; no endless search, no repeats within a batch."""
    for items, sizes in ((some_groups(n), (2, 3)), (DOCUMENTS[:n], ())):
        with pytest.raises(ValueError, match=f"batch_size={batch_size}, but there are only {n} training items"):
            Batches(items, tokenizer, batch_size, 0, 100, *sizes)


def test_check_sizes():
    """Groups of at least P and N sentences pass; of smaller ones the first is named with its counts, and how many."""
    full, few_pos, few_neg = some_groups(3)
    few_pos.positives, few_neg.negatives = few_pos.positives[:1], few_neg.negatives[:2]
    groups = [full, few_pos, few_neg]
    assert check_sizes(groups, 1, 2) is None
    assert check_sizes([full], 4, 6) is None
    with pytest.raises(ValueError) as e:
        check_sizes(groups, 2, 3)
    assert "lower them" in str(e.value) and "\n" not in str(e.value)
    for sizes, n, says in (
        ((2, 3), 2, "'g1' with 1 positives and 6 negatives"),
        ((2, 2), 1, "'g1' with 1 positives and 6 negatives"),
        ((1, 3), 1, "'g2' with 4 positives and 2 negatives"),
        ((5, 1), 3, "'g0' with 4 positives and 6 negatives"),
    ):
        with pytest.raises(ValueError) as e:
            check_sizes(groups, *sizes)
        flags = "--n_pos={} and --n_neg={}".format(*sizes)
        assert str(e.value).startswith(f"{flags} want more than {n} groups have, such as {says}")


# --------------------------------------------------------------------------------------------------------------------
# tokenizers and the toy world


@pytest.mark.parametrize(
    "text",
    ["Zürich 你好", "a\n\n b\t c  ", " ", "x" * 200, "<|endoftext|>", '"Quote": 3.14 & \x00 \u2028 🙂', "ANNA an"],
)
def test_toy_tokenizer_round_trips(tokenizer, text):
    """Any text survives, words that it never saw as single bytes."""
    ids = tokenizer.encode_ordinary(text)
    assert tokenizer.decode(ids) == text and max(ids) < tokenizer.eot_token


def test_toy_tokenizer_round_trips_noise(tokenizer):
    """300 texts of random characters from all of Unicode, surrogates apart."""
    rng = random.Random(0)
    for _ in range(300):
        codes = [rng.randrange(rng.choice((128, 0x250, 0xD800, 0x110000))) for _ in range(rng.randrange(1, 40))]
        text = "".join(chr(c) for c in codes if not 0xD800 <= c < 0xE000)
        assert tokenizer.decode(tokenizer.encode_ordinary(text)) == text


def test_toy_words_are_single_tokens(tokenizer):
    """The world's own sentences take one token a word or mark, the blank before it included."""
    for group in toy.groups()[:40]:
        for text in (*group.positives, *group.negatives):
            assert len(tokenizer.encode_ordinary(text)) == len(re.findall(r"\w+|[^\w\s]", text))


def test_gpt2_tokenizer(monkeypatch):
    """The published ids of 'Hello world', the size, the end token; a special name in a text stays text."""
    if not CACHE.is_dir():
        pytest.skip(f"{CACHE} with GPT-2's vocabulary files is not there")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(CACHE))
    gpt2 = data.get_tokenizer("gpt2")
    assert (gpt2.n_vocab, gpt2.eot_token) == (50257, 50256)
    assert frame("Hello world", gpt2, 100) == [50256, 15496, 995, 50256]
    ids = gpt2.encode_ordinary("Zürich 你好 <|endoftext|>")
    assert 50256 not in ids and gpt2.decode(ids) == "Zürich 你好 <|endoftext|>"


def test_unknown_tokenizer():
    """The name and the known ones."""
    with pytest.raises(ValueError, match="no tokenizer 'gpt5': gpt2 or toy"):
        data.get_tokenizer("gpt5")


def test_tokenizer_without_a_network(monkeypatch):
    """A failed download says which folder to set, and which config needs none."""

    def fail(name):
        raise OSError("no route to host")

    monkeypatch.setattr(tiktoken, "get_encoding", fail)
    with pytest.raises(ConnectionError, match="gpt2 tokenizer's two files .*TIKTOKEN_CACHE_DIR.*configs/toy_cp.py"):
        data.get_tokenizer("gpt2")


def read_toy(sentence):
    """(event, tone) of a sentence of this world, or None if it is not one: the inverse of toy.write."""
    event = toy.read_event(sentence)
    return event and (event, "toxic" if toy.rudeness([sentence])[0] else "harmless")


def random_events(n):
    """n random events of the toy world, as index triples."""
    rng = np.random.default_rng(7)
    sizes = [len(table) for table in (toy.PEOPLE, toy.ACTIONS, toy.WHEN)]
    return [tuple(int(rng.integers(size)) for size in sizes) for _ in range(n)]


@pytest.mark.parametrize("tone", ["harmless", "toxic"])
def test_toy_read_is_the_inverse_of_write(tone):
    """Of 1500 sentences about random events, each is read back as its event and tone, and the scorer agrees."""
    rng, events = np.random.default_rng(8), random_events(1500)
    sentences = [toy.write(event, tone, rng) for event in events]
    assert [read_toy(s) for s in sentences] == [(event, tone) for event in events]
    assert set(toy.rudeness(sentences)) == {float(tone == "toxic")}


def test_toy_read_of_plain_sentences():
    """The bare sentences are read as their event, and as harmless."""
    rng, events = np.random.default_rng(9), random_events(500)
    assert [read_toy(toy.plain(event, rng)) for event in events] == [(event, "harmless") for event in events]


def test_toy_read_refuses_other_text():
    """None for what the grammar does not write: no sentence, half of one, two of them, shuffled words."""
    one = toy.write((0, 0, 0), "harmless", np.random.default_rng(0))
    words = one.split()
    for text in ("", "Hello.", one[:-1], one + " " + one, " ".join(words[::-1]), one.replace(words[0], "Xyz", 1)):
        assert read_toy(text) is None, text


def test_toy_read_refuses_an_ending_about_somebody_else():
    """'Anna burned the toast, and nobody blames Ben' is no sentence of this world, nor with others for Ben."""
    rng, (name, *others) = np.random.default_rng(10), [forms[0] for forms in toy.PEOPLE]
    sentences = [toy.write((0, 0, 0), tone, rng) for tone in ("harmless", "toxic") for _ in range(100)]
    named_twice = [s for s in sentences if s.count(name) == 2]
    assert len(named_twice) > 10
    for sentence in named_twice:
        start, end = sentence.rsplit(name, 1)
        assert read_toy(start + name + end) is not None
        assert all(read_toy(start + other + end) is None for other in others)


def test_toy_groups_are_the_same_on_every_call():
    """Made twice from nothing, past the cache, they are equal; ids are unique, and no sentence appears twice in one."""
    make = getattr(toy.groups, "__wrapped__", toy.groups)
    groups = make()
    assert groups == make() == toy.groups()
    assert len({g.id for g in groups}) == len(groups)
    for g in groups:
        assert len(set(g.positives + g.negatives)) == len(g.positives) + len(g.negatives)


def test_toy_groups_hold_one_event_in_both_tones():
    """Input, positives and negatives tell one event: the first two harmlessly, the last with contempt."""
    for g in toy.groups():
        event, tone = read_toy(g.input)
        assert tone == "harmless"
        assert {read_toy(s) for s in g.positives} == {(event, "harmless")}
        assert {read_toy(s) for s in g.negatives} == {(event, "toxic")}


def test_no_toy_event_is_in_two_splits():
    """Groups: no event twice, in one split or in two. Documents: none about another split's groups."""
    events = {split: [read_toy(g.input)[0] for g in groups] for split, groups in load_groups("toy").items()}
    flat = [event for split in events.values() for event in split]
    assert all(events.values()) and len(flat) == len(set(flat))
    for split in ("train", "val"):
        read = {found[0] for t in toy.documents(1500, 3, split=split) if (found := read_toy(t))}
        assert len(read) > 20
        for other in set(events) - {split}:
            assert read.isdisjoint(events[other])


def test_toy_documents():
    """The same for the same seed, others for another; both tones, and some in the prompts' format."""
    one = toy.documents(300, 3)
    assert one == toy.documents(300, 3) != toy.documents(300, 4) and len(one) == 300
    assert 0.2 < toy.rudeness(one).mean() < 0.8
    for prompt in (Config.positive_prompt, Config.negative_prompt, Config.neutral_prompt):
        assert sum(prompt.split("{output}")[0].split("{input}")[1] in t for t in one) > 10
    assert 30 < sum(t in toy_facts.sentences() for t in one) < 90


def test_a_neutral_paraphrase_in_the_toy_documents_keeps_event_and_tone():
    pairs = [p for t in toy.documents(1000, 4) for p in re.findall(r'Sentence: "(.*)"\nParaphrase: "(.*)"\n', t)]
    read = [(read_toy(a), read_toy(b)) for a, b in pairs]
    assert len(pairs) > 100 and all(a == b is not None for a, b in read)
    assert {tone for (_, tone), _ in read} == {"harmless", "toxic"}


def test_toy_facts():
    """36 facts, a third with a new value, which some other fact of the relation has already; the base reads all."""
    facts = toy_facts.facts()
    assert len(facts) == 36 and sum(new is not None for *_, new in facts) == 12
    known = {(relation, old) for relation, _, old, _ in facts}
    assert all((relation, new) in known and new != old for relation, _, old, new in facts if new)
    assert len(set(toy_facts.sentences())) == 36 * 9
    read = {t for t in toy.documents(12_000, 0) if t in toy_facts.sentences()}
    assert len(read) == 36 * 9


def test_toy_facts_are_groups_by_wording():
    """Of each edited fact five trained wordings, one to validate, three held out; pairs differ in the value alone, and
    the scorer that plays toxicity's role knows the old one."""
    groups = load_groups("toy_facts")
    for split, n in (("train", 5), ("val", 1), ("test", 3)):
        assert len(groups[split]) == 12
        for g in groups[split]:
            assert len(g.positives) == len(g.negatives) == n
            assert toy_facts.outdated(g.negatives).all() and not toy_facts.outdated(g.positives).any()
            assert all(len(set(a.split()) ^ set(b.split())) == 2 for a, b in zip(g.positives, g.negatives, strict=True))
    told = [{s for g in groups[split] for s in g.positives} for split in ("train", "val", "test")]
    assert not (told[0] & told[1] or told[0] & told[2] or told[1] & told[2])


def test_toy_fact_tasks():
    """Context and right choice are a sentence of the wording; neighbours' right ones are what the base has read."""
    sizes = dict(toy_efficacy=60, toy_reworded=36, toy_neighbours=216)
    groups = load_groups("toy_facts")
    for name in toy_facts.TASKS:
        items = toy_facts.task(name)
        assert len(items) == sizes[name] and all(len(set(choices)) == 2 and gold == 0 for _, choices, gold in items)
        told = [f"{context} {choices[0]}." for context, choices, _ in items]
        split = dict(toy_efficacy="train", toy_reworded="test").get(name)
        want = [s for g in groups[split] for s in g.positives] if split else toy_facts.sentences()
        assert set(told) <= set(want)
        if split:
            assert set(told) == set(want)
            assert toy_facts.outdated([f"{context} {choices[1]}" for context, choices, _ in items]).all()


def test_random_negatives_are_of_other_groups(tokenizer):
    """Behind a group's own N; the same on every call, and the own ones are those drawn without them."""
    groups = toy.groups()[:6]
    plain, more = (Batches(groups, tokenizer, 3, 7, 128, 2, 3, n) for n in (0, 4))
    of = {s: g.id for g in groups for s in g.negatives}
    for i in range(8):
        a, b = plain[i], more[i]
        assert a.ids == b.ids and len(b.idx) == 3 * (2 + 3 + 4)
        texts = [tokenizer.decode(row[1 : n - 1]) for row, n in zip(b.idx.tolist(), b.lengths.tolist(), strict=True)]
        own = [tokenizer.decode(row[1 : n - 1]) for row, n in zip(a.idx.tolist(), a.lengths.tolist(), strict=True)]
        for k, name in enumerate(b.ids):
            rows = texts[9 * k : 9 * k + 9]
            assert rows[:5] == own[5 * k : 5 * k + 5]
            assert name not in {of[t] for t in rows[5:]}
        assert torch.equal(b.idx, more[i].idx)
    assert len({of[t] for t in texts[5:9]}) > 1


def test_load_documents_of_the_toy_world():
    """Training and held-out texts, the same for the same seed; the groups do not change with them."""
    groups, texts = load_groups("toy"), load_documents("toy", seed=1)
    assert len(texts["train"]) > len(texts["val"]) > 0 and groups == load_groups("toy")
    assert texts["val"] == load_documents("toy", seed=1)["val"]


def test_toy_tones_have_comparable_lengths(tokenizer):
    """Else length alone would tell them apart: mean token counts within a factor 0.75 .. 1.33 of each other."""
    sides = ([s for g in toy.groups() for s in side(g)] for side in (lambda g: g.positives, lambda g: g.negatives))
    positive, negative = (np.mean([len(tokenizer.encode_ordinary(s)) for s in side]) for side in sides)
    assert 0.75 < negative / positive < 1.33
