"""load_encoder: files of other projects as they are published, in every container, and what a file
says about itself. Features are compared with those of networks that are built by hand here."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import harness
import numpy as np
import pytest
import torch
import torchvision
from helpers import write_images
from torch import Tensor, nn

from moco import checkpoint, encoders
from moco.checkpoint import load_encoder, write_checkpoint, write_safetensors
from moco.errors import CheckpointError

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def seasoned(network: nn.Module) -> nn.Module:
    """In eval mode, with batch-norm statistics and weights that are not those of a fresh one."""
    generator = torch.Generator().manual_seed(1)
    for norm in network.modules():
        if isinstance(norm, (nn.BatchNorm2d, nn.BatchNorm1d)):
            norm.momentum = 1.0
            if norm.affine:
                norm.weight.data.uniform_(0.5, 2, generator=generator)
                norm.bias.data.normal_(generator=generator)
    with torch.no_grad():
        network.train()(torch.randn(8, 3, 32, 32, generator=generator))
    return network.eval()


def resnet18(num_classes: int = 7, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return torchvision.models.resnet18(num_classes=num_classes)


def features_of(network: nn.Module) -> Tensor:
    """What enters `fc`."""
    entering = []
    with torch.no_grad():
        hook = network.fc.register_forward_pre_hook(lambda _, inputs: entering.append(inputs[0]))
        network(IMAGES)
        hook.remove()
    assert (entering[0][0] - entering[0][1]).abs().max() > 0.1, "features that are all alike"
    return entering[0]


def assert_gives(path: Path, network: nn.Module, use: str, **facts: object) -> None:
    """The file gives the network's features and the outputs of its head, bit for bit."""
    encoder, info = load_encoder(path)
    whole, again = load_encoder(path, head=use)
    with torch.no_grad():
        assert torch.equal(encoder(IMAGES), features_of(network))
        assert torch.equal(whole(IMAGES), network(IMAGES))
    for key, value in {"head_use": use, **facts}.items():
        assert info[key] == again[key] == value, key
    assert all(t.dtype in (torch.float32, torch.int64) for t in whole.state_dict().values())
    assert not encoder.training and not whole.training


