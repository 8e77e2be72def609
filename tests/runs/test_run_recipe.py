"""Recipes: published rows as commands, what they refuse, what is printed at their end."""

from __future__ import annotations

import csv
import functools
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import ROOT

from moco import cli, encoders
from moco.runs import recipes, sweep
from scripts import evaluate_depth, measure_align_uniform, run_recipe

TABLES = run_recipe.TABLES
PAPER = ROOT.parent / "shared" / "paper"
# Of the tables without a queue.
PRINTED = {"table1": ["table1"], "table2": ["table2"], "table9": ["table9"], "table10": ["table10"],
           "table8": ["table8", "table8_missing"]}  # fmt: skip


def commands(text: str) -> list[list[str]]:
    """The words behind `python PROGRAM` of each printed command."""
    lines = [line for line in text.splitlines() if line.startswith("python ")]
    return [shlex.split(line)[2:] for line in lines]


@pytest.mark.skipif(not PAPER.is_dir(), reason="the paper's tables are not here")
@pytest.mark.parametrize("table", PRINTED)
def test_tables_are_the_printed_ones(table) -> None:
    printed = []
    for name in PRINTED[table]:
        with open(PAPER / f"{name}.csv", newline="") as file:
            printed += [{k: v for k, v in r.items() if k != "mark"} for r in csv.DictReader(file)]
    rows = TABLES.tables[table]["rows"]
    assert [{k: v for k, v in row.items() if k != "note"} for row in rows] == printed


def test_the_tables_agree_with_each_other() -> None:
    counts = [len(table["rows"]) for table in TABLES.tables.values()]
    assert counts == [45, 2, 2, 30, 11, 50, 6, 3, 51, 64, 3]
    notes = [row["note"] for row in TABLES.tables["table10"]["rows"]]
    assert all("missing in print" in note for note in notes[-3:]) and not any(notes[:-3])
    table3 = TABLES.tables["table3"]
    for row in table3["rows"]:  # the best of table 10, which the note names
        table10, original = TABLES.find(row["note"])
        figures = [name for name in recipes.PUBLISHED if name in row]
        assert len(figures) == 4 and all(row[name] == original[name] for name in figures)
        assert recipes.flags_of(table3, row) == recipes.flags_of(table10, original)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """As many image files as the largest batch needs; nobody opens them. What has a data set's name
    is not looked into at all."""
    root = tmp_path_factory.mktemp("data")
    for split in ("train", "val"):
        (root / split / "a").mkdir(parents=True)
        for i in range(512):
            (root / split / "a" / f"{i}.png").touch()
    return root


# Many rows ask for one encoder: it is built and tried once.
build_encoder = functools.cache(encoders.build_encoder)
check_image_size = functools.cache(encoders.check_image_size)


@pytest.fixture(autouse=True)
def _each_encoder_is_built_once(monkeypatch) -> None:
    monkeypatch.setattr(encoders, "build_encoder", build_encoder)
    monkeypatch.setattr(encoders, "check_image_size", check_image_size)


def start(plan: recipes.Plan) -> tuple[SimpleNamespace, SimpleNamespace]:
    """The commands of a plan, as far as they come without training: flags are checked against each
    other, and the encoder is built. Returns the arguments of training and of one evaluation."""
    (checkpoint, train), *evaluations, (_, measure) = plan.steps
    parse = cli.pretrain_config if train[0] == "main_moco.py" else cli.in_batch_config
    with torch.device("meta"):  # without memory for weights
        pretrained = SimpleNamespace(**parse(train[1:]).to_flat())
    checkpoint.parent.mkdir(parents=True)
    checkpoint.touch()
    for _, (program, *words) in evaluations:
        if program == "main_lincls.py":
            evaluated = SimpleNamespace(**cli.lincls_config(words).to_flat())
        else:
            evaluated = evaluate_depth.build_parser().parse_args(words)
    parser = measure_align_uniform.build_parser()
    measure_align_uniform.check(parser, parser.parse_args(measure[1:]))
    return pretrained, evaluated


