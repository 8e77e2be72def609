"""Who sees which sample when: batches of an epoch over ranks, loader processes, random views.

A sample's augmentation is a function of (seed, epoch, index, view) alone: the same pictures with
any number of workers or processes, and after a resume. Workers hand over uint8 pixels; the device
normalises them, which is a quarter of the bytes to move between processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from moco import distributed
from moco.data import views
from moco.data.images import Images, in_memory
from moco.errors import DataError
from moco.stop import ignore_stop_signals

# ------------------------------------------------------------------------------------------------
# Random views of images
# ------------------------------------------------------------------------------------------------


MOST_BAD_IN_A_ROW = 1000  # then the fault is not in the images


class AugmentedViews(Dataset):
    """(epoch, index) -> (view_1, ..., view_n, target, replaced): random views of one image, each
    (3, S, S) uint8.

    Target is -1 where the images have no labels. With `skip_bad` an image that cannot be read is
    replaced by the next one that can, and `replaced` holds one line for each that could not; it
    is "" otherwise. With `unfinished` the views are crops, which `views.finish` finishes, and the
    parameters for it, (n, 16), come last.

    Raises:
        DataError: an image cannot be read; with `skip_bad`, `MOST_BAD_IN_A_ROW` of them.
    """

    # Parameters are drawn for several images at a time, as a call costs the same for one as for
    # many; the decoded images are held until then, so there are few of them where they are large.
    DRAWN_TOGETHER, PIXELS_HELD = 16, 2**24

    def __init__(
        self,
        images: Images,
        recipe: views.Recipe,
        *,
        seed: int,
        views: int,
        skip_bad: bool = False,
        unfinished: bool = False,
    ) -> None:
        self.images = images
        self.recipe = recipe
        self.seed = seed
        self.views = views
        self.skip_bad = skip_bad
        self.unfinished = unfinished

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor | int | str, ...]:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: Sequence[tuple[int, int]]) -> list[tuple[Tensor | int | str, ...]]:
        """Many samples, as torch's DataLoader asks for them; all of one epoch."""
        samples: list[tuple[Tensor | int | str, ...]] = []
        loaded, pixels = [], 0
        for i, (_, index) in enumerate(keys):
            loaded.append(self._load(index))
            pixels += loaded[-1][0].width * loaded[-1][0].height
            if (
                len(loaded) == self.DRAWN_TOGETHER or pixels >= self.PIXELS_HELD
                or i + 1 == len(keys)
            ):  # fmt: skip
                samples += self._samples(keys[i + 1 - len(loaded) : i + 1], loaded)
                loaded, pixels = [], 0
        return samples

    def _samples(
        self, keys: Sequence[tuple[int, int]], loaded: list[tuple[Image.Image, int, str]]
    ) -> Iterator[tuple[Tensor | int | str, ...]]:
        widths, heights = zip(*(image.size for image, _, _ in loaded), strict=True)
        drawn = self.draw(keys, heights, widths)
        tables = torch.stack([params.table() for params in drawn], dim=1)  # (N, views, 16)
        for i, (image, used, replaced) in enumerate(loaded):
            if self.unfinished:
                pixels = views.pixels_of(image)
                crops = [views.crop(pixels, self.recipe, params, i) for params in drawn]
                yield (*crops, self.target(used), replaced, tables[i])
            else:
                made = [views.pil_view(image, self.recipe, params, i) for params in drawn]
                yield (*map(views.pixels_of, made), self.target(used), replaced)

    def draw(
        self, keys: Sequence[tuple[int, int]], heights: Sequence[int], widths: Sequence[int]
    ) -> list[views.ViewParams]:
        """The parameters of each view of some samples of one epoch."""
        epoch, indices = keys[0][0], [index for _, index in keys]
        return [
            views.draw(self.recipe, self.seed, epoch, indices, view, heights, widths)
            for view in range(self.views)
        ]

    def target(self, index: int) -> int:
        return -1 if self.images.targets is None else self.images.targets[index]

    def _load(self, index: int) -> tuple[Image.Image, int, str]:
        """The image, the index it really has, and what could not be read before it."""
        unreadable = []
        for offset in range(min(len(self.images), MOST_BAD_IN_A_ROW)):
            used = (index + offset) % len(self.images)
            try:
                return self.images.load(used), used, "\n".join(unreadable)
            except DataError as error:
                if not self.skip_bad:
                    raise
                unreadable.append(" ".join(str(error).split()))
        raise DataError(
            f"{len(unreadable)} images in a row, of {len(self.images)}, are unreadable; is the "
            f"data still where it was? The first: {unreadable[0]}"
        )


class PlainImages(Dataset):
    """index -> (image, target) through a transform without randomness."""

    def __init__(self, images: Images, transform: Callable[[Image.Image], Tensor]) -> None:
        self.images = images
        self.transform = transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        targets = self.images.targets
        image = self.transform(self.images.load(index))
        return image, -1 if targets is None else targets[index]


