"""The recipe has groups, not devices: groups in one process, one on each of several, or spread over
several, and parts of a step, train the same weights."""

import contextlib
import functools
from datetime import timedelta
from unittest import mock

import pytest
import torch
from harness import on_ranks
from helpers import OBJECTIVES, TinyNet, two_views
from reference import ReferenceMoCo
from torch import nn

from moco import distributed
from moco.batch_norm import split_batch_norm
from moco.builder import MoCo
from moco.config import Encoder, Placement, PretrainConfig, PretrainData, PretrainOptim
from moco.tasks.moco import MoCoTask

BATCH, C, K = 16, 6, 38
STEPS = 10
SGD = {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3}
TERMS, WEIGHTS = OBJECTIVES["all terms"]

# (group size, intra-batch pairs, symmetric)
RECIPES = [
    (4, True, False),
    (4, False, False),
    (8, True, False),
    (8, True, True),
    (16, True, False),
]
# (processes, parts of a step): groups of 8 lie on 1 or 2 of 4 processes, groups of 16 on all
PLACES = [(1, 2), (2, 1), (2, 2), (4, 1)]


def fits(recipe: tuple, place: tuple) -> bool:
    part = BATCH // place[0] // place[1]
    return part % recipe[0] == 0 or place[1] == 1


def encoder(num_classes: int, *, splits: int, span: int) -> nn.Module:
    net = TinyNet(num_classes)
    split_batch_norm(net, splits, span)
    return net


