"""Features of a training set on disk: extracted once, gone on with after a cut, never stale.

A cache is a folder of files of up to `SHARD` images each, whose name is a digest of all that the
features depend on: the encoder's weights, the images (names, sizes and times of the files), how
they are presented, and the precision. Under anything else another folder is used. Each file is
written whole or not at all and has a checksum; one that is missing or damaged is made again.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import PIL
import torch
import torchvision
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils.data import DataLoader

from moco import checkpoint, distributed
from moco.data.images import FolderImages, Images, base_and_indices, image_names
from moco.data.loader import AugmentedViews, PlainImages, TrainLoader
from moco.data.views import eval_transform, lincls_recipe, normalize
from moco.errors import CheckpointError, DataError
from moco.evaluate.heads import Frozen
from moco.run_files import write_json

SHARD = 1024  # images per file; a small data set is cut into 8


def pixels_digest(images: Images) -> str:
    """Digest of which images these are: for files their names, sizes and times of change."""
    digest = hashlib.sha256()
    digest.update(repr(image_names(images)).encode("utf-8", "surrogateescape"))
    base, indices = base_and_indices(images)
    if isinstance(base, FolderImages):
        for index in indices:
            facts = os.stat(base.paths[index])
            digest.update(f"{facts.st_size} {facts.st_mtime_ns}\n".encode())
    else:
        digest.update(np.ascontiguousarray(base.array))
    return digest.hexdigest()[:16]


def cached_features(
    encoder: Frozen,
    images: Images,
    folder: Path,
    *,
    width: int,
    views: int,
    seed: int,
    image_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device,
    batch_size: int,
    workers: int,
    say: Callable[[str], None],
) -> Tensor:
    """Features of all images, from the cache in `folder` as far as they are there already.

    Args:
        encoder: in eval mode, the same on all ranks; each rank extracts its share.
        folder: where caches lie; all ranks must see the same one.
        width: C.
        views: 0 for centre crops, A for A passes with random crop and flip, of which pass a has
            the views that epoch a of the standard protocol has with this seed.
        batch_size: of this rank.
        say: takes lines on the progress.

    Returns:
        (max(1, views), N, C) float16 on the CPU.

    Raises:
        DataError: an image cannot be read; a feature is too large for half precision; the folder is
            not the same for all ranks.
    """
    key = {
        "version": 1, "encoder": checkpoint.checksum(dict(encoder.encoder.state_dict())),
        "arch": type(encoder.encoder).__name__, "images": len(images),
        "pixels": pixels_digest(images), "views": views, "seed": seed if views else None,
        "image_size": image_size, "mean": list(mean), "std": list(std), "amp": encoder.amp,
        "pillow": PIL.__version__, "torchvision": torchvision.__version__,
    }  # fmt: skip
    folder = Path(folder) / checkpoint.checksum(key)[:16]
    folder.mkdir(parents=True, exist_ok=True)
    if distributed.is_main():
        write_json(folder / "key.json", key)

    size = min(SHARD, -(-len(images) // 8))
    starts = range(0, len(images), size)
    shards = [(view, start) for view in range(max(1, views)) for start in starts]
    whole = torch.empty(max(1, views), len(images), width, dtype=torch.float16)

    def fill(shard: tuple[int, int]) -> bool:
        view, start = shard
        rows = whole[view, start : start + size]
        features = _read(_path(folder, shard), rows.shape, say)
        if features is not None:
            rows.copy_(features)
        return features is not None

    mine = shards[distributed.rank() :: distributed.world_size()]
    filled = {shard for shard in mine if fill(shard)}
    missing = [shard for shard in mine if shard not in filled]
    text = f"{len(images)} images x {max(1, views)} {'random views' if views else 'centre crop'}"
    say(f"  features: {text} in {folder}; {len(filled)} of {len(mine)} files are there")
    if missing:
        batches = [
            [(view, i) if views else i for i in range(first, min(first + batch_size, end))]
            for view, start in missing
            for end in [min(start + size, len(images))]
            for first in range(start, end, batch_size)
        ]
        fast = without_batch_norm(encoder.encoder)
        extractor = Frozen(fast, amp=encoder.amp, channels_last=True)
        with contextlib.ExitStack() as at_end:
            if views:
                crops = AugmentedViews(images, lincls_recipe(image_size), seed=seed, num_views=1)
                loader = TrainLoader(crops, batches, workers=workers, device=device)
                at_end.callback(loader.end)
            else:
                loader = DataLoader(
                    PlainImages(images, eval_transform(image_size)), batch_sampler=batches,
                    num_workers=workers, pin_memory=device.type == "cuda",
                )  # fmt: skip
            _extract(extractor, loader, missing, size, len(images), folder, mean, std, device, say)
    distributed.barrier()
    for shard in shards:
        if shard not in filled and not fill(shard):
            raise DataError(
                f"{_path(folder, shard)} is not there: all processes must see the same folder; "
                "give one by --cache-dir"
            )
    return whole


def _extract(encoder, loader, shards, size, count, folder, mean, std, device, say) -> None:
    """Write the files of `shards`, whose batches `loader` gives one after another."""
    todo = iter(shards)
    shard, rows = next(todo), []
    done, started, said = 0, time.perf_counter(), time.perf_counter()
    for views, *_ in loader:
        features = encoder(normalize(views.to(device, non_blocking=True), mean, std)).half()
        rows.append(features.cpu())
        done += len(views)
        if sum(map(len, rows)) < min(size, count - shard[1]):
            continue
        whole = torch.cat(rows)
        if not whole.isfinite().all():
            raise DataError(
                "features are not finite in half precision (at most 65504): the encoder's outputs "
                "are too large for --cached; use the standard protocol"
            )
        checkpoint.write_checkpoint(_path(folder, shard), {"features": whole})
        shard, rows = next(todo, None), []
        now = time.perf_counter()
        if now - said > 30 or shard is None:
            say(f"  features: {done} extracted here, {done / (now - started):.0f} images/s")
            said = now


def _path(folder: Path, shard: tuple[int, int]) -> Path:
    view, start = shard
    return folder / f"view_{view:03d}_from_{start:08d}.pth.tar"


def _read(path: Path, shape: torch.Size, say: Callable[[str], None]) -> Tensor | None:
    """Features of this shape in float16, or None where there are none that can be used."""
    if not path.is_file():
        return None
    try:
        features = checkpoint.read_checkpoint(path).get("features")
    except CheckpointError as error:
        say(f"  features: made again, because {error}")
        return None
    fits = isinstance(features, Tensor) and features.dtype == torch.float16
    return features if fits and features.shape == shape else None


def without_batch_norm(encoder: nn.Module) -> nn.Module:
    """A copy for inference with each batch norm folded into the convolution before it: the same
    features to rounding, and fewer passes over memory. The encoder itself where it cannot be
    traced, or where there is none."""
    try:
        traced = fx.symbolic_trace(encoder)
    except Exception:  # control flow that depends on the data: tracing can fail in any way
        return encoder
    modules = dict(traced.named_modules())
    for node in list(traced.graph.nodes):
        norm = modules.get(node.target) if node.op == "call_module" else None
        before = node.args[0] if type(norm) is nn.BatchNorm2d else None
        conv = modules.get(before.target) if before is not None else None
        if type(conv) is nn.Conv2d and len(before.users) == 1 and norm.track_running_stats:
            parent, _, name = before.target.rpartition(".")
            setattr(traced.get_submodule(parent), name, fuse_conv_bn_eval(conv, norm))
            node.replace_all_uses_with(before)
            traced.graph.erase_node(node)
    traced.delete_all_unused_submodules()
    traced.recompile()
    return traced
