"""small_alexnet and depth_cnn: shapes, names, widths, files, and batch norm of untrained ones."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from moco.alexnet import build_chain
from moco.batch_norm import calibrate_batch_norm
from moco.checkpoint import load_encoder
from moco.encoders import build_encoder, feature_dim, head_name

# The published table, at 64 pixels.
SHAPES = {
    "conv1": (96, 31, 31), "conv2": (192, 15, 15), "conv3": (384, 15, 15), "conv4": (384, 15, 15),
    "conv5": (192, 7, 7), "fc6": (4096,), "fc7": (4096,), "output": (128,),
}  # fmt: skip


def test_small_alexnet_is_the_published_one() -> None:
    with torch.device("meta"):
        encoder = build_encoder("small_alexnet", 128, image_size=64)
        assert sum(p.numel() for p in encoder.parameters()) == 58_678_368
        assert encoder.layers == tuple(SHAPES)
        for layer, shape in SHAPES.items():
            assert encoder(torch.empty(2, 3, 64, 64), layer=layer).shape[1:] == shape, layer
        assert encoder.fc8.bias is not None and encoder.fc7[0].bias is None
        assert build_encoder("small_alexnet", 2, image_size=32).fc6[1].in_features == 1728
    assert (head_name(encoder), feature_dim(encoder)) == ("fc8", 4096)


def test_depth_cnn_halves_the_image_by_powers_of_two() -> None:
    with torch.device("meta"):
        encoder = build_encoder("depth_cnn", 128, image_size=128)
        images = torch.empty(2, 3, 128, 128)
        assert encoder(images, layer="conv4").shape[1:] == (256, 16, 16)
        assert encoder(images, layer="conv5").shape[1:] == (512, 8, 8)


def test_initial_weights() -> None:
    torch.manual_seed(0)
    encoder = build_encoder("small_alexnetx0.25", 32, image_size=32)
    for module in encoder.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            deviation = 0.02 / module.weight.numel() ** 0.5
            assert abs(module.weight.mean()) < 5 * deviation
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.1)
            assert module.bias is None or not module.bias.any()


def test_smallest_image() -> None:
    assert build_encoder("small_alexnetx0.05", 4, image_size=15).eval()(
        torch.ones(1, 3, 15, 15)
    ).shape == (1, 4)


def test_another_layer_is_refused_by_name() -> None:
    encoder = build_encoder("small_alexnetx0.05", 4, image_size=16).eval()
    with pytest.raises(ValueError, match="no layer 'fc9'; there are conv1, .*fc7, output"):
        encoder(torch.ones(1, 3, 16, 16), layer="fc9")


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize(
    ("arch", "size"),
    [("small_alexnetx0.05", 32), ("depth_cnnx0.05", 32), ("small_alexnetx0.0625", 64)],
)
def test_a_file_gives_the_encoder_back(tmp_path, arch, size, named) -> None:
    """With its name or without: width and size are in the tensors. Without the head it is fc7."""
    encoder = build_chain(arch, 6, size).eval()
    state = {f"module.encoder_q.{name}": t for name, t in encoder.state_dict().items()}
    torch.save(
        {"state_dict": state, **({"arch": arch} if named else {})}, tmp_path / "file.pth.tar"
    )
    images = torch.randn(2, 3, size, size)
    whole, info = load_encoder(tmp_path / "file.pth.tar", head="projection")
    assert (info["arch"], info["head_use"]) == (arch, "projection")
    assert torch.equal(whole(images), encoder(images))
    backbone, info = load_encoder(tmp_path / "file.pth.tar")
    assert torch.equal(backbone(images), encoder(images, layer="fc7"))
    assert info["feature_dim"] == backbone(images).shape[1]


def test_calibration_gives_an_untrained_encoder_features() -> None:
    """Statistics are the mean over the batches; weights stay."""
    torch.manual_seed(0)
    encoder = build_encoder("small_alexnetx0.1", 8, image_size=32).eval()
    weights = {name: p.clone() for name, p in encoder.named_parameters()}
    images = torch.randn(3, 16, 3, 32, 32)
    assert encoder(images[0], layer="fc7").std() < 0.01
    calibrate_batch_norm(encoder, list(images))
    assert encoder(images[0], layer="fc7").std() > 0.3
    assert not encoder.training and encoder.conv1[1].momentum == 0.1
    expected = encoder.conv1[0](images.flatten(0, 1)).mean(dim=(0, 2, 3))
    torch.testing.assert_close(encoder.conv1[1].running_mean, expected, rtol=1e-4, atol=1e-6)
    assert all(torch.equal(p, weights[name]) for name, p in encoder.named_parameters())
