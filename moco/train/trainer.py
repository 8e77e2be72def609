"""All that a run consists of, built in the order on which its random numbers depend."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moco import distributed
from moco.handshake import refuse_other_data
from moco.log import Means, RunLog, provenance, versions_tested
from moco.precision import kernels, memory_format
from moco.profiling import StepProfile
from moco.progress import StepPrinter
from moco.stop import StopRequest
from moco.train import feasible, resume
from moco.train.blackbox import BlackBox
from moco.train.clock import Rhythm, Stopwatch
from moco.train.guards import CollapseAlarm, StepGuard
from moco.train.saver import BackgroundWriter
from moco.train.state import TrainState
from moco.train.task import Evaluation, Task, TrainData

PROFILE_TRACE = "profile_trace.json"


@dataclass
class Trainer:
    """A run in this process; what changes while training is in `state`.

    Attributes:
        flat: flat values of the config and of the data, as args.json and checkpoints keep them.
        model: the module, or the data-parallel module around it.
        evaluation: None where the task has none.
        profile: None without --profile.
    """

    task: Task
    device: torch.device
    flat: dict[str, Any]
    data: TrainData
    state: TrainState
    model: nn.Module
    rhythm: Rhythm
    stopwatch: Stopwatch
    stop: StopRequest
    guard: StepGuard
    collapse: CollapseAlarm
    writer: BackgroundWriter
    box: BlackBox
    log: RunLog
    printer: StepPrinter
    evaluation: Evaluation | None = None
    profile: StepProfile | None = None

    @property
    def config(self) -> Any:
        return self.task.config


def build_trainer(
    config: Any, make_task: type[Task], device: torch.device, at_exit: contextlib.ExitStack
) -> Trainer:
    """Build a run, or restore it from its checkpoint, and make its run folder.

    Args:
        config: as the command line gave it.
        make_task: class of the task, called with the settled config.
        at_exit: takes what has to be ended, however the run ends.

    Raises:
        DataError, CheckpointError, TrainingError: for the user.
    """
    stop = StopRequest()
    at_exit.callback(stop.restore)
    config, saved, lock = resume.settle(config, at_exit)
    feasible.check_step(make_task, config, device)
    torch.manual_seed(config.optim.seed)
    at_exit.enter_context(kernels(config.speed.deterministic))
    task = make_task(config)

    data = task.build_data(device)
    at_exit.callback(data.end)
    refuse_other_data(data.facts)
    flat = dict(sorted({**config.to_flat(), **data.facts}.items()))

    state, model, changes = _build_state(task, data, flat, saved, device, at_exit)
    del saved  # as large as the module and its optimizer
    total_steps = _total_steps(config.schedule, state, data.steps_per_epoch)

    saving = config.saving
    if distributed.is_main():
        resume.prepare_folder(saving.save_dir, flat)
    distributed.barrier()
    print_facts(task, state.module, data, device)
    log = RunLog(saving.save_dir, first_step=state.step)
    at_exit.callback(log.close)
    task.begin_log(log, data)
    if changes:
        log.event("changes", state.step, changes=changes)
    writer = BackgroundWriter(
        saving.save_dir, keep_last=saving.keep_last, keep_every=saving.keep_every
    )
    writer.lock = lock
    at_exit.push(writer.leave)
    if saving.checkpoint:  # until it is older than all that is kept, it may be the last good one
        writer.retention.keep.add(Path(saving.checkpoint))
    box = BlackBox(state, flat, saving.save_dir)
    every_epochs, every_steps = task.evaluation_rhythm()
    trainer = Trainer(
        task=task,
        device=device,
        flat=flat,
        data=data,
        state=state,
        model=model,
        rhythm=Rhythm(
            steps_per_epoch=data.steps_per_epoch,
            total_steps=total_steps,
            log=saving.print_freq,
            save=saving.save_steps,
            compare_ranks=config.watching.check_every,
            evaluate=every_epochs,
            evaluate_steps=every_steps,
        ),
        stopwatch=Stopwatch(saving.save_minutes),
        stop=stop,
        guard=StepGuard(state, writer, config.watching.max_overflows, box),
        collapse=CollapseAlarm(config.watching.collapse_steps, task.collapse_remedy),
        writer=writer,
        box=box,
        log=log,
        printer=StepPrinter(
            total=total_steps,
            batch_size=config.optim.batch_size,
            done=state.step,
            unit=task.unit,
        ),
    )
    if config.speed.profile:
        steps = total_steps - state.step
        path = saving.save_dir / PROFILE_TRACE
        trainer.profile = StepProfile(path, device, first_step=state.step, steps=steps)
        at_exit.callback(trainer.profile.close)
    trainer.evaluation = task.build_evaluation(trainer)
    return trainer


def _build_state(
    task: Task,
    data: TrainData,
    flat: dict,
    saved: dict | None,
    device: torch.device,
    at_exit: contextlib.ExitStack,
) -> tuple[TrainState, nn.Module, list[str]]:
    """Module and optimizer, restored from `saved`; the data-parallel module; what has changed."""
    config = task.config
    module = task.build_module()
    if config.optim.init_from and not saved:
        distributed.print_main(f"starting from {_start_from(task, module)}")
    module.to(device, memory_format=memory_format(config.speed.channels_last))
    task.on_device(module, device)
    state = TrainState(
        task,
        module,
        task.build_optimizer(module),
        torch.amp.GradScaler(device.type, enabled=config.optim.amp == "fp16"),
        Means(),
        epoch=config.schedule.start_epoch,
        step=config.schedule.start_epoch * data.steps_per_epoch,
    )
    at_exit.enter_context(
        distributed.failure_names_ranks(lambda: f" in epoch {state.epoch}, step {state.step}")
    )
    if distributed.world_size() > 1:
        torch.manual_seed(config.optim.seed + distributed.rank())  # dropout differs between ranks
    changes = []
    if saved:
        path = config.saving.checkpoint
        changes = resume.refuse_changes(saved, path, flat, allow=config.saving.allow_changes)
        state.restore(saved, path, data.steps_per_epoch)
        resume.print_rounding_changes(saved, flat)
    model = distributed.data_parallel(module)
    if config.speed.compile:
        for part in task.compiled(module):
            part.compile()  # in place: names of weights stay
    return state, model, changes


def _start_from(task: Task, module: nn.Module) -> str:
    """Load the weights of --init-from. Rank 0 reads them; it sends all to the others when they form
    the data-parallel module."""
    found, error = None, None
    if distributed.is_main():
        try:
            found = task.start_from(module, task.config.optim.init_from)
        except (ValueError, OSError) as caught:
            error = caught
    found, error = distributed.broadcast_object((found, error))
    if error:
        raise error
    return found


def _total_steps(schedule: Any, state: TrainState, steps_per_epoch: int) -> int:
    """At which step the run ends."""
    left = (schedule.epochs - state.epoch) * steps_per_epoch - state.step_in_epoch
    total = state.step + max(0, left)
    return total if schedule.max_steps is None else min(total, schedule.max_steps)


def print_facts(task: Task, module: nn.Module, data: TrainData, device: torch.device) -> None:
    """What will be done, in numbers that a user would otherwise have to work out."""
    config = task.config
    speed = {
        name: getattr(config.speed, name) for name in ("channels_last", "compile", "deterministic")
    }
    facts = {
        **task.facts(module, data),
        "device": f"{_device_name(device)}, amp {config.optim.amp}, "
        f"{config.data.workers} loader worker(s)",
        "speed": ", ".join(name if on else f"no {name}" for name, on in speed.items()),
        "seed": f"{config.optim.seed}" + ("" if config.optim.seed_given else " (drawn)"),
        "run folder": str(config.saving.save_dir),
        "code": ", ".join(f"{name} {version}" for name, version in provenance().items())
        + f" (tested: {versions_tested('torch')})",
    }
    for name, fact in facts.items():
        distributed.print_main(f"{name:>10}: {fact}")


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)} ({device})"
    return f"CPU, {torch.get_num_threads()} threads"
