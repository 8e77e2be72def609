"""Alignment and uniformity on the hypersphere (Wang & Isola, ICML 2020, arXiv:2005.10242).

Needs torch only and can be used without the rest of this project:

    from align_uniform import align_loss, uniform_loss
    loss = align_loss(x, y) + (uniform_loss(x) + uniform_loss(y)) / 2    # x, y: (N, C), unit rows

`align_uniform.metrics` measures whole feature sets, `align_uniform.bounds` knows their limits.
"""

from align_uniform.in_batch import in_batch_contrastive_loss
from align_uniform.losses import (
    align_loss,
    contrastive_loss,
    contrastive_rank,
    uniform_loss,
    uniform_loss_with_queue,
)

__all__ = [
    "align_loss",
    "contrastive_loss",
    "contrastive_rank",
    "in_batch_contrastive_loss",
    "uniform_loss",
    "uniform_loss_with_queue",
]
