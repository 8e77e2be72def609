"""The lock of a run folder: two jobs never write into one.

The kernel holds the lock (`fcntl.lockf`) and lets go of it when the process ends, however it ends.
The file names the holder, for the message that the second job gets. On file systems without locks
the holder touches the file every few seconds instead, and counts as dead once it stops.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import threading
import time
from pathlib import Path

from moco import distributed
from moco.errors import TrainingError

NAME = ".lock"
HEARTBEAT, DEAD_AFTER = 10.0, 120.0  # seconds
_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}
_JOB_IDS = ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID", "JOB_ID")


class FolderLock:
    """Holds a folder for this process, until `release` or the end of the process.

    Args:
        folder: made where it is missing.

    Raises:
        TrainingError: another process holds it; the message names that one.
        OSError: the folder cannot be written to.
    """

    def __init__(self, folder: str | os.PathLike) -> None:
        self.path = Path(folder) / NAME
        self._made = [
            path for path in (self.path.parent, *self.path.parent.parents) if not path.exists()
        ]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.me = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "start": round(time.time(), 3),
            "job": next((os.environ[name] for name in _JOB_IDS if os.environ.get(name)), None),
        }
        # Neither truncated nor closed before the lock is had: the holder's words stay readable.
        self.file = open(self.path, "a+", encoding="utf-8")
        self._ended = threading.Event()
        try:
            fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _NO_LOCKS:
                self._claim_without_locks()
            else:
                holder = _read(self.path)
                self.file.close()
                raise TrainingError(_refusal(self.path.parent, holder)) from None
        self._write()

    def is_held(self) -> bool:
        """Whether the folder is still this process's: nobody has deleted or replaced the file."""
        try:
            same = os.stat(self.path).st_ino == os.fstat(self.file.fileno()).st_ino
        except OSError:
            return False
        self.file.seek(0)  # closing another descriptor of the file would let go of the lock
        return same and self.file.read() == json.dumps(self.me)

    def release(self) -> None:
        """Let another process have the folder; folders that were made for nothing else go again."""
        if self.file.closed:
            return
        self._ended.set()
        if self._made and [path.name for path in self.path.parent.iterdir()] == [NAME]:
            self.path.unlink()
            with contextlib.suppress(OSError):  # somebody has put something into one of them
                for folder in self._made:
                    folder.rmdir()
        else:
            self.file.seek(0)
            self.file.truncate()
        self.file.close()

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()

    def _write(self) -> None:
        self.file.seek(0)
        self.file.truncate()
        self.file.write(json.dumps(self.me))
        self.file.flush()

    def _claim_without_locks(self) -> None:
        """Take the folder unless its holder lives; from then on, show that this process does."""
        holder = _read(self.path)
        if holder and not _is_dead(holder, self.path) and not self._is_requeued(holder):
            self.file.close()
            raise TrainingError(_refusal(self.path.parent, holder))
        threading.Thread(target=self._beat, daemon=True).start()

    def _is_requeued(self, holder: dict) -> bool:
        """The same job again: a scheduler starts it anew only after it has ended."""
        return self.me["job"] is not None and holder.get("job") == self.me["job"]

    def _beat(self) -> None:
        while not self._ended.wait(HEARTBEAT):
            try:
                os.utime(self.path)
            except OSError:
                continue  # the file system is away; others judge by the last beat


def hold_on_main(folder: Path, at_exit: contextlib.ExitStack) -> FolderLock | None:
    """Hold the run folder on rank 0, until `at_exit` is closed.

    Raises:
        TrainingError: on all ranks, where another job holds it, or it cannot be written to.
    """
    lock, error = None, None
    if distributed.is_main():
        try:
            lock = at_exit.enter_context(FolderLock(folder))
        except TrainingError as caught:
            error = caught
        except OSError as caught:
            error = TrainingError(f"cannot write to the run folder: {caught}")
    error = distributed.broadcast_object(error)
    if error:
        raise error
    return lock


def _read(path: Path) -> dict:
    """The holder's words; {} where there are none, or a process is about to write them."""
    try:
        holder = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return holder if isinstance(holder, dict) else {}


def _is_dead(holder: dict, path: Path) -> bool:
    if holder.get("host") == socket.gethostname() and isinstance(holder.get("pid"), int):
        try:
            os.kill(holder["pid"], 0)
        except ProcessLookupError:
            return True
        except (PermissionError, OverflowError):
            pass
        return False
    return time.time() - path.stat().st_mtime > DEAD_AFTER


def _refusal(folder: Path, holder: dict) -> str:
    who = "another process"
    if holder:
        began, since = holder.get("start"), ""
        if isinstance(began, (int, float)):
            since = time.strftime(" since %Y-%m-%d %H:%M:%S", time.localtime(began))
        job = f", job {holder['job']}" if holder.get("job") else ""
        who = f"process {holder.get('pid')} on {holder.get('host')}{since}{job}"
    return f"{folder} is in use by {who}; wait for it, end it, or choose another --save-dir"
