"""Images and views: data sets, the published augmentations, and who sees which sample when.

A sample's augmentation is a function of (seed, epoch, index, view) alone: the same pictures with
any number of workers or processes, and after a resume. Workers hand over uint8 pixels; the device
normalises them (`normalize`), which is a quarter of the bytes to move between processes.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torchvision.transforms as T
from PIL import Image, ImageFile, ImageFilter
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision import datasets
from torchvision.datasets.folder import IMG_EXTENSIONS

from moco import distributed

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

DATASETS = ("folder", "cifar10", "cifar100", "stl10")


class DataError(ValueError):
    """The data on disk cannot be used; the message says what was found and what to do."""


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

    Without class folders (files directly in `root`) there are no labels.
    """

    def __init__(self, root: str | os.PathLike, classes: Sequence[str] | None = None) -> None:
        """
        Args:
            root: the folder.
            classes: class names in the order of their indices, where another split fixes them.
        """
        self.root = Path(root)
        self.paths = list(image_paths(self.root))
        if not self.paths:
            raise DataError(
                f"no images in {self.root} (looked for {', '.join(IMG_EXTENSIONS)}); expected "
                "FOLDER/train/CLASS/IMAGE as for ImageNet, or any folder with images"
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


class TorchvisionImages:
    """A data set of torchvision that holds its images in memory (CIFAR, STL-10)."""

    def __init__(self, dataset: Dataset, targets: Sequence[int], classes: Sequence[str]) -> None:
        self.dataset = dataset
        self.classes = list(classes)
        targets = [int(target) for target in targets]
        self.targets = targets if min(targets) >= 0 else None  # STL-10 marks unlabelled by -1

    def __len__(self) -> int:
        return len(self.dataset)

    def load(self, index: int) -> Image.Image:
        return self.dataset[index][0]


class Subset:
    """Some images of a data set, in the given order."""

    def __init__(self, images: Images, indices: Sequence[int]) -> None:
        self.images = images
        self.indices = list(indices)
        self.classes = images.classes
        targets = images.targets
        self.targets = None if targets is None else [targets[i] for i in self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def load(self, index: int) -> Image.Image:
        return self.images.load(self.indices[index])


Images = FolderImages | TorchvisionImages | Subset


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
            with images; for the others the folder that torchvision keeps them in.
        split: "pretrain" (all images for training, labels not needed), "train" or "val".
        per_class: keep this many images of each class, the first ones.
        classes: class names of the training set, for "val" of a folder.

    Raises:
        DataError: missing, empty, or without the labels that are asked for.
    """
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"no such data folder: {root}")
    if dataset == "folder":
        images: Images = FolderImages(split_folder(root, split), classes)
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


def _image_outside_classes(images: Images) -> str:
    if isinstance(images, FolderImages):
        for path in images.paths:
            if os.path.dirname(path) == str(images.root):
                return f" because of {path}"
    return ""


def split_folder(root: Path, split: str) -> Path:
    folder = root / ("val" if split == "val" else "train")
    if folder.is_dir():
        return folder
    if split == "pretrain":
        return root
    raise DataError(f"no folder {folder}: expected {root}/train/CLASS/IMAGE and {root}/val/...")


def _open_torchvision(dataset: str, root: Path, split: str) -> TorchvisionImages:
    try:
        if dataset == "stl10":
            name = {"pretrain": "train+unlabeled", "train": "train", "val": "test"}[split]
            data = datasets.STL10(str(root), split=name)
            return TorchvisionImages(data, data.labels, data.classes)
        kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[dataset]
        data = kind(str(root), train=split != "val")
        return TorchvisionImages(data, data.targets, data.classes)
    except (RuntimeError, AttributeError) as error:  # STL-10 without its list of class names
        raise DataError(
            f"no complete {dataset} in {root} ({error}); put torchvision's files there first, "
            "nothing is downloaded here"
        ) from error


def names_digest(images: Images) -> str:
    """Twelve hex digits over which image has which index: for files, of their names in `root`."""
    indices = []
    while isinstance(images, Subset):
        indices.append(images.indices)
        images = images.images
    if isinstance(images, FolderImages):
        names = [os.path.relpath(path, images.root) for path in images.paths]
    else:
        names = [len(images)]
    return hashlib.sha256(repr((names, indices)).encode()).hexdigest()[:12]


def image_paths(root: Path) -> Iterator[str]:
    """Image files below root in ImageFolder's order: class by class, and those in root first."""
    entries = sorted(os.scandir(root), key=lambda entry: entry.name)
    yield from _images_in(str(root), [entry.name for entry in entries if entry.is_file()])
    for entry in entries:
        if entry.is_dir():
            for folder, _, names in sorted(os.walk(entry.path, followlinks=True)):
                yield from _images_in(folder, names)


def _images_in(folder: str, names: list[str]) -> Iterator[str]:
    for name in sorted(names):
        if name.lower().endswith(IMG_EXTENSIONS) and not name.startswith("."):
            yield os.path.join(folder, name)


def first_per_class(targets: Sequence[int], count: int) -> list[int]:
    """Indices of the first `count` samples of each class, in their order."""
    seen: dict[int, int] = {}
    kept = []
    for index, target in enumerate(targets):
        seen[target] = seen.get(target, 0) + 1
        if seen[target] <= count:
            kept.append(index)
    return kept


# ------------------------------------------------------------------------------------------------
# Augmentation
# ------------------------------------------------------------------------------------------------


class GaussianBlur:
    """Gaussian blur with sigma drawn uniformly from `sigma` pixels (SimCLR, arXiv:2002.05709)."""

    def __init__(self, sigma: tuple[float, float] = (0.1, 2.0)) -> None:
        self.sigma = sigma

    def __call__(self, image: Image.Image) -> Image.Image:
        sigma = torch.empty(1).uniform_(*self.sigma).item()
        return image.filter(ImageFilter.GaussianBlur(radius=sigma))


def pretrain_transform(
    image_size: int = 224,
    *,
    aug_plus: bool = False,
    crop_scale: tuple[float, float] = (0.2, 1.0),
    blur: bool = True,
) -> T.Compose:
    """One random view, PIL image -> (3, image_size, image_size) uint8.

    MoCo v1: crop, greyscale 0.2, colour jitter (0.4, 0.4, 0.4, 0.4), flip (arXiv:1911.05722).
    MoCo v2 (`aug_plus`): crop, colour jitter (0.4, 0.4, 0.4, 0.1) with probability 0.8, greyscale
    0.2, Gaussian blur with probability 0.5, flip (arXiv:2003.04297); `blur` is of v2 only.
    """
    crop = T.RandomResizedCrop(image_size, scale=tuple(crop_scale))
    grey = T.RandomGrayscale(p=0.2)
    flip = T.RandomHorizontalFlip()
    if not aug_plus:
        return T.Compose([crop, grey, T.ColorJitter(0.4, 0.4, 0.4, 0.4), flip, T.PILToTensor()])
    steps = [crop, T.RandomApply([T.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8), grey]
    if blur:
        steps.append(T.RandomApply([GaussianBlur((0.1, 2.0))], p=0.5))
    return T.Compose([*steps, flip, T.PILToTensor()])


def lincls_transform(image_size: int = 224) -> T.Compose:
    """Training view of linear evaluation: random resized crop and flip, as uint8."""
    return T.Compose([T.RandomResizedCrop(image_size), T.RandomHorizontalFlip(), T.PILToTensor()])


def eval_transform(image_size: int = 224) -> T.Compose:
    """Centre crop, as uint8: the shorter side to 256/224 of the crop, as for ImageNet. Images of at
    most 64 pixels (CIFAR, STL-10 at 64) are taken whole, as is usual for them."""
    resize = image_size if image_size <= 64 else round(image_size * 256 / 224)
    return T.Compose([T.Resize(resize), T.CenterCrop(image_size), T.PILToTensor()])


def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(N, 3, H, W) uint8 -> float32, (pixel/255 - mean) / std per channel."""
    mean_t = torch.tensor(mean, device=images.device).view(3, 1, 1)
    std_t = torch.tensor(std, device=images.device).view(3, 1, 1)
    return images.float().div_(255).sub_(mean_t).div_(std_t)


def sample_seed(seed: int, epoch: int, index: int, view: int) -> int:
    """64-bit seed of one view of one sample, well mixed from all four numbers."""
    return int(np.random.SeedSequence((seed, epoch, index, view)).generate_state(1, np.uint64)[0])


MOST_BAD_IN_A_ROW = 1000  # then the fault is not in the images


class AugmentedViews(Dataset):
    """(epoch, index) -> (view_1, ..., view_n, target, replaced): random views of one image.

    Target is -1 where the images have no labels. With `skip_bad` an image that cannot be read is
    replaced by the next one that can, and `replaced` holds one line for each that could not; it
    is "" otherwise.

    Raises:
        DataError: an image cannot be read; with `skip_bad`, `MOST_BAD_IN_A_ROW` of them.
    """

    def __init__(
        self,
        images: Images,
        transform: Callable[[Image.Image], Tensor],
        *,
        seed: int,
        views: int,
        skip_bad: bool = False,
    ) -> None:
        self.images = images
        self.transform = transform
        self.seed = seed
        self.views = views
        self.skip_bad = skip_bad

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor | int | str, ...]:
        epoch, index = key
        image, used, replaced = self._load(index)
        views = []
        # torchvision draws from torch's global generator: lend it a state per view, and give the
        # process its own back (with no workers this is the training process).
        with torch.random.fork_rng(devices=[]):
            for view in range(self.views):
                torch.default_generator.manual_seed(sample_seed(self.seed, epoch, index, view))
                views.append(self.transform(image))
        targets = self.images.targets
        return (*views, -1 if targets is None else targets[used], replaced)

    def _load(self, index: int) -> tuple[Image.Image, int, str]:
        """The image, the index it really has, and what could not be read before it."""
        unreadable = []
        for offset in range(min(len(self.images), MOST_BAD_IN_A_ROW)):
            used = (index + offset) % len(self.images)
            try:
                return self.images.load(used), used, "\n".join(unreadable)
            except DataError as error:
                if not self.skip_bad:
                    raise
                unreadable.append(" ".join(str(error).split()))
        raise DataError(
            f"{len(unreadable)} images in a row, of {len(self.images)}, are unreadable; is the "
            f"data still where it was? The first: {unreadable[0]}"
        )


class PlainImages(Dataset):
    """index -> (image, target) through a transform without randomness."""

    def __init__(self, images: Images, transform: Callable[[Image.Image], Tensor]) -> None:
        self.images = images
        self.transform = transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        targets = self.images.targets
        image = self.transform(self.images.load(index))
        return image, -1 if targets is None else targets[index]


# ------------------------------------------------------------------------------------------------
# Who sees which sample when
# ------------------------------------------------------------------------------------------------


class EpochBatches(Sampler):
    """Batches of (epoch, index) for this rank, a new order every epoch, the ragged rest left out.

    The order is a function of (seed, epoch); global batch b is its b-th slice, and rank r takes the
    r-th part of it. So the samples of a step do not depend on the number of ranks. The epoch
    travels with the index because persistent workers never see `set_epoch`.
    """

    def __init__(self, length: int, batch_size: int, *, seed: int) -> None:
        """
        Args:
            length: number of samples.
            batch_size: global batch, a multiple of the number of ranks.
            seed: of the order.
        """
        if length < batch_size:
            raise DataError(
                f"{length} images are fewer than one batch of {batch_size}; lower --batch-size"
            )
        self.length = length
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0
        self.start = 0

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Select the epoch and the first batch within it (after a resume)."""
        self.epoch, self.start = epoch, start

    def batches_per_epoch(self) -> int:
        return self.length // self.batch_size

    def __len__(self) -> int:
        return self.batches_per_epoch() - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        generator = torch.Generator().manual_seed(sample_seed(self.seed, self.epoch, 0, 0))
        order = torch.randperm(self.length, generator=generator).tolist()
        share = self.batch_size // distributed.world_size()
        for batch in range(self.start, self.batches_per_epoch()):
            first = batch * self.batch_size + distributed.rank() * share
            yield [(self.epoch, index) for index in order[first : first + share]]


class RankShare(Sampler):
    """Every index on exactly one rank, in order and without padding: rank, rank + W, ..."""

    def __init__(self, length: int) -> None:
        self.indices = range(distributed.rank(), length, distributed.world_size())

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)


def _ignore_stop_signals(_: int) -> None:
    """A request to stop is sent to all processes of a job. Workers must live on until the training
    process has finished its step; they end with it."""
    for number in distributed.STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def train_loader(
    dataset: AugmentedViews, batches: EpochBatches, *, workers: int, pin_memory: bool
) -> DataLoader:
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        worker_init_fn=_ignore_stop_signals,
        generator=torch.Generator(),  # else every epoch draws from the training process's own
        pin_memory=pin_memory,
        persistent_workers=workers > 0,
    )


def end_workers(pairs: DataLoader) -> None:
    """End the workers of a `train_loader`. They ignore SIGTERM, by which Python ends its children
    at exit: a training process that fails would wait for them for ever."""
    iterator = pairs._iterator
    if iterator is not None and pairs.num_workers:
        iterator._shutdown_workers()


def eval_loader(
    dataset: PlainImages,
    *,
    batch_size: int,
    workers: int,
    pin_memory: bool,
    persistent: bool = False,
    outlive_stop: bool = False,
) -> DataLoader:
    """This rank's share of the images (perhaps none), each once over all ranks. `persistent`
    workers wait for the next pass; those that `outlive_stop` have to be ended by the caller."""
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=RankShare(len(dataset)),
        num_workers=workers,
        worker_init_fn=_ignore_stop_signals if outlive_stop else None,
        generator=torch.Generator(),
        pin_memory=pin_memory,
        persistent_workers=persistent and workers > 0,
    )
