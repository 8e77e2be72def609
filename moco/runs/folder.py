"""Read run folders: what main_moco.py, main_lincls.py and measure_align_uniform.py left in them.

Folders are read as they are, complete or not: what cannot be used comes back with the reason.
"""

from __future__ import annotations

import functools
import json
import math
import os
import re
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from moco.config import learned_names
from moco.pickles import peek
from moco.printable import printable
from moco.run_files import (
    ARGS,
    DEPTH_RESULT,
    FORMAT_VERSION,
    LINCLS_RESULT,
    LOG,
    checkpoint_files,
    read_log,
)
from moco.runs.evaluations import (
    KNN,
    LOGGED,
    LOWER,
    PLACE,
    SENTIMENT,
    Protocol,
    Unusable,
    is_path,
    number,
    one_line,
    read_evaluation,
    read_json,
    read_measure,
)

# Arguments without which a run is not understood.
_NEEDED = {
    "objective": str,
    "seed": int,
    "epochs": int,
    "batch_size": int,
    "images": int,
    "processes": int,
    "arch": str,
    "lr": (int, float),
}
# Numbers in the log that are no curves.
_NO_CURVES = (
    "kind",
    "step",
    "time",
    "epoch",
    "uniformity_infimum",
    "seconds",
    "k",
    "bank",
    "images",
)
_LARGEST = 2**53  # whole numbers below are exact as floats


@dataclass(frozen=True)
class Figure:
    """A number that was found out about one encoder of a run."""

    name: str  # "k-NN top-1", "linear last", "alignment", ...
    epoch: int  # how many epochs the encoder was trained
    value: float
    protocol: Protocol = ()


