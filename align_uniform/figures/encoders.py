"""Figures 5, 7, 8 and 9: encoders by alignment, uniformity and accuracy; curves of training."""

from __future__ import annotations

import math
import statistics
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from align_uniform.figures.style import INK, MARKERS, line_style, styled


@dataclass
class Point:
    """An encoder: where it stands, how accurate it is (%, None if unknown), and its name."""

    alignment: float
    uniformity: float
    accuracy: float | None
    label: str = ""


def _colours(figure: Figure, points: Sequence[Point], title: str) -> list:
    """Of each point, by its accuracy, which a bar explains; hollow where it is unknown."""
    known = [point.accuracy for point in points if point.accuracy is not None]
    if not known:
        return ["none"] * len(points)
    low, high = min(known), max(known)
    if high - low < 1e-9:
        low, high = low - 1, high + 1
    scale = ScalarMappable(Normalize(low, high), cmap="cividis")
    figure.colorbar(scale, ax=figure.axes[0], label=textwrap.fill(title, 44))
    return ["none" if p.accuracy is None else scale.to_rgba(p.accuracy) for p in points]


@styled
def scatter(
    points: Sequence[Point], *, accuracy: str = "linear top-1 (%)", t: float = 2, alpha: float = 2
) -> Figure:
    """Figures 5 and 9: encoders in the plane of alignment and uniformity, coloured by accuracy.

    Args:
        points: at least one; those without accuracy are hollow, those of one label of one shape.
        accuracy: what the colour means.

    Raises:
        ValueError: no points.
    """
    if not points:
        raise ValueError("a scatter of encoders needs at least one, got none")
    figure = Figure(figsize=(6, 4.2))
    axes = figure.add_subplot()
    labels = list(dict.fromkeys(point.label for point in points))
    colours = _colours(figure, points, accuracy)
    for i, (point, colour) in enumerate(zip(points, colours, strict=True)):
        axes.plot(
            point.alignment, point.uniformity, markersize=9, linestyle="",
            marker=MARKERS[labels.index(point.label) % len(MARKERS)],
            markerfacecolor=colour, markeredgecolor=INK, markeredgewidth=0.8,
        )  # fmt: skip
        axes.annotate(
            point.label, (point.alignment, point.uniformity), fontsize=8,
            xytext=(6, 6 if i % 2 else -11), textcoords="offset points",
        )  # fmt: skip
    axes.margins(0.12)
    axes.set_xlabel(f"alignment (alpha = {alpha:g}): left is better")
    axes.set_ylabel(f"uniformity (t = {t:g}): lower is better")
    return figure


@styled
def weights_sweep(
    lines: Mapping[str, Sequence[tuple[float, Point]]], *, accuracy: str = "accuracy (%)",
    t: float = 2,
) -> Figure:  # fmt: skip
    """Figure 7: accuracy, alignment and the exponential of uniformity against the loss weights.

    Args:
        lines: by name, pairs of the weight's share w_align / (w_align + w_unif) in [0, 1] and the
            encoder; several with one share (seeds) are drawn as points around their mean.

    Raises:
        ValueError: nothing to draw.
    """
    if not any(lines.values()):
        raise ValueError("a sweep of weights needs at least one encoder, got none")
    figure = Figure(figsize=(5.4, 6.6))
    panels = figure.subplots(3, 1, sharex=True)
    values = (
        (textwrap.fill(accuracy, 24), lambda point: point.accuracy),
        ("alignment", lambda point: point.alignment),
        (f"exp(uniformity), t = {t:g}", lambda point: math.exp(point.uniformity)),
    )
    for axes, (name, value) in zip(panels, values, strict=True):
        for i, (label, points) in enumerate(lines.items()):
            style = line_style(i)
            known = [(share, value(p)) for share, p in points if value(p) is not None]
            shares = sorted({share for share, _ in known})
            means = [statistics.fmean(v for s, v in known if s == share) for share in shares]
            axes.plot(shares, means, label=label, **style)
            axes.plot(*zip(*known, strict=True), linestyle="", marker=style["marker"], alpha=0.4,
                      markersize=3.5, color=style["color"]) if known else None  # fmt: skip
        axes.set_ylabel(name)
    shares = sorted({share for points in lines.values() for share, _ in points})
    panels[-1].set_xticks([0, 0.25, 0.5, 0.75, 1], ["0\nuniformity only", "0.25", "0.5", "0.75",
                                                    "1\nalignment only"])  # fmt: skip
    panels[-1].set_xlim(-0.05, 1.05)
    panels[-1].set_xlabel("share of alignment in the weights, w_align / (w_align + w_unif)")
    if len(lines) > 1:
        panels[0].legend()
    return figure


