"""k-NN accuracy of the query encoder while it trains, without a trace in what is trained."""

from __future__ import annotations

import contextlib
import copy
import itertools
import re
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from moco import distributed, encoders
from moco.batch_norm import CALIBRATION_BATCHES, calibrate_batch_norm, has_batch_norm
from moco.config import Data, PretrainConfig
from moco.data import loader
from moco.data.images import Images, Subset, first_per_class, open_images, split_folder
from moco.data.shards import SUFFIXES, shard_paths
from moco.data.views import eval_transform
from moco.errors import DataError, TrainingError
from moco.evaluate import knn as evaluate
from moco.evaluate.neighbours import contact_sheet, neighbour_rows
from moco.printable import printable
from moco.progress import progress
from moco.stop import StopRequest
from moco.train.trainer import Trainer

K, TEMPERATURE = 200, 0.07  # as main_lincls.py --knn has by default
QUERIES, NEIGHBOURS, AMONG = 6, 6, 5000  # on the sheet in TensorBoard, and of how many images


class OnlineKnn:
    """Classifies the validation images by the labels of their neighbours among training images.

    The bank of neighbours is class-balanced: the first images of each class, equally many where
    there are, `--knn-bank` in all (at least one of each class). Validation images are all used.
    Features are those of the backbone in eval mode; each rank extracts its share of both sets, has
    all of the bank (4 bytes x feature dimension x images) and classifies its own share exactly.

    The encoder is a copy, with rank 0's batch-norm statistics, and nothing here draws from a
    generator of the training process: training goes on as if nothing had been. Where there are no
    labels, or an image cannot be read, k-NN is left out with a line that says so.
    """

    def __init__(self, trainer: Trainer) -> None:
        """Args: trainer: of a module with `encoder_q` and `prepare`, and data with `images`."""
        self.config: PretrainConfig = trainer.config
        self.module, self.data, self.device = trainer.state.module, trainer.data, trainer.device
        self.log, self.printer, self.stop = trainer.log, trainer.printer, trainer.stop
        watching, reason = self.config.watching, None
        self.enabled = watching.knn_every > 0
        if not self.enabled:
            return
        try:
            self.bank, self.val, self.classes = open_splits(
                self.data.images, self.config.data, watching.knn_bank
            )
        except (DataError, OSError) as error:
            reason = str(error)
        if distributed.any_rank(reason is not None, device=self.device)[0]:
            self._leave_out(reason, "")
            return
        distributed.print_main(
            f"{'k-NN':>10}: every {watching.knn_every} epoch(s) and at the end, a bank of "
            f"{len(self.bank)} training images, {len(self.val)} to classify, "
            f"{self.classes} classes"
        )

    def measure(self, epoch: int, step: int) -> bool:
        """See `moco.train.task.Evaluation`; given up when any rank is asked to stop."""
        with self.printer.paused():
            return self._measure(epoch, step)

    def _measure(self, epoch: int, step: int) -> bool:
        started = time.perf_counter()
        encoder = frozen_backbone(self.module.encoder_q)
        if step == 0 and self.config.schedule.max_steps != 0:
            self._calibrate(encoder)
        reason, found = None, []
        try:
            for images in (self.bank, self.val):
                with self._batches(images) as batches:
                    features = evaluate.extract_features(
                        encoder,
                        batches,
                        device=self.device,
                        mean=self.config.views.mean,
                        std=self.config.views.std,
                    )
                    found.append(features)
        except (DataError, torch.OutOfMemoryError) as error:
            reason = str(error)
        failed, stopping = distributed.any_rank(
            reason is not None, self.stop.requested, device=self.device
        )
        if failed:
            self._leave_out(reason, f" from step {step} on")
        if failed or stopping:
            return stopping
        bank, queries = found
        try:
            scores = evaluate.knn_accuracy(
                queries, bank, classes=self.classes, k=K, temperature=TEMPERATURE
            )
        except TrainingError as error:  # of memory, on all ranks
            self._leave_out(str(error) if distributed.is_main() else None, f" from step {step} on")
            return False
        seconds = time.perf_counter() - started
        values = {"top1": scores.pop("top1"), "top5": scores.pop("top5"), "seconds": seconds}
        self.log.scalars("knn", step, values, epoch=epoch, **scores)
        after = f"after {epoch} epoch(s)" if step else "before training"
        features, _ = bank
        if self.log.active and len(features) > 1 and features.isfinite().all():
            self._show_neighbours(step, features)
        self.printer.note(
            f"k-NN {after}: top-1 {values['top1']:.2f}, "
            f"top-{min(5, self.classes)} {values['top5']:.2f} (k {scores['k']}, bank of "
            f"{scores['bank']}, {scores['images']} images, {seconds:.1f} s)"
        )
        return False

    def _show_neighbours(self, step: int, features: Tensor) -> None:
        """Images of the bank and their nearest ones, in TensorBoard: of rank 0's share, thinned
        evenly to at most `AMONG`, so that it costs little whatever the bank."""
        share = range(distributed.rank(), len(self.bank), distributed.world_size())
        every = -(-len(share) // AMONG)
        images = Subset(self.bank, share[::every])
        rows = neighbour_rows(features[::every].cpu(), images, queries=QUERIES, k=NEIGHBOURS)
        pixels = np.array(contact_sheet(rows, images))
        self.log.picture("neighbours", step, torch.from_numpy(pixels).permute(2, 0, 1))

    def _calibrate(self, encoder: nn.Module) -> None:
        """Give the copy of an untrained encoder the batch-norm statistics of views that it would
        train on, as all later ones have: they alone can move the accuracy by some percent."""
        if not has_batch_norm(encoder):
            return
        if norms := getattr(encoder, "batch_norms", None):
            norms.fold_each_pass = True
        self.data.set_epoch(0, 0)
        first = itertools.islice(self.data, CALIBRATION_BATCHES)
        views = [batch[0][: self.config.part_size] for batch in first]
        pixels = [self.module.prepare(each) for each in views if len(each) > 1]
        gpus = [self.device] if self.device.type == "cuda" else []
        with torch.no_grad(), torch.random.fork_rng(gpus):  # dropout draws too
            calibrate_batch_norm(encoder, pixels)
        distributed.broadcast_buffers(encoder)

    @contextlib.contextmanager
    def _batches(self, images: Images) -> Iterator[Iterator]:
        """This rank's share of the images, until it is asked to stop."""
        config = self.config
        batches = loader.eval_loader(
            loader.PlainImages(images, eval_transform(config.views.image_size)),
            batch_size=config.part_size,
            workers=config.data.workers,
            pin_memory=self.device.type == "cuda",
            persistent=True,  # so that they can be ended, whatever happens
            outlive_stop=True,
        )
        try:
            yield _until(self.stop, batches)
        finally:
            if batches.num_workers and batches._iterator is not None:
                batches._iterator._shutdown_workers()

    def _leave_out(self, reason: str | None, since: str) -> None:
        """On all ranks; those that know why say so."""
        self.enabled = False
        if reason is not None:
            # What a loader process raised arrives with that process's trace in front.
            reason = re.sub(r"^[\w.]*Error: ", "", reason.strip().splitlines()[-1])
            print(f"{'k-NN':>10}: left out{since}: {printable(reason)}", flush=True)


def _until(stop: StopRequest, batches: DataLoader) -> Iterator:
    for batch in progress(batches, "k-NN features"):
        if stop.requested:
            return
        yield batch


def open_splits(images: Images, data: Data, bank_size: int) -> tuple[Images, Images, int]:
    """Bank and validation images, and the number of their classes.

    Raises:
        DataError: no labels, no validation images, or such of other classes.
    """
    if data.dataset == "folder":
        split_folder(Path(data.data), "train")  # else `images` may hold validation images
    elif data.dataset in SUFFIXES:
        shard_paths(data.data, "train", data.dataset)
    per_class = data.images_per_class
    if images.targets is None:  # of STL-10 only some of the images have labels
        images = open_images(data.dataset, data.data, "train", per_class=per_class)
    val = open_images(data.dataset, data.data, "val", per_class=per_class, classes=images.classes)
    share = max(1, bank_size // len(images.classes))
    bank = Subset(images, first_per_class(images.targets, share))
    return bank, val, len(images.classes)


def frozen_backbone(encoder: nn.Module) -> nn.Module:
    """A copy without its head, in eval mode, with the batch-norm statistics of rank 0."""
    frozen = copy.deepcopy(encoder).requires_grad_(False)
    encoders.set_head(frozen, nn.Identity())
    distributed.broadcast_buffers(frozen)
    return frozen.eval()
