"""Views: the published augmentations, drawn in numpy and applied by Pillow or on the device.

A view is described by a few numbers (`draw`), which are a function of (seed, epoch, index, view)
alone. `pil_view` makes the view that torchvision's transforms on Pillow images would make of the
same numbers. The other way is in two parts: `crop` in a loader process, and `finish` for colour,
blur and flip of a whole batch on the device, with the rounding of Pillow's 8-bit arithmetic.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
import torch.nn.functional as F
import torchvision.transforms as T
import torchvision.transforms.functional as TF
from PIL import Image, ImageFilter
from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


# ------------------------------------------------------------------------------------------------
# Recipes
# ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """What a view is drawn from; operations run in the order of the fields."""

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
            image_size, crop_scale, grey_before_jitter=True, grey_p=0.2,
            jitter_p=1.0, jitter=(0.4, 0.4, 0.4, 0.4),
        )  # fmt: skip
    return Recipe(image_size, crop_scale, jitter_p=0.8, grey_p=0.2, blur_p=0.5 if blur else 0.0)


def lincls_recipe(image_size: int = 224) -> Recipe:
    """Training view of linear evaluation: ImageNet's usual random resized crop, and flip."""
    return Recipe(image_size, (0.08, 1.0))


def eval_transform(image_size: int = 224) -> T.Compose:
    """Centre crop, as uint8: the shorter side to 256/224 of the crop, as for ImageNet. Images of at
    most 64 pixels (CIFAR, STL-10 at 64) are taken whole, as is usual for them."""
    resize = image_size if image_size <= 64 else round(image_size * 256 / 224)
    return T.Compose([T.Resize(resize), T.CenterCrop(image_size), T.PILToTensor()])


def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(N, 3, H, W) uint8 -> float32, (pixel/255 - mean) / std per channel."""
    mean, std = (_per_channel(tuple(values), images.device) for values in (mean, std))
    return images.float().div_(255).sub_(mean).div_(std)


@functools.lru_cache
def _per_channel(values: tuple[float, ...], device: torch.device) -> Tensor:
    """(3, 1, 1), sent to the device once: sending makes it wait."""
    return torch.tensor(values, device=device).view(3, 1, 1)


# ------------------------------------------------------------------------------------------------
# Random numbers
# ------------------------------------------------------------------------------------------------


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


# ------------------------------------------------------------------------------------------------
# Parameters of views
# ------------------------------------------------------------------------------------------------

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)  # as torchvision numbers them
ORDERS = np.array(list(itertools.permutations(range(4))), dtype=np.float32)

# Which of a view's numbers stands for what. Each has a place of its own, so that none depends on
# whether another was used.
_TRIES = 10
_AREA, _RATIO = slice(0, _TRIES), slice(_TRIES, 2 * _TRIES)
_TOP, _LEFT, _JITTER, _ORDER, _GREY, _BLUR, _SIGMA, _FLIP = range(20, 28)
_FACTORS, _NUMBERS = slice(28, 32), 32


@dataclass(frozen=True)
class ViewParams:
    """What was drawn for N views, one row each.

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

    def table(self) -> Tensor:
        """(N, 16) float32, all of it but in one piece, for the device: see `finish`, `crop_all`."""
        columns = [getattr(self, field.name).reshape(len(self.box), -1) for field in fields(self)]
        return torch.from_numpy(np.hstack(columns).astype(np.float32))


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
        (0 < tried_width) & (tried_width <= width[:, None])
        & (0 < tried_height) & (tried_height <= height[:, None])
    )  # fmt: skip
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


# ------------------------------------------------------------------------------------------------
# A view in a loader process
# ------------------------------------------------------------------------------------------------

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


def crop(pixels: Tensor, recipe: Recipe, params: ViewParams, i: int = 0) -> Tensor:
    """The crop of view number i of `params`, resized: (3, H, W) uint8 -> (3, S, S) uint8, within
    one level of Pillow's."""
    top, left, height, width = map(int, params.box[i])
    part = pixels[:, top : top + height, left : left + width].unsqueeze(0)
    # Interleaved colours are what torch's vectorised kernel for uint8 reads.
    part = part.contiguous(memory_format=torch.channels_last)
    size = (recipe.image_size, recipe.image_size)
    return F.interpolate(part, size, mode="bilinear", antialias=True).squeeze(0)


# ------------------------------------------------------------------------------------------------
# Views on the device: whole batches, no loop over samples, no wait for the device
# ------------------------------------------------------------------------------------------------


