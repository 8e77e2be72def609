"""The messages with which a file is refused: what it seems to be, what was expected, what to do."""

from __future__ import annotations

import re
from pathlib import Path

from moco.errors import CheckpointError


def not_a_checkpoint(path: Path, what: str, remedy: str) -> CheckpointError:
    return CheckpointError(
        f"{path} {what}; expected a checkpoint as torch.save writes it, or a .safetensors file. "
        f"{remedy}"
    )


def damaged(path: Path, how: str) -> CheckpointError:
    return CheckpointError(
        f"{path} is damaged: {how}. It may be truncated: copy or download it again and compare its "
        f"size ({path.stat().st_size} bytes here), or use an earlier checkpoint"
    )


def unsafe_or_damaged(path: Path, message: str) -> CheckpointError:
    """The unpickler stops at anything but tensors and plain values, before it is used."""
    asked_for = re.search(r"GLOBAL ([\w.]+)", message)
    if asked_for is None:
        reason = re.search(r"WeightsUnpickler error: (.+)", message)
        return damaged(path, reason[1] if reason else "its pickle cannot be read")
    return CheckpointError(
        f"{path} is not a checkpoint that can be read safely, and nothing in it was run: it asks "
        f"for {asked_for[1]}, and tensors and plain values are all that was expected (or it is "
        "damaged there). If you trust its author, take the tensors out in a session of your own: "
        "content = torch.load(FILE, weights_only=False), and "
        'torch.save(content["state_dict"], NEW), or content.state_dict() of a whole network'
    )


ZIP = b"PK\x03\x04"  # torch.load decides by this too; an archive can also hang behind a pickle
_HTML = (b"<!doctype", b"<html", b"<head", b"<?xml", b"<script")
UNPACK = "Unpack it and give the file inside"
FROM_NUMPY = "Save a dict of them as tensors, by torch.from_numpy, with torch.save"
RESAVE = "Save a dict of tensors, such as module.state_dict()"
# First bytes of files that lie where a checkpoint should be: what it is, what to do.
_OTHER_KINDS = (
    (b"version https://git-lfs.github.com/spec", "is a git-lfs pointer", "Run `git lfs pull`"),
    (b"\xff\xd8\xff", "is a JPEG image", "Check the path"),
    (b"\x89PNG", "is a PNG image", "Check the path"),
    (b"\x93NUMPY", "is a NumPy array", "Check the path"),
    (b"\x89HDF", "is an HDF5 file, as Keras writes it", "Convert its weights with h5py"),
    (b"\x1f\x8b", "is compressed by gzip", UNPACK),
    (b"BZh", "is compressed by bzip2", UNPACK),
    (b"\xfd7zXZ", "is compressed by xz", UNPACK),
    (b"\x28\xb5\x2f\xfd", "is compressed by zstd", UNPACK),
    (b"7z\xbc\xaf", "is a 7z archive", UNPACK),
)


def other_kind(head: bytes, size: int, suffix: str) -> tuple[str, str] | None:
    """What a file is that is certainly no checkpoint, and what to do; None when it may be one."""
    if not size:
        return "is empty", "Copy or download it again; perhaps the disk was full"
    if not head.strip(b"\0"):
        return "begins with nothing but zeros", "Copy or download it again"
    if head.lstrip().lower().startswith(_HTML):
        return (
            "is a web page (HTML or XML), perhaps an error or log-in page",
            "Download it again, from the link of the file itself",
        )
    if head[257:262] == b"ustar":
        return "is a tar archive (which checkpoints named .pth.tar are not)", UNPACK
    for start, what, remedy in _OTHER_KINDS:
        if head.startswith(start):
            return what, remedy
    if suffix == ".safetensors":
        if head[8:9] != b"{" and head.startswith((ZIP, b"\x80")):
            return "is no safetensors file, but one of torch.save", "Rename it to end in .pth"
        return None
    if head[8:10] == b'{"':
        return "seems to be a safetensors file", "Rename it to end in .safetensors"
    if head.startswith((ZIP, b"\x80")):  # b"\x80" begins a pickle
        return None
    kind = "a text file" if head.isascii() and b"\0" not in head else "of an unknown kind"
    return f"is {kind} (it begins with {head[:20]!r})", "Check the path, or download it again"


def first_sentence(error: BaseException) -> str:
    return str(error).strip().split("\n")[0].split(". ")[0] or type(error).__name__
