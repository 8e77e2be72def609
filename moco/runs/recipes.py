"""Recipes: rows of published tables as command lines that train, evaluate and measure, at full or
smaller scale, and published beside measured figures."""

from __future__ import annotations

import argparse
import csv
import difflib
import json
import shlex
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moco.run_files import DEPTH_RESULT, LINCLS_RESULT, write_json


@dataclass(frozen=True)
class Program:
    """The commands of a kind of table.

    Attributes:
        train: the program that trains.
        prefix: of its flags of the objective.
        evaluate: the program that evaluates, once for each of `layers`.
        result: the file that it leaves in its folder, which has a layer's name, or "lincls".
    """

    train: str
    prefix: str
    evaluate: str
    result: str
    layers: tuple[str, ...] = ()


IN_BATCH = "scripts/train_in_batch.py"
PROGRAMS = {
    "moco": Program("main_moco.py", "moco-", "main_lincls.py", LINCLS_RESULT),
    "in-batch": Program(IN_BATCH, "", "main_lincls.py", LINCLS_RESULT, ("output", "fc7")),
    "depth": Program(IN_BATCH, "", "scripts/evaluate_depth.py", DEPTH_RESULT, ("conv5", "conv4")),
    "sentences": Program("scripts/train_sentences.py", "", "scripts/evaluate_sentences.py", ""),
}

PUBLISHED = {  # column -> what it is called
    "cv_top1": "cross-validation top-1",
    "cv_top5": "cross-validation top-5",
    "val_top1": "validation top-1",
    "val_top5": "validation top-5",
    "knn_top1": "k-NN top-1",
    "cv_mr": "MR, 5 folds of the rest",
    "cv_cr": "CR, 5 folds of the rest",
    "val_mr": "MR validation",
    "val_cr": "CR validation",
    **{
        f"{split}_{layer}_{probe}": f"{name}{layer} + {title}"
        for layer in ("output", "fc7")
        for probe, title in (("linear", "linear"), ("5nn", "5-NN"))
        for split, name in (("cv", "CV "), ("val", ""))
    },
    **{
        f"{split}_mse_{layer}": f"{name}{layer} MSE, less is better"
        for layer in ("conv5", "conv4")
        for split, name in (("cv", "CV "), ("val", ""))
    },
}
LISTED = ("val_top1", "knn_top1", "val_output_linear", "val_mse_conv5", "val_mr", "val_cr")
# Flags of main_lincls.py that the measurement shares: which images, and where it runs.
DATA, MACHINE = ("--dataset", "--images-per-class"), ("--device", "-j", "--workers")

Flags = dict[str, str | list | float | bool]


class Tables:
    """The published tables of a folder: recipes.toml with protocols and scales, NAME.csv with the
    rows of each table."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        protocols = tomllib.loads((folder / "recipes.toml").read_text(encoding="utf-8"))
        self.scales: dict[str, dict] = protocols.pop("scale")
        self.tables: dict[str, dict] = {}  # title, source, pretrain, lincls, rows, ...
        for name, table in protocols.items():
            with open(folder / f"{name}.csv", newline="", encoding="utf-8") as file:
                rows = list(csv.DictReader(file))
            self.tables[name] = {**self.tables.get(table.get("like"), {}), **table, "rows": rows}

    def names(self) -> list[str]:
        """TABLE:ROW of every recipe."""
        return [
            f"{name}:{row}"
            for name, table in self.tables.items()
            for row in range(1, 1 + len(table["rows"]))
        ]

    def rows_of(self, recipe: str) -> list[str]:
        """TABLE:ROW of all rows of a table, or `recipe` alone where it is no table's name."""
        return [name for name in self.names() if name.startswith(f"{recipe}:")] or [recipe]

    def find(self, recipe: str) -> tuple[dict, dict]:
        """The table and the row that `recipe` names.

        Raises:
            ValueError: no such recipe; the message has the nearest names.
        """
        names = self.names()
        name, _, row = recipe.partition(":")
        if recipe in names:
            return self.tables[name], self.tables[name]["rows"][int(row) - 1]
        if name in self.tables:
            rows = len(self.tables[name]["rows"])
            raise ValueError(f"no recipe {recipe!r}: {name} has rows 1 to {rows}")
        near = difflib.get_close_matches(recipe, names, n=3, cutoff=0) or names[:3]
        raise ValueError(
            f"no recipe {recipe!r}; the nearest are {', '.join(near)} (--list shows all)"
        )

    def classes(self, table: dict) -> set[str]:
        """Names of the classes of a table that has a list of them."""
        return set((self.folder.parent / table["classes"]).read_text(encoding="utf-8").split())


