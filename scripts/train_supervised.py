#!/usr/bin/env python
"""Train a small supervised encoder whose features lie on the sphere, for the paper's Figure 3.

    python scripts/train_supervised.py DIR OUT.pth.tar -a resnet8x2s2 --dim 2 --image-size 32

An encoder and a linear classifier on its unit features are trained together from scratch, with the
views of pretraining. OUT is a checkpoint as main_moco.py writes it, without the classifier: for
extract_features.py --layer projection and measure_align_uniform.py.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from moco import checkpoint, cli
from moco.config import IMAGENET_MEAN, IMAGENET_STD, check_image_statistics
from moco.data.images import DATASETS, open_images
from moco.data.views import pretrain_recipe
from moco.errors import report_user_errors
from moco.evaluate.extraction import Loading
from moco.evaluate.supervised import train_supervised
from moco.launch import visible_devices


def build_parser() -> argparse.ArgumentParser:
    parser = cli.Parser(description="supervised encoder with features on the sphere")
    add = parser.add_argument
    add("data", type=cli.non_empty, metavar="DIR", help="train/CLASS/IMAGE")
    add("out", type=Path, metavar="OUT")
    add("-a", "--arch", default="resnet8x2s2")
    add("--dim", type=int, default=2, help="of the features (%(default)s)")
    add("--dataset", choices=DATASETS, default="folder")
    add("--images-per-class", type=int, metavar="N", help="the first N of each class")
    add("--epochs", type=int, default=20)
    add("-b", "--batch-size", type=int, default=128)
    add("--lr", type=float, default=0.06)
    add("--wd", type=float, default=5e-4)
    add("--image-size", type=int, default=32, metavar="PX")
    add("--aug-plus", action="store_true", help="augmentation of MoCo v2")
    add("--no-blur", action="store_true")
    add("--crop-scale", type=float, nargs=2, default=[0.2, 1.0], metavar=("MIN", "MAX"))
    add("--mean", type=float, nargs=3, default=list(IMAGENET_MEAN), metavar=("R", "G", "B"))
    add("--std", type=float, nargs=3, default=list(IMAGENET_STD), metavar=("R", "G", "B"))
    add("--seed", type=cli.seed, default=0)
    add("-j", "--workers", type=int, default=0)
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    parser = build_parser()
    args = parser.parse_args(argv)
    for name in ("dim", "epochs", "batch_size", "image_size", "images_per_class"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    if not args.out.parent.is_dir() or args.out.exists():
        parser.error(f"{args.out} must be a new file in a folder that is there")
    try:
        check_image_statistics(args.mean, args.std)
        device = visible_devices(args.device, None)[0]
    except ValueError as error:
        parser.error(str(error))
    views = {"aug_plus": args.aug_plus, "crop_scale": args.crop_scale, "blur": not args.no_blur}
    with report_user_errors():
        images = open_images(args.dataset, args.data, "train", per_class=args.images_per_class)
        encoder = train_supervised(
            args.arch, args.dim, images, pretrain_recipe(args.image_size, **views),
            Loading(device, args.batch_size, args.workers), mean=args.mean, std=args.std,
            epochs=args.epochs, lr=args.lr, weight_decay=args.wd, seed=args.seed, say=print,
        )  # fmt: skip
        about = {"image_size": args.image_size, "mean": args.mean, "std": args.std, **views}
        about["objective"] = "supervised cross-entropy"
        state = {f"module.encoder_q.{k}": v.cpu() for k, v in encoder.state_dict().items()}
        content = {"version": checkpoint.FORMAT_VERSION, "arch": args.arch, "epoch": args.epochs}
        checkpoint.write_checkpoint(args.out, content | {"state_dict": state, "args": about})
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
