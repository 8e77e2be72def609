"""Images in tar archives: webdataset's shards, or archives of a folder of images.

The label of an image is, of the whole data set, the first that there is:

    KEY.cls beside KEY.jpg         webdataset: a number, or the name of a class
    CLASS/IMAGE                    the first folder on its way, as of a folder
    CLASS_... in CLASS.tar         the archive's name, as of the archives that ImageNet comes in

Images are numbered in the order of their names, as those of folders are, whatever their order in
the archives. An archive holds what tar would unpack from it: of a name that comes again the latest,
and hard links are images; symbolic links are left out. Finding them takes a walk over all archives:
the index is kept in the user's cache ($XDG_CACHE_HOME, else ~/.cache), under a digest of the files'
names, sizes and times.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import tarfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from moco.data.file_list import Names, packed, unpacked
from moco.data.folders import FILES, is_image, is_tool_made
from moco.data.shards import WORDS, OpenFiles, PackedImages, files_digest, number_classes
from moco.errors import DataError
from moco.progress import progress
from moco.run_files import written_beside

_VERSION = 2  # of the index
LINKS, REPLACED = "symbolic links and sparse files", "images that come again in their archive"


class TarImages(PackedImages):
    """Images in the tar archives of one split.

    Raises:
        DataError: an archive cannot be read, no images, some images with a label and some without,
            a class that `classes` lacks.
    """

    def __init__(
        self, root: str | os.PathLike, paths: Sequence[str], classes: Sequence[str] | None = None
    ) -> None:
        super().__init__(root, paths)
        index = _index(paths)
        self.names = Names([index["names"]])
        self._place = torch.from_numpy(index["place"])  # (N, 3): archive, offset, size
        for reason, path in zip(index["reasons"], index["left_out"], strict=True):
            self.left_out.add(reason, os.path.join(root, path))
        if len(index["labels"]):
            labels = torch.from_numpy(index["labels"])
            self.classes, self.targets = number_classes(labels, index["classes"], classes, root)

    def read(self, index: int) -> bytes:
        return self.files.read(*self._place[index].tolist())

    def title(self, index: int) -> str:
        return f"{self.names[index]} in {self.files.paths[int(self._place[index, 0])]}"


def _index(paths: Sequence[str]) -> dict:
    """names, place, labels, classes, left_out, reasons; from the cache, or made and put there."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    digest = files_digest(paths, with_changes=True)[:32]
    cached = Path(home) / "moco_align_uniform" / f"tar-{_VERSION}-{digest}.npz"
    with _one_at_a_time(cached.parent):
        try:
            with np.load(cached) as file:
                index = dict(file)
        except (OSError, ValueError, EOFError, zipfile.BadZipFile):
            index = _make_index(paths)
            whole = {n: _bytes(v) if isinstance(v, list) else v for n, v in index.items()}
            with contextlib.suppress(OSError), written_beside(cached) as file:
                np.savez(file, **whole)  # where it cannot be, it is made again next time
            return index
    return {n: unpacked(v) if v.dtype == np.uint8 else v for n, v in index.items()}


def _bytes(names: list[str]) -> np.ndarray:
    return np.frombuffer(packed(names), dtype=np.uint8)


