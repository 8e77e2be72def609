"""Read the results of evaluations: lincls.json of main_lincls.py and the JSON files of
measure_align_uniform.py, each as named figures of one encoder."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

from moco.run_files import ARGS, DEPTH_RESULT, LINCLS_RESULT

Protocol = tuple[tuple[str, str], ...]  # all that a figure depends on but the seed: (name, value)
KNN = "k-NN top-1"
PLACE = ("alignment", "uniformity")
SENTIMENT = ("MR", "CR")
# Numbers of a measurement that need no labels, beside alignment and uniformity: name -> key.
SPECTRAL = {
    "Wasserstein uniformity": "wasserstein_uniformity",
    "effective rank": "effective_rank",
    "alpha-ReQ": "alpha_req",
    "LiDAR": "lidar",
}
LOGGED = ("logged while training", "")  # in the protocol of a figure that nobody has evaluated
LOWER = "(lower is better)"  # at the end of the names of figures of which it is so
_LARGEST_NUMBER = 10**100  # squares, and sums of them, are still floats
_LARGEST_MEASURE = 2**20  # bytes; a larger file is no result of a measurement


class Unusable(Exception):
    """Why a folder or file is left out of a comparison."""


def number(value: object) -> float | None:
    """A number as such, anything else as None: NaN too, and what is too large to be a result."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if abs(value) < _LARGEST_NUMBER else None


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def is_path(text: object) -> bool:
    return isinstance(text, str) and bool(text) and "\0" not in text


