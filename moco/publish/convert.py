"""Convert a checkpoint into another tool's file, and prove that it gives the same features."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlparse

import torch
from torch import Tensor, nn

from moco.checkpoint import is_url, load_encoder
from moco.checkpoint.encoder import image_settings
from moco.errors import CheckpointError
from moco.printable import printable
from moco.publish import export
from moco.run_files import folder_beside

ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
ONNX_TOLERANCE = 1e-4  # of features, relative to the largest where that is above 1
_HEADS = {"projection": "its projection head", "linear": "its linear classifier"}


def output_path(
    source: str, out: str | None, to: str, head: str = "none", *, overwrite: bool = False
) -> Path:
    """Where the converted file goes, by default beside `source` (a URL: here) under its name.

    Raises:
        ValueError: there is no `source`, `out` cannot be written or its suffix is of another
            format, or ONNX lacks packages; said before anything is loaded.
    """
    if not is_url(source) and not Path(source).exists():
        raise ValueError(f"no such checkpoint: {source}")
    suffixes = export.FORMATS[to].suffixes
    if out is None:
        path = Path(urlparse(source).path if is_url(source) else source)
        what = head if to == "onnx" else to
        name = _stem(path) + ("" if what == "none" else f"-{what}") + (*suffixes, "")[0]
        path = path.with_name(name) if not is_url(source) else Path(name)
    else:
        path = Path(out)
        _check_suffix(path, to)
    parent = next(folder for folder in path.parents if folder.exists())
    if not parent.is_dir():
        raise ValueError(f"{parent} is a file, so there can be no {path}")
    if path.is_dir():
        raise ValueError(f"{path} is a folder that exists already; choose another OUT")
    if path.exists():
        if not is_url(source) and path.samefile(source):
            raise ValueError(f"OUT is IN: {path}")
        if not overwrite:
            raise ValueError(f"{path} exists; --overwrite replaces it, or choose another OUT")
    missing = [name for name in ONNX_PACKAGES if importlib.util.find_spec(name) is None]
    if to == "onnx" and missing:
        raise ValueError(f"--to onnx needs {', '.join(missing)}: pip install {' '.join(missing)}")
    return path


def suffixes_of(to: str) -> str:
    """The suffixes of a format's file in words."""
    return " or ".join(export.FORMATS[to].suffixes) or "none, a folder"


def _check_suffix(path: Path, to: str) -> None:
    suffixes = export.FORMATS[to].suffixes
    others = [
        name
        for name, other in export.FORMATS.items()
        if other.suffixes and path.name.endswith(other.suffixes)
    ]
    if suffixes and not path.name.endswith(suffixes):
        hint = f"; {path.suffix} goes with --to {' or '.join(others)}" if others else ""
        raise ValueError(f"OUT of --to {to} must end in {suffixes_of(to)}, got {path}{hint}")
    if not suffixes and others:
        raise ValueError(
            f"OUT of --to {to} is a folder, got {path}; {path.suffix} goes with --to "
            f"{' or '.join(others)}"
        )


def _stem(path: Path) -> str:
    name = path.name
    for suffix in (".tar", ".pth", ".pt", ".pkl", ".safetensors", ".bin"):
        name = name.removesuffix(suffix)
    return name or "encoder"


