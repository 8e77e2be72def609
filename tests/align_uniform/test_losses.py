"""The losses, held to the double loops of reference.py and to values known by hand.

Every comparison takes the reference of the very numbers that the loss was given, in float64, so
that a tolerance measures the loss's own rounding and not that of its input.
"""

import math
import resource
import warnings
from collections.abc import Callable

import pytest
import reference
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import unit_rows
from torch import Tensor

from align_uniform import (
    align_loss,
    contrastive_loss,
    contrastive_rank,
    in_batch_contrastive_loss,
    uniform_loss,
    uniform_loss_with_queue,
)
from align_uniform._checks import UnitLengthWarning
from align_uniform.bounds import uniformity_infimum
from align_uniform.losses import products_by_onednn

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # of q (N, C), k (N, C) and queue (C, K)


def align_of(**options: float) -> tuple[Loss, Loss]:
    return (
        lambda q, k, _: align_loss(q, k, **options),
        lambda q, k, _: reference.align(q, k, **{"alpha": 2, **options}),
    )


def uniform_of(**options: float) -> tuple[Loss, Loss]:
    return (
        lambda q, *_: uniform_loss(q, **options),
        lambda q, *_: reference.uniform(q, **{"t": 2, **options}),
    )


def queue_of(**options: float) -> tuple[Loss, Loss]:
    return (
        lambda q, _, queue: uniform_loss_with_queue(q, queue, **options),
        lambda q, _, queue: reference.uniform_with_queue(
            q, queue, **{"t": 2, "intra_batch": True, **options}
        ),
    )


def contrastive_of(tau: float) -> tuple[Loss, Loss]:
    return (
        lambda q, k, queue: contrastive_loss(q, k, queue, tau),
        lambda q, k, queue: reference.info_nce(q, k, queue, tau),
    )


def in_batch_of(tau: float) -> tuple[Loss, Loss]:
    return (
        lambda q, k, _: in_batch_contrastive_loss(q, k, tau),
        lambda q, k, _: reference.in_batch_info_nce(q, k, tau),
    )


IN_BATCH = "in-batch tau=0.2"
# name: (the loss, the reference), both as functions of (q, k, queue).
LOSSES: dict[str, tuple[Loss, Loss]] = {
    "align alpha=1": align_of(alpha=1),
    "align alpha=1.5": align_of(alpha=1.5),
    "align default": align_of(),
    "uniform default": uniform_of(),
    "uniform t=0.5": uniform_of(t=0.5),
    "queue default": queue_of(),
    "queue t=3 Eq. 21": queue_of(t=3, intra_batch=False),
    "contrastive tau=0.2": contrastive_of(0.2),
    IN_BATCH: in_batch_of(0.2),
}
# Of which of (q, k, queue) each is a function.
DEPENDS = {
    "align": (0, 1), "uniform": (0,), "queue": (0, 2), "contrastive": (0, 1, 2), "in-batch": (0, 1),
}  # fmt: skip
QUEUE_LOSSES = [name for name in LOSSES if name.startswith(("queue", "contrastive"))]

each_loss = pytest.mark.parametrize("name", LOSSES)
each_queue_loss = pytest.mark.parametrize("name", QUEUE_LOSSES)
each_dtype = pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)], ids=["fp32", "fp64"]
)


