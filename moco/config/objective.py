"""What objectives have in common: three terms with a weight and a parameter each, `NAME_w` and
`PARAMETERS[NAME]`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

from moco.config.option import LEARNS, Part, flag_of, option

PARAMETERS = {"contr": "contr_tau", "align": "align_alpha", "unif": "unif_t"}


def number(default: float, flag: str) -> Any:
    """A number of the objective; the command line must know whether it was given."""
    return option(default, flag, LEARNS, unset=True)


def check_terms(
    objective: Part, least: Mapping[str, float], also: str = "", *, enough: bool = False
) -> None:
    """Raise ValueError for weights that are negative or not finite, for weights of 0 alone, and for
    parameters that are not positive and finite, or too small.

    Args:
        least: smallest values of the parameters that count; 0: any positive one.
        also: what else there would be to minimise, for the message.
        enough: there is something else.
    """
    flags = {field.name: flag_of(field) for field in dataclasses.fields(objective)}
    weights = {flags[f"{name}_w"]: getattr(objective, f"{name}_w") for name in PARAMETERS}
    for flag, weight in weights.items():
        if not 0 <= weight < math.inf:
            raise ValueError(f"{flag} must be a number of at least 0, got {weight:g}")
    if not any(weights.values()) and not enough:
        raise ValueError(
            "all loss weights are zero: there is nothing to minimise; give one of "
            f"{', '.join(weights)}{also}"
        )
    for name, smallest in least.items():
        value = getattr(objective, name)
        if not (0 < value < math.inf and value >= smallest):
            wanted = "at least 1 (the slope is infinite below)" if smallest else "positive"
            raise ValueError(f"{flags[name]} must be {wanted}, got {value:g}")


def formula(values: Mapping[str, Any], **words: str) -> str:
    """The sum of the terms that have a weight, for people to read.

    Args:
        values: weights and parameters by their flat names.
        words: the text of each term, with {:g} for its parameter.
    """
    return " + ".join(map(" * ".join, _terms(values, words)))


def slug(values: Mapping[str, Any], **words: str) -> str:
    """The same as part of a folder's name."""
    return "-".join(map("".join, _terms(values, words)))


def _terms(values: Mapping[str, Any], words: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    for name, parameter in PARAMETERS.items():
        weight = values[f"{name}_w"]
        if weight:
            yield f"{weight:g}", words[name].format(values[parameter])
