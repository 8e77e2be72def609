"""Evaluate an encoder from a file: k-NN, linear classifiers, fine-tuning; all of main_lincls.py."""

from __future__ import annotations

import contextlib
from collections import Counter
from dataclasses import replace

import torch
from torch import nn

from moco import checkpoint, distributed, encoders
from moco.config import IMAGENET_MEAN, IMAGENET_STD, LinclsConfig
from moco.data.images import Images, Subset, names_digest, open_images
from moco.data.subsets import listed_labels, percent_of_labels, subset_digest
from moco.errors import CheckpointError, DataError, report_user_errors
from moco.evaluate.classifier_io import (
    encoder_digest,
    load_classifier,
    load_resumed,
    refuse_changes,
)
from moco.evaluate.facts import (
    Subject,
    checkpoint_facts,
    describe,
    print_start,
    sorted_flat,
    warn_of_missing_classes,
)
from moco.evaluate.feasible import check_memory
from moco.evaluate.feed import Presentation
from moco.evaluate.heads import FrozenEncoder, Heads, head_accuracy
from moco.evaluate.knn import knn_accuracy
from moco.evaluate.layers import OUTPUT, load_layer
from moco.evaluate.linear import LinearEvaluation
from moco.evaluate.nearest import nearest_neighbours
from moco.evaluate.protocol import make_feed, train_classifiers
from moco.handshake import refuse_other_arguments, refuse_other_data
from moco.lock import hold_on_main
from moco.log import RunLog, provenance
from moco.precision import kernels
from moco.run_files import ARGS, LINCLS_RESULT, write_json
from moco.stop import StopRequest


def evaluate(device: torch.device, config: LinclsConfig) -> None:
    """The whole evaluation in this process, one of `config.placement.processes`.

    Leaves args.json, log.jsonl, checkpoints of classifiers and lincls.json in the run folder.

    Exit status: 1 after an error that the user can act on, which is printed in one line; 130 after
    Ctrl-C. While classifiers train, Ctrl-C and requests to stop (then 75) save first.
    """
    with (
        report_user_errors(),
        distributed.failure_names_ranks(),
        kernels(deterministic=False),
        contextlib.ExitStack() as at_exit,
    ):
        _evaluate(device, config, at_exit)
        distributed.barrier()  # no rank ends well where the one that writes fails


def _evaluate(device: torch.device, config: LinclsConfig, at_exit: contextlib.ExitStack) -> None:
    refuse_other_arguments(config)
    subject, config = load_subject(device, config)
    train, val, config = open_splits(config)
    if distributed.world_size() > 1:
        digests = {"training images": names_digest(train), "validation images": names_digest(val)}
        refuse_other_data({**digests, "encoder": encoder_digest(subject.encoder.encoder)})
    classes = len(train.classes)
    saved = load_classifier(subject.path, classes) if config.source.evaluate else None
    result = describe(subject, config, train, val)
    before = subject.resume_from
    if before is not None:
        refuse_changes(before, config, classes)
    check_memory(subject.encoder.encoder, config, device)
    begin_folder(config, at_exit)
    print_start(subject, config, device, result)
    warn_of_missing_classes(train, val)
    steps_done = before["args"].get("steps_done", 0) if before is not None else 0
    log = at_exit.enter_context(
        contextlib.closing(RunLog(config.saving.save_dir, first_step=steps_done))
    )

    share = config.optim.batch_size // config.placement.processes
    show = Presentation(config.source, share, config.data.workers, device)
    if config.knn.knn:
        result["knn"] = run_knn(subject, config, show, train, val)
        log.scalars("knn", 0, {name: result["knn"][name] for name in ("top1", "top5")})
    if saved is not None:
        result.update(evaluate_classifier(saved.to(device), subject, show, val))
    if config.protocol.probe == "stl10":
        result["nearest"] = nearest_neighbours(subject, config, show, train, val)
    if saved is None and config.trains:
        feed = make_feed(config, subject, train, val, show)
        about = checkpoint_facts(subject, config)
        stop = StopRequest()
        at_exit.callback(stop.restore)
        evaluation = LinearEvaluation(config, device, subject, classes, about, log, stop)
        result.update(train_classifiers(evaluation, feed, train.targets))
    if distributed.is_main():
        path = config.saving.save_dir / LINCLS_RESULT
        write_json(path, result)
        print(f"done: {path}")


def load_subject(device: torch.device, config: LinclsConfig) -> tuple[Subject, LinclsConfig]:
    """The encoder, and the config with what its file says: how images are to be presented."""
    path = config.source.pretrained or config.saving.resume
    encoder, info = load_layer(path, config.source.layer)
    resume_from = load_resumed(config, encoder) if config.saving.resume else None
    config = complete(config, path, info, resume_from)
    try:
        encoders.check_image_size(encoder, config.source.image_size)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}; give --image-size") from None
    encoder = frozen(encoder.requires_grad_(config.protocol.finetune), config, device)
    knn_encoder = encoder
    if config.knn.knn and config.knn.knn_layer == "projection":
        whole, _ = checkpoint.load_encoder(path, head="projection")
        knn_encoder = frozen(whole, config, device)
    elif config.knn.knn and info["layer"] == OUTPUT:
        knn_encoder = frozen(checkpoint.load_encoder(path)[0], config, device)
    return Subject(path, encoder, info, knn_encoder, resume_from), config


