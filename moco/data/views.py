"""Augmentation recipes, random parameters of views, and views made by Pillow.

`draw` gives the parameters of a view: a function of (seed, epoch, index, view) alone. `pil_view`
applies them as torchvision's transforms on Pillow images do; `device_views` applies them to
tensors.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torchvision.transforms.functional as TF
from PIL import Image, ImageFilter
from torch import Tensor

from moco.data.thin import resized_centre

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Recipe:
    """Distribution of a view's parameters; operations run in the order of the fields."""

    image_size: int
    crop_scale: tuple[float, float]  # share of the area
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)  # width by height
    grey_before_jitter: bool = False  # else after it
    jitter_p: float = 0.0
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.4, 0.1)  # torchvision's ColorJitter
    grey_p: float = 0.0
    blur_p: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)  # pixels (SimCLR, arXiv:2002.05709)
    flip_p: float = 0.5


def pretrain_recipe(
    image_size: int = 224,
    *,
    aug_plus: bool = False,
    crop_scale: Sequence[float] = (0.2, 1.0),
    blur: bool = True,
) -> Recipe:
    """Views of pretraining.

    MoCo v1: crop, greyscale 0.2, colour jitter (0.4, 0.4, 0.4, 0.4), flip (arXiv:1911.05722).
    MoCo v2 (`aug_plus`): crop, colour jitter (0.4, 0.4, 0.4, 0.1) with probability 0.8, greyscale
    0.2, Gaussian blur with probability 0.5, flip (arXiv:2003.04297); `blur` is of v2 only.
    """
    crop_scale = tuple(crop_scale)
    if not aug_plus:
        return Recipe(
            image_size,
            crop_scale,
            grey_before_jitter=True,
            grey_p=0.2,
            jitter_p=1.0,
            jitter=(0.4, 0.4, 0.4, 0.4),
        )
    return Recipe(image_size, crop_scale, jitter_p=0.8, grey_p=0.2, blur_p=0.5 if blur else 0.0)


def in_batch_recipe(image_size: int, crop_scale: Sequence[float] = (0.08, 1.0)) -> Recipe:
    """Views of training within the batch, as the public STL-10 code of arXiv:2005.10242 has them:
    crop, colour jitter (0.4, 0.4, 0.4, 0.4) always, grey with probability 0.2 after it, flip."""
    return Recipe(
        image_size, tuple(crop_scale), jitter_p=1.0, jitter=(0.4, 0.4, 0.4, 0.4), grey_p=0.2
    )


def lincls_recipe(image_size: int = 224) -> Recipe:
    """Training view of linear evaluation: ImageNet's usual random resized crop, and flip."""
    return Recipe(image_size, (0.08, 1.0))


# Images that exceed both when resized are cropped first: pixels (64 MiB), and length by width.
MOST_RESIZED_PIXELS, MOST_RESIZED_RATIO = 2**24, 8


def eval_transform(
    image_size: int = 224, resize: int | None = None
) -> Callable[[Image.Image], Tensor]:
    """Centre crop, as (3, S, S) uint8: the shorter side to `resize`, without it to 256/224 of the
    crop, as for ImageNet; images of at most 64 pixels (CIFAR, STL-10 at 64) are then taken whole,
    as is usual for them."""
    if resize is None:
        resize = image_size if image_size <= 64 else round(image_size * 256 / 224)
    return functools.partial(_centre_crop, image_size=image_size, shorter=resize)


def _centre_crop(image: Image.Image, image_size: int, shorter: int) -> Tensor:
    """Equal to torchvision's Resize and CenterCrop for every image, but in bounded memory."""
    longer = int(shorter * max(image.size) / min(image.size))
    if shorter * longer <= MOST_RESIZED_PIXELS or longer <= MOST_RESIZED_RATIO * shorter:
        image = TF.center_crop(TF.resize(image, shorter), image_size)
    else:
        wide = image.width > image.height
        resized = (longer, shorter) if wide else (shorter, longer)
        image = resized_centre(image, resized, image_size)
    return TF.pil_to_tensor(image)


