"""Checkpoint files: written whole or not at all, read whole and unchanged or refused by name."""

from __future__ import annotations

import collections
import errno
import fcntl
import gzip
import io
import json
import os
import pickle
import stat
import struct
import sys
import tarfile
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from harness import differences
from networks import OLD, in_zip, resnet8, saved
from safetensors import safe_open
from safetensors.torch import save_file

from moco import checkpoint
from moco.checkpoint import load_encoder, read_checkpoint, write_checkpoint, write_safetensors
from moco.checkpoint.files import write_atomically
from moco.errors import CheckpointError
from moco.run_files import folder_beside, write_text

CONTENT = {
    "epoch": 3,
    "arch": "resnet8",
    "state_dict": {"module.queue": torch.arange(1000.0).view(10, 100)},
    "optimizer": {"state": {}, "param_groups": [{"lr": 0.03, "params": [0, 1]}]},
    "args": {"objective": "x", "schedule": [120, 160], "resume": None},
}


# ---- Writing -------------------------------------------------------------------------------------


def test_what_is_written_is_read_back(tmp_path):
    path = tmp_path / "checkpoint_0002.pth.tar"
    write_checkpoint(path, {"epoch": 1})
    write_checkpoint(str(path), CONTENT)  # replaces the old file
    assert not differences(read_checkpoint(path), CONTENT)
    raw = torch.load(path, weights_only=True)  # and by anybody else
    assert len(raw.pop("checksum")) == 64
    assert not differences(raw, CONTENT)
    assert os.listdir(tmp_path) == [path.name]


def test_a_failing_write_leaves_what_was_there_and_nothing_else(tmp_path):
    """The failure comes in the middle: the tensors before the object that cannot be saved."""
    path = tmp_path / "a.pth.tar"
    write_checkpoint(path, CONTENT)
    before = path.read_bytes()
    safe = tmp_path / "a.safetensors"
    write_safetensors(safe, {"a": torch.ones(2)}, {})
    safe_before = safe.read_bytes()
    (tmp_path / "taken.pth.tar").mkdir()
    bad = {"queue": torch.zeros(10_000), "bad": (i for i in "ab")}
    unpicklable = (AttributeError, TypeError, pickle.PicklingError)
    for write, name, *args, error in (
        (write_checkpoint, "a.pth.tar", bad, unpicklable),
        (write_checkpoint, "new.pth.tar", bad, unpicklable),
        (write_checkpoint, "taken.pth.tar", CONTENT, OSError),
        (write_checkpoint, "nowhere/a.pth.tar", CONTENT, FileNotFoundError),
        (write_safetensors, "a.safetensors", {"a": torch.zeros(2)}, {"x": torch.nan}, ValueError),
        (write_safetensors, "a.safetensors", {"a": torch.zeros(2)}, {"x": object()}, TypeError),
    ):
        with pytest.raises(error):
            write(tmp_path / name, *args)
    assert path.read_bytes() == before and safe.read_bytes() == safe_before
    assert sorted(os.listdir(tmp_path)) == ["a.pth.tar", "a.safetensors", "taken.pth.tar"]


