"""MoCo with alignment, uniformity and InfoNCE, as a task of the engine."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from align_uniform.bounds import queue_push
from moco import encoders
from moco.batch_norm import has_batch_norm
from moco.builder import MoCo, MoCoLosses
from moco.data.views import normalize
from moco.log import RunLog
from moco.precision import memory_format
from moco.tasks import monitor
from moco.tasks.collapse import collapse_warning
from moco.tasks.images import ImagePairs
from moco.tasks.online_knn import OnlineKnn
from moco.tasks.start import start_encoder
from moco.train.task import Task
from moco.train.trainer import Trainer


class MoCoTask(Task):
    """Two views of each image; `moco.builder.MoCo`; k-NN of the query encoder's backbone."""

    def build_data(self, device: torch.device) -> ImagePairs:
        return ImagePairs(self.config, device)

    def build_module(self) -> MoCo:
        encoder, objective = self.config.encoder, self.config.objective
        base_encoder = functools.partial(
            encoders.build_encoder,
            encoder.arch,
            image_size=self.config.views.image_size,
            small_stem=encoder.small_stem,
            bn_splits=self.config.bn_groups,
        )
        return MoCo(
            base_encoder,
            encoder.moco_dim,
            encoder.moco_k,
            encoder.moco_m,
            contr_tau=objective.contr_tau if objective.contr_w else None,
            align_alpha=objective.align_alpha if objective.align_w else None,
            unif_t=objective.unif_t if objective.unif_w else None,
            unif_intra_batch=objective.intra_batch,
            mlp=encoder.mlp,
        )

    def losses(
        self, model: nn.Module, batch: tuple[Tensor, Tensor], part: int, parts: int
    ) -> MoCoLosses:
        symmetric = self.config.objective.symmetric
        return model(*batch, part=part, parts=parts, symmetric=symmetric)

    def total(self, losses: MoCoLosses) -> Tensor:
        objective = self.config.objective
        return losses.combine(objective.contr_w, objective.align_w, objective.unif_w)

    def start_from(self, module: MoCo, path: str) -> str:
        return start_from(module, path, self.config.encoder.arch)

    def on_device(self, module: MoCo, device: torch.device) -> None:
        views = self.config.views
        order = memory_format(self.config.speed.channels_last)
        module.prepare = functools.partial(
            normalize, mean=views.mean, std=views.std, memory_format=order
        )
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

    def metrics(self, losses: MoCoLosses) -> dict[str, float]:
        return monitor.batch_metrics(losses)

    def feature_std(self, losses: MoCoLosses) -> Tensor:
        return losses.feature_std()

    def histograms(self, losses: MoCoLosses) -> dict[str, tuple[Tensor, float, float]]:
        return monitor.distributions(losses)

    def begin_log(self, log: RunLog, data: ImagePairs) -> None:
        monitor.lay_out(log, self.config, data.facts)

    def show(self, log: RunLog, batch: tuple[Tensor, Tensor]) -> None:
        monitor.show_views(log, *batch)

    def build_evaluation(self, trainer: Trainer) -> OnlineKnn:
        return OnlineKnn(
            trainer.state.module.encoder_q,
            trainer.data.images,
            self.config,
            trainer.device,
            log=trainer.log,
            printer=trainer.printer,
            stop=trainer.stop,
        )

    def facts(self, module: MoCo, data: ImagePairs) -> dict[str, str]:
        config, encoder = self.config, self.config.encoder
        parameters = sum(p.numel() for p in module.encoder_q.parameters())
        return {
            "objective": config.to_flat()["objective"],
            **self._collapse_fact(),
            "data": f"{len(data.images)} images, {data.steps_per_epoch} steps per epoch, "
            f"{config.schedule.epochs} epochs",
            "batch": self._batch_fact(),
            "batch norm": self._batch_norm_fact(module),
            "encoder": f"{encoder.arch}, {parameters / 1e6:.2f} M parameters, "
            f"{config.views.image_size} px" + (", small stem" if encoder.small_stem else ""),
            "queue": f"{encoder.moco_k} x {encoder.moco_dim}, "
            f"{module.queue.numel() * 4 / 2**20:.1f} MiB",
        }

    def _collapse_fact(self) -> dict[str, str]:
        """A warning where the weights do not exclude a collapse."""
        config, objective = self.config, self.config.objective
        images = config.part_size // config.bn_groups  # that are paired with each other
        push = queue_push(images, config.encoder.moco_k, intra_batch=objective.intra_batch)
        return collapse_warning(objective, push)

    def _batch_fact(self) -> str:
        batch, processes = self.config.optim.batch_size, self.config.placement.processes
        fact = f"{batch} over {processes} process(es), {batch // processes} each"
        if self.config.optim.accumulate > 1:
            fact += (
                f", in {self.config.optim.accumulate} parts of {self.config.part_size}; optimizer, "
                "key encoder and queue advance once per step"
            )
        return fact

    def _batch_norm_fact(self, module: MoCo) -> str:
        config, part, groups = self.config, self.config.part_size, self.config.bn_groups
        accumulate = config.optim.accumulate
        where = "on each device" if accumulate == 1 else "in each part"
        if not has_batch_norm(module.encoder_q):
            return "none in this arch"
        if groups > 1:
            return f"{groups} groups of {part // groups} {where}"
        fact = f"one group of {part} {where}"
        if config.encoder.bn_splits == "auto" and part != 32:
            fact += " (the published runs have groups of 32, which needs a multiple of 32 above 32)"
        if accumulate > 1 and config.placement.processes == 1:
            fact += "; within one group the shuffle has no effect, give --bn-splits 2 or more"
        return fact


def start_from(moco: MoCo, path: str, arch: str) -> str:
    """Start both encoders from the weights in a file; what was found, for people to read.

    Of a MoCo file the query encoder is taken, with its projection head where that fits; of others
    the backbone. The key encoder becomes a copy. Queue, optimizer and epoch are those of a new run.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: it holds no encoder, or another one than `arch`.
    """
    found = start_encoder(moco.encoder_q, path, arch)
    moco.encoder_k.load_state_dict(moco.encoder_q.state_dict())
    return found
