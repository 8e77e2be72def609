"""What a training step is made of: images ready for the encoder, gradients, optimizer, kernels.

main_moco.py puts the parts together; `guards.StepGuard` watches over them.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moco import distributed
from moco.builder import MoCo, MoCoLosses
from moco.precision import autocast, memory_format
from moco.profiling import label

if TYPE_CHECKING:
    from moco.train.guards import StepGuard

# ------------------------------------------------------------------------------------------------
# Images and gradients
# ------------------------------------------------------------------------------------------------


def preparation(args: argparse.Namespace, device: torch.device) -> Callable[[Tensor], Tensor]:
    """What turns (N, 3, H, W) uint8 views into the input of the encoders, on the device and after
    they have travelled: (pixel/255 - mean) / std per channel, float32."""
    mean = torch.tensor(args.mean, device=device).view(3, 1, 1)
    std = torch.tensor(args.std, device=device).view(3, 1, 1)

    def prepare(images: Tensor) -> Tensor:
        floats = images.to(torch.float32, memory_format=memory_format(args.channels_last))
        return floats.div_(255).sub_(mean).div_(std)

    return prepare


def forward_and_backward(
    model: torch.nn.Module,
    im_q: Tensor,
    im_k: Tensor,
    device: torch.device,
    args: argparse.Namespace,
    guard: StepGuard,
) -> tuple[MoCoLosses, Tensor]:
    """Gradients of one step, of this rank's batch in --accumulate parts; the mean of their losses,
    by term and together."""
    n = args.accumulate
    parts = []
    for part, (q, k) in enumerate(zip(im_q.chunk(n), im_k.chunk(n), strict=True)):
        apart = part < n - 1 and distributed.world_size() > 1  # gradients are averaged at the end
        with model.no_sync() if apart else contextlib.nullcontext():
            with autocast(device, args.amp):
                losses = model(q, k, part=part, parts=n, symmetric=args.symmetric)
            loss = losses.combine(args.contr_w, args.align_w, args.unif_w)
            with label("backward"):
                guard.backward(loss / n if n > 1 else loss)
        parts.append(losses)
    if n > 1:
        losses = MoCoLosses.mean(parts)
        loss = losses.combine(args.contr_w, args.align_w, args.unif_w)
    return losses, loss


# ------------------------------------------------------------------------------------------------
# Optimizer and kernels
# ------------------------------------------------------------------------------------------------


def fused_sgd(moco: MoCo, args: argparse.Namespace) -> torch.optim.SGD:
    """SGD in one kernel, which can leave a step out by itself (see `guards.StepGuard`).

    Both encoders' parameters are listed, as upstream lists them, so that optimizer states can be
    exchanged; those of the key encoder never get a gradient and are never touched.
    """
    optimizer = torch.optim.SGD(
        moco.parameters(), args.lr, momentum=args.momentum, weight_decay=args.weight_decay,
        fused=True,
    )  # fmt: skip
    fill_momentum(optimizer)
    return optimizer


@torch.no_grad()
def fill_momentum(optimizer: torch.optim.SGD) -> None:
    """Give each trained parameter a momentum of its own memory format, zero where there is none.

    torch's fused kernels walk over parameter, gradient and momentum by address: of another format,
    momentum would go to the wrong weights. And if the first step is left out, as fp16 begins, the
    momentum that they make for themselves stays uninitialised.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.requires_grad and group["momentum"]:
                own = torch.zeros_like(parameter)
                known = optimizer.state[parameter].get("momentum_buffer")
                if known is not None:
                    own.copy_(known)
                optimizer.state[parameter]["momentum_buffer"] = own
