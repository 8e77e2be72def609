"""Where the encoders of run folders stand in figures 5, 7 and 8 (arXiv:2005.10242)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from moco.errors import DataError
from moco.runs.evaluations import number
from moco.runs.folder import RunFolder, common_accuracy, short_names

MOST_NAMES = 16  # of runs in one scatter: more would cover each other
Place = tuple[float, float, float | None, str]  # alignment, uniformity, accuracy in percent, label
Say = Callable[[str], None]  # takes a line on a run that is left out


def final_points(runs: Sequence[RunFolder]) -> tuple[str, list[Place]]:
    """Figure 5: what the accuracy is, and the last encoder of each run that was measured.

    Raises:
        DataError: none was measured.
    """
    runs = _measured_only(runs)
    names = short_names(runs) if len(runs) <= MOST_NAMES else [""] * len(runs)
    return places(zip(runs, names, strict=True))


def sweep_lines(
    runs: Sequence[RunFolder], say: Say
) -> tuple[str, dict[str, list[tuple[float, Place]]]]:
    """Figure 7: what the accuracy is, and runs of weighted alignment and uniformity by the share of
    alignment in the weights, a line for each (alpha, t).

    Raises:
        DataError: no such run.
    """
    used: list[tuple[RunFolder, float, tuple[float | None, float | None]]] = []
    for run in _measured_only(runs):
        weights = [number(run.args.get(name)) for name in ("contr_w", "align_w", "unif_w")]
        if None in weights or weights[0] or not (weights[1] or weights[2]):
            say(f"left out: {run.folder} is of {run.objective}")
            continue
        _, align, unif = weights
        alpha, t = number(run.args.get("align_alpha")), number(run.args.get("unif_t"))
        used.append((run, align / (align + unif), (alpha if align else None, t if unif else None)))
    if not used:
        raise DataError("figure 7 needs runs of alignment and uniformity without InfoNCE, got none")
    kind, points = places((run, "") for run, *_ in used)
    # A run without one of the terms has no parameter of it: it is an end of every line that agrees
    # in the other.
    settings = list(dict.fromkeys(setting for *_, setting in used))
    whole = [setting for setting in settings if None not in setting]
    lines: dict[str, list[tuple[float, Place]]] = {}
    for (_, share, setting), point in zip(used, points, strict=True):
        alike = [w for w in whole if all(a in (None, b) for a, b in zip(setting, w, strict=True))]
        for alpha, t in alike or [setting]:
            parts = [f"{name} {v:g}" for name, v in (("alpha", alpha), ("t", t)) if v is not None]
            lines.setdefault(", ".join(parts), []).append((share, point))
    return kind, lines


def paths_of_training(runs: Sequence[RunFolder], say: Say) -> tuple[str, dict[str, list[Place]]]:
    """Figure 8: what the accuracy is, and each run's encoders in order of the epoch, from the one
    that it was started from on.

    Raises:
        DataError: no run has two measured encoders.
    """
    paths = {}
    for run, name in zip(runs, short_names(runs), strict=True):
        encoders = [(run, *encoder) for encoder in run.encoders()]
        if run.start is not None:
            encoders = [*_start(*run.start), *encoders]
        if len(encoders) < 2:
            say(f"left out: {run.folder} has {len(encoders)} measured epoch(s)")
        else:
            paths[f"{name}: {run.objective}"] = encoders
    if not paths:
        raise DataError(
            "figure 8 needs runs with at least two measured checkpoints: measure them with "
            "scripts/measure_align_uniform.py CHECKPOINT DIR --out RUN/FILE.json"
        )
    kind, accuracy = common_accuracy(
        [(run, epoch) for encoders in paths.values() for run, epoch, _, _ in encoders]
    )
    return kind, {
        name: [
            (a, u, accuracy(run, epoch), f"epoch {epoch}" if run is encoders[-1][0] else "start")
            for run, epoch, a, u in encoders
        ]
        for name, encoders in paths.items()
    }


def _start(run: RunFolder, epoch: int) -> list[tuple[RunFolder, int, float, float]]:
    """Where an encoder is that others began from: as it was measured, else as was logged."""
    place = run.place_of(epoch)
    if None not in place:
        return [(run, epoch, *place)]
    return [(run, *each) for each in run.encoders() if each[0] == epoch]


def _measured_only(runs: Sequence[RunFolder]) -> list[RunFolder]:
    found = [run for run in runs if None not in run.place_of()]
    if not found:
        raise DataError(
            f"none of {len(runs)} finished run(s) has alignment and uniformity; measure with "
            "scripts/measure_align_uniform.py CHECKPOINT DIR --out RUN/FILE.json"
        )
    return found


def places(labelled: Iterable[tuple[RunFolder, str]]) -> tuple[str, list[Place]]:
    """What the accuracy is, and where the last encoders of measured runs stand."""
    labelled = list(labelled)
    kind, accuracy = common_accuracy([(run, run.epochs) for run, _ in labelled])
    return kind, [(*run.place_of(), accuracy(run, run.epochs), label) for run, label in labelled]