def batch(n: int, c: int, size: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """float64 q (n, c), k (n, c) about 45 degrees from q, queue (c, size)."""
    q = unit_rows(n, c, seed)
    k = F.normalize(q + unit_rows(n, c, seed + 1), dim=1)
    return q, k, unit_rows(size, c, seed + 2).t().contiguous()


def value_and_gradients(
    loss: Loss, q: Tensor, k: Tensor, queue: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """The loss, and its gradient with respect to q and k (zeros where it does not depend on it)."""
    leaves = [x.detach().clone().requires_grad_() for x in (q, k)]
    value = loss(*leaves, queue)
    gradients = torch.autograd.grad(value, leaves, materialize_grads=True)
    return value.detach(), list(gradients)


def assert_equals_reference(
    losses: tuple[Loss, Loss], inputs: tuple[Tensor, ...], tolerance: float, of_gradient: float = 1
) -> None:
    """Value within `tolerance` relatively; gradients within `of_gradient` times it, relatively to
    their largest entry."""
    loss, expected_loss = losses
    q, k, queue = inputs
    value, gradients = value_and_gradients(loss, q, k, queue)
    expected, expected_gradients = value_and_gradients(
        expected_loss, q.double(), k.double(), queue.double()
    )
    assert value.shape == () and value.dtype == q.dtype
    assert value.item() == pytest.approx(expected.item(), rel=tolerance, abs=tolerance)
    for gradient, wanted in zip(gradients, expected_gradients, strict=True):
        assert gradient.dtype == q.dtype
        largest = wanted.abs().max().item()
        assert (gradient.double() - wanted).abs().max().item() <= of_gradient * tolerance * largest


@pytest.mark.parametrize("length", [1.0, 1.7])
def test_reference_expressions_equal_its_double_loops(length: float) -> None:
    """What the losses are held to below is what the equations say, term by term."""
    q, k, queue = (length * x for x in batch(5, 4, 7))
    taus = [(0.07,), (0.2,), (1.0,)]
    for name, inputs, arguments in (
        ("align", (q, k), [(1,), (1.5,), (2,), (3,)]),
        ("uniform", (q,), [(0.5,), (2,), (100,)]),
        ("uniform_with_queue", (q, queue), [(t, b) for t in (0.5, 2, 100) for b in (True, False)]),
        ("info_nce", (q, k, queue), taus),
        ("in_batch_info_nce", (q, k), taus),
    ):
        for more in arguments:
            loop = getattr(reference, f"loop_{name}")(*inputs, *more)
            assert getattr(reference, name)(*inputs, *more).item() == pytest.approx(loop, rel=1e-12)


@each_loss
@each_dtype
@pytest.mark.parametrize(("n", "c", "size"), [(2, 2, 1), (7, 5, 11), (33, 64, 300)])
def test_value_and_gradient_equal_the_reference(
    name: str, dtype: torch.dtype, tolerance: float, n: int, c: int, size: int
) -> None:
    """For rows of any length too, where 2 - 2<x, y> is not a squared distance, in value or in
    radial gradient."""
    q, k, queue = batch(n, c, size)
    assert_equals_reference(LOSSES[name], [x.to(dtype) for x in (q, k, queue)], tolerance)
    of_rows, of_keys = (torch.linspace(0.5, 1.5, x, dtype=torch.float64) for x in (n, size))
    scaled = (q * of_rows[:, None], k * of_rows.flip(0)[:, None], queue * of_keys)
    assert_equals_reference(LOSSES[name], [x.to(dtype) for x in scaled], tolerance)


@each_loss
def test_a_loss_is_a_function_of_its_inputs(name: str) -> None:
    """Nothing is changed by its computation, nor by that of the gradient, which queue terms take in
    the forward pass; weights of the loss come later."""
    inputs = batch(5, 4, 6)
    before = [x.clone() for x in inputs]
    q, k, queue = inputs
    loss, _ = LOSSES[name]
    plain = loss(q, k, queue)
    assert not plain.requires_grad
    leaf = q.clone().requires_grad_()
    with torch.no_grad():
        assert not loss(leaf, k, queue).requires_grad
    value = loss(leaf, k, queue)
    torch.testing.assert_close(value.detach(), plain)
    (once,) = torch.autograd.grad(value, leaf, retain_graph=True)
    (weighted,) = torch.autograd.grad(-3.5 * value, leaf, retain_graph=True)
    (again,) = torch.autograd.grad(value, leaf)
    torch.testing.assert_close(weighted, -3.5 * once)
    assert torch.equal(again, once)
    for x, unchanged in zip(inputs, before, strict=True):
        assert torch.equal(x, unchanged)


def hessian_product(
    loss: Loss, q: Tensor, k: Tensor, queue: Tensor, path: str
) -> tuple[Tensor, ...]:
    """The Hessian by (q, k) times a vector, through the normalisation, by one way to ask for it."""
    leaves = [x.detach().clone().requires_grad_() for x in (q, k)]
    vectors = [torch.cos(torch.arange(x.numel()).to(x)).view_as(x) for x in leaves]

    def value(*leaves: Tensor) -> Tensor:
        return loss(*(F.normalize(x, dim=1) for x in leaves), queue)

    if path == "grad":
        grads = torch.autograd.grad(
            value(*leaves), leaves, create_graph=True, materialize_grads=True
        )
        return torch.autograd.grad(grads, leaves, vectors, materialize_grads=True)
    if path == "backward":
        value(*leaves).backward(create_graph=True)
        grads = [x.grad for x in leaves if x.grad is not None]
        for x in leaves:
            x.grad = None
        torch.autograd.backward(grads, vectors[: len(grads)])
        return tuple(torch.zeros_like(x) if x.grad is None else x.grad for x in leaves)
    vectorize = path == "hessian, vectorized"
    blocks = torch.autograd.functional.hessian(value, tuple(leaves), vectorize=vectorize)
    return tuple(
        sum(torch.tensordot(block, vector, 2) for block, vector in zip(row, vectors, strict=True))
        for row in blocks
    )


@each_loss
@pytest.mark.parametrize("path", ["grad", "backward", "hessian", "hessian, vectorized"])
def test_second_derivatives_are_right(name: str, path: str) -> None:
    """The sweeps know one derivative; asked with create_graph=True, the losses know all."""
    inputs = [1.3 * x for x in batch(5, 3, 7)]
    loss, expected_loss = LOSSES[name]
    found = hessian_product(loss, *inputs, path)
    wanted = hessian_product(expected_loss, *inputs, "grad")
    assert any(part.abs().max() > 1e-3 for part in wanted)
    torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", ["uniform default", *QUEUE_LOSSES])
def test_other_ways_to_a_second_derivative_are_refused(name: str) -> None:
    """torch.func's transforms and forward mode: an error, never a wrong number."""
    q, k, queue = batch(5, 4, 6)

    def value(q: Tensor) -> Tensor:
        return LOSSES[name][0](q, k, queue)

    for transform in (torch.func.grad, torch.func.hessian, torch.func.jacfwd, torch.func.vmap):
        with pytest.raises(RuntimeError):
            transform(value)(q if transform is not torch.func.vmap else q[None])
    with pytest.raises(RuntimeError), torch.autograd.forward_ad.dual_level():
        value(torch.autograd.forward_ad.make_dual(q, torch.ones_like(q)))


@each_queue_loss
def test_queue_may_be_overwritten_before_backward(name: str) -> None:
    """MoCo enqueues between forward and backward, and the losses keep no copy of the queue. Only
    second derivatives need it as it was."""
    q, k, queue = batch(5, 4, 6)
    _, (expected, _) = value_and_gradients(LOSSES[name][1], q, k, queue)
    q.requires_grad_()
    value = LOSSES[name][0](q, k, queue)
    queue.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(value, q, create_graph=True)
    value.backward()
    torch.testing.assert_close(q.grad, expected, rtol=1e-10, atol=1e-12)


@each_queue_loss
@pytest.mark.parametrize("onednn", [True, False], ids=["onednn", "plain"])
@pytest.mark.parametrize("block_size", [1, 3, 2048])
@pytest.mark.parametrize(("n", "c", "size"), [(1, 1, 1), (1, 5, 7), (6, 1, 9), (7, 16, 20)])
def test_both_matrix_products_are_right(
    name: str, onednn: bool, block_size: int, n: int, c: int, size: int, monkeypatch
) -> None:
    """float32 on a CPU goes through oneDNN or through `@`; also for rows, columns and blocks of
    one, and with queries and keys that lie in memory in other orders."""
    if onednn and not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("a torch without oneDNN")
    monkeypatch.setattr("align_uniform.losses.BLOCK_SIZE", block_size)
    monkeypatch.setattr("align_uniform.losses.products_by_onednn", lambda: onednn)
    q, k, queue = (x.float() for x in batch(n, c, size))
    q, k = 0.9 * q, 0.8 * k  # of unit rows with C = 1, the positive ties with half of the queue
    for keys in (queue, queue.t().contiguous().t()):
        assert_equals_reference(LOSSES[name], (q, k, keys), 2e-5)
    by_columns = q.t().contiguous().t()
    loss, expected_loss = LOSSES[name]
    torch.testing.assert_close(loss(by_columns, k, queue), loss(q, k, queue))
    same_q, same_k = q[:1].expand(4, c), k[:1].expand(4, c)
    wanted = expected_loss(same_q.double(), same_k.double(), queue.double())
    assert loss(same_q, same_k, queue).item() == pytest.approx(wanted.item(), rel=1e-5, abs=1e-5)
    own = (q.double() * k.double()).sum(dim=1, keepdim=True)
    nearer = (q.double() @ queue.double() > own).sum(dim=1)
    assert contrastive_rank(by_columns, k, queue).tolist() == nearer.tolist()


@pytest.mark.parametrize(
    ("capability", "vendor", "chosen"),
    [
        ("AVX512", "vendor_id\t: AuthenticAMD\n", True),
        ("AVX2", "vendor_id\t: AuthenticAMD\n", False),
        ("AVX512", "vendor_id\t: GenuineIntel\n", False),
        ("DEFAULT", "", False),
    ],
)
def test_the_machine_decides_on_the_product(
    capability: str, vendor: str, chosen: bool, monkeypatch
) -> None:
    """A measurement might decide otherwise when a run is resumed."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr("align_uniform.losses._cpu_vendor", lambda: vendor)
    monkeypatch.setattr("align_uniform.losses._ONEDNN_LINEAR", object())
    assert products_by_onednn.__wrapped__() is chosen


@pytest.mark.parametrize("name", ["align alpha=1.5", "uniform default", *QUEUE_LOSSES, IN_BATCH])
def test_compiled_in_one_graph(name: str) -> None:
    """torch.compile sees through the sweep, without a break, to the same value and gradients."""
    loss, _ = LOSSES[name]
    q, k, queue = (x.float() for x in batch(9, 8, 5000))
    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    value, gradients = value_and_gradients(compiled, q, k, queue)
    wanted, wanted_gradients = value_and_gradients(loss, q, k, queue)
    torch.testing.assert_close(value, wanted)
    torch.testing.assert_close(gradients, wanted_gradients)


@each_loss
def test_autocast_leaves_float32_input_in_float32(name: str) -> None:
    """Value and gradient under bf16 autocast are the float32 ones, to the last bit."""
    q, k, queue = (x.float() for x in batch(16, 32, 200))
    loss, _ = LOSSES[name]
    value, gradients = value_and_gradients(loss, q, k, queue)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (q @ queue).dtype == torch.bfloat16  # autocast is in force
        cast_value, cast_gradients = value_and_gradients(loss, q, k, queue)
    assert cast_value.dtype == torch.float32
    torch.testing.assert_close(cast_value, value, rtol=0, atol=0)
    torch.testing.assert_close(cast_gradients, gradients, rtol=0, atol=0)


@each_loss
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_input_is_computed_in_float32(
    name: str, dtype: torch.dtype, autocast: bool
) -> None:
    """The value equals the reference of the rounded numbers; gradients have the input's type."""
    q, k, queue = (x.to(dtype) for x in batch(16, 32, 200))
    loss, expected_loss = LOSSES[name]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        value, gradients = value_and_gradients(loss, q, k, queue)
    expected, wanted = value_and_gradients(expected_loss, q.double(), k.double(), queue.double())
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    for gradient, target in zip(gradients, wanted, strict=True):
        assert gradient.dtype == dtype
        torch.testing.assert_close(
            gradient.double(), target, rtol=8e-3, atol=1e-4 * target.abs().max().item()
        )


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float64])
def test_queue_of_another_type_is_cast_to_the_queries_type(kind: torch.dtype) -> None:
    q, k, queue = (x.float() for x in batch(6, 8, 30))
    other = queue.to(kind)
    for name in QUEUE_LOSSES:
        value = LOSSES[name][0](q, k, other)
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, LOSSES[name][0](q, k, other.float()))


