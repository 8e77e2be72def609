"""scripts/extract_features.py on real checkpoints and images."""

from __future__ import annotations

import json
import os
import runpy
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms as T
from helpers import ROOT, refusal, write_images
from PIL import Image
from safetensors import safe_open

from moco import encoders
from moco.checkpoint import load_encoder, write_checkpoint
from moco.data.images import FolderImages
from moco.data.samples import AugmentedViews
from moco.data.views import normalize, pretrain_recipe

extract = runpy.run_path(str(ROOT / "scripts" / "extract_features.py"))["main"]
MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory) -> Path:
    encoder = encoders.build_encoder("resnet8", 16)
    encoders.add_mlp_head(encoder)
    state = {f"module.encoder_q.{name}": tensor for name, tensor in encoder.state_dict().items()}
    path = tmp_path_factory.mktemp("run") / "checkpoint_0006.pth.tar"
    args = {"image_size": 32, "mean": MEAN, "std": STD, "objective": "1 * uniform(t=2)"}
    write_checkpoint(
        path, {"version": 1, "arch": "resnet8", "epoch": 7, "state_dict": state, "args": args}
    )
    return path


def run(*argv: object) -> None:
    extract(["--device", "cpu", "-j", "0", *map(str, argv)])


def load(path: str) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file}


@torch.no_grad()
def by_hand(checkpoint: Path, paths: list[Path], head: str = "none") -> torch.Tensor:
    """The same with torchvision's own transforms, one image at a time."""
    encoder = load_encoder(checkpoint, head=head)[0]
    see = T.Compose([T.Resize(32), T.CenterCrop(32), T.ToTensor(), T.Normalize(MEAN, STD)])
    images = [see(Image.open(path).convert("RGB")).unsqueeze(0) for path in paths]
    return torch.cat([encoder(image) for image in images])


@pytest.mark.parametrize("flags", ["", "--batch-size 7 -j 2"])
def test_npz_holds_features_labels_paths_and_classes_in_order(pretrained, data, flags):
    run(pretrained, data, "a.npz", "--split", "train", *flags.split())
    found = load("a.npz")
    paths = sorted((data / "train").rglob("*.png"))
    assert found["paths"].tolist() == [str(path.relative_to(data)) for path in paths]
    assert found["classes"].tolist() == ["class_0", "class_1", "class_2"]
    assert found["labels"].dtype == np.int64
    assert found["labels"].tolist() == [int(path.parent.name[-1]) for path in paths]
    assert found["features"].dtype == np.float32 and found["features"].shape == (30, 64)
    np.testing.assert_allclose(found["features"], by_hand(pretrained, paths), rtol=1e-4, atol=1e-5)
    about = json.loads(found["about"].item())
    assert (about["arch"], about["epoch"], about["layer"]) == ("resnet8", 7, "backbone")
    assert (about["checkpoint"], about["split"]) == ("checkpoint_0006.pth.tar", "train")


