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
import probes
import pytest
import torch
import torch.nn.functional as F
from harness import Processes
from helpers import differences, read_log, write_images, write_labelled
from PIL import Image
from probes import BEST, LATEST, MAIN, TINY, load, result, unequal_states, write_encoder

import main_lincls
import main_moco
from moco.checkpoint import load_encoder
from moco.cli import lincls_config
from moco.evaluate.heads import HeadTraining
from moco.evaluate.knn import knn_predict

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
    evaluate(data, "--pretrained", pretrained, "--epochs 3 --save-dir", folder)
    return folder


def evaluate(data: Path, *flags: object) -> None:
    probes.evaluate(data, "--lr 0.9375", *flags)


def warnings(capsys: pytest.CaptureFixture) -> list[str]:
    return [line for line in capsys.readouterr().out.splitlines() if "warning" in line]


def test_commands_of_upstream_parse_and_resolve(tmp_path, pretrained):
    write_images(tmp_path, {"train/a": 256, "val/a": 1}, size=8)
    launch = "--dist-url tcp://localhost:10001 --multiprocessing-distributed --world-size 1"
    launch += " --rank 0"
    line = f"-a resnet50 --lr 30.0 --batch-size 256 --pretrained {pretrained} {launch} {tmp_path}"
    config = lincls_config(shlex.split(line))
    expected = {
        "arch": "resnet50", "lr": 30.0, "batch_size": 256, "epochs": 100, "schedule": [60, 80],
        "schedule_factor": 0.1, "weight_decay": 0.0, "momentum": 0.9, "nodes": 1, "amp": "off",
    }  # fmt: skip
    assert config.to_flat().items() >= expected.items()
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
    flags = "--epochs 3 --schedule 1 --schedule-factor 0 --save-dir r"
    evaluate(data, "--pretrained", pretrained, flags)
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
        evaluate(data, "-e --pretrained", probe / name, "--save-dir", key)
        assert result(key)["top1"] == result(probe)[key]["top1"]
        assert result(key)["top5"] == result(probe)[key]["top5"]
        assert result(key)["pretrained_epochs"] == result(probe)["pretrained_epochs"]
        found = f"Acc@1 {result(key)['top1']:.3f} Acc@3 100.000"  # there are three classes
        assert found in capsys.readouterr().out
        assert not list(Path(key).glob("*.pth.tar"))


def test_same_seed_same_classifier_with_any_number_of_workers(data, pretrained, probe):
    evaluate(data, "--pretrained", pretrained, "--epochs 3 -j 2 --save-dir again")
    assert unequal_states(probe / LATEST, f"again/{LATEST}") == []
    assert all(result("again")[key] == result(probe)[key] for key in ("best", "last"))


def test_learning_rate_of_each_epoch(data, pretrained):
    flags = "--epochs 3 --schedule 1 2 --lr 1 --schedule-factor 0.5 --images-per-class 3"
    evaluate(data, "--pretrained", pretrained, flags, "--save-dir r")
    assert [line["lr"] for line in read_log(Path("r"), "lincls")] == pytest.approx([1, 0.5, 0.25])
    assert (result("r")["train_images"], result("r")["val_images"]) == (9, 9)


def test_products_have_full_precision_whatever_was_chosen(data, pretrained, monkeypatch):
    """As of TORCH_ALLOW_TF32_CUBLAS_OVERRIDE in NVIDIA's containers."""
    take, seen = HeadTraining.step, set()

    def step(self: HeadTraining, losses: torch.Tensor) -> None:
        seen.add(torch.get_float32_matmul_precision())
        take(self, losses)

    monkeypatch.setattr(HeadTraining, "step", step)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        evaluate(data, "--pretrained", pretrained, "--epochs 1 --save-dir r")
        assert (seen, torch.get_float32_matmul_precision()) == ({"highest"}, "high")
    finally:
        torch.set_float32_matmul_precision(before)


# ---- What the checkpoint says, and what is said about it -----------------------------------------


