"""Weights in and out: published names, the hub's cache and downloads, safetensors, .bin, checkpoints.

All of it turns a name or a path into (shape, tensors): the network's dimensions as a dict, and tensors under the names
and in the orientation that model.py has. A file is a stranger's: no code in it runs, and its sizes are checked before
anything larger than the file is allocated.
"""

import http.client
import json
import math
import mmap
import os
import pickle
import pickletools
import re
import socket
import urllib.request
import zipfile
from pathlib import Path

import torch
import torch.nn as nn
from torch.overrides import TorchFunctionMode

from engine.run import atomic_write, first_line, read_json

PUBLISHED = {  # name: repository and revision
    "distilgpt2": ("distilbert/distilgpt2", "2290a62682d06624634c1f46a6ad5be0f47f38aa"),
    "gpt2": ("openai-community/gpt2", "607a30d783dfa663caf39e06633721c8d4cfcd7e"),
    "gpt2-medium": ("openai-community/gpt2-medium", "6dcaa7a952f72f9298047fd5137cd6e4f05f41da"),
    "gpt2-large": ("openai-community/gpt2-large", "32b71b12589c2f8d625668d2335a01cac3249519"),
    "gpt2-xl": ("openai-community/gpt2-xl", "15ea56dee5df4983c59b2538573817e1667135e2"),
}
SHA256 = {  # of model.safetensors at that revision
    "distilgpt2": "e1ff18884359fe8beb795a5f414feb85a6ce3d929ad019c0d958c039d2b94a1b",
    "gpt2": "248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707",
    "gpt2-medium": "fc5a354a19255ad494f3d71549390baca1ccf61d1d822b9408971705c687c9cd",
    "gpt2-large": "5f47f3e12f91cd33b662ce7e433b6150ad5512b5884a2cee961b50e9c3bbebce",
    "gpt2-xl": "0f8b28eb05a8075f48b61b6f35332978c74fc7763fa9fb4051a1c30511736a6a",
}
INDEX = "model.safetensors.index.json"  # of a model in several files
WEIGHT_FILES = ("model.safetensors", INDEX, "pytorch_model.bin")
SIZES = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")
TOKENIZERS = {537: "toy", 50257: "gpt2"}  # by the size of their vocabulary
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# What tensors import. Of the rest that torch.load lets pass, some can make gigabytes out of a few bytes.
IMPORTS = r"collections OrderedDict|torch\._utils _rebuild_(tensor|tensor_v2|parameter)|torch(\.cuda)? \w+Storage"


def load_checkpoint(path, mmap=False):
    """The dict in a .pt file of train.py: model, model_config, step and config are checked. Raises with one line. With
    `mmap` the tensors stay in the file: for who wants the rest."""
    path = Path(path)
    saved = _read_torch(path, mmap)
    if not isinstance(saved, dict) or "model" not in saved or not isinstance(saved.get("model_config"), dict):
        raise ValueError(f"{path} is no checkpoint of train.py: give best.pt or last.pt of a run")
    tensors, config, step = _ours(saved["model"], path), saved.get("config", {}), saved.get("step", 0)
    if "lora" not in saved:
        _check_shape(saved["model_config"], _told(tensors, path), path)
    if type(step) is not int or step < 0:
        raise ValueError(f"{path}: step wants a whole number of at least 0, got {step!r:.60}: give another checkpoint")
    entries = config.items() if type(config) is dict else [(None, None)]
    if bad := [e for e in entries if type(e[0]) is not str or type(e[1]) not in (str, int, float, bool)]:
        raise ValueError(f"{path}: config wants texts and numbers by name, got {bad[0]!r:.60}: give another checkpoint")
    return saved | {"model": tensors}


