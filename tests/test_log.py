"""What the screen shows: a bar on a terminal, lines where there is none to draw it on."""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import sys
import termios

import pytest

from moco.log import StepPrinter


@pytest.mark.parametrize(
    ("rows", "columns", "bar"), [(24, 120, True), (24, 0, False), (0, 120, False)]
)
def test_a_bar_needs_a_terminal_with_a_size(monkeypatch, capsys, rows, columns, bar) -> None:
    """One without showed nothing at all: tqdm drew no bar, and lines gave way to it."""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    with os.fdopen(follower, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        printer = StepPrinter(total=4, batch_size=2)
        printer.advance()
        printer.line("step 1 of 4", short="short")
        printer.close()
    drawn = os.read(leader, 4096).decode() if bar else ""
    os.close(leader)
    assert (printer.bar is not None) is bar
    assert ("/4" in drawn) is bar
    assert ("step 1 of 4" in capsys.readouterr().out) is not bar