@each_dtype
def test_known_values(dtype: torch.dtype, tolerance: float) -> None:
    """Rows that coincide, are antipodal or orthogonal; pairs that coincide among negatives that all
    coincide with them or are orthogonal. A loss that is nearly 0 is not rounded to 0."""
    e = torch.eye(4, dtype=dtype)
    same, cases = e[:1].expand(4, 4), []
    for other, squared in ((e[0], 0), (-e[0], 4), (e[1], 2)):
        for alpha in (1, 1.5, 2, 3):
            cases.append((align_loss(same, other.expand(4, 4), alpha), squared ** (alpha / 2)))
        for t in (0.5, 2, 3):
            cases.append((uniform_loss(torch.stack([e[0], other]), t), -t * squared))
            keys = other[:, None].expand(4, 3)
            cases.append((uniform_loss_with_queue(e[:1], keys, t), -t * squared))
    for tau in (0.05, 0.2):
        far = math.exp(-1 / tau)
        cases += [
            (contrastive_loss(same, same, same.t(), tau), math.log(5)),
            (contrastive_loss(same, same, e[1][:, None].expand(4, 4), tau), math.log1p(4 * far)),
            (in_batch_contrastive_loss(same, same, tau), math.log(4)),
            (in_batch_contrastive_loss(e, e, tau), math.log1p(3 * far)),
        ]
    for value, expected in cases:
        absolute = 1e-12 if expected else 10 * tolerance
        assert value.item() == pytest.approx(expected, rel=10 * tolerance, abs=absolute)
    one = e[:1].clone().requires_grad_()
    loss = in_batch_contrastive_loss(one, e[1:2], tau=0.2)
    (gradient,) = torch.autograd.grad(loss, one)
    assert loss.item() == 0 and not gradient.any(), "one pair has no negatives"


