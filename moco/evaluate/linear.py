"""Training of linear classifiers, on a frozen encoder or together with it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from moco import distributed
from moco.config import LinclsConfig
from moco.errors import TrainingError
from moco.evaluate.classifier_io import ClassifierWriter, restore
from moco.evaluate.facts import Subject
from moco.evaluate.feed import CachedFeed, ImageFeed
from moco.evaluate.heads import (
    EncoderWithHeads,
    HeadConfig,
    HeadResult,
    HeadTraining,
    best_head,
    head_accuracy,
    head_losses,
    log_names,
    new_heads,
    record_accuracy,
    zero_diverged_head,
)
from moco.evaluate.loop import EvaluationLoop
from moco.log import RunLog
from moco.stop import StopRequest

CACHED_SAVE_SECONDS = 60.0


@dataclass(frozen=True)
class LinearEvaluation:
    """What all trainings of one evaluation, on folds and on all images, have in common.

    Args:
        config: with everything that the checkpoint tells.
        about: what every checkpoint holds beside tensors and accuracies.
    """

    config: LinclsConfig
    device: torch.device
    subject: Subject
    classes: int
    about: dict
    log: RunLog
    stop: StopRequest


@dataclass(frozen=True)
class Stage:
    """One training of all heads: on the images outside one fold, or on all of them.

    Args:
        steps_before: optimizer steps of the stages before this one.
        fold: number of the fold that is held out; None with all images.
        folds_done: top-1 accuracy of each head on the folds before, a row for each.
    """

    feed: ImageFeed | CachedFeed
    steps_before: int = 0
    fold: int | None = None
    folds_done: Sequence[Sequence[float | None]] = ()


def train_heads(
    evaluation: LinearEvaluation, stage: Stage, configs: Sequence[HeadConfig]
) -> list[HeadResult]:
    """Train one head for each config, together; the encoder too with --finetune. With --folds only
    the last epoch is evaluated."""
    config, saved = evaluation.config, evaluation.subject.resume_from
    with contextlib.closing(stage.feed):
        loop = _HeadLoop(evaluation, stage, configs)
        first, done = config.schedule.start_epoch, 0
        if saved is not None and saved.get("fold") == stage.fold:
            first, done = restore(loop.training, loop.encoder, saved, config)
        loop.train(first, done)
    return loop.training.results


class _HeadLoop(EvaluationLoop):
    """Heads, optimizer, output and checkpoints of one stage."""

    def __init__(
        self, evaluation: LinearEvaluation, stage: Stage, configs: Sequence[HeadConfig]
    ) -> None:
        config, subject = evaluation.config, evaluation.subject
        encoder = subject.encoder.encoder
        protocol, optim, folder = config.protocol, config.optim, config.saving.save_dir
        where = "" if stage.fold is None else f"fold {stage.fold + 1} of {protocol.folds}, "
        super().__init__(
            config.schedule,
            stage.feed.batches.batches_per_epoch(),
            batch_size=optim.batch_size,
            device=evaluation.device,
            stop=evaluation.stop,
            folder=folder,
            where=where,
        )
        self.evaluation, self.stage, self.config, self.encoder = evaluation, stage, config, encoder
        self.stops_at_the_end, self.finetune = stage.fold is not None, protocol.finetune
        self.fold_line = {} if stage.fold is None else {"fold": stage.fold}  # for the log
        torch.manual_seed(optim.seed)
        probe, width = {"probe": protocol.probe}, subject.info["feature_dim"]
        heads = new_heads(width, evaluation.classes, len(configs), **probe).to(self.device)
        backbone = {"encoder": encoder, "lr_backbone": protocol.lr_backbone}
        self.training = HeadTraining(
            heads, configs, optim.momentum, **probe, **(backbone if self.finetune else {})
        )
        whole = EncoderWithHeads(encoder, heads, config.source.amp) if self.finetune else heads
        self.model = distributed.data_parallel(whole)
        about = evaluation.about
        if protocol.folds:
            about = {**about, "fold": stage.fold, "folds": stage.folds_done}
        interval = CACHED_SAVE_SECONDS if protocol.cached else 0.0
        self.writer = ClassifierWriter(folder, about, encoder, self.training, interval)

    def batches(self, epoch: int, start: int) -> Iterable:
        return self.stage.feed.train(epoch, start)

    def begin_epoch(self, factor: float) -> None:
        self.factor = factor
        self.training.set_learning_rates(factor)
        self.encoder.train(self.finetune)  # a frozen encoder uses, and keeps, its running averages

    def step(self, batch: Sequence) -> None:
        inputs, targets = self.stage.feed.inputs(batch)
        self.training.step(head_losses(self.model(inputs), targets))

    def save(self, epochs: int, step: int) -> None:
        done = self._steps_done(epochs, step)
        self.writer.write(epochs, done, improved=False, ended=True, step_in_epoch=step)

    def report(self, epoch: int, step: int) -> None:
        if step % self.config.saving.print_freq and step != self.steps:
            return
        training, results, factor = self.training, self.training.results, self.factor
        means = self.check(epoch, step)
        training.start_means()
        values = {**log_names("loss", results, means), "lr_factor": factor}
        if len(results) == 1:
            values = {"loss": means[0], "lr": training.base_rates[0] * factor}
        values |= self.printer.rates()
        self.evaluation.log.scalars(
            "lincls", self._steps_done(epoch, step), {"epoch": epoch, **self.fold_line, **values}
        )
        text = f"{self.where}epoch [{epoch}/{self.epochs}] step [{step}/{self.steps}]  loss "
        text += " ".join(f"{mean:.4f}" for mean in means if math.isfinite(mean))
        text += f"  lr {', '.join(f'{head.config.lr * factor:g}' for head in results)}"
        self.printer.line(f"{text}  {values['images_per_s']:.0f} images/s", short=text)

    def check(self, epoch: int, step: int) -> list[float]:
        """Means of the losses. Heads with one that is not finite on any rank end; with the last of
        them the run stops, on all ranks together."""
        training = self.training
        losses = [value / max(1, training.loss_count) for value in training.loss_sum.tolist()]
        failed = distributed.any_rank(*(not math.isfinite(x) for x in losses), device=self.device)
        for index, head in enumerate(training.results):
            if failed[index] and head.diverged is None:
                head.diverged, head.last = epoch, {}
                if len(training.results) > 1:
                    zero_diverged_head(training.heads.linear[index], training.optimizer)
                    distributed.print_main(
                        f"{head.config} has diverged in epoch {epoch}, step {step}"
                    )
        if all(head.diverged is not None for head in training.results):
            rates = " and ".join(f"{head.config.lr:g}" for head in training.results)
            backbone = self.config.protocol.lr_backbone
            raise TrainingError(
                f"the loss is not finite in epoch {epoch}, step {step} (on rank "
                f"{distributed.rank()}: {losses[0]:g}); lower --lr {rates}"
                + (f" or --lr-backbone {backbone:g}" if self.finetune else "")
                + ", and see that --mean and --std are those of pretraining"
            )
        return losses

    def end_epoch(self, epoch: int) -> None:
        ended, improved, protocol = epoch + 1 == self.epochs, False, self.config.protocol
        if ended or not (protocol.folds or protocol.probe == "stl10"):
            if self.finetune:  # rank 0's averages are the ones that are saved
                distributed.broadcast_buffers(self.encoder)
                self.encoder.eval()
            found = head_accuracy(self.training.heads, self.stage.feed.held_out(), self.device)
            improved = record_accuracy(self.training.results, found, epoch)
            self._report_accuracy(found, epoch)
        if distributed.is_main():
            done = self._steps_done(epoch, self.steps)
            improved = improved and self.stage.fold is None
            self.writer.write(epoch + 1, done, improved=improved, ended=ended)

    def _report_accuracy(self, found: list[dict], epoch: int) -> None:
        results = self.training.results
        head = best_head(results, "last")
        values = {**head.last, "loss": found[results.index(head)]["loss"]}
        if len(results) > 1:
            top1 = [accuracy["top1"] for accuracy in found]
            values |= {"lr": head.config.lr, "weight_decay": head.config.weight_decay}
            values |= log_names("top1", results, top1)
        kind = "val" if self.stage.fold is None else "held_out"
        step = self._steps_done(epoch, self.steps)
        self.evaluation.log.scalars(kind, step, {**values, **self.fold_line})
        top = min(5, self.evaluation.classes)
        text = f" * {self.where}Acc@1 {head.last['top1']:.3f} Acc@{top} {head.last['top5']:.3f} "
        text += f"(epoch {epoch}"
        text += f", the best of {len(results)}: {head.config})" if len(results) > 1 else ")"
        self.printer.line(text, f"top-1 {head.last['top1']:.2f}")

    def _steps_done(self, epoch: int, step: int) -> int:
        """Since the start of the run, after `step` steps of an epoch of this stage."""
        return self.stage.steps_before + epoch * self.steps + step
