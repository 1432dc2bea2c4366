"""measures/ without a model: statistics against slow loops, tables, published forms on made-up files."""

import io
import itertools
import json
import math
import re
import time
import zipfile
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import data
from configs import Config
from data import prompts
from measures import Setup, report, samples, statistics, tasks, texts

SHARED = Path(__file__).resolve().parents[2] / "shared"
NAN = math.nan


@pytest.fixture(scope="module")
def tokenizer():
    return data.get_tokenizer("toy")


@pytest.fixture
def write(tmp_path):
    """Writes a file and returns its path: text as it is, a list of records as JSON lines."""

    def to(content, name="file.jsonl"):
        if not isinstance(content, str):
            content = "".join(json.dumps(record) + "\n" for record in content)
        (tmp_path / name).write_text(content, encoding="utf-8")
        return tmp_path / name

    return to


# --------------------------------------------------------------------------------------------------------------------
# numbers from texts


def test_dist_n_by_hand():
    """Distinct n-grams of all texts together; the words are the denominator of every n; none runs across two texts."""
    texts = ["a b a b", "b c"]  # a b c of 6 words; ab ba bc; aba bab
    assert [statistics.dist_n(texts, n) for n in (1, 2, 3)] == pytest.approx([3 / 6, 3 / 6, 2 / 6])
    assert statistics.dist_n(["a b a b"] * 25, 2) == pytest.approx(2 / 100)
    assert statistics.dist_n(["a b", "c d"], 2) == pytest.approx(2 / 4)  # b c is none
    assert statistics.dist_n(["a"], 2) == 0


def distinctness(texts):
    """DExperts' evaluate_generations.py in plain words: split at blanks, so that no text or two blanks make ''."""
    words = [text.split(" ") for text in texts]
    total = sum(len(w) for w in words)
    one, two, three = set(), set(), set()
    for w in words:
        one |= set(w)
        two |= {(w[i], w[i + 1]) for i in range(len(w) - 1)}
        three |= {(w[i], w[i + 1], w[i + 2]) for i in range(len(w) - 2)}
    return [len(one) / total, len(two) / total, len(three) / total]


@pytest.mark.parametrize(
    "texts", [[""], ["", ""], ["a b c", ""], [" a  b", "a b\nc"], ["x"], ["a b c d e", "a b c d e", "e d c b a"]]
)
def test_dist_n_counts_empty_texts_and_words_as_dexperts(texts):
    assert [statistics.dist_n(texts, n) for n in (1, 2, 3)] == pytest.approx(distinctness(texts))


def test_dist_1_of_an_empty_text_by_hand():
    """One word, the empty one: 1 / 1. Beside three words: 4 distinct of 4."""
    assert statistics.dist_n([""], 1) == 1 and statistics.dist_n([""], 2) == 0
    assert statistics.dist_n(["a b a", ""], 1) == pytest.approx(3 / 4)


def test_repetition_by_hand():
    """seq-rep-4 over words: 1 - distinct / all; fewer than four words have none, and count nowhere."""
    assert statistics.repetition("a b c d") == 0
    assert statistics.repetition("a a a a a a") == pytest.approx(1 - 1 / 3)
    assert statistics.repetition("a b c d a  b\nc d") == pytest.approx(1 - 4 / 5)
    assert math.isnan(statistics.repetition("a b c")) and math.isnan(statistics.repetition(""))


def slow_lcs(a, b):
    """Longest common subsequence of two lists, from its definition: try all subsequences of the shorter one."""
    a, b = sorted((a, b), key=len)
    for n in range(len(a), 0, -1):
        for some in itertools.combinations(a, n):
            rest = iter(b)
            if all(any(x == y for y in rest) for x in some):
                return n
    return 0


def test_rouge_l_against_all_subsequences():
    rng = np.random.default_rng(0)
    for _ in range(150):
        a, b = (list(rng.choice(list("abcd"), size=rng.integers(1, 9))) for _ in "xx")
        n = slow_lcs(a, b)
        precision, recall = n / len(b), n / len(a)
        f1 = 2 * precision * recall / (precision + recall) if n else 0
        assert statistics.rouge_l(" ".join(a), " ".join(b)) == pytest.approx(f1), (a, b)


def test_rouge_l_of_words():
    """Case and marks do not count; the published example (Lin 2004); nothing in common, or nothing at all, is 0."""
    assert statistics.rouge_l("The CAT, sat!", "the cat sat") == 1
    assert statistics.rouge_l("police killed the gunman", "police kill the gunman") == pytest.approx(0.75)
    assert statistics.rouge_l("police killed the gunman", "the gunman kill police") == pytest.approx(0.5)
    assert statistics.rouge_l("a b", "c d") == statistics.rouge_l("", "a") == statistics.rouge_l("a", "...") == 0


# --------------------------------------------------------------------------------------------------------------------
# statistics


def test_mean_and_median_leave_nan_out():
    v = np.array([3.0, NAN, 1.0, 8.0])
    assert statistics.mean(v) == 4 and statistics.median(v) == 3
    assert statistics.mean(np.array([[1.0, NAN], [NAN, 2.0]])) == 1.5  # over all values, not over row means
    for of in (statistics.mean, statistics.median):
        assert math.isnan(of(np.array([NAN, NAN])))


def test_pooled_sums_before_it_divides():
    """Rows (total, count): a long text counts more than a short one."""
    v = np.array([[2.0, 1.0], [1.0, 9.0]])
    assert statistics.pooled_mean(v) == pytest.approx(0.3)
    assert statistics.pooled_ppl(v) == pytest.approx(math.exp(0.3))
    assert statistics.exp_mean(np.array([1.0, 3.0])) == pytest.approx(math.exp(2))
    assert statistics.pooled_ppl(np.array([[1e6, 1.0]])) == math.inf


def test_toxicity_statistics_against_loops():
    """Share and mean over scores; over rows the largest score, and whether it is above 0.5. nan is no score."""
    rng = np.random.default_rng(1)
    v = rng.random((30, 4)).round(1)
    v[rng.random(v.shape) < 0.3] = NAN
    v[3], v[7] = NAN, 0.5  # no score at all; exactly 0.5 is not toxic
    rows = [[x for x in row if not math.isnan(x)] for row in v.tolist()]
    flat, tops = [x for row in rows for x in row], [max(row) for row in rows if row]
    assert len(tops) < 30
    assert statistics.share_toxic(v) == pytest.approx(sum(x > 0.5 for x in flat) / len(flat))
    assert statistics.mean(v) == pytest.approx(sum(flat) / len(flat))
    assert statistics.mean_of_max(v) == pytest.approx(sum(tops) / len(tops))
    assert statistics.share_with_toxic(v) == pytest.approx(sum(t > 0.5 for t in tops) / len(tops))


def test_no_score_at_all_is_nan_never_zero():
    v = np.full((3, 2), NAN)
    for of in (statistics.share_toxic, statistics.mean_of_max, statistics.share_with_toxic, statistics.mean):
        assert math.isnan(of(v))


