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
from networks import OLD, assert_gives, resnet8, saved, under
from PIL import Image
from torch import Tensor

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


def assert_same(got, wanted) -> None:
    """Equal nested content, tensors by value."""
    if isinstance(wanted, Tensor):
        assert torch.equal(got, wanted)
    elif isinstance(wanted, dict):
        assert got.keys() == wanted.keys()
        for key, value in wanted.items():
            assert_same(got[key], value)
    else:
        assert got == wanted


# ---- Writing -------------------------------------------------------------------------------------


def test_what_is_written_is_read_back(tmp_path):
    path = tmp_path / "checkpoint_0002.pth.tar"
    write_checkpoint(path, CONTENT)
    assert_same(read_checkpoint(path), CONTENT)
    raw = torch.load(path, weights_only=True)  # and by anybody else
    assert len(raw.pop("checksum")) == 64
    assert_same(raw, CONTENT)
    assert os.listdir(tmp_path) == [path.name]


def test_a_write_replaces_the_old_file(tmp_path):
    path = tmp_path / "a.pth.tar"
    write_checkpoint(path, {"epoch": 1})
    write_checkpoint(str(path), {"epoch": 2})
    assert read_checkpoint(path) == {"epoch": 2}
    assert os.listdir(tmp_path) == [path.name]


def test_a_failing_write_leaves_the_old_file_and_nothing_else(tmp_path):
    """The failure comes in the middle: the tensors before the object that cannot be saved."""
    path = tmp_path / "a.pth.tar"
    write_checkpoint(path, CONTENT)
    before = path.read_bytes()
    with pytest.raises((AttributeError, TypeError, pickle.PicklingError)):
        write_checkpoint(path, {"queue": torch.zeros(10_000), "bad": (i for i in "ab")})
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]
    with pytest.raises((AttributeError, TypeError, pickle.PicklingError)):
        write_checkpoint(tmp_path / "new.pth.tar", {"bad": (i for i in "ab")})
    assert os.listdir(tmp_path) == [path.name]


def test_a_write_that_cannot_take_its_name_leaves_nothing(tmp_path):
    (tmp_path / "taken.pth.tar").mkdir()
    with pytest.raises(OSError):
        write_checkpoint(tmp_path / "taken.pth.tar", CONTENT)
    assert os.listdir(tmp_path) == ["taken.pth.tar"]
    with pytest.raises(FileNotFoundError):
        write_checkpoint(tmp_path / "nowhere" / "a.pth.tar", CONTENT)


