#!/usr/bin/env python
"""Draw the figures of arXiv:2005.10242 from features or from run folders, as PNG or SVG.

    python scripts/plot_features.py 3 FEATURES... --out FILE...    pairs, densities on the circle
    python scripts/plot_features.py 4 [FEATURES...] --out FILE...  average pairwise potential
    python scripts/plot_features.py map FEATURES --out FILE...     t-SNE from any dimension
    python scripts/plot_features.py 5 RUN... --out FILE...         alignment, uniformity, accuracy
    python scripts/plot_features.py 7 RUN... --out FILE...         the same against the loss weights
    python scripts/plot_features.py 8 RUN... --out FILE...         the same while training goes on
    python scripts/plot_features.py 10 --out FILE...               0F1 against the dimension
    python scripts/plot_features.py 11 --out FILE...               optimal uniformity against it

FEATURES is an .npz or .safetensors file with `features` (N, C) and, where known, `labels` (N,),
`classes` (their names) and `features_2` (N, C), a second view of each image. Figures 3 and 4 need
unit rows of two dimensions (train with --moco-dim 2). RUN is what compare_runs.py takes.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import safetensors
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from align_uniform import figures  # noqa: E402
from align_uniform.figures import Features, Point  # noqa: E402
from moco.cli import report_user_errors  # noqa: E402
from moco.errors import DataError  # noqa: E402
from moco.runs.folder import RunFolder as Run  # noqa: E402
from moco.runs.folder import common_accuracy, number, read_runs, short_names  # noqa: E402

FIGURES = ("3", "4", "5", "7", "8", "10", "11", "map")
_MOST_NAMES = 16  # of runs in one scatter: more would cover each other
_OF_FEATURES, _OF_RUNS, _OF_NOTHING = ("3", "4", "map"), ("5", "7", "8"), ("10", "11")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="the figures of arXiv:2005.10242")
    parser.add_argument("figure", choices=FIGURES, metavar="FIGURE", help=", ".join(FIGURES))
    parser.add_argument("inputs", nargs="*", metavar="INPUT", help="features or run folders")
    parser.add_argument("--out", nargs="+", required=True, metavar="FILE", help=".png or .svg")
    parser.add_argument(
        "--classes",
        nargs="+",
        metavar="NAME",
        help="names or numbers of classes to show (3: the first 4; map: 10)",
    )
    parser.add_argument("--normalize", action="store_true", help="scale rows to unit length first")
    parser.add_argument("--t", type=float, default=2.0, help="of figure 4 (%(default)s)")
    parser.add_argument(
        "--most",
        type=int,
        default=2000,
        metavar="N",
        help="images on a map, equally many of each class (%(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of maps and samples (%(default)s)")
    return parser  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    parser = build_parser()
    args = parser.parse_args(argv)

    def refuse(reason: str) -> None:
        parser.exit(2, f"{parser.prog}: error: {reason}\n")

    wrong = [path for path in args.out if Path(path).suffix.lower() not in (".png", ".svg")]
    if wrong:
        refuse(f"--out files must end in .png or .svg, got {wrong[0]}")
    if args.figure in _OF_NOTHING and args.inputs:
        refuse(f"figure {args.figure} takes no input, got {args.inputs[0]}")
    if args.figure in ("3", "map", *_OF_RUNS) and not args.inputs:
        kind = "run folder" if args.figure in _OF_RUNS else "file of features"
        refuse(f"figure {args.figure} needs at least one {kind}")
    if args.figure == "map" and len(args.inputs) > 1:
        refuse(f"a map is of one file of features, got {len(args.inputs)}")
    if args.most < 2:
        refuse(f"--most must be at least 2, got {args.most}")
    if not 0 <= args.seed < 2**32:
        refuse(f"--seed must be in [0, 2^32), got {args.seed}")
    with report_user_errors():
        try:
            figure = draw(args)
        except ValueError as error:  # of the library, about the numbers in a file
            raise DataError(str(error)) from error
        for path in args.out:
            figures.save(figure, path)
            print(f"wrote {path}")


def draw(args: argparse.Namespace) -> Figure:
    if args.figure == "10":
        return figures.figure_10()
    if args.figure == "11":
        return figures.figure_11()
    if args.figure in _OF_RUNS:
        runs, left_out = read_runs(args.inputs)
        for path, reason in left_out:
            print(f"left out: {path} {reason}", file=sys.stderr)
        return {"5": scatter, "7": weights_sweep, "8": trajectories}[args.figure](runs)
    sets = {name: read_features(path, args.normalize) for name, path in _named(args.inputs)}
    if args.figure == "4":
        points = {name: features.x for name, features in sets.items()}
        return figures.figure_4({**points, **figures.circle_distributions(seed=args.seed)}, args.t)
    shown = None
    if args.classes:
        shown = [class_number(name, next(iter(sets.values()))) for name in args.classes]
    if args.figure == "3":
        return figures.figure_3(sets, shown)
    ((name, features),) = sets.items()
    return draw_map(name, features, shown, args.most, args.seed)


# ------------------------------------------------------------------------------------------------
# Features
# ------------------------------------------------------------------------------------------------


def _named(paths: Sequence[str]) -> list[tuple[str, str]]:
    """Short names of files: their own, with the folder's where that tells them apart."""
    stems = [Path(path).stem for path in paths]
    if len(set(stems)) == len(stems):
        return list(zip(stems, paths, strict=True))
    return [(f"{Path(path).parent.name}/{Path(path).stem}", path) for path in paths]


