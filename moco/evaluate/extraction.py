"""Features of images under an encoder: of centre crops or of two random views, by layer."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from moco import checkpoint, encoders
from moco.checkpoint.encoder import image_settings
from moco.checkpoint.layouts import named_tensors
from moco.data import samples
from moco.data.images import FolderImages, Images, Subset, open_images, split_folder
from moco.data.shards import SUFFIXES
from moco.data.subsets import image_names
from moco.data.views import Recipe, eval_transform, in_batch_recipe, normalize, pretrain_recipe
from moco.errors import CheckpointError, DataError
from moco.evaluate.feature_files import FeatureSet
from moco.packages import import_optional
from moco.precision import kernels
from moco.progress import progress

LAYERS = ("projection", "backbone")
# Arguments of the views, and what stands for those that a file does not have: MoCo v2's.
AUGMENTATION = {"aug_plus": True, "crop_scale": (0.2, 1.0), "blur": True}


@dataclass
class ImageEncoder:
    """An encoder in eval mode and the images that it takes.

    Attributes:
        module: the backbone, normalised images -> (N, C).
        head: the projection head that comes after it, where there is one.
        image_size, mean, std: of the images.
        trained: the arguments that it was trained with, as far as its file says.
        facts: arch, epoch and objective, None where its file does not say.
        notes: remarks for a report.
    """

    module: nn.Module
    head: nn.Module | None
    image_size: int
    mean: Sequence[float]
    std: Sequence[float]
    trained: dict
    facts: dict
    notes: list[str] = field(default_factory=list)

    @property
    def augmentation(self) -> dict:
        """Of the views that it was trained with, else MoCo v2's: arguments of `pretrain_recipe`, or
        the share of the area of the crops of training within the batch."""
        if self.trained.get("task") == "in-batch":
            return {"crop_scale": self.trained["crop_scale"]}
        return {name: self.trained.get(name, default) for name, default in AUGMENTATION.items()}

    @property
    def recipe(self) -> Recipe:
        """Of random views."""
        make = in_batch_recipe if self.trained.get("task") == "in-batch" else pretrain_recipe
        return make(self.image_size, **self.augmentation)

    @torch.no_grad()
    def features(self, images: Tensor) -> dict[str, Tensor]:
        """uint8 images (N, 3, S, S) -> float32 features of each layer that there is."""
        backbone = self.module(normalize(images, self.mean, self.std))
        projection = {"projection": self.head(backbone).float()} if self.head else {}
        return {"backbone": backbone.float(), **projection}


def load_image_encoder(
    path: str,
    *,
    layer: str | None = None,
    timm: str | None = None,
    image_size: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> ImageEncoder:
    """The encoder in a file, on the CPU.

    Args:
        path: whatever `moco.checkpoint.load_encoder` reads.
        layer: "projection" or "backbone"; None for both, or the backbone alone of a file without
            a projection head, which a note says.
        timm: the file holds the weights of this timm model, all of them; nothing is downloaded.
        image_size, mean, std: in place of the checkpoint's.

    Raises:
        CheckpointError: no such encoder or head, weights that do not fit, an image size that the
            encoder cannot take.
        DataError: timm is not installed.
    """
    encoder = _load_timm(timm, path) if timm else _load_checkpoint(path, layer)
    encoder.image_size = image_size or encoder.image_size
    encoder.mean, encoder.std = mean or encoder.mean, std or encoder.std
    try:
        encoders.check_image_size(encoder.module, encoder.image_size)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}; give another --image-size") from error
    return encoder


def _load_checkpoint(path: str, layer: str | None) -> ImageEncoder:
    notes = []
    wanted = "none" if layer == "backbone" else "projection"
    try:
        module, info = checkpoint.load_encoder(path, head=wanted)
    except CheckpointError:
        if layer is not None:
            raise
        wanted = "none"
        module, info = checkpoint.load_encoder(path)  # raises what is not of the head
        notes.append(f"no projection head in {path}: the backbone alone is measured")
    size, mean, std = image_settings(module, info)
    head = None
    if wanted == "projection":
        head = encoders.get_head(module)
        encoders.set_head(module, nn.Identity())
    return ImageEncoder(
        module=module,
        head=head,
        image_size=size,
        mean=mean,
        std=std,
        trained=info["args"],
        facts={name: info[name] for name in ("arch", "epoch", "objective")},
        notes=notes,
    )


def _load_timm(name: str, path: str) -> ImageEncoder:
    """A timm model without its classifier, with all of its weights from a file."""
    timm = import_optional("timm", "--timm")
    if not timm.is_model(name):
        near = ", ".join(timm.list_models(f"*{name}*")[:3])
        raise CheckpointError(f"timm has no model {name!r}{f'; there is {near}' if near else ''}")
    module = timm.create_model(name, pretrained=False, num_classes=0).eval()
    content = checkpoint.read_checkpoint(path)
    # The average of the weights, which timm prefers too.
    state, _ = named_tensors(content.get("model_ema", content), path)
    wanted = module.state_dict()
    missing = [key for key in wanted if key not in state]
    shapes = {
        key: (tuple(state[key].shape), tuple(tensor.shape))
        for key, tensor in wanted.items()
        if key in state and state[key].shape != tensor.shape
    }
    if missing or shapes:
        key = next(iter(shapes or missing))
        got, expected = shapes[key] if shapes else ("nothing", tuple(wanted[key].shape))
        raise CheckpointError(
            f"{path} does not fit timm's {name}: {len(missing)} tensors missing and {len(shapes)} "
            f"of another shape, first {key}: {got}, expected {expected}; give the model's own name"
        )
    module.load_state_dict({key: state[key] for key in wanted})
    notes = []
    left = [key for key in state if key not in wanted]
    if left:
        few = ", ".join(left[:3]) + (", ..." if len(left) > 3 else "")
        notes.append(f"{len(left)} tensors of the file have no place in the encoder: {few}")
    config = timm.data.resolve_model_data_config(module)
    return ImageEncoder(
        module=module,
        head=None,
        image_size=config["input_size"][-1],
        mean=config["mean"],
        std=config["std"],
        trained={},
        facts={"arch": f"timm {name}", "epoch": None, "objective": None},
        notes=notes,
    )


@dataclass(frozen=True)
class Loading:
    """Where features are computed, and how many images at a time."""

    device: torch.device
    batch_size: int = 256
    workers: int = 0


@kernels(deterministic=False)
def extract(
    encoder: ImageEncoder,
    images: Images,
    loading: Loading,
    *,
    views: int = 1,
    seed: int = 0,
    unit: bool = True,
    layer: str | None = None,
    what: str = "features",
) -> tuple[list[dict[str, Tensor]], Tensor]:
    """Features of all images, in their order, on the CPU.

    Args:
        views: 1 for centre crops, 2 for two random views of each image by the encoder's
            augmentation, the same for the same `seed`.
        unit: divide each row by its length.
        layer: only this one of those that the encoder has.
        what: name of the progress bar.

    Returns:
        (for each view {layer: (N, C) float32}, labels (N,) int64, -1 where there are none).

    Raises:
        DataError: an image cannot be read.
    """
    for module in filter(None, (encoder.module, encoder.head)):
        module.to(loading.device)
    if views == 1:
        dataset = samples.PlainImages(images, eval_transform(encoder.image_size))
        keys = range(len(images))
    else:
        dataset = samples.AugmentedViews(images, encoder.recipe, seed=seed, num_views=views)
        keys = [(0, index) for index in range(len(images))]
    batches = DataLoader(
        dataset,
        loading.batch_size,
        sampler=keys,
        num_workers=loading.workers,
        pin_memory=loading.device.type == "cuda",
    )
    found: list[dict[str, Tensor]] = [{} for _ in range(views)]
    labels = torch.empty(len(images), dtype=torch.int64)
    done = 0
    for batch in progress(batches, what):
        targets = batch[views]
        here = slice(done, done + len(targets))
        for rows, pixels in zip(found, batch, strict=False):
            layers = encoder.features(pixels.to(loading.device, non_blocking=True))
            for name, out in layers.items():
                if layer in (None, name):
                    if not done:  # ImageNet's are 10 GB: not gathered in a list first
                        rows[name] = torch.empty(len(images), out.shape[1])
                    rows[name][here] = F.normalize(out, dim=1) if unit else out
        labels[here] = targets
        done += len(targets)
    return found, labels


def folder_features(
    encoder: ImageEncoder,
    data: str | os.PathLike,
    loading: Loading,
    *,
    layer: str,
    dataset: str = "folder",
    split: str | None = None,
    per_class: int | None = None,
    views: int = 1,
    seed: int = 0,
    unit: bool = False,
) -> FeatureSet:
    """Features, labels and names of the images of a folder, in sorted order.

    Args:
        data: has val/ or train/, or is any folder of images; or has torchvision's files.
        layer: "projection" or "backbone", whichever was loaded.
        dataset, split, per_class: as in `choose_images`.
        views, seed, unit: as in `extract`.

    Returns:
        Paths are relative to `data`, or positions for images that are no files; `about["split"]`
        is "train", "val" or "all".

    Raises:
        DataError: no images, or one that cannot be read.
    """
    images, split = choose_images(dataset, Path(data), split, per_class)
    found, labels = extract(
        encoder, images, loading, views=views, seed=seed, unit=unit, layer=layer
    )
    about = {
        **encoder.facts,
        "layer": layer,
        "normalized": unit,
        "dataset": dataset,
        "image_size": encoder.image_size,
        "mean": encoder.mean,
        "std": encoder.std,
        "split": split,
    }
    if views == 2:
        about |= {"views": 2, "seed": seed, **encoder.augmentation}
    return FeatureSet(
        features=found[0][layer],
        second_view=found[1][layer] if views == 2 else None,
        labels=labels,
        classes=images.classes,
        paths=_names(images, data),
        about=about,
    )


def choose_images(
    dataset: str, root: Path, split: str | None, per_class: int | None
) -> tuple[Images, str]:
    """Images of a folder or data set, and which split they are: the one that is asked for, else
    "val" where there is one, else "train", else "all"; of each class the first `per_class`.

    Raises:
        DataError: missing, empty, or without the labels that are asked for.
    """
    if dataset != "folder":
        split = split or "val"
        classes = None
        if dataset in SUFFIXES and split == "val":  # labels are those of training
            with contextlib.suppress(DataError):
                classes = open_images(dataset, root, "train").classes
        return open_images(dataset, root, split, per_class=per_class, classes=classes), split
    split = split or next((s for s in ("val", "train") if (root / s).is_dir()), "all")
    folder = root if split == "all" else split_folder(root, split)
    # "pretrain": as a folder of images, whatever lies in it.
    open_folder = functools.partial(open_images, "folder", split="pretrain")
    images = open_folder(folder, per_class=per_class)
    if split == "val" and images.classes and (root / "train").is_dir():
        # Labels are those of training, also where val/ lacks a class.
        in_train = sorted(entry.name for entry in os.scandir(root / "train") if entry.is_dir())
        if in_train != images.classes:
            classes = open_folder(root / "train").classes
            images = open_folder(folder, per_class=per_class, classes=classes)
    return images, split


def _names(images: Images, data: str | os.PathLike) -> list[str]:
    """Paths relative to the data folder; positions of images that are no files."""
    names, whole = image_names(images), images
    while isinstance(whole, Subset):
        whole = whole.images
    if not isinstance(whole, FolderImages):
        return names
    below = os.path.relpath(whole.root, data)
    return [os.path.normpath(os.path.join(below, name)) for name in names]
