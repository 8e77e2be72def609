"""Two real gloo processes, started once, and what a single one does: collectives, and training
beside the float64 reference. Parts of a step, more processes: test_groups.py."""

import ast
import contextlib
import copy
import io
from unittest import mock

import pytest
import torch
from harness import differences, on_ranks
from helpers import OBJECTIVES, TinyNet, two_views
from reference import ReferenceMoCo
from torch import nn

from moco import distributed
from moco.batch_norm import split_batch_norm
from moco.builder import MoCo

W, N, C, K = 2, 4, 6, 18  # ranks, batch on each, features, queue: not a multiple of the batch of 8
STEPS = 4
SGD = {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3}
CPU = torch.device("cpu")


# A run of all terms, batch norm in groups. All objectives in one process are in test_builder.py.
TERMS, WEIGHTS = OBJECTIVES["all terms"]


def grouped_net(num_classes: int) -> nn.Module:
    encoder = TinyNet(num_classes)
    split_batch_norm(encoder, 2)
    return encoder


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

    seen["run"] = train()
    torch.save(seen, f"{folder}/rank{rank}.pt")


def train() -> dict:
    """Some steps as the main does them. Ranks start from different seeds on purpose."""
    torch.manual_seed(10 + distributed.rank())
    moco = MoCo(grouped_net, C, K, 0.9, **TERMS)
    moco.shuffle_generator.manual_seed(5)
    model = distributed.data_parallel(moco)
    optimizer = torch.optim.SGD(moco.parameters(), **SGD)
    mine = slice(distributed.rank() * N, (distributed.rank() + 1) * N)
    seen = {"start": copy.deepcopy(moco.state_dict()), "wrapper": type(model).__name__, "steps": []}
    for step in range(STEPS):
        im_q, im_k = two_views(step, W * N)
        losses = model(im_q[mine], im_k[mine])
        optimizer.zero_grad()
        losses.combine(**WEIGHTS).backward()
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


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    """What rank 0 and rank 1 saw."""
    folder = tmp_path_factory.mktemp("ranks")
    on_ranks(in_process, folder, count=W)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(W)]


# ---- The collectives ----------------------------------------------------------------------------


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


def test_uneven_rows_sums_objects_and_the_screen(ranks):
    """Rows are joined in rank order without padding; a sum is in place; objects are rank 0's, and
    so is the screen."""
    assert [seen["screen"] for seen in ranks] == ["from 0\n", ""]
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


# ---- Training ------------------------------------------------------------------------------------


def assert_close(got, wanted, what: str) -> None:
    torch.testing.assert_close(
        got.double(), wanted.detach(), rtol=1e-5, atol=1e-5, msg=lambda text: f"{what}: {text}"
    )


def test_two_ranks_equal_the_reference_and_each_other(ranks):
    """Losses of each rank, averaged gradients, weights, queue and pointer of several steps. Keys
    follow the shuffle over both ranks. States are bit-equal, though the ranks drew other weights
    and queues; batch-norm statistics too, as they are means over the groups of all ranks."""
    first, second = (seen["run"] for seen in ranks)
    assert first["wrapper"] == "DistributedDataParallel"
    assert differences(dict(first["start"]), dict(second["start"])) == []
    moco = MoCo(grouped_net, C, K, 0.9, **TERMS)
    moco.load_state_dict(first["start"])
    reference = ReferenceMoCo(
        moco.encoder_q, moco.encoder_k, moco.queue, 0, m=0.9, **SGD, **TERMS, **WEIGHTS
    )
    generator = torch.Generator().manual_seed(5)
    for step in range(STEPS):
        im_q, im_k = (view.chunk(W) for view in two_views(step, W * N))
        wanted = reference.step(im_q, im_k, torch.randperm(W * N, generator=generator))
        states = [dict(run["steps"][step]["state"]) for run in (first, second)]
        assert differences(*states) == [], step
        for rank in range(W):
            what = f"step {step}, rank {rank}"
            got = ranks[rank]["run"]["steps"][step]
            of_terms = {"contr": wanted.loss_contr, "align": wanted.loss_align,
                        "unif": wanted.loss_unif}  # fmt: skip
            assert set(got["losses"]) == set(of_terms)
            for name, loss in got["losses"].items():
                assert_close(loss, of_terms[name][rank], f"{what}, {name}")
            tau, logits = TERMS["contr_tau"], wanted.logits_contr[rank]
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
