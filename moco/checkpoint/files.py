"""One checkpoint file: written whole or not at all, read without running code from it.

A pretraining checkpoint is a plain dict of tensors, numbers, strings, lists and dicts:

    version     1
    arch        name for `build_encoder`
    epoch       finished epochs
    step        optimizer steps since the start of the run; step_in_epoch of them in this epoch
    state_dict  of MoCo, names prefixed "module." as upstream's are
    optimizer   state dict;  scaler: of the fp16 gradient scaler, else None
    skipped     steps that the scaler left out;  skipped_in_a_row: the latest of them
    shuffle_generator  state of the key shuffle
    rng         torch's generator state of every rank;  cuda_rng: that of their GPUs, else None
    means       what the next line of rank 0's log is made of
    args        the command line
    checksum    SHA-256 of all the others
"""

from __future__ import annotations

import errno
import json
import os
import pickle
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from moco.checkpoint.content import check_content, checksum
from moco.checkpoint.formats import ABOUT, read_arrays, read_old, read_safetensors, read_zip
from moco.checkpoint.hashes import check_hash, check_name, checked_digits
from moco.checkpoint.refusals import (
    OLD_TEXT,
    RESAVE,
    ZIP,
    MaybeGood,
    damaged,
    first_sentence,
    not_a_checkpoint,
    refuse_other_files,
    unsafe,
)
from moco.errors import CheckpointError
from moco.packages import import_optional
from moco.pickles import Inert, Refused
from moco.printable import printable
from moco.run_files import FORMAT_VERSION, written_beside

_OLD = torch.serialization.MAGIC_NUMBER.to_bytes(10, "little")  # the first pickle in it


_NO_FSYNC_OF_FOLDERS = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)  # network and FUSE file systems


def write_atomically(path: str | os.PathLike, write: Callable[[BinaryIO], object]) -> None:
    """Have `write(file)` make a file: after a crash at any moment it is whole or not there."""
    path = Path(path)
    with written_beside(path, sync=True) as file:
        write(file)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name itself
    except OSError as error:
        if error.errno not in _NO_FSYNC_OF_FOLDERS:
            raise
    finally:
        os.close(folder)


def write_checkpoint(path: str | os.PathLike, content: dict) -> None:
    """Write a checkpoint atomically.

    A checksum of everything in it is kept beside the tensors and verified by `read_checkpoint`.
    """
    write_torch(path, {**content, "checksum": checksum(content)})


def write_torch(path: str | os.PathLike, content: dict) -> None:
    """`torch.save`, atomically."""

    def write(file: BinaryIO) -> None:
        sink = _Sink(file)
        try:
            torch.save(content, sink)
        except RuntimeError as error:
            raise sink.error or error from error

    write_atomically(path, write)


def write_safetensors(path: str | os.PathLike, state: dict[str, Tensor], about: dict) -> None:
    """Write tensors by name as safetensors, atomically and the same bytes each time.

    Args:
        path: the file; the name must end in .safetensors for `read_checkpoint` to take it.
        state: tensors of any device, layout in memory and sharing; float types are kept.
        about: what a checkpoint says beside its tensors, in values that JSON has: `arch`, `epoch`,
            `args`, ... `read_checkpoint` gives it back beside `state_dict`.

    Raises:
        ValueError: `about` has a value that JSON cannot hold.
        DataError: there is no package safetensors.
    """
    save = import_optional("safetensors.torch", f"to write {path}").save
    said = json.dumps({"version": FORMAT_VERSION, **about}, sort_keys=True, allow_nan=False)
    copies = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in sorted(state.items())
    }
    said = json.loads(said)  # as it will be read
    said = json.dumps({**said, "checksum": checksum({**said, "state_dict": copies})})
    data = memoryview(save(copies, {"format": "pt", ABOUT: said}))
    # The package leaves the order of the metadata to chance, and a file's name carries its hash.
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(bytes(data[8:start]))
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    def write(file: BinaryIO) -> None:
        file.write(len(text).to_bytes(8, "little") + text)
        file.write(data[start:])

    write_atomically(path, write)


