"""MoCo with alignment, uniformity and InfoNCE, as a task of the engine."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from align_uniform.bounds import queue_push
from moco import encoders
from moco.batch_norm import has_batch_norm, split_batch_norm
from moco.builder import MoCo, MoCoLosses
from moco.memory import rehearse
from moco.precision import half_precision
from moco.tasks import monitor
from moco.tasks.collapse import collapse_warning
from moco.tasks.images import ImagePairs, ImageTask
from moco.train.task import Needs


class MoCoTask(ImageTask):
    """Two views of each image; `moco.builder.MoCo`; k-NN of the query encoder's backbone."""

    evaluates_untrained = True
    metrics = staticmethod(monitor.batch_metrics)
    histograms = staticmethod(monitor.distributions)

    def build_data(self, device: torch.device) -> ImagePairs:
        return ImagePairs(self.config, device)

    def build_module(self) -> MoCo:
        encoder, objective = self.config.encoder, self.config.objective
        return MoCo(
            self._build_encoder,
            encoder.moco_dim,
            encoder.moco_k,
            encoder.moco_m,
            contr_tau=objective.contr_tau if objective.contr_w else None,
            align_alpha=objective.align_alpha if objective.align_w else None,
            unif_t=objective.unif_t if objective.unif_w else None,
            unif_intra_batch=objective.intra_batch,
            mlp=encoder.mlp,
            group_size=self.config.loss_group_size,
        )

    def _build_encoder(self, num_classes: int, *, in_groups: bool = True) -> nn.Module:
        config, built = self.config, self.build_encoder(num_classes)
        # Also where each lies on a device of its own, or the only one is spread over several.
        if in_groups and (config.groups > 1 or config.group_span > 1):
            split_batch_norm(built, config.bn_groups, config.group_span)
        return built

    def split(self, batch: tuple[Tensor, Tensor], parts: int) -> list[tuple[Tensor, Tensor]]:
        """Every part sees the whole batch: keys are shuffled over all of it."""
        return [batch] * parts

    def rehearse(self) -> Needs:
        """The encoders without groups of batch norm, which take a few per cent more; the queue."""
        config, encoder = self.config, self.config.encoder
        size, amp = config.views.image_size, config.optim.amp

        def build() -> nn.Module:
            net = self._build_encoder(encoder.moco_dim, in_groups=False)
            if encoder.mlp:
                encoders.add_mlp_head(net)
            return net

        step = rehearse(
            build,
            (config.part_size, 3, size, size),
            dtype=half_precision(amp) or torch.float32,
            directions=2 if config.objective.symmetric else 1,
        )
        queue = 4 * encoder.moco_dim * encoder.moco_k
        state = 3 * step.weights + 2 * step.buffers + queue  # both encoders, momentum
        copies = 1.0 * (config.placement.processes > 1)  # gradients, as they are sent
        copies += config.optim.accumulate > 1  # gradients of the parts before
        copies += 1.5 * (amp != "off")  # both encoders in half precision, gradients in full
        return Needs(state, step.peak + int(copies * step.weights), step.operations)

    def losses(
        self, model: nn.Module, batch: tuple[Tensor, Tensor], part: int, parts: int
    ) -> MoCoLosses:
        symmetric = self.config.objective.symmetric
        return model(*batch, part=part, parts=parts, symmetric=symmetric)

    def total(self, losses: MoCoLosses) -> Tensor:
        objective = self.config.objective
        return losses.combine(objective.contr_w, objective.align_w, objective.unif_w)

    def start_from(self, module: MoCo, path: str) -> str:
        """The key encoder becomes a copy. Queue, optimizer and epoch are those of a new run."""
        found = super().start_from(module, path)
        module.encoder_k.load_state_dict(module.encoder_q.state_dict())
        return found

    def on_device(self, module: MoCo, device: torch.device) -> None:
        super().on_device(module, device)
        module.shuffle_generator.manual_seed(self.config.optim.seed)

    def compiled(self, module: MoCo) -> list[nn.Module]:
        return [module.encoder_q, module.encoder_k]

    def shared_tensors(self, module: MoCo) -> list[Tensor]:
        return [*module.parameters(), module.queue.t(), module.queue_ptr]

    def extra_state(self, module: MoCo) -> dict[str, Any]:
        return {"shuffle_generator": module.shuffle_generator.get_state()}

    def load_extra_state(self, module: MoCo, content: dict) -> None:
        module.shuffle_generator.set_state(content["shuffle_generator"])

    def step_values(self, losses: MoCoLosses) -> dict[str, Tensor]:
        rank = losses.contr_rank()
        if rank is None:
            return {}
        return {f"contr_top{k}": 100 * (rank < k).float().mean() for k in (1, 5)}

    def feature_std(self, losses: MoCoLosses) -> Tensor:
        return losses.feature_std()

    def queue_filled(self) -> int:
        passes = 2 if self.config.objective.symmetric else 1
        return -(-self.config.encoder.moco_k // (passes * self.config.optim.batch_size))

    def facts(self, module: MoCo, data: ImagePairs) -> dict[str, str]:
        config, encoder, objective = self.config, self.config.encoder, self.config.objective
        parameters = sum(p.numel() for p in module.encoder_q.parameters())
        paired = config.part_size // config.bn_groups  # images of a group
        push = queue_push(paired, encoder.moco_k, intra_batch=objective.intra_batch)
        return {
            "objective": config.to_flat()["objective"],
            **collapse_warning(objective, push),
            **({"preset": config.preset.chosen} if config.preset.chosen else {}),
            "data": f"{len(data.images)} images, {data.steps_per_epoch} steps per epoch, "
            f"{config.schedule.epochs} epochs",
            "batch": self._batch_fact(),
            "groups": self._groups_fact(module),
            "encoder": f"{encoder.arch}, {parameters / 1e6:.2f} M parameters, "
            f"{config.views.image_size} px" + (", small stem" if encoder.small_stem else ""),
            "queue": f"{encoder.moco_k} x {encoder.moco_dim}, "
            f"{module.queue.numel() * 4 / 2**20:.1f} MiB",
        }

    def _batch_fact(self) -> str:
        batch, processes = self.config.optim.batch_size, self.config.placement.processes
        fact = f"{batch} over {processes} process(es), {batch // processes} each"
        if self.config.optim.accumulate > 1:
            fact += (
                f", in {self.config.optim.accumulate} parts of {self.config.part_size}; optimizer, "
                "key encoder and queue advance once per step"
            )
        return fact

    def _groups_fact(self, module: MoCo) -> str:
        config, size, count = self.config, self.config.group_size, self.config.groups
        fact = f"{count} of {size} images"
        if config.group_span > 1:
            fact += f", each over {config.group_span} devices"
        elif config.optim.accumulate > 1:
            fact += f", {config.bn_groups} in each part"
        elif config.placement.processes > 1:
            fact += f", {config.bn_groups} on each device"
        normed = has_batch_norm(module.encoder_q)
        norm = "batch norm" if normed else "no batch norm in this arch"
        if config.loss_group_size == size:
            fact += f"; {norm}, intra-batch pairs and the loss's log in each"
        else:
            fact += (
                " for batch norm; intra-batch pairs and the loss's log over "
                f"{config.loss_group_size}, as this run began before --group-size"
            )
        if count > 1 or not normed:
            return fact
        return (
            f"{fact}. WARNING: the shuffle has no effect within one group, so that a key's batch "
            "statistics give away which query it belongs to; give a --batch-size that splits into "
            "groups of at least two images, or --group-size"
        )
