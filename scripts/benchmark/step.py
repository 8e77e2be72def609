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

import argparse
import copy
import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import baseline
import torch
from torch import Tensor, nn

from moco import timing
from moco.config import PretrainOptim
from moco.data.views import IMAGENET_MEAN, IMAGENET_STD, normalize
from moco.precision import autocast, half_precision, kernels
from moco.train.optimizer import fused_sgd

CASES = {
    "cpu": ["resnet18:64:32", "resnet50:224:8"],
    "cuda": ["resnet50:224:256", "resnet50:224:32"],
}
OTHERS = {
    "baseline": "",
    "baseline tuned": ", baseline bf16 NHWC",
    "lightly": ", lightly as baseline",
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="time of a whole training step")
    parser.add_argument("--cases", type=case_of, nargs="+", metavar="ARCH:PX:N",
                        help="encoder, image size and batch (by device)")  # fmt: skip
    parser.add_argument("--queue", type=int, default=65536)
    parser.add_argument("--bn-splits", type=int, default=1, help="of ours (%(default)s)")
    parser.add_argument("--amp", choices=("off", "bf16"), help="of ours (bf16 on a GPU)")
    parser.add_argument("--compile", action="store_true", help="ours compiled as well")
    timing.add_arguments(parser, repeats=7)
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    amp = args.amp or ("bf16" if device.type == "cuda" else "off")
    cases = [
        baseline.Case(*each, args.queue, device, amp, args.bn_splits)
        for each in args.cases or map(case_of, CASES[device.type])
    ]
    table = timing.Table(
        f"training step on {device}, align + uniform, K={args.queue}, MLP head, ours with amp "
        f"{amp} and {args.bn_splits} batch-norm group(s)",
        width=46,
    )
    with kernels(deterministic=False):
        for case in cases:
            whole(table, case, args)
        for arch in dict.fromkeys(case.arch for case in cases):
            parts(table, arch, device, args.repeats)
    table.write(args.out)


def case_of(text: str) -> tuple[str, int, int]:
    try:
        arch, size, n = text.split(":")
        return arch, int(size), int(n)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected ARCH:PIXELS:BATCH, got {text!r}") from None


def whole(table: timing.Table, case: baseline.Case, args: argparse.Namespace) -> None:
    torch.manual_seed(0)
    pixels, state = case.pixels(), case.state()
    moco = state.module
    floats = [normalize(images, IMAGENET_MEAN, IMAGENET_STD) for images in pixels]
    last = [images.contiguous(memory_format=torch.channels_last) for images in floats]

    upstream = baseline.upstream_step(replace(case, amp="off"), case.pair(moco))
    variants: dict[str, Callable[[], object]] = {
        "baseline": partial(upstream, *floats),
        "ours": partial(baseline.our_step(state), *pixels),
        "convolutions": convolutions(moco.encoder_q, last[0], case.amp),
    }
    if args.compile:
        compiled = case.state()
        for module in compiled.task.compiled(compiled.module):
            module.compile()
        variants["ours, compiled"] = partial(baseline.our_step(compiled), *pixels)
    if case.device.type == "cuda":
        pairs = [case.pair(moco).to(memory_format=torch.channels_last) for _ in range(2)]
        tuned = baseline.upstream_step(replace(case, amp="bf16"), pairs[0])
        variants["baseline tuned"] = partial(tuned, *last)
        try:
            variants["lightly"] = partial(baseline.lightly_step(case, pairs[1]), *last)
        except ImportError:
            print("lightly is not installed: its MoCo is left out")
    times = timing.interleaved(variants, repeats=args.repeats, warmup=3, device=case.device)
    for ours in ("ours", "ours, compiled"):
        for other, note in OTHERS.items():
            if ours in times and other in times:
                table.add(
                    f"{case.arch} {case.size}px N={case.batch}{note}{ours[4:]}",
                    times[other],
                    times[ours],
                    items=case.batch,
                    floor=statistics.median(times["convolutions"]),
                    limited_by="convolutions alone",
                    seconds={key: sorted(value) for key, value in times.items()},
                )


def convolutions(encoder: nn.Module, images: Tensor, amp: str) -> Callable[[], None]:
    """All convolutions of a step with the inputs that they get there, and nothing else."""
    dtype = half_precision(amp) or torch.float32
    as_ours = {"dtype": dtype, "memory_format": torch.channels_last}
    seen: list[tuple[nn.Conv2d, Tensor]] = []

    def note(module: nn.Conv2d, given: tuple[Tensor, ...]) -> None:
        seen.append((module, torch.rand_like(given[0])))

    convs = [module for module in encoder.modules() if isinstance(module, nn.Conv2d)]
    hooks = [module.register_forward_pre_hook(note) for module in convs]
    with torch.no_grad(), autocast(images.device, amp):
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


def parts(table: timing.Table, arch: str, device: torch.device, repeats: int) -> None:
    """The momentum update and the optimizer; limited by the bytes that must be read and written."""
    moco = baseline.Case(arch, 224, 1, 1, device).pair()
    for parameter in moco.encoder_q.parameters():
        parameter.grad = torch.full_like(parameter, 1e-6)
    theirs = partial(baseline.update_key_encoder, moco.encoder_k, moco.encoder_q, 0.999)
    size = sum(p.numel() * p.element_size() for p in moco.encoder_q.parameters())
    bandwidth = bytes_per_second(size, device)
    for what, base, own, passes in (
        # read query and key, write key
        ("momentum update", theirs, moco.update_key_encoder, 3),
        # read weight, gradient and momentum, write weight and momentum
        ("optimizer", baseline.sgd(moco.encoder_q, foreach=False).step,
         fused_sgd(moco, PretrainOptim()).step, 5),
    ):  # fmt: skip
        variants = {"baseline": base, "ours": own}
        times = timing.interleaved(variants, repeats=3 * repeats, device=device)
        table.add(f"{what}, {arch}", times["baseline"], times["ours"],
                  floor=passes * size / bandwidth, limited_by="memory bandwidth")  # fmt: skip


def bytes_per_second(size: int, device: torch.device) -> float:
    """Of adding one block of that many bytes to another: two are read and one is written."""
    source = torch.zeros(size // 4, device=device)
    target = torch.zeros_like(source)
    times = [timing.seconds(lambda: target.add_(source), device) for _ in range(30)]
    return 3 * size / statistics.median(times[5:])


if __name__ == "__main__":
    main()
