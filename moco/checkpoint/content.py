"""What a checkpoint holds: checks of its values, a checksum over them, a copy in host memory."""

from __future__ import annotations

import hashlib
import math
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from moco.checkpoint.refusals import damaged
from moco.errors import CheckpointError
from moco.printable import printable


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


def same_tensors(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def require_keys(content: dict, keys: Sequence[str], path: str | os.PathLike) -> None:
    """Raise CheckpointError unless a pretraining checkpoint has all `keys`."""
    for key in keys:
        if key not in content:
            raise CheckpointError(f"{path} has no {key!r}, so it is no pretraining checkpoint")


def saved_args(content: dict) -> dict:
    """The arguments in a checkpoint; {} for files of others."""
    args = content.get("args")
    return args if isinstance(args, dict) else {}


def shown(value: object) -> object:
    """What a file says of itself, for people: of text what can be printed in one line."""
    return printable(value) if isinstance(value, str) else value


def check_content(content: dict, path: Path, *, finite: bool = True) -> None:
    """Refuse tensors that are larger than the file and, if `finite`, numbers in what is trained
    that are not finite and variances below zero."""
    size = path.stat().st_size
    trained = content
    if "state_dict" in content:
        trained = ("state_dict", "state_dict_ema", "optimizer")
    total = 0
    for keys, tensor in _tensors(content):
        name = ".".join(map(str, keys))
        total += tensor.nbytes
        if tensor.nbytes > size:
            raise damaged(path, f"{name} declares more numbers than the file holds")
        if total > _MOST_SHARING * size:
            raise damaged(path, "its tensors together declare more numbers than the file holds")
        if not finite or keys[0] not in trained:
            continue
        lowest, highest = _range(tensor)
        if not (math.isfinite(lowest) and math.isfinite(highest)):
            raise CheckpointError(
                f"{path} holds NaN or infinity in {name}: its training had failed, or it is "
                "damaged. Use an earlier checkpoint"
            )
        if _is_variance(name) and lowest < 0:
            raise CheckpointError(
                f"{path} holds a variance below zero in {name}: it is damaged. Use an earlier "
                "checkpoint"
            )


def warn_of_numbers(state: dict[str, Tensor], path: str | os.PathLike) -> None:
    """One warning that names the tensors of an encoder that no training leaves: weights or
    variances that are all zero, or absurdly large ones."""
    zero, large = [], []
    for name, tensor in state.items():
        lowest, highest = _range(tensor)
        size = max(-lowest, highest)
        is_weight = name.endswith("weight") and tensor.dim() > 1
        if not size and (_is_variance(name) or is_weight) and tensor.numel():
            zero.append(name)
        if tensor.is_floating_point() and size > largest_sane(name):
            large.append(f"{name} (up to {size:.0e})")
    for names, what in ((zero, "nothing but zeros"), (large, "absurdly large numbers")):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            text = f"{path} holds {what} in {', '.join(names[:3])}{more}: it is damaged, or its "
            warnings.warn(printable(text + "training had failed"), stacklevel=4)


def largest_sane(name: str) -> float:
    """No training that works leads a weight, or a running variance, above this number."""
    return 1e12 if _is_variance(name) else 1e6


def _is_variance(name: str) -> bool:
    return name.endswith("running_var")


_MOST_SHARING = 4  # tied weights lie in a file once; so do tensors made to fill the memory


def _tensors(value: object, keys: tuple = ()) -> Iterator[tuple[tuple, Tensor]]:
    """Every tensor in nested dicts and lists, with the keys that lead there."""
    if isinstance(value, Tensor):
        yield keys, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _tensors(item, (*keys, key))
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _tensors(item, (*keys, index))


def _range(tensor: Tensor) -> tuple[float, float]:
    """The lowest and highest number, in one pass; NaN where there is one; 0 where there is none."""
    if not tensor.numel() or tensor.dtype is torch.bool:
        return 0.0, 0.0
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    elif tensor.is_floating_point() and tensor.dtype not in _WITH_RANGE:
        tensor = tensor.float()
    elif not tensor.is_floating_point() and tensor.element_size() > 1 and not tensor.is_signed():
        return 0.0, 0.0  # uint16 to uint64, which torch has few operations for
    lowest, highest = torch.aminmax(tensor)
    return float(lowest), float(highest)


_WITH_RANGE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
