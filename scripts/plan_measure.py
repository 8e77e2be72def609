"""What one device and one core do: the figures from which plan.py predicts whole runs."""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import sys
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "scripts" / "benchmark"))

import timing  # noqa: E402

from moco import encoders  # noqa: E402
from moco.builder import MoCo  # noqa: E402
from moco.data import loader  # noqa: E402
from moco.data.images import open_images  # noqa: E402
from moco.data.views import IMAGENET_MEAN, IMAGENET_STD, pretrain_recipe  # noqa: E402
from moco.errors import TrainingError  # noqa: E402
from moco.log import Means  # noqa: E402
from moco.train import guards  # noqa: E402
from moco.train import step as training  # noqa: E402
from moco.train.state import BackgroundWriter, Run  # noqa: E402

# What a measurement depends on: one of other settings is refused.
SETTINGS = (
    "arch", "image_size", "small_stem", "moco_dim", "moco_k", "mlp", "amp", "aug_plus",
)  # fmt: skip


# ------------------------------------------------------------------------------------------------
# Measuring
# ------------------------------------------------------------------------------------------------


class Step:
    """The training step of main_moco.py with its default objective, by its own functions, on a
    batch of `images` random ones."""

    def __init__(self, args: argparse.Namespace, images: int, device: torch.device) -> None:
        self.device = device
        groups = encoders.automatic_bn_splits(images)
        self.options = SimpleNamespace(
            lr=0.03, momentum=0.9, weight_decay=1e-4, accumulate=1, symmetric=False, amp=args.amp,
            contr_w=0.0, align_w=3.0, unif_w=1.0,
            mean=IMAGENET_MEAN, std=IMAGENET_STD,
            channels_last=training.channels_last_helps(device, args.amp),
        )  # fmt: skip
        self.moco = MoCo(
            lambda num_classes: encoders.build_encoder(
                args.arch, num_classes, image_size=args.image_size, small_stem=args.small_stem,
                bn_splits=groups,
            ),
            args.moco_dim, args.moco_k, align_alpha=2, unif_t=3, mlp=args.mlp,
        )  # fmt: skip
        self.moco.to(device, memory_format=training.memory_format(self.options))
        self.moco.prepare = training.preparation(self.options, device)
        scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
        self.run = Run(self.moco, training.fused_sgd(self.moco, self.options), scaler, Means())
        writer = BackgroundWriter(Path(), keep_last=1, keep_every=0)
        self.guard = guards.StepGuard(self.run, writer, max_overflows=100)
        self.check_freq = guards.steps_between_checks(device, 10)
        shape = (images, 3, args.image_size, args.image_size)
        self.views = [torch.randint(256, shape, dtype=torch.uint8, device=device) for _ in range(2)]

    def __call__(self) -> None:
        self.run.optimizer.zero_grad()
        losses, loss = self._forward_and_backward(self.guard)
        self.guard.step(losses, loss, 0)
        self.run.step += 1
        if self.run.step % self.check_freq == 0:
            self.guard.check(False, False)

    def backward_seconds(self) -> float:
        """Of the backward pass within one step."""
        spent = []

        def timed(loss: Tensor) -> None:
            spent.append(timing.seconds(loss.backward, self.device))

        self.run.optimizer.zero_grad()
        self._forward_and_backward(SimpleNamespace(backward=timed))
        return spent[0]

    def _forward_and_backward(self, guard) -> tuple:
        return training.forward_and_backward(
            self.moco, *self.views, self.device, self.options, guard
        )


class LiveBytes(TorchDispatchMode):
    """Bytes of the tensors that were made within and still exist, `now` and at their `peak`; each
    storage once, however many tensors look at it."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        known = {storage.data_ptr() for storage in _storages((args, kwargs))}
        for storage in _storages(result):
            if storage.data_ptr() not in known:
                known.add(storage.data_ptr())
                self._count(storage.nbytes())
                weakref.finalize(storage, self._count, -storage.nbytes())
        return result

    def _count(self, change: int) -> None:
        self.now += change
        self.peak = max(self.peak, self.now)


def _storages(nest: object) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(nest) if isinstance(leaf, Tensor)]


def activation_bytes(step: Step) -> tuple[int, int]:
    """Bytes that the query's forward pass leaves behind for the backward pass, its input as floats
    and its output included; and most bytes at a time of the key's, which keeps nothing."""
    moco, images = step.moco, step.views[0]
    with LiveBytes() as held, training.autocast(step.device, step.options.amp):
        query = moco.encoder_q(moco.prepare(images))
        kept = held.now
    del query
    with LiveBytes() as passing, torch.no_grad():
        with training.autocast(step.device, step.options.amp):
            moco.encoder_k(moco.prepare(images))
    return kept, passing.peak


