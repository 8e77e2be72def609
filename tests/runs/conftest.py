"""Run folders, reports and commands that the tests of moco.runs and its scripts share."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import write_labelled
from run_folders import ALIGN, NCE, make_measure, make_probe, make_run


@pytest.fixture(scope="session")
def images(tmp_path_factory) -> Path:
    """A data folder of six classes, enough for a recipe at the scale "tiny"."""
    root = tmp_path_factory.mktemp("images")
    return write_labelled(root, classes=6, train=24, val=5)


@pytest.fixture
def two_objectives(tmp_path: Path) -> Path:
    """Three seeds of each, with linear evaluation, k-NN and measurement."""
    root = tmp_path / "runs"
    for seed, (a, b) in enumerate([(50, 45), (52, 48), (57, 49)]):
        for name, objective, top1 in (("a", ALIGN, a), ("b", NCE, b)):
            run = make_run(root / f"{name}{seed}", objective, seed)
            make_probe(run, top1, knn=top1 - 10)
            make_measure(run, top1 / 100, -top1 / 20)
    return root


@pytest.fixture
def call(capsys: pytest.CaptureFixture) -> Callable[..., tuple[int, str]]:
    """call(main, "words of a command line") -> (exit status, what was printed), in this process."""

    def call(main: Callable, words: str) -> tuple[int, str]:
        status = 0
        try:
            main(shlex.split(words))
        except SystemExit as ended:
            status = ended.code
        out, err = capsys.readouterr()
        return status or 0, out + err

    return call
