"""Batch norm over groups of a batch: `SplitBatchNorm2d`, and how a network gets it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SplitBatchNorm2d(nn.BatchNorm2d):
    """Batch norm whose training statistics come from `splits` groups of the batch, each its own.

    One device then sees the statistics that `splits` devices see, each with its share of the
    batch. Groups are consecutive samples, as the shares of devices are; so they stay contiguous in
    either memory format. The running statistics are the mean over groups and have the usual size C,
    so weights load into plain BatchNorm2d and back; eval mode is the same.

    Raises:
        ValueError: in training, a batch that is not a multiple of `splits`.
    """

    def __init__(self, num_features: int, splits: int, **kwargs) -> None:
        super().__init__(num_features, **kwargs)
        self.splits = splits

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        if len(x) % self.splits:
            raise ValueError(
                f"a batch of {len(x)} cannot be split into {self.splits} equal batch-norm groups"
            )
        self.num_batches_tracked.add_(1)
        means, variances = (  # (splits, C), what each group makes of the running statistics
            running.repeat(self.splits, 1) for running in (self.running_mean, self.running_var)
        )
        groups = [
            F.batch_norm(
                group, mean, variance, self.weight, self.bias, True, self.momentum, self.eps
            )
            for group, mean, variance in zip(x.chunk(self.splits), means, variances, strict=True)
        ]
        with torch.no_grad():
            self.running_mean.copy_(means.mean(dim=0))
            self.running_var.copy_(variances.mean(dim=0))
        return torch.cat(groups)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, splits={self.splits}"


def split_batch_norm(module: nn.Module, splits: int) -> None:
    """Replace every BatchNorm2d inside `module` by SplitBatchNorm2d, keeping its parameters."""
    for name, child in module.named_children():
        if type(child) is nn.BatchNorm2d:
            if child.momentum is None or not child.track_running_stats:
                raise ValueError(f"batch norm without running averages cannot be split: {child}")
            split = SplitBatchNorm2d(
                child.num_features,
                splits,
                eps=child.eps,
                momentum=child.momentum,
                affine=child.affine,
            )
            split.load_state_dict(child.state_dict())
            setattr(module, name, split)
        else:
            split_batch_norm(child, splits)


def has_batch_norm(module: nn.Module) -> bool:
    return any(isinstance(child, nn.BatchNorm2d) for child in module.modules())
