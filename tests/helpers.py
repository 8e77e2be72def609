"""Small things that several test files share: a tiny encoder, images on disk, objectives."""

import importlib.util
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from harness import LIMIT, ROOT, watch
from harness import differences as differences
from harness import free_port as free_port
from PIL import Image
from torch import Tensor, nn

import main_moco
from moco import cli
from moco.config import PretrainConfig, flat_values, objective_formula

# name: (arguments of MoCo, weights of combine). A weight is 0 where the term is off.
OBJECTIVES: dict[str, tuple[dict, dict]] = {}


def _objective(name: str, contr_w: float = 0, align_w: float = 0, unif_w: float = 0, **terms):
    OBJECTIVES[name] = (terms, {"contr_w": contr_w, "align_w": align_w, "unif_w": unif_w})


_objective("Eq. 22", unif_w=1, unif_t=2.0)
_objective("Eq. 21", unif_w=1, unif_t=2.0, unif_intra_batch=False)
for _alpha in (1, 2, 3):
    _objective(f"align alpha={_alpha}", align_w=1, align_alpha=float(_alpha))
_objective("3 align + uniform t=3", align_w=3, unif_w=1, align_alpha=2.0, unif_t=3.0)
for _tau in (0.07, 0.2):
    _objective(f"InfoNCE tau={_tau}", contr_w=1, contr_tau=_tau)
_objective(
    "all terms", contr_w=0.5, align_w=2, unif_w=0.7, contr_tau=0.2, align_alpha=1.0, unif_t=2.5
)


class TinyNet(nn.Module):
    """A torchvision-like classifier of two convolutions and `fc`, for images of any size.

    `batch_norm=False` leaves the batch norm out, so that a sample's output is its own affair.
    """

    def __init__(self, num_classes: int, batch_norm: bool = True) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(6) if batch_norm else nn.Identity()
        self.conv2 = nn.Conv2d(6, 8, 3, stride=2)
        self.bn2 = nn.BatchNorm2d(8) if batch_norm else nn.Identity()
        self.fc = nn.Linear(8, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.bn1(self.conv1(x)))
        x = torch.tanh(self.bn2(self.conv2(x)))
        return self.fc(x.mean(dim=(2, 3)))


def two_views(seed: int, n: int, size: int = 8) -> tuple[Tensor, Tensor]:
    """Two different but alike (n, 3, size, size) float32 batches, a function of the arguments."""
    generator = torch.Generator().manual_seed(seed)
    shape = (n, 3, size, size)
    image = torch.randn(n, 3, 1, 1, generator=generator)
    im_q, im_k = (image + torch.randn(shape, generator=generator) for _ in range(2))
    return im_q, im_k


def write_images(
    root: Path, counts: dict[str, int], *, size: int = 32, suffix: str = ".png", seed: int = 0
) -> list[Path]:
    """Write `counts[folder]` noise images as root/folder/000.png, ... and return their paths."""
    rng = np.random.default_rng(seed)
    paths = []
    for folder, count in counts.items():
        (root / folder).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            path = root / folder / f"{i:03d}{suffix}"
            pixels = rng.integers(0, 256, (size, size, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(path)
            paths.append(path)
    return paths


def noise_image(size: tuple[int, int] = (40, 30), seed: int = 0) -> Image.Image:
    """A smooth random picture, width x height: noise of a few pixels, blown up."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    return small.resize(size, Image.Resampling.BICUBIC)


def write_labelled(root: Path, *, classes: int = 3, train: int = 10, val: int = 5) -> Path:
    """root/{train,val}/class_C/*.png, 32 pixels: coarse noise with a cast that tells the class."""
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for label in range(classes):
            folder = root / split / f"class_{label}"
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 200, (8, 8, 3), dtype=np.uint8)
                pixels[..., label % 3] += 50
                image = Image.fromarray(pixels).resize((32, 32), Image.Resampling.NEAREST)
                image.save(folder / f"{i:03d}.png")
    return root


# 30 images in batches of 8 are three steps an epoch; six images are left out of each.
TINY = shlex.split(
    "-a resnet8 --image-size 32 --batch-size 8 --moco-k 64 -j 0 --device cpu -p 1 --seed 1"
)


def pretrain(data: Path, run: Path | str, *flags: object) -> None:
    """A tiny run of main_moco.py in this process."""
    main_moco.main([*TINY, *map(str, flags), "--save-dir", str(run), str(data)])


def parsed(argv: list[str], config: type = PretrainConfig) -> SimpleNamespace:
    """The flat values that a command line gives, without a look at the files that it names."""
    parts = cli.make_parts(cli.parser_of(config).parse_args(argv), config)
    values = {name: value for part in parts.values() for name, value in flat_values(part).items()}
    return SimpleNamespace(**values, objective=objective_formula(values))


def load_script(name: str) -> ModuleType:
    """The module of scripts/NAME.py, whose `main(argv)` a test can call."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def refusal(main: Callable, argv: list, capsys: pytest.CaptureFixture) -> tuple[int, str]:
    """Exit status and last line on stderr of a `main(argv)` that must refuse.

    At parse time (status 2) argparse's usage stands before that line, later (1) nothing does.
    """
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in argv])
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 or stop.value.code == 2, lines
    return stop.value.code, lines[-1]


def read_log(folder: Path, kind: str = "train") -> list[dict]:
    """The lines of one kind in log.jsonl; NaN and Infinity, which are not JSON, raise."""

    def refuse(word: str) -> None:
        raise ValueError(f"{word} in log.jsonl")

    text = (folder / "log.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(line, parse_constant=refuse) for line in text.splitlines()]
    return [line for line in lines if line["kind"] == kind]


def start_python(
    *words: object, cwd: Path, path: Path = ROOT, **options: object
) -> subprocess.Popen:
    """A Python process as a user starts it from the CPU-only folder `cwd`, output in pipes unless
    `options`, those of Popen, say otherwise. It finds the packages in the folder `path`."""
    dropped = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    env = {name: value for name, value in os.environ.items() if name not in dropped}
    env |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(path)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    command = [sys.executable, *map(str, words)]
    return watch(
        subprocess.Popen(
            command, cwd=cwd, env=env, text=True, start_new_session=True, **{**pipes, **options}
        )
    )


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    """Exit status, stdout and stderr; a process that hangs is killed and fails the test."""
    try:
        out, err = process.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # with its children
        out, err = process.communicate()
        pytest.fail(f"still running after {LIMIT} s:\n{out}\n{err}")
    return process.returncode, out, err
