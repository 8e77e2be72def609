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
from scripts import evaluate_depth, evaluate_sentences, measure_align_uniform, run_recipe

TABLES = run_recipe.TABLES
PAPER = ROOT.parent / "shared" / "paper"
PRINTED = ("table1", "table2", "table8", "table9", "table10", "table11")
METRICS = {"alignment": 0.5, "uniformity": -3.0}


def commands(text: str) -> list[list[str]]:
    """The words behind `python PROGRAM` of each printed command."""
    lines = [line for line in text.splitlines() if line.startswith("python ")]
    return [shlex.split(line)[2:] for line in lines]


@pytest.mark.skipif(not PAPER.is_dir(), reason="the paper's tables are not here")
@pytest.mark.parametrize("table", PRINTED)
def test_tables_are_the_printed_ones(table) -> None:
    printed = []
    for name in [table, "table8_missing"] if table == "table8" else [table]:
        with open(PAPER / f"{name}.csv", newline="") as file:
            printed += list(csv.DictReader(file))
    for original in printed:
        original.pop("mark", None)
        if (original.get("cv_mr") or "").startswith("NaN"):
            original |= {name: "NaN" for name in ("cv_mr", "cv_cr", "val_mr", "val_cr")}
    own = [{k: v for k, v in row.items() if k != "note"} for row in TABLES.tables[table]["rows"]]
    assert own == [{k: v or "" for k, v in row.items() if k != "note"} for row in printed]


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
    for row in TABLES.tables["table4"]["rows"]:  # likewise of table 11
        _, original = TABLES.find(row["note"])
        assert all(not row[name] or row[name] == original[name] for name in ("val_mr", "val_cr"))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """As many image files as the largest batch needs; nobody opens them. What has a data set's name
    is not looked into at all."""
    root = tmp_path_factory.mktemp("data")
    for split in ("train", "val"):
        (root / split / "a").mkdir(parents=True)
        for i in range(512):
            (root / split / "a" / f"{i}.png").touch()
    (root / "text.txt").touch()
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
    with torch.device("meta"):  # without memory for weights
        pretrained = SimpleNamespace(**TRAINS[train[0]](train[1:]).to_flat())
    checkpoint.parent.mkdir(parents=True)
    checkpoint.touch()
    evaluated = [EVALUATES[program](words) for _, (program, *words) in evaluations][-1]
    parser = measure_align_uniform.build_parser()
    measure_align_uniform.check(parser, parser.parse_args(measure[1:]))
    return pretrained, evaluated


TRAINS = {
    "main_moco.py": cli.pretrain_config,
    "scripts/train_in_batch.py": cli.in_batch_config,
    "scripts/train_sentences.py": cli.sentence_config,
}
EVALUATES = {
    "main_lincls.py": lambda words: SimpleNamespace(**cli.lincls_config(words).to_flat()),
    "scripts/evaluate_depth.py": lambda words: evaluate_depth.build_parser().parse_args(words),
    "scripts/evaluate_sentences.py": lambda words: evaluate_sentences.build_parser().parse_args(
        words
    ),
}


@pytest.mark.parametrize("scale", ["full", *TABLES.scales])
@pytest.mark.parametrize("table", TABLES.tables)
def test_every_recipe_starts_with_the_objective_of_its_row(table, scale, data, tmp_path) -> None:
    kind = TABLES.tables[table].get("kind", "moco")
    prefix = recipes.PROGRAMS[kind].prefix
    if kind not in ("moco", *TABLES.scales.get(scale, {"full": {}, kind: {}})):
        with pytest.raises(
            ValueError, match=f"--scale {scale} is not of this table; there is tiny"
        ):
            recipes.plan(TABLES, f"{table}:1", str(data), tmp_path, scale=scale)
        return
    sentences = kind == "sentences"
    rows = list(enumerate(TABLES.tables[table]["rows"], start=1))
    for i, row in rows if sentences or (kind == "moco" and scale == "full") else rows[::11]:
        out = tmp_path / str(i)
        plan = recipes.plan(TABLES, f"{table}:{i}", str(data), out, scale=scale, seed=3)
        args, probe = start(plan)
        for term, parameter in (("contr", "tau"), ("align", "alpha"), ("unif", "t")):
            weight = float(row[f"{term}_w"] or 0)
            assert getattr(args, f"{term}_w") == weight and f"--{prefix}{term}-w" in plan.pretrain
            if weight:
                assert getattr(args, f"{term}_{parameter}") == float(row[f"{term}_{parameter}"])
        if kind == "moco":
            assert args.intra_batch == (row["intra_batch"] != "no")
            assert not args.blur or not args.small_stem
        checkpoint = Path(probe.checkpoint if sentences else probe.pretrained)
        assert checkpoint == plan.steps[0][0] and checkpoint.parent == Path(args.save_dir)
        steps = sentences and scale == "tiny"
        name = "step_00000300" if steps else f"checkpoint_{args.epochs - 1:04d}"
        assert checkpoint.name == f"{name}.pth.tar" and args.seed == 3
        assert bool(plan.changes) == (scale != "full")
        assert not any("default -> off" in change for change in plan.changes)
        if scale == "full":
            assert (args.epochs, args.batch_size) == (int(row["epochs"]), int(row["batch_size"]))
            assert args.lr == float(row["lr"])
        if sentences:
            assert args.normalize == (row["normalized"] == "yes")
            size = (620, 600, 50001) if scale == "full" else (128, 128, 20000)
            assert (args.emb, args.hidden, args.vocab) == size
            assert probe.mr == probe.cr == str(data)
        elif scale == "full":
            expected = ("resnet18", 32) if table == "cifar10" else ("resnet50", 224)
            own = {"in-batch": ("small_alexnet", 64), "depth": ("depth_cnn", 128)}
            assert (args.arch, args.image_size) == own.get(kind, expected)
        else:
            assert args.image_size == 32


