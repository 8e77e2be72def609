#!/usr/bin/env python
"""Compare finished runs: a Markdown table on the screen and a page with curves as one HTML file.

    python scripts/compare_runs.py RUN... [--out report.html] [--csv runs.csv]

RUN is a run folder of main_moco.py or main_lincls.py, or any folder that has such folders in it
(and results of `measure_align_uniform.py --out`). A linear evaluation or a measurement belongs to
the run whose checkpoint it names. Runs that differ in their seed only make one row: mean and
standard deviation. Where two objectives were run with the same seeds, their differences are tested,
seed by seed. Rows that differ from the first in more than the objective are flagged, with what
differs. Folders that cannot be compared are listed with the reason.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from moco.errors import DataError
from moco.printable import printable
from moco.run_files import write_text
from moco.runs import command

PUBLISHED = Path(__file__).with_name("published.csv")


def main(argv: Sequence[str] | None = None) -> None:
    parser = command.Parser(description="compare run folders")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder, or a folder of them")
    parser.add_argument("--out", type=Path, default=Path("report.html"), metavar="FILE.html",
                        help="the page (%(default)s)")  # fmt: skip
    parser.add_argument("--csv", type=Path, metavar="FILE.csv",
                        help="also the figures of every run, a line each")  # fmt: skip
    args = parser.parse_args(argv)
    if args.out.suffix.lower() not in (".html", ".htm"):
        parser.refuse(f"--out must end in .html, got {args.out}")
    with command.running(parser.prog):
        run(parser, args.runs, args.out, args.csv)


def run(parser: command.Parser, folders: Sequence[str], out: Path, table: Path | None) -> None:
    # What takes seconds to import is imported here, where Ctrl-C ends in one line.
    try:
        from moco.runs import report
    except DataError as error:  # a package is missing
        parser.refuse(error, status=1)
    from moco.runs.compare import Comparison
    from moco.runs.folder import read_runs

    try:
        from align_uniform import figures
    except ModuleNotFoundError as error:
        figures = None
        print(f"{parser.prog}: no charts: pip install {error.name}", file=sys.stderr)
    runs, left_out = read_runs(folders)
    if not runs:
        reasons = "; ".join(f"{path} {reason}" for path, reason in left_out[:4])
        more = f"; and {len(left_out) - 4} more" if len(left_out) > 4 else ""
        parser.refuse(f"no finished run to compare: {reasons}{more}")
    comparison = Comparison(runs, left_out)
    try:
        write_text(out, report.page(comparison, PUBLISHED, figures))
        if table:
            write_text(table, report.run_table(comparison))
    except OSError as error:
        parser.refuse(error, status=1)
    print(report.markdown(comparison, PUBLISHED))
    written = [printable(path) for path in (out, table) if path]
    print(" ".join(["wrote", *written]), file=sys.stderr)


if __name__ == "__main__":
    main()
