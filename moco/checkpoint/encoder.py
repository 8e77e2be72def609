"""Encoders from checkpoint files of any origin, and how images are presented to them."""

from __future__ import annotations

import math
import os
import re

from torch import Tensor, nn

from moco.checkpoint.content import saved_args, shown, warn_of_numbers
from moco.checkpoint.download import is_url, read_url, without_secrets
from moco.checkpoint.files import read_checkpoint
from moco.checkpoint.hashes import checked_digits
from moco.checkpoint.hub import hub_file, is_hub
from moco.checkpoint.layouts import PRETRAINING, Source, find_encoder
from moco.checkpoint.sentences import is_of_sentences
from moco.config import IMAGENET_MEAN, IMAGENET_STD
from moco.encoders import build_head, get_head, head_name, set_head
from moco.errors import CheckpointError
from moco.run_files import weights_file


def load_encoder(
    path: str | os.PathLike, head: str = "none", *, sha256: str | None = None
) -> tuple[nn.Module, dict]:
    """Build the encoder that a checkpoint holds, in eval mode on the CPU, in float32.

    Reads pretraining checkpoints of this project, of MoCo v1/v2 and of moco_align_uniform (of the
    two encoders the query encoder), of MoCo v3 (the base encoder) and SimSiam; linear-evaluation
    checkpoints; state dicts of torchvision and timm, alone or in a training checkpoint; all of them
    also as safetensors; and detectron2's pickles. Of other projects (lightly, solo-learn,
    mmselfsup, Barlow Twins, DINO, lightning, ...) the encoder is what a whole backbone stands
    behind: one prefix, or numbers in place of the names of its children. Averages of an encoder
    are passed over; several that differ are refused. Architecture, stem and head are found from
    the tensors. Nothing in the file is run.

    Args:
        path: a file; a run folder (its newest checkpoint), a release, or a folder with a
            model.safetensors as Hugging Face has them; an http(s) address, which is downloaded once
            into torch's cache (see `moco.checkpoint.read_url`), or
            hf://USER/NAME[@REVISION][/FILE] (see `moco.checkpoint.hub`).
        head: "none" for features (N, feature_dim) with Identity as last layer; "projection" for
            the linear or MLP head of contrastive training; "linear" for a trained linear
            classifier.
        sha256: the hash that the file must have, or its first 8 digits or more.

    Returns:
        (encoder, info). info has
        `arch`, `small_stem` and `feature_dim`;
        `epoch` and `objective`: None where the file does not say;
        `task`: by which it was trained: "moco", "in-batch", ...; None where the file does not say;
        `layout`: "moco", "moco-v3", "simsiam", "lincls", "timm", "detectron2" or "plain";
        `encoder`: which of the file's encoders this is, by its name there: "encoder_q" of MoCo,
            "base_encoder" of MoCo v3, "encoder" of SimSiam; of other projects what stands before
            its names; None where nothing does;
        `head`: what the file has at its end: "none", "linear" or "mlp"; `head_use`: the argument
            `head` that gives it: "none", "linear" or "projection";
        `matched`: tensors of the encoder that the file filled, which is all of them;
        `ignored`: that encoder's names in the file that have no place in the one returned;
        `beside`: names of the file's other tensors, such as the momentum encoder's;
        `args`: the command line it was trained by, {} if unknown.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: not a checkpoint, one of sentence encoders, another hash, no known
            architecture fits (the message names what is missing, unexpected or of another shape),
            or no such head.
        ValueError: no such value of `head` or `sha256`.
    """
    if head not in ("none", "projection", "linear"):
        raise ValueError(f'head must be "none", "projection" or "linear", got {head!r}')
    content = _read(path, checked_digits(sha256))
    path = without_secrets(path)  # as messages have it
    _refuse_others_of_this_project(content, path)
    source = find_encoder(content, path)
    state = source.fit.state
    encoder = source.fit.build()
    kind, use = _attach_head(encoder, source, head, path)
    matched = _fill(encoder, state, path)
    encoder.eval()
    args = saved_args(content)
    info = {
        "arch": encoder.arch,
        "small_stem": encoder.small_stem,
        "epoch": shown(content.get("pretrained_epochs", content.get("epoch"))),
        "objective": shown(args.get("objective", content.get("objective"))),
        "task": shown(args.get("task", "moco" if source.layout == "moco" else None)),
        "layout": "plain" if source.layout == "lincls" and kind != "linear" else source.layout,
        "encoder": shown(source.encoder),
        "head": kind,
        "head_use": use,
        "feature_dim": encoder.feature_dim,
        "matched": len(matched),
        "ignored": sorted(state.keys() - matched),
        "beside": source.beside,
        "args": args,
    }
    return encoder, info


