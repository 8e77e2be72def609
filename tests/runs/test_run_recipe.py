"""scripts/run_recipe.py: published rows as commands."""

from __future__ import annotations

import csv
import importlib.util
import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT, write_labelled

import main_lincls
import main_moco

SCRIPT = ROOT / "scripts" / "run_recipe.py"
_spec = importlib.util.spec_from_file_location("run_recipe", SCRIPT)
run_recipe = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(run_recipe)

TABLES = run_recipe.read_tables()
RECIPES = [f"{name}:{i}" for name in TABLES for i in range(1, 1 + len(TABLES[name]["rows"]))]
PAPER = ROOT.parent / "shared" / "paper" / "table10.csv"


def call(
    argv: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> tuple[int, str]:
    """(exit status, what was printed) of the script in this process."""
    monkeypatch.setattr(sys, "argv", ["run_recipe.py", *shlex.split(argv)])
    status = 0
    try:
        run_recipe.main()
    except SystemExit as ended:
        status = ended.code
    out, err = capsys.readouterr()
    return status, out + err


def commands(text: str) -> tuple[list[str], list[str]]:
    pretrain, lincls, _ = (line for line in text.splitlines() if line.startswith("python "))
    return shlex.split(pretrain)[2:], shlex.split(lincls)[2:]


@pytest.mark.skipif(not PAPER.is_file(), reason="the paper's tables are not here")
def test_table_10_is_the_printed_one() -> None:
    with open(PAPER, newline="") as file:
        printed = list(csv.DictReader(file))
    ours = [{k: v for k, v in row.items() if k != "note"} for row in TABLES["table10"]["rows"]]
    assert ours == printed


def test_the_tables_agree_with_each_other() -> None:
    assert [len(table["rows"]) for table in TABLES.values()] == [45, 2, 2, 30, 11]
    notes = [row["note"] for row in TABLES["table10"]["rows"]]
    assert all("missing in print" in note for note in notes[-3:]) and not any(notes[:-3])
    for row in TABLES["table3"]["rows"]:  # the best of table 10, which the note names
        _, original = run_recipe.find(TABLES, row["note"])
        figures = [name for name in run_recipe.PUBLISHED if name in row]
        assert len(figures) == 4 and all(row[name] == original[name] for name in figures)
        assert (run_recipe.flags_of(TABLES["table3"], row)
                == run_recipe.flags_of(TABLES["table10"], original))  # fmt: skip


@pytest.mark.parametrize("scale", ["full", *run_recipe.SCALES])
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_command_parses_into_the_objective_of_its_row(
    recipe: str, scale: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    status, text = call(f"{recipe} /no/such/folder --scale {scale}", monkeypatch, capsys)
    assert status == 0
    pretrain, lincls = commands(text)
    parser = main_moco.build_parser()
    args = parser.parse_args(pretrain)
    main_moco._resolve_objective(args)
    _, row = run_recipe.find(TABLES, recipe)
    for term, parameter in (("contr", "tau"), ("align", "alpha"), ("unif", "t")):
        weight = float(row[f"{term}_w"] or 0)
        assert getattr(args, f"{term}_w") == weight and f"--moco-{term}-w" in pretrain
        if weight:
            assert getattr(args, f"{term}_{parameter}") == float(row[f"{term}_{parameter}"])
    assert args.intra_batch == (row["intra_batch"] != "no")
    assert not args.blur or not args.small_stem
    probe = main_lincls.build_parser().parse_args(lincls)
    assert Path(probe.pretrained).parent == Path(args.save_dir)
    assert Path(probe.pretrained).name == f"checkpoint_{args.epochs - 1:04d}.pth.tar"
    if scale == "full":
        expected = ("resnet18", 32) if recipe.startswith("cifar10") else ("resnet50", 224)
        assert (args.arch, args.image_size) == expected
        assert (args.epochs, args.batch_size) == (int(row["epochs"]), int(row["batch_size"]))
        assert args.lr == float(row["lr"]) and "changed" not in text
    else:
        assert "changed" in text and args.image_size == 32


def test_table10_32_is_the_papers_best_with_its_protocol(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    _, text = call("table10:32 DIR --folds 3 --seed 5", monkeypatch, capsys)
    pretrain, lincls = (" ".join(words) for words in commands(text))
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
    ("argv", "message"),
    [
        ("table10:32 DIR --folds 1", "--folds must be at least 2, got 1"),
        ("table10:32 DIR --pretrain='--epochs 0'", "at least 1, got 0"),
        ("table10:32 DIR --pretrain=--epochs=x", "at least 1, got x"),
        ("tabel10:32 DIR", "table10:32"),
        ("table10:46 DIR", "table10 has rows 1 to 45"),
        ("table10:0 DIR", "rows 1 to 45"),
        ("table10 DIR", "rows 1 to 45"),
        ("table10:32", "data folder"),
    ],
)
def test_an_unknown_recipe_names_the_nearest(
    argv: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    status, text = call(argv, monkeypatch, capsys)
    assert status == 2 and message in text.splitlines()[-1]


def test_the_list_has_all_recipes_and_marks_the_uncertain_rows(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    status, text = call("--list", monkeypatch, capsys)
    assert status == 0
    lines = text.splitlines()
    assert sum(line.startswith("  ") for line in lines) == len(RECIPES)
    assert sum("missing in print" in line for line in lines) == 3


def test_missing_and_foreign_classes_are_listed_before_anything_is_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    classes = sorted((ROOT / "scripts" / "imagenet100_classes.txt").read_text().split())
    for split in ("train", "val"):
        for name in classes[2:]:
            (tmp_path / split / name).mkdir(parents=True)
    out = tmp_path / "out"
    status, text = call(f"table10:32 {tmp_path} --run --out {out}", monkeypatch, capsys)
    assert status == 2 and f"lacks 2 of the 100 classes of ImageNet-100: {classes[0]}" in text
    assert classes[1] in text
    for split in ("train", "val"):
        for name in [*classes[:2], "n00000000"]:
            (tmp_path / split / name).mkdir()
    status, text = call(f"table10:32 {tmp_path} --run --out {out}", monkeypatch, capsys)
    assert status == 2 and "create_imagenet_subset.py" in text
    status, text = call(f"table5:1 {tmp_path} --run --out {out}", monkeypatch, capsys)
    assert status == 2 and "has 101 classes, expected 1000" in text
    assert not out.exists()


def test_later_flags_count_and_the_measurement_shares_those_of_the_data(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    argv = "cifar10:9 D --scale cifar10-cpu --pretrain=--epochs=3 --lincls='--dataset cifar10 -j4'"
    _, text = call(argv, monkeypatch, capsys)
    _, lincls, measure = (shlex.split(li) for li in text.splitlines() if li.startswith("python "))
    assert lincls[lincls.index("--pretrained") + 1].endswith("/checkpoint_0002.pth.tar")
    assert measure[2].endswith("/checkpoint_0002.pth.tar")
    shared = "--dataset cifar10 --images-per-class 1000 -j 4 --out"
    assert f" D {shared} " in shlex.join(measure)


def test_measured_figures_stand_beside_the_published_ones(capsys: pytest.CaptureFixture) -> None:
    _, row = run_recipe.find(TABLES, "table10:32")
    last = {"top1": 70.0, "top5": 90.0, "epoch": 9}
    settings = [{"mean": 60.0}, {"mean": None}, {"mean": 71.5}]
    result = {"last": last, "best": last, "folds": {"count": 3, "settings": settings}}
    metrics = {"alignment": 0.5, "uniformity": -3.0}
    run_recipe.compare(row, result, metrics, changed=False)
    text = capsys.readouterr().out
    lines = {line[:24].strip(): line[24:].split() for line in text.splitlines() if line}
    assert lines["cross-validation top-1"] == ["73.49", "71.50"]
    assert lines["cross-validation top-5"] == ["92.24", "-"]
    assert lines["validation top-1"] == ["74.60", "70.00"]
    assert "3 folds" in text and "no comparison" not in text
    run_recipe.compare(row, {"knn": {"top1": 50.0}}, metrics, changed=True)
    text = capsys.readouterr().out
    assert "k-NN top-1                       -     50.00" in text and "no comparison" in text


def test_results_of_other_flags_are_not_taken_for_these(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    ran = []
    monkeypatch.setattr(run_recipe, "run", lambda command: ran.append(command) or 75)
    words = f"table10:32 {tmp_path} --run --scale tiny --out {tmp_path / 'out'}"
    assert call(words, monkeypatch, capsys)[0] == 75
    assert call(f"{words} --pretrain='-j 3' --lincls='--device cpu'", monkeypatch, capsys)[0] == 75
    assert len(ran) == 2
    for other in ("--seed 1", "--lincls='--lr 1'", "--pretrain='--amp bf16'"):
        status, text = call(f"{words} {other}", monkeypatch, capsys)
        assert status == 2 and "holds another recipe" in text.splitlines()[-1]
    assert len(ran) == 2


@pytest.mark.long
def test_a_tiny_run_ends_with_published_beside_measured(tmp_path: Path) -> None:
    data = write_labelled(tmp_path / "data", classes=6, train=24, val=5)
    words = [sys.executable, str(SCRIPT), "table10:32", str(data), "--run", "--scale", "tiny",
             "--out", str(tmp_path / "out"), "--pretrain=--epochs 2 -j 0 --knn-every 0",
             "--lincls=--epochs 2 --schedule 1 -j 0"]  # fmt: skip
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "out" / "lincls" / "lincls.json").read_text())
    line = next(line for line in done.stdout.splitlines() if line.startswith("validation top-1"))
    assert line.split()[-2:] == ["74.60", f"{result['last']['top1']:.2f}"]
    assert "no comparison" in done.stdout
    metrics = json.loads((tmp_path / "out" / "align_uniform.json").read_text())
    assert f"alignment {metrics['alignment']:.4f}" in done.stdout
    # Done already: nothing is trained again.
    again = subprocess.run(words, capture_output=True, text=True)
    assert again.returncode == 0 and "epoch [" not in again.stdout and line in again.stdout
