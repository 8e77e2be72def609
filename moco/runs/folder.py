"""Read what main_moco.py, main_lincls.py and measure_align_uniform.py have left in run folders.

No command of its own: compare_runs.py and plot_features.py read runs with it. Files are looked at
as they are, complete or not: what cannot be used comes back with the reason.
"""

from __future__ import annotations

import json
import math
import os
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from moco.checkpoint import FORMAT_VERSION, run_checkpoints
from moco.run_files import LINCLS_RESULT
from moco.train.state import science

# Arguments, beside those that decide what is learned, without which a run is not understood.
_NEEDED = {"objective": str, "seed": int, "epochs": int, "batch_size": int, "images": int,
           "processes": int, "arch": str, "lr": (int, float)}  # fmt: skip
# Numbers in the log beside what changes while training.
_NO_CURVES = ("kind", "step", "time", "epoch", "uniformity_infimum", "seconds", "k", "bank",
              "images")  # fmt: skip
_LARGEST_JSON = 2**20  # bytes; a larger file is no result of a measurement


@dataclass
class Run:
    """A finished pretraining run, with what was found out about its encoders."""

    folder: Path
    args: dict
    log: list[dict]
    probes: list[dict] = field(default_factory=list)  # lincls.json, with "epoch"
    measures: list[dict] = field(default_factory=list)  # "epoch", "alignment", "uniformity"
    start: tuple[Run, int] | None = None  # the run and epoch whose encoder it began with, if known

    @property
    def objective(self) -> str:
        return self.args["objective"]

    @property
    def seed(self) -> int:
        return self.args["seed"]

    @property
    def steps_per_epoch(self) -> int:
        return max(1, self.args["images"] // self.args["batch_size"])

    @property
    def steps(self) -> int:
        """Of the whole run."""
        return _planned_steps(self.args)

    @property
    def epochs(self) -> int:
        """Finished at the end of the run."""
        return self.steps // self.steps_per_epoch

    def recipe(self) -> dict[str, str]:
        """All that decides what is learned but the objective and the seed, as text."""
        values = science(self.args)
        values |= {name: self.args.get(name) for name in ("processes", "max_steps")}
        for name in ("objective", "seed"):
            values.pop(name, None)
        if self.start is not None:  # not as a path, which is another one for each seed
            values["init_from"] = f"{self.start[0].objective}, epoch {self.start[1]}"
        return {name: _text(value) for name, value in values.items()}

    def scalars(self) -> dict[str, tuple[list[float], list[float]]]:
        """Everything that was logged while training: name -> (epochs, values)."""
        found: dict[str, tuple[list[float], list[float]]] = {}
        for line in self.log:
            prefix = "" if line["kind"] in ("train", "metrics") else f"{line['kind']} "
            for name, value in line.items():
                if name in _NO_CURVES or number(value) is None:
                    continue
                xs, ys = found.setdefault(prefix + name, ([], []))
                xs.append(line["step"] / self.steps_per_epoch)
                ys.append(float(value))
        return found

    def _pace(self) -> tuple[float, float]:
        """Images and seconds between the lines of the log, without the time a run lay still."""
        images, seconds, before = 0.0, 0.0, None
        for line in self.log:
            rate = number(line.get("images_per_s"))
            if line["kind"] == "train" and rate and rate > 0:
                if before is None:  # a run that went on from another's checkpoint starts later
                    before = max(0, line["step"] - int(number(self.args.get("print_freq")) or 1))
                images += (line["step"] - before) * self.args["batch_size"]
                seconds += (line["step"] - before) * self.args["batch_size"] / rate
                before = line["step"]
        return images, seconds

    def hours(self) -> float | None:
        """Of training."""
        return self._pace()[1] / 3600 or None

    def images_per_s(self) -> float | None:
        images, seconds = self._pace()
        return images / seconds if seconds else None

    def final_probes(self) -> list[dict]:
        return [probe for probe in self.probes if probe["epoch"] == self.epochs]

    def knn(self, epoch: int | None = None) -> float | None:
        """k-NN top-1 (%) of the encoder of an epoch, the last if None: as main_lincls.py found,
        else as was logged while training."""
        wanted = self.epochs if epoch is None else epoch
        found = [number(p["knn"].get("top1")) for p in self.probes
                 if p["epoch"] == wanted and isinstance(p.get("knn"), dict)]  # fmt: skip
        if not any(value is not None for value in found):
            step = self.steps if wanted == self.epochs else wanted * self.steps_per_epoch
            found = [
                number(line.get("top1"))
                for line in self.log
                if line["kind"] == "knn" and line["step"] == step
            ]
        return mean(found)

    def linear(self, which: str, epoch: int | None = None) -> float | None:
        """Top-1 (%) of the linear probe, "last" or "best", on the encoder of an epoch."""
        wanted = self.epochs if epoch is None else epoch
        return mean(
            number(p[which].get("top1")) for p in self.probes
            if p["epoch"] == wanted and isinstance(p.get(which), dict)
        )  # fmt: skip

    def cross_validated(self) -> float | None:
        """Top-1 (%) of the linear probe by main_lincls.py --folds: held-out folds of the training
        set, the chosen setting."""
        return mean(map(_best_fold_mean, self.final_probes()))

    def measured(self, name: str) -> float | None:
        """Alignment (alpha 2) or uniformity (t 2) of the last encoder on held-out images, else as
        last logged while training."""
        found = mean(m[name] for m in self.measures if m["epoch"] == self.epochs)
        if found is None and name in self.scalars():
            found = self.scalars()[name][1][-1]
        return found

    def encoders(self) -> list[tuple[int, float, float]]:
        """The encoders of the run that were measured, (epoch, alignment, uniformity), in order;
        without measurements of several epochs what was logged at the end of each."""
        scalars = self.scalars()
        epochs = {measure["epoch"] for measure in self.measures}
        found: dict[int, tuple[float | None, float | None]] = {}
        if len(epochs) < 2 and {"alignment", "uniformity"} <= scalars.keys():
            uniformities = dict(zip(*scalars["uniformity"], strict=True))
            for epoch, value in zip(*scalars["alignment"], strict=True):
                found[math.ceil(epoch)] = value, uniformities.get(epoch)
        else:
            for epoch in epochs:
                same = [m for m in self.measures if m["epoch"] == epoch]
                found[epoch] = (
                    mean(m["alignment"] for m in same),
                    mean(m["uniformity"] for m in same),
                )
        return [(epoch, *place) for epoch, place in sorted(found.items()) if None not in place]


def common_accuracy(
    encoders: Sequence[tuple[Run, int]],
) -> tuple[str, Callable[[Run, int], float | None]]:
    """What accuracy to compare encoders (run, epoch) by, and how to find it: the linear probe's
    last where all of them have one, else k-NN's, so that no two kinds are mixed."""
    if all(run.linear("last", epoch) is not None for run, epoch in encoders):
        return "linear top-1, last (%)", lambda run, epoch: run.linear("last", epoch)
    return "k-NN top-1 (%)", Run.knn


def short_names(runs: Sequence[Run]) -> list[str]:
    """The folders of runs, without what they all begin or end with."""
    parts = [list(run.folder.resolve().parts) for run in runs]
    if len(runs) == 1:
        return [runs[0].folder.resolve().name]
    for end in (0, -1):
        while all(len(p) > 1 for p in parts) and len({p[end] for p in parts}) == 1:
            for p in parts:
                del p[end]
    return ["/".join(p) for p in parts]


def number(value: object) -> float | None:
    """A finite number as such, anything else as None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # of a whole number that no float can hold
        return None


def mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _best_fold_mean(probe: dict) -> float | None:
    folds = probe.get("folds")
    settings = folds.get("settings") if isinstance(folds, dict) else None
    means = [
        number(row.get("mean"))
        for row in (settings if isinstance(settings, list) else [])
        if isinstance(row, dict)
    ]
    return max((value for value in means if value is not None), default=None)


def _text(value: object) -> str:
    if value is None:
        return "none"
    return f"{value:g}" if isinstance(value, float) else json.dumps(value).strip('"')


def _planned_steps(args: dict) -> int:
    steps = args["epochs"] * (args["images"] // args["batch_size"])
    most = args.get("max_steps")
    return steps if number(most) is None else min(steps, int(most))


# ------------------------------------------------------------------------------------------------
# Folders
# ------------------------------------------------------------------------------------------------


class _Unusable(Exception):
    """Why a folder or file is left out."""


def read_runs(paths: Sequence[str | Path]) -> tuple[list[Run], list[tuple[str, str]]]:
    """Finished runs in the given folders and below them, each with its probes and measurements.

    A probe or measurement belongs to the run whose folder holds the checkpoint that it names: as
    the path stands, or as the run recorded its own folder (after a move), or else to the run in
    whose folder it lies.

    Returns:
        (runs in the order given, [(path, reason)] of what was left out).
    """
    runs, probes, measures, left_out = [], [], [], []
    for folder, files in _folders(paths, left_out):
        if {"args.json", "log.jsonl"} & set(files) or (
            LINCLS_RESULT in files or run_checkpoints(folder)
        ):
            try:
                read = _read_probe(folder) if _is_probe(folder) else _read_run(folder)
                (runs if isinstance(read, Run) else probes).append(read)
            except _Unusable as reason:
                left_out.append((str(folder), str(reason)))
        for name in files:
            if name.endswith(".json") and name not in ("args.json", LINCLS_RESULT):
                measure = _read_measure(folder / name)
                if measure:
                    measures.append(measure)
    for run in runs:
        path = run.args.get("init_from")
        start = _by_checkpoint(path, runs) if isinstance(path, str) and "\0" not in path else None
        epoch = start and _epoch({"checkpoint": path}, start)
        run.start = None if epoch is None or start is run else (start, epoch)
    for found in (*probes, *measures):
        run = _by_checkpoint(found["checkpoint"], runs) or _by_place(found["path"], runs)
        if run is None:
            reason = f"is of {found['checkpoint']}, which is in none of the runs compared"
            left_out.append((str(found["path"]), reason))
            continue
        found["epoch"] = _epoch(found, run)
        if found["epoch"] is None:
            reason = f"{found['checkpoint']}: its name does not tell the epoch"
            left_out.append((str(found["path"]), reason))
        else:
            (run.probes if "arch" in found else run.measures).append(found)
    return runs, left_out


def _folders(
    paths: Sequence[str | Path], left_out: list[tuple[str, str]]
) -> list[tuple[Path, list[str]]]:
    """All folders at and below `paths`, each once, with the files in it."""
    found: dict[Path, tuple[Path, list[str]]] = {}
    for given in map(Path, paths):
        if not given.is_dir():
            reason = "is a file, expected a run folder" if given.exists() else "no such folder"
            left_out.append((str(given), reason))
            continue
        runs_before = len(found)
        for root, folders, files in os.walk(given):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            if any(name.endswith((".json", ".jsonl", ".pth.tar")) for name in files):
                found.setdefault(Path(root).resolve(), (Path(root), sorted(files)))
        if len(found) == runs_before and given.resolve() not in found:
            left_out.append((str(given), "there is no run in it"))
    return list(found.values())


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise _Unusable(f"has no {path.name}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise _Unusable(f"{path.name} cannot be read: {_one_line(error)}") from None
    if not isinstance(content, dict):
        raise _Unusable(f"{path.name} holds a {type(content).__name__}, expected an object")
    return content


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _is_probe(folder: Path) -> bool:
    if (folder / LINCLS_RESULT).exists():
        return True
    try:
        return "pretrained" in _read_json(folder / "args.json")
    except _Unusable:
        return False


def _read_run(folder: Path) -> Run:
    args = _read_json(folder / "args.json")
    for name, kind in _NEEDED.items():
        if not isinstance(args.get(name), kind) or isinstance(args[name], bool):
            raise _Unusable(
                f"was written by another version: args.json has no usable {name!r} "
                f"(got {json.dumps(args.get(name))[:60]})"
            )
    if args["batch_size"] < 1 or args["images"] < 0 or args["epochs"] < 0:
        raise _Unusable("args.json has a batch size, number of images or of epochs below zero")
    _refuse_other_version(folder)
    log = _read_log(folder / "log.jsonl")
    planned = _planned_steps(args)
    done = max((line["step"] for line in log if line["kind"] == "train"), default=0)
    if done < planned:
        raise _Unusable(f"is unfinished: step {done} of {planned}")
    return Run(folder, args, log)


def _refuse_other_version(folder: Path) -> None:
    """By the newest checkpoint, if any was kept: only its header and small values are read."""
    checkpoints = run_checkpoints(folder)
    if not checkpoints:
        return
    name = checkpoints[-1].name
    try:
        content = torch.load(checkpoints[-1], map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a damaged pickle can make the reader fail in any way
        raise _Unusable(f"{name} cannot be read: {_one_line(error).partition('. ')[0]}") from None
    version = content.get("version") if isinstance(content, dict) else None
    if version != FORMAT_VERSION:
        raise _Unusable(
            f"is of another version: {name} has format version {version!r}, expected "
            f"{FORMAT_VERSION}"
        )


def _read_log(path: Path) -> list[dict]:
    """The lines of a log, without a last one that was cut off."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise _Unusable("has no log.jsonl") from None
    except (OSError, ValueError) as error:
        raise _Unusable(f"log.jsonl cannot be read: {_one_line(error)}") from None
    log = []
    for i, text in enumerate(lines, start=1):
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            if i == len(lines):
                break
            raise _Unusable(f"log.jsonl, line {i} is not JSON") from None
        if (
            not isinstance(line, dict)
            or not isinstance(line.get("kind"), str)
            or not isinstance(line.get("step"), int)
            or not 0 <= line["step"] < 2**53
        ):
            raise _Unusable(
                f"was written by another version: log.jsonl, line {i} has no kind and step"
            )
        log.append(line)
    return log


def _read_probe(folder: Path) -> dict:
    """lincls.json, with "path"."""
    if not (folder / LINCLS_RESULT).exists():
        raise _Unusable(f"is an unfinished linear evaluation: it has no {LINCLS_RESULT}")
    content = _read_json(folder / LINCLS_RESULT)
    if not _names_checkpoint(content) or "arch" not in content:
        raise _Unusable(f"{LINCLS_RESULT} names no checkpoint: it is of another version")
    if content.get("evaluation") == "finetune" or "labels" in content:
        kind = "fine-tuning" if "evaluation" in content else "training with part of the labels"
        raise _Unusable(f"is {kind}: compared are linear evaluations with all labels")
    if not any(isinstance(content.get(name), dict) for name in ("knn", "last", "best")):
        raise _Unusable("evaluates a saved classifier (-e): it adds nothing to its probe's folder")
    return {**content, "path": folder}


def _names_checkpoint(content: dict) -> bool:
    path = content.get("checkpoint")
    return isinstance(path, str) and bool(path) and "\0" not in path


def _read_measure(path: Path) -> dict | None:
    """A result of measure_align_uniform.py on the projection at alpha 2 and t 2, or None."""
    try:
        if path.stat().st_size > _LARGEST_JSON:
            return None
        content = _read_json(path)
    except (_Unusable, OSError):
        return None
    if not _names_checkpoint(content):
        return None
    layers = content.get("layers")
    found = {"checkpoint": content["checkpoint"], "path": path}
    for name, parameter in (("alignment", "alpha"), ("uniformity", "t")):
        if isinstance(layers, dict):  # by layer, then by alpha or t
            values = layers.get("projection")
            values = values.get(name) if isinstance(values, dict) else None
            value = values.get("2") if isinstance(values, dict) else None
        else:
            at_2 = content.get("layer") == "projection" and content.get(parameter) == 2
            value = content.get(name) if at_2 else None
        found[name] = number(value)
    return None if found["alignment"] is found["uniformity"] is None else found


def _by_checkpoint(path: str, runs: Sequence[Run]) -> Run | None:
    """The run whose folder holds a checkpoint, or held it before the folder was moved."""
    parent = Path(path).parent
    by_path = [run for run in runs if run.folder.resolve() == parent.resolve()]
    by_record = [run for run in runs if isinstance(run.args.get("save_dir"), str)
                 and Path(run.args["save_dir"]) == parent]  # fmt: skip
    return _only(by_path) or _only(by_record)


def _by_place(path: Path, runs: Sequence[Run]) -> Run | None:
    """The run in whose folder a result lies."""
    inside = path.resolve()
    return _only([run for run in runs if inside.is_relative_to(run.folder.resolve())])


def _only(runs: Sequence[Run]) -> Run | None:
    return runs[0] if len(runs) == 1 else None


def _epoch(found: dict, run: Run) -> int | None:
    """How many epochs the evaluated encoder was trained."""
    if isinstance(found.get("pretrained_epochs"), int):
        return found["pretrained_epochs"]
    name = re.match(r"(checkpoint|step)_(\d+)", Path(found["checkpoint"]).name)
    if name is None:
        return None
    count = int(name[2])
    return count + 1 if name[1] == "checkpoint" else count // run.steps_per_epoch
