"""A training step: gradients of a batch in parts, and one step of the optimizer."""

from __future__ import annotations

import contextlib
from typing import Any

from torch import Tensor, nn

from moco import distributed
from moco.precision import autocast
from moco.profiling import label
from moco.train.guards import StepGuard
from moco.train.state import TrainState
from moco.train.task import Losses, Task


def train_step(
    task: Task, model: nn.Module, state: TrainState, guard: StepGuard, batch: Any
) -> Losses:
    """One optimizer step on this rank's batch, which goes through in --accumulate parts.

    Gradients are averaged over ranks once, in the backward of the last part.

    Returns:
        The losses of the step, the mean over its parts.
    """
    state.optimizer.zero_grad()
    optim = task.config.optim
    parts = optim.accumulate
    losses = []
    for part, piece in enumerate(task.split(batch, parts)):
        apart = part < parts - 1 and distributed.world_size() > 1
        with model.no_sync() if apart else contextlib.nullcontext():
            with autocast(state.device, optim.amp):
                losses.append(task.losses(model, piece, part, parts))
            loss = task.total(losses[-1])
            with label("backward"):
                loss = guard.poison(loss / parts if parts > 1 else loss)
                state.scaler.scale(loss).backward()
    step_losses = losses[0] if parts == 1 else task.mean(losses)
    norm = apply_gradients(state, guard, task.max_grad_norm)
    guard.note(norm, task.total(step_losses), step_losses)
    return step_losses


def apply_gradients(state: TrainState, guard: StepGuard, longest: float | None = None) -> Tensor:
    """Shorten gradients to the norm `longest`, and step the optimizer if all are finite;
    returns their norm as it was."""
    with label("optimizer"):
        state.scaler.unscale_(state.optimizer)
        # On the device; the same on all ranks after averaging.
        slopes = [p.grad for p in state.module.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm(slopes)
        if longest is not None:
            nn.utils.clip_grads_with_norm_(state.module.parameters(), longest, norm)
        if not state.scaler.is_enabled():  # which would find out by itself, and adapt its scale
            state.optimizer.found_inf = guard.leave_out(norm)
        state.scaler.step(state.optimizer)
        state.scaler.update()
    return norm
