"""Entry points of torch.hub: pretrained encoders from any checkpoint that this project reads.

    torch.hub.load("DIR", "resnet50_encoder", source="local", weights=FILE_OR_URL)

with DIR a clone of this repository. See `moco.checkpoint.load_encoder`, which tells more about the
file and loads any architecture.
"""

import pathlib

import torch

from moco import checkpoint, errors

dependencies = ["torch", "torchvision"]

_MODELS = pathlib.Path(__file__).resolve().parent / "docs" / "models"
_RELEASE = "https://github.com/SsnL/moco_align_uniform/releases/download/v1.0-checkpoints/"


def resnet50_encoder(weights, head="none"):
    """ResNet-50 from a checkpoint, in eval mode on the CPU; nothing in the file is run.

    Args:
        weights (str): path or http(s) address of a checkpoint: this project's, MoCo's (v1, v2,
            v3), moco_align_uniform's, SimSiam's, torchvision's, timm's, detectron2's, as .pth,
            .safetensors or .pkl. Downloads go to torch's cache; a hash in the name is checked.
        head (str): "none" for features (N, 2048); "projection" for the head of contrastive
            training; "linear" for a trained linear classifier.

    Returns:
        torch.nn.Module: torchvision's ResNet-50, from normalised images (N, 3, H, W).

    Raises:
        ValueError: no checkpoint, another architecture, or no such head in the file.
    """
    return _load_resnet50(weights, head)[0]


def imagenet_resnet50_encoder(with_linear_clf=False, weights=None):
    """ResNet-50 trained on ImageNet with 3 align + uniform, under moco_align_uniform's name for it.

    That repository's published weights are licensed CC-BY-NC 4.0 (no commercial use), so nothing is
    downloaded unless `weights` says so. The outputs are those of its own entry point.

    Args:
        with_linear_clf (bool): return the trained linear classifier on the encoder.
        weights (str): path or http(s) address of
            imagenet_align_uniform_with_linear_clf.pth.tar (with_linear_clf=True) or
            imagenet_align_uniform.pth.tar, or of any other ResNet-50 checkpoint.

    Returns:
        torch.nn.Module: with_linear_clf=True: logits (N, classes). Otherwise the projection head's
        outputs (N, 128), rows of unit length; of a file without such a head features (N, 2048), as
        `resnet50_encoder` returns them for every file.

    Raises:
        ValueError: no `weights`: the message says where the published file is. Or a
            `with_linear_clf` that is no bool, or as in `resnet50_encoder`.
    """
    if not isinstance(with_linear_clf, bool):  # a path in first place would ask for the classifier
        raise ValueError(
            f"with_linear_clf must be True or False, got {with_linear_clf!r}; give a checkpoint as "
            "weights="
        )
    if weights is None:
        name = "imagenet_align_uniform" + ("_with_linear_clf" if with_linear_clf else "")
        raise ValueError(
            f"nothing is downloaded without being asked for: the published weights are at "
            f"{_RELEASE}{name}.pth.tar under the licence CC-BY-NC 4.0 (no commercial use); if that "
            "suits you, give this address, or the path of a file, as weights="
        )
    if with_linear_clf:
        return _load_resnet50(weights, "linear")[0]
    encoder, info = _load_resnet50(weights, "none")
    if info["head_use"] != "projection":
        return encoder
    encoder, _ = _load_resnet50(weights, "projection")
    encoder.fc = torch.nn.Sequential(encoder.fc, _UnitLength())
    return encoder


def cifar10_align_uniform():
    """A small encoder in this repository, docs/models/cifar10_align_uniform: ResNet-8 of width 32,
    trained on CIFAR-10 without labels by align + uniform; MIT licence, figures in its README.md.

    Returns:
        torch.nn.Module: features (N, 128) of images (N, 3, 32, 32), normalised as README.md says.
    """
    return checkpoint.load_encoder(_MODELS / "cifar10_align_uniform")[0]


def cifar10_infonce():
    """The same, trained by InfoNCE: docs/models/cifar10_infonce."""
    return checkpoint.load_encoder(_MODELS / "cifar10_infonce")[0]


class _UnitLength(torch.nn.Module):
    def forward(self, x):
        return torch.nn.functional.normalize(x, dim=1)


def _load_resnet50(weights, head):
    encoder, info = checkpoint.load_encoder(weights, head)
    if info["arch"] != "resnet50":
        raise errors.CheckpointError(
            f"{weights} is a {info['arch']}, expected a resnet50; load it with "
            f"moco.checkpoint.load_encoder({str(weights)!r}, head={head!r})"
        )
    return encoder, info
