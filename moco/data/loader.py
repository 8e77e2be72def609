"""Samplers and data loaders: the batches of an epoch over ranks, and the loader processes.

Workers hand over uint8 pixels; the device normalises them, which is a quarter of the bytes to move
between processes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from moco import distributed
from moco.data import device_views
from moco.data.images import in_memory
from moco.data.samples import AugmentedViews, PlainImages
from moco.errors import DataError
from moco.stop import held_back

AHEAD = 2  # batches that are copied to a GPU while it still works on those before
T = TypeVar("T")


class EpochBatches(Sampler):
    """Batches of (epoch, index) for this rank, a new order every epoch, the ragged rest left out,
    or a last, smaller batch.

    The order is a function of (seed, epoch); global batch b is its b-th slice, and rank r takes the
    r-th part of it. So the samples of a step do not depend on the number of ranks. The epoch
    travels with the index because persistent workers never see `set_epoch`.
    """

    def __init__(self, length: int, batch_size: int, *, seed: int, keep_last: bool = False) -> None:
        """
        Args:
            length: number of samples.
            batch_size: global batch, a multiple of the number of ranks.
            seed: of the order.
            keep_last: make a batch of the ragged rest, as far as ranks can share it evenly and it
                has two samples at least.
        """
        if length < batch_size:
            raise DataError(
                f"{length} images are fewer than one batch of {batch_size}; lower --batch-size"
            )
        self.length = length
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0
        self.start = 0
        world = distributed.world_size()
        rest = length % batch_size // world * world
        self.last = rest if keep_last and rest >= 2 else 0  # samples of the smaller batch

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Select the epoch and the first batch within it (after a resume)."""
        self.epoch, self.start = epoch, start

    def batches_per_epoch(self) -> int:
        return self.length // self.batch_size + (self.last > 0)

    def __len__(self) -> int:
        return self.batches_per_epoch() - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        generator = torch.Generator().manual_seed(_order_seed(self.seed, self.epoch))
        order = torch.randperm(self.length, generator=generator).tolist()
        for batch in range(self.start, self.batches_per_epoch()):
            whole = (batch + 1) * self.batch_size <= self.length
            share = (self.batch_size if whole else self.last) // distributed.world_size()
            first = batch * self.batch_size + distributed.rank() * share
            yield [(self.epoch, index) for index in order[first : first + share]]


def _order_seed(seed: int, epoch: int) -> int:
    """64 bits, well mixed from both; as in checkpoints of earlier versions, whose resumed epochs
    must go on in their order."""
    return int(np.random.SeedSequence((seed, epoch, 0, 0)).generate_state(1, np.uint64)[0])


def rank_share(length: int) -> range:
    """Every index on exactly one rank, in order and without padding: rank, rank + W, ..."""
    return range(distributed.rank(), length, distributed.world_size())


class _Lasting(DataLoader):
    """One with processes that no request to stop reaches; the caller has to end them."""

    def __iter__(self) -> Iterator:
        with held_back():
            return super().__iter__()


