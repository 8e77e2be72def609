"""Data sets of images: folders, shards (tar, Parquet), arrays in memory, and parts of them."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision import datasets

from moco import distributed
from moco.config import DATASETS as DATASETS
from moco.data.file_list import Names, Numbers
from moco.data.folders import IMG_EXTENSIONS, LeftOut, data_folder, images_below, split_folder
from moco.data.parquets import ParquetImages
from moco.data.rgb import load_rgb
from moco.data.shards import (
    HOW_LABELLED,
    SUFFIXES,
    PackedImages,
    number_classes,
    shard_paths,
)
from moco.data.tars import TarImages
from moco.errors import DataError
from moco.printable import printable


class FolderImages:
    """Image files below a folder; the class of a file is the first folder on its way.

    Without class folders (files directly in `root`) there are no labels. `left_out` counts hidden
    and tool-made entries, and links to what is read without them (see `folders`).
    """

    def __init__(self, root: str | os.PathLike, classes: Sequence[str] | None = None) -> None:
        """
        Args:
            root: the folder.
            classes: class names in the order of their indices, where another split fixes them.
        """
        self.root = Path(root)
        if all((self.root / name).exists() for name in ("images", "depths", "train.txt")):
            raise DataError(
                f"{self.root} has images with depth, and depth maps are no images to learn from: "
                f"give --dataset nyu, or {self.root / 'images'}"
            )
        self.left_out = LeftOut(self.root)
        counts: dict[str, int] = {}  # folder below root -> number of its images

        def groups() -> Iterator[list[str]]:
            for folder, names in images_below(self.root, self.left_out):
                if names:
                    counts[folder] = len(names)
                    yield [folder + name for name in names]

        self.paths = Names(groups(), prefix=os.path.join(self.root, ""))
        if not self.paths:
            raise DataError(
                f"no images in {self.root} (looked for {', '.join(IMG_EXTENSIONS)}); expected "
                "FOLDER/train/CLASS/IMAGE as for ImageNet, or any folder with images"
                + (f"; {self.left_out}" if self.left_out.counts else "")
            )
        self.targets: Numbers | None = None
        self.classes: list[str] = []
        if "" not in counts:
            class_of = [folder.partition(os.sep)[0] for folder in counts]
            index = {name: i for i, name in enumerate(sorted(set(class_of)))}
            labels = torch.tensor([index[name] for name in class_of])
            labels = labels.repeat_interleave(torch.tensor([*counts.values()]))
            self.classes, self.targets = number_classes(labels, list(index), classes, self.root)

    @property
    def names(self) -> list[str]:
        """CLASS/FILE, with forward slashes."""
        return self.paths.without_prefix()

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: int) -> bytes:
        """The file's content, b"" where it cannot be read; `load` says why."""
        with contextlib.suppress(OSError):
            if os.path.isfile(path := self.paths[index]):
                return Path(path).read_bytes()
        return b""

    def load(self, index: int) -> Image.Image:
        return load_rgb(self.paths[index])


class ArrayImages:
    """Small images of one size, held in memory (CIFAR, STL-10): `array` is (M, H, W, 3) uint8."""

    def __init__(self, array: np.ndarray, targets: Sequence[int], classes: Sequence[str]) -> None:
        self.array = array
        self.classes = list(classes)
        targets = [int(target) for target in targets]
        self.targets = targets if min(targets) >= 0 else None  # STL-10 marks unlabelled by -1

    def __len__(self) -> int:
        return len(self.array)

    def load(self, index: int) -> Image.Image:
        return Image.fromarray(self.array[index])


class Subset:
    """Some images of a data set, in the given order. A subset of a subset is one of the whole:
    `images` is never a Subset itself."""

    def __init__(self, images: Images, indices: Sequence[int]) -> None:
        indices, targets = list(indices), images.targets
        self.classes = images.classes
        self.targets = None if targets is None else _chosen(targets, indices)
        self.indices = Numbers(indices)
        if isinstance(images, Subset):
            self.indices = _chosen(images.indices, indices)
            images = images.images
        self.images: FolderImages | PackedImages | ArrayImages = images

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, index: int) -> bytes:
        return self.images.read(self.indices[index])

    def load(self, index: int) -> Image.Image:
        return self.images.load(self.indices[index])


def _chosen(values: Sequence[int], indices: Sequence[int]) -> Numbers:
    values = list(values)  # a Numbers is slower to ask for one at a time
    return Numbers(values[i] for i in indices)


Images = FolderImages | PackedImages | ArrayImages | Subset


def base_and_indices(
    images: Images,
) -> tuple[FolderImages | PackedImages | ArrayImages, Sequence[int]]:
    """The whole data set, and which of its images these are."""
    if isinstance(images, Subset):
        return images.images, images.indices
    return images, range(len(images))


def image_names(images: Images) -> list[str]:
    """A name for each image that is the same on any machine: CLASS/FILE with forward slashes for
    folders, as it is named in archives, the index for data sets that are held in memory."""
    base, indices = base_and_indices(images)
    if not isinstance(base, (FolderImages, PackedImages)):
        return [str(i) for i in indices]
    names = list(base.names)
    return names if base is images else [names[i] for i in indices]


def in_memory(images: Images) -> np.ndarray | None:
    """All pixels, (M, H, W, 3) uint8, of a data set that holds them in memory, else None."""
    base, indices = base_and_indices(images)
    if not isinstance(base, ArrayImages):
        return None
    return base.array if base is images else base.array[list(indices)]


