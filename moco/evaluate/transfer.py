"""Which encoder transfers: features of labelled data sets once, then logistic regression, k-NN and
few shots of each class, encoders side by side on the same images.

Rows are divided by their length; for logistic regression their mean over the training images is
taken off, and what is left is divided by its root mean square length. Everything is a function of
the features and the seed. Differences between two encoders are tested on the test images that one
of them gets right and the other wrong (McNemar's exact test).
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from moco.data.labelled import open_labelled
from moco.errors import DataError
from moco.evaluate import logistic
from moco.evaluate.extraction import ImageEncoder, Loading, extract, load_image_encoder
from moco.evaluate.knn import knn_predict
from moco.packages import import_optional
from moco.precision import kernels

SHOTS = (1, 2, 4, 8, 16)
SHOT_PENALTY = 1e-4  # weak: there are no images to choose it by
TESTED = ("logistic", "knn")
MCNEMAR = "McNemar's test"


@dataclass(frozen=True)
class Protocol:
    """What is evaluated.

    Attributes:
        shots: numbers of images of each class to learn from.
        draws: how often these are drawn; the same images for all encoders.
        folds: of the training set, to choose the penalty of the logistic regression.
        knn_k, knn_temperature: of the weighted k-NN vote.
        seed: of folds and draws.
    """

    shots: Sequence[int] = SHOTS
    draws: int = 5
    folds: int = 3
    knn_k: int = 20
    knn_temperature: float = 0.07
    seed: int = 0


@dataclass
class Split:
    """Features (N, C), unit rows, and labels of a data set under one encoder, on the device."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor

    @property
    def classes(self) -> int:
        return int(self.train_labels.max()) + 1


def open_encoder(spec: str, image_size: int | None = None) -> ImageEncoder:
    """The backbone in a file: whatever `load_encoder` reads, or "timm:NAME=FILE" for the weights of
    that timm model; for images of its own size, where no other is given.

    Raises:
        CheckpointError, DataError: as `load_image_encoder`.
    """
    name, equals, path = spec.removeprefix("timm:").partition("=")
    if not spec.startswith("timm:"):
        return load_image_encoder(spec, layer="backbone", image_size=image_size)
    if not equals:
        raise DataError(f"expected timm:NAME=FILE, got {spec}; nothing is downloaded")
    return load_image_encoder(path, layer="backbone", timm=name, image_size=image_size)


@kernels(deterministic=False)
def transfer(
    encoders: Sequence[str],
    names: Sequence[str],
    root: str | Path,
    loading: Loading,
    protocol: Protocol,
    *,
    image_size: int | None = None,
) -> dict:
    """Evaluate encoders on data sets.

    Args:
        encoders: as `open_encoder` takes them.
        names, root: of data sets, as `open_labelled` takes them.
        image_size: for all encoders; None for each one's own.

    Returns:
        As JSON has it: {"protocol", "encoders", "data": [{"name", "train", "test", "classes",
        "results": {encoder: {"logistic", "knn", "shots"}}, "tests": [...]}]}. Accuracies are in
        percent.

    Raises:
        CheckpointError, DataError: an encoder or a data set that cannot be used; all of them are
            opened before any work starts.
    """
    import_optional("scipy.stats", MCNEMAR)
    opened = [(name, *open_labelled(name, root)) for name in names]
    models = {spec: open_encoder(spec, image_size) for spec in encoders}
    found = [_on_data_set(*one, models, loading, protocol) for one in opened]
    return {
        "protocol": {
            **protocol.__dict__,
            "shots": list(protocol.shots),
            "shot_penalty": SHOT_PENALTY,
        },
        "encoders": {
            spec: {**model.facts, "image_size": model.image_size} for spec, model in models.items()
        },
        "data": found,
    }


def _on_data_set(
    name: str,
    train: object,
    test: object,
    models: dict[str, ImageEncoder],
    loading: Loading,
    protocol: Protocol,
) -> dict:
    results, right = {}, {}
    for spec, model in models.items():
        split = _features(model, train, test, loading, f"{name}, {Path(spec).name}")
        results[spec], right[spec] = evaluate(split, protocol)
    tests = [
        {"first": a, "second": b, "protocol": each, **mcnemar(right[a][each], right[b][each])}
        for a, b in itertools.combinations(models, 2)
        for each in TESTED
    ]
    return {
        "name": name,
        "train": len(train),
        "test": len(test),
        "classes": split.classes,
        "results": results,
        "tests": tests,
    }


def _features(
    model: ImageEncoder, train: object, test: object, loading: Loading, what: str
) -> Split:
    found = []
    for images, part, kind in ((train, "train", "training"), (test, "test", "test")):
        (rows,), labels = extract(model, images, loading, layer="backbone", what=f"{what}, {part}")
        if not rows["backbone"].isfinite().all():
            raise DataError(f"{what}: features of {kind} images are not finite")
        found += [rows["backbone"].to(loading.device), labels.to(loading.device)]
    model.module.cpu()
    return Split(*found)


