"""Checks of arguments that several modules share."""

from __future__ import annotations

import math
from numbers import Real


def check_positive(value: float, name: str) -> None:
    """Raise ValueError unless value is a number in (0, infinity)."""
    if not (isinstance(value, Real) and 0 < value < math.inf):
        raise ValueError(f"{name} must be a positive finite number, got {value!r}")
