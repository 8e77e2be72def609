"""main_lincls.py as a user meets it: what it reads from a checkpoint, measures, writes, refuses.

Everything runs on the CPU, in this process where a process of its own is not the point.
"""

from __future__ import annotations

import json
import math
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from harness import Processes
from helpers import differences, read_log, refusal, write_images, write_labelled
from PIL import Image
from probes import BEST, LATEST, MAIN, load, result, write_encoder

import main_lincls
import main_moco
from moco.checkpoint import load_encoder
from moco.cli import lincls_config

# 30 training images in batches of 8 are three steps an epoch.
TINY = shlex.split("--batch-size 8 --lr 0.9375 -j 0 --device cpu --print-freq 1 --seed 5")
MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]


@pytest.fixture(scope="module")
def pretrained(data, tmp_path_factory) -> Path:
    """One epoch of pretraining with numbers of its own for mean and standard deviation."""
    folder = tmp_path_factory.mktemp("pretrained")
    flags = (
        "-a resnet8 --image-size 32 --batch-size 8 --moco-k 64 --moco-dim 16 --mlp --epochs 1 "
        f"-j 0 --device cpu --seed 1 --mean {' '.join(map(str, MEAN))} "
        f"--std {' '.join(map(str, STD))}"
    )
    main_moco.main([*shlex.split(flags), "--save-dir", str(folder), str(data)])
    return folder / "checkpoint_0000.pth.tar"


@pytest.fixture(scope="module")
def probe(data, pretrained, tmp_path_factory) -> Path:
    """Three epochs of linear evaluation without interruption."""
    folder = tmp_path_factory.mktemp("probe") / "run"
    evaluate(data, "--pretrained", pretrained, "--epochs", 3, "--save-dir", folder)
    return folder


def evaluate(data: Path, *flags: object) -> None:
    main_lincls.main([*TINY, *map(str, flags), str(data)])


# ---- Command lines -------------------------------------------------------------------------------


def test_commands_of_upstream_parse_and_resolve(tmp_path, pretrained):
    write_images(tmp_path, {"train/a": 256, "val/a": 1}, size=8)
    launch = "--dist-url tcp://localhost:10001 --multiprocessing-distributed --world-size 1"
    launch += " --rank 0"
    line = f"-a resnet50 --lr 30.0 --batch-size 256 --pretrained {pretrained} {launch} {tmp_path}"
    config = lincls_config(shlex.split(line))
    values = config.to_flat()
    expected = {
        "arch": "resnet50", "lr": 30.0, "batch_size": 256, "epochs": 100, "schedule": [60, 80],
        "schedule_factor": 0.1, "weight_decay": 0.0, "momentum": 0.9, "nodes": 1, "amp": "off",
    }  # fmt: skip
    for name, value in expected.items():
        assert values[name] == value, name
    assert config.placement.processes == len(config.placement.devices)
    folder = config.saving.save_dir
    assert folder.parent == Path("results") and "checkpoint_0000" in folder.name
    assert not Path("results").exists()


# ---- The linear classifier -----------------------------------------------------------------------


def test_run_folder_and_result(probe, pretrained):
    names = {path.name for path in probe.iterdir() if "tfevents" not in path.name}
    assert names == {".lock", "args.json", "log.jsonl", "lincls.json", LATEST, BEST}
    found = result(probe)
    assert found["checkpoint"] == str(pretrained)
    assert (found["arch"], found["pretrained_epochs"]) == ("resnet8", 1)
    assert found["objective"].startswith("3 * align(alpha=2) + 1 * uniform(t=3")
    assert (found["classes"], found["train_images"], found["val_images"]) == (3, 30, 15)
    assert found["protocol"] == {
        "lr": 0.9375, "batch_size": 8, "epochs": 3, "schedule": [60, 80], "schedule_factor": 0.1,
        "weight_decay": 0.0, "momentum": 0.9, "image_size": 32, "seed": 5, "amp": "off",
        "mean": MEAN, "std": STD,
    }  # fmt: skip
    facts = json.loads((probe / "args.json").read_text())
    assert facts["provenance"]["torch"] == torch.__version__


