"""What an evaluation tells of itself: facts in lincls.json and checkpoints, lines at the start."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moco import checkpoint, distributed
from moco.config import LinclsConfig
from moco.data.images import Images
from moco.evaluate.classifier_io import encoder_digest
from moco.evaluate.heads import FrozenEncoder
from moco.evaluate.layers import lacks_statistics


@dataclass(frozen=True)
class Subject:
    """The encoder that is evaluated.

    Args:
        path: its file.
        info: what `load_encoder` has found in it.
        knn_encoder: what k-NN compares features of, the encoder or the whole network.
        resume_from: the checkpoint of an evaluation to go on with.
    """

    path: str
    encoder: FrozenEncoder
    info: dict
    knn_encoder: FrozenEncoder
    resume_from: dict | None


def sorted_flat(config: LinclsConfig) -> dict:
    """The flat values as files keep them: an address without its password and token."""
    flat = config.to_flat()
    if flat["pretrained"] is not None:
        flat["pretrained"] = checkpoint.without_secrets(flat["pretrained"])
    return dict(sorted(flat.items()))


def describe(subject: Subject, config: LinclsConfig, train: Images, val: Images) -> dict:
    """The beginning of lincls.json."""
    info, protocol = subject.info, config.protocol
    facts = {
        "checkpoint": checkpoint.without_secrets(subject.path),
        "arch": info["arch"],
        "pretrained_epochs": info["epoch"],
        "objective": info["objective"],
        "classes": len(train.classes),
        "train_images": len(train),
        "val_images": len(val),
    }
    unseen = classes_without_images(val)
    if unseen:
        facts["classes_without_validation"] = unseen
    if protocol.labels is not None:
        facts["labels"] = {"of": protocol.labels, "digest": protocol.labels_digest}
    return facts


def classes_without_images(images: Images) -> list[str]:
    present = set(images.targets)
    return [name for label, name in enumerate(images.classes) if label not in present]


def warn_of_missing_classes(train: Images, val: Images) -> None:
    """Of classes that only one of the splits has; that training lacks one --labels can cause. And
    of a single class, as images in one folder more than expected make."""
    if len(train.classes) == 1:
        distributed.print_main(
            f"warning: all images are of one class, {train.classes[0]!r}, so any accuracy is 100; "
            "expected DIR/train/CLASS/IMAGE with a folder for each class"
        )
    for kind, images, fate in (
        ("validation", val, "never validated"),
        ("training", train, "never recognised"),
    ):
        missing = classes_without_images(images)
        if missing:
            some = ", ".join(map(repr, missing[:5])) + (", ..." if len(missing) > 5 else "")
            distributed.print_main(
                f"warning: no {kind} image of {len(missing)} of {len(images.classes)} classes, "
                f"which are {fate}: {some}"
            )


def checkpoint_facts(subject: Subject, config: LinclsConfig) -> dict:
    """What every checkpoint of a classifier holds beside tensors and accuracies."""
    info = subject.info
    kept = {"objective": info["args"]["objective"]} if "objective" in info["args"] else {}
    digest = (subject.resume_from or {}).get("pretrained_digest")
    return {
        "version": checkpoint.FORMAT_VERSION,
        "arch": info["arch"],
        "pretrained_epochs": info["epoch"],
        "pretrained_digest": digest or encoder_digest(subject.encoder.encoder),
        "args": {**sorted_flat(config), **kept},
    }


def print_start(subject: Subject, config: LinclsConfig, device: torch.device, facts: dict) -> None:
    """What was found in the checkpoint and what will be done."""
    say, info = distributed.print_main, subject.info
    optim, protocol = config.optim, config.protocol
    say(
        f"   encoder: {info['arch']}{', small stem' if info['small_stem'] else ''}, "
        f"{info['feature_dim']} features; all {info['matched']} tensors matched, "
        f"{len(info['ignored'])} of the file have no place in the backbone"
    )
    if protocol.probe == "stl10" or info["layer"] == "output":
        resized = f", centre crops of {config.source.eval_resize}" * bool(config.source.eval_resize)
        say(f"     layer: {info['layer']}{resized}")
    say(f"   trained: {info['objective'] or 'unknown objective'}, epoch {info['epoch']}")
    say(
        f"      data: {facts['train_images']} training and {facts['val_images']} validation "
        f"images, {facts['classes']} classes, {config.source.image_size} px"
    )
    if protocol.labels is not None:
        is_file = isinstance(protocol.labels, str)
        of = protocol.labels if is_file else f"{protocol.labels:g} %"
        bank = "; the bank of k-NN is these" if config.knn.knn else ""
        say(
            f"    labels: {of}: {facts['train_images']} images, digest {protocol.labels_digest}"
            f"{bank}"
        )
    if config.trains:
        say(f"  protocol: {protocol_line(config)}")
    say(
        f"    device: {device}, {config.placement.processes} process(es), seed {optim.seed}, "
        f"amp {config.source.amp}"
    )
    say(f"run folder: {config.saving.save_dir}")
    if lacks_statistics(subject.encoder):
        say(
            "warning: batch norm has never seen a batch, so features of this untrained encoder are "
            "about 0; scripts/train_in_batch.py --max-steps 0 saves one with statistics"
        )
    scaled = 30.0 * optim.batch_size / 256
    one = len(optim.lr) == 1 and not (protocol.finetune or protocol.folds)
    one = one and protocol.probe == "moco"
    if config.trains and one and abs(optim.lr[0] - scaled) > 1e-6 * scaled:
        say(
            f"warning: lr {optim.lr[0]:g} with batch {optim.batch_size} is not the published pair "
            f"(30 with 256); scaled to this batch it would be --lr {scaled:g}"
        )


def protocol_line(config: LinclsConfig) -> str:
    optim, plan, protocol = config.optim, config.schedule, config.protocol
    rates = ", ".join(f"{lr:g}" for lr in optim.lr)
    decays = ", ".join(f"{decay:g}" for decay in optim.weight_decay)
    epochs = " ".join(map(str, plan.schedule)) or "no epoch"
    if protocol.finetune:
        what = f"fine-tuning, backbone lr {protocol.lr_backbone:g}, classifier lr {rates}"
    elif protocol.probe == "stl10":
        views = {0: "centre crops", 1: "1 random view"}
        views = views.get(protocol.cached_views, f"{protocol.cached_views} random views")
        what = "linear on the random crops"
        if protocol.cached:
            what = f"linear on cached {views} in place of the random crops"
        what += f" of Table 1 of arXiv:2005.10242: Adam, lr {rates}"
    elif protocol.cached:
        views = f"{protocol.cached_views} random views" if protocol.cached_views else "centre crops"
        what = f"linear on cached features of {views} (not the standard protocol), lr {rates}"
    else:
        what = f"linear, standard (random crops in every epoch), lr {rates}"
    folds = f"; chosen by {protocol.folds} folds of the training set" if protocol.folds else ""
    return (
        f"{what}, wd {decays}, batch {optim.batch_size}, {plan.epochs} epochs, "
        f"x{plan.schedule_factor:g} at {epochs}{folds}"
    )
