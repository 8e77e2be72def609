#!/usr/bin/env python
"""One MoCo v2 training step (InfoNCE) of ours beside other libraries' and the ancestors' formula.

    python -m venv --system-site-packages ENV && ENV/bin/pip install lightly      # optional
    OMP_NUM_THREADS=1 ENV/bin/python scripts/benchmark/peers.py [--arch resnet18 --image-size 64]

All begin with the same weights and images, on one device, in turn: query, momentum update, shuffled
keys, loss against the queue, backward pass, SGD; one group of batch norm. Ours is the step of
main_moco.py, from bytes; the others get the images normalised, as from their loaders. lightly's is
made of the blocks that its MoCo v2 benchmark for ResNet-50 consists of, without Lightning around it
and without that benchmark's online classifier. A peer that is not installed is named and left out.
solo-learn 1.0.2 asks for torch 1.9.1, which this project does not run with, and is not compared.
"""

import argparse
import functools
import importlib.metadata

import baseline
import torch

from moco import encoders, timing
from moco.data.views import IMAGENET_MEAN, IMAGENET_STD, normalize
from moco.precision import kernels


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="a MoCo v2 step of ours and of other libraries")
    parser.add_argument("--arch", default="resnet18", choices=encoders.arch_names(), metavar="ARCH")
    parser.add_argument("--image-size", type=int, default=64, help="pixels (%(default)s)")
    parser.add_argument("--batch", type=int, default=64, help="images (%(default)s)")
    parser.add_argument("--queue", type=int, default=65536)
    timing.add_arguments(parser, repeats=9)
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    case = baseline.Case(args.arch, args.image_size, args.batch, args.queue, device, tau=0.2)
    torch.manual_seed(0)
    pixels, state = case.pixels(), case.state()
    peers = {"upstream's formula": baseline.upstream_step(case, case.pair(state.module))}
    try:
        name = f"lightly {importlib.metadata.version('lightly')}"
        peers[name] = baseline.lightly_step(case, case.pair(state.module))
    except ImportError:
        print("lightly is not installed, and left out")
    floats = [normalize(images, IMAGENET_MEAN, IMAGENET_STD) for images in pixels]
    variants = {name: functools.partial(step, *floats) for name, step in peers.items()}
    variants["ours"] = functools.partial(baseline.our_step(state), *pixels)
    with kernels(deterministic=False):
        times = timing.interleaved(variants, repeats=args.repeats, device=device)
    table = timing.Table(
        f"MoCo v2 step on {device}: {args.arch}, {args.image_size} px, N={args.batch}, "
        f"K={args.queue}; baseline is the other"
    )
    for name in peers:
        table.add(name, times[name], times["ours"])
    table.write(args.out)


if __name__ == "__main__":
    main()
