"""Linear classifiers on an encoder's features, several learning rates and weight decays at once."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moco import distributed
from moco.evaluate.knn import count_correct
from moco.precision import autocast, memory_format


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


def new_heads(features: int, classes: int, count: int, *, probe: str = "moco") -> Heads:
    """`count` classifiers that start alike: for "moco" weights from N(0, 0.01^2) and biases 0, for
    "stl10" as torch makes them."""
    first = nn.Linear(features, classes)
    if probe == "moco":
        nn.init.normal_(first.weight, std=0.01)
        nn.init.zeros_(first.bias)
    return Heads([first, *(copy.deepcopy(first) for _ in range(count - 1))])


class FrozenEncoder(nn.Module):
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
        self.order = memory_format(channels_last)
        self.encoder = encoder.to(memory_format=self.order)

    def forward(self, images: Tensor) -> Tensor:
        with torch.inference_mode(), autocast(images.device, self.amp):
            features = self.encoder(images.contiguous(memory_format=self.order))
        return features.float().clone()  # outside: autograd takes no tensor of inference mode


class EncoderWithHeads(nn.Module):
    """Encoder and heads that train together: normalised images -> for each head (N, classes)."""

    def __init__(self, encoder: nn.Module, heads: Heads, amp: str) -> None:
        super().__init__()
        self.encoder, self.heads, self.amp = encoder, heads, amp

    def forward(self, images: Tensor) -> list[Tensor]:
        with autocast(images.device, self.amp):
            features = self.encoder(images)
        return self.heads(features.float())


@dataclass(frozen=True)
class HeadConfig:
    """Learning rate and weight decay of one linear classifier."""

    lr: float
    weight_decay: float

    def __str__(self) -> str:
        return f"lr {self.lr:g}, wd {self.weight_decay:g}"


@dataclass
class HeadResult:
    """Best and last accuracy of one linear classifier: {"top1", "top5", "epoch"}."""

    config: HeadConfig
    best: dict = field(default_factory=lambda: {"top1": -1.0})
    last: dict = field(default_factory=dict)
    diverged: int | None = None  # the epoch in which its loss was no longer finite

    def to_flat(self) -> dict:
        """As lincls.json and checkpoints hold it."""
        flat = asdict(self)
        return {**flat.pop("config"), **flat}

    @classmethod
    def from_flat(cls, flat: dict) -> HeadResult:
        rest = {name: flat[name] for name in ("best", "last", "diverged")}
        return cls(HeadConfig(flat["lr"], flat["weight_decay"]), **rest)


def best_head(results: Sequence[HeadResult], by: str) -> HeadResult:
    """The head of highest "best" or "last" top-1 accuracy, the first of equals."""
    return max(results, key=lambda head: getattr(head, by).get("top1", -1.0))


def record_accuracy(results: Sequence[HeadResult], found: list[dict], epoch: int) -> bool:
    """Enter the accuracies of an epoch; returns whether the best of all heads has changed."""
    before = best_head(results, "best").best["top1"]
    for head, accuracy in zip(results, found, strict=True):
        if head.diverged is None:
            head.last = {"top1": accuracy["top1"], "top5": accuracy["top5"], "epoch": epoch}
            if accuracy["top1"] > head.best["top1"]:
                head.best = head.last
    return best_head(results, "best").best["top1"] > before


def log_names(name: str, results: Sequence[HeadResult], values: Sequence[float]) -> dict:
    """A name for each head's value in the log; values that are not finite are left out."""
    return {
        f"{name}_lr{head.config.lr:g}_wd{head.config.weight_decay:g}": value
        for head, value in zip(results, values, strict=True)
        if math.isfinite(value)
    }


class HeadTraining:
    """Heads that train together, one for each config: their optimizer and their results.

    Args:
        configs: learning rate and weight decay of each head.
        probe: "stl10" trains by Adam.
        encoder, lr_backbone: an encoder that trains too, with the weight decay of the first head.

    Attributes:
        loss_sum, loss_count: of each head's losses since the last line of output, (heads,).
    """

    def __init__(
        self,
        heads: Heads,
        configs: Sequence[HeadConfig],
        momentum: float,
        *,
        probe: str = "moco",
        encoder: nn.Module | None = None,
        lr_backbone: float | None = None,
    ) -> None:
        self.heads = heads
        self.results = [HeadResult(config) for config in configs]
        groups = [
            {"params": head.parameters(), **asdict(config)}
            for head, config in zip(heads.linear, configs, strict=True)
        ]
        if encoder is not None:
            decay = configs[0].weight_decay
            groups.append(
                {"params": encoder.parameters(), "lr": lr_backbone, "weight_decay": decay}
            )
        self.optimizer: torch.optim.Optimizer
        if probe == "stl10":
            self.optimizer = torch.optim.Adam(groups, betas=(0.5, 0.999), eps=1e-8)
        else:
            self.optimizer = torch.optim.SGD(groups, momentum=momentum)
        self.base_rates = [group["lr"] for group in groups]
        self.start_means()

    def start_means(self) -> None:
        device = self.heads.linear[0].weight.device
        self.loss_sum, self.loss_count = torch.zeros(len(self.results), device=device), 0

    def set_learning_rates(self, factor: float) -> None:
        """To `factor` times the initial ones."""
        for group, base in zip(self.optimizer.param_groups, self.base_rates, strict=True):
            group["lr"] = base * factor

    def step(self, losses: Tensor) -> None:
        """Step the optimizer; heads that have diverged stay as they are."""
        self.optimizer.zero_grad()
        losses.sum().backward()
        for linear, head in zip(self.heads.linear, self.results, strict=True):
            if head.diverged is not None:
                linear.zero_grad()
        self.optimizer.step()
        self.loss_sum, self.loss_count = self.loss_sum + losses.detach(), self.loss_count + 1


def head_losses(logits: Sequence[Tensor], targets: Tensor) -> Tensor:
    """Mean cross-entropy of each head's (N, classes) logits: (heads,)."""
    return torch.stack([F.cross_entropy(each, targets) for each in logits])


@torch.no_grad()
def zero_diverged_head(head: nn.Linear, optimizer: torch.optim.Optimizer) -> None:
    """Zero a head and its moments, so that nothing that is saved is NaN."""
    for parameter in head.parameters():
        parameter.zero_()
        for buffer in optimizer.state[parameter].values():
            if isinstance(buffer, Tensor) and buffer.shape == parameter.shape:
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
