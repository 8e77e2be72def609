"""What tests of evaluation share: an empty folder for each, a tiny encoder."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def _elsewhere(elsewhere):
    """Each test in an empty folder, outside of torchrun."""


@pytest.fixture(scope="session")
def pretrained(encoder_file) -> Path:
    """A ResNet-8 in a file."""
    return encoder_file
