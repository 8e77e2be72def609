"""Audit of a data set before a long run: each image decoded as training does, each class folder.

`audit` finds files that training refuses, files that it reads with a decision that one should know
of (CMYK, greyscale, EXIF rotation, exact copies, ...), and class folders that do not fit.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import BinaryIO

from PIL import ExifTags, Image
from tqdm import tqdm

from moco.data.folders import (
    FILES,
    IMG_EXTENSIONS,
    LeftOut,
    data_folder,
    folders_below,
    image_paths,
    is_image,
    is_tool_made,
)
from moco.data.images import open_images
from moco.data.rgb import MAX_PIXELS, load_rgb, rgb_of
from moco.data.shards import shard_paths
from moco.errors import DataError
from moco.printable import printable
from moco.run_files import sha256

# What training does with files of each kind. It stops at the first group, or replaces the image
# (--skip-bad-images).
REFUSED = {
    "empty": "refused: the file has no bytes",
    "truncated": "refused: the end of the file is missing",
    "unreadable": "refused: damaged, or no image",
    "too large": f"refused before it is decoded: more than {MAX_PIXELS / 1e6:.0f} million pixels",
    "32-bit": "refused: what is black and white in 32-bit pixels is not defined",
    "missing": "refused: a link to nowhere, a pipe or a device",
    "kills its reader": "training would end: the process that decodes it dies (memory, or a crash)",
}
READ = {
    "large": "read, slowly: half of what is refused or more",
    "CMYK": "converted to RGB without its colour profile",
    "greyscale": "the one channel three times",
    "black and white": "0 and 255 in three channels",
    "16-bit": "the high byte of each value",
    "palette": "the colours of its palette",
    "transparency": "dropped; what lies under transparent pixels is seen",
    "other colours": "converted to RGB (YCbCr, HSV, ...)",
    "animated": "the first frame or page",
    "EXIF-rotated": "not rotated: seen as it is stored",
    "wrong extension": "read as what it is, whatever its name says",
    "exact copy": "an image like any other: the same bytes as another one have",
}
CLASSES = {
    "class without images": "not a class: classes are numbered without it",
    "class of val not in train": "refused by linear evaluation",
    "class of train not in val": "trained, never validated",
    "image outside the class folders": "refused by linear evaluation; pretraining reads it",
}
GROUPS = {"training refuses": REFUSED, "training reads": READ, "class folders": CLASSES}
STOPS = {*REFUSED, "class of val not in train", "image outside the class folders"}
_MODES = {
    "1": ["black and white"],
    "L": ["greyscale"],
    "LA": ["greyscale", "transparency"],
    "La": ["greyscale", "transparency"],
    "P": ["palette"],
    "PA": ["palette", "transparency"],
    "RGB": [],
    "RGBX": [],
    "RGBA": ["transparency"],
    "RGBa": ["transparency"],
    "CMYK": ["CMYK"],
    "I": ["greyscale", "16-bit"],
}
Finding = tuple[str, str]  # kind, details
Kinds = dict[str, list[tuple[str, str]]]  # kind: path, details
Source = bytes | Finding | None  # content, why there is none, or None: a file of that name


@dataclass(frozen=True)
class Audit:
    """Findings of `audit`.

    Attributes:
        root: the folder.
        images: number of images that were decoded.
        ignored: number of other files by extension.
        left_out: one line for each split on entries that are not looked at (`folders.LeftOut`).
        kinds: by kind of finding the (path, details), sorted.
    """

    root: Path
    images: int
    ignored: Counter
    left_out: list[str]
    kinds: Kinds

    @property
    def refused(self) -> int:
        """Number of files and classes at which training or evaluation would stop."""
        return sum(len(self.kinds.get(kind, [])) for kind in STOPS)

    def report(self, show: int = 3) -> str:
        """All kinds as text, with `show` paths of each."""
        lines = [f"{self.root}: {self.images} images checked"]
        if self.ignored:
            most = ", ".join(f"{count} {name}" for name, count in self.ignored.most_common(5))
            lines[0] += f", {sum(self.ignored.values())} other files ignored ({most})"
        lines += self.left_out
        width = max(map(len, self.kinds), default=0)
        for title, group in GROUPS.items():
            present = [kind for kind in group if kind in self.kinds]
            lines += ["", f"{title}:"] if present else []
            for kind in present:
                found = self.kinds[kind]
                lines.append(f"  {kind:<{width}} {len(found):>8}  {group[kind]}")
                for path, details in found[:show]:
                    note = f"  ({details})" if details else ""
                    lines.append(f"      {os.path.relpath(path, self.root)}{note}")
                if len(found) > show:
                    lines.append(f"      ... and {len(found) - show} more")
        refused = self.refused
        lines += ["", f"{refused} would be refused" if refused else "nothing would be refused"]
        return "\n".join(map(printable, lines))

    def to_dict(self) -> dict:
        """All paths of each kind, as JSON can hold them."""
        in_training = {kind: text for group in GROUPS.values() for kind, text in group.items()}
        return {
            "root": str(self.root),
            "images": self.images,
            "ignored": dict(self.ignored),
            "left_out": self.left_out,
            "kinds": {
                kind: {
                    "in_training": in_training[kind],
                    "refused": kind in STOPS,
                    "files": [{"path": path, "details": details} for path, details in found],
                }
                for kind, found in sorted(self.kinds.items())
            },
        }


def audit(root: Path, workers: int, dataset: str = "folder", *, most: int | None = None) -> Audit:
    """Decode all images of `root`, or of its train/ and val/, by `workers` processes.

    Args:
        dataset: "folder", "tar" or "parquet".
        most: decode about so many images only, evenly spread; class folders are all looked at.

    Raises:
        DataError: no images; shards that cannot be read.
    """
    if dataset != "folder":
        return _audit_shards(root, workers, dataset, most)
    root = data_folder(root)
    left_out = {split: LeftOut(split) for split in splits_of(root)}
    by_split = {split: list(image_paths(split, found)) for split, found in left_out.items()}
    paths = [path for images in by_split.values() for path in images]
    said = [str(found) for found in left_out.values() if found.counts]
    if not paths:
        looked_for = f"(looked for {', '.join(IMG_EXTENSIONS)})"
        raise DataError("; ".join([f"no images in {root} {looked_for}", *said]))
    paths = [paths[i] for i in _spread(len(paths), most)]
    kinds = check_classes(root, by_split)
    kinds = _look_at_all(((path, None) for path in paths), len(paths), workers, kinds)
    ignored = sum(map(ignored_files, by_split), Counter())
    return Audit(root, len(paths), ignored, said, kinds)


def _audit_shards(root: Path, workers: int, dataset: str, most: int | None) -> Audit:
    """The images in archives, which this process reads and the others decode."""
    splits = {"train": open_images(dataset, root, "pretrain")}
    kinds: Kinds = defaultdict(list)
    try:
        shard_paths(root, "val", dataset)
    except DataError:
        pass  # none is needed for pretraining
    else:
        splits["val"] = open_images(dataset, root, "val")
        train, val = (set(images.classes) for images in splits.values())
        for name in val - train:
            kinds["class of val not in train"].append((name, ""))

    def contents() -> Iterator[tuple[str, bytes | Finding]]:
        for images in splits.values():
            for index in _spread(len(images), most):
                title = images.title(index)
                try:
                    yield title, images.read(index)
                except DataError as error:
                    yield title, ("unreadable", str(error))

    count = sum(len(_spread(len(images), most)) for images in splits.values())
    kinds = _look_at_all(contents(), count, workers, kinds)
    said = [str(images.left_out) for images in splits.values() if images.left_out.counts]
    return Audit(root, count, Counter(), said, kinds)


def _spread(count: int, most: int | None) -> range:
    """Places of `most` of so many images, or of somewhat more."""
    return range(0, count, max(1, count // most) if most else 1)


def _look_at_all(
    images: Iterable[tuple[str, Source]], count: int, workers: int, kinds: Kinds
) -> Kinds:
    """`kinds` and what there is to say about each image, sorted."""
    contents: list[tuple[str, str]] = []
    with tqdm(total=count, unit="image", disable=None) as bar:
        for name, findings, content in check_files(images, min(workers, count)):
            bar.update()
            for kind, details in findings:
                kinds[kind].append((name, details))
            if content:
                contents.append((content, name))
    first: dict[str, str] = {}
    for content, name in sorted(contents):
        original = first.setdefault(content, name)
        if original != name:
            kinds["exact copy"].append((name, f"of {original}"))
    return {kind: sorted(found) for kind, found in kinds.items()}


def check_file(name: str, source: Source = None) -> list[Finding]:
    """What there is to say about one image; [] for an ordinary RGB image.

    Args:
        name: of a file, or of what it was read from.
        source: the file's content, where `name` is none; or why it has none.
    """
    if isinstance(source, tuple):
        return [source]
    in_memory = isinstance(source, bytes)
    if not in_memory and not os.path.isfile(name):
        return [("missing", "")]
    if not (len(source) if in_memory else os.path.getsize(name)):
        return [("empty", "")]
    try:
        with warnings.catch_warnings(action="ignore"):
            found = _look_at_header(name, io.BytesIO(source) if in_memory else name)
    except Exception as error:  # Pillow's readers fail in any way
        found = [("unreadable", str(error))]
    try:  # the judge: this is what training does
        rgb_of(source, name) if in_memory else load_rgb(name)
    except DataError as error:
        reason = str(error).removeprefix(f"cannot read image {name}: ")
        reason = reason.removesuffix("; replace or remove it")
        kind = next((kind for mark, kind in _REASONS if mark in reason), "unreadable")
        return [(kind, reason)]
    return [finding for finding in found if finding[0] not in REFUSED]


_REASONS = (
    ("pixels, the most is", "too large"),
    ("decompression bomb", "too large"),
    ("32-bit", "32-bit"),
    ("truncated", "truncated"),
    ("Truncated", "truncated"),
)


def _look_at_header(name: str, source: str | BinaryIO) -> list[Finding]:
    """Kinds that can be told without decoding the pixels."""
    found = []
    with Image.open(source) as image:
        if 2 * image.width * image.height > MAX_PIXELS:
            found.append(("large", f"{image.width} x {image.height}"))
        if image.mode.startswith("I;16"):
            found += [("greyscale", image.mode), ("16-bit", image.mode)]
        else:
            kinds = _MODES.get(image.mode, ["other colours"])
            found += [(kind, image.mode) for kind in kinds]
            if ";16" in str(image.tile) and "16-bit" not in kinds:
                found.append(("16-bit", image.mode))
        if "transparency" in image.info and image.mode in ("1", "L", "P", "RGB"):
            found.append(("transparency", f"{image.mode} with a transparent colour"))
        frames = getattr(image, "n_frames", 1)
        if frames > 1:
            found.append(("animated", f"{image.format}, {frames} frames"))
        if image.format != "PNG" or "exif" in image.info:  # else Pillow would decode it all to look
            orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
            if orientation not in (0, 1):
                found.append(("EXIF-rotated", f"orientation {orientation}"))
        suffix = os.path.splitext(name.partition(" in ")[0])[1].lower()
        named = Image.registered_extensions().get(suffix)
        if named != image.format and (named, image.format) != ("JPEG", "MPO"):
            found.append(("wrong extension", f"{image.format} inside"))
    return found


def _look_at(name: str, source: Source) -> tuple[str, list[Finding], str]:
    """Name, `check_file` and SHA-256 of the content, "" where there is none."""
    findings, content = check_file(name, source), ""
    if isinstance(source, bytes) and source:
        content = hashlib.sha256(source).hexdigest()
    elif source is None:
        with contextlib.suppress(OSError):  # it has been found unreadable
            content = sha256(name) if os.path.isfile(name) and os.path.getsize(name) else ""
    return name, findings, content


def check_files(
    images: Iterable[tuple[str, Source]], workers: int
) -> Iterator[tuple[str, list[Finding], str]]:
    """(name, `check_file`, SHA-256 or "") of all images by several processes, in any order.

    A file that kills the process that reads it does not stop the check: those that were in work
    are then tried one by one, each in a process of its own.
    """
    left = iter(images)
    while True:
        with ProcessPoolExecutor(workers) as pool:
            pending = {}
            try:
                while True:
                    for image in islice(left, 4 * workers - len(pending)):
                        pending[pool.submit(_look_at, *image)] = image
                    if not pending:
                        return
                    for future in wait(pending, return_when=FIRST_COMPLETED).done:
                        result = future.result()
                        pending.pop(future)
                        yield result
            except BrokenProcessPool:
                suspects = list(pending.values())
        for image in suspects:
            with ProcessPoolExecutor(1) as pool:
                try:
                    yield pool.submit(_look_at, *image).result()
                except BrokenProcessPool:
                    yield image[0], [("kills its reader", "")], ""


def splits_of(root: Path) -> list[Path]:
    """Folders that are read: train and val where they are there, else the folder itself."""
    if not (root / "train").is_dir():
        return [root]
    return [root / name for name in ("train", "val") if (root / name).is_dir()]


def check_classes(root: Path, paths: dict[Path, list[str]]) -> Kinds:
    """What does not fit between class folders and images, and between train and val.

    Args:
        root: the data folder.
        paths: of the images in each of its splits.
    """
    kinds: Kinds = defaultdict(list)
    classes: list[dict[str, Path]] = []  # of train and val

    def add(kind: str, found: Iterable[Path]) -> None:
        for path in found:
            kinds[kind].append((str(path), ""))

    for split, images in paths.items():
        inside = [os.path.relpath(path, split).split(os.sep) for path in images]
        with_images = {parts[0] for parts in inside if len(parts) > 1}
        classes.append({name: split / name for name in with_images})
        others = (e for e in split.iterdir() if e.name not in with_images)
        add("class without images", (e for e in others if e.is_dir() and not is_tool_made(e.name)))
        if with_images and split != root:
            loose = (split / parts[0] for parts in inside if len(parts) == 1)
            add("image outside the class folders", loose)
    if len(classes) == 2:
        train, val = classes
        add("class of val not in train", (val[name] for name in val.keys() - train.keys()))
        add("class of train not in val", (train[name] for name in train.keys() - val.keys()))
    return kinds


def ignored_files(folder: Path) -> Counter:
    """Number of files that training does not look at, by extension."""
    left_out = LeftOut(folder)
    count = Counter(
        os.path.splitext(name)[1] or "no extension"
        for _, names in folders_below(folder, left_out)
        for name in names
        if not is_image(name)
    )
    return count + Counter({"hidden": left_out.counts.get(FILES, 0)})
