"""The depth predictor of arXiv:2005.10242, Table 6, and its training on maps of a layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from moco import checkpoint
from moco.data.loader import EpochBatches
from moco.errors import DataError, TrainingError
from moco.evaluate.depth_data import Depths
from moco.evaluate.loop import EvaluationLoop
from moco.log import RunLog
from moco.run_files import DEPTH_STATE
from moco.stop import StopRequest

BETAS = (0.5, 0.999)
EPOCHS_BETWEEN_SAVES = 10


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


class DepthTrainings:
    """Trainings one after another, each resumed from the step that it has reached."""

    def __init__(
        self,
        settings: DepthSettings,
        device: torch.device,
        log: RunLog,
        stop: StopRequest,
        args: dict,
        state: dict | None,
        say: Callable[[str], None],
    ) -> None:
        self.settings, self.device, self.log, self.stop = settings, device, log, stop
        self.args, self.state, self.say = args, state or {}, say
        self.errors: list[float] = list(self.state.get("errors", []))  # of finished trainings
        self.started, self.step = 0, self.state.get("step", 0)

    def train(self, images: Tensor, depths: Depths, val_images: Tensor, val: Depths) -> float:
        """Error on `val` in square metres of a predictor trained on the others, after the last
        epoch."""
        self.started += 1
        if self.started > len(self.errors):
            loop = _PredictorLoop(self, images, depths)
            loop.train(*loop.restore())
            self.errors.append(loop.error(val_images, val))
            loop.save(0, 0)
        return self.errors[self.started - 1]


class _PredictorLoop(EvaluationLoop):
    """A predictor that learns the depth of known pixels, less their mean, in deviations.

    Args:
        images: (N, C, H, W) of the layer.
    """

    def __init__(self, run: DepthTrainings, images: Tensor, depths: Depths) -> None:
        settings, folds = run.settings, run.settings.folds or 0
        size = min(settings.batch_size, len(images))
        self.order = EpochBatches(len(images), size, seed=settings.seed, keep_last=True)
        super().__init__(
            settings,
            self.order.batches_per_epoch(),
            batch_size=size,
            device=run.device,
            stop=run.stop,
            folder=settings.save_dir,
            where=f"fold {run.started} of {folds}, " if run.started <= folds else "",
        )
        self.run, self.images, self.known = run, images, depths.known
        self.mean, self.std = depths.mean_and_std()
        self.standard = (depths.metres - self.mean) / self.std
        torch.manual_seed(settings.seed)
        (_, channels, side, _), pixels = images.shape, depths.metres.shape[-1]
        self.predictor = DepthPredictor(channels, doublings(channels, side, pixels)).to(run.device)
        parameters = self.predictor.parameters()
        self.adam = torch.optim.Adam(parameters, settings.lr, betas=BETAS, eps=1e-8)
        self.loss, self.count = 0.0, 0  # sum over the images of this epoch, and how many

    def restore(self) -> tuple[int, int]:
        """The epoch, and the step of it, to go on from."""
        state, self.run.state = self.run.state, {}
        epoch, step = state.get("epoch", 0), state.get("step_in_epoch", 0)
        if epoch or step:
            self.predictor.load_state_dict(state["predictor"])
            self.adam.load_state_dict(state["optimizer"])
            where = f"{self.where}after {epoch} epochs" + (f" and {step} steps" if step else "")
            self.run.say(f"resuming {self.folder / DEPTH_STATE}, {where}")
        if step:
            self.loss, self.count = state["losses"]["sum"], state["losses"]["count"]
        return epoch, step

    def batches(self, epoch: int, start: int) -> EpochBatches:
        self.order.set_epoch(epoch, start)
        return self.order

    def begin_epoch(self, factor: float) -> None:
        self.adam.param_groups[0]["lr"] = self.run.settings.lr * factor
        self.predictor.train()

    def step(self, batch: Sequence[tuple[int, int]]) -> None:
        rows = [index for _, index in batch]
        here = self.known[rows].to(self.device)
        out = self.predictor(self.images[rows].to(self.device)).squeeze(1)
        error = (out - self.standard[rows].to(self.device)).square()
        loss = error[here].mean()
        self.adam.zero_grad()
        loss.backward()
        self.adam.step()
        self.run.step += 1
        self.loss, self.count = self.loss + loss.item() * len(rows), self.count + len(rows)

    def report(self, epoch: int, step: int) -> None:
        if step < self.steps:
            return
        self.check(epoch, step)
        loss, rate = self.loss / self.count, self.adam.param_groups[0]["lr"]
        self.loss, self.count = 0.0, 0
        facts = {"epoch": epoch, "lr": rate, "training": self.run.started}
        self.run.log.scalars("depth", self.run.step, {"loss": loss}, **facts)
        if (epoch + 1) % EPOCHS_BETWEEN_SAVES == 0 or epoch + 1 == self.epochs:
            text = f"{self.where}epoch [{epoch}/{self.epochs}]  loss {loss:.4f}  lr {rate:g}"
            self.printer.line(text, short=text)

    def check(self, epoch: int, step: int) -> None:
        if not math.isfinite(self.loss):
            where = f"{self.where}epoch {epoch}, step {step}"
            raise TrainingError(f"the predictor's loss is {self.loss} in {where}; lower --lr")

    def end_epoch(self, epoch: int) -> None:
        if (epoch + 1) % EPOCHS_BETWEEN_SAVES == 0 and epoch + 1 < self.epochs:
            self.save(epoch + 1, 0)

    def save(self, epochs: int, step: int) -> None:
        within = {"step_in_epoch": step, "losses": {"sum": self.loss, "count": self.count}}
        content = {
            "version": checkpoint.FORMAT_VERSION,
            "epoch": epochs,
            "step": self.run.step,
            "errors": self.run.errors,
            "predictor": self.predictor.state_dict(),
            "optimizer": self.adam.state_dict(),
            "args": self.run.args,
            **(within if step else {}),
        }
        checkpoint.write_checkpoint(self.folder / DEPTH_STATE, content)

    @torch.no_grad()
    def error(self, images: Tensor, depths: Depths) -> float:
        """Mean squared error in square metres."""
        self.predictor.eval()
        parts = [self.predictor(p.to(self.device)).squeeze(1).cpu() for p in images.split(64)]
        return depths.mse(torch.cat(parts) * self.std + self.mean)
