#!/usr/bin/env python
"""Convert an encoder's checkpoint into the file that another tool reads.

    python scripts/convert.py RUN/checkpoint_0199.pth.tar --to timm
    python scripts/convert.py RUN/checkpoint_0199.pth.tar encoder.onnx --to onnx --head projection
    python scripts/convert.py https://HOST/moco_v2_200ep_pretrain.pth.tar --to detectron2

IN is whatever `moco.checkpoint.load_encoder` reads. OUT is made whole or not at all: it is written
under another name, read again, its features are compared with IN's, and only then it is renamed.

    torchvision    .pth or .safetensors, loads with strict=True (into a network without fc, unless
                   IN has a trained linear classifier)
    timm           the same for timm.create_model(..., checkpoint_path=OUT)
    detectron2     .pkl with upstream MoCo's layout
    upstream-moco  .pth.tar for facebookresearch/moco's linear evaluation
    huggingface    a folder with config.json and model.safetensors, as timm puts them on the hub
    onnx           .onnx with any batch size
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlparse

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from moco import (
    checkpoint,  # noqa: E402
    cli,
)
from moco.checkpoint import download  # noqa: E402
from moco.errors import CheckpointError  # noqa: E402
from moco.publish import export  # noqa: E402

ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
HEADS = {"projection": "its projection head", "linear": "its linear classifier"}
ONNX_TOLERANCE = 1e-4  # of features, relative to the largest where that is above 1


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="convert a checkpoint for another tool", allow_abbrev=False
    )
    parser.add_argument("source", type=cli.non_empty, metavar="IN",
                        help="file or URL of any kind that load_encoder reads")  # fmt: skip
    parser.add_argument("out", type=cli.non_empty, nargs="?", metavar="OUT",
                        help="default: beside IN (of a URL: here), under IN's name and the "
                        "format's")  # fmt: skip
    parser.add_argument("--to", choices=export.FORMATS, required=True)
    parser.add_argument("--head", choices=export.ONNX_OUTPUTS, help="output of --to onnx: none "
                        "(default) for features, or what the head makes of them")  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="replace the file OUT")
    return parser


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = build_parser()
    args = parser.parse_intermixed_args(argv)  # OUT may stand before or after --to
    is_url = download.is_url(args.source)
    if not is_url and not Path(args.source).exists():
        parser.error(f"no such checkpoint: {args.source}")
    if args.head and args.to != "onnx":
        parser.error(f"--head is for --to onnx; --to {args.to} decides by itself what it can hold")
    args.head = args.head or "none"
    suffixes = export.FORMATS[args.to].suffixes
    if args.out is None:
        name = _stem(Path(urlparse(args.source).path if is_url else args.source))
        folder = Path() if is_url else Path(args.source).parent
        what = args.head if args.to == "onnx" else args.to
        name += "" if what == "none" else f"-{what}"
        args.out = folder / (name + (suffixes[0] if suffixes else ""))
    else:
        args.out = Path(args.out)
        if suffixes and not args.out.name.endswith(suffixes):
            parser.error(
                f"OUT of --to {args.to} must end in {' or '.join(suffixes)}, got {args.out}"
            )
    if not args.out.parent.is_dir():
        parser.error(f"no such folder: {args.out.parent}")
    if args.out.exists():
        if args.out.is_dir():
            parser.error(f"{args.out} is a folder that exists already; choose another OUT")
        if not is_url and args.out.samefile(args.source):
            parser.error(f"OUT is IN: {args.out}")
        if not args.overwrite:
            parser.error(f"{args.out} exists; --overwrite replaces it, or choose another OUT")
    missing = [name for name in ONNX_PACKAGES if importlib.util.find_spec(name) is None]
    if args.to == "onnx" and missing:
        parser.error(f"--to onnx needs {', '.join(missing)}: pip install {' '.join(missing)}")
    return args


def _stem(path: Path) -> str:
    name = path.name
    for suffix in (".tar", ".pth", ".pt", ".pkl", ".safetensors", ".bin"):
        name = name.removesuffix(suffix)
    return name or "encoder"


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    with cli.report_user_errors():
        convert(args.source, args.out, args.to, args.head)


def convert(source: str, out: Path, to: str, head: str = "none") -> None:
    """Write `out`, prove that it gives the features of `source`, and say how it is loaded.

    Raises:
        CheckpointError: nothing was written.
    """
    form = export.FORMATS[to]
    network = export.load_network(source, keep=form.keeps)
    print(f"found {describe(network)}")
    unused = network.info["head_use"]
    if unused not in ("none", form.keeps, head):
        hint = f"; --head {unused} keeps it" if to == "onnx" else ""
        print(f"left out: {HEADS[unused]}{hint}")
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as folder:
        made = Path(folder) / out.name
        try:
            export.check_fits(network, to)
            if to == "onnx":
                encoder, info = checkpoint.load_encoder(source, head=head)
                export.write_onnx(made, encoder, info, head)
                proof = compare_onnx(made, encoder, info, export.ONNX_OUTPUTS[head])
            else:
                form.write(made, network)
                proof = compare(made, network, form.keeps)
        except CheckpointError as error:
            raise CheckpointError(f"{source}: {error}") from error
        made.replace(out)
    print(f"wrote {out}, {size_of(out)}; {proof}")
    print("load it by")
    print("\n".join(f"    {line}" for line in export.usage(to, str(out), network).splitlines()))
    size, mean, std = export.image_settings(network.encoder, network.info)
    print(
        f"images: RGB in [0, 1], then (x - mean) / std with mean {mean}, std {std}; "
        f"{'trained' if 'image_size' in network.info['args'] else 'usually'} at {size} px"
    )


def describe(network: export.Network) -> str:
    """What was in the file, in one line."""
    info = network.info
    said = [f"{network.arch}{' with the small stem' if info['small_stem'] else ''}"]
    said.append(f"{info['matched']} tensors of the encoder")
    if network.classes:
        said.append(f"a linear classifier of {network.classes} classes")
    if info["epoch"] is not None:
        said.append(f"epoch {info['epoch']}")
    if info["objective"]:
        said.append(info["objective"])
    return f"{', '.join(said)} (layout: {info['layout']})"


@torch.no_grad()
def compare(made: Path, network: export.Network, keep: str) -> str:
    """Read the file back and compare what it computes with `network`.

    Raises:
        CheckpointError: not the same bits.
    """
    again = export.load_network(made, keep=keep)
    images = example_images(network.encoder, network.info, 2)
    wanted, found = network.encoder(images), again.encoder(images)
    same = again.arch == network.arch and torch.equal(wanted, found)
    if same and network.head:
        same = again.head is not None and torch.equal(network.head(wanted), again.head(found))
    if not same:
        raise CheckpointError(f"{made.name} does not give the same features; nothing was written")
    return "read back: the same features, bit for bit" + (
        f", and the same output of {HEADS[keep]}" if network.head else ""
    )


@torch.no_grad()
def compare_onnx(made: Path, encoder: torch.nn.Module, info: dict, output: str) -> str:
    """Run the file by onnxruntime on two batch sizes.

    Raises:
        CheckpointError: further from torch than `ONNX_TOLERANCE`.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(str(made), providers=["CPUExecutionProvider"])
    worst = 0.0
    for batch in (1, 3):
        images = example_images(encoder, info, batch)
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


def example_images(encoder: torch.nn.Module, info: dict, batch: int) -> Tensor:
    """Noise of the size that the encoder takes, small where it takes any."""
    size = 64 if export.takes_any_size(encoder) else export.image_settings(encoder, info)[0]
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))


def size_of(path: Path) -> str:
    files = path.iterdir() if path.is_dir() else [path]
    return f"{sum(file.stat().st_size for file in files) / 2**20:.1f} MiB"


if __name__ == "__main__":
    main()
