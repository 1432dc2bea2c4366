"""data_gen.py: filters and choice against hand-made cases, and whole runs with a model that paraphrases toy sentences
by rule, so that its answers are known."""

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from test_data import read_toy

import data
import data_gen
from configs import Config, load_config
from data import toy
from data.prompts import answer, form_filter, prompt_for
from measures.scorers import get_scorer
from measures.statistics import jaccard, word_overlap
from model import GPT, GPTConfig

ROOT = Path(__file__).resolve().parents[1]
TEMPLATES = (Config.positive_prompt, Config.negative_prompt)
FLAGS = [
    "configs/toy_data.py",
    "--init_from=BASE",
    "--seeds=SEEDS",
    "--batch_size=3",
    "--k=6",
    "--rounds=5",
    "--n_pos=3",
    "--n_neg=3",
    "--shots=1",
    "--min_overlap=0.3",
]


def parrot(model, idx, lengths, max_new, temperature, top_k, top_p, stop, noise, k, prefix):
    """In the place of GPT.generate: answers each prompt with a toy sentence of its own event in the tone that was asked
    for; now and then with something else. All that it does depends on its random numbers alone."""
    tokenizer = toy.tokenizer()
    tokens, count = torch.zeros(len(noise), max_new, dtype=torch.long), torch.zeros(len(noise), dtype=torch.long)
    for i, row in enumerate(noise):
        prompt = tokenizer.decode(idx[i // k, : lengths[i // k]].tolist())
        source, asked = prompt.split('"')[1], "toxic" if "Rude" in prompt else "harmless"
        rng = np.random.default_rng(int(row[0, 0] * 2**24))
        event, kind = read_toy(source)[0], rng.integers(8)
        other = toy._events("train")[rng.integers(100)]
        text = {
            0: toy.write(event, asked, rng),  # no closing mark
            1: toy.write(event, {"toxic": "harmless", "harmless": "toxic"}[asked], rng) + '"',
            2: toy.write(other, asked, rng) + '"',
            3: source + '"',
        }.get(int(kind), toy.write(event, asked, rng) + '"\n')
        ids = tokenizer.encode_ordinary(text)[:max_new]
        ends = [j for j, t in enumerate(ids) if t in stop]
        ids = ids[: ends[0] + 1] if ends else ids
        tokens[i, : len(ids)], count[i] = torch.tensor(ids), len(ids)
    return tokens, count


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with an untrained toy GPT-2."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=toy.tokenizer().n_vocab, n_positions=128, n_embd=32, n_layer=2, n_head=2))
    folder = tmp_path_factory.mktemp("base")
    model.save_pretrained(folder)
    return str(folder)


def write_seeds(path, n):
    """A seeds file with n sentences of the toy world, drawn at random, with their ids and splits."""
    seeds, _ = data_gen.read_seeds(Config(seeds="toy"))
    rows = [seeds[i] for i in sorted(np.random.default_rng([0, 7]).permutation(len(seeds))[:n])]
    groups = [dict(id=s.id, input=s.text, positives=["A."], negatives=["B."], split=s.split) for s in rows]
    path.write_text("".join(json.dumps(g) + "\n" for g in groups))
    return str(path)


@pytest.fixture
def flags(base, tmp_path):
    seeds = write_seeds(tmp_path / "seeds.jsonl", 10)
    return [f.replace("BASE", base).replace("SEEDS", seeds) for f in FLAGS]


@pytest.fixture
def settings(flags, tmp_path):
    def load(*more):
        return load_config("data_gen", [*flags, f"--out_dir={tmp_path / 'mine'}", *more])

    return load


@pytest.fixture
def parroting(monkeypatch):
    monkeypatch.setattr(GPT, "generate", parrot)


def files(folder):
    """The two files of a run: groups and log."""
    return Path(folder) / "groups.jsonl", Path(folder) / "groups.log.jsonl"


def read(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


# --------------------------------------------------------------------------------------------------------------------
# filters


@pytest.mark.parametrize(
    ("text", "closed", "reason"),
    [
        ("The bus is late.", True, None),
        ("Is it 4 p.m. yet?", True, None),
        ("The dog said 'no.'", True, None),
        ("3 buses are late!", True, None),
        ("The bus is late.", False, "no closing mark"),
        ("", True, "empty"),
        ("Polite: The bus is late.", True, "holds prompt text"),
        ("The bus Sentence: is late.", True, "holds prompt text"),
        ("the bus is late.", True, "no sentence"),
        ("The bus is late", True, "no sentence"),
        ("...", True, "no sentence"),
        ("The bus is late. So am I.", True, "more than one sentence"),
        ("Why? The bus is late.", True, "more than one sentence"),
    ],
)
def test_well_formed(text, closed, reason):
    assert form_filter(text, closed, TEMPLATES) == reason


def test_length_is_a_ratio_of_tokens():
    config = Config(min_length=0.5, max_length=2.0)
    found = [data_gen.length_filter(n / 10, config) for n in (4, 5, 10, 20, 21)]
    assert found == ["too short", None, None, None, "too long"]


def test_a_paraphrase_is_neither_off_topic_nor_a_copy():
    """By content words: order, frequent words and endings do not matter; a copy has more than MAX_SAME of all words."""
    seed = "The bus to the harbour was late again on Monday."  # bus, harbo, late, monda
    for least, text, reason in [
        (0.75, "On Mondays a late bus leaves the harbour.", None),  # 4 of (4 + 5) / 2
        (0.5, "That bus is never on time on Mondays.", None),  # 2 of (4 + 3) / 2
        (0.6, "That bus is never on time on Mondays.", "off topic"),
        (0.01, "The train to the town was here again on Friday.", "off topic"),  # six words, all of them frequent
        (0.5, "the bus to the harbour was late, again, on Monday!", "copy"),
        (0.5, "On Monday the bus to the harbour was again late.", "copy"),
        (0.5, "The bus to the harbour was late again on that Monday.", None),  # 9 of 10 words
    ]:
        assert data_gen.meaning_filter(seed, text, Config(min_overlap=least)) == reason, text


def test_toxicity_has_a_threshold_for_each_side():
    config = Config(max_toxicity=0.3, min_toxicity=0.6)
    assert [data_gen.toxicity_filter(x, "positive", config) for x in (0.3, 0.31)] == [None, "too toxic"]
    assert [data_gen.toxicity_filter(x, "negative", config) for x in (0.59, 0.6)] == ["not toxic", None]


def test_the_nearest_are_the_hard_ones():
    """By |phi - median| + |log(tokens / median)|, each of which can decide, in the order in which they came."""

    def nearest(samples, positives, n):
        return [samples.index(s) for s in data_gen.closest_to_positives(samples, positives, n)]

    positives = [dict(phi=p, tokens=n) for p, n in ((2.0, 10), (2.2, 10), (2.1, 10), (9.0, 30))]
    assert nearest(positives, positives, 3) == [0, 1, 2]  # centre 2.15, 10: the odd one is left out
    negatives = [dict(phi=p, tokens=n) for p, n in ((4.0, 10), (2.2, 11), (2.2, 40), (1.9, 10), (2.15, 5))]
    assert nearest(negatives, positives, 2) == [1, 3]
    assert nearest(negatives, positives, 3) == [1, 3, 4]
    assert nearest(negatives, positives, 9) == [0, 1, 2, 3, 4]


# --------------------------------------------------------------------------------------------------------------------
# seeds and demonstrations


def test_lines_are_named_dealt_out_and_cleaned(tmp_path):
    file = tmp_path / "mine.txt"
    lines = [f'Line  {i} says "no". ' for i in range(10)]
    file.write_text("\n\n".join([*lines, "LINE 3 says 'no'."]) + "\n")
    seeds, repeats = data_gen.read_seeds(Config(seeds=str(file)))
    assert repeats == 1 and [s.text for s in seeds] == [f"Line {i} says 'no'." for i in range(10)]
    assert [s.id for s in seeds[:3]] == ["mine-0001", "mine-0003", "mine-0005"]  # lines of the file
    assert Counter(s.split for s in seeds) == dict(train=7, val=1, test=2)


def test_inputs_of_groups_keep_id_and_split(tmp_path):
    file = tmp_path / "groups.jsonl"
    rows = [dict(id=f"g{i}", input=f"Input {i}.", positives=["A."], negatives=["B."], split="test") for i in range(3)]
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    seeds, repeats = data_gen.read_seeds(Config(seeds=str(file)))
    assert [(s.id, s.text, s.split) for s in seeds] == [(f"g{i}", f"Input {i}.", "test") for i in range(3)]
    assert repeats == 0


def test_seeds_of_the_toy_world_stand_in_no_group_and_no_document():
    seeds, repeats = data_gen.read_seeds(Config(seeds="toy"))
    events = {read_toy(s.text)[0] for s in seeds}
    assert len(events) == len(seeds) > 150 and not repeats
    assert events.isdisjoint(read_toy(g.input)[0] for g in toy.groups())
    assert events.isdisjoint(toy._events("train"))


def test_demonstrations_are_the_same_groups_in_two_tones(tmp_path):
    config = Config(demos="toy", shots=3)
    shown, inputs = data_gen.draw_demonstrations(config, [])
    groups = {g.input: g for g in toy.groups()}
    assert len(inputs) == 3 and all(groups[i].split == "train" for i in inputs)
    for side, word in (("positive", "Polite"), ("negative", "Rude")):
        lines = shown[side].splitlines()
        assert len(lines) == 6 and [x.split('"')[1] for x in lines[::2]] == [i for i in lines_inputs(shown)]
        for ask, reply in zip(lines[::2], lines[1::2], strict=True):
            assert reply.startswith(word + ": ")
            assert reply.split('"')[1] in getattr(groups[ask.split('"')[1]], side + "s")
    assert data_gen.draw_demonstrations(config, []) == (shown, inputs)
    assert data_gen.draw_demonstrations(Config(demos="toy", shots=3, seed=1), [])[1] != inputs


def lines_inputs(shown):
    return [line.split('"')[1] for line in shown["positive"].splitlines()[::2]]


def test_demonstrations_are_the_nearest_of_those_drawn(tmp_path, monkeypatch):
    """By the sum over both sides; the nearest paraphrase of a side is shown, but no copy."""
    file = tmp_path / "groups.jsonl"
    far, near = "Nobody knew what time it was.", "By nine the red train had left the station."
    lazy, rude = "Shut up, you fool.", "By nine the damn red train had left the stupid station, idiot."
    rows = []
    for i, (positives, negatives) in enumerate([([far], [rude]), ([near], [lazy]), ([far, near], [rude, lazy])] * 8):
        source = f"The red train left the station at nine o'clock {i}."
        rows.append(dict(id=f"g{i}", input=source, positives=[source, *positives], negatives=negatives, split="train"))
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    shown, inputs = data_gen.draw_demonstrations(Config(demos=str(file), shots=3), [])  # 24 are drawn, 8 are near
    assert inputs <= {r["input"] for r in rows[2::3]} and len(inputs) == 3
    assert shown["positive"].count(near) == 3 == shown["negative"].count(rude)
    assert far not in str(shown) and lazy not in str(shown)
    monkeypatch.setattr(data_gen, "CHOICE", 1)
    _, inputs = data_gen.draw_demonstrations(Config(demos=str(file), shots=8), [])
    assert not inputs <= {r["input"] for r in rows[2::3]}  # 8 are drawn at random


def test_seeds_do_not_demonstrate_if_others_can():
    train = [g for g in toy.groups() if g.split == "train"]
    seeds = [data_gen.Seed(g.id, g.input, "train") for g in train[:-2]]
    _, inputs = data_gen.draw_demonstrations(Config(demos="toy", shots=2), seeds)
    assert inputs == {g.input for g in train[-2:]}


def test_too_few_demonstrations_are_refused():
    with pytest.raises(ValueError, match="toy has 280 groups of split train: lower --shots=281"):
        data_gen.draw_demonstrations(Config(demos="toy", shots=281), [])


# --------------------------------------------------------------------------------------------------------------------
# sampling


def test_noise_belongs_to_seed_prompt_and_round():
    config, seed = Config(k=3), data_gen.Seed("a", "A.", "train")
    draw = data_gen.sampling_noise(config, seed, "positive", 0, 5)
    assert draw.shape == (3, 5, 4) and 0 <= draw.min() and draw.max() < 1
    assert torch.equal(data_gen.sampling_noise(config, seed, "positive", 0, 9)[:, :5], draw)
    others = [
        data_gen.sampling_noise(Config(k=3, seed=1), seed, "positive", 0, 5),
        data_gen.sampling_noise(config, data_gen.Seed("b", "A.", "train"), "positive", 0, 5),
        data_gen.sampling_noise(config, seed, "negative", 0, 5),
        data_gen.sampling_noise(config, seed, "positive", 1, 5),
    ]
    assert not any(torch.equal(draw, o) for o in others)


def test_samples_of_a_real_model_do_not_depend_on_the_batch(settings):
    """The real generate with a real prefix: seeds together, alone, and written plainly as one long prompt."""
    config = settings("--temperature=1", "--k=4")
    seeds, _ = data_gen.read_seeds(config)
    seeds = seeds[:3]
    sampler = data_gen.Sampler(config, seeds)
    seeds, _ = data_gen.usable_seeds(sampler, seeds)
    together = data_gen.sample_answers(sampler, seeds, "negative", 2)
    alone = [data_gen.sample_answers(sampler, [s], "negative", 2)[0] for s in seeds]
    assert together == alone and len({text for rows in together for text, _ in rows}) > 6
    shown, _ = data_gen.draw_demonstrations(config, seeds)
    for s, answers in zip(seeds, together, strict=True):
        prompt = shown["negative"] + prompt_for(config.negative_prompt, s.text)
        ids = [sampler.tokenizer.eot_token, *sampler.tokenizer.encode_ordinary(prompt)]
        longest = s.max_new
        random = data_gen.sampling_noise(config, s, "negative", 2, longest)
        how = (longest, 1.0, 0, config.top_p, sampler.stop["negative"], random, 4)
        tokens, count = sampler.model.generate(torch.tensor([ids]), torch.tensor([len(ids)]), *how)
        rows = [row[:n] for row, n in zip(tokens.tolist(), count.tolist(), strict=True)]
        texts = [sampler.tokenizer.decode([t for t in row if t != sampler.tokenizer.eot_token]) for row in rows]
        assert [answer(config.negative_prompt, t) for t in texts] == answers


# --------------------------------------------------------------------------------------------------------------------
# whole runs


def test_a_run_writes_groups_that_hold(settings, parroting, monkeypatch, capsys):
    monkeypatch.setattr(data_gen, "MAX_JACCARD", 0.6)  # toy paraphrases differ in many words
    config = settings()
    records = data_gen.generate_groups(config)
    said = capsys.readouterr().out
    file, log = files(config.out_dir)
    groups = read(file)
    assert len(records) == 10 and len(groups) == sum(not r["why"] for r in records) >= 5
    seeds = {s.id: s for s in data_gen.read_seeds(config)[0]}
    for g in groups:
        seed = seeds[g["id"]]
        assert (g["input"], g["split"]) == (seed.text, seed.split)
        for name, tone in (("positives", "harmless"), ("negatives", "toxic")):
            assert len(g[name]) == len(set(g[name])) == 3 == len(g["sampling"][name])
            assert all(jaccard(a, b) <= data_gen.MAX_JACCARD for a, b in itertools.combinations(g[name], 2))
            for text, how in zip(g[name], g["sampling"][name], strict=True):
                assert read_toy(text)[1] == tone and how["toxicity"] == (tone == "toxic")
                assert how["prompt"] == name[:-1] and 0 <= how["round"] < 5 and 0 <= how["sample"] < 6
                assert how["overlap"] >= 0.3 and how["overlap"] == round(word_overlap(seed.text, text), 4)
                assert jaccard(seed.text, text) <= data_gen.MAX_SAME
                assert how["tokens"] == len(toy.tokenizer().encode_ordinary(text))
        assert g["sampling"]["seed"] == 0
    assert [x.id for x in data.read_groups(file)] == [g["id"] for g in groups]  # train.py's reader takes it
    assert read(log)[1:] == records
    for side in data_gen.SIDES:
        count = data_gen.count_outcomes(records, side)
        assert f"{count['accepted']}" in said and count.total() % 6 == 0  # every sample is counted once
        assert {"accepted", "no closing mark", "off topic", "near-duplicate"} <= set(count)
    assert max(len(line) for line in said.splitlines() if "/" not in line) <= 100  # but for pytest's long paths
    assert "too toxic" in said and "not toxic" in said and said.count("  + ") == 9 == said.count("  - ")


def test_phi_is_that_of_the_sentence_alone(settings, parroting, tmp_path):
    config = settings(f"--seeds={write_seeds(tmp_path / 'three.jsonl', 3)}")
    data_gen.generate_groups(config)
    model, tokenizer = GPT.from_pretrained(config.init_from), toy.tokenizer()
    for g in read(files(config.out_dir)[0]):
        for name in ("positives", "negatives"):
            for text, how in zip(g[name], g["sampling"][name], strict=True):
                idx, lengths = data.pad([data.frame(text, tokenizer, 99)])
                assert how["phi"] == pytest.approx(model.sequence_nll(idx, lengths).item(), abs=1e-4)


def test_surplus_finds_harder_negatives(settings, parroting, monkeypatch):
    """With more to choose from, the chosen lie nearer to the positives than all that passed."""
    monkeypatch.setattr(data_gen, "SURPLUS", 4)
    monkeypatch.setattr(data_gen, "MAX_JACCARD", 1)
    config = settings("--rounds=9")
    matches = [r["match"] for r in data_gen.generate_groups(config) if not r["why"]]
    before, after = (
        np.mean([abs(m[k][1] - m["positives"][1]) + abs(np.log(m[k][0] / m["positives"][0])) for m in matches])
        for k in ("before", "after")
    )
    assert after < before


@pytest.mark.parametrize("batch_size", [1, 4, 10])
def test_groups_do_not_depend_on_the_block_size(settings, parroting, batch_size, tmp_path):
    data_gen.generate_groups(settings())
    want = files(tmp_path / "mine")[0].read_bytes()
    other = settings(f"--batch_size={batch_size}", f"--out_dir={tmp_path / 'other'}")
    data_gen.generate_groups(other)
    got = files(tmp_path / "other")[0].read_bytes()
    strip = lambda b: [{k: v for k, v in json.loads(x).items() if k != "sampling"} for x in b.splitlines()]  # noqa: E731
    assert strip(got) == strip(want)


def test_resumed_after_any_cut_it_ends_the_same(settings, parroting, tmp_path, capsys):
    """Files as a kill leaves them: the log cut anywhere, the groups with all that the log knows or more."""
    config = settings()
    data_gen.generate_groups(config)
    file, log = files(tmp_path / "mine")
    want, words = (file.read_bytes(), log.read_bytes()), capsys.readouterr().out.split("s in all")[0]
    rng = random.Random(0)
    head = want[1].index(b"\n") + 1
    for _ in range(8):
        cut = rng.randrange(head, len(want[1]))
        known = sum(not json.loads(x)["why"] for x in want[1][:cut].split(b"\n")[1:-1])
        least = len(b"".join(x + b"\n" for x in want[0].split(b"\n")[:known]))
        log.write_bytes(want[1][:cut])
        file.write_bytes(want[0][: rng.randrange(least, len(want[0]) + 1)])
        data_gen.generate_groups(settings("--resume"))
        assert (file.read_bytes(), log.read_bytes()) == want
        resumed = capsys.readouterr().out
        assert resumed.split("10 seeds")[1].split("s in all")[0][:-4] == words.split("10 seeds")[1][:-4]


@pytest.mark.parametrize(
    ("records", "more", "groups", "left"),
    [
        (-1, b"", None, 10),  # the log is empty
        (-1, b'{"seed": 0, "dt', None, 10),  # its first line is cut
        (0, b"", None, 10),  # the log is begun, the groups are not
        (6, b"", 3, 4),  # the second block is in the log, its groups are not yet written
        (6, b"", 3.5, 4),  # they are half written
        (3, b'{"id": "toy', 3, 7),  # a line of the log is cut
        (5, b'{"id": "toy', 3, 7),  # a block of the log is cut
        (3, b"", 6, 7),  # the groups are ahead of the log
        (6, b"", None, 4),  # they are lost
        (9, b'{"id": "toy', 9, 1),  # the last block, which is smaller, is cut
        (10, b"", 9, 0),  # only its groups are missing
    ],
)
def test_resume_at_each_moment(settings, parroting, monkeypatch, tmp_path, records, more, groups, left):
    """Whatever a kill has left, the files end the same, and no whole block is sampled twice. (A kill between the two
    files once made --resume refuse for ever.)"""
    data_gen.generate_groups(settings())
    file, log = files(tmp_path / "mine")
    want = file.read_bytes(), log.read_bytes()
    lines, rows = want[1].splitlines(keepends=True), want[0].splitlines(keepends=True)
    complete = lambda n: sum(not json.loads(line)["why"] for line in lines[1 : 1 + n])  # noqa: E731
    assert 0 < complete(3) < complete(6) < complete(9) < complete(10)
    log.write_bytes(b"".join(lines[: 1 + records]) + more)
    file.unlink()
    if groups:
        half = rows[complete(int(groups))][:99] if groups % 1 else b""
        file.write_bytes(b"".join(rows[: complete(int(groups))]) + half)
    sampled, sample_block = [], data_gen.sample_block
    monkeypatch.setattr(data_gen, "sample_block", lambda s, seeds: sampled.extend(seeds) or sample_block(s, seeds))
    data_gen.generate_groups(settings("--resume"))
    assert (file.read_bytes(), log.read_bytes()) == want and len(sampled) == left


def test_a_finished_run_only_tells_again(settings, parroting, tmp_path, monkeypatch, capsys):
    data_gen.generate_groups(settings())
    file, _ = files(tmp_path / "mine")
    before, said = file.read_bytes(), capsys.readouterr().out
    monkeypatch.setattr(data_gen, "sample_block", None)
    data_gen.generate_groups(settings("--resume"))
    assert file.read_bytes() == before
    assert capsys.readouterr().out.split("10 seeds")[1][:900] == said.split("10 seeds")[1][:900]


def test_resume_without_anything_begins(settings, parroting, tmp_path):
    data_gen.generate_groups(settings("--resume"))
    assert len(read(files(tmp_path / "mine")[0])) >= 5


SLOW = """
import sys, time
sys.path[:0] = [{root!r}, {tests!r}]
import torch
torch.set_num_threads(1)
import data_gen, test_data_gen
from model import GPT
def slow(*args):
    time.sleep(0.02)
    return test_data_gen.parrot(*args)
GPT.generate = slow
data_gen.main(sys.argv[1:])
"""


def test_three_real_kills(settings, flags, tmp_path, parroting):
    """SIGKILL at three moments, each time resumed; the last time to the end."""
    data_gen.generate_groups(settings(f"--out_dir={tmp_path / 'whole'}"))
    script = tmp_path / "slow.py"
    script.write_text(SLOW.format(root=str(ROOT), tests=str(ROOT / "tests")))
    command = [sys.executable, str(script), *flags, f"--out_dir={tmp_path / 'killed'}", "--resume"]
    (file, log), killed = files(tmp_path / "killed"), 0
    for lines in (1, 3, 7):  # of the log, that are there when it happens
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and (not log.exists() or log.read_bytes().count(b"\n") < lines):
            time.sleep(0.005)
        time.sleep(0.03)
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
    assert killed == 3
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    whole = files(tmp_path / "whole")
    assert file.read_bytes() == whole[0].read_bytes()
    assert log.read_bytes() == whole[1].read_bytes()


# --------------------------------------------------------------------------------------------------------------------
# bad input: one line


def stops(capsys, flags):
    with pytest.raises(SystemExit) as e:
        data_gen.main(flags)
    said = e.value.code if isinstance(e.value.code, str) else capsys.readouterr().err
    assert said.count("\n") <= 1, said
    return said


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--seeds="], "or a group file, as --seeds=FILE"),
        (["--seeds=EMPTY"], "holds no sentence"),
        (["--seeds=nowhere.txt"], "no text file at nowhere.txt"),
        (["--seeds=LONG"], "none of the 2 seeds can be used (2 too long for the context)"),
        (["--shots=6"], "demonstrations take"),
        (["--shots=999"], "toy has 280 groups of split train: lower --shots=999"),
        (["--demos=nowhere.jsonl"], "no group file at nowhere.jsonl"),
        (["--min_overlap=1.1"], "min_overlap must be at most 1, got 1.1"),
        (["--min_length=2", "--max_length=1"], "min_length=2.0 is above max_length=1.0"),
        (["--positive_prompt=Say it politely"], "positive_prompt must hold {input}, then {output}"),
        (["--negative_prompt={output} of {input}."], "negative_prompt must hold {input}, then {output}"),
        (["--min_toxicity=1.5"], "min_toxicity must be at most 1"),
        (["--scorer=file:nowhere.jsonl"], "nowhere.jsonl"),
        (["--init_from=nowhere"], "nowhere"),
        (["--max_length=0.6", "--min_length=0.6"], "no group is complete: none of"),
    ],
)
def test_bad_input_is_one_line(flags, parroting, tmp_path, capsys, more, words):
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "long.txt").write_text("\n".join(f"Line {i} " + "and so on " * 60 for i in range(2)))
    for name, path in {"EMPTY": str(tmp_path / "empty.txt"), "LONG": str(tmp_path / "long.txt")}.items():
        more = [m.replace(name, path) for m in more]
    assert words in stops(capsys, [*flags, f"--out_dir={tmp_path / 'mine'}", *more])


