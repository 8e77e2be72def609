"""The paper's pictures (arXiv:2005.10242), drawn by matplotlib, and the densities behind them.

    from align_uniform import figures
    figures.save(figures.figure_3({"my encoder": features}), "figure_3.png")

Every function returns a `matplotlib.figure.Figure` and leaves matplotlib's global state alone.
Colours are told apart by colour-blind people too (Okabe-Ito for kinds, cividis for amounts), and
lines and points differ in dash or shape as well. The same input gives the same bytes.
"""

from __future__ import annotations

import functools
import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator
from torch import Tensor

from align_uniform.bounds import uniformity_infimum
from align_uniform.metrics import alignment, uniformity

# Okabe & Ito's palette without black and yellow: readable on white and on black.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
DASHES = ("-", "--", ":", "-.")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*")
INK = "#1b1b1b"  # text, axes; `inline_svg` makes it the colour of the page's text
BANDWIDTH = 0.1  # of both kernel density estimates: on the circle, in radians

_STYLE = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.constrained_layout.use": True,
    "legend.frameon": False,
    "savefig.dpi": 150,
    "svg.hashsalt": "align_uniform",  # else ids in SVG files are drawn anew each time
    "text.parse_math": False,  # names of runs and classes are no formulas, whatever "$" they have
    **dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK
    ),
}


def _styled(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    @functools.wraps(draw)
    def styled(*args, **kwargs) -> Figure:
        with matplotlib.rc_context(_STYLE):
            return draw(*args, **kwargs)

    return styled


def save(figure: Figure, path: str | Path) -> None:
    """Write a figure as PNG or SVG, as the name ends.

    Raises:
        ValueError: for another ending.
    """
    kind = Path(path).suffix.lower()
    nameless = {".png": {"Software": None}, ".svg": {"Date": None, "Creator": None}}
    if kind not in nameless:
        raise ValueError(f"a figure's file must end in .png or .svg, got {str(path)!r}")
    with matplotlib.rc_context(_STYLE):
        figure.savefig(path, metadata=nameless[kind])


def inline_svg(figure: Figure) -> str:
    """The figure as an <svg> element for an HTML page, in the page's font and text colour."""
    buffer = io.StringIO()
    with matplotlib.rc_context({**_STYLE, "svg.fonttype": "none"}):
        figure.savefig(
            buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None}
        )
    text = re.sub(r"<metadata>.*?</metadata>", "", buffer.getvalue(), flags=re.DOTALL)
    return text[text.index("<svg") :].replace(INK, "currentColor")


# ------------------------------------------------------------------------------------------------
# Densities on the circle
# ------------------------------------------------------------------------------------------------


def gaussian_kde(points: Tensor, xs: Tensor, ys: Tensor, bandwidth: float = BANDWIDTH) -> Tensor:
    """Gaussian kernel density estimate in the plane, on the grid ys x xs.

        p(z) = 1/N sum_i exp(-||z - points_i||^2 / (2 h^2)) / (2 pi h^2)

    Args:
        points: (N, 2), N >= 1.
        xs, ys: (A,) and (B,) coordinates of the grid.
        bandwidth: h, > 0.

    Returns:
        (B, A) float64, per unit of area.

    Raises:
        ValueError: another shape, no points, or a bandwidth that is not positive.
    """
    if points.dim() != 2 or points.shape[1] != 2 or not len(points):
        raise ValueError(f"points must have shape (N >= 1, 2), got {tuple(points.shape)}")
    _check_bandwidth(bandwidth)

    def kernel(at: Tensor, centres: Tensor) -> Tensor:  # in one dimension: the other factors out
        z = (at.double()[:, None] - centres.double()) / bandwidth
        return torch.exp(-z.square() / 2) / (math.sqrt(2 * math.pi) * bandwidth)

    return kernel(ys, points[:, 1]) @ kernel(xs, points[:, 0]).t() / len(points)


