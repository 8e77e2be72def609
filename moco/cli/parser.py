"""The command-line parser and the types of its arguments: what text may be, and what it becomes."""

from __future__ import annotations

import argparse
import difflib
import math
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from moco.printable import printable

# Flags that take a list of whole numbers, as `--gpus 0 1 2 3` or `--gpus 0,1,2,3`.
_LIST_FLAGS = ("--gpus", "--schedule")


class Parser(argparse.ArgumentParser):
    """argparse, except that a list of numbers ends where the numbers end.

    In upstream's own command lines the data folder may follow `--gpus 0 1 2 3` or
    `--schedule 120 160`; argparse would take it for one more number. Errors are one line.
    """

    def parse_args(self, args: Sequence[str] | None = None, namespace=None) -> argparse.Namespace:
        try:
            joined = _join_lists(sys.argv[1:] if args is None else args)
        except ValueError as error:
            self.error(str(error))
        parsed, unknown = self.parse_known_args(joined, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}{self._suggestion(unknown)}")
        return parsed

    def _suggestion(self, unknown: Sequence[str]) -> str:
        word = next((word.partition("=")[0] for word in unknown if word.startswith("--")), "")
        flags = list(self._option_string_actions)
        longer = [flag for flag in flags if word and flag.startswith(word)]
        near = longer or difflib.get_close_matches(word, flags, n=1)
        return f"; did you mean {near[0]}?" if near else ""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {printable(message)} (--help lists all flags)\n")


def _join_lists(argv: Sequence[str]) -> list[str]:
    joined: list[str] = []
    collecting = False  # the numbers of a list flag, into one word with it
    for word in argv:
        if collecting and re.fullmatch(r"-?\d+(,-?\d+)*", word):
            joined[-1] += ("" if joined[-1].endswith("=") else ",") + word
            collecting = "," not in word  # "0,1" is the whole list
            continue
        if collecting and joined[-1].endswith("=") and not word.startswith("-"):
            raise ValueError(f"{joined[-1][:-1]} expects whole numbers, got {word!r}")
        collecting = word in _LIST_FLAGS
        joined.append(f"{word}=" if collecting else word)
    return joined


def non_empty(text: str) -> str:
    """argparse type of a path: an unset variable of the shell is no path."""
    if not text.strip():
        raise argparse.ArgumentTypeError("expected a path, got an empty string")
    return text


def folder(text: str) -> Path:
    """argparse type of a run folder."""
    path = Path(non_empty(text))
    if path.exists() and not path.is_dir():
        raise argparse.ArgumentTypeError(f"{path} is a file, expected a folder")
    return path


def new_file(text: str) -> Path:
    """argparse type of --out, a file to write: whether it can be is known before work starts."""
    path = Path(non_empty(text))
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{path} is a folder, expected a file to write")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"no such folder for --out: {path.parent}")
    return path


def seed(text: str) -> int:
    """argparse type of a seed, as all generators take it."""
    if not text.isdecimal() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"--seed must be at least 0 and below 2^63, got {text}")
    return int(text)


def numbers(text: str) -> tuple[int, ...]:
    """argparse type of a list of whole numbers, "0,1,2"."""
    try:
        return tuple(int(part) for part in text.split(",") if part)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected whole numbers, got {text!r}") from None


def rates(text: str) -> tuple[float, ...]:
    """argparse type of one number, or of several with commas: "30" or "1,3,10,30"."""
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected a number, or several as 1,3,10, got {text!r}"
        ) from None
    if len(set(values)) < len(values):
        raise argparse.ArgumentTypeError(f"a number is there twice in {text!r}")
    return values


def auto_or_rate(text: str) -> float | None:
    """argparse type of a learning rate; None for "auto"."""
    try:
        return None if text == "auto" else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number or auto, got {text!r}") from None


def label_source(text: str) -> float | str:
    """argparse type of --labels: percent, or a file."""
    try:
        percent = float(text.removesuffix("%"))
    except ValueError:
        if Path(non_empty(text)).is_file():
            return text
        raise argparse.ArgumentTypeError(
            f"expected percent, as 1 or 10, or a file that lists images, got {text!r}"
        ) from None
    if not 0 < percent <= 100:
        raise argparse.ArgumentTypeError(f"expected percent above 0 and up to 100, got {text}")
    return percent


def count(text: str) -> int:
    """argparse type of a number of things."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text}")
    return int(text)


def positive(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a positive finite number, got {text}")
    return value


def positives(text: str) -> list[float]:
    """argparse type of "1,2,3": each once, in ascending order."""
    return sorted({positive(part) for part in text.split(",")})


# How text is read where the annotation of a field does not say it.
KINDS: dict[str | None, Callable[[str], Any]] = {
    "path": non_empty,
    "folder": folder,
    "numbers": numbers,
    "rate": float,
    "rates": rates,
    "auto_rate": auto_or_rate,
    "labels": label_source,
}
