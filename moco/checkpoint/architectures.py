"""The architecture whose backbone has exactly the names and shapes of a file's tensors."""

from __future__ import annotations

import functools
import os

import torch
from torch import Tensor, nn

from moco.encoders import arch_names, build_encoder, get_head, head_name
from moco.errors import CheckpointError


def fit_arch(state: dict[str, Tensor], arch: object, path: str | os.PathLike) -> nn.Module:
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
