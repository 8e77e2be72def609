"""Depth from a frozen encoder's layer: the predictor of arXiv:2005.10242, Table 6, on NYU-Depth-V2.

The paper's unit of the error is not stated; both are given here: square metres, and as a share of
the variance of the training depth, beside the errors of a constant and of a mean for each pixel.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from moco import checkpoint
from moco.alexnet import Chain
from moco.data.loader import EpochBatches
from moco.data.nyu import open_nyu
from moco.errors import CheckpointError, DataError, TrainingError
from moco.evaluate.depth_data import Depths, layer_maps, read_depths
from moco.evaluate.extraction import ImageEncoder, Loading, load_image_encoder
from moco.evaluate.layers import lacks_statistics
from moco.lock import hold_on_main
from moco.log import RunLog, provenance
from moco.progress import progress
from moco.run_files import ARGS, DEPTH_RESULT, DEPTH_STATE, write_json
from moco.schedule import learning_rate
from moco.stop import StopRequest

BETAS = (0.5, 0.999)


@dataclass(frozen=True)
class DepthSettings:
    """What is evaluated, and how the predictor is trained (the defaults are the paper's).

    Attributes:
        unit: of depth files, as `moco.data.nyu.open_nyu` takes it.
        depth_size: side of the predicted map; None for that of the encoder's images.
        folds: also cross-validate within the training images.
    """

    data: str
    pretrained: str
    layer: str
    save_dir: Path
    unit: str | None = None
    depth_size: int | None = None
    folds: int | None = None
    epochs: int = 120
    batch_size: int = 128
    lr: float = 3e-3
    schedule: tuple[int, ...] = (70, 90, 100, 110)
    schedule_factor: float = 0.2
    seed: int = 0
    resume: bool = False

    def to_flat(self) -> dict:
        """Without what does not change a result."""
        flat = {n: v for n, v in asdict(self).items() if n not in ("save_dir", "resume", "data")}
        return {**flat, "schedule": list(self.schedule)}


class DepthPredictor(nn.Sequential):
    """(N, C, H, W) -> (N, 1, 2^n H, 2^n W): n times a transposed convolution that doubles the map
    and halves the channels, batch norm and ReLU, then a 3x3 convolution.

    Table 6 has kernel 3, stride 2 and padding 1, which give 2H - 1; output padding 1 gives the 2H
    that it says.
    """

    def __init__(self, channels: int, doublings: int) -> None:
        blocks: list[nn.Module] = []
        for _ in range(doublings):
            halved = channels // 2
            blocks += [
                nn.ConvTranspose2d(channels, halved, 3, stride=2, padding=1, output_padding=1),
                nn.BatchNorm2d(halved),
                nn.ReLU(inplace=True),
            ]
            channels = halved
        super().__init__(*blocks, nn.Conv2d(channels, 1, 3, padding=1))


def doublings(channels: int, side: int, depth_size: int) -> int:
    """How often a map of `side` pixels is doubled to `depth_size`.

    Raises:
        DataError: no whole number of times, or there are too few channels to halve so often.
    """
    times = math.log2(depth_size / side)
    if times % 1 or times < 0:
        raise DataError(
            f"depth of {depth_size} pixels is not the layer's {side} doubled some times; give "
            f"--depth-size {side * 2 ** max(0, round(times))}"
        )
    if channels >> int(times) < 1:
        raise DataError(
            f"{channels} channels cannot be halved {int(times)} times, from {side} to {depth_size} "
            "pixels; give a smaller --depth-size, or a wider encoder"
        )
    return int(times)


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
        SystemExit: after a request to stop, once the epoch is done and saved.
    """
    encoder, images, depths, known = _prepare(settings, loading, say)
    with contextlib.ExitStack() as at_exit:
        hold_on_main(settings.save_dir, at_exit)
        args, state = _begin_folder(settings, encoder, depths)
        log = RunLog(settings.save_dir, first_step=(state or {}).get("step", 0))
        at_exit.callback(log.close)
        stop = StopRequest()
        at_exit.callback(stop.restore)
        run = _Run(settings, loading.device, log, stop, args, state, say)
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
                f"{path} was made with another {', '.join(changed)}; choose another --save-dir"
            )
    write_json(folder / ARGS, {**args, "data": settings.data, "provenance": provenance()})
    return args, state


def _cross_validate(run: _Run, images: Tensor, depths: Depths) -> dict:
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


