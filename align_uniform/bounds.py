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
    if not dim >= 2 or dim % 1 != 0:  # NaN and infinity are no whole numbers either
        raise ValueError(f"dim must be a whole number of at least 2, got {dim!r}")
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
    _check_count(n)
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
    _check_count(n)
    return math.log1p((n - 1) / n * math.expm1(value))


def remove_self_pairs(value: float, n: int) -> float:
    """From uniformity with self-pairs of n points to that without them.

        log( (n exp(value) - 1) / (n-1) )

    Raises:
        ValueError: n below 2, or a value that self-pairs alone exceed: not above -log n.
    """
    _check_count(n)
    if not value > -math.log(n):
        raise ValueError(
            f"{value!r} is no uniformity with self-pairs of {n} points, which is above -log n = "
            f"{-math.log(n):.6g}; is it one without them?"
        )
    return math.log1p(n / (n - 1) * math.expm1(value))


def collapse_ratio(align_w: float, unif_w: float, t: float, *, summed: int = 1) -> float:
    """How strongly align_w * align(alpha=2) + unif_w * uniform(t) pulls all features into a point.

        align_w / (summed * t * unif_w)

    Up to 1 the collapsed solution repels: features near one point move apart. Above 1 it attracts
    once the deviations of a positive pair are correlated by less than 1 - 1/ratio. (Of deviations
    d_i from the point, to second order: alignment is E|d - d'|^2 = 2 (1 - rho) E|d|^2, each
    encoder's uniformity -t E|d_i - d_j|^2 = -2t E|d|^2; both views' mean has this slope per view.)

    Args:
        summed: encoders over which uniformity is summed; 1 where it is one encoder's, or the mean
            over the two views.

    Returns:
        At least 0; infinite without uniformity.

    Raises:
        ValueError: negative weights, t not positive.
    """
    check_positive(t, "t")
    if not (align_w >= 0 and unif_w >= 0):
        raise ValueError(f"weights must be at least 0, got {align_w!r} and {unif_w!r}")
    return align_w / (summed * t * unif_w) if unif_w else math.inf


def _check_count(n: int) -> None:
    if not n >= 2 or n % 1 != 0:
        raise ValueError(f"n must be a whole number of at least 2, got {n!r}")
