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

import argparse
import contextlib
import multiprocessing
import statistics
from collections.abc import Callable
from functools import partial
from unittest import mock

import baseline
import torch
import torch.nn.functional as F
from torch import Tensor

from align_uniform import (
    align_loss,
    contrastive_loss,
    contrastive_rank,
    losses,
    uniform_loss_with_queue,
)
from moco import timing

PRODUCTS = {"align+uniform": 2, "InfoNCE": 2, "InfoNCE+top1,5": 3}
HAS_ONEDNN = losses._ONEDNN_LINEAR is not None
CURVE = [(256, size) for size in (4096, 16384, 65536, 262144)]
CURVE += [(n, 65536) for n in (32, 64, 128, 256, 512, 1024)]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="time and memory of the queue losses")
    parser.add_argument("--queue", type=int, default=65536)
    parser.add_argument("--batch", type=int, nargs="+", default=[32, 256])
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument(
        "--curve", action="store_true", help="align+uniform over K at N=256 and over N at K=65536"
    )
    timing.add_arguments(parser, repeats=15)
    args = parser.parse_args(argv)
    rate = product_rate(args.device)
    product = "oneDNN" if args.device == "cpu" and losses.products_by_onednn() else "@"
    table = timing.Table(
        f"queue losses, forward and backward, C={args.dim}, float32; "
        f"large product {rate / 1e9:.0f} Gflop/s; ours multiplies by {product}"
    )
    cases = [(loss, n, args.queue) for loss in PRODUCTS for n in args.batch]
    if args.curve:
        cases = [("align+uniform", n, size) for n, size in CURVE]
    for case in cases:
        compare(table, *case, args, rate)
    memory = []
    for n in [] if args.curve else args.batch:
        # Each in a process of its own, where nothing has been freed before.
        with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
            each = [(which, n, args) for which in ("baseline", "ours")]
            theirs, own = pool.starmap(added_memory, each, chunksize=1)
        memory.append({"N": n, "K": args.queue, "baseline_MiB": theirs, "ours_MiB": own})
        print(f"memory of align+uniform N={n}: baseline {theirs:.1f} MiB, ours {own:.1f} MiB")
    table.write(args.out, product_rate=rate, memory=memory, product=product)


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
    table: timing.Table, loss: str, n: int, size: int, args: argparse.Namespace, rate: float
) -> None:
    """One loss at batch n against a queue of `size` keys, and by the other product."""
    variants = steps(loss, n, size, args)
    times = timing.interleaved(variants, repeats=args.repeats, device=args.device)
    for other in [name for name in times if name != "ours"]:
        table.add(
            f"{loss} N={n} K={size}" if other == "baseline" else f"  against ours by {other}",
            times[other],
            times["ours"],
            floor=PRODUCTS[loss] * 2 * n * size * args.dim / rate,
            limited_by=f"{PRODUCTS[loss]} products",
            **{"loss": loss, "N": n, "K": size, "C": args.dim},
        )


def steps(loss: str, n: int, size: int, args: argparse.Namespace) -> dict[str, Callable[[], None]]:
    """Forward and backward of a loss: the baseline's way, ours, and ours by the other product."""
    torch.manual_seed(0)
    x = torch.randn(n, args.dim, device=args.device, requires_grad=True)
    k = F.normalize(torch.randn(n, args.dim, device=args.device), dim=1)
    rows = F.normalize(torch.randn(size, args.dim, device=args.device), dim=1)
    # Each with the queue as it stores it.
    queue, upstream_queue = rows.t(), rows.t().contiguous()

    def ours(q: Tensor) -> Tensor:
        if loss == "align+uniform":
            return align_loss(q, k) + uniform_loss_with_queue(q, queue, 3)
        if loss == "InfoNCE+top1,5":
            contrastive_rank(q, k, queue)
        return contrastive_loss(q, k, queue, 0.2)

    def theirs(q: Tensor) -> Tensor:
        if loss == "align+uniform":
            return baseline.align_uniform(q, k, upstream_queue, 3)
        return baseline.info_nce(q, k, upstream_queue, 0.2, hits=loss == "InfoNCE+top1,5")[0]

    def step(value: Callable[[Tensor], Tensor]) -> None:
        x.grad = None
        value(F.normalize(x, dim=1)).backward()

    def by_the_other() -> None:
        with by_onednn(not chosen):
            step(ours)

    chosen = losses.products_by_onednn()
    variants = {"baseline": partial(step, theirs), "ours": partial(step, ours)}
    if args.device == "cpu" and HAS_ONEDNN:
        variants["@" if chosen else "oneDNN"] = by_the_other
    return variants


def added_memory(which: str, n: int, args: argparse.Namespace) -> float:
    """MiB that one step of align+uniform adds to the peak of this process, or of the GPU."""
    steps("align+uniform", 2, 8, args)[which]()  # libraries load at their first use
    step = steps("align+uniform", n, args.queue, args)[which]
    timing.reset_peak_memory(args.device)
    before = timing.peak_memory(args.device)
    step()
    return (timing.peak_memory(args.device) - before) / 2**20


if __name__ == "__main__":
    main()
