"""5-NN accuracy of the paper's Table 1: Euclidean distance, majority vote, on a layer's features.

The paper says k = 5 and no more; distance, votes and the bank, centre crops of all training images,
are this project's choice.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moco import distributed
from moco.config import LinclsConfig
from moco.data.images import Images
from moco.data.loader import rank_share
from moco.data.subsets import stratified_folds
from moco.evaluate.facts import Subject
from moco.evaluate.feed import Presentation
from moco.evaluate.knn import majority_vote

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

    def extracted(images: Images) -> tuple[Tensor, Tensor]:
        return show.extracted(images, subject.encoder, "5-NN features", unit=False)

    # Of all ranks, in the order of the images.
    mine = torch.tensor(list(rank_share(len(train))), dtype=torch.int64, device=show.device)
    order = distributed.gather_uneven(mine).argsort()
    bank, bank_labels = (distributed.gather_uneven(rows)[order] for rows in extracted(train))
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
    features, labels = extracted(val)
    correct = torch.zeros((), dtype=torch.float64, device=bank.device)
    if len(labels):
        found = majority_vote(features, bank, bank_labels, classes=classes, k=K)
        correct += (found == labels).sum()
    result["top1"] = 100 * distributed.sum_over_ranks(correct).item() / len(val)
    say(f"{layer} + {K}-NN {result['top1']:.1f} %")
    return result
