"""JPEGs that torchvision decodes for --views device: Pillow's pixels, or left to Pillow."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from data_helpers import rotated, saved
from helpers import noise_image, write_images

from moco.data import jpeg
from moco.data.images import ArrayImages, FolderImages, Subset
from moco.data.rgb import rgb_of
from moco.data.samples import AugmentedViews
from moco.data.views import pretrain_recipe
from moco.errors import DataError

pytestmark = pytest.mark.skipif(not jpeg.equals_pillow(), reason="Pillow decodes all images")


def by_pillow(data: bytes) -> torch.Tensor | None:
    try:
        return torch.from_numpy(np.array(rgb_of(data, "it"))).permute(2, 0, 1)
    except DataError:
        return None


@pytest.mark.parametrize(
    "options",
    [{}, {"subsampling": "4:4:4"}, {"progressive": True}, {"exif": rotated(6)},
     {"comment": b"\xff\xd9"}, {"restart_marker_blocks": 2}, {"keep_rgb": True}],
)  # fmt: skip
def test_ordinary_images_have_pillows_pixels(options) -> None:
    assert jpeg.equals_pillow()
    data = saved(noise_image((61, 47)), "JPEG", **options)
    assert torch.equal(jpeg.decode_plain(data), by_pillow(data))


def test_odd_files_are_left_to_pillow() -> None:
    image = noise_image((61, 47))
    data = saved(image, "JPEG")
    twelve_bits = data.replace(b"\xff\xc0\x00\x11\x08", b"\xff\xc0\x00\x11\x0c")
    odd = {
        "cut": data[:-300], "cut in its header": data[:300], "followed by something": data + b"\0",
        "empty": b"", "start alone": data[:2] + data[-2:], "12 bits": twelve_bits,
        "grey": saved(image.convert("L"), "JPEG"), "CMYK": saved(image.convert("CMYK"), "JPEG"),
        "PNG": saved(image, "PNG"),
    }  # fmt: skip
    assert twelve_bits != data and jpeg.decode_plain(data) is not None
    assert [name for name, content in odd.items() if jpeg.decode_plain(content) is not None] == []


def test_damaged_files_are_decoded_as_pillow_does_or_left_to_it() -> None:
    draw, decoded = random.Random(0), 0
    for i in range(300):
        data = bytearray(saved(noise_image((61, 47)), "JPEG", progressive=i % 2 == 0))
        for _ in range(1 + i % 3):
            data[draw.randrange(2, len(data) - 2)] = draw.randrange(256)
        pixels = jpeg.decode_plain(bytes(data))
        if pixels is not None:
            assert torch.equal(pixels, by_pillow(bytes(data)))
            decoded += 1
    assert decoded > 100


def views(images, **more: object) -> AugmentedViews:
    recipe = pretrain_recipe(16, aug_plus=True)
    return AugmentedViews(images, recipe, seed=0, num_views=2, **more)


def test_samples_are_the_same_with_either_decoder(tmp_path: Path) -> None:
    write_images(tmp_path, {"a": 3}, suffix=".jpg")
    write_images(tmp_path, {"b": 2})
    (tmp_path / "b" / "bad.jpg").write_bytes(saved(noise_image(), "JPEG")[:-200])
    images = Subset(FolderImages(tmp_path), [4, 1, 5, 0])
    fast, slow = (views(images, augment_on_device=True, skip_bad=True) for _ in range(2))
    assert fast.decode_fast
    slow.decode_fast = False
    keys = [(0, i) for i in range(4)]
    for one, two in zip(fast.__getitems__(keys), slow.__getitems__(keys), strict=True):
        assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])
        assert one[2:4] == two[2:4] and torch.equal(one[4], two[4])
    assert "bad.jpg: image file is truncated" in fast[0, 2][3]
    assert not views(images).decode_fast
    in_memory = ArrayImages(np.zeros((4, 8, 8, 3), np.uint8), [0] * 4, ["a"])
    for kept in (in_memory, Subset(in_memory, [1, 0])):
        assert not views(kept, augment_on_device=True).decode_fast


@pytest.mark.parametrize("instead", [None, "one off", "none"])
def test_without_pillows_pixels_pillow_decodes(instead, monkeypatch) -> None:
    """Torchvision without the decoder, with another one, with one that is gone."""
    real = jpeg.decode_jpeg

    def gone(data: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("built without libjpeg")

    others = {None: None, "one off": lambda data: real(data) ^ 1, "none": gone}
    monkeypatch.setattr(jpeg, "decode_jpeg", others[instead])
    assert not jpeg.equals_pillow.__wrapped__()
