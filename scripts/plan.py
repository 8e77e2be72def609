#!/usr/bin/env python
"""Predict a pretraining run on many GPUs from figures that are measured on one device.

    python scripts/plan.py -a resnet50 --mlp --amp bf16 --batch-size 256 --gpus 8 --cores 64
    python scripts/plan.py ... --out measured.json                keep what was measured, and plan
    python scripts/plan.py --gpus 8 --nodes 4 ... --measured measured.json       plan elsewhere
    python scripts/plan.py --check                   predictions against real runs of main_moco.py

The model is in plan_model.py, the measuring in plan_measure.py. The bandwidths of --intra-gbs and
--inter-gbs are assumptions; everything else is measured on this machine, or counted.

--check has main_moco.py load in the training processes (-j 0) on a CPU, with one thread each. Two
of them share its memory and caches, as GPUs do not: how much slower that makes each is measured by
letting two processes compute at once without a word between them, and both predictions are shown.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from copy import copy
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "scripts" / "benchmark"))

import timing  # noqa: E402
from plan_measure import Step, measure, read_measured, write_photos  # noqa: E402
from plan_model import PAYS, Cluster, fit, memory_bytes, plan, predict  # noqa: E402

from moco import (  # noqa: E402
    cli,  # noqa: E402
    distributed,
    encoders,
)
from moco.errors import TrainingError  # noqa: E402
from moco.launch import launch, usable_cores, visible_devices  # noqa: E402
from moco.run_files import write_json  # noqa: E402

PUBLISHED_GROUP = 32  # images that batch norm sees together in the published runs
CASES = {
    "cpu": ["resnet18:64:32", "resnet50:64:16"],
    "cuda": ["resnet50:224:256", "resnet50:224:64"],
}
CHECK_STEPS, PRINT_FREQ, WARM_UP = 24, 2, 4  # of the runs that --check holds predictions against


def build_parser() -> argparse.ArgumentParser:
    parser = cli.Parser(description="plan a pretraining run", allow_abbrev=False)
    # fmt: off
    parser.add_argument("data", nargs="?", type=cli.non_empty, metavar="DIR",
                        help="images that the loader is timed on (default: synthetic JPEGs of "
                        "ImageNet's mean size)")
    run = parser.add_argument_group("the run, as for main_moco.py")
    run.add_argument("-a", "--arch", default="resnet50", help="%(default)s")
    run.add_argument("-b", "--batch-size", type=int, default=256, metavar="N",
                     help="over all GPUs of all nodes (%(default)s)")
    run.add_argument("--image-size", type=int, default=224, metavar="PX", help="%(default)s")
    run.add_argument("--small-stem", action="store_true")
    run.add_argument("--moco-dim", type=int, default=128, help="%(default)s")
    run.add_argument("--moco-k", type=int, default=65536, help="%(default)s")
    run.add_argument("--mlp", action="store_true")
    run.add_argument("--aug-plus", action="store_true")
    run.add_argument("--amp", choices=("off", "bf16", "fp16"), default="off")
    run.add_argument("--epochs", type=int, default=200, metavar="N", help="%(default)s")

    cluster = parser.add_argument_group("the machines")
    cluster.add_argument("--gpus", type=int, default=8, metavar="N", help="per node (%(default)s)")
    cluster.add_argument("--nodes", type=int, default=1, metavar="N", help="%(default)s")
    cluster.add_argument("--images", type=int, default=1281167, metavar="N",
                         help="of the training set (%(default)s: ImageNet)")
    cluster.add_argument("--cores", type=int, metavar="N",
                         help="per node, for loading; 0: none but the training processes "
                         "(default: as many as it takes)")
    cluster.add_argument("--intra-gbs", type=float, default=300, metavar="GB/S",
                         help="of each GPU to others of its node, each way (%(default)s: NVLink 3 "
                         "of an A100, as rated)")
    cluster.add_argument("--inter-gbs", type=float, default=12.5, metavar="GB/S",
                         help="of each GPU to other nodes, each way (%(default)s: an adapter of "
                         "100 Gbit/s for each GPU, as rated)")

    measuring = parser.add_argument_group("measuring")
    measuring.add_argument("--measure-batches", type=int, nargs="+", metavar="N",
                           help="images per step (default: around what each GPU of the plan gets; "
                           "16 at most on a CPU)")
    measuring.add_argument("--measured", type=Path, metavar="FILE",
                           help="figures of an earlier --out instead of measuring now")
    measuring.add_argument("--check", nargs="*", metavar="ARCH:PX:BATCH",
                           help="predict 1 and 2 processes on this machine (on GPUs as many as "
                           "there are), run main_moco.py, and compare")
    # fmt: on
    timing.add_arguments(measuring, repeats=7)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        device = check_device(args.device)
        if args.check is None:
            check_plan(args)
            measured = read_measured(args.measured, args) if args.measured else None
            sizes = None if measured else check_sizes(args, device)
        else:
            cases = check_cases(args, device)
        if args.out and args.out.is_dir():
            raise ValueError(f"--out {args.out} is a folder, expected a file")
    except ValueError as error:
        parser.error(str(error))
    if args.data is not None:
        args.dataset = "folder"
        cli.check_data_folder(parser, args, {"pretrain": 1})
    with cli.report_user_errors():
        if args.check is not None:
            content = {"check": check(cases, args, device)}
        else:
            measured = measured or measure(args, device, sizes)
            content = {"measured": measured, **plan(measured, args)}
            print_plan(content)
        if args.out:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            command = " ".join(["python", *sys.argv])
            write_json(args.out, {"command": command, "machine": timing.machine(), **content})


# ------------------------------------------------------------------------------------------------
# What can be refused at once
# ------------------------------------------------------------------------------------------------


def check_device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device must be cpu or cuda, got {name!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device must be cpu or cuda, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"--device {name}: {torch.cuda.device_count()} GPU(s) visible; measure on the CPU by "
            "--device cpu, or plan from a file of another machine by --measured FILE"
        )
    return device


def check_plan(args: argparse.Namespace) -> None:
    """Raise ValueError for a run that main_moco.py would refuse, or machines that cannot be."""
    for name, least in (
        ("gpus", 1), ("nodes", 1), ("batch_size", 2), ("epochs", 1), ("images", 1), ("cores", 0),
    ):  # fmt: skip
        value = getattr(args, name)
        if value is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {least}, got {value}")
    for name in ("intra_gbs", "inter_gbs"):
        if not 0 < getattr(args, name) < math.inf:
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag} must be a positive number, got {getattr(args, name):g}")
    world = args.gpus * args.nodes
    if args.batch_size % world or args.batch_size // world < 2:
        raise ValueError(
            f"--batch-size {args.batch_size} is over all GPUs and must be a multiple of their "
            f"number, {args.nodes} x {args.gpus} = {world}, with at least two images for each; "
            f"use {max(2, round(args.batch_size / world)) * world}"
        )
    if args.images < args.batch_size:
        raise ValueError(
            f"--images {args.images} are fewer than one batch of {args.batch_size}; lower "
            "--batch-size"
        )
    if args.measured and (args.measure_batches or args.data):
        raise ValueError("--measured takes the place of measuring: no DIR or --measure-batches")
    check_encoder(args)


def check_encoder(args: argparse.Namespace) -> None:
    for name in ("moco_dim", "moco_k", "image_size"):
        if getattr(args, name) < 1:
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag} must be at least 1, got {getattr(args, name)}")
    if args.moco_k < args.batch_size:
        raise ValueError(
            f"--moco-k {args.moco_k} is smaller than the global batch of {args.batch_size}: the "
            "queue must hold at least one batch of keys"
        )
    if args.amp == "fp16" and args.device == "cpu" and args.measured is None:
        raise ValueError("--amp fp16 needs a GPU; use bf16 or off on the CPU")
    encoder = encoders.build_encoder(
        args.arch, args.moco_dim, image_size=args.image_size, small_stem=args.small_stem
    )
    encoders.check_image_size(encoder, args.image_size)


def check_sizes(args: argparse.Namespace, device: torch.device) -> list[int]:
    """Batch sizes to measure at."""
    sizes = sorted(set(args.measure_batches or _sizes_around(args, device)))
    if len(sizes) < 2 or sizes[0] < 2:
        raise ValueError(
            "--measure-batches: a line needs two different sizes of at least 2 images, got "
            f"{' '.join(map(str, sizes))}"
        )
    if sizes[-1] > args.moco_k:
        raise ValueError(f"--measure-batches {sizes[-1]} is more than the --moco-k {args.moco_k}")
    return sizes


def _sizes_around(args: argparse.Namespace, device: torch.device) -> list[int]:
    share = args.batch_size // (args.gpus * args.nodes)
    if device.type == "cpu":
        share = min(share, 8)
    share = max(share, 4)
    return [size for size in (share // 2, share, 2 * share) if size <= max(4, args.moco_k)]


def check_cases(args: argparse.Namespace, device: torch.device) -> list[argparse.Namespace]:
    """The settings of each case of --check."""
    if args.measured or args.measure_batches or args.data:
        raise ValueError("--check measures for itself: no DIR, --measured or --measure-batches")
    cases = []
    for text in args.check or CASES[device.type]:
        try:
            arch, size, batch = text.split(":")
            case = copy(args)
            case.arch, case.image_size, case.batch_size = arch, int(size), int(batch)
        except ValueError:
            raise ValueError(f"--check expects ARCH:PIXELS:BATCH, got {text!r}") from None
        if case.batch_size < 8 or case.batch_size % 4:
            raise ValueError(f"--check {text}: the batch must be a multiple of 4 from 8 on")
        check_encoder(case)
        cases.append(case)
    return cases


# ------------------------------------------------------------------------------------------------
# On the screen
# ------------------------------------------------------------------------------------------------


def print_plan(content: dict) -> None:
    measured, asked, row = content["measured"], content["asked"], content["plan"]
    settings, sent = measured["settings"], row["network_bytes_per_gpu"]
    machine = measured["machine"]
    where = machine["gpu"] if measured["device"] == "cuda" else machine["cpu"]
    print(f"\nmeasured on one {where} ({machine['date']}, torch {machine['torch']})")
    sizes = [entry["images"] for entry in measured["steps"]]
    a, b = fit(sizes, [entry["seconds"] for entry in measured["steps"]])
    for entry in measured["steps"]:
        error = (a + b * entry["images"]) / entry["seconds"] - 1
        print(
            f"  step of {entry['images']:>4} images {1e3 * entry['seconds']:>9.1f} ms, backward "
            f"{1e3 * entry['backward_seconds']:>8.1f} ms; the line is off by {error:+.1%}"
        )
    print(f"  line: {1e3 * a:.2f} ms + {1e3 * b:.3f} ms per image")
    print(f"  loader: {1 / measured['pair_seconds']:.1f} pairs of views per second and core")
    if measured["device"] == "cpu":
        print(
            "  A CPU was measured: every GPU below is one such CPU. Plan for GPUs on one of them."
        )

    words = [settings["arch"], f"{settings['image_size']} px", f"batch {asked['batch_size']}"]
    words += [f"amp {settings['amp']}", f"queue {settings['moco_k']} x {settings['moco_dim']}"]
    words += [name for name in ("small_stem", "mlp", "aug_plus") if settings[name]]
    print(f"\n{', '.join(words)} on {asked['nodes']} node(s) of {asked['gpus']} GPU(s)")
    travel = row["network_seconds"]
    facts = {
        "step": f"{1e3 * row['step_seconds']:.1f} ms: computing {1e3 * row['compute_seconds']:.1f},"
        f" network not hidden {1e3 * row['network_seconds_not_hidden']:.2f}"
        + (f", loader {1e3 * row['loader_seconds']:.1f}" if asked["cores"] is not None else ""),
        "speed": f"{row['images_per_s']:.0f} images/s, {row['efficiency']:.0%} of {row['gpus']} "
        "times that of one",
        "duration": f"{row['hours']:.2f} hours for {asked['epochs']} epochs of {asked['images']} "
        "images",
        "limit": row["limit"],
        "memory": f"{row['memory_bytes'] / 2**30:.2f} GiB per GPU: "
        + ", ".join(f"{name} {size / 2**20:.0f} MiB" for name, size in row["memory"].items()),
        "network": ", ".join(
            f"{name.replace('_', '-')} {sent[name] / 1e6:.2f} MB in {1e3 * travel[name]:.2f} ms"
            for name in sent
        )
        + f" per GPU and step; {row['network_bytes'] / 1e6:.1f} MB over all GPUs",
        "loader": f"{row['cores_per_node']:.1f} cores per node to keep up"
        + (f", {asked['cores']} given" if asked["cores"] is not None else ""),
        "batch norm": _batch_norm_note(row) if measured["buffer_bytes"] else "none in this arch",
        "assumed": f"{asked['intra_gbs']:g} GB/s within a node and {asked['inter_gbs']:g} GB/s "
        "between nodes, per GPU each way; no latency",
    }
    for name, fact in facts.items():
        print(f"{name:>10}: {fact}")

    print(
        f"\n{'GPUs':>5} {'nodes':>5} {'each':>5} {'step':>10} {'images/s':>9} {'effic.':>7} "
        f"{'memory':>10} {'network':>11} {'cores/node':>10} {'hours':>8}  limit"
    )
    for each in content["rows"]:
        notes = [each["limit"]]
        notes += ["does not fit"] * (not each["fits"]) + ["extrapolated"] * each["extrapolated"]
        sent_mb = sum(each["network_bytes_per_gpu"].values()) / 1e6
        print(
            f"{each['gpus']:>5} {each['nodes']:>5} {each['images_per_gpu']:>5} "
            f"{1e3 * each['step_seconds']:>7.1f} ms {each['images_per_s']:>9.0f} "
            f"{each['efficiency']:>7.0%} {each['memory_bytes'] / 2**30:>6.2f} GiB "
            f"{sent_mb:>8.1f} MB {each['cores_per_node']:>10.1f} {each['hours']:>8.2f}  "
            + ", ".join(notes)
        )
    _print_end(content)


def _batch_norm_note(row: dict) -> str:
    n, group = row["images_per_gpu"], row["batch_norm_group"]
    if group == PUBLISHED_GROUP:
        return f"groups of {group}, as in the published runs"
    return (
        f"one group of {group} on each GPU; the published runs have groups of {PUBLISHED_GROUP}: "
        + (f"{n} images per GPU are too few" if n < PUBLISHED_GROUP else f"{n} is no multiple")
    )


def _print_end(content: dict) -> None:
    """Where adding GPUs stops paying, and why."""
    rows = {row["gpus"]: row for row in content["rows"]}
    last = content["stops_paying_at"]
    if last is None:
        print(f"up to {max(rows)} GPUs, twice as many are at least {PAYS} times as fast")
        return
    after = rows[2 * last]
    gain = after["images_per_s"] / rows[last]["images_per_s"]
    steps = content["measured"]["steps"]
    a, _ = fit([entry["images"] for entry in steps], [entry["seconds"] for entry in steps])
    print(
        f"adding GPUs stops paying at {last}: {2 * last} are {gain:.2f} times as fast (limit: "
        f"{after['limit']}; of a step of {1e3 * after['step_seconds']:.1f} ms, {1e3 * a:.1f} do "
        f"not shrink with the batch and {1e3 * after['network_seconds_not_hidden']:.2f} are "
        "network)"
    )


# ------------------------------------------------------------------------------------------------
# Against real runs
# ------------------------------------------------------------------------------------------------


def check(cases: list[argparse.Namespace], args: argparse.Namespace, device: torch.device) -> dict:
    """Predict and run each case; the table."""
    counts, cores = [1, 2], 0
    if device.type == "cpu":
        torch.set_num_threads(1)  # of each process, so that two of them find it as one does
    else:
        counts, cores = counts[: torch.cuda.device_count()], usable_cores()
    rows, all_measured = [], []
    for case in cases:
        with tempfile.TemporaryDirectory() as folder:
            data = Path(folder) / "data"
            link_photos(data, CHECK_STEPS * case.batch_size)
            sizes = [case.batch_size // 4, case.batch_size // 2, case.batch_size]
            measured = measure(case, device, sizes, str(data))
            all_measured.append(measured)
            name = f"{case.arch} {case.image_size} px, batch {case.batch_size}"
            memory = sum(memory_bytes(measured, case.batch_size, 1).values())
            rows.append(
                _compared(f"{name}, 1 process", "MiB", memory / 2**20,
                          step_memory(case, device, Path(folder)) / 2**20)
            )  # fmt: skip
            for processes in counts:
                link = math.inf
                if processes > 1:
                    link = link_rate(measured["parameter_bytes"], device, Path(folder))
                found = run_training(case, device, processes, cores, data, Path(folder))
                ways = {"": 1.0}
                if processes > 1 and device.type == "cpu":
                    slower = sharing(case, measured, Path(folder))
                    ways[f", each {slower:.2f} x as slow"] = slower
                cluster = Cluster(processes, 1, cores, link, link)
                for way, slower in ways.items():
                    predicted = predict(
                        _slowed(measured, slower), cluster, case.batch_size, case.batch_size, 1
                    )
                    what = f"{name}, {processes} process" + "es" * (processes > 1) + way
                    row = _compared(what, "images/s", predicted["images_per_s"], found)
                    rows.append({**row, "prediction": predicted, "cluster": asdict(cluster)})
    print(f"\n{timing.machine_line(timing.machine())}")
    print(f"{'':<66} {'':<8} {'predicted':>10} {'measured':>10} {'error':>7}")
    for row in rows:
        print(
            f"{row['what']:<66} {row['unit']:<8} {row['predicted']:>10.1f} "
            f"{row['measured']:>10.1f} {row['error']:>+7.1%}"
        )
    return {"rows": rows, "measured": all_measured}


def _compared(what: str, unit: str, predicted: float, found: float) -> dict:
    return {
        "what": what,
        "unit": unit,
        "predicted": predicted,
        "measured": found,
        "error": predicted / found - 1,
    }


def link_photos(folder: Path, count: int) -> None:
    """`count` names for sixteen photos."""
    folder.mkdir()
    write_photos(folder, min(16, count))
    for i in range(16, count):
        os.link(folder / f"{i % 16:05d}.jpg", folder / f"{i:05d}.jpg")


def link_rate(size: int, device: torch.device, folder: Path) -> float:
    """Bytes/s each way between two processes, averaging gradients of `size` bytes."""
    devices = (visible_devices(device.type, None) * 2)[:2]
    job = SimpleNamespace(size=size, result=folder / "link.json")
    launch(_time_all_reduce, job, devices=devices)
    seconds = json.loads(job.result.read_text(encoding="utf-8"))
    return size / seconds  # 2 (W-1)/W is 1


def _time_all_reduce(device: torch.device, job: SimpleNamespace) -> None:
    """In each of the two processes."""
    torch.set_num_threads(1)
    gradients = torch.zeros(job.size // 4, device=device)
    times = timing.interleaved(
        {"": lambda: distributed.sum_over_ranks(gradients)}, repeats=9, device=device
    )
    if distributed.is_main():
        job.result.write_text(json.dumps(statistics.median(times[""])), encoding="utf-8")


def step_memory(case: argparse.Namespace, device: torch.device, folder: Path) -> int:
    """Most bytes that a model and its steps take in a process of their own: counted by torch on a
    GPU, else the growth of the process."""
    result = folder / "memory.json"
    torch.multiprocessing.spawn(_grow, args=(case, device, result))
    return json.loads(result.read_text(encoding="utf-8"))


def _grow(_: int, case: argparse.Namespace, device: torch.device, result: Path) -> None:
    torch.set_num_threads(1)
    tiny = copy(case)
    tiny.arch, tiny.image_size, tiny.small_stem, tiny.moco_k = "resnet8", 16, False, 64
    Step(tiny, 2, device)()  # libraries come into memory with the first step
    timing.reset_peak_memory(device)
    before = timing.peak_memory(device)
    step = Step(case, case.batch_size, device)
    for _ in range(2):
        step()
    timing.synchronize(device)
    result.write_text(json.dumps(timing.peak_memory(device) - before), encoding="utf-8")


def sharing(case: argparse.Namespace, measured: dict, folder: Path) -> float:
    """How many times as long a step takes while a second process computes on this machine."""
    images = case.batch_size // 2
    spawning = torch.multiprocessing.get_context("spawn")
    results = [folder / "step-0.json", folder / "step-1.json"]
    job = (case, images, results, spawning.Barrier(2))
    torch.multiprocessing.spawn(_time_step, args=job, nprocs=2)
    both = [json.loads(path.read_text(encoding="utf-8")) for path in results]
    alone = next(entry["seconds"] for entry in measured["steps"] if entry["images"] == images)
    return statistics.mean(both) / alone


def _time_step(number: int, case: argparse.Namespace, images: int, results, together) -> None:
    """In each of the two processes."""
    torch.set_num_threads(1)
    step = Step(case, images, torch.device("cpu"))
    step()
    together.wait()
    times = timing.interleaved({"": step}, repeats=case.repeats)[""]
    results[number].write_text(json.dumps(statistics.median(times)), encoding="utf-8")


def _slowed(measured: dict, times: float) -> dict:
    """With computing and loading that take so many times as long."""
    steps = [
        {**entry, **{name: times * entry[name] for name in ("seconds", "backward_seconds")}}
        for entry in measured["steps"]
    ]
    return {**measured, "steps": steps, "pair_seconds": times * measured["pair_seconds"]}


def run_training(
    args: argparse.Namespace,
    device: torch.device,
    processes: int,
    cores: int,
    data: Path,
    folder: Path,
) -> float:
    """Images per second of main_moco.py, the median over its log after the first steps."""
    run = folder / f"run-{processes}"
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    words = [
        "-a", args.arch, "--image-size", args.image_size, "--batch-size", args.batch_size,
        "--moco-dim", args.moco_dim, "--moco-k", args.moco_k, "--amp", args.amp,
        *["--small-stem"] * args.small_stem, *["--mlp"] * args.mlp,
        *["--aug-plus"] * args.aug_plus, "--device", device.type,
        *(["--gpus", ",".join(map(str, range(processes)))] if device.type == "cuda" else []),
        "-j", cores, "--max-steps", CHECK_STEPS, "-p", PRINT_FREQ, "--seed", 0,
        "--save-dir", run, data,
    ]  # fmt: skip
    environment = dict(os.environ)
    if device.type == "cpu":
        environment["OMP_NUM_THREADS"] = "1"
    done = subprocess.run(
        [*start, str(ROOT / "main_moco.py"), *map(str, words)],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or "nothing").splitlines()
        raise TrainingError(
            f"main_moco.py with {processes} process(es) ended with status {done.returncode}: "
            + next((line for line in said if "error" in line.lower()), said[-1])
        )
    lines = map(json.loads, (run / "log.jsonl").read_text(encoding="utf-8").splitlines())
    return statistics.median(
        line["images_per_s"] for line in lines if line["kind"] == "train" and line["step"] > WARM_UP
    )


if __name__ == "__main__":
    main()