@dataclass
class RunFolder:
    """A finished pretraining run, with what was found out about its encoders."""

    folder: Path
    args: dict
    log: list[dict]
    learned: dict[str, str]  # arguments that decide what is learned, as text
    figures: list[Figure] = field(default_factory=list)
    start: tuple[RunFolder, int] | None = None  # run and epoch of the encoder that it began with

    @property
    def objective(self) -> str:
        return self.args["objective"]

    @property
    def seed(self) -> int:
        return self.args["seed"]

    @property
    def _batches(self) -> int:
        """Of an epoch, as the run noted it, else whole batches."""
        noted = number(self.args.get("steps_per_epoch"))
        if noted:
            return max(1, int(noted))
        return self.args["images"] // self.args["batch_size"]

    @property
    def steps_per_epoch(self) -> int:
        return max(1, self._batches)

    @property
    def steps(self) -> int:
        """Of the whole run."""
        steps, most = self.args["epochs"] * self._batches, number(self.args.get("max_steps"))
        return steps if most is None else min(steps, int(most))

    @property
    def epochs(self) -> int:
        """Finished at the end of the run."""
        return self.steps // self.steps_per_epoch

    @functools.cached_property
    def place(self) -> Path:
        """The folder without symbolic links."""
        return _real(self.folder)

    def recipe(self) -> dict[str, str]:
        """All that decides what is learned but the objective and the seed, as text."""
        recipe = {n: v for n, v in self.learned.items() if n not in ("objective", "seed")}
        if self.start is not None:  # not as a path, which is another one for each seed
            recipe["init_from"] = f"{self.start[0].objective}, epoch {self.start[1]}"
        return recipe

    def scalars(self) -> dict[str, tuple[list[float], list[float]]]:
        """Everything that was logged while training: name -> (epochs, values)."""
        found: dict[str, tuple[list[float], list[float]]] = {}
        for line in self.log:
            if line["kind"] == "start":  # one step, for moco.health
                continue
            prefix = "" if line["kind"] in ("train", "metrics") else f"{line['kind']} "
            for name, value in line.items():
                if name not in _NO_CURVES and number(value) is not None:
                    xs, ys = found.setdefault(prefix + name, ([], []))
                    xs.append(line["step"] / self.steps_per_epoch)
                    ys.append(float(value))
        return found

    @functools.cached_property
    def _pace(self) -> tuple[float, float]:
        """Images and seconds between the lines of the log, without the time a run lay still."""
        images, seconds, before = 0.0, 0.0, None
        for line in self.log:
            rate = number(line.get("images_per_s", line.get("sentences_per_s")))
            if line["kind"] == "train" and rate and rate > 0:
                if before is None:  # a run that went on from another's checkpoint starts later
                    before = max(0, line["step"] - int(number(self.args.get("print_freq")) or 1))
                done = (line["step"] - before) * self.args["batch_size"]
                images, seconds, before = images + done, seconds + done / rate, line["step"]
        return images, seconds

    def hours(self) -> float | None:
        """Of training."""
        return self._pace[1] / 3600 or None

    def images_per_s(self) -> float | None:
        images, seconds = self._pace
        return images / seconds if seconds else None

    def health(self) -> str | None:
        """The last verdict that the run gave on itself (`moco.health`)."""
        found = [line.get("verdict") for line in self.log if line["kind"] == "health"]
        return found[-1] if found and isinstance(found[-1], str) else None

    def found(self, epoch: int | None = None) -> dict[tuple[str, Protocol], list[float]]:
        """(name, protocol) -> values, of the encoder of an epoch, the last if None. What nobody has
        evaluated is as it was logged while training."""
        epoch = self.epochs if epoch is None else epoch
        evaluated = [figure for figure in self.figures if figure.epoch == epoch]
        names = {figure.name for figure in evaluated}
        logged = [figure for figure in self._logged(epoch) if figure.name not in names]
        found: dict[tuple[str, Protocol], list[float]] = {}
        for figure in (*evaluated, *logged):
            found.setdefault((figure.name, figure.protocol), []).append(figure.value)
        return found

    def _logged(self, epoch: int) -> Iterator[Figure]:
        step = self.steps if epoch == self.epochs else epoch * self.steps_per_epoch
        for line in self.log:
            top1 = number(line.get("top1"))
            if line["kind"] == "knn" and line["step"] == step and top1 is not None:
                settings = ((n, number(line.get(n))) for n in ("k", "bank", "images"))
                protocol = ((n, f"{value:g}") for n, value in settings if value is not None)
                yield Figure(KNN, epoch, top1, (LOGGED, *protocol))
        if epoch == self.epochs:
            scalars = self.scalars()
            for name in PLACE:
                held_out = f"held_out {name}"  # of sentences; else of a batch
                logged = scalars.get(held_out, scalars.get(name))
                if logged:
                    yield Figure(name, epoch, logged[1][-1], (LOGGED,))

    @functools.cached_property
    def final(self) -> dict[tuple[str, Protocol], list[float]]:
        """What was found out about the last encoder."""
        return self.found()

    def value(self, name: str, epoch: int | None = None) -> float | None:
        """One figure of an encoder, the last if None: of several protocols that of most
        evaluations, of several evaluations by one protocol their mean."""
        found = [values for (n, _), values in self.found(epoch).items() if n == name]
        return mean(max(found, key=len, default=()))

    def encoders(self) -> list[tuple[int, float, float]]:
        """The encoders of the run that were measured, (epoch, alignment, uniformity), in order;
        without measurements of several epochs what was logged at the end of each."""
        epochs, scalars = {f.epoch for f in self.figures if f.name in PLACE}, self.scalars()
        if len(epochs) < 2 and scalars.keys() >= {*PLACE}:
            uniformity = dict(zip(*scalars["uniformity"], strict=True))
            logged = zip(*scalars["alignment"], strict=True)
            places = {math.ceil(x): (value, uniformity.get(x)) for x, value in logged}
        else:
            places = {epoch: self.place_of(epoch) for epoch in epochs}
        return [(epoch, *place) for epoch, place in sorted(places.items()) if None not in place]

    def place_of(self, epoch: int | None = None) -> tuple[float | None, float | None]:
        """Alignment (alpha 2) and uniformity (t 2) of an encoder, the last if None: on held-out
        images, else as last logged while training."""
        return self.value("alignment", epoch), self.value("uniformity", epoch)


