"""Protocols of linear evaluation: standard, on cached features, with folds, fine-tuning.

Each is a feed of batches for one way of training heads (`linear.train_heads`).
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict

import torch

from moco import distributed
from moco.config import LinclsConfig
from moco.data.images import Images
from moco.data.subsets import stratified_folds
from moco.errors import TrainingError
from moco.evaluate.classifier_io import protocol_values
from moco.evaluate.facts import Subject
from moco.evaluate.feature_cache import FeatureCache
from moco.evaluate.feed import CachedFeed, ImageFeed, Presentation, to_device_if_it_fits
from moco.evaluate.heads import HeadConfig, HeadResult, best_head
from moco.evaluate.linear import LinearEvaluation, Stage, train_heads


def make_feed(
    config: LinclsConfig, subject: Subject, images: Images, val_images: Images, show: Presentation
) -> ImageFeed | CachedFeed:
    """What the protocol trains on: random crops, or features of each image."""
    encoder, protocol, optim = subject.encoder, config.protocol, config.optim
    common = {"batch_size": optim.batch_size, "seed": optim.seed}
    if not protocol.cached:
        val = show.loader(val_images, persistent=True)
        return ImageFeed(encoder, images, val, show, **common, finetune=protocol.finetune)

    def features(images: Images, views: int) -> torch.Tensor:
        folder = protocol.cache_dir or config.saving.save_dir / "features"
        cache = FeatureCache(encoder, images, folder, show, views=views, seed=optim.seed)
        return cache.features(subject.info["feature_dim"])

    views = to_device_if_it_fits(features(images, protocol.cached_views), show.device)
    val = features(val_images, 0)[0]
    needs_centre = protocol.folds and protocol.cached_views
    return CachedFeed(
        views=views,
        targets=torch.tensor(images.targets),
        centre=features(images, 0)[0] if needs_centre else views[0],
        val=val,
        val_targets=torch.tensor(val_images.targets),
        device=show.device,
        **common,
    )


def train_classifiers(
    evaluation: LinearEvaluation,
    feed: ImageFeed | CachedFeed,
    targets: Sequence[int],
) -> dict:
    """Train heads with all learning rates and weight decays and choose; what lincls.json says.

    Args:
        targets: of the training images.

    Raises:
        TrainingError: all heads have diverged, or the frozen encoder has changed.
    """
    config, encoder = evaluation.config, evaluation.subject.encoder.encoder
    protocol, optim = config.protocol, config.optim
    originally = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    configs = [HeadConfig(lr, decay) for lr in optim.lr for decay in optim.weight_decay]
    result: dict = {"evaluation": "cached" if protocol.cached else "standard"}
    stage = Stage(feed)
    if protocol.finetune:
        result["evaluation"] = "finetune"
    if protocol.folds:
        result["folds"], stage = cross_validate(evaluation, feed, configs, targets)
        configs = [HeadConfig(**result["folds"]["chosen"])]
    results = train_heads(evaluation, stage, configs)
    if not protocol.finetune:
        now = encoder.state_dict()
        changed = [name for name in originally if not torch.equal(originally[name], now[name])]
        if changed:
            raise TrainingError(f"the frozen encoder has changed: {', '.join(changed[:5])}")
    if protocol.probe == "stl10":
        result |= {"evaluation": "stl10", "layer": config.source.layer}
    fate = "fine-tuned" if protocol.finetune else "unchanged"
    fate = f"all {len(originally)} tensors of the encoder are {fate}"
    print_results(results, fate, with_folds=bool(protocol.folds))
    best, last = best_head(results, "best"), best_head(results, "last")
    result.update(best=best.best, last=last.last, protocol=protocol_values(config))
    if protocol.probe == "stl10":
        distributed.print_main(f"{config.source.layer} + linear {last.last['top1']:.1f} %")
    if len(results) > 1:
        result["best"] = {**best.best, **asdict(best.config)}
        result["last"] = {**last.last, **asdict(last.config)}
        result["heads"] = [head.to_flat() for head in results]
    return result


def print_results(results: Sequence[HeadResult], fate: str, *, with_folds: bool) -> None:
    say = distributed.print_main
    best, last = best_head(results, "best"), best_head(results, "last")
    best_top1, last_top1 = f"best top-1 {best.best['top1']:.2f}", f"{last.last['top1']:.2f}"
    if with_folds:
        say(f"validation top-1 {last_top1} with {last.config}, evaluated once; {fate}")
    elif len(results) == 1:
        say(f"{best_top1} (epoch {best.best['epoch']}), last {last_top1}; {fate}")
    else:
        for head in results:
            line = f"diverged in epoch {head.diverged}"
            if head.diverged is None:
                line = f"best top-1 {head.best['top1']:6.2f} (epoch {head.best['epoch']}), "
                line += f"last {head.last['top1']:6.2f}"
            say(f"{head.config!s:>20}  {line}")
        say(
            f"{best_top1} with {best.config}, last {last_top1} with {last.config}: chosen on "
            "validation, which flatters (--folds does not)"
        )
        say(fate)


def cross_validate(
    evaluation: LinearEvaluation,
    feed: ImageFeed | CachedFeed,
    configs: Sequence[HeadConfig],
    targets: Sequence[int],
) -> tuple[dict, Stage]:
    """Accuracy of each setting on each fold of the training set that it was not trained on.

    Returns:
        {"count", "settings": for each its lr, weight_decay, top1 of each fold, mean and standard
        deviation (None for all where it has diverged), "chosen": that of highest mean}, and the
        stage that follows, on all images.
    """
    config = evaluation.config
    folds, batch_size = config.protocol.folds, config.optim.batch_size
    # For each fold that is done the top-1 accuracy of each setting.
    table = [list(row) for row in (evaluation.subject.resume_from or {}).get("folds", [])]
    steps = 0
    for number, held_out in enumerate(stratified_folds(targets, folds, config.optim.seed)):
        outside = set(held_out)
        rest = [index for index in range(len(targets)) if index not in outside]
        if number >= len(table):
            stage = Stage(feed.fold(rest, held_out), steps, number, table)
            results = train_heads(evaluation, stage, configs)
            table.append([head.last.get("top1") for head in results])
            accuracies = ", ".join(
                f"{top1:.2f} ({head})"
                for head, top1 in zip(configs, table[-1], strict=True)
                if top1 is not None
            )
            distributed.print_main(
                f"fold {number + 1} of {folds}, {len(held_out)} images held out: {accuracies}"
            )
        steps += config.schedule.epochs * (len(rest) // batch_size)
    return _choose(configs, table), Stage(feed, steps, None, table)


def _choose(configs: Sequence[HeadConfig], table: Sequence[Sequence[float | None]]) -> dict:
    summary = []
    for head, column in zip(configs, zip(*table, strict=True), strict=True):
        row = {**asdict(head), "top1": list(column), "mean": None, "std": None}
        if None not in column:
            row |= {"mean": statistics.fmean(column), "std": statistics.stdev(column)}
        summary.append(row)
    usable = [row for row in summary if row["mean"] is not None]
    if not usable:
        raise TrainingError("each setting has diverged in some fold; give a lower --lr")
    chosen = max(usable, key=lambda row: row["mean"])
    for head, row in zip(configs, summary, strict=True):
        mean = "diverged" if row["mean"] is None else f"{row['mean']:.2f} +- {row['std']:.2f}"
        mark = "  <- chosen" if row is chosen else ""
        distributed.print_main(f"{head!s:>20}  held-out top-1 {mean}{mark}")
    chosen = {name: chosen[name] for name in ("lr", "weight_decay")}
    return {"count": len(table), "settings": summary, "chosen": chosen}
