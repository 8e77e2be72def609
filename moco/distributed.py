"""Processes and what they say to each other: the only file that names a collective.

Every function here is a no-op (or the identity) without a process group, so that all other code
runs unchanged in a single process.

    rank 0 holds images 0..N-1 of the global batch, rank 1 holds N..2N-1, and so on.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

# What clusters send before they take a job's machines away.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

_timeout = timedelta(minutes=30)  # of all that ranks do together; set by `launch`

# ------------------------------------------------------------------------------------------------
# Who am I
# ------------------------------------------------------------------------------------------------


def is_active() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    return dist.get_rank() if is_active() else 0


def world_size() -> int:
    return dist.get_world_size() if is_active() else 1


def is_main() -> bool:
    """Rank 0: the one that prints and writes files."""
    return rank() == 0


def print_main(*values: object) -> None:
    """print() on rank 0 only."""
    if is_main():
        print(*values, flush=True)


# ------------------------------------------------------------------------------------------------
# Launch
# ------------------------------------------------------------------------------------------------


def visible_devices(device: str, gpus: list[int] | None) -> list[torch.device]:
    """Devices that this node contributes, one per process.

    Args:
        device: "auto" (all visible GPUs, else the CPU), "cpu" or "cuda".
        gpus: indices of the GPUs to use; None for all.

    Raises:
        ValueError: a GPU that does not exist, or GPUs named together with the CPU.
    """
    count = torch.cuda.device_count()
    if device == "cpu":
        if gpus:
            raise ValueError(f"--device cpu was asked for together with --gpus {gpus}")
        return [torch.device("cpu")]
    if gpus is None:
        if device == "cuda" and count == 0:
            raise ValueError("--device cuda was asked for, but no GPU is visible; use --device cpu")
        gpus = list(range(count))
    missing = [index for index in gpus if not 0 <= index < count]
    if missing:
        raise ValueError(
            f"GPU {', '.join(map(str, missing))} does not exist: {count} visible on this machine"
            + (f" (0 to {count - 1})" if count else "; leave out --gpu/--gpus to run on the CPU")
        )
    if len(set(gpus)) < len(gpus):
        raise ValueError(f"a GPU is named twice in {gpus}")
    return [torch.device("cuda", index) for index in gpus] or [torch.device("cpu")]


def started_by_torchrun() -> bool:
    """torchrun (or anything alike) has started one process per device and numbered them."""
    return all(name in os.environ for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))


def planned_world_size(devices: list[torch.device], nodes: int) -> int:
    """Number of processes that `launch` will run, over all nodes."""
    if started_by_torchrun():
        return int(os.environ["WORLD_SIZE"])
    return len(devices) * nodes


def launch(
    worker: Callable[..., None],
    args: object,
    *,
    devices: list[torch.device],
    nodes: int = 1,
    node_rank: int = 0,
    dist_url: str | None = None,
    backend: str | None = None,
    timeout_minutes: float = 30,
) -> None:
    """Run `worker(device, args)` once per process, with a process group when there are several.

    Three forms: under torchrun this process is one of those already started; otherwise one process
    per entry of `devices` is started here, on this node of `nodes`; a single one runs in place.

    Args:
        devices: this node's devices, from `visible_devices`.
        nodes, node_rank: upstream's --world-size and --rank.
        dist_url: where rank 0 listens, tcp://HOST:PORT or env:// (MASTER_ADDR and MASTER_PORT);
            None takes a free port on this machine, which several nodes cannot.
        backend: None takes nccl on GPUs and gloo on CPUs.
        timeout_minutes: how long a rank waits for the others before it gives up.
    """
    timeout = timedelta(minutes=timeout_minutes)
    if started_by_torchrun():
        local_rank = int(os.environ["LOCAL_RANK"])
        if devices[0].type == "cuda" and local_rank >= len(devices):
            raise ValueError(
                f"local rank {local_rank} has no GPU: {len(devices)} usable on this node; start "
                f"torchrun with --nproc-per-node {len(devices)}"
            )
        device = devices[local_rank] if devices[0].type == "cuda" else devices[0]
        _run(
            int(os.environ["RANK"]),
            int(os.environ["WORLD_SIZE"]),
            "env://",
            backend,
            timeout,
            worker,
            device,
            args,
        )
        return
    world = len(devices) * nodes
    if world == 1:
        _set_device(devices[0])
        worker(devices[0], args)
        return
    if dist_url is None:
        if nodes > 1:
            raise ValueError(f"{nodes} nodes need --dist-url tcp://HOST:PORT of the first one")
        dist_url = f"tcp://127.0.0.1:{_free_port()}"
    first_rank = node_rank * len(devices)
    if len(devices) == 1:
        _run(first_rank, world, dist_url, backend, timeout, worker, devices[0], args)
        return
    processes = torch.multiprocessing.spawn(
        _spawned,
        args=(first_rank, world, dist_url, backend, timeout, worker, devices, args),
        nprocs=len(devices),
        join=False,
    )
    # A request to stop is sent to this process; those that train have to hear of it.
    for number in STOP_SIGNALS:
        signal.signal(number, lambda received, _: _send_to_all(processes.pids(), received))
    while not processes.join(grace_period=60):
        pass


def _send_to_all(pids: Sequence[int], number: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):  # it has ended already
            os.kill(pid, number)


def _spawned(local_rank, first_rank, world, url, backend, timeout, worker, devices, args) -> None:
    rank = first_rank + local_rank
    _run(rank, world, url, backend, timeout, worker, devices[local_rank], args)


def _run(rank, world, dist_url, backend, timeout, worker, device, args) -> None:
    global _timeout
    _timeout = timeout
    _set_device(device)
    meeting = {"init_method": dist_url}
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if dist_url == "env://" and attempt != "0":
        # torchrun's store still holds the addresses of the processes that it has replaced: without
        # a prefix of its own, gloo would try to reach those, until the time-out.
        store, _, _ = next(rendezvous(dist_url, rank, world, timeout=timeout))
        meeting = {"store": dist.PrefixStore(f"restart_{attempt}", store)}
    dist.init_process_group(
        backend or ("nccl" if device.type == "cuda" else "gloo"),
        **meeting,
        world_size=world,
        rank=rank,
        timeout=timeout,
    )
    try:
        worker(device, args)
    finally:
        dist.destroy_process_group()


def _set_device(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.set_device(device)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


# ------------------------------------------------------------------------------------------------
# Collectives
# ------------------------------------------------------------------------------------------------


def data_parallel(module: torch.nn.Module, device: torch.device) -> torch.nn.Module:
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
    return DistributedDataParallel(
        module, device_ids=[device] if device.type == "cuda" else None, **{sync: False}
    )


def all_gather(rows: Tensor) -> Tensor:
    """Rows of all ranks in rank order, (N, ...) -> (W*N, ...); N is equal on all ranks."""
    if world_size() == 1:
        return rows
    gathered = rows.new_empty(world_size() * len(rows), *rows.shape[1:])
    dist.all_gather_into_tensor(gathered, rows.contiguous())
    return gathered


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


def sum_over_ranks(value: Tensor) -> Tensor:
    """Sum over ranks, in place."""
    if world_size() > 1:
        dist.all_reduce(value)
    return value


def is_communication_error(error: RuntimeError) -> bool:
    """Whether talking to another process has failed: it has ended, or did not come in time."""
    if isinstance(error, dist.DistError):
        return True
    text = str(error).lower()
    return is_active() and any(word in text for word in ("gloo", "nccl", "connection", "timed out"))


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
    if world_size() == 1:
        return list(flags)
    counts = torch.tensor([float(flag) for flag in flags], device=device)
    return [bool(count) for count in sum_over_ranks(counts).tolist()]


def mean_over_ranks(value: Tensor) -> Tensor:
    """Mean over ranks, as a new tensor."""
    return sum_over_ranks(value.clone()) / world_size()


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
    if dist.get_backend() == "gloo":
        dist.monitored_barrier(timeout=_timeout, wait_all_ranks=True)
    else:
        dist.barrier()