@styled
def trajectories(
    paths: Mapping[str, Sequence[Point]], *, accuracy: str = "accuracy (%)", t: float = 2
) -> Figure:
    """Figure 8: how encoders move in the plane of alignment and uniformity while they are trained.

    Args:
        paths: encoders of a run in order, by the run's name. The first is marked with a square,
            the last with a star; the label of each point is written beside first and last.

    Raises:
        ValueError: no run, or a run without a point.
    """
    if not paths or not all(paths.values()):
        raise ValueError("trajectories need at least one encoder of each run")
    figure = Figure(figsize=(6.6, 4.6))
    axes = figure.add_subplot()
    everything = [point for points in paths.values() for point in points]
    colours = iter(_colours(figure, everything, accuracy))
    labels: dict[tuple[float, float], str] = {}  # one for each place: paths can begin in the same
    for i, points in enumerate(paths.values()):
        style = line_style(i)
        xs = [point.alignment for point in points]
        ys = [math.exp(point.uniformity) for point in points]
        axes.plot(xs, ys, color=style["color"], linestyle=style["linestyle"], linewidth=1.3,
                  zorder=1)  # fmt: skip
        for j in range(len(points)):
            marker = "s" if j == 0 else "*" if j == len(points) - 1 else "o"
            axes.plot(
                xs[j], ys[j], marker=marker, linestyle="", markersize=12 if marker == "*" else 7,
                markerfacecolor=next(colours), markeredgecolor=style["color"], markeredgewidth=1.2,
            )  # fmt: skip
        for j in {0, len(points) - 1}:
            labels.setdefault((xs[j], ys[j]), points[j].label)
    for place, label in labels.items():
        axes.annotate(label, place, fontsize=7.5, xytext=(7, 4), textcoords="offset points")
    handles = [
        Line2D([], [], label=name, **{**line_style(i), "marker": ""})
        for i, name in enumerate(paths)
    ]
    figure.legend(handles=handles, loc="outside upper left", ncols=1)
    axes.margins(0.12)
    axes.set_xlabel("alignment: left is better; square: first, star: last")
    axes.set_ylabel(f"exp(uniformity), t = {t:g}: lower is better")
    return figure


@styled
def curves(
    name: str, lines: Sequence[tuple[int, Sequence[float], Sequence[float]]], *, x: str = "epoch"
) -> Figure:
    """One scalar of many runs over time.

    Args:
        name: of the scalar.
        lines: (number of its style, xs, ys); lines of one number look alike.

    Raises:
        ValueError: nothing to draw.
    """
    if not lines:
        raise ValueError(f"curves of {name} need at least one line, got none")
    figure = Figure(figsize=(3.8, 2.5))
    axes = figure.add_subplot()
    axes.set_title(name)
    axes.set_xlabel(x)
    for number, xs, ys in lines:
        dots = {"marker": "o", "markersize": 4} if len(xs) == 1 else {"marker": ""}
        axes.plot(xs, ys, **{**line_style(number), **dots})
    axes.ticklabel_format(axis="y", useOffset=False)
    return figure