def common_accuracy(
    encoders: Sequence[tuple[RunFolder, int]],
) -> tuple[str, Callable[[RunFolder, int], float | None]]:
    """What accuracy to compare encoders (run, epoch) by, and how to find it: of one kind and
    protocol, that most of them have; the linear probe's last rather than others, k-NN's last. Of
    encoders whose depth was predicted, its error."""
    counts: dict[tuple[str, Protocol], int] = {(KNN, ()): 0}
    for run, epoch in encoders:
        for name, protocol in run.found(epoch):
            depth = name.endswith(f"depth MSE {LOWER}")
            if name in (KNN, *SENTIMENT) or depth or name.split(",")[0].endswith(" last"):
                counts[name, protocol] = counts.get((name, protocol), 0) + 1

    def preference(kind: tuple[str, Protocol]) -> tuple:
        return counts[kind], kind[0] == "linear last", kind[0] != KNN

    kind = max(counts, key=preference)
    name = kind[0]
    if name in SENTIMENT:
        title = f"{name} (%)"
    elif name == KNN:
        title = "k-NN top-1 (%)"
    else:
        title = name if name.endswith(LOWER) else f"{name.replace(' last', '', 1)} top-1, last (%)"
    return title, lambda run, epoch: mean(run.found(epoch).get(kind, ()))


def short_names(runs: Sequence[RunFolder]) -> list[str]:
    """The folders of runs, without what they all begin or end with."""
    parts = [list(run.place.parts) for run in runs]
    if len(runs) == 1:
        return [runs[0].place.name]
    for end in (0, -1):
        while all(len(p) > 1 for p in parts) and len({p[end] for p in parts}) == 1:
            for p in parts:
                del p[end]
    return ["/".join(p) for p in parts]


def mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def read_runs(paths: Sequence[str | Path]) -> tuple[list[RunFolder], list[tuple[str, str]]]:
    """Finished runs in the given folders and below them, each with what was found out about it.

    A linear evaluation or a measurement belongs to the run whose folder holds the checkpoint that
    it names: as the path stands, or as the run recorded its own folder (after a move), or else to
    the run in whose folder it is.

    Returns:
        (runs in the order given, [(path, reason)] of what was left out).
    """
    runs: list[RunFolder] = []
    evaluations: list[tuple[Path, dict]] = []
    left_out: list[tuple[str, str]] = []
    for folder, files in _folders(paths, left_out):
        if {ARGS, LOG, LINCLS_RESULT} & set(files) or checkpoint_files(folder):
            try:
                if _is_evaluation(folder):
                    evaluations.append((folder, read_evaluation(folder)))
                else:
                    runs.append(_read_run(folder, left_out))
            except Unusable as reason:
                left_out.append((str(folder), str(reason)))
        known = (ARGS, LINCLS_RESULT, DEPTH_RESULT)
        measures = [n for n in files if n.endswith(".json") and n not in known]
        for path in (folder / name for name in measures):
            if measure := read_measure(path):
                evaluations.append((path, measure))
    for run in runs:
        path = run.args.get("init_from")
        start = _by_checkpoint(path, runs) if is_path(path) else None
        epoch = start and _epoch({"checkpoint": path}, start)
        run.start = None if epoch is None or start is run else (start, epoch)
    for path, content in evaluations:
        checkpoint = content["checkpoint"]
        run = _by_checkpoint(checkpoint, runs) or _only(  # or in whose folder it is
            run for run in runs if _real(path).is_relative_to(run.place)
        )
        epoch = run and _epoch(content, run)
        if run is None:
            left_out.append(
                (str(path), f"is of {checkpoint}, which is in none of the runs compared")
            )
        elif epoch is None:
            left_out.append((str(path), f"{checkpoint}: its name does not tell the epoch"))
        else:
            run.figures += [
                Figure(name, epoch, value, protocol)
                for name, value, protocol in content["figures"]
                if value is not None
            ]
    return runs, [(printable(path), printable(reason)) for path, reason in left_out]


def _folders(
    paths: Sequence[str | Path], left_out: list[tuple[str, str]]
) -> list[tuple[Path, list[str]]]:
    """All folders at and below `paths`, each once, with the files in it."""
    found: dict[Path, tuple[Path, list[str]]] = {}
    for given in paths:
        if not os.path.isdir(given):
            is_file = os.path.exists(given)
            reason = "is a file, expected a run folder" if is_file else "is no folder"
            left_out.append((str(given), reason))
            continue
        runs_before = len(found)
        for root, folders, files in os.walk(given):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            if any(name.endswith((".json", ".jsonl", ".pth.tar")) for name in files):
                found.setdefault(_real(root), (Path(root), sorted(files)))
        if len(found) == runs_before and _real(given) not in found:
            left_out.append((str(given), "holds no run"))
    return list(found.values())


