"""Named terms of an objective, for tasks whose module has no class of losses of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor


class Losses:
    """Terms by name, scalars with gradient.

    Args:
        terms: name -> scalar.
    """

    def __init__(self, terms: Mapping[str, Tensor]) -> None:
        self.terms = dict(terms)

    def items(self) -> Iterator[tuple[str, Tensor]]:
        return iter(self.terms.items())

    def weighted(self, weights: Mapping[str, float]) -> Tensor:
        """The sum of weight * term; terms of weight 0 are left out, as 0 * inf is NaN."""
        terms = [weights[name] * term for name, term in self.items() if weights[name] != 0]
        return torch.stack(terms).sum()

    @classmethod
    def mean(cls, parts: Sequence[Losses]) -> Losses:
        """Each term averaged over parts, which have the same terms."""
        names = parts[0].terms
        return cls({name: torch.stack([p.terms[name] for p in parts]).mean() for name in names})
