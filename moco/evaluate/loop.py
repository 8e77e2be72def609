"""The training loop of linear classifiers, on a frozen encoder or together with it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from moco import distributed
from moco.config import LinclsConfig
from moco.errors import TrainingError
from moco.evaluate.classifier_io import ClassifierWriter, restore
from moco.evaluate.feed import CachedFeed, ImageFeed
from moco.evaluate.heads import (
    EncoderWithHeads,
    FrozenEncoder,
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
from moco.log import RunLog
from moco.looks import Looks, looking_waits
from moco.progress import StepPrinter
from moco.schedule import learning_rate
from moco.stop import AgreedStop, StopRequest
from moco.timing import synchronize

CACHED_SAVE_SECONDS = 60.0


@dataclass(frozen=True)
class LinearEvaluation:
    """What all trainings of one evaluation, on folds and on all images, have in common.

    Args:
        config: with everything that the checkpoint tells.
        about: what every checkpoint holds beside tensors and accuracies.
        stop: what is asked of this process.
    """

    config: LinclsConfig
    device: torch.device
    encoder: FrozenEncoder
    features: int
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
    evaluation: LinearEvaluation,
    stage: Stage,
    configs: Sequence[HeadConfig],
    resume_from: dict | None,
) -> list[HeadResult]:
    """Train one head for each config, together; the encoder too with --finetune.

    With --folds only the last epoch is evaluated. A request to stop ends the process, with its
    exit status, once the step is done and saved.

    Args:
        resume_from: a checkpoint to go on from, if it is of this stage.
    """
    config = evaluation.config
    with contextlib.closing(stage.feed):
        loop = _HeadLoop(evaluation, stage, configs)
        first, done = config.schedule.start_epoch, 0
        if resume_from is not None and resume_from.get("fold") == stage.fold:
            first, done = restore(loop.training, loop.encoder, resume_from, config)
        loop.start(first, done)
        for epoch in range(first, config.schedule.epochs):
            loop.train_epoch(epoch, done if epoch == first else 0)
            loop.end_epoch(epoch)
        loop.printer.close()
    return loop.training.results


class _HeadLoop:
    """Heads, optimizer, output and checkpoints of one stage."""

    def __init__(
        self, evaluation: LinearEvaluation, stage: Stage, configs: Sequence[HeadConfig]
    ) -> None:
        self.evaluation, self.stage, self.config = evaluation, stage, evaluation.config
        self.device, self.encoder = evaluation.device, evaluation.encoder.encoder
        protocol, optim = self.config.protocol, self.config.optim
        self.finetune, self.epochs = protocol.finetune, self.config.schedule.epochs
        self.print_freq = self.config.saving.print_freq
        self.steps = stage.feed.batches.batches_per_epoch()
        self.fold_line = {} if stage.fold is None else {"fold": stage.fold}  # for the log
        self.where = "" if stage.fold is None else f"fold {stage.fold + 1} of {protocol.folds}, "
        torch.manual_seed(optim.seed)
        probe = {"probe": protocol.probe}
        heads = new_heads(evaluation.features, evaluation.classes, len(configs), **probe)
        heads = heads.to(self.device)
        backbone = {"encoder": self.encoder, "lr_backbone": protocol.lr_backbone}
        self.training = HeadTraining(
            heads, configs, optim.momentum, **probe, **(backbone if self.finetune else {})
        )

    def start(self, epoch: int, step: int) -> None:
        """Begin to train at a step of an epoch."""
        heads, config = self.training.heads, self.config
        whole = EncoderWithHeads(self.encoder, heads, config.source.amp) if self.finetune else heads
        self.model = distributed.data_parallel(whole, self.device)
        self.printer = StepPrinter(
            total=self.epochs * self.steps,
            batch_size=config.optim.batch_size,
            done=epoch * self.steps + step,
        )
        about = self.evaluation.about
        if config.protocol.folds:
            about = {**about, "fold": self.stage.fold, "folds": self.stage.folds_done}
        interval = CACHED_SAVE_SECONDS if config.protocol.cached else 0.0
        # A single process looks at its own flag, without a wait.
        waits = distributed.world_size() > 1 and looking_waits(self.device)
        self.looks = Looks(epoch * self.steps + step, waits=waits)
        self.writer = ClassifierWriter(
            config.saving.save_dir, about, self.encoder, self.training, interval
        )

    def train_epoch(self, epoch: int, done: int) -> None:
        """Train from a step of an epoch to its end."""
        feed, schedule, print_freq = self.stage.feed, self.config.schedule, self.print_freq
        factor = learning_rate(
            epoch,
            base=1.0,
            epochs=self.epochs,
            milestones=schedule.schedule,
            factor=schedule.schedule_factor,
        )
        self.training.set_learning_rates(factor)
        self.encoder.train(self.finetune)  # a frozen encoder uses, and keeps, its running averages
        batches = self.printer.batches(feed.train(epoch, done))
        for step, batch in enumerate(batches, start=done + 1):
            inputs, targets = feed.inputs(batch)
            self.training.step(head_losses(self.model(inputs), targets))
            self.printer.advance()
            if step % print_freq == 0 or step == self.steps:
                self._report_losses(epoch, step, factor)
            if step < self.steps:
                self._stop_if_asked(epoch, step)

    def _stop_if_asked(self, epoch: int, step: int) -> None:
        """Save and end, on all ranks together, which look for that about every second."""
        done = epoch * self.steps + step
        if done < self.looks.next and step != self.steps:
            return
        stop = self.evaluation.stop
        if self.looks.waits:
            synchronize(self.device)
        if not self.looks.together(done, stop.requested, device=self.device)[0]:
            return
        epochs, within = (epoch, step) if step < self.steps else (epoch + 1, 0)
        self._end_diverged(epoch, step)  # so that no NaN is saved
        if distributed.is_main():
            done = self._steps_done(epoch, step)
            self.writer.write(epochs, done, improved=False, ended=True, step_in_epoch=within)
        self.printer.close()
        distributed.print_main(
            f"stopped by {stop.name or 'a signal to another rank'} in {self.where}epoch {epoch}, "
            f"after step {step}; go on with --save-dir {self.writer.folder} --resume auto"
        )
        raise AgreedStop(stop.exit_status)

    def _report_losses(self, epoch: int, step: int, factor: float) -> None:
        training, results = self.training, self.training.results
        means = self._end_diverged(epoch, step)
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

    def _end_diverged(self, epoch: int, step: int) -> list[float]:
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
        """Evaluate and save, where that is due."""
        ended, improved = epoch + 1 == self.epochs, False
        protocol = self.config.protocol
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
        if not ended or self.stage.fold is not None:
            self._stop_if_asked(epoch, self.steps)

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
