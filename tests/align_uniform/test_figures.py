"""Figures: densities against direct sums and known integrals, pictures by what they draw."""

from __future__ import annotations

import math
import struct
import xml.etree.ElementTree as ElementTree

import matplotlib
import pytest
import torch
from matplotlib.offsetbox import AnnotationBbox
from reference import unit_rows
from scipy import special, stats

from align_uniform import figures
from align_uniform.figures import Features, Point
from align_uniform.metrics import uniformity


def unit(n: int, dim: int = 2, seed: int = 0) -> torch.Tensor:
    return unit_rows(n, dim, seed, torch.float32)


@pytest.mark.parametrize("bandwidth", [0.05, 0.3, 1.7])
def test_gaussian_kde_is_the_direct_sum(bandwidth: float) -> None:
    points = unit(7).double()
    xs = torch.linspace(-1.5, 1.2, 9, dtype=torch.float64)
    ys = torch.linspace(-1.0, 1.4, 6, dtype=torch.float64)
    density = figures.gaussian_kde(points, xs, ys, bandwidth)
    assert density.shape == (6, 9)
    for i, y in enumerate(ys.tolist()):
        for j, x in enumerate(xs.tolist()):
            direct = sum(
                math.exp(-((x - px) ** 2 + (y - py) ** 2) / (2 * bandwidth**2))
                for px, py in points.tolist()
            ) / (7 * 2 * math.pi * bandwidth**2)
            assert density[i, j].item() == pytest.approx(direct, rel=1e-10, abs=1e-300)


@pytest.mark.parametrize("bandwidth", [0.01, 0.1, 1.0, 5.0])
def test_von_mises_kde_integrates_to_one_and_is_scipys_density(bandwidth: float) -> None:
    angles = torch.tensor([-3.1, 0.2, 0.25, 3.0], dtype=torch.float64)
    at = torch.linspace(-math.pi, math.pi, 20001, dtype=torch.float64)[:-1]
    density = figures.von_mises_kde(angles, at, bandwidth)
    assert density.mean().item() * 2 * math.pi == pytest.approx(1, abs=1e-9)
    known = stats.vonmises(1 / bandwidth**2, loc=angles.numpy()[:, None]).pdf(at.numpy()).mean(0)
    torch.testing.assert_close(density, torch.from_numpy(known), rtol=1e-7, atol=1e-12)
    assert figures.von_mises_kde(angles, at + 2 * math.pi, bandwidth).allclose(density, atol=1e-6)


def test_von_mises_kde_in_several_blocks_is_the_mean_of_them() -> None:
    angles, at = torch.linspace(-3, 3, 20_000, dtype=torch.float64), torch.tensor([0.3])
    parts = [figures.von_mises_kde(part, at) for part in angles.split(5000)]
    assert figures.von_mises_kde(angles, at).item() == pytest.approx(sum(parts).item() / 4)


@pytest.mark.parametrize("kappa", [0, 1, 20])
def test_sampled_points_have_the_mean_and_potential_of_their_distribution(kappa: float) -> None:
    x = figures.von_mises_sample(8000, 0.5, kappa, torch.Generator().manual_seed(1))
    assert (x.norm(dim=1) - 1).abs().max() < 1e-12
    length = special.ive(1, kappa) / special.ive(0, kappa)  # of the mean: I_1 / I_0
    mean = x.mean(0)
    assert mean[0].item() == pytest.approx(length * math.cos(0.5), abs=0.02)
    assert mean[1].item() == pytest.approx(length * math.sin(0.5), abs=0.02)
    # Two draws differ by an angle d of which cos(k d) has the mean (I_k / I_0)^2, and
    # exp(-t (2 - 2 cos d)) = exp(-2t) (I_0(2t) + 2 sum_k I_k(2t) cos(k d)).
    orders = range(1, 40)
    expected = special.ive(0, 4) + 2 * sum(
        special.ive(k, 4) * (special.ive(k, kappa) / special.ive(0, kappa)) ** 2 for k in orders
    )
    assert math.exp(uniformity(x)) == pytest.approx(expected, rel=0.03)