def test_other_settings_do_not_go_on(settings, parroting, tmp_path):
    data_gen.generate_groups(settings())
    with pytest.raises(ValueError, match="groups.jsonl exists: add --resume"):
        data_gen.generate_groups(settings())
    with pytest.raises(ValueError, match=r"made with another k \(6\), temperature \(0.6\): give the same, or"):
        data_gen.generate_groups(settings("--resume", "--temperature=0.9", "--k=7"))
    write_seeds(tmp_path / "seeds.jsonl", 9)
    with pytest.raises(ValueError, match=r"was made with another seeds \('.*/seeds.jsonl, crc32"):
        data_gen.generate_groups(settings("--resume"))
    files(tmp_path / "mine")[1].unlink()
    with pytest.raises(ValueError, match="groups.log.jsonl is missing, without which .*groups.jsonl cannot go on"):
        data_gen.generate_groups(settings("--resume"))


def test_seeds_that_cannot_be_used_are_counted(settings, parroting, tmp_path, capsys):
    file = tmp_path / "some.txt"
    good = [s.text for s in data_gen.read_seeds(Config(seeds="toy"))[0][:8]]
    shown = sorted(data_gen.draw_demonstrations(settings(), [])[1])
    file.write_text("\n".join([*good, good[0], "And so on " * 60, *shown]))
    data_gen.generate_groups(settings(f"--seeds={file}"))
    said = " ".join(capsys.readouterr().out.split())  # the line is wrapped
    assert ": 8; " in said or ": 9; " in said
    assert "1 left out: too long for the context" in said and "1 left out: repeats another" in said


