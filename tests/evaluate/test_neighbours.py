"""scripts/neighbours.py: the nearest images, on a contact sheet and on a page of its own."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import refusal, write_images
from PIL import Image

from moco.data.images import FolderImages
from moco.evaluate.neighbours import Shown, contact_sheet, nearest, page, thumbnail
from scripts import neighbours


def test_nearest_are_those_of_the_distances_without_oneself() -> None:
    x = F.normalize(torch.randn(20, 5, generator=torch.Generator().manual_seed(0)), dim=1)
    x[7] = x[3]  # a duplicate is the nearest, at distance 0
    distances, positions = nearest(x, torch.tensor([3, 11]), 4)
    for query, near, at in zip((3, 11), distances.tolist(), positions.tolist(), strict=True):
        slow = sorted(
            (math.dist(x[query].tolist(), x[j].tolist()), j) for j in range(20) if j != query
        )
        assert at == [j for _, j in slow[:4]]
        assert near == pytest.approx([d for d, _ in slow[:4]], abs=1e-3)
    assert positions[0, 0] == 7 and distances[0, 0] < 1e-3


def test_the_command_writes_a_sheet_and_a_page(data, pretrained, tmp_path, capsys) -> None:
    out = tmp_path / "look"
    words = [pretrained, data, "--out", out, "--queries", 3, "-k", 4, "-j", 0, "--device", "cpu"]
    neighbours.main(list(map(str, words)))
    printed = capsys.readouterr().out
    assert "3 queries among 15 images, " in printed and "of the neighbours have" in printed
    sheet = Image.open(tmp_path / "look.png")
    assert sheet.size == (6 + 5 * 102 + 6, 6 + 3 * 130)
    html = (tmp_path / "look.html").read_text()
    assert html.count("<figure") == 15 and html.count("data:image/png;base64,") == 15
    assert not re.search(r'(src|href)="(?!data:)|https?:|url\(|@import', html), "self-contained"
    assert html.count("<figcaption>query<br>class_") == 3
    share = float(re.search(r"([\d.]+) % of the neighbours shown", html)[1])
    assert html.count('class="other"') == round(12 * (1 - share / 100))
    assert f"{share:.1f} % of the neighbours" in printed
    first = (tmp_path / "look.png").read_bytes(), html
    neighbours.main(list(map(str, words)))
    assert first == ((tmp_path / "look.png").read_bytes(), (tmp_path / "look.html").read_text())


def test_images_without_labels_and_fewer_than_asked_for(pretrained, tmp_path, capsys) -> None:
    write_images(tmp_path / "flat", {".": 3})
    out = tmp_path / "look"
    words = [pretrained, tmp_path / "flat", "--out", out, "-j", 0, "--device", "cpu"]
    neighbours.main(list(map(str, words)))
    assert capsys.readouterr().out.startswith("3 queries among 3 images\n")
    html = (tmp_path / "look.html").read_text()
    assert html.count("<figure") == 9 and 'class="other"' not in html
    assert "have the label" not in html


def test_frames_captions_and_names_as_they_are(tmp_path) -> None:
    write_images(tmp_path, {"a": 1, "b": 1})
    images = FolderImages(tmp_path)
    rows = [[Shown(0, "a/<b>.png", None, "a" * 80, True), Shown(1, "x", 0.5, "b\n&", False)]]
    html = page(rows, images, "title")
    assert "<b>" not in html and "a/&lt;b&gt;.png" in html and "b\\n&amp;" in html
    sheet = contact_sheet(rows, images)
    orange = (np.asarray(sheet) == (0xD5, 0x5E, 0)).all(axis=2).sum()
    assert orange == 100**2 - 96**2, "the frame of the one neighbour of another label"
    wide = thumbnail(Image.new("RGB", (400, 100), "red"))
    assert wide.size == (96, 96) and wide.getpixel((48, 48)) == (255, 0, 0)
    assert wide.getpixel((48, 10)) == (255, 255, 255), "not cropped, not stretched"


def test_what_cannot_be_shown_is_refused(pretrained, tmp_path, capsys) -> None:
    (tmp_path / "one").mkdir()
    write_images(tmp_path / "one", {".": 1})
    for words, status, expected in (
        ([pretrained, tmp_path / "one"], 1, "neighbours need at least 2 images, got 1"),
        ([pretrained, tmp_path / "none"], 2, "no such data folder"),
        ([tmp_path / "none.pth", tmp_path / "one"], 1, "no such checkpoint"),
        ([pretrained, tmp_path / "one", "-k", 0], 2, "--neighbours must be at least 1"),
        ([pretrained, tmp_path / "one", "--out", "no/where"], 2, "no such folder: no"),
    ):
        got, line = refusal(neighbours.main, [*words, "-j", 0], capsys)
        assert got == status and expected in line, line
    assert not list(Path().glob("neighbours.*")), "nothing was written"
