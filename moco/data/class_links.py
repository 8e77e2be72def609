"""A data set of some classes of another one, by symbolic links."""

from __future__ import annotations

from pathlib import Path

SPLITS = ("train", "val")


def link_classes(root: Path, out: Path, listed: Path) -> int:
    """Link each class of a list, in train and val; what is linked already stays.

    Args:
        root: has train/CLASS and val/CLASS.
        out: gets a link for each class and split; nothing is written where anything is refused.
        listed: a file with one class a line.

    Returns:
        Number of classes.

    Raises:
        ValueError: an empty list or a class twice, classes that `root` lacks, something else where
            a link should be.
        OSError: a file that cannot be read or written.
    """
    classes, root = _read_classes(listed), root.resolve()
    links = {out / split / name: root / split / name for split in SPLITS for name in classes}
    missing = [str(target) for target in links.values() if not target.is_dir()]
    if missing:
        shown = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise ValueError(f"{root} lacks {len(missing)} class folders: {shown}")
    for link, target in links.items():
        if link.is_symlink() and link.resolve() != target.resolve():
            raise ValueError(f"{link} links to {link.resolve()}, expected {target}")
        if link.exists() and not link.is_symlink():
            raise ValueError(f"{link} is in the way of a link to {target}")
    folders = [out / split for split in SPLITS if (out / split).is_dir()]
    there = [path for folder in folders for path in folder.iterdir()]
    if extra := sorted(path.name for path in there if path.name not in classes):
        raise ValueError(f"{out} holds classes that are not in the list: {', '.join(extra[:5])}")
    for link, target in links.items():
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.is_symlink():
            link.symlink_to(target, target_is_directory=True)
    return len(classes)


def _read_classes(path: Path) -> list[str]:
    classes = path.read_text(encoding="utf-8").split()
    if not classes:
        raise ValueError(f"{path} lists no classes")
    if len(set(classes)) < len(classes):
        raise ValueError(f"{path} lists a class twice")
    return classes
