"""--profile: a trace that tools can read, and shares that add up."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from helpers import read_log

import main_moco
from moco import profiling
from moco.profiling import LABELS, StepProfile, label

CPU = torch.device("cpu")
TINY = shlex.split(
    "-a resnet8 --image-size 32 --batch-size 4 --moco-k 64 -j 0 --device cpu --print-freq 1 "
    "--seed 1 --profile"
)


def shares(said: str) -> dict[str, float]:
    return {
        name.strip(): float(share)
        for name, share in re.findall(r"^ +([a-z ]+?) +([\d.]+) % +[\d.]+ ms$", said, re.M)
    }


def spans(path: Path) -> list[str]:
    events = json.loads(path.read_text())["traceEvents"]
    return [event["name"] for event in events if event.get("cat") == "user_annotation"]


def test_a_run_is_profiled_in_its_second_half_and_goes_on(data, tmp_path, capsys) -> None:
    """Seven steps: the fourth to the seventh are profiled, all are logged and the end is saved. A
    resumed run profiles steps of its own."""
    run = tmp_path / "run"
    argv = [*TINY, "--resume", "auto", "--save-dir", str(run), str(data), "--max-steps"]
    main_moco.main([*argv, "7"])
    said = capsys.readouterr().out
    assert "where the time of steps 4 to 7 went" in said and "on the CPU" in said
    found = shares(said)
    assert list(found) == [*LABELS, "other"]
    assert sum(found.values()) == pytest.approx(100, abs=0.6)
    assert all(found[name] > 0 for name in ("data", "query forward", "key forward", "backward"))
    names = spans(run / "profile_trace.json")
    for name in LABELS:
        times = 2 if name == "communication" else 1  # images to the key encoder, keys from it
        assert names.count(name) == 4 * times, name
    assert [line["step"] for line in read_log(run)] == list(range(1, 8))
    main_moco.main([*argv, "9"])
    assert "where the time of steps 9 to 9 went" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("done", "steps", "profiled", "count"), [(1, 22, "12 to 21", 10), (0, 1, "1 to 1", 1)]
)
def test_ten_steps_after_ten_or_the_second_half(
    done, steps, profiled, count, tmp_path, capsys
) -> None:
    profile = StepProfile(tmp_path / "t.json", CPU, first_step=done, steps=steps)
    for _ in range(steps):
        with label("backward"):
            torch.ones(1)
        profile.step_done()
    assert f"where the time of steps {profiled} went" in capsys.readouterr().out
    assert spans(tmp_path / "t.json").count("backward") == count


def test_time_within_a_label_within_another_counts_once(clock, tmp_path, capsys) -> None:
    profile = StepProfile(tmp_path / "t.json", CPU, first_step=0, steps=1)
    with label("key forward"):
        clock.sleep(0.02)
        with label("communication"):
            clock.sleep(0.06)
        clock.sleep(0.02)
    clock.sleep(0.1)
    profile.step_done()
    found = shares(capsys.readouterr().out)
    assert (found["key forward"], found["communication"], found["other"]) == (20, 30, 50)
    assert profiling._timeline is None
