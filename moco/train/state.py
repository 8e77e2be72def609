"""The state of a pretraining run: saved in the background, resumed bit for bit, never lost.

What the next step depends on is in a checkpoint: both encoders with buffers, queue and pointer,
optimizer, gradient scaler, position within the epoch, the key shuffle's generator, torch's random
state of every rank, and the running means that the next line of the log is made of. The order of
samples and their augmentation need no state: they are functions of (seed, epoch, index, view).
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import torch

from moco import checkpoint, distributed
from moco.builder import MoCo
from moco.encoders import head_name
from moco.errors import CheckpointError
from moco.log import Means
from moco.train.step import fill_momentum


@dataclass
class Run:
    """What changes while training."""

    moco: MoCo
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    means: Means
    epoch: int = 0  # finished epochs
    step_in_epoch: int = 0
    step: int = 0  # optimizer steps since the start of the run
    skipped: int = 0  # steps that the fp16 scaler left out
    skipped_in_a_row: int = 0

    def state(self, args: dict) -> dict:
        """The checkpoint; on every rank, because random states are gathered."""
        device = self.moco.queue.device
        rng = distributed.all_gather(torch.get_rng_state().unsqueeze(0).to(device)).cpu()
        cuda_rng = None
        if device.type == "cuda":
            mine = torch.cuda.get_rng_state(device).unsqueeze(0).to(device)
            cuda_rng = distributed.all_gather(mine).cpu()
        return {
            "version": checkpoint.FORMAT_VERSION,
            "arch": args["arch"],
            "epoch": self.epoch,
            "step": self.step,
            "step_in_epoch": self.step_in_epoch,
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
            "state_dict": {f"module.{name}": t for name, t in self.moco.state_dict().items()},
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict() if self.scaler.is_enabled() else None,
            "shuffle_generator": self.moco.shuffle_generator.get_state(),
            "rng": rng,
            "cuda_rng": cuda_rng,
            "means": self.means.state(),
            "args": args,
        }

    def load(self, content: dict, path: str, steps_per_epoch: int) -> None:
        """Continue from a checkpoint, this project's or upstream MoCo's; says what it cannot carry.

        Args:
            content: as read from `path`.
            steps_per_epoch: of the run that goes on.

        Raises:
            CheckpointError: it is no pretraining checkpoint or does not fit.
        """
        checkpoint.require_keys(content, ("arch", "epoch", "state_dict", "optimizer"), path)
        state = {name.removeprefix("module."): t for name, t in content["state_dict"].items()}
        state = OrderedDict(state)
        state._metadata = self.moco.state_dict()._metadata  # versions of modules, for some archs
        state.pop("scalar_label", None)  # of moco_align_uniform's InfoNCE runs; always 0
        chosen = [
            {name: group[name] for name in ("momentum", "weight_decay", "fused", "foreach")}
            for group in self.optimizer.param_groups
        ]
        try:
            self.moco.load_state_dict(state)
            self.optimizer.load_state_dict(content["optimizer"])
            for group, values in zip(self.optimizer.param_groups, chosen, strict=True):
                group.update(values)  # else --allow-changes would change nothing
            fill_momentum(self.optimizer)
            if self.scaler.is_enabled() and content.get("scaler"):
                self.scaler.load_state_dict(content["scaler"])
            self.epoch = int(content["epoch"])
            self.step_in_epoch = int(content.get("step_in_epoch", 0))
            self.step = self.epoch * steps_per_epoch + self.step_in_epoch
            self.skipped = int(content.get("skipped", 0))
            self.skipped_in_a_row = int(content.get("skipped_in_a_row", 0))
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
        if "shuffle_generator" not in content:
            distributed.print_main(
                "  it is not of this project: the order of samples, the key shuffle and all random "
                "states start anew; weights, queue and optimizer go on"
            )
            return
        self.moco.shuffle_generator.set_state(content["shuffle_generator"])
        self.means.load(content["means"])
        ranks, here = len(content["rng"]), distributed.world_size()
        if ranks != here:
            distributed.print_main(
                f"  it was written by {ranks} process(es), this run has {here}: every sample of "
                "the epoch is seen as before, but sums run in another order, so not bit for bit"
            )
            return
        # Copies: given a row of a matrix, torch crashes.
        torch.set_rng_state(content["rng"][distributed.rank()].clone())
        device = self.moco.queue.device
        if device.type == "cuda" and content["cuda_rng"] is not None:
            torch.cuda.set_rng_state(content["cuda_rng"][distributed.rank()].clone(), device)


# ------------------------------------------------------------------------------------------------
# Weights to start from
# ------------------------------------------------------------------------------------------------


def init_from(moco: MoCo, path: str, arch: str) -> str:
    """Start both encoders from the weights in a file; what was found, for people to read.

    Of a MoCo file the query encoder is taken, with its projection head where that fits; of others
    the backbone. The key encoder becomes a copy. Queue, optimizer and epoch are those of a new run.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: it holds no encoder, or another one than `arch`.
    """
    encoder, info = checkpoint.load_encoder(path)
    head = "starts from random weights"
    own = moco.encoder_q.state_dict()
    if info["layout"] == "moco" and info["head"] != "none":
        with_head, _ = checkpoint.load_encoder(path, head="projection")
        if _shapes(with_head.state_dict()) == _shapes(own):
            encoder, head = with_head, "is the file's"
        else:
            head += f": the file's ({info['head']}) has another shape"
    found = encoder.state_dict()
    last = f"{head_name(moco.encoder_q)}."
    wanted = {name: t for name, t in own.items() if not name.startswith(last)}
    if _shapes({name: t for name, t in found.items() if not name.startswith(last)}) != _shapes(
        wanted
    ):
        raise CheckpointError(
            f"--init-from: {path} holds a {info['arch']}"
            + (" with the small stem" if info["small_stem"] else "")
            + f", whose weights do not fit this run's {arch}; give the --arch, stem and image size "
            "that it was trained with"
        )
    moco.encoder_q.load_state_dict({**own, **found})
    moco.encoder_k.load_state_dict(moco.encoder_q.state_dict())
    return f"{path} ({info['layout']} file of {info['arch']}); the projection head {head}"


def _shapes(state: dict) -> dict[str, tuple]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


# ------------------------------------------------------------------------------------------------
# Saving
# ------------------------------------------------------------------------------------------------


class BackgroundWriter:
    """Writes checkpoints in a thread, one at a time, from a copy in host memory.

    Training waits for the copy only. An error of the thread is raised by the next call, so that
    training never goes on as if a file had been saved.
    """

    def __init__(self, folder: Path, *, keep_last: int, keep_every: int) -> None:
        self.folder, self.keep_last, self.keep_every = folder, keep_last, keep_every
        self.thread: threading.Thread | None = None
        self.error: Exception | None = None
        self.waited = 0.0  # seconds that training has spent here

    def write(self, path: Path, content: dict) -> None:
        """Start writing; waits for the previous file first."""
        started = time.perf_counter()
        self.finish()
        copy = checkpoint.to_host(content)
        self.thread = threading.Thread(target=self._write, args=(path, copy), daemon=False)
        self.thread.start()
        self.waited += time.perf_counter() - started

    def failed(self) -> bool:
        """Whether the file being written, or the last one, could not be written."""
        return self.error is not None

    def finish(self) -> None:
        """Wait for the file being written.

        Raises:
            CheckpointError: it could not be written (disk full, folder gone or read-only).
        """
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        if self.error is not None:
            left = checkpoint.run_checkpoints(self.folder)
            raise CheckpointError(
                f"could not save in {self.folder}: {self.error}; training stops, the last good "
                f"checkpoint is {left[-1].name if left else 'none'}"
            ) from self.error

    def _write(self, path: Path, content: dict) -> None:
        try:
            checkpoint.write_checkpoint(path, content)
            checkpoint.prune_checkpoints(
                self.folder, keep_last=self.keep_last, keep_every=self.keep_every
            )
        except Exception as error:  # whatever it is, training must hear of it
            self.error = error
