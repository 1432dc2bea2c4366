"""model.download and GPT.from_pretrained('gpt2') against a local server that imitates the hub: no network is used."""

import hashlib
import socket
import struct
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

import model as model_py
from model import GPT, GPTConfig

NAME = "model.safetensors"
FIRST = f"/openai-community/gpt2/resolve/main/{NAME}"  # answers with a redirect to SECOND, as the hub does
SECOND = "/cdn/blob"


class Handler(BaseHTTPRequestHandler):
    """The hub in two answers. What goes wrong is set on the server: see `hub`."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        hub = self.server
        hub.seen.append((self.command, self.path, self.headers.get("Range")))
        self.close_connection = True
        if status := hub.refuse.get(self.path, 0 if self.path in (FIRST, SECOND) else 404):
            self.reply(status, {"Content-Length": 0})
        elif self.path == FIRST and hub.redirects:
            self.reply(302, hub.linked | {"Location": SECOND, "Content-Length": 0})
        else:
            self.send_data(body)

    def send_data(self, body):
        hub, begin = self.server, 0
        asked = self.headers.get("Range")
        if asked and hub.ranges:
            begin = int(asked.removeprefix("bytes=").removesuffix("-"))
            if begin >= len(hub.data):
                return self.reply(416, {"Content-Length": 0})
        data = hub.data[begin:]
        ranged = {"Content-Range": f"bytes {begin}-{len(hub.data) - 1}/{len(hub.data)}"} if asked and hub.ranges else {}
        self.reply(206 if ranged else 200, ranged | {"Content-Length": len(data)})
        if not body:
            return
        end = hub.cuts.pop(0) if hub.cuts else len(data)
        hub.sent += len(data[:end])  # before the client can have it all and look
        self.wfile.write(data[: end // 2])
        hub.during.append(hub.target.exists())
        self.wfile.write(data[end // 2 : end])
        if hub.reset and end < len(data):  # an abrupt end instead of an orderly one
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()

    def reply(self, status, headers):
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, str(value))
        self.send_header("Connection", "close")
        self.end_headers()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A running server with one weight file, and HF_ENDPOINT, HF_HUB_CACHE pointing to it and to a new folder.

    data, linked, redirects, ranges: what is served and how; refuse: path -> HTTP status; cuts: after how many bytes the
    next answers break off; seen: (method, path, Range) of every request; sent: bytes of body; during: was `target`
    there half-way?
    """
    torch.manual_seed(0)
    monkeypatch.setitem(model_py.PUBLISHED, "gpt2", ("openai-community/gpt2", 1, 2, 4))  # 0.8 MB instead of 500
    net = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=4))
    net.save_pretrained(tmp_path / "made")

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.net, server.data = net, (tmp_path / "made" / NAME).read_bytes()
    server.folder, server.target = tmp_path / "cache", tmp_path / "cache" / NAME
    server.linked = linked(server.data)
    server.redirects, server.ranges, server.reset, server.refuse = True, True, False, {}
    server.cuts, server.seen, server.during, server.sent = [], [], [], 0
    server.endpoint = f"http://127.0.0.1:{server.server_port}"
    server.url = server.endpoint + FIRST
    point_at(monkeypatch, server.endpoint, server.folder)
    thread = threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=0.01), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def linked(data):
    """What the hub states about the file in its first answer."""
    return {"X-Linked-Size": len(data), "X-Linked-Etag": f'"{hashlib.sha256(data).hexdigest()}"'}


def point_at(monkeypatch, endpoint, cache):
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    monkeypatch.setenv("HF_HUB_CACHE", str(cache))
    monkeypatch.setenv("no_proxy", "*")  # the developer's proxy is no part of this test


def files(folder):
    return sorted(str(f.relative_to(folder)) for f in Path(folder).rglob("*") if f.is_file())


def gets(hub):
    """The Range of every request for the file's bytes, in order."""
    return [wanted for method, path, wanted in hub.seen if method == "GET" and path == SECOND]


CACHED = f"models--openai-community--gpt2/snapshots/main/{NAME}"  # where the hub's own library would look


# --------------------------------------------------------------------------------------------------------------------
# all goes well


def test_complete_download(hub, capsys):
    """The bytes arrive under the final name only when whole, and nothing else is left; the bar goes to stderr."""
    assert model_py.download(hub.url, hub.target) == hub.target
    assert hub.target.read_bytes() == hub.data
    assert files(hub.folder) == [NAME]
    assert hub.during == [False]  # while bytes flow, no reader can take them for the file
    assert hub.seen[0] == ("HEAD", FIRST, None) and gets(hub) == [None] and hub.sent == len(hub.data)
    out, err = capsys.readouterr()
    assert out == "" and NAME in err and "100%" in err


