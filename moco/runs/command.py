"""Commands that run other programs: refusals in one line, Ctrl-C, and children that are asked to
stop when their parent is, and end with it."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

from moco.printable import printable
from moco.runs import tied
from moco.stop import EXIT_INTERRUPTED, EXIT_PREEMPTED


class Parser(argparse.ArgumentParser):
    """Errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.refuse(f"{message} (--help lists all flags)")

    def refuse(self, message: object, status: int = 2) -> NoReturn:
        """End the command with the reason."""
        self.exit(status, f"{self.prog}: error: {printable(message)}\n")


@contextlib.contextmanager
def running(prog: str) -> Iterator[None]:
    """Around all that a command does: Ctrl-C ends it in one line, and names of files that are not
    UTF-8 are printed as the bytes that they are."""
    sys.stdout.reconfigure(errors="surrogateescape")
    try:
        yield
    except KeyboardInterrupt:
        sys.stdout.flush()
        print(f"{prog}: interrupted", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)


def run_shown(program: Path, *words: str) -> None:
    """Run a Python program, showing the command; end where it fails, with its status."""
    command = [str(program), *words]
    print("$ python " + shlex.join(command), flush=True)
    if status := subprocess.run([sys.executable, *command], check=False).returncode:
        sys.exit(status)


class Children:
    """The programs that this one runs. A request to stop (SIGTERM, SIGUSR1, SIGHUP, the first
    Ctrl-C) is handed on to them, so that they save; the second Ctrl-C ends all at once."""

    def __init__(self, prog: str) -> None:
        self.prog = prog
        self.running: list[subprocess.Popen] = []
        self.stopped_by: int | None = None
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # as by nohup
                signal.signal(number, self._stop)

    @property
    def status(self) -> int | None:
        """Exit status of a command that was asked to stop, else None."""
        if self.stopped_by is None:
            return None
        return EXIT_INTERRUPTED if self.stopped_by == signal.SIGINT else EXIT_PREEMPTED

    def _stop(self, number: int, _: object) -> None:
        if self.stopped_by is not None and number == signal.SIGINT:
            for process in list(self.running):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
            os._exit(EXIT_INTERRUPTED)
        if self.stopped_by is None:
            self.stopped_by = number
            line = f"{self.prog}: stopping: what runs is asked to save; the same command goes on "
            os.write(2, f"{line}(Ctrl-C again: at once)\n".encode())
        for process in list(self.running):
            process.terminate()

    def run(self, command: Sequence[str], **options: object) -> int:
        """Run a Python program to its end; its exit status, or `status` where it was stopped.

        Args:
            command: the program and its arguments.
            options: of subprocess.Popen.
        """
        if self.status is not None:
            return self.status
        words = [sys.executable, str(Path(tied.__file__)), str(os.getpid()), *command]
        process = subprocess.Popen(words, start_new_session=True, **options)
        self.running.append(process)
        if self.status is not None:  # asked meanwhile
            process.terminate()
        found = process.wait()
        self.running.remove(process)
        ended_early = found < 0 or found in (EXIT_PREEMPTED, EXIT_INTERRUPTED)
        return self.status if self.status is not None and ended_early else found


def run_steps(
    parser: Parser, children: Children, steps: Sequence[tuple[Path, list[str]]], root: Path
) -> list[dict]:
    """Run each program that has not left its file yet; ends the command where one fails.

    Args:
        steps: the file that a program leaves, and the program below `root` with its arguments.

    Returns:
        What is in the files, which are JSON but for the first, a checkpoint.
    """
    for file, (program, *words) in steps:
        if not file.is_file() and (status := children.run([str(root / program), *words])):
            sys.exit(status)
        if not file.is_file():  # --max-steps, say
            parser.refuse(f"{program} has ended without {file}", status=1)
    return [json.loads(file.read_text(encoding="utf-8")) for file, _ in steps[1:]]
