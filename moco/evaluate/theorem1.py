#!/usr/bin/env python
"""Theorem 1 in numbers: InfoNCE minus log M approaches alignment plus uniformity.

    python scripts/theorem1.py [--out FOLDER]

Theorem 1 of arXiv:2005.10242: with M negatives and temperature tau, as M grows,

    L_contr(M) - log M  ->  -E<x, y>/tau + E_x log E_x' exp(<x, x'>/tau)
                         =  L_align/(2 tau) + E_x log E_x' exp(-||x - x'||^2/(2 tau)),

since <x, y> = 1 - ||x - y||^2/2 on the sphere: alignment (alpha 2), and uniformity with
t = 1/(2 tau), except that uniformity has the logarithm outside of the mean over x. By Jensen's
inequality it is never smaller, and equal for the uniform distribution.

Features are drawn from the uniform distribution on the sphere and from a von Mises-Fisher one, for
which the limit is known in closed form, anchor by anchor; a positive is the anchor itself, or with
probability --unaligned an independent draw. Two deviations from the limit are reported: that of the
expected loss, and the mean absolute one per anchor, which the proof bounds by O(M^(-1/2)). Slopes
are fitted to their logarithms over the larger half of the M (at small M the positive itself weighs
in); intervals are 95 % of a bootstrap over repeats.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

import matplotlib
import numpy as np
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from align_uniform.bounds import log_hyp0f1, uniformity_infimum  # noqa: E402
from moco.run_files import write_json  # noqa: E402

ANCHORS = 64  # per repeat; they share its negatives


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="convergence of InfoNCE, Theorem 1")
    # fmt: off
    parser.add_argument("--dim", type=int, default=8, help="of the features (%(default)s)")
    parser.add_argument("--tau", type=float, default=0.5, help="temperature (%(default)s)")
    parser.add_argument("--kappa", type=float, default=2.0, metavar="K",
                        help="concentration of the von Mises-Fisher features (%(default)s)")
    parser.add_argument("--unaligned", type=float, default=0.25, metavar="P",
                        help="probability of an independent positive (%(default)s)")
    parser.add_argument("--negatives", type=int, nargs="+", metavar="M",
                        default=[16, 64, 256, 1024, 4096, 16384], help="%(default)s")
    parser.add_argument("--repeats", type=int, default=200, metavar="R",
                        help=f"draws of {ANCHORS} anchors and M negatives (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("results/theorem1"), metavar="FOLDER",
                        help="for theorem1.json, .png and .svg (%(default)s)")
    # fmt: on
    return parser


def main() -> None:
    parser = build_parser()
    args = parser.parse_args()
    if args.dim < 2 or args.tau <= 0 or args.kappa <= 0 or not 0 <= args.unaligned <= 1:
        parser.error("expected --dim >= 2, --tau and --kappa > 0, and --unaligned in [0, 1]")
    args.negatives = sorted(set(args.negatives))
    if len(args.negatives) < 3 or args.negatives[0] < 1 or args.repeats < 2:
        parser.error("expected at least three different --negatives >= 1 and --repeats >= 2")
    if args.out.exists() and not args.out.is_dir():
        parser.error(f"--out {args.out} is a file, expected a folder")
    results = []
    for kappa in (0.0, args.kappa):
        results.append(study(kappa, args))
        print_study(results[-1])
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(args.out / "theorem1.json", {"dim": args.dim, "tau": args.tau, "results": results})
    draw(results, args.out)
    print(f"\n{args.out}/theorem1.json, .png, .svg")


# ------------------------------------------------------------------------------------------------
# The distributions, and what is known of them
# ------------------------------------------------------------------------------------------------


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


# ------------------------------------------------------------------------------------------------
# The study
# ------------------------------------------------------------------------------------------------


def study(kappa: float, args: argparse.Namespace) -> dict:
    """Deviations from the limit for each M, and their slopes."""
    rng = np.random.default_rng((args.seed, int(kappa > 0)))
    draws = [[repeat(rng, m, kappa, args) for _ in range(args.repeats)] for m in args.negatives]
    # (M, repeats): deviation of the loss, the same per anchor without its sign, and the uniformity.
    signed, absolute, second = np.moveaxis(np.array(draws), 2, 0)
    similarity = mean_similarity(args.dim, kappa, args.unaligned)
    limit = second.mean() - similarity / args.tau
    align = 2 - 2 * similarity
    rows = [
        {
            "M": m,
            "loss_minus_log_m": limit + signed[i].mean(),
            "deviation": signed[i].mean(),
            "deviation_se": signed[i].std(ddof=1) / math.sqrt(args.repeats),
            "mean_absolute_deviation": absolute[i].mean(),
        }
        for i, m in enumerate(args.negatives)
    ]
    return {
        "distribution": "uniform" if kappa == 0 else f"von Mises-Fisher, kappa {kappa:g}",
        "anchors": ANCHORS * args.repeats,
        "limit": limit,
        "alignment": align,
        "alignment_part": align / (2 * args.tau),
        "uniformity_part": second.mean() - 1 / args.tau,
        "uniformity_of_the_uniform": uniformity_infimum(args.dim, 1 / (2 * args.tau)),
        "rows": rows,
        "slope_of_the_expected_loss": slope(args.negatives, signed, rng),
        "slope_per_anchor": slope(args.negatives, absolute, rng),
    }


def repeat(rng: np.random.Generator, m: int, kappa: float, args: argparse.Namespace) -> tuple:
    """Deviation of the loss and mean absolute deviation per anchor, of ANCHORS anchors with the
    same M negatives; and the mean of the limit's second term."""
    x = sample(rng, ANCHORS, args.dim, kappa)
    independent = rng.random(ANCHORS) < args.unaligned
    y = np.where(independent[:, None], sample(rng, ANCHORS, args.dim, kappa), x)
    second = log_potential(x, args.tau, kappa)
    # Relative to M E exp(<x, x'>/tau): the sum over the negatives, 1 on average, and the positive.
    scores = x @ sample(rng, m, args.dim, kappa).T / args.tau - second[:, None]  # (ANCHORS, M)
    error = np.exp(scores).mean(axis=1) - 1
    positive = np.exp((x * y).sum(axis=1) / args.tau - second) / m
    # The loss is log(sum + positive) - <x, y>/tau. The error is zero on average, exactly, and is
    # nearly all of the noise of the mean: it is taken out there (a control variate).
    deviation = np.log1p(error + positive)
    return (deviation - error).mean(), np.abs(deviation).mean(), second.mean()


