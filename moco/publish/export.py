"""Write encoders as torchvision, timm, detectron2, upstream MoCo, Hugging Face and ONNX read them.

timm names the tensors of a ResNet as torchvision does, and so does upstream MoCo behind a prefix;
detectron2 has names of its own. Each writer makes one file (Hugging Face: a folder).
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import logging
import os
import pickle
import re
import shlex
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn

from moco.checkpoint import load_encoder, write_atomically, write_safetensors, write_torch
from moco.checkpoint.encoder import image_settings
from moco.encoders import CifarResNet, check_image_size, get_head, head_name
from moco.errors import CheckpointError

AUTHOR = "moco-align-uniform"


@dataclasses.dataclass
class LoadedEncoder:
    """An encoder from a file, (N, 3, H, W) -> (N, feature_dim), with the head that is kept."""

    encoder: nn.Module  # its last layer is Identity
    head: nn.Module | None  # None where the file has none, or it is not kept
    info: dict  # of `load_encoder`

    @property
    def arch(self) -> str:
        return self.info["arch"]

    @property
    def classes(self) -> int:
        """Outputs of the linear classifier; 0 without one."""
        is_classifier = self.head is not None and self.info["head_use"] == "linear"
        return self.head.out_features if is_classifier else 0

    def state(self) -> dict[str, Tensor]:
        """Tensors of the encoder and its head by torchvision's names."""
        state = dict(self.encoder.state_dict())
        if self.head is not None:
            name = head_name(self.encoder)
            state.update({f"{name}.{k}": t for k, t in self.head.state_dict().items()})
        return state

    def metadata(self) -> dict:
        """What a written file says beside its tensors, without paths of this machine."""
        args = strip_local_paths(self.info["args"])
        metadata = {"arch": self.arch, "epoch": self.info["epoch"], "args": args}
        return {name: value for name, value in metadata.items() if _is_json(value)}


def load_with_head(source: str | os.PathLike, keep: str = "linear") -> LoadedEncoder:
    """Load a checkpoint of any kind that `load_encoder` knows.

    Args:
        source: file or URL.
        keep: "linear", "projection" or "none": the last layer that is kept, if the file has it.

    Raises:
        FileNotFoundError, CheckpointError: see `load_encoder`.
    """
    encoder, info = load_encoder(source)
    head = None
    if keep == info["head_use"] != "none":
        head = get_head(load_encoder(source, head=keep)[0])
    return LoadedEncoder(encoder, head, info)


# Arguments that are places: folders and files of the run, an address in its network.
_PLACES = ("data", "save_dir", "resume", "checkpoint", "pretrained", "dist_url")


def strip_local_paths(values: dict, args: dict | None = None) -> dict:
    """Arguments or results of a run without what tells of the machine it ran on.

    Each path becomes its last name. The address of the first node is left out, and so is what JSON
    cannot hold.

    Args:
        args: the run's arguments, where `values` are not they: the places in them are known.

    Raises:
        CheckpointError: values are nested too deeply.
    """
    known = {**(args or {}), **values}
    places = [value for name in _PLACES if isinstance(value := known.get(name), str) and value]
    places = sorted((place for place in places if "/" in place), key=len, reverse=True)

    def strip(value: object, name: object = None) -> object:
        if isinstance(value, dict):
            return {str(key): strip(item, key) for key, item in value.items() if _is_json(item)}
        if isinstance(value, (list, tuple)):
            return [strip(item) for item in value]
        if not isinstance(value, str):
            return value
        if name in _PLACES:
            return os.path.basename(value.rstrip("/"))
        for place in places:
            value = value.replace(place, os.path.basename(place.rstrip("/")))
        # Absolute paths within other words, such as those of an error message.
        return re.sub(r"(?<![\w.:/~])~?/(?:[^\s'\",;()/]+/)*([^\s'\",;()/]+)", r"\1", value)

    try:
        return strip({name: value for name, value in values.items() if name != "dist_url"})
    except RecursionError:
        raise CheckpointError("values of the run are nested too deeply") from None


def _is_json(value: object) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return True


def check_fits(network: LoadedEncoder, to: str) -> None:
    """Refuse what the other tool has no network for.

    Raises:
        CheckpointError: the message says what would fit.
    """
    if to == "onnx":
        return
    arch, stem = network.arch, network.info["small_stem"]
    if stem or arch not in torchvision.models.list_models(module=torchvision.models):
        what = "a ResNet with the small stem" if stem else f"{arch}, of this project alone,"
        home = {"upstream-moco": "upstream MoCo, which has torchvision's", "huggingface": "timm"}
        raise CheckpointError(
            f"{what} has no counterpart in {home.get(to, to)}; --to onnx takes it, and "
            "load_encoder does"
        )
    is_resnet = isinstance(network.encoder, torchvision.models.ResNet)
    if to not in ("torchvision", "upstream-moco") and not is_resnet:
        raise CheckpointError(
            f"--to {to} is for ResNets, whose names are known there, got {arch}; --to torchvision "
            "and --to onnx take it"
        )


