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
from datetime import timedelta
from typing import Any, NamedTuple, NoReturn

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
    """Cores that this process may use: fewer than there are under SLURM, docker."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class _Numbered(NamedTuple):
    """What a launcher tells a process that it has started: its number among all of them, and on its
    node; None where the launcher does not say."""

    rank: int
    world: int
    local_rank: int | None
    local_world: int | None
    nodes: int = 1
    node_rank: int = 0


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


def _numbered_process(options: Launch) -> _Numbered | None:
    """This process's number, where a launcher has started one process per device; else None.

    A process group that exists already (Ray Train, Lightning Fabric, accelerate) has the first
    word. torchrun, and all that set RANK and WORLD_SIZE as it does (Kubeflow sets no LOCAL_RANK),
    SLURM's srun and MPI are known; older launchers give --local-rank. Only all of torchrun's names
    overrule a command line that says how processes meet. None also where a launcher started this
    process only.

    Raises:
        ValueError: one of several processes that cannot know how to meet the others.
    """
    if distributed.is_active():
        rank, world = distributed.rank(), distributed.world_size()
        local, on_node = _number("LOCAL_RANK"), _number("LOCAL_WORLD_SIZE")
        local = options.local_rank if local is None else local
        each = on_node or world
        return _Numbered(rank, world, local, on_node, -(-world // each), rank // each)
    for launcher, names in _LAUNCHERS.items():
        rank, world, local, local_world = map(_number, names)
        if rank is None or world is None:
            continue
        if launcher == "torchrun" and local is not None:
            nodes, node_rank = _number("GROUP_WORLD_SIZE") or 1, _number("GROUP_RANK") or 0
            return _Numbered(rank, world, local, local_world, nodes, node_rank)
        if options.dist_url is not None or options.world_size != -1 or options.rank != -1:
            continue
        if world <= 1:
            return None
        if missing := _missing_address():
            lacking = f"{' and '.join(missing)} {'are' if len(missing) > 1 else 'is'} not set"
            raise ValueError(
                f"this process is number {rank} of {world} ({names[0]}={rank}, {names[1]}={world}, "
                f"as {launcher} sets them), but {lacking}, so it cannot meet the others: set them, "
                f"start with torchrun, or unset {names[0]} to train alone"
            )
        local = options.local_rank if local is None else local
        return _Numbered(rank, world, local, local_world)
    return None


def _number(name: str) -> int | None:
    text = os.environ.get(name, "")
    return int(text) if text.isdigit() else None


def _missing_address() -> list[str]:
    """What `env://` needs of the environment, and does not find."""
    return [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]


def place(options: Launch) -> Placement:
    """Which devices this node contributes, and how many processes run over all nodes.

    Raises:
        ValueError: GPUs that do not exist, or nodes that cannot meet.
    """
    gpus = options.gpus if options.gpu is None else (options.gpu,)
    devices = visible_devices(options.device, None if gpus is None else list(gpus))
    names = tuple(map(str, devices))
    if numbered := _numbered_process(options):
        rank, world, local, local_world, nodes, node_rank = numbered
        return Placement(
            devices=names,
            nodes=nodes,
            node_rank=node_rank,
            processes=world,
            local_processes=local_world or -(-world // nodes),
            number=(rank, world, rank % len(devices) if local is None else local),
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
    url = options.dist_url
    told = os.environ if url == "env://" else {}
    nodes, rank = options.world_size, options.rank
    nodes = int(told.get("WORLD_SIZE", 1)) if nodes == -1 else nodes
    rank = int(told.get("RANK", 0)) if rank == -1 else rank
    if nodes < 1:
        raise ValueError(f"--world-size is the number of nodes, at least 1, got {nodes}")
    if not 0 <= rank < nodes:
        raise ValueError(
            f"--rank {rank} is outside 0..{nodes - 1}: it numbers the {nodes} nodes of --world-size"
        )
    if nodes > 1 and not url:
        raise ValueError(f"{nodes} nodes need --dist-url tcp://HOST:PORT of the first one")
    if url and not re.match(r"(tcp|file|env)://", url):
        raise ValueError(f"--dist-url must begin with tcp:// or be env://, got {url!r}")
    if nodes > 1 and url == "env://" and (missing := _missing_address()):
        raise ValueError(f"--dist-url env:// needs {' and '.join(missing)} in the environment")
    return nodes, rank


def launch_config(worker: Callable[..., None], config: Any) -> None:
    """Run `worker(device, config)` in every process that the config asks for."""
    launch(worker, config, config.launch, config.placement)


def launch(
    worker: Callable[..., None], args: object, options: Launch, placement: Placement | None = None
) -> None:
    """Run `worker(device, args)` once per process, with a process group when there are several.

    Four forms: in a process group that exists already, `worker` runs in this process, and the group
    is left as it is; under torchrun this process is one of those already started; otherwise one
    process per device is started here, on this node; a single one runs in place. A process that was
    started here and fails has said why: this one exits with its status.

    Args:
        placement: None: by `options` and the environment (`place`).
    """
    if placement is None or distributed.is_active():  # a group has the first word, also a late one
        placement = place(options)
    devices = [torch.device(name) for name in placement.devices]
    if placement.number is not None:
        rank, world, local_rank = placement.number
        device = _own_device(devices, local_rank)
        if distributed.is_active():
            distributed.set_timeout(timedelta(minutes=options.timeout_minutes))
            _set_device(device)
            worker(device, args)
        else:
            _run(rank, device, world, "env://", options, worker, args)
        return
    world = placement.processes
    if world == 1:
        _set_device(devices[0])
        worker(devices[0], args)
        return
    first_rank = placement.node_rank * len(devices)
    all_alike = world, options.dist_url or f"tcp://127.0.0.1:{_free_port()}", options, worker, args
    if len(devices) == 1:
        _run(first_rank, devices[0], *all_alike)
        return
    processes = torch.multiprocessing.spawn(
        _spawned, args=(first_rank, devices, *all_alike), nprocs=len(devices), join=False
    )
    # A request to stop is sent to this process; those that train have to hear of it.
    for number in (*STOP_SIGNALS, signal.SIGINT):
        signal.signal(number, lambda received, _: _send_to_all(processes.pids(), received))
    try:
        while not processes.join(grace_period=60):
            pass
    except ProcessExitedException as error:
        sys.exit(error.exit_code or 1)


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


def _send_to_all(pids: Sequence[int], number: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):  # it has ended already
            os.kill(pid, number)


def _spawned(local_rank: int, first_rank: int, devices: list[torch.device], *all_alike) -> None:
    _run(first_rank + local_rank, devices[local_rank], *all_alike)


def _run(
    rank: int,
    device: torch.device,
    world: int,
    dist_url: str,
    options: Launch,
    worker: Callable[..., None],
    args: object,
) -> None:
    timeout = timedelta(minutes=options.timeout_minutes)
    distributed.set_timeout(timeout)
    _set_device(device)
    backend = options.dist_backend or ("nccl" if device.type == "cuda" else "gloo")
    with report_user_errors(), _one_line_meeting(rank, world, dist_url, timeout):
        _meet(rank, world, dist_url, backend, timeout)
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


def _meet(rank: int, world: int, dist_url: str, backend: str, timeout: timedelta) -> None:
    """Join the process group."""
    meeting = {"init_method": dist_url}
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if dist_url == "env://" and attempt != "0":
        # torchrun's store still holds the addresses of the processes that it has replaced: without
        # a prefix of its own, gloo would try to reach those, until the time-out.
        store, _, _ = next(rendezvous(dist_url, rank, world, timeout=timeout))
        meeting = {"store": dist.PrefixStore(f"restart_{attempt}", store)}
    dist.init_process_group(backend, **meeting, world_size=world, rank=rank, timeout=timeout)


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