@dataclass
class Plan:
    """A recipe as commands, with what they leave."""

    recipe: str
    table: dict
    row: dict
    changes: list[str]  # from the published setting
    pretrain: list[str]  # flags of the program that trains, without folders
    lincls: list[str]
    steps: list[tuple[Path, list[str]]]  # the file that each command ends with, and its words

    def facts(self) -> dict:
        """What results depend on, to tell whether those in a folder are of this plan."""
        return {
            "pretrain": split_off(self.pretrain, *MACHINE)[1],
            "lincls": split_off(self.lincls, *MACHINE)[1],
        }


def plan(
    tables: Tables,
    recipe: str,
    data: str,
    out: Path,
    *,
    scale: str = "full",
    folds: int | None = None,
    seed: int = 0,
    pretrain: Sequence[str] = (),
    lincls: Sequence[str] = (),
) -> Plan:
    """The commands of a recipe: pretraining, evaluation, measurement.

    Args:
        recipe: TABLE:ROW.
        data: the data folder, which is not looked at.
        out: where the commands put their results.
        scale: "full" or one of the smaller ones.
        folds: choose by so many folds of the training set.
        pretrain, lincls: more flags for either main; later flags count.

    Raises:
        ValueError: no such recipe, or flags that cannot be.
    """
    table, row = tables.find(recipe)
    of_sentences = table.get("kind") == "sentences"
    if folds is not None and folds < 2:
        raise ValueError(f"--folds must be at least 2, got {folds}")
    if of_sentences and lincls:
        raise ValueError("--lincls is for encoders of images")
    flags, probe = flags_of(table, row)
    changes = []
    if scale != "full":
        changes = rescale(flags, probe, _scale(tables.scales, scale, table))
    more_probe: Flags = {"seed": seed} if folds is None else {"folds": folds, "seed": seed}
    words = [*spell(flags | {"seed": seed}), *pretrain]
    probe_words = [] if of_sentences else [*spell(probe | more_probe), *lincls]
    changes += [
        f"{program} {shlex.join(more)}"
        for program, more in (("pretrain", pretrain), ("lincls", lincls))
        if more
    ]
    (_, epochs), _ = split_off(words, "--epochs")
    if not epochs.isdecimal() or int(epochs) < 1:
        raise ValueError(f"--pretrain: --epochs must be a whole number of at least 1, got {epochs}")
    name = f"checkpoint_{int(epochs) - 1:04d}.pth.tar"
    most, _ = split_off(words, "--max-steps")
    if of_sentences and most:
        name = f"step_{int(most[1]):08d}.pth.tar"
    checkpoint, metrics = out / "pretrain" / name, out / "align_uniform.json"
    program, source, shared = program_of(table), data, []
    if of_sentences:  # DIR has text.txt, which may be a link to a compressed file, and MR and CR
        source, result = f"{data}/text.txt", out / "sentiment.json"
        more = ["--folds", str(folds)] if folds else []
        evaluate = [program.evaluate, str(checkpoint), "--mr", data, "--cr", data, *more]
        evaluations = [(result, [*evaluate, "--out", str(result)])]
    else:
        evaluations = []
        for layer in program.layers or (None,):
            folder = out / (layer or "lincls")
            evaluate = [program.evaluate, "--pretrained", str(checkpoint)]
            evaluate += ["--layer", layer] if layer else []
            evaluate += [*probe_words, *resumed(folder), data]
            evaluations.append((folder / program.result, evaluate))
        where = words if table.get("kind") == "depth" else probe_words
        shared, _ = split_off(where, *DATA, *MACHINE)
    train = [program.train, *words, *resumed(out / "pretrain"), source]
    measure = ["scripts/measure_align_uniform.py", str(checkpoint), source, *shared]
    measure += ["--out", str(metrics)]
    steps = [(checkpoint, train), *evaluations, (metrics, measure)]
    return Plan(recipe, table, row, changes, words, probe_words, steps)


def program_of(table: dict) -> Program:
    return PROGRAMS[table.get("kind", "moco")]


