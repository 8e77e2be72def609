"""What the fast paths are measured against: the ancestors' way of doing it, in our own words."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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
