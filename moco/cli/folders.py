"""Folders and files that a command line names, judged before work starts."""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from moco.checkpoint import is_url, run_checkpoints
from moco.config import Data, Folder
from moco.data.folders import LeftOut, image_paths, split_folder
from moco.data.shards import SUFFIXES, shard_paths
from moco.errors import CheckpointError, DataError
from moco.packages import import_optional
from moco.printable import printable
from moco.run_files import (
    ARGS,
    DEPTH_RESULT,
    DEPTH_STATE,
    LINCLS_LATEST,
    LINCLS_RESULT,
    weights_file,
)


def check_run_folder(
    parser: argparse.ArgumentParser, folder: Path | None, resume: str | None, kind: str
) -> None:
    """Never start over in a folder that holds a run, nor mix two runs in one; nor start one whose
    log cannot be written.

    Args:
        kind: of the run that is to be there: "pretraining", "lincls" or "depth".
    """
    try:
        import_optional("tensorboard", "the log of a run")
    except DataError as error:
        parser.error(str(error))
    if folder is None:
        return
    held = {
        "pretraining": [path.name for path in run_checkpoints(folder)],
        "lincls": [name for name in (LINCLS_RESULT, LINCLS_LATEST) if (folder / name).exists()],
        "depth": [name for name in (DEPTH_RESULT, DEPTH_STATE) if (folder / name).exists()],
    }
    own = held.pop(kind)
    other = [name for names in held.values() for name in names]
    continued = resume == "auto" or (resume and Path(resume).resolve().parent == folder.resolve())
    if kind == "pretraining" and not own and (folder / ARGS).exists():
        own = [ARGS]  # that run may be in its first epoch
    if other or (own and not continued):
        parser.error(
            f"{folder} already holds a run ({(other or own)[-1]}): "
            + ("" if other else "go on with --resume auto, or ")
            + "choose another --save-dir"
        )


def training_folder(parser: argparse.ArgumentParser, config: Any, name: str) -> Folder:
    """The run folder, `name`, batch size and the time where none is given, and the checkpoint to go
    on from: a path, "auto" or None."""
    saving, init_from = config.saving, config.optim.init_from
    check_run_folder(parser, saving.save_dir, saving.resume, "pretraining")
    resume, run = saving.resume, saving.save_dir
    checkpoint = resume
    if resume == "auto":
        checkpoint = "auto" if run_checkpoints(run) else None
    elif resume and Path(resume).is_dir():
        parser.error(
            f"--resume: {resume} is a folder, expected a checkpoint; to go on from its newest one "
            f"give --save-dir {resume} --resume auto"
        )
    elif resume and not Path(resume).is_file():
        parser.error(f"--resume: no such checkpoint: {resume}")
    elif resume and run:
        own = [path.resolve() for path in run_checkpoints(run)]
        if Path(resume).resolve() in own[:-1]:
            parser.error(
                f"{run} holds a later checkpoint than {resume} ({own[-1].name}); go "
                "back in another --save-dir, or move the later ones away"
            )
    if init_from and resume not in (None, "auto"):
        parser.error("--init-from starts a run and --resume goes on with one: give one of them")
    if init_from and checkpoint is None and not Path(init_from).is_file():
        parser.error(f"--init-from: no such checkpoint: {init_from}")
    if run is None:
        run = new_folder(f"{name}-b{config.optim.batch_size}", config.optim.seed)
    return replace(saving, save_dir=run, checkpoint=checkpoint)


def new_folder(name: str, seed: int) -> Path:
    return Path("results") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}-s{seed}"


def pretrained_file(parser: argparse.ArgumentParser, path: str | None) -> str | None:
    """A folder stands for its newest checkpoint, or for the encoder of a release."""
    if path is None or is_url(path) or not Path(path).is_dir():
        return path
    try:
        return str(weights_file(path))
    except CheckpointError as error:
        parser.error(f"--pretrained: {printable(error)}; a folder must be a run's or a release's")


def check_data_folder(
    parser: argparse.ArgumentParser, data: Data, splits: Mapping[str, int]
) -> None:
    """Refuse a folder that is missing or has too few images, without listing it all.

    Args:
        splits: name of a split and the number of images it needs.
    """
    root = Path(data.data)
    if root.is_file():
        parser.error(f"{root} is a file, expected a data folder with train/ and val/")
    if not root.is_dir():
        parser.error(f"no such data folder: {root}")
    if data.dataset in SUFFIXES:
        try:
            if data.dataset == "parquet":
                import_optional("pyarrow.parquet", "--dataset parquet", "pyarrow")
            for split in splits:
                shard_paths(root, split, data.dataset)
        except DataError as error:
            parser.error(str(error))
    if data.dataset != "folder":
        return
    for split, needed in splits.items():
        try:
            folder = split_folder(root, split)
        except DataError as error:
            parser.error(str(error))
        left_out = LeftOut(folder)
        found = len(list(islice(image_paths(folder, left_out), needed)))
        if not found:
            parser.error(
                f"no images in {folder}; expected FOLDER/train/CLASS/IMAGE as for ImageNet"
                + (", or any folder with images" if split == "pretrain" else "")
                + (f"; {left_out}" if left_out.counts else "")
            )
        if found < needed:
            parser.error(
                f"{folder} has {found} images, fewer than one batch of {needed}; lower --batch-size"
            )