def test_safetensors_holds_the_same(pretrained, data):
    for name in ("a.npz", "a.safetensors"):
        run(pretrained, data, name, "--layer", "projection", "--normalize")
    wanted = load("a.npz")
    with safe_open("a.safetensors", framework="np") as file:
        for name in ("features", "labels"):
            found = file.get_tensor(name)
            assert found.dtype == wanted[name].dtype and np.array_equal(found, wanted[name])
        metadata = file.metadata()
    assert json.loads(metadata["paths"]) == wanted["paths"].tolist()
    assert json.loads(metadata["classes"]) == wanted["classes"].tolist()
    assert json.loads(metadata["about"]) == json.loads(wanted["about"].item())
    paths = sorted((data / "val").rglob("*.png"))
    raw = by_hand(pretrained, paths, head="projection")
    assert raw.shape == (15, 16) and (raw.norm(dim=1) - 1).abs().max() > 0.1
    np.testing.assert_allclose(wanted["features"], F.normalize(raw, dim=1), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_two_views_by_the_augmentation_of_the_checkpoint(pretrained, data):
    """Of MoCo v2 where the file does not say; one seed gives the same, whatever the batches."""
    flags = ["--views", 2, "--layer", "projection", "--normalize"]
    run(pretrained, data, "a.npz", *flags)
    run(pretrained, data, "b.safetensors", *flags, "--batch-size", 4)
    run(pretrained, data, "c.npz", *flags, "--seed", 1)
    content = torch.load(pretrained, weights_only=True)
    del content["checksum"]
    content["args"] |= {"aug_plus": False, "crop_scale": [0.9, 1.0]}
    write_checkpoint(Path("v1.pth.tar"), content)
    run("v1.pth.tar", data, "d.npz", *flags)
    found, v1 = load("a.npz"), load("d.npz")
    encoder = load_encoder(pretrained, head="projection")[0]
    images = FolderImages(data / "val")
    for arrays, recipe in (
        (found, pretrain_recipe(32, aug_plus=True)),
        (v1, pretrain_recipe(32, crop_scale=(0.9, 1.0))),
    ):
        made = AugmentedViews(images, recipe, seed=0, num_views=2)
        rows = [made[0, index] for index in range(len(images))]
        for view, name in enumerate(("features", "features_2")):
            pixels = normalize(torch.stack([row[view] for row in rows]), MEAN, STD)
            wanted = F.normalize(encoder(pixels), dim=1)
            np.testing.assert_allclose(arrays[name], wanted, rtol=1e-4, atol=1e-5)
    with safe_open("b.safetensors", framework="np") as file:
        for name in ("features", "features_2"):
            np.testing.assert_allclose(file.get_tensor(name), found[name], rtol=1e-4, atol=1e-5)
            assert np.abs(load("c.npz")[name] - found[name]).max() > 1e-3
    assert np.abs(found["features"] - found["features_2"]).max() > 1e-3
    assert found["labels"].tolist() == [0] * 5 + [1] * 5 + [2] * 5 and len(found["paths"]) == 15
    about = json.loads(v1["about"].item())
    assert (about["views"], about["seed"], about["crop_scale"]) == (2, 0, [0.9, 1.0])


def test_any_folder_of_images_flat_or_with_classes(pretrained, tmp_path):
    write_images(tmp_path / "flat", {"": 3})
    run(pretrained, "flat", "flat.npz")
    found = load("flat.npz")
    assert found["labels"].tolist() == [-1, -1, -1] and found["classes"].tolist() == []
    assert found["paths"].tolist() == ["000.png", "001.png", "002.png"]
    write_images(tmp_path / "named", {"b": 1, "a b/c": 2, "é": 1})
    run(pretrained, "named", "named.npz")
    found = load("named.npz")
    assert found["classes"].tolist() == ["a b", "b", "é"]
    assert found["labels"].tolist() == [0, 0, 1, 2]
    assert found["paths"].tolist()[0] == os.path.join("a b", "c", "000.png")


def test_labels_of_val_are_those_of_training(pretrained, data, tmp_path):
    """Also where val/ lacks a class, and where train/ has an empty folder."""
    shutil.copytree(data, "copy")
    shutil.rmtree("copy/val/class_0")
    Path("copy/train/aaa").mkdir()
    run(pretrained, "copy", "a.npz")
    found = load("a.npz")
    assert found["classes"].tolist() == ["class_0", "class_1", "class_2"]
    assert sorted(set(found["labels"].tolist())) == [1, 2]


def test_size_mean_and_std_can_be_given_and_images_per_class(pretrained, data):
    run(pretrained, data, "a.npz", "--image-size", 16, "--mean", 0, 0, 0, "--std", 1, 1, 1)
    run(pretrained, data, "b.npz", "--images-per-class", 2)
    run(pretrained, data, "c.npz")
    a, b, c = load("a.npz"), load("b.npz"), load("c.npz")
    about = json.loads(a["about"].item())
    assert (about["image_size"], about["mean"], about["std"]) == (16, [0, 0, 0], [1, 1, 1])
    assert np.abs(a["features"] - c["features"]).max() > 1e-2
    assert b["paths"].tolist() == [
        p for p in c["paths"].tolist() if p[-7:] in ("000.png", "001.png")
    ]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ("CHECKPOINT DATA a.txt", ".npz or .safetensors"),
        ("CHECKPOINT DATA no/a.npz", "no such folder: no"),
        ("CHECKPOINT nowhere a.npz", "no such data folder: nowhere"),
        ("CHECKPOINT DATA there.npz", "--overwrite"),
        ("CHECKPOINT DATA a.npz --batch-size 0", "--batch-size must be at least 1"),
        ("CHECKPOINT DATA a.npz --std 1 0 1", "--std"),
        ("CHECKPOINT DATA a.npz --views 3", "--views"),
        ("CHECKPOINT DATA a.npz --views 2 --seed -1", "--seed must be at least 0"),
        ("CHECKPOINT DATA a.npz --split test", "--split"),
    ],
)
def test_what_can_be_refused_at_once(argv, said, pretrained, data, capsys):
    Path("there.npz").write_bytes(b"kept")
    words = {"CHECKPOINT": pretrained, "DATA": data}
    status, message = refusal(extract, [words.get(w, w) for w in argv.split()], capsys)
    assert status == 2 and said in message
    assert [path.name for path in Path().iterdir()] == ["there.npz"]
    assert Path("there.npz").read_bytes() == b"kept"


def test_nothing_is_written_when_it_fails_half_way(pretrained, data, capsys):
    shutil.copytree(data, "copy")
    bad = Path("copy/val/class_2/004.png")
    bad.write_bytes(bad.read_bytes()[:60])
    torch.save({"fc.weight": torch.zeros(2, 2)}, "fc.pth")
    torch.save(encoders.build_encoder("resnet8", 3).state_dict(), "plain.pth")
    for source, images, flags, named in (
        (pretrained, "copy", "-j 0", "004.png"),
        (pretrained, "copy", "-j 1", "004.png"),
        ("none.pth", data, "", "no such checkpoint: none.pth"),
        ("fc.pth", data, "", "fc.pth"),
        ("plain.pth", data, "--layer projection", "projection"),
    ):
        argv = [source, images, "a.npz", "--device", "cpu", "--batch-size", 2, *flags.split()]
        status, message = refusal(extract, argv, capsys)
        assert status == 1 and named in message
    assert not list(Path().glob("*.npz")) and not list(Path().glob(".*"))