class _Sink:
    """What torch.save writes to. It makes "unexpected pos" of a full disk: keeps the reason."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.error = file, None

    def write(self, data: bytes) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


def read_checkpoint(
    path: str | os.PathLike, *, sha256: str | None = None, failed: bool = False
) -> dict:
    """Read a checkpoint or state dict of any origin onto the CPU, without running code from it.

    Of detectron2's pickles the arrays come as tensors; of this project's safetensors the tensors
    come under `state_dict`, beside what the file says about them. Of objects beside the weights an
    argparse.Namespace comes as a dict, numpy's numbers as numbers, others as their name in a text.

    What is checked: torch's zip format by the archive's own CRCs, which `torch.load` does not look
    at; this project's files by their checksum too; a hash in the name (`name-<8 or more hex
    digits>.pth`); the sizes that a file declares against what it holds; weights and optimizer state
    for NaN and infinity, and variances for being negative. Torch's old format (before 1.6), other
    projects' safetensors and pickles have no checksums, so a changed number goes unnoticed there: a
    warning says so.

    Args:
        path: the file.
        sha256: the hash that the file must have, or its first 8 digits or more; default: the one
            in its name, if any.
        failed: the file is the black box of a run, whose numbers need not be finite.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: not a checkpoint, damaged, not finite, of a newer format, of another hash,
            or one that wants to run code. The message says what the file seems to be, what was
            expected and what to do.
        ValueError: `sha256` is no hash.
    """
    path, sha256 = Path(path), checked_digits(sha256)
    content, unchecked = read_unwarned(path, failed=failed)
    if sha256 is not None:
        check_hash(path, sha256, path)
    elif not check_name(path) and unchecked:
        warn_of(path, unchecked)
    return content


_RENAME = (
    "Compare its SHA-256 with the one that its author gives; with its first 8 digits in the name "
    "(NAME-<digits>.ext) it is checked each time"
)
_UNCHECKED = {
    "old": (
        "is in torch's old format, which has no checksums",
        "To have checksums from now on, load it with torch.load(FILE, weights_only=True) and "
        "torch.save it again",
    ),
    "safetensors": ("is a safetensors file without a checksum", _RENAME),
    "arrays": ("is a pickle of arrays, which has no checksum", _RENAME),
}


def warn_of(name: object, kind: str) -> None:
    what, remedy = _UNCHECKED[kind]
    warnings.warn(
        f"{printable(name)} {what}: only its structure could be checked, changed numbers go "
        f"unnoticed. {remedy}",
        stacklevel=3,
    )


def read_unwarned(path: Path, *, failed: bool = False) -> tuple[dict, str | None]:
    """`read_checkpoint` without hash and warning; and the kind of file that a warning is due of."""
    if path.is_dir():
        raise FileNotFoundError(f"no such checkpoint: {path} is a folder; give a file in it")
    if not path.is_file():
        raise FileNotFoundError(f"no such checkpoint: {path}")
    try:
        content, unchecked = _read(path)
        check_content(content, path, finite=not failed)
        expected = content.pop("checksum", None)
        if expected is not None and expected != checksum(content):
            raise damaged(path, "its content does not match its checksum")
    except CheckpointError:
        raise
    except Refused as error:
        raise CheckpointError(f"{path} is refused: {error}") from error
    except pickle.UnpicklingError as error:
        asked_for = str(error).removeprefix("GLOBAL ")
        if asked_for != str(error):
            raise unsafe(path, asked_for) from error
        raise damaged(path, str(error)) from error
    except zipfile.BadZipFile as error:
        raise damaged(path, f"its zip archive is not whole ({error})") from error
    except OSError as error:
        raise MaybeGood(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # a damaged file can make the reader fail in any way
        raise damaged(path, f"{type(error).__name__}: {first_sentence(error)}") from error
    return content, unchecked if expected is None else None


def _read(path: Path) -> tuple[dict, str | None]:
    """The content, of a version that this code knows; the kind of file if it has no checksums."""
    with open(path, "rb") as file:
        head = file.read(512)
    refuse_other_files(path, head)
    if path.suffix == ".safetensors":
        content, unchecked = read_safetensors(path), "safetensors"
    elif head.startswith(ZIP):
        content, unchecked = read_zip(path), None
    elif _OLD in head[:32] or head.startswith(OLD_TEXT):
        content, unchecked = read_old(path), "old"
    else:
        content, unchecked = read_arrays(path), "arrays"
    if isinstance(content, Inert):
        raise unsafe(path, content.strip("<>"))
    if not isinstance(content, dict):
        what = f"holds a {type(content).__name__} instead of a dict"
        raise not_a_checkpoint(path, what, RESAVE)
    _check_version(content, path)
    return content, unchecked


def _check_version(content: dict, path: Path) -> None:
    """Before the checksum, which a newer format may compute in another way."""
    version = content.get("version")
    of_timm = "metric" in content or "state_dict_ema" in content  # has versions of its own
    if isinstance(version, (int, float)) and version > FORMAT_VERSION and not of_timm:
        raise MaybeGood(
            f"{path} has format version {version}, this code reads up to {FORMAT_VERSION}: it was "
            "written by a newer version of this project; update this one (git pull)"
        )
