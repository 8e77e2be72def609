"""Training within the batch, as a task of the engine: one encoder, both views in one forward pass,
InfoNCE in both directions, alignment, and uniformity averaged over the views. No queue, no key
encoder (arXiv:2005.10242, section 4 and appendix B.1). Or, with --supervised, cross-entropy.

Over several processes the features of all are gathered, with gradient, so negatives, pairs and logs
are those of the whole batch; batch norm has the statistics of each process's share, as in
data-parallel code.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from align_uniform import align_loss, in_batch_contrastive_loss, uniform_loss
from align_uniform.bounds import uniformity_infimum
from moco import distributed
from moco.batch_norm import CALIBRATION_BATCHES, calibrate_batch_norm, has_batch_norm
from moco.config import InBatchConfig, auto_rate
from moco.data.images import open_images
from moco.data.nyu import open_nyu
from moco.data.views import in_batch_recipe
from moco.memory import rehearse
from moco.precision import half_precision
from moco.tasks import monitor
from moco.tasks.collapse import collapse_warning
from moco.tasks.images import ImagePairs, ImageTask
from moco.tasks.online_knn import OnlineKnn
from moco.train.losses import Losses
from moco.train.task import Needs
from moco.train.trainer import Trainer


class TwoViews(nn.Module):
    """One encoder for both views, and with `classes` a linear classifier on its unit output.

    Args:
        encoder: images -> (N, C).
        classes: of the classifier, 0 for none.
        dim: C.
    """

    def __init__(self, encoder: nn.Module, dim: int, classes: int = 0) -> None:
        super().__init__()
        self.encoder_q = encoder  # the name by which load_encoder finds it
        self.classifier = nn.Linear(dim, classes) if classes else None
        self.prepare = _as_they_are  # the task puts uint8 to float32 here

    def forward(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Unit features (N, C) of both views, float32, and logits (2N, classes): of two (N, 3, S,
        S) batches, which go through the encoder, and its batch norm, as one."""
        out = self.encoder_q(self.prepare(torch.cat([first, second])))
        features = F.normalize(out.float(), dim=1)
        logits = None if self.classifier is None else self.classifier(features)
        return (*features.chunk(2), logits)


def _as_they_are(images: Tensor) -> Tensor:
    return images


class InBatchLosses(Losses):
    """Terms by name, and the unit features of both views of the whole batch, (N, C) each."""

    def __init__(self, terms: Mapping[str, Tensor], x: Tensor, y: Tensor) -> None:
        super().__init__(terms)
        self.x, self.y = x.detach(), y.detach()


def mean_uniform_loss(x: Tensor, y: Tensor, t: float) -> Tensor:
    return (uniform_loss(x, t) + uniform_loss(y, t)) / 2


