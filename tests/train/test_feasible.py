"""What is refused, or warned of, before the first step: memory, and kernels of --deterministic."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from harness import ROOT, start
from helpers import refusal
from PIL import Image

import main_moco
from moco import cli
from moco.config import (
    Encoder,
    Placement,
    PretrainConfig,
    PretrainData,
    PretrainOptim,
    Speed,
    Views,
)
from moco.errors import TrainingError
from moco.memory import Memory
from moco.tasks.moco import MoCoTask
from moco.train import feasible

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
FLAGS = shlex.split(
    "-a resnet8 --image-size 64 --batch-size 24 --moco-k 64 --max-steps 1 --knn-every 0 -j 0 "
    "--device cpu --seed 1"
)


def config_of(batch: int = 24, size: int = 64, **parts: object) -> PretrainConfig:
    return PretrainConfig(
        data=PretrainData(data="unused"),
        **{
            "encoder": Encoder(arch="resnet8", moco_k=64),
            "views": Views(image_size=size),
            "optim": PretrainOptim(batch_size=batch, seed=0),
            **parts,
        },
    )


def of_the_step(argv: list) -> int:
    config = cli.pretrain_config([str(word) for word in argv])
    return MoCoTask(config).rehearse().memory(CPU)


@pytest.mark.usefixtures("elsewhere")
def test_a_step_that_memory_does_not_suffice_for(data, monkeypatch, capsys) -> None:
    """Where half of it is free: a warning. The flags that it names are taken, and fit. Where there
    is no more than that: refused, and nothing is left behind."""
    taken = of_the_step([*FLAGS, data])
    half, run = taken // 2, Path("run")
    monkeypatch.setattr(feasible, "memory_of", lambda device: Memory(half, 10 * taken))
    main_moco.main([*FLAGS, "--save-dir", "r", str(data)])
    (line,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("warning")]
    size = f"{taken / 2**30:.1f} GiB"
    assert f"a step takes about {size} of memory, and" in line and "free on this machine" in line
    advice = shlex.split(re.search(r"with (--.*) it would take about", line)[1])
    assert advice[0] == "--accumulate"
    main_moco.main([*FLAGS, *advice, "--save-dir", "r2", str(data)])
    assert "warning" not in capsys.readouterr().out

    monkeypatch.setattr(feasible, "memory_of", lambda device: Memory(half, half))
    argv = [*FLAGS, "--save-dir", run, data]
    status, message = refusal(main_moco.main, argv, capsys)
    assert status == 1 and f"a step takes about {size}" in message and not run.exists()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "with --accumulate 2 "),
        # A batch of 23 has no equal parts and no half.
        ({"batch": 23}, "with --image-size 32 "),
        # Groups of batch norm that were asked for.
        ({"encoder": Encoder(arch="resnet8", moco_k=64, bn_splits="3")}, "with --accumulate 2 "),
        ({"encoder": Encoder(arch="resnet8", moco_k=10**7)}, "choose a smaller -a"),
    ],
)
def test_the_flags_that_would_fit(changes, expected, monkeypatch) -> None:
    config = config_of(**changes)
    taken = MoCoTask(config).rehearse().memory(CPU)
    free = int(0.7 * taken)
    monkeypatch.setattr(feasible, "memory_of", lambda device: Memory(free, free))
    with pytest.raises(TrainingError, match=expected):
        feasible.check_step(MoCoTask, config, CPU)


def test_flags_that_fit_one_process_fit_all_of_this_machine(monkeypatch) -> None:
    def config(accumulate: int) -> PretrainConfig:
        optim = PretrainOptim(batch_size=48, seed=0, accumulate=accumulate)
        return config_of(optim=optim, placement=Placement(processes=2, local_processes=2))

    def taken(accumulate: int) -> int:
        return 2 * MoCoTask(config(accumulate)).rehearse().memory(CPU)

    free = int(1.15 * taken(4))
    assert taken(3) > 0.9 * free, "so fewer parts do not fit"
    monkeypatch.setattr(feasible, "memory_of", lambda device: Memory(free, free))
    with pytest.raises(TrainingError, match="with --accumulate 4 "):
        feasible.check_step(MoCoTask, config(1), CPU)


@pytest.mark.parametrize("error", [RuntimeError, ValueError])
def test_what_cannot_be_rehearsed_is_tried(error, monkeypatch, capsys) -> None:
    """torch knows no shape of some operation of an encoder."""

    class Unknown(MoCoTask):
        def rehearse(self):
            raise error("no shape")

    monkeypatch.setattr(feasible, "memory_of", lambda device: Memory(1, 1))
    config = config_of()
    feasible.check_step(Unknown, config, CPU)
    assert capsys.readouterr().out == ""


def test_each_process_of_this_machine_takes_as_much(monkeypatch) -> None:
    """On a CPU they share its memory; a GPU is one process's own, without the copy being saved."""
    config = config_of(8, 224, placement=Placement(processes=4, local_processes=2))
    needs = MoCoTask(config).rehearse()
    seen = []
    monkeypatch.setattr(feasible, "memory_of", lambda device: seen.append(device) or Memory(1, 1))
    for device, taken in (
        (CPU, 2 * (needs.step + 2 * needs.state)),
        (GPU, needs.step + needs.state),
    ):
        with pytest.raises(TrainingError) as refused:
            feasible.check_step(MoCoTask, config, device)
        assert f"takes about {taken / 2**30:.1f} GiB" in str(refused.value)
    assert seen == [CPU, GPU]
    assert "this GPU" in str(refused.value)


