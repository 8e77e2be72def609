"""The losses of sentence encoders: Quick-Thought vectors, apart into alignment and uniformity.

Two encoders f and g read K consecutive sentences, u_i = f(s_i) and v_i = g(s_i); the neighbours of
a sentence are its positives (Logeswaran & Lee 2018; arXiv:2005.10242, appendix B.3). With one
neighbour p_i is 1 there, with two 1/2 at each:

    p_1 = e_2,   p_K = e_{K-1},   p_i = (e_{i-1} + e_{i+1}) / 2

Shapes: K sentences, C feature dimension; `u, v` are (K, C) with unit rows, whose gradient flows to
both. `documents` is (K,), a whole number for each sentence: sentences of different documents are no
neighbours. A sentence without a neighbour has no term of its own, and the losses are means over
those that have one; where there is none at all, they are 0 without slope.

All losses return a float32 scalar (float64 for float64 input), under autocast as well.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from align_uniform._checks import check_alpha, check_positive
from align_uniform.losses import _check_features, _in_full_precision, _unit_length, uniform_loss

PAIRS = ("both", "forward")


@_in_full_precision
def adjacent_contrastive_loss(
    u: Tensor,
    v: Tensor,
    tau: float,
    documents: Tensor | None = None,
    *,
    zero_diagonal: bool = False,
) -> Tensor:
    """Contrastive loss of neighbouring sentences (arXiv:2005.10242, appendix B.3).

        1/K sum_i sum_j -p_i(j) log( exp(<u_i, v_j>/tau) / sum_l exp(<u_i, v_l>/tau) )

    One direction: rows of f against columns of g. The sentence itself, l = i, stays among the
    columns. The paper introduces tau and leaves it out of the printed formula.

    Args:
        u, v: (K, C) features by f and g, unit rows, K >= 2.
        tau: temperature, > 0.
        documents: (K,) see above; None takes all for one document.
        zero_diagonal: the original Quick-Thought loss, for features of any length: <u_i, v_i> is
            set to 0, and so stays in the sum as exp(0).

    Returns:
        Scalar >= 0; log K when all similarities are equal. Where each sentence has two neighbours
        it is at least log 2.

    Raises:
        ValueError: for shapes, dtypes or a tau other than the above.
    """
    _check(u, v, documents)
    check_positive(tau, "tau")
    if not zero_diagonal:
        _unit_length.look_at(u, "u of adjacent_contrastive_loss")
        _unit_length.look_at(v, "v of adjacent_contrastive_loss")
    logits = u @ v.t() / tau  # (K, K)
    if zero_diagonal:
        logits = logits.masked_fill(torch.eye(len(u), dtype=torch.bool, device=u.device), 0)
    log_p = F.log_softmax(logits, dim=1)
    after, before = _weights(u, documents)
    return -(after @ log_p.diagonal(1) + before @ log_p.diagonal(-1))


@_in_full_precision
def adjacent_align_loss(
    u: Tensor,
    v: Tensor,
    alpha: float = 2,
    documents: Tensor | None = None,
    *,
    pairs: str = "both",
) -> Tensor:
    """Alignment of neighbouring sentences, the positives of `adjacent_contrastive_loss` with its
    weights (arXiv:2005.10242, appendix B.3).

        both:    1/K sum_i sum_j p_i(j) ||u_i - v_j||^alpha
        forward: 1/K [ sum_{i=2}^{K-1} 1/2 (||u_{i-1} - v_i||^alpha + ||u_i - v_{i+1}||^alpha)
                       + ||u_1 - v_2||^alpha + ||u_{K-1} - v_K||^alpha ]

    The paper prints the second, with K-2 for K-1, so that its weights add up to (K-1)/K only. With
    the first, at alpha 2 and unit rows, the contrastive loss is this loss / (2 tau) - 1/tau + the
    mean log-sum-exp.

    Args:
        u, v: (K, C) features by f and g, unit rows, K >= 2.
        alpha: exponent, > 0; at least 1 when a gradient is asked for, because below 1 the slope is
            infinite where features coincide.
        documents: (K,) see above; None takes all for one document.
        pairs: "both", or "forward": sentence i of f with i + 1 of g only.

    Returns:
        Scalar in [0, 2^alpha]; 0 when all neighbours coincide.

    Raises:
        ValueError: for shapes, dtypes, pairs or an alpha other than the above.
    """
    _check(u, v, documents)
    check_alpha(alpha, u, v, "||u - v||")
    if pairs not in PAIRS:
        raise ValueError(f"pairs must be one of {', '.join(PAIRS)}, got {pairs!r}")
    _unit_length.look_at(u, "u of adjacent_align_loss")
    _unit_length.look_at(v, "v of adjacent_align_loss")
    after, before = _weights(u, documents)
    forward = torch.linalg.vector_norm(u[:-1] - v[1:], dim=1).pow(alpha)
    if pairs == "forward":
        return (after + before) @ forward
    return after @ forward + before @ torch.linalg.vector_norm(u[1:] - v[:-1], dim=1).pow(alpha)


def summed_uniform_loss(u: Tensor, v: Tensor, t: float = 2) -> Tensor:
    """Uniformity of both encoders, `uniform_loss(u, t) + uniform_loss(v, t)`: the sum, not the
    mean (arXiv:2005.10242, appendix B.3, which prints the potentials without their logs).

    Args:
        u, v: (K, C) features by f and g, unit rows, K >= 2.
        t: inverse temperature of the potential, > 0.

    Returns:
        Scalar in [-8t, 0]; 0 when each encoder's features coincide.

    Raises:
        ValueError: for shapes, dtypes or t other than the above.
    """
    _check(u, v, None)
    return uniform_loss(u, t) + uniform_loss(v, t)


def _weights(u: Tensor, documents: Tensor | None) -> tuple[Tensor, Tensor]:
    """Of each two sentences in a row, i and i + 1: the weight of (u_i, v_{i+1}) and that of
    (u_{i+1}, v_i), (K-1,) each. All together add up to 1."""
    linked = u.new_ones(len(u) - 1)
    if documents is not None:
        linked = (documents[1:] == documents[:-1]).to(u)
    neighbours = F.pad(linked, (0, 1)) + F.pad(linked, (1, 0))  # (K,) of each sentence
    sentences = (neighbours > 0).sum().clamp(min=1)
    share = 1 / (neighbours.clamp(min=1) * sentences)
    return linked * share[:-1], linked * share[1:]


def _check(u: Tensor, v: Tensor, documents: Tensor | None) -> None:
    _check_features(u, "u")
    _check_features(v, "v", like=u)
    if len(u) < 2:
        raise ValueError(f"neighbours need at least 2 sentences, got {len(u)}")
    if documents is None:
        return
    if not isinstance(documents, Tensor) or documents.shape != u.shape[:1]:
        got = tuple(documents.shape) if isinstance(documents, Tensor) else type(documents).__name__
        raise ValueError(f"documents must have shape ({len(u)},), one for each sentence, got {got}")
