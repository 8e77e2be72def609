"""k-NN accuracy while training: right, on time, and without a trace in what is trained."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from harness import EPOCHS, differences, final_state, finish, start
from helpers import pretrain, read_log, write_images

from moco import checkpoint, encoders
from moco.config import Data
from moco.data import loader
from moco.data.images import open_images
from moco.data.views import IMAGENET_MEAN, IMAGENET_STD, eval_transform
from moco.evaluate import knn as evaluate
from moco.tasks.online_knn import frozen_backbone, open_splits

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def odd(images, tmp_path_factory) -> Path:
    """What the runs of tests/harness.py train on, and 41 images to classify: an odd share."""
    folder = Path(shutil.copytree(images, tmp_path_factory.mktemp("images") / "data"))
    write_images(folder / "val", {"class_0": 20, "class_1": 21}, size=24, seed=5)
    return folder


@pytest.fixture(scope="module")
def whole(odd, tmp_path_factory) -> Path:
    """A run of two processes with k-NN after each epoch."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    finish(folder, odd, "--knn-every", 1, processes=2, workers=1)
    return folder


def without_knn(run: Path) -> dict:
    state = final_state(run)
    state["log"] = [line for line in state["log"] if line["kind"] not in ("knn", "health")]
    return state


def knn_lines(run: Path) -> list[dict]:
    return [
        {name: value for name, value in line.items() if name not in ("time", "seconds")}
        for line in read_log(run, "knn")
    ]


# ---- What it finds, and what it leaves alone -----------------------------------------------------


def test_before_training_it_sees_batch_norm_with_statistics(data, tmp_path, monkeypatch) -> None:
    """Of views that are trained on, in a copy: with means of 0 accuracy is another one."""
    means, extract = [], evaluate.extract_features

    def spy(encoder: torch.nn.Module, *args: object, **kwargs: object) -> tuple:
        means.append(encoder.bn1.running_mean.abs().max().item())
        return extract(encoder, *args, **kwargs)

    monkeypatch.setattr(evaluate, "extract_features", spy)
    pretrain(data, tmp_path / "run", "--max-steps", 1, "--knn-every", 1)
    assert [line["step"] for line in knn_lines(tmp_path / "run")] == [0, 1]
    before, after = means[0], means[-1]
    # The copy has means over batches; one step moves the run's own a tenth of the way from 0.
    assert before > 3 * after > 0


@pytest.mark.long
def test_a_run_is_bit_equal_with_and_without_it(odd, whole, tmp_path) -> None:
    """Weights, queue, optimizer, generators of all ranks, and all that is logged but times."""
    said = finish(tmp_path / "run", odd, "--knn-every", 0, processes=2)
    assert "k-NN" not in said and read_log(tmp_path / "run", "knn") == []
    assert len(read_log(whole, "knn")) == 1 + EPOCHS
    assert differences(without_knn(whole), without_knn(tmp_path / "run")) == []


@pytest.mark.long
def test_it_finds_what_the_saved_encoder_gives(odd, whole) -> None:
    """Of two ranks as well, whose batch-norm statistics differ: those of rank 0 are saved."""
    lines = knn_lines(whole)
    plain = eval_transform(16)
    splits = [open_images("folder", odd, split) for split in ("train", "val")]
    batches = [
        loader.eval_loader(loader.PlainImages(s, plain), batch_size=16, workers=0, pin_memory=False)
        for s in splits
    ]
    for line, path in zip(lines[1:], checkpoint.run_checkpoints(whole), strict=True):
        encoder, _ = checkpoint.load_encoder(path)
        show = {"device": CPU, "mean": IMAGENET_MEAN, "std": IMAGENET_STD}
        bank, queries = (evaluate.extract_features(encoder, each, **show) for each in batches)
        expected = evaluate.knn_accuracy(queries, bank, classes=2)
        assert {name: line[name] for name in expected} == expected
        assert (line["k"], line["bank"], line["images"]) == (96, 96, 41)
    assert [(line["epoch"], line["step"]) for line in lines] == [(0, 0), (1, 6), (2, 12), (3, 18)]


