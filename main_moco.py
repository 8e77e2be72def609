#!/usr/bin/env python
"""Pretrain an encoder with MoCo and the alignment + uniformity objective.

    python main_moco.py DIR                              all visible GPUs, else the CPU
    torchrun --nproc-per-node 8 main_moco.py DIR         one process per GPU, started by torchrun
    python main_moco.py -a resnet50 --lr 0.03 --batch-size 256 --mlp --aug-plus --cos \\
        --dist-url tcp://HOST:10001 --multiprocessing-distributed --world-size 2 --rank 0 DIR

DIR has `train/CLASS/IMAGE` as ImageNet does, or is any folder with images. The default objective is
3 * align(alpha=2) + 1 * uniform(t=3); `--moco-t TAU` selects upstream MoCo's InfoNCE instead.
Read main() first: parse -> check -> launch -> train().
"""

from __future__ import annotations

import argparse
import functools
import math
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from moco import checkpoint, distributed, encoders, loader, options
from moco.builder import MoCo, MoCoLosses
from moco.log import Means, RunLog, StepPrinter, provenance, write_json
from moco.schedule import learning_rate

# ------------------------------------------------------------------------------------------------
# Command line
# ------------------------------------------------------------------------------------------------

# The terms of the default objective; --moco-t replaces them.
_OBJECTIVE_DEFAULTS = {
    "contr_w": 0.0,
    "contr_tau": 0.07,
    "align_w": 3.0,
    "align_alpha": 2.0,
    "unif_w": 1.0,
    "unif_t": 3.0,
}


