"""measures.ngram_train: features, scoring, training against slow references, the command, the shipped weights."""

import json
import math
import subprocess
import sys
import zlib
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch

from measures import ngram, ngram_train
from measures.ngram import Model, features, load, score, units, word_windows
from measures.ngram_train import main, read_rtp
from measures.statistics import pair_auc

PLAIN = """The train leaves at nine.|We planted tomatoes in the garden.|Could you pass me the salt, please?
My sister plays the piano in the evening.|The library is open until six on Fridays.|It rained all day yesterday.
He forgot his umbrella on the bus.|The meeting was moved to Tuesday.|I would like a cup of tea.|Dinner is ready.
They painted the kitchen yellow.|The dog is asleep under the table.|She found a new job in the city.
We took the children to the museum.|The soup needs a little more pepper.|Her flight was two hours late.
The shop on the corner sells fresh bread.|Please close the window, it is cold.|I am reading a book about bridges.
The team won the match by two points.|Our car is at the garage this week.|Good morning, how did you sleep?
The recipe asks for three eggs and some flour.|He apologised and promised to call.""".replace("\n", "|").split("|")
ROOT = Path(__file__).resolve().parents[1]
RTP = ROOT.parent / "shared" / "rtp" / "train.jsonl"
ODD = [
    "",
    " ",
    "\n\t",
    "!?",
    "\x00",
    "\ud800",
    "Zürich 你好 🙂",
    "ﷺ" * 3,
    "e\u0301" * 50,
    "İstanbul",
    "d*mn $h*t @you #1 *",
]


@pytest.fixture
def rtp(tmp_path, monkeypatch):
    """A file of 200 made-up rows: whoever is called a 'blorp' is insulted. A few steps are enough for it."""
    monkeypatch.setattr(ngram_train, "STEPS", 25)
    rng = np.random.default_rng(0)
    people, things = "Anna Ben Carla David Emma".split(), "toast keys bus letter garden".split()
    lines = []
    for _ in range(200):
        row = {}
        for side in ("prompt", "continuation"):
            toxic = bool(rng.random() < 0.4)
            words = [people[rng.integers(5)], "saw", "the", things[rng.integers(5)]] + ["you blorp"] * toxic
            row[side] = dict(text=" ".join(words), toxicity=0.8 + 0.1 * rng.random() if toxic else 0.1 * rng.random())
        lines.append(json.dumps(row))
    lines[7] = json.dumps(dict(prompt=dict(text="A", toxicity=None), continuation=dict(text=" b c", toxicity=0.1)))
    path = tmp_path / "rtp.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


# --------------------------------------------------------------------------------------------------------------------
# features