def _refuse_others_of_this_project(content: dict, path: str | os.PathLike) -> None:
    """Raise CheckpointError for files of this project that hold no image encoder."""
    if is_of_sentences(content):
        raise CheckpointError(
            f"{path} holds sentence encoders (scripts/train_sentences.py), an image encoder was "
            f"asked for: evaluate it by scripts/evaluate_sentences.py {path} --mr DIR --cr DIR, or "
            "load it by moco.checkpoint.load_sentence_encoders"
        )
    if {"predictor", "errors"} <= content.keys():
        raise CheckpointError(
            f"{path} holds a depth predictor (scripts/evaluate_depth.py), an image encoder was "
            "asked for: give the one that it was trained on, which args.json beside it names"
        )


_PART = re.compile(r"-\d{5}-of-(\d{5})\.")  # as large models are saved


def _read(path: str | os.PathLike, sha256: str | None) -> dict:
    """The content of a file, of a folder as Hugging Face has them, or at an address."""
    if is_hub(path):
        return read_checkpoint(hub_file(os.fspath(path)), sha256=sha256)
    if is_url(path):
        return read_url(path, sha256)
    if os.path.isdir(path):
        path = weights_file(path)
    part = _PART.search(os.path.basename(path))
    if part and int(part[1]) > 1:
        raise CheckpointError(
            f"{path} is one of {int(part[1])} parts of a checkpoint; put them together first: "
            "safetensors.torch.save_file of the tensors that load_file finds in all of them"
        )
    return read_checkpoint(path, sha256=sha256)


_IN_MLP = re.compile(r"[0-9]{1,3}\.(weight|bias|running_mean|running_var|num_batches_tracked)")


def _attach_head(
    encoder: nn.Module, source: Source, head: str, path: str | os.PathLike
) -> tuple[str, str]:
    """Give the encoder the head that is asked for; what the file has at its end, and the argument
    `head` that gives it.

    Raises:
        CheckpointError: there is no such head in the file, or it does not fit.
    """
    name = head_name(encoder)
    in_file = {
        key.removeprefix(f"{name}."): value
        for key, value in source.fit.state.items()
        if key.startswith(f"{name}.")
    }
    kind = _head_kind(in_file, bias=get_head(encoder).bias is not None)
    # One linear layer is a projection in pretraining files, a classifier in the others.
    is_linear = kind == "linear" and source.layout not in PRETRAINING
    use = "none" if kind == "none" else "linear" if is_linear else "projection"
    if head == "none":
        set_head(encoder, nn.Identity())
        return kind, use
    if head != use:
        has = "no head" if use == "none" else f"a {use} head"
        remedy = 'head="none" gives features'
        if head == "linear":
            remedy += "; a linear one is what main_lincls.py trains, without -e, and saves"
        raise CheckpointError(f"{path} has {has}, {head} was asked for ({remedy})")
    try:
        set_head(encoder, build_head(in_file, encoder.feature_dim))
    except ValueError as error:
        raise CheckpointError(f"{path}: in its head {name}, {error}") from error
    return kind, use


def _head_kind(head: dict[str, Tensor], bias: bool) -> str:
    """What the file has at the end; `bias`: whether the last layer of this arch has one."""
    if head.keys() == ({"weight", "bias"} if bias else {"weight"}):
        return "linear"
    if head and all(_IN_MLP.fullmatch(name) for name in head):
        return "mlp"
    return "none"


def _fill(encoder: nn.Module, state: dict[str, Tensor], path: str | os.PathLike) -> set[str]:
    """Load every tensor of the encoder from `state`; their names."""
    wanted = encoder.state_dict()
    for key, tensor in wanted.items():
        if key not in state or state[key].shape != tensor.shape:
            found = tuple(state[key].shape) if key in state else "nothing"
            raise CheckpointError(f"{path}: {key} is {found}, expected {tuple(tensor.shape)}")
        if state[key].is_floating_point() != tensor.is_floating_point():
            raise CheckpointError(
                f"{path}: {key} holds {state[key].dtype}, expected {tensor.dtype}"
            )
    warn_of_numbers({key: state[key] for key in wanted}, path)
    for key in wanted:  # in place of a new dict: this one knows the versions of its modules
        wanted[key] = state[key]
    encoder.load_state_dict(wanted)
    return set(wanted)


def image_settings(encoder: nn.Module, info: dict) -> tuple[int, list[float], list[float]]:
    """(image size, mean, std) of the training images; ImageNet's where the file has none.

    Raises:
        CheckpointError: the checkpoint has impossible values.
    """
    args = info["args"]
    size = args.get("image_size", getattr(encoder, "image_size", 224))  # a ViT has one size
    mean, std = args.get("mean", IMAGENET_MEAN), args.get("std", IMAGENET_STD)
    for name, values in (("mean", mean), ("std", std)):
        if not (
            isinstance(values, (list, tuple))
            and len(values) == 3
            and all(isinstance(v, (int, float)) and math.isfinite(v) for v in values)
            and (name == "mean" or min(values) > 0)
        ):
            raise CheckpointError(f"the checkpoint's {name} is {values!r}, expected three numbers")
    if not isinstance(size, int) or size < 1:
        raise CheckpointError(f"the checkpoint's image size is {size!r}, expected a number >= 1")
    return size, list(mean), list(std)
