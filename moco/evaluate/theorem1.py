"""Theorem 1 in numbers: InfoNCE minus log M approaches alignment plus uniformity.

Theorem 1 of arXiv:2005.10242: with M negatives and temperature tau, as M grows,

    L_contr(M) - log M  ->  -E<x, y>/tau + E_x log E_x' exp(<x, x'>/tau)
                         =  L_align/(2 tau) + E_x log E_x' exp(-||x - x'||^2/(2 tau)),

since <x, y> = 1 - ||x - y||^2/2 on the sphere: alignment (alpha 2), and uniformity with
t = 1/(2 tau), except that uniformity has the logarithm outside of the mean over x. By Jensen's
inequality it is never smaller, and equal for the uniform distribution.

Features are drawn from the uniform distribution on the sphere or from a von Mises-Fisher one, for
which the limit is known in closed form, anchor by anchor; a positive is the anchor itself, or with
probability `unaligned` an independent draw. Numpy draws, so that published numbers stay the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from align_uniform.bounds import log_hyp0f1, uniformity_infimum

ANCHORS = 64  # per repeat; they share its negatives


@dataclass(frozen=True)
class Theorem1:
    """What is drawn.

    Attributes:
        dim: of the features, >= 2.
        tau: temperature, > 0.
        unaligned: probability of an independent positive, in [0, 1].
        negatives: numbers M, ascending, at least three.
        repeats: draws of `ANCHORS` anchors and M negatives, >= 2.
        seed: of all draws.
    """

    dim: int = 8
    tau: float = 0.5
    unaligned: float = 0.25
    negatives: Sequence[int] = (16, 64, 256, 1024, 4096, 16384)
    repeats: int = 200
    seed: int = 0


def sample(rng: np.random.Generator, count: int, dim: int, kappa: float) -> np.ndarray:
    """(count, dim) unit rows with density proportional to exp(kappa * x_0): von Mises-Fisher around
    the first axis, uniform for kappa = 0. Wood's rejection method (1994)."""
    rows = rng.standard_normal((count, dim))
    if kappa == 0:
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)
    b = (dim - 1) / (2 * kappa + math.hypot(2 * kappa, dim - 1))
    most = (1 - b) / (1 + b)
    top = kappa * most + (dim - 1) * math.log(1 - most**2)
    height = np.empty(0)
    while len(height) < count:
        z = rng.beta((dim - 1) / 2, (dim - 1) / 2, size=count)
        w = (1 - (1 + b) * z) / (1 - (1 - b) * z)
        accepted = kappa * w + (dim - 1) * np.log(1 - most * w) - top >= np.log(rng.random(count))
        height = np.concatenate([height, w[accepted]])
    rows[:, 0] = 0
    rows *= (np.sqrt(1 - height[:count] ** 2) / np.linalg.norm(rows, axis=1))[:, None]
    rows[:, 0] = height[:count]
    return rows


def log_potential(anchors: np.ndarray, tau: float, kappa: float) -> np.ndarray:
    """log E_x' exp(<x, x'>/tau) for each row of `anchors`, in closed form.

    exp(<x, x'>/tau) times the density's exp(kappa x'_0) is the exponential of one inner product;
    its mean over the sphere is a 0F1 of that vector's length.
    """
    squared = 1 / tau**2 + kappa**2 + 2 * kappa / tau * anchors[:, 0]
    joint, own = (
        log_hyp0f1(anchors.shape[1] / 2, torch.as_tensor(values) / 4).numpy()
        for values in (squared, [kappa**2])
    )
    return joint - own


def mean_similarity(dim: int, kappa: float, unaligned: float) -> float:
    """E<x, y> of a positive pair: 1 where y is x, else |E x|^2."""
    ratio = log_hyp0f1(dim / 2 + 1, torch.tensor([kappa**2 / 4], dtype=torch.float64))
    ratio -= log_hyp0f1(dim / 2, torch.tensor([kappa**2 / 4], dtype=torch.float64))
    mean = kappa / dim * ratio.exp().item()  # |E x|: the derivative of log 0F1 by kappa
    return 1 - unaligned + unaligned * mean**2


