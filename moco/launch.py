"""Processes: which devices, how many, and how they are started and meet."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous
from torch.multiprocessing import ProcessExitedException

from moco import distributed
from moco.config import Launch, Placement
from moco.errors import TrainingError, report_user_errors
from moco.stop import STOP_SIGNALS, AgreedStop


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


@dataclass(frozen=True)
class Numbered:
    """What a launcher tells a process that it has started: its number among all of them.

    Attributes:
        local_rank: its number on this node; None where the launcher does not say.
        local_world: processes on this node; None likewise.
    """

    rank: int
    world: int
    local_rank: int | None
    local_world: int | None
    nodes: int = 1
    node_rank: int = 0

    def place_among(self, devices: int) -> tuple[int, int, int]:
        """(rank, world, local rank), the latter in turn over the devices where it is not said."""
        local = self.rank % devices if self.local_rank is None else self.local_rank
        return self.rank, self.world, local


# launcher: names of its variables for rank, world, local rank, processes on the node
_LAUNCHERS = {
    "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    "SLURM": ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_NTASKS_PER_NODE"),
    "Open MPI": (
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    "MPI": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
}


def numbered_process(local_rank: int | None = None, *, alone: bool = False) -> Numbered | None:
    """This process's number, where a launcher has started one process per device; else None.

    A process group that exists already (Ray Train, Lightning Fabric, accelerate) has the first
    word. torchrun, and all that set RANK and WORLD_SIZE as it does (Kubeflow sets no LOCAL_RANK),
    SLURM's srun and MPI are known. None also where a launcher started this process only.

    Args:
        local_rank: --local-rank of older launchers, which set no LOCAL_RANK.
        alone: the command line says how processes meet; only all of torchrun's names overrule it.

    Raises:
        ValueError: one of several processes that cannot know how to meet the others.
    """
    if distributed.is_active():
        rank, world = distributed.rank(), distributed.world_size()
        local, on_node = _number("LOCAL_RANK"), _number("LOCAL_WORLD_SIZE")
        local = local_rank if local is None else local
        each = on_node or world
        return Numbered(rank, world, local, on_node, -(-world // each), rank // each)
    for launcher, names in _LAUNCHERS.items():
        rank, world, local, local_world = map(_number, names)
        if rank is None or world is None:
            continue
        complete = launcher == "torchrun" and local is not None
        if alone and not complete:
            continue
        if world <= 1 and not complete:
            return None
        missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
        if missing and not complete:
            lacking = f"{' and '.join(missing)} {'are' if len(missing) > 1 else 'is'} not set"
            raise ValueError(
                f"this process is number {rank} of {world} ({names[0]}={rank}, {names[1]}={world}, "
                f"as {launcher} sets them), but {lacking}, so it cannot meet the others: set them, "
                f"start with torchrun, or unset {names[0]} to train alone"
            )
        local = local_rank if local is None else local
        nodes = _number("GROUP_WORLD_SIZE") if complete else None
        return Numbered(
            rank,
            world,
            local,
            local_world,
            nodes or 1,
            (_number("GROUP_RANK") or 0) if complete else 0,
        )
    return None


def _number(name: str) -> int | None:
    text = os.environ.get(name, "")
    return int(text) if text.isdigit() else None


def place(options: Launch) -> Placement:
    """Which devices this node contributes, and how many processes run over all nodes.

    Raises:
        ValueError: GPUs that do not exist, or nodes that cannot meet.
    """
    gpus = options.gpus if options.gpu is None else (options.gpu,)
    devices = visible_devices(options.device, None if gpus is None else list(gpus))
    names = tuple(map(str, devices))
    alone = options.dist_url is not None or options.world_size != -1 or options.rank != -1
    numbered = numbered_process(options.local_rank, alone=alone)
    if numbered:
        on_each_node = numbered.local_world or -(-numbered.world // numbered.nodes)
        return Placement(
            devices=names,
            nodes=numbered.nodes,
            node_rank=numbered.node_rank,
            processes=numbered.world,
            local_processes=on_each_node,
            number=numbered.place_among(len(devices)),
        )
    nodes, node_rank = _nodes(options)
    return Placement(
        devices=names,
        nodes=nodes,
        node_rank=node_rank,
        processes=len(devices) * nodes,
        local_processes=len(devices),
    )


def _nodes(options: Launch) -> tuple[int, int]:
    """Number of nodes, and which of them this is; each starts its own processes."""
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
    if options.dist_url == "env://":
        missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
        if missing and nodes > 1:
            raise ValueError(f"--dist-url env:// needs {' and '.join(missing)} in the environment")
    return nodes, node_rank


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
    number: tuple[int, int, int] | None = None,
) -> None:
    """Run `worker(device, args)` once per process, with a process group when there are several.

    Four forms: in a process group that exists already, `worker` runs in this process, and the group
    is left as it is; under torchrun this process is one of those already started; otherwise one
    process per entry of `devices` is started here, on this node of `nodes`; a single one runs in
    place.

    Args:
        devices: this node's devices, from `visible_devices`.
        nodes, node_rank: upstream's --world-size and --rank.
        dist_url: where rank 0 listens, tcp://HOST:PORT or env:// (MASTER_ADDR and MASTER_PORT);
            None takes a free port on this machine, which several nodes cannot.
        backend: None takes nccl on GPUs and gloo on CPUs.
        timeout_minutes: how long a rank waits for the others before it gives up.
        number: (rank, world, local rank) of this process, which a launcher has started as one of
            several; None asks the environment, as torchrun sets it.
    """
    timeout = timedelta(minutes=timeout_minutes)
    if number is None and (numbered := numbered_process(alone=True)):
        number = numbered.place_among(len(devices))
    if number is not None:
        rank, world, local_rank = number
        device = _own_device(devices, local_rank)
        if distributed.is_active():
            distributed.set_timeout(timeout)
            _set_device(device)
            worker(device, args)
            return
        _run(rank, world, "env://", backend, timeout, worker, device, args)
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
    for number in (*STOP_SIGNALS, signal.SIGINT):
        signal.signal(number, lambda received, _: _send_to_all(processes.pids(), received))
    while not processes.join(grace_period=60):
        pass


def _own_device(devices: list[torch.device], local_rank: int) -> torch.device:
    """The device of a process that was started as one of several on its node."""
    if devices[0].type != "cuda" or len(devices) == 1:  # srun may show each task its own GPU only
        return devices[0]
    if local_rank >= len(devices):
        raise ValueError(
            f"local rank {local_rank} has no GPU: {len(devices)} usable on this node; start "
            f"torchrun with --nproc-per-node {len(devices)}"
        )
    return devices[local_rank]


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
            number=placement.number,
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
    with report_user_errors(), _one_line_meeting(rank, world, dist_url, timeout):
        _meet(rank, world, dist_url, backend, timeout, device)
    try:
        worker(device, args)
    except AgreedStop:
        dist.destroy_process_group()
        raise
    except BaseException as error:
        if world == 1:
            dist.destroy_process_group()
            raise
        # The others may be inside a collective that this rank will never join; destroying the
        # group would talk to them, and hang. They hear of it when this process is gone.
        _leave(error)
    dist.destroy_process_group()


def _meet(rank, world, dist_url, backend, timeout, device) -> None:
    """Join the process group."""
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


@contextlib.contextmanager
def _one_line_meeting(rank: int, world: int, dist_url: str, timeout: timedelta) -> Iterator[None]:
    """What keeps processes from meeting, as an error for the user, within the time-out."""
    where = dist_url
    if dist_url == "env://":
        names = ("MASTER_ADDR", "MASTER_PORT")
        where = " ".join(f"{name}={os.environ.get(name, '(not set)')}" for name in names)

    def error(reason: str) -> TrainingError:
        return TrainingError(
            f"rank {rank} of {world} could not meet the others at {where}: {reason}; all ranks "
            "need the same address, a port that nothing else uses, and to start within "
            "--timeout-minutes"
        )

    def give_up() -> None:  # torch waits for ever for what accepts connections and says nothing
        with contextlib.suppress(SystemExit), report_user_errors():
            raise error("no answer")
        os._exit(1)

    watch = threading.Timer(timeout.total_seconds() + 5, give_up)
    watch.daemon = True
    watch.start()
    try:
        yield
    except (RuntimeError, ValueError, OSError) as caught:
        raise error(" ".join(str(caught).split())[:200]) from caught
    finally:
        watch.cancel()


def _leave(error: BaseException) -> NoReturn:
    """End this process without a word to the others; what it printed is not lost."""
    status = 1
    if isinstance(error, SystemExit):
        status = error.code if isinstance(error.code, int) else 1
    else:
        traceback.print_exception(error)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _set_device(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.set_device(device)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