def test_best_and_last_are_those_of_the_log(probe):
    epochs = read_log(probe, "val")
    assert [line["epoch"] for line in epochs] == [0, 1, 2]
    found = result(probe)
    for line, key in ((epochs[-1], "last"), (max(epochs, key=lambda e: e["top1"]), "best")):
        assert found[key] == {name: line[name] for name in ("top1", "top5", "epoch")}
    for line in epochs:
        assert line["top1"] * 15 / 100 == pytest.approx(round(line["top1"] * 15 / 100))
        assert line["top5"] == 100  # of three classes
        assert math.isfinite(line["loss"])
    assert 100 / 3 < found["best"]["top1"]
    steps = read_log(probe, "lincls")
    assert [line["step"] for line in steps] == list(range(1, 10))
    assert all(math.isfinite(line["loss"]) for line in steps)


def test_best_is_the_first_of_equals(data, pretrained):
    """With a learning rate of 0 after the first epoch, later ones have its accuracy."""
    flags = shlex.split("--epochs 3 --schedule 1 --schedule-factor 0 --save-dir r")
    evaluate(data, "--pretrained", pretrained, *flags)
    best, last = (result("r")[key] for key in ("best", "last"))
    assert (best["epoch"], last["epoch"]) == (0, 2)
    assert best["top1"] == last["top1"]
    assert (load(f"r/{BEST}")["epoch"], load(f"r/{LATEST}")["epoch"]) == (1, 3)
    assert load(f"r/{LATEST}")["best"] == best
    assert load(f"r/{LATEST}")["best_acc1"] == best["top1"]  # upstream's name


@pytest.mark.parametrize("name", [LATEST, BEST])
def test_saved_encoder_is_bit_for_bit_the_pretrained_one(probe, pretrained, name):
    before, after = load(pretrained)["state_dict"], load(probe / name)["state_dict"]
    backbone = {
        key.replace("encoder_q.", ""): tensor
        for key, tensor in before.items()
        if "encoder_q." in key and ".fc." not in key
    }
    head = {key: after[key] for key in ("module.fc.weight", "module.fc.bias")}
    assert differences(backbone | head, dict(after)) == []
    assert head["module.fc.weight"].shape == (3, 64)


def test_evaluate_reproduces_best_and_last_exactly(data, probe, capsys):
    for name, key in ((BEST, "best"), (LATEST, "last")):
        evaluate(data, "-e", "--pretrained", probe / name, "--save-dir", key)
        assert result(key)["top1"] == result(probe)[key]["top1"]
        assert result(key)["top5"] == result(probe)[key]["top5"]
        assert result(key)["pretrained_epochs"] == result(probe)["pretrained_epochs"]
        found = f"Acc@1 {result(key)['top1']:.3f} Acc@3 100.000"  # there are three classes
        assert found in capsys.readouterr().out
        assert not list(Path(key).glob("*.pth.tar"))


def test_same_seed_same_classifier_with_any_number_of_workers(data, pretrained, probe):
    flags = ["--pretrained", pretrained, "--epochs", 3, "-j", 2, "--save-dir", "again"]
    evaluate(data, *flags)
    a, b = load(probe / LATEST), load("again/" + LATEST)
    assert differences(a["state_dict"], b["state_dict"]) == []
    assert {k: result("again")[k] for k in ("best", "last")} == {
        k: result(probe)[k] for k in ("best", "last")
    }


def test_a_resumed_evaluation_ends_like_one_that_was_not_cut_off(data, pretrained, probe):
    """With the seed of the checkpoint."""
    evaluate(data, "--pretrained", pretrained, "--epochs", 2, "--save-dir", "cut")
    for left in (f".{LATEST}.123.tmp", ".lincls.json.0123abcd.tmp", ".args.json.tmp"):
        Path("cut", left).write_bytes(b"of a process that was killed")
    flags = [*TINY[:-2], "--resume", f"cut/{LATEST}", "--epochs", 3, "--save-dir", "cut"]
    main_lincls.main([*map(str, flags), str(data)])
    assert not list(Path("cut").glob("*.tmp"))
    for name in (LATEST, BEST):
        a, b = load(probe / name), load(f"cut/{name}")
        for content in (a, b):
            content.pop("args")
        assert differences(a, b) == []
    assert {k: result("cut")[k] for k in ("best", "last")} == {
        k: result(probe)[k] for k in ("best", "last")
    }