@contextlib.contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """The first process of a machine makes the index; the others wait and read it. Where the folder
    cannot be made or locked, each makes its own."""
    with contextlib.ExitStack() as at_exit:
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(folder, os.O_RDONLY)
            at_exit.callback(os.close, descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield


def _make_index(paths: Sequence[str]) -> dict:
    images, said, left_out = _scan(paths)
    names = [name for name, _, _, _ in images]
    if not names:
        raise DataError(f"no images in {paths[0]} and {len(paths) - 1} more archives")
    for word in (word for words in WORDS.values() for word in words):  # of an archive of train/
        if all(name.startswith(f"{word}/") for name in names):
            names = [name.partition("/")[2] for name in names]
    numbers = [number for _, number, _, _ in images]
    if said:
        classes, found = _said_classes(paths, images, said)
    else:
        names, found = _named_classes(paths, names, numbers)
        classes = sorted(set(found))
    label_of = {name: i for i, name in enumerate(classes)}
    order = sorted(range(len(names)), key=lambda i: (*_in_folders(names[i]), images[i]))
    places = [images[i][1:] for i in order]
    return {
        "names": [names[i] for i in order],
        "place": np.array(places, dtype=np.int64),
        "labels": np.array([label_of[found[i]] for i in order if found], dtype=np.int64),
        "classes": classes,
        "left_out": [name for _, name in left_out],
        "reasons": [reason for reason, _ in left_out],
    }


Place = tuple[str, int, int, int]  # name, archive, offset, size


def _key(name: str) -> str:
    """What an image and its .cls file have in common."""
    folder, _, file = name.rpartition("/")
    return f"{folder}/{file.partition('.')[0]}"


def _scan(
    paths: Sequence[str],
) -> tuple[list[Place], dict[tuple[int, str], str], list[tuple[str, str]]]:
    """Images, what the .cls file of (archive, key) says, and why which images are left out."""
    files = OpenFiles(paths)
    images, said, left_out = [], {}, []
    for number, path in enumerate(progress(paths, "index of archives")):
        places: dict[str, tuple[int, int]] = {}  # of this archive's images
        for name, offset, size, link in members(path):
            if name.endswith(".cls") and not link:
                text = files.read(number, offset, min(size, 1000))
                said[number, _key(name)] = text.decode("utf-8", "replace").strip()
            if not is_image(name):
                continue
            if any(map(is_tool_made, name.split("/"))):
                left_out.append((FILES, name))
            elif link and link not in places:
                left_out.append((LINKS, name))
            else:
                left_out += [(REPLACED, name)] * (name in places)
                places[name] = places[link] if link else (offset, size)
        images += [(name, number, *place) for name, place in places.items()]
    return images, said, left_out


def _said_classes(
    paths: Sequence[str], images: Sequence[Place], said: dict[tuple[int, str], str]
) -> tuple[list[str], list[str]]:
    """Class names, and that of each image, from .cls files."""
    found = [said.get((number, _key(name)), "") for name, number, _, _ in images]
    if "" in found:
        name, number, _, _ = images[found.index("")]
        raise DataError(
            f"{name} in {paths[number]} has no .cls file, or an empty one; {len(said)} .cls files "
            "are there: expected one for each image, or none"
        )
    if all(text.isascii() and text.isdigit() and len(text) < 7 for text in found):
        found = [str(int(text)) for text in found]
        return [str(i) for i in range(max(map(int, found)) + 1)], found
    return sorted(set(found)), found


def _named_classes(
    paths: Sequence[str], names: list[str], numbers: Sequence[int]
) -> tuple[list[str], list[str]]:
    """Names as a folder has them, and the class of each: none where neither folder nor archive
    tells."""
    if all("/" in name for name in names):
        return names, [name.partition("/")[0] for name in names]
    stems = [Path(paths[number]).stem for number in numbers]
    if all(name.startswith(f"{stem}_") for name, stem in zip(names, stems, strict=True)):
        return [f"{stem}/{name}" for stem, name in zip(stems, names, strict=True)], stems
    return names, []


def _in_folders(name: str) -> tuple[str, str, str]:
    """What `folders.image_paths` sorts by: class, folder, file."""
    folder, _, file = name.rpartition("/")
    return folder.partition("/")[0], folder, file


class Member(NamedTuple):
    """A file in an archive: where its bytes are and their number; or, of a link, to what."""

    name: str
    offset: int
    size: int
    link: str = ""


def members(path: str) -> Iterator[Member]:
    """Files and links in an archive. Names are as they would be below the folder that it is
    unpacked in; symbolic links and sparse files are links to their own name.

    Raises:
        DataError: it is no tar archive, compressed, cut off or damaged.
    """
    try:
        with tarfile.open(path, "r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # else all are kept
                name = _below(member.name)
                if member.isreg() and not member.issparse():
                    yield Member(name, member.offset_data, member.size)
                elif member.islnk() or member.issym() or member.issparse():
                    yield Member(name, 0, 0, _below(member.linkname) if member.islnk() else name)
            _check_end(path, tar.offset)
    except (tarfile.TarError, OSError, ValueError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"cannot read {path} as a tar archive: {reason[:200]}; expected one that is not "
            "compressed, and whole"
        ) from error


def _below(name: str) -> str:
    """A name without what leads out of the folder, which tar takes away too."""
    name = os.path.normpath(name).lstrip("/")
    while name.startswith("../"):
        name = name.removeprefix("../")
    return name


def _check_end(path: str, offset: int) -> None:
    """An archive ends in blocks of zeros; tarfile ends at a damaged header as well, silently."""
    with open(path, "rb") as file:
        file.seek(offset)
        block = file.read(tarfile.BLOCKSIZE)
        if len(block) < tarfile.BLOCKSIZE or any(block):
            raise tarfile.ReadError(f"it is damaged or cut off at byte {offset}")
        while rest := file.read(2**20):
            if rest.count(0) < len(rest):
                raise tarfile.ReadError(
                    f"it goes on behind its end at byte {offset}, damaged there or joined by cat "
                    "(join archives by tar --concatenate)"
                )
