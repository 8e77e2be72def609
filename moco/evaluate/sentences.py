"""Features of sentences, and their alignment and uniformity on text that was held out."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from align_uniform.metrics import uniformity_curve
from align_uniform.sentences import adjacent_align_loss
from moco.data.text import Sentences
from moco.sentence_encoders import QuickThought


@torch.no_grad()
def encode(
    module: QuickThought, sentences: Sentences, device: torch.device, *, batch: int = 400
) -> tuple[Tensor, Tensor]:
    """Unit features by f and by g, (N, C) float32 each on the CPU, in the order of the sentences.

    Sentences of about one length go through together.
    """
    found: tuple[list[Tensor], list[Tensor]] = ([], [])
    words, lengths = sentences.padded()
    order = lengths.argsort(stable=True)
    for rows in order.split(batch):
        length = lengths[rows]
        features = module(words[rows, : int(length.max())].to(device), length)
        for parts, rows_features in zip(found, features, strict=True):
            parts.append(F.normalize(rows_features.float(), dim=1).cpu())
    back = order.argsort()
    return torch.cat(found[0])[back], torch.cat(found[1])[back]


def neighbour_metrics(
    u: Tensor, v: Tensor, documents: Tensor, *, alpha: float = 2, t: float = 2, most: int = 10_000
) -> dict[str, float]:
    """Alignment and uniformity as the paper compares encoders (Figure 9b).

    Args:
        u, v: (N, C) unit features by f and g of sentences in a row.
        documents: (N,) neighbours are of one document.
        most: uniformity is that of so many sentences, evenly spread.

    Returns:
        `alignment` of neighbours, f with g, both ways; `uniformity`: the mean of `uniformity_f` and
        `uniformity_g`.
    """
    some = torch.arange(min(len(u), most)) * len(u) // min(len(u), most)
    (of_f,), (of_g,) = uniformity_curve(u[some], [t]), uniformity_curve(v[some], [t])
    return {
        "alignment": adjacent_align_loss(u, v, alpha, documents).item(),
        "uniformity": (of_f + of_g) / 2,
        "uniformity_f": of_f,
        "uniformity_g": of_g,
    }