def load_weights(source):
    """(shape, tensors) of what GPT.from_pretrained takes."""
    source, path = str(source), Path(source)
    file = _find_published(source) if source in PUBLISHED else _find_local(path)
    safe = file.suffix.lower() in (".safetensors", ".json")
    saved = None if safe else _read_torch(file, mmap=True)
    if isinstance(saved, dict) and "lora" in saved:
        return _merge_lora(saved, file)
    shape, tensors = (None, _read(file)) if safe else _unwrap(saved, file)
    told, config = _told(tensors, file), file.parent / "config.json"
    if shape is None and config.is_file():
        shape, file = _read_shape(config), config
    elif shape is None:
        shape = told | {"n_head": _heads(told, file, source in PUBLISHED)}
    _check_shape(shape, told, file)
    c_attn = tensors.get("transformer.h.0.attn.c_attn.weight")
    if c_attn is not None and c_attn.shape == (told["n_embd"], 3 * told["n_embd"]):  # nn.Linear has (3C, C)
        tensors = {k: v.t() if _is_conv1d(k) and v.dim() == 2 else v for k, v in tensors.items()}
    return shape, tensors


def cut_vocabulary(shape, tensors, vocab_size, source):
    """(shape, tensors) without padding behind the tokenizer's tokens. Another vocabulary is a ValueError."""
    if not vocab_size == 50257 < shape["vocab_size"] <= 50304:  # the next multiple of 64, for speed; or pad tokens
        size = shape["vocab_size"]
        fits = TOKENIZERS.get(50257 if 50257 < size <= 50304 else size)
        hint = f"give --tokenizer={fits}" if fits else "no tokenizer here fits, give a model of GPT-2's vocabulary"
        raise ValueError(f"{source} has a vocabulary of {size}, the tokenizer one of {vocab_size}: {hint}")
    print(f"note         {source}: its vocabulary of {shape['vocab_size']} is cut to {vocab_size}: the rest is padding")
    cut = {k: tensors[k][:vocab_size] for k in ("transformer.wte.weight", "lm_head.weight") if k in tensors}
    return shape | {"vocab_size": vocab_size}, tensors | cut


class Uninitialised(TorchFunctionMode):
    """Leaves out normal_: on the meta device its first call imports for two seconds."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return kwargs["tensor"] if func is nn.init.normal_ else func(*args, **(kwargs or {}))


def copy_weights(model, tensors, source):
    """Copies of `tensors`, in fp32, for a model on the meta device. A missing, extra or misshapen one: ValueError."""
    want, found = model.state_dict(), dict(tensors)
    wte = found["transformer.wte.weight"]
    found.setdefault("lm_head.weight", wte)
    if missing := [k for k in want if k not in found]:
        raise ValueError(f"{source}: tensor {missing[0]} is missing ({len(missing)} in all): not a whole GPT-2 file")
    if extra := sorted(found.keys() - want.keys()):
        raise ValueError(f"{source}: unexpected tensor {extra[0]} ({len(extra)} in all): is it a GPT-2 and no more?")
    for key, target in want.items():
        if (shape := found[key].shape) != target.shape:
            raise ValueError(f"{source}: tensor {key} has shape {tuple(shape)}, wanted {tuple(target.shape)}")
    lm_head = found.pop("lm_head.weight")
    if lm_head.dtype != wte.dtype or not torch.equal(lm_head, wte):
        raise ValueError(f"{source}: lm_head.weight differs from transformer.wte.weight, but GPT-2 ties them")
    new = dict(dtype=torch.float32, copy=True, memory_format=torch.contiguous_format)  # the file's memory is mapped
    copies = {k: v.detach().to(**new) for k, v in found.items()}
    model.load_state_dict(copies | {"lm_head.weight": copies["transformer.wte.weight"]}, assign=True)
    model.lm_head.weight = model.transformer.wte.weight  # tied again


def save_folder(folder, shape, tensors):
    """Write config.json and model.safetensors (fp32) so that `transformers` loads the folder as a GPT-2."""
    tensors = {k: v.t() if _is_conv1d(k) else v for k, v in tensors.items() if k != "lm_head.weight"}
    arrays = {k: v.detach().float().cpu().contiguous().numpy() for k, v in tensors.items()}
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, x in arrays.items():
        header[name] = {"dtype": "F32", "shape": x.shape, "data_offsets": [offset, offset + x.nbytes]}
        offset += x.nbytes
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)  # tensors start at a multiple of 8
    parts = [len(head).to_bytes(8, "little"), head, *arrays.values()]
    atomic_write(Path(folder) / "model.safetensors", lambda f: f.writelines(parts))
    end = shape["vocab_size"] - 1
    config = shape | dict(model_type="gpt2", architectures=["GPT2LMHeadModel"], activation_function="gelu_new")
    config |= dict(layer_norm_epsilon=1e-5, tie_word_embeddings=True, dtype="float32")
    config |= dict(bos_token_id=end, eos_token_id=end)
    atomic_write(Path(folder) / "config.json", json.dumps(config, indent=2))


def _is_conv1d(name):
    """The four weights per block that GPT-2 stores as (in, out), the transpose of nn.Linear's (out, in)."""
    return name.endswith(("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight"))


