"""Recipes of sentence encoders: every row as commands that start, and what the end prints."""

from __future__ import annotations

import csv
import shlex
from pathlib import Path

import pytest
from helpers import ROOT

from moco.cli import sentence_config
from moco.runs import recipes, sweep
from scripts import evaluate_sentences, measure_align_uniform, run_recipe

TABLES = run_recipe.TABLES
PAPER = ROOT.parent / "shared" / "paper"
ROWS = [name for name in TABLES.names() if name.startswith(("table4:", "table11:"))]


@pytest.mark.skipif(not PAPER.is_dir(), reason="the paper's tables are not here")
def test_table_11_is_the_printed_one() -> None:
    with open(PAPER / "table11.csv", newline="") as file:
        printed = list(csv.DictReader(file))
    ours = TABLES.tables["table11"]["rows"]
    assert len(ours) == len(printed) == 50
    for row, original in zip(ours, printed, strict=True):
        for name, value in original.items():
            nan = (original["cv_mr"] or "").startswith("NaN") and name[:2] in ("cv", "va")
            assert row[name] == ("NaN" if nan else value or ""), (name, original)


def test_table_4_is_the_best_of_table_11() -> None:
    for row in TABLES.tables["table4"]["rows"]:
        _, original = TABLES.find(row["note"])
        for name in ("val_mr", "val_cr"):
            assert not row[name] or row[name] == original[name]


@pytest.mark.parametrize("scale", ["full", "tiny"])
def test_every_row_starts_with_its_objective(scale, tmp_path) -> None:
    (tmp_path / "text.txt").touch()  # nobody reads it
    for recipe in ROWS:
        _, row = TABLES.find(recipe)
        out = tmp_path / recipe.replace(":", "-")
        out.mkdir()  # by then it holds recipe.json
        plan = recipes.plan(TABLES, recipe, str(tmp_path), out, scale=scale, seed=3)
        (checkpoint, train), (_, evaluate), (_, measure) = plan.steps
        config = sentence_config(train[1:])
        for term, parameter in (("contr", "tau"), ("align", "alpha"), ("unif", "t")):
            weight = float(row[f"{term}_w"] or 0)
            assert getattr(config.objective, f"{term}_w") == weight
            if weight:
                value = getattr(config.objective, f"{term}_{parameter}")
                assert value == float(row[f"{term}_{parameter}"])
        assert config.objective.normalize == (row["normalized"] == "yes")
        assert (config.optim.lr, config.optim.batch_size, config.optim.seed) == (5e-4, 400, 3)
        assert bool(plan.changes) == (scale == "tiny")
        size = (620, 600, 50001) if scale == "full" else (128, 128, 20000)
        assert (config.encoder.emb, config.encoder.hidden, config.data.vocab) == size
        name = "checkpoint_0000.pth.tar" if scale == "full" else "step_00000300.pth.tar"
        assert checkpoint.name == name and checkpoint.parent == config.saving.save_dir
        args = evaluate_sentences.build_parser().parse_args(evaluate[1:])
        assert args.checkpoint == str(checkpoint) and args.mr == args.cr == str(tmp_path)
        parser = measure_align_uniform.build_parser()
        args = parser.parse_args(measure[1:])
        measure_align_uniform.check(parser, args)


def test_figure_9b_has_every_row(tmp_path) -> None:
    spec = ROOT / "scripts" / "sweeps" / "figure9b.toml"
    runs = sweep.plan(spec, TABLES, Path("run_recipe.py"), str(tmp_path), tmp_path, scale="tiny")
    assert len(runs) == 50
    for run in runs:
        args = run_recipe.build_parser().parse_args(run.command[1:])
        recipes.plan(TABLES, args.recipe, args.data, args.out, scale=args.scale,
                     pretrain=args.pretrain, lincls=args.lincls)  # fmt: skip


def test_commands_are_printed_with_what_is_published(capsys) -> None:
    run_recipe.main(["table11:1", "DIR"])
    out = capsys.readouterr().out
    assert "not normalised" in out and "MR validation 77.23" in out
    lines = [shlex.split(line) for line in out.splitlines() if line.startswith("python ")]
    assert "--no-normalize" in lines[0] and "--contr-tau" in lines[0]
    assert lines[0][-1] == "DIR/text.txt"
    run_recipe.main(["table11:48", "DIR", "--folds", "5"])
    assert (
        "here features collapse" in (out := capsys.readouterr().out) and "--cr DIR --folds 5" in out
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--lincls", "--lr 1"], "--lincls is for encoders of images"),
        (["--folds", "1"], "--folds must be at least 2, got 1"),
        (["--scale", "cifar10"], "--scale cifar10 is not of this table; there is tiny"),
    ],
)
def test_what_sentences_have_not_is_refused(flags, message, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        run_recipe.main(["table11:1", "DIR", *flags])
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_measured_figures_stand_beside_the_published_ones() -> None:
    _, row = TABLES.find("table11:47")
    bag = {"accuracy": 78.0}
    sentiment = {
        "MR": {"accuracy": 70.0, "constant": 49.77, "bag_of_words": bag},
        "CR": {"accuracy": 80.0, "constant": 63.49, "bag_of_words": bag},
    }
    metrics = {"alignment": 0.5, "uniformity": -3.0}
    text = "\n".join(recipes.compared(row, [{"sentiment": sentiment}], metrics, changed=True))
    assert f"{'MR validation':<24} {'73.76':>9} {'70.00':>9}" in text
    assert "constant 49.77 / 63.49, bag of words 78.00 / 78.00" in text