def test_word_salad_is_left_out_and_counted():
    """DExperts: perplexities of 10,000 and more are no part of the mean."""
    v = np.array([[10.0, 1e4], [30.0, math.inf]])
    assert statistics.mean_below_salad(v) == 20 and statistics.share_salad(v) == 0.5
    assert math.isnan(statistics.mean_below_salad(np.array([2e4]))) and statistics.share_salad(np.array([9999.9])) == 0


def slow_auc(low, high):
    return np.mean([(b > a) + 0.5 * (b == a) for a in low for b in high])


def test_auc_against_all_pairs_with_ties():
    rng = np.random.default_rng(2)
    for _ in range(50):
        low, high = (rng.integers(0, 6, size=rng.integers(1, 12)) / 2 for _ in "xx")
        assert statistics.pair_auc(low, high) == pytest.approx(slow_auc(low, high))
    assert math.isnan(statistics.pair_auc(np.array([]), np.array([1.0])))
    assert math.isnan(statistics.pair_auc(np.array([1.0]), np.array([])))


def test_auc_of_groups_leaves_padding_out():
    """(G, n, 2): positives and negatives of each group, nan behind the shorter side; pairs of all groups."""
    rng = np.random.default_rng(3)
    v = rng.integers(0, 5, size=(6, 4, 2)).astype(float)
    v[1, 2:, 0] = v[4, 1:, 1] = NAN
    low, high = ([x for x in v[..., i].ravel() if not math.isnan(x)] for i in (0, 1))
    assert len(low) == 22 and len(high) == 21
    assert statistics.auc(v) == pytest.approx(slow_auc(low, high))


# --------------------------------------------------------------------------------------------------------------------
# bootstrap


def test_bootstrap_of_a_model_and_itself_is_zero():
    """Paired: the same rows are drawn from both, so that nothing but the difference varies."""
    rows = np.random.default_rng(0).normal(size=(20, 3))
    for of in (statistics.mean, statistics.median, statistics.mean_of_max):
        assert statistics.bootstrap(rows, rows.copy(), of, 0) == [0, 0]
    low, high = statistics.bootstrap(rows, rows + 0.25, statistics.mean, 0)
    assert low == pytest.approx(0.25) and high == pytest.approx(0.25)


def test_bootstrap_is_tuned_minus_base_and_reproducible():
    rng = np.random.default_rng(1)
    base, tuned = rng.normal(0, 1, 50), rng.normal(3, 1, 50)
    low, high = statistics.bootstrap(base, tuned, statistics.mean, 5)
    assert 2 < low < tuned.mean() - base.mean() < high < 4
    assert statistics.bootstrap(base, tuned, statistics.mean, 5) == [low, high]
    assert statistics.bootstrap(base, tuned, statistics.mean, 6) != [low, high]
    assert statistics.bootstrap(tuned, base, statistics.mean, 5) == pytest.approx([-high, -low])


def test_bootstrap_covers_the_truth_in_19_of_20_cases(monkeypatch):
    """150 samples of 40 pairs with a known mean difference. Unpaired intervals would be three times as wide."""
    monkeypatch.setattr(statistics, "RESAMPLES", 200)
    rng, hits, widths = np.random.default_rng(4), 0, []
    for seed in range(150):
        base = rng.normal(0, 3, 40)
        tuned = base + rng.normal(0.5, 1, 40)
        low, high = statistics.bootstrap(base, tuned, lambda v: v.mean(), seed)
        hits += low <= 0.5 <= high
        widths.append(high - low)
    assert 0.86 <= hits / 150 <= 0.99
    assert np.mean(widths) == pytest.approx(2 * 1.96 / math.sqrt(40), rel=0.15)


def test_bootstrap_draws_rows_not_values():
    """Ten rows of 100 equal values are ten observations: the interval is that of ten."""
    rows = np.random.default_rng(5).normal(size=(10, 1))
    zero = np.zeros((10, 100))
    assert statistics.bootstrap(zero, np.repeat(rows, 100, 1), statistics.mean, 0) == pytest.approx(
        statistics.bootstrap(zero[:, :1], rows, statistics.mean, 0)
    )


def test_bootstrap_of_missing_values():
    """Resamples without a value do not count; none with one leave [nan, nan], never [0, 0]."""
    some = np.array([1.0, NAN])
    assert statistics.bootstrap(some, some + 1, statistics.mean, 0) == pytest.approx([1, 1])
    assert all(map(math.isnan, statistics.bootstrap(some * NAN, some, statistics.mean, 0)))


def two_by_two(v):
    """{(first says toxic, second says toxic): texts} of score pairs, their contingency table, by a plain loop."""
    cells = dict.fromkeys(itertools.product((True, False), repeat=2), 0)
    for a, b in v.reshape(-1, 2).tolist():
        if not (math.isnan(a) or math.isnan(b)):
            cells[a > 0.5, b > 0.5] += 1
    return cells


def literal_kappa(v):
    """Cohen 1960 in whole numbers, off the margins of the table: (n d - e) / (n n - e), where d texts lie on its
    diagonal and e = sum of row total times column total."""
    cells = two_by_two(v)
    n, d = sum(cells.values()), cells[True, True] + cells[False, False]
    e = sum(
        sum(c for (a, _), c in cells.items() if a == which) * sum(c for (_, b), c in cells.items() if b == which)
        for which in (True, False)
    )
    return Fraction(n * d - e, n * n - e) if n * n != e else NAN


def pairs(cells):
    """Score pairs of {(first, second): texts}, rows of one."""
    rows = [[(a, b)] for (a, b), n in cells.items() for _ in range(n)]
    return np.array(rows, dtype=float).reshape(-1, 1, 2)


def test_agreement_and_kappa_by_hand():
    """20 + 15 of 50 texts alike, toxic to the first in 25 and to the second in 30: 0.7, where 0.5 comes by chance."""
    v = pairs({(0.9, 0.8): 20, (0.6, 0.5): 5, (0.5, 0.51): 10, (0.0, 0.1): 15})  # 0.5 is not toxic
    assert statistics.agreement(v) == pytest.approx(0.7) and statistics.cohens_kappa(v) == pytest.approx(0.4)
    assert statistics.cohens_kappa(pairs({(1, 0): 3, (0, 1): 3})) == pytest.approx(-1)
    assert statistics.cohens_kappa(pairs({(1, 1): 3, (0, 0): 4})) == pytest.approx(1)


@pytest.mark.parametrize("shape", [(40, 1, 2), (7, 5, 2), (3, 1, 2)])
def test_agreement_and_kappa_are_those_of_the_table(shape):
    """Of scores that lean to one side, depend on each other, and lack some on either side."""
    rng, defined = np.random.default_rng(0), 0
    for _ in range(60):
        v = rng.random(shape) ** rng.uniform(0.2, 3)
        v[..., 1] = np.where(rng.random(shape[:-1]) < 0.5, v[..., 0], v[..., 1])
        v[rng.random(shape) < 0.2] = NAN
        cells, kappa = two_by_two(v), literal_kappa(v)
        n = sum(cells.values())
        share = (cells[True, True] + cells[False, False]) / n if n else NAN
        assert statistics.agreement(v) == pytest.approx(share, nan_ok=True)
        assert statistics.cohens_kappa(v) == pytest.approx(float(kappa), nan_ok=True)
        defined += kappa == kappa
    assert defined > 20


