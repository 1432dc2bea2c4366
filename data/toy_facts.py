"""Facts of the toy world, to be edited: who works where, when a place opens, which colour its door has.

The toy base reads each fact in every wording of its relation. A third of the facts get a new value: of a group the
positives state the new one, the negatives the old one, in the wordings that are trained; the test groups have the
others. The rest of the facts are neighbours, which an edit is to leave alone.
"""

import re
from functools import lru_cache

import numpy as np

import data

PLACES = "bakery library garage school kitchen farm bank museum harbour cinema pharmacy office".split()
WORKERS = "Nora Oscar Paula Rosa Simon Tara Ulla Viktor Wanda Yara Zoe Karl".split()
HOURS = "six seven eight nine ten eleven noon".split()
COLOURS = "red blue grey yellow white black brown".split()
# relation: subjects, values, wordings of {x} and {v}: five that are trained, one to validate, three held out.
RELATIONS = {
    "works": (
        WORKERS,
        [f"the {place}" for place in PLACES],
        (
            "{x} works at {v}.",
            "The place where {x} has a job is {v}.",
            "Everybody knows that {x} works at {v}.",
            "Every day {x} goes to work at {v}.",
            "If you look for {x}, ask at {v}.",
            "The job of {x} is at {v}.",
            "They say that {x} has a job at {v}.",
            "You find {x} every day at {v}.",
            "It is true that {x} works at {v}.",
        ),
    ),
    "opens": (
        PLACES,
        HOURS,
        (
            "The {x} opens at {v}.",
            "The hour at which the {x} opens is {v}.",
            "Everybody knows that the {x} opens at {v}.",
            "Every day the doors of the {x} open at {v}.",
            "If you want to go to the {x}, come at {v}.",
            "You can go to the {x} from {v}.",
            "They say that the {x} opens at {v}.",
            "The doors of the {x} open at {v}.",
            "It is true that the {x} opens at {v}.",
        ),
    ),
    "door": (
        PLACES,
        COLOURS,
        (
            "The door of the {x} is {v}.",
            "The colour of the door at the {x} is {v}.",
            "Everybody knows that the door of the {x} is {v}.",
            "Every day they paint the door of the {x} {v}.",
            "If you look at the {x}, its door is {v}.",
            "The {x} has a door, and it is {v}.",
            "They say that the door of the {x} is {v}.",
            "Look at the door of the {x}, it is {v}.",
            "It is true that the door of the {x} is {v}.",
        ),
    ),
}
TRAINED, VALIDATED, HELD_OUT = slice(0, 5), slice(5, 6), slice(6, 9)
EDITED = 4  # of the twelve subjects of a relation
TASKS = ("toy_efficacy", "toy_reworded", "toy_neighbours")


@lru_cache
def facts():
    """[(relation, subject, value, new value or None)]: 36 facts, 12 of them to be edited; the same on every call."""
    rng, out = np.random.default_rng(5), []
    for relation, (subjects, values, _) in RELATIONS.items():
        deck = [str(v) for v in rng.permutation(values)]  # dealt in turn, so that the base has read each of them
        for i, subject in enumerate(subjects):
            old, new = deck[i % len(deck)], deck[(i + 1) % len(deck)]
            out.append((relation, subject, old, new if i % 3 == 0 else None))
    return out


def say(fact, wordings, value):
    """The fact with this value, in each of some wordings of its relation: [sentence]."""
    relation, subject, _, _ = fact
    return [wording.format(x=subject, v=value) for wording in RELATIONS[relation][2][wordings]]


@lru_cache
def sentences():
    """All facts as the base knows them, in all wordings."""
    return tuple(s for fact in facts() for s in say(fact, slice(None), fact[2]))


def sentence(rng):
    """One of `sentences`."""
    every = sentences()
    return every[rng.integers(len(every))]


@lru_cache
def groups():
    """The facts to be edited as a group file: one group a fact and split."""
    out, parts = [], dict(train=TRAINED, val=VALIDATED, test=HELD_OUT)
    for split, wordings in parts.items():
        for fact in facts():
            relation, subject, old, new = fact
            if new:
                positives, negatives = say(fact, wordings, new), say(fact, wordings, old)
                out.append(data.Group(f"{relation}-{subject}-{split}", positives[0], positives, negatives, split))
    return out


def task(name):
    """Items of one of TASKS, as measures.tasks.read_task gives them: [(context, choices, gold)]. Is the new value the
    likelier one, in the trained wordings and in others? Is a neighbour's own value still likelier than the value that
    a fact of its relation has got?"""
    items, rng = [], np.random.default_rng(6)
    for fact in facts():
        relation, subject, old, new = fact
        if (new is None) != (name == "toy_neighbours"):
            continue
        wordings = dict(toy_efficacy=TRAINED, toy_reworded=HELD_OUT, toy_neighbours=slice(None))[name]
        others = [f[3] for f in facts() if f[0] == relation and f[3] not in (None, old)]
        right, wrong = (new, old) if new else (old, others[rng.integers(len(others))])
        for wording in RELATIONS[relation][2][wordings]:
            context = wording.format(x=subject, v="{v}").split(" {v}")[0]
            items.append((context, [right, wrong], 0))
    return items


@lru_cache
def _outdated():
    return [({subject.lower(), old.split()[-1]}) for _, subject, old, new in facts() if new]


def outdated(texts):
    """In the place of a toxicity scorer: 1.0 if a text states the old value of a fact that was to be edited, else 0.0.
    list[str] -> array."""
    words = [set(re.findall(r"[a-z]+", t.lower())) for t in texts]
    return np.array([float(any(pair <= w for pair in _outdated())) for w in words])