def test_a_file_system_without_fsync_of_folders_is_no_failure(tmp_path, monkeypatch):
    """As network and FUSE file systems answer; any other error is one."""
    real, said = os.fsync, [errno.EINVAL]

    def fsync(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(said[0], "from the folder")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    write_checkpoint(path := tmp_path / "a.pth.tar", CONTENT)
    assert_same(read_checkpoint(path), CONTENT)
    said[0] = errno.EIO
    with pytest.raises(OSError, match="from the folder"):
        write_checkpoint(path, CONTENT)


# ---- Safetensors ---------------------------------------------------------------------------------


ARGS = {"objective": "3*align(alpha=2) + 1*uniform(t=3)", "image_size": 32, "mean": [0.5, 0.4, 0.3],
        "crop_scale": [0.2, 1.0], "name": "größer"}  # fmt: skip


def test_safetensors_say_what_a_checkpoint_says(tmp_path: Path) -> None:
    """For any reader they are tensors by name; the same content makes the same bytes."""
    from safetensors import safe_open

    network = resnet8()
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    state["layer1.0.conv1.weight"] = state["layer1.0.conv1.weight"].transpose(2, 3)
    about = {"arch": "resnet8", "epoch": 7, "args": ARGS}
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
    _, info = load_encoder(path)
    assert (info["arch"], info["epoch"], info["args"]) == ("resnet8", 7, ARGS)
    assert info["objective"] == ARGS["objective"]


def test_safetensors_with_shared_and_half_tensors(tmp_path: Path) -> None:
    tied = torch.arange(6.0)
    state = {"a": tied, "b": tied, "c": tied[2:4], "d": tied.half(), "e": torch.zeros(0, 3)}
    write_safetensors(path := tmp_path / "a.safetensors", state, {"epoch": 1})
    got = checkpoint.read_checkpoint(path)
    assert got["epoch"] == 1 and got["state_dict"].keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(got["state_dict"][name], tensor)
        assert got["state_dict"][name].dtype == tensor.dtype


def test_a_failing_write_of_safetensors_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_safetensors(path, {"a": torch.ones(2)}, {})
    before = path.read_bytes()
    for about in ({"loss": float("nan")}, {"when": object()}):
        with pytest.raises((TypeError, ValueError)):
            write_safetensors(path, {"a": torch.zeros(2)}, about)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("[1]", "its metadata moco_align_uniform is no JSON object"),
        ("{", "is damaged: JSONDecodeError"),
        ('{"version": 99}', "has format version 99, this code reads up to 1"),
        ("[" * 100_000, "is damaged: RecursionError"),
    ],
)
def test_safetensors_that_say_nonsense_are_refused(said: str, message: str, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "a.safetensors"
    save_file(dict(resnet8().state_dict()), path, {"format": "pt", "moco_align_uniform": said})
    with pytest.raises(CheckpointError) as caught:
        load_encoder(path)
    assert str(caught.value).startswith(f"{path}") and message in str(caught.value)


def test_safetensors_without_the_package_says_what_to_install(tmp_path, monkeypatch):
    """As where torch.hub brought this code, which installs nothing."""
    monkeypatch.setitem(sys.modules, "safetensors", None)
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"anything")
    with pytest.raises(CheckpointError, match=f"{path} needs the package safetensors"):
        load_encoder(path)


# ---- Other kinds of files ------------------------------------------------------------------------


def in_zip(entries: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def in_tar() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("a"))
    return buffer.getvalue()


def jpeg() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "JPEG")
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
    "jpeg": (jpeg(), "is of an unknown kind", "Check the path"),
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


def test_a_compressed_checkpoint_is_refused(refusal, tmp_path: Path, state: dict) -> None:
    with zipfile.ZipFile(io.BytesIO(saved(state))) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    (path := tmp_path / "a.pth").write_bytes(in_zip(entries, zipfile.ZIP_DEFLATED))
    assert "is a compressed zip archive, which torch.save never writes" in refusal(path)


def test_what_other_files_are_and_the_remedy(tmp_path: Path) -> None:
    state = resnet8().state_dict()
    torch.save(state, tmp_path / "a.safetensors")
    write_safetensors(tmp_path / "cut.safetensors", state, {})
    data = (tmp_path / "cut.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(data[: len(data) // 2])
    np.savez(tmp_path / "a.npz", **{name: tensor.numpy() for name, tensor in state.items()})
    np.save(tmp_path / "a.npy", np.zeros(3))
    torch.save({"state_dict": {}}, tmp_path / "none.pth")
    torch.save(resnet8(), tmp_path / "module.pth")
    for name, said in (
        ("a.safetensors", "no safetensors file, but one of torch.save; .*Rename it to end in .pth"),
        ("cut.safetensors", "not a whole safetensors file: .*download it again"),
        ("a.npz", "a zip archive of other things .*conv1.weight.npy.*Unpack it"),
        ("a.npy", "of an unknown kind .*NUMPY.*Check the path"),
        ("none.pth", "only an empty dict; expected an encoder's state dict"),
        ("module.pth", r"content.state_dict\(\) of a whole network"),
    ):
        with pytest.raises(CheckpointError, match=said) as caught:
            load_encoder(tmp_path / name)
        assert "\n" not in str(caught.value) and str(tmp_path / name) in str(caught.value)


# ---- Damage --------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*old format")
@pytest.mark.parametrize("options", [{}, OLD], ids=["zip", "legacy"])
def test_a_truncated_file_is_refused_by_name(tmp_path, options):
    """Of any length, in both of torch's formats."""
    whole = saved(CONTENT, **options)
    (path := tmp_path / "a.pth.tar").write_bytes(whole)
    assert_same(read_checkpoint(path), CONTENT)
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


def test_what_follows_an_old_file_is_noticed(refusal, tmp_path: Path, state: dict) -> None:
    torch.save(state, path := tmp_path / "a.pth", **OLD)
    whole = path.read_bytes()
    for more in (b"x", saved(state)):  # an archive with right CRCs behind a bare pickle
        path.write_bytes(whole + more)
        assert "something follows" in refusal(path)


def test_an_archive_before_the_archive_is_noticed(refusal, tmp_path: Path, state: dict) -> None:
    """Two readers might take one each: zipfile the last, torch the first."""
    (path := tmp_path / "a.pth").write_bytes(2 * saved(state))
    assert "damaged" in refusal(path)


def test_the_same_name_twice_in_an_archive_is_refused(refusal, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive, warnings.catch_warnings(action="ignore"):
        for data in (b"1", b"2"):
            archive.writestr("a/data.pkl", data)
    (path := tmp_path / "a.pth").write_bytes(buffer.getvalue())
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
    refusal, count: int, options, tmp_path: Path
) -> None:
    torch.save({"a": Larger(count)}, path := tmp_path / "a.pth", **options)
    assert "is damaged" in refusal(path)


def test_a_tensor_that_repeats_one_number_without_end_is_refused(refusal, tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1).expand(10**12)}, path := tmp_path / "a.pth")
    assert "declares more numbers" in refusal(path)