def normalize(
    images: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    memory_format: torch.memory_format = torch.preserve_format,
) -> Tensor:
    """(N, 3, H, W) uint8 -> float32 on the same device, (pixel/255 - mean) / std per channel."""
    mean, std = (_per_channel(tuple(values), images.device) for values in (mean, std))
    floats = images.to(torch.float32, memory_format=memory_format)
    return floats.div_(255).sub_(mean).div_(std)


@functools.lru_cache
def _per_channel(values: tuple[float, ...], device: torch.device) -> Tensor:
    """(3, 1, 1), sent to the device once: sending makes it wait."""
    return torch.tensor(values, device=device).view(3, 1, 1)


def uniforms(seed: int, epoch: int, indices: Sequence[int], view: int, count: int) -> np.ndarray:
    """(N, count) float64, uniform in [0, 1): number j of row i is a function of (seed, epoch,
    indices[i], view, j) alone. SplitMix64 (Steele et al., OOPSLA 2014), started where the four
    numbers, mixed in one after another, lead to.

    Args:
        seed, epoch, view: integers of at least 0, below 2^64.
    """
    state = np.zeros((len(indices), 1), dtype=np.uint64)
    for number in ([seed], [epoch], np.asarray(indices)[:, None], [view]):
        state = _mixed(state + _GOLDEN * (np.asarray(number, dtype=np.uint64) + _ONE))
    steps = np.arange(1, count + 1, dtype=np.uint64)
    return (_mixed(state + _GOLDEN * steps) >> np.uint64(11)) * 2.0**-53


_GOLDEN, _ONE = np.uint64(0x9E3779B97F4A7C15), np.uint64(1)


