"""Damage that a format does not show: own checksums, hashes in names, numbers that cannot be."""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path

import pytest
import torch
from networks import OLD, to_detectron2, write_arrays
from safetensors.torch import save_file

from moco.checkpoint import load_encoder, read_checkpoint, write_checkpoint, write_safetensors
from moco.errors import CheckpointError

# name: (suffix, how a state dict is written, what the warning calls a file without checksums)
WRITERS = {
    "safetensors": (".safetensors", lambda path, state: save_file(state, path), "a safetensors"),
    "arrays": (".pkl", write_arrays, "a pickle of arrays"),
    "old": (".pth", lambda path, state: torch.save(state, path, **OLD), "torch's old format"),
    "ours": (".pth", lambda path, state: write_checkpoint(path, {"state_dict": state}), None),
    "own": (".safetensors", lambda path, state: write_safetensors(path, state, {}), None),
}  # fmt: skip


def test_own_safetensors_are_never_read_with_other_content(refusal, state, tmp_path) -> None:
    """A number, and text of the metadata that is still JSON; more in test_fuzz.py."""
    path = tmp_path / "a.safetensors"
    write_safetensors(path, state, {"arch": "resnet8", "args": {"lr": 0.1, "sizes": (1, 2)}})
    right, whole = read_checkpoint(path), path.read_bytes()
    assert right["args"] == {"lr": 0.1, "sizes": [1, 2]} and "checksum" not in right
    weight = state["layer2.0.conv1.weight"].numpy().tobytes()
    for old, new in ((b"0.1", b"0.2"), (b"resnet8", b"resnet9"), (weight, bytes(len(weight)))):
        assert old in whole
        path.write_bytes(whole.replace(old, new))
        assert "does not match its checksum" in refusal(path)


@pytest.mark.parametrize("kind", [kind for kind, (*_, said) in WRITERS.items() if said])
def test_files_without_checksums_say_so_once(kind: str, state: dict, tmp_path: Path) -> None:
    suffix, write, said = WRITERS[kind]
    write(path := tmp_path / f"a{suffix}", state)
    with pytest.warns(UserWarning, match=f"^{path} is .*{said}.*changed numbers") as warned:
        read_checkpoint(path)
    assert len(warned) == 1 and "\n" not in str(warned[0].message)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    with warnings.catch_warnings(action="error"):  # with a hash all has been checked
        read_checkpoint(path, sha256=digest[:8])
        for digits in (digest[:8], digest[:10].upper(), digest):
            read_checkpoint(path.rename(path := tmp_path / f"a-{digits}{suffix}"))


@pytest.mark.parametrize("name", ["a-0123abcd.pth", "a-0123ABCD45.pth.tar", "x-y-00000000.pth"])
def test_another_hash_in_a_name_is_refused(name: str, refusal, state: dict, tmp_path: Path) -> None:
    write_checkpoint(path := tmp_path / name, {"arch": "resnet8", "state_dict": state})
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    message = refusal(path)
    assert f"{path} has SHA-256 {digest}, expected" in message
    assert "if the digits in its name are no hash, rename it" in message
    load_encoder(path, sha256=digest)  # who knows the hash is believed


@pytest.mark.parametrize(
    "name", ["a-20260722.pth", "a-1234567.pth", "a_0123abcd.pth", "0123abcd.pth"]
)
def test_names_that_hold_no_hash(name: str, state: dict, tmp_path: Path) -> None:
    write_checkpoint(path := tmp_path / name, {"arch": "resnet8", "state_dict": state})
    assert load_encoder(path)[1]["arch"] == "resnet8"


@pytest.mark.filterwarnings("ignore:.*only its structure")
@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize(
    ("name", "number", "said"),
    [
        ("layer1.0.bn2.running_var", -0.5, "a variance below zero in"),
        ("layer1.0.bn2.running_var", float("nan"), "NaN or infinity in"),
        ("layer2.0.conv1.weight", float("inf"), "NaN or infinity in"),
    ],
)
def test_numbers_that_cannot_be_are_refused_by_name(
    name: str, number: float, said: str, writer: str, refusal, state: dict, tmp_path: Path
) -> None:
    state[name].view(-1)[3] = number
    suffix, write, _ = WRITERS[writer]
    write(path := tmp_path / f"a{suffix}", state)
    in_file = to_detectron2(name) if writer == "arrays" else name
    message = refusal(path)
    assert f"{path} holds {said}" in message and in_file in message


@pytest.mark.parametrize(
    ("name", "number", "said"),
    [
        ("layer2.0.conv1.weight", 0.0, "nothing but zeros"),
        ("bn1.running_var", 0.0, "nothing but zeros"),
        ("layer2.0.conv1.weight", 1e30, "absurdly large numbers"),
        ("bn1.bias", 1e9, "absurdly large numbers"),
        ("bn1.running_var", 1e20, "absurdly large numbers"),
    ],
)
def test_numbers_that_training_does_not_leave_are_warned_of(
    name: str, number: float, said: str, state: dict, save
) -> None:
    state[name].view(-1)[3:4] = number
    state[name].mul_(number != 0)
    path = save(state)
    with pytest.warns(UserWarning, match=f"^{path} holds {said} in {name}.*damaged") as warned:
        load_encoder(path)
    assert len(warned) == 1


def test_ordinary_numbers_are_not_warned_of(state: dict, save) -> None:
    """A residual branch that starts at zero, a head of zeros, averages of images up to 255."""
    for name in ("layer1.0.bn2.weight", "bn1.bias", "bn1.running_mean", "fc.weight"):
        state[name].zero_()
    state["bn1.running_var"].fill_(1e7)
    with warnings.catch_warnings(action="error"):
        load_encoder(save(state))


def test_a_hash_is_checked_for_files_too(state: dict, save) -> None:
    path = save(state)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    for right in (digest, digest[:8], digest.upper()):
        load_encoder(path, sha256=right)
    with pytest.raises(CheckpointError) as caught:
        load_encoder(path, sha256="0123456789")
    assert f"{path} has SHA-256 {digest}, expected 0123456789" in str(caught.value)
    for wrong in ("0123", "xyz" * 4, "", digest + "0"):
        with pytest.raises(ValueError, match="sha256 must be 8 to 64 hexadecimal digits, got"):
            load_encoder(path, sha256=wrong)