def test_a_file_system_without_fsync_of_folders_is_no_failure(tmp_path, monkeypatch):
    """As network and FUSE file systems answer; any other error is one."""
    real, said = os.fsync, [errno.EINVAL]

    def fsync(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(said[0], "from the folder")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    write_checkpoint(path := tmp_path / "a.pth.tar", CONTENT)
    assert not differences(read_checkpoint(path), CONTENT)
    said[0] = errno.EIO
    with pytest.raises(OSError, match="from the folder"):
        write_checkpoint(path, CONTENT)


# ---- Safetensors ---------------------------------------------------------------------------------


def test_safetensors_say_what_a_checkpoint_says(state: dict, tmp_path: Path) -> None:
    """For any reader they are tensors by name; the same content makes the same bytes."""
    state["layer1.0.conv1.weight"] = state["layer1.0.conv1.weight"].transpose(2, 3)
    args = {"objective": "3*align(alpha=2)", "mean": [0.5, 0.4, 0.3], "name": "größer"}
    about = {"arch": "resnet8", "epoch": 7, "args": args}
    for name in ("a", "b"):
        write_safetensors(tmp_path / f"{name}.safetensors", state, about)
    path = tmp_path / "a.safetensors"
    assert path.read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]
    with safe_open(path, "pt") as file:
        assert {name: file.get_tensor(name).shape for name in file.keys()} == {
            name: tensor.shape for name, tensor in state.items()
        }
        metadata = file.metadata()
    assert metadata["format"] == "pt"
    said = json.loads(metadata["moco_align_uniform"])
    assert len(said.pop("checksum")) == 64
    assert said == {**about, "version": checkpoint.FORMAT_VERSION}
    info = load_encoder(path)[1]
    assert {key: info[key] for key in about} == about and info["objective"] == args["objective"]


def test_safetensors_with_shared_and_half_tensors(tmp_path: Path) -> None:
    tied = torch.arange(6.0)
    state = {"a": tied, "b": tied, "c": tied[2:4], "d": tied.half(), "e": torch.zeros(0, 3)}
    write_safetensors(path := tmp_path / "a.safetensors", state, {"epoch": 1})
    got = checkpoint.read_checkpoint(path)
    assert got["epoch"] == 1 and got["state_dict"].keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(got["state_dict"][name], tensor)
        assert got["state_dict"][name].dtype == tensor.dtype


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("[1]", "its metadata moco_align_uniform is no JSON object"),
        ("{", "is damaged: JSONDecodeError"),
        ('{"version": 99}', "has format version 99, this code reads up to 1"),
        ("[" * 100_000, "is damaged: RecursionError"),
    ],
)
def test_safetensors_that_say_nonsense_are_refused(
    said: str, message: str, refusal, state: dict, tmp_path: Path
) -> None:
    path = tmp_path / "a.safetensors"
    save_file(state, path, {"format": "pt", "moco_align_uniform": said})
    assert message in refusal(path)


def test_safetensors_without_the_package_says_what_to_install(refusal, tmp_path, monkeypatch):
    """As where torch.hub brought this code, which installs nothing."""
    monkeypatch.setitem(sys.modules, "safetensors", None)
    (path := tmp_path / "model.safetensors").write_bytes(b"anything")
    assert f"{path} needs the package safetensors" in refusal(path)


# ---- Other kinds of files ------------------------------------------------------------------------


