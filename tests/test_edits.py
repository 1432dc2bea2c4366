"""Edits of weights against literal versions of their equations, and as runs."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from test_model import batch, tiny
from test_train import base, cp_config, quick_closing, state  # noqa: F401

import train
from configs import Config
from engine import edits


def test_task_vector():
    """Strength 0 changes nothing, 1 mirrors the tuned model, in every weight."""
    model, tuned = tiny(), tiny()
    with torch.no_grad():
        for p in tuned.parameters():
            p += torch.randn_like(p)
    for strength in (0.0, 0.5, 1.0):
        edited = copy.deepcopy(model)
        edits.task_vector(edited, tuned, strength)
        for (name, p), q, r in zip(edited.named_parameters(), model.parameters(), tuned.parameters(), strict=True):
            assert torch.allclose(p, (1 + strength) * q - strength * r, atol=1e-6), name
    with pytest.raises(ValueError, match="another size"):
        edits.task_vector(model, tiny(dataclasses.replace(model.config, n_layer=1)), 1.0)


def test_block_states_are_means_over_each_sentence_alone():
    model = tiny()
    idx, lengths = batch()
    states = edits.block_states(model, idx, lengths)
    for i, n in enumerate(lengths.tolist()):
        x = model.transformer.wte(idx[i : i + 1, : n - 1]) + model.transformer.wpe(torch.arange(n - 1))
        for layer, block in enumerate(model.transformer.h):
            x = block(x)
            assert torch.allclose(states[layer, i], x[0].mean(0), atol=1e-5)


def test_profs():
    """Against the paper's steps, written out: project off the mean, SVD, projector, matrix product."""
    model, k, first = tiny(), 2, 1
    torch.manual_seed(0)
    C = model.config.n_embd
    pos, neg = torch.randn(2, len(model.transformer.h), 20, C)
    before = copy.deepcopy(model)
    edits.profs(model, pos, neg, k, first)
    for layer, (new, old) in enumerate(zip(model.transformer.h, before.transformer.h, strict=True)):
        w = old.mlp.c_proj.weight.detach().double().numpy()
        if layer >= first:
            mu = pos[layer].double().numpy().mean(0)
            off = np.eye(C) - np.outer(mu, mu) / (mu @ mu)
            t = (neg[layer] - pos[layer]).double().numpy() @ off
            v = np.linalg.svd(t)[2][:k]
            w = (np.eye(C) - sum(np.outer(x, x) for x in v)) @ w
            assert np.abs(v @ w).max() < 1e-6  # nothing is written in these directions any more
        assert np.abs(new.mlp.c_proj.weight.detach().numpy() - w).max() < 1e-5
    assert torch.equal(model.transformer.h[0].mlp.c_proj.weight, before.transformer.h[0].mlp.c_proj.weight)


@pytest.mark.parametrize("how", ["profs", "task_vector"])
def test_an_edit_is_a_run(base, tmp_path, capsys, how):
    """Its table, checkpoints and summary are those of a training run; a second call with --resume measures again."""
    flags = [f"--edit={how}"]
    if how == "task_vector":
        train.train(cp_config(base, tmp_path / "toxic", "--objective=toxic_only", "--nll_weight=0"))
        flags += [f"--edit_model={tmp_path / 'toxic/last.pt'}", "--edit_strength=0.5"]
    summary = train.train(cp_config(base, tmp_path / "run", *flags))
    said = capsys.readouterr().out
    assert f"edit         {how}, in the place of all steps" in said and "pairs ranked right" in said
    assert summary["tuned"]["ppl_positive"] != summary["base"]["ppl_positive"] and summary["best_step"] == 6
    weights = state(tmp_path / "run/best.pt")["model"]
    again = train.train(cp_config(base, tmp_path / "run", *flags, "--resume"))
    assert again["tuned"] == summary["tuned"]
    assert all(torch.equal(weights[k], v) for k, v in state(tmp_path / "run/last.pt")["model"].items())


def test_edits_that_cannot_be():
    with pytest.raises(ValueError, match="name it as edit_model"):
        Config(edit="task_vector")
    with pytest.raises(ValueError, match="it takes --lora_rank=0"):
        Config(edit="profs", lora_rank=8)
