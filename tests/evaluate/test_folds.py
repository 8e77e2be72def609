"""Choosing a learning rate and weight decay by cross-validation on the training set: `--folds`."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from harness import HOLD, Processes, wait_for_step
from helpers import read_log, write_labelled
from hypothesis import given
from hypothesis import strategies as st
from probes import BEST, LATEST, MAIN, TINY, classifier, evaluate, result, unequal

from moco.data.images import open_images
from moco.data.subsets import stratified_folds


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_labelled(tmp_path_factory.mktemp("data"), train=16)


GRID = "--lr 0.0001,0.3 --wd 0,0.1 --epochs 2 --schedule 1 --folds 3"
SETTINGS = [(0.0001, 0.0), (0.0001, 0.1), (0.3, 0.0), (0.3, 0.1)]


@pytest.fixture(scope="module", params=["", "--cached"])
def folded(request, data, pretrained, tmp_path_factory) -> tuple[str, Path]:
    """One run of each mode."""
    folder = tmp_path_factory.mktemp("folded") / "run"
    evaluate(data, GRID, request.param, "--pretrained", pretrained, "--save-dir", folder)
    return request.param, folder


# ---- Folds ---------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.integers(2, 5), st.integers(0, 9))
def test_every_class_is_shared_out_evenly(targets, folds, seed):
    parts = stratified_folds(targets, folds, seed)
    assert sorted(index for part in parts for index in part) == list(range(len(targets)))
    assert all(part == sorted(part) for part in parts)
    for chosen in (range(5), *([c] for c in range(5))):
        sizes = [sum(targets[index] in chosen for index in part) for part in parts]
        assert max(sizes) - min(sizes) <= 1
    assert parts == stratified_folds(targets, folds, seed)


def test_another_seed_gives_other_folds():
    targets = [0, 1] * 30
    assert stratified_folds(targets, 3, 0) != stratified_folds(targets, 3, 1)


def test_accuracies_are_those_of_runs_on_folders_made_of_the_folds(data, pretrained, folded):
    """A fold by hand: its images as val/, the others as train/, and a run of its own."""
    mode, folder = folded
    images = open_images("folder", data, "train")
    rows = result(folder)["folds"]["settings"]
    assert [(row["lr"], row["weight_decay"]) for row in rows] == SETTINGS
    held_out = stratified_folds(images.targets, 3, 5)[1]
    for index, path in enumerate(map(Path, images.paths)):
        folder = Path("fold", "val" if index in held_out else "train", path.parent.name)
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder)
    flags = "--lr 0.0001,0.3 --wd 0,0.1 --epochs 2 --schedule 1"
    evaluate(Path("fold"), flags, mode, "--pretrained", pretrained, "--save-dir", "run")
    alone = [head["last"]["top1"] for head in result("run")["heads"]]
    assert [row["top1"][1] for row in rows] == alone


def test_the_highest_mean_is_chosen_and_trained_on_all(data, pretrained, folded):
    mode, folder = folded
    found = result(folder)
    rows = found["folds"]["settings"]
    for row in rows:
        assert row["mean"] == pytest.approx(sum(row["top1"]) / 3)
        assert row["std"] == pytest.approx(torch.tensor(row["top1"]).double().std().item())
    chosen = max(rows, key=lambda row: row["mean"])
    assert chosen["mean"] > min(row["mean"] for row in rows)
    assert found["folds"]["chosen"] == {k: chosen[k] for k in ("lr", "weight_decay")}
    setting = f"--lr {chosen['lr']} --wd {chosen['weight_decay']} --epochs 2 --schedule 1"
    evaluate(data, setting, mode, "--pretrained", pretrained, "--save-dir plain")
    assert torch.equal(classifier(folder / LATEST), classifier(f"plain/{LATEST}"))
    assert found["last"] == found["best"] == result("plain")["last"]
    evaluate(data, "-e --pretrained", folder / BEST, "--save-dir e")
    assert result("e")["top1"] == found["last"]["top1"]


def test_validation_is_evaluated_once_at_the_end(folded):
    assert [len(read_log(folded[1], kind)) for kind in ("val", "held_out")] == [1, 3]
    steps = [line["step"] for line in read_log(folded[1], "lincls")]
    assert steps == sorted(set(steps))


def test_what_is_in_val_has_no_part_in_the_choice(data, pretrained, folded, tmp_path):
    mode, folder = folded
    shutil.copytree(data, other := tmp_path / "other")
    (other / "val" / "class_0").rename(other / "val" / "x")
    (other / "val" / "class_1").rename(other / "val" / "class_0")
    (other / "val" / "x").rename(other / "val" / "class_1")
    evaluate(other, GRID, mode, "--pretrained", pretrained, "--save-dir r")
    assert result("r")["folds"] == result(folder)["folds"]
    assert result("r")["last"]["top1"] != result(folder)["last"]["top1"]
    assert torch.equal(classifier(f"r/{LATEST}"), classifier(folder / LATEST))


def test_a_setting_that_diverges_in_a_fold_is_never_chosen(data, pretrained):
    flags = "--lr 1e38,0.3 --epochs 2 --folds 2 --cached --save-dir r --pretrained"
    evaluate(data, flags, pretrained)
    fallen, other = result("r")["folds"]["settings"]
    assert None in fallen["top1"] and fallen["mean"] is None
    assert result("r")["folds"]["chosen"]["lr"] == other["lr"] == 0.3


def test_cached_views_hold_out_centre_crops(data, pretrained):
    flags = "--cached --cached-views 1 --lr 0.3,1 --epochs 1 --folds 2 --save-dir r --pretrained"
    evaluate(data, flags, pretrained)
    kinds = {path.parent for path in Path("r/features").rglob("view_*")}
    assert len(kinds) == 3  # random views, centre crops for held-out images, validation
    assert result("r")["protocol"]["folds"] == 2


def test_folds_are_of_the_labelled_subset(data, pretrained, capsys):
    flags = "--labels 50 --lr 0.3,1 --epochs 1 --folds 2 --cached --save-dir r --pretrained"
    evaluate(data, flags, pretrained)
    assert result("r")["train_images"] == 24
    out = capsys.readouterr().out
    assert "chosen by 2 folds of the training set" in out
    assert out.count("12 images held out") == 2 and out.count("<- chosen") == 1
    assert out.count("evaluated once") == 1 and "flatters" not in out


# ---- Cut off, and refused ------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("where", ["second fold", "last stage"])
def test_a_run_that_was_killed_ends_like_one_that_was_not(data, pretrained, tmp_path, where):
    flags = [*TINY, *GRID.split(), "--pretrained", pretrained, "--print-freq", 1]
    whole = Processes(tmp_path / "o1", *flags, "--save-dir", tmp_path / "whole", data, code=MAIN)
    again = [*flags, "--save-dir", tmp_path / "cut", "--resume", "auto", data]
    wanted = {"second fold": 13, "last stage": 31}[where]  # steps, 8 in a fold
    hold = HOLD.format(step=wanted, go="never")
    cut = Processes(tmp_path / "o2", *again, code=MAIN, before=hold)
    wait_for_step(tmp_path / "cut", wanted, cut)
    cut.kill()
    cut.wait()
    assert not (tmp_path / "cut" / "lincls.json").exists()
    on = Processes(tmp_path / "o3", *again, code=MAIN)
    assert on.wait() == [0], on.output()
    first = "after epoch 0" if where == "last stage" else "resuming"
    assert first in on.output()
    assert "fold 1 of 3, epoch" not in on.output()
    assert whole.wait() == [0], whole.output()
    assert unequal("whole", "cut") == []
    assert {**result("whole"), "checkpoint": ""} == {**result("cut"), "checkpoint": ""}
    for kind in ("val", "lincls", "held_out"):
        mine, theirs = (
            [line["step"] for line in read_log(tmp_path / name, kind)] for name in ("cut", "whole")
        )
        assert mine == theirs, kind


def test_folds_go_on_with_as_many(data, pretrained, folded, refused):
    mode, folder = folded
    shutil.copytree(folder, "copy")
    for change in ("--folds 2", "--lr 0.3,1"):
        flags = [GRID, mode, change, "--resume auto --save-dir copy --pretrained", pretrained]
        message = refused(data, *flags)
        assert "before" in message and change.split()[0][2:] in message


@pytest.mark.long
def test_two_processes_choose_alike(data, pretrained, tmp_path):
    argv = [*TINY, *GRID.split(), "--cached", "--pretrained", pretrained]
    processes = Processes(
        tmp_path / "out", *argv, "--save-dir", tmp_path / "two", data, count=2, code=MAIN
    )
    assert processes.wait() == [0, 0], processes.output()
    evaluate(data, GRID, "--cached --pretrained", pretrained, "--save-dir one")
    one, two = result("one")["folds"], result("two")["folds"]
    assert one["chosen"] == two["chosen"] and two["count"] == 3