def test_learning_rate_of_each_epoch(data, pretrained):
    flags = "--epochs 3 --schedule 1 2 --lr 1 --schedule-factor 0.5 --images-per-class 3"
    evaluate(data, "--pretrained", pretrained, *flags.split(), "--save-dir", "r")
    assert [line["lr"] for line in read_log(Path("r"), "lincls")] == pytest.approx([1, 0.5, 0.25])
    assert (result("r")["train_images"], result("r")["val_images"]) == (9, 9)


# ---- What the checkpoint says, and what is said about it -----------------------------------------


def test_start_says_what_matched(data, pretrained, capsys):
    evaluate(data, "--pretrained", pretrained, "--epochs", 0, "--knn", "--save-dir", "r")
    out = capsys.readouterr().out
    tensors = len([name for name in load(pretrained)["state_dict"] if ".encoder_q." in name])
    assert f"all {tensors - 4} tensors matched, 4 of the file have no place" in out
    assert "3 * align(alpha=2)" in out and "epoch 1" in out
    assert "30 training and 15 validation images, 3 classes, 32 px" in out


@pytest.mark.parametrize("lacking", ["val of five", "both"])
def test_a_class_that_a_split_lacks_is_named(data, pretrained, tmp_path, capsys, lacking):
    """A class without training images there is only by --labels; else it is refused."""
    mine = write_labelled(tmp_path / "data", classes=7 if "five" in lacking else 3)
    flags, expected = [], []
    if lacking in ("val", "both", "val of five"):
        gone = range(1, 7 if "five" in lacking else 2)
        for label in gone:
            shutil.rmtree(mine / "val" / f"class_{label}")
        expected = ["no validation image of 1 of 3 classes, which are never validated: 'class_1'"]
        if "five" in lacking:
            expected = ["no validation image of 6 of 7 classes, which are never validated: "
                        "'class_1', 'class_2', 'class_3', 'class_4', 'class_5', ..."]  # fmt: skip
    if lacking in ("train", "both"):
        names = [f"class_{label}/00{i}.png" for label in (0, 1) for i in range(4)]
        Path("list.txt").write_text("\n".join(names))
        flags = ["--labels", "list.txt"]
        expected += ["no training image of 1 of 3 classes, which are never recognised: 'class_2'"]
    evaluate(mine, *flags, "--pretrained", pretrained, "--epochs", 1, "--save-dir", "r")
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if "warning" in line] == [f"warning: {w}" for w in expected]
    assert ("classes_without_validation" in result("r")) == any("validation" in w for w in expected)
    assert any(f"Acc@{5 if 'five' in lacking else 3} " in line for line in lines)


def test_a_single_class_is_warned_of(pretrained, tmp_path, capsys):
    """As images have it that lie one folder deeper than they should: any accuracy is 100."""
    mine = write_labelled(tmp_path / "data", classes=1)
    evaluate(mine, "--pretrained", pretrained, "--epochs", 0, "--knn", "--save-dir", "r")
    assert "warning: all images are of one class, 'class_0'" in capsys.readouterr().out


def test_image_size_mean_and_std_come_from_the_checkpoint(data, pretrained, probe):
    for folder, source in ((probe, pretrained), (Path("again"), probe / BEST)):
        if not folder.exists():
            evaluate(data, "-e", "--pretrained", source, "--save-dir", folder)
        facts = json.loads((folder / "args.json").read_text())
        assert (facts["arch"], facts["image_size"]) == ("resnet8", 32)
        assert (facts["mean"], facts["std"]) == (MEAN, STD)
    flags = "--epochs 0 --knn --image-size 16 --mean 0 0 0 --std 1 1 1 --save-dir mine"
    evaluate(data, "--pretrained", pretrained, *shlex.split(flags))
    facts = json.loads(Path("mine/args.json").read_text())
    assert (facts["image_size"], facts["mean"], facts["std"]) == (16, [0, 0, 0], [1, 1, 1])


