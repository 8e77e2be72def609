"""Fine-tuning, and training on a part of the labels: `--finetune`, `--labels`."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from harness import Processes
from helpers import differences, read_log
from probes import (
    BEST,
    LATEST,
    MAIN,
    TINY,
    evaluate,
    load,
    result,
    unequal_states,
    write_encoder,
)
from torch import nn

from moco.checkpoint import load_encoder
from moco.cli import lincls_config
from moco.data import loader
from moco.data import subsets as labels
from moco.data.images import FolderImages, Subset, open_images
from moco.data.views import IMAGENET_MEAN, IMAGENET_STD, lincls_recipe, normalize
from moco.errors import DataError
from moco.evaluate import feasible
from moco.memory import Memory

RATES = "--lr 0.2 --lr-backbone 0.05 --wd 1e-3 --schedule 2"


@pytest.fixture(scope="module")
def tuned(data, pretrained, tmp_path_factory) -> Path:
    """Three epochs of fine-tuning without interruption."""
    folder = tmp_path_factory.mktemp("tuned") / "run"
    evaluate(data, "--finetune --epochs 3", RATES, "--pretrained", pretrained, "--save-dir", folder)
    return folder


# ---- Fine-tuning ---------------------------------------------------------------------------------


def test_training_is_that_of_a_loop_by_hand(data, pretrained, tuned):
    """Same images, batch norm in training mode, two learning rates, weight decay on everything."""
    images = open_images("folder", data, "train")
    batches = loader.EpochBatches(len(images), 8, seed=5)
    views = loader.AugmentedViews(images, lincls_recipe(32), seed=5, num_views=1)
    encoder, _ = load_encoder(pretrained)
    torch.manual_seed(5)
    head = nn.Linear(64, 3)
    nn.init.normal_(head.weight, std=0.01)
    nn.init.zeros_(head.bias)
    groups = [{"params": head.parameters(), "lr": 0.2},
              {"params": encoder.parameters(), "lr": 0.05}]  # fmt: skip
    optimizer = torch.optim.SGD(groups, momentum=0.9, weight_decay=1e-3)
    encoder.train()
    for epoch in range(3):
        batches.set_epoch(epoch)
        optimizer.param_groups[0]["lr"] = 0.2 * (0.2 if epoch >= 2 else 1)
        optimizer.param_groups[1]["lr"] = 0.05 * (0.2 if epoch >= 2 else 1)
        for keys in batches:
            view, target, _ = zip(*(views[key] for key in keys), strict=True)
            pixels = normalize(torch.stack(view), IMAGENET_MEAN, IMAGENET_STD)
            loss = F.cross_entropy(head(encoder(pixels)), torch.tensor(target))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    mine = {f"module.{name}": tensor for name, tensor in encoder.state_dict().items()}
    mine |= {"module.fc.weight": head.weight.detach(), "module.fc.bias": head.bias.detach()}
    assert differences(mine, dict(load(tuned / LATEST)["state_dict"])) == []


def test_the_result_says_what_was_done_and_the_file_evaluates_as_it_was(data, pretrained, tuned):
    found = result(tuned)
    assert found["evaluation"] == "finetune" and found["pretrained_epochs"] == 7
    assert found["protocol"]["finetune"] is True
    assert found["protocol"]["lr"] == 0.2 and found["protocol"]["lr_backbone"] == 0.05
    assert found["checkpoint"] == str(pretrained)
    for name, key in ((LATEST, "last"), (BEST, "best")):
        evaluate(data, "-e --pretrained", tuned / name, "--save-dir", key)
        assert result(key)["top1"] == found[key]["top1"]
    network, info = load_encoder(tuned / LATEST, head="linear")
    assert network(torch.randn(2, 3, 32, 32)).shape == (2, 3) and info["epoch"] == 7


def test_knn_is_of_the_encoder_before_and_leaves_the_training_as_it_is(data, pretrained, tuned):
    evaluate(data, "--epochs 0 --knn --pretrained", pretrained, "--save-dir knn")
    flags = ["--finetune --epochs 3 --knn", RATES, "--pretrained", pretrained]
    evaluate(data, *flags, "--save-dir both")
    assert result("both")["knn"] == result("knn")["knn"]
    assert unequal_states(tuned / LATEST, f"both/{LATEST}") == []


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("", (0.2, 0.01, 20, [12, 16], 0.2)),
        ("--labels 10", (0.2, 0.01, 20, [12, 16], 0.2)),
        ("--labels 1", (5.0, 0.02, 20, [12, 16], 0.2)),
        ("--labels 1 --lr 3 --epochs 5 --schedule 2 3", (3.0, 0.02, 5, [2, 3], 0.2)),
        ("--lr-backbone 0 --schedule-factor 0.1", (0.2, 0.0, 20, [12, 16], 0.1)),
    ],
)
def test_defaults_are_swavs(data, pretrained, flags, expected):
    argv = [*TINY, "--finetune", *flags.split(), "--pretrained", str(pretrained), str(data)]
    values = lincls_config(argv).to_flat()
    names = ("lr", "lr_backbone", "epochs", "schedule", "schedule_factor")
    assert tuple(values[name] for name in names) == expected
    assert values["weight_decay"] == 0


@pytest.mark.long
def test_two_processes_save_what_was_evaluated(data, pretrained, tmp_path, capsys, refused):
    """Each normalises its own half of the batch; rank 0's averages are saved, and evaluated."""
    flags = ["--finetune", "--epochs", 1, "--lr-backbone", 0.05, "--pretrained", pretrained]
    argv = [*TINY, *flags, "--save-dir", tmp_path / "two", data]
    processes = Processes(tmp_path / "out", *argv, count=2, code=MAIN)
    assert processes.wait() == [0, 0], processes.output()
    evaluate(data, "-e --pretrained", f"two/{LATEST}", "--save-dir one")
    assert result("one")["top1"] == result("two")["last"]["top1"]
    loss = read_log(tmp_path / "two", "val")[-1]["loss"]
    assert f"loss {loss:.4f}" in capsys.readouterr().out
    # One process would take other batch-norm statistics.
    assert result("two")["protocol"]["processes"] == 2
    message = refused(data, *flags, "--epochs 3 --save-dir two --resume auto")
    assert "processes: 2 before, 1 now" in message


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--finetune --lr 0.2 --lr-backbone 0.1", "lr_backbone: 0.05 before, 0.1 now"),
        ("--finetune --lr 0.2 --lr-backbone 0.05 --labels 50", "labels_digest"),
        ("--lr 0.2", "another encoder"),
        ("--finetune --pretrained other.pth.tar", "another encoder"),
    ],
)
def test_a_fine_tuned_run_is_not_gone_on_with_as_another(
    data, pretrained, tuned, refused, flags, named
):
    write_encoder(Path("other.pth.tar"), seed=1)
    start = ["--epochs 4 --wd 1e-3 --schedule 2 --pretrained", pretrained]
    assert named in refused(data, *start, f"--resume {tuned / LATEST} --save-dir r", flags)


