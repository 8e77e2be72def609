"""Images within large files (tar archives, Parquet files): which files, and one image out of them.

An index of offsets is made when a data set is opened; an image is then read by `pread`, whichever
comes next. So order, augmentation and resumption are those of folders.
"""

from __future__ import annotations

import hashlib
import os
import re
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from moco.data.file_list import Names, Numbers
from moco.data.folders import LeftOut, data_folder, is_tool_made
from moco.data.rgb import rgb_of
from moco.errors import DataError

SUFFIXES = {"tar": ".tar", "parquet": ".parquet"}
HOW_LABELLED = {
    "tar": "CLASS/IMAGE in the archives, CLASS_... in CLASS.tar, or a .cls file beside each image",
    "parquet": "a whole number in each row of the column label",
}
WORDS = {"train": ("train", "training"), "val": ("val", "validation", "valid")}


def shard_paths(root: str | os.PathLike, split: str, dataset: str) -> list[str]:
    """The files of a split, sorted: those of its folder (train/, val/ or validation/), else those
    in `root` or `root`/data with the word in their names (train-00000-of-00294.parquet). For
    "pretrain" these of "train", or all files in `root` where no name tells splits apart.

    Raises:
        DataError: there are none, or one is a link to nothing.
    """
    suffix, root = SUFFIXES[dataset], data_folder(Path(root))
    words = {name: re.compile(rf"(^|[^a-z])({'|'.join(WORDS[name])})([^a-z]|$)") for name in WORDS}
    wanted = "val" if split == "val" else "train"
    for word in WORDS[wanted]:
        if found := _files(root / word, suffix):
            return found
    loose = _files(root, suffix) + _files(root / "data", suffix)
    named = {n: [p for p in loose if w.search(os.path.basename(p))] for n, w in words.items()}
    if named[wanted]:
        return named[wanted]
    if split == "pretrain" and loose and not named["val"]:
        return loose
    raise DataError(
        f"no {suffix} files of the {wanted} images in {root}: expected {wanted}/*{suffix}, or "
        f"{wanted}-*{suffix} in {root} or {root}/data"
    )


def _files(folder: Path, suffix: str) -> list[str]:
    if not folder.is_dir():
        return []
    names = sorted(
        entry.name
        for entry in os.scandir(folder)
        if entry.name.lower().endswith(suffix) and not is_tool_made(entry.name)
    )
    paths = [str(folder / name) for name in names if not (folder / name).is_dir()]
    for path in paths:
        if not os.path.isfile(path):
            raise DataError(f"{path} is no file, or a link to nothing; mend it or take it away")
    return paths


def files_digest(paths: Sequence[str], *, with_changes: bool = False) -> str:
    """Changes with names, sizes and times of the files; not with where they are.

    Args:
        with_changes: also with the times that nothing but a change or a copy can set: archives that
            are made reproducibly have all one size and date.
    """
    digest = hashlib.sha256()
    for path in paths:
        facts = os.stat(path)
        name = os.path.join(os.path.basename(os.path.dirname(path)), os.path.basename(path))
        digest.update(f"{name!r} {facts.st_size} {facts.st_mtime_ns}\n".encode())
        if with_changes:
            digest.update(f"{facts.st_ctime_ns}\n".encode())
    return digest.hexdigest()


class OpenFiles:
    """Parts of some files; the latest `most` files stay open, in each process its own."""

    def __init__(self, paths: Sequence[str], most: int = 64) -> None:
        self.paths, self.most = list(paths), most
        self._open: OrderedDict[int, int] = OrderedDict()  # number -> descriptor

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_open": OrderedDict()}

    def __del__(self) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)

    def read(self, number: int, offset: int, size: int) -> bytes:
        """Bytes of file `number`.

        Raises:
            DataError: it ends before, or cannot be read.
        """
        path = self.paths[number]
        try:
            if number not in self._open:
                self._open[number] = os.open(path, os.O_RDONLY)
                if len(self._open) > self.most:
                    os.close(self._open.popitem(last=False)[1])
            self._open.move_to_end(number)
            data = os.pread(self._open[number], size, offset)
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}") from error
        if len(data) < size:
            raise DataError(f"{path} ends before byte {offset + size}: it is cut off")
        return data


class PackedImages(ABC):
    """Images within files; like `FolderImages`, but for `read` in place of paths.

    Attributes:
        root: the data folder.
        files: the shards.
        names: of the images.
        targets, classes, left_out: as of `FolderImages`.
    """

    names: Names

    def __init__(self, root: str | os.PathLike, paths: Sequence[str]) -> None:
        self.root, self.left_out = Path(root), LeftOut(root)
        self.files = OpenFiles(paths)
        self.targets: Numbers | None = None
        self.classes: list[str] = []

    def __len__(self) -> int:
        return len(self.names)

    @abstractmethod
    def read(self, index: int) -> bytes:
        """The image as it is stored; DataError where it cannot be read."""

    @abstractmethod
    def title(self, index: int) -> str:
        """Where an image is, for people."""

    def load(self, index: int) -> Image.Image:
        return rgb_of(self.read(index), self.title(index))


def number_classes(
    labels: Tensor, names: Sequence[str], known: Sequence[str] | None, root: str | os.PathLike
) -> tuple[list[str], Numbers]:
    """Class names and targets.

    Args:
        labels: int64, places in `names`.
        names: the classes of this split.
        known: those of the training set in the order of their targets, if they are to count.

    Raises:
        DataError: a class that `known` lacks.
    """
    if not known:
        return list(names), Numbers(labels)
    index = {name: i for i, name in enumerate(known)}
    unknown = [names[i] for i in labels.unique().tolist() if names[i] not in index]
    if unknown:
        raise DataError(
            f"{root} has classes that the training set lacks: {', '.join(sorted(unknown)[:5])}"
        )
    return list(known), Numbers(torch.tensor([index.get(name, -1) for name in names])[labels])
