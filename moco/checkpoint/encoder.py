"""Encoders from checkpoint files of any origin."""

from __future__ import annotations

import functools
import os
import re
from pathlib import Path

import torch
from torch import Tensor, nn

from moco.checkpoint.download import check_hash, checked_digits, is_url, read_url
from moco.checkpoint.files import read_checkpoint, saved_args
from moco.checkpoint.layouts import PRETRAINING, find_encoder
from moco.encoders import (
    arch_names,
    build_encoder,
    build_head,
    get_head,
    head_name,
    set_head,
)
from moco.errors import CheckpointError


def load_encoder(
    path: str | os.PathLike, head: str = "none", *, sha256: str | None = None
) -> tuple[nn.Module, dict]:
    """Build the encoder that a checkpoint holds, in eval mode on the CPU, in float32.

    Reads pretraining checkpoints of this project, of MoCo v1/v2 and of moco_align_uniform (of the
    two encoders the query encoder), of MoCo v3 (the base encoder) and SimSiam; linear-evaluation
    checkpoints; state dicts of torchvision and timm, alone or in a training checkpoint; all of them
    also as safetensors; and detectron2's pickles. Architecture, stem and head are found from the
    tensors. Nothing in the file is run.

    Args:
        path: a file, a folder with a model.safetensors as Hugging Face has them, or an http(s)
            address, which is downloaded once into torch's cache; see `moco.checkpoint.read_url`.
        head: "none" for features (N, feature_dim) with Identity as last layer; "projection" for
            the linear or MLP head of contrastive training; "linear" for a trained linear
            classifier.
        sha256: the hash that the file must have, or its first 8 digits or more.

    Returns:
        (encoder, info). info has
        `arch`, `small_stem` and `feature_dim`;
        `epoch` and `objective`: None where the file does not say;
        `layout`: "moco", "moco-v3", "simsiam", "lincls", "timm", "detectron2" or "plain";
        `encoder`: which of the file's encoders this is, by its name there: "encoder_q" of MoCo,
            "base_encoder" of MoCo v3, "encoder" of SimSiam, else None;
        `head`: what the file has at its end: "none", "linear" or "mlp"; `head_use`: the argument
            `head` that gives it: "none", "linear" or "projection";
        `matched`: tensors of the encoder that the file filled, which is all of them;
        `ignored`: that encoder's names in the file that have no place in the one returned;
        `beside`: names of the file's other tensors, such as the momentum encoder's;
        `args`: the command line it was trained by, {} if unknown.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: not a checkpoint, another hash, no known architecture fits (the message
            names what is missing, unexpected or of another shape), or no such head.
        ValueError: no such value of `head` or `sha256`.
    """
    if head not in ("none", "projection", "linear"):
        raise ValueError(f'head must be "none", "projection" or "linear", got {head!r}')
    sha256 = checked_digits(sha256)
    if is_url(path):
        content = read_url(path, sha256)
    else:
        path = Path(path)
        if (path / "model.safetensors").is_file():
            path = path / "model.safetensors"
        content = read_checkpoint(path)
        check_hash(path, sha256, path)
    source = find_encoder(content, path)
    state, layout, args = source.state, source.layout, saved_args(content)
    if all(name.startswith(_HEADS) for name in state):
        raise CheckpointError(
            f"{path} holds a head only ({', '.join(sorted(state)[:3])}), no backbone; expected the "
            "state dict of a whole network, as main_lincls.py writes it, or of its encoder"
        )
    encoder = _fit_arch(state, content.get("arch"), path)

    name = head_name(encoder)
    in_file = {
        key.removeprefix(f"{name}."): value
        for key, value in state.items()
        if key.startswith(f"{name}.")
    }
    kind = _head_kind(in_file, bias=get_head(encoder).bias is not None)
    if layout == "lincls" and kind != "linear":
        layout = "plain"
    use = _head_use(kind, layout)
    if head == "none":
        set_head(encoder, nn.Identity())
    else:
        if head != use:
            has = "no head" if use == "none" else f"a {use} head"
            remedy = '(head="none" gives features)'
            raise CheckpointError(f"{path} has {has}, {head} was asked for {remedy}")
        try:
            set_head(encoder, build_head(in_file, encoder.feature_dim))
        except ValueError as error:
            raise CheckpointError(f"{path}: in its head {name}, {error}") from error
    wanted = encoder.state_dict()
    for key, tensor in wanted.items():
        if key not in state or state[key].shape != tensor.shape:
            found = tuple(state[key].shape) if key in state else "nothing"
            raise CheckpointError(f"{path}: {key} is {found}, expected {tuple(tensor.shape)}")
        if state[key].is_floating_point() != tensor.is_floating_point():
            raise CheckpointError(
                f"{path}: {key} holds {state[key].dtype}, expected {tensor.dtype}"
            )
    for key in wanted:  # in place of a new dict: this one knows the versions of its modules
        wanted[key] = state[key]
    encoder.load_state_dict(wanted)
    encoder.eval()
    info = {
        "arch": encoder.arch,
        "small_stem": encoder.small_stem,
        "epoch": content.get("pretrained_epochs", content.get("epoch")),
        "objective": args.get("objective", content.get("objective")),
        "layout": layout,
        "encoder": source.encoder,
        "head": kind,
        "head_use": use,
        "feature_dim": encoder.feature_dim,
        "matched": len(wanted),
        "ignored": sorted(set(state) - set(wanted)),
        "beside": source.beside,
        "args": args,
    }
    return encoder, info


