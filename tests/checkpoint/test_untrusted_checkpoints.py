"""Files from anywhere: nothing in them is run, and each kind of wrong file has its own message."""

from __future__ import annotations

import builtins
import collections
import gzip
import io
import os
import pickle
import struct
import tarfile
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from moco import checkpoint, encoders
from moco.checkpoint import load_encoder, read_checkpoint, write_checkpoint
from moco.errors import CheckpointError


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return dict(encoders.build_encoder("resnet8", 10).state_dict())


def old_format(content: object, path: Path) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=False)


def new_format(content: object, path: Path) -> None:
    torch.save(content, path)


def refusal(path: Path) -> str:
    """The message with which a file is refused, wherever it is read."""
    said = []
    for read in (read_checkpoint, load_encoder):
        with pytest.raises(CheckpointError) as caught:
            read(path)
        said.append(str(caught.value))
    assert said[0] == said[1] and str(path) in said[0] and "\n" not in said[0]
    return said[0]


# ------------------------------------------------------------------------------------------------
# Code
# ------------------------------------------------------------------------------------------------


class Runs:
    """Pickles to a call."""

    def __init__(self, function, *arguments) -> None:
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def attacks(marker: Path) -> dict[str, object]:
    touch = f"open({str(marker)!r}, 'w')"
    return {
        "os.system": Runs(os.system, f"touch {marker}"),
        "eval": Runs(eval, touch),
        "exec": Runs(exec, touch),
        "open": Runs(builtins.open, str(marker), "w"),
        "nested": collections.OrderedDict(a=[{"b": Runs(eval, touch)}]),
        "state": Runs(torch.storage._load_from_bytes, pickle.dumps(Runs(eval, touch))),
        "getattr": Runs(getattr, Runs(__import__, "os"), "system"),
    }


@pytest.mark.parametrize("name", attacks(Path()))
@pytest.mark.parametrize("save", [old_format, new_format])
def test_a_pickle_that_wants_to_run_code_is_refused_and_runs_nothing(
    name: str, save, tmp_path: Path, state: dict
) -> None:
    marker = tmp_path / "it-ran"
    content = {**state, "extra": attacks(marker)[name]}
    save(content, path := tmp_path / "a.pth")
    message = refusal(path)
    assert "can be read safely, and nothing in it was run: it asks for" in message
    assert "If you trust its author" in message
    assert not marker.exists()
    torch.load(path, weights_only=False) if name == "eval" else None
    assert marker.exists() == (name == "eval"), "the attack itself works"


@pytest.mark.filterwarnings("ignore:Detected pickle protocol 4")
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_bare_pickle_is_refused_and_runs_nothing(protocol: int, tmp_path: Path) -> None:
    marker = tmp_path / "it-ran"
    path = tmp_path / "a.pth"
    path.write_bytes(pickle.dumps(attacks(marker)["os.system"], protocol))
    assert refusal(path)
    assert not marker.exists()


def test_environment_cannot_switch_safety_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: dict
) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    torch.save({**state, "extra": attacks(tmp_path / "it-ran")["eval"]}, tmp_path / "a.pth")
    assert "nothing in it was run" in refusal(tmp_path / "a.pth")


# ------------------------------------------------------------------------------------------------
# Other kinds of files
# ------------------------------------------------------------------------------------------------


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


