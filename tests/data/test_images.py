"""Images: what is read from disk, in which order, with which labels, and what is refused."""

from pathlib import Path

import numpy as np
import pytest
from data_helpers import sums, write_cifar
from helpers import load_script, write_images
from torchvision import datasets

import main_lincls
from moco.data.images import (
    ArrayImages,
    FolderImages,
    Subset,
    image_names,
    in_memory,
    open_images,
)
from moco.errors import DataError

# ---- Folders of images ---------------------------------------------------------------------------


def test_class_folders_are_as_image_folder_has_them(tmp_path):
    """Paths, labels and classes equal torchvision.datasets.ImageFolder's, which sorts whole paths:
    "b-x" lies before what is in "b/c"."""
    write_images(tmp_path, {"dog": 3, "Cat": 2, "ant/small": 2, "ant/big": 1, "ant": 1, "a-x": 1})
    write_images(tmp_path, {"dog/more": 1}, suffix=".JPEG")
    write_images(tmp_path, {"a/b": 1, "a/b-x": 1, "a/b/c": 1, "a/10": 1, "a/9": 1})
    wanted = datasets.ImageFolder(tmp_path)
    images = FolderImages(tmp_path)
    assert images.paths == [path for path, _ in wanted.samples]
    assert images.targets == wanted.targets
    assert images.classes == wanted.classes == ["Cat", "a", "a-x", "ant", "dog"]
    for index in range(len(images)):
        assert np.array_equal(images.load(index), wanted[index][0])


def test_images_directly_in_the_folder_have_no_labels(tmp_path):
    write_images(tmp_path, {".": 3})
    images = open_images("folder", tmp_path, "pretrain")
    assert image_names(images) == ["000.png", "001.png", "002.png"]
    assert images.targets is None and images.classes == []
    with pytest.raises(DataError, match="because of .*000.png: pretrain images must lie"):
        open_images("folder", tmp_path, "pretrain", per_class=2)


def test_train_and_val_are_found_in_the_folder(tmp_path):
    """The classes of val are those of train, though one may be missing there; no other may be."""
    write_images(tmp_path, {"train/a": 2, "train/b": 1, "val/b": 2})
    pretrain, train = (open_images("folder", tmp_path, split) for split in ("pretrain", "train"))
    val = open_images("folder", tmp_path, "val", classes=train.classes)
    assert pretrain.paths == train.paths and train.targets == [0, 0, 1] and val.targets == [1, 1]
    assert all(str(tmp_path / "train") in path for path in train.paths)
    assert all(str(tmp_path / "val") in path for path in val.paths)
    write_images(tmp_path, {"val/zebra": 1})
    with pytest.raises(DataError, match="val has classes that the training set lacks: zebra"):
        open_images("folder", tmp_path, "val", classes=train.classes)


@pytest.mark.parametrize(
    ("counts", "root", "splits", "message"),
    [
        ({}, "nowhere", ["pretrain"], "no such data folder: .*nowhere"),
        ({".": 1}, "000.png", ["pretrain"], "no such data folder: .*000.png"),
        ({".": 0}, ".", ["pretrain"], "no images in ROOT .*looked for .jpg"),
        ({"train/a": 0}, ".", ["pretrain", "train"], "no images in ROOT/train"),
        ({"a": 1}, ".", ["train", "val"], "no folder ROOT/SPLIT: expected"),
        (
            {"train": 2, "val": 2},
            ".",
            ["train", "val"],
            "no labels because of .*SPLIT/000.png: SPLIT images must lie .*SPLIT/CLASS/IMAGE",
        ),
    ],
)
def test_folders_that_do_not_do_are_refused(counts, root, splits, message, tmp_path):
    write_images(tmp_path, counts)
    for split in splits:
        wanted = message.replace("ROOT", str(tmp_path)).replace("SPLIT", split)
        with pytest.raises(DataError, match=wanted):
            open_images("folder", tmp_path / root, split)


