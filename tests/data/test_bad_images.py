"""Images that cannot be read, and images that are read in a way one should know of: what
`load_rgb` makes of each kind of file, and what a training run does about those it refuses."""

from __future__ import annotations

import os
import re
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from data_helpers import bad_files, png, rotated, saved, train
from harness import Processes
from helpers import noise_image
from PIL import Image, ImageFile
from torch.utils.data import DataLoader

from moco.data import loader, rgb, samples
from moco.data.images import load_rgb, open_images
from moco.data.views import pretrain_recipe
from moco.errors import DataError


def pixels(path: Path) -> np.ndarray:
    image = load_rgb(path)
    assert image.mode == "RGB"
    return np.asarray(image)


# ---- load_rgb ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [(mode, "tif") for mode in ("1", "L", "P", "RGB", "CMYK")]
    + [(mode, "jpg") for mode in ("L", "RGB", "CMYK", "YCbCr")],
)
def test_8_bit_modes_are_converted_as_pillow_does(mode: str, suffix: str, tmp_path: Path) -> None:
    noise_image().convert(mode).save(path := tmp_path / f"a.{suffix}")
    with Image.open(path) as stored:
        expected = np.asarray(stored.convert("RGB"))
    assert np.array_equal(pixels(path), expected)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_dropped_not_laid_over_a_background(mode: str, tmp_path: Path) -> None:
    image = noise_image().convert(mode)
    image.putalpha(0)
    image.save(path := tmp_path / "a.png")
    colours = noise_image().convert("L").convert("RGB") if mode == "LA" else noise_image()
    assert np.array_equal(pixels(path), np.asarray(colours))


@pytest.mark.parametrize("transparency", [3, bytes(range(255, 155, -1))])
def test_palette_with_transparency_gives_the_palettes_colours_quietly(
    transparency: int | bytes, tmp_path: Path
) -> None:
    image = noise_image().quantize(100)
    image.save(path := tmp_path / "a.png", transparency=transparency)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(pixels(path), np.asarray(image.convert("RGB")))


def test_16_bit_grey_is_scaled_like_16_bit_colour(tmp_path: Path) -> None:
    values = np.linspace(0, 65535, 64).astype(">u2")
    files = {
        "grey.png": png(64, 1, 16, 0, b"\0" + values.tobytes()),
        "colour.png": png(64, 1, 16, 2, b"\0" + np.repeat(values, 3).tobytes()),
        "alpha.png": png(64, 1, 16, 6, b"\0" + np.repeat(values, 4).tobytes()),
        "grey.pgm": b"P5\n64 1\n65535\n" + values.tobytes(),
    }
    files["grey.tif"] = saved(Image.fromarray(values.astype(np.uint16)[None]), "TIFF")
    expected = np.repeat((values >> 8).astype(np.uint8)[None, :, None], 3, axis=2)
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        assert np.array_equal(pixels(tmp_path / name), expected), name


@pytest.mark.parametrize("suffix", ["gif", "png", "webp", "tif"])
def test_first_frame_of_an_animation(suffix: str, tmp_path: Path) -> None:
    options = {"lossless": True} if suffix == "webp" else {}
    first, second = (noise_image(seed=seed).quantize(32).convert("RGB") for seed in (0, 1))
    path = tmp_path / f"a.{suffix}"
    first.save(path, save_all=True, append_images=[second], **options)
    with Image.open(path) as image:
        assert image.n_frames == 2
    assert np.array_equal(pixels(path), np.asarray(first))


def test_exif_rotation_is_not_applied(tmp_path: Path) -> None:
    noise_image().save(plain := tmp_path / "plain.jpg")
    noise_image().save(turned := tmp_path / "turned.jpg", exif=rotated(6))
    assert np.array_equal(pixels(turned), pixels(plain))


def test_a_wrong_extension_does_not_matter(tmp_path: Path) -> None:
    noise_image().save(tmp_path / "a.png")
    path = (tmp_path / "a.png").rename(tmp_path / "a.jpg")
    assert np.array_equal(pixels(path), np.asarray(noise_image()))


@pytest.mark.parametrize("name", bad_files())
def test_bad_files_are_errors_that_name_the_file(name: str, tmp_path: Path) -> None:
    data, _, reason = bad_files()[name]
    (path := tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=f"cannot read image {path}: .*{reason}.*; replace or rem"):
        load_rgb(path)


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_file_is_named_through_a_loader_process_too(
    workers: int, on_device: bool, tmp_path: Path
) -> None:
    (path := tmp_path / "a.jpg").write_bytes(bad_files()["truncated.jpg"][0])
    data = loader.AugmentedViews(
        open_images("folder", tmp_path, "pretrain"), pretrain_recipe(16),
        seed=0, num_views=2, augment_on_device=on_device,
    )  # fmt: skip
    with pytest.raises(DataError, match=f"cannot read image {path}"):
        list(DataLoader(data, batch_sampler=[[(0, 0)]], num_workers=workers))


def test_missing_files_and_pipes_are_errors(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "link.jpg").symlink_to(tmp_path / "nowhere.jpg")
    for name in ("missing.jpg", "pipe.jpg", "link.jpg"):
        with pytest.raises(DataError, match=f"{name}: there is no such file"):
            load_rgb(tmp_path / name)


def test_truncated_files_stay_errors_whatever_pillow_was_told(
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


def test_too_many_pixels_are_refused_whatever_pillow_was_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise_image((100, 100)).save(path := tmp_path / "a.png")
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


def test_default_is_to_stop_with_path_and_reason(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="class0/05.png: .*truncated"):
        views(dataset(tmp_path, BAD))[0, 5]


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
