#!/usr/bin/env python
"""A published row as commands: print them, or run them and compare.

    python scripts/run_recipe.py --list
    python scripts/run_recipe.py table10:32 DIR                       print the exact commands
    python scripts/run_recipe.py table10:32 DIR --run                 run them; what is done is kept
    python scripts/run_recipe.py table10:32 DIR --run --scale tiny    the same, a small budget

A recipe is TABLE:ROW with rows from 1 (table10:32 is 3 * align(2) + 1 * uniform(3)). Tables, rows,
protocols and the smaller scales are data: scripts/recipes/.
"""

from __future__ import annotations

import argparse
import csv
import difflib
import json
import shlex
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RECIPES = ROOT / "scripts" / "recipes"
PROTOCOLS = tomllib.loads((RECIPES / "recipes.toml").read_text(encoding="utf-8"))
SCALES = PROTOCOLS["scale"]
PUBLISHED = {  # column -> what it is called
    "cv_top1": "cross-validation top-1",
    "cv_top5": "cross-validation top-5",
    "val_top1": "validation top-1",
    "val_top5": "validation top-5",
    "knn_top1": "k-NN top-1",
}

# Flags of main_lincls.py that the measurement shares: which images, and where it runs.
DATA, MACHINE = ("--dataset", "--images-per-class"), ("--device", "-j", "--workers")

Flags = dict[str, str | list | float | bool]


def build_parser() -> argparse.ArgumentParser:
    # fmt: off
    parser = argparse.ArgumentParser(description="published rows as commands")
    parser.add_argument("recipe", nargs="?", metavar="TABLE:ROW", help="see --list")
    parser.add_argument("data", nargs="?", metavar="DIR", help="not touched unless --run is given")
    parser.add_argument("--list", action="store_true", help="list all recipes")
    parser.add_argument("--run", action="store_true", help="run the commands, then compare")
    parser.add_argument("--scale", choices=("full", *SCALES), default="full",
                        help="a smaller data set and budget for the same objective (%(default)s)")
    parser.add_argument("--folds", type=int, metavar="K",
                        help="choose by K-fold cross-validation in main_lincls.py; the paper has 3")
    parser.add_argument("--seed", type=int, default=0, help="of both commands (%(default)s)")
    parser.add_argument("--out", type=Path, metavar="FOLDER",
                        help="default: results/recipes/TABLE-ROW-SCALE-sSEED")
    parser.add_argument("--pretrain", default="", metavar="FLAGS", type=shlex.split,
                        help='more flags for main_moco.py, --pretrain="--amp bf16"')
    parser.add_argument("--lincls", default="", metavar="FLAGS", type=shlex.split,
                        help="more flags for main_lincls.py")
    # fmt: on
    return parser


def main() -> None:
    parser = build_parser()
    args = parser.parse_args()
    tables = read_tables()
    if args.list:
        print_list(tables)
        return
    if args.recipe is None or args.data is None:
        parser.error("give a recipe and a data folder: run_recipe.py table10:32 DIR (or --list)")
    try:
        table, row = find(tables, args.recipe)
    except KeyError as error:
        parser.error(error.args[0])
    name = args.recipe.replace(":", "-")
    out = args.out or Path("results") / "recipes" / f"{name}-{args.scale}-s{args.seed}"
    pretrain, lincls = flags_of(table, row)
    changes = []
    if args.scale != "full":
        changes = scale(pretrain, lincls, args.scale)
    if args.folds is not None:
        if args.folds < 2:
            parser.error(f"--folds must be at least 2, got {args.folds}")
        lincls["folds"] = args.folds
    pretrain["seed"] = lincls["seed"] = args.seed
    pretrain_words = [*spell(pretrain), *args.pretrain]
    lincls_words = [*spell(lincls), *args.lincls]
    (_, epochs), _ = split_off(pretrain_words, "--epochs")
    if not epochs.isdecimal() or int(epochs) < 1:
        parser.error(f"--pretrain: --epochs must be a whole number of at least 1, got {epochs}")
    checkpoint = out / "pretrain" / f"checkpoint_{int(epochs) - 1:04d}.pth.tar"
    result, metrics = out / "lincls" / "lincls.json", out / "align_uniform.json"
    steps = [
        (checkpoint, ["main_moco.py", *pretrain_words,
                      "--save-dir", str(out / "pretrain"), "--resume", "auto", args.data]),
        (result, ["main_lincls.py", "--pretrained", str(checkpoint), *lincls_words,
                  "--save-dir", str(out / "lincls"), "--resume", "auto", args.data]),
        (metrics, ["scripts/measure_align_uniform.py", str(checkpoint), args.data,
                   *split_off(lincls_words, *DATA, *MACHINE)[0], "--out", str(metrics)]),
    ]  # fmt: skip
    if args.pretrain:
        changes.append(f"pretrain {shlex.join(args.pretrain)}")
    if args.lincls:
        changes.append(f"lincls {shlex.join(args.lincls)}")
    describe(args.recipe, table, row, changes)
    for _, command in steps:
        print(f"python {shlex.join(command)}", flush=True)
    if not args.run:
        return
    if args.scale == "full":
        try:
            check_classes(table, Path(args.data))
        except ValueError as error:
            parser.error(str(error))
    try:
        claim(out / "recipe.json", {"pretrain": split_off(pretrain_words, *MACHINE)[1],
                                    "lincls": split_off(lincls_words, *MACHINE)[1]})  # fmt: skip
    except (ValueError, OSError) as error:
        parser.error(str(error))
    for file, command in steps:
        if not file.is_file():
            status = run([sys.executable, str(ROOT / command[0]), *command[1:]])
            if status:
                sys.exit(status)
        if not file.is_file():  # --max-steps, say
            sys.exit(f"run_recipe.py: error: {command[0]} has ended without {file}")
    compare(row, *(json.loads(file.read_text(encoding="utf-8")) for file in (result, metrics)),
            changed=bool(changes))  # fmt: skip


