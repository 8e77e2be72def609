"""Centre crop of a resized image without the rest of it: for images so thin that, resized to a
given shorter side, they would fill the memory (20000 x 1 pixels: 256 x 5,120,000).
"""

from __future__ import annotations

import functools

import numpy as np
from PIL import Image

_BITS = 22  # of Pillow's fixed-point weights


def resized_centre(image: Image.Image, resized: tuple[int, int], size: int) -> Image.Image:
    """The centre, (size, size), of `image.resize(resized, BILINEAR)`, pixel for pixel.

    Pillow's arithmetic: one pass along each axis, weights of 22 bits, 8 bits in between.

    Args:
        image: RGB, eight times as long as it is wide or more.
        resized: width and height of the whole, in the same ratio, at least `size` each.
    """
    (left, x_weights), (top, y_weights) = (
        _window(length, out, round((out - size) / 2), size)
        for length, out in zip(image.size, resized, strict=True)
    )
    right, bottom = left + x_weights.shape[1], top + y_weights.shape[1]
    pixels = np.asarray(image.crop((left, top, right, bottom)))  # (H, W, 3)
    passes = [(x_weights, 1), (y_weights, 0)]
    if image.height > image.width and resized[1] < image.height and _tall_by_columns():
        passes.reverse()
    for weights, axis in passes:
        pixels = _weighted(pixels.swapaxes(0, axis), weights).swapaxes(0, axis)
    return Image.fromarray(np.ascontiguousarray(pixels))


@functools.cache
def _tall_by_columns() -> bool:
    """Whether this version of Pillow shrinks tall images along their columns first: 13 does."""
    noise = np.random.default_rng(0).integers(0, 256, (480, 30, 3), dtype=np.uint8)
    tall, bilinear = Image.fromarray(noise), Image.Resampling.BILINEAR
    by_columns = tall.resize((30, 320), bilinear).resize((20, 320), bilinear)
    return by_columns.tobytes() == tall.resize((20, 320), bilinear).tobytes()


def _window(length: int, out: int, first: int, count: int) -> tuple[int, np.ndarray]:
    """Weights for `count` of the `out` pixels, from `first` on, that a line of `length` pixels is
    resized to: triangles, as wide as the line is shrunk.

    Returns:
        Number of the first pixel of the line that has a weight, and (count, pixels) int64.
    """
    scale = length / out
    reach = max(scale, 1.0)
    centres = (np.arange(first, first + count) + 0.5) * scale
    starts = np.maximum((centres - reach + 0.5).astype(np.int64), 0)
    ends = np.minimum((centres + reach + 0.5).astype(np.int64), length)
    weights = np.zeros((count, ends[-1] - starts[0]))
    for row, centre, start, end in zip(weights, centres, starts, ends, strict=True):
        distance = np.abs((np.arange(start, end) - centre + 0.5) * (1 / reach))
        weight = np.maximum(1 - distance, 0)
        row[start - starts[0] : end - starts[0]] = weight / sum(weight.tolist())
    return int(starts[0]), (0.5 + weights * 2**_BITS).astype(np.int64)


def _weighted(lines: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(pixels, M, 3) uint8 -> (count, M, 3) uint8."""
    sums = np.tensordot(weights, lines.astype(np.int64), axes=1) + 2 ** (_BITS - 1)
    return (sums >> _BITS).clip(0, 255).astype(np.uint8)
