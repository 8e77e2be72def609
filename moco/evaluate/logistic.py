"""Logistic regression on features that are there once and for all, by L-BFGS, its penalty chosen by
folds of the training set.

    mean_i -log softmax(x_i W^T + b)[y_i] + penalty/2 |W|^2
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

PENALTIES = tuple(10.0**e for e in range(-1, -8, -1))  # from strong to weak: each starts the next


@dataclass
class Classifier:
    """weight (classes, C), bias (classes,), and what they were fitted with."""

    weight: Tensor
    bias: Tensor
    penalty: float

    def predict(self, x: Tensor) -> Tensor:
        """(N, C) -> (N,) the likeliest class."""
        return (x @ self.weight.t() + self.bias).argmax(dim=1)


def fit(
    x: Tensor,
    y: Tensor,
    classes: int,
    penalty: float,
    *,
    start: Classifier | None = None,
    steps: int = 200,
) -> Classifier:
    """The minimum of the objective, which is convex.

    Args:
        x: (N, C) features, float32 or float64; best centred.
        y: (N,) int64 in [0, classes).
        penalty: > 0; the bias is not penalised.
        start: where to begin; zero by default.
        steps: of L-BFGS, at most.
    """
    if start is None:
        weight, bias = x.new_zeros(classes, x.shape[1]), x.new_zeros(classes)
    else:
        weight, bias = start.weight.clone(), start.bias.clone()
    parameters = [weight.requires_grad_(), bias.requires_grad_()]
    optimizer = torch.optim.LBFGS(
        parameters,
        max_iter=steps,
        tolerance_grad=1e-6,
        tolerance_change=1e-10,
        history_size=10,
        line_search_fn="strong_wolfe",
    )

    def objective() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(x @ weight.t() + bias, y) + penalty / 2 * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(objective)
    return Classifier(weight.detach(), bias.detach(), penalty)


def stratified_folds(y: Tensor, folds: int, seed: int) -> Tensor:
    """(N,) the fold of each image; of each class as many in each as can be."""
    generator = torch.Generator().manual_seed(seed)
    fold = torch.empty(len(y), dtype=torch.int64)
    for label in y.cpu().unique():
        own = (y.cpu() == label).nonzero().squeeze(1)
        places = torch.arange(len(own)) + int(torch.randint(folds, (), generator=generator))
        fold[own[torch.randperm(len(own), generator=generator)]] = places % folds
    return fold.to(y.device)


def fit_chosen(
    x: Tensor,
    y: Tensor,
    classes: int,
    *,
    penalties: Sequence[float] = PENALTIES,
    folds: int = 3,
    seed: int = 0,
) -> tuple[Classifier, dict[float, float]]:
    """Fit with the penalty of the best mean accuracy on held-out folds; of several the strongest.

    Returns:
        (classifier of all images, {penalty: mean accuracy in percent}).
    """
    fold = stratified_folds(y, folds, seed)
    right = dict.fromkeys(sorted(penalties, reverse=True), 0.0)
    for held_out in range(folds):
        inside, outside = fold != held_out, fold == held_out
        found = None
        for penalty in right:
            found = fit(x[inside], y[inside], classes, penalty, start=found)
            hits = (found.predict(x[outside]) == y[outside]).sum().item()
            right[penalty] += 100 * hits / len(y)
    best = max(right, key=right.__getitem__)  # the first of equals
    found = None
    for penalty in right:
        if penalty >= best:
            found = fit(x, y, classes, penalty, start=found)
    return found, right
