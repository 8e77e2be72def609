"""What can be known of an encoder without labels beside alignment and uniformity: how its features
use their dimensions (alpha-ReQ, Wasserstein uniformity), how far they tell images apart (LiDAR).

Gaussian-kernel uniformity hardly sees that dimensions are lost: in 128 dimensions, features spread
evenly over 64 of them have a uniformity (t = 2) of -3.88, the least possible being -3.94, and look
better than features that use all 128 around a mean of length 0.2, which have -3.78. Wasserstein
uniformity is 0.77 for the former and 0.20 for the latter (arXiv:2403.00642).

As in `align_uniform.metrics`, features are unit rows on held-out images, each image once;
`normalize=True` divides rows by their length first. Everything is computed in float64.
`jackknife_interval` gives an interval for any of these, and for `effective_rank`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from align_uniform._checks import unit_rows
from align_uniform.metrics import outer_sum

LIDAR_DELTA, LIDAR_EPSILON = 1e-4, 1e-7  # as published


@torch.no_grad()
def alpha_req(
    x: Tensor, *, first: int = 3, last: int = 100, normalize: bool = False
) -> float | None:
    """Exponent of the decay of the covariance's eigenvalues, lambda_i ~ i^(-alpha) (alpha-ReQ,
    Agrawal et al., NeurIPS 2022).

        -(slope of log lambda_i over log i, by least squares), i = first, ..., last

    Features that transfer well were found to have alpha near 1: of larger ones few dimensions carry
    all, of smaller ones noise has as many as the images. Which eigenvalues are fitted decides the
    number; compare like with like.

    Args:
        x: (N, C) features, unit rows, N >= 2; N >= 10 last, or the tail is that of the sample.
        first, last: 1-based, of the descending eigenvalues. Fewer where there are fewer that are
            not zero.

    Returns:
        A float >= 0; None where fewer than two eigenvalues are left to fit.

    Raises:
        ValueError: as `align_uniform.metrics.effective_rank`; first or last out of order.
    """
    if not 1 <= first < last:
        raise ValueError(f"first and last must be 1 <= first < last, got {first!r} and {last!r}")
    values = _eigenvalues(unit_rows(x, "x", normalize)).flip(0)  # descending
    kept = values[values > values[0] * len(values) * torch.finfo(values.dtype).eps]
    fitted = kept[first - 1 : last]
    if len(fitted) < 2:
        return None
    i = torch.arange(first, first + len(fitted), dtype=values.dtype, device=values.device).log()
    i = i - i.mean()
    return -((i * fitted.log()).sum() / i.square().sum()).item()


@torch.no_grad()
def wasserstein_uniformity(x: Tensor, *, normalize: bool = False) -> float:
    """Wasserstein distance of features, taken as a Gaussian, to N(0, I/C), which uniform features
    approach (Fang et al., ICLR 2024, arXiv:2403.00642).

        ( |mu|^2 + 1 + tr(S) - 2/sqrt(C) tr(S^(1/2)) )^(1/2)

    with mu the mean and S the covariance (over N) of the rows.

    Args:
        x: (N, C) features, unit rows, N >= 2. Of uniform features about (C / 4N)^(1/2) is left
            where N is not many times C.

    Returns:
        A float in [0, sqrt(2)]; lower is more uniform, sqrt(2) is collapsed to a point. With r of C
        dimensions used evenly it is (2 - 2 (r/C)^(1/2))^(1/2).

    Raises:
        ValueError: as `align_uniform.metrics.effective_rank`.
    """
    x = unit_rows(x, "x", normalize)
    values = _eigenvalues(x).clamp(min=0)
    mean = x.mean(dim=0, dtype=torch.float64)
    root = values.sqrt().sum() * 2 / math.sqrt(x.shape[1])
    return (mean.square().sum() + 1 + values.sum() - root).clamp(min=0).sqrt().item()


@torch.no_grad()
def lidar(views: Tensor, *, normalize: bool = False) -> float:
    """Effective rank of linear discriminant analysis where each image is a class and its views are
    the samples (LiDAR, Thilak et al., ICLR 2024, arXiv:2312.04000).

        S_b = sum_i (mu_i - mu)(mu_i - mu)^T / (n - 1)
        S_w = sum_iv (x_iv - mu_i)(x_iv - mu_i)^T / (n (q - 1)) + delta I
        p_k = lambda_k / sum_l lambda_l + epsilon,   exp( -sum_k p_k log p_k )

    with mu_i the mean of image i's views, mu that of all, and lambda the eigenvalues of
    S_w^(-1/2) S_b S_w^(-1/2); delta = 1e-4 and epsilon = 1e-7. It counts the dimensions in which
    images differ by more than their views do. Published with n = 1000 images of q = 50 views.

    Args:
        views: (n, q, C) features of q views of n images, unit rows, n and q >= 2.

    Returns:
        A float from 1 to min(C, n - 1) (epsilon adds up to a share of 2e-6 C to it).

    Raises:
        ValueError: another shape, rows not of unit length, NaN.
    """
    if views.dim() != 3 or min(views.shape[:2]) < 2:
        raise ValueError(
            f"views must have shape (images, views, C), with two of each at least, got "
            f"{tuple(views.shape)}"
        )
    n, q, dim = views.shape
    rows = unit_rows(views.reshape(n * q, dim), "views", normalize)
    means = rows.view(n, q, dim).double().mean(dim=1)  # (n, C)
    between = outer_sum(means - means.mean(dim=0)) / (n - 1)
    within = outer_sum(rows, means.repeat_interleave(q, dim=0)) / (n * (q - 1))
    within.diagonal().add_(LIDAR_DELTA)
    # Eigenvalues of S_w^(-1/2) S_b S_w^(-1/2) are those of L^(-1) S_b L^(-T), S_w = L L^T.
    root = torch.linalg.cholesky(within)
    half = torch.linalg.solve_triangular(root, between, upper=False)
    values = torch.linalg.eigvalsh(torch.linalg.solve_triangular(root, half.t(), upper=False))
    values = values.clamp(min=0)
    total = values.sum()
    if not total:
        return 1.0  # all images at one place
    return torch.special.entr(values / total + LIDAR_EPSILON).sum().exp().item()


@torch.no_grad()
def jackknife_interval(
    metric: Callable[..., float],
    *sets: Tensor,
    confidence: float = 0.95,
    groups: int = 20,
    seed: int = 0,
) -> tuple[float, float]:
    """Confidence interval of a metric over images, by leaving out one group of them at a time.

        m(all) -+ t sqrt( (G - 1)/G sum_g (m_g - mean m)^2 )

    with m_g the metric without group g, and t the quantile of Student's distribution of G - 1
    degrees of freedom. For metrics of a spectrum this is fitter than a bootstrap, of which each
    resample has a third fewer different images, and so a lower rank. It takes G times as long as
    the metric.

    Args:
        metric: called with rows of `sets`, gives a float.
        sets: first axis: images, the same in all.
        confidence: in (0, 1).
        groups: G >= 2, at most half as many as there are images; images are dealt at random.
        seed: of that.

    Returns:
        (low, high). The interval knows nothing of a metric's range, nor of a bias that all images
        share.

    Raises:
        ValueError: too few images; other numbers; whatever the metric raises.
    """
    n = len(sets[0])
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, such as 0.95, got {confidence!r}")
    if groups < 2 or n < 2 * groups:
        raise ValueError(
            f"groups must be at least 2 and at most half the {n} images, got {groups!r}"
        )
    dealt = torch.randperm(n, generator=torch.Generator().manual_seed(seed)) % groups
    left = torch.tensor(
        [metric(*(x[(dealt != g).to(x.device)] for x in sets)) for g in range(groups)],
        dtype=torch.float64,
    )
    error = ((groups - 1) * left.var(correction=0)).sqrt().item()
    reach = _student_quantile((1 + confidence) / 2, groups - 1) * error
    value = metric(*sets)
    return value - reach, value + reach


def _student_quantile(p: float, degrees: int) -> float:
    """By the expansion around the normal quantile (Abramowitz & Stegun, 26.7.5); within 1 % for 5
    degrees and p up to 0.995."""
    z = torch.special.ndtri(torch.tensor(p, dtype=torch.float64)).item()
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return z + sum(term / degrees ** (i + 1) for i, term in enumerate(terms))


def _eigenvalues(x: Tensor) -> Tensor:
    """Of the rows' covariance (over N), ascending, (C,) float64."""
    mean = x.mean(dim=0, dtype=torch.float64)
    return torch.linalg.eigvalsh(outer_sum(x, mean.expand(len(x), -1)) / len(x))
