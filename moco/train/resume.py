"""Going on with a run: which checkpoint, and whether what is learned would change."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import Any

from moco import checkpoint, distributed
from moco.config import SAMPLE_ORDER, learning_changes, rounding_changes
from moco.errors import CheckpointError, TrainingError
from moco.handshake import refuse_other_arguments
from moco.lock import FolderLock, hold_on_main
from moco.log import provenance
from moco.run_files import ARGS, write_json


def settle(
    config: Any, at_exit: contextlib.ExitStack
) -> tuple[Any, dict | None, FolderLock | None]:
    """What processes agree on before anything is built; rank 0 locks the run folder.

    Processes that were started apart (torchrun, several nodes) drew and timed their own seed and
    run folder: rank 0's count. A run that goes on takes the seed and the initial weights of its
    checkpoint, where the command line gives none.

    Returns:
        (config, content of the checkpoint to go on from, or None, rank 0's lock).

    Raises:
        TrainingError: ranks were started with different arguments, or another job writes into the
            run folder.
        CheckpointError: the checkpoint cannot be read.
    """
    refuse_other_arguments(config)
    seed, folder, path = distributed.broadcast_object(
        (config.optim.seed, config.saving.save_dir, config.saving.checkpoint)
    )
    lock = hold_on_main(folder, at_exit)
    path, saved = _find_checkpoint(path, folder, failed=config.saving.replay is not None)
    optim = replace(config.optim, seed=seed)
    saving = replace(config.saving, save_dir=folder, checkpoint=path)
    config = replace(config, optim=optim, saving=saving)
    return (_as_before(config, saved, path) if saved else config), saved, lock


def _as_before(config: Any, saved: dict, path: str) -> Any:
    """The config with the checkpoint's seed and initial weights, where none were given, and with
    what the config itself takes from it (`resumed_from`)."""
    before, optim = checkpoint.saved_args(saved), config.optim
    if not optim.seed_given:
        optim = replace(optim, seed=before.get("seed", optim.seed))
    if optim.init_from is None:
        optim = replace(optim, init_from=before.get("init_from"))
    config = replace(config, optim=optim)
    if not hasattr(config, "resumed_from"):
        return config
    try:
        return config.resumed_from(before)
    except ValueError as error:
        raise CheckpointError(f"{path} cannot go on here: {error}") from error


def _find_checkpoint(
    path: str | None, folder: Path, *, failed: bool
) -> tuple[str | None, dict | None]:
    """The checkpoint to go on from, for "auto" the newest that is whole. Rank 0 reads and checks
    it; the others map that very file, or are handed its content where one of them does not see it
    (another state of a shared folder, or none)."""
    found, mark, error = None, None, None
    if path and distributed.is_main():
        try:
            if path == "auto":
                found = checkpoint.newest_valid(folder, distributed.print_main)
            else:
                found = path, checkpoint.read_checkpoint(path, failed=failed)
        except (CheckpointError, OSError) as caught:
            error = caught
        mark = checkpoint.fingerprint(Path(found[0])) if found else None
    path, saved = found or (None, None)
    path, mark, error = distributed.broadcast_object((path and str(path), mark, error))
    if error:
        raise error
    if path is None:
        return None, None
    if not distributed.is_main():
        saved = checkpoint.map_checkpoint(Path(path), mark)
    if not all(distributed.gather_objects(saved is not None)):
        saved = distributed.broadcast_object(saved)
    return path, saved


def refuse_changes(saved: dict, path: str, flat: dict, *, allow: bool) -> list[str]:
    """Refuse to go on with values under which something else is learned.

    Args:
        saved: content of the checkpoint at `path`.
        flat: flat values of the run that is to go on, and of its data.
        allow: go on all the same (--allow-changes).

    Returns:
        The changes, one line each; they are printed.

    Raises:
        CheckpointError: another task or arch, changes that are not allowed, or such of the order of
            samples within an epoch.
    """
    before = checkpoint.saved_args(saved)
    tasks = [values.get("task", "moco") for values in (before or flat, flat)]
    if tasks[0] != tasks[1]:
        raise CheckpointError(
            f"{path} is of the task {tasks[0]}, this run of {tasks[1]}: choose another --save-dir"
        )
    if saved.get("arch", flat["arch"]) != flat["arch"]:
        raise CheckpointError(f"{path} is of arch {saved['arch']}, this run is of {flat['arch']}")
    if not before:
        distributed.print_main(
            f"{path} does not say by which objective it was trained; this run goes on with "
            f"{flat['objective']} (flags of the objective choose another)"
        )
    changes = learning_changes(before, flat)
    if changes and not allow:
        raise CheckpointError(
            f"{path} was trained with other arguments ({'; '.join(changes)}); use "
            "those, or go on with --allow-changes"
        )
    in_epoch = [change for change in changes if change.split(":")[0] in SAMPLE_ORDER]
    if in_epoch and saved.get("step_in_epoch"):
        raise CheckpointError(
            f"{path} stands within an epoch, and with {'; '.join(in_epoch)} the rest of "
            "it would be other samples: go on from a checkpoint_*.pth.tar at the end of an epoch"
        )
    for change in changes:
        distributed.print_main(f"changed in mid-run: {change}")
    return changes


def print_rounding_changes(saved: dict, flat: dict) -> None:
    for change in rounding_changes(checkpoint.saved_args(saved), flat):
        distributed.print_main(f"  {change}: it goes on, but not bit for bit")


def prepare_folder(folder: Path, flat: dict) -> None:
    """Make the run folder, see that it can be written to, and note what is run."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        checkpoint.remove_unfinished(folder)
        write_json(folder / ARGS, {**flat, "provenance": provenance()})
    except OSError as error:
        raise TrainingError(f"cannot write to the run folder: {error}") from error
