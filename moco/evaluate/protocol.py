"""How classifiers are trained and chosen: on all images, or by cross-validation before."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict

import torch

from moco import distributed
from moco.data import subsets as labels
from moco.errors import TrainingError
from moco.evaluate import heads as probe
from moco.evaluate.classifier_io import PROTOCOL, VARIANTS, encoder_digest
from moco.evaluate.heads import Setting
from moco.evaluate.loop import Probe, as_list, train_stage


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