def test_circle_distributions_go_from_uniform_to_a_point() -> None:
    sets = figures.circle_distributions(3001, seed=3)
    assert all(x.shape == (3001, 2) for x in sets.values())
    values = [uniformity(x) for x in sets.values()]
    assert values == sorted(values) and values[-1] == 0
    assert math.exp(values[0]) == pytest.approx(special.ive(0, 4), rel=0.02)
    again = figures.circle_distributions(3001, seed=3)
    assert all(torch.equal(x, again[name]) for name, x in sets.items())


@pytest.mark.parametrize(
    "call",
    [
        lambda: figures.gaussian_kde(unit(4, 3), torch.zeros(1), torch.zeros(1)),
        lambda: figures.gaussian_kde(torch.zeros(0, 2), torch.zeros(1), torch.zeros(1)),
        lambda: figures.gaussian_kde(unit(4), torch.zeros(1), torch.zeros(1), 0),
        lambda: figures.von_mises_kde(torch.zeros(0), torch.zeros(1)),
        lambda: figures.von_mises_kde(torch.zeros(3), torch.zeros(1), math.nan),
        lambda: figures.figure_3({}),
        lambda: figures.figure_3({"a": Features(unit(5, 3))}),
        lambda: figures.figure_3({"a": Features(2 * unit(5))}),
        lambda: figures.figure_3({"a": Features(unit(5), torch.zeros(5).long())}, [1]),
        lambda: figures.figure_3({"a": Features(unit(5), y=unit(4))}),
        lambda: figures.figure_4({}),
        lambda: figures.figure_4({"a": torch.full((3, 2), math.nan)}),
        lambda: figures.scatter([]),
        lambda: figures.weights_sweep({"a": []}),
        lambda: figures.trajectories({"a": []}),
        lambda: figures.curves("loss", []),
        lambda: figures.feature_map(torch.zeros(3, 2), Features(unit(4))),
        lambda: figures.feature_map(torch.full((4, 2), math.inf), Features(unit(4))),
        lambda: figures.save(figures.figure_10(), "figure.pdf"),
    ],
)
def test_what_cannot_be_drawn_is_refused(call) -> None:
    with pytest.raises(ValueError) as refused:
        call()
    assert "\n" not in str(refused.value)


LABELS = torch.arange(60) % 3
ENCODERS = {
    "first $\\frac": Features(unit(60), LABELS, ["cat & <dog>", "b", "c"], unit(60, seed=1)),
    "second": Features(unit(60, seed=2), LABELS, ["cat & <dog>", "b", "c"]),
}
POINTS = [Point(0.1, -1, 50, "a"), Point(0.2, -2, 60, "b"), Point(0.3, -1.5, None, "c")]
PICTURES = {
    "3": lambda: figures.figure_3(ENCODERS, [0, 2]),
    "4": lambda: figures.figure_4(figures.circle_distributions(200)),
    "5": lambda: figures.scatter(POINTS),
    "7": lambda: figures.weights_sweep({"t 2": [(0.5, POINTS[0]), (0.5, POINTS[1])]}),
    "8": lambda: figures.trajectories({"run $x_": POINTS, "other": POINTS[:1]}),
    "10": figures.figure_10,
    "11": figures.figure_11,
    "curves": lambda: figures.curves("loss", [(0, [1, 2], [3.0, math.nan]), (9, [1], [2.0])]),
    "map": lambda: figures.feature_map(unit(60), ENCODERS["second"], [0, 1]),
}


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_are_drawn_the_same_each_time_and_leave_no_state(name: str, tmp_path) -> None:
    before = dict(matplotlib.rcParams)
    for stem in "ab":
        figure = PICTURES[name]()
        for kind in ("png", "svg"):
            figures.save(figure, tmp_path / f"{stem}.{kind}")
    assert dict(matplotlib.rcParams) == before
    for kind in ("png", "svg"):
        a, b = ((tmp_path / f"{stem}.{kind}").read_bytes() for stem in "ab")
        assert a == b, f"two {kind} files of one figure differ"
    width, height = struct.unpack(">II", (tmp_path / "a.png").read_bytes()[16:24])
    assert width > 300 and height > 200
    assert ElementTree.parse(tmp_path / "a.svg").getroot().tag.endswith("svg")


