"""What tests of evaluation share: an empty folder for each, labelled images, a tiny encoder."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import write_labelled
from probes import write_encoder


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Each test in an empty folder, outside of torchrun."""
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """30 training and 15 validation images of 3 classes, 32 pixels."""
    return write_labelled(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory) -> Path:
    """A ResNet-8 in a file."""
    return write_encoder(tmp_path_factory.mktemp("encoder") / "resnet8.pth.tar")
