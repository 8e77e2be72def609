"""Checkpoints of a run folder: their names, the newest that can be read, which ones to delete."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Callable
from pathlib import Path

from moco.checkpoint.files import read_checkpoint
from moco.checkpoint.formats import is_whole_zip
from moco.checkpoint.refusals import MaybeGood
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

    Damaged ones are passed over, named by `say` and renamed to NAME.damaged, so that they are the
    newest no more; but not where none can be read, for the folder would then look like a new one.

    Raises:
        CheckpointError: there are checkpoints, and none can be read.
    """
    paths = run_checkpoints(folder)
    passed_over: list[tuple[Path, CheckpointError]] = []
    found = None
    for path in reversed(paths):
        try:
            found = path, read_checkpoint(path)
            break
        except CheckpointError as error:
            passed_over.append((path, error))
    for path, error in passed_over:
        aside = _set_aside(path) if found and not isinstance(error, MaybeGood) else None
        say(f"passing over a checkpoint: {error}" + (f"; it is now {aside.name}" if aside else ""))
    if paths and found is None:
        raise CheckpointError(f"none of the {len(paths)} checkpoints in {folder} can be read")
    return found


def _set_aside(path: Path) -> Path | None:
    """Rename a file to NAME.damaged, or with a number behind it; None where that cannot be."""
    for number in itertools.count(1):
        aside = path.with_name(f"{path.name}.damaged{number if number > 1 else ''}")
        if not aside.exists():
            with contextlib.suppress(OSError):
                return path.rename(aside)
            return None
    return None


class Retention:
    """Deletes old checkpoints of a run folder: all but the newest `keep_last`, and those of every
    `keep_every`-th epoch (0: none).

    Only files that are known to be whole count. A file that is not stays where it is.

    Attributes:
        keep: files that are never deleted, such as the one that the run was resumed from.
    """

    def __init__(self, folder: Path, *, keep_last: int, keep_every: int) -> None:
        self.folder, self.keep_last, self.keep_every = folder, keep_last, keep_every
        self.keep: set[Path] = set()
        self._whole: dict[Path, bool] = {}  # each file is looked through once

    def written(self, path: Path) -> None:
        """Note that `path` has just been written, or read, whole."""
        self._whole[path] = True

    def prune(self, newest: Path) -> None:
        """Delete what is not to be kept; `newest` has just been written, and stays. If that was a
        lie of the disk, nothing is deleted."""
        if not _has_values(newest):
            return
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
            self._whole[path] = is_whole_zip(path) and _has_values(path)
        return self._whole[path]


def _has_values(path: Path) -> bool:
    """Whether the archive's directory, which is at its end, and a checkpoint's values are there."""
    try:
        return "epoch" in peek(path)
    except Exception:  # damaged in whatever way
        return False


def remove_unfinished(folder: Path) -> None:
    """Delete what processes that were killed while writing have left behind. The caller knows that
    nobody writes into the folder."""
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)
