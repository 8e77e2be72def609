"""Views made of tensors: crop, colour jitter, greyscale, blur and flip of uint8 images, with the
rounding of Pillow's 8-bit arithmetic.

A loader process crops an image (`crop`); the device augments whole batches of crops
(`augment_on_device`), and crops too where it holds the images (`crop_on_device`). On a GPU there is
no loop over samples, and nothing waits for it. A CPU augments all but small images one by one, with
the same pixels.

Distance from `views.pil_view`, in levels of 255: crop at most 1; greyscale, flip, brightness,
contrast and saturation 0; hue differs in 1 % of the pixels; blur by 4 at most, 1 on average.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from moco.data.views import (
    BRIGHTNESS,
    COLUMNS,
    CONTRAST,
    HUE,
    SATURATION,
    Recipe,
    ViewParams,
)


def crop(pixels: Tensor, recipe: Recipe, params: ViewParams, i: int = 0) -> Tensor:
    """The crop of view number i of `params`, resized: (3, H, W) uint8 -> (3, S, S) uint8, within
    one level of Pillow's."""
    top, left, height, width = map(int, params.box[i])
    part = pixels[:, top : top + height, left : left + width].unsqueeze(0)
    # Interleaved colours are what torch's vectorised kernel for uint8 reads.
    part = part.contiguous(memory_format=torch.channels_last)
    size = (recipe.image_size, recipe.image_size)
    return F.interpolate(part, size, mode="bilinear", antialias=True).squeeze(0)


def crop_on_device(pixels: Tensor, params: Tensor, size: int) -> Tensor:
    """The crops of N images of one size, each with its own box: `crop` for a whole batch.

    Resizing is a product with one matrix from the left and one from the right, whose rows are
    triangles as wide as the box is shrunk (Pillow's bilinear filter).

    Args:
        pixels: (N, 3, H, W) uint8.
        params: (N, 16) float32 on the same device, `ViewParams.as_tensor`.

    Returns:
        (N, 3, size, size) uint8.
    """
    top, left, height, width = params[:, COLUMNS["box"], None, None].unbind(1)
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


# A CPU augments images of more numbers than this (74 x 74 pixels) one by one. With smaller ones,
# measured at 64 pixels, starting the operations takes longer than what they do.
ONE_BY_ONE = 2**14


def augment_on_device(crops: Tensor, params: Tensor, recipe: Recipe) -> Tensor:
    """Colour jitter, greyscale, blur and flip of N crops, each with its own parameters.

    Equal to `pil_view` after its crop up to a few levels: Pillow's arithmetic on 8-bit values is
    followed (truncation, quantised hue), but in float32, and blur rounds twice, not six times.

    Args:
        crops: (N, 3, S, S) uint8.
        params: (N, 16) float32 on the same device, `ViewParams.as_tensor`.

    Returns:
        (N, 3, S, S) uint8.
    """
    on_cpu = params.device.type == "cpu" and not torch.compiler.is_compiling()
    if on_cpu and crops.shape[1:].numel() > ONE_BY_ONE:
        return _one_by_one(crops, params, recipe)
    params = params[:, :, None, None, None]  # each column (N, 1, 1, 1)
    jitter, grey, flip, sigma, factors, order = (params[:, COLUMNS[name]] for name in _USED)
    x = _floats(crops)
    if recipe.grey_before_jitter and recipe.grey_p:
        x = torch.where(grey > 0, _luma(x), x)
    if recipe.jitter_p:
        x = torch.where(jitter > 0, _jittered(x, factors, order), x)
    if recipe.grey_p and not recipe.grey_before_jitter:
        x = torch.where(grey > 0, _luma(x), x)
    if recipe.blur_p:
        taps = _gaussian(sigma.flatten(1), recipe.blur_sigma[1])
        x = torch.where(sigma > 0, _blurred(x, taps), x)
    if recipe.flip_p:
        x = torch.where(flip > 0, x.flip(3), x)
    return x.to(torch.uint8)


_USED = ("jitter", "grey", "flip", "sigma", "factors", "order")


def _one_by_one(crops: Tensor, params: Tensor, recipe: Recipe) -> Tensor:
    """`augment_on_device` where the parameters can be looked at: one image after another, which
    then stays in the processor's cache, and only those operations that it has drawn."""
    made = torch.empty(crops.shape, dtype=torch.uint8)
    largest = recipe.blur_sigma[1]
    taps = _gaussian(params[:, COLUMNS["sigma"], None], largest)
    for i, (crop, row) in enumerate(zip(crops.split(1), params, strict=True)):
        jitter, grey, flip, sigma, factors, order = (row[COLUMNS[name]] for name in _USED)
        x = _floats(crop)
        if grey and recipe.grey_before_jitter:
            x = _luma(x).expand_as(x)
        if jitter:
            for kind in map(int, order):
                x = _adjusted(x, kind, factors[kind])
        if grey and not recipe.grey_before_jitter:
            x = _luma(x)
        if sigma:
            unused = 3 * (_reach(largest) - _reach(sigma.item()))
            x = _blurred_alike(x, taps[i, unused : taps.shape[1] - unused].tolist())
        pixels = x.to(torch.int16).to(torch.uint8)  # straight to uint8 takes four times as long
        made[i] = pixels.flip(3) if flip else pixels
    return made


def _adjusted(x: Tensor, kind: int, factor: Tensor) -> Tensor:
    """One operation of colour jitter, on images that share its factor, a tensor of one number."""
    if kind == HUE:
        return _hue_shifted(x, _hue_steps(factor).item())
    if kind == BRIGHTNESS:
        other = 0
    else:
        other = _luma(x) if kind == SATURATION else _mean(_luma(x)).item()
    return _blend(x, other, factor.item())


