"""What benchmarks share: the ancestors' way of each part, in our own words, and training steps of
ours, of the ancestors and of lightly that begin with the same weights."""

import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision.transforms as T
from PIL import Image, ImageFilter
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from moco import config, distributed, encoders
from moco.builder import MoCo
from moco.log import Means
from moco.precision import autocast
from moco.tasks.moco import MoCoTask
from moco.train.guards import StepGuard
from moco.train.saver import BackgroundWriter
from moco.train.state import TrainState
from moco.train.step import train_step

Step = Callable[[Tensor, Tensor], None]  # of two views of a batch


def align_uniform(q: Tensor, k: Tensor, queue: Tensor, t: float) -> Tensor:
    """align(2) + uniform(t) with intra-batch pairs, by the full N x K matrix and its autograd.

    The queue is cloned, because enqueueing changes it before backward runs.
    """
    n, size = len(q), queue.shape[1]
    align = (2 - 2 * (q * k).sum(dim=1)).mean()
    with_queue = (2 * t * (q @ queue.clone()) - 2 * t).exp().sum()
    in_batch = torch.pdist(q).pow(2).mul(-t).exp().sum()
    return align + ((with_queue + in_batch) / (n * size + n * (n - 1) / 2)).log()


def info_nce(
    q: Tensor, k: Tensor, queue: Tensor, tau: float, hits: bool = True
) -> tuple[Tensor, Tensor | None]:
    """InfoNCE by the full N x (1+K) logits, and top-1 and top-5 hits from the same matrix."""
    positive = (q * k).sum(dim=1, keepdim=True)
    logits = torch.cat([positive, q @ queue.clone()], dim=1) / tau
    target = torch.zeros(len(q), dtype=torch.int64, device=q.device)
    loss = F.cross_entropy(logits, target)
    if not hits:
        return loss, None
    among = logits.topk(5, dim=1).indices == 0
    return loss, torch.stack([among[:, :1].sum(), among.sum()])


@torch.no_grad()
def update_key_encoder(encoder_k: nn.Module, encoder_q: nn.Module, m: float) -> None:
    """The momentum update, one parameter after another."""
    for key, query in zip(encoder_k.parameters(), encoder_q.parameters(), strict=True):
        key.data = m * key + (1 - m) * query


def shuffle(images: Tensor, permutation: Tensor) -> Tensor:
    """This rank's part of the global batch in the order of rank 0's `permutation`: everything is
    sent to everyone, joined to one batch, and indexed."""
    world, rank = distributed.world_size(), distributed.rank()
    parts = list(distributed.all_gather(images).chunk(world))
    order = distributed.all_gather(permutation.to(images.device)).chunk(world)[0]
    return torch.cat(parts)[order.view(world, -1)[rank]]


@dataclass(frozen=True)
class Case:
    """A training step to time; `tau` is that of InfoNCE, None trains align + uniform."""

    arch: str
    size: int
    batch: int
    queue: int
    device: torch.device
    amp: str = "off"
    bn_splits: int = 1
    tau: float | None = None

    def state(self) -> TrainState:
        """The state of a run of main_moco.py, at its beginning."""
        terms = {"contr_w": 0, "align_w": 1, "unif_w": 1}
        if self.tau is not None:
            terms = {"contr_w": 1, "align_w": 0, "unif_w": 0, "contr_tau": self.tau}
        settings = config.PretrainConfig(
            data=config.PretrainData(data="unused"),
            objective=config.Objective(**terms),
            encoder=config.Encoder(
                arch=self.arch, moco_k=self.queue, mlp=True, bn_splits=str(self.bn_splits)
            ),
            views=config.Views(image_size=self.size),
            optim=config.PretrainOptim(batch_size=self.batch, amp=self.amp, seed=0),
            speed=config.Speed(channels_last=True),
            placement=config.Placement(devices=(str(self.device),)),
        )
        task = MoCoTask(settings)
        moco = task.build_module().to(self.device, memory_format=torch.channels_last)
        task.on_device(moco, self.device)
        scaler = torch.amp.GradScaler(self.device.type, enabled=False)
        return TrainState(task, moco, task.build_optimizer(moco), scaler, Means())

    def pair(self, like: MoCo | None = None) -> MoCo:
        """Encoders without groups of batch norm, with the weights of those of `like`."""
        encoder = partial(encoders.build_encoder, self.arch, image_size=self.size)
        pair = MoCo(encoder, 128, 1, align_alpha=2, mlp=True).to(self.device)
        if like is not None:
            pair.encoder_q.load_state_dict(like.encoder_q.state_dict())
            pair.encoder_k.load_state_dict(like.encoder_k.state_dict())
        return pair

    def pixels(self) -> list[Tensor]:
        """Two views, uint8."""
        shape = (self.batch, 3, self.size, self.size)
        return [torch.randint(256, shape, dtype=torch.uint8, device=self.device) for _ in range(2)]