def test_small_stem_comes_from_the_checkpoint(data, capsys):
    source = write_encoder(Path("small.pth.tar"), arch="resnet18", small_stem=True)
    evaluate(data, "--pretrained", source, "--epochs", 0, "--knn", "--images-per-class", 3,
             "--image-size", 32)  # fmt: skip
    assert "encoder: resnet18, small stem, 512 features" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "scaled"),
    [
        ("--batch-size 16 --lr 0.9375", "1.875"),
    ],
)
def test_lr_and_batch_that_are_no_pair_are_warned_of(data, pretrained, capsys, flags, scaled):
    flags = [*shlex.split(flags), "--epochs", 1, "--save-dir", "r"]
    evaluate(data, "--pretrained", pretrained, *flags)
    warnings = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    assert len(warnings) == (scaled is not None)
    for line in warnings:
        assert "30 with 256" in line and line.endswith(f"--lr {scaled}")


def test_the_published_pair_is_not_warned_of(tmp_path, pretrained, capsys):
    write_images(tmp_path, {"train/a": 128, "train/b": 128, "val/a": 2, "val/b": 2}, size=8)
    flags = shlex.split("--epochs 1 -j 0 --device cpu --save-dir r --image-size 16")
    main_lincls.main([*flags, "--pretrained", str(pretrained), str(tmp_path)])  # lr, batch: default
    assert "warning" not in capsys.readouterr().out
    assert result("r")["protocol"]["lr"] == 30 and result("r")["protocol"]["batch_size"] == 256
    # One tensor of the 256 images per step, and 2 classes: top-5 is top-2 here.
    assert result("r")["last"]["top5"] == 100


# ---- k-NN ----------------------------------------------------------------------------------------


def features_by_hand(checkpoint: Path, folder: Path, layer: str) -> tuple[np.ndarray, list[int]]:
    """Unit features of whole 32-pixel images, one at a time, in float64."""
    head = {"backbone": "none", "projection": "projection"}[layer]
    encoder = load_encoder(checkpoint, head=head)[0].double()
    rows, labels = [], []
    for path in sorted(folder.glob("*/*.png")):
        pixels = np.asarray(Image.open(path).convert("RGB"), dtype=np.float64) / 255
        image = torch.tensor((pixels - MEAN) / STD).permute(2, 0, 1).unsqueeze(0)
        with torch.no_grad():
            row = encoder(image)[0].numpy()
        rows.append(row / np.linalg.norm(row))
        labels.append(int(path.parent.name.removeprefix("class_")))
    return np.stack(rows), labels


@pytest.mark.parametrize(
    ("flags", "layer", "k", "temperature"),
    [
        ("", "backbone", 30, 0.07),
        ("--knn-k 3 --knn-t 0.5", "backbone", 3, 0.5),
        ("--knn-layer projection", "projection", 30, 0.07),
    ],
)
def test_knn_is_the_vote_of_the_nearest(data, pretrained, flags, layer, k, temperature):
    flags = ["--epochs", 0, "--knn", *shlex.split(flags), "--save-dir", "r"]
    evaluate(data, "--pretrained", pretrained, *flags)
    assert not {"best", "last", "top1"} & result("r").keys()
    assert not list(Path("r").glob("*.pth.tar"))
    found = result("r")["knn"]
    assert (found["k"], found["temperature"], found["layer"]) == (k, temperature, layer)
    assert (found["images"], found["top5"]) == (15, 100)

    bank, bank_labels = features_by_hand(pretrained, data / "train", layer)
    queries, labels = features_by_hand(pretrained, data / "val", layer)
    right = 0
    for query, label in zip(queries, labels, strict=True):
        similarity = bank @ query
        votes = [0.0, 0.0, 0.0]
        for i in np.argsort(-similarity)[:k]:
            votes[bank_labels[i]] += math.exp(similarity[i] / temperature)
        right += votes.index(max(votes)) == label
    assert found["top1"] == pytest.approx(100 * right / 15)


def test_knn_beside_the_probe_is_knn_alone_and_does_not_change_it(data, pretrained, probe):
    for epochs in (0, 3):
        flags = ["--epochs", epochs, "--knn", "--save-dir", f"r{epochs}"]
        evaluate(data, "--pretrained", pretrained, *flags)
    assert result("r0")["knn"] == result("r3")["knn"]
    assert read_log(Path("r3"), "knn")[0]["top1"] == result("r3")["knn"]["top1"]
    a, b = load(probe / LATEST)["state_dict"], load(f"r3/{LATEST}")["state_dict"]
    assert differences(a, b) == []


