"""Sweeps: what they run, what they pass over, what they refuse."""

from __future__ import annotations

import csv
import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT

from moco.runs import sweep as sweeps
from moco.runs.command import Children
from scripts import sweep

SCRIPT = ROOT / "scripts" / "sweep.py"
SPECS = {path.stem: path for path in sorted((ROOT / "scripts" / "sweeps").glob("*.toml"))}
HANDED_ON = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
FAST = ["--scale", "tiny", "--pretrain=--epochs 1 -j 0 --device cpu --knn-every 0",
        "--lincls=--epochs 1 --schedule 1 -j 0 --device cpu"]  # fmt: skip


@pytest.fixture
def planned(call):
    """planned(spec, "more words") -> the commands of a dry run."""

    def planned(spec: Path, words: str = "") -> list[list[str]]:
        status, text = call(sweep.main, f"{spec} DIR --out OUT --dry-run {words}")
        assert status == 0, text
        return [shlex.split(line) for line in text.splitlines() if not line.startswith("#")]

    return planned


def flags_of(command: list[str]) -> list[str]:
    return shlex.split(next(w for w in command if w.startswith("--pretrain=")).split("=", 1)[1])


def test_each_figure_of_the_paper_has_its_runs(planned) -> None:
    assert list(SPECS) == [
        "cifar10", "cifar10_figure7", "cifar10_figure8", "cifar10_grid", "cifar10_seeds", "example",
        "figure5a", "figure5b", "figure7", "figure7stl", "figure8", "figure8stl", "figure9a",
        "figure9b",
    ]  # fmt: skip
    with open(ROOT / "scripts/recipes/table10.csv", newline="") as file:
        table = list(csv.DictReader(file))
    by_name = {name: planned(path) for name, path in SPECS.items()}

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
    start, *after = sweeps.plan(SPECS["figure8"], sweep.TABLES, SCRIPT, "DIR", Path("OUT"))
    assert start.level == 0 and [(run.level, run.after) for run in after] == [(1, start)] * 3
    assert len(by_name["example"]) == 8 and len(by_name["figure9b"]) == 50


def test_a_grid_is_every_combination_for_every_seed(planned, tmp_path) -> None:
    spec = tmp_path / "spec.toml"
    spec.write_text(
        'recipe = "table10:1"\n[grid]\nmoco-k = [256, 512]\nmoco-unif-no-intra-batch = '
        "[true, false]\nbatch-size = [32]\n"
    )
    commands = planned(spec, "--seeds 0 4 4 --scale tiny --pretrain='--amp bf16'")
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
        ("run = [1]", "must be a list of tables"),
        ("grid = 5", "either a list `run` or a table `grid`"),
        ("recipe = 5\nrun = [{ }]", "recipe must be a text, got 5"),
        ('run = [{ recipe = "table10:1", pretrain = 3 }]', "pretrain must be a text, got 3"),
    ],
)
def test_a_spec_that_cannot_be_run_is_refused(text, message, tmp_path, call) -> None:
    spec = tmp_path / "spec.toml"
    spec.write_text(text)
    status, out = call(sweep.main, f"{spec} DIR --out {tmp_path / 'out'}")
    assert status == 2 and message in out.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_done_is_one_line(tmp_path, call) -> None:
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    (tmp_path / "deep.toml").write_text("run = " + "[" * 10_000)
    (tmp_path / "loop.toml").symlink_to(tmp_path / "loop.toml")
    out = tmp_path / "out"
    for words, message in (
        (f"{tmp_path}/none.toml DIR --out {out}", "No such file or directory: "),
        (f"{tmp_path} DIR --out {out}", "Is a directory: "),
        (f"{tmp_path}/binary.toml/spec.toml DIR --out {out}", "Not a directory: "),
        (f"{tmp_path}/binary.toml DIR --out {out}", f"{tmp_path}/binary.toml is no TOML file: "),
        (f"{tmp_path}/deep.toml DIR --out {out}", f"{tmp_path}/deep.toml is no TOML file: "),
        (f"{tmp_path}/loop.toml DIR --out {out}", "Too many levels of symbolic links"),
        ("", "required: SPEC, DIR, --out"),
        ("spec.toml DIR", "required: --out"),
        ("spec.toml DIR --out o --seeds x", "invalid int value: 'x'"),
        ("spec.toml DIR --outt o", "--out"),
        # What would fail in every run is refused before the first.
        (f"{SPECS['cifar10']} DIR --out {out}", "no such data folder: DIR"),
        (f"{SPECS['cifar10']} DIR --out {out} --scale small", "invalid choice: 'small'"),
        (f"{SPECS['cifar10']} DIR --out {out} --jobs 0", "--jobs must be at least 1, got 0"),
    ):
        status, text = call(sweep.main, words)
        assert status == 2 and message in text and len(text.splitlines()) == 1, text
    assert not out.exists()


