"""What stops a run, and what it warns of: requests to end, numbers that are not finite, ranks that
drift apart, features that collapse, images that cannot be read.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import nn

from moco import checkpoint, distributed
from moco.builder import MoCo, MoCoLosses
from moco.log import RunLog
from moco.run import BackgroundWriter, Run


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why and what is left on disk."""


class StopRequest:
    """SIGTERM and SIGUSR1 ask this process to finish the step, save and end."""

    def __init__(self) -> None:
        self.name: str | None = None
        for number in distributed.STOP_SIGNALS:
            signal.signal(number, self._note)

    def _note(self, number: int, _) -> None:
        self.name = signal.Signals(number).name

    @property
    def requested(self) -> bool:
        return self.name is not None


@contextlib.contextmanager
def failure_names_the_step(run: Run) -> Iterator[None]:
    """A collective that fails (a rank was killed, or has hung) ends in an error that says when, and
    which rank does not answer."""
    try:
        yield
    except RuntimeError as error:
        if not distributed.is_communication_error(error):
            raise
        silent = ", ".join(map(str, distributed.silent_ranks()))
        raise TrainingError(
            f"rank {distributed.rank()} could not talk to the others in epoch {run.epoch}, "
            f"step {run.step}"
            + (f"; no answer from rank {silent}" if silent else "")
            + f": {' '.join(str(error).split())[:300]}; go on with --resume auto"
        ) from error


def finish_saving(writer: BackgroundWriter, device: torch.device) -> None:
    """Wait until the last file is on disk; all ranks stop when rank 0 could not write it."""
    error = None
    try:
        writer.finish()
    except checkpoint.CheckpointError as caught:
        error = caught
    (failed,) = distributed.any_rank(error is not None, device=device)
    if failed:
        raise error or TrainingError("rank 0 could not save; training stops")


def gradient_norm(module: nn.Module) -> torch.Tensor:
    """Euclidean norm of all gradients, on the device; the same on all ranks after averaging."""
    return nn.utils.get_total_norm([p.grad for p in module.parameters() if p.grad is not None])


def handle_not_finite(
    run: Run,
    losses: MoCoLosses,
    norm: torch.Tensor,
    epoch: int,
    bad_loss: bool,
    writer: BackgroundWriter,
    max_overflows: int,
) -> None:
    """All ranks are here together, and the optimizer has not stepped. An overflow of scaled fp16
    gradients is passed over (the scaler leaves the step out); anything else stops the run."""
    if run.scaler.is_enabled() and not bad_loss:
        run.skipped += 1
        run.skipped_in_a_row += 1
        if run.skipped_in_a_row <= max_overflows:
            return
    # What each rank saw, for the message.
    mine = torch.stack([value.detach().double() for _, value in losses.items()]).unsqueeze(0)
    by_rank = distributed.all_gather(mine)  # (W, terms)
    names = [name for name, _ in losses.items()]
    guilty = [
        f"{names[term]} {by_rank[rank, term].item():g} on rank {rank}"
        for rank, term in (~by_rank.isfinite()).nonzero().tolist()
    ]
    guilty = guilty or [f"gradient norm {norm.item():g}, all loss terms are finite"]
    writer.finish()
    left = checkpoint.run_checkpoints(writer.folder)
    raise TrainingError(
        f"not finite in epoch {epoch}, step {run.step}: {'; '.join(guilty)}"
        + (f" ({run.skipped_in_a_row} steps in a row)" if run.skipped_in_a_row else "")
        + f". The last checkpoint is {left[-1] if left else 'none yet'}. "
        "Lower --lr, add --warmup-epochs, or use --amp bf16 instead of fp16"
    )


def stop_if_ranks_differ(moco: MoCo, step: int) -> None:
    """Queue, pointer and weights are equal on all ranks by construction; prove it now and then."""
    tensors = [*moco.parameters(), moco.queue.t(), moco.queue_ptr]
    differing = distributed.ranks_that_differ(tensors)
    if differing:
        raise TrainingError(
            f"after step {step} the weights or the queue of rank "
            f"{', '.join(map(str, differing))} are not those of rank 0: a fault of hardware or "
            "software on one of them; go on from the last checkpoint with --resume auto"
        )


class CollapseAlarm:
    """Warns when features have been nearly one point for a number of steps."""

    LEAST_STD = 0.1  # of the per-dimension deviation times sqrt(C): 1 when uniform, 0 collapsed

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.since: int | None = None

    def check(self, losses: MoCoLosses, step: int, log: RunLog) -> None:
        spread = losses.feature_std().item()
        log.scalars("features", step, {"std": spread})
        if spread >= self.LEAST_STD:
            self.since = None
            return
        self.since = step if self.since is None else self.since
        if self.steps and step - self.since >= self.steps:
            distributed.print_main(
                f"warning: features have collapsed since step {self.since}: deviation {spread:.3f} "
                "of 1 per dimension. Raise --moco-unif-w or --moco-unif-t, or lower --lr"
            )
            log.scalars("warning", step, {"collapsed_since": self.since})
            self.since = step  # again after as many steps


class BadImages:
    """List of replaced images in the run folder; stops when too many cannot be read."""

    def __init__(self, folder: Path, images: int, most: float) -> None:
        self.path, self.images, self.most = folder / "bad_images.txt", images, most
        self.seen = self._listed()  # by this run before it was cut off

    def note(self, replaced: Sequence[str]) -> None:
        """Args: replaced: for each sample the paths that could not be read, one per line."""
        new = {path for paths in replaced for path in paths.splitlines()} - self.seen
        if not new:
            return
        new -= self._listed()  # by other ranks
        self.seen |= new | self._listed()
        with open(self.path, "a", encoding="utf-8") as file:  # ranks append whole lines
            file.write("".join(f"{path}\n" for path in sorted(new)))
        if len(self.seen) > self.most * self.images:
            raise TrainingError(
                f"{len(self.seen)} of {self.images} images cannot be read, more than "
                f"--max-bad-share {self.most:g}; see {self.path}"
            )

    def _listed(self) -> set[str]:
        if not self.path.is_file():
            return set()
        return set(self.path.read_text(encoding="utf-8").splitlines())
