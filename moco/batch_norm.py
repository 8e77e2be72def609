"""Batch norm in groups of images: statistics of each group apart, however groups lie on devices.

A group is what one device of a published run was: 32 images. One process can hold several groups
(`splits`), or a group can be spread over several processes (`span`).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moco import distributed


class SplitBatchNorm2d(nn.BatchNorm2d):
    """Batch norm whose training statistics are those of groups of the batch, each its own.

    Groups are consecutive samples, as the shares of devices are. The running statistics are the
    mean over groups and have the usual size C, so weights load into plain BatchNorm2d and back;
    eval mode is the same.

    Args:
        num_features: C.
        splits: groups in the batch of this process.
        span: consecutive ranks over which one group is spread; `splits` is 1 then. The running
            statistics of a lone layer are those of its own group; see `EncoderNorms` for the rest.

    Raises:
        ValueError: in training, a batch that is not a multiple of `splits`.
    """

    def __init__(self, num_features: int, splits: int, span: int = 1, **kwargs) -> None:
        super().__init__(num_features, **kwargs)
        if splits < 1 or span < 1 or (splits > 1 and span > 1):
            raise ValueError(
                f"a group is spread over ranks or shares one, got splits={splits}, span={span}"
            )
        self.splits = splits
        self.span = span
        self.shared: _Shared | None = None  # while the encoder around it runs

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        if len(x) % self.splits:
            raise ValueError(
                f"a batch of {len(x)} cannot be split into {self.splits} equal batch-norm groups"
            )
        if self.shared is None:
            alone = EncoderNorms([self])
            alone.begin(interleaved=False)
            y = self(x)
            alone.end()
            return y
        mine, plain = self.shared, (self.weight, self.bias)
        if self.span > 1:
            return _SpannedNorm.apply(x, *plain, mine.mean, mine.var, self.eps, self.span)
        if self.splits > 1 and not torch.compiler.is_compiling():
            statistics = mine.of_groups(self.splits)
            return _GroupsNorm.apply(x, *mine.repeated, *statistics, self.eps, mine.interleaved)
        if mine.interleaved:
            wide = x.reshape(len(x) // self.splits, -1, *x.shape[2:])
            y = F.batch_norm(wide, mine.mean, mine.var, *mine.repeated, True, 1.0, self.eps)
            return y.view(x.shape)
        return _norm_each(x, *plain, *mine.of_groups(self.splits), self.eps)

    def extra_repr(self) -> str:
        spread = f", span={self.span}" if self.span > 1 else ""
        return f"{super().extra_repr()}, splits={self.splits}{spread}"


def _norm_each(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, means: Tensor, vars: Tensor, eps: float
) -> Tensor:
    """Batch norm of consecutive groups; their statistics go into `means`, `vars` (G, C)."""
    groups = [
        F.batch_norm(group, mean, var, weight, bias, True, 1.0, eps)
        for group, mean, var in zip(x.chunk(len(means)), means, vars, strict=True)
    ]
    return groups[0] if len(groups) == 1 else torch.cat(groups)


class _GroupsNorm(torch.autograd.Function):
    """`_norm_each` with few operations and without another pass over activations.

    Interleaved groups are the channels of a view of x, (N/G, G*C, ...), and one batch norm serves
    all. Of consecutive groups each result is written where it belongs, a slice of one tensor.
    Weight and bias are repeated for each group, (G*C,).
    """

    @staticmethod
    def forward(ctx, x, weight, bias, means, vars, eps, interleaved):
        ctx.groups = 1 if interleaved else len(means)
        ctx.width = len(means) // ctx.groups  # of the groups of one batch norm
        ctx.eps = eps
        x = x.contiguous() if interleaved else x
        y = torch.empty_like(x)
        saved = means.new_empty(2, *means.shape)  # mean and 1 / standard deviation
        for source, target, *values in _pieces(ctx, x, y, weight, bias, means, vars, *saved):
            torch.native_batch_norm(source, *values[:4], True, 1.0, eps, out=(target, *values[4:]))
        ctx.save_for_backward(x, weight, saved)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, slope):
        x, weight, saved = ctx.saved_tensors
        wanted = list(ctx.needs_input_grad[:3])
        slope = slope.contiguous() if ctx.width > 1 else slope
        parts = [
            torch.ops.aten.native_batch_norm_backward(
                slope_g, x_g, weight_g, None, None, mean, inverse, True, ctx.eps, wanted
            )
            for slope_g, x_g, weight_g, mean, inverse in _pieces(ctx, slope, x, weight, *saved)
        ]
        if len(parts) == 1:
            of_x, of_weight, of_bias = parts[0]
            of_x = of_x.view(x.shape) if wanted[0] else None
        else:
            of_x, of_weight, of_bias = (
                torch.cat(part) if want else None
                for part, want in zip(zip(*parts, strict=True), wanted, strict=True)
            )
        return of_x, of_weight, of_bias, None, None, None, None


def _pieces(ctx, x: Tensor, y: Tensor, *values: Tensor | None) -> Iterator[tuple]:
    """What each batch norm works on: two (N, C, ...) and some (G, C) or (G*C,) tensors in parts."""
    images = [
        tensor.view(len(x) // ctx.width, -1, *x.shape[2:]).chunk(ctx.groups) for tensor in (x, y)
    ]
    numbers = [
        [None] * ctx.groups if value is None else value.view(ctx.groups, -1) for value in values
    ]
    return zip(*images, *numbers, strict=True)


class _SpannedNorm(torch.autograd.Function):
    """Batch norm of one group that is spread over `span` ranks, an equal part on each.

    Ranks exchange the mean and variance of their parts, and in backward the two sums over the group
    that the gradient needs. The gradient is that of the sum of the ranks' losses, as data-parallel
    averaging expects.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, mean_out, var_out, eps, span):
        exact = x if x.dtype == torch.float64 else x.float()
        var, mean = torch.var_mean(exact, dim=(0, 2, 3), correction=0)
        parts = distributed.all_gather(torch.stack((mean, var)).unsqueeze(0), span)  # (span, 2, C)
        mean = parts[:, 0].mean(dim=0)
        var = (parts[:, 1] + (parts[:, 0] - mean).square()).mean(dim=0)
        count = span * x.numel() // x.shape[1]
        mean_out.copy_(mean)
        var_out.copy_(var * (count / (count - 1)))
        ctx.save_for_backward(x, weight, mean, torch.rsqrt(var + eps))
        ctx.count, ctx.span = count, span
        return F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, slope):
        x, weight, mean, inverse = ctx.saved_tensors

        def wide(values: Tensor) -> Tensor:
            return values.view(1, -1, 1, 1)

        exact = slope if slope.dtype == torch.float64 else slope.float()
        normal = (x - wide(mean)) * wide(inverse)
        own = torch.stack((exact.sum(dim=(0, 2, 3)), (exact * normal).sum(dim=(0, 2, 3))))
        total = distributed.sum_over_ranks(own.clone(), ctx.span) / ctx.count
        gradient = (exact - wide(total[0]) - normal * wide(total[1])) * wide(inverse)
        if weight is None:
            return gradient.to(x.dtype), None, None, None, None, None, None
        gradient = gradient * wide(weight)
        return gradient.to(x.dtype), own[1], own[0], None, None, None, None


