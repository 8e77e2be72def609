#!/usr/bin/env python
"""What saving takes away from training: ResNet-50, K=65536, the checkpoint of an ImageNet run.

    python scripts/benchmark/saving.py [--device cuda] [--images-per-s 1000] [--saves 5]

Two costs: the copy to host memory, for which training waits, and the slowdown of training while the
file is written in the background. The second is measured by repeating a small piece of work (a
forward and a backward pass) with and without a save going on. Shares are of one ImageNet epoch
(5004 steps of 256 images), with the default of one save per epoch and with one per 30 minutes.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import baseline
import torch

from moco import checkpoint, encoders, timing
from moco.run_files import write_json
from moco.train.saver import BackgroundWriter

STEPS, BATCH = 5004, 256  # one epoch of ImageNet


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="what saving takes away from training")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("-a", "--arch", default="resnet50", help="%(default)s")
    parser.add_argument("--queue", type=int, default=65536, help="%(default)s")
    parser.add_argument("--images-per-s", type=float, default=1000, help="of the training")
    parser.add_argument("--saves", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="to save in (default: a temporary one)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write JSON")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="saving-") as folder:
        measure(torch.device(args.device), Path(folder), args)


def measure(device: torch.device, folder: Path, args: argparse.Namespace) -> None:
    state = baseline.Case(args.arch, 224, BATCH, args.queue, device).state()
    net = encoders.build_encoder("resnet18", 128, image_size=64).to(device)
    images = torch.randn(16, 3, 64, 64, device=device)

    def work() -> None:  # milliseconds, mostly of arithmetic, as a step is
        net(images).square().sum().backward()

    found = timing.interleaved({"": work}, repeats=20, warmup=5, device=device)
    alone = statistics.median(found[""])
    writer = BackgroundWriter(folder, keep_last=2, keep_every=0)
    waits, slowdowns = [], []
    for step in range(1, args.saves + 1):
        path = checkpoint.step_path(folder, step)
        began = time.perf_counter()
        writer.write(path, state.content({"arch": args.arch}))
        timing.synchronize(device)
        waits.append(time.perf_counter() - began)
        began, pieces = time.perf_counter(), 0
        while writer.thread.is_alive():
            timing.seconds(work, device)
            pieces += 1
        writing = time.perf_counter() - began
        slowdowns.append(max(0.0, writing - pieces * alone))
        writer.finish()
        print(
            f"save {step}: training waited {waits[-1]:.3f} s, then was slowed down by "
            f"{slowdowns[-1]:.3f} s in the {writing:.2f} s of writing",
            flush=True,
        )
    wait, slowdown = statistics.median(waits), statistics.median(slowdowns)
    cost, epoch = wait + slowdown, STEPS * BATCH / args.images_per_s
    print(
        f"\n{path.stat().st_size / 2**20:.0f} MiB on {device}, {torch.get_num_threads()} threads: "
        f"{wait:.3f} s waited + {slowdown:.3f} s slowed "
        f"down = {cost:.3f} s per save (medians of {args.saves})\n"
        f"at {args.images_per_s:g} images/s an epoch takes {epoch:.0f} s: a save per epoch takes "
        f"{100 * cost / epoch:.3f} %, one per 30 minutes {100 * cost / 1800:.3f} %"
    )
    if args.out:
        found = {"waited_s": waits, "slowed_s": slowdowns, "bytes": path.stat().st_size}
        write_json(args.out, {"machine": timing.machine(), **found})


if __name__ == "__main__":
    main()