def in_tar() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("a"))
    return buffer.getvalue()


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab\nsize 370000000\n"
BOMB = {"a/data.pkl": b"", "a/data/0": bytes(50_000_000)}
# kind of file: (its bytes, what it is said to be, what is advised)
KINDS = {
    "empty": (b"", "is empty", "again"),
    "zeros": (bytes(10_000), "nothing but zeros", "again"),
    "web page": (b"<!DOCTYPE html>\n<html><body>403", "is a web page", "Download it again"),
    "xml": (b'\n <?xml version="1.0"?><Error/>', "is a web page", "Download it again"),
    "git-lfs": (LFS, "is a git-lfs pointer", "git lfs pull"),
    "gzip": (gzip.compress(b"weights"), "is of an unknown kind", "unpack it if it is an archive"),
    "tar": (in_tar(), "is of an unknown kind (it begins with b'a\\x00", "unpack it"),
    "text": (b"0.12 0.34\n", "is a text file", "Check the path"),
    "noise": (b"\xf0\x12\x93" * 99, "is of an unknown kind", "Check the path"),
    "safetensors": (struct.pack("<Q", 2) + b'{"a":0}', "safetensors", "Rename it"),
    "zip": (in_zip({"readme.txt": b"hello"}), "a zip archive of other things", "Unpack it"),
    "zip bomb": (in_zip(BOMB, zipfile.ZIP_DEFLATED), "would become 50000000", "zip -0"),
    "program": (
        in_zip({"a/data.pkl": b"", "a/constants.pkl": b""}),
        "is a TorchScript program",
        "torch.jit.load",
    ),
    "a list": (saved([torch.ones(2)]), "holds a list instead of a dict", "state_dict()"),
    "a pickle": (pickle.dumps([1, 2], 2), "holds other things than numpy arrays", "state_dict()"),
    "a tensor": (saved(torch.ones(2)), "holds a Tensor instead of a dict", "state_dict()"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_other_kinds_of_files_are_told_apart(refusal, kind: str, tmp_path: Path) -> None:
    data, what, remedy = KINDS[kind]
    (path := tmp_path / "checkpoint_0199.pth.tar").write_bytes(data)
    message = refusal(path)
    assert what in message and "expected a checkpoint as torch.save writes it" in message
    assert remedy in message.split("expected a checkpoint")[1]


@pytest.mark.parametrize("kind", ["web page", "git-lfs", "noise"])
def test_other_kinds_under_the_name_of_safetensors(refusal, kind: str, tmp_path: Path) -> None:
    (path := tmp_path / "a.safetensors").write_bytes(KINDS[kind][0])
    assert refusal(path)


def test_folders_and_missing_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is a folder; give a file in it"):
        read_checkpoint(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such checkpoint"):
        read_checkpoint(tmp_path / "missing.pth")


def test_a_zip_bomb_of_overlapping_entries_is_refused_before_it_is_unpacked(
    refusal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: dict
) -> None:
    """The directory lists one stored entry a thousand times."""
    data = in_zip({"a/data.pkl": b"", "a/data/0": bytes(10_000)})
    start = data.index(b"PK\x01\x02")
    second = data.index(b"PK\x01\x02", start + 4)
    end = data.index(b"PK\x05\x06")
    directory = data[start:second] + 1000 * data[second:end]
    tail = struct.pack("<IHHHHIIH", 0x06054B50, 0, 0, 1001, 1001, len(directory), start, 0)
    (path := tmp_path / "a.pth").write_bytes(data[:start] + directory + tail)
    monkeypatch.setattr(zipfile.ZipFile, "testzip", lambda _: pytest.fail("it was unpacked"))
    assert "would become 10000000, perhaps to fill the memory" in refusal(path)


def test_what_other_files_are_and_the_remedy(refusal, save, state: dict, tmp_path: Path) -> None:
    write_safetensors(cut := tmp_path / "cut.safetensors", state, {})
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    for path, said in (
        (save(state, "a.safetensors"), "no safetensors file, but one of torch.save"),
        (tmp_path / "a.safetensors", "Rename it to end in .pth"),
        (cut, "not a whole safetensors file: "),
        (cut, "download it again"),
        (save(resnet8()), "content.state_dict() of a whole network"),
    ):
        assert said in refusal(path)


# ---- Damage --------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*old format")
@pytest.mark.parametrize("options", [{}, OLD], ids=["zip", "legacy"])
def test_a_truncated_file_is_refused_by_name(tmp_path, options):
    """Of any length, in both of torch's formats."""
    whole = saved(CONTENT, **options)
    (path := tmp_path / "a.pth.tar").write_bytes(whole)
    assert not differences(read_checkpoint(path), CONTENT)
    lengths = {*range(0, 60), *range(60, len(whole), 61), len(whole) - 1}
    for length in sorted(lengths):
        path.write_bytes(whole[:length])
        try:
            with pytest.raises(CheckpointError, match=str(path)):
                read_checkpoint(path)
        except Exception as error:
            raise AssertionError(f"{length} of {len(whole)} bytes: {error!r}") from error


def test_a_flipped_bit_in_a_tensor_is_found(refusal, tmp_path: Path, state: dict) -> None:
    data = bytearray(saved(state))
    data[data.index(state["layer2.0.conv1.weight"].numpy().tobytes()) + 100] ^= 1
    (path := tmp_path / "a.pth").write_bytes(data)
    torch.load(path, weights_only=True)  # does not see it
    message = refusal(path)
    assert "is damaged: wrong checksum in" in message and f"{len(data)}" in message


def test_an_archive_with_a_file_before_or_behind_it_is_noticed(
    refusal, tmp_path: Path, state: dict
) -> None:
    """Two readers might take one each: zipfile the last, torch the first."""
    path, old, new = tmp_path / "a.pth", saved(state, **OLD), saved(state)
    for data, said in ((old + b"x", "something follows"), (old + new, "something follows"),
                       (2 * new, "damaged")):  # fmt: skip
        path.write_bytes(data)
        assert said in refusal(path)
    with zipfile.ZipFile(path, "w") as archive, warnings.catch_warnings(action="ignore"):
        for data in (b"1", b"2"):
            archive.writestr("a/data.pkl", data)
    assert "not one that torch.save writes" in refusal(path)


# ---- Content -------------------------------------------------------------------------------------


class Larger:
    """Pickles to a tensor of more numbers than its storage has."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __reduce__(self):
        storage = torch.ones(4).storage()
        rebuild = torch._utils._rebuild_tensor_v2
        return rebuild, (storage, 0, (self.count,), (1,), False, collections.OrderedDict())


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
@pytest.mark.parametrize("count", [5, 10**6, 10**12])
@pytest.mark.parametrize("options", [{}, OLD], ids=["zip", "old"])
def test_a_tensor_of_more_numbers_than_are_stored_is_refused(
    refusal, count: int, options, save
) -> None:
    assert "is damaged" in refusal(save({"a": Larger(count)}, **options))
    repeated = {"a": torch.ones(1).expand(1000 * count)}
    assert "declares more numbers" in refusal(save(repeated, **options))


@pytest.mark.parametrize("place", ["state_dict", "optimizer"])
def test_weights_that_are_not_finite_are_named(
    refusal, place: str, tmp_path: Path, state: dict
) -> None:
    momentum = torch.zeros(3)
    content = {"state_dict": state, "optimizer": {"state": {0: {"momentum_buffer": momentum}}}}
    name = "state.0.momentum_buffer" if place == "optimizer" else "layer1.0.conv1.weight"
    (momentum if place == "optimizer" else state[name]).view(-1)[1] = torch.nan
    write_checkpoint(path := tmp_path / "a.pth", content)
    message = refusal(path)
    assert f"holds NaN or infinity in {place}.{name}" in message
    assert "Use an earlier checkpoint" in message


def test_running_means_of_the_log_may_be_infinite(tmp_path: Path, state: dict) -> None:
    """As a gradient norm is when fp16 overflows: the step was left out, the weights are good."""
    path = tmp_path / "a.pth"
    write_checkpoint(path, {"state_dict": state, "means": {"grad_norm": torch.tensor(torch.inf)}})
    assert load_encoder(path)[1]["arch"] == "resnet8"


# ---- Pickles of arrays ---------------------------------------------------------------------------


def small_pickle(protocol: int) -> tuple[bytes, dict[str, np.ndarray]]:
    arrays = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "by.columns": np.asfortranarray(np.arange(12, dtype=np.float64).reshape(3, 4)),
        "half": np.array([1.5, -2], dtype=np.float16),
        "count": np.array(7, dtype=np.int64),
        "none": np.zeros((0, 4), dtype=np.float32),
        "flags": np.array([True, False]),
    }
    return pickle.dumps({"model": arrays, "__author__": "me"}, protocol), arrays


@pytest.mark.filterwarnings("ignore:.*pickle of arrays")
@pytest.mark.parametrize("protocol", [2, 5])
@pytest.mark.parametrize("numpy_1", [False, True])
def test_arrays_of_every_protocol_and_numpy(protocol: int, numpy_1: bool, tmp_path: Path) -> None:
    data, arrays = small_pickle(protocol)
    if numpy_1:  # the module's older name; from protocol 4 on a byte before it has its length
        data = data.replace(b"\x16numpy._core.multiarray", b"\x15numpy.core.multiarray")
        data = data.replace(b"\x13numpy._core.numeric", b"\x12numpy.core.numeric")
        data = data.replace(b"cnumpy._core.multiarray", b"cnumpy.core.multiarray")
        if protocol > 3:  # the frame has become shorter
            at = data.index(b"\x95")
            data = data[:at] + data[at + 9 :]
        assert b"_core" not in data
    (path := tmp_path / "a.pkl").write_bytes(data)
    content = checkpoint.read_checkpoint(path)
    assert content["__author__"] == "me" and content["model"].keys() == arrays.keys()
    for name, array in arrays.items():
        got = content["model"][name]
        assert got.dtype == torch.from_numpy(array).dtype and tuple(got.shape) == array.shape
        assert np.array_equal(got.numpy(), array), name


def test_arrays_of_other_things_than_numbers_are_refused(refusal, tmp_path: Path) -> None:
    for array, said in (
        (np.array([{"a": 1}, None], dtype=object), "a pickle that holds an array of type |O8"),
        (np.ones(2, dtype=">f4"), "a pickle that holds an array of type >f4; known are little-e"),
        (np.array(["a"]), "a pickle that holds an array of type <U1"),
        ([1.0, 2.0], "a pickle that holds other things than numpy arrays by name"),
        (np.array([1.0, np.nan]), "holds NaN or infinity in model.a"),
    ):
        (path := tmp_path / "a.pkl").write_bytes(pickle.dumps({"model": {"a": array}}))
        assert said in refusal(path)


# ---- Torch's old format, and versions of this project's ------------------------------------------


def test_an_old_file_with_our_checksum_is_checked_whole(refusal, save, state: dict) -> None:
    content = {"state_dict": state}
    path = save({**content, "checksum": checkpoint.checksum(content)}, **OLD)
    with warnings.catch_warnings(action="error"):
        load_encoder(path)
    data = bytearray(path.read_bytes())
    data[data.index(state["layer2.0.conv1.weight"].numpy().tobytes()) + 100] ^= 1
    path.write_bytes(data)
    assert "does not match its checksum" in refusal(path)


@pytest.mark.parametrize(
    "write", [write_checkpoint, lambda path, content: torch.save(content, path)]
)
def test_a_newer_file_is_refused_by_name(write, refusal, state: dict, tmp_path: Path) -> None:
    """Whatever else is new in it, such as the way of its checksum."""
    newer = checkpoint.FORMAT_VERSION + 1
    for content in ({"state_dict": state, "checksum": "of another kind"}, {"networks": []}):
        write(path := tmp_path / "checkpoint_0002.pth.tar", {"version": newer, **content})
        message = refusal(path)
        assert f"{path} has format version {newer}, this code reads up to" in message
        assert "update" in message


def make_folder(path: Path) -> None:
    with folder_beside(path) as own:
        assert own.parent == path.parent and own.is_dir()


@pytest.mark.parametrize(
    ("write", "make"),
    [
        (lambda path: write_text(path, "text"), Path.touch),
        (lambda path: write_atomically(path, bool), Path.touch),
        (make_folder, lambda path: (path / "inside").mkdir(parents=True)),
    ],
    ids=["text", "file", "folder"],
)
def test_what_a_killed_process_left_goes_with_the_next_write(write, make, tmp_path: Path) -> None:
    """Not what another one is writing: that is young, or locked."""
    dead, young, live = (tmp_path / f".a[1].json.{word}.tmp" for word in ("dead", "young", "live"))
    for path in (dead, young, live, other := tmp_path / "other.tmp"):
        make(path)
    for path in (dead, live, other):
        os.utime(path, (0, 0))
    lock = os.open(live, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    write(tmp_path / "a[1].json")
    os.close(lock)
    assert {*tmp_path.iterdir()} - {tmp_path / "a[1].json"} == {young, live, other}
