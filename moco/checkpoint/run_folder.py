"""Checkpoints of a run folder: their names, the newest that can be read, which ones to delete."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from moco.checkpoint.files import read_checkpoint
from moco.errors import CheckpointError
from moco.pickles import peek
from moco.run_files import EPOCH_CHECKPOINT, STEP_CHECKPOINT, checkpoint_files


def epoch_path(folder: Path, epoch: int) -> Path:
    """File of the 0-based finished `epoch`."""
    return folder / f"checkpoint_{epoch:04d}.pth.tar"


def step_path(folder: Path, step: int) -> Path:
    """File of a save within an epoch, after `step` optimizer steps."""
    return folder / f"step_{step:08d}.pth.tar"


def run_checkpoints(folder: str | os.PathLike) -> list[Path]:
    """Checkpoints of a run folder, the oldest first, by how far the run had come."""
    return sorted(checkpoint_files(folder), key=_position)


def _position(path: Path) -> tuple[float, int]:
    """(finished epochs, steps). Times of files are no guide: a copied folder has new ones."""
    epoch = EPOCH_CHECKPOINT.fullmatch(path.name)
    if epoch:
        return int(epoch[1]) + 1, 0
    step = int(STEP_CHECKPOINT.fullmatch(path.name)[1])
    try:
        # Of a save within an epoch only the content tells the epoch; its tensors stay on disk.
        return int(peek(path)["epoch"]), step
    except Exception:  # damaged in whatever way: tried first by `newest_valid`, which says so
        return float("inf"), step


def newest_valid(folder: str | os.PathLike, say: Callable[[str], None]) -> tuple[Path, dict] | None:
    """The newest checkpoint of a run folder that can be read whole; None when there is none.

    Damaged ones are passed over and named by `say`.

    Raises:
        CheckpointError: there are checkpoints, and none can be read.
    """
    paths = run_checkpoints(folder)
    for path in reversed(paths):
        try:
            return path, read_checkpoint(path)
        except CheckpointError as error:
            say(f"passing over a checkpoint: {error}")
    if paths:
        raise CheckpointError(f"none of the {len(paths)} checkpoints in {folder} can be read")
    return None


def prune_checkpoints(folder: Path, *, keep_last: int, keep_every: int) -> None:
    """Delete all but the newest `keep_last` and those of every `keep_every`-th epoch (0: none).

    Saves within an epoch that cannot be read stay where they are, and take no other's place.
    """
    readable = [path for path in run_checkpoints(folder) if _position(path)[0] < float("inf")]
    for path in readable[:-keep_last]:
        epoch = EPOCH_CHECKPOINT.fullmatch(path.name)
        if not (epoch and keep_every and (int(epoch[1]) + 1) % keep_every == 0):
            path.unlink(missing_ok=True)


def remove_unfinished(folder: Path) -> None:
    """Delete what processes that were killed while writing have left behind. The caller knows that
    nobody writes into the folder."""
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)
