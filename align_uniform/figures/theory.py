"""Figures 10 and 11: what the optimum does in high dimension; and Theorem 1 in numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from align_uniform.bounds import uniformity_infimum
from align_uniform.figures.style import COLOURS, INK, line_style, styled

_DIMENSIONS = [2**i for i in range(1, 14)]
_DEVIATIONS = (
    ("mean_absolute_deviation", "slope_per_anchor", "per anchor, mean absolute"),
    ("deviation", "slope_of_the_expected_loss", "expected loss"),
)


def log_hyp0f1(dim: int, t: float) -> float:
    """log 0F1(; dim/2; t^2), by which the optimal uniformity is above -2t (appendix A)."""
    return uniformity_infimum(dim, t) + 2 * t


@styled
def figure_10(ts: Sequence[float] = (1, 2, 3, 5), dims: Sequence[int] = _DIMENSIONS) -> Figure:
    """Figure 10: 0F1(; m/2; t^2) falls to 1 as the dimension m grows."""
    values = {t: [math.exp(log_hyp0f1(m, t)) for m in dims] for t in ts}
    figure, axes = _over_dimensions(dims, values)
    axes.axhline(1, color=INK, linewidth=0.8, linestyle=":")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_ylabel("₀F₁(; m/2; t²)")
    axes.legend()
    return figure


@styled
def figure_11(ts: Sequence[float] = (1, 2, 3, 5), dims: Sequence[int] = _DIMENSIONS) -> Figure:
    """Figure 11: the optimal uniformity -2t + log 0F1(; m/2; t^2) falls to -2t (dotted)."""
    figure, axes = _over_dimensions(dims, {t: [uniformity_infimum(m, t) for m in dims] for t in ts})
    for i, t in enumerate(ts):
        axes.axhline(-2 * t, color=COLOURS[i % len(COLOURS)], linewidth=0.8, linestyle=":")
    axes.set_ylabel("least uniformity, −2t + log ₀F₁(; m/2; t²)")
    axes.legend(ncols=2)
    return figure


def _over_dimensions(
    dims: Sequence[int], lines: Mapping[float, Sequence[float]]
) -> tuple[Figure, Axes]:
    """A line for each t."""
    figure = Figure(figsize=(5, 3.4))
    axes = figure.add_subplot()
    axes.set_xscale("log", base=2)
    axes.set_xticks(dims, [str(m) for m in dims], rotation=45)
    axes.set_xlabel("dimension m of the space around the sphere")
    for i, (t, values) in enumerate(lines.items()):
        axes.plot(dims, values, label=f"t = {t:g}", **line_style(i))
    return figure, axes


@styled
def theorem_1(results: Sequence[dict]) -> Figure:
    """How InfoNCE minus log M deviates from its limit as M grows, on logarithmic axes.

    Args:
        results: for each distribution of features its name `distribution`, a line of `rows` with
            `M`, `deviation` and `mean_absolute_deviation`, and the `slope` of both fits.
    """
    figure = Figure(figsize=(9, 4))
    panels = figure.subplots(1, len(results), sharey=True, squeeze=False)[0]
    for axes, result in zip(panels, results, strict=True):
        negatives = [row["M"] for row in result["rows"]]
        for i, (key, fit, label) in enumerate(_DEVIATIONS):
            values = [abs(row[key]) for row in result["rows"]]
            text = f"{label}: slope {result[fit]['slope']:.2f}"
            axes.loglog(negatives, values, label=text, **line_style(i))
        axes.set_title(f"{result['distribution']} features")
        axes.set_xlabel("negatives M")
        axes.legend()
        axes.grid(alpha=0.3)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panels[0].set_ylabel("deviation from the limit (nats)")
    return figure
