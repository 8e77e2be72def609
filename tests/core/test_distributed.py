"""Two real gloo processes, started once, and what a single one does.

Each process writes what it saw to a file; the tests read both files and compare with the plain
single-process answer, for training with the float64 reference.
"""

import ast
import contextlib
import copy
import io
import os
from unittest import mock

import pytest
import torch
from harness import free_port, on_ranks
from helpers import OBJECTIVES, TinyNet, two_views
from reference import ReferenceMoCo
from torch import nn

from moco import distributed
from moco.batch_norm import split_batch_norm
from moco.builder import MoCo
from moco.data.loader import EpochBatches, rank_share
from moco.evaluate import knn as evaluate
from moco.launch import launch, visible_devices

W, N, C, K = 2, 4, 6, 18  # ranks, batch on each, features, queue: not a multiple of the batch of 8
STEPS = 4
SGD = {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3}
CPU = torch.device("cpu")


def plain_net(num_classes: int) -> nn.Module:
    return TinyNet(num_classes, batch_norm=False)


def grouped_net(num_classes: int) -> nn.Module:
    encoder = TinyNet(num_classes)
    split_batch_norm(encoder, 2)
    return encoder


# name: (encoder, terms, weights). All objectives in one process are in test_builder.py.
RUNS = {name: (plain_net, *OBJECTIVES[name]) for name in ("3 align + uniform t=3", "all terms")}
RUNS["all terms, batch norm in groups"] = (grouped_net, *OBJECTIVES["all terms"])

PERMUTATIONS = {
    "identity": list(range(8)),
    "full swap": [4, 5, 6, 7, 0, 1, 2, 3],
    "reversed": [7, 6, 5, 4, 3, 2, 1, 0],
    "within ranks": [3, 1, 0, 2, 6, 7, 5, 4],
    "one row changes rank": [0, 1, 2, 7, 4, 5, 6, 3],
    **{
        f"random {seed}": torch.randperm(8, generator=torch.Generator().manual_seed(seed)).tolist()
        for seed in range(4)
    },
}

# Global batches of W * N rows: one per kind of rows that is exchanged.
GLOBAL_ROWS = {
    "images": torch.arange(8 * 3 * 2 * 2.0).view(8, 3, 2, 2),
    "pixels": torch.arange(8 * 3, dtype=torch.uint8).view(8, 3),
    "labels": torch.arange(100, 108),
    "channels last": torch.arange(8 * 3 * 2 * 2.0)
    .view(8, 3, 2, 2)
    .to(memory_format=torch.channels_last),
    "transposed": torch.arange(8 * 3.0).view(3, 8).t(),
    "bfloat16": torch.arange(8 * 3).view(8, 3).bfloat16(),
}


# ---- In the two processes ------------------------------------------------------------------------


def in_process(device: torch.device, folder: str) -> None:
    """Everything that needs a process group, once; what each rank saw goes to rank<r>.pt."""
    torch.set_num_threads(1)
    rank = distributed.rank()
    mine = slice(rank * N, (rank + 1) * N)
    seen, screen = {}, io.StringIO()
    with contextlib.redirect_stdout(screen):
        distributed.print_main("from", rank)
    seen["screen"] = screen.getvalue()

    seen["gathered"] = {kind: distributed.all_gather(r[mine]) for kind, r in GLOBAL_ROWS.items()}
    seen["exchanged"] = {
        (kind, name): distributed.exchange_rows(rows[mine], torch.tensor(permutation))
        for kind, rows in GLOBAL_ROWS.items()
        for name, permutation in PERMUTATIONS.items()
    }
    seen["uneven"] = {
        str(sizes): distributed.gather_uneven(
            10 * rank + torch.arange(2.0 * sizes[rank]).view(-1, 2)
        )
        for sizes in ((3, 1), (1, 4), (2, 2), (0, 2), (2, 0))
    }
    value = torch.tensor([1.0, 2.0]) * (rank + 1)
    summed = distributed.sum_over_ranks(value)
    seen["sum"] = (summed, value, summed is value)
    seen["object"] = distributed.broadcast_object({"rank": rank, "list": [1, "a", None]})

    net = TinyNet(2)
    net.register_buffer("by_columns", torch.zeros(5, 3).t())
    for tensor in net.state_dict().values():
        tensor.fill_(rank + 1)
    distributed.broadcast_buffers(net)
    seen["broadcast"] = net.state_dict()
    distributed.barrier()

    batches = EpochBatches(21, W * N, seed=3)
    batches.set_epoch(1)
    seen["batches"] = list(batches)
    seen["share"] = list(rank_share(7))
    seen["knn"] = knn()

    seen["runs"] = {name: train(*run) for name, run in RUNS.items()}
    seen["pixels"] = {options: pixel_step(*options) for options in PIXEL_STEPS}
    torch.save(seen, f"{folder}/rank{rank}.pt")