def _text(value: object) -> str:
    if value is None:
        return "none"
    try:
        return f"{value:g}" if isinstance(value, float) else json.dumps(value).strip('"')
    except RecursionError:
        raise Unusable(f"{ARGS} is nested too deeply") from None


def _is_evaluation(folder: Path) -> bool:
    try:
        return os.path.exists(folder / LINCLS_RESULT) or "pretrained" in read_json(folder / ARGS)
    except Unusable:
        return False


def _read_run(folder: Path, left_out: list[tuple[str, str]]) -> RunFolder:
    args = read_json(folder / ARGS)
    if args.get("task") == "sentences":
        args["images"] = args.get("sentences")  # what an epoch has so many of
    for name, kind in _NEEDED.items():
        value = args.get(name)
        usable = isinstance(value, kind) and not isinstance(value, bool)
        if not usable or (isinstance(value, int) and abs(value) >= _LARGEST):
            raise Unusable(
                f"was written by another version: args.json has no usable {name!r} "
                f"(got {_text(value)[:60]})"
            )
    if args["batch_size"] < 1 or args["images"] < 0 or args["epochs"] < 0:
        raise Unusable("args.json has a batch size, number of images or of epochs below zero")
    _refuse_other_version(folder)
    names = [name for name in learned_names(args) if name in args] + ["processes", "max_steps"]
    learned = {name: _text(args.get(name)) for name in names}
    run = RunFolder(folder, args, [], learned)
    run.log = _read_log(folder, run.steps, left_out)
    return run


def _read_log(folder: Path, planned: int, left_out: list[tuple[str, str]]) -> list[dict]:
    """The lines of a finished run's log; damaged ones are passed over, and listed as left out."""
    if not os.path.isfile(folder / LOG):
        raise Unusable(f"has no {LOG}")
    try:
        lines, bad = read_log(folder / LOG)
    except OSError as error:
        raise Unusable(f"{LOG} cannot be read: {one_line(error)}") from None
    usable = [line for line in lines if 0 <= line["step"] < _LARGEST]
    damaged = len(bad) + len(lines) - len(usable)
    done = max((line["step"] for line in usable if line["kind"] == "train"), default=0)
    if done < planned:
        damage = f"; {LOG} has {damaged} damaged line(s)" if damaged else ""
        raise Unusable(f"is unfinished: step {done} of {planned}{damage}")
    if damaged:
        left_out.append((str(folder / LOG), f"has {damaged} damaged line(s); the others are used"))
    return usable


def _refuse_other_version(folder: Path) -> None:
    """By a checkpoint, if any was kept; its tensors stay on disk."""
    for path in checkpoint_files(folder)[-1:]:
        try:
            version = peek(path).get("version")
        except Exception as error:  # a damaged file can make the reader fail in any way
            raise Unusable(f"{path.name} cannot be read: {one_line(error)}") from None
        if version != FORMAT_VERSION:
            raise Unusable(
                f"is of another version: {path.name} has format version {version!r}, expected "
                f"{FORMAT_VERSION}"
            )


def _real(path: str | Path) -> Path:
    """Without symbolic links, as far as there are folders; Path.resolve raises where they loop."""
    try:
        return Path(os.path.realpath(path))
    except ValueError:  # characters that no file system takes
        return Path(path)


def _by_checkpoint(path: str, runs: Sequence[RunFolder]) -> RunFolder | None:
    """The run whose folder holds a checkpoint, or held it before the folder was moved."""
    parent = Path(path).parent
    recorded = [(run, run.args.get("save_dir")) for run in runs]
    by_record = [run for run, place in recorded if isinstance(place, str) and Path(place) == parent]
    return _only(run for run in runs if run.place == _real(parent)) or _only(by_record)


def _only(runs: Iterable[RunFolder]) -> RunFolder | None:
    found = list(runs)
    return found[0] if len(found) == 1 else None


def _epoch(content: dict, run: RunFolder) -> int | None:
    """How many epochs the evaluated encoder was trained."""
    if isinstance(content.get("pretrained_epochs"), int):
        return content["pretrained_epochs"]
    name = re.match(r"(checkpoint|step)_(\d{1,15})", Path(content["checkpoint"]).name)
    if name is None:
        return None
    count = int(name[2])
    return count + 1 if name[1] == "checkpoint" else count // run.steps_per_epoch
