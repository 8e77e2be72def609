#!/usr/bin/env python
"""Which encoder transfers: logistic regression, k-NN and few shots on labelled data sets.

    python scripts/transfer.py ENCODER... --data DIR cifar10 flowers=FOLDER [--out FILE.json]

ENCODER is whatever `load_encoder` reads (files of MoCo v2, moco_align_uniform, torchvision, timm's
ResNets, ...), or timm:NAME=FILE. A data set is a folder with train/CLASS/IMAGE and val/CLASS/IMAGE,
or one of torchvision's by name, which is on disk already (in --root, or in the folder behind "=").
Features are those of the backbone, of centre crops, computed once. The penalty of the logistic
regression is chosen by folds of the training set; test images are seen once. n-shot learns from n
images of each class: mean and standard deviation over draws, the same images for all encoders. p is
McNemar's exact test of logistic regression against the first encoder.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from moco import cli
from moco.cli.flags import add_loading, check_least, loading_of
from moco.data.labelled import NAMES
from moco.errors import report_user_errors
from moco.evaluate.transfer import SHOTS, Protocol, table, transfer
from moco.run_files import write_json


def build_parser() -> argparse.ArgumentParser:
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("encoders", nargs="+", type=cli.non_empty, metavar="ENCODER")
    add("--data", nargs="+", required=True, type=cli.non_empty, metavar="NAME",
        help=f"folders, or {', '.join(NAMES)}")  # fmt: skip
    add("--root", default="data", metavar="DIR", help="torchvision's data sets (%(default)s)")
    add("--shots", type=cli.numbers, default=SHOTS, metavar="N,N", help="1,2,4,8,16")
    add("--draws", type=int, default=5, metavar="N", help="of the shots (%(default)s)")
    add("--folds", type=int, default=3, metavar="N", help="to choose the penalty (%(default)s)")
    add("--knn-k", type=int, default=20, metavar="K", help="%(default)s")
    add("--seed", type=int, default=0, help="of folds and draws (%(default)s)")
    add("--image-size", type=int, metavar="PX", help="for all encoders (default: each one's own)")
    add_loading(parser)
    add("--out", type=Path, metavar="FILE.json", help="also write the result as JSON")
    add("--figure", type=Path, metavar="FILE", help="accuracy over shots, as .png or .svg")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    parser = build_parser()
    args = parser.parse_args(argv)
    check(parser, args)
    loading = loading_of(parser, args)
    protocol = Protocol(args.shots, args.draws, args.folds, args.knn_k, seed=args.seed)
    with report_user_errors():
        found = transfer(
            args.encoders, args.data, args.root, loading, protocol, image_size=args.image_size
        )
        print(table(found))
        if args.out:
            write_json(args.out, found)
        if args.figure:
            from align_uniform import figures
            from moco.evaluate.transfer_figure import transfer_figure

            figures.save(transfer_figure(found), args.figure)


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    ones = dict.fromkeys(("draws", "knn_k", "image_size"), 1)
    check_least(parser, args, **ones, folds=2, seed=0)
    if not args.shots or min(args.shots) < 1:
        parser.error(f"--shots must be numbers of at least 1, got {list(args.shots)}")
    for name in ("encoders", "data"):
        twice = [each for each in getattr(args, name) if getattr(args, name).count(each) > 1]
        if twice:
            parser.error(f"{twice[0]} is there twice")
    if args.figure and args.figure.suffix.lower() not in (".png", ".svg"):
        parser.error(f"--figure must end in .png or .svg, got {args.figure}")
    for path in filter(None, (args.out, args.figure)):
        if not path.parent.is_dir():
            parser.error(f"no such folder: {path.parent}")


if __name__ == "__main__":
    main()