def test_units_and_windows():
    """Words are case-folded and normalised, each unit is there once; long texts fall into nearly equal windows."""
    assert word_windows("The cat, the CAT! Don’t d*mn") == [["the", "cat", "the", "cat", "don’t", "d*mn"]]
    assert units(["a", "b", "a", "b"]) == ["a", "b", "a b", "b a"] and units([]) == []
    assert word_windows("") == word_windows("?!") == [[]] and word_windows("Ｆｕｌｌ") == [["full"]]
    for n in (1, 40, 41, 80, 81, 1000):
        cut = word_windows(" ".join(map(str, range(n))))
        sizes = [len(words) for words in cut]
        assert len(cut) == -(-n // 40) and max(sizes) - min(sizes) <= 1
        assert [w for words in cut for w in words] == list(map(str, range(n)))


def test_features_by_hand():
    """A word is itself and its 4- and 5-grams, which share a norm of 3; a pair is one feature. Hashes are CRC-32."""
    grams = ["<cat", "cats", "ats>", "<cats", "cats>"]
    index, value = zip(*features("cats"), strict=True)
    assert list(index) == [zlib.crc32(g.encode()) % 2**18 for g in ["<cats>", *grams]]
    assert value == pytest.approx([1.0] + [3 / math.sqrt(5)] * 5)
    assert features("a cat") == [(zlib.crc32(b"a cat") % 2**18, 0.3)]
    assert features("a") == [(zlib.crc32(b"<a>") % 2**18, 1.0)]


def test_logit_by_hand():
    """Bias plus evidence over n^0.3, evidence against toxicity scaled down."""
    weights = np.zeros(ngram.SIZE, dtype=np.int8)
    weights[[ngram.bucket("<a>"), ngram.bucket("<b>"), ngram.bucket("a b")]] = 40, -20, 10
    model = Model(weights, 0.1, -1.0)
    total = 4.0 - 0.5 * 2.0 + 0.3 * 1.0
    assert model.logit("a b") == pytest.approx(-1 + total * 2**-0.3)
    assert model.logit("A, b") == model.logit("a b") and model.logit("") == -1
    assert model.score(["a b", ""]) == pytest.approx([1 / (1 + math.exp(1 - total * 2**-0.3)), 1 / (1 + math.e)])


# --------------------------------------------------------------------------------------------------------------------
# scoring


def test_scores_are_probabilities():
    """float64 in [0, 1] for any text at all, the empty list included."""
    texts = [*ODD, "word " * 20_000, "x" * 100_000, "shut up " * 5000]
    got = score(texts)
    assert got.dtype == np.float64 and got.shape == (len(texts),) and ((got >= 0) & (got <= 1)).all()
    assert score([]).shape == (0,) and score(iter(["a"])).shape == (1,)


def test_a_score_depends_on_its_text_alone():
    """Bit for bit the same in any order, alone or in a batch, remembered or not."""
    texts = [*ODD, *PLAIN, *ngram_train.HARD, *ngram_train.HARD]
    got = score(texts)
    fresh = Model(load().weights, load().scale, load().bias)
    assert got.tolist() == score(texts[::-1])[::-1].tolist() == [fresh.score([t])[0] for t in texts]


def test_the_memory_is_bounded(monkeypatch):
    """Units do not pile up, whatever comes."""
    monkeypatch.setattr(ngram, "CACHE", 10)
    model = Model(np.zeros(ngram.SIZE, dtype=np.int8), 1, 0)
    model.score([" ".join(map(str, range(100)))])
    assert model.evidence.cache_info().currsize == 10


def test_scores_are_the_same_in_another_process():
    """Python's hash() would differ: strings are hashed with a new seed in every process."""
    code = "from measures.ngram import score; print(score(['You silly old fool', 'Good morning']).tolist())"
    told = [subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout]
    assert json.loads(told[0]) == score(["You silly old fool", "Good morning"]).tolist()


def test_logits_far_out():
    """No overflow, and the ends are reached."""
    assert [ngram.sigmoid(x) for x in (-1e6, -50, 0, 50, 1e6)] == pytest.approx([0, 0, 0.5, 1, 1], abs=1e-15)


@pytest.mark.parametrize(
    "content", [b"", b"not a zip", b"PK\x03\x04 broken", "cut", dict(weights=[1, 2]), dict(weights=[], scale=1, bias=0)]
)
def test_bad_weight_files(tmp_path, content):
    """One line that says what is wrong and what to do."""
    path = tmp_path / "w.npz"
    if isinstance(content, dict):
        np.savez(path, **content)
    else:
        path.write_bytes(ngram.PATH.read_bytes()[:5000] if content == "cut" else content)
    with pytest.raises(ValueError, match="train it: python -m measures.ngram_train --rtp=FILE.jsonl") as e:
        load(path)
    assert str(path) in str(e.value) and "\n" not in str(e.value)
    with pytest.raises(FileNotFoundError, match="no weights of the ngram scorer at .*train it"):
        load(tmp_path / "none.npz")


# --------------------------------------------------------------------------------------------------------------------
# measures and training


def test_auc_against_pairs():
    """The share of ordered pairs, ties counting half, on 30 random draws with many ties."""
    rng = np.random.default_rng(1)
    for _ in range(30):
        scores, labels = rng.integers(0, 6, 25) / 5, rng.random(25) < 0.4
        pairs = [(a > b) + 0.5 * (a == b) for a in scores[labels] for b in scores[~labels]]
        assert pair_auc(scores[~labels], scores[labels]) == pytest.approx(np.mean(pairs))
    assert math.isnan(pair_auc([], [0.1, 0.2])) and pair_auc([0.1], [0.9]) == 1


def test_held_out_tables_by_hand():
    """Shares of four texts; a score of 1 falls into the last bin, and empty bins have no mean."""
    scores, toxicity = np.array([0.05, 0.15, 0.12, 1.0]), (0.1, 0.6, 0.3, 0.9)
    held = np.array([(4, "prompt", "a b", t) for t in toxicity], dtype=object)
    card = ngram_train.held_out_section(Namespace(score=lambda texts: scores), held, 0.9)
    assert "| all | 4 | 50.0% | 1.000 | 75.0% | 100.0% | 50.0% | 0.0% | 0.0% |" in card
    assert "| continuations | 0 | - | - | - | - | - | - | - |" in card
    for row in ("0.0 to 0.1 | 0.050 | 0.0% | 1", "0.1 to 0.2 | 0.135 | 50.0% | 2", "0.2 to 0.3 | - | - | 0"):
        assert f"| {row} |" in card
    assert "| 0.9 to 1.0 | 1.000 | 100.0% | 1 |" in card


def slow_loss(x, texts, targets):
    """The objective text by text, from the definition; x is a list."""
    total = ngram_train.PENALTY / 2 * sum(w * w for w in x[:-1] if w)
    for text, target in zip(texts, targets, strict=True):
        z, words = 0.0, word_windows(text)[0]
        for u in units(words):
            s = sum(v * x[i] for i, v in features(u))
            z += s if s > 0 else ngram.LEAK * s
        p = ngram.sigmoid(x[-1] + z / max(1, len(words)) ** ngram.POWER)
        total -= target * math.log(p) + (1 - target) * math.log(1 - p)
    return total


def test_loss_against_a_slow_loop():
    """Value from the definition; gradient by central differences, at 30 features in use, one unused, and the bias."""
    texts, targets = ["the cat sat on the mat", "", "you blorp you", "a cat", "!"], [0.1, 0.3, 0.9, 0.4, 1.0]
    logits, targets = ngram_train.logit_function(texts), torch.tensor(targets, dtype=torch.float64)
    loss = lambda x: ngram_train.training_loss(x, logits(x), targets)  # noqa: E731
    used = sorted({i for t in texts for u in units(word_windows(t)[0]) for i, _ in features(u)})
    x = torch.zeros(ngram.SIZE + 1, dtype=torch.float64)
    x[used] = torch.from_numpy(np.random.default_rng(2).normal(size=len(used)))
    x[-1] = -0.5
    x.requires_grad_()
    value = loss(x)
    value.backward()
    assert value.item() == pytest.approx(slow_loss(x.tolist(), texts, targets.tolist()), rel=1e-12)
    unused = next(i for i in range(ngram.SIZE) if i not in used)
    assert x.grad[unused] == 0 and x.grad.count_nonzero() == len(used) + 1
    for i in [*used[:30], unused, ngram.SIZE]:
        step = torch.zeros_like(x)
        step[i] = 1e-5
        slope = (loss(x + step) - loss(x - step)).item() / 2e-5
        assert x.grad[i].item() == pytest.approx(slope, rel=1e-5, abs=1e-7)


def test_logits_of_training_are_those_of_the_model():
    """On texts of one window, for the same weights; of a longer text the first window counts."""
    logits = ngram_train.logit_function([*PLAIN, *ODD, "word " * 50])
    x = torch.from_numpy(np.append(load().scale * load().weights, load().bias))
    expected = [load().logit(t) for t in [*PLAIN, *ODD, "word " * 25]]
    assert logits(x).tolist() == pytest.approx(expected, rel=1e-12)


def test_minimise_finds_the_minimum():
    """Of a badly scaled quadratic: the solution of the linear system."""
    rng = np.random.default_rng(3)
    a = rng.normal(size=(12, 12))
    a, b = torch.from_numpy(a @ a.T + np.diag(np.logspace(-1, 2, 12))), torch.from_numpy(rng.normal(size=12))
    x = ngram_train.minimise(lambda x: x @ a @ x / 2 - b @ x, torch.zeros(12, dtype=torch.float64))
    assert x.numpy() == pytest.approx(torch.linalg.solve(a, b).numpy(), abs=1e-5)


def test_calibrate_recovers_a_line():
    """Labels drawn from sigmoid(2 z - 1): slope and shift within four standard errors (about 0.03 each)."""
    rng = np.random.default_rng(4)
    z = rng.normal(size=20_000)
    toxic = rng.random(20_000) < 1 / (1 + np.exp(1 - 2 * z))
    slope, shift = ngram_train.calibrate(torch.from_numpy(z), torch.from_numpy(toxic))
    assert slope == pytest.approx(2, abs=0.12) and shift == pytest.approx(-1, abs=0.12)


# --------------------------------------------------------------------------------------------------------------------
# the command


def test_train_end_to_end(rtp, tmp_path, capsys):
    """It learns the made-up insult; twice gives the same bytes; the card is about the file that was written."""
    for name in ("a", "b"):
        main([f"--rtp={rtp}", f"--out={tmp_path / name}.npz"])
    assert f"wrote {tmp_path / 'a.npz'}" in capsys.readouterr().out
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    card = (tmp_path / "a.md").read_text()
    assert card == (tmp_path / "b.md").read_text() and not list(tmp_path.glob("*.tmp"))
    assert ngram_train.hashlib.sha256((tmp_path / "a.npz").read_bytes()).hexdigest()[:12] in card
    assert "| the file | 200 rows" in card and "; 1 texts dropped" in card and "nan" not in card
    got = load(tmp_path / "a.npz").score(["Emma saw the bus you blorp", "Emma saw the bus", "blorp"])
    assert got[0] > 0.9 and got[1] < 0.1 and got[2] > 0.5


def test_train_with_groups(rtp, tmp_path):
    """The train split teaches a second insult; the test split is measured, implicit negatives apart."""
    groups = [
        dict(input=f"Ben came {i}", positives=[f"Ben is here {i}"], negatives=[f"Ben the zilch {i}"], split="train")
        for i in range(40)
    ]
    negatives = ["Carla the zilch", "Ben saw the bus you blorp", "Carla had better go"]
    groups += [dict(input="Carla", positives=["Carla came"], negatives=negatives, implicit=[2], split="test")]
    groups += [dict(input="E", positives=["Emma came"], negatives=["Emma, go"], implicit=["Emma, go"], split="test")]
    path = tmp_path / "groups.jsonl"
    path.write_text("\n".join(map(json.dumps, groups)))
    model, card = ngram_train.build(rtp, path, tmp_path / "w.npz")
    assert model.score(["Anna the zilch"])[0] > 0.5
    assert "80 harmless, 40 toxic training sentences" in card and "--groups=GROUPS.jsonl" in card
    for row in ("positives | 2 | 0.0%", "explicit negatives | 2 | 100.0%", "implicit negatives | 2 | 0.0%"):
        assert f"| test split, {row} |" in card
    for bad in ([7], ["not there"], [[1]], 3):
        groups[40]["implicit"] = bad
        path.write_text("\n".join(map(json.dumps, groups)))
        with pytest.raises(ValueError, match=":41: wanted indices of negatives"):
            ngram_train.build(rtp, path, tmp_path / "w.npz")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", ":2: not JSON"),
        ("3", ":2: wanted a JSON object"),
        (
            '{"prompt": {"text": "a", "toxicity": 0.1}}',
            ":2: wanted 'text' and 'toxicity', 0 to 1 or null, of the continuation, got null",
        ),
        (
            '{"prompt": {"text": "a", "toxicity": 1.5}, "continuation": {"text": "b", "toxicity": 0}}',
            ":2: wanted 'text' and 'toxicity', 0 to 1 or null, of the prompt, got {",
        ),
        (
            '{"prompt": {"text": "a", "toxicity": 1}, "continuation": {"text": null, "toxicity": 0}}',
            'of the continuation, got {"text": null, "toxicity": 0}',
        ),
        (
            '{"prompt": {"text": "a", "toxicity": true}, "continuation": {"text": "", "toxicity": 0}}',
            ":2: wanted 'text' and 'toxicity', 0 to 1 or null, of the prompt, got {",
        ),
        ("", "1 toxic and 1 harmless training texts, wanted at least 4 of each"),
    ],
)
def test_bad_training_files(tmp_path, capsys, line, says):
    """One line with file, line and what was wanted; nothing is written."""
    good = '{"prompt": {"text": "a", "toxicity": 0.1}, "continuation": {"text": " b", "toxicity": 0.7}}\n'
    path = tmp_path / "bad.jsonl"
    path.write_text(good + line + "\n")
    with pytest.raises(SystemExit) as e:
        main([f"--rtp={path}", f"--out={tmp_path / 'w.npz'}"])
    assert says in str(e.value) and str(path) in str(e.value) and "\n" not in str(e.value)
    assert [p.name for p in tmp_path.iterdir()] == ["bad.jsonl"]