@pytest.mark.parametrize("scale", ["full", *TABLES.scales])
@pytest.mark.parametrize(
    "table", [n for n, t in TABLES.tables.items() if t.get("kind") != "sentences"]
)
def test_every_recipe_starts_with_the_objective_of_its_row(table, scale, data, tmp_path) -> None:
    kind = TABLES.tables[table].get("kind", "moco")
    prefix = recipes.PROGRAMS[kind].prefix
    if kind not in ("moco", *TABLES.scales.get(scale, {"full": {}, kind: {}})):
        with pytest.raises(
            ValueError, match=f"--scale {scale} is not of this table; there is tiny"
        ):
            recipes.plan(TABLES, f"{table}:1", str(data), tmp_path, scale=scale)
        return
    rows = list(enumerate(TABLES.tables[table]["rows"], start=1))
    for i, row in rows if kind == "moco" and scale == "full" else rows[::11]:
        plan = recipes.plan(TABLES, f"{table}:{i}", str(data), tmp_path / str(i), scale=scale)
        args, probe = start(plan)
        for term, parameter in (("contr", "tau"), ("align", "alpha"), ("unif", "t")):
            weight = float(row[f"{term}_w"] or 0)
            assert getattr(args, f"{term}_w") == weight and f"--{prefix}{term}-w" in plan.pretrain
            if weight:
                assert getattr(args, f"{term}_{parameter}") == float(row[f"{term}_{parameter}"])
        if kind == "moco":
            assert args.intra_batch == (row["intra_batch"] != "no")
            assert not args.blur or not args.small_stem
        assert Path(probe.pretrained).parent == Path(args.save_dir)
        assert Path(probe.pretrained).name == f"checkpoint_{args.epochs - 1:04d}.pth.tar"
        if scale == "full":
            expected = ("resnet18", 32) if table == "cifar10" else ("resnet50", 224)
            own = {"in-batch": ("small_alexnet", 64), "depth": ("depth_cnn", 128)}
            assert (args.arch, args.image_size) == own.get(kind, expected)
            assert (args.epochs, args.batch_size) == (int(row["epochs"]), int(row["batch_size"]))
            assert args.lr == float(row["lr"]) and not plan.changes
        else:
            assert plan.changes and args.image_size == 32
            assert not any("default -> off" in change for change in plan.changes)


SPECS = [s for s in sorted((ROOT / "scripts/sweeps").glob("*.toml")) if s.stem != "figure9b"]


@pytest.mark.parametrize("spec", SPECS, ids=lambda path: path.stem)
def test_every_run_of_every_sweep_starts(spec, data, tmp_path) -> None:
    runs = sweep.plan(spec, TABLES, Path("run_recipe.py"), str(data), tmp_path, scale="tiny")
    for run in runs if len(runs) < 20 else runs[::11]:
        args = run_recipe.build_parser().parse_args(run.command[1:])
        flags = {"scale": args.scale, "pretrain": args.pretrain, "lincls": args.lincls}
        start(recipes.plan(TABLES, args.recipe, args.data, args.out, **flags))