def measure(
    args: argparse.Namespace,
    device: torch.device,
    sizes: Sequence[int],
    data: str | None = None,
) -> dict:
    """Everything that a plan needs to know of this device, of the encoder and of one core.

    Args:
        sizes: batch sizes of the steps that are timed.
        data: images for the loader, in place of those of `args`.

    Returns:
        `settings`, `device` ("cpu" or "cuda"), `device_bytes` (its memory; None on a CPU), `steps`
        (a list of `images`, `seconds` and `backward_seconds`), `parameter_bytes` and `buffer_bytes`
        of one encoder, `activations` and `key_forward` (bytes, `fixed` and `per_image`) and
        `pair_seconds` (two views of an image, on one core).
    """
    print(f"measuring on {device}: {timing.machine_line(timing.machine())}", flush=True)
    loading = pair_seconds(data or args.data, args)
    torch.manual_seed(0)
    with training.kernels(deterministic=False):
        try:
            few, more = (activation_bytes(Step(args, size, device)) for size in (2, 4))
            steps = {size: Step(args, size, device) for size in sizes}
            times = timing.interleaved(steps, repeats=args.repeats, device=device)
            backward = {
                size: statistics.median(each.backward_seconds() for _ in range(5))
                for size, each in steps.items()
            }
        except torch.OutOfMemoryError:
            raise TrainingError(
                f"a step of {sizes[-1]} images does not fit the memory of {device}; give smaller "
                "--measure-batches"
            ) from None
        encoder = steps[sizes[0]].moco.encoder_q
    activations, key_forward = (_line(*pair) for pair in zip(few, more, strict=True))
    return {
        "settings": {name: getattr(args, name) for name in SETTINGS},
        "machine": timing.machine(),
        "device": device.type,
        "device_bytes": torch.cuda.get_device_properties(device).total_memory
        if device.type == "cuda"
        else None,
        "steps": [
            {
                "images": size,
                "seconds": statistics.median(times[size]),
                "backward_seconds": backward[size],
            }
            for size in sizes
        ],
        "parameter_bytes": _bytes(encoder.parameters()),
        "buffer_bytes": _bytes(encoder.buffers()),
        "activations": activations,
        "key_forward": key_forward,
        "pair_seconds": loading,
    }


def _line(at_two: int, at_four: int) -> dict:
    """Through the bytes for two and for four images."""
    return {"fixed": 2 * at_two - at_four, "per_image": (at_four - at_two) / 2}


def _bytes(tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def pair_seconds(data: str | None, args: argparse.Namespace) -> float:
    """Seconds in which one core makes both views of an image, file to batch."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a worker
    with tempfile.TemporaryDirectory() as folder:
        if data is None:
            write_photos(Path(folder), 16)
        images = open_images("folder", data or folder, "pretrain")
        recipe = pretrain_recipe(args.image_size, aug_plus=args.aug_plus)
        views = loader.AugmentedViews(images, recipe, seed=0, num_views=2)
        size = min(8, len(images))
        batches = loader.EpochBatches(len(images), size, seed=0)
        pairs = loader.TrainLoader(views, batches, workers=0, device=torch.device("cpu"))

        def endless() -> Iterator:
            for epoch in itertools.count():
                batches.set_epoch(epoch)
                yield from pairs

        made = endless()
        next(made)  # the first one opens the files
        times = [timing.seconds(lambda: next(made)) for _ in range(args.repeats)]
    torch.set_num_threads(threads)
    return statistics.median(times) / size


def write_photos(folder: Path, count: int) -> None:
    """Smooth random pictures with some noise, 468 x 401 pixels as ImageNet's are on average, and
    with that quality of about their 110 kB."""
    rng = np.random.default_rng(0)
    for i in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (13, 15, 3), dtype=np.uint8))
        pixels = np.asarray(coarse.resize((468, 401), Image.Resampling.BICUBIC))
        pixels = (pixels + rng.normal(0, 10, (401, 468, 1))).clip(0, 255)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i:05d}.jpg", quality=95)


# ------------------------------------------------------------------------------------------------
# Figures of another time or machine
# ------------------------------------------------------------------------------------------------


def read_measured(path: Path, args: argparse.Namespace) -> dict:
    """What `measure` has returned, from a file written by --out.

    Raises:
        ValueError: no such file, no such content, or measured for another run.
    """
    try:
        measured = json.loads(path.read_text(encoding="utf-8"))["measured"]
        _check_figures(measured)
    except OSError as error:
        raise ValueError(f"--measured: cannot read {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else error
        raise ValueError(
            f"--measured: {path} holds no figures of this script ({reason}); write one by --out"
        ) from None
    for name in SETTINGS:
        found, wanted = measured["settings"].get(name), getattr(args, name)
        if found != wanted:
            raise ValueError(
                f"--measured: {path} was measured with {name} {found}, this plan is for {wanted}; "
                f"give --{name.replace('_', '-')} accordingly, or measure anew"
            )
    return measured


def _check_figures(measured: dict) -> None:
    if not isinstance(measured["settings"], dict) or measured["device"] not in ("cpu", "cuda"):
        raise ValueError("settings or device")
    for name in ("cpu", "gpu", "torch", "date"):
        measured["machine"][name]
    numbers = [
        measured["pair_seconds"], measured["parameter_bytes"], measured["buffer_bytes"] + 1,
        measured["device_bytes"] or 1,
        *(measured[kind]["per_image"] for kind in ("activations", "key_forward")),
        *(abs(measured[kind]["fixed"]) + 1 for kind in ("activations", "key_forward")),
        *(entry[name] for entry in measured["steps"]
          for name in ("images", "seconds", "backward_seconds")),
    ]  # fmt: skip
    if not all(0 < number < math.inf for number in numbers):
        raise ValueError("a number that is not positive")
    if len({entry["images"] for entry in measured["steps"]}) < 2:
        raise ValueError("steps of fewer than two batch sizes")
