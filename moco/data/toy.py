"""Toy data set: small textured JPEG files in ImageFolder layout, for runs of minutes on a CPU.

Twelve classes are told apart by structure alone (stripes, dots, bricks, ...). All that differs
between two images of one class is what the augmentation destroys: position, scale, blur, noise
and, within one palette, colour (and a slight tilt). With free colours both objectives learn to
tell the images by their colour and the textures are lost.

An image is a function of (seed, split, class, index): the same arguments give the same bytes
(with the same numpy and Pillow), and asking for more images leaves the first ones as they were.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter
from tqdm import tqdm

VERSION = 1  # of the pictures: raise it whenever the same settings give other images
SPLITS = ("train", "val")
OVERSAMPLING = 3  # sub-pixels per pixel and axis

# Nuisance, drawn anew for each image.
CELLS = (2.5, 4.5)  # periods of the texture across the image
ROTATION = 10.0  # degrees either way
INK, PAPER = (185, 170, 145), (80, 90, 105)  # RGB of the base palette ...
PALETTE_RANGE = 30  # ... and how far each channel strays from it
BLUR = (0.0, 0.8)  # radius in pixels, at 64 pixels
NOISE = (2.0, 10.0)  # standard deviation in levels
JPEG_QUALITY = (75, 95)

Array = np.ndarray
Texture = Callable[[Array, Array, np.random.Generator], Array]


def centred(x: Array) -> Array:
    """Coordinate within a cell, counted from the cell's middle: -0.5 to 0.5."""
    return x % 1 - 0.5


def checker(x: Array, y: Array) -> Array:
    return (np.floor(x) + np.floor(y)) % 2 == 0


def crosses(x: Array, y: Array, rng: np.random.Generator) -> Array:
    u, v = np.abs(centred(x)), np.abs(centred(y))
    return (np.minimum(u, v) < 0.12) & (np.maximum(u, v) < 0.4)


def triangles(x: Array, y: Array, rng: np.random.Generator) -> Array:
    u, v = np.abs(centred(x)), centred(y)
    return (np.abs(v) < 0.4) & (u < (v + 0.4) / 2)


def bricks(x: Array, y: Array, rng: np.random.Generator) -> Array:
    shifted = x / 2 + np.floor(y) / 2
    return (shifted % 1 > 0.12) & (y % 1 > 0.25)


def spirals(x: Array, y: Array, rng: np.random.Generator) -> Array:
    u, v = centred(x / 3), centred(y / 3)
    return (3 * np.hypot(u, v) + np.arctan2(v, u) / (2 * np.pi)) % 1 < 0.5


def blobs(x: Array, y: Array, rng: np.random.Generator) -> Array:
    """Where a sum of twelve plane waves of random direction and phase is positive."""
    direction, phase = rng.uniform(0, 2 * np.pi, (2, 12, 1, 1))
    waves = np.cos(4.5 * (np.cos(direction) * x + np.sin(direction) * y) + phase)
    return waves.sum(0) > 0


# The order seeds the classes: add new ones at the end.
# Plane coordinates, in units of one period, -> where there is ink.
TEXTURES: dict[str, Texture] = {
    "stripes": lambda x, y, rng: x % 1 < 0.5,
    "zigzag": lambda x, y, rng: (y + np.abs(x % 2 - 1)) % 1 < 0.5,
    "checker": lambda x, y, rng: checker(x, y),
    "dots": lambda x, y, rng: np.hypot(centred(x), centred(y)) < 0.32,
    "rings": lambda x, y, rng: np.abs(np.hypot(centred(x), centred(y)) - 0.31) < 0.11,
    "crosses": crosses,
    "triangles": triangles,
    "grid": lambda x, y, rng: (x % 1 < 0.25) | (y % 1 < 0.25),
    "bricks": bricks,
    "weave": lambda x, y, rng: np.where(checker(x, y), 2 * x, 2 * y) % 1 < 0.5,
    "spirals": spirals,
    "blobs": blobs,
}


def ink_map(texture: Texture, size: int, rng: np.random.Generator) -> Array:
    """Share of ink in each pixel, (size, size), of a texture seen from a random viewpoint."""
    side = size * OVERSAMPLING
    y, x = (np.mgrid[:side, :side] + 0.5) / side * rng.uniform(*CELLS)
    angle = np.deg2rad(rng.uniform(-ROTATION, ROTATION))
    x, y = np.cos(angle) * x - np.sin(angle) * y, np.sin(angle) * x + np.cos(angle) * y
    shift_x, shift_y = rng.uniform(0, 6, 2)
    ink = texture(x + shift_x, y + shift_y, rng)
    return ink.reshape(size, OVERSAMPLING, size, OVERSAMPLING).mean((1, 3))


def make_image(name: str, size: int, seed: int, split: str, index: int) -> tuple[Image.Image, int]:
    """Image `index` of a class, and the JPEG quality it is to be saved with."""
    key = [seed, SPLITS.index(split), list(TEXTURES).index(name), index]
    rng = np.random.default_rng(key)
    ink = ink_map(TEXTURES[name], size, rng)[..., None]
    colour, paper = np.array((INK, PAPER)) + rng.uniform(-PALETTE_RANGE, PALETTE_RANGE, (2, 3))
    image = Image.fromarray((ink * colour + (1 - ink) * paper).round().astype(np.uint8))
    image = image.filter(ImageFilter.GaussianBlur(rng.uniform(*BLUR) * size / 64))
    noise = rng.normal(0, rng.uniform(*NOISE), (size, size, 3))
    pixels = (np.asarray(image) + noise).round().clip(0, 255).astype(np.uint8)
    return Image.fromarray(pixels), int(rng.integers(*JPEG_QUALITY, endpoint=True))


def make_dataset(
    out: Path, train_per_class: int = 150, val_per_class: int = 40, size: int = 64, seed: int = 0
) -> bool:
    """Write `out`/train/CLASS/*.jpg and `out`/val/CLASS/*.jpg.

    `out`/toy.json, which comes last, holds the settings: a finished folder with the same settings
    is used again, and an unfinished one is started over.

    Returns:
        Whether images were written; False for a finished folder.

    Raises:
        FileExistsError: `out` holds anything else.
    """
    counts = dict(zip(SPLITS, (train_per_class, val_per_class), strict=True))
    settings = {"version": VERSION, "per_class": counts, "size": size, "seed": seed}
    finished, unfinished = out / "toy.json", out / "toy.json.unfinished"
    if finished.is_file():
        if read_settings(finished) == settings:
            return False
        raise FileExistsError(f"{out} holds a toy dataset of other settings ({finished})")
    if unfinished.is_file():
        for split in SPLITS:
            shutil.rmtree(out / split, ignore_errors=True)
    elif out.exists() and any(entry.name != ".DS_Store" for entry in out.iterdir()):
        raise FileExistsError(f"{out} is not empty, and is no toy dataset")

    out.mkdir(parents=True, exist_ok=True)
    unfinished.write_text(json.dumps(settings) + "\n", encoding="utf-8")
    jobs = [(split, name, i) for split in SPLITS for name in TEXTURES for i in range(counts[split])]
    for split, name, index in tqdm(jobs, desc="toy dataset", unit="img", leave=False):
        path = out / split / name / f"{index:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        image, quality = make_image(name, size, seed, split, index)
        image.save(path, quality=quality)
    os.replace(unfinished, finished)
    return True


def read_settings(path: Path) -> object:
    """Content of a JSON file, or None if it is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None