def frozen(encoder: nn.Module, config: LinclsConfig, device: torch.device) -> FrozenEncoder:
    # On a CPU the order stays as it always was, and with it every bit of the standard protocol.
    channels_last = device.type == "cuda"
    return FrozenEncoder(encoder.to(device), amp=config.source.amp, channels_last=channels_last)


def complete(config: LinclsConfig, path: str, info: dict, resume_from: dict | None) -> LinclsConfig:
    """The config in which nothing is None that a checkpoint tells; the same on all ranks."""
    seed, folder = distributed.broadcast_object((config.optim.seed, config.saving.save_dir))
    if resume_from is not None and not config.optim.seed_given:
        seed = resume_from["args"].get("seed", seed)
    source, trained = config.source, info["args"]
    if source.arch is not None and source.arch != info["arch"]:
        raise CheckpointError(f"{path} is of arch {info['arch']}, got -a {source.arch}")
    try:
        source = replace(
            source,
            arch=info["arch"],
            layer=info["layer"],
            image_size=source.image_size or trained.get("image_size", 224),
            mean=source.mean or tuple(trained.get("mean", IMAGENET_MEAN)),
            std=source.std or tuple(trained.get("std", IMAGENET_STD)),
        )
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None
    if config.protocol.probe == "stl10" and source.eval_resize is None:
        source = replace(source, eval_resize=round(source.image_size * 70 / 64))
    if source.eval_resize is not None and source.eval_resize < source.image_size:
        raise CheckpointError(
            f"--eval-resize {source.eval_resize} is smaller than the crop of {source.image_size} "
            "pixels, which would have a black border: give at least that"
        )
    return replace(
        config,
        source=source,
        optim=replace(config.optim, seed=seed),
        saving=replace(config.saving, save_dir=folder),
    )


def open_splits(config: LinclsConfig) -> tuple[Images, Images, LinclsConfig]:
    """Training and validation images with one numbering of the classes.

    With --labels the training images are those whose labels are used, and the config has the digest
    of their names.
    """
    data, labels = config.data, config.protocol.labels
    per_class = data.images_per_class
    train = open_images(data.dataset, data.data, "train", per_class=per_class)
    val = open_images(data.dataset, data.data, "val", per_class=per_class, classes=train.classes)
    folds, batch_size = config.protocol.folds, config.optim.batch_size
    if labels is not None:
        if isinstance(labels, str):
            chosen = listed_labels(train, labels)
        else:
            chosen = percent_of_labels(train, labels, config.protocol.labels_seed)
        train = Subset(train, chosen)
        protocol = replace(config.protocol, labels_digest=subset_digest(train))
        config = replace(config, protocol=protocol)
        if len(train) < batch_size and config.trains:
            raise DataError(
                f"--labels leaves {len(train)} images to train on, fewer than one batch of "
                f"{batch_size}; lower --batch-size"
            )
    least = len(train) - (-(-len(train) // folds) if folds else 0)  # without the largest fold
    if least < batch_size and config.trains:
        raise DataError(
            f"{least} images are fewer than one batch of {batch_size}; lower --batch-size"
        )
    smallest = min(Counter(train.targets).values())
    if config.protocol.probe == "stl10" and folds and folds > smallest:
        raise DataError(
            f"--folds {folds} are more than the {smallest} images of the smallest class"
        )
    return train, val, config


def run_knn(
    subject: Subject, config: LinclsConfig, show: Presentation, train: Images, val: Images
) -> dict:
    """Weighted k-NN from the backbone's features or from the projection head's output."""
    knn, classes = config.knn, len(train.classes)
    bank, queries = (
        show.extracted(images, subject.knn_encoder, "k-NN features") for images in (train, val)
    )
    found = knn_accuracy(queries, bank, classes=classes, k=knn.knn_k, temperature=knn.knn_t)
    distributed.print_main(
        f"k-NN top-1 {found['top1']:.2f}, top-{min(5, classes)} {found['top5']:.2f} "
        f"(k {found['k']}, temperature {knn.knn_t:g}, {knn.knn_layer}, {found['images']} images)"
    )
    return {**found, "temperature": knn.knn_t, "layer": knn.knn_layer}


def evaluate_classifier(
    classifier: nn.Linear, subject: Subject, show: Presentation, val: Images
) -> dict:
    """Accuracy of a classifier that was saved."""
    batches = show.features(show.loader(val), subject.encoder)
    (found,) = head_accuracy(Heads([classifier]), batches, show.device)
    top = min(5, classifier.out_features)
    distributed.print_main(
        f" * Acc@1 {found['top1']:.3f} Acc@{top} {found['top5']:.3f} loss {found['loss']:.4f}"
    )
    return {"top1": found["top1"], "top5": found["top5"]}


def begin_folder(config: LinclsConfig, at_exit: contextlib.ExitStack) -> None:
    """Hold the run folder and write args.json; all ranks go on when it is there."""
    hold_on_main(config.saving.save_dir, at_exit)
    if distributed.is_main():
        folder = config.saving.save_dir
        checkpoint.remove_unfinished(folder)
        write_json(folder / ARGS, {**sorted_flat(config), "provenance": provenance()})
    distributed.barrier()
