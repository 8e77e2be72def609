"""Preflight of a long run, on its machines and by its command line: a few minutes, one table.

Each part of a run is tried for real: data, memory of a full step, collectives, loading, saving, a
kill and a resume. `moco.train.forecast` makes a forecast of it, which a short run then judges.
The processes of the run are started three times: to measure, to be killed, and to go on. What they
write is in a folder beside the run folder, which is removed.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moco import checkpoint, distributed, timing
from moco.errors import report_user_errors
from moco.launch import launch_config, usable_cores
from moco.run_files import LOG, write_json
from moco.train.loop import train
from moco.train.saver import finish_saving, save
from moco.train.step import train_step
from moco.train.task import Task
from moco.train.trainer import Trainer, build_trainer
from moco.train.verdicts import (
    Line,
    data_line,
    forecast_lines,
    logged_losses,
    measured_lines,
    resume_line,
)

SECONDS = 15  # at most, of each measurement, beyond the least number of steps
STEPS = 10  # of the run that is killed
LIMIT = 600  # seconds until processes that do not end are killed


def preflight(config: Any, task: type[Task]) -> list[Line]:
    """Try a run in processes as `launch_config` starts them; the lines of the table.

    A process that a launcher has started as one of several calls this too; it gets the lines of
    rank 0 only where it is that, else none.

    Args:
        config: as the command line gave it.
    """
    main = config.placement.node_rank == 0 and (config.placement.number or (0,))[0] == 0
    folder = config.saving.save_dir
    folder = folder.with_name(f".preflight-{folder.name}")
    if main:
        shutil.rmtree(folder, ignore_errors=True)
    saving = replace(
        config.saving,
        save_dir=folder,
        checkpoint=None,
        resume=None,
        print_freq=1,
        save_minutes=0,
        allow_changes=False,
    )
    watching = replace(config.watching, knn_every=0)
    config = replace(config, saving=saving, watching=watching)
    try:
        return _phases(config, task, main)
    finally:
        if main:
            shutil.rmtree(folder, ignore_errors=True)


def _phases(config: Any, task: type[Task], main: bool) -> list[Line]:
    lines = [data_line(config)] if main else []
    with tempfile.TemporaryDirectory() as own:  # a folder of this node
        found = Path(own) / "found.json"
        status = _in_processes(1, functools.partial(measure, task=task, out=found), config)
        if status != 0 or not found.is_file():
            failed = f"the processes ended with status {status}, see above"
            advice = "less --batch-size, or what it says"
            return [*lines, Line("a full step", failed, False, advice)]
        facts = json.loads(found.read_text(encoding="utf-8"))
    # A function of what all ranks know: each starts the same run.
    steps = max(4, min(STEPS, facts["total_steps"], int(60 / facts["running"])))
    folder = config.saving.save_dir / "killed"
    saving = replace(config.saving, save_dir=folder, save_steps=steps // 2)
    short = replace(config, saving=saving, schedule=replace(config.schedule, max_steps=steps))
    killed = _in_processes(2, functools.partial(train_until_killed, task=task), short)
    before = logged_losses(folder / LOG) if main else {}
    resumed = replace(short, saving=replace(saving, checkpoint="auto", resume="auto"))
    again = _in_processes(3, functools.partial(train, task=task), resumed)
    if not main:
        return []
    return [
        *lines,
        *measured_lines(config, facts),
        resume_line(before, logged_losses(folder / LOG), (killed, again), steps),
        *forecast_lines(config, facts),
    ]


def _in_processes(number: int, worker: Callable[..., None], config: Any) -> int:
    """Exit status of a process that runs `launch_config(worker, config)`; not that of this one,
    whose memory, devices and process group would be left over for the next."""
    if "TORCHELASTIC_RESTART_COUNT" in os.environ:
        # Keys of torchrun's store have it in their names: those of the last processes do not count.
        os.environ["TORCHELASTIC_RESTART_COUNT"] = str(number)
    process = multiprocessing.get_context("spawn").Process(
        target=launch_config, args=(worker, config)
    )
    process.start()
    process.join(LIMIT)
    if process.is_alive():
        process.kill()
        process.join()
    return process.exitcode


# ---- In the processes of the run


def measure(device: torch.device, config: Any, *, task: type[Task], out: Path) -> None:
    """Loading, a full step and half of one, collectives, saving, a short run; every rank writes
    what all of them found as JSON."""
    with report_user_errors(), contextlib.ExitStack() as at_exit:
        t = build_trainer(config, task, device, at_exit)
        t.model.train()
        images = config.optim.batch_size // distributed.world_size()
        timing.reset_peak_memory(device)
        loading, batch = _loading_seconds(t)
        step, loss = _step_seconds(t, batch)
        peak = timing.peak_memory(device)
        steps = {images: step}
        least = 2 * config.bn_groups * config.optim.accumulate
        if images % least == 0 and images >= 2 * least:  # two images at least in each group
            half = [rows[: images // 2] for rows in batch]
            with contextlib.suppress(ValueError):  # groups of the loss that do not fit half of them
                steps[images // 2] = _step_seconds(t, half)[0]
        gradients = sum(4 * p.numel() for p in t.state.module.parameters() if p.requires_grad)
        reduce = _reduce_seconds(gradients, device)
        running = _running_seconds(t)
        started = time.perf_counter()
        save(t.writer, t.state, t.flat)
        copied = time.perf_counter() - started
        finish_saving(t.writer, device)
        written = time.perf_counter() - started
        mine = {"loading": loading, "peak": peak, "loss": loss, "device": _device_facts(device)}
        ranks = distributed.gather_objects(mine)
        facts: dict[str, Any] = {}
        if distributed.is_main():
            saved = checkpoint.run_checkpoints(config.saving.save_dir)[-1]
            facts = {
                "ranks": ranks,
                "steps": list(steps.items()),
                "gradients": gradients,
                "reduce": reduce,
                "running": running,
                "copied": copied,
                "written": written,
                "saved": saved.stat().st_size,
                "total_steps": t.rhythm.total_steps,
                "steps_per_epoch": t.data.steps_per_epoch,
                "threads": torch.get_num_threads(),
            }
        write_json(out, distributed.broadcast_object(facts))


def _endless(t: Trainer) -> Iterator[Any]:
    """Batches of one epoch after another."""
    for epoch in itertools.count():
        t.data.set_epoch(epoch, 0)
        yield from t.data


def _agreed(seconds: float) -> float:
    """The longest of all ranks' seconds, so that all do as many steps."""
    return max(distributed.gather_objects(seconds))


