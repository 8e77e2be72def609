#!/usr/bin/env python
"""Linear evaluation (and k-NN) of a frozen, pretrained encoder.

    python main_lincls.py --pretrained RUN/checkpoint_0199.pth.tar DIR
    python main_lincls.py --pretrained RUN/checkpoint_0199.pth.tar --knn --epochs 0 DIR    k-NN only
    python main_lincls.py -a resnet50 --lr 30.0 --batch-size 256 --pretrained FILE \\
        --multiprocessing-distributed --world-size 1 --rank 0 DIR
    python main_lincls.py -e --pretrained RUN/model_best.pth.tar DIR      a saved classifier, again

DIR has `train/CLASS/IMAGE` and `val/CLASS/IMAGE`. Architecture, stem, image size, mean and standard
deviation come from the checkpoint. The protocol is upstream MoCo's: SGD with lr 30 and no weight
decay, batch 256, 100 epochs, x0.1 at 60 and 80, random resized crop and flip, centre-crop
validation, batch norm in eval mode. Accuracies lie in RUN/lincls.json, best and last.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import math
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from moco import checkpoint, distributed, encoders, evaluate, guards, loader, options
from moco.images import Images, open_images
from moco.log import Means, RunLog, StepPrinter, progress, provenance, write_json
from moco.schedule import learning_rate
from moco.views import IMAGENET_MEAN, IMAGENET_STD, eval_transform, lincls_recipe, normalize

LATEST, RESULT = options.LINCLS_LATEST, options.LINCLS_RESULT
BEST = "model_best.pth.tar"

# What the accuracy of a probe depends on.
PROTOCOL = ("lr", "batch_size", "epochs", "schedule", "schedule_factor", "weight_decay", "momentum",
            "image_size", "seed")  # fmt: skip

# ------------------------------------------------------------------------------------------------
# Command line
# ------------------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    parser = options.Parser(description="linear evaluation of a frozen encoder", allow_abbrev=False)
    options.add_shared_options(parser, lr=30.0, weight_decay=0.0, epochs=100, schedule=[60, 80])
    # fmt: off
    probe = parser.add_argument_group("what is evaluated, and how")
    probe.add_argument("--pretrained", type=options.non_empty, metavar="CHECKPOINT",
                       help="ours, upstream MoCo's, or a torchvision state dict")
    probe.add_argument("-e", "--evaluate", action="store_true",
                       help="only evaluate the linear classifier that the checkpoint holds")
    probe.add_argument("--image-size", type=int, metavar="PX",
                       help="default: the checkpoint's, else 224")
    probe.add_argument("--mean", type=float, nargs=3, metavar=("R", "G", "B"),
                       help="default: the checkpoint's, else ImageNet's")
    probe.add_argument("--std", type=float, nargs=3, metavar=("R", "G", "B"))
    probe.add_argument("--knn", action="store_true",
                       help="also report weighted k-NN (--epochs 0: report nothing else)")
    probe.add_argument("--knn-k", type=int, default=200, metavar="K",
                       help="neighbours, at most the training set (%(default)s)")
    probe.add_argument("--knn-t", type=float, default=0.07, metavar="T",
                       help="temperature of their votes (%(default)s)")
    probe.add_argument("--knn-layer", choices=("backbone", "projection"), default="backbone",
                       help="features that are compared (%(default)s)")
    # fmt: on
    return parser


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse and check: all that can be known now is refused now, with exit status 2."""
    parser = build_parser()
    args = parser.parse_args(argv)
    options.check_shared_options(parser, args)
    options.check_run_folder(parser, args, pretraining=False)
    if args.resume == "auto":
        latest = args.save_dir / LATEST
        args.resume = str(latest) if latest.is_file() else None
    source = args.pretrained or args.resume
    if source is None:
        parser.error("give the encoder to evaluate: --pretrained CHECKPOINT")
    for flag in ("resume", "pretrained"):
        path = getattr(args, flag)
        if path and not Path(path).is_file():
            parser.error(f"--{flag}: no such checkpoint: {path}")
    if args.epochs == 0 and not (args.knn or args.evaluate):
        parser.error("--epochs 0 leaves nothing to do without --knn or -e")
    if args.knn_k < 1 or not 0 < args.knn_t < math.inf:
        parser.error(f"--knn-k must be >= 1 and --knn-t positive, got {args.knn_k}, {args.knn_t:g}")
    if args.image_size is not None and args.image_size < 1:
        parser.error(f"--image-size must be at least 1, got {args.image_size}")
    try:
        options.check_image_statistics(args.mean or (), args.std or ())
    except ValueError as error:
        parser.error(str(error))
    trains = args.epochs > 0 and not args.evaluate
    options.check_data_folder(parser, args, {"train": args.batch_size if trains else 1, "val": 1})
    if args.save_dir is None:
        stem = Path(source).name.removesuffix(".tar").removesuffix(".pth")
        name = f"lincls-{Path(source).resolve().parent.name}-{stem}"
        args.save_dir = Path("results") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}-s{args.seed}"
    return args


