"""Encoders of the paper's experiments without a queue: small_alexnet and depth_cnn, of any width.

Both are chains of named blocks, so that `encoder(images, layer="conv4")` gives what a block puts
out. Their head is `fc8`; without it they return fc7.

`small_alexnet`: the half-AlexNet of CMC's STL-10 experiments with both halves joined, as the public
code of arXiv:2005.10242 has it: 58,678,368 parameters for 64 pixels and 128 outputs. `depth_cnn` is
this project's own: the paper's NYU-Depth-V2 encoder is published nowhere. It halves the image in
four convolutions of stride 2 and has no pooling, so that a depth predictor can double conv5 or
conv4 back to the image's size.
"""

from __future__ import annotations

import re

from torch import Tensor, nn

# name: (convolutions (channels, kernel, stride, padding, whether a 3x3 max-pool of stride 2
# follows), width of fc6 and fc7, least image size)
_CHAINS = {
    "small_alexnet": (
        ((96, 3, 1, 1, True), (192, 3, 1, 1, True), (384, 3, 1, 1, False), (384, 3, 1, 1, False),
         (192, 3, 1, 1, True)), 4096, 15,
    ),
    "depth_cnn": (
        ((64, 7, 2, 3, False), (128, 5, 2, 2, False), (256, 3, 2, 1, False), (256, 3, 1, 1, False),
         (512, 3, 2, 1, False)), 4096, 1,
    ),
}  # fmt: skip
CHAINS = tuple(_CHAINS)
FIRST_LAYER = "conv1.0.weight"


class Chain(nn.Sequential):
    """Named blocks one after another: images (N, 3, S, S) -> what `layer` puts out.

    Attributes:
        layers: the names that `layer` may have, from the images on; "output" is that of `fc8`.
        image_size: a side of the images that fc6 fits.
    """

    image_size: int

    @property
    def layers(self) -> tuple[str, ...]:
        return (*list(self._modules)[:-1], "output")

    def forward(self, images: Tensor, layer: str = "output") -> Tensor:
        x = images
        for name, block in self.named_children():
            x = block(x)
            if name == layer:
                return x
        if layer != "output":
            raise ValueError(f"no layer {layer!r}; there are {', '.join(self.layers)}")
        return x


def parse_chain(arch: str) -> tuple[str, float] | None:
    """(name, width) of "small_alexnet" (1), "small_alexnetx0.25", "depth_cnnx2", ...; None for
    other names."""
    found = re.fullmatch(rf"({'|'.join(CHAINS)})(?:x(\d{{1,4}}(?:\.\d{{1,6}})?))?", arch)
    width = float(found[2] or 1) if found else 0
    return (found[1], width) if width > 0 else None


def build_chain(arch: str, num_classes: int, image_size: int) -> Chain:
    """An encoder with random weights: those of convolutions and linear layers from N(0, 0.02^2),
    biases 0.

    Args:
        arch: as `parse_chain` reads it; channels and the width of fc6 and fc7 are multiplied.
        num_classes: outputs of fc8.
        image_size: side of the square images, which fc6 is made for.

    Raises:
        ValueError: images too small, or a width that leaves a layer without channels.
    """
    name, width = parse_chain(arch)
    convolutions, hidden, least = _CHAINS[name]
    if image_size < least:
        raise ValueError(f"{arch} needs images of at least {least} pixels, got {image_size}")
    chain, channels, side = Chain(), 3, image_size
    chain.image_size = image_size
    for number, (wide, kernel, stride, padding, pooled) in enumerate(convolutions, start=1):
        wide = round(wide * width)
        if wide < 1:
            raise ValueError(f"{arch} leaves conv{number} without channels; give a greater width")
        block = [
            nn.Conv2d(channels, wide, kernel, stride, padding, bias=False),
            nn.BatchNorm2d(wide),
            nn.ReLU(inplace=True),
        ]
        side = (side + 2 * padding - kernel) // stride + 1
        if pooled:
            block.append(nn.MaxPool2d(3, 2))
            side = (side - 3) // 2 + 1
        chain.add_module(f"conv{number}", nn.Sequential(*block))
        channels = wide
    hidden = max(1, round(hidden * width))
    chain.add_module("fc6", nn.Sequential(nn.Flatten(), *_linear(channels * side**2, hidden)))
    chain.add_module("fc7", nn.Sequential(*_linear(hidden, hidden)))
    chain.add_module("fc8", nn.Linear(hidden, num_classes))
    for module in chain.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return chain


def _linear(inputs: int, outputs: int) -> list[nn.Module]:
    linear = nn.Linear(inputs, outputs, bias=False)
    return [linear, nn.BatchNorm1d(outputs), nn.ReLU(inplace=True)]


def chain_image_size(state: dict[str, Tensor]) -> int | None:
    """A size of images whose conv5 fits the fc6 of these tensors; None for other networks."""
    fc6, conv5 = state.get("fc6.1.weight"), state.get("conv5.0.weight")
    first = state.get(FIRST_LAYER)
    if any(t is None or t.dim() not in (2, 4) or not t.numel() for t in (fc6, conv5, first)):
        return None
    side = round((fc6.shape[1] / conv5.shape[0]) ** 0.5)
    return 16 * side if first.shape[-1] == 7 else 8 * (side + 1)


def chain_names(state: dict[str, Tensor]) -> list[str]:
    """Names of the encoders that these tensors may be of, with the shortest width that fits."""
    fc6 = state.get("fc6.1.weight")
    if fc6 is None or fc6.dim() != 2 or FIRST_LAYER not in state:
        return []
    names = []
    for name, (_, hidden, _) in _CHAINS.items():
        widths = (round(len(fc6) / hidden, digits) for digits in range(7))
        width = next((w for w in widths if round(hidden * w) == len(fc6)), 0)
        names.append(name if width == 1 else f"{name}x{width:g}")
    return [name for name in names if parse_chain(name)]