def open_images(
    dataset: str,
    root: str | os.PathLike,
    split: str,
    *,
    per_class: int | None = None,
    classes: Sequence[str] | None = None,
    quiet: bool = False,
) -> Images:
    """Open a data set that is on disk already; nothing is downloaded.

    Args:
        dataset: one of `DATASETS`.
        root: for "folder" a folder with `train/` (and `val/`), or, for split "pretrain", any folder
            with images; for "tar" and "parquet" as `shards.shard_paths` finds them; for the others
            the folder that torchvision keeps them in, for cifar10 also one with both splits.
        split: "pretrain" (all images for training, labels not needed), "train" or "val".
        per_class: keep this many images of each class, the first ones.
        classes: class names of the training set, for "val" of a folder or of shards.
        quiet: do not print what is left out; for a look before the run opens them.

    Raises:
        DataError: missing, empty, or without the labels that are asked for.
    """
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"no such data folder: {root}")
    if dataset == "cifar10" and not (root / "cifar-10-batches-py").is_dir():
        if (root / "train").is_dir():
            dataset = "folder"  # the same images as files
    if dataset == "folder":
        images: Images = FolderImages(split_folder(root, split), classes)
    elif dataset in SUFFIXES:
        kind = {"tar": TarImages, "parquet": ParquetImages}[dataset]
        images = kind(root, shard_paths(root, split, dataset), classes)
    else:
        images = _open_torchvision(dataset, root, split)
    if not quiet and not isinstance(images, ArrayImages):
        _tell(root, split, images, known_classes=classes)
    if images.targets is None and (split != "pretrain" or per_class is not None):
        if dataset in SUFFIXES:
            raise DataError(
                f"the {dataset} files of {root} have no labels: expected {HOW_LABELLED[dataset]}"
            )
        stray = _image_outside_classes(images)
        raise DataError(
            f"{root} has no labels{stray}: {split} images must lie in one folder per class, "
            f"{split if split != 'pretrain' else 'train'}/CLASS/IMAGE"
        )
    if per_class is not None:
        images = Subset(images, first_per_class(images.targets, per_class))
    return images


def _tell(
    root: Path,
    split: str,
    images: FolderImages | PackedImages,
    known_classes: Sequence[str] | None,
) -> None:
    """Say on rank 0 what a user may not expect of the folder, in one line each."""
    lines = []
    whole = data_folder(root)
    if whole != root and split != "val":  # once, though val follows
        lines.append(f"{root} is the train/ of {whole}, which is read: with its val/")
    if images.left_out.counts:
        lines.append(str(images.left_out))
    if split == "val" and known_classes and images.targets is not None:
        seen = set(images.targets)
        absent = [name for index, name in enumerate(images.classes) if index not in seen]
        if absent:
            names = ", ".join(absent[:5]) + (", ..." if len(absent) > 5 else "")
            lines.append(
                f"{images.root} has no images of {len(absent)} of the {len(known_classes)} classes "
                f"of the training set: {names}; they are never validated"
            )
    for line in lines:
        distributed.print_main(printable(line))


def _image_outside_classes(images: Images) -> str:
    if isinstance(images, FolderImages):
        for path in images.paths:
            if os.path.dirname(path) == str(images.root):
                return f" because of {path}"
    return ""


_TORCHVISION = {
    "stl10": datasets.STL10,
    "cifar10": datasets.CIFAR10,
    "cifar100": datasets.CIFAR100,
}


def _open_torchvision(dataset: str, root: Path, split: str) -> ArrayImages:
    kind = _TORCHVISION[dataset]
    try:
        if dataset != "stl10":
            data = kind(str(root), train=split != "val")
            return ArrayImages(data.data, data.targets, data.classes)
        name = {"pretrain": "train+unlabeled", "train": "train", "val": "test"}[split]
        data = kind(str(root), split=name)
        if len(data.labels) != len(data.data) or data.labels.max() >= len(data.classes):
            raise ValueError("labels do not belong to the images")
        return ArrayImages(data.data.transpose(0, 2, 3, 1), data.labels, data.classes)
    # STL-10 without its list of class names; files of another size.
    except (RuntimeError, AttributeError, OSError, ValueError) as error:
        raise DataError(
            f"no complete {dataset} in {root}; put torchvision's files there first, as "
            f"{root / kind.base_folder}, nothing is downloaded here"
        ) from error


def typical_side(images: Images, looks: int = 25) -> int:
    """The median of the shorter sides, in pixels, of `looks` images spread evenly over all; of
    those that can be read.

    Raises:
        DataError: none of them can.
    """
    sides, error = [], None
    for index in sorted({i * len(images) // looks for i in range(looks)}):
        try:
            sides.append(min(images.load(index).size))
        except DataError as caught:
            error = caught
    if not sides:
        raise error
    return sorted(sides)[len(sides) // 2]


def names_digest(images: Images) -> str:
    """Twelve hex digits over which image has which index: for files, of their names in `root`."""
    base, _ = base_and_indices(images)
    named = isinstance(base, (FolderImages, PackedImages))
    names = image_names(base) if named else [len(base)]
    indices = [list(images.indices)] if isinstance(images, Subset) else []
    return hashlib.sha256(repr((names, indices)).encode()).hexdigest()[:12]


def first_per_class(targets: Sequence[int], count: int) -> list[int]:
    """Indices of the first `count` samples of each class, in their order."""
    seen: dict[int, int] = {}
    kept = []
    for index, target in enumerate(targets):
        seen[target] = seen.get(target, 0) + 1
        if seen[target] <= count:
            kept.append(index)
    return kept
