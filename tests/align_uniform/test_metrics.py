"""Metrics of whole feature sets, held to the double loops of reference.py and to sets of points
whose pairs can be counted by hand."""

import math
from collections.abc import Callable

import pytest
import reference
import torch
import torch.nn.functional as F
from reference import unit_rows
from torch import Tensor

from align_uniform.bounds import uniformity_infimum
from align_uniform.metrics import (
    _resampled,
    alignment,
    alignment_by_class,
    alignment_interval,
    dimension_deviation,
    effective_rank,
    uniformity,
    uniformity_between,
    uniformity_by_class,
    uniformity_curve,
    uniformity_excess,
    uniformity_interval,
)


def circle(n: int) -> Tensor:
    """n points at equal distances on the circle, (n, 2) float64."""
    angle = torch.arange(n, dtype=torch.float64) * (2 * math.pi / n)
    return torch.stack([angle.cos(), angle.sin()], dim=1)


def axes(c: int, copies: int) -> Tensor:
    """`copies` points at each of +-e_1 .. +-e_c, (2 * c * copies, c) float32."""
    e = torch.eye(c)
    return torch.cat([e, -e]).repeat(copies, 1)


def axes_uniformity(c: int, copies: int, t: float) -> float:
    """Its pairs by hand: coincident, antipodal (squared distance 4) and orthogonal (2)."""
    points = 2 * c * copies
    coincident = 2 * c * copies * (copies - 1) / 2
    antipodal = c * copies**2
    pairs = points * (points - 1) / 2
    orthogonal = pairs - coincident - antipodal
    total = coincident + antipodal * math.exp(-4 * t) + orthogonal * math.exp(-2 * t)
    return math.log(total / pairs)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("n", [2, 3, 12])
def test_metrics_equal_the_double_loops(dtype: torch.dtype, tolerance: float, n: int) -> None:
    x, y, z = (unit_rows(m, 5, seed).to(dtype) for seed, m in enumerate((n, n, n + 3)))

    def close(value: float, expected: float) -> bool:
        assert type(value) is float
        return value == pytest.approx(expected, rel=tolerance)

    for alpha in (0.5, 1, 2, 3):
        assert close(alignment(x, y, alpha), reference.loop_align(x, y, alpha))
    for t in (0.5, 2, 3, 9):
        assert close(uniformity(x, t), reference.loop_uniform(x, t))
        with_self = reference.loop_uniform(x, t, self_pairs=True)
        assert close(uniformity(x, t, self_pairs=True), with_self)
        excess = with_self - uniformity_infimum(5, t)
        assert uniformity_excess(x, t) == pytest.approx(excess, rel=1e3 * tolerance) and excess > 0
        between = reference.loop_uniform_between(x, z, t)
        assert close(uniformity_between(x, z, t), between)
        assert close(uniformity_between(z, x.double(), t), between), "of two types"
    assert alignment(x, y) == alignment(x, y, alpha=2)
    assert uniformity(x) == uniformity(x, t=2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_rows_rounded_to_any_type_are_measured_as_they_are(dtype: torch.dtype) -> None:
    """Normalised before or after the cast, in any dimension: off the sphere by their rounding,
    which is neither refused nor mended."""
    for c in (2, 16, 128, 2048):
        x = unit_rows(40, c)
        for rows in (x.to(dtype), F.normalize(x.to(dtype), dim=1)):
            other = rows.roll(1, dims=0)
            expected = reference.align(rows, other).item(), reference.uniform(rows).item()
            assert (alignment(rows, other), uniformity(rows)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("setting", ["autocast", "high", "medium"])
def test_no_setting_makes_products_less_exact(setting: str) -> None:
    """bf16 by autocast, under which an encoder is often measured, and TF32 are switched off for the
    metric and on again behind it."""
    x = unit_rows(5000, 16).float()
    expected = uniformity(x), alignment(x, x.flip(0))
    try:
        precision = "highest" if setting == "autocast" else setting
        torch.set_float32_matmul_precision(precision)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=setting == "autocast"):
            assert (uniformity(x), alignment(x, x.flip(0))) == expected
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision("highest")


def test_metrics_keep_no_graph() -> None:
    """Features that carry a graph, in views of other memory order, cost no memory for backward."""
    x = unit_rows(9, 4)
    strided = x.t().contiguous().t().requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda index: saved[index]):
        values = uniformity(strided), alignment(strided, x.flip(0))
    assert not saved
    assert values == pytest.approx((uniformity(x), alignment(x, x.flip(0))), rel=1e-12)