def test_table10_32_is_the_papers_best_with_its_protocol(call) -> None:
    _, text = call(run_recipe.main, "table10:32 DIR --folds 3 --seed 5")
    pretrain, lincls, _ = (" ".join(words) for words in commands(text))
    for flags in (
        "--moco-contr-w 0", "--moco-align-w 3", "--moco-align-alpha 2", "--moco-unif-w 1",
        "--moco-unif-t 3", "--epochs 240", "--lr 0.03", "--schedule 120 160 200", "--seed 5",
        "--batch-size 128", "--moco-k 16384", "--moco-m 0.999", "--wd 0.0001", "--momentum 0.9",
    ):  # fmt: skip
        assert f"{flags} " in pretrain
    assert "--aug-plus" not in pretrain and "--mlp" not in pretrain and "--cos" not in pretrain
    for flags in ("--epochs 60", "--batch-size 256", "--lr 10", "--schedule 30 40 50",
                  "--schedule-factor 0.2", "--folds 3", "--seed 5"):  # fmt: skip
        assert f"{flags} " in lincls
    assert "74.60" in text and "92.74" in text and "73.49" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("table10:32 DIR --folds 1", "--folds must be at least 2, got 1"),
        ("table10:32 DIR --pretrain=--epochs=x", "at least 1, got x"),
        ("tabel10:32 DIR", "table10:32"),
        ("table10:46 DIR", "table10 has rows 1 to 45"),
        ("table10: DIR", "rows 1 to 45"),
        ("table", "data folder"),
        ("table DIR", "no recipe 'table'"),
        ("table10:32", "data folder"),
    ],
)
def test_a_recipe_that_cannot_be_is_refused(words, message, call) -> None:
    status, text = call(run_recipe.main, words)
    assert status == 2 and message in text.splitlines()[-1]


def test_a_table_stands_for_its_rows(call, tmp_path) -> None:
    """Its commands are those of the rows, in folders of their own."""
    status, text = call(run_recipe.main, "table1 DIR --scale tiny")
    rows = [call(run_recipe.main, f"table1:{row} DIR --scale tiny")[1] for row in (1, 2, 3)]
    assert status == 0 and commands(text) == [words for row in rows for words in commands(row)]
    _, text = call(run_recipe.main, f"table1 DIR --scale tiny --out {tmp_path}")
    saved = [words[words.index("--save-dir") + 1] for words in commands(text)[::4]]
    assert saved == [f"{tmp_path}/table1-{row}-tiny-s0/pretrain" for row in (1, 2, 3)]


def test_the_list_has_all_recipes_and_marks_the_uncertain_rows(call) -> None:
    status, text = call(run_recipe.main, "--list")
    assert status == 0
    lines = text.splitlines()
    assert sum(line.startswith("  ") for line in lines) == len(TABLES.names())
    assert sum("missing in print" in line for line in lines) == 3


def test_missing_and_foreign_classes_are_listed_before_anything_is_run(tmp_path, call) -> None:
    classes = sorted((ROOT / "scripts" / "imagenet100_classes.txt").read_text().split())
    for split in ("train", "val"):
        for name in classes[2:]:
            (tmp_path / split / name).mkdir(parents=True)
    words = f"{tmp_path} --run --out {tmp_path / 'out'}"
    status, text = call(run_recipe.main, f"table10:32 {words}")
    assert status == 2 and f"lacks 2 of the 100 classes of ImageNet-100: {classes[0]}" in text
    assert classes[1] in text
    for split in ("train", "val"):
        for name in [*classes[:2], "n00000000"]:
            (tmp_path / split / name).mkdir()
    status, text = call(run_recipe.main, f"table10:32 {words}")
    assert status == 2 and "create_imagenet_subset.py" in text
    status, text = call(run_recipe.main, f"table5:1 {words}")
    assert status == 2 and "has 101 classes, expected 1000" in text
    assert not (tmp_path / "out").exists()


def test_later_flags_count_and_the_measurement_shares_those_of_the_data(call) -> None:
    words = "cifar10:9 D --scale cifar10-cpu --pretrain=--epochs=3 --lincls='--dataset cifar10 -j4'"
    _, text = call(run_recipe.main, words)
    _, lincls, measure = commands(text)
    assert lincls[lincls.index("--pretrained") + 1].endswith("/checkpoint_0002.pth.tar")
    assert measure[0].endswith("/checkpoint_0002.pth.tar")
    shared = "--dataset cifar10 --images-per-class 1000 -j 4 --out"
    assert f" D {shared} " in shlex.join(measure)


def test_a_smaller_scale_moves_the_schedule_in_proportion(call) -> None:
    _, text = call(run_recipe.main, "table10:32 DIR --scale tiny")
    pretrain, lincls, _ = (" ".join(words) for words in commands(text))
    assert "--epochs 30 " in pretrain and "--schedule 15 20 25 " in pretrain
    assert "--epochs 20 " in lincls and "--schedule 10 13 17 " in lincls
    assert "pretrain --epochs: 240 -> 30" in text


