#!/usr/bin/env python
"""Make a folder to publish from a pretraining checkpoint, and check one that was downloaded.

    python scripts/release.py RUN/checkpoint_0199.pth.tar OUT
    python scripts/release.py RUN/checkpoint_0199.pth.tar OUT --lincls LINCLS_RUN/checkpoint.pth.tar
    python scripts/release.py --verify OUT

OUT gets the weights as .pth and .safetensors, named by their hashes; config.json; arguments, logs
and results, in which paths of this machine are cut to their last name; README.md, a model card that
says what these files say and nothing else; and SHA256SUMS. It is made whole or not at all, and
verified before it gets its name.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from moco import cli  # noqa: E402
from moco.errors import report_user_errors  # noqa: E402
from moco.printable import printable  # noqa: E402
from moco.publish.release import Request, make_release  # noqa: E402
from moco.publish.release_files import read_sums  # noqa: E402
from moco.publish.verify import verify_release  # noqa: E402


def main(argv: Sequence[str] | None = None) -> None:
    parser = cli.Parser(description="make or verify a release", allow_abbrev=False)
    for name, metavar, text in (
        ("checkpoint", "CHECKPOINT", "of pretraining, in its run folder"),
        ("out", "OUT", "folder to make"),
        ("--lincls", "FILE", "checkpoint of main_lincls.py on CHECKPOINT, in its run folder"),
        ("--metrics", "FILE", "what measure_align_uniform.py --out has written of CHECKPOINT"),
        ("--verify", "FOLDER", "check a release instead: sums, names, weights, config, card"),
    ):
        optional = {} if name.startswith("-") else {"nargs": "?"}
        parser.add_argument(name, type=cli.non_empty, metavar=metavar, help=text, **optional)
    parser.add_argument("--name", help="of the files (default: that of OUT)")
    parser.add_argument(
        "--licence", "--license", metavar="ID", help="of the weights, such as mit or cc-by-nc-4.0, "
        "which is for you to decide (default: the card says that none is stated)",
    )  # fmt: skip
    parser.add_argument(
        "--encoder-only", action="store_true", help="of the weights only the encoder, as "
        ".safetensors: no momentum encoder, heads, queue or classifier",
    )  # fmt: skip
    args = parser.parse_intermixed_args(argv)
    making = {name: value for name, value in vars(args).items() if name != "verify"}
    try:
        if args.verify:
            if any(making.values()):
                raise ValueError("--verify takes a folder and nothing else")
            if not Path(args.verify).is_dir():
                raise ValueError(f"--verify: no such folder: {args.verify}")
        else:
            Request(**making).check()
    except ValueError as error:
        parser.error(printable(error))
    with report_user_errors():
        if args.verify:
            problems = verify_release(args.verify)
            for problem in problems:
                print(printable(f"{args.verify}: {problem}"), file=sys.stderr)
            if problems:
                sys.exit(1)
            count = len(read_sums(args.verify))
            print(printable(f"{args.verify}: verified {count} files"))
        else:
            paths = make_release(Request(**making))
            print(printable(f"wrote {Path(args.out).resolve()}, verified:"))
            for name, path in paths.items():
                print(f"  {path.stat().st_size / 2**20:8.2f} MiB  {name}")


if __name__ == "__main__":
    main()
