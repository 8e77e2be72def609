"""Files of features: written and read back in both formats, and one line for every bad one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import reference
import safetensors.torch
import torch

from moco.errors import DataError
from moco.evaluate.feature_files import FeatureSet, read_features, unit_rows, write_features

SUFFIXES = pytest.mark.parametrize("suffix", [".npz", ".safetensors"])


def rows(n: int = 30, c: int = 4, seed: int = 0) -> torch.Tensor:
    return reference.unit_rows(n, c, seed, torch.float32)


@SUFFIXES
def test_what_is_written_is_read(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a{suffix}"
    content = FeatureSet(
        rows(), rows(seed=1), torch.arange(30) % 3, ["cat", "é", "a b"], ["x.png"] * 30,
        {"layer": "projection", "mean": [0.5, 0.5, 0.5]},
    )  # fmt: skip
    write_features(path, content)
    found = read_features(str(path))
    assert torch.equal(found.features, content.features)
    assert torch.equal(found.second_view, content.second_view)
    assert torch.equal(found.labels, content.labels)
    assert (found.classes, found.about) == (content.classes, content.about)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@SUFFIXES
def test_features_alone(suffix: str, tmp_path: Path) -> None:
    """As others write them; and images in no class, which are written with the label -1."""
    path = tmp_path / f"a{suffix}"
    write_features(path, FeatureSet(rows()))
    found = read_features(path)
    assert found.second_view is None and found.labels is None and not found.classes
    if suffix == ".npz":
        np.savez(path, features=rows().numpy())
    else:
        safetensors.torch.save_file({"features": rows()}, path)
    found = read_features(path)
    assert torch.equal(found.features, rows()) and not found.about


def test_a_name_that_is_no_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must end in .npz or .safetensors"):
        write_features(tmp_path / "a.txt", FeatureSet(rows()))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["<f2", ">f4", "<f4", "<f8", "longdouble", "bfloat16"])
def test_features_of_every_type(kind: str, tmp_path: Path) -> None:
    """float64 stays, all others become float32; labels of any whole type."""
    if kind == "bfloat16":
        path = tmp_path / "a.safetensors"
        arrays = {"features": rows().bfloat16(), "labels": torch.arange(30, dtype=torch.uint8)}
        safetensors.torch.save_file(arrays, path)
    else:
        path = tmp_path / "a.npz"
        np.savez(path, features=rows().numpy().astype(kind), labels=np.arange(30, dtype=">u2"))
    found = read_features(path)
    wide = kind in ("<f8", "longdouble")
    assert found.features.dtype == (torch.float64 if wide else torch.float32)
    torch.testing.assert_close(found.features.float(), rows(), atol=4e-3, rtol=0)
    assert found.labels.tolist() == list(range(30))


def test_positives_is_another_name_and_pickled_names_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    names = np.array(["a", None], dtype=object)  # never unpickled
    np.savez(path, features=rows(), positives=rows(seed=1), features_2=rows(seed=2),
             paths=names, classes=names)  # fmt: skip
    found = read_features(path)
    assert torch.equal(found.second_view, rows(seed=1)) and not found.classes


def spoilt(value: float, row: int) -> np.ndarray:
    x = rows().numpy().copy()
    x[row, 1] = value
    return x


BAD = {
    "NaN": ({"features": spoilt(np.nan, 17)}, "NaN or infinite values in 1 of 30.* in row 17"),
    "infinity": ({"features_2": spoilt(-np.inf, 5)}, "features_2 has NaN or infinite values"),
    "empty": ({"features": np.zeros((0, 2), np.float32)}, r"at least 1, got float32 .*\(0, 2\)"),
    "no width": ({"features": np.zeros((5, 0), np.float32)}, r"\(5, 0\)"),
    "one dimension": ({"features": np.zeros(30, np.float32)}, r"\(N, C\).*\(30,\)"),
    "whole numbers": ({"features": np.zeros((30, 2), np.int64)}, "floating-point.*got int64"),
    "no features": ({"features": None}, "has no array `features`"),
    "other second view": ({"features_2": rows(29)}, r"features_2 must pair up.*\(29, 4\)"),
    "other positives": ({"positives": rows(30, 5)}, r"positives must pair up.*\(30, 5\)"),
    "too few labels": ({"labels": np.arange(29)}, r"labels must be 30 whole numbers.*\(29,\)"),
    "labels as floats": ({"labels": np.arange(30) / 2}, "whole numbers, got float64"),
    "complex labels": ({"labels": np.arange(30) * 1j}, "whole numbers"),
    "labels as text": ({"labels": np.array(["a"] * 30)}, "plain arrays"),
    "pickled": ({"features": np.array([{}, {}], dtype=object)}, "plain arrays.*allow_pickle"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_content_is_named(name: str, tmp_path: Path) -> None:
    arrays, reason = BAD[name]
    path = tmp_path / "bad.npz"
    arrays = {"features": rows(), "labels": np.arange(30), **arrays}
    np.savez(path, **{key: array for key, array in arrays.items() if array is not None})
    with pytest.raises(DataError, match=f"bad.npz.*{reason}") as refused:
        read_features(path)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.npz", b""),
        ("a.npz", b"PK\x03\x04 cut"),
        ("a.npz", b"hello"),
        ("a.safetensors", b"x" * 9),
        ("a.SafeTensors", b"x" * 9),
        ("a.txt", b"1 2 3"),
        ("a.npz", "single"),
        ("missing.npz", None),
        ("missing.safetensors", None),
    ],
)
def test_files_that_are_something_else(name: str, content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / name
    if content == "single":
        with open(path, "wb") as file:
            np.save(file, rows().numpy())
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=name) as refused:
        read_features(path)
    assert ("no such file of features" in str(refused.value)) == (content is None)


def test_unit_rows_are_divided_by_their_length() -> None:
    x, changed = unit_rows(3 * rows(), "features", "a.npz")
    torch.testing.assert_close(x, rows())
    assert changed and not unit_rows(rows(), "features", "a.npz")[1]
    x[4] = 0
    with pytest.raises(DataError, match="a.npz: row 4 of features is zero"):
        unit_rows(x, "features", "a.npz")
