"""Figures 3 and 4: features on the circle, and positive pairs; and a map of any features."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.offsetbox import AnnotationBbox, OffsetImage
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from align_uniform.bounds import uniformity_infimum
from align_uniform.figures.densities import average_potential, gaussian_kde, von_mises_kde
from align_uniform.figures.style import CLASS_COLOURS, COLOURS, INK, MARKERS, styled
from align_uniform.metrics import alignment, uniformity


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


_GREY = "#999999"
_KEY = "brightness: share of the highest density in the panel; dotted: the uniform distribution"


@styled
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
        title = "all" if with_pairs else f"{name}: all"
        potential = average_potential(features.x)
        parts = [(f"{title} ({len(features.x)})\nmean potential {potential:.3f}", features.x)]
        for label in shown:
            mine = features.labels == label if features.labels is not None else None
            if mine is None or not mine.any():
                raise ValueError(f"{name} has no features of class {features.class_name(label)}")
            parts.append((f"{features.class_name(label)}\n({int(mine.sum())})", features.x[mine]))
        for column, (title, x) in enumerate(parts, start=with_pairs):
            panels = [figure.add_subplot(rows[2 * row + i, column]) for i in (0, 1)]
            _circle_densities(*panels, x, title, first=column == with_pairs)
    figure.supxlabel(_KEY, fontsize=9)
    return figure


@styled
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
        panels = [figure.add_subplot(rows[2 * band + i, column]) for i in (0, 1)]
        _circle_densities(*panels, x, title, first=column == 0)
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
    shares = [100 / len(distances)] * len(distances)
    axes.hist(distances.tolist(), bins=40, range=(0, 2), weights=shares,
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


@styled
def feature_map(places: Tensor, features: Features, shown: Sequence[int] | None = None,
                *, title: str = "", axis: str = "t-SNE",
                pictures: Sequence[Tensor] = ()) -> Figure:  # fmt: skip
    """Points in the plane, coloured and shaped by class, or pictures in frames of these colours.

    Args:
        places: (N, 2), where the rows of `features` were put.
        features: with labels, or without (all points alike then).
        shown: classes with a colour of their own, the others are grey; default: the first 10.
        pictures: none, or (H, W, 3) uint8 for each row.

    Raises:
        ValueError: places that are not (N, 2), finite and as many as the features.
    """
    if places.shape != (len(features.x), 2) or not len(places) or not places.isfinite().all():
        raise ValueError(
            f"a map needs a finite place in the plane for each of {len(features.x)} features, got "
            f"shape {tuple(places.shape)}"
        )
    figure = Figure(figsize=(10, 7.5) if pictures else (7, 5))
    axes = figure.add_subplot()
    known = features.labels is not None
    labels = features.labels if known else torch.zeros(len(places), dtype=torch.int64)
    occurring = labels.unique().tolist()
    shown = occurring[:10] if shown is None else list(shown)
    rest = ~torch.isin(labels, torch.tensor(shown))
    if rest.any():
        axes.plot(*places[rest].T.tolist(), linestyle="", marker=".", markersize=3, color=_GREY,
                  label=f"{len(occurring) - len(shown)} other classes", zorder=1)  # fmt: skip
    colours = dict(zip(shown, itertools.cycle(CLASS_COLOURS), strict=False))
    for i, (label, colour) in enumerate(colours.items()):
        axes.plot(
            *places[labels == label].T.tolist(), linestyle="", marker=MARKERS[i % len(MARKERS)],
            markersize=4, color=colour, alpha=0.75, markeredgewidth=0,
            label=features.class_name(label) if known else None,
        )  # fmt: skip
    for place, label, picture in zip(places.tolist(), labels.tolist(), pictures, strict=False):
        small = OffsetImage(picture.numpy(), zoom=0.5, zorder=3)
        frame = {"edgecolor": colours.get(label, _GREY), "linewidth": 1.2,
                 "boxstyle": "square,pad=0"}  # fmt: skip
        axes.add_artist(AnnotationBbox(small, place, pad=0, bboxprops=frame))
    if known:
        figure.legend(loc="outside right upper", markerscale=1.6)
    axes.set_title(title)
    axes.set_xlabel(f"{axis} dimension 1 (no unit)")
    axes.set_ylabel(f"{axis} dimension 2 (no unit)")
    return figure
