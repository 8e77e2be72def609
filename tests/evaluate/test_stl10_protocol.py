"""main_lincls.py --protocol stl10: layers, 5-NN, the Adam probe, folds, resume, refusals."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import load_script, refusal

import main_lincls
from moco.checkpoint import load_encoder
from moco.cli import lincls_config
from moco.data.images import open_images
from moco.data.views import eval_transform, normalize
from moco.evaluate.facts import protocol_line
from moco.evaluate.heads import HeadConfig, HeadTraining, new_heads
from moco.evaluate.knn import majority_vote
from moco.runs.compare import Comparison
from moco.runs.folder import read_runs

FLAGS = shlex.split(
    "--protocol stl10 --batch-size 8 --epochs 3 --schedule 2 -j 0 --device cpu --seed 1 -p 1"
)


@pytest.fixture(scope="module")
def run(once, data) -> Path:
    """Two epochs within the batch."""
    flags = shlex.split(
        "-a small_alexnetx0.05 --image-size 16 --batch-size 8 --dim 6 --epochs 2 -j 0 --device cpu "
        "--seed 1 -p 1 --knn-every 0"
    )

    def make(folder: Path) -> None:
        train = load_script("train_in_batch").main
        train([*flags, "--save-dir", str(folder / "run"), str(data)])

    return once("in_batch", make) / "run"


def evaluate(out: Path, run: Path, data: Path, *flags: str) -> dict:
    words = [*FLAGS, *flags, "--pretrained", str(run), "--save-dir", str(out), str(data)]
    main_lincls.main(words)
    return json.loads((out / "lincls.json").read_text())


def test_majority_vote() -> None:
    """Euclidean, equal votes; of classes with as many the nearest one's."""
    bank = torch.tensor([[1.0], [2.0], [3.0], [4.0], [10.0], [11.0], [12.0]])
    labels = torch.tensor([0, 1, 1, 0, 2, 2, 2])
    queries = torch.tensor([[0.0], [2.6], [9.0], [100.0]])
    # 0: nearest 1, 2, 3, 4, 10 -> 0 1 1 0 2: a tie, and the nearest is 0; 2.6: 3, 2, 4, 1: 1.
    found = majority_vote(queries, bank, labels, classes=3, k=5)
    assert found.tolist() == [0, 1, 2, 2]
    assert majority_vote(queries, bank, labels, classes=3, k=1).tolist() == [0, 1, 2, 2]
    assert majority_vote(queries, bank, labels, classes=3, k=99).tolist() == [2] * 4


def test_neighbours_are_the_nearest_where_features_share_a_large_part() -> None:
    """As of an encoder near collapse."""
    draw = torch.Generator().manual_seed(0)
    bank = torch.randint(0, 99, (60, 3), generator=draw) / 64 + 1000  # as they are in float32
    queries = torch.randint(0, 99, (40, 3), generator=draw) / 64 + 1000
    labels = torch.randint(0, 4, (60,), generator=draw)
    nearest = torch.cdist(queries.double(), bank.double()).argmin(dim=1)
    assert majority_vote(queries, bank, labels, classes=4, k=1).equal(labels[nearest])


@pytest.mark.parametrize("layer", ["fc7", "output"])
def test_neighbours_are_those_of_the_layer(run, data, tmp_path, elsewhere, capsys, layer) -> None:
    """Centre crops of 70/64 of the size; the output of unit length, fc7 as it is."""
    result = evaluate(tmp_path / "out", run, data, "--layer", layer, "--folds", "2")
    out = capsys.readouterr().out
    file = run / "checkpoint_0001.pth.tar"
    head = {"fc7": "none", "output": "projection"}[layer]
    encoder, info = load_encoder(file, head=head)

    def features(split: str) -> tuple[torch.Tensor, torch.Tensor]:
        images = open_images("folder", data, split)
        show = eval_transform(16, 18)  # round(16 * 70 / 64)
        pixels = torch.stack([show(images.load(i)) for i in range(len(images))])
        mean, std = info["args"]["mean"], info["args"]["std"]
        found = encoder(normalize(pixels, mean, std)).detach()
        found = F.normalize(found, dim=1) if layer == "output" else found
        return found, torch.tensor(images.targets)

    (bank, bank_labels), (queries, labels) = features("train"), features("val")
    right = majority_vote(queries, bank, bank_labels, classes=3) == labels
    assert result["nearest"]["top1"] == pytest.approx(100 * right.double().mean().item())
    assert (result["layer"], result["evaluation"]) == (layer, "stl10")
    assert result["protocol"]["eval_resize"] == 18
    top1, mean = result["last"]["top1"], result["nearest"]["folds"]["mean"]
    for line in (
        f"{layer} + linear {top1:.1f} %",
        f"{layer} + 5-NN {right.double().mean().item() * 100:.1f} %",
        f"{layer} + 5-NN {mean:.1f} % on 2 folds",
    ):
        assert line in out
    # compare_runs.py has a column for each.
    (found, *_), left_out = read_runs([run, tmp_path / "out"])
    names = {name for name, _ in found.final}
    assert not left_out
    assert {f"{layer} + linear last, chosen by 2 folds", f"{layer} + 5-NN"} <= names
    assert {f"{layer} + linear folds", f"{layer} + 5-NN folds"} <= names
    assert f"{layer} + 5-NN" in {column.title for column in Comparison([found]).columns}