def test_nothing_accepted_is_said_at_once_and_at_the_end(settings, parroting, capsys):
    with pytest.raises(ValueError, match="none of 300 samples became a positive .*off topic.*lower --min_overlap$"):
        data_gen.generate_groups(settings("--min_overlap=1"))
    said = capsys.readouterr()
    assert "NOTE none of 90 samples became a positive" in said.out + said.err
    assert "off topic" in said.out


def test_the_other_attribute(monkeypatch):
    """configs/gpt2_formal_data.py: its scorer tells its demonstrations apart with a margin, its prompts are its own."""
    config = load_config("data_gen", [str(ROOT / "configs/gpt2_formal_data.py")])
    scorer = get_scorer(config.scorer)
    groups = data.read_groups(ROOT / config.demos)
    assert len(groups) >= config.shots and all(g.split == "train" for g in groups)
    for g in groups:
        assert max(scorer(g.positives)) <= config.max_toxicity and min(scorer(g.negatives)) >= config.min_toxicity
    assert scorer(["The train is late."]).tolist() == [0.5]
    monkeypatch.chdir(ROOT)
    shown, _ = data_gen.draw_demonstrations(config, [])
    assert shown["positive"].count("Formal: ") == shown["negative"].count("Informal: ") == config.shots


def test_help_and_import_need_nothing(tmp_path):
    run = subprocess.run(
        [sys.executable, str(ROOT / "data_gen.py"), "--help"], cwd=tmp_path, capture_output=True, text=True
    )
    assert run.returncode == 0 and "--seeds" in run.stdout and "--out_dir" in run.stdout and not os.listdir(tmp_path)


def test_from_any_folder(flags, tmp_path):
    """The real command with a model that knows nothing: it runs to the end, and says what became of it."""
    command = [sys.executable, str(ROOT / "data_gen.py"), *flags, "--rounds=1"]
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 1 and "10 seeds" in run.stdout and "no closing mark" in run.stdout
    assert run.stderr.splitlines()[-1].startswith("data_gen.py: no group is complete: none of 60 samples")
    assert (tmp_path / "out/toy_data/groups.log.jsonl").is_file()
