#!/usr/bin/env python
"""Sentiment of movie (MR) and customer (CR) reviews from the features of sentence encoders.

    python scripts/evaluate_sentences.py RUN --mr DIR --cr DIR [--out FILE.json]

RUN is a checkpoint of train_sentences.py, or its run folder. DIR holds rt-polarity.pos and .neg
(MR), custrev.pos and .neg (CR), a sentence a line. Features of both encoders, each of unit length,
are classified by logistic regression with an l2 penalty (scikit-learn): C among 2^0 .. 2^8 by ten
folds, then the validation split of the paper's Tables 4 and 11, 1067 and 378 sentences. A constant
answer and a bag of words stand beside.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from moco import cli
from moco.cli.flags import check_least, chosen_device
from moco.errors import report_user_errors
from moco.evaluate.sentiment import evaluate_checkpoint, report
from moco.run_files import write_json


def build_parser() -> argparse.ArgumentParser:
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("checkpoint", metavar="RUN", type=cli.non_empty)
    add("--mr", metavar="DIR", type=cli.non_empty, help="movie reviews, rt-polarity.{pos,neg}")
    add("--cr", metavar="DIR", type=cli.non_empty, help="customer reviews, custrev.{pos,neg}")
    folds = "K folds of the other sentences too, Table 11's with 5; takes K times as long"
    add("--folds", type=int, metavar="K", help=folds)
    add("--nested", action="store_true", help="ten folds of all sentences too; ten times as long")
    at_a_time = "sentences at a time (%(default)s)"
    add("--batch-size", type=int, default=400, metavar="N", help=at_a_time)
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--out", type=cli.new_file, metavar="FILE", help="write the result as JSON")
    add("--json", action="store_true", help="print JSON instead of the line")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    parser = build_parser()
    args = parser.parse_args(argv)
    folders = {name: path for name, path in (("MR", args.mr), ("CR", args.cr)) if path}
    if not folders:
        parser.error("give --mr DIR, --cr DIR, or both")
    for path in folders.values():
        if not Path(path).is_dir():
            parser.error(f"no such folder: {path}")
    if not Path(args.checkpoint).exists():
        parser.error(f"no such checkpoint: {args.checkpoint}")
    check_least(parser, args, batch_size=1, folds=2)
    device = chosen_device(parser, args)
    with report_user_errors():
        result = evaluate_checkpoint(
            args.checkpoint, folders, device,
            batch=args.batch_size, folds=args.folds, nested=args.nested,
        )  # fmt: skip
        if args.out:
            write_json(args.out, result)
    print(json.dumps(result) if args.json else report(result))


if __name__ == "__main__":
    main()
