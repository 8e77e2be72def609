"""SHA-256 of checkpoint files: given by a caller, or by the name as torch.hub has it."""

from __future__ import annotations

import re
from pathlib import Path

from moco.errors import CheckpointError
from moco.run_files import sha256 as sha256_of

_IN_NAME = re.compile(r"-([0-9a-fA-F]{8,64})\.")  # as torch.hub writes and checks it
_DATE = re.compile(r"20[0-9]{2}[01][0-9][0-3][0-9]")


def checked_digits(sha256: str | None) -> str | None:
    """A hash as users give it, in lower case.

    Raises:
        ValueError: not 8 to 64 hexadecimal digits.
    """
    if sha256 is not None and not re.fullmatch(r"[0-9a-fA-F]{8,64}", sha256):
        raise ValueError(f"sha256 must be 8 to 64 hexadecimal digits, got {sha256!r}")
    return sha256 and sha256.lower()


def hash_in_name(name: str) -> str | None:
    """The digits in `name-<8 or more hex digits>.ext`."""
    found = _IN_NAME.search(name)
    return found and found[1].lower()


def has_hash(path: Path, expected: str | None) -> bool:
    """Whether the file's SHA-256 begins with `expected` (None: any does)."""
    return expected is None or sha256_of(path).startswith(expected)


def check_hash(path: Path, expected: str | None, called: object) -> None:
    """Raise CheckpointError unless the file's SHA-256 begins with `expected` (None: any)."""
    if not has_hash(path, expected):
        raise CheckpointError(
            f"{called} has SHA-256 {sha256_of(path)}, expected {expected}...: it is another file, "
            f"was changed, or did not arrive whole ({path.stat().st_size} bytes); download it "
            "again, and compare with the hash that its author gives"
        )


def check_name(path: Path) -> bool:
    """Whether a local file's name holds its hash. A date (20260722) is no hash there.

    Raises:
        CheckpointError: it holds another one.
    """
    expected = hash_in_name(path.name)
    if expected is None or _DATE.fullmatch(expected):
        return False
    try:
        check_hash(path, expected, path)
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}; or, if the digits in its name are no hash, rename it"
        ) from None
    return True