class _Run:
    """Trainings one after another, each resumed from the epoch that it has reached."""

    def __init__(
        self, settings: DepthSettings, device: torch.device, log: RunLog, stop: StopRequest,
        args: dict, state: dict | None, say: Callable[[str], None],
    ) -> None:  # fmt: skip
        self.settings, self.device, self.log, self.stop = settings, device, log, stop
        self.args, self.state, self.say = args, state, say
        self.done: list[float] = list((state or {}).get("errors", []))  # of finished trainings
        self.started, self.step = 0, (state or {}).get("step", 0)

    def train(self, images: Tensor, depths: Depths, val_images: Tensor, val: Depths) -> float:
        """Error on `val` in square metres of a predictor trained on the others, after the last
        epoch."""
        self.started += 1
        if self.started <= len(self.done):
            return self.done[self.started - 1]
        settings, (mean, std) = self.settings, depths.mean_and_std()
        torch.manual_seed(settings.seed)
        size, (_, channels, side, _) = depths.metres.shape[-1], images.shape
        predictor = DepthPredictor(channels, doublings(channels, side, size)).to(self.device)
        adam = torch.optim.Adam(predictor.parameters(), settings.lr, betas=BETAS, eps=1e-8)
        first = self._restore(predictor, adam)
        batches = EpochBatches(
            len(images), min(settings.batch_size, len(images)), seed=settings.seed, keep_last=True
        )
        standard = (depths.metres - mean) / std
        for epoch in progress(range(first, settings.epochs), "depth predictor"):
            rate = learning_rate(
                epoch, base=settings.lr, epochs=settings.epochs, milestones=settings.schedule,
                factor=settings.schedule_factor,
            )  # fmt: skip
            adam.param_groups[0]["lr"] = rate
            batches.set_epoch(epoch)
            loss = self._epoch(predictor, adam, batches, images, standard, depths.known)
            self.step += batches.batches_per_epoch()
            facts = {"epoch": epoch, "lr": rate, "training": self.started}
            self.log.scalars("depth", self.step, {"loss": loss}, **facts)
            self._save_if_asked(predictor, adam, epoch + 1)
        error = self._error(predictor, val_images, val, mean, std)
        self.done.append(error)
        self._save(predictor, adam, 0)
        return error

    def _epoch(
        self, predictor: nn.Module, adam: torch.optim.Optimizer, batches: EpochBatches,
        images: Tensor, standard: Tensor, known: Tensor,
    ) -> float:  # fmt: skip
        """Train for an epoch; the mean loss."""
        predictor.train()
        total, count = 0.0, 0
        for batch in batches:
            rows = [index for _, index in batch]
            here = known[rows].to(self.device)
            out = predictor(images[rows].to(self.device)).squeeze(1)
            error = (out - standard[rows].to(self.device)).square()
            loss = error[here].mean()
            adam.zero_grad()
            loss.backward()
            adam.step()
            total, count = total + loss.item() * len(rows), count + len(rows)
        if not math.isfinite(total):
            raise TrainingError(f"the predictor's loss is {total}; lower --lr")
        return total / count

    @torch.no_grad()
    def _error(
        self, predictor: nn.Module, images: Tensor, depths: Depths, mean: float, std: float
    ) -> float:
        predictor.eval()
        parts = [predictor(part.to(self.device)).squeeze(1).cpu() for part in images.split(64)]
        return depths.mse(torch.cat(parts) * std + mean)

    def _restore(self, predictor: nn.Module, adam: torch.optim.Optimizer) -> int:
        """The epoch to begin with."""
        state, self.state = self.state, None
        if state is None or not state["epoch"]:
            return 0
        predictor.load_state_dict(state["predictor"])
        adam.load_state_dict(state["optimizer"])
        self.say(f"resuming {self.settings.save_dir / DEPTH_STATE} after {state['epoch']} epochs")
        return state["epoch"]

    def _save_if_asked(self, predictor: nn.Module, adam: torch.optim.Optimizer, epoch: int) -> None:
        if epoch < self.settings.epochs and (self.stop.requested or epoch % 10 == 0):
            self._save(predictor, adam, epoch)
        if self.stop.requested and epoch < self.settings.epochs:
            self.say(
                f"stopped by {self.stop.name} after {epoch} epochs; go on with --save-dir "
                f"{self.settings.save_dir} --resume auto"
            )
            raise SystemExit(self.stop.exit_status)

    def _save(self, predictor: nn.Module, adam: torch.optim.Optimizer, epoch: int) -> None:
        content = {
            "version": checkpoint.FORMAT_VERSION,
            "epoch": epoch,
            "step": self.step,
            "errors": self.done,
            "predictor": predictor.state_dict(),
            "optimizer": adam.state_dict(),
            "args": self.args,
        }
        checkpoint.write_checkpoint(self.settings.save_dir / DEPTH_STATE, content)
