"""What uniformity cannot go below, held against points that attain it and a search for less."""

import math

import pytest
import reference
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from align_uniform import (
    align_loss,
    in_batch_contrastive_loss,
    uniform_loss,
    uniform_loss_with_queue,
)
from align_uniform.bounds import (
    add_self_pairs,
    can_collapse,
    queue_push,
    remove_self_pairs,
    uniformity_infimum,
    uniformity_sample_bound,
)
from align_uniform.metrics import uniformity
from align_uniform.sentences import (
    adjacent_align_loss,
    adjacent_contrastive_loss,
    summed_uniform_loss,
)


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


# ---- Collapse: the rule against small runs near one point


def spread_after(step, steps: int = 60) -> float:
    """How many times as far from one point the features of f(v) = normalize(1, W v) are after some
    steps of gradient descent as before.

    Args:
        step: (W, W of the key encoder, generator) -> loss.
    """
    generator = torch.Generator().manual_seed(0)
    weights = (0.01 * torch.randn(3, 6, dtype=torch.float64, generator=generator)).requires_grad_()
    before, keys = weights.norm().item(), weights.detach().clone()
    for _ in range(steps):
        (gradient,) = torch.autograd.grad(step(weights, keys, generator), weights)
        with torch.no_grad():
            weights -= 0.1 * gradient
            keys.lerp_(weights, 0.2)
    return weights.norm().item() / before


def near_one_point(weights, n: int, generator, shared=0.0) -> torch.Tensor:
    """Features of noise, alone (rho is 0) or with what positives share (rho is 1/2)."""
    v = torch.randn(n, weights.shape[1], dtype=torch.float64, generator=generator) + shared
    ones = torch.ones(n, 1, dtype=torch.float64)
    return torch.nn.functional.normalize(torch.cat([ones, v @ weights.t()], dim=1), dim=1)


@pytest.mark.parametrize(("align_w", "collapses"), [(0.8, False), (1.25, True)])
def test_collapse_within_the_batch(align_w: float, collapses: bool) -> None:
    """unif_w 0.5 and t 2: the line is at 1."""

    def step(weights, _, generator):
        x, y = (near_one_point(weights, 256, generator) for _ in range(2))
        return align_w * align_loss(x, y) + 0.5 * (uniform_loss(x, 2) + uniform_loss(y, 2)) / 2

    assert can_collapse(align_w, 0.5, 2) == collapses
    assert (spread_after(step) < 0.5) == collapses
    assert (spread_after(step) > 2) != collapses


@pytest.mark.parametrize(
    ("align_w", "intra_batch", "collapses"),
    [(0.8, False, False), (1.2, False, True), (1.15, True, False), (1.6, True, True)],
)
def test_collapse_with_a_queue(align_w: float, intra_batch: bool, collapses: bool) -> None:
    """With as many keys as queries the line is at 1 for Eq. 21 and at 1.34 for Eq. 22: 1.15 to 1.2
    is on different sides of it."""
    n = 128
    push = queue_push(n, n, intra_batch=intra_batch)

    def step(weights, keys, generator):
        q = near_one_point(weights, n, generator)
        k, queue = (near_one_point(keys, n, generator) for _ in range(2))
        uniform = uniform_loss_with_queue(q, queue.t(), 2, intra_batch)
        return align_w * align_loss(q, k) + 0.5 * uniform

    assert can_collapse(align_w, 0.5, 2, push=push) == collapses
    assert (spread_after(step, 150) < 0.6) == collapses
    assert (spread_after(step, 150) > 1.6) != collapses


@pytest.mark.parametrize(("align_w", "collapses"), [(0.8, False), (1.25, True)])
def test_collapse_of_two_encoders(align_w: float, collapses: bool) -> None:
    """Of sentences and their neighbours, without anything in common; unif_w 0.25 and t 2: the line
    is at 1."""

    def step(weights, _, generator):
        u, v = (near_one_point(half, 128, generator) for half in weights.chunk(2, dim=1))
        return align_w * adjacent_align_loss(u, v) + 0.25 * summed_uniform_loss(u, v, 2)

    assert can_collapse(align_w, 0.25, 2, push=2) == collapses
    assert (spread_after(step) < 0.5) == collapses
    assert (spread_after(step) > 2) != collapses


@pytest.mark.parametrize(("contr_w", "collapses"), [(0, True), (0.2, True), (1, False)])
@pytest.mark.parametrize("method", ["within the batch", "sentences"])
def test_infonce_spreads_what_positives_share(method: str, contr_w: float, collapses: bool) -> None:
    """Half of the variance is shared, so align_w 2.5 counts 1.25; uniformity counts 1, and InfoNCE
    of tau 0.5 contr_w / 2: the line is at 0.5."""

    def within_the_batch(weights, _, generator):
        shared = torch.randn(128, 6, dtype=torch.float64, generator=generator)
        x, y = (near_one_point(weights, 128, generator, shared) for _ in range(2))
        contrastive = in_batch_contrastive_loss(x, y, 0.5)
        uniform = (uniform_loss(x, 2) + uniform_loss(y, 2)) / 2
        return contr_w * contrastive + 2.5 * align_loss(x, y) + 0.5 * uniform

    def sentences(weights, _, generator):  # documents of two, f and g alike
        documents = torch.arange(64).repeat_interleave(2)
        shared = torch.randn(64, 6, dtype=torch.float64, generator=generator)[documents]
        u = near_one_point(weights, 128, generator, shared)
        contrastive = adjacent_contrastive_loss(u, u, 0.5, documents)
        align, uniform = adjacent_align_loss(u, u, 2, documents), summed_uniform_loss(u, u, 2)
        return contr_w * contrastive + 2.5 * align + 0.25 * uniform

    step = within_the_batch if method == "within the batch" else sentences
    assert (spread_after(step) < 0.5) == collapses
    assert (spread_after(step) > 2) != collapses


def test_the_rule_and_the_papers_rows() -> None:
    """BookCorpus, two encoders: 0.9 and 0.1 with t 2 collapsed, with t 5 did not; ImageNet-100 with
    1.8 and 0.2 did. The default of main_moco.py is safe. Other alphas are not judged."""
    assert can_collapse(0.9, 0.1, 2, push=2) and not can_collapse(0.9, 0.1, 5, push=2)
    assert can_collapse(1.8, 0.2, 2, push=queue_push(32, 16384))
    assert not can_collapse(3, 1, 3, push=queue_push(32, 65536))
    assert can_collapse(1, 0, 2) and not can_collapse(1, 0.1, 2, alpha=3)
    assert queue_push(32, 65536) == pytest.approx(1.0002, abs=1e-4)
