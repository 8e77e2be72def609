"""The scripts: their commands parse, the subset is made, one comparison runs to its table."""

from __future__ import annotations

import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT, load_script, parsed

from moco.config import LinclsConfig
from moco.data.toy import make_dataset

SHELL_SCRIPTS = sorted(ROOT.glob("scripts/**/*.sh"))


def run_script(name: str, *arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "scripts" / name), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


@pytest.mark.parametrize("script", SHELL_SCRIPTS, ids=lambda path: path.name)
def test_shell_scripts_parse_and_avoid_what_macos_lacks(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    text = script.read_text(encoding="utf-8")
    code = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    for word in ("nproc ", "timeout ", "readlink -f", "mapfile", "declare -A", "sed -i"):
        assert word not in code, f"{script.name} uses {word!r}, which bash 3.2 on macOS lacks"


def commands_of(script: str, tmp_path: Path, *arguments: str, **environment: str) -> list[str]:
    """The Python commands that a launch script runs, written down by an interpreter that only does
    that."""
    fake = tmp_path / "python"
    fake.write_text(f'#!/bin/sh\nprintf "%s\\n" "$*" >> "{tmp_path}/commands"\n', encoding="utf-8")
    fake.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(fake), "OUT": str(tmp_path / "out"), **environment}
    subprocess.run(
        ["bash", str(ROOT / "scripts" / script), *arguments], check=True, env=environment,
        capture_output=True,
    )  # fmt: skip
    return (tmp_path / "commands").read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize(
    ("script", "objective", "batch"),
    [
        ("imagenet_align_uniform.sh", "3 * align(alpha=2) + 1 * uniform(t=3, with intra", 256),
        ("imagenet_moco_v2.sh", "1 * InfoNCE(tau=0.2)", 256),
        ("imagenet100_align_uniform.sh", "3 * align(alpha=2) + 1 * uniform(t=3, with intra", 128),
        ("imagenet100_moco_v2.sh", "1 * InfoNCE(tau=0.2)", 128),
    ],
)
def test_imagenet_scripts_run_the_published_recipe(
    script: str, objective: str, batch: int, tmp_path: Path
) -> None:
    (command,) = commands_of(script, tmp_path, "DIR", "--epochs", "3")
    program, *flags = shlex.split(command)
    assert program.endswith("main_moco.py")
    args = parsed(flags)
    assert args.objective.startswith(objective)
    assert (args.arch, args.batch_size, args.lr) == ("resnet50", batch, 0.03)
    assert args.mlp and args.aug_plus and args.cos
    assert (args.moco_k, args.moco_m, args.moco_dim) == (65536, 0.999, 128)
    assert args.epochs == 3, "flags of the user come last and win"
    assert (args.data, args.resume) == ("DIR", "auto")


def test_imagenet_lincls_script_runs_the_published_protocol(tmp_path: Path) -> None:
    (command,) = commands_of("imagenet_lincls.sh", tmp_path, "FILE", "DIR")
    args = parsed(shlex.split(command)[1:], LinclsConfig)
    assert (args.lr, args.batch_size, args.epochs, args.weight_decay) == ([30.0], 256, 100, [0.0])
    assert (args.schedule, args.schedule_factor) == ([60, 80], 0.1)
    assert (args.pretrained, args.data) == ("FILE", "DIR")


@pytest.mark.parametrize("objective", ["align_uniform", "infonce", "random"])
def test_cifar10_script_runs_the_demo_recipe(objective: str, tmp_path: Path) -> None:
    pretrain, probe, measure = commands_of(
        "cifar10.sh", tmp_path, str(tmp_path), OBJECTIVE=objective, EPOCHS="7", PROBE_EPOCHS="10",
        IMAGES="50",
    )  # fmt: skip
    args = parsed(shlex.split(pretrain)[1:])
    assert (args.arch, args.small_stem, args.image_size) == ("resnet18", True, 32)
    assert (args.batch_size, args.lr, args.weight_decay, args.cos) == (512, 0.06, 5e-4, True)
    assert (args.moco_k, args.moco_m, args.moco_dim, args.mlp) == (4096, 0.99, 128, False)
    assert (args.bn_splits, args.aug_plus, args.blur) == ("8", True, False)
    assert args.crop_scale == [0.08, 1.0]
    assert args.mean == [0.4914, 0.4822, 0.4465] and args.std == [0.2023, 0.1994, 0.2010]
    assert (args.epochs, args.images_per_class) == (7, 50)
    assert args.max_steps == (0 if objective == "random" else None)
    if objective == "infonce":
        assert args.objective == "1 * InfoNCE(tau=0.1)"
    args = parsed(shlex.split(probe)[1:], LinclsConfig)
    assert (args.knn, args.knn_k, args.knn_t, args.knn_layer) == (True, 200, 0.1, "projection")
    assert (args.schedule, args.images_per_class) == ([6, 8], 50)
    assert "--images-per-class 50" in measure


