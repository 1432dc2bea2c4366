"""engine/weights.py: files in and out against transformers, and downloads against a local server that imitates the hub.

No network is used.
"""

import hashlib
import io
import json
import pickle
import pickletools
import re
import resource
import runpy
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
import zipfile
from collections import OrderedDict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_model import LONG, TINY, batch, max_diff, reference, tiny
from transformers import GPT2LMHeadModel

from configs import find
from data import get_tokenizer
from engine import weights
from engine.run import atomic_write
from engine.weights import PUBLISHED, SHA256, download, hub_cache, load_checkpoint
from model import GPT, GPTConfig

ROOT = Path(__file__).resolve().parents[1]

# --------------------------------------------------------------------------------------------------------------------
# weights in


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A folder as transformers writes it, the reference's logits for one input, and that input. Read only."""
    folder = tmp_path_factory.mktemp("published")
    hf = reference(n_embd=128)
    hf.save_pretrained(folder)
    idx = torch.randint(37, (2, 24))
    with torch.no_grad():
        return folder, hf(idx).logits, idx


def write(folder, tensors, file="model.safetensors", config=None):
    """A weight file, with config.json beside it if there is one."""
    if file.endswith(".safetensors"):
        save_file({k: v.contiguous().clone() for k, v in tensors.items()}, folder / file)
    else:
        torch.save(tensors, folder / file)
    if config is not None:
        (folder / "config.json").write_text(config)
    return folder


def loads_equal(path, want, idx, tolerance=1e-4):
    net = GPT.from_pretrained(path)
    assert all(p.dtype == torch.float32 and p.requires_grad for p in net.parameters())
    assert net.lm_head.weight is net.transformer.wte.weight
    with torch.no_grad():
        assert max_diff(net(idx), want) < tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("prefix", ["transformer.", ""], ids=["prefix", "no prefix"])
def test_reads_every_layout(tmp_path, published, prefix, file, dtype):
    """Both key layouts, both formats, three dtypes: the parameters are the file's numbers, exactly, in fp32."""
    folder, _, _ = published
    tensors = load_file(folder / "model.safetensors")
    tensors = {prefix + k.removeprefix("transformer."): v.to(dtype) for k, v in tensors.items()}
    write(tmp_path, tensors, file, (folder / "config.json").read_text())
    net = GPT.from_pretrained(str(tmp_path))
    for key, value in net.state_dict().items():
        want = tensors[prefix + key.removeprefix("transformer.").replace("lm_head", "wte")].float()
        conv1d = want.dim() == 2 and ("attn.c" in key or "mlp.c" in key)
        assert value.dtype == torch.float32 and torch.equal(value, want.t() if conv1d else want), key


def test_reads_a_whole_folder(published):
    folder, want, idx = published
    loads_equal(folder, want, idx)


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin", "other.safetensors", "other.bin"])
def test_reads_a_lone_file(tmp_path, capsys, file):
    """Without config.json the shape comes from the tensors, with heads 64 wide if the width is a published one."""
    hf, idx = reference(n_embd=768, n_layer=1, n_head=12, std=0.1), torch.randint(37, (2, 24))
    write(tmp_path, hf.transformer.state_dict(), file)
    with torch.no_grad():
        loads_equal(tmp_path / file, hf(idx).logits, idx)
    says = f"note         {tmp_path / file}: no config.json beside it, so 12 heads are taken: 64 wide, as in GPT-2\n"
    assert capsys.readouterr().out == says
    (tmp_path / file).unlink()


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin", "other.safetensors", "other.bin"])
def test_refuses_a_lone_file_of_another_width(tmp_path, published, file):
    """Two heads of 64 or one of 128? A guess would load another model in silence."""
    write(tmp_path, load_file(published[0] / "model.safetensors"), file)
    with pytest.raises(ValueError, match=f"{file} does not tell its number of heads: give it a config.json .* n_head$"):
        GPT.from_pretrained(tmp_path / file)


def test_reads_a_file_beside_its_config(tmp_path, published):
    """A file's own config.json wins over the guess: here four heads of 32."""
    hf = reference(n_embd=128, n_head=4)
    hf.save_pretrained(tmp_path)
    idx = published[2]
    with torch.no_grad():
        loads_equal(tmp_path / "model.safetensors", hf(idx).logits, idx)


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_reads_files_with_head_and_masks(tmp_path, published, file):
    """A stored lm_head.weight is accepted; the causal masks that old files hold are skipped."""
    folder, want, idx = published
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"].clone()
    for i in range(2):
        tensors[f"transformer.h.{i}.attn.bias"] = torch.ones(1, 1, 24, 24, dtype=(torch.uint8, torch.bool)[i]).tril()
        tensors[f"transformer.h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    write(tmp_path, tensors, file, (folder / "config.json").read_text())
    loads_equal(tmp_path, want, idx)


def shards(folder):
    return sorted(f.name for f in folder.glob("model-*.safetensors"))


@pytest.fixture
def sharded(tmp_path):
    """A folder as transformers writes it with max_shard_size, the reference's logits for one input, and that input."""
    hf, idx = reference(n_embd=128), torch.randint(37, (2, 24))
    hf.save_pretrained(tmp_path / "sharded", max_shard_size="300KB")
    with torch.no_grad():
        return tmp_path / "sharded", hf(idx).logits, idx


def test_reads_a_model_in_several_files(sharded):
    """As the large ones are published: an index and files of some tensors each, from the folder or by the index."""
    folder, want, idx = sharded
    assert len(shards(folder)) > 2 and not (folder / "model.safetensors").exists()
    loads_equal(folder, want, idx)
    loads_equal(folder / weights.INDEX, want, idx)
    (folder / "config.json").unlink()  # then all but the heads comes from the tensors of all files
    with pytest.raises(ValueError, match="index.json does not tell its number of heads"):
        GPT.from_pretrained(folder)


def test_one_file_wins_over_an_index(sharded):
    """A folder that holds both is read as transformers does: the one file."""
    folder, _, idx = sharded
    other = tiny(GPTConfig(**vars(TINY) | dict(n_embd=128)), seed=9)
    other.save_pretrained(folder)
    with torch.no_grad():
        loads_equal(folder, other(idx), idx)


@pytest.mark.parametrize("name", ["../{}", "{folder}/../{}", "below/{}", ".."])
def test_refuses_an_index_that_leaves_its_folder(sharded, name):
    """An index is data from a stranger: it must not name a file elsewhere, though that file is whole and readable."""
    folder = sharded[0]
    file = shards(folder)[0]
    for place in (folder.parent, folder / "below"):
        place.mkdir(exist_ok=True)
        shutil.copy(folder / file, place / file)
    edit_index(
        folder, lambda names: {k: name.format(file, folder=folder) if v == file else v for k, v in names.items()}
    )
    with pytest.raises(ValueError) as error:
        GPT.from_pretrained(folder)
    assert str(folder / weights.INDEX) in str(error.value) and "\n" not in str(error.value)
    assert "it names a file outside its folder" in str(error.value)


def edit_index(folder, change):
    index = json.loads((folder / weights.INDEX).read_text())
    index["weight_map"] = change(index["weight_map"])
    (folder / weights.INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize(
    "damage", ["file missing", "file cut", "file unnamed", "not JSON", "no map", "a list", "numbers"]
)
def test_refuses_a_damaged_index(sharded, damage):
    """One line that names the index, or the tensor that is then missing."""
    folder = sharded[0]
    file, index = folder / shards(folder)[1], folder / weights.INDEX
    if damage == "file missing":
        file.unlink()
    elif damage == "file cut":
        file.write_bytes(file.read_bytes()[:-100])
    elif damage == "file unnamed":
        edit_index(folder, lambda names: {k: v for k, v in names.items() if v != file.name})
    elif damage == "numbers":
        edit_index(folder, lambda names: dict.fromkeys(names, 7))
    else:
        index.write_text({"not JSON": "<html>", "no map": "{}", "a list": "[]"}[damage])
    with pytest.raises(ValueError) as error:
        GPT.from_pretrained(folder)
    says = {
        "file missing": f"{file} cannot be read as weights ([Errno 2]",
        "file cut": f"{file} cannot be read as weights (tensor ",
        "file unnamed": "is missing",
        "not JSON": f"{index}: not JSON",
        "a list": f"{index}: wanted a JSON object, got list",
    }.get(damage, f"{index}: it names a file outside its folder, or none of weights: copy it again")
    assert says in str(error.value) and "\n" not in str(error.value)


def test_refuses_an_untied_head(tmp_path, published):
    """Two different embeddings cannot both be kept; dropping one in silence would load another model."""
    folder = published[0]
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"] + 1
    with pytest.raises(ValueError, match=r"lm_head\.weight differs"):
        GPT.from_pretrained(write(tmp_path, tensors, config=(folder / "config.json").read_text()))


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize(
    ("change", "key"),
    [
        ("drop", "transformer.h.1.mlp.c_fc.bias"),
        ("drop", "wpe.weight"),
        ("drop", "transformer.ln_f.weight"),
        ("add", "transformer.h.1.ln_3.weight"),
        ("add", "score.weight"),
        ("shape", "transformer.h.0.attn.c_attn.weight"),
        ("shape", "transformer.h.1.ln_2.bias"),
        ("transpose", "transformer.h.0.mlp.c_proj.weight"),
    ],
)
def test_names_the_wrong_tensor(tmp_path, published, file, change, key):
    """Missing, extra or misshapen: an error with the tensor's name, never a half-loaded model."""
    folder = published[0]
    tensors = load_file(folder / "model.safetensors")
    if change == "drop":
        del tensors[key if key in tensors else f"transformer.{key}"]
    elif change == "add":
        tensors[key] = torch.ones(128)
    else:
        tensors[key] = tensors[key].t() if change == "transpose" else tensors[key][:-1]
    with pytest.raises(ValueError) as error:
        GPT.from_pretrained(write(tmp_path, tensors, file, (folder / "config.json").read_text()))
    assert key in str(error.value) and "\n" not in str(error.value)
    if change in ("shape", "transpose"):
        assert "wanted (" in str(error.value)


def reheadered(raw, change):
    """The bytes of a safetensors file after `change` has been applied to its parsed header."""
    size = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + size])
    header = change(header) or header
    head = json.dumps(header).encode()
    return struct.pack("<Q", len(head)) + head + raw[8 + size :]


