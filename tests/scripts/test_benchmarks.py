"""Benchmarks: each runs to its end at its smallest size. What they measure is nobody's business."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers import ROOT

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
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    yield
    torch.set_num_threads(threads)
    if cores:
        os.sched_setaffinity(0, cores)


def test_every_benchmark_is_listed() -> None:
    assert {path.stem for path in FOLDER.glob("*.py")} == {*SMALLEST, "baseline", "peers"}


@pytest.mark.long
@pytest.mark.parametrize("name", SMALLEST)
def test_runs_at_its_smallest_size(name: str, tmp_path: Path, _as_a_program, capsys) -> None:
    benchmark = importlib.import_module(f"scripts.benchmark.{name}")
    benchmark.main([*SMALLEST[name].split(), "--out", str(tmp_path / "out.json")])
    assert capsys.readouterr().out.strip()
    assert json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))["machine"]
