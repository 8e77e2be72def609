"""Folders from real life: tool-made entries, links, names that are not UTF-8, train/ as DIR."""

import json
import os
from pathlib import Path

import pytest
from data_helpers import bad_files, image_files, train
from helpers import load_script, write_images

from moco.data.audit import audit
from moco.data.folders import LeftOut, image_paths
from moco.data.images import FolderImages, image_names, names_digest, open_images
from moco.data.subsets import subset_digest
from moco.errors import DataError

GOOD = image_files()["good.jpg"][0]


@pytest.fixture
def data(tmp_path) -> Path:
    """train/ and val/ of classes a and b, 3 + 2 and 1 + 1 images."""
    root = tmp_path / "data"
    write_images(root, {"train/a": 3, "train/b": 2, "val/a": 1, "val/b": 1})
    return root


NAMES = ["a/000.png", "a/001.png", "a/002.png", "b/000.png", "b/001.png"]


def test_digests_are_those_of_checkpoints_and_caches(data):
    """They are in files of earlier versions, which are resumed by them."""
    images = open_images("folder", data, "train")
    some = open_images("folder", data, "train", per_class=1)
    assert image_names(images) == NAMES and image_names(some) == ["a/000.png", "b/000.png"]
    assert (names_digest(images), names_digest(some)) == ("77eabb699765", "7a12544fd9cf")
    assert (subset_digest(images), subset_digest(some)) == ("d8cf4627893a", "9453a94ea5e4")


# ---- Hidden and tool-made entries ----------------------------------------------------------------


@pytest.mark.parametrize(
    "tool",
    [".ipynb_checkpoints", "@eaDir", "__MACOSX", "lost+found", "#recycle", ".git", ".AppleDouble",
     "$RECYCLE.BIN", "System Volume Information", "@Recycle", "__pycache__"],
)  # fmt: skip
def test_tool_made_folders_are_left_out_and_counted(tool, data, capsys):
    digest = names_digest(open_images("folder", data, "train"))
    write_images(data, {f"train/{tool}/deep": 2, f"train/a/{tool}": 3, f"train/a/x/{tool}": 1})
    capsys.readouterr()
    images = open_images("folder", data, "train")
    assert image_names(images) == NAMES and images.classes == ["a", "b"]
    assert names_digest(images) == digest
    [line] = capsys.readouterr().out.splitlines()
    assert line.startswith(f"left out of {data}/train: hidden or tool-made folders: 3 (")
    assert f"a/{tool}" in line
    found = audit(data, 1)
    assert found.images == 7 and found.left_out == [line]
    assert all(tool not in path for paths in found.kinds.values() for path, _ in paths)


def test_hidden_and_tool_made_files_are_left_out_and_counted(data, capsys):
    """macOS leaves ._000.png beside images, which are none."""
    for name in ("._000.png", ".hidden.jpg", ".DS_Store", "Thumbs.db", "desktop.ini"):
        (data / "train" / "a" / name).write_bytes(b"no image")
    for name in ("notes.txt", "000.png.part"):  # no images, but nothing that a tool has made
        (data / "train" / "a" / name).write_bytes(b"no image")
    assert image_names(open_images("folder", data, "train")) == NAMES
    line = capsys.readouterr().out
    assert "hidden or tool-made files: 5 (a/.DS_Store, a/._000.png, a/.hidden.jpg, ...)" in line


def test_photos_in_formats_that_are_not_read_are_counted(data, tmp_path, capsys):
    """A phone's folder of HEIC looks full, and would be trained on the few JPEGs in it."""
    for name in ("IMG_1.HEIC", "cat.gif", "notes.txt"):
        (data / "train" / "a" / name).write_bytes(b"no image")
    (data / "train" / "c.gif").mkdir()
    assert image_names(open_images("folder", data, "train")) == NAMES
    line = capsys.readouterr().out
    assert "pictures in formats that are not read (convert them to JPEG or PNG): 2 (" in line
    assert "(a/IMG_1.HEIC, a/cat.gif)" in line and audit(data, 1).left_out == [line.strip()]
    write_images(tmp_path, {"phone/@eaDir": 2})
    (tmp_path / "phone" / "1.heic").write_bytes(b"no image")
    for look in (lambda root: open_images("folder", root, "pretrain"), lambda root: audit(root, 1)):
        message = r"no images in .*not read \(convert .*\(1.heic\); .*folders: 1 \(@eaDir\)"
        with pytest.raises(DataError, match=message):
            look(tmp_path / "phone")