def train(base, terms: dict, weights: dict) -> dict:
    """Some steps as the main does them. Ranks start from different seeds on purpose."""
    torch.manual_seed(10 + distributed.rank())
    moco = MoCo(base, C, K, 0.9, **terms)
    moco.shuffle_generator.manual_seed(5)
    model = distributed.data_parallel(moco)
    optimizer = torch.optim.SGD(moco.parameters(), **SGD)
    mine = slice(distributed.rank() * N, (distributed.rank() + 1) * N)
    seen = {"start": copy.deepcopy(moco.state_dict()), "wrapper": type(model).__name__, "steps": []}
    for step in range(STEPS):
        im_q, im_k = two_views(step, W * N)
        losses = model(im_q[mine], im_k[mine])
        optimizer.zero_grad()
        losses.combine(**weights).backward()
        optimizer.step()
        seen["steps"].append(
            {
                "losses": {name: loss.detach() for name, loss in losses.items()},
                "logits": losses.logits_contr,
                "ranks": losses.contr_rank(),
                "gradients": [p.grad.clone() for p in moco.encoder_q.parameters()],
                "state": copy.deepcopy(moco.state_dict()),
            }
        )
    return seen


# (parts, symmetric)
PIXEL_STEPS = [(1, False), (2, False), (1, True)]