def build_parser() -> argparse.ArgumentParser:
    parser = options.Parser(
        description="MoCo pretraining with alignment + uniformity", allow_abbrev=False
    )
    options.add_shared_options(parser, lr=0.03, weight_decay=1e-4, epochs=200, schedule=[120, 160])
    parser.set_defaults(arch="resnet50")

    # fmt: off
    moco = parser.add_argument_group("MoCo")
    moco.add_argument("--moco-dim", type=int, default=128, help="feature dimension (%(default)s)")
    moco.add_argument("--moco-k", type=int, default=65536, help="queue size (%(default)s)")
    moco.add_argument("--moco-m", type=float, default=0.999,
                      help="momentum of the key encoder (%(default)s)")
    moco.add_argument("--mlp", action="store_true", help="two-layer projection head (MoCo v2)")
    moco.add_argument("--bn-splits", default="auto", metavar="S",
                      help="batch-norm groups per device; auto: of 32 images each")

    terms = parser.add_argument_group(
        "objective", "contr_w * InfoNCE(tau) + align_w * align(alpha) + unif_w * uniform(t)"
    )
    for name, value in _OBJECTIVE_DEFAULTS.items():
        terms.add_argument(f"--moco-{name.replace('_', '-')}", dest=name, type=float,
                           metavar="X", help=f"default {value:g}")
    terms.add_argument("--moco-unif-no-intra-batch", dest="intra_batch", action="store_false",
                       help="query-queue pairs only (Eq. 21 instead of 22)")
    terms.add_argument("--moco-t", type=float, metavar="TAU",
                       help="InfoNCE alone with this temperature, as in upstream MoCo")

    views = parser.add_argument_group("views")
    views.add_argument("--aug-plus", action="store_true", help="augmentation of MoCo v2")
    views.add_argument("--image-size", type=int, default=224, metavar="PX", help="%(default)s")
    views.add_argument("--small-stem", action="store_true",
                       help="ResNet stem for images of 32 to 64 pixels")
    views.add_argument("--crop-scale", type=float, nargs=2, default=[0.2, 1.0],
                       metavar=("MIN", "MAX"), help="share of the area (%(default)s)")
    views.add_argument("--no-blur", dest="blur", action="store_false",
                       help="leave the Gaussian blur out of --aug-plus")
    views.add_argument("--mean", type=float, nargs=3, default=list(loader.IMAGENET_MEAN),
                       metavar=("R", "G", "B"))
    views.add_argument("--std", type=float, nargs=3, default=list(loader.IMAGENET_STD),
                       metavar=("R", "G", "B"))

    training = parser.add_argument_group("more of training")
    training.add_argument("--cos", action="store_true", help="cosine learning-rate schedule")
    training.add_argument("--warmup-epochs", type=int, default=0, metavar="N",
                          help="epochs of rising learning rate (%(default)s)")
    training.add_argument("--max-steps", type=int, metavar="N",
                          help="stop after N steps of the run; 0 saves the untrained encoder")
    training.add_argument("--amp", choices=("off", "bf16", "fp16"), default="off",
                          help="mixed precision of the encoders (%(default)s)")
    training.add_argument("--keep-last", type=int, default=5, metavar="N",
                          help="checkpoints to keep (%(default)s), the newest, and")
    training.add_argument("--keep-every", type=int, default=20, metavar="M",
                          help="that of every M-th epoch (%(default)s; 0: none)")
    # fmt: on
    return parser


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse and check: all that can be known now is refused now, with exit status 2."""
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        _resolve_objective(args)
    except ValueError as error:
        parser.error(str(error))
    options.check_shared_options(parser, args)
    try:
        _check_options(args)
        args.bn_groups = _batch_norm_groups(args)
        # Also refuses an unknown arch, a stem or an image size that does not fit.
        with_head = encoders.build_encoder(
            args.arch, args.moco_dim, image_size=args.image_size, small_stem=args.small_stem
        )
        encoders.check_image_size(with_head, args.image_size)
    except ValueError as error:
        parser.error(str(error))
    options.check_data_folder(parser, args, ["pretrain"])
    _check_run_folder(parser, args)
    return args


def _resolve_objective(args: argparse.Namespace) -> None:
    """Fill in the defaults of the objective, or InfoNCE alone for --moco-t."""
    given = [name for name in _OBJECTIVE_DEFAULTS if getattr(args, name) is not None]
    if args.moco_t is not None:
        if given or not args.intra_batch:
            flag = f"--moco-{given[0].replace('_', '-')}" if given else "--moco-unif-no-intra-batch"
            raise ValueError(
                f"--moco-t (InfoNCE alone) cannot be combined with {flag}; give "
                "--moco-contr-w, --moco-contr-tau and the other weights instead"
            )
        args.contr_w, args.contr_tau, args.align_w, args.unif_w = 1.0, args.moco_t, 0.0, 0.0
    for name, value in _OBJECTIVE_DEFAULTS.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    weights = {"contr": args.contr_w, "align": args.align_w, "unif": args.unif_w}
    for name, weight in weights.items():
        if not 0 <= weight < math.inf:
            raise ValueError(f"--moco-{name}-w must be a number of at least 0, got {weight:g}")
    if not any(weights.values()):
        raise ValueError("all loss weights are zero: there is nothing to minimise")
    for name, weight, least in (
        ("contr_tau", args.contr_w, 0),
        ("align_alpha", args.align_w, 1),
        ("unif_t", args.unif_w, 0),
    ):
        value = getattr(args, name)
        if weight and not (0 < value < math.inf and value >= least):
            wanted = "at least 1 (the slope is infinite below)" if least else "positive"
            flag = "moco-t" if name == "contr_tau" and args.moco_t is not None else f"moco-{name}"
            raise ValueError(f"--{flag.replace('_', '-')} must be {wanted}, got {value:g}")
    args.objective = objective_formula(args)


def objective_formula(args: argparse.Namespace) -> str:
    """The objective as a formula, for people to read."""
    pairs = "with intra-batch pairs" if args.intra_batch else "queue only"
    terms = [
        (args.contr_w, f"InfoNCE(tau={args.contr_tau:g})"),
        (args.align_w, f"align(alpha={args.align_alpha:g})"),
        (args.unif_w, f"uniform(t={args.unif_t:g}, {pairs})"),
    ]
    return " + ".join(f"{weight:g} * {term}" for weight, term in terms if weight)


def _check_options(args: argparse.Namespace) -> None:
    for name, value in (
        ("moco-dim", args.moco_dim),
        ("moco-k", args.moco_k),
        ("image-size", args.image_size),
        ("keep-last", args.keep_last),
    ):
        if value < 1:
            raise ValueError(f"--{name} must be at least 1, got {value}")
    for name, value in (("warmup-epochs", args.warmup_epochs), ("keep-every", args.keep_every)):
        if value < 0:
            raise ValueError(f"--{name} must be at least 0, got {value}")
    if args.max_steps is not None and args.max_steps < 0:
        raise ValueError(f"--max-steps must be at least 0, got {args.max_steps}")
    if args.moco_k < args.batch_size:
        raise ValueError(
            f"--moco-k {args.moco_k} is smaller than the global batch of {args.batch_size}: the "
            "queue must hold at least one batch of keys"
        )
    if not 0 <= args.moco_m <= 1:
        raise ValueError(f"--moco-m must be in [0, 1], got {args.moco_m:g}")
    least, most = args.crop_scale
    if not 0 < least <= most <= 1:
        raise ValueError(f"--crop-scale must be 0 < MIN <= MAX <= 1, got {least:g} {most:g}")
    if min(args.std) <= 0:
        raise ValueError(f"--std must be positive, got {args.std}")
    if args.amp == "fp16" and args.devices[0].type == "cpu":
        raise ValueError("--amp fp16 needs a GPU; use bf16 or off on the CPU")


def _batch_norm_groups(args: argparse.Namespace) -> int:
    """Batch-norm groups per device."""
    batch = args.batch_size // args.processes
    if args.bn_splits == "auto":
        return batch // 32 if batch > 32 and batch % 32 == 0 else 1
    try:
        groups = int(args.bn_splits)
    except ValueError:
        raise ValueError(f"--bn-splits must be a number or auto, got {args.bn_splits!r}") from None
    if groups < 1 or batch % groups:
        raise ValueError(
            f"--bn-splits {groups} does not divide the batch of {batch} on each device"
        )
    if batch // groups < 2 and groups > 1:
        raise ValueError(f"--bn-splits {groups} leaves groups of one image, which have no variance")
    return groups


def _check_run_folder(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Find the checkpoint to resume, and never start over in a folder that holds a run."""
    args.checkpoint = None
    found = checkpoint.run_checkpoints(args.save_dir) if args.save_dir else []
    if args.resume == "auto":
        if args.save_dir is None:
            parser.error("--resume auto looks for checkpoints in the run folder: give --save-dir")
        args.checkpoint = str(found[-1]) if found else None
    elif args.resume:
        if not Path(args.resume).is_file():
            parser.error(f"--resume: no such checkpoint: {args.resume}")
        args.checkpoint = args.resume
    elif found:
        parser.error(
            f"{args.save_dir} already holds a run ({found[-1].name}): go on with --resume auto, "
            "or choose another --save-dir"
        )
    if args.save_dir is None:
        name = f"moco-{args.arch}-{_objective_slug(args)}-k{args.moco_k}-b{args.batch_size}"
        args.save_dir = Path("results") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}-s{args.seed}"


