"""What uniformity cannot go below, held against points that attain it and a search for less."""

import math

import pytest
import reference
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from align_uniform.bounds import (
    add_self_pairs,
    remove_self_pairs,
    uniformity_infimum,
    uniformity_sample_bound,
)
from align_uniform.metrics import uniformity


def simplex(n: int, dim: int) -> Tensor:
    """n points of equal distances that sum to zero, (n, dim) float64; n <= dim + 1."""
    corners = torch.eye(n, dtype=torch.float64) - 1 / n  # in a space of n - 1 dimensions
    _, _, axes = torch.linalg.svd(corners)
    inside = corners @ axes[: n - 1].t()
    return F.pad(F.normalize(inside, dim=1), (0, dim - n + 1))


@pytest.mark.parametrize("t", [0.01, 0.5, 2, 8, 100])
@pytest.mark.parametrize(("n", "dim"), [(2, 2), (2, 128), (3, 2), (4, 3), (9, 8), (5, 16)])
def test_simplex_attains_the_bound(n: int, dim: int, t: float) -> None:
    """An antipodal pair is the one of two points: -4t."""
    points = simplex(n, dim)
    for self_pairs in (False, True):
        bound = uniformity_sample_bound(n, dim, t, self_pairs=self_pairs)
        loop = reference.loop_uniform(points, t, self_pairs=self_pairs)
        assert loop == pytest.approx(bound, rel=1e-9)
    assert uniformity_sample_bound(2, dim, t) == pytest.approx(-4 * t)


@pytest.mark.parametrize("t", [0.5, 2, 5])
def test_many_points_around_the_circle_attain_the_bound(t: float) -> None:
    """With self-pairs they are at the infimum itself, to rounding: quadrature of a smooth
    periodic function. Without, they are below it, at the other term of the bound."""
    angle = torch.arange(200, dtype=torch.float64) * (2 * math.pi / 200)
    points = torch.stack([angle.cos(), angle.sin()], dim=1)
    for self_pairs in (False, True):
        bound = uniformity_sample_bound(200, 2, t, self_pairs=self_pairs)
        assert uniformity(points, t, self_pairs=self_pairs) == pytest.approx(bound, rel=1e-9)
    assert uniformity(points, t) < uniformity_infimum(2, t) - 1e-3


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    n=st.integers(2, 40),
    dim=st.integers(2, 6),
    t=st.floats(0.05, 20),
    seed=st.integers(0, 10**6),
)
def test_no_points_go_below(n: int, dim: int, t: float, seed: int) -> None:
    points = F.normalize(
        torch.randn(n, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)),
        dim=1,
    )
    u, v = uniformity(points, t), uniformity(points, t, self_pairs=True)
    assert u >= uniformity_sample_bound(n, dim, t) - 1e-9
    assert v >= uniformity_sample_bound(n, dim, t, self_pairs=True) - 1e-9
    assert v >= uniformity_infimum(dim, t)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(n=st.integers(2, 10**6), value=st.floats(-30, 0))
def test_relation_of_the_estimators(n: int, value: float) -> None:
    v = add_self_pairs(value, n)
    assert math.exp(v) == pytest.approx((n - 1) / n * math.exp(value) + 1 / n, rel=1e-9)
    if math.exp(value) > 1e-6 / n:
        back = math.exp(remove_self_pairs(v, n))
        assert back == pytest.approx(math.exp(value), rel=1e-6, abs=1e-12)
    assert add_self_pairs(0, n) == remove_self_pairs(0, n) == 0, "collapsed is collapsed"


@pytest.mark.parametrize("n", [1, 0, -2, 2.5])
def test_n_must_be_a_number_of_points(n: float) -> None:
    calls = (
        lambda: uniformity_sample_bound(n, 3),
        lambda: add_self_pairs(-1, n),
        lambda: remove_self_pairs(-1, n),
    )
    for call in calls:
        with pytest.raises(ValueError, match=rf"^n must .*at least 2, got {n}"):
            call()


def test_refusals() -> None:
    with pytest.raises(ValueError, match="^dim .*got 1"):
        uniformity_sample_bound(10, 1)
    for wrong in (math.nan, math.inf, 2.5):
        with pytest.raises(ValueError, match="^dim must be a whole number"):
            uniformity_infimum(wrong)
        with pytest.raises(ValueError, match="^n must be a whole number"):
            uniformity_sample_bound(wrong, 8)
    with pytest.raises(ValueError, match="^t .*got -1"):
        uniformity_sample_bound(10, 3, -1)
    with pytest.raises(ValueError, match="-3.9 is no uniformity with self-pairs of 10 points"):
        remove_self_pairs(-3.9, 10)