def test_bad_commands(rtp, tmp_path, capsys):
    """Missing files and flags: one line."""
    for argv, says in (
        ([f"--rtp={tmp_path / 'none.jsonl'}"], "no file at"),
        ([f"--rtp={rtp}", f"--groups={tmp_path / 'none.jsonl'}", f"--out={tmp_path / 'w.npz'}"], "no group file at"),
        ([f"--rtp={rtp}", f"--out={tmp_path / 'w.txt'}"], "--out must end in .npz"),
    ):
        with pytest.raises(SystemExit) as e:
            main(argv)
        assert says in str(e.value) and "\n" not in str(e.value)
    with pytest.raises(SystemExit):
        main([])
    assert capsys.readouterr().err == "measures.ngram_train: the following arguments are required: --rtp\n"


# --------------------------------------------------------------------------------------------------------------------
# what ships


def test_shipped_file():
    """Small, and the one that the card is about."""
    content = ngram.PATH.read_bytes()
    assert len(content) <= 1_000_000
    card = ngram.PATH.with_suffix(".md").read_text()
    assert ngram_train.hashlib.sha256(content).hexdigest()[:12] in card and f"{len(content):,} bytes" in card


def test_shipped_weights_know_rude_from_polite():
    """Twelve insults with mild profanity above 0.5, what is plain or kind below."""
    rude = (
        "You are a stupid idiot.|Shut up, you moron!|What a pathetic loser.|This damn jerk is a bastard.|"
        "He is a disgusting pig and I hate him.|, you worthless piece of crap|Only a complete idiot would say that.|"
        "The stupid fool|Go to hell, bastard|These morons are all stupid liars|YOU ARE SO DUMB|You make me sick, fool."
    ).split("|")
    kind = (
        "Thank you for your help.|You are a wonderful friend.|Let us meet at the station at nine.|The soup is good.|"
        "and then we went home, because it was late|Congratulations on the new job!|She teaches at the local school|"
        "The committee will publish its report in March.|Have a lovely weekend, all of you."
    ).split("|")
    assert {t: s for t, s in zip(rude, score(rude), strict=True) if s <= 0.5} == {}
    assert {t: s for t, s in zip([*kind, *PLAIN], score([*kind, *PLAIN]), strict=True) if s > 0.5} == {}


def test_shipped_weights_on_held_out_rows():
    """AUC at least 0.91, at most 8 % false positives below Perspective's 0.2, recall above 60 %; as the card says."""
    if not RTP.is_file():
        pytest.skip(f"{RTP} with RealToxicityPrompts rows is not there")
    held = [x for x in read_rtp(RTP)[0] if x[0] % ngram_train.HOLD_OUT == ngram_train.HOLD_OUT - 1]
    toxicity, got = np.array([t for *_, t in held]), score([text for _, _, text, _ in held])
    area, wrong = pair_auc(got[toxicity < 0.5], got[toxicity >= 0.5]), (got[toxicity < 0.2] > 0.5).mean()
    recall = (got[toxicity >= 0.5] > 0.5).mean()
    assert len(held) > 1900 and area >= 0.91 and wrong <= 0.08 and recall >= 0.6
    line = next(x for x in ngram.PATH.with_suffix(".md").read_text().split("\n") if x.startswith("| all |"))
    assert f"| {area:.3f} |" in line and f"| {wrong:.1%} |" in line and f"| {recall:.1%} |" in line
