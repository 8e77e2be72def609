"""Ranks compare how they were started, before they exchange anything that depends on it."""

from __future__ import annotations

from typing import Any

from moco import distributed
from moco.errors import TrainingError
from moco.log import provenance

# What may differ between ranks: places, devices, and what rank 0 decides for all.
_OWN = {
    "cache_dir",
    "checkpoint",
    "data",
    "device",
    "dist_backend",
    "dist_url",
    "gpu",
    "gpus",
    "local_processes",
    "local_rank",
    "multiprocessing_distributed",
    "node_rank",
    "pretrained",
    "rank",
    "resume",
    "save_dir",
    "seed_given",
    "workers",
    "world_size",
}


def refuse_other_arguments(config: Any) -> None:
    """Refuse ranks that were started with other arguments, or run other code, than rank 0.

    Raises:
        TrainingError: on every rank, naming the argument and the rank.
    """
    flat = config.to_flat()
    mine = {name: value for name, value in flat.items() if name not in _OWN}
    if not config.optim.seed_given:
        mine["seed"] = None  # rank 0 draws for all
    _compare(mine | {f"{name} version": v for name, v in provenance().items()})


def refuse_other_data(facts: dict[str, Any]) -> None:
    """Refuse ranks that see other images than rank 0, or evaluate another encoder.

    Raises:
        TrainingError: on every rank, naming the rank.
    """
    _compare(facts)


def _compare(mine: dict[str, Any]) -> None:
    first, *others = distributed.gather_objects(mine)
    for rank, theirs in enumerate(others, start=1):
        for name, value in first.items():
            if theirs.get(name) != value:
                raise TrainingError(
                    f"rank {rank} has {name} {theirs.get(name)!r}, rank 0 has {value!r}: give all "
                    "ranks the same arguments, data and code"
                )
