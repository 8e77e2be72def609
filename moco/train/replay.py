"""Rerun the step that a black box holds (--replay RUN/failed), and say what was in it.

The loop is the run's own: it goes on from the black box as from a checkpoint, up to the step that
went wrong. There the losses are looked at before the optimizer could: norms of each layer's output,
weights and gradient, the latter of each term; the first tensor that is not finite; the images.
"""

from __future__ import annotations

import contextlib
import functools
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.utils import save_image

from moco import distributed
from moco.checkpoint import read_checkpoint
from moco.errors import TrainingError
from moco.run_files import FAILED_STATE, write_json
from moco.train.task import Losses, Task
from moco.train.trainer import Trainer

SHOWN_TOGETHER = 16  # images of a picture


class StepSeen(Exception):
    """The step has been looked at: nothing is left to do."""


def watched(task: type[Task], config: Any, at_exit: contextlib.ExitStack) -> type[Task]:
    """The task of the run, which looks at the step that `config.saving.replay` holds, and then
    raises `StepSeen`. The run folder, which `moco.cli` has chosen for this, is removed in the end.

    Raises:
        TrainingError: the config is not that of the run.
        CheckpointError: the black box cannot be read.
    """
    folder = Path(config.saving.replay)
    if config.saving.checkpoint != str(folder / FAILED_STATE):
        raise TrainingError("--replay: this command cannot rerun a step")
    if distributed.is_main():
        at_exit.callback(shutil.rmtree, config.saving.save_dir, ignore_errors=True)
    about = read_checkpoint(folder / FAILED_STATE, failed=True)["failed"]
    distributed.print_main(f"rerunning step {about['step']} ({about['kind']}: {about['text']})")
    return type(f"Watched{task.__name__}", (_Watched, task), {"about": about, "folder": folder})


class _Watched(Task):
    """A task that looks at one step, mixed into the task of the run.

    Attributes:
        about: which step, and why.
        folder: the black box.
    """

    about: dict[str, Any]
    folder: Path

    def build_evaluation(self, trainer: Trainer) -> None:
        """None, and the last that is built: from here on the trainer is whole."""
        self.trainer = trainer
        self.parts: list[dict] = []

    def losses(self, model: nn.Module, batch: Any, part: int, parts: int) -> Losses:
        t = self.trainer
        if t.state.step != self.about["step"]:
            return super().losses(model, batch, part, parts)
        with contextlib.closing(_Outputs(t.state.module)) as outputs:
            losses = super().losses(model, batch, part, parts)
        scale = t.state.scaler.get_scale()  # under which gradients can overflow in fp16
        total, spread = self.total(losses), self.feature_std(losses)
        bad_term = next((f"loss term {n}" for n, x in losses.items() if not x.isfinite()), None)
        found = {
            "layers": outputs.layers,
            "terms": {name: value.item() for name, value in losses.items()},
            "total": total.item(),
            "feature_std": None if spread is None else spread.item(),
            "first_not_finite": outputs.first or bad_term,
        }
        for name, value in [*losses.items(), ("total", total)]:
            first = outputs.gradients(name, value * scale, scale)
            found["first_not_finite"] = found["first_not_finite"] or first
        self.parts.append(found)
        if part == parts - 1:
            self._report(batch)
            raise StepSeen
        return losses

    def _report(self, batch: Any) -> None:
        rank = distributed.rank()
        suffix = f"_rank{rank}" if rank else ""
        pictures = _Pictures(self.folder, suffix)
        images = len(batch[0]) if all(isinstance(rows, Tensor) for rows in batch) else 0
        for first in range(0, images, SHOWN_TOGETHER):
            self.show(pictures, [rows[first : first + SHOWN_TOGETHER] for rows in batch])
        path = self.folder / f"replay{suffix}.json"
        write_json(path, _printable({**self.about, "rank": rank, "parts": self.parts}))
        shown = f", {pictures.count} picture(s) of {images} images" if pictures.count else ""
        names = [part["first_not_finite"] for part in self.parts]
        first = next(filter(None, names), None)
        verdict = f"first not finite: {first}" if first else "all of it is finite"
        said = "\n".join([*_lines(self.parts[-1]), verdict, f"written: {path}{shown}"])
        said = said if distributed.world_size() == 1 else f"rank {rank}\n{said}"
        distributed.print_main("\n".join(distributed.gather_objects(said)))


