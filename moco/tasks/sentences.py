"""Quick-Thought sentence encoders with a contrastive or alignment + uniformity objective."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from align_uniform.bounds import can_collapse, uniformity_infimum
from align_uniform.sentences import (
    adjacent_align_loss,
    adjacent_contrastive_loss,
    summed_uniform_loss,
)
from moco import distributed
from moco.config import SentenceConfig, learned_values
from moco.config.sentences import SentenceObjective
from moco.data.text import Sentences, Text, read_text
from moco.evaluate.sentences import encode, neighbour_metrics
from moco.log import RunLog
from moco.sentence_encoders import QuickThought
from moco.train.losses import Losses
from moco.train.task import Task
from moco.train.trainer import Trainer

WEIGHTS = {"loss_contr": "contr_w", "loss_align": "align_w", "loss_unif": "unif_w"}


class TextBlocks:
    """(words, lengths, documents) of every step: this rank's share of a block of consecutive
    sentences, and the documents of all of them. Blocks come in the order of the text, in every
    epoch; what is left over at its end is no block.

    Raises:
        DataError: see `moco.data.text.read_text`; no sentence has a neighbour.
    """

    def __init__(self, config: SentenceConfig, device: torch.device) -> None:
        data, self.batch, self.device = config.data, config.optim.batch_size, device
        self.text: Text = read_text(
            data.data,
            val_sentences=data.val_sentences,
            vocabulary=data.vocab,
            batch=self.batch,
            lower=not data.case_sensitive,
            length=data.length,
            encoding=data.encoding,
        )
        self.across_documents = data.across_documents
        if not data.across_documents:
            remedy = "take blank lines out, or give --across-documents"
            self.text.train.require_neighbours(data.data, remedy)
            if data.val_sentences:
                held_out = f"the beginning of {data.data}, {data.val_sentences} held-out sentences,"
                self.text.val.require_neighbours(held_out, f"{remedy}, or --val-sentences 0")
        self.facts = {"sentences": len(self.text.train), "text_digest": self.text.digest()}
        self.steps_per_epoch = len(self.text.train) // self.batch
        self._start = 0

    def set_epoch(self, epoch: int, start: int) -> None:
        self._start = start

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        share = self.batch // distributed.world_size()
        for step in range(self._start, self.steps_per_epoch):
            first = step * self.batch
            mine = first + distributed.rank() * share
            words, lengths = self.text.train.part(mine, mine + share).padded()
            documents = self.documents(self.text.train.part(first, first + self.batch))
            # Lengths stay on the CPU, where packing them wants them.
            yield words.to(self.device), lengths, documents.to(self.device)

    def documents(self, sentences: Sentences) -> Tensor:
        """(N,) whose changes are the borders that count."""
        documents = torch.from_numpy(sentences.documents.astype("int64"))
        return torch.zeros_like(documents) if self.across_documents else documents

    def end(self) -> None:
        pass


class SentenceLosses(Losses):
    """The three terms, those without weight without slope, and the unit features (K, C) they are
    of."""

    def __init__(self, u: Tensor, v: Tensor, documents: Tensor, of: SentenceObjective) -> None:
        unit = F.normalize(u, dim=1), F.normalize(v, dim=1)
        self.u, self.v, self.documents = unit[0].detach(), unit[1].detach(), documents
        features = unit if of.normalize else (u, v)
        terms = {
            "loss_contr": lambda: adjacent_contrastive_loss(
                *features, of.contr_tau, documents, zero_diagonal=not of.normalize
            ),
            "loss_align": lambda: adjacent_align_loss(
                *unit, of.align_alpha, documents, pairs=of.align_pairs
            ),
            "loss_unif": lambda: summed_uniform_loss(*unit, of.unif_t),
        }
        found = {}
        for name, term in terms.items():
            with torch.set_grad_enabled(torch.is_grad_enabled() and getattr(of, WEIGHTS[name]) > 0):
                found[name] = term()
        super().__init__(found)


class SentenceTask(Task):
    """Each sentence's neighbours by f and g; alignment and uniformity of held-out sentences."""

    evaluation_kind = "held_out"
    unit = "sentences"
    collapse_remedy = "Raise --unif-w or --unif-t, give --contr-w, or lower --lr"

    def __init__(self, config: SentenceConfig) -> None:
        super().__init__(config)
        self.max_grad_norm = config.optim.clip or None
        self.vocabulary: list[str] = []

    def build_data(self, device: torch.device) -> TextBlocks:
        data = TextBlocks(self.config, device)
        self.vocabulary = data.text.vocabulary.words
        return data

    def build_module(self) -> QuickThought:
        encoder = self.config.encoder
        return QuickThought(len(self.vocabulary), encoder.emb, encoder.hidden)

    def build_optimizer(self, module: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.Adam(module.parameters(), self.config.optim.lr, fused=True)

    def losses(
        self, model: nn.Module, batch: tuple[Tensor, Tensor, Tensor], part: int, parts: int
    ) -> SentenceLosses:
        words, lengths, documents = batch
        u, v = map(distributed.gather_with_gradient, model(words, lengths))
        return SentenceLosses(u, v, documents, self.config.objective)

    def total(self, losses: SentenceLosses) -> Tensor:
        objective = self.config.objective
        return losses.weighted({name: getattr(objective, w) for name, w in WEIGHTS.items()})

    def extra_state(self, module: nn.Module) -> dict[str, Any]:
        return {"vocabulary": self.vocabulary}

    def metrics(self, losses: SentenceLosses) -> dict[str, float]:
        with torch.no_grad():
            return {
                "alignment": adjacent_align_loss(losses.u, losses.v, 2, losses.documents).item(),
                "uniformity": summed_uniform_loss(losses.u, losses.v, 2).item() / 2,
                "uniformity_infimum": uniformity_infimum(losses.u.shape[1], 2),
            }

    def feature_std(self, losses: SentenceLosses) -> Tensor:
        deviations = torch.stack([x.std(dim=0, correction=0) for x in (losses.u, losses.v)])
        return deviations.mean() * math.sqrt(losses.u.shape[1])

    def begin_log(self, log: RunLog, data: TextBlocks) -> None:
        places = ("alignment", "uniformity")
        log.one_chart(
            {
                f"{name}, batch and held out": [f"metrics/{name}", f"held_out/{name}"]
                for name in places
            }
        )
        learned = learned_values({**self.config.to_flat(), **data.facts})
        metrics = ["train/loss", *(f"held_out/{name}" for name in places)]
        log.hyperparameters({**learned, "processes": self.config.placement.processes}, metrics)

    def build_evaluation(self, trainer: Trainer) -> HeldOut:
        return HeldOut(trainer)

    def evaluation_rhythm(self) -> tuple[int, int]:
        return 1, self.config.watching.evaluate_every

    def facts(self, module: QuickThought, data: TextBlocks) -> dict[str, str]:
        config, text = self.config, data.text
        train, val = text.train, text.val
        batch, processes = config.optim.batch_size, config.placement.processes
        borders = "positives across them" if data.across_documents else "no positives across them"
        parameters = sum(p.numel() for p in module.parameters())
        facts = {
            "objective": config.to_flat()["objective"],
            "data": f"{len(train)} sentences in {documents(train)} document(s), {borders}; "
            f"{len(val)} held out; {data.steps_per_epoch} steps per epoch, "
            f"{config.schedule.epochs} epoch(s)",
            "words": f"vocabulary of {len(text.vocabulary)}, "
            f"{'as written' if config.data.case_sensitive else 'lower case'}, up to "
            f"{config.data.length} tokens; unknown: {100 * train.unknown_share():.2f} %, of the "
            f"held-out {100 * val.unknown_share():.2f} %",
            "batch": f"{batch} consecutive sentences over {processes} process(es), "
            f"{batch // processes} each; all are each other's negatives",
            "encoders": f"f and g, bi-GRU, {2 * config.encoder.hidden} features each, "
            f"{parameters / 1e6:.2f} M parameters together",
            "optimizer": f"Adam, lr {config.optim.lr:g}, gradients of norm up to "
            f"{config.optim.clip or math.inf:g}",
        }
        warning = collapse_warning(config.objective)
        return {**facts, "warning": warning} if warning else facts


def documents(sentences: Sentences) -> int:
    return int((sentences.documents[1:] != sentences.documents[:-1]).sum()) + 1


def collapse_warning(of: SentenceObjective) -> str | None:
    """Where the weights alone say that all features will end in one point."""
    if of.contr_w or not of.align_w:
        return None
    if of.align_alpha < 2:
        return (
            f"collapse: with alpha {of.align_alpha:g}, below 2, alignment outweighs uniformity "
            "near any point, so features that come near one end in it"
        )
    if not can_collapse(of.align_w, of.unif_w, of.unif_t, alpha=of.align_alpha, push=2):
        return None
    return (
        f"collapse: features can end in one point, as align_w {of.align_w:g} is above "
        f"2 * t * unif_w = {2 * of.unif_t * of.unif_w:g}; raise --unif-t or --unif-w"
    )


class HeldOut:
    """Alignment and uniformity of the sentences that were held out; ranks encode a share each.
    Nothing here draws from a generator of the training process."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.sentences: Sentences = trainer.data.text.val
        self.enabled = len(self.sentences) > 1

    def measure(self, epoch: int, step: int) -> bool:
        t, started = self.trainer, time.perf_counter()
        count, world = len(self.sentences), distributed.world_size()
        first, last = (count * (distributed.rank() + end) // world for end in (0, 1))
        with t.printer.paused():
            mine = encode(t.state.module, self.sentences.part(first, last), t.device)
            u, v = (distributed.gather_uneven(x.to(t.device)).cpu() for x in mine)
            found = neighbour_metrics(u, v, t.data.documents(self.sentences))
            seconds = time.perf_counter() - started
            t.log.scalars("held_out", step, {**found, "seconds": seconds}, epoch=epoch)
            t.printer.note(
                f"held out after step {step}: alignment {found['alignment']:.4f}, uniformity "
                f"{found['uniformity']:.4f} (f {found['uniformity_f']:.4f}, g "
                f"{found['uniformity_g']:.4f}; {count} sentences, "
                f"{100 * self.sentences.unknown_share():.2f} % of their words unknown, "
                f"{seconds:.1f} s)"
            )
            return distributed.any_rank(t.stop.requested, device=t.device)[0]