def prefixed(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


# ------------------------------------------------------------------------------------------------
# MoCo v3 and SimSiam
# ------------------------------------------------------------------------------------------------


def projector_v3(width: int, hidden: int, outputs: int) -> nn.Sequential:
    """moco-v3's: two layers without bias, the last batch norm without weight and bias."""
    return nn.Sequential(
        nn.Linear(width, hidden, bias=False),
        nn.BatchNorm1d(hidden),
        nn.ReLU(),
        nn.Linear(hidden, outputs, bias=False),
        nn.BatchNorm1d(outputs, affine=False),
    )


def projector_simsiam(width: int, outputs: int) -> nn.Sequential:
    """SimSiam's: three layers, the last with a bias and a batch norm without weight and bias."""
    return nn.Sequential(
        nn.Linear(width, width, bias=False),
        nn.BatchNorm1d(width),
        nn.ReLU(),
        nn.Linear(width, width, bias=False),
        nn.BatchNorm1d(width),
        nn.ReLU(),
        nn.Linear(width, outputs),
        nn.BatchNorm1d(outputs, affine=False),
    )


def predictor() -> dict[str, Tensor]:
    layers = nn.Sequential(nn.Linear(24, 40, bias=False), nn.BatchNorm1d(40), nn.ReLU())
    return prefixed("module.predictor.", layers.state_dict())


def moco_v3(arch: str = "resnet18") -> tuple[nn.Module, dict]:
    """(base encoder, checkpoint as moco-v3's main_moco.py saves it)."""
    base, momentum = resnet18(), resnet18(seed=1)
    for network in (base, momentum):
        network.fc = projector_v3(512, 40, 24)
        seasoned(network)
    state = {
        **prefixed("module.base_encoder.", base.state_dict()),
        **prefixed("module.momentum_encoder.", momentum.state_dict()),
        **predictor(),
    }
    parameters = [p.requires_grad_() for p in base.parameters()]
    optimizer = torch.optim.SGD(parameters, 0.1, momentum=0.9)
    scaler = {"scale": 65536.0, "growth_factor": 2.0, "_growth_tracker": 7}
    return base, {"epoch": 300, "arch": arch, "state_dict": state, "scaler": scaler,
                  "optimizer": optimizer.state_dict()}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*old format")
@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
def test_moco_v3_gives_the_base_encoder(new: bool, tmp_path: Path) -> None:
    base, content = moco_v3()
    path = tmp_path / "r-50-300ep.pth.tar"
    torch.save(content, path, _use_new_zipfile_serialization=new)
    assert_gives(
        path, base, "projection", layout="moco-v3", encoder="base_encoder", arch="resnet18",
        head="mlp", epoch=300, feature_dim=512, objective=None, args={},
    )  # fmt: skip
    _, info = load_encoder(path, head="projection")
    beside = {name.removeprefix("module.") for name in content["state_dict"]}
    assert info["beside"] == sorted(n for n in beside if not n.startswith("base_encoder."))
    assert info["ignored"] == [] and info["matched"] == len(base.state_dict())
    with pytest.raises(CheckpointError, match="has a projection head, linear was asked for"):
        load_encoder(path, head="linear")


def test_simsiam_gives_the_encoder(tmp_path: Path) -> None:
    network = resnet18(24)
    network.fc = projector_simsiam(512, 24)
    seasoned(network)
    state = {**prefixed("module.encoder.", network.state_dict()), **predictor()}
    content = {"epoch": 100, "arch": "resnet18", "state_dict": state, "optimizer": {}}
    torch.save(content, path := tmp_path / "checkpoint_0099.pth.tar")
    assert_gives(path, network, "projection", layout="simsiam", encoder="encoder", epoch=100,
                 head="mlp", arch="resnet18")  # fmt: skip
    # A file whose head and predictor were left out, as users report of published ones.
    kept = {name: t for name, t in state.items() if name.startswith("module.encoder.")}
    content["state_dict"] = {name: t for name, t in kept.items() if ".fc." not in name}
    torch.save(content, path)
    encoder, info = load_encoder(path)
    assert torch.equal(encoder(IMAGES), features_of(network))
    assert (info["layout"], info["head"], info["head_use"]) == ("simsiam", "none", "none")
    with pytest.raises(CheckpointError, match="has no head, projection was asked for"):
        load_encoder(path, head="projection")


def test_a_vision_transformer_is_not_taken_for_simsiams(tmp_path: Path) -> None:
    """Torchvision's names begin with encoder. too."""
    state = encoders.build_encoder("vit_b_32", 3, image_size=32).state_dict()
    torch.save({"state_dict": state}, path := tmp_path / "a.pth")
    _, info = load_encoder(path)
    assert (info["arch"], info["layout"], info["encoder"]) == ("vit_b_32", "lincls", None)
    assert info["beside"] == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"fc.0.weight": torch.ones(40, 9)}, "0.weight is (40, 9), expected (outputs, 512)"),
        ({"fc.3.weight": torch.ones(24)}, "3.weight is (24,), expected (outputs, 40)"),
        ({"fc.1.running_mean": torch.ones(39)}, "fc.1.running_mean is (39,), expected (40,)"),
        ({"fc.9.weight": torch.ones(3, 24)}, "layer 9 follows layer 4"),
        ({"fc.999.weight": torch.ones(3, 24)}, "layer 999 follows layer 4"),
    ],
)
def test_heads_whose_layers_do_not_fit_are_named(change: dict, said: str, tmp_path: Path) -> None:
    _, content = moco_v3()
    content["state_dict"] |= prefixed("module.base_encoder.", change)
    torch.save(content, path := tmp_path / "a.pth")
    assert load_encoder(path)[1]["head"] == "mlp"  # features need no head
    with pytest.raises(CheckpointError) as caught:
        load_encoder(path, head="projection")
    assert said in str(caught.value) and str(path) in str(caught.value)


