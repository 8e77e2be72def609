"""What a pretraining run on many GPUs takes, by arithmetic from figures of one (see plan.py).

A step of W processes with n = batch / W images each takes max(compute + network, loader):

    compute    a + b n, fitted to whole training steps of a few batch sizes
    network    what does not hide behind computing:
                 all-reduce  2 (W-1)/W x bytes of the gradients (a ring), hidden as long as the
                             backward pass lasts; not at all on a CPU, whose cores do both
                 shuffle     n (W-1)/W images of 3 x px x px bytes, not hidden
                 gather      (W-1) n dim float32 of the other processes' keys, not hidden
               A ring that crosses nodes does so over all adapters of a node together.
    loader     pairs of views that the cores make meanwhile, at the rate of one times their number;
               without cores of its own (main_moco.py -j 0) they are made one after the other with
               computing, and the times add up

Not in it: latency of messages, processes that compete for the memory of a machine, the loader's
sending of batches between processes, and what CUDA itself needs on a GPU.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from moco.batch_norm import automatic_bn_splits  # noqa: E402

PAYS = 1.25  # twice as many GPUs should be at least so many times as fast


@dataclass(frozen=True)
class Cluster:
    """Machines that are all alike."""

    gpus: int  # per node
    nodes: int
    cores: int | None  # per node, for loading; 0: the training processes load; None: enough
    intra: float  # bytes/s of a GPU to others of its node, each way
    inter: float  # bytes/s of a GPU to other nodes, each way

    @property
    def world(self) -> int:
        return self.gpus * self.nodes


def fit(images: Sequence[float], seconds: Sequence[float]) -> tuple[float, float]:
    """a and b of seconds = a + b * images by least squares of the relative errors, neither below
    zero: noise would make small batches cost nothing, or large ones."""
    x, y = np.asarray(images, float), np.asarray(seconds, float)
    columns = np.stack([1 / y, x / y])
    a, b = np.linalg.lstsq(columns.T, np.ones_like(y), rcond=None)[0]
    if min(a, b) < 0:
        alone = columns.sum(axis=1) / (columns**2).sum(axis=1)  # each without the other
        a, b = (0.0, alone[1]) if a < 0 else (alone[0], 0.0)
    return float(a), float(b)


def network_bytes(measured: dict, n: int, world: int) -> dict[str, float]:
    """Bytes that each GPU sends, and receives, in a step with n images on each of `world` GPUs."""
    settings = measured["settings"]
    return {
        "all_reduce": 2 * (world - 1) / world * measured["parameter_bytes"],
        "shuffle": n * (world - 1) / world * 3 * settings["image_size"] ** 2,
        "gather": (world - 1) * n * settings["moco_dim"] * 4.0,
    }


def network_seconds(measured: dict, n: int, cluster: Cluster) -> dict[str, float]:
    """How long they take."""
    sent = network_bytes(measured, n, cluster.world)

    def ring(size: float) -> float:
        within = size / cluster.intra if cluster.gpus > 1 else 0.0
        across = size / (cluster.gpus * cluster.inter) if cluster.nodes > 1 else 0.0
        return max(within, across)

    image = 3 * measured["settings"]["image_size"] ** 2
    within = n * (cluster.gpus - 1) / cluster.world * image / cluster.intra
    across = n * (cluster.world - cluster.gpus) / cluster.world * image / cluster.inter
    return {
        "all_reduce": ring(sent["all_reduce"]),
        "shuffle": max(within, across),
        "gather": ring(sent["gather"]),
    }


def memory_bytes(measured: dict, n: int, world: int) -> dict[str, float]:
    """What a GPU holds when it holds most, by kind.

    Once the query's activations are there, the key's forward pass comes and goes; then gradients
    grow while activations shrink. So the larger of the two is on top, never both.
    """
    settings, weights = measured["settings"], measured["parameter_bytes"]
    activations, key_forward = (
        measured[kind]["fixed"] + n * measured[kind]["per_image"]
        for kind in ("activations", "key_forward")
    )
    image = 3 * settings["image_size"] ** 2
    return {
        "both encoders": 2 * (weights + measured["buffer_bytes"]),
        "momentum": weights,
        "gradient buckets": weights if world > 1 else 0,
        "queue": settings["moco_k"] * settings["moco_dim"] * 4,
        # Two views and the shuffled one; between GPUs also what is sent and what is received.
        "images": (5 if world > 1 else 3) * n * image,
        "activations": activations,
        "key forward or gradients": max(key_forward, weights),
    }


def predict(measured: dict, cluster: Cluster, batch: int, images: int, epochs: int) -> dict:
    """One run, in numbers; seconds and bytes are of a step."""
    world, n = cluster.world, batch // cluster.world
    sizes = [entry["images"] for entry in measured["steps"]]
    compute, backward = (
        a + b * n
        for a, b in (
            fit(sizes, [entry[name] for entry in measured["steps"]])
            for name in ("seconds", "backward_seconds")
        )
    )
    sent, travel = network_bytes(measured, n, world), network_seconds(measured, n, cluster)
    hidden = min(travel["all_reduce"], backward) if measured["device"] == "cuda" else 0.0
    network = sum(travel.values()) - hidden
    pair = measured["pair_seconds"]
    parts = {"compute": compute, "network": network}
    if cluster.cores == 0:
        load = parts["loader"] = n * pair
        seconds = compute + network + load
    else:
        load = n * cluster.gpus * pair / cluster.cores if cluster.cores else 0.0
        seconds = max(compute + network, load)
        if load > compute + network:  # else it is never waited for
            parts["loader"] = load
    held = memory_bytes(measured, n, world)
    return {
        "gpus": world,
        "nodes": cluster.nodes,
        "images_per_gpu": n,
        "extrapolated": not min(sizes) <= n <= max(sizes),
        "step_seconds": seconds,
        "compute_seconds": compute,
        "backward_seconds": backward,
        "network_seconds": travel,
        "network_seconds_not_hidden": network,
        "loader_seconds": load,
        "images_per_s": batch / seconds,
        "memory": held,
        "memory_bytes": sum(held.values()),
        "fits": measured["device_bytes"] is None or sum(held.values()) < measured["device_bytes"],
        "network_bytes_per_gpu": sent,
        "network_bytes": world * sum(sent.values()),
        "cores_per_node": n * cluster.gpus * pair / (compute + network),
        "hours": epochs * (images // batch) * seconds / 3600,
        "limit": max(parts, key=parts.__getitem__),
        "batch_norm_group": n // automatic_bn_splits(n),
    }


def plan(measured: dict, args: argparse.Namespace) -> dict:
    """The run that is asked for, and the same global batch on fewer and on more GPUs.

    Returns:
        `asked` (the arguments), `plan` (of `predict`), `rows` (the same for each number of GPUs,
        with the `efficiency` over one) and `stops_paying_at`: the fewest GPUs of which twice as
        many are not `PAYS` times as fast; None when there are none.
    """

    def at(world: int) -> dict:
        gpus = min(world, args.gpus)
        cluster = Cluster(
            gpus, world // gpus, args.cores, 1e9 * args.intra_gbs, 1e9 * args.inter_gbs
        )
        return predict(measured, cluster, args.batch_size, args.images, args.epochs)

    asked = args.gpus * args.nodes
    counts = {2**i for i in range(args.batch_size.bit_length())}
    counts = {c for c in counts if c <= args.gpus or c % args.gpus == 0}
    counts |= {args.gpus * 2**i for i in range(args.batch_size.bit_length())} | {asked}
    counts = {c for c in counts if args.batch_size % c == 0 and args.batch_size // c >= 2}
    rows = {count: at(count) for count in sorted(counts)}
    for count, row in rows.items():
        row["efficiency"] = row["images_per_s"] / count / rows[1]["images_per_s"]
    poor = [
        count
        for count, row in rows.items()
        if 2 * count in rows and rows[2 * count]["images_per_s"] < PAYS * row["images_per_s"]
    ]
    names = ("batch_size", "gpus", "nodes", "images", "epochs", "cores", "intra_gbs", "inter_gbs")
    return {
        "asked": {name: getattr(args, name) for name in names},
        "plan": rows[asked],
        "rows": list(rows.values()),
        "stops_paying_at": poor[0] if poor else None,
    }
