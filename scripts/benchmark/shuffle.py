#!/usr/bin/env python
"""Time of the key shuffle between processes, against gathering every image everywhere.

    python scripts/benchmark/shuffle.py [--ranks 2] [--batch 32] [--out FILE.json]

The baseline is the ancestors' way: rank 0 draws a permutation and broadcasts it, every rank gathers
all float32 images and picks its own. Ours moves the images that change rank, and the pixels of
uint8 images before they are normalised. The limit is the time in which the next rank gets as many
images as change rank on average, (W-1)/W of a local batch, with nothing else to sort out.
Bytes are what rank 0 receives of images, counted over the permutations that were measured.
"""

import argparse
import statistics
import tempfile
from functools import partial

import baseline
import torch

from moco import distributed, timing
from moco.config import Launch, Placement
from moco.launch import launch, visible_devices


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="time of the key shuffle")
    parser.add_argument("--ranks", type=int, default=2, help="processes; GPUs are used one each")
    parser.add_argument("--batch", type=int, default=32, help="images on each rank")
    parser.add_argument("--image-size", type=int, default=224)
    timing.add_arguments(parser, repeats=15)
    args = parser.parse_args(argv)
    if args.ranks < 2:
        parser.error(f"--ranks {args.ranks}: one process sends nothing; use at least 2")
    if args.device.startswith("cuda"):
        args.device = "cuda" if torch.cuda.device_count() >= args.ranks else "cpu"
    try:
        devices = visible_devices(args.device, None)
    except ValueError as error:
        parser.error(str(error))
    names = tuple(map(str, (devices * args.ranks)[: args.ranks]))
    placement = Placement(devices=names, processes=args.ranks, local_processes=args.ranks)
    with tempfile.TemporaryDirectory() as folder:
        args.result = f"{folder}/seen.pt"
        launch(measure, args, Launch(), placement)
        seen = torch.load(args.result, weights_only=True)

    table = timing.Table(
        f"key shuffle, {args.ranks} processes on {devices[0].type}, {args.batch} x 3 x "
        f"{args.image_size} x {args.image_size} images each"
    )
    for kind in ("float32", "uint8"):
        table.add(
            f"{kind} against float32",
            seen["times"]["baseline"],
            seen["times"][kind],
            floor=statistics.median(seen["times"][f"send {kind}"]),
            limited_by="sending what changes rank",
            received_bytes=seen["bytes"][kind],
            baseline_bytes=seen["bytes"]["baseline"],
        )
    local = args.batch * 3 * args.image_size**2
    for kind, received in seen["bytes"].items():
        # Every image of the others, or the share of them that is dealt to this rank.
        images = local * (args.ranks - 1) / (1 if kind == "baseline" else args.ranks)
        expected = images * (1 if kind == "uint8" else 4)
        print(
            f"received per rank and shuffle, {kind:<8}: {received / 1e6:6.2f} MB counted, "
            f"{expected / 1e6:6.2f} MB expected"
        )
    table.write(args.out)


def measure(device: torch.device, args: argparse.Namespace) -> None:
    """On each rank: all variants in turn; rank 0 writes what it saw."""
    torch.set_num_threads(max(1, torch.get_num_threads() // args.ranks))
    world, rank, n = distributed.world_size(), distributed.rank(), args.batch
    shape = (n, 3, args.image_size, args.image_size)
    generator = torch.Generator().manual_seed(rank)
    pixels = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8).to(device)
    images = {"float32": pixels.float(), "uint8": pixels}
    order = torch.Generator().manual_seed(0)  # alike on all ranks

    share = n * (world - 1) // world
    strangers = []  # rows that rank 0 got from others, per permutation

    def permutation() -> torch.Tensor:
        drawn = torch.randperm(world * n, generator=order)
        strangers.append(int((drawn[:n] >= n).sum()))
        return drawn

    def ours(kind: str) -> torch.Tensor:
        return distributed.exchange_rows(images[kind], permutation())

    def send(kind: str) -> torch.Tensor:
        order = torch.arange(world * share).roll(share)
        return distributed.exchange_rows(images[kind][:share], order)

    drawn = permutation()
    wanted = baseline.shuffle(images["float32"], drawn)
    for kind in images:
        if not torch.equal(distributed.exchange_rows(images[kind], drawn).float(), wanted):
            raise SystemExit(f"{kind} images come out in another order than the baseline's")

    variants = {"baseline": lambda: baseline.shuffle(images["float32"], permutation())}
    variants |= {kind: partial(ours, kind) for kind in images}
    variants |= {f"send {kind}": partial(send, kind) for kind in images}
    times = timing.interleaved(variants, repeats=args.repeats, device=device)
    if rank == 0:
        row = pixels[0].numel()
        got = row * sum(strangers) / len(strangers)
        received = {"baseline": 4 * row * n * (world - 1), "float32": 4 * got, "uint8": got}
        torch.save({"times": times, "bytes": received}, args.result)


if __name__ == "__main__":
    main()
