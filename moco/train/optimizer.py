"""The optimizer: SGD in one kernel, what it keeps of each weight, its learning rate."""

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
    fill_moments(optimizer)
    return optimizer


@torch.no_grad()
def fill_moments(optimizer: torch.optim.Optimizer) -> None:
    """Give each trained parameter moments of its own memory format: SGD's momentum, zero where
    there is none, and what other optimizers have made.

    torch's fused kernels walk over parameter, gradient and moments by address: of another format,
    moments would go to the wrong weights. And if the first step is left out, as fp16 begins, the
    momentum that SGD makes for itself stays uninitialised.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if not parameter.requires_grad:
                continue
            moments = {n: m for n, m in optimizer.state.get(parameter, {}).items() if n != "step"}
            if group.get("momentum"):
                moments.setdefault("momentum_buffer", None)
            for name, known in moments.items():
                own = torch.zeros_like(parameter)
                optimizer.state[parameter][name] = own if known is None else own.copy_(known)


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