def slope(negatives: list[int], deviations: np.ndarray, rng: np.random.Generator) -> dict:
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


def print_study(result: dict) -> None:
    print(f"\n{result['distribution']} features")
    print(
        f"limit {result['limit']:.4f} = {result['alignment_part']:.4f} (alignment "
        f"{result['alignment']:.4f} / 2 tau) + {result['uniformity_part']:.4f} (uniformity; "
        f"{result['uniformity_of_the_uniform']:.4f} is the least)"
    )
    print(
        f"{'M':>7} {'loss - log M':>13} {'deviation':>11} {'+-':>8} {'mean |dev.| per anchor':>23}"
    )
    for row in result["rows"]:
        print(
            f"{row['M']:>7} {row['loss_minus_log_m']:>13.5f} {row['deviation']:>11.2e} "
            f"{row['deviation_se']:>8.0e} {row['mean_absolute_deviation']:>23.5f}"
        )
    for key in ("slope_of_the_expected_loss", "slope_per_anchor"):
        fit, name = result[key], key.replace("_", " ")
        print(f"{name}: {fit['slope']:.3f} (95 % {fit['low']:.3f} to {fit['high']:.3f})")


def draw(results: list[dict], folder: Path) -> None:
    """Both deviations against M, on logarithmic axes."""
    figure, axes = plt.subplots(1, len(results), figsize=(9, 4), sharey=True, layout="constrained")
    for axis, result in zip(axes, results, strict=True):
        m = np.array([row["M"] for row in result["rows"]])
        for key, fit, label, style in (
            ("mean_absolute_deviation", "slope_per_anchor", "per anchor, mean absolute", "o-"),
            ("deviation", "slope_of_the_expected_loss", "expected loss", "s--"),
        ):
            values = np.abs([row[key] for row in result["rows"]])
            text = f"{label}: slope {result[fit]['slope']:.2f}"
            axis.loglog(m, values, style, label=text)
        axis.set(title=f"{result['distribution']} features", xlabel="negatives M")
        axis.legend()
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("deviation from the limit (nats)")
    for suffix in ("png", "svg"):
        figure.savefig(folder / f"theorem1.{suffix}", dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    main()
