"""Sentence encoders: word embeddings and a bidirectional GRU; two of them as in Quick-Thought."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence


class SentenceEncoder(nn.Module):
    """Embeddings from U(-0.1, 0.1) and a bidirectional GRU; a sentence is its two final states.

    torch's GRU applies the reset gate after the product with the state and draws all its weights
    from U(-1/sqrt(hidden), 1/sqrt(hidden)); that of the original code applies it before, and begins
    with biases of 1 at the gates.

    Args:
        vocabulary: number of words.
        emb: dimension of the embeddings.
        hidden: units in each direction.
    """

    def __init__(self, vocabulary: int, emb: int, hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, emb)
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1)
        self.gru = nn.GRU(emb, hidden, batch_first=True, bidirectional=True)

    def forward(self, words: Tensor, lengths: Tensor) -> Tensor:
        """Features (N, 2 * hidden) of sentences.

        Args:
            words: (N, L) int64, word numbers; what lies behind a sentence's end does not count.
            lengths: (N,) int64 on the CPU, each at least 1.
        """
        packed = pack_padded_sequence(
            self.embedding(words), lengths, batch_first=True, enforce_sorted=False
        )
        _, final = self.gru(packed)  # (2, N, hidden)
        return torch.cat([final[0], final[1]], dim=1)


class QuickThought(nn.Module):
    """Two encoders f and g with nothing in common (Logeswaran & Lee 2018, arXiv:1803.02893)."""

    def __init__(self, vocabulary: int, emb: int, hidden: int) -> None:
        super().__init__()
        self.f = SentenceEncoder(vocabulary, emb, hidden)
        self.g = SentenceEncoder(vocabulary, emb, hidden)

    def forward(self, words: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Features by f and by g, (N, 2 * hidden) each, of any length; see `SentenceEncoder`."""
        return self.f(words, lengths), self.g(words, lengths)
