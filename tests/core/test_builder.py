"""MoCo in one process: step for step the reference's, and what users rely on around it."""

import copy

import pytest
import reference
import torch
import torch.nn.functional as F
import torchvision
from helpers import OBJECTIVES, TinyNet, two_views
from reference import ReferenceMoCo
from torch import nn

from moco.batch_norm import split_batch_norm
from moco.builder import MoCo, MoCoLosses

N, C, K = 8, 6, 22  # five batches wrap around the queue within a batch
STEPS = 5
SGD = {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3}
TERMS = {"contr_tau": 0.2, "align_alpha": 2.0, "unif_t": 2.0}


def make_moco(base=TinyNet, dim: int = C, k: int = K, m: float = 0.9, **options) -> MoCo:
    torch.manual_seed(0)
    return MoCo(base, dim, k, m, **(options or TERMS))


def make_reference(moco: MoCo, terms: dict, weights: dict) -> ReferenceMoCo:
    encoders, place = (moco.encoder_q, moco.encoder_k), (moco.queue, int(moco.queue_ptr))
    return ReferenceMoCo(*encoders, *place, m=moco.m, **SGD, **terms, **weights)


def one_step(moco: MoCo, optimizer: torch.optim.Optimizer, seed: int, weights: dict) -> MoCoLosses:
    """What the main does in a step."""
    losses = moco(*two_views(seed, N))
    optimizer.zero_grad()
    losses.combine(**weights).backward()
    optimizer.step()
    return losses


def assert_close(got, wanted, what: str) -> None:
    torch.testing.assert_close(
        got.detach().double(),
        wanted.detach().double(),
        rtol=1e-5,
        atol=1e-5,
        msg=lambda text: f"{what}: {text}",
    )


def assert_equal_states(moco: MoCo, wanted: ReferenceMoCo, what: str = "") -> None:
    """Weights, batch-norm statistics, queue and pointer."""
    for encoder in ("encoder_q", "encoder_k"):
        theirs = getattr(wanted, encoder).state_dict()
        for name, tensor in getattr(moco, encoder).state_dict().items():
            assert_close(tensor, theirs[name], f"{what} {encoder}.{name}")
    assert_close(moco.queue, wanted.queue, f"{what} queue")
    assert moco.queue_ptr.tolist() == [wanted.queue_ptr]


def assert_equal_losses(losses: MoCoLosses, step, terms: dict, what: str = "") -> None:
    for name in ("loss_contr", "logits_contr", "loss_align", "loss_unif"):
        got, wanted = getattr(losses, name), getattr(step, name)
        assert (got is None) == (not wanted), name
        if wanted:
            scale = terms["contr_tau"] if name == "logits_contr" else 1  # similarities
            assert_close(got * scale, wanted[0] * scale, f"{what} {name}")


# ---- Against the reference -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("objective", "mlp"), [*((name, False) for name in OBJECTIVES), ("all terms", True)]
)
def test_steps_equal_the_reference(objective, mlp):
    """Losses, weights, batch-norm statistics, queue and pointer over several optimizer steps,
    with batch norm: in one process its statistics do not depend on the order of the samples."""
    terms, weights = OBJECTIVES[objective]
    moco = make_moco(mlp=mlp, **terms)
    slow = make_reference(moco, terms, weights)
    optimizer = torch.optim.SGD(moco.parameters(), **SGD)
    for step in range(STEPS):
        losses = one_step(moco, optimizer, step, weights)
        wanted = slow.step(*two_views(step, N))
        assert_equal_losses(losses, wanted, terms, f"step {step}")
        assert_close(losses.combine(**weights), wanted.loss, f"step {step} loss")
        assert_equal_states(moco, slow, f"after step {step}")
    assert moco.queue_ptr.item() == STEPS * N % K


