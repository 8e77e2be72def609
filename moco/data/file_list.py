"""Lists of names and of numbers, for millions of images, in memory that loader processes share.

A list of Python objects is copied, page by page, into each process that only looks at it, because
looking at an object writes its reference count: 165 MiB for each part of ImageNet's paths. Here all
is in a few tensors, which forked processes never write to, and which torch hands to spawned ones as
shared memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from moco.errors import DataError


class Numbers(Sequence[int]):
    """Whole numbers below 2^63; equal to any sequence of the same numbers."""

    def __init__(self, values: Iterable[int] | Tensor) -> None:
        """
        Args:
            values: an int64 tensor is taken as it is.
        """
        if not isinstance(values, Tensor):
            values = torch.tensor(list(values), dtype=torch.int64)
        self._values = values

    def __len__(self) -> int:
        return len(self._values)

    def __getitem__(self, index: int | slice) -> int | list[int]:
        return self._values[index].tolist()

    def __iter__(self) -> Iterator[int]:
        return iter(self._values.tolist())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)


class Names(Sequence[str]):
    """Strings in one buffer, each after the same `prefix`; equal to any sequence of the same."""

    def __init__(self, groups: Iterable[Sequence[str]], prefix: str = "") -> None:
        """
        Args:
            groups: names, some at a time; none of them has a NUL in it.
        """
        self.prefix = prefix
        buffer, count = bytearray(), 0
        for names in groups:
            count += len(names)
            buffer += packed(names)
        self._bytes = torch.frombuffer(buffer or bytearray(1), dtype=torch.uint8)[: len(buffer)]
        self._ends = (self._bytes == 0).nonzero().flatten()
        if len(self._ends) != count:
            raise DataError(f"a name in {prefix or 'the data'} has a NUL character in it")

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        end = self._ends[index].item()
        index += len(self) if index < 0 else 0
        start = self._ends[index - 1].item() + 1 if index else 0
        return self.prefix + _text(self._bytes[start:end].numpy())

    def __iter__(self) -> Iterator[str]:
        return (self.prefix + name for name in self.without_prefix())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    def without_prefix(self) -> list[str]:
        """All of them, as `groups` gave them."""
        return unpacked(self._bytes.numpy())


def packed(names: Sequence[str]) -> bytes:
    """Names that have no NUL, each with one behind it."""
    return "\0".join([*names, ""]).encode("utf-8", "surrogateescape")


def unpacked(data: np.ndarray) -> list[str]:
    """The names that are `packed` in an array of uint8."""
    return _text(data).split("\0")[:-1]


def _text(data: np.ndarray) -> str:
    return data.tobytes().decode("utf-8", "surrogateescape")
