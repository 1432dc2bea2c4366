"""LoRA: nothing at first, the same weights beneath, adapters alone in checkpoints, merged when a model is loaded."""

import copy
import dataclasses

import pytest
import torch
from test_model import batch, max_diff, tiny
from test_train import assert_same, base, cp_config, quick_closing, records, state, stop_after  # noqa: F401
from transformers import GPT2LMHeadModel

import train
from configs import Config
from model import GPT

LORA = ["--lora_rank=4", "--lr=1e-2"]


def tuned(targets="all", rank=2, alpha=3.0):
    """(model, the same with LoRA whose B is no longer 0)."""
    base = tiny()
    net = copy.deepcopy(base, {id(p): p for p in base.parameters()})
    torch.manual_seed(1)
    net.add_lora(rank, alpha, targets)
    return base, net


@pytest.mark.parametrize(("targets", "per_block"), [("all", 4), ("attn", 2), ("mlp", 2)])
def test_nothing_changes_at_first(targets, per_block):
    """Logits are the base's to the bit; trained are A and B of the named matrices alone; the weights are one copy."""
    plain, net = tuned(targets)
    idx, _ = batch()
    assert torch.equal(net(idx), plain(idx))
    trained = {k for k, p in net.named_parameters() if p.requires_grad}
    assert trained == set(net.trained_state()) and len(trained) == 2 * per_block * net.config.n_layer
    assert {p.data_ptr() for p in plain.parameters()} <= {p.data_ptr() for p in net.parameters()}


def test_it_adds_a_product_of_low_rank():
    """Against the weights with alpha / rank B A added by hand; gradients reach A and B, and no weight."""
    plain, net = tuned()
    with torch.no_grad():
        for p in (p for p in net.parameters() if p.requires_grad):
            p.copy_(torch.randn_like(p) * 0.1)
    other = copy.deepcopy(plain)
    for i, block in enumerate(net.transformer.h):
        for part in ("attn", "mlp"):
            for name, lora in getattr(block, part).named_children():
                weight = getattr(getattr(other.transformer.h[i], part), name).weight
                weight.data += 3.0 / 2 * lora.lora_b.detach() @ lora.lora_a.detach()
    idx, lengths = batch()
    assert max_diff(net(idx), other(idx)) < 1e-4
    net.sequence_nll(idx, lengths).sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in net.parameters())


def test_a_run_with_lora(base, tmp_path, capsys):
    """It learns; its checkpoints hold the adapters; what is loaded from them is the merged model, also in transformers;
    and the base beneath is untouched."""
    out = tmp_path / "run"
    summary = train.train(cp_config(base, out, *LORA))
    assert "trained      0.00 M" in capsys.readouterr().out.replace("0.01 M", "0.00 M")
    assert summary["tuned"]["ppl_positive"] != summary["base"]["ppl_positive"]
    saved = state(out / "best.pt")
    assert all(".lora_" in k for k in saved["model"]) and (out / "best.pt").stat().st_size < base.stat().st_size / 2
    net, before = GPT.from_pretrained(out / "best.pt"), GPT.from_pretrained(base)
    idx = torch.randint(400, (2, 20))
    assert max_diff(net(idx), before(idx)) > 1e-3
    net.save_pretrained(tmp_path / "merged")
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path / "merged").eval()
    assert max_diff(net(idx), theirs(idx).logits) < 1e-4


@pytest.mark.parametrize("flags", [LORA, []])
def test_what_is_frozen_is_cast_once(base, tmp_path, monkeypatch, flags):
    """In bf16 the frozen matrices are kept in it: the same numbers as autocast's own casts."""
    flags = [*flags, "--dtype=bfloat16", "--anchor_kl=1", "--anchor_texts=8"]
    config = cp_config(base, tmp_path / "once", *flags)
    run = train.set_up(cp_config(base, tmp_path / "set_up", *flags))
    weights = [run.base.transformer.h[0].mlp.c_fc.weight, run.base.transformer.wte.weight, run.model.lm_head.weight]
    assert [w.dtype for w in weights] == [torch.bfloat16, torch.float32, torch.float32]
    assert all(p.dtype == torch.float32 for p in run.model.parameters() if p.requires_grad)
    train.train(config)
    monkeypatch.setattr(GPT, "matrices", lambda self: [])
    train.train(dataclasses.replace(config, out_dir=str(tmp_path / "always")))
    assert records(tmp_path / "once") == records(tmp_path / "always")


def test_resume_is_exact(base, tmp_path):
    train.train(cp_config(base, tmp_path / "whole", *LORA))
    stop_after(4, cp_config(base, tmp_path / "parts", *LORA))
    train.train(cp_config(base, tmp_path / "parts", *LORA, "--resume"))
    assert_same(state(tmp_path / "whole/last.pt")["model"], state(tmp_path / "parts/last.pt")["model"])
    assert records(tmp_path / "whole") == records(tmp_path / "parts")


def test_there_must_be_something_to_add_to():
    with pytest.raises(ValueError, match="lora_rank adds to a model: init_from must name one, not 'scratch'"):
        Config(objective="lm", init_from="scratch", lora_rank=4)


def another_base(saved, base):
    other = torch.load(base, weights_only=True)
    other["model"]["transformer.h.0.attn.c_attn.weight"] += 0.1
    torch.save(other, base)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda saved, base: base.unlink(), "which cannot be loaded: no checkpoint at"),
        (another_base, "than is there now: put the old one back"),
        (lambda saved, base: saved.update(lora=3), "holds LoRA that fits no model"),
        (lambda saved, base: saved["lora"].pop("scale"), "holds LoRA that fits no model"),
        (lambda saved, base: saved["model"].pop("transformer.h.0.mlp.c_fc.lora_a"), "holds LoRA that fits no model"),
    ],
)
def test_adapters_that_cannot_be_merged(base, tmp_path, change, says):
    mine = tmp_path / "base.pt"
    mine.write_bytes(base.read_bytes())
    train.train(cp_config(mine, tmp_path / "run", *LORA, "--max_steps=2"))
    saved = state(tmp_path / "run/best.pt")
    change(saved, mine)
    torch.save(saved, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=says):
        GPT.from_pretrained(tmp_path / "x.pt")