def read_features(path: str, normalize: bool = False) -> Features:
    """A file of features, checked.

    Raises:
        DataError: the file cannot be read, or what it holds is no set of features: the message
            names the file, and the row where one is bad.
    """
    try:
        if Path(path).suffix.lower() == ".safetensors":
            arrays, classes = _read_safetensors(path)
        else:
            arrays, classes = _read_npz(path)
    except FileNotFoundError:
        raise DataError(f"no such file of features: {path}") from None
    except Exception as error:  # a damaged file can make the readers fail in any way
        reason = " ".join(str(error).split())[:200]
        raise DataError(
            f"{path} cannot be read as .npz or .safetensors with features: {reason}"
        ) from None
    if "features" not in arrays:
        raise DataError(f"{path} has no array 'features'")
    x = _rows(arrays["features"], "features", path, normalize)
    y, labels = None, None
    if "features_2" in arrays:
        y = _rows(arrays["features_2"], "features_2", path, normalize)
        if y.shape != x.shape:
            raise DataError(
                f"{path}: features_2 must have the shape of features, {tuple(x.shape)}, got "
                f"{tuple(y.shape)}"
            )
    if "labels" in arrays:
        labels = arrays["labels"]
        if labels.shape != (len(x),) or labels.is_floating_point():
            raise DataError(
                f"{path}: labels must be {len(x)} whole numbers, got shape "
                f"{tuple(labels.shape)} of {labels.dtype}"
            )
        labels = labels.long() if (labels >= 0).any() else None  # -1: in no class
    return Features(x, labels, classes, y)


def _read_npz(path: str) -> tuple[dict[str, torch.Tensor], list[str]]:
    arrays = np.load(path, allow_pickle=False)
    if not isinstance(arrays, np.lib.npyio.NpzFile):
        raise ValueError("it holds a single array; save them by name with np.savez")
    with arrays:
        classes = [str(name) for name in arrays["classes"]] if "classes" in arrays else []
        wanted = [name for name in ("features", "features_2", "labels") if name in arrays]
        return {name: torch.as_tensor(arrays[name]) for name in wanted}, classes


def _read_safetensors(path: str) -> tuple[dict[str, torch.Tensor], list[str]]:
    with safetensors.safe_open(path, "pt") as file:
        wanted = [name for name in ("features", "features_2", "labels") if name in file.keys()]
        classes = (file.metadata() or {}).get("classes", "[]")
        return {name: file.get_tensor(name) for name in wanted}, list(json.loads(classes))


def _rows(x: torch.Tensor, name: str, path: str, normalize: bool) -> torch.Tensor:
    if x.dim() != 2 or not x.is_floating_point() or not x.numel():
        raise DataError(
            f"{path}: {name} must be (N >= 1, C >= 1) floating-point numbers, got shape "
            f"{tuple(x.shape)} of {x.dtype}"
        )
    x = x.float() if x.dtype != torch.float64 else x
    bad = (~x.isfinite().all(dim=1)).nonzero()
    if len(bad):
        raise DataError(
            f"{path}: {name} has NaN or infinite values in {len(bad)} of {len(x)} rows, first in "
            f"row {int(bad[0])}"
        )
    if not normalize:
        return x
    zero = (x == 0).all(dim=1).nonzero()
    if len(zero):
        raise DataError(f"{path}: row {int(zero[0])} of {name} is zero and has no direction")
    return F.normalize(x, dim=1)


def class_number(name: str, features: Features) -> int:
    """The label that a name or number means."""
    if name in features.classes:
        return list(features.classes).index(name)
    if name.isdecimal():
        return int(name)
    known = ", ".join(list(features.classes)[:10]) or "none by name; give numbers"
    raise DataError(f"--classes: there is no class {name!r}; the file has {known}")


def draw_map(
    name: str, features: Features, shown: list[int] | None, most: int, seed: int
) -> Figure:
    features = _equally_many(features, most, seed)
    if features.x.shape[1] == 2:
        return figures.feature_map(features.x, features, shown, title=name, axis="feature")
    try:
        from sklearn.manifold import TSNE
    except ImportError:
        raise DataError(
            "a map of more than two dimensions needs scikit-learn: pip install scikit-learn"
        ) from None
    if len(features.x) < 4:
        raise DataError(f"t-SNE needs at least 4 images, got {len(features.x)}")
    perplexity = min(30.0, (len(features.x) - 1) / 3)
    embedding = TSNE(perplexity=perplexity, init="pca", random_state=seed, n_jobs=1)
    places = torch.from_numpy(embedding.fit_transform(features.x.numpy()))
    title = f"{name}: {len(places)} images, {features.x.shape[1]} dimensions"
    return figures.feature_map(places, features, shown, title=title)


