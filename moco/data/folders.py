"""Folders of images: which files belong to a data set, in which order, and what is left out.

Left out, and counted in a `LeftOut`: hidden and tool-made entries (.ipynb_checkpoints, @eaDir,
__MACOSX, Thumbs.db, ...), pictures in formats that are not read (HEIC, GIF, ...), and links to
folders and images that are read without them.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from torchvision.datasets.folder import IMG_EXTENSIONS

from moco.errors import DataError
from moco.printable import printable

# What file systems, network drives and operating systems put between a user's files, in lower case.
TOOL_MADE = frozenset(
    {"@eadir", "@tmp", "#recycle", "#snapshot"}  # Synology
    | {"@recycle", "@recently-snapshot", "~snapshot"}  # QNAP, NetApp
    | {"__macosx", "network trash folder", "temporary items"}  # macOS
    | {"$recycle.bin", "system volume information", "thumbs.db", "ehthumbs.db", "desktop.ini"}
    | {"lost+found", "__pycache__"}
)
# What cameras, phones and browsers write and training does not read, in lower case.
OTHER_PICTURES = (
    *(".heic", ".heif", ".hif", ".avif", ".jxl", ".jp2", ".jfif", ".gif", ".svg", ".psd"),
    *(".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf"),
)
FOLDERS, FILES = "hidden or tool-made folders", "hidden or tool-made files"
OTHERS = "pictures in formats that are not read (convert them to JPEG or PNG)"
LINKED_FOLDERS, LINKED_IMAGES = "links to folders that are read", "links to images that are read"


def is_tool_made(name: str) -> bool:
    """Whether a file or folder of this name is hidden (.NAME) or made by a tool."""
    return name.startswith(".") or name.lower() in TOOL_MADE


def is_image(name: str) -> bool:
    return name.lower().endswith(IMG_EXTENSIONS)


class LeftOut:
    """Number of entries of a folder that are left out, by reason, with the first few names."""

    def __init__(self, root: str | os.PathLike) -> None:
        self.root = root
        self.counts: dict[str, int] = {}
        self.examples: dict[str, list[str]] = {}

    def add(self, reason: str, path: str) -> None:
        self.counts[reason] = self.counts.get(reason, 0) + 1
        if self.counts[reason] <= 3:
            self.examples.setdefault(reason, []).append(os.path.relpath(path, self.root))

    def __str__(self) -> str:
        """One line; empty when nothing is left out."""
        parts = []
        for reason, count in self.counts.items():
            names = self.examples[reason] + ["..."] * (count > 3)
            parts.append(f"{reason}: {count} ({printable(', '.join(names))})")
        return f"left out of {printable(str(self.root))}: {'; '.join(parts)}" if parts else ""


def image_paths(root: str | os.PathLike, left_out: LeftOut | None = None) -> Iterator[str]:
    """Image files below root in ImageFolder's order: class by class, and those in root first."""
    for folder, names in images_below(root, left_out):
        yield from (os.path.join(root, folder + name) for name in names)


def images_below(
    root: str | os.PathLike, left_out: LeftOut | None = None
) -> Iterator[tuple[str, list[str]]]:
    """Each folder as FOLDER/ below root ("" for root itself), with the names of its images."""
    start = len(os.path.join(root, ""))
    for folder, names in folders_below(root, left_out):
        yield os.path.join(folder, "")[start:], [name for name in names if is_image(name)]


def folders_below(
    root: str | os.PathLike, left_out: LeftOut | None = None
) -> Iterator[tuple[str, list[str]]]:
    """Each folder that is read, root first, with the sorted names of its files.

    Each real folder comes once, whatever links lead to it: under its own name when it is below
    `root`, else under the first link to it. A link to a folder that `root` is in is not followed.

    Raises:
        DataError: a folder cannot be listed.
    """
    yield from _Walk(root, left_out or LeftOut(root)).folders()