def test_from_pretrained_downloads_once(hub):
    """The name alone gives the model; the file lies in the hub's cache layout and the second call asks nobody."""
    net = GPT.from_pretrained("gpt2")
    assert files(hub.folder) == [CACHED]
    for (name, a), b in zip(net.state_dict().items(), hub.net.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert net.config == hub.net.config
    hub.seen.clear()
    assert torch.equal(GPT.from_pretrained("gpt2").lm_head.weight, net.lm_head.weight)
    assert hub.seen == []


@pytest.mark.parametrize("file", [NAME, "pytorch_model.bin"])
def test_file_in_the_hub_cache_is_used(hub, file):
    """As the hub's library stores it: a link from snapshots/<commit> into blobs. Not one request is made."""
    repo = hub.folder / "models--openai-community--gpt2"
    blob, link = repo / "blobs" / "abc", repo / "snapshots" / ("0" * 40) / file
    for path in (blob, link):
        path.parent.mkdir(parents=True)
    if file == NAME:
        blob.write_bytes(hub.data)
    else:
        state = {k: v.t() if model_py._is_conv1d(k) else v for k, v in hub.net.state_dict().items()}
        torch.save(state, blob)
    link.symlink_to(blob)
    assert torch.equal(GPT.from_pretrained("gpt2").lm_head.weight, hub.net.lm_head.weight)
    assert hub.seen == [] and len(files(hub.folder)) == 2


def test_hub_cache_folder(monkeypatch, tmp_path):
    """HF_HUB_CACHE before HF_HOME before the home folder; an empty variable counts as none."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "a"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "b"))
    assert model_py.hub_cache() == tmp_path / "a"
    monkeypatch.setenv("HF_HUB_CACHE", "")
    assert model_py.hub_cache() == tmp_path / "b" / "hub"
    monkeypatch.delenv("HF_HOME")
    assert model_py.hub_cache() == tmp_path / ".cache" / "huggingface" / "hub"


def test_server_without_linked_headers(hub, capsys):
    """A plain file server: the size comes from Content-Length, and that the sha256 is unknown is said."""
    hub.redirects = False
    model_py.download(hub.url, hub.target)
    assert hub.target.read_bytes() == hub.data and files(hub.folder) == [NAME]
    assert f"note: the server states no sha256 for {NAME}" in capsys.readouterr().out


def test_plain_server_is_checked_by_content_length(hub):
    """Without a sha256 a cut is still found, by the size, and resumed."""
    hub.redirects, hub.cuts = False, [1000]
    with pytest.raises(OSError, match=f"cut off at 1000 of {len(hub.data)} bytes"):
        model_py.download(hub.url, hub.target)
    assert not hub.target.exists()
    model_py.download(hub.url, hub.target)
    assert hub.target.read_bytes() == hub.data
    assert [r for m, _, r in hub.seen if m == "GET"] == [None, "bytes=1000-"]


# --------------------------------------------------------------------------------------------------------------------
# the line breaks


@pytest.mark.parametrize("reset", [False, True], ids=["closed", "reset"])
def test_resumes_after_a_cut(hub, reset):
    """The second call asks for the missing bytes only; whether the line was closed or reset, no byte comes twice."""
    hub.cuts, hub.reset = [600_000], reset
    with pytest.raises(OSError, match="cut off.*run again to resume"):
        model_py.download(hub.url, hub.target)
    assert files(hub.folder) == [NAME + ".part"]
    have = (hub.folder / (NAME + ".part")).stat().st_size
    assert have == 600_000 or (reset and have < 600_000)  # a reset may swallow what was under way
    hub.sent = 0
    model_py.download(hub.url, hub.target)
    assert gets(hub) == [None, f"bytes={have}-" if have else None]
    assert hub.sent == len(hub.data) - have
    assert hub.target.read_bytes() == hub.data and files(hub.folder) == [NAME]


def test_resumes_after_two_cuts(hub):
    """Each call goes on where the last one ended."""
    hub.cuts = [300_000, 200_000]
    for at in (300_000, 500_000):
        with pytest.raises(OSError, match=f"cut off at {at} of {len(hub.data)} bytes"):
            model_py.download(hub.url, hub.target)
    model_py.download(hub.url, hub.target)
    assert gets(hub) == [None, "bytes=300000-", "bytes=500000-"] and hub.sent == len(hub.data)
    assert hub.target.read_bytes() == hub.data


def test_from_pretrained_resumes(hub):
    """The cut reaches the user as one error with the way on; the same call again completes the model."""
    hub.cuts = [1234]
    with pytest.raises(ConnectionError, match="gpt2: .*cut off at 1234 of .*run again to resume"):
        GPT.from_pretrained("gpt2")
    assert files(hub.folder) == [CACHED + ".part"]
    assert torch.equal(GPT.from_pretrained("gpt2").lm_head.weight, hub.net.lm_head.weight)
    assert gets(hub) == [None, "bytes=1234-"] and files(hub.folder) == [CACHED]


def test_server_that_ignores_ranges(hub):
    """It sends the whole file again with status 200: that must replace the part, not be appended to it."""
    hub.ranges, hub.cuts = False, [600_000]
    with pytest.raises(OSError, match="cut off"):
        model_py.download(hub.url, hub.target)
    model_py.download(hub.url, hub.target)
    assert gets(hub) == [None, "bytes=600000-"]
    assert hub.target.read_bytes() == hub.data and files(hub.folder) == [NAME]


def test_a_whole_part_is_only_checked(hub):
    """Killed between the last byte and the rename: no byte is fetched again."""
    hub.folder.mkdir()
    (hub.folder / (NAME + ".part")).write_bytes(hub.data)
    model_py.download(hub.url, hub.target)
    assert gets(hub) == [] and hub.target.read_bytes() == hub.data and files(hub.folder) == [NAME]


def test_a_part_of_another_file_starts_over(hub):
    """A part longer than the file cannot be its beginning: it is thrown away."""
    hub.folder.mkdir()
    (hub.folder / (NAME + ".part")).write_bytes(hub.data + b"more")
    model_py.download(hub.url, hub.target)
    assert gets(hub) == [None] and hub.target.read_bytes() == hub.data


# --------------------------------------------------------------------------------------------------------------------
# the wrong bytes, or none


def test_wrong_hash(hub):
    """Another file of the right size: refused with both hashes, thrown away, and fetched anew by the next call."""
    good, hub.data = hub.data, bytes(len(hub.data))
    with pytest.raises(OSError) as error:
        model_py.download(hub.url, hub.target)
    for data in (good, hub.data):
        assert hashlib.sha256(data).hexdigest()[:12] in str(error.value)
    assert "sha256" in str(error.value) and files(hub.folder) == []
    hub.data = good
    model_py.download(hub.url, hub.target)
    assert hub.target.read_bytes() == good and gets(hub) == [None, None]


def test_wrong_part_is_found_by_the_hash(hub):
    """A part of an older version, completed with bytes of the new one, is no model and must not become one."""
    hub.folder.mkdir()
    (hub.folder / (NAME + ".part")).write_bytes(bytes(1000))
    with pytest.raises(OSError, match="sha256 is .*thrown away"):
        model_py.download(hub.url, hub.target)
    assert gets(hub) == ["bytes=1000-"] and files(hub.folder) == []


@pytest.mark.parametrize("off", [-10, 10])
def test_wrong_size(hub, off):
    """Fewer or more bytes than the hub states: the error has both numbers and no file appears."""
    hub.linked["X-Linked-Size"] += off
    with pytest.raises(OSError, match=rf"{len(hub.data)} .*\b{len(hub.data) + off} "):
        model_py.download(hub.url, hub.target)
    assert not hub.target.exists()


@pytest.mark.parametrize("status", [404, 401, 503])
def test_http_errors(hub, status):
    """The status reaches the user, and no error page is taken for weights."""
    hub.refuse[FIRST] = status
    with pytest.raises(OSError, match=f"HTTP {status}"):
        model_py.download(hub.url, hub.target)
    with pytest.raises(ConnectionError, match=f"gpt2: .*HTTP {status}.*configs/toy_cp.py"):
        GPT.from_pretrained("gpt2")
    assert files(hub.folder) == []


def test_error_behind_the_redirect(hub):
    """The first answer promises a file that the second refuses: nothing is left that could pass for a part of it."""
    hub.refuse[SECOND] = 403
    with pytest.raises(OSError, match="HTTP 403"):
        model_py.download(hub.url, hub.target)
    assert gets(hub) == [None] and files(hub.folder) == []


def test_no_network(tmp_path, monkeypatch):
    """Offline, at once: which file, from where, where to put it, and which config needs none. And doing so helps."""
    monkeypatch.setitem(model_py.PUBLISHED, "gpt2", ("openai-community/gpt2", 1, 2, 4))
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
    for part in ("gpt2", f"http://127.0.0.1:{port}{FIRST}", str(target), "--init_from=", "configs/toy_cp.py"):
        assert part in text, part
    assert "\n" not in text and files(tmp_path) == []

    net = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=4))
    net.save_pretrained(tmp_path / "made")
    target.parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "made" / NAME).rename(target)
    assert torch.equal(GPT.from_pretrained("gpt2").lm_head.weight, net.lm_head.weight)


def test_each_name_has_its_repository(hub, monkeypatch):
    """Every published name asks for its own file: this server knows only gpt2, so that the others show their URL."""
    for name, (repo, *_) in list(model_py.PUBLISHED.items()):
        if name == "gpt2":
            continue
        assert repo.split("/")[1] == name
        monkeypatch.setitem(model_py.PUBLISHED, name, (repo, 1, 2, 4))
        with pytest.raises(ConnectionError, match=f"{name}: .*/{repo}/resolve/main/{NAME} .*HTTP 404"):
            GPT.from_pretrained(name)
    assert {path for _, path, _ in hub.seen} == {
        f"/distilbert/distilgpt2/resolve/main/{NAME}",
        f"/openai-community/gpt2-medium/resolve/main/{NAME}",
        f"/openai-community/gpt2-large/resolve/main/{NAME}",
        f"/openai-community/gpt2-xl/resolve/main/{NAME}",
    }