# ------------------------------------------------------------------------------------------------
# Evaluation
# ------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> None:
    options.run_worker(work, parse_args(argv))


def work(device: torch.device, args: argparse.Namespace) -> None:
    """The whole evaluation in this process, one of `args.processes`."""
    with options.one_line_errors(), contextlib.ExitStack() as at_exit:
        _work(device, args, at_exit)


def _work(device: torch.device, args: argparse.Namespace, at_exit: contextlib.ExitStack) -> None:
    args.seed, args.save_dir = distributed.broadcast_object((args.seed, args.save_dir))

    # Encoder: its checkpoint says how images are to be presented
    source = args.pretrained or args.resume
    encoder, info = checkpoint.load_encoder(source)
    before = resumed(args, encoder) if args.resume else {}
    if not args.seed_given:
        args.seed = before.get("args", {}).get("seed", args.seed)
    torch.manual_seed(args.seed)
    if args.arch is not None and args.arch != info["arch"]:
        raise checkpoint.CheckpointError(f"{source} is of arch {info['arch']}, got -a {args.arch}")
    trained = info["args"]
    args.arch = info["arch"]
    args.image_size = args.image_size or trained.get("image_size", 224)
    args.mean = args.mean or trained.get("mean", IMAGENET_MEAN)
    args.std = args.std or trained.get("std", IMAGENET_STD)
    try:
        encoders.check_image_size(encoder, args.image_size)
    except ValueError as error:
        raise checkpoint.CheckpointError(f"{source}: {error}; give --image-size") from None
    encoder.to(device).requires_grad_(False)

    # Data
    train_images, val_images, classes = open_splits(args)
    eval_loader = functools.partial(
        loader.eval_loader,
        batch_size=args.batch_size // args.processes,
        workers=args.workers,
        pin_memory=device.type == "cuda",
    )
    plain = eval_transform(args.image_size)
    val = eval_loader(loader.PlainImages(val_images, plain), persistent=True)

    # Run folder
    result = {
        "checkpoint": str(source), "arch": info["arch"], "pretrained_epochs": info["epoch"],
        "objective": info["objective"], "classes": len(classes),
        "train_images": len(train_images), "val_images": len(val_images),
    }  # fmt: skip
    if distributed.is_main():
        args.save_dir.mkdir(parents=True, exist_ok=True)
        facts = {**options.plain_values(args), "provenance": provenance()}
        write_json(args.save_dir / "args.json", facts)
    distributed.barrier()
    print_start(args, info, device, result)
    if before:
        refuse_changes(before, args)
    log = RunLog(args.save_dir, first_step=before.get("args", {}).get("steps_done", 0))

    if args.knn:
        bank = eval_loader(loader.PlainImages(train_images, plain))
        result["knn"] = run_knn(args, source, encoder, bank, val, len(classes), device)
        log.scalars("knn", 0, {name: result["knn"][name] for name in ("top1", "top5")})
    if args.evaluate:
        classifier = load_classifier(source, len(classes)).to(device)
        top1, top5, loss = validate(encoder, classifier, val, args, device)
        result.update(top1=top1, top5=top5)
        distributed.print_main(f" * Acc@1 {top1:.3f} Acc@5 {top5:.3f} loss {loss:.4f}")
    elif args.epochs:
        result.update(
            train_probe(
                args, encoder, info, before, train_images, val, len(classes), log, device, at_exit
            )
        )
    log.close()
    if distributed.is_main():
        write_json(args.save_dir / RESULT, result)
        print(f"done: {args.save_dir / RESULT}")


