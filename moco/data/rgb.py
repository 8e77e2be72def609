"""One image, from a file or from bytes, as 8-bit RGB pixels."""

from __future__ import annotations

import contextlib
import io
import os
import warnings
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageFile

from moco.errors import DataError

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
    return _read(path, path)


def rgb_of(data: bytes, name: str) -> Image.Image:
    """`load_rgb` of what would be in the file.

    Args:
        name: of the image, for the error.
    """
    return _read(io.BytesIO(data), name)


def _read(source: str | os.PathLike | BinaryIO, name: str | os.PathLike) -> Image.Image:
    try:
        with _refusing_truncated(), Image.open(source) as image:
            if image.width * image.height > MAX_PIXELS:
                raise DataError(f"{image.width} x {image.height} pixels, the most is {MAX_PIXELS}")
            if image.format in ("EPS", "WMF"):  # Pillow would start another program to draw it
                raise DataError(f"a drawing ({image.format}), not pixels")
            return _to_rgb(image)
    except Exception as error:  # a damaged file can make Pillow's readers fail in any way
        reason = str(error) or type(error).__name__
        if isinstance(error, Image.UnidentifiedImageError):
            reason = "its beginning is not that of any image format"
        raise DataError(f"cannot read image {name}: {reason}; replace or remove it") from error


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