def _find_local(path):
    """The weight file of a folder, or the file itself."""
    file = path if path.is_file() else _weight_file(path)
    adapter = (path.parent if path.is_file() else path) / "adapter_config.json"
    if adapter.is_file() and (file is None or file.name.startswith("adapter_model")):
        base = read_json(adapter).get("base_model_name_or_path", "a model that it does not name")
        how = "merge the two with peft (merge_and_unload, then save_pretrained into a new folder) and give that folder"
        raise ValueError(f"{path} is a LoRA adapter of {base!s:.80}: {how}")
    if file or path.suffix.lower() == ".pt":
        return file or path
    if steps := [p for p in path.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name)]:
        last = max(steps, key=lambda p: int(p.name[11:]))
        raise FileNotFoundError(f"{path} holds checkpoints of a Trainer, but no model itself: give for instance {last}")
    if path.is_dir():
        raise FileNotFoundError(f"{path} holds neither {' nor '.join(WEIGHT_FILES)}: is it a GPT-2 folder?")
    raise FileNotFoundError(
        f"no model {str(path)!r}: give one of {', '.join(PUBLISHED)}, a folder or file with GPT-2 weights, "
        "a checkpoint (.pt) or a config (.py)"
    )


def _weight_file(folder):
    return next((folder / name for name in WEIGHT_FILES if (folder / name).is_file()), None)