@pytest.mark.parametrize("m", [0.0, 0.25, 1.0])
def test_key_encoder_keeps_the_share_m_of_itself(m):
    """m = 0 copies the query encoder, m = 1 stands still, and 0.25 is not 0.75."""
    moco = make_moco(m=m)
    with torch.no_grad():
        for p in moco.encoder_q.parameters():
            p.add_(1)
    before = [p.clone() for p in moco.encoder_k.parameters()]
    moco(*two_views(0, N))
    pairs = zip(moco.encoder_k.parameters(), moco.encoder_q.parameters(), before, strict=True)
    for key, query, old in pairs:
        torch.testing.assert_close(key, m * old + (1 - m) * query, rtol=1e-6, atol=1e-6)


def test_no_gradient_reaches_the_key_encoder_or_the_queue():
    moco = make_moco()
    moco(*two_views(0, N)).combine().backward()
    assert all(p.grad is None and not p.requires_grad for p in moco.encoder_k.parameters())
    assert all(p.grad.abs().sum() > 0 for p in moco.encoder_q.fc.parameters())
    assert not moco.queue.requires_grad


# ---- Steps in parts, symmetric steps, images as bytes --------------------------------------------


def plain_net(num_classes: int) -> nn.Module:
    return TinyNet(num_classes, batch_norm=False)


@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize("objective", ["all terms", "3 align + uniform t=3"])
def test_parts_of_a_step_relate_as_ranks_do(objective, parts):
    """The reference of as many ranks: one momentum update, one queue, the mean of the losses, all
    keys in turn. Without batch norm, so that a key is its own affair."""
    terms, weights = OBJECTIVES[objective]
    moco = make_moco(plain_net, **terms)
    slow = make_reference(moco, terms, weights)
    optimizer = torch.optim.SGD(moco.parameters(), **SGD)
    for step in range(STEPS):
        views = two_views(step, N)
        wanted = slow.step(*(view.chunk(parts) for view in views))
        optimizer.zero_grad()
        for part in range(parts):
            losses = moco(*views, part=part, parts=parts)
            (losses.combine(**weights) / parts).backward()
            for name in ("loss_contr", "loss_align", "loss_unif"):
                if getattr(wanted, name):
                    assert_close(getattr(losses, name), getattr(wanted, name)[part], name)
            if terms.get("contr_tau"):
                assert_close(losses.logits_contr, wanted.logits_contr[part], "logits")
        optimizer.step()
        assert_equal_states(moco, slow, f"after step {step}")


def test_logits_of_every_part_can_be_read_until_the_next_step():
    """So can ranks and features."""
    moco = make_moco(plain_net, contr_tau=0.2)
    with torch.no_grad():  # another key encoder, so that positives are not the nearest
        for p in moco.encoder_k.parameters():
            p.copy_(torch.randn_like(p))
    queue = moco.queue.clone()
    views = two_views(0, N)
    seen = [moco(*views, part=i, parts=2) for i in range(2)]
    assert not torch.equal(moco.queue, queue)
    for losses, im_q in zip(seen, views[0].chunk(2), strict=True):
        q = F.normalize(moco.encoder_q(im_q), dim=1)
        torch.testing.assert_close(losses.logits_contr[:, 1:], (q @ queue / 0.2).detach())
        wanted = (losses.logits_contr[:, 1:] > losses.logits_contr[:, :1]).sum(dim=1)
        assert torch.equal(losses.contr_rank(), wanted) and len(wanted.unique()) > 2
        assert torch.equal(losses.features()[2], queue)
    moco(*views, part=0, parts=2)  # the next step has begun, its keys are not in
    assert seen[0].logits_contr is not None
    moco(*views, part=1, parts=2)
    for read in (lambda: seen[0].logits_contr, seen[1].contr_rank, seen[1].features):
        with pytest.raises(RuntimeError, match="before the next step"):
            read()


