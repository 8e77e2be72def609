"""Run folders, reports and commands that the tests of moco.runs and its scripts share."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
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


class Processes:
    """Python programs of one test, with all that they start: each has a mark in its environment."""

    LIMIT = 600  # seconds: a busy machine is no failure, but no test may hang

    def __init__(self, mark: str) -> None:
        self.mark = mark

    def start(self, *words: object, **options: object) -> subprocess.Popen:
        environment = {**os.environ, "MOCO_TEST_MARK": self.mark, "OMP_NUM_THREADS": "1",
                       "PYTHONIOENCODING": "utf-8:strict"}  # fmt: skip
        command = [sys.executable, *map(str, words)]
        return subprocess.Popen(command, env=environment, text=True, **options)

    def running(self) -> list[int]:
        """Of all that were started and their children."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                marked = f"MOCO_TEST_MARK={self.mark}\0".encode()
                if marked in (folder / "environ").read_bytes():
                    found.append(int(folder.name))
            except OSError:  # it has ended, or is another user's
                continue
        return found

    def until(self, condition: Callable[[], object], process: subprocess.Popen | None = None):
        """Wait for it; `process` must not end meanwhile."""
        deadline = time.monotonic() + self.LIMIT
        while not (found := condition()):
            assert process is None or process.poll() is None, f"ended with {process.returncode}"
            assert time.monotonic() < deadline
            time.sleep(0.05)
        return found


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    """Whatever a test starts by it ends with the test."""
    processes = Processes(str(tmp_path))
    yield processes
    for pid in processes.running():
        os.kill(pid, signal.SIGKILL)
