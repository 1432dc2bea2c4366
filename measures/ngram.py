"""The built-in toxicity scorer: a hashed n-gram logistic regression, numpy and the standard library only.

    from measures.ngram import score
    score(["Have a nice day.", ...])  # array of probabilities, one per text

measures/ngram_train.py made the weights, ngram.npz, and ngram.md, which says what the scorer is good for and where it
fails.

A text is the set of its units: words and pairs of neighbouring words. A word's features are itself and the character
n-grams within it, so that what was learned about a word serves its inflections and misspellings; a pair has one
feature. With the weights w of the features, the number of words n, and s_u = sum_f value_f w_f for the evidence of u:

    logit = bias + n^-POWER sum_u max(s_u, LEAK s_u)

LEAK = 1 would be plain logistic regression. Below 1, decent words make up for a rude one only in part, as they do for
people. That is also why the sum drifts upwards with length, and longer texts are cut into windows: see `word_windows`.

A unit's evidence is a function of the unit alone and is remembered, which makes scoring fast.
"""

import io
import math
import re
import unicodedata
import zlib
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import numpy as np

PATH = Path(__file__).with_suffix(".npz")
WORD = re.compile(r"[\w*@$#]+(?:['’]\w+)*")  # letters may be masked: d*mn, $tupid
WINDOW = 40  # words judged together; no training text is longer
SIZE = 2**18  # hashed features; a power of two
CACHE = 2**17  # units whose evidence is remembered

# Chosen by four-fold cross-validation inside the training rows, for AUC; all are flat optima. So are ngram_train.py's.
GRAMS = (4, 5)  # lengths of character n-grams; < and > mark the ends of a word
GRAM_VALUE = 3.0  # norm of a word's n-grams together, beside 1 for the word itself
PAIR_VALUE = 0.3  # on 5,000 rows pairs hardly matter
LEAK = 0.5
POWER = 0.3


def word_windows(text):
    """The words of a text, in pieces of at most WINDOW words and about equal length; at least one, perhaps empty."""
    words = WORD.findall(unicodedata.normalize("NFKC", text).casefold())
    n = max(1, -(-len(words) // WINDOW))
    return [words[len(words) * i // n : len(words) * (i + 1) // n] for i in range(n)]


def units(words):
    """Distinct words and pairs of neighbours ('a b'), in the order in which they come."""
    return list(dict.fromkeys(words)) + [f"{a} {b}" for a, b in dict.fromkeys(pairwise(words))]


def features(unit):
    """[(index below SIZE, value)] of a unit's features. CRC-32 is the same everywhere, hash() is not."""
    if " " in unit:
        return [(bucket(unit), PAIR_VALUE)]
    word = f"<{unit}>"
    grams = [word[i : i + n] for n in GRAMS for i in range(len(word) - n + 1)]
    value = GRAM_VALUE / math.sqrt(max(1, len(grams)))
    return [(bucket(word), 1.0), *((bucket(gram), value) for gram in grams)]


def bucket(text):
    return zlib.crc32(text.encode("utf-8", "surrogatepass")) % SIZE


class Model:
    """Weights as int8 (SIZE,) times `scale`, and a bias. It judges each text alone, so batches do not matter."""

    def __init__(self, weights, scale, bias):
        self.weights, self.scale, self.bias = weights, float(scale), float(bias)
        self.table = weights.tolist()  # a list's items are found faster one by one than an array's
        self.evidence = lru_cache(CACHE)(self._evidence)

    def _evidence(self, unit):
        """max(s, LEAK s) of a unit."""
        s = self.scale * sum(value * self.table[i] for i, value in features(unit))
        return max(s, LEAK * s)

    def logit(self, text):
        """Of the text's most toxic window."""
        logits = []
        for words in word_windows(text):
            logits.append(self.bias + sum(map(self.evidence, units(words))) * max(1, len(words)) ** -POWER)
        return max(logits)

    def score(self, texts):
        """list[str] -> (n,) float64 in [0, 1]."""
        return np.array([sigmoid(self.logit(text)) for text in texts], dtype=np.float64)

    def to_bytes(self):
        """The .npz file."""
        file = io.BytesIO()
        np.savez_compressed(file, weights=self.weights, scale=self.scale, bias=self.bias)
        return file.getvalue()


def sigmoid(x):
    return 1 / (1 + math.exp(-max(x, -700)))  # exp(710) overflows


@lru_cache(1)
def load(path=PATH):
    """The Model of a file. Raises FileNotFoundError or ValueError with one line."""
    again = "take it from the repository, or train it: python -m measures.ngram_train --rtp=FILE.jsonl"
    if not Path(path).is_file():
        raise FileNotFoundError(f"no weights of the ngram scorer at {path}: {again}")
    try:
        with np.load(path) as file:
            weights, scale, bias = (file[name] for name in ("weights", "scale", "bias"))
        if weights.shape != (SIZE,) or weights.dtype != np.int8 or not np.isfinite([scale, bias]).all():
            raise ValueError(f"wanted int8 weights ({SIZE},), a scale and a bias, both finite")
    except Exception as e:  # a damaged archive can fail in many ways
        reason = " ".join(str(e).split())
        raise ValueError(f"{path} is no weight file of the ngram scorer ({type(e).__name__}: {reason}): {again}") from e
    return Model(weights, scale, bias)


def score(texts):
    """Probability that each text is toxic: list[str] -> (n,) float64 in [0, 1].

    Toxic means what Perspective gave at least 0.5 in 2020. Of texts beyond WINDOW words, the worst window counts.
    """
    return load().score(texts)
