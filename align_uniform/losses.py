"""The losses: alignment, uniformity (in the batch and against a queue) and MoCo's InfoNCE.

Shapes: N batch on this rank, K queue, C feature dimension. `x, y, q, k` are (N, C) with unit rows,
`queue` is (C, K) with unit columns. Unit length is the caller's business (`F.normalize`); lengths
far from 1 are warned of once in a process. The equations hold as written for other lengths too,
since squared distances are computed as |x|^2 + |y|^2 - 2<x, y>; only the published ranges do not.

All losses return a float32 scalar (float64 for float64 input), under autocast as well: the error of
bf16 products is 1 % in the alignment loss. They can be differentiated any number of times; for that
the queue must still be what it was. torch.compile and torch.func's transforms refuse second
derivatives of those that sweep.
"""

from __future__ import annotations

import functools
import math
import platform
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from align_uniform._checks import UnitLengthWarning, check_alpha, check_positive

# Keys per block of a sweep: few enough for a block of scores (N x 2048) to be still in the cache
# when its exponentials are taken and when it is multiplied back onto the keys, many enough for what
# a block costs whatever its size. On a GPU that is the launches, so blocks are longer there.
BLOCK_SIZE, GPU_BLOCK_SIZE = 2048, 16384

_unit_length = UnitLengthWarning()

# oneDNN's matrix product, which torch has in builds for x86 and shows in no public function.
_ONEDNN_LINEAR = getattr(torch.ops.mkldnn, "_linear_pointwise", None)


