"""scripts/transfer.py: encoders side by side on labelled data sets."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path

import numpy as np
import pytest
import scipy.optimize
import timm
import torch
from helpers import noise_image, refusal
from PIL import Image
from probes import write_encoder

from moco import encoders
from moco.data.labelled import TorchvisionImages, open_labelled
from moco.errors import DataError
from moco.evaluate import logistic, transfer
from scripts import transfer as script


def blobs(n: int, classes: int, dim: int, spread: float, seed: int = 0) -> tuple:
    draw = torch.Generator().manual_seed(seed)
    places = torch.randn(classes, dim, dtype=torch.float64, generator=draw)
    labels = torch.arange(n) % classes
    noise = torch.randn(n, dim, dtype=torch.float64, generator=draw)
    return places[labels] + spread * noise, labels


@pytest.mark.parametrize("penalty", [1.0, 1e-3])
def test_logistic_regression_is_the_minimum_of_its_equation(penalty: float) -> None:
    """As scipy finds it, from the equation written out image by image, in float64."""
    x, y = blobs(40, 3, 4, spread=1.5)

    def objective(flat: np.ndarray) -> float:
        weight, bias = flat[:12].reshape(3, 4), flat[12:]
        loss = 0.0
        for row, label in zip(x.numpy(), y.tolist(), strict=True):
            scores = weight @ row + bias
            loss += math.log(np.exp(scores - scores[label]).sum()) / len(x)
        return loss + penalty / 2 * (weight**2).sum()

    best = scipy.optimize.minimize(objective, np.zeros(15), tol=1e-12)
    found = logistic.fit(x, y, 3, penalty)
    ours = torch.cat([found.weight.flatten(), found.bias]).numpy()
    assert objective(ours) <= best.fun + 1e-9
    assert found.weight.numpy() == pytest.approx(best.x[:12].reshape(3, 4), abs=2e-4)
    single = logistic.fit(x.float(), y, 3, penalty)
    assert single.weight.double().numpy() == pytest.approx(found.weight.numpy(), abs=5e-3)


def test_the_penalty_is_chosen_by_folds_and_fitted_on_all_images() -> None:
    x, y = blobs(120, 4, 20, spread=2.5)
    found, right = logistic.fit_chosen(x, y, 4, folds=3)
    assert list(right) == sorted(logistic.PENALTIES, reverse=True)
    assert right[found.penalty] == max(right.values()) and len(set(right.values())) > 1
    again = logistic.fit(x, y, 4, found.penalty)
    assert torch.allclose(found.weight, again.weight, atol=1e-3), "whatever it was started from"
    # The accuracies are those of classifiers that have not seen the fold.
    fold = logistic.stratified_folds(y, 3, 0)
    for label in range(4):
        assert torch.bincount(fold[y == label]).tolist() == [10, 10, 10]
    hits = 0
    for f in range(3):
        found = logistic.fit(x[fold != f], y[fold != f], 4, 0.1)
        hits += (found.predict(x[fold == f]) == y[fold == f]).sum().item()
    assert right[0.1] == pytest.approx(100 * hits / 120, abs=100 / 120)


def test_mcnemar_counts_the_images_that_one_alone_gets_right() -> None:
    a = torch.tensor([1, 1, 1, 1, 1, 1, 0, 0, 0, 0], dtype=torch.bool)
    b = torch.tensor([1, 0, 0, 0, 0, 0, 1, 0, 0, 0], dtype=torch.bool)
    # 5 images are a's alone, one is b's: P(at most 1 of 6) = 7/64, two-sided.
    assert transfer.mcnemar(a, b) == {"difference": 40, "p": pytest.approx(14 / 64)}
    assert transfer.mcnemar(a, a) == {"difference": 0, "p": 1}


def test_accuracy_has_wilsons_interval_and_a_mean_per_class() -> None:
    right = torch.tensor([True] * 8 + [False] * 2)
    found = transfer.accuracy(right)
    assert found["top1"] == pytest.approx(80)
    assert found["interval"] == pytest.approx([49.02, 94.33], abs=0.01)  # published example
    assert transfer.mean_per_class(right, torch.tensor([0] * 9 + [1])) == pytest.approx(800 / 18)


def test_the_regression_does_not_feel_where_features_lie_nor_their_scale() -> None:
    x, y = blobs(90, 3, 4, spread=1.5)
    found = []
    for scale, shift in ((1, 0), (1e-3, 5)):
        parts = (scale * x + shift).split(45)
        split = transfer.Split(parts[0], y[:45], parts[1], y[45:])
        found.append(transfer.evaluate(split, transfer.Protocol(shots=(2,)))[0])
    assert found[0]["logistic"] == found[1]["logistic"] and found[0]["shots"] == found[1]["shots"]


def test_shots_are_so_many_of_each_class_and_a_function_of_the_seed() -> None:
    labels = torch.tensor([0, 1, 2] * 5)
    drawn = transfer.shots(labels, 2, seed=3)
    assert torch.bincount(labels[drawn]).tolist() == [2, 2, 2] and len(drawn.unique()) == 6
    assert torch.equal(drawn, transfer.shots(labels, 2, seed=3))
    assert not torch.equal(drawn, transfer.shots(labels, 2, seed=4))
    assert transfer.shots(labels, 6, seed=3) is None


@pytest.fixture
def plain_files(tmp_path) -> list[Path]:
    """A supervised ResNet-18 as torchvision and as timm have it."""
    torch.manual_seed(0)
    torchvision, of_timm = tmp_path / "resnet18.pth", tmp_path / "timm_resnet18.pth"
    torch.save(encoders.build_encoder("resnet18", 10).state_dict(), torchvision)
    torch.save(timm.create_model("resnet18", num_classes=10).state_dict(), of_timm)
    return [torchvision, of_timm]


@pytest.mark.long
def test_encoders_side_by_side(data, tiny_run, plain_files, tmp_path, capsys) -> None:
    """A run of MoCo v2, torchvision's and timm's files, and one of them under another name."""
    moco = tiny_run / "run" / "checkpoint_0001.pth.tar"
    files = [moco, *plain_files, f"timm:resnet18={plain_files[1]}"]
    out, figure = tmp_path / "out.json", tmp_path / "figure.png"
    words = [*files, "--data", data, "--shots", "1,4,64", "--draws", "3", "--out", out]
    words += ["--figure", figure, "-j", "0", "--device", "cpu", "--image-size", "32"]
    script.main(list(map(str, words)))
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 5 and "logistic" in printed[0] and "16-shot" not in printed[0]
    found = json.loads(out.read_text())
    (one,) = found["data"]
    assert (one["train"], one["test"], one["classes"]) == (30, 15, 3)
    for spec, result in one["results"].items():
        assert list(result["shots"]) == ["1", "4"], "no class has 64 images"
        assert len(result["shots"]["1"]["of"]) == 3 and result["shots"]["1"]["sd"] >= 0
        assert f"{result['logistic']['top1']:.2f}" in next(
            li for li in printed if f" {spec} " in li
        )
    assert one["results"][str(moco)]["logistic"]["top1"] > 50, "colour casts tell the classes"
    assert len(one["tests"]) == 12
    same = one["results"][str(files[2])], one["results"][str(files[3])]
    assert same[0]["logistic"]["top1"] == same[1]["logistic"]["top1"], "timm's file either way"
    assert figure.read_bytes()[:4] == b"\x89PNG"
    script.main(list(map(str, [moco, *words[4:]])))
    again = json.loads(out.read_text())
    assert again["data"][0]["results"][str(moco)] == one["results"][str(moco)]


def test_torchvisions_data_sets_by_name(tmp_path, capsys) -> None:
    """MNIST as torchvision keeps it on disk, of which the labels come with the images."""
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    draw = np.random.default_rng(0)
    for part, n in (("train", 12), ("t10k", 6)):
        labels = (np.arange(n) % 2).astype(np.uint8)
        pixels = draw.integers(0, 100, (n, 28, 28), dtype=np.uint8) + 100 * labels[:, None, None]
        sizes = {"images-idx3-ubyte": (2051, n, 28, 28), "labels-idx1-ubyte": (2049, n)}
        for (name, size), array in zip(sizes.items(), (pixels, labels), strict=True):
            head = b"".join(int(number).to_bytes(4, "big") for number in size)
            (raw / f"{part}-{name}").write_bytes(head + array.astype(np.uint8).tobytes())
            with gzip.open(raw / f"{part}-{name}.gz", "wb") as file:
                file.write(b"")
    train, test = open_labelled("mnist", tmp_path)
    assert (len(train), len(test)) == (12, 6) and train.load(3).mode == "RGB"
    assert [train.targets[i] for i in (0, 3, 11)] == [0, 1, 1]
    encoder = write_encoder(tmp_path / "resnet8.pth.tar")
    words = [encoder, "--data", f"mnist={tmp_path}", "--shots", "1", "--draws", "1", "-j", "0"]
    script.main(list(map(str, [*words, "--device", "cpu"])))
    row = capsys.readouterr().out.splitlines()[1]
    assert row.startswith(f"mnist={tmp_path}") and "100.00 [" in row


def test_parts_follow_each_other() -> None:
    images = [[(noise_image((8, 8), seed=i), i) for i in range(a, b)] for a, b in ((0, 3), (3, 5))]
    whole = TorchvisionImages(images)
    assert len(whole) == 5 and [whole.targets[i] for i in (4, 2, 3, 0)] == [4, 2, 3, 0]
    assert whole.load(3).tobytes() == noise_image((8, 8), seed=3).tobytes()
    assert isinstance(whole.load(0), Image.Image)


def test_what_cannot_be_used_is_named_before_any_work(data, pretrained, tmp_path, capsys) -> None:
    for words, status, expected in (
        ([pretrained, "--data", "nowhere"], 1, "no such data set: nowhere; expected a folder"),
        ([pretrained, "--data", data, "flowers"], 1, "no complete flowers in data"),
        ([tmp_path / "none.pth", "--data", data], 1, "no such checkpoint"),
        (["timm:resnet18", "--data", data], 1, "expected timm:NAME=FILE"),
        ([pretrained, pretrained, "--data", data], 2, "is there twice"),
        ([pretrained, "--data", data, "--shots", "0"], 2, "--shots must be"),
        ([pretrained, "--data", data, "--folds", "1"], 2, "--folds must be at least 2"),
        ([pretrained, "--data", data, "--figure", "a.pdf"], 2, "--figure must end in"),
        ([pretrained, "--data", data, "--out", "no/a.json"], 2, "no such folder: no"),
    ):
        got, line = refusal(script.main, [*words, "-j", "0"], capsys)
        assert got == status and expected in line, words
    with pytest.raises(DataError, match="no complete stl10"):
        open_labelled("stl10", tmp_path)