# ------------------------------------------------------------------------------------------------
# Who sees which sample when
# ------------------------------------------------------------------------------------------------


class EpochBatches(Sampler):
    """Batches of (epoch, index) for this rank, a new order every epoch, the ragged rest left out.

    The order is a function of (seed, epoch); global batch b is its b-th slice, and rank r takes the
    r-th part of it. So the samples of a step do not depend on the number of ranks. The epoch
    travels with the index because persistent workers never see `set_epoch`.
    """

    def __init__(self, length: int, batch_size: int, *, seed: int) -> None:
        """
        Args:
            length: number of samples.
            batch_size: global batch, a multiple of the number of ranks.
            seed: of the order.
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

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Select the epoch and the first batch within it (after a resume)."""
        self.epoch, self.start = epoch, start

    def batches_per_epoch(self) -> int:
        return self.length // self.batch_size

    def __len__(self) -> int:
        return self.batches_per_epoch() - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        generator = torch.Generator().manual_seed(_order_seed(self.seed, self.epoch))
        order = torch.randperm(self.length, generator=generator).tolist()
        share = self.batch_size // distributed.world_size()
        for batch in range(self.start, self.batches_per_epoch()):
            first = batch * self.batch_size + distributed.rank() * share
            yield [(self.epoch, index) for index in order[first : first + share]]


def _order_seed(seed: int, epoch: int) -> int:
    """64 bits, well mixed from both; as in checkpoints of earlier versions, whose resumed epochs
    must go on in their order."""
    return int(np.random.SeedSequence((seed, epoch, 0, 0)).generate_state(1, np.uint64)[0])


class RankShare(Sampler):
    """Every index on exactly one rank, in order and without padding: rank, rank + W, ..."""

    def __init__(self, length: int) -> None:
        self.indices = range(distributed.rank(), length, distributed.world_size())

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)


class TrainLoader:
    """Batches of random views on the device: (view_1, ..., view_n, target, replaced) for each of
    `batches`, a view being (N, 3, S, S) uint8, target (N,) int64 in host memory, and `replaced` one
    text per sample.

    Views come from loader processes, and unfinished ones are finished on the device. Where the
    views are `unfinished` and all images are in memory and small enough to lie on the device, they
    do, and the device makes the whole view. `compile` fuses what it does there into few kernels.
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
        self.finish = torch.compile(views.finish, dynamic=False) if compile else views.finish
        array = in_memory(data.images) if data.unfinished else None
        self.pixels: Tensor | None = None  # (M, 3, H, W) uint8
        if array is not None and _fits(array, device):
            self.pixels = torch.from_numpy(array).permute(0, 3, 1, 2).to(device).contiguous()
            return
        self.workers = DataLoader(
            data,
            batch_sampler=batches,
            num_workers=workers,
            worker_init_fn=ignore_stop_signals,
            generator=torch.Generator(),  # else every epoch draws from the training process's own
            pin_memory=device.type == "cuda",
            persistent_workers=workers > 0,
        )

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple]:
        return self._from_workers() if self.pixels is None else self._on_the_device()

    def _from_workers(self) -> Iterator[tuple]:
        count = self.data.views
        for batch in self.workers:
            made = [view.to(self.device, non_blocking=True) for view in batch[:count]]
            target, replaced = batch[count : count + 2]
            if self.data.unfinished:
                tables = batch[-1].to(self.device, non_blocking=True).unbind(1)
                made = [
                    self.finish(crops, table, self.data.recipe)
                    for crops, table in zip(made, tables, strict=True)
                ]
            yield (*made, target, replaced)

    def _on_the_device(self) -> Iterator[tuple]:
        height, width = self.pixels.shape[2:]
        for keys in self.batches:
            indices = [index for _, index in keys]
            sizes = np.full(len(keys), height), np.full(len(keys), width)
            # All views as one batch: small kernels cost the time that it takes to start them.
            tables = torch.cat([params.table() for params in self.data.draw(keys, *sizes)])
            tables = distributed.to_device(tables, self.device)
            chosen = distributed.to_device(torch.tensor(indices), self.device)
            pixels = self.pixels[chosen].repeat(self.data.views, 1, 1, 1)
            crops = views.crop_all(pixels, tables, self.data.recipe.image_size)
            made = self.finish(crops, tables, self.data.recipe).chunk(self.data.views)
            target = torch.tensor([self.data.target(index) for index in indices])
            yield (*made, target, ("",) * len(keys))

    def end(self) -> None:
        """End the loader processes. They ignore SIGTERM, by which Python ends its children at exit:
        a training process that fails would wait for them for ever."""
        iterator = None if self.pixels is not None else self.workers._iterator
        if iterator is not None and self.workers.num_workers:
            iterator._shutdown_workers()


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
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=RankShare(len(dataset)),
        num_workers=workers,
        worker_init_fn=ignore_stop_signals if outlive_stop else None,
        generator=torch.Generator(),
        pin_memory=pin_memory,
        persistent_workers=persistent and workers > 0,
    )