def test_collapsed_random_direction_is_zero() -> None:
    """Rounding of |x|^2 + |y|^2 - 2<x, y> does not show where every distance is 0."""
    q = unit_rows(1, 128).float().expand(64, 128)
    assert align_loss(q, q).item() == 0
    assert uniform_loss(q).item() == pytest.approx(0, abs=5e-6)
    assert uniform_loss_with_queue(q, q.t()).item() == pytest.approx(0, abs=5e-6)


@pytest.mark.parametrize(("t", "value"), [(2, -3.938), (3, -5.860)])
def test_random_queue_of_128_dimensions(t: float, value: float) -> None:
    """What MoCo's first step prints: queries against the random queue it starts from."""
    q, queue = unit_rows(64, 128, seed=1).float(), unit_rows(16384, 128, seed=2).float().t()
    for intra_batch in (True, False):
        loss = uniform_loss_with_queue(q, queue, t, intra_batch).item()
        assert loss == pytest.approx(value, abs=3e-3)
        assert loss == pytest.approx(uniformity_infimum(128, t), abs=3e-3)


def test_a_tie_is_not_more_similar() -> None:
    e1, e2 = torch.eye(2)
    ties = torch.stack([e1, e2, e1], dim=1)
    assert contrastive_rank(e1[None], e1[None], ties).tolist() == [0]
    assert contrastive_rank(e1[None], e2[None], ties).tolist() == [2]


