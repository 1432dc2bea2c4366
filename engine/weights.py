"""Weights in and out: published names, the hub's cache and downloads, safetensors, .bin, checkpoints.

All of it turns a name or a path into (shape, tensors): the network's dimensions as a dict, and tensors under the names
and in the orientation that model.py has.
"""

import http.client
import json
import mmap
import os
import socket
import urllib.request
import zipfile
from pathlib import Path

import torch

from engine.run import atomic_write, first_line, load_checkpoint

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


def load_weights(source):
    """(shape, tensors) of what GPT.from_pretrained takes."""
    source, path = str(source), Path(source)
    if path.suffix == ".pt":
        saved = load_checkpoint(path)
        return saved["model_config"], saved["model"]
    file = _find_published(source) if source in PUBLISHED else _find_local(path)
    tensors = _read(file)
    shape = _read_shape(file.parent / "config.json") or _infer_shape(tensors, file)
    return shape, {k: v.t() if _is_conv1d(k) and v.dim() == 2 else v for k, v in tensors.items()}


def copy_weights(model, tensors, source):
    """Copy `tensors` into `model`; a missing, extra or misshapen tensor is a ValueError that names it."""
    want, found = model.state_dict(), dict(tensors)
    if "transformer.wte.weight" in found:
        found.setdefault("lm_head.weight", found["transformer.wte.weight"])
    if missing := [k for k in want if k not in found]:
        raise ValueError(f"{source}: tensor {missing[0]} is missing ({len(missing)} in all): not a whole GPT-2 file")
    if extra := sorted(found.keys() - want.keys()):
        raise ValueError(f"{source}: unexpected tensor {extra[0]} ({len(extra)} in all): more layers than the config?")
    for key, target in want.items():
        if (shape := found[key].shape) != target.shape:
            raise ValueError(f"{source}: tensor {key} has shape {tuple(shape)}, wanted {tuple(target.shape)}")
    if not torch.equal(found["lm_head.weight"], found["transformer.wte.weight"]):
        raise ValueError(f"{source}: lm_head.weight differs from transformer.wte.weight, but GPT-2 ties them")
    model.load_state_dict(found)


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
    if path.is_file():
        return path
    if file := _weight_file(path):
        return file
    if path.is_dir():
        raise FileNotFoundError(f"{path} holds neither {' nor '.join(WEIGHT_FILES)}: is it a GPT-2 folder?")
    raise FileNotFoundError(
        f"no model {str(path)!r}: give one of {', '.join(PUBLISHED)}, a folder or file with GPT-2 weights, "
        "a checkpoint (.pt) or a config (.py)"
    )


def _weight_file(folder):
    return next((folder / name for name in WEIGHT_FILES if (folder / name).is_file()), None)


def _read_shape(file):
    """The network's dimensions by a config.json, None if there is none. One that is not a GPT-2's is a ValueError."""
    if not file.is_file():
        return None
    try:
        saved = json.loads(file.read_text())
        shape = {n: int(saved[n]) for n in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")}
    except KeyError as e:
        raise ValueError(f"{file} lacks {e.args[0]}: is it a GPT-2's?") from e
    except (ValueError, TypeError) as e:
        raise ValueError(f"{file} is not a GPT-2's: {e}") from e
    want = {"model_type": "gpt2", "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "n_inner": None}
    want |= {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "tie_word_embeddings": True}
    if saved.get("n_inner") == 4 * shape["n_embd"]:
        saved["n_inner"] = None  # which says the same
    for key, value in want.items():
        if saved.get(key, value) != value:
            raise ValueError(f"{file}: {key}={saved[key]!r}, but GPT-2 has {value!r}")
    return shape


def _infer_shape(tensors, file):
    """The dimensions of a lone weight file; heads are 64 wide, as in all published sizes."""
    if not {"transformer.wte.weight", "transformer.wpe.weight"} <= tensors.keys():
        raise ValueError(f"{file}: tensor wte.weight or wpe.weight is missing: not a GPT-2 file")
    (V, C), T = tensors["transformer.wte.weight"].shape, tensors["transformer.wpe.weight"].shape[0]
    n_layer = sum(k.endswith(".ln_1.weight") for k in tensors)
    return dict(vocab_size=V, n_positions=T, n_embd=C, n_layer=n_layer, n_head=max(1, C // 64))


def _read(file):
    """name -> tensor of a weight file, or of the several files that an index names; names as in model.py."""
    try:
        if file.name == INDEX:
            names = sorted(set(json.loads(file.read_text())["weight_map"].values()))
            if any(Path(name).name != name for name in names):
                raise ValueError("it names a file outside its folder")
            tensors = {k: v for name in names for k, v in _read_safetensors(file.parent / name).items()}
        elif file.suffix == ".safetensors":
            tensors = _read_safetensors(file)
        else:  # files from before 2020 are no zip archives, and cannot be mapped
            tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as e:
        raise ValueError(f"{file} cannot be read as weights ({first_line(e)}): fetch it again") from e
    if not isinstance(tensors, dict) or not all(isinstance(t, torch.Tensor) for t in tensors.values()):
        raise ValueError(f"{file} holds no table of tensors: give the weights (a state dict), nothing else")
    ours = {}
    for key, tensor in tensors.items():
        if not key.endswith((".attn.bias", ".attn.masked_bias")):  # causal masks that old files store as buffers
            bare = key.removeprefix("transformer.")
            ours[key if key.startswith("lm_head.") else f"transformer.{bare}"] = tensor
    return ours


def _read_safetensors(file):
    """name -> tensor, mapped from the file without a copy. Format: 8-byte little-endian header length, JSON, bytes."""
    dtypes = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "U8": torch.uint8, "BOOL": torch.bool}
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
    return Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub").expanduser()


def _find_published(name):
    """The weight file of a published model: cached, else downloaded."""
    repo, revision = PUBLISHED[name]
    folders = [hub_cache() / ("models--" + r.replace("/", "--")) for r in (repo, name)]  # 'gpt2' is its older name
    for folder in folders:
        main = folder / "refs" / "main"
        snapshots = [folder / "snapshots" / main.read_text().strip()] if main.is_file() else []
        for snapshot in snapshots + sorted(folder.glob("snapshots/*")):
            if file := _weight_file(snapshot):
                return file
    target = folders[0] / "snapshots" / revision / WEIGHT_FILES[0]
    endpoint = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    url = f"{endpoint}/{repo}/resolve/{revision}/{WEIGHT_FILES[0]}"
    try:
        if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
            raise OSError("HF_HUB_OFFLINE is set")
        download(url, target, SHA256[name])
    except OSError as e:
        raise ConnectionError(
            f"{name}: {url} could not be fetched ({e}). Put that file at {target}, or fetch it with resume by "
            f"`hf download {repo} {WEIGHT_FILES[0]}`, or give a folder as --init_from=FOLDER; configs/toy_cp.py needs "
            "no download"
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
        forbidden = getattr(e, "code", None) in (401, 403, 404)  # another time as well
        raise OSError(first_line(e) + ("" if forbidden else "; run again")) from e
    finally:
        socket.setdefaulttimeout(before)
    return target
