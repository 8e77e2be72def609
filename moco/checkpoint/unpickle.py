"""Detectron2's weight files, which are pickles of numpy arrays, read without running code.

Upstream's detection/convert-pretrain-to-detectron2.py and this project's scripts/convert.py write
{"model": {name: array}, "__author__": str, "matching_heuristics": bool}. Of what a pickle may ask
for, this reader knows the few names by which an array is put together again, and has functions of
its own for them: numpy's are never called, and nothing else is looked up.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path

import torch
from torch import Tensor

_DTYPES = {
    "f2": torch.float16,
    "f4": torch.float32,
    "f8": torch.float64,
    "b1": torch.bool,
    "u1": torch.uint8,
    "i1": torch.int8,
    "i2": torch.int16,
    "i4": torch.int32,
    "i8": torch.int64,
}


class OtherPickle(ValueError):
    """A pickle that was read, and is no weight file; the message goes on from "It holds"."""


class _Dtype:
    """numpy.dtype(code, align, copy); its state has the byte order."""

    def __init__(self, code: str, align: bool = False, copy: bool = False) -> None:
        self.code, self.order = code, "="

    def __setstate__(self, state: tuple) -> None:
        self.order = state[1]


class _Array:
    """numpy.ndarray: empty until its state comes."""

    def __setstate__(self, state: tuple) -> None:
        _version, self.shape, self.dtype, self.by_columns, self.data = state

    def tensor(self) -> Tensor:
        if self.dtype.code not in _DTYPES or self.dtype.order not in ("<", "=", "|"):
            raise OtherPickle(
                f"an array of type {self.dtype.order}{self.dtype.code}; known are little-endian "
                f"{', '.join(_DTYPES)}"
            )
        dtype = _DTYPES[self.dtype.code]
        shape = self.shape[::-1] if self.by_columns else self.shape
        flat = torch.frombuffer(bytearray(self.data), dtype=dtype) if self.data else torch.empty(0)
        tensor = flat.to(dtype).reshape(shape)
        return tensor.permute(*range(tensor.dim())[::-1]) if self.by_columns else tensor


def _reconstruct(kind: type, shape: tuple, typecode: bytes) -> _Array:
    return _Array()


def _frombuffer(data: bytes, dtype: _Dtype, shape: tuple, order: str) -> _Array:
    array = _Array()
    array.__setstate__((1, shape, dtype, order == "F", data))
    return array


def _encode(text: str, encoding: str) -> bytes:
    """How bytes are written by pickle protocol 2; `_no_bytes` where there are none."""
    return text.encode({"latin1": "latin1"}[encoding])


def _no_bytes() -> bytes:
    return b""


_KNOWN = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _encode,
    ("__builtin__", "bytes"): _no_bytes,
    # Numpy 1 and 2 have them in modules of different names; _frombuffer is of pickle protocol 5.
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy.core.numeric", "_frombuffer"): _frombuffer,
    ("numpy._core.numeric", "_frombuffer"): _frombuffer,
}


class _Reader(pickle._Unpickler):
    """The unpickler in Python: the one in C takes memory as a file tells it to."""

    def find_class(self, module: str, name: str) -> object:
        if (module, name) not in _KNOWN:
            raise pickle.UnpicklingError(f"GLOBAL {module}.{name}")
        return _KNOWN[module, name]

    def get_extension(self, code: int) -> None:
        raise pickle.UnpicklingError(f"GLOBAL copyreg.extension.{code}")


def read_arrays(path: Path) -> dict:
    """The content of such a file, with CPU tensors in place of the arrays in `model`.

    Raises:
        OtherPickle: it holds something else.
        pickle.UnpicklingError: it asks for something else ("GLOBAL module.name").
        Exception: of any kind, for a damaged one.
    """
    data = io.BytesIO(path.read_bytes())
    content = _Reader(data).load()
    if data.read(1):
        raise EOFError("something follows its end")
    arrays = content.get("model") if isinstance(content, dict) else None
    if not isinstance(arrays, dict) or not all(isinstance(a, _Array) for a in arrays.values()):
        raise OtherPickle("other things than numpy arrays by name, as detectron2's weight files do")
    return {**content, "model": {name: array.tensor() for name, array in arrays.items()}}
