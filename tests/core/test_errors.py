"""How commands report errors: those that a user can mend in one line, others with a trace."""

from __future__ import annotations

import pytest
from torch.utils.data import DataLoader, Dataset

from moco.errors import (
    CheckpointError,
    DataError,
    PassingError,
    TrainingError,
    report_user_errors,
)


def reported(error: BaseException, capsys: pytest.CaptureFixture) -> tuple[int, str]:
    """Exit status and the only line on stderr."""
    with pytest.raises(SystemExit) as stop, report_user_errors():
        raise error
    (line,) = capsys.readouterr().err.split("\n")[:-1]
    return stop.value.code, line


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (DataError("no such thing: mend it"), 1, "error: no such thing: mend it"),
        (DataError("a.png: broken\nat byte 7"), 1, "error: a.png: broken at byte 7"),
        (PassingError("the disk is full"), 75, "error: the disk is full"),
        (KeyboardInterrupt(), 130, ": interrupted"),
    ],
)
def test_errors_that_the_user_can_mend_end_in_one_line(error, status, words, capsys) -> None:
    found, line = reported(error, capsys)
    assert found == status and line.endswith(words)


@pytest.mark.parametrize("kind", [ValueError, RuntimeError])
def test_other_errors_keep_their_trace(kind) -> None:
    with pytest.raises(kind, match="ours"), report_user_errors():
        raise kind("ours")


class Unreadable(Dataset):
    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> int:
        raise DataError("cannot read image a.png: it is cut off")


def test_an_error_in_a_loader_process_ends_in_the_same_line(capsys) -> None:
    with pytest.raises(DataError) as raised:
        next(iter(DataLoader(Unreadable(), num_workers=1)))
    _, line = reported(raised.value, capsys)
    assert line.endswith("error: cannot read image a.png: it is cut off")


@pytest.mark.parametrize("kind", [CheckpointError, DataError, TrainingError, OSError])
@pytest.mark.parametrize(
    "name", ["\x1b[2Jcleared", "a\nmain_moco.py: error: another", "\u202etxt", "caf\udce9"]
)
def test_an_error_is_one_line_that_a_terminal_only_shows(kind, name, capsys) -> None:
    status, line = reported(kind(f"{name} is no checkpoint"), capsys)
    assert status == 1 and line.endswith("is no checkpoint")
    assert line.isprintable() and line.count("error:") == 1 + name.count("error:")
