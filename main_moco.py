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
import contextlib
import functools
import math
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from moco import checkpoint, cli, distributed, encoders
from moco.builder import MoCo, MoCoLosses
from moco.data import loader
from moco.data.images import names_digest, open_images
from moco.data.views import IMAGENET_MEAN, IMAGENET_STD, pretrain_recipe
from moco.errors import CheckpointError, TrainingError
from moco.log import Means, RunLog, StepPrinter, provenance
from moco.profiling import StepProfile
from moco.run_files import write_json
from moco.schedule import learning_rate
from moco.tasks.online_knn import OnlineKnn
from moco.train import guards, monitor, step
from moco.train import state as runs
from moco.train.state import BackgroundWriter, Run

# Exit status of a run that was asked to stop by SIGTERM or SIGUSR1 and has saved: "try again".
EXIT_PREEMPTED = 75

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
    parser = cli.Parser(
        description="MoCo pretraining with alignment + uniformity", allow_abbrev=False
    )
    cli.add_shared_options(parser, lr=0.03, weight_decay=1e-4, epochs=200, schedule=[120, 160])
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
    moco.add_argument("--symmetric", action="store_true",
                      help="each view is query and key in turn: both losses are summed, and the "
                      "keys of both views enter the queue")

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
    views.add_argument("--views", choices=("cpu", "device"), default="cpu",
                       help="cpu: all by Pillow in loader processes; device: they decode and crop, "
                       "the device does colour and blur (%(default)s)")
    views.add_argument("--mean", type=float, nargs=3, default=list(IMAGENET_MEAN),
                       metavar=("R", "G", "B"))
    views.add_argument("--std", type=float, nargs=3, default=list(IMAGENET_STD),
                       metavar=("R", "G", "B"))

    training = parser.add_argument_group("more of training")
    training.add_argument("--cos", action="store_true", help="cosine learning-rate schedule")
    training.add_argument("--warmup-epochs", type=int, default=0, metavar="N",
                          help="epochs of rising learning rate (%(default)s)")
    training.add_argument("--max-steps", type=int, metavar="N",
                          help="stop after N steps of the run; 0 saves the untrained encoder")
    training.add_argument("--amp", choices=("off", "bf16", "fp16"), default="off",
                          help="mixed precision of the encoders (%(default)s)")
    training.add_argument("--init-from", type=cli.non_empty, metavar="CHECKPOINT",
                          help="start from the encoder in this file (weights, not a run: queue, "
                          "optimizer and epoch are new)")
    training.add_argument("--accumulate", type=int, default=1, metavar="N",
                          help="each device's share of --batch-size goes through in N parts, for "
                          "less memory; parts relate to each other as devices do, with batch norm, "
                          "shuffle and intra-batch pairs of their own; optimizer, key encoder and "
                          "queue advance once per step (%(default)s)")
    training.add_argument("--keep-last", type=int, default=5, metavar="N",
                          help="checkpoints to keep (%(default)s), the newest, and")
    training.add_argument("--keep-every", type=int, default=20, metavar="M",
                          help="that of every M-th epoch (%(default)s; 0: none)")
    speed = parser.add_argument_group(
        "speed", "what is learned stays the same; a run may go on under other settings than it "
        "began with, but not bit for bit"
    )
    speed.add_argument("--channels-last", action=argparse.BooleanOptionalAction, default=None,
                       help="weights and images in NHWC order (default: on the CPU and "
                       "with --amp)")
    speed.add_argument("--compile", action="store_true",
                       help="compile both encoders by torch.compile: minutes at the start")
    speed.add_argument("--deterministic", action="store_true",
                       help="only kernels that give the same bits every time; slower on a GPU")
    speed.add_argument("--profile", action="store_true",
                       help="write a trace of ten steps and print where their time goes")
    watching = parser.add_argument_group("watching")
    watching.add_argument("--knn-every", type=int, default=10, metavar="N",
                          help="k-NN accuracy on val/ every N epochs, and at the end, where images "
                          "have labels (%(default)s; 0: never)")
    watching.add_argument("--knn-bank", type=int, default=50000, metavar="N",
                          help="training images to look for neighbours among, as many of each "
                          "class (%(default)s)")
    safety = parser.add_argument_group("never lose a run")
    safety.add_argument("--save-steps", type=int, default=0, metavar="N",
                        help="save every N steps too (0: after each epoch only)")
    safety.add_argument("--save-minutes", type=float, default=0, metavar="M",
                        help="save every M minutes too (0: no)")
    safety.add_argument("--allow-changes", action="store_true",
                        help="resume although what is learned changes; logs the differences")
    safety.add_argument("--max-overflows", type=int, default=20, metavar="N",
                        help="stop after more fp16 overflows in a row (%(default)s)")
    safety.add_argument("--check-every", type=int, default=1000, metavar="N",
                        help="steps between proofs that ranks are equal (%(default)s; 0: never)")
    safety.add_argument("--collapse-steps", type=int, default=500, metavar="N",
                        help="warn after N steps with collapsed features (%(default)s; 0: never)")
    safety.add_argument("--skip-bad-images", action="store_true",
                        help="replace an unreadable image by the next one that can be read")
    safety.add_argument("--max-bad-share", type=float, default=0.01, metavar="S",
                        help="stop when a larger share of images is unreadable (%(default)s)")
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
    cli.check_shared_options(parser, args)
    try:
        _check_options(args)
        args.bn_groups = _batch_norm_groups(args)
        args.bn_group_size = _part_size(args) // args.bn_groups
        # Also refuses an unknown arch, a stem or an image size that does not fit.
        with_head = encoders.build_encoder(
            args.arch, args.moco_dim, image_size=args.image_size, small_stem=args.small_stem
        )
        encoders.check_image_size(with_head, args.image_size)
        if args.channels_last is None:
            args.channels_last = step.channels_last_helps(args.devices[0], args.amp)
        if args.compile:
            _check_compiler(args.devices[0])
    except ValueError as error:
        parser.error(str(error))
    cli.check_data_folder(parser, args, {"pretrain": args.batch_size})
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
        raise ValueError(
            "all loss weights are zero: there is nothing to minimise; give one of --moco-align-w, "
            "--moco-unif-w, --moco-contr-w"
        )
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
    formula = " + ".join(f"{weight:g} * {term}" for weight, term in terms if weight)
    return f"{formula}, symmetric" if args.symmetric else formula


