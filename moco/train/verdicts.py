"""Verdicts of a preflight: what was found of each part of a run, and whether it may start."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moco.data.audit import Audit, audit
from moco.errors import DataError
from moco.launch import usable_cores
from moco.run_files import read_log
from moco.train.forecast import Measured, forecast

LOOKED_AT = 2000  # images, evenly spread
_NEAR = 0.3  # relative error of a forecast that a short run bears out
Losses = dict[int, tuple[float, float]]  # step -> loss, and when it was logged


@dataclass(frozen=True)
class Line:
    """One line of the table: what was looked at, what was found, whether the run may start."""

    what: str
    found: str
    go: bool = True
    advice: str = ""


def table(lines: list[Line]) -> str:
    width = max((len(line.found) for line in lines), default=0)
    return "\n".join(
        f"{line.what:<16} {line.found:<{width}}  " + ("go" if line.go else f"NO-GO: {line.advice}")
        for line in lines
    )


def logged_losses(log: Path) -> Losses:
    lines = read_log(log)[0] if log.is_file() else []
    return {line["step"]: (line["loss"], line["time"]) for line in lines if line["kind"] == "train"}


def data_line(config: Any) -> Line:
    """What `scripts/check_dataset.py` says of some images, and of all class folders."""
    data = config.data
    if data.dataset not in ("folder", "tar", "parquet"):
        return Line("data", f"{data.dataset}, held in memory")
    try:
        found: Audit = audit(Path(data.data), max(1, data.workers), data.dataset, most=LOOKED_AT)
    except DataError as error:
        return Line("data", str(error), False, "mend it")
    text = f"{found.images} images looked at, {found.refused} would be refused"
    allowed = data.max_bad_share * found.images if data.skip_bad_images else 0
    advice = f"python scripts/check_dataset.py --dataset {data.dataset} {data.data}"
    return Line("data", text, found.refused <= allowed, advice)


def measured_lines(config: Any, facts: dict) -> list[Line]:
    ranks, placement = facts["ranks"], config.placement
    names = {rank["device"]["name"] for rank in ranks}
    peak = max(rank["peak"] for rank in ranks)
    memory = min(rank["device"]["memory"] for rank in ranks)
    on_cpu = placement.devices[0] == "cpu"
    used = peak * placement.local_processes if on_cpu else peak
    (images, step), *_ = facts["steps"]
    finite = all(abs(rank["loss"]) < float("inf") for rank in ranks)
    m = measured_of(config, facts)
    need = m.batch / step
    text = (
        f"{len(ranks)} x {', '.join(sorted(names))}: {peak / 2**30:.1f} GiB of "
        f"{memory / 2**30:.1f} at most, batch {m.batch}"
    )
    lines = [Line("memory", text, used < 0.95 * memory, "--accumulate or --amp bf16")]
    text = f"{1e3 * step:.1f} ms, {need:.1f} images/s, loss {'' if finite else 'not '}finite"
    lines.append(Line("a full step", text, finite, "lower --lr"))
    if m.bandwidth:
        text = (
            f"all-reduce of {facts['gradients'] / 1e6:.1f} MB: {1e3 * facts['reduce']:.1f} ms, "
            f"{m.bandwidth / 1e9:.2f} GB/s"
        )
        advice = "longer than a step: look at the network between the processes"
        lines.append(Line("collectives", text, facts["reduce"] < step, advice))
    text = (
        f"{m.load_rate:.1f} images/s by {config.data.workers} process(es) for each rank, "
        f"the steps take {need:.1f}"
    )
    enough = m.load_rate >= 0.95 * need or not m.overlaps
    lines.append(Line("loading", text, enough, "more -j, --views device, or faster storage"))
    kept = config.saving.keep_last + 1
    if config.saving.keep_every:
        kept += config.schedule.epochs // config.saving.keep_every
    folder = config.saving.save_dir
    free = shutil.disk_usage(folder).free
    text = (
        f"{facts['saved'] / 2**20:.1f} MiB in {facts['written']:.1f} s, training waits "
        f"{facts['copied']:.2f} s; {kept} files of {free / 2**30:.0f} GiB free"
    )
    advice = f"make room in {folder.parent}, or keep fewer (--keep-last, --keep-every)"
    return [*lines, Line("saving", text, kept * facts["saved"] < free, advice)]


def resume_line(before: Losses, after: Losses, statuses: tuple[int, int], steps: int) -> Line:
    """Judge a killed run and its continuation by the losses of the steps that both did."""
    killed, again = statuses
    # Lines of steps that were not done again are still there.
    twice = [(before[s][0], after[s][0]) for s in before if s in after and before[s] != after[s]]
    apart = max((abs(a - b) / (1e-6 + abs(a)) for a, b in twice), default=0)
    text = (
        f"{steps} steps, killed after {max(before, default=0)}, went on to "
        f"{max(after, default=0)}; {len(twice)} done twice, losses "
        + ("equal" if apart == 0 else f"within {apart:.1g}")
    )
    go = killed != 0 and again == 0 and max(after, default=0) == steps and apart < 0.01
    return Line("kill and resume", text, go, "see above; do not start a run that cannot resume")


def measured_of(config: Any, facts: dict) -> Measured:
    world, placement = len(facts["ranks"]), config.placement
    device = torch.device(placement.devices[0]).type
    busy = (facts["threads"] + config.data.workers) * placement.local_processes
    workers = config.data.workers > 0 and (device == "cuda" or busy <= usable_cores())
    sent = 2 * (world - 1) / world * facts["gradients"]
    return Measured(
        device=device,
        world=world,
        nodes=max(1, world // placement.local_processes),
        batch=config.optim.batch_size,
        steps=dict(facts["steps"]),
        load_rate=config.optim.batch_size / max(rank["loading"] for rank in facts["ranks"]),
        overlaps=workers,
        gradient_bytes=facts["gradients"],
        image_size=config.views.image_size,
        dim=config.encoder.moco_dim,
        bandwidth=sent / facts["reduce"] if facts["reduce"] else None,
    )


def forecast_lines(config: Any, facts: dict) -> list[Line]:
    m = measured_of(config, facts)
    now, twice = forecast(m), forecast(m, 2 * m.world)
    steps = facts["total_steps"]
    saves = facts["copied"] * steps / max(1, facts["steps_per_epoch"])
    hours = (steps * now.seconds + saves) / 3600
    error = now.seconds / facts["running"] - 1
    unknown = "" if m.bandwidth else ", were their network for nothing"
    whole = (
        f"{hours:.4g} hours for {steps} steps of {1e3 * now.seconds:.1f} ms, without k-NN; "
        f"limited by {now.limit}"
    )
    more = (
        f"{2 * m.world} instead of {m.world}: {now.seconds / twice.seconds:.2f} times as fast, "
        f"limited by {twice.limit}{unknown}"
    )
    held = f"a short run: {1e3 * facts['running']:.1f} ms a step, forecast {error:+.0%} off"
    advice = "other work on this machine? try again; do not trust the hours"
    return [
        Line("forecast", whole),
        Line("more devices", more),
        Line("forecast held", held, abs(error) < _NEAR, advice),
    ]