# ---- Part of the labels --------------------------------------------------------------------------


ONE_PERCENT = ["a/a_141.JPEG", "a/a_213.JPEG", "a/a_59.JPEG", "b/b_29.JPEG", "c/c_0.JPEG"]
ONE_PERCENT_DIGEST = "ada553a1ac33"


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> Path:
    """Classes of 250, 30 and 3 images (which need not be images here)."""
    root = tmp_path_factory.mktemp("many") / "train"
    for name, count in (("a", 250), ("b", 30), ("c", 3)):
        (root / name).mkdir(parents=True)
        for i in range(count):
            (root / name / f"{name}_{i}.JPEG").touch()
    return root


def test_percent_is_of_each_class_and_at_least_one(many):
    images = FolderImages(many)
    for percent, counts in (
        (1, [3, 1, 1]),
        (10, [25, 3, 1]),
        (50, [125, 15, 2]),
        (100, [250, 30, 3]),
    ):
        chosen = labels.percent_of_labels(images, percent, 0)
        assert chosen == sorted(set(chosen))
        assert [sum(images.targets[i] == c for i in chosen) for c in range(3)] == counts
    one, ten = (set(labels.percent_of_labels(images, p, 0)) for p in (1, 10))
    assert one < ten
    assert set(labels.percent_of_labels(images, 10, 1)) != ten


def test_percent_is_the_same_on_any_machine(many):
    """These names were found once; where the folder lies, and other classes, change nothing."""
    images = FolderImages(many)
    names, chosen = labels.image_names(images), labels.percent_of_labels(images, 1, 0)
    assert [names[i] for i in chosen] == ONE_PERCENT
    assert labels.subset_digest(Subset(images, chosen)) == ONE_PERCENT_DIGEST


@pytest.mark.parametrize(
    "text",
    [
        "a_3.JPEG\nb_7.JPEG\n",
        "b_7.JPEG\r\na/a_3.JPEG\r\n",
        "\ufeffa_3.JPEG\n\n  b/b_7.JPEG  \n\n",
        "./b/b_7.JPEG\na_3.JPEG\na/a_3.JPEG\na_3.JPEG",
    ],
    ids=["names", "CRLF", "BOM and blanks", "again"],
)
def test_a_list_names_files_as_simclr_does_or_with_the_class(many, tmp_path, text):
    (tmp_path / "list.txt").write_bytes(text.encode())
    images = FolderImages(many)
    chosen = labels.listed_labels(images, tmp_path / "list.txt")
    names = labels.image_names(images)
    assert [names[i] for i in chosen] == ["a/a_3.JPEG", "b/b_7.JPEG"]


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"a_3.JPEG\nz_1.JPEG\nz_2.JPEG\n", ["2 of its 3", "'z_1.JPEG'", "a/a_0.JPEG"]),
        (b"\n \n", ["names no image"]),
        (b"", ["names no image"]),
        (b"PK\x03\x04\0\0", ["no text file"]),
        (b"\xff\xfe\n", ["1 of its 1"]),
        (b"same.png\n", ["a/same.png or b/same.png", "CLASS/FILE"]),
    ],
)
def test_a_list_that_does_not_fit_is_refused(many, tmp_path, content, named):
    shutil.copytree(many, tmp_path / "train")
    for name in "ab":
        (tmp_path / "train" / name / "same.png").touch()
    (tmp_path / "list.txt").write_bytes(content)
    images = FolderImages(tmp_path / "train")
    with pytest.raises(DataError) as error:
        labels.listed_labels(images, tmp_path / "list.txt")
    for part in (str(tmp_path / "list.txt"), *named):
        assert part in str(error.value)


def test_labels_on_the_command_line(data, pretrained, capsys):
    """Percent, and the same images by a list: same digest, same training."""
    flags = ["--lr 1 --epochs 1 --pretrained", pretrained]
    evaluate(data, *flags, "--labels 50 --knn --knn-k 100 --save-dir p")
    out = capsys.readouterr().out
    digest = result("p")["labels"]["digest"]
    assert f"labels: 50 %: 15 images, digest {digest}" in out
    found = result("p")
    assert found["train_images"] == 15 and found["knn"]["k"] == 15  # the bank is these
    images = open_images("folder", data, "train")
    names = labels.image_names(images)
    chosen = [names[i] for i in labels.percent_of_labels(images, 50, 0)]
    Path("list.txt").write_text("\n".join(reversed(chosen)))
    evaluate(data, *flags, "--labels list.txt --save-dir l")
    assert result("l")["labels"] == {"of": "list.txt", "digest": digest}
    assert unequal_states(f"p/{LATEST}", f"l/{LATEST}") == []
    evaluate(data, *flags, "--labels 50 --seed 9 --labels-seed 1 --save-dir drawn")
    assert result("drawn")["labels"]["digest"] != digest


@pytest.mark.parametrize("mode", ["--finetune --lr-backbone 0.1", "--knn"])
def test_images_that_memory_does_not_suffice_for(
    mode, data, pretrained, monkeypatch, capsys, refused
):
    """Refused before anything is written; the flags that it names are taken."""
    flags = [mode, "--lr 1 --epochs 1 --pretrained", pretrained, "--save-dir"]
    seen = []
    take = feasible.memory_taken
    monkeypatch.setattr(feasible, "memory_taken", lambda *a: seen.append(take(*a)) or seen[-1])
    monkeypatch.setattr(feasible, "memory_of", lambda _: Memory(2**40, 2**40))
    evaluate(data, *flags, "whole")
    assert "warning: a step" not in capsys.readouterr().out
    free = int(0.8 * seen[0])
    monkeypatch.setattr(feasible, "memory_of", lambda _: Memory(free, free // 2))
    line = refused(data, *flags, "r")
    assert not Path("r").exists()
    assert re.search("a step takes about .* are free on this machine; with --batch-size 4 it", line)
    monkeypatch.setattr(feasible, "memory_of", lambda _: Memory(free, 10 * free))
    evaluate(data, *flags, "r --batch-size 4")
    assert "warning: a step" not in capsys.readouterr().out
