"""The paper's pictures (arXiv:2005.10242), drawn by matplotlib, and the densities behind them.

    from align_uniform import figures
    figures.save(figures.figure_3({"my encoder": features}), "figure_3.png")

Every function returns a `matplotlib.figure.Figure` and leaves matplotlib's global state alone.
Colours are told apart by colour-blind people too (Okabe-Ito for kinds, cividis for amounts), and
lines and points differ in dash or shape as well. The same input gives the same bytes.
"""

try:
    import matplotlib  # noqa: F401
except ImportError:
    message = "align_uniform.figures needs the package matplotlib: pip install matplotlib"
    raise ModuleNotFoundError(message, name="matplotlib") from None

from align_uniform.figures.circle import Features, feature_map, figure_3, figure_4
from align_uniform.figures.densities import (
    BANDWIDTH,
    average_potential,
    circle_distributions,
    gaussian_kde,
    von_mises_kde,
    von_mises_sample,
)
from align_uniform.figures.encoders import Point, curves, scatter, trajectories, weights_sweep
from align_uniform.figures.style import (
    COLOURS,
    DASHES,
    INK,
    MARKERS,
    inline_svg,
    line_style,
    save,
    styled,
)
from align_uniform.figures.theory import figure_10, figure_11, log_hyp0f1, theorem_1

__all__ = [
    "BANDWIDTH",
    "COLOURS",
    "DASHES",
    "INK",
    "MARKERS",
    "Features",
    "Point",
    "average_potential",
    "circle_distributions",
    "curves",
    "feature_map",
    "figure_10",
    "figure_11",
    "figure_3",
    "figure_4",
    "gaussian_kde",
    "inline_svg",
    "line_style",
    "log_hyp0f1",
    "save",
    "scatter",
    "styled",
    "theorem_1",
    "trajectories",
    "von_mises_kde",
    "von_mises_sample",
    "weights_sweep",
]