def test_measured_figures_stand_beside_the_published_ones() -> None:
    _, row = TABLES.find("table10:32")
    last = {"top1": 70.0, "top5": 90.0, "epoch": 9}
    settings = [{"mean": 60.0}, {"mean": None}, {"mean": 71.5}]
    result = {"last": last, "best": last, "folds": {"count": 3, "settings": settings}}
    metrics = {"alignment": 0.5, "uniformity": -3.0}
    text = recipes.compared(row, [result], metrics, changed=False)
    lines = {line[:24].strip(): line[24:].split() for line in text if line}
    assert lines["cross-validation top-1"] == ["73.49", "71.50"]
    assert lines["cross-validation top-5"] == ["92.24", "-"]
    assert lines["validation top-1"] == ["74.60", "70.00"]
    assert "3 folds" in "".join(text) and "no comparison" not in "".join(text)
    text = recipes.compared(row, [{"knn": {"top1": 50.0}}], metrics, changed=True)
    assert "k-NN top-1                       -     50.00" in text and "no comparison" in text[-1]


def test_results_of_other_flags_are_not_taken_for_these(tmp_path, call) -> None:
    out = tmp_path / "out"
    facts = recipes.plan(TABLES, "table10:32", "D", out, scale="tiny").facts()
    elsewhere = {"pretrain": ["-j", "3"], "lincls": ["--device", "cpu"]}
    assert recipes.plan(TABLES, "table10:32", "E", out, scale="tiny", **elsewhere).facts() == facts
    recipes.claim(out / "recipe.json", facts)
    recipes.claim(out / "recipe.json", facts)  # the same goes on
    for other in ("--seed 1", "--lincls='--lr 1'", "--pretrain='--amp bf16'"):
        words = f"table10:32 {tmp_path} --run --scale tiny --out {out}"
        status, text = call(run_recipe.main, f"{words} {other}")
        assert status == 2 and "holds another recipe" in text.splitlines()[-1]


def test_table_1_is_stl_10_in_the_papers_protocol(call) -> None:
    _, text = call(run_recipe.main, "table1:2 DIR --folds 5")
    pretrain, output, fc7, measure = (" ".join(words) for words in commands(text))
    for flags in ("--dataset stl10", "--align-w 0.98", "--unif-w 0.96", "--contr-w 0", "--lr 0.36",
                  "--batch-size 768", "--schedule 155 170 185", "--dim 128"):  # fmt: skip
        assert f"{flags} " in pretrain
    for layer, words in (("output", output), ("fc7", fc7)):
        for flags in ("--protocol stl10", f"--layer {layer}", "--epochs 100", "--lr 0.001",
                      "--schedule 60 80", "--folds 5", "--dataset stl10"):  # fmt: skip
            assert f"{flags} " in words
    assert "--dataset stl10" in measure
    assert "output + linear 81.15" in text and "fc7 + 5-NN 76.78" in text


def test_measured_figures_of_two_layers_stand_beside_the_published_ones() -> None:
    _, row = TABLES.find("table1:2")
    results = [
        {"layer": layer, "last": {"top1": 80.0}, "best": {}, "nearest": {"top1": 70.0}}
        for layer in ("output", "fc7")
    ]
    metrics = {"alignment": 0.5, "uniformity": -3.0}
    text = "\n".join(recipes.compared(row, results, metrics, changed=False))
    assert f"{'output + linear':<24}     81.15     80.00" in text
    assert f"{'fc7 + 5-NN':<24}     76.78     70.00" in text
    _, row = TABLES.find("table2:2")
    results = [{"layer": "conv5", "mse": 0.71234, "folds": {"count": 5, "mean": 0.75}}]
    text = "\n".join(recipes.compared(row, results, metrics, changed=False))
    assert f"{'conv5 MSE, less is better':<24}    0.7014    0.7123" in text