def takes_any_size(encoder: nn.Module) -> bool:
    return isinstance(encoder, (torchvision.models.ResNet, CifarResNet))


def detectron2_name(name: str) -> str:
    """torchvision's name of a ResNet's tensor -> detectron2's, as upstream MoCo's converter maps
    them: conv1 -> stem.conv1, layer1 -> res2, bn1 -> conv1.norm, downsample -> shortcut."""
    stage, _, rest = name.partition(".")
    if stage.startswith("layer"):
        stage = f"res{int(stage.removeprefix('layer')) + 1}"
    else:
        stage, rest = "stem", name
    rest = rest.replace("downsample.0.", "shortcut.").replace("downsample.1.", "shortcut.norm.")
    rest = re.sub(r"\bbn(\d)\.", r"conv\1.norm.", rest)
    return f"{stage}.{rest}"


def timm_config(network: LoadedEncoder, licence: str | None = None) -> dict:
    """config.json as timm writes it for the Hugging Face hub: the network and how to feed it."""
    size, mean, std = image_settings(network.encoder, network.info)
    pretrained = {
        "tag": AUTHOR,
        "custom_load": False,
        "input_size": [3, size, size],
        "fixed_input_size": False,
        "interpolation": "bilinear",
        "crop_pct": 1.0 if size <= 64 else 0.875,  # as views.eval_transform
        "crop_mode": "center",
        "mean": mean,
        "std": std,
        "num_classes": network.classes,
        "pool_size": [-(-size // 32)] * 2,
        "first_conv": "conv1",
        "classifier": "fc",
    }
    if licence:
        pretrained["license"] = licence
    return {
        "architecture": network.arch,
        "num_classes": network.classes,
        "num_features": network.info["feature_dim"],
        "global_pool": "avg",
        "pretrained_cfg": pretrained,
    }


def write_torchvision(path: Path, network: LoadedEncoder) -> None:
    """A plain state dict, which timm reads too; .safetensors by the name of the file."""
    if path.suffix == ".safetensors":
        write_safetensors(path, network.state(), network.metadata())
    else:
        write_torch(path, network.state())


def write_upstream_moco(path: Path, network: LoadedEncoder) -> None:
    """What facebookresearch/moco's main_lincls.py reads: of `state_dict` it takes the names that
    begin with module.encoder_q., fc aside, so a file without any is as good to it."""
    state = {f"module.encoder_q.{name}": tensor for name, tensor in network.state().items()}
    write_torch(path, {"arch": network.arch, "epoch": network.info["epoch"], "state_dict": state})


def _write(path: Path, data: bytes) -> None:
    write_atomically(path, lambda file: file.write(data))


def write_detectron2(path: Path, network: LoadedEncoder) -> None:
    """The pickle of numpy arrays that upstream MoCo's detection/convert-pretrain-to-detectron2.py
    makes. All that it asks an unpickler for is numpy's way to rebuild an array."""
    model = {
        detectron2_name(name): tensor.numpy()
        for name, tensor in network.encoder.state_dict().items()
        if not name.endswith(".num_batches_tracked")
    }
    content = {"model": model, "__author__": AUTHOR, "matching_heuristics": True}
    data = pickle.dumps(content, protocol=3)
    # numpy 2 names a module that numpy 1 lacks; the old name leads to the same function in both.
    # Protocol 3 keeps names as plain lines, and the first is before any array's bytes.
    data = data.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n", 1)
    _write(path, data)


def write_huggingface(path: Path, network: LoadedEncoder) -> None:
    path.mkdir()
    text = json.dumps(timm_config(network), indent=2) + "\n"
    (path / "config.json").write_text(text, encoding="utf-8")
    write_safetensors(path / "model.safetensors", network.state(), network.metadata())


ONNX_OUTPUTS = {"none": "features", "projection": "projections", "linear": "logits"}


def write_onnx(path: Path, encoder: nn.Module, info: dict, head: str) -> None:
    """One ONNX file: `images` (batch, 3, height, width) float32 -> `ONNX_OUTPUTS[head]` (batch, C).

    A ResNet takes images of any size; other networks those of the size they were trained with.

    Raises:
        CheckpointError: torch cannot export this network.
    """
    size, mean, std = image_settings(encoder, info)
    try:
        check_image_size(encoder, size)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    free = ("batch", None, "height", "width")
    if not takes_any_size(encoder):
        free = ("batch", None, None, None)
    dynamic = {i: torch.export.Dim.DYNAMIC for i, name in enumerate(free) if name}
    example = torch.zeros(2, 3, size, size)
    try:
        # It reports each of its steps, and what it warns of and logs is of its own making.
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings(), _no_logs():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                encoder,
                (example,),
                dynamo=True,
                dynamic_shapes=(dynamic,),
                verbose=False,
                input_names=["images"],
                output_names=[ONNX_OUTPUTS[head]],
            )
            model = program.model_proto
    except Exception as error:  # of whatever kind its many parts raise
        reason = str(error).strip().split("\n")[0]
        raise CheckpointError(f"torch cannot export {info['arch']} to ONNX: {reason}") from error
    del model.graph.value_info[:]  # of sizes under made-up names
    for value in (*model.graph.input, *model.graph.output):
        for dim, name in zip(value.type.tensor_type.shape.dim, free, strict=False):
            if dim.dim_param and name:
                dim.dim_param = name
    for name, value in {"arch": info["arch"], "mean": mean, "std": std, "image_size": size}.items():
        model.metadata_props.add(key=name, value=value if name == "arch" else json.dumps(value))
    _write(path, model.SerializeToString())


@contextlib.contextmanager
def _no_logs() -> Iterator[None]:
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


@dataclasses.dataclass(frozen=True)
class Format:
    suffixes: tuple[str, ...]  # of its file, the usual one first; () for a folder
    keeps: str = "linear"  # the last layer that goes into it
    write: Callable[[Path, LoadedEncoder], None] | None = None


FORMATS = {
    "torchvision": Format((".pth", ".pt", ".safetensors"), write=write_torchvision),
    "timm": Format((".pth", ".pt", ".safetensors"), write=write_torchvision),
    "detectron2": Format((".pkl",), keeps="none", write=write_detectron2),
    "upstream-moco": Format((".pth.tar", ".pth"), keeps="projection", write=write_upstream_moco),
    "huggingface": Format((), write=write_huggingface),
    "onnx": Format((".onnx",), keeps="none"),  # `write_onnx` keeps the head that is asked for
}


def usage(to: str, file: str, network: LoadedEncoder) -> str:
    """Lines of Python (detectron2: of its YAML; upstream MoCo: a command) that load `file`."""
    arch, classes = network.arch, network.classes
    if to == "torchvision":
        head = head_name(network.encoder)
        layer = re.sub(r"\.(\d+)", r"[\1]", head)
        lines = ["import torch, torchvision"]
        if classes:
            lines.append(f"model = torchvision.models.{arch}(num_classes={classes})")
        else:
            lines.append(f"model = torchvision.models.{arch}()")
            if network.info["small_stem"]:
                lines.append("model.conv1 = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False)")
                lines.append("model.maxpool = torch.nn.Identity()")
            lines.append(f"model.{layer} = torch.nn.Identity()  # the file has no {head}")
        if file.endswith(".safetensors"):
            lines.insert(1, "from safetensors.torch import load_file")
            lines.append(f"model.load_state_dict(load_file({file!r}))")
        else:
            lines.append(f"model.load_state_dict(torch.load({file!r}, weights_only=True))")
        return "\n".join([*lines, "model.eval()"])
    if to == "timm":
        return (
            "import timm\n"
            f"model = timm.create_model({arch!r}, num_classes={classes}, checkpoint_path={file!r})"
            ".eval()"
        )
    if to == "huggingface":
        name = f"local-dir:{file}"
        return f"import timm\nmodel = timm.create_model({name!r}, pretrained=True).eval()"
    if to == "upstream-moco":
        path = shlex.quote(file)
        return f"python main_lincls.py -a {arch} --pretrained {path} ...  # facebookresearch/moco"
    if to == "detectron2":
        _, mean, std = image_settings(network.encoder, network.info)
        resnet = network.encoder
        depth = re.search(r"\d+", arch)[0]
        wide = "RES2_OUT_CHANNELS: 64, " if int(depth) < 50 else ""
        return (
            f"MODEL:\n"
            f"  WEIGHTS: {file}\n"
            f"  PIXEL_MEAN: {[round(255 * value, 3) for value in mean]}\n"
            f"  PIXEL_STD: {[round(255 * value, 3) for value in std]}\n"
            f"  RESNETS: {{DEPTH: {depth}, {wide}STRIDE_IN_1X1: False, "
            f"NUM_GROUPS: {resnet.groups}, WIDTH_PER_GROUP: {resnet.base_width}}}\n"
            f'INPUT:\n  FORMAT: "RGB"'
        )
    return (
        "import onnxruntime\n"
        f"session = onnxruntime.InferenceSession({file!r})\n"
        "(output,) = session.run(None, {'images': images})  # float32 (N, 3, H, W)"
    )