def test_names_that_look_alike_are_classes(tmp_path, capsys):
    folders = ["#cat", "@home", "lost", "macosx", "recycle", "eaDir", "a.b", "~x"]
    write_images(tmp_path, {f"train/{name}": 1 for name in folders})
    assert open_images("folder", tmp_path, "train").classes == sorted(folders)
    assert capsys.readouterr().out == ""


# ---- Links ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "links",
    [
        {"train/a/up": ".."},
        {"train/a/up": "..", "train/b/up": ".."},
        {"train/a/up": "../.."},  # it also holds val/
        {"train/a/self": "."},
        {"train/a/x": "../b", "train/b/y": "../a"},
        {"train/0": "a"},  # sorted before the folder, whose name is kept
        {"train/a/root": "/"},
    ],
    ids=str,
)
def test_each_folder_is_read_once_whatever_links_lead_to_it(links, data, capsys):
    for link, target in links.items():
        (data / link).symlink_to(target)
    images = open_images("folder", data, "train")
    assert image_names(images) == NAMES and images.classes == ["a", "b"]
    count = f"links to folders that are read: {len(links)} ("
    assert count in capsys.readouterr().out
    assert audit(data, 1).images == 7


def test_folders_elsewhere_are_read_once_under_the_first_link(tmp_path):
    write_images(tmp_path, {"data/a": 1, "elsewhere": 1, "elsewhere/sub": 1, "data/.store": 1})
    (tmp_path / "elsewhere" / "back").symlink_to("../data")
    (tmp_path / "elsewhere" / "sub" / "up").symlink_to("..")
    for link, target in (("b", "elsewhere"), ("c", "elsewhere"), ("d", "elsewhere/sub")):
        (tmp_path / "data" / link).symlink_to(tmp_path / target)
    (tmp_path / "data" / "e").symlink_to(".store")  # which is not read by itself
    assert image_names(FolderImages(tmp_path / "data")) == [
        "a/000.png",
        "b/000.png",
        "b/sub/000.png",
        "e/000.png",
    ]


def test_a_folder_of_links_is_a_data_set(tmp_path):
    """As scripts/create_imagenet_subset.py makes them, and link by link as git-annex does."""
    write_images(tmp_path, {"full/a": 2, "full/b": 1})
    (tmp_path / "subset").mkdir()
    (tmp_path / "subset" / "a").symlink_to(tmp_path / "full" / "a")
    (tmp_path / "files" / "c").mkdir(parents=True)
    for name in ("1.png", "2.png"):  # equal images share one file in such stores
        (tmp_path / "files" / "c" / name).symlink_to(tmp_path / "full" / "b" / "000.png")
    (tmp_path / "files" / "c" / "gone.png").symlink_to("nowhere.png")  # an error later, not here
    assert image_names(FolderImages(tmp_path / "subset")) == ["a/000.png", "a/001.png"]
    assert image_names(FolderImages(tmp_path / "files")) == ["c/1.png", "c/2.png", "c/gone.png"]


def test_links_to_images_that_are_read_are_left_out(data, capsys):
    train_ = data / "train"
    (train_ / "a" / "again.png").symlink_to("000.png")
    (train_ / "a" / "chain.png").symlink_to("again.png")
    (train_ / "b" / "other.png").symlink_to(train_ / "a" / "001.png")
    (train_ / "b" / "self.png").symlink_to("self.png")  # leads nowhere: an error when it is read
    assert image_names(FolderImages(train_)) == [*NAMES, "b/self.png"]
    open_images("folder", data, "train")
    assert "links to images that are read: 3 (a/again.png, " in capsys.readouterr().out


def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path, monkeypatch):
    """Root may list everything, so the answer of the system is put in."""
    write_images(tmp_path, {"a": 1, "b": 1})
    scandir = os.scandir

    def refuse(path):
        if Path(path).name == "b":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match="cannot list the folder .*/b: Permission denied"):
        list(image_paths(tmp_path, LeftOut(tmp_path)))


# ---- Names that are not UTF-8 --------------------------------------------------------------------


def put(folder: Path, name: bytes, content: bytes) -> str:
    path = os.path.join(os.fsencode(folder), name)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    Path(os.fsdecode(path)).write_bytes(content)
    return os.fsdecode(path)


@pytest.mark.long
@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_bad_image_whose_name_is_not_utf_8_is_listed_and_passed_over(workers, data, tmp_path):
    bad = put(data / "train", b"caf\xe9/bad\xff.jpg", bad_files()["truncated.jpg"][0])
    put(data / "train", b"caf\xe9/good\xe9.jpg", GOOD)
    write_images(data, {"train/c": 4})
    flags = ["--skip-bad-images", "--max-bad-share", "0.5", "-b", "4", "-j", workers]
    flags += ["--aug-plus", "--knn-every", "1", "--knn-bank", "3"]
    run = tmp_path / "run"
    train(data, run, *flags, "--max-steps", "2")
    train(data, run, *flags, "--resume", "auto")  # which reads the list
    listed = (run / "bad_images.txt").read_bytes().splitlines()
    assert len(listed) == 1 and os.fsencode(bad) in listed[0]


