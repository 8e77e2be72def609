"""The training loop of every task: epochs, steps, and what is due after a step."""

from __future__ import annotations

import contextlib
from dataclasses import asdict
from typing import Any

import torch

from moco import distributed
from moco.errors import report_user_errors
from moco.health import judge
from moco.stop import AgreedStop
from moco.train import guards
from moco.train.clock import Due, due, evaluation_due
from moco.train.optimizer import set_learning_rate
from moco.train.replay import StepSeen, watched
from moco.train.saver import finish_saving, save
from moco.train.step import train_step
from moco.train.task import Losses, Task
from moco.train.trainer import Trainer, build_trainer


def train(device: torch.device, config: Any, *, task: type[Task]) -> None:
    """The whole run in this process, one of `config.placement.processes`.

    Exit status: 75 after a request to stop, 130 after Ctrl-C, 1 after an error for the user.
    """
    with (
        report_user_errors(),
        distributed.failure_names_ranks(),
        contextlib.ExitStack() as at_exit,
    ):
        if config.saving.replay:
            task = watched(task, config, at_exit)
        t = build_trainer(config, task, device, at_exit)
        begin(t)
        try:
            stopped = train_epochs(t)
        except StepSeen:
            return
        finish_saving(t.writer, device)
        if stopped:
            distributed.print_main(
                f"stopped by {t.stop.name or 'a signal to another rank'} after step "
                f"{t.state.step}; go on with --save-dir {t.writer.folder} --resume auto"
            )
            raise AgreedStop(t.stop.exit_status)
        t.printer.close()
        t.log.finished()
        distributed.print_main(
            f"done: {t.state.step} steps, checkpoints in {t.writer.folder} "
            f"(training waited {t.writer.waited:.1f} s for saving)"
        )


def begin(t: Trainer) -> None:
    """Save the untrained module of --max-steps 0; make up for an evaluation that was cut off."""
    state = t.state
    if state.step == 0 and t.rhythm.total_steps == 0:
        t.task.settle_untrained(state.module, t.data)
        save(t.writer, state, t.flat)
    epochs = state.epoch if state.step_in_epoch == 0 else None
    due_now = evaluation_due(state.step, epochs, t.rhythm)
    due_now |= state.step == 0 and t.task.evaluates_untrained
    if t.evaluation and t.evaluation.enabled and due_now:
        logged = (t.task.evaluation_kind, state.step) in t.log.kept
        if not distributed.broadcast_object(logged):
            t.evaluation.measure(state.epoch, state.step)
    if epochs and ("health", state.step) not in t.log.kept:
        report_health(t, show=True)


def train_epochs(t: Trainer) -> bool:
    """Train to the end of the run; returns whether it was asked to stop before."""
    state, config = t.state, t.config
    epochs = config.schedule.epochs if state.step < t.rhythm.total_steps else 0
    for epoch in range(state.epoch, epochs):
        set_learning_rate(state.optimizer, config.optim.lr, epoch, config.schedule)
        t.model.train()
        t.data.set_epoch(epoch, state.step_in_epoch)
        for batch in t.printer.batches(t.data):
            if state.step == 0:
                t.task.show(t.log, batch)
            losses = train_step(t.task, t.model, state, t.guard, batch)
            step = after_step(t, losses)
            if step.ended:
                return step.stopped
    return False


def after_step(t: Trainer, losses: Losses) -> Due:
    """Do what is due: agree, log, compare ranks, end the epoch, save, evaluate, in this order."""
    state = t.state
    state.step += 1
    state.step_in_epoch += 1
    t.printer.advance()
    looks = t.guard.looks
    step = due(state.step, state.step_in_epoch, state.epoch, t.rhythm, looks.next)
    if step.agree:
        wants_save = distributed.is_main() and t.stopwatch.rings()
        stop, save_now = t.guard.check(t.stop.requested, wants_save)
        step = step.extended(stop=stop, save=save_now)
    if step.log:
        report(t, losses)
    if state.step == 1 and t.log.active:  # what moco.health compares with; lines come too late
        t.log.event("start", state.step, epoch=state.epoch, **t.task.metrics(losses))
    if step.compare_ranks:
        guards.stop_if_ranks_differ(t.task.shared_tensors(state.module), state.step)
    if step.epoch_end:
        state.epoch, state.step_in_epoch = state.epoch + 1, 0
        if t.log.active:
            t.log.histograms(state.step, t.task.histograms(losses))
    if t.profile:
        t.profile.step_done()
    if step.save:
        guards.stop_if_weights_left_all_bounds(state, t.writer)
        save(t.writer, state, t.flat)
        if step.evaluate and t.evaluation and t.evaluation.enabled:
            step = step.extended(stop=t.evaluation.measure(state.epoch, state.step))
        t.stopwatch.restart()
    if (step.epoch_end or step.ended) and not step.stopped:
        report_health(t, show=step.evaluate or step.ended)
    if step.agree:
        t.box.keep_after(state.step)
        looks.time_from(state.step)
    return step


def report(t: Trainer, losses: Losses) -> None:
    """One line on the screen and in the logs: means since the last one, rates, terms."""
    state, epochs = t.state, t.config.schedule.epochs
    for name, value in t.task.step_values(losses).items():  # of the latest batch on rank 0
        state.means.add(name, value)
    lr = state.optimizer.param_groups[0]["lr"]
    values = {**state.means.take(), "lr": lr, **t.printer.rates()}
    if state.scaler.is_enabled():
        values["overflows"] = state.skipped  # since the start of the run
    t.log.scalars("train", state.step, {"epoch": state.epoch, **values})
    if t.log.active:
        t.log.scalars("metrics", state.step, t.task.metrics(losses), epoch=state.epoch)
    terms = "  ".join(f"{name} {values[name]:.4f}" for name, _ in losses.items())
    rate = f"{values[f'{t.task.unit}_per_s']:.0f} {t.task.unit}/s"
    t.printer.line(
        f"epoch [{state.epoch}/{epochs}] step [{state.step_in_epoch}/{t.rhythm.steps_per_epoch}]  "
        f"loss {values['loss']:.4f}  {terms}  lr {lr:.4g}  "
        f"{rate}  data {100 * values['data_share']:.0f}%",
        short=f"epoch {state.epoch}/{epochs}, loss {values['loss']:.3f}, {rate}",
    )
    spread = t.task.feature_std(losses)
    if spread is not None:
        text = t.collapse.check(spread.item(), state.step, t.log)
        if text := distributed.broadcast_object(text):  # rank 0's batch decides
            t.box.write("collapse", state.epoch, state.step - 1, text)


def report_health(t: Trainer, *, show: bool) -> None:
    """The verdict of `moco.health` at the end of an epoch into the log, and on the screen with
    `show` or where it is another one than before. A stopped run gives it when it goes on."""
    state, history = t.state, t.log.history
    seen = history.seen(
        state.epoch, state.step, steps=t.rhythm.total_steps, filled=t.task.queue_filled()
    )
    if seen is None:
        return
    before, health = history.verdict, judge(seen)
    if state.step_in_epoch == 0:  # else a run that goes on from here would have one more
        t.log.event("health", state.step, epoch=state.epoch, **asdict(health))
    if show or health.verdict != before:
        t.printer.note(f"health after {state.epoch} epoch(s): {health.verdict}; {health.reason}")