def test_a_step_that_was_broken_off_leaves_no_keys_behind():
    """Part 0 begins anew; the parts of the step before it are forgotten."""

    def base(num_classes: int) -> nn.Module:
        encoder = TinyNet(num_classes)
        split_batch_norm(encoder, 2)
        return encoder

    moco, other = make_moco(base, m=1.0), make_moco(base, m=1.0)
    moco(*two_views(7, 8), part=0, parts=2)
    for each in (moco, other):
        each.shuffle_generator.manual_seed(0)
        for part in range(2):
            each(*two_views(0, 8), part=part, parts=2)
    assert torch.equal(moco.queue, other.queue)
    assert moco.queue_ptr.tolist() == other.queue_ptr.tolist() == [8]
    for name, buffer in moco.named_buffers():  # nor statistics of batch norm
        assert torch.equal(buffer, other.get_buffer(name)), name


@pytest.mark.parametrize("base", [TinyNet, plain_net], ids=["batch norm", "plain"])
def test_a_symmetric_step_is_both_directions_by_hand(base):
    """Losses and gradients are sums, the key encoder moves once, both views' keys are enqueued."""
    moco = make_moco(base, **TERMS)
    hand = copy.deepcopy(moco)
    im_a, im_b = two_views(0, N)
    losses = moco(im_a, im_b, symmetric=True)
    losses.combine(2, 3, 0.5).backward()

    queue = hand.queue.clone()
    hand.update_key_encoder()
    total, sums, keys, logits = 0, {"contr": 0, "align": 0, "unif": 0}, [], []
    for queries_of, keys_of in ((im_a, im_b), (im_b, im_a)):
        q = F.normalize(hand.encoder_q(queries_of), dim=1)
        with torch.no_grad():
            k = F.normalize(hand.encoder_k(keys_of), dim=1)
        parts = {
            "contr": reference.info_nce(q, k, queue, TERMS["contr_tau"]),
            "align": reference.align(q, k, TERMS["align_alpha"]),
            "unif": reference.uniform_with_queue(q, queue, TERMS["unif_t"], True),
        }
        total = total + 2 * parts["contr"] + 3 * parts["align"] + 0.5 * parts["unif"]
        sums = {name: sums[name] + parts[name] for name in sums}
        keys.append(k)
        logits.append(reference.info_nce_logits(q, k, queue, TERMS["contr_tau"]))
    total.backward()
    for name, loss in losses.items():
        assert_close(loss, sums[name], name)
    pairs = zip(moco.encoder_q.parameters(), hand.encoder_q.parameters(), strict=True)
    for ours, wanted in pairs:
        assert_close(ours.grad, wanted.grad, "gradient")
    for ours, wanted in zip(moco.encoder_k.parameters(), hand.encoder_k.parameters(), strict=True):
        assert torch.equal(ours, wanted)
    assert moco.queue_ptr.tolist() == [2 * N]
    assert_close(moco.queue[:, : 2 * N], torch.cat(keys).t(), "queue")
    assert torch.equal(moco.queue[:, 2 * N :], queue[:, 2 * N :])
    assert_close(losses.logits_contr, torch.cat(logits), "logits")
    assert losses.contr_rank().shape == (2 * N,)
    q = torch.cat([F.normalize(hand.encoder_q(im), dim=1) for im in (im_a, im_b)])
    assert_close(losses.feature_std(), q.std(dim=0, correction=0).mean() * C**0.5, "std")