def _loading_seconds(t: Trainer) -> tuple[float, Any]:
    """Seconds of loading a batch, by all ranks at once, and one."""
    batches = _endless(t)
    batch, begun = next(batches), time.perf_counter()
    ready = 2 * t.config.data.workers  # batches that loader processes may have made meanwhile
    taken = 0
    while taken < max(3, ready) or (taken < 50 and time.perf_counter() - begun < SECONDS):
        if taken == ready:
            begun = time.perf_counter()
        batch, taken = next(batches), taken + 1
    timing.synchronize(t.device)
    counted = taken - ready if taken > ready else taken
    return (time.perf_counter() - begun) / counted, batch


def _step_seconds(t: Trainer, batch: Any) -> tuple[float, float]:
    """Median seconds of a step on one batch, and its last loss."""
    losses: list[Any] = []

    def step() -> None:
        losses[:] = [train_step(t.task, t.model, t.state, t.guard, batch)]

    first = _agreed(timing.seconds(step, t.device))
    count = max(2, min(20, int(SECONDS / first)))
    times = [timing.seconds(step, t.device) for _ in range(count)]
    return _agreed(statistics.median(times)), float(t.task.total(losses[0]).detach())


def _reduce_seconds(size: int, device: torch.device) -> float | None:
    """Median seconds of averaging so many bytes over all ranks."""
    if distributed.world_size() == 1:
        return None
    gradients = torch.zeros(size // 4, device=device)
    sums = {"": lambda: distributed.sum_over_ranks(gradients)}
    return statistics.median(timing.interleaved(sums, repeats=9, device=device)[""])


def _running_seconds(t: Trainer) -> float:
    """Seconds of a step of the run itself, with loading."""
    batches = _endless(t)

    def step() -> None:
        train_step(t.task, t.model, t.state, t.guard, next(batches))

    first = _agreed(timing.seconds(step, t.device))
    ready = 2 * t.config.data.workers
    count = max(3, min(30 + ready, int(2 * SECONDS / first)))
    times = [timing.seconds(step, t.device) for _ in range(count)]
    return _agreed(statistics.mean(times[min(ready, count // 2) :]))


def _device_facts(device: torch.device) -> dict:
    if device.type == "cuda":
        facts = torch.cuda.get_device_properties(device)
        return {"name": facts.name, "memory": facts.total_memory}
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {"name": f"CPU, {usable_cores()} cores", "memory": memory}


def train_until_killed(device: torch.device, config: Any, *, task: type[Task]) -> None:
    """Train; every process kills itself two steps after the save, as a power cut would."""
    last = config.saving.save_steps + 2
    calls = 0

    class Killed(task):
        def losses(self, model: nn.Module, batch: Any, part: int, parts: int) -> Any:
            nonlocal calls
            calls += part == 0
            if calls > last:
                while distributed.is_main() and not checkpoint.run_checkpoints(
                    config.saving.save_dir
                ):
                    time.sleep(0.1)
                os.kill(os.getpid(), signal.SIGKILL)
            return super().losses(model, batch, part, parts)

    train(device, config, task=Killed)