def read_json(path: Path) -> dict:
    """The object in a small JSON file.

    Raises:
        Unusable: no such file, it is damaged, or it holds something else.
    """
    if not os.path.isfile(path):
        raise Unusable(f"has no {path.name}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise Unusable(f"{path.name} cannot be read: {one_line(error)}") from None
    if not isinstance(content, dict):
        raise Unusable(f"{path.name} holds a {type(content).__name__}, expected an object")
    return content


def read_evaluation(folder: Path) -> dict:
    """lincls.json or depth.json of a folder, with "figures": triples of name, value (None where it
    has none) and protocol.

    Raises:
        Unusable: it is missing, damaged or not to be compared.
    """
    if os.path.exists(folder / DEPTH_RESULT):
        return _read_depth(folder)
    if not os.path.exists(folder / LINCLS_RESULT):
        raise Unusable(f"is an unfinished linear evaluation: it has no {LINCLS_RESULT}")
    content = read_json(folder / LINCLS_RESULT)
    if not is_path(content.get("checkpoint")) or "arch" not in content:
        raise Unusable(f"{LINCLS_RESULT} names no checkpoint: it is of another version")
    names = ("knn", "nearest", "last", "best")
    parts = {n: content[n] for n in names if isinstance(content.get(n), dict)}
    if not parts:
        raise Unusable("evaluates a saved classifier (-e): it adds nothing to its probe's folder")
    amp, figures = _precision(folder, _dict(content.get("protocol"))), []
    try:
        if knn := parts.pop("knn", None):
            figures.append((KNN, number(knn.get("top1")), _protocol({**knn, "amp": amp})))
        if nearest := parts.pop("nearest", None):
            figures += _nearest_figures({**nearest, "amp": amp})
        figures += _classifier_figures(content, parts, amp)
    except RecursionError:
        raise Unusable(f"{LINCLS_RESULT} is nested too deeply") from None
    return {**content, "figures": figures}


def _read_depth(folder: Path) -> dict:
    """ "conv5 depth MSE (lower is better)", a share of the training depth's variance."""
    content = read_json(folder / DEPTH_RESULT)
    if not is_path(content.get("checkpoint")) or not isinstance(content.get("layer"), str):
        raise Unusable(f"{DEPTH_RESULT} names no checkpoint or layer: it is of another version")
    protocol = {n: v for n, v in _dict(content.get("protocol")).items() if n != "folds"}
    name, folds = f"{content['layer']} depth MSE", _dict(content.get("folds"))
    figures = [(f"{name} {LOWER}", number(content.get("mse")), _protocol(protocol))]
    if folds:
        protocol["folds"] = folds.get("count")
        figures.append((f"{name} folds {LOWER}", number(folds.get("mean")), _protocol(protocol)))
    return {**content, "figures": figures}


def _dict(value: object) -> dict:
    return value if isinstance(value, dict) else {}


def _precision(folder: Path, protocol: dict) -> str:
    """In what the encoder computed: older files have it among the arguments only."""
    try:
        args = read_json(folder / ARGS)
    except Unusable:
        args = {}
    found = protocol.get("amp", args.get("amp"))
    if isinstance(found, str):
        return found
    return "off" if args.get("device") == "cpu" else "unknown"


def _nearest_figures(nearest: dict) -> list[tuple]:
    """Of --protocol stl10: "fc7 + 5-NN", and "fc7 + 5-NN folds"."""
    name, folds = f"{nearest.get('layer')} + {nearest.get('k')}-NN", _dict(nearest.get("folds"))
    figures = [(name, number(nearest.get("top1")), _protocol({**nearest, "folds": None}))]
    if folds:
        protocol = _protocol({**nearest, "images": None, "folds": folds.get("count")})
        figures.append((f"{name} folds", number(folds.get("mean")), protocol))
    return figures


def _classifier_figures(content: dict, parts: dict[str, dict], amp: str) -> list[tuple]:
    """Of trained classifiers. The name tells what kind of evaluation it was, so that no two kinds
    are taken for one: "linear last", "cached last, 4 views", "fine-tune best, 10 % of labels"."""
    protocol = {**_dict(content.get("protocol")), "amp": amp}
    kind = content.get("evaluation", "standard")
    kind = {"standard": "linear", "finetune": "fine-tune"}.get(str(kind), str(kind))
    words = []
    if kind == "stl10":  # of which the last epoch counts
        kind, parts = f"{content.get('layer')} + linear", {"last": parts["last"]}
        words = ["cached"] if protocol.get("cached") else []
    if protocol.get("cached_views"):
        words.append(f"{protocol['cached_views']} views")
    if "labels" in content:
        labels = _dict(content["labels"]).get("of")
        share = number(labels)  # drawn by a seed; else a list of files
        if share is None:
            words.append(f"labels of {Path(str(labels)).name}")
        else:
            words.append(f"{share:g} % of labels")
            protocol.pop("labels_digest", None)
    if protocol.get("images_per_class"):
        words.append(f"{protocol['images_per_class']} images per class")
    if amp not in ("off", "unknown"):
        words.append(amp)
    folds = _dict(content.get("folds"))
    chosen = [f"chosen by {folds.get('count')} folds"] if folds else []
    if not folds and isinstance(content.get("heads"), list):
        chosen = [f"best of {len(content['heads'])} settings"]
    figures = [
        (f"{kind} {part}", number(found.get("top1")), [*words, *chosen])
        for part, found in parts.items()
        if part == "last" or not folds  # with folds only the last epoch is evaluated
    ]
    if folds:
        protocol["folds"] = folds.get("count")
        figures.append((f"{kind} folds", best_fold_mean(folds), words))
    return [(", ".join([n, *words]), value, _protocol(protocol)) for n, value, words in figures]


def _nested(value: object) -> bool:
    return isinstance(value, (dict, list))


def _protocol(settings: dict) -> Protocol:
    """The settings of an evaluation that its result lists, without the result and the seed."""
    names = sorted(settings.keys() - {"seed", "top1", "top5"})
    return tuple((name, str(settings[name])) for name in names if settings[name] is not None)


def best_fold_mean(folds: dict) -> float | None:
    """Top-1 (%) on held-out folds of the training set (--folds), of the setting that was chosen."""
    settings = folds.get("settings")
    rows = settings if isinstance(settings, list) else []
    means = [number(row.get("mean")) for row in rows if isinstance(row, dict)]
    return max((value for value in means if value is not None), default=None)


def read_measure(path: Path) -> dict | None:
    """Alignment and uniformity of the projection (or of sentences) at alpha 2 and t 2, the other
    numbers that need no labels, or MR and CR, as "figures", and the "checkpoint"; None for a file
    that is no result of measure_align_uniform.py or evaluate_sentences.py."""
    try:
        if path.stat().st_size > _LARGEST_MEASURE:
            return None
        content = read_json(path)
    except (Unusable, OSError):
        return None
    if not is_path(content.get("checkpoint")):
        return None
    about = {n: content[n] for n in ("checkpoint", "pretrained_epochs") if n in content}
    if isinstance(content.get("sentiment"), dict):
        return {**about, "figures": list(_sentiment_figures(content["sentiment"]))}
    layers = content.get("layers")
    on = {name: content.get(name) for name in ("images", "data") if not _nested(content.get(name))}
    if isinstance(on.get("data"), str):
        on["data"] = Path(on["data"]).name  # the folder is elsewhere on another machine
    figures = []
    for name, parameter in zip(PLACE, ("alpha", "t"), strict=True):
        if isinstance(layers, dict):  # by layer, then by alpha or t
            values = _dict(layers.get("projection", layers.get("sentences")))
            value = _dict(values.get(name)).get("2")
        else:
            at_2 = content.get("layer") == "projection" and content.get(parameter) == 2
            value = content.get(name) if at_2 else None
        figures.append((name, number(value), _protocol(on)))
    projection = _dict(_dict(layers).get("projection"))
    for name, key in SPECTRAL.items():
        drawn = ("lidar_images", "lidar_views") if key == "lidar" else ()
        protocol = _protocol({**on, **{each: projection.get(each) for each in drawn}})
        if number(projection.get(key)) is not None:
            figures.append((name, number(projection[key]), protocol))
    return {**about, "figures": figures}


def _sentiment_figures(sentiment: dict) -> Iterator[tuple]:
    """ "MR" and "CR" on the validation split, "MR folds" by which C was chosen, "MR
    cross-validated" on folds of the rest, "MR nested" on folds of all."""
    for name, found in sentiment.items():
        if name in SENTIMENT and isinstance(found, dict):
            protocol = _protocol({"of": found.get("of")})
            yield name, number(found.get("accuracy")), protocol
            yield f"{name} folds", number(found.get("folds_mean")), protocol
            rest, nested = _dict(found.get("cross_validated")), _dict(found.get("nested"))
            in_folds = _protocol({"of": found.get("of"), "folds": rest.get("folds")})
            yield f"{name} cross-validated", number(rest.get("accuracy")), in_folds
            yield f"{name} nested", number(nested.get("accuracy")), protocol
