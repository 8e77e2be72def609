"""The state of a run: what a checkpoint holds, and how a run goes on from it bit for bit.

What the next step depends on is in a checkpoint: the module with its buffers (of MoCo both
encoders, queue and pointer), optimizer, gradient scaler, position within the epoch, torch's random
state of every rank, the running means that the next line of the log is made of, and what the task
adds (of MoCo the key shuffle's generator). The order of samples and their augmentation need no
state: they are functions of (seed, epoch, index, view).
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moco import checkpoint, distributed
from moco.errors import CheckpointError
from moco.log import Means
from moco.train.optimizer import fill_moments
from moco.train.task import Task

_NUMBERS = ("epoch", "step", "step_in_epoch", "skipped", "skipped_in_a_row")


@dataclass
class TrainState:
    """What changes while training.

    Attributes:
        module: on its device, not wrapped.
        skipped: steps that the fp16 scaler left out; skipped_in_a_row: the latest of them.
    """

    task: Task
    module: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    means: Means
    epoch: int = 0  # finished epochs
    step_in_epoch: int = 0
    step: int = 0  # optimizer steps since the start of the run
    skipped: int = 0
    skipped_in_a_row: int = 0

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    def content(self, args: dict) -> dict:
        """The checkpoint; on every rank, because random states are gathered.

        Args:
            args: flat values of the config and of the data.
        """
        device = self.device
        rng, cuda_rng = (
            mine if mine is None else distributed.all_gather(mine.unsqueeze(0).to(device)).cpu()
            for mine in self._random_states()
        )
        return {
            "version": checkpoint.FORMAT_VERSION,
            "arch": args["arch"],
            **self._numbers(),
            "state_dict": {f"module.{name}": t for name, t in self.module.state_dict().items()},
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict() if self.scaler.is_enabled() else None,
            "rng": rng,
            "cuda_rng": cuda_rng,
            "means": self.means.state(),
            "args": args,
            **self.task.extra_state(self.module),
        }

    def position(self) -> dict[str, Any]:
        """All that changes beside the tensors of module and optimizer, on this rank, as a copy."""
        return {
            "numbers": self._numbers(),
            "scaler": self.scaler.state_dict(),
            "means": self.means.state(),
            "random": self._random_states(),
            "extra": self.task.extra_state(self.module),
        }

    def set_position(self, position: dict[str, Any]) -> None:
        """Go to where `position` was asked for."""
        for name, value in position["numbers"].items():
            setattr(self, name, value)
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(position["scaler"])
        self.means.load(position["means"])
        self._set_random_states(*position["random"])
        self.task.load_extra_state(self.module, position["extra"])

    def _numbers(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in _NUMBERS}

    def _random_states(self) -> tuple[Tensor, Tensor | None]:
        """Of torch's generators: the CPU's, and that of a GPU."""
        device = self.device
        cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        return torch.get_rng_state(), cuda

    def _set_random_states(self, cpu: Tensor, cuda: Tensor | None) -> None:
        torch.set_rng_state(cpu)
        if cuda is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(cuda, self.device)

    def restore(self, content: dict, path: str, steps_per_epoch: int) -> None:
        """Restore a checkpoint, this project's or upstream MoCo's; prints what upstream's lacks.

        Args:
            content: as read from `path`.
            steps_per_epoch: of the run that goes on.

        Raises:
            CheckpointError: it is no pretraining checkpoint or does not fit.
        """
        checkpoint.require_keys(content, ("arch", "epoch", "state_dict", "optimizer"), path)
        if "pretrained_epochs" in content:
            raise CheckpointError(
                f"{path} is a checkpoint of main_lincls.py, expected one of main_moco.py; to start "
                f"from its encoder give --init-from {path}, to go on with the evaluation give it "
                "to main_lincls.py --resume"
            )
        saved = content["state_dict"].items()
        state = OrderedDict((name.removeprefix("module."), t) for name, t in saved)
        state._metadata = self.module.state_dict()._metadata  # versions of modules, for some archs
        state.pop("scalar_label", None)  # of moco_align_uniform's InfoNCE runs; always 0
        chosen = [
            {name: value for name, value in group.items() if name not in ("params", "lr")}
            for group in self.optimizer.param_groups
        ]
        try:
            self.module.load_state_dict(state)
            self.optimizer.load_state_dict(content["optimizer"])
            for group, values in zip(self.optimizer.param_groups, chosen, strict=True):
                group.update(values)  # else --allow-changes would change nothing
            fill_moments(self.optimizer)
            if self.scaler.is_enabled() and content.get("scaler"):
                self.scaler.load_state_dict(content["scaler"])
            for name in set(_NUMBERS) - {"step"}:  # which another batch size counts anew
                setattr(self, name, int(content.get(name, 0)))
            self.step = self.epoch * steps_per_epoch + self.step_in_epoch
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            reason = " ".join(str(error).split())
            raise CheckpointError(f"{path} does not fit these arguments: {reason[:400]}") from error
        distributed.print_main(
            f"resuming {path}: {self.epoch} epochs and {self.step_in_epoch} steps done"
        )
        if not 0 <= self.step_in_epoch < max(1, steps_per_epoch):
            raise CheckpointError(
                f"{path} stands at step {self.step_in_epoch} of an epoch, which has "
                f"{steps_per_epoch} steps with these arguments"
            )
        if "rng" not in content:
            distributed.print_main(
                "  it is not of this project: the order of samples, the key shuffle and all random "
                "states start anew; weights, queue and optimizer go on"
            )
            return
        self.task.load_extra_state(self.module, content)
        self.means.load(content["means"])
        ranks, here = len(content["rng"]), distributed.world_size()
        if ranks != here:
            distributed.print_main(
                f"  it was written by {ranks} process(es), this run has {here}: every sample of "
                "the epoch is seen as before, but sums run in another order, so not bit for bit"
            )
            return
        # Copies: set_rng_state crashes on a view of the gathered matrix (torch 2.15).
        of_ranks = content["rng"], content["cuda_rng"]
        mine = (x if x is None else x[distributed.rank()].clone() for x in of_ranks)
        self._set_random_states(*mine)
