"""The config of main_moco.py: objective, encoder, views, optimisation, saving, watching."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moco.config.objective import PARAMETERS, check_terms, formula, number, slug
from moco.config.option import FREE, LEARNS, ROUNDS, Part, flag_of, flat_values, option
from moco.config.parts import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Data,
    Folder,
    Launch,
    Optim,
    Placement,
    Schedule,
    check_batch,
    check_views,
)
from moco.config.preset import Preset


@dataclass(frozen=True, kw_only=True)
class Objective(Part):
    """objective: contr_w * InfoNCE(tau) + align_w * align(alpha) + unif_w * uniform(t)

    contr_w: weight of InfoNCE (default 0)
    contr_tau: its temperature (default 0.07)
    align_w: weight of alignment (default 3)
    align_alpha: its exponent (default 2)
    unif_w: weight of uniformity (default 1)
    unif_t: its t (default 3)
    intra_batch: query-queue pairs only (Eq. 21 instead of 22)
    moco_t: InfoNCE alone with this temperature, as in upstream MoCo
    symmetric: each view is query and key in turn: both losses are summed, and the keys of both
        views enter the queue
    """

    contr_w: float = number(0.0, "--moco-contr-w")
    contr_tau: float = number(0.07, "--moco-contr-tau")
    align_w: float = number(3.0, "--moco-align-w")
    align_alpha: float = number(2.0, "--moco-align-alpha")
    unif_w: float = number(1.0, "--moco-unif-w")
    unif_t: float = number(3.0, "--moco-unif-t")
    intra_batch: bool = option(True, "--moco-unif-no-intra-batch", LEARNS)
    moco_t: float | None = option(None, "--moco-t", FREE)
    symmetric: bool = option(False, "--symmetric", LEARNS, since=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        least = {"contr_tau": 0, "align_alpha": 1, "unif_t": 0}
        counted = [p for name, p in PARAMETERS.items() if getattr(self, f"{name}_w")]
        check_terms(self, {parameter: least[parameter] for parameter in counted})

    @classmethod
    def from_options(cls, given: dict) -> Objective:
        """From parsed options: --moco-t is InfoNCE alone."""
        tau = given["moco_t"]
        if tau is not None:
            numbers = [
                field
                for field in dataclasses.fields(cls)
                if field.metadata["unset"] and field.name in given
            ]
            if numbers or not given["intra_batch"]:
                flag = flag_of(numbers[0]) if numbers else "--moco-unif-no-intra-batch"
                raise ValueError(
                    f"--moco-t (InfoNCE alone) cannot be combined with {flag}; give "
                    "--moco-contr-w, --moco-contr-tau and the other weights instead"
                )
            if not 0 < tau < math.inf:
                raise ValueError(f"--moco-t must be positive, got {tau:g}")
            given |= {"contr_w": 1.0, "contr_tau": tau, "align_w": 0.0, "unif_w": 0.0}
        return cls(**given)


def objective_formula(values: Mapping[str, Any]) -> str | None:
    """The objective as a formula for people to read, from its numbers by their flat names; from
    files without numbers what they say, None where they say nothing."""
    if "intra_batch" not in values:  # of another task, or of a file without numbers
        return values.get("objective")
    pairs = "with intra-batch pairs" if values["intra_batch"] else "queue only"
    text = formula(
        values,
        contr="InfoNCE(tau={:g})",
        align="align(alpha={:g})",
        unif=f"uniform(t={{:g}}, {pairs})",
    )
    return f"{text}, symmetric" if values.get("symmetric") else text


def objective_slug(objective: Part) -> str:
    """The objective as part of a folder's name, also of in-batch training."""
    text = slug(vars(objective), contr="nce{:g}", align="align{:g}", unif="unif{:g}")
    return f"{text}-sym" if getattr(objective, "symmetric", False) else text


