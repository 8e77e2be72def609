"""Pairs of random views of images as training data, and what tasks that learn from them share."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from moco import encoders
from moco.data import loader
from moco.data.images import Images, names_digest, open_images
from moco.data.samples import AugmentedViews
from moco.data.views import Recipe, normalize, pretrain_recipe
from moco.errors import DataError
from moco.log import RunLog
from moco.precision import memory_format
from moco.tasks import monitor
from moco.tasks.online_knn import OnlineKnn
from moco.tasks.start import start_encoder
from moco.train.guards import BadImages
from moco.train.task import Task
from moco.train.trainer import Trainer


class ImagePairs:
    """(im_q, im_k) of every step: two random views of N images, (N, 3, S, S) uint8 on the device.

    Args:
        config: with the parts data, views, optim, speed and saving.
        device: where the views are needed.
        images: in place of those that the config names, all of them for training.
        recipe: in place of the config's.
        keep_last: an epoch ends in a smaller batch of what is left.
        with_targets: give the class of each image as well, (N,) int64.

    Raises:
        DataError: no images, or fewer than one batch; later, an image that cannot be read.
    """

    def __init__(
        self,
        config: Any,
        device: torch.device,
        *,
        images: Images | None = None,
        recipe: Recipe | None = None,
        keep_last: bool = False,
        with_targets: bool = False,
    ) -> None:
        data, seed = config.data, config.optim.seed
        if images is None:
            images = open_images(
                data.dataset, data.data, "pretrain", per_class=data.images_per_class
            )
        self.config, self.images = config, images
        self.facts = {"images": len(self.images), "images_digest": names_digest(self.images)}
        self._batches = loader.EpochBatches(
            len(self.images), config.optim.batch_size, seed=seed, keep_last=keep_last
        )
        self.last_batch = self._batches.last  # images of the smaller batch, 0 where there is none
        self.with_targets = with_targets
        self.steps_per_epoch = self._batches.batches_per_epoch()
        recipe = recipe or pretrain_recipe(
            config.views.image_size,
            aug_plus=config.views.aug_plus,
            crop_scale=config.views.crop_scale,
            blur=config.views.blur,
        )
        views = AugmentedViews(
            self.images,
            recipe,
            seed=seed,
            num_views=2,
            skip_bad=data.skip_bad_images,
            augment_on_device=config.views.views == "device",
        )
        self._loader = loader.TrainLoader(
            views,
            self._batches,
            workers=data.workers,
            device=device,
            compile=config.speed.compile,
        )
        self._bad = BadImages(config.saving.save_dir, len(self.images), data.max_bad_share)

    def set_epoch(self, epoch: int, start: int) -> None:
        self._batches.set_epoch(epoch, start)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        try:
            for im_q, im_k, targets, replaced in self._loader:
                self._bad.note(replaced)
                if self.with_targets:
                    yield im_q, im_k, targets.to(im_q.device, non_blocking=True)
                else:
                    yield im_q, im_k
        except DataError as error:  # of an image that cannot be read
            if self.config.data.skip_bad_images:
                raise
            raise DataError(f"{str(error).rstrip()}, or give --skip-bad-images") from error

    def end(self) -> None:
        self._loader.end()


class ImageTask(Task):
    """Of `ImagePairs`, with a module that has an `encoder_q`, and a `prepare` that turns uint8
    views into what it sees; k-NN of the encoder's backbone."""

    def build_encoder(self, outputs: int) -> nn.Module:
        encoder = self.config.encoder
        return encoders.build_encoder(
            encoder.arch,
            outputs,
            image_size=self.config.views.image_size,
            small_stem=encoder.small_stem,
        )

    def on_device(self, module: nn.Module, device: torch.device) -> None:
        views = self.config.views
        order = memory_format(self.config.speed.channels_last)
        module.prepare = functools.partial(
            normalize, mean=views.mean, std=views.std, memory_format=order
        )

    def start_from(self, module: nn.Module, path: str) -> str:
        return start_encoder(module.encoder_q, path, self.config.encoder.arch)

    def begin_log(self, log: RunLog, data: ImagePairs) -> None:
        monitor.lay_out(log, self.config, data.facts)

    def show(self, log: RunLog, batch: tuple[Tensor, ...]) -> None:
        monitor.show_views(log, *batch[:2])

    def build_evaluation(self, trainer: Trainer) -> OnlineKnn | None:
        return OnlineKnn(trainer)