def texts(figure) -> str:
    drawn = figure.findobj(matplotlib.text.Text)
    return "\n".join(text.get_text() for text in drawn if text.get_text())


def test_axes_are_labelled_and_values_written() -> None:
    x = ENCODERS["first $\\frac"]
    written = texts(PICTURES["3"]())
    mean = (x.x - x.y).norm(dim=1).mean().item()
    assert f"mean distance {mean:.3f}" in written
    words = "angle (rad)|density (1/rad)|share of pairs (%)|cat & <dog>|no second"
    for word in words.split("|"):
        assert word in written, word
    for name in PICTURES:
        for axes in PICTURES[name]().axes:
            assert axes.get_xlabel() or axes.get_ylabel() or not axes.axison, name


def test_histogram_counts_every_pair_and_marks_the_mean() -> None:
    x = ENCODERS["first $\\frac"]
    distances = (x.x - x.y).norm(dim=1)
    near = (distances < 1).double().mean().item()
    figure = figures.figure_3({"a": x}, [])
    bars = figure.axes[0].patches
    assert sum(bar.get_height() for bar in bars) == pytest.approx(100)
    assert sum(bar.get_height() for bar in bars[:20]) == pytest.approx(100 * near, abs=1e-6)
    (line,) = figure.axes[0].lines
    assert line.get_xdata()[0] == pytest.approx(distances.mean().item(), abs=1e-5)


def test_class_panels_show_the_class_alone() -> None:
    """Class 0 lies left, class 1 right; the panel of each has its density there."""
    x = torch.tensor([[-1.0, 0.0]] * 5 + [[1.0, 0.0]] * 5)
    features = Features(x, torch.tensor([0] * 5 + [1] * 5), ["left", "right"])
    panels = {a.get_title().split("\n")[0]: a for a in figures.figure_3({"a": features}).axes}
    for name, column in (("left", 0), ("right", 1)):
        density = torch.as_tensor(panels[name].images[0].get_array())
        halves = density[:, :54].sum(), density[:, 55:].sum()
        assert halves[column] > 1e6 * halves[1 - column]


def test_weights_sweep_draws_the_mean_of_seeds() -> None:
    figure = PICTURES["7"]()
    accuracy, align, unif = figure.axes
    assert accuracy.lines[0].get_ydata() == [55]
    assert align.lines[0].get_ydata() == [pytest.approx(0.15)]
    assert unif.lines[0].get_ydata() == [pytest.approx((math.exp(-1) + math.exp(-2)) / 2)]


def test_figures_10_and_11_draw_the_formula() -> None:
    for draw, expected in (
        (figures.figure_10, special.hyp0f1(2, 9)),
        (figures.figure_11, -6 + math.log(special.hyp0f1(2, 9))),
    ):
        lines = {line.get_label(): line for line in draw(ts=[3]).axes[0].lines}
        dims, values = lines["t = 3"].get_data()
        assert values[dims == 4].item() == pytest.approx(expected)


def test_no_two_lines_look_alike_nor_two_of_ten_classes() -> None:
    looks = [tuple(sorted(figures.line_style(i).items())) for i in range(24)]
    assert len(set(looks)) == 24
    features = Features(unit(12), torch.arange(12))
    pictures = [torch.zeros(2, 2, 3, dtype=torch.uint8)] * 12
    (axes,) = figures.feature_map(features.x, features, pictures=pictures).axes
    points = [line.get_color() for line in axes.lines]
    frames = [box.patch.get_edgecolor() for box in axes.findobj(AnnotationBbox)]
    assert points[0] == "#999999" and len(set(points)) == 11, "ten, and all other classes"
    assert len(set(frames[:10])) == 10 and len(set(frames)) == 11


def test_inline_svg_takes_the_colour_of_the_page() -> None:
    text = figures.inline_svg(PICTURES["8"]())
    assert text.startswith("<svg") and "currentColor" in text and figures.INK not in text
    assert "run $x_" in text and "fill: #ffffff" not in text
    ElementTree.fromstring(text)
