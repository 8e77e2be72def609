"""Checkpoint files: written whole or not at all, read without running code, understood whoever
wrote them.

A pretraining checkpoint is a plain dict of tensors, numbers, strings, lists and dicts:

    version     1
    arch        name for `build_encoder`
    epoch       finished epochs
    step        optimizer steps since the start of the run; step_in_epoch of them in this epoch
    state_dict  of MoCo, names prefixed "module." as upstream's are
    optimizer   state dict;  scaler: of the fp16 gradient scaler, else None
    shuffle_generator  state of the key shuffle;  rng: torch's generator state of every rank
    args        the command line
"""

from __future__ import annotations

import os
import pickle
import re
import zipfile
from pathlib import Path

import torch
from torch import Tensor, nn

from moco.encoders import (
    ProjectionHead,
    arch_names,
    build_encoder,
    get_head,
    head_name,
    set_head,
)

FORMAT_VERSION = 1


class CheckpointError(ValueError):
    """A file that is not what it should be; the message names the file and what was expected."""


# ------------------------------------------------------------------------------------------------
# Files
# ------------------------------------------------------------------------------------------------


def write_checkpoint(path: str | os.PathLike, content: dict) -> None:
    """Write a checkpoint atomically: after a crash at any moment the file is whole or not there."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(content, file)
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


def read_checkpoint(path: str | os.PathLike) -> dict:
    """Read a checkpoint or state dict of any origin onto the CPU, without running code from it.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: not a checkpoint, damaged, or one that wants to run code.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such checkpoint: {path}")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()  # torch.load itself does not look at the CRCs
            if damaged:
                raise CheckpointError(f"{path} is damaged: wrong checksum in {damaged}")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is not a checkpoint that can be read safely (weights_only=True): "
            f"{_first_sentence(error)}"
        ) from error
    except (RuntimeError, EOFError, OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"{path} is not a checkpoint, or is truncated: {_first_sentence(error)}"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{path} holds a {type(content).__name__}, expected a dict of tensors"
        )
    return content


def _read_safetensors(path: Path) -> dict:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError:
        raise CheckpointError(f"{path} needs the package safetensors: pip install it") from None
    try:
        return load_file(str(path))
    except SafetensorError as error:
        raise CheckpointError(f"{path} is not a whole safetensors file: {error}") from error


def _first_sentence(error: BaseException) -> str:
    return str(error).strip().split("\n")[0].split(". ")[0] or type(error).__name__


# ------------------------------------------------------------------------------------------------
# Run folders
# ------------------------------------------------------------------------------------------------

_EPOCH_NAME = re.compile(r"checkpoint_(\d{4,})\.pth\.tar")
_STEP_NAME = re.compile(r"step_(\d{8,})\.pth\.tar")


def epoch_path(folder: Path, epoch: int) -> Path:
    """File of the 0-based finished `epoch`."""
    return folder / f"checkpoint_{epoch:04d}.pth.tar"


def step_path(folder: Path, step: int) -> Path:
    """File of a save within an epoch, after `step` optimizer steps."""
    return folder / f"step_{step:08d}.pth.tar"


def run_checkpoints(folder: str | os.PathLike) -> list[Path]:
    """Checkpoints of a run folder, the oldest first, by the time they were written."""
    paths = [
        path
        for path in Path(folder).glob("*.pth.tar")
        if _EPOCH_NAME.fullmatch(path.name) or _STEP_NAME.fullmatch(path.name)
    ]
    return sorted(paths, key=lambda path: (path.stat().st_mtime_ns, path.name))


def prune_checkpoints(folder: Path, *, keep_last: int, keep_every: int) -> None:
    """Delete all but the newest `keep_last` and those of every `keep_every`-th epoch (0: none)."""
    for path in run_checkpoints(folder)[:-keep_last]:
        epoch = _EPOCH_NAME.fullmatch(path.name)
        if not (epoch and keep_every and (int(epoch[1]) + 1) % keep_every == 0):
            path.unlink()


# ------------------------------------------------------------------------------------------------
# Encoders from files of any origin
# ------------------------------------------------------------------------------------------------


