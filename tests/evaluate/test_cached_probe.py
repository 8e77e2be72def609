"""Several classifiers trained together, and features that are extracted once: `--cached`."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from harness import Processes
from helpers import read_log, write_images
from probes import BEST, LATEST, MAIN, TINY, classifier, evaluate, load, result, write_encoder
from torch import nn

from moco.checkpoint import load_encoder
from moco.data import loader
from moco.data.images import open_images
from moco.data.views import IMAGENET_MEAN, IMAGENET_STD, eval_transform, normalize
from moco.encoders import build_encoder
from moco.evaluate.feature_cache import without_batch_norm
from moco.evaluate.feed import CachedFeed
from moco.evaluate.heads import FrozenEncoder


@pytest.fixture(scope="module")
def cache(data, pretrained, tmp_path_factory) -> Path:
    """Features of the training and validation images."""
    folder = tmp_path_factory.mktemp("cache")
    run = tmp_path_factory.mktemp("run") / "r"
    flags = ["--cached --lr 1 --epochs 1", "--cache-dir", folder / "f", "--save-dir", run]
    evaluate(data, *flags, "--pretrained", pretrained)
    return folder / "f"


def files(folder: Path | str) -> dict[str, int]:
    """Feature files and when they were written."""
    paths = sorted(Path(folder).rglob("view_*.pth.tar"))
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in paths}


# ---- Together as alone ---------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["", "--cached"])
def test_each_head_is_as_if_trained_alone(data, pretrained, mode):
    flags = ["--epochs 2 --schedule 1 --pretrained", pretrained, mode]
    evaluate(data, *flags, "--lr 0.1,10 --wd 0,0.01 --save-dir all")
    together, heads = result("all"), load(f"all/{LATEST}")["heads"]
    assert [(h["lr"], h["weight_decay"]) for h in together["heads"]] == [
        (lr, wd) for lr in (0.1, 10.0) for wd in (0.0, 0.01)
    ]
    for number in (0, 3):
        head = together["heads"][number]
        folder = f"alone{number}"
        setting = f"--lr {head['lr']} --wd {head['weight_decay']} --save-dir {folder}"
        evaluate(data, *flags, setting)
        alone = load(f"{folder}/{LATEST}")["state_dict"]
        for name in ("weight", "bias"):
            assert torch.equal(heads[f"linear.{number}.{name}"], alone[f"module.fc.{name}"])
        for key in ("best", "last"):
            assert head[key] == result(folder)[key]


def test_best_and_last_are_those_of_the_leading_heads(data, pretrained, capsys):
    evaluate(data, "--lr 0.001,1,3 --epochs 3 --pretrained", pretrained, "--save-dir r")
    found, out = result("r"), capsys.readouterr().out
    for key in ("best", "last"):
        leader = max(found["heads"], key=lambda head: head[key]["top1"])
        assert found[key] == {**leader[key], "lr": leader["lr"], "weight_decay": 0.0}
    assert "flatters" in out and out.count("best top-1") == 4
    assert found["protocol"]["lr"] == [0.001, 1.0, 3.0]
    # What is saved as the network's own classifier is the leading head.
    for name, key in ((LATEST, "last"), (BEST, "best")):
        evaluate(data, "-e --pretrained", f"r/{name}", "--save-dir", key)
        assert result(key)["top1"] == found[key]["top1"]
    epochs = read_log(Path("r"), "val")
    assert [line["top1_lr1_wd0"] for line in epochs][-1] == found["heads"][1]["last"]["top1"]


def test_a_head_that_diverges_leaves_the_others_as_they_are(data, pretrained, capsys):
    flags = ["--epochs 3 --pretrained", pretrained]
    evaluate(data, *flags, "--lr 1,1e38,3 --save-dir r")
    out = capsys.readouterr().out
    first, fallen, third = result("r")["heads"]
    assert fallen["diverged"] is not None and "lr 1e+38, wd 0 has diverged in epoch" in out
    evaluate(data, *flags, "--lr 1,3 --save-dir two")
    assert [first, third] == result("two")["heads"]
    # Nothing that is saved is NaN, and it goes on.
    evaluate(data, "--lr 1,1e38,3 --save-dir r --resume auto", *flags, "--epochs 4")
    assert result("r")["heads"][1]["diverged"] == fallen["diverged"]


@pytest.mark.parametrize(("amp", "near"), [("off", 1e-4), ("bf16", 0.1)])
def test_frozen_features_enter_autograd(pretrained, amp, near):
    encoder, _ = load_encoder(pretrained)
    images = torch.randn(4, 3, 32, 32)
    plain = encoder(images).detach()
    features = FrozenEncoder(encoder, amp=amp, channels_last=True)(images)
    assert features.dtype == torch.float32 and not features.requires_grad
    torch.testing.assert_close(features, plain, rtol=near, atol=near)
    assert torch.allclose(features, plain, rtol=1e-4, atol=1e-4) == (amp == "off")
    head = nn.Linear(64, 3)
    head(features).sum().backward()
    assert head.weight.grad is not None


@pytest.mark.parametrize("arch", ["resnet8", "densenet121", "mobilenet_v2"])
def test_folding_batch_norm_into_convolutions_changes_nothing(arch):
    """Neither the features, to rounding, nor the encoder that was given, at all."""
    torch.manual_seed(0)
    encoder = build_encoder(arch, 10)
    images = torch.randn(4, 3, 64, 64)
    with torch.no_grad():
        for _ in range(2):
            encoder(images)
    before = {name: t.clone() for name, t in encoder.eval().state_dict().items()}
    expected = encoder(images)
    fast = without_batch_norm(encoder)
    torch.testing.assert_close(fast(images), expected, rtol=1e-3, atol=1e-4)
    assert torch.equal(encoder(images), expected)
    assert all(torch.equal(t, before[name]) for name, t in encoder.state_dict().items())
    left = [module for module in fast.modules() if isinstance(module, nn.BatchNorm2d)]
    assert bool(left) == (arch == "densenet121")  # where it comes before the convolution


class Branching(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if x.sum() > 0 else -x


def test_a_network_that_cannot_be_traced_stays_as_it_is():
    network = Branching()
    assert without_batch_norm(network) is network


# ---- Cached features -----------------------------------------------------------------------------


def test_training_on_centre_crops_is_that_of_a_loop_by_hand(data, pretrained, capsys):
    evaluate(data, "--cached --lr 1 --epochs 3 --pretrained", pretrained, "--save-dir r")
    assert "not the standard protocol), lr 1, wd 0" in capsys.readouterr().out
    images = open_images("folder", data, "train")
    transform = eval_transform(32)
    pixels = torch.stack([transform(images.load(i)) for i in range(len(images))])
    encoder, _ = load_encoder(pretrained)
    with torch.no_grad():
        normal = normalize(pixels, IMAGENET_MEAN, IMAGENET_STD)
        features = encoder(normal).half().float()
    batches = loader.EpochBatches(len(images), 8, seed=5)
    torch.manual_seed(5)
    head = nn.Linear(64, 3)
    nn.init.normal_(head.weight, std=0.01)
    nn.init.zeros_(head.bias)
    optimizer = torch.optim.SGD(head.parameters(), 1, momentum=0.9)
    for epoch in range(3):
        batches.set_epoch(epoch)
        for keys in batches:
            rows = [index for _, index in keys]
            target = torch.tensor([images.targets[i] for i in rows])
            optimizer.zero_grad()
            F.cross_entropy(head(features[rows]), target).backward()
            optimizer.step()
    mine = torch.cat([head.weight, head.bias.unsqueeze(1)], dim=1).detach()
    torch.testing.assert_close(classifier(f"r/{LATEST}"), mine, rtol=1e-2, atol=1e-2)
    found = result("r")
    assert found["evaluation"] == "cached" and found["protocol"]["cached"] is True


def test_with_a_view_for_each_epoch_it_is_the_standard_protocol(data, pretrained):
    flags = ["--lr 1 --epochs 3 --pretrained", pretrained]
    evaluate(data, *flags, "--save-dir standard")
    evaluate(data, *flags, "--cached --cached-views 3 --save-dir cached")
    evaluate(data, *flags, "--cached --save-dir centre")
    standard, cached, centre = (
        classifier(f"{name}/{LATEST}") for name in ("standard", "cached", "centre")
    )
    torch.testing.assert_close(cached, standard, rtol=1e-2, atol=1e-2)
    assert (centre - standard).abs().max() > 10 * (cached - standard).abs().max()
    assert result("standard")["evaluation"] == "standard"
    assert "cached" not in result("standard")["protocol"]
    assert result("cached")["protocol"]["cached_views"] == 3


def test_views_are_used_in_turn() -> None:
    """Two of them for four epochs: each again after the other."""
    views = torch.stack([torch.zeros(4, 3), torch.ones(4, 3)]).half()
    labels, cpu = torch.arange(4), torch.device("cpu")
    feed = CachedFeed(views, labels, views[0], views[0], labels, batch_size=2, seed=0, device=cpu)
    seen = [feed.inputs(next(iter(feed.train(epoch))))[0].unique().tolist() for epoch in range(4)]
    assert seen == [[0], [1], [0], [1]]


def test_files_are_half_precision_and_used_again(data, pretrained, cache, capsys):
    written = files(cache)
    for name in written:
        features = load(cache / name)["features"]
        assert features.dtype == torch.float16 and features.shape[1] == 64
    flags = ["--cached --lr 1,3 --epochs 2 --seed 8 --cache-dir", cache]
    evaluate(data, *flags, "--pretrained", pretrained, "--save-dir r")
    assert files(cache) == written
    assert "8 of 8 files are there" in capsys.readouterr().out


def test_what_is_missing_or_damaged_is_made_again(data, pretrained, cache, capsys):
    """Removed, cut off, with a changed byte, of another shape."""
    shutil.copytree(cache, "mine")
    before, names = files("mine"), sorted(files("mine"))[1:5]
    removed, cut, flipped, other = (Path("mine") / name for name in names)
    removed.unlink()
    cut.write_bytes(cut.read_bytes()[:-200])
    data_of = bytearray(flipped.read_bytes())
    data_of[len(data_of) // 2] ^= 255
    flipped.write_bytes(data_of)
    torch.save({"features": torch.zeros(1, 64, dtype=torch.float16)}, other)
    flags = ["--cached --lr 1 --epochs 1 --cache-dir mine --save-dir r --pretrained", pretrained]
    evaluate(data, *flags)
    assert "4 of 8 files are there" in capsys.readouterr().out
    after = files("mine")
    assert [n for n in before if after[n] != before[n]] == names
    for name in names:
        expected = load(cache / name)["features"]
        torch.testing.assert_close(load(f"mine/{name}")["features"], expected, rtol=2e-3, atol=1e-3)


VIEWS = "--cached --lr 1 --epochs 5 --cached-views 5 --pretrained"  # 40 files of features


@pytest.fixture
def first(pretrained, tmp_path) -> Processes:
    """A process that is to write them into cache/, when three are there; one is half written."""
    write_images(Path("data"), {f"train/{c}": 32 for c in "ab"} | {"val/a": 2, "val/b": 2})
    argv = [*TINY, *VIEWS.split(), pretrained, "--cache-dir", tmp_path / "cache"]
    argv += ["--save-dir", tmp_path / "first", tmp_path / "data"]
    process = Processes(tmp_path / "out", *argv, code=MAIN)
    process.wait_until(lambda: len(files("cache")) >= 3)
    process.kill(signal.SIGSTOP)
    (folder,) = Path("cache").iterdir()
    (folder / ".view_004_from_00000056.pth.tar.0123abcd.tmp").write_bytes(b"half of it")
    return process


@pytest.mark.long
def test_an_extraction_that_was_killed_goes_on(first, pretrained, capsys):
    first.kill()
    first.wait()
    kept = files("cache")
    assert len(kept) < 40 and not Path("first/lincls.json").exists()
    evaluate(Path("data"), VIEWS, pretrained, "--cache-dir cache --save-dir on")
    assert f"{len(kept)} of 40 files are there" in capsys.readouterr().out
    assert {name: files("cache")[name] for name in kept} == kept
    assert not list(Path().rglob("*.tmp"))
    evaluate(Path("data"), VIEWS, pretrained, "--cache-dir other --save-dir whole")
    assert torch.equal(classifier(f"whole/{LATEST}"), classifier(f"on/{LATEST}"))


@pytest.mark.long
def test_what_a_living_process_writes_is_left_alone(first, pretrained):
    evaluate(Path("data"), VIEWS, pretrained, "--cache-dir cache --save-dir beside")
    assert list(Path("cache").rglob(".view*.tmp"))
    first.kill(signal.SIGCONT)
    assert first.wait() == [0], first.output()
    evaluate(Path("data"), VIEWS, pretrained, "--cache-dir cache --save-dir after")
    assert not list(Path().rglob("*.tmp"))


@pytest.mark.long
def test_two_probes_share_a_cache(data, pretrained, tmp_path):
    flags = [*TINY, "--cached", "--lr", 1, "--epochs", 1, "--cache-dir", tmp_path / "cache"]
    flags += ["--pretrained", pretrained]
    runs = [
        Processes(tmp_path / f"out{i}", *flags, "--save-dir", tmp_path / f"r{i}", data, code=MAIN)
        for i in range(2)
    ]
    for run in runs:
        assert run.wait() == [0], run.output()
    assert torch.equal(*(classifier(f"r{i}/{LATEST}") for i in range(2)))
    assert not list(tmp_path.rglob("*.tmp"))


def other_pixels(folder: Path) -> None:
    """Of a file of the same size."""
    paths = [folder / name / "003.png" for name in ("class_0", "class_1")]
    small, large = sorted(paths, key=lambda path: path.stat().st_size)
    large.write_bytes(small.read_bytes().ljust(large.stat().st_size, b"\0"))


def other_name(folder: Path) -> None:
    (folder / "class_0" / "003.png").rename(folder / "class_0" / "new.png")


@pytest.mark.parametrize(
    "change",
    [
        other_pixels,
        other_name,
        "--pretrained other.pth.tar",
        "--image-size 24",
        "--amp bf16",
        "--labels 50",
    ],
)
def test_a_stale_cache_is_never_used(data, pretrained, tmp_path, change):
    shutil.copytree(data, mine := tmp_path / "data", copy_function=shutil.copy2)
    write_encoder(Path("other.pth.tar"), seed=1)
    flags = ["--cached --lr 1 --epochs 1 --pretrained", pretrained, "--save-dir"]
    evaluate(mine, *flags, "before --cache-dir cache")
    old, more = files("cache"), change
    if callable(change):
        change(mine / "train")
        more = ""
    evaluate(mine, *flags, "after --cache-dir cache", more)
    evaluate(mine, *flags, "fresh", more)
    assert torch.equal(classifier(f"after/{LATEST}"), classifier(f"fresh/{LATEST}"))
    assert len(files("cache")) > len(old) and old.items() <= files("cache").items()


def test_features_that_half_precision_cannot_hold(data, refused):
    large = write_encoder(Path("large.pth.tar"), scale=1e6)
    message = refused(data, "--cached --save-dir r --pretrained", large)
    assert "half precision" in message and "standard protocol" in message
    assert not files("r")


def test_an_image_that_cannot_be_read_is_named(data, pretrained, refused):
    shutil.copytree(data, "data")
    Path("data/train/class_1/004.png").write_bytes(b"no image")
    message = refused("data", "--cached --save-dir r --pretrained", pretrained)
    assert "class_1/004.png" in message


@pytest.mark.long
def test_workers_and_two_processes_find_the_same_features(data, pretrained, cache, tmp_path):
    flags = ["--cached", "--lr", 1, "--epochs", 2, "--pretrained", pretrained]
    argv = [*TINY, *flags, "-j", 2, "--save-dir", tmp_path / "two", data]
    processes = Processes(tmp_path / "out", *argv, count=2, code=MAIN)
    assert processes.wait() == [0, 0], processes.output()
    mine = {Path(name): tmp_path / "two" / "features" / name for name in files("two/features")}
    assert {name.name for name in mine} == {Path(name).name for name in files(cache)}
    for name in files(cache):
        torch.testing.assert_close(
            load(mine[Path(name)])["features"], load(cache / name)["features"], rtol=2e-3, atol=1e-3
        )
    evaluate(data, *flags, "--cache-dir", cache, "--save-dir one")
    torch.testing.assert_close(
        classifier(f"two/{LATEST}"), classifier(f"one/{LATEST}"), rtol=1e-2, atol=1e-2
    )
    assert result("two")["val_images"] == 15
