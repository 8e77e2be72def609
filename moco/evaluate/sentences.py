"""Features of sentences, and their alignment and uniformity on text that was held out."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from align_uniform.metrics import uniformity_curve
from align_uniform.sentences import adjacent_align_loss
from moco.checkpoint import load_sentence_encoders
from moco.data.text import Sentences, Vocabulary, read_sentences
from moco.evaluate.measure import Quantities, measure_layer, report
from moco.precision import kernels
from moco.sentence_encoders import QuickThought


@torch.no_grad()
def encode(
    module: QuickThought, sentences: Sentences, device: torch.device, *, batch: int = 400
) -> tuple[Tensor, Tensor]:
    """Unit features by f and by g, (N, C) float32 each on the CPU, in the order of the sentences.

    Sentences of about one length go through together.
    """
    if not len(sentences):  # a rank's share, where ranks are more than sentences
        empty = torch.empty(0, 2 * module.f.gru.hidden_size)
        return empty, empty
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


@kernels(deterministic=False)
def measure_sentences(
    path: str | os.PathLike,
    text: str | os.PathLike,
    quantities: Quantities,
    device: torch.device,
    *,
    most: int,
    batch: int = 400,
) -> dict:
    """Measure the sentence encoders of a file on the first sentences of a text: as many as the run
    held out, so that of the text that it trained on these are the held-out ones.

    Returns:
        A report as `moco.evaluate.measure.measure_encoder` gives it, of the "layers" `sentences`
        (alignment of f with g, other numbers the mean of f and g), `f` and `g`.

    Raises:
        DataError, CheckpointError, FileNotFoundError: see `read_sentences` and
            `load_sentence_encoders`.
    """
    module, info = load_sentence_encoders(path)
    args = info["args"]
    vocabulary = Vocabulary(info["vocabulary"], lower=info["lower"], length=args.get("length"))
    held_out = min(most, args.get("val_sentences") or most)
    sentences = read_sentences(
        text, vocabulary, most=held_out, encoding=args.get("encoding", "utf-8")
    )
    documents = torch.from_numpy(sentences.documents.astype("int64"))
    if args.get("across_documents"):
        documents = torch.zeros_like(documents)
    else:
        beginning = f"the beginning of {text}, {len(sentences)} sentences,"
        sentences.require_neighbours(beginning, "take blank lines out")
    u, v = encode(module.to(device), sentences, device, batch=batch)
    alignment = {
        f"{alpha:g}": adjacent_align_loss(u, v, alpha, documents).item()
        for alpha in quantities.alphas
    }
    of_one = replace(quantities, intervals=False)
    layers = {
        name: {**measure_layer(x, None, None, of_one, device, text), "alignment": alignment}
        for name, x in (("f", u), ("g", v))
    }
    layers = {"sentences": _mean(layers["f"], layers["g"]), **layers}
    facts = {n: info[n] for n in ("checkpoint", "task", "arch", "epoch", "objective")}
    facts |= {"pretrained_epochs": info["epoch"], "data": str(text), "unit": "sentences"}
    notes = [
        "alignment is of neighbours, f with g; of the two encoders' other numbers the first column "
        f"has the mean. {100 * sentences.unknown_share():.2f} % of the words are unknown"
    ]
    return report(facts, layers, len(sentences), quantities, notes)


def _mean(a: Any, b: Any) -> Any:
    """Of numbers in nested dicts; what is equal stays, what one of them lacks is None."""
    if isinstance(a, dict):
        return {name: _mean(a[name], b[name]) for name in a}
    if a is None or b is None:
        return None
    return a if a == b else (a + b) / 2
