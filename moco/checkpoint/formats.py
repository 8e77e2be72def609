"""Readers of checkpoint formats: torch's zip, its old one, detectron2's pickles, safetensors.

Pickles are read as data (`moco.pickles`), never by an unpickler, so nothing in a file is run and
every tensor is a view of bytes that the file really has.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from moco.checkpoint.refusals import RESAVE, UNPACK, damaged, not_a_checkpoint
from moco.errors import CheckpointError
from moco.pickles import PERSISTENT, TENSORS, Call, Inert, Values, numpy_type, parse

# Storage classes of torch, by name.
_STORAGES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "UntypedStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
}
_ARRAYS = ("f2", "f4", "f8", "b1", "u1", "i1", "i2", "i4", "i8")  # numpy's codes
_DTYPES = {str(dtype): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}


def _tensor_maker(
    storage: Callable[[str, torch.dtype, int], Tensor] | None = None,
) -> Callable[[Call, Values], object]:
    """A function for `Values`; `storage(key, dtype, count)` gives the numbers of tensors, flat."""

    def base(node: object) -> Tensor:
        if not isinstance(node, Call) or node.name != PERSISTENT or storage is None:
            raise ValueError("a tensor without numbers")
        _, kind, key, _, count, *view = node.args[0]
        flat = storage(str(key), _STORAGES[kind.name.rpartition(".")[2]], int(count))
        if view and view[0] is not None:  # of torch 0.3: a part of another storage
            _, start, count = view[0]
            flat = flat[start : start + count]
        return flat

    def make(call: Call, values: Values) -> object:
        name, args = call.name.rpartition(".")[2], call.args
        if name.startswith("_rebuild_parameter"):
            return values.plain(args[0])
        if name == "_rebuild_from_type_v2":
            function, _, inner, _ = args
            if function.name not in TENSORS:
                raise ValueError(f"a tensor made by {function.name}")
            return values.plain(Call(function.name, inner))
        if name == "_reconstruct":
            _, shape, kind, by_columns, data = call.state
            return _array(data, kind, shape, by_columns, values)
        if name == "_frombuffer":
            data, kind, shape, order = args
            return _array(data, kind, shape, order == "F", values)
        flat = base(args[0])
        if name == "_rebuild_tensor_v3":
            flat = flat.view(_DTYPES[args[6].name])
        offset, shape, strides = (values.plain(arg) for arg in args[1:4])
        return flat.as_strided(shape, strides, flat.storage_offset() + offset)

    return make


def _array(
    data: object, kind: object, shape: tuple, by_columns: bool, values: Values
) -> Tensor | Inert:
    order, code = numpy_type(kind)
    if code not in _ARRAYS or order not in ("<", "=", "|"):
        return Inert(f"<an array of type {order}{code}>")
    data = values.plain(data)
    data = data.encode("latin1") if isinstance(data, str) else data
    values.charge(len(data))
    flat = np.frombuffer(bytearray(data), code)
    return torch.from_numpy(flat.reshape(shape, order="F" if by_columns else "C"))


def read_zip(path: Path) -> object:
    """What torch.save has written since torch 1.6.

    torch.load does not look at the archive's CRCs; here each part is checked as it is read, and
    before anything is unpacked, whether the directory declares more than the file can hold.
    """
    with zipfile.ZipFile(path) as archive:
        folder = _checked_folder(archive, path)
        parts = {}
        for entry in archive.infolist():
            try:
                with archive.open(entry) as part:
                    parts[entry.filename] = data = bytearray(entry.file_size)
                    if part.readinto(data) < entry.file_size or part.read(1):
                        raise zipfile.BadZipFile
            except (zipfile.BadZipFile, EOFError) as error:
                raise damaged(path, f"wrong checksum in {entry.filename}") from error
    if parts.get(f"{folder}byteorder", b"little") != b"little":
        raise CheckpointError(f"{path} {_BIG_ENDIAN}")
    flat: dict[str, Tensor] = {}

    def storage(key: str, dtype: torch.dtype, count: int) -> Tensor:
        data = parts[f"{folder}data/{key}"]
        if count * dtype.itemsize != len(data):
            raise ValueError(
                f"it declares {count} numbers in data/{key}, which has {len(data)} bytes"
            )
        if key not in flat:
            flat[key] = torch.frombuffer(data, dtype=torch.uint8) if data else _NOTHING
        return flat[key].view(dtype)

    with io.BytesIO(parts.pop(f"{folder}data.pkl")) as file:
        values = Values(path.stat().st_size, _tensor_maker(storage))
        return values.plain(parse(file))


_BIG_ENDIAN = "was written by a big-endian machine; save it on another one"
_NOTHING = torch.empty(0, dtype=torch.uint8)


def _checked_folder(archive: zipfile.ZipFile, path: Path) -> str:
    """The folder in the archive that holds data.pkl, "NAME/"."""
    size = path.stat().st_size
    entries = archive.infolist()
    names = [entry.filename for entry in entries]
    pickles = [name for name in names if name.endswith("/data.pkl")]
    if not pickles:
        what = f"is a zip archive of other things ({', '.join(names[:3]) or 'none'})"
        raise not_a_checkpoint(path, what, UNPACK)
    if any(name.endswith("/constants.pkl") for name in names):
        raise not_a_checkpoint(
            path,
            "is a TorchScript program, which is code",
            "If you trust its author: torch.save(torch.jit.load(FILE).state_dict(), NEW)",
        )
    declared = sum(entry.file_size for entry in entries)
    if declared > size or any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise not_a_checkpoint(
            path,
            f"is a compressed zip archive, which torch.save never writes: {size} bytes that "
            f"would become {declared}, perhaps to fill the memory",
            "If you trust its author: unpack it, and pack it again with zip -0 -r",
        )
    if len(set(names)) < len(names) or min(entry.header_offset for entry in entries):
        raise damaged(path, "its zip directory is not one that torch.save writes")
    return pickles[0].removesuffix("data.pkl")


def is_whole_zip(path: Path) -> bool:
    """Whether every part of a file of torch.save has the CRC that the archive's directory says."""
    try:
        with zipfile.ZipFile(path) as archive:
            _checked_folder(archive, path)
            return archive.testzip() is None
    except (CheckpointError, zipfile.BadZipFile, OSError, ValueError):
        return False


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


