"""Fixtures that several test files share. What is made once a session is never written to: copy it.

With several workers (pytest -n) the first that asks makes it for all of them.
"""

from __future__ import annotations

import fcntl
import os
import shlex
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import harness
import pytest
import torch
import torchvision
from helpers import write_labelled

from moco.log import TESTED, versions_tested

# A background job ignores Ctrl-C, and so would all processes that the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)

DISTRIBUTED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE")


def pytest_report_header() -> str:
    """What CI says at its beginning."""
    installed = f"torch {torch.__version__}, torchvision {torchvision.__version__}"
    return f"{installed} (tested: {'; '.join(map(versions_tested, TESTED))})"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available() and os.environ.get("MOCO_GPU_TESTS") != "cpu":
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(autouse=True)
def _nothing_outlives_a_test(tmp_path_factory):
    yield
    harness.end_all(tmp_path_factory.getbasetemp())


@pytest.fixture
def no_launcher(monkeypatch) -> None:
    """Outside of torchrun."""
    for name in DISTRIBUTED:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def elsewhere(tmp_path, monkeypatch, no_launcher) -> Path:
    """An empty current folder, outside of torchrun."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


class Clock:
    """Time that passes when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch) -> Clock:
    """Stands in for time.time, monotonic and perf_counter, and for the time of progress bars."""
    clock = Clock()
    for name in ("time", "monotonic", "perf_counter"):
        monkeypatch.setattr(time, name, clock)
    monkeypatch.setattr("tqdm.std.time", clock)
    return clock


@pytest.fixture(scope="session")
def once(tmp_path_factory, request) -> Callable[[str, Callable[[Path], object]], Path]:
    """once(name, make): the folder that `make(folder)` has filled, for all workers together."""
    root = tmp_path_factory.getbasetemp()
    if hasattr(request.config, "workerinput"):
        root = root.parent

    def once(name: str, make: Callable[[Path], object]) -> Path:
        folder, done = root / name, root / f"{name}.done"
        with open(root / f"{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                make(folder)
                done.touch()
        return folder

    return once


@pytest.fixture(scope="session")
def data(once) -> Path:
    """30 labelled images to train on in 3 classes, 15 to validate with, 32 pixels."""
    return once("labelled", write_labelled)


@pytest.fixture(scope="session")
def images(once) -> Path:
    """What the runs of harness.py train on."""
    return once("images", harness.write_images)


@pytest.fixture(scope="session")
def whole(once, images) -> dict[int, Path]:
    """The run of harness.py that nobody touched, by number of processes."""

    def make(folder: Path) -> None:
        for processes in (1, 2):
            harness.finish(folder / f"{processes}", images, processes=processes)

    folder = once("whole", make)
    return {processes: folder / f"{processes}" for processes in (1, 2)}


@pytest.fixture(scope="session")
def half(once, images) -> Path:
    """A run that was stopped in the middle of its second epoch, at step 8, with saves every 4."""
    flags = ["--max-steps", 8, "--save-steps", 4]
    return once("half", lambda folder: harness.finish(folder / "run", images, *flags)) / "run"


@pytest.fixture(scope="session")
def tiny_run(once, data) -> Path:
    """A folder with a short pretraining run on `data` (two epochs of three steps, resnet8 with an
    MLP head of 16 outputs) in run/, and the linear evaluation of its end, with k-NN, in lincls/."""

    def make(folder: Path) -> None:
        import main_lincls
        import main_moco

        flags = (
            "-a resnet8 --image-size 32 --batch-size 8 --moco-k 64 --moco-dim 16 --mlp --epochs 2 "
            "-j 0 --device cpu --seed 1 -p 1"
        )
        main_moco.main([*shlex.split(flags), "--save-dir", str(folder / "run"), str(data)])
        probe = "--batch-size 8 --lr 1 --epochs 2 -j 0 --device cpu --seed 1 -p 1 --knn"
        main_lincls.main(
            [*probe.split(), "--pretrained", str(folder / "run" / "checkpoint_0001.pth.tar"),
             "--save-dir", str(folder / "lincls"), str(data)]
        )  # fmt: skip

    return once("tiny", make)


@pytest.fixture(scope="session")
def encoder_file(once) -> Path:
    """A ResNet-8 with random weights, its head taken off; see probes.write_encoder."""
    from probes import write_encoder

    folder = once("encoder", lambda folder: write_encoder(folder / "resnet8.pth.tar"))
    return folder / "resnet8.pth.tar"
