"""Images in tar archives and Parquet files: the pictures, order, labels and batches of the folder
that they were made from; what is refused."""

from __future__ import annotations

import io
import os
import pickle
import re
import tarfile
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import finish, load_script, refusal, start_python, write_images

from moco import cli
from moco.data.images import Images, image_names, names_digest, open_images
from moco.data.loader import EpochBatches, TrainLoader
from moco.data.parquets import hybrid
from moco.data.samples import AugmentedViews
from moco.data.views import pretrain_recipe
from moco.errors import DataError

COUNTS = {"ant": 5, "bee/deep": 2, "bee": 6, "a-x": 4}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "moco_align_uniform"


@pytest.fixture
def plain(tmp_path) -> Path:
    """train/ and val/, 17 and 3 images."""
    write_images(tmp_path / "plain" / "train", COUNTS, suffix=".jpg")
    write_images(tmp_path / "plain" / "val", {"ant": 1, "bee": 2}, suffix=".jpg", seed=1)
    return tmp_path / "plain"


def add(tar: tarfile.TarFile, name: str, data: bytes = b"", **more: object) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in more.items():
        setattr(info, key, value)
    tar.addfile(info, io.BytesIO(data))


def write_tar(path: Path, files: Iterable[tuple[str, bytes]], mode: str = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for name, data in files:
            add(tar, name, data)
    return path


def named(plain: Path, split: str) -> list[tuple[str, bytes, int]]:
    images = open_images("folder", plain, split)
    names = image_names(images)
    contents = [Path(path).read_bytes() for path in images.paths]
    classes = open_images("folder", plain, "train").classes
    return [
        (n, data, classes.index(n.split("/")[0])) for n, data in zip(names, contents, strict=True)
    ]


def write_tars(plain: Path, out: Path, kind: str = "folders") -> Path:
    """By folders: CLASS/FILE in any order; by .cls: KEY.jpg and KEY.cls; by class: CLASS.tar."""
    for split in ("train", "val"):
        files: dict[str, list[tuple[str, bytes]]] = {}
        samples = named(plain, split)
        for i in np.random.default_rng(0).permutation(len(samples)):
            name, data, label = samples[i]
            folder, _, file = name.rpartition("/")
            name_of_class = name.partition("/")[0]
            if kind == "class":
                flat = name.replace("/", "_", 1).replace("/", "")
                files.setdefault(name_of_class, []).append((flat, data))
                continue
            part = files.setdefault(f"part-{i % 2}", [])
            if kind == "folders":
                part += [(f"./{name}", data), (f"./{folder}/._{file}", b"of macOS")]
            else:
                part += [(f"{i:06d}.cls", b"%d\n" % label), (f"{i:06d}.jpg", data)]
                part += [(f"{i:06d}.json", b"{}")]
        for stem, members in files.items():
            write_tar(out / split / f"{stem}.tar", members)
    return out


def write_parquets(plain: Path, out: Path, **options: object) -> Path:
    """data/train-0000x-of-00002.parquet, validation-..., as Hugging Face's datasets do."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    (out / "data").mkdir(parents=True)
    classes = open_images("folder", plain, "train").classes
    about = '{"info": {"features": {"label": {"names": ["%s"], "_type": "ClassLabel"}}}}'
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema(
        [("image", image), ("label", pa.int64())],
        metadata={"huggingface": about % '", "'.join(classes)},
    )
    for split, word in (("train", "train"), ("val", "validation")):
        samples = named(plain, split)
        half = len(samples) // 2
        for number, part in enumerate((samples[:half], samples[half:])):
            rows = [{"image": {"bytes": d, "path": n}, "label": y} for n, d, y in part]
            table = pa.Table.from_pylist(rows, schema=schema)
            name = f"{word}-{number:05d}-of-00002.parquet"
            pq.write_table(table, out / "data" / name, **options)
    return out


def same_batches(got: Images, wanted: Images) -> None:
    """Views of two epochs, the second from its second batch on, as after a resume."""
    batches = []
    for images in (got, wanted):
        views = AugmentedViews(images, pretrain_recipe(16, aug_plus=True), seed=3, num_views=2)
        order = EpochBatches(len(images), 4, seed=3)
        pairs = TrainLoader(views, order, workers=0, device=torch.device("cpu"))
        order.set_epoch(0)
        found = list(pairs)
        order.set_epoch(1, 1)
        batches.append(found + list(pairs))
    assert len(batches[0]) == 7
    for one, two in zip(*batches, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one[:3], two[:3], strict=True))


def same_images(dataset: str, root: Path, plain: Path) -> Images:
    folder = open_images("folder", plain, "train")
    packed = open_images(dataset, root, "train")
    assert packed.targets == folder.targets and len(packed) == len(folder)
    for i in range(len(folder)):
        assert np.array_equal(packed.load(i), folder.load(i))
    same_batches(packed, folder)
    val = open_images("folder", plain, "val", classes=folder.classes)
    packed_val = open_images(dataset, root, "val", classes=packed.classes)
    assert packed_val.targets == val.targets == [1, 2, 2]
    assert np.array_equal(packed_val.load(2), val.load(2))
    few = open_images(dataset, root, "train", per_class=2)
    assert few.targets == [0, 0, 1, 1, 2, 2] and np.array_equal(few.load(3), folder.load(5))
    again = pickle.loads(pickle.dumps(packed))
    assert np.array_equal(again.load(9), folder.load(9))
    return packed


@pytest.mark.parametrize("kind", ["folders", "cls", "class"])
def test_archives_hold_what_the_folder_holds(kind, plain, tmp_path, capsys) -> None:
    root = write_tars(plain, tmp_path / "tars", kind)
    packed = same_images("tar", root, plain)
    folder = open_images("folder", plain, "train")
    if kind == "folders":
        assert names_digest(packed) == names_digest(folder) and packed.classes == folder.classes
        assert "left out" in capsys.readouterr().out
    if kind == "cls":
        assert packed.classes == ["0", "1", "2"] and packed.names[3] == "000003.jpg"


def test_the_index_is_made_once_and_anew_for_other_files(plain, tmp_path, cache, monkeypatch):
    root = write_tars(plain, tmp_path / "tars")
    first = open_images("tar", root, "train")
    (kept,) = cache.iterdir()
    with monkeypatch.context() as without:
        without.setattr("moco.data.tars.members", None)
        again = open_images("tar", root, "train")
        assert again.names == first.names and again.targets == first.targets
        assert again.left_out.counts == first.left_out.counts
        assert np.array_equal(again.load(5), first.load(5))
    kept.write_bytes(kept.read_bytes()[:300])  # a full disk
    assert open_images("tar", root, "train").names == first.names
    write_tar(root / "train" / "part-9.tar", [("zebra/1.jpg", first.read(0))])
    assert open_images("tar", root, "train").classes == [*first.classes, "zebra"]
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    assert len(open_images("tar", root, "train")) == 18


AT_ONCE = """
import sys, time
from pathlib import Path
from moco.data import images, tars

root, place, mine = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
make = tars._make_index

def made(paths):
    (place / f"made-{mine}").touch()
    while len(list(place.glob("here-*"))) < 3:
        time.sleep(0.01)
    time.sleep(0.3)  # for the others to come as far
    return make(paths)

tars._make_index = made
(place / f"here-{mine}").touch()
print(len(images.open_images("tar", root, "train")))
"""


@pytest.mark.long
def test_of_processes_that_start_together_one_makes_the_index(plain, tmp_path) -> None:
    root = write_tars(plain, tmp_path / "tars")
    (place := tmp_path / "place").mkdir()
    ranks = [start_python("-c", AT_ONCE, root, place, rank, cwd=tmp_path) for rank in range(3)]
    for status, out, error in map(finish, ranks):
        assert status == 0 and out.endswith("17\n"), out + error
    assert len(list(place.glob("made-*"))) == 1


def test_a_whole_archive_of_train_and_unlabelled_images(plain, tmp_path) -> None:
    for split in ("train", "val"):
        with tarfile.open(tmp_path / f"imagenet-{split}.tar", "w") as tar:
            tar.add(plain / split, split)
    same_images("tar", tmp_path, plain)
    photos = [(f"{i}.jpg", data) for i, (_, data, _) in enumerate(named(plain, "train"))]
    write_tar(tmp_path / "photos" / "all.tar", photos)
    assert open_images("tar", tmp_path / "photos", "pretrain").targets is None
    with pytest.raises(DataError, match="no .tar files of the val images in .*photos"):
        open_images("tar", tmp_path / "photos", "val")


TWO = [("a.jpg", b"1" * 5000), ("b.jpg", b"1" * 5000)]


@pytest.mark.parametrize(
    ("files", "mode", "message"),
    [
        (
            TWO,
            "w:gz",
            "0.tar as a tar archive: .*expected one that is not compressed",
        ),
        ([], "w", "no images in .*0.tar and 0 more"),
        ([*TWO, ("a.cls", b"0")], "w", "b.jpg in .*0.tar has no .cls file"),
        ([*TWO, ("a.cls", b"\n")], "w", "a.jpg in .*0.tar has no .cls file, or an empty one"),
        (TWO, "w", "tar files of .* have no labels: expected CLASS/IMAGE"),
    ],
)
def test_what_is_wrong_with_archives_is_named(files, mode, message, tmp_path) -> None:
    path = write_tar(tmp_path / "train" / "0.tar", files, mode)
    with pytest.raises(DataError, match=message):
        open_images("tar", tmp_path, "train")
    path.unlink()
    path.symlink_to("gone.tar")
    with pytest.raises(DataError, match=r"0\.tar is no file, or a link to nothing"):
        open_images("tar", tmp_path, "train")


@pytest.mark.parametrize("damage", ["cut", "cut in a file", "cut in a header", "noise", "zeros"])
def test_an_archive_damaged_behind_its_first_file_is_refused(damage, plain, tmp_path) -> None:
    """Python's tarfile ends there without a word, and the images behind would be missing."""
    files = [(name, data) for name, data, _ in named(plain, "train")[:3]]
    path = write_tar(tmp_path / "train" / "0.tar", files)
    with tarfile.open(path) as tar:
        second = tar.getmembers()[1]
    content = bytearray(path.read_bytes())
    if damage == "noise":
        content[second.offset : second.offset + 512] = b"noise " * 85 + b"no"
    if damage == "zeros":
        content[second.offset : second.offset + 1024] = bytes(1024)
    end = {"cut": second.offset, "cut in a header": second.offset + 100}
    end["cut in a file"] = second.offset_data + second.size
    path.write_bytes(content[: end.get(damage, len(content))])
    with pytest.raises(
        DataError, match=r"cannot read .*0\.tar as a tar archive: (it .* byte|unexpected end)"
    ):
        open_images("tar", tmp_path, "train")


def test_archives_hold_what_tar_would_unpack_from_them(plain, tmp_path, capsys) -> None:
    """Hard links, a file that was appended again, names that lead out of the folder; capitals."""
    first, second, third, *_ = (data for _, data, _ in named(plain, "train"))
    (tmp_path / "train").mkdir()
    with tarfile.open(tmp_path / "train" / "0.TAR", "w") as tar:
        for name, data in (("/ant/0.JPG", first), ("../bee/0.jpg", second), ("ant/1.jpg", first)):
            add(tar, name, data)
        add(tar, "bee/1.jpg", type=tarfile.LNKTYPE, linkname="../bee/0.jpg")
        add(tar, "bee/2.jpg", type=tarfile.SYMTYPE, linkname="0.jpg")
        add(tar, "ant/1.jpg", third)
    for again in (False, True):
        images = open_images("tar", tmp_path, "train")
        assert images.names == ["ant/0.JPG", "ant/1.jpg", "bee/0.jpg", "bee/1.jpg"], again
        assert list(map(images.read, range(4))) == [first, third, second, second]
        said = capsys.readouterr().out
        assert "symbolic links and sparse files: 1 (bee/2.jpg)" in said
        assert "images that come again in their archive: 1 (ant/1.jpg)" in said


def test_archives_of_one_name_size_and_date_have_an_index_each(tmp_path) -> None:
    """As reproducible builds have them."""
    for name in ("ant", "bee"):
        path = write_tar(tmp_path / name / "train" / "0.tar", [(f"{name}/0.jpg", b"image")])
        os.utime(path, (0, 0))
        assert open_images("tar", tmp_path / name, "train").classes == [name]


def test_damaged_images_are_named_with_their_archive(plain, tmp_path, capsys) -> None:
    root = write_tars(plain, tmp_path / "tars")
    images = open_images("tar", root, "pretrain")
    number, offset, _ = images._place[4].tolist()
    with open(images.files.paths[number], "r+b") as file:
        file.seek(offset)
        file.write(b"garbage" * 5)
    with pytest.raises(DataError, match="cannot read image ant/000.jpg in .*part-.*tar: its begin"):
        open_images("tar", root, "pretrain").load(4)
    assert load_script("check_dataset").main([str(root), "--dataset", "tar", "-j", "1"]) == 1
    said = capsys.readouterr().out
    assert "20 images checked" in said and "ant/000.jpg in" in said and "1 would be" in said
    assert "left out" in said
    os.truncate(images.files.paths[number], offset + 9)
    with pytest.raises(DataError, match=r"part-.\.tar ends before byte .* it is cut off"):
        images.load(4)


SMALL_PAGES = {"data_page_size": 2000, "write_batch_size": 2}


@pytest.mark.parametrize(
    "options",
    [
        {},  # snappy, all images in a dictionary
        {"row_group_size": 6, "dictionary_pagesize_limit": 3000, "write_batch_size": 2},  # then not
        {"compression": "none", "use_dictionary": False, **SMALL_PAGES},
        {"compression": "zstd", "use_dictionary": False, "data_page_version": "2.0"},
        {"compression": "none", "data_page_version": "2.0", "row_group_size": 3},
        {"compression": "lz4", "use_dictionary": False, "write_statistics": False},
    ],
)
def test_parquet_files_hold_what_the_folder_holds(options, plain, tmp_path) -> None:
    packed = same_images("parquet", write_parquets(plain, tmp_path / "hf", **options), plain)
    folder = open_images("folder", plain, "train")
    assert packed.classes == folder.classes and packed.names == image_names(folder)
    assert names_digest(packed) == names_digest(folder)


def test_rows_without_an_image_and_damaged_ones_are_named(plain, tmp_path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    good = named(plain, "train")[0][1]
    rows = [{"bytes": good}, None, {"bytes": None}, {"bytes": b"bad"}, {"bytes": good}]
    pq.write_table(pa.table({"image": rows}), tmp_path / "train.parquet")
    images = open_images("parquet", tmp_path, "pretrain")
    assert len(images) == 5 and images.targets is None and images.read(4) == good
    for row in (1, 2):
        with pytest.raises(DataError, match=rf"image {row} \(row {row} of .*: there is none in"):
            images.load(row)
    with pytest.raises(DataError, match="row 3 of .*train.parquet.*its beginning is not that"):
        images.load(3)
    with open(tmp_path / "train.parquet", "r+b") as file:
        file.seek(30)
        file.write(b"\xff" * 200)
    with pytest.raises(DataError, match="train.parquet"):
        open_images("parquet", tmp_path, "pretrain").load(4)
    alone = pa.table({"image": [{"bytes": good}]})
    pq.write_table(alone, path := tmp_path / "train.parquet", compression="none")
    content = path.read_bytes()
    at = content.index(good)
    path.write_bytes(content[: at - 4] + (len(good) + 1).to_bytes(4, "little") + content[at:])
    with pytest.raises(DataError, match="image 0 .*its page is damaged"):
        open_images("parquet", tmp_path, "pretrain").read(0)
    (tmp_path / "train.parquet").write_bytes(b"nonsense" * 9)
    with pytest.raises(DataError, match="cannot read .*train.parquet as a Parquet file"):
        open_images("parquet", tmp_path, "pretrain")
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "train.parquet")
    with pytest.raises(DataError, match="has no column of images .columns text.: expected"):
        open_images("parquet", tmp_path, "pretrain")


def test_the_column_of_images_and_labels_that_are_none(plain, tmp_path) -> None:
    """A column of masks before that of images; labels that are no whole numbers are none."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    data = [data for _, data, _ in named(plain, "train")][:4]
    (tmp_path / "train").mkdir()
    columns = {
        name: [{"bytes": content} for content in contents]
        for name, contents in (("a_mask", data[::-1]), ("image", data))
    }
    path = tmp_path / "train" / "0.parquet"
    pq.write_table(pa.table({**columns, "label": [2, 0, 1, 1]}), path)
    images = open_images("parquet", tmp_path, "train")
    assert list(map(images.read, range(4))) == data and images.targets == [2, 0, 1, 1]
    for labels in (["ant", "bee", "ant", "bee"], [0.0, 1.0, 0.0, 1.5]):
        pq.write_table(pa.table({**columns, "label": labels}), path)
        assert open_images("parquet", tmp_path, "pretrain").targets is None
        with pytest.raises(DataError, match="expected a whole number in each row of the column"):
            open_images("parquet", tmp_path, "train")


def test_files_that_name_their_classes_in_another_order_are_refused(plain, tmp_path) -> None:
    root = write_parquets(plain, tmp_path / "one")
    write_parquets(plain, tmp_path / "two")
    pq = pytest.importorskip("pyarrow.parquet")
    table = pq.read_table(tmp_path / "two" / "data" / "train-00001-of-00002.parquet")
    about = table.schema.metadata[b"huggingface"].replace(b'"a-x", "ant"', b'"ant", "a-x"')
    table = table.replace_schema_metadata({"huggingface": about})
    pq.write_table(table, root / "data" / "train-00001-of-00002.parquet")
    with pytest.raises(DataError, match="00001-of-00002.parquet has other names of classes"):
        open_images("parquet", root, "train")


def test_numbers_in_runs_and_packed() -> None:
    """The examples of Parquet's own description: 0 to 7 in three bits, and a run."""
    data = bytes([0b11, 0b10001000, 0b11000110, 0b11111010, 10 << 1, 4])
    assert list(islice(hybrid(data, 3), 18)) == [*range(8), *[4] * 10]
    assert [next(hybrid(data, 3, i)) for i in (0, 7, 8, 17)] == [0, 7, 4, 4]


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ("tar", "no .tar files of the train images in .*expected train/\\*.tar, or"),
        ("parquet", "no .parquet files of the train images"),
    ],
)
def test_missing_files_are_refused_at_parse_time(dataset, message, tmp_path, capsys) -> None:
    words = ["--dataset", dataset, "--device", "cpu", str(tmp_path)]
    status, line = refusal(cli.pretrain_config, words, capsys)
    assert status == 2 and re.search(message, line)