@pytest.mark.parametrize(
    ("arch", "deterministic", "device", "refused"),
    [
        ("alexnet", True, GPU, True),
        ("alexnet", True, CPU, False),
        ("alexnet", False, GPU, False),
        ("resnet18", True, GPU, False),
    ],
)
def test_deterministic_without_a_kernel_is_refused_at_the_start(
    arch, deterministic, device, refused, monkeypatch
) -> None:
    monkeypatch.setattr(feasible, "memory_of", lambda device: None)
    config = config_of(4, 224, encoder=Encoder(arch=arch), speed=Speed(deterministic=deterministic))
    said = "_adaptive_avg_pool2d_backward, and torch has no"
    with pytest.raises(TrainingError, match=said) if refused else contextlib.nullcontext():
        feasible.check_step(MoCoTask, config, device)


@pytest.mark.long
def test_what_one_rank_lacks_all_ranks_say(images, tmp_path) -> None:
    lacking = """
import os
from moco.memory import Memory
from moco.train import feasible
if os.environ["RANK"] == "1":
    feasible.memory_of = lambda device: Memory(2**20, 2**20)
"""
    ranks = start(tmp_path / "run", images, processes=2, before=lacking)
    assert ranks.wait() == [1, 1]
    for rank in range(2):
        (line,) = ranks.output(rank).strip().splitlines()
        assert "in 2 processes, and 0.0 GiB of 0.0 GiB are free on this machine" in line


PEAK = """
import atexit, pathlib, runpy, sys
out = sys.argv[1]
def note():
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    pathlib.Path(out).write_text(next(x.split()[1] for x in lines if x.startswith("VmHWM")))
atexit.register(note)
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__" if len(sys.argv) > 1 else "imported")
"""


def peak(out: Path, *words: object) -> int:
    """The most bytes that a Python program has had in main memory. By its own account: getrusage
    of a child begins with what the process had that started it, here the tests."""
    subprocess.run(
        [sys.executable, "-c", PEAK, str(out), *map(str, words)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        check=True,
    )
    return int(out.read_text()) * 1024


@pytest.mark.long
def test_the_estimate_is_what_a_process_takes(tmp_path) -> None:
    """Beside what it has before it builds anything, and within a quarter."""
    data = tmp_path / "data"
    data.mkdir()
    Image.new("RGB", (64, 64), (90, 120, 30)).save(data / "0.png")
    for number in range(1, 64):
        (data / f"{number}.png").hardlink_to(data / "0.png")
    before = peak(tmp_path / "peak", "main_moco.py")
    for arch in ("resnet18", "mobilenet_v2"):
        argv = ["-a", arch, "--image-size", 96, "--batch-size", 32, "--knn-every", 0, "-j", 0]
        argv += ["--device", "cpu", "--max-steps", 2, "--save-dir", tmp_path / arch, data]
        expected = before + of_the_step(argv)
        measured = peak(tmp_path / "peak", "main_moco.py", *argv)
        assert 0.75 < expected / measured < 1.25, (arch, expected, measured)
