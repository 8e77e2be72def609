"""Features of a data set, k-NN and top-k accuracy, each image counted exactly once over ranks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moco import distributed
from moco.data.views import normalize
from moco.memory import refuse_or_warn


@torch.no_grad()
def extract_features(
    encoder: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    device: torch.device,
    mean: Sequence[float],
    std: Sequence[float],
    unit: bool = True,
) -> tuple[Tensor, Tensor]:
    """Features and labels of this rank's share: (N, C) float32 and (N,), on the device; features
    divided by their length unless `unit` is False. Without any images: (0, 0) and (0,).

    Args:
        encoder: in eval mode.
        batches: (N, 3, S, S) uint8 images and (N,) labels.
    """
    # Empty ones first: there can be more ranks than images.
    features, labels = [], [torch.zeros(0, dtype=torch.int64, device=device)]
    for images, targets in batches:
        images = normalize(images.to(device, non_blocking=True), mean, std)
        found = encoder(images).float()
        features.append(F.normalize(found, dim=1) if unit else found)
        labels.append(targets.to(device, non_blocking=True))
    return torch.cat(features or [torch.zeros(0, 0, device=device)]), torch.cat(labels)


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


def knn_accuracy(
    queries: tuple[Tensor, Tensor],
    bank: tuple[Tensor, Tensor],
    *,
    classes: int,
    k: int = 200,
    temperature: float = 0.07,
) -> dict[str, float]:
    """Weighted k-NN accuracy in percent; every rank classifies its queries by the banks of all.

    Args:
        queries, bank: features and labels as `extract_features` gives them on this rank.

    Returns:
        {"top1", "top5" (top-min(5, classes)), "k" as used, "images", "bank" (its size)}.

    Raises:
        TrainingError: on all ranks, where the memory of one does not suffice.
    """
    known, known_labels = map(distributed.gather_uneven, bank)
    features, labels = queries
    counts = torch.zeros(3, dtype=torch.float64, device=known.device)  # top-1, top-5, images
    lacking = None
    try:
        if len(labels):
            ranked = knn_predict(
                features, known, known_labels, classes=classes, k=k, temperature=temperature
            )
            counts[:2] = count_correct(ranked, labels, (1, min(5, classes)))
            counts[2] = len(labels)
    except torch.OutOfMemoryError as error:
        lacking = True, f"out of memory for k-NN among {len(known)} images, take fewer: {error}"
    refuse_or_warn(lacking)
    top1, top5, images = distributed.sum_over_ranks(counts).tolist()
    return {
        "top1": 100 * top1 / images,
        "top5": 100 * top5 / images,
        "k": min(k, len(known)),
        "images": int(images),
        "bank": len(known),
    }
