"""Encoders: heads of many architectures, stems, small ResNets."""

import copy

import pytest
import torch
import torchvision
from torch import nn

from moco import encoders
from moco.encoders import (
    CifarResNet,
    ProjectionHead,
    add_mlp_head,
    build_encoder,
    build_head,
    check_image_size,
    feature_dim,
    get_head,
    head_name,
    set_head,
)

# ---- Heads ---------------------------------------------------------------------------------------

HEADS = {
    "resnet18": ("fc", 512),
    "resnet50": ("fc", 2048),
    "vgg11_bn": ("classifier.6", 4096),
    "densenet121": ("classifier", 1024),
    "mobilenet_v3_small": ("classifier.3", 1024),
    "vit_b_16": ("heads.head", 768),
    "convnext_tiny": ("classifier.2", 768),
    "swin_t": ("head", 768),
    "resnet8": ("fc", 64),
}


@pytest.mark.parametrize("arch", HEADS)
def test_head_is_the_last_linear_layer(arch):
    """Found, measured, replaced and found again under the name that state dicts have for it."""
    name, width = HEADS[arch]
    with torch.device("meta"):
        encoder = build_encoder(arch, 7)
        assert head_name(encoder) == name
        head = get_head(encoder)
        assert type(head) is nn.Linear and head.out_features == 7
        assert feature_dim(encoder) == head.in_features == width
        assert name + ".weight" in encoder.state_dict()

        add_mlp_head(encoder)
        assert isinstance(get_head(encoder), ProjectionHead)
        assert (head_name(encoder), feature_dim(encoder)) == (name, width)
        assert [n for n in encoder.state_dict() if n.startswith(name + ".")] == [
            f"{name}.{part}" for part in ("0.weight", "0.bias", "2.weight", "2.bias")
        ]
        assert get_head(encoder)[2] is head
        assert tuple(get_head(encoder)[0].weight.shape) == (width, width)

        set_head(encoder, nn.Identity())
        assert head_name(encoder) == name
        assert not any(n.startswith(name + ".") for n in encoder.state_dict())


def test_mlp_head_is_linear_relu_linear():
    """As in MoCo v2, and the last of them is the encoder's own layer."""
    encoder = build_encoder("resnet8", 5)
    last = encoder.fc
    add_mlp_head(encoder)
    x = torch.randn(3, 64)
    hidden = (x @ encoder.fc[0].weight.t() + encoder.fc[0].bias).clamp(min=0)
    torch.testing.assert_close(encoder.fc(x), hidden @ last.weight.t() + last.bias)


def test_a_head_is_built_from_its_tensors():
    """Linear layers, batch norms, and a ReLU for each number that is left out between two."""
    layers = [
        nn.Linear(6, 5, bias=False), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 4), nn.Linear(4, 3),
        nn.ReLU(), nn.BatchNorm1d(3, affine=False),
    ]  # fmt: skip
    head = nn.Sequential(*layers)
    built = build_head(head.state_dict(), 6)
    assert isinstance(built, ProjectionHead)
    assert [type(layer) for layer in built] == [type(layer) for layer in layers]
    built.load_state_dict(head.state_dict())
    x = torch.randn(8, 6)
    assert torch.equal(built(x), head(x))
    linear = build_head(nn.Linear(6, 5).state_dict(), 6)
    assert type(linear) is nn.Linear and linear.weight.shape == (5, 6) and linear.bias is not None


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"weight": torch.ones(3, 5)}, r"weight is \(3, 5\), expected \(outputs, 6\)"),
        ({"weight": torch.ones(0, 6)}, r"weight is \(0, 6\)"),
        ({"0.bias": torch.ones(3)}, "0.weight is not there"),
        ({"1.weight": torch.ones(3, 6)}, "layer 1 follows layer -1"),
        ({"0.weight": torch.ones(6, 6), "3.weight": torch.ones(6, 6)}, "layer 3 follows layer 0"),
    ],
)
def test_tensors_of_no_head_are_refused(state, message):
    with pytest.raises(ValueError, match=message):
        build_head(state, 6)


@pytest.mark.parametrize(
    ("arch", "options", "message"),
    [
        ("resnet51", {}, "unknown arch 'resnet51'; did you mean .*resnet50"),
        ("ResNet18", {}, "unknown arch 'ResNet18'; did you mean .*resnet18"),
        ("qqqqqq", {}, "unknown arch 'qqqqqq'; see --help for the known ones"),
        ("deeplabv3_resnet50", {}, "unknown arch"),  # torchvision's, but no classifier
        ("squeezenet1_0", {}, "SqueezeNet does not end in a linear layer named fc"),
        ("inception_v3", {}, "arch inception_v3 has auxiliary outputs"),
        ("googlenet", {}, "arch googlenet has auxiliary outputs"),
        ("vgg11", {"small_stem": True}, "--small-stem is for torchvision's ResNets, got vgg11"),
        ("resnet8", {"small_stem": True}, "--small-stem is for torchvision's ResNets, got resnet8"),
        ("small_alexnet", {"image_size": 14}, "at least 15 pixels, got 14"),
        ("small_alexnetx0.001", {"image_size": 32}, "leaves conv1 without channels"),
        ("small_alexnetx", {}, "unknown arch"),
        ("small_alexnetx0", {}, "unknown arch"),
        ("small_alexnetx1e9", {}, "unknown arch"),
    ],
)
def test_what_cannot_be_built_is_refused(arch, options, message):
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        build_encoder(arch, 7, **options)


