"""What the fast paths are measured against: the ancestors' way of doing it, in our own words."""

from __future__ import annotations

import random

import torch
import torch.nn.functional as F
import torchvision.transforms as T
from PIL import Image, ImageFilter
from torch import Tensor


def align_uniform(q: Tensor, k: Tensor, queue: Tensor, t: float) -> Tensor:
    """align(2) + uniform(t) with intra-batch pairs, by the full N x K matrix and its autograd.

    The queue is cloned, because enqueueing changes it before backward runs.
    """
    n, size = len(q), queue.shape[1]
    align = (2 - 2 * (q * k).sum(dim=1)).mean()
    with_queue = (2 * t * (q @ queue.clone()) - 2 * t).exp().sum()
    in_batch = torch.pdist(q).pow(2).mul(-t).exp().sum()
    return align + ((with_queue + in_batch) / (n * size + n * (n - 1) / 2)).log()


def info_nce(q: Tensor, k: Tensor, queue: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    """InfoNCE by the full N x (1+K) logits, and top-1 and top-5 hits from the same matrix."""
    positive = (q * k).sum(dim=1, keepdim=True)
    logits = torch.cat([positive, q @ queue.clone()], dim=1) / tau
    target = torch.zeros(len(q), dtype=torch.int64, device=q.device)
    hits = logits.topk(5, dim=1).indices == 0
    return F.cross_entropy(logits, target), torch.stack([hits[:, :1].sum(), hits.sum()])


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
