"""The encoders in docs/models: whole, small, as their cards say, and loaded by torch.hub."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from helpers import ROOT
from PIL import Image

from moco.checkpoint import load_encoder
from moco.publish.verify import verify_release

MODELS = sorted(path for path in (ROOT / "docs" / "models").iterdir() if path.is_dir())


def test_there_is_one_of_each_objective() -> None:
    assert [path.name for path in MODELS] == ["cifar10_align_uniform", "cifar10_infonce"]


@pytest.mark.parametrize("folder", MODELS, ids=lambda folder: folder.name)
def test_a_released_encoder(folder: Path) -> None:
    assert verify_release(folder) == []
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) <= 2 * 2**20
    encoder, info = load_encoder(folder)
    hub = torch.hub.load(str(ROOT), folder.name, source="local")
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(hub(images), encoder(images))
        assert hub(images).shape == (2, info["feature_dim"])
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "license: mit" in card and "k-NN" in card and "Held-out L_align" in card


def test_the_readme_classifies_an_image_by_its_neighbours(tmp_path, monkeypatch, capsys) -> None:
    """Its lines, run with images of two colours."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (code,) = (b for b in re.findall(r"^```python\n(.*?)^```", text, re.S | re.M) if "knn_" in b)
    for name, colour in (("blue", (0, 0, 255)), ("red", (255, 0, 0))):
        (tmp_path / "DIR" / "train" / name).mkdir(parents=True)
        for i in range(3):
            image = Image.new("RGB", (40, 32), tuple(max(0, c - 20 * i) for c in colour))
            image.save(tmp_path / "DIR" / "train" / name / f"{i}.png")
    Image.new("RGB", (50, 60), (230, 10, 10)).save(tmp_path / "IMAGE", "PNG")
    monkeypatch.chdir(tmp_path)
    exec(code.replace('"docs/models', f'"{ROOT}/docs/models'), {})
    assert capsys.readouterr().out.strip() == "red"
