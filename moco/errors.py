"""Errors that users can act on, and how commands report them: in one line, with exit status 1."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from moco.printable import printable


class DataError(ValueError):
    """The data on disk cannot be used; the message says what was found and what to do."""


class CheckpointError(ValueError):
    """A file is not what it should be; the message names the file and what was expected."""


class PassingError(CheckpointError):
    """A file could not be written, for a reason that may pass; the command is worth another try."""

    exit_status = 75


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why and what is left on disk."""


@contextlib.contextmanager
def report_user_errors() -> Iterator[None]:
    """Print an error that the user can act on in one line, and exit with status 1, or 75 where
    another try may succeed; other errors raise. Memory that is not there is such an error.
    Ctrl-C ends in one line too, with status 130."""
    try:
        yield
    except KeyboardInterrupt:
        print(f"{Path(sys.argv[0]).name}: interrupted", file=sys.stderr, flush=True)
        sys.exit(130)
    except (MemoryError, RuntimeError, ValueError, OSError) as error:
        if not isinstance(error, (DataError, CheckpointError, TrainingError, OSError)):
            if not _is_lack_of_memory(error):
                raise
            error = TrainingError(f"{_OUT_OF_MEMORY}: {str(error) or 'no more is given'}")
        lines = str(error).strip().splitlines()
        if any(line.startswith("Original Traceback") for line in lines):
            # A loader process puts its own trace in front of the error that it raised.
            lines = [re.sub(r"^[\w.]*Error: ", "", lines[-1])]
        message = " ".join(line.strip() for line in lines)
        message = f"{Path(sys.argv[0]).name}: error: {printable(message)}"
        print(message, file=sys.stderr, flush=True)
        sys.exit(getattr(error, "exit_status", 1))


_OUT_OF_MEMORY = "out of memory; choose a smaller batch, image size or encoder"


def _is_lack_of_memory(error: BaseException) -> bool:
    """Python's, torch's on a GPU, or torch's on a CPU, which is a RuntimeError."""
    names = {kind.__name__ for kind in type(error).__mro__}
    return bool(names & {"MemoryError", "OutOfMemoryError"}) or "can't allocate" in str(error)
