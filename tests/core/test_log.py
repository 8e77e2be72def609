"""What the screen shows: a bar on a terminal, lines where there is none to draw it on."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import struct
import sys
import termios
from collections.abc import Callable, Iterator

import pytest
from helpers import refusal

import main_lincls
import main_moco
from moco.progress import StepPrinter


@pytest.fixture
def drawn(monkeypatch) -> Callable[..., contextlib.AbstractContextManager[list[str]]]:
    """drawn(rows, columns): a terminal for stderr; a list to which its text is added at the end."""

    @contextlib.contextmanager
    def drawn(rows: int, columns: int) -> Iterator[list[str]]:
        leader, follower = pty.openpty()
        fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        shown: list[str] = []
        with os.fdopen(follower, "w") as terminal:
            monkeypatch.setattr(sys, "stderr", terminal)
            yield shown
        data = b""
        with contextlib.suppress(OSError):  # the other side is closed, and all has been read
            while chunk := os.read(leader, 65536):
                data += chunk
        os.close(leader)
        shown.append(data.decode())

    return drawn


@pytest.mark.parametrize(
    ("rows", "columns", "bar"), [(24, 120, True), (24, 0, False), (0, 120, False)]
)
def test_a_bar_needs_a_terminal_with_a_size(drawn, capsys, rows, columns, bar) -> None:
    """One without showed nothing at all: tqdm drew no bar, and lines gave way to it."""
    with drawn(rows, columns) as shown:
        printer = StepPrinter(total=4, batch_size=2)
        printer.advance()
        printer.line("step 1 of 4", short="short")
        printer.close()
    assert (printer.bar is not None) is bar
    assert ("/4" in shown[0]) is bar
    assert ("step 1 of 4" in capsys.readouterr().out) is not bar


def test_the_bar_shows_loss_speed_and_time_left(clock, drawn, capsys) -> None:
    with drawn(24, 160) as shown:
        printer = StepPrinter(total=40, batch_size=2)
        for _ in range(2):
            clock.sleep(0.5)
            printer.advance()
        printer.line("", short="epoch 0/9, loss -1.234, 567 images/s")
        printer.note("k-NN of these features")
        printer.close()
    assert re.search(r"2/40 \[00:01<00:19, .*step.*loss -1.234, 567 images/s", shown[0]), shown
    assert "k-NN of these features" in capsys.readouterr().out


@pytest.mark.parametrize("columns", [120, 0])
def test_a_pause_is_not_counted(clock, drawn, capsys, columns) -> None:
    """Neither in images/s and the share of waiting nor in the time left."""
    with drawn(24, columns):
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
    assert rates["images_per_s"] == 10 / 0.25
    if columns == 0:
        assert capsys.readouterr().out.split()[-1] == "0:04:10"


def test_a_run_without_tensorboard_is_refused_before_it_starts(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    file = tmp_path / "file.pth"
    file.touch()
    words = ["-b", 8, "--save-dir", tmp_path / "run", data]
    for main, flags in (
        (main_moco.main, ["-a", "resnet8", "--moco-k", 16]),
        (main_lincls.main, ["--pretrained", file]),
    ):
        status, line = refusal(main, [*flags, *words], capsys)
        assert status == 2 and "needs the package tensorboard: pip install tensorboard" in line
    assert not (tmp_path / "run").exists()
