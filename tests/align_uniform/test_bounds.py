"""What uniformity cannot go below, held against points that attain it and a search for less."""

import math

import pytest
import reference
import scipy.special
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
    log_hyp0f1,
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


def test_infimum_and_its_series_equal_scipys() -> None:
    """-2t + log 0F1(; dim/2; t^2); where scipy's series overflows, by its scaled Bessel function:
    0F1(; v + 1; t^2) = Gamma(v + 1) I_v(2t) / t^v, with v = dim/2 - 1."""
    for dim in (2, 3, 4, 5, 16, 128, 129, 512, 2048):
        for t in (0.01, 0.5, 1, 2, 3, 10, 30, 100):
            expected = -2 * t + math.log(scipy.special.hyp0f1(dim / 2, t**2))
            assert uniformity_infimum(dim, t) == pytest.approx(expected, rel=1e-9, abs=1e-10)
    t = 2000.0
    for dim in (128, 512):
        assert not math.isfinite(scipy.special.hyp0f1(dim / 2, t**2))
        v = dim / 2 - 1
        expected = math.lgamma(v + 1) - v * math.log(t) + math.log(scipy.special.ive(v, 2 * t))
        assert uniformity_infimum(dim, t) == pytest.approx(expected, rel=1e-9)
    z = torch.tensor([[0.0, 1e-6, 0.3], [2.0, 50.0, 900.0]])
    for b in (1.0, 1.5, 4.0, 64.0):
        expected = torch.from_numpy(scipy.special.hyp0f1(b, z.double().numpy())).log()
        torch.testing.assert_close(log_hyp0f1(b, z), expected, rtol=1e-9, atol=1e-9)


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
    points = reference.unit_rows(n, dim, seed)
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


def test_refusals() -> None:
    calls = {
        "dim": (uniformity_infimum, lambda dim: uniformity_sample_bound(10, dim)),
        "n": (
            lambda n: uniformity_sample_bound(n, 3),
            lambda n: add_self_pairs(-1, n),
            lambda n: remove_self_pairs(-1, n),
        ),
    }
    for wrong in (1, 0, -3, 2.5, math.nan, math.inf):
        for name, calls_with_it in calls.items():
            for call in calls_with_it:
                with pytest.raises(ValueError, match=f"^{name} must be a whole .*got {wrong}"):
                    call(wrong)
    with pytest.raises(ValueError, match="^t .*got -1"):
        uniformity_sample_bound(10, 3, -1)
    with pytest.raises(ValueError, match="-3.9 is no uniformity with self-pairs of 10 points"):
        remove_self_pairs(-3.9, 10)


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


def near_one_point(weights, n: int, generator, shared=0.0) -> Tensor:
    """Features of noise, alone (rho is 0) or with what positives share (rho is 1/2)."""
    v = torch.randn(n, weights.shape[1], dtype=torch.float64, generator=generator) + shared
    ones = torch.ones(n, 1, dtype=torch.float64)
    return F.normalize(torch.cat([ones, v @ weights.t()], dim=1), dim=1)


def batch_loss(align_w, contr_w=0.0, shared=0):
    """Of two views in a batch, unif_w 0.5, t 2; `shared` 1: half of their variance is common."""

    def step(weights, _, generator):
        common = shared * torch.randn(256, 6, dtype=torch.float64, generator=generator)
        x, y = (near_one_point(weights, 256, generator, common) for _ in range(2))
        uniform = (uniform_loss(x, 2) + uniform_loss(y, 2)) / 2
        contrastive = in_batch_contrastive_loss(x, y, 0.5)
        return contr_w * contrastive + align_w * align_loss(x, y) + 0.5 * uniform

    return step


def queue_loss(align_w, intra_batch):
    """Of 128 queries with a queue of as many keys, unif_w 0.5, t 2."""

    def step(weights, keys, generator):
        q = near_one_point(weights, 128, generator)
        k, queue = (near_one_point(keys, 128, generator) for _ in range(2))
        uniform = uniform_loss_with_queue(q, queue.t(), 2, intra_batch)
        return align_w * align_loss(q, k) + 0.5 * uniform

    return step


def sentence_loss(align_w, contr_w=0.0, shared=0):
    """Of neighbours in documents of two by two encoders, unif_w 0.25, t 2; `shared` 1: half of the
    variance of a document is common, and the encoders are one."""
    documents = torch.arange(64).repeat_interleave(2)

    def step(weights, _, generator):
        common = shared * torch.randn(64, 6, dtype=torch.float64, generator=generator)[documents]
        halves = weights.chunk(1 if shared else 2, dim=1)
        common = common[:, : halves[0].shape[1]]
        found = [near_one_point(half, 128, generator, common) for half in halves]
        u, v = found[0], found[-1]
        align, uniform = adjacent_align_loss(u, v, 2, documents), summed_uniform_loss(u, v, 2)
        contrastive = adjacent_contrastive_loss(u, v, 0.5, documents)
        return contr_w * contrastive + align_w * align + 0.25 * uniform

    return step


RULE = {  # of align_w: the loss, its unif_w and push; on this side of the line, and on that
    "batch": (batch_loss, 0.5, 1, 0.8, 1.25),
    "Eq. 21": (lambda w: queue_loss(w, False), 0.5, queue_push(9, 9, intra_batch=False), 0.8, 1.2),
    "Eq. 22": (lambda w: queue_loss(w, True), 0.5, queue_push(128, 128), 1.15, 1.6),
    "two encoders": (sentence_loss, 0.25, 2, 0.8, 1.25),
}


@pytest.mark.parametrize("name", RULE)
def test_the_rule_of_collapse_is_what_small_runs_do(name: str) -> None:
    loss, unif_w, push, safe, unsafe = RULE[name]
    for align_w, collapses in ((safe, False), (unsafe, True)):
        assert can_collapse(align_w, unif_w, 2, push=push) == collapses
        spread = spread_after(loss(align_w), 150 if name in ("Eq. 21", "Eq. 22") else 60)
        assert spread < 0.6 if collapses else spread > 1.6


@pytest.mark.parametrize("loss", [batch_loss, sentence_loss])
def test_infonce_spreads_what_positives_share(loss) -> None:
    """Half of the variance is shared, so align_w 2.5 counts 1.25; uniformity counts 1, and InfoNCE
    of tau 0.5 contr_w / 2: the line is at 0.5."""
    assert spread_after(loss(2.5, 0.0, 1)) < 0.5
    assert spread_after(loss(2.5, 0.2, 1)) < 0.5
    assert spread_after(loss(2.5, 1.0, 1)) > 2


def test_the_rule_and_the_papers_rows() -> None:
    """BookCorpus, two encoders: 0.9 and 0.1 with t 2 collapsed, with t 5 did not; ImageNet-100 with
    1.8 and 0.2 did. The default of main_moco.py is safe. Other alphas are not judged."""
    assert can_collapse(0.9, 0.1, 2, push=2) and not can_collapse(0.9, 0.1, 5, push=2)
    assert can_collapse(1.8, 0.2, 2, push=queue_push(32, 16384))
    assert not can_collapse(3, 1, 3, push=queue_push(32, 65536))
    assert can_collapse(1, 0, 2) and not can_collapse(1, 0.1, 2, alpha=3)
    assert queue_push(32, 65536) == pytest.approx(1.0002, abs=1e-4)
    assert queue_push(3, 5) == pytest.approx(7 / 6)  # (K + N - 1) / (K + (N - 1) / 2)
