"""What is measured, and by what: scorers, samples, steering, rewriting, texts, tasks, statistics; tables, figures."""

from dataclasses import dataclass

import torch

import data
from configs import find
from engine.device import amp, keep_freed_memory, pick_device, pick_dtype
from measures.scorers import get_scorer as get_scorer
from measures.scorers import get_scorers
from model import GPT


@dataclass
class Setup:
    """What every script opens first: models on one device, and what reads and judges texts."""

    models: dict  # {title: GPT}
    tokenizer: object
    scorer: object
    device: torch.device
    dtype: torch.dtype  # of matrix products
    others: tuple = ()  # scorers that give a second opinion

    def amp(self):
        return amp(self.device, self.dtype)


def open_setup(config, sources, build=None, scores_file=None):
    """The Setup that the settings mean, with its header printed.

    sources: {title: a name or path for GPT.from_pretrained}. build(source, tokenizer) -> GPT takes that one's place.
    scores_file: where scores are kept; without it the scorer has to judge texts as they are made.
    """
    device = pick_device(config.device)
    if device.type == "cpu":
        keep_freed_memory()
    tokenizer, (scorer, *others) = data.get_tokenizer(config.tokenizer), get_scorers(config.scorer, scores_file)
    if not (scorer.function or scores_file):
        raise ValueError(f"scorer {scorer.name!r} cannot judge newly written text: give ngram or module:function")
    build = build or (lambda source, tokenizer: GPT.from_pretrained(find(source), tokenizer.n_vocab))
    models = {title: build(source, tokenizer).to(device) for title, source in sources.items()}
    for title, model in models.items():
        size = f"{model.num_parameters() / 1e6:.1f} M parameters, context {model.config.n_positions}"
        print(f"{title:<12} {sources[title]}: {size}")
    dtype, reason = pick_dtype(config.dtype, device, model.config.n_embd)
    print(f"device       {device}, products in {str(dtype)[6:]}: {reason}")
    for one in (scorer, *others):
        print(f"scorer       {one.name}, sha256 {one.hash}...")
    return Setup(models, tokenizer, scorer, device, dtype, tuple(others))
