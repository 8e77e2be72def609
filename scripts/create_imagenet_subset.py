#!/usr/bin/env python
"""Make a subset of ImageNet by symbolic links, by default the paper's 100 classes.

    python scripts/create_imagenet_subset.py IMAGENET SUBSET [--subset CLASSES.txt]

IMAGENET has train/WNID and val/WNID; SUBSET gets a link for each class of the list, one WordNet id
per line. The default list is ImageNet-100 of Contrastive Multiview Coding (arXiv:1906.05849), which
the alignment + uniformity paper uses as well. Running it again completes a subset that was cut off.
"""

from __future__ import annotations

import argparse
from pathlib import Path

DEFAULT_CLASSES = Path(__file__).resolve().parent / "imagenet100_classes.txt"
SPLITS = ("train", "val")


def main() -> None:
    parser = argparse.ArgumentParser(description="make a subset of ImageNet by symbolic links")
    parser.add_argument("imagenet", type=Path, metavar="IMAGENET", help="has train/ and val/")
    parser.add_argument("out", type=Path, metavar="SUBSET", help="folder to make")
    parser.add_argument(
        "--subset", type=Path, default=DEFAULT_CLASSES, metavar="FILE", help="one class a line"
    )
    args = parser.parse_args()
    try:
        classes = read_classes(args.subset)
        links = plan_links(args.imagenet.resolve(), args.out, classes)
        for link, target in links:
            link.parent.mkdir(parents=True, exist_ok=True)
            if not link.is_symlink():
                link.symlink_to(target, target_is_directory=True)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(f"{len(classes)} classes, train and val, linked in {args.out}")


def read_classes(path: Path) -> list[str]:
    classes = path.read_text(encoding="utf-8").split()
    if not classes:
        raise ValueError(f"{path} lists no classes")
    if len(set(classes)) < len(classes):
        raise ValueError(f"{path} lists a class twice")
    return classes


def plan_links(imagenet: Path, out: Path, classes: list[str]) -> list[tuple[Path, Path]]:
    """(link, target) for every class and split.

    Raises:
        ValueError: classes that IMAGENET lacks, or something else where a link should be.
    """
    links = [(out / split / name, imagenet / split / name) for split in SPLITS for name in classes]
    missing = [str(target) for _, target in links if not target.is_dir()]
    if missing:
        shown = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise ValueError(f"{imagenet} lacks {len(missing)} class folders: {shown}")
    for link, target in links:
        if link.is_symlink():
            if link.resolve() != target.resolve():
                raise ValueError(f"{link} links to {link.resolve()}, expected {target}")
        elif link.exists():
            raise ValueError(f"{link} is in the way of a link to {target}")
    extra = sorted(
        path.name
        for split in SPLITS
        if (out / split).is_dir()
        for path in (out / split).iterdir()
        if path.name not in set(classes)
    )
    if extra:
        raise ValueError(f"{out} holds classes that are not in the list: {', '.join(extra[:5])}")
    return links


if __name__ == "__main__":
    main()
