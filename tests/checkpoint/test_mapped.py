"""Checkpoints that another process has checked, mapped from their file."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
from harness import differences

from moco.checkpoint import fingerprint, map_checkpoint, read_checkpoint, write_checkpoint


def written(path: Path) -> Path:
    content = {"epoch": 1, "state_dict": {"a": torch.arange(9.0).reshape(3, 3).t()}, "args": {}}
    write_checkpoint(path, content)
    return path


def test_the_content_is_what_is_read(tmp_path: Path) -> None:
    path = written(tmp_path / "a.pth.tar")
    mark = fingerprint(path)
    mapped = map_checkpoint(path, mark)
    assert mapped is not None and not differences(mapped, read_checkpoint(path))
    assert "checksum" not in mapped
    mapped["state_dict"]["a"].zero_()  # of this process alone: the file stays as it is
    assert read_checkpoint(path)["state_dict"]["a"].sum() == 36
    assert map_checkpoint(shutil.copy(path, tmp_path / "copy"), mark) is not None


def test_another_file_a_damaged_one_and_none_are_left_to_the_other_process(tmp_path: Path) -> None:
    path = written(tmp_path / "a.pth.tar")
    mark = fingerprint(path)
    write_checkpoint(tmp_path / "other", {"epoch": 2, "state_dict": {"a": torch.ones(3, 3)}})
    assert map_checkpoint(tmp_path / "other", mark) is None
    assert map_checkpoint(tmp_path / "missing", mark) is None
    assert map_checkpoint(path, None) is None
    data = bytearray(path.read_bytes())
    place = data.index(torch.arange(9.0).numpy().tobytes())
    data[place + 8] ^= 1
    path.write_bytes(data)
    assert fingerprint(path) == mark and map_checkpoint(path, mark) is None
    torch.save({"args": argparse.Namespace(a=1)}, tmp_path / "upstream")  # weights_only refuses it
    assert map_checkpoint(tmp_path / "upstream", fingerprint(tmp_path / "upstream")) is None
    (tmp_path / "text").write_text("no zip")
    assert fingerprint(tmp_path / "text") is None