def test_nothing_to_agree_on_has_no_kappa():
    """Both call every text harmless, or toxic: agreement is whole and says nothing. Without texts, neither is there."""
    for v in (pairs({(0.1, 0.2): 9}), pairs({(0.9, 0.8): 9})):
        assert statistics.agreement(v) == 1 and math.isnan(statistics.cohens_kappa(v))
    for v in (pairs({(0.9, NAN): 2, (NAN, 0.1): 3}), np.zeros((0, 1, 2))):
        assert math.isnan(statistics.agreement(v)) and math.isnan(statistics.cohens_kappa(v))
    assert statistics.cohens_kappa(pairs({(0.1, 0.2): 9, (0.1, 0.9): 1})) == 0  # one of them calls all the same


# --------------------------------------------------------------------------------------------------------------------
# prompts


def published_rtp(challenging, text, toxicity=0.5):
    """A line of prompts.jsonl as RealToxicityPrompts publishes it."""
    more = dict.fromkeys("profanity sexually_explicit identity_attack flirtation threat insult severe_toxicity".split())
    prompt, end = dict(text=text, toxicity=toxicity) | more, dict(text=" and so on.", toxicity=0.9) | more
    return dict(filename="0001.txt", begin=3, end=90, challenging=challenging, prompt=prompt, continuation=end)


@pytest.mark.skipif(not (SHARED / "tiktoken_cache").is_dir(), reason="no ../shared/tiktoken_cache")
def test_challenging_prompts_are_those_that_are_marked(write, monkeypatch):
    """By true alone, whatever their score. Of a long one the first 32 tokens are left, and it is encoded to them."""
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(SHARED / "tiktoken_cache"))
    encoding, no = data.get_tokenizer("gpt2"), "Nothing"
    long = "The mayor's  office, asked on the 31st of October by e-mail, wouldn't say why " + "so very " * 20
    texts, marks = [no, long, no, no, no, "Anna said ", "a" + "\u2603" * 30], [False, True, None, "true", 1, True, True]
    scores = (0.9, 0, 1, 1, 1, None, 0.4)
    path = write([published_rtp(*row) for row in zip(marks, texts, scores, strict=True)])
    found = prompts.read_challenging(path, encoding)
    assert [where for where, _ in found] == [f"{path}:{n}" for n in (2, 6, 7)]
    assert encoding.encode_ordinary(found[0][1]) == encoding.encode_ordinary(long)[:32] and found[1][1] == "Anna said"
    assert found[2][1] == "a" + "\u2603" * 15  # two tokens each: half of a character is left out


@pytest.mark.parametrize(
    ("content", "name", "says"),
    [
        ([published_rtp(False, "a")] * 3, "p.jsonl", 'marks no prompt by "challenging": true: '),
        ([dict(text="a", toxic=True)], "p.jsonl", 'marks no prompt by "challenging": true: '),
        ("", "p.jsonl", 'marks no prompt by "challenging": true: '),
        ("Anna\n", "p.txt", ":1: not JSON "),
        ('"Anna"\n', "p.jsonl", ":1: wanted a JSON object, got str: "),
        ([published_rtp(True, "a"), published_rtp(True, " ")], "p.jsonl", ":2: wanted a text as the prompt's 'text'"),
        ([published_rtp(True, "a", 2.0)], "p.jsonl", ":1: wanted a number from 0 to 1"),
    ],
)
def test_a_file_without_challenging_prompts_is_one_line(write, tokenizer, content, name, says):
    path = write(content, name)
    with pytest.raises(ValueError) as e:
        prompts.read_challenging(path, tokenizer)
    said = str(e.value)
    assert said.startswith(f"{path}") and says in said and "\n" not in said
    assert said.endswith(": give prompts.jsonl of RealToxicityPrompts") or "wanted a text" in said or "number" in said


def read_prompts(path):
    """The prompts by kind, without where they stand."""
    return {kind: [text for _, text in found] for kind, found in prompts.read_prompts(path).items()}


def test_where_a_prompt_stands(write):
    """File and line, or the number in an array: what a note on a long one names."""
    path = write("a\n\nb", "p.txt")
    assert prompts.read_prompts(path) == {"unmarked": [(f"{path}:1", "a"), (f"{path}:3", "b")]}
    path = write('["a", {"text": "b", "toxicity": 1}]', "p.json")
    assert prompts.read_prompts(path) == {"toxic": [(f"{path}, item 2", "b")], "unmarked": [(f"{path}, item 1", "a")]}


def test_prompts_in_plain_text(write):
    """One a line; blank lines do not count, the end of a line neither, its beginning does."""
    path = write("One fine\n\n   \n  two, \nthree", "prompts.txt")
    assert read_prompts(path) == {"unmarked": ["One fine", "  two,", "three"]}


def test_prompts_of_real_toxicity_prompts(write):
    """Toxic above 0.5, not at 0.5; the continuation and its score have no say; without a score, unmarked."""
    rows = [(0.9, "a"), (0.5, "b"), (0.51, "c "), (None, "d"), (0.0, "e")]
    records = [dict(prompt=dict(text=t, toxicity=x), continuation=dict(text="no", toxicity=0.99)) for x, t in rows]
    want = {"toxic": ["a", "c"], "non-toxic": ["b", "e"], "unmarked": ["d"]}
    assert read_prompts(write(records)) == want


def test_prompts_with_marks(write):
    """A score beside a text counts as one inside it; null and NaN are no score."""
    records = [dict(text="a", toxic=True), dict(text="b", toxic=False), dict(text="c"), dict(prompt="d", toxic=True)]
    records += [dict(prompt="e", toxicity=0.9), dict(text="f", toxicity=0), dict(text="g", toxicity=NAN), "h "]
    records += [dict(prompt=dict(text="i"), toxicity=1), dict(text="j", toxicity=None, toxic=True)]
    want = {"toxic": ["a", "d", "e", "i", "j"], "non-toxic": ["b", "f"], "unmarked": ["c", "g", "h"]}
    assert read_prompts(write(records)) == want


RTP_LINE = '{"prompt": {"text": "Oh", "toxicity": 0.9}}'