def _objective_slug(args: argparse.Namespace) -> str:
    terms = [
        (args.contr_w, f"nce{args.contr_tau:g}"),
        (args.align_w, f"align{args.align_alpha:g}"),
        (args.unif_w, f"unif{args.unif_t:g}"),
    ]
    return "-".join(f"{weight:g}{term}" for weight, term in terms if weight)


# ------------------------------------------------------------------------------------------------
# Training
# ------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> None:
    options.run_worker(train, parse_args(argv))


def train(device: torch.device, args: argparse.Namespace) -> None:
    """The whole run in this process, one of `args.processes`."""
    with options.one_line_errors():
        _train(device, args)


def _train(device: torch.device, args: argparse.Namespace) -> None:
    # Processes that were started apart (torchrun, several nodes) drew their own.
    args.seed, args.save_dir = distributed.broadcast_object((args.seed, args.save_dir))
    saved = checkpoint.read_checkpoint(args.checkpoint) if args.checkpoint else None
    if saved and not args.seed_given:
        args.seed = saved.get("args", {}).get("seed", args.seed)
    torch.manual_seed(args.seed)

    # Data
    images = loader.open_images(
        args.dataset, args.data, "pretrain", per_class=args.images_per_class
    )
    batches = loader.EpochBatches(len(images), args.batch_size, seed=args.seed)
    transform = loader.pretrain_transform(
        args.image_size, aug_plus=args.aug_plus, crop_scale=args.crop_scale, blur=args.blur
    )
    views = loader.AugmentedViews(images, transform, seed=args.seed, views=2)
    pairs = loader.train_loader(
        views, batches, workers=args.workers, pin_memory=device.type == "cuda"
    )
    steps_per_epoch = batches.batches_per_epoch()
    total_steps = args.epochs * steps_per_epoch
    if args.max_steps is not None:
        total_steps = min(total_steps, args.max_steps)

    # Model, optimizer
    moco = build_moco(args).to(device)
    moco.shuffle_generator.manual_seed(args.seed)
    # Both encoders' parameters are listed, as upstream lists them, so that optimizer states can be
    # exchanged; those of the key encoder never get a gradient and are never touched.
    optimizer = torch.optim.SGD(
        moco.parameters(), args.lr, momentum=args.momentum, weight_decay=args.weight_decay
    )
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
    progress = {"epoch": args.start_epoch, "step_in_epoch": 0}
    progress["step"] = args.start_epoch * steps_per_epoch
    if saved:
        progress = resume(saved, args, moco, optimizer, scaler, steps_per_epoch)
    model = distributed.data_parallel(moco, device)

    # Run folder
    if distributed.is_main():
        args.save_dir.mkdir(parents=True, exist_ok=True)
        facts = {**options.plain_values(args), "provenance": provenance()}
        write_json(args.save_dir / "args.json", facts)
    distributed.barrier()
    print_start(args, moco, device, len(images), steps_per_epoch)
    log = RunLog(args.save_dir)
    printer = StepPrinter(total=total_steps, batch_size=args.batch_size, done=progress["step"])

    # Epochs
    means = Means()
    for epoch in range(progress["epoch"], args.epochs):
        lr = learning_rate(
            epoch,
            base=args.lr,
            epochs=args.epochs,
            cos=args.cos,
            milestones=args.schedule,
            factor=args.schedule_factor,
            warmup_epochs=args.warmup_epochs,
        )
        for group in optimizer.param_groups:
            group["lr"] = lr
        model.train()
        batches.set_epoch(epoch, progress["step_in_epoch"])
        for im_q, im_k, _ in printer.batches(pairs):
            if progress["step"] >= total_steps:
                break
            im_q, im_k = (
                loader.normalize(im.to(device, non_blocking=True), args.mean, args.std)
                for im in (im_q, im_k)
            )
            with autocast(device, args.amp):
                losses = model(im_q, im_k)
            loss = losses.combine(args.contr_w, args.align_w, args.unif_w)
            stop_if_not_finite(loss, losses, epoch, progress["step"], args)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()

            progress["step"] += 1
            progress["step_in_epoch"] += 1
            printer.advance()
            means.add("loss", loss)
            for name, value in losses.items():
                means.add(name, value)
            if progress["step"] % args.print_freq == 0 or progress["step"] == total_steps:
                report(printer, log, means, losses, progress, epoch, args, steps_per_epoch, lr)
        if progress["step_in_epoch"] == steps_per_epoch:
            progress.update(epoch=epoch + 1, step_in_epoch=0)
            save(
                checkpoint.epoch_path(args.save_dir, epoch), args, moco, optimizer, scaler, progress
            )
        else:  # --max-steps has ended within an epoch
            save(
                checkpoint.step_path(args.save_dir, progress["step"]),
                args,
                moco,
                optimizer,
                scaler,
                progress,
            )
        if progress["step"] >= total_steps:
            break
    printer.close()
    log.close()
    distributed.print_main(f"done: {progress['step']} steps, checkpoints in {args.save_dir}")