def _check_options(args: argparse.Namespace) -> None:
    for name, value in (
        ("moco-dim", args.moco_dim),
        ("moco-k", args.moco_k),
        ("image-size", args.image_size),
        ("keep-last", args.keep_last),
        ("accumulate", args.accumulate),
        ("knn-bank", args.knn_bank),
    ):
        if value < 1:
            raise ValueError(f"--{name} must be at least 1, got {value}")
    for name in ("warmup_epochs", "keep_every", "save_steps", "save_minutes", "max_overflows",
                 "check_every", "collapse_steps", "max_bad_share", "knn_every"):  # fmt: skip
        if not 0 <= getattr(args, name) < math.inf:
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag} must be at least 0, got {getattr(args, name)}")
    if args.epochs < 1:
        raise ValueError(f"--epochs must be at least 1, got {args.epochs}")
    if args.batch_size // args.processes < 2:
        raise ValueError(
            f"--batch-size {args.batch_size} over {args.processes} process(es) leaves one image "
            "each; batch norm and intra-batch pairs need at least two"
        )
    share = args.batch_size // args.processes
    if share % args.accumulate or share // args.accumulate < 2:
        raise ValueError(
            f"--accumulate {args.accumulate} does not split the batch of {share} on each device "
            "into equal parts of at least two images"
        )
    if args.max_steps is not None and args.max_steps < 0:
        raise ValueError(f"--max-steps must be at least 0, got {args.max_steps}")
    if args.moco_k < args.batch_size:
        raise ValueError(
            f"--moco-k {args.moco_k} is smaller than the global batch of {args.batch_size}: the "
            "queue must hold at least one batch of keys"
        )
    if args.symmetric and args.moco_k < 2 * args.batch_size:
        raise ValueError(
            f"--moco-k {args.moco_k} is smaller than twice the global batch of {args.batch_size}: "
            "with --symmetric the keys of both views enter the queue"
        )
    if not 0 <= args.moco_m <= 1:
        raise ValueError(f"--moco-m must be in [0, 1], got {args.moco_m:g}")
    least, most = args.crop_scale
    if not 0 < least <= most <= 1:
        raise ValueError(f"--crop-scale must be 0 < MIN <= MAX <= 1, got {least:g} {most:g}")
    cli.check_image_statistics(args.mean, args.std)
    if args.amp == "fp16" and args.devices[0].type == "cpu":
        raise ValueError("--amp fp16 needs a GPU; use bf16 or off on the CPU")


