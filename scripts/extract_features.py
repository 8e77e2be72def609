#!/usr/bin/env python
"""Features, labels and names of images, for use elsewhere.

    python scripts/extract_features.py RUN/checkpoint_0199.pth.tar DIR features.npz
    python scripts/extract_features.py CHECKPOINT DIR features.safetensors --split train --normalize
    python scripts/extract_features.py CHECKPOINT DIR pairs.npz --views 2

DIR has val/ (taken when --split is not given) or train/, or is any folder of images; CHECKPOINT is
whatever `load_encoder` reads, a URL too. The images come in sorted order, seen as in linear
evaluation: centre crop, the checkpoint's size, mean and standard deviation; or, with --views 2, as
two random views by the augmentation that the checkpoint was trained with (MoCo v2's where the file
does not say), the same for the same --seed. moco/evaluate/feature_files.py says what OUT holds;
measure_align_uniform.py --features and plot_features.py read it.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from moco import cli
from moco.cli.flags import (
    add_loading,
    add_presentation,
    check_least,
    check_presentation,
    loading_of,
)
from moco.data.images import DATASETS
from moco.errors import report_user_errors
from moco.evaluate.extraction import LAYERS, folder_features, load_image_encoder
from moco.evaluate.feature_files import SUFFIXES, write_features
from moco.packages import import_optional


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="features of images", allow_abbrev=False)
    # fmt: off
    add = parser.add_argument
    add("checkpoint", type=cli.non_empty, metavar="CHECKPOINT")
    add("data", type=cli.non_empty, metavar="DIR")
    add("out", type=Path, metavar="OUT", help=".npz or .safetensors")
    add("--dataset", choices=DATASETS, default="folder",
        help="folder of images, or one that torchvision has put into DIR")
    add("--split", choices=("train", "val"),
        help="default: val where there is one, else all of DIR")
    add("--images-per-class", type=int, metavar="N", help="the first N of each")
    add("--layer", choices=LAYERS, default="backbone", help="%(default)s")
    add("--normalize", action="store_true", help="features of unit length")
    add("--views", type=int, choices=(1, 2), default=1,
        help="1: centre crops (default); 2: two random views of each image")
    add("--seed", type=cli.seed, default=0, help="of --views 2 (%(default)s)")
    add_presentation(parser)
    add_loading(parser)
    add("--overwrite", action="store_true", help="replace the file OUT")
    # fmt: on
    return parser


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if args.out.suffix not in SUFFIXES:
        parser.error(f"OUT must end in {' or '.join(SUFFIXES)}, got {args.out}")
    if not args.out.parent.is_dir():
        parser.error(f"no such folder: {args.out.parent}")
    if args.out.is_dir() or (args.out.exists() and not args.overwrite):
        parser.error(f"{args.out} exists; --overwrite replaces a file, or choose another OUT")
    if not Path(args.data).is_dir():
        parser.error(f"no such data folder: {args.data}")
    check_least(parser, args, images_per_class=1)
    check_presentation(parser, args)


def main(argv: Sequence[str] | None = None) -> None:
    parser = build_parser()
    args = parser.parse_args(argv)
    check(parser, args)
    loading = loading_of(parser, args)
    with report_user_errors():
        if args.out.suffix == ".safetensors":
            import_optional("safetensors.torch", f"to write {args.out}")
        encoder = load_image_encoder(
            args.checkpoint, layer=args.layer,
            image_size=args.image_size, mean=args.mean, std=args.std,
        )  # fmt: skip
        found = folder_features(
            encoder, args.data, loading,
            layer=args.layer, dataset=args.dataset, split=args.split,
            per_class=args.images_per_class, views=args.views, seed=args.seed, unit=args.normalize,
        )  # fmt: skip
        found.about = {"checkpoint": os.path.basename(args.checkpoint), **found.about}
        write_features(args.out, found)
    count, width = found.features.shape
    print(
        f"wrote {args.out}: {count} x {width} features of {args.layer}, "
        f"{'two random views, ' if args.views == 2 else ''}"
        f"{'unit length' if args.normalize else 'as they are'}; "
        f"{f'{len(found.classes)} classes' if found.classes else 'no labels'}; "
        f"{args.data} ({found.about['split']})"
    )


if __name__ == "__main__":
    main()
