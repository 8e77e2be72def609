"""Where the time of training steps goes: a trace by torch's profiler, and a table of shares.

The parts of a step are labelled where they are done, `with label("loss"): ...`. A label shows in
every trace; while a `StepProfile` runs, the time between one label and the next is added up too,
so that the shares of a step, with the rest that has no label, are 100 %.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from moco import distributed

LABELS = (
    "data", "query forward", "key forward", "loss", "backward", "optimizer", "momentum", "queue",
    "communication",
)  # fmt: skip
_REST = "other"

_timeline: _Timeline | None = None  # the one that is being drawn


@contextlib.contextmanager
def label(name: str) -> Iterator[None]:
    """The time within is that of part `name` of a step, but for labels further within."""
    with torch.profiler.record_function(name):
        if _timeline is not None:
            _timeline.enter(name)
        try:
            yield
        finally:
            if _timeline is not None:
                _timeline.leave()


class _Timeline:
    """Which label was the innermost, from one moment to the next.

    On a GPU the moments are events in its stream: what counts is when the work that was started
    under a label ran there, not when the host asked for it.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.open = [_REST]
        self.moments = [(_REST, self._now())]  # (label until then, when)

    def enter(self, name: str) -> None:
        self.moments.append((self.open[-1], self._now()))
        self.open.append(name)

    def leave(self) -> None:
        # A label that was open when the timeline began is not on it.
        self.moments.append((self.open[-1], self._now()))
        if len(self.open) > 1:
            self.open.pop()

    def milliseconds(self) -> dict[str, float]:
        """By label, up to now; the device is waited for."""
        self.moments.append((self.open[-1], self._now()))
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        total = dict.fromkeys((*LABELS, _REST), 0.0)
        for (_, before), (name, after) in zip(self.moments, self.moments[1:], strict=False):
            total[name] += self._between(before, after)
        return total

    def _now(self) -> float | torch.cuda.Event:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, before, after) -> float:
        return before.elapsed_time(after) if self.device.type == "cuda" else 1e3 * (after - before)


class StepProfile:
    """Profiles ten steps of rank 0 after ten of warm-up; of a run of fewer steps, its second half.

    Training goes on as usual meanwhile, only slower.
    """

    STEPS = 10

    def __init__(self, path: Path, device: torch.device, *, first_step: int, steps: int) -> None:
        """
        Args:
            path: the trace to write, JSON for Perfetto or chrome://tracing.
            first_step: steps of the run that were done before this process began.
            steps: steps that this process will do.
        """
        self.path, self.device, self.first_step = path, device, first_step
        self.warm_up = min(self.STEPS, steps // 2)
        self.last = min(self.warm_up + self.STEPS, steps)
        self.done = 0
        self.profiler: torch.profiler.profile | None = None
        self._begin_or_end()

    def step_done(self) -> None:
        self.done += 1
        self._begin_or_end()

    def _begin_or_end(self) -> None:
        global _timeline
        if not distributed.is_main():
            return
        if self.done == self.warm_up < self.last:
            activities = [torch.profiler.ProfilerActivity.CPU]
            if self.device.type == "cuda":
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            self.profiler = torch.profiler.profile(activities=activities)
            self.profiler.start()
            _timeline = _Timeline(self.device)
        elif self.done == self.last and self.profiler is not None:
            spent = _timeline.milliseconds()
            self.close()
            self.profiler.export_chrome_trace(str(self.path))
            self.profiler = None
            distributed.print_main(self._summary(spent))

    def close(self) -> None:
        """Stop recording, also when the run ends before the last step to profile."""
        global _timeline
        if _timeline is not None and self.profiler is not None:
            _timeline = None
            self.profiler.stop()

    def _summary(self, spent: dict[str, float]) -> str:
        steps = self.last - self.warm_up
        total = sum(spent.values())
        lines = [
            f"where the time of steps {self.first_step + self.warm_up + 1} to "
            f"{self.first_step + self.last} went, {total / steps:.1f} ms each on the "
            f"{'GPU' if self.device.type == 'cuda' else 'CPU'} under the profiler:"
        ]
        for name, milliseconds in spent.items():
            lines.append(
                f"{name:>15} {100 * milliseconds / total:6.1f} % {milliseconds / steps:10.2f} ms"
            )
        if distributed.world_size() > 1:
            lines.append("(gradients are averaged during backward, and count as backward)")
        lines.append(f"trace: {self.path} (open it in https://ui.perfetto.dev)")
        return "\n".join(lines)