def set_entry(**values):
    return lambda header: header["transformer.wpe.weight"].update(values)


DAMAGE = {
    "cut in the tensors": lambda raw: raw[:-100],
    "cut in the header": lambda raw: raw[:50],
    "cut in the length": lambda raw: raw[:5],
    "empty": lambda raw: b"",
    "an error page": lambda raw: b"<!DOCTYPE html><html><body>Not found</body></html>",
    "garbage header": lambda raw: raw[:8] + b"\xff" * 64 + raw[72:],
    "header is a list": lambda raw: reheadered(raw, list),
    "offsets behind the end": lambda raw: reheadered(raw, set_entry(data_offsets=[10**9, 10**9 + 24 * 128 * 4])),
    "offsets negative": lambda raw: reheadered(raw, set_entry(data_offsets=[-24 * 128 * 4, 0])),
    "offsets reversed": lambda raw: reheadered(raw, set_entry(data_offsets=[24 * 128 * 4, 0])),
    "shape larger than its bytes": lambda raw: reheadered(raw, set_entry(shape=[240, 128])),
    "shape negative": lambda raw: reheadered(raw, set_entry(shape=[-24, -128])),
    "unknown dtype": lambda raw: reheadered(raw, set_entry(dtype="F8_E4M3")),
    "no dtype": lambda raw: reheadered(raw, lambda header: header["transformer.wpe.weight"].pop("dtype") and None),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_refuses_a_damaged_safetensors_file(tmp_path, published, damage):
    """One line that names the file: no crash in a reader, no read outside the file, no half-loaded model."""
    raw = (published[0] / "model.safetensors").read_bytes()
    file = tmp_path / "model.safetensors"
    file.write_bytes(damage(raw))
    with pytest.raises(ValueError) as error:
        GPT.from_pretrained(file)
    assert str(file) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name", [n for n in DAMAGE if n.startswith(("offsets beh", "offsets neg", "offsets rev", "shape l"))]
)
def test_bad_offsets_name_the_tensor(tmp_path, published, name):
    file = tmp_path / "model.safetensors"
    file.write_bytes(DAMAGE[name]((published[0] / "model.safetensors").read_bytes()))
    with pytest.raises(ValueError, match=r"tensor transformer\.wpe\.weight .*damaged or cut short"):
        GPT.from_pretrained(file)


class Bomb:
    """Pickles to a call of a function, as a hostile weight file would."""

    def __reduce__(self):
        return (Path.touch, (Path("bomb-went-off"),))


@pytest.mark.parametrize(
    ("file", "damage"),
    [("pytorch_model.bin", d) for d in ("cut", "text", "empty", "bomb", "pointer")]
    + [("model.pt", d) for d in ("cut", "text", "bomb")]
    + [("model.safetensors", "text"), ("model.safetensors", "pointer")],
)
def test_refuses_a_damaged_pickle(tmp_path, monkeypatch, published, file, damage):
    """A .bin or .pt that is cut, not one at all, or would run code: an error that names it, what it is and what to do,
    and nothing runs. A pointer is what git clone leaves without git-lfs."""
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    says = dict(cut="damaged or cut short", empty="damaged or cut short", bomb="wants to import ")
    says |= dict(text="neither safetensors nor written by torch.save", pointer="`git lfs pull`")
    monkeypatch.chdir(tmp_path)
    path = tmp_path / file
    torch.save({"wte.weight": Bomb()} if damage == "bomb" else load_file(published[0] / "model.safetensors"), path)
    if damage != "bomb":
        contents = {"cut": path.read_bytes()[:-5000], "text": b"not found", "empty": b"", "pointer": pointer}
        path.write_bytes(contents[damage])
    with pytest.raises(ValueError) as error:
        GPT.from_pretrained(path)
    assert str(path) in str(error.value) and says[damage] in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "bomb-went-off").exists()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("activation_function", "gelu"),
        ("model_type", "llama"),
        ("layer_norm_epsilon", 1e-6),
        ("n_inner", 100),
        ("scale_attn_weights", False),
        ("scale_attn_by_inverse_layer_idx", True),
        ("tie_word_embeddings", False),
    ],
)
def test_refuses_what_is_no_gpt2(tmp_path, published, key, value):
    """A config.json that asks for other arithmetic than ours is refused by name instead of loaded wrongly."""
    folder = published[0]
    config = json.loads((folder / "config.json").read_text()) | {key: value}
    write(tmp_path, load_file(folder / "model.safetensors"), config=json.dumps(config))
    with pytest.raises(ValueError, match=f"config.json: {key}={value!r}"):
        GPT.from_pretrained(tmp_path)


def test_accepts_the_usual_inner_width(tmp_path, published):
    """n_inner = 4 * n_embd says what null says."""
    folder, want, idx = published
    config = json.loads((folder / "config.json").read_text()) | {"n_inner": 512}
    loads_equal(write(tmp_path, load_file(folder / "model.safetensors"), config=json.dumps(config)), want, idx)


@pytest.mark.parametrize("key", ["vocab_size", "n_positions", "n_layer", "n_head"])
def test_names_what_the_config_lacks(tmp_path, published, key):
    folder = published[0]
    config = json.loads((folder / "config.json").read_text())
    del config[key]
    write(tmp_path, load_file(folder / "model.safetensors"), config=json.dumps(config))
    with pytest.raises(ValueError, match=f"config.json lacks {key}"):
        GPT.from_pretrained(tmp_path)


def test_the_tensors_of_every_layer_count(tmp_path, published):
    """A layer more than the config has, if only by one tensor; or one of its layers without any."""
    tensors = load_file(published[0] / "model.safetensors")
    config = (published[0] / "config.json").read_text()
    write(tmp_path, tensors | {"transformer.h.2.ln_1.weight": torch.ones(128)}, config=config)
    with pytest.raises(
        ValueError, match="config.json: n_layer=2, but the tensors have 3: give the config of this file"
    ):
        GPT.from_pretrained(tmp_path)
    write(tmp_path, {k.replace("h.1.", "h.7."): v for k, v in tensors.items()}, config=config)
    with pytest.raises(ValueError, match=r"tensor transformer\.h\.1\.ln_1\.weight is missing"):
        GPT.from_pretrained(tmp_path)


def test_nonexistent_paths(tmp_path):
    """The error repeats what was asked for and lists what could have been."""
    with pytest.raises(FileNotFoundError, match="no model 'gpt3'.*gpt2-xl"):
        GPT.from_pretrained("gpt3")
    with pytest.raises(FileNotFoundError, match="nowhere.safetensors"):
        GPT.from_pretrained(tmp_path / "nowhere.safetensors")
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*nowhere\.pt"):
        GPT.from_pretrained(tmp_path / "nowhere.pt")