@dataclass(frozen=True, kw_only=True)
class Encoder(Part):
    """MoCo

    arch: a torchvision classifier, or one of resnet8, resnet8x2s2, resnet8x4, resnet20 for
        small images (%(default)s)
    small_stem: ResNet stem for images of 32 to 64 pixels
    moco_dim: feature dimension (%(default)s)
    moco_k: queue size (%(default)s)
    moco_m: momentum of the key encoder (%(default)s)
    mlp: two-layer projection head (MoCo v2)
    group_size: images of a group, which has batch-norm statistics, intra-batch pairs and the log of
        the uniformity loss of its own, as one device of the published runs had; auto: 32, or the
        size nearest to it that fits the batch, in at least two groups
    bn_splits: the same, as groups per device (and part)
    """

    arch: str = option("resnet50", "-a --arch", LEARNS, metavar="ARCH")
    small_stem: bool = option(False, "--small-stem", LEARNS)
    moco_dim: int = option(128, "--moco-dim", LEARNS, least=1)
    moco_k: int = option(65536, "--moco-k", LEARNS, least=1)
    moco_m: float = option(0.999, "--moco-m", LEARNS)
    mlp: bool = option(False, "--mlp", LEARNS)
    group_size: str = option("auto", "--group-size", FREE, metavar="N")
    bn_splits: str = option("auto", "--bn-splits", FREE, metavar="N")
    kept_loss_group_size: int | None = option(None, "", FREE)  # of a run from before --group-size

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("group_size", 2), ("bn_splits", 1)):
            value = getattr(self, name)
            if value != "auto" and not (value.isdecimal() and int(value) >= least):
                raise ValueError(
                    f"--{name.replace('_', '-')} must be auto or a number of at least {least}, got "
                    f"{value!r}"
                )
        if self.group_size != "auto" and self.bn_splits != "auto":
            raise ValueError(
                "--group-size and --bn-splits were both given, and both say how large a group is"
            )
        if not 0 <= self.moco_m <= 1:
            raise ValueError(f"--moco-m must be in [0, 1], got {self.moco_m:g}")


@dataclass(frozen=True, kw_only=True)
class Views(Part):
    """views

    aug_plus: augmentation of MoCo v2
    image_size: %(default)s
    crop_scale: share of the area; default %(default)s
    blur: leave the Gaussian blur out of --aug-plus
    views: cpu: all by Pillow in loader processes; device: they decode and crop, the device does
        colour and blur (%(default)s)
    """

    aug_plus: bool = option(False, "--aug-plus", LEARNS)
    image_size: int = option(224, "--image-size", LEARNS, least=1, metavar="PX")
    crop_scale: tuple[float, float] = option(
        (0.2, 1.0), "--crop-scale", LEARNS, metavar=("MIN", "MAX")
    )
    blur: bool = option(True, "--no-blur", LEARNS)
    views: str = option("cpu", "--views", LEARNS, since="cpu", choices=("cpu", "device"))
    mean: tuple[float, float, float] = option(
        IMAGENET_MEAN, "--mean", LEARNS, metavar=("R", "G", "B")
    )
    std: tuple[float, float, float] = option(IMAGENET_STD, "--std", LEARNS, metavar=("R", "G", "B"))

    def __post_init__(self) -> None:
        super().__post_init__()
        check_views(self)


@dataclass(frozen=True, kw_only=True)
class PretrainData(Data):
    """data

    skip_bad_images: replace an unreadable image by the next one that can be read
    max_bad_share: stop when a larger share of images is unreadable (%(default)s)
    """

    skip_bad_images: bool = option(False, "--skip-bad-images", FREE)
    max_bad_share: float = option(0.01, "--max-bad-share", FREE, least=0)


@dataclass(frozen=True, kw_only=True)
class PretrainOptim(Optim):
    """optimisation

    lr: initial learning rate (%(default)s)
    weight_decay: %(default)s
    amp: mixed precision of the encoders (%(default)s)
    accumulate: each device's share of --batch-size goes through in N parts of whole groups, for
        less memory; what is learned stays the same (%(default)s)
    init_from: start from the encoder in this file (weights, not a run: queue, optimizer and
        epoch are new)
    """

    lr: float = option(0.03, "--lr --learning-rate", LEARNS, least=0, kind="rate")
    weight_decay: float = option(0.0001, "--wd --weight-decay", LEARNS, least=0, kind="rate")
    amp: str = option("off", "--amp", LEARNS, choices=("off", "bf16", "fp16"))
    accumulate: int = option(1, "--accumulate", ROUNDS, least=1, since=1)
    init_from: str | None = option(
        None, "--init-from", LEARNS, since=None, kind="path", metavar="CHECKPOINT"
    )


