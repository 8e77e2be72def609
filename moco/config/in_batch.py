"""The config of train_in_batch.py: one encoder, both views of a batch, losses within the batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moco.config.objective import check_terms, formula, number
from moco.config.option import LEARNS, Part, flag_of, flat_values, option
from moco.config.parts import (
    Launch,
    Placement,
    check_batch,
    check_views,
    check_whole_batch,
)
from moco.config.pretrain import (
    PretrainData,
    PretrainOptim,
    PretrainSchedule,
    Saving,
    Speed,
    Watching,
)

TASK = "in-batch"
SUPERVISED = "cross-entropy of a linear classifier on the unit output"
# Of STL-10's training images, as the public code of arXiv:2005.10242 has them.
STL10_MEAN = (0.44087801806139126, 0.42790631331699347, 0.3867879370752931)
STL10_STD = (0.26826768628079806, 0.2610450402318512, 0.26866836876860795)
# Defaults where they differ from main_moco.py's: STL-10's in that code, of other data sets the
# paper's (appendix B.1).
IN_BATCH_DEFAULTS = {"batch_size": 768, "epochs": 200, "schedule": (155, 170, 185)}
DATASET_DEFAULTS: dict[str, dict] = {
    "cifar10": {"image_size": 32},
    "cifar100": {"image_size": 32},
    "nyu": {
        "arch": "depth_cnn",
        "image_size": 128,
        "batch_size": 128,
        "epochs": 400,
        "schedule": (310, 340, 370),
    },
}


@dataclass(frozen=True, kw_only=True)
class InBatchData(PretrainData):
    """data

    dataset: folder of images; one that torchvision has already put into DIR (cifar10 may be an
        image folder); nyu: images/, depths/, train.txt and val.txt (%(default)s)
    drop_last: leave out the last batch of an epoch where it is not a whole one
    """

    dataset: str = option(
        "folder", "--dataset", LEARNS, since="folder",
        choices=("folder", "cifar10", "cifar100", "stl10", "nyu"),
    )  # fmt: skip
    drop_last: bool = option(False, "--drop-last", LEARNS, since=False)


@dataclass(frozen=True, kw_only=True)
class InBatchEncoder(Part):
    """encoder

    arch: small_alexnet, depth_cnn (both also with a width, small_alexnetx0.25), a torchvision
        classifier or a CIFAR ResNet (%(default)s). depth_cnn is this project's own: the paper's
        network for depth is published nowhere
    small_stem: ResNet stem for images of 32 to 64 pixels
    dim: feature dimension (%(default)s)
    """

    arch: str = option("small_alexnet", "-a --arch", LEARNS, metavar="ARCH")
    small_stem: bool = option(False, "--small-stem", LEARNS)
    dim: int = option(128, "--dim", LEARNS, least=1)


@dataclass(frozen=True, kw_only=True)
class InBatchObjective(Part):
    """objective: contr_w * InfoNCE(tau) + align_w * align(alpha) + unif_w * uniform(t), within the
    batch; terms of weight 0 are logged

    contr_w: weight of InfoNCE (default 0)
    contr_tau: its temperature (default 0.5)
    align_w: weight of alignment (default 1)
    align_alpha: its exponent (default 2)
    unif_w: weight of uniformity, the mean over both views (default 1)
    unif_t: its t (default 2)
    supervised: in place of these, cross-entropy of a linear classifier on the unit output
    """

    contr_w: float = number(0.0, "--contr-w")
    contr_tau: float = number(0.5, "--contr-tau")
    align_w: float = number(1.0, "--align-w")
    align_alpha: float = number(2.0, "--align-alpha")
    unif_w: float = number(1.0, "--unif-w")
    unif_t: float = number(2.0, "--unif-t")
    supervised: bool = option(False, "--supervised", LEARNS, since=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        least = {"contr_tau": 0, "align_alpha": 1 if self.align_w else 0, "unif_t": 0}
        check_terms(self, least, ", or --supervised", enough=self.supervised)

    @classmethod
    def from_options(cls, given: dict) -> InBatchObjective:
        """From parsed options; --supervised has no weights."""
        if given["supervised"]:
            for field in dataclasses.fields(cls):
                if field.name.endswith("_w") and given.get(field.name):
                    raise ValueError(
                        f"--supervised trains by cross-entropy alone; leave out {flag_of(field)}"
                    )
            given |= {"contr_w": 0.0, "align_w": 0.0, "unif_w": 0.0}
        return cls(**given)


def in_batch_formula(values: Mapping[str, Any]) -> str:
    """The objective for people to read, from its numbers by their flat names."""
    if values["supervised"]:
        return SUPERVISED
    return formula(
        values,
        contr="InfoNCE(tau={:g}, in batch)",
        align="align(alpha={:g})",
        unif="uniform(t={:g}, mean of both views)",
    )


@dataclass(frozen=True, kw_only=True)
class InBatchViews(Part):
    """views: random crop, flip, colour jitter (0.4, 0.4, 0.4, 0.4), then grey with probability 0.2

    image_size: 64, with cifar10 32, with nyu 128 (%(default)s)
    crop_scale: share of the area; default %(default)s
    views: cpu: all by Pillow in loader processes; device: they decode and crop, the device does
        the colour (%(default)s)
    """

    image_size: int = option(64, "--image-size", LEARNS, least=1, metavar="PX")
    crop_scale: tuple[float, float] = option(
        (0.08, 1.0), "--crop-scale", LEARNS, metavar=("MIN", "MAX")
    )
    views: str = option("cpu", "--views", LEARNS, since="cpu", choices=("cpu", "device"))
    mean: tuple[float, float, float] = option(STL10_MEAN, "--mean", LEARNS, metavar=("R", "G", "B"))
    std: tuple[float, float, float] = option(STL10_STD, "--std", LEARNS, metavar=("R", "G", "B"))

    def __post_init__(self) -> None:
        super().__post_init__()
        check_views(self)


@dataclass(frozen=True, kw_only=True)
class InBatchOptim(PretrainOptim):
    """optimisation

    lr: initial learning rate; auto: 0.12 x batch size / 256 (auto)
    accumulate: main_moco.py's; 1 only, since losses within the batch need all of it at once
    """

    lr: float | None = option(None, "--lr --learning-rate", LEARNS, least=0, kind="auto_rate")


def auto_rate(batch_size: int) -> float:
    """The learning rate of arXiv:2005.10242, appendix B.1."""
    return 0.12 * batch_size / 256


@dataclass(frozen=True, kw_only=True)
class InBatchConfig:
    """All of train_in_batch.py, where a learning rate of None becomes that of `auto_rate`."""

    data: InBatchData
    encoder: InBatchEncoder = InBatchEncoder()
    objective: InBatchObjective = InBatchObjective()
    views: InBatchViews = InBatchViews()
    optim: InBatchOptim = InBatchOptim(batch_size=IN_BATCH_DEFAULTS["batch_size"])
    schedule: PretrainSchedule = PretrainSchedule(epochs=200, schedule=(155, 170, 185))
    speed: Speed = Speed()
    saving: Saving = Saving()
    watching: Watching = Watching()
    launch: Launch = Launch()
    placement: Placement = Placement()

    def __post_init__(self) -> None:
        if self.optim.batch_size < 2:
            raise ValueError(
                f"--batch-size {self.optim.batch_size} has no second image; losses within a batch "
                "need at least two"
            )
        check_batch(self.optim, self.placement)
        check_whole_batch(self.optim.accumulate)
        if self.objective.supervised and self.data.dataset == "nyu":
            raise ValueError("--supervised needs labels of classes, which nyu does not have")
        if self.optim.amp == "fp16" and self.placement.devices[0] == "cpu":
            raise ValueError("--amp fp16 needs a GPU; use bf16 or off on the CPU")

    @property
    def part_size(self) -> int:
        """Images of this process at a time; both views of them go through the encoder together."""
        return self.optim.batch_size // self.placement.processes

    def to_flat(self) -> dict[str, Any]:
        """The values by their flat names, as JSON and `weights_only` can hold them."""
        flat = flat_values(self)
        return {
            **flat,
            "task": TASK,
            "objective": in_batch_formula(flat),
            "bn_group_size": self.part_size,  # images, of two views each
        }