def test_names_that_are_not_utf_8_in_messages(data, capsys):
    """Printed as escapes where the terminal is strict, as pytest's is."""
    bad = put(data / "train", b"b/bad\xff.jpg", b"")
    put(data / "train", b"caf\xe9/good\xe9.jpg", GOOD)
    put(data / "train", b"a/.hidden\xe9.jpg", GOOD)
    put(data / "train", b"a/line\nbreak.jpg", b"")
    images = open_images("folder", data, "train")
    open_images("folder", data, "val", classes=images.classes)
    shown = capsys.readouterr().out
    assert r".hidden\xe9.jpg" in shown and r"caf\xe9" in shown and len(shown.splitlines()) == 2
    assert len(names_digest(images)) == len(subset_digest(images)) == 12
    with pytest.raises(DataError) as caught:
        images.load(images.paths.index(bad))
    assert os.fsencode(bad) in str(caught.value).encode("utf-8", "surrogateescape")
    out = data / "report.json"
    assert load_script("check_dataset").main([str(data), "-j", "1", "--out", str(out)]) == 1
    shown = capsys.readouterr().out
    assert r"train/b/bad\xff.jpg" in shown and r"a/line\nbreak.jpg" in shown
    kinds = json.loads(out.read_text(encoding="utf-8"))["kinds"]
    assert bad in {file["path"] for file in kinds["empty"]["files"]}


# ---- train/ and val/ -----------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["train", "train/", ".", "../train"])
def test_train_given_as_the_data_folder_is_read_as_that_folders_train(
    given, data, capsys, monkeypatch
):
    wanted = {split: open_images("folder", data, split) for split in ("pretrain", "train", "val")}
    monkeypatch.chdir(data if given.startswith("train") else data / "train")
    capsys.readouterr()
    for split, images in wanted.items():
        got = open_images("folder", given, split)
        assert names_digest(got) == names_digest(images) and got.targets == images.targets
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2, "for pretrain and train"
    assert all(f"is the train/ of {data}, which is read" in line for line in lines)
    assert audit(Path(given), 1).images == 7


@pytest.mark.parametrize(
    ("counts", "root"),
    [({"train/a": 2}, "train"), ({"train/a": 1, "val/a": 2}, "val")],
    ids=["train/ alone", "val/"],
)
def test_other_splits_given_as_the_data_folder_are_any_folder(counts, root, tmp_path, capsys):
    """Their images can be pretrained on; there is no evaluation on them alone."""
    write_images(tmp_path, counts)
    assert len(open_images("folder", tmp_path / root, "pretrain")) == 2
    with pytest.raises(DataError, match=f"no folder {tmp_path}/{root}/train: expected"):
        open_images("folder", tmp_path / root, "train")
    assert capsys.readouterr().out == ""
    write_images(tmp_path, {"train/train/a": 1, "train/val/a": 3, "val": 1})  # a data folder
    assert len(open_images("folder", tmp_path / "train", "val")) == 3


@pytest.mark.parametrize("per_class", [None, 1])
def test_classes_that_val_lacks_are_named_in_one_line(per_class, data, capsys):
    write_images(data, {f"train/c{i}": 1 for i in range(6)})
    classes = open_images("folder", data, "train").classes
    assert capsys.readouterr().out == ""
    val = open_images("folder", data, "val", per_class=per_class, classes=classes)
    assert val.targets == [0, 1]
    assert capsys.readouterr().out == (
        f"{data}/val has no images of 6 of the 8 classes of the training set: c0, c1, c2, c3, c4, "
        "...; they are never validated\n"
    )


@pytest.mark.parametrize("cause", ["empty", "hidden", "no image"])
def test_a_class_folder_of_val_without_images_counts_as_lacking(cause, data, capsys):
    (data / "val" / "b" / "000.png").unlink()
    name = {"empty": None, "hidden": ".000.png", "no image": "000.txt"}[cause]
    if name:
        (data / "val" / "b" / name).write_bytes(GOOD)
    open_images("folder", data, "val", classes=["a", "b"])
    assert "1 of the 2 classes of the training set: b; they" in capsys.readouterr().out
    assert [path for path, _ in audit(data, 1).kinds["class of train not in val"]] == [
        str(data / "train" / "b")
    ]
