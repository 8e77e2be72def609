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

import hashlib
import json
import os
import pickle
import re
import secrets
import warnings
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor, nn

from moco.checkpoint.unpickle import OtherPickle, read_arrays
from moco.errors import CheckpointError
from moco.run_files import FORMAT_VERSION

# ------------------------------------------------------------------------------------------------
# Writing
# ------------------------------------------------------------------------------------------------


def write_atomically(path: str | os.PathLike, write: Callable[[BinaryIO], object]) -> None:
    """Have `write(file)` make a file: after a crash at any moment it is whole or not there."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name itself
    finally:
        os.close(folder)


def write_checkpoint(path: str | os.PathLike, content: dict) -> None:
    """Write a checkpoint atomically.

    A checksum of everything in it is kept beside the tensors and verified by `read_checkpoint`.
    """
    content = {**content, "checksum": checksum(content)}

    def write(file: BinaryIO) -> None:
        sink = _Sink(file)
        try:
            torch.save(content, sink)
        except RuntimeError as error:
            raise sink.error or error from error

    write_atomically(path, write)


# In a safetensors file of this project: JSON of what a checkpoint says beside its tensors.
_ABOUT = "moco_align_uniform"


def write_safetensors(path: str | os.PathLike, state: dict[str, Tensor], about: dict) -> None:
    """Write tensors by name as safetensors, atomically and the same bytes each time.

    Args:
        path: the file; the name must end in .safetensors for `read_checkpoint` to take it.
        state: tensors of any device, layout in memory and sharing; float types are kept.
        about: what a checkpoint says beside its tensors, in values that JSON has: `arch`, `epoch`,
            `args`, ... `read_checkpoint` gives it back beside `state_dict`.

    Raises:
        ValueError: `about` has a value that JSON cannot hold.
    """
    from safetensors.torch import save

    said = json.dumps({"version": FORMAT_VERSION, **about}, sort_keys=True, allow_nan=False)
    copies = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in state.items()
    }
    data = memoryview(save(copies, {"format": "pt", _ABOUT: said}))
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


# ------------------------------------------------------------------------------------------------
# Reading
# ------------------------------------------------------------------------------------------------


def read_checkpoint(path: str | os.PathLike) -> dict:
    """Read a checkpoint or state dict of any origin onto the CPU, without running code from it.

    Of detectron2's pickles the arrays come as tensors; of this project's safetensors the tensors
    come under `state_dict`, beside what the file says about them.

    What is checked: torch's zip format by the archive's own CRCs, which `torch.load` does not look
    at; this project's files by their checksum too; the sizes that a file declares against what it
    holds; weights and optimizer state for NaN and infinity. Torch's old format (before 1.6) has no
    checksums, so a changed number goes unnoticed there: a warning says so. Nor have safetensors
    and pickles: compare a hash that their author gives.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: not a checkpoint, damaged, not finite, of a newer format, or one that wants
            to run code. The message says what the file seems to be, what was expected and what to
            do.
    """
    path = Path(path)
    content, is_unchecked = read_unwarned(path)
    if is_unchecked:
        warn_of_old_format(path)
    return content


def read_unwarned(path: Path) -> tuple[dict, bool]:
    """`read_checkpoint` without its warning; and whether the warning would be due."""
    if path.is_dir():
        raise FileNotFoundError(f"no such checkpoint: {path} is a folder; give a file in it")
    if not path.is_file():
        raise FileNotFoundError(f"no such checkpoint: {path}")
    try:
        head, size = _head(path), path.stat().st_size
        other = _other_kind(head, size, path.suffix)
        if other:
            raise _not_a_checkpoint(path, *other)
        is_old = False
        if path.suffix == ".safetensors":
            content = _read_safetensors(path)
        elif head.startswith(_ZIP):
            content = _read_zip(path)
        elif _OLD in head:
            content, is_old = _read_old(path), True
        else:
            content = read_arrays(path)
        if isinstance(content, dict):
            _check_version(content, path)
        _check_content(content, size, path)
        expected = content.pop("checksum", None)
        if expected is not None and expected != checksum(content):
            raise _damaged(path, "its content does not match its checksum")
    except CheckpointError:
        raise
    except OtherPickle as error:
        raise _not_a_checkpoint(path, f"is a pickle that holds {error}", _RESAVE) from error
    except pickle.UnpicklingError as error:
        raise _unsafe_or_damaged(path, str(error)) from error
    except zipfile.BadZipFile as error:
        raise _damaged(path, f"its zip archive is not whole ({error})") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # a damaged pickle can make the reader fail in any way
        raise _damaged(path, f"{type(error).__name__}: {_first_sentence(error)}") from error
    return content, is_old and expected is None


def warn_of_old_format(name: object) -> None:
    warnings.warn(
        f"{name} is in torch's old format, which has no checksums: only its structure could be "
        "checked, changed numbers go unnoticed. To have checksums from now on, load it with "
        "torch.load(FILE, weights_only=True) and torch.save it again",
        stacklevel=3,
    )


def _check_version(content: dict, path: Path) -> None:
    """Before the checksum, which a newer format may compute in another way."""
    version = content.get("version")
    of_timm = "metric" in content or "state_dict_ema" in content  # has versions of its own
    if isinstance(version, (int, float)) and version > FORMAT_VERSION and not of_timm:
        raise CheckpointError(
            f"{path} has format version {version}, this code reads up to {FORMAT_VERSION}: it was "
            "written by a newer version of this project; update this one (git pull)"
        )


def _not_a_checkpoint(path: Path, what: str, remedy: str) -> CheckpointError:
    return CheckpointError(
        f"{path} {what}; expected a checkpoint as torch.save writes it, or a .safetensors file. "
        f"{remedy}"
    )


def _damaged(path: Path, how: str) -> CheckpointError:
    return CheckpointError(
        f"{path} is damaged: {how}. It may be truncated: copy or download it again and compare its "
        f"size ({path.stat().st_size} bytes here), or use an earlier checkpoint"
    )


def _unsafe_or_damaged(path: Path, message: str) -> CheckpointError:
    """The unpickler stops at anything but tensors and plain values, before it is used."""
    asked_for = re.search(r"GLOBAL ([\w.]+)", message)
    if asked_for is None:
        reason = re.search(r"WeightsUnpickler error: (.+)", message)
        return _damaged(path, reason[1] if reason else "its pickle cannot be read")
    return CheckpointError(
        f"{path} is not a checkpoint that can be read safely, and nothing in it was run: it asks "
        f"for {asked_for[1]}, and tensors and plain values are all that was expected (or it is "
        "damaged there). If you trust its author, take the tensors out in a session of your own: "
        "content = torch.load(FILE, weights_only=False), and "
        'torch.save(content["state_dict"], NEW), or content.state_dict() of a whole network'
    )


_ZIP = b"PK\x03\x04"  # torch.load decides by this too; an archive can also hang behind a pickle
_OLD = torch.serialization.MAGIC_NUMBER.to_bytes(10, "little")  # the first pickle in it
_HTML = (b"<!doctype", b"<html", b"<head", b"<?xml", b"<script")
_UNPACK = "Unpack it and give the file inside"
_FROM_NUMPY = "Save a dict of them as tensors, by torch.from_numpy, with torch.save"
_RESAVE = "Save a dict of tensors, such as module.state_dict()"
# First bytes of files that lie where a checkpoint should be: what it is, what to do.
_OTHER_KINDS = (
    (b"version https://git-lfs.github.com/spec", "is a git-lfs pointer", "Run `git lfs pull`"),
    (b"\xff\xd8\xff", "is a JPEG image", "Check the path"),
    (b"\x89PNG", "is a PNG image", "Check the path"),
    (b"\x93NUMPY", "is a NumPy array", "Check the path"),
    (b"\x89HDF", "is an HDF5 file, as Keras writes it", "Convert its weights with h5py"),
    (b"\x1f\x8b", "is compressed by gzip", _UNPACK),
    (b"BZh", "is compressed by bzip2", _UNPACK),
    (b"\xfd7zXZ", "is compressed by xz", _UNPACK),
    (b"\x28\xb5\x2f\xfd", "is compressed by zstd", _UNPACK),
    (b"7z\xbc\xaf", "is a 7z archive", _UNPACK),
)


def _head(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(512)


def _other_kind(head: bytes, size: int, suffix: str) -> tuple[str, str] | None:
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
        return "is a tar archive (which checkpoints named .pth.tar are not)", _UNPACK
    for start, what, remedy in _OTHER_KINDS:
        if head.startswith(start):
            return what, remedy
    if suffix == ".safetensors":
        if head[8:9] != b"{" and head.startswith((_ZIP, b"\x80")):
            return "is no safetensors file, but one of torch.save", "Rename it to end in .pth"
        return None
    if head[8:10] == b'{"':
        return "seems to be a safetensors file", "Rename it to end in .safetensors"
    if head.startswith((_ZIP, b"\x80")):  # b"\x80" begins a pickle
        return None
    kind = "a text file" if head.isascii() and b"\0" not in head else "of an unknown kind"
    return f"is {kind} (it begins with {head[:20]!r})", "Check the path, or download it again"


def _read_zip(path: Path) -> object:
    """Looks at what `torch.load` does not: the CRCs, and before unpacking anything whether the
    directory declares more than the file can hold."""
    size = path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        names = [entry.filename for entry in entries]
        if not any(name.endswith("/data.pkl") for name in names):
            if names and all(name.endswith(".npy") for name in names):
                raise _not_a_checkpoint(path, "is an archive of NumPy arrays", _FROM_NUMPY)
            what = f"is a zip archive of other things ({', '.join(names[:3]) or 'none'})"
            raise _not_a_checkpoint(path, what, _UNPACK)
        if any(name.endswith("/constants.pkl") for name in names):
            raise _not_a_checkpoint(
                path,
                "is a TorchScript program, which is code",
                "If you trust its author: torch.save(torch.jit.load(FILE).state_dict(), NEW)",
            )
        declared = sum(entry.file_size for entry in entries)
        if declared > size or any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise _not_a_checkpoint(
                path,
                f"is a compressed zip archive, which torch.save never writes: {size} bytes that "
                f"would become {declared}, perhaps to fill the memory",
                "If you trust its author: unpack it, and pack it again with zip -0 -r",
            )
        if len(set(names)) < len(names) or min(entry.header_offset for entry in entries):
            raise _damaged(path, "its zip directory is not one that torch.save writes")
        damaged = archive.testzip()
        if damaged:
            raise _damaged(path, f"wrong checksum in {damaged}")
    return torch.load(path, map_location="cpu", weights_only=True)


def _read_old(path: Path) -> object:
    with open(path, "rb") as file:
        content = torch.load(file, map_location="cpu", weights_only=True)
        if file.read(1):
            raise _damaged(path, "something follows its last tensor")
    return content


_PLAIN = (str, int, float, bytes, type(None), torch.device, torch.dtype)
_MOST_VALUES, _DEEPEST = 200_000, 50  # far above any checkpoint's


def _check_content(content: object, size: int, path: Path) -> None:
    """Refuse what would break later: other than tensors and plain values, tensors larger than the
    file, endless nesting, and numbers that are not finite in what is trained."""
    if not isinstance(content, dict):
        what = f"holds a {type(content).__name__} instead of a dict"
        raise _not_a_checkpoint(path, what, _RESAVE)
    trained = content
    if "state_dict" in content:
        trained = ("state_dict", "state_dict_ema", "optimizer")
    count = 0
    todo: list[tuple[tuple, object]] = [((), content)]  # (keys that lead there, value)
    while todo:
        where, value = todo.pop()
        count += 1
        if count > _MOST_VALUES or len(where) > _DEEPEST:
            raise CheckpointError(f"{path} is refused: it has no end of nested values")
        if isinstance(value, dict):
            todo += [((*where, "key"), key) for key in value]
            todo += [((*where, key), item) for key, item in value.items()]
        elif isinstance(value, (list, tuple, set)):
            todo += [((*where, index), item) for index, item in enumerate(value)]
        elif isinstance(value, Tensor):
            name = ".".join(map(str, where))
            ordinary = type(value) in (Tensor, nn.Parameter) and value.layout is torch.strided
            if not ordinary or value.device.type != "cpu" or value.is_quantized:
                raise CheckpointError(f"{path}: {name} is no ordinary tensor of numbers")
            if value.numel() * value.element_size() > size:
                raise _damaged(path, f"{name} declares more numbers than the file holds")
            if where[0] in trained and not value.isfinite().all():
                raise CheckpointError(
                    f"{path} holds NaN or infinity in {name}: its training had failed, or it is "
                    "damaged. Use an earlier checkpoint"
                )
        elif not isinstance(value, _PLAIN):
            raise CheckpointError(
                f"{path}: {'.'.join(map(str, where))} is a {type(value).__name__}, expected "
                "tensors and plain values"
            )


def _read_safetensors(path: Path) -> dict:
    """The tensors by name; of a file of `write_safetensors`, a checkpoint's dict."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise CheckpointError(f"{path} needs the package safetensors: pip install it") from None
    try:
        with safe_open(str(path), framework="pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}
            said = (file.metadata() or {}).get(_ABOUT)
    except SafetensorError as error:
        raise CheckpointError(
            f"{path} is not a whole safetensors file: {error}. Copy or download it again and "
            f"compare its size ({path.stat().st_size} bytes here)"
        ) from error
    if said is None:
        return state
    about = json.loads(said)
    if not isinstance(about, dict):
        raise CheckpointError(f"{path}: its metadata {_ABOUT} is no JSON object")
    return {**about, "state_dict": state}


def _first_sentence(error: BaseException) -> str:
    return str(error).strip().split("\n")[0].split(". ")[0] or type(error).__name__


# ------------------------------------------------------------------------------------------------
# Content
# ------------------------------------------------------------------------------------------------


def checksum(content: object) -> str:
    """SHA-256 over names, types, shapes and bytes of everything in nested dicts and lists."""
    digest = hashlib.sha256()

    def add(value: object) -> None:
        if isinstance(value, Tensor):
            value = value.detach().cpu().contiguous()
            digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
            digest.update(value.view(-1).view(torch.uint8).numpy() if value.numel() else b"")
        elif isinstance(value, dict):
            digest.update(f"dict{len(value)}".encode())
            for key, item in value.items():
                digest.update(repr(key).encode())
                add(item)
        elif isinstance(value, (list, tuple)):
            digest.update(f"list{len(value)}".encode())
            for item in value:
                add(item)
        else:
            digest.update(repr(value).encode())

    add(content)
    return digest.hexdigest()


def to_host(content: object) -> object:
    """A copy of nested dicts and lists whose tensors are copies in host memory, row by row
    whatever their memory format was (channels_last), as every reader expects."""
    if isinstance(content, Tensor):
        return content.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
    if isinstance(content, dict):
        return {key: to_host(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return type(content)(to_host(value) for value in content)
    return content


def require_keys(content: dict, keys: Sequence[str], path: str | os.PathLike) -> None:
    """Raise CheckpointError unless a pretraining checkpoint has all `keys`."""
    for key in keys:
        if key not in content:
            raise CheckpointError(f"{path} has no {key!r}, so it is no pretraining checkpoint")


def saved_args(content: dict) -> dict:
    """The arguments in a checkpoint; {} for files of others."""
    args = content.get("args")
    return args if isinstance(args, dict) else {}
