"""Labelled data sets to transfer to: folders with train/ and val/, and torchvision's by name, where
they are on disk; nothing is downloaded.

Of torchvision's, training is on all that is published for training (train and val where there are
both), and the test set is the published one.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from torchvision import datasets

from moco.data.images import DATASETS, Images, open_images
from moco.errors import DataError

# name: (torchvision's class, arguments of the parts to train on, arguments of the test set)
_SETS: dict[str, tuple[str, list[dict], dict]] = {
    "aircraft": ("FGVCAircraft", [{"split": "trainval"}], {"split": "test"}),
    "cars": ("StanfordCars", [{"split": "train"}], {"split": "test"}),
    "country211": ("Country211", [{"split": "train"}, {"split": "valid"}], {"split": "test"}),
    "dtd": ("DTD", [{"split": "train"}, {"split": "val"}], {"split": "test"}),
    "fashion-mnist": ("FashionMNIST", [{"train": True}], {"train": False}),
    "flowers": ("Flowers102", [{"split": "train"}, {"split": "val"}], {"split": "test"}),
    "food": ("Food101", [{"split": "train"}], {"split": "test"}),
    "gtsrb": ("GTSRB", [{"split": "train"}], {"split": "test"}),
    "mnist": ("MNIST", [{"train": True}], {"train": False}),
    "pets": ("OxfordIIITPet", [{"split": "trainval"}], {"split": "test"}),
    "svhn": ("SVHN", [{"split": "train"}], {"split": "test"}),
}
NAMES = tuple(sorted({*_SETS, *DATASETS} - {"folder"}))


def open_labelled(name: str, root: str | Path) -> tuple[Images | TorchvisionImages, ...]:
    """Training and test images of a labelled data set.

    Args:
        name: one of `NAMES`; else a folder with train/CLASS/IMAGE and val/CLASS/IMAGE, or NAME=DIR
            for one of them in another folder than `root`.
        root: the folder that torchvision keeps its data sets in.

    Returns:
        (training images, test images).

    Raises:
        DataError: no such name and no such folder, no labels, or files that are not there.
    """
    name, equals, other = name.partition("=")
    root = Path(other if equals else root)
    if name in _SETS:
        kind, train, test = _SETS[name]
        return tuple(_open(name, kind, root, parts) for parts in (train, [test]))
    if name in NAMES:
        return tuple(open_images(name, root, split) for split in ("train", "val"))
    if equals or not Path(name).is_dir():
        raise DataError(
            f"no such data set: {name}; expected a folder with train/ and val/, or one of "
            f"{', '.join(NAMES)}, perhaps with =DIR behind it"
        )
    train = open_images("folder", name, "train")
    return train, open_images("folder", name, "val", classes=train.classes)


def _open(name: str, kind: str, root: Path, parts: Sequence[dict]) -> TorchvisionImages:
    try:
        return TorchvisionImages([getattr(datasets, kind)(str(root), **part) for part in parts])
    except (RuntimeError, OSError, ModuleNotFoundError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(
            f"no complete {name} in {root} ({reason}); put torchvision's files there first "
            f"(torchvision.datasets.{kind}), nothing is downloaded here"
        ) from error


class TorchvisionImages:
    """One or several of torchvision's data sets of (image, label), one after another.

    A label is known once its image has been loaded: not all of torchvision's data sets have a list
    of their labels that other code may read.
    """

    def __init__(self, parts: Sequence) -> None:
        self.parts = list(parts)
        self.ends = list(itertools.accumulate(map(len, self.parts)))
        self.classes = list(map(str, getattr(self.parts[0], "classes", [])))
        self.targets = _Labels(self)
        self.last: tuple[int, int] | None = None

    def __len__(self) -> int:
        return self.ends[-1]

    def load(self, index: int) -> Image.Image:
        part = bisect.bisect_right(self.ends, index)
        try:
            image, label = self.parts[part][index - (self.ends[part] - len(self.parts[part]))]
        except Exception as error:  # a damaged file can make Pillow's readers fail in any way
            raise DataError(f"cannot read image {index}: {error}; replace its file") from error
        self.last = index, int(label)
        return image.convert("RGB")


class _Labels:
    """Labels as a sequence, for `PlainImages`, which loads an image before it asks."""

    def __init__(self, images: TorchvisionImages) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> int:
        if self.images.last is None or self.images.last[0] != index:
            self.images.load(index)
        return self.images.last[1]
