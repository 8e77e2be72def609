#!/usr/bin/env python
"""Time to list as many image files as ImageNet has, and memory that loader processes take for it.

    python scripts/benchmark/file_list.py [--images 1281167] [--classes 1000] [--out FILE.json]

Empty files with ImageNet's names are made in a temporary folder. CPU seconds: of walking them
(scandir and sort, nothing else), and of listing them with the digest that resume compares, beyond
that. Memory: what a forked and a spawned loader process comes to own when it has asked for the
path and the target of every image, in random order.
"""

import argparse
import multiprocessing
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from torch.utils.data import DataLoader, Dataset

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from moco import timing
from moco.data.images import FolderImages, names_digest
from moco.run_files import write_json


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="list a folder as large as ImageNet")
    parser.add_argument("--images", type=int, default=1281167, metavar="N", help="%(default)s")
    parser.add_argument("--classes", type=int, default=1000, metavar="N", help="%(default)s")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="made by an earlier call, kept")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write JSON")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        root = args.folder or Path(temporary)
        if not any(root.glob("*")):
            write_names(root, args.images, args.classes)
        walk(root)  # the kernel's caches are warm from here on
        walking, _ = cpu_seconds(lambda: walk(root))
        listing, images = cpu_seconds(lambda: FolderImages(root))
        hashing, digest = cpu_seconds(lambda: names_digest(images))
        found = {"images": len(images), "digest": digest, "walk_s": walking, "listing_s": listing,
                 "digest_s": hashing, "beyond_walk_s": listing + hashing - walking}  # fmt: skip
        for method in ("fork", "spawn"):
            found[f"{method}_MiB"] = growth(images, method) / 2**20
    print(timing.machine_line(timing.machine()))
    for name, value in found.items():
        print(f"{name:>15} {value:.3g}" if isinstance(value, float) else f"{name:>15} {value}")
    if args.out:
        write_json(args.out, {"machine": timing.machine(), **found})


def write_names(root: Path, images: int, classes: int) -> None:
    """root/n00000000/n00000000_0.JPEG, ...: empty files, as long names as ImageNet's."""
    for label in range(classes):
        name = f"n{label * 9_999:08d}"
        (root / name).mkdir(parents=True)
        for i in range(label, images, classes):
            os.close(os.open(root / name / f"{name}_{i // classes * 13}.JPEG", os.O_CREAT))


def walk(root: Path) -> None:
    """Names of all files, sorted within their folders."""
    with os.scandir(root) as entries:
        folders = sorted(entry.path for entry in entries)
    for folder in folders:
        with os.scandir(folder) as entries:
            sorted(entry.name for entry in entries)


def cpu_seconds(function: Callable) -> tuple[float, object]:
    before = time.process_time()
    result = function()
    return time.process_time() - before, result


def growth(images: FolderImages, method: str) -> int:
    """Bytes that a loader process owns for having asked for every path and target."""
    context = multiprocessing.get_context(method)
    options = {"batch_size": None, "num_workers": 1, "multiprocessing_context": context}
    loaders = (DataLoader(Touched(each), **options) for each in (images, None))
    (with_them,), (without,) = map(list, loaders)
    return with_them - without


class Touched(Dataset):
    """One item: the bytes that its process alone owns once it has touched all images."""

    def __init__(self, images: FolderImages | None) -> None:
        self.images = images

    def __len__(self) -> int:
        return 1

    def __getitem__(self, item: int) -> int:
        count = len(self.images) if self.images else 0
        for i in range(count):
            index = i * 7919 % count
            assert self.images.paths[index] and self.images.targets[index] >= 0
        text = Path("/proc/self/smaps_rollup").read_text(encoding="ascii")
        return sum(1024 * int(kb) for kb in re.findall(r"Private_\w+:\s+(\d+) kB", text))


if __name__ == "__main__":
    main()
