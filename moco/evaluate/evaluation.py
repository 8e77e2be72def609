"""Linear evaluation, k-NN and fine-tuning of a pretrained encoder, as one call."""

from __future__ import annotations

import argparse
import functools

import torch
from torch.utils.data import DataLoader

from moco import checkpoint, distributed, encoders
from moco.config import LinclsConfig
from moco.data import loader
from moco.data import subsets as labels
from moco.data.images import Images, Subset, open_images
from moco.data.views import IMAGENET_MEAN, IMAGENET_STD, eval_transform
from moco.errors import CheckpointError, DataError, report_user_errors
from moco.evaluate import heads as probe
from moco.evaluate import knn as evaluate
from moco.evaluate.classifier_io import load_classifier, plain_values, refuse_changes, resumed
from moco.evaluate.feed import cached_feed, image_feed, with_features
from moco.evaluate.heads import Frozen, Heads
from moco.evaluate.loop import Probe, as_list, listed
from moco.evaluate.protocol import train_and_choose
from moco.log import RunLog, progress, provenance
from moco.run_files import LINCLS_RESULT, write_json


def work(device: torch.device, config: LinclsConfig) -> None:
    """The whole evaluation in this process, one of `processes`."""
    args = argparse.Namespace(**config.to_flat())
    args.save_dir, args.cache_dir = config.saving.save_dir, config.protocol.cache_dir
    with report_user_errors():
        _work(device, args)


def _work(device: torch.device, args: argparse.Namespace) -> None:
    args.seed, args.save_dir = distributed.broadcast_object((args.seed, args.save_dir))

    # Encoder: its checkpoint says how images are to be presented
    source = args.pretrained or args.resume
    encoder, info = checkpoint.load_encoder(source)
    before = resumed(args, encoder) if args.resume else {}
    if not args.seed_given:
        args.seed = before.get("args", {}).get("seed", args.seed)
    torch.manual_seed(args.seed)
    if args.arch is not None and args.arch != info["arch"]:
        raise CheckpointError(f"{source} is of arch {info['arch']}, got -a {args.arch}")
    trained = info["args"]
    args.arch = info["arch"]
    args.image_size = args.image_size or trained.get("image_size", 224)
    args.mean = args.mean or trained.get("mean", IMAGENET_MEAN)
    args.std = args.std or trained.get("std", IMAGENET_STD)
    args.amp = args.amp or probe.default_amp(device)
    try:
        encoders.check_image_size(encoder, args.image_size)
    except ValueError as error:
        raise CheckpointError(f"{source}: {error}; give --image-size") from None
    encoder.to(device).requires_grad_(args.finetune)
    # On a CPU the order stays as it always was, and with it every bit of the standard protocol.
    frozen = Frozen(encoder, amp=args.amp, channels_last=device.type == "cuda")

    # Data
    train_images, val_images, classes = open_splits(args)
    saved = load_classifier(source, len(classes)) if args.evaluate else None
    plain = eval_transform(args.image_size)
    eval_loader = functools.partial(
        loader.eval_loader,
        batch_size=args.batch_size // args.processes,
        workers=args.workers,
        pin_memory=device.type == "cuda",
    )
    val = eval_loader(loader.PlainImages(val_images, plain), persistent=True)

    # Run folder
    result = {
        "checkpoint": str(source), "arch": info["arch"], "pretrained_epochs": info["epoch"],
        "objective": info["objective"], "classes": len(classes),
        "train_images": len(train_images), "val_images": len(val_images),
    }  # fmt: skip
    if args.labels is not None:
        result["labels"] = {"of": args.labels, "digest": args.labels_digest}
    if distributed.is_main():
        args.save_dir.mkdir(parents=True, exist_ok=True)
        facts = {**plain_values(args), "provenance": provenance()}
        write_json(args.save_dir / "args.json", facts)
    distributed.barrier()
    print_start(args, info, device, result)
    if before:
        refuse_changes(before, args)
    log = RunLog(args.save_dir, first_step=before.get("args", {}).get("steps_done", 0))

    if args.knn:
        bank = eval_loader(loader.PlainImages(train_images, plain))
        result["knn"] = run_knn(args, source, frozen, bank, val, len(classes), device)
        log.scalars("knn", 0, {name: result["knn"][name] for name in ("top1", "top5")})
    if args.evaluate:
        heads = Heads([saved.to(device)])
        found = probe.head_accuracy(heads, with_features(val, frozen, args, device), device)[0]
        result.update(top1=found["top1"], top5=found["top5"])
        distributed.print_main(
            f" * Acc@1 {found['top1']:.3f} Acc@5 {found['top5']:.3f} loss {found['loss']:.4f}"
        )
    elif args.epochs:
        if args.cached:
            feed = cached_feed(args, frozen, info["feature_dim"], train_images, val_images, device)
        else:
            feed = functools.partial(
                image_feed, args, frozen, train_images, val, eval_loader, device
            )
        run = Probe(args, device, frozen, info, len(classes), log, feed)
        result.update(train_and_choose(run, train_images.targets, before))
    log.close()
    if distributed.is_main():
        write_json(args.save_dir / LINCLS_RESULT, result)
        print(f"done: {args.save_dir / LINCLS_RESULT}")