def pixel_step(parts: int, symmetric: bool, start: dict | None = None) -> dict:
    """One step on images as bytes, on however many ranks, in parts as the main does it."""
    terms, weights = OBJECTIVES["all terms"]
    torch.manual_seed(10 + distributed.rank())
    moco = MoCo(plain_net, C, K, 0.9, **terms, group_size=N // 2)
    if start:
        moco.load_state_dict(start)
    given = []

    def prepare(images):
        given.append(images.dtype)
        return images.float() / 128 - 1

    moco.prepare = prepare
    model = distributed.data_parallel(moco)
    start = copy.deepcopy(moco.state_dict())
    generator = torch.Generator().manual_seed(1)
    shape = (2, W * N, 3, 8, 8)
    views = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    views = views.chunk(distributed.world_size(), dim=1)[distributed.rank()]
    for part in range(parts):
        last = part == parts - 1 or not distributed.is_active()
        with contextlib.nullcontext() if last else model.no_sync():
            losses = model(*views, part=part, parts=parts, symmetric=symmetric)
            (losses.combine(**weights) / parts).backward()
    gradients = [p.grad.clone() for p in moco.encoder_q.parameters()]
    return {"start": start, "state": moco.state_dict(), "gradients": gradients, "given": given}


class Pixels(torch.utils.data.Dataset):
    """`count` images of two classes as uint8."""

    def __init__(self, count: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.targets = [i % 2 for i in range(count)]
        shape = (count, 3, 8, 8)
        self.images = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.images[index], self.targets[index]


def knn() -> dict[str, float]:
    """k-NN accuracy of 7 images (an odd share) against a bank of 11 on however many ranks."""
    torch.manual_seed(0)
    bank, val = Pixels(11, seed=1), Pixels(7, seed=2)
    bank_loader, val_loader = (
        torch.utils.data.DataLoader(data, batch_size=3, sampler=rank_share(len(data)))
        for data in (bank, val)
    )
    return evaluate.knn_accuracy(
        plain_net(C),
        bank_loader,
        val_loader,
        classes=2,
        device=CPU,
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
        k=3,
    )


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    """What rank 0 and rank 1 saw."""
    folder = tmp_path_factory.mktemp("ranks")
    on_ranks(in_process, folder, count=W)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(W)]


# ---- The collectives ----------------------------------------------------------------------------


def test_print_main_prints_on_rank_0_only(ranks):
    assert [seen["screen"] for seen in ranks] == ["from 0\n", ""]


@pytest.mark.parametrize("kind", GLOBAL_ROWS)
def test_rows_are_gathered_and_exchanged_as_by_indexing_the_global_batch(ranks, kind):
    """Also those that are no contiguous block of memory."""
    for rank, seen in enumerate(ranks):
        for name, permutation in PERMUTATIONS.items():
            wanted, got = GLOBAL_ROWS[kind][permutation], seen["exchanged"][kind, name]
            assert got.dtype == wanted.dtype
            assert torch.equal(got, wanted[rank * N : (rank + 1) * N]), f"rank {rank}, {name}"
        assert seen["gathered"][kind].dtype == GLOBAL_ROWS[kind].dtype
        assert torch.equal(seen["gathered"][kind], GLOBAL_ROWS[kind])


def test_uneven_rows_sums_and_objects(ranks):
    """Rows are joined in rank order without padding; a sum is in place; objects are rank 0's."""
    for seen in ranks:
        for sizes, got in seen["uneven"].items():
            sizes = ast.literal_eval(sizes)
            rows = [10 * r + torch.arange(2.0 * sizes[r]).view(-1, 2) for r in range(W)]
            assert torch.equal(got, torch.cat(rows))
        summed, value, same = seen["sum"]
        assert summed.tolist() == value.tolist() == [3.0, 6.0] and same
        assert seen["object"] == {"rank": 0, "list": [1, "a", None]}


def test_broadcast_buffers_sends_buffers_and_leaves_parameters(ranks):
    """Batch-norm statistics and a buffer that is stored by columns, as the queue is."""
    buffers = {"by_columns", *(f"bn{i}.{b}" for i in (1, 2) for b in
               ("running_mean", "running_var", "num_batches_tracked"))}  # fmt: skip
    for rank, seen in enumerate(ranks):
        for name, tensor in seen["broadcast"].items():
            assert (tensor == (1 if name in buffers else rank + 1)).all(), name


def test_both_ranks_together_see_the_batches_of_one_process(ranks):
    """The samples of a step do not depend on the number of ranks."""
    single = EpochBatches(21, W * N, seed=3)
    single.set_epoch(1)
    joined = [first + second for first, second in zip(*(s["batches"] for s in ranks), strict=True)]
    assert joined == list(single)
    assert [len(batch) for batch in ranks[0]["batches"]] == [N, N]


def test_knn_accuracy_on_two_ranks_is_that_of_one(ranks):
    assert [seen["share"] for seen in ranks] == [[0, 2, 4, 6], [1, 3, 5]]
    assert ranks[0]["knn"] == ranks[1]["knn"] == knn()
    assert ranks[0]["knn"]["images"] == 7 and ranks[0]["knn"]["k"] == 3


# ---- Training ------------------------------------------------------------------------------------


def reference_of(run: str, start: dict) -> ReferenceMoCo:
    base, terms, weights = RUNS[run]
    moco = MoCo(base, C, K, 0.9, **terms)
    moco.load_state_dict(start)
    return ReferenceMoCo(
        moco.encoder_q, moco.encoder_k, moco.queue, 0, m=0.9, **SGD, **terms, **weights
    )


def assert_close(got, wanted, what: str) -> None:
    torch.testing.assert_close(
        got.double(), wanted.detach(), rtol=1e-5, atol=1e-5, msg=lambda text: f"{what}: {text}"
    )


@pytest.mark.parametrize("run", RUNS)
def test_two_ranks_equal_the_reference(ranks, run):
    """Losses of each rank, averaged gradients, weights, queue and pointer of several steps. With
    batch norm in groups the keys follow the shuffle over both ranks."""
    _, terms, _ = RUNS[run]
    reference = reference_of(run, ranks[0]["runs"][run]["start"])
    generator = torch.Generator().manual_seed(5)
    for step in range(STEPS):
        im_q, im_k = (view.chunk(W) for view in two_views(step, W * N))
        wanted = reference.step(im_q, im_k, torch.randperm(W * N, generator=generator))
        for rank in range(W):
            what = f"step {step}, rank {rank}"
            got = ranks[rank]["runs"][run]["steps"][step]
            of_terms = {"contr": wanted.loss_contr, "align": wanted.loss_align,
                        "unif": wanted.loss_unif}  # fmt: skip
            assert set(got["losses"]) == {name for name, losses in of_terms.items() if losses}
            for name, loss in got["losses"].items():
                assert_close(loss, of_terms[name][rank], f"{what}, {name}")
            if wanted.logits_contr:
                tau, logits = terms["contr_tau"], wanted.logits_contr[rank]
                assert_close(got["logits"] * tau, logits * tau, f"{what}, logits")
                nearer = (got["logits"][:, 1:] > got["logits"][:, :1]).sum(dim=1)
                assert torch.equal(got["ranks"], nearer), what
            for gradient, of in zip(got["gradients"], wanted.gradients, strict=True):
                assert_close(gradient, of, f"{what}, gradient")
            assert_close(got["state"]["queue"], reference.queue, f"{what}, queue")
            assert got["state"]["queue_ptr"].tolist() == [reference.queue_ptr]
            for encoder in ("encoder_q", "encoder_k"):
                for name, parameter in getattr(reference, encoder).named_parameters():
                    name = f"{encoder}.{name}"
                    assert_close(got["state"][name], parameter, f"{what}, {name}")


@pytest.mark.parametrize("run", RUNS)
def test_weights_queues_and_pointers_are_bit_equal_on_both_ranks(ranks, run):
    """From the first step on, though the ranks drew different weights and queues; batch-norm
    statistics of groups too, as they are means over the groups of all ranks."""
    first, second = (seen["runs"][run] for seen in ranks)
    assert first["wrapper"] == "DistributedDataParallel"
    states = [(first["start"], second["start"])]
    states += [
        (a["state"], b["state"]) for a, b in zip(first["steps"], second["steps"], strict=True)
    ]
    for one, other in states:
        for name, tensor in one.items():
            assert torch.equal(tensor, other[name]), name
    assert not torch.equal(states[-1][0]["queue"], first["start"]["queue"])


def test_running_statistics_are_those_of_the_groups_of_all_ranks(ranks):
    """One step of their momentum towards the mean over groups; DDP's default would send rank 0's,
    and with them the whole queue."""
    prefix = "encoder_q."
    steps = ranks[0]["runs"]["all terms, batch norm in groups"]["steps"]
    moved = []
    for views in two_views(1, W * N)[0].chunk(W):
        encoder = grouped_net(C)
        state = {n.removeprefix(prefix): t for n, t in steps[0]["state"].items()}
        encoder.load_state_dict({name: state[name] for name in encoder.state_dict()})
        encoder(views)
        moved.append({name: t for name, t in encoder.named_buffers() if "running" in name})
    for name in moved[0]:
        mean = (moved[0][name] + moved[1][name]) / 2
        torch.testing.assert_close(steps[1]["state"][prefix + name], mean)


@pytest.mark.parametrize("options", PIXEL_STEPS, ids=["whole", "in parts", "symmetric"])
def test_bytes_in_parts_on_two_ranks_equal_one_process(ranks, options):
    """Gradients, key encoder, queue and pointer; what each encoder's images are made from, after
    the shuffle, is bytes."""
    first, second = (seen["pixels"][options] for seen in ranks)
    alone = pixel_step(*options, start=first["start"])
    for each in (first, second):
        assert set(each["given"]) == {torch.uint8}
        for gradient, wanted in zip(each["gradients"], alone["gradients"], strict=True):
            assert_close(gradient, wanted.double(), "gradient")
        for name in ("queue_ptr", "encoder_k.fc.weight", "encoder_k.conv1.weight"):
            assert_close(each["state"][name], alone["state"][name].double(), name)
    assert torch.equal(first["state"]["queue"], second["state"]["queue"])
    queue = alone["state"]["queue"]
    assert_close(first["state"]["queue"], queue.double(), "queue")
    assert not torch.equal(queue, first["start"]["queue"])


# ---- Without a process group ---------------------------------------------------------------------


def test_every_function_is_a_no_op_in_a_single_process(capsys):
    rows = torch.arange(12.0).view(4, 3)
    assert not distributed.is_active() and distributed.is_main()
    assert (distributed.rank(), distributed.world_size()) == (0, 1)
    assert distributed.all_gather(rows) is rows
    assert distributed.gather_uneven(rows) is rows
    assert distributed.sum_over_ranks(rows) is rows
    assert torch.equal(
        distributed.exchange_rows(rows, torch.tensor([2, 0, 3, 1])), rows[[2, 0, 3, 1]]
    )
    value = {"a": 1}
    assert distributed.broadcast_object(value) is value
    net = TinyNet(2)
    before = copy.deepcopy(net.state_dict())
    distributed.broadcast_buffers(net)
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())
    assert distributed.data_parallel(net) is net
    distributed.barrier()
    distributed.print_main("hello", 1)
    assert capsys.readouterr().out == "hello 1\n"