def open_splits(
    args: argparse.Namespace,
) -> tuple[Images, Images, list[str]]:
    """Training and validation images with one numbering of the classes."""
    per_class = args.images_per_class
    train = open_images(args.dataset, args.data, "train", per_class=per_class)
    val = open_images(args.dataset, args.data, "val", per_class=per_class, classes=train.classes)
    return train, val, train.classes


def run_knn(
    args: argparse.Namespace,
    source: str,
    backbone: nn.Module,
    bank: DataLoader,
    val: DataLoader,
    classes: int,
    device: torch.device,
) -> dict:
    """Weighted k-NN from the backbone's features or from the projection head's output."""
    encoder = backbone
    if args.knn_layer == "projection":
        encoder = checkpoint.load_encoder(source, head="projection")[0].to(device)
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


def train_probe(
    args: argparse.Namespace,
    encoder: nn.Module,
    info: dict,
    resumed: dict,
    images: Images,
    val: DataLoader,
    classes: int,
    log: RunLog,
    device: torch.device,
    at_exit: contextlib.ExitStack,
) -> dict:
    """Train a linear classifier on the frozen encoder, from `resumed` on if that is not empty;
    returns best and last accuracy."""
    batches = loader.EpochBatches(len(images), args.batch_size, seed=args.seed)
    views = loader.AugmentedViews(images, lincls_recipe(args.image_size), seed=args.seed, views=1)
    train = loader.TrainLoader(views, batches, workers=args.workers, device=device)
    at_exit.callback(train.end)
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}

    classifier = nn.Linear(info["feature_dim"], classes).to(device)
    nn.init.normal_(classifier.weight, std=0.01)
    nn.init.zeros_(classifier.bias)
    optimizer = torch.optim.SGD(
        classifier.parameters(), args.lr, momentum=args.momentum, weight_decay=args.weight_decay
    )
    first_epoch, best, last = args.start_epoch, {"top1": -1.0}, {}
    if resumed:
        classifier.load_state_dict(load_classifier(args.resume, classes).state_dict())
        optimizer.load_state_dict(resumed["optimizer"])
        first_epoch, best, last = resumed["epoch"], resumed["best"], resumed["last"]
        if first_epoch > args.epochs:
            raise checkpoint.CheckpointError(
                f"{args.resume} has {first_epoch} epochs done, more than --epochs {args.epochs}"
            )
        distributed.print_main(f"resuming {args.resume} after epoch {first_epoch - 1}")
    model = distributed.data_parallel(classifier, device)

    steps = len(batches)
    printer = StepPrinter(
        total=args.epochs * steps, batch_size=args.batch_size, done=first_epoch * steps
    )
    means = Means()
    for epoch in range(first_epoch, args.epochs):
        lr = learning_rate(
            epoch,
            base=args.lr,
            epochs=args.epochs,
            milestones=args.schedule,
            factor=args.schedule_factor,
        )
        for group in optimizer.param_groups:
            group["lr"] = lr
        batches.set_epoch(epoch)
        for step, (view, target, _) in enumerate(printer.batches(train), start=1):
            # The encoder stays in eval mode: its batch norm uses, and keeps, the running averages.
            with torch.no_grad():
                features = encoder(normalize(view, args.mean, args.std))
            loss = F.cross_entropy(model(features), target.to(device, non_blocking=True))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            printer.advance()
            means.add("loss", loss)
            if step % args.print_freq == 0 or step == steps:
                values = {**means.take(), "lr": lr, **printer.rates()}
                stop_if_not_finite(values["loss"], epoch, step, args, device)
                log.scalars("lincls", epoch * steps + step, {"epoch": epoch, **values})
                text = f"epoch [{epoch}/{args.epochs}] step [{step}/{steps}]  "
                text += f"loss {values['loss']:.4f}  lr {lr:g}"
                printer.line(f"{text}  {values['images_per_s']:.0f} images/s", short=text)
        top1, top5, val_loss = validate(encoder, classifier, val, args, device)
        last = {"top1": top1, "top5": top5, "epoch": epoch}
        log.scalars("val", (epoch + 1) * steps, {**last, "loss": val_loss})
        printer.line(f" * Acc@1 {top1:.3f} Acc@5 {top5:.3f} (epoch {epoch})", f"top-1 {top1:.2f}")
        if top1 > best["top1"]:
            best = last
        if distributed.is_main():
            steps_done = (epoch + 1) * steps
            save(args, encoder, classifier, optimizer, info, epoch, steps_done, best, last)
    printer.close()

    changed = [name for name, t in encoder.state_dict().items() if not torch.equal(t, before[name])]
    if changed:
        raise guards.TrainingError(f"the frozen encoder has changed: {', '.join(changed[:5])}")
    distributed.print_main(
        f"best top-1 {best['top1']:.2f} (epoch {best['epoch']}), last {last['top1']:.2f}; "
        f"all {len(before)} tensors of the encoder are unchanged"
    )
    return {"best": best, "last": last, "protocol": {n: getattr(args, n) for n in PROTOCOL}}


