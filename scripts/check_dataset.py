#!/usr/bin/env python
"""Check every image of a data set before a long run: decode it as training would, and tell.

    python scripts/check_dataset.py DIR                        DIR/train and DIR/val, or any folder
    python scripts/check_dataset.py DIR -j 16 --out report.json
    python scripts/check_dataset.py DIR --dataset tar          images in archives; or: parquet

Lists files that training refuses (unreadable, truncated, empty, too large, ...), files that it
reads with a decision that one should know of (CMYK, greyscale, transparency, animation, EXIF
rotation, exact copies, ...), and class folders that do not fit. Exit status: 1 when something would
be refused, 0 otherwise. `--out` writes all paths of each kind as JSON.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from moco.config.parts import NAMED  # noqa: E402
from moco.data.audit import audit  # noqa: E402
from moco.errors import DataError  # noqa: E402
from moco.launch import usable_cores  # noqa: E402
from moco.run_files import write_json  # noqa: E402


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="check all images of a data set")
    # fmt: off
    parser.add_argument("root", metavar="DIR", type=Path,
                        help="with train/ and val/, or any folder")
    parser.add_argument("--dataset", choices=NAMED, default="folder",
                        help="as for main_moco.py (%(default)s)")
    parser.add_argument("-j", "--workers", type=int, default=usable_cores(), metavar="N",
                        help="processes (default: the cores, %(default)s)")
    parser.add_argument("--out", type=Path, metavar="FILE",
                        help="write all paths of each kind as JSON")
    parser.add_argument("--show", type=int, default=3, metavar="N",
                        help="paths to print of each kind (%(default)s)")
    # fmt: on
    args = parser.parse_args(argv)
    if not args.root.is_dir():
        parser.error(f"no such folder: {args.root}")
    if args.workers < 1:
        parser.error(f"-j must be at least 1, got {args.workers}")
    try:
        found = audit(args.root, args.workers, args.dataset)
    except DataError as error:
        parser.error(str(error))
    print(found.report(args.show))
    if args.out:
        write_json(args.out, found.to_dict())
    return int(found.refused > 0)


if __name__ == "__main__":
    sys.exit(main())
