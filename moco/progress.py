"""Progress on the screen: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterable, Iterator

from tqdm import tqdm

from moco import distributed
from moco.profiling import label


class StepPrinter:
    """A bar on a terminal, plain lines every `print_freq` steps elsewhere; rank 0 only.

    Counts images, or what else a batch has, per second and the share of time spent waiting for
    data.
    """

    def __init__(self, *, total: int, batch_size: int, done: int = 0, unit: str = "images") -> None:
        """
        Args:
            total: steps of the whole run; `done` of them before this process started.
            batch_size: images per step over all ranks.
            unit: "images", or what else they are.
        """
        self.total, self.batch_size, self.step, self.unit = total, batch_size, done, unit
        self.first = done
        self.start = self.last_print = time.perf_counter()
        self.last_step = done
        self.waited = 0.0
        self.bar = None
        if distributed.is_main() and _has_terminal():
            self.bar = tqdm(total=total, initial=done, dynamic_ncols=True, unit="step")

    def batches(self, loader: Iterable) -> Iterable:
        """Iterate over `loader`, measuring how long each batch was waited for."""
        iterator = iter(loader)
        while True:
            asked = time.perf_counter()
            with label("data"):
                batch = next(iterator, None)
            self.waited += time.perf_counter() - asked
            if batch is None:
                return
            yield batch

    def advance(self) -> None:
        self.step += 1
        if self.bar is not None:
            self.bar.update()

    def rates(self) -> dict[str, float]:
        """Since the last call: "images_per_s" and the share of time waiting for data."""
        now = time.perf_counter()
        elapsed = now - self.last_print
        rates = {
            f"{self.unit}_per_s": (self.step - self.last_step) * self.batch_size / elapsed,
            "data_share": self.waited / elapsed,
        }
        self.last_print, self.last_step, self.waited = now, self.step, 0.0
        return rates

    def line(self, text: str, short: str) -> None:
        """Print `text`, or put `short` behind the bar where there is one."""
        if self.bar is not None:
            self.bar.set_postfix_str(short)
            return
        pace = (time.perf_counter() - self.start) / max(1, self.step - self.first)
        left = round(pace * (self.total - self.step))
        distributed.print_main(f"{text}  left {left // 3600}:{left % 3600 // 60:02}:{left % 60:02}")

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What is done within is no training: neither images/s nor the time left count it."""
        began = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - began
            self.start += spent
            self.last_print += spent
            if self.bar is not None:
                self.bar.start_t += spent
                self.bar.last_print_t += spent

    def note(self, text: str) -> None:
        """Print a line, above the bar where there is one."""
        with tqdm.external_write_mode():
            distributed.print_main(text)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def _has_terminal() -> bool:
    """A terminal that has a size: on one without, as some containers and CI have, tqdm draws
    nothing, and lines would be left out for it."""
    return sys.stderr.isatty() and min(os.get_terminal_size(sys.stderr.fileno())) > 0


def progress(iterable: Iterable, description: str) -> Iterable:
    """A bar over a loop on a terminal, silent elsewhere and on ranks other than 0."""
    shown = distributed.is_main() and _has_terminal()
    return tqdm(iterable, desc=description, leave=False, dynamic_ncols=True, disable=not shown)
