"""Images that cannot be read, and images that are read in a way one should know of: what
`load_rgb` makes of each kind of file, and what a training run does about those it refuses."""

from __future__ import annotations

import io
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from data_helpers import bad_files, png, rotated, saved, train
from harness import Processes
from helpers import noise_image
from PIL import Image, ImageFile

from moco.data import loader, rgb, samples
from moco.data.images import load_rgb, open_images
from moco.data.views import pretrain_recipe
from moco.errors import DataError

# ---- load_rgb ------------------------------------------------------------------------------------


def pictures() -> Iterator[tuple[str, bytes, object]]:
    """Name and content of a file, and the RGB pixels to be seen in it."""
    noise, grey = noise_image(), noise_image().convert("L")
    # 8-bit modes as Pillow converts them, without EXIF's rotation, whatever the name says.
    for mode in ("1", "L", "P", "RGB", "CMYK"):
        image = noise.convert(mode)
        yield f"{mode}.tif", saved(image, "TIFF"), image.convert("RGB")
    for mode in ("L", "RGB", "CMYK", "YCbCr"):
        data = saved(noise.convert(mode), "JPEG", exif=rotated(6))
        yield f"{mode}.jpg", data, Image.open(io.BytesIO(data)).convert("RGB")
    yield "png.jpg", saved(noise, "PNG"), noise
    # Transparency is dropped, not laid over a background.
    for image in (noise, grey):
        clear = image.copy()
        clear.putalpha(0)
        yield f"{clear.mode}.png", saved(clear, "PNG"), image.convert("RGB")
    palette = noise.quantize(100)
    for name, transparency in (("index.png", 3), ("table.png", bytes(range(255, 155, -1)))):
        yield name, saved(palette, "PNG", transparency=transparency), palette.convert("RGB")
    # 16-bit grey is scaled like 16-bit colour.
    values = np.linspace(0, 65535, 64).astype(">u2")
    high_bytes = np.repeat((values >> 8).astype(np.uint8)[None, :, None], 3, axis=2)
    for colour, count in ((0, 1), (2, 3), (6, 4)):
        row = b"\0" + np.repeat(values, count).tobytes()
        yield f"16-bit-{colour}.png", png(64, 1, 16, colour, row), high_bytes
    yield "16-bit.pgm", b"P5\n64 1\n65535\n" + values.tobytes(), high_bytes
    grey_16 = Image.fromarray(values.astype(np.uint16)[None])
    yield "16-bit.tif", saved(grey_16, "TIFF"), high_bytes
    # Of an animation the first frame.
    first, second = (noise_image(seed=seed).quantize(32).convert("RGB") for seed in (0, 1))
    for kind in ("GIF", "PNG", "WEBP", "TIFF"):
        options = {"lossless": True} if kind == "WEBP" else {}
        data = saved(first, kind, save_all=True, append_images=[second], **options)
        assert Image.open(io.BytesIO(data)).n_frames == 2
        yield f"animated.{kind.lower()}", data, first


def test_what_is_seen_in_each_kind_of_file(tmp_path: Path) -> None:
    """Quietly; also by a path in bytes, and of a file's content."""
    for name, data, wanted in pictures():
        (path := tmp_path / name).write_bytes(data)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            images = load_rgb(path), load_rgb(os.fsencode(path)), rgb.rgb_of(memoryview(data), name)
        for image in images:
            assert image.mode == "RGB" and np.array_equal(image, wanted), name


