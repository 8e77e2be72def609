"""What is measured of an encoder or of features: alignment, uniformity, k-NN accuracy; effective
rank, deviation, alpha-ReQ, Wasserstein uniformity and LiDAR.

Of held-out images, positive pairs are two random views of each under a fixed seed; uniformity, rank
and deviation are those of the first views, but uniformity of encoders of train_in_batch.py is the
mean over both, as in their training (arXiv:2005.10242, appendix B.1). A report can be written as
JSON; `moco.evaluate.measure_table` prints it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from align_uniform.bounds import uniformity_infimum
from align_uniform.metrics import (
    alignment,
    alignment_interval,
    dimension_deviation,
    effective_rank,
    uniformity_curve,
    uniformity_interval,
)
from align_uniform.spectrum import alpha_req, jackknife_interval, lidar, wasserstein_uniformity
from moco.data.images import FolderImages, Images, Subset, first_per_class, open_images
from moco.data.nyu import open_nyu
from moco.errors import DataError
from moco.evaluate.extraction import LAYERS, ImageEncoder, Loading, extract
from moco.evaluate.feature_files import FeatureSet, read_features, unit_rows
from moco.evaluate.knn import count_correct, knn_predict
from moco.precision import kernels


@dataclass(frozen=True)
class Quantities:
    """What is measured.

    Attributes:
        alphas: exponents of alignment, ascending.
        ts: inverse temperatures of uniformity, ascending.
        knn_k, knn_temperature: of the weighted k-NN vote.
        lidar_images, lidar_views: of LiDAR, which was published with 1000 images of 50 views each;
            no views: leave it out.
        intervals: 95 % confidence intervals over images as well.
    """

    alphas: Sequence[float] = (1.0, 2.0)
    ts: Sequence[float] = tuple(float(t) for t in range(1, 9))
    knn_k: int = 200
    knn_temperature: float = 0.07
    lidar_images: int = 1000
    lidar_views: int = 10
    intervals: bool = False


@dataclass(frozen=True)
class HeldOut:
    """Which images are measured.

    Attributes:
        data: a folder; DIR/val is measured, or all of DIR where there is none.
        dataset: "folder", a data set as torchvision stores it, or "nyu".
        per_class: the first so many of each class.
        most: of a larger set take so many, evenly spread: bounds memory and time.
        seed: of the views.
    """

    data: str | os.PathLike
    dataset: str = "folder"
    per_class: int | None = None
    most: int = 100_000
    seed: int = 0

    def images(self) -> Images:
        """Images to measure; labels are not needed."""
        root = Path(self.data)
        if self.dataset == "nyu":
            return self._limited(open_nyu(root, "val").images)
        if self.dataset != "folder":
            return self._limited(open_images(self.dataset, root, "val"))
        return self._limited(FolderImages(root / "val" if (root / "val").is_dir() else root))

    def knn_images(self) -> tuple[Images, Images]:
        """Bank and queries, of the same classes."""
        root = Path(self.data)
        if self.dataset == "nyu":
            raise DataError("images of nyu have no classes")
        bank = open_images(self.dataset, root, "train")
        queries = open_images(self.dataset, root, "val", classes=bank.classes)
        return self._limited(bank), self._limited(queries)

    def _limited(self, images: Images) -> Images:
        if self.per_class is not None:
            if images.targets is None:
                raise DataError(f"--images-per-class needs labels, and {self.data} has none")
            images = Subset(images, first_per_class(images.targets, self.per_class))
        return _thinned(images, self.most)


def _thinned(images: Images, most: int) -> Images:
    """At most so many, evenly spread."""
    if len(images) <= most:
        return images
    return Subset(images, [i * len(images) // most for i in range(most)])


@kernels(deterministic=False)
def measure_encoder(
    encoder: ImageEncoder,
    name: str,
    held_out: HeldOut,
    loading: Loading,
    quantities: Quantities,
    *,
    layer: str | None = None,
) -> dict:
    """Measure an encoder on held-out images.

    Args:
        encoder: as `load_image_encoder` gives it.
        name: of its file, for the report.
        layer: only this one; None for all that the encoder has.

    Raises:
        DataError: fewer than two images, one that cannot be read, features that are not finite.
    """
    images = held_out.images()
    if len(images) < 2:
        raise DataError(
            f"{held_out.data} has {len(images)} image to measure; at least 2 are needed"
        )
    notes = list(encoder.notes)
    if held_out.dataset == "folder" and not (Path(held_out.data) / "val").is_dir():
        folder = Path(held_out.data) / "val"
        notes.append(f"no folder {folder}: measured on all images of {held_out.data}")
    in_batch = encoder.trained.get("task") == "in-batch"
    if in_batch:
        notes.append("uniformity is the mean over both views, as in training")
    elif "aug_plus" not in encoder.trained:
        notes.append("the file names no augmentation: views are MoCo v2's")
    only = {"unit": True, "layer": layer}
    (x, y), _ = extract(encoder, images, loading, views=2, seed=held_out.seed, what="views", **only)
    views = _views_for_lidar(encoder, images, held_out.seed, loading, quantities, layer)
    layers = {
        each: measure_layer(
            x[each],
            y[each],
            views.get(each),
            quantities,
            loading.device,
            f"{name}, {each}",
            both_uniform=in_batch,
        )
        for each in LAYERS
        if each in x
    }
    try:
        bank_images, query_images = held_out.knn_images()
    except DataError as error:
        notes.append(f"k-NN left out: {error}")
    else:
        (bank,), bank_labels = extract(encoder, bank_images, loading, what="bank", **only)
        (queries,), labels = extract(encoder, query_images, loading, what="queries", **only)
        for each, found in layers.items():
            found["knn"] = _knn(
                queries[each], labels, bank[each], bank_labels, quantities, loading.device
            )
    facts = {"checkpoint": name, **encoder.facts, "data": str(held_out.data)}
    return report({**facts, "seed": held_out.seed}, layers, len(images), quantities, notes)


def _views_for_lidar(
    encoder: ImageEncoder,
    images: Images,
    seed: int,
    loading: Loading,
    quantities: Quantities,
    layer: str | None,
) -> dict[str, Tensor]:
    """Unit features (n, views, C) of some images, evenly spread, by layer."""
    if not quantities.lidar_views:
        return {}
    found, _ = extract(
        encoder,
        _thinned(images, quantities.lidar_images),
        loading,
        seed=seed,
        what="LiDAR",
        views=quantities.lidar_views,
        unit=True,
        layer=layer,
    )
    return {name: torch.stack([view[name] for view in found], dim=1) for name in found[0]}


@kernels(deterministic=False)
def measure_features(
    path: str | os.PathLike,
    bank_path: str | os.PathLike | None,
    quantities: Quantities,
    device: torch.device,
    *,
    seed: int = 0,
) -> dict:
    """Measure the features in a file; rows are normalised, which a note says.

    Args:
        path: `features`, and perhaps `labels` and a second view.
        bank_path: features with labels to find the neighbours of k-NN among.

    Raises:
        DataError: a file that cannot be read, or features that cannot be measured.
    """
    notes: list[str] = []
    own = _read_unit_rows(path, notes)
    both = None
    if own.second_view is not None:
        both = torch.stack([own.features, own.second_view], dim=1)
    layer = measure_layer(own.features, own.second_view, both, quantities, device, str(path))
    if own.second_view is None:
        notes.append(f"alignment and LiDAR left out: {path} has no positives (other views)")
    if bank_path is None:
        notes.append("k-NN left out: give a bank with labels by --bank FILE")
    else:
        bank = _read_unit_rows(bank_path, notes)
        if bank.features.shape[1] != own.features.shape[1]:
            raise DataError(
                f"{bank_path} has features of {bank.features.shape[1]} dimensions, {path} of "
                f"{own.features.shape[1]}; take both from one layer of one encoder"
            )
        # -1 is what images without labels are written with.
        unlabelled = [
            str(file)
            for file, found in ((path, own.labels), (bank_path, bank.labels))
            if found is None or (found < 0).any()
        ]
        if unlabelled:
            notes.append(f"k-NN left out: no labels in {' and '.join(unlabelled)}")
        else:
            layer["knn"] = _knn(
                own.features, own.labels, bank.features, bank.labels, quantities, device
            )
    facts = {"features": str(path), "seed": seed}
    return report(facts, {"features": layer}, len(own.features), quantities, notes)


def _read_unit_rows(path: str | os.PathLike, notes: list[str]) -> FeatureSet:
    def unit(name: str, rows: Tensor) -> Tensor:
        rows, changed = unit_rows(rows, name, path)
        if changed:
            notes.append(f"{name} of {path} are not unit rows: normalised")
        return rows.float()

    found = read_features(path)
    second_view = found.second_view
    if second_view is not None:
        second_view = unit("positives", second_view)
    return replace(found, features=unit("features", found.features), second_view=second_view)


def measure_layer(
    x: Tensor,
    y: Tensor | None,
    views: Tensor | None,
    quantities: Quantities,
    device: torch.device,
    what: str,
    *,
    both_uniform: bool = False,
) -> dict:
    """All that needs no labels, of one layer.

    Args:
        x, y: (N, C) unit rows; without y no alignment.
        views: (n, views, C) unit features; without them no LiDAR.
        what: is measured, for errors.
        both_uniform: uniformity is the mean over x and y, else that of x.

    Raises:
        DataError: features that cannot be measured.
    """
    x, y, views = (None if rows is None else rows.to(device) for rows in (x, y, views))
    dim, ts = x.shape[1], quantities.ts
    second = y if both_uniform else None
    try:
        curve = uniformity_curve(x, ts)
        if second is not None:
            curve = [(a + b) / 2 for a, b in zip(curve, uniformity_curve(second, ts), strict=True)]
        alignments = {} if y is None else {f"{a:g}": alignment(x, y, a) for a in quantities.alphas}
        return {
            "dim": dim,
            "alignment": alignments or None,
            "uniformity": {f"{t:g}": value for t, value in zip(ts, curve, strict=True)},
            "uniformity_infimum": {f"{t:g}": uniformity_infimum(dim, t) for t in ts},
            "effective_rank": effective_rank(x),
            "deviation": dimension_deviation(x).mean().item() * dim**0.5,
            "alpha_req": alpha_req(x),
            "wasserstein_uniformity": wasserstein_uniformity(x),
            "lidar": None if views is None else lidar(views),
            "lidar_images": None if views is None else views.shape[0],
            "lidar_views": None if views is None else views.shape[1],
            "intervals": _intervals(x, y, views, quantities, second) or None,
            "knn": None,
        }
    except ValueError as error:
        raise DataError(f"features of {what} cannot be measured: {error}") from error


def _intervals(
    x: Tensor,
    y: Tensor | None,
    views: Tensor | None,
    quantities: Quantities,
    second: Tensor | None,
) -> dict[str, dict | list]:
    """95 % confidence intervals [low, high] over images, under the names of the values, if asked
    for."""
    if not quantities.intervals:
        return {}
    found: dict[str, dict | list] = {
        "uniformity": {
            f"{t:g}": list(uniformity_interval(x, t, second_view=second)) for t in quantities.ts
        },
        "effective_rank": list(jackknife_interval(effective_rank, x)),
        "wasserstein_uniformity": list(jackknife_interval(wasserstein_uniformity, x)),
    }
    if y is not None:
        found["alignment"] = {
            f"{alpha:g}": list(alignment_interval(x, y, alpha)) for alpha in quantities.alphas
        }
    if alpha_req(x) is not None:
        found["alpha_req"] = list(jackknife_interval(alpha_req, x))
    if views is not None:
        found["lidar"] = list(jackknife_interval(lidar, views))
    return found


def _knn(
    queries: Tensor,
    labels: Tensor,
    bank: Tensor,
    bank_labels: Tensor,
    quantities: Quantities,
    device: torch.device,
) -> dict:
    """Weighted k-NN accuracy in percent; labels are any whole numbers."""
    known, bank_classes = bank_labels.unique(return_inverse=True)
    position = torch.searchsorted(known, labels).clamp_(max=len(known) - 1)
    targets = torch.where(known[position] == labels, position, -1)  # -1 is never right
    top = min(5, len(known))
    ranked = knn_predict(
        queries.to(device),
        bank.to(device),
        bank_classes.to(device),
        classes=len(known),
        k=quantities.knn_k,
        temperature=quantities.knn_temperature,
    )
    correct = count_correct(ranked, targets.to(device), (1, top))
    top1, top5 = (100 * correct / len(labels)).tolist()
    return {
        "top1": top1,
        "top5": top5,
        "k": min(quantities.knn_k, len(bank)),
        "temperature": quantities.knn_temperature,
        "bank": len(bank),
        "queries": len(labels),
        "classes": len(known),
    }


def report(
    facts: dict, layers: dict[str, dict], images: int, quantities: Quantities, notes: list[str]
) -> dict:
    """The result. Its first lines are the two numbers of the paper, of the first layer, at
    alpha = 2 and t = 2 where these were measured."""
    name, first = next(iter(layers.items()))
    alpha, t = (
        f"{2 if 2 in given else given[0]:g}" for given in (quantities.alphas, quantities.ts)
    )
    return {
        **facts,
        "images": images,
        "layer": name,
        "alpha": float(alpha),
        "t": float(t),
        "alignment": first["alignment"] and first["alignment"][alpha],
        "uniformity": first["uniformity"][t],
        "uniformity_infimum": first["uniformity_infimum"][t],
        "layers": layers,
        "notes": notes,
    }
