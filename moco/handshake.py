"""Ranks compare how they were started, before they exchange anything that depends on it."""

from __future__ import annotations

import dataclasses
from typing import Any

from moco import distributed
from moco.config import Launch
from moco.errors import TrainingError
from moco.log import provenance

# What may differ between ranks: places, devices, and what rank 0 decides for all.
_OWN = {field.name for field in dataclasses.fields(Launch)} - {"timeout_minutes"}
_OWN |= {"cache_dir", "checkpoint", "data", "local_processes", "node_rank", "pretrained", "resume"}
_OWN |= {"save_dir", "seed_given", "workers"}


def refuse_other_arguments(config: Any) -> None:
    """Refuse ranks that were started with other arguments, or run other code, than rank 0.

    Raises:
        TrainingError: on every rank, naming the argument and the rank.
    """
    flat = config.to_flat()
    mine = {name: value for name, value in flat.items() if name not in _OWN}
    if not config.optim.seed_given:
        mine["seed"] = None  # rank 0 draws for all
    refuse_other_data(mine | {f"{name} version": v for name, v in provenance().items()})


def refuse_other_data(facts: dict[str, Any]) -> None:
    """Refuse ranks that see other images than rank 0, or evaluate another encoder.

    Raises:
        TrainingError: on every rank, naming the rank.
    """
    first, *others = distributed.gather_objects(facts)
    for rank, theirs in enumerate(others, start=1):
        for name, value in first.items():
            if theirs.get(name) != value:
                raise TrainingError(
                    f"rank {rank} has {name} {theirs.get(name)!r}, rank 0 has {value!r}: give all "
                    "ranks the same arguments, data and code"
                )
