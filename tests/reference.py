"""Slow float64 re-implementation of the objective and of whole MoCo steps, to test against.

Written from the equations of arXiv:2005.10242 and arXiv:1911.05722 and from nothing else: it
imports neither `align_uniform` nor `moco`. Every loss is here twice: as a literal tensor
expression, which autograd differentiates, and as a double loop over Python floats (`loop_*`), which
is what a reader compares with the paper. `test_losses.py` shows that the two agree.

Shapes: x, y, q, k (N, C); queue (C, K), one feature per column. Squared distances are always
((x - y) ** 2).sum(), never 2 - 2 <x, y>, so nothing here needs unit rows.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def unit_rows(n: int, c: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """(n, c) rows, uniformly distributed on the sphere."""
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(n, c, dtype=dtype, generator=generator), dim=1)


# ---------------------------------------------------------------------------- the four losses


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """||x_i - y_j||^2 for every i and j, shape (len(x), len(y)), in float64."""
    return ((x.double()[:, None, :] - y.double()[None, :, :]) ** 2).sum(dim=2)


def pair_squared_distances(x: Tensor) -> Tensor:
    """||x_i - x_j||^2 of the N(N-1)/2 unordered pairs i < j, in float64."""
    i, j = torch.triu_indices(len(x), len(x), offset=1)
    return ((x.double()[i] - x.double()[j]) ** 2).sum(dim=1)


def align(x: Tensor, y: Tensor, alpha: float = 2) -> Tensor:
    """mean_i ||x_i - y_i||^alpha."""
    return ((x.double() - y.double()) ** 2).sum(dim=1).pow(alpha / 2).mean()


def uniform(x: Tensor, t: float = 2) -> Tensor:
    """log of the mean of exp(-t ||x_i - x_j||^2) over unordered pairs (Figure 6)."""
    exponents = -t * pair_squared_distances(x)
    return exponents.logsumexp(dim=0) - math.log(len(exponents))


def uniform_with_queue(q: Tensor, queue: Tensor, t: float = 2, intra_batch: bool = True) -> Tensor:
    """Eq. 21 (queue only), or Eq. 22 with every pair of the batch counted once."""
    exponents = -t * squared_distances(q, queue.t()).flatten()
    if intra_batch:
        exponents = torch.cat([exponents, -t * pair_squared_distances(q)])
    return exponents.logsumexp(dim=0) - math.log(len(exponents))


def info_nce_logits(q: Tensor, k: Tensor, queue: Tensor, tau: float) -> Tensor:
    """(N, 1 + K): <q_i, k_i> / tau, then <q_i, queue_j> / tau."""
    positive = (q.double() * k.double()).sum(dim=1, keepdim=True)
    return torch.cat([positive, q.double() @ queue.double()], dim=1) / tau


def info_nce(q: Tensor, k: Tensor, queue: Tensor, tau: float) -> Tensor:
    """mean_i -log( exp(<q_i, k_i> / tau) / sum over k_i and the queue )."""
    logits = info_nce_logits(q, k, queue, tau)
    return (logits.logsumexp(dim=1) - logits[:, 0]).mean()


def in_batch_info_nce(x: Tensor, y: Tensor, tau: float) -> Tensor:
    """Mean of the row-wise and the column-wise cross-entropy of x y^T / tau, labels 0..K-1."""
    scores = x.double() @ y.double().t() / tau
    rows = scores.logsumexp(dim=1) - scores.diagonal()
    columns = scores.logsumexp(dim=0) - scores.diagonal()
    return (rows.mean() + columns.mean()) / 2


# ------------------------------------------------------- the same as loops over Python floats


def _rows(x: Tensor) -> list[list[float]]:
    return x.detach().double().tolist()


def _squared_distance(x: list[float], y: list[float]) -> float:
    return math.fsum((a - b) ** 2 for a, b in zip(x, y, strict=True))


def _dot(x: list[float], y: list[float]) -> float:
    return math.fsum(a * b for a, b in zip(x, y, strict=True))


def _log_mean_exp(exponents: list[float]) -> float:
    largest = max(exponents)
    total = math.fsum(math.exp(e - largest) for e in exponents)
    return largest + math.log(total / len(exponents))


def loop_align(x: Tensor, y: Tensor, alpha: float = 2) -> float:
    """`align` by a loop."""
    pairs = zip(_rows(x), _rows(y), strict=True)
    return math.fsum(math.sqrt(_squared_distance(a, b)) ** alpha for a, b in pairs) / len(x)


def loop_uniform(x: Tensor, t: float = 2, self_pairs: bool = False) -> float:
    """`uniform` by a double loop over i < j; with self-pairs over all i and j."""
    rows = _rows(x)
    exponents = []
    for i in range(len(rows)):
        for j in range(0 if self_pairs else i + 1, len(rows)):
            exponents.append(-t * _squared_distance(rows[i], rows[j]))
    return _log_mean_exp(exponents)


def loop_uniform_between(x: Tensor, y: Tensor, t: float = 2) -> float:
    """log of the mean of exp(-t ||x_i - y_j||^2) over all i and j."""
    others = _rows(y)
    return _log_mean_exp([-t * _squared_distance(a, b) for a in _rows(x) for b in others])


def loop_uniform_weighted(x: Tensor, weights: Sequence[float], t: float = 2) -> float:
    """log( sum_{i<j} w_i w_j exp(-t ||x_i - x_j||^2) / sum_{i<j} w_i w_j )."""
    rows = _rows(x)
    total = pairs = 0.0
    for i in range(len(rows)):
        for j in range(i + 1, len(rows)):
            weight = float(weights[i]) * float(weights[j])
            total += weight * math.exp(-t * _squared_distance(rows[i], rows[j]))
            pairs += weight
    return math.log(total / pairs)


def loop_deviation(x: Tensor) -> list[float]:
    """Standard deviation (divided by N) of each column."""
    deviations = []
    for column in zip(*_rows(x), strict=True):
        mean = math.fsum(column) / len(column)
        deviations.append(math.sqrt(math.fsum((v - mean) ** 2 for v in column) / len(column)))
    return deviations


def loop_uniform_with_queue(
    q: Tensor, queue: Tensor, t: float = 2, intra_batch: bool = True
) -> float:
    """`uniform_with_queue` by double loops over (i, queue j) and over i < j."""
    rows, negatives = _rows(q), _rows(queue.t())
    exponents = []
    for row in rows:
        for negative in negatives:
            exponents.append(-t * _squared_distance(row, negative))
    if intra_batch:
        for i in range(len(rows)):
            for j in range(i + 1, len(rows)):
                exponents.append(-t * _squared_distance(rows[i], rows[j]))
    return _log_mean_exp(exponents)


def loop_info_nce(q: Tensor, k: Tensor, queue: Tensor, tau: float) -> float:
    """`info_nce` by a double loop."""
    negatives = _rows(queue.t())
    losses = []
    for query, key in zip(_rows(q), _rows(k), strict=True):
        logits = [_dot(query, key) / tau]
        for negative in negatives:
            logits.append(_dot(query, negative) / tau)
        losses.append(_log_mean_exp(logits) + math.log(len(logits)) - logits[0])
    return math.fsum(losses) / len(losses)


def loop_in_batch_info_nce(x: Tensor, y: Tensor, tau: float) -> float:
    """`in_batch_info_nce` by double loops, one for each direction."""
    losses = []
    for ones, others in ((_rows(x), _rows(y)), (_rows(y), _rows(x))):
        for i, row in enumerate(ones):
            logits = [_dot(row, other) / tau for other in others]
            losses.append(_log_mean_exp(logits) + math.log(len(logits)) - logits[i])
    return math.fsum(losses) / len(losses)


# ------------------------------------------------------------------------------- MoCo, whole steps


@dataclass
class ReferenceStep:
    """What one step produced: lists have one entry per rank, none for a term that is off."""

    loss: Tensor  # mean over ranks of the weighted sums: what the gradient is taken of
    loss_contr: list[Tensor]
    logits_contr: list[Tensor]
    loss_align: list[Tensor]
    loss_unif: list[Tensor]
    queries: list[Tensor]
    keys: list[Tensor]
    gradients: list[Tensor | None]  # of encoder_q.parameters(), averaged over ranks


class ReferenceMoCo:
    """MoCo training on R ranks, in one process and in float64.

    Args:
        encoder_q, encoder_k: any pair of equal modules that map images to (N, C); copied, then
            cast to float64. Their train / eval mode is kept.
        queue: (C, K) unit columns, copied.
        queue_ptr: the column that the next key goes to.
        m: share of itself that the key encoder keeps in a step.
        lr, momentum, weight_decay: of SGD; `lr` may be set anew between steps.
        contr_tau, align_alpha, unif_t: a term whose parameter is None is off.
        unif_intra_batch: Eq. 22 rather than Eq. 21.
        contr_w, align_w, unif_w: weights of the terms that are on.

    Running statistics of batch norm follow the forward passes of all ranks one after another, so
    they equal those of a real run only for R = 1; outputs in train mode do not depend on them.
    """

    def __init__(
        self,
        encoder_q: nn.Module,
        encoder_k: nn.Module,
        queue: Tensor,
        queue_ptr: int = 0,
        *,
        m: float,
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
        contr_tau: float | None = None,
        align_alpha: float | None = None,
        unif_t: float | None = None,
        unif_intra_batch: bool = True,
        contr_w: float = 1.0,
        align_w: float = 1.0,
        unif_w: float = 1.0,
    ) -> None:
        self.encoder_q = copy.deepcopy(encoder_q).double()
        self.encoder_k = copy.deepcopy(encoder_k).double()
        self.queue = queue.detach().double().clone()
        self.queue_ptr = int(queue_ptr)
        self.m = m
        self.lr, self.momentum, self.weight_decay = lr, momentum, weight_decay
        self.contr_tau, self.align_alpha, self.unif_t = contr_tau, align_alpha, unif_t
        self.unif_intra_batch = unif_intra_batch
        self.contr_w, self.align_w, self.unif_w = contr_w, align_w, unif_w
        self.velocities: list[Tensor | None] = [None for _ in self.encoder_q.parameters()]

    def step(
        self,
        im_q: Tensor | Sequence[Tensor],
        im_k: Tensor | Sequence[Tensor],
        key_order: Tensor | None = None,
    ) -> ReferenceStep:
        """One training step; afterwards encoders, queue, pointer and velocities are the new ones.

        Args:
            im_q, im_k: two views of the batch, a list with one (N, ...) tensor per rank; a plain
                tensor is a list of one.
            key_order: permutation of all R * N samples by which the key views are dealt out to the
                ranks (and to the groups of a split batch norm) before they are encoded. It has no
                effect on encoders that treat samples one by one.
        """
        im_q = [im_q] if isinstance(im_q, Tensor) else list(im_q)
        im_k = [im_k] if isinstance(im_k, Tensor) else list(im_k)

        self._update_key_encoder()
        keys = self._encode_keys([view.double() for view in im_k], key_order)
        queries = [_unit(self.encoder_q(view.double())) for view in im_q]

        out = ReferenceStep(torch.zeros(()).double(), [], [], [], [], queries, keys, [])
        for q, k in zip(queries, keys, strict=True):
            out.loss = out.loss + self._rank_loss(q, k, out) / len(queries)

        self.encoder_q.zero_grad(set_to_none=True)
        out.loss.backward()
        out.gradients = [p.grad for p in self.encoder_q.parameters()]

        self._enqueue(torch.cat(keys))
        self._sgd_step()
        return out

    @torch.no_grad()
    def _update_key_encoder(self) -> None:
        """key <- m key + (1 - m) query: parameters only, buffers are the key encoder's own."""
        pairs = zip(self.encoder_k.parameters(), self.encoder_q.parameters(), strict=True)
        for key, query in pairs:
            key.copy_(self.m * key + (1 - self.m) * query)

    @torch.no_grad()
    def _encode_keys(self, im_k: list[Tensor], key_order: Tensor | None) -> list[Tensor]:
        samples = torch.cat(im_k)
        if key_order is None:
            key_order = torch.arange(len(samples))
        encoded = torch.cat([self.encoder_k(v) for v in samples[key_order].chunk(len(im_k))])
        keys = torch.empty_like(encoded)
        keys[key_order] = _unit(encoded)
        return list(keys.chunk(len(im_k)))

    def _rank_loss(self, q: Tensor, k: Tensor, out: ReferenceStep) -> Tensor:
        """The weighted sum on one rank, against the queue from before the batch."""
        loss = torch.zeros(()).double()
        if self.contr_tau is not None:
            out.logits_contr.append(info_nce_logits(q, k, self.queue, self.contr_tau))
            out.loss_contr.append(info_nce(q, k, self.queue, self.contr_tau))
            loss = loss + self.contr_w * out.loss_contr[-1]
        if self.align_alpha is not None:
            out.loss_align.append(align(q, k, self.align_alpha))
            loss = loss + self.align_w * out.loss_align[-1]
        if self.unif_t is not None:
            out.loss_unif.append(
                uniform_with_queue(q, self.queue, self.unif_t, self.unif_intra_batch)
            )
            loss = loss + self.unif_w * out.loss_unif[-1]
        return loss

    @torch.no_grad()
    def _enqueue(self, keys: Tensor) -> None:
        """Rank 0's keys first, one after another, going on at column 0 after the last one."""
        self.queue = self.queue.clone()  # the losses of this step go on showing the old queue
        for key in keys:
            self.queue[:, self.queue_ptr] = key
            self.queue_ptr = (self.queue_ptr + 1) % self.queue.shape[1]

    @torch.no_grad()
    def _sgd_step(self) -> None:
        """v <- momentum v + g + weight_decay p, with v = 0 at first; then p <- p - lr v.

        torch.optim.SGD's form: the rate is outside the velocity, and there is no dampening.
        """
        for i, p in enumerate(self.encoder_q.parameters()):
            if p.grad is None:
                continue
            direction = p.grad + self.weight_decay * p
            velocity = self.velocities[i]
            velocity = direction if velocity is None else self.momentum * velocity + direction
            self.velocities[i] = velocity
            p.copy_(p - self.lr * velocity)


def _unit(x: Tensor) -> Tensor:
    return x / (x**2).sum(dim=1, keepdim=True).sqrt()
