"""Run a Python program that is asked to stop (SIGTERM) when the process that started it ends,
whatever ends that one, SIGKILL included.

    python tied.py PID PROGRAM ARGUMENT ...     PID: of the process that starts this

On Linux the kernel does it (prctl), elsewhere a process that looks twice a second.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time

PR_SET_PDEATHSIG = 1


def tie(parent: int) -> None:
    """Tie the life of this process, and of what it becomes by exec, to that of its parent."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
    elif os.fork() == 0:
        watch(parent)
    if os.getppid() != parent:  # it has ended before
        sys.exit(1)


def watch(parent: int) -> None:
    """In a child of the program: wait for the end of either; never returns."""
    program = os.getppid()
    while os.getppid() == program and _runs(parent):
        time.sleep(0.5)
    if os.getppid() == program:
        os.kill(program, signal.SIGTERM)
    os._exit(0)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


if __name__ == "__main__":
    tie(int(sys.argv[1]))
    os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
