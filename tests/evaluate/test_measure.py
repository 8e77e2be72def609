"""scripts/measure_align_uniform.py on files and folders as users have them."""

from __future__ import annotations

import functools
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import reference
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from helpers import refusal, write_images
from torch import Tensor

from align_uniform.bounds import uniformity_infimum
from align_uniform.metrics import alignment, effective_rank, uniformity
from align_uniform.spectrum import alpha_req, lidar, wasserstein_uniformity
from moco import encoders
from moco.checkpoint import load_encoder, write_checkpoint
from moco.data import loader
from moco.data.images import open_images
from moco.data.views import eval_transform, pretrain_recipe
from moco.evaluate import knn as evaluate
from scripts import measure_align_uniform as measure

ARGS = {
    "image_size": 16, "aug_plus": False, "crop_scale": [0.3, 1.0], "blur": False,
    "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.25], "objective": "3 * align(alpha=2)",
}  # fmt: skip


@pytest.fixture(scope="module")
def moco_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pretraining checkpoint of a small encoder with an MLP head."""
    torch.manual_seed(0)
    encoder = encoders.build_encoder("resnet8", 12)
    encoders.add_mlp_head(encoder)
    state = {f"module.encoder_q.{key}": value for key, value in encoder.state_dict().items()}
    path = tmp_path_factory.mktemp("run") / "checkpoint_0004.pth.tar"
    content = {"version": 1, "arch": "resnet8", "epoch": 5, "state_dict": state, "args": ARGS}
    write_checkpoint(path, content)
    return path


@pytest.fixture(scope="module")
def plain_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("plain") / "resnet18.pth"
    torch.save(encoders.build_encoder("resnet18", 10).state_dict(), path)
    return path


def run(capsys: pytest.CaptureFixture, *argv: object) -> dict:
    """The JSON on stdout, which must be all that is there."""
    capsys.readouterr()
    measure.main([*map(str, argv), "--json", "-j", "0", "--device", "cpu"])
    return json.loads(capsys.readouterr().out)


unit_rows = functools.partial(reference.unit_rows, dtype=torch.float32)


def test_both_layers_of_a_moco_file(data: Path, moco_file: Path, tmp_path: Path, capsys) -> None:
    """Every number against the features that the parts of the project give when called apart."""
    out = tmp_path / "result.json"
    result = run(capsys, moco_file, data, "--seed", 3, "--out", out, "--batch-size", 4)
    assert json.loads(out.read_text(encoding="utf-8")) == result
    assert (result["images"], result["seed"], result["epoch"]) == (15, 3, 5)
    assert result["objective"] == ARGS["objective"] and not result["notes"]
    assert list(result["layers"]) == ["projection", "backbone"]

    images = open_images("folder", data, "val")
    transform = pretrain_recipe(16, aug_plus=False, crop_scale=(0.3, 1.0), blur=False)
    views = loader.AugmentedViews(images, transform, seed=3, num_views=2)
    pairs = [views[(0, i)] for i in range(15)]
    inputs = {"device": torch.device("cpu"), "mean": ARGS["mean"], "std": ARGS["std"]}
    for name, head in (("projection", "projection"), ("backbone", "none")):
        layer = result["layers"][name]
        encoder, _ = load_encoder(moco_file, head=head)
        x, y = (
            evaluate.extract_features(
                encoder, [(torch.stack([p[v] for p in pairs]), torch.zeros(15))], **inputs
            )[0]
            for v in (0, 1)
        )
        assert layer["dim"] == x.shape[1] == (12 if name == "projection" else 64)
        assert layer["alignment"] == pytest.approx(
            {"1": alignment(x, y, 1), "2": alignment(x, y, 2)}, rel=1e-4
        )
        assert list(layer["uniformity"]) == [str(t) for t in range(1, 9)]
        for t in range(1, 9):
            assert layer["uniformity"][str(t)] == pytest.approx(uniformity(x, t), rel=1e-4)
            assert layer["uniformity_infimum"][str(t)] == uniformity_infimum(x.shape[1], t)
        assert layer["effective_rank"] == pytest.approx(effective_rank(x), rel=1e-3)
        assert layer["wasserstein_uniformity"] == pytest.approx(wasserstein_uniformity(x), rel=1e-3)
        assert layer["alpha_req"] == pytest.approx(alpha_req(x), rel=1e-2)
        # LiDAR is over 10 views of each image, of which the first two are those above.
        assert (layer["lidar_images"], layer["lidar_views"]) == (15, 10) and layer["lidar"] > 1
        assert layer["intervals"] is None

        splits = (
            loader.PlainImages(open_images("folder", data, split), eval_transform(16))
            for split in ("val", "train")
        )
        queries, bank = (
            evaluate.extract_features(
                encoder,
                loader.eval_loader(s, batch_size=8, workers=0, pin_memory=False),
                **inputs,
            )
            for s in splits
        )
        knn = evaluate.knn_accuracy(queries, bank, classes=3)
        for key in ("top1", "top5", "k"):
            assert layer["knn"][key] == pytest.approx(knn[key])
        assert (layer["knn"]["bank"], layer["knn"]["queries"]) == (30, 15)

    # What scripts/quickstart.py reads.
    first = result["layers"]["projection"]
    assert (result["layer"], result["alpha"], result["t"]) == ("projection", 2, 2)
    assert result["alignment"] == first["alignment"]["2"]
    assert result["uniformity"] == first["uniformity"]["2"]
    assert result["uniformity_infimum"] == first["uniformity_infimum"]["2"]


def test_a_features_file_has_lidar_of_its_two_views_and_intervals(tmp_path, capsys) -> None:
    x = unit_rows(60, 6, 0)
    y = F.normalize(x + 0.1 * unit_rows(60, 6, 1), dim=1)
    np.savez(tmp_path / "f.npz", features=x, positives=y)
    result = run(capsys, "--features", tmp_path / "f.npz", "--intervals", "--t", "2")
    layer = result["layers"]["features"]
    assert layer["lidar"] == pytest.approx(lidar(torch.stack([x, y], dim=1)))
    assert (layer["lidar_images"], layer["lidar_views"]) == (60, 2)
    for name, interval in layer["intervals"].items():
        for low, high in interval.values() if isinstance(interval, dict) else [interval]:
            assert low < high, name
    low, high = layer["intervals"]["wasserstein_uniformity"]
    assert low < layer["wasserstein_uniformity"] < high
    measure.main(["--features", str(tmp_path / "f.npz"), "--intervals", "--t", "2"])
    table = capsys.readouterr().out
    assert f"{layer['wasserstein_uniformity']:.4f} [{low:.4f}, {high:.4f}]" in table
    assert "LiDAR, 60 x 2 views" in table and "alpha-ReQ" in table


def test_seed_chosen_exponents_and_fewer_images(data, moco_file, tmp_path, capsys) -> None:
    """And the table, with the JSON beside it in a file."""
    flags = [moco_file, data, "--layer", "backbone", "--t", "3,0.5", "--alpha", "1"]
    flags += ["--most-images", 6]
    result = run(capsys, *flags)
    layer = result["layers"]["backbone"]
    assert list(result["layers"]) == ["backbone"] and list(layer["uniformity"]) == ["0.5", "3"]
    assert (result["alpha"], result["t"]) == (1, 0.5)
    knn = layer["knn"]
    assert (result["images"], knn["bank"], knn["queries"]) == (6, 6, 6), "thinned evenly"
    assert run(capsys, *flags, "--seed", 1)["alignment"] != result["alignment"]

    out = tmp_path / "o.json"
    words = [*flags[:2], "--t", "2", "--images-per-class", 2, "--out", out, "-j", "0"]
    measure.main(list(map(str, words)))
    text = capsys.readouterr().out
    result = json.loads(out.read_text(encoding="utf-8"))
    assert result["images"] == 6
    assert f"{result['alignment']:.4f}" in text and f"{result['uniformity']:.4f}" in text
    assert "projection" in text and "backbone" in text and "k-NN top1, k 6" in text
    assert max(map(len, text.splitlines()[1:])) <= 100


def test_plain_torchvision_file_has_a_backbone_only(data: Path, plain_file: Path, capsys) -> None:
    result = run(capsys, plain_file, data, "--image-size", 32)
    assert list(result["layers"]) == ["backbone"]
    assert result["layers"]["backbone"]["dim"] == 512 and result["arch"] == "resnet18"
    assert any("no projection head" in note for note in result["notes"])
    assert any("MoCo v2's" in note for note in result["notes"])


@pytest.mark.parametrize("form", ["timm", "mae", "safetensors"])
def test_timm_models_with_weights_from_a_file(
    form: str, data: Path, tmp_path: Path, capsys
) -> None:
    """As timm saves a supervised one (with classifier), as MAE's files are, as the hub has them."""
    torch.manual_seed(2)
    name = "test_vit.r160_in1k".partition(".")[0]
    network = timm.create_model(name, pretrained=False, num_classes=7)
    state = network.state_dict()
    path = tmp_path / ("model.safetensors" if form == "safetensors" else "model.pth")
    if form == "timm":
        wrapped = {f"module.{key}": value for key, value in state.items()}
        torch.save({"state_dict": wrapped, "arch": name, "epoch": 3, "metric": 1.0}, path)
    elif form == "mae":
        torch.save({"model": {**state, "mask_token": torch.zeros(1, 1, 64)}}, path)
    else:
        safetensors.torch.save_file(state, path)
    result = run(capsys, "--timm", name, path, data)
    assert list(result["layers"]) == ["backbone"] and result["arch"] == f"timm {name}"
    assert any("no place in the encoder: " in note and "head" in note for note in result["notes"])

    network.reset_classifier(0)
    config = timm.data.resolve_model_data_config(network)
    size = config["input_size"][-1]
    views = loader.AugmentedViews(
        open_images("folder", data, "val"),
        pretrain_recipe(size, aug_plus=True),
        seed=0,
        num_views=2,
    )
    first = torch.stack([views[(0, i)][0] for i in range(15)])
    x, _ = evaluate.extract_features(
        network, [(first, torch.zeros(15))],
        device=torch.device("cpu"), mean=config["mean"], std=config["std"],
    )  # fmt: skip
    assert result["uniformity"] == pytest.approx(uniformity(x), rel=1e-3)