@pytest.mark.parametrize("alpha", [1, 1.5, 2, 3])
def test_align_is_finite_for_coincident_float32_rows(alpha: float) -> None:
    """(2 - 2<q, k>)^(alpha/2) is NaN there, as <q, q> rounds to more than 1 in some of the rows."""
    q = unit_rows(256, 128).float()
    assert (2 - 2 * (q * q).sum(dim=1)).min() < 0  # the trap is there
    x, y = q.clone().requires_grad_(), q.clone().requires_grad_()
    loss = align_loss(x, y, alpha)
    loss.backward()
    assert loss.item() == 0
    for gradient in (x.grad, y.grad):
        assert gradient.isfinite().all()
        assert gradient.norm(dim=1).max() <= 1.01 / len(q)  # at most the slope of alpha = 1


@each_dtype
@pytest.mark.parametrize(("scale", "dim", "t"), [(1, 128, 100), (30 * 768**0.5, 768, 2)])
def test_potentials_below_what_exp_can_show(
    dtype: torch.dtype, tolerance: float, scale: float, dim: int, t: float
) -> None:
    """exp(-100 d^2) is 0 in float32 for all pairs of random features, as exp(-2 d^2) is for those
    that were not normalised; and the log of 0 is -inf."""
    q, k, queue = (scale * x.to(dtype) for x in batch(32, dim, 500))
    if dtype == torch.float32:
        assert (-t * torch.pdist(q).square()).exp().mean().log() == -math.inf
    # The weights of the pairs are exp(rounding of t d^2): gradients are as much less exact.
    for losses in (uniform_of(t=t), queue_of(t=t), queue_of(t=t, intra_batch=False)):
        assert_equals_reference(losses, (q, k, queue), tolerance, of_gradient=t * scale**2)