class _Outputs:
    """Norms of what layers without layers of their own put out, in the order of the forward pass,
    and of gradients."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.layers: dict[str, dict[str, Any]] = {}
        self.first: str | None = None
        self.slopes: str | None = None  # first gradient of an output that is not finite
        for name, tensor in module.named_parameters():
            self.note(f"weight {name}", tensor)
        for name, tensor in module.named_buffers():
            self.note(f"buffer {name}", tensor)
        self.hooks = [
            layer.register_forward_hook(functools.partial(self.seen, name))
            for name, layer in module.named_modules()
            if name and not list(layer.children())
        ]

    def close(self) -> None:
        for hook in self.hooks:
            hook.remove()

    def note(self, name: str, tensor: Tensor) -> None:
        if self.first is None and not tensor.isfinite().all():
            self.first = name

    def seen(self, name: str, layer: nn.Module, inputs: Any, output: Any) -> None:
        """A forward hook."""
        while isinstance(output, tuple):  # of a recurrent layer, packed: outputs come first
            output = output[0]
        if not isinstance(output, Tensor) or not output.is_floating_point():
            return
        self.note(f"output of {name}", output)
        weights = list(layer.parameters(recurse=False))
        row = self.layers.setdefault(name, {"output": 0.0})
        row["output"] = math.hypot(row["output"], norm_of([output]))
        row["weight"] = norm_of(weights) if weights else None
        if output.requires_grad:
            output.register_hook(functools.partial(self.back, name))

    def back(self, name: str, slope: Tensor) -> None:
        if self.slopes is None and not slope.isfinite().all():
            self.slopes = f"gradient of the output of {name}"

    def gradients(self, term: str, value: Tensor, scale: float) -> str | None:
        """Add the norm of each layer's gradient under `term`; the first that is not finite."""
        if not value.requires_grad:
            return None
        self.slopes = None
        trained = {name: p for name, p in self.module.named_parameters() if p.requires_grad}
        slopes = torch.autograd.grad(
            value, list(trained.values()), retain_graph=True, allow_unused=True
        )
        by_layer: dict[str, list[Tensor]] = {}
        first = self.slopes
        for name, slope in zip(trained, slopes, strict=True):
            if slope is None:
                continue
            by_layer.setdefault(name.rpartition(".")[0], []).append(slope)
            if first is None and not slope.isfinite().all():
                first = f"gradient of {name}"
        for layer, of_layer in by_layer.items():
            row = self.layers.setdefault(layer, {"output": None, "weight": None})
            row.setdefault("gradient", {})[term] = norm_of(of_layer) / scale
        return f"{first} (of {term})" if first else None


def norm_of(tensors: list[Tensor]) -> float:
    """Euclidean norm of all their numbers, in float64: squares of float32 can overflow."""
    return math.hypot(*(tensor.detach().double().norm().item() for tensor in tensors))


class _Pictures:
    """Takes pictures as `RunLog` does, into files."""

    active = True

    def __init__(self, folder: Path, suffix: str) -> None:
        self.folder, self.suffix, self.count = folder, suffix, 0

    def picture(self, tag: str, step: int, pixels: Tensor) -> None:
        path = self.folder / f"{tag}_{self.count:03d}{self.suffix}.png"
        save_image(pixels.float() / 255, path)
        self.count += 1


def _lines(found: dict) -> list[str]:
    """A table of the layers with weights, and the terms."""
    terms = [*found["terms"], "total"]
    rows = [["layer", "output", "weight", *(f"gradient of {term}" for term in terms)]]
    for name, row in found["layers"].items():
        if row["weight"] is not None or "gradient" in row:
            slopes = [row.get("gradient", {}).get(term) for term in terms]
            rows.append([name, *map(_number, (row["output"], row["weight"], *slopes))])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    table = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    ]
    values = {**found["terms"], "total": found["total"], "feature std": found["feature_std"]}
    return [*table, "  ".join(f"{name} {_number(value)}" for name, value in values.items())]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _printable(value: Any) -> Any:
    """As strict JSON holds it: numbers that are not finite as text."""
    if isinstance(value, dict):
        return {name: _printable(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_printable(each) for each in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