# ---- All layers of an encoder


@dataclass
class _Shared:
    """What a layer needs of its encoder's pass.

    Attributes:
        mean, var: where its groups' statistics go, (splits * C,), group by group.
        interleaved: groups are samples g, g + splits, ... in place of consecutive ones.
        repeated: weight and bias for each group, (splits * C,) each.
    """

    mean: Tensor
    var: Tensor
    interleaved: bool
    repeated: tuple[Tensor | None, Tensor | None] | None = None

    def of_groups(self, splits: int) -> tuple[Tensor, Tensor]:
        return self.mean.view(splits, -1), self.var.view(splits, -1)


class EncoderNorms:
    """What the batch norms of one encoder do together, so that a pass costs few operations.

    Around a training pass, as hooks of the encoder:

    - In the contiguous memory format groups are interleaved, sample by sample. The groups of a
      layer are then the channels of a view, and one batch norm serves all of them. Weights are
      repeated for all layers at once.
    - The groups' statistics of all layers are written into one tensor.

    Running statistics then move towards the mean over groups: after each pass, or without
    `fold_each_pass` once for all passes of a training step and all ranks, by `fold_statistics`.

    Args:
        layers: equal in splits and span.
    """

    def __init__(self, layers: Sequence[SplitBatchNorm2d]) -> None:
        self.layers = list(layers)
        self.splits, self.span = layers[0].splits, layers[0].span
        self.fold_each_pass = True
        self.sizes = [layer.num_features for layer in layers]
        self._affine = [layer for layer in layers if layer.affine]
        self._statistics: Tensor | None = None  # (2, splits * all C) of the latest pass
        self._pending: list[Tensor] = []  # (2, all C): means over the groups of each pass

    def attach(self, encoder: nn.Module) -> None:
        encoder.register_forward_pre_hook(self._before)
        encoder.register_forward_hook(self._after)
        encoder.batch_norms = self

    @torch.compiler.disable
    def _before(self, encoder: nn.Module, inputs: tuple) -> tuple | None:
        if not self.layers[0].training:
            return None
        (images,) = inputs
        if len(images) % self.splits:
            raise ValueError(
                f"a batch of {len(images)} cannot be split into {self.splits} equal batch-norm "
                "groups"
            )
        self.begin(interleaved=self.splits > 1 and _is_contiguous(encoder, images))
        return (_interleave(images, self.splits),) if self._interleaved else None

    @torch.compiler.disable
    def _after(self, encoder: nn.Module, inputs: tuple, features: Tensor) -> Tensor:
        if self.layers[0].shared is None:
            return features
        if self._interleaved:
            features = _interleave(features, len(features) // self.splits)
        self.end()
        return features

    @property
    def _interleaved(self) -> bool:
        return self.layers[0].shared.interleaved

    def begin(self, interleaved: bool) -> None:
        """Prepare a pass of all layers."""
        like = self.layers[0].running_mean
        # Kernels move a running statistic, here with momentum 1 from zero, to that of the batch.
        self._statistics = like.new_zeros(2, self.splits * sum(self.sizes))
        widths = [self.splits * size for size in self.sizes]
        parts = zip(*(row.split(widths) for row in self._statistics), strict=True)
        for layer, (mean, var) in zip(self.layers, parts, strict=True):
            layer.shared = _Shared(mean, var, interleaved)
        if self.splits == 1:
            return
        parameters = [p for layer in self._affine for p in (layer.weight, layer.bias)]
        repeated = iter(_Repeated.apply(self.splits, *parameters) if parameters else ())
        for layer in self.layers:
            layer.shared.repeated = (None, None)
            if layer.affine:
                layer.shared.repeated = next(repeated), next(repeated)

    def end(self) -> None:
        """Take up the statistics of a pass."""
        with torch.no_grad():
            index = _group_by_group(tuple(self.sizes), self.splits, self._statistics.device)
            self._pending.append(self._statistics[:, index].mean(dim=1))
        self._statistics = None
        for layer in self.layers:
            layer.shared = None
        if self.fold_each_pass:
            self.move_towards(self.take_mean())

    def forget(self) -> None:
        """Drop the statistics of passes that were not folded: their step was broken off."""
        self._pending = []

    def take_mean(self) -> Tensor:
        """Mean and variance of all layers over the groups of all passes, (2, all C)."""
        passes, self._pending = self._pending, []
        return torch.stack(passes).mean(dim=0)

    @torch.no_grad()
    def move_towards(self, mean: Tensor) -> None:
        """running <- (1 - momentum) * running + momentum * mean, of all layers."""
        momenta = [layer.momentum for layer in self.layers]
        for name, values in zip(("running_mean", "running_var"), mean, strict=True):
            running = [getattr(layer, name) for layer in self.layers]
            torch._foreach_mul_(running, [1 - momentum for momentum in momenta])
            steps = torch._foreach_mul(list(values.split(self.sizes)), momenta)
            torch._foreach_add_(running, steps)
        torch._foreach_add_([layer.num_batches_tracked for layer in self.layers], 1)


def fold_statistics(encoders: Sequence[EncoderNorms]) -> None:
    """At the end of a training step: move the running statistics of some encoders towards the mean
    over the groups of all passes and all ranks."""
    if encoders:
        means = torch.cat([norms.take_mean() for norms in encoders], dim=1)
        means = distributed.sum_over_ranks(means) / distributed.world_size()
        widths = [sum(norms.sizes) for norms in encoders]
        for norms, mean in zip(encoders, means.split(widths, dim=1), strict=True):
            norms.move_towards(mean)


class _Repeated(torch.autograd.Function):
    """Each of some (C_l,) parameters `splits` times in a row, (splits * C_l,): by few operations
    for all of them, also in backward."""

    @staticmethod
    def forward(ctx, splits, *parameters):
        ctx.splits, ctx.sizes = splits, tuple(len(p) for p in parameters)
        index = _repeated_entries(ctx.sizes, splits, parameters[0].device)
        return torch.cat(parameters)[index].split([splits * size for size in ctx.sizes])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *slopes):
        index = _group_by_group(ctx.sizes, ctx.splits, slopes[0].device)
        return None, *torch.cat(slopes)[index].sum(dim=0).split(ctx.sizes)


