"""Depth from a frozen encoder's layer: the predictor of arXiv:2005.10242, Table 6, on NYU-Depth-V2.

The paper's unit of the error is not stated; both are given here: square metres, and as a share of
the variance of the training depth, beside the errors of a constant and of a mean for each pixel.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor

from moco import checkpoint
from moco.alexnet import Chain
from moco.data.nyu import open_nyu
from moco.errors import CheckpointError, DataError
from moco.evaluate.depth_data import Depths, layer_maps, read_depths
from moco.evaluate.depth_predictor import DepthSettings, DepthTrainings, doublings
from moco.evaluate.extraction import ImageEncoder, Loading, load_image_encoder
from moco.evaluate.layers import lacks_statistics
from moco.lock import hold_on_main
from moco.log import RunLog, provenance
from moco.precision import kernels
from moco.run_files import ARGS, DEPTH_RESULT, DEPTH_STATE, write_json
from moco.stop import StopRequest


@kernels(deterministic=False)
def evaluate_depth(
    settings: DepthSettings, loading: Loading, say: Callable[[str], None] = print
) -> dict:
    """Train a predictor on a layer of a frozen encoder and measure its error on the validation
    images; with folds, first on each fold of the training images.

    Leaves args.json, log.jsonl, TensorBoard files, a checkpoint and depth.json in the run folder.

    Returns:
        What depth.json holds.

    Raises:
        DataError, CheckpointError, TrainingError: for the user.
        SystemExit: after a request to stop, once the step is done and saved.
    """
    encoder, images, depths, known = _prepare(settings, loading, say)
    with contextlib.ExitStack() as at_exit:
        hold_on_main(settings.save_dir, at_exit)
        args, state = _begin_folder(settings, encoder, depths)
        log = RunLog(settings.save_dir, first_step=(state or {}).get("step", 0))
        at_exit.callback(log.close)
        stop = StopRequest()
        at_exit.callback(stop.restore)
        run = DepthTrainings(settings, loading.device, log, stop, args, state, say)
        result = {
            "checkpoint": checkpoint.without_secrets(settings.pretrained),
            **encoder.facts,
            "layer": settings.layer,
            "train_images": len(depths["train"].metres),
            "val_images": len(depths["val"].metres),
            "unknown_pixels": known,
        }
        variance = depths["train"].mean_and_std()[1] ** 2
        if settings.folds:
            result["folds"] = _cross_validate(run, images["train"], depths["train"])
        error = run.train(images["train"], depths["train"], images["val"], depths["val"])
        mean = depths["train"].mean_and_std()[0]
        constant = depths["val"].mse(mean)
        per_pixel = depths["val"].mse(depths["train"].pixel_means())
        errors = {"mse": error, "constant": constant, "pixel_mean": per_pixel}
        result |= {f"{name}_m2": value for name, value in errors.items()}
        result |= {name: value / variance for name, value in errors.items()}
        result["protocol"] = {n: v for n, v in settings.to_flat().items() if n != "pretrained"}
        write_json(settings.save_dir / DEPTH_RESULT, result)
    say(summary(result))
    return result


def summary(result: dict) -> str:
    """The line of a depth.json."""
    return (
        f"{result['layer']}: val MSE {result['mse']:.4f} of the training depth's variance "
        f"({result['mse_m2']:.2f} m^2); constant {result['constant']:.3f}, per-pixel mean "
        f"{result['pixel_mean']:.3f}; {result['val_images']} images"
    )


def _prepare(
    settings: DepthSettings, loading: Loading, say: Callable[[str], None]
) -> tuple[ImageEncoder, dict[str, Tensor], dict[str, Depths], int]:
    """The encoder, maps of its layer and depth by split, and how many pixels have no depth."""
    encoder = load_image_encoder(settings.pretrained, layer="backbone")
    module = encoder.module
    maps = [name for name in getattr(module, "layers", ()) if name.startswith("conv")]
    if not isinstance(module, Chain) or settings.layer not in maps:
        layers = f"; there are {', '.join(maps)}" if maps else ": its maps have no names"
        raise CheckpointError(
            f"{settings.pretrained} holds a {encoder.facts['arch']}, which has no --layer "
            f"{settings.layer} to predict depth from{layers}"
        )
    size = settings.depth_size or encoder.image_size
    pairs = {split: open_nyu(settings.data, split, settings.unit) for split in ("train", "val")}
    if len(pairs["train"]) < max(2, settings.folds or 0):
        needed = f"--folds {settings.folds}" if settings.folds else "training"
        raise DataError(
            f"{settings.data} has {len(pairs['train'])} training image(s), too few for {needed}"
        )
    with torch.no_grad():
        empty = torch.zeros(1, 3, encoder.image_size, encoder.image_size)
        _, channels, side, _ = module(empty, layer=settings.layer).shape
    doublings(channels, side, size)  # refuses what does not fit
    depths = {split: read_depths(found, size) for split, found in pairs.items()}
    unknown = sum(int((~found.known).sum()) for found in depths.values())
    say(
        f"   encoder: {encoder.facts['arch']}, epoch {encoder.facts['epoch']} of "
        f"{encoder.facts['objective'] or 'unknown objective'}; "
        f"{settings.layer} is {channels} x {side} x {side}"
    )
    if lacks_statistics(module):
        say(
            "warning: batch norm has never seen a batch, so features of this untrained encoder "
            "mean little; scripts/train_in_batch.py --max-steps 0 saves one with statistics"
        )
    mean, std = depths["train"].mean_and_std()
    say(
        f"      data: {len(pairs['train'])} training and {len(pairs['val'])} validation images, "
        f"{encoder.image_size} px, depth {size} px: mean {mean:.3f} m, deviation {std:.3f} m, "
        f"{unknown} pixels without depth are left out of the error"
    )
    images = {split: layer_maps(encoder, settings.layer, p, loading) for split, p in pairs.items()}
    return encoder, images, depths, unknown


def _begin_folder(
    settings: DepthSettings, encoder: ImageEncoder, depths: dict[str, Depths]
) -> tuple[dict, dict | None]:
    """Write args.json; (arguments, the state to go on from, if there is one)."""
    folder, path = settings.save_dir, settings.save_dir / DEPTH_STATE
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint.remove_unfinished(folder)
    args = {
        **settings.to_flat(),
        "encoder": checkpoint.checksum(encoder.module.state_dict()),
        "depth": checkpoint.checksum({split: found.metres for split, found in depths.items()}),
    }
    state = None
    if path.is_file():
        if not settings.resume:
            raise CheckpointError(
                f"{folder} already holds an evaluation: go on with --resume auto, or choose "
                "another --save-dir"
            )
        state = checkpoint.read_checkpoint(path)
        before = checkpoint.saved_args(state)
        changed = [n for n in args if n != "pretrained" and before.get(n, args[n]) != args[n]]
        if changed:
            raise CheckpointError(
                f"{path} was made with other values of {', '.join(changed)}; choose another "
                "--save-dir"
            )
    write_json(folder / ARGS, {**args, "data": settings.data, "provenance": provenance()})
    return args, state


def _cross_validate(run: DepthTrainings, images: Tensor, depths: Depths) -> dict:
    """Error on each fold of the training images, as a share of the variance of the others."""
    count, shares = run.settings.folds, []
    generator = torch.Generator().manual_seed(run.settings.seed)
    order = torch.randperm(len(images), generator=generator).tolist()
    for number in range(count):
        held_out = sorted(order[number::count])
        rest = sorted(set(order) - set(held_out))
        variance = depths[rest].mean_and_std()[1] ** 2
        error = run.train(images[rest], depths[rest], images[held_out], depths[held_out])
        shares.append(error / variance)
        run.say(f"fold {number + 1} of {count}: {shares[-1]:.4f} of the variance")
    mean = sum(shares) / count
    run.say(f"{run.settings.layer}: {mean:.4f} on {count} folds of the training images")
    return {"count": count, "mse": shares, "mean": mean}