def test_a_path_wins_if_it_is_written_as_one(tmp_path, monkeypatch):
    """'gpt2' is the published model though a folder of that name lies here; './gpt2' is that folder, in scripts too."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    net = tiny()
    net.save_pretrained("gpt2")
    for path in ("./gpt2", str(tmp_path / "gpt2"), find("./gpt2"), find(str(tmp_path / "gpt2"))):
        assert torch.equal(GPT.from_pretrained(path).lm_head.weight, net.lm_head.weight), path
    for name in ("gpt2", find("gpt2")):
        with pytest.raises(ConnectionError, match="HF_HUB_OFFLINE"):
            GPT.from_pretrained(name)


def test_refuses_another_vocabulary(tmp_path):
    """A model and a tokenizer that do not belong together: both numbers, and what to give."""
    tiny().save_pretrained(tmp_path)
    assert GPT.from_pretrained(tmp_path, vocab_size=37).config == TINY
    with pytest.raises(ValueError, match="has a vocabulary of 37, the tokenizer one of 38: no tokenizer here fits"):
        GPT.from_pretrained(tmp_path, vocab_size=38)
    n = get_tokenizer("toy").n_vocab
    tiny(GPTConfig(**vars(TINY) | dict(vocab_size=n))).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"vocabulary of {n}, the tokenizer one of 50257: give --tokenizer=toy"):
        GPT.from_pretrained(tmp_path, vocab_size=50257)


def test_folder_without_weights(tmp_path):
    """The error names the three files that would do."""
    files = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="holds neither " + " nor ".join(map(re.escape, files))):
        GPT.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("saved", "says"),
    [
        ({"weights": torch.ones(2)}, "tensor wte.weight or wpe.weight is missing or no matrix: not a GPT-2 file"),
        ({"step": 3}, "holds no table of tensors: give the weights"),
        ({3: torch.ones(2)}, "holds no table of tensors: give the weights"),
        ([1, 2], "holds no table of tensors: give the weights"),
        (torch.ones(2), "holds no table of tensors: give the weights"),
    ],
    ids=["tensors", "no tensors", "unnamed", "list", "tensor"],
)
def test_pt_that_is_no_checkpoint(tmp_path, saved, says):
    """As a model to load, and as a checkpoint of train.py."""
    torch.save(saved, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=rf"x\.pt.*{says}"):
        GPT.from_pretrained(tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"x\.pt is no checkpoint of train\.py"):
        load_checkpoint(tmp_path / "x.pt")


def test_reads_a_checkpoint(tmp_path):
    """A .pt as train.py writes it holds our own layout, nothing transposed: bit for bit the same model."""
    net = tiny()
    path = tmp_path / "new" / "ckpt.pt"
    state = {"model": net.state_dict(), "model_config": vars(net.config), "step": 3}
    atomic_write(path, lambda f: torch.save(state, f))
    again, (idx, lengths) = GPT.from_pretrained(path), batch()
    assert again.config == net.config and load_checkpoint(path)["step"] == 3
    assert torch.equal(again.sequence_nll(idx, lengths), net.sequence_nll(idx, lengths))


def test_square_weights_are_not_confused(tmp_path):
    """attn.c_proj is square, so that no shape check sees a forgotten or a doubled transpose: the values must."""
    net = tiny()
    torch.save({"model": net.state_dict(), "model_config": vars(net.config)}, tmp_path / "x.pt")
    net.save_pretrained(tmp_path)
    want = net.transformer.h[0].attn.c_proj.weight
    for path in (tmp_path / "x.pt", tmp_path):
        assert torch.equal(GPT.from_pretrained(path).transformer.h[0].attn.c_proj.weight, want)
    stored = load_file(tmp_path / "model.safetensors")["transformer.h.0.attn.c_proj.weight"]
    assert torch.equal(stored, want.t()) and not torch.equal(want, want.t())


# --------------------------------------------------------------------------------------------------------------------
# files of strangers: nothing is allocated before it is checked

NONSENSE = [10**9, 10**400, 10**6, 1, 0, -1, True, 16.0, float("inf"), float("nan"), None, "16", [16], {"n": 16}]


def refused_at_once(load, *says):
    """The one line of a refusal, within a second and with no more than 50 MB above what was in use before."""
    peak, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    with pytest.raises(ValueError) as error:
        load()
    assert time.monotonic() - began < 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 50_000  # kB
    line = str(error.value)
    assert "\n" not in line and len(line) < 400 and all(part in line for part in says), line
    return line


@pytest.mark.parametrize("value", NONSENSE, ids=lambda v: repr(v)[:8])
@pytest.mark.parametrize("name", weights.SIZES)
def test_nonsense_sizes(tmp_path, name, value):
    """In a checkpoint of a few kB and in a folder: one line that names the size, at once, before any allocation."""
    net = tiny()
    config, says = vars(net.config) | {name: value}, "wants a whole number of at least 1, got"
    if type(value) is int and value > 0:
        says = "is not a multiple of" if name == "n_head" else "but the tensors have"
        if name == "n_head" and value == 1:
            return  # which is right
    torch.save({"model": net.state_dict(), "model_config": config}, tmp_path / "x.pt")
    net.save_pretrained(tmp_path / "folder")
    (tmp_path / "folder" / "config.json").write_text(json.dumps(config))
    if value != 10**400:  # torch reads no number of so many digits
        refused_at_once(lambda: load_checkpoint(tmp_path / "x.pt"), "x.pt: ", name, says)
        refused_at_once(lambda: GPT.from_pretrained(tmp_path / "x.pt"), "x.pt: ", name, says)
    refused_at_once(lambda: GPT.from_pretrained(tmp_path / "folder"), "config.json: ", name, says)


@pytest.mark.parametrize("config", [{}, [], 3, "x", vars(TINY) | {"dropout": 0.1}], ids=str)
def test_model_config_that_is_none(tmp_path, config):
    torch.save({"model": tiny().state_dict(), "model_config": config}, tmp_path / "x.pt")
    for load in (load_checkpoint, GPT.from_pretrained):
        ours = load == load_checkpoint and not isinstance(config, dict)
        says = ["x.pt is no checkpoint of train.py"] if ours else ["x.pt: wanted vocab_size, n_positions", "got"]
        refused_at_once(lambda load=load: load(tmp_path / "x.pt"), *says)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (dict(step=-1), "step wants a whole number of at least 0, got -1"),
        (dict(step=True), "step wants a whole number of at least 0, got True"),
        (dict(step="3"), "step wants a whole number of at least 0, got '3'"),
        (dict(step=None), "step wants a whole number of at least 0, got None"),
        (dict(config=None), "config wants texts and numbers by name"),
        (dict(config=[1]), "config wants texts and numbers by name"),
        (dict(config={1: 2}), "config wants texts and numbers by name, got (1, 2)"),
        (dict(config={"lr": [1.0]}), "config wants texts and numbers by name, got ('lr', [1.0])"),
        (dict(config={"lr": torch.ones(1)}), "config wants texts and numbers by name, got ('lr', tensor"),
        (dict(config={"lr": None}), "config wants texts and numbers by name, got ('lr', None)"),
        (dict(model=[]), "holds no table of tensors"),
        (dict(model={"wte.weight": 3}), "holds no table of tensors"),
        (dict(model={}), "tensor wte.weight or wpe.weight is missing or no matrix"),
    ],
    ids=str,
)
def test_load_checkpoint_checks(tmp_path, change, says):
    """What it returns is what train.py and eval.py take for granted."""
    saved = {"model": tiny().state_dict(), "model_config": vars(TINY), "step": 3, "config": {"lr": 1e-4, "seed": 0}}
    torch.save(saved | {"best": {"cost": None}, "optimizer": {"state": [torch.ones(2)]}}, tmp_path / "x.pt")
    again = load_checkpoint(tmp_path / "x.pt")
    assert again["step"] == 3 and again["config"] == saved["config"] and again["best"] == {"cost": None}
    assert again["model"].keys() == saved["model"].keys()
    torch.save(saved | change, tmp_path / "x.pt")
    refused_at_once(lambda: load_checkpoint(tmp_path / "x.pt"), "x.pt", says)


WTE = "transformer.wte.weight"
TENSORS = {
    "stride 0": (torch.ones(1).expand(10**6, 10**6), "is not all in the file: save a clone of it"),
    "stride 0, right shape": (torch.ones(1).expand(37, 16), "is not all in the file: save a clone of it"),
    "overlapping": (torch.ones(37 + 16).as_strided((37, 16), (1, 1)), "is not all in the file: save a clone of it"),
    "integers": (torch.ones(37, 16, dtype=torch.int32), "is torch.int32, torch.strided, on cpu, wanted fp64, fp32"),
    "complex": (torch.ones(37, 16, dtype=torch.complex64), "is torch.complex64"),
    "bool": (torch.ones(37, 16, dtype=torch.bool), "is torch.bool"),
    "fp8": (torch.ones(37, 16).to(torch.float8_e4m3fn), "wants to import torch._utils._rebuild_tensor_v3"),
    "sparse": (torch.ones(37, 16).to_sparse(), "wants to import torch._utils._rebuild_sparse_tensor"),
    "meta": (torch.ones(37, 16, device="meta"), "wants to import torch._utils._rebuild_meta_tensor_no_storage"),
    "quantized": (lambda: torch.quantize_per_tensor(torch.ones(37, 16), 1.0, 0, torch.qint8), "wants to import torch"),
    "vector": (torch.ones(37), "is missing or no matrix"),
}


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("name", TENSORS)
def test_tensors_that_are_no_plain_numbers(tmp_path, name, legacy):
    """What a torch file may hold besides: none of it becomes a parameter, and none its claimed size in memory."""
    tensor, says = TENSORS[name]
    tensor = tensor if isinstance(tensor, torch.Tensor) else tensor()  # making a quantized one warns
    saved = {"model": tiny().state_dict() | {WTE: tensor}, "model_config": vars(TINY)}
    torch.save(saved, tmp_path / "x.pt", _use_new_zipfile_serialization=not legacy)
    for load in (load_checkpoint, GPT.from_pretrained):
        refused_at_once(lambda load=load: load(tmp_path / "x.pt"), "x.pt", says)


def test_every_tensor_is_checked(tmp_path):
    """Not only the embeddings, which tell the shape."""
    bad = {"transformer.h.1.mlp.c_fc.bias": torch.ones(1).expand(10**12)}
    torch.save({"model": tiny().state_dict() | bad, "model_config": vars(TINY)}, tmp_path / "x.pt")
    refused_at_once(lambda: GPT.from_pretrained(tmp_path / "x.pt"), "c_fc.bias of shape (1000000000000,) is not all in")


def test_tensors_on_top_of_each_other(tmp_path, published):
    """A header of 100 bytes a tensor that points all tensors to the same numbers would fill the memory with copies."""
    raw = (published[0] / "model.safetensors").read_bytes()
    header = json.loads(raw[8 : 8 + struct.unpack("<Q", raw[:8])[0]])
    big = max((e for e in header.values() if "shape" in e), key=lambda e: e["data_offsets"][1] - e["data_offsets"][0])
    file = tmp_path / "model.safetensors"
    file.write_bytes(reheadered(raw, lambda h: h | {f"h.{i}.ln_1.weight": big for i in range(99)}))
    refused_at_once(lambda: GPT.from_pretrained(file), "is not all in the file")


def claims(d, n):
    """An old-format file of 1,000 numbers that claims n of them, in its pickle and where they begin."""
    big = b"\x8a\x08" + struct.pack("<q", n)
    return d.replace(b"M\xe8\x03", big), d.replace(b"M\xe8\x03", big).replace(
        struct.pack("<q", 1000), struct.pack("<q", n)
    )


@pytest.mark.parametrize("n", [10**9, 10**15, 2**62])
def test_an_old_file_that_claims_a_huge_storage(tmp_path, n):
    """torch asks the machine for that much memory, touches none of it, and misses the bytes: one line comes of it."""
    torch.save({"wte.weight": torch.arange(1000.0)}, tmp_path / "x.bin", _use_new_zipfile_serialization=False)
    raw = (tmp_path / "x.bin").read_bytes()
    for damaged in claims(raw, n):
        assert damaged != raw
        (tmp_path / "x.bin").write_bytes(damaged)
        refused_at_once(lambda: GPT.from_pretrained(tmp_path / "x.bin"), "x.bin cannot be read as weights (")


def test_an_old_file_whose_storage_is_never_filled(tmp_path):
    """Its list of storages left empty, torch hands out memory that it has not read: more than the file is refused."""
    torch.save({"wte.weight": torch.arange(1000.0)}, tmp_path / "x.bin", _use_new_zipfile_serialization=False)
    raw = claims((tmp_path / "x.bin").read_bytes(), 10**9)[0]
    f = io.BytesIO(raw)
    for _ in range(4):
        list(pickletools.genops(f))
    (tmp_path / "x.bin").write_bytes(raw[: f.tell()] + pickle.dumps([], protocol=2))
    refused_at_once(lambda: GPT.from_pretrained(tmp_path / "x.bin"), "x.bin", "is not all in the file")


class Call:
    """Pickles to the call of a function with these arguments."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_a_call_that_fills_the_memory(tmp_path, legacy):
    """torch.load lets some functions pass that make gigabytes of a few bytes: this one a stride-0 tensor's copy."""
    copy = torch._utils._rebuild_device_tensor_from_cpu_tensor
    bomb = Call(copy, torch.ones(1).expand(10**5, 10**5), torch.float64, "cpu", False)
    torch.save({"wte.weight": bomb}, tmp_path / "x.bin", _use_new_zipfile_serialization=not legacy)
    refused_at_once(lambda: GPT.from_pretrained(tmp_path / "x.bin"), f"wants to import torch._utils.{copy.__name__}")


