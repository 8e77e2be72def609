"""What uniformity can reach: the optimum on the hypersphere (arXiv:2005.10242, appendix A.1)."""

from __future__ import annotations

import math

import torch


def uniformity_infimum(dim: int, t: float = 2) -> float:
    """Least uniformity of any distribution on the unit sphere in `dim` dimensions.

        -2t + log 0F1(; dim/2; t^2),

    attained by the uniform distribution only (arXiv:2005.10242, appendix A.1.1). It bounds the
    value of the population; the estimator over a finite sample without self-pairs can go below.

    Args:
        dim: dimension C of the space around the sphere, >= 2.
        t: inverse temperature of the Gaussian potential, > 0.

    Returns:
        A float in (-4t, 0), with t unit-free as in `uniform_loss`.

    Raises:
        ValueError: for another dim or t.
    """
    if dim < 2 or dim != int(dim):
        raise ValueError(f"dim must be a whole number of at least 2, got {dim!r}")
    if not 0 < t < math.inf:
        raise ValueError(f"t must be a positive finite number, got {t!r}")
    # 0F1(; b; z) = sum_n z^n / (n! (b)_n), all terms positive: a log-sum-exp over lgamma. Terms
    # grow until n(n + b) = t^2, hence n <= t, and fall faster than geometrically after that.
    b = dim / 2
    n = torch.arange(int(4 * t) + 64, dtype=torch.float64)
    b_t = torch.tensor(b, dtype=torch.float64)
    log_terms = 2 * n * math.log(t) - torch.lgamma(n + 1) - torch.lgamma(n + b) + torch.lgamma(b_t)
    return -2 * t + torch.logsumexp(log_terms, dim=0).item()
