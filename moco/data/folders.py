"""Folders of images: which files belong to a data set, in which order, and what is left out.

Left out, and counted in a `LeftOut`: hidden and tool-made entries (.ipynb_checkpoints, @eaDir,
__MACOSX, Thumbs.db, ...).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from torchvision.datasets.folder import IMG_EXTENSIONS

from moco.errors import DataError

# What file systems, network drives and operating systems put between a user's files, in lower case.
TOOL_MADE = frozenset(
    {"@eadir", "@tmp", "#recycle", "#snapshot"}  # Synology
    | {"@recycle", "@recently-snapshot", "~snapshot"}  # QNAP, NetApp
    | {"__macosx", "network trash folder", "temporary items"}  # macOS
    | {"$recycle.bin", "system volume information", "thumbs.db", "ehthumbs.db", "desktop.ini"}
    | {"lost+found", "__pycache__"}
)
FOLDERS, FILES = "hidden or tool-made folders", "hidden or tool-made files"


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
            parts.append(f"{reason}: {count} ({', '.join(names)})")
        return f"left out of {self.root}: {'; '.join(parts)}" if parts else ""


def image_paths(root: str | os.PathLike, left_out: LeftOut | None = None) -> Iterator[str]:
    """Image files below root in ImageFolder's order: class by class, and those in root first."""
    for folder, names in folders_below(root, left_out):
        yield from (os.path.join(folder, name) for name in names if is_image(name))


def folders_below(
    root: str | os.PathLike, left_out: LeftOut | None = None
) -> Iterator[tuple[str, list[str]]]:
    """Each folder that is read, root first, with the sorted names of its files.

    Raises:
        DataError: a folder cannot be listed.
    """
    yield from _Walk(root, left_out or LeftOut(root)).folders()


class _Walk:
    def __init__(self, root: str | os.PathLike, left_out: LeftOut) -> None:
        self.root, self.left_out = str(root), left_out

    def folders(self) -> Iterator[tuple[str, list[str]]]:
        entries = self.entries(self.root)
        yield self.root, [entry.name for entry in entries if _holds(entry.is_file)]
        for entry in entries:
            if _holds(entry.is_dir):
                yield from sorted(self.tree(entry.path))

    def tree(self, folder: str) -> Iterator[tuple[str, list[str]]]:
        """A folder and all below it, in any order."""
        pending = [folder]
        while pending:
            folder = pending.pop()
            entries = self.entries(folder)
            yield folder, [entry.name for entry in entries if not _holds(entry.is_dir)]
            pending += [entry.path for entry in entries if _holds(entry.is_dir)]

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
            else:
                kept.append(entry)
        return kept


def _holds(question: Callable[[], bool]) -> bool:
    """The answer of DirEntry.is_dir or is_file; False for a link that leads to itself."""
    try:
        return question()
    except OSError:
        return False


# ------------------------------------------------------------------------------------------------
# train/ and val/
# ------------------------------------------------------------------------------------------------


def split_folder(root: Path, split: str) -> Path:
    """The folder of a split of `root`; for "pretrain" any folder will do.

    Raises:
        DataError: it is not there.
    """
    folder = root / ("val" if split == "val" else "train")
    if folder.is_dir():
        return folder
    if split == "pretrain":
        return root
    raise DataError(f"no folder {folder}: expected {root}/train/CLASS/IMAGE and {root}/val/...")