def test_a_compressed_archive(tmp_path):
    """torch.save compresses nothing; a few kB could unpack to gigabytes."""
    torch.save({"wte.weight": torch.zeros(10**6)}, tmp_path / "a.bin")
    with zipfile.ZipFile(tmp_path / "a.bin") as a, zipfile.ZipFile(tmp_path / "b.bin", "w", zipfile.ZIP_DEFLATED) as b:
        for name in a.namelist():
            b.writestr(name, a.read(name))
    refused_at_once(lambda: GPT.from_pretrained(tmp_path / "b.bin"), "cannot be read as weights (a compressed archive)")


@pytest.mark.parametrize("text", ["<html>", "[]", "3", "{", "[" * 10**5], ids=lambda t: t[:6])
def test_a_damaged_config(tmp_path, text):
    tiny().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(text)
    refused_at_once(lambda: GPT.from_pretrained(tmp_path), "config.json: ")


def test_loading_draws_no_random_numbers_and_init_draws_the_same(tmp_path):
    """GPT(config) initialises as ever, also after a file was loaded, which initialises nothing."""
    net = tiny()
    net.save_pretrained(tmp_path)
    torch.manual_seed(5)
    want = GPT(TINY).state_dict()
    torch.manual_seed(5)
    GPT.from_pretrained(tmp_path)
    assert all(torch.equal(a, want[k]) for k, a in GPT(TINY).state_dict().items())


# --------------------------------------------------------------------------------------------------------------------
# weights as people have them


@pytest.fixture
def people():
    """transformers' GPT-2 with scattered weights, its state dict, its config.json, an input and its logits."""
    hf, idx = reference(), torch.randint(37, (2, 24))
    with torch.no_grad():
        return hf, dict(hf.state_dict()), hf.config.to_json_string(), idx, hf(idx).logits


def linear(state):
    """A state dict as nanoGPT and model.py have it, in nn.Linear's orientation."""
    return {k: v.t().contiguous() if weights._is_conv1d(k) else v for k, v in state.items()}


def nanogpt(state, **args):
    shape = dict(n_layer=2, n_head=2, n_embd=16, block_size=24, bias=True, vocab_size=37, dropout=0.0)
    masks = {f"transformer.h.{i}.attn.bias": torch.ones(1, 1, 24, 24).tril() for i in range(2)}
    saved = {"model": linear(state) | masks, "optimizer": {"state": {}}, "model_args": shape | args, "iter_num": 3}
    return saved | {"best_val_loss": torch.tensor(1.0), "config": {"out_dir": "out"}}


def prefixed(prefix, table):
    return {prefix + k: v for k, v in table.items()}


FORMATS = {  # file name, what torch.save writes of a state dict
    "train.py": ("x.pt", lambda s: {"model": linear(s), "model_config": vars(TINY)}),
    "nanoGPT": ("ckpt.pt", nanogpt),
    "DPO": ("policy.pt", lambda s: {"step_idx": 3, "state": s, "metrics": {"loss": 0.5, "all": [1.0]}}),
    "state_dict": ("x.ckpt", lambda s: {"state_dict": s, "epoch": 1}),
    "model_state_dict": ("x.pth", lambda s: {"model_state_dict": s, "optimizer_state_dict": {"state": {}}}),
    "bare": ("x.pt", lambda s: s),
    "bare, OrderedDict": ("x.BIN", OrderedDict),
    "our state dict": ("x.PT", linear),
    "parameters": ("x.pt", lambda s: {k: torch.nn.Parameter(v) for k, v in s.items()}),
    "safetensors": ("x.SafeTensors", None),
}


