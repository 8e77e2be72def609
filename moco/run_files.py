"""Names of the files in a run folder; reading and writing the small ones. Needs no torch."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import hashlib
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from moco.errors import CheckpointError

FORMAT_VERSION = 1  # "version" in every checkpoint that is written
ARGS = "args.json"
LOG = "log.jsonl"
# Written by main_lincls.py: the newest state, the best classifier so far, the result.
LINCLS_LATEST, LINCLS_BEST, LINCLS_RESULT = (
    "checkpoint.pth.tar",
    "model_best.pth.tar",
    "lincls.json",
)
# Written by scripts/evaluate_depth.py: the newest state, the result.
DEPTH_STATE, DEPTH_RESULT = "predictor.pth.tar", "depth.json"
# The black box in a run folder: what led to a step that went wrong (`moco.train.blackbox`).
FAILED, FAILED_STATE, FAILED_ABOUT = "failed", "before.pth.tar", "failed.json"
# Written by main_moco.py: after an epoch (0-based), and within one (steps since the start).
EPOCH_CHECKPOINT = re.compile(r"checkpoint_(\d{4,})\.pth\.tar")
STEP_CHECKPOINT = re.compile(r"step_(\d{8,})\.pth\.tar")
# What a file of weights ends in, the ones to prefer first.
_WEIGHTS = (".safetensors", ".pth", ".pth.tar", ".pt", ".bin")


def checkpoint_files(folder: str | os.PathLike) -> list[Path]:
    """Pretraining checkpoints of a run folder, by name."""
    names = (EPOCH_CHECKPOINT, STEP_CHECKPOINT)
    found = Path(folder).glob("*.pth.tar")
    return sorted(path for path in found if any(name.fullmatch(path.name) for name in names))


def weights_file(folder: str | os.PathLike) -> Path:
    """The file of weights that a folder stands for: a run's newest checkpoint, a release's encoder.

    Raises:
        CheckpointError: neither, or several files to choose from; one line that names them.
    """
    own = checkpoint_files(folder)
    names = [path.name for path in Path(folder).iterdir()]
    return own[-1] if own else Path(folder) / only_weights(names, os.fspath(folder))


def only_weights(names: list[str], where: str) -> str:
    """Of the files at `where` model.safetensors; else the only file of weights, of several the only
    one that says "backbone", as the releases of this project have it, rather as .safetensors.

    Raises:
        CheckpointError: none or several; one line that names them.
    """
    if "model.safetensors" in names:
        return "model.safetensors"
    found: list[str] = []
    for suffix in _WEIGHTS:
        found = [name for name in names if name.endswith(suffix)]
        backbones = [name for name in found if "backbone" in PurePosixPath(name).name]
        for only in (found, backbones):
            if len(only) == 1:
                return only[0]
        if found:
            break
    raise CheckpointError(
        f"{where} has {len(found)} files of weights"
        + (f" ({', '.join(sorted(found)[:5])})" if found else "")
        + f"; name one: {where}/FILE"
    )


def write_json(path: str | Path, content: dict) -> None:
    """Write a small JSON file in one piece."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_text(path: str | Path, text: str) -> None:
    """Write a small UTF-8 file in one piece: it is there whole, or as it was before.

    Raises:
        OSError: it cannot be written.
    """
    path = Path(path)
    try:
        with written_beside(path) as file:
            file.write(text.encode("utf-8"))
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


@contextlib.contextmanager
def written_beside(path: Path, *, sync: bool = False) -> Iterator[BinaryIO]:
    """A new file beside `path` that takes its name at the end, if nothing goes wrong; `sync` has it
    on the disk before. Those that processes left which were killed in between are deleted: whoever
    lives holds a lock on his own.

    Raises:
        OSError: it cannot be written.
    """
    _delete_left(path.parent, path.name)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "wb") as file:
            with contextlib.suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield file
            file.flush()
            if sync:
                os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def folder_beside(path: Path) -> Iterator[Path]:
    """A new folder beside `path`, for as long as the block runs; what killed processes left of the
    kind is deleted as in `written_beside`.

    Raises:
        OSError: it cannot be made.
    """
    name = path.name[:_LONGEST]
    _delete_left(path.parent, name)
    temporary = path.with_name(f".{name}.{secrets.token_hex(8)}.tmp")
    temporary.mkdir()
    descriptor = os.open(temporary, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield temporary
    finally:
        os.close(descriptor)
        shutil.rmtree(temporary, ignore_errors=True)


_YOUNG = 60.0  # seconds
_LONGEST = 100  # characters of a folder's name, to which more are added


def _delete_left(folder: Path, name: str) -> None:
    """What killed processes left in a folder, to become `name`: nobody holds a lock on it. Where
    there are no locks it looks held; a young one may not have its lock yet."""
    for left in folder.glob(f".{glob.escape(name)}.*.tmp"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > _YOUNG:
                descriptor = os.open(left, os.O_RDONLY)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(left) if left.is_dir() else left.unlink()
                finally:
                    os.close(descriptor)


def read_log(path: str | os.PathLike) -> tuple[list[dict], list[bytes]]:
    """Lines of a log.jsonl, in order, and the lines that are none.

    A line counts when it is a JSON object with a text "kind" and a whole number "step". A run that
    was killed leaves a torn last line; other damage comes from disks and editors. Nothing in the
    file raises an error.

    Returns:
        (lines, bad): dicts as they were logged; the bytes of every other line that is not blank.
    """
    lines: list[dict] = []
    bad: list[bytes] = []
    for raw in Path(path).read_bytes().split(b"\n"):
        if not raw.strip():
            continue
        try:
            fields = json.loads(raw.decode("utf-8"))
        except (ValueError, RecursionError):
            fields = None
        if (
            isinstance(fields, dict)
            and isinstance(fields.get("kind"), str)
            and type(fields.get("step")) is int
        ):
            lines.append(fields)
        else:
            bad.append(raw)
    return lines, bad


def sha256(path: str | os.PathLike) -> str:
    """SHA-256 of a file's content, 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
