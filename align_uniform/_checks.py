"""Checks of arguments that several modules share."""

from __future__ import annotations

import math
import warnings
from numbers import Real

import torch
from torch import Tensor, nn

# Largest accepted | |x_i| - 1 |: well above the rounding of a normalisation in the given type, far
# below any feature that was not normalised.
UNIT_TOLERANCE = {
    torch.float64: 1e-3,
    torch.float32: 1e-3,
    torch.float16: 1e-2,
    torch.bfloat16: 3e-2,
}


def check_positive(value: float, name: str) -> None:
    """Raise ValueError unless value is a number in (0, infinity)."""
    if not (isinstance(value, Real) and 0 < value < math.inf):
        raise ValueError(f"{name} must be a positive finite number, got {value!r}")


def check_alpha(alpha: float, x: Tensor, y: Tensor, distance: str = "||x - y||") -> None:
    """Raise ValueError unless an alignment loss of x and y has this exponent, and a slope where one
    is asked for."""
    check_positive(alpha, "alpha")
    if alpha < 1 and torch.is_grad_enabled() and (x.requires_grad or y.requires_grad):
        raise ValueError(
            f"alpha={alpha:g} cannot be trained with: the slope of {distance}^alpha is infinite at "
            "coincident points for alpha < 1; use alpha >= 1"
        )


def unit_rows(x: Tensor, name: str, normalize: bool) -> Tensor:
    """The rows checked and, if asked for, divided by their length (then at least float32)."""
    if not isinstance(x, Tensor) or x.dtype not in UNIT_TOLERANCE:
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(
            f"{name} must be a floating-point torch tensor, got {got}; convert it first: "
            "torch.as_tensor(...).float()"
        )
    if x.dim() != 2 or x.shape[1] == 0:
        raise ValueError(
            f"{name} must have shape (N, C), got {tuple(x.shape)}; one feature per row, other "
            "dimensions flattened"
        )
    if len(x) < 2:
        raise ValueError(f"{name} must have at least 2 rows, got {len(x)}; add images")
    lengths = row_lengths(x)
    if not lengths.isfinite().all():
        row = int((~lengths.isfinite()).nonzero()[0])
        raise ValueError(
            f"{name} has NaN or infinite values, first in row {row}; leave such rows out or mend "
            "what made them"
        )
    if normalize:
        if not lengths.all():
            row = int((lengths == 0).nonzero()[0])
            raise ValueError(f"row {row} of {name} is zero and has no direction; leave it out")
        x = x.to(torch.promote_types(torch.float32, x.dtype))
        return x / lengths.to(x.dtype)[:, None]
    error = (lengths - 1).abs()
    if error.max() > UNIT_TOLERANCE[x.dtype]:
        row = int(error.argmax())
        raise ValueError(
            f"rows of {name} must have unit length, got {lengths[row].item():.6g} in row {row}; "
            "pass normalize=True to divide each by its length"
        )
    return x


def row_lengths(x: Tensor) -> Tensor:
    """(N,) float64; in blocks, because torch makes a float64 copy of what it is given."""
    blocks = x.split(65536)
    return torch.cat([torch.linalg.vector_norm(b, dim=1, dtype=torch.float64) for b in blocks])


class UnitLengthWarning:
    """Warns once in a process of features that are far from unit length, without a wait.

    On the CPU each call looks at its own lengths. On a GPU they are copied to the host in the
    background, and a later call looks at them when they have arrived.
    """

    def __init__(self) -> None:
        self.warned = False
        self.pending: tuple[torch.cuda.Event, str] | None = None
        self.copied: Tensor | None = None  # (2,) least and greatest length, in pinned memory

    def look_at(self, rows: Tensor, name: str) -> None:
        """Look at the lengths of (N, C) rows. The tolerance is that of bfloat16 for all types,
        since features may have been rounded before they were cast."""
        if self.warned or torch.compiler.is_compiling() or type(rows) not in (Tensor, nn.Parameter):
            return
        if rows.device.type == "cuda":
            self._look_later(rows.detach(), name)
        elif rows.device.type == "cpu":
            try:
                least, greatest = torch.linalg.vector_norm(rows.detach(), dim=1).aminmax()
                self._judge(least.item(), greatest.item(), name)
            except RuntimeError:  # under torch.func.vmap there are no numbers to look at
                return

    def _look_later(self, rows: Tensor, name: str) -> None:
        if torch.cuda.is_current_stream_capturing():
            return
        if self.pending is not None:
            event, earlier = self.pending
            if not event.query():
                return
            self.pending = None
            self._judge(*self.copied.tolist(), earlier)
        if self.copied is None:
            self.copied = torch.empty(2, pin_memory=True)
        lengths = torch.stack(torch.linalg.vector_norm(rows, dim=1).aminmax()).float()
        self.copied.copy_(lengths, non_blocking=True)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(rows.device))
        self.pending = event, name

    def _judge(self, least: float, greatest: float, name: str) -> None:
        tolerance = max(UNIT_TOLERANCE.values())
        if not (least < 1 - tolerance or greatest > 1 + tolerance):  # NaN is others' business
            return
        self.warned = True
        warnings.warn(
            f"features are not of unit length: {name} has lengths from {least:.4g} to "
            f"{greatest:.4g}. Ranges and bounds of the losses are those of unit rows; pass "
            "F.normalize(features, dim=1). (Said once.)",
            stacklevel=5,  # the caller of the loss
        )