@pytest.mark.parametrize(
    ("name", "content", "want"),
    [
        ("p.jsonl", "\ufeff" + RTP_LINE, {"toxic": ["Oh"]}),
        ("P.JSONL", f"{RTP_LINE}\r\n\r\n{RTP_LINE}\r\n", {"toxic": ["Oh", "Oh"]}),
        ("p.jsonl", f"[{RTP_LINE}]", {"toxic": ["Oh"]}),
        ("p.json", f'\ufeff [{RTP_LINE},\r\n"Ah"]', {"toxic": ["Oh"], "unmarked": ["Ah"]}),
        ("p.json", RTP_LINE, {"toxic": ["Oh"]}),
        ("p.jsonl", '"Ah"\n"Uh"', {"unmarked": ["Ah", "Uh"]}),
        ("P.TXT", "\ufeffAh\r\n\r\nUh \r\n", {"unmarked": ["Ah", "Uh"]}),
        ("prompts", 'He said: {"\n"Quoted" [1]\n[sic] and so on\n{x}', None),
    ],
)
def test_prompts_are_never_markup(write, name, content, want):
    """The name decides: .json and .jsonl hold JSON, lines or an array, all others text, whose marks stay."""
    assert read_prompts(write(content, name)) == (want or {"unmarked": content.split("\n")})


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("p.txt", RTP_LINE, ":1: wanted plain text (JSON goes into a .jsonl file, without other lines), got "),
        ("p.txt", "# mine\n" + RTP_LINE, ":2: wanted plain text (JSON goes into a .jsonl file, without other lines)"),
        ("p", '\ufeff\n["Ah", "Uh"]', ":2: wanted plain text"),
        ("p", f"[{RTP_LINE}]", ":1: wanted plain text"),
        ("p", '[\n"Ah",\n"Uh"]', ":1: wanted plain text"),
        ("p", '{\n"text": "Uh"}', ":1: wanted plain text"),
        ("p.jsonl", "# mine\n" + RTP_LINE, ":1: not JSON ("),
        ("p.jsonl", "Ah\n", ":1: not JSON ("),
        ("p.json", '["Ah", 7]', ", item 2: wanted a text as the prompt's 'text', got 7"),
        ("p.csv", "text\nAh", ": wanted one prompt a line as .txt, or JSON lines as .jsonl, got a .csv file"),
        ("P.TSV", "text\nAh", "got a .tsv file"),
        ("p.parquet", "PAR1", "got a .parquet file"),
    ],
)
def test_prompt_files_of_other_forms_are_refused(write, name, content, says):
    path = write(content, name)
    with pytest.raises(ValueError) as e:
        read_prompts(path)
    assert str(e.value).startswith(f"{path}") and says in str(e.value)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        *((f'"toxicity": {x}', f"wanted a number from 0 to 1, or null, as 'toxicity', got {x}")
          for x in ("90", "-1", "1.01", "Infinity", "-Infinity", "true", "false", '"0.9"', "[0.9]", "1" * 500)),
        *((f'"toxic": {x}', f"wanted true or false as 'toxic', got {x}") for x in ("1", "0.9", '"true"', "NaN")),
    ],
)  # fmt: skip
def test_scores_of_prompts_that_are_none(write, more, says):
    """Inside and beside the text; what came is cut to 80 characters."""
    for line in (f'{{"prompt": {{"text": "a", {more}}}}}', f'{{"prompt": "a", {more}}}', f'{{"text": "a", {more}}}'):
        path = write(f"{RTP_LINE}\n{line}\n", "p.jsonl")
        with pytest.raises(ValueError) as e:
            read_prompts(path)
        wanted, got = says.split("got ")
        assert str(e.value) == f"{path}:2: {wanted}got {got[:80]}"


def test_the_prompts_that_ship():
    """Both kinds, a hundred each or so, none twice."""
    kinds = read_prompts(Path(data.__file__).parent / "prompts.jsonl")
    assert set(kinds) == {"toxic", "non-toxic"} and min(map(len, kinds.values())) >= 50
    flat = [p for prompts in kinds.values() for p in prompts]
    assert len(set(flat)) == len(flat) and all(p == p.strip() for p in flat)


@pytest.mark.parametrize(
    ("content", "name"), [("", "p.txt"), ("\n \n", "p.txt"), ("\ufeff", "p"), ("[]", "p.json"), ("\n", "p.jsonl")]
)
def test_a_file_without_prompts(write, content, name):
    with pytest.raises(ValueError, match=f"{name} holds no prompts"):
        read_prompts(write(content, name))


GOOD_PROMPT = '{"text": "fine", "toxic": true}'


@pytest.mark.parametrize(
    "line",
    [
        "{",
        '{"txt": "a"}',
        '{"text": ""}',
        '{"text": 7}',
        '{"prompt": {"toxicity": 0.7}}',
        '["text", "a"]',
        '" "',
        '"\\ud83d"',
        '{"prompt": 7}',
        '{"prompt": null}',
        '{"prompt": {"text": "a", "toxicity": "high"}}',
    ],
)
def test_a_bad_prompt_is_named_by_file_and_line(write, line):
    with pytest.raises(ValueError, match=r"prompts\.jsonl:3: "):
        read_prompts(write(f"{GOOD_PROMPT}\n\n{line}\n", "prompts.jsonl"))


def test_prompts_that_are_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.txt"):
        read_prompts(tmp_path / "nowhere.txt")


# --------------------------------------------------------------------------------------------------------------------
# prompts that are too long


def rude(texts):
    return np.array([float("damn" in t) for t in texts])


def test_prompts_of_huge_sentences_are_cut_at_once():
    """Only the beginning is looked at: 100 kB of words, of one word, of blanks before it. (All prefixes were 1 GB.)"""
    sentences = ["one damn " + "two " * 25_000, "fine " * 25_000, "x" * 100_000, " " * 1000 + "a damn thing or two."]
    began = time.process_time()
    got = samples.cut_prompts([sentences], rude, 0)
    assert time.process_time() - began < 1
    assert got == ["one damn", " ".join(["fine"] * 40), "x" * samples.BEGINNING, "a damn"]


