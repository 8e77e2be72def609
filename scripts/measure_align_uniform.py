#!/usr/bin/env python
"""Alignment and uniformity of a pretrained encoder on held-out images.

    python scripts/measure_align_uniform.py RUN/checkpoint_0199.pth.tar DIR [--out FILE.json]

Positive pairs are two views of each image of DIR/val by the augmentation that the checkpoint was
trained with, under a fixed seed; uniformity is over the first views, each image once. Lower is
better for both. Features are the projection head's output, normalised, as in training.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from align_uniform.bounds import uniformity_infimum  # noqa: E402
from align_uniform.metrics import alignment, uniformity  # noqa: E402
from moco import checkpoint, distributed, evaluate, loader, options  # noqa: E402
from moco.images import DATASETS, open_images  # noqa: E402
from moco.log import progress, write_json  # noqa: E402
from moco.views import IMAGENET_MEAN, IMAGENET_STD, pretrain_recipe  # noqa: E402


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="alignment and uniformity on held-out images")
    parser.add_argument("checkpoint", metavar="CHECKPOINT")
    parser.add_argument("data", metavar="DIR", help="folder with val/")
    parser.add_argument("--dataset", choices=DATASETS, default="folder")
    parser.add_argument("--images-per-class", type=int, metavar="N", help="the first N of each")
    parser.add_argument("--layer", choices=("projection", "backbone"), default="projection")
    parser.add_argument("--alpha", type=float, default=2.0, help="of alignment (%(default)s)")
    parser.add_argument("--t", type=float, default=2.0, help="of uniformity (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the views (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("-j", "--workers", type=int, default=options.usable_cores())
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the result as JSON")
    return parser


def main() -> None:
    parser = build_parser()
    args = parser.parse_args()
    try:
        device = distributed.visible_devices(args.device, None)[0]
    except ValueError as error:
        parser.error(str(error))
    with options.one_line_errors():
        result = measure(args, device)
        print(json.dumps(result))
        if args.out:
            write_json(args.out, result)


def measure(args: argparse.Namespace, device: torch.device) -> dict:
    head = "projection" if args.layer == "projection" else "none"
    encoder, info = checkpoint.load_encoder(args.checkpoint, head=head)
    encoder.to(device)
    trained = info["args"]
    recipe = pretrain_recipe(
        trained.get("image_size", 224),
        aug_plus=trained.get("aug_plus", True),
        crop_scale=trained.get("crop_scale", (0.2, 1.0)),
        blur=trained.get("blur", True),
    )
    images = open_images(args.dataset, args.data, "val", per_class=args.images_per_class)
    views = loader.AugmentedViews(images, recipe, seed=args.seed, views=2)
    mean = trained.get("mean", IMAGENET_MEAN)
    std = trained.get("std", IMAGENET_STD)
    features = functools.partial(
        evaluate.extract_features, encoder, device=device, mean=mean, std=std
    )
    batches = torch.utils.data.DataLoader(
        views,
        batch_size=args.batch_size,
        sampler=[(0, index) for index in range(len(images))],
        num_workers=args.workers,
    )
    x, y = [], []
    for view_1, view_2, label, _ in progress(batches, "views"):
        x.append(features([(view_1, label)])[0])
        y.append(features([(view_2, label)])[0])
    x, y = torch.cat(x), torch.cat(y)
    return {
        "checkpoint": args.checkpoint,
        "layer": args.layer,
        "images": len(images),
        "alpha": args.alpha,
        "t": args.t,
        "alignment": alignment(x, y, args.alpha),
        "uniformity": uniformity(x, args.t),
        "uniformity_infimum": uniformity_infimum(x.shape[1], args.t),
        "seed": args.seed,
    }


if __name__ == "__main__":
    main()