@pytest.mark.parametrize("make", [contrastive_of, in_batch_of])
@pytest.mark.parametrize("tau", [0.07, 0.005])
@pytest.mark.parametrize("size", [1, 300])
def test_small_temperature(make: Callable, tau: float, size: int) -> None:
    """exp(1 / 0.005) is beyond float32. Errors are measured by 1 / tau, the size of the logits: a
    loss that is nearly 0 is a small difference of large numbers.
    """
    inputs = [x.float() for x in batch(8, 16, size)]
    loss, expected_loss = make(tau)
    value, gradients = value_and_gradients(loss, *inputs)
    expected, wanted = value_and_gradients(expected_loss, *(x.double() for x in inputs))
    assert value.item() == pytest.approx(expected.item(), abs=1e-6 / tau)
    for gradient, target in zip(gradients, wanted, strict=True):
        assert (gradient.double() - target).abs().max().item() <= 1e-5 / tau


@each_loss
def test_nan_shows_in_the_loss(name: str) -> None:
    """The trainer stops on a non-finite loss, so none of the sweeps may swallow one."""
    for spoilt in range(3):
        inputs = [x.clone() for x in batch(5, 4, 6)]
        inputs[spoilt][2, 1] = math.nan
        depends = spoilt in DEPENDS[name.split()[0]]
        assert LOSSES[name][0](*inputs).isnan().item() == depends


@pytest.mark.long
def test_uniform_loss_beyond_the_old_limit_of_pdist() -> None:
    """torch.pdist failed past 46,341 rows, and holds all 1.08e9 distances (4.3 GB) at once."""
    x = unit_rows(46_500, 2).float().requires_grad_()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB
    loss = uniform_loss(x)
    loss.backward()
    growth = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert loss.item() == pytest.approx(uniformity_infimum(2, 2), abs=1e-3)
    assert x.grad.isfinite().all()
    assert growth < 2 * 1024**2


