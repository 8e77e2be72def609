"""Memory: what a training step of an encoder takes, from shapes alone, and what the machine has."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from moco import distributed
from moco.errors import TrainingError

META = torch.device("meta")


@dataclass(frozen=True)
class Rehearsal:
    """A step on shapes alone.

    Attributes:
        peak: most bytes at one time of tensors that are made within it, gradients included.
        weights, buffers: bytes of the encoder.
        operations: names of all that is called, forward and backward, as "aten::relu".
    """

    peak: int
    weights: int
    buffers: int
    operations: frozenset[str]


class _Watch(TorchDispatchMode):
    """Counts the bytes of the tensors that are alive, beside those of a module, and notes the
    operations."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self.operations: set[str] = set()
        state = (*module.parameters(), *module.buffers())
        self._known = weakref.WeakSet(tensor.untyped_storage() for tensor in state)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.operations.add(func._schema.name)
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            # Another storage than that of a tensor before it: no view, nor changed in place.
            if isinstance(tensor, Tensor) and tensor.untyped_storage() not in self._known:
                storage = tensor.untyped_storage()
                self._known.add(storage)
                self._change(storage.nbytes())
                weakref.finalize(storage, self._change, -storage.nbytes())
        return out

    def _change(self, size: int) -> None:
        self.alive += size
        self.peak = max(self.peak, self.alive)


class _OnMeta(TorchFunctionMode):
    """New tensors that are filled or drawn have shapes alone. Networks work out widths from those
    that count (torch.arange), which keep their numbers."""

    makers = (torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        return func(*args, **({**kwargs, "device": META} if func in self.makers else kwargs))


def rehearse(
    build: Callable[[], nn.Module],
    images: tuple[int, int, int, int],
    *,
    dtype: torch.dtype = torch.float32,
    directions: int = 1,
    keys: bool = True,
    loss: Callable[[Tensor], Tensor] = torch.sum,
) -> Rehearsal:
    """A step of a query and a key encoder on tensors without numbers: nothing is computed, and no
    random number is drawn.

    Args:
        build: makes the encoder; called where new tensors have no numbers.
        images: (N, 3, H, W) of a batch, or of the part that goes through at a time.
        dtype: of activations: bfloat16 or float16 under mixed precision.
        directions: passes whose activations are kept for one backward, 2 when symmetric, 0 for an
            encoder that does not learn.
        keys: there is a pass without gradient, too.
        loss: a scalar of what the encoder gives, with activations of its own.

    Raises:
        RuntimeError: torch knows no shape of something that the encoder calls, or the images do not
            fit it.
    """
    with _OnMeta():
        encoder = build().train().to(META)
    weights, buffers = (
        sum(t.numel() * t.element_size() for t in tensors)
        for tensors in (encoder.parameters(), encoder.buffers())
    )
    encoder.to(dtype)

    def features() -> Tensor:
        return encoder(torch.empty(images, dtype=dtype, device=META))

    with _Watch(encoder) as watch:
        outputs = [loss(features()) for _ in range(directions)]
        if keys:
            with torch.no_grad():
                features()
        if outputs:
            torch.stack(outputs).sum().backward()
    return Rehearsal(watch.peak, weights, buffers, frozenset(watch.operations))


# ---- Whether the machine has it

# Estimates were up to 15 % off where they were held against runs.
ROOM, _DOUBT = 0.9, 1.2

Verdict = tuple[bool, str] | None  # whether it is impossible, what to say; None where all is well


def shortage(taken: int, memory: Memory | None, device: torch.device, processes: int) -> Verdict:
    """What to say of a step that takes `taken` bytes in `processes` processes that share `memory`;
    the text ends where advice follows."""
    if memory is None or taken <= ROOM * memory.free:
        return None
    text = f"a step takes about {gib(taken)} of memory"
    if processes > 1:
        text += f" in {processes} processes"
    where = "this GPU" if device.type == "cuda" else "this machine"
    text += f", and {gib(memory.free)} of {gib(memory.total)} are free on {where}; "
    return taken > _DOUBT * memory.total, text


def refuse_or_warn(found: Verdict) -> None:
    """On all ranks together, what any of them has found.

    Raises:
        TrainingError: it is impossible.
    """
    judged = [verdict for verdict in distributed.gather_objects(found) if verdict]
    for impossible, text in judged:
        if impossible:
            raise TrainingError(text)
    if judged:
        distributed.print_main(f"warning: {judged[0][1]}")


def gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"


# ---- What the machine has


@dataclass(frozen=True)
class Memory:
    """Bytes of a device: `free` now, and `total`, which is there when nothing else runs."""

    free: int
    total: int


def memory_of(device: torch.device, root: Path = Path("/")) -> Memory | None:
    """The memory of a GPU; on a CPU that of the machine with its swap space, or of the smallest
    control group (container, batch job) around this process. None where nobody tells.

    Args:
        root: of the file system that has /proc and /sys.
    """
    if device.type == "cuda":
        return Memory(*torch.cuda.mem_get_info(device))
    if device.type != "cpu":
        return None
    known = list(_control_groups(root))
    lines = _read(root / "proc/meminfo").splitlines()
    table = {
        name: int(rest.split()[0]) * 1024 for name, _, rest in (x.partition(":") for x in lines)
    }
    if "MemAvailable" in table:
        free = table["MemAvailable"] + table.get("SwapFree", 0)
        known.append(Memory(free, table["MemTotal"] + table.get("SwapTotal", 0)))
    if not known:
        return None
    return Memory(min(m.free for m in known), min(m.total for m in known))


# version: where groups are mounted, limit, use, and what of it is cache that is given back
_CONTROL_GROUPS = {
    2: ("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    1: (
        "sys/fs/cgroup/memory",
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        "total_inactive_file",
    ),
}


def _control_groups(root: Path) -> Iterator[Memory]:
    """The limits of this process's control groups and of those around them."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        mount, limit, use, cache = _CONTROL_GROUPS[1 if controllers else 2]
        inner = PurePosixPath(path.lstrip("/"))
        # In a container the path may be the host's, which is not to be seen here; the mount is.
        for group in {root / mount / inner, *(root / mount / up for up in inner.parents)}:
            most, used = _read(group / limit).strip(), _read(group / use).strip()
            if most.isdigit() and used.isdigit():
                stat = dict(x.split(" ", 1) for x in _read(group / "memory.stat").splitlines())
                free = int(most) - int(used) + int(stat.get(cache, 0))
                yield Memory(max(0, free), int(most))


def _read(path: Path) -> str:
    """The text of a file, "" where there is none."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
