"""The learning rate as a pure function of the epoch."""

from __future__ import annotations

import math
from collections.abc import Sequence


def learning_rate(
    epoch: int,
    *,
    base: float,
    epochs: int,
    cos: bool = False,
    milestones: Sequence[int] = (),
    factor: float = 0.1,
    warmup_epochs: int = 0,
) -> float:
    """Learning rate of the 0-based `epoch`; constant within an epoch, as in upstream MoCo.

    Args:
        base: initial learning rate (--lr).
        epochs: length of the whole run.
        cos: half a cosine, base/2 * (1 + cos(pi * epoch / epochs)); otherwise steps.
        milestones: epochs from which on the rate is multiplied by `factor`, once for each.
        warmup_epochs: the first epochs get (epoch + 1) / (warmup_epochs + 1) of the rate.
    """
    if cos:
        rate = base * 0.5 * (1 + math.cos(math.pi * epoch / epochs))
    else:
        rate = base * factor ** sum(epoch >= milestone for milestone in milestones)
    if epoch < warmup_epochs:
        rate *= (epoch + 1) / (warmup_epochs + 1)
    return rate
