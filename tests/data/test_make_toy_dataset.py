"""The toy generator: same bytes for the same arguments, and care with folders."""

import json
from pathlib import Path

import numpy as np
import pytest
from helpers import load_script
from PIL import Image
from torchvision.datasets import ImageFolder

from moco.data import toy

main = load_script("make_toy_dataset").main
SMALL = {"train_per_class": 3, "val_per_class": 2, "size": 24}


def files(out: Path) -> dict[str, bytes]:
    return {str(p.relative_to(out)): p.read_bytes() for p in sorted(out.rglob("*.jpg"))}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("toy") / "new" / "folder"
    assert toy.make_dataset(out, **SMALL)
    return out


def test_asking_for_more_keeps_the_first_images(made, tmp_path):
    toy.make_dataset(tmp_path, **SMALL | {"train_per_class": 4, "val_per_class": 1})
    few, more = files(made), files(tmp_path)
    common = few.keys() & more.keys()
    assert len(common) == len(toy.TEXTURES) * (3 + 1)
    assert all(few[name] == more[name] for name in common)
    assert len(more) == len(toy.TEXTURES) * 5


@pytest.mark.parametrize("split", toy.SPLITS)
def test_is_an_image_folder_of_rgb_jpegs(made, split):
    dataset = ImageFolder(made / split)
    assert dataset.classes == sorted(toy.TEXTURES)
    assert len(dataset.classes) >= 10
    assert len(dataset) == len(toy.TEXTURES) * SMALL[f"{split}_per_class"]
    for path, _ in dataset.samples:
        with Image.open(path) as image:
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (24, 24))


@pytest.mark.parametrize("name", toy.TEXTURES)
def test_each_texture_has_ink_and_paper(name):
    ink = toy.ink_map(toy.TEXTURES[name], 64, np.random.default_rng(0))
    assert ink.shape == (64, 64)
    assert 0.1 < ink.mean() < 0.9
    assert ink.min() == 0 and ink.max() == 1


def test_a_finished_folder_is_used_again(made, monkeypatch, capsys):
    def no_image(*args):
        raise AssertionError("made an image anew")

    monkeypatch.setattr(toy, "make_image", no_image)
    main([str(made), "--train-per-class", "3", "--val-per-class", "2", "--size", "24"])
    assert capsys.readouterr().out.startswith("reusing 12 classes x (3 train + 2 val)")


def test_other_folders_are_refused(made, tmp_path):
    before = files(made)
    with pytest.raises(FileExistsError, match="other settings"):
        toy.make_dataset(made, **SMALL | {"seed": 1})
    assert files(made) == before
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "mine.jpg").write_bytes(b"mine")
    with pytest.raises(SystemExit, match="not empty"):
        main([str(tmp_path)])
    assert files(tmp_path) == {"train/mine.jpg": b"mine"}


def test_a_cut_off_run_is_started_over(made, tmp_path, monkeypatch):
    """And gives the same bytes as another run."""
    make_image, calls = toy.make_image, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) > 20:
            raise KeyboardInterrupt
        return make_image(*args)

    monkeypatch.setattr(toy, "make_image", interrupted)
    with pytest.raises(KeyboardInterrupt):
        toy.make_dataset(tmp_path, **SMALL)
    assert not (tmp_path / "toy.json").exists()
    (tmp_path / "train" / "stripes" / "00000.jpg").write_bytes(b"half an ima")

    monkeypatch.setattr(toy, "make_image", make_image)
    assert toy.make_dataset(tmp_path, **SMALL)
    assert files(tmp_path) == files(made)
    assert json.loads((tmp_path / "toy.json").read_text())["per_class"] == {"train": 3, "val": 2}


@pytest.mark.parametrize("flags", [["--size", "8"], ["--val-per-class", "0"], ["--seed", "-1"]])
def test_bad_arguments(tmp_path, flags, capsys):
    with pytest.raises(SystemExit) as stop:
        main([str(tmp_path / "out"), *flags])
    assert stop.value.code == 2
    assert flags[0] in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