def load_encoder(path: str | os.PathLike, head: str = "none") -> tuple[nn.Module, dict]:
    """Build the encoder that a checkpoint holds, in eval mode on the CPU.

    Reads pretraining checkpoints of this project, of upstream MoCo v1/v2 and of
    moco_align_uniform (the query encoder), linear-evaluation checkpoints, and plain torchvision
    state dicts, also as safetensors. Architecture, stem and head are found from the tensors.

    Args:
        path: the file.
        head: "none" for features (N, feature_dim) with Identity as last layer; "projection" for
            MoCo's linear or MLP head; "linear" for a trained linear classifier.

    Returns:
        (encoder, info). info has `arch`, `small_stem`, `epoch` and `objective` (None where the
        file does not say), `layout` ("moco", "lincls" or "plain"), `head` (what the file has:
        "none", "linear" or "mlp"), `feature_dim`, `matched` (tensors of the encoder that the file
        filled, which is all of them), `ignored` (names in the file that have no place in the
        encoder) and `args` (the command line it was trained by, {} if unknown).

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: not a checkpoint, no known architecture fits, or no such head.
    """
    if head not in ("none", "projection", "linear"):
        raise ValueError(f'head must be "none", "projection" or "linear", got {head!r}')
    content = read_checkpoint(path)
    state, layout = _encoder_state(content, path)
    args = content.get("args") if isinstance(content.get("args"), dict) else {}
    encoder = _fit_arch(state, content.get("arch"), path)

    name = head_name(encoder)
    in_file = {key: value for key, value in state.items() if key.startswith(f"{name}.")}
    kind = _head_kind(in_file, name)
    if head == "none":
        set_head(encoder, nn.Identity())
    else:
        _check_head(head, kind, layout, path)
        set_head(encoder, _head_like(in_file, name, kind))
    wanted = encoder.state_dict()
    missing = sorted(set(wanted) - set(state))
    if missing:
        raise CheckpointError(f"{path} lacks {len(missing)} tensors, first {missing[0]}")
    encoder.load_state_dict({key: state[key] for key in wanted})
    encoder.eval()
    info = {
        "arch": encoder.arch,
        "small_stem": encoder.small_stem,
        "epoch": content.get("epoch"),
        "objective": args.get("objective"),
        "layout": layout,
        "head": kind,
        "feature_dim": encoder.feature_dim,
        "matched": len(wanted),
        "ignored": sorted(set(state) - set(wanted)),
        "args": args,
    }
    return encoder, info


def _encoder_state(content: dict, path: str | os.PathLike) -> tuple[dict[str, Tensor], str]:
    """The tensors of the (query) encoder with torchvision's names, and the layout they were in."""
    state = content.get("state_dict", content)
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: state_dict is a {type(state).__name__}, expected a dict")
    state = {
        str(key).removeprefix("module."): value
        for key, value in state.items()
        if isinstance(value, Tensor)
    }
    query = {
        key.removeprefix("encoder_q."): value
        for key, value in state.items()
        if key.startswith("encoder_q.")
    }
    if query:
        return query, "moco"
    if not state:
        raise CheckpointError(f"{path} holds no tensors by name; expected an encoder's state dict")
    return state, "lincls" if "state_dict" in content else "plain"


def _fit_arch(state: dict[str, Tensor], arch: str | None, path: str | os.PathLike) -> nn.Module:
    """The encoder whose backbone has exactly the names and shapes of `state`, with random weights.

    The name that the file gives is tried first, then all that `build_encoder` knows.
    """
    named = [arch] if arch in arch_names() else []
    rest = sorted(set(arch_names()) - set(named), key=lambda name: ("resnet" not in name, name))
    # A vit's size is in its position embedding; other networks take any size.
    size = 224
    for key, value in state.items():
        if key.endswith("pos_embedding"):
            size = round((value.shape[1] - 1) ** 0.5) * state["conv_proj.weight"].shape[-1]
    stem = state.get("conv1.weight")
    small = stem is not None and tuple(stem.shape[-2:]) == (3, 3)
    shapes = {key: value.shape for key, value in state.items()}
    for name in named + rest:
        for small_stem in (True, False) if small else (False,):
            options = {"num_classes": 1, "image_size": size, "small_stem": small_stem}
            try:
                # Names and shapes only. (RegNets compute their widths with tensors, which "meta"
                # has none of; they are found when the file names them.)
                with torch.device("cpu" if name in named else "meta"):
                    candidate = build_encoder(name, **options)
            except (ValueError, NotImplementedError):  # no such stem, size or head; RegNet
                continue
            head = head_name(candidate) + "."
            backbone = {
                key: value.shape
                for key, value in candidate.state_dict().items()
                if not key.startswith(head)
            }
            found = {key: shape for key, shape in shapes.items() if not key.startswith(head)}
            if backbone == found:
                encoder = build_encoder(name, **options)
                encoder.arch, encoder.small_stem = name, small_stem
                encoder.feature_dim = get_head(encoder).in_features
                return encoder
    said = f"; it says arch {arch!r}" if arch else ""
    raise CheckpointError(
        f"{path}: no known architecture has these {len(state)} tensors "
        f"(first {next(iter(state))}){said}"
    )


def _head_kind(head: dict[str, Tensor], name: str) -> str:
    names = {key.removeprefix(f"{name}.") for key in head}
    if names == {"weight", "bias"}:
        return "linear"
    if names == {"0.weight", "0.bias", "2.weight", "2.bias"}:
        return "mlp"
    return "none"


def _check_head(head: str, kind: str, layout: str, path: str | os.PathLike) -> None:
    """A projection head lies in MoCo files, a linear classifier in the others."""
    wanted = "projection" if layout == "moco" else "linear"
    if kind == "none" or head != wanted:
        has = "no head" if kind == "none" else f"a {wanted} head"
        remedy = ' (head="none" gives features)'
        raise CheckpointError(f"{path} has {has}, {head} was asked for{remedy}")


def _head_like(head: dict[str, Tensor], name: str, kind: str) -> nn.Module:
    if kind == "linear":
        out_features, in_features = head[f"{name}.weight"].shape
        return nn.Linear(in_features, out_features)
    out_features, in_features = head[f"{name}.2.weight"].shape
    return ProjectionHead(in_features, nn.Linear(in_features, out_features))