def evaluate(split: Split, protocol: Protocol) -> tuple[dict, dict[str, Tensor]]:
    """One encoder on one data set.

    Returns:
        (results, {"logistic", "knn": (M,) bool, which test images are right}).
    """
    centre = split.train.mean(dim=0)
    x, queries, truth = split.train - centre, split.test - centre, split.test_labels
    # Else a penalty would weigh more on features that keep to a narrow cone.
    scale = x.square().sum(dim=1).mean().sqrt().clamp(min=1e-12)
    x, queries = x / scale, queries / scale
    classifier, by_penalty = logistic.fit_chosen(
        x, split.train_labels, split.classes, folds=protocol.folds, seed=protocol.seed
    )
    ranked = knn_predict(
        split.test,
        split.train,
        split.train_labels,
        classes=split.classes,
        k=protocol.knn_k,
        temperature=protocol.knn_temperature,
    )
    right = {"logistic": classifier.predict(queries) == truth, "knn": ranked[:, 0] == truth}
    results = {
        each: {**accuracy(hits), "per_class": mean_per_class(hits, truth)}
        for each, hits in right.items()
    }
    results["logistic"] |= {
        "penalty": classifier.penalty,
        "folds": {f"{penalty:g}": value for penalty, value in by_penalty.items()},
    }
    results["shots"] = {}
    for n in protocol.shots:
        draws = [shots(split.train_labels, n, protocol.seed + i) for i in range(protocol.draws)]
        if draws[0] is None:
            continue  # a class has fewer images
        scores = []
        for drawn in draws:
            labels = split.train_labels[drawn]
            found = logistic.fit(x[drawn], labels, split.classes, SHOT_PENALTY)
            scores.append(accuracy(found.predict(queries) == truth)["top1"])
        spread = statistics.stdev(scores) if len(scores) > 1 else None
        results["shots"][str(n)] = {"mean": statistics.fmean(scores), "sd": spread, "of": scores}
    return results, {each: hits.cpu() for each, hits in right.items()}


def shots(labels: Tensor, n: int, seed: int) -> Tensor | None:
    """Positions of n images of each class; None where a class has fewer."""
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    for label in labels.cpu().unique():
        own = (labels.cpu() == label).nonzero().squeeze(1)
        if len(own) < n:
            return None
        chosen.append(own[torch.randperm(len(own), generator=generator)[:n]])
    return torch.cat(chosen).to(labels.device)


def accuracy(right: Tensor) -> dict:
    """Percent of the test images, with Wilson's 95 % interval over them."""
    n, z = len(right), 1.959964
    p = right.double().mean().item()
    middle = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    reach = z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
    return {"top1": 100 * p, "interval": [100 * (middle - reach), 100 * (middle + reach)]}


def mean_per_class(right: Tensor, labels: Tensor) -> float:
    """Percent, the mean over classes: what is published for data sets with uneven classes."""
    return 100 * statistics.fmean(
        right[labels == label].double().mean().item() for label in labels.unique()
    )


def mcnemar(first: Tensor, second: Tensor) -> dict:
    """Difference in percent (first - second), and the two-sided p of McNemar's exact test: of n
    images that only one gets right, as many belong to one as to the other."""
    only_first = (first & ~second).sum().item()
    only_second = (second & ~first).sum().item()
    n = only_first + only_second
    stats = import_optional("scipy.stats", MCNEMAR)
    p = stats.binomtest(only_first, n).pvalue if n else 1.0
    return {"difference": 100 * (only_first - only_second) / len(first), "p": float(p)}


def table(found: dict) -> str:
    """A row for each data set and encoder; p is against the first one, by logistic regression."""
    shown = list(
        dict.fromkeys(
            n for one in found["data"] for r in one["results"].values() for n in r["shots"]
        )
    )
    rows = [["data", "encoder", "logistic", "p", "k-NN", *(f"{n}-shot" for n in shown)]]
    for one in found["data"]:
        p = {
            t["second"]: t["p"]
            for t in one["tests"]
            if t["protocol"] == "logistic" and t["first"] == next(iter(found["encoders"]))
        }
        for spec, result in one["results"].items():
            low, high = result["logistic"]["interval"]
            cells = [f"{result['logistic']['top1']:.2f} [{low:.1f}, {high:.1f}]"]
            cells += [f"{p[spec]:.2g}" if spec in p else "-", f"{result['knn']['top1']:.2f}"]
            for n in shown:
                shot = result["shots"].get(n)
                spread = f" ± {shot['sd']:.1f}" if shot and shot["sd"] is not None else ""
                cells.append(f"{shot['mean']:.1f}{spread}" if shot else "-")
            rows.append([one["name"], spec, *cells])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
