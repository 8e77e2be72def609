#!/usr/bin/env python
"""Predict the speed of a pretraining run on many GPUs from steps that are measured on one device.

    python scripts/plan.py -a resnet50 --mlp --amp bf16 --batch-size 256 --gpus 8 --cores 64
    python scripts/plan.py ... --out measured.json                keep what was measured, and plan
    python scripts/plan.py --gpus 8 --nodes 4 ... --measured measured.json       plan elsewhere
    python scripts/plan.py -a resnet18 --image-size 64 -b 32 --check           against real runs

A step of W processes with n = batch / W images each takes max(compute + network, loader):

    compute    a + b n, fitted to steps of main_moco.py with a few batch sizes on one device
    network    all-reduce  2 (W-1)/W x bytes of the gradients (a ring, over all adapters of a node);
                           on a GPU it hides behind the backward pass, half of the computing
               shuffle     n (W-1)/W images of 3 x px x px bytes
               gather      (W-1) n dim float32 of the other processes' keys
    loader     pairs of views, at the measured rate of one core times --cores

--check compares images/s of 2 processes, loading left out. On one CPU they slow each other down, as
GPUs do not: there, steps are measured in two runs at once that do not communicate.
"""

import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from moco import cli, distributed, encoders, run_files, timing
from moco.errors import TrainingError, report_user_errors
from moco.launch import launch, visible_devices

PROGRAM = str(Path(__file__).resolve().parent.parent / "main_moco.py")
# What a measurement depends on: one of other settings is refused.
SETTINGS = ("arch", "image_size", "small_stem", "moco_dim", "moco_k", "mlp", "amp", "aug_plus")
STEPS, WARM_UP = 24, 4  # of each run


def build_parser() -> cli.Parser:
    parser = cli.Parser(description="plan a pretraining run", allow_abbrev=False)
    add = parser.add_argument
    add("-a", "--arch", default="resnet50", help="%(default)s")
    add("-b", "--batch-size", type=int, default=256, help="over all GPUs (%(default)s)")
    add("--image-size", type=int, default=224, metavar="PX", help="%(default)s")
    add("--moco-dim", type=int, default=128, metavar="N", help="%(default)s")
    add("--moco-k", type=int, default=65536, metavar="N", help="%(default)s")
    for flag in ("--small-stem", "--mlp", "--aug-plus"):
        add(flag, action="store_true", help="as for main_moco.py")
    add("--amp", choices=("off", "bf16", "fp16"), default="off")
    add("--epochs", type=int, default=200, metavar="N", help="%(default)s")
    add("--images", type=int, default=1281167, metavar="N", help="an epoch's (%(default)s)")
    add("--gpus", type=int, default=8, metavar="N", help="per node (%(default)s)")
    add("--nodes", type=int, default=1, metavar="N", help="%(default)s")
    add("--cores", type=int, metavar="N", help="per node, for loading (default: enough)")
    add("--intra-gbs", type=float, default=300, metavar="GB/S", help="%(default)s: NVLink 3, rated")
    add("--inter-gbs", type=float, default=12.5, metavar="GB/S", help="%(default)s: 100 Gbit/s")
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    add("--measured", type=Path, metavar="FILE", help="figures of an earlier --out")
    add("--check", action="store_true", help="compare with a run of 2 processes here")
    add("--out", type=Path, metavar="FILE", help="also write JSON")
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        check_arguments(args)
        known = read_measured(args.measured, args) if args.measured else None
    except ValueError as error:
        parser.error(str(error))
    with report_user_errors(), tempfile.TemporaryDirectory() as folder:
        if args.check:
            content = {"check": check(args, Path(folder))}
        else:
            measured = known or measure(args, (8, 16, 32), Path(folder))
            content = {"measured": measured, "plan": predict(measured, args)}
            print(f"on {args.gpus * args.nodes} devices like this {measured['device']}:")
            for name, value in content["plan"].items():
                print(f"{name.replace('_', ' '):>24} {value:.4g}")
        if args.out:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            run_files.write_json(args.out, {"machine": timing.machine(), **content})