@pytest.mark.parametrize("size", [1, 7, 32, 99, 100, 5000])
def test_block_size_does_not_change_uniformity(size: int) -> None:
    """Of one row, with a last block of one row, one block for all."""
    x = unit_rows(100, 8).float()
    for t in (2, 100):
        expected = reference.uniform(x, t).item()
        assert uniformity(x, t, block_size=size) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("c", [3, 128, 2048])
def test_collapsed_random_directions_are_zero_and_not_above(c: int) -> None:
    """|x|^2 + |y|^2 - 2<x, y> rounds to less than 0 for some of them; a distance must not."""
    for row in unit_rows(50, c).float():
        assert -1e-5 < uniformity(row.expand(30, c)) <= 0


@pytest.mark.parametrize(("c", "copies"), [(1, 1), (2, 1), (3, 7), (16, 40)])
@pytest.mark.parametrize("t", [0.5, 2, 3])
def test_axes_have_counted_pairs(c: int, copies: int, t: float) -> None:
    """Exact, and sensitive to self-pairs or a wrong number of pairs at small N."""
    expected = axes_uniformity(c, copies, t)
    assert uniformity(axes(c, copies), t, block_size=50) == pytest.approx(expected, rel=1e-6)


def test_large_set() -> None:
    """20,000 x 16, 2e8 pairs, in several blocks: sums do not drift and no pair is lost."""
    x = axes(16, copies=625)
    assert len(x) == 20_000
    assert uniformity(x) == pytest.approx(axes_uniformity(16, 625, t=2), rel=1e-6)
    assert alignment(x, x.roll(1, dims=1)) == pytest.approx(2, rel=1e-12)
    assert alignment(x, -x, alpha=3) == pytest.approx(8, rel=1e-12)


def test_alignment_of_more_rows_than_one_block() -> None:
    """150,000 pairs, of which the last 30,000 are antipodal."""
    x = torch.eye(2).repeat(75_000, 1)
    y = x.clone()
    y[-30_000:] *= -1
    assert alignment(x, y, alpha=2) == pytest.approx(4 * 30_000 / 150_000, rel=1e-12)


def test_large_t_is_finite() -> None:
    """exp(-100 d^2) is 0 in float32 for every pair of random 128-dimensional features."""
    x = unit_rows(64, 128).float()
    assert (-100 * torch.pdist(x).square()).exp().sum() == 0
    assert uniformity(x, t=100) == pytest.approx(reference.uniform(x, t=100).item(), rel=1e-6)
    assert math.isfinite(uniformity(x, t=10_000))
    nearest_last = torch.cat([x, x[-1:]])  # the one coincident pair turns up in the last block
    value = uniformity(nearest_last, t=100, block_size=16)
    assert value == pytest.approx(-math.log(65 * 64 / 2), rel=1e-5)


ROWS = torch.eye(4, 8)


def spoilt(value: float) -> Tensor:
    """ROWS with `value` somewhere in row 2."""
    rows = ROWS.clone()
    rows[2, 5] = value
    return rows


