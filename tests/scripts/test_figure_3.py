"""The chain of commands from a supervised encoder of two dimensions to the paper's Figure 3."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from helpers import refusal

from moco.checkpoint import load_encoder
from scripts import extract_features, measure_align_uniform, plot_features, train_in_batch

FLAGS = "--supervised --dim 2 -a resnet8 --image-size 16 -b 10 --epochs 3 --lr 0.05 --seed 0"
FLAGS += " --knn-every 0 --crop-scale 0.5 1 -p 1 --save-dir run"
CHECKPOINT = "run/checkpoint_0002.pth.tar"


def run(script, *words: object) -> None:
    script.main([*map(str, words), "--device", "cpu", "-j", "0"])


def test_each_command_takes_what_the_one_before_it_wrote(data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run(train_in_batch, data, *FLAGS.split())
    losses = [json.loads(line)["loss"] for line in Path("run/log.jsonl").open() if '"loss"' in line]
    assert len(losses) == 9 and sum(losses[-3:]) < sum(losses[:3])
    encoder, info = load_encoder(CHECKPOINT, head="projection")
    assert (info["arch"], info["epoch"]) == ("resnet8", 3)
    assert encoder(torch.zeros(2, 3, 16, 16)).shape == (2, 2)

    run(extract_features, CHECKPOINT, data, "circle.npz", "--layer", "projection", "--normalize",
        "--views", 2)  # fmt: skip
    plot_features.main(["3", "circle.npz", "--out", "circle.png"])
    run(measure_align_uniform, "--features", "circle.npz", "--out", "circle.json")
    result = json.loads(Path("circle.json").read_text())
    assert result["layers"]["features"]["dim"] == 2 and result["alignment"] > 0

    # A file as extract_features.py writes it when nothing is said: what to run; and that does run.
    run(extract_features, CHECKPOINT, data, "features.npz", "--normalize")
    status, line = refusal(plot_features.main, ["3", "features.npz", "--out", "a.png"], capsys)
    assert status == 1 and "64 dimensions" in line and not Path("a.png").exists()
    assert "extract with --layer projection --normalize --views 2" in line
    pytest.importorskip("sklearn")
    (words,) = re.findall(r"plot_features.py (map .*?)\)", line)
    plot_features.main(words.split())
    assert Path("map.png").exists()
