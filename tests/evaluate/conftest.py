"""What tests of evaluation share: an empty folder for each, a tiny encoder, refusals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import refusal
from probes import TINY, words

import main_lincls


@pytest.fixture(autouse=True)
def _elsewhere(elsewhere):
    """Each test in an empty folder, outside of torchrun."""


@pytest.fixture(scope="session")
def pretrained(encoder_file) -> Path:
    """A ResNet-8 in a file."""
    return encoder_file


@pytest.fixture
def refused(capsys) -> Callable[..., str]:
    """refused(data, *flags): the line in which main_lincls.py refuses them, with `status`."""

    def refused(data: Path, *flags: object, status: int = 1) -> str:
        found, line = refusal(main_lincls.main, [*TINY, *words(*flags), data], capsys)
        assert found == status, line
        return line

    return refused
