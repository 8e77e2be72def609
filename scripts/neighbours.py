#!/usr/bin/env python
"""Look at an encoder: images and their nearest neighbours, on a contact sheet and an HTML page.

    python scripts/neighbours.py ENCODER DIR [--out neighbours]

writes neighbours.png and neighbours.html, one page that loads nothing from elsewhere. ENCODER is
whatever `load_encoder` reads, or timm:NAME=FILE; DIR has val/ (taken when --split is not given) or
train/, or is any folder of images. Features are those of the backbone, of centre crops, of unit
length; distances are between 0 and 2. Where images have labels, neighbours of another label are
framed.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from moco import cli
from moco.cli.flags import add_loading, check_least, loading_of
from moco.data.images import DATASETS
from moco.errors import report_user_errors
from moco.evaluate.extraction import choose_images
from moco.evaluate.neighbours import contact_sheet, find_neighbours, page, share_of_same_label
from moco.evaluate.transfer import open_encoder
from moco.packages import import_optional
from moco.run_files import write_text


def build_parser() -> argparse.ArgumentParser:
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("encoder", type=cli.non_empty, metavar="ENCODER")
    add("data", type=cli.non_empty, metavar="DIR")
    add("--out", type=Path, default=Path("neighbours"), metavar="NAME",
        help="NAME.png and NAME.html (%(default)s)")  # fmt: skip
    add("--dataset", choices=DATASETS, default="folder")
    add("--split", choices=("train", "val"), help="default: val where there is one, else all")
    add("--images-per-class", type=int, metavar="N", help="the first N of each")
    add("--queries", type=int, default=12, metavar="N", help="rows (%(default)s)")
    add("-k", "--neighbours", type=int, default=8, metavar="K", help="of each (%(default)s)")
    add("--seed", type=int, default=0, help="which images are queries (%(default)s)")
    add("--image-size", type=int, metavar="PX", help="default: the checkpoint's")
    add_loading(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    parser = build_parser()
    args = parser.parse_args(argv)
    ones = ("queries", "neighbours", "images_per_class", "image_size")
    check_least(parser, args, **dict.fromkeys(ones, 1), seed=0)
    if not args.out.parent.is_dir():
        parser.error(f"no such folder: {args.out.parent}")
    if not Path(args.data).is_dir():
        parser.error(f"no such data folder: {args.data}")
    loading = loading_of(parser, args)
    with report_user_errors():
        import_optional("jinja2", "the page")
        encoder = open_encoder(args.encoder, args.image_size)
        images, _ = choose_images(args.dataset, Path(args.data), args.split, args.images_per_class)
        rows = find_neighbours(
            encoder, images, loading, layer="backbone",
            queries=args.queries, k=args.neighbours, seed=args.seed,
        )  # fmt: skip
        contact_sheet(rows, images).save(f"{args.out}.png")
        write_text(f"{args.out}.html", page(rows, images, f"{args.encoder}, {args.data}"))
        share = share_of_same_label(rows)
        same = "" if share is None else f", {share:.1f} % of the neighbours have the query's label"
        print(f"{len(rows)} queries among {len(images)} images{same}")
        print(f"wrote {args.out}.png and {args.out}.html")


if __name__ == "__main__":
    main()