def _read_shape(file):
    """The network's dimensions by a config.json. One that is not a GPT-2's is a ValueError."""
    saved = read_json(file)
    if missing := [name for name in SIZES if name not in saved]:
        raise ValueError(f"{file} lacks {missing[0]}: is it a GPT-2's?")
    want = {"model_type": "gpt2", "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "n_inner": None}
    want |= {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "tie_word_embeddings": True}
    if type(saved["n_embd"]) is int and saved.get("n_inner") == 4 * saved["n_embd"]:
        saved["n_inner"] = None  # which says the same
    for key, value in want.items():
        if saved.get(key, value) != value:
            raise ValueError(f"{file}: {key}={saved[key]!r:.60}, but GPT-2 has {value!r}: only GPT-2 works here")
    return {name: saved[name] for name in SIZES}


def _told(tensors, file):
    """The dimensions that tensors tell: all but the number of heads."""
    try:
        (V, C), (T, _) = (tensors[f"transformer.{name}.weight"].shape for name in ("wte", "wpe"))
    except (KeyError, ValueError) as e:
        raise ValueError(f"{file}: tensor wte.weight or wpe.weight is missing or no matrix: not a GPT-2 file") from e
    n_layer = len({k.split(".")[2] for k in tensors if k.startswith("transformer.h.")})
    return dict(vocab_size=V, n_positions=T, n_embd=C, n_layer=n_layer)


def _heads(told, file, published):
    """The number of heads in a lone weight file: they are 64 wide in all published sizes."""
    n_head = max(1, told["n_embd"] // 64)
    if not published:
        if told["n_embd"] not in (768, 1024, 1280, 1600):
            raise ValueError(f"{file} does not tell its number of heads: give it a config.json with {', '.join(SIZES)}")
        print(f"note         {file}: no config.json beside it, so {n_head} heads are taken: 64 wide, as in GPT-2")
    return n_head


def _check_shape(shape, told, file):
    """A shape is five counts that agree with what its tensors tell. So it cannot be larger than the file."""
    if not isinstance(shape, dict) or shape.keys() != set(SIZES):
        raise ValueError(f"{file}: wanted {', '.join(SIZES)}, got {shape!r:.90}: is it a GPT-2's?")
    for name, value in shape.items():
        if type(value) is not int or value < 1:
            raise ValueError(f"{file}: {name} wants a whole number of at least 1, got {value!r:.60}: is it a GPT-2's?")
        if value != told.get(name, value):
            own = "the file contradicts itself, so it is damaged: give another"
            hint = "give the config of this file" if file.suffix == ".json" else own
            raise ValueError(f"{file}: {name}={value!r:.60}, but the tensors have {told[name]}: {hint}")
    if shape["n_embd"] % shape["n_head"]:
        raise ValueError(
            f"{file}: n_embd={shape['n_embd']} is not a multiple of n_head={shape['n_head']!r:.60}: mend that"
        )


def _read(file):
    """The tensors of a safetensors file, or of the several that an index names."""
    files = [file]
    if file.name == INDEX:
        names = read_json(file).get("weight_map")
        names = list(names.values()) if isinstance(names, dict) else [None]
        if not all(isinstance(n, str) and re.fullmatch(r"[^/\\\0]+\.safetensors", n) for n in names):
            raise ValueError(f"{file}: it names a file outside its folder, or none of weights: copy it again")
        files = [file.parent / name for name in sorted(set(names))]
    tensors = {}
    for part in files:
        try:
            table = _read_safetensors(part)
        except Exception as e:
            raise _unreadable(part, e) from e
        tensors |= _ours(table, part)
    return tensors


def _read_torch(file, mmap=False):
    """What torch.save wrote. Its pickles are looked through before they are loaded."""
    if not file.is_file():
        raise FileNotFoundError(f"no checkpoint at {file}: train one first, or check the path")
    try:
        with open(file, "rb") as f:
            zipped = f.read(4) == b"PK\3\4"  # as torch tells; files from before 2020 are none, and cannot be mapped
            f.seek(0)
            archive = zipfile.ZipFile(f) if zipped else None
            entries = archive.infolist() if zipped else []
            if any(e.compress_type for e in entries) or sum(e.file_size for e in entries) > file.stat().st_size:
                raise ValueError("a compressed archive")
            pickles = [archive.open(e) for e in entries if e.filename.endswith(".pkl")] if zipped else [f] * 5
            names = [name for p in pickles for op, name, _ in pickletools.genops(p) if op.name == "GLOBAL"]
        foreign = [name for name in names if not re.fullmatch(IMPORTS, name)]
        saved = None if foreign else torch.load(file, map_location="cpu", weights_only=True, mmap=mmap and zipped)
    except Exception as e:
        raise _unreadable(file, e) from e
    if foreign:
        what = f"{file} wants to import {foreign[0].replace(' ', '.'):.80}, as a whole pickled model does: it could"
        raise ValueError(f"{what} run code. Where it was made, save the model's state_dict(), or by save_pretrained")
    return saved


def _unreadable(file, e):
    """The error for a damaged file, or one of another kind. torch's advice, weights_only=False, is not passed on."""
    head, how = b"", "damaged or cut short? Copy it again, or give another file"
    if not isinstance(e, OSError):  # then there is nothing to look at
        with open(file, "rb") as f:
            head = f.read(23)
    reason = "not made of tensors and plain types" if isinstance(e, pickle.UnpicklingError) else first_line(e)
    if head == b"version https://git-lfs":
        reason, how = "a pointer of git-lfs, not the file itself", "fetch that by `git lfs pull`"
    elif head and head[:1] != b"\x80" and head[:2] != b"PK" and head[8:9] != b"{":
        reason, how = "neither safetensors nor written by torch.save", "give GPT-2 weights (.safetensors, .bin, .pt)"
    return ValueError(f"{file} cannot be read as weights ({reason}): {how}")


def _unwrap(saved, file):
    """(shape or None, tensors) of what torch.save wrote: a state dict, or one inside of a checkpoint."""
    if not isinstance(saved, dict):
        return None, _ours(saved, file)
    shape = saved.get("model_config")
    if "model_args" in saved:  # nanoGPT. Its GELU is the exact one, which moves logits by less than 1e-3
        args = saved["model_args"] if isinstance(saved["model_args"], dict) else {}
        if args.get("bias") is False:
            raise ValueError(f"{file}: nanoGPT's bias=False, but a GPT-2 has biases: train it with bias=True")
        shape = {name: args.get("block_size" if name == "n_positions" else name) for name in SIZES}
    for key in ("model", "state", "state_dict", "model_state_dict"):  # 'state' is the DPO reference implementation's
        if isinstance(saved.get(key), dict):
            saved = saved[key]
    return shape, _ours(saved, file)


def lora_record(base, tensors, scale):
    """What a checkpoint of LoRA's matrices says of the rest: the base's name or path, and a sum to know it again by."""
    return dict(base=str(Path(base).resolve()) if Path(base).exists() else base, scale=scale, sum=_sum(tensors))


def _sum(tensors):
    return tensors["transformer.h.0.attn.c_attn.weight"].double().sum().item()


def _merge_lora(saved, file):
    """(shape, tensors) of the base that a checkpoint of LoRA's matrices names, with these added. Raises ValueError."""
    lora, ours = saved["lora"], _ours(saved.get("model"), file)
    try:
        shape, tensors = load_weights(lora["base"])
        same = math.isclose(_sum(tensors), lora["sum"], rel_tol=1e-6, abs_tol=1e-6)
        names = [k.removesuffix(".lora_b") for k in ours if k.endswith(".lora_b")]
        added = {f"{k}.weight": lora["scale"] * (ours[f"{k}.lora_b"] @ ours[f"{k}.lora_a"]) for k in names}
        merged = {k: tensors[k].float() + x for k, x in added.items()}
    except (KeyError, TypeError, RuntimeError, AttributeError) as e:
        raise ValueError(f"{file} holds LoRA that fits no model: give best.pt or last.pt of a run") from e
    except (FileNotFoundError, ValueError) as e:
        raise ValueError(f"{file} holds LoRA for {lora['base']}, which cannot be loaded: {first_line(e)}") from e
    if not same:
        raise ValueError(f"{file} holds LoRA for another {lora['base']} than is there now: put the old one back")
    return shape, tensors | merged


def _ours(table, file):
    """The tensors of a file under model.py's names. Each must be numbers that the file really holds."""
    entries = table.items() if isinstance(table, dict) else [(None, None)]
    if not all(isinstance(k, str) and isinstance(t, torch.Tensor) for k, t in entries):
        raise ValueError(f"{file} holds no table of tensors: give the weights (a state dict), nothing else")
    ours, left = {}, file.stat().st_size
    for key, tensor in table.items():
        bare = re.sub(r"^((module|_orig_mod)\.)*(transformer\.)?", "", key)  # DistributedDataParallel, torch.compile
        if bare.startswith(("trf_blocks.", "tok_emb.")):
            how = "give the original GPT-2 files that it was loaded from, or convert it to the names of transformers"
            raise ValueError(f"{file} has the layout of LLMs-from-scratch ({bare:.60}): {how}")
        if bare.endswith((".attn.bias", ".attn.masked_bias")):  # causal masks that old files store as buffers
            continue
        if tensor.dtype not in FLOATS.values() or tensor.layout != torch.strided or tensor.device.type != "cpu":
            kind = f"{tensor.dtype}, {tensor.layout}, on {tensor.device}"
            raise ValueError(f"{file}: tensor {key:.60} is {kind}, wanted fp64, fp32, fp16 or bf16: convert it")
        nbytes = tensor.numel() * tensor.element_size()
        left -= 0 if bare == "lm_head.weight" else nbytes  # tied, it shares memory
        if left < 0 or nbytes > tensor.untyped_storage().nbytes():
            shape = tuple(tensor.shape)
            raise ValueError(f"{file}: tensor {key:.60} of shape {shape} is not all in the file: save a clone of it")
        ours[bare if bare.startswith("lm_head.") else f"transformer.{bare}"] = tensor
    return ours


def _read_safetensors(file):
    """name -> tensor, mapped from the file without a copy. Format: 8-byte little-endian header length, JSON, bytes."""
    dtypes = FLOATS | {"U8": torch.uint8, "BOOL": torch.bool}  # the latter for masks
    with open(file, "rb") as f:
        data = memoryview(mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_COPY))
    start = 8 + int.from_bytes(data[:8], "little")
    if start > len(data):
        raise ValueError(f"header of {start - 8} bytes in a file of {len(data)}")
    try:
        header = json.loads(bytes(data[8:start]))
    except ValueError as e:
        raise ValueError("the header is not JSON") from e
    header.pop("__metadata__", None)
    tensors, data = {}, data[start:]
    for name, entry in header.items():
        try:
            begin, end = entry["data_offsets"]
            tensors[name] = torch.frombuffer(data[begin:end], dtype=dtypes[entry["dtype"]]).view(entry["shape"])
        except Exception as e:
            raise ValueError(f"tensor {name} is unreadable, has another size or lies outside the file: {entry}") from e
    return tensors


def hub_cache():
    """The hub library's cache folder, by the same environment variables."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    return Path(os.path.expanduser(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub"))  # also without a home


def _find_published(name):
    """The weight file of a published model: cached, else downloaded."""
    repo, revision = PUBLISHED[name]
    folders = [hub_cache() / ("models--" + r.replace("/", "--")) for r in (repo, name)]  # 'gpt2' is its older name
    for folder in folders:
        main = folder / "refs" / "main"
        snapshots = [folder / "snapshots" / main.read_text(errors="replace").strip()] if main.is_file() else []
        for snapshot in snapshots + sorted(folder.glob("snapshots/*")):
            if file := _weight_file(snapshot):
                return file
    target = folders[0] / "snapshots" / revision / WEIGHT_FILES[0]
    endpoint = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    url = f"{endpoint}/{repo}/resolve/{revision}/{WEIGHT_FILES[0]}"
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise ConnectionError(f"HF_HUB_OFFLINE is set, but {target} is not there: unset it, or give --init_from=FOLDER")
    try:
        download(url, target, SHA256[name])
    except OSError as e:
        mirror = "; is HF_ENDPOINT right?" * bool(os.environ.get("HF_ENDPOINT"))
        raise ConnectionError(
            f"{name}: {url} could not be fetched ({e}{mirror}). Put it at {target}, or run `hf download {repo} "
            f"{WEIGHT_FILES[0]}`, which resumes, or give --init_from=FOLDER; configs/toy_cp.py needs no download"
        ) from e
    if not (folders[0] / "refs" / "main").is_file():
        atomic_write(folders[0] / "refs" / "main", revision)
    return target


def download(url, target, sha256):
    """Fetch url to target with a progress bar. The file appears under its name only when whole and its sha256 right;
    several processes may ask at once. Raises OSError with one clear line."""
    target = Path(target)
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(30)  # a line that has gone dead must not hang for ever
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        print(f"fetching     {url}")
        urllib.request.Request(url)  # a ValueError if it is no address; torch would leave an empty file then
        torch.hub.download_url_to_file(url, str(target), hash_prefix=sha256)
    except RuntimeError as e:  # torch's word for a wrong sha256: cut off, a login page, another version
        raise OSError("what came is cut off or another file, by its sha256; thrown away, run again") from e
    except (OSError, ValueError, http.client.HTTPException) as e:
        final = getattr(e, "code", None) in (401, 403, 404) or isinstance(e, ValueError | http.client.InvalidURL)
        raise OSError(first_line(e) + ("" if final else "; run again")) from e  # else: not so another time
    finally:
        socket.setdefaulttimeout(before)
    return target
