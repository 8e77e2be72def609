#!/usr/bin/env python
"""Predict depth from a layer of a frozen encoder, on NYU-Depth-V2 (arXiv:2005.10242, Table 2).

    python scripts/evaluate_depth.py --pretrained RUN/checkpoint_0399.pth.tar --layer conv5 DIR

DIR has images/, depths/, train.txt and val.txt, or nyu_depth_v2_labeled.mat and splits.mat. The
encoder is one of `train_in_batch.py --dataset nyu`: depth_cnn, which is this project's own, as the
paper's is published nowhere. Whole images and depth get the same geometry. The error is printed in
square metres and as a share of the training depth's variance (lower is better; the paper does not
say which), beside what a constant and a mean for each pixel reach. RUN/depth.json has it all.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from moco import cli
from moco.cli.flags import check_least, chosen_device
from moco.errors import report_user_errors
from moco.evaluate.depth import evaluate_depth
from moco.evaluate.depth_predictor import DepthSettings
from moco.evaluate.extraction import Loading


def build_parser() -> argparse.ArgumentParser:
    parser = cli.Parser(description="depth from a layer of a frozen encoder")
    default, add = DepthSettings, parser.add_argument
    add("data", type=cli.non_empty, metavar="DIR")
    add("--pretrained", type=cli.non_empty, required=True, metavar="CHECKPOINT",
        help="a file, or a run folder: its newest")  # fmt: skip
    add("--layer", required=True, metavar="NAME", help="conv5, conv4, ...")
    add("--depth-unit", metavar="UNIT",
        help="mm, cm, m, 8bit (25.5 steps a metre), or metres of one step (default: DIR/depth.json,"
        " else mm of 16-bit files)")  # fmt: skip
    add("--depth-size", type=int, metavar="PX", help="of the predicted map (default: the images')")
    add("--folds", type=int, metavar="K", help="also on K folds of the training images")
    add("--epochs", type=int, default=default.epochs, help="%(default)s")
    add("-b", "--batch-size", type=int, default=default.batch_size, help="%(default)s")
    add("--lr", type=float, default=default.lr, help="of Adam (%(default)s)")
    add("--schedule", type=cli.numbers, default=default.schedule, metavar="EPOCH ...",
        help="where the learning rate drops to a fifth")  # fmt: skip
    add("--seed", type=cli.seed, default=default.seed)
    add("--save-dir", type=cli.folder, metavar="RUN", help="results/depth-<time>")
    add("--resume", choices=("auto",), help="go on with what is in --save-dir")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    parser = build_parser()
    args = parser.parse_args(argv)
    check_least(parser, args, epochs=1, batch_size=2, folds=2, depth_size=1)
    if any(epoch < 0 for epoch in args.schedule):
        parser.error(f"--schedule must be epochs of at least 0, got {min(args.schedule)}")
    if not 0 < args.lr < float("inf"):
        parser.error(f"--lr must be positive, got {args.lr:g}")
    if not Path(args.data).is_dir():
        parser.error(f"no such data folder: {args.data}")
    if args.resume and args.save_dir is None:
        parser.error("--resume auto looks into the run folder: give --save-dir")
    cli.check_run_folder(parser, args.save_dir, args.resume, "depth")
    pretrained = cli.pretrained_file(parser, args.pretrained)
    device = chosen_device(parser, args)
    folder = args.save_dir or Path("results") / f"depth-{time.strftime('%Y%m%d-%H%M%S')}"
    settings = DepthSettings(
        args.data, pretrained, args.layer, folder, unit=args.depth_unit,
        depth_size=args.depth_size, folds=args.folds, epochs=args.epochs,
        batch_size=args.batch_size, lr=args.lr, schedule=args.schedule, seed=args.seed,
        resume=args.resume == "auto",
    )  # fmt: skip
    with report_user_errors():
        evaluate_depth(settings, Loading(device, args.batch_size))


if __name__ == "__main__":
    main()
