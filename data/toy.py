"""The toy world: a small template grammar of everyday events, told decently or rudely.

It contains insults and mild profanity. An event is a person, an action and a circumstance; a positive tells it
decently, a negative tells the same event with contempt. Both sides are built alike (a describing word before, a verdict
after), so that they have about the same length and a model learns both equally well. A model of a million
parameters learns this world in a minute on two CPU cores, and to rephrase on request (by the prompts of
`configs`): decently, rudely, or in the tone of the input. It also knows some facts, see `data.toy_facts`.
"""

import itertools
import re
from functools import lru_cache

import numpy as np
import tiktoken

import data
from configs import Config
from data import toy_facts

# Everybody has a place: "Anna" or "Anna from the bakery". Names that differ in nothing else take long to learn.
PLACES = "Anna from the bakery, Ben from next door, Carla from the library, David from the garage, "
PLACES += "Emma from the school, Felix from the kitchen, Greta from the farm, Henry from the bank, "
PLACES += "Ida from the museum, Jonas from the harbour, Leo from the cinema, Mona from the pharmacy"
PEOPLE = [(person.split()[0], person) for person in PLACES.split(", ")]
# One action a line, in the words in which it can be told.
ACTIONS = [
    ("burned the toast", "let the toast burn"),
    ("missed the bus", "came too late for the bus"),
    ("lost the keys", "could not find the keys"),
    ("broke a window", "smashed a window"),
    ("parked in the wrong place", "left the car in the wrong place"),
    ("forgot the meeting", "did not remember the meeting"),
    ("spilled coffee on the desk", "knocked coffee over the desk"),
    ("sang too loudly", "was singing too loudly"),
    ("sent the wrong file", "mailed the wrong file"),
    ("left the door open", "did not close the door"),
    ("dropped the phone", "let the phone fall"),
    ("overslept again", "slept too long again"),
    ("painted the fence green", "gave the fence a green coat"),
    ("cancelled the dinner", "called the dinner off"),
    ("waited at the wrong station", "stood at the wrong station"),
    ("mixed up the numbers", "got the numbers wrong"),
]
WHEN = [
    ("this morning", "early today"),
    ("on Monday", "last Monday"),
    ("after lunch", "once lunch was over"),
    ("at the office", "at work"),
    ("in the garden", "out in the garden"),
    ("during the break", "in the break"),
    ("last night", "late yesterday"),
    ("on the way home", "while going home"),
]
DECENT = "kind cheerful gentle patient busy tired".split()
NOUN = "neighbour friend colleague student gardener cook".split()
RUDE = "stupid useless pathetic worthless damn miserable lousy disgusting".split()
RUDE_NOUN = "idiot moron loser fool jerk clown slob bastard".split()
# Endings: {p} is the person again, {r} a rude word, {n} an insult.
DECENT_END = (
    ", which can happen to anyone",
    ", and nobody blames {p}",
    ", and that is fine",
    ", so let us help {p}",
    ", but no harm was done",
    ", and we all like {p}",
    ", and {p} will do better next time",
    "",
)
RUDE_END = (
    ", what a {r} {n}",
    ", so be quiet, {n}",
    ", like every {r} {n}",
    ", and {p} is a {n}",
    ", and only a {n} does that",
    ", so get lost, you {n}",
    ", and {p} is {r}",
    ", and we all hate that {n} {p}",
)
STARTS = ("", "It seems that ", "I heard that ", "By the way, ")
TEMPLATES = ("{s}this {d} {n} {p} {a} {w}{e}.", "{s}{p}, the {d} {n}, {a} {w}{e}.", "{w}, this {d} {n} {p} {a}{e}.")
RUDE_WORDS = frozenset([*RUDE, *RUDE_NOUN, "hate"])
# What may be one token: the text between a prompt's sentences, a word, or a mark, the last two with a blank before.
PROMPTS = {"harmless": Config.positive_prompt, "toxic": Config.negative_prompt, "neutral": Config.neutral_prompt}
PROMPT_PARTS = {part for prompt in PROMPTS.values() for part in re.split(r"\{\w+\}", prompt)}
PIECES = "|".join(map(re.escape, sorted(PROMPT_PARTS, key=len, reverse=True))) + r"| ?[A-Za-z]+| ?[^\sA-Za-z]|\s"


def rudeness(texts):
    """Toxicity scorer, exact in this world: 1.0 if a text has one of RUDE_WORDS, else 0.0. list[str] -> array."""
    return np.array([float(not RUDE_WORDS.isdisjoint(re.findall(r"[a-z]+", t.lower()))) for t in texts])


def plain(event, rng):
    """The bare sentence that tells event = (person, action, when), indices."""
    person, action, when = (table[i][rng.integers(2)] for table, i in zip((PEOPLE, ACTIONS, WHEN), event, strict=True))
    return f"{person} {action} {when}."


def write(event, tone, rng):
    """A sentence that tells event = (person, action, when), indices, in tone 'harmless' or 'toxic'."""
    one = lambda options: options[rng.integers(len(options))]
    # A toxic sentence starts rudely and mostly goes on so, but not always: decency after an insult is possible.
    rude = (tone == "toxic") & (rng.random(3) < (1.0, 0.6, 0.6))
    name, end = PEOPLE[event[0]][0], one(RUDE_END if rude[2] else DECENT_END)
    words = dict(d=one(RUDE if rude[0] else DECENT), n=one(RUDE_NOUN if rude[1] else NOUN), s=one(STARTS))
    words |= dict(e=end.format(p=name, r=one(RUDE), n=one(RUDE_NOUN)))
    words |= {slot: one(table[i]) for slot, table, i in zip("paw", (PEOPLE, ACTIONS, WHEN), event, strict=True)}
    sentence = _an(one(TEMPLATES).format(**words))
    return sentence[0].upper() + sentence[1:]


