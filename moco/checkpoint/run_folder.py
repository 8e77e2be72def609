"""Checkpoints of a run folder: their names, the newest that can be read, which ones to delete."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
from collections.abc import Callable, Collection
from pathlib import Path

from moco.checkpoint.files import read_checkpoint
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
        say(f"passing over a checkpoint: {error}" + (f". It is now {aside.name}" if aside else ""))
    if paths and found is None:
        raise CheckpointError(f"none of the {len(paths)} checkpoints in {folder} can be read")
    return found


def prune_checkpoints(
    folder: Path, *, keep_last: int, keep_every: int, keep: Collection[Path] = ()
) -> None:
    """Delete all but the newest `keep_last` and those of every `keep_every`-th epoch (0: none).

    Files that cannot be read stay where they are, and take no good one's place. Of each file the
    directory and the values beside its tensors are read, once; not the tensors.

    Args:
        folder: of the run.
        keep_last: how many, at least one.
        keep_every: number of epochs.
        keep: files that stay whatever their names: the one just written and the one that the run
            was resumed from. Nothing is deleted while one of them cannot be read.
    """
    kept = {Path(path).resolve() for path in keep}
    here = [path for path in kept if path.parent == Path(folder).resolve() and path.exists()]
    if not all(_is_whole(path) for path in here):
        return
    readable = [path for path in run_checkpoints(folder) if _is_whole(path)]
    for path in readable[:-keep_last]:
        epoch = EPOCH_CHECKPOINT.fullmatch(path.name)
        if epoch and keep_every and (int(epoch[1]) + 1) % keep_every == 0:
            continue
        if path.resolve() not in kept:
            path.unlink(missing_ok=True)


def remove_unfinished(folder: Path) -> None:
    """Delete what a process that was killed while writing has left behind."""
    for path in folder.glob(".*.pth.tar.*.tmp"):
        path.unlink(missing_ok=True)


def _position(path: Path) -> tuple[float, int]:
    """(finished epochs, steps). Times of files are no guide: a copied folder has new ones."""
    epoch = EPOCH_CHECKPOINT.fullmatch(path.name)
    if epoch:
        return int(epoch[1]) + 1, 0
    # Of a save within an epoch only the content tells the epoch. Damaged ones are tried first by
    # `newest_valid`, which says so.
    found = _saved_epoch(path)
    return float("inf") if found is None else found, int(STEP_CHECKPOINT.fullmatch(path.name)[1])


def _is_whole(path: Path) -> bool:
    return _saved_epoch(path) is not None


def _saved_epoch(path: Path) -> int | None:
    """The finished epochs that a file says; None when it is not whole, as far as that shows without
    reading its tensors."""
    try:
        facts = path.stat()
        return _read_epoch(path, facts.st_size, facts.st_mtime_ns, facts.st_ino)
    except Exception:  # damaged in whatever way
        return None


@functools.lru_cache(maxsize=1024)
def _read_epoch(path: Path, *_facts: int) -> int:
    """Once for each file as it is; `_facts` tell one that was written anew."""
    return int(peek(path)["epoch"])


def _set_aside(path: Path) -> Path | None:
    """Rename a file to NAME.damaged, or with a number behind it; None where that cannot be."""
    for number in itertools.count(1):
        aside = path.with_name(f"{path.name}.damaged{number if number > 1 else ''}")
        if not aside.exists():
            with contextlib.suppress(OSError):
                return path.rename(aside)
            return None
    return None