def test_start_says_what_matched(data, pretrained, capsys):
    evaluate(data, "--pretrained", pretrained, "--epochs 0 --knn --save-dir r")
    out = capsys.readouterr().out
    tensors = len([name for name in load(pretrained)["state_dict"] if ".encoder_q." in name])
    assert f"all {tensors - 4} tensors matched, 4 of the file have no place" in out
    assert "3 * align(alpha=2)" in out and "epoch 1" in out
    assert "30 training and 15 validation images, 3 classes, 32 px" in out


@pytest.mark.parametrize(
    ("classes", "gone", "flags", "expected"),
    [
        (7, 6, "", ["no validation image of 6 of 7 classes, which are never validated: 'class_1', "
                    "'class_2', 'class_3', 'class_4', 'class_5', ..."]),
        (3, 1, "--labels list.txt",
         ["no validation image of 1 of 3 classes, which are never validated: 'class_1'",
          "no training image of 1 of 3 classes, which are never recognised: 'class_2'"]),
    ],
    ids=["val of five", "both"],
)  # fmt: skip
def test_a_class_that_a_split_lacks_is_named(
    pretrained, tmp_path, capsys, classes, gone, flags, expected
):
    """A class without training images there is only by --labels; else it is refused."""
    mine = write_labelled(tmp_path / "data", classes=classes)
    for label in range(1, 1 + gone):
        shutil.rmtree(mine / "val" / f"class_{label}")
    names = [f"class_{label}/00{i}.png" for label in (0, 1) for i in range(4)]
    Path("list.txt").write_text("\n".join(names))
    evaluate(mine, flags, "--pretrained", pretrained, "--epochs 1 --save-dir r")
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if "warning" in line] == [f"warning: {w}" for w in expected]
    assert "classes_without_validation" in result("r")
    assert any(f"Acc@{min(5, classes)} " in line for line in lines)


def test_a_single_class_is_warned_of(pretrained, tmp_path, capsys):
    """As images have it that lie one folder deeper than they should: any accuracy is 100."""
    mine = write_labelled(tmp_path / "data", classes=1)
    evaluate(mine, "--pretrained", pretrained, "--epochs 0 --knn --save-dir r")
    assert "warning: all images are of one class, 'class_0'" in warnings(capsys)[0]


def test_image_size_mean_and_std_come_from_the_checkpoint(data, pretrained, probe):
    evaluate(data, "-e --pretrained", probe / BEST, "--save-dir again")
    flags = "--epochs 0 --knn --image-size 16 --mean 0 0 0 --std 1 1 1 --save-dir mine"
    evaluate(data, "--pretrained", pretrained, flags)
    expected = {probe: (32, MEAN, STD), "again": (32, MEAN, STD), "mine": (16, [0] * 3, [1] * 3)}
    for folder, wanted in expected.items():
        facts = json.loads(Path(folder, "args.json").read_text())
        assert (facts["image_size"], facts["mean"], facts["std"]) == wanted
        assert facts["arch"] == "resnet8"


def test_small_stem_comes_from_the_checkpoint(data, capsys):
    source = write_encoder(Path("small.pth.tar"), arch="resnet18", small_stem=True)
    evaluate(data, "--pretrained", source, "--epochs 0 --knn --images-per-class 3")
    assert "encoder: resnet18, small stem, 512 features" in capsys.readouterr().out


def test_lr_and_batch_that_are_no_pair_are_warned_of(data, pretrained, capsys):
    evaluate(data, "--batch-size 16 --pretrained", pretrained, "--epochs 1 --save-dir r")
    (line,) = warnings(capsys)
    assert "30 with 256" in line and line.endswith("--lr 1.875")


def test_the_published_pair_is_not_warned_of(tmp_path, pretrained, capsys):
    write_images(tmp_path, {"train/a": 128, "train/b": 128, "val/a": 2, "val/b": 2}, size=8)
    flags = shlex.split("--epochs 1 -j 0 --device cpu --save-dir r --image-size 16")
    main_lincls.main([*flags, "--pretrained", str(pretrained), str(tmp_path)])  # lr, batch: default
    assert not warnings(capsys)
    assert result("r")["protocol"]["lr"] == 30 and result("r")["protocol"]["batch_size"] == 256
    # One tensor of the 256 images per step, and 2 classes: top-5 is top-2 here.
    assert result("r")["last"]["top5"] == 100


# ---- k-NN ----------------------------------------------------------------------------------------


