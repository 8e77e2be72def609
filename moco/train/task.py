"""What the engine asks of a task. `moco.tasks` says how to write one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from moco.errors import CheckpointError
from moco.log import RunLog
from moco.train.optimizer import fused_sgd


@dataclass(frozen=True)
class Needs:
    """What a step of one process needs.

    Attributes:
        state: bytes of what a checkpoint holds: weights, momentum, buffers.
        step: bytes beside that, at the peak.
        operations: names of all that is called, as "aten::relu".
    """

    state: int
    step: int
    operations: frozenset[str]

    def memory(self, device: torch.device) -> int:
        """Bytes at the peak: there is also the copy of the black box, and in main memory the one
        that is being saved."""
        return self.step + self.state * (3 if device.type == "cpu" else 2)


class Losses(Protocol):
    """The losses of one step on this rank."""

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """(name, scalar) of each term, for the log."""


class TrainData(Protocol):
    """Batches of one epoch after another, each rank its share."""

    steps_per_epoch: int
    facts: dict[str, Any]  # flat values that are found in the data, kept in checkpoints

    def set_epoch(self, epoch: int, start: int) -> None:
        """Select the epoch, and the first batch within it."""

    def __iter__(self) -> Iterator[Any]: ...

    def end(self) -> None:
        """End loader processes."""


class Evaluation(Protocol):
    """An evaluation of the module while it trains, on all ranks together."""

    enabled: bool

    def measure(self, epoch: int, step: int) -> bool:
        """Measure and log; returns whether any rank was asked to stop meanwhile."""


class Task(ABC):
    """Data, module and losses of a method. The engine (`moco.train.loop`) does the rest.

    Args:
        config: frozen, with the parts data, optim, schedule, speed, saving, watching, launch and
            placement, and `to_flat()`.
    """

    evaluation_kind = "knn"  # of the log's lines that an evaluation writes
    evaluates_untrained = False  # whether an evaluation comes before the first step too
    unit = "images"  # what a batch has so many of
    max_grad_norm: float | None = None  # longer gradients are shortened to it
    collapse_remedy = "Raise --moco-unif-w or --moco-unif-t, or lower --lr"

    def __init__(self, config: Any) -> None:
        self.config = config

    # ---- what a task must give

    @abstractmethod
    def build_data(self, device: torch.device) -> TrainData:
        """The batches of this rank, for views on `device`."""

    @abstractmethod
    def build_module(self) -> nn.Module:
        """The module to train, on the CPU, its weights drawn from torch's generator."""

    @abstractmethod
    def losses(self, model: nn.Module, batch: Any, part: int, parts: int) -> Losses:
        """The losses of part number `part` of a batch; `model` is the module, or the
        data-parallel module around it."""

    @abstractmethod
    def total(self, losses: Losses) -> Tensor:
        """The scalar to minimise."""

    # ---- what has a default

    def build_optimizer(self, module: nn.Module) -> torch.optim.Optimizer:
        """One that leaves a step out while its `found_inf` is set, as torch's fused ones do."""
        return fused_sgd(module, self.config.optim)

    def split(self, batch: Any, parts: int) -> Sequence[Any]:
        """A batch in equal parts along the first axis of its tensors, for --accumulate."""
        chunks = [tensor.chunk(parts) for tensor in batch]
        return list(zip(*chunks, strict=True))

    def mean(self, parts: Sequence[Losses]) -> Losses:
        """The losses of a step that went through in parts."""
        return type(parts[0]).mean(parts)

    def rehearse(self) -> Needs | None:
        """What a step needs, from shapes alone, before anything is built and without drawing a
        random number; None where nobody has worked that out."""
        return None

    def start_from(self, module: nn.Module, path: str) -> str:
        """Load initial weights (--init-from); returns what was found, for people to read."""
        raise CheckpointError(f"--init-from: {type(self).__name__} starts from random weights only")

    def settle_untrained(self, module: nn.Module, data: TrainData) -> None:
        """Called before the untrained module of --max-steps 0 is saved."""

    def on_device(self, module: nn.Module, device: torch.device) -> None:
        """Called once the module is on its device."""

    def compiled(self, module: nn.Module) -> Sequence[nn.Module]:
        """The parts of the module that --compile compiles, in place."""
        return [module]

    def shared_tensors(self, module: nn.Module) -> list[Tensor]:
        """What must be equal on all ranks after every step."""
        return list(module.parameters())

    def extra_state(self, module: nn.Module) -> dict[str, Any]:
        """What a checkpoint holds beside the module's state dict."""
        return {}

    def load_extra_state(self, module: nn.Module, content: dict) -> None:
        """Restore what `extra_state` gave."""

    def facts(self, module: nn.Module, data: TrainData) -> dict[str, str]:
        """What is trained on what, for the start-up lines."""
        return {}

    def step_values(self, losses: Losses) -> dict[str, Tensor]:
        """More numbers of the latest step for the log's line."""
        return {}

    def metrics(self, losses: Losses) -> dict[str, float]:
        """Numbers of the latest batch that runs of different objectives can be compared by."""
        return {}

    def feature_std(self, losses: Losses) -> Tensor | None:
        """Spread of the features, 1 when uniform and 0 when collapsed, for the collapse alarm."""
        return None

    def histograms(self, losses: Losses) -> dict[str, tuple[Tensor, float, float]]:
        """Distributions at the end of an epoch: name -> (values, least, most)."""
        return {}

    def begin_log(self, log: RunLog, data: TrainData) -> None:
        """Lay out charts and hyperparameters."""

    def show(self, log: RunLog, batch: Any) -> None:
        """Show the very first batch."""

    def queue_filled(self) -> int:
        """The step from which on a queue of keys holds those of images only; 0 without a queue."""
        return 0

    def build_evaluation(self, trainer: Any) -> Evaluation | None:
        """The evaluation, as often as `evaluation_rhythm` says."""
        return None

    def evaluation_rhythm(self) -> tuple[int, int]:
        """Epochs, and steps, from one evaluation to the next, 0 for never; there is one at the end
        of the run unless both are 0."""
        return self.config.watching.knn_every, 0
