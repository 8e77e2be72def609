"""Features of a data set, k-NN and top-k accuracy, each image counted exactly once over ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from moco import distributed
from moco.data.views import normalize


@torch.no_grad()
def extract_features(
    encoder: nn.Module,
    loader: DataLoader,
    *,
    device: torch.device,
    mean: Sequence[float],
    std: Sequence[float],
    progress: Callable = iter,
    unit: bool = True,
) -> tuple[Tensor, Tensor]:
    """Features and labels of this rank's share: (N, C) float32 and (N,), on the device; features
    divided by their length unless `unit` is False.

    The encoder is put into eval mode and back. Without any images: (0, 0) and (0,).
    """
    was_training = encoder.training
    encoder.eval()
    features, labels = [], []
    try:
        for images, targets in progress(loader):
            images = normalize(images.to(device, non_blocking=True), mean, std)
            found = encoder(images).float()
            features.append(F.normalize(found, dim=1) if unit else found)
            labels.append(targets.to(device, non_blocking=True))
    finally:
        encoder.train(was_training)
    if not features:  # more ranks than images
        return torch.zeros(0, 0, device=device), torch.zeros(0, dtype=torch.int64, device=device)
    return torch.cat(features), torch.cat(labels)


@torch.no_grad()
def knn_predict(
    features: Tensor,
    bank: Tensor,
    bank_labels: Tensor,
    *,
    classes: int,
    k: int = 200,
    temperature: float = 0.07,
    block_size: int = 1024,
) -> Tensor:
    """Weighted k-nearest-neighbour vote (Wu et al. 2018, arXiv:1805.01978, section 3.4).

    Each of the k bank features most similar to a query votes for its label with the weight
    exp(<query, neighbour> / temperature).

    Args:
        features: (N, C) unit rows to classify.
        bank: (M, C) unit rows with known labels.
        bank_labels: (M,) int64 in [0, classes).
        k: neighbours; capped at M.
        block_size: queries at a time; memory is block_size x M.

    Returns:
        (N, classes) int64, the classes from most to fewest votes, then -1 for each class that no
        neighbour has.

    Raises:
        ValueError: k or temperature not positive.
    """
    if k < 1 or temperature <= 0:
        raise ValueError(
            f"k must be >= 1 and temperature > 0, got k={k}, temperature={temperature}"
        )
    k = min(k, len(bank))
    ranked = []
    for queries in features.split(block_size):
        similarity, neighbours = (queries @ bank.t()).topk(k, dim=1)  # (B, k)
        # Shifted by each row's best, which changes no ranking and cannot overflow.
        weights = ((similarity - similarity[:, :1]) / temperature).exp()
        votes = weights.new_zeros(len(queries), classes)
        labels = bank_labels[neighbours]  # (B, k)
        votes.scatter_add_(1, labels, weights)
        # A weight may round to 0; it is a vote all the same.
        voted = torch.zeros_like(votes, dtype=torch.bool).scatter_(1, labels, True)
        votes, order = votes.masked_fill_(~voted, -1).sort(dim=1, descending=True)
        ranked.append(order.masked_fill_(votes < 0, -1))
    return torch.cat(ranked)


@torch.no_grad()
def majority_vote(
    features: Tensor, bank: Tensor, bank_labels: Tensor, *, classes: int, k: int = 5
) -> Tensor:
    """The class that most of the k nearest bank features have, in Euclidean distance; of classes
    with as many that of the nearest.

    Args:
        features: (N, C) to classify; bank: (M, C) with bank_labels (M,) in [0, classes).
        k: neighbours; capped at M.

    Returns:
        (N,) int64.
    """
    k = min(k, len(bank))
    nearness = torch.arange(k, 0, -1, device=bank.device)  # of the neighbours, from the nearest on
    chosen = []
    # Distances come from products: of features that share a large part nothing else would be left.
    centre = bank.mean(dim=0)
    bank = bank - centre
    for queries in (features - centre).split(1024):
        neighbours = torch.cdist(queries, bank).topk(k, dim=1, largest=False).indices
        labels = bank_labels[neighbours]  # (B, k)
        votes = F.one_hot(labels, classes).sum(dim=1).gather(1, labels)  # (B, k) of each label
        best = (votes * (k + 1) + nearness).argmax(dim=1, keepdim=True)
        chosen.append(labels.gather(1, best).squeeze(1))
    return torch.cat(chosen) if chosen else bank_labels[:0]


def count_correct(ranked: Tensor, targets: Tensor, topk: Sequence[int]) -> Tensor:
    """How many targets are among the first k of their row, for each k; float64 (len(topk),).

    Args:
        ranked: (N, >= max(topk)) classes from most to least likely; -1 for none.
        targets: (N,); -1, for a class that is not known, is never right.
    """
    ranked = ranked[:, : max(topk)]
    hits = (ranked == targets.unsqueeze(1)) & (ranked >= 0)  # (N, max k)
    return torch.stack([hits[:, :k].any(dim=1).sum() for k in topk]).double()


@torch.no_grad()
def knn_accuracy(
    encoder: nn.Module,
    bank_loader: DataLoader,
    val_loader: DataLoader,
    *,
    classes: int,
    device: torch.device,
    mean: Sequence[float],
    std: Sequence[float],
    k: int = 200,
    temperature: float = 0.07,
    progress: Callable = iter,
) -> dict[str, float]:
    """Weighted k-NN accuracy in percent; loaders give this rank's share of bank and validation set.

    Returns:
        {"top1", "top5" (top-min(5, classes)), "k" as used, "images", "bank" (its size)}.
    """
    inputs = {"device": device, "mean": mean, "std": std, "progress": progress}
    bank, bank_labels = extract_features(encoder, bank_loader, **inputs)
    features, labels = extract_features(encoder, val_loader, **inputs)
    return knn_scores(
        features, labels, bank, bank_labels, classes=classes, k=k, temperature=temperature
    )


def knn_scores(
    features: Tensor,
    labels: Tensor,
    bank: Tensor,
    bank_labels: Tensor,
    *,
    classes: int,
    k: int = 200,
    temperature: float = 0.07,
) -> dict[str, float]:
    """Weighted k-NN accuracy in percent, from what `extract_features` gives on this rank.

    Every rank classifies its share of the features by the banks of all ranks.

    Returns:
        As `knn_accuracy`.
    """
    bank, bank_labels = distributed.gather_uneven(bank), distributed.gather_uneven(bank_labels)
    counts = torch.zeros(3, dtype=torch.float64, device=bank.device)  # top-1, top-5, images
    if len(labels):
        ranked = knn_predict(
            features, bank, bank_labels, classes=classes, k=k, temperature=temperature
        )
        counts[:2] = count_correct(ranked, labels, (1, min(5, classes)))
        counts[2] = len(labels)
    top1, top5, images = distributed.sum_over_ranks(counts).tolist()
    return {
        "top1": 100 * top1 / images,
        "top5": 100 * top5 / images,
        "k": min(k, len(bank)),
        "images": int(images),
        "bank": len(bank),
    }