@torch.no_grad()
def features_by_hand(checkpoint: Path, folder: Path, layer: str) -> tuple[torch.Tensor, ...]:
    """Unit features of whole 32-pixel images, one at a time, in float64; and labels."""
    head = {"backbone": "none", "projection": "projection"}[layer]
    encoder = load_encoder(checkpoint, head=head)[0].double()
    rows, labels = [], []
    for path in sorted(folder.glob("*/*.png")):
        pixels = np.asarray(Image.open(path).convert("RGB"), dtype=np.float64) / 255
        rows.append(encoder(torch.tensor((pixels - MEAN) / STD).permute(2, 0, 1).unsqueeze(0)))
        labels.append(int(path.parent.name.removeprefix("class_")))
    return F.normalize(torch.cat(rows), dim=1), torch.tensor(labels)


@pytest.mark.parametrize(
    ("flags", "layer", "k", "temperature"),
    [
        ("", "backbone", 30, 0.07),
        ("--knn-k 3 --knn-t 0.5", "backbone", 3, 0.5),
        ("--knn-layer projection", "projection", 30, 0.07),
    ],
)
def test_knn_is_the_vote_of_the_nearest(data, pretrained, flags, layer, k, temperature):
    evaluate(data, "--pretrained", pretrained, "--epochs 0 --knn", flags, "--save-dir r")
    assert not {"best", "last", "top1"} & result("r").keys()
    assert not list(Path("r").glob("*.pth.tar"))
    found = result("r")["knn"]
    assert (found["k"], found["temperature"], found["layer"]) == (k, temperature, layer)
    assert (found["images"], found["top5"]) == (15, 100)
    bank = features_by_hand(pretrained, data / "train", layer)
    queries, labels = features_by_hand(pretrained, data / "val", layer)
    ranked = knn_predict(queries, *bank, classes=3, k=k, temperature=temperature)
    assert found["top1"] == pytest.approx(100 * (ranked[:, 0] == labels).double().mean().item())


def test_knn_beside_the_probe_is_knn_alone_and_does_not_change_it(data, pretrained, probe):
    for epochs in (0, 3):
        flags = f"--epochs {epochs} --knn --save-dir r{epochs}"
        evaluate(data, "--pretrained", pretrained, flags)
    assert result("r0")["knn"] == result("r3")["knn"]
    assert read_log(Path("r3"), "knn")[0]["top1"] == result("r3")["knn"]["top1"]
    assert unequal_states(probe / LATEST, f"r3/{LATEST}") == []