def test_timm_without_weights_says_how_to_save_them(
    data: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    """And that works (here without the download)."""
    monkeypatch.chdir(tmp_path)
    code, line = refusal(measure.main, ["--timm", "test_vit", data], capsys)
    assert code == 2 and "needs a file with its weights before DIR" in line
    command = line.partition('python -c "')[2].partition('" (')[0]
    exec(command.replace("pretrained=True", "pretrained=False"), {})
    assert run(capsys, "--timm", "test_vit", "test_vit.pth", data)["arch"] == "timm test_vit"


@pytest.mark.parametrize("missing", ["timm", "timm.models"])
def test_without_timm(missing: str, data: Path, plain_file: Path, capsys, monkeypatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "timm"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    argv = ["--timm", "resnet18", plain_file, data, "-j", "0"]
    code, line = refusal(measure.main, argv, capsys)
    assert code == 1 and "--timm needs the package timm: pip install timm" in line


def test_flat_folder_without_labels(moco_file: Path, tmp_path: Path, capsys) -> None:
    write_images(tmp_path, {"": 5})
    result = run(capsys, moco_file, tmp_path)
    assert result["images"] == 5 and math.isfinite(result["alignment"])
    assert all(layer["knn"] is None for layer in result["layers"].values())
    assert any("no folder" in note and "val" in note for note in result["notes"])
    assert any(note.startswith("k-NN left out: ") for note in result["notes"])


@pytest.mark.parametrize("counts", [{"val/a": 2, "val/b": 2}, {"val": 4, "train/a": 3}])
def test_val_alone_or_without_labels(counts: dict, moco_file: Path, tmp_path: Path, capsys) -> None:
    write_images(tmp_path, counts)
    result = run(capsys, moco_file, tmp_path)
    assert result["images"] == 4 and result["layers"]["backbone"]["knn"] is None
    (note,) = result["notes"]
    assert note.startswith("k-NN left out: ") and ("train" in note or "no labels" in note)


def test_refusals(data, moco_file, plain_file, tmp_path, capsys) -> None:
    one = tmp_path / "one"
    write_images(one, {"": 1})
    (empty := tmp_path / "empty").mkdir()
    broken = tmp_path / "broken"
    write_images(broken, {"": 3})[1].write_bytes(b"no image")
    cases: list[tuple[list, int, str]] = [
        ([], 2, "CHECKPOINT and DIR are needed"),
        ([moco_file], 2, "CHECKPOINT and DIR are needed"),
        ([moco_file, tmp_path / "nowhere"], 2, "no such data folder"),
        ([moco_file, data, "--features", "x.npz"], 2, "give one or the other"),
        ([moco_file, data, "--bank", "x.npz"], 2, "--bank is for --features"),
        ([moco_file, data, "--t", "2,-1"], 2, "positive"),
        ([moco_file, data, "--alpha", "x"], 2, "--alpha"),
        ([moco_file, data, "--most-images", "0"], 2, "at least 1"),
        ([moco_file, data, "--std", 0, 1, 1], 2, "std"),
        ([moco_file, data, "--out", tmp_path / "no" / "o.json"], 2, "no such folder for --out"),
        ([moco_file, data, "--out", tmp_path], 2, "is a folder, expected a file to write"),
        ([moco_file, data, "--seed", 2**64], 2, "--seed must be at least 0 and below 2^63"),
        ([tmp_path / "no.pth", data], 1, "no such checkpoint"),
        ([data / "val" / "class_0" / "000.png", data], 1, "as torch.save writes it"),
        ([moco_file, one], 1, "at least 2"),
        ([moco_file, empty], 1, "no images in"),
        ([moco_file, broken], 1, "001.png"),
        ([moco_file, one, "--images-per-class", 3], 1, "needs labels"),
        ([moco_file, data, "--intervals", "--t", "2"], 1, "at most half the 15 images"),
        ([plain_file, data, "--layer", "projection"], 1, "projection was asked for"),
        (["--timm", "resnet50", plain_file, data], 1, "does not fit timm's resnet50"),
        (["--timm", "resnet5000", plain_file, data], 1, "timm has no model 'resnet5000'"),
        (["--timm", "resnet18", data / "nothing.pth", data], 1, "no such checkpoint"),
    ]
    for argv, status, message in cases:
        code, line = refusal(measure.main, [*argv, "-j", "0"], capsys)
        assert (code, message in line) == (status, True), (argv, line)


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_features_from_a_file(suffix: str, tmp_path: Path, capsys) -> None:
    x, y, bank = unit_rows(40, 6, 0), unit_rows(40, 6, 1), unit_rows(50, 6, 2)
    labels, bank_labels = torch.arange(40) % 3 * 1000, torch.arange(50) % 4 * 1000
    bank[:40] = x
    bank_labels[:40] = labels

    def write(name: str, **arrays: Tensor) -> Path:
        path = tmp_path / f"{name}{suffix}"
        if suffix == ".npz":
            more = {"paths": np.array(["a", None], dtype=object)}  # never unpickled
            np.savez(path, **{k: v.numpy() for k, v in arrays.items()}, **more)
        else:
            safetensors.torch.save_file(arrays, path)
        return path

    file = write("val", features=x, labels=labels, positives=y)
    bank_file = write("b", features=bank, labels=bank_labels)
    result = run(capsys, "--features", file, "--bank", bank_file, "--knn-k", 1)
    layer = result["layers"]["features"]
    assert layer["alignment"]["1"] == pytest.approx(alignment(x, y, 1), rel=1e-6)
    assert result["uniformity"] == pytest.approx(uniformity(x), rel=1e-6)
    assert layer["knn"]["top1"] == 100 and layer["knn"]["bank"] == 50
    assert result["notes"] == []

    file = write("long", features=5 * x)
    result = run(capsys, "--features", file)
    assert result["uniformity"] == pytest.approx(uniformity(x), rel=1e-5)
    assert result["alignment"] is None and result["layers"]["features"]["knn"] is None
    assert [word in " ".join(result["notes"]) for word in ("normalised", "positives", "--bank")]
    measure.main(["--features", str(file)])
    assert "alignment, alpha" not in capsys.readouterr().out

    unlabelled = write("unlabelled", features=bank, labels=torch.full((50,), -1))
    result = run(capsys, "--features", file, "--bank", unlabelled)
    assert any("no labels in" in note for note in result["notes"])


def test_knn_of_a_class_that_the_bank_lacks_is_wrong(tmp_path: Path, capsys) -> None:
    x = unit_rows(4, 6, 0).numpy()
    np.savez(tmp_path / "q.npz", features=x, labels=[0, 5, 9, 1])
    np.savez(tmp_path / "b.npz", features=x, labels=[0, 5, 8, 5])
    flags = ["--features", tmp_path / "q.npz", "--bank", tmp_path / "b.npz", "--knn-k", 1]
    knn = run(capsys, *flags)["layers"]["features"]["knn"]
    # Nor is it among the classes that the one neighbour has not.
    assert (knn["top1"], knn["top5"], knn["classes"]) == (50, 50, 3)
    measure.main([*map(str, flags), "--device", "cpu"])
    table = capsys.readouterr().out
    assert "k-NN top3, k 1" in table and "top5" not in table


def test_bad_feature_files(tmp_path: Path, capsys) -> None:
    """What the reader refuses is in test_feature_files.py."""
    x = unit_rows(6, 4, 0).numpy()
    spoilt, zero = x.copy(), x.copy()
    spoilt[3, 1], zero[2] = np.nan, 0
    cases = {
        "nan": ({"features": spoilt}, "NaN or infinite values in 1 of 6 rows, first in row 3"),
        "zero": ({"features": x, "features_2": zero}, "row 2 of positives is zero"),
        "one": ({"features": x[:1]}, "at least 2 rows"),
        "thin": ({"features": np.ones((5, 1))}, "dim must be"),
    }
    for name, (arrays, message) in cases.items():
        np.savez(tmp_path / f"{name}.npz", **arrays)
        code, line = refusal(measure.main, ["--features", tmp_path / f"{name}.npz"], capsys)
        assert code == 1 and message in line and name in line, line
    code, line = refusal(measure.main, ["--features", tmp_path / "nowhere.npz"], capsys)
    assert code == 1 and "nowhere.npz" in line
    np.savez(tmp_path / "x.npz", features=x)
    np.savez(tmp_path / "other.npz", features=unit_rows(6, 3, 0).numpy(), labels=range(6))
    code, line = refusal(
        measure.main, ["--features", tmp_path / "x.npz", "--bank", tmp_path / "other.npz"], capsys
    )
    assert code == 1 and "3 dimensions" in line
