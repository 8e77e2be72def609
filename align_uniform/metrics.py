"""Alignment and uniformity of whole feature sets (arXiv:2005.10242, section 4.1).

Unlike the losses these check their input, take any number of rows, sum in float64 and return plain
floats. Compute them on features of held-out images: for `alignment`, row i of x and of y are two
augmented views of image i; for `uniformity`, each image stands in x once.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Largest accepted | |x_i| - 1 |: well above the rounding of a normalisation in the given type, far
# below any feature that was not normalised.
_UNIT_TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 1e-2}
_UNIT_TOLERANCE[torch.bfloat16] = 3e-2


@torch.no_grad()
def alignment(x: Tensor, y: Tensor, alpha: float = 2) -> float:
    """Mean distance of positive pairs to the power alpha, mean_i ||x_i - y_i||^alpha.

    Args:
        x, y: (N, C) features of N positive pairs, unit rows, N >= 2.
        alpha: exponent, > 0.

    Returns:
        A float in [0, 2^alpha]; lower is better aligned.

    Raises:
        ValueError: rows not of unit length, NaN, fewer than two rows, shapes that differ.
    """
    _check_unit_rows(x, "x")
    _check_unit_rows(y, "y")
    if x.shape != y.shape:
        raise ValueError(
            f"x and y must pair up row by row, got shapes {tuple(x.shape)} and {tuple(y.shape)}"
        )
    if not 0 < alpha < math.inf:
        raise ValueError(f"alpha must be a positive finite number, got {alpha!r}")
    total = 0.0
    for a, b in zip(x.split(65536), y.split(65536), strict=True):
        distance = torch.linalg.vector_norm(a.double() - b.double(), dim=1)
        total += distance.pow(alpha).sum().item()
    return total / len(x)


@torch.no_grad()
def uniformity(x: Tensor, t: float = 2, *, block_size: int = 2048) -> float:
    """Log of the mean Gaussian potential over all N(N-1)/2 unordered pairs, without self-pairs.

        log( 2 / (N(N-1)) * sum_{i<j} exp(-t ||x_i - x_j||^2) )

    Products in the type of x (float32 for half precision), sums in float64, in blocks: memory does
    not grow with N, time does as N^2 C.

    Args:
        x: (N, C) features, unit rows, N >= 2.
        t: inverse temperature of the potential, > 0.
        block_size: rows per block; changes time and memory, not the result.

    Returns:
        A float in [-4t, 0]; lower is more uniform, 0 is collapsed. Compare it with
        `align_uniform.bounds.uniformity_infimum(C, t)`.

    Raises:
        ValueError: rows not of unit length, NaN, fewer than two rows, t not positive.
    """
    _check_unit_rows(x, "x")
    if not 0 < t < math.inf:
        raise ValueError(f"t must be a positive finite number, got {t!r}")
    if block_size < 1:
        raise ValueError(f"block_size must be at least 1, got {block_size!r}")
    if x.dtype in (torch.float16, torch.bfloat16):
        x = x.float()
    blocks = x.split(block_size)
    norms = [block.double().square().sum(dim=1).to(x.dtype) for block in blocks]
    # Sum of exp(-t (d^2 - nearest)), with the least squared distance so far taken out: for large t
    # the plain exponentials are all zero in float32.
    nearest, total = math.inf, 0.0
    for i, rows in enumerate(blocks):
        for j in range(i + 1):
            with torch.autocast(x.device.type, enabled=False):
                products = rows @ blocks[j].t()
            squared = norms[i][:, None] + norms[j] - 2 * products
            squared.clamp_(min=0)
            if i == j:  # pairs below the diagonal only
                ones = torch.ones_like(squared, dtype=torch.bool)
                squared.masked_fill_(ones.triu_(), math.inf)
            least = squared.min().item()
            if least == math.inf:  # a block of one row has no pair with itself
                continue
            if least < nearest:
                total *= math.exp(-t * (nearest - least)) if total else 1.0
                nearest = least
            total += squared.sub_(nearest).mul_(-t).exp_().sum(dtype=torch.float64).item()
    return math.log(total) - t * nearest - math.log(len(x) * (len(x) - 1) / 2)


def _check_unit_rows(x: Tensor, name: str) -> None:
    if not isinstance(x, Tensor) or x.dtype not in _UNIT_TOLERANCE:
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"{name} must be a floating-point torch tensor, got {got}")
    if x.dim() != 2:
        raise ValueError(f"{name} must have shape (N, C), got {tuple(x.shape)}")
    if len(x) < 2:
        raise ValueError(f"{name} must have at least 2 rows, got {len(x)}")
    lengths = torch.linalg.vector_norm(x.double(), dim=1)
    if not lengths.isfinite().all():
        row = int((~lengths.isfinite()).nonzero()[0])
        raise ValueError(f"{name} has NaN or infinite values, first in row {row}")
    error = (lengths - 1).abs()
    if error.max() > _UNIT_TOLERANCE[x.dtype]:
        row = int(error.argmax())
        raise ValueError(
            f"rows of {name} must have unit length, got {lengths[row].item():.6g} in row {row}; "
            "normalise first: torch.nn.functional.normalize(x, dim=1)"
        )