# ---- Refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("", ["--pretrained CHECKPOINT"]),
        ("--pretrained missing.pth.tar", ["--pretrained", "missing.pth.tar"]),
        ("--resume missing.pth.tar", ["--resume", "missing.pth.tar"]),
        ("--pretrained .", ["--pretrained", "has 0 files of weights; name one"]),
        ("--pretrained ''", ["--pretrained"]),
        ("ITS --epochs 0", ["--epochs 0", "--knn"]),
        ("ITS --knn --knn-k 0", ["--knn-k", "0"]),
        ("ITS --knn --knn-t 0", ["--knn-t", "0"]),
        ("ITS --knn --knn-t nan", ["--knn-t"]),
        ("ITS --knn-layer fc", ["--knn-layer", "projection"]),
        ("ITS --image-size 0", ["--image-size", "got 0"]),
        ("ITS --std 0 1 1", ["--std"]),
        ("ITS --mean inf 0 0", ["--mean"]),
        ("ITS --epochs 1 --start-epoch 1", ["--start-epoch"]),
        ("ITS --batch-size 31", ["30 images", "lower --batch-size"]),
        ("ITS --mystery", ["--mystery"]),
        ("ITS --gpus 0", ["--device cpu", "[0]"]),
        ("ITS --save-dir PROBE", ["PROBE", "already holds a run", "--save-dir"]),
        ("ITS --save-dir RUN", ["RUN", "already holds a run", "checkpoint_0000"]),
        ("ITS --lr nan", ["--lr", "nan"]),
        ("ITS --lr 1,1", ["twice"]),
        ("ITS --lr 1,a", ["1,a"]),
        ("ITS --lr 1,-1", ["--lr", "-1"]),
        ("ITS --protocol stl10 --momentum 0.5", ["--protocol stl10", "no use for --momentum"]),
        ("ITS --lr-backbone 0.1", ["--lr-backbone", "--finetune"]),
        ("ITS --finetune --lr-backbone -1", ["--lr-backbone", "-1"]),
        ("ITS --finetune --lr-backbone nan", ["--lr-backbone", "nan"]),
        ("ITS --finetune --lr 1,2", ["--lr", "once for each"]),
        ("ITS --finetune --wd 0,1", ["--wd", "once for each"]),
        ("ITS --finetune --cached", ["--cached"]),
        ("ITS --finetune --folds 3", ["--folds"]),
        ("ITS --finetune --batch-size 1", ["batch norm"]),
        ("ITS --labels 0", ["--labels", "0"]),
        ("ITS --labels 101", ["--labels", "101"]),
        ("ITS --labels nan", ["--labels", "nan"]),
        ("ITS --labels missing.txt", ["--labels", "missing.txt"]),
        ("ITS --labels 10 --images-per-class 3", ["--labels", "--images-per-class"]),
        ("ITS --labels list.txt --dataset cifar10", ["list.txt", "cifar10", "percent"]),
        ("ITS --folds 1", ["--folds", "1"]),
        ("ITS --cached-views 2", ["--cached-views", "--cached"]),
        ("ITS --cached --cached-views -1", ["--cached-views", "-1"]),
        ("ITS --cached --cached-views 3 --epochs 2", ["--cached-views 3", "--epochs 2"]),
        ("ITS -e --cached", ["-e", "--cached"]),
        ("ITS -e --folds 3", ["-e", "--folds"]),
        ("ITS --cached --cache-dir list.txt", ["list.txt", "folder"]),
    ],
)
def test_bad_flags_are_refused_at_parse_time(data, pretrained, probe, refused, flags, named):
    Path("list.txt").write_text("000.png\n")
    paths = {"RUN": str(pretrained.parent), "PROBE": str(probe)}
    for word, path in {**paths, "ITS": f"--pretrained {pretrained}"}.items():
        flags = flags.replace(word, path)
    message = refused(data, flags, status=2)
    for part in named:
        assert paths.get(part, part) in message, message
    assert not Path("results").exists()


def test_bad_folders_are_refused(tmp_path, pretrained, refused):
    """At parse time where names tell, else before there is a run folder; all kinds are in
    tests/data/test_images.py."""
    write_images(tmp_path / "no-val", {"train/a": 8})
    write_images(tmp_path / "new-class", {"train/a": 8, "val/unknown": 2})
    for name, status, named in (
        ("no-val", 2, "train/CLASS/IMAGE"),
        ("new-class", 1, "training set lacks: unknown"),
    ):
        flags = ["--pretrained", pretrained, "--save-dir r"]
        message = refused(tmp_path / name, *flags, status=status)
        assert named in message and name in message, message
        assert not Path("r").exists()


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("-a resnet50 --pretrained FILE", ["FILE", "resnet8", "-a resnet50"]),
        ("-e --pretrained FILE", ["FILE", "projection head", "linear was asked for"]),
        ("--resume FILE", ["FILE"]),
        ("--knn --knn-layer projection --epochs 0 --pretrained PROBE",
         ["linear head", "projection was asked for"]),
        ("--labels 10 --pretrained FILE", ["3 images", "lower --batch-size"]),
        ("--folds 2 --batch-size 16 --pretrained FILE", ["15 images", "lower --batch-size"]),
        ("--epochs 2 --lr 1e38 --pretrained FILE", ["not finite", "--lr 1e+38,"]),
        ("--epochs 5 --lr 9e37,1e38 --pretrained FILE", ["not finite", "9e+37 and 1e+38"]),
        ("--finetune --lr-backbone 1e30 --pretrained FILE",
         ["not finite", "--lr 0.2 or --lr-backbone 1e+30"]),
    ],
)  # fmt: skip
def test_what_ends_in_one_line_leaves_no_result(data, pretrained, probe, refused, flags, named):
    """And no run folder, where it was known before training."""
    paths = {"FILE": str(pretrained), "PROBE": str(probe / BEST)}
    words = [paths.get(word, word) for word in flags.split()]
    message = refused(data, *words, "--save-dir r")
    for part in named:
        assert paths.get(part, part) in message, message
    assert Path("r").exists() == ("not finite" in named)
    if Path("r").exists():
        assert not Path("r/lincls.json").exists()
        read_log(Path("r"))


