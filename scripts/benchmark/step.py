#!/usr/bin/env python
"""Time of a whole training step, and of two of its parts, against the ancestors' way.

    python scripts/benchmark/step.py [--compile] [--out FILE.json]
    python scripts/benchmark/step.py --device cuda --cases resnet50:224:256 --bn-splits 8

Ours begins with uint8 pixels and normalises them on the device, the baseline with floats that its
loader has normalised. The limit of a step are its convolutions alone, in our memory format and
type: forward and backward of the query encoder's, forward of the key encoder's. On a GPU the
baseline runs as upstream ships it (float32, convolutions in TF32, NCHW), then as ours does, under
bf16 and channels_last; and lightly's MoCo, where it is installed, on the same encoder and batch.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import baseline

from moco import encoders, timing
from moco.builder import MoCo
from moco.config import (
    Encoder,
    Objective,
    Placement,
    PretrainConfig,
    PretrainData,
    PretrainOptim,
    Speed,
    Views,
)
from moco.log import Means
from moco.precision import half_precision, kernels, memory_format
from moco.tasks.moco import MoCoTask
from moco.train.guards import StepGuard
from moco.train.optimizer import fused_sgd
from moco.train.saver import BackgroundWriter
from moco.train.state import TrainState
from moco.train.step import train_step

CASES = {
    "cpu": ["resnet18:64:32", "resnet50:224:8"],
    "cuda": ["resnet50:224:256", "resnet50:224:32"],
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="time of a whole training step")
    parser.add_argument("--cases", type=case, nargs="+", metavar="ARCH:PX:N",
                        help="encoder, image size and batch (by device)")  # fmt: skip
    parser.add_argument("--queue", type=int, default=65536)
    parser.add_argument("--bn-splits", type=int, default=1, help="of ours (%(default)s)")
    parser.add_argument("--amp", choices=("off", "bf16"), help="of ours (bf16 on a GPU)")
    parser.add_argument("--compile", action="store_true", help="ours compiled as well")
    timing.add_arguments(parser, repeats=7)
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    args.amp = args.amp or ("bf16" if device.type == "cuda" else "off")
    cases = args.cases or [case(text) for text in CASES[device.type]]
    table = timing.Table(
        f"training step on {device}, align + uniform, K={args.queue}, MLP head, ours with amp "
        f"{args.amp} and {args.bn_splits} batch-norm group(s)",
        width=46,
    )
    with kernels(deterministic=False):
        for arch, size, n in cases:
            steps(table, arch, size, n, device, args)
        for arch in dict.fromkeys(arch for arch, _, _ in cases):
            parts(table, arch, device, args)
    table.write(args.out)


def case(text: str) -> tuple[str, int, int]:
    try:
        arch, size, n = text.split(":")
        return arch, int(size), int(n)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected ARCH:PIXELS:BATCH, got {text!r}") from None


# ------------------------------------------------------------------------------------------------
# Whole steps
# ------------------------------------------------------------------------------------------------


def steps(
    table: timing.Table,
    arch: str,
    size: int,
    n: int,
    device: torch.device,
    args: argparse.Namespace,
) -> None:
    torch.manual_seed(0)
    pixels = [
        torch.randint(256, (n, 3, size, size), dtype=torch.uint8, device=device) for _ in range(2)
    ]
    floats = [image.float() / 127.5 - 1 for image in pixels]
    last = [image.contiguous(memory_format=torch.channels_last) for image in floats]

    own, encoder = our_step(arch, size, n, args, device, compiled=False)
    variants: dict[str, Callable[[], object]] = {
        "baseline": bind(baseline_step(arch, size, args, device), floats),
        "ours": bind(own, pixels),
        "convolutions": convolutions(encoder, last[0], args),
    }
    if args.compile:
        compiled, _ = our_step(arch, size, n, args, device, compiled=True)
        variants["ours, compiled"] = bind(compiled, pixels)
    if device.type == "cuda":
        tuned = baseline_step(arch, size, args, device, tuned=True)
        variants["baseline tuned"] = bind(tuned, last)
        lightly = lightly_step(arch, size, args, device)
        if lightly:
            variants["lightly"] = bind(lightly, last)
    times = timing.interleaved(variants, repeats=args.repeats, warmup=3, device=device)
    floor = statistics.median(times["convolutions"])
    name = f"{arch} {size}px N={n}"
    for ours in ("ours", "ours, compiled"):
        for other in ("baseline", "baseline tuned", "lightly"):
            if ours in times and other in times:
                what = name + {"baseline": "", "baseline tuned": ", baseline bf16 NHWC",
                               "lightly": ", lightly as baseline"}[other]  # fmt: skip
                table.add(
                    timing.row(
                        what + ours.removeprefix("ours"),
                        times[other],
                        times[ours],
                        items=n,
                        floor=floor,
                        limited_by="convolutions alone",
                        more={"seconds": {key: sorted(value) for key, value in times.items()}},
                    )  # fmt: skip
                )


def bind(step: Callable[..., object], images: list[Tensor]) -> Callable[[], object]:
    return lambda: step(*images)


def base_encoder(arch: str, size: int) -> Callable[..., nn.Module]:
    return lambda num_classes: encoders.build_encoder(arch, num_classes, image_size=size)


def our_step(
    arch: str, size: int, n: int, args: argparse.Namespace, device: torch.device, *, compiled: bool
) -> tuple[Callable[[Tensor, Tensor], None], nn.Module]:
    """The step of main_moco.py, by its own functions; and the query encoder."""
    config = PretrainConfig(
        data=PretrainData(data="unused"),
        objective=Objective(align_w=1, unif_w=1),
        encoder=Encoder(arch=arch, moco_k=args.queue, mlp=True, bn_splits=str(args.bn_splits)),
        views=Views(image_size=size),
        optim=PretrainOptim(batch_size=n, amp=args.amp, seed=0),
        speed=Speed(channels_last=True),
        placement=Placement(devices=(str(device),)),
    )
    task = MoCoTask(config)
    moco = task.build_module().to(device, memory_format=memory_format(True))
    task.on_device(moco, device)
    for module in task.compiled(moco) if compiled else ():
        module.compile()
    scaler = torch.amp.GradScaler(device.type, enabled=False)
    state = TrainState(task, moco, task.build_optimizer(moco), scaler, Means())
    guard = StepGuard(state, BackgroundWriter(Path(), keep_last=1, keep_every=0), 0)

    def step(im_q: Tensor, im_k: Tensor) -> None:
        train_step(task, moco, state, guard, (im_q, im_k))
        state.step += 1
        if state.step >= guard.looks.next:
            guard.check(False, False)

    return step, moco.encoder_q


def baseline_step(
    arch: str, size: int, args: argparse.Namespace, device: torch.device, *, tuned: bool = False
) -> baseline.Step:
    layout = torch.channels_last if tuned else torch.contiguous_format
    pair = MoCo(base_encoder(arch, size), 128, 1, align_alpha=2, mlp=True)
    pair.to(device, memory_format=layout)
    return baseline.Step(pair.encoder_q, pair.encoder_k, args.queue, 128, amp=tuned)


def convolutions(
    encoder: nn.Module, images: Tensor, args: argparse.Namespace
) -> Callable[[], None]:
    """All convolutions of a step with the inputs that they get there, and nothing else."""
    dtype = half_precision(args.amp) or torch.float32
    as_ours = {"dtype": dtype, "memory_format": torch.channels_last}
    seen: list[tuple[nn.Conv2d, Tensor]] = []

    def note(module: nn.Conv2d, given: tuple[Tensor, ...]) -> None:
        seen.append((module, torch.rand_like(given[0])))

    hooks = [
        module.register_forward_pre_hook(note)
        for module in encoder.modules()
        if isinstance(module, nn.Conv2d)
    ]
    with torch.no_grad(), torch.autocast(images.device.type, dtype, enabled=args.amp != "off"):
        encoder(images)
    for hook in hooks:
        hook.remove()
    layers = [
        (copy.deepcopy(module).to(**as_ours), given.to(**as_ours).requires_grad_(number > 0))
        for number, (module, given) in enumerate(seen)  # images themselves get no gradient
    ]
    slopes = [torch.rand_like(convolution(given)) for convolution, given in layers]

    def run() -> None:
        for (convolution, given), slope in zip(layers, slopes, strict=True):
            convolution.weight.grad = given.grad = None
            with torch.no_grad():
                convolution(given)
            convolution(given).backward(slope)

    return run


def lightly_step(
    arch: str, size: int, args: argparse.Namespace, device: torch.device
) -> Callable[[Tensor, Tensor], None] | None:
    """A step of lightly's MoCo v2, put together as its own example does, under bf16 and
    channels_last; None where lightly is not installed."""
    try:
        from lightly.loss import NTXentLoss
        from lightly.models.utils import update_momentum
    except ImportError:
        print("lightly is not installed: its MoCo is left out")
        return None
    pair = MoCo(base_encoder(arch, size), 128, 1, align_alpha=2, mlp=True)
    pair.to(device, memory_format=torch.channels_last)
    criterion = NTXentLoss(temperature=0.2, memory_bank_size=(args.queue, 128)).to(device)
    optimizer = torch.optim.SGD(pair.encoder_q.parameters(), 0.03, momentum=0.9, weight_decay=1e-4)

    def step(im_q: Tensor, im_k: Tensor) -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=args.amp == "bf16"):
            update_momentum(pair.encoder_q, pair.encoder_k, m=0.999)
            query = pair.encoder_q(im_q)
            with torch.no_grad():
                key = pair.encoder_k(im_k)
        loss = criterion(query.float(), key.float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


# ------------------------------------------------------------------------------------------------
# Parts of a step
# ------------------------------------------------------------------------------------------------


def parts(table: timing.Table, arch: str, device: torch.device, args: argparse.Namespace) -> None:
    """The momentum update and the optimizer; limited by the bytes that must be read and written."""
    moco = MoCo(base_encoder(arch, 224), 128, 1, align_alpha=2, mlp=True).to(device)
    ours = fused_sgd(moco, PretrainOptim())
    theirs = torch.optim.SGD(
        moco.encoder_q.parameters(), 0.03, momentum=0.9, weight_decay=1e-4, foreach=False
    )
    for parameter in moco.encoder_q.parameters():
        parameter.grad = torch.full_like(parameter, 1e-6)

    def theirs_momentum() -> None:
        baseline.update_key_encoder(moco.encoder_k, moco.encoder_q, 0.999)

    size = sum(p.numel() * p.element_size() for p in moco.encoder_q.parameters())
    bandwidth = bytes_per_second(size, device)
    for what, base, own, passes in (
        # read query and key, write key
        ("momentum update", theirs_momentum, moco.update_key_encoder, 3),
        # read weight, gradient and momentum, write weight and momentum
        ("optimizer", theirs.step, ours.step, 5),
    ):
        times = timing.interleaved(
            {"baseline": base, "ours": own}, repeats=3 * args.repeats, device=device
        )
        table.add(
            timing.row(
                f"{what}, {arch}",
                times["baseline"],
                times["ours"],
                floor=passes * size / bandwidth,
                limited_by="memory bandwidth",
            )  # fmt: skip
        )


def bytes_per_second(size: int, device: torch.device) -> float:
    """Of adding one block of that many bytes to another: two are read and one is written."""
    source = torch.zeros(size // 4, device=device)
    target = torch.zeros_like(source)
    times = [timing.seconds(lambda: target.add_(source), device) for _ in range(30)]
    return 3 * size / statistics.median(times[5:])


if __name__ == "__main__":
    main()
