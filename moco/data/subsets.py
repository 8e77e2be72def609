"""Subsets of a training set: images whose labels are used, and folds for cross-validation."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from moco.data.images import FolderImages, Images, image_names
from moco.errors import DataError


def percent_of_labels(images: Images, percent: float, seed: int) -> list[int]:
    """Indices of `percent` of each class, to the nearest image and at least one, in their order.

    The images of a class are ranked by SHA-256 of (seed, name) and the first ones taken: the same
    on any machine, whatever else is in the folder, and 1 % is a part of 10 %.

    Args:
        percent: in (0, 100].
        seed: selects the subset; no other seed has a part in it.
    """
    by_class: dict[int, list[tuple[bytes, int]]] = {}
    named = zip(image_names(images), images.targets, strict=True)
    for index, (name, target) in enumerate(named):
        rank = hashlib.sha256(f"{seed}/{name}".encode("utf-8", "surrogateescape")).digest()
        by_class.setdefault(target, []).append((rank, index))
    chosen = []
    for ranked in by_class.values():
        count = max(1, int(len(ranked) * percent / 100 + 0.5))
        chosen += [index for _, index in sorted(ranked)[:count]]
    return sorted(chosen)


def listed_labels(images: FolderImages, path: str | os.PathLike) -> list[int]:
    """Indices of the images that a text file names, one per line, in the order of the folder.

    A name is CLASS/FILE, or FILE alone, as in the lists that SimCLR has published
    (n01440764_10043.JPEG). Blank lines, and names that come again, count for nothing.

    Raises:
        DataError: no text file or no names in it; a name that is not in the training folder, or
            one that is in several classes.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"cannot read the list of labels {path}: {error.strerror}") from error
    if b"\0" in content:
        raise DataError(f"{path} is no text file; expected one image name per line")
    lines = content.decode("utf-8-sig", "surrogateescape").splitlines()
    wanted = list(dict.fromkeys(line.strip().removeprefix("./") for line in lines if line.strip()))
    if not wanted:
        raise DataError(f"{path} names no image; expected one image name per line")
    found: dict[str, list[int]] = {}
    names = image_names(images)
    for index, name in enumerate(names):
        for known_as in {name, name.rpartition("/")[2]}:
            found.setdefault(known_as, []).append(index)
    unknown = [name for name in wanted if name not in found]
    if unknown:
        raise DataError(
            f"{path}: {len(unknown)} of its {len(wanted)} images are not in {images.root}, the "
            f"first is {unknown[0]!r}; expected names like {names[0]} or {Path(names[0]).name}"
        )
    for name in wanted:
        if len(found[name]) > 1:
            first, second = (names[i] for i in found[name][:2])
            raise DataError(f"{path}: {name!r} can be {first} or {second}; write CLASS/FILE")
    return sorted({found[name][0] for name in wanted})


def subset_digest(images: Images) -> str:
    """Twelve hex digits of the names, whatever their order: equal for the same set of images."""
    names = "\n".join(sorted(image_names(images)))
    return hashlib.sha256(names.encode("utf-8", "surrogateescape")).hexdigest()[:12]


def stratified_folds(targets: Sequence[int], folds: int, seed: int) -> list[list[int]]:
    """Split indices into `folds` parts that share out every class as evenly as can be.

    A function of the arguments; each index is in one part, sizes differ by one at most.
    """
    generator, targets = torch.Generator().manual_seed(seed), list(targets)
    by_class: dict[int, list[int]] = {}
    for index in torch.randperm(len(targets), generator=generator).tolist():
        by_class.setdefault(targets[index], []).append(index)
    dealt = [index for _, members in sorted(by_class.items()) for index in members]
    return [sorted(dealt[part::folds]) for part in range(folds)]