SPECS = sorted((ROOT / "scripts/sweeps").glob("*.toml"))


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
        ("table11:1 DIR --lincls='--lr 1'", "--lincls is for encoders of images"),
        ("table11:1 DIR --folds 1", "--folds must be at least 2, got 1"),
        ("table11:1 DIR --scale cifar10", "--scale cifar10 is not of this table; there is tiny"),
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


def beside(recipe: str, *results: dict, changed: bool = False) -> list[str]:
    """Lines that compare results with the published figures, blanks as one."""
    _, row = TABLES.find(recipe)
    lines = recipes.compared(row, results, METRICS, changed=changed)
    return [" ".join(line.split()) for line in lines]


def test_measured_figures_stand_beside_the_published_ones() -> None:
    last = {"top1": 70.0, "top5": 90.0, "epoch": 9}
    settings = [{"mean": 60.0}, {"mean": None}, {"mean": 71.5}]
    result = {"last": last, "best": last, "folds": {"count": 3, "settings": settings}}
    lines = beside("table10:32", result)
    for line in ("cross-validation top-1 73.49 71.50", "cross-validation top-5 92.24 -",
                 "validation top-1 74.60 70.00"):  # fmt: skip
        assert line in lines
    assert "3 folds" in " ".join(lines) and "no comparison" not in " ".join(lines)
    lines = beside("table10:32", {"knn": {"top1": 50.0}}, changed=True)
    assert "k-NN top-1 - 50.00" in lines and "no comparison" in lines[-1]

    two_layers = [
        {"layer": layer, "last": {"top1": 80.0}, "best": {}, "nearest": {"top1": 70.0}}
        for layer in ("output", "fc7")
    ]
    assert {"output + linear 81.15 80.00", "fc7 + 5-NN 76.78 70.00"} <= {
        *beside("table1:2", *two_layers)
    }
    depth = {"layer": "conv5", "mse": 0.71234, "folds": {"count": 5, "mean": 0.75}}
    assert "conv5 MSE, less is better 0.7014 0.7123" in beside("table2:2", depth)
    bag = {"accuracy": 78.0}
    sentiment = {
        "MR": {"accuracy": 70.0, "constant": 49.77, "bag_of_words": bag},
        "CR": {"accuracy": 80.0, "constant": 63.49, "bag_of_words": bag},
    }
    lines = beside("table11:47", {"sentiment": sentiment}, changed=True)
    assert "MR validation 73.76 70.00" in lines
    assert "constant 49.77 / 63.49, bag of words 78.00 / 78.00" in lines


def test_results_of_other_flags_are_not_taken_for_these(tmp_path, call) -> None:
    out = tmp_path / "out"
    facts = recipes.plan(TABLES, "table10:32", "D", out, scale="tiny").facts()
    elsewhere = {"pretrain": ["-j", "3"], "lincls": ["--device", "cpu"]}
    assert recipes.plan(TABLES, "table10:32", "E", out, scale="tiny", **elsewhere).facts() == facts
    recipes.claim(out / "recipe.json", facts, "another recipe")
    recipes.claim(out / "recipe.json", facts, "another recipe")  # the same goes on
    for other, said in (
        ("--seed 1", "pretrain, lincls differ"),
        ("--lincls='--lr 1'", "lincls differs"),
        ("--pretrain='--amp bf16'", "pretrain differs"),
    ):
        words = f"table10:32 {tmp_path} --run --scale tiny --out {out}"
        status, text = call(run_recipe.main, f"{words} {other}")
        assert status == 2
        assert f"{out} holds another recipe (its {said}); choose another" in text.splitlines()[-1]


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


def test_sentences_have_commands_of_their_own(call) -> None:
    _, text = call(run_recipe.main, "table11:1 DIR")
    train, *_ = commands(text)
    assert "not normalised" in text and "MR validation 77.23" in text
    assert "--no-normalize" in train and "--contr-tau" in train and train[-1] == "DIR/text.txt"
    _, text = call(run_recipe.main, "table11:48 DIR --folds 5")
    assert "here features collapse" in text and "--cr DIR --folds 5" in text
