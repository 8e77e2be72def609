#!/usr/bin/env python
"""Time of the queue losses, forward and backward, against the full N x K matrix.

    python scripts/benchmark/loss.py [--out FILE.json]

Both variants run in turn in one process; medians, with the spread from the first to the last
quartile. The limit is arithmetic: two products of 2NKC flops at the rate of a large product here.
Ratios carry over between machines better than milliseconds do.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import baseline  # noqa: E402

from align_uniform import (  # noqa: E402
    align_loss,
    contrastive_loss,
    contrastive_rank,
    uniform_loss_with_queue,
)


def main() -> None:
    parser = argparse.ArgumentParser(description="time of the queue losses")
    parser.add_argument("--queue", type=int, default=65536)
    parser.add_argument("--batch", type=int, nargs="+", default=[32, 256])
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write JSON")
    args = parser.parse_args()

    rate = product_rate(args.device)
    name = torch.cuda.get_device_name() if args.device != "cpu" else "CPU"
    print(
        f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"K={args.queue}, C={args.dim}, float32; large product {rate / 1e9:.0f} Gflop/s"
    )
    print(
        f"{'loss':<16} {'N':>4} {'baseline ms':>12} {'ours ms':>8} {'ratio':>6} {'spread':>11} "
        f"{'limit':>6} {'of it':>6}"
    )
    rows = []
    for loss in ("align+uniform", "InfoNCE+top1,5"):
        for n in args.batch:
            row = compare(loss, n, args, rate)
            rows.append(row)
            low, high = row["spread"]
            print(
                f"{loss:<16} {n:>4} {row['baseline_ms']:>12.1f} {row['ours_ms']:>8.1f} "
                f"{row['ratio']:>5.1f}x {low:>5.1f}-{high:<4.1f}x {row['limit']:>5.1f}x "
                f"{100 * row['ratio'] / row['limit']:>4.0f} %",
                flush=True,
            )
    if args.out:
        args.out.write_text(json.dumps({"device": name, "rows": rows}, indent=2) + "\n")


def compare(loss: str, n: int, args: argparse.Namespace, rate: float) -> dict:
    torch.manual_seed(0)
    device = args.device
    x = torch.randn(n, args.dim, device=device, requires_grad=True)
    k = F.normalize(torch.randn(n, args.dim, device=device), dim=1)
    rows = F.normalize(torch.randn(args.queue, args.dim, device=device), dim=1)
    queue, upstream_queue = rows.t(), rows.t().contiguous()

    def ours() -> None:
        q = F.normalize(x, dim=1)
        if loss == "align+uniform":
            value = align_loss(q, k) + uniform_loss_with_queue(q, queue, 3)
        else:
            value = contrastive_loss(q, k, queue, 0.2)
            contrastive_rank(q, k, queue)
        backward(value)

    def theirs() -> None:
        q = F.normalize(x, dim=1)
        if loss == "align+uniform":
            value = baseline.align_uniform(q, k, upstream_queue, 3)
        else:
            value, _ = baseline.info_nce(q, k, upstream_queue, 0.2)
        backward(value)

    def backward(value: torch.Tensor) -> None:
        x.grad = None
        value.backward()

    pairs = [(seconds(theirs, device), seconds(ours, device)) for _ in range(args.repeats + 2)][2:]
    ratios = sorted(base / own for base, own in pairs)
    base, own = (statistics.median(times) for times in zip(*pairs, strict=True))
    quarter = len(ratios) // 4
    return {
        "loss": loss,
        "N": n,
        "baseline_ms": 1e3 * base,
        "ours_ms": 1e3 * own,
        "ratio": statistics.median(ratios),
        "spread": [ratios[quarter], ratios[-1 - quarter]],
        "limit": base / (4 * n * args.queue * args.dim / rate),
    }


def seconds(function: Callable[[], None], device: str) -> float:
    start = time.perf_counter()
    function()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def product_rate(device: str) -> float:
    """Flops per second of a 2048 x 2048 x 2048 float32 product; median of 9."""
    a = torch.randn(2048, 2048, device=device)
    times = [seconds(lambda: a @ a, device) for _ in range(9)]
    return 2 * 2048**3 / statistics.median(times)


if __name__ == "__main__":
    main()