class _Walk:
    def __init__(self, root: str | os.PathLike, left_out: LeftOut) -> None:
        self.root, self.left_out = str(root), left_out
        self.real_root = os.path.realpath(root)
        self.linked: set[str] = set()  # real folders that were reached by a link
        self.real_folder = functools.lru_cache(maxsize=None)(os.path.realpath)

    def folders(self) -> Iterator[tuple[str, list[str]]]:
        entries = self.entries(self.root)
        yield self.root, [entry.name for entry in entries if _holds(entry.is_file)]
        for entry in entries:
            if _holds(entry.is_dir) and (real := self.enter(entry, self.real_root)):
                yield from sorted(self.tree(entry.path, real))

    def tree(self, folder: str, real: str) -> Iterator[tuple[str, list[str]]]:
        """A folder and all below it, in any order."""
        pending = [(folder, real)]
        while pending:
            folder, real = pending.pop()
            entries = self.entries(folder)
            yield folder, [entry.name for entry in entries if not _holds(entry.is_dir)]
            below = [(e.path, self.enter(e, real)) for e in entries if _holds(e.is_dir)]
            pending += [(path, real) for path, real in reversed(below) if real]

    def entries(self, folder: str) -> list[os.DirEntry]:
        """What is in a folder, sorted by name, without what is left out; folders may still be."""
        try:
            with os.scandir(folder) as found:
                entries = sorted(found, key=lambda entry: entry.name)
        except OSError as error:
            raise DataError(f"cannot list the folder {folder}: {error.strerror}") from error
        kept = []
        for entry in entries:
            if is_tool_made(entry.name):
                self.left_out.add(FOLDERS if _holds(entry.is_dir) else FILES, entry.path)
            elif entry.is_symlink() and is_image(entry.name) and self.image_is_read(entry):
                self.left_out.add(LINKED_IMAGES, entry.path)
            else:
                if entry.name.lower().endswith(OTHER_PICTURES) and _holds(entry.is_file):
                    self.left_out.add(OTHERS, entry.path)
                kept.append(entry)
        return kept

    def enter(self, entry: os.DirEntry, real_parent: str) -> str | None:
        """The real path of a folder that is to be read, None where it is read elsewhere."""
        if entry.is_symlink():
            real = os.path.realpath(entry.path)
        else:
            real = os.path.join(real_parent, entry.name)
            if self.is_read(real):
                return real
        above = self.real_root.startswith(os.path.join(real, ""))
        if above or self.is_read(real) or real in self.linked:
            self.left_out.add(LINKED_FOLDERS, entry.path)
            return None
        self.linked.add(real)
        return real

    def is_read(self, real: str) -> bool:
        """Whether a real path is one that the walk comes to without links."""
        if real == self.real_root:
            return True
        inside = os.path.join(self.real_root, "")
        return real.startswith(inside) and not any(
            map(is_tool_made, real.removeprefix(inside).split(os.sep))
        )

    def image_is_read(self, link: os.DirEntry) -> bool:
        """Whether a link leads to an image file that the walk comes to without it."""
        target = os.path.join(os.path.dirname(link.path), os.readlink(link.path))
        real = os.path.join(self.real_folder(os.path.dirname(target)), os.path.basename(target))
        return is_image(real) and self.is_read(real) and _holds(link.is_file)


def _holds(question: Callable[[], bool]) -> bool:
    """The answer of DirEntry.is_dir or is_file; False for a link that leads to itself."""
    try:
        return question()
    except OSError:
        return False


def data_folder(root: Path) -> Path:
    """The folder of train/ and val/: `root`, or its parent where `root` is such a train/."""
    here = Path(os.path.abspath(root))
    is_train = here.name == "train" and (here.parent / "val").is_dir()
    return here.parent if is_train and not (root / "train").is_dir() else root


def split_folder(root: Path, split: str) -> Path:
    """The folder of a split of `root` (see `data_folder`); for "pretrain" any folder will do.

    Raises:
        DataError: it is not there.
    """
    root = data_folder(root)
    folder = root / ("val" if split == "val" else "train")
    if folder.is_dir():
        return folder
    if split == "pretrain":
        return root
    raise DataError(f"no folder {folder}: expected {root}/train/CLASS/IMAGE and {root}/val/...")