def open_splits(
    args: argparse.Namespace,
) -> tuple[Images, Images, list[str]]:
    """Training and validation images with one numbering of the classes; of the training images
    those whose labels are used, with the digest of their names in `args.labels_digest`."""
    per_class = args.images_per_class
    train = open_images(args.dataset, args.data, "train", per_class=per_class)
    val = open_images(args.dataset, args.data, "val", per_class=per_class, classes=train.classes)
    args.labels_digest = None
    if args.labels is not None:
        if isinstance(args.labels, str):
            chosen = labels.listed_labels(train, args.labels)
        else:
            chosen = labels.percent_of_labels(train, args.labels, args.labels_seed)
        train = Subset(train, chosen)
        args.labels_digest = labels.subset_digest(train)
        if len(train) < args.batch_size and args.epochs and not args.evaluate:
            raise DataError(
                f"--labels leaves {len(train)} images to train on, fewer than one batch of "
                f"{args.batch_size}; lower --batch-size"
            )
    return train, val, train.classes


def run_knn(
    args: argparse.Namespace,
    source: str,
    backbone: Frozen,
    bank: DataLoader,
    val: DataLoader,
    classes: int,
    device: torch.device,
) -> dict:
    """Weighted k-NN from the backbone's features or from the projection head's output."""
    encoder = backbone
    if args.knn_layer == "projection":
        whole = checkpoint.load_encoder(source, head="projection")[0].to(device)
        encoder = Frozen(whole, amp=args.amp, channels_last=device.type == "cuda")
    found = evaluate.knn_accuracy(
        encoder,
        bank,
        val,
        classes=classes,
        device=device,
        mean=args.mean,
        std=args.std,
        k=args.knn_k,
        temperature=args.knn_t,
        progress=functools.partial(progress, description="k-NN features"),
    )
    distributed.print_main(
        f"k-NN top-1 {found['top1']:.2f}, top-{min(5, classes)} {found['top5']:.2f} "
        f"(k {found['k']}, temperature {args.knn_t:g}, {args.knn_layer}, {found['images']} images)"
    )
    return {**found, "temperature": args.knn_t, "layer": args.knn_layer}


def print_start(args: argparse.Namespace, info: dict, device: torch.device, result: dict) -> None:
    """What was found in the checkpoint and what will be done."""
    say = distributed.print_main
    say(f"   encoder: {info['arch']}{', small stem' if info['small_stem'] else ''}, "
        f"{info['feature_dim']} features; all {info['matched']} tensors matched, "
        f"{len(info['ignored'])} of the file have no place in the backbone")  # fmt: skip
    say(f"   trained: {info['objective'] or 'unknown objective'}, epoch {info['epoch']}")
    say(f"      data: {result['train_images']} training and {result['val_images']} validation "
        f"images, {result['classes']} classes, {args.image_size} px")  # fmt: skip
    if args.labels is not None:
        of = f"{args.labels:g} %" if not isinstance(args.labels, str) else args.labels
        say(f"    labels: {of}: {result['train_images']} images, digest {args.labels_digest}"
            + ("; the bank of k-NN is these" if args.knn else ""))  # fmt: skip
    if args.epochs and not args.evaluate:
        say(f"  protocol: {protocol_line(args)}")
    say(f"    device: {device}, {args.processes} process(es), seed {args.seed}, amp {args.amp}")
    say(f"run folder: {args.save_dir}")
    scaled = 30.0 * args.batch_size / 256
    plain = not (args.finetune or args.folds or listed(args.lr))
    trains = args.epochs and not args.evaluate
    if trains and plain and abs(args.lr - scaled) > 1e-6 * scaled:
        say(f"warning: lr {args.lr:g} with batch {args.batch_size} is not the published pair "
            f"(30 with 256); scaled to this batch it would be --lr {scaled:g}")  # fmt: skip


def protocol_line(args: argparse.Namespace) -> str:
    rates = ", ".join(f"{lr:g}" for lr in as_list(args.lr))
    decays = ", ".join(f"{decay:g}" for decay in as_list(args.weight_decay))
    schedule = f"x{args.schedule_factor:g} at {' '.join(map(str, args.schedule)) or 'no epoch'}"
    if args.finetune:
        what = f"fine-tuning, backbone lr {args.lr_backbone:g}, classifier lr {rates}"
    elif args.cached:
        views = f"{args.cached_views} random views" if args.cached_views else "centre crops"
        what = f"linear on cached features of {views} (not the standard protocol), lr {rates}"
    else:
        what = f"linear, standard (random crops in every epoch), lr {rates}"
    folds = f"; chosen by {args.folds} folds of the training set" if args.folds else ""
    return f"{what}, wd {decays}, batch {args.batch_size}, {args.epochs} epochs, {schedule}{folds}"