def finish(crops: Tensor, table: Tensor, recipe: Recipe) -> Tensor:
    """Colour, blur and flip of N crops, each with its own parameters.

    Equal to `pil_view` after its crop up to a few levels: Pillow's arithmetic on 8-bit values is
    followed (truncation, quantised hue), but in float32, and blur rounds twice, not six times.

    Args:
        crops: (N, 3, S, S) uint8.
        table: (N, 16) float32 on the same device, `ViewParams.table`.

    Returns:
        (N, 3, S, S) uint8.
    """
    table = table[:, :, None, None, None]  # each column (N, 1, 1, 1)
    jitter, grey, flip, sigma = table[:, 4:8].unbind(1)
    x = crops.float()
    if recipe.grey_before_jitter and recipe.grey_p:
        x = torch.where(grey > 0, _luma(x), x)
    if recipe.jitter_p:
        x = torch.where(jitter > 0, _jittered(x, table[:, 8:12], table[:, 12:16]), x)
    if recipe.grey_p and not recipe.grey_before_jitter:
        x = torch.where(grey > 0, _luma(x), x)
    if recipe.blur_p:
        x = torch.where(sigma > 0, _blurred(x, sigma.flatten(1), recipe.blur_sigma[1]), x)
    if recipe.flip_p:
        x = torch.where(flip > 0, x.flip(3), x)
    return x.to(torch.uint8)


def _luma(x: Tensor) -> Tensor:
    """(N, 3, H, W) -> (N, 1, H, W): the weights of ITU-R 601 in 16 bits, as Pillow has them. The
    sums are multiples of 2^-16 below 2^8, so float32 holds them exactly."""
    red, green, blue = x.split(1, dim=1)
    sum_ = (red * (19595 / 65536)).add(green, alpha=38470 / 65536).add(blue, alpha=7471 / 65536)
    return (sum_ + 0.5).floor()


def _jittered(x: Tensor, factors: Tensor, order: Tensor) -> Tensor:
    """Colour jitter; factors and order are (N, 4, 1, 1, 1).

    Brightness, contrast and saturation are one operation, a blend with black, with the mean grey or
    with the grey image. So a sample has up to three blends, then its hue, then the rest of them;
    where it is not a blend's turn the factor is 1, which changes nothing.
    """
    turns = torch.arange(4, device=x.device).view(4, 1, 1, 1)
    hue_at = (turns * (order == HUE)).sum(1, keepdim=True)
    by_turn = factors.gather(1, order.long())
    before = torch.where(turns < hue_at, by_turn, 1.0)
    after = torch.where(turns > hue_at, by_turn, 1.0)
    contrast, saturation = order == CONTRAST, order == SATURATION
    for turn in (0, 1, 2):
        x = _blended(x, before[:, turn], contrast[:, turn], saturation[:, turn])
    x = _hue_shifted(x, factors[:, HUE])
    for turn in (1, 2, 3):
        x = _blended(x, after[:, turn], contrast[:, turn], saturation[:, turn])
    return x


def _blended(x: Tensor, factor: Tensor, contrast: Tensor, saturation: Tensor) -> Tensor:
    """other + factor * (x - other); the other image is the mean grey where `contrast`, the grey
    image where `saturation`, else black (all (N, 1, 1, 1))."""
    grey = _luma(x)
    mean = (grey.mean((1, 2, 3), keepdim=True) + 0.5).floor()
    other = torch.where(saturation, grey, mean * contrast)
    return (other + factor * (x - other)).clamp(0, 255).floor()


def _hue_shifted(x: Tensor, factor: Tensor) -> Tensor:
    """Rotate the hue by `factor` (N, 1, 1, 1) of a circle, in HSV of 8 bits each as Pillow has it:
    there and back is not without loss, even for a factor of 0."""
    high, low = x.amax(1, keepdim=True), x.amin(1, keepdim=True)
    chroma = high - low
    red, green, blue = ((high - x) / chroma.clamp(min=1)).split(1, dim=1)
    at_red, at_green, _ = (x == high).split(1, dim=1)
    sextant = torch.where(
        at_red, blue - green, torch.where(at_green, 2 + red - blue, 4 + green - red)
    )
    sextant = torch.where(sextant < 0, sextant + 6, sextant)  # in [0, 6)
    hue = (sextant * 42.5).floor()  # 255 / 6
    saturation = (chroma / high.clamp(min=1) * 255).floor() / 255
    hue = (hue + (factor * 255).trunc()).remainder(256) / 42.5
    # Distance along the circle from where a channel is at its full value.
    offset = 5 - 2 * torch.arange(3, device=x.device).view(3, 1, 1)
    k = (hue + offset).remainder(6)
    share = torch.minimum(k, 4 - k).clamp(0, 1)
    return (high * (1 - saturation * share) + 0.5).floor()


