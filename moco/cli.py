"""The command-line flags that both mains share, spelled as upstream MoCo spells them."""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import re
import secrets
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NoReturn

import torch
from torch.multiprocessing import ProcessExitedException

from moco.checkpoint import run_checkpoints
from moco.data.images import DATASETS, image_paths, split_folder
from moco.encoders import arch_names
from moco.errors import CheckpointError, DataError, TrainingError
from moco.launch import (
    launch,
    planned_world_size,
    started_by_torchrun,
    usable_cores,
    visible_devices,
)
from moco.printable import printable
from moco.run_files import ARGS, LINCLS_LATEST, LINCLS_RESULT

# Flags that take a list of whole numbers, as `--gpus 0 1 2 3` or `--gpus 0,1,2,3`.
_LIST_FLAGS = ("--gpus", "--schedule")


class Parser(argparse.ArgumentParser):
    """argparse, except that a list of numbers ends where the numbers end.

    In upstream's own command lines the data folder may follow `--gpus 0 1 2 3` or
    `--schedule 120 160`; argparse would take it for one more number. Errors are one line.
    """

    def parse_args(self, args: Sequence[str] | None = None, namespace=None) -> argparse.Namespace:
        try:
            joined = _join_lists(sys.argv[1:] if args is None else args)
        except ValueError as error:
            self.error(str(error))
        return super().parse_args(joined, namespace)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (--help lists all flags)\n")


def _join_lists(argv: Sequence[str]) -> list[str]:
    joined: list[str] = []
    collecting = False  # the numbers of a list flag, into one word with it
    for word in argv:
        if collecting and re.fullmatch(r"-?\d+(,-?\d+)*", word):
            joined[-1] += ("" if joined[-1].endswith("=") else ",") + word
            collecting = "," not in word  # "0,1" is the whole list
            continue
        if collecting and joined[-1].endswith("=") and not word.startswith("-"):
            raise ValueError(f"{joined[-1][:-1]} expects whole numbers, got {word!r}")
        collecting = word in _LIST_FLAGS
        joined.append(f"{word}=" if collecting else word)
    return joined


def non_empty(text: str) -> str:
    """argparse type of a path: an unset variable of the shell is no path."""
    if not text.strip():
        raise argparse.ArgumentTypeError("expected a path, got an empty string")
    return text


def folder(text: str) -> Path:
    """argparse type of a run folder."""
    path = Path(non_empty(text))
    if path.exists() and not path.is_dir():
        raise argparse.ArgumentTypeError(f"{path} is a file, expected a folder")
    return path


def numbers(text: str) -> list[int]:
    """argparse type of a list of whole numbers, "0,1,2"."""
    try:
        return [int(part) for part in text.split(",") if part]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected whole numbers, got {text!r}") from None


def rates(text: str) -> float | list[float]:
    """argparse type of one number, or of several with commas: "30" or "1,3,10,30"."""
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected a number, or several as 1,3,10, got {text!r}"
        ) from None
    if len(set(values)) < len(values):
        raise argparse.ArgumentTypeError(f"a number is there twice in {text!r}")
    return values if len(values) > 1 else values[0]