def train(recipe: tuple, parts: int) -> dict:
    """Ten steps in float64 on however many ranks: losses, and the state in the end."""
    size, intra_batch, symmetric = recipe
    share = BATCH // distributed.world_size()
    part_size = share // parts
    torch.manual_seed(3)
    moco = MoCo(
        functools.partial(
            encoder, splits=max(1, part_size // size), span=max(1, size // part_size)
        ),
        C, K, 0.9, **TERMS, unif_intra_batch=intra_batch, group_size=size,
    ).double()  # fmt: skip
    moco.shuffle_generator.manual_seed(5)
    model = distributed.data_parallel(moco)
    optimizer = torch.optim.SGD(moco.parameters(), **SGD)
    mine = slice(distributed.rank() * share, (distributed.rank() + 1) * share)
    losses = []
    for step in range(STEPS):
        views = [view[mine].double() for view in two_views(step, BATCH)]
        optimizer.zero_grad()
        total = 0
        for part in range(parts):
            apart = part < parts - 1 and distributed.is_active()
            with model.no_sync() if apart else contextlib.nullcontext():
                loss = model(*views, part=part, parts=parts, symmetric=symmetric).combine(**WEIGHTS)
                (loss / parts).backward()
            total += loss.detach() / parts
        optimizer.step()
        losses.append(distributed.sum_over_ranks(total) / distributed.world_size())
    return {"losses": torch.stack(losses), **moco.state_dict()}


def on_a_rank(device: torch.device, folder: str) -> None:
    torch.set_num_threads(1)
    processes, patience = distributed.world_size(), timedelta(minutes=7)
    distributed.set_timeout(patience)
    name = "new_subgroups_by_enumeration"
    make = getattr(torch.distributed, name)
    with mock.patch.object(torch.distributed, name, wraps=make) as made:
        for place in PLACES:
            for recipe in RECIPES:
                if place[0] == processes and fits(recipe, place):
                    path = f"{folder}/{place}{recipe}{distributed.rank()}"
                    torch.save(train(recipe, place[1]), path)
    # Ranks that share a group wait for each other as long as all do, and meet once.
    waits = [call.kwargs["timeout"] for call in made.call_args_list]
    assert waits == [patience] * (processes == 4), waits


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What each rank of 2 and of 4 processes ended with."""
    folder = tmp_path_factory.mktemp("groups")
    for processes in (2, 4):
        on_ranks(on_a_rank, folder, count=processes)
    return folder


@pytest.mark.long
@pytest.mark.parametrize(
    ("recipe", "place"), [(r, p) for r in RECIPES for p in PLACES if fits(r, p)], ids=str
)
def test_a_recipe_is_the_same_function_wherever_its_groups_lie(folder, recipe, place):
    """Losses of all steps, both encoders with their running statistics, and the queue, on every
    rank, equal those of one process that takes each step at once."""
    wanted = train(recipe, 1)
    if place[0] == 1:
        ended = [train(recipe, place[1])]
    else:
        ended = [torch.load(folder / f"{place}{recipe}{rank}") for rank in range(place[0])]
    for got in ended:
        for name, tensor in wanted.items():
            torch.testing.assert_close(got[name], tensor, rtol=0, atol=1e-10, msg=name)


@pytest.mark.parametrize("intra_batch", [True, False])
@pytest.mark.parametrize("size", [4, 8])
def test_groups_of_one_process_are_the_references_ranks(size, intra_batch):
    """Slow float64 MoCo with a rank for each group, and plain batch norm on each."""
    groups = BATCH // size
    torch.manual_seed(3)
    base = functools.partial(encoder, splits=groups, span=1)
    moco = MoCo(base, C, K, 0.9, **TERMS, unif_intra_batch=intra_batch, group_size=size).double()
    plain = [TinyNet(C).double() for _ in range(2)]
    for net, split in zip(plain, (moco.encoder_q, moco.encoder_k), strict=True):
        net.load_state_dict(split.state_dict())
    slow = ReferenceMoCo(
        *plain, moco.queue, m=0.9, **SGD, **TERMS, **WEIGHTS, unif_intra_batch=intra_batch
    )
    moco.shuffle_generator.manual_seed(5)
    generator = torch.Generator().manual_seed(5)
    optimizer = torch.optim.SGD(moco.parameters(), **SGD)
    for step in range(4):
        views = [view.double() for view in two_views(step, BATCH)]
        order = torch.randperm(BATCH, generator=generator)
        wanted = slow.step(*(view.chunk(groups) for view in views), order)
        losses = moco(*views)
        optimizer.zero_grad()
        losses.combine(**WEIGHTS).backward()
        optimizer.step()
        torch.testing.assert_close(losses.combine(**WEIGHTS), wanted.loss, rtol=0, atol=1e-12)
        for name in ("loss_contr", "loss_align", "loss_unif"):
            mean = torch.stack(getattr(wanted, name)).mean()
            torch.testing.assert_close(getattr(losses, name), mean, rtol=0, atol=1e-12)
    for ours, theirs in zip(moco.parameters(), [*slow.encoder_q.parameters(),
            *slow.encoder_k.parameters()], strict=True):  # fmt: skip
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    torch.testing.assert_close(moco.queue, slow.queue, rtol=0, atol=1e-12)


def test_groups_that_do_not_fit_are_refused():
    moco = MoCo(TinyNet, C, K, align_alpha=2, group_size=3)
    with pytest.raises(ValueError, match=r"groups of 3 do not fit 1 rank\(s\) of 8 images"):
        moco(*two_views(0, 8))
    with pytest.raises(ValueError, match="group_size must be at least 1"):
        MoCo(TinyNet, C, K, align_alpha=2, group_size=0)


@pytest.mark.parametrize(
    ("devices", "size", "found"), [(2, 8, (1, 2)), (2, 4, (1, 1)), (1, 2, (4, 1))]
)
def test_a_run_norms_in_the_groups_of_its_config(devices, size, found):
    """(groups on a device, devices of a group); also of the only group, over two devices."""
    config = PretrainConfig(
        data=PretrainData(data="unused"),
        encoder=Encoder(arch="resnet8", moco_k=64, moco_dim=8, group_size=str(size)),
        optim=PretrainOptim(batch_size=8),
        placement=Placement(devices=("cpu",), processes=devices),
    )
    norms = MoCoTask(config).build_module().encoder_q.batch_norms
    assert (norms.splits, norms.span) == found