def _blurred(x: Tensor, sigma: Tensor, largest: float) -> Tensor:
    """Gaussian blur by three box filters with fractional ends (Gwosdek et al., SSVM 2011), as
    Pillow has it; sigma (N, 1). One pass along the rows and one along the columns."""
    reach = int((math.sqrt(4 * largest**2 + 1) - 1) / 2) + 1
    taps = _fixed_point(_thrice(_box_filter(sigma, reach)))  # (N, 6 * reach + 1)
    n, channels, height, width = x.shape
    taps = taps.repeat_interleave(channels, 0)[:, None]  # (3N, 1, taps)
    edge = 3 * reach
    x = F.pad(x, (edge, edge, edge, edge), mode="replicate")
    x = x.view(1, n * channels, height + 2 * edge, width + 2 * edge)
    x = _rounded(F.conv2d(x, taps[:, :, None, :], groups=n * channels))
    x = _rounded(F.conv2d(x, taps[:, :, :, None], groups=n * channels))
    return x.view(n, channels, height, width)


def _box_filter(sigma: Tensor, reach: int) -> Tensor:
    """(N, 2 * reach + 1) weights of the box for each sigma (N, 1): whole pixels and a share of one
    more at either end, such that the variance of the box is sigma^2 / 3."""
    variance = sigma.square() / 3
    whole = (((12 * variance + 1).sqrt() - 1) / 2).floor()
    share = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance)
    share = share / (6 * (variance - (whole + 1).square()))
    distance = torch.arange(-reach, reach + 1, device=sigma.device).abs()
    box = torch.where(distance <= whole, 1.0, torch.where(distance == whole + 1, share, 0.0))
    return box / (2 * (whole + share) + 1)


def _thrice(box: Tensor) -> Tensor:
    """The (N, k) symmetric filter applied three times, as one filter (N, 3k - 2)."""
    taps, size = box, box.shape[1]
    for _ in range(2):
        windows = F.pad(taps, (size - 1, size - 1)).unfold(1, size, 1)
        taps = (windows * box[:, None]).sum(2)
    return taps


def _fixed_point(weights: Tensor) -> Tensor:
    """Weights as multiples of 2^-16: sums of their products with bytes fit into float32 exactly, so
    that a pixel is the same whatever order a sum runs in and whatever else is in the batch."""
    return (weights * 65536).round() / 65536


def _rounded(x: Tensor) -> Tensor:
    return (x + 0.5).floor().clamp(max=255)


def crop_all(pixels: Tensor, table: Tensor, size: int) -> Tensor:
    """The crops of N images of one size, each with its own box: `crop` for a whole batch.

    Resizing is a product with one matrix from the left and one from the right, whose rows are
    triangles as wide as the box is shrunk (Pillow's bilinear filter).

    Args:
        pixels: (N, 3, H, W) uint8.
        table: (N, 16) float32 on the same device, `ViewParams.table`.

    Returns:
        (N, 3, size, size) uint8.
    """
    top, left, height, width = table[:, :4, None, None].unbind(1)
    columns = _triangles(left, width, pixels.shape[3], size)  # (N, size, W)
    rows = _triangles(top, height, pixels.shape[2], size)  # (N, size, H)
    x = _rounded(_weighted(pixels.float(), columns))  # (N, 3, H, size)
    x = _rounded(_weighted(x.mT, rows)).mT
    return x.to(torch.uint8).contiguous()


def _weighted(x: Tensor, weights: Tensor) -> Tensor:
    """Sums along the last axis of x (N, 3, A, B) with weights (N, size, B): (N, 3, A, size). In two
    products, of the high and of the low 8 bits of the weights, either of which is exact even where
    matrix products run in TF32, with its 11 bits."""
    rows, high = x.flatten(1, 2), (weights * 256).floor() / 256
    return (rows @ high.mT + rows @ (weights - high).mT).unflatten(1, x.shape[1:3])


def _triangles(start: Tensor, length: Tensor, available: int, size: int) -> Tensor:
    """(N, size, available) weights; start and length (N, 1, 1) in pixels."""
    scale = length / size
    centre = (torch.arange(size, device=start.device).view(-1, 1) + 0.5) * scale
    pixel = torch.arange(available, device=start.device) + 0.5 - start  # (N, 1, available)
    weights = (1 - (pixel - centre).abs() / scale.clamp(min=1)).clamp(min=0)
    weights = torch.where((pixel > 0) & (pixel < length), weights, 0.0)
    return _fixed_point(weights / weights.sum(2, keepdim=True))