def _part_size(args: argparse.Namespace) -> int:
    """Images that go through the encoder at a time."""
    return args.batch_size // args.processes // args.accumulate


def _batch_norm_groups(args: argparse.Namespace) -> int:
    """Batch-norm groups per device, of each part of its batch."""
    batch = _part_size(args)
    if args.bn_splits == "auto":
        return encoders.automatic_bn_splits(batch)
    try:
        groups = int(args.bn_splits)
    except ValueError:
        raise ValueError(f"--bn-splits must be a number or auto, got {args.bn_splits!r}") from None
    if groups < 1 or batch % groups:
        raise ValueError(
            f"--bn-splits {groups} does not divide the batch of {batch} on each device"
            + (f" (--accumulate {args.accumulate})" if args.accumulate > 1 else "")
        )
    if batch // groups < 2 and groups > 1:
        raise ValueError(f"--bn-splits {groups} leaves groups of one image, which have no variance")
    return groups


def _check_compiler(device: torch.device) -> None:
    """torch.compile makes C++ code for a CPU, and on a GPU Triton compiles its launcher in C."""
    if device.type == "cpu":
        usual = ["clang++" if sys.platform == "darwin" else "g++"]
        variable, language = "CXX", "C++"
    else:
        usual, variable, language = ["gcc", "clang", "cc"], "CC", "C"
    names = [os.environ[variable]] if os.environ.get(variable) else usual
    if not any(map(shutil.which, names)):
        raise ValueError(
            f"--compile needs a {language} compiler, and {' or '.join(names)} is not on the PATH; "
            f"install one, name it in the environment variable {variable}, or leave out --compile"
        )