BAD_ROWS: dict[str, tuple[object, str]] = {
    "too long": (torch.diag(torch.tensor([1, 1.002, 1])), r"unit length, got 1\.002 in row 1"),
    "too short": (0.9 * ROWS, r"unit length, got 0\.9 in row 0"),
    "zero": (torch.cat([ROWS, torch.zeros(1, 8)]), r"unit length, got 0 in row 4"),
    "half precision, too long": (1.1 * ROWS.bfloat16(), r"unit length, got 1\.1\d* in row 0"),
    "NaN": (spoilt(math.nan), r"NaN.* row 2"),
    "infinite": (spoilt(math.inf), r"infinite.* row 2"),
    "one row": (ROWS[:1], r"at least 2 rows, got 1"),
    "no rows": (ROWS[:0], r"at least 2 rows, got 0"),
    "1-d": (ROWS[0], r"\(N, C\), got \(8,\)"),
    "3-d": (ROWS[None], r"\(N, C\), got \(1, 4, 8\)"),
    "integers": (ROWS.long(), r"floating-point.*got torch\.int64"),
    "numpy": (ROWS.numpy(), r"torch tensor.*got ndarray"),
    "list": (ROWS.tolist(), r"torch tensor.*got list"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_rows_are_refused_by_name(case: str) -> None:
    """As x of either metric, and as y of alignment."""
    rows, message = BAD_ROWS[case]
    with pytest.raises(ValueError, match=rf"\bx\b.*{message}"):
        uniformity(rows)
    with pytest.raises(ValueError, match=rf"\bx\b.*{message}"):
        alignment(rows, rows)
    with pytest.raises(ValueError, match=rf"\by\b.*{message}"):
        alignment(ROWS, rows)


@pytest.mark.parametrize("other", [ROWS[:3], torch.eye(4, 7), torch.eye(5, 8)])
def test_sets_must_match(other: Tensor) -> None:
    got = rf"\({len(other)}, {other.shape[1]}\)"
    with pytest.raises(ValueError, match=rf"x and y .*got shapes \(4, 8\) and {got}"):
        alignment(ROWS, other)
    with pytest.raises(ValueError, match=rf"of the same images, got \(4, 8\) and {got}"):
        uniformity_interval(ROWS, second_view=other)
    if other.shape[1] != 8:
        with pytest.raises(ValueError, match=rf"rows of one dimension.*\(4, 8\).*{got}"):
            uniformity_between(ROWS, other)


@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf])
def test_scalars_must_be_positive(value: float) -> None:
    with pytest.raises(ValueError, match=f"^alpha .*positive.*got {value!r}$"):
        alignment(ROWS, ROWS, alpha=value)
    for call in (uniformity, lambda _, t: uniformity_infimum(8, t)):
        with pytest.raises(ValueError, match=f"^t .*positive.*got {value!r}$"):
            call(ROWS, t=value)


def near_duplicates(copies: int, noise: float, c: int = 64) -> Tensor:
    """100 directions, `copies` float32 rows near each: more rows than are taken in float64."""
    centres = unit_rows(100, c).repeat(copies, 1)
    return F.normalize(centres + noise * unit_rows(len(centres), c, seed=1), dim=1).float()


@pytest.mark.parametrize(("noise", "t"), [(0, 2), (1e-5, 100), (1e-2, 8)])
def test_near_duplicates_in_float32(noise: float, t: float) -> None:
    """2 - 2<x, y> cancels for them, and at large t they are all that counts. The error stays
    below its bound of 2e-6 t and the size of blocks changes nothing that matters."""
    x = near_duplicates(50, noise)
    assert len(x) > 4096
    expected = uniformity(x.double(), t)
    for size in (None, 1023):
        value = uniformity(x, t, block_size=size)
        assert value == pytest.approx(expected, abs=min(1e-6, 2e-6 * t) / 2)
    between = uniformity_between(x, x.flip(0), t)
    assert between == pytest.approx(uniformity_between(x.double(), x.double(), t), abs=1e-6)


def test_features_that_have_all_but_collapsed() -> None:
    """Distances of 1e-6 against lengths of 1: what is near 0 is right to a share of itself."""
    x = F.normalize(unit_rows(1, 64) + 1e-3 * unit_rows(5000, 64, seed=1), dim=1).float()
    expected = uniformity(x.double())
    assert -1e-5 < expected < -1e-7
    assert uniformity(x) == pytest.approx(expected, rel=1e-5)


def test_uniformity_between_known_values() -> None:
    e = torch.eye(3)
    assert uniformity_between(e[:1].expand(4, 3), e[:1].expand(7, 3)) == pytest.approx(0, abs=1e-7)
    assert uniformity_between(e[:1].expand(4, 3), -e[:1].expand(7, 3)) == pytest.approx(-8)
    assert uniformity_between(e[:1].expand(4, 3), e[1:], t=3, block_size=2) == pytest.approx(-6)


def test_excess_is_zero_around_the_circle_and_never_below() -> None:
    for n in (100, 101, 5000):
        assert 0 <= uniformity_excess(circle(n).float()) < 1e-6
    assert uniformity_excess(torch.eye(2)[:1].expand(5, 2)) == pytest.approx(
        -uniformity_infimum(2, 2)
    )