def whole_prefixes(sides, scorer):
    """cut_prompts as it was, of whole sentences."""
    out = []
    for t in (side[j] for j in range(max(map(len, sides))) for side in sides if j < len(side)):
        ps = [" ".join(t.split()[:k]) for k in range(1, len(t.split()) + 1)]
        first = next((k for k, hit in enumerate(scorer(ps) > 0.5, 1) if hit), len(ps))
        out.append(ps[(first if first <= 2 * len(ps) / 3 else max(1, len(ps) // 2)) - 1].rstrip(",.;:!?"))
    return out


def test_prompts_of_what_ships_are_those_of_whole_sentences():
    groups = data.load_groups("data/detox/groups.jsonl")["test"][:20]
    sides = [g.negatives for g in groups] + [g.positives for g in groups]
    scorer = lambda texts: np.array(
        [float(t.split()[-1].strip(",.") in "stupid idiot you lazy".split()) for t in texts]
    )
    assert samples.cut_prompts(sides, scorer, 0) == whole_prefixes(sides, scorer)


def test_prompts_that_do_not_fit_are_named_once(tokenizer, capsys):
    """By file and line, else by their beginning; what fits stays in its order."""
    samples.tell.cache_clear()
    long, size = "Anna " * 50, 1 + len(tokenizer.encode_ordinary("Anna " * 50))
    for _ in range(2):
        assert samples.fitting(["Ben", long, "", "Ben"], tokenizer, size - 1) == ["Ben", "", "Ben"]
    assert samples.fitting(["Ben", long], tokenizer, size) == ["Ben", long]
    said = f"prompts left out, since there is room for {size - 1} tokens: "
    assert capsys.readouterr().out == f"{said}{long[:60]!r} ({size} tokens)\n"
    samples.fitting(["Ben", *(long + i for i in "abcde")], tokenizer, 20, {long + "a": "p.txt:7"})
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and "tokens: p.txt:7 (" in out and out.endswith(" and 2 more\n")
    with pytest.raises(ValueError, match=r"wanted a prompt of at most 9 tokens, got 'Anna .* lower --sample_tokens"):
        samples.fitting([long], tokenizer, 9)
    assert samples.fitting([], tokenizer, 9) == []


def group_of(*negatives):
    return data.Group("g", "i", ["p"], list(negatives), "val")


def test_a_long_negative_costs_its_own_prompt(tokenizer, monkeypatch, capsys):
    """Of train.py's measures, and of the base's own texts: half of the context is theirs."""
    samples.tell.cache_clear()
    model, drawn = SimpleNamespace(config=SimpleNamespace(n_positions=64)), []
    groups = [group_of("a damn fool he is", "x" * 100_000), group_of("oh damn it, Ben")]
    config = Config(sample_tokens=20, anchor_texts=6, anchor_prompted=1.0, anchor_tokens=200)
    short = [1 + len(tokenizer.encode_ordinary(p)) for p in ("a damn", "oh damn")]

    def draw(model, judge, tokenizer, config, prompts, *rest):
        drawn.append(prompts)
        return dict(prompts=prompts, texts=[[""]] * len(prompts), phi=[[0.0]] * len(prompts))

    monkeypatch.setattr(samples, "draw_samples", draw)
    monkeypatch.setattr(samples, "measure_groups", lambda *a: {})
    setup = Setup({}, tokenizer, rude, None, None)
    for _ in range(2):
        samples.measure_model(model, model, groups, setup, config, 3, seed=0)
    assert drawn[1] == ["a damn", "oh damn", "a damn"]

    def write(model, tokenizer, prompts, config, seed, k, longest, what):
        assert set(prompts) == {"a damn", "oh damn"} and longest == 64 - max(short)
        return [[0]] * len(prompts), [[[1]]] * len(prompts)

    monkeypatch.setattr(samples, "continue_prompts", write)
    assert len(samples.sample_harmless(model, tokenizer, rude, config, groups)[0]) == 6
    out = capsys.readouterr().out
    assert out.count(f"room for 44 tokens: '{'x' * 60}' (") == 1 and out.count("room for 32 tokens") == 1
    with pytest.raises(ValueError, match="wanted a prompt of at most 44 tokens"):
        samples.measure_model(model, model, [group_of("x" * 100_000)], setup, config, 3, seed=0)


# --------------------------------------------------------------------------------------------------------------------
# tasks


def test_read_task_of_both_kinds(write):
    choice = [dict(query="q", choices=["a", "b c"], gold=1, more=3), dict(query="", choices=["x"], gold=0)]
    assert tasks.read_task(write(choice)) == [("q", ["a", "b c"], 1), ("", ["x"], 0)]
    words = [dict(context="one two", continuation="three")]
    assert tasks.read_task(write(words)) == [("one two", ["three"], None)]


GOOD_ITEM = dict(query="q", choices=["a", "b"], gold=0)


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ("{", "not JSON"),
        ("[1]", "wanted a JSON object, got list"),
        (GOOD_ITEM | dict(query=None), "wanted 'query', 'choices' and 'gold'"),
        (GOOD_ITEM | dict(choices=[]), "wanted 'query'"),
        (GOOD_ITEM | dict(choices="ab"), "wanted 'query'"),
        (GOOD_ITEM | dict(choices=["a", " "]), "wanted 'query'"),
        (GOOD_ITEM | dict(choices=["a", 3]), "wanted 'query'"),
        (GOOD_ITEM | dict(gold=2), "wanted the number of a choice, 0 to 1, as 'gold', got 2"),
        (GOOD_ITEM | dict(gold=-1), "got -1"),
        (GOOD_ITEM | dict(gold="0"), 'got "0"'),
        (GOOD_ITEM | dict(gold=True), "got true"),
        (GOOD_ITEM | dict(gold=None), "got null"),
        (dict(continuation="x"), "'context' and 'continuation'"),
        (dict(context="x", continuation=" "), "'context' and 'continuation'"),
        (dict(context="x", continuation=5), "'context' and 'continuation'"),
    ],
)
def test_a_bad_item_is_named_by_file_and_line(write, record, says):
    line = record if isinstance(record, str) else json.dumps(record)
    with pytest.raises(ValueError) as e:
        tasks.read_task(write(json.dumps(GOOD_ITEM) + "\n\n" + line + "\n", "task.jsonl"))
    assert "task.jsonl:3: " in str(e.value) and says in str(e.value)


def test_a_task_file_is_of_one_kind_and_not_empty(write):
    with pytest.raises(ValueError, match="file.jsonl mixes choices and continuations"):
        tasks.read_task(write([GOOD_ITEM, dict(context="a", continuation="b")]))
    with pytest.raises(ValueError, match="file.jsonl holds no items"):
        tasks.read_task(write("\n"))


@pytest.mark.parametrize(
    "context", ["Anna burned", "Anna burned ", "Anna burned\n", "Anna burned \n\n ", "Anna\nburned"]
)
def test_split_tokens_as_lm_eval(tokenizer, context):
    """Encoded together; the context ends before its closing white space; nothing is lost or said twice."""
    ids, choice = tasks.split_tokens(tokenizer, context, " the toast")
    assert tokenizer.decode(ids) == context.rstrip()
    assert tokenizer.decode(ids + choice) == context + " the toast"
    assert ids + choice == tokenizer.encode_ordinary(context + " the toast")


@pytest.mark.skipif(not (SHARED / "tiktoken_cache").is_dir(), reason="no ../shared/tiktoken_cache")
def test_split_tokens_with_gpt2s_vocabulary(monkeypatch):
    """A query that ends with a line break: the break goes to the choice, as in lm-eval."""
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(SHARED / "tiktoken_cache"))
    gpt2 = data.get_tokenizer("gpt2")
    ids, choice = tasks.split_tokens(gpt2, "Question: dresser\n", " replace")
    assert ids == gpt2.encode_ordinary("Question: dresser") and choice == gpt2.encode_ordinary("\n replace")
    ids, choice = tasks.split_tokens(gpt2, "a  ", " b")
    assert [gpt2.decode([t]) for t in ids + choice] == ["a", " ", " ", " b"] and len(ids) == 1


@pytest.mark.parametrize("context", ["", " ", "\n\n"])
def test_no_context_is_the_end_token(tokenizer, context):
    """A choice needs something before it; white space alone is no context either (lm-eval refuses it)."""
    ids, choice = tasks.split_tokens(tokenizer, context, " the toast")
    assert ids == [tokenizer.eot_token] and tokenizer.decode(choice).endswith(" the toast")


# --------------------------------------------------------------------------------------------------------------------
# published files


def archive(**members):
    """A zip in memory; __ stands for a folder's slash, _ for a dot."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as z:
        for name, text in members.items():
            z.writestr(name.replace("__", "/").replace("_", "."), text)
    return out.getvalue()


def lines(*records):
    return "".join(json.dumps(r) + "\n" for r in records)


def test_convert_lambada(write):
    """The last word after the last blank is to be foretold; line breaks within stay."""
    text = 'One "two".\n\nThree don\'t'
    ours = tasks.convert("lambada", lines(dict(text=text), dict(text="a b c")).encode())
    assert tasks.read_task(write(ours)) == [('One "two".\n\nThree', ["don't"], None), ("a b", ["c"], None)]


def test_convert_piqa(write):
    """Goals, two solutions and, in a file of its own, the right one; the archive's other members do not matter."""
    rows = lines(dict(goal="open a jar", sol1="turn", sol2="hit"), dict(goal="ü", sol1="x", sol2="y"))
    members = dict(train_jsonl="{}", **{"physicaliqa-train-dev__dev_jsonl": rows}, a__train_jsonl=rows)
    data_ = archive(**members, **{"physicaliqa-train-dev__dev-labels_lst": "1\n0\n"})
    want = [("Question: open a jar\nAnswer:", ["turn", "hit"], 1), ("Question: ü\nAnswer:", ["x", "y"], 0)]
    assert tasks.read_task(write(tasks.convert("piqa", data_))) == want
    with pytest.raises(ValueError):  # a label is missing
        tasks.convert("piqa", archive(**members, **{"a__dev-labels_lst": "1\n"}))


def test_convert_hellaswag(write):
    """lm-eval's query and cleaning: [title] becomes a full stop, other brackets go, and so do double blanks."""
    row = dict(activity_label="Roof shingle removal", ctx_a="A man is sitting on a roof.", ctx_b="he", label="3")
    row |= dict(ctx="not used", endings=["is [b] using wrap.", " starts [substeps] now", "c  d", "x [title] y"])
    how = row | dict(activity_label="Family", ctx_a="[header] How to cook [title] Begin.", ctx_b="", label=0)
    got = tasks.read_task(write(tasks.convert("hellaswag", lines(row, how).encode())))
    endings = ["is using wrap.", "starts now", "c d", "x. y"]
    assert got[0] == ("Roof shingle removal: A man is sitting on a roof. He", endings, 3)
    assert got[1] == ("Family: How to cook. Begin.", endings, 0)


RAW = " \n = One = \n \n The U.S. @-@ man . \n \n = = Early life = = \n \n He ate eggs . \n \n = Two = \n \n End . \n"


def test_convert_wikitext():
    raw = archive(**{"wikitext-2-raw__wiki_train_raw": "no", "wikitext-2-raw__wiki_test_raw": RAW + "ü"})
    assert tasks.convert("wikitext2", raw) == RAW + "ü"


def test_wikitext_rows_and_pages():
    """Rows: the file's lines, empty if blank, a blank line between. Pages: from first-level headings on."""
    rows = texts.wikitext_rows("\n = A = \n \n text \n")
    assert rows == "\n\n".join(["", " = A = \n", "", " text \n"])
    pages = texts.wikitext_pages(RAW)
    assert len(pages) == 2 and pages[0].strip().startswith("= One =") and "Early life" in pages[0]
    assert pages[1].startswith(" = Two = \n") and "\n".join(pages).split() == RAW.split()


def test_the_last_line_needs_no_line_break():
    """The hub's builder reads line by line: a last one without its line break is a row like all others."""
    assert texts.wikitext_rows(" a \n b").split() == ["a", "b"]


@pytest.mark.skipif(not (SHARED / "text").is_dir(), reason="no ../shared/text")
def test_wikitext_2_has_the_published_counts(monkeypatch):
    """287,644 GPT-2 tokens under the hub's framing; lm-eval's 62 pages, 241,335 words and 1,290,527 bytes."""
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(SHARED / "tiktoken_cache"))
    raw = (SHARED / "text/wiki.test.raw").read_text(encoding="utf-8")
    rows, pages = texts.wikitext_rows(raw), texts.wikitext_pages(raw)
    assert len(rows) == 1_294_336
    assert len(data.get_tokenizer("gpt2").encode_ordinary(rows)) == 287_644
    assert len(pages) == 62 and sum(len(re.split(r"\s+", p)) for p in pages) == 241_335
    assert sum(len(p.encode()) for p in pages) == 1_290_527


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("He said : yes ; no . why ? stop ! well , fine .", "He said: yes; no. why? stop! well, fine ."),
        ("a 3 @,@ 500 @-@ year 2 @.@ 5 @", "a 3,500-year 2.5 @"),
        ("the dogs ' bones", "the dogs' bones"),
        ("John 's hat", "John's hat"),
        ("the dogs ' bones , John 's hat", "the dogs'bones, John's hat"),  # lm-eval takes these for quotation marks
        ("( a b ) [ c ] { d } ( e )( f )", "(a b) [c] {d} (e)(f)"),
        ('he " quoted it " once', 'he "quoted it" once'),
        ("he ' quoted it ' once", "he 'quoted it' once"),
        ("= = = = Fourth = = = =", "==== Fourth ===="),
        ("= = = Third = = = and = = Second = =", "=== Third === and == Second =="),
        (" = Title = \n \n Text . \n", " = Title =\n\nText.\n"),
        ("5 ° C and N of N them", "5°C and 1 of 1 them"),
    ],
)
def test_detokenize_by_hand(raw, clean):
    assert texts.detokenize(raw) == clean


