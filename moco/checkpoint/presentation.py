"""How images are presented to an encoder from a file: size, mean and standard deviation."""

from __future__ import annotations

import math

from torch import nn

from moco.config import IMAGENET_MEAN, IMAGENET_STD
from moco.errors import CheckpointError


def image_settings(encoder: nn.Module, info: dict) -> tuple[int, list[float], list[float]]:
    """(image size, mean, std) of the training images; ImageNet's where the file has none.

    Raises:
        CheckpointError: the checkpoint has impossible values.
    """
    args = info["args"]
    size = args.get("image_size", getattr(encoder, "image_size", 224))  # a ViT has one size
    mean, std = args.get("mean", IMAGENET_MEAN), args.get("std", IMAGENET_STD)
    for name, values in (("mean", mean), ("std", std)):
        if not (
            isinstance(values, (list, tuple))
            and len(values) == 3
            and all(isinstance(v, (int, float)) and math.isfinite(v) for v in values)
            and (name == "mean" or min(values) > 0)
        ):
            raise CheckpointError(f"the checkpoint's {name} is {values!r}, expected three numbers")
    if not isinstance(size, int) or size < 1:
        raise CheckpointError(f"the checkpoint's image size is {size!r}, expected a number >= 1")
    return size, list(mean), list(std)