def read_old(path: Path) -> object:
    """What torch.save wrote before: five pickles, then the numbers of each storage."""
    size = path.stat().st_size
    flat: dict[str, Tensor] = {}
    left = size

    def storage(key: str, dtype: torch.dtype, count: int) -> Tensor:
        nonlocal left
        if key not in flat:
            left -= count * dtype.itemsize
            if count < 0 or left < 0:
                raise ValueError("it declares more numbers than the file holds")
            flat[key] = torch.empty(count, dtype=dtype)  # filled below
        if flat[key].dtype is not dtype:
            raise ValueError(f"storage {key} has two types")
        return flat[key]

    with open(path, "rb") as file:
        values = Values(size, _tensor_maker(storage))
        _magic, _protocol, system = (values.plain(parse(file)) for _ in range(3))
        if not system["little_endian"]:
            raise CheckpointError(
                f"{path} was written by a big-endian machine; torch.load it there"
            )
        content = values.plain(parse(file))
        keys = [str(key) for key in values.plain(parse(file))]
        if sorted(keys) != sorted(flat):
            raise ValueError("its list of storages is not that of its tensors")
        for key in keys:
            count = int.from_bytes(file.read(8), "little")
            data = flat[key].view(torch.uint8).numpy()
            if count != len(flat[key]) or file.readinto(data) < len(data):
                raise EOFError(f"storage {key} is not whole")
        if file.read(1):
            raise damaged(path, "something follows its last tensor")
    return content


def read_arrays(path: Path) -> dict:
    """Detectron2's weight files: {"model": {name: array}, "__author__": str, ...} as upstream's
    convert-pretrain-to-detectron2.py and this project's scripts/convert.py write it."""
    with open(path, "rb") as file:
        content = Values(path.stat().st_size, _tensor_maker()).plain(parse(file))
        if file.read(1):
            raise damaged(path, "something follows its end")
    arrays = content.get("model") if isinstance(content, dict) else None
    if isinstance(arrays, dict):
        for array in arrays.values():
            if isinstance(array, Inert) and array.startswith("<an array"):
                what = f"is a pickle that holds {array[1:-1]}; known are little-endian "
                raise not_a_checkpoint(path, what + ", ".join(_ARRAYS), RESAVE)
    if not isinstance(arrays, dict) or not all(isinstance(a, Tensor) for a in arrays.values()):
        what = "is a pickle that holds other things than numpy arrays by name"
        raise not_a_checkpoint(path, f"{what}, as detectron2's weight files do", RESAVE)
    return content


# In a safetensors file of this project: JSON of what a checkpoint says beside its tensors.
ABOUT = "moco_align_uniform"


def read_safetensors(path: Path) -> dict:
    """The tensors by name; of a file of `write_safetensors`, a checkpoint's dict."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise CheckpointError(f"{path} needs the package safetensors: pip install it") from None
    try:
        with safe_open(str(path), framework="pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}
            said = (file.metadata() or {}).get(ABOUT)
    except SafetensorError as error:
        raise CheckpointError(
            f"{path} is not a whole safetensors file: {error}. Copy or download it again and "
            f"compare its size ({path.stat().st_size} bytes here)"
        ) from error
    if said is None:
        return state
    about = json.loads(said)
    if not isinstance(about, dict):
        raise CheckpointError(f"{path}: its metadata {ABOUT} is no JSON object")
    return {**about, "state_dict": dict(sorted(state.items()))}  # in the checksum's order
