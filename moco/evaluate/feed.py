"""Batches that classifiers train on: random crops anew in every epoch, or features from a cache."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from moco import distributed
from moco.config import Pretrained
from moco.data.images import Images, Subset
from moco.data.loader import EpochBatches, TrainLoader, eval_loader, rank_share
from moco.data.samples import AugmentedViews, PlainImages
from moco.data.views import eval_transform, lincls_recipe, normalize
from moco.evaluate.heads import FrozenEncoder
from moco.evaluate.knn import extract_features
from moco.progress import progress


@dataclass(frozen=True)
class Presentation:
    """How images are presented to an encoder.

    Args:
        source: has their size, mean and standard deviation.
        batch_size: of this rank, where nothing is trained.
    """

    source: Pretrained
    batch_size: int
    workers: int
    device: torch.device

    def centre_crops(self, images: Images) -> PlainImages:
        transform = eval_transform(self.source.image_size, self.source.eval_resize)
        return PlainImages(images, transform)

    def loader(self, images: Images, *, persistent: bool = False) -> DataLoader:
        """This rank's share of centre crops: (N, 3, S, S) uint8 and targets (N,).

        Persistent workers live until the caller ends them, whatever signals arrive.
        """
        return eval_loader(
            self.centre_crops(images),
            batch_size=self.batch_size,
            workers=self.workers,
            pin_memory=self.device.type == "cuda",
            persistent=persistent,
            outlive_stop=persistent,
        )

    def pixels(self, batch: Tensor) -> Tensor:
        """(N, 3, S, S) uint8 -> normalised float32 on the device."""
        batch = batch.to(self.device, non_blocking=True)
        return normalize(batch, self.source.mean, self.source.std)

    def extracted(
        self, images: Images, encoder: FrozenEncoder, what: str, *, unit: bool = True
    ) -> tuple[Tensor, Tensor]:
        """As `extract_features`, of centre crops; `what` is the name of the progress bar."""
        batches = progress(self.loader(images), what)
        show = {"device": self.device, "mean": self.source.mean, "std": self.source.std}
        return extract_features(encoder, batches, **show, unit=unit)

    def features(
        self, batches: Iterable[tuple[Tensor, Tensor]], encoder: FrozenEncoder
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Features (N, C) float32 and targets (N,) on the device, batch by batch."""
        for batch, targets in batches:
            yield encoder(self.pixels(batch)), targets.to(self.device, non_blocking=True)


@dataclass
class ImageFeed:
    """Random crops of the images in every epoch: the standard protocol, and fine-tuning.

    A feed gives the batches of an epoch, from a step on (`train`), the tensors of a batch
    (`inputs`), and features and targets of held-out images (`held_out`); each rank has its share.

    Args:
        images: to train on.
        val: centre crops of the held-out images.
        batch_size: over all ranks.
        finetune: train on images, not on the frozen encoder's features.
    """

    encoder: FrozenEncoder
    images: Images
    val: DataLoader
    show: Presentation
    batch_size: int
    seed: int
    finetune: bool = False

    def __post_init__(self) -> None:
        self.batches = EpochBatches(len(self.images), self.batch_size, seed=self.seed)
        recipe = lincls_recipe(self.show.source.image_size)
        views = AugmentedViews(self.images, recipe, seed=self.seed, num_views=1)
        self.loader = TrainLoader(
            views, self.batches, workers=self.show.workers, device=self.show.device
        )

    def fold(self, rest: list[int], held_out: list[int]) -> ImageFeed:
        """Train on the images of some indices and hold out those of others."""
        val = self.show.loader(Subset(self.images, held_out), persistent=True)
        return replace(self, images=Subset(self.images, rest), val=val)

    def train(self, epoch: int, start: int = 0) -> Iterable:
        self.batches.set_epoch(epoch, start)
        return self.loader

    def inputs(self, batch: Sequence) -> tuple[Tensor, Tensor]:
        view, targets, _ = batch
        view = self.show.pixels(view)
        inputs = view if self.finetune else self.encoder(view)
        return inputs, targets.to(self.show.device, non_blocking=True)

    def held_out(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.show.features(self.val, self.encoder)

    def close(self) -> None:
        self.loader.end()
        if self.val.num_workers and self.val._iterator is not None:
            self.val._iterator._shutdown_workers()


@dataclass
class CachedFeed:
    """Features that were extracted once; the methods are those of `ImageFeed`.

    Args:
        views: (V, N, C) float16 of the training images; epoch e trains on view e modulo V.
        targets: (N,).
        centre: (N, C) of their centre crops, for images that are held out in a fold.
        val: (M, C) of the held-out images; val_targets: (M,).
        batch_size: over all ranks.
    """

    views: Tensor
    targets: Tensor
    centre: Tensor
    val: Tensor
    val_targets: Tensor
    batch_size: int
    seed: int
    device: torch.device
    rows: Tensor | None = field(default=None)  # of the images to train on; None: all

    def __post_init__(self) -> None:
        if self.rows is None:
            self.rows = torch.arange(len(self.targets))
        self.batches = EpochBatches(len(self.rows), self.batch_size, seed=self.seed)

    def fold(self, rest: list[int], held_out: list[int]) -> CachedFeed:
        val, val_targets = self.centre[held_out], self.targets[held_out]
        return replace(self, rows=torch.tensor(rest), val=val, val_targets=val_targets)

    def train(self, epoch: int, start: int = 0) -> Iterable:
        self.batches.set_epoch(epoch, start)
        return self.batches

    def inputs(self, batch: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        chosen = self.rows[[index for _, index in batch]]
        view = self.views[batch[0][0] % len(self.views)]
        features = view[distributed.to_device(chosen, view.device)].to(self.device).float()
        return features, distributed.to_device(self.targets[chosen], self.device)

    def held_out(self) -> Iterator[tuple[Tensor, Tensor]]:
        mine = torch.tensor(list(rank_share(len(self.val))), dtype=torch.int64)
        for part in mine.split(4096):
            features = self.val[part.to(self.val.device)].to(self.device).float()
            yield features, self.val_targets[part].to(self.device)

    def close(self) -> None:
        """There are no loader processes to end."""


def to_device_if_it_fits(features: Tensor, device: torch.device) -> Tensor:
    """At most half of a GPU's free memory is taken."""
    if device.type == "cuda" and features.nbytes < torch.cuda.mem_get_info(device)[0] / 2:
        return features.to(device)
    return features
