"""main_lincls.py --protocol stl10: layers, 5-NN, the Adam probe, folds, resume, refusals."""

from __future__ import annotations

import shlex
from pathlib import Path

import probes
import pytest
import torch
import torch.nn.functional as F
from helpers import load_script
from probes import BEST, LATEST, result, unequal_states, words

from moco.checkpoint import load_encoder
from moco.cli import lincls_config
from moco.data.images import open_images
from moco.data.views import eval_transform, normalize
from moco.evaluate.facts import protocol_line
from moco.evaluate.heads import HeadConfig, HeadTraining, new_heads
from moco.evaluate.knn import majority_vote
from moco.runs.compare import Comparison
from moco.runs.folder import read_runs

FLAGS = "--protocol stl10 --epochs 3 --schedule 2"


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


def evaluate(out: Path | str, run: Path, data: Path, *flags: str) -> dict:
    probes.evaluate(data, FLAGS, *flags, "--pretrained", run, "--save-dir", out)
    return result(out)


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
def test_neighbours_are_those_of_the_layer(run, data, tmp_path, capsys, layer) -> None:
    """Centre crops of 70/64 of the size; the output of unit length, fc7 as it is."""
    found = evaluate(tmp_path / "out", run, data, "--folds 2 --layer", layer)
    out = capsys.readouterr().out
    file = run / "checkpoint_0001.pth.tar"
    head = {"fc7": "none", "output": "projection"}[layer]
    encoder, info = load_encoder(file, head=head)

    def features(split: str) -> tuple[torch.Tensor, torch.Tensor]:
        images = open_images("folder", data, split)
        show = eval_transform(16, 18)  # round(16 * 70 / 64)
        pixels = torch.stack([show(images.load(i)) for i in range(len(images))])
        mean, std = info["args"]["mean"], info["args"]["std"]
        rows = encoder(normalize(pixels, mean, std)).detach()
        rows = F.normalize(rows, dim=1) if layer == "output" else rows
        return rows, torch.tensor(images.targets)

    (bank, bank_labels), (queries, labels) = features("train"), features("val")
    right = majority_vote(queries, bank, bank_labels, classes=3) == labels
    assert found["nearest"]["top1"] == pytest.approx(100 * right.double().mean().item())
    assert (found["layer"], found["evaluation"]) == (layer, "stl10")
    assert found["protocol"]["eval_resize"] == 18
    top1, mean = found["last"]["top1"], found["nearest"]["folds"]["mean"]
    for line in (
        f"{layer} + linear {top1:.1f} %",
        f"{layer} + 5-NN {right.double().mean().item() * 100:.1f} %",
        f"{layer} + 5-NN {mean:.1f} % on 2 folds",
    ):
        assert line in out
    # compare_runs.py has a column for each.
    (read, *_), left_out = read_runs([run, tmp_path / "out"])
    names = {name for name, _ in read.final}
    assert not left_out
    assert {f"{layer} + linear last, chosen by 2 folds", f"{layer} + 5-NN"} <= names
    assert {f"{layer} + linear folds", f"{layer} + 5-NN folds"} <= names
    assert f"{layer} + 5-NN" in {column.title for column in Comparison([read]).columns}


@pytest.mark.parametrize(
    ("layer", "other", "refusal"),
    [
        ("fc7", "output", "is a probe of --layer fc7: its classifier stands in place of"),
        ("output", "fc7", "layer: 'output' before, 'fc7' now"),
    ],
)
def test_a_probe_goes_on_bit_for_bit_and_not_with_another_layer(
    run, data, refused, layer, other, refusal
) -> None:
    whole = evaluate("whole", run, data, "--layer", layer)
    evaluate("cut", run, data, f"--layer {layer} --epochs 1")
    for source in ([], ["--pretrained", run]):
        flags = f"--layer {other} --save-dir cut --resume auto"
        assert refusal in refused(data, FLAGS, flags, *source)
    cut = evaluate("cut", run, data, f"--layer {layer} --resume auto")
    assert cut["last"] == whole["last"]
    assert unequal_states(f"whole/{LATEST}", f"cut/{LATEST}") == []
    probes.evaluate(data, f"-e --pretrained whole/{BEST} --eval-resize 18 --save-dir again")
    assert result("again")["top1"] == pytest.approx(whole["last"]["top1"])


def test_the_start_says_which_views_a_probe_has(run, data) -> None:
    argv = [*probes.TINY, *words(FLAGS, "--layer fc7 --pretrained", run), str(data)]
    fresh, cached = (lincls_config([*flags, *argv]) for flags in ([], ["--cached"]))
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
        ("--layer conv5", "has no --layer conv5 to evaluate; there are fc7 and output"),
        ("--layer fc9", "has no --layer fc9"),
        ("--eval-resize 15", "--eval-resize 15 is smaller than the crop of 16 pixels"),
        ("--image-size 32", "images of 32 pixels do not fit the encoder: it is made for 16"),
        ("-e", "a linear one is what main_lincls.py trains, without -e, and saves"),
        ("--folds 11", "--folds 11 are more than the 10 images of the smallest class"),
        ("--layer fc7 --pretrained RESNET",
         "has no --layer fc7 to evaluate; there are backbone and output"),
    ],
)  # fmt: skip
def test_what_is_refused(run, data, pretrained, refused, flags, message) -> None:
    flags = flags.replace("RESNET", str(pretrained))
    assert message in refused(data, FLAGS, "--pretrained", run, flags)