def _mixed(x: np.ndarray) -> np.ndarray:
    """SplitMix64's output function: every bit of x changes half of the bits."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)  # as torchvision numbers them
ORDERS = np.array(list(itertools.permutations(range(4))), dtype=np.float32)

# Each parameter has random numbers of its own, so that none depends on whether another is used.
_TRIES = 10
_AREA, _RATIO = slice(0, _TRIES), slice(_TRIES, 2 * _TRIES)
_TOP, _LEFT, _JITTER, _ORDER, _GREY, _BLUR, _SIGMA, _FLIP = range(20, 28)
_FACTORS, _NUMBERS = slice(28, 32), 32


@dataclass(frozen=True)
class ViewParams:
    """Parameters of N views, one row each.

    Attributes:
        box: (N, 4) int64, top, left, height, width of the crop in pixels.
        jitter, grey, flip: (N,) bool.
        sigma: (N,) float32, of the blur; 0 is none.
        factors: (N, 4) float32 of brightness, contrast, saturation and hue.
        order: (N, 4) float32, a permutation of 0..3: in which order the factors are applied.
    """

    box: np.ndarray
    jitter: np.ndarray
    grey: np.ndarray
    flip: np.ndarray
    sigma: np.ndarray
    factors: np.ndarray
    order: np.ndarray

    def as_tensor(self) -> Tensor:
        """(N, 16) float32 with the columns `COLUMNS`, for one transfer to a device."""
        table = np.empty((len(self.box), 16), np.float32)
        for name, columns in COLUMNS.items():
            table[:, columns] = getattr(self, name)
        return torch.from_numpy(table)


# Where `ViewParams.as_tensor` puts each attribute.
COLUMNS = {
    "box": slice(0, 4),
    "jitter": 4,
    "grey": 5,
    "flip": 6,
    "sigma": 7,
    "factors": slice(8, 12),
    "order": slice(12, 16),
}


def draw(
    recipe: Recipe,
    seed: int,
    epoch: int,
    indices: Sequence[int],
    view: int,
    heights: Sequence[int],
    widths: Sequence[int],
) -> ViewParams:
    """The parameters of one view of N images, distributed as torchvision's transforms draw them.

    Args:
        indices: (N,) which samples; their number in the data set.
        heights, widths: (N,) pixels of each image.
    """
    u = uniforms(seed, epoch, indices, view, _NUMBERS)
    spread = np.array(recipe.jitter)
    middle = np.array([1.0, 1.0, 1.0, 0.0])
    least = np.maximum(middle - spread, [0.0, 0.0, 0.0, -0.5])
    low, high = recipe.blur_sigma
    return ViewParams(
        box=_draw_boxes(recipe, u, np.asarray(heights), np.asarray(widths)),
        jitter=u[:, _JITTER] < recipe.jitter_p,
        grey=u[:, _GREY] < recipe.grey_p,
        flip=u[:, _FLIP] < recipe.flip_p,
        sigma=np.where(u[:, _BLUR] < recipe.blur_p, low + (high - low) * u[:, _SIGMA], 0.0).astype(
            np.float32
        ),
        factors=(least + (middle + spread - least) * u[:, _FACTORS]).astype(np.float32),
        order=ORDERS[(u[:, _ORDER] * len(ORDERS)).astype(np.int64)],
    )


def _draw_boxes(recipe: Recipe, u: np.ndarray, height: np.ndarray, width: np.ndarray) -> np.ndarray:
    """RandomResizedCrop: area uniform, log of the ratio uniform, the first of ten tries that fits
    into the image; else the largest centred box whose ratio is allowed."""
    least, most = recipe.crop_scale
    low, high = recipe.crop_ratio
    area = (height * width)[:, None] * (least + (most - least) * u[:, _AREA])  # (N, tries)
    ratio = np.exp(math.log(low) + (math.log(high) - math.log(low)) * u[:, _RATIO])
    tried_width = np.rint(np.sqrt(area * ratio)).astype(np.int64)
    tried_height = np.rint(np.sqrt(area / ratio)).astype(np.int64)
    fits = (
        (0 < tried_width)
        & (tried_width <= width[:, None])
        & (0 < tried_height)
        & (tried_height <= height[:, None])
    )
    first, rows = fits.argmax(axis=1), np.arange(len(u))
    found = fits[rows, first]
    # Too tall an image is cut at the top and bottom, too wide a one on the sides.
    fallback_height = np.where(width / height < low, np.rint(width / low), height)
    fallback_width = np.where(width / height > high, np.rint(height * high), width)
    h = np.where(found, tried_height[rows, first], fallback_height).astype(np.int64)
    w = np.where(found, tried_width[rows, first], fallback_width).astype(np.int64)
    top = np.where(found, u[:, _TOP] * (height - h + 1), (height - h) // 2).astype(np.int64)
    left = np.where(found, u[:, _LEFT] * (width - w + 1), (width - w) // 2).astype(np.int64)
    return np.stack([top, left, h, w], axis=1)


_ADJUST = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)


def pil_view(image: Image.Image, recipe: Recipe, params: ViewParams, i: int = 0) -> Image.Image:
    """View number i of `params` of an RGB image, as torchvision makes it of a Pillow image."""
    top, left, height, width = map(int, params.box[i])
    size = (recipe.image_size, recipe.image_size)
    image = image.crop((left, top, left + width, top + height)).resize(size, Image.BILINEAR)
    if params.grey[i] and recipe.grey_before_jitter:
        image = TF.rgb_to_grayscale(image, 3)
    if params.jitter[i]:
        for kind in map(int, params.order[i]):
            image = _ADJUST[kind](image, float(params.factors[i, kind]))
    if params.grey[i] and not recipe.grey_before_jitter:
        image = TF.rgb_to_grayscale(image, 3)
    if params.sigma[i]:
        image = image.filter(ImageFilter.GaussianBlur(float(params.sigma[i])))
    if params.flip[i]:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return image


def pixels_of(image: Image.Image) -> Tensor:
    """(3, H, W) uint8 of an RGB image."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)
