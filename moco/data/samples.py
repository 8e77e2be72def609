"""Samples: random views of an image, or an image through a fixed transform.

A sample's augmentation is a function of (seed, epoch, index, view) alone: the same pictures with
any number of workers or processes, and after a resume.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from moco.data import device_views, jpeg, views
from moco.data.images import Images, base_and_indices
from moco.errors import DataError

Loaded = Image.Image | Tensor  # RGB; (3, H, W) uint8
MOST_BAD_IN_A_ROW = 1000  # beyond it the fault is not in the images


class AugmentedViews(Dataset):
    """(epoch, index) -> (view_1, ..., view_n, target, replaced): random views of one image, each
    (3, S, S) uint8.

    Target is -1 where the images have no labels. With `skip_bad` an image that cannot be read is
    replaced by the next one that can, and `replaced` holds one line for each that could not; it
    is "" otherwise. With `augment_on_device` the views are crops only, and the parameters of the
    rest, (n, 16), come last: see `device_views.augment_on_device`.

    Raises:
        DataError: an image cannot be read; with `skip_bad`, `MOST_BAD_IN_A_ROW` of them.
    """

    # Parameters are drawn for several images at a time, as a call costs the same for one as for
    # many; the decoded images are held until then, so there are few of them where they are large.
    DRAWN_TOGETHER, PIXELS_HELD = 16, 2**24

    def __init__(
        self,
        images: Images,
        recipe: views.Recipe,
        *,
        seed: int,
        num_views: int,
        skip_bad: bool = False,
        augment_on_device: bool = False,
    ) -> None:
        self.images = images
        self.recipe = recipe
        self.seed = seed
        self.num_views = num_views
        self.skip_bad = skip_bad
        self.augment_on_device = augment_on_device
        # A function of the installation: processes and resumed runs decide alike.
        has_files = hasattr(base_and_indices(images)[0], "read")
        self.decode_fast = augment_on_device and has_files and jpeg.equals_pillow()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor | int | str, ...]:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: Sequence[tuple[int, int]]) -> list[tuple[Tensor | int | str, ...]]:
        """Many samples, as torch's DataLoader asks for them; all of one epoch."""
        samples: list[tuple[Tensor | int | str, ...]] = []
        loaded, pixels = [], 0
        for i, (_, index) in enumerate(keys):
            loaded.append(self._load(index))
            height, width = _size(loaded[-1][0])
            pixels += height * width
            full = len(loaded) == self.DRAWN_TOGETHER or pixels >= self.PIXELS_HELD
            if full or i + 1 == len(keys):
                samples += self._samples(keys[i + 1 - len(loaded) : i + 1], loaded)
                loaded, pixels = [], 0
        return samples

    def _samples(
        self, keys: Sequence[tuple[int, int]], loaded: list[tuple[Loaded, int, str]]
    ) -> Iterator[tuple[Tensor | int | str, ...]]:
        heights, widths = zip(*(_size(image) for image, _, _ in loaded), strict=True)
        drawn = self.draw(keys, heights, widths)
        tables = torch.stack([params.as_tensor() for params in drawn], dim=1)  # (N, num_views, 16)
        for i, (image, used, replaced) in enumerate(loaded):
            if self.augment_on_device:
                pixels = image if isinstance(image, Tensor) else views.pixels_of(image)
                crops = [device_views.crop(pixels, self.recipe, params, i) for params in drawn]
                yield (*crops, self.target(used), replaced, tables[i])
            else:
                made = [views.pil_view(image, self.recipe, params, i) for params in drawn]
                yield (*map(views.pixels_of, made), self.target(used), replaced)

    def draw(
        self, keys: Sequence[tuple[int, int]], heights: Sequence[int], widths: Sequence[int]
    ) -> list[views.ViewParams]:
        """The parameters of each view of some samples of one epoch."""
        epoch, indices = keys[0][0], [index for _, index in keys]
        return [
            views.draw(self.recipe, self.seed, epoch, indices, view, heights, widths)
            for view in range(self.num_views)
        ]

    def target(self, index: int) -> int:
        return -1 if self.images.targets is None else self.images.targets[index]

    def _decode(self, index: int) -> Loaded:
        if self.decode_fast and (pixels := jpeg.decode_plain(self.images.read(index))) is not None:
            return pixels
        return self.images.load(index)

    def _load(self, index: int) -> tuple[Loaded, int, str]:
        """The image, the index it really has, and what could not be read before it."""
        unreadable = []
        for offset in range(min(len(self.images), MOST_BAD_IN_A_ROW)):
            used = (index + offset) % len(self.images)
            try:
                return self._decode(used), used, "\n".join(unreadable)
            except DataError as error:
                if not self.skip_bad:
                    raise
                unreadable.append(" ".join(str(error).split()))
        raise DataError(
            f"{len(unreadable)} images in a row, of {len(self.images)}, are unreadable; is the "
            f"data still where it was? The first: {unreadable[0]}"
        )


def _size(image: Loaded) -> tuple[int, int]:
    """Height and width."""
    return tuple(image.shape[1:]) if isinstance(image, Tensor) else (image.height, image.width)


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