def our_step(state: TrainState) -> Step:
    """The step of main_moco.py, by its own functions, from bytes."""
    guard = StepGuard(state, BackgroundWriter(Path(), keep_last=1, keep_every=0), 0)

    def step(im_q: Tensor, im_k: Tensor) -> None:
        train_step(state.task, state.module, state, guard, (im_q, im_k))
        state.step += 1
        if state.step >= guard.looks.next:
            guard.check(False, False)

    return step


def sgd(module: nn.Module, **options: object) -> torch.optim.SGD:
    return torch.optim.SGD(module.parameters(), 0.03, momentum=0.9, weight_decay=1e-4, **options)


def upstream_step(case: Case, pair: MoCo) -> Step:
    """The ancestors' step of a single process: momentum update in a Python loop, keys shuffled by
    gathering all images, one of the losses above, torch's plain SGD."""
    encoder_q, encoder_k = pair.encoder_q, pair.encoder_k
    queue = F.normalize(torch.randn(128, case.queue, device=case.device), dim=0)
    optimizer, pointer = sgd(encoder_q), 0

    def step(im_q: Tensor, im_k: Tensor) -> None:
        nonlocal pointer
        with autocast(case.device, case.amp):
            q = F.normalize(encoder_q(im_q), dim=1).float()
            with torch.no_grad():
                update_key_encoder(encoder_k, encoder_q, 0.999)
                permutation = torch.randperm(len(im_k), device=im_k.device)
                k = F.normalize(encoder_k(shuffle(im_k, permutation)), dim=1).float()
                k = k[permutation.argsort()]
        if case.tau is None:
            loss = align_uniform(q, k, queue, 3)
        else:
            loss, _ = info_nce(q, k, queue, case.tau)
        queue[:, pointer : pointer + len(k)] = k.T
        pointer = (pointer + len(k)) % case.queue
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def lightly_step(case: Case, pair: MoCo) -> Step:
    """lightly's InfoNCE with its memory bank, projection head, momentum update and batch shuffle.

    Raises:
        ImportError: it is not installed.
    """
    from lightly.loss import NTXentLoss
    from lightly.models.modules import MoCoProjectionHead
    from lightly.models.utils import batch_shuffle, batch_unshuffle, update_momentum

    def network(encoder: nn.Module) -> nn.Module:
        first, last = encoder.fc[0], encoder.fc[2]
        head = MoCoProjectionHead(first.in_features, first.out_features, last.out_features)
        weights = zip(head.state_dict(), encoder.fc.state_dict().values(), strict=True)
        head.load_state_dict(dict(weights))
        encoder.fc = nn.Identity()
        return nn.Sequential(encoder, head).to(case.device)

    network_q, network_k = network(pair.encoder_q), network(pair.encoder_k)
    bank = (case.queue, 128)
    criterion = NTXentLoss(temperature=case.tau or 0.2, memory_bank_size=bank).to(case.device)
    optimizer = sgd(network_q)

    def step(im_q: Tensor, im_k: Tensor) -> None:
        with autocast(case.device, case.amp):
            query = network_q(im_q)
            update_momentum(network_q, network_k, m=0.999)
            with torch.no_grad():
                shuffled, order = batch_shuffle(im_k)
                key = batch_unshuffle(network_k(shuffled), order)
        loss = criterion(query.float(), key.float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def v2_transform(image_size: int) -> T.Compose:
    """MoCo v2's view by torchvision's classes on Pillow images, normalised by the loader."""

    def blur(image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))

    return T.Compose([
        T.RandomResizedCrop(image_size, scale=(0.2, 1.0)),
        T.RandomApply([T.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
        T.RandomGrayscale(p=0.2),
        T.RandomApply([blur], p=0.5),
        T.RandomHorizontalFlip(),
        T.ToTensor(),
        T.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ])  # fmt: skip
