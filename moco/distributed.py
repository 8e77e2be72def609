"""Collectives: the exchange between processes. They and moco.launch alone name torch.distributed.

Every function here is a no-op (or the identity) without a process group, so that all other code
runs unchanged in a single process.

    rank 0 holds images 0..N-1 of the global batch, rank 1 holds N..2N-1, and so on.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from moco.errors import TrainingError

_timeout = timedelta(minutes=30)  # of all that ranks do together; see `set_timeout`

# Newer torch has renamed the call, and warns of the old name.
_GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"


def is_active() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    return dist.get_rank() if is_active() else 0


def world_size() -> int:
    return dist.get_world_size() if is_active() else 1


def is_main() -> bool:
    """Rank 0: the one that prints and writes files."""
    return rank() == 0


def set_timeout(timeout: timedelta) -> None:
    """How long a rank waits for the others before it gives up."""
    global _timeout
    _timeout = timeout


def print_main(*values: object) -> None:
    """print() on rank 0 only."""
    if is_main():
        print(*values, flush=True)


def data_parallel(module: torch.nn.Module) -> torch.nn.Module:
    """Average gradients over ranks; the module itself in a single process.

    Parameters and buffers start as rank 0's. Buffers are not sent again: ranks hold equal queues by
    construction, and rank 0's batch-norm statistics are the ones that are saved. (DDP's default
    would resend the 32 MiB queue in every step.)
    """
    if world_size() == 1:
        return module
    broadcast_buffers(module)
    # Newer torch has renamed the option.
    known = inspect.signature(DistributedDataParallel.__init__).parameters
    sync = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    # Without device_ids, with which it would send every argument to the GPU: lengths of sentences
    # have to stay on the CPU.
    return DistributedDataParallel(module, **{sync: False})


def all_gather(rows: Tensor, span: int | None = None) -> Tensor:
    """Rows of all ranks in rank order, (N, ...) -> (W*N, ...); N is equal on all ranks. With `span`
    only of the ranks that share a group with this one: of `span` consecutive ones."""
    ranks = span or world_size()
    if ranks == 1:
        return rows
    gathered = rows.new_empty(ranks * len(rows), *rows.shape[1:])
    getattr(dist, _GATHER)(gathered, rows.contiguous(), group=_ranks_around(span))
    return gathered


def gather_with_gradient(rows: Tensor, span: int | None = None) -> Tensor:
    """As `all_gather`, for a loss that each of these ranks then computes alike from all rows.

    The gradient is that of the sum of their losses, as data-parallel averaging expects: as many
    times that of one of them.
    """
    ranks = span or world_size()
    return rows if ranks == 1 else _GatherWithGradient.apply(rows, ranks)


class _GatherWithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, span):
        ctx.span = span
        return all_gather(rows, span)

    @staticmethod
    def backward(ctx, slope):
        return ctx.span * slope.chunk(ctx.span)[rank() % ctx.span], None


_around: dict[int, tuple[object, object]] = {}  # span -> (all ranks, those around this one)


def _ranks_around(span: int | None) -> dist.ProcessGroup | None:
    """The process group of the `span` consecutive ranks that this one is among. All ranks must ask
    for it together, as they make it the first time."""
    if span is None or span == world_size():
        return None
    everyone = dist.group.WORLD
    if _around.get(span, (None, None))[0] is not everyone:
        groups = [list(range(r, r + span)) for r in range(0, world_size(), span)]
        # Its own time-out would be ten minutes under NCCL, whatever that of the whole group.
        _around[span] = everyone, dist.new_subgroups_by_enumeration(groups, timeout=_timeout)[0]
    return _around[span][1]


def exchange_rows(rows: Tensor, permutation: Tensor) -> Tensor:
    """This rank's part of the global batch in the order of `permutation`, (N, ...) -> (N, ...).

    Row p of the permuted global batch is row permutation[p] of the global batch. Only rows that
    change rank travel, (W-1)/W of them on average, each once.

    Args:
        rows: this rank's N rows of the global batch.
        permutation: (W*N,) on the CPU, the same on all ranks.
    """
    n, world, me = len(rows), world_size(), rank()
    if world == 1:
        return rows[to_device(permutation, rows.device)]
    owner = permutation.div(n, rounding_mode="floor").view(world, n)  # [d, i]: who has d's row i
    # What I send, grouped by destination, each group in the destination's order.
    mine = owner == me
    send = to_device(permutation.view(world, n)[mine] - me * n, rows.device)
    send_sizes = mine.sum(dim=1).tolist()
    # What I receive comes grouped by source, each group in my order: a stable sort by owner.
    arrival = to_device(owner[me].argsort(stable=True), rows.device)
    receive_sizes = owner[me].bincount(minlength=world).tolist()
    # Whatever the memory order of the rows, what travels is one after another.
    received = rows.new_empty(rows.shape)
    dist.all_to_all_single(received, rows[send].contiguous(), receive_sizes, send_sizes)
    permuted = torch.empty_like(rows)
    permuted[arrival] = received
    return permuted


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor`, from the CPU, on `device`, without waiting for what the device is doing."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def sum_over_ranks(value: Tensor, span: int | None = None) -> Tensor:
    """Sum over ranks, in place; with `span` over the consecutive ones that share a group."""
    if world_size() > 1 and span != 1:
        dist.all_reduce(value, group=_ranks_around(span))
    return value


def is_communication_error(error: RuntimeError) -> bool:
    """Whether talking to another process has failed: it has ended, or did not come in time."""
    if isinstance(error, dist.DistError):
        return True
    text = str(error).lower()
    return is_active() and any(word in text for word in ("gloo", "nccl", "connection", "timed out"))


@contextlib.contextmanager
def failure_names_ranks(when: Callable[[], str] = str) -> Iterator[None]:
    """A collective that fails (a rank has ended, was killed, or hangs) ends in one line that says
    which rank does not answer.

    Args:
        when: gives words for that line, " in epoch 3, step 14".

    Raises:
        TrainingError: in place of that of the collective.
    """
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, TrainingError) or not is_communication_error(error):
            raise
        silent = ", ".join(map(str, silent_ranks()))
        raise TrainingError(
            f"rank {rank()} could not talk to the others{when()}"
            + (f"; no answer from rank {silent}" if silent else "")
            + f": {' '.join(str(error).split())[:300]}; go on with --resume auto"
        ) from error


def silent_ranks(seconds: float = 5) -> list[int]:
    """Ranks that do not answer: dead or hanging. To be called when a collective has failed, by all
    ranks that notice; it needs only the store through which they met, whatever the backend."""
    missing = list(range(world_size()))

    def ask() -> None:
        store = dist.distributed_c10d._get_default_store()
        with contextlib.suppress(RuntimeError):
            store.set(f"alive/{rank()}", "yes")
            while missing:
                missing[:] = [r for r in missing if not store.check([f"alive/{r}"])]
                time.sleep(0.1)

    # In a thread, because the store waits for ever for a process that hangs.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(seconds)
    if rank() in missing:  # the store itself does not answer
        in_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        return [] if in_torchrun else [0]  # else it lives in rank 0
    return list(missing)


def any_rank(*flags: bool, device: torch.device) -> list[bool]:
    """For each flag, whether it is set on any rank; the same answer on all of them."""
    counts = sum_numbers(*map(float, flags), device=device)
    return [bool(count) for count in counts]


def sum_numbers(*numbers: float, device: torch.device) -> list[float]:
    """For each number its sum over ranks, in float32; the device is waited for."""
    if world_size() == 1:
        return list(numbers)
    return sum_over_ranks(torch.tensor(numbers, device=device)).tolist()


def gather_uneven(rows: Tensor) -> Tensor:
    """Rows of all ranks in rank order, where ranks may have different numbers of them."""
    if world_size() == 1:
        return rows
    shapes = all_gather(torch.tensor([rows.shape], device=rows.device))  # (W, dimensions)
    sizes = shapes[:, 0].tolist()
    # A rank without rows need not know how wide they are.
    padded = rows.new_zeros(max(sizes), *shapes[:, 1:].amax(dim=0).tolist())
    if len(rows):
        padded[: len(rows)] = rows
    parts = all_gather(padded).split(max(sizes))
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


@torch.no_grad()
def broadcast_buffers(module: torch.nn.Module) -> None:
    """Send rank 0's buffers (batch-norm statistics, queue) to all other ranks."""
    if world_size() > 1:
        for buffer in module.buffers():
            sent = buffer.contiguous()  # the queue is stored transposed
            dist.broadcast(sent, src=0)
            buffer.copy_(sent)


