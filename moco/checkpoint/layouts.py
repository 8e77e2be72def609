"""Whose file it is: an encoder's tensors in checkpoints of any origin, by torchvision's names."""

from __future__ import annotations

import os
import re
from typing import NamedTuple

import torch
from torch import Tensor

from moco.errors import CheckpointError

# What a file calls the encoder that gradients trained, beside momentum encoders, queues and
# predictors: facebookresearch/moco, facebookresearch/moco-v3, facebookresearch/simsiam.
_ENCODERS = {"encoder_q": "moco", "base_encoder": "moco-v3", "encoder": "simsiam"}
PRETRAINING = (*_ENCODERS.values(), "detectron2")  # layouts whose last layer is a projection head


class Source(NamedTuple):
    """What a checkpoint holds."""

    state: dict[str, Tensor]  # one encoder's, by torchvision's names
    layout: str  # one of PRETRAINING; "timm"; "lincls": in a `state_dict`; "plain"
    encoder: str | None  # the file's name for that encoder; None: there is one only
    beside: list[str]  # the file's other tensors


def find_encoder(content: dict, path: str | os.PathLike) -> Source:
    """The encoder in the content of a checkpoint.

    Raises:
        CheckpointError: there is none, or it is there twice.
    """
    named, layout = _named_tensors(content, path)
    state: dict[str, Tensor] = {}
    for key, value in named.items():
        name = _bare(str(key))
        if name in state:
            raise CheckpointError(f"{path} holds {name} twice, with and without module. or model.")
        if isinstance(value, Tensor):
            state[name] = value
    if not state:
        names = ", ".join(map(str, list(named)[:5])) or "an empty dict"
        raise CheckpointError(
            f"{path} holds no tensors by name, only {names}; expected an encoder's state dict, or "
            "a dict that has one as state_dict"
        )
    if "stem.conv1.norm.weight" in state:
        state, layout = {_from_detectron2(name): t for name, t in state.items()}, "detectron2"
    encoder = _encoder_name(state)
    start = f"{encoder}." if encoder else ""
    found = {name.removeprefix(start): t for name, t in state.items() if name.startswith(start)}
    beside = sorted(name for name in state if not name.startswith(start))
    # Before torch 0.4.1 batch norm did not count its batches; some files leave the counts out.
    for name in [name for name in found if name.endswith("running_var")]:
        found.setdefault(name.replace("running_var", "num_batches_tracked"), torch.tensor(0))
    return Source(found, _ENCODERS.get(encoder, layout), encoder, beside)


def _named_tensors(content: dict, path: str | os.PathLike) -> tuple[dict, str]:
    """The state dict, which may lie in a dict of other things, and the layout that this means."""
    if _is_state_dict(content.get("state_dict_ema")):
        return content["state_dict_ema"], "timm"  # the average, which timm prefers too
    if "state_dict" in content:
        named = content["state_dict"]
        if not isinstance(named, dict):
            raise CheckpointError(
                f"{path}: state_dict is a {type(named).__name__}, expected a dict"
            )
        return named, "timm" if "metric" in content else "lincls"
    if _is_state_dict(content.get("model")):
        return content["model"], "plain"
    return content, "plain"


def _is_state_dict(value: object) -> bool:
    return isinstance(value, dict) and any("." in str(key) for key in value)


def _bare(name: str) -> str:
    """Without what DistributedDataParallel, torch.compile and trainers that hold the network as
    their `model` put before and into names."""
    parts = [part for part in name.split(".") if part != "_orig_mod"]
    while parts[:1] in (["module"], ["model"]):
        del parts[0]
    return ".".join(parts)


def _from_detectron2(name: str) -> str:
    """What upstream's converter does, backwards: stem.conv1.norm.bias is bn1.bias, and
    res2.0.shortcut.norm.bias is layer1.0.downsample.1.bias."""
    name = name.removeprefix("stem.")
    name = re.sub(r"^res([2-5])\.", lambda found: f"layer{int(found[1]) - 1}.", name)
    name = re.sub(r"\bconv(\d)\.norm\.", r"bn\1.", name)
    return name.replace("shortcut.norm.", "downsample.1.").replace("shortcut.", "downsample.0.")


def _encoder_name(state: dict[str, Tensor]) -> str | None:
    first = {name.partition(".")[0] for name in state}
    for name in ("encoder_q", "base_encoder"):
        if name in first:
            return name
    # Torchvision's ViT has an `encoder` too, beside other parts of the network.
    return "encoder" if "encoder" in first and first <= {"encoder", "predictor"} else None