def test_a_probe_killed_before_its_result_was_written_is_finished(
    data, pretrained, probe, tmp_path
):
    """All epochs are done and saved: nothing is trained, but k-NN from the projection head runs."""
    shutil.copytree(probe, folder := tmp_path / "again")
    (folder / "lincls.json").unlink()
    flags = ["--knn --knn-layer projection --pretrained", pretrained, "--epochs 3 --resume auto"]
    evaluate(data, *flags, "--save-dir", folder)
    found, whole = result(folder), result(probe)
    assert (found["best"], found["last"]) == (whole["best"], whole["last"])
    assert found["knn"]["layer"] == "projection"
    assert found["checkpoint"] == str(pretrained)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--lr 3", ["lr: ", "before, 3.0 now"]),
        ("--image-size 16", ["image_size: 32 before, 16 now"]),
        ("--amp bf16", ["amp: 'off' before, 'bf16' now"]),
        ("--mean 0 0 0", ["mean: [0.4, 0.5, 0.6] before, [0.0, 0.0, 0.0] now"]),
        ("--labels 50", ["labels_digest: None before"]),
        ("--cached", ["cached: False before, True now"]),
        ("--images-per-class 5", ["images_per_class: None before, 5 now"]),
        ("--epochs 2", ["3 epochs done", "--epochs 2"]),
        ("--pretrained OTHER", ["another encoder", "other.pth.tar"]),
        ("TWO", ["classifies 3 classes, the data has 2"]),
        ("-e --pretrained PROBE TWO", ["classifies 3 classes, the data has 2"]),
    ],
)
def test_a_resume_that_is_refused_leaves_the_folder_as_it_was(
    data, pretrained, probe, tmp_path, refused, flags, named
):
    """args.json too: the next resume, and reports, read what the classifier was trained with."""
    shutil.copytree(probe, folder := tmp_path / "r")
    two = write_labelled(tmp_path / "two", classes=2) if "TWO" in flags else data
    if "OTHER" in flags:
        write_encoder(tmp_path / "other.pth.tar", seed=1)
    for word, path in (("OTHER", tmp_path / "other.pth.tar"), ("PROBE", probe / BEST), ("TWO", "")):
        flags = flags.replace(word, str(path))
    before = {path: path.read_bytes() for path in folder.rglob("*")}
    start = ["--lr 0.9375 --epochs 4 --resume auto --save-dir", folder]
    message = refused(two, *start, flags)
    for part in named:
        assert part in message, message
    assert {path: path.read_bytes() for path in folder.rglob("*")} == before


def test_a_small_training_set_is_enough_where_nothing_is_trained(data, probe):
    argv = ["-e", "--knn", "-j", 0, "--device", "cpu", "--pretrained", probe / BEST, data]
    main_lincls.main([str(word) for word in argv])  # batch 256, as is the default


# ---- Two processes -------------------------------------------------------------------------------


@pytest.mark.long
def test_two_processes_count_every_image_once(pretrained, tmp_path):
    """Seven validation images, which they cannot share evenly."""
    odd = write_labelled(tmp_path / "odd", val=3)
    for label in (0, 2):
        (odd / "val" / f"class_{label}" / "002.png").unlink()
    flags = [*TINY, "--lr", 0.9375, "--pretrained", pretrained, "--epochs", 2, "--knn"]
    processes = Processes(
        tmp_path / "out", *flags, "--save-dir", tmp_path / "two", odd, count=2, code=MAIN
    )
    assert processes.wait() == [0, 0], processes.output()
    out, two = processes.output(), result("two")
    assert "2 process(es)" in out and out.count("run folder:") == 1
    assert (two["val_images"], two["knn"]["images"], two["knn"]["k"]) == (7, 7, 30)
    for name, key in ((LATEST, "last"), (BEST, "best")):
        evaluate(odd, f"-e --knn --pretrained two/{name} --save-dir one-{key}")
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
