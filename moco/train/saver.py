"""Saving in the background: a checkpoint is copied to host memory, then written by a thread."""

from __future__ import annotations

import errno
import threading
import time
from pathlib import Path

import torch

from moco import checkpoint, distributed
from moco.errors import CheckpointError, PassingError, TrainingError
from moco.lock import FolderLock
from moco.train.state import TrainState

# What trying again does not mend: disk full, read-only, gone, not allowed.
_LASTING = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.ENOENT,
    errno.ENOTDIR,
}


class BackgroundWriter:
    """Writes checkpoints in a thread, one at a time, from a copy in host memory.

    Training waits for the copy only. Where an error may pass (a network file system that is away),
    the thread tries again for some minutes, with growing pauses. What is left of an error is raised
    by the next call, so that training never goes on as if a file had been saved.

    Attributes:
        retention: which files are deleted after a save.
        lock: of the folder; once another process has taken it, nothing is deleted.
        error: why the file being written, or the last one, could not be written.
    """

    pauses = (1, 2, 5, 10, 20, 40, 60, 60, 60)  # seconds, before each new try

    def __init__(self, folder: Path, *, keep_last: int, keep_every: int) -> None:
        self.folder = folder
        self.retention = checkpoint.Retention(folder, keep_last=keep_last, keep_every=keep_every)
        self.lock: FolderLock | None = None
        self.thread: threading.Thread | None = None
        self.error: Exception | None = None
        self.waited = 0.0  # seconds that training has spent here
        self.in_a_hurry = threading.Event()  # set: no more tries

    def write(self, path: Path, content: dict) -> None:
        """Start writing; waits for the previous file first."""
        started = time.perf_counter()
        self.finish()
        copy = checkpoint.to_host(content)
        self.thread = threading.Thread(target=self._write, args=(path, copy), daemon=False)
        self.thread.start()
        self.waited += time.perf_counter() - started

    def finish(self) -> None:
        """Wait for the file being written.

        Raises:
            CheckpointError: it could not be written (disk full, folder gone or read-only);
                PassingError where the reason may pass.
        """
        self.wait()
        if self.error is not None:
            left = checkpoint.run_checkpoints(self.folder)
            passes = isinstance(self.error, OSError) and self.error.errno not in _LASTING
            kind = PassingError if passes else CheckpointError
            raise kind(
                f"could not save in {self.folder}: {self.error}; training stops, the last good "
                f"checkpoint is {left[-1].name if left else 'none'}"
            ) from self.error

    def wait(self) -> None:
        """Until the file being written is on disk, or has failed."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None

    def leave(self, kind: type[BaseException] | None, *_: object) -> None:
        """At the end of the run: `wait`, but not for more tries after a second Ctrl-C."""
        if kind is not None and issubclass(kind, KeyboardInterrupt):
            self.in_a_hurry.set()
        self.wait()

    def _write(self, path: Path, content: dict) -> None:
        try:
            for pause in (*self.pauses, None):
                try:
                    checkpoint.write_checkpoint(path, content)
                    break
                except OSError as error:
                    if error.errno in _LASTING or pause is None:
                        raise
                    print(
                        f"warning: could not save {path.name}: {error}; trying again in "
                        f"{pause:g} s, training goes on",
                        flush=True,
                    )
                    if self.in_a_hurry.wait(pause):
                        raise
            self.retention.written(path)
            if self.lock is None or self.lock.is_held():
                self.retention.prune(path)
        except Exception as error:  # whatever it is, training must hear of it
            self.error = error


def save(writer: BackgroundWriter, state: TrainState, flat: dict) -> None:
    """Save on rank 0 in the background; after an epoch under the epoch's name, else the step's.

    Args:
        flat: flat values of the config and of the data.
    """
    content = state.content(flat)
    if distributed.is_main():
        if state.step and state.step_in_epoch == 0:
            path = checkpoint.epoch_path(writer.folder, state.epoch - 1)
        else:
            path = checkpoint.step_path(writer.folder, state.step)
        writer.write(path, content)


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
