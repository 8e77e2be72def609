#!/usr/bin/env python
"""Time of the queue losses, forward and backward, against the full N x K matrix.

    python scripts/benchmark/loss.py [--out FILE.json]

The limit is arithmetic: two products of 2NKC flops at the rate of a large product here.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import baseline  # noqa: E402
import timing  # noqa: E402

from align_uniform import (  # noqa: E402
    align_loss,
    contrastive_loss,
    contrastive_rank,
    uniform_loss_with_queue,
)

LOSSES = ("align+uniform", "InfoNCE", "InfoNCE+top1,5")


def main() -> None:
    parser = argparse.ArgumentParser(description="time of the queue losses")
    parser.add_argument("--queue", type=int, default=65536)
    parser.add_argument("--batch", type=int, nargs="+", default=[32, 256])
    parser.add_argument("--dim", type=int, default=128)
    timing.add_arguments(parser, repeats=15)
    args = parser.parse_args()

    rate = timing.product_rate(args.device)
    table = timing.Table(
        f"queue losses, forward and backward, K={args.queue}, C={args.dim}, float32; "
        f"large product {rate / 1e9:.0f} Gflop/s"
    )
    for loss in LOSSES:
        for n in args.batch:
            table.add(compare(loss, n, args.queue, args, rate))
    table.write(args.out, product_rate=rate)


def compare(loss: str, n: int, size: int, args: argparse.Namespace, rate: float) -> timing.Row:
    """One loss at batch n against a queue of `size` keys."""
    torch.manual_seed(0)
    device = args.device
    x = torch.randn(n, args.dim, device=device, requires_grad=True)
    k = F.normalize(torch.randn(n, args.dim, device=device), dim=1)
    rows = F.normalize(torch.randn(size, args.dim, device=device), dim=1)
    queue, upstream_queue = rows.t(), rows.t().contiguous()

    def ours() -> None:
        q = F.normalize(x, dim=1)
        if loss == "align+uniform":
            value = align_loss(q, k) + uniform_loss_with_queue(q, queue, 3)
        else:
            value = contrastive_loss(q, k, queue, 0.2)
            if loss != "InfoNCE":
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

    times = timing.interleaved(
        {"baseline": theirs, "ours": ours}, repeats=args.repeats, device=device
    )
    return timing.row(
        f"{loss} N={n} K={size}",
        times["baseline"],
        times["ours"],
        floor=4 * n * size * args.dim / rate,
        limited_by="two products",
    )


if __name__ == "__main__":
    main()