def as_torch_saves(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
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
    "png": (b"\x89PNG\r\n\x1a\n" + bytes(99), "is of an unknown kind", "Check the path"),
    "gzip": (gzip.compress(b"weights"), "is of an unknown kind", "unpack it if it is an archive"),
    "tar": (in_tar(), "is of an unknown kind (it begins with b'a\\x00", "unpack it"),
    "text": (b"0.12 0.34\n", "is a text file", "Check the path"),
    "noise": (b"\xf0\x12\x93" * 99, "is of an unknown kind", "Check the path"),
    "hdf5": (
        b"\x89HDF\r\n\x1a\n" + bytes(99),
        "of an unknown kind (it begins with b'\\x89HDF",
        "Check the path",
    ),
    "safetensors": (struct.pack("<Q", 2) + b'{"a":0}', "safetensors", "Rename it"),
    "zip": (in_zip({"readme.txt": b"hello"}), "a zip archive of other things", "Unpack it"),
    "zip bomb": (in_zip(BOMB, zipfile.ZIP_DEFLATED), "would become 50000000", "zip -0"),
    "program": (
        in_zip({"a/data.pkl": b"", "a/constants.pkl": b""}),
        "is a TorchScript program",
        "torch.jit.load",
    ),
    "a list": (as_torch_saves([torch.ones(2)]), "holds a list instead of a dict", "state_dict()"),
    "a tensor": (as_torch_saves(torch.ones(2)), "holds a Tensor instead of a dict", "state_dict()"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_other_kinds_of_files_are_told_apart(kind: str, tmp_path: Path) -> None:
    data, what, remedy = KINDS[kind]
    (path := tmp_path / "checkpoint_0199.pth.tar").write_bytes(data)
    message = refusal(path)
    assert what in message and "expected a checkpoint as torch.save writes it" in message
    assert remedy in message.split("expected a checkpoint")[1]


@pytest.mark.parametrize("kind", ["web page", "git-lfs", "noise"])
def test_other_kinds_under_the_name_of_safetensors(kind: str, tmp_path: Path) -> None:
    (path := tmp_path / "a.safetensors").write_bytes(KINDS[kind][0])
    assert refusal(path)


def test_folders_and_missing_files(tmp_path: Path) -> None:
    for read in (read_checkpoint, load_encoder):
        with pytest.raises(FileNotFoundError, match="is a folder; give a file in it"):
            read(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such checkpoint"):
        read_checkpoint(tmp_path / "missing.pth")


def test_a_zip_bomb_of_overlapping_entries_is_refused_before_it_is_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: dict
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


def test_a_compressed_checkpoint_is_refused(tmp_path: Path, state: dict) -> None:
    with zipfile.ZipFile(io.BytesIO(as_torch_saves(state))) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    (path := tmp_path / "a.pth").write_bytes(in_zip(entries, zipfile.ZIP_DEFLATED))
    assert "is a compressed zip archive, which torch.save never writes" in refusal(path)


# ------------------------------------------------------------------------------------------------
# Damage
# ------------------------------------------------------------------------------------------------


def test_a_flipped_bit_in_a_tensor_is_found(tmp_path: Path, state: dict) -> None:
    data = bytearray(as_torch_saves(state))
    data[data.index(state["layer2.0.conv1.weight"].numpy().tobytes()) + 100] ^= 1
    (path := tmp_path / "a.pth").write_bytes(data)
    torch.load(path, weights_only=True)  # does not see it
    message = refusal(path)
    assert "is damaged: wrong checksum in" in message and f"{len(data)}" in message


@pytest.mark.parametrize("share", [0.001, 0.5, 0.999])
@pytest.mark.parametrize("save", [old_format, new_format])
def test_truncated_files(share: float, save, tmp_path: Path, state: dict) -> None:
    save(state, path := tmp_path / "a.pth")
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    assert "damaged" in refusal(path)


def test_what_follows_an_old_file_is_noticed(tmp_path: Path, state: dict) -> None:
    old_format(state, path := tmp_path / "a.pth")
    whole = path.read_bytes()
    for more in (b"x", as_torch_saves(state)):  # an archive with right CRCs behind a bare pickle
        path.write_bytes(whole + more)
        assert "something follows" in refusal(path)


def test_an_archive_before_the_archive_is_noticed(tmp_path: Path, state: dict) -> None:
    """Two readers might take one each: zipfile the last, torch the first."""
    (path := tmp_path / "a.pth").write_bytes(2 * as_torch_saves(state))
    assert "damaged" in refusal(path)


def test_the_same_name_twice_in_an_archive_is_refused(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive, warnings.catch_warnings(action="ignore"):
        for data in (b"1", b"2"):
            archive.writestr("a/data.pkl", data)
    (path := tmp_path / "a.pth").write_bytes(buffer.getvalue())
    assert "not one that torch.save writes" in refusal(path)


# ------------------------------------------------------------------------------------------------
# Content
# ------------------------------------------------------------------------------------------------


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
@pytest.mark.parametrize("save", [old_format, new_format])
def test_a_tensor_of_more_numbers_than_are_stored_is_refused(
    count: int, save, tmp_path: Path
) -> None:
    save({"a": Larger(count)}, path := tmp_path / "a.pth")
    assert "is damaged" in refusal(path)


def test_a_tensor_that_repeats_one_number_without_end_is_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1).expand(10**12)}, path := tmp_path / "a.pth")
    assert "declares more numbers" in refusal(path)


def test_values_without_end_are_refused(tmp_path: Path, state: dict) -> None:
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
    number: float, place: str, tmp_path: Path, state: dict
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


def test_the_newest_checkpoint_with_finite_weights_is_resumed(tmp_path: Path) -> None:
    for epoch, value in enumerate((1.0, 2.0, float("nan"))):
        path = checkpoint.epoch_path(tmp_path, epoch)
        write_checkpoint(path, {"state_dict": {"a": torch.tensor([value])}})
        os.utime(path, (epoch, epoch))
    said: list[str] = []
    path, content = checkpoint.newest_valid(tmp_path, said.append)
    assert path.name == "checkpoint_0001.pth.tar" and content["state_dict"]["a"] == 2
    assert len(said) == 1 and "checkpoint_0002.pth.tar holds NaN" in said[0]


def altered(state: dict, how: str) -> dict:
    new = dict(state)
    name = "layer2.0.conv1.weight"
    if how == "missing":
        del new[name]
    elif how == "unexpected":
        new["layer9.weight"] = torch.ones(1)
    elif how == "renamed":
        new["layer2.0.convolution.weight"] = new.pop(name)
    elif how == "transposed":
        new[name] = new[name].transpose(0, 1)
    return new


@pytest.mark.parametrize("arch", ["resnet8", None, "unheard_of"])
@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("missing", "1 missing (layer2.0.conv1.weight)"),
        ("unexpected", "1 unexpected (layer9.weight)"),
        ("renamed", "1 unexpected (layer2.0.convolution.weight)"),
        ("transposed", "1 of another shape (layer2.0.conv1.weight is (16, 32, 3, 3), expected"),
    ],
)
def test_names_and_shapes_that_do_not_fit_are_named(
    how: str, said: str, arch: str | None, tmp_path: Path, state: dict
) -> None:
    torch.save({"arch": arch, "state_dict": altered(state, how)}, path := tmp_path / "a.pth")
    with pytest.raises(CheckpointError) as caught:
        load_encoder(path)
    message = str(caught.value)
    assert said in message and "Against resnet8:" in message
    assert (f"; it says arch {arch!r}" in message) == (arch is not None)


