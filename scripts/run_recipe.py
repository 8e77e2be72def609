#!/usr/bin/env python
"""A published row as commands: print them, or run them and compare.

    python scripts/run_recipe.py --list
    python scripts/run_recipe.py table10:32 DIR                       print the exact commands
    python scripts/run_recipe.py table10:32 DIR --run                 run them; what is done is kept
    python scripts/run_recipe.py table10:32 DIR --run --scale tiny    the same, a small budget
    python scripts/run_recipe.py table1 DIR --run                     all rows of a table in turn

A recipe is TABLE:ROW with rows from 1 (table10:32 is 3 * align(2) + 1 * uniform(3)). Tables, rows,
protocols and the smaller scales are data: scripts/recipes/.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from moco.runs import command, recipes

ROOT = Path(__file__).resolve().parent.parent
TABLES = recipes.Tables(ROOT / "scripts" / "recipes")


def build_parser() -> command.Parser:
    # fmt: off
    parser = command.Parser(description="published rows as commands")
    parser.add_argument("recipe", nargs="?", metavar="TABLE[:ROW]", help="see --list")
    parser.add_argument("data", nargs="?", metavar="DIR", help="not touched unless --run is given")
    parser.add_argument("--list", action="store_true", help="list all recipes")
    parser.add_argument("--run", action="store_true", help="run the commands, then compare")
    parser.add_argument("--scale", choices=("full", *TABLES.scales), default="full",
                        help="a smaller data set and budget for the same objective (%(default)s)")
    parser.add_argument("--folds", type=int, metavar="K",
                        help="choose by K-fold cross-validation in main_lincls.py; the paper has 3")
    parser.add_argument("--seed", type=int, default=0, help="of both commands (%(default)s)")
    parser.add_argument("--out", type=Path, metavar="FOLDER",
                        help="default: results/recipes/TABLE-ROW-SCALE-sSEED; of a whole table "
                        "one in it for each row")
    parser.add_argument("--pretrain", default="", metavar="FLAGS", type=shlex.split,
                        help='more flags for what trains, --pretrain="--amp bf16"')
    parser.add_argument("--lincls", default="", metavar="FLAGS", type=shlex.split,
                        help="more flags for what evaluates")
    # fmt: on
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    parser = build_parser()
    with command.running(parser.prog):
        run(parser, parser.parse_args(argv))


def run(parser: command.Parser, args: argparse.Namespace) -> None:
    if args.list:
        print("\n".join(recipes.overview(TABLES)))
        return
    if args.recipe is None or args.data is None:
        parser.error("give a recipe and a data folder: run_recipe.py table10:32 DIR (or --list)")
    plans = {}
    try:
        for row in TABLES.rows_of(args.recipe):
            plans[row] = recipes.plan(
                TABLES, row, args.data, folder(args, row), scale=args.scale, folds=args.folds,
                seed=args.seed, pretrain=args.pretrain, lincls=args.lincls,
            )  # fmt: skip
            print("\n".join(recipes.describe(plans[row])), flush=True)
        if not args.run:
            return
        if args.scale == "full":
            recipes.check_classes(TABLES, plans[row].table, Path(args.data))
        for row, plan in plans.items():
            path = folder(args, row) / "recipe.json"
            recipes.claim(path, plan.facts(), "another recipe")
    except (ValueError, OSError) as error:
        parser.refuse(error)
    children = command.Children(parser.prog)
    for row, plan in plans.items():
        *results, metrics = command.run_steps(parser, children, plan.steps, ROOT)
        if len(plans) > 1:
            print(f"# {row}")
        lines = recipes.compared(plan.row, results, metrics, changed=bool(plan.changes))
        print("\n".join(lines), flush=True)


def folder(args: argparse.Namespace, row: str) -> Path:
    name = f"{row.replace(':', '-')}-{args.scale}-s{args.seed}"
    if args.out is None:
        return Path("results") / "recipes" / name
    return args.out if row == args.recipe else args.out / name


if __name__ == "__main__":
    main()
