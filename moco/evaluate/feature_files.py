"""Feature files: read and write features, labels and class names as `.npz` or `.safetensors`.

A file has the arrays

    features    (N, C) floating-point numbers
    features_2  (N, C), a second view of the same images; `positives` is another name for it
    labels      (N,) whole numbers, positions in `classes`; -1 for an image of no class
    paths       N names of the images
    classes     names of the classes in the order of their labels
    about       JSON: checkpoint, layer, views and image settings that the features come from

of which only `features` must be there. In `.npz` all of them are plain arrays, so that `np.load`
reads them and nothing is unpickled; in `.safetensors` the last three are JSON in the metadata.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from moco import checkpoint
from moco.errors import DataError
from moco.packages import import_optional

SUFFIXES = (".npz", ".safetensors")
_SECOND_VIEW = ("positives", "features_2")  # the first that a file has
_ARRAYS = ("features", *_SECOND_VIEW, "labels")
_TEXTS = ("paths", "classes", "about")
_UNIT_TOLERANCE = 1e-3


@dataclass
class FeatureSet:
    """What a file has: features (N, C) float32, or float64 where a file has that; labels (N,)
    int64, None where no image has one; names where they are known."""

    features: Tensor
    second_view: Tensor | None = None
    labels: Tensor | None = None
    classes: Sequence[str] = ()
    paths: Sequence[str] = ()
    about: dict = field(default_factory=dict)


def write_features(path: str | os.PathLike, content: FeatureSet) -> None:
    """Write a file whole or not at all, in the format that its name ends in.

    Raises:
        ValueError: a name that does not end in one of `SUFFIXES`.
    """
    path = Path(path)
    arrays = {"features": content.features, "labels": content.labels}
    if content.labels is None:
        arrays["labels"] = torch.full((len(content.features),), -1)
    if content.second_view is not None:
        arrays["features_2"] = content.second_view
    texts = {"paths": list(content.paths), "classes": list(content.classes), "about": content.about}
    if path.suffix == ".npz":
        whole = {name: rows.numpy() for name, rows in arrays.items()}
        for name in ("paths", "classes"):
            whole[name] = np.array(texts[name], dtype=np.str_)
        whole["about"] = np.array(json.dumps(texts["about"]))
        checkpoint.write_atomically(path, lambda file: np.savez(file, **whole))
    elif path.suffix == ".safetensors":
        save = import_optional("safetensors.torch", f"to write {path}").save
        data = save(arrays, {name: json.dumps(value) for name, value in texts.items()})
        checkpoint.write_atomically(path, lambda file: file.write(data))
    else:
        raise ValueError(f"a file of features must end in {' or '.join(SUFFIXES)}, got {path}")


def read_features(path: str | os.PathLike) -> FeatureSet:
    """The content of a file of features, checked; whatever its name, `.safetensors` or else `.npz`.

    Raises:
        DataError: the file cannot be read, or its arrays are no features and labels. The message
            names the file, and the row where one is bad.
    """
    path = Path(path)
    read = _read_safetensors if path.suffix.lower() == ".safetensors" else _read_npz
    try:
        arrays, texts = read(path)
    except DataError:  # a package is missing
        raise
    except FileNotFoundError:
        raise DataError(f"no such file of features: {path}") from None
    except Exception as error:  # a damaged file can make the readers fail in any way
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise DataError(
            f"{path} cannot be read as an .npz or .safetensors file of plain arrays: {reason}"
        ) from error
    if "features" not in arrays:
        raise DataError(f"{path} has no array `features`")
    features = _checked_rows(arrays["features"], "features", path)
    second_view, name = None, next((name for name in _SECOND_VIEW if name in arrays), None)
    if name is not None:
        second_view = _checked_rows(arrays[name], name, path)
        if second_view.shape != features.shape:
            raise DataError(
                f"{path}: {name} must pair up with features row by row, got shapes "
                f"{tuple(second_view.shape)} and {tuple(features.shape)}"
            )
    return FeatureSet(features, second_view, _checked_labels(arrays, len(features), path), **texts)


def unit_rows(rows: Tensor, name: str, path: str | os.PathLike) -> tuple[Tensor, bool]:
    """Rows of a file's array `name`, divided by their length.

    Returns:
        (rows, changed): `changed` where a length was off by more than 1e-3.

    Raises:
        DataError: a row is zero.
    """
    lengths = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
    if not lengths.all():
        row = int((lengths == 0).nonzero()[0])
        raise DataError(f"{path}: row {row} of {name} is zero and has no direction")
    changed = (lengths - 1).abs().max().item() > _UNIT_TOLERANCE
    return rows / lengths.to(rows.dtype)[:, None], changed


def _read_npz(path: Path) -> tuple[dict[str, Tensor], dict]:
    found = np.load(path, allow_pickle=False)
    if not isinstance(found, np.lib.npyio.NpzFile):
        raise ValueError("it holds a single array; save them by name with np.savez")
    with found:
        arrays = {name: _tensor(found[name]) for name in _ARRAYS if name in found}
        texts = {name: found[name].tolist() for name in _TEXTS if _is_text(found, name)}
        if "about" in texts:
            texts["about"] = json.loads(found["about"].item())
        return arrays, texts


def _is_text(found: np.lib.npyio.NpzFile, name: str) -> bool:
    """Names as pickled objects, which others' files may have, are passed over."""
    try:
        return name in found and found[name].dtype.kind == "U"
    except ValueError:
        return False


def _tensor(array: np.ndarray) -> Tensor:
    """Torch has neither the other byte order nor long doubles."""
    if array.dtype.kind == "f" and array.dtype.itemsize > 8:
        array = array.astype(np.float64)
    return torch.from_numpy(np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("=")))


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict]:
    safetensors = import_optional("safetensors", f"to read {path}")
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        arrays = {name: file.get_tensor(name) for name in _ARRAYS if name in file.keys()}
        return arrays, {name: json.loads(metadata[name]) for name in _TEXTS if name in metadata}


def _checked_rows(rows: Tensor, name: str, path: Path) -> Tensor:
    if rows.dim() != 2 or not rows.is_floating_point() or not rows.numel():
        kind = str(rows.dtype).removeprefix("torch.")
        raise DataError(
            f"{path}: {name} must be (N, C) floating-point numbers, N and C at least 1, got {kind} "
            f"of shape {tuple(rows.shape)}"
        )
    bad = (~rows.isfinite().all(dim=1)).nonzero()
    if len(bad):
        raise DataError(
            f"{path}: {name} has NaN or infinite values in {len(bad)} of {len(rows)} rows, first "
            f"in row {int(bad[0])}"
        )
    return rows if rows.dtype == torch.float64 else rows.float()


def _checked_labels(arrays: dict[str, Tensor], count: int, path: Path) -> Tensor | None:
    labels = arrays.get("labels")
    if labels is None:
        return None
    if labels.shape != (count,) or labels.is_floating_point() or labels.is_complex():
        kind = str(labels.dtype).removeprefix("torch.")
        raise DataError(
            f"{path}: labels must be {count} whole numbers, got {kind} of shape "
            f"{tuple(labels.shape)}"
        )
    labels = labels.long()
    return labels if (labels >= 0).any() else None