# ---- When ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "steps"),
    [
        ("--epochs 3 --knn-every 2", [0, 6, 9]),
        ("--epochs 3 --max-steps 4 --knn-every 1", [0, 3, 4]),
        ("--max-steps 0", [0]),  # the untrained encoder
    ],
)
def test_it_comes_before_training_every_so_many_epochs_and_at_the_end(
    flags, steps, data, tmp_path
) -> None:
    pretrain(data, tmp_path / "run", *flags.split())
    assert [line["step"] for line in read_log(tmp_path / "run", "knn")] == steps


@pytest.mark.long
def test_a_run_that_is_killed_in_it_does_it_again(odd, whole, tmp_path) -> None:
    killed_in_the_second = """
import os, time
from moco.tasks.online_knn import OnlineKnn
measure = OnlineKnn.measure
def dies(self, epoch, step):
    if epoch == 2:
        time.sleep(0.5)  # the checkpoint is being written
        os._exit(9)
    return measure(self, epoch, step)
OnlineKnn.measure = dies
"""
    run = tmp_path / "run"
    killed = start(run, odd, "--knn-every", 1, processes=2, before=killed_in_the_second)
    assert killed.wait() == [9, 9], killed.output()
    assert [line["epoch"] for line in read_log(run, "knn")] == [0, 1]
    finish(run, odd, "--knn-every", 1, processes=2)
    assert knn_lines(run) == knn_lines(whole)
    assert differences(without_knn(whole), without_knn(run)) == []
    said = finish(run, odd, "--knn-every", 1, processes=2)  # nothing is left to do
    assert said.count("k-NN after") == EPOCHS == len(knn_lines(run)) - 1


@pytest.mark.long
def test_a_request_to_stop_within_it_is_heard_at_once(odd, whole, tmp_path) -> None:
    """It reaches all processes of the job, loader workers too, while the second k-NN runs; of two
    ranks one is at its bank, the other at its end."""
    stops_in_the_second = """
import os, signal, time
from moco.evaluate import knn as evaluate
extract, calls = evaluate.extract_features, []
def stopping(encoder, batches, **more):
    calls.append(1)
    if len(calls) == 5 and os.environ.get("RANK", "0") == "0":
        def first_of(batches):
            for batch in batches:
                yield batch
                os.killpg(0, signal.SIGTERM)
                time.sleep(0.3)
        batches = first_of(batches)
    return extract(encoder, batches, **more)
evaluate.extract_features = stopping
"""
    run = tmp_path / "run"
    stopped = start(run, odd, "--knn-every", 1, processes=2, workers=1, before=stops_in_the_second)
    assert stopped.wait() == [75, 75], stopped.output()
    assert "after step 12; go on with" in stopped.output(0)
    assert [line["epoch"] for line in read_log(run, "knn")] == [0, 1]
    finish(run, odd, "--knn-every", 1, processes=2)
    assert knn_lines(run) == knn_lines(whole)


# ---- What it cannot use --------------------------------------------------------------------------


def no_val(folder: Path) -> str:
    shutil.rmtree(folder / "val")
    return "no folder"


def no_labels(folder: Path) -> str:
    for path in list((folder / "train").glob("*/*.png")):
        path.rename(folder / "train" / f"{path.parent.name}-{path.name}")
    return "has no labels because of"


def other_classes(folder: Path) -> str:
    (folder / "val" / "class_0").rename(folder / "val" / "another")
    return "has classes that the training set lacks: another"


def no_train_folder(folder: Path) -> str:
    """Then all images are trained on, those of val/ too."""
    for path in list((folder / "train").iterdir()):
        path.rename(folder / path.name)
    (folder / "train").rmdir()
    return "no folder"


def empty_val(folder: Path) -> str:
    for path in (folder / "val").glob("*/*"):
        path.unlink()
    return "no images in"


