"""What the tests of main_lincls.py's variants share: a tiny encoder in a file, and short runs."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import torch
from helpers import ROOT, differences
from torch import nn

import main_lincls
from moco.checkpoint import write_checkpoint
from moco.encoders import build_encoder, set_head

MAIN = f"import runpy; runpy.run_path({str(ROOT / 'main_lincls.py')!r}, run_name='__main__')"
LATEST, BEST = "checkpoint.pth.tar", "model_best.pth.tar"
# 30 training images in batches of 8 are three steps an epoch.
TINY = shlex.split("--batch-size 8 -j 0 --device cpu --print-freq 1 --seed 5")


def write_encoder(
    path: Path,
    *,
    arch: str = "resnet8",
    small_stem: bool = False,
    seed: int = 0,
    scale: float = 1.0,
) -> Path:
    """An encoder of images of 32 pixels with random weights and batch-norm averages that are not
    those of a new one. `scale` multiplies the features of a ResNet-8."""
    torch.manual_seed(seed)
    encoder = build_encoder(arch, 1, image_size=32, small_stem=small_stem)
    set_head(encoder, nn.Identity())
    for _ in range(3):
        encoder(torch.randn(16, 3, 32, 32))
    state = encoder.state_dict()
    if scale != 1:
        for name in ("bn2.weight", "bn2.bias"):
            state[f"layer3.0.{name}"] *= scale
    args = {"image_size": 32}
    write_checkpoint(path, {"arch": arch, "epoch": 7, "state_dict": state, "args": args})
    return path


def words(*flags: object) -> list[str]:
    return [word for flag in flags for word in shlex.split(str(flag))]


def evaluate(data: Path, *flags: object) -> None:
    main_lincls.main([*TINY, *words(*flags), str(data)])


def result(folder: Path | str) -> dict:
    return json.loads((Path(folder) / "lincls.json").read_text())


def load(path: Path | str) -> dict:
    return torch.load(path, weights_only=True)


def unequal(one: Path | str, other: Path | str) -> list[str]:
    """What differs between the checkpoints of two evaluations, their arguments aside."""
    return [
        difference
        for name in (LATEST, BEST)
        for difference in differences(
            *({**load(Path(run) / name), "args": None} for run in (one, other))
        )
    ]


def unequal_states(one: Path | str, other: Path | str) -> list[str]:
    """Of two files, the names of tensors that are not bit for bit the same."""
    return differences(*(dict(load(path)["state_dict"]) for path in (one, other)))


def classifier(path: Path | str) -> torch.Tensor:
    state = load(path)["state_dict"]
    return torch.cat([state["module.fc.weight"], state["module.fc.bias"].unsqueeze(1)], dim=1)
