"""What a run shows of its representation while it trains: numbers at print steps, distributions at
the end of each epoch, and the views that the network sees, once.

All of it is of the latest batch on rank 0, whatever the objective, so that runs of different
objectives can be compared in one chart.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torchvision.utils import make_grid

from align_uniform import align_loss, uniform_loss
from align_uniform.bounds import uniformity_infimum
from moco.builder import MoCoLosses
from moco.config import PretrainConfig, learned_values
from moco.log import RunLog

# Of alignment and uniformity as they are compared between runs; the paper's evaluation has them.
ALPHA, T = 2.0, 2.0

PAIRS_SHOWN, PAIRS_PER_ROW = 16, 4
KEYS_IN_HISTOGRAM = 4096


def lay_out(log: RunLog, config: PretrainConfig, facts: dict[str, Any]) -> None:
    """Set up TensorBoard: uniformity and its bound in one chart, and the hyperparameters."""
    log.one_chart(
        {
            f"uniformity (t={T:g}) and its infimum": [
                "metrics/uniformity",
                "metrics/uniformity_infimum",
            ],
            f"alignment (alpha={ALPHA:g})": ["metrics/alignment"],
        }
    )
    metrics = ["train/loss", "metrics/alignment", "metrics/uniformity", "features/std"]
    if config.watching.knn_every:
        metrics.append("knn/top1")
    learned = learned_values({**config.to_flat(), **facts})
    log.hyperparameters({**learned, "processes": config.placement.processes}, metrics)


@torch.no_grad()
def batch_metrics(losses: MoCoLosses) -> dict[str, float]:
    """Alignment and uniformity of the latest batch, at one alpha and t for all runs.

    Alignment is the mean of ||q - k||^2 over positive pairs; uniformity is the log of the mean of
    exp(-2 ||q_i - q_j||^2) over pairs of queries of different images. Not of queries and queue, as
    in the loss: those are two distributions, which can be further apart than the infimum of one
    allows, and a queue that still holds its first, random keys is uniform whatever the queries are.
    (A batch is a sample: of few images it can fall below the infimum a little.)
    """
    q, k, _ = losses.features()
    # Views of one image are both among the queries of a symmetric step, but in different passes.
    potentials = torch.stack([uniform_loss(part, T) for part in q.chunk(losses.passes)])
    return {
        "alignment": align_loss(q, k, ALPHA).item(),
        "uniformity": potentials.logsumexp(dim=0).item() - math.log(losses.passes),
        "uniformity_infimum": uniformity_infimum(q.shape[1], T),
    }


@torch.no_grad()
def distributions(losses: MoCoLosses) -> dict[str, tuple[Tensor, float, float]]:
    """Distances ||q - k|| of positive pairs, and similarities <q, key> of queries with keys spread
    evenly over the queue: name -> (values, least, most)."""
    q, k, queue = losses.features()
    keys = queue[:, :: -(-queue.shape[1] // KEYS_IN_HISTOGRAM)]
    return {
        "positive_distance": (torch.linalg.vector_norm(q - k, dim=1), 0.0, 2.0),
        "queue_similarity": (q @ keys.to(q.dtype), -1.0, 1.0),
    }


def show_views(log: RunLog, im_q: Tensor, im_k: Tensor) -> None:
    """A grid of the first pairs of views, side by side, (N, 3, H, W) uint8 each: what the network
    sees but for the normalisation."""
    if log.active:
        pairs = torch.cat([im_q[:PAIRS_SHOWN], im_k[:PAIRS_SHOWN]], dim=3).cpu()
        log.picture("views", 1, make_grid(pairs, nrow=PAIRS_PER_ROW, pad_value=255))
