#!/usr/bin/env python
"""Alignment, uniformity and other numbers to choose an encoder by, on held-out images.

    python scripts/measure_align_uniform.py RUN/checkpoint_0199.pth.tar DIR [--out FILE.json]
    python scripts/measure_align_uniform.py --timm vit_base_patch16_224 mae_vit_base.pth DIR
    python scripts/measure_align_uniform.py --features VAL.npz [--bank TRAIN.npz]
    python scripts/measure_align_uniform.py RUN/checkpoint_0000.pth.tar TEXT.txt

Images are those of DIR/val, or of DIR itself where there is no val/. Positive pairs are two views
of each by the augmentation that the checkpoint was trained with (MoCo v2's where the file does not
say) under a fixed seed; uniformity, rank, deviation, alpha-ReQ and Wasserstein uniformity are over
the first views, each image once, but uniformity of encoders of train_in_batch.py is the mean over
both views, as in their training. LiDAR is over more views of fewer images. k-NN classifies centre
crops of DIR/val by those of DIR/train. Features are normalised, and come from the projection head
and from the backbone below it; files without a projection head, and timm's models, have a backbone
only. Lower is better for alignment and for both uniformities; rank and LiDAR count dimensions;
alpha-ReQ is best near 1. docs/evaluation.md says what they cannot see.

A features file has the arrays `features` (N, C) and perhaps `labels` (N,) and `positives` or
`features_2` (N, C): other views of the same images. It is .npz or .safetensors, as
extract_features.py writes it.

With a text in place of DIR the checkpoint is one of train_sentences.py: positive pairs are
neighbours among the first sentences of TEXT, as many as the run held out.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from moco import cli
from moco.cli.flags import (
    add_loading,
    add_presentation,
    check_presentation,
    loading_of,
)
from moco.data.images import DATASETS
from moco.errors import report_user_errors
from moco.evaluate.extraction import LAYERS, load_image_encoder
from moco.evaluate.measure import HeldOut, Quantities, measure_encoder, measure_features
from moco.evaluate.measure_table import table
from moco.evaluate.sentences import measure_sentences
from moco.run_files import write_json


def build_parser() -> argparse.ArgumentParser:
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", nargs="?", type=cli.non_empty)
    add("data", metavar="DIR", nargs="?", type=cli.non_empty)
    add("--timm", metavar="NAME", help="CHECKPOINT has weights of this timm model")
    add("--features", type=Path, metavar="FILE", help="measure these instead")
    add("--bank", type=Path, metavar="FILE", help="with --features: for k-NN")
    add("--dataset", choices=(*DATASETS, "nyu"), default="folder")
    add("--images-per-class", type=cli.count, metavar="N", help="the first N of each class")
    most_help = "of larger sets take N, evenly spread: bounds memory and time (%(default)s)"
    add("--most-images", type=cli.count, default=100_000, metavar="N", help=most_help)
    add("--layer", choices=LAYERS, help="only this one (both, where there are)")
    add("--alpha", type=cli.positives, default=[1.0, 2.0], metavar="A,B", help="of alignment (1,2)")
    ts = [float(t) for t in range(1, 9)]
    add("--t", type=cli.positives, default=ts, metavar="A,B", help="of uniformity (1,2,...,8)")
    add("--knn-k", type=cli.count, default=200, metavar="K")
    add("--knn-t", type=cli.positive, default=0.07, metavar="T", help="temperature")
    add("--lidar-views", type=int, default=10, metavar="N",
        help="of each image; published with 50; 0: leave LiDAR out (%(default)s)")  # fmt: skip
    add("--lidar-images", type=cli.count, default=1000, metavar="N", help="(%(default)s)")
    add("--intervals", action="store_true", help="95 %% confidence intervals over images")
    add_presentation(parser)
    add("--seed", type=cli.seed, default=0, help="of the views (%(default)s)")
    add_loading(parser)
    add("--out", type=cli.new_file, metavar="FILE", help="also write the result as JSON")
    add("--json", action="store_true", help="print JSON instead of the table")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    parser = build_parser()
    args = parser.parse_args(argv)
    check(parser, args)
    loading = loading_of(parser, args)
    device = loading.device
    quantities = Quantities(
        args.alpha, args.t, args.knn_k, args.knn_t,
        args.lidar_images, args.lidar_views, args.intervals,
    )  # fmt: skip
    with report_user_errors():
        if args.features:
            result = measure_features(args.features, args.bank, quantities, device, seed=args.seed)
        elif Path(args.data).is_file():
            result = measure_sentences(
                args.checkpoint, args.data, quantities, device,
                most=args.most_images, batch=args.batch_size,
            )  # fmt: skip
        else:
            encoder = load_image_encoder(
                args.checkpoint, layer=args.layer, timm=args.timm,
                image_size=args.image_size, mean=args.mean, std=args.std,
            )  # fmt: skip
            held_out = HeldOut(
                args.data, args.dataset, args.images_per_class, args.most_images, args.seed
            )
            result = measure_encoder(
                encoder, args.checkpoint, held_out, loading, quantities, layer=args.layer
            )
        print(json.dumps(result) if args.json else table(result))
        if args.out:
            write_json(args.out, result)


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if args.features:
        if args.checkpoint or args.timm or args.layer:
            parser.error("--features takes the place of CHECKPOINT and DIR; give one or the other")
    elif args.data is None and args.timm and args.checkpoint:
        parser.error(
            f"--timm {args.timm} needs a file with its weights before DIR, nothing is downloaded; "
            f"timm's own: python -c \"import timm, torch; torch.save(timm.create_model("
            f"'{args.timm}', pretrained=True).state_dict(), '{args.timm}.pth')\""
        )
    elif args.data is None:
        parser.error("CHECKPOINT and DIR are needed, or --features FILE")
    elif not Path(args.data).exists():
        parser.error(f"no such data folder: {args.data}")
    elif Path(args.data).is_file() and (args.timm or args.layer):
        parser.error("with a text there are the encoders f and g: leave --timm and --layer out")
    check_numbers(parser, args)


def check_numbers(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if args.bank and not args.features:
        parser.error("--bank is for --features; with a CHECKPOINT the bank is DIR/train")
    if args.timm and args.layer == "projection":
        parser.error("timm's models have no projection head; leave --layer projection out")
    if args.lidar_views < 0 or args.lidar_views == 1:
        parser.error(f"--lidar-views must be 0 or at least 2, got {args.lidar_views}")
    check_presentation(parser, args)


if __name__ == "__main__":
    main()
