"""The optimizer: SGD in one kernel, its momentum, its learning rate."""

from __future__ import annotations

import torch
from torch import nn

from moco.config import PretrainOptim, PretrainSchedule
from moco.schedule import learning_rate


def fused_sgd(module: nn.Module, optim: PretrainOptim) -> torch.optim.SGD:
    """SGD in one kernel, which can leave a step out by itself (see `StepGuard`).

    All parameters are listed, of MoCo both encoders', as upstream lists them, so that optimizer
    states can be exchanged; the key encoder's never get a gradient and are never touched.
    """
    optimizer = torch.optim.SGD(
        module.parameters(),
        optim.lr,
        momentum=optim.momentum,
        weight_decay=optim.weight_decay,
        fused=True,
    )
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


def set_learning_rate(
    optimizer: torch.optim.Optimizer, base: float, epoch: int, schedule: PretrainSchedule
) -> None:
    """Give all parameters the learning rate of the 0-based `epoch`."""
    rate = learning_rate(
        epoch,
        base=base,
        epochs=schedule.epochs,
        cos=schedule.cos,
        milestones=schedule.schedule,
        factor=schedule.schedule_factor,
        warmup_epochs=schedule.warmup_epochs,
    )
    for group in optimizer.param_groups:
        group["lr"] = rate
