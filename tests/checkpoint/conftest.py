"""A state dict that tests may change, files of torch.save, and the message of a refusal."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moco.checkpoint import load_encoder, read_checkpoint
from moco.encoders import build_encoder
from moco.errors import CheckpointError


@pytest.fixture
def state() -> dict[str, Tensor]:
    """Of a ResNet-8 with ten classes."""
    torch.manual_seed(0)
    return {name: t.clone() for name, t in build_encoder("resnet8", 10).state_dict().items()}


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    """save(content, name="a.pth", **options of torch.save): the file."""

    def save(content: object, name: str = "a.pth", **options: object) -> Path:
        torch.save(content, tmp_path / name, **options)
        return tmp_path / name

    return save


@pytest.fixture
def not_loaded(save: Callable[..., Path]) -> Callable[..., str]:
    """The line with which `load_encoder` refuses a file or the content of one."""

    def refused(content: object, head: str = "none") -> str:
        path = content if isinstance(content, Path) else save(content)
        with pytest.raises(CheckpointError) as caught:
            load_encoder(path, head=head)
        message = str(caught.value)
        assert str(path) in message and "\n" not in message
        return message

    return refused


@pytest.fixture
def refusal() -> Callable[[Path], str]:
    """The message with which a file is refused, in one line, wherever it is read."""

    def refused(path: Path) -> str:
        said = []
        for read in (read_checkpoint, load_encoder):
            with pytest.raises(CheckpointError) as caught:
                read(path)
            said.append(str(caught.value))
        assert said[0] == said[1] and str(path) in said[0] and "\n" not in said[0]
        return said[0]

    return refused
