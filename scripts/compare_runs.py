#!/usr/bin/env python
"""Compare finished runs: a Markdown table on the screen and a page with curves as one HTML file.

    python scripts/compare_runs.py RUN... [--out report.html]

RUN is a run folder of main_moco.py or main_lincls.py, or any folder that has such folders in it
(and results of `measure_align_uniform.py --out`). A linear evaluation or a measurement belongs to
the run whose checkpoint it names. Runs that differ in their seed only make one row: mean and
standard deviation. Where two objectives were run with the same seeds, their differences are tested,
seed by seed. Rows that differ from the first in more than the objective are flagged, with what
differs. Folders that cannot be compared are listed with the reason.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from align_uniform import figures  # noqa: E402
from moco.runs import report  # noqa: E402
from moco.runs.compare import Comparison  # noqa: E402
from moco.runs.folder import read_runs  # noqa: E402

PUBLISHED = Path(__file__).with_name("published.csv")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="compare run folders")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder, or a folder of them")
    parser.add_argument("--out", type=Path, default=Path("report.html"), metavar="FILE.html",
                        help="the page (%(default)s)")  # fmt: skip
    args = parser.parse_args(argv)
    if args.out.suffix.lower() not in (".html", ".htm"):
        parser.exit(2, f"{parser.prog}: error: --out must end in .html, got {args.out}\n")
    runs, left_out = read_runs(args.runs)
    if not runs:
        reasons = "; ".join(f"{path} {reason}" for path, reason in left_out[:4])
        more = f"; and {len(left_out) - 4} more" if len(left_out) > 4 else ""
        parser.exit(2, f"{parser.prog}: error: no finished run to compare: {reasons}{more}\n")
    comparison = Comparison(runs, left_out)
    try:
        args.out.write_text(report.page(comparison, PUBLISHED, figures), encoding="utf-8")
    except OSError as error:
        parser.exit(1, f"{parser.prog}: error: {error}\n")
    print(report.markdown(comparison, PUBLISHED))
    print(f"wrote {args.out}", file=sys.stderr)


if __name__ == "__main__":
    main()
