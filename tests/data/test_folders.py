"""Folders from real life: tool-made entries, links, names that are not UTF-8, train/ as DIR."""

from pathlib import Path

import pytest
from data_helpers import image_files
from helpers import write_images

from moco.data.audit import audit
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


def names(root: Path) -> list[str]:
    return image_names(FolderImages(root))


NAMES = ["a/000.png", "a/001.png", "a/002.png", "b/000.png", "b/001.png"]


def test_digests_are_those_of_checkpoints_and_caches(data):
    """They are in files of earlier versions, which are resumed by them."""
    images = open_images("folder", data, "train")
    some = open_images("folder", data, "train", per_class=1)
    assert image_names(images) == NAMES and image_names(some) == ["a/000.png", "b/000.png"]
    assert (names_digest(images), names_digest(some)) == ("77eabb699765", "7a12544fd9cf")
    assert (subset_digest(images), subset_digest(some)) == ("d8cf4627893a", "9453a94ea5e4")


# ------------------------------------------------------------------------------------------------
# Hidden and tool-made entries
# ------------------------------------------------------------------------------------------------


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


def test_names_that_look_alike_are_classes(tmp_path, capsys):
    folders = ["#cat", "@home", "lost", "macosx", "recycle", "eaDir", "a.b", "~x"]
    write_images(tmp_path, {f"train/{name}": 1 for name in folders})
    assert open_images("folder", tmp_path, "train").classes == sorted(folders)
    assert capsys.readouterr().out == ""


def test_a_data_folder_may_itself_be_hidden(tmp_path):
    write_images(tmp_path, {".cache/train/a": 1})
    assert names(tmp_path / ".cache" / "train") == ["a/000.png"]


def test_where_all_is_left_out_the_error_says_so(tmp_path):
    write_images(tmp_path, {"train/@eaDir": 2})
    with pytest.raises(DataError, match=r"no images in .*tool-made folders: 1 \(@eaDir\)"):
        open_images("folder", tmp_path, "train")
