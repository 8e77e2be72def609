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
    return -2 * t + log_hyp0f1(dim / 2, torch.tensor(float(t * t))).item()


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