@pytest.mark.parametrize(
    ("prefix", "dtype"),
    [
        ("", torch.float32),
        ("module.", torch.float64),
        ("_orig_mod.", torch.float32),
        ("_orig_mod.module.", torch.float64),
        ("module._orig_mod.", torch.float32),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", FORMATS)
def test_reads_what_people_have(tmp_path, people, name, prefix, dtype):
    """Every format, as DistributedDataParallel and torch.compile write it too, in double precision too."""
    _, state, config, idx, want = people
    state = prefixed(prefix, {k: v.to(dtype) for k, v in state.items()})
    file, make = FORMATS[name]
    if name == "safetensors":
        save_file({k: v.contiguous().clone() for k, v in state.items()}, tmp_path / file)
    else:
        torch.save(make(state), tmp_path / file)
    if name not in ("train.py", "nanoGPT"):  # the shape is in those
        (tmp_path / "config.json").write_text(config)
    loads_equal(tmp_path / file, want, idx)


@pytest.mark.parametrize("file", ["x.bin", "x.pt"])
def test_reads_old_torch_files(tmp_path, people, file):
    """Before 2020 torch.save wrote no zip archives."""
    _, state, config, idx, want = people
    torch.save(state, tmp_path / file, _use_new_zipfile_serialization=False)
    (tmp_path / "config.json").write_text(config)
    loads_equal(tmp_path / file, want, idx)


def test_nanogpt_without_biases(tmp_path, people):
    torch.save(nanogpt(people[1], bias=False), tmp_path / "ckpt.pt")
    refused_at_once(lambda: GPT.from_pretrained(tmp_path / "ckpt.pt"), "bias=False", "train it with bias=True")


@pytest.mark.parametrize("args", [dict(block_size=None), dict(n_layer=10**6), dict(n_head=0)], ids=str)
def test_nanogpt_with_nonsense(tmp_path, people, args):
    torch.save(nanogpt(people[1], **args), tmp_path / "ckpt.pt")
    refused_at_once(
        lambda: GPT.from_pretrained(tmp_path / "ckpt.pt"),
        f"ckpt.pt: {'n_positions' if 'block_size' in args else [*args][0]}",
    )


@pytest.mark.parametrize("n", [50258, 50260, 50304])
@pytest.mark.parametrize("tied", [True, False], ids=["head left out", "head stored"])
def test_padded_vocabulary(tmp_path, capsys, n, tied):
    """Rows behind the tokenizer's tokens are dropped, with a note; the other logits stay."""
    hf, idx = reference(vocab_size=n), torch.randint(50257, (1, 24))
    state = {k: v for k, v in hf.state_dict().items() if not (tied and k == "lm_head.weight")}
    write(tmp_path, state, config=hf.config.to_json_string())
    net = GPT.from_pretrained(tmp_path, vocab_size=50257)
    note = f"note         {tmp_path}: its vocabulary of {n} is cut to 50257: the rest is padding\n"
    assert capsys.readouterr().out == note
    assert net.config.vocab_size == 50257 and net.lm_head.weight is net.transformer.wte.weight
    with torch.no_grad():
        assert max_diff(net(idx), hf(idx).logits[..., :50257]) < 1e-4
    assert GPT.from_pretrained(tmp_path).config.vocab_size == n and capsys.readouterr().out == ""


@pytest.mark.parametrize(("n", "tokens"), [(50305, 50257), (50256, 50257), (50304, 50300), (40, 37)])
def test_other_vocabularies_are_refused(tmp_path, n, tokens):
    tiny(GPTConfig(**vars(TINY) | dict(vocab_size=n))).save_pretrained(tmp_path)
    hint = "give --tokenizer=gpt2" if n == 50304 else "no tokenizer here fits"
    with pytest.raises(ValueError, match=f"has a vocabulary of {n}, the tokenizer one of {tokens}: {hint}"):
        GPT.from_pretrained(tmp_path, vocab_size=tokens)


def test_a_trainers_folder(tmp_path, people):
    """Only checkpoint-N inside: the last by number is named, not by spelling; and that one loads."""
    hf, _, _, idx, want = people
    for n in (500, 1500, 900):
        hf.save_pretrained(tmp_path / f"checkpoint-{n}")
    (tmp_path / "checkpoint-best").mkdir()
    with pytest.raises(FileNotFoundError) as error:
        GPT.from_pretrained(tmp_path)
    says = (
        f"{tmp_path} holds checkpoints of a Trainer, but no model itself: give for instance {tmp_path}/checkpoint-1500"
    )
    assert str(error.value) == says
    loads_equal(tmp_path / "checkpoint-1500", want, idx)


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"model_state_dict": s}], ids=["bare", "wrapped"])
def test_llms_from_scratch(tmp_path, wrap):
    """Its queries, keys and values are three matrices, under other names."""
    state = {"tok_emb.weight": torch.ones(37, 16), "trf_blocks.0.att.W_query.weight": torch.ones(16, 16)}
    torch.save(wrap(state | {"out_head.weight": torch.ones(37, 16)}), tmp_path / "x.pth")
    line = refused_at_once(lambda: GPT.from_pretrained(tmp_path / "x.pth"))
    assert "LLMs-from-scratch (tok_emb.weight): give the original GPT-2 files that it was loaded from" in line


@pytest.mark.parametrize("file", ["x.pt", "x.bin"])
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_a_whole_pickled_model(tmp_path, people, file, legacy):
    """torch.save(model): the class is named, and the way out is not torch's, to switch weights_only off."""
    how = dict(_use_new_zipfile_serialization=not legacy)
    for model, name in ((people[0], "transformers.models.gpt2.modeling_gpt2.GPT2LMHeadModel"), (tiny(), "model.GPT")):
        for saved in (model, {"model": model, "step": 3}):
            torch.save(saved, tmp_path / file, **how)
            line = refused_at_once(lambda: GPT.from_pretrained(tmp_path / file), f"{file} wants to import {name},")
            assert "save the model's state_dict(), or by save_pretrained" in line and "weights_only" not in line


@pytest.mark.filterwarnings("ignore:Detected pickle protocol 4:UserWarning")
def test_a_pickle_of_another_protocol(tmp_path, people):
    """torch's own word on it is to switch weights_only off."""
    torch.save(people[0], tmp_path / "x.bin", pickle_protocol=4)
    line = refused_at_once(
        lambda: GPT.from_pretrained(tmp_path / "x.bin"), "x.bin cannot be read as weights (not made of"
    )
    assert "weights_only" not in line


@pytest.mark.parametrize("base", ["openai-community/gpt2", None])
@pytest.mark.parametrize("what", ["", "adapter_model.safetensors"], ids=["folder", "file"])
def test_a_lora_folder(tmp_path, base, what):
    """As peft writes it. Merged into its base, it is a folder like any other."""
    key = "base_model.model.transformer.h.0.attn.c_attn.lora_A.weight"
    save_file({key: torch.ones(8, 16)}, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 8} | ({"base_model_name_or_path": base} if base else {})
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    line = refused_at_once(lambda: GPT.from_pretrained(tmp_path / what if what else tmp_path))
    assert (
        f"is a LoRA adapter of {base or 'a model that it does not name'}: merge the two with peft (merge_and_unload, "
        in line
    )
    (tmp_path / "adapter_config.json").write_text("<html>")
    refused_at_once(lambda: GPT.from_pretrained(tmp_path), "adapter_config.json: not JSON")


