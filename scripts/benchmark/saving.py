#!/usr/bin/env python
"""What saving takes away from training: ResNet-50, K=65536, the checkpoint of an ImageNet run.

    python scripts/benchmark/saving.py [--device cuda] [--images-per-s 1000] [--saves 5]

Two costs: the copy to host memory, for which training waits, and the slowdown of training while the
file is written in the background. The second is measured by repeating a small piece of work (a
forward and a backward pass) with and without a save going on. Shares are of one ImageNet epoch
(5004 steps of 256 images), with the default of one save per epoch and with one per 30 minutes.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from moco import checkpoint, encoders  # noqa: E402
from moco.builder import MoCo  # noqa: E402
from moco.log import Means  # noqa: E402
from moco.train.state import BackgroundWriter, Run  # noqa: E402

STEPS, BATCH = 5004, 256  # one epoch of ImageNet


def main() -> None:
    parser = argparse.ArgumentParser(description="what saving takes away from training")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--images-per-s", type=float, default=1000, help="of the training")
    parser.add_argument("--saves", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="to save in (default: a temporary one)")
    args = parser.parse_args()
    device = torch.device(args.device)
    folder = Path(tempfile.mkdtemp(dir=args.folder, prefix="saving-"))
    try:
        measure(device, folder, args.saves, args.images_per_s)
    finally:
        shutil.rmtree(folder)


def measure(device: torch.device, folder: Path, saves: int, images_per_s: float) -> None:
    run = imagenet_run(device)
    work = Work(device)
    alone = work.pace(20)
    writer = BackgroundWriter(folder, keep_last=2, keep_every=0)
    waits, writes, slowdowns = [], [], []
    for step in range(1, saves + 1):
        path = checkpoint.step_path(folder, step)
        began = time.perf_counter()
        writer.write(path, run.state({"arch": "resnet50"}))
        work.synchronize()
        waits.append(time.perf_counter() - began)
        began, pieces = time.perf_counter(), 0
        while writer.thread.is_alive():
            work()
            pieces += 1
        writes.append(time.perf_counter() - began)
        slowdowns.append(max(0.0, writes[-1] - pieces * alone))
        writer.finish()
        print(
            f"save {step}: training waited {waits[-1]:.3f} s, then was slowed down by "
            f"{slowdowns[-1]:.3f} s in the {writes[-1]:.2f} s of writing",
            flush=True,
        )
    size = path.stat().st_size
    cost = statistics.median(waits) + statistics.median(slowdowns)
    epoch = STEPS * BATCH / images_per_s
    print(
        f"\n{size / 2**20:.0f} MiB on {device}, {torch.get_num_threads()} threads: "
        f"{statistics.median(waits):.3f} s waited + {statistics.median(slowdowns):.3f} s slowed "
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


class Work:
    """A small piece of training: milliseconds, mostly of arithmetic, as a step is."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.net = encoders.build_encoder("resnet18", 128, image_size=64).to(device)
        self.images = torch.randn(16, 3, 64, 64, device=device)

    def __call__(self) -> None:
        self.net(self.images).square().sum().backward()
        self.synchronize()

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def pace(self, repeats: int) -> float:
        """Median seconds of one piece, with nothing else going on."""
        times = []
        for _ in range(repeats + 5):
            began = time.perf_counter()
            self()
            times.append(time.perf_counter() - began)
        return statistics.median(times[5:])


if __name__ == "__main__":
    main()
