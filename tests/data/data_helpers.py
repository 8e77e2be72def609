"""What the tests of this folder share: image files of every kind, CIFAR's files, short runs."""

import hashlib
import io
import pickle
import struct
import zlib
from pathlib import Path

import numpy as np
from helpers import noise_image
from PIL import Image

import main_moco
from moco import checkpoint

# ---- Image files: name: (bytes, kinds of moco.data.audit) ------------------------------------


def saved(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png(width: int, height: int, depth: int, colour: int, rows: bytes) -> bytes:
    """A PNG of any depth; Pillow writes few."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        crc = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc)

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def rotated(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def image_files() -> dict[str, tuple[bytes, set[str]]]:
    """Files that training reads."""
    rng = np.random.default_rng(0)
    rgb = noise_image((64, 48))
    grey16 = Image.fromarray(rng.integers(0, 65536, (8, 8), dtype=np.uint16))
    with_alpha = rgb.copy()
    with_alpha.putalpha(100)
    lab = Image.new("HSV", (8, 8)).convert("RGB").convert("YCbCr")
    moving = {"save_all": True, "append_images": [rgb.rotate(180)]}
    return {
        "good.jpg": (saved(rgb, "JPEG"), set()),
        "good.JPEG": (saved(rgb, "JPEG", exif=rotated(1)), set()),
        "good.png": (saved(rgb, "PNG"), set()),
        "cmyk.jpg": (saved(rgb.convert("CMYK"), "JPEG"), {"CMYK"}),
        "grey.jpg": (saved(rgb.convert("L"), "JPEG"), {"greyscale"}),
        "bits.png": (saved(rgb.convert("1"), "PNG"), {"black and white"}),
        "grey16.png": (saved(grey16, "PNG"), {"greyscale", "16-bit"}),
        "deep.pgm": (b"P5\n4 1\n65535\n" + bytes(8), {"greyscale", "16-bit"}),
        "palette.png": (saved(rgb.quantize(20), "PNG"), {"palette"}),
        "holes.png": (saved(rgb.quantize(20), "PNG", transparency=3), {"palette", "transparency"}),
        "alpha.png": (saved(with_alpha, "PNG"), {"transparency"}),
        "lab.tif": (saved(lab, "TIFF"), {"other colours"}),
        "moves.webp": (saved(rgb, "WEBP", **moving), {"animated"}),
        "turned.jpg": (saved(rgb, "JPEG", exif=rotated(3)), {"EXIF-rotated"}),
        "turned.png": (saved(rgb, "PNG", exif=rotated(3)), {"EXIF-rotated"}),
        "really_png.jpg": (saved(rgb, "PNG"), {"wrong extension"}),
        "many.jpg": (
            saved(rgb.convert("L"), "PNG", exif=rotated(3)),
            {"greyscale", "EXIF-rotated", "wrong extension"},
        ),
    }


def bad_files() -> dict[str, tuple[bytes, set[str], str]]:
    """Files that training refuses, and what the error says."""
    jpeg, good_png = (
        saved(noise_image((160, 160)), kind, **options)
        for kind, options in (("JPEG", {"quality": 95}), ("PNG", {}))
    )
    floats = saved(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF")
    integers = saved(Image.fromarray(np.ones((4, 4), np.int32)), "TIFF")
    bomb = png(50_000, 50_000, 1, 0, zlib.compress(b"\0"))
    drawing = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n"
    return {
        "empty.jpg": (b"", {"empty"}, "not that of any image"),
        "text.jpg": (b"<html>404</html>", {"unreadable"}, "not that of any image"),
        "truncated.jpg": (jpeg[: len(jpeg) // 2], {"truncated"}, "truncated"),
        "rubbish.jpg": (b"\xff\xd8\xff\xe0 rubbish", {"truncated"}, "Truncated"),
        "truncated.png": (good_png[: len(good_png) // 2], {"truncated"}, "truncated"),
        "header.jpg": (jpeg[:20], {"unreadable"}, "not that of any image"),
        "header.png": (png(8, 8, 8, 2, b"")[:30], {"unreadable"}, ""),
        "corrupt.png": (good_png[:60] + bytes(40) + good_png[100:], {"unreadable"}, ""),
        "bomb.png": (bomb, {"too large"}, "decompression bomb"),
        "drawing.png": (drawing, {"unreadable"}, "a drawing"),
        "float.tif": (floats, {"32-bit"}, "32-bit"),
        "integer.tif": (integers, {"32-bit"}, "32-bit"),
    }


# ---- CIFAR -----------------------------------------------------------------------------------


def sums(folder: Path, names: list[str]) -> list[list[str]]:
    return [[name, hashlib.md5((folder / name).read_bytes()).hexdigest()] for name in names]


def write_cifar(root: Path, monkeypatch, kind, train: list[str], test: list[str], key: str) -> None:
    """A few images in the real files' layout, with their checksums where torchvision has them."""
    folder = root / kind.base_folder
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i, name in enumerate([*train, *test]):
        data = rng.integers(0, 256, (4, 3072), dtype=np.uint8)
        labels = [(i + j) % 10 for j in range(4)]
        (folder / name).write_bytes(pickle.dumps({"data": data, key: labels}))
    meta = {kind.meta["key"]: [f"class {i}" for i in range(10)]}
    (folder / kind.meta["filename"]).write_bytes(pickle.dumps(meta))
    monkeypatch.setattr(kind, "train_list", sums(folder, train))
    monkeypatch.setattr(kind, "test_list", sums(folder, test))
    [[_, md5]] = sums(folder, [kind.meta["filename"]])
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": md5})


# ---- Runs ------------------------------------------------------------------------------------


def train(data: Path, run: Path, *flags: object) -> dict:
    """main_moco for 2 epochs in this process; the weights that it ends with."""
    main_moco.main(list(map(str, [
        "-a", "resnet8", "--image-size", "16", "--moco-dim", "8", "--moco-k", "16", "-b", "8",
        "--epochs", "2", "--seed", "1", "-p", "1", "--device", "cpu",
        "--save-dir", run, *flags, data,
    ])))  # fmt: skip
    return checkpoint.read_checkpoint(checkpoint.run_checkpoints(run)[-1])["state_dict"]