@pytest.mark.parametrize("layer", ["fc7", "output"])
def test_a_probe_goes_on_bit_for_bit(run, data, tmp_path, elsewhere, layer) -> None:
    flags = ["--layer", layer]
    whole = evaluate(tmp_path / "whole", run, data, *flags)
    evaluate(tmp_path / "cut", run, data, *flags, "--epochs", "1", "--resume", "auto")
    cut = evaluate(tmp_path / "cut", run, data, *flags, "--resume", "auto")
    assert cut["last"] == whole["last"]
    first, second = (
        torch.load(tmp_path / name / "checkpoint.pth.tar", weights_only=True)["state_dict"]
        for name in ("whole", "cut")
    )
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    again = tmp_path / "again"
    file = tmp_path / "whole" / "model_best.pth.tar"
    main_lincls.main(
        ["-e", "--pretrained", str(file), "--eval-resize", "18", "-j", "0", "--device", "cpu",
         "--save-dir", str(again), str(data)]
    )  # fmt: skip
    found = json.loads((again / "lincls.json").read_text())
    assert found["top1"] == pytest.approx(whole["last"]["top1"])


def test_a_probe_of_one_layer_does_not_go_on_with_another(run, data, tmp_path, capsys) -> None:
    out = tmp_path / "out"
    for before, now, message in (
        ("fc7", "output", "is a probe of --layer fc7: its classifier stands in place of"),
        ("output", "fc7", "layer: 'output' before, 'fc7' now"),
    ):
        evaluate(out / before, run, data, "--layer", before, "--epochs", "1")
        words = [*FLAGS, "--layer", now, "--save-dir", out / before, "--resume", "auto", data]
        for argv in (words, ["--pretrained", run, *words]):
            _, line = refusal(main_lincls.main, argv, capsys)
            assert message in line


def test_the_start_says_which_views_a_probe_has(run, data, tmp_path) -> None:
    words = [*FLAGS, "--layer", "fc7", "--pretrained", str(run), "--save-dir", str(tmp_path)]
    fresh, cached = (lincls_config([*words, *flags, str(data)]) for flags in ([], ["--cached"]))
    assert "linear on the random crops of Table 1" in protocol_line(fresh)
    assert "linear on cached centre crops in place of the random crops" in protocol_line(cached)


def test_the_probe_is_torchs_linear_layer_and_adam() -> None:
    torch.manual_seed(0)
    heads = new_heads(400, 10, 1, probe="stl10")
    assert heads.linear[0].weight.abs().max() > 0.045 and heads.linear[0].bias.any()
    optimizer = HeadTraining(heads, [HeadConfig(1e-3, 0.0)], 0.9, probe="stl10").optimizer
    (group,) = optimizer.param_groups
    assert isinstance(optimizer, torch.optim.Adam)
    assert (group["betas"], group["eps"], group["lr"]) == ((0.5, 0.999), 1e-8, 1e-3)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--layer", "conv5"], "has no --layer conv5 to evaluate; there are fc7 and output"),
        (["--layer", "fc9"], "has no --layer fc9"),
        (["--eval-resize", "15"], "--eval-resize 15 is smaller than the crop of 16 pixels"),
        (["--image-size", "32"], "images of 32 pixels do not fit the encoder: it is made for 16"),
        (["-e"], "a linear one is what main_lincls.py trains, without -e, and saves"),
        (["--folds", "11"], "--folds 11 are more than the 10 images of the smallest class"),
    ],
)
def test_what_is_refused(run, data, elsewhere, capsys, flags, message) -> None:
    words = [*FLAGS, *flags, "--pretrained", run, data]
    status, line = refusal(main_lincls.main, words, capsys)
    assert status == 1 and message in line


def test_a_resnet_has_no_fc7(encoder_file, data, elsewhere, capsys) -> None:
    words = [*FLAGS, "--layer", "fc7", "--image-size", "16", "--pretrained", encoder_file, data]
    status, line = refusal(main_lincls.main, words, capsys)
    assert status == 1 and "has no --layer fc7 to evaluate; there are backbone and output" in line
