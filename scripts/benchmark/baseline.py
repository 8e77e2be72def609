"""What the fast paths are measured against: the ancestors' way of doing it, in our own words."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from moco import distributed  # noqa: E402


def align_uniform(q: Tensor, k: Tensor, queue: Tensor, t: float) -> Tensor:
    """align(2) + uniform(t) with intra-batch pairs, by the full N x K matrix and its autograd.

    The queue is cloned, because enqueueing changes it before backward runs.
    """
    n, size = len(q), queue.shape[1]
    align = (2 - 2 * (q * k).sum(dim=1)).mean()
    with_queue = (2 * t * (q @ queue.clone()) - 2 * t).exp().sum()
    in_batch = torch.pdist(q).pow(2).mul(-t).exp().sum()
    return align + ((with_queue + in_batch) / (n * size + n * (n - 1) / 2)).log()


def info_nce(
    q: Tensor, k: Tensor, queue: Tensor, tau: float, hits: bool = True
) -> tuple[Tensor, Tensor | None]:
    """InfoNCE by the full N x (1+K) logits, and top-1 and top-5 hits from the same matrix."""
    positive = (q * k).sum(dim=1, keepdim=True)
    logits = torch.cat([positive, q @ queue.clone()], dim=1) / tau
    target = torch.zeros(len(q), dtype=torch.int64, device=q.device)
    loss = F.cross_entropy(logits, target)
    if not hits:
        return loss, None
    among = logits.topk(5, dim=1).indices == 0
    return loss, torch.stack([among[:, :1].sum(), among.sum()])


@torch.no_grad()
def update_key_encoder(encoder_k: nn.Module, encoder_q: nn.Module, m: float) -> None:
    """The momentum update, one parameter after another."""
    for key, query in zip(encoder_k.parameters(), encoder_q.parameters(), strict=True):
        key.data = m * key + (1 - m) * query


def shuffle(images: Tensor, permutation: Tensor) -> Tensor:
    """This rank's part of the global batch in the order of rank 0's `permutation`: everything is
    sent to everyone, joined to one batch, and indexed."""
    world, rank = distributed.world_size(), distributed.rank()
    parts = list(distributed.all_gather(images).chunk(world))
    order = distributed.all_gather(permutation.to(images.device)).chunk(world)[0]
    return torch.cat(parts)[order.view(world, -1)[rank]]
