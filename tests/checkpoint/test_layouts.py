"""Checkpoints of other projects: where their encoder is, and what lies beside it."""

from __future__ import annotations

import argparse
import collections
import datetime
import enum
import functools
import pathlib
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from networks import (
    IMAGES,
    OLD,
    assert_gives,
    features_of,
    projector,
    resnet18,
    seasoned,
    to_detectron2,
    under,
    write_arrays,
)
from torch import Tensor, nn

from moco.checkpoint import FORMAT_VERSION, load_encoder, read_checkpoint
from moco.checkpoint.architectures import STEMS
from moco.encoders import add_mlp_head, arch_names, build_encoder


@pytest.fixture(scope="module")
def network() -> nn.Module:
    return seasoned(resnet18())


@pytest.fixture(scope="module")
def features(network: nn.Module) -> Tensor:
    return features_of(network)


@pytest.fixture
def whole(network: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


@pytest.fixture
def body(whole: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in whole.items() if not name.startswith("fc.")}


def other(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same names with other weights."""
    return {name: t * 0.5 if t.is_floating_point() else t for name, t in state.items()}


def numbered(state: dict[str, Tensor], numbers: str = "0 1 4 5 6 7 9") -> dict[str, Tensor]:
    """As a Sequential of the network's children names them."""
    children = ("conv1", "bn1", "layer1", "layer2", "layer3", "layer4", "fc")
    of = dict(zip(children, numbers.split(), strict=False))
    split = ((name.partition("."), tensor) for name, tensor in state.items())
    return {f"{of[child]}.{rest}": tensor for (child, _, rest), tensor in split}


MLP = {"0.weight": torch.ones(9, 512), "0.bias": torch.ones(9), "2.weight": torch.ones(4, 9)}
PROBE = {"weight": torch.ones(3, 512), "bias": torch.ones(3)}


def state_dict(*parts: dict) -> dict:
    return {"state_dict": functools.reduce(dict.__or__, parts), "epoch": 3}


# layout: (content from the backbone and from the whole network, what info calls the encoder)
LAYOUTS = {
    "lightly": (
        lambda body, _: state_dict(
            under("backbone.", numbered(body)),
            under("backbone_momentum.", numbered(other(body))),
            under("projection_head.layers.", MLP),
        ),
        "backbone",
    ),
    "lightly's own ResNet, whose ReLU has no number": (
        lambda body, _: state_dict(under("backbone.", numbered(body, "0 1 2 3 4 5"))),
        "backbone",
    ),
    "solo-learn": (
        lambda body, _: state_dict(
            under("backbone.", body),
            under("momentum_backbone.", other(body)),
            under("classifier.", PROBE),
            {"queue": torch.ones(2, 8, 4)},
        ),
        "backbone",
    ),
    "mmselfsup": (
        lambda body, _: state_dict(
            under("backbone.", body), under("encoder_q.0.", body), under("encoder_q.1.mlp.", MLP),
            under("encoder_k.0.", other(body)),
        ),
        "backbone",
    ),
    "Barlow Twins": (
        lambda body, _: {
            "epoch": 10, "optimizer": {"state": {0: {"momentum_buffer": torch.ones(3)}}},
            "model": under("module.", under("backbone.", body) | under("projector.", MLP)),
        },
        "backbone",
    ),
    "DINO": (
        lambda body, _: {
            "student": under("module.backbone.", body) | under("module.head.mlp.", MLP),
            "teacher": under("backbone.", other(body)) | under("head.mlp.", MLP),
            "epoch": 5,
        },
        "student.module.backbone",
    ),
    "BYOL": (
        lambda body, _: {
            "online": under("net.", body), "target": under("net.", other(body)),
        },
        "online.net",
    ),
    "SwAV": (
        lambda body, _: state_dict(
            under("module.", body),
            under("module.projection_head.", MLP),
            {"module.prototypes.weight": torch.ones(3, 8)},
        ),
        None,
    ),
    "VISSL": (
        lambda body, _: {
            "classy_state_dict": {
                "base_model": {"model": {"trunk": under("_feature_blocks.", body)}}
            }
        },
        "classy_state_dict.base_model.model.trunk._feature_blocks",
    ),
    "SupContrast": (
        lambda body, _: {"model": under("encoder.module.", body) | under("head.", MLP)},
        "encoder.module",
    ),
    "fastai": (lambda body, _: {"model": under("0.", numbered(body)) | under("1.8.", PROBE)}, "0"),
    "lightning around MoCo": (
        lambda _, whole: state_dict(
            under("learner.encoder_q.", whole), under("learner.encoder_k.", other(whole))
        ),
        "learner.encoder_q",
    ),
    "a dict of another name": (lambda _, whole: {"model_state_dict": whole}, "model_state_dict"),
    "a Sequential with its head": (lambda _, whole: numbered(whole), None),
    "a teacher alone": (lambda body, _: {"teacher": under("backbone.", body)}, "teacher.backbone"),
    "one encoder twice": (
        lambda body, _: state_dict(under("a.", body), under("b.", body)),
        "a",
    ),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_other_projects_give_their_encoder(
    layout: str, body: dict, whole: dict, features: Tensor, save
) -> None:
    make, name = LAYOUTS[layout]
    encoder, info = load_encoder(save(make(body, whole)))
    with torch.no_grad():
        assert torch.equal(encoder(IMAGES), features)
    assert (info["arch"], info["encoder"]) == ("resnet18", name)
    assert info["matched"] == len(body)
    is_moco = layout == "lightning around MoCo"
    assert (info["layout"] == "moco") == (info["head_use"] == "projection") == is_moco


@pytest.mark.parametrize("arch", ["mobilenet_v3_small", "regnet_x_400mf"])
def test_other_architectures_behind_a_prefix(arch: str, save) -> None:
    torch.manual_seed(0)
    network = seasoned(build_encoder(arch, 3))
    path = save(state_dict(under("net.backbone.", network.state_dict())))
    assert_gives(path, network, "linear", arch=arch, encoder="net.backbone")


@pytest.mark.long
def test_every_architecture_is_known_by_its_first_convolution() -> None:
    for name in arch_names():
        try:
            with torch.device("meta"):
                state = build_encoder(name, 3).state_dict()
        except (ValueError, NotImplementedError):  # no last linear layer; RegNet
            continue
        stem = next(key for key, tensor in state.items() if tensor.dim() == 4)
        assert re.match(STEMS[stem], name), name


def test_two_encoders_that_differ_are_refused_by_name(body: dict, not_loaded) -> None:
    message = not_loaded(state_dict(under("left.", body), under("right.", other(body))))
    assert "holds encoders that differ, under left. and right.: give a" in message


@pytest.mark.parametrize(
    ("leader", "follower"),
    [("backbone.", "backbone_momentum."), ("module.encoder_q.", "module.encoder_k."),
     ("student.", "teacher."), ("base_encoder.", "momentum_encoder.")],
)  # fmt: skip
@pytest.mark.parametrize("lost", ["conv1.weight", "layer3.1.bn2.weight"])
def test_a_damaged_encoder_is_not_replaced_by_its_average(
    leader: str, follower: str, lost: str, body: dict, not_loaded
) -> None:
    content = state_dict(under(leader, body), under(follower, other(body)))
    del content["state_dict"][leader + lost]
    message = not_loaded(content)
    assert "no known architecture has these" in message
    assert lost == "conv1.weight" or f"Against resnet18: 1 missing ({lost})" in message


# ---- MoCo v3 and SimSiam -------------------------------------------------------------------------


def predictor() -> dict[str, Tensor]:
    layers = nn.Sequential(nn.Linear(24, 40, bias=False), nn.BatchNorm1d(40), nn.ReLU())
    return under("module.predictor.", layers.state_dict())


@pytest.mark.filterwarnings("ignore:.*old format")
@pytest.mark.parametrize("options", [{}, OLD], ids=["zip", "legacy"])
def test_moco_v3_gives_the_base_encoder(options: dict, save, not_loaded) -> None:
    """From a checkpoint as moco-v3's main_moco.py saves it."""
    base, momentum = resnet18(), resnet18(seed=1)
    for network in (base, momentum):
        network.fc = projector(512, 40, 24, bias=False)
        seasoned(network)
    beside = under("momentum_encoder.", momentum.state_dict())
    state = under("module.base_encoder.", base.state_dict()) | under("module.", beside)
    content = {"epoch": 300, "arch": "resnet18", "state_dict": state | predictor(),
               "scaler": {"scale": 65536.0, "growth_factor": 2.0, "_growth_tracker": 7},
               "optimizer": torch.optim.SGD(base.parameters(), 0.1).state_dict()}  # fmt: skip
    path = save(content, "r-50-300ep.pth.tar", **options)
    names = sorted([*beside, *(name.removeprefix("module.") for name in predictor())])
    assert_gives(
        path, base, "projection", layout="moco-v3", encoder="base_encoder", arch="resnet18",
        head="mlp", epoch=300, feature_dim=512, objective=None, args={}, beside=names,
    )  # fmt: skip
    assert "has a projection head, linear was asked for" in not_loaded(path, "linear")


def test_simsiam_gives_the_encoder(save, not_loaded) -> None:
    network = resnet18(24)
    network.fc = projector(512, 512, 512, 24, bias=True)
    seasoned(network)
    state = {**under("module.encoder.", network.state_dict()), **predictor()}
    content = {"epoch": 100, "arch": "resnet18", "state_dict": state, "optimizer": {}}
    assert_gives(save(content), network, "projection", layout="simsiam", encoder="encoder",
                 epoch=100, head="mlp", arch="resnet18")  # fmt: skip
    # A file whose head and predictor were left out, as users report of published ones.
    kept = {name: t for name, t in state.items() if name.startswith("module.encoder.")}
    content["state_dict"] = {name: t for name, t in kept.items() if ".fc." not in name}
    encoder, info = load_encoder(path := save(content))
    assert torch.equal(encoder(IMAGES), features_of(network))
    assert (info["layout"], info["head"], info["head_use"]) == ("simsiam", "none", "none")
    assert info["ignored"] == []
    for head in ("linear", "projection"):
        assert f"has no head, {head} was asked for" in not_loaded(path, head)


@pytest.mark.long
@pytest.mark.filterwarnings("error")
def test_a_vision_transformer_is_not_taken_for_simsiams(save) -> None:
    """Torchvision's names begin with encoder. too."""
    state = build_encoder("vit_b_32", 3, image_size=32).state_dict()
    _, info = load_encoder(save({"state_dict": state}))
    assert (info["arch"], info["layout"], info["encoder"]) == ("vit_b_32", "lincls", None)
    assert info["beside"] == []


# ---- timm and detectron2 -------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*model.safetensors is a safetensors file without")
def test_timms_files(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    network = seasoned(timm.create_model("resnet18", num_classes=7))
    torch.save(network.state_dict(), tmp_path / "resnet18.pth")
    timm.models.save_for_hf(network, tmp_path / "hub", safe_serialization="both")
    for name in ("resnet18.pth", "hub/model.safetensors", "hub/pytorch_model.bin", "hub"):
        path = tmp_path / name
        assert_gives(path, network, "linear", arch="resnet18", layout="plain", head="linear")


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
    assert torch.load(path)["version"] > FORMAT_VERSION
    assert_gives(path, average.module, "linear", layout="timm", epoch=3, arch="resnet18")
    loaded = timm.create_model("resnet18", num_classes=7, checkpoint_path=str(path)).eval()
    assert torch.equal(loaded(IMAGES), average.module(IMAGES))


def test_detectron2s_pickle(tmp_path: Path) -> None:
    """Of upstream's converter, which keeps the head under stem.fc; with the batch counts, and
    without, as detectron2 has no use for them. Blocks with three convolutions, MoCo v2's head."""
    torch.manual_seed(0)
    bottleneck = torchvision.models.resnet.Bottleneck
    network = torchvision.models.ResNet(bottleneck, [3, 4, 6, 3], num_classes=12)
    add_mlp_head(network)
    state = seasoned(network).state_dict()
    assert {"stem.conv1.norm.weight", "res2.0.shortcut.norm.bias", "res5.2.conv3.norm.running_var",
            "stem.fc.2.bias"} < set(map(to_detectron2, state))  # fmt: skip
    path = tmp_path / "moco.pkl"
    for leave in ("nothing", "num_batches_tracked"):
        write_arrays(path, {name: t for name, t in state.items() if leave not in name})
        with pytest.warns(UserWarning, match="moco.pkl is a pickle of arrays"):
            assert_gives(path, network, "projection", layout="detectron2", arch="resnet50",
                         head="mlp", epoch=None, encoder=None)  # fmt: skip


# ---- Beside the weights --------------------------------------------------------------------------


class Phase(enum.Enum):
    TRAIN = "train"


class Settings(dict):
    """As lightning's AttributeDict and mmengine's ConfigDict are."""


class Plain:
    def __init__(self) -> None:
        self.value = 3


BESIDE = {
    "args": (argparse.Namespace(model="resnet18", lr=0.1), {"model": "resnet18", "lr": 0.1}),
    "best": (np.float64(71.1), 71.1),
    "count": (np.int64(7), 7),
    "flag": (np.bool_(True), True),
    "small": (np.float32(0.5), 0.5),
    "word": (np.str_("ä"), "ä"),
    "array": (np.arange(3.0), torch.arange(3.0, dtype=torch.float64)),
    "names": (np.array(["cat", "dog"]), "<an array of type <U3>"),
    "random": (np.random.RandomState(0).get_state()[0], "MT19937"),
    "place": (pathlib.PurePosixPath("/data"), "<pathlib.PurePosixPath>"),
    "when": (datetime.timedelta(seconds=3), "<datetime.timedelta>"),
    "counts": (collections.Counter(a=2), {"a": 2}),
    "numbered": ({np.int64(3): 1, np.str_("b"): 2}, {3: 1, "b": 2}),
    "typed": ({torch.float16: 1}, {"<torch.float16>": 1}),
    "default": (collections.defaultdict(list, {"a": [1]}), {"a": [1]}),
    "queue": (collections.deque([1, 2], maxlen=3), [1, 2]),
    "set": ({1, 2}, {1, 2}),
    "frozen": (frozenset("a"), {"a"}),
    "bytes": (b"\x00\xff", b"\x00\xff"),
    "buffer": (bytearray(b"ab"), b"ab"),
    "settings": (Settings(lr=0.1), {"lr": 0.1}),
    "object": (Plain(), f"<{__name__}.Plain>"),
    "class": (torch.optim.SGD, "<torch.optim.sgd.SGD>"),
    "partial": (functools.partial(torch.optim.SGD, lr=1), "<functools.partial>"),
    "dtype": (torch.float16, "<torch.float16>"),
    "device": (torch.device("cpu"), "<torch.device>"),
    "shape": (torch.Size([2, 3]), (2, 3)),
    "parameter": (nn.Parameter(torch.ones(2)), torch.ones(2)),
    "eighth": (torch.ones(2).to(torch.float8_e4m3fn), torch.ones(2).to(torch.float8_e4m3fn)),
    "many bits": (torch.tensor([70_000], dtype=torch.uint32), torch.tensor([70_000])),
}


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("protocol", [0, 1, 2, 4])
@pytest.mark.parametrize("options", [{}, OLD], ids=["zip", "old"])
def test_what_people_keep_beside_weights(
    options: dict, protocol: int, whole: dict, features: Tensor, save
) -> None:
    """Of every pickle protocol, in both of torch's formats; objects become text."""
    content = {key: value for key, (value, _) in BESIDE.items()}
    content |= {"phase": Phase.TRAIN} if protocol >= 2 else {}
    path = save({"model": whole, **content}, pickle_protocol=protocol, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the old format has no checksums
        found = read_checkpoint(path)
        encoder, info = load_encoder(path)
    for key, (_, wanted) in BESIDE.items():
        if isinstance(wanted, Tensor):
            assert torch.equal(found[key].float(), wanted.float()), key
        else:
            assert found[key] == wanted and isinstance(found[key], type(wanted)), key
    assert protocol < 2 or found["phase"] == f"<{__name__}.Phase>"
    with torch.no_grad():
        assert torch.equal(encoder(IMAGES), features)
    assert info["args"] == {"model": "resnet18", "lr": 0.1}


def test_tied_weights_stay_tied_and_strides_are_kept(save) -> None:
    tied = torch.arange(12.0).reshape(3, 4)
    found = read_checkpoint(save({"a": tied, "b": tied.t(), "c": tied[1:, ::2]}))
    assert torch.equal(found["b"], tied.t()) and torch.equal(found["c"], tied[1:, ::2])
    assert found["a"].data_ptr() == found["b"].data_ptr()