def build_moco(args: argparse.Namespace) -> MoCo:
    """The MoCo module that the command line describes, on the CPU."""
    base_encoder = functools.partial(
        encoders.build_encoder,
        args.arch,
        image_size=args.image_size,
        small_stem=args.small_stem,
        bn_splits=args.bn_groups,
    )
    return MoCo(
        base_encoder,
        args.moco_dim,
        args.moco_k,
        args.moco_m,
        contr_tau=args.contr_tau if args.contr_w else None,
        align_alpha=args.align_alpha if args.align_w else None,
        unif_t=args.unif_t if args.unif_w else None,
        unif_intra_batch=args.intra_batch,
        mlp=args.mlp,
    )


def autocast(device: torch.device, amp: str) -> torch.autocast:
    dtype = torch.float16 if amp == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype=dtype, enabled=amp != "off")


def stop_if_not_finite(
    loss: torch.Tensor, losses: MoCoLosses, epoch: int, step: int, args: argparse.Namespace
) -> None:
    """Stop all ranks together, before the optimizer steps, when the loss of any is NaN or inf."""
    bad = torch.tensor([0.0 if loss.isfinite() else 1.0], device=loss.device)
    if not distributed.sum_over_ranks(bad).item():
        return
    terms = ", ".join(f"{name} {value.item():g}" for name, value in losses.items())
    left = checkpoint.run_checkpoints(args.save_dir)
    raise options.TrainingError(
        f"the loss is not finite in epoch {epoch}, step {step} (rank {distributed.rank()}: "
        f"{terms}); the last good checkpoint is {left[-1] if left else 'none yet'}. "
        "Lower --lr, add --warmup-epochs, or use --amp bf16 instead of fp16"
    )