def study(kappa: float, setting: Theorem1) -> dict:
    """Deviations from the limit for each M, and their slopes.

    Two deviations are reported: that of the expected loss, and the mean absolute one per anchor,
    which the proof bounds by O(M^(-1/2)). Slopes are fitted to their logarithms over the larger
    half of the M (at small M the positive itself weighs in).

    Args:
        kappa: concentration of the features; 0 is the uniform distribution.
    """
    rng = np.random.default_rng((setting.seed, int(kappa > 0)))
    draws = [
        [repeat(rng, m, kappa, setting) for _ in range(setting.repeats)] for m in setting.negatives
    ]
    # (M, repeats): deviation of the loss, the same per anchor without its sign, and the uniformity.
    signed, absolute, second = np.moveaxis(np.array(draws), 2, 0)
    similarity = mean_similarity(setting.dim, kappa, setting.unaligned)
    limit = second.mean() - similarity / setting.tau
    align = 2 - 2 * similarity
    rows = [
        {
            "M": m,
            "loss_minus_log_m": limit + signed[i].mean(),
            "deviation": signed[i].mean(),
            "deviation_se": signed[i].std(ddof=1) / math.sqrt(setting.repeats),
            "mean_absolute_deviation": absolute[i].mean(),
        }
        for i, m in enumerate(setting.negatives)
    ]
    return {
        "distribution": "uniform" if kappa == 0 else f"von Mises-Fisher, kappa {kappa:g}",
        "anchors": ANCHORS * setting.repeats,
        "limit": limit,
        "alignment": align,
        "alignment_part": align / (2 * setting.tau),
        "uniformity_part": second.mean() - 1 / setting.tau,
        "uniformity_of_the_uniform": uniformity_infimum(setting.dim, 1 / (2 * setting.tau)),
        "rows": rows,
        "slope_of_the_expected_loss": slope(setting.negatives, signed, rng),
        "slope_per_anchor": slope(setting.negatives, absolute, rng),
    }


def repeat(rng: np.random.Generator, m: int, kappa: float, setting: Theorem1) -> tuple:
    """Deviation of the loss and mean absolute deviation per anchor, of ANCHORS anchors with the
    same M negatives; and the mean of the limit's second term."""
    x = sample(rng, ANCHORS, setting.dim, kappa)
    independent = rng.random(ANCHORS) < setting.unaligned
    y = np.where(independent[:, None], sample(rng, ANCHORS, setting.dim, kappa), x)
    second = log_potential(x, setting.tau, kappa)
    # Relative to M E exp(<x, x'>/tau): the sum over the negatives, 1 on average, and the positive.
    negatives = sample(rng, m, setting.dim, kappa)
    scores = x @ negatives.T / setting.tau - second[:, None]  # (ANCHORS, M)
    error = np.exp(scores).mean(axis=1) - 1
    positive = np.exp((x * y).sum(axis=1) / setting.tau - second) / m
    # The loss is log(sum + positive) - <x, y>/tau. The error is zero on average, exactly, and is
    # nearly all of the noise of the mean: it is taken out there (a control variate).
    deviation = np.log1p(error + positive)
    return (deviation - error).mean(), np.abs(deviation).mean(), second.mean()


def slope(negatives: Sequence[int], deviations: np.ndarray, rng: np.random.Generator) -> dict:
    """Slope of log |mean deviation| over log M for the larger half of the M, with its 95 % interval
    over the repeats.

    Args:
        deviations: (M, repeats).
    """
    half = len(negatives) // 2
    negatives, deviations = negatives[half:], deviations[half:]
    x = np.log(negatives) - np.log(negatives).mean()

    def fit(means: np.ndarray) -> np.ndarray:  # (M, ...) -> (...)
        return np.tensordot(x, np.log(np.abs(means)), axes=1) / (x**2).sum()

    repeats = deviations.shape[1]
    chosen = rng.integers(repeats, size=(len(negatives), repeats, 1000))
    resampled = np.take_along_axis(deviations[:, :, None], chosen, axis=1).mean(axis=1)
    low, high = np.quantile(fit(resampled), [0.025, 0.975])
    return {"slope": float(fit(deviations.mean(axis=1))), "low": float(low), "high": float(high)}


def summary(result: dict) -> str:
    """What `study` gives, for people to read."""
    lines = [
        f"{result['distribution']} features",
        f"limit {result['limit']:.4f} = {result['alignment_part']:.4f} (alignment "
        f"{result['alignment']:.4f} / 2 tau) + {result['uniformity_part']:.4f} (uniformity; "
        f"{result['uniformity_of_the_uniform']:.4f} is the least)",
        f"{'M':>7} {'loss - log M':>13} {'deviation':>11} {'+-':>8} {'mean |dev.| per anchor':>23}",
    ]
    lines += [
        f"{row['M']:>7} {row['loss_minus_log_m']:>13.5f} {row['deviation']:>11.2e} "
        f"{row['deviation_se']:>8.0e} {row['mean_absolute_deviation']:>23.5f}"
        for row in result["rows"]
    ]
    for key in ("slope_of_the_expected_loss", "slope_per_anchor"):
        fit, name = result[key], key.replace("_", " ")
        lines.append(f"{name}: {fit['slope']:.3f} (95 % {fit['low']:.3f} to {fit['high']:.3f})")
    return "\n".join(lines)