def test_images_are_prepared_right_before_they_are_encoded():
    """uint8 pixels are queried in order, and shuffled as bytes before the keys' encoder sees them
    as floats; the state dict does not know."""
    moco, floats = make_moco(), make_moco()
    seen = []

    def prepare(images):
        seen.append(images)
        return images.float() / 128 - 1

    moco.prepare = prepare
    generator = torch.Generator().manual_seed(0)
    im_q, im_k = torch.randint(0, 256, (2, N, 3, 8, 8), generator=generator, dtype=torch.uint8)
    losses = moco(im_q, im_k)
    wanted = floats(im_q.float() / 128 - 1, im_k.float() / 128 - 1)
    assert torch.equal(losses.combine(), wanted.combine())
    assert torch.equal(moco.queue, floats.queue)
    assert [each.dtype for each in seen] == [torch.uint8] * 2
    order = torch.randperm(N, generator=torch.Generator().manual_seed(0))
    assert torch.equal(seen[0], im_q) and torch.equal(seen[1], im_k[order])
    assert not torch.equal(order, torch.arange(N))
    assert moco.state_dict().keys() == floats.state_dict().keys()
    moco.prepare = nn.Identity()  # a module will do
    assert isinstance(moco.prepare, nn.Identity)


# ---- State ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("mlp", [False, True], ids=["linear", "mlp"])
def test_state_dict_has_upstreams_names_and_shapes_and_nothing_else(mlp):
    base = torchvision.models.resnet18
    state = make_moco(base, dim=16, k=32, mlp=mlp, **TERMS).state_dict()
    wanted = {}
    for name, tensor in base(num_classes=16).state_dict().items():
        wanted[name] = tensor.shape
    if mlp:
        for part in ("weight", "bias"):
            wanted[f"fc.2.{part}"] = wanted.pop(f"fc.{part}")
        wanted |= {"fc.0.weight": (512, 512), "fc.0.bias": (512,)}
    wanted = {f"{e}.{name}": s for e in ("encoder_q", "encoder_k") for name, s in wanted.items()}
    wanted |= {"queue": (16, 32), "queue_ptr": (1,)}
    assert {name: tuple(t.shape) for name, t in state.items()} == {
        name: tuple(shape) for name, shape in wanted.items()
    }
    assert state["queue_ptr"].dtype == torch.int64
    assert state["queue"].dtype == torch.float32


@pytest.mark.parametrize("mlp", [False, True], ids=["linear", "mlp"])
def test_a_seed_gives_the_weights_that_it_gives_upstream(mlp):
    """The random numbers are drawn in upstream's order: query encoder, key encoder, the new linear
    layer of each head, queue of shape (C, K)."""
    moco = make_moco(mlp=mlp, **TERMS)
    for query, key in zip(moco.encoder_q.parameters(), moco.encoder_k.parameters(), strict=True):
        assert torch.equal(query, key)
    torch.manual_seed(0)
    encoder, _ = TinyNet(C), TinyNet(C)
    if mlp:
        hidden, _ = nn.Linear(8, 8), nn.Linear(8, 8)
        encoder.fc = nn.Sequential(hidden, nn.ReLU(), encoder.fc)
    for (name, tensor), wanted in zip(
        moco.encoder_q.state_dict().items(), encoder.state_dict().values(), strict=True
    ):
        assert torch.equal(tensor, wanted), name
    assert torch.equal(moco.queue, F.normalize(torch.randn(C, K), dim=0))


def is_stored_by_rows(moco: MoCo) -> bool:
    """The queue is shown as (C, K) and lies in memory as (K, C), one key after another."""
    return moco.queue.shape == (C, K) and moco.queue.t().is_contiguous()


def test_queue_is_stored_key_by_key_and_stays_so():
    """After loading upstream's (C, K) row-major queue, after changes of type, and after steps."""
    moco = make_moco()
    assert is_stored_by_rows(moco)
    state = {name: t.clone(memory_format=torch.contiguous_format) for name, t in
             make_moco().state_dict().items()}  # fmt: skip
    state["queue"] = F.normalize(torch.randn(C, K), dim=0)
    assert state["queue"].is_contiguous()
    moco.load_state_dict(state)
    assert is_stored_by_rows(moco) and torch.equal(moco.queue, state["queue"])
    storage = moco.queue.data_ptr()
    moco(*two_views(0, N))
    assert is_stored_by_rows(moco) and moco.queue.data_ptr() == storage
    moco.to(torch.float64)
    assert is_stored_by_rows(moco)
    moco.float()
    assert is_stored_by_rows(moco)