def convert(
    source: str, out: Path, to: str, head: str = "none", *, say: Callable[[str], object] = print
) -> None:
    """Write `out`, whole or not at all: it is read again, and its features are compared, before it
    gets its name. `say` takes lines for the user.

    Args:
        source: file or URL that `load_encoder` reads.
        out: an `output_path`; its folder is made.
        to: a name in `export.FORMATS`.
        head: for ONNX, the head whose output is exported: "none", "projection" or "linear".

    Raises:
        CheckpointError, OSError: nothing was written.
    """

    def tell(text: str) -> None:
        say(printable(text, limit=10_000))

    form = export.FORMATS[to]
    network = export.load_with_head(source, keep=form.keeps)
    tell(f"found {_describe(network)}")
    unused = network.info["head_use"]
    if unused not in ("none", form.keeps, head):
        hint = f"; --head {unused} keeps it" if to == "onnx" else ""
        tell(f"left out: {_HEADS[unused]}{hint}")
    existing = next(folder for folder in out.parents if folder.exists())
    with folder_beside(existing / out.name) as folder:
        made = folder / out.name
        try:
            export.check_fits(network, to)
            if to == "onnx":
                encoder, info = load_encoder(source, head=head)
                export.write_onnx(made, encoder, info, head)
                proof = _compare_onnx(made, encoder, info, export.ONNX_OUTPUTS[head])
            else:
                form.write(made, network)
                proof = _compare(made, network, form.keeps)
        except CheckpointError as error:
            raise CheckpointError(f"{source}: {error}") from error
        out.parent.mkdir(parents=True, exist_ok=True)
        made.replace(out)
    files = out.iterdir() if out.is_dir() else [out]
    tell(f"wrote {out}, {sum(file.stat().st_size for file in files) / 2**20:.1f} MiB; {proof}")
    tell("load it by")
    for line in export.usage(to, str(out), network).splitlines():
        tell(f"    {line}")
    size, mean, std = image_settings(network.encoder, network.info)
    tell(
        f"images: RGB in [0, 1], then (x - mean) / std with mean {mean}, std {std}; "
        f"{'trained' if 'image_size' in network.info['args'] else 'usually'} at {size} px"
    )


def _describe(network: export.LoadedEncoder) -> str:
    """What was in the file, in one line."""
    info = network.info
    parts = [f"{network.arch}{' with the small stem' if info['small_stem'] else ''}"]
    parts.append(f"{info['matched']} tensors of the encoder")
    if network.classes:
        parts.append(f"a linear classifier of {network.classes} classes")
    if info["epoch"] is not None:
        parts.append(f"epoch {printable(info['epoch'], limit=50)}")
    if info["objective"]:
        parts.append(printable(info["objective"], limit=1000))
    return f"{', '.join(parts)} (layout: {info['layout']})"


@torch.no_grad()
def _compare(made: Path, network: export.LoadedEncoder, keep: str) -> str:
    """Read the file back and compare what it computes with `network`.

    Raises:
        CheckpointError: not the same bits.
    """
    with warnings.catch_warnings():  # about a file that is to get another name, and was just made
        warnings.simplefilter("ignore")
        again = export.load_with_head(made, keep=keep)
    images = _example_images(network.encoder, network.info, 2)
    wanted, found = network.encoder(images), again.encoder(images)
    same = again.arch == network.arch and torch.equal(wanted, found)
    if same and network.head:
        same = again.head is not None and torch.equal(network.head(wanted), again.head(found))
    if not same:
        raise CheckpointError(f"{made.name} does not give the same features; nothing was written")
    return "read back: the same features, bit for bit" + (
        f", and the same output of {_HEADS[keep]}" if network.head else ""
    )


@torch.no_grad()
def _compare_onnx(made: Path, encoder: nn.Module, info: dict, output: str) -> str:
    """Run the file by onnxruntime on two batch sizes.

    Raises:
        CheckpointError: further from torch than `ONNX_TOLERANCE`.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(str(made), providers=["CPUExecutionProvider"])
    worst = 0.0
    for batch in (1, 3):
        images = _example_images(encoder, info, batch)
        wanted = encoder(images)
        found = torch.from_numpy(session.run([output], {"images": images.numpy()})[0])
        scale = max(1.0, wanted.abs().max().item())
        worst = max(worst, (found - wanted).abs().max().item() / scale)
    if not worst <= ONNX_TOLERANCE:
        raise CheckpointError(
            f"onnxruntime's {output} are {worst:.1e} from torch's, more than {ONNX_TOLERANCE:g}; "
            "nothing was written"
        )
    return f"run by onnxruntime: {output} within {worst:.1e} of torch's (relative to the largest)"


def _example_images(encoder: nn.Module, info: dict, batch: int) -> Tensor:
    """Noise of the size that the encoder takes, small where it takes any."""
    size = 64 if export.takes_any_size(encoder) else image_settings(encoder, info)[0]
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))
