"""scripts/sweep.py: what it runs, what it passes over, what it refuses."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from harness import until
from helpers import ROOT, finish, start_python, write_labelled

SCRIPT = ROOT / "scripts" / "sweep.py"
SPECS = sorted((ROOT / "scripts" / "sweeps").glob("*.toml"))
_spec = importlib.util.spec_from_file_location("sweep", SCRIPT)
sweep = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(sweep)

TWO = """
title = "two weights"
recipe = "table10:32"
[grid]
moco-align-w = [1, 3]
"""
FAST = ["--scale", "tiny", "--pretrain=--epochs 1 -j 0 --device cpu --knn-every 0",
        "--lincls=--epochs 1 --schedule 1 -j 0 --device cpu"]  # fmt: skip


def start(*words: object, **options: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, words)], capture_output=True, text=True, **options
    )


def planned(spec: object, *words: object) -> list[list[str]]:
    """The commands of a dry run."""
    done = start(spec, "DIR", "--out", "OUT", "--dry-run", *words)
    assert done.returncode == 0, done.stderr
    return [shlex.split(li) for li in done.stdout.splitlines() if not li.startswith("#")]


def flags_of(command: list[str]) -> list[str]:
    return shlex.split(next(w for w in command if w.startswith("--pretrain=")).split("=", 1)[1])


def test_each_figure_of_the_paper_has_its_runs(tmp_path: Path) -> None:
    assert [path.stem for path in SPECS] == ["cifar10", "example", "figure7", "figure8", "figure9a"]
    table = list(csv.DictReader(open(ROOT / "scripts/recipes/table10.csv", newline="")))
    by_name = {path.stem: planned(path) for path in SPECS}

    rows = [int(command[2].split(":")[1]) for command in by_name["figure7"]]
    weights = [(float(table[i - 1]["align_w"] or 0), float(table[i - 1]["unif_w"] or 0))
               for i in rows]  # fmt: skip
    assert all(align + uniform == pytest.approx(2) for align, uniform in weights)
    assert weights[0] == (2, 0) and weights[-1] == (0, 2) and weights == sorted(weights)[::-1]

    assert [command[2] for command in by_name["figure9a"]] == [f"table10:{i}" for i in range(1, 46)]
    first, *later = by_name["figure8"]
    assert "--moco-contr-tau 2.5" in shlex.join(flags_of(first))
    assert ["--moco-align-w" in flags_of(c) for c in later] == [True, False, True]
    assert ["--moco-unif-w" in flags_of(c) for c in later] == [False, True, True]
    runs = sweep.plan(
        sweep.read_spec(SPECS[3]),
        sweep.build_parser().parse_args([str(SPECS[3]), "DIR", "--out", str(tmp_path)]),
    )
    assert [run["level"] for run in runs] == [0, 1, 1, 1]
    assert {run["after"] for run in runs[1:]} == {runs[0]["folder"]}
    assert len(by_name["example"]) == 8


def test_a_grid_is_every_combination_for_every_seed(tmp_path: Path) -> None:
    spec = tmp_path / "spec.toml"
    spec.write_text(
        'recipe = "table10:1"\n[grid]\nmoco-k = [256, 512]\nmoco-unif-no-intra-batch = '
        "[true, false]\nbatch-size = [32]\n"
    )
    commands = planned(spec, "--seeds", 0, 4, "--scale", "tiny", "--pretrain=--amp bf16")
    assert len(commands) == 8
    assert [command[command.index("--seed") + 1] for command in commands] == ["0"] * 4 + ["4"] * 4
    assert flags_of(commands[0]) == shlex.split(
        "--moco-k 256 --moco-unif-no-intra-batch --batch-size 32 --amp bf16"
    )
    assert flags_of(commands[3]) == shlex.split("--moco-k 512 --batch-size 32 --amp bf16")
    folders = {command[command.index("--out") + 1] for command in commands}
    assert len(folders) == 8


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("title = ", "is no TOML file"),
        ('recipe = "table10:1"', "either a list `run` or a table `grid`"),
        ('[grid]\nmoco-k = 5\nrecipe = "a"', "must be a list of values"),
        ("[grid]\nmoco-k = [5]", "names no recipe"),
        ('run = [{ recipe = "table10:1", prtrain = "" }]', "unknown keys: prtrain"),
        ('run = [{ recipe = "table10:1" }, { recipe = "table10:1" }]', "stands there twice"),
        ('run = [{ recipe = "table10:1", name = "a b" }]', "no name of a folder"),
        ('run = [{ recipe = "table10:1", after = "b" }]', "no run before it"),
        ('run = [{ recipe = "table10:46" }]', "table10 has rows 1 to 45"),
        ('recipe = "tabel10:3"\n[grid]\nmoco-k = [5]', "the nearest are table10:3"),
        ('run = "table10:1"', "must be a list of tables"),
        ("run = [1]", "must be a list of tables"),
        ("run = []", "either a list `run` or a table `grid`"),
        ("grid = 5", "either a list `run` or a table `grid`"),
        ("recipe = 5\nrun = [{ }]", "recipe must be a text, got 5"),
        ('run = [{ recipe = "table10:1", pretrain = 3 }]', "pretrain must be a text, got 3"),
    ],
)
def test_a_spec_that_cannot_be_run_is_refused(text: str, message: str, tmp_path: Path) -> None:
    spec = tmp_path / "spec.toml"
    spec.write_text(text)
    done = start(spec, "DIR", "--out", tmp_path / "out")
    assert done.returncode == 2 and message in done.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_what_would_fail_in_every_run_is_refused_before_the_first(tmp_path: Path) -> None:
    for words, message in (
        (["DIR", "--out", tmp_path / "out"], "no such data folder: DIR"),
        (["DIR", "--out", tmp_path / "out", "--scale", "small"], "invalid choice: 'small'"),
    ):
        done = start(SPECS[0], *words)
        assert done.returncode == 2 and message in done.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_a_seed_that_is_given_twice_is_run_once() -> None:
    assert len(planned(SPECS[1], "--seeds", 1, 1, 0)) == 16


def test_the_folder_of_another_sweep_is_refused(tmp_path: Path) -> None:
    facts = {"spec": {"recipe": "a"}, "data": "D", "scale": "tiny", "pretrain": "", "lincls": ""}
    sweep.claim_folder(tmp_path / "out", facts)
    sweep.claim_folder(tmp_path / "out", facts)  # the same one goes on
    with pytest.raises(ValueError, match=r"another sweep \(its data, scale differ\)"):
        sweep.claim_folder(tmp_path / "out", {**facts, "data": "E", "scale": "full"})
    for damage in ("{", "[]"):
        (tmp_path / "out" / "sweep.json").write_text(damage)
        with pytest.raises(ValueError, match=r"sweep.json is damaged"):
            sweep.claim_folder(tmp_path / "out", facts)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(ValueError, match="holds no sweep"):
        sweep.claim_folder(tmp_path / "other", facts)


SBATCH = """#!/bin/bash
printf '%s\\n' "$@" --- >> "$FAKES/calls"
echo $((100 + $(grep -c -- --- "$FAKES/calls")))";cluster"
"""


def test_slurm_gets_an_array_for_each_level_and_then_the_report(tmp_path: Path) -> None:
    (tmp_path / "sbatch").write_text(SBATCH)
    (tmp_path / "sbatch").chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "FAKES": str(tmp_path),
    }
    out = tmp_path / "out"
    done = start(SPECS[3], "DIR", "--out", out, "--seeds", 0, 1, "--slurm", "--gpus=1 --mem=9G",
                 env=environment)  # fmt: skip
    assert done.returncode == 0, done.stderr
    first, second, report = [
        call.split("\n") for call in (tmp_path / "calls").read_text().split("\n---\n")[:3]
    ]
    assert first == ["--parsable", "--gpus=1", "--mem=9G", "--array=0,4", str(out / "array.sbatch")]
    assert second[3:5] == ["--array=1,2,3,5,6,7", "--dependency=afterany:101"]
    assert report[3] == "--dependency=afterany:102" and report[4].startswith("--wrap=")
    assert "job 103" in done.stdout
    # A task of the array runs this script with its number, and is requeued when it was stopped.
    script = (out / "array.sbatch").read_text()
    assert '--only "$SLURM_ARRAY_TASK_ID"' in script and "requeue" in script
    subprocess.run(["bash", "-n", str(out / "array.sbatch")], check=True)

    missing = start(SPECS[3], "DIR", "--out", out, "--seeds", 0, 1, "--slurm", "",
                    env={**os.environ, "PATH": "/nowhere"})  # fmt: skip
    assert missing.returncode == 1 and "there is no sbatch here" in missing.stderr


@pytest.mark.long
def test_a_sweep_runs_reports_and_is_not_run_twice(tmp_path: Path) -> None:
    data = write_labelled(tmp_path / "data", classes=6, train=24, val=5)
    spec = tmp_path / "spec.toml"
    spec.write_text(TWO)
    out = tmp_path / "out"
    words = [spec, data, "--out", out, "--jobs", 2, *FAST]
    done = start(*words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 of 2 runs done" in done.stdout
    for weight in (1, 3):
        args = json.loads((out / f"align-w-{weight}-s0" / "pretrain" / "args.json").read_text())
        assert (args["align_w"], args["unif_t"], args["epochs"]) == (weight, 3, 1)
        assert (out / f"align-w-{weight}-s0" / "lincls" / "lincls.json").is_file()
    assert "<html" in (out / "report.html").read_text()
    # Again: only the report. A run that lost a file is done again, alone.
    again = start(*words)
    assert again.returncode == 0 and "start" not in again.stdout
    # A sweep with other settings may not use the folder.
    other = start(*words, "--scale", "full")
    assert other.returncode == 2 and "another sweep" in other.stderr


@pytest.mark.long
def test_a_sweep_that_is_stopped_saves_and_goes_on(tmp_path: Path) -> None:
    data = write_labelled(tmp_path / "data", classes=6, train=24, val=5)
    spec = tmp_path / "spec.toml"
    spec.write_text('run = [{ name = "long", recipe = "table10:32" }]')
    out = tmp_path / "out"
    long = ["--scale", "tiny", "--pretrain=--epochs 4000 -j 0 --device cpu"]
    process = start_python(SCRIPT, spec, data, "--out", out, *long, cwd=tmp_path)
    log = out / "long-s0" / "log.txt"

    def trains() -> bool:
        assert process.poll() is None, process.communicate()
        return log.is_file() and "epoch [" in log.read_text()

    until(trains, lambda: "no epoch in log.txt")
    process.send_signal(signal.SIGINT)
    finish(process)
    assert process.returncode == sweep.STOPPED
    assert "stopped by SIGTERM after step" in log.read_text()
    assert list((out / "long-s0" / "pretrain").glob("*.pth.tar"))
