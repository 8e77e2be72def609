"""Write the built-in toy dataset: small textured JPEG files in ImageFolder layout.

    python scripts/make_toy_dataset.py data/toy
    python scripts/make_toy_dataset.py data/toy --train-per-class 200 --size 96 --seed 1

Twelve classes told apart by structure alone (stripes, dots, bricks, ...), in OUT/train/CLASS/*.jpg
and OUT/val/CLASS/*.jpg: contrastive pretraining can be seen to work on them within minutes on a
CPU. The same arguments give the same bytes. A finished folder with the same settings is used
again, an unfinished one is started over, and any other non-empty folder is refused.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from moco.data.toy import TEXTURES, make_dataset  # noqa: E402


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Write the toy dataset (ImageFolder, JPEG).")
    parser.add_argument("out", type=Path, metavar="OUT", help="new, empty or reused folder")
    parser.add_argument("--train-per-class", type=int, default=150, metavar="N")
    parser.add_argument("--val-per-class", type=int, default=40, metavar="N")
    parser.add_argument("--size", type=int, default=64, metavar="PX", help="side of an image")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if min(args.train_per_class, args.val_per_class) < 1:
        parser.error("--train-per-class and --val-per-class must be at least 1")
    if args.size < 16:
        parser.error(f"--size must be at least 16 pixels, got {args.size}")
    if args.seed < 0:
        parser.error(f"--seed must not be negative, got {args.seed}")
    try:
        made = make_dataset(**vars(args))
    except OSError as error:
        sys.exit(f"error: {error}")
    print(
        f"{'wrote' if made else 'reusing'} {len(TEXTURES)} classes x ({args.train_per_class} train"
        f" + {args.val_per_class} val) images of {args.size} px in {args.out}"
    )


if __name__ == "__main__":
    main()