# ---- Refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("", ["--pretrained CHECKPOINT"]),
        ("--pretrained missing.pth.tar", ["--pretrained", "missing.pth.tar"]),
        ("--resume missing.pth.tar", ["--resume", "missing.pth.tar"]),
        ("--pretrained .", ["--pretrained", "has 0 files of weights; name one"]),
        ("--pretrained FILE --epochs 0", ["--epochs 0", "--knn"]),
        ("--pretrained FILE --knn --knn-k 0", ["--knn-k", "0"]),
        ("--pretrained FILE --knn --knn-t 0", ["--knn-t", "0"]),
        ("--pretrained FILE --knn-layer fc", ["--knn-layer", "projection"]),
        ("--pretrained FILE --image-size 0", ["--image-size", "got 0"]),
        ("--pretrained FILE --lr nan", ["--lr", "nan"]),
        ("--pretrained FILE --std 0 1 1", ["--std"]),
        ("--pretrained FILE --mean inf 0 0", ["--mean"]),
        ("--pretrained FILE --knn --knn-t nan", ["--knn-t"]),
        ("--pretrained ''", ["--pretrained"]),
        ("--pretrained FILE --epochs 1 --start-epoch 1", ["--start-epoch"]),
        ("--pretrained FILE --batch-size 31", ["30 images", "lower --batch-size"]),
        ("--pretrained FILE --mystery", ["--mystery"]),
        ("--pretrained FILE --gpus 0", ["--device cpu", "[0]"]),
        ("--pretrained FILE --save-dir PROBE", ["PROBE", "already holds a run", "--save-dir"]),
        ("--pretrained FILE --save-dir RUN", ["RUN", "already holds a run", "checkpoint_0000"]),
    ],
)
def test_bad_flags_are_refused_at_parse_time(data, pretrained, probe, capsys, flags, named):
    paths = {"FILE": str(pretrained), "RUN": str(pretrained.parent), "PROBE": str(probe)}
    argv = [paths.get(word, word) for word in shlex.split(flags)]
    status, message = refusal(main_lincls.main, [*TINY, *argv, data], capsys)
    assert status == 2
    for part in named:
        assert paths.get(part, part) in message, message
    assert not Path("results").exists()


def test_bad_folders_are_refused(tmp_path, pretrained, capsys):
    """At parse time where names tell, else before there is a run folder; all kinds are in
    tests/data/test_images.py."""
    write_images(tmp_path / "no val", {"train/a": 8})
    write_images(tmp_path / "new class", {"train/a": 8, "val/unknown": 2})
    for name, expected, named in (
        ("no val", 2, "train/CLASS/IMAGE"),
        ("new class", 1, "training set lacks: unknown"),
    ):
        argv = [*TINY, "--pretrained", pretrained, "--save-dir", "r", tmp_path / name]
        status, message = refusal(main_lincls.main, argv, capsys)
        assert status == expected and named in message and name in message, message
        assert not Path("r").exists()


def test_another_arch_than_the_checkpoints_is_refused(data, pretrained, capsys):
    argv = [*TINY, "-a", "resnet50", "--pretrained", pretrained, "--save-dir", "r", data]
    status, message = refusal(main_lincls.main, argv, capsys)
    assert status == 1
    assert str(pretrained) in message and "resnet8" in message and "-a resnet50" in message


def test_a_file_without_a_whole_encoder_is_refused(data, pretrained, tmp_path, capsys):
    """All kinds are in tests/checkpoint/."""
    path = tmp_path / "file.pth.tar"
    for content in (pretrained.read_bytes()[:5000], b"<html>", b"\x80\x02]q\x00a."):
        path.write_bytes(content)
        argv = [*TINY, "--pretrained", path, "--save-dir", "r", data]
        status, message = refusal(main_lincls.main, argv, capsys)
        assert status == 1 and str(path) in message
        assert not Path("r").exists()


