"""Encoders: torchvision's classifiers, small CIFAR ResNets, the paper's chains; heads and stems.

State-dict names are torchvision's throughout, whatever stem or batch norm is chosen, so weights
move freely between this project and torchvision.
"""

from __future__ import annotations

import difflib

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

from moco.alexnet import CHAINS, Chain, build_chain, parse_chain
from moco.batch_norm import split_batch_norm


def arch_names() -> list[str]:
    """Names that `build_encoder` takes; those of `CHAINS` also with a width, small_alexnetx0.25."""
    classifiers = torchvision.models.list_models(module=torchvision.models)
    return sorted([*classifiers, *_CIFAR_RESNETS, *CHAINS])


def is_arch(arch: object) -> bool:
    """Whether `build_encoder` knows a network of this name."""
    return isinstance(arch, str) and (arch in arch_names() or parse_chain(arch) is not None)


def build_encoder(
    arch: str,
    num_classes: int,
    *,
    image_size: int = 224,
    small_stem: bool = False,
    bn_splits: int = 1,
) -> nn.Module:
    """A classification network with random weights and a last linear layer of `num_classes`.

    Args:
        arch: a torchvision classification architecture, a CIFAR ResNet of this file, or a chain of
            `moco.alexnet` with or without a width.
        num_classes: outputs of the last linear layer.
        image_size: side of the square input, for the networks that are built for one size.
        small_stem: for images of 32 to 64 pixels: 3x3 stride-1 first convolution, no max-pool
            (torchvision's ResNets only).
        bn_splits: groups of the batch that are normalised apart; see `moco.batch_norm`.

    Raises:
        ValueError: an unknown arch, or one that does not fit (no final linear layer, several
            outputs, no such stem, images too small).
    """
    if not is_arch(arch):
        near = difflib.get_close_matches(arch, arch_names(), n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "see --help for the known ones"
        raise ValueError(f"unknown arch {arch!r}; {hint}")
    if arch in ("googlenet", "inception_v3"):
        raise ValueError(f"arch {arch} has auxiliary outputs while training; choose another one")
    if arch in _CIFAR_RESNETS:
        encoder = CifarResNet(*_CIFAR_RESNETS[arch], num_classes=num_classes)
    elif parse_chain(arch):
        encoder = build_chain(arch, num_classes, image_size)
    else:
        sized = {"image_size": image_size} if arch.startswith("vit_") else {}
        try:
            encoder = torchvision.models.get_model(
                arch, weights=None, num_classes=num_classes, **sized
            )
        except (ValueError, AssertionError) as error:
            raise ValueError(f"arch {arch} with images of {image_size} pixels: {error}") from error
    head_name(encoder)  # refuses networks without a final linear layer
    if small_stem:
        if not isinstance(encoder, torchvision.models.ResNet):
            raise ValueError(f"--small-stem is for torchvision's ResNets, got {arch}")
        encoder.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
        nn.init.kaiming_normal_(encoder.conv1.weight, mode="fan_out", nonlinearity="relu")
        encoder.maxpool = nn.Identity()
    if bn_splits > 1:
        split_batch_norm(encoder, bn_splits)
    return encoder


def check_image_size(encoder: nn.Module, image_size: int) -> None:
    """One tiny forward pass in eval mode, so that a size that does not fit is refused at start.

    Raises:
        ValueError: the network cannot take such images or does not return one (N, C) tensor.
    """
    was_training = encoder.training
    encoder.eval()
    try:
        with torch.no_grad():
            out = encoder(torch.zeros(1, 3, image_size, image_size))
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        if isinstance(encoder, Chain):
            reason = f"it is made for {encoder.image_size}"
        raise ValueError(
            f"images of {image_size} pixels do not fit the encoder: {reason}"
        ) from None
    finally:
        encoder.train(was_training)
    if not isinstance(out, Tensor) or out.dim() != 2:
        raise ValueError(f"the encoder must return one (N, C) tensor, got {type(out).__name__}")


# ---- Heads


def head_name(encoder: nn.Module) -> str:
    """Dotted name of the last layer: "fc" for ResNets, "fc8" for small_alexnet, "classifier.6" for
    VGG, "heads.head" for ViT. It is a linear layer, or the projection MLP or Identity that took
    its place.

    Raises:
        ValueError: there is no such layer.
    """
    for name in ("fc", "fc8", "classifier", "heads", "head"):
        head = getattr(encoder, name, None)
        if isinstance(head, nn.Sequential) and not isinstance(head, ProjectionHead) and len(head):
            last, head = list(head.named_children())[-1]
            name = f"{name}.{last}"
        if isinstance(head, (nn.Linear, nn.Identity, ProjectionHead)):
            return name
    raise ValueError(
        f"{type(encoder).__name__} does not end in a linear layer named fc, classifier, heads or "
        "head, so it cannot carry a projection head or a linear classifier; choose another arch"
    )


def get_head(encoder: nn.Module) -> nn.Module:
    return encoder.get_submodule(head_name(encoder))


def set_head(encoder: nn.Module, head: nn.Module) -> None:
    """Replace the last layer, so that a state dict keeps its name."""
    encoder.set_submodule(head_name(encoder), head)


def feature_dim(encoder: nn.Module) -> int:
    """Width of the features that enter the last layer."""
    head = get_head(encoder)
    return head[0].in_features if isinstance(head, ProjectionHead) else head.in_features


class ProjectionHead(nn.Sequential):
    """An MLP in place of the last linear layer; its tensors are named fc.0.weight, ..."""


def add_mlp_head(encoder: nn.Module) -> None:
    """Turn the last linear layer into MoCo v2's head, Linear - ReLU - Linear (arXiv:2003.04297),
    which ends in that layer; names fc.0 and fc.2."""
    last = get_head(encoder)
    width = last.in_features
    set_head(encoder, ProjectionHead(nn.Linear(width, width), nn.ReLU(), last))


def build_head(state: dict[str, Tensor], in_features: int) -> nn.Linear | ProjectionHead:
    """A head with random weights that has the layers of a state dict.

    Args:
        state: `weight` and `bias` of a linear layer; or layers by number, as in `0.weight`: one
            with a running mean is a batch norm, one with a matrix is linear, and a number that is
            left out between two is a ReLU. So are MoCo v2's, MoCo v3's and SimSiam's heads made.
        in_features: width of the features that enter.

    Raises:
        ValueError: it is no such head.
    """
    if "weight" in state:
        return _build_layer(state, "weight", in_features)
    numbered: dict[int, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        number, _, part = name.partition(".")
        numbered.setdefault(int(number), {})[part] = tensor
    layers: list[nn.Module] = []
    width = in_features
    for number, tensors in sorted(numbered.items()):
        if layers and number == len(layers) + 1:
            layers.append(nn.ReLU())
        if number != len(layers):
            raise ValueError(f"layer {number} follows layer {len(layers) - 1}")
        layers.append(_build_layer(tensors, f"{number}.weight", width))
        width = getattr(layers[-1], "out_features", width)
    return ProjectionHead(*layers)


def _build_layer(state: dict[str, Tensor], name: str, width: int) -> nn.Module:
    weight = state.get("weight")
    if "running_mean" in state:
        return nn.BatchNorm1d(width, affine=weight is not None)
    shape = None if weight is None else tuple(weight.shape)
    if shape is None or len(shape) != 2 or shape[1] != width or not shape[0]:
        raise ValueError(f"{name} is {shape or 'not there'}, expected (outputs, {width})")
    return nn.Linear(width, shape[0], bias="bias" in state)


# ---- Small ResNets for 32-pixel images


class CifarResNet(nn.Module):
    """The CIFAR ResNet of He et al. 2016 (arXiv:1512.03385, section 4.2), of depth 6n + 2.

    A 3x3 convolution and three stages of n basic blocks, with w, 2w, 4w channels at strides
    1, 2, 2; global average pooling and a linear layer `fc`. (The paper has w = 16 and shortcuts
    without parameters where the width changes; here they are 1x1 convolutions, its option B.)
    A stem of stride 2 makes it about four times as fast, for toy problems on a CPU.
    """

    def __init__(self, depth: int, width: int, stem_stride: int = 1, num_classes: int = 10) -> None:
        super().__init__()
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, width, 3, stride=stem_stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = _stage(width, width, blocks, stride=1)
        self.layer2 = _stage(width, 2 * width, blocks, stride=2)
        self.layer3 = _stage(2 * width, 4 * width, blocks, stride=2)
        self.fc = nn.Linear(4 * width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(x.mean(dim=(2, 3)))


def _stage(inputs: int, outputs: int, blocks: int, stride: int) -> nn.Sequential:
    downsample = None
    if stride != 1 or inputs != outputs:
        downsample = nn.Sequential(
            nn.Conv2d(inputs, outputs, kernel_size=1, stride=stride, bias=False),
            nn.BatchNorm2d(outputs),
        )
    first = BasicBlock(inputs, outputs, stride, downsample)
    return nn.Sequential(first, *(BasicBlock(outputs, outputs) for _ in range(blocks - 1)))


# name: (depth, width, stem stride). xW is W times the paper's width, s2 a stem of stride 2.
_CIFAR_RESNETS = {
    "resnet8": (8, 16, 1),
    "resnet8x2s2": (8, 32, 2),
    "resnet8x4": (8, 64, 1),
    "resnet20": (20, 16, 1),
}
