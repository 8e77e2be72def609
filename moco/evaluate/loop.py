"""The training loop of evaluations: epochs, steps, learning rate, requests to stop."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import torch

from moco import distributed
from moco.looks import Looks, looking_waits
from moco.progress import StepPrinter
from moco.schedule import learning_rate
from moco.stop import AgreedStop, StopRequest
from moco.timing import synchronize


class Schedule(Protocol):
    """How long, and after which epochs the learning rate drops by which factor."""

    epochs: int
    schedule: tuple[int, ...]
    schedule_factor: float


class EvaluationLoop(ABC):
    """One training of what an evaluation learns, from any step of an epoch; a subclass says what a
    step is.

    Args:
        steps: of an epoch.
        batch_size: over all ranks.
        stop: what is asked of this process.
        folder: the run folder, for messages.
        where: which of several trainings this is, for messages: "fold 1 of 3, ".
    """

    def __init__(
        self,
        schedule: Schedule,
        steps: int,
        *,
        batch_size: int,
        device: torch.device,
        stop: StopRequest,
        folder: Path,
        where: str = "",
    ) -> None:
        self.schedule, self.epochs, self.steps = schedule, schedule.epochs, steps
        self.batch_size, self.device, self.stop = batch_size, device, stop
        self.folder, self.where = folder, where

    def train(self, first: int, done: int) -> None:
        """Train to the end, from the epoch `first` on, in which `done` steps are done.

        A request to stop ends the process, with its exit status, once the step is done and saved.
        """
        step = first * self.steps + done
        total = self.epochs * self.steps
        self.printer = StepPrinter(total=total, batch_size=self.batch_size, done=step)
        # A single process looks at its own flag, without a wait.
        waits = distributed.world_size() > 1 and looking_waits(self.device)
        self.looks = Looks(step, waits=waits)
        for epoch in range(first, self.epochs):
            self._train_epoch(epoch, done if epoch == first else 0)
            self.end_epoch(epoch)
            if epoch + 1 < self.epochs or self.stops_at_the_end:
                self._stop_if_asked(epoch, self.steps)
        self.printer.close()

    def _train_epoch(self, epoch: int, done: int) -> None:
        schedule = self.schedule
        factor = learning_rate(
            epoch,
            base=1.0,
            epochs=self.epochs,
            milestones=schedule.schedule,
            factor=schedule.schedule_factor,
        )
        self.begin_epoch(factor)
        batches = self.printer.batches(self.batches(epoch, done))
        for step, batch in enumerate(batches, start=done + 1):
            self.step(batch)
            self.printer.advance()
            self.report(epoch, step)
            if step < self.steps:
                self._stop_if_asked(epoch, step)

    def _stop_if_asked(self, epoch: int, step: int) -> None:
        """Save and end, on all ranks together, which look for that about every second."""
        done = epoch * self.steps + step
        if done < self.looks.next and step != self.steps:
            return
        if self.looks.waits:
            synchronize(self.device)
        if not self.looks.together(done, self.stop.requested, device=self.device)[0]:
            return
        self.check(epoch, step)
        if distributed.is_main():
            self.save(*((epoch, step) if step < self.steps else (epoch + 1, 0)))
        self.printer.close()
        distributed.print_main(
            f"stopped by {self.stop.name or 'a signal to another rank'} in {self.where}epoch "
            f"{epoch}, after step {step}; go on with --save-dir {self.folder} --resume auto"
        )
        raise AgreedStop(self.stop.exit_status)

    # ---- what a subclass gives

    stops_at_the_end = False  # another training follows, before which a stop is looked for

    @abstractmethod
    def batches(self, epoch: int, start: int) -> Iterable:
        """Those of an epoch, from the step `start` on."""

    @abstractmethod
    def begin_epoch(self, factor: float) -> None:
        """Set learning rates to `factor` times the first ones, and modules to training."""

    @abstractmethod
    def step(self, batch: Any) -> None:
        """One step of the optimizer."""

    @abstractmethod
    def report(self, epoch: int, step: int) -> None:
        """Print and log, where that is due after a step."""

    @abstractmethod
    def check(self, epoch: int, step: int) -> None:
        """Raise TrainingError where a loss was not finite, so that no NaN is saved."""

    @abstractmethod
    def end_epoch(self, epoch: int) -> None:
        """Evaluate and save, where that is due."""

    @abstractmethod
    def save(self, epochs: int, step: int) -> None:
        """Save what goes on after so many epochs, and steps of the next one; on rank 0."""
