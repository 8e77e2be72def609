"""NYU-Depth-V2: images with depth, as a folder of files or as the published .mat file.

The folder has images/0000.jpg ..., depths/0000.png ..., train.txt and val.txt (names without
suffix, one a line) and perhaps depth.json ({"unit": "mm"}). The published file is
nyu_depth_v2_labeled.mat (HDF5: needs h5py), with the official split beside it in splits.mat.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from moco.data.file_list import Names
from moco.data.folders import LeftOut, is_image
from moco.data.images import ArrayImages, FolderImages, Images
from moco.errors import DataError
from moco.packages import import_optional

MAT, SPLITS = "nyu_depth_v2_labeled.mat", "splits.mat"
# Metres of one step of a depth file; "8bit" is round(metres * 25.5), up to 10 m.
UNITS = {"mm": 0.001, "cm": 0.01, "m": 1.0, "8bit": 1 / 25.5}


@dataclass
class DepthImages:
    """Images with their depth.

    Attributes:
        images: RGB, without labels.
        names: of each.
        depth: index -> (H, W) float32 metres, 0 where it is unknown.
    """

    images: Images
    names: list[str]
    depth: Callable[[int], np.ndarray]

    def __len__(self) -> int:
        return len(self.names)


class _Files(FolderImages):
    """Image files in a given order, without labels."""

    def __init__(self, root: Path, paths: list[Path]) -> None:
        self.root = root
        self.paths = Names(
            [[str(path.relative_to(root)) for path in paths]], prefix=os.path.join(root, "")
        )
        self.left_out = LeftOut(root)
        self.targets, self.classes = None, []


def open_nyu(root: str | Path, split: str, unit: str | None = None) -> DepthImages:
    """The training or validation images of NYU-Depth-V2.

    Args:
        root: the folder.
        split: "train" or "val".
        unit: of depth files: a name in `UNITS`, or metres of one step; None for that of
            depth.json, else millimetres of 16-bit files (8-bit ones need it).

    Raises:
        DataError: files that are missing, or do not belong together; a unit that is not known. The
            pixels of depth are looked at when they are read.
    """
    root = Path(root)
    if (root / MAT).is_file():
        return _open_mat(root, split)
    images, depths = (_by_name(root / kind) for kind in ("images", "depths"))
    for kind, here, there in (("depth", images, depths), ("image", depths, images)):
        alone = sorted(here.keys() - there.keys())
        if alone:
            raise DataError(
                f"{root}: {len(alone)} of {len(here)} files have no {kind} of their name: "
                f"{', '.join(alone[:3])}{', ...' if len(alone) > 3 else ''}"
            )
    splits = {name: _names_of(root / f"{name}.txt", images) for name in ("train", "val")}
    both = sorted(set(splits["train"]) & set(splits["val"]))
    if both:
        raise DataError(
            f"{root}: {len(both)} images are in train.txt and in val.txt: {', '.join(both[:3])}"
        )
    scale = depth_scale(root, unit)
    names = splits[split]
    return DepthImages(
        _Files(root, [images[name] for name in names]),
        names,
        lambda index: read_depth(depths[names[index]], scale),
    )


def _by_name(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise DataError(
            f"no folder {folder}: expected images/, depths/, train.txt and val.txt, or {MAT}"
        )
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if is_image(path.name):
            first = found.setdefault(path.stem, path)
            if first != path:
                raise DataError(
                    f"{folder} has {first.name} and {path.name}: expected one file of a name"
                )
    return found


def _names_of(path: Path, images: dict[str, Path]) -> list[str]:
    try:
        names = path.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}; expected one image name a line") from None
    unknown = [name for name in names if name not in images]
    if unknown or not names:
        named = f"names {unknown[0]}, which is not there" if unknown else "names no image"
        raise DataError(f"{path} {named}; expected names as {next(iter(images), '0000')}")
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise DataError(
            f"{path} names {len(twice)} images more than once: {', '.join(twice[:3])}; each would "
            "count as several"
        )
    return names


def depth_scale(root: Path, unit: str | None) -> float | None:
    """Metres of one step; None where nothing says it.

    Raises:
        DataError: no such unit.
    """
    file = root / "depth.json"
    if unit is None and file.is_file():
        try:
            unit = str(json.loads(file.read_text(encoding="utf-8"))["unit"])
        except (ValueError, KeyError, TypeError):
            raise DataError(f'{file} names no unit; expected {{"unit": "mm"}}') from None
    if unit is None or unit in UNITS:
        return UNITS.get(unit)
    try:
        scale = float(unit)
    except ValueError:
        scale = 0.0
    if not 0 < scale < float("inf"):
        raise DataError(
            f"depth unit {unit!r}: expected {', '.join(UNITS)}, or metres of one step as a number"
        )
    return scale


def read_depth(path: Path, scale: float | None) -> np.ndarray:
    """(H, W) float32 metres of a depth file; 0 where it is 0.

    Raises:
        DataError: it cannot be read, or is of 8 bit and no unit is known.
    """
    try:
        with Image.open(path) as image:
            deep = image.mode.startswith("I")
            if not deep and image.mode != "L":
                raise DataError(f"it has colours (mode {image.mode}), expected 8 or 16 bit of grey")
            steps = np.asarray(image)
    except (OSError, ValueError, DataError, SyntaxError) as error:
        raise DataError(f"cannot read depth {path}: {error}") from None
    if deep and scale == UNITS["8bit"]:
        raise DataError(
            f"{path} is of 16 bit, and its unit is given as 8bit: give that of its steps"
        )
    if scale is None and not deep:
        raise DataError(
            f"{path} is of 8 bit, whose unit is not defined: give --depth-unit 8bit for "
            "round(metres * 25.5), or metres of one step"
        )
    return steps.astype(np.float32) * np.float32(UNITS["mm"] if scale is None else scale)


def _open_mat(root: Path, split: str) -> DepthImages:
    """The published file. Depth is in metres there; axes are MATLAB's, the other way round."""
    h5py = import_optional("h5py", MAT)
    loadmat = import_optional("scipy.io", SPLITS).loadmat
    try:
        table = loadmat(root / SPLITS)
        numbers = table[{"train": "trainNdxs", "val": "testNdxs"}[split]].reshape(-1).tolist()
        indices = [int(number) - 1 for number in numbers]
        with h5py.File(root / MAT, "r") as file:
            array = np.stack([file["images"][i].transpose(2, 1, 0) for i in indices])
            depths = np.stack([file["depths"][i].T for i in indices]).astype(np.float32)
    except (OSError, KeyError, ValueError, IndexError) as error:
        raise DataError(
            f"cannot read {MAT} and {SPLITS} in {root}: {error}; expected images and depths, "
            "trainNdxs and testNdxs"
        ) from None
    images = ArrayImages(array, [-1] * len(array), [])
    return DepthImages(images, [f"{i:04d}" for i in indices], depths.__getitem__)
