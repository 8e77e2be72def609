"""What the screen shows: a bar on a terminal, lines where there is none to draw it on."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import sys
import termios

import pytest

from moco.progress import StepPrinter


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


def test_the_bar_shows_loss_speed_and_time_left(clock, monkeypatch, capsys) -> None:
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 160, 0, 0))
    with os.fdopen(follower, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        printer = StepPrinter(total=40, batch_size=2)
        for _ in range(2):
            clock.sleep(0.5)
            printer.advance()
        printer.line("", short="epoch 0/9, loss -1.234, 567 images/s")
        printer.note("k-NN of these features")
        printer.close()
    drawn = os.read(leader, 65536).decode()
    os.close(leader)
    assert re.search(r"2/40 \[00:01<00:19, .*step.*loss -1.234, 567 images/s", drawn), drawn
    assert "k-NN of these features" in capsys.readouterr().out


@pytest.mark.parametrize("columns", [120, 0])
def test_a_pause_is_not_counted(clock, monkeypatch, capsys, columns) -> None:
    """Neither in images/s and the share of waiting nor in the time left."""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    with os.fdopen(follower, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        printer = StepPrinter(total=1001, batch_size=10)
        clock.sleep(0.25)
        printer.advance()
        with printer.paused():
            clock.sleep(500)
        rates = printer.rates()
        printer.line("step", short="step")
        if printer.bar is not None:
            assert printer.bar.format_dict["elapsed"] == 0.25
        printer.close()
    os.close(leader)
    assert rates["images_per_s"] == 10 / 0.25
    if columns == 0:
        assert capsys.readouterr().out.split()[-1] == "0:04:10"