def run(command: list[str]) -> int:
    """Run a command to its end, handing on requests to stop: it saves and ends with status 75."""
    process = subprocess.Popen(command)
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda received, _: process.send_signal(received))
    return process.wait()


# ------------------------------------------------------------------------------------------------
# Recipes
# ------------------------------------------------------------------------------------------------


def read_tables() -> dict[str, dict]:
    """Name -> {title, source, pretrain, lincls, rows, ...}."""
    tables = {name: table for name, table in PROTOCOLS.items() if name != "scale"}
    for name, table in tables.items():
        if "like" in table:
            tables[name] = table = {**tables[table["like"]], **table}
        with open(RECIPES / f"{name}.csv", newline="", encoding="utf-8") as file:
            table["rows"] = list(csv.DictReader(file))
    return tables


def find(tables: dict[str, dict], recipe: str) -> tuple[dict, dict]:
    """The table and the row that `recipe` names.

    Raises:
        KeyError: no such recipe; the message has the nearest names.
    """
    names = [f"{name}:{row}" for name in tables for row in range(1, 1 + len(tables[name]["rows"]))]
    if recipe not in names:
        table = recipe.split(":")[0]
        if table in tables:
            raise KeyError(
                f"no recipe {recipe!r}: {table} has rows 1 to {len(tables[table]['rows'])}"
            )
        near = difflib.get_close_matches(recipe, names, n=3, cutoff=0) or names[:3]
        raise KeyError(
            f"no recipe {recipe!r}; the nearest are {', '.join(near)} (--list shows all)"
        )
    name, row = recipe.split(":")
    return tables[name], tables[name]["rows"][int(row) - 1]


def flags_of(table: dict, row: dict) -> tuple[Flags, Flags]:
    """Flags of main_moco.py and main_lincls.py, without seed and folders."""
    pretrain: Flags = {"arch": table["pretrain"]["arch"]}
    for column, flag in (("epochs", "epochs"), ("batch_size", "batch-size"), ("lr", "lr")):
        pretrain[flag] = float(row[column])
    pretrain.update(table["pretrain"])
    for column, flag in (("queue", "moco-k"), ("dim", "moco-dim")):
        if column in row:
            pretrain[flag] = float(row[column])
    if row.get("moco") == "v2":
        pretrain.update({"aug-plus": True, "mlp": True, "cos": True})
        del pretrain["schedule"], pretrain["schedule-factor"]
    for term, parameter in (("contr", "tau"), ("align", "alpha"), ("unif", "t")):
        weight = float(row[f"{term}_w"] or 0)
        pretrain[f"moco-{term}-w"] = weight
        if weight:
            pretrain[f"moco-{term}-{parameter}"] = float(row[f"{term}_{parameter}"])
    if row.get("symmetric") == "yes":
        pretrain["symmetric"] = True
    if row["intra_batch"] == "no":
        pretrain["moco-unif-no-intra-batch"] = True
    return pretrain, dict(table["lincls"])


def scale(pretrain: Flags, lincls: Flags, name: str) -> list[str]:
    """Replace what the scale replaces, in place; returns a line for each change."""
    replaced = SCALES[name]
    changes = [f"data: {replaced['data']}"]
    for program, flags in (("pretrain", pretrain), ("lincls", lincls)):
        new = dict(replaced[program])
        if "schedule" in flags and "epochs" in new:
            share = new["epochs"] / flags["epochs"]
            new["schedule"] = [round(epoch * share) for epoch in flags["schedule"]]
        for flag, value in new.items():
            if flags.get(flag) != value:
                before = value_text(flags[flag]) if flag in flags else "default"
                changes.append(f"{program} --{flag}: {before} -> {value_text(value)}")
        flags.update(new)
    return changes


