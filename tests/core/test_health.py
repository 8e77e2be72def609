"""The rule that judges a run: on numbers that small runs have logged, and at its borders."""

from __future__ import annotations

from dataclasses import replace

import pytest

from moco.health import (
    COLLAPSED,
    COLLAPSING,
    FILLING,
    HEALTHY,
    NOT_LEARNING,
    TOO_EARLY,
    UNMOVED,
    History,
    Knn,
    Place,
    Seen,
    judge,
    standard_error,
)

IMAGES = 480  # that were classified
STEPS = 28  # an epoch of the toy images, in batches of 64
START, IN_BATCH_START = Place(0.345, -0.738), Place(1.232, -2.451)  # of the first step
# Runs on them (2026-11-28; docs/training.md): k-NN before training, places of the first step; after
# each epoch alignment, uniformity, k-NN; and the verdicts with labels and without: H healthy,
# E too early to tell, N not learning, C collapsing.
RUNS = {
    "align + uniform": (35.2, START, [
        (0.618, -1.216, 27.5), (1.229, -2.230, 21.7), (1.084, -1.984, 23.3), (1.077, -2.118, 30.8),
        (1.029, -2.044, 31.5), (1.061, -2.274, 36.9), (1.098, -2.482, 39.2), (1.031, -2.478, 43.1),
        (1.010, -2.570, 42.9), (0.975, -2.638, 44.4), (0.938, -2.671, 44.6), (0.902, -2.675, 44.6),
    ], "EEEEEEHHHHHH", "EEEEEHHHHHHH"),
    "InfoNCE, too short to pass the untrained encoder": (35.2, START, [
        (0.549, -0.697, 22.9), (1.051, -0.825, 25.2), (1.264, -0.501, 23.1),
        (1.096, -0.487, 24.0), (0.884, -0.482, 26.2), (0.626, -0.569, 25.6),
    ], "EEENNN", "EEENNN"),
    "lr 1e-6": (35.2, START, [
        (0.332, -0.696, 34.0), (0.332, -0.703, 34.8), (0.332, -0.701, 35.8),
    ], "ENN", "ENN"),
    "lr 3": (35.2, START, [
        (0.118, -0.033, 18.3), (0.061, -0.216, 14.4), (0.133, -0.424, 14.4),
    ], "CNN", "CNN"),
    "alignment alone": (35.2, START, [
        (0.139, -0.075, 36.5), (0.031, -0.008, 35.4), (0.013, -0.007, 35.6),
    ], "CCC", "CCC"),
    "uniformity alone": (35.2, START, [
        (2.521, -0.960, 20.6), (2.070, -0.657, 21.0), (1.398, -0.470, 21.2),
    ], "ENN", "ENN"),
    "within the batch, small_alexnetx0.25": (51.0, IN_BATCH_START, [
        (1.695, -3.322, 49.2), (1.608, -3.451, 74.4), (1.434, -3.427, 79.6),
    ], "EHH", "EHH"),
}  # fmt: skip
VERDICTS = {"H": HEALTHY, "E": TOO_EARLY, "N": NOT_LEARNING, "C": COLLAPSING}


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("labels", [True, False])
def test_recorded_runs_get_the_verdicts_that_they_deserve(name, labels) -> None:
    untrained, start, epochs, *verdicts = RUNS[name]
    steps, found = STEPS * len(epochs), ""
    before = Knn(0, untrained, IMAGES) if labels else None
    for epoch, (a, u, top1) in enumerate(epochs, start=1):
        knn = Knn(STEPS * epoch, top1, IMAGES) if labels else None
        seen = Seen(start, Place(a, u), epoch, STEPS * epoch, steps, untrained=before, knn=knn)
        found += next(letter for letter, v in VERDICTS.items() if v == judge(seen).verdict)
    assert found == verdicts[0 if labels else 1]


LATE = Seen(Place(0.3, -0.7), Place(0.9, -2.5), epochs=9, step=90, steps=100)


def test_a_queue_that_fills_excuses_all_but_a_collapse() -> None:
    seen = replace(LATE, now=LATE.start, filled=91)
    assert judge(seen).verdict == FILLING and judge(replace(seen, filled=90)).verdict == (
        NOT_LEARNING
    )
    assert "up to step 91, this is step 90" in judge(seen).reason
    assert judge(replace(seen, now=Place(0.01, -0.01))).verdict == COLLAPSING


@pytest.mark.parametrize(("epochs", "step"), [(1, 5000), (9, 49)])
def test_nothing_has_to_have_moved_in_the_first_epoch_or_steps(epochs, step) -> None:
    """A warm-up starts at nearly nothing; and uniformity near 0 is where some networks begin."""
    young = replace(LATE, epochs=epochs, step=step, steps=step, now=LATE.start)
    knns = {"untrained": Knn(0, 50.0, 100), "knn": Knn(step, 20.0, 100)}
    assert judge(replace(young, **knns)).verdict == TOO_EARLY
    narrow = replace(young, start=Place(0.02, -0.05), now=Place(0.3, -0.19))
    assert judge(narrow).verdict == TOO_EARLY
    assert judge(replace(narrow, epochs=2, step=50)).verdict == COLLAPSING


