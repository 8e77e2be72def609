"""Files made to run code, to take time or memory, or to reach into this program: refused."""

from __future__ import annotations

import builtins
import collections
import faulthandler
import os
import pickle
import resource
import struct
import tracemalloc
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from networks import OLD, in_zip

from moco import pickles
from moco.checkpoint import load_encoder, newest_valid, read_checkpoint, run_checkpoints
from moco.encoders import build_encoder
from moco.errors import CheckpointError


@pytest.fixture(autouse=True)
def no_hang() -> Iterator[None]:
    """A hash that never ends is no Python code that could be interrupted."""
    faulthandler.dump_traceback_later(120, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


# ---- Code ----------------------------------------------------------------------------------------


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
@pytest.mark.parametrize("options", [{}, OLD], ids=["zip", "old"])
def test_a_pickle_that_wants_to_run_code_is_refused_and_runs_nothing(
    refusal, name: str, options, tmp_path: Path, state: dict, save, monkeypatch
) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # switches no safety off
    marker = tmp_path / "it-ran"
    path = save({**state, "extra": attacks(marker)[name]}, **options)
    message = refusal(path)
    assert "can be read safely, and nothing in it was run: it asks for" in message
    assert "If you trust its author" in message
    assert not marker.exists()
    torch.load(path, weights_only=False) if name == "eval" else None
    assert marker.exists() == (name == "eval"), "the attack itself works"


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize(
    ("function", "arguments", "name"),
    [
        (eval, ("open('{}', 'w')",), "eval"),
        (open, ("{}", "w"), "open"),
        (np.fromfile, ("{}",), "fromfile"),
        (np.memmap, ("{}", "uint8", "w+", 0, (4,)), "memmap"),
        (getattr, ("numpy", "save"), "getattr"),
        (torch.storage._load_from_bytes, (b"{}",), "_load_from_bytes"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_pickle_of_arrays_may_ask_for_nothing_else(
    function, arguments: tuple, name: str, protocol: int, refusal, tmp_path: Path
) -> None:
    marker = tmp_path / "it-ran"
    words = [w.format(marker) if isinstance(w, str) else w for w in arguments]
    array = np.ones(3, dtype=np.float32)
    path = tmp_path / "a.pkl"
    for content in (
        {"model": {"a": array, "b": Runs(function, *words)}},
        {"model": {"a": array}, "more": [Runs(function, *words)]},
        Runs(function, *words),
    ):
        path.write_bytes(pickle.dumps(content, protocol))
        message = refusal(path)
        assert "nothing in it was run: it asks for" in message and name in message
        assert not marker.exists()


# ---- Pickles by hand -----------------------------------------------------------------------------

PROTO, STOP = b"\x80\x02", b"."


def text(word: str) -> bytes:
    return b"X" + struct.pack("<I", len(word)) + word.encode()


def name(module: str, attribute: str) -> bytes:
    return f"c{module}\n{attribute}\n".encode()


def number(value: int) -> bytes:
    return pickle.dumps(value, 2)[2:-1]


def dict_with(key: bytes, value: bytes = b"K\x01") -> bytes:
    return PROTO + b"}" + key + value + b"s" + STOP


def nested_tuples(depth: int = 45) -> bytes:
    """((((1, 2), (1, 2)), ...): 2^depth numbers to hash."""
    return b"K\x01K\x02\x86q\x00" + b"".join(
        b"h" + bytes([i]) + b"\x86q" + bytes([i + 1]) for i in range(depth)
    )


def one_hash(count: int = 20_000) -> bytes:
    """A dict of numbers that all have the hash 0."""
    items = (number(i * (2**61 - 1)) + b"N" for i in range(1, count))
    return PROTO + b"}" + text("x") + b"}(" + b"".join(items) + b"us" + STOP


def tuple_in_set(kind: str) -> bytes:
    value = name("__builtin__", kind) + b"](" + nested_tuples() + b"e\x85R"
    return dict_with(text("x"), value)


def call(module: str, attribute: str, *args: bytes) -> bytes:
    return dict_with(text("x"), name(module, attribute) + b"(" + b"".join(args) + b"tR")


def shared_arrays(copies: int = 5000, size: int = 100_000) -> bytes:
    """One text of `size` bytes that becomes `copies` arrays."""
    data = b"B" + struct.pack("<I", size) + bytes(size)
    start = name("numpy.core.multiarray", "_reconstruct") + name("numpy", "ndarray")
    start += b"K\x00\x85" + text("b") + b"\x87R"
    kind = name("numpy", "dtype") + text("u1") + b"K\x00K\x01\x87R"
    state = b"(K\x01" + number(size) + b"\x85" + kind + b"I00\n"
    arrays = text("a") + start + state + data + b"q\x00tb"
    for i in range(copies):
        arrays += text(str(i)) + start + state + b"h\x00tb"
    return PROTO + b"}" + text("model") + b"}(" + arrays + b"us" + STOP


def sharing_lists(depth: int = 40) -> bytes:
    pickled = b"]q\x00"
    for i in range(depth):
        pickled += b"0](" + 10 * (b"h" + bytes([i])) + b"eq" + bytes([i + 1])
    return PROTO + b"}" + text("x") + pickled + b"s" + STOP


HARMFUL = {
    "tuple as key": (dict_with(nested_tuples()), "a tuple is the key of a dict"),
    "set of tuples": (tuple_in_set("set"), "no end of nested values"),
    "frozenset of tuples": (tuple_in_set("frozenset"), "no end of nested values"),
    "numbers of one hash": (one_hash(), "a large number is the key of a dict"),
    "bytearray(N)": (call("__builtin__", "bytearray", number(2**33)), "builtins.bytearray"),
    "bytes(N)": (call("builtins", "bytes", number(2**33)), "builtins.bytes"),
    "numpy.zeros(N)": (call("numpy", "zeros", number(2**33)), "it asks for numpy.zeros"),
    "[x] * N": (call("operator", "mul", b"]", number(2**33)), "it asks for operator.mul"),
    "torch.ones(N)": (call("torch", "ones", number(2**33)), "it asks for torch.ones"),
    "one text, many arrays": (shared_arrays(), "many times as large as the file"),
    "lists in lists": (sharing_lists(), "no end of nested values"),
    "a dict in itself": (
        PROTO + b"}q\x00" + text("x") + b"h\x00s" + STOP,
        "no end of nested values",
    ),
    "deep lists": (dict_with(text("x"), 5_000 * b"](" + 5_000 * b"e"), "no end of nested"),
    "attributes of a function": (
        PROTO + name("moco.pickles", "parse") + b"}" + text("hacked") + b"K\x01sb" + STOP,
        "pickle.BUILD of what is no object",
    ),
    "attributes of a class": (
        PROTO + name("moco.errors", "DataError") + b"N}" + text("x") + b"K\x01s\x86b" + STOP,
        "pickle.BUILD of what is no object",
    ),
    "an old class": (PROTO + b"(ios\nsystem\n.", "it asks for pickle.INST"),
    "an extension": (PROTO + b"\x82\x01.", "it asks for pickle.EXT1"),
    "a call of a call": (
        dict_with(text("x"), name("pathlib", "Path") + b")R)R"),
        "it asks for",
    ),
    "a long key of numpy's": (pickle.dumps({np.str_("x" * 9999): 1}, 2), "many times as large"),
    "a storage by another name": (
        PROTO + b"}Va\nP('storage', <class 'os.system'>, '0', 'cpu', 2)\ns.",
        "a storage that is none of torch's",
    ),
    "a far memo": (PROTO + b"}r" + struct.pack("<I", 2**32 - 1) + STOP, "no end of values"),
}

TAKING_MEMORY = ("bytearray(N)", "bytes(N)", "one text, many arrays")


def in_new_format(pickled: bytes) -> bytes:
    return in_zip({"x/data.pkl": pickled, "x/byteorder": b"little", "x/version": b"3\n"})


def in_old_format(pickled: bytes) -> bytes:
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}
    start = (torch.serialization.MAGIC_NUMBER, 1001, system)
    return b"".join(pickle.dumps(v, 2) for v in start) + pickled + pickle.dumps([], 2)


@pytest.mark.parametrize("form", ["zip", "old", "pkl"])
@pytest.mark.parametrize("kind", HARMFUL)
def test_harmful_pickles_are_refused_at_once(kind: str, form: str, tmp_path: Path) -> None:
    pickled, said = HARMFUL[kind]
    path = tmp_path / ("a.pkl" if form == "pkl" else "checkpoint_0000.pth.tar")
    path.write_bytes({"zip": in_new_format, "old": in_old_format, "pkl": bytes}[form](pickled))
    if kind in TAKING_MEMORY:
        tracemalloc.start()
    with pytest.raises(CheckpointError) as caught:
        load_encoder(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 60 * len(pickled) + 10_000_000
    message = str(caught.value)
    assert str(path) in message and said in message and "\n" not in message
    assert not hasattr(pickles.parse, "hacked") and not hasattr(CheckpointError, "x")


@pytest.mark.parametrize("form", [in_new_format, bytes])
def test_opcodes_without_end_are_refused(form, refusal, tmp_path: Path, monkeypatch) -> None:
    """Though the values that are left are few."""
    monkeypatch.setattr(pickles, "MOST_OPCODES", 1000)
    (path := tmp_path / "a.pkl").write_bytes(form(PROTO + b"N0" * 501 + b"}" + STOP))
    assert "it has no end of opcodes" in refusal(path)


def test_a_run_folder_with_a_bomb_goes_on(tmp_path: Path, save) -> None:
    """Its name is listed, the newest that is whole is found, and nothing hangs."""
    save({"epoch": 1, "state_dict": {"a": torch.ones(1)}}, "checkpoint_0000.pth.tar")
    bomb = HARMFUL["tuple as key"][0]
    (tmp_path / "step_00000007.pth.tar").write_bytes(in_new_format(bomb))
    (tmp_path / "checkpoint_0003.pth.tar").write_bytes(in_new_format(bomb))
    assert len(run_checkpoints(tmp_path)) == 3
    said: list[str] = []
    path, content = newest_valid(tmp_path, said.append)
    assert path.name == "checkpoint_0000.pth.tar" and content["epoch"] == 1
    assert len(said) == 2 and all("a tuple is the key" in line for line in said)


def test_values_beside_tensors_are_read_without_them(save) -> None:
    values = {"epoch": 3, "args": {"lr": 0.1}}
    found = pickles.peek(path := save({**values, "state_dict": {"a": torch.ones(3)}}))
    assert found == {**values, "state_dict": {"a": "<torch._utils._rebuild_tensor_v2>"}}
    path.write_bytes(in_new_format(HARMFUL["tuple as key"][0]))
    with pytest.raises(pickles.Refused):
        pickles.peek(path)


def test_a_compressed_part_is_refused_though_it_is_small(refusal, tmp_path: Path) -> None:
    """Beside a part that is not compressed the whole declares no more than the file has."""
    with zipfile.ZipFile(path := tmp_path / "a.pth", "w") as archive:
        archive.writestr("x/data.pkl", PROTO + b"}" + STOP, zipfile.ZIP_DEFLATED)
        archive.writestr("x/data/0", os.urandom(1000))
    assert "is a compressed zip archive, which torch.save never writes" in refusal(path)
    with pytest.raises(zipfile.BadZipFile, match="it is compressed"):
        pickles.peek(path)


def test_short_tuples_are_keys_by_their_text(save) -> None:
    """What people keep beside weights; `HARMFUL` has tuples that are refused."""
    found = read_checkpoint(save({"hits": {(0, 1): 2, ("a", None): 3, ("b" * 1000,): 4}}))["hits"]
    assert list(found.items())[:2] == [("(0, 1)", 2), ("('a', None)", 3)]
    assert max(map(len, found)) < 100


# ---- Memory --------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [10**10, 2**62, -1])
def test_storages_larger_than_an_old_file_are_refused(count: int, refusal, tmp_path: Path) -> None:
    storage = b"(" + text("storage") + name("torch", "FloatStorage") + text("0") + text("cpu")
    storage += number(count) + b"NtQ"
    tensor = (
        name("torch._utils", "_rebuild_tensor_v2") + b"(" + storage + b"K\x00K\x01\x85K\x01\x85"
    )
    tensor += b"\x89" + name("collections", "OrderedDict") + b")RtR"
    (path := tmp_path / "a.pth").write_bytes(in_old_format(dict_with(text("a"), tensor)))
    message = refusal(path)
    assert "is damaged: " in message and "more numbers than the file holds" in message


def test_many_views_of_one_storage_are_refused(refusal, save) -> None:
    """Each is as large as the file, and whoever copies them fills the memory."""
    one = torch.ones(50_000)
    path = save({str(i): one[:] for i in range(500)})
    assert "its tensors together declare more numbers" in refusal(path)


@pytest.mark.parametrize("claim", ["regnet_y_128gf", "vit_h_14", "vgg19"])
def test_a_large_architecture_that_is_only_claimed_costs_nothing(
    claim: str, state: dict, save, not_loaded
) -> None:
    """Nor where all names are there, with tensors of one number."""
    path = save({"arch": claim, "state_dict": state})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert load_encoder(path)[1]["arch"] == "resnet8"
    if claim == "vit_h_14":
        with torch.device("meta"):
            names = build_encoder("vit_b_16", 3).state_dict()
        nearly = {"arch": claim, "state_dict": {key: torch.ones(1) for key in names}}
        assert "no known architecture" in not_loaded(nearly)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # KB


# ---- Arrays --------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*pickle of arrays")
def test_arrays_in_pickles_by_hand_are_read(tmp_path: Path) -> None:
    """`HARMFUL`'s are of the form that numpy's have."""
    (path := tmp_path / "a.pkl").write_bytes(shared_arrays(copies=2, size=10))
    model = read_checkpoint(path)["model"]
    assert [tuple(model[key].shape) for key in ("a", "0", "1")] == [(10,)] * 3