@pytest.mark.parametrize(
    "spoil",
    [no_val, no_labels, other_classes, no_train_folder, empty_val],
    ids=lambda f: f.__name__,
)
def test_without_labels_one_line_says_why_and_training_goes_on(
    spoil, data, tmp_path, capsys
) -> None:
    folder = Path(shutil.copytree(data, tmp_path / "data"))
    reason = spoil(folder)
    pretrain(folder, tmp_path / "run", "--max-steps", 1, "--knn-every", 1)
    lines = [line for line in capsys.readouterr().out.splitlines() if "k-NN" in line]
    assert len(lines) == 1 and "k-NN: left out: " in lines[0] and reason in lines[0]
    assert read_log(tmp_path / "run", "knn") == [] and len(read_log(tmp_path / "run")) == 1


@pytest.mark.long
def test_an_image_that_cannot_be_read_ends_it_but_not_the_run(odd, tmp_path) -> None:
    """One rank comes upon it, in a loader process."""
    folder = Path(shutil.copytree(odd, tmp_path / "data"))
    bad = sorted((folder / "val" / "class_0").iterdir())[1]
    bad.write_bytes(b"no image")
    run = tmp_path / "run"
    said = finish(run, folder, "--knn-every", 1, processes=2, workers=1)
    lines = [line for line in said.splitlines() if "left out" in line]
    assert len(lines) == 1 and "k-NN: left out from step 0 on: cannot read image" in lines[0]
    assert str(bad) in lines[0] and "Traceback" not in said
    assert read_log(run, "knn") == [] and read_log(run)[-1]["step"] == 18


def test_memory_that_it_lacks_ends_it_but_not_the_run(data, tmp_path, monkeypatch, capsys):
    def lacks(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("9 bytes")

    monkeypatch.setattr(evaluate, "knn_predict", lacks)
    pretrain(data, tmp_path / "run", "--max-steps", 1, "--knn-every", 1)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "left out" in line]
    assert "k-NN: left out from step 0 on: out of memory for k-NN among" in line
    assert len(read_log(tmp_path / "run")) == 1


def test_the_bank_is_balanced_and_capped(tmp_path) -> None:
    folder = tmp_path / "data"
    write_images(folder / "train", {"a": 9, "b": 2, "c": 6})
    write_images(folder / "val", {"a": 1, "c": 3})
    images = open_images("folder", folder, "pretrain")
    for size, expected in ((12, [4, 2, 4]), (1, [1, 1, 1]), (50000, [9, 2, 6])):
        bank, val, classes = open_splits(images, Data(data=str(folder)), size)
        assert [bank.targets.count(label) for label in range(3)] == expected
        assert val.targets == [0, 2, 2, 2] and classes == 3


def test_the_copy_is_of_the_plain_backbone_and_leaves_the_encoder_alone() -> None:
    """Also of a compiled encoder, of parts in eval mode, and of one whose gradients are in use."""
    torch.manual_seed(0)
    encoder = encoders.build_encoder("resnet8", 16, bn_splits=2)
    encoder.compile()
    encoder.layer1.eval()
    for parameter in encoder.parameters():
        parameter.grad = torch.ones_like(parameter)
    modes = [module.training for module in encoder.modules()]
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    frozen = frozen_backbone(encoder)
    features = frozen(torch.randn(4, 3, 32, 32))
    assert features.shape == (4, encoders.feature_dim(encoder)) and not features.requires_grad
    assert frozen._compiled_call_impl is None and encoder._compiled_call_impl is not None
    assert not any(module.training for module in frozen.modules())
    assert [module.training for module in encoder.modules()] == modes
    assert all(p.requires_grad and p.grad is not None for p in encoder.parameters())
    assert all(torch.equal(t, before[name]) for name, t in encoder.state_dict().items())
    shared = {t.data_ptr() for t in encoder.state_dict().values()}
    assert not shared & {t.data_ptr() for t in frozen.state_dict().values()}
