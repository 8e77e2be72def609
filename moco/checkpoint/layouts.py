"""Layouts of checkpoints of any origin: which tensors are one encoder's, by torchvision's names."""

from __future__ import annotations

import os
import re
from typing import NamedTuple

import torch
from torch import Tensor

from moco.checkpoint.architectures import STEMS, Fit, fit_arch
from moco.checkpoint.content import same_tensors
from moco.checkpoint.refusals import unsafe
from moco.errors import CheckpointError
from moco.pickles import Inert

# What a file calls the encoder that gradients trained, beside momentum encoders, queues and
# predictors: facebookresearch/moco, facebookresearch/moco-v3, facebookresearch/simsiam.
_ENCODERS = {"encoder_q": "moco", "base_encoder": "moco-v3", "encoder": "simsiam"}
PRETRAINING = (*_ENCODERS.values(), "detectron2")  # layouts whose last layer is a projection head
# An encoder that is an average of another one, or follows it.
_FOLLOWER = re.compile(
    r"(^|[._])(k|key|ema|momentum|teacher|target|averaged?|avg|mean|shadow|slow)(?=[._\d]|$)"
)
_MOST_PREFIXES = 50  # far more than encoders in any file
# Beginnings of names in the last parts of torchvision's networks.
_HEADS = ("fc.", "fc8.", "classifier.", "heads.", "head.")


class Source(NamedTuple):
    """What a checkpoint holds."""

    fit: Fit  # of one encoder's tensors
    layout: str  # one of PRETRAINING; "timm"; "lincls": in a `state_dict`; "plain"
    encoder: str | None  # the file's name for that encoder; None: it has none
    beside: list[str]  # the file's other tensors


def find_encoder(content: dict, path: str | os.PathLike) -> Source:
    """The encoder in the content of a checkpoint: the one prefix under which a backbone is whole.

    Raises:
        CheckpointError: there is none, or there are several that differ.
    """
    state, layout = named_tensors(content, path)
    if "stem.conv1.norm.weight" in state:
        state, layout = {_from_detectron2(name): t for name, t in state.items()}, "detectron2"
    prefix, fit = _choose(state, content.get("arch"), path)
    name = prefix.removesuffix(".")
    if prefix:
        layout = _ENCODERS.get(name.rpartition(".")[2], "plain")
    if layout == "simsiam" and not _is_simsiam(state):
        layout = "plain"
    beside = sorted(key for key in state if not key.startswith(prefix))
    return Source(fit, layout, name or None, beside)


def named_tensors(content: dict, path: str | os.PathLike) -> tuple[dict[str, Tensor], str]:
    """The tensors of a checkpoint by the names that they have in the network, and the layout.

    Raises:
        CheckpointError: there are none, or one twice.
    """
    named, layout = _state_dict(content, path)
    state: dict[str, Tensor] = {}
    for key, value in named.items():
        name = _bare(str(key))
        if name in state:
            raise CheckpointError(f"{path} holds {name} twice, with and without module. or model.")
        if isinstance(value, Tensor):
            state[name] = value
    if not state:
        for value in named.values():
            if isinstance(value, Inert):  # a whole network, perhaps
                raise unsafe(path, value.strip("<>"))
        names = ", ".join(map(str, list(named)[:5])) or "an empty dict"
        raise CheckpointError(
            f"{path} holds no tensors by name, only {names}; expected an encoder's state dict, or "
            "a dict that has one as state_dict"
        )
    return state, layout


def _state_dict(content: dict, path: str | os.PathLike) -> tuple[dict, str]:
    """The state dict, which may lie in a dict of other things, and the layout that this means."""
    if _is_state_dict(content.get("state_dict_ema")):
        return content["state_dict_ema"], "timm"  # the average, which timm prefers too
    if "state_dict" in content:
        named = content["state_dict"]
        if isinstance(named, Inert):
            raise unsafe(path, named.strip("<>"))
        if not isinstance(named, dict):
            raise CheckpointError(
                f"{path}: state_dict is a {type(named).__name__}, expected a dict"
            )
        return _flat(named) or named, "timm" if "metric" in content else "lincls"
    if _is_state_dict(content.get("model")):
        return content["model"], "plain"
    return _flat(content) or content, "plain"


