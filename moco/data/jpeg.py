"""Ordinary JPEGs as pixel tensors by torchvision, where its pixels are Pillow's.

Pillow's image has to be copied twice to become a tensor, torchvision's decoder writes into one.
What is not an ordinary JPEG (grey, CMYK, 12 bits, cut off, followed by something, very large) is
left to `moco.data.rgb`, with its decisions and errors.
"""

from __future__ import annotations

import functools
import io
import warnings

import numpy as np
import torch
import torchvision
from PIL import Image
from torch import Tensor

from moco.data.rgb import MAX_PIXELS

try:
    from torchvision.io import decode_jpeg
except ImportError:
    decode_jpeg = None
# Versions before (0.21 and 0.26 were tried) fill in otherwise what damage has taken.
SINCE = (0, 29)
# From 0.29 on it says so of each call; once it is gone, Pillow decodes.
warnings.filterwarnings("ignore", "The image decoding and encoding", DeprecationWarning)

_FRAMES = (0xC0, 0xC1, 0xC2)  # baseline, extended, progressive: what both decoders know
_ALONE = (0x01, *range(0xD0, 0xD8))  # markers without a length


def decode_plain(data: bytes) -> Tensor | None:
    """(3, H, W) uint8 of an ordinary JPEG, None of anything else."""
    if not is_plain(data):
        return None
    try:
        return decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    except RuntimeError:  # damaged: Pillow judges
        return None


def is_plain(data: bytes) -> bool:
    """Whether this is a whole JPEG of three 8-bit components, as far as its headers say."""
    if data[:2] != b"\xff\xd8" or data[-2:] != b"\xff\xd9":
        return False
    at = 2
    while at + 10 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF or marker in _ALONE:
            at += 1 if marker == 0xFF else 2
            continue
        if marker in _FRAMES:
            bits, components = data[at + 4], data[at + 9]
            height, width = (int.from_bytes(data[at + i : at + i + 2], "big") for i in (5, 7))
            return bits == 8 and components == 3 and 0 < height * width <= MAX_PIXELS
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return False


@functools.cache
def equals_pillow() -> bool:
    """Whether torchvision's decoder is there and gives Pillow's pixels, tried on a few images of
    each way in which colours and scans are stored."""
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (9, 11, 3), dtype=np.uint8))
    picture = small.resize((123, 85), Image.Resampling.BICUBIC)
    version = tuple(int(part) for part in torchvision.__version__.split(".")[:2])
    if decode_jpeg is None or version < SINCE:
        return False
    for subsampling in ("4:4:4", "4:2:2", "4:2:0"):
        for more in ({"quality": 95}, {"quality": 40, "progressive": True}):
            file = io.BytesIO()
            picture.save(file, "JPEG", subsampling=subsampling, **more)
            ours = decode_plain(file.getvalue())
            theirs = torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1)
            if ours is None or not torch.equal(ours, theirs):
                return False
    return True