@pytest.mark.parametrize("suffix", [".jpg", ".JPEG", ".PNG", ".webp", ".bmp", ".tif", ".ppm"])
def test_image_formats_are_known_by_suffix_whatever_its_case(tmp_path, suffix):
    write_images(tmp_path, {"a": 1}, suffix=suffix)
    assert FolderImages(tmp_path).load(0).mode == "RGB"


def test_per_class_keeps_the_first_images_of_each_class(tmp_path):
    write_images(tmp_path, {"train/a": 3, "train/b": 1, "train/c": 4})
    whole = open_images("folder", tmp_path, "train")
    images = open_images("folder", tmp_path, "train", per_class=2)
    assert images.targets == [0, 0, 1, 2, 2] and images.classes == ["a", "b", "c"]
    assert len(images) == 5
    for i, j in enumerate([0, 1, 3, 4, 5]):
        assert np.array_equal(images.load(i), whole.load(j))


@pytest.mark.parametrize("in_arrays", [False, True])
def test_a_subset_of_a_subset_is_one_of_the_whole(in_arrays, tmp_path):
    write_images(tmp_path, {"a": 3, "b": 3})
    whole = FolderImages(tmp_path)
    if in_arrays:
        pixels = np.stack([whole.load(i) for i in range(6)])
        whole = ArrayImages(pixels, whole.targets, whole.classes)
    part = Subset(Subset(whole, [5, 4, 1, 0]), [2, 0])
    assert part.targets == [0, 1] and part.classes == ["a", "b"] and len(part) == 2
    assert image_names(part) == (["1", "5"] if in_arrays else ["a/001.png", "b/002.png"])
    for i, j in enumerate((1, 5)):
        assert np.array_equal(part.load(i), whole.load(j))
    if in_arrays:
        assert np.array_equal(in_memory(part), pixels[[1, 5]])


# ---- CIFAR and STL-10 through torchvision --------------------------------------------------------


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100", "stl10"])
@pytest.mark.parametrize("split", ["pretrain", "train", "val"])
def test_torchvisions_data_that_are_not_there_are_not_downloaded(tmp_path, dataset, split):
    with pytest.raises(
        DataError, match=f"no complete {dataset} in {tmp_path}; put .*/.*downloaded"
    ):
        open_images(dataset, tmp_path, split)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("kind", "train", "test", "key"),
    [
        (datasets.CIFAR10, ["data_batch_1", "data_batch_2"], ["test_batch"], "labels"),
        (datasets.CIFAR100, ["train"], ["test"], "fine_labels"),
    ],
)
def test_cifar_is_read_through_torchvision(kind, train, test, key, tmp_path, monkeypatch):
    write_cifar(tmp_path, monkeypatch, kind, train, test, key)
    dataset = kind.__name__.lower()
    for split, files in (("pretrain", train), ("train", train), ("val", test)):
        images = open_images(dataset, tmp_path, split)
        wanted = kind(str(tmp_path), train=split != "val")
        assert len(images) == len(wanted) == 4 * len(files)
        assert images.targets == wanted.targets
        assert images.classes == [f"class {i}" for i in range(10)]
        for i in range(len(images)):
            assert np.array_equal(images.load(i), wanted.data[i])
            assert images.load(i).mode == "RGB" and images.load(i).size == (32, 32)
        assert np.array_equal(in_memory(images), wanted.data)
    whole, some = (open_images(dataset, tmp_path, "train", per_class=n) for n in (None, 1))
    assert len(some) == len(set(whole.targets))
    assert np.array_equal(in_memory(some), in_memory(whole)[some.indices])


def write_stl10(root: Path, monkeypatch) -> Path:
    folder = root / "stl10_binary"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name, count in (("train", 4), ("test", 3), ("unlabeled", 5)):
        rng.integers(0, 256, (count, 3, 96, 96), dtype=np.uint8).tofile(folder / f"{name}_X.bin")
        if name != "unlabeled":
            (np.arange(count, dtype=np.uint8) % 3 + 1).tofile(folder / f"{name}_y.bin")
    names = [f"class {i}" for i in range(10)]
    (folder / "class_names.txt").write_text("\n".join(names) + "\n")
    train = ["train_X.bin", "train_y.bin", "unlabeled_X.bin"]
    monkeypatch.setattr(datasets.STL10, "train_list", sums(folder, train))
    monkeypatch.setattr(datasets.STL10, "test_list", sums(folder, ["test_X.bin", "test_y.bin"]))
    return folder


