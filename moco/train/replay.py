"""Rerun the step that a black box holds (--replay RUN/failed), and say what was in it.

The loop is the run's own: it goes on from the black box as from a checkpoint, up to the step that
went wrong. There the losses are looked at before the optimizer could: norms of each layer's output,
weights and gradient, the latter of each term; the first tensor that is not finite; the images.
"""

from __future__ import annotations

import contextlib
import math
import shutil
from collections.abc import Iterator
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
        with _outputs(t.state.module) as outputs:
            losses = super().losses(model, batch, part, parts)
        scale = t.state.scaler.get_scale()  # under which gradients can overflow in fp16
        total = self.total(losses)
        found = {
            "layers": outputs.layers,
            "terms": {name: value.item() for name, value in losses.items()},
            "total": total.item(),
            "feature_std": None,
            "first_not_finite": outputs.first or _first_of_losses(losses),
        }
        spread = self.feature_std(losses)
        found["feature_std"] = None if spread is None else spread.item()
        for name, value in [*losses.items(), ("total", total)]:
            first = _gradients(t.state.module, outputs, name, value * scale, scale)
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
        said = "\n".join([*_lines(self.parts[-1]), self._verdict(), f"written: {path}{shown}"])
        said = said if distributed.world_size() == 1 else f"rank {rank}\n{said}"
        distributed.print_main("\n".join(distributed.gather_objects(said)))

    def _verdict(self) -> str:
        names = [found["first_not_finite"] for found in self.parts]
        first = next((name for name in names if name), None)
        return f"first not finite: {first}" if first else "all of it is finite"


class _Outputs:
    """Norms of what layers put out, in the order of the forward pass."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.layers: dict[str, dict[str, Any]] = {}
        self.first: str | None = None
        self.slopes: str | None = None  # first gradient of an output that is not finite
        for kind, named in (
            ("weight", module.named_parameters()),
            ("buffer", module.named_buffers()),
        ):
            for name, tensor in named:
                self.note(f"{kind} {name}", tensor)

    def note(self, name: str, tensor: Tensor) -> None:
        if self.first is None and not tensor.isfinite().all():
            self.first = name

    def seen(self, name: str, layer: nn.Module, output: Any) -> None:
        """A forward hook."""
        while isinstance(output, tuple):  # of a recurrent layer, packed: outputs come first
            output = output[0]
        if not isinstance(output, Tensor) or not output.is_floating_point():
            return
        self.note(f"output of {name}", output)
        weights = [p for p in layer.parameters(recurse=False)]
        row = self.layers.setdefault(name, {"output": 0.0})
        row["output"] = math.hypot(row["output"], norm_of([output]))
        row["weight"] = norm_of(weights) if weights else None
        if output.requires_grad:
            output.register_hook(lambda slope: self.back(name, slope))

    def back(self, name: str, slope: Tensor) -> None:
        if self.slopes is None and not slope.isfinite().all():
            self.slopes = f"gradient of the output of {name}"


@contextlib.contextmanager
def _outputs(module: nn.Module) -> Iterator[_Outputs]:
    """Watch all layers without layers of their own."""
    outputs = _Outputs(module)
    hooks = [
        layer.register_forward_hook(
            lambda layer, _, output, name=name: outputs.seen(name, layer, output)
        )
        for name, layer in module.named_modules()
        if name and not any(True for _ in layer.children())
    ]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


def _first_of_losses(losses: Losses) -> str | None:
    return next((f"loss term {n}" for n, value in losses.items() if not value.isfinite()), None)


def _gradients(
    module: nn.Module, outputs: _Outputs, term: str, value: Tensor, scale: float
) -> str | None:
    """Add the norm of each layer's gradient under `term`; the first that is not finite."""
    if not value.requires_grad:
        return None
    outputs.slopes = None
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    slopes = torch.autograd.grad(
        value, list(trained.values()), retain_graph=True, allow_unused=True
    )
    by_layer: dict[str, list[Tensor]] = {}
    first = outputs.slopes
    for name, slope in zip(trained, slopes, strict=True):
        if slope is None:
            continue
        by_layer.setdefault(name.rpartition(".")[0], []).append(slope)
        if first is None and not slope.isfinite().all():
            first = f"gradient of {name}"
    for layer, of_layer in by_layer.items():
        row = outputs.layers.setdefault(layer, {"output": None, "weight": None})
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
