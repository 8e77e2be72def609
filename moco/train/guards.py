"""What stops a run, and what it warns of: requests to end, numbers that are not finite, ranks that
drift apart, features that collapse, images that cannot be read.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from moco import checkpoint, distributed
from moco.errors import TrainingError
from moco.log import RunLog
from moco.looks import Looks, looking_waits
from moco.train.blackbox import BlackBox, SpikeAlarm
from moco.train.saver import BackgroundWriter, finish_saving
from moco.train.state import TrainState
from moco.train.task import Losses


class StepGuard:
    """No number that is not finite gets into the weights, and no step waits for that.

    The device itself leaves steps out: once a rank's loss is not finite, that rank multiplies all
    it differentiates by NaN; averaging carries the NaN into every gradient on every rank; and the
    fused optimizer does nothing while `found_inf` is set, which it is when the norm of the
    gradients is not finite. The host hears of it at the next `check`, and stops the run there.
    An overflow of scaled fp16 gradients alone is passed over: the scaler leaves that step out.
    """

    def __init__(
        self,
        state: TrainState,
        writer: BackgroundWriter,
        max_overflows: int,
        box: BlackBox | None = None,
    ) -> None:
        """
        Args:
            box: takes what led to a step that is not finite, or is a spike.
        """
        self.state, self.writer, self.max_overflows = state, writer, max_overflows
        self.box, self.spikes = box, SpikeAlarm()
        self.looks = Looks(state.step, waits=looking_waits(state.device))
        self.failed = torch.zeros((), dtype=torch.bool, device=state.device)
        # Since the last check: (epoch, step, names, their values on the device).
        self.noted: list[tuple[int, int, list[str], Tensor]] = []

    def poison(self, loss: Tensor) -> Tensor:
        """`loss`, times NaN when it, or an earlier one, is not finite."""
        self.failed |= ~loss.detach().isfinite()
        return loss * torch.where(self.failed, torch.nan, 1.0)

    def leave_out(self, norm: Tensor) -> Tensor:
        """Whether the fused optimizer must leave this step out, as its `found_inf`."""
        overflow = ~norm.isfinite()
        self.failed |= overflow
        return overflow.float()

    def note(self, norm: Tensor, loss: Tensor, losses: Losses) -> None:
        """Keep the numbers of a step, on the device, for `check`."""
        terms = dict(losses.items())
        values = [norm, loss, *terms.values()]
        values = torch.stack([value.detach().double() for value in values])
        self.noted.append((self.state.epoch, self.state.step, list(terms), values))

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
        bad = [not all(map(math.isfinite, losses)) for _, *losses in rows]
        high = [not off and self.spikes.rings(row[1]) for off, row in zip(bad, rows, strict=True)]
        *seen, unsaved, stopping, save_now = self.looks.together(
            self.state.step,
            *bad,
            *high,
            self.writer.error is not None,
            stopping,
            save_now,
            device=self.state.device,
        )
        bad_losses, spikes = seen[: len(rows)], seen[len(rows) :]
        if unsaved:
            finish_saving(self.writer, self.state.device)
        noted, self.noted = self.noted, []
        for (epoch, step, names, _), row, bad_loss in zip(noted, rows, bad_losses, strict=True):
            norm, loss, *terms = row
            if bad_loss or not math.isfinite(norm):  # the same norm on all ranks
                self._not_finite(epoch, step, norm, dict(zip(names, terms, strict=True)), bad_loss)
            else:
                self.state.skipped_in_a_row = 0
                self.state.means.add("grad_norm", norm)
            for name, value in zip(("loss", *names), (loss, *terms), strict=True):
                self.state.means.add(name, value)
        for (epoch, step, *_), row, spike in zip(noted, rows, spikes, strict=True):
            if spike and self.box is not None:
                self._spike(epoch, step, row[1])
        return stopping, save_now

    def _spike(self, epoch: int, step: int, loss: float) -> None:
        """All ranks are here together: the loss of one of them has jumped."""
        text = f"the loss has jumped in epoch {epoch}, step {step}: {loss:g} on rank 0"
        folder = self.box.write("spike", epoch, step, text)
        where = f"; --replay {folder} reruns that step" if folder else ""
        distributed.print_main(f"warning: {text}, far above the steps before{where}")

    def _not_finite(
        self, epoch: int, step: int, norm: float, terms: dict[str, float], bad_loss: bool
    ) -> None:
        """All ranks are here together. Returns after an overflow that may be passed over."""
        state = self.state
        if state.scaler.is_enabled() and not bad_loss:
            state.skipped += 1
            state.skipped_in_a_row += 1
            if state.skipped_in_a_row <= self.max_overflows:
                return
        # What each rank saw, for the message.
        mine = torch.tensor([list(terms.values())], dtype=torch.float64, device=self.state.device)
        by_rank = distributed.all_gather(mine)  # (W, terms)
        guilty = [
            f"{list(terms)[term]} {by_rank[rank, term].item():g} on rank {rank}"
            for rank, term in (~by_rank.isfinite()).nonzero().tolist()
        ]
        guilty = guilty or [f"gradient norm {norm:g}, all loss terms are finite"]
        text = f"not finite in epoch {epoch}, step {step}: {'; '.join(guilty)}"
        folder = self.box.write("not finite", epoch, step, text) if self.box is not None else None
        self.writer.finish()
        raise TrainingError(
            text
            + (f" ({state.skipped_in_a_row} steps in a row)" if state.skipped_in_a_row else "")
            + f". {_last_checkpoint(self.writer)}"
            + (", or use --amp bf16 instead of fp16" if state.scaler.is_enabled() else "")
            + (f"; --replay {folder} reruns that step" if folder else "")
        )


def _last_checkpoint(writer: BackgroundWriter) -> str:
    left = checkpoint.run_checkpoints(writer.folder)
    last = left[-1] if left else "none yet"
    return f"The last checkpoint is {last}. Lower --lr or add --warmup-epochs"


def stop_if_ranks_differ(tensors: Sequence[Tensor], step: int) -> None:
    """Weights (of MoCo queue and pointer too) are equal on all ranks by construction; prove it."""
    differing = distributed.ranks_that_differ(tensors)
    if differing:
        raise TrainingError(
            f"after step {step} the weights or the queue of rank "
            f"{', '.join(map(str, differing))} are not those of rank 0: a fault of hardware or "
            "software on one of them; go on from the last checkpoint with --resume auto"
        )


@torch.no_grad()
def stop_if_weights_left_all_bounds(state: TrainState, writer: BackgroundWriter) -> None:
    """Losses of features of bounded length stay finite whatever becomes of the weights, and where
    all is saturated gradients are small. So before a save the weights themselves, and statistics of
    batch norm, are looked at; those of rank 0, which are saved."""
    text = None
    if distributed.is_main():
        named = state.module.state_dict().items()
        named = {name: t for name, t in named if t.is_floating_point() and t.numel()}
        sizes = torch.stack([t.abs().max() for t in named.values()]).tolist()
        for name, size in zip(named, sizes, strict=True):
            if not size <= checkpoint.largest_sane(name):
                text = f"{name} is up to {size:.0e}"
                break
    text = distributed.broadcast_object(text)
    if text:
        writer.wait()
        raise TrainingError(
            f"after step {state.step} {text}, where no training that works leads. "
            f"{_last_checkpoint(writer)}"
        )


class CollapseAlarm:
    """Warns when features have been nearly one point for a number of steps."""

    LEAST_STD = 0.1  # of the per-dimension deviation times sqrt(C): 1 when uniform, 0 collapsed

    def __init__(self, steps: int, remedy: str) -> None:
        self.steps, self.remedy = steps, remedy
        self.since: int | None = None

    def check(self, feature_std: float, step: int, log: RunLog) -> str | None:
        """Log the spread after `step` steps; what there is to warn of, if anything."""
        log.scalars("features", step, {"std": feature_std})
        if feature_std >= self.LEAST_STD:
            self.since = None
            return None
        self.since = step if self.since is None else self.since
        if self.steps and step - self.since >= self.steps:
            text = (
                f"features have collapsed since step {self.since}: deviation {feature_std:.3f} of "
                "1 per dimension"
            )
            distributed.print_main(f"warning: {text}. {self.remedy}")
            log.scalars("warning", step, {"collapsed_since": self.since})
            self.since = step  # again after as many steps
            return text
        return None


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
                f"--max-bad-share {self.most:g} lets --skip-bad-images replace; see {self.path}"
            )

    def _listed(self) -> set[str]:
        if not self.path.is_file():
            return set()
        return set(self.path.read_text(encoding="utf-8", errors="surrogateescape").splitlines())