def stop_if_not_finite(
    loss: float, epoch: int, step: int, args: argparse.Namespace, device: torch.device
) -> None:
    """Stop all ranks together when the mean training loss of any is NaN or infinite."""
    if distributed.any_rank(not math.isfinite(loss), device=device)[0]:
        raise guards.TrainingError(
            f"the loss is not finite in epoch {epoch}, step {step} (on rank "
            f"{distributed.rank()}: {loss:g}); lower --lr {args.lr:g}, and see that --mean and "
            "--std are those of pretraining"
        )


@torch.no_grad()
def validate(
    encoder: nn.Module,
    classifier: nn.Linear,
    val: DataLoader,
    args: argparse.Namespace,
    device: torch.device,
) -> tuple[float, float, float]:
    """Top-1, top-min(5, classes) in percent, mean loss; over ranks each image counts once."""
    topk = (1, min(5, classifier.out_features))
    sums = torch.zeros(4, dtype=torch.float64, device=device)  # top-1, top-5, loss, images
    for images, target in val:
        target = target.to(device, non_blocking=True)
        images = normalize(images.to(device, non_blocking=True), args.mean, args.std)
        logits = classifier(encoder(images))
        ranked = logits.topk(topk[1], dim=1).indices
        sums[:2] += evaluate.count_correct(ranked, target, topk)
        sums[2] += F.cross_entropy(logits, target, reduction="sum")
        sums[3] += len(target)
    top1, top5, loss, count = distributed.sum_over_ranks(sums).tolist()
    return 100 * top1 / count, 100 * top5 / count, loss / count


def print_start(args: argparse.Namespace, info: dict, device: torch.device, result: dict) -> None:
    """What was found in the checkpoint and what will be done."""
    say = distributed.print_main
    say(f"   encoder: {info['arch']}{', small stem' if info['small_stem'] else ''}, "
        f"{info['feature_dim']} features; all {info['matched']} tensors matched, "
        f"{len(info['ignored'])} of the file have no place in the backbone")  # fmt: skip
    say(f"   trained: {info['objective'] or 'unknown objective'}, epoch {info['epoch']}")
    say(f"      data: {result['train_images']} training and {result['val_images']} validation "
        f"images, {result['classes']} classes, {args.image_size} px")  # fmt: skip
    say(f"    device: {device}, {args.processes} process(es), seed {args.seed}")
    say(f"run folder: {args.save_dir}")
    scaled = 30.0 * args.batch_size / 256
    if args.epochs and not args.evaluate and abs(args.lr - scaled) > 1e-6 * scaled:
        say(f"warning: lr {args.lr:g} with batch {args.batch_size} is not the published pair "
            f"(30 with 256); scaled to this batch it would be --lr {scaled:g}")  # fmt: skip


