#!/usr/bin/env python
"""Run a sweep: many recipes, several seeds, over local GPUs or as SLURM arrays; then compare.

    python scripts/sweep.py scripts/sweeps/figure7.toml DIR --out results/figure7 --seeds 0 1 2
    python scripts/sweep.py SPEC DIR --out FOLDER --scale cifar10 --jobs 8
    python scripts/sweep.py SPEC DIR --out FOLDER --slurm "--gpus=1 --time=24:00:00"

Each run is `scripts/run_recipe.py --run` in FOLDER/NAME-sSEED, with its output in log.txt there.
Runs that are done are passed over and those that were cut off go on, so the same command is
repeated until all are done; it ends in FOLDER/report.html.

SPEC is a TOML file: `title`; `recipe`, the protocol of all runs (see run_recipe.py --list); `run`,
a list of runs with any of `name`, `recipe`, `pretrain` and `lincls` (more flags for the two mains)
and `after` (start from the encoder of that run); or `[grid]`, a list of values for each flag of
main_moco.py, of which every combination is run (true and false for flags without a value).
scripts/sweeps/ has one for each of the paper's figures.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from moco.runs import command, recipes, sweep

HERE = Path(__file__).resolve().parent
TABLES = recipes.Tables(HERE / "recipes")


def build_parser() -> command.Parser:
    # fmt: off
    parser = command.Parser(description="run a sweep and compare its runs")
    parser.add_argument("spec", type=Path, metavar="SPEC", help="TOML file")
    parser.add_argument("data", metavar="DIR", help="folder with train/ and val/")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="%(default)s")
    parser.add_argument("--scale", choices=("full", *TABLES.scales), default="full",
                        help="as of run_recipe.py (%(default)s)")
    parser.add_argument("--jobs", type=int, default=1, metavar="N",
                        help="runs at a time, each with its share of the GPUs (%(default)s)")
    parser.add_argument("--pretrain", default="", metavar="FLAGS", help="more flags for all runs")
    parser.add_argument("--lincls", default="", metavar="FLAGS", help="more flags for all runs")
    parser.add_argument("--slurm", metavar="FLAGS",
                        help="submit job arrays with these flags of sbatch")
    parser.add_argument("--dry-run", action="store_true", help="print the runs, start nothing")
    parser.add_argument("--only", type=int, metavar="I", help=argparse.SUPPRESS)  # of an array
    # fmt: on
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    parser = build_parser()
    with command.running(parser.prog):
        run(parser, parser.parse_args(argv))


def run(parser: command.Parser, args: argparse.Namespace) -> None:
    if args.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {args.jobs}")
    flags = {name: getattr(args, name) for name in ("scale", "pretrain", "lincls")}
    try:
        script = HERE / "run_recipe.py"
        runs = sweep.plan(args.spec, TABLES, script, args.data, args.out, seeds=args.seeds, **flags)
        if args.dry_run:
            for run in runs:
                if run.after:
                    folder = run.after.folder / "pretrain"
                    print(f"# with --init-from the last checkpoint in {folder}:")
                print(shlex.join(["python", *run.command]))
            return
        if args.slurm is None and not Path(args.data).is_dir():
            raise ValueError(f"no such data folder: {args.data}")
        facts = {"spec": sweep.read_spec(args.spec), "data": args.data, **flags}
        sweep.claim_folder(args.out, facts)
    except (ValueError, OSError) as error:
        parser.refuse(error)
    report = args.out / "report.html"
    if args.slurm is not None:
        words = [sys.executable, __file__, args.spec.resolve(), args.data, "--out", args.out,
                 *(f"--{name}={value}" for name, value in flags.items()),
                 "--seeds", *args.seeds]  # fmt: skip
        try:
            job = sweep.submit(runs, args.out, list(map(str, words)), args.slurm)
        except ValueError as error:
            parser.refuse(error, status=1)
        print(f"submitted {args.out / 'array.sbatch'} and, for {report}, job {job}")
        return
    children = command.Children(parser.prog)
    if args.only is not None:
        sys.exit(sweep.run_one(runs[args.only], {}, children))
    import torch  # takes seconds, which --dry-run need not wait for

    shares = sweep.device_shares(args.jobs, torch.cuda.device_count())
    failed = sweep.run_all(runs, shares, children)
    done = [str(run.folder) for run in runs if run.evaluated]
    if children.status is None:
        for name in failed:
            print(f"not done: {name}, see {args.out / name / 'log.txt'}")
        compare = [str(HERE / "compare_runs.py"), *done, "--out", str(report)]
        failed += ["report"] if done and children.run(compare) else []
    if children.status is not None:
        sys.exit(children.status)
    print(f"{len(done)} of {len(runs)} runs done; {report if done else 'no report'}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
