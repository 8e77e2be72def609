"""The architecture whose backbone has exactly the names and shapes of a file's tensors."""

from __future__ import annotations

import functools
import re
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from moco.alexnet import chain_image_size, chain_names, parse_chain
from moco.encoders import arch_names, build_encoder, get_head, head_name, is_arch

# The first convolution of torchvision's and this project's networks, and who has it.
STEMS = {
    "conv1.weight": r"resnet|resnext|wide_resnet",
    "conv1.0.weight": r"shufflenet|small_alexnet|depth_cnn",
    "conv_proj.weight": r"vit_",
    "features.0.weight": r"alexnet|vgg",
    "features.0.0.weight": r"convnext|efficientnet|mobilenet|swin",
    "features.conv0.weight": r"densenet",
    "stem.0.weight": r"regnet",
    "stem.0.0.weight": r"maxvit",
    "layers.0.weight": r"mnasnet",
}
# First parts of the names of what trainers put beside a backbone's own.
_BESIDE = re.compile(r"(proj|pred|proto|head|classif|queue|neck|mlp|fc)", re.IGNORECASE)


class Fit(NamedTuple):
    """How tensors fit: to which architecture, or to which not."""

    arch: str  # "": none was tried
    state: dict[str, Tensor]  # by the architecture's names
    small_stem: bool = False
    image_size: int = 224
    misfit: str = ""  # "": all of the backbone's names and shapes are there, and no others
    shared: float = 0.0  # part of names and shapes that are the same

    def build(self) -> nn.Module:
        """The encoder, with random weights."""
        encoder = build_encoder(
            self.arch, 1, image_size=self.image_size, small_stem=self.small_stem
        )
        encoder.arch, encoder.small_stem = self.arch, self.small_stem
        encoder.feature_dim = get_head(encoder).in_features
        return encoder


def fit_arch(state: dict[str, Tensor], arch: object) -> Fit:
    """The first architecture whose backbone has exactly the names and shapes of `state`; else the
    one that the file names, or that is nearest, with its `misfit`.

    Nothing larger than `state` is made: the networks that are tried have no weights.

    Args:
        state: tensors by torchvision's names, or with numbers for the children of the network.
        arch: the name that the file gives, which is tried first.
    """
    size = _image_size(state)
    stem = state.get("conv1.weight", state.get("0.weight"))
    small = stem is not None and tuple(stem.shape[-2:]) == (3, 3)
    best = Fit("", state)
    for name in _candidates(state, arch):
        for small_stem in (True, False) if small else (False,):
            wanted, head = _backbone_shapes(name, size, small_stem)
            if not wanted:
                continue
            named = _by_children(state, wanted, head)
            first = {key.partition(".")[0] for key in (*wanted, head)}
            found = {
                key: tuple(tensor.shape)
                for key, tensor in named.items()
                if not key.startswith(head)
                and (key.partition(".")[0] in first or not _BESIDE.match(key))
            }
            if wanted == found:
                return Fit(name, named, small_stem, size)
            shared = len(wanted.items() & found.items()) / len(wanted.keys() | found.keys())
            misfit = _misfit(name, wanted, found)
            best = max(
                best,
                Fit(name, named, small_stem, size, misfit, shared),
                key=lambda fit: (fit.arch == arch, fit.shared),
            )
    return best


def _candidates(state: dict[str, Tensor], arch: object) -> list[str]:
    """Architectures with the first convolution of `state`, the named one first, then the small."""
    first = min((key.partition(".")[0] for key in state if key[0].isdigit()), default="", key=int)
    families = [
        family
        for stem, family in STEMS.items()
        if stem in state or (first and f"{first}.{stem.partition('.')[2]}" in state)
    ]
    if not families and "layer1.0.conv1.weight" in state:
        families = [STEMS["conv1.weight"]]
    names = [name for name in arch_names() if families and re.match("|".join(families), name)]
    names += chain_names(state)
    if is_arch(arch) and (not names or parse_chain(arch)):
        names.append(arch)

    def cost(name: str) -> tuple:
        return name != arch, not name.startswith("resnet"), int(re.search(r"\d+|$", name)[0] or 0)

    return sorted(names, key=cost)


class _WithoutWeights(TorchFunctionMode):
    """Parameters get shapes and take no memory; what a constructor computes is computed."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.empty:
            kwargs = {**kwargs, "device": "meta"}
        return function(*args, **kwargs)


@functools.lru_cache(maxsize=1024)
def _backbone_shapes(
    arch: str, image_size: int, small_stem: bool
) -> tuple[dict[str, tuple[int, ...]], str]:
    """Names and shapes of an encoder without its head, and how the head's names begin; ({}, "")
    where there is no such encoder."""
    try:
        with _WithoutWeights():
            encoder = build_encoder(arch, 1, image_size=image_size, small_stem=small_stem)
    except ValueError:  # no such stem, size or head
        return {}, ""
    head = f"{head_name(encoder)}."
    state = encoder.state_dict()
    return {key: tuple(t.shape) for key, t in state.items() if not key.startswith(head)}, head


def _by_children(
    state: dict[str, Tensor], wanted: dict[str, tuple], head: str
) -> dict[str, Tensor]:
    """`state` with the names of the network's children where it has numbers, as a Sequential of
    them has. Children without tensors have numbers too, so the order counts and not the number."""
    if not all(key.partition(".")[0].isdigit() for key in state):
        return state
    numbers = sorted({key.partition(".")[0] for key in state}, key=int)
    children = list(dict.fromkeys(key.partition(".")[0] for key in (*wanted, head)))
    if len(numbers) not in (len(children), len(children) - 1):
        return state
    names = dict(zip(numbers, children, strict=False))
    split = ((key.partition("."), tensor) for key, tensor in state.items())
    return {f"{names[number]}.{rest}": tensor for (number, _, rest), tensor in split}


def _image_size(state: dict[str, Tensor]) -> int:
    """A ViT's size is in its position embedding, a chain's in its fc6; other networks take any."""
    size = chain_image_size(state)
    if size is not None:
        return size
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
    words = {"missing": missing, "unexpected": unexpected, "of another shape": other}
    parts = [
        f"{len(what)} {word} ({', '.join(what[:3])}{', ...' if len(what) > 3 else ''})"
        for word, what in words.items()
        if what
    ]
    return f". Against {arch}: {'; '.join(parts)}"
