"""What an evaluation takes of memory, before it starts: a step of fine-tuning, or a batch through a
frozen encoder."""

from __future__ import annotations

import copy

import torch
from torch import nn

from moco.config import LinclsConfig
from moco.memory import (
    ROOM,
    Verdict,
    gib,
    memory_of,
    refuse_or_warn,
    rehearse,
    shortage,
)
from moco.precision import half_precision


def check_memory(encoder: nn.Module, config: LinclsConfig, device: torch.device) -> None:
    """Warn of batches that take more memory than is free; all ranks together.

    Raises:
        TrainingError: they take far more than the device has.
    """
    refuse_or_warn(_judge(encoder, config, device))


def _judge(encoder: nn.Module, config: LinclsConfig, device: torch.device) -> Verdict:
    processes, batch = config.placement.processes, config.optim.batch_size
    here = config.placement.local_processes if device.type == "cpu" else 1
    memory, taken = memory_of(device), memory_taken(encoder, config, batch // processes)
    found = taken and shortage(taken * here, memory, device, here)
    if not found:
        return None
    impossible, text = found
    for smaller in (batch // n for n in (2, 4, 8, 16, 32, 64, 128) if batch % (n * processes) == 0):
        less = memory_taken(encoder, config, smaller // processes) if smaller > processes else None
        if less is not None and less * here <= ROOM * memory.free:
            return impossible, text + f"with --batch-size {smaller} it would take about {gib(less)}"
    return impossible, text + "choose a smaller --image-size"


def memory_taken(encoder: nn.Module, config: LinclsConfig, images: int) -> int | None:
    """Bytes of a step of one process beside the encoder itself; None where torch knows no shape of
    some operation."""
    learns, amp, size = config.protocol.finetune, config.source.amp, config.source.image_size
    try:
        step = rehearse(
            lambda: copy.deepcopy(encoder).requires_grad_(learns),
            (images, 3, size, size),
            dtype=half_precision(amp) or torch.float32,
            directions=int(learns),
            keys=not learns,
        )
    except (RuntimeError, ValueError):
        return None
    copies = 3.0 * learns  # momentum, and a copy of both while they are saved
    copies += learns and config.placement.processes > 1  # gradients, as they are sent
    copies += amp != "off"  # weights in half precision, gradients in full
    return step.peak + int(copies * step.weights)