@dataclass(frozen=True, kw_only=True)
class PretrainSchedule(Schedule):
    """schedule

    cos: cosine learning-rate schedule
    warmup_epochs: epochs of rising learning rate (%(default)s)
    max_steps: stop after N steps of the run; 0 saves the untrained encoder
    """

    cos: bool = option(False, "--cos", LEARNS)
    warmup_epochs: int = option(0, "--warmup-epochs", LEARNS, least=0)
    max_steps: int | None = option(None, "--max-steps", FREE, least=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.epochs < 1:
            raise ValueError(f"--epochs must be at least 1, got {self.epochs}")


@dataclass(frozen=True, kw_only=True)
class Speed(Part):
    """speed: what is learned stays the same; a run may go on under other settings than it began
    with, but not bit for bit

    channels_last: weights and images in NHWC order (default: on the CPU and with --amp)
    compile: compile the encoders by torch.compile: minutes at the start
    deterministic: only kernels that give the same bits every time; slower on a GPU
    profile: write a trace of ten steps and print where their time goes
    """

    channels_last: bool | None = option(None, "--channels-last", ROUNDS, since=False)
    compile: bool = option(False, "--compile", ROUNDS, since=False)
    deterministic: bool = option(False, "--deterministic", ROUNDS, since=False)
    profile: bool = option(False, "--profile", FREE)


@dataclass(frozen=True, kw_only=True)
class Saving(Folder):
    """never lose a run

    keep_last: checkpoints to keep (%(default)s), the newest, and
    keep_every: that of every N-th epoch (%(default)s; 0: none)
    save_steps: save every N steps too (0: after each epoch only)
    save_minutes: save every X minutes too (0: no)
    allow_changes: resume although what is learned changes; logs the differences
    replay: rerun the step that RUN/failed holds and say what was in it; needs no other flag (DIR:
        where the images are now)
    """

    keep_last: int = option(5, "--keep-last", FREE, least=1)
    keep_every: int = option(20, "--keep-every", FREE, least=0)
    save_steps: int = option(0, "--save-steps", FREE, least=0)
    save_minutes: float = option(0, "--save-minutes", FREE, least=0)
    allow_changes: bool = option(False, "--allow-changes", FREE)
    replay: str | None = option(None, "--replay", FREE, kind="path", metavar="RUN/failed")
    checkpoint: str | None = option(None, "", FREE)  # to go on from: a path, or "auto"


@dataclass(frozen=True, kw_only=True)
class Watching(Part):
    """watching

    knn_every: k-NN accuracy on val/ every N epochs, and at the end, where images have labels
        (%(default)s; 0: never)
    knn_bank: training images to look for neighbours among, as many of each class (%(default)s)
    max_overflows: stop after more fp16 overflows in a row (%(default)s)
    check_every: steps between proofs that ranks are equal (%(default)s; 0: never)
    collapse_steps: warn after N steps with collapsed features (%(default)s; 0: never)
    """

    knn_every: int = option(10, "--knn-every", FREE, least=0)
    knn_bank: int = option(50000, "--knn-bank", FREE, least=1)
    max_overflows: int = option(20, "--max-overflows", FREE, least=0)
    check_every: int = option(1000, "--check-every", FREE, least=0)
    collapse_steps: int = option(500, "--collapse-steps", FREE, least=0)


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """All of main_moco.py."""

    data: PretrainData
    preset: Preset = Preset()
    encoder: Encoder = Encoder()
    objective: Objective = Objective()
    views: Views = Views()
    optim: PretrainOptim = PretrainOptim()
    schedule: PretrainSchedule = PretrainSchedule()
    speed: Speed = Speed()
    saving: Saving = Saving()
    watching: Watching = Watching()
    launch: Launch = Launch()
    placement: Placement = Placement()

    def __post_init__(self) -> None:
        batch, processes = self.optim.batch_size, self.placement.processes
        check_batch(self.optim, self.placement)
        if batch // processes < 2:
            raise ValueError(
                f"--batch-size {batch} over {processes} process(es) leaves one image each; batch "
                "norm and intra-batch pairs need at least two"
            )
        share, accumulate = batch // processes, self.optim.accumulate
        if share % accumulate or share // accumulate < 2:
            raise ValueError(
                f"--accumulate {accumulate} does not split the batch of {share} on each device "
                "into equal parts of at least two images"
            )
        queue = self.encoder.moco_k
        if queue < batch:
            raise ValueError(
                f"--moco-k {queue} is smaller than the global batch of {batch}: the queue must "
                "hold at least one batch of keys"
            )
        if self.objective.symmetric and queue < 2 * batch:
            raise ValueError(
                f"--moco-k {queue} is smaller than twice the global batch of {batch}: with "
                "--symmetric the keys of both views enter the queue"
            )
        if self.optim.amp == "fp16" and self.placement.devices[0] == "cpu":
            raise ValueError("--amp fp16 needs a GPU; use bf16 or off on the CPU")
        if not self._fits(self.loss_group_size):
            raise ValueError(
                f"its loss takes its log over {self.loss_group_size} images, which do not fit "
                f"--batch-size {batch} over {self._places}"
            )

    @property
    def part_size(self) -> int:
        """Images that go through the encoder at a time."""
        return self.optim.batch_size // self.placement.processes // self.optim.accumulate

    @property
    def group_size(self) -> int:
        """Images of a group; groups are consecutive in the global batch.

        Raises:
            ValueError: groups that do not divide the batch, or do not fit the devices.
        """
        encoder, part = self.encoder, self.part_size
        if encoder.bn_splits != "auto":
            return _size_of_splits(int(encoder.bn_splits), part, self.optim.accumulate)
        if encoder.group_size == "auto":
            return self._nearest_group_size()
        size = int(encoder.group_size)
        if not self._fits(size):
            sizes = [each for each in range(2, self.optim.batch_size + 1) if self._fits(each)]
            raise ValueError(
                f"--group-size {size} does not fit --batch-size {self.optim.batch_size} over "
                f"{self._places}: a group is some of the {part} images that go through one device "
                "at a time, or all those of several devices; sizes that fit: "
                f"{', '.join(map(str, sizes))}"
            )
        return size

    def _fits(self, size: int) -> bool:
        batch, part = self.optim.batch_size, self.part_size
        return part % size == 0 or (
            self.optim.accumulate == 1 and size % part == 0 and batch % size == 0
        )

    def _nearest_group_size(self) -> int:
        """32 images, as the published runs had on each device, or the nearest size that fits with
        at least two groups: within one the shuffle has no effect."""
        batch = self.optim.batch_size
        sizes = [size for size in range(2, batch // 2 + 1) if self._fits(size)]
        return min(sizes, key=lambda size: abs(size - 32), default=batch)

    @property
    def _places(self) -> str:
        accumulate = self.optim.accumulate
        parts = f" in {accumulate} parts" if accumulate > 1 else ""
        return f"{self.placement.processes} process(es){parts}"

    @property
    def loss_group_size(self) -> int:
        """Images over which the loss takes its log and its pairs: a group's, but in old runs."""
        return self.encoder.kept_loss_group_size or self.group_size

    @property
    def groups(self) -> int:
        """Groups of the global batch."""
        return self.optim.batch_size // self.group_size

    @property
    def bn_groups(self) -> int:
        """Groups on each device, of each part of its batch; 1 where a group is spread."""
        return max(1, self.part_size // self.group_size)

    @property
    def group_span(self) -> int:
        """Devices over which a group is spread; 1 where devices hold whole groups."""
        return max(1, self.group_size // self.part_size)

    def resumed_from(self, before: Mapping[str, Any]) -> PretrainConfig:
        """With the groups of a run that is to go on, where none were asked for; and with those of
        its loss, which were larger in runs from before --group-size.

        Args:
            before: flat values of its checkpoint.

        Raises:
            ValueError: they do not fit the devices.
        """
        encoder, size = self.encoder, before.get("bn_group_size")
        if size is None or before.get("batch_size") != self.optim.batch_size:
            return self
        if encoder.group_size == encoder.bn_splits == "auto":
            encoder = dataclasses.replace(encoder, group_size=str(size))
        of_loss = {**groups_of_old_files(before), **before}.get("loss_group_size", size)
        if of_loss != size:
            encoder = dataclasses.replace(encoder, kept_loss_group_size=of_loss)
        return dataclasses.replace(self, encoder=encoder)

    def to_flat(self) -> dict[str, Any]:
        """The values by their flat names, as JSON and `weights_only` can hold them."""
        return {
            **flat_values(self),
            "objective": objective_formula(flat_values(self.objective)),
            "bn_groups": self.bn_groups,
            "bn_group_size": self.group_size,
            "loss_group_size": self.loss_group_size,
            "shuffled_images": self.optim.batch_size,
        }


def groups_of_old_files(flat: Mapping[str, Any]) -> dict[str, int]:
    """What files from before --group-size do not say, by its flat names: the loss took its log and
    its pairs over all images that were on a device at a time, and keys were shuffled within each
    part of a step. {} for files of today, and for such that know no groups."""
    if "loss_group_size" in flat or "bn_groups" not in flat:
        return {}
    return {
        "loss_group_size": flat["bn_groups"] * flat["bn_group_size"],
        "shuffled_images": flat["batch_size"] // flat.get("accumulate", 1),
    }


def _size_of_splits(splits: int, part: int, accumulate: int) -> int:
    if part % splits:
        raise ValueError(
            f"--bn-splits {splits} does not divide the batch of {part} on each device"
            + (f" (--accumulate {accumulate})" if accumulate > 1 else "")
        )
    if part // splits < 2 and splits > 1:
        raise ValueError(f"--bn-splits {splits} leaves groups of one image, which have no variance")
    return part // splits
