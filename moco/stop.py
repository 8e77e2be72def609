"""Requests to stop: signals that a process answers by finishing its step, saving and ending."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator

# What clusters send before they take a job's machines away, and terminals that go away.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)

# Exit statuses of a run that was asked to stop and has saved: "try again", and Ctrl-C.
EXIT_PREEMPTED, EXIT_INTERRUPTED = 75, 130

# A terminal sends Ctrl-C to all processes, and the one that started them hands it on as well.
_SAME_KEYSTROKE = 1.0  # seconds


class StopRequest:
    """Notes SIGTERM, SIGUSR1, SIGHUP and the first Ctrl-C; a second Ctrl-C stops at once.

    Signals are handled until `restore`.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self._interrupted: float | None = None
        self._before = {
            number: signal.signal(number, self._note) for number in (*STOP_SIGNALS, signal.SIGINT)
        }

    def _note(self, number: int, _: object) -> None:
        if number == signal.SIGINT:
            now = time.monotonic()
            if self._interrupted is None:
                self._interrupted = now
                os.write(2, b"\nfinishing the step, then saving; Ctrl-C again stops at once\n")
            elif now - self._interrupted > _SAME_KEYSTROKE:
                raise KeyboardInterrupt
        self.name = signal.Signals(number).name

    @property
    def requested(self) -> bool:
        return self.name is not None

    @property
    def exit_status(self) -> int:
        return EXIT_INTERRUPTED if self.name == "SIGINT" else EXIT_PREEMPTED

    def restore(self) -> None:
        """Handle signals as before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)


class AgreedStop(SystemExit):
    """All ranks end together, and none waits for another."""


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """Start loader processes within it: what starts here never hears a request to stop. That is
    sent to all processes of a job, and loaders must live on until the training process has finished
    its step; they end with it. This process hears afterwards what came meanwhile."""
    # A mask holds from a process's first moment on; torch's workers take SIGTERM to heart before
    # they call anything of ours.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {*STOP_SIGNALS, signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
