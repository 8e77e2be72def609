"""What is due after a step: a pure function of the position in the run."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class Due:
    """What is to be done after one step, all of it decided before the first of it is done."""

    log: bool = False  # print and log the means since the last time
    agree: bool = False  # look at the numbers of the steps, on all ranks together
    compare_ranks: bool = False  # prove that ranks hold equal weights
    epoch_end: bool = False
    save: bool = False
    evaluate: bool = False
    ended: bool = False  # no step follows
    stopped: bool = False  # ended because somebody asked for it

    def extended(self, *, stop: bool, save: bool = False) -> Due:
        """With what ranks have agreed on; a stop saves, and leaves the evaluation for later."""
        return replace(
            self,
            save=self.save or save or stop,
            evaluate=self.evaluate and not stop,
            ended=self.ended or stop,
            stopped=self.stopped or stop,
        )


@dataclass(frozen=True)
class Rhythm:
    """How often things are due, in steps; 0 is never.

    Attributes:
        total_steps: at which step the run ends.
        evaluate: in epochs; evaluate_steps: in steps.
    """

    steps_per_epoch: int
    total_steps: int
    log: int
    save: int
    compare_ranks: int
    evaluate: int
    evaluate_steps: int = 0


def due(step: int, step_in_epoch: int, epoch: int, rhythm: Rhythm, look_at: int) -> Due:
    """What is due once `step` steps of the run are done.

    Args:
        step: steps since the start of the run.
        step_in_epoch: steps of this epoch, 1 to steps_per_epoch.
        epoch: finished epochs, this one not counted.
        look_at: the step by which ranks look at the numbers of the steps (`moco.looks`); they do
            before each line and each save as well.
    """
    ended = step >= rhythm.total_steps
    epoch_end = step_in_epoch == rhythm.steps_per_epoch
    log = ended or _every(rhythm.log, step)
    evaluate = evaluation_due(step, epoch + 1 if epoch_end else None, rhythm)
    save = ended or epoch_end or evaluate or _every(rhythm.save, step)
    return Due(
        log=log,
        agree=log or save or step >= look_at,
        compare_ranks=_every(rhythm.compare_ranks, step),
        epoch_end=epoch_end,
        save=save,
        evaluate=evaluate,
        ended=ended,
    )


def evaluation_due(step: int, epochs: int | None, rhythm: Rhythm) -> bool:
    """At the end of the run, of every `rhythm.evaluate`-th epoch, and every
    `rhythm.evaluate_steps` steps.

    Args:
        epochs: finished epochs; None within one.
    """
    if not (rhythm.evaluate or rhythm.evaluate_steps):
        return False
    whole = epochs is not None and epochs > 0
    return (
        step >= rhythm.total_steps
        or (whole and _every(rhythm.evaluate, epochs))
        or (step > 0 and _every(rhythm.evaluate_steps, step))
    )


def _every(steps: int, step: int) -> bool:
    return bool(steps) and step % steps == 0


@dataclass
class Stopwatch:
    """Minutes since the last save (--save-minutes)."""

    minutes: float
    last: float = field(default_factory=time.monotonic)

    def rings(self) -> bool:
        return bool(self.minutes) and time.monotonic() - self.last > 60 * self.minutes

    def restart(self) -> None:
        self.last = time.monotonic()