class TrainLoader:
    """Batches of random views on the device: (view_1, ..., view_n, target, replaced) for each of
    `batches`, a view being (N, 3, S, S) uint8, target (N,) int64 in host memory, and `replaced` one
    text per sample.

    Views come from loader processes. With the samples' `augment_on_device` these only crop, and the
    device does the rest; images that are all in memory, and small enough, are kept on the device,
    which then crops too. `compile` fuses the augmentation into few kernels.
    """

    def __init__(
        self,
        data: AugmentedViews,
        batches: EpochBatches,
        *,
        workers: int,
        device: torch.device,
        compile: bool = False,
    ) -> None:
        self.data, self.batches, self.device = data, batches, device
        self.augment = (
            torch.compile(device_views.augment_on_device, dynamic=False)
            if compile
            else device_views.augment_on_device
        )
        array = in_memory(data.images) if data.augment_on_device else None
        self.pixels: Tensor | None = None  # (M, 3, H, W) uint8
        if array is not None and _fits(array, device):
            self.pixels = torch.from_numpy(array).permute(0, 3, 1, 2).to(device).contiguous()
            return
        self.workers = _Lasting(
            data,
            batch_sampler=batches,
            num_workers=workers,
            generator=torch.Generator(),  # else every epoch draws from the training process's own
            pin_memory=device.type == "cuda",
            persistent_workers=workers > 0,
        )

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple]:
        return self._from_workers() if self.pixels is None else self._on_the_device()

    def _from_workers(self) -> Iterator[tuple]:
        count, in_part = self.data.num_views, self.data.augment_on_device

        def to_copy(batch: list) -> list[Tensor]:
            return [*batch[:count], batch[-1]] if in_part else batch[:count]

        for batch, copies in copied_ahead(self.workers, to_copy, self.device):
            made, target, replaced = copies[:count], *batch[count : count + 2]
            if in_part:
                made = [
                    self.augment(crops, table, self.data.recipe)
                    for crops, table in zip(made, copies[-1].unbind(1), strict=True)
                ]
            yield (*made, target, replaced)

    def _on_the_device(self) -> Iterator[tuple]:
        height, width = self.pixels.shape[2:]
        for keys in self.batches:
            indices = [index for _, index in keys]
            sizes = np.full(len(keys), height), np.full(len(keys), width)
            # All views as one batch: small kernels cost the time that it takes to start them.
            tables = torch.cat([params.as_tensor() for params in self.data.draw(keys, *sizes)])
            tables = distributed.to_device(tables, self.device)
            chosen = distributed.to_device(torch.tensor(indices), self.device)
            pixels = self.pixels[chosen].repeat(self.data.num_views, 1, 1, 1)
            crops = device_views.crop_on_device(pixels, tables, self.data.recipe.image_size)
            made = self.augment(crops, tables, self.data.recipe).chunk(self.data.num_views)
            target = torch.tensor([self.data.target(index) for index in indices])
            yield (*made, target, ("",) * len(keys))

    def end(self) -> None:
        """End the loader processes. They do not hear SIGTERM, by which Python ends its children at
        exit: a training process that fails would wait for them for ever."""
        iterator = None if self.pixels is not None else self.workers._iterator
        if iterator is not None and self.workers.num_workers:
            iterator._shutdown_workers()


def copied_ahead(
    batches: Iterable[T], to_copy: Callable[[T], list[Tensor]], device: torch.device
) -> Iterator[tuple[T, list[Tensor]]]:
    """Each batch, with its tensors `to_copy` on the device.

    A GPU copies `AHEAD` batches, from pinned memory and in a stream of its own, while it computes.
    """
    if device.type != "cuda":
        for batch in batches:
            yield batch, [tensor.to(device) for tensor in to_copy(batch)]
        return
    stream = torch.cuda.Stream(device)

    def start(batch: T) -> tuple[T, list[Tensor], torch.cuda.Event]:
        with torch.cuda.stream(stream):
            copies = [tensor.to(device, non_blocking=True) for tensor in to_copy(batch)]
            return batch, copies, stream.record_event()

    for batch, copies, copied in started_ahead(batches, start, AHEAD):
        current = torch.cuda.current_stream(device)
        current.wait_event(copied)
        for tensor in copies:  # of the other stream's memory: not to be used again before this one
            tensor.record_stream(current)  # is done with it
        yield batch, copies


def started_ahead(batches: Iterable[T], start: Callable[[T], Any], ahead: int) -> Iterator[Any]:
    """`start(batch)` of each in order, called when up to `ahead` earlier ones are still to be
    yielded. An error comes where the batch would have come that it belongs to."""
    waiting: deque = deque()
    source, error, ended = iter(batches), None, False
    while waiting or not ended:
        while not ended and len(waiting) <= ahead:
            try:
                waiting.append(start(next(source)))
            except StopIteration:
                ended = True
            except Exception as caught:
                error, ended = caught, True
        if waiting:
            yield waiting.popleft()
    if error is not None:
        raise error


def _fits(array: np.ndarray, device: torch.device) -> bool:
    """At most a quarter of a GPU's memory. (Of all of it: what is free changes between a run and
    its resumption, and with it would the last bit of a picture.)"""
    if device.type != "cuda":
        return True
    return array.nbytes <= torch.cuda.get_device_properties(device).total_memory // 4


def eval_loader(
    dataset: PlainImages,
    *,
    batch_size: int,
    workers: int,
    pin_memory: bool,
    persistent: bool = False,
    outlive_stop: bool = False,
) -> DataLoader:
    """This rank's share of the images (perhaps none), each once over all ranks. `persistent`
    workers wait for the next pass; those that `outlive_stop` have to be ended by the caller."""
    kind = _Lasting if outlive_stop else DataLoader
    return kind(
        dataset,
        batch_size=batch_size,
        sampler=rank_share(len(dataset)),
        num_workers=workers,
        generator=torch.Generator(),
        pin_memory=pin_memory,
        persistent_workers=persistent and workers > 0,
    )
