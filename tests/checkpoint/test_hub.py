"""load_encoder("hf://USER/NAME[/FILE]") through huggingface_hub, from a server on this machine."""

from __future__ import annotations

import hashlib
import http.server
import json
import sys
import threading
from collections.abc import Iterator

import pytest
from harness import Processes

from moco.checkpoint import is_url, load_encoder, without_secrets
from moco.errors import CheckpointError
from moco.run_files import only_weights

# huggingface_hub reads its settings when it is imported: in a process of its own.
LOAD = """
import sys, warnings
warnings.simplefilter("ignore")
from moco.checkpoint import load_encoder
from moco.errors import CheckpointError
for address in sys.argv[1:]:
    try:
        encoder, info = load_encoder(address)
        print("loaded", info["arch"], info["feature_dim"], flush=True)
    except CheckpointError as error:
        print("refused", error, flush=True)
"""


class Hub(http.server.BaseHTTPRequestHandler):
    """A hub of one repository, me/tiny, with the files of `server.files`."""

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        path = self.path.partition("?")[0]
        files: dict[str, bytes] = self.server.files
        data, name = None, path.rpartition("/")[2]
        if path == "/api/models/me/tiny/tree/main":
            about = {"type": "file", "oid": "0" * 40}
            found = [about | {"path": name, "size": len(files[name])} for name in files]
            data = json.dumps(found).encode()
        elif path.startswith("/api/models/me/tiny"):
            found = {"id": "me/tiny", "sha": "0" * 40}
            data = json.dumps(found | {"siblings": [{"rfilename": n} for n in files]}).encode()
        elif path.startswith("/me/tiny/resolve/main/"):
            data = files.get(name)
        self.send_response(404 if data is None else 200)
        if data is None:
            known = path.startswith("/me/tiny/")
            self.send_header("X-Error-Code", "EntryNotFound" if known else "RepoNotFound")
            data = b""
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[http.server.ThreadingHTTPServer]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.long
def test_encoders_come_from_the_hub_by_address(hub, encoder_file, tmp_path) -> None:
    pytest.importorskip("huggingface_hub")
    hub.files = {"README.md": b"x", "tiny-backbone.pth.tar": encoder_file.read_bytes()}
    environment = {
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_address[1]}", "HF_HOME": str(tmp_path / "hf"),
        "NO_PROXY": "127.0.0.1", "HF_HUB_OFFLINE": "",
    }  # fmt: skip
    addresses = ["hf://me/tiny", "hf://me/tiny@main/tiny-backbone.pth.tar", "hf://me/tiny/none.pth",
                 "hf://me/other"]  # fmt: skip
    before = f"import os; os.environ |= {environment!r}"
    loading = Processes(tmp_path / "out", *addresses, code=LOAD, before=before)
    assert loading.wait() == [0], loading.output()
    lines = loading.output().strip().splitlines()
    assert lines[:2] == ["loaded resnet8 64"] * 2
    for address, line in zip(addresses[2:], lines[2:], strict=True):
        assert line.startswith(f"refused {address} cannot be had from the hub: ")


def test_without_the_package_one_line_says_so(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match="^.*needs the package huggingface_hub: pip .*$"):
        load_encoder("hf://me/tiny")


def test_addresses_and_the_file_that_is_taken(tmp_path) -> None:
    assert is_url("hf://me/tiny") and without_secrets("hf://me/tiny/a.pth") == "hf://me/tiny/a.pth"
    for wrong in ("hf://tiny", "hf://me/", "hf:///x", "hf://me/tiny@/a", "hf://a b/c"):
        with pytest.raises(CheckpointError, match="expected hf://USER/NAME"):
            load_encoder(wrong)
    taken = {
        "model.safetensors": ["model.safetensors", "other.safetensors", "pytorch_model.bin"],
        "x-backbone-1.safetensors": [
            "x-backbone-1.safetensors", "x-full-2.safetensors", "x-backbone-3.pth", "README.md",
        ],
        "pytorch_model.bin": ["config.json", "pytorch_model.bin"],
    }  # fmt: skip
    for expected, names in taken.items():
        assert only_weights(names, "hf://me/tiny") == expected
    for names in (["a.pth", "b.pth"], ["README.md"]):
        with pytest.raises(CheckpointError, match="name one: hf://me/tiny/FILE"):
            only_weights(names, "hf://me/tiny")
