"""scripts/check_dataset.py: one file of each kind is found and judged as training judges it."""

from __future__ import annotations

import importlib.util
import io
import json
import multiprocessing
import os
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from moco.data.images import load_rgb
from moco.errors import DataError

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "check_dataset.py"
_spec = importlib.util.spec_from_file_location("check_dataset", SCRIPT)
check_dataset = sys.modules["check_dataset"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(check_dataset)


def saved(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def bomb() -> bytes:
    """A PNG of a few bytes that says it has 2.5 billion pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        crc = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc)

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 50_000, 50_000, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0"))


def files() -> dict[str, tuple[bytes, set[str]]]:
    """name: (bytes, kinds that it must be found under)"""
    rng = np.random.default_rng(0)
    rgb = Image.fromarray(rng.integers(0, 256, (48, 64, 3), dtype=np.uint8))
    grey16 = Image.fromarray(rng.integers(0, 65536, (8, 8), dtype=np.uint16))
    exif = Image.Exif()
    exif[0x0112] = 3
    upright = Image.Exif()
    upright[0x0112] = 1
    jpeg = saved(rgb, "JPEG")
    with_alpha = rgb.copy()
    with_alpha.putalpha(100)
    return {
        "good.jpg": (jpeg, set()),
        "good.JPEG": (saved(rgb, "JPEG", exif=upright), set()),
        "good.png": (saved(rgb, "PNG"), set()),
        "empty.jpg": (b"", {"empty"}),
        "short.jpg": (jpeg[: len(jpeg) // 2], {"truncated"}),
        "text.png": (b"no image at all", {"unreadable"}),
        "bomb.png": (bomb(), {"too large"}),
        "float.tif": (saved(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"), {"32-bit"}),
        "cmyk.jpg": (saved(rgb.convert("CMYK"), "JPEG"), {"CMYK"}),
        "grey.jpg": (saved(rgb.convert("L"), "JPEG"), {"greyscale"}),
        "bits.png": (saved(rgb.convert("1"), "PNG"), {"black and white"}),
        "grey16.png": (saved(grey16, "PNG"), {"greyscale", "16-bit"}),
        "deep.pgm": (b"P5\n4 1\n65535\n" + bytes(8), {"greyscale", "16-bit"}),
        "palette.png": (saved(rgb.quantize(20), "PNG"), {"palette"}),
        "holes.png": (
            saved(rgb.quantize(20), "PNG", transparency=3), {"palette", "transparency"}
        ),
        "alpha.png": (saved(with_alpha, "PNG"), {"transparency"}),
        "lab.tif": (saved(Image.new("HSV", (8, 8)).convert("RGB").convert("YCbCr"), "TIFF"),
                    {"other colours"}),
        "moves.webp": (
            saved(rgb, "WEBP", save_all=True, append_images=[rgb.rotate(180)]), {"animated"}
        ),
        "turned.jpg": (saved(rgb, "JPEG", exif=exif), {"EXIF-rotated"}),
        "turned.png": (saved(rgb, "PNG", exif=exif), {"EXIF-rotated"}),
        "really_png.jpg": (saved(rgb, "PNG"), {"wrong extension"}),
        "many.jpg": (
            saved(rgb.convert("L"), "PNG", exif=exif),
            {"greyscale", "EXIF-rotated", "wrong extension"},
        ),
    }  # fmt: skip


@pytest.mark.parametrize("name", files())
def test_each_kind_of_file(name: str, tmp_path: Path) -> None:
    data, expected = files()[name]
    (path := tmp_path / name).write_bytes(data)
    found = {kind for kind, _ in check_dataset.check_file(str(path))}
    assert found == expected
    try:
        load_rgb(path)
        refused = False
    except DataError:
        refused = True
    assert refused == bool(found & set(check_dataset.REFUSED)), "as training judges"


def test_links_to_nowhere_and_pipes(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "link.jpg").symlink_to("nowhere")
    for name in ("pipe.jpg", "link.jpg"):
        assert check_dataset.check_file(str(tmp_path / name)) == [("missing", "")]


def test_large_images_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (path := tmp_path / "a.png").write_bytes(files()["good.png"][0])  # 64 x 48
    monkeypatch.setattr(check_dataset, "MAX_PIXELS", 5000)
    assert check_dataset.check_file(str(path)) == [("large", "64 x 48")]


def write_all(folder: Path) -> Path:
    """train/a with all files, train/b, val/b, and class folders that do not fit."""
    for name, (data, _) in files().items():
        path = folder / "train" / "a" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    good = files()["good.jpg"][0]
    for name in ("train/b/1.jpg", "val/b/1.jpg", "val/only_val/1.jpg", "train/loose.jpg"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(good)
    (folder / "train" / "nothing").mkdir()
    (folder / "train" / "a" / "notes.txt").write_text("not an image", encoding="utf-8")
    (folder / "train" / "a" / "clip.mp4").write_bytes(b"")
    (folder / "train" / "a" / ".hidden.jpg").write_bytes(b"")
    return folder


def test_whole_folder(tmp_path: Path, capsys) -> None:
    folder, out = write_all(tmp_path / "data"), tmp_path / "report.json"
    assert check_dataset.main([str(folder), "-j", "2", "--out", str(out)]) == 1
    printed = capsys.readouterr().out
    found = json.loads(out.read_text(encoding="utf-8"))
    assert found["images"] == len(files()) + 4
    assert found["ignored"] == {".txt": 1, ".mp4": 1, "hidden": 1}

    expected: dict[str, set[str]] = {}
    for name, (_, kinds) in files().items():
        for kind in kinds:
            expected.setdefault(kind, set()).add(f"train/a/{name}")
    expected |= {
        "class without images": {"train/nothing"},
        "class of val not in train": {"val/only_val"},
        "class of train not in val": {"train/a"},
        "image outside the class folders": {"train/loose.jpg"},
    }
    assert {
        kind: {os.path.relpath(file["path"], folder) for file in entry["files"]}
        for kind, entry in found["kinds"].items()
    } == expected
    refused = {kind for kind, entry in found["kinds"].items() if entry["refused"]}
    assert refused == check_dataset.STOPS & set(expected)
    for kind in expected:
        assert f"  {kind}" in printed
    assert "3 other files ignored" in printed
    assert printed.rstrip().endswith("7 would be refused")


def test_status_0_when_training_reads_everything(tmp_path: Path, capsys) -> None:
    for split in ("train", "val"):
        for name in ("good.jpg", "grey.jpg", "turned.jpg"):
            path = tmp_path / split / "a" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(files()[name][0])
    assert check_dataset.main([str(tmp_path), "-j", "1"]) == 0
    assert "nothing would be refused" in capsys.readouterr().out


def test_folder_without_train_is_taken_as_it_is(tmp_path: Path, capsys) -> None:
    (tmp_path / "a.jpg").write_bytes(files()["good.jpg"][0])
    (tmp_path / "deeper").mkdir()
    (tmp_path / "deeper" / "b.jpg").write_bytes(b"")
    assert check_dataset.main([str(tmp_path), "-j", "1"]) == 1
    assert "2 images" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["missing"], ["."], [".", "-j", "0"]])
def test_wrong_arguments(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        check_dataset.main(arguments)
    assert caught.value.code == 2


def deadly(path: str) -> list[tuple[str, str]]:
    """Stands for a decoder that crashes or is killed for its memory."""
    if "deadly" in path:
        os._exit(1)
    return []


@pytest.mark.skipif(sys.platform == "win32", reason="fork")
def test_a_file_that_kills_its_reader_does_not_stop_the_check(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(check_dataset, "check_file", deadly)
    paths = [f"{index}" for index in range(30)]
    paths[3], paths[20] = "deadly 1", "deadly 2"
    context = multiprocessing.get_context("fork")
    found = dict(check_dataset.check_files(paths, 2, context))
    assert set(found) == set(paths)
    kills = [path for path, findings in found.items() if findings]
    assert sorted(kills) == ["deadly 1", "deadly 2"]
    assert found["deadly 1"] == [("kills its reader", "")]


@pytest.mark.long
def test_spawned_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(SCRIPT.parent)  # where the child finds the module
    for name in ("good.jpg", "grey.jpg"):
        (tmp_path / name).write_bytes(files()[name][0])
    paths = [str(tmp_path / "good.jpg"), str(tmp_path / "grey.jpg")]
    found = dict(check_dataset.check_files(paths, 1, multiprocessing.get_context("spawn")))
    assert found == {paths[0]: [], paths[1]: [("greyscale", "L")]}
