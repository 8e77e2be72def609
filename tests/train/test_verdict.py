"""What a run says of its own health, on the screen and in its log."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from helpers import load_script, read_log
from run_folders import column, compare

import main_moco
from moco.health import COLLAPSING, FILLING, NOT_LEARNING, TOO_EARLY

TINY = shlex.split(
    "-a resnet8 --image-size 16 --batch-size 10 -j 0 --device cpu -p 1 --seed 1 --keep-last 1 "
    "--moco-k 40 --check-every 0 --cos"
)


def train(data: Path, run: Path, *flags: object) -> list[tuple[int, str]]:
    """(epoch, verdict) of each line of the log."""
    main_moco.main([*TINY, *map(str, flags), "--save-dir", str(run), str(data)])
    return [(line["epoch"], line["verdict"]) for line in read_log(run, "health")]


def test_a_run_that_learns_nothing_says_so_once_its_queue_is_filled(data, tmp_path, capsys) -> None:
    """Three steps an epoch, and a queue of four; verdicts are shown where they change, with k-NN,
    and at the end; `compare_runs.py` shows the last one."""
    found = train(data, tmp_path / "run", "--epochs", 18, "--lr", 1e-7, "--knn-every", 6)
    assert found == [
        (epoch, FILLING if epoch < 2 else TOO_EARLY if epoch < 17 else NOT_LEARNING)
        for epoch in range(1, 19)
    ]
    shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith("health")]
    assert [int(line.split()[2]) for line in shown] == [1, 2, 6, 12, 17, 18]
    last = read_log(tmp_path / "run", "health")[-1]
    assert shown[-1].endswith(f": {last['verdict']}; {last['reason']}")
    rows, screen = compare(tmp_path / "run")
    assert column(rows, "health") == [NOT_LEARNING] and NOT_LEARNING in screen


def test_a_collapse_is_named_without_labels_and_after_a_resume(data, tmp_path, capsys) -> None:
    """Also by the run that goes on: its verdict rests on what the log had before."""
    flags = ["--epochs", 6, "--lr", 0.3, "--moco-unif-w", 0, "--batch-size", 5]
    photos, run = data / "train" / "class_0", tmp_path / "run"
    train(photos, run, *flags, "--max-steps", 5)  # two steps an epoch, and one more
    found = train(photos, run, *flags, "--resume", "auto")
    assert found[-1] == (6, COLLAPSING) and len(found) == 6
    assert found == train(photos, tmp_path / "whole", *flags)
    assert f"health after 6 epoch(s): {COLLAPSING}; all features" in (capsys.readouterr().out)


def test_training_within_the_batch_has_no_queue_to_wait_for(data, tmp_path) -> None:
    argv = shlex.split("-a small_alexnetx0.0625 --image-size 32 --batch-size 10 -j 0 --device cpu "
                       "--seed 1 --epochs 1 -p 1 --knn-every 1")  # fmt: skip
    load_script("train_in_batch").main([*argv, "--save-dir", str(tmp_path / "run"), str(data)])
    assert [line["verdict"] for line in read_log(tmp_path / "run", "health")] == [TOO_EARLY]
    assert [line["step"] for line in read_log(tmp_path / "run", "knn")] == [0, 3]


@pytest.mark.parametrize("flags", [[], ["--group-size", "5"]])
def test_the_encoder_before_training_has_the_batch_norm_that_training_gives_it(
    flags, data, tmp_path
) -> None:
    """So that a run which learns nothing has the accuracy of its first line."""
    run = tmp_path / "run"
    train(data, run, "--lr", 0, "--epochs", 12, "--knn-every", 12, *flags)
    before, after = read_log(run, "knn")
    assert (before["step"], after["step"]) == (0, 36)
    assert abs(before["top1"] - after["top1"]) <= 100 / 15