def check_arguments(args: Namespace) -> None:
    """Raise ValueError for a run that main_moco.py would refuse, or machines that cannot be."""
    for name in ("gpus", "nodes", "cores", "epochs", "intra_gbs", "inter_gbs"):
        value, flag = getattr(args, name), name.replace("_", "-")
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"--{flag} must be a positive number, got {value:g}")
    world = 4 if args.check else args.gpus * args.nodes
    if args.batch_size % world or args.batch_size // world < 2:
        raise ValueError(
            f"--batch-size {args.batch_size} is over all GPUs and must be a multiple of {world}, "
            f"with at least two images for each; use {max(2, args.batch_size // world) * world}"
        )
    if args.check and args.device == "cuda" and torch.cuda.device_count() < 2:
        raise ValueError("--check needs two GPUs, or --device cpu")
    if args.moco_k < args.batch_size:
        raise ValueError(f"--moco-k must be at least one batch of {args.batch_size} keys")
    encoders.check_image_size(encoder_of(args), args.image_size)


def settings_of(args: Namespace) -> dict:
    return {name: getattr(args, name) for name in SETTINGS}


def encoder_of(args: Namespace) -> torch.nn.Module:
    encoder = encoders.build_encoder(
        args.arch, args.moco_dim, image_size=args.image_size, small_stem=args.small_stem
    )
    return encoders.add_mlp_head(encoder) or encoder if args.mlp else encoder


def read_measured(path: Path, args: Namespace) -> dict:
    """What `measure` has returned, from a file written by --out."""
    try:
        measured = json.loads(path.read_text(encoding="utf-8"))["measured"]
        predict(measured, args)
        found, wanted = measured["settings"], settings_of(args)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--measured {path} holds no figures of this script: {error}") from None
    if found != wanted:
        raise ValueError(f"--measured {path} has figures of {found}, this plan is for {wanted}")
    return measured


def measure(args: Namespace, sizes: tuple[int, ...], folder: Path, together: int = 1) -> dict:
    """Seconds of steps with so many images each, by as many runs at once on this device, and of a
    pair of views on one core; bytes of the gradients."""
    steps, pairs = [], []
    for size in sizes:
        runs = [folder / f"{size}-{i}-of-{together}" for i in range(together)]
        with ThreadPoolExecutor() as pool:
            found = list(pool.map(lambda run, size=size: train(args, size, run), runs))
        steps.append(statistics.mean(computing for computing, _ in found))
        pairs += [loading / size for _, loading in found]
    return {
        "settings": settings_of(args),
        "device": args.device,
        "images": sizes,
        "seconds": steps,
        "pair_seconds": statistics.median(pairs),
        "gradient_bytes": sum(4 * p.numel() for p in encoder_of(args).parameters()),
    }


def train(args: Namespace, batch: int, run: Path, processes: int = 1) -> tuple[float, float]:
    """Seconds of a step of main_moco.py with a global batch of so many images: of computing and of
    loading, which the training processes do themselves; medians after the first steps."""
    timing.write_photographs(run.with_suffix(".images"), 16, names=STEPS * batch)
    torchrun = f"-m torch.distributed.run --standalone --nproc-per-node {processes}".split()
    words = [sys.executable, *torchrun * (processes > 1), PROGRAM]
    words += ["--gpus", 0] * (args.device == "cuda" and processes == 1)
    words += ["-j", 0, "--batch-size", batch, "--max-steps", STEPS, "-p", 4, "--seed", 0]
    for name, value in {"device": args.device, **settings_of(args)}.items():
        flag = f"--{name.replace('_', '-')}"
        words += [flag] * (value is True) or [flag, value] * (value is not False)
    done = subprocess.run(
        [*map(str, words), "--save-dir", run, run.with_suffix(".images")],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or "nothing").splitlines()
        raise TrainingError(next((line for line in said if "error" in line.lower()), said[-1]))
    lines, _ = run_files.read_log(run / run_files.LOG)
    lines = [line for line in lines if line["kind"] == "train" and line["step"] > WARM_UP]
    seconds = [(batch / line["images_per_s"], line["data_share"]) for line in lines]
    loading = statistics.median(whole * share for whole, share in seconds)
    return statistics.median(whole * (1 - share) for whole, share in seconds), loading


