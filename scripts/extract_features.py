#!/usr/bin/env python
"""Features, labels and names of images, for use elsewhere.

    python scripts/extract_features.py RUN/checkpoint_0199.pth.tar DIR features.npz
    python scripts/extract_features.py CHECKPOINT DIR features.safetensors --split train --normalize
    python scripts/extract_features.py CHECKPOINT DIR pairs.npz --views 2

DIR has val/ (taken when --split is not given) or train/, or is any folder of images; CHECKPOINT is
whatever `load_encoder` reads, a URL too. The images come in sorted order, seen as in linear
evaluation: centre crop, the checkpoint's size, mean and standard deviation; or, with --views 2, as
two random views by the augmentation that the checkpoint was trained with (MoCo v2's where the file
does not say), the same for the same --seed. OUT holds

    features    (N, C) float32, with --views 2 of the first views
    features_2  (N, C) float32, of the second views; not there otherwise
    labels      (N,) int64, positions in `classes`; -1 where images lie in no class folder
    paths       N names relative to DIR; of torchvision's data sets the positions
    classes     names of the classes in the order of their labels
    about       JSON: what the features are of

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

from moco import checkpoint, cli, encoders  # noqa: E402
from moco.data import loader  # noqa: E402
from moco.data.images import DATASETS, FolderImages, Images, Subset, open_images, split_folder  # noqa: E402
from moco.data.views import eval_transform, normalize, pretrain_recipe  # noqa: E402
from moco.errors import CheckpointError  # noqa: E402
from moco.launch import usable_cores, visible_devices  # noqa: E402
from moco.progress import progress  # noqa: E402
from moco.publish import export  # noqa: E402


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="features of images", allow_abbrev=False)
    # fmt: off
    parser.add_argument("checkpoint", type=cli.non_empty, metavar="CHECKPOINT")
    parser.add_argument("data", type=cli.non_empty, metavar="DIR")
    parser.add_argument("out", type=cli.non_empty, metavar="OUT", help=".npz or .safetensors")
    parser.add_argument("--dataset", choices=DATASETS, default="folder",
                        help="folder of images, or one that torchvision has put into DIR")
    parser.add_argument("--split", choices=("train", "val"),
                        help="default: val where there is one, else all of DIR")
    parser.add_argument("--images-per-class", type=int, metavar="N", help="the first N of each")
    parser.add_argument("--layer", choices=("projection", "backbone"), default="backbone",
                        help="%(default)s")
    parser.add_argument("--normalize", action="store_true", help="features of unit length")
    parser.add_argument("--views", type=int, choices=(1, 2), default=1,
                        help="1: centre crops (default); 2: two random views of each image")
    parser.add_argument("--seed", type=int, default=0, help="of --views 2 (%(default)s)")
    parser.add_argument("--image-size", type=int, metavar="PX", help="default: the checkpoint's")
    parser.add_argument("--mean", type=float, nargs=3, metavar=("R", "G", "B"),
                        help="default: the checkpoint's, else ImageNet's")
    parser.add_argument("--std", type=float, nargs=3, metavar=("R", "G", "B"))
    parser.add_argument("--batch-size", type=int, default=256, metavar="N", help="%(default)s")
    parser.add_argument("-j", "--workers", type=int, default=usable_cores(), metavar="N")
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
                        ("workers", 0), ("seed", 0)):  # fmt: skip
        value = getattr(args, name)
        if value is not None and value < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}, got {value}")
    try:
        cli.check_image_statistics(args.mean or (), args.std or ())
        args.device = visible_devices(args.device, None)[0]
    except ValueError as error:
        parser.error(str(error))
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    with cli.report_user_errors():
        images, split = chosen_images(args)
        arrays, about = extract(args, images)
        about["split"] = split
        WRITERS[args.out.suffix](
            args.out, arrays, image_names(images, args.data), images.classes, about
        )
        count, width = arrays["features"].shape
        print(
            f"wrote {args.out}: {count} x {width} features of {args.layer}, "
            f"{'two random views, ' if args.views == 2 else ''}"
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
def extract(args: argparse.Namespace, images: Images) -> tuple[dict[str, Tensor], dict]:
    """Features (N, C) float32 and labels (N,) int64 in the order of the images, by their names in
    the file, and what they are.

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
    trained = {name: info["args"][name] for name in AUGMENTATION if name in info["args"]}
    augmentation = {**AUGMENTATION, **trained}
    if args.views == 1:
        dataset, keys = loader.PlainImages(images, eval_transform(size)), range(len(images))
    else:
        recipe = pretrain_recipe(size, **augmentation)
        dataset = loader.AugmentedViews(images, recipe, seed=args.seed, num_views=2)
        keys = [(0, index) for index in range(len(images))]
    batches = torch.utils.data.DataLoader(
        dataset, args.batch_size, sampler=keys, num_workers=args.workers,
        pin_memory=args.device.type == "cuda",
    )  # fmt: skip
    arrays = {"labels": torch.empty(len(images), dtype=torch.int64)}
    done = 0
    for batch in progress(batches, "features"):
        targets = batch[args.views]
        here = slice(done, done + len(targets))
        for name, pixels in zip(("features", "features_2")[: args.views], batch, strict=False):
            out = encoder(normalize(pixels.to(args.device, non_blocking=True), mean, std)).float()
            if args.normalize:
                out = F.normalize(out, dim=1)
            if not done:  # ImageNet's are 10 GB: not gathered in a list first
                arrays[name] = torch.empty(len(images), out.shape[1])
            arrays[name][here] = out
        arrays["labels"][here] = targets
        done += len(targets)
    about = {
        "checkpoint": os.path.basename(args.checkpoint), "arch": info["arch"],
        "epoch": info["epoch"], "objective": info["objective"], "layer": args.layer,
        "normalized": args.normalize, "dataset": args.dataset, "image_size": size,
        "mean": mean, "std": std,
    }  # fmt: skip
    if args.views == 2:
        about |= {"views": 2, "seed": args.seed, **augmentation}
    return arrays, about


# Arguments of the views, and what stands for those that a file does not have: MoCo v2's.
AUGMENTATION = {"aug_plus": True, "crop_scale": (0.2, 1.0), "blur": True}


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
    path: Path, arrays: dict[str, Tensor], paths: list[str], classes: list[str], about: dict
) -> None:
    said = {
        "paths": np.array(paths, dtype=np.str_),
        "classes": np.array(classes, dtype=np.str_),
        "about": np.array(json.dumps(about)),
    }
    whole = {**{name: tensor.numpy() for name, tensor in arrays.items()}, **said}
    checkpoint.write_atomically(path, lambda file: np.savez(file, **whole))


def write_safetensors(
    path: Path, arrays: dict[str, Tensor], paths: list[str], classes: list[str], about: dict
) -> None:
    from safetensors.torch import save

    said = {"paths": paths, "classes": classes, "about": about}
    metadata = {name: json.dumps(value) for name, value in said.items()}
    data = save(arrays, metadata)
    checkpoint.write_atomically(path, lambda file: file.write(data))


WRITERS = {".npz": write_npz, ".safetensors": write_safetensors}


if __name__ == "__main__":
    main()
