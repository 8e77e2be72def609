#!/usr/bin/env python
"""Features, labels and names of images, for use elsewhere.

    python scripts/extract_features.py RUN/checkpoint_0199.pth.tar DIR features.npz
    python scripts/extract_features.py CHECKPOINT DIR features.safetensors --split train --normalize

DIR has val/ (taken when --split is not given) or train/, or is any folder of images; CHECKPOINT is
whatever `load_encoder` reads, a URL too. The images come in sorted order, seen as in linear
evaluation: centre crop, the checkpoint's size, mean and standard deviation. OUT holds

    features  (N, C) float32
    labels    (N,) int64, positions in `classes`; -1 where images lie in no class folder
    paths     N names relative to DIR; of torchvision's data sets the positions
    classes   names of the classes in the order of their labels
    about     JSON: what the features are of

as arrays in .npz (np.load reads it, nothing is pickled), or in .safetensors with `paths` and
`classes` as JSON in the metadata.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from moco import checkpoint, distributed, encoders, export, loader, options  # noqa: E402
from moco.checkpoint import CheckpointError  # noqa: E402
from moco.images import DATASETS, FolderImages, Images, Subset, open_images, split_folder  # noqa: E402
from moco.log import progress  # noqa: E402
from moco.views import eval_transform, normalize  # noqa: E402


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="features of images", allow_abbrev=False)
    # fmt: off
    parser.add_argument("checkpoint", type=options.non_empty, metavar="CHECKPOINT")
    parser.add_argument("data", type=options.non_empty, metavar="DIR")
    parser.add_argument("out", type=options.non_empty, metavar="OUT", help=".npz or .safetensors")
    parser.add_argument("--dataset", choices=DATASETS, default="folder",
                        help="folder of images, or one that torchvision has put into DIR")
    parser.add_argument("--split", choices=("train", "val"),
                        help="default: val where there is one, else all of DIR")
    parser.add_argument("--images-per-class", type=int, metavar="N", help="the first N of each")
    parser.add_argument("--layer", choices=("projection", "backbone"), default="backbone",
                        help="%(default)s")
    parser.add_argument("--normalize", action="store_true", help="features of unit length")
    parser.add_argument("--image-size", type=int, metavar="PX", help="default: the checkpoint's")
    parser.add_argument("--mean", type=float, nargs=3, metavar=("R", "G", "B"),
                        help="default: the checkpoint's, else ImageNet's")
    parser.add_argument("--std", type=float, nargs=3, metavar=("R", "G", "B"))
    parser.add_argument("--batch-size", type=int, default=256, metavar="N", help="%(default)s")
    parser.add_argument("-j", "--workers", type=int, default=options.usable_cores(), metavar="N")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--overwrite", action="store_true", help="replace the file OUT")
    # fmt: on
    return parser


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = build_parser()
    args = parser.parse_args(argv)
    args.out = Path(args.out)
    if args.out.suffix not in WRITERS:
        parser.error(f"OUT must end in {' or '.join(WRITERS)}, got {args.out}")
    if not args.out.parent.is_dir():
        parser.error(f"no such folder: {args.out.parent}")
    if args.out.is_dir() or (args.out.exists() and not args.overwrite):
        parser.error(f"{args.out} exists; --overwrite replaces a file, or choose another OUT")
    if not Path(args.data).is_dir():
        parser.error(f"no such data folder: {args.data}")
    for name, least in (("images_per_class", 1), ("image_size", 1), ("batch_size", 1),
                        ("workers", 0)):  # fmt: skip
        value = getattr(args, name)
        if value is not None and value < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}, got {value}")
    try:
        options.check_image_statistics(args.mean or (), args.std or ())
        args.device = distributed.visible_devices(args.device, None)[0]
    except ValueError as error:
        parser.error(str(error))
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    with options.one_line_errors():
        images, split = chosen_images(args)
        features, labels, about = extract(args, images)
        about["split"] = split
        WRITERS[args.out.suffix](
            args.out, features, labels, image_names(images, args.data), images.classes, about
        )
        print(
            f"wrote {args.out}: {len(features)} x {features.shape[1]} features of {args.layer}, "
            f"{'unit length' if args.normalize else 'as they are'}; "
            f"{f'{len(images.classes)} classes' if images.targets else 'no labels'}; "
            f"{args.data} ({split})"
        )


def chosen_images(args: argparse.Namespace) -> tuple[Images, str]:
    """The images of the split, and its name: "train", "val" or "all"."""
    root, per_class = Path(args.data), args.images_per_class
    if args.dataset != "folder":
        split = args.split or "val"
        return open_images(args.dataset, root, split, per_class=per_class), split
    split = args.split or next((s for s in ("val", "train") if (root / s).is_dir()), "all")
    folder = root if split == "all" else split_folder(root, split)
    # "pretrain": as a folder of images, whatever lies in it.
    open_folder = functools.partial(open_images, "folder", split="pretrain")
    images = open_folder(folder, per_class=per_class)
    if split == "val" and images.classes and (root / "train").is_dir():
        # Labels are those of training, also where val/ lacks a class.
        in_train = sorted(entry.name for entry in os.scandir(root / "train") if entry.is_dir())
        if in_train != images.classes:
            classes = open_folder(root / "train").classes
            images = open_folder(folder, per_class=per_class, classes=classes)
    return images, split


@torch.no_grad()
def extract(args: argparse.Namespace, images: Images) -> tuple[Tensor, Tensor, dict]:
    """Features (N, C) float32 and labels (N,) int64 in the order of the images, and what they are.

    Raises:
        CheckpointError, DataError: no such encoder or head, an image that cannot be read.
    """
    head = "projection" if args.layer == "projection" else "none"
    encoder, info = checkpoint.load_encoder(args.checkpoint, head=head)
    size, mean, std = export.image_settings(encoder, info)
    size, mean, std = args.image_size or size, args.mean or mean, args.std or std
    try:
        encoders.check_image_size(encoder, size)
    except ValueError as error:
        raise CheckpointError(f"{args.checkpoint}: {error}; give --image-size") from None
    encoder.to(args.device)
    batches = loader.eval_loader(
        loader.PlainImages(images, eval_transform(size)),
        batch_size=args.batch_size,
        workers=args.workers,
        pin_memory=args.device.type == "cuda",
    )
    features, labels, done = torch.zeros(0), [], 0
    for pixels, targets in progress(batches, "features"):
        batch = normalize(pixels.to(args.device, non_blocking=True), mean, std)
        out = encoder(batch).float()
        if args.normalize:
            out = F.normalize(out, dim=1)
        if not done:  # ImageNet's are 10 GB: not gathered in a list first
            features = torch.empty(len(images), out.shape[1])
        features[done : done + len(out)] = out
        labels.append(targets)
        done += len(out)
    about = {
        "checkpoint": os.path.basename(args.checkpoint), "arch": info["arch"],
        "epoch": info["epoch"], "objective": info["objective"], "layer": args.layer,
        "normalized": args.normalize, "dataset": args.dataset, "image_size": size,
        "mean": mean, "std": std,
    }  # fmt: skip
    return features, torch.cat(labels), about


def image_names(images: Images, data: str) -> list[str]:
    """Paths relative to the data folder; positions for images that are no files."""
    indices: Sequence[int] = range(len(images))
    while isinstance(images, Subset):
        indices = [images.indices[i] for i in indices]
        images = images.images
    if isinstance(images, FolderImages):
        return [os.path.relpath(images.paths[i], data) for i in indices]
    return [str(i) for i in indices]


# ------------------------------------------------------------------------------------------------
# Files
# ------------------------------------------------------------------------------------------------


def write_npz(
    path: Path, features: Tensor, labels: Tensor, paths: list[str], classes: list[str], about: dict
) -> None:
    arrays = {
        "features": features.numpy(),
        "labels": labels.numpy(),
        "paths": np.array(paths, dtype=np.str_),
        "classes": np.array(classes, dtype=np.str_),
        "about": np.array(json.dumps(about)),
    }
    checkpoint.write_atomically(path, lambda file: np.savez(file, **arrays))


def write_safetensors(
    path: Path, features: Tensor, labels: Tensor, paths: list[str], classes: list[str], about: dict
) -> None:
    from safetensors.torch import save

    said = {"paths": paths, "classes": classes, "about": about}
    metadata = {name: json.dumps(value) for name, value in said.items()}
    data = save({"features": features, "labels": labels}, metadata)
    checkpoint.write_atomically(path, lambda file: file.write(data))


WRITERS = {".npz": write_npz, ".safetensors": write_safetensors}


if __name__ == "__main__":
    main()
