"""Numerics of the encoders: mixed precision, memory format, choice of kernels."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch


def autocast(device: torch.device, amp: str) -> torch.autocast:
    """Context for the forward pass. amp: "off" (float32), "bf16" or "fp16"."""
    dtype = torch.float16 if amp == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype=dtype, enabled=amp != "off")


def memory_format(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


def channels_last_helps(device: torch.device, amp: str) -> bool:
    """Measured on a CPU: 1.02 to 1.28 times as fast."""
    return device.type == "cpu" or amp != "off"


@contextlib.contextmanager
def kernels(deterministic: bool) -> Iterator[None]:
    """Within, torch chooses the fastest kernels for the sizes at hand, or only such that give the
    same bits every time. Convolutions of float32 use TF32 either way, as is torch's default;
    matrix products keep full precision, because the losses need it."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.cudnn.deterministic,
        torch.backends.cudnn.benchmark,
    )
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
    _choose_kernels(deterministic, deterministic, not deterministic)
    try:
        yield
    finally:
        _choose_kernels(*before)


def _choose_kernels(algorithms: bool, cudnn: bool, benchmark: bool) -> None:
    torch.use_deterministic_algorithms(algorithms)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = cudnn, benchmark
