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
import sys
import time
from collections.abc import Sequence

import torch

from moco import checkpoint, cli, distributed, encoders
from moco.builder import MoCo, MoCoLosses
from moco.config import PretrainConfig, learning_changes, plain, rounding_changes
from moco.data import loader
from moco.data.images import names_digest, open_images
from moco.data.views import pretrain_recipe
from moco.errors import CheckpointError, TrainingError, report_user_errors
from moco.launch import launch_config
from moco.log import Means, RunLog, StepPrinter, provenance
from moco.precision import kernels, memory_format
from moco.profiling import StepProfile
from moco.run_files import write_json
from moco.schedule import learning_rate
from moco.tasks.online_knn import OnlineKnn
from moco.train import guards, monitor, step
from moco.train import state as runs
from moco.train.state import BackgroundWriter, Run

# Exit status of a run that was asked to stop by SIGTERM or SIGUSR1 and has saved: "try again".
EXIT_PREEMPTED = 75


def _part_size(args: argparse.Namespace) -> int:
    """Images that go through the encoder at a time."""
    return args.batch_size // args.processes // args.accumulate


# ------------------------------------------------------------------------------------------------
# Training
# ------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> None:
    launch_config(train, cli.pretrain_config(argv))


def train(device: torch.device, config: PretrainConfig) -> None:
    """The whole run in this process, one of `processes`."""
    args = argparse.Namespace(**config.to_flat())
    args.save_dir = config.saving.save_dir
    with report_user_errors(), contextlib.ExitStack() as at_exit:
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
    at_exit.enter_context(kernels(args.deterministic))

    # Data
    images = open_images(args.dataset, args.data, "pretrain", per_class=args.images_per_class)
    args.images, args.images_digest = len(images), names_digest(images)
    batches = loader.EpochBatches(len(images), args.batch_size, seed=args.seed)
    recipe = pretrain_recipe(
        args.image_size, aug_plus=args.aug_plus, crop_scale=args.crop_scale, blur=args.blur
    )
    views = loader.AugmentedViews(
        images, recipe, seed=args.seed, views=2,
        skip_bad=args.skip_bad_images, unfinished=args.views == "device",
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
    moco.to(device, memory_format=memory_format(args.channels_last))
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
        for change in rounding_changes(checkpoint.saved_args(saved), plain_values(args)):
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
    content = run.state(plain_values(args))
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
    changes = learning_changes(checkpoint.saved_args(saved), plain_values(args))
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
        facts = {**plain_values(args), "provenance": provenance()}
        write_json(args.save_dir / "args.json", facts)
    except OSError as error:
        raise TrainingError(f"cannot write to the run folder: {error}") from error


def plain_values(args: argparse.Namespace) -> dict:
    return {name: plain(value) for name, value in sorted(vars(args).items())}


if __name__ == "__main__":
    main()
