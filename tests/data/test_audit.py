"""Audit of a data set: one file of each kind is found and judged as training judges it."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import sys
import tarfile
from pathlib import Path

import pytest
from data_helpers import bad_files, image_files
from helpers import load_script

from moco.data import audit
from moco.data.images import load_rgb
from moco.errors import DataError

FILES = image_files() | {name: (data, kinds) for name, (data, kinds, _) in bad_files().items()}


@pytest.mark.parametrize("name", FILES)
def test_each_kind_of_file(name: str, tmp_path: Path) -> None:
    """And training judges alike."""
    data, expected = FILES[name]
    (path := tmp_path / name).write_bytes(data)
    found = {kind for kind, _ in audit.check_file(str(path))}
    assert found == expected
    if not found & set(audit.REFUSED):
        assert load_rgb(path).mode == "RGB"
        return
    reason = bad_files()[name][2]
    with pytest.raises(DataError, match=f"cannot read image {path}: .*{reason}.*; replace or rem"):
        load_rgb(path)


def test_missing_files_links_to_nowhere_and_pipes(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "link.jpg").symlink_to("nowhere")
    for name in ("pipe.jpg", "link.jpg", "missing.jpg"):
        assert audit.check_file(str(tmp_path / name)) == [("missing", "")]
        with pytest.raises(DataError, match=f"{name}: there is no such file"):
            load_rgb(tmp_path / name)


def test_large_images_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (path := tmp_path / "a.png").write_bytes(FILES["good.png"][0])  # 64 x 48
    monkeypatch.setattr(audit, "MAX_PIXELS", 5000)
    assert audit.check_file(str(path)) == [("large", "64 x 48")]


check_dataset = load_script("check_dataset")


def write_all(folder: Path) -> Path:
    """train/a with all files, train/b, val/b, and class folders that do not fit."""
    for name, (data, _) in FILES.items():
        path = folder / "train" / "a" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    good = FILES["good.jpg"][0]
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
    assert found["images"] == len(FILES) + 4
    assert found["ignored"] == {".txt": 1, ".mp4": 1, "hidden": 1}

    expected: dict[str, set[str]] = {}
    for name, (_, kinds) in FILES.items():
        for kind in kinds:
            expected.setdefault(kind, set()).add(f"train/a/{name}")
    expected |= {
        "class without images": {"train/nothing"},
        "class of val not in train": {"val/only_val"},
        "class of train not in val": {"train/a"},
        "image outside the class folders": {"train/loose.jpg"},
        "exact copy": {"train/a/really_png.jpg", "train/loose.jpg", "train/b/1.jpg"}
        | {"val/b/1.jpg", "val/only_val/1.jpg"},
    }
    assert {
        kind: {os.path.relpath(file["path"], folder) for file in entry["files"]}
        for kind, entry in found["kinds"].items()
    } == expected
    refused = {kind for kind, entry in found["kinds"].items() if entry["refused"]}
    assert refused == audit.STOPS & set(expected)
    for kind in expected:
        assert f"  {kind}" in printed
    assert "3 other files ignored" in printed
    assert printed.rstrip().endswith(f"{len(bad_files()) + 2} would be refused")


def test_folder_without_train_is_taken_as_it_is(tmp_path: Path, capsys) -> None:
    for name in ("good.jpg", "grey.jpg"):
        (tmp_path / name).write_bytes(FILES[name][0])
    assert check_dataset.main([str(tmp_path), "-j", "1"]) == 0
    assert "nothing would be refused" in capsys.readouterr().out
    (tmp_path / "deeper").mkdir()
    (tmp_path / "deeper" / "b.jpg").write_bytes(b"")
    assert check_dataset.main([str(tmp_path), "-j", "1"]) == 1
    assert "3 images" in capsys.readouterr().out


def test_exact_copies_are_counted_across_names(tmp_path: Path, capsys) -> None:
    """Of pictures in folders and in archives; another picture of equal size is none."""
    good = FILES["good.png"][0]
    contents = {
        "1.png": good,
        "2.jpg": good,
        "3.bmp": good,
        "4.png": good[:-1] + b"!",
        "5.png": b"",
    }
    (tmp_path / "train" / "a").mkdir(parents=True)
    with tarfile.open(tmp_path / "train" / "0.tar", "w") as tar:
        for name, content in {**contents, "5.png": b"", "6.png": b""}.items():
            (tmp_path / "train" / "a" / name).write_bytes(content)
            tar.add(tmp_path / "train" / "a" / name, f"a/{name}")
    for dataset in ("folder", "tar"):
        check_dataset.main([str(tmp_path), "-j", "1", "--dataset", dataset])
        printed = capsys.readouterr().out
        assert re.search(r"  exact copy +2  .*\n.*a/2.jpg.*  \(of .*a/1.png", printed), printed


@pytest.mark.parametrize("arguments", [["missing"], ["."], [".", "-j", "0"]])
def test_wrong_arguments(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        check_dataset.main(arguments)
    assert caught.value.code == 2


def deadly(path: str, source: None) -> list[tuple[str, str]]:
    """Stands for a decoder that crashes or is killed for its memory."""
    if "deadly" in path:
        os._exit(1)
    return []


@pytest.mark.skipif(sys.platform == "win32", reason="fork")
def test_a_file_that_kills_its_reader_does_not_stop_the_check(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(audit, "check_file", deadly)
    paths = [f"{index}" for index in range(30)]
    paths[3], paths[20] = "deadly 1", "deadly 2"
    fork = multiprocessing.get_context("fork")
    monkeypatch.setattr(multiprocessing, "get_context", lambda: fork)
    looked_at = audit.check_files([(path, None) for path in paths], 2)
    found = {path: findings for path, findings, _ in looked_at}
    assert set(found) == set(paths)
    kills = [path for path, findings in found.items() if findings]
    assert sorted(kills) == ["deadly 1", "deadly 2"]
    assert found["deadly 1"] == [("kills its reader", "")]
