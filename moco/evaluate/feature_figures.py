"""Figures 3 and 4 and a t-SNE map (arXiv:2005.10242), drawn from files of features."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from align_uniform import figures
from align_uniform.figures import Features
from moco.data.rgb import load_rgb
from moco.errors import DataError
from moco.evaluate.feature_files import read_features, unit_rows
from moco.packages import import_optional

MOST_PICTURES, PICTURE = 300, 48  # on a map; pixels of the longer side


def draw_figure_3(
    paths: Sequence[str], classes: Sequence[str] | None = None, *, normalize: bool = False
) -> Figure:
    """Positive pairs and densities on the circle, a row for each file.

    Args:
        paths: files of unit rows of two dimensions.
        classes: names or numbers of the classes to show, as the first file has them.
        normalize: scale rows to unit length first.

    Raises:
        DataError: a file that cannot be read or drawn; the message says what to run instead.
    """
    sets = read_circles(paths, normalize)
    shown = class_numbers(classes, next(iter(sets.values())))
    return _drawn(figures.figure_3, sets, shown)


def draw_figure_4(
    paths: Sequence[str], *, t: float = 2, seed: int = 0, normalize: bool = False
) -> Figure:
    """Average pairwise potential of files of features beside that of known distributions.

    Raises:
        DataError: as `draw_figure_3`; a t that is not positive.
    """
    points = {name: found.x for name, found in read_circles(paths, normalize).items()}
    return _drawn(figures.figure_4, points | figures.circle_distributions(seed=seed), t)


def draw_map(
    path: str,
    classes: Sequence[str] | None = None,
    *,
    most: int = 2000,
    seed: int = 0,
    normalize: bool = False,
    images: str | None = None,
) -> Figure:
    """Features in the plane, by t-SNE where they have more than two dimensions.

    Args:
        most: number of rows, as many of each class as of another where it can be.
        images: the folder that the names in the file are relative to; of up to `MOST_PICTURES` rows
            the images themselves are drawn.

    Raises:
        DataError: a file that cannot be read, fewer than four rows for t-SNE, no scikit-learn; with
            `images` too many rows, a file without names, an image that cannot be read.
    """
    name, features = Path(path).stem, _read(path, normalize)
    shown = class_numbers(classes, features)
    rows = balanced_rows(features.labels, len(features.x), most, seed)
    pictures = _pictures(path, images, rows.tolist()) if images is not None else []
    draw = functools.partial(figures.feature_map, pictures=pictures)
    labels = None if features.labels is None else features.labels[rows]
    features = Features(features.x[rows], labels, features.classes)
    count, dim = features.x.shape
    if dim == 2:
        return _drawn(draw, features.x, features, shown, title=name, axis="feature")
    if count < 4:
        raise DataError(f"t-SNE needs at least 4 images, got {count}")
    purpose = "a map of more than two dimensions"
    manifold = import_optional("sklearn.manifold", purpose, "scikit-learn")
    perplexity = min(30.0, (count - 1) / 3)
    embedding = manifold.TSNE(perplexity=perplexity, init="pca", random_state=seed, n_jobs=1)
    places = torch.from_numpy(embedding.fit_transform(features.x.numpy()))
    title = f"{name}: {count} images, {dim} dimensions"
    return _drawn(draw, places, features, shown, title=title)


def _pictures(path: str, images: str, rows: Sequence[int]) -> list[Tensor]:
    """Thumbnails of the rows' images, (H, W, 3) uint8, the longer side `PICTURE` pixels."""
    if len(rows) > MOST_PICTURES:
        raise DataError(
            f"{len(rows)} images would cover each other, the most is {MOST_PICTURES}; give "
            f"--most {MOST_PICTURES}"
        )
    names = read_features(path).paths
    if not names:
        raise DataError(f"{path} has no names of images; extract_features.py writes them")
    found = []
    for row in rows:
        image = load_rgb(Path(images) / names[row])
        scale = PICTURE / max(image.size)
        size = [max(1, round(scale * side)) for side in image.size]
        found.append(torch.from_numpy(np.array(image.resize(size))))
    return found


def read_circles(paths: Sequence[str], normalize: bool = False) -> dict[str, Features]:
    """Features on the circle by the short name of their file.

    Raises:
        DataError: a file that cannot be read, or rows that are not of two dimensions and unit
            length.
    """
    sets = {}
    for name, path in zip(short_names(paths), paths, strict=True):
        features = sets[name] = _read(path, normalize)
        if features.x.shape[1] != 2:
            raise DataError(
                f"{path} has features of {features.x.shape[1]} dimensions, figures 3 and 4 need 2: "
                f"draw a map (plot_features.py map {path} --out map.png), or train with "
                "--moco-dim 2 and extract with --layer projection --normalize --views 2"
            )
        for rows in (features.x, features.y):
            if rows is not None and unit_rows(rows, "features", path)[1]:
                raise DataError(f"{path}: rows are not of unit length; give --normalize")
    return sets


def short_names(paths: Sequence[str]) -> list[str]:
    """Names of files without folder and ending; with the folder where that tells them apart."""
    stems = [Path(path).stem for path in paths]
    if len(set(stems)) == len(stems):
        return stems
    return [f"{Path(path).parent.name}/{Path(path).stem}" for path in paths]


def class_numbers(names: Sequence[str] | None, features: Features) -> list[int] | None:
    """The labels that names or numbers mean.

    Raises:
        DataError: there is no class of that name.
    """
    if not names:
        return None
    known = list(features.classes)
    for name in names:
        if name not in known and not name.isdecimal():
            few = ", ".join(known[:10]) or "none by name; give numbers"
            raise DataError(f"--classes: there is no class {name!r}; the file has {few}")
    return [known.index(name) if name in known else int(name) for name in names]


def balanced_rows(labels: Tensor | None, count: int, most: int, seed: int) -> Tensor:
    """At most `most` of `count` rows, ascending; drawn so that each class has as many as another
    where it can."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    if labels is not None:
        seen: dict[int, int] = {}
        turns = []
        for label in labels[order].tolist():
            turns.append(seen.get(label, 0))  # how many of its class come before it
            seen[label] = turns[-1] + 1
        order = order[torch.tensor(turns).argsort(stable=True)]
    return order[:most].sort().values


def _read(path: str, normalize: bool) -> Features:
    found = read_features(path)
    x, y = found.features, found.second_view
    if normalize:
        x, _ = unit_rows(x, "features", path)
        y = None if y is None else unit_rows(y, "features_2", path)[0]
    return Features(x, found.labels, found.classes, y)


def _drawn(draw, *args, **kwargs) -> Figure:
    """What align_uniform refuses to draw is the fault of a file."""
    try:
        return draw(*args, **kwargs)
    except ValueError as error:
        raise DataError(str(error)) from error