def _check_run_folder(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Settle the run folder and the checkpoint to go on from: a path, "auto" or None."""
    cli.check_run_folder(parser, args, pretraining=True)
    args.checkpoint = args.resume
    if args.resume == "auto":
        if not checkpoint.run_checkpoints(args.save_dir):
            args.checkpoint = None
    elif args.resume and not Path(args.resume).is_file():
        parser.error(f"--resume: no such checkpoint: {args.resume}")
    elif args.resume and args.save_dir:
        own = [path.resolve() for path in checkpoint.run_checkpoints(args.save_dir)]
        if Path(args.resume).resolve() in own[:-1]:
            parser.error(
                f"{args.save_dir} holds a later checkpoint than {args.resume} ({own[-1].name}); go "
                "back in another --save-dir, or move the later ones away"
            )
    if args.init_from and args.resume not in (None, "auto"):
        parser.error("--init-from starts a run and --resume goes on with one: give one of them")
    if args.init_from and args.checkpoint is None and not Path(args.init_from).is_file():
        parser.error(f"--init-from: no such checkpoint: {args.init_from}")
    if args.save_dir is None:
        name = f"moco-{args.arch}-{_objective_slug(args)}-k{args.moco_k}-b{args.batch_size}"
        args.save_dir = Path("results") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}-s{args.seed}"


def _objective_slug(args: argparse.Namespace) -> str:
    terms = [
        (args.contr_w, f"nce{args.contr_tau:g}"),
        (args.align_w, f"align{args.align_alpha:g}"),
        (args.unif_w, f"unif{args.unif_t:g}"),
    ]
    slug = "-".join(f"{weight:g}{term}" for weight, term in terms if weight)
    return f"{slug}-sym" if args.symmetric else slug


# ------------------------------------------------------------------------------------------------
# Training
# ------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> None:
    cli.run_worker(train, parse_args(argv))


def train(device: torch.device, args: argparse.Namespace) -> None:
    """The whole run in this process, one of `args.processes`."""
    with cli.report_user_errors(), contextlib.ExitStack() as at_exit:
        _train(device, args, at_exit)


def _train(device: torch.device, args: argparse.Namespace, at_exit: contextlib.ExitStack) -> None:
    stop = guards.StopRequest()
    # Processes that were started apart (torchrun, several nodes) drew and timed their own.
    args.seed, args.save_dir, args.checkpoint = distributed.broadcast_object(
        (args.seed, args.save_dir, args.checkpoint)
    )
    saved = find_checkpoint(args)
    if saved and not args.seed_given:
        args.seed = checkpoint.saved_args(saved).get("seed", args.seed)
    if saved and args.init_from is None:
        args.init_from = checkpoint.saved_args(saved).get("init_from")
    torch.manual_seed(args.seed)
    at_exit.enter_context(step.kernels(args.deterministic))

    # Data
    images = open_images(args.dataset, args.data, "pretrain", per_class=args.images_per_class)
    args.images, args.images_digest = len(images), names_digest(images)
    batches = loader.EpochBatches(len(images), args.batch_size, seed=args.seed)
    recipe = pretrain_recipe(
        args.image_size, aug_plus=args.aug_plus, crop_scale=args.crop_scale, blur=args.blur
    )
    views = loader.AugmentedViews(
        images, recipe, seed=args.seed, num_views=2,
        skip_bad=args.skip_bad_images, augment_on_device=args.views == "device",
    )  # fmt: skip
    pairs = loader.TrainLoader(
        views, batches, workers=args.workers, device=device, compile=args.compile
    )
    at_exit.callback(pairs.end)
    steps_per_epoch = batches.batches_per_epoch()

    # Model, optimizer
    moco = build_moco(args)
    if args.init_from and not saved:
        distributed.print_main(f"starting from {initial_weights(moco, args)}")
    moco.to(device, memory_format=step.memory_format(args))
    moco.prepare = step.preparation(args, device)
    moco.shuffle_generator.manual_seed(args.seed)
    optimizer = step.fused_sgd(moco, args)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
    run = Run(
        moco, optimizer, scaler, Means(),
        epoch=args.start_epoch, step=args.start_epoch * steps_per_epoch,
    )  # fmt: skip
    at_exit.enter_context(guards.failure_names_the_step(run))
    if distributed.world_size() > 1:
        torch.manual_seed(args.seed + distributed.rank())  # dropout differs between ranks
    changes = []
    if saved:
        changes = refuse_changes(saved, args)
        run.load(saved, args.checkpoint, steps_per_epoch)
        for change in runs.rounding_differences(checkpoint.saved_args(saved), args):
            distributed.print_main(f"  {change}: it goes on, but not bit for bit")
        saved = None  # as large as the model and its optimizer
    left = (args.epochs - run.epoch) * steps_per_epoch - run.step_in_epoch
    total_steps = run.step + max(0, left)
    if args.max_steps is not None:
        total_steps = min(total_steps, args.max_steps)
    model = distributed.data_parallel(moco, device)
    if args.compile:
        for encoder in (moco.encoder_q, moco.encoder_k):
            encoder.compile()  # in place: names of weights stay

    # Run folder
    if distributed.is_main():
        prepare_folder(args)
    distributed.barrier()
    print_start(args, moco, device, len(images), steps_per_epoch)
    log = RunLog(args.save_dir, first_step=run.step)
    at_exit.callback(log.close)
    monitor.begin(log, args)
    if changes:
        log.event("changes", run.step, changes=changes)
    writer = BackgroundWriter(args.save_dir, keep_last=args.keep_last, keep_every=args.keep_every)
    bad_images = guards.BadImages(args.save_dir, len(images), args.max_bad_share)
    collapse = guards.CollapseAlarm(args.collapse_steps)
    printer = StepPrinter(total=total_steps, batch_size=args.batch_size, done=run.step)
    knn = OnlineKnn(images, args, device, total_steps)
    guard = guards.StepGuard(run, writer, args.max_overflows)
    check_freq = guards.steps_between_checks(device, args.print_freq)
    last_save = time.monotonic()
    profile = None
    if args.profile:
        profile = StepProfile(
            args.save_dir / "profile_trace.json", device,
            first_step=run.step, steps=total_steps - run.step,
        )  # fmt: skip
        at_exit.callback(profile.close)

    if run.step == 0 and total_steps == 0:  # --max-steps 0: the untrained encoder
        save(run, args, writer)
    if knn.missed(run, log):
        knn.measure(run, log, printer, stop)

    # Epochs
    for epoch in range(run.epoch, args.epochs if run.step < total_steps else 0):
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
        batches.set_epoch(epoch, run.step_in_epoch)
        for im_q, im_k, _, replaced in printer.batches(pairs):
            if run.step == 0:
                monitor.show_views(log, im_q, im_k)
            bad_images.note(replaced)
            optimizer.zero_grad()
            losses, loss = step.forward_and_backward(model, im_q, im_k, device, args, guard)
            guard.step(losses, loss, epoch)

            run.step += 1
            run.step_in_epoch += 1
            printer.advance()
            ending = run.step >= total_steps
            printing = run.step % args.print_freq == 0 or ending
            saving = (
                ending or run.step_in_epoch == steps_per_epoch
                or (args.save_steps and run.step % args.save_steps == 0)
            )  # fmt: skip
            if printing or saving or run.step % check_freq == 0:
                stopping, by_minutes = guard.check(
                    stop.requested, save_is_due(args.save_minutes, last_save)
                )
                ending, saving = ending or stopping, saving or stopping or by_minutes
            if printing:
                report(printer, log, run, losses, epoch, args, steps_per_epoch, lr)
                collapse.check(losses, run.step, log)
            if args.check_every and run.step % args.check_every == 0:
                guards.stop_if_ranks_differ(moco, run.step)
            if run.step_in_epoch == steps_per_epoch:
                run.epoch, run.step_in_epoch = epoch + 1, 0
                monitor.epoch_histograms(log, losses, run.step)
            if profile:
                profile.step_done()
            if saving:
                save(run, args, writer)
                if knn.due(run) and not stopping:
                    stopping = knn.measure(run, log, printer, stop)
                    ending = ending or stopping
                last_save = time.monotonic()
            if ending and stopping:
                guards.finish_saving(writer, device)
                distributed.print_main(
                    f"stopped by {stop.name or 'a signal to another rank'} after step {run.step}; "
                    f"go on with --save-dir {args.save_dir} --resume auto"
                )
                sys.exit(EXIT_PREEMPTED)
            if ending:
                break
        if run.step >= total_steps:
            break
    guards.finish_saving(writer, device)
    printer.close()
    log.finished()
    distributed.print_main(
        f"done: {run.step} steps, checkpoints in {args.save_dir} "
        f"(training waited {writer.waited:.1f} s for saving)"
    )


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


def initial_weights(moco: MoCo, args: argparse.Namespace) -> str:
    """Start from the weights of --init-from. Rank 0 reads them; it sends all to the others when
    they form the data-parallel module."""
    found, error = None, None
    if distributed.is_main():
        try:
            found = runs.init_from(moco, args.init_from, args.arch)
        except (CheckpointError, OSError) as caught:
            error = caught
    found, error = distributed.broadcast_object((found, error))
    if error:
        raise error
    return found


def save_is_due(minutes: float, last_save: float) -> bool:
    """By --save-minutes; rank 0 has the watch."""
    elapsed = time.monotonic() - last_save
    return bool(minutes) and distributed.is_main() and elapsed > 60 * minutes


def report(
    printer: StepPrinter,
    log: RunLog,
    run: Run,
    losses: MoCoLosses,
    epoch: int,
    args: argparse.Namespace,
    steps_per_epoch: int,
    lr: float,
) -> None:
    """One line on the screen and in the logs."""
    rank = losses.contr_rank()
    if rank is not None:  # of the latest batch on rank 0
        run.means.add("contr_top1", 100 * (rank < 1).float().mean())
        run.means.add("contr_top5", 100 * (rank < 5).float().mean())
    values = {**run.means.take(), "lr": lr, **printer.rates()}
    if run.scaler.is_enabled():
        values["overflows"] = run.skipped  # since the start of the run
    log.scalars("train", run.step, {"epoch": epoch, **values})
    if log.active:
        log.scalars("metrics", run.step, monitor.batch_metrics(losses), epoch=epoch)
    terms = "  ".join(f"{name} {values[name]:.4f}" for name, _ in losses.items())
    printer.line(
        f"epoch [{epoch}/{args.epochs}] step [{run.step_in_epoch}/{steps_per_epoch}]  "
        f"loss {values['loss']:.4f}  {terms}  lr {lr:.4g}  "
        f"{values['images_per_s']:.0f} images/s  data {100 * values['data_share']:.0f}%",
        short=f"epoch {epoch}/{args.epochs}, loss {values['loss']:.3f}, "
        f"{values['images_per_s']:.0f} images/s",
    )


def print_start(
    args: argparse.Namespace, moco: MoCo, device: torch.device, images: int, steps_per_epoch: int
) -> None:
    """What will be done, in numbers that a user would otherwise have to work out."""
    per_device, part = args.batch_size // args.processes, _part_size(args)
    groups = args.bn_groups
    where = "on each device" if args.accumulate == 1 else "in each part"
    batch = f"{args.batch_size} over {args.processes} process(es), {per_device} each"
    if args.accumulate > 1:
        batch += (
            f", in {args.accumulate} parts of {part}; optimizer, key encoder and queue advance "
            "once per step"
        )
    if not encoders.has_batch_norm(moco.encoder_q):
        norm = "none in this arch"
    elif groups > 1:
        norm = f"{groups} groups of {part // groups} {where}"
    else:
        norm = f"one group of {part} {where}"
        if args.bn_splits == "auto" and part != 32:
            norm += " (the published runs have groups of 32, which needs a multiple of 32 above 32)"
        if args.accumulate > 1 and args.processes == 1:
            norm += "; within one group the shuffle has no effect, give --bn-splits 2 or more"
    parameters = sum(p.numel() for p in moco.encoder_q.parameters())
    facts = {
        "objective": args.objective,
        "data": f"{images} images, {steps_per_epoch} steps per epoch, {args.epochs} epochs",
        "batch": batch,
        "batch norm": norm,
        "encoder": f"{args.arch}, {parameters / 1e6:.2f} M parameters, {args.image_size} px"
        + (", small stem" if args.small_stem else ""),
        "queue": f"{args.moco_k} x {args.moco_dim}, {moco.queue.numel() * 4 / 2**20:.1f} MiB",
        "device": _device_name(device) + f", amp {args.amp}, {args.workers} loader worker(s)",
        "speed": ", ".join(
            name if getattr(args, name) else f"no {name}"
            for name in ("channels_last", "compile", "deterministic")
        ),
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


# Save and resume
# ------------------------------------------------------------------------------------------------


def save(run: Run, args: argparse.Namespace, writer: BackgroundWriter) -> None:
    """Save on rank 0 in the background; after an epoch under the epoch's name, else the step's."""
    content = run.state(cli.plain_values(args))
    if distributed.is_main():
        if run.step and run.step_in_epoch == 0:
            path = checkpoint.epoch_path(args.save_dir, run.epoch - 1)
        else:
            path = checkpoint.step_path(args.save_dir, run.step)
        writer.write(path, content)


def find_checkpoint(args: argparse.Namespace) -> dict | None:
    """The checkpoint to go on from, for "auto" the newest that is whole. Rank 0 reads it and hands
    it to the others, which may see another state of a shared folder, or have none."""
    found, error = None, None
    if args.checkpoint and distributed.is_main():
        try:
            if args.checkpoint == "auto":
                found = checkpoint.newest_valid(args.save_dir, distributed.print_main)
            else:
                found = args.checkpoint, checkpoint.read_checkpoint(args.checkpoint)
        except (CheckpointError, OSError) as caught:
            error = caught
    found, error = distributed.broadcast_object((found, error))
    if error:
        raise error
    args.checkpoint, saved = found or (None, None)
    return saved


# What the order of samples within an epoch depends on.
_ORDER = ("batch_size", "dataset", "images", "images_digest", "images_per_class", "seed")


def refuse_changes(saved: dict, args: argparse.Namespace) -> list[str]:
    """Refuse to go on with arguments under which something else is learned."""
    if saved.get("arch", args.arch) != args.arch:
        raise CheckpointError(
            f"{args.checkpoint} is of arch {saved['arch']}, this run is of {args.arch}"
        )
    changes = runs.differences(checkpoint.saved_args(saved), args)
    if changes and not args.allow_changes:
        raise CheckpointError(
            f"{args.checkpoint} was trained with other arguments ({'; '.join(changes)}); use "
            "those, or go on with --allow-changes"
        )
    in_epoch = [change for change in changes if change.split(":")[0] in _ORDER]
    if in_epoch and saved.get("step_in_epoch"):
        raise CheckpointError(
            f"{args.checkpoint} stands within an epoch, and with {'; '.join(in_epoch)} the rest of "
            "it would be other samples: go on from a checkpoint_*.pth.tar at the end of an epoch"
        )
    for change in changes:
        distributed.print_main(f"changed in mid-run: {change}")
    return changes


def prepare_folder(args: argparse.Namespace) -> None:
    """Make the run folder, see that it can be written to, and note what is run."""
    try:
        args.save_dir.mkdir(parents=True, exist_ok=True)
        checkpoint.remove_unfinished(args.save_dir)
        facts = {**cli.plain_values(args), "provenance": provenance()}
        write_json(args.save_dir / "args.json", facts)
    except OSError as error:
        raise TrainingError(f"cannot write to the run folder: {error}") from error


if __name__ == "__main__":
    main()
