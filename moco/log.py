"""What a run says: lines or a bar on the screen, log.jsonl and TensorBoard in the run folder."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torchvision
from torch import Tensor

from moco import distributed
from moco.health import History
from moco.run_files import read_log, write_text


class RunLog:
    """Scalars of a run as JSON lines and in TensorBoard; on ranks other than 0 nothing happens."""

    def __init__(self, folder: str | Path, first_step: int = 0) -> None:
        """
        Args:
            folder: the run folder.
            first_step: steps done when the run starts or goes on; lines of later steps, which a run
                that was cut off wrote after its last checkpoint, are dropped: they come again.
        """
        self.active = distributed.is_main()
        self.kept: set[tuple[str, int]] = set()  # kind and step of the lines that were there
        self.history = History()  # of the lines that were there, and of those that come
        self.session_end = None
        if self.active:
            path = Path(folder) / "log.jsonl"
            for line in _drop_later_lines(path, first_step):
                self.kept.add((line["kind"], line["step"]))
                self.history.add(line)
            self.file = open(path, "a", encoding="utf-8")
            from torch.utils.tensorboard import SummaryWriter  # `cli.check_run_folder` looks for it

            self.board = SummaryWriter(str(folder), purge_step=first_step + 1)

    def event(self, kind: str, step: int, **facts: object) -> None:
        """Append one line {"kind", "step", "time", **facts} that is not a scalar."""
        if self.active:
            line = {"kind": kind, "step": step, "time": round(time.time(), 3), **facts}
            with self._full_disk_is_named():
                self.file.write(json.dumps(line) + "\n")
                self.file.flush()
            self.history.add(line)

    def scalars(self, kind: str, step: int, values: dict[str, float], **facts: object) -> None:
        """Append one line {"kind", "step", "time", **values, **facts} and one TensorBoard point for
        each value under "kind/name"."""
        if not self.active:
            return
        self.event(kind, step, **values, **facts)
        with self._full_disk_is_named():
            for name, value in values.items():
                self.board.add_scalar(f"{kind}/{name}", value, step)

    def picture(self, tag: str, step: int, pixels: Tensor) -> None:
        """Show (3, H, W) uint8 in TensorBoard."""
        if self.active:
            with self._full_disk_is_named():
                self.board.add_image(tag, pixels, step)

    def histograms(self, step: int, values: dict[str, tuple[Tensor, float, float]]) -> None:
        """Distributions, name -> (values, least, most): in TensorBoard under "features/name", and
        as one line {"kind": "histograms", ..., name: {"least", "most", "counts"}} of 40 equal bins.
        """
        if not self.active:
            return
        counts = {}
        for name, (drawn, least, most) in values.items():
            drawn = drawn.float().clamp(least, most).cpu()  # rounding may have led out of the range
            with self._full_disk_is_named():
                self.board.add_histogram(f"features/{name}", drawn, step)
            binned = torch.histc(drawn, bins=40, min=least, max=most).int().tolist()
            counts[name] = {"least": least, "most": most, "counts": binned}
        self.event("histograms", step, **counts)

    def one_chart(self, charts: dict[str, list[str]]) -> None:
        """In TensorBoard's tab Custom Scalars: title of a chart -> tags, drawn over each other."""
        if self.active:
            layout = {title: ["Multiline", [f"^{tag}$" for tag in tags]]
                      for title, tags in charts.items()}  # fmt: skip
            with self._full_disk_is_named():
                self.board.add_custom_scalars({"alignment and uniformity": layout})

    def hyperparameters(self, values: dict[str, object], metrics: Sequence[str]) -> None:
        """The run's line in TensorBoard's tab HParams: settings and the last value of each tag in
        `metrics`. (`SummaryWriter.add_hparams` would put it into a folder of its own.)"""
        if self.active:
            simple = {
                name: value if isinstance(value, (bool, int, float, str)) else json.dumps(value)
                for name, value in values.items()
            }
            from torch.utils.tensorboard.summary import hparams

            *beginning, self.session_end = hparams(simple, dict.fromkeys(metrics, 0))
            with self._full_disk_is_named():
                for summary in beginning:
                    self.board.file_writer.add_summary(summary)

    def finished(self) -> None:
        """The run has come to its end: the tab HParams says so."""
        if self.session_end is not None:
            self.board.file_writer.add_summary(self.session_end)

    @contextlib.contextmanager
    def _full_disk_is_named(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            reason = f"cannot write the log: {error.strerror}"
            raise OSError(error.errno, reason, self.file.name) from error

    def close(self) -> None:
        if self.active:
            with self._full_disk_is_named():
                self.file.close()
                self.board.close()


def _drop_later_lines(path: Path, step: int) -> list[dict]:
    """Keep the lines up to `step`, set damaged ones aside; the lines that stay."""
    if not path.is_file():
        return []
    lines, bad = read_log(path)
    kept = [fields for fields in lines if fields["step"] <= step]
    if bad:
        aside = path.with_name(f"{path.name}.damaged")
        with open(aside, "ab") as file:
            file.write(b"".join(line + b"\n" for line in bad))
        print(f"{len(bad)} damaged line(s) of {path.name} are now in {aside.name}", flush=True)
    if bad or len(kept) < len(lines):
        text = "".join(json.dumps(fields) + "\n" for fields in kept)
        write_text(path, text)
    return kept


class Means:
    """Running means of scalars that stay on the device, detached, until they are asked for."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor | float] = {}
        self.counts: dict[str, int] = {}

    def add(self, name: str, value: Tensor | float) -> None:
        value = value.detach() if isinstance(value, Tensor) else value
        self.sums[name] = self.sums.get(name, 0.0) + value
        self.counts[name] = self.counts.get(name, 0) + 1

    def state(self) -> dict:
        """For a checkpoint."""
        return {"sums": dict(self.sums), "counts": dict(self.counts)}

    def load(self, state: dict) -> None:
        self.sums, self.counts = dict(state["sums"]), dict(state["counts"])

    def take(self) -> dict[str, float]:
        """The means since the last call (the device is waited for), and start over."""
        means = {name: float(total) / self.counts[name] for name, total in self.sums.items()}
        self.__init__()
        return means


# On CPUs: all tests have passed with the first, the quick tests have been run with the others.
TESTED = {"torch": ("2.14.1",), "torchvision": ("0.29.1",)}
QUICKLY_TESTED = {"torch": ("2.6.0", "2.11.0"), "torchvision": ("0.21.0", "0.26.0")}


def versions_tested(name: str) -> str:
    """Versions of a library, for people: "torch 2.14.1, the quick tests with 2.6.0, 2.11.0"."""
    quickly = ", ".join(QUICKLY_TESTED[name])
    return f"{name} {', '.join(TESTED[name])}, the quick tests with {quickly}"


def provenance() -> dict[str, str]:
    """What code ran: git revision (with "+changes" for a modified tree) and library versions."""
    return {
        "git": _git_revision(),
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
    }


def _git_revision() -> str:
    root = Path(__file__).resolve().parent.parent

    # Without optional locks: a run that is killed here would leave the index locked for others.
    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "--no-optional-locks", "-C", str(root), *words],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown (not a git checkout)"