def imagenet_like(root: Path, classes: list[str]) -> Path:
    for split in ("train", "val"):
        for name in classes:
            (root / split / name).mkdir(parents=True)
            (root / split / name / "a.JPEG").write_bytes(b"")
    return root


def test_create_imagenet_subset(tmp_path: Path) -> None:
    full = imagenet_like(tmp_path / "full", ["n1", "n2", "n3"])
    wanted = tmp_path / "classes.txt"
    wanted.write_text("n3\nn1\n", encoding="utf-8")
    out = tmp_path / "subset"
    for _ in range(2):  # the second time it finds everything done
        made = run_script("create_imagenet_subset.py", full, out, "--subset", wanted)
        assert made.returncode == 0, made.stderr
    for split in ("train", "val"):
        assert sorted(path.name for path in (out / split).iterdir()) == ["n1", "n3"]
        assert (out / split / "n3" / "a.JPEG").is_file()

    wanted.write_text("n3\nn9\n", encoding="utf-8")
    refused = run_script("create_imagenet_subset.py", full, tmp_path / "other", "--subset", wanted)
    assert refused.returncode == 2 and "n9" in refused.stderr
    assert not (tmp_path / "other").exists(), "nothing is written when a class is missing"
    wanted.write_text("n3\n", encoding="utf-8")
    refused = run_script("create_imagenet_subset.py", full, out, "--subset", wanted)
    assert refused.returncode == 2 and "n1" in refused.stderr, "a folder of another list"

    (tmp_path / "other" / "val" / "n3").mkdir(parents=True)
    refused = run_script("create_imagenet_subset.py", full, tmp_path / "other", "--subset", wanted)
    assert refused.returncode == 2 and "in the way of a link" in refused.stderr
    assert not (tmp_path / "other" / "train").exists()


def test_default_subset_is_the_papers_100_classes() -> None:
    classes = (ROOT / "scripts" / "imagenet100_classes.txt").read_text(encoding="utf-8").split()
    assert len(classes) == len(set(classes)) == 100
    assert all(re.fullmatch(r"n\d{8}", name) for name in classes)
    assert classes[:2] == ["n02869837", "n01749939"]


def test_quickstart_runs_to_its_table_and_reuses_what_is_there(
    tmp_path: Path, monkeypatch, capsys
) -> None:
    """Its nine commands, all in this process, with a narrower encoder and no loader processes."""
    quickstart, out = load_script("quickstart"), tmp_path / "out"
    shared = quickstart.SHARED.replace("-a resnet8x2s2 ", "-a resnet8 ")
    monkeypatch.setattr(quickstart, "SHARED", f"{shared} -j 0")
    monkeypatch.setattr(quickstart, "PROBE", f"{quickstart.PROBE} -j 0")

    def run(program: Path, *words: str) -> None:
        command = [str(program), *words]
        print("$ python", *command)
        with monkeypatch.context() as context:
            context.setattr(sys, "argv", command)
            context.setattr(sys, "path", sys.path[:])
            runpy.run_path(command[0], run_name="__main__")

    def said(*words: object) -> str:
        capsys.readouterr()
        words = ["--data", tmp_path / "toy", "--out", out, *words]
        monkeypatch.setattr(sys, "argv", ["quickstart.py", *map(str, words)])
        quickstart.main()
        return capsys.readouterr().out

    monkeypatch.setattr(quickstart.command, "run_shown", run)
    make_dataset(tmp_path / "toy", train_per_class=8, val_per_class=3, size=32)
    first = said("--epochs", 1, "--probe-epochs", 1)
    table = first[first.index("encoder  ") :]
    for name in ("align + uniform", "InfoNCE (MoCo v2)", "untrained"):
        assert re.search(re.escape(name) + r" +\d+\.\d % +\d+\.\d % +\d\.\d{3} +-\d\.\d{3}", table)
    measured = json.loads((out / "align-align-uniform.json").read_text(encoding="utf-8"))
    assert measured["images"] == 36

    again = said("--epochs", 1, "--probe-epochs", 1)
    assert "main_" not in again, "nothing is run a second time"
    same = again[again.index("encoder  ") :]
    assert same.splitlines()[:4] == table.splitlines()[:4]
    with pytest.raises(SystemExit) as stop:
        said("--epochs", 2)
    said = "holds results of other settings (its pretrain, probe differ); choose another --out"
    assert stop.value.code == 2 and said in capsys.readouterr().err