def test_large_and_truncated_files_stay_errors_whatever_pillow_was_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    data, *_ = bad_files()["truncated.jpg"]
    (path := tmp_path / "a.jpg").write_bytes(data)
    with Image.open(path) as image:
        image.load()  # half grey, without a word
    with pytest.raises(DataError, match="truncated"):
        load_rgb(path)
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True, "what the user set is left as it was"
    noise_image((100, 100)).save(path := tmp_path / "b.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    monkeypatch.setattr(rgb, "MAX_PIXELS", 9_999)
    with pytest.raises(DataError, match="100 x 100 pixels, the most is 9999"):
        load_rgb(path)


def test_large_images_are_read_without_a_warning(tmp_path: Path) -> None:
    """In a process of its own: pytest resets filters of warnings."""
    for name in ("a.png", "b.png"):
        noise_image().save(tmp_path / name)
    code = (
        "import sys; from PIL import Image; from moco.data.images import load_rgb; "
        "Image.MAX_IMAGE_PIXELS = 1000; [load_rgb(path) for path in sys.argv[1:]]"
    )
    done = Processes(tmp_path / "out", tmp_path / "a.png", tmp_path / "b.png", code=code)
    assert done.wait() == [0] and not done.output(), done.output()


# ---- AugmentedViews ------------------------------------------------------------------------------

IMAGES = 24
BAD = (5, 6, 17, 23)  # two in a row, one alone, and the last, which the first one replaces


def dataset(folder: Path, bad: tuple[int, ...] = ()) -> Path:
    for index in range(IMAGES):
        path = folder / "train" / f"class{index // 12}" / f"{index:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise_image((24, 16), index).save(path)
        if index in bad:
            path.write_bytes(path.read_bytes()[:60])
    return folder


def views(folder: Path, **options) -> loader.AugmentedViews:
    images = open_images("folder", folder, "pretrain")
    return loader.AugmentedViews(images, pretrain_recipe(16), seed=3, num_views=2, **options)


def test_a_bad_image_is_replaced_by_the_next_good_one(tmp_path: Path) -> None:
    whole = views(dataset(tmp_path / "whole"))
    holed = views(dataset(tmp_path / "holed", BAD), skip_bad=True)
    holed_crops = views(tmp_path / "holed", skip_bad=True, augment_on_device=True)
    for index, used, lost in ((4, 4, ()), (5, 7, (5, 6)), (6, 7, (6,)), (17, 18, (17,)),
                              (23, 0, (23,))):  # fmt: skip
        view_1, view_2, target, replaced = holed[0, index]
        assert target == used // 12
        assert [line.split(": ")[0][-6:] for line in replaced.splitlines()] == [
            f"{i:02d}.png" for i in lost
        ]
        crop_1, _, crop_target, crop_replaced, _ = holed_crops[0, index]
        assert (crop_target, crop_replaced) == (target, replaced) and crop_1.shape == view_1.shape
        if used == index:
            assert torch.equal(view_1, whole[0, index][0])
        else:  # the image of `used`, augmented as sample `index`
            shutil.copy(whole.images.paths[used], whole.images.paths[index])
            assert torch.equal(view_1, whole[0, index][0])
            assert torch.equal(view_2, whole[0, index][1])


def test_all_bad_is_a_clear_error_that_does_not_read_everything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = views(dataset(tmp_path, tuple(range(IMAGES))), skip_bad=True)
    with pytest.raises(DataError, match="24 images in a row, of 24, are unreadable.*05.png"):
        data[0, 5]
    monkeypatch.setattr(samples, "MOST_BAD_IN_A_ROW", 7)
    with pytest.raises(DataError, match="7 images in a row, of 24"):
        data[0, 5]


# ---- Real runs -----------------------------------------------------------------------------------


SKIP = ("--skip-bad-images", "--max-bad-share", "0.2")


@pytest.mark.long
def test_run_that_skips_is_the_run_with_the_next_images_in_their_place(tmp_path: Path) -> None:
    holed = dataset(tmp_path / "holed", BAD)
    filled = dataset(tmp_path / "filled")
    paths = open_images("folder", filled, "pretrain").paths
    where = "device"
    for index, used in ((5, 7), (6, 7), (17, 18), (23, 0)):
        Path(paths[index]).write_bytes(Path(paths[used]).read_bytes())
    expected = train(filled, tmp_path / "run", "-j", "0", "--views", where)
    for workers in ("0", "2"):
        run = tmp_path / f"run{workers}"
        weights = train(holed, run, "-j", workers, "--views", where, *SKIP)
        assert weights.keys() == expected.keys()
        assert all(torch.equal(weights[name], expected[name]) for name in expected), workers
        lines = (run / "bad_images.txt").read_text(encoding="utf-8").splitlines()
        listed = sorted(line.split(": ")[0][-6:] for line in lines)
        assert listed == [f"{index:02d}.png" for index in BAD], "each once, over two epochs"
        assert all("cannot read image" in line and "truncated" in line for line in lines)
    assert not (tmp_path / "run" / "bad_images.txt").exists()


@pytest.mark.parametrize("workers", ["0", "2"])
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "class./...png: .*truncated.*; replace or remove it, or give --skip-bad-images$"),
        (["--skip-bad-images"], "of 24 .* more than --max-bad-share 0.01 lets --skip-bad-images "),
    ],
)
def test_run_stops_at_bad_images_and_names_the_flag(
    flags: list[str], message: str, workers: str, tmp_path: Path, capsys
) -> None:
    """The first one by default; with the flag 1 % of 24, which is none."""
    data = dataset(tmp_path / "data", BAD)
    with pytest.raises(SystemExit) as caught:
        train(data, tmp_path / "run", "-j", workers, *flags)
    assert caught.value.code == 1
    assert re.search(message, capsys.readouterr().err.strip().splitlines()[-1])
    assert (tmp_path / "run" / "bad_images.txt").is_file() == bool(flags)