def von_mises_kde(angles: Tensor, at: Tensor, bandwidth: float = BANDWIDTH) -> Tensor:
    """Von Mises-Fisher kernel density estimate on the circle, by angle.

        p(a) = 1/N sum_i exp(kappa cos(a - angles_i)) / (2 pi I_0(kappa)),   kappa = 1 / h^2

    so that a narrow kernel is a Gaussian of standard deviation h radians.

    Args:
        angles: (N,) in radians, N >= 1.
        at: (A,) angles at which the density is wanted.
        bandwidth: h, > 0.

    Returns:
        (A,) float64, per radian: its integral over the circle is 1.

    Raises:
        ValueError: another shape, no angles, or a bandwidth that is not positive.
    """
    if angles.dim() != 1 or not len(angles):
        raise ValueError(f"angles must have shape (N >= 1,), got {tuple(angles.shape)}")
    _check_bandwidth(bandwidth)
    kappa = torch.tensor(1 / bandwidth**2, dtype=torch.float64)
    total = torch.zeros(len(at), dtype=torch.float64)
    for block in angles.double().split(8192):
        total += torch.exp(kappa * (torch.cos(at.double()[:, None] - block) - 1)).sum(dim=1)
    # i0e is exp(-kappa) I_0: both sides lose a factor that would overflow.
    return total / (2 * math.pi * torch.special.i0e(kappa) * len(angles))


def _check_bandwidth(bandwidth: float) -> None:
    if not 0 < bandwidth < math.inf:
        raise ValueError(f"bandwidth must be a positive finite number, got {bandwidth!r}")


def average_potential(x: Tensor, t: float = 2) -> float:
    """Average pairwise Gaussian potential, mean over i < j of exp(-t ||x_i - x_j||^2).

    The exponential of `align_uniform.metrics.uniformity`, which says what x may be; in (0, 1].
    """
    return math.exp(uniformity(x, t))


def von_mises_sample(n: int, mean: float, kappa: float, generator: torch.Generator) -> Tensor:
    """n points (n, 2) on the circle around the angle `mean`; kappa 0 is uniform."""
    grid = torch.linspace(-math.pi, math.pi, 2**14 + 1, dtype=torch.float64)
    density = torch.exp(kappa * (torch.cos(grid) - 1))
    cumulative = torch.cat([density.new_zeros(1), torch.cumulative_trapezoid(density, grid)])
    draws = torch.rand(n, dtype=torch.float64, generator=generator) * cumulative[-1]
    right = torch.searchsorted(cumulative, draws).clamp(1, len(grid) - 1)
    below, above = cumulative[right - 1], cumulative[right]
    share = (draws - below) / (above - below).clamp(min=1e-300)
    angles = mean + grid[right - 1] + share * (grid[right] - grid[right - 1])
    return torch.stack([angles.cos(), angles.sin()], dim=1)


