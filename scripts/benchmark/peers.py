#!/usr/bin/env python
"""One MoCo v2 training step (InfoNCE) of ours beside other libraries' and the ancestors' formula.

    python -m venv --system-site-packages ENV && ENV/bin/pip install lightly      # optional
    OMP_NUM_THREADS=1 ENV/bin/python scripts/benchmark/peers.py [--arch resnet18 --image-size 64]

All begin with the same weights and images, on one device, in turn: query, momentum update, shuffled
keys, loss against the queue, backward pass, SGD; one group of batch norm. Ours is the step of
main_moco.py, from bytes; the others get the images normalised, as from their loaders. lightly's is
made of the blocks that its MoCo v2 benchmark for ResNet-50 consists of, without Lightning around it
and without that benchmark's online classifier. A peer that is not installed is named and left out.
solo-learn 1.0.2 asks for torch 1.9.1, which this project does not run with, and is not compared.
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import baseline

from moco import encoders, timing
from moco.builder import MoCo
from moco.config import (
    Encoder,
    Objective,
    Placement,
    PretrainConfig,
    PretrainData,
    PretrainOptim,
    Speed,
    Views,
)
from moco.data.views import IMAGENET_MEAN, IMAGENET_STD, normalize
from moco.log import Means
from moco.precision import kernels, memory_format
from moco.tasks.moco import MoCoTask
from moco.train.guards import StepGuard
from moco.train.saver import BackgroundWriter
from moco.train.state import TrainState
from moco.train.step import train_step

TAU, MOMENTUM, LR, WEIGHT_DECAY = 0.2, 0.999, 0.03, 1e-4


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="a MoCo v2 step of ours and of other libraries")
    parser.add_argument("--arch", default="resnet18", choices=encoders.arch_names(), metavar="ARCH")
    parser.add_argument("--image-size", type=int, default=64, help="pixels (%(default)s)")
    parser.add_argument("--batch", type=int, default=64, help="images (%(default)s)")
    parser.add_argument("--queue", type=int, default=65536)
    timing.add_arguments(parser, repeats=9)
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    torch.manual_seed(0)
    shape = (args.batch, 3, args.image_size, args.image_size)
    pixels = [torch.randint(256, shape, dtype=torch.uint8, device=device) for _ in range(2)]
    floats = [normalize(images, IMAGENET_MEAN, IMAGENET_STD) for images in pixels]
    task = our_task(args, device)
    moco = task.build_module().to(device)
    names = {"upstream's formula": upstream_step(moco, args.queue)}
    try:
        names[f"lightly {importlib.metadata.version('lightly')}"] = lightly_step(moco, args.queue)
    except ImportError:
        print("lightly is not installed, and left out")
    ours = our_step(task, moco)
    variants = {name: lambda step=step: step(*floats) for name, step in names.items()}
    with kernels(deterministic=False):
        times = timing.interleaved(
            {"ours": lambda: ours(*pixels), **variants},
            repeats=args.repeats, warmup=2, device=device,
        )  # fmt: skip
    table = timing.Table(
        f"MoCo v2 step on {device}: {args.arch}, {args.image_size} px, N={args.batch}, "
        f"K={args.queue}; baseline is the other"
    )
    for name in names:
        table.add(timing.row(name, times[name], times["ours"]))
    table.write(args.out)


Step = Callable[[Tensor, Tensor], None]


def our_task(args: argparse.Namespace, device: torch.device) -> MoCoTask:
    config = PretrainConfig(
        data=PretrainData(data="unused"),
        objective=Objective(contr_w=1, contr_tau=TAU, align_w=0, unif_w=0),
        encoder=Encoder(arch=args.arch, moco_k=args.queue, mlp=True, bn_splits="1"),
        views=Views(image_size=args.image_size),
        optim=PretrainOptim(batch_size=args.batch, lr=LR, weight_decay=WEIGHT_DECAY, seed=0),
        speed=Speed(channels_last=True),
        placement=Placement(devices=(str(device),)),
    )
    return MoCoTask(config)


def our_step(task: MoCoTask, moco: MoCo) -> Step:
    """The step of main_moco.py, by its own functions; it trains `moco` itself."""
    moco.to(memory_format=memory_format(True))
    device = moco.queue.device
    task.on_device(moco, device)
    scaler = torch.amp.GradScaler(device.type, enabled=False)
    state = TrainState(task, moco, task.build_optimizer(moco), scaler, Means())
    guard = StepGuard(state, BackgroundWriter(Path(), keep_last=1, keep_every=0), 0)
    return lambda im_q, im_k: train_step(task, moco, state, guard, (im_q, im_k))


def upstream_step(moco: MoCo, queue: int) -> Step:
    encoder_q, encoder_k = copy.deepcopy(moco.encoder_q), copy.deepcopy(moco.encoder_k)
    return baseline.Step(encoder_q, encoder_k, queue, 128, amp=False, tau=TAU)


def lightly_step(moco: MoCo, queue: int) -> Step:
    """lightly's loss with its memory bank, projection head, momentum update and batch shuffle."""
    from lightly.loss import NTXentLoss
    from lightly.models.modules import MoCoProjectionHead
    from lightly.models.utils import (
        batch_shuffle,
        batch_unshuffle,
        deactivate_requires_grad,
        update_momentum,
    )

    backbone = copy.deepcopy(moco.encoder_q)
    first, last = backbone.fc[0], backbone.fc[2]
    head = MoCoProjectionHead(first.in_features, first.out_features, last.out_features)
    weights = zip(head.state_dict(), backbone.fc.state_dict().values(), strict=True)
    head.load_state_dict(dict(weights))
    backbone.fc = nn.Identity()
    network = nn.Sequential(backbone, head).to(moco.queue.device)
    network_k = copy.deepcopy(network)
    deactivate_requires_grad(network_k)
    criterion = NTXentLoss(temperature=TAU, memory_bank_size=(queue, last.out_features))
    criterion.to(moco.queue.device)
    optimizer = torch.optim.SGD(network.parameters(), LR, momentum=0.9, weight_decay=WEIGHT_DECAY)

    def step(im_q: Tensor, im_k: Tensor) -> None:
        query = network(im_q)
        update_momentum(network, network_k, m=MOMENTUM)
        with torch.no_grad():
            shuffled, order = batch_shuffle(im_k)
            key = batch_unshuffle(network_k(shuffled), order)
        loss = criterion(query, key)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


if __name__ == "__main__":
    main()
