"""Kernel density estimates on the circle, and known distributions to compare them with."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from align_uniform._checks import check_positive
from align_uniform.metrics import uniformity

BANDWIDTH = 0.1  # of both kernel density estimates: on the circle, in radians


def gaussian_kde(points: Tensor, xs: Tensor, ys: Tensor, bandwidth: float = BANDWIDTH) -> Tensor:
    """Gaussian kernel density estimate in the plane, on the grid ys x xs.

        p(z) = 1/N sum_i exp(-||z - points_i||^2 / (2 h^2)) / (2 pi h^2)

    Args:
        points: (N, 2), N >= 1.
        xs, ys: (A,) and (B,) coordinates of the grid.
        bandwidth: h, > 0.

    Returns:
        (B, A) float64, per unit of area.

    Raises:
        ValueError: another shape, no points, or a bandwidth that is not positive.
    """
    if points.dim() != 2 or points.shape[1] != 2 or not len(points):
        raise ValueError(f"points must have shape (N >= 1, 2), got {tuple(points.shape)}")
    check_positive(bandwidth, "bandwidth")

    def kernel(at: Tensor, centres: Tensor) -> Tensor:  # in one dimension: the other factors out
        z = (at.double()[:, None] - centres.double()) / bandwidth
        return torch.exp(-z.square() / 2) / (math.sqrt(2 * math.pi) * bandwidth)

    return kernel(ys, points[:, 1]) @ kernel(xs, points[:, 0]).t() / len(points)


def von_mises_kde(angles: Tensor, at: Tensor, bandwidth: float = BANDWIDTH) -> Tensor:
    """Von Mises-Fisher kernel density estimate on the circle, by angle.

        p(a) = 1/N sum_i exp(kappa cos(a - angles_i)) / (2 pi I_0(kappa)),   kappa = 1 / h^2

    so that a narrow kernel is a Gaussian of standard deviation h radians.

    Args:
        angles: (N,) in radians, N >= 1.
        at: (A,) angles at which the density is wanted.
        bandwidth: h, > 0.

    Returns:
        (A,) float64, per radian: its integral over the circle is 1.

    Raises:
        ValueError: another shape, no angles, or a bandwidth that is not positive.
    """
    if angles.dim() != 1 or not len(angles):
        raise ValueError(f"angles must have shape (N >= 1,), got {tuple(angles.shape)}")
    check_positive(bandwidth, "bandwidth")
    kappa = torch.tensor(1 / bandwidth**2, dtype=torch.float64)
    total = torch.zeros(len(at), dtype=torch.float64)
    for block in angles.double().split(8192):
        total += torch.exp(kappa * (torch.cos(at.double()[:, None] - block) - 1)).sum(dim=1)
    # i0e is exp(-kappa) I_0: both sides lose a factor that would overflow.
    return total / (2 * math.pi * torch.special.i0e(kappa) * len(angles))


def average_potential(x: Tensor, t: float = 2) -> float:
    """Average pairwise Gaussian potential, mean over i < j of exp(-t ||x_i - x_j||^2).

    The exponential of `align_uniform.metrics.uniformity`, which says what x may be; in (0, 1].
    """
    return math.exp(uniformity(x, t))


def von_mises_sample(n: int, mean: float, kappa: float, generator: torch.Generator) -> Tensor:
    """n points (n, 2) on the circle around the angle `mean`; kappa 0 is uniform."""
    grid = torch.linspace(-math.pi, math.pi, 2**14 + 1, dtype=torch.float64)
    density = torch.exp(kappa * (torch.cos(grid) - 1))
    cumulative = torch.cat([density.new_zeros(1), torch.cumulative_trapezoid(density, grid)])
    draws = torch.rand(n, dtype=torch.float64, generator=generator) * cumulative[-1]
    right = torch.searchsorted(cumulative, draws).clamp(1, len(grid) - 1)
    below, above = cumulative[right - 1], cumulative[right]
    share = (draws - below) / (above - below).clamp(min=1e-300)
    angles = mean + grid[right - 1] + share * (grid[right] - grid[right - 1])
    return torch.stack([angles.cos(), angles.sin()], dim=1)


def circle_distributions(n: int = 10_000, seed: int = 0) -> dict[str, Tensor]:
    """Points (n, 2) on the circle from chosen distributions, from uniform to a single point."""
    generator = torch.Generator().manual_seed(seed)

    def mixture(means: Sequence[float], kappa: float) -> Tensor:
        sizes = [n // len(means) + (i < n % len(means)) for i in range(len(means))]
        return torch.cat(
            [von_mises_sample(s, m, kappa, generator) for s, m in zip(sizes, means, strict=True)]
        )

    thirds = [math.pi / 2 + 2 * math.pi * i / 3 for i in range(3)]
    return {
        "uniform": mixture([0], 0),
        "vMF, κ = 1": mixture([0], 1),
        "3 vMFs, κ = 20": mixture(thirds, 20),
        "2 vMFs, κ = 20": mixture([0, math.pi], 20),
        "vMF, κ = 20": mixture([0], 20),
        "one point": torch.tensor([[1.0, 0.0]], dtype=torch.float64).expand(n, 2),
    }