def test_values_without_end_are_refused(refusal, tmp_path: Path, state: dict) -> None:
    laughs: list = []
    for _ in range(30):
        laughs = [laughs] * 10  # a few bytes in the pickle, 10^30 lists
    deep: list = []
    for _ in range(200):
        deep = [deep]
    endless: dict = {}
    endless["itself"] = endless
    for content in (laughs, deep, endless):
        torch.save({**state, "more": content, "checksum": "x"}, path := tmp_path / "a.pth")
        assert "no end of nested values" in refusal(path)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", ["plain", "state_dict", "optimizer"])
def test_weights_that_are_not_finite_are_named(
    refusal, number: float, place: str, tmp_path: Path, state: dict
) -> None:
    weights = {key: tensor.clone() for key, tensor in state.items()}
    momentum = torch.zeros(3)
    content = {"state_dict": weights, "optimizer": {"state": {0: {"momentum_buffer": momentum}}}}
    if place == "optimizer":
        momentum[1] = number
    else:
        weights["layer1.0.conv1.weight"].view(-1)[7] = number
    path = tmp_path / "a.pth"
    write_checkpoint(path, weights if place == "plain" else content)
    message = refusal(path)
    name = "state.0.momentum_buffer" if place == "optimizer" else "layer1.0.conv1.weight"
    assert f"holds NaN or infinity in {'' if place == 'plain' else f'{place}.'}{name}" in message
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


def test_arrays_of_other_things_than_numbers_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.pkl"
    objects = np.array([{"a": 1}, None], dtype=object)
    for array, said in (
        (objects, "is a pickle that holds an array of type |O8"),
        (np.ones(2, dtype=">f4"), "is a pickle that holds an array of type >f4"),
        (np.array(["a"]), "is a pickle that holds an array of type <U1"),
        ([1.0, 2.0], "is a pickle that holds other things than numpy arrays by name"),
        (np.array([1.0, np.nan]), "holds NaN or infinity in model.a"),
    ):
        path.write_bytes(pickle.dumps({"model": {"a": array}}))
        with pytest.raises(CheckpointError) as caught:
            load_encoder(path)
        assert said in str(caught.value) and str(path) in str(caught.value)


# ---- Torch's old format, and versions of this project's ------------------------------------------


