"""The black box: what led to a step that went wrong, in the run folder, so that it can be rerun.

At looks at the numbers (`moco.looks`: on a CPU after every step, on a GPU about every second) a
copy of the state stays on the device; of a large one on a CPU at every tenth. When a step turns out
not to be finite, to be a spike or to have collapsed features, the copy from before it is written to
`RUN/failed`. Order, views and key shuffle are functions of the seed and of that state:
`moco.train.replay` sees the same step again.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moco import checkpoint, distributed
from moco.run_files import FAILED, FAILED_ABOUT, FAILED_STATE, write_json
from moco.train.state import TrainState

# Bytes that are copied in some milliseconds; of a ResNet-18 it would be a tenth of a small step.
CHEAP = 2**24


class BlackBox:
    """A copy of the state at the last look, and the file that is made of it.

    Args:
        state: of the run; its tensors keep their places while it trains.
        flat: flat values of the config and of the data, as a checkpoint keeps them.
        run: the run folder.
    """

    def __init__(self, state: TrainState, flat: dict[str, Any], run: Path) -> None:
        self.state, self.flat, self.folder = state, flat, run / FAILED
        self._momenta = -1  # parameters that the optimizer holds something of
        self.keep()
        size = sum(tensor.nbytes for tensor in self._tensors)
        self._every = 10 if state.device.type == "cpu" and size > CHEAP else 1

    def keep_after(self, step: int) -> None:
        """Copy the state after a step that was looked at, where a copy is due."""
        if step % self._every == 0:
            self.keep()

    @torch.no_grad()
    def keep(self) -> None:
        """Copy the state as it is now; the steps until here were good."""
        if len(self.state.optimizer.state) != self._momenta:  # some make it in their first step
            self._momenta = len(self.state.optimizer.state)
            self._tensors = _tensors(self.state)
            self._kept = [torch.empty_like(tensor) for tensor in self._tensors]
        torch._foreach_copy_(self._kept, self._tensors)
        self._rest = self.state.position()

    def write(self, kind: str, epoch: int, step: int, text: str) -> Path | None:
        """Write the state from before a step to `RUN/failed`; on all ranks together.

        Args:
            kind: "not finite", "spike" or "collapse".
            epoch, step: finished epochs and steps before the step that went wrong.
            text: what was seen, for people.

        Returns:
            The folder; None where it could not be written, which a line says.
        """
        with self._rewound():
            about = {"kind": kind, "epoch": epoch, "step": step, "text": text}
            about["kept_at_step"] = self.state.step
            content = {**self.state.content(self.flat), "failed": about}
            if self.state.step == step:  # momentum matters to later steps only
                content["optimizer"] = {**content["optimizer"], "state": {}}
            content = checkpoint.to_host(content) if distributed.is_main() else None
        written = content is None or self._write(content)
        return self.folder if distributed.broadcast_object(written) else None

    def _write(self, content: dict) -> bool:
        try:
            self.folder.mkdir(exist_ok=True)
            checkpoint.write_checkpoint(self.folder / FAILED_STATE, content)
            write_json(self.folder / FAILED_ABOUT, content["failed"])
        except OSError as error:
            print(f"warning: could not write {self.folder}: {error}", flush=True)
            return False
        return True

    @contextlib.contextmanager
    def _rewound(self) -> Iterator[None]:
        """The run's own tensors hold what was kept, so that one function makes all checkpoints."""
        tensors = [tensor.detach().clone() for tensor in self._tensors]
        rest = self.state.position()
        self._put(self._kept, self._rest)
        try:
            yield
        finally:
            self._put(tensors, rest)

    @torch.no_grad()
    def _put(self, tensors: list[Tensor], rest: dict[str, Any]) -> None:
        torch._foreach_copy_(self._tensors, tensors)
        self.state.set_position(rest)


def _tensors(state: TrainState) -> list[Tensor]:
    """All that a step changes in place: of the module, and the optimizer's momentum."""
    of_optimizer = [
        value
        for values in state.optimizer.state.values()
        for value in values.values()
        if isinstance(value, Tensor)
    ]
    return [*(t.detach() for t in state.module.state_dict().values()), *of_optimizer]


class SpikeAlarm:
    """Whether a loss is far above the ones before it.

    Mean and deviation are those of about the last `STEPS` losses. After a spike they start anew, so
    that there is one alarm in as many steps at most.
    """

    STEPS, DEVIATIONS = 100, 10.0
    LEAST = 0.1  # and as a share of the mean: a loss that hardly moves has next to no deviation

    def __init__(self) -> None:
        self.count, self.mean, self.variance = 0, 0.0, 0.0

    def rings(self, loss: float) -> bool:
        """Take the loss of the next step, a finite number."""
        off = loss - self.mean
        far = max(self.DEVIATIONS * math.sqrt(self.variance), self.LEAST * max(1.0, abs(self.mean)))
        if self.count >= self.STEPS and off > far:
            self.__init__()
            return True
        self.count += 1
        share = 1 / min(self.count, self.STEPS)
        self.mean += share * off
        self.variance = (1 - share) * (self.variance + share * off**2)
        return False