def test_evaluate_needs_a_classifier_of_these_classes(data, pretrained, probe, capsys, tmp_path):
    argv = [*TINY, "-e", "--pretrained", pretrained, data]
    status, message = refusal(main_lincls.main, argv, capsys)
    assert status == 1
    assert str(pretrained) in message and "projection head" in message and "linear" in message

    two = write_labelled(tmp_path / "two", classes=2)
    argv = [*TINY, "-e", "--pretrained", probe / BEST, two]
    status, message = refusal(main_lincls.main, argv, capsys)
    assert status == 1 and "classifies 3 classes, the data has 2" in message


def test_what_a_file_lacks_is_named(data, pretrained, probe, capsys):
    knn = ["--knn", "--knn-layer", "projection", "--epochs", 0]
    argv = [*TINY, *knn, "--pretrained", probe / BEST, "--save-dir", "r", data]
    status, message = refusal(main_lincls.main, argv, capsys)
    assert status == 1 and "linear head" in message and "projection was asked for" in message
    assert not Path("r").exists()
    argv = [*TINY, "--resume", pretrained, data]
    status, message = refusal(main_lincls.main, argv, capsys)
    assert status == 1 and str(pretrained) in message


def test_a_probe_killed_before_its_result_was_written_is_finished(
    data, pretrained, probe, tmp_path
):
    """All epochs are done and saved: nothing is trained, but k-NN from the projection head runs."""
    folder = tmp_path / "again"
    shutil.copytree(probe, folder)
    whole = json.loads((folder / "lincls.json").read_text())
    (folder / "lincls.json").unlink()
    knn = ["--knn", "--knn-layer", "projection"]
    argv = [*TINY, *knn, "--pretrained", pretrained, "--epochs", 3, "--save-dir", folder,
            "--resume", "auto", data]  # fmt: skip
    main_lincls.main([str(word) for word in argv])
    result = json.loads((folder / "lincls.json").read_text())
    assert (result["best"], result["last"]) == (whole["best"], whole["last"])
    assert result["knn"]["layer"] == "projection"
    assert result["checkpoint"] == str(pretrained)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--lr 3", ["lr: ", "before, 3.0 now"]),
        ("--image-size 16", ["image_size: 32 before, 16 now"]),
        ("--amp bf16", ["amp: 'off' before, 'bf16' now"]),
        ("--mean 0 0 0", ["mean: [0.4, 0.5, 0.6] before, [0.0, 0.0, 0.0] now"]),
        ("--labels 50", ["labels_digest: None before"]),
        ("--images-per-class 5", ["images_per_class: None before, 5 now"]),
        ("--epochs 2", ["3 epochs done", "--epochs 2"]),
        ("--pretrained OTHER", ["another encoder", "other.pth.tar"]),
        ("TWO", ["classifies 3 classes, the data has 2"]),
    ],
)
def test_a_resume_that_is_refused_leaves_the_folder_as_it_was(
    data, pretrained, probe, tmp_path, capsys, flags, named
):
    """args.json too: the next resume, and reports, read what the classifier was trained with."""
    shutil.copytree(probe, folder := tmp_path / "r")
    two = write_labelled(tmp_path / "two", classes=2) if flags == "TWO" else data
    if "OTHER" in flags:
        write_encoder(tmp_path / "other.pth.tar", seed=1)
        flags = f"--pretrained {tmp_path / 'other.pth.tar'}"
    before = {path: path.read_bytes() for path in folder.rglob("*")}
    argv = [*TINY, "--epochs", 4, "--save-dir", folder, "--resume", "auto"]
    argv += [*shlex.split(flags.replace("TWO", "")), two]
    status, message = refusal(main_lincls.main, argv, capsys)
    assert status == 1
    for part in named:
        assert part in message, message
    assert {path: path.read_bytes() for path in folder.rglob("*")} == before


def test_knn_before_an_evaluation_does_not_change_it(data, probe, capsys):
    """The encoder is in eval mode after k-NN as before: the loss would show it."""
    losses = []
    for flags in ([], ["--knn"]):
        evaluate(data, "-e", *flags, "--pretrained", probe / BEST, "--save-dir", f"r{len(losses)}")
        losses.append(capsys.readouterr().out.split("loss ")[1].split()[0])
    assert losses[0] == losses[1]


