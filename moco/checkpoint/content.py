"""What a checkpoint holds: checks of its values, a checksum over them, a copy in host memory."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from moco.checkpoint.refusals import RESAVE, damaged, not_a_checkpoint
from moco.errors import CheckpointError


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


_PLAIN = (str, int, float, bytes, type(None), torch.device, torch.dtype)
_MOST_VALUES, _DEEPEST = 200_000, 50  # far above any checkpoint's


def check_content(content: object, size: int, path: Path) -> None:
    """Refuse what would break later: other than tensors and plain values, tensors larger than the
    file, endless nesting, and numbers that are not finite in what is trained."""
    if not isinstance(content, dict):
        what = f"holds a {type(content).__name__} instead of a dict"
        raise not_a_checkpoint(path, what, RESAVE)
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
                raise damaged(path, f"{name} declares more numbers than the file holds")
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
