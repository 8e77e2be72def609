"""Batch norm in groups: one batch norm per group, torchvision's names and shapes."""

import copy

import pytest
import torch
from helpers import differences
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from moco.batch_norm import SplitBatchNorm2d, has_batch_norm, split_batch_norm
from moco.encoders import build_encoder


def same_norm(splits: int, **options) -> tuple[nn.BatchNorm2d, SplitBatchNorm2d]:
    """Plain and split batch norm of 5 channels with the same, not trivial, state."""
    torch.manual_seed(0)
    plain = nn.BatchNorm2d(5, **options).double()
    with torch.no_grad():
        for tensor in (*plain.parameters(), plain.running_mean, plain.running_var):
            tensor.uniform_(0.5, 2)
    split = SplitBatchNorm2d(5, splits, **options).double()
    split.load_state_dict(plain.state_dict())
    return plain, split


@pytest.mark.parametrize("splits", [1, 2, 4])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("options", [{}, {"momentum": 0.3, "eps": 0.1}, {"affine": False}], ids=str)
def test_split_batch_norm_is_one_batch_norm_per_group(splits, layout, options):
    """Output, gradients of input, weight and bias; running statistics are the mean of what the
    groups' own batch norms arrive at. Groups are consecutive samples, and the format stays."""
    plain, split = same_norm(splits, **options)
    x = torch.randn(8, 5, 3, 2).double().to(memory_format=layout).requires_grad_()
    slope = torch.randn(8, 5, 3, 2).double()
    (split(x) * slope).sum().backward()
    got_gradient, x.grad = x.grad, None

    norms = [copy.deepcopy(plain) for _ in range(splits)]
    wanted = torch.empty_like(x)
    for group, norm in enumerate(norms):
        own = slice(group * 8 // splits, (group + 1) * 8 // splits)
        wanted[own] = norm(x[own])
    (wanted * slope).sum().backward()

    torch.testing.assert_close(split.train()(x), wanted)
    assert split(x).is_contiguous(memory_format=layout)
    torch.testing.assert_close(got_gradient, x.grad)
    for name, parameter in split.named_parameters():
        total = sum(getattr(norm, name).grad for norm in norms)
        torch.testing.assert_close(parameter.grad, total)
    _, fresh = same_norm(splits, **options)
    fresh(x)
    for name in ("running_mean", "running_var"):
        mean = torch.stack([getattr(norm, name) for norm in norms]).mean(dim=0)
        torch.testing.assert_close(getattr(fresh, name), mean)
    assert fresh.num_batches_tracked == 1


@pytest.mark.parametrize("arch", ["resnet8", "mobilenet_v3_small"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_network_in_groups_is_the_network_on_each_group(layout, arch):
    """Features in the order of the images, gradients of all weights, and running statistics: by one
    batch norm of interleaved groups, or by slices."""
    torch.manual_seed(0)
    plain = build_encoder(arch, 7)
    for module in plain.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (*module.parameters(), module.running_mean, module.running_var):
                nn.init.uniform_(tensor, 0.5, 2)
    split = copy.deepcopy(plain)
    split_batch_norm(split, 4)
    assert differences(dict(plain.state_dict()), dict(split.state_dict())) == []
    plain.double()
    split.to(memory_format=layout).double()
    images = torch.randn(12, 3, 32, 32).double().to(memory_format=layout)
    slope = torch.randn(12, 7).double()

    alone = [copy.deepcopy(plain) for _ in range(4)]
    wanted = torch.cat([net(group) for net, group in zip(alone, images.chunk(4), strict=True)])
    (wanted * slope).sum().backward()
    features = split(images)
    (features * slope).sum().backward()

    torch.testing.assert_close(features, wanted)
    for name, parameter in split.named_parameters():
        of_groups = sum(net.get_parameter(name).grad for net in alone)
        torch.testing.assert_close(parameter.grad, of_groups, msg=name)
    for name, buffer in split.named_buffers():
        of_groups = torch.stack([net.get_buffer(name).double() for net in alone])
        torch.testing.assert_close(buffer.double(), of_groups.mean(dim=0), msg=name)
    with torch.no_grad():
        torch.testing.assert_close(split(images), features)


VIEWS = "detach view t expand slice split split_with_sizes unbind transpose _unsafe_view".split()


class Operations(TorchDispatchMode):
    """Counts operations; views cost no kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.overloadpacket.__name__ not in VIEWS
        return function(*args, **(kwargs or {}))


def test_eight_groups_cost_about_as_many_operations_as_one():
    """ResNet-50, 256 images: forward and backward, also the very first pass."""
    counts = {}
    for splits in (1, 8):
        with torch.device("meta"):
            encoder = build_encoder("resnet50", 128, bn_splits=splits)
            images = torch.empty(256, 3, 224, 224)
        with Operations() as forward:
            features = encoder(images)
        with Operations() as backward:
            features.sum().backward()
        counts[splits] = forward.count, backward.count
    assert counts[1][0] > 250 and counts[1][1] > 150
    for one, eight in zip(counts[1], counts[8], strict=True):
        assert eight <= 1.2 * one, counts


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_in_eval_mode_split_batch_norm_is_plain_batch_norm(layout):
    """Whatever the batch, and running statistics stay."""
    plain, split = same_norm(4)
    x = torch.randn(7, 5, 3, 3).double().to(memory_format=layout)
    before = copy.deepcopy(split.state_dict())
    assert torch.equal(split.eval()(x), plain.eval()(x))
    assert all(torch.equal(t, before[name]) for name, t in split.state_dict().items())


@pytest.mark.parametrize("batch", [6, 1, 9])
def test_a_batch_that_does_not_split_is_refused_in_training(batch):
    _, split = same_norm(4)
    message = f"a batch of {batch} cannot be split into 4 equal batch-norm groups"
    with pytest.raises(ValueError, match=message):
        split(torch.randn(batch, 5, 3, 3).double())


def test_a_batch_norm_with_two_names_stays_one():
    net, norm = nn.Sequential(nn.Conv2d(3, 3, 1)), nn.BatchNorm2d(3)
    net.first, net.more = norm, nn.Sequential(norm)
    split_batch_norm(net, 2)
    assert isinstance(net.first, SplitBatchNorm2d) and net.more[0] is net.first
    split_batch_norm(norm, 2)  # nothing is inside
    assert type(norm) is nn.BatchNorm2d


def test_batch_norm_without_running_averages_cannot_be_split():
    for norm in (nn.BatchNorm2d(3, momentum=None), nn.BatchNorm2d(3, track_running_stats=False)):
        with pytest.raises(ValueError, match="without running averages cannot be split"):
            split_batch_norm(nn.Sequential(norm), 2)


def test_has_batch_norm():
    with torch.device("meta"):
        assert has_batch_norm(build_encoder("resnet8", 7))
        assert has_batch_norm(build_encoder("resnet8", 7, bn_splits=2))
        assert not has_batch_norm(build_encoder("vit_b_16", 7))
