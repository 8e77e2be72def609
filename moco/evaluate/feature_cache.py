"""Features of a training set on disk: extracted once, continued after a cut, never stale.

A cache is a folder of files of up to `SHARD` images each. The folder's name is a digest of all that
the features depend on: the encoder's weights, the images (names, sizes and times of the files), how
they are presented, and the precision. Under anything else another folder is used. Each file is
written whole or not at all and has a checksum; one that is missing or damaged is made again.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import itertools
import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import PIL
import torch
import torchvision
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse
from torch.utils.data import DataLoader

from moco import checkpoint, distributed
from moco.data.images import FolderImages, Images, base_and_indices, image_names
from moco.data.loader import TrainLoader
from moco.data.samples import AugmentedViews
from moco.data.shards import PackedImages, files_digest
from moco.data.views import lincls_recipe
from moco.errors import CheckpointError, DataError
from moco.evaluate.feed import Presentation
from moco.evaluate.heads import FrozenEncoder
from moco.run_files import write_json

SHARD = 1024  # images per file; a small data set is cut into 8

IN_USE = ".in_use"  # a file that processes lock while they use the folder

Shard = tuple[int, int]  # (view, index of its first image)


def pixels_digest(images: Images) -> str:
    """Digest of which images these are: for files their names, sizes and times of change."""
    digest = hashlib.sha256()
    digest.update(repr(image_names(images)).encode("utf-8", "surrogateescape"))
    base, indices = base_and_indices(images)
    if isinstance(base, FolderImages):
        for index in indices:
            facts = os.stat(base.paths[index])
            digest.update(f"{facts.st_size} {facts.st_mtime_ns}\n".encode())
    elif isinstance(base, PackedImages):
        digest.update(f"{files_digest(base.files.paths)} {list(indices)}".encode())
    else:
        digest.update(np.ascontiguousarray(base.array))
    return digest.hexdigest()[:16]


class FeatureCache:
    """Features of some images in half precision, in files of one folder.

    Args:
        encoder: in eval mode, the same on all ranks; each rank extracts its share.
        folder: of all caches; all ranks must see the same one.
        views: 0 for centre crops, A for A passes with random crop and flip, of which pass a has
            the views that epoch a of the standard protocol has with this seed.
    """

    def __init__(
        self,
        encoder: FrozenEncoder,
        images: Images,
        folder: Path,
        show: Presentation,
        *,
        views: int,
        seed: int,
    ) -> None:
        self.encoder, self.images, self.show = encoder, images, show
        self.views, self.seed = views, seed
        key = {
            "version": 1,
            "encoder": checkpoint.checksum(dict(encoder.encoder.state_dict())),
            "arch": type(encoder.encoder).__name__,
            "images": len(images),
            "pixels": pixels_digest(images),
            "views": views,
            "seed": seed if views else None,
            "image_size": show.source.image_size,
            "mean": list(show.source.mean),
            "std": list(show.source.std),
            "amp": encoder.amp,
            "pillow": PIL.__version__,
            "torchvision": torchvision.__version__,
        }
        if show.source.eval_resize is not None:
            key["eval_resize"] = show.source.eval_resize
        self.key, self.folder = key, Path(folder) / checkpoint.checksum(key)[:16]
        self.size = min(SHARD, -(-len(images) // 8))
        starts = range(0, len(images), self.size)
        self.shards = [(view, start) for view in range(max(1, views)) for start in starts]

    def features(self, width: int) -> Tensor:
        """All features of `width` C, from the files as far as they are there already.

        Returns:
            (max(1, views), N, C) float16 on the CPU.

        Raises:
            DataError: an image cannot be read; a feature is too large for half precision; the
                folder is not the same for all ranks.
        """
        whole = torch.empty(max(1, self.views), len(self.images), width, dtype=torch.float16)
        self.folder.mkdir(parents=True, exist_ok=True)
        # Held together with other processes that use it. One that finds it free clears away what
        # killed ones have left; on a file system without locks that stays.
        with open(self.folder / IN_USE, "a+") as file:
            with contextlib.suppress(OSError):
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                checkpoint.remove_unfinished(self.folder)
            with contextlib.suppress(OSError):
                fcntl.lockf(file, fcntl.LOCK_SH)
            self._fill_all(whole)
        return whole

    def _fill_all(self, whole: Tensor) -> None:
        if distributed.is_main():
            write_json(self.folder / "key.json", self.key)
        passes, count = whole.shape[:2]
        mine = self.shards[distributed.rank() :: distributed.world_size()]
        filled = {shard for shard in mine if self._fill(whole, shard)}
        missing = [shard for shard in mine if shard not in filled]
        text = f"{count} images x {passes} {'random views' if self.views else 'centre crop'}"
        distributed.print_main(
            f"  features: {text} in {self.folder}; {len(filled)} of {len(mine)} files are there"
        )
        if missing:
            self._extract(missing)
        distributed.barrier()
        for shard in self.shards:
            if shard not in filled and not self._fill(whole, shard):
                raise DataError(
                    f"{self._path(shard)} is not there: all processes must see the same folder; "
                    "give one by --cache-dir"
                )

    def _fill(self, whole: Tensor, shard: Shard) -> bool:
        """Read a file into its place; False where there is none that can be used."""
        view, start = shard
        rows, path = whole[view, start : start + self.size], self._path(shard)
        if not path.is_file():
            return False
        try:
            features = checkpoint.read_checkpoint(path).get("features")
        except CheckpointError as error:
            distributed.print_main(f"  features: made again, because {error}")
            return False
        fits = isinstance(features, Tensor) and features.dtype == torch.float16
        if not fits or features.shape != rows.shape:
            return False
        rows.copy_(features)
        return True

    def _path(self, shard: Shard) -> Path:
        view, start = shard
        return self.folder / f"view_{view:03d}_from_{start:08d}.pth.tar"

    def _extract(self, shards: Sequence[Shard]) -> None:
        """Write the files of some shards."""
        fast = without_batch_norm(self.encoder.encoder)
        extractor = FrozenEncoder(fast, amp=self.encoder.amp, channels_last=True)
        done, started, told = 0, time.perf_counter(), time.perf_counter()
        with contextlib.closing(self._batches(shards)) as batches:
            for shard in shards:
                count = min(self.size, len(self.images) - shard[1])
                own = itertools.islice(batches, -(-count // self.show.batch_size))
                rows = [extractor(self.show.pixels(pixels)).half().cpu() for pixels in own]
                self._write(shard, torch.cat(rows))
                done, now = done + count, time.perf_counter()
                if now - told > 30 or shard == shards[-1]:
                    rate = done / (now - started)
                    distributed.print_main(
                        f"  features: {done} extracted here, {rate:.0f} images/s"
                    )
                    told = now

    def _batches(self, shards: Sequence[Shard]) -> Iterable[Tensor]:
        """Pixels of the shards, one shard after another, none across two of them."""
        show, count, each = self.show, len(self.images), self.show.batch_size
        batches = [
            [(view, i) if self.views else i for i in range(first, min(first + each, end))]
            for view, start in shards
            for end in [min(start + self.size, count)]
            for first in range(start, end, each)
        ]
        if self.views:
            recipe = lincls_recipe(show.source.image_size)
            crops = AugmentedViews(self.images, recipe, seed=self.seed, num_views=1)
            loader = TrainLoader(crops, batches, workers=show.workers, device=show.device)
        else:
            loader = DataLoader(
                show.centre_crops(self.images),
                batch_sampler=batches,
                num_workers=show.workers,
                pin_memory=show.device.type == "cuda",
            )
        try:
            yield from (pixels for pixels, *_ in loader)
        finally:
            if self.views:
                loader.end()

    def _write(self, shard: Shard, features: Tensor) -> None:
        if not features.isfinite().all():
            raise DataError(
                "features are not finite in half precision (at most 65504): the encoder's outputs "
                "are too large for --cached; use the standard protocol"
            )
        checkpoint.write_checkpoint(self._path(shard), {"features": features})


def without_batch_norm(encoder: nn.Module) -> nn.Module:
    """A copy for inference with each batch norm folded into the convolution before it: the same
    features to rounding, and fewer passes over memory. The encoder itself where it cannot be
    traced."""
    try:
        return fuse(encoder)
    except Exception:  # control flow that depends on the data: tracing can fail in any way
        return encoder