def _scale(scales: dict[str, dict], name: str, table: dict) -> dict:
    """What a scale replaces for a kind of table.

    Raises:
        ValueError: nothing, since it is not of that kind.
    """
    kind, whole = table.get("kind", "moco"), scales[name]
    if kind == "moco":
        return whole
    if kind not in whole:
        there = ", ".join(other for other, scale in scales.items() if kind in scale)
        raise ValueError(f"--scale {name} is not of this table; there is {there}")
    return {"data": whole["data"], **whole[kind]}


def resumed(folder: Path) -> list[str]:
    return ["--save-dir", str(folder), "--resume", "auto"]


def flags_of(table: dict, row: dict) -> tuple[Flags, Flags]:
    """Flags of the programs that train and evaluate, without seed and folders."""
    prefix, of_sentences = program_of(table).prefix, table.get("kind") == "sentences"
    columns = {"epochs": "epochs", "batch_size": "batch-size", "lr": "lr"}
    flags: Flags = {"arch": ""}  # which stands first
    if of_sentences:
        flags = {"hidden": float(row["dim"]) / 2}  # in each direction
    flags |= {flag: float(row[column]) for column, flag in columns.items()} | table["pretrain"]
    for column, flag in (("queue", "moco-k"), ("dim", f"{prefix}dim")):
        if column in row and not of_sentences:
            flags[flag] = float(row[column])
    if row.get("moco") == "v2":
        flags.update({"aug-plus": True, "mlp": True, "cos": True})
        del flags["schedule"], flags["schedule-factor"]
    for term, parameter in (("contr", "tau"), ("align", "alpha"), ("unif", "t")):
        weight = flags[f"{prefix}{term}-w"] = float(row[f"{term}_w"] or 0)
        if weight:
            flags[f"{prefix}{term}-{parameter}"] = float(row[f"{term}_{parameter}"])
    for column, value, flag in (
        ("symmetric", "yes", "symmetric"),
        ("intra_batch", "no", "moco-unif-no-intra-batch"),
        ("normalized", "no", "no-normalize"),
    ):
        if row.get(column) == value:
            flags[flag] = True
    return flags, dict(table.get("lincls", {}))


def rescale(pretrain: Flags, lincls: Flags, scale: dict) -> list[str]:
    """Replace what a smaller scale replaces, in place; returns a line for each change. Epochs of a
    schedule move in proportion."""
    changes = [f"data: {scale['data']}"]
    for program, flags in (("pretrain", pretrain), ("lincls", lincls)):
        new = dict(scale.get(program, {}))
        if "schedule" in flags and "epochs" in new:
            share = new["epochs"] / flags["epochs"]
            new["schedule"] = [round(epoch * share) for epoch in flags["schedule"]]
        for flag, value in new.items():
            usual = False if value is False else None  # of a flag that is not there
            if flags.get(flag, usual) != value:
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


