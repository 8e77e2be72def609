"""The SLURM scripts: their syntax, and the command that each task runs. No cluster is needed."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from helpers import ROOT, parsed

from moco import cli

SCRIPTS = sorted((ROOT / "scripts" / "slurm").glob("*.sbatch"))

# srun runs one task here, the one with number 9 of 16; Python writes down what it is asked to do.
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
SLURM_PROCID=9 SLURM_LOCALID=1 SLURM_NODEID=1 exec "$@"
"""
PYTHON = """#!/bin/bash
{ printf '%s\\n' "$@"; } > "$FAKES/argv"
env > "$FAKES/env"
exit $STATUS
"""
SCONTROL = """#!/bin/bash
if [[ $1 == show ]]; then printf 'node7\\nnode8\\n'; else echo "$@" > "$FAKES/queued"; fi
"""


def run_script(script: Path, folder: Path, status: int) -> tuple[int, list[str], dict[str, str]]:
    for name, text in (("srun", SRUN), ("python", PYTHON), ("scontrol", SCONTROL)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    environment = {
        **os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "FAKES": str(folder),
        "PYTHON": str(folder / "python"), "STATUS": str(status), "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_JOB_ID": "123456", "SLURM_NTASKS": "16",
        "SLURM_JOB_NUM_NODES": "2", "SLURM_CPUS_PER_TASK": "6", "OUT": "results/mine",
    }  # fmt: skip
    ended = subprocess.run(
        ["bash", str(script), "my data", "--epochs", "3"], env=environment, capture_output=True
    ).returncode
    lines = (folder / "env").read_text().splitlines()
    task = dict(line.split("=", 1) for line in lines if "=" in line)
    return ended, (folder / "argv").read_text().splitlines(), task


def test_there_is_one_for_a_node_and_one_for_several() -> None:
    assert [path.stem for path in SCRIPTS] == ["imagenet_1node", "imagenet_multinode"]
    nodes = [path.read_text().split("#SBATCH --nodes=")[1].split()[0] for path in SCRIPTS]
    assert nodes[0] == "1" and int(nodes[1]) > 1


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_task_runs_the_recipe_as_under_torchrun(script, tmp_path, monkeypatch) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    text = script.read_text()
    assert "#SBATCH --requeue" in text and "#SBATCH --signal=USR1@180" in text
    assert "Not tested on a cluster" in text
    status, argv, task = run_script(script, tmp_path, 0)
    assert status == 0 and argv[0].endswith("main_moco.py") and argv[-1] == "my data"
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "MASTER_ADDR")
    assert [task[name] for name in names] == ["9", "1", "16", "1", "2", "node7"]
    assert 1024 < int(task["MASTER_PORT"]) < 65536

    args = parsed(argv[1:])
    assert args.objective == "3 * align(alpha=2) + 1 * uniform(t=3, with intra-batch pairs)"
    assert (args.arch, args.batch_size, args.lr, args.epochs) == ("resnet50", 256, 0.03, 3)
    assert args.mlp and args.aug_plus and args.cos
    assert (args.resume, args.save_minutes, args.workers) == ("auto", 30, 48)
    for name in (*names, "MASTER_PORT"):
        monkeypatch.setenv(name, task[name])
    args = cli.pretrain_config([*argv[1:-1], "--device", "cpu", str(images(tmp_path))])
    placement = args.placement
    assert (placement.processes, placement.nodes, args.data.workers) == (16, 2, 6), (
        "workers of each process"
    )


def images(folder: Path) -> Path:
    """As many names as a batch needs; nothing opens them."""
    (folder / "train" / "a").mkdir(parents=True)
    for index in range(256):
        (folder / "train" / "a" / f"{index}.jpg").touch()
    return folder


@pytest.mark.parametrize(("status", "requeued"), [(0, False), (1, False), (75, True)])
def test_only_a_run_that_was_asked_to_stop_is_queued_again(status, requeued, tmp_path) -> None:
    ended, _, _ = run_script(SCRIPTS[0], tmp_path, status)
    assert ended == status
    assert (tmp_path / "queued").exists() is requeued
    if requeued:
        assert (tmp_path / "queued").read_text() == "requeue 123456\n"