def test_what_torch_is_told_of_gpus(monkeypatch):
    """Nothing by which it sends arguments to a GPU, as lengths of sentences belong on the CPU; and
    which GPU is to wait for the others."""
    wrapped = mock.Mock(side_effect=lambda module, **options: (module, options))
    monkeypatch.setattr(distributed, "DistributedDataParallel", wrapped)
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "broadcast_buffers", lambda module: None)
    _, options = distributed.data_parallel(TinyNet(2))
    assert list(options.values()) == [False]  # no buffers either

    waited = mock.Mock()
    monkeypatch.setattr(torch.distributed, "barrier", waited)
    monkeypatch.setattr(torch.distributed, "get_backend", lambda: "nccl")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    distributed.barrier()
    waited.assert_called_once_with(device_ids=[3])


# ---- Launch --------------------------------------------------------------------------------------


@pytest.fixture
def not_torchrun(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def torchrun(monkeypatch):
    """The environment that torchrun gives to its only process."""
    for name, value in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)):
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))


def test_cpu_is_one_device():
    assert visible_devices("cpu", None) == [CPU]
    assert visible_devices("cpu", []) == [CPU]


@pytest.mark.skipif(torch.cuda.is_available(), reason="of machines without a GPU")
def test_without_a_gpu_auto_is_the_cpu_and_cuda_is_refused():
    assert visible_devices("auto", None) == [CPU]
    with pytest.raises(ValueError, match="no GPU is visible; use --device cpu"):
        visible_devices("cuda", None)
    with pytest.raises(ValueError, match="GPU 0 does not exist: 0 visible.*run on the CPU"):
        visible_devices("auto", [0])