def add_shared_options(
    parser: argparse.ArgumentParser,
    *,
    lr: float,
    weight_decay: float,
    epochs: int,
    schedule: list[int],
    rate: Callable[[str], float | list[float]] = float,
) -> None:
    """Flags of both mains; what differs is an argument.

    Args:
        lr, weight_decay, epochs, schedule: defaults.
        rate: argparse type of --lr and --wd; `rates` where several are trained together.
    """
    # fmt: off
    data = parser.add_argument_group("data")
    data.add_argument("data", type=non_empty, metavar="DIR", help="folder with train/ and val/")
    data.add_argument(
        "--dataset", choices=DATASETS, default="folder",
        help="folder of images, or one that torchvision has already put into DIR (%(default)s)",
    )
    data.add_argument(
        "--images-per-class", type=int, metavar="N", help="use the first N images of each class"
    )
    data.add_argument(
        "-j", "--workers", type=int, metavar="N",
        help="data loading processes of this node (default: its cores)",
    )

    model = parser.add_argument_group("encoder")
    model.add_argument("-a", "--arch", metavar="ARCH", help="a torchvision classifier, or one of "
                       + ", ".join(a for a in arch_names() if a.startswith("resnet")))

    training = parser.add_argument_group("training")
    training.add_argument("--epochs", type=int, default=epochs, metavar="N", help="%(default)s")
    training.add_argument("--start-epoch", type=int, default=0, metavar="N",
                          help="0-based, for restarts without --resume")
    training.add_argument("-b", "--batch-size", type=int, default=256, metavar="N",
                          help="over all GPUs of all nodes (%(default)s)")
    training.add_argument("--lr", "--learning-rate", type=rate, default=lr, metavar="LR",
                          help="initial learning rate (%(default)s)")
    training.add_argument("--schedule", type=numbers, default=schedule, metavar="EPOCH ...",
                          help="epochs at which the learning rate drops (%(default)s)")
    training.add_argument("--schedule-factor", type=float, default=0.1, metavar="F",
                          help="what it is multiplied by there (%(default)s)")
    training.add_argument("--momentum", type=float, default=0.9, metavar="M",
                          help="of SGD (%(default)s)")
    training.add_argument("--wd", "--weight-decay", dest="weight_decay", type=rate,
                          default=weight_decay, metavar="W", help="%(default)s")
    training.add_argument("--seed", type=int, help="default: one is drawn, printed and saved")

    run = parser.add_argument_group("run")
    run.add_argument("--save-dir", type=folder, metavar="RUN",
                     help="the run folder (default: results/<name>-<time>)")
    run.add_argument("--resume", type=non_empty, metavar="CHECKPOINT",
                     help="go on from it; auto: from the newest in --save-dir, or start fresh")
    run.add_argument("-p", "--print-freq", type=int, default=10, metavar="N",
                     help="steps between lines of output (%(default)s)")

    launch = parser.add_argument_group("devices and processes")
    launch.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto",
                        help="auto: all visible GPUs, else the CPU")
    launch.add_argument("--gpu", type=int, metavar="I", help="use this GPU only")
    launch.add_argument("--gpus", type=numbers, metavar="I ...", help="use these GPUs")
    launch.add_argument("--multiprocessing-distributed", action="store_true",
                        help="one process per GPU (always so here; upstream's flag)")
    launch.add_argument("--world-size", type=int, default=-1, metavar="N", help="number of nodes")
    launch.add_argument("--rank", type=int, default=-1, metavar="R", help="number of this node")
    launch.add_argument("--dist-url", metavar="URL",
                        help="tcp://HOST:PORT of the first node, or env://")
    launch.add_argument("--dist-backend", choices=("nccl", "gloo"),
                        help="default: nccl on GPUs, gloo on CPUs")
    launch.add_argument("--timeout-minutes", type=float, default=30, metavar="M",
                        help="give up when a process has been waited for so long (%(default)s)")
    # fmt: on