def report(
    printer: StepPrinter,
    log: RunLog,
    means: Means,
    losses: MoCoLosses,
    progress: dict,
    epoch: int,
    args: argparse.Namespace,
    steps_per_epoch: int,
    lr: float,
) -> None:
    """One line on the screen and in the logs; the only place where the device is waited for,
    beside the check for finite losses."""
    rank = losses.contr_rank()
    if rank is not None:  # of the latest batch on rank 0
        means.add("contr_top1", 100 * (rank < 1).float().mean())
        means.add("contr_top5", 100 * (rank < 5).float().mean())
    values = {**means.take(), "lr": lr, **printer.rates()}
    log.scalars("train", progress["step"], {"epoch": epoch, **values})
    terms = "  ".join(f"{name} {values[name]:.4f}" for name, _ in losses.items())
    printer.line(
        f"epoch [{epoch}/{args.epochs}] step [{progress['step_in_epoch']}/{steps_per_epoch}]  "
        f"loss {values['loss']:.4f}  {terms}  lr {lr:.4g}  "
        f"{values['images_per_s']:.0f} images/s  data {100 * values['data_share']:.0f}%",
        short=f"epoch {epoch}/{args.epochs}, loss {values['loss']:.3f}, "
        f"{values['images_per_s']:.0f} images/s",
    )