def test_tensors_of_no_known_network_are_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = "moco.checkpoint.architectures.build_encoder"
    monkeypatch.setattr(build, lambda *_, **__: pytest.fail("it was tried"))
    torch.save({"model": {"a": torch.ones(1)}}, tmp_path / "nested.pth")
    torch.save({"blocks.0.weight": torch.ones(1)}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="no known architecture.*first a.*"):
        load_encoder(tmp_path / "nested.pth")
    with pytest.raises(CheckpointError, match="no known architecture.*first blocks.0.weight"):
        load_encoder(tmp_path / "other.pth")


@pytest.mark.parametrize("dtype", [torch.int16, torch.bool, torch.complex64])
def test_numbers_of_another_sort_are_refused(dtype: torch.dtype, tmp_path: Path, state) -> None:
    new = {**state, "conv1.weight": state["conv1.weight"].to(dtype)}
    torch.save(new, path := tmp_path / "a.pth")
    with pytest.raises(
        CheckpointError, match=f"conv1.weight holds {dtype}, expected torch.float32"
    ):
        load_encoder(path)


def test_half_precision_is_read(tmp_path: Path, state: dict) -> None:
    half = {key: t.half() if t.is_floating_point() else t for key, t in state.items()}
    torch.save(half, path := tmp_path / "a.pth")
    encoder, _ = load_encoder(path)
    assert torch.equal(encoder.conv1.weight, state["conv1.weight"].half().float())


def test_a_name_with_and_without_prefix_is_refused(tmp_path: Path, state: dict) -> None:
    twice = {**state, "module.conv1.weight": torch.zeros_like(state["conv1.weight"])}
    torch.save(twice, path := tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match="holds conv1.weight twice"):
        load_encoder(path)


@pytest.mark.parametrize(
    "head",
    [{"fc.weight": torch.ones(10), "fc.bias": torch.ones(10)},
     {"fc.weight": torch.ones(10, 3), "fc.bias": torch.ones(10)},
     {"fc.weight": torch.ones(10, 64), "fc.bias": torch.ones(9)},
     {"fc.weight": torch.ones(10, 64)}],
)  # fmt: skip
def test_heads_that_do_not_fit_are_refused(head: dict, tmp_path: Path, state: dict) -> None:
    without = {key: tensor for key, tensor in state.items() if not key.startswith("fc.")}
    torch.save({**without, **head}, path := tmp_path / "a.pth")
    load_encoder(path)  # features need no head
    with pytest.raises(CheckpointError, match="fc.*expected|no head"):
        load_encoder(path, head="linear")


# ------------------------------------------------------------------------------------------------
# Old format
# ------------------------------------------------------------------------------------------------


def test_old_files_are_read_and_the_load_says_what_was_checked(tmp_path: Path, state: dict) -> None:
    old_format({"arch": "resnet8", "state_dict": state}, path := tmp_path / "a.pth.tar")
    with pytest.warns(UserWarning, match="a.pth.tar is in torch's old format.*only its structure"):
        encoder, info = load_encoder(path)
    assert info["arch"] == "resnet8"
    assert all(torch.equal(t, state[key]) for key, t in encoder.state_dict().items())


def test_an_old_file_with_our_checksum_is_checked_whole(tmp_path: Path, state: dict) -> None:
    content = {"state_dict": state}
    content["checksum"] = checkpoint.checksum(content)
    old_format(content, path := tmp_path / "a.pth")
    with warnings.catch_warnings(action="error"):
        load_encoder(path)
    data = bytearray(path.read_bytes())
    data[data.index(state["layer2.0.conv1.weight"].numpy().tobytes()) + 100] ^= 1
    path.write_bytes(data)
    assert "does not match its checksum" in refusal(path)


def test_new_files_are_read_without_a_warning(tmp_path: Path, state: dict) -> None:
    torch.save(state, path := tmp_path / "a.pth")
    with warnings.catch_warnings(action="error"):
        load_encoder(path)
