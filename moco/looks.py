"""When ranks look together whether to stop or to save: about every second, all in the same step."""

from __future__ import annotations

import time

import torch

from moco import distributed


def looking_waits(device: torch.device) -> bool:
    """Whether to look is to wait for the device, so that steps have to go by between looks."""
    return device.type != "cpu"


class Looks:
    """The step after which all ranks look next, however often lines are printed.

    After every step where a look costs nothing. Else rank 0 says at each look how many of its steps
    fit into `seconds`: one where a step takes longer, at most twice as many as before, so that a
    first step (which compiles, or chooses kernels) or a stalled disk does not mislead for long.

    Attributes:
        next: look after this step of the run.
    """

    seconds = 1.0

    def __init__(self, step: int, *, waits: bool) -> None:
        """
        Args:
            step: steps done when the run starts or goes on.
            waits: what `looking_waits` says of the device.
        """
        self.waits = waits
        self._ahead = 1
        self.time_from(step)
        self.next = step + self.steps_ahead(step)

    def time_from(self, step: int) -> None:
        """Time the steps after `step` from now on: saving and evaluating are no part of a step."""
        self._from, self._since = step, time.monotonic()

    def steps_ahead(self, step: int) -> int:
        """How many steps from here this process would look again."""
        done = step - self._from
        if not self.waits or not done:
            return 1
        pace = (time.monotonic() - self._since) / done
        most = 2 * self._ahead
        return most if pace * most <= self.seconds else max(1, int(self.seconds / pace))

    def together(self, step: int, *flags: bool, device: torch.device) -> list[bool]:
        """Look: for each flag whether it is set on any rank. On all ranks, once the device has
        finished `step`."""
        mine = self.steps_ahead(step) if distributed.is_main() else 0
        *counts, ahead = distributed.sum_numbers(*map(float, flags), float(mine), device=device)
        self._ahead = int(ahead)
        self.next = step + self._ahead
        self.time_from(step)
        return [bool(count) for count in counts]
