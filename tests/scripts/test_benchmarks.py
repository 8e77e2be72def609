"""Benchmarks: each runs to its end at its smallest size. What they measure is nobody's business."""

from __future__ import annotations

import functools
import importlib
import io
import json
import multiprocessing
import os
import subprocess
from collections.abc import Iterator
from contextlib import redirect_stdout
from types import ModuleType

import pytest
import torch
from helpers import ROOT

from moco import timing

FOLDER = ROOT / "scripts" / "benchmark"
SMALLEST = {
    "data": "--images 2 --image-size 32 --batch 2 --repeats 5 --device cpu",
    "file_list": "--images 20 --classes 2",
    "lincls": "-a resnet8 --image-size 32 --images 2 --epochs 2 --repeats 5 --device cpu",
    "loss": "--queue 64 --batch 4 --dim 8 --repeats 5 --device cpu",
    "saving": "-a resnet8 --queue 256 --saves 1 --device cpu",
    "shuffle": "--batch 2 --image-size 8 --repeats 5 --device cpu",
    "step": "--cases resnet8:16:4 --queue 64 --bn-splits 2 --amp bf16 --repeats 5 --device cpu",
}


@pytest.fixture
def _as_a_program(monkeypatch) -> Iterator[None]:
    """Benchmarks find `baseline` beside them, and may keep the process to one core."""
    monkeypatch.syspath_prepend(str(FOLDER))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a fork has none of the others
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    yield
    torch.set_num_threads(threads)
    if cores:
        os.sched_setaffinity(0, cores)


def test_every_benchmark_is_listed() -> None:
    assert {path.stem for path in FOLDER.glob("*.py")} == {*SMALLEST, "baseline", "peers"}


def make_cheap(benchmark: ModuleType, monkeypatch) -> None:
    """What a benchmark asks of another Python process happens in this one, or in a fork of it, and
    what it asks for many times happens a few times."""

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess:
        with redirect_stdout(io.StringIO()) as said:
            benchmark.main(command[2:])
        return subprocess.CompletedProcess(command, 0, said.getvalue())

    fork = multiprocessing.get_context("fork")
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: fork)
    interleaved = timing.interleaved
    monkeypatch.setattr(
        timing,
        "interleaved",
        lambda variants, repeats, device="cpu", **_: interleaved(
            variants, repeats=min(repeats, 5), warmup=1, device=device
        ),
    )
    if hasattr(benchmark, "product_rate"):
        small = functools.partial(benchmark.product_rate, size=64)
        monkeypatch.setattr(benchmark, "product_rate", small)


@pytest.mark.long
@pytest.mark.parametrize("name", SMALLEST)
def test_runs_at_its_smallest_size(name, tmp_path, _as_a_program, monkeypatch, capsys) -> None:
    benchmark = importlib.import_module(f"scripts.benchmark.{name}")
    make_cheap(benchmark, monkeypatch)
    benchmark.main([*SMALLEST[name].split(), "--out", str(tmp_path / "out.json")])
    assert capsys.readouterr().out.strip()
    assert json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))["machine"]
