"""alpha-ReQ, LiDAR and Wasserstein uniformity, against slow references from the equations."""

from __future__ import annotations

import math

import pytest
import scipy.linalg
import scipy.stats
import torch
import torch.nn.functional as F
from torch import Tensor

from align_uniform.bounds import uniformity_infimum
from align_uniform.metrics import effective_rank, uniformity
from align_uniform.spectrum import (
    _student_quantile,
    alpha_req,
    jackknife_interval,
    lidar,
    wasserstein_uniformity,
)


def rows(n: int, scales: Tensor, seed: int = 0, mean: float = 0.0) -> Tensor:
    """(n, C) float64 unit rows, spread along the axes by `scales` around mean * e_1."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, len(scales), dtype=torch.float64, generator=generator) * scales
    x[:, 0] += mean
    return F.normalize(x, dim=1)


def covariance(x: Tensor) -> Tensor:
    mean = sum(x) / len(x)
    return sum(torch.outer(row - mean, row - mean) for row in x) / len(x)


def test_alpha_req_is_the_slope_of_the_logarithms() -> None:
    x = rows(300, torch.arange(1, 13).double() ** -0.7)
    values = sorted(torch.linalg.eigvals(covariance(x)).real.tolist(), reverse=True)
    for first, last in ((3, 100), (1, 5)):
        kept = range(first, min(last, 12) + 1)
        fit = scipy.stats.linregress(
            [math.log(i) for i in kept], [math.log(values[i - 1]) for i in kept]
        )
        assert alpha_req(x, first=first, last=last) == pytest.approx(-fit.slope, rel=1e-9)
    assert alpha_req(x.float()) == pytest.approx(alpha_req(x), rel=1e-5)
    many = rows(20000, torch.arange(1, 33).double() ** -0.5)
    assert alpha_req(many) == pytest.approx(1, abs=0.1), "lambda_i ~ i^-1 by construction"
    assert alpha_req(rows(50, torch.ones(3)), first=3) is None
    assert alpha_req(torch.ones(9, 4).double() / 2) is None, "collapsed: no eigenvalue at all"
    with pytest.raises(ValueError, match="1 <= first < last"):
        alpha_req(x, first=5, last=5)


def test_wasserstein_uniformity_is_the_distance_of_two_gaussians() -> None:
    """By scipy's square roots of matrices, for any two covariances; and its range."""
    x = rows(80, torch.arange(1, 7).double(), mean=2.0)
    ours, best = covariance(x).numpy(), torch.eye(6).double().numpy() / 6
    root = scipy.linalg.sqrtm(best)
    cross = scipy.linalg.sqrtm(root @ ours @ root).real
    squared = x.mean(dim=0).square().sum().item() + (ours + best - 2 * cross).trace()
    assert wasserstein_uniformity(x) == pytest.approx(math.sqrt(squared), rel=1e-9)
    assert wasserstein_uniformity(3 * x.float(), normalize=True) == pytest.approx(
        math.sqrt(squared), rel=1e-5
    )
    axes = torch.cat([torch.eye(6), -torch.eye(6)])
    assert wasserstein_uniformity(axes) == pytest.approx(0, abs=1e-7)
    assert wasserstein_uniformity(torch.eye(6)[:1].repeat(5, 1)) == pytest.approx(math.sqrt(2))
    assert wasserstein_uniformity(axes[[0, 1, 6, 7]]) == pytest.approx(
        math.sqrt(2 - 2 * math.sqrt(2 / 6))
    )


