#!/usr/bin/env python
"""Linear evaluation, k-NN and fine-tuning of a pretrained encoder.

    python main_lincls.py --pretrained RUN/checkpoint_0199.pth.tar DIR
    python main_lincls.py --pretrained RUN/checkpoint_0199.pth.tar --knn --epochs 0 DIR    k-NN only
    python main_lincls.py -a resnet50 --lr 30.0 --batch-size 256 --pretrained FILE \\
        --multiprocessing-distributed --world-size 1 --rank 0 DIR
    python main_lincls.py -e --pretrained RUN/model_best.pth.tar DIR      a saved classifier, again
    python main_lincls.py --lr 1,3,10,30 --folds 3 --pretrained FILE DIR     chosen without val/
    python main_lincls.py --cached --lr 1,3,10,30 --wd 0,1e-4 --pretrained FILE DIR
    python main_lincls.py --finetune --labels 1 --pretrained FILE DIR     whole network, 1 % labels

DIR has `train/CLASS/IMAGE` and `val/CLASS/IMAGE`. Architecture, stem, image size, mean and standard
deviation come from the checkpoint. The standard protocol is upstream MoCo's: SGD with lr 30 and no
weight decay, batch 256, 100 epochs, x0.1 at 60 and 80, random resized crop and flip, centre-crop
validation, batch norm in eval mode. Accuracies lie in RUN/lincls.json, best and last.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import nn
from torch.utils.data import DataLoader

from moco import checkpoint, cli, distributed, encoders
from moco.config import LinclsConfig, plain
from moco.data import loader
from moco.data import subsets as labels
from moco.data.images import Images, Subset, open_images
from moco.data.views import IMAGENET_MEAN, IMAGENET_STD, eval_transform
from moco.errors import CheckpointError, DataError, TrainingError, report_user_errors
from moco.evaluate import heads as probe
from moco.evaluate import knn as evaluate
from moco.evaluate.feed import Feed, cached_feed, image_feed, with_features
from moco.evaluate.heads import Frozen, Heads, Setting
from moco.launch import launch_config
from moco.log import RunLog, provenance
from moco.progress import StepPrinter, progress
from moco.run_files import LINCLS_BEST, LINCLS_LATEST, LINCLS_RESULT, write_json
from moco.schedule import learning_rate

# What the accuracy of a probe depends on; further down what it depends on beside these, and the
# value that stands for an argument that a file does not have.
PROTOCOL = ("lr", "batch_size", "epochs", "schedule", "schedule_factor", "weight_decay", "momentum",
            "image_size", "seed")  # fmt: skip
VARIANTS = {"finetune": False, "lr_backbone": None, "cached": False, "cached_views": 0,
            "folds": None, "labels_digest": None, "images_per_class": None}  # fmt: skip


def listed(value: float | list[float]) -> bool:
    return isinstance(value, list)


# ------------------------------------------------------------------------------------------------
# Evaluation
# ------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> None:
    launch_config(work, cli.lincls_config(argv))


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


# ------------------------------------------------------------------------------------------------
# Training
# ------------------------------------------------------------------------------------------------


@dataclass
class Probe:
    """What the stages of one evaluation, folds and the last one, have in common."""

    args: argparse.Namespace
    device: torch.device
    frozen: Frozen
    info: dict
    classes: int
    log: RunLog
    feed: Callable[..., Feed]
    steps_before: int = 0  # of the stages before this one


def train_and_choose(run: Probe, targets: list[int], before: dict) -> dict:
    """Train classifiers on the encoder, from `before` on if that is not empty; for lincls.json."""
    args, encoder = run.args, run.frozen.encoder
    originally = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    run.info["digest"] = before.get("pretrained_digest") or encoder_digest(encoder)
    settings = [
        Setting(lr, decay) for lr in as_list(args.lr) for decay in as_list(args.weight_decay)
    ]
    several = len(settings) > 1
    result: dict = {"evaluation": "cached" if args.cached else "standard"}
    if args.finetune:
        result["evaluation"] = "finetune"
    if args.folds:
        result["folds"] = cross_validate(run, settings, targets, before)
        chosen = result["folds"]["chosen"]
        settings = [Setting(chosen["lr"], chosen["weight_decay"])]
        if before.get("fold") is not None:
            before = {}  # that was of a fold
        before = {**before, "folds": [list(row) for row in zip(
            *(one["top1"] for one in result["folds"]["settings"]), strict=True)]}  # fmt: skip
    train_stage(run, settings, before)

    if not args.finetune:
        now = encoder.state_dict()
        changed = [
            name for name, tensor in originally.items() if not torch.equal(tensor, now[name])
        ]
        if changed:
            raise TrainingError(f"the frozen encoder has changed: {', '.join(changed[:5])}")
    fate = "fine-tuned" if args.finetune else "unchanged"
    fate = f"all {len(originally)} tensors of the encoder are {fate}"
    protocol = {name: getattr(args, name) for name in PROTOCOL}
    protocol |= {n: getattr(args, n) for n, usual in VARIANTS.items() if getattr(args, n) != usual}
    best, last = probe.leading(settings, "best"), probe.leading(settings, "last")
    result.update(best=best.best, last=last.last, protocol=protocol)
    say = distributed.print_main
    if args.folds:
        say(f"validation top-1 {last.last['top1']:.2f} with {last}, evaluated once; {fate}")
    elif not several:
        say(f"best top-1 {best.best['top1']:.2f} (epoch {best.best['epoch']}), "
            f"last {last.last['top1']:.2f}; {fate}")  # fmt: skip
    else:
        for name, one in (("best", best), ("last", last)):
            result[name] = {**result[name], "lr": one.lr, "weight_decay": one.weight_decay}
        result["heads"] = [asdict(one) for one in settings]
        for one in settings:
            fell = f"diverged in epoch {one.diverged}" if one.diverged is not None else ""
            say(f"{str(one):>20}  " + (fell or f"best top-1 {one.best['top1']:6.2f} (epoch "
                f"{one.best['epoch']}), last {one.last['top1']:6.2f}"))  # fmt: skip
        say(f"best top-1 {best.best['top1']:.2f} with {best}, last {last.last['top1']:.2f} with "
            f"{last}: chosen on validation, which flatters (--folds does not)")  # fmt: skip
        say(fate)
    return result


def as_list(value: float | list[float]) -> list[float]:
    return value if listed(value) else [value]


def cross_validate(
    run: Probe, settings: Sequence[Setting], targets: list[int], before: dict
) -> dict:
    """Accuracy of each setting on each fold of the training set that it was not trained on.

    Returns:
        {"count", "settings": for each its lr, weight_decay, top1 of each fold, mean and standard
        deviation (None for all where it has diverged), "chosen": that of highest mean}.
    """
    args, say = run.args, distributed.print_main
    parts = labels.stratified_folds(targets, args.folds, args.seed)
    table: list[list[float | None]] = [list(row) for row in before.get("folds", [])]
    for number, held_out in enumerate(parts):
        outside = set(held_out)
        rest = [index for index in range(len(targets)) if index not in outside]
        if number >= len(table):
            here = [Setting(one.lr, one.weight_decay) for one in settings]
            going_on = before if before.get("fold") == number else {}
            going_on = {**going_on, "folds": table}
            train_stage(run, here, going_on, number, (rest, held_out))
            table.append([one.last.get("top1") for one in here])
            values = {str(s): top1 for s, top1 in zip(settings, table[-1], strict=True)}
            accuracies = ", ".join(f"{v:.2f} ({s})" for s, v in values.items() if v is not None)
            say(f"fold {number + 1} of {args.folds}, {len(held_out)} images held out: {accuracies}")
        else:
            run.steps_before += args.epochs * (len(rest) // args.batch_size)
    summary = []
    for one, column in zip(settings, zip(*table, strict=True), strict=True):
        whole = None not in column
        summary.append({
            "lr": one.lr, "weight_decay": one.weight_decay, "top1": list(column),
            "mean": statistics.fmean(column) if whole else None,
            "std": statistics.stdev(column) if whole else None,
        })  # fmt: skip
    usable = [row for row in summary if row["mean"] is not None]
    if not usable:
        raise TrainingError("each setting has diverged in some fold; give a lower --lr")
    chosen = max(usable, key=lambda row: row["mean"])
    for row in summary:
        mean = "diverged" if row["mean"] is None else f"{row['mean']:.2f} +- {row['std']:.2f}"
        say(f"{Setting(row['lr'], row['weight_decay'])!s:>20}  held-out top-1 {mean}"
            + ("  <- chosen" if row is chosen else ""))  # fmt: skip
    return {
        "count": args.folds,
        "settings": summary,
        "chosen": {name: chosen[name] for name in ("lr", "weight_decay")},
    }


def train_stage(
    run: Probe,
    settings: list[Setting],
    before: dict,
    number: int | None = None,
    fold: tuple[list[int], list[int]] | None = None,
) -> None:
    """Train one classifier for each setting, together, and note in it what it has reached.

    `before`: a checkpoint of this stage to go on from, if it has "epoch". `number`: of the fold;
    None is the last stage, on all images. With --folds only the last epoch is evaluated.
    """
    with contextlib.ExitStack() as at_end:
        _train_stage(run, run.feed(at_end, fold), settings, before, number)


def _train_stage(
    run: Probe, feed: Feed, settings: list[Setting], before: dict, number: int | None
) -> None:
    args, device, encoder = run.args, run.device, run.frozen.encoder
    torch.manual_seed(args.seed)
    heads = probe.new_heads(run.info["feature_dim"], run.classes, len(settings)).to(device)
    optimizer = probe.sgd(heads, settings, args.momentum)
    base_rates = [one.lr for one in settings]
    if args.finetune:
        optimizer.add_param_group(
            {"params": encoder.parameters(), "weight_decay": args.weight_decay}
        )
        base_rates.append(args.lr_backbone)
    first_epoch = restore(run, heads, optimizer, settings, before)
    whole = probe.Network(encoder, heads, args.amp) if args.finetune else heads
    model = distributed.data_parallel(whole, device)

    steps = len(feed.batches)
    printer = StepPrinter(
        total=args.epochs * steps, batch_size=args.batch_size, done=first_epoch * steps
    )
    writer = Writer(run, heads, optimizer, settings, number, before.get("folds", []))
    extra = {} if number is None else {"fold": number}
    where = "" if number is None else f"fold {number + 1} of {args.folds}, "
    total, count = torch.zeros(len(settings), device=device), 0
    for epoch in range(first_epoch, args.epochs):
        factor = learning_rate(
            epoch,
            base=1.0,
            epochs=args.epochs,
            milestones=args.schedule,
            factor=args.schedule_factor,
        )
        for group, base in zip(optimizer.param_groups, base_rates, strict=True):
            group["lr"] = base * factor
        for group, one in zip(optimizer.param_groups, settings, strict=False):
            if one.diverged is not None:
                group["lr"] = 0.0
        feed.batches.set_epoch(epoch)
        encoder.train(args.finetune)  # a frozen encoder uses, and keeps, its running averages
        for step, batch in enumerate(printer.batches(feed.train), start=1):
            inputs, target = feed.inputs(batch)
            losses = probe.head_losses(model(inputs), target)
            optimizer.zero_grad()
            losses.sum().backward()
            optimizer.step()
            printer.advance()
            total, count = total + losses.detach(), count + 1
            if step % args.print_freq == 0 or step == steps:
                means = [value / count for value in total.tolist()]
                total, count = torch.zeros_like(total), 0
                end_diverged(means, heads, optimizer, settings, epoch, step, run)
                values = {**probe.by_setting("loss", settings, means), "lr_factor": factor}
                if len(settings) == 1:
                    values = {"loss": means[0], "lr": base_rates[0] * factor}
                values |= printer.rates()
                run.log.scalars(
                    "lincls",
                    run.steps_before + epoch * steps + step,
                    {"epoch": epoch, **extra, **values},
                )
                text = f"{where}epoch [{epoch}/{args.epochs}] step [{step}/{steps}]  loss "
                text += " ".join(f"{mean:.4f}" for mean in means if math.isfinite(mean))
                text += f"  lr {', '.join(f'{one.lr * factor:g}' for one in settings)}"
                printer.line(f"{text}  {values['images_per_s']:.0f} images/s", short=text)
        ended = epoch + 1 == args.epochs
        improved = False
        if ended or not args.folds:
            if args.finetune:  # rank 0's averages are the ones that are saved
                distributed.broadcast_buffers(encoder)
                encoder.eval()
            found = probe.head_accuracy(heads, feed.held_out(), device)
            improved = probe.note_accuracy(settings, found, epoch)
            report_accuracy(run, settings, found, epoch, (epoch + 1) * steps, extra, printer, where)
        if distributed.is_main():
            done = run.steps_before + (epoch + 1) * steps
            writer.write(epoch + 1, done, improved and number is None, ended)
    run.steps_before += args.epochs * steps
    printer.close()


def report_accuracy(
    run: Probe,
    settings: Sequence[Setting],
    found: list[dict],
    epoch: int,
    step: int,
    extra: dict,
    printer: StepPrinter,
    where: str,
) -> None:
    one = probe.leading(settings, "last")
    values = {**one.last, "loss": found[settings.index(one)]["loss"]}
    if len(settings) > 1:
        top1 = [accuracy["top1"] for accuracy in found]
        values |= {"lr": one.lr, "weight_decay": one.weight_decay}
        values |= probe.by_setting("top1", settings, top1)
    run.log.scalars("val" if not extra else "held_out", run.steps_before + step,
                    {**values, **extra})  # fmt: skip
    text = f" * {where}Acc@1 {one.last['top1']:.3f} Acc@5 {one.last['top5']:.3f} (epoch {epoch}"
    text += f", the best of {len(settings)}: {one})" if len(settings) > 1 else ")"
    printer.line(text, f"top-1 {one.last['top1']:.2f}")


def end_diverged(
    losses: Sequence[float],
    heads: Heads,
    optimizer: torch.optim.Optimizer,
    settings: Sequence[Setting],
    epoch: int,
    step: int,
    run: Probe,
) -> None:
    """End the classifiers whose mean training loss is NaN or infinite on any rank; with the last
    one of them the run stops, on all ranks together."""
    failed = distributed.any_rank(*(not math.isfinite(x) for x in losses), device=run.device)
    for index, one in enumerate(settings):
        if failed[index] and one.diverged is None:
            one.diverged, one.last = epoch, {}
            if len(settings) > 1:
                probe.silence(heads.linear[index], optimizer)
                optimizer.param_groups[index]["lr"] = 0.0
                distributed.print_main(f"{one} has diverged in epoch {epoch}, step {step}")
    if all(one.diverged is not None for one in settings):
        rates = " and ".join(f"{one.lr:g}" for one in settings)
        raise TrainingError(
            f"the loss is not finite in epoch {epoch}, step {step} (on rank "
            f"{distributed.rank()}: {losses[0]:g}); lower --lr {rates}"
            + (f" or --lr-backbone {run.args.lr_backbone:g}" if run.args.finetune else "")
            + ", and see that --mean and --std are those of pretraining"
        )


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


# ------------------------------------------------------------------------------------------------
# Save and load
# ------------------------------------------------------------------------------------------------


class Writer:
    """Writes the whole network, encoder and one classifier, under torchvision's names: the latest,
    and the best so far. An epoch on cached features can be short: those are written once a minute,
    and at the end."""

    def __init__(
        self,
        run: Probe,
        heads: Heads,
        optimizer: torch.optim.Optimizer,
        settings: Sequence[Setting],
        fold: int | None,
        folds_done: list,
    ) -> None:
        self.run, self.heads, self.optimizer, self.settings = run, heads, optimizer, settings
        self.of_folds = {"fold": fold, "folds": folds_done} if run.args.folds else {}
        self.best: dict | None = None  # not yet written
        self.written = time.monotonic()

    def write(self, epochs: int, steps: int, improved: bool, ended: bool) -> None:
        due = ended or not self.run.args.cached or time.monotonic() - self.written > 60
        if improved:
            self.best = self.content(epochs, steps, probe.leading(self.settings, "best"))
            if not due:
                self.best = checkpoint.to_host(self.best)
        if due:
            folder = self.run.args.save_dir
            latest = self.content(epochs, steps, probe.leading(self.settings, "last"))
            if self.best is not None:
                checkpoint.write_checkpoint(folder / LINCLS_BEST, self.best)
            checkpoint.write_checkpoint(folder / LINCLS_LATEST, latest)
            self.best, self.written = None, time.monotonic()

    def content(self, epochs: int, steps: int, chosen: Setting) -> dict:
        args, info, encoder = self.run.args, self.run.info, self.run.frozen.encoder
        classifier = self.heads.linear[self.settings.index(chosen)].state_dict()
        name = encoders.head_name(encoder)
        state = {**encoder.state_dict()}
        state.update({f"{name}.{key}": tensor for key, tensor in classifier.items()})
        kept = {name: info["args"][name] for name in ("objective",) if name in info["args"]}
        several = {}
        if len(self.settings) > 1:
            several = {"heads": self.heads.state_dict(),
                       "results": [asdict(one) for one in self.settings]}  # fmt: skip
        best = probe.leading(self.settings, "best").best
        return {
            "version": checkpoint.FORMAT_VERSION,
            "arch": info["arch"],
            "epoch": epochs,
            "best": best,
            "last": chosen.last,
            "best_acc1": best["top1"],  # upstream's name
            "pretrained_epochs": info["epoch"],
            "pretrained_digest": info["digest"],
            "state_dict": {f"module.{name}": tensor for name, tensor in state.items()},
            "optimizer": self.optimizer.state_dict(),
            "args": {**plain_values(args), **kept, "steps_done": steps},
            **several,
            **self.of_folds,
        }


def restore(
    run: Probe,
    heads: Heads,
    optimizer: torch.optim.Optimizer,
    settings: list[Setting],
    before: dict,
) -> int:
    """Go on from `before`, a checkpoint of this stage, if it is one; returns the first epoch."""
    args = run.args
    if "epoch" not in before:
        return args.start_epoch
    classifier = load_classifier(args.resume, run.classes)
    if len(settings) > 1:
        heads.load_state_dict(before["heads"])
        settings[:] = [Setting(**one) for one in before["results"]]
    else:
        heads.linear[0].load_state_dict(classifier.state_dict())
        settings[0].best, settings[0].last = before["best"], before["last"]
    if args.finetune:
        run.frozen.encoder.load_state_dict(before["encoder"])
    optimizer.load_state_dict(before["optimizer"])
    if before["epoch"] > args.epochs:
        raise CheckpointError(
            f"{args.resume} has {before['epoch']} epochs done, more than --epochs {args.epochs}"
        )
    distributed.print_main(f"resuming {args.resume} after epoch {before['epoch'] - 1}")
    return before["epoch"]


def load_classifier(path: str, classes: int) -> nn.Linear:
    """The linear classifier of a saved network."""
    network, _ = checkpoint.load_encoder(path, head="linear")
    classifier = encoders.get_head(network)
    if classifier.out_features != classes:
        raise CheckpointError(
            f"{path} classifies {classifier.out_features} classes, the data has {classes}; use the "
            "data that it was trained for, or train a new classifier with --pretrained"
        )
    return classifier


def encoder_digest(encoder: nn.Module) -> str:
    return checkpoint.checksum(dict(encoder.state_dict()))


def resumed(args: argparse.Namespace, encoder: nn.Module) -> dict:
    """The checkpoint to go on from, which must be of this very encoder."""
    content = checkpoint.read_checkpoint(args.resume)
    for key in ("epoch", "optimizer"):
        if key not in content:
            raise CheckpointError(
                f"{args.resume} has no {key!r}, so it is no checkpoint of main_lincls.py; give it "
                "as --pretrained"
            )
    other, _ = checkpoint.load_encoder(args.resume)
    mine, its = encoder.state_dict(), other.state_dict()
    if args.finetune:  # its encoder has gone on from the one that was given
        same = not args.pretrained or content.get("pretrained_digest") == encoder_digest(encoder)
        content["encoder"] = its
    else:
        same = mine.keys() == its.keys() and all(torch.equal(mine[k], its[k]) for k in mine)
    if not same:
        raise CheckpointError(
            f"{args.resume} is a probe of another encoder than --pretrained {args.pretrained}; "
            "choose another --save-dir"
        )
    unknown = {"top1": float(content.get("best_acc1", -1.0)), "epoch": None}  # upstream's files
    return {"args": {}, "best": unknown, "last": unknown, **content}


def refuse_changes(before: dict, args: argparse.Namespace) -> None:
    """A probe that goes on under other arguments would be no known protocol."""
    now = plain_values(args)
    was = {**VARIANTS, **before["args"]}  # what a file does not name was as usual
    changes = [
        f"{name}: {was[name]!r} before, {now[name]!r} now"
        for name in (*PROTOCOL, *VARIANTS)
        if name != "epochs"  # more of them go on as the whole would have
        and name in was
        and was[name] != now[name]
    ]
    if changes:
        raise CheckpointError(
            f"{args.resume} was trained with other arguments ({'; '.join(changes)}); use those, or "
            "another --save-dir"
        )


def plain_values(args: argparse.Namespace) -> dict:
    return {name: plain(value) for name, value in sorted(vars(args).items())}


if __name__ == "__main__":
    main()