@pytest.mark.parametrize("n_embd", [1024, 1280, 1600])
def test_heads_of_the_published_widths(tmp_path, capsys, n_embd):
    """64 wide in all of them: 16, 20 and 25 heads."""
    shape = dict(vocab_size=7, n_positions=4, n_embd=n_embd, n_layer=1)
    with torch.device("meta"):
        net = GPT(GPTConfig(**shape, n_head=1))
    torch.save({k: torch.zeros(v.shape, dtype=torch.float16) for k, v in net.state_dict().items()}, tmp_path / "x.bin")
    assert vars(GPT.from_pretrained(tmp_path / "x.bin").config) == shape | dict(n_head=n_embd // 64)
    assert f"so {n_embd // 64} heads are taken: 64 wide, as in GPT-2" in capsys.readouterr().out
    (tmp_path / "x.bin").unlink()


# --------------------------------------------------------------------------------------------------------------------
# weights out


def test_transformers_loads_what_we_save(tmp_path):
    """No missing, unexpected or mismatched key, and the same logits."""
    net = tiny(LONG)
    net.save_pretrained(tmp_path / "new" / "folder")
    hf, info = GPT2LMHeadModel.from_pretrained(tmp_path / "new" / "folder", output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert hf.config.activation_function == "gelu_new" and hf.dtype == torch.float32
    assert hf.config.eos_token_id == hf.config.bos_token_id == 60
    idx = torch.randint(61, (2, 128))
    with torch.no_grad():
        assert max_diff(hf.eval()(idx).logits, net(idx)) < 1e-5


def test_round_trip_is_bit_equal(tmp_path):
    """Saved and loaded again: every tensor to the last bit, the same config, and no temporary file left."""
    net = tiny(LONG)
    net.save_pretrained(tmp_path)
    again = GPT.from_pretrained(tmp_path)
    assert again.config == net.config
    for (name, a), b in zip(net.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert sorted(f.name for f in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_loaded_weights_do_not_hold_on_to_the_file(tmp_path):
    """The tensors are mapped from the file while reading; training them must change neither it nor a second model."""
    tiny().save_pretrained(tmp_path)
    raw = (tmp_path / "model.safetensors").read_bytes()
    a, b = GPT.from_pretrained(tmp_path), GPT.from_pretrained(tmp_path)
    with torch.no_grad():
        for p in a.parameters():
            p.add_(1.0)
    assert (tmp_path / "model.safetensors").read_bytes() == raw
    assert torch.equal(b.lm_head.weight, tiny().lm_head.weight)


# --------------------------------------------------------------------------------------------------------------------
# the hub, imitated

NAME = "model.safetensors"
REPO, REVISION = PUBLISHED["gpt2"]
FIRST = f"/{REPO}/resolve/{REVISION}/{NAME}"  # answers with a redirect to SECOND, as the hub does
SECOND = "/cdn/blob"
FOLDER = "models--openai-community--gpt2"  # of the hub's own library
CACHED = f"{FOLDER}/snapshots/{REVISION}/{NAME}"
MAIN = f"{FOLDER}/refs/main"


class Handler(BaseHTTPRequestHandler):
    """The hub in two answers. What goes wrong is set on the server: see `hub`."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        hub, self.close_connection = self.server, True
        hub.seen.append(self.requestline.split()[1])  # self.path hides a double slash
        if self.path in hub.answers:
            status, headers, body = hub.answers[self.path]
            self.reply(status, headers, body)
        elif self.path == FIRST:
            headers = {"X-Linked-Size": len(hub.data), "X-Linked-ETag": f'"{hub.sha256}"', "X-Repo-Commit": REVISION}
            self.reply(302, headers | {"Location": hub.endpoint + SECOND}, b"Found. Redirecting")
        elif self.path == SECOND:
            self.send_data()
        else:
            self.reply(404, {"X-Error-Code": "EntryNotFound"}, b"Entry not found")

    def send_data(self):
        hub = self.server
        end = hub.cuts.pop(0) if hub.cuts else len(hub.data)
        if end < 0:  # hang up without a word, or with nonsense
            self.wfile.write(b"" if end == -1 else b"nonsense\r\n")
            return
        self.reply(200, {"Content-Length": len(hub.data)} if hub.states_length else {})
        for part in (hub.data[: end // 2], hub.data[end // 2 : max(0, end - 1)], hub.data[max(0, end - 1) : end]):
            self.wfile.write(part)
            hub.during.append(hub.target.exists())
            if hub.wait:
                hub.wait()
        if end < len(hub.data) and hub.reset:  # an abrupt end instead of an orderly one
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()

    def reply(self, status, headers, body=None):
        self.send_response(status)
        for key, value in (headers if body is None else headers | {"Content-Length": len(body)}).items():
            self.send_header(key, str(value))
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body or b"")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A running server with one small weight file, which 'gpt2' stands for, and the environment pointing to it and to a
    new, empty cache folder.

    data, states_length: what is served and how; answers: path -> (status, headers, body) in place of the usual one;
    cuts: after how many bytes the next answers break off, reset: with a bang; wait: called as bytes flow; seen: the
    path of every request; during: was `target` there as bytes flowed?
    """
    net, data = small_model(tmp_path / "made")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.net, server.data, server.sha256 = net, data, hashlib.sha256(data).hexdigest()
    monkeypatch.setitem(SHA256, "gpt2", server.sha256)
    server.folder, server.target = tmp_path / "cache", tmp_path / "cache" / NAME
    server.answers, server.states_length, server.cuts, server.reset, server.wait = {}, True, [], False, None
    server.seen, server.during = [], []
    server.endpoint = f"http://127.0.0.1:{server.server_port}"
    server.url = server.endpoint + FIRST
    point_at(monkeypatch, server.endpoint, server.folder)
    thread = threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=0.01), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def small_model(folder):
    """A model of GPT-2's vocabulary and context, and its file's bytes: 0.8 MB instead of 500."""
    torch.manual_seed(0)
    net = GPT(GPTConfig(**SMALL))
    net.save_pretrained(folder)
    return net, (folder / NAME).read_bytes()


SMALL = dict(n_layer=1, n_head=1, n_embd=4)


def point_at(monkeypatch, endpoint, cache):
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    monkeypatch.setenv("HF_HUB_CACHE", str(cache))
    monkeypatch.setenv("no_proxy", "*")  # the developer's proxy is no part of this test
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)


def files(folder):
    return sorted(str(f.relative_to(folder)) for f in Path(folder).rglob("*") if not f.is_dir())


def is_the_model(hub):
    """Whether 'gpt2' is what the server has, by every parameter."""
    ours, want = GPT.from_pretrained("gpt2"), hub.net
    pairs = zip(ours.state_dict().items(), want.state_dict().values(), strict=True)
    return ours.config == want.config and all(torch.equal(a, b) for (_, a), b in pairs)


def refused(hub):
    """The one line of a download that fails, with nothing left of it, and the line that the user sees of that."""
    cuts = list(hub.cuts)
    with pytest.raises(OSError) as plain:
        download(hub.url, hub.target, hub.sha256)
    assert type(plain.value) is OSError and "\n" not in str(plain.value) and files(hub.folder) == []
    hub.cuts = cuts  # the same again
    with pytest.raises(ConnectionError) as error:
        GPT.from_pretrained("gpt2")
    line = str(error.value)
    assert line.startswith(f"gpt2: {hub.url} could not be fetched (") and "\n" not in line
    assert "configs/toy_cp.py" in line and files(hub.folder) == []
    return str(plain.value)


# --------------------------------------------------------------------------------------------------------------------
# all goes well


def test_complete_download(hub, capsys):
    """The bytes arrive under the final name only when whole, and nothing else is left; the bar goes to stderr."""
    assert download(hub.url, hub.target, hub.sha256) == hub.target
    assert hub.target.read_bytes() == hub.data
    assert files(hub.folder) == [NAME]
    assert hub.during == [False] * 3  # while bytes flow, no reader can take them for the file
    assert hub.seen == [FIRST, SECOND]
    out, err = capsys.readouterr()
    assert out == f"fetching     {hub.url}\n" and "100%" in err


def test_download_makes_folders_and_takes_text(hub):
    """A target several folders deep, given as str."""
    target = hub.folder / "a" / "b" / NAME
    assert download(hub.url, str(target), hub.sha256) == target and target.read_bytes() == hub.data


def test_from_pretrained_downloads_once(hub):
    """The name alone gives the model; the file lies in the hub's cache layout and the second call asks nobody."""
    assert is_the_model(hub)
    assert files(hub.folder) == [MAIN, CACHED] and hub.seen == [FIRST, SECOND]
    assert (hub.folder / CACHED).read_bytes() == hub.data and (hub.folder / MAIN).read_text() == REVISION
    hub.seen.clear()
    assert is_the_model(hub) and hub.seen == []


def test_the_hub_library_finds_what_we_fetch(hub):
    """Other programs need not fetch it again."""
    library = pytest.importorskip("huggingface_hub")
    find = lambda: library.try_to_load_from_cache(REPO, NAME, cache_dir=hub.folder)
    assert find() is None and is_the_model(hub) and find() == str(hub.folder / CACHED)


def test_main_is_left_alone(hub):
    """What the hub library has noted as the newest revision stays so; our file is found beside it all the same."""
    (hub.folder / MAIN).parent.mkdir(parents=True)
    (hub.folder / MAIN).write_text("0" * 40)
    assert is_the_model(hub) and (hub.folder / MAIN).read_text() == "0" * 40
    hub.seen.clear()
    assert is_the_model(hub) and hub.seen == []


LATER = pytest.mark.skipif(sys.version_info < (3, 11), reason="urllib of Python 3.10 does not follow a 308")


@pytest.mark.parametrize("status", [301, 302, 303, 307, pytest.param(308, marks=LATER)])
@pytest.mark.parametrize("to", ["/new-owner/gpt2/resolve/main/x", "{endpoint}/mirror/gpt2?a=b%20c"])
def test_redirects(hub, status, to):
    """A renamed repository answers 307 to its new path, a mirror 308 to another address, before the hub's own 302."""
    to = to.format(endpoint=hub.endpoint)
    path = to.removeprefix(hub.endpoint)
    hub.answers = {FIRST: (status, {"Location": to}, b"moved"), path: (302, {"Location": SECOND}, b"")}
    assert is_the_model(hub) and hub.seen == [FIRST, path, SECOND]


@pytest.mark.parametrize("states_length", [True, False])
def test_plain_server(hub, states_length):
    """A file server that answers at once, and one that does not say how much will come."""
    hub.states_length, hub.url = states_length, hub.endpoint + SECOND
    assert download(hub.url, hub.target, hub.sha256) == hub.target
    assert hub.target.read_bytes() == hub.data and files(hub.folder) == [NAME] and hub.seen == [SECOND]


def test_endpoint_with_a_slash(hub, monkeypatch):
    """HF_ENDPOINT=https://mirror.example/ is what people write; an empty one means the hub."""
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint + "/")
    assert is_the_model(hub) and hub.seen == [FIRST, SECOND]
    monkeypatch.setenv("HF_ENDPOINT", "")
    shutil.rmtree(hub.folder)

    def refuse(*_):
        raise OSError("refused")

    monkeypatch.setattr(weights, "download", refuse)
    with pytest.raises(ConnectionError, match=rf"https://huggingface.co{FIRST} could not be fetched \(refused\)\. Put"):
        GPT.from_pretrained("gpt2")


THREE = """
import os, sys, traceback
sys.path.insert(0, sys.argv[1])
from engine import weights
weights.SHA256["gpt2"] = sys.argv[2]
children = []
for _ in range(3):
    if child := os.fork():
        children.append(child)
        continue
    try:
        shape, tensors = weights.load_weights("gpt2")
        os.write(1, f"{shape['n_embd']} {tensors['transformer.wte.weight'].double().sum().item()}\\n".encode())
    except BaseException:
        os.write(2, traceback.format_exc().encode())
    os._exit(0)
for child in children:
    os.waitpid(child, 0)
"""


def test_three_processes_at_once(hub):
    """Three runs of a sweep start together on a new machine, and all miss the same file.

    The server holds each of its answers back until all three have come so far, at half of the file and at its last
    bytes: so they overlap whatever the machine's mood. Each must end with the right bytes, and the folder must hold
    nothing but the file and refs/main. If both were written by way of one temporary name, one process could rename what
    another still writes, or has renamed already: refs/main was, and of three processes one or two died of it.
    """
    hub.wait = threading.Barrier(3, timeout=60).wait
    argv = [sys.executable, "-c", THREE, str(ROOT), hub.sha256]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120)
    want = f"4 {hub.net.lm_head.weight.double().sum().item()}"
    assert [line for line in done.stdout.splitlines() if line.startswith("4 ")] == [want] * 3, done.stderr
    assert "Traceback" not in done.stderr and done.returncode == 0, done.stderr
    assert hub.seen.count(SECOND) == 3 and hub.during[:6] == [False] * 6  # all were under way before one was done
    assert files(hub.folder) == [MAIN, CACHED]
    assert (hub.folder / CACHED).read_bytes() == hub.data and (hub.folder / MAIN).read_text() == REVISION