def test_curve_is_uniformity_at_each_t() -> None:
    x = unit_rows(50, 8)
    assert uniformity_curve(x) == pytest.approx([uniformity(x, t) for t in range(1, 9)], rel=1e-12)
    assert uniformity_curve(x, [200, 0.1], self_pairs=True) == pytest.approx(
        [uniformity(x, t, self_pairs=True) for t in (200, 0.1)], rel=1e-12
    )


@pytest.mark.parametrize("size", [0, -1])
def test_block_size_must_be_positive(size: int) -> None:
    with pytest.raises(ValueError, match=f"block_size .*got {size}"):
        uniformity(ROWS, block_size=size)


def test_by_class_equals_the_loops_over_each_class() -> None:
    x, y = unit_rows(20, 5, seed=1), unit_rows(20, 5, seed=2)
    labels = torch.tensor([7, -1, 7, 30, 30] * 4)
    found = alignment_by_class(x, y, labels, alpha=1), uniformity_by_class(x, labels.tolist(), t=3)
    for values in found:
        assert list(values) == [-1, 7, 30] and all(type(c) is int for c in values)
    for label in (-1, 7, 30):
        of = labels == label
        assert found[0][label] == pytest.approx(reference.loop_align(x[of], y[of], 1), rel=1e-12)
        assert found[1][label] == pytest.approx(reference.loop_uniform(x[of], 3), rel=1e-12)


def test_by_class_refusals() -> None:
    x = unit_rows(4, 5)
    with pytest.raises(ValueError, match=r"class 9 has one row.*leave it out.*labels != 9"):
        uniformity_by_class(x, [1, 9, 1, 1])
    for labels in ([1, 2, 3], [1.0, 2, 3, 4], [[1], [2], [3], [4]]):
        with pytest.raises(ValueError, match=r"labels must be 4 whole numbers.*got"):
            alignment_by_class(x, x, labels)


@pytest.mark.parametrize(("n", "c"), [(40, 6), (6, 40), (9, 9)])
def test_effective_rank_is_of_the_singular_values(n: int, c: int) -> None:
    x = unit_rows(n, c)
    s = torch.linalg.svdvals(x)
    p = s / s.sum()
    expected = math.exp(-math.fsum(v * math.log(v) for v in p.tolist()))
    assert effective_rank(x) == pytest.approx(expected, rel=1e-9)
    assert effective_rank(x.float()) == pytest.approx(expected, rel=1e-5)


def test_effective_rank_and_deviation_known_values() -> None:
    collapsed = unit_rows(1, 300).float().expand(500, 300)
    assert effective_rank(collapsed) == pytest.approx(1, abs=1e-9)
    assert dimension_deviation(collapsed).max() < 1e-7
    for c in (2, 16):
        assert effective_rank(axes(c, 3)) == pytest.approx(c, rel=1e-9)
        assert dimension_deviation(axes(c, 3)).tolist() == pytest.approx([c**-0.5] * c, rel=1e-9)
    in_plane = F.pad(circle(100), (0, 30))
    assert effective_rank(in_plane) == pytest.approx(2, rel=1e-9)


def test_deviation_equals_the_loop_in_several_blocks() -> None:
    x = unit_rows(5000, 3)
    x[:, 0].abs_()
    found = dimension_deviation(x)
    assert found.tolist() == pytest.approx(reference.loop_deviation(x), rel=1e-12)
    half = dimension_deviation(x.bfloat16())
    assert half.dtype == torch.float64
    assert half.tolist() == pytest.approx(reference.loop_deviation(x.bfloat16()), rel=1e-9)