def _is_state_dict(value: object) -> bool:
    return isinstance(value, dict) and any("." in str(key) for key in value)


def _flat(content: dict, start: str = "") -> dict:
    """Tensors of nested dicts by their names, joined by dots. (Those of an optimizer's state are
    by number.)"""
    found = {}
    for key, value in content.items():
        if isinstance(value, Tensor):
            found[f"{start}{key}"] = value
        elif isinstance(value, dict) and all(isinstance(name, str) for name in value):
            found |= _flat(value, f"{start}{key}.")
    return found


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


def _is_simsiam(state: dict[str, Tensor]) -> bool:
    """Torchvision's ViT has an `encoder` too, beside other parts of the network."""
    return {name.partition(".")[0] for name in state} <= {"encoder", "predictor"}


def _choose(state: dict[str, Tensor], arch: object, path: str | os.PathLike) -> tuple[str, Fit]:
    """(what stands before the encoder's names, how they fit)."""
    prefixes = _prefixes(state)
    whole: dict[str, Fit] = {}
    nearest: Fit | None = None
    for prefix in prefixes:
        if any(prefix.startswith(outer) for outer in whole):
            continue  # a part of that network
        fit = fit_arch(_below(state, prefix), arch)
        if fit.arch and not fit.misfit:
            whole[prefix] = fit
        elif not _FOLLOWER.search(prefix):
            nearest = max(nearest or fit, fit, key=lambda found: found.shared)
    leading = [prefix for prefix in whole if not _FOLLOWER.search(prefix)]
    if not leading and whole:
        # A file of the follower alone; never in place of a leader that is damaged.
        leading = [p for p in whole if not _holds_convolutions(state, without=tuple(whole))]
    if not leading:
        raise _no_known(nearest or Fit("", state), arch, path)
    first, *others = leading
    for other in others:
        if not same_tensors(whole[first].state, whole[other].state):
            raise CheckpointError(
                f"{path} holds encoders that differ, under {first} and {other}: give a file that "
                "has one of them"
            )
    return first, whole[first]


def _prefixes(state: dict[str, Tensor]) -> list[str]:
    """What may stand before an encoder's names: before those of convolutions that take images. Of
    the names that are known, those alone."""
    first = {name.partition(".")[0] for name in (*STEMS, *_HEADS, "layer1.", "bn1.")}
    for name in _ENCODERS:
        if any(key.startswith(f"{name}.") and key.split(".")[1] in first for key in state):
            if name != "encoder" or _is_simsiam(state):
                return [f"{name}."]
    found = {"": None}
    for name, tensor in state.items():
        if tensor.dim() == 4 and tensor.shape[1] == 3:
            parts = name.split(".")[:-1]
            for count in range(1, len(parts)):
                if parts[count - 1] not in first:
                    found[".".join(parts[:count]) + "."] = None
    return sorted(found, key=len)[:_MOST_PREFIXES]


def _below(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    found = {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}
    # Before torch 0.4.1 batch norm did not count its batches; some files leave the counts out.
    for name in [name for name in found if name.endswith("running_var")]:
        found.setdefault(name.replace("running_var", "num_batches_tracked"), torch.tensor(0))
    return found


def _holds_convolutions(state: dict[str, Tensor], without: tuple[str, ...]) -> bool:
    return any(t.dim() == 4 for name, t in state.items() if not name.startswith(without))


def _no_known(fit: Fit, arch: object, path: str | os.PathLike) -> CheckpointError:
    if all(name.startswith(_HEADS) for name in fit.state):
        return CheckpointError(
            f"{path} holds a head only ({', '.join(sorted(fit.state)[:3])}), no backbone; expected "
            "the state dict of a whole network, as main_lincls.py writes it, or of its encoder"
        )
    said = f"; it says arch {arch!r}" if arch else ""
    if not fit.arch:
        said += (
            "; expected torchvision's names, as conv1.weight and layer1.0.conv1.weight, or the "
            "numbers of a network's children, all behind one and the same prefix"
        )
    return CheckpointError(
        f"{path}: no known architecture has these {len(fit.state)} tensors (first "
        f"{next(iter(fit.state))}){said}{fit.misfit}"
    )