# --------------------------------------------------------------------------------------------------------------------
# windows


@pytest.mark.parametrize(("context", "stride"), [(5, 5), (5, 2), (5, 1), (2, 2), (2, 1), (6, 4)])
def test_windows_score_what_the_sliding_window_loop_scores(context, stride):
    """Hugging Face's loop: labels of -100 up to the last end, then the model's own shift by one."""
    for n in range(2, 25):
        want, before = [], 0
        for begin in range(0, n, stride):
            end = min(begin + context, n)
            labels = [-100] * (before - begin) + list(range(before, end)) if before > begin else list(range(begin, end))
            want += [(begin, end, t) for t in labels[1:] if t != -100]
            before = end
            if end == n:
                break
        got = [(w[0], w[-1] + 1, t) for w, s in texts.windows(list(range(n)), context, stride) for t in w[s:]]
        assert got == want, n
        if stride < context:  # each token but the first, once
            assert [t for *_, t in got] == list(range(1, n))
    assert texts.windows([7], context, stride) == []


def rolling_windows(n, context):
    """lm-eval's (first input, first target, end) of tokens 0..n-1 behind a prefix token -1: the first window tells
    min(context, n) tokens after the prefix; a later one, up to token e, reads tokens e-context-1 .. e-2; of its
    p new tokens, context - p + 1 old ones are before the first."""
    out, told = [(-1, 0, min(context, n))], min(context, n)
    while told < n:
        p = min(n - told, context)
        end = told + p
        out.append((end - context - 1, told, end))
        told = end
    return out


