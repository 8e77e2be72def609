"""Checkpoint files: whole or absent, read without running code, understood whoever wrote them."""

import copy
import functools
import io
import os
import pickle
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
import torchvision
from torch import Tensor, nn

from moco.batch_norm import SplitBatchNorm2d
from moco.builder import MoCo
from moco.checkpoint import (
    Retention,
    epoch_path,
    load_encoder,
    newest_valid,
    read_checkpoint,
    run_checkpoints,
    step_path,
    write_checkpoint,
)
from moco.encoders import add_mlp_head, build_encoder, get_head, set_head
from moco.errors import CheckpointError

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


def saved(content: object, **options) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


LEGACY = {"_use_new_zipfile_serialization": False}  # as before torch 1.6: upstream's released files

# ------------------------------------------------------------------------------------------------
# Writing
# ------------------------------------------------------------------------------------------------


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


# ------------------------------------------------------------------------------------------------
# Reading what is no checkpoint
# ------------------------------------------------------------------------------------------------


def write(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "checkpoint_0000.pth.tar"
    path.write_bytes(content)
    return path


def assert_refused(path: Path) -> None:
    with pytest.raises(CheckpointError) as error:
        read_checkpoint(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("kind", ["missing", "directory"])
def test_a_missing_file_is_named(tmp_path, kind):
    path = tmp_path / "checkpoint_0000.pth.tar"
    if kind == "directory":
        path.mkdir()
    with pytest.raises(FileNotFoundError, match=f"no such checkpoint: {path}"):
        read_checkpoint(path)


def tar_of_something() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.add(__file__, "file.py")
    return buffer.getvalue()


def zip_of_something() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("file.txt", "hello")
    return buffer.getvalue()


OTHER_FILES = {
    "empty": b"",
    "HTML": b"<!DOCTYPE html>\n<html><body>404 Not Found</body></html>\n",
    "a git-lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12\n",
    "JSON": b'{"error": "not found"}\n',
    "a server's message": b"error: file not found\n",
    "another message": b"Just a moment...\n",
    "a third message": b"quota exceeded\n",
    "a JPEG": bytes.fromhex("ffd8ffe000104a46494600010100000100010000"),
    "zeros": bytes(4096),
    "a tar file": tar_of_something(),
    "a zip file": zip_of_something(),
    "a pickle": pickle.dumps([1, 2, 3], protocol=2),
}


@pytest.mark.parametrize("kind", OTHER_FILES)
def test_a_file_of_another_kind_is_refused_by_name(tmp_path, kind):
    assert_refused(write(tmp_path, OTHER_FILES[kind]))


@pytest.mark.parametrize("options", [{}, LEGACY], ids=["zip", "legacy"])
def test_a_truncated_file_is_refused_by_name(tmp_path, options):
    """Of any length, in both of torch's formats."""
    whole = saved(CONTENT, **options)
    path = write(tmp_path, whole)
    assert_same(read_checkpoint(path), CONTENT)
    lengths = {*range(0, 60), *range(60, len(whole), 61), len(whole) - 1}
    for length in sorted(lengths):
        path.write_bytes(whole[:length])
        try:
            assert_refused(path)
        except Exception as error:
            raise AssertionError(f"{length} of {len(whole)} bytes: {error!r}") from error


def test_a_flipped_bit_in_a_tensor_is_refused_by_name(tmp_path):
    """torch.load itself does not look at checksums."""
    whole = bytearray(saved(CONTENT))
    at = bytes(whole).index(torch.tensor([500.0, 501.0]).numpy().tobytes())
    whole[at] ^= 1
    path = write(tmp_path, bytes(whole))
    changed = torch.load(path, weights_only=True)["state_dict"]["module.queue"]
    assert (changed != CONTENT["state_dict"]["module.queue"]).sum() == 1
    with pytest.raises(CheckpointError, match=f"{path} is damaged: wrong checksum in .*data/0"):
        read_checkpoint(path)


def test_a_flipped_bit_anywhere_is_refused_or_harmless(tmp_path):
    """In the archive's own tables too: never another content, never another kind of error."""
    content = {"epoch": 3, "queue": torch.arange(4.0)}
    whole = saved(content)
    tables = whole.index(b"PK\x01\x02")
    places = [*range(0, tables, 3), *range(tables, len(whole))]
    refused = 0
    for at in places:
        flipped = bytearray(whole)
        flipped[at] ^= 8
        path = write(tmp_path, bytes(flipped))
        try:
            got = read_checkpoint(path)
        except CheckpointError as error:
            assert str(path) in str(error)
            refused += 1
        except Exception as error:
            raise AssertionError(f"byte {at} of {len(whole)}: {error!r}") from error
        else:
            assert_same(got, content)
    assert refused > len(places) / 5


class Malicious:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("kind", ["pickle", "zip", "legacy", "nested"])
def test_a_file_that_wants_to_run_code_is_refused_and_does_not_run_it(tmp_path, kind):
    victim = tmp_path / "victim"
    bad = Malicious(victim)
    content = {
        "pickle": lambda: pickle.dumps({"state_dict": bad}, protocol=2),
        "zip": lambda: saved({"state_dict": bad}),
        "legacy": lambda: saved({"state_dict": bad}, **LEGACY),
        "nested": lambda: saved({"args": {"deep": [CONTENT, (bad,)]}}),
    }[kind]()
    path = write(tmp_path, content)
    with pytest.raises(
        CheckpointError, match=f"{path} is not a checkpoint that can be read safely"
    ):
        read_checkpoint(path)
    assert not victim.exists()
    if kind != "pickle":  # a reader that trusts the file would run it
        torch.load(path, weights_only=False)
        assert victim.exists()


@pytest.mark.parametrize("content", [[torch.zeros(2)], torch.zeros(2), 5, nn.Linear(2, 2)])
def test_content_that_is_no_dict_is_refused_by_name(tmp_path, content):
    path = write(tmp_path, saved(content))
    with pytest.raises(CheckpointError, match=str(path)):
        read_checkpoint(path)


# ------------------------------------------------------------------------------------------------
# Run folders
# ------------------------------------------------------------------------------------------------


def make_run(folder: Path, names: list[str]) -> None:
    """Empty checkpoints in the order of their writing."""
    for second, name in enumerate(names):
        (folder / name).touch()
        os.utime(folder / name, (1000 + second, 1000 + second))


def names(folder: Path) -> list[str]:
    return [path.name for path in run_checkpoints(folder)]


def epochs(*numbers: int) -> list[str]:
    return [f"checkpoint_{number:04d}.pth.tar" for number in numbers]


def test_file_names_are_the_published_ones(tmp_path):
    assert epoch_path(tmp_path, 0) == tmp_path / "checkpoint_0000.pth.tar"
    assert epoch_path(tmp_path, 199).name == "checkpoint_0199.pth.tar"
    assert epoch_path(tmp_path, 12345).name == "checkpoint_12345.pth.tar"
    assert step_path(tmp_path, 70).name == "step_00000070.pth.tar"


def test_checkpoints_of_a_run_are_ordered_by_how_far_it_had_come(tmp_path):
    """Not by the times of the files, which a copied folder has anew. Seven steps make an epoch."""
    order = ["step_00000003.pth.tar", *epochs(0), "step_00000009.pth.tar", *epochs(1, 9, 12345)]
    for name in reversed(order):
        step = name.startswith("step") and int(name[5:13])
        write_checkpoint(tmp_path / name, {"epoch": step // 7, "step": step})
    assert names(tmp_path) == order
    # One that cannot be read may be the newest: it is tried first, and passed over with a word.
    (tmp_path / "step_00000009.pth.tar").write_bytes(b"cut off")
    assert names(tmp_path)[-1] == "step_00000009.pth.tar"
    said = []
    path, content = newest_valid(tmp_path, said.append)
    assert path.name == "checkpoint_12345.pth.tar" and content["epoch"] == 0
    assert len(said) == 1 and "step_00000009.pth.tar" in said[0]


def test_other_files_are_no_checkpoints_of_the_run(tmp_path):
    others = [
        "model_best.pth.tar",
        ".checkpoint_0001.pth.tar.77.tmp",
        "args.json",
        "checkpoint_1.pth.tar",
        "checkpoint_0001.pth",
        "old_checkpoint_0001.pth.tar",
    ]
    make_run(tmp_path, [*others, *epochs(2)])
    assert names(tmp_path) == epochs(2)
    assert run_checkpoints(tmp_path / "nowhere") == []


def prune(
    folder: Path, newest: str, *, keep_last: int, keep_every: int = 0, keep: str = ""
) -> None:
    """As after a save of `newest`; `keep` is the checkpoint that the run went on from."""
    retention = Retention(folder, keep_last=keep_last, keep_every=keep_every)
    retention.keep |= {folder / keep} if keep else set()
    retention.written(folder / newest)
    retention.prune(folder / newest)


@pytest.fixture
def eight(tmp_path) -> Path:
    """A run folder of eight epochs."""
    for epoch in range(8):
        write_checkpoint(epoch_path(tmp_path, epoch), {"epoch": epoch + 1})
    return tmp_path


def test_prune_keeps_the_newest_and_every_mth_epoch(eight):
    """Epoch 4 is the fifth: its number is 0-based. Steps are never kept for their number."""
    write_checkpoint(eight / "step_00000038.pth.tar", {"epoch": 5, "step": 38})
    (eight / "model_best.pth.tar").touch()
    prune(eight, *epochs(7), keep_last=2, keep_every=5)
    assert names(eight) == epochs(4, 6, 7)
    assert (eight / "model_best.pth.tar").exists()


def test_prune_by_age_alone(eight):
    prune(eight, *epochs(7), keep_last=3)
    assert names(eight) == epochs(5, 6, 7)
    prune(eight, *epochs(7), keep_last=5)
    assert names(eight) == epochs(5, 6, 7)
    prune(eight, *epochs(7), keep_last=1, keep_every=1)
    assert names(eight) == epochs(5, 6, 7)


@pytest.mark.parametrize("content", [b"", b"cut off", "half", "a changed byte"])
@pytest.mark.parametrize("torn", [*epochs(6), *epochs(7), "step_00000099.pth.tar"])
def test_a_damaged_file_takes_no_good_ones_place(content, torn, eight):
    """It is newer by its name than what is written after it, and not even deleted."""
    whole = (eight / epochs(7)[0]).read_bytes()
    if content == "half":
        content = whole[: len(whole) // 2]
    elif content == "a changed byte":
        middle = whole.index(b"epoch")
        content = whole[:middle] + b"E" + whole[middle + 1 :]
    (eight / torn).write_bytes(content)
    newest = "step_00000040.pth.tar"  # of a run that goes on from epoch 5
    write_checkpoint(eight / newest, {"epoch": 5, "step": 40})
    prune(eight, newest, keep_last=1)
    assert newest in names(eight) and torn in names(eight)
    good = [name for name in names(eight) if name not in (torn, newest)]
    assert good == (epochs(6) if torn == epochs(7)[0] else epochs(7))


def test_what_was_written_or_resumed_from_is_never_deleted(eight):
    prune(eight, *epochs(2), keep_last=1, keep=epochs(0)[0])
    assert names(eight) == epochs(0, 2, 7)


def test_a_damaged_checkpoint_is_set_aside_once_another_was_read(eight):
    (eight / epochs(7)[0]).write_bytes(b"cut off")
    said = []
    path, _ = newest_valid(eight, said.append)
    assert path.name == epochs(6)[0]
    assert names(eight) == epochs(*range(7))
    assert (eight / "checkpoint_0007.pth.tar.damaged").read_bytes() == b"cut off"
    assert len(said) == 1 and "it is now checkpoint_0007.pth.tar.damaged" in said[0]
    for path in run_checkpoints(eight):
        path.write_bytes(b"cut off")
    with pytest.raises(CheckpointError, match="none of the 7 checkpoints"):
        newest_valid(eight, said.append)
    assert names(eight) == epochs(*range(7)), "a folder without a good one stays as it is"


# ------------------------------------------------------------------------------------------------
# Encoders from files of any origin
# ------------------------------------------------------------------------------------------------

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def seasoned(encoder: nn.Module) -> nn.Module:
    """The encoder in eval mode, with batch-norm statistics that are not those of a fresh one."""
    torch.manual_seed(1)
    for norm in encoder.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = 1.0
    with torch.no_grad():
        encoder.train()(torch.randn(8, 3, 32, 32))
    return encoder.eval()


def make_moco(base, mlp: bool, dim: int = 12) -> MoCo:
    """With different query and key encoders."""
    torch.manual_seed(0)
    moco = MoCo(base, dim, 16, align_alpha=2, mlp=mlp)
    seasoned(moco.encoder_q)
    with torch.no_grad():
        for p in moco.encoder_k.parameters():
            p.mul_(0.5)
    return moco


def with_prefix(state: dict, prefix: str = "module.") -> dict:
    return {prefix + name: tensor for name, tensor in state.items()}


def features_of(encoder: nn.Module) -> Tensor:
    """What enters the last layer."""
    encoder = copy.deepcopy(encoder)
    set_head(encoder, nn.Identity())
    features = encoder(IMAGES)
    spread = (features[0] - features[1]).abs().max() / features.abs().max()
    assert spread > 0.1, "features that cannot be told apart"
    return features


def assert_loads(path: Path, network: nn.Module, kind: str, /, **info) -> None:
    """With and without its head the file gives what the network gives, for the same images."""
    encoder, found = load_encoder(path)
    assert not encoder.training and type(get_head(encoder)) is nn.Identity
    assert torch.equal(encoder(IMAGES), features_of(network))
    assert found["feature_dim"] == encoder(IMAGES).shape[1]
    whole, again = load_encoder(path, head=kind)
    assert torch.equal(whole(IMAGES), network(IMAGES))
    for key, value in info.items():
        assert found[key] == again[key] == value, key
    assert found["matched"] == len(encoder.state_dict())
    assert again["matched"] == len(network.state_dict())
    head_tensors = len(network.state_dict()) - len(encoder.state_dict())
    assert len(found["ignored"]) == head_tensors and again["ignored"] == []


def resnet8(num_classes: int, **options) -> nn.Module:
    return build_encoder("resnet8", num_classes, **options)


@pytest.mark.parametrize("mlp", [False, True], ids=["linear", "mlp"])
def test_our_pretraining_checkpoint(tmp_path, mlp):
    """The query encoder, not the key encoder, and what the file says about itself."""
    moco = make_moco(resnet8, mlp)
    path = tmp_path / "checkpoint_0006.pth.tar"
    optimizer = torch.optim.SGD(moco.parameters(), 0.1, momentum=0.9)
    args = {"objective": "3 * align(alpha=2)", "image_size": 32}
    content = {
        "version": 1,
        "arch": "resnet8",
        "epoch": 7,
        "step": 70,
        "step_in_epoch": 0,
        "state_dict": with_prefix(moco.state_dict()),
        "optimizer": optimizer.state_dict(),
        "scaler": None,
        "shuffle_generator": moco.shuffle_generator.get_state(),
        "rng": torch.get_rng_state().unsqueeze(0),
        "args": args,
    }
    write_checkpoint(path, content)
    assert_loads(
        path,
        moco.encoder_q,
        "projection",
        arch="resnet8",
        epoch=7,
        objective="3 * align(alpha=2)",
        layout="moco",
        head="mlp" if mlp else "linear",
        args=args,
    )


@pytest.mark.parametrize("options", [{}, LEGACY], ids=["zip", "legacy"])
@pytest.mark.parametrize("mlp", [False, True], ids=["v1", "v2"])
def test_upstreams_pretraining_checkpoint(tmp_path, mlp, options):
    """No version, no args; names under module.encoder_q, with queue; also in torch's old format,
    and with the scalar_label of moco_align_uniform."""
    moco = make_moco(torchvision.models.resnet18, mlp)
    state = with_prefix(moco.state_dict())
    state["module.scalar_label"] = torch.zeros((), dtype=torch.int64)
    content = {
        "epoch": 200,
        "arch": "resnet18",
        "state_dict": state,
        "optimizer": torch.optim.SGD(moco.parameters(), 0.1).state_dict(),
    }
    path = write(tmp_path, saved(content, **options))
    assert_loads(
        path,
        moco.encoder_q,
        "projection",
        arch="resnet18",
        small_stem=False,
        epoch=200,
        objective=None,
        layout="moco",
        head="mlp" if mlp else "linear",
        args={},
    )


def test_a_pretraining_state_dict_alone(tmp_path):
    """Without `module.` and without anything around it."""
    moco = make_moco(resnet8, mlp=True)
    path = write(tmp_path, saved(moco.state_dict()))
    assert_loads(path, moco.encoder_q, "projection", arch="resnet8", layout="moco", epoch=None)


def test_linear_evaluations_checkpoint(tmp_path):
    """Backbone and classifier under module., as upstream's main_lincls and ours write them."""
    network = seasoned(torchvision.models.resnet18(num_classes=9))
    content = {
        "epoch": 100,
        "arch": "resnet18",
        "state_dict": with_prefix(network.state_dict()),
        "best_acc1": torch.tensor(67.7),
        "optimizer": {},
    }
    path = write(tmp_path, saved(content))
    assert_loads(
        path, network, "linear", arch="resnet18", layout="lincls", head="linear", epoch=100
    )


def test_torchvisions_state_dict(tmp_path):
    """The architecture is found from names and shapes."""
    network = seasoned(torchvision.models.resnet18(num_classes=9))
    path = write(tmp_path, saved(network.state_dict()))
    assert_loads(path, network, "linear", arch="resnet18", small_stem=False, layout="plain",
                 head="linear", epoch=None, objective=None)  # fmt: skip


def test_torchvisions_state_dict_from_before_batches_were_counted(tmp_path):
    """Files from before torch 0.4.1 have no num_batches_tracked; torch itself takes them."""
    network = seasoned(resnet8(9))
    state = {n: t for n, t in network.state_dict().items() if "num_batches_tracked" not in n}
    resnet8(9).load_state_dict(state)
    path = write(tmp_path, saved({"arch": "resnet8", "state_dict": state}))
    encoder, _ = load_encoder(path, head="linear")
    assert torch.equal(encoder(IMAGES), network(IMAGES))


@pytest.mark.parametrize("named", [True, False])
def test_a_small_stem_is_found_from_its_shape(tmp_path, named):
    moco = make_moco(functools.partial(build_encoder, "resnet18", small_stem=True), mlp=False)
    content = {"state_dict": with_prefix(moco.state_dict())}
    if named:
        content["arch"] = "resnet18"
    path = write(tmp_path, saved(content))
    assert_loads(path, moco.encoder_q, "projection", arch="resnet18", small_stem=True)


def test_an_encoder_trained_with_batch_norm_in_groups_becomes_a_plain_one(tmp_path):
    torch.manual_seed(0)
    moco = MoCo(functools.partial(resnet8, bn_splits=2), 12, 16, align_alpha=2)
    assert any(isinstance(m, SplitBatchNorm2d) for m in moco.modules())
    moco(IMAGES.repeat(2, 1, 1, 1), IMAGES.repeat(2, 1, 1, 1).flip(3))
    path = write(tmp_path, saved({"arch": "resnet8", "state_dict": with_prefix(moco.state_dict())}))
    encoder, _ = load_encoder(path, head="projection")
    assert not any(isinstance(m, SplitBatchNorm2d) for m in encoder.modules())
    torch.testing.assert_close(encoder(IMAGES), moco.encoder_q.eval()(IMAGES))


@pytest.mark.parametrize("arch", ["resnet8x4", "mobilenet_v3_small", "mnasnet0_5"])
@pytest.mark.parametrize("mlp", [False, True], ids=["linear", "mlp"])
def test_other_architectures(tmp_path, arch, mlp):
    """Heads in `fc` and in `classifier.N`."""
    moco = make_moco(functools.partial(build_encoder, arch), mlp)
    path = write(tmp_path, saved({"arch": arch, "state_dict": with_prefix(moco.state_dict())}))
    assert_loads(path, moco.encoder_q, "projection", arch=arch, small_stem=False)


@pytest.mark.long
@pytest.mark.parametrize("arch", ["vgg11_bn", "maxvit_t"])
def test_large_architectures(tmp_path, arch):
    """vgg11_bn is half a GB of weights; maxvit_t has a linear layer without bias at its end."""
    torch.manual_seed(0)
    network = build_encoder(arch, 7).eval()
    path = write(tmp_path, saved({"arch": arch, "state_dict": network.state_dict()}))
    try:
        encoder, info = load_encoder(path, head="linear")
    finally:
        path.unlink()
    assert info["arch"] == arch and info["ignored"] == []
    images = torch.randn(1, 3, 224, 224)
    assert torch.equal(encoder(images), network(images))


def test_a_name_that_does_not_fit_the_tensors_is_not_believed(tmp_path):
    network = seasoned(resnet8(9))
    path = write(tmp_path, saved({"arch": "resnet50", "state_dict": network.state_dict()}))
    assert_loads(path, network, "linear", arch="resnet8")


def test_a_backbone_without_head_gives_features_only(tmp_path):
    network = seasoned(resnet8(9))
    state = {n: t for n, t in network.state_dict().items() if not n.startswith("fc.")}
    path = write(tmp_path, saved({"arch": "resnet8", "state_dict": state}))
    encoder, info = load_encoder(path)
    assert torch.equal(encoder(IMAGES), features_of(network))
    assert info["head"] == "none" and info["ignored"] == []
    for head in ("linear", "projection"):
        with pytest.raises(CheckpointError, match=f"{path} has no head, {head} was asked for"):
            load_encoder(path, head=head)


def test_a_head_of_the_wrong_kind_is_refused(tmp_path):
    """A projection is no classifier, though both may be one linear layer."""
    moco = make_moco(resnet8, mlp=False)
    path = write(tmp_path, saved({"state_dict": with_prefix(moco.state_dict())}))
    with pytest.raises(CheckpointError, match=f"{path} has a projection head, linear was asked"):
        load_encoder(path, head="linear")
    path = write(tmp_path, saved(resnet8(9).state_dict()))
    with pytest.raises(CheckpointError, match=f"{path} has a linear head, projection was asked"):
        load_encoder(path, head="projection")
    with pytest.raises(
        ValueError, match='head must be "none", "projection" or "linear", got \'fc\''
    ):
        load_encoder(path, head="fc")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "holds no tensors by name"),
        ({"state_dict": {}}, "holds no tensors by name"),
        ({"epoch": 3, "arch": "resnet18"}, "holds no tensors by name"),
        ({"state_dict": [1, 2]}, "state_dict is a list, expected a dict"),
    ],
)
def test_a_checkpoint_without_an_encoder_is_refused_by_name(tmp_path, content, message):
    path = write(tmp_path, saved(content))
    with pytest.raises(CheckpointError, match=f"{path}.*{message}"):
        load_encoder(path)


@pytest.mark.long
def test_tensors_of_no_known_architecture_are_refused_by_name(tmp_path):
    """Also when a single one is missing, or has another shape."""
    state = resnet8(9).state_dict()
    without_one = {name: t for name, t in state.items() if name != "layer2.0.conv1.weight"}
    path = write(tmp_path, saved({"arch": "resnet8", "state_dict": without_one}))
    message = f"{path}: no known architecture has these {len(without_one)} tensors .*'resnet8'"
    with pytest.raises(CheckpointError, match=message):
        load_encoder(path)


def test_a_missing_file_is_a_file_not_found_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such checkpoint"):
        load_encoder(tmp_path / "a.pth")


def test_safetensors_without_the_package_says_what_to_install(tmp_path, monkeypatch):
    """As where torch.hub brought this code, which installs nothing."""
    monkeypatch.setitem(sys.modules, "safetensors", None)
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"anything")
    with pytest.raises(CheckpointError, match=f"{path} needs the package safetensors"):
        load_encoder(path)


def test_an_mlp_head_of_a_classifier_file_is_no_linear_head(tmp_path):
    """A plain state dict with fc.0 and fc.2 holds a projection that is not MoCo's file."""
    network = resnet8(9)
    add_mlp_head(network)
    path = write(tmp_path, saved({"arch": "resnet8", "state_dict": network.state_dict()}))
    _, info = load_encoder(path)
    assert info["head"] == "mlp"
