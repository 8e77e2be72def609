"""--preset of main_moco.py: values for a dozen flags by the size and number of the images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moco.config.option import FREE, Part, option


@dataclass(frozen=True, kw_only=True)
class Preset(Part):
    """preset: values for many flags at once; flags that are given win

    preset: small: for 500 to 100,000 images and one CPU; architecture, image size, views, queue,
        groups, batch, rates and epochs by the size and number of the images, as is printed
    """

    preset: str | None = option(None, "--preset", FREE, choices=("small",))
    chosen: str = option("", "", FREE)  # what it stands for, for people to read


@dataclass(frozen=True)
class Row:
    """Values by their flat names for images up to `most`, and where they were found to work."""

    most: float
    values: Mapping[str, Any]
    why: str


LEAST, MOST = 500, 100_000  # images
QUEUE_SHARE = 0.1  # of the images; recipes had 0.07 to 0.4
# The same for all: a network that one CPU core trains, MoCo v2's views, head and schedule, and a
# key encoder that follows within a few hundred steps.
ALWAYS = {"arch": "resnet8x2s2", "mlp": True, "aug_plus": True, "cos": True, "moco_m": 0.99}
BY_SIDE = (
    Row(48, {"image_size": 32, "blur": False}, "trained at 32, as CIFAR-10's, without blur"),
    Row(float("inf"), {"image_size": 64, "blur": True}, "trained at 64, more takes a CPU too long"),
)
CIFAR = {"batch_size": 128, "group_size": "32", "lr": 0.06, "weight_decay": 5e-4}
BY_COUNT = (
    Row(
        2_499,
        {"batch_size": 64, "group_size": "8", "lr": 0.03, "weight_decay": 1e-4, "epochs": 60},
        "as scripts/quickstart.sh, longer",
    ),
    Row(9_999, {**CIFAR, "epochs": 30}, "as the recipe cifar10-core, longer"),
    Row(MOST, {**CIFAR, "epochs": 20}, "as the recipe cifar10-core, longer"),
)
# What a preset has a value for.
CHOSEN = (*ALWAYS, *BY_SIDE[0].values, *BY_COUNT[0].values, "moco_k")


def small_preset(count: int, side: int, given: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """Values of the preset by their flat names, and in a sentence what they rest on.

    Args:
        count: images.
        side: the shorter side of most of them, in pixels.
        given: values that the command line has, by their flat names; they win.

    Raises:
        ValueError: too few images, or too many.
    """
    if not LEAST <= count <= MOST:
        few = count < LEAST
        raise ValueError(
            f"--preset small is for {LEAST} to {MOST} images, got {count}: "
            + (
                "too few to train on from scratch; take an encoder that was trained on others "
                "(scripts/extract_features.py FILE DIR, with labels main_lincls.py --pretrained "
                "FILE DIR), or give the flags without --preset"
                if few
                else "give the flags without --preset, as scripts/imagenet_align_uniform.sh does"
            )
        )
    by_side = next(row for row in BY_SIDE if side <= row.most)
    by_count = next(row for row in BY_COUNT if count <= row.most)
    values = {**ALWAYS, **by_side.values, **by_count.values, **given}
    batch = values["batch_size"]
    values.setdefault("moco_k", max(2, int(QUEUE_SHARE * count) // batch) * batch)
    group = by_count.values["group_size"]
    if "group_size" not in given and ("bn_splits" in given or batch % int(group)):
        values["group_size"] = "auto"
    why = (
        f"{count} images: {by_count.why}; of {side} pixels: {by_side.why}; the queue is a tenth of "
        "the images, so that it seldom holds a view of the query's own"
    )
    return values, why