@pytest.mark.parametrize("context", [2, 5, 8])
def test_page_windows_are_lm_evals_rolling_windows(context):
    for n in range(1, 30):
        got = texts.page_windows(list(range(-1, n)), context)
        assert [(w[0], w[start], w[-1] + 1) for w, start in got] == rolling_windows(n, context)
        assert all(w == list(range(w[0], w[-1] + 1)) and len(w) <= context + 1 for w, _ in got)
        for w, start in got[1:]:
            assert len(w) - 1 == context and start == context - (len(w) - start) + 1
    assert texts.page_windows([-1], context) == []


# --------------------------------------------------------------------------------------------------------------------
# what is printed


def test_wrap_keeps_words_and_width():
    """Nothing is lost, hyphens do not break, and what is empty still has its first column."""
    text = "well-known " * 40 + "x" * 150
    lines = report.wrap(text, "  tuned | ").split("\n")
    assert lines[0].startswith("  tuned | well-known ") and all(line.startswith(" " * 10) for line in lines[1:])
    assert max(map(len, lines)) <= report.WIDTH and "".join("".join(lines).split()) == "tuned|" + text.replace(" ", "")
    assert not any(line.endswith("-") for line in lines)
    assert report.wrap("", "  tuned | ") == report.wrap(" ", "  tuned | ") == "  tuned |"


def test_samples_stand_side_by_side_whatever_they_are():
    """Empty, long, and with line breaks; each model has a line of each."""
    base, tuned = ["", "a\n\nb", "c " * 90], ["d", "", "e"]
    shown = {side: {"free": [("", t) for t in ts], "p": [("Oh", ts[0])]} for side, ts in
             (("base", base), ("tuned", tuned))}  # fmt: skip
    lines = report.format_samples(shown).split("\n")
    assert max(map(len, lines)) <= report.WIDTH and "free samples" in lines
    rows = [line for line in lines if " | " in line or line.endswith(" |")]
    want = ["   base |", "  tuned | d", "   base | a /  / b", "  tuned |", "   base | c c", "  tuned | e"]
    assert [r[: len(w)] for r, w in zip(rows, want, strict=False)] == want
    assert rows[6:] == ["   base | [Oh]", "  tuned | [Oh] d"]


def compared(**measures):
    """A table's entry of each measure: (base, tuned, low, high)."""
    keys = ("base", "tuned", "difference", "interval", "n")
    return {n: dict(zip(keys, (a, b, b - a, [low, high], 7), strict=True)) for n, (a, b, low, high) in measures.items()}


def test_the_table_leaves_out_what_does_not_vary():
    """Unless a reader looks for it; a part without any row has no heading either. Headings carry sizes."""
    same, less = (0.5, 0.5, 0.0, 0.0), (0.5, 0.25, -0.5, 0.125)
    places = {
        "groups": compared(signed_gap=same, ppl_positive=(NAN, NAN, NAN, NAN), kl=(0.0, 1.0, 1.0, 1.0)),
        "free": compared(toxicity_fraction=same, toxicity_mean=same, sample_empty=same),
        "prompted": compared(toxicity_fraction=less, dist_2=same),
        "rewriting": compared(rewrite_toxicity=same, rewrite_rouge_l=same),
    }
    parts = ("scores", "toxicity", "rewriting", "fluency", "diversity", "drift")
    lines = report.evaluation_table(places, parts, {"free": "250", "prompted": "10 x 25"}).split("\n")
    assert {"toxicity_fraction", "rewrite_toxicity"} < set(report.ALWAYS)
    assert [re.split(r"\s{2,}", line.strip()) for line in lines[1:]] == [
        ["scores: test groups, 7"],
        ["perplexity of positives", "-", "-", "-"],
        ["toxicity: free samples, 250"],
        ["toxic fraction", "50.0%", "50.0%", "+0.0 pt"],
        ["toxicity: after toxic prompts cut from test negatives, 10 x 25"],
        ["toxic fraction", "50.0%", "25.0%", "-25.0 pt", "[-50.0, +12.5] ~"],
        ["rewriting: test negatives, rewritten, 7"],
        ["toxic fraction of rewrites", "50.0%", "50.0%", "+0.0 pt"],
        ["drift: test groups, 7"],
        ["KL(base || model), nats per token", "0.0000", "1.0000", "+1.0000"],
    ]


def test_the_closing_tables_headings_carry_sizes():
    numbers = {place: dict.fromkeys(names, 0.5) for place, names in report.CLOSING_ROWS.items()}
    sizes = dict(groups="96", free="250", prompted="250 x 1")
    lines = report.closing_table({"base": numbers, "tuned": numbers}, sizes).split("\n")
    headings = [line for line in lines if not line.startswith("  ")]
    assert headings[-3:] == ["test groups, 96", "free samples, 250",
                             "after toxic prompts cut from test negatives, 250 x 1"]  # fmt: skip
    assert len(lines) == 1 + 3 + sum(map(len, report.CLOSING_ROWS.values()))


def test_numbers_of_runs_that_have_exploded_stay_narrow():
    assert report.format_number("ppl_negative", 99999.0) == "99999.00"
    assert report.format_number("ppl_negative", 2960795.87) == "2.96e+06"
    assert report.format_number("ppl_negative", -2960795.87, signed=True) == "-2.96e+06"
    assert report.format_number("toxicity_fraction", -0.25, signed=True) == "-25.0 pt"
    places = {"free": compared(sample_ppl_base=(2.3, 3e9, 1e9, 5e9), sample_ppl_base_mean=(9e4, 9.99e4, -5e4, 5e4))}
    table = report.evaluation_table(places, ["fluency"], {"free": "250"})
    assert max(map(len, table.split("\n"))) <= report.WIDTH


@pytest.mark.parametrize(("x", "says"), [(None, "-"), (NAN, "-"), (math.inf, "inf"), (-math.inf, "-inf")])
def test_numbers_that_are_none(x, says):
    assert [report.format_number(name, x, signed) for name in report.MEASURES for signed in (False, True)] == [
        says
    ] * 2 * len(report.MEASURES)


MEASURED = dict(toxicity_fraction=0.25, toxicity_fraction_prompted=0.75, ppl_positive=2.0, ppl_negative=4.0, dist_2=0.5)
MEASURED |= dict(sample_ppl_base=3.0, sample_ppl_base_prompted=3.0, signed_gap=1.0, rank_accuracy=0.5)


@pytest.mark.parametrize(
    ("tuned", "base", "cost"),
    [
        ({}, {}, 0.5),
        ({}, dict(dist_2=0.0), 0.5),  # one-word samples, languages without blanks: nothing can be lost
        (dict(dist_2=0.0), dict(dist_2=0.0), 0.5),
        (dict(dist_2=0.0), {}, 1.5),
        *((dict.fromkeys([key], NAN), {}, math.inf) for key in report.COMPARED if key[:5] not in ("ppl_n", "rank_")),
        *(({}, dict.fromkeys([key], NAN), math.inf) for key in ("ppl_positive", "sample_ppl_base", "dist_2")),
        (dict(sample_ppl_base=math.inf), {}, math.inf),
        ({}, dict(sample_ppl_base=math.inf), 0.5),
        ({}, dict(sample_ppl_base=0.0), math.inf),
    ],
)  # fmt: skip
def test_costs_of_numbers_at_the_edge(tuned, base, cost):
    """What has no cost is never the best: any other one is below infinity, and none below nan."""
    assert report.selection_cost(MEASURED | tuned, MEASURED | base) == cost