def test_pretraining_and_evaluation_of_archives(data, tmp_path, monkeypatch, capsys) -> None:
    import main_lincls
    import main_moco

    write_tars(data, tmp_path / "tars")
    flags = "-a resnet8 --image-size 32 --batch-size 8 --moco-k 64 --mlp --epochs 1 -j 0".split()
    weights = []
    for dataset, root in (("folder", data), ("tar", tmp_path / "tars")):
        run = tmp_path / dataset
        more = ["--device", "cpu", "--seed", "1", "--dataset", dataset, "--save-dir", str(run)]
        main_moco.main([*flags, *more, str(root)])
        saved = torch.load(run / "checkpoint_0000.pth.tar", weights_only=True)
        weights.append((saved["state_dict"], saved["args"]["images_digest"]))
        assert "k-NN after 1 epoch" in capsys.readouterr().out
        probe = ["--pretrained", str(run), "--lr", "1", "--epochs", "1", "--batch-size", "8"]
        more = ["--dataset", dataset, "--cached", "--save-dir", str(tmp_path / f"{dataset}-lincls")]
        main_lincls.main([*probe, "-j", "0", "--device", "cpu", "--seed", "1", *more, str(root)])
    assert weights[0][1] == weights[1][1]
    for name, tensor in weights[0][0].items():
        assert torch.equal(tensor, weights[1][0][name]), name
    results = [(tmp_path / f"{d}-lincls" / "lincls.json").read_text() for d in ("folder", "tar")]
    assert results[0].partition('"best"')[2][:60] == results[1].partition('"best"')[2][:60]