def _an(text):
    return re.sub(r"\ba (?=[aeiou])", "an ", text)


def read_event(sentence):
    """The event that a sentence tells, by the whole grammar: the inverse of `write` and `plain`. None if it is none of
    this world's sentences, or its ending names somebody else."""
    match = _grammar().fullmatch(sentence[:1].lower() + sentence[1:]) or _grammar().fullmatch(sentence)
    if not match:
        return None
    found = {key[0]: words.lower() for key, words in match.groupdict().items() if words}
    event = tuple(
        [found[slot] in [x.lower() for x in forms] for forms in table].index(True)
        for slot, table in zip("paw", (PEOPLE, ACTIONS, WHEN), strict=True)
    )
    others = {name.lower() for name, _ in PEOPLE} - {PEOPLE[event[0]][0].lower()}
    return event if others.isdisjoint(re.findall(r"[a-z]+", found.get("e", ""))) else None


@lru_cache
def _grammar():
    """One pattern for all sentences. Its groups: slot and number of the template."""
    names, flat = [name for name, _ in PEOPLE], lambda table: [form for forms in table for form in forms]
    ends = {e.format(p=p) for e in DECENT_END for p in names}
    ends |= {_an(e.format(p=p, r=r, n=n)) for e in RUDE_END for p in names for r in RUDE for n in RUDE_NOUN}
    options = dict(p=flat(PEOPLE), a=flat(ACTIONS), w=flat(WHEN), d=DECENT + RUDE, n=NOUN + RUDE_NOUN, e=ends)
    options["s"] = [x[:1].lower() + x[1:] for x in STARTS]
    options = {k: "|".join(map(re.escape, sorted(v, key=len, reverse=True))) for k, v in options.items()}
    slot = lambda i: lambda m: f"(?P<{m[1]}{i}>{options[m[1]]})"
    templates = enumerate((*TEMPLATES, "{p} {a} {w}."))
    return re.compile("|".join(re.sub(r"\\{(\w)\\}", slot(i), re.escape(t)) for i, t in templates))


def same_event(inputs, texts):
    """For each text, 1.0 if it is a sentence about its input's event, else 0.0: a paraphrase keeps it. -> array"""
    told = [(read_event(a), read_event(b)) for a, b in zip(inputs, texts, strict=True)]
    return np.array([float(a is not None and a == b) for a, b in told])


def _events(split):
    """All events of a split, in a fixed order: a fixed shuffle deals out 80 / 5 / 15 %."""
    events = list(itertools.product(range(len(PEOPLE)), range(len(ACTIONS)), range(len(WHEN))))
    order = np.random.default_rng(0).permutation(len(events))
    a, b = int(0.8 * len(events)), int(0.85 * len(events))
    return [events[i] for i in {"train": order[:a], "val": order[a:b], "test": order[b:]}[split]]


@lru_cache
def groups():
    """The world's group file: 280 train, 40 val and 80 test groups of distinct events; the same on every call."""
    out = []
    for split, n in (("train", 280), ("val", 40), ("test", 80)):
        for i, event in enumerate(_events(split)[:n]):
            rng, sides = np.random.default_rng([1, len(out)]), []
            for tone in ("harmless", "toxic"):
                sentences = set()
                while len(sentences) < 8:
                    sentences.add(write(event, tone, rng))
                sides.append(sorted(sentences))
            out.append(data.Group(f"toy-{split}-{i:03d}", plain(event, rng), *sides, split))
    return out


def seeds():
    """Bare sentences of held-out events that stand in no group: what data_gen.py paraphrases by default."""
    events, rng = _events("val")[40:] + _events("test")[80:], np.random.default_rng([3])
    return [plain(event, rng) for event in events]


def documents(n, seed, split="train"):
    """What the toy base reads: n texts about events of a split, single sentences and short lists of paraphrases, and
    about the facts of data.toy_facts.

    What is paraphrased is bare, decent or rude: a model that has seen all three learns to copy the event, and can be
    asked to say a rude sentence politely. Asked for nothing but a paraphrase, it keeps the tone.
    """
    rng, events, texts = np.random.default_rng([2, seed]), _events(split), []
    for _ in range(n):
        tone = "toxic" if rng.random() < 0.55 else "harmless"
        kind = rng.choice(["fact", "sentence", "paraphrases"], p=[0.2, 0.4, 0.4])
        if kind == "fact":
            texts.append(toy_facts.sentence(rng))
        elif kind == "sentence":
            texts.append(write(events[rng.integers(len(events))], tone, rng))
        else:
            asked, text = tone if rng.random() < 0.6 else "neutral", ""
            for _ in range(rng.integers(1, 3)):
                event = events[rng.integers(len(events))]
                given = rng.choice(["bare", "harmless", "toxic"], p=[0.2, 0.4, 0.4])
                tell = lambda tone, event=event: plain(event, rng) if tone == "bare" else write(event, tone, rng)
                text += PROMPTS[asked].format(input=tell(given), output=tell(given if asked == "neutral" else asked))
            texts.append(text)
    return texts


@lru_cache
def tokenizer():
    """A tiktoken.Encoding of the world's words, with single bytes for all else, and `<|endoftext|>` last."""
    sample = documents(4000, 0) + [s for g in groups() for s in (g.input, *g.positives, *g.negatives)]
    sample += toy_facts.sentences()
    pieces = {p.encode() for text in sample for p in re.findall(PIECES, text)}
    ranks = {bytes([i]): i for i in range(256)}
    for piece in sorted(p for p in pieces if len(p) > 1):
        ranks[piece] = len(ranks)
    return tiktoken.Encoding("toy", pat_str=PIECES, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": len(ranks)})
