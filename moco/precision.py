"""Numerics of the encoders: mixed precision, memory format, choice of kernels."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator

import torch


def autocast(device: torch.device, amp: str) -> torch.autocast:
    """Context for the forward pass. amp: "off" (float32), "bf16" or "fp16"."""
    dtype = half_precision(amp)
    return torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)


def half_precision(amp: str) -> torch.dtype | None:
    """The type of most activations; None without mixed precision."""
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(amp)


def memory_format(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


def channels_last_helps(device: torch.device, amp: str) -> bool:
    """Measured on a CPU: 1.02 to 1.28 times as fast."""
    return device.type == "cpu" or amp != "off"


# What torch.use_deterministic_algorithms refuses on a GPU, by the names of its operations: those of
# the list in its documentation that a network may call.
_NOT_DETERMINISTIC = {
    f"aten::{name}"
    for name in (
        *("_adaptive_avg_pool2d_backward", "_adaptive_avg_pool3d_backward"),
        *("adaptive_max_pool2d_backward", "adaptive_max_pool3d_backward", "avg_pool3d_backward"),
        *("fractional_max_pool2d_backward", "fractional_max_pool3d_backward"),
        *("max_unpool2d", "max_unpool3d"),
        *("upsample_linear1d_backward", "upsample_trilinear3d_backward"),
        *("upsample_bilinear2d_backward", "_upsample_bilinear2d_aa_backward"),
        *("upsample_bicubic2d_backward", "_upsample_bicubic2d_aa_backward"),
        *("reflection_pad1d_backward", "reflection_pad2d_backward", "reflection_pad3d_backward"),
        *("grid_sampler_2d_backward", "grid_sampler_3d_backward", "_embedding_bag_backward"),
        *("nll_loss_forward", "nll_loss2d_forward", "_ctc_loss_backward"),
        *("put_", "histc", "median", "nanmedian", "kthvalue"),
    )
}


def not_deterministic(operations: Iterable[str]) -> list[str]:
    """Those of the operations that have no deterministic kernel on a GPU, by name."""
    return sorted(name.removeprefix("aten::") for name in _NOT_DETERMINISTIC & set(operations))


@contextlib.contextmanager
def kernels(deterministic: bool) -> Iterator[None]:
    """Within, torch chooses the fastest kernels for the sizes at hand, or only such that give the
    same bits every time. Convolutions of float32 use TF32 either way, as is torch's default;
    matrix products have full precision, because the losses need it, also where the environment
    (TORCH_ALLOW_TF32_CUBLAS_OVERRIDE in NVIDIA's containers) has chosen TF32."""
    cudnn = torch.backends.cudnn
    algorithms = torch.are_deterministic_algorithms_enabled()
    only_warn = torch.is_deterministic_algorithms_warn_only_enabled()
    before = cudnn.deterministic, cudnn.benchmark
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
    with _full_products():
        torch.use_deterministic_algorithms(deterministic)
        cudnn.deterministic, cudnn.benchmark = deterministic, not deterministic
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(algorithms, warn_only=only_warn)
            cudnn.deterministic, cudnn.benchmark = before


@contextlib.contextmanager
def _full_products() -> Iterator[None]:
    """Torch 2.9 has a setting for each backend beside the one of all, and refuses to read the
    latter where a caller has changed the former."""
    backends, of_all = [], None
    if hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        backends = [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul]
    before = [backend.fp32_precision for backend in backends]
    with contextlib.suppress(RuntimeError):
        of_all = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        if of_all is not None:
            torch.set_float32_matmul_precision(of_all)
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision
