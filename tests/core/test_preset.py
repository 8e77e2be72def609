"""--preset small: what it chooses by size and number of the images, and that given flags win."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from helpers import refusal, write_images

import main_moco
from moco import cli
from moco.config import PretrainConfig, small_preset
from moco.config.preset import CHOSEN, LEAST, MOST
from moco.data.images import open_images, typical_side


@pytest.fixture(scope="module")
def photos(once) -> Path:
    return once("photos", lambda root: write_images(root, {"album": LEAST}, size=40))


def config(*words: object) -> PretrainConfig:
    return cli.pretrain_config([*map(str, words), "--device", "cpu"])


@pytest.mark.parametrize("side", [48, 49])
@pytest.mark.parametrize(
    ("count", "epochs"),
    [(LEAST, 60), (2_499, 60), (2_500, 30), (9_999, 30), (10_000, 20), (MOST, 20)],
)
def test_the_queue_is_a_small_share_of_the_images_and_holds_whole_batches(
    count, epochs, side
) -> None:
    values, why = small_preset(count, side, {})
    batch, queue = values["batch_size"], values["moco_k"]
    assert values.keys() == set(CHOSEN) and values["epochs"] == epochs
    assert queue % batch == 0 and queue == max(2 * batch, count // 10 // batch * batch)
    assert batch % int(values["group_size"]) == 0 and batch > int(values["group_size"])
    assert queue <= 0.26 * count and batch * 7 <= count
    assert values["image_size"] == (32 if side <= 48 else 64)
    assert f"{count} images" in why and f"of {side} pixels" in why


def test_given_flags_win_and_the_rest_follows_them(photos) -> None:
    plain = config("--preset", "small", photos)
    flat = plain.to_flat()
    values, _ = small_preset(LEAST, 40, {})
    assert {name: flat[name] for name in CHOSEN} == values
    assert "--epochs 60" in plain.preset.chosen and plain.preset.chosen.endswith("none of them")
    mine = config("--preset", "small", "--epochs", 3, "-b", 100, "--bn-splits", 4, photos)
    assert (mine.schedule.epochs, mine.optim.batch_size, mine.encoder.moco_k) == (3, 100, 200)
    assert (mine.group_size, mine.optim.lr, mine.encoder.arch) == (25, 0.03, "resnet8x2s2")
    assert "; given: --batch-size 100 --epochs 3" in mine.preset.chosen
    odd = config("--preset", "small", "-b", 60, photos)
    assert (odd.encoder.group_size, odd.group_size) == ("auto", 30)
    without = config("-b", 8, "--moco-k", 8, photos)
    assert without.preset.chosen == "" and without.encoder.arch == "resnet50"


def test_a_run_notes_the_values_and_goes_on_by_the_same_command(photos, tmp_path, capsys) -> None:
    shutil.copytree(photos, tmp_path / "photos")
    (tmp_path / "photos" / "a.heic").write_bytes(b"no image")
    flags = "--preset small --image-size 16 --seed 1 -j 0 --device cpu --resume auto --save-dir"
    argv = [*flags.split(), str(tmp_path / "run")]
    for steps in ("1", "2"):
        main_moco.main([*argv, "--max-steps", steps, str(tmp_path / "photos")])
    said = capsys.readouterr().out
    assert said.count("left out of") == 2, "once a run, though the preset has looked before it"
    assert said.count("    preset: small, which chose --arch resnet8x2s2 --mlp") == 2
    noted = json.loads((tmp_path / "run" / "args.json").read_text())
    values, _ = small_preset(LEAST, 40, {"image_size": 16})
    assert {name: noted[name] for name in CHOSEN} == values and noted["preset"] == "small"


@pytest.mark.parametrize(
    ("counts", "reason"),
    [
        ({"a": 3}, f"is for {LEAST} to {MOST} images, got 3: too few to train on from scratch"),
        ({}, "not read (convert them to JPEG or PNG): 1 (a.heic)"),
    ],
)
def test_too_few_images_are_refused_in_one_line(counts, reason, tmp_path, capsys) -> None:
    write_images(tmp_path / "photos", counts)
    (tmp_path / "photos").mkdir(exist_ok=True)
    (tmp_path / "photos" / "a.heic").write_bytes(b"no image")
    argv = ["--preset", "small", tmp_path / "photos"]
    status, line = refusal(main_moco.main, argv, capsys)
    assert status == 2 and reason in line
    with pytest.raises(ValueError, match=f"got {MOST + 1}: give the flags without --preset"):
        small_preset(MOST + 1, 32, {})


def test_the_typical_side_is_the_median_of_the_shorter_ones_that_can_be_read(tmp_path) -> None:
    write_images(tmp_path, {"a": 3}, size=10)
    write_images(tmp_path, {"b": 4}, size=20)
    (tmp_path / "a" / "bad.png").write_bytes(b"no image")
    assert typical_side(open_images("folder", tmp_path, "pretrain")) == 20
