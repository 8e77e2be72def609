"""The training loop of linear classifiers, on a frozen encoder or together with it."""

from __future__ import annotations

import argparse
import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from moco import distributed
from moco.errors import TrainingError
from moco.evaluate import heads as probe
from moco.evaluate.classifier_io import Writer, restore
from moco.evaluate.feed import Feed
from moco.evaluate.heads import Frozen, Heads, Setting
from moco.log import RunLog, StepPrinter
from moco.schedule import learning_rate


def listed(value: float | list[float]) -> bool:
    return isinstance(value, list)


def as_list(value: float | list[float]) -> list[float]:
    return value if listed(value) else [value]


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
