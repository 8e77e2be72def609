"""Parts of the config that every command has: data, optimisation, schedule, folder, processes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moco.config.option import FREE, LEARNS, REQUIRED, Part, option

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
NAMED = ("folder", "tar", "parquet")  # data sets whose images have names
DATASETS = (*NAMED, "cifar10", "cifar100", "stl10")


@dataclass(frozen=True, kw_only=True)
class Data(Part):
    """data

    data: folder with train/ and val/
    dataset: folder of images; tar archives (webdataset) or Parquet files (Hugging Face) of them; or
        one that torchvision has already put into DIR (%(default)s)
    images_per_class: use the first N images of each class
    workers: data loading processes of this node (default: its cores)
    """

    data: str = option(REQUIRED, "data", FREE, kind="path", metavar="DIR")
    dataset: str = option("folder", "--dataset", LEARNS, since="folder", choices=DATASETS)
    images_per_class: int | None = option(None, "--images-per-class", LEARNS, least=1, since=None)
    workers: int | None = option(None, "-j --workers", FREE, least=0)


@dataclass(frozen=True, kw_only=True)
class Optim(Part):
    """optimisation

    batch_size: over all GPUs of all nodes (%(default)s)
    momentum: of SGD (%(default)s)
    seed: default: one is drawn, printed and saved
    """

    batch_size: int = option(256, "-b --batch-size", LEARNS, least=1)
    momentum: float = option(0.9, "--momentum", LEARNS, kind="rate")
    seed: int | None = option(None, "--seed", LEARNS, least=0)
    seed_given: bool = option(False, "", FREE)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.momentum < 1:
            raise ValueError(f"--momentum must be in [0, 1), got {self.momentum:g}")
        if self.seed is not None and self.seed >= 2**63:
            raise ValueError(f"--seed must be below 2^63, got {self.seed}")


@dataclass(frozen=True, kw_only=True)
class Schedule(Part):
    """schedule

    epochs: %(default)s
    start_epoch: 0-based, for restarts without --resume
    schedule: epochs at which the learning rate drops; default %(default)s
    schedule_factor: what it is multiplied by there (%(default)s)
    """

    epochs: int = option(200, "--epochs", LEARNS, least=0)
    start_epoch: int = option(0, "--start-epoch", FREE, least=0)
    schedule: tuple[int, ...] = option(
        (120, 160), "--schedule", LEARNS, kind="numbers", metavar="EPOCH ..."
    )
    schedule_factor: float = option(0.1, "--schedule-factor", LEARNS, least=0, kind="rate")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.schedule and min(self.schedule) < 0:
            raise ValueError(f"--schedule must be epochs of at least 0, got {list(self.schedule)}")
        if self.epochs and self.start_epoch >= self.epochs:
            raise ValueError(
                f"--start-epoch {self.start_epoch} leaves nothing of --epochs {self.epochs} "
                "(0-based)"
            )


@dataclass(frozen=True, kw_only=True)
class Folder(Part):
    """run folder

    save_dir: the run folder (default: results/<name>-<time>)
    resume: go on from it; auto: from the newest in --save-dir, or start fresh
    print_freq: steps between lines of output (%(default)s)
    """

    save_dir: Path | None = option(None, "--save-dir", FREE, kind="folder", metavar="RUN")
    resume: str | None = option(None, "--resume", FREE, kind="path", metavar="CHECKPOINT")
    print_freq: int = option(10, "-p --print-freq", FREE, least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.resume == "auto" and self.save_dir is None:
            raise ValueError(
                "--resume auto looks for checkpoints in the run folder: give --save-dir"
            )


@dataclass(frozen=True, kw_only=True)
class Launch(Part):
    """devices and processes

    device: auto: all visible GPUs, else the CPU
    gpu: use this GPU only
    gpus: use these GPUs
    multiprocessing_distributed: one process per GPU (always so here; upstream's flag)
    world_size: number of nodes
    rank: number of this node
    local_rank: number of this process on its node, as older launchers give it
    dist_url: tcp://HOST:PORT of the first node, or env://
    dist_backend: default: nccl on GPUs, gloo on CPUs
    timeout_minutes: give up when a process has been waited for so long (%(default)s)
    """

    device: str = option("auto", "--device", FREE, choices=("auto", "cpu", "cuda"))
    gpu: int | None = option(None, "--gpu", FREE)
    gpus: tuple[int, ...] | None = option(None, "--gpus", FREE, kind="numbers", metavar="I ...")
    multiprocessing_distributed: bool = option(False, "--multiprocessing-distributed", FREE)
    world_size: int = option(-1, "--world-size", FREE)
    rank: int = option(-1, "--rank", FREE)
    local_rank: int | None = option(None, "--local-rank --local_rank", FREE, least=0)
    dist_url: str | None = option(None, "--dist-url", FREE, metavar="URL")
    dist_backend: str | None = option(None, "--dist-backend", FREE, choices=("nccl", "gloo"))
    timeout_minutes: float = option(30, "--timeout-minutes", FREE)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gpu is not None and self.gpus is not None:
            raise ValueError("--gpu and --gpus were both given; --gpus takes several")
        if self.gpus == ():
            raise ValueError("--gpus needs at least one number; use --device cpu for the CPU")
        if not 0 < self.timeout_minutes < 60 * 24 * 365:
            raise ValueError(f"--timeout-minutes must be positive, got {self.timeout_minutes:g}")


@dataclass(frozen=True, kw_only=True)
class Placement(Part):
    """where the processes run, worked out from the launch flags and the environment

    devices: of this node, one for each process ("cuda:0", "cpu"); processes: over all nodes;
    number: (rank, world, local rank) of a process that a launcher has started as one of several.
    """

    devices: tuple[str, ...] = option(("cpu",), "", FREE)
    nodes: int = option(1, "", FREE)
    node_rank: int = option(0, "", FREE)
    processes: int = option(1, "", FREE)
    local_processes: int = option(1, "", FREE)
    number: tuple[int, int, int] | None = option(None, "", FREE)


def check_batch(optim: Optim, placement: Placement) -> None:
    """Raise ValueError unless every process gets as many images."""
    batch, processes = optim.batch_size, placement.processes
    if batch % processes:
        raise ValueError(
            f"--batch-size {batch} is over all processes and must be a multiple of their number, "
            f"{processes}; use {batch // processes or 1} x {processes} = "
            f"{max(1, batch // processes) * processes}"
        )


def check_whole_batch(accumulate: int) -> None:
    """Raise ValueError where a batch would go through in parts."""
    if accumulate != 1:
        raise ValueError(
            f"--accumulate {accumulate} splits the batch, and losses within the batch need all of "
            "it at once; use more devices, or a smaller --batch-size"
        )


def check_image_statistics(mean: Sequence[float], std: Sequence[float]) -> None:
    """Raise ValueError for a mean or standard deviation that cannot normalise images."""
    if not all(math.isfinite(value) for value in mean):
        raise ValueError(f"--mean must be three finite numbers, got {list(mean)}")
    if not all(0 < value < math.inf for value in std):
        raise ValueError(f"--std must be three positive numbers, got {list(std)}")


def check_views(views: Part) -> None:
    """Raise ValueError for a `crop_scale` that is no range of shares, and for image statistics."""
    least, most = views.crop_scale
    if not 0 < least <= most <= 1:
        raise ValueError(f"--crop-scale must be 0 < MIN <= MAX <= 1, got {least:g} {most:g}")
    check_image_statistics(views.mean, views.std)
