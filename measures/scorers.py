"""Toxicity scorers: what judges a text, from the built-in n-gram model, any function, or a file of scores."""

import hashlib
import importlib
import json
import re
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

from configs import find
from data import is_score, wrong
from engine.run import append, atomic_write, parse_records, read_text

ROWS = 256  # texts per call of a scorer: what is lost at most when one fails


def get_scorer(name, cache=None):
    """The scorer that a name stands for: list[str] -> array (n,) of toxicity in [0, 1].

    'ngram' is the built-in one; 'module:function' any callable from texts to numbers; 'file:scores.jsonl' looks the
    texts up in JSON lines {"text", "score"}, appends those that are missing there with a null for others to fill in,
    and answers nan for them. `cache` names a file in which scores are kept and found again, by scorer and hash.
    Raises ValueError if there is no such scorer.
    """
    kind, _, rest = name.partition(":")
    if kind == "file" and rest:
        path = find(rest)
        return Scorer(name, None, _sha256(path) if path.is_file() else "new", path)
    if name == "ngram" or (kind and rest):
        return Scorer(name, *_load("measures.ngram:score" if name == "ngram" else name), cache)
    raise ValueError(f"scorer {name!r}: wanted ngram, module:function, or file:SCORES.jsonl")


def get_scorers(names, cache=None):
    """The scorers of names with commas between, 'module:function,ngram': each once. A comma in the path of a file of
    scores is none of these, since no name of a scorer begins behind it."""
    return [get_scorer(name, cache) for name in dict.fromkeys(re.split(r",\s*(?=ngram(?:,|$)|[\w.]+:)", names))]


class Scorer:
    """A callable with .name and .hash that remembers what it has judged. A missing score is never a 0.

    function: None for a file of scores; path: that file, or the cache, or None.
    """

    def __init__(self, name, function, hash, path):
        self.name, self.function, self.hash, self.known = name, function, hash, {}
        self.path = Path(path) if path else None
        self.whose = dict(scorer=name, hash=hash) if function else {}  # marks its records in a cache
        self.open_end = False  # the file's last line lacks its line break
        if self.path and self.path.exists():
            try:
                self._read()
            except ValueError as e:
                raise ValueError(f"{e}: delete this file, its scores are made again") if function else e from None

    def _read(self):
        hint = "damaged" if self.function else 'give a .jsonl, {"text", "score"} a line'
        text = read_text(self.path, "score file", hint)
        if text.lstrip().startswith("["):
            raise ValueError(f"{self.path}: wanted JSON lines, to which others can be added, got an array")
        self.open_end = text[-1:] not in ("", "\n")
        if self.function and self.open_end:  # an interruption cut the cache's last line
            text = text[: text.rfind("\n") + 1]
            atomic_write(self.path, text)
            self.open_end = False
        for where, record in parse_records(text, self.path, hint):
            if not isinstance(record.get("text"), str) or not is_score(record.get("score", "none")):
                raise wrong(where, '{"text": ..., "score": 0 to 1, or null}', record)
            if self.whose.items() <= record.items():
                self.known[record["text"]] = record["score"]

    def __call__(self, texts):
        texts = list(texts)
        new = [t for t in dict.fromkeys(texts) if t not in self.known]
        for i in tqdm(range(0, len(new), ROWS), desc=f"scoring ({self.name})", leave=False, delay=1):
            rows = new[i : i + ROWS]
            scores = self._checked(rows) if self.function else [None] * len(rows)
            self.known.update(zip(rows, scores, strict=True))
            if self.path:
                self._append(rows, scores)
        return np.array([self.known[t] for t in texts], dtype=float)  # None becomes nan

    def _checked(self, texts):
        try:
            scores = np.asarray(self.function(texts), dtype=float)
        except Exception as e:  # whatever a foreign function's trouble is, it must not pass for a score
            raise ValueError(f"scorer {self.name!r} failed on {len(texts)} texts: {type(e).__name__}: {e}") from e
        if scores.shape != (len(texts),):
            raise ValueError(f"scorer {self.name!r} gave values of shape {scores.shape} for {len(texts)} texts")
        for text, score in zip(texts, scores.tolist(), strict=True):
            if not 0 <= score <= 1:  # nor is nan
                raise ValueError(f"scorer {self.name!r} gave {score} for {text[:80]!r}, wanted a number in [0, 1]")
        return scores.tolist()

    def _append(self, texts, scores):
        records = [dict(text=text, score=score) | self.whose for text, score in zip(texts, scores, strict=True)]
        append(self.path, "\n" * self.open_end + "".join(json.dumps(r) + "\n" for r in records))
        self.open_end = False


def _load(name):
    """(function, hash of the file that defines it and of the weights beside it) of 'module:function'."""
    module, _, function = name.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")  # a scorer in the working folder
    try:
        module = importlib.import_module(module)
        score, source = getattr(module, function), Path(module.__file__)
    except Exception as e:  # importing a foreign module can fail in any way
        raise ValueError(f"scorer {name!r} cannot be loaded: {type(e).__name__}: {e}: check name and PYTHONPATH") from e
    if not callable(score):
        raise ValueError(f"scorer {name!r} is a {type(score).__name__}, wanted a function of a list of texts")
    weights = source.with_suffix(".npz")
    return score, _sha256(source, *([weights] if weights.is_file() else []))


def _sha256(*files):
    return hashlib.sha256(b"".join(Path(f).read_bytes() for f in files)).hexdigest()[:12]
