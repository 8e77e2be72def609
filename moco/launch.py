"""Processes: which devices, how many, and how they are started and meet."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous
from torch.multiprocessing import ProcessExitedException

from moco import distributed
from moco.config import Launch, Placement
from moco.distributed import STOP_SIGNALS


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


def usable_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # what this process may use: fewer under SLURM, docker
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def started_by_torchrun() -> bool:
    """torchrun (or anything alike) has started one process per device and numbered them."""
    return all(name in os.environ for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))


def place(options: Launch) -> Placement:
    """Which devices this node contributes, and how many processes run over all nodes.

    Raises:
        ValueError: GPUs that do not exist, or nodes that cannot meet.
    """
    gpus = options.gpus if options.gpu is None else (options.gpu,)
    devices = visible_devices(options.device, None if gpus is None else list(gpus))
    nodes, node_rank, local_processes = _nodes(options, len(devices))
    return Placement(
        devices=tuple(map(str, devices)),
        nodes=nodes,
        node_rank=node_rank,
        processes=planned_world_size(devices, nodes),
        local_processes=local_processes,
    )


def _nodes(options: Launch, devices: int) -> tuple[int, int, int]:
    """Number of nodes, which of them this is, processes on each."""
    if started_by_torchrun():
        nodes = int(os.environ.get("GROUP_WORLD_SIZE", 1))
        node_rank = int(os.environ.get("GROUP_RANK", 0))
        on_each_node = int(os.environ["WORLD_SIZE"]) // nodes
        return nodes, node_rank, int(os.environ.get("LOCAL_WORLD_SIZE", on_each_node))
    from_environment = options.dist_url == "env://"
    nodes, rank = options.world_size, options.rank
    if from_environment and nodes == -1:
        nodes = int(os.environ.get("WORLD_SIZE", 1))
    if from_environment and rank == -1:
        rank = int(os.environ.get("RANK", 0))
    nodes, node_rank = (1 if nodes == -1 else nodes), (0 if rank == -1 else rank)
    if nodes < 1:
        raise ValueError(f"--world-size is the number of nodes, at least 1, got {nodes}")
    if not 0 <= node_rank < nodes:
        raise ValueError(
            f"--rank {rank} is outside 0..{nodes - 1}: it numbers the {nodes} nodes of --world-size"
        )
    if nodes > 1 and options.dist_url is None:
        raise ValueError(f"{nodes} nodes need --dist-url tcp://HOST:PORT of the first one")
    if options.dist_url and not re.match(r"(tcp|file|env)://", options.dist_url):
        raise ValueError(
            f"--dist-url must begin with tcp:// or be env://, got {options.dist_url!r}"
        )
    return nodes, node_rank, devices


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


def launch_config(worker: Callable[..., None], config: Any) -> None:
    """Run `worker(device, config)` in every process that the config asks for.

    A process that was started here and fails has said why: this one exits with its status.
    """
    options, placement = config.launch, config.placement
    try:
        launch(
            worker,
            config,
            devices=[torch.device(name) for name in placement.devices],
            nodes=placement.nodes,
            node_rank=placement.node_rank,
            dist_url=options.dist_url,
            backend=options.dist_backend,
            timeout_minutes=options.timeout_minutes,
        )
    except ProcessExitedException as error:
        sys.exit(error.exit_code or 1)


def _send_to_all(pids: Sequence[int], number: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):  # it has ended already
            os.kill(pid, number)


def _spawned(local_rank, first_rank, world, url, backend, timeout, worker, devices, args) -> None:
    rank = first_rank + local_rank
    _run(rank, world, url, backend, timeout, worker, devices[local_rank], args)


def _run(rank, world, dist_url, backend, timeout, worker, device, args) -> None:
    distributed.set_timeout(timeout)
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