def _equally_many(features: Features, most: int, seed: int) -> Features:
    """At most `most` rows, drawn so that each class has as many as another where it can."""
    order = torch.randperm(len(features.x), generator=torch.Generator().manual_seed(seed))
    if features.labels is not None:
        seen: dict[int, int] = {}
        turns = []
        for label in features.labels[order].tolist():
            turns.append(seen.get(label, 0))  # how many of its class come before it
            seen[label] = turns[-1] + 1
        order = order[torch.tensor(turns).argsort(stable=True)]
    chosen = order[:most].sort().values
    labels = features.labels[chosen] if features.labels is not None else None
    return Features(features.x[chosen], labels, features.classes)


# ------------------------------------------------------------------------------------------------
# Runs
# ------------------------------------------------------------------------------------------------


def _measured_only(runs: Sequence[Run]) -> list[Run]:
    found = [r for r in runs if None not in (r.measured("alignment"), r.measured("uniformity"))]
    if not found:
        raise DataError(
            f"none of {len(runs)} finished run(s) has alignment and uniformity; measure with "
            "scripts/measure_align_uniform.py CHECKPOINT DIR --out RUN/FILE.json"
        )
    return found


def final_points(runs: Sequence[Run], names: Sequence[str]) -> tuple[str, list[Point]]:
    """What the accuracy is, and where the last encoder of each run stands."""
    kind, accuracy = common_accuracy([(run, run.epochs) for run in runs])
    return kind, [
        Point(
            run.measured("alignment"), run.measured("uniformity"), accuracy(run, run.epochs), name
        )
        for run, name in zip(runs, names, strict=True)
    ]


def scatter(runs: Sequence[Run]) -> Figure:
    runs = _measured_only(runs)
    names = short_names(runs) if len(runs) <= _MOST_NAMES else [""] * len(runs)
    kind, points = final_points(runs, names)
    return figures.scatter(points, accuracy=kind)


def weights_sweep(runs: Sequence[Run]) -> Figure:
    """Runs of weighted alignment and uniformity, a line for each (alpha, t)."""
    used: list[tuple[Run, float, tuple[float | None, float | None]]] = []
    for run in _measured_only(runs):
        weights = [number(run.args.get(name)) for name in ("contr_w", "align_w", "unif_w")]
        if None in weights or weights[0] or not (weights[1] or weights[2]):
            print(f"left out: {run.folder} is of {run.objective}", file=sys.stderr)
            continue
        _, align, unif = weights
        alpha, t = number(run.args.get("align_alpha")), number(run.args.get("unif_t"))
        used.append((run, align / (align + unif), (alpha if align else None, t if unif else None)))
    if not used:
        raise DataError("figure 7 needs runs of alignment and uniformity without InfoNCE, got none")
    kind, points = final_points([run for run, *_ in used], [""] * len(used))
    # A run without one of the terms has no parameter of it: it is an end of every line that agrees
    # in the other.
    settings = list(dict.fromkeys(setting for *_, setting in used))
    whole = [setting for setting in settings if None not in setting]
    lines: dict[str, list[tuple[float, Point]]] = {}
    for (_, share, setting), point in zip(used, points, strict=True):
        alike = [
            s
            for s in whole
            if all(mine in (None, its) for mine, its in zip(setting, s, strict=True))
        ]
        for alpha, t in alike or [setting]:
            parts = [f"{name} {v:g}" for name, v in (("alpha", alpha), ("t", t)) if v is not None]
            lines.setdefault(", ".join(parts), []).append((share, point))
    return figures.weights_sweep(lines, accuracy=kind)


def trajectories(runs: Sequence[Run]) -> Figure:
    """Each run's encoders in order of the epoch, from the one that it was started from on."""
    paths = {}
    for run, name in zip(runs, short_names(runs), strict=True):
        encoders = [(run, *encoder) for encoder in run.encoders()]
        if run.start is not None:
            start, wanted = run.start
            before = [(start, *e) for e in start.encoders() if e[0] == wanted]
            encoders = before + encoders
        if len(encoders) < 2:
            print(f"left out: {run.folder} has {len(encoders)} measured epoch(s)", file=sys.stderr)
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
    points = {
        name: [
            Point(
                a, u, accuracy(run, epoch), f"epoch {epoch}" if run is encoders[-1][0] else "start"
            )
            for run, epoch, a, u in encoders
        ]
        for name, encoders in paths.items()
    }
    return figures.trajectories(points, accuracy=kind)


if __name__ == "__main__":
    main()