# Beginnings of names in the last parts of torchvision's networks.
_HEADS = ("fc.", "classifier.", "heads.", "head.")


def _fit_arch(state: dict[str, Tensor], arch: object, path: str | os.PathLike) -> nn.Module:
    """The encoder whose backbone has exactly the names and shapes of `state`, with random weights.

    The name that the file gives is tried first, then all of that kind that `build_encoder` knows.
    """
    named = [arch] if arch in arch_names() else []
    is_resnet = any(key.startswith("layer1.") for key in state)
    if not is_resnet and not any(key.startswith(_OTHER_ARCHS) for key in state):
        rest = []  # trying takes seconds
    else:
        rest = [name for name in arch_names() if ("resne" in name) == is_resnet]
        rest = sorted(set(rest) - set(named), key=lambda name: ("resnet" not in name, name))
    stem = state.get("conv1.weight")
    small = stem is not None and tuple(stem.shape[-2:]) == (3, 3)
    size = _image_size(state)
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    nearest: tuple[tuple, str] = ((False, 0.0), "")
    for name in named + rest:
        for small_stem in (True, False) if small else (False,):
            wanted, head = _backbone_shapes(name, size, small_stem, name in named)
            found = {key: shape for key, shape in shapes.items() if not key.startswith(head)}
            if not wanted:
                continue
            if wanted == found:
                encoder = build_encoder(name, 1, image_size=size, small_stem=small_stem)
                encoder.arch, encoder.small_stem = name, small_stem
                encoder.feature_dim = get_head(encoder).in_features
                return encoder
            shared = len(wanted.items() & found.items()) / len(wanted.keys() | found.keys())
            nearest = max(nearest, ((name in named, shared), _misfit(name, wanted, found)))
    said = f"; it says arch {arch!r}" if arch else ""
    if not (named or rest):
        said += (
            "; expected torchvision's names, as conv1.weight and layer1.0.conv1.weight, which may "
            "stand behind module., model. or encoder_q.: take what else stands before them away"
        )
    raise CheckpointError(
        f"{path}: no known architecture has these {len(state)} tensors (first "
        f"{next(iter(state))}){said}{nearest[1]}"
    )


# Beginnings of names in torchvision's networks other than ResNets.
_OTHER_ARCHS = ("conv_proj.", "features.", "layers.", "stage2.", "stem.")


@functools.lru_cache(maxsize=1024)
def _backbone_shapes(
    arch: str, image_size: int, small_stem: bool, named: bool
) -> tuple[dict[str, tuple], str]:
    """Names and shapes of an encoder without its head, and how the head's names begin; ({}, "")
    where there is no such encoder."""
    # RegNets compute their widths with tensors, which "meta" has none of; they are found when the
    # file names them.
    try:
        with torch.device("cpu" if named and arch.startswith("regnet") else "meta"):
            encoder = build_encoder(arch, 1, image_size=image_size, small_stem=small_stem)
    except (ValueError, NotImplementedError):  # no such stem, size or head; RegNet
        return {}, ""
    head = f"{head_name(encoder)}."
    state = encoder.state_dict()
    return {key: tuple(t.shape) for key, t in state.items() if not key.startswith(head)}, head


def _image_size(state: dict[str, Tensor]) -> int:
    """A ViT's size is in its position embedding; other networks take any size."""
    patches = state.get("conv_proj.weight")
    for key, value in state.items():
        if key.endswith("pos_embedding") and patches is not None and patches.dim() == 4:
            if value.dim() == 3 and value.numel():
                return round((value.shape[1] - 1) ** 0.5) * patches.shape[-1]
    return 224


def _misfit(arch: str, wanted: dict[str, tuple], found: dict[str, tuple]) -> str:
    """In what a file differs from the architecture that it names, or that is nearest."""
    missing = [key for key in wanted if key not in found]
    unexpected = [key for key in found if key not in wanted]
    other = [
        f"{key} is {found[key]}, expected {wanted[key]}"
        for key in wanted
        if key in found and found[key] != wanted[key]
    ]
    parts = [
        f"{len(what)} {word} ({', '.join(what[:3])}{', ...' if len(what) > 3 else ''})"
        for word, what in (
            ("missing", missing), ("unexpected", unexpected), ("of another shape", other)
        )
        if what
    ]  # fmt: skip
    return f". Against {arch}: {'; '.join(parts)}"


def _head_kind(head: dict[str, Tensor], bias: bool) -> str:
    """What the file has at the end; `bias`: whether the last layer of this arch has one."""
    if head.keys() == ({"weight", "bias"} if bias else {"weight"}):
        return "linear"
    if head and all(_IN_MLP.fullmatch(name) for name in head):
        return "mlp"
    return "none"


_IN_MLP = re.compile(r"[0-9]{1,3}\.(weight|bias|running_mean|running_var|num_batches_tracked)")


def _head_use(kind: str, layout: str) -> str:
    """One linear layer is a projection in pretraining files, a classifier in the others."""
    if kind == "linear" and layout not in PRETRAINING:
        return "linear"
    return "none" if kind == "none" else "projection"