# --------------------------------------------------------------------------------------------------------------------
# the hub's cache


@pytest.mark.parametrize("folder", [FOLDER, "models--gpt2"])
@pytest.mark.parametrize("file", [NAME, "pytorch_model.bin", weights.INDEX])
def test_file_in_the_hub_cache_is_used(hub, file, folder):
    """As the hub's library stores it: links from snapshots/<commit> into blobs, under the repository's present name or
    the older one, 'gpt2'. Not one request is made."""
    repo = hub.folder / folder
    state = {k: v.t() if weights._is_conv1d(k) else v for k, v in hub.net.state_dict().items() if k != "lm_head.weight"}
    if file == weights.INDEX:
        names = {k: f"model-{1 + i % 2:05}-of-00002.safetensors" for i, k in enumerate(state)}
        for name in set(names.values()):
            blob = link(repo, name, "0" * 40)
            save_file({k: v.contiguous() for k, v in state.items() if names[k] == name}, blob)
        link(repo, file, "0" * 40).write_text(json.dumps({"metadata": {}, "weight_map": names}))
    elif file == NAME:
        link(repo, file, "0" * 40).write_bytes(hub.data)
    else:
        torch.save(state, link(repo, file, "0" * 40))
    before = files(hub.folder)
    assert is_the_model(hub) and hub.seen == [] and files(hub.folder) == before


def link(repo, name, revision):
    """Make snapshots/<revision>/<name> a link to a blob that does not exist yet, and return that blob's path."""
    blob, place = repo / "blobs" / f"{revision[:4]}-{name}", repo / "snapshots" / revision / name
    for path in (blob, place):
        path.parent.mkdir(parents=True, exist_ok=True)
    place.symlink_to(f"../../blobs/{blob.name}")
    return blob


def other_model(tmp_path):
    """The bytes of another model of the same shape."""
    torch.manual_seed(1)
    GPT(GPTConfig(**SMALL)).save_pretrained(tmp_path / "other")
    return (tmp_path / "other" / NAME).read_bytes()


@pytest.mark.parametrize("main", ["0" * 40, "8" * 40, "f" * 40])
def test_main_comes_first_among_snapshots(hub, tmp_path, main):
    """Of several revisions the hub's library reads the one that refs/main names: so do we, wherever it sorts."""
    for revision in ("0" * 40, "8" * 40, "f" * 40):
        data = hub.data if revision == main else other_model(tmp_path)
        link(hub.folder / FOLDER, NAME, revision).write_bytes(data)
    (hub.folder / MAIN).parent.mkdir()
    (hub.folder / MAIN).write_text(main + "\n")
    assert is_the_model(hub) and hub.seen == []


@pytest.mark.parametrize("main", [None, "", "a" * 40, "b" * 40], ids=["none", "empty", "gone", "without weights"])
def test_main_that_leads_nowhere(hub, main):
    """Without refs/main, or where its snapshot holds no weights (only a tokenizer, say), another snapshot will do."""
    link(hub.folder / FOLDER, NAME, "c" * 40).write_bytes(hub.data)
    link(hub.folder / FOLDER, "vocab.json", "b" * 40).write_text("{}")
    if main is not None:
        (hub.folder / MAIN).parent.mkdir()
        (hub.folder / MAIN).write_text(main)
    assert is_the_model(hub) and hub.seen == []


def test_the_longer_name_comes_first(hub, tmp_path):
    """With both folders there, the repository's present name wins over the older one."""
    link(hub.folder / "models--gpt2", NAME, "0" * 40).write_bytes(other_model(tmp_path))
    link(hub.folder / FOLDER, NAME, "0" * 40).write_bytes(hub.data)
    assert is_the_model(hub) and hub.seen == []


def test_a_dangling_link_is_no_file(hub):
    """Of blobs that were cleared away the links remain: those are passed over, and replaced by a download."""
    link(hub.folder / FOLDER, NAME, "0" * 40)
    link(hub.folder / FOLDER, NAME, REVISION)
    (hub.folder / MAIN).parent.mkdir()
    (hub.folder / MAIN).write_text("0" * 40)
    assert is_the_model(hub) and hub.seen == [FIRST, SECOND]
    assert (hub.folder / CACHED).read_bytes() == hub.data and not (hub.folder / CACHED).is_symlink()
    link(hub.folder / "models--gpt2", NAME, "0" * 40)
    assert is_the_model(hub) and hub.seen == [FIRST, SECOND]


def test_a_snapshot_with_a_good_link_wins_over_a_dangling_one(hub):
    link(hub.folder / FOLDER, NAME, "0" * 40)
    link(hub.folder / FOLDER, NAME, "f" * 40).write_bytes(hub.data)
    assert is_the_model(hub) and hub.seen == []


