"""Read the results of evaluations: lincls.json of main_lincls.py and the JSON files of
measure_align_uniform.py, each as named figures of one encoder."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

from moco.run_files import LINCLS_RESULT

Protocol = tuple[tuple[str, str], ...]  # all that a figure depends on but the seed: (name, value)
KNN = "k-NN top-1"
LOGGED = ("logged while training", "")  # in the protocol of a figure that nobody has evaluated
_LARGEST_MEASURE = 2**20  # bytes; a larger file is no result of a measurement


class Unusable(Exception):
    """Why a folder or file is left out of a comparison."""


def number(value: object) -> float | None:
    """A finite number as such, anything else as None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # of a whole number that no float can hold
        return None


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
    """lincls.json of a folder, with "figures": triples of name, value (None where it has none) and
    protocol.

    Raises:
        Unusable: it is missing, damaged or not to be compared.
    """
    if not os.path.exists(folder / LINCLS_RESULT):
        raise Unusable(f"is an unfinished linear evaluation: it has no {LINCLS_RESULT}")
    content = read_json(folder / LINCLS_RESULT)
    if not is_path(content.get("checkpoint")) or "arch" not in content:
        raise Unusable(f"{LINCLS_RESULT} names no checkpoint: it is of another version")
    if content.get("evaluation") == "finetune" or "labels" in content:
        kind = "fine-tuning" if "evaluation" in content else "training with part of the labels"
        raise Unusable(f"is {kind}: compared are linear evaluations with all labels")
    parts = {n: content[n] for n in ("knn", "last", "best") if isinstance(content.get(n), dict)}
    if not parts:
        raise Unusable("evaluates a saved classifier (-e): it adds nothing to its probe's folder")
    trained, knn = protocol_of(content.get("protocol")), protocol_of(content.get("knn"))
    names = {"knn": (KNN, knn), "last": ("linear last", trained), "best": ("linear best", trained)}
    figures = []
    for part, found in parts.items():
        name, protocol = names[part]
        figures.append((name, number(found.get("top1")), protocol))
    figures.append(("linear folds", best_fold_mean(content), trained))
    return {**content, "figures": figures}


def protocol_of(settings: object) -> Protocol:
    """The settings of an evaluation that its result lists, without the result and the seed."""
    if not isinstance(settings, dict):
        return ()
    names = sorted(settings.keys() - {"seed", "top1", "top5"})
    try:
        return tuple((name, str(settings[name])) for name in names)
    except RecursionError:
        raise Unusable(f"{LINCLS_RESULT} is nested too deeply") from None


def best_fold_mean(content: dict) -> float | None:
    """Top-1 (%) on held-out folds of the training set (--folds), of the setting that was chosen."""
    folds = content.get("folds")
    settings = folds.get("settings") if isinstance(folds, dict) else None
    rows = [row for row in settings if isinstance(row, dict)] if isinstance(settings, list) else []
    means = [number(row.get("mean")) for row in rows]
    return max((value for value in means if value is not None), default=None)


def read_measure(path: Path) -> dict | None:
    """Alignment and uniformity of the projection at alpha 2 and t 2, as "figures", and the
    "checkpoint"; None for a file that is no result of measure_align_uniform.py."""
    try:
        if path.stat().st_size > _LARGEST_MEASURE:
            return None
        content = read_json(path)
    except (Unusable, OSError):
        return None
    if not is_path(content.get("checkpoint")):
        return None
    layers = content.get("layers")
    figures = []
    for name, parameter in (("alignment", "alpha"), ("uniformity", "t")):
        if isinstance(layers, dict):  # by layer, then by alpha or t
            values = layers.get("projection")
            values = values.get(name) if isinstance(values, dict) else None
            value = values.get("2") if isinstance(values, dict) else None
        else:
            at_2 = content.get("layer") == "projection" and content.get(parameter) == 2
            value = content.get(name) if at_2 else None
        figures.append((name, number(value), ()))
    return {"checkpoint": content["checkpoint"], "figures": figures}
