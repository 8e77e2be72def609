"""5-NN accuracy of the paper's Table 1: Euclidean distance, majority vote, on a layer's features.

The paper says k = 5 and no more; distance, votes and the bank, centre crops of all training images,
are this project's choice.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from moco import distributed
from moco.config import LinclsConfig
from moco.data.images import Images
from moco.data.loader import rank_share
from moco.data.subsets import stratified_folds
from moco.evaluate.facts import Subject
from moco.evaluate.feed import Presentation
from moco.evaluate.knn import extract_features, majority_vote
from moco.progress import progress

K = 5


def nearest_neighbours(
    subject: Subject, config: LinclsConfig, show: Presentation, train: Images, val: Images
) -> dict:
    """Classify validation images by training images, and with --folds each fold of the training
    images by the others; accuracies in percent.

    Returns:
        {"top1", "k", "layer", "bank", "images"}; with folds "folds": {"count", "top1", "mean"}.
    """
    say, layer, classes = distributed.print_main, config.source.layer, len(train.classes)
    bank, bank_labels = _all_features(subject, show, train)
    result: dict = {"k": K, "layer": layer, "bank": len(bank), "images": len(val)}
    count = config.protocol.folds
    if count:
        accuracies = []
        for held_out in stratified_folds(train.targets, count, config.optim.seed):
            here = torch.zeros(len(bank), dtype=torch.bool, device=bank.device)
            here[held_out] = True
            found = majority_vote(bank[here], bank[~here], bank_labels[~here], classes=classes, k=K)
            accuracies.append(100 * (found == bank_labels[here]).double().mean().item())
        mean = sum(accuracies) / count
        result["folds"] = {"count": count, "top1": accuracies, "mean": mean}
        say(f"{layer} + {K}-NN {mean:.1f} % on {count} folds of the training images")
    features, labels = _features(subject, show, val)
    correct = torch.zeros((), dtype=torch.float64, device=bank.device)
    if len(labels):
        found = majority_vote(features, bank, bank_labels, classes=classes, k=K)
        correct += (found == labels).sum()
    result["top1"] = 100 * distributed.sum_over_ranks(correct).item() / len(val)
    say(f"{layer} + {K}-NN {result['top1']:.1f} %")
    return result


def _features(subject: Subject, show: Presentation, images: Images) -> tuple[Tensor, Tensor]:
    """Of this rank's share."""
    return extract_features(
        subject.encoder,
        show.loader(images),
        device=show.device,
        mean=show.mean,
        std=show.std,
        progress=functools.partial(progress, description="5-NN features"),
        unit=False,
    )


def _all_features(subject: Subject, show: Presentation, images: Images) -> tuple[Tensor, Tensor]:
    """Of all ranks' shares, in the order of the images."""
    mine = torch.tensor(list(rank_share(len(images))), dtype=torch.int64, device=show.device)
    features, labels = map(distributed.gather_uneven, _features(subject, show, images))
    order = distributed.gather_uneven(mine).argsort()
    return features[order], labels[order]
