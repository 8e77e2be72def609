"""What a step takes, from shapes alone; what the machine has, by its files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from moco import encoders
from moco.memory import Memory, memory_of, rehearse
from moco.precision import not_deterministic

CPU = torch.device("cpu")


def test_the_peak_is_that_of_the_tensors_alive() -> None:
    """Counted by hand for two linear layers, 4 bytes each: what the query's backward needs, then
    what the key's forward makes; gradients are smaller here."""
    n, c, hidden, out = 64, 3 * 4 * 4, 100, 10

    def build() -> nn.Module:
        return nn.Sequential(
            nn.Flatten(), nn.Linear(c, hidden, bias=False), nn.Linear(hidden, out, bias=False)
        )

    state = torch.get_rng_state()
    found = rehearse(build, (n, 3, 4, 4))
    assert torch.equal(state, torch.get_rng_state())
    assert (found.weights, found.buffers) == (4 * (c * hidden + hidden * out), 0)
    kept, sum_of_outputs = n * (c + hidden), 1
    assert found.peak == 4 * (kept + sum_of_outputs + n * (c + hidden + out))
    assert {"aten::mm", "aten::sum"} <= found.operations
    assert rehearse(build, (2 * n, 3, 4, 4)).peak > 1.5 * found.peak
    both = rehearse(build, (n, 3, 4, 4), directions=2)  # symmetric: kept for one backward
    assert both.peak == found.peak + 4 * (kept + sum_of_outputs)
    assert rehearse(build, (n, 3, 4, 4), dtype=torch.bfloat16).peak * 2 == pytest.approx(
        found.peak, rel=0.01
    )


# ---- Deterministic kernels


# The smallest of each family, by the beginning of its members' names.
FAMILIES = {
    "alexnet": "alexnet",
    "convnext": "convnext_tiny",
    "densenet": "densenet121",
    "efficientnet": "efficientnet_b0",
    "efficientnet_v2": "efficientnet_v2_s",
    "maxvit": "maxvit_t",
    "mnasnet": "mnasnet0_5",
    "mobilenet_v2": "mobilenet_v2",
    "mobilenet_v3": "mobilenet_v3_small",
    "regnet_x": "regnet_x_400mf",
    "regnet_y": "regnet_y_400mf",
    "resnet": "resnet8",
    "resnext": "resnext50_32x4d",
    "shufflenet": "shufflenet_v2_x0_5",
    "swin": "swin_t",
    "swin_v2": "swin_v2_t",
    "vgg": "vgg11_bn",
    "vit": "vit_b_32",
    "wide_resnet": "wide_resnet50_2",
}
REFUSED = ("googlenet", "inception", "squeezenet")  # by build_encoder


@pytest.mark.long
def test_adaptive_pooling_alone_is_not_deterministic_in_torchvisions_classifiers() -> None:
    """They have no other layer of the documented list; pooling to one pixel is a mean."""
    own = ("small_alexnet", "depth_cnn")  # without adaptive pooling
    for name in set(encoders.arch_names()) - set(own):
        assert name.startswith((*FAMILIES, *REFUSED)), "a new family"
    state = torch.get_rng_state()
    for arch in FAMILIES.values():
        found = rehearse(lambda arch=arch: encoders.build_encoder(arch, 128), (2, 3, 224, 224))
        names = ["_adaptive_avg_pool2d_backward"] * arch.startswith(("alexnet", "vgg"))
        assert not_deterministic(found.operations) == names, arch
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (nn.Upsample(scale_factor=2, mode="bicubic"), "upsample_bicubic2d_backward"),
        (nn.ReflectionPad2d(1), "reflection_pad2d_backward"),
        (nn.AdaptiveMaxPool2d(2), "adaptive_max_pool2d_backward"),
        (nn.Unflatten(1, (1, 3)), None),
    ],
)
def test_layers_of_the_list_are_known_by_what_they_call(layer, expected) -> None:
    """Whatever class of module, or function, calls it."""

    def build() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 3, 1), layer)

    found = not_deterministic(rehearse(build, (2, 3, 8, 8)).operations)
    assert found == ([expected] if expected else [])


# ---- What the machine has

MEMINFO = """MemTotal:       16000 kB
MemFree:         1000 kB
MemAvailable:    8000 kB
SwapTotal:       2000 kB
SwapFree:        1000 kB
"""


def machine(root: Path, **files: str) -> Path:
    """A file system with these files, "__" in a name for "/"."""
    for name, text in {"proc__meminfo": MEMINFO, **files}.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, (9000, 18000)),
        # Version 2: the limit is of a group around this process's.
        (
            {
                "proc__self__cgroup": "0::/a/b\n",
                "sys__fs__cgroup__a__b__memory.max": "max\n",
                "sys__fs__cgroup__a__b__memory.current": "4096\n",
                "sys__fs__cgroup__a__memory.max": f"{6000 * 1024}\n",
                "sys__fs__cgroup__a__memory.current": f"{5000 * 1024}\n",
                "sys__fs__cgroup__a__memory.stat": f"anon 1\ninactive_file {500 * 1024}\n",
            },
            (1500, 6000),
        ),
        # Version 1 in a container, which sees its own group at the mount and the host's path.
        (
            {
                "proc__self__cgroup": "5:cpu,cpuacct:/x\n4:memory:/docker/abc\n0::/\n",
                "sys__fs__cgroup__memory__memory.limit_in_bytes": f"{3000 * 1024}\n",
                "sys__fs__cgroup__memory__memory.usage_in_bytes": f"{1000 * 1024}\n",
                "sys__fs__cgroup__memory__memory.stat": "total_inactive_file 0\n",
            },
            (2000, 3000),
        ),
        # Version 1 without a limit.
        (
            {
                "proc__self__cgroup": "4:memory:/\n",
                "sys__fs__cgroup__memory__memory.limit_in_bytes": "9223372036854771712\n",
                "sys__fs__cgroup__memory__memory.usage_in_bytes": "1024\n",
            },
            (9000, 18000),
        ),
        # More is used than is allowed by now.
        (
            {
                "proc__self__cgroup": "0::/\n",
                "sys__fs__cgroup__memory.max": f"{100 * 1024}\n",
                "sys__fs__cgroup__memory.current": f"{200 * 1024}\n",
            },
            (0, 100),
        ),
    ],
)
def test_memory_is_that_of_the_machine_or_of_the_smallest_group(files, expected, tmp_path) -> None:
    free, total = expected
    assert memory_of(CPU, machine(tmp_path, **files)) == Memory(free * 1024, total * 1024)


def test_where_nobody_tells_nothing_is_known(tmp_path) -> None:
    assert memory_of(CPU, tmp_path) is None
    here = memory_of(CPU)
    assert here is None or 0 <= here.free <= here.total