def circle_distributions(n: int = 10_000, seed: int = 0) -> dict[str, Tensor]:
    """Points (n, 2) on the circle from chosen distributions, from uniform to a single point."""
    generator = torch.Generator().manual_seed(seed)

    def mixture(means: Sequence[float], kappa: float) -> Tensor:
        sizes = [n // len(means) + (i < n % len(means)) for i in range(len(means))]
        return torch.cat(
            [von_mises_sample(s, m, kappa, generator) for s, m in zip(sizes, means, strict=True)]
        )

    thirds = [math.pi / 2 + 2 * math.pi * i / 3 for i in range(3)]
    return {
        "uniform": mixture([0], 0),
        "vMF, κ = 1": mixture([0], 1),
        "3 vMFs, κ = 20": mixture(thirds, 20),
        "2 vMFs, κ = 20": mixture([0, math.pi], 20),
        "vMF, κ = 20": mixture([0], 20),
        "one point": torch.tensor([[1.0, 0.0]], dtype=torch.float64).expand(n, 2),
    }


# ------------------------------------------------------------------------------------------------
# Figures 3 and 4: features on the circle
# ------------------------------------------------------------------------------------------------


@dataclass
class Features:
    """Features of an image set, rows in one order.

    Attributes:
        x: (N, C) features.
        labels: (N,) whole numbers, where known; -1 for a row of no class.
        classes: name of each label, where known.
        y: (N, C) features of a second view of each image, where there is one.
    """

    x: Tensor
    labels: Tensor | None = None
    classes: Sequence[str] = ()
    y: Tensor | None = None

    def class_name(self, label: int) -> str:
        if label < 0:
            return "no class"
        return str(self.classes[label]) if label < len(self.classes) else f"class {label}"


_KEY = "brightness: share of the highest density in the panel; dotted: the uniform distribution"


@_styled
def figure_3(
    encoders: Mapping[str, Features], labels: Sequence[int] | None = None, most: int = 4
) -> Figure:
    """Figure 3: distances of positive pairs, and features on the circle, all and by class.

    One row for each encoder; the histogram where a second view is given, with its mean. Above, the
    Gaussian density in the plane; below it, the von Mises-Fisher density of the angle
    arctan2(x_2, x_1).

    Args:
        encoders: features by name, each (N, 2), unit rows.
        labels: classes to show; default: the `most` first that occur.

    Raises:
        ValueError: features that are no unit rows of two dimensions, or a class without features.
    """
    if not encoders:
        raise ValueError("figure 3 needs the features of at least one encoder, got none")
    shown: list[int] = list(labels or [])
    with_pairs = any(features.y is not None for features in encoders.values())
    for name, features in encoders.items():
        _check_circle(features.x, name)
        if labels is None and features.labels is not None:
            shown += [c for c in features.labels.unique().tolist() if c not in shown]
    shown = shown if labels is not None else sorted(shown)[:most]

    columns = with_pairs + 1 + len(shown)
    figure = Figure(figsize=(1.2 + 2.1 * columns, 3.1 * len(encoders)))
    rows = figure.add_gridspec(
        2 * len(encoders), columns, height_ratios=[2.1, 1] * len(encoders),
        width_ratios=[1.25] * with_pairs + [1] * (1 + len(shown)),
    )  # fmt: skip
    for row, (name, features) in enumerate(encoders.items()):
        if with_pairs:
            axes = figure.add_subplot(rows[2 * row : 2 * row + 2, 0])
            _pair_histogram(axes, features, name)
        title = f"{name}: all" if not with_pairs else "all"
        title = f"{title} ({len(features.x)})\nmean potential {average_potential(features.x):.3f}"
        parts = [(title, features.x)]
        for label in shown:
            mine = features.labels == label if features.labels is not None else None
            if mine is None or not mine.any():
                raise ValueError(f"{name} has no features of class {features.class_name(label)}")
            parts.append((f"{features.class_name(label)}\n({int(mine.sum())})", features.x[mine]))
        for column, (title, x) in enumerate(parts, start=with_pairs):
            plane = figure.add_subplot(rows[2 * row, column])
            angle = figure.add_subplot(rows[2 * row + 1, column])
            _circle_densities(plane, angle, x, title, first=column == with_pairs)
    figure.supxlabel(_KEY, fontsize=9)
    return figure


@_styled
def figure_4(sets: Mapping[str, Tensor], t: float = 2) -> Figure:
    """Figure 4: how the average pairwise potential exp(-t d^2) tells distributions on the circle.

    Args:
        sets: (N, 2) unit rows by name: `circle_distributions()`, features of encoders.

    Raises:
        ValueError: no set, or features that are no unit rows of two dimensions.
    """
    if not sets:
        raise ValueError("figure 4 needs at least one set of points, got none")
    bands = math.ceil(len(sets) / 6)
    columns = math.ceil(len(sets) / bands)
    figure = Figure(figsize=(1.0 + 2.0 * columns, 3.3 * bands))
    rows = figure.add_gridspec(2 * bands, columns, height_ratios=[2.1, 1] * bands)
    for i, (name, x) in enumerate(sets.items()):
        _check_circle(x, name)
        band, column = divmod(i, columns)
        value = uniformity(x, t)
        title = f"{name}\nmean potential {math.exp(value):.3f}\nuniformity {value:.2f}"
        plane = figure.add_subplot(rows[2 * band, column])
        angle = figure.add_subplot(rows[2 * band + 1, column])
        _circle_densities(plane, angle, x, title, first=column == 0)
    figure.supxlabel(
        f"potential exp(−{t:g} d²), mean over all pairs of points; "
        f"the least that any distribution has: {math.exp(uniformity_infimum(2, t)):.3f}\n{_KEY}",
        fontsize=9,
    )
    return figure


def _check_circle(x: Tensor, name: str) -> None:
    if x.dim() != 2 or x.shape[1] != 2:
        raise ValueError(
            f"features on the circle must have shape (N, 2), got {tuple(x.shape)} for {name}; "
            "train with --moco-dim 2, or draw a map"
        )
    try:
        uniformity(x[:2])  # two rows tell the type; all of them are looked at where they are used
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _pair_histogram(axes: Axes, features: Features, name: str) -> None:
    axes.set_title(name)
    axes.set_xlabel("distance of positive pairs, ‖x − y‖")
    axes.set_ylabel("share of pairs (%)")
    axes.set_xlim(0, 2)
    if features.y is None:
        axes.text(1, 0.5, "no second view", ha="center")
        axes.set_yticks([])
        return
    mean = alignment(features.x, features.y, alpha=1)  # checks both
    distances = (features.x.double() - features.y.double()).norm(dim=1)
    counts = torch.histc(distances, bins=40, min=0, max=2)
    edges = torch.linspace(0, 2, 41)[:-1]
    axes.bar(edges.tolist(), (100 * counts / len(distances)).tolist(), width=0.05, align="edge",
             color=COLOURS[5], edgecolor=INK, linewidth=0.3)  # fmt: skip
    squared = alignment(features.x, features.y, alpha=2)
    axes.axvline(mean, color=COLOURS[1], linestyle="--")
    axes.set_title(f"{name}\nmean distance {mean:.3f}, alignment {squared:.3f}")


def _circle_densities(plane: Axes, angle: Axes, x: Tensor, title: str, *, first: bool) -> None:
    grid = torch.linspace(-1.35, 1.35, 109, dtype=torch.float64)
    density = gaussian_kde(x, grid, grid)
    plane.imshow(
        density.tolist(), origin="lower", extent=(-1.35, 1.35, -1.35, 1.35), cmap="cividis",
        vmin=0, interpolation="bilinear",
    )  # fmt: skip
    plane.set_title(title)
    plane.set_xticks([-1, 0, 1])
    plane.set_yticks([-1, 0, 1])
    plane.set_xlabel("x₁", labelpad=0)
    angles = torch.linspace(-math.pi, math.pi, 361, dtype=torch.float64)
    values = von_mises_kde(torch.atan2(x[:, 1].double(), x[:, 0].double()), angles)
    angle.fill_between(angles.tolist(), values.tolist(), color=COLOURS[5], alpha=0.5)
    angle.plot(angles.tolist(), values.tolist(), color=COLOURS[0])
    angle.axhline(1 / (2 * math.pi), color=INK, linewidth=0.8, linestyle=":")
    angle.set_xlim(-math.pi, math.pi)
    angle.set_ylim(0, 1.1 * max(values.max().item(), 0.5))
    angle.set_xticks([-math.pi, 0, math.pi], ["−π", "0", "π"])
    angle.yaxis.set_major_locator(MaxNLocator(3))
    angle.set_xlabel("angle (rad)")
    if first:
        plane.set_ylabel("x₂", labelpad=0)
        angle.set_ylabel("density (1/rad)")


# ------------------------------------------------------------------------------------------------
# Figures 10 and 11: what the optimum does in high dimension
# ------------------------------------------------------------------------------------------------

_DIMENSIONS = [2**i for i in range(1, 14)]


def log_hyp0f1(dim: int, t: float) -> float:
    """log 0F1(; dim/2; t^2), by which the optimal uniformity is above -2t (appendix A)."""
    return uniformity_infimum(dim, t) + 2 * t


@_styled
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


@_styled
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


def line_style(i: int) -> dict:
    """Colour, dash and marker of the i-th line: no two of the first 24 are alike."""
    return {
        "color": COLOURS[i % len(COLOURS)],
        "linestyle": DASHES[i // len(COLOURS) % len(DASHES)],
        "marker": MARKERS[i % len(MARKERS)],
        "markersize": 3.5,
        "linewidth": 1.3,
    }


# ------------------------------------------------------------------------------------------------
# Figures 5 and 9, 7, 8: encoders by alignment, uniformity and accuracy
# ------------------------------------------------------------------------------------------------


@dataclass
class Point:
    """An encoder: where it stands, how accurate it is (%, None if unknown), and its name."""

    alignment: float
    uniformity: float
    accuracy: float | None
    label: str = ""


def _accuracy_colours(points: Sequence[Point]) -> ScalarMappable:
    known = [point.accuracy for point in points if point.accuracy is not None]
    low, high = (min(known), max(known)) if known else (0.0, 100.0)
    if high - low < 1e-9:
        low, high = low - 1, high + 1
    return ScalarMappable(Normalize(low, high), cmap="cividis")


@_styled
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
    colours = _accuracy_colours(points)
    labels = list(dict.fromkeys(point.label for point in points))
    for i, point in enumerate(points):
        known = point.accuracy is not None
        axes.plot(
            point.alignment, point.uniformity, markersize=9, linestyle="",
            marker=MARKERS[labels.index(point.label) % len(MARKERS)],
            markerfacecolor=colours.to_rgba(point.accuracy) if known else "none",
            markeredgecolor=INK, markeredgewidth=0.8,
        )  # fmt: skip
        axes.annotate(
            point.label, (point.alignment, point.uniformity), fontsize=8,
            xytext=(6, 6 if i % 2 else -11), textcoords="offset points",
        )  # fmt: skip
    if any(point.accuracy is not None for point in points):
        figure.colorbar(colours, ax=axes, label=accuracy)
    axes.margins(0.12)
    axes.set_xlabel(f"alignment (alpha = {alpha:g}): left is better")
    axes.set_ylabel(f"uniformity (t = {t:g}): lower is better")
    return figure


@_styled
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
        (accuracy, lambda point: point.accuracy),
        ("alignment", lambda point: point.alignment),
        (f"exp(uniformity), t = {t:g}", lambda point: math.exp(point.uniformity)),
    )
    for axes, (name, value) in zip(panels, values, strict=True):
        for i, (label, points) in enumerate(lines.items()):
            style = line_style(i)
            known = [(share, value(p)) for share, p in points if value(p) is not None]
            shares = sorted({share for share, _ in known})
            means = []
            for share in shares:
                same = [v for s, v in known if s == share]
                means.append(sum(same) / len(same))
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


@_styled
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
    everything = [point for points in paths.values() for point in points]
    colours = _accuracy_colours(everything)
    figure = Figure(figsize=(6.6, 4.6))
    axes = figure.add_subplot()
    for i, points in enumerate(paths.values()):
        style = line_style(i)
        xs = [point.alignment for point in points]
        ys = [math.exp(point.uniformity) for point in points]
        axes.plot(xs, ys, color=style["color"], linestyle=style["linestyle"], linewidth=1.3,
                  zorder=1)  # fmt: skip
        for j, point in enumerate(points):
            marker = "s" if j == 0 else "*" if j == len(points) - 1 else "o"
            known = point.accuracy is not None
            axes.plot(
                xs[j], ys[j], marker=marker, linestyle="", markersize=12 if marker == "*" else 7,
                markerfacecolor=colours.to_rgba(point.accuracy) if known else "none",
                markeredgecolor=style["color"], markeredgewidth=1.2,
            )  # fmt: skip
        for j in {0, len(points) - 1}:
            axes.annotate(points[j].label, (xs[j], ys[j]), fontsize=7.5, xytext=(7, 4),
                          textcoords="offset points")  # fmt: skip
    if any(point.accuracy is not None for point in everything):
        figure.colorbar(colours, ax=axes, label=accuracy)
    handles = [
        Line2D([], [], label=name, **{**line_style(i), "marker": ""})
        for i, name in enumerate(paths)
    ]
    figure.legend(handles=handles, loc="outside upper left", ncols=1)
    axes.margins(0.12)
    axes.set_xlabel("alignment: left is better; square: first, star: last")
    axes.set_ylabel(f"exp(uniformity), t = {t:g}: lower is better")
    return figure


@_styled
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


# ------------------------------------------------------------------------------------------------
# A map of features of any dimension
# ------------------------------------------------------------------------------------------------


@_styled
def feature_map(places: Tensor, features: Features, shown: Sequence[int] | None = None,
                *, title: str = "", axis: str = "t-SNE") -> Figure:  # fmt: skip
    """Points in the plane, coloured and shaped by class.

    Args:
        places: (N, 2), where the rows of `features` were put.
        features: with labels, or without (all points alike then).
        shown: classes with a colour of their own, the others are grey; default: the first 10.

    Raises:
        ValueError: places that are not (N, 2), finite and as many as the features.
    """
    if places.shape != (len(features.x), 2) or not len(places) or not places.isfinite().all():
        raise ValueError(
            f"a map needs a finite place in the plane for each of {len(features.x)} features, got "
            f"shape {tuple(places.shape)}"
        )
    figure = Figure(figsize=(7, 5))
    axes = figure.add_subplot()
    known = features.labels is not None
    labels = features.labels if known else torch.zeros(len(places), dtype=torch.int64)
    occurring = labels.unique().tolist()
    shown = occurring[:10] if shown is None else list(shown)
    rest = ~torch.isin(labels, torch.tensor(shown))
    if rest.any():
        axes.plot(*places[rest].T.tolist(), linestyle="", marker=".", markersize=3, color="#999999",
                  label=f"{len(occurring) - len(shown)} other classes", zorder=1)  # fmt: skip
    for i, label in enumerate(shown):
        mine = places[labels == label]
        axes.plot(
            *mine.T.tolist(), linestyle="", marker=MARKERS[i % len(MARKERS)], markersize=4,
            color=COLOURS[i % len(COLOURS)], alpha=0.75, markeredgewidth=0,
            label=features.class_name(label) if known else None,
        )  # fmt: skip
    if known:
        figure.legend(loc="outside right upper", markerscale=1.6)
    axes.set_title(title)
    axes.set_xlabel(f"{axis} dimension 1 (no unit)")
    axes.set_ylabel(f"{axis} dimension 2 (no unit)")
    return figure