# Indices are made by numpy: as torch operations they would be hundreds, on a GPU each a launch.


@functools.lru_cache(maxsize=16)
def _repeated_entries(sizes: tuple[int, ...], splits: int, device: torch.device) -> Tensor:
    """Where each entry of the repeated parameters comes from: (splits * all C,)."""
    entries = np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])
    index = np.concatenate([np.tile(part, splits) for part in entries])
    return distributed.to_device(torch.from_numpy(index), device)


@functools.lru_cache(maxsize=16)
def _group_by_group(sizes: tuple[int, ...], splits: int, device: torch.device) -> Tensor:
    """Where the values of group g are among those of all layers, each with its groups one after
    another: (splits, all C)."""
    places = np.split(np.arange(splits * sum(sizes)), splits * np.cumsum(sizes)[:-1])
    index = np.concatenate([part.reshape(splits, -1) for part in places], axis=1)
    return distributed.to_device(torch.from_numpy(index), device)


def _interleave(x: Tensor, groups: int) -> Tensor:
    """Rows of consecutive groups -> one of each group in turn. With the number of rows of a group
    in place of `groups` it is the inverse."""
    return x.view(groups, -1, *x.shape[1:]).transpose(0, 1).reshape(x.shape)


def _is_contiguous(encoder: nn.Module, images: Tensor) -> bool:
    """Whether activations will be: those of a network with channels-last weights are not."""
    weights = next((p for p in encoder.parameters() if p.dim() == 4 and p.shape[2] > 1), None)
    return images.is_contiguous() and (weights is None or weights.is_contiguous())


