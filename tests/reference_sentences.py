"""Slow float64 losses of consecutive sentences, written from arXiv:2005.10242, appendix B.3, alone.

Loops over Python floats, sentences numbered from 1 as in the paper. `documents[i - 1]` is the
document of sentence i: only neighbours of one document are positives.
"""

import math
from collections.abc import Sequence

Rows = Sequence[Sequence[float]]


def targets(documents: Sequence[int]) -> dict[tuple[int, int], float]:
    """(i, j) -> p_i(j), the share of each neighbour; sentences without one have none."""
    k = len(documents)
    shares = {}
    for i in range(1, k + 1):
        near = [j for j in (i - 1, i + 1) if 1 <= j <= k and documents[j - 1] == documents[i - 1]]
        shares |= {(i, j): 1 / len(near) for j in near}
    return shares


def _rows_with_neighbours(documents: Sequence[int]) -> int:
    return len({i for i, _ in targets(documents)})


def contrastive(
    u: Rows, v: Rows, tau: float, documents: Sequence[int], zero_diagonal: bool = False
) -> float:
    """Cross-entropy of softmax_j(u_i . v_j / tau) with p_i, mean over i with a neighbour."""
    k = len(u)
    total = 0.0
    for (i, j), share in targets(documents).items():
        logits = [math.fsum(a * b for a, b in zip(u[i - 1], row, strict=True)) / tau for row in v]
        if zero_diagonal:
            logits[i - 1] = 0.0
        top = max(logits)
        log_sum = top + math.log(math.fsum(math.exp(logit - top) for logit in logits))
        total += share * (log_sum - logits[j - 1])
    assert k == len(v)
    return total / _rows_with_neighbours(documents)


def _distance(x: Sequence[float], y: Sequence[float]) -> float:
    return math.sqrt(math.fsum((a - b) ** 2 for a, b in zip(x, y, strict=True)))


def align(u: Rows, v: Rows, alpha: float, documents: Sequence[int]) -> float:
    """The positives of the contrastive loss with its weights."""
    total = math.fsum(
        share * _distance(u[i - 1], v[j - 1]) ** alpha
        for (i, j), share in targets(documents).items()
    )
    return total / _rows_with_neighbours(documents)


def align_as_printed(u: Rows, v: Rows, alpha: float) -> float:
    """Forward pairs of one document, the sum's upper limit K - 1 in place of the printed K - 2."""
    k = len(u)

    def at(i: int, j: int) -> float:
        return _distance(u[i - 1], v[j - 1]) ** alpha

    inner = math.fsum(at(i - 1, i) + at(i, i + 1) for i in range(2, k))
    return at(1, 2) / k + inner / (2 * k) + at(k - 1, k) / k


def uniform(x: Rows, t: float) -> float:
    k = len(x)
    pairs = [(i, j) for i in range(k) for j in range(i + 1, k)]
    return math.log(math.fsum(math.exp(-t * _distance(x[i], x[j]) ** 2) for i, j in pairs)) - (
        math.log(len(pairs))
    )
