"""What the fast paths are measured against: the ancestors' way of doing it, in our own words."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision.transforms as T
from PIL import Image, ImageFilter
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from moco import distributed


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


class Step:
    """One whole training step of a single process: momentum update in a Python loop, keys shuffled
    by gathering all images, one of the losses above, torch's plain SGD.

    Args:
        encoder_q, encoder_k: networks of equal weights.
        queue_size, dim: of the queue of keys, (dim, queue_size).
        amp: encoders under bf16 autocast.
        tau: of InfoNCE, with its hits; None trains align + uniform.
    """

    def __init__(
        self,
        encoder_q: nn.Module,
        encoder_k: nn.Module,
        queue_size: int,
        dim: int,
        *,
        amp: bool,
        tau: float | None = None,
    ) -> None:
        self.encoder_q, self.encoder_k, self.amp, self.tau = encoder_q, encoder_k, amp, tau
        device = next(encoder_q.parameters()).device
        self.queue = F.normalize(torch.randn(dim, queue_size, device=device), dim=0)
        self.pointer = 0
        self.optimizer = torch.optim.SGD(
            encoder_q.parameters(), 0.03, momentum=0.9, weight_decay=1e-4
        )

    def __call__(self, im_q: Tensor, im_k: Tensor) -> None:
        with torch.autocast(im_q.device.type, torch.bfloat16, enabled=self.amp):
            q = F.normalize(self.encoder_q(im_q), dim=1)
            with torch.no_grad():
                update_key_encoder(self.encoder_k, self.encoder_q, 0.999)
                permutation = torch.randperm(len(im_k), device=im_k.device)
                k = F.normalize(self.encoder_k(shuffle(im_k, permutation)), dim=1)
                k = k[permutation.argsort()]
        if self.tau is None:
            loss = align_uniform(q.float(), k.float(), self.queue, 3)
        else:
            loss, _ = info_nce(q.float(), k.float(), self.queue, self.tau)
        self.enqueue(k)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def enqueue(self, k: Tensor) -> None:
        self.queue[:, self.pointer : self.pointer + len(k)] = k.T
        self.pointer = (self.pointer + len(k)) % self.queue.shape[1]


class PillowBlur:
    """Gaussian blur of a Pillow image, sigma uniform from 0.1 to 2."""

    def __call__(self, image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))


def v2_transform(image_size: int) -> T.Compose:
    """MoCo v2's view by torchvision's classes on Pillow images, normalised by the loader."""
    return T.Compose([
        T.RandomResizedCrop(image_size, scale=(0.2, 1.0)),
        T.RandomApply([T.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
        T.RandomGrayscale(p=0.2),
        T.RandomApply([PillowBlur()], p=0.5),
        T.RandomHorizontalFlip(),
        T.ToTensor(),
        T.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ])  # fmt: skip
