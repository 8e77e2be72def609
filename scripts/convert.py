#!/usr/bin/env python
"""Convert an encoder's checkpoint into the file that another tool reads.

    python scripts/convert.py RUN/checkpoint_0199.pth.tar --to timm
    python scripts/convert.py RUN/checkpoint_0199.pth.tar encoder.onnx --to onnx --head projection
    python scripts/convert.py https://HOST/moco_v2_200ep_pretrain.pth.tar --to detectron2

IN is whatever `moco.checkpoint.load_encoder` reads. OUT is made whole or not at all, its folder
too: it is written under another name, read again, its features are compared with IN's, and only
then it is renamed.

    torchvision    .pth or .safetensors, loads with strict=True (into a network without fc, unless
                   IN has a trained linear classifier)
    timm           the same for timm.create_model(..., checkpoint_path=OUT)
    detectron2     .pkl with upstream MoCo's layout
    upstream-moco  .pth.tar for facebookresearch/moco's linear evaluation
    huggingface    a folder with config.json and model.safetensors, as timm puts them on the hub
    onnx           .onnx with any batch size
"""

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from moco import cli  # noqa: E402
from moco.errors import report_user_errors  # noqa: E402
from moco.printable import printable  # noqa: E402
from moco.publish.convert import convert, output_path, suffixes_of  # noqa: E402
from moco.publish.export import FORMATS, ONNX_OUTPUTS  # noqa: E402


def main(argv: Sequence[str] | None = None) -> None:
    parser = cli.Parser(description="convert a checkpoint for another tool", allow_abbrev=False)
    parser.add_argument(
        "source", type=cli.non_empty, metavar="IN", help="file or URL that load_encoder reads"
    )
    parser.add_argument(
        "out", type=cli.non_empty, nargs="?", metavar="OUT",
        help="default: beside IN (of a URL: here), under IN's name and the format's",
    )  # fmt: skip
    parser.add_argument(
        "--to", choices=FORMATS, required=True,
        help="format, and how OUT must end: "
        + "; ".join(f"{name}: {suffixes_of(name)}" for name in FORMATS),
    )  # fmt: skip
    parser.add_argument(
        "--head", choices=ONNX_OUTPUTS,
        help="output of --to onnx: none (default) for features, or what the head makes of them",
    )  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="replace the file OUT")
    args = parser.parse_intermixed_args(argv)  # OUT may stand before or after --to
    if args.head and args.to != "onnx":
        parser.error(f"--head is for --to onnx; --to {args.to} decides by itself what it can hold")
    head = args.head or "none"
    try:
        out = output_path(args.source, args.out, args.to, head, overwrite=args.overwrite)
    except ValueError as error:
        parser.error(printable(error))
    with report_user_errors():
        convert(args.source, out, args.to, head)


if __name__ == "__main__":
    main()
