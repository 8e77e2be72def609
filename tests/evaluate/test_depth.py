"""Depth on NYU-Depth-V2: files and their refusals, the predictor's shapes, errors, resume."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import differences, load_script, read_log, refusal
from PIL import Image

import main_lincls
from moco.alexnet import build_chain
from moco.batch_norm import calibrate_batch_norm
from moco.checkpoint import load_encoder, read_checkpoint
from moco.data.nyu import open_nyu
from moco.errors import CheckpointError, DataError
from moco.evaluate.depth_data import Depths, nearest, read_depths, squashed
from moco.evaluate.depth_predictor import DepthPredictor, doublings
from moco.runs.compare import Comparison
from moco.runs.folder import common_accuracy, read_runs

script = load_script("evaluate_depth")
SPLITS = {"train": range(10), "val": range(10, 16)}


def write_nyu(root: Path) -> None:
    """16 images of 40 x 30 pixels, and their depth in millimetres: deeper where it is brighter."""
    draw = np.random.default_rng(0)
    for kind in ("images", "depths"):
        (root / kind).mkdir()
    for i in range(16):
        grey = np.kron(draw.integers(20, 250, (6, 8)), np.ones((5, 5))).astype(np.uint16)
        rgb = np.stack([grey] * 3, axis=2).astype(np.uint8)
        Image.fromarray(rgb).save(root / "images" / f"{i:04d}.png")
        depth = 500 + 20 * grey
        depth[:2, :3] = 0  # unknown
        Image.fromarray(depth).save(root / "depths" / f"{i:04d}.png")
    for split, numbers in SPLITS.items():
        (root / f"{split}.txt").write_text("".join(f"{i:04d}\n" for i in numbers))


@pytest.fixture(scope="module")
def nyu(once) -> Path:
    return once("nyu", write_nyu)


@pytest.fixture
def own(nyu, tmp_path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(nyu, tmp_path / "own"))


@pytest.fixture(scope="module")
def encoder(once) -> Path:
    """An untrained depth_cnn, its batch norm with statistics."""

    def make(folder: Path) -> None:
        torch.manual_seed(0)
        chain = build_chain("depth_cnnx0.0625", 4, 32)
        calibrate_batch_norm(chain, [torch.randn(8, 3, 32, 32)])
        state = {f"module.encoder_q.{name}": t for name, t in chain.state_dict().items()}
        args = {"image_size": 32, "task": "in-batch", "objective": "none"}
        content = {"arch": "depth_cnnx0.0625", "epoch": 0, "state_dict": state, "args": args}
        torch.save(content, folder / "file.pth.tar")

    return once("depth_encoder", make) / "file.pth.tar"


def test_depth_and_image_get_the_same_geometry() -> None:
    """The left half is far and bright, in the image as in the depth."""
    grey = np.zeros((30, 40), np.uint8)
    grey[:, :20] = 200
    image = squashed(Image.fromarray(np.stack([grey] * 3, axis=2)), 16)
    depth = nearest(grey.astype(np.float32), 16)
    assert image.shape == (3, 16, 16) and depth.shape == (16, 16)
    assert set(depth.unique().tolist()) == {0.0, 200.0}  # nothing in between
    assert torch.equal(depth[:, :7] > 100, image[0, :, :7] > 100) and (depth[:, :8] == 200).all()


def test_a_folder_is_read_by_its_split(nyu) -> None:
    train, val = (open_nyu(nyu, split) for split in SPLITS)
    assert [len(train), len(val)] == [10, 6] and val.names[0] == "0010"
    grey = int(np.asarray(Image.open(nyu / "images" / "0010.png"))[5, 5, 0])
    assert val.depth(0)[5, 5] == pytest.approx((500 + 20 * grey) / 1000)
    assert val.depth(0)[0, 0] == 0 and val.images.targets is None


@pytest.mark.parametrize(("unit", "metres"), [("8bit", 2.0), ("0.1", 5.1), ("cm", 0.51)])
def test_units_of_8_bit(own, unit, metres) -> None:
    Image.fromarray(np.full((30, 40), 51, np.uint8)).save(own / "depths" / "0000.png")
    assert open_nyu(own, "train", unit).depth(0)[0, 0] == pytest.approx(metres)
    (own / "depth.json").write_text(json.dumps({"unit": unit}))
    assert open_nyu(own, "train").depth(0)[0, 0] == pytest.approx(metres)


def depth(value: int, dtype: type = np.uint16, width: int = 40) -> np.ndarray:
    return np.full((30, width), value, dtype)


MAP = "depths/0003.png"
ONE_PIXEL = depth(0)
ONE_PIXEL[0, 0] = 1
# What is said: the file, and what it is now; None: it is gone.
DAMAGE = {
    "1 of 16 files have no depth of their name: 0003": (MAP, None),
    "1 of 16 files have no image of their name: 0004": ("images/0004.png", None),
    "is of 8 bit, whose unit is not defined: give --depth-unit": (
        MAP,
        depth(51, np.uint8),
    ),
    "0000.png is of 16 bit, and its unit is given as 8bit": ("depth.json", '{"unit": "8bit"}'),
    "depth unit 'feet': expected mm, cm": ("depth.json", '{"unit": "feet"}'),
    "depth of 0003 has 41 x 30 pixels, its image 40 x 30": (MAP, depth(51, width=41)),
    "depth of 0003 is 0 everywhere": (MAP, depth(0)),
    "depth of 0003 is 0.9 m everywhere": (MAP, depth(900)),
    "0003 is known in so few pixels that none is left of 16 x 16": (MAP, ONE_PIXEL),
    "it has colours": (MAP, np.zeros((30, 40, 3), np.uint8)),
    "images has 0003.jpg and 0003.png: expected one file": ("images/0003.jpg", depth(9, np.uint8)),
    "1 images are in train.txt and in val.txt: 0003": ("val.txt", "0003\n"),
    "train.txt names 1 images more than once: 0003; each would count as several": (
        "train.txt",
        "0003\n0004\n0003\n",
    ),
    "train.txt names 0099, which is not there": ("train.txt", "0003\n0099\n"),
    "cannot read .*train.txt": ("train.txt", None),
    "no folder .*depths: expected images/, depths/": ("depths", None),
}


@pytest.mark.parametrize("message", DAMAGE)
def test_bad_data_is_refused_by_name(own, message) -> None:
    name, content = DAMAGE[message]
    if content is None:
        (own / name).rename(own / "elsewhere")
    elif isinstance(content, str):
        (own / name).write_text(content)
    else:
        Image.fromarray(content).save(own / name)
    with pytest.raises(DataError, match=message):
        read_depths(open_nyu(own, "train"), 16)


def test_depth_maps_are_not_taken_for_images(nyu, elsewhere, capsys) -> None:
    """As the default --dataset folder would: with the classes "images" and "depths"."""
    train = load_script("train_in_batch").main
    words = ["-a", "depth_cnnx0.0625", "--image-size", 32, "--batch-size", 4, "--device", "cpu"]
    _, line = refusal(train, [*words, nyu], capsys)
    assert "has images with depth" in line and "give --dataset nyu, or" in line


def test_the_published_file(tmp_path) -> None:
    """MATLAB's axes are the other way round; its numbers begin at 1."""
    h5py = pytest.importorskip("h5py")
    from scipy.io import savemat

    images = np.arange(72, dtype=np.uint8).reshape(3, 3, 4, 2)  # n, colour, width, height
    depths = np.arange(3 * 4 * 2, dtype=np.float32).reshape(3, 4, 2)
    with h5py.File(tmp_path / "nyu_depth_v2_labeled.mat", "w") as file:
        file["images"], file["depths"] = images, depths
    savemat(tmp_path / "splits.mat", {"trainNdxs": [[3], [1]], "testNdxs": [[2]]})
    train, val = (open_nyu(tmp_path, split) for split in SPLITS)
    assert len(train) == 2 and train.names == ["0002", "0000"] and val.names == ["0001"]
    assert np.array_equal(np.asarray(val.images.load(0)), images[1].transpose(2, 1, 0))
    assert np.array_equal(val.depth(0), depths[1].T)