def test_the_folder_of_another_sweep_is_refused(tmp_path) -> None:
    facts = {"spec": {"recipe": "a"}, "data": "D", "scale": "tiny", "pretrain": "", "lincls": ""}
    sweeps.claim_folder(tmp_path / "out", facts)
    sweeps.claim_folder(tmp_path / "out", facts)  # the same one goes on
    with pytest.raises(ValueError, match=r"another sweep \(its data, scale differ\)"):
        sweeps.claim_folder(tmp_path / "out", {**facts, "data": "E", "scale": "full"})
    for damage in ("{", "[]"):
        (tmp_path / "out" / "sweep.json").write_text(damage)
        with pytest.raises(ValueError, match=r"sweep.json is damaged"):
            sweeps.claim_folder(tmp_path / "out", facts)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(ValueError, match="holds no sweep"):
        sweeps.claim_folder(tmp_path / "other", facts)


def test_jobs_share_what_the_machine_has(monkeypatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    gpus = [share["CUDA_VISIBLE_DEVICES"] for share in sweeps.device_shares(2, 5)]
    assert gpus == ["0,2,4", "1,3"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "6,7")
    gpus = [share["CUDA_VISIBLE_DEVICES"] for share in sweeps.device_shares(3, 2)]
    assert gpus == ["6", "7", "6"]
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert sweeps.device_shares(2, 0) == [{"OMP_NUM_THREADS": "3"}] * 2


SBATCH = """#!/bin/bash
printf '%s\\n' "$@" --- >> "$FAKES/calls"
echo $((100 + $(grep -c -- --- "$FAKES/calls")))";cluster"
"""


def test_slurm_gets_an_array_for_each_level_and_then_the_report(
    tmp_path, monkeypatch, call
) -> None:
    (tmp_path / "sbatch").write_text(SBATCH)
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKES", str(tmp_path))
    out = tmp_path / "out"
    words = f"{SPECS['figure8']} DIR --out {out} --seeds 0 1"
    status, text = call(sweep.main, f"{words} --slurm '--gpus=1 --mem=9G'")
    assert status == 0, text
    first, second, report = [
        call.split("\n") for call in (tmp_path / "calls").read_text().split("\n---\n")[:3]
    ]
    assert first == ["--parsable", "--gpus=1", "--mem=9G", "--array=0,4", str(out / "array.sbatch")]
    assert second[3:5] == ["--array=1,2,3,5,6,7", "--dependency=afterany:101"]
    assert report[3] == "--dependency=afterany:102" and report[4].startswith("--wrap=")
    assert "job 103" in text
    # A task of the array runs this script with its number, and is requeued when it was stopped.
    script = (out / "array.sbatch").read_text()
    assert '--only "$SLURM_ARRAY_TASK_ID"' in script and "requeue" in script
    subprocess.run(["bash", "-n", str(out / "array.sbatch")], check=True)
    again = report[4].removeprefix("--wrap=").split(" ", 2)[2]  # without python and this script
    assert "--seed 1" in call(sweep.main, f"{again} --dry-run")[1]

    # What is done is not submitted again.
    for name in ("start-s0", "start-s1", "both-s1"):
        (out / name).mkdir()
        (out / name / "align_uniform.json").touch()
    assert call(sweep.main, f"{words} --slurm ''")[0] == 0
    left = (tmp_path / "calls").read_text().split("\n---\n")[3]
    assert left.split("\n")[1] == "--array=1,2,3,5,6"

    monkeypatch.setenv("PATH", "/nowhere")
    status, text = call(sweep.main, f"{words} --slurm ''")
    assert status == 1 and "there is no sbatch here" in text


def test_a_run_without_room_for_its_folder_leaves_the_others(tmp_path, capsys) -> None:
    before = {number: signal.getsignal(number) for number in HANDED_ON}
    try:
        children = Children("sweep.py")
        runs = [
            sweeps.SweepRun(name, tmp_path / name, ["-c", ""], None) for name in ("bad", "good")
        ]
        (tmp_path / "bad").touch()
        assert sweeps.run_all(runs, [{}], children) == ["bad"]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    out = capsys.readouterr().out.splitlines()
    assert "File exists" in out[1] and out[-1] == "done good"


@pytest.mark.long
def test_a_sweep_runs_reports_and_is_not_run_twice(images, tmp_path, call) -> None:
    """And each of its recipes goes on where files are missing; both objectives are compared."""
    spec = tmp_path / "spec.toml"
    spec.write_text('recipe = "table10:32"\n[grid]\nmoco-align-w = [1, 3]\n')
    out = tmp_path / "out"
    words = [sys.executable, SCRIPT, spec, images, "--out", out, "--jobs", "2", *FAST]

    def run(*more: str) -> subprocess.CompletedProcess:
        return subprocess.run([*words, *more], capture_output=True, text=True)

    done = run()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 of 2 runs done" in done.stdout and "Left out" not in done.stdout
    tops = []
    for weight in (1, 3):
        folder = out / f"align-w-{weight}-s0"
        args = json.loads((folder / "pretrain" / "args.json").read_text())
        assert (args["align_w"], args["unif_t"], args["epochs"]) == (weight, 3, 1)
        result = json.loads((folder / "lincls" / "lincls.json").read_text())
        metrics = json.loads((folder / "align_uniform.json").read_text())
        tops.append(f"{result['last']['top1']:.2f}")
        log = (folder / "log.txt").read_text()
        line = next(line for line in log.splitlines() if line.startswith("validation top-1"))
        assert line.split()[-2:] == ["74.60", tops[-1]] and "no comparison" in log
        assert f"alignment {metrics['alignment']:.4f}" in log
        (row,) = [li for li in done.stdout.splitlines() if f"{weight} * align(alpha=2)" in li]
        assert f" {tops[-1]} |" in row and f" {metrics['alignment']:.3f} |" in row
    assert "<html" in (out / "report.html").read_text()
    # Again: a run that lost a file does that again, alone.
    (out / "align-w-3-s0" / "align_uniform.json").unlink()
    again = run()
    assert again.returncode == 0 and "start align-w-3-s0" in again.stdout
    assert "start align-w-1" not in again.stdout
    log = (out / "align-w-3-s0" / "log.txt").read_text()
    assert log.count("epoch [0]") == log.split("validation top-1")[0].count("epoch [0]")
    # A sweep with other settings may not use the folder.
    words = [spec, images, "--out", out, *FAST, "--scale", "full"]
    status, text = call(sweep.main, shlex.join(map(str, words)))
    assert status == 2 and "another sweep" in text


@pytest.mark.long
def test_a_sweep_that_is_killed_or_interrupted_leaves_nothing_running_and_goes_on(
    images, processes, tmp_path
) -> None:
    (tmp_path / "spec.toml").write_text('run = [{ name = "long", recipe = "table10:32" }]')
    out = tmp_path / "out"
    words = [SCRIPT, tmp_path / "spec.toml", images, "--out", out, "--scale", "tiny"]
    words += ["--pretrain=--epochs 100000 -j 0 --device cpu --knn-every 0 --keep-last 1"]
    log = out / "long-s0" / "log.txt"

    def said(text: str) -> bool:
        return log.is_file() and text in log.read_text()

    process = processes.start(*words)
    processes.until(lambda: said("epoch ["), process)
    process.kill()
    process.wait()
    processes.until(lambda: not processes.running())
    assert said("stopped by SIGTERM after step")
    assert list((out / "long-s0" / "pretrain").glob("*.pth.tar"))

    process = processes.start(*words, stderr=subprocess.PIPE)
    processes.until(lambda: "epoch [" in log.read_text().partition("resuming ")[2], process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=processes.LIMIT)
    assert process.returncode == 130 and len(err.splitlines()) == 1, err
    assert log.read_text().count("stopped by SIGTERM after step") == 2
    assert not processes.running()
