#!/usr/bin/env python
"""Make a subset of ImageNet by symbolic links, by default the paper's 100 classes.

    python scripts/create_imagenet_subset.py IMAGENET SUBSET [--subset CLASSES.txt]

IMAGENET has train/WNID and val/WNID; SUBSET gets a link for each class of the list, one WordNet id
per line. The default list is ImageNet-100 of Contrastive Multiview Coding (arXiv:1906.05849), which
the alignment + uniformity paper uses as well. Running it again completes a subset that was cut off.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from moco.data.class_links import link_classes

DEFAULT_CLASSES = Path(__file__).resolve().parent / "imagenet100_classes.txt"


def main() -> None:
    parser = argparse.ArgumentParser(description="make a subset of ImageNet by symbolic links")
    parser.add_argument("imagenet", type=Path, metavar="IMAGENET", help="has train/ and val/")
    parser.add_argument("out", type=Path, metavar="SUBSET", help="folder to make")
    parser.add_argument(
        "--subset", type=Path, default=DEFAULT_CLASSES, metavar="FILE", help="one class a line"
    )
    args = parser.parse_args()
    try:
        count = link_classes(args.imagenet, args.out, args.subset)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(f"{count} classes, train and val, linked in {args.out}")


if __name__ == "__main__":
    main()
