"""What a probe trains on and is evaluated on: images seen anew in every epoch, or kept features."""

from __future__ import annotations

import argparse
import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from moco import distributed
from moco.data.images import Images, Subset
from moco.data.loader import AugmentedViews, EpochBatches, PlainImages, RankShare, TrainLoader
from moco.data.views import eval_transform, lincls_recipe, normalize
from moco.evaluate.feature_cache import cached_features
from moco.evaluate.heads import Frozen


@dataclass
class Feed:
    """Training batches and held-out features of one stage; each rank has its share."""

    batches: EpochBatches
    train: Iterable  # one epoch of batches, as `inputs` takes them
    inputs: Callable[..., tuple[Tensor, Tensor]]  # of a batch: what is trained on, targets
    held_out: Callable[[], Iterator[tuple[Tensor, Tensor]]]  # features, targets


def with_features(
    images: DataLoader, frozen: Frozen, args: argparse.Namespace, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    for batch, targets in images:
        batch = normalize(batch.to(device, non_blocking=True), args.mean, args.std)
        yield frozen(batch), targets.to(device, non_blocking=True)


def image_feed(
    args: argparse.Namespace,
    frozen: Frozen,
    images: Images,
    val: DataLoader,
    eval_loader: Callable[..., DataLoader],
    device: torch.device,
    at_end: contextlib.ExitStack,
    fold: tuple[list[int], list[int]] | None = None,
) -> Feed:
    """Random crops of the images in every epoch: the standard protocol, and fine-tuning.

    `fold`: indices to train on and to hold out, in place of all images and `val`.
    """
    if fold is not None:
        held_out = Subset(images, fold[1])
        val = eval_loader(PlainImages(held_out, eval_transform(args.image_size)))
        images = Subset(images, fold[0])
    batches = EpochBatches(len(images), args.batch_size, seed=args.seed)
    views = AugmentedViews(images, lincls_recipe(args.image_size), seed=args.seed, num_views=1)
    train = TrainLoader(views, batches, workers=args.workers, device=device)
    at_end.callback(train.end)

    def inputs(batch: Sequence) -> tuple[Tensor, Tensor]:
        view, target, _ = batch
        view = normalize(view, args.mean, args.std)
        return (view if args.finetune else frozen(view)), target.to(device, non_blocking=True)

    return Feed(batches, train, inputs, lambda: with_features(val, frozen, args, device))


def cached_feed(
    args: argparse.Namespace,
    frozen: Frozen,
    width: int,
    images: Images,
    val_images: Images,
    device: torch.device,
) -> Callable[..., Feed]:
    """Features, `width` numbers each, that are extracted once and kept; returns what `image_feed`
    is otherwise."""
    extract = functools.partial(
        cached_features,
        frozen,
        width=width,
        folder=args.cache_dir or args.save_dir / "features",
        seed=args.seed,
        image_size=args.image_size,
        mean=args.mean,
        std=args.std,
        device=device,
        batch_size=args.batch_size // args.processes,
        workers=args.workers,
        say=distributed.print_main,
    )
    train = to_device_if_it_fits(extract(images, views=args.cached_views), device)
    val = extract(val_images, views=0)[0]
    centre = train[0]
    if args.folds and args.cached_views:
        centre = extract(images, views=0)[0]
    targets = torch.tensor(images.targets)
    val_targets = torch.tensor(val_images.targets)

    def feed(at_end: contextlib.ExitStack, fold: tuple[list[int], list[int]] | None = None) -> Feed:
        held_out, held_out_targets, rows = val, val_targets, torch.arange(len(targets))
        if fold is not None:
            rows = torch.tensor(fold[0])
            held_out, held_out_targets = centre[fold[1]], targets[fold[1]]
        batches = EpochBatches(len(rows), args.batch_size, seed=args.seed)

        def inputs(batch: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
            chosen = rows[[index for _, index in batch]]
            view = train[batch[0][0] % len(train)]
            features = view[distributed.to_device(chosen, view.device)].to(device).float()
            return features, distributed.to_device(targets[chosen], device)

        def own_share() -> Iterator[tuple[Tensor, Tensor]]:
            mine = torch.tensor(list(RankShare(len(held_out))), dtype=torch.int64)
            for part in mine.split(4096):
                part_features = held_out[part.to(held_out.device)].to(device).float()
                yield part_features, held_out_targets[part].to(device)

        return Feed(batches, batches, inputs, own_share)

    return feed


def to_device_if_it_fits(features: Tensor, device: torch.device) -> Tensor:
    """At most half of a GPU's free memory is taken."""
    if device.type == "cuda" and features.nbytes < torch.cuda.mem_get_info(device)[0] / 2:
        return features.to(device)
    return features
