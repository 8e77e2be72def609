"""Checkpoints of a run folder: their names, the newest that can be read, which ones to delete."""

from __future__ import annotations

import os
import zipfile
import zlib
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

    Damaged ones are named by `say` and set aside, as NAME.damaged, so that nothing counts them as
    a checkpoint again; but not while no other can be read.

    Raises:
        CheckpointError: there are checkpoints, and none can be read.
    """
    paths = run_checkpoints(folder)
    damaged: list[tuple[Path, CheckpointError]] = []
    for path in reversed(paths):
        try:
            content = read_checkpoint(path)
        except CheckpointError as error:
            damaged.append((path, error))
            continue
        for other, error in damaged:
            aside = other.with_name(f"{other.name}.damaged")
            other.replace(aside)
            say(f"passing over a checkpoint: {error}; it is now {aside.name}")
        return path, content
    for _, error in damaged:
        say(f"passing over a checkpoint: {error}")
    if paths:
        raise CheckpointError(f"none of the {len(paths)} checkpoints in {folder} can be read")
    return None


class Retention:
    """Deletes old checkpoints of a run folder: all but the newest `keep_last`, and those of every
    `keep_every`-th epoch (0: none).

    Only files that are known to be whole count. A file that is not stays where it is.

    Args:
        keep: never deleted, whatever the numbers say.
    """

    def __init__(self, folder: Path, *, keep_last: int, keep_every: int) -> None:
        self.folder, self.keep_last, self.keep_every = folder, keep_last, keep_every
        self.keep: set[Path] = set()
        self._whole: dict[Path, bool] = {}  # each file is looked through once

    def written(self, path: Path) -> None:
        """Note that `path` has just been written, or read, whole."""
        self._whole[path] = True

    def prune(self, newest: Path) -> None:
        """Delete what is not to be kept; `newest` has just been written, and stays."""
        keep = {path.resolve() for path in (*self.keep, newest)}
        whole = [path for path in run_checkpoints(self.folder) if self._is_whole(path)]
        for path in whole[: -self.keep_last]:
            epoch = EPOCH_CHECKPOINT.fullmatch(path.name)
            of_an_epoch = epoch and self.keep_every and (int(epoch[1]) + 1) % self.keep_every == 0
            if not of_an_epoch and path.resolve() not in keep:
                path.unlink(missing_ok=True)
                self._whole.pop(path, None)

    def _is_whole(self, path: Path) -> bool:
        if path not in self._whole:
            try:
                with zipfile.ZipFile(path) as archive:
                    self._whole[path] = archive.testzip() is None
            except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, zlib.error):
                self._whole[path] = False
        return self._whole[path]


def remove_unfinished(folder: Path) -> None:
    """Delete what processes that were killed while writing have left behind. The caller knows that
    nobody writes into the folder."""
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)
