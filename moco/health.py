"""Is my run healthy? A rule that judges a run by alignment, uniformity and k-NN. Needs no torch.

What the thresholds come from is in docs/training.md ("Is my run healthy?").
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

HEALTHY, TOO_EARLY, FILLING = "healthy", "too early to tell", "queue still filling"
COLLAPSING, NOT_LEARNING = "collapsing", "not learning"

# Uniformity (t 2) is 0 where all features are one point. Collapsing: it is above the first number,
# and less than the second share is left of what it was at the start of the run, or the run is old.
COLLAPSED, SHARE_LEFT = -0.2, 0.25
# A run is old enough to have moved after so many epochs and steps.
LEAST_EPOCHS, LEAST_STEPS = 2, 50
# Nothing has moved: neither alignment nor uniformity is so far from the start of the run.
UNMOVED = 0.06
# From this share of the run on it has to be better than before training. Before that, features that
# spread often have a lower k-NN.
LATE = 2 / 3


@dataclass(frozen=True)
class Place:
    """Where the features of a run are: alignment (alpha 2), 0 to 4, and uniformity (t 2), up to 0;
    the latter is the log of a mean over pairs in a batch of training views."""

    alignment: float
    uniformity: float


@dataclass(frozen=True)
class Knn:
    """k-NN accuracy of an encoder, in percent.

    Attributes:
        step: how many steps it was trained, 0 before training.
        images: that were classified.
    """

    step: int
    top1: float
    images: int


@dataclass(frozen=True)
class Seen:
    """What the log of a run has shown so far.

    Attributes:
        start: its first step.
        now: the mean over the lines of its latest epoch.
        epochs: finished.
        step: finished steps, of `steps`.
        filled: the step from which on the queue holds keys of images only; 0 without a queue.
        untrained, knn: before training and latest; None where it is not measured.
    """

    start: Place
    now: Place
    epochs: int
    step: int
    steps: int
    filled: int = 0
    untrained: Knn | None = None
    knn: Knn | None = None


@dataclass(frozen=True)
class Health:
    """A verdict, one of the five above, and the reason for it in one sentence with its numbers."""

    verdict: str
    reason: str


def judge(seen: Seen) -> Health:
    """The verdict on a run at the end of an epoch.

    Collapse comes first: no queue hides it, since uniformity here is that of a batch. Then comes
    the queue, whose random keys make the loss rise while they last. A run whose features are where
    they were learns nothing. Else k-NN decides, and without labels the features' places do.
    """
    start, now = seen.start, seen.now
    places = (
        f"alignment {now.alignment:.3f} and uniformity {now.uniformity:.3f}, at the start "
        f"{start.alignment:.3f} and {start.uniformity:.3f}"
    )
    old = seen.epochs >= LEAST_EPOCHS and seen.step >= LEAST_STEPS
    moved = max(abs(now.alignment - start.alignment), abs(now.uniformity - start.uniformity))
    shrunk = now.uniformity > SHARE_LEFT * start.uniformity
    if now.uniformity > COLLAPSED and (shrunk or (old and moved >= UNMOVED)):
        return Health(
            COLLAPSING,
            f"all features are near one point, where both numbers are 0: {places}",
        )
    if seen.step < seen.filled:
        return Health(
            FILLING,
            f"the queue holds random keys up to step {seen.filled}, this is step {seen.step}, and "
            f"the loss may rise until then: {places}",
        )
    if old and moved < UNMOVED:
        return Health(NOT_LEARNING, f"features are where they were: {places}")
    if seen.untrained and seen.knn and seen.knn.step:
        found = _judge_knn(seen, old)
    else:
        found = _judge_places(seen, old)
    return Health(found.verdict, f"{found.reason}; {places}")


def _judge_knn(seen: Seen, old: bool) -> Health:
    """Better than the untrained encoder by one standard error of the difference, or late."""
    before, knn = seen.untrained, seen.knn
    text = f"k-NN {knn.top1:.1f} %, of the encoder before training {before.top1:.1f} %"
    counts = math.ceil(LATE * seen.steps)
    if knn.top1 - before.top1 > standard_error(before, knn):
        return Health(HEALTHY, text)
    if not old or knn.step < counts:
        return Health(TOO_EARLY, f"{text}, which counts from step {counts} on")
    return Health(NOT_LEARNING, f"{text}, no more than chance may add")


def _judge_places(seen: Seen, old: bool) -> Health:
    """Without labels: images have to spread, and views of one image to be no further from each
    other, relative to images. (-uniformity / 2 is at most the mean squared distance of images.)"""
    start, now = seen.start, seen.now
    spread = start.uniformity - now.uniformity >= UNMOVED
    near = now.alignment * start.uniformity >= start.alignment * now.uniformity
    if not old:
        return Health(TOO_EARLY, f"judged after {LEAST_EPOCHS} epochs and {LEAST_STEPS} steps")
    if spread and near:
        return Health(HEALTHY, "images have spread, and views of one image have not")
    text = "views of one image have spread as images have" if spread else "images have not spread"
    if seen.step < (counts := math.ceil(LATE * seen.steps)):
        return Health(TOO_EARLY, f"{text}, which counts from step {counts} on")
    return Health(NOT_LEARNING, text)


def standard_error(a: Knn, b: Knn) -> float:
    """Of the difference of two accuracies, in percent, as of independent images."""
    shares = [(min(max(each.top1 / 100, 0), 1), max(1, each.images)) for each in (a, b)]
    return 100 * math.sqrt(sum(p * (1 - p) / n for p, n in shares))


@dataclass
class History:
    """What of a run's log the rule needs, line by line as it is written or read again."""

    start: Place | None = None
    untrained: Knn | None = None
    knn: Knn | None = None
    verdict: str | None = None  # the last one
    _epoch: int = -1
    _sums: list[float] = field(default_factory=lambda: [0.0, 0.0])
    _lines: int = 0

    def add(self, line: Mapping[str, Any]) -> None:
        """Take a line of log.jsonl; what lacks a number counts for nothing."""
        names = ("alignment", "uniformity", "epoch", "top1", "images")
        alignment, uniformity, epoch, top1, images = (_number(line.get(n)) for n in names)
        if line["kind"] == "start" and None not in (alignment, uniformity):
            self.start = Place(alignment, uniformity)
        elif line["kind"] == "metrics" and None not in (alignment, uniformity, epoch):
            self.start = self.start or Place(alignment, uniformity)
            if epoch != self._epoch:
                self._epoch, self._sums, self._lines = epoch, [0.0, 0.0], 0
            self._sums = [self._sums[0] + alignment, self._sums[1] + uniformity]
            self._lines += 1
        elif line["kind"] == "knn" and None not in (top1, images):
            self.knn = Knn(line["step"], top1, int(images))
            if line["step"] == 0:
                self.untrained = self.knn
        elif line["kind"] == "health":
            self.verdict = line.get("verdict")

    def seen(self, epochs: int, step: int, *, steps: int, filled: int = 0) -> Seen | None:
        """What there is to judge by; None where nothing was logged yet."""
        if not self._lines:
            return None
        now = Place(*(total / self._lines for total in self._sums))
        return Seen(self.start, now, epochs, step, steps, filled, self.untrained, self.knn)


def _number(value: object) -> float | None:
    usable = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if usable and math.isfinite(value) else None
