"""InfoNCE within a batch: each row of one view against all rows of the other, in both directions.

Shapes and numerics are those of `align_uniform.losses`. Nothing is swept, since a batch's K x K
similarities are few: derivatives of every order are there.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from align_uniform import losses
from align_uniform._checks import check_positive


@losses._in_full_precision
def in_batch_contrastive_loss(x: Tensor, y: Tensor, tau: float) -> Tensor:
    """Symmetric InfoNCE of K pairs (arXiv:2005.10242, appendix B.1; printed there without the
    minus sign): the mean of the row-wise and the column-wise cross-entropy of S = x y^T / tau with
    the pairs on the diagonal,

        1/(2K) sum_i [ -S_ii + log sum_j exp(S_ij) ] + 1/(2K) sum_i [ -S_ii + log sum_j exp(S_ji) ]

    Each row has K - 1 negatives, the rows of other pairs in the other view. Rows of its own view
    are none (SimCLR has them too).

    Args:
        x, y: (K, C) features of positive pairs, unit rows; gradient flows to both.
        tau: temperature, > 0.

    Returns:
        Scalar >= 0; log K when all similarities are equal, log(1 + (K-1) exp(-1/tau)) when pairs
        coincide and others are orthogonal, 0 for one pair.

    Raises:
        ValueError: for shapes, dtypes or a tau other than the above.
    """
    losses._check_features(x, "x")
    losses._check_features(y, "y", like=x)
    check_positive(tau, "tau")
    losses._unit_length.look_at(x, "x of in_batch_contrastive_loss")
    losses._unit_length.look_at(y, "y of in_batch_contrastive_loss")
    positive = (x * y).sum(dim=1) / tau  # (K,)
    if len(x) == 1:
        return (positive - positive).sum()  # no negatives: 0, and NaN where there is one
    own = torch.eye(len(x), dtype=torch.bool, device=x.device)
    negatives = (_Product.apply(x, y) / tau).masked_fill(own, -math.inf)  # (K, K)
    # logaddexp(positive, negatives) - positive, without cancelling when the loss is small.
    rows = -F.logsigmoid(positive - negatives.logsumexp(dim=1))
    columns = -F.logsigmoid(positive - negatives.logsumexp(dim=0))
    return (rows.mean() + columns.mean()) / 2


class _Product(torch.autograd.Function):
    """x @ y.t(), whose backward pass too is out of reach of an autocast that surrounds it."""

    @staticmethod
    def forward(ctx, x: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(x, y)
        return x @ y.t()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, y = ctx.saved_tensors
        with torch.autocast(grad.device.type, enabled=False):
            return _Product.apply(grad, y.t()), _Product.apply(grad.t(), x.t())
