"""Checkpoints of linear classifiers: written, read, and gone on with under the same protocol."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

import torch
from torch import nn

from moco import checkpoint, distributed, encoders
from moco.config import plain
from moco.errors import CheckpointError
from moco.evaluate import heads as probe
from moco.evaluate.heads import Heads, Setting
from moco.run_files import LINCLS_BEST, LINCLS_LATEST

if TYPE_CHECKING:  # for this commit only: the next one parts them
    from moco.evaluate.loop import Probe


# What the accuracy of a probe depends on; further down what it depends on beside these, and the
# value that stands for an argument that a file does not have.
PROTOCOL = ("lr", "batch_size", "epochs", "schedule", "schedule_factor", "weight_decay", "momentum",
            "image_size", "seed")  # fmt: skip
VARIANTS = {"finetune": False, "lr_backbone": None, "cached": False, "cached_views": 0,
            "folds": None, "labels_digest": None, "images_per_class": None}  # fmt: skip


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
