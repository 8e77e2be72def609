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
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from moco import checkpoint, encoders, timing
from moco.builder import MoCo
from moco.log import Means
from moco.train.state import BackgroundWriter, Run

STEPS, BATCH = 5004, 256  # one epoch of ImageNet


def main() -> None:
    parser = argparse.ArgumentParser(description="what saving takes away from training")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--images-per-s", type=float, default=1000, help="of the training")
    parser.add_argument("--saves", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="to save in (default: a temporary one)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="saving-") as folder:
        measure(torch.device(args.device), Path(folder), args.saves, args.images_per_s)


def measure(device: torch.device, folder: Path, saves: int, images_per_s: float) -> None:
    run, work = imagenet_run(device), small_work(device)
    alone = statistics.median(
        timing.interleaved({"": work}, repeats=20, warmup=5, device=device)[""]
    )
    writer = BackgroundWriter(folder, keep_last=2, keep_every=0)
    waits, slowdowns = [], []
    for step in range(1, saves + 1):
        path = checkpoint.step_path(folder, step)
        began = time.perf_counter()
        writer.write(path, run.state({"arch": "resnet50"}))
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
    cost, epoch = wait + slowdown, STEPS * BATCH / images_per_s
    print(
        f"\n{path.stat().st_size / 2**20:.0f} MiB on {device}, {torch.get_num_threads()} threads: "
        f"{wait:.3f} s waited + {slowdown:.3f} s slowed "
        f"down = {cost:.3f} s per save (medians of {saves})\n"
        f"at {images_per_s:g} images/s an epoch takes {epoch:.0f} s: a save per epoch takes "
        f"{100 * cost / epoch:.3f} %, one per 30 minutes {100 * cost / 1800:.3f} %"
    )


def imagenet_run(device: torch.device) -> Run:
    """The run whose state is saved, with the optimizer's momentum filled in."""
    moco = MoCo(
        lambda num_classes: encoders.build_encoder("resnet50", num_classes, bn_splits=1),
        K=65536, align_alpha=2, unif_t=3, mlp=True,
    ).to(device)  # fmt: skip
    optimizer = torch.optim.SGD(moco.parameters(), 0.03, momentum=0.9)
    for parameter in moco.encoder_q.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return Run(moco, optimizer, torch.amp.GradScaler(device.type, enabled=False), Means())


def small_work(device: torch.device) -> Callable[[], None]:
    """A small piece of training: milliseconds, mostly of arithmetic, as a step is."""
    net = encoders.build_encoder("resnet18", 128, image_size=64).to(device)
    images = torch.randn(16, 3, 64, 64, device=device)
    return lambda: net(images).square().sum().backward()


if __name__ == "__main__":
    main()
