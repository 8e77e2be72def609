"""The config of main_lincls.py: what is evaluated, and by which protocol."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moco.config.option import FREE, LEARNS, Part, flat_values, option
from moco.config.parts import (
    NAMED,
    Data,
    Folder,
    Launch,
    Optim,
    Placement,
    Schedule,
    check_batch,
    check_image_statistics,
)


@dataclass(frozen=True, kw_only=True)
class Pretrained(Part):
    """what is evaluated

    arch, image size, mean, standard deviation: None takes the checkpoint's.

    pretrained: ours, upstream MoCo's, or a torchvision state dict; a run folder: its newest
    evaluate: only evaluate the linear classifier that the checkpoint holds
    arch: default: the checkpoint's
    layer: features that are classified: output (of unit length), or what enters the head, fc7 or
        backbone (default: a classifier's own, else what enters the head)
    image_size: default: the checkpoint's, else 224
    eval_resize: shorter side of validation images, of which the centre is taken (default: that of
        the size: all of an image up to 64, 256 of 224; --protocol stl10: 70 of 64)
    mean: default: the checkpoint's, else ImageNet's
    amp: precision of the encoder (%(default)s: float32); classifiers are float32
    """

    pretrained: str | None = option(None, "--pretrained", FREE, kind="path", metavar="CHECKPOINT")
    evaluate: bool = option(False, "-e --evaluate", FREE)
    arch: str | None = option(None, "-a --arch", FREE, metavar="ARCH")
    layer: str | None = option(None, "--layer", LEARNS, since="backbone", metavar="NAME")
    image_size: int | None = option(None, "--image-size", LEARNS, least=1, metavar="PX")
    eval_resize: int | None = option(
        None, "--eval-resize", LEARNS, since=None, least=1, metavar="PX"
    )
    mean: tuple[float, float, float] | None = option(
        None, "--mean", LEARNS, metavar=("R", "G", "B")
    )
    std: tuple[float, float, float] | None = option(None, "--std", LEARNS, metavar=("R", "G", "B"))
    amp: str = option("off", "--amp", LEARNS, choices=("off", "bf16"))

    def __post_init__(self) -> None:
        super().__post_init__()
        check_image_statistics(self.mean or (), self.std or ())


@dataclass(frozen=True, kw_only=True)
class ProbeOptim(Optim):
    """optimisation

    lr: initial learning rate, or several as 1,3,10,30 (30.0)
    weight_decay: one, or several as 0,1e-4 (0.0)
    """

    lr: tuple[float, ...] = option((30.0,), "--lr --learning-rate", LEARNS, least=0, kind="rates")
    weight_decay: tuple[float, ...] = option(
        (0.0,), "--wd --weight-decay", LEARNS, least=0, kind="rates"
    )


@dataclass(frozen=True, kw_only=True)
class Knn(Part):
    """k-NN

    knn: also report weighted k-NN (--epochs 0: report nothing else)
    knn_k: neighbours, at most the training set (%(default)s)
    knn_t: temperature of their votes (%(default)s)
    knn_layer: features that are compared (%(default)s)
    """

    knn: bool = option(False, "--knn", FREE)
    knn_k: int = option(200, "--knn-k", FREE)
    knn_t: float = option(0.07, "--knn-t", FREE)
    knn_layer: str = option("backbone", "--knn-layer", FREE, choices=("backbone", "projection"))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.knn_k < 1 or not 0 < self.knn_t < math.inf:
            raise ValueError(
                f"--knn-k must be >= 1 and --knn-t positive, got {self.knn_k}, {self.knn_t:g}"
            )


@dataclass(frozen=True, kw_only=True)
class Protocol(Part):
    """several settings, trained together: --lr 1,3,10,30 --wd 0,1e-4

    probe: moco: SGD, its lr 30; stl10: that of arXiv:2005.10242, Table 1: Adam with betas 0.5 and
        0.999, lr 1e-3, batch 128, 100 epochs, x0.2 at 60 and 80, accuracy of the last epoch; and
        5-NN (%(default)s)
    folds: choose among them by K-fold cross-validation on the training set, then train on all
        of it; val/ is evaluated once, at the end
    cached: extract features once, of centre crops, and train on those: another protocol than
        the standard one, without random crops
    cached_views: extract A random views of each image instead; epoch e has view e modulo A
    cache_dir: where features are kept, for other runs too (RUN/features)
    labels: train on this part of each class (1, 10), or on the images that a file names, one
        per line; also the bank of k-NN
    labels_seed: of the part of --labels PERCENT (%(default)s); --seed has no part in it
    finetune: train the whole network, batch norm in training mode; defaults are SwAV's then: 20
        epochs, x0.2 at 12 and 16, --lr 0.2 --lr-backbone 0.01, or 5 and 0.02 with --labels 1
    lr_backbone: initial learning rate of the encoder; --lr is the classifier's
    """

    probe: str = option("moco", "--protocol", LEARNS, since="moco", choices=("moco", "stl10"))
    folds: int | None = option(None, "--folds", LEARNS, least=2, since=None)
    cached: bool = option(False, "--cached", LEARNS, since=False)
    cached_views: int = option(0, "--cached-views", LEARNS, least=0, since=0)
    cache_dir: Path | None = option(None, "--cache-dir", FREE, kind="folder", metavar="DIR")
    labels: float | str | None = option(
        None, "--labels", FREE, kind="labels", metavar="PERCENT|FILE"
    )
    labels_seed: int = option(0, "--labels-seed", FREE)
    labels_digest: str | None = option(None, "", LEARNS, since=None)  # of the images chosen
    finetune: bool = option(False, "--finetune", LEARNS, since=False)
    lr_backbone: float | None = option(None, "--lr-backbone", LEARNS, since=None)


# Defaults of linear evaluation where they differ from pretraining's: upstream MoCo's protocol.
PROBE_DEFAULTS = {"epochs": 100, "schedule": (60, 80)}

# Table 1 of arXiv:2005.10242 (appendix B.1; github.com/SsnL/align_uniform, examples/stl10).
STL10_DEFAULTS = {
    "lr": (1e-3,), "batch_size": 128, "epochs": 100, "schedule": (60, 80), "schedule_factor": 0.2
}  # fmt: skip

# Fine-tuning with 1 % or 10 % of ImageNet's labels as SwAV has published it (arXiv:2006.09882;
# github.com/facebookresearch/swav, README and eval_semisup.py): 20 epochs, x0.2 at 12 and 16, batch
# 256, no weight decay; (lr of the classifier, of the backbone) are of 10 % and of 1 %.
FINETUNE_DEFAULTS = {"epochs": 20, "schedule": (12, 16), "schedule_factor": 0.2}
FINETUNE_RATES = {"10 %": (0.2, 0.01), "1 %": (5.0, 0.02)}


@dataclass(frozen=True, kw_only=True)
class LinclsConfig:
    """All of main_lincls.py."""

    data: Data
    source: Pretrained = Pretrained()
    optim: ProbeOptim = ProbeOptim()
    schedule: Schedule = Schedule(**PROBE_DEFAULTS)
    knn: Knn = Knn()
    protocol: Protocol = Protocol()
    saving: Folder = Folder()
    launch: Launch = Launch()
    placement: Placement = Placement()

    def __post_init__(self) -> None:
        check_batch(self.optim, self.placement)
        protocol, epochs = self.protocol, self.schedule.epochs
        if epochs == 0 and not (self.knn.knn or self.source.evaluate):
            raise ValueError("--epochs 0 leaves nothing to do without --knn or -e")
        if protocol.probe == "stl10" and protocol.finetune:
            raise ValueError("--protocol stl10 is of a frozen encoder: leave out --finetune")
        if protocol.probe == "stl10" and self.optim.momentum != ProbeOptim.momentum:
            raise ValueError("--protocol stl10 trains by Adam, which has no use for --momentum")
        if protocol.finetune and self.source.layer == "output":
            raise ValueError("--finetune trains the backbone: leave out --layer output")
        if protocol.finetune:
            self._check_finetuning()
        elif protocol.lr_backbone is not None:
            raise ValueError("--lr-backbone is of --finetune; the encoder is frozen without it")
        if self.source.evaluate and (protocol.cached or protocol.folds):
            raise ValueError("-e trains nothing: leave out --cached and --folds")
        if not protocol.cached and (protocol.cached_views or protocol.cache_dir):
            raise ValueError("--cached-views and --cache-dir are of --cached")
        if protocol.cached_views > epochs:
            raise ValueError(
                f"--cached-views {protocol.cached_views} are more than --epochs {epochs}, each of "
                "which trains on one of them"
            )
        if protocol.folds and epochs == 0:
            raise ValueError("--folds with --epochs 0 leaves nothing to choose among")
        if protocol.labels is not None and self.data.images_per_class is not None:
            raise ValueError("--labels and --images-per-class both select images: give one of them")
        if isinstance(protocol.labels, str) and self.data.dataset not in NAMED:
            raise ValueError(
                f"--labels {protocol.labels}: a list names files, and {self.data.dataset} is held "
                "in memory without names; give percent"
            )

    def _check_finetuning(self) -> None:
        protocol, optim = self.protocol, self.optim
        several = [
            flag for flag, values in (("--lr", optim.lr), ("--wd", optim.weight_decay))
            if len(values) > 1
        ]  # fmt: skip
        if several or protocol.cached or protocol.folds:
            other = (*several, *(["--cached"] if protocol.cached else ["--folds"]))[0]
            raise ValueError(
                f"--finetune trains the whole network with one setting, which {other} does not fit"
                + (" with several values; run it once for each" if several else "")
            )
        rate = protocol.lr_backbone
        if rate is None or not 0 <= rate < math.inf:
            raise ValueError(f"--lr-backbone must be a number of at least 0, got {rate}")
        if optim.batch_size // self.placement.processes < 2:
            raise ValueError("--finetune needs 2 images per process at least, for batch norm")
        if self.knn.knn and self.saving.resume and not self.source.pretrained:
            raise ValueError("--knn is of the encoder before fine-tuning: give --pretrained too")

    @property
    def trains(self) -> bool:
        """Whether a classifier is trained."""
        return self.schedule.epochs > 0 and not self.source.evaluate

    def to_flat(self) -> dict[str, Any]:
        """The values by their flat names, as JSON and `weights_only` can hold them."""
        flat = flat_values(self)
        for name in ("lr", "weight_decay"):  # one value is a number, as it has always been
            flat[name] = flat[name] if len(flat[name]) > 1 else flat[name][0]
        return flat
