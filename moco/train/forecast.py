"""How long a run takes, from steps that were measured: computing, network and loading.

A step of W processes with n = batch / W images each takes, where loading goes on beside it,
max(compute + network, loading), else their sum:

    compute    a + b n, from steps with n images and with half of them
    network    all-reduce  2 (W-1)/W x bytes of the gradients (a ring); on a GPU it hides behind the
                           backward pass, half of the computing
               shuffle     n (W-1)/W images of 3 x px x px bytes
               gather      (W-1) n dim float32 of the other processes' keys
    loading    images of a node at the rate of its loader processes
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Measured:
    """What was measured with `world` processes on `nodes` nodes.

    Attributes:
        steps: images of a process -> seconds of a step without loading, network included.
        load_rate: images/s that the loader processes of all nodes give.
        overlaps: whether they work beside the steps, not in their time.
        bandwidth: bytes/s of an all-reduce, as a ring counts them; None with one process.
    """

    device: str
    world: int
    nodes: int
    batch: int
    steps: Mapping[int, float]
    load_rate: float
    overlaps: bool
    gradient_bytes: int
    image_size: int
    dim: int
    bandwidth: float | None = None


@dataclass(frozen=True)
class Forecast:
    """Seconds of a step and of its parts."""

    seconds: float
    compute: float
    network: float
    loading: float

    @property
    def limit(self) -> str:
        """The largest part."""
        parts = {"computing": self.compute, "network": self.network, "loading": self.loading}
        return max(parts, key=parts.get)


def fit(images: list[int], seconds: list[float]) -> tuple[float, float]:
    """a and b of seconds = a + b * images by least squares of the relative errors, neither below
    zero: noise would make small batches cost nothing, or large ones."""
    x, y = np.asarray(images, float), np.asarray(seconds, float)
    if len(x) == 1:
        return 0.0, y[0] / x[0]
    b, a = np.polyfit(x, y, 1, w=1 / y)
    return (0.0, np.mean(y / x)) if a < 0 else (a, b) if b > 0 else (np.mean(y), 0.0)


def sent_bytes(m: Measured, world: int) -> dict[str, float]:
    """Bytes that one of `world` processes sends in a step, by collective."""
    n = m.batch // world
    return {
        "all_reduce": 2 * (world - 1) / world * m.gradient_bytes,
        "shuffle": n * (world - 1) / world * 3 * m.image_size**2,
        "gather": (world - 1) * n * m.dim * 4.0,
    }


def network_seconds(m: Measured, world: int, compute: float) -> float:
    """Seconds of a step that go to the network and hide behind nothing; 0 where the bandwidth is
    not known."""
    if world == 1 or m.bandwidth is None:
        return 0.0
    travel = {name: size / m.bandwidth for name, size in sent_bytes(m, world).items()}
    hidden = min(travel["all_reduce"], compute / 2) if m.device == "cuda" else 0.0
    return sum(travel.values()) - hidden


def forecast(m: Measured, world: int | None = None) -> Forecast:
    """A step of the same batch with `world` processes (default: as measured), as many on each node
    as now, at the bandwidth and with the loader processes of each node as now."""
    world = world or m.world
    computing = {
        n: max(0.0, seconds - network_seconds(m, m.world, seconds))
        for n, seconds in m.steps.items()
    }
    a, b = fit(list(computing), list(computing.values()))
    compute = float(a + b * m.batch / world)
    network = network_seconds(m, world, compute)
    loading = m.batch / (m.load_rate * max(1, world / m.world))
    busy = compute + network
    return Forecast(max(busy, loading) if m.overlaps else busy + loading, compute, network, loading)
