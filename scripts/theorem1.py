#!/usr/bin/env python
"""Theorem 1 in numbers: InfoNCE minus log M approaches alignment plus uniformity.

    python scripts/theorem1.py [--out FOLDER]

`moco.evaluate.theorem1` says what is drawn and what is reported. Two deviations from the limit are:
that of the expected loss, and the mean absolute one per anchor, which the proof bounds by
O(M^(-1/2)). Intervals are 95 % of a bootstrap over repeats.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from moco.errors import report_user_errors
from moco.evaluate.theorem1 import ANCHORS, Theorem1, study, summary
from moco.packages import import_optional
from moco.run_files import write_json


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="convergence of InfoNCE, Theorem 1")
    add = parser.add_argument
    add("--dim", type=int, default=8, help="of the features (%(default)s)")
    add("--tau", type=float, default=0.5, help="temperature (%(default)s)")
    kappa = "concentration of the von Mises-Fisher features (%(default)s)"
    add("--kappa", type=float, default=2.0, metavar="K", help=kappa)
    unaligned = "probability of an independent positive (%(default)s)"
    add("--unaligned", type=float, default=0.25, metavar="P", help=unaligned)
    negatives = [16, 64, 256, 1024, 4096, 16384]
    add("--negatives", type=int, nargs="+", metavar="M", default=negatives, help="%(default)s")
    repeats = f"draws of {ANCHORS} anchors and M negatives (%(default)s)"
    add("--repeats", type=int, default=200, metavar="R", help=repeats)
    add("--seed", type=int, default=0)
    out = "for theorem1.json, .png and .svg (%(default)s)"
    add("--out", type=Path, default=Path("results/theorem1"), metavar="FOLDER", help=out)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.dim < 2 or args.tau <= 0 or args.kappa <= 0 or not 0 <= args.unaligned <= 1:
        parser.error("expected --dim >= 2, --tau and --kappa > 0, and --unaligned in [0, 1]")
    negatives = sorted(set(args.negatives))
    if len(negatives) < 3 or negatives[0] < 1 or args.repeats < 2:
        parser.error("expected at least three different --negatives >= 1 and --repeats >= 2")
    if args.out.exists() and not args.out.is_dir():
        parser.error(f"--out {args.out} is a file, expected a folder")
    with report_user_errors():
        import_optional("matplotlib", "the figure")
        from align_uniform import figures

        setting = Theorem1(args.dim, args.tau, args.unaligned, negatives, args.repeats, args.seed)
        results = []
        for kappa in (0.0, args.kappa):
            results.append(study(kappa, setting))
            print(f"\n{summary(results[-1])}")
        args.out.mkdir(parents=True, exist_ok=True)
        report = {"dim": args.dim, "tau": args.tau, "results": results}
        write_json(args.out / "theorem1.json", report)
        for suffix in ("png", "svg"):
            figures.save(figures.theorem_1(results), args.out / f"theorem1.{suffix}")
    print(f"\n{args.out}/theorem1.json, .png, .svg")


if __name__ == "__main__":
    main()