def broadcast_object(value: object) -> object:
    """Rank 0's value on all ranks; plain Python data."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gather_objects(value: object) -> list:
    """Every rank's value on all ranks, in rank order; plain Python data of any size."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def ranks_that_differ(tensors: Sequence[Tensor]) -> list[int]:
    """Ranks whose tensors are not bit for bit those of rank 0; [] when all agree."""
    if world_size() == 1:
        return []
    # A sum of the bits, weighted by position, so that swapped values show as well. Integers wrap.
    sums = []
    for tensor in tensors:
        flat = tensor.detach().contiguous().view(-1)
        words = torch.int32 if flat.element_size() % 4 == 0 else torch.uint8
        bits = flat.view(words).to(torch.int64)
        place = torch.arange(1, len(bits) + 1, device=bits.device)
        sums.append((bits * place).sum())
    all_sums = all_gather(torch.stack(sums).unsqueeze(0))  # (W, tensors)
    return (all_sums != all_sums[0]).any(dim=1).nonzero().flatten().tolist()


def barrier() -> None:
    """Wait for all ranks. Gloo names the ranks that have not come within the time-out."""
    if world_size() == 1:
        return
    backend = dist.get_backend()
    if backend == "gloo":
        dist.monitored_barrier(timeout=_timeout, wait_all_ranks=True)
    else:  # NCCL would guess this rank's GPU, and warn of that
        dist.barrier(device_ids=[torch.cuda.current_device()] if backend == "nccl" else None)