# ---- Networks


def split_batch_norm(encoder: nn.Module, splits: int, span: int = 1) -> None:
    """Replace every BatchNorm2d inside `encoder` by SplitBatchNorm2d, keeping its parameters.

    Args:
        splits, span: groups in a batch, or ranks that share a group; see SplitBatchNorm2d.

    Raises:
        ValueError: a batch norm without running averages.
    """
    split: dict[nn.Module, SplitBatchNorm2d] = {}  # a layer that has two names stays one
    for name, norm in list(encoder.named_modules(remove_duplicate=False)):
        if type(norm) is not nn.BatchNorm2d or norm is encoder:
            continue
        if norm.momentum is None or not norm.track_running_stats:
            raise ValueError(f"batch norm without running averages cannot be split: {norm}")
        if norm not in split:
            own = {n: getattr(norm, n) for n in ("eps", "momentum", "affine")}
            split[norm] = SplitBatchNorm2d(norm.num_features, splits, span, **own)
            split[norm].load_state_dict(norm.state_dict())
        encoder.set_submodule(name, split[norm])
    if split:
        EncoderNorms(list(split.values())).attach(encoder)


def has_batch_norm(module: nn.Module) -> bool:
    return any(isinstance(child, nn.BatchNorm2d) for child in module.modules())


CALIBRATION_BATCHES = 10  # for an encoder that has seen no image


@torch.no_grad()
def calibrate_batch_norm(module: nn.Module, batches: list[Tensor]) -> None:
    """Give batch norm the statistics of some batches, each counted alike, by forward passes in
    training mode. Weights stay as they are.

    An untrained encoder in eval mode has running means 0 and variances 1: with weights of 0.02 its
    fc7 is about 0 and a linear probe of it stays at chance.

    Args:
        batches: what `module` takes, at least one.
    """
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta, was_training = [norm.momentum for norm in norms], module.training
    for norm in norms:
        norm.reset_running_stats()
    module.train()
    for i, batch in enumerate(batches, start=1):
        for norm in norms:
            norm.momentum = 1 / i  # the mean over all batches
        module(batch)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    module.train(was_training)