def test_gpus_that_do_not_exist_are_refused():
    count = torch.cuda.device_count()
    for device in ("auto", "cuda"):
        with pytest.raises(ValueError, match=f"GPU {count}, {count + 3} does not exist: {count} "):
            visible_devices(device, [count, count + 3])
    with pytest.raises(ValueError, match="GPU -1 does not exist"):
        visible_devices("auto", [-1])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_visible_gpus_are_devices_one_each():
    count = torch.cuda.device_count()
    wanted = [torch.device("cuda", i) for i in range(count)]
    assert visible_devices("auto", None) == wanted
    assert visible_devices("cuda", [0]) == wanted[:1]
    with pytest.raises(ValueError, match="named twice"):
        visible_devices("auto", [0, 0])


def test_one_device_runs_in_place_without_a_process_group(not_torchrun):
    seen = []
    launch(
        lambda device, args: seen.append((os.getpid(), device, args, distributed.is_active())),
        "arguments",
        devices=[CPU],
    )
    assert seen == [(os.getpid(), CPU, "arguments", False)]


def who(device: torch.device, folder: str) -> None:
    rank = distributed.rank()
    about = [distributed.is_active(), rank, distributed.world_size(), distributed.is_main()]
    torch.save([os.getpid(), *about, str(device)], f"{folder}/rank{rank}.pt")


@pytest.mark.long
def test_several_devices_have_a_spawned_process_with_a_rank_each(not_torchrun, tmp_path):
    launch(who, str(tmp_path), devices=[CPU] * W)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(W))
    assert len({os.getpid(), first[0], second[0]}) == 3
    assert first[1:] == [True, 0, 2, True, "cpu"]
    assert second[1:] == [True, 1, 2, False, "cpu"]
    assert not distributed.is_active()


def test_several_nodes_without_an_address_are_refused(not_torchrun):
    with pytest.raises(ValueError, match="2 nodes need --dist-url tcp://HOST:PORT"):
        launch(print, None, devices=[CPU], nodes=2)


def test_under_torchrun_this_process_joins_its_group_and_leaves_it_after_an_error(torchrun):
    seen = []

    def worker(device, args):
        seen.append((os.getpid(), distributed.is_active(), distributed.rank(), device, args))
        raise KeyError("from the worker")

    with pytest.raises(KeyError, match="from the worker"):
        launch(worker, 7, devices=[CPU])
    assert seen == [(os.getpid(), True, 0, CPU, 7)]
    assert not distributed.is_active()
