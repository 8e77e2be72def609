"""What uniformity can reach: for any distribution, and for any set of n points.

Two estimators of uniformity over n points are in use. They are one number in two scales:

    without self-pairs, the mean over i < j (`align_uniform.metrics.uniformity`):   u
    with self-pairs, the mean over all n^2 pairs (i, j), i = j among them:          v
    exp(v) = (n-1)/n exp(u) + 1/n,

since the n self-pairs have potential 1. The second one is the value of a distribution, the
empirical one, so that what holds for all distributions holds for it.
"""

from __future__ import annotations

import math

import torch

from align_uniform._checks import check_positive


def uniformity_infimum(dim: int, t: float = 2) -> float:
    """Least uniformity of any distribution on the unit sphere in `dim` dimensions.

        -2t + log 0F1(; dim/2; t^2),

    attained by the uniform distribution only (arXiv:2005.10242, appendix A.1, Corollary 1). It
    bounds the population value and the estimator with self-pairs; the estimator without them can
    go below, down to `uniformity_sample_bound`.

    Args:
        dim: dimension C of the space around the sphere, >= 2.
        t: inverse temperature of the Gaussian potential, > 0.

    Returns:
        A float in (-4t, 0), with t unit-free as in `uniform_loss`.

    Raises:
        ValueError: for another dim or t.
    """
    _check_count(dim, "dim")
    check_positive(t, "t")
    return -2 * t + log_hyp0f1(dim / 2, torch.tensor(t * t, dtype=torch.float64)).item()


def log_hyp0f1(b: float, z: torch.Tensor) -> torch.Tensor:
    """log 0F1(; b; z), the logarithm of the confluent hypergeometric limit function.

        0F1(; b; z) = sum_n z^n / (n! (b)_n)

    Of use here because, with b = dim/2, E exp(<v, u>) = 0F1(; b; |v|^2/4) for u uniform on the unit
    sphere. Accurate to 1e-12 (all terms are positive: a log-sum-exp over lgamma).

    Args:
        b: > 0.
        z: any shape, >= 0.

    Returns:
        float64, of z's shape.
    """
    z = z.double()
    # Terms grow until n(n + b) = z, hence n <= sqrt(z), and fall faster than geometrically then.
    n = torch.arange(int(4 * z.max().sqrt()) + 64, dtype=torch.float64)
    b_t = torch.tensor(b, dtype=torch.float64)
    log_coefficients = torch.lgamma(b_t) - torch.lgamma(n + 1) - torch.lgamma(n + b_t)
    return (torch.xlogy(n, z.unsqueeze(-1)) + log_coefficients).logsumexp(dim=-1)


def uniformity_sample_bound(n: int, dim: int, t: float = 2, *, self_pairs: bool = False) -> float:
    """What the uniformity of n points on the unit sphere in `dim` dimensions cannot go below.

    Without self-pairs the larger of

        -2t n/(n-1)                                          few points
        log( (n exp(infimum) - 1) / (n-1) )                  many points

    The first is Jensen's inequality: the mean squared distance of n unit vectors is at most
    2n/(n-1), and equal to it where they sum to zero. A regular simplex, possible for
    n <= dim + 1, has no other distance and attains it. The second is Corollary 1 for the empirical
    distribution, self-pairs taken out; it says nothing while n exp(infimum) <= 1, and both
    estimators of growing uniform sets tend to it. With self-pairs: `add_self_pairs` of the above,
    which is never below `uniformity_infimum(dim, t)`.

    Args:
        n: number of points, >= 2.
        dim, t: as in `uniformity_infimum`.
        self_pairs: which estimator.

    Raises:
        ValueError: for another n, dim or t.
    """
    infimum = uniformity_infimum(dim, t)
    _check_count(n, "n")
    bound = -2 * t * n / (n - 1)
    if infimum > -math.log(n):
        bound = max(bound, remove_self_pairs(infimum, n))
    return add_self_pairs(bound, n) if self_pairs else bound


def add_self_pairs(value: float, n: int) -> float:
    """From uniformity without self-pairs of n points to that with them.

        log( ((n-1) exp(value) + 1) / n )

    Raises:
        ValueError: n below 2.
    """
    _check_count(n, "n")
    return math.log1p((n - 1) / n * math.expm1(value))


def remove_self_pairs(value: float, n: int) -> float:
    """From uniformity with self-pairs of n points to that without them.

        log( (n exp(value) - 1) / (n-1) )

    Raises:
        ValueError: n below 2, or a value that self-pairs alone exceed: not above -log n.
    """
    _check_count(n, "n")
    if not value > -math.log(n):
        raise ValueError(
            f"{value!r} is no uniformity with self-pairs of {n} points, which is above -log n = "
            f"{-math.log(n):.6g}; is it one without them?"
        )
    return math.log1p(n / (n - 1) * math.expm1(value))


def can_collapse(
    align_w: float, unif_w: float, t: float, *, alpha: float = 2, push: float = 1
) -> bool:
    """Whether features at one point can be an attractor of align_w * L_align + unif_w * L_uniform.

    Near one point, with deviations d of variance s^2 and correlation rho within positive pairs,

        L_align(2) = 2 (1 - rho) s^2        L_uniform(t) = -2 t s^2 * push

    to second order, so spread shrinks where align_w (1 - rho) > push * t * unif_w. rho is the
    data's and the encoder's affair, and not negative for views of one image: with align_w <= push *
    t * unif_w nothing collapses; above it what two views share too little of does. InfoNCE adds
    contr_w * rho / (2 tau) to the right side: it spreads what views share, and excludes nothing.

    Args:
        align_w, unif_w: weights.
        t: of uniformity.
        alpha: of alignment. The rule is of alpha 2: with less, one point always attracts features
            near it, and with more never; False for both.
        push: how much uniformity there is: 1 where it is averaged over both views, 2 where it is
            summed over two encoders, `queue_push` of MoCo's.

    Returns:
        True where the weights alone do not exclude a collapse.
    """
    return alpha == 2 and align_w > push * t * unif_w


def queue_push(n: int, k: int, *, intra_batch: bool = True) -> float:
    """`push` in `can_collapse` of uniformity against a queue (Eq. 22; 1 for Eq. 21).

    Keys are constants, so of a pair query - key only the query moves, of a pair within the batch
    both do. N K + N(N-1)/2 pairs are averaged, and each query is in K of the first kind and in
    N - 1 of the second: near one point it feels 2t unif_w d_i times

        (K + N - 1) / (K + (N-1)/2)

    and 2 align_w (d_i - d_key), which is as in the batch once the key encoder has followed. It is
    1 to 1.34 with K >= N, and 1.0002 with 32 images and 65,536 keys.

    Args:
        n: images that are paired with each other, k: length of the queue, both >= 1.
    """
    return (k + n - 1) / (k + (n - 1) / 2) if intra_batch else 1.0


def _check_count(value: int, name: str) -> None:
    if not value >= 2 or value % 1 != 0:  # NaN and infinity are no whole numbers either
        raise ValueError(f"{name} must be a whole number of at least 2, got {value!r}")