def _floats(crops: Tensor) -> Tensor:
    """float32, one channel after another in memory, as most operations want it."""
    return crops.to(torch.float32, memory_format=torch.contiguous_format)


def _luma(x: Tensor) -> Tensor:
    """(N, 3, H, W) -> (N, 1, H, W): the weights of ITU-R 601 in 16 bits, as Pillow has them. The
    sums are multiples of 2^-16 below 2^8, so float32 holds them exactly."""
    red, green, blue = x.split(1, dim=1)
    sum_ = (red * (19595 / 65536)).add_(green, alpha=38470 / 65536)
    sum_ = sum_.add_(blue, alpha=7471 / 65536)
    return sum_.add_(0.5).floor_()


def _mean(grey: Tensor) -> Tensor:
    """(N, 1, H, W) -> (N, 1, 1, 1), rounded."""
    return (grey.mean((1, 2, 3), keepdim=True) + 0.5).floor()


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
    x = _hue_shifted(x, _hue_steps(factors[:, HUE]))
    for turn in (1, 2, 3):
        x = _blended(x, after[:, turn], contrast[:, turn], saturation[:, turn])
    return x


def _blended(x: Tensor, factor: Tensor, contrast: Tensor, saturation: Tensor) -> Tensor:
    """A blend by `factor` with the mean grey where `contrast`, with the grey image where
    `saturation`, else with black (all (N, 1, 1, 1))."""
    grey = _luma(x)
    return _blend(x, torch.where(saturation, grey, _mean(grey) * contrast), factor)


def _blend(x: Tensor, other: Tensor | float, factor: Tensor | float) -> Tensor:
    return (x - other).mul_(factor).add_(other).clamp_(0, 255).floor_()


def _hue_steps(factor: Tensor) -> Tensor:
    """How far `_hue_shifted` goes for a factor in parts of a circle: 0 to 255, whole."""
    return (factor * 255).trunc().remainder(256)


def _hue_shifted(x: Tensor, steps: Tensor | float) -> Tensor:
    """Rotate the hue by `steps` 256ths of a circle, in HSV of 8 bits each as Pillow has it: there
    and back is not without loss, even for 0 steps.

    Args:
        steps: (N, 1, 1, 1), or one number for all.
    """
    red, green, blue = x.split(1, dim=1)
    high = torch.maximum(red, torch.maximum(green, blue))
    low = torch.minimum(red, torch.minimum(green, blue))
    chroma = high - low
    # Cyan is in the middle of the circle from red to red. What a colour is away from there, in
    # sixths of the circle, on the side of yellow where green >= blue, else on that of magenta:
    away = (red - green).sub_(blue).add_(high, alpha=2).sub_(low).div_(chroma.clamp(min=1))
    away = away.copysign_(green - blue)
    hue = away.mul_(-42.5).add_(127.5).floor_().add_(steps)  # 255 / 6
    hue = hue.sub_((hue / 256).floor_(), alpha=256).div_(42.5)  # sixths, from red
    depth = (chroma / high.clamp(min=1)).mul_(255).floor_().div_(255).mul_(high)
    high = high + 0.5
    # How far a channel is from its full value towards its lowest, if below 0 or above 1 cut there.
    shares = 2 - (hue - 3).abs_(), (hue - 2).abs_() - 1, (hue - 4).abs_() - 1
    channels = [torch.addcmul(high, share.clamp_(0, 1), depth, value=-1) for share in shares]
    return torch.cat(channels, dim=1).floor_()


def _blurred(x: Tensor, taps: Tensor) -> Tensor:
    """(N, C, H, W) filtered along the rows and along the columns with taps (N, 2 * edge + 1)."""
    n, channels, height, width = x.shape
    taps = taps.repeat_interleave(channels, 0)[:, None]  # (CN, 1, taps)
    x = _padded(x, edge := taps.shape[2] // 2)
    x = x.view(1, n * channels, height + 2 * edge, width + 2 * edge)
    x = _rounded(F.conv2d(x, taps[:, :, None, :], groups=n * channels))
    x = _rounded(F.conv2d(x, taps[:, :, :, None], groups=n * channels))
    return x.view(n, channels, height, width)


def _blurred_alike(x: Tensor, taps: list[float]) -> Tensor:
    """`_blurred` where all images have the same taps, by sums of shifted images: on a CPU twice as
    fast as a convolution."""
    edge, sizes = len(taps) // 2, x.shape
    x = _padded(x, edge)
    for dim in (3, 2):
        total = x.narrow(dim, edge, sizes[dim]) * taps[edge]
        for i in range(1, edge + 1):
            both = x.narrow(dim, edge - i, sizes[dim]) + x.narrow(dim, edge + i, sizes[dim])
            total.add_(both, alpha=taps[edge + i])
        x = _rounded(total)
    return x


def _padded(x: Tensor, edge: int) -> Tensor:
    return F.pad(x, (edge, edge, edge, edge), mode="replicate")


def _gaussian(sigma: Tensor, largest: float) -> Tensor:
    """(N, 2 * edge + 1) taps of Gaussian blur as Pillow has it, by three box filters with
    fractional ends (Gwosdek et al., SSVM 2011); sigma (N, 1) of at most `largest`."""
    return _fixed_point(_thrice(_box_filter(sigma, _reach(largest))))


def _reach(sigma: float) -> int:
    """How many pixels each box filter for sigma goes to either side."""
    return int((math.sqrt(4 * sigma**2 + 1) - 1) / 2) + 1


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
    return (x + 0.5).floor_().clamp_(max=255)