def test_stl10_is_pretrained_on_with_its_unlabelled_images(tmp_path, monkeypatch):
    """Which have no labels; training and validation images have (0-based)."""
    write_stl10(tmp_path, monkeypatch)
    pretrain, train, val = (open_images("stl10", tmp_path, s) for s in ("pretrain", "train", "val"))
    assert (len(pretrain), len(train), len(val)) == (9, 4, 3)
    assert pretrain.targets is None
    assert train.targets == [0, 1, 2, 0] and val.targets == [0, 1, 2]
    assert train.classes == [f"class {i}" for i in range(10)]
    assert np.array_equal(pretrain.load(1), train.load(1))
    assert train.load(0).size == (96, 96)
    assert in_memory(pretrain).shape == (9, 96, 96, 3)
    assert np.array_equal(in_memory(pretrain)[1], train.load(1))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("train_X.bin", bytes(3 * 96 * 96 * 3)),  # three images, four labels
        ("unlabeled_X.bin", bytes(100)),
        ("train_y.bin", bytes([1, 2, 0, 1])),  # labels begin at 1
        ("train_y.bin", bytes([1, 2, 11, 1])),
        ("unlabeled_X.bin", None),
        ("class_names.txt", None),  # for which torchvision has no checksum
    ],
    ids=["another number", "cut", "label 0", "label 11", "missing", "no names"],
)
def test_stl10_of_files_that_do_not_belong_together_is_refused(
    tmp_path, monkeypatch, name, content
):
    """Where torchvision's checksums are not asked, as with a part of STL-10 of one's own."""
    folder = write_stl10(tmp_path, monkeypatch)
    monkeypatch.setattr(datasets.STL10, "_check_integrity", lambda self: True)
    (folder / name).unlink() if content is None else (folder / name).write_bytes(content)
    with pytest.raises(DataError, match="no complete stl10 in"):
        open_images("stl10", tmp_path, "pretrain")


def test_cifar10_may_be_a_folder_of_images(tmp_path):
    write_images(tmp_path / "train", {"cat": 2, "dog": 1})
    images = open_images("cifar10", tmp_path, "train")
    assert images.classes == ["cat", "dog"] and images.targets == [0, 0, 1]


def test_stl10_from_training_within_the_batch_to_the_probe(
    tmp_path, elsewhere, monkeypatch, capsys
):
    """All 9 images, the unlabelled ones among them, then the 4 labelled ones; one image alone is no
    batch. With --supervised the labelled ones only."""
    data = tmp_path / "data"
    data.mkdir()
    write_stl10(data, monkeypatch)
    flags = (
        "--dataset stl10 -a small_alexnetx0.05 --image-size 16 --batch-size 4 --dim 4 --epochs 1 "
        "-j 0 --device cpu --seed 0"
    )
    train = load_script("train_in_batch").main
    train([*flags.split(), "--save-dir", "run", str(data)])
    out = capsys.readouterr().out
    assert "9 images, 2 steps per epoch, 1 epochs; 1 images of each epoch are left out" in out
    assert "k-NN after 1 epoch(s)" in out
    probe = (
        "--protocol stl10 --layer output --dataset stl10 --batch-size 2 --epochs 1 -j 0 "
        "--device cpu --pretrained run --save-dir probe"
    )
    main_lincls.main([*probe.split(), str(data)])
    assert "output + 5-NN" in capsys.readouterr().out
    train([*flags.split(), "--supervised", "--save-dir", "supervised", str(data)])
    assert "4 images, 1 steps per epoch" in capsys.readouterr().out
