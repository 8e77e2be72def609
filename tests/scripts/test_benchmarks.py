"""Benchmarks: each runs to its end at its smallest size. What they measure is nobody's business."""

from __future__ import annotations

import functools
import importlib
import json
import multiprocessing
import os
import sys

import pytest
import torch
from helpers import ROOT

from moco import timing

FOLDER = ROOT / "scripts" / "benchmark"
SMALLEST = {  # flags, and a figure that is printed
    "data": ("--images 2 --image-size 32 --batch 2 --repeats 5", "--views device, the CPU's part"),
    "file_list": ("--images 20 --classes 2", "beyond_walk_s"),
    "lincls": (
        "-a resnet8 --image-size 32 --images 2 --epochs 2 --repeats 5",
        "8 learning rates, cached, 2 epochs",
    ),
    "loss": ("--queue 64 --batch 4 --dim 8 --repeats 5", "memory of align+uniform N=4: baseline"),
    "peers": (
        "--arch resnet8 --image-size 16 --batch 4 --queue 16 --repeats 5",
        "lightly is not installed",
    ),
    "saving": ("-a resnet8 --queue 256 --saves 1", "a save per epoch takes"),
    "shuffle": ("--batch 2 --image-size 8 --repeats 5", "received per rank and shuffle, uint8"),
    "step": (
        "--cases resnet8:16:4 --queue 64 --bn-splits 2 --amp bf16 --repeats 5",
        "momentum update, resnet8",
    ),
}


def test_every_benchmark_is_listed() -> None:
    assert {path.stem for path in FOLDER.glob("*.py")} == {*SMALLEST, "baseline"}


@pytest.fixture
def _cheap(monkeypatch):
    """Benchmarks find `baseline` beside them, and may keep the process to one core. What they ask
    of another Python process happens in a fork of this one, and what they ask for many times
    happens a few times."""
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setitem(sys.modules, "lightly", None)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a fork has none of the others
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    fork, interleaved = multiprocessing.get_context("fork"), timing.interleaved

    def briefly(variants: dict, repeats: int, device: object = "cpu", **_: object) -> dict:
        return interleaved(variants, repeats=min(repeats, 5), warmup=1, device=device)

    monkeypatch.setattr(multiprocessing, "get_context", lambda method: fork)
    monkeypatch.setattr(timing, "interleaved", briefly)
    yield
    torch.set_num_threads(threads)
    if cores:
        os.sched_setaffinity(0, cores)


@pytest.mark.long
@pytest.mark.parametrize("name", SMALLEST)
def test_runs_at_its_smallest_size(name, tmp_path, _cheap, monkeypatch, capsys) -> None:
    benchmark = importlib.import_module(f"scripts.benchmark.{name}")
    if name == "loss":
        small = functools.partial(benchmark.product_rate, size=64)
        monkeypatch.setattr(benchmark, "product_rate", small)
    flags, printed = SMALLEST[name]
    device = [] if name == "file_list" else ["--device", "cpu"]
    benchmark.main([*flags.split(), *device, "--out", str(tmp_path / "out.json")])
    assert printed in capsys.readouterr().out
    found = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert found["machine"] and all(row["ratio"] > 0 for row in found.get("rows", ()))