def check_shared_options(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse what can be refused before any process is started, and fill in derived values:
    `devices`, `nodes`, `processes` (over all nodes) and per-process `workers`."""
    try:
        if args.gpu is not None and args.gpus is not None:
            raise ValueError("--gpu and --gpus were both given; --gpus takes several")
        if args.gpus == []:
            raise ValueError("--gpus needs at least one number; use --device cpu for the CPU")
        gpus = args.gpus if args.gpu is None else [args.gpu]
        args.devices = visible_devices(args.device, gpus)
        _check_nodes(args)
        args.processes = planned_world_size(args.devices, args.nodes)
        _check_numbers(args)
        if not 0 < args.timeout_minutes < 60 * 24 * 365:
            raise ValueError(f"--timeout-minutes must be positive, got {args.timeout_minutes:g}")
        if args.images_per_class is not None and args.images_per_class < 1:
            raise ValueError(f"--images-per-class must be at least 1, got {args.images_per_class}")
        if args.resume == "auto" and args.save_dir is None:
            raise ValueError(
                "--resume auto looks for checkpoints in the run folder: give --save-dir"
            )
    except ValueError as error:
        parser.error(str(error))
    if args.workers is None:
        args.workers = usable_cores()
    # -j counts per node, as upstream; each process gets its share, rounded up.
    args.workers = -(-args.workers // args.local_processes)
    args.seed_given = args.seed is not None
    if args.seed is None:
        args.seed = secrets.randbelow(2**31)


def _check_nodes(args: argparse.Namespace) -> None:
    if started_by_torchrun():
        args.nodes = int(os.environ.get("GROUP_WORLD_SIZE", 1))
        args.node_rank = int(os.environ.get("GROUP_RANK", 0))
        on_each_node = int(os.environ["WORLD_SIZE"]) // args.nodes
        args.local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", on_each_node))
        return
    args.local_processes = len(args.devices)
    from_environment = args.dist_url == "env://"
    nodes, rank = args.world_size, args.rank
    if from_environment and nodes == -1:
        nodes = int(os.environ.get("WORLD_SIZE", 1))
    if from_environment and rank == -1:
        rank = int(os.environ.get("RANK", 0))
    args.nodes, args.node_rank = (1 if nodes == -1 else nodes), (0 if rank == -1 else rank)
    if args.nodes < 1:
        raise ValueError(f"--world-size is the number of nodes, at least 1, got {nodes}")
    if not 0 <= args.node_rank < args.nodes:
        raise ValueError(
            f"--rank {rank} is outside 0..{args.nodes - 1}: it numbers the {args.nodes} nodes "
            "of --world-size"
        )
    if args.nodes > 1 and args.dist_url is None:
        raise ValueError(f"{args.nodes} nodes need --dist-url tcp://HOST:PORT of the first one")
    if args.dist_url and not re.match(r"(tcp|file|env)://", args.dist_url):
        raise ValueError(f"--dist-url must begin with tcp:// or be env://, got {args.dist_url!r}")


def _check_numbers(args: argparse.Namespace) -> None:
    for name, least in (
        ("epochs", 0),
        ("batch_size", 1),
        ("start_epoch", 0),
        ("print_freq", 1),
        ("workers", 0),
        ("seed", 0),
    ):
        value = getattr(args, name)
        if value is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {least}, got {value}")
    if args.seed is not None and args.seed >= 2**63:
        raise ValueError(f"--seed must be below 2^63, got {args.seed}")
    if args.schedule and min(args.schedule) < 0:
        raise ValueError(f"--schedule must be epochs of at least 0, got {args.schedule}")
    if args.epochs and args.start_epoch >= args.epochs:
        raise ValueError(
            f"--start-epoch {args.start_epoch} leaves nothing of --epochs {args.epochs} (0-based)"
        )
    for name in ("lr", "schedule_factor", "weight_decay", "momentum"):
        given = getattr(args, name)
        for value in given if isinstance(given, list) else [given]:
            if not 0 <= value < float("inf"):
                raise ValueError(
                    f"--{name.replace('_', '-')} must be a number of at least 0, got {value}"
                )
    if args.batch_size % args.processes:
        raise ValueError(
            f"--batch-size {args.batch_size} is over all processes and must be a multiple of "
            f"their number, {args.processes}; use {args.batch_size // args.processes or 1} x "
            f"{args.processes} = {max(1, args.batch_size // args.processes) * args.processes}"
        )


def check_image_statistics(mean: Sequence[float], std: Sequence[float]) -> None:
    """Raise ValueError for a mean or standard deviation that cannot normalise images."""
    if not all(math.isfinite(value) for value in mean):
        raise ValueError(f"--mean must be three finite numbers, got {list(mean)}")
    if not all(0 < value < math.inf for value in std):
        raise ValueError(f"--std must be three positive numbers, got {list(std)}")


def check_run_folder(
    parser: argparse.ArgumentParser, args: argparse.Namespace, *, pretraining: bool
) -> None:
    """Never start over in a folder that holds a run, nor mix two runs in one."""
    if args.save_dir is None:
        return
    pretrained = [path.name for path in run_checkpoints(args.save_dir)]
    probed = [n for n in (LINCLS_RESULT, LINCLS_LATEST) if (args.save_dir / n).exists()]
    own, other = (pretrained, probed) if pretraining else (probed, pretrained)
    continued = args.resume == "auto" or (
        args.resume and Path(args.resume).resolve().parent == args.save_dir.resolve()
    )
    if pretraining and not own and (args.save_dir / ARGS).exists():
        own = [ARGS]  # that run may be in its first epoch
    if other or (own and not continued):
        parser.error(
            f"{args.save_dir} already holds a run ({(other or own)[-1]}): "
            + ("" if other else "go on with --resume auto, or ")
            + "choose another --save-dir"
        )


def check_data_folder(
    parser: argparse.ArgumentParser, args: argparse.Namespace, splits: dict[str, int]
) -> None:
    """Refuse a folder that is missing or has too few images, without listing it all.

    Args:
        splits: name of a split and the number of images it needs.
    """
    root = Path(args.data)
    if not root.is_dir():
        parser.error(f"no such data folder: {root}")
    if args.dataset != "folder":
        return
    for split, needed in splits.items():
        try:
            folder = split_folder(root, split)
        except DataError as error:
            parser.error(str(error))
        found = len(list(islice(image_paths(folder), needed)))
        if not found:
            parser.error(
                f"no images in {folder}; expected FOLDER/train/CLASS/IMAGE as for ImageNet"
                + (", or any folder with images" if split == "pretrain" else "")
            )
        if found < needed:
            parser.error(
                f"{folder} has {found} images, fewer than one batch of {needed}; lower --batch-size"
            )


def plain_values(args: argparse.Namespace) -> dict:
    """The arguments as JSON and `weights_only` can hold them: derived objects left out."""
    plain = {}
    for name, value in sorted(vars(args).items()):
        if isinstance(value, Path):
            value = str(value)
        if isinstance(value, (str, int, float, bool, list, tuple, type(None))):
            plain[name] = list(value) if isinstance(value, tuple) else value
    plain.pop("devices")
    return plain


def run_worker(
    worker: Callable[[torch.device, argparse.Namespace], None], args: argparse.Namespace
) -> None:
    """Launch `worker` on all devices; errors that the user can mend end in one line, not a trace.

    Exit status 1 for those; others raise.
    """
    try:
        launch(
            worker,
            args,
            devices=args.devices,
            nodes=args.nodes,
            node_rank=args.node_rank,
            dist_url=args.dist_url,
            backend=args.dist_backend,
            timeout_minutes=args.timeout_minutes,
        )
    except ProcessExitedException as error:  # the child has said why
        sys.exit(error.exit_code or 1)


@contextlib.contextmanager
def report_user_errors() -> Iterator[None]:
    """Print an error that the user can act on in one line, and exit with status 1; others raise."""
    try:
        yield
    except (DataError, CheckpointError, TrainingError, OSError) as error:
        lines = str(error).strip().splitlines()
        if any(line.startswith("Original Traceback") for line in lines):
            # A loader process puts its own trace in front of the error that it raised.
            lines = [re.sub(r"^[\w.]*Error: ", "", lines[-1])]
        message = " ".join(line.strip() for line in lines)
        message = f"{Path(sys.argv[0]).name}: error: {printable(message, limit=4000)}"
        print(message, file=sys.stderr, flush=True)
        sys.exit(1)