def test_losses_under_autocast_are_those_of_the_encoders_outputs_in_float32():
    """The encoders compute in bf16; features are normalised without further rounding."""
    moco = make_moco()
    outputs = []
    moco.encoder_q.register_forward_hook(lambda *arguments: outputs.append(arguments[2]))
    queue = moco.queue.clone()
    with torch.autocast("cpu", torch.bfloat16):
        losses = moco(*two_views(0, N))
        combined = losses.combine()
    assert outputs[0].dtype == torch.bfloat16
    q = F.normalize(outputs[0].detach().double(), dim=1)
    assert_close(losses.loss_unif, reference.uniform_with_queue(q, queue, 2.0), "loss")
    assert {loss.dtype for _, loss in losses.items()} == {combined.dtype} == {torch.float32}
    combined.backward()
    assert all(p.grad.isfinite().all() for p in moco.encoder_q.parameters())
    assert moco.queue.dtype == torch.float32
    torch.testing.assert_close(moco.queue.norm(dim=0), torch.ones(K))


# ---- MoCoLosses ----------------------------------------------------------------------------------


def features(moco: MoCo, im_q, im_k):
    """Unit features of both views, computed apart from MoCo, before its step."""
    moco = copy.deepcopy(moco).double()
    q = moco.encoder_q(im_q.double()).detach()
    moco.update_key_encoder()
    k = moco.encoder_k(im_k.double()).detach()
    return F.normalize(q, dim=1), F.normalize(k, dim=1)


@pytest.mark.parametrize("pointer", [0, 17], ids=["at the start", "wrapping around"])
def test_logits_are_those_against_the_queue_from_before_the_batch(pointer):
    """[<q, k>, <q, queue>] / tau, also when asked for after the optimizer's step."""
    moco = make_moco(contr_tau=0.07)
    moco.queue_ptr.fill_(pointer)
    im_q, im_k = two_views(3, N)
    q, k = features(moco, im_q, im_k)
    queue = moco.queue.clone().double()
    losses = moco(im_q, im_k)
    losses.combine(1, 0, 0).backward()
    torch.optim.SGD(moco.parameters(), 0.1).step()
    wanted = torch.cat([(q * k).sum(dim=1, keepdim=True), q @ queue], dim=1) / 0.07
    logits = losses.logits_contr
    assert logits.shape == (N, 1 + K) and not logits.requires_grad
    torch.testing.assert_close(logits.double(), wanted, rtol=1e-5, atol=2e-5)
    after = torch.cat([wanted[:, :1], q @ moco.queue.double() / 0.07], dim=1)
    assert (logits - after).abs().max() > 0.1  # the queue has moved on, the logits have not
    # InfoNCE is the cross-entropy of these logits with the positive at 0.
    target = torch.zeros(N, dtype=torch.int64)
    torch.testing.assert_close(F.cross_entropy(logits, target), losses.loss_contr.detach())


def test_combine_is_the_weighted_sum():
    losses = MoCoLosses(torch.tensor(5.0), torch.tensor(0.25), torch.tensor(-3.0))
    assert losses.combine().item() == pytest.approx(5 + 0.25 - 3)
    assert losses.combine(2, 4, 0.5).item() == pytest.approx(10 + 1 - 1.5)
    assert losses.combine(0, 0, 1).item() == -3


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_zero_weight_skips_its_term_even_if_it_is_not_finite(bad):
    """0 * inf is NaN, in the value and in the gradient."""
    x = torch.tensor(2.0, requires_grad=True)
    losses = MoCoLosses(loss_contr=x * bad, loss_align=3 * x, loss_unif=None)
    total = losses.combine(contr_w=0, align_w=1, unif_w=0)
    total.backward()
    assert total.item() == 6 and x.grad.item() == 3


