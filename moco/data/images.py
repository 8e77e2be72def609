"""Images: one file as RGB pixels, and the data sets that are made of them."""

from __future__ import annotations

import contextlib
import hashlib
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageFile
from torchvision import datasets

from moco import distributed
from moco.data.folders import IMG_EXTENSIONS, LeftOut, data_folder, image_paths, split_folder
from moco.errors import DataError
from moco.printable import printable

DATASETS = ("folder", "cifar10", "cifar100", "stl10")


# ------------------------------------------------------------------------------------------------
# One image file
# ------------------------------------------------------------------------------------------------

# Twice what Pillow warns of: where it raises an error by default. 16,000 x 11,000 pixels, 0.5 GB.
MAX_PIXELS = 178_956_970
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # see MAX_PIXELS


def load_rgb(path: str | os.PathLike) -> Image.Image:
    """Read an image file as 8-bit RGB; all images of this project come this way.

    - Greyscale, palette, CMYK (without its colour profile), YCbCr: as Pillow converts them.
    - Transparency, of RGBA, greyscale or palette, is dropped, not laid over a background.
    - 16-bit greyscale: the high byte, as Pillow does with 16-bit colour (its own conversion of
      greyscale would clip everything above 255 to white).
    - 32-bit integers and floats are refused: what is black and what is white is not defined.
    - Of an animation or several pages the first; EXIF rotation is not applied, as in torchvision's
      ImageFolder; whatever Pillow recognises by content is read, whatever the file's name says.

    Raises:
        DataError: missing, damaged, truncated (also where the program that imports this has set
            Pillow's LOAD_TRUNCATED_IMAGES), more than `MAX_PIXELS`, or no image. Names the file.
    """
    if not os.path.isfile(path):  # to open a pipe would wait for ever
        raise DataError(f"cannot read image {path}: there is no such file")
    try:
        with _refusing_truncated(), Image.open(path) as image:
            if image.width * image.height > MAX_PIXELS:
                raise DataError(f"{image.width} x {image.height} pixels, the most is {MAX_PIXELS}")
            if image.format in ("EPS", "WMF"):  # Pillow would start another program to draw it
                raise DataError(f"a drawing ({image.format}), not pixels")
            return _to_rgb(image)
    except Exception as error:  # a damaged file can make Pillow's readers fail in any way
        reason = str(error) or type(error).__name__
        if isinstance(error, Image.UnidentifiedImageError):
            reason = "its beginning is not that of any image format"
        raise DataError(f"cannot read image {path}: {reason}; replace or remove it") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.format == "JPEG" and image.mode == "RGB":  # nearly all: without convert's copy
        image.load()
        return image
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        high_bytes = np.asarray(image) >> 8
        image = Image.fromarray(high_bytes.astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise DataError(f"the range of its 32-bit pixels (mode {image.mode}) is not defined")
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # the same colours; Pillow would warn of going to RGB at once
    return image.convert("RGB")


@contextlib.contextmanager
def _refusing_truncated() -> Iterator[None]:
    """Half an image, the rest of it grey, is an error, whatever the program at large has set."""
    before = ImageFile.LOAD_TRUNCATED_IMAGES
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


# ------------------------------------------------------------------------------------------------
# Data sets: load(index) -> RGB image, targets (class indices, or None without labels), classes
# ------------------------------------------------------------------------------------------------


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
        self.left_out = LeftOut(self.root)
        self.paths = list(image_paths(self.root, self.left_out))
        if not self.paths:
            raise DataError(
                f"no images in {self.root} (looked for {', '.join(IMG_EXTENSIONS)}); expected "
                "FOLDER/train/CLASS/IMAGE as for ImageNet, or any folder with images"
                + (f"; {self.left_out}" if self.left_out.counts else "")
            )
        names = [os.path.relpath(path, self.root).split(os.sep) for path in self.paths]
        self.targets: list[int] | None = None
        self.classes: list[str] = []
        if all(len(parts) > 1 for parts in names):
            self.classes = list(classes or sorted({parts[0] for parts in names}))
            index = {name: i for i, name in enumerate(self.classes)}
            unknown = sorted({parts[0] for parts in names} - set(index))
            if unknown:
                raise DataError(
                    f"{self.root} has classes that the training set lacks: {', '.join(unknown[:5])}"
                )
            self.targets = [index[parts[0]] for parts in names]

    def __len__(self) -> int:
        return len(self.paths)

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
        self.indices = list(indices)
        self.classes = images.classes
        targets = images.targets
        self.targets = None if targets is None else [targets[i] for i in self.indices]
        if isinstance(images, Subset):
            self.indices = [images.indices[i] for i in self.indices]
            images = images.images
        self.images: FolderImages | ArrayImages = images

    def __len__(self) -> int:
        return len(self.indices)

    def load(self, index: int) -> Image.Image:
        return self.images.load(self.indices[index])


Images = FolderImages | ArrayImages | Subset


def base_and_indices(images: Images) -> tuple[FolderImages | ArrayImages, Sequence[int]]:
    """The whole data set, and which of its images these are."""
    if isinstance(images, Subset):
        return images.images, images.indices
    return images, range(len(images))


def image_names(images: Images) -> list[str]:
    """A name for each image that is the same on any machine: CLASS/FILE with forward slashes for
    folders, the index for data sets that are held in memory."""
    base, indices = base_and_indices(images)
    if isinstance(base, FolderImages):
        return [Path(os.path.relpath(base.paths[i], base.root)).as_posix() for i in indices]
    return [str(i) for i in indices]


def in_memory(images: Images) -> np.ndarray | None:
    """All pixels, (M, H, W, 3) uint8, of a data set that holds them in memory, else None."""
    base, indices = base_and_indices(images)
    if not isinstance(base, ArrayImages):
        return None
    return base.array if base is images else base.array[indices]


def open_images(
    dataset: str,
    root: str | os.PathLike,
    split: str,
    *,
    per_class: int | None = None,
    classes: Sequence[str] | None = None,
) -> Images:
    """Open a data set that is on disk already; nothing is downloaded.

    Args:
        dataset: one of `DATASETS`.
        root: for "folder" a folder with `train/` (and `val/`), or, for split "pretrain", any folder
            with images; for the others the folder that torchvision keeps them in, for cifar10 also
            one with `train/` and `val/`.
        split: "pretrain" (all images for training, labels not needed), "train" or "val".
        per_class: keep this many images of each class, the first ones.
        classes: class names of the training set, for "val" of a folder.

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
        _tell(root, split, images, known_classes=classes)
    else:
        images = _open_torchvision(dataset, root, split)
    if images.targets is None and (split != "pretrain" or per_class is not None):
        stray = _image_outside_classes(images)
        raise DataError(
            f"{root} has no labels{stray}: {split} images must lie in one folder per class, "
            f"{split if split != 'pretrain' else 'train'}/CLASS/IMAGE"
        )
    if per_class is not None:
        images = Subset(images, first_per_class(images.targets, per_class))
    return images


def _tell(
    root: Path, split: str, images: FolderImages, known_classes: Sequence[str] | None
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


def _open_torchvision(dataset: str, root: Path, split: str) -> ArrayImages:
    try:
        if dataset == "stl10":
            name = {"pretrain": "train+unlabeled", "train": "train", "val": "test"}[split]
            data = datasets.STL10(str(root), split=name)
            return ArrayImages(data.data.transpose(0, 2, 3, 1), data.labels, data.classes)
        kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[dataset]
        data = kind(str(root), train=split != "val")
        return ArrayImages(data.data, data.targets, data.classes)
    except (RuntimeError, AttributeError) as error:  # STL-10 without its list of class names
        raise DataError(
            f"no complete {dataset} in {root} ({error}); put torchvision's files there first, "
            "nothing is downloaded here"
        ) from error


def names_digest(images: Images) -> str:
    """Twelve hex digits over which image has which index: for files, of their names in `root`."""
    base, _ = base_and_indices(images)
    names = image_names(base) if isinstance(base, FolderImages) else [len(base)]
    indices = [images.indices] if isinstance(images, Subset) else []
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
