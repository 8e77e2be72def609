"""scripts/train_supervised.py, and the chain of commands from an encoder to its figures."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from helpers import refusal, write_images

from moco.checkpoint import load_encoder
from scripts import extract_features, measure_align_uniform, plot_features, train_supervised

FLAGS = "-a resnet8 --image-size 16 -b 10 --epochs 6 --aug-plus --no-blur --crop-scale 0.5 1"


def run(script, *words: object) -> None:
    script.main([*map(str, words), "--device", "cpu", "-j", "0"])


def test_a_supervised_encoder_from_training_to_figure_3(data, tmp_path, monkeypatch, capsys):
    """Each command takes what the one before it wrote."""
    monkeypatch.chdir(tmp_path)
    run(train_supervised, data, "a.pth.tar", *FLAGS.split(), "--lr", 0.05)
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", capsys.readouterr().out)]
    assert len(losses) == 6 and losses[-1] < 0.95 * losses[0]
    encoder, info = load_encoder("a.pth.tar", head="projection")
    assert (info["arch"], info["epoch"], info["layout"]) == ("resnet8", 6, "moco")
    assert info["args"]["crop_scale"] == [0.5, 1] and not info["args"]["blur"]
    assert encoder(torch.zeros(2, 3, 16, 16)).shape == (2, 2)

    run(train_supervised, data, "again.pth.tar", *FLAGS.split(), "--lr", 0.05)
    again, _ = load_encoder("again.pth.tar", head="projection")
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name

    views = ["--layer", "projection", "--normalize", "--views", 2]
    run(extract_features, "a.pth.tar", data, "circle.npz", *views)
    plot_features.main(["3", "circle.npz", "--out", "circle.png"])
    run(measure_align_uniform, "--features", "circle.npz", "--out", "circle.json")
    result = json.loads(Path("circle.json").read_text())
    assert result["layers"]["features"]["dim"] == 2 and result["alignment"] > 0


def test_figure_3_of_a_backbone_says_what_to_run(data, tmp_path, monkeypatch, capsys):
    """A file as extract_features.py writes it when nothing is said; and that does run."""
    monkeypatch.chdir(tmp_path)
    run(train_supervised, data, "a.pth.tar", *FLAGS.split(), "--epochs", 1)
    run(extract_features, "a.pth.tar", data, "features.npz", "--normalize")
    words = ["3", "features.npz", "--out", "a.png"]
    status, line = refusal(plot_features.main, words, capsys)
    assert status == 1 and "64 dimensions" in line and not Path("a.png").exists()
    assert "extract with --layer projection --normalize --views 2" in line
    pytest.importorskip("sklearn")
    (words,) = re.findall(r"plot_features.py (map .*?)\)", line)
    plot_features.main(words.split())
    assert Path("map.png").exists()


@pytest.mark.parametrize(
    ("words", "status", "reason"),
    [
        ("DATA no/a.pth.tar", 2, "must be a new file"),
        ("DATA there.pth.tar", 2, "must be a new file"),
        ("DATA a.pth.tar --dim 0", 2, "--dim must be at least 1"),
        ("DATA a.pth.tar --std 1 0 1", 2, "--std"),
        ("DATA a.pth.tar -b 31", 1, "30 images are fewer than one batch of 31"),
        ("DATA a.pth.tar -a resnet9", 1, "unknown arch 'resnet9'"),
        ("DATA a.pth.tar --lr 1e30 -b 10", 1, "lower --lr"),
        ("flat a.pth.tar", 1, "labels"),
        ("nowhere a.pth.tar", 1, "no such data folder"),
    ],
)
def test_refusals(words, status, reason, data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("there.pth.tar").write_bytes(b"kept")
    write_images(tmp_path / "flat", {"train": 3})
    argv = [str(data) if word == "DATA" else word for word in words.split()]
    found = refusal(train_supervised.main, [*argv, "--image-size", 16], capsys)
    assert found[0] == status and reason in found[1]
    assert not Path("a.pth.tar").exists() and Path("there.pth.tar").read_bytes() == b"kept"
