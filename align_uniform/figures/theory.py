"""Figures 10 and 11: what the optimum does in high dimension."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from align_uniform.bounds import uniformity_infimum
from align_uniform.figures.style import COLOURS, INK, line_style, styled

_DIMENSIONS = [2**i for i in range(1, 14)]


def log_hyp0f1(dim: int, t: float) -> float:
    """log 0F1(; dim/2; t^2), by which the optimal uniformity is above -2t (appendix A)."""
    return uniformity_infimum(dim, t) + 2 * t


@styled
def figure_10(ts: Sequence[float] = (1, 2, 3, 5), dims: Sequence[int] = _DIMENSIONS) -> Figure:
    """Figure 10: 0F1(; m/2; t^2) falls to 1 as the dimension m grows."""
    figure, axes = _dimension_axes(dims)
    for i, t in enumerate(ts):
        axes.plot(
            dims, [math.exp(log_hyp0f1(m, t)) for m in dims], label=f"t = {t:g}", **line_style(i)
        )
    axes.axhline(1, color=INK, linewidth=0.8, linestyle=":")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_ylabel("₀F₁(; m/2; t²)")
    axes.legend()
    return figure


@styled
def figure_11(ts: Sequence[float] = (1, 2, 3, 5), dims: Sequence[int] = _DIMENSIONS) -> Figure:
    """Figure 11: the optimal uniformity -2t + log 0F1(; m/2; t^2) falls to -2t (dotted)."""
    figure, axes = _dimension_axes(dims)
    for i, t in enumerate(ts):
        axes.plot(
            dims, [uniformity_infimum(m, t) for m in dims], label=f"t = {t:g}", **line_style(i)
        )
        axes.axhline(-2 * t, color=COLOURS[i % len(COLOURS)], linewidth=0.8, linestyle=":")
    axes.set_ylabel("least uniformity, −2t + log ₀F₁(; m/2; t²)")
    axes.legend(ncols=2)
    return figure


def _dimension_axes(dims: Sequence[int]) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(5, 3.4))
    axes = figure.add_subplot()
    axes.set_xscale("log", base=2)
    axes.set_xticks(dims, [str(m) for m in dims], rotation=45)
    axes.set_xlabel("dimension m of the space around the sphere")
    return figure, axes