def test_hub_cache_folder(monkeypatch, tmp_path):
    """HF_HUB_CACHE before HF_HOME before XDG_CACHE_HOME before the home folder; an empty variable counts as none."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "a"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "b"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "c"))
    assert hub_cache() == tmp_path / "a"
    monkeypatch.setenv("HF_HUB_CACHE", "")
    assert hub_cache() == tmp_path / "b" / "hub"
    monkeypatch.setenv("HF_HOME", "")
    assert hub_cache() == tmp_path / "c" / "huggingface" / "hub"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert hub_cache() == tmp_path / ".cache" / "huggingface" / "hub"
    for name in ("HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name)
    assert hub_cache() == tmp_path / ".cache" / "huggingface" / "hub"


@pytest.mark.filterwarnings("ignore:'huggingface_hub.constants' found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize(
    "variables",
    [
        dict(),
        dict(XDG_CACHE_HOME="/x"),
        dict(XDG_CACHE_HOME="~/x"),
        dict(HF_HOME="/h", XDG_CACHE_HOME="/x"),
        dict(HF_HOME="~/h"),
        dict(HF_HUB_CACHE="/c", HF_HOME="/h", XDG_CACHE_HOME="/x"),
        dict(HF_HUB_CACHE="~/c"),
    ],
    ids=str,
)
def test_hub_cache_is_the_hub_librarys(monkeypatch, variables):
    """The same folder as a fresh import of the library takes."""
    pytest.importorskip("huggingface_hub")
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert str(hub_cache()) == runpy.run_module("huggingface_hub.constants")["HF_HUB_CACHE"]


# --------------------------------------------------------------------------------------------------------------------
# the line breaks: nothing is resumed, nothing is left, and the next call fetches the whole


@pytest.mark.parametrize("reset", [False, True], ids=["closed", "reset"])
@pytest.mark.parametrize(
    "at", [0, 1000, 600_000, -1], ids=["before the first byte", "early", "late", "before the last"]
)
def test_a_cut(hub, at, reset):
    """Whether the line was closed or reset, the error says what to do, and doing so helps."""
    at = at if at >= 0 else len(hub.data) - 1
    hub.cuts, hub.reset = [at], reset
    line = refused(hub)
    assert "run again" in line and (reset or "cut off" in line)
    assert hub.seen == [FIRST, SECOND] * 2 and not any(hub.during)
    assert is_the_model(hub) and files(hub.folder) == [MAIN, CACHED]


def test_a_cut_without_a_stated_length(hub):
    """There an early end looks like the end: the sha256 tells them apart."""
    hub.cuts, hub.states_length = [600_000], False
    assert "cut off" in refused(hub)
    assert is_the_model(hub)


@pytest.mark.parametrize("end", [-1, -2], ids=["hangs up", "talks nonsense"])
def test_no_answer(hub, end):
    """A server that hangs up without a word, or speaks no HTTP: one line, no traceback of the HTTP library."""
    hub.cuts = [end]
    assert "run again" in refused(hub)
    assert is_the_model(hub)


def test_a_dead_line(hub, monkeypatch):
    """A server that falls silent half-way is given up after 30 seconds (here 0.3). The time limit is for downloads
    alone: what was set before holds again after it."""
    over, real = threading.Event(), socket.setdefaulttimeout
    hub.wait = lambda: over.wait(20)
    limits = []
    monkeypatch.setattr(socket, "setdefaulttimeout", lambda s: limits.append(s) or real(0.3 if s == 30 else s))
    began = time.monotonic()
    assert "timed out" in refused(hub)
    assert time.monotonic() - began < 5 and limits == [30, None] * 2 and socket.getdefaulttimeout() is None
    over.set()
    real(17)
    try:
        assert is_the_model(hub) and socket.getdefaulttimeout() == 17
    finally:
        real(None)


def test_an_interrupted_download_leaves_nothing(hub, monkeypatch):
    """Ctrl-C half-way: no part of the file stays, and the time limit is taken back."""

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.hub.tqdm, "update", interrupt)
    with pytest.raises(KeyboardInterrupt):
        GPT.from_pretrained("gpt2")
    assert files(hub.folder) == [] and socket.getdefaulttimeout() is None


# --------------------------------------------------------------------------------------------------------------------
# the wrong bytes, or none


def test_wrong_bytes(hub):
    """Another file of the right size: refused by its sha256, thrown away, and fetched anew by the next call."""
    good, hub.data = hub.data, bytes(len(hub.data))
    assert "another file, by its sha256" in refused(hub)
    hub.data = good
    assert is_the_model(hub)


@pytest.mark.parametrize("off", [-10, 10])
def test_wrong_size(hub, off):
    """The file with some bytes less or more, as an older or newer version would be."""
    good, hub.data = hub.data, (hub.data + bytes(10))[: len(hub.data) + off]
    assert "by its sha256" in refused(hub)
    hub.data = good
    assert is_the_model(hub)


def test_a_login_page(hub):
    """A hotel's network answers everything with 200 and a page: no page is taken for weights."""
    hub.answers = {FIRST: (200, {"Content-Type": "text/html"}, b"<!DOCTYPE html><html>Please log in</html>")}
    assert "by its sha256" in refused(hub) and hub.seen == [FIRST] * 2


def test_a_wrong_file_does_not_replace_a_right_one(hub):
    """What is at the target stays until something better is whole."""
    hub.folder.mkdir()
    hub.target.write_bytes(b"old")
    hub.data = b"new, but wrong"
    with pytest.raises(OSError, match="sha256"):
        download(hub.url, hub.target, hub.sha256)
    assert hub.target.read_bytes() == b"old" and files(hub.folder) == [NAME]


@pytest.mark.parametrize("status", [404, 401, 503])
def test_http_errors(hub, status):
    """The status reaches the user, and no error page is taken for weights. What the server will not give by asking
    twice is not to be asked for again."""
    hub.answers = {FIRST: (status, {}, b"an error page")}
    line = refused(hub)
    assert f"HTTP Error {status}" in line and hub.seen == [FIRST] * 2 and ("run again" in line) == (status == 503)


def test_error_behind_the_redirect(hub):
    """The first answer promises a file that the second refuses."""
    hub.answers = {SECOND: (403, {}, b"")}
    line = refused(hub)
    assert "HTTP Error 403" in line and "run again" not in line


def test_redirects_in_a_circle(hub):
    """The HTTP library's message on that has three lines: the user sees one."""
    hub.answers = {FIRST: (302, {"Location": FIRST}, b"")}
    assert "infinite loop" in refused(hub)


@pytest.mark.parametrize("endpoint", ["huggingface.co", "nonsense://x", "http://[", "http://127.0.0.1:port"])
def test_an_endpoint_that_is_no_address(hub, monkeypatch, endpoint):
    """HF_ENDPOINT without https:// and the like: the URL in the error shows it."""
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    with pytest.raises(ConnectionError) as error:
        GPT.from_pretrained("gpt2")
    assert f"gpt2: {endpoint}{FIRST} could not be fetched" in str(error.value) and "\n" not in str(error.value)
    assert files(hub.folder) == [] and hub.seen == []


def test_a_cache_that_cannot_be_written(hub, monkeypatch, tmp_path):
    """A file stands where the folder should be: one line with the path, as for a network that fails."""
    (tmp_path / "occupied").write_text("")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "occupied"))
    with pytest.raises(ConnectionError, match=f"gpt2: .*{tmp_path / 'occupied'}") as error:
        GPT.from_pretrained("gpt2")
    assert "\n" not in str(error.value)


def put_by_hand(tmp_path, target):
    """Do what the error says, and load."""
    net, data = small_model(tmp_path / "made")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(data)
    assert torch.equal(GPT.from_pretrained("gpt2").lm_head.weight, net.lm_head.weight)


def test_no_network(tmp_path, monkeypatch):
    """Offline, at once: which file, from where, where to put it, and which config needs none. And doing so helps."""
    cache = tmp_path / "cache"
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))  # taken, but nobody listens
        port = s.getsockname()[1]
        point_at(monkeypatch, f"http://127.0.0.1:{port}", cache)
        began = time.monotonic()
        with pytest.raises(ConnectionError) as error:
            GPT.from_pretrained("gpt2")
        assert time.monotonic() - began < 5
    text, target = str(error.value), cache / CACHED
    for part in (
        "gpt2",
        f"http://127.0.0.1:{port}{FIRST}",
        f"Put it at {target}",
        f"`hf download {REPO} {NAME}`",
        "--init_from=",
        "configs/toy_cp.py",
    ):
        assert part in text, part
    assert "\n" not in text and files(tmp_path) == []
    put_by_hand(tmp_path, target)


@pytest.mark.parametrize("value", ["1", "true", "YES", "on"])
def test_offline_mode(hub, monkeypatch, tmp_path, value):
    """HF_HUB_OFFLINE as the hub's library reads it: nobody is asked, the error says why, and a cached file loads."""
    monkeypatch.setenv("HF_HUB_OFFLINE", value)
    with pytest.raises(ConnectionError, match=f"^HF_HUB_OFFLINE is set, but {hub.folder / CACHED} is not there: unset"):
        GPT.from_pretrained("gpt2")
    assert hub.seen == [] and files(hub.folder) == []
    put_by_hand(tmp_path, hub.folder / CACHED)
    assert hub.seen == []


@pytest.mark.parametrize("value", ["0", "", "false", "no"])
def test_not_offline(hub, monkeypatch, value):
    monkeypatch.setenv("HF_HUB_OFFLINE", value)
    assert is_the_model(hub) and hub.seen == [FIRST, SECOND]


def test_each_name_has_its_repository(hub):
    """Every published name asks for its own file at its pinned revision: this server knows only gpt2, so that the
    others show their URL."""
    asked = set()
    assert PUBLISHED.keys() == SHA256.keys()
    for name, (repo, revision) in PUBLISHED.items():
        assert re.fullmatch("[0-9a-f]{40}", revision) and re.fullmatch("[0-9a-f]{64}", SHA256[name]), name
        if name == "gpt2":
            continue
        assert repo.split("/")[1] == name
        asked.add(path := f"/{repo}/resolve/{revision}/{NAME}")
        with pytest.raises(ConnectionError, match=f"{name}: {hub.endpoint}{path} .*HTTP Error 404"):
            GPT.from_pretrained(name)
    assert (
        set(hub.seen)
        == asked
        == {
            f"/distilbert/distilgpt2/resolve/{PUBLISHED['distilgpt2'][1]}/{NAME}",
            f"/openai-community/gpt2-medium/resolve/{PUBLISHED['gpt2-medium'][1]}/{NAME}",
            f"/openai-community/gpt2-large/resolve/{PUBLISHED['gpt2-large'][1]}/{NAME}",
            f"/openai-community/gpt2-xl/resolve/{PUBLISHED['gpt2-xl'][1]}/{NAME}",
        }
    )
