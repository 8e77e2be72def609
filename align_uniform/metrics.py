"""Alignment and uniformity of whole feature sets (arXiv:2005.10242, section 4.1), and what goes
with them: by class, between two sets, with confidence intervals; effective rank and deviation.

Unlike the losses these check their input, take any number of rows and return plain floats. Compute
them on features of held-out images: for `alignment`, row i of x and of y are two augmented views of
image i; for the others, each image stands in x once.

All take unit rows and refuse others; `normalize=True` divides each row by its length first. They
run where the features lie, CPU or GPU. Sums over pairs go block by block: memory does not grow
beyond one copy of the features, time does as N^2 C. Products are float32 (never TF32, whatever is
set) and sums float64, which leaves an error of at most 2e-6 t in uniformity and far less when it is
not all due to a few near pairs. They are float64 where that costs little or matters more: for
float64 features, for at most 4096 rows, and for t > 8.

Uniformity hardly sees that dimensions are lost; `align_uniform.spectrum` has what does.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from align_uniform._checks import check_positive, row_lengths, unit_rows
from align_uniform.bounds import add_self_pairs, uniformity_infimum

_FLOAT64_ROWS, _FLOAT32_T = 4096, 8.0  # see above
_LARGEST_INTERVAL_T = 170  # exp(-4t) is a normal float64
_WEIGHTS_AT_A_TIME = 256  # resamples whose weights, N x 256, are in memory


@torch.no_grad()
def alignment(x: Tensor, y: Tensor, alpha: float = 2, *, normalize: bool = False) -> float:
    """Mean distance of positive pairs to the power alpha, mean_i ||x_i - y_i||^alpha.

    Args:
        x, y: (N, C) features of N positive pairs, unit rows, N >= 2.
        alpha: exponent, > 0.
        normalize: divide rows by their length first.

    Returns:
        A float in [0, 2^alpha]; lower is better aligned.

    Raises:
        ValueError: rows not of unit length (or of length 0 with `normalize`), NaN, fewer than two
            rows, shapes that differ.
    """
    return _pair_powers(x, y, alpha, normalize).mean().item()


@torch.no_grad()
def alignment_by_class(
    x: Tensor,
    y: Tensor,
    labels: Tensor | Sequence[int],
    alpha: float = 2,
    *,
    normalize: bool = False,
) -> dict[int, float]:
    """`alignment` of the images of each class: {label: value}, by ascending label.

    Args:
        labels: (N,) whole numbers, the class of each pair.

    Raises:
        ValueError: as `alignment`; labels of another shape or type.
    """
    powers = _pair_powers(x, y, alpha, normalize)
    labels = _check_labels(labels, x)
    return {int(label): powers[labels == label].mean().item() for label in labels.unique()}


@torch.no_grad()
def alignment_interval(
    x: Tensor,
    y: Tensor,
    alpha: float = 2,
    *,
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
    normalize: bool = False,
) -> tuple[float, float]:
    """Bootstrap confidence interval of `alignment` over images: percentiles of its value on
    `resamples` sets of N images drawn from the N with replacement.

    Args:
        confidence: share of resamples inside, in (0, 1).
        resamples: >= 2.
        seed: of the draws; the interval is a function of features and seed.

    Returns:
        (low, high).

    Raises:
        ValueError: as `alignment`; another confidence or number of resamples.
    """
    _check_bootstrap(confidence, resamples)
    powers = _pair_powers(x, y, alpha, normalize)
    values = [powers @ w for w in _resampled(len(x), resamples, seed, powers.dtype, powers.device)]
    return _percentiles(torch.cat(values) / len(x), confidence)


def _pair_powers(x: Tensor, y: Tensor, alpha: float, normalize: bool) -> Tensor:
    """||x_i - y_i||^alpha, (N,) float64."""
    x, y = unit_rows(x, "x", normalize), unit_rows(y, "y", normalize)
    if x.shape != y.shape:
        raise ValueError(
            f"x and y must pair up row by row, got shapes {tuple(x.shape)} and {tuple(y.shape)}"
        )
    check_positive(alpha, "alpha")
    distances = [
        torch.linalg.vector_norm(a.double() - b.double(), dim=1)
        for a, b in zip(x.split(65536), y.split(65536), strict=True)
    ]
    return torch.cat(distances).pow(alpha)


@torch.no_grad()
def uniformity(
    x: Tensor,
    t: float = 2,
    *,
    self_pairs: bool = False,
    normalize: bool = False,
    block_size: int | None = None,
) -> float:
    """Log of the mean Gaussian potential over all N(N-1)/2 unordered pairs, without self-pairs.

        log( 2 / (N(N-1)) * sum_{i<j} exp(-t ||x_i - x_j||^2) )

    Args:
        x: (N, C) features, unit rows, N >= 2.
        t: inverse temperature of the potential, > 0.
        self_pairs: the mean over all N^2 pairs (i, j) instead, with i = j among them.
        normalize: divide rows by their length first.
        block_size: rows per block; changes time and memory, not the result. By default 512 on the
            CPU, where a block then stays in the cache, and 4096 elsewhere.

    Returns:
        A float in [-4t, 0]; lower is more uniform, 0 is collapsed. Without self-pairs it estimates
        the population value and is no less than `uniformity_sample_bound(N, C, t)`, with them no
        less than `uniformity_infimum(C, t)`, both of `align_uniform.bounds`.

    Raises:
        ValueError: rows not of unit length (or of length 0 with `normalize`), NaN, fewer than two
            rows, t not positive.
    """
    (value,) = uniformity_curve(
        x, [t], self_pairs=self_pairs, normalize=normalize, block_size=block_size
    )
    return value


@torch.no_grad()
def uniformity_curve(
    x: Tensor,
    t: Sequence[float] = (1, 2, 3, 4, 5, 6, 7, 8),
    *,
    self_pairs: bool = False,
    normalize: bool = False,
    block_size: int | None = None,
) -> list[float]:
    """`uniformity` for several t, with one computation of the distances."""
    x = unit_rows(x, "x", normalize)
    pairs = len(x) * (len(x) - 1) / 2
    values = _log_mean_potential(x, None, t, pairs, block_size)
    return [add_self_pairs(value, len(x)) for value in values] if self_pairs else values


@torch.no_grad()
def uniformity_excess(
    x: Tensor, t: float = 2, *, normalize: bool = False, block_size: int | None = None
) -> float:
    """How far uniformity is from the best, as a number >= 0 that features of any dimension share.

        uniformity(x, t, self_pairs=True) - uniformity_infimum(C, t)

    The estimator with self-pairs is the one that the infimum bounds at any N; what is left at the
    optimum comes from the self-pairs, about exp(-infimum)/N.

    Raises:
        ValueError: as `uniformity`; features of one dimension.
    """
    value = uniformity(x, t, self_pairs=True, normalize=normalize, block_size=block_size)
    # Points around a circle are at the infimum within rounding.
    return max(0.0, value - uniformity_infimum(x.shape[1], t))


@torch.no_grad()
def uniformity_by_class(
    x: Tensor,
    labels: Tensor | Sequence[int],
    t: float = 2,
    *,
    normalize: bool = False,
    block_size: int | None = None,
) -> dict[int, float]:
    """`uniformity` of the images of each class: {label: value}, by ascending label.

    Args:
        labels: (N,) whole numbers, the class of each row.

    Raises:
        ValueError: as `uniformity`; labels of another shape or type; a class of a single row.
    """
    x = unit_rows(x, "x", normalize)
    labels = _check_labels(labels, x)
    found, counts = labels.unique(return_counts=True)
    if counts.min() < 2:
        alone = int(found[counts.argmin()])
        raise ValueError(
            f"class {alone} has one row, its uniformity needs 2; leave it out: "
            f"x[labels != {alone}], labels[labels != {alone}]"
        )
    return {int(c): uniformity(x[labels == c], t, block_size=block_size) for c in found}


@torch.no_grad()
def uniformity_between(
    x: Tensor, y: Tensor, t: float = 2, *, normalize: bool = False, block_size: int | None = None
) -> float:
    """Log of the mean Gaussian potential over all pairs of one row of x and one of y.

        log( 1/(NM) * sum_ij exp(-t ||x_i - y_j||^2) )

    Args:
        x: (N, C) unit rows, N >= 2.
        y: (M, C) unit rows, M >= 2.

    Returns:
        A float in [-4t, 0]; 0 when both sets lie at one point, -4t when at opposite points. Its
        exponential is the mean potential that x feels of y. It has no bound but -4t: two sets can
        avoid each other more than the points of any one set can.

    Raises:
        ValueError: as `uniformity`; x and y of different dimensions.
    """
    x, y = unit_rows(x, "x", normalize), unit_rows(y, "y", normalize)
    if x.shape[1] != y.shape[1] or x.device != y.device:
        raise ValueError(
            f"x and y must have rows of one dimension on one device, got {tuple(x.shape)} on "
            f"{x.device} and {tuple(y.shape)} on {y.device}"
        )
    return _log_mean_potential(x, y, [t], len(x) * len(y), block_size)[0]


@torch.no_grad()
def uniformity_interval(
    x: Tensor,
    t: float = 2,
    *,
    second_view: Tensor | None = None,
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
    normalize: bool = False,
    block_size: int | None = None,
) -> tuple[float, float]:
    """Bootstrap confidence interval of `uniformity` over images: percentiles of its value on
    `resamples` sets of N images drawn from the N with replacement.

        log( sum_{i<j} w_i w_j exp(-t ||x_i - x_j||^2) / sum_{i<j} w_i w_j )

    is the value of a resample that has image i w_i times. Copies of one image make no pair: they
    would be self-pairs, of potential 1, which the estimator does not have. Pairs share images, so
    a standard error over pairs would be far too small.

    Takes about resamples/C times as long as `uniformity`. At the optimum, where all images have
    the same mean potential, the spread is overstated.

    Args:
        second_view: (N, C) unit rows of the same images: the interval is that of the mean of both
            uniformities.
        confidence: share of resamples inside, in (0, 1).
        resamples: >= 2.
        seed: of the draws; the interval is a function of features and seed.

    Returns:
        (low, high).

    Raises:
        ValueError: as `uniformity`; another confidence or number of resamples; t above 170, where
            a resample without the nearest pair can have a potential of 0.
    """
    _check_bootstrap(confidence, resamples)
    check_positive(t, "t")
    if t > _LARGEST_INTERVAL_T:
        raise ValueError(f"t must be at most {_LARGEST_INTERVAL_T} for an interval, got {t!r}")
    views = [unit_rows(x, "x", normalize)]
    if second_view is not None:
        views.append(unit_rows(second_view, "second_view", normalize))
        if views[0].shape != views[1].shape:
            raise ValueError(
                f"x and second_view must be of the same images, got {tuple(x.shape)} and "
                f"{tuple(second_view.shape)}"
            )
    views = [_prepared(view, None, [t])[0] for view in views]
    count, device = len(views[0]), views[0].device
    values = []
    for weights in _resampled(count, resamples, seed, views[0].dtype, device):  # (N, R)
        pairs = (count**2 - weights.square().sum(dim=0, dtype=torch.float64)) / 2
        logs = [(_weighted(view, weights, t, block_size) / pairs).log() for view in views]
        # A resample of a few images may be of a single one, which has no pair and no value.
        values.append(torch.stack(logs).mean(dim=0)[pairs > 0])
    values = torch.cat(values)
    if not len(values):
        raise ValueError(f"no resample of {count} rows has two different ones; raise resamples")
    return _percentiles(values, confidence)


def _weighted(x: Tensor, weights: Tensor, t: float, block_size: int | None) -> Tensor:
    """sum_{i<j} w_i w_j exp(-t ||x_i - x_j||^2) of each column of the weights (N, R): (R,)."""
    total = torch.zeros(weights.shape[1], dtype=torch.float64, device=x.device)
    for rows, columns, scores in _negated_squared_distances(x, None, block_size):
        with _exact_products(x.device):
            sums = scores.mul_(t).exp_() @ weights[columns]  # (B, R)
        total += (sums * weights[rows]).sum(dim=0, dtype=torch.float64)
    return total


def _log_mean_potential(
    x: Tensor, y: Tensor | None, ts: Sequence[float], pairs: float, block_size: int | None
) -> list[float]:
    """log( 1/pairs * sum exp(-t d^2) ) for each t: over all of x times y, or i > j in x alone."""
    for t in ts:
        check_positive(t, "t")
    x, y = _prepared(x, y, ts)
    # Sums of exp(t (nearest - d^2)), with the least squared distance so far taken out: for large t
    # the plain exponentials are all zero.
    nearest, totals = -math.inf, [0.0] * len(ts)
    for _, _, scores in _negated_squared_distances(x, y, block_size):
        highest = scores.max().item()
        if highest == -math.inf:  # a block of one row has no pair with itself
            continue
        if highest > nearest:
            totals = [
                total and total * math.exp(t * (nearest - highest))
                for t, total in zip(ts, totals, strict=True)
            ]
            nearest = highest
        scores.sub_(nearest)
        for i, t in enumerate(ts):
            totals[i] += (scores * t).exp_().sum(dtype=torch.float64).item()
    return [math.log(total / pairs) + t * nearest for t, total in zip(ts, totals, strict=True)]


def _prepared(x: Tensor, y: Tensor | None, ts: Sequence[float]) -> tuple[Tensor, Tensor | None]:
    """Rows in the type that products are taken in, and all moved by one vector.

    Distances do not feel the move, rounding does: |a|^2 + |b|^2 - 2<a, b> has an error of some
    float32 epsilons times |a|^2, which for features that have all but collapsed is more than their
    distances. Around their mean they are as small as these.
    """
    sets = [x] if y is None else [x, y]
    if max(map(len, sets)) <= _FLOAT64_ROWS or max(ts, default=0) > _FLOAT32_T:
        dtype = torch.float64
    else:
        dtype = torch.promote_types(torch.float32, x.dtype)
        dtype = dtype if y is None else torch.promote_types(dtype, y.dtype)
    x = x.to(dtype)
    centre = x.mean(dim=0)
    return x - centre, None if y is None else y.to(dtype) - centre


def _negated_squared_distances(
    x: Tensor, y: Tensor | None, block_size: int | None
) -> Iterator[tuple[slice, slice, Tensor]]:
    """(rows, columns, -||x_i - y_j||^2 of them) block by block, at most 0.

    Without y: of x with itself, each pair once (i > j), -inf for the other half of blocks on the
    diagonal.
    """
    if block_size is None:
        block_size = 512 if x.device.type == "cpu" else 4096
    elif block_size < 1:
        raise ValueError(f"block_size must be at least 1, got {block_size!r}")
    others = x if y is None else y
    norms, other_norms = _squared_norms(x), _squared_norms(others)
    for i in range(0, len(x), block_size):
        rows = slice(i, min(i + block_size, len(x)))
        for j in range(0, rows.stop if y is None else len(others), block_size):
            columns = slice(j, min(j + block_size, len(others)))
            with _exact_products(x.device):
                scores = torch.addmm(
                    other_norms[columns], x[rows], others[columns].t(), beta=-1, alpha=2
                )
            scores.sub_(norms[rows, None]).clamp_(max=0)
            if y is None and i == j:
                upper = torch.ones_like(scores, dtype=torch.bool).triu_()
                scores.masked_fill_(upper, -math.inf)
            yield rows, columns, scores


def _squared_norms(x: Tensor) -> Tensor:
    return row_lengths(x).square().to(x.dtype)


@contextlib.contextmanager
def _exact_products(device: torch.device) -> Iterator[None]:
    """Matrix products in the type of their factors, whatever autocast and TF32 are set to.

    Torch 2.9 replaced the one precision setting by one for each backend and forbids to mix them.
    """
    with torch.autocast(device.type, enabled=False):
        if hasattr(torch.backends.cuda.matmul, "fp32_precision"):
            backends = [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul]
            before = [backend.fp32_precision for backend in backends]
            try:
                for backend in backends:
                    backend.fp32_precision = "ieee"
                yield
            finally:
                for backend, precision in zip(backends, before, strict=True):
                    backend.fp32_precision = precision
        else:
            precision = torch.get_float32_matmul_precision()
            try:
                torch.set_float32_matmul_precision("highest")
                yield
            finally:
                torch.set_float32_matmul_precision(precision)


@torch.no_grad()
def effective_rank(x: Tensor, *, normalize: bool = False) -> float:
    """exp of the entropy of the singular values (Roy & Vetterli, EUSIPCO 2007, Eq. 1 to 3).

        p_k = s_k / sum_l s_l,    exp( -sum_k p_k log p_k )

    with s_k the singular values of the (N, C) matrix x itself, not of its covariance and not
    centred, as RankMe has it (arXiv:2210.02885).

    Args:
        x: (N, C) features, unit rows, N >= 2.
        normalize: divide rows by their length first.

    Returns:
        A float in [1, min(N, C)]: 1 when collapsed, C when all directions are used alike.

    Raises:
        ValueError: rows not of unit length (or of length 0 with `normalize`), NaN, fewer than two
            rows.
    """
    x = unit_rows(x, "x", normalize)
    small = x if x.shape[0] >= x.shape[1] else x.t()  # (longer side, shorter side)
    squares = torch.linalg.eigvalsh(outer_sum(small))
    # What is left of zeros by rounding would count: its square root is 1e-8 of the largest.
    squares[squares < squares.max() * max(x.shape) * torch.finfo(torch.float64).eps] = 0
    singular = squares.sqrt()
    p = singular / singular.sum()
    return torch.special.entr(p).sum().exp().item()


def outer_sum(x: Tensor, centres: Tensor | None = None) -> Tensor:
    """sum_i (x_i - c_i)(x_i - c_i)^T in float64, (C, C)."""
    total = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64, device=x.device)
    for start in range(0, len(x), 4096):
        block = x[start : start + 4096].double()
        if centres is not None:
            block = block - centres[start : start + 4096]
        with torch.autocast(x.device.type, enabled=False):
            total.addmm_(block.t(), block)
    return total


@torch.no_grad()
def dimension_deviation(x: Tensor, *, normalize: bool = False) -> Tensor:
    """Standard deviation of each dimension over the rows, (sum_i (x_ic - mean_c)^2 / N)^(1/2).

    Args:
        x: (N, C) features, unit rows, N >= 2.
        normalize: divide rows by their length first.

    Returns:
        (C,) float64 on the device of x. Their mean times sqrt(C) is near 1 for features all over
        the sphere and 0 when collapsed (Chen & He 2021, arXiv:2011.10566, section 4.1).

    Raises:
        ValueError: as `effective_rank`.
    """
    x = unit_rows(x, "x", normalize)
    mean = x.mean(dim=0, dtype=torch.float64)
    squares = torch.zeros_like(mean)
    for block in x.split(4096):
        squares += (block.double() - mean).square().sum(dim=0)
    return (squares / len(x)).sqrt()


def _resampled(
    n: int, resamples: int, seed: int, dtype: torch.dtype, device: torch.device
) -> Iterator[Tensor]:
    """How often each of n images is in a resample: (n, R) in portions, columns that sum to n.

    Drawn on the CPU, so that they are the same on every device.
    """
    generator = torch.Generator().manual_seed(seed)
    for start in range(0, resamples, _WEIGHTS_AT_A_TIME):
        weights = torch.empty(n, min(_WEIGHTS_AT_A_TIME, resamples - start), dtype=dtype)
        for column in weights.unbind(dim=1):
            drawn = torch.randint(n, (n,), generator=generator)
            column.copy_(torch.bincount(drawn, minlength=n))
        yield weights.to(device)


def _percentiles(values: Tensor, confidence: float) -> tuple[float, float]:
    ends = values.new_tensor([(1 - confidence) / 2, (1 + confidence) / 2])
    low, high = values.quantile(ends).tolist()
    return low, high


def _check_labels(labels: Tensor | Sequence[int], x: Tensor) -> Tensor:
    labels = torch.as_tensor(labels, device=x.device)
    if labels.shape != (len(x),) or labels.is_floating_point() or labels.is_complex():
        raise ValueError(
            f"labels must be {len(x)} whole numbers, one for each row, got {labels.dtype} of shape "
            f"{tuple(labels.shape)}"
        )
    return labels


def _check_bootstrap(confidence: float, resamples: int) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, such as 0.95, got {confidence!r}")
    if resamples < 2:
        raise ValueError(f"resamples must be at least 2, got {resamples!r}")
