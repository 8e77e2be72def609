"""What decides whether a run can be resumed: values that learn something else, or round otherwise.

Values go by the flat names of args.json and of `args` in checkpoints.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from moco.config.in_batch import InBatchConfig
from moco.config.option import LEARNS, ROUNDS, UNKNOWN, option_fields, plain
from moco.config.pretrain import Objective, PretrainConfig, objective_formula

_CONFIGS = (PretrainConfig, InBatchConfig)  # of the runs that the engine trains


def _by_class(resume: str) -> dict[str, Any]:
    """Flat names of the configs' fields of this class -> value before the field existed."""
    return {
        field.name: field.metadata["since"]
        for config in _CONFIGS
        for field in option_fields(config)
        if field.metadata["resume"] == resume
    }


_OBJECTIVE = tuple(field.name for field in dataclasses.fields(Objective))
# Worked out from several fields, or found in the data.
_DERIVED = ("images", "images_digest", "bn_group_size", "task")
# What the order of samples within an epoch depends on.
SAMPLE_ORDER = ("batch_size", "dataset", "images", "images_digest", "images_per_class", "seed")


# Flat names of all that decides what is learned: runs that differ in one of them are other runs.
LEARNED = (
    *(name for name in _by_class(LEARNS) if name not in _OBJECTIVE or name == "symmetric"),
    *_DERIVED,
    "objective",
)


def learned_values(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Of flat values those that decide what is learned, the objective as its formula."""
    values = {name: flat[name] for name in LEARNED if name in flat and name != "objective"}
    formula = objective_formula(flat)
    return values if formula is None else {**values, "objective": formula}


def learning_changes(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What is learned otherwise than before, one line for each; [] for a file without arguments.

    Args:
        saved, now: flat values of the checkpoint, and of the run that is to go on.
    """
    if not saved:
        return []
    since = {n: v for n, v in _by_class(LEARNS).items() if v is not UNKNOWN}
    before, after = learned_values({**since, **saved}), learned_values(now)
    if _objective_numbers(saved) == _objective_numbers(now):
        before.pop("objective", None)
    return _changed(before, after)


def rounding_changes(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What is computed otherwise than before, so that the run goes on, but not bit for bit."""
    return _changed({**_by_class(ROUNDS), **_only(saved, _by_class(ROUNDS))}, now) if saved else []


def _objective_numbers(flat: Mapping[str, Any]) -> dict[str, Any] | None:
    """The weights, and the parameters of terms with a weight; None for a file without them."""
    if "align_w" not in flat:
        return None
    numbers = {name: float(flat[name]) for name in ("contr_w", "align_w", "unif_w")}
    for weight, name in (
        ("contr_w", "contr_tau"),
        ("align_w", "align_alpha"),
        ("unif_w", "unif_t"),
    ):
        if numbers[weight]:
            numbers[name] = float(flat[name])
    if numbers["unif_w"]:
        numbers["intra_batch"] = bool(flat.get("intra_batch"))  # within a batch there is no queue
    return {**numbers, "symmetric": bool(flat.get("symmetric", False))}


def _only(values: Mapping[str, Any], names: Mapping[str, Any]) -> dict[str, Any]:
    return {name: values[name] for name in names if name in values}


def _changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    return [
        f"{name}: {old!r} before, {plain(now[name])!r} now"
        for name, old in before.items()
        if name in now and plain(now[name]) != old
    ]