def test_a_non_finite_loss_is_no_result(data, pretrained, capsys):
    argv = [*TINY, "--pretrained", pretrained, "--epochs", 2, "--save-dir", "r", "--lr", "1e38"]
    status, message = refusal(main_lincls.main, [*argv, data], capsys)
    assert status == 1 and "finite" in message
    assert not Path("r/lincls.json").exists()
    read_log(Path("r"))


def test_an_image_size_that_does_not_fit_the_encoder_is_refused(data, capsys):
    source = write_encoder(Path("dense.pth.tar"), arch="densenet121")
    argv = [*TINY, "--pretrained", source, "--image-size", 8, data]
    status, message = refusal(main_lincls.main, argv, capsys)
    assert status in (1, 2) and "8 pixels" in message


def test_a_small_training_set_is_enough_where_nothing_is_trained(data, probe):
    argv = ["-e", "--knn", "-j", 0, "--device", "cpu", "--pretrained", probe / BEST, data]
    main_lincls.main([str(word) for word in argv])  # batch 256, as is the default


# ---- Two processes -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def odd(tmp_path_factory) -> Path:
    """Seven validation images, which two processes cannot share evenly."""
    root = write_labelled(tmp_path_factory.mktemp("odd"), val=3)
    for label in (0, 2):
        (root / "val" / f"class_{label}" / "002.png").unlink()
    return root


def run_two(folder: Path, *argv: object) -> str:
    argv = [*TINY, *argv, "--save-dir", folder]
    processes = Processes(folder.with_suffix(".out"), *argv, count=2, code=MAIN)
    assert processes.wait() == [0, 0], processes.output()
    return processes.output()


@pytest.mark.long
def test_two_processes_count_every_image_once(odd, pretrained, tmp_path):
    out = run_two(tmp_path / "two", "--pretrained", pretrained, "--epochs", 2, "--knn", odd)
    assert "2 process(es)" in out and out.count("run folder:") == 1
    two = result("two")
    assert (two["val_images"], two["knn"]["images"], two["knn"]["k"]) == (7, 7, 30)
    for name, key in ((LATEST, "last"), (BEST, "best")):
        flags = ["-e", "--knn", "--pretrained", f"two/{name}", "--save-dir", f"one-{key}"]
        evaluate(odd, *flags)
        one = result(f"one-{key}")
        assert one["top1"] == two[key]["top1"] and one["top5"] == two[key]["top5"]
        assert one["knn"]["top1"] == two["knn"]["top1"]
        assert one["top1"] * 7 / 100 == pytest.approx(round(one["top1"] * 7 / 100))


@pytest.mark.parametrize(
    ("before", "named"),
    [
        ("sys.argv[-1:-1] = ['--lr', '0.5']", "lr 0.5, rank 0 has 1.0"),
        ("sys.argv[-1:-1] = ['--knn']", "knn True, rank 0 has False"),
        ("sys.argv[-1] = sys.argv[-1].replace('data', 'fewer')", "training images"),
        ("sys.argv[-1] = sys.argv[-1].replace('data', 'newer')", "validation images"),
        ("sys.argv[-1:-1] = ['--pretrained', OTHER]", "encoder"),
        ("sys.argv[-1:-1] = ['-j', '1', '--save-dir', 'elsewhere']", None),
    ],
)
@pytest.mark.long
def test_ranks_with_another_evaluation_are_named_on_every_rank(
    before, named, pretrained, tmp_path
) -> None:
    write_labelled(tmp_path / "data")
    write_labelled(tmp_path / "fewer", train=9)
    write_labelled(tmp_path / "newer", val=4)
    other = write_encoder(tmp_path / "other.pth.tar", seed=1)
    argv = [*TINY, "--lr", 1, "--epochs", 1, "--pretrained", pretrained]
    before = f"import os, sys\nOTHER = {str(other)!r}\nif os.environ['RANK'] == '1': {before}"
    argv += ["--save-dir", tmp_path / "r", tmp_path / "data"]
    ranks = Processes(tmp_path / "out", *argv, count=2, code=MAIN, before=before)
    assert ranks.wait() == ([1, 1] if named else [0, 0]), ranks.output()
    for rank in range(2 if named else 0):
        (line,) = ranks.output(rank).strip().splitlines()
        assert f"rank 1 has {named}" in line and "give all ranks the same arguments" in line
    assert (tmp_path / "r" / "lincls.json").exists() == (named is None)