def test_arch_names_are_torchvisions_classifiers_and_the_small_resnets():
    names = encoders.arch_names()
    assert names == sorted(set(names))
    assert {"resnet18", "resnet50", "vit_b_16", "alexnet", "resnet8", "resnet20"} <= set(names)
    others = {"maskrcnn_resnet50_fpn", "fcn_resnet50", "raft_large", "quantized_resnet50", "r3d_18"}
    assert not others & set(names)


# ---- Stems and sizes -----------------------------------------------------------------------------


def test_small_stem_is_3x3_stride_1_without_max_pool():
    """The output of a 32-pixel image is 16 times as large as with torchvision's stem."""
    with torch.device("meta"):
        small = build_encoder("resnet18", 7, small_stem=True)
        plain = build_encoder("resnet18", 7)
        assert tuple(small.conv1.weight.shape) == (64, 3, 3, 3)
        assert (small.conv1.stride, small.conv1.padding, small.conv1.bias) == ((1, 1), (1, 1), None)
        assert type(small.maxpool) is nn.Identity
        sizes = []
        for encoder in (small, plain):
            encoder.layer1.register_forward_hook(lambda *a: sizes.append(tuple(a[2].shape)))
            encoder(torch.zeros(2, 3, 32, 32))
    assert sizes == [(2, 64, 32, 32), (2, 64, 8, 8)]
    assert small.state_dict().keys() == plain.state_dict().keys()


def test_images_that_are_too_small_are_refused_by_name():
    """AlexNet shrinks 32 pixels to nothing; 64 it can take, and its mode stays as it was."""
    with torch.device("meta"):
        encoder = build_encoder("alexnet", 7).train()
        with pytest.raises(ValueError, match="images of 32 pixels do not fit the encoder: "):
            check_image_size(encoder, 32)
        assert encoder.training
        check_image_size(encoder, 64)
        assert encoder.training
        check_image_size(encoder.eval(), 64)
        assert not encoder.training


def test_check_leaves_batch_norm_statistics_alone():
    encoder = build_encoder("resnet8", 7)
    before = copy.deepcopy(encoder.state_dict())
    check_image_size(encoder, 16)
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_an_encoder_that_returns_no_feature_vector_is_refused():
    with pytest.raises(ValueError, match=r"must return one \(N, C\) tensor, got Tensor"):
        check_image_size(nn.Conv2d(3, 4, 3), 8)


def test_vit_is_built_for_the_image_size():
    with torch.device("meta"):
        encoder = build_encoder("vit_b_16", 7, image_size=64)
        assert encoder.encoder.pos_embedding.shape[1] == (64 // 16) ** 2 + 1
        check_image_size(encoder, 64)
        with pytest.raises(ValueError, match="images of 32 pixels do not fit"):
            check_image_size(encoder, 32)


# ---- Small ResNets -------------------------------------------------------------------------------


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    ("depth", "millions"), [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85), (110, 1.7)]
)
def test_cifar_resnets_have_the_papers_number_of_parameters(depth, millions):
    """Table 6 of He et al. 2016, plus the two 1x1 shortcuts and their batch norm, which the paper
    does without."""
    with torch.device("meta"):
        encoder = CifarResNet(depth, 16, num_classes=10)
    shortcuts = sum(parameters(stage[0].downsample) for stage in (encoder.layer2, encoder.layer3))
    assert shortcuts == 16 * 32 + 2 * 32 + 32 * 64 + 2 * 64
    assert round((parameters(encoder) - shortcuts) / 1e6, 2 if millions < 1 else 1) == millions


@pytest.mark.parametrize(
    ("arch", "depth", "width", "size"),
    [
        ("resnet8", 8, 16, 32),
        ("resnet8x4", 8, 64, 32),
        ("resnet8x2s2", 8, 32, 16),
        ("resnet20", 20, 16, 32),
    ],
)
def test_cifar_resnets_have_three_stages_of_falling_size(arch, depth, width, size):
    """w, 2w and 4w channels at full, half and quarter size, which is half of the image's behind a
    stem of stride 2; depth counts convolutions and `fc`."""
    with torch.device("meta"):
        encoder = build_encoder(arch, 7)
        shapes = []
        for stage in (encoder.layer1, encoder.layer2, encoder.layer3):
            stage.register_forward_hook(lambda *a: shapes.append(tuple(a[2].shape[1:])))
        assert encoder(torch.zeros(2, 3, 32, 32)).shape == (2, 7)
    assert shapes == [
        (width, size, size),
        (2 * width, size // 2, size // 2),
        (4 * width, size // 4, size // 4),
    ]
    weights = [m for m in encoder.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    shortcuts = [m for m in weights if getattr(m, "kernel_size", None) == (1, 1)]
    assert (len(weights) - len(shortcuts), len(shortcuts)) == (depth, 2)


def test_build_encoder_gives_torchvisions_network():
    """Same names, same initial weights for the same seed."""
    torch.manual_seed(0)
    ours = build_encoder("resnet18", 7)
    torch.manual_seed(0)
    wanted = torchvision.models.resnet18(num_classes=7)
    for (name, tensor), expected in zip(
        ours.state_dict().items(), wanted.state_dict().values(), strict=True
    ):
        assert torch.equal(tensor, expected), name
