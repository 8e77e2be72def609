"""What stops a run, and what it warns of: requests to end, numbers that are not finite, ranks that
drift apart, features that collapse, images that cannot be read.
"""

from __future__ import annotations

import contextlib
import math
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from moco import checkpoint, distributed
from moco.builder import MoCo, MoCoLosses
from moco.errors import CheckpointError, TrainingError
from moco.log import RunLog
from moco.profiling import label
from moco.train.state import BackgroundWriter, Run


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
    except CheckpointError as caught:
        error = caught
    (failed,) = distributed.any_rank(error is not None, device=device)
    if failed:
        raise error or TrainingError("rank 0 could not save; training stops")


def gradient_norm(module: nn.Module) -> Tensor:
    """Euclidean norm of all gradients, on the device; the same on all ranks after averaging."""
    return nn.utils.get_total_norm([p.grad for p in module.parameters() if p.grad is not None])


def steps_between_checks(device: torch.device, print_freq: int) -> int:
    """How often the host looks at the numbers of the steps, and ranks agree on whether to go on.

    On the CPU after every step. A GPU would have to be waited for, so there only when a line is
    printed anyway (and before every save); `StepGuard` keeps the weights until then.
    """
    return 1 if device.type == "cpu" else print_freq


class StepGuard:
    """No number that is not finite gets into the weights, and no step waits for that.

    The device itself leaves steps out: once a rank's loss is not finite, that rank multiplies all
    it differentiates by NaN; averaging carries the NaN into every gradient on every rank; and the
    fused optimizer does nothing while `found_inf` is set, which it is when the norm of the
    gradients is not finite. The host hears of it at the next `check`, and stops the run there.
    An overflow of scaled fp16 gradients alone is passed over: the scaler leaves that step out.
    """

    def __init__(self, run: Run, writer: BackgroundWriter, max_overflows: int) -> None:
        self.run, self.writer, self.max_overflows = run, writer, max_overflows
        self.device = run.moco.queue.device
        self.failed = torch.zeros((), dtype=torch.bool, device=self.device)
        # Since the last check: (epoch, step, names, their values on the device).
        self.noted: list[tuple[int, int, list[str], Tensor]] = []

    def backward(self, loss: Tensor) -> None:
        """Gradients of `loss`, NaN when it, or an earlier one, is not finite."""
        self.failed |= ~loss.detach().isfinite()
        factor = torch.where(self.failed, torch.nan, 1.0)
        self.run.scaler.scale(loss * factor).backward()

    def step(self, losses: MoCoLosses, loss: Tensor, epoch: int) -> None:
        """Step the optimizer if all is finite, and note the numbers for `check`."""
        run = self.run
        with label("optimizer"):
            run.scaler.unscale_(run.optimizer)
            norm = gradient_norm(run.moco.encoder_q)
            if not run.scaler.is_enabled():  # which would find out by itself, and adapt its scale
                overflow = ~norm.isfinite()
                self.failed |= overflow
                run.optimizer.found_inf = overflow.float()
            run.scaler.step(run.optimizer)
            run.scaler.update()
        names = [name for name, _ in losses.items()]
        values = [norm, loss, *(value for _, value in losses.items())]
        values = torch.stack([value.detach().double() for value in values])
        self.noted.append((epoch, run.step, names, values))

    def check(self, stopping: bool, save_now: bool) -> tuple[bool, bool]:
        """Look at all steps since the last check, on all ranks together, and add their numbers to
        the run's means. The device is waited for.

        Args:
            stopping, save_now: whether this rank wants to stop, or to save.

        Returns:
            Whether any rank wants to stop, and whether any wants to save.

        Raises:
            TrainingError: a step was not finite (the first one is named, and no optimizer has
                stepped since), too many fp16 overflows in a row, or rank 0 could not save.
        """
        rows = torch.stack([values for *_, values in self.noted]).tolist() if self.noted else []
        *bad_losses, unsaved, stopping, save_now = distributed.any_rank(
            *(not all(map(math.isfinite, losses)) for _, *losses in rows),
            self.writer.failed(), stopping, save_now, device=self.device,
        )  # fmt: skip
        if unsaved:
            finish_saving(self.writer, self.device)
        noted, self.noted = self.noted, []
        for (epoch, step, names, _), row, bad_loss in zip(noted, rows, bad_losses, strict=True):
            norm, loss, *terms = row
            if bad_loss or not math.isfinite(norm):  # the same norm on all ranks
                self._not_finite(epoch, step, norm, dict(zip(names, terms, strict=True)), bad_loss)
            else:
                self.run.skipped_in_a_row = 0
                self.run.means.add("grad_norm", norm)
            for name, value in zip(("loss", *names), (loss, *terms), strict=True):
                self.run.means.add(name, value)
        return stopping, save_now

    def _not_finite(
        self, epoch: int, step: int, norm: float, terms: dict[str, float], bad_loss: bool
    ) -> None:
        """All ranks are here together. Returns after an overflow that may be passed over."""
        run = self.run
        if run.scaler.is_enabled() and not bad_loss:
            run.skipped += 1
            run.skipped_in_a_row += 1
            if run.skipped_in_a_row <= self.max_overflows:
                return
        # What each rank saw, for the message.
        mine = torch.tensor([list(terms.values())], dtype=torch.float64, device=self.device)
        by_rank = distributed.all_gather(mine)  # (W, terms)
        guilty = [
            f"{list(terms)[term]} {by_rank[rank, term].item():g} on rank {rank}"
            for rank, term in (~by_rank.isfinite()).nonzero().tolist()
        ]
        guilty = guilty or [f"gradient norm {norm:g}, all loss terms are finite"]
        self.writer.finish()
        left = checkpoint.run_checkpoints(self.writer.folder)
        raise TrainingError(
            f"not finite in epoch {epoch}, step {step}: {'; '.join(guilty)}"
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
        # Ranks append whole lines. A path need not be UTF-8: its bytes are kept.
        with open(self.path, "a", encoding="utf-8", errors="surrogateescape") as file:
            file.write("".join(f"{path}\n" for path in sorted(new)))
        if len(self.seen) > self.most * self.images:
            raise TrainingError(
                f"{len(self.seen)} of {self.images} images cannot be read, more than "
                f"--max-bad-share {self.most:g}; see {self.path}"
            )

    def _listed(self) -> set[str]:
        if not self.path.is_file():
            return set()
        return set(self.path.read_text(encoding="utf-8", errors="surrogateescape").splitlines())
