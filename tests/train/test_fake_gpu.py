"""What runs on a GPU, run on tensors that say they are on one and have no numbers.

Torch's fake tensors know device, shape and type. So this needs no GPU, and finds what one would
refuse or wait for: operands on different devices, numbers that are read, memory that is not pinned.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moco import encoders
from moco.builder import MoCo
from moco.config import (
    Encoder,
    Objective,
    Placement,
    PretrainConfig,
    PretrainData,
    PretrainOptim,
    Speed,
)
from moco.data import loader, views
from moco.data.images import ArrayImages
from moco.evaluate import knn as evaluate
from moco.log import Means
from moco.tasks.moco import MoCoTask
from moco.train.guards import StepGuard
from moco.train.optimizer import fused_sgd
from moco.train.saver import BackgroundWriter
from moco.train.state import TrainState
from moco.train.step import train_step

GPU = torch.device("cuda", 0)

# Seen: 2.6 ends the whole process where autograd meets a fake GPU tensor, 2.11 does not.
pytestmark = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11), reason="needs torch 2.11"
)


class NoWaiting(TorchDispatchMode):
    """Refuses what a GPU would be waited for: copies between host and device, but those from pinned
    memory that say so; operands of one operation on both sides, but scalars."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = str(func)
        # Without an implementation for tensors that have no numbers.
        out = None if "_fused_sgd" in name else func(*args, **kwargs)
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        made = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        if "_to_copy" in name or "copy_" in name:
            if {x.device.type for x in given + made} == {"cpu", "cuda"}:
                source = given[-1]
                pinned = getattr(source, "was_pinned", False) and kwargs.get("non_blocking")
                assert pinned, f"waits for the device: {name} of {source} to {made[0].device}"
        else:
            sides = {x.device.type for x in given if x.dim()} | {x.device.type for x in made}
            assert len(sides) < 2, f"{name} has operands on both sides: {given}"
        return out


@pytest.fixture
def gpu(monkeypatch) -> Iterator[None]:
    def pin_memory(tensor: torch.Tensor) -> torch.Tensor:
        assert tensor.device.type == "cpu"
        pinned = tensor.clone()
        pinned.was_pinned = True
        return pinned

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        yield mode
    views._per_channel.cache_clear()


def unit(n: int) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(n, 16, device=GPU), dim=1)


@pytest.mark.parametrize(("amp", "symmetric"), [("off", False), ("bf16", True), ("fp16", False)])
def test_a_whole_step_but_the_backward_pass(amp, symmetric, gpu, tmp_path, monkeypatch) -> None:
    """In two parts, with groups of batch norm. (Autograd needs a GPU's streams.)"""
    config = PretrainConfig(
        data=PretrainData(data="unused"),
        objective=Objective(contr_w=1, align_w=1, unif_w=1, symmetric=symmetric),
        encoder=Encoder(moco_k=64),
        optim=PretrainOptim(batch_size=8, lr=0.1, accumulate=2, amp=amp, seed=0),
        speed=Speed(channels_last=True),
        placement=Placement(devices=("cuda:0",)),
    )
    task = MoCoTask(config)
    with GPU:
        moco = MoCo(
            lambda num_classes: encoders.build_encoder("resnet8", num_classes, bn_splits=2), 16, 64,
            contr_tau=0.2, align_alpha=2, unif_t=3, mlp=True,
        )  # fmt: skip
    task.on_device(moco, GPU)
    scaler = torch.amp.GradScaler("cuda", enabled=amp == "fp16")
    state = TrainState(task, moco, fused_sgd(moco, config.optim), scaler, Means())
    guard = StepGuard(state, BackgroundWriter(tmp_path, keep_last=1, keep_every=0), 0)

    def backward(loss: torch.Tensor) -> None:
        for parameter in moco.encoder_q.parameters():
            parameter.grad = torch.zeros_like(parameter)

    monkeypatch.setattr(torch.Tensor, "backward", backward)
    images = torch.zeros(8, 3, 32, 32, dtype=torch.uint8, device=GPU)
    moco.prepare(images)  # mean and deviation travel once
    with NoWaiting():
        losses = train_step(task, moco, state, guard, (images, images))
        assert task.step_values(losses)["contr_top1"].device == GPU
    loss = task.total(losses)
    assert loss.device == GPU and loss.dtype == torch.float32


def test_views_of_images_on_the_device(gpu, monkeypatch) -> None:
    monkeypatch.setattr(loader, "_fits", lambda array, device: True)
    data = loader.AugmentedViews(
        ArrayImages(np.zeros((16, 40, 40, 3), dtype=np.uint8), [0] * 16, ["a"]),
        views.pretrain_recipe(32, aug_plus=True), seed=0, num_views=2, augment_on_device=True,
    )  # fmt: skip
    pairs = loader.TrainLoader(data, [[(0, i) for i in range(8)]], workers=0, device=GPU)
    with NoWaiting():
        ((im_q, im_k, _, _),) = pairs
    assert im_q.device == im_k.device == GPU and im_q.dtype == torch.uint8


def test_votes_of_neighbours(gpu) -> None:
    labels = torch.zeros(30, dtype=torch.int64, device=GPU)
    with NoWaiting():
        evaluate.knn_predict(unit(10), unit(30), labels, classes=3, k=5)
