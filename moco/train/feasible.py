"""What can be known of a step before it: whether its kernels exist and its memory suffices."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from moco.memory import ROOM, Verdict, gib, memory_of, refuse_or_warn, shortage
from moco.precision import not_deterministic
from moco.train.task import Needs, Task


def check_step(make_task: type[Task], config: Any, device: torch.device) -> None:
    """Warn of a step that takes more memory than is free; all ranks together.

    Raises:
        TrainingError: a step takes far more memory than the device has, or has no deterministic
            kernel on a GPU (--deterministic).
    """
    needs, found = _rehearse(make_task, config), None
    if needs is not None:
        found = _judge_kernels(needs, config, device)
        found = found or _judge_memory(needs, make_task, config, device)
    refuse_or_warn(found)


def _rehearse(make_task: type[Task], config: Any) -> Needs | None:
    """None where the task does not say, torch knows no shape of some operation, or the images do
    not fit."""
    try:
        return make_task(config).rehearse()
    except (RuntimeError, ValueError):
        return None


def _judge_kernels(needs: Needs, config: Any, device: torch.device) -> Verdict:
    names = not_deterministic(needs.operations)
    if not names or not config.speed.deterministic or device.type != "cuda":
        return None
    return True, (
        f"--deterministic: a step calls {', '.join(names)}, and torch has no deterministic kernel "
        "for that on a GPU; leave the flag out, or choose another -a"
    )


def _judge_memory(
    needs: Needs, make_task: type[Task], config: Any, device: torch.device
) -> Verdict:
    memory = memory_of(device)
    here = config.placement.local_processes if device.type == "cpu" else 1
    found = shortage(needs.memory(device) * here, memory, device, here)
    if found is None:
        return None
    most = int(ROOM * memory.free / here)
    fixed = replace(needs, step=0).memory(device)
    advice = _advice(make_task, config, device, most) if fixed < most else None
    impossible, text = found
    queue = " or --moco-k" if hasattr(config.encoder, "moco_k") else ""
    return impossible, text + (advice or f"choose a smaller -a or --image-size{queue}")


def _advice(make_task: type[Task], config: Any, device: torch.device, most: int) -> str | None:
    """Flags with which a step takes at most so many bytes in each process."""
    for flags, smaller in _smaller(config):
        needs = _rehearse(make_task, smaller)
        if needs is not None and needs.memory(device) <= most:
            return f"with {flags} it would take about {gib(needs.memory(device))}"
    return None


def _smaller(config: Any) -> Iterator[tuple[str, Any]]:
    """Configs that need less memory, what changes least first; with the flags that make them."""
    optim, size = config.optim, config.views.image_size
    share = optim.batch_size // config.placement.processes
    parts = [n for n in range(optim.accumulate + 1, share // 2 + 1) if share % n == 0]
    batches = [optim.batch_size // n for n in (2, 4, 8, 16, 32, 64) if optim.batch_size % n == 0]
    sizes = [px for px in (size // 2, size // 4) if px >= 32]
    tried = [({"accumulate": n}, size) for n in parts]
    tried += [({"batch_size": n}, size) for n in batches]
    tried += [({"accumulate": n}, px) for px in sizes for n in [optim.accumulate, *parts]]
    for changes, px in tried:
        changed = {n: value for n, value in changes.items() if value != getattr(optim, n)}
        flags = [f"--{name.replace('_', '-')} {value}" for name, value in changed.items()]
        flags += [f"--image-size {px}"] * (px != size)
        views = replace(config.views, image_size=px)
        try:
            smaller = replace(config, optim=replace(optim, **changed), views=views)
        except ValueError:  # batch-norm groups that do not divide it
            continue
        yield " ".join(flags), smaller
