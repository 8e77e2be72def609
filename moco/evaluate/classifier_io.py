"""Checkpoints of linear classifiers: written, read, and resumed under the same protocol."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from torch import nn

from moco import checkpoint, distributed
from moco.config import LEARNS, LinclsConfig
from moco.config.option import UNKNOWN
from moco.config.resume import changed, fields_of_class
from moco.errors import CheckpointError
from moco.evaluate.heads import HeadResult, HeadTraining, best_head
from moco.evaluate.layers import load_layer, network_state, saved_classifier
from moco.run_files import LINCLS_BEST, LINCLS_LATEST


class ClassifierWriter:
    """Writes the whole network, encoder and one classifier, under torchvision's names: the latest,
    and the best so far.

    Args:
        folder: the run folder.
        about: what every checkpoint of this training holds beside tensors and accuracies.
        interval: seconds between writes, since an epoch on cached features can be short; the last
            epoch is always written.
    """

    def __init__(
        self, folder: Path, about: dict, encoder: nn.Module, training: HeadTraining, interval: float
    ) -> None:
        self.folder, self.about, self.interval = folder, about, interval
        self.encoder, self.training = encoder, training
        self.best: dict | None = None  # not yet written
        self.written = time.monotonic()

    def write(
        self, epochs: int, steps: int, *, improved: bool, ended: bool, step_in_epoch: int = 0
    ) -> None:
        """Note or write the state after so many epochs, or within the next one.

        Args:
            steps: of the whole run.
            improved: whether a classifier is better than all before.
            ended: nothing follows for now, so write.
        """
        due = ended or time.monotonic() - self.written >= self.interval
        if improved:
            self.best = self._content(epochs, steps, by="best")
            if not due:
                self.best = checkpoint.to_host(self.best)
        if due:
            latest = self._content(epochs, steps, by="last")
            if step_in_epoch:
                training = self.training
                latest["step_in_epoch"] = step_in_epoch
                latest["losses"] = {"sum": training.loss_sum, "count": training.loss_count}
            if self.best is not None:
                checkpoint.write_checkpoint(self.folder / LINCLS_BEST, self.best)
            checkpoint.write_checkpoint(self.folder / LINCLS_LATEST, latest)
            self.best, self.written = None, time.monotonic()

    def _content(self, epochs: int, steps: int, by: str) -> dict:
        results, heads = self.training.results, self.training.heads
        chosen, best = best_head(results, by), best_head(results, "best").best
        state = network_state(self.encoder, heads.linear[results.index(chosen)])
        content = {
            **self.about,
            "epoch": epochs,
            "best": best,
            "last": chosen.last,
            "best_acc1": best["top1"],  # upstream's name
            "state_dict": {f"module.{name}": tensor for name, tensor in state.items()},
            "optimizer": self.training.optimizer.state_dict(),
            "args": {**self.about["args"], "steps_done": steps},
        }
        if len(results) > 1:
            content["heads"] = heads.state_dict()
            content["results"] = [head.to_flat() for head in results]
        return content


def load_classifier(path: str, classes: int) -> nn.Linear:
    """The linear classifier of a saved network.

    Raises:
        CheckpointError: there is none, or one of another number of classes.
    """
    classifier = saved_classifier(path)
    if classifier.out_features != classes:
        raise CheckpointError(
            f"{path} classifies {classifier.out_features} classes, the data has {classes}; use the "
            "data that it was trained for, or train a new classifier with --pretrained"
        )
    return classifier


def load_resumed(config: LinclsConfig, encoder: nn.Module) -> dict:
    """The checkpoint to go on from, which must be of this very encoder.

    Returns:
        its content; with --finetune "encoder" is the state dict of the encoder as it has become.
    """
    path, pretrained = config.saving.resume, config.source.pretrained
    content = checkpoint.read_checkpoint(path)
    for key in ("epoch", "optimizer"):
        if key not in content:
            raise CheckpointError(
                f"{path} has no {key!r}, so it is no checkpoint of main_lincls.py; give it "
                "as --pretrained"
            )
    other, _ = load_layer(path, config.source.layer)
    mine, its = encoder.state_dict(), other.state_dict()
    if config.protocol.finetune:  # its encoder has gone on from the one that was given
        same = not pretrained or content.get("pretrained_digest") == encoder_digest(encoder)
        content["encoder"] = its
    else:
        same = mine.keys() == its.keys() and all(torch.equal(mine[k], its[k]) for k in mine)
    if not same:
        raise CheckpointError(
            f"{path} is a probe of another encoder than --pretrained {pretrained}; "
            "choose another --save-dir"
        )
    unknown = {"top1": float(content.get("best_acc1", -1.0)), "epoch": None}  # upstream's files
    return {"args": {}, "best": unknown, "last": unknown, **content}


def encoder_digest(encoder: nn.Module) -> str:
    return checkpoint.checksum(dict(encoder.state_dict()))


def restore(
    training: HeadTraining, encoder: nn.Module, content: dict, config: LinclsConfig
) -> tuple[int, int]:
    """Put what `load_resumed` has given into heads, optimizer and results.

    Returns:
        The epoch to go on with, and how many of its steps are done.
    """
    path = config.saving.resume
    if len(training.results) > 1:
        training.heads.load_state_dict(content["heads"])
        training.results[:] = map(HeadResult.from_flat, content["results"])
    else:
        training.heads.linear[0].load_state_dict(saved_classifier(path).state_dict())
        training.results[0].best, training.results[0].last = content["best"], content["last"]
    if config.protocol.finetune:
        encoder.load_state_dict(content["encoder"])
    training.optimizer.load_state_dict(content["optimizer"])
    epoch, step = content["epoch"], content.get("step_in_epoch", 0)
    where = f"after epoch {epoch - 1}"
    if step:
        training.loss_sum = content["losses"]["sum"].to(training.loss_sum.device)
        training.loss_count = content["losses"]["count"]
        where = f"in epoch {epoch}, after step {step}"
    distributed.print_main(f"resuming {path} {where}")
    return epoch, step


def protocol_values(config: LinclsConfig) -> dict:
    """What an accuracy depends on, by flat names; of later options those in use."""
    flat, fields = config.to_flat(), _learning_fields(config)
    return {name: flat[name] for name, since in fields.items() if flat[name] not in (None, since)}


def refuse_changes(content: dict, config: LinclsConfig, classes: int) -> None:
    """A probe that goes on under another protocol would be no known protocol.

    Raises:
        CheckpointError: names what has changed; other classes; more epochs than there shall be.
    """
    path, epochs = config.saving.resume, config.schedule.epochs
    fields = _learning_fields(config)
    was = {name: since for name, since in fields.items() if since is not UNKNOWN}
    was |= content["args"]
    del fields["epochs"]  # more of them go on as the whole would have
    changes = changed({name: was[name] for name in fields if name in was}, config.to_flat())
    if changes:
        raise CheckpointError(
            f"{path} was trained with other arguments ({'; '.join(changes)}); use those, or "
            "another --save-dir"
        )
    if config.trains:
        load_classifier(path, classes)
        if content["epoch"] > epochs:
            raise CheckpointError(
                f"{path} has {content['epoch']} epochs done, more than --epochs {epochs}"
            )


def _learning_fields(config: LinclsConfig) -> dict:
    fields = fields_of_class(LEARNS, LinclsConfig)
    # When fine-tuning, batch norm takes the statistics of each process's share of the batch.
    return {**fields, "processes": UNKNOWN} if config.protocol.finetune else fields