@pytest.fixture
def never_warned(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process that has just started."""
    monkeypatch.setattr("align_uniform.losses._unit_length", UnitLengthWarning())


def length_warnings(call: Callable[[], object]) -> list[warnings.WarningMessage]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [one for one in caught if "unit length" in str(one.message)]


@each_loss
@pytest.mark.parametrize("spoilt", [0, 1, 2])
@pytest.mark.parametrize("length", [40, 1.1, 0.5, 0])
def test_features_far_from_unit_length_are_warned_of_once(
    name: str, spoilt: int, length: float, never_warned: None
) -> None:
    """Whichever argument it is, and however many were of unit length before; from the caller's
    line. Values and gradients are what the equation says all the same."""
    loss, _ = LOSSES[name]
    unit = [x.float() for x in batch(6, 4, 200)]
    assert not length_warnings(lambda: [loss(*unit) for _ in range(3)])
    inputs = [x.clone().requires_grad_(i < 2) for i, x in enumerate(unit)]
    inputs[spoilt] = length * inputs[spoilt]
    if spoilt < 2:
        inputs[spoilt] = torch.cat([unit[spoilt][:5], inputs[spoilt][5:]])  # one row is enough
    caught = length_warnings(lambda: [loss(*inputs) for _ in range(2)])
    assert len(caught) == (spoilt in DEPENDS[name.split()[0]])
    for one in caught:
        assert one.filename == __file__ and f"{length:.4g}" in str(one.message)
    assert not length_warnings(lambda: loss(*(3 * x.detach() for x in inputs))) or not caught


@each_loss
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("c", [2, 128])
def test_rounded_unit_rows_are_of_unit_length(
    name: str, dtype: torch.dtype, c: int, never_warned: None
) -> None:
    """Rounded and cast back too. NaN is no length."""
    q, k, queue = (x.to(dtype) for x in batch(64, c, 300))
    loss, _ = LOSSES[name]
    assert not length_warnings(lambda: loss(q, k, queue))
    assert not length_warnings(lambda: loss(q.float(), k.float(), queue.float()))
    assert not length_warnings(lambda: loss(math.nan * q, k, queue))


def test_lengths_are_not_looked_at_where_there_are_no_numbers(never_warned: None) -> None:
    """Under vmap, and while compiling."""
    q, k, _ = batch(6, 4, 1)
    pairs = torch.stack([2 * q, k])
    assert not length_warnings(lambda: torch.func.vmap(align_loss)(pairs, pairs))
    compiled = torch.compile(align_loss, fullgraph=True, backend="aot_eager")
    assert not length_warnings(lambda: compiled(2 * q, k))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_is_not_waited_for(never_warned: None) -> None:
    q, k, queue = (x.float().cuda() for x in batch(64, 8, 500))
    q.requires_grad_()
    for loss, _ in LOSSES.values():
        loss(q, k, queue)  # what is made at first use
    torch.cuda.set_sync_debug_mode("error")
    try:
        for loss, _ in LOSSES.values():
            loss(40 * q, k, queue).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert len(length_warnings(lambda: [align_loss(40 * q, k), align_loss(q, k)])) == 1


ROWS = torch.eye(4, 8)
KEYS = torch.eye(8, 5)


def test_bad_rows_are_refused_by_name() -> None:
    for name, loss in (
        ("x", lambda x: align_loss(x, x)),
        ("x", uniform_loss),
        ("q", lambda q: uniform_loss_with_queue(q, KEYS)),
        ("q", lambda q: contrastive_loss(q, q, KEYS, 0.2)),
        ("x", lambda x: in_batch_contrastive_loss(x, x, 0.2)),
    ):
        for rows, message in (
            (ROWS[0], r"\(N, C\).*got \(8,\)"),
            (ROWS[None], r"\(N, C\).*got \(1, 4, 8\)"),
            (ROWS[:0], r"\(N, C\).*got \(0, 8\)"),
            (ROWS.long(), r"floating-point.*got torch\.int64"),
            (ROWS.tolist(), r"tensor.*got list"),
        ):
            with pytest.raises(ValueError, match=f"^{name} .*{message}"):
                loss(rows)


def test_a_bad_queue_is_refused() -> None:
    for queue, message in (
        (KEYS.t(), r".*\(C, K\).*C = 8.*got \(5, 8\)"),
        (KEYS[:, 0], r".*\(C, K\).*got \(8,\)"),
        (KEYS[:, :0], r".*K >= 1.*got \(8, 0\)"),
        (KEYS.long(), r".*floating-point.*got torch\.int64"),
        (KEYS.clone().requires_grad_(), "must not require a gradient"),
    ):
        with pytest.raises(ValueError, match=f"^queue {message}"):
            uniform_loss_with_queue(ROWS, queue)
        with pytest.raises(ValueError, match=f"^queue {message}"):
            contrastive_loss(ROWS, ROWS, queue, 0.2)


def test_pairs_that_do_not_match_are_refused() -> None:
    """Those too that would broadcast."""
    for other, message in (
        (ROWS[:3], r"expected shape \(4, 8\), got \(3, 8\)"),
        (ROWS[:1], r"expected shape \(4, 8\), got \(1, 8\)"),
        (ROWS[:, :7], r"expected shape \(4, 8\), got \(4, 7\)"),
        (ROWS.long(), r"floating-point.*got torch\.int64"),
    ):
        with pytest.raises(ValueError, match=f"^y .*{message}"):
            align_loss(ROWS, other)
        with pytest.raises(ValueError, match=f"^k .*{message}"):
            contrastive_loss(ROWS, other, KEYS, 0.2)
    with pytest.raises(ValueError, match="at least 2 rows.*got 1"):
        uniform_loss(ROWS[:1])


@pytest.mark.parametrize("value", [0, -1, -0.5, math.nan, math.inf, None, "2"])
def test_scalars_must_be_positive_numbers(value: float) -> None:
    for name, call in (
        ("alpha", lambda: align_loss(ROWS, ROWS, alpha=value)),
        ("t", lambda: uniform_loss(ROWS, t=value)),
        ("t", lambda: uniform_loss_with_queue(ROWS, KEYS, t=value)),
        ("tau", lambda: contrastive_loss(ROWS, ROWS, KEYS, tau=value)),
        ("tau", lambda: in_batch_contrastive_loss(ROWS, ROWS, tau=value)),
    ):
        with pytest.raises(ValueError, match=f"^{name} .*positive.*got {value!r}$"):
            call()


def test_alpha_below_one_is_for_values_only() -> None:
    """Its slope is infinite where a pair coincides: no gradient, whichever side asks for it."""
    q, k, _ = batch(6, 4, 1)
    message = r"alpha=0\.5 .*alpha >= 1"
    with pytest.raises(ValueError, match=message):
        align_loss(q.clone().requires_grad_(), k, alpha=0.5)
    with pytest.raises(ValueError, match=message):
        align_loss(q, k.clone().requires_grad_(), alpha=0.5)

    expected = reference.align(q, k, alpha=0.5)
    torch.testing.assert_close(align_loss(q, k, alpha=0.5), expected)
    with torch.no_grad():
        torch.testing.assert_close(align_loss(q.requires_grad_(), k, alpha=0.5), expected)


# Reproducible, since CI must not fail by chance; shapes and exponents are what hypothesis picks.
property_test = settings(max_examples=40, deadline=None, derandomize=True)
seeds = st.integers(0, 10_000)
few = st.integers(2, 9)
ts = st.floats(0.1, 20)


@property_test
@given(n=few, c=few, size=few, seed=seeds, alpha=st.floats(0.25, 4), t=ts)
def test_published_ranges(n: int, c: int, size: int, seed: int, alpha: float, t: float) -> None:
    """align in [0, 2^alpha], uniform in [-4t, 0], InfoNCE >= 0, for pairs near and far."""
    slack = 1e-9
    q, k, queue = batch(n, c, size, seed)
    for other in (k, -k, unit_rows(n, c, seed + 3), q, -q):
        assert -slack <= align_loss(q, other, alpha).item() <= 2**alpha + slack
        assert contrastive_loss(q, other, queue, tau=0.2).item() >= -slack
    values = [uniform_loss(q, t), uniform_loss(torch.cat([q, -q]), t)]
    for keys in (queue, q.t(), -q.t()):
        values += [uniform_loss_with_queue(q, keys, t, intra) for intra in (True, False)]
    for value in values:
        assert -4 * t - slack <= value.item() <= slack