def test_gaussian_uniformity_does_not_see_lost_dimensions_and_wasserstein_does() -> None:
    """Half of the dimensions lost, against all of them around a mean: the two rank them the other
    way round. As the docs say, with these numbers."""
    half = torch.cat([torch.ones(64), torch.zeros(64)]).double()
    lost, off_centre = rows(4000, half), rows(4000, torch.ones(128).double(), mean=2.31)
    assert off_centre.mean(dim=0).norm() == pytest.approx(0.2, abs=0.01)
    assert uniformity(lost) == pytest.approx(-3.876, abs=0.005)
    assert uniformity(off_centre) == pytest.approx(-3.78, abs=0.01)
    assert uniformity_infimum(128) < uniformity(lost) < uniformity(off_centre)
    assert wasserstein_uniformity(lost) == pytest.approx(math.sqrt(2 - math.sqrt(2)), abs=0.01)
    assert wasserstein_uniformity(off_centre) == pytest.approx(0.22, abs=0.02)
    assert effective_rank(lost) == pytest.approx(64, abs=1)


def slow_lidar(views: Tensor) -> float:
    n, q, c = views.shape
    means = [sum(image) / q for image in views]
    mean = sum(means) / n
    between = sum(torch.outer(m - mean, m - mean) for m in means) / (n - 1)
    within = sum(
        torch.outer(row - m, row - m)
        for image, m in zip(views, means, strict=True)
        for row in image
    ) / (n * (q - 1))
    whiten = scipy.linalg.inv(scipy.linalg.sqrtm((within + 1e-4 * torch.eye(c)).numpy()))
    values = scipy.linalg.eigvalsh(whiten @ between.numpy() @ whiten).clip(0)
    p = values / values.sum() + 1e-7
    return math.exp(-sum(each * math.log(each) for each in p))


def test_lidar_is_the_rank_of_discriminant_analysis() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(30, 1, 8, dtype=torch.float64, generator=generator)
    noise = torch.randn(30, 4, 8, dtype=torch.float64, generator=generator)
    views = F.normalize(images + 0.3 * noise, dim=2)
    assert lidar(views) == pytest.approx(slow_lidar(views), rel=1e-9)
    assert lidar(views.float()) == pytest.approx(lidar(views), rel=1e-4)
    assert 6 < lidar(views) <= 8
    # Images differ in two dimensions only, views in all: the others do not count.
    flat = images.clone()
    flat[..., 2:] = 0
    assert lidar(5 * flat + 0.3 * noise, normalize=True) < 3
    assert lidar(torch.eye(4)[:1].expand(5, 3, 4)) == 1
    assert lidar(F.normalize(images[:4] + 1e-3 * noise[:4], dim=2)) <= 3.001, "n - 1"
    for shape in ((30, 8), (1, 4, 8), (4, 1, 8)):
        with pytest.raises(ValueError, match="views must have shape"):
            lidar(torch.ones(shape))


def test_jackknife_intervals_cover_what_they_should() -> None:
    """Of 60 samples of 200 images, nearly all of those asked for have the population's value."""
    scales = torch.tensor([1.0, 0.8, 0.5, 0.4]).double()
    for metric in (wasserstein_uniformity, effective_rank):
        true, hits = metric(rows(100_000, scales, seed=1)), 0
        for seed in range(60):
            low, high = jackknife_interval(metric, rows(200, scales, seed=100 + seed))
            hits += low <= true <= high
        assert 51 <= hits, metric.__name__
    x = rows(40, scales)
    assert jackknife_interval(effective_rank, x) == jackknife_interval(effective_rank, x)
    narrow = jackknife_interval(effective_rank, x, confidence=0.5)
    wide = jackknife_interval(effective_rank, x)
    assert wide[0] < narrow[0] < effective_rank(x) < narrow[1] < wide[1]
    assert _student_quantile(0.975, 19) == pytest.approx(scipy.stats.t.ppf(0.975, 19), rel=1e-3)
    assert _student_quantile(0.995, 5) == pytest.approx(scipy.stats.t.ppf(0.995, 5), rel=0.01)
    with pytest.raises(ValueError, match="at most half the 40 images, got 21"):
        jackknife_interval(effective_rank, x, groups=21)
    with pytest.raises(ValueError, match="confidence"):
        jackknife_interval(effective_rank, x, confidence=1)
