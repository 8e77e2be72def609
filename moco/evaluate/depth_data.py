"""Depth maps to be predicted from an encoder's features: read, checked, resized like the images."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from moco.data.nyu import DepthImages
from moco.data.views import normalize, pixels_of
from moco.errors import DataError
from moco.evaluate.extraction import ImageEncoder, Loading
from moco.progress import progress


@dataclass
class Depths:
    """Depth maps in metres (N, S, S) float32, 0 where it is unknown."""

    metres: Tensor

    @property
    def known(self) -> Tensor:
        return self.metres > 0

    def mean_and_std(self) -> tuple[float, float]:
        """Of all known pixels, in metres."""
        values = self.metres[self.known].double()
        return values.mean().item(), values.std(correction=0).item()

    def pixel_means(self) -> Tensor:
        """(S, S) mean over the images; where no image knows it, that of all pixels."""
        count = self.known.sum(dim=0)
        mean = self.metres.double().sum(dim=0) / count.clamp(min=1)
        return torch.where(count > 0, mean, self.mean_and_std()[0]).float()

    def mse(self, predicted: Tensor | float) -> float:
        """Mean squared error in square metres over known pixels; `predicted` is broadcast."""
        error = (self.metres - predicted).double().square()
        return error[self.known].mean().item()

    def __getitem__(self, rows: list[int]) -> Depths:
        return Depths(self.metres[rows])


def squashed(image: Image.Image, size: int) -> Tensor:
    """The whole image as (3, S, S) uint8, bilinear: what depth gets by `nearest`."""
    return pixels_of(image.resize((size, size), Image.Resampling.BILINEAR))


def nearest(depth: np.ndarray, size: int) -> Tensor:
    """The whole map as (S, S), without mixing depths of different things."""
    whole = torch.from_numpy(np.ascontiguousarray(depth))[None, None]
    return F.interpolate(whole, (size, size), mode="nearest-exact")[0, 0]


def read_depths(pairs: DepthImages, size: int) -> Depths:
    """All depth maps, resized.

    Raises:
        DataError: a map of another size than its image, without any depth (or with none after the
            resizing, so that it would have no error), or constant; names the file.
    """
    maps = []
    for index, name in enumerate(pairs.names):
        depth = pairs.depth(index)
        image = pairs.images.load(index)
        if (image.height, image.width) != depth.shape:
            raise DataError(
                f"depth of {name} has {depth.shape[1]} x {depth.shape[0]} pixels, its image "
                f"{image.width} x {image.height}: both must show the same"
            )
        if not np.isfinite(depth).all() or depth.min() < 0:
            raise DataError(f"depth of {name} has values that are negative or not finite")
        if depth.max() == depth.min():
            what = "is 0 everywhere" if not depth.any() else f"is {depth.max():g} m everywhere"
            raise DataError(f"depth of {name} {what}; is the file damaged?")
        maps.append(nearest(depth, size))
        if not maps[-1].any():
            raise DataError(
                f"depth of {name} is known in so few pixels that none is left of {size} x {size}; "
                "give a greater --depth-size, or take the image out of the split"
            )
    return Depths(torch.stack(maps))


@torch.no_grad()
def layer_maps(encoder: ImageEncoder, layer: str, pairs: DepthImages, loading: Loading) -> Tensor:
    """What a layer puts out for the whole images, (N, C, H, W) float32 on the CPU.

    Args:
        encoder: of a chain (`moco.alexnet`), in eval mode.
    """
    encoder.module.to(loading.device).eval()
    found = []
    for rows in progress(torch.arange(len(pairs)).split(loading.batch_size), f"{layer} features"):
        pixels = [squashed(pairs.images.load(i), encoder.image_size) for i in rows.tolist()]
        images = normalize(torch.stack(pixels).to(loading.device), encoder.mean, encoder.std)
        found.append(encoder.module(images, layer=layer).float().cpu())
    return torch.cat(found)
