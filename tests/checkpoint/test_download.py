"""Checkpoints from addresses, fetched from a real server on this machine: what is whole and right
is kept, anything else leaves nothing and is said in one line."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import socket
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

import harness
import pytest
import torch
from helpers import free_port
from networks import OLD, saved

from moco import encoders
from moco.checkpoint import download, is_url, load_encoder, without_secrets, write_safetensors
from moco.checkpoint.files import write_checkpoint
from moco.errors import CheckpointError


class Server(http.server.ThreadingHTTPServer):
    """Answers with `files`; behind /cut/ it sends half and hangs up, /code/N answers with N, /move/
    sends on to the rest of the path, /slow/ waits until several have asked, /endless/ has no end,
    /trickle/ sends a byte at a time, and /huge/ says that it will send 2^40."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.headers: list[dict] = []
        self.ended = False  # whether a trickle was waited for
        self.together = threading.Barrier(3)
        self.address = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        self.server.headers.append(dict(self.headers))
        _, how, *rest = self.path.split("/")
        name = unquote(urlsplit(self.path).path).rpartition("/")[2]
        if how == "move":
            self.send_response(302)
            self.send_header("Location", self.path.removeprefix("/move"))
            self.end_headers()
        elif how == "code" or name not in self.server.files:
            self.send_error(int(rest[0]) if how == "code" else 404)
        else:
            self.send_response(200)
            if how == "chunks":
                self.send_header("Transfer-Encoding", "chunked")
            elif how != "endless":
                size = 2**40 if how == "huge" else len(self.server.files[name])
                self.send_header("Content-Length", str(size))
            self.end_headers()
            self.send(self.server.files[name], how)

    def send(self, data: bytes, how: str) -> None:
        half = data[: len(data) // 2]
        with contextlib.suppress(OSError):  # the other side no longer listens
            while how == "endless":
                self.wfile.write(data)
            if how == "trickle":
                for i in range(len(data)):
                    time.sleep(0.002)
                    self.wfile.write(data[i : i + 1])
                self.server.ended = True
                return
            if how == "slow":
                self.server.together.wait(60)
            start = b"%x\r\n" % len(data) if how == "chunks" else b""
            self.wfile.write(start + (half if how in ("cut", "chunks") else data))

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Torch's cache of this test."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    assert torch.hub.get_dir() == str(tmp_path / "torch" / "hub")
    return tmp_path / "torch" / "hub" / "checkpoints"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A checkpoint in the formats that are downloaded, each of other weights."""
    folder = tmp_path_factory.mktemp("weights")
    for seed, name in enumerate(("a.pth", "b.safetensors", "c.pth.tar")):
        torch.manual_seed(seed)
        state = encoders.build_encoder("resnet8", 5).state_dict()
        if name.endswith(".safetensors"):
            write_safetensors(folder / name, state, {"arch": "resnet8", "epoch": seed})
        else:
            write_checkpoint(folder / name, {"epoch": seed, "state_dict": dict(state)})
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def left(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir()) if cache.exists() else []


def refusal(url: str, cache: Path, **options: str) -> str:
    """The one line with which an address is refused; nothing is left behind."""
    before = left(cache)
    with pytest.raises(CheckpointError) as caught:
        load_encoder(url, **options)
    assert left(cache) == before
    message = str(caught.value)
    assert url in message and "\n" not in message and str(cache) not in message
    return message


def test_a_name_with_a_hash_is_kept_under_that_name(server, cache, weights) -> None:
    for name, epoch in (("a.pth", 0), ("b.safetensors", 1), ("c.pth.tar", 2)):
        stem, _, suffix = name.partition(".")
        named = f"{stem}-{digest(weights[name])[:8]}.{suffix}"
        server.files[named] = weights[name]
        with warnings.catch_warnings(action="error"):
            encoder, info = load_encoder(f"{server.address}/x/{named}")
        assert info["epoch"] == epoch and info["arch"] == "resnet8"
        assert (cache / named).read_bytes() == weights[name]
    assert len(left(cache)) == 3


def test_the_second_time_comes_from_the_cache(server, cache, weights) -> None:
    server.files["a.pth"] = weights["a.pth"]
    url = f"{server.address}/a.pth"
    first, _ = load_encoder(url)
    assert len(server.asked) == 1
    server.shutdown()
    server.server_close()
    second, _ = load_encoder(url, head="linear")
    assert torch.equal(first.conv1.weight, second.conv1.weight)


def test_a_cached_file_is_checked_again(server, cache, weights) -> None:
    """With the hash that is known; a changed file is fetched anew, or named."""
    name = f"a-{digest(weights['a.pth'])[:10]}.pth"
    server.files |= {name: weights["a.pth"], "a.pth": weights["a.pth"]}
    load_encoder(f"{server.address}/{name}")
    (cache / name).write_bytes(weights["a.pth"][:-1])
    load_encoder(f"{server.address}/{name}")
    assert (cache / name).read_bytes() == weights["a.pth"] and len(server.asked) == 2
    url = f"{server.address}/a.pth"
    load_encoder(url)
    (other,) = (path for path in cache.iterdir() if path.name != name)
    other.write_bytes(weights["a.pth"][:-1])
    with pytest.raises(CheckpointError, match=f"{other} is damaged.*delete it, so that {url} is"):
        load_encoder(url)


@pytest.mark.parametrize("options", [{}, {"sha256": "0123abcd"}], ids=["name", "argument"])
def test_a_wrong_hash(options: dict, server, cache, weights) -> None:
    name = "a.pth" if options else "a-0123abcd.pth"
    server.files[name] = weights["a.pth"]
    message = refusal(f"{server.address}/{name}", cache, **options)
    assert f"has SHA-256 {digest(weights['a.pth'])}, expected 0123abcd" in message
    assert "download it again" in message and f"{len(weights['a.pth'])} bytes" in message


def test_the_callers_hash_counts_more_than_the_names(server, cache, weights) -> None:
    """A date can look like a hash."""
    name = "a-20260722.pth"
    server.files[name] = weights["a.pth"]
    refusal(f"{server.address}/{name}", cache)
    for sha256 in (digest(weights["a.pth"]), digest(weights["a.pth"])[:12].upper()):
        load_encoder(f"{server.address}/{name}", sha256=sha256)
    assert len(server.asked) == 2 and left(cache) == [name]


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("code/404", "the server says 404 "),
        ("code/503", "the server says 503 "),
        ("cut", "did not arrive whole (HALF bytes of WHOLE); try again"),
        ("chunks", "cannot be downloaded: IncompleteRead"),
        # Whether the server says so or not: no more than the bound is written.
        ("huge", "is larger than"),
        ("endless", "is larger than"),
    ],
)
@pytest.mark.parametrize("hashed", [False, True])
def test_what_a_server_does_instead_is_said(
    how: str, said: str, hashed: bool, server, cache, weights, monkeypatch
) -> None:
    data = weights["a.pth"]
    monkeypatch.setattr(download, "MOST_SECONDS", 60)  # what hangs is another error
    monkeypatch.setattr(download, "MOST_BYTES", 3 * len(data))
    name = f"a-{digest(data)[:8]}.pth" if hashed else "a.pth"
    server.files[name] = data
    message = refusal(f"{server.address}/{how}/{name}", cache)
    assert said.replace("HALF", f"{len(data) // 2}").replace("WHOLE", f"{len(data)}") in message
    assert "check the address" in message or how == "cut"


def test_no_server(cache) -> None:
    message = refusal(f"http://127.0.0.1:{free_port()}/a.pth", cache)
    assert "cannot be downloaded: " in message and "refused" in message
    assert "check the address and the connection" in message


def test_a_server_that_falls_silent(cache, monkeypatch) -> None:
    monkeypatch.setattr(download, "SILENCE", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as listener:  # takes the call, says nothing
        message = refusal(f"http://127.0.0.1:{listener.getsockname()[1]}/a.pth", cache)
    assert "timed out" in message
    assert socket.getdefaulttimeout() is None


@pytest.mark.parametrize("how", ["endless", "trickle"])
def test_a_server_that_takes_longer_than_anybody_waits(
    how, server, cache, weights, monkeypatch
) -> None:
    """It is never silent."""
    monkeypatch.setattr(download, "MOST_SECONDS", 0.3)
    monkeypatch.setattr(download, "MOST_BYTES", 2**30)  # likewise
    server.files["a.pth"] = weights["a.pth"] if how == "endless" else bytes(3000)
    message = refusal(f"{server.address}/{how}/a.pth", cache)
    assert "bytes came in 0 seconds; try again, or download" in message and not server.ended


@pytest.mark.parametrize("how", ["code/403", "cut", "endless", "move/code/500", "slow.x"])
def test_no_secret_is_in_a_message(how, server, cache, weights, monkeypatch) -> None:
    """User and password, and tokens behind the question mark."""
    monkeypatch.setattr(download, "MOST_BYTES", 10**6)
    server.files["a.pth"] = weights["a.pth"] if how != "slow.x" else b"no checkpoint"
    address = server.address.replace("//", "//eva:s3cret@")
    with pytest.raises(CheckpointError) as caught:
        load_encoder(f"{address}/{how}/a.pth?token=t0ken#s3cret")
    message = str(caught.value)
    assert f"{server.address}/{how}/a.pth?..." in message
    assert not any(secret in message for secret in ("s3cret", "t0ken", "eva"))
    assert left(cache) == []


@pytest.mark.parametrize(
    "url",
    [
        "ftp://eva:s3cret@host/a.pth",
        "http://eva:s3cret@/a.pth",
        "http://eva:s3cret@host:x/a.pth",
        "http://eva:s3cret@[::1/a.pth",
        "http://eva:s3/cret@host/",
        "ftp://eva:s3@cret@host/a.pth",
        "http://eva:s3cret@host/",
    ],
)
def test_no_password_of_a_bad_address_is_in_a_message(url, cache) -> None:
    with pytest.raises(CheckpointError) as caught:
        load_encoder(url)
    assert "cret" not in str(caught.value) and "s3" not in str(caught.value)


def test_user_and_password_are_sent_to_their_host_alone(server, cache, weights) -> None:
    server.files["a.pth"] = weights["a.pth"]
    address = server.address.replace("//", "//eva:s3%20cret@")
    assert load_encoder(f"{address}/move/a.pth")[1]["arch"] == "resnet8"
    first, second = server.headers
    assert first["Authorization"] == "Basic ZXZhOnMzIGNyZXQ="
    assert "Authorization" not in second and "cret" not in server.asked[0]


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_other_things_than_weights(suffix: str, server, cache) -> None:
    data = b"<!DOCTYPE html><html><body>log in</body></html>"
    # The hash is right, the file is not.
    for name in (f"a{suffix}", f"a-{digest(data)[:8]}{suffix}"):
        server.files[name] = data
        assert "is a web page" in refusal(f"{server.address}/{name}", cache)


def test_names_of_all_sorts(server, cache, weights) -> None:
    """Percent signs, queries, fragments and redirections; no name leads out of the cache."""
    server.files |= {"my weights.pth": weights["a.pth"], "b.safetensors": weights["b.safetensors"],
                     "..pth": weights["a.pth"]}  # fmt: skip
    for path, start, suffix in (
        ("/my%20weights.pth", "my weights@", ".pth"),
        ("/b.safetensors?download=true&x=/a.pth", "b@", ".safetensors"),
        ("/b.safetensors#part", "b@", ".safetensors"),
        ("/move/b.safetensors", "b@", ".safetensors"),
        ("/x/..%2f..%2fmy%20weights.pth", "my weights@", ".pth"),
    ):
        before = set(left(cache))
        assert load_encoder(server.address + path)[1]["arch"] == "resnet8"
        (new,) = set(left(cache)) - before
        assert new.startswith(start) and new.endswith(suffix), new
    for path in ("", "/", "/..", "/%2e%2e", "/a%00.pth", "/a%0a.pth", "/%ff.pth"):
        message = refusal(server.address + path, cache)
        assert "does not name a file" in message or "is no valid address" in message


def test_one_name_at_two_addresses_is_two_files(server, cache, weights) -> None:
    """As every model.safetensors and checkpoint_0099.pth.tar is."""
    server.files["model.pth"] = weights["a.pth"]
    first, _ = load_encoder(f"{server.address}/first/model.pth")
    server.files["model.pth"] = weights["c.pth.tar"]
    second, _ = load_encoder(f"{server.address}/second/model.pth")
    again, _ = load_encoder(f"{server.address}/first/model.pth")
    assert not torch.equal(first.conv1.weight, second.conv1.weight)
    assert torch.equal(first.conv1.weight, again.conv1.weight) and len(left(cache)) == 2


def test_other_addresses_are_refused(cache) -> None:
    for url in ("ftp://127.0.0.1/a.pth", "file:///etc/passwd", "s3://bucket/a.pth",
                "http://", "http:///a.pth", "http://[::1/a.pth", "http://127.0.0.1:99999/a.pth",
                "http://127.0.0.1:x/a.pth", "http://127.0.0.1/a b.pth"):  # fmt: skip
        refusal(url, cache)
    assert not is_url("a.pth") and not is_url(Path("http:/a")) and not is_url("C:\\a.pth")
    assert without_secrets("http://h:80/a@2x/b.pth") == "http://h:80/a@2x/b.pth"
    assert without_secrets("a@b/c?d.pth") == "a@b/c?d.pth"
    assert is_url("https://a/b.pth") and is_url("HTTP://a/b.pth")


def test_a_cache_that_cannot_be_written(server, weights, tmp_path, monkeypatch) -> None:
    (tmp_path / "taken").write_text("a file where the folder should be")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "taken"))
    server.files["a.pth"] = weights["a.pth"]
    with pytest.raises(CheckpointError, match="cannot be kept in torch's cache .*TORCH_HOME"):
        load_encoder(f"{server.address}/a.pth")


def test_processes_that_ask_at_once_all_get_it(server, cache, weights, tmp_path) -> None:
    """The server answers none of them before all have asked; one whole file is left."""
    name = f"a-{digest(weights['a.pth'])[:8]}.pth"
    server.files[name] = weights["a.pth"]
    code = f"""
import os
os.environ["TORCH_HOME"] = {str(cache.parents[1])!r}
from moco import checkpoint
print(checkpoint.load_encoder("{server.address}/slow/{name}")[1]["arch"])
"""
    started = harness.Processes(tmp_path / "out", count=3, code=code)
    assert started.wait() == [0, 0, 0], started.output()
    assert started.output().split() == ["resnet8"] * 3  # and no progress bar
    assert len(server.asked) == 3 and left(cache) == [name]
    assert (cache / name).read_bytes() == weights["a.pth"]


@pytest.mark.filterwarnings("error")
def test_an_old_format_is_warned_of_by_address(server, cache) -> None:
    """Not by the name of a temporary file; and not when the hash has been checked."""
    server.files["old.pth"] = data = saved(encoders.build_encoder("resnet8", 5).state_dict(), **OLD)
    url = f"{server.address}/old.pth"
    with pytest.warns(UserWarning, match=f"^{url} is in torch's old format"):
        load_encoder(url)
    load_encoder(url, sha256=digest(data))
