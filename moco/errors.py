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
    another try may succeed; other errors raise.
    Ctrl-C ends in one line too, with status 130."""
    try:
        yield
    except KeyboardInterrupt:
        print(f"{Path(sys.argv[0]).name}: interrupted", file=sys.stderr, flush=True)
        sys.exit(130)
    except (DataError, CheckpointError, TrainingError, OSError) as error:
        lines = str(error).strip().splitlines()
        if any(line.startswith("Original Traceback") for line in lines):
            # A loader process puts its own trace in front of the error that it raised.
            lines = [re.sub(r"^[\w.]*Error: ", "", lines[-1])]
        message = " ".join(line.strip() for line in lines)
        message = f"{Path(sys.argv[0]).name}: error: {printable(message)}"
        print(message, file=sys.stderr, flush=True)
        sys.exit(getattr(error, "exit_status", 1))
