"""Preflight: the table of a real command line, and what each line refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from harness import MAIN, Processes

from moco import cli
from moco.run_files import LOG, read_log
from moco.tasks.moco import MoCoTask
from moco.train import preflight, verdicts
from moco.train.verdicts import (
    Line,
    data_line,
    logged_losses,
    measured_lines,
    resume_line,
    table,
)

FLAGS = (
    "-a resnet8 --image-size 16 --batch-size 16 --moco-k 64 --moco-dim 32 --bn-splits 2 --mlp "
    "--epochs 3 -j 0 --device cpu"
).split()


PREFLIGHT = MAIN.replace("main_moco.py", "scripts/preflight.py")
# Its processes are forks of it and measure for a second. As they are started without, see the test
# of a run that cannot start.
QUICKLY = """
import multiprocessing
from moco.train import preflight
fork = multiprocessing.get_context("fork")
multiprocessing.get_context = lambda *_: fork
preflight.SECONDS = 1
"""


@pytest.mark.long
def test_a_command_line_is_tried_and_nothing_is_left(images, tmp_path) -> None:
    words = [*FLAGS, "--save-dir", tmp_path / "results" / "run", images]
    tried = Processes(tmp_path / "out", *words, code=PREFLIGHT, before=QUICKLY)
    (status,), said = tried.wait(), tried.output()
    lines = said.splitlines()[-9:]
    assert [line[:15].strip() for line in lines] == [
        "data", "memory", "a full step", "loading", "saving", "kill and resume", "forecast",
        "more devices", "forecast held",
    ]  # fmt: skip
    assert "96 images looked at, 0 would be refused" in lines[0]
    assert "10 steps, killed after 7, went on to 10" in lines[5] and "losses equal" in lines[5]
    assert "for 18 steps of" in lines[6] and "2 instead of 1" in lines[7]
    # Of the speed of a busy machine nothing is expected, but that the status follows the lines.
    assert status == int("NO-GO" in said), said
    assert not any("NO-GO" in lines[i] for i in (0, 1, 2, 4, 5))
    assert list((tmp_path / "results").iterdir()) == []


@pytest.mark.long
def test_a_run_that_cannot_start_is_no_go(images, tmp_path) -> None:
    """The reason is on stderr in one line."""
    bad = tmp_path / "images"
    shutil.copytree(images, bad)
    for path in bad.rglob("*.png"):
        path.write_bytes(b"nothing")
    words = [*FLAGS, "--save-dir", tmp_path / "run", bad]
    tried = Processes(tmp_path / "out", *words, code=PREFLIGHT)
    assert tried.wait() == [1]
    reason, data, step = tried.output().splitlines()[-3:]
    assert "cannot read image" in reason and "NO-GO" in data
    assert step.startswith("a full step")


def config_of(*flags: object):
    return cli.pretrain_config([*FLAGS, *map(str, flags)])


def test_data_are_judged_as_the_check_does(images, tmp_path, monkeypatch) -> None:
    whole = tmp_path / "images"
    shutil.copytree(images, whole)
    path = sorted(whole.rglob("*.png"))[0]
    path.write_bytes(b"nothing")
    line = data_line(config_of(whole))
    assert line.found == "96 images looked at, 1 would be refused" and not line.go
    assert "check_dataset.py" in line.advice
    assert data_line(config_of("--skip-bad-images", "--max-bad-share", 0.05, whole)).go
    assert not data_line(config_of("--skip-bad-images", "--max-bad-share", 0, whole)).go
    monkeypatch.setattr(verdicts, "LOOKED_AT", 20)
    assert data_line(config_of(whole)).found.startswith("24 images looked at")


@pytest.mark.parametrize(
    ("after", "statuses", "go"),
    [
        ({4: (3.0, 1.4), 5: (2.5, 2.5), 6: (2.0, 2.6)}, (-9, 0), True),
        ({4: (3.0, 1.4), 5: (2.9, 2.5), 6: (2.0, 2.6)}, (-9, 0), False),  # another loss
        ({4: (3.0, 1.4), 5: (2.5, 2.5)}, (-9, 1), False),  # failed
        ({4: (3.0, 1.4), 5: (2.5, 2.5), 6: (2.0, 2.6)}, (0, 0), False),  # was not killed
        ({}, (1, 1), False),
    ],
)
def test_a_resume_is_judged_by_the_steps_done_twice(after, statuses, go) -> None:
    line = resume_line({4: (3.0, 1.4), 5: (2.5, 1.5)}, after, statuses, 6)
    assert line.go is go and "killed after 5" in line.found
    if len(after) == 3:
        assert "1 done twice" in line.found


FACTS = {
    "ranks": [{"loading": 0.1, "peak": 2**30, "loss": 1.0,
               "device": {"name": "CPU", "memory": 2**33}}],
    "steps": [[16, 0.1], [8, 0.06]], "gradients": 4_000_000, "reduce": None, "running": 0.2,
    "copied": 0.0, "written": 0.1, "saved": 2**20, "total_steps": 18, "steps_per_epoch": 6,
    "threads": 1,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "refused"),
    [
        ({}, []),
        ({"ranks": [{**FACTS["ranks"][0], "peak": 2**33}]}, ["memory"]),
        ({"ranks": [{**FACTS["ranks"][0], "loss": float("nan")}]}, ["a full step"]),
        ({"saved": 2**60}, ["saving"]),
        ({"ranks": FACTS["ranks"] * 2, "reduce": 0.2}, ["collectives"]),
    ],
)
def test_each_line_has_a_verdict(changed, refused, images, tmp_path) -> None:
    config = config_of("--save-dir", tmp_path / "run", images)
    (tmp_path / "run").mkdir()
    lines = measured_lines(config, {**FACTS, **changed})
    assert [line.what for line in lines if not line.go] == refused
    said = table([*lines, Line("a", "b", False, "c")]).splitlines()
    assert said[-1].startswith("a ") and said[-1].endswith("  NO-GO: c")


def test_the_loss_of_a_step_is_read_from_the_log(half: Path) -> None:
    losses = logged_losses(half / LOG)
    assert set(losses) == {line["step"] for line in read_log(half / LOG)[0] if "loss" in line}


@pytest.mark.long
def test_half_a_step_has_half_the_images(images, tmp_path, monkeypatch) -> None:
    """And where groups of the loss do not fit them, only the whole one is measured."""
    monkeypatch.setattr(preflight, "SECONDS", 0.01)
    for groups, halves in (("2", {8}), ("1", set())):
        sizes = set()

        class Sized(MoCoTask):
            def losses(self, model, batch, part, parts, sizes=sizes):
                sizes.add(len(batch[0]))
                return super().losses(model, batch, part, parts)

        run, found = tmp_path / groups, tmp_path / f"{groups}.json"
        config = config_of("--bn-splits", groups, "--save-dir", run, images)
        preflight.measure(torch.device("cpu"), config, task=Sized, out=found)
        assert {n for n, _ in json.loads(found.read_text())["steps"]} == {16, *halves}
        assert sizes == {16, 8}