def split_off(words: list[str], *flags: str) -> tuple[list[str], list[str]]:
    """Those of the flags that stand in a command line, each with its last value, which counts; and
    the other words."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in flags:
        parser.add_argument(flag, dest=flag)
    found, rest = parser.parse_known_args(words)
    values = vars(found).items()
    return [word for flag, value in values if value is not None for word in (flag, value)], rest


def spell(flags: Flags) -> list[str]:
    """Flags as words of a command line."""
    words = []
    for flag, value in flags.items():
        if value is not False:
            words += [f"--{flag}", *([] if value is True else value_text(value).split())]
    return words


def value_text(value: str | list | float | bool) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    values = value if isinstance(value, list) else [value]
    return " ".join(v if isinstance(v, str) else f"{v:.10g}" for v in values)


def claim(path: Path, facts: dict) -> None:
    """Note in a file what its folder is for: results of other settings are not taken for these.

    Raises:
        ValueError: the folder is of other settings, or the file is damaged.
    """
    if path.is_file():
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
            other = [key for key in facts if before.get(key) != facts[key]]
        except (ValueError, AttributeError):
            raise ValueError(f"{path} is damaged; choose another --out") from None
        if other:
            raise ValueError(
                f"{path.parent} holds another {path.stem} (its {', '.join(other)} differ); choose "
                "another --out"
            )
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def check_classes(table: dict, data: Path) -> None:
    """Raise ValueError unless both splits of `data` hold the classes of the published figures."""
    for split in ("train", "val"):
        folder = data / split
        found = (
            {entry.name for entry in folder.iterdir() if entry.is_dir()}
            if folder.is_dir()
            else set()
        )
        if "class-count" in table:
            if len(found) != table["class-count"]:
                raise ValueError(
                    f"{folder} has {len(found)} classes, expected {table['class-count']}"
                )
            continue
        classes = set((ROOT / "scripts" / table["classes"]).read_text(encoding="utf-8").split())
        missing, others = sorted(classes - found), len(found - classes)
        if missing:
            raise ValueError(
                f"{folder} lacks {len(missing)} of the {len(classes)} classes of ImageNet-100: "
                f"{', '.join(missing)}"
            )
        if others:
            raise ValueError(
                f"{folder} has {others} classes beside the {len(classes)} of ImageNet-100; make a "
                "folder of those alone with scripts/create_imagenet_subset.py"
            )


# ------------------------------------------------------------------------------------------------
# Output
# ------------------------------------------------------------------------------------------------


def formula(row: dict) -> str:
    terms = [
        (row[f"{term}_w"], f"{name}({parameter}={row[f'{term}_{parameter}']})")
        for term, name, parameter in (
            ("contr", "InfoNCE", "tau"), ("align", "align", "alpha"), ("unif", "uniform", "t")
        )
    ]  # fmt: skip
    text = " + ".join(f"{weight} * {term}" for weight, term in terms if weight)
    text += ", no intra-batch pairs" if row["intra_batch"] == "no" else ""
    return text + (", symmetric" if row.get("symmetric") == "yes" else "")


def describe(recipe: str, table: dict, row: dict, changes: list[str]) -> None:
    print(f"# {recipe}: {formula(row)}")
    print(f"# {table['title']}; {table['source']}")
    if row["note"]:
        print(f"# note: {row['note']}")
    figures = [f"{name} {row[column]}" for column, name in PUBLISHED.items() if row.get(column)]
    print(f"# published: {', '.join(figures) or 'nothing'}")
    if changes:
        print("# not the published setting, so the published figures are no target; changed:")
        for change in changes:
            print(f"#   {change}")


def compare(row: dict, result: dict, metrics: dict, *, changed: bool) -> None:
    """Published and measured figures, a line each."""
    measured = {}
    if "last" in result:  # not with --epochs 0 --knn
        measured.update(val_top1=result["last"]["top1"], val_top5=result["last"]["top5"])
    if "folds" in result:
        means = [setting["mean"] for setting in result["folds"]["settings"]]
        measured["cv_top1"] = max(mean for mean in means if mean is not None)  # of the chosen one
    if "knn" in result:
        measured["knn_top1"] = result["knn"]["top1"]
    print(f"\n{'':<24} {'published':>9} {'measured':>9}")
    for column, name in PUBLISHED.items():
        if row.get(column) or column in measured:
            value = f"{measured[column]:9.2f}" if column in measured else f"{'-':>9}"
            print(f"{name:<24} {row.get(column) or '-':>9} {value}")
    if "folds" in result:
        print(f"measured: {result['folds']['count']} folds of the training set; validation once")
    elif "best" in result:
        best = result["best"]
        print(f"measured: last epoch; best {best['top1']:.2f} in epoch {best['epoch']}")
    print(f"alignment {metrics['alignment']:.4f}, uniformity {metrics['uniformity']:.4f}")
    if changed:
        print("not the setting of the published figures (see above): no comparison")


def print_list(tables: dict[str, dict]) -> None:
    for name, table in tables.items():
        print(f"{name}: {table['title']} ({table['source']})")
        for number, row in enumerate(table["rows"], start=1):
            setting = f"batch {row['batch_size']}, lr {row['lr']}"
            setting += f", MoCo {row['moco']}" if "moco" in row else ""
            setting += f", queue {row['queue']}" if "queue" in row else ""
            note = f"  ({row['note']})" if row["note"] else ""
            top1 = row.get("val_top1") or row.get("knn_top1") or "-"
            print(f"  {name}:{number:<3} {top1:>6}  {formula(row)}; {setting}{note}")


if __name__ == "__main__":
    main()
