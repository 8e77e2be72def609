"""Small networks, files of them, and the check that a file gives its network back."""

from __future__ import annotations

import io
import itertools
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn

from moco.builder import MoCo
from moco.checkpoint import load_encoder
from moco.encoders import build_encoder, get_head

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
OLD = {"_use_new_zipfile_serialization": False}  # as before torch 1.6: upstream's released files


def seasoned(network: nn.Module) -> nn.Module:
    """In eval mode, with batch-norm statistics and weights that are not those of a fresh one."""
    generator = torch.Generator().manual_seed(1)
    for norm in network.modules():
        if isinstance(norm, (nn.BatchNorm2d, nn.BatchNorm1d)):
            norm.momentum = 1.0
            if norm.affine:
                norm.weight.data.uniform_(0.5, 2, generator=generator)
                norm.bias.data.normal_(generator=generator)
    with torch.no_grad():
        network.train()(torch.randn(8, 3, 32, 32, generator=generator))
    return network.eval()


def resnet8(num_classes: int = 5, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return seasoned(build_encoder("resnet8", num_classes))


def resnet18(num_classes: int = 7, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return torchvision.models.resnet18(num_classes=num_classes)


def in_zip(entries: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def projector(*widths: int, bias: bool) -> nn.Sequential:
    """Layers without bias, the last batch norm without weight and bias, as moco-v3's; SimSiam's
    last layer has a bias."""
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs, bias=False), nn.BatchNorm1d(outputs), nn.ReLU()]
    last = nn.Linear(*widths[-2:], bias=bias)
    return nn.Sequential(*layers[:-3], last, nn.BatchNorm1d(widths[-1], affine=False))


def make_moco(base: Callable[..., nn.Module], mlp: bool) -> MoCo:
    """With different query and key encoders."""
    torch.manual_seed(0)
    moco = MoCo(base, 12, 16, align_alpha=2, mlp=mlp)
    seasoned(moco.encoder_q)
    with torch.no_grad():
        for p in moco.encoder_k.parameters():
            p.mul_(0.5)
    return moco


def under(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def saved(content: object, **options: object) -> bytes:
    """What torch.save writes."""
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def to_detectron2(name: str) -> str:
    """What upstream's converter makes of a name of torchvision's; written for these tests."""
    if not name.startswith("layer"):
        name = f"stem.{name}"
    for number in (4, 3, 2, 1):
        name = name.replace(f"layer{number}.", f"res{number + 1}.")
        name = name.replace(f"bn{number}.", f"conv{number}.norm.")
    return name.replace("downsample.0.", "shortcut.").replace("downsample.1.", "shortcut.norm.")


def write_arrays(path: Path, state: dict[str, Tensor]) -> None:
    """A pickle of arrays, as detectron2 has them."""
    model = {to_detectron2(name): tensor.numpy() for name, tensor in state.items()}
    content = {"model": model, "__author__": "me", "matching_heuristics": True}
    path.write_bytes(pickle.dumps(content))


def features_of(network: nn.Module) -> Tensor:
    """What enters the last layer."""
    entering = []
    head = network.fc if hasattr(network, "fc") else get_head(network)
    with torch.no_grad():
        hook = head.register_forward_pre_hook(lambda _, inputs: entering.append(inputs[0]))
        network(IMAGES)
        hook.remove()
    spread = (entering[0][0] - entering[0][1]).abs().max() / entering[0].abs().max()
    assert spread > 0.1, "features that are all alike"
    return entering[0]


def assert_gives(path: Path, network: nn.Module, use: str, **facts: object) -> None:
    """The file gives the network's features and, asked for its head, its outputs, bit for bit."""
    encoder, info = load_encoder(path)
    whole, again = load_encoder(path, head=use)
    with torch.no_grad():
        assert torch.equal(encoder(IMAGES), features_of(network))
        assert torch.equal(whole(IMAGES), network(IMAGES))
    for key, value in {"head_use": use, **facts}.items():
        assert info[key] == again[key] == value, key
    assert info["feature_dim"] == features_of(network).shape[1]
    assert info["matched"] == len(encoder.state_dict())
    assert again["matched"] == len(network.state_dict()) and again["ignored"] == []
    assert info["ignored"] == sorted(whole.state_dict().keys() - encoder.state_dict().keys())
    assert type(get_head(encoder)) is nn.Identity
    assert all(t.dtype in (torch.float32, torch.int64) for t in whole.state_dict().values())
    assert not encoder.training and not whole.training