def _in_full_precision(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Run `loss` outside autocast, on float32 copies of half-precision arguments."""

    def upcast(value: object) -> object:
        if isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16):
            return value.float()
        return value

    @functools.wraps(loss)
    def wrapped(first: Tensor, *args: object, **kwargs: object) -> Tensor:
        device_type = first.device.type if isinstance(first, Tensor) else "cpu"
        with torch.autocast(device_type, enabled=False):
            return loss(
                upcast(first),
                *(upcast(value) for value in args),
                **{name: upcast(value) for name, value in kwargs.items()},
            )

    return wrapped


@_in_full_precision
def align_loss(x: Tensor, y: Tensor, alpha: float = 2) -> Tensor:
    """Alignment loss, mean_i ||x_i - y_i||^alpha (arXiv:2005.10242, section 4.1 and Figure 6).

    Args:
        x, y: (N, C) features of positive pairs, unit rows; gradient flows to both.
        alpha: exponent, > 0; at least 1 when a gradient is asked for, because below 1 the slope is
            infinite where the two views coincide.

    Returns:
        Scalar in [0, 2^alpha]; 0 when all pairs coincide.

    Raises:
        ValueError: for shapes, dtypes or an alpha other than the above.

    The distance is the norm of the difference, not (2 - 2<x, y>)^(1/2): rounding makes the latter's
    base negative for about a fifth of all coincident float32 pairs, and its power NaN.
    The second derivative is NaN where a pair coincides.
    """
    _check_features(x, "x")
    _check_features(y, "y", like=x)
    check_alpha(alpha, x, y)
    _unit_length.look_at(x, "x of align_loss")
    _unit_length.look_at(y, "y of align_loss")
    return torch.linalg.vector_norm(x - y, dim=1).pow(alpha).mean()


@_in_full_precision
def uniform_loss(x: Tensor, t: float = 2) -> Tensor:
    """Uniformity loss, the log of the mean Gaussian potential over all pairs of the batch.

        log( 2 / (N(N-1)) * sum_{i<j} exp(-t ||x_i - x_j||^2) )

    (arXiv:2005.10242, section 4.1 and Figure 6: unordered pairs, no self-pairs.)

    Args:
        x: (N, C) features, unit rows, N >= 2.
        t: inverse temperature of the potential, > 0.

    Returns:
        Scalar in [-4t, 0]; 0 when all features coincide. The least value that an infinite
        population can reach is `align_uniform.bounds.uniformity_infimum(C, t)`.

    Raises:
        ValueError: for shapes, dtypes, N or t other than the above.
    """
    _check_features(x, "x")
    check_positive(t, "t")
    if len(x) < 2:
        raise ValueError(f"uniform_loss needs at least 2 rows to make a pair, got {len(x)}")
    _unit_length.look_at(x, "x of uniform_loss")
    return _log_sum_pairs(x, t) - math.log(len(x) * (len(x) - 1) / 2)


@_in_full_precision
def uniform_loss_with_queue(
    q: Tensor,
    queue: Tensor,
    t: float = 2,
    intra_batch: bool = True,
    *,
    groups: int = 1,
    gather: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Uniformity loss of queries against a queue of keys (arXiv:2005.10242, Eq. 21 and 22).

        Eq. 21: log( 1/(NK) * sum_ij exp(-t ||q_i - queue_j||^2) )
        Eq. 22: log( [ sum_ij  exp(-t ||q_i - queue_j||^2)
                     + sum_{i<j} exp(-t ||q_i - q_j||^2) ] / (NK + N(N-1)/2) )

    Args:
        q: (N, C) queries, unit rows; gradient flows to them.
        queue: (C, K) keys, unit columns, constants: without gradient.
        t: inverse temperature of the potential, > 0.
        intra_batch: Eq. 22 (pairs within the batch count too, each once) or Eq. 21. The pairs are
            few (N/2K of the terms) but carry gradient on both sides.
        groups: the loss is the mean over so many groups of consecutive queries of the loss of each,
            N being the size of a group: what as many devices compute together.
        gather: for one group that is spread over processes: maps rows of this process to those of
            all of them, (n, ...) -> (N, ...), with gradient. The queue must be the same on all.

    Returns:
        Scalar in [-4t, 0]; 0 when queries and queue are all at one point.

    Raises:
        ValueError: for shapes, dtypes, t or groups other than the above.
    """
    _check_features(q, "q")
    _check_queue(queue, q)
    check_positive(t, "t")
    if groups < 1 or len(q) % groups or (gather is not None and groups > 1):
        raise ValueError(
            f"groups must divide the {len(q)} queries, and be 1 for a group that is gathered, "
            f"got {groups!r}"
        )
    _unit_length.look_at(q, "q of uniform_loss_with_queue")
    _unit_length.look_at(_some_keys(queue), "queue of uniform_loss_with_queue")
    per_query = _log_sum_keys(q, queue, 2 * t, t) - t * q.square().sum(dim=1)  # (N,)
    if gather is not None:
        per_query, q = gather(per_query), gather(q) if intra_batch else q
    total = per_query.view(groups, -1).logsumexp(dim=1)  # (groups,)
    size = len(per_query) // groups
    pairs = float(size * queue.shape[1])
    if intra_batch and size > 1:
        total = torch.logaddexp(total, _log_sum_pairs_of_groups(q, t, groups))
        pairs += size * (size - 1) / 2
    return total.mean() - math.log(pairs)


@_in_full_precision
def contrastive_loss(q: Tensor, k: Tensor, queue: Tensor, tau: float) -> Tensor:
    """InfoNCE as MoCo uses it (He et al. 2020, arXiv:1911.05722, Eq. 1).

        mean_i -log( exp(<q_i, k_i>/tau) / [exp(<q_i, k_i>/tau) + sum_j exp(<q_i, queue_j>/tau)] )

    Args:
        q, k: (N, C) queries and their positive keys, unit rows; gradient flows to both.
        queue: (C, K) negative keys, unit columns, constants: without gradient.
        tau: temperature, > 0.

    Returns:
        Scalar >= 0; log(K + 1) when all similarities are equal.

    Raises:
        ValueError: for shapes, dtypes or a tau other than the above.
    """
    _check_features(q, "q")
    _check_features(k, "k", like=q)
    _check_queue(queue, q)
    check_positive(tau, "tau")
    _unit_length.look_at(q, "q of contrastive_loss")
    _unit_length.look_at(k, "k of contrastive_loss")
    _unit_length.look_at(_some_keys(queue), "queue of contrastive_loss")
    positive = (q * k).sum(dim=1) / tau  # (N,)
    negatives = _log_sum_keys(q, queue, 1 / tau, 0.0)  # (N,)
    # logaddexp(positive, negatives) - positive, without cancelling when the loss is small.
    return -F.logsigmoid(positive - negatives).mean()


@torch.no_grad()
@_in_full_precision
def contrastive_rank(q: Tensor, k: Tensor, queue: Tensor) -> Tensor:
    """Number of queue keys that are more similar to each query than its own key.

    The (K+1)-way accuracy that MoCo prints is `(rank < 1)` for top-1 and `(rank < 5)` for top-5.

    Args:
        q, k: (N, C) queries and positive keys, unit rows.
        queue: (C, K) negative keys, unit columns.

    Returns:
        (N,) int64 in [0, K].
    """
    _check_features(q, "q")
    _check_features(k, "k", like=q)
    _check_queue(queue, q)
    positive = (q * k).sum(dim=1, keepdim=True)  # (N, 1)
    q, rank = q.contiguous(), torch.zeros(len(q), dtype=torch.int64, device=q.device)
    for block in _blocks(queue.t().to(q.dtype)):
        # Ones and zeros of the scores' type: their sum is several times as fast as that of bools.
        rank += _product(q, block).gt_(positive).sum(dim=1).long()
    return rank


def _log_sum_keys(q: Tensor, queue: Tensor, scale: float, key_norm_weight: float) -> Tensor:
    """log sum_j exp(scale * <q_i, queue_j> - w * |queue_j|^2) for every row of q: (N,)."""
    swept = _QueueLogSumExp.apply(q, queue.t().to(q.dtype), scale, key_norm_weight, False)

    def plain(q: Tensor, queue: Tensor) -> Tensor:
        return _plain_log_sum_exp(q, queue.t().to(q.dtype), scale, key_norm_weight)

    return _differentiable_again(swept, q, queue, plain)


def _log_sum_pairs(x: Tensor, t: float) -> Tensor:
    """log sum_{i<j} exp(-t ||x_i - x_j||^2), for any N, in blocks."""
    one_side = _QueueLogSumExp.apply(x, x.detach(), 2 * t, t, True) - t * x.square().sum(dim=1)
    total = one_side.logsumexp(dim=0) - math.log(2)  # each pair stands in two rows
    # `one_side` moves x_i against constant x_j. Both ends of a pair move alike, so the whole
    # gradient is twice that one; the value stays.
    swept = 2 * total - total.detach()

    def plain(x: Tensor, keys: Tensor) -> Tensor:
        one_side = _plain_log_sum_exp(x, keys, 2 * t, t, skip_self=True)
        return (one_side - t * x.square().sum(dim=1)).logsumexp(dim=0) - math.log(2)

    return _differentiable_again(swept, x, x, plain)


def _log_sum_pairs_of_groups(x: Tensor, t: float, groups: int) -> Tensor:
    """`_log_sum_pairs` of each group of consecutive rows, (groups,). Several at once and not in
    blocks: groups are small."""
    if groups == 1:
        return _log_sum_pairs(x, t)
    x = x.view(groups, -1, x.shape[1])
    squares = x.square().sum(dim=2)  # (groups, n)
    scores = 2 * t * (x @ x.mT) - t * (squares.unsqueeze(1) + squares.unsqueeze(2))
    each_pair_once = torch.ones_like(scores[0], dtype=torch.bool).triu(1)
    return scores.masked_fill(~each_pair_once, -math.inf).flatten(1).logsumexp(dim=1)


class _QueueLogSumExp(torch.autograd.Function):
    """log sum_j exp(scale * <q_i, keys_j> - w * |keys_j|^2) for every row i of q.

    One sweep over blocks of the keys yields the value and its gradient with respect to q,

        scale * sum_j softmax_ij * keys_j,

    an online soft-max average: the running maximum of each row is kept, and what was accumulated
    is scaled down when a larger one turns up. Neither the N x K scores nor a copy of the keys live
    on until backward. Two products of 2NKC flops each are the arithmetic limit.

    With `skip_self`, keys_i is left out of row i (keys are the rows of q themselves).

    The gradient is known once only: what the losses return goes through `_DifferentiableAgain`.
    """

    @staticmethod
    def forward(ctx, q, keys, scale, key_norm_weight, skip_self):
        ctx.set_materialize_grads(False)
        want_gradient = ctx.needs_input_grad[0]
        scaled = (scale * q).contiguous()
        # The running maximum starts at the least number, not at -inf: a row whose only key so far
        # is itself has none yet, and -inf minus -inf would be NaN.
        maximum = q.new_full((len(q), 1), torch.finfo(q.dtype).min)  # (N, 1)
        total = q.new_zeros(len(q), 1)  # (N, 1) sum of exp(score - maximum)
        mean = torch.zeros_like(scaled) if want_gradient else None  # (N, C) that, times the key
        start = 0
        for block in _blocks(keys):  # (B, C)
            offset = None
            if key_norm_weight:
                offset = torch.linalg.vector_norm(block, dim=1).square_().mul_(-key_norm_weight)
            scores = _product(scaled, block, offset)  # (N, B)
            if skip_self:
                scores.diagonal(-start).fill_(-math.inf)
            new_maximum = torch.maximum(maximum, scores.amax(dim=1, keepdim=True))
            shrink = (maximum - new_maximum).exp_()
            weights = scores.sub_(new_maximum).exp_()
            total.mul_(shrink).add_(weights.sum(dim=1, keepdim=True))
            if want_gradient:
                mean.mul_(shrink).add_(_product(weights, block.t()))
            maximum = new_maximum
            start += len(block)
        if want_gradient:
            ctx.save_for_backward(mean.mul_(scale / total))
        return (maximum + total.log()).squeeze(1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        if grad is None:
            return None, None, None, None, None
        (gradient,) = ctx.saved_tensors
        return grad.unsqueeze(1) * gradient, None, None, None, None


def _differentiable_again(
    swept: Tensor, x: Tensor, keys: Tensor, plain: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """`swept`, and its derivatives of every order: see `_DifferentiableAgain`."""
    if not swept.requires_grad or torch.compiler.is_compiling():  # compiled: one derivative only
        return swept
    return _DifferentiableAgain.apply(swept, x, keys, plain)


class _DifferentiableAgain(torch.autograd.Function):
    """A value that came out of a sweep, with its gradient; and higher derivatives without one.

    To autograd the sweep's gradient is a constant: differentiated again it would be silently wrong.
    So under `create_graph=True` the gradient is that of `plain(x, keys)` instead, the same value by
    operations that autograd records, with all scores in memory. In an ordinary backward pass this
    does nothing; the keys may have been overwritten by then, as they are not looked at.
    """

    @staticmethod
    def forward(ctx, swept, x, keys, plain):
        ctx.save_for_backward(x, keys)
        ctx.plain = plain
        return swept.clone()

    @staticmethod
    def backward(ctx, grad):
        if not torch.is_grad_enabled():
            return grad, None, None, None
        x, keys = ctx.saved_tensors  # an error where they have been overwritten
        with torch.autocast(x.device.type, enabled=False):
            value = ctx.plain(x, keys)
        (gradient,) = torch.autograd.grad(value, x, grad, create_graph=True)
        return None, gradient, None, None


def _plain_log_sum_exp(
    q: Tensor, keys: Tensor, scale: float, key_norm_weight: float, skip_self: bool = False
) -> Tensor:
    """What `_QueueLogSumExp` computes, as one expression."""
    scores = scale * (q @ keys.t()) - key_norm_weight * keys.square().sum(dim=1)
    if skip_self:
        scores = scores.masked_fill(torch.eye(len(q), dtype=torch.bool, device=q.device), -math.inf)
    return scores.logsumexp(dim=1)


def _some_keys(queue: Tensor) -> Tensor:
    """At most 64 of the keys, (., C), from all over the queue."""
    return queue[:, :: -(-queue.shape[1] // 64)].t()


def _blocks(keys: Tensor) -> Iterator[Tensor]:
    """The rows of `keys` in blocks, each of them contiguous."""
    size = BLOCK_SIZE if keys.device.type == "cpu" else GPU_BLOCK_SIZE
    for start in range(0, len(keys), size):
        yield keys[start : start + size].contiguous()


@functools.cache
def products_by_onednn() -> bool:
    """Whether sweeps multiply by oneDNN on this processor: AMD's with AVX-512 only.

    The product that `@` calls is MKL's, which makes do with AVX2 on AMD's processors: measured on
    two with AVX-512, it takes twice as long and about as long; on one with AVX2 only, oneDNN takes
    10 to 25 % longer. The two round differently, so a run that is resumed must get the same one:
    what the machine is decides, and not a measurement, which could turn out otherwise next time.
    """
    has_avx512 = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    return _ONEDNN_LINEAR is not None and has_avx512 and "AuthenticAMD" in _cpu_vendor()


def _cpu_vendor() -> str:
    """What the kernel says of the processor's maker: "vendor_id : AuthenticAMD"."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor()  # "AMD64 Family 25 Model 1 Stepping 1, AuthenticAMD"
    with open(info, encoding="utf-8", errors="replace") as file:
        return next((line for line in file if line.startswith("vendor_id")), "")


def _product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a @ b.t() + bias: (n, c), (m, c) and (m,) -> (n, m). `a` is contiguous, `b` or its transpose.

    By oneDNN or by what `@` calls, see `products_by_onednn`.
    """
    if (
        a.device.type == "cpu"
        and a.dtype == torch.float32
        and torch.backends.mkldnn.enabled
        and not torch.compiler.is_compiling()
        and products_by_onednn()
    ):
        return _ONEDNN_LINEAR(a, b, bias, "none", [], "")
    return a @ b.t() if bias is None else torch.addmm(bias, a, b.t())


def _check_features(x: Tensor, name: str, like: Tensor | None = None) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"{name} must be a floating-point tensor of shape (N, C), got {got}")
    if x.dim() != 2 or x.numel() == 0:
        raise ValueError(
            f"{name} must have shape (N, C) with N, C >= 1, got {tuple(x.shape)}; "
            "flatten other dimensions first"
        )
    if like is not None and x.shape != like.shape:
        raise ValueError(
            f"{name} must pair up row by row, expected shape {tuple(like.shape)}, "
            f"got {tuple(x.shape)}"
        )


def _check_queue(queue: Tensor, q: Tensor) -> None:
    if not isinstance(queue, Tensor) or not queue.is_floating_point():
        got = queue.dtype if isinstance(queue, Tensor) else type(queue).__name__
        raise ValueError(f"queue must be a floating-point tensor of shape (C, K), got {got}")
    if queue.dim() != 2 or queue.shape[0] != q.shape[1] or queue.shape[1] == 0:
        raise ValueError(
            f"queue must have shape (C, K) with C = {q.shape[1]} as in q and K >= 1, "
            f"got {tuple(queue.shape)} (keys are its columns)"
        )
    if queue.requires_grad:
        raise ValueError("queue must not require a gradient: its keys are constants; detach it")
