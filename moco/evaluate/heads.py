"""Linear classifiers on an encoder's features, several learning rates and weight decays at once."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moco import distributed
from moco.evaluate.knn import count_correct
from moco.precision import autocast


@dataclass
class Setting:
    """One classifier's learning rate and weight decay, and what has come of it."""

    lr: float
    weight_decay: float
    best: dict = field(default_factory=lambda: {"top1": -1.0})
    last: dict = field(default_factory=dict)
    diverged: int | None = None  # the epoch in which its loss was no longer finite

    def __str__(self) -> str:
        return f"lr {self.lr:g}, wd {self.weight_decay:g}"


def leading(settings: Sequence[Setting], when: str) -> Setting:
    """The setting of highest "best" or "last" accuracy, the first of equals."""
    return max(settings, key=lambda one: getattr(one, when).get("top1", -1.0))


def by_setting(name: str, settings: Sequence[Setting], values: Sequence[float]) -> dict:
    """A name for each setting's value in the log; values that are not finite are left out."""
    return {
        f"{name}_lr{one.lr:g}_wd{one.weight_decay:g}": value
        for one, value in zip(settings, values, strict=True)
        if math.isfinite(value)
    }


def note_accuracy(settings: Sequence[Setting], found: list[dict], epoch: int) -> bool:
    """Enter the accuracies of an epoch; returns whether the best of all settings has changed."""
    before = leading(settings, "best").best["top1"]
    for one, accuracy in zip(settings, found, strict=True):
        if one.diverged is None:
            one.last = {"top1": accuracy["top1"], "top5": accuracy["top5"], "epoch": epoch}
            if accuracy["top1"] > one.best["top1"]:
                one.best = one.last
    return leading(settings, "best").best["top1"] > before


class Heads(nn.Module):
    """Linear classifiers on the same features: (N, C) -> for each head (N, classes).

    Each is a product of its own, and so bit for bit what it is alone. (One product with all
    weights side by side was slower on a CPU: 0.61 ms per image against 0.46 for 8 heads of 2048 x
    1000.)
    """

    def __init__(self, linear: Sequence[nn.Linear]) -> None:
        super().__init__()
        self.linear = nn.ModuleList(linear)

    def forward(self, features: Tensor) -> list[Tensor]:
        return [head(features) for head in self.linear]


def new_heads(features: int, classes: int, count: int) -> Heads:
    """`count` classifiers that start alike: weights from N(0, 0.01^2) as in MoCo, biases 0."""
    first = nn.Linear(features, classes)
    nn.init.normal_(first.weight, std=0.01)
    nn.init.zeros_(first.bias)
    return Heads([first, *(copy.deepcopy(first) for _ in range(count - 1))])


class Frozen(nn.Module):
    """Normalised images -> an encoder's features, (N, C) float32 without gradient.

    Args:
        encoder: on its device; its mode (training or not) is not changed.
        amp: "bf16" computes in bfloat16 where autocast does, "off" in float32.
        channels_last: memory order of the images, faster on GPUs and with some CPUs; the encoder's
            weights are put into it as well.
    """

    def __init__(self, encoder: nn.Module, *, amp: str = "off", channels_last: bool = False):
        super().__init__()
        self.amp = amp
        self.order = torch.channels_last if channels_last else torch.contiguous_format
        self.encoder = encoder.to(memory_format=self.order)
        self.training = encoder.training

    def forward(self, images: Tensor) -> Tensor:
        with torch.inference_mode(), autocast(images.device, self.amp):
            features = self.encoder(images.contiguous(memory_format=self.order))
        return features.float().clone()  # outside: autograd takes no tensor of inference mode


class Network(nn.Module):
    """Encoder and heads that train together: normalised images -> for each head (N, classes)."""

    def __init__(self, encoder: nn.Module, heads: Heads, amp: str) -> None:
        super().__init__()
        self.encoder, self.heads, self.amp = encoder, heads, amp

    def forward(self, images: Tensor) -> list[Tensor]:
        with autocast(images.device, self.amp):
            features = self.encoder(images)
        return self.heads(features.float())


def default_amp(device: torch.device) -> str:
    """bf16 on GPUs that have it, float32 elsewhere."""
    return (
        "bf16"
        if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        else "off"
    )


def head_losses(logits: Sequence[Tensor], targets: Tensor) -> Tensor:
    """Mean cross-entropy of each head's (N, classes) logits: (heads,)."""
    return torch.stack([F.cross_entropy(each, targets) for each in logits])


def sgd(heads: Heads, settings: Sequence[Setting], momentum: float) -> torch.optim.SGD:
    """A parameter group for each head, in their order."""
    groups = [
        {"params": head.parameters(), "lr": one.lr, "weight_decay": one.weight_decay}
        for head, one in zip(heads.linear, settings, strict=True)
    ]
    return torch.optim.SGD(groups, momentum=momentum)


@torch.no_grad()
def silence(head: nn.Linear, optimizer: torch.optim.Optimizer) -> None:
    """Zero a head that has diverged, with its momentum, so that nothing that is saved is NaN."""
    for parameter in head.parameters():
        parameter.zero_()
        buffer = optimizer.state[parameter].get("momentum_buffer")
        if buffer is not None:
            buffer.zero_()


@torch.no_grad()
def head_accuracy(
    heads: Heads, batches: Iterable[tuple[Tensor, Tensor]], device: torch.device
) -> list[dict[str, float]]:
    """Accuracy of each head, over ranks each image once.

    Args:
        batches: this rank's share, features (N, C) float32 and targets (N,), on `device`.

    Returns:
        for each head {"top1", "top5" (top-min(5, classes)), both in percent, "loss"}.
    """
    topk = (1, min(5, heads.linear[0].out_features))
    sums = torch.zeros(len(heads.linear), 4, dtype=torch.float64, device=device)
    for features, targets in batches:  # sums: top-1, top-5, loss, images
        for head, logits in enumerate(heads(features)):
            ranked = logits.topk(topk[1], dim=1).indices
            sums[head, :2] += count_correct(ranked, targets, topk)
            sums[head, 2] += F.cross_entropy(logits, targets, reduction="sum")
            sums[head, 3] += len(targets)
    return [
        {"top1": 100 * top1 / count, "top5": 100 * top5 / count, "loss": loss / count}
        for top1, top5, loss, count in distributed.sum_over_ranks(sums).tolist()
    ]
