"""A supervised encoder with features on the sphere, to compare contrastive ones with (Figure 3)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from moco.data.images import Images
from moco.data.loader import EpochBatches, TrainLoader
from moco.data.samples import AugmentedViews
from moco.data.views import Recipe, normalize
from moco.encoders import build_encoder
from moco.errors import DataError, TrainingError
from moco.evaluate.extraction import Loading
from moco.schedule import learning_rate


def train_supervised(
    arch: str,
    dim: int,
    images: Images,
    recipe: Recipe,
    loading: Loading,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    epochs: int,
    lr: float,
    weight_decay: float,
    seed: int,
    say: Callable[[str], None],
) -> nn.Module:
    """Train an encoder and a linear classifier on its unit features together, from scratch
    (arXiv:2005.10242, section 4.2): cross-entropy, SGD with momentum 0.9, half a cosine.

    Args:
        arch, dim: as `build_encoder` takes them; features are (N, dim).
        images: with labels.
        recipe: of the one view of each image that an epoch has.
        say: takes a line after each epoch.

    Returns:
        The encoder without the classifier, in eval mode.

    Raises:
        DataError: images without labels, or fewer than one batch; no such arch.
        TrainingError: the loss is no longer finite.
    """
    if images.targets is None:
        raise DataError("supervised training needs labels: images in one folder per class")
    torch.manual_seed(seed)
    device = loading.device
    try:
        encoder = build_encoder(arch, dim, image_size=recipe.image_size).to(device)
    except ValueError as error:
        raise DataError(str(error)) from error
    classifier = nn.Linear(dim, len(images.classes)).to(device)
    parameters = [*encoder.parameters(), *classifier.parameters()]
    optimizer = torch.optim.SGD(parameters, lr, momentum=0.9, weight_decay=weight_decay)
    batches = EpochBatches(len(images), loading.batch_size, seed=seed)
    views = AugmentedViews(images, recipe, seed=seed, num_views=1)
    loader = TrainLoader(views, batches, workers=loading.workers, device=device)
    try:
        for epoch in range(epochs):
            batches.set_epoch(epoch)
            rate = learning_rate(epoch, base=lr, epochs=epochs, cos=True)
            for group in optimizer.param_groups:
                group["lr"] = rate
            total = torch.zeros(3, dtype=torch.float64, device=device)  # loss, correct, images
            for view, targets, _ in loader:
                targets = targets.to(device, non_blocking=True)
                features = F.normalize(encoder(normalize(view, mean, std)), dim=1)
                logits = classifier(features)
                loss = F.cross_entropy(logits, targets)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                correct = (logits.argmax(dim=1) == targets).sum()
                count = torch.tensor(len(targets), device=device)
                total += torch.stack([loss.detach() * count, correct, count])
            loss, correct, count = total.tolist()
            if not loss < float("inf"):
                raise TrainingError(f"the loss of epoch {epoch + 1} is {loss}; lower --lr")
            say(
                f"epoch [{epoch + 1}/{epochs}]  loss {loss / count:.4f}  "
                f"top-1 {100 * correct / count:.2f} %  lr {rate:.4g}"
            )
    finally:
        loader.end()
    return encoder.eval()
