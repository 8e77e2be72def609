"""The MoCo module: query encoder, momentum (key) encoder, queue, and one training step.

Shapes: N batch on this rank, W ranks, K queue, C = dim feature dimension.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from align_uniform import align_loss, contrastive_loss, contrastive_rank, uniform_loss_with_queue
from moco import distributed
from moco.batch_norm import fold_statistics
from moco.encoders import add_mlp_head
from moco.profiling import label


class MoCo(nn.Module):
    """MoCo with any mix of alignment, uniformity and InfoNCE (arXiv:1911.05722, 2005.10242).

    Args:
        base_encoder: called twice as `base_encoder(num_classes=dim)`; returns a torchvision-like
            network. Its batch norm is the caller's business: MoCo changes none.
        dim: feature dimension C.
        K: queue size; any number that is at least one global batch.
        m: momentum of the key encoder, key <- m * key + (1 - m) * query, in [0, 1].
        contr_tau: temperature of the InfoNCE term; None leaves the term out.
        align_alpha: exponent of the alignment term, >= 1; None leaves the term out.
        unif_t: t of the uniformity term; None leaves the term out.
        unif_intra_batch: the uniformity term also counts the pairs within the group (see
            `group_size`; Eq. 22 of arXiv:2005.10242) or only query-queue pairs (Eq. 21).
        mlp: two-layer projection head as in MoCo v2 (arXiv:2003.04297).
        group_size: images of a group, which are consecutive in the global batch: the uniformity
            term takes its log and its pairs within a group, and is the mean over groups. A rank can
            hold several groups, or a group can be spread over several ranks. None: what a rank (or
            its part of a step) holds is a group, as in upstream's.

    Raises:
        ValueError: no term, or a number outside the ranges above.

    The state dict has upstream MoCo's names: `encoder_q.*`, `encoder_k.*`, `queue` (C, K),
    `queue_ptr` (1,). The state of `shuffle_generator`, which draws the key shuffle and must be
    equal on all ranks, is not in it and belongs into a checkpoint beside it.
    """

    def __init__(
        self,
        base_encoder: Callable[..., nn.Module],
        dim: int = 128,
        K: int = 65536,
        m: float = 0.999,
        *,
        contr_tau: float | None = None,
        align_alpha: float | None = None,
        unif_t: float | None = None,
        unif_intra_batch: bool = True,
        mlp: bool = False,
        group_size: int | None = None,
    ) -> None:
        super().__init__()
        if contr_tau is None and align_alpha is None and unif_t is None:
            raise ValueError(
                "an objective needs a term: give contr_tau, align_alpha or unif_t (all are None)"
            )
        for name, value, least in (
            ("contr_tau", contr_tau, 0),
            ("align_alpha", align_alpha, 1),
            ("unif_t", unif_t, 0),
        ):
            if value is not None and not (0 < value < math.inf and value >= least):
                wanted = f"at least {least}" if least else "positive"
                raise ValueError(f"{name} must be {wanted} and finite, got {value!r}")
        if not 0 <= m <= 1:
            raise ValueError(f"m must be in [0, 1], got {m!r}")
        if dim < 1 or K < 1:
            raise ValueError(f"dim and K must be at least 1, got dim={dim!r} and K={K!r}")
        if group_size is not None and group_size < 1:
            raise ValueError(f"group_size must be at least 1, got {group_size!r}")
        self.K = K
        self.m = m
        self.group_size = group_size
        self.contr_tau = contr_tau
        self.align_alpha = align_alpha
        self.unif_t = unif_t
        self.unif_intra_batch = unif_intra_batch

        # In upstream's order, so that one seed gives one set of initial weights in both.
        self.encoder_q = base_encoder(num_classes=dim)
        self.encoder_k = base_encoder(num_classes=dim)
        if mlp:
            add_mlp_head(self.encoder_q)
            add_mlp_head(self.encoder_k)
        self.encoder_k.load_state_dict(self.encoder_q.state_dict())
        self.encoder_k.requires_grad_(False)
        self._batch_norms = [
            encoder.batch_norms
            for encoder in (self.encoder_q, self.encoder_k)
            if hasattr(encoder, "batch_norms")
        ]
        for norms in self._batch_norms:
            norms.fold_each_pass = False

        # Stored row by row, one key after another, and shown as the transpose, which is the name
        # and shape that checkpoints have: enqueueing then writes whole rows, sweeps read them.
        keys = F.normalize(torch.randn(dim, K), dim=0)  # (C, K)
        self.register_buffer("queue", keys.t().contiguous().t())
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.int64))

        # Applied to images right before an encoder sees them. Keys are shuffled before it, so that
        # ranks exchange the bytes of pixels rather than normalised floats.
        self.prepare: Callable[[Tensor], Tensor] = _as_they_are

        self.shuffle_generator = torch.Generator().manual_seed(0)
        self._keys: list[Tensor] = []  # of this step, not yet in the queue; one for each direction
        self._parts_done = 0
        self._overwritten: tuple[Tensor, Tensor] | None = None  # by the keys of the last step
        self._steps = 0  # tells MoCoLosses when the queue it looks at has moved on

    def forward(
        self,
        im_q: Tensor,
        im_k: Tensor,
        *,
        part: int = 0,
        parts: int = 1,
        symmetric: bool = False,
    ) -> MoCoLosses:
        """One MoCo step on this rank's batch: everything but the optimizer.

        Updates the key encoder, encodes both views, computes the losses against the queue from
        before this batch, then enqueues the keys of all ranks.

        A batch that is too large for the memory goes through in `parts` calls with the same images,
        the optimizer stepping after the last one. They compute what one call does: the key encoder
        is updated in part 0, which also encodes the keys, in as many pieces; each part has its
        share of the queries; every part sees the queue from before the step; the keys enter it
        after the last one; and the loss of the step is the mean over the parts' losses (divide each
        by `parts` before its backward).

        Args:
            im_q, im_k: (N, 3, H, W) two views of the same N images, of a type that `prepare` turns
                into the encoders' input; N is equal on all ranks.
            part, parts: this call is number `part`, 0 to parts - 1 in turn; its queries are the
                part-th of `parts` equal pieces of the batch.
            symmetric: both views are queries and both are keys: each loss is the sum of those of
                (q(im_q), k(im_k)) and (q(im_k), k(im_q)), and the keys of im_k, then those of im_q
                are enqueued. The key encoder is updated once.

        Raises:
            ValueError: views of different shape, a batch that does not split into the parts or
                groups, K smaller than the keys of one step, or a part out of turn.
        """
        if im_q.shape != im_k.shape:
            raise ValueError(
                f"the two views must have one shape, got {tuple(im_q.shape)}, {tuple(im_k.shape)}"
            )
        directions = [(im_q, im_k), (im_k, im_q)] if symmetric else [(im_q, im_k)]
        self._check_queue_holds(len(im_q), len(directions))
        if not 0 <= part < parts or part not in (0, self._parts_done):
            raise ValueError(
                f"parts of a step come in turn, from 0 to parts - 1, got part={part!r} of "
                f"{parts!r} after {self._parts_done}"
            )
        if len(im_q) % parts:
            raise ValueError(f"a batch of {len(im_q)} does not split into {parts} equal parts")
        self._span(len(im_q) // parts)  # refuses groups that do not fit
        if part == 0:
            self._begin_step()
        losses = []
        for direction, (of_queries, of_keys) in enumerate(directions):
            with label("query forward"):
                q = _normalize(self.encoder_q(self.prepare(of_queries.chunk(parts)[part])))
            with label("key forward"):
                if part == 0:
                    self._keys.append(self.encode_keys(of_keys, parts))  # (W*N, C), all ranks'
            k = self._keys[direction].chunk(distributed.world_size())[distributed.rank()]
            with label("loss"):
                losses.append(self._losses(q, k.chunk(parts)[part]))
        self._parts_done = part + 1
        if part == parts - 1:
            self._end_step()
        return losses[0] if len(losses) == 1 else MoCoLosses.sum(losses)

    def _begin_step(self) -> None:
        self._keys, self._parts_done = [], 0  # also what an interrupted step has left
        for norms in self._batch_norms:
            norms.forget()
        self.update_key_encoder()

    def _end_step(self) -> None:
        with label("queue"):
            self.enqueue(torch.cat(self._keys))
        self._keys, self._parts_done = [], 0
        fold_statistics(self._batch_norms)

    @torch.no_grad()
    def update_key_encoder(self) -> None:
        """key <- m * key + (1 - m) * query, for parameters only: batch-norm statistics are not
        averaged, the key encoder gathers its own."""
        with label("momentum"):
            torch._foreach_lerp_(
                list(self.encoder_k.parameters()), list(self.encoder_q.parameters()), 1 - self.m
            )

    @torch.no_grad()
    def encode_keys(self, im_k: Tensor, pieces: int = 1) -> Tensor:
        """Normalised keys of all ranks' images, in rank order: (N, 3, H, W) -> (W*N, C).

        Images are encoded in shuffled order, across ranks and so across batch-norm groups: a key's
        batch statistics then do not give away which query it belongs to (arXiv:1911.05722, section
        3.3). They go through the encoder in `pieces`, one after another.
        """
        n_all = len(im_k) * distributed.world_size()
        permutation = torch.randperm(n_all, generator=self.shuffle_generator)  # alike on all ranks
        with label("communication"):
            shuffled = distributed.exchange_rows(im_k, permutation)  # (N, 3, H, W)
        encoded = [
            _normalize(self.encoder_k(self.prepare(piece))) for piece in shuffled.chunk(pieces)
        ]
        k = torch.cat(encoded) if pieces > 1 else encoded[0]
        keys = torch.empty(n_all, k.shape[1], dtype=k.dtype, device=k.device)
        with label("communication"):
            gathered = distributed.all_gather(k)
        keys[distributed.to_device(permutation, k.device)] = gathered
        return keys

    @torch.no_grad()
    def enqueue(self, keys: Tensor) -> None:
        """Overwrite the oldest columns of the queue with `keys` (n, C), wrapping around its end."""
        rows = self.queue.t()
        positions = (self.queue_ptr + torch.arange(len(keys), device=keys.device)) % self.K
        self._overwritten = positions, rows[positions]  # see `queue_at`
        rows.index_copy_(0, positions, keys.to(rows.dtype))
        self.queue_ptr.add_(len(keys)).remainder_(self.K)
        self._steps += 1

    def queue_at(self, step: int) -> Tensor:
        """The queue (C, K) as the losses of step number `step` saw it: this step or the last."""
        if self._steps == step:
            return self.queue
        if self._steps > step + 1:
            raise RuntimeError(
                "the queue has moved on: read logits_contr, contr_rank or features before the next "
                "step"
            )
        positions, keys = self._overwritten
        return self.queue.t().clone().index_copy_(0, positions, keys).t()

    def _check_queue_holds(self, n: int, directions: int) -> None:
        ranks = distributed.world_size()
        if directions * ranks * n > self.K:
            times = f" x {directions}" if directions > 1 else ""
            raise ValueError(
                f"the queue (K={self.K}) must hold at least the keys of one step (a global batch), "
                f"got {ranks} x {n} images{times}; use a larger K"
            )

    def _span(self, n: int) -> int:
        """Over how many ranks a group is spread, of which n images are on this one; 1 where this
        rank holds whole groups."""
        size = self.group_size
        if size is None or n % size == 0:
            return 1
        if size % n or distributed.world_size() % (size // n):
            raise ValueError(
                f"groups of {size} do not fit {distributed.world_size()} rank(s) of {n} images (in "
                "each part): they must divide that number, or be a multiple of it"
            )
        return size // n

    def _losses(self, q: Tensor, k: Tensor) -> MoCoLosses:
        losses = MoCoLosses(_batches=[_Batch(self, self._steps, q.detach(), k)])
        if self.contr_tau is not None:
            losses.loss_contr = contrastive_loss(q, k, self.queue, self.contr_tau)
        if self.align_alpha is not None:
            losses.loss_align = align_loss(q, k, self.align_alpha)
        if self.unif_t is not None:
            span = self._span(len(q))
            gather = functools.partial(distributed.gather_with_gradient, span=span)
            losses.loss_unif = uniform_loss_with_queue(
                q,
                self.queue,
                self.unif_t,
                self.unif_intra_batch,
                groups=max(1, len(q) // (self.group_size or len(q))),
                gather=gather if span > 1 else None,
            )
        return losses


def _as_they_are(images: Tensor) -> Tensor:
    return images


def _normalize(features: Tensor) -> Tensor:
    """Unit rows, in float32 at least: normalised in bf16 they would be 0.4 % off."""
    return F.normalize(features if features.dtype == torch.float64 else features.float(), dim=1)


@dataclass
class MoCoLosses:
    """Losses of one step on this rank, float32 scalars; None where the term is off."""

    loss_contr: Tensor | None = None
    loss_align: Tensor | None = None
    loss_unif: Tensor | None = None
    _batches: list[_Batch] = field(default_factory=list, repr=False)

    @property
    def logits_contr(self) -> Tensor | None:
        """(N, 1+K) similarities over tau, the positive first; None when InfoNCE is off. Of this
        part's N images, twice (2N) in a symmetric step.

        Made on demand, without gradient: InfoNCE itself never holds this matrix. Must be asked
        for before the next step, which changes the queue: RuntimeError after it.
        """
        if self.loss_contr is None:
            return None
        with torch.no_grad():
            return torch.cat([batch.logits() for batch in self._batches])

    def contr_rank(self) -> Tensor | None:
        """(N,) number of queue keys nearer to the query than its own key, of the rows of
        `logits_contr`; None when InfoNCE is off. Top-1 and top-5 accuracy are the shares below 1
        and 5; until the next step only."""
        if self.loss_contr is None:
            return None
        return torch.cat([contrastive_rank(b.q, b.k, b.queue) for b in self._batches])

    @property
    def passes(self) -> int:
        """Parts of the step times directions, each with rows of its own in `features`."""
        return len(self._batches)

    def features(self) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (N, C), their keys (N, C) and the queue (C, K) that they met, without gradient;
        rows as in `logits_contr`, whatever the objective, and until the next step only. They are
        those of `passes` passes through the encoders, one after another."""
        queries = torch.cat([batch.q for batch in self._batches])
        keys = torch.cat([batch.k for batch in self._batches])
        return queries, keys, self._batches[0].queue

    @classmethod
    def sum(cls, parts: list[MoCoLosses]) -> MoCoLosses:
        """Each loss summed over `parts`, which have the same terms."""
        terms = [dict(part.items()) for part in parts]
        sums = {f"loss_{n}": torch.stack([each[n] for each in terms]).sum() for n in terms[0]}
        return cls(**sums, _batches=[batch for part in parts for batch in part._batches])

    @classmethod
    def mean(cls, parts: list[MoCoLosses]) -> MoCoLosses:
        """Each loss averaged over `parts`: the losses of a step that went through in parts."""
        total = cls.sum(parts)
        for name, loss in total.items():
            setattr(total, f"loss_{name}", loss / len(parts))
        return total

    def feature_std(self) -> Tensor:
        """Mean over dimensions of the queries' deviation, times sqrt(C): about 1 for features
        spread over the sphere, 0 for collapsed ones."""
        queries = torch.cat([batch.q for batch in self._batches])
        return queries.std(dim=0, correction=0).mean() * math.sqrt(queries.shape[1])

    def combine(self, contr_w: float = 1, align_w: float = 1, unif_w: float = 1) -> Tensor:
        """The objective, contr_w * loss_contr + align_w * loss_align + unif_w * loss_unif.

        Raises:
            ValueError: a non-zero weight for a term that is off, or no non-zero weight at all.
        """
        weights, terms = {"contr": contr_w, "align": align_w, "unif": unif_w}, dict(self.items())
        # A zero weight skips its term: zero times a loss that overflowed is NaN.
        weights = {name: weight for name, weight in weights.items() if weight != 0}
        for name, weight in weights.items():
            if name not in terms:
                raise ValueError(
                    f"{name}_w={weight!r}, but this term is off; give MoCo its parameter or pass "
                    f"{name}_w=0"
                )
        if not weights:
            raise ValueError("all weights are zero: there is nothing to minimise")
        return torch.stack([weight * terms[name] for name, weight in weights.items()]).sum()

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """(name, loss) of the terms that are on."""
        for name in ("contr", "align", "unif"):
            loss = getattr(self, f"loss_{name}")
            if loss is not None:
                yield name, loss


@dataclass
class _Batch:
    """Queries and keys of one pass through the encoders."""

    moco: MoCo
    step: int
    q: Tensor
    k: Tensor

    @property
    def queue(self) -> Tensor:
        """The queue (C, K) that the losses of this pass saw."""
        return self.moco.queue_at(self.step)

    def logits(self) -> Tensor:
        positive = (self.q * self.k).sum(dim=1, keepdim=True)  # (N, 1)
        negatives = self.q @ self.queue  # (N, K)
        return torch.cat([positive, negatives], dim=1) / self.moco.contr_tau
