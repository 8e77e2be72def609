"""A password or a token in an address is used to fetch the file, and written nowhere."""

from __future__ import annotations

import functools
import http.server
import threading
from pathlib import Path

import pytest
import torch
from probes import TINY, evaluate, write_encoder

from moco import cli

SECRETS = ("hunter2", "token123")


class Silent(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Requests have the token in them."""


@pytest.fixture
def address(tmp_path, monkeypatch) -> str:
    """An encoder behind a user, a password and a token, on a server of this machine."""
    (tmp_path / "served").mkdir()
    write_encoder(tmp_path / "served" / "enc.pth.tar")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    handler = functools.partial(Silent, directory=str(tmp_path / "served"))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://me:hunter2@127.0.0.1:{server.server_port}/enc.pth.tar?sig=token123"
    server.shutdown()
    server.server_close()


def test_nothing_that_an_evaluation_leaves_has_the_secret(address, data, tmp_path, capsys) -> None:
    run = tmp_path / "run"
    evaluate(data, "--epochs 1 --pretrained", address, "--save-dir", run)
    written = [path for path in run.rglob("*") if path.is_file()]
    assert {"args.json", "lincls.json", "checkpoint.pth.tar"} <= {path.name for path in written}
    for path in written:
        content = path.read_bytes()
        assert not [word for word in SECRETS if word.encode() in content], path.name
    saved = torch.load(run / "checkpoint.pth.tar", weights_only=True)
    assert saved["args"]["pretrained"].endswith("/enc.pth.tar?...")
    said = capsys.readouterr()
    assert not [word for word in SECRETS if word in said.out + said.err]


@pytest.mark.parametrize(
    "source",
    [
        "https://me:hunter2@host/enc.pth.tar?sig=token123",
        "https://me:hunter2@host/a/enc.pth.tar",
        "https://host/enc.pth.tar?sig=a/token123",
        "https://hunter2@host/enc.pth",
    ],
)
def test_the_default_run_folder_has_no_secret_in_its_name(source, data) -> None:
    folder = cli.lincls_config([*TINY, "--pretrained", source, str(data)]).saving.save_dir
    assert folder.parent == Path("results") and folder.name.startswith("lincls-")
    assert "-enc-" in folder.name
    assert not [word for word in SECRETS if word in folder.name]