@pytest.mark.parametrize("t", [2, 30])
def test_intervals_are_percentiles_of_weighted_double_loops(t: float) -> None:
    x, y = unit_rows(7, 4, seed=1), unit_rows(7, 4, seed=2)
    weights = torch.cat(list(_resampled(7, 300, 5, torch.float64, torch.device("cpu"))), dim=1)
    assert weights.shape == (7, 300) and (weights.sum(dim=0) == 7).all()
    ends = torch.tensor([0.1, 0.9], dtype=torch.float64)

    options = {"confidence": 0.8, "resamples": 300, "seed": 5}
    loops = [reference.loop_uniform_weighted(x, w.tolist(), t) for w in weights.t()]
    expected = torch.tensor(loops, dtype=torch.float64).quantile(ends)
    found = uniformity_interval(x, t, block_size=3, **options)
    assert found == pytest.approx(tuple(expected.tolist()), rel=1e-9)

    both = [
        (loop + reference.loop_uniform_weighted(y, w.tolist(), t)) / 2
        for loop, w in zip(loops, weights.t(), strict=True)
    ]
    expected = torch.tensor(both, dtype=torch.float64).quantile(ends)
    assert uniformity_interval(x, t, second_view=y, **options) == pytest.approx(
        tuple(expected.tolist()), rel=1e-9
    )

    distance = (x - y).norm(dim=1)
    expected = (weights.t() @ distance / 7).quantile(ends)
    assert alignment_interval(x, y, 1, **options) == pytest.approx(
        tuple(expected.tolist()), rel=1e-12
    )
    assert found == uniformity_interval(x, t, block_size=3, **options)
    assert found != uniformity_interval(x, t, **{**options, "seed": 6})


def test_interval_in_float32_equals_float64() -> None:
    x = near_duplicates(45, 0.1, c=8)
    assert len(x) > 4096
    found = uniformity_interval(x, 8, resamples=300)
    assert found == pytest.approx(uniformity_interval(x.double(), 8, resamples=300), abs=1e-5)
    assert found[0] < uniformity(x, 8) < found[1]


def test_interval_refusals() -> None:
    x = unit_rows(5, 4)
    for call in (
        lambda **o: alignment_interval(x, x, **o),
        lambda **o: uniformity_interval(x, **o),
    ):
        for confidence in (0, 1, 95, math.nan):
            with pytest.raises(ValueError, match=f"confidence .*got {confidence}"):
                call(confidence=confidence)
        with pytest.raises(ValueError, match="resamples .*at least 2, got 1"):
            call(resamples=1)
    with pytest.raises(ValueError, match="t must be at most 170 for an interval, got 200"):
        uniformity_interval(x, 200)
    low, high = uniformity_interval(torch.eye(2), 2)  # half of the resamples have no pair
    assert low == high == pytest.approx(-4)


NEEDS_UNIT_ROWS: dict[str, Callable] = {
    "alignment": lambda x, **o: alignment(x, x.roll(1, dims=0), **o),
    "alignment_by_class": lambda x, **o: alignment_by_class(
        x, x.roll(1, dims=0), [0, 1] * (len(x) // 2), **o
    ),
    "alignment_interval": lambda x, **o: alignment_interval(x, x.roll(1, dims=0), **o),
    "uniformity": uniformity,
    "uniformity_curve": uniformity_curve,
    "uniformity_excess": uniformity_excess,
    "uniformity_by_class": lambda x, **o: uniformity_by_class(x, [0, 1] * (len(x) // 2), **o),
    "uniformity_between": lambda x, **o: uniformity_between(x, x.flip(0), **o),
    "uniformity_interval": uniformity_interval,
    "effective_rank": effective_rank,
    "dimension_deviation": lambda x, **o: dimension_deviation(x, **o).tolist(),
}


@pytest.mark.parametrize("name", NEEDS_UNIT_ROWS)
def test_normalize_is_what_the_refusal_asks_for(name: str) -> None:
    call = NEEDS_UNIT_ROWS[name]
    rows = unit_rows(8, 5)
    scaled = rows * torch.linspace(1e-3, 50, 8, dtype=torch.float64)[:, None]
    with pytest.raises(ValueError, match=r"unit length, got .*pass normalize=True"):
        call(scaled)
    assert call(scaled, normalize=True) == pytest.approx(call(rows), rel=1e-9)
    scaled[3] = 0
    with pytest.raises(ValueError, match=r"row 3 of x is zero.*leave it out"):
        call(scaled, normalize=True)
    scaled[3, 1] = math.nan
    for options in ({}, {"normalize": True}):
        with pytest.raises(ValueError, match=r"NaN .*row 3"):
            call(scaled, **options)
        with pytest.raises(ValueError, match=r"at least 2 rows"):
            call(rows[:0], **options)


def test_normalize_of_half_precision_is_in_float32() -> None:
    x = (3 * unit_rows(10, 5)).half()
    assert uniformity(x, normalize=True) == pytest.approx(
        reference.loop_uniform(F.normalize(x.double(), dim=1)), rel=1e-6
    )
