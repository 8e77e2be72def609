"""The losses of neighbouring sentences, held to reference_sentences.py and to values by hand."""

from __future__ import annotations

import math

import pytest
import reference_sentences as reference
import torch
import torch.nn.functional as F
from torch import Tensor

from align_uniform.sentences import (
    adjacent_align_loss,
    adjacent_contrastive_loss,
    summed_uniform_loss,
)

DOCUMENTS = {
    "one": [0, 0, 0, 0, 0, 0, 0],
    "border in the middle": [0, 0, 0, 1, 1, 1, 1],
    "a document of one sentence": [4, 4, 5, 6, 6, 6, 7],
}


def features(k: int, dim: int = 5, seed: int = 0, dtype=torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    u, v = torch.randn(2, k, dim, generator=generator, dtype=torch.float64)
    return F.normalize(u, dim=1).to(dtype), F.normalize(v, dim=1).to(dtype)


@pytest.mark.parametrize("documents", DOCUMENTS.values(), ids=DOCUMENTS)
@pytest.mark.parametrize("tau", [0.005, 0.075, 1.0])
def test_contrastive_is_the_cross_entropy_with_the_neighbours(documents, tau) -> None:
    u, v = features(7)
    for zero_diagonal in (False, True):
        loss = adjacent_contrastive_loss(
            u, v, tau, torch.tensor(documents), zero_diagonal=zero_diagonal
        )
        expected = reference.contrastive(u.tolist(), v.tolist(), tau, documents, zero_diagonal)
        assert loss.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("documents", DOCUMENTS.values(), ids=DOCUMENTS)
@pytest.mark.parametrize("alpha", [1, 1.5, 2, 3])
def test_alignment_is_over_the_same_pairs_with_the_same_weights(documents, alpha) -> None:
    u, v = features(7)
    loss = adjacent_align_loss(u, v, alpha, torch.tensor(documents))
    assert loss.item() == pytest.approx(reference.align(u.tolist(), v.tolist(), alpha, documents))


@pytest.mark.parametrize("k", [2, 3, 4, 9])
def test_forward_alignment_is_the_printed_sum_up_to_k_minus_1(k) -> None:
    u, v = features(k)
    loss = adjacent_align_loss(u, v, 2, pairs="forward")
    assert loss.item() == pytest.approx(reference.align_as_printed(u.tolist(), v.tolist(), 2))
    u, v = u[:1].expand(k, -1), -u[:1].expand(k, -1)
    for pairs in ("forward", "both"):  # the weights add up to 1
        assert adjacent_align_loss(u, v, 2, pairs=pairs).item() == pytest.approx(4)


def test_values_by_hand() -> None:
    """On axes: similarity 1 of equal ones and 0 of different ones, squared distance 0 and 2."""
    axes = torch.eye(4, dtype=torch.float64)
    e, two = math.e, torch.tensor([0, 1])
    # K = 2: p_1 = e_2, p_2 = e_1. u_1 = v_2, u_2 = v_1.
    u, v = axes[two], axes[two.flip(0)]
    assert adjacent_align_loss(u, v).item() == 0
    assert adjacent_contrastive_loss(u, v, 1).item() == pytest.approx(math.log(1 + 1 / e))
    assert adjacent_align_loss(u, u).item() == pytest.approx(2)
    # K = 3: v_1 = v_3 = u_2, and v_2 = u_1 = u_3: all neighbours coincide.
    u, v = axes[torch.tensor([0, 1, 0])], axes[torch.tensor([1, 0, 1])]
    outer, inner = math.log(2 / e + 1), math.log(2 + 1 / e)
    assert adjacent_align_loss(u, v).item() == 0
    assert adjacent_contrastive_loss(u, v, 1).item() == pytest.approx((2 * outer + inner) / 3)
    # K = 4: u_i = v_i = e_i: all neighbours are orthogonal, each sentence is like itself.
    u = axes
    assert adjacent_align_loss(u, u).item() == pytest.approx(2)
    assert adjacent_contrastive_loss(u, u, 1).item() == pytest.approx(math.log(e + 3))
    zeroed = adjacent_contrastive_loss(u, u, 1, zero_diagonal=True)
    assert zeroed.item() == pytest.approx(math.log(4))
    assert summed_uniform_loss(u, u[[0, 0, 0, 0]], 2).item() == pytest.approx(-4)


def test_uniformity_is_the_sum_over_both_encoders() -> None:
    u, v = features(6)
    expected = reference.uniform(u.tolist(), 5) + reference.uniform(v.tolist(), 5)
    assert summed_uniform_loss(u, v, 5).item() == pytest.approx(expected)


def test_no_neighbours_at_all_are_zero_without_slope() -> None:
    u, v = features(3)
    u.requires_grad_()
    alone = torch.tensor([0, 1, 2])
    loss = adjacent_contrastive_loss(u, v, 0.1, alone) + adjacent_align_loss(u, v, 2, alone)
    loss.backward()
    assert loss.item() == 0 and not u.grad.any()


def test_gradients_are_the_slopes() -> None:
    u, v = (x.requires_grad_() for x in features(4, 3))
    documents = torch.tensor([0, 0, 1, 1])
    assert torch.autograd.gradcheck(
        lambda u, v: adjacent_contrastive_loss(u, v, 0.3, documents), (u, v)
    )
    for pairs in ("both", "forward"):
        assert torch.autograd.gradcheck(
            lambda u, v, pairs=pairs: adjacent_align_loss(u, v, 1.5, documents, pairs=pairs), (u, v)
        )


def test_coincident_features_have_a_finite_slope_at_alpha_1() -> None:
    u = F.normalize(torch.ones(4, 3), dim=1).requires_grad_()
    adjacent_align_loss(u, u.detach(), 1).backward()
    assert u.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_half_precision_is_computed_in_float32(dtype) -> None:
    u, v = features(50, 16, dtype=dtype)
    documents = [0] * 20 + [1] * 30
    for tau in (0.005, 0.075):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = adjacent_contrastive_loss(u, v, tau, torch.tensor(documents))
        expected = reference.contrastive(u.double().tolist(), v.double().tolist(), tau, documents)
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(expected, rel=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = adjacent_align_loss(u, v, 2, torch.tensor(documents))
    expected = reference.align(u.double().tolist(), v.double().tolist(), 2, documents)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_arguments_that_are_refused() -> None:
    u, v = (x.float() for x in features(4))
    long = torch.zeros(4, dtype=torch.long)
    for call, message in (
        (lambda: adjacent_contrastive_loss(u, v, 0), "tau must be a positive"),
        (lambda: adjacent_align_loss(u, v, -1), "alpha must be a positive"),
        (lambda: adjacent_align_loss(u.requires_grad_(), v, 0.5), "use alpha >= 1"),
        (lambda: adjacent_align_loss(u, v, pairs="back"), "pairs must be one of both, forward"),
        (lambda: summed_uniform_loss(u, v, 0), "t must be a positive"),
        (lambda: adjacent_contrastive_loss(u, v[:3], 1), "expected shape"),
        (lambda: adjacent_contrastive_loss(u[:1], v[:1], 1), "at least 2 sentences, got 1"),
        (lambda: adjacent_contrastive_loss(u, v, 1, long[:3]), r"documents must have shape \(4,\)"),
        (lambda: adjacent_align_loss(u, v, 2, [0, 0, 0, 0]), "documents must have shape"),
        (lambda: adjacent_align_loss(u.long(), v), "floating-point"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
