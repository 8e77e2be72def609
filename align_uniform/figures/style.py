"""Colours, dashes and markers of the figures, and writing them as PNG or SVG."""

from __future__ import annotations

import functools
import io
import re
from collections.abc import Callable
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

# Okabe & Ito's palette without black and yellow: readable on white and on black.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
# Of the ten classes of a map: distances in CIELAB of 26 and, to the colour-blind, of 13 at least.
CLASS_COLOURS = (*COLOURS, "#332288", "#8C1C13", "#004D40", "#999933")
DASHES = ("-", "--", ":", "-.")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*")
INK = "#1b1b1b"  # text, axes; `inline_svg` makes it the colour of the page's text

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


def styled(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """Draw in the style of this project, whatever matplotlib's global settings are."""

    @functools.wraps(draw)
    def in_style(*args, **kwargs) -> Figure:
        with matplotlib.rc_context(_STYLE):
            return draw(*args, **kwargs)

    return in_style


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


def line_style(i: int) -> dict:
    """Colour, dash and marker of the i-th line: no two of the first 24 are alike."""
    return {
        "color": COLOURS[i % len(COLOURS)],
        "linestyle": DASHES[i // len(COLOURS) % len(DASHES)],
        "marker": MARKERS[i % len(MARKERS)],
        "markersize": 3.5,
        "linewidth": 1.3,
    }
