#!/usr/bin/env python
"""Time of a linear probe: from cached features, and of several learning rates in one pass.

    python scripts/benchmark/lincls.py [--data DIR] [--out FILE.json]

The baseline is the ancestors' way: one run for each learning rate, and in every epoch decoding, a
random crop as a normalised float image, and the frozen encoder in float32 and NCHW order.

Measured, in turn, are the parts: images to features, `--images` at a time, and training of the
classifiers, on batches of 256. Times per image are added up from them: a run of 100 epochs is 100
times (features + training), and from cached features it is features once + 100 times training.
Passes over the validation images are left out on both sides; so is decoding when the encoder runs
on a GPU, where loader processes do it. The limit is what the features alone cost: the same encoder
once in place of 100 times, or once in place of once for each learning rate.
"""

import argparse
import copy
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision.transforms as T
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from moco import timing
from moco.data import loader
from moco.data.images import FolderImages
from moco.data.views import IMAGENET_MEAN, IMAGENET_STD, eval_transform, lincls_recipe, normalize
from moco.encoders import build_encoder, feature_dim, set_head
from moco.evaluate import heads as probe
from moco.evaluate.feature_cache import without_batch_norm

BATCH, CLASSES = 256, 1000  # of training the classifiers
MANY = 8  # learning rates


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="time of a linear probe")
    parser.add_argument("-a", "--arch", default="resnet50")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--images", type=int, default=16, help="images to features at a time")
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--data", type=Path, help="folder of photographs (default: made up)")
    timing.add_arguments(parser, repeats=7)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        if args.data is None:
            timing.write_photographs(Path(folder) / "photographs", args.images)
        images = FolderImages(args.data or folder)
        parts = parts_to_time(args, images)
        table = timing.Table(
            f"linear probe, {args.arch}, {args.image_size} px, {CLASSES} classes; milliseconds per "
            f"image (of {args.epochs} epochs where said)",
            width=44,
        )
        times = timing.interleaved(parts, repeats=args.repeats, warmup=1, device=args.device)
    for name, seconds in times.items():
        count = args.images if name.startswith("features") else BATCH
        times[name] = [each / count for each in seconds]
    add_rows(table, times, args.epochs)
    medians = {name: 1e3 * statistics.median(each) for name, each in times.items()}
    print("parts, ms per image: " + "; ".join(f"{n} {ms:.3f}" for n, ms in medians.items()))
    table.write(args.out, parts_ms_per_image=medians)


def add_rows(table: timing.Table, times: dict[str, list[float]], epochs: int) -> None:
    """Whole runs, added up from the parts of each round."""

    def run(features: str, passes: int, training: str, rounds: int) -> list[float]:
        parts = zip(times[f"features {features}"], times[f"training {training}"], strict=True)
        return [passes * first + rounds * second for first, second in parts]

    one, runs = run("upstream", epochs, "upstream", epochs), run("upstream", MANY, "upstream", MANY)
    cached, sweep = run("cached", 1, "cached", epochs), run("standard", 1, "together", 1)
    both = run("cached", 1, "together", epochs)
    many, once = f"{MANY} learning rates", statistics.median(times["features cached"])
    of_all, passes = statistics.median(runs) / MANY, "one pass of the encoder"
    for what, base, own, floor, limited_by in (
        (f"cached features, {epochs} epochs", one, cached, once, passes),
        (f"{many}, one epoch, random crops", runs, sweep, of_all, "one run in place of all"),
        (f"{many}, cached, {epochs} epochs", [epochs * t for t in runs], both, once, passes),
    ):
        table.add(what, base, own, floor=floor, limited_by=limited_by)


def parts_to_time(
    args: argparse.Namespace, images: FolderImages
) -> dict[str, Callable[[], object]]:
    torch.manual_seed(0)
    device = torch.device(args.device)
    on_gpu = device.type == "cuda"
    encoder = build_encoder(args.arch, 1)
    width = feature_dim(encoder)
    set_head(encoder, nn.Identity())
    encoder.to(device).eval().requires_grad_(False)
    mean, std = IMAGENET_MEAN, IMAGENET_STD
    crop = [T.RandomResizedCrop(args.image_size), T.RandomHorizontalFlip()]
    upstream = T.Compose([*crop, T.ToTensor(), T.Normalize(mean, std)])
    standard = loader.AugmentedViews(images, lincls_recipe(args.image_size), seed=0, num_views=1)
    centre = eval_transform(args.image_size)
    indices = [i % len(images) for i in range(args.images)]

    def loaded(view: Callable[[int], Tensor]) -> Callable[[], Tensor]:
        def load() -> Tensor:
            return torch.stack([view(i) for i in indices])

        if on_gpu:
            pixels = load()
            return lambda: pixels.to(device)
        return load

    has_bf16 = on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
    amp = "bf16" if has_bf16 else "off"  # of ours
    baseline = copy.deepcopy(encoder)  # before the order of the weights is changed
    plain = probe.FrozenEncoder(encoder, amp=amp, channels_last=on_gpu)
    folded = without_batch_norm(copy.deepcopy(encoder))
    fast = probe.FrozenEncoder(folded, amp=amp, channels_last=True)
    upstream_batch = loaded(lambda i: upstream(images.load(i)))
    standard_batch = loaded(lambda i: standard[0, i][0])
    centre_batch = loaded(lambda i: centre(images.load(i)))

    @torch.no_grad()
    def features_upstream() -> Tensor:
        return baseline(upstream_batch())

    stored = torch.randn(4 * BATCH, width, device=device).relu().half()
    floats = stored[:BATCH].float()
    targets = torch.randint(0, CLASSES, (BATCH,), device=device)
    chosen = torch.randperm(len(stored), device=device)[:BATCH]
    classifier = nn.Linear(width, CLASSES).to(device)
    own = torch.optim.SGD(classifier.parameters(), 1e-3, momentum=0.9)

    def training_upstream() -> None:
        loss = F.cross_entropy(classifier(floats), targets)
        own.zero_grad()
        loss.backward()
        own.step()

    def training(count: int) -> Callable[[], None]:
        configs = [probe.HeadConfig(1e-3, 0.0) for _ in range(count)]
        heads = probe.new_heads(width, CLASSES, count).to(device)
        training = probe.HeadTraining(heads, configs, 0.9)

        def step() -> None:
            training.step(probe.head_losses(heads(stored[chosen].float()), targets))

        return step

    return {
        "features upstream": features_upstream,
        "features standard": lambda: plain(normalize(standard_batch(), mean, std)),
        "features cached": lambda: fast(normalize(centre_batch(), mean, std)).half(),
        "training upstream": training_upstream,
        "training cached": training(1),
        "training together": training(MANY),
    }


if __name__ == "__main__":
    main()
