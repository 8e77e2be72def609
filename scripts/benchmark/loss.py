#!/usr/bin/env python
"""Time and memory of the queue losses, forward and backward, against the full N x K matrix.

    python scripts/benchmark/loss.py [--out FILE.json]
    python scripts/benchmark/loss.py --curve [--out FILE.json]     how they grow with K and with N

On a CPU also against ours with the other of torch's two products (oneDNN's and that of `@`), as a
check of `losses.products_by_onednn`. The limit is arithmetic: two products of 2NKC flops (three
with the ranks, which are counted in a sweep of their own, as only print steps ask for them) at the
rate of a large product here. Memory is what a step adds to the peak of a process that has just
started.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import baseline

from align_uniform import (
    align_loss,
    contrastive_loss,
    contrastive_rank,
    losses,
    uniform_loss_with_queue,
)
from moco import timing

LOSSES = ("align+uniform", "InfoNCE", "InfoNCE+top1,5")
HAS_ONEDNN = losses._ONEDNN_LINEAR is not None
CURVE_K = [(256, size) for size in (4096, 16384, 65536, 262144)]
CURVE_N = [(n, 65536) for n in (32, 64, 128, 256, 512, 1024)]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="time and memory of the queue losses")
    parser.add_argument("--queue", type=int, default=65536)
    parser.add_argument("--batch", type=int, nargs="+", default=[32, 256])
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument(
        "--curve", action="store_true", help="align+uniform over K at N=256 and over N at K=65536"
    )
    parser.add_argument("--memory-of", choices=["baseline", "ours"], help=argparse.SUPPRESS)
    timing.add_arguments(parser, repeats=15)
    args = parser.parse_args(argv)
    if args.memory_of:
        print(added_memory(args))
        return

    rate = product_rate(args.device)
    table = timing.Table(
        f"queue losses, forward and backward, C={args.dim}, float32; "
        f"large product {rate / 1e9:.0f} Gflop/s; ours multiplies by {product_name(args.device)}"
    )
    if args.curve:
        cases = [("align+uniform", n, size) for n, size in CURVE_K + CURVE_N]
    else:
        cases = [(loss, n, args.queue) for loss in LOSSES for n in args.batch]
    for loss, n, size in cases:
        for row in compare(loss, n, size, args, rate):
            table.add(row)
    memory = []
    for n in [] if args.curve else args.batch:
        theirs, own = (memory_in_a_process(which, n, args) for which in ("baseline", "ours"))
        memory.append({"N": n, "K": args.queue, "baseline_MiB": theirs, "ours_MiB": own})
        print(f"memory of align+uniform N={n}: baseline {theirs:.1f} MiB, ours {own:.1f} MiB")
    table.write(args.out, product_rate=rate, memory=memory, product=product_name(args.device))


def product_name(device: str) -> str:
    if device != "cpu":
        return "@"
    return "oneDNN" if losses.products_by_onednn() else "@"


def by_onednn(used: bool) -> contextlib.AbstractContextManager:
    """Within, sweeps on a CPU multiply by oneDNN or by `@`, whatever the processor."""
    return mock.patch.object(losses, "products_by_onednn", lambda: used)


def product_rate(device: str, size: int = 2048) -> float:
    """Flops per second of a square float32 product, by the faster of torch's two libraries on a
    CPU; medians of 9."""
    a = torch.randn(size, size, device=device)
    with by_onednn(HAS_ONEDNN):
        times = timing.interleaved(
            {"@": lambda: a @ a, "onednn": lambda: losses._product(a, a)}, repeats=9, device=device
        )
    return 2 * size**3 / min(map(statistics.median, times.values()))


def compare(
    loss: str, n: int, size: int, args: argparse.Namespace, rate: float
) -> list[timing.Row]:
    """One loss at batch n against a queue of `size` keys, and by the other product."""
    times = timing.interleaved(steps(loss, n, size, args), repeats=args.repeats, device=args.device)
    products = 3 if loss == "InfoNCE+top1,5" else 2
    return [
        timing.row(
            f"{loss} N={n} K={size}" if other == "baseline" else f"  against ours by {other}",
            times[other],
            times["ours"],
            floor=products * 2 * n * size * args.dim / rate,
            limited_by=f"{products} products",
            more={"loss": loss, "N": n, "K": size, "C": args.dim},
        )
        for other in times
        if other != "ours"
    ]


def steps(loss: str, n: int, size: int, args: argparse.Namespace) -> dict[str, Callable[[], None]]:
    """Forward and backward of a loss: the baseline's way, ours, and ours by the other product."""
    torch.manual_seed(0)
    x = torch.randn(n, args.dim, device=args.device, requires_grad=True)
    k = F.normalize(torch.randn(n, args.dim, device=args.device), dim=1)
    rows = F.normalize(torch.randn(size, args.dim, device=args.device), dim=1)
    # Each with the queue as it stores it.
    queue, upstream_queue = rows.t(), rows.t().contiguous()

    def ours() -> None:
        q = F.normalize(x, dim=1)
        if loss == "align+uniform":
            value = align_loss(q, k) + uniform_loss_with_queue(q, queue, 3)
        else:
            value = contrastive_loss(q, k, queue, 0.2)
            if loss == "InfoNCE+top1,5":
                contrastive_rank(q, k, queue)
        backward(value)

    def theirs() -> None:
        q = F.normalize(x, dim=1)
        if loss == "align+uniform":
            value = baseline.align_uniform(q, k, upstream_queue, 3)
        else:
            value = baseline.info_nce(q, k, upstream_queue, 0.2, hits=loss == "InfoNCE+top1,5")[0]
        backward(value)

    def backward(value: torch.Tensor) -> None:
        x.grad = None
        value.backward()

    def by_the_other() -> None:
        with by_onednn(not chosen):
            ours()

    variants = {"baseline": theirs, "ours": ours}
    chosen = losses.products_by_onednn()
    if args.device == "cpu" and HAS_ONEDNN:
        variants["@" if chosen else "oneDNN"] = by_the_other
    return variants


def memory_in_a_process(which: str, n: int, args: argparse.Namespace) -> float:
    """`added_memory` in a process of its own, where nothing has been freed before."""
    command = [sys.executable, __file__, "--memory-of", which, "--batch", str(n)]
    command += ["--queue", str(args.queue), "--dim", str(args.dim), "--device", args.device]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def added_memory(args: argparse.Namespace) -> float:
    """MiB that one step of align+uniform adds to the peak of this process, or of the GPU."""
    (n,) = args.batch
    steps("align+uniform", 2, 8, args)[args.memory_of]()  # libraries load at their first use
    step = steps("align+uniform", n, args.queue, args)[args.memory_of]
    timing.reset_peak_memory(args.device)
    before = timing.peak_memory(args.device)
    step()
    return (timing.peak_memory(args.device) - before) / 2**20


if __name__ == "__main__":
    main()