def test_old_files_are_read_and_the_load_says_what_was_checked(tmp_path: Path, state: dict) -> None:
    torch.save({"arch": "resnet8", "state_dict": state}, path := tmp_path / "a.pth.tar", **OLD)
    with pytest.warns(UserWarning, match="a.pth.tar is in torch's old format.*only its structure"):
        encoder, info = load_encoder(path)
    assert info["arch"] == "resnet8"
    assert all(torch.equal(t, state[key]) for key, t in encoder.state_dict().items())


def test_an_old_file_with_our_checksum_is_checked_whole(
    refusal, tmp_path: Path, state: dict
) -> None:
    content = {"state_dict": state}
    content["checksum"] = checkpoint.checksum(content)
    torch.save(content, path := tmp_path / "a.pth", **OLD)
    with warnings.catch_warnings(action="error"):
        load_encoder(path)
    data = bytearray(path.read_bytes())
    data[data.index(state["layer2.0.conv1.weight"].numpy().tobytes()) + 100] ^= 1
    path.write_bytes(data)
    assert "does not match its checksum" in refusal(path)


def version_1() -> dict:
    """Written out as the first version of main_moco.py did."""
    moco = under("module.encoder_q.", resnet8().state_dict())
    return {
        "version": 1,
        "arch": "resnet8",
        "epoch": 3,
        "step": 30,
        "step_in_epoch": 0,
        "state_dict": {**moco, **under("module.encoder_k.", resnet8(seed=1).state_dict())},
        "optimizer": {"state": {}, "param_groups": []},
        "args": {"objective": "1*align", "image_size": 32},
    }


def test_older_files_are_read(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint_0002.pth.tar"
    old = version_1()
    write_checkpoint(path, old)
    assert_gives(path, resnet8(), "projection", epoch=3, objective="1*align", layout="moco")
    del old["version"]  # upstream's have none
    torch.save(old, path)
    assert_gives(path, resnet8(), "projection", epoch=3, objective="1*align", layout="moco")


@pytest.mark.parametrize(
    "save", [write_checkpoint, lambda path, content: torch.save(content, path)]
)
def test_a_newer_file_is_refused_by_name(save, tmp_path: Path) -> None:
    """Whatever else is new in it, such as the way of its checksum."""
    newer = checkpoint.FORMAT_VERSION + 1
    path = tmp_path / "checkpoint_0002.pth.tar"
    for content in (
        {**version_1(), "version": newer},
        {**version_1(), "version": newer, "checksum": "of another kind"},
        {"version": newer, "networks": []},
    ):
        save(path, content)
        for read in (checkpoint.read_checkpoint, load_encoder):
            with pytest.raises(CheckpointError) as caught:
                read(path)
            message = str(caught.value)
            assert f"{path} has format version {newer}, this code reads up to" in message
            assert "update" in message and "\n" not in message


@pytest.mark.parametrize("write", [write_text, lambda path, _: write_atomically(path, bool)])
def test_what_a_killed_process_left_beside_a_file_goes_with_the_next_one(write, tmp_path: Path):
    """Not what another one is writing: that is young, or locked."""
    names = [f".a[1].json.{word}.tmp" for word in ("dead", "young", "live")]
    for name in [*names, "other.tmp"]:
        (tmp_path / name).touch()
    for name in (names[0], names[2], "other.tmp"):
        os.utime(tmp_path / name, (0, 0))
    with open(tmp_path / names[2], "rb") as live:
        fcntl.flock(live, fcntl.LOCK_EX)
        write(tmp_path / "a[1].json", "text")
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"a[1].json", names[1], names[2], "other.tmp"}


def test_what_a_killed_process_left_beside_a_folder_goes_with_the_next_one(tmp_path: Path) -> None:
    names = [f".out.{word}.tmp" for word in ("dead", "young", "live")]
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    for name in (names[0], names[2]):
        os.utime(tmp_path / name, (0, 0))
    live = os.open(tmp_path / names[2], os.O_RDONLY)
    fcntl.flock(live, fcntl.LOCK_EX)
    with folder_beside(tmp_path / "out") as own:
        assert own.parent == tmp_path and own.is_dir()
    os.close(live)
    assert {path.name for path in tmp_path.iterdir()} == set(names[1:])