@pytest.mark.parametrize(
    ("channels", "side", "size", "times"), [(512, 8, 128, 4), (256, 16, 128, 3)]
)
def test_predictor_of_table_6(channels, side, size, times) -> None:
    """Channels are halved as often as the map is doubled, then one 3x3 convolution."""
    assert doublings(channels, side, size) == times
    predictor = DepthPredictor(channels, times).eval()
    assert predictor(torch.zeros(1, channels, side, side)).shape == (1, 1, size, size)
    last = predictor[-1]
    assert (last.in_channels, last.kernel_size) == (channels // 2**times, (3, 3))
    assert len(predictor) == 3 * times + 1


def test_sizes_that_are_no_power_of_two_apart_are_refused() -> None:
    with pytest.raises(DataError, match="48 pixels is not the layer's 8 doubled.*--depth-size 64"):
        doublings(64, 8, 48)
    with pytest.raises(DataError, match="3 channels cannot be halved 2 times"):
        doublings(3, 4, 16)


def test_unknown_depth_counts_for_nothing() -> None:
    depths = Depths(torch.tensor([[[1.0, 0.0], [3.0, 5.0]], [[3.0, 0.0], [0.0, 1.0]]]))
    known = torch.tensor([1.0, 3.0, 5.0, 3.0, 1.0])
    assert depths.mean_and_std() == pytest.approx(
        (known.mean().item(), known.std(correction=0).item())
    )
    assert depths.mse(2.0) == pytest.approx((known - 2).square().mean())
    expected = torch.tensor([[2.0, known.mean()], [3.0, 3.0]])
    torch.testing.assert_close(depths.pixel_means(), expected)


def evaluate(out: Path, encoder: Path, nyu: Path, *flags: str) -> dict:
    words = "--layer conv5 --epochs 12 --schedule 8,10 --batch-size 4 --device cpu".split()
    script.main([*words, "--pretrained", str(encoder), "--save-dir", str(out), *flags, str(nyu)])
    return json.loads((out / "depth.json").read_text())


def test_the_command(encoder, nyu, tmp_path, elsewhere, capsys) -> None:
    result = evaluate(tmp_path / "out", encoder, nyu, "--folds", "2")
    out = capsys.readouterr().out
    val, train = (read_depths(open_nyu(nyu, split), 32) for split in ("val", "train"))
    variance = train.metres[train.known].var(correction=0).item()
    mean = train.metres[train.known].mean()
    constant = (val.metres[val.known] - mean).square().mean().item()
    assert result["constant_m2"] == pytest.approx(constant, rel=1e-4)
    assert result["constant"] == pytest.approx(constant / variance, rel=1e-4)
    assert result["mse"] == pytest.approx(result["mse_m2"] / variance, rel=1e-4)
    line = (
        f"conv5: val MSE {result['mse']:.4f} of the training depth's variance "
        f"({result['mse_m2']:.2f} m^2); constant {result['constant']:.3f}, per-pixel mean "
        f"{result['pixel_mean']:.3f}; 6 images"
    )
    assert line in out and "on 2 folds of the training images" in out
    assert len(set(result["folds"]["mse"])) == 2 and result["unknown_pixels"] > 0


def signal_at(step: int, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Send this process a signal in the `step`-th step of Adam from now on."""
    take, steps = torch.optim.Adam.step, []

    def step_and_signal(self, *args):
        take(self, *args)
        steps.append(1)
        if len(steps) == step:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(torch.optim.Adam, "step", step_and_signal)


def test_an_evaluation_goes_on_bit_for_bit(
    encoder, nyu, tmp_path, elsewhere, monkeypatch, capsys
) -> None:
    """Asked to stop within an epoch: of the second fold, with 2 steps an epoch, and then of the
    training on all images, with 5; in between at the end of an epoch."""
    flags = "--folds 2 --batch-size 2 --epochs 4 --schedule 2".split()
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    result = evaluate(whole, encoder, nyu, *flags)
    for step, number, status, where in (
        (4 * 2 + 3, signal.SIGTERM, 75, "fold 2 of 2, epoch 1, after step 1"),
        (3, signal.SIGHUP, 75, "fold 2 of 2, epoch 2, after step 2"),
        (1 * 2 + 8, signal.SIGINT, 130, "epoch 1, after step 3"),
    ):
        with monkeypatch.context() as context, pytest.raises(SystemExit) as stop:
            signal_at(step, number, context)
            evaluate(cut, encoder, nyu, *flags, "--resume", "auto")
        assert stop.value.code == status
        last = capsys.readouterr().out.strip().splitlines()[-1]
        assert last.startswith(f"stopped by {signal.Signals(number).name} in {where}; go on with")
    assert evaluate(cut, encoder, nyu, *flags, "--resume", "auto") == result
    assert "predictor.pth.tar, after 1 epochs and 3 steps" in capsys.readouterr().out
    states = [read_checkpoint(out / "predictor.pth.tar") for out in (whole, cut)]
    assert differences(*states) == []
    logs = [read_log(out, "depth") for out in (whole, cut)]
    assert len(logs[0]) == len(logs[1]) == 3 * 4
    for line in (*logs[0], *logs[1]):
        line.pop("time")
    assert logs[0] == logs[1]


def test_a_loss_that_is_not_finite_is_one_line_and_not_saved(
    encoder, nyu, tmp_path, elsewhere, monkeypatch, capsys
) -> None:
    signal_at(2, signal.SIGTERM, monkeypatch)
    words = ["--layer", "conv5", "--pretrained", encoder, "--device", "cpu", "--batch-size", 4]
    words += ["--lr", "1e38", "--save-dir", tmp_path / "out", nyu]
    status, line = refusal(script.main, words, capsys)
    assert status == 1 and "predictor's loss is nan in epoch 0, step 2; lower --lr" in line
    assert not (tmp_path / "out" / "predictor.pth.tar").exists()


@pytest.mark.parametrize(
    ("flags", "status", "message"),
    [
        (["--layer", "conv9"], 1, "has no --layer conv9 to predict depth from; there are conv1"),
        (["--layer", "fc7"], 1, "has no --layer fc7"),
        (["--depth-size", "48"], 1, "48 pixels is not the layer's 2 doubled"),
        (["--folds", "1"], 2, "--folds must be at least 2, got 1"),
        (["--folds", "11"], 1, "has 10 training image(s), too few for --folds 11"),
        (["--seed", "-5"], 2, "--seed must be at least 0"),
        (["--seed", str(2**64)], 2, "below 2^63"),
        (["--schedule", "-5"], 2, "--schedule must be epochs of at least 0, got -5"),
        (["--depth-unit", "feet"], 1, "depth unit 'feet'"),
        (["--pretrained", "nowhere.pth.tar"], 1, "nowhere.pth.tar"),
    ],
)
def test_what_is_refused(encoder, nyu, elsewhere, capsys, flags, status, message) -> None:
    words = ["--layer", "conv5", "--pretrained", encoder, "--device", "cpu", *flags, nyu]
    code, line = refusal(script.main, words, capsys)
    assert code == status and message in line


def test_folders_of_other_runs_and_other_data_are_refused(
    encoder, nyu, own, tmp_path, elsewhere, capsys
) -> None:
    """Each command would write over args.json and log.jsonl of the other."""
    out = tmp_path / "out"
    evaluate(out, encoder, nyu, "--epochs", "1")
    kept = (out / "args.json").read_bytes()
    words = ["--layer", "conv5", "--pretrained", encoder, "--device", "cpu", "--save-dir"]
    again, resumed = [*words, out, "--epochs", "1"], ["--save-dir", out, "--resume", "auto", nyu]
    shutil.copy(own / "depths" / "0003.png", own / "depths" / "0004.png")
    shutil.copy(encoder, tmp_path / "checkpoint_0000.pth.tar")
    train = load_script("train_in_batch").main
    for main, argv, message in (
        (script.main, [*again, nyu], "already holds a run (predictor.pth.tar): go on with"),
        (script.main, [*again, "--resume", "auto", own], "other values of batch_size, schedule, d"),
        (script.main, [*words, tmp_path, nyu], "already holds a run (checkpoint_0000.pth.tar)"),
        (train, ["--batch-size", 4, *resumed], "already holds a run (predictor"),
        (main_lincls.main, ["--pretrained", encoder, "--save-dir", out, nyu], "already holds"),
    ):
        _, line = refusal(main, argv, capsys)
        assert message in line
    assert (out / "args.json").read_bytes() == kept
    with pytest.raises(CheckpointError, match="holds a depth predictor"):
        load_encoder(out / "predictor.pth.tar")


def test_a_run_is_compared_by_depth_and_trained_on_nyu(nyu, tmp_path, elsewhere, capsys) -> None:
    train = load_script("train_in_batch").main
    flags = (
        "--dataset nyu -a depth_cnnx0.0625 --image-size 32 --batch-size 4 --dim 4 --epochs 1 -j 0 "
        "--device cpu --seed 1"
    )
    train([*flags.split(), "--save-dir", str(tmp_path / "run"), str(nyu)])
    assert "10 images, 3 steps per epoch" in capsys.readouterr().out
    evaluate(tmp_path / "depth", tmp_path / "run", nyu, "--epochs", "1")
    (run,), left_out = read_runs([tmp_path])
    assert not left_out
    (name,) = (name for name, _ in run.final if "depth" in name)
    assert name == "conv5 depth MSE (lower is better)"
    assert name in {column.title for column in Comparison([run]).columns}
    title, value = common_accuracy([(run, 1)])
    assert title == name and value(run, 1) == run.value(name)
