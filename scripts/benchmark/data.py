#!/usr/bin/env python
"""Pairs of MoCo v2 views per second and core, from JPEG files, against the ancestors' pipeline.

    python scripts/benchmark/data.py [DIR] [--images 50] [--batch 256] [--out FILE.json]

DIR is a folder with JPEGs of the size they are trained on; without one, smooth random pictures of
ImageNet's mean size are written and read. One core and one thread, file to uint8 or float tensor,
variants in turn. `cpu` makes the whole view by Pillow (`--views cpu`), `device` only decodes and
crops (`--views device`); what is then left to the device is timed apart, per batch, and beside
kornia where that is installed. The limit is to decode each image once and do nothing else.
"""

import argparse
import copy
import itertools
import os
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import baseline
import numpy as np
import torch

from moco import timing
from moco.data import device_views, loader, views
from moco.data.images import FolderImages, Subset
from moco.errors import DataError


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="pairs of views per second and core")
    parser.add_argument("data", nargs="?", metavar="DIR", help="folder with JPEGs")
    parser.add_argument("--images", type=int, default=50, help="%(default)s, spread over DIR")
    parser.add_argument("--image-size", type=int, default=224, help="of a view (%(default)s)")
    parser.add_argument("--batch", type=int, help="of the device (256 on a GPU, 32 on a CPU)")
    timing.add_arguments(parser, repeats=7)
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        if args.data is None:
            timing.write_photographs(Path(folder), args.images)
        try:
            images = FolderImages(args.data or folder)
        except DataError as error:
            parser.error(str(error))
        step = max(1, len(images) // args.images)
        measure(args, device, Subset(images, range(0, len(images), step)[: args.images]))


def measure(args: argparse.Namespace, device: torch.device, images: Subset) -> None:
    sizes = np.array([images.load(i).size for i in range(len(images))])
    table = timing.Table(
        f"pairs of {args.image_size}-px MoCo v2 views per second and core; {len(images)} "
        f"{'files of DIR' if args.data else 'synthetic JPEGs'}, {sizes[:, 0].mean():.0f} x "
        f"{sizes[:, 1].mean():.0f} pixels on average"
    )
    recipe = views.pretrain_recipe(args.image_size, aug_plus=True)
    by_pillow, by_device = (
        loader.AugmentedViews(images, recipe, seed=0, num_views=2, augment_on_device=on_device)
        for on_device in (False, True)
    )
    by_device_pillow = copy.copy(by_device)
    by_device_pillow.decode_fast = False
    ancestors = baseline.v2_transform(args.image_size)
    epochs, count = itertools.count(), len(images)

    def ours(data: loader.AugmentedViews) -> list:
        epoch = next(epochs)
        return data.__getitems__([(epoch, index) for index in range(count)])

    def decode() -> list:
        return [images.load(i) for i in range(count)]

    times = timing.interleaved(
        {
            "baseline": lambda: [(ancestors(image), ancestors(image)) for image in decode()],
            "cpu": lambda: ours(by_pillow),
            "device": lambda: ours(by_device),
            "device, Pillow": lambda: ours(by_device_pillow),
            "decode": decode,
        },
        repeats=args.repeats,
        warmup=1,
    )
    pairs = {"items": count, "unit": "pairs/s", "floor": statistics.median(times["decode"])}
    for what, theirs, own, limited_by in (
        ("--views cpu", "baseline", "cpu", "decoding"),
        ("--views device, the CPU's part", "baseline", "device", "decoding"),
        ("device, decoded by torchvision", "device, Pillow", "device", "decoding by Pillow"),
    ):
        table.add(what, times[theirs], times[own], limited_by=limited_by, **pairs)
    batch = args.batch or (256 if device.type == "cuda" else 32)
    ms = device_ms(table, by_device, batch, device, args.repeats)
    rate = 1e3 * batch / ms
    print(f"the device's part on {device}: {ms:.1f} ms for {batch} pairs ({rate:.0f} pairs/s)")
    table.write(args.out, batch=batch, finish_ms=ms, decode_images_per_s=count / pairs["floor"])


def device_ms(
    table: timing.Table,
    data: loader.AugmentedViews,
    batch: int,
    device: torch.device,
    repeats: int,
) -> float:
    """Milliseconds in which the device finishes both views of a batch."""
    samples = data.__getitems__([(0, i % len(data)) for i in range(batch)])
    crops = [torch.stack([sample[view] for sample in samples]).to(device) for view in (0, 1)]
    tables = torch.stack([sample[-1] for sample in samples]).to(device).unbind(1)

    def both() -> None:
        for crop, params in zip(crops, tables, strict=True):
            device_views.augment_on_device(crop, params, data.recipe)

    variants: dict[str, Callable[[], object]] = {"ours": both}
    augment = kornia_augmentation()
    if augment:
        variants["kornia"] = lambda: [augment(crop.float() / 255) for crop in crops]
    times = timing.interleaved(variants, repeats=repeats, warmup=1, device=device)
    if augment:
        what = f"the device's part, {batch} pairs; kornia"
        table.add(what, times["kornia"], times["ours"], items=batch, unit="pairs/s")
    return 1e3 * statistics.median(times["ours"])


def kornia_augmentation() -> Callable[[torch.Tensor], torch.Tensor] | None:
    """The same colour jitter, greyscale, blur (as wide as ours) and flip by kornia's classes."""
    try:
        import kornia.augmentation as K
    except ImportError:
        print("kornia is not installed: its augmentation is left out")
        return None
    return K.AugmentationSequential(
        K.ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8),
        K.RandomGrayscale(p=0.2),
        K.RandomGaussianBlur((13, 13), (0.1, 2.0), p=0.5),
        K.RandomHorizontalFlip(p=0.5),
    )


if __name__ == "__main__":
    main()
