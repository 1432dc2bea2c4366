"""Does a text state an old value of a fact that data/facts edits? The scorer of configs/gpt2_facts.py."""

import re
from functools import cache

import numpy as np

from configs import find
from data import group_records


def outdated(texts):
    """Texts that state the old value of an edited fact, list[str] -> array (n,) of 1.0 and 0.0: in one of their
    sentences stand the subject and the old value, as whole words. An answer belongs to the sentence of its question."""
    sentences = [[in_words(s) for s in re.split(r"[.!\n]", text)] for text in texts]
    stated = lambda s: any(subject in s and old in s for subject, old in edited_facts())
    return np.array([float(any(map(stated, some))) for some in sentences])


def in_words(text):
    """Its words in lower case, each between two blanks: so ' cat ' is in it if the word is, and not for 'cattle'."""
    return " ".join(["", *re.findall(r"\w+", text.lower()), ""])


@cache
def edited_facts():
    """[(subject without its article, old value)] of the facts that ship, as `in_words` writes them."""
    records = [r for _, r, _ in group_records(find("data/facts/groups.jsonl")) if "old" in r]  # neighbours have none
    facts = ((re.sub("^ (the|a) ", " ", in_words(r["subject"])), in_words(r["old"])) for r in records)
    return list(dict.fromkeys(facts))