def claim(path: Path, facts: dict, others: str) -> None:
    """Note in a file what its folder is for: results of other settings are not taken for these.

    Args:
        others: what the folder holds otherwise, for the message: "another recipe".

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
            differ = f"{', '.join(other)} {'differ' if len(other) > 1 else 'differs'}"
            raise ValueError(f"{path.parent} holds {others} (its {differ}); choose another --out")
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, facts)


def check_classes(tables: Tables, table: dict, data: Path) -> None:
    """Raise ValueError unless both splits of `data` hold the classes of the published figures."""
    if "class-count" not in table and "classes" not in table:
        return  # of sentences, torchvision's files, or images without classes
    for split in ("train", "val"):
        folder = data / split
        entries = folder.iterdir() if folder.is_dir() else ()
        found = {entry.name for entry in entries if entry.is_dir()}
        if "class-count" in table:
            if len(found) != table["class-count"]:
                raise ValueError(
                    f"{folder} has {len(found)} classes, expected {table['class-count']}"
                )
            continue
        classes = tables.classes(table)
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


def formula(row: dict) -> str:
    """The objective of a row."""
    names = {"contr": ("InfoNCE", "tau"), "align": ("align", "alpha"), "unif": ("uniform", "t")}
    text = " + ".join(
        f"{row[f'{term}_w']} * {name}({parameter}={row[f'{term}_{parameter}']})"
        for term, (name, parameter) in names.items()
        if row[f"{term}_w"]
    )
    text += ", no intra-batch pairs" if row.get("intra_batch") == "no" else ""
    text += ", not normalised" if row.get("normalized") == "no" else ""
    return text + (", symmetric" if row.get("symmetric") == "yes" else "")


def overview(tables: Tables) -> list[str]:
    """All recipes."""
    lines = []
    for name, table in tables.tables.items():
        lines.append(f"{name}: {table['title']} ({table['source']})")
        for number, row in enumerate(table["rows"], start=1):
            setting = f"batch {row['batch_size']}, lr {row['lr']}"
            setting += f", MoCo {row['moco']}" if "moco" in row else ""
            setting += f", queue {row['queue']}" if "queue" in row else ""
            setting += f", dim {row['dim']}" if "kind" in table else ""
            note = f"  ({row['note']})" if row["note"] else ""
            top1 = next((row[column] for column in LISTED if row.get(column)), "-")
            lines.append(f"  {name}:{number:<3} {top1:>6}  {formula(row)}; {setting}{note}")
    return lines


def describe(plan: Plan) -> list[str]:
    """What a plan is of and what it changes, then its commands."""
    figures = [f"{n} {plan.row[column]}" for column, n in PUBLISHED.items() if plan.row.get(column)]
    lines = [f"# {plan.recipe}: {formula(plan.row)}"]
    lines.append(f"# {plan.table['title']}; {plan.table['source']}")
    if plan.row["note"]:
        lines.append(f"# note: {plan.row['note']}")
    lines.append(f"# published: {', '.join(figures) or 'nothing'}")
    if plan.changes:
        lines += ["# not the published setting, so the published figures are no target; changed:"]
        lines += [f"#   {change}" for change in plan.changes]
    return lines + [f"python {shlex.join(command)}" for _, command in plan.steps]


def measured_figures(result: dict) -> dict[str, float]:
    """The columns of `PUBLISHED` that a lincls.json or depth.json has."""
    layer, folds = result.get("layer"), result.get("folds", {})
    if "mse" in result:
        found = {f"val_mse_{layer}": result["mse"], f"cv_mse_{layer}": folds.get("mean")}
        return {column: value for column, value in found.items() if value is not None}
    top1 = "top1" if layer is None else f"{layer}_linear"
    measured = {}
    if "last" in result:  # not with --epochs 0 --knn
        measured[f"val_{top1}"] = result["last"]["top1"]
        if layer is None:
            measured["val_top5"] = result["last"]["top5"]
    if folds:
        means = [setting["mean"] for setting in folds["settings"]]
        measured[f"cv_{top1}"] = max(mean for mean in means if mean is not None)  # of the chosen
    if "knn" in result:
        measured["knn_top1"] = result["knn"]["top1"]
    if "nearest" in result:
        measured[f"val_{layer}_5nn"] = result["nearest"]["top1"]
        if "folds" in result["nearest"]:
            measured[f"cv_{layer}_5nn"] = result["nearest"]["folds"]["mean"]
    for name, found in result.get("sentiment", {}).items():
        measured[f"val_{name.lower()}"] = found["accuracy"]
        if found.get("cross_validated", {}).get("folds") == 5:
            measured[f"cv_{name.lower()}"] = found["cross_validated"]["accuracy"]
    return measured


def compared(row: dict, results: Sequence[dict], metrics: dict, *, changed: bool) -> list[str]:
    """Published and measured figures: `results` are lincls.json or depth.json, `metrics` is
    align_uniform.json."""
    measured, result = {}, results[0]
    for one in results:
        measured |= measured_figures(one)
    lines = ["", f"{'':<24} {'published':>9} {'measured':>9}"]
    for column, name in PUBLISHED.items():
        if row.get(column) or column in measured:
            places = 4 if "_mse_" in column else 2
            value = f"{measured[column]:9.{places}f}" if column in measured else f"{'-':>9}"
            lines.append(f"{name:<24} {row.get(column) or '-':>9} {value}")
    if "folds" in result:
        folds = result["folds"]["count"]
        lines.append(f"measured: {folds} folds of the training set; validation once")
    elif "sentiment" in result:
        found = result["sentiment"].values()
        constants = " / ".join(f"{one['constant']:.2f}" for one in found)
        bags = " / ".join(f"{one['bag_of_words']['accuracy']:.2f}" for one in found)
        lines.append(f"constant {constants}, bag of words {bags}")
    elif "best" in result and "layer" not in result:
        best = result["best"]
        lines.append(f"measured: last epoch; best {best['top1']:.2f} in epoch {best['epoch']}")
    lines.append(f"alignment {metrics['alignment']:.4f}, uniformity {metrics['uniformity']:.4f}")
    if changed:
        lines.append("not the setting of the published figures (see above): no comparison")
    return lines
