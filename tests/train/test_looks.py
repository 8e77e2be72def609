"""How often ranks look for a request to stop where a look waits for the device, as on a GPU."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from harness import FLAGS, Processes, logged_steps, saved_step

from moco.looks import Looks, looking_waits


def steps_of_looks(clock, seconds: list[float]) -> list[int]:
    """After which steps a run looks whose step number i takes seconds[i], until they are all done;
    each look is followed by a save of a minute."""
    looks, found = Looks(0, waits=True), []
    for step, duration in enumerate(seconds, start=1):
        clock.sleep(duration)
        if step >= looks.next:
            looks.together(step, False, device=torch.device("cpu"))
            found.append(step)
            clock.sleep(60)
            looks.time_from(step)
    return found


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        ([2.5] * 6, [1, 2, 3, 4, 5, 6]),  # slow steps: each
        ([0.4] * 9, [1, 3, 5, 7, 9]),
        ([300] + [0.1] * 40, [1, 2, 4, 8, 16, 26, 36]),  # the first one compiles
        ([0.1] * 16 + [9] * 13 + [0.1] * 4, [1, 3, 7, 15, 25, 26, 27, 28, 29, 30, 32]),  # a stall
    ],
)
def test_looks_come_about_every_second(seconds, expected, clock) -> None:
    assert steps_of_looks(clock, seconds) == expected


def test_each_look_times_the_steps_since_the_last_one(clock) -> None:
    """Also where nobody but the look itself does, as in the evaluation."""
    looks = Looks(0, waits=True)
    for step, seconds, expected in ((1, 300, 2), (2, 0.1, 4)):
        clock.sleep(seconds)
        looks.together(step, False, device=torch.device("cpu"))
        assert looks.next == expected


def test_where_a_look_costs_nothing_each_step_has_one(clock) -> None:
    looks = Looks(7, waits=looking_waits(torch.device("cpu")))
    for step in range(8, 12):
        assert looks.next == step
        assert looks.together(step, True, False, device=torch.device("cpu")) == [True, False]
    assert looking_waits(torch.device("cuda", 0))


# A step of rank 0 takes 1/16 s by its clock, one of rank 1 takes 9 s, a save a minute, and rank
# `asked` is sent SIGTERM within step 100.
AS_ON_A_GPU = """
import os, signal
from types import SimpleNamespace
from moco import looks
from moco.train import loop
looks.looking_waits = guards.looking_waits = lambda device: True
rank, done, away = int(os.environ.get("RANK", "0")), 0, 0.0
looks.time = SimpleNamespace(monotonic=lambda: away + done * (9.0 if rank else 0.0625))
step, save = loop.train_step, loop.save
def saves(*args):
    global away
    away += 60
    save(*args)
loop.save = saves
def steps(task, model, state, guard, batch):
    global done
    done += 1
    if done == 100 and rank == {asked}:
        os.kill(os.getpid(), signal.SIGTERM)
    return step(task, model, state, guard, batch)
loop.train_step = steps
"""


@pytest.fixture
def many_images(images, tmp_path) -> Path:
    """One image under as many names as an epoch of 1000 steps needs."""
    first = next((images / "train").rglob("*.png"))
    folder = tmp_path / "many" / "train" / "class"
    folder.mkdir(parents=True)
    for number in range(4000):
        (folder / f"{number:04d}.png").hardlink_to(first)
    return tmp_path / "many"


@pytest.mark.parametrize("asked", [0, pytest.param(1, marks=pytest.mark.long)])
def test_a_request_is_heard_within_two_seconds_whatever_is_printed(
    asked, many_images, tmp_path
) -> None:
    """SIGTERM comes in step 100 of an epoch of 1000, without a line or a save before its end. Ranks
    look after 1, 2, 4, ... steps, then after 16, which are a second by rank 0's clock; each look
    saves as well, as --save-minutes asks."""
    run = tmp_path / "run"
    flags = ["--batch-size", 4, "--bn-splits", 1, "--save-dir", run, "-p", 100000]
    flags += ["--max-steps", 300, "--save-minutes", 1e-9, "--keep-last", 100, "--check-every", 0]
    before = "from moco.train import guards\n" + AS_ON_A_GPU.format(asked=asked)
    ranks = Processes(
        tmp_path / "out", *FLAGS, "-j", 0, *flags, many_images, count=asked + 1, before=before
    )
    assert ranks.wait() == [75] * (asked + 1), ranks.output()
    by = "SIGTERM" if asked == 0 else "a signal to another rank"
    assert f"stopped by {by} after step 111" in ranks.output(0)
    saved = [int(re.findall(r"\d+", path.name)[0]) for path in sorted(run.glob("step_*.pth.tar"))]
    assert saved == [1, 3, 7, 15, 31, 47, 63, 79, 95, 111]
    assert saved_step(run) == 111 and logged_steps(run) == 0
