"""The messages with which a file is refused: what it seems to be, what was expected, what to do."""

from __future__ import annotations

from pathlib import Path

import torch

from moco.errors import CheckpointError

ZIP = b"PK\x03\x04"  # begins what torch.save writes since 1.6
PICKLE = b"\x80"  # begins a pickle, and what torch.save wrote before; with protocol 0 or 1:
OLD_TEXT = b"L%dL\n." % torch.serialization.MAGIC_NUMBER
RESAVE = "Save a dict of tensors, such as module.state_dict()"
UNPACK = "Unpack it and give the file inside"


class MaybeGood(CheckpointError):
    """The file may be good: it is of a newer version, or the disk did not give it."""


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


def unsafe(path: Path, asked_for: str) -> CheckpointError:
    return CheckpointError(
        f"{path} is not a checkpoint that can be read safely, and nothing in it was run: it asks "
        f"for {asked_for}, and tensors and plain values are all that was expected (or it is "
        "damaged there). If you trust its author, take the tensors out in a session of your own: "
        "content = torch.load(FILE, weights_only=False), and "
        'torch.save(content["state_dict"], NEW), or content.state_dict() of a whole network'
    )


def refuse_other_files(path: Path, head: bytes) -> None:
    """Raise CheckpointError when a file that begins with `head` is certainly no checkpoint."""
    is_text = head.isascii() and b"\0" not in head
    if not head:
        what, remedy = "is empty", "Copy or download it again; perhaps the disk was full"
    elif not head.strip(b"\0"):
        what, remedy = "begins with nothing but zeros", "Copy or download it again"
    elif head.startswith(b"version https://git-lfs"):
        what, remedy = "is a git-lfs pointer", "Run `git lfs pull`"
    elif head.lstrip().startswith(b"<"):
        what = "is a web page (HTML or XML), perhaps an error or log-in page"
        remedy = "Download it again, from the link of the file itself"
    elif path.suffix == ".safetensors":
        if head[8:9] == b"{" or not head.startswith((ZIP, PICKLE)):
            return
        what, remedy = "is no safetensors file, but one of torch.save", "Rename it to end in .pth"
    elif head[8:10] == b'{"':
        what, remedy = "seems to be a safetensors file", "Rename it to end in .safetensors"
    elif head.startswith((ZIP, PICKLE, OLD_TEXT)):
        return
    else:
        kind = "a text file" if is_text else "of an unknown kind"
        what = f"is {kind} (it begins with {head[:20]!r})"
        remedy = "Check the path, unpack it if it is an archive, or download it again"
    raise not_a_checkpoint(path, what, remedy)


def first_sentence(error: BaseException) -> str:
    return str(error).strip().split("\n")[0].split(". ")[0] or type(error).__name__
