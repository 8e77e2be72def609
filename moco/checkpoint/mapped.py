"""A checkpoint that another process has read and checked, mapped from its file by this one."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import torch

from moco.checkpoint.formats import is_whole_zip


def fingerprint(path: Path) -> str | None:
    """Digest of the names, sizes and CRCs of a file of torch.save; None where it is none."""
    try:
        with zipfile.ZipFile(path) as archive:
            parts = [(e.filename, e.file_size, e.CRC) for e in archive.infolist()]
    except (OSError, zipfile.BadZipFile):
        return None
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def map_checkpoint(path: Path, wanted: str | None) -> dict | None:
    """The content of a file with the fingerprint `wanted`, its tensors mapped into memory that
    processes share; None where this process does not see that file, whole, or cannot map it.

    The tensors are valid while the file is there: copy what is to stay.
    """
    try:
        if wanted is None or fingerprint(path) != wanted or not is_whole_zip(path):
            return None
        content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception:  # whatever it is, the process that has read the file hands it over
        return None
    content.pop("checksum", None)
    return content
