"""What is due after a step, as a table."""

from __future__ import annotations

from dataclasses import replace

import pytest

from moco.train.clock import Due, Rhythm, Stopwatch, due, evaluation_due

# 5 epochs of 6 steps; lines every 4, saves every 5, ranks every 7, k-NN every 2
# epochs.
RHYTHM = Rhythm(steps_per_epoch=6, total_steps=30, log=4, save=5, compare_ranks=7, evaluate=2)
NAMES = ("log", "agree", "compare_ranks", "epoch_end", "save", "evaluate", "ended")


# Ends within an epoch; evaluates every 4 steps.
SHORT = Rhythm(
    steps_per_epoch=6, total_steps=8, log=100, save=0, compare_ranks=0, evaluate=0, evaluate_steps=4
)
LATER = 1000  # no look is due by time


@pytest.mark.parametrize(
    ("rhythm", "step", "step_in_epoch", "epoch", "expected"),
    [
        (RHYTHM, 1, 1, 0, ""),
        (RHYTHM, 3, 3, 0, ""),
        (RHYTHM, 4, 4, 0, "log agree"),
        (RHYTHM, 5, 5, 0, "save agree"),
        (RHYTHM, 6, 6, 0, "epoch_end save agree"),
        (RHYTHM, 7, 1, 1, "compare_ranks"),
        (RHYTHM, 12, 6, 1, "epoch_end save log agree evaluate"),
        (RHYTHM, 18, 6, 2, "epoch_end save agree"),
        (RHYTHM, 20, 2, 3, "log save agree"),
        (RHYTHM, 29, 5, 4, ""),
        (RHYTHM, 30, 6, 4, "epoch_end save log agree evaluate ended"),
        (SHORT, 3, 3, 0, ""),
        (SHORT, 4, 4, 0, "agree save evaluate"),
        (SHORT, 6, 6, 0, "agree save epoch_end"),
        (SHORT, 7, 1, 1, ""),
        (SHORT, 8, 2, 1, "log agree save evaluate ended"),
        (replace(SHORT, evaluate_steps=0), 8, 2, 1, "log agree save ended"),
    ],
)
def test_what_is_due(rhythm, step, step_in_epoch, epoch, expected) -> None:
    found = due(step, step_in_epoch, epoch, rhythm, LATER)
    assert {name for name in NAMES if getattr(found, name)} == set(expected.split())


def test_a_saved_step_is_always_one_that_was_agreed_on() -> None:
    """What is written has been checked for NaN first, whatever the rhythm."""
    for save in range(4):
        for look_at in range(1, 21, 4):
            rhythm = Rhythm(7, 20, log=6, save=save, compare_ranks=0, evaluate=1)
            for step in range(1, 21):
                found = due(step, (step - 1) % 7 + 1, (step - 1) // 7, rhythm, look_at)
                assert found.agree or not (found.save or found.log)
                assert found.agree or step < look_at
                assert found.save or not (found.evaluate or found.ended or found.epoch_end)


@pytest.mark.parametrize(
    ("before", "stop", "save", "expected"),
    [
        (Due(), False, False, Due()),
        (Due(), False, True, Due(save=True)),
        (Due(log=True), True, False, Due(log=True, save=True, ended=True, stopped=True)),
        (Due(save=True, evaluate=True), True, False, Due(save=True, ended=True, stopped=True)),
        (Due(save=True, evaluate=True), False, True, Due(save=True, evaluate=True)),
        (Due(ended=True), False, False, Due(ended=True)),
    ],
)
def test_what_ranks_agree_on_extends_it(before, stop, save, expected) -> None:
    assert before.extended(stop=stop, save=save) == expected


@pytest.mark.parametrize(
    ("rhythm", "step", "epochs", "expected"),
    [
        (RHYTHM, 0, 0, False),
        (RHYTHM, 12, 2, True),
        (RHYTHM, 13, None, False),
        (RHYTHM, 18, 3, False),
        (RHYTHM, 30, 5, True),
        (SHORT, 0, None, False),
    ],
)
def test_an_evaluation_that_a_run_was_cut_off_before(rhythm, step, epochs, expected) -> None:
    assert evaluation_due(step, epochs, rhythm) is expected


def test_the_stopwatch_rings_after_its_minutes_and_never_without_any() -> None:
    assert not Stopwatch(0, last=-1e9).rings()
    watch = Stopwatch(1, last=-1e9)
    assert watch.rings()
    watch.restart()
    assert not watch.rings()