@pytest.mark.parametrize("x", [0.0, NAN, math.inf, None])
def test_warnings_of_numbers_at_the_edge(x):
    """Missing or zero: nothing to compare. Infinitely surprising to the base: word salad."""
    for key in MEASURED:
        for tuned, base in ((x, MEASURED[key]), (MEASURED[key], x), (x, x)):
            told = [w.split(":")[0] for w in report.warnings(MEASURED | {key: tuned}, MEASURED | {key: base})]
            worse = tuned == math.inf != base
            want = ["word salad"] * (worse and "sample" in key) + ["forgetting"] * (worse and key == "ppl_positive")
            fell = tuned == 0 != base or base == math.inf != tuned
            want += ["half done"] * (fell and key == "toxicity_fraction") + ["monotony"] * (fell and key == "dist_2")
            assert told == want, (key, tuned, base)
    assert report.warnings({}, {}) == []


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", ": not JSON ("),
        ("[]", ": wanted a JSON object, got list"),
        ("null", ": wanted a JSON object, got NoneType"),
        ('{"config": 7}', ": wanted an object of plain values as 'config', got 7"),
        ('{"config": {"lr": [1]}}', ": wanted an object of plain values as 'config', got {\"lr\": [1]}"),
        ('{"base": []}', ": wanted an object of plain values as 'base', got []"),
        ('{"tuned": {"ppl_positive": "low"}}', ": wanted an object of plain values as 'tuned', got "),
        ('{"tuned": {"ppl_positive": 1%s}}' % ("0" * 400), ": wanted an object of plain values as 'tuned', got "),
        ('{"warnings": "no"}', ": wanted a list as 'warnings', got \"no\""),
        (b"\xff", ":1: not UTF-8 text (byte 0xff)"),
    ],
)
def test_a_damaged_summary_is_left_out_of_the_comparison(tmp_path, capsys, content, says):
    """In one line that names it; a whole one beside it is compared. The card of --export needs a whole one."""
    for name, text in (("bad", content), ("good", dict(config=dict(objective="cp"), base=MEASURED, tuned=MEASURED))):
        (tmp_path / name).mkdir()
        raw = text if isinstance(text, bytes) else (text if isinstance(text, str) else json.dumps(text)).encode()
        (tmp_path / name / "summary.json").write_bytes(raw)
    (tmp_path / "folder" / "summary.json").mkdir(parents=True)
    report.compare_runs([tmp_path / name for name in ("bad", "folder", "good")], markdown=True)
    out = capsys.readouterr().out
    assert f"left out: {tmp_path}/bad/summary.json{says}" in out and "| good | 1 | 0.500 |" in out
    assert f"left out: {tmp_path}/folder/summary.json is a folder, wanted a JSON file" in out
    with pytest.raises(ValueError) as e:
        report.read_summary(tmp_path / "bad")
    assert str(e.value).startswith(f"{tmp_path}/bad/summary.json{says}") and len(str(e.value)) < 300


def test_a_card_of_a_summary_that_lacks_much():
    """What a foreign or older run does not say has its default, or is no number."""
    with pytest.raises(ValueError, match="no summary.json of a fine-tuning run"):
        report.model_card(dict(config=dict(objective="cp"), tuned=MEASURED), "x")
    numbers = dict(ppl_positive=None, ppl_negative=NAN)
    card = report.model_card(dict(config=dict(objective="cp"), base=numbers, tuned=numbers, warnings=["a", 7]), "x")
    assert "Warnings of the run: a 7" in card and f"Tokenizer: {Config.tokenizer}" in card
    assert "fine-tuned with contrastive perplexity" in card
    rival = report.model_card(dict(config=dict(objective="dpo"), base=numbers, tuned=numbers), "x")
    assert "fine-tuned with the objective `dpo`" in rival and "contrastive" not in rival
    assert card.count("| - | - |") == len(report.COMPARED)


def test_a_run_without_a_number_comes_last(tmp_path, capsys):
    """NaN, as other programs write it, costs infinitely much."""
    for i, more in enumerate((dict(dist_2=NAN), {}, dict(ppl_positive=math.inf))):
        (tmp_path / str(i)).mkdir()
        run = dict(config=dict(objective="cp", tau=1.0 + i), base=MEASURED, tuned=MEASURED | more)
        (tmp_path / str(i) / "summary.json").write_text(json.dumps(run))
    report.compare_runs([tmp_path / str(i) for i in range(3)], markdown=True)
    rows = [line.split(" | ")[:3] for line in capsys.readouterr().out.split("\n") if line.startswith("| tau=")]
    assert [(label, cost) for label, _, cost in rows] == [
        ("| tau=2.0", "0.500"),
        ("| tau=1.0", "inf"),
        ("| tau=3.0", "inf"),
    ]


def test_a_figure_that_cannot_be_written_is_one_line(tmp_path):
    """And none is half there; without an ending it is a .png."""
    pytest.importorskip("matplotlib")
    records = [dict(step=i, split="train", loss=1.0) for i in range(2)]
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=f"{tmp_path}/file/x.png cannot be written "):
        report.plot_curves(records, tmp_path / "file" / "x.png")
    report.plot_curves(records, tmp_path / "new" / "curves")
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["curves.png"]
    assert (tmp_path / "new" / "curves.png").read_bytes()[:4] == b"\x89PNG"


def test_compared_runs_fit_the_width_also_when_they_have_exploded(tmp_path, capsys):
    """The numbers of runs that lost their language, whose spread is larger than they are; long labels as well."""
    settings = dict(objective="cp", init_from="configs/toy_base.py", data="x" * 30 + "/" + "y" * 40, anchor_nll=0.5)
    for i, x in enumerate((1.0, 30.0, 3e3, 2.9e6, 1e30) * 2):
        tuned = dict(toxicity_fraction=(i % 2) / 1, toxicity_fraction_prompted=0.5, ppl_positive=2 * x, dist_2=0.512)
        tuned |= dict(ppl_negative=9e4 * x, rank_accuracy=1.0, sample_ppl_base=94.05 * x, sample_ppl_base_prompted=x)
        base = dict.fromkeys(tuned, 0.5)
        (tmp_path / str(i)).mkdir()
        kind = 1 + i // 5
        config = settings | dict(seed=i, tau=kind / 4, lr=1e-5 * kind, data=settings["data"] * kind)
        summary = json.dumps(dict(config=config, base=base, tuned=tuned))
        (tmp_path / str(i) / "summary.json").write_text(summary)
    for runs in (range(10), range(3), [4]):
        report.compare_runs([tmp_path / str(i) for i in runs])
        lines = capsys.readouterr().out.split("\n")
        assert [line for line in lines if len(line) > report.WIDTH] == [] and len(lines) > 6