def test_borders_of_what_has_moved_and_what_has_collapsed() -> None:
    inside = Place(0.3 + 0.99 * UNMOVED, -0.7 - 0.99 * UNMOVED)
    assert "where they were" in judge(replace(LATE, now=inside)).reason
    assert "where they were" not in judge(replace(LATE, now=Place(0.361, -0.7))).reason
    assert judge(replace(LATE, now=Place(0.5, COLLAPSED - 0.01))).verdict == NOT_LEARNING
    assert judge(replace(LATE, now=Place(0.5, COLLAPSED + 0.01))).verdict == COLLAPSING


@pytest.mark.parametrize(
    ("now", "reason"),
    [
        (Place(0.3 * 0.77 / 0.7 - 1e-6, -0.77), None),
        (Place(0.3 * 0.77 / 0.7 + 1e-6, -0.77), "views of one image have spread"),
        (Place(0.2, -0.7 - 0.99 * UNMOVED), "images have not spread"),
    ],
)
def test_without_labels_images_have_to_spread_and_views_of_one_not(now, reason) -> None:
    """From two thirds of the run on; before that it is too early for a bad verdict."""
    late, early = (judge(replace(LATE, now=now, step=step)) for step in (67, 66))
    if reason is None:
        assert (late.verdict, early.verdict) == (HEALTHY, HEALTHY)
    else:
        assert (late.verdict, early.verdict) == (NOT_LEARNING, TOO_EARLY)
        assert reason in late.reason and reason in early.reason and "step 67" in early.reason


def test_knn_has_to_be_above_the_untrained_encoders_late_in_the_run_and_by_more_than_chance() -> (
    None
):
    before = Knn(0, 30.0, 400)
    chance = standard_error(before, before)
    assert chance == pytest.approx(100 * (2 * 0.3 * 0.7 / 400) ** 0.5)
    for gain, step, expected in (
        (0.9 * chance, 67, NOT_LEARNING), (1.1 * chance, 67, HEALTHY),
        (-20.0, 66, TOO_EARLY), (-20.0, 67, NOT_LEARNING),
    ):  # fmt: skip
        seen = replace(LATE, untrained=before, knn=Knn(step, 30 + gain, 400))
        health = judge(seen)
        assert health.verdict == expected and f"{30 + gain:.1f} %" in health.reason
        assert "30.0 %" in health.reason
    # Of a run that began elsewhere, and of one whose k-NN was never measured again.
    assert judge(replace(LATE, knn=Knn(90, 1.0, 400))).verdict == HEALTHY
    assert judge(replace(LATE, untrained=before, knn=before)).verdict == HEALTHY


def test_the_history_is_read_line_by_line_and_lines_without_numbers_count_nothing() -> None:
    history = History()
    assert history.seen(0, 0, steps=4) is None
    for line in (
        {"kind": "knn", "step": 0, "epoch": 0, "top1": 31.0, "images": 480},
        {"kind": "metrics", "step": 1, "epoch": 0, "alignment": 0.3, "uniformity": -0.7},
        {"kind": "metrics", "step": 2, "epoch": 0, "alignment": 0.5, "uniformity": -0.9},
        {"kind": "metrics", "step": 3, "epoch": 1, "alignment": 0.7, "uniformity": -1.0},
        {"kind": "metrics", "step": 4, "epoch": 1, "alignment": 0.9, "uniformity": -2.0},
        {"kind": "metrics", "step": 4, "epoch": 1, "alignment": float("nan"), "uniformity": "x"},
        {"kind": "metrics", "step": 4},
        {"kind": "train", "step": 4, "epoch": 1, "loss": 1.0},
        {"kind": "knn", "step": 4, "epoch": 2, "top1": 33.0, "images": 480},
        {"kind": "knn", "step": 5, "top1": None},
        {"kind": "health", "step": 4, "verdict": HEALTHY},
    ):
        history.add(line)
    assert history.verdict == HEALTHY
    seen = history.seen(2, 4, steps=8, filled=3)
    assert (seen.start, seen.now) == (Place(0.3, -0.7), Place(pytest.approx(0.8), -1.5))
    assert (seen.untrained.top1, seen.knn) == (31.0, Knn(4, 33.0, 480))
    assert (seen.epochs, seen.step, seen.steps, seen.filled) == (2, 4, 8, 3)


def test_the_start_is_the_first_step_where_the_log_has_it() -> None:
    """The first line may come after ten steps, and a run that collapses has done so by then."""
    history = History()
    history.add({"kind": "start", "step": 1, "epoch": 0, "alignment": 0.3, "uniformity": -0.7})
    assert history.seen(0, 1, steps=9) is None  # a place to compare with, but nothing to compare
    history.add({"kind": "metrics", "step": 3, "epoch": 0, "alignment": 0.1, "uniformity": -0.02})
    seen = history.seen(1, 3, steps=9)
    assert (seen.start, seen.now) == (Place(0.3, -0.7), Place(0.1, -0.02))
    assert judge(seen).verdict == COLLAPSING
