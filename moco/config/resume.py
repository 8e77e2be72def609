"""What decides whether a run can be resumed: values that learn something else, or round otherwise.

Values go by the flat names of args.json and of `args` in checkpoints.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from moco.config.in_batch import InBatchConfig
from moco.config.objective import PARAMETERS
from moco.config.option import LEARNS, ROUNDS, UNKNOWN, option_fields, plain
from moco.config.pretrain import (
    Objective,
    PretrainConfig,
    groups_of_old_files,
    objective_formula,
)
from moco.config.sentences import SentenceConfig, SentenceObjective

# By "task" among the flat values; without it MoCo's.
_CONFIGS = {"in-batch": InBatchConfig, "sentences": SentenceConfig}


def fields_of_class(resume: str, config: type) -> dict[str, Any]:
    """Flat names of a config's fields of this class -> value before the field existed."""
    return {
        field.name: field.metadata["since"]
        for field in option_fields(config)
        if field.metadata["resume"] == resume
    }


def config_of(flat: Mapping[str, Any]) -> type:
    """The type of the config with these flat values."""
    return _CONFIGS.get(flat.get("task"), PretrainConfig)


_OBJECTIVE = tuple(f.name for of in (Objective, SentenceObjective) for f in dataclasses.fields(of))
# Worked out from several fields, or found in the data.
_DERIVED = (
    *("images", "images_digest", "sentences", "text_digest", "task"),
    *("bn_group_size", "loss_group_size", "shuffled_images"),
)
# What the order of samples within an epoch depends on.
SAMPLE_ORDER = ("batch_size", "dataset", "images", "images_digest", "images_per_class", "seed",
                "sentences", "text_digest")  # fmt: skip


def learned_names(flat: Mapping[str, Any]) -> tuple[str, ...]:
    """Flat names of all that decides what a run with these flat values learns: runs that differ in
    one of them are other runs."""
    names = fields_of_class(LEARNS, config_of(flat))
    kept = (name for name in names if name not in _OBJECTIVE or name == "symmetric")
    return (*kept, *_DERIVED, "objective")


def learned_values(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Of flat values those that decide what is learned, the objective as its formula."""
    names = learned_names(flat)
    values = {name: flat[name] for name in names if name in flat and name != "objective"}
    formula = objective_formula(flat)
    return values if formula is None else {**values, "objective": formula}


def learning_changes(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What is learned otherwise than before, one line for each; [] for a file without arguments.

    Args:
        saved, now: flat values of the checkpoint, and of the run that is to go on.
    """
    if not saved:
        return []
    fields = fields_of_class(LEARNS, config_of(now))
    since = {n: v for n, v in fields.items() if v is not UNKNOWN}
    before = learned_values({**since, **groups_of_old_files(saved), **saved})
    after = learned_values(now)
    numbers, others = _objective_numbers(saved), _objective_numbers(now)
    if numbers and others and before.get("objective") == after.get("objective"):
        # They may differ in digits that the formula leaves out.
        return changed({**before, **numbers}, {**after, **others})
    return changed(before, after)


def rounding_changes(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What is computed otherwise than before, so that the run goes on, but not bit for bit."""
    fields = fields_of_class(ROUNDS, config_of(now))
    before = {name: saved.get(name, since) for name, since in fields.items()}
    return changed(before, now) if saved else []


def _objective_numbers(flat: Mapping[str, Any]) -> dict[str, Any] | None:
    """The weights, and the parameters of terms with a weight; None for a file without them."""
    if "align_w" not in flat:
        return None
    numbers = {f"{name}_w": float(flat[f"{name}_w"]) for name in PARAMETERS}
    for name, parameter in PARAMETERS.items():
        if numbers[f"{name}_w"]:
            numbers[parameter] = float(flat[parameter])
    if numbers["unif_w"]:
        numbers["intra_batch"] = bool(flat.get("intra_batch"))
    if numbers["align_w"]:
        numbers["align_pairs"] = flat.get("align_pairs")  # of sentences, as is the next
    numbers["normalize"] = flat.get("normalize")
    return {**numbers, "symmetric": bool(flat.get("symmetric", False))}


def changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """A line for each value that is not as before."""
    return [
        f"{name}: {old!r} before, {plain(now[name])!r} now"
        for name, old in before.items()
        if name in now and plain(now[name]) != old
    ]