@pytest.mark.parametrize("name", ["contr", "align", "unif"])
def test_combine_refuses_a_weight_for_a_term_that_is_off(name):
    parameter = {"contr": "contr_tau", "align": "align_alpha", "unif": "unif_t"}[name]
    terms = {key: value for key, value in TERMS.items() if key != parameter}
    losses = make_moco(**terms)(*two_views(0, N))
    with pytest.raises(ValueError, match=f"{name}_w=1, but this term is off"):
        losses.combine()
    losses.combine(**{f"{name}_w": 0})  # and takes a zero


# ---- Refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "an objective needs a term"),
        ({"unif_intra_batch": False}, "an objective needs a term"),
        ({"contr_tau": 0}, "contr_tau must be positive and finite, got 0"),
        ({"contr_tau": -0.1}, "contr_tau must be positive and finite, got -0.1"),
        ({"contr_tau": float("nan")}, "contr_tau must be positive and finite, got nan"),
        ({"contr_tau": float("inf")}, "contr_tau must be positive and finite, got inf"),
        ({"align_alpha": 0.5}, "align_alpha must be at least 1 and finite, got 0.5"),
        ({"align_alpha": 0}, "align_alpha must be at least 1"),
        ({"align_alpha": float("inf")}, "align_alpha must be at least 1 and finite, got inf"),
        ({"unif_t": 0}, "unif_t must be positive and finite, got 0"),
        ({"unif_t": float("nan")}, "unif_t must be positive"),
        ({"unif_t": 2.0, "m": 1.5}, r"m must be in \[0, 1\], got 1.5"),
        ({"unif_t": 2.0, "m": -0.1}, r"m must be in \[0, 1\]"),
        ({"unif_t": 2.0, "m": float("nan")}, r"m must be in \[0, 1\]"),
        ({"unif_t": 2.0, "K": 0}, "dim and K must be at least 1, got dim=6 and K=0"),
        ({"unif_t": 2.0, "dim": 0}, "dim and K must be at least 1, got dim=0"),
    ],
)
def test_constructor_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        MoCo(TinyNet, **{"dim": C, "K": K, **options})


def test_terms_are_keyword_only():
    """A fifth positional argument is upstream's T, which would be taken for another parameter."""
    with pytest.raises(TypeError):
        MoCo(TinyNet, C, K, 0.999, 0.07)


@pytest.mark.parametrize(
    ("k", "step", "message"),
    [
        (N - 1, {}, rf"queue \(K={N - 1}\).*1 x {N} images; use a larger K"),
        (2 * N - 1, {"symmetric": True}, "images x 2; use a larger K"),
        (2 * N - 1, {"symmetric": True, "parts": 2}, "images x 2; use a larger K"),
        *((K, {"part": part, "parts": parts}, f"parts of a step come in turn.* got part={part} of")
          for part, parts in [(1, 2), (2, 2), (-1, 1), (0, 0), (1, 1)]),
        (K, {"im_k": two_views(0, N)[1][:-1]}, r"one shape, got \(8, 3, 8, 8\), \("),
        (K, {"im_k": two_views(0, N)[1][..., :-1]}, r"one shape, got \(8, 3, 8, 8\), \("),
        (K, {"parts": 3}, "does not split into 3 equal parts"),
    ],
)  # fmt: skip
def test_a_step_that_cannot_be_is_refused_before_anything_changes(k, step, message):
    moco = make_moco(k=k)
    before = copy.deepcopy(moco.state_dict())
    im_q, im_k = two_views(0, N)
    with pytest.raises(ValueError, match=message):
        moco(**{"im_q": im_q, "im_k": im_k, **step})
    for name, tensor in moco.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize(("k", "symmetric"), [(N, False), (2 * N, True)])
def test_a_queue_of_one_steps_keys_is_large_enough(k, symmetric):
    moco = make_moco(k=k)
    moco(*two_views(0, N), symmetric=symmetric)
    assert moco.queue_ptr.item() == 0