# ------------------------------------------------------------------------------------------------
# timm
# ------------------------------------------------------------------------------------------------


def test_timms_files(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    network = seasoned(timm.create_model("resnet18", num_classes=7))
    torch.save(network.state_dict(), tmp_path / "resnet18.pth")
    timm.models.save_for_hf(network, tmp_path / "hub", safe_serialization="both")
    for name in ("resnet18.pth", "hub/model.safetensors", "hub/pytorch_model.bin", "hub"):
        path = tmp_path / name
        assert_gives(path, network, "linear", arch="resnet18", layout="plain", head="linear")
    bare = seasoned(timm.create_model("resnet18", num_classes=0))
    torch.save(bare.state_dict(), path := tmp_path / "bare.pth")
    encoder, info = load_encoder(path)
    assert torch.equal(encoder(IMAGES), bare(IMAGES))
    assert info["head"] == "none" and info["ignored"] == []


def test_timms_training_checkpoint(tmp_path: Path) -> None:
    """The averaged weights are taken, as by timm itself; its `version` is not this project's."""
    timm = pytest.importorskip("timm")
    from timm.utils import CheckpointSaver, ModelEmaV3

    torch.manual_seed(0)
    network = seasoned(timm.create_model("resnet18", num_classes=7))
    average = ModelEmaV3(network, decay=0.5)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(1.5)
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    saver = CheckpointSaver(
        network, optimizer, model_ema=average, checkpoint_dir=str(tmp_path), recovery_dir="",
    )  # fmt: skip
    saver.save_checkpoint(3, metric=71.5)
    path = tmp_path / "last.pth.tar"
    assert torch.load(path)["version"] > checkpoint.FORMAT_VERSION
    assert_gives(path, average.module, "linear", layout="timm", epoch=3, arch="resnet18")
    loaded = timm.create_model("resnet18", num_classes=7, checkpoint_path=str(path)).eval()
    assert torch.equal(loaded(IMAGES), average.module(IMAGES))


def test_an_architecture_of_timm_alone_is_refused_with_the_nearest(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    state = timm.create_model("resnet26", num_classes=0).state_dict()
    torch.save({"arch": "resnet26", "state_dict": state}, path := tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=r"no known architecture.*it says arch 'resnet26'"):
        load_encoder(path)


# ------------------------------------------------------------------------------------------------
# detectron2
# ------------------------------------------------------------------------------------------------


def to_detectron2(name: str) -> str:
    """What upstream's converter makes of a name of torchvision's; written for these tests."""
    if not name.startswith("layer"):
        name = f"stem.{name}"
    for number in (4, 3, 2, 1):
        name = name.replace(f"layer{number}.", f"res{number + 1}.")
        name = name.replace(f"bn{number}.", f"conv{number}.norm.")
    return name.replace("downsample.0.", "shortcut.").replace("downsample.1.", "shortcut.norm.")


def detectron2_content(network: nn.Module, leave: str = "nothing") -> dict:
    arrays = {
        to_detectron2(name): tensor.numpy()
        for name, tensor in network.state_dict().items()
        if leave not in name
    }
    return {"model": arrays, "__author__": "MOCO", "matching_heuristics": True}


@pytest.fixture(scope="module")
def with_mlp() -> nn.Module:
    """A small network of torchvision's kind, blocks with three convolutions, and MoCo v2's head."""
    torch.manual_seed(0)
    network = torchvision.models.ResNet(
        torchvision.models.resnet.Bottleneck, [3, 4, 6, 3], num_classes=12
    )
    encoders.add_mlp_head(network)
    return seasoned(network)


def test_detectron2s_pickle(tmp_path: Path, with_mlp: nn.Module) -> None:
    """Of upstream's converter, which keeps the head under stem.fc; with the batch counts, and
    without, as detectron2 has no use for them."""
    content = detectron2_content(with_mlp)
    assert {"stem.conv1.norm.weight", "res2.0.shortcut.norm.bias", "res5.2.conv3.norm.running_var",
            "stem.fc.2.bias"} < content["model"].keys()  # fmt: skip
    path = tmp_path / "moco.pkl"
    for leave in ("nothing", "num_batches_tracked"):
        path.write_bytes(pickle.dumps(detectron2_content(with_mlp, leave)))
        with pytest.warns(UserWarning, match="moco.pkl is a pickle of arrays"):
            assert_gives(path, with_mlp, "projection", layout="detectron2", arch="resnet50",
                         head="mlp", epoch=None, encoder=None)  # fmt: skip


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


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
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


class Calls:
    """Pickles to a call."""

    def __init__(self, function, *arguments) -> None:
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize(
    ("function", "arguments", "name"),
    [
        (eval, ("open('{}', 'w')",), "eval"),
        (open, ("{}", "w"), "open"),
        (np.fromfile, ("{}",), "fromfile"),
        (np.memmap, ("{}", "uint8", "w+", 0, (4,)), "memmap"),
        (getattr, (np, "save"), "getattr"),
        (torch.storage._load_from_bytes, (b"{}",), "_load_from_bytes"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_pickle_of_arrays_may_ask_for_nothing_else(
    function, arguments: tuple, name: str, protocol: int, tmp_path: Path
) -> None:
    marker = tmp_path / "it-ran"
    words = [w.format(marker) if isinstance(w, str) else w for w in arguments]
    if function is getattr:
        words = ["numpy", "save"]
    array = np.ones(3, dtype=np.float32)
    path = tmp_path / "a.pkl"
    for content in (
        {"model": {"a": array, "b": Calls(function, *words)}},
        {"model": {"a": array}, "more": [Calls(function, *words)]},
        Calls(function, *words),
    ):
        path.write_bytes(pickle.dumps(content, protocol))
        with pytest.raises(CheckpointError) as caught:
            load_encoder(path)
        assert "nothing in it was run: it asks for" in str(caught.value)
        assert name in str(caught.value) and "\n" not in str(caught.value)
        assert not marker.exists()


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


def test_damaged_pickles_of_arrays_are_refused(tmp_path: Path) -> None:
    """Cut off anywhere, with a byte changed, or with something behind."""
    path = tmp_path / "a.pkl"
    for protocol in (2, 5):
        data, arrays = small_pickle(protocol)
        for length in range(1, len(data)):
            path.write_bytes(data[:length])
            with pytest.raises(CheckpointError, match="a.pkl"):
                checkpoint.read_checkpoint(path)
        path.write_bytes(data + b".")
        with pytest.raises(CheckpointError, match="something follows its end"):
            checkpoint.read_checkpoint(path)
        for at in range(2, len(data)):
            path.write_bytes(data[:at] + bytes([data[at] ^ 0x11]) + data[at + 1 :])
            try:
                checkpoint.read_checkpoint(path)
            except CheckpointError as error:
                assert str(path) in str(error)


# ------------------------------------------------------------------------------------------------
# Names and number formats
# ------------------------------------------------------------------------------------------------


def small(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return seasoned(encoders.build_encoder("resnet8", 5))


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.",
                                    "_orig_mod.module.", "module.module.", "model.",
                                    "module.model._orig_mod."])  # fmt: skip
def test_wrappers_in_names_are_passed_over(prefix: str, tmp_path: Path) -> None:
    network = small()
    state = prefixed(prefix, network.state_dict())
    for content in (state, {"state_dict": state}, {"model": state, "epoch": 4, "lr": 0.1}):
        torch.save(content, path := tmp_path / "a.pth")
        layout = "lincls" if "state_dict" in content else "plain"
        assert_gives(path, network, "linear", arch="resnet8", layout=layout,
                     epoch=content.get("epoch"))  # fmt: skip
    moco = prefixed(prefix, prefixed("encoder_q._orig_mod.", network.state_dict()))
    torch.save({"state_dict": moco}, path)
    assert_gives(path, network, "projection", layout="moco", encoder="encoder_q")


def test_what_other_files_are_and_the_remedy(tmp_path: Path) -> None:
    state = small().state_dict()
    torch.save(state, tmp_path / "a.safetensors")
    write_safetensors(tmp_path / "cut.safetensors", state, {})
    data = (tmp_path / "cut.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(data[: len(data) // 2])
    np.savez(tmp_path / "a.npz", **{name: tensor.numpy() for name, tensor in state.items()})
    np.save(tmp_path / "a.npy", np.zeros(3))
    torch.save({"state_dict": {}}, tmp_path / "none.pth")
    torch.save(small(), tmp_path / "module.pth")
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


def test_real_compiled_and_parallel_modules(tmp_path: Path) -> None:
    network = small()
    wrapped = torch.nn.DataParallel(torch.compile(network))
    torch.save(wrapped.state_dict(), path := tmp_path / "a.pth")
    assert next(iter(wrapped.state_dict())).startswith("module._orig_mod.")
    assert_gives(path, network, "linear", arch="resnet8")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_half_precision_becomes_float32_of_the_same_values(dtype, suffix, tmp_path: Path) -> None:
    state = {
        n: t.to(dtype) if t.is_floating_point() else t for n, t in small().state_dict().items()
    }
    path = tmp_path / f"a{suffix}"
    if suffix == ".pth":
        torch.save(state, path)
    else:
        write_safetensors(path, state, {})
    encoder, _ = load_encoder(path, head="linear")
    for name, tensor in encoder.state_dict().items():
        assert tensor.dtype == (torch.float32 if state[name].is_floating_point() else torch.int64)
        assert torch.equal(tensor, state[name].to(tensor.dtype)), name


def test_a_folder_of_hugging_face_is_its_model_safetensors(tmp_path: Path) -> None:
    network = small()
    with pytest.raises(FileNotFoundError, match="is a folder; give a file in it"):
        load_encoder(tmp_path)
    write_safetensors(tmp_path / "model.safetensors", network.state_dict(), {})
    assert_gives(tmp_path, network, "linear", arch="resnet8")


def test_tensors_beside_the_encoder_are_listed(tmp_path: Path) -> None:
    network = small()
    state = {
        **prefixed("module.encoder_q.", network.state_dict()),
        "module.queue": torch.ones(5, 8),
        "module.scalar_label": torch.tensor(0),
    }
    torch.save({"state_dict": state}, path := tmp_path / "a.pth")
    _, info = load_encoder(path)
    assert info["beside"] == ["queue", "scalar_label"]
    assert info["ignored"] == ["fc.bias", "fc.weight"]


# ------------------------------------------------------------------------------------------------
# Safetensors that say what they are
# ------------------------------------------------------------------------------------------------

ARGS = {"objective": "3*align(alpha=2) + 1*uniform(t=3)", "image_size": 32, "mean": [0.5, 0.4, 0.3],
        "crop_scale": [0.2, 1.0], "name": "größer"}  # fmt: skip


def test_safetensors_say_what_a_checkpoint_says(tmp_path: Path) -> None:
    """For any reader they are tensors by name; the same content makes the same bytes."""
    from safetensors import safe_open

    network = small()
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
    network.load_state_dict(state)
    assert_gives(path, network, "linear", arch="resnet8", epoch=7, args=ARGS,
                 objective=ARGS["objective"])  # fmt: skip


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
    save_file(dict(small().state_dict()), path, {"format": "pt", "moco_align_uniform": said})
    with pytest.raises(CheckpointError) as caught:
        load_encoder(path)
    assert str(caught.value).startswith(f"{path}") and message in str(caught.value)


# ------------------------------------------------------------------------------------------------
# Versions
# ------------------------------------------------------------------------------------------------


def version_1() -> dict:
    """Written out as the first version of main_moco.py did."""
    moco = prefixed("module.encoder_q.", small().state_dict())
    return {
        "version": 1,
        "arch": "resnet8",
        "epoch": 3,
        "step": 30,
        "step_in_epoch": 0,
        "state_dict": {**moco, **prefixed("module.encoder_k.", small(1).state_dict())},
        "optimizer": {"state": {}, "param_groups": []},
        "args": {"objective": "1*align", "image_size": 32},
    }


def test_older_files_are_read(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint_0002.pth.tar"
    old = version_1()
    write_checkpoint(path, old)
    assert_gives(path, small(), "projection", epoch=3, objective="1*align", layout="moco")
    del old["version"]  # upstream's have none
    torch.save(old, path)
    assert_gives(path, small(), "projection", epoch=3, objective="1*align", layout="moco")


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


def test_resuming_by_version(tmp_path: Path) -> None:
    """main_moco.py goes on from a file without a version, and refuses a newer one by name."""
    write_images(tmp_path / "data", {"train/a": 20, "train/b": 20}, size=16)
    flags = (
        "-a resnet8 --image-size 16 --batch-size 8 --moco-k 16 --moco-dim 8 --bn-splits 1 -j 0 "
        "--seed 1 --device cpu"
    ).split()

    def train(name: str, *more: object) -> tuple[int, str]:
        words = [*flags, "--save-dir", tmp_path / name, *more, tmp_path / "data"]
        run = harness.Processes(tmp_path / f"{name}.out", *words)
        return run.wait()[0], run.output()

    status, output = train("first", "--epochs", 1)
    assert status == 0, output
    path = tmp_path / "first" / "checkpoint_0000.pth.tar"
    content = checkpoint.read_checkpoint(path)
    assert content["version"] == checkpoint.FORMAT_VERSION
    newer = {**content, "version": checkpoint.FORMAT_VERSION + 1}
    write_checkpoint(tmp_path / "newer.pth.tar", newer)
    status, output = train("second", "--epochs", 2, "--resume", tmp_path / "newer.pth.tar")
    assert status == 1 and "Traceback" not in output
    assert "newer.pth.tar has format version" in output
    del content["version"]
    torch.save(content, tmp_path / "older.pth.tar")
    status, output = train(
        "third", "--epochs", 2, "--resume", tmp_path / "older.pth.tar", "--allow-changes"
    )
    assert status == 0, output
    assert load_encoder(tmp_path / "third" / "checkpoint_0001.pth.tar")[1]["epoch"] == 2


# ------------------------------------------------------------------------------------------------
# What is asked for and is not there
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "module.", "module.encoder_q."])
def test_a_head_alone_is_no_encoder(prefix: str, tmp_path: Path) -> None:
    for state in ({"fc.weight": torch.ones(5, 64), "fc.bias": torch.ones(5)},
                  {"classifier.0.weight": torch.ones(2, 3)}):  # fmt: skip
        torch.save({"state_dict": prefixed(prefix, state)}, path := tmp_path / "a.pth")
        with pytest.raises(CheckpointError, match=f"{path} holds a head only .*no backbone") as e:
            load_encoder(path)
        assert "expected the state dict of a whole network" in str(e.value)


def test_a_projection_of_a_state_dict_alone(tmp_path: Path) -> None:
    """As a release file has it: torchvision's names, fc.0 and fc.2."""
    torch.manual_seed(0)
    network = encoders.build_encoder("resnet8", 12)
    encoders.add_mlp_head(network)
    seasoned(network)
    torch.save(network.state_dict(), path := tmp_path / "a.pth")
    assert_gives(path, network, "projection", head="mlp", layout="plain")


def test_a_hash_is_checked_for_files_too(tmp_path: Path) -> None:
    import hashlib

    torch.save(small().state_dict(), path := tmp_path / "a.pth")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    for right in (digest, digest[:8], digest.upper()):
        load_encoder(path, sha256=right)
    with pytest.raises(CheckpointError) as caught:
        load_encoder(path, sha256="0123456789")
    assert f"{path} has SHA-256 {digest}, expected 0123456789" in str(caught.value)
    for wrong in ("0123", "xyz" * 4, "", digest + "0"):
        with pytest.raises(ValueError, match="sha256 must be 8 to 64 hexadecimal digits, got"):
            load_encoder(path, sha256=wrong)
