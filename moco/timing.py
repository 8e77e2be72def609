"""Timing of commands: paired measurements, one kind of table row, and what machine it was.

    table = timing.Table("queue losses, forward and backward")
    times = timing.interleaved({"baseline": theirs, "ours": ours}, repeats=15, device=device)
    table.add("align+uniform, N=256", times["baseline"], times["ours"],
              floor=4 * n * k * c / rate, limited_by="two products")

Variants run in turn, so that a slow minute of a shared machine hits all of them; the ratio is the
median of the ratios of neighbours, its spread runs from their first to their last quartile. Ratios
carry over between machines better than milliseconds do.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import re
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from moco.launch import usable_cores
from moco.run_files import write_json


def add_arguments(parser: argparse.ArgumentParser, repeats: int) -> None:
    """--device, --repeats and --out, which all benchmarks have."""
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=_at_least_five, default=repeats, help="at least 5")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write JSON")


def _at_least_five(text: str) -> int:
    if not text.isdigit() or int(text) < 5:
        raise argparse.ArgumentTypeError(f"a median needs at least 5 repeats, got {text!r}")
    return int(text)


def seconds(function: Callable[[], object], device: str | torch.device = "cpu") -> float:
    """Seconds of one call, until the device has finished."""
    synchronize(device)
    start = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: str | torch.device) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(device: str | torch.device = "cpu") -> int:
    """Most bytes so far: of this process in main memory, or of torch on a GPU."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():  # getrusage's figure survives an exec: it may be the parent's
        peak = re.search(r"VmHWM:\s*(\d+) kB", status.read_text(encoding="utf-8"))
        return int(peak[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024)


def reset_peak_memory(device: str | torch.device = "cpu") -> None:
    """Forget earlier peaks. On a CPU this needs Linux; elsewhere they hide smaller later ones."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def interleaved(
    variants: dict[str, Callable[[], object]],
    *,
    repeats: int,
    warmup: int = 2,
    device: str | torch.device = "cpu",
) -> dict[str, list[float]]:
    """Seconds of each variant, run in turn `repeats` times after `warmup` rounds that are dropped.

    Every second round runs backwards: who follows whom shows in the caches.
    """
    times: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(warmup + repeats):
        for name in variants if turn % 2 else reversed(variants):
            took = seconds(variants[name], device)
            if turn >= warmup:
                times[name].append(took)
    return times


class Table:
    """Prints rows as they come, beneath a line on the machine, and writes them as JSON.

    Args:
        title: what is measured, one line.
        width: characters of the first column.
    """

    def __init__(self, title: str, width: int = 36) -> None:
        self.title, self.width = title, width
        self.rows: list[dict] = []
        self.machine = machine()
        print(f"{title}\n{machine_line(self.machine)}")
        print(
            f"{'':<{width}} {'baseline':>10} {'ours':>10} {'':<9} {'ratio':>7} {'spread':>13} "
            f"{'limit':>7} {'of it':>6}  limited by",
            flush=True,
        )

    def add(
        self,
        what: str,
        baseline: Sequence[float],
        ours: Sequence[float],
        *,
        items: float | None = None,
        unit: str = "images/s",
        floor: float | None = None,
        limited_by: str = "",
        **more: object,
    ) -> None:
        """A row: medians of both, how many times faster ours is with quartiles, what is possible.

        Args:
            baseline, ours: seconds, equally many, neighbours in time.
            items: how many of `unit` (without its "/s") a call processes; None shows milliseconds.
            floor: seconds below which ours cannot come, because of `limited_by`.
            more: what else was measured, for the JSON.
        """
        ratios = sorted(theirs / own for theirs, own in zip(baseline, ours, strict=True))
        low, high = ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]
        ratio, theirs = statistics.median(ratios), statistics.median(baseline)
        unit = unit if items else "ms"
        shown = [items / s if items else 1e3 * s for s in (theirs, statistics.median(ours))]
        most = theirs / floor if floor else None
        limit = f"{most:>6.1f}x {ratio / most:>6.0%}" if most else f"{'-':>14}"
        print(
            f"{what:<{self.width}} {shown[0]:>10.4g} {shown[1]:>10.4g} {unit:<9} "
            f"{ratio:>6.2f}x {f'{low:.2f}-{high:.2f}x':>13} {limit}  {limited_by}".rstrip(),
            flush=True,
        )
        self.rows.append({
            "what": what, "unit": unit, "baseline": shown[0], "ours": shown[1], "ratio": ratio,
            "spread": (low, high), "limit": most, "limited_by": limited_by, "more": more,
        })  # fmt: skip

    def write(self, path: Path | None, **more: object) -> None:
        """JSON with the machine, the command, all rows and `more`; nothing without a path."""
        if path is None:
            return
        content = {
            "title": self.title,
            "machine": self.machine,
            "command": " ".join(["python", *sys.argv]),
            "rows": self.rows,
            **more,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, content)


def machine() -> dict:
    """Hardware, versions and date, for a reader who compares figures."""
    return {
        "cpu": _cpu_name(),
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.system(),
        "date": datetime.date.today().isoformat(),
    }


def machine_line(facts: dict) -> str:
    return (
        f"{facts['cpu']} ({facts['instructions']}), {facts['cores']} cores, {facts['threads']} "
        f"threads; GPU {facts['gpu'] or 'none'}; torch {facts['torch']}, python "
        f"{facts['python']}; {facts['date']}"
    )


def _cpu_name() -> str:
    """The model as the kernel names it, where it does."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def write_photographs(folder: Path, count: int, names: int | None = None) -> None:
    """Write folder/00000.jpg, ...: smooth random pictures with some noise, 468 x 401 pixels as
    ImageNet's are on average, and with that quality of about their 110 kB.

    Args:
        names: how many files, if more than `count`: further names of the same pictures.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for i in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (13, 15, 3), dtype=np.uint8))
        pixels = np.asarray(coarse.resize((468, 401), Image.Resampling.BICUBIC))
        pixels = (pixels + rng.normal(0, 10, (401, 468, 1))).clip(0, 255)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i:05d}.jpg", quality=95)
    for i in range(count, names or count):
        os.link(folder / f"{i % count:05d}.jpg", folder / f"{i:05d}.jpg")