# ------------------------------------------------------------------------------------------------
# Save and load
# ------------------------------------------------------------------------------------------------


def save(
    args: argparse.Namespace,
    encoder: nn.Module,
    classifier: nn.Linear,
    optimizer: torch.optim.Optimizer,
    info: dict,
    epoch: int,
    steps_done: int,
    best: dict,
    last: dict,
) -> None:
    """Write the whole network, encoder and classifier, under torchvision's names."""
    head = encoders.head_name(encoder)
    state = {**encoder.state_dict()}
    state.update({f"{head}.{name}": tensor for name, tensor in classifier.state_dict().items()})
    kept = {name: info["args"][name] for name in ("objective",) if name in info["args"]}
    content = {
        "version": checkpoint.FORMAT_VERSION,
        "arch": info["arch"],
        "epoch": epoch + 1,
        "best": best,
        "last": last,
        "best_acc1": best["top1"],  # upstream's name
        "pretrained_epochs": info["epoch"],
        "state_dict": {f"module.{name}": tensor for name, tensor in state.items()},
        "optimizer": optimizer.state_dict(),
        "args": {**options.plain_values(args), **kept, "steps_done": steps_done},
    }
    checkpoint.write_checkpoint(args.save_dir / LATEST, content)
    if best is last:
        checkpoint.write_checkpoint(args.save_dir / BEST, content)


def load_classifier(path: str, classes: int) -> nn.Linear:
    """The linear classifier of a saved network."""
    network, _ = checkpoint.load_encoder(path, head="linear")
    classifier = encoders.get_head(network)
    if classifier.out_features != classes:
        raise checkpoint.CheckpointError(
            f"{path} classifies {classifier.out_features} classes, the data has {classes}; use the "
            "data that it was trained for, or train a new classifier with --pretrained"
        )
    return classifier


def resumed(args: argparse.Namespace, encoder: nn.Module) -> dict:
    """The probe's checkpoint to go on from, which must be of this very encoder."""
    content = checkpoint.read_checkpoint(args.resume)
    for key in ("epoch", "optimizer"):
        if key not in content:
            raise checkpoint.CheckpointError(
                f"{args.resume} has no {key!r}, so it is no checkpoint of main_lincls.py; give it "
                "as --pretrained"
            )
    other, _ = checkpoint.load_encoder(args.resume)
    mine, its = encoder.state_dict(), other.state_dict()
    if mine.keys() != its.keys() or not all(torch.equal(mine[name], its[name]) for name in mine):
        raise checkpoint.CheckpointError(
            f"{args.resume} is a probe of another encoder than --pretrained {args.pretrained}; "
            "choose another --save-dir"
        )
    unknown = {"top1": float(content.get("best_acc1", -1.0)), "epoch": None}  # upstream's files
    return {"args": {}, "best": unknown, "last": unknown, **content}


def refuse_changes(before: dict, args: argparse.Namespace) -> None:
    """A probe that goes on under other arguments would be no known protocol."""
    now = options.plain_values(args)
    changes = [
        f"{name}: {before['args'][name]!r} before, {now[name]!r} now"
        for name in (*PROTOCOL, "images_per_class")
        if name != "epochs"  # more of them go on as the whole would have
        and name in before["args"]
        and before["args"][name] != now[name]
    ]
    if changes:
        raise checkpoint.CheckpointError(
            f"{args.resume} was trained with other arguments ({'; '.join(changes)}); use those, or "
            "another --save-dir"
        )


if __name__ == "__main__":
    main()