class InBatchTask(ImageTask):
    """Two views of each image and one encoder; k-NN of its backbone."""

    config: InBatchConfig
    evaluates_untrained = True

    def build_data(self, device: torch.device) -> ImagePairs:
        data, views = self.config.data, self.config.views
        supervised = self.config.objective.supervised
        if data.dataset == "nyu":
            images = open_nyu(data.data, "train").images
        else:
            images = open_images(
                data.dataset,
                data.data,
                "train" if supervised else "pretrain",
                per_class=data.images_per_class,
            )
        self.classes = len(images.classes) if supervised else 0
        pairs = ImagePairs(
            self.config,
            device,
            images=images,
            recipe=in_batch_recipe(views.image_size, views.crop_scale),
            keep_last=not data.drop_last,
            with_targets=supervised,
        )
        pairs.facts["steps_per_epoch"] = pairs.steps_per_epoch
        return pairs

    def build_module(self) -> TwoViews:
        dim = self.config.encoder.dim
        return TwoViews(self.build_encoder(dim), dim, self.classes)

    def rehearse(self) -> Needs:
        """The encoder with both views, and what takes memory in the losses of a large batch: the
        similarities of all its pairs, in both directions."""
        config, dim = self.config, self.config.encoder.dim
        size, amp, processes = config.views.image_size, config.optim.amp, config.placement.processes

        def loss(out: Tensor) -> Tensor:
            whole = out.float().repeat(processes, 1)  # what other ranks give
            if config.objective.supervised:
                return out.sum()
            x, y = F.normalize(whole, dim=1).chunk(2)
            similar = x @ y.t() / 2
            return similar.logsumexp(dim=1).sum() + similar.logsumexp(dim=0).sum()

        step = rehearse(
            lambda: self.build_encoder(dim),
            (2 * config.part_size, 3, size, size),
            dtype=half_precision(amp) or torch.float32,
            keys=False,
            loss=loss,
        )
        copies = 1.0 * (processes > 1)  # gradients, as they are sent
        copies += amp != "off"  # weights in half precision, gradients in full
        state = 2 * step.weights + step.buffers  # and momentum
        return Needs(state, step.peak + int(copies * step.weights), step.operations)

    def compiled(self, module: TwoViews) -> list[nn.Module]:
        return [module.encoder_q]

    def settle_untrained(self, module: TwoViews, data: ImagePairs) -> None:
        """Batch norm's statistics, without which features of an untrained encoder mean nothing."""
        if not has_batch_norm(module.encoder_q):
            return
        data.set_epoch(0, 0)
        batches = itertools.islice(data, CALIBRATION_BATCHES)
        pixels = [module.prepare(torch.cat(batch[:2])) for batch in batches]
        calibrate_batch_norm(module.encoder_q, pixels)
        distributed.print_main(
            f"untrained weights; batch norm has the statistics of {len(pixels)} batches, "
            f"{sum(map(len, pixels))} views, by forward passes in training mode"
        )

    def losses(
        self, model: nn.Module, batch: tuple[Tensor, ...], part: int, parts: int
    ) -> InBatchLosses:
        objective = self.config.objective
        x, y, logits = model(*batch[:2])
        x, y = distributed.gather_with_gradient(x), distributed.gather_with_gradient(y)
        terms = {}
        for name, loss in (
            ("contr", lambda: in_batch_contrastive_loss(x, y, objective.contr_tau)),
            ("align", lambda: align_loss(x, y, objective.align_alpha)),
            ("unif", lambda: mean_uniform_loss(x, y, objective.unif_t)),
        ):
            weighted = getattr(objective, f"{name}_w") != 0
            with torch.set_grad_enabled(weighted and torch.is_grad_enabled()):
                terms[name] = loss()
        if logits is not None:
            terms["cross_entropy"] = F.cross_entropy(logits, batch[2].repeat(2))
        return InBatchLosses(terms, x, y)

    def total(self, losses: InBatchLosses) -> Tensor:
        objective = self.config.objective
        # Cross-entropy has no weight of its own.
        return losses.weighted({n: getattr(objective, f"{n}_w", 1.0) for n, _ in losses.items()})

    @torch.no_grad()
    def metrics(self, losses: InBatchLosses) -> dict[str, float]:
        x, y, t = losses.x, losses.y, monitor.T
        found = {
            "alignment": align_loss(x, y, monitor.ALPHA).item(),
            "uniformity": mean_uniform_loss(x, y, t).item(),
        }
        if x.shape[1] > 1:
            found["uniformity_infimum"] = uniformity_infimum(x.shape[1], t)
        return found

    def feature_std(self, losses: InBatchLosses) -> Tensor:
        return losses.x.std(dim=0, correction=0).mean() * math.sqrt(losses.x.shape[1])

    @torch.no_grad()
    def histograms(self, losses: InBatchLosses) -> dict[str, tuple[Tensor, float, float]]:
        x, y = losses.x, losses.y
        return {
            "positive_distance": (torch.linalg.vector_norm(x - y, dim=1), 0.0, 2.0),
            "batch_similarity": (x @ y.t(), -1.0, 1.0),
        }

    def build_evaluation(self, trainer: Trainer) -> OnlineKnn | None:
        # Images of nyu have no classes.
        return None if self.config.data.dataset == "nyu" else super().build_evaluation(trainer)

    def facts(self, module: TwoViews, data: ImagePairs) -> dict[str, str]:
        config, encoder, optim = self.config, self.config.encoder, self.config.optim
        parameters = sum(p.numel() for p in module.encoder_q.parameters())
        batch, processes = optim.batch_size, config.placement.processes
        rule = auto_rate(batch)
        facts: dict[str, Any] = {
            "objective": config.to_flat()["objective"],
            **collapse_warning(config.objective),
            "data": f"{len(data.images)} images, {data.steps_per_epoch} steps per epoch, "
            f"{config.schedule.epochs} epochs; {self._rest_fact(data)}",
            "batch": f"{batch} over {processes} process(es), {batch // processes} each; losses are "
            "of all of them together",
            "batch norm": f"one group of 2 x {batch // processes} views on each device"
            if has_batch_norm(module.encoder_q)
            else "none in this arch",
            "encoder": f"{encoder.arch}, {parameters / 1e6:.2f} M parameters, {encoder.dim} "
            f"outputs, {config.views.image_size} px" + (", small stem" * encoder.small_stem),
            "lr": f"{optim.lr:g}"
            + (", " if optim.lr == rule else f"; the rule gives {rule:g}, ")
            + "0.12 x batch size / 256",
        }
        if encoder.dim == 1:
            facts["note"] = "features of one dimension are +1 or -1: alignment has no slope there"
        return facts

    def _rest_fact(self, data: ImagePairs) -> str:
        rest = len(data.images) % self.config.optim.batch_size
        if data.last_batch == rest:
            return f"the last batch has {rest}" if rest else "all batches are whole"
        kept = f"the last batch has {data.last_batch}, " if data.last_batch else ""
        return f"{kept}{rest - data.last_batch} images of each epoch are left out"