def print_start(
    args: argparse.Namespace, moco: MoCo, device: torch.device, images: int, steps_per_epoch: int
) -> None:
    """What will be done, in numbers that a user would otherwise have to work out."""
    per_device = args.batch_size // args.processes
    groups = args.bn_groups
    if not encoders.has_batch_norm(moco.encoder_q):
        norm = "none in this arch"
    elif groups > 1:
        norm = f"{groups} groups of {per_device // groups} on each device"
    else:
        norm = f"one group of {per_device} on each device"
        if args.bn_splits == "auto" and per_device != 32:
            norm += " (groups of 32 need a multiple of 32 above 32 per device)"
    parameters = sum(p.numel() for p in moco.encoder_q.parameters())
    facts = {
        "objective": args.objective,
        "data": f"{images} images, {steps_per_epoch} steps per epoch, {args.epochs} epochs",
        "batch": f"{args.batch_size} over {args.processes} process(es), {per_device} each",
        "batch norm": norm,
        "encoder": f"{args.arch}, {parameters / 1e6:.2f} M parameters, {args.image_size} px"
        + (", small stem" if args.small_stem else ""),
        "queue": f"{args.moco_k} x {args.moco_dim}, {moco.queue.numel() * 4 / 2**20:.1f} MiB",
        "device": _device_name(device) + f", amp {args.amp}, {args.workers} loader worker(s)",
        "seed": f"{args.seed}" + ("" if args.seed_given else " (drawn)"),
        "run folder": str(args.save_dir),
        "code": ", ".join(f"{name} {version}" for name, version in provenance().items()),
    }
    for name, fact in facts.items():
        distributed.print_main(f"{name:>10}: {fact}")


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)} ({device})"
    return f"CPU, {torch.get_num_threads()} threads"


# ------------------------------------------------------------------------------------------------
# Save and resume
# ------------------------------------------------------------------------------------------------


def save(
    path: Path,
    args: argparse.Namespace,
    moco: MoCo,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    progress: dict,
) -> None:
    """Write a checkpoint on rank 0, with the random state of every rank; delete outdated ones."""
    rng = distributed.all_gather(torch.get_rng_state().unsqueeze(0).to(moco.queue.device))
    if distributed.is_main():
        content = {
            "version": checkpoint.FORMAT_VERSION,
            "arch": args.arch,
            **progress,
            "state_dict": {f"module.{name}": t for name, t in moco.state_dict().items()},
            "optimizer": optimizer.state_dict(),
            "scaler": scaler.state_dict() if scaler.is_enabled() else None,
            "shuffle_generator": moco.shuffle_generator.get_state(),
            "rng": rng.cpu(),
            "args": options.plain_values(args),
        }
        checkpoint.write_checkpoint(path, content)
        checkpoint.prune_checkpoints(
            args.save_dir, keep_last=args.keep_last, keep_every=args.keep_every
        )
    distributed.barrier()


def resume(
    content: dict,
    args: argparse.Namespace,
    moco: MoCo,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    steps_per_epoch: int,
) -> dict:
    """Load a checkpoint, ours or upstream MoCo's, and return where it stood."""
    for key in ("arch", "epoch", "state_dict", "optimizer"):
        if key not in content:
            raise checkpoint.CheckpointError(
                f"{args.checkpoint} has no {key!r}, so it is no pretraining checkpoint"
            )
    if content["arch"] != args.arch:
        raise checkpoint.CheckpointError(
            f"{args.checkpoint} is of arch {content['arch']}, this run is of {args.arch}"
        )
    state = {name.removeprefix("module."): t for name, t in content["state_dict"].items()}
    state.pop("scalar_label", None)  # of moco_align_uniform's InfoNCE runs; always 0
    try:
        moco.load_state_dict(state)
        optimizer.load_state_dict(content["optimizer"])
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise checkpoint.CheckpointError(
            f"{args.checkpoint} does not fit these arguments: {reason[:400]}"
        ) from error
    if scaler.is_enabled() and content.get("scaler"):
        scaler.load_state_dict(content["scaler"])
    if "shuffle_generator" in content:
        moco.shuffle_generator.set_state(content["shuffle_generator"])
    if "rng" in content and len(content["rng"]) == distributed.world_size():
        torch.set_rng_state(content["rng"][distributed.rank()])
    progress = {"epoch": content["epoch"], "step_in_epoch": content.get("step_in_epoch", 0)}
    progress["step"] = content.get("step", content["epoch"] * steps_per_epoch)
    distributed.print_main(
        f"resuming {args.checkpoint}: {progress['epoch']} epochs and "
        f"{progress['step_in_epoch']} steps done"
    )
    return progress


if __name__ == "__main__":
    main()