def time_all_reduce(device: torch.device, job: Namespace) -> None:
    """In each of two processes: seconds of averaging `job.size` bytes, into the file `job.out`."""
    torch.set_num_threads(1)
    gradients = torch.zeros(job.size // 4, device=device)
    sums = {"": lambda: distributed.sum_over_ranks(gradients)}
    seconds = statistics.median(timing.interleaved(sums, repeats=9, device=device)[""])
    if distributed.is_main():
        Path(job.out).write_text(json.dumps(seconds), encoding="utf-8")


def fit(images: list[int], seconds: list[float]) -> tuple[float, float]:
    """a and b of seconds = a + b * images by least squares of the relative errors, neither below
    zero: noise would make small batches cost nothing, or large ones."""
    x, y = np.asarray(images, float), np.asarray(seconds, float)
    if len(x) == 1:
        return 0.0, y[0] / x[0]
    b, a = np.polyfit(x, y, 1, w=1 / y)
    return (0.0, np.mean(y / x)) if a < 0 else (a, b) if b > 0 else (np.mean(y), 0.0)


def predict(measured: dict, args: Namespace) -> dict:
    """One run, in numbers; seconds and bytes are of a step, and of each process."""
    world = args.gpus * args.nodes
    n, image = args.batch_size // world, 3 * args.image_size**2
    a, b = fit(measured["images"], measured["seconds"])
    compute, load = float(a + b * n), n * args.gpus * measured["pair_seconds"]
    intra, inter = 1e9 * args.intra_gbs, 1e9 * args.inter_gbs
    sent = {
        "all_reduce": 2 * (world - 1) / world * measured["gradient_bytes"],
        "gather": (world - 1) * n * args.moco_dim * 4.0,
        "shuffle": n * (world - 1) / world * image,
    }
    within, across = (args.gpus > 1) / intra, (args.nodes > 1) / (args.gpus * inter)
    travel = {name: sent[name] * max(within, across) for name in ("all_reduce", "gather")}
    strangers = max((args.gpus - 1) / intra, (world - args.gpus) / inter)
    travel["shuffle"] = n * image / world * strangers
    hidden = min(travel["all_reduce"], compute / 2) if measured["device"] == "cuda" else 0.0
    network = sum(travel.values()) - hidden
    seconds = max(compute + network, load / args.cores if args.cores else 0.0)
    return {
        "images_per_gpu": n,
        "step_seconds": seconds,
        "compute_seconds": compute,
        **{f"{name}_bytes": value for name, value in sent.items()},
        **{f"{name}_seconds": value for name, value in travel.items()},
        "network_not_hidden_seconds": network,
        "cores_per_node": load / (compute + network),
        "images_per_s": args.batch_size / seconds,
        "hours": args.epochs * (args.images // args.batch_size) * seconds / 3600,
    }


def check(args: Namespace, folder: Path) -> dict:
    """A prediction for 2 processes, and a run of them."""
    measured = measure(args, (args.batch_size // 2,), folder, 2 if args.device == "cpu" else 1)
    job = Namespace(size=measured["gradient_bytes"], out=str(folder / "seconds"))
    launch(time_all_reduce, job, devices=(visible_devices(args.device, None) * 2)[:2])
    link = job.size / json.loads(Path(job.out).read_text()) / 1e9  # 2 (W-1)/W is 1
    here = Namespace(**{**vars(args), "gpus": 2, "nodes": 1, "cores": None, "intra_gbs": link})
    predicted = predict(measured, here)["images_per_s"]
    found = args.batch_size / train(args, args.batch_size, folder / "run", 2)[0]
    error = f"{predicted / found - 1:+.1%}"
    print(f"2 processes: {predicted:.1f} images/s predicted, {found:.1f} measured, error {error}")
    return {"predicted": predicted, "measured": found}


if __name__ == "__main__":
    main()
