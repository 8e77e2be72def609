"""No run is lost: bit-exact resume, run folders, saving in the background, damaged files."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import threading
import time
from pathlib import Path

import pytest
import torch
from harness import (
    BATCH,
    FLAGS,
    IMAGES,
    MAIN,
    STEPS,
    Processes,
    differences,
    final_state,
    finish,
    log_lines,
    logged_steps,
    saved_step,
    start,
    wait_for_step,
)

from moco import checkpoint, cli, distributed
from moco.data import loader
from moco.errors import CheckpointError
from moco.log import RunLog
from moco.tasks.moco import MoCoTask
from moco.train import resume
from moco.train.saver import BackgroundWriter

PER_EPOCH = IMAGES // BATCH


@pytest.fixture(scope="module")
def data(images) -> Path:
    return images


@pytest.fixture
def stopped(half, tmp_path) -> Path:
    """A copy of `half` to go on from."""
    return Path(shutil.copytree(half, tmp_path / "stopped"))


def assert_same_end(run: Path, reference: Path) -> None:
    """Bit for bit: weights, queue, pointer, optimizer, generators, and all logged but times."""
    expected = final_state(reference)
    assert expected["log"][-1]["step"] == STEPS and "loss" in expected["log"][0]
    assert {"module.queue", "module.queue_ptr"} <= set(expected["checkpoint"]["state_dict"])
    assert {"optimizer", "shuffle_generator", "rng", "means"} <= set(expected["checkpoint"])
    assert differences(expected, final_state(run)) == []


def events(run: Path, kind: str) -> list[dict]:
    return [line for line in log_lines(run) if line["kind"] == kind]


def unfinished(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.suffix == ".tmp"]


# ------------------------------------------------------------------------------------------------
# Bit for bit
# ------------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize(
    ("processes", "workers", "workers_then"),
    [(1, 0, 0), (1, 2, 2), (1, 2, 0), (1, 0, 2), (2, 0, 0), (2, 2, 2), (2, 0, 1)],
)
def test_a_killed_run_goes_on_bit_for_bit(
    processes, workers, workers_then, data, whole, tmp_path
) -> None:
    """SIGKILL to all processes in mid-epoch, then --resume auto, also with other workers."""
    run = tmp_path / "run"
    killed = start(
        run, data, "--save-steps", 2, processes=processes, workers=workers, hold_at=9
    )  # fmt: skip
    wait_for_step(run, 9, killed)
    killed.kill()
    killed.wait()
    assert saved_step(run) >= 6
    said = finish(
        run, data, "--save-steps", 2, processes=processes, workers=workers_then
    )  # fmt: skip
    assert "resuming" in said and "not bit for bit" not in said
    assert_same_end(run, whole[processes])


@pytest.mark.long
def test_logged_means_that_began_before_a_save_are_the_same(data, tmp_path) -> None:
    """A line every 4 steps and a save every 3: the mean of steps 5 to 8 outlives a kill at 8."""
    run, reference = tmp_path / "run", tmp_path / "whole"
    flags = ["-p", 4, "--save-steps", 3]
    finish(reference, data, *flags)
    killed = start(run, data, *flags, hold_at=8)
    killed.wait_until(lambda: logged_steps(run) == 8 and saved_step(run) == 6)
    killed.kill()
    killed.wait()
    finish(run, data, *flags)
    assert_same_end(run, reference)


@pytest.mark.long
def test_another_world_size_is_said_not_to_be_bit_exact(stopped, data) -> None:
    """Two processes go on where one was stopped: same groups of batch norm, same samples."""
    said = finish(stopped, data, "--bn-splits", 1, processes=2)
    assert "written by 1 process(es), this run has 2" in said and "not bit for bit" in said
    assert logged_steps(stopped) == STEPS


def test_a_world_size_that_changes_the_groups_of_batch_norm_is_refused(stopped, data) -> None:
    refused = start(stopped, data, processes=2)
    assert refused.wait() == [1, 1]
    assert "bn_group_size: 8 before, 4 now" in refused.output(0)


@pytest.mark.parametrize("worlds", [(2, 1), (1, 2), (4, 2)])
def test_another_world_size_sees_every_sample_of_the_epoch_once(worlds, monkeypatch) -> None:
    """Two batches under one number of ranks, the rest of the epoch under another."""
    seen = []
    for world, start_at, end in ((worlds[0], 0, 2), (worlds[1], 2, None)):
        monkeypatch.setattr(distributed, "world_size", lambda world=world: world)
        for rank in range(world):
            monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
            batches = loader.EpochBatches(48, 8, seed=3)
            batches.set_epoch(5, start_at)
            for batch in list(batches)[: None if end is None else end - start_at]:
                assert len(batch) == 8 // world
                seen += batch
    assert sorted(seen) == [(5, index) for index in range(48)]


# ------------------------------------------------------------------------------------------------
# What may change between two starts
# ------------------------------------------------------------------------------------------------


def refusal(run: Path, data: Path, *flags: object) -> str:
    """What `refuse_changes` says to these flags, or "" when it lets them pass."""
    argv = [*FLAGS, "--save-dir", run, *flags, data]
    with contextlib.ExitStack() as at_exit:
        config, saved, _ = resume.settle(cli.pretrain_config(list(map(str, argv))), at_exit)
    flat = {**config.to_flat(), **MoCoTask(config).build_data(torch.device("cpu")).facts}
    path, allow = config.saving.checkpoint, config.saving.allow_changes
    try:
        resume.refuse_changes(saved, path, flat, allow=allow)
    except CheckpointError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--lr 0.05", "lr: 0.1 before, 0.05 now"),
        ("--views device", "views: 'cpu' before, 'device' now"),
        ("--wd 0.5", "weight_decay: 0.0001 before, 0.5 now"),
        ("--momentum 0.8", "momentum: 0.9 before, 0.8 now"),
        ("--epochs 4", "epochs: 3 before, 4 now"),
        ("--schedule 1 2", "schedule: [120, 160] before, [1, 2] now"),
        ("--warmup-epochs 1", "warmup_epochs: 0 before, 1 now"),
        ("--batch-size 32", "batch_size: 16 before, 32 now"),
        ("--bn-splits 4", "bn_group_size: 8 before, 4 now"),
        ("--moco-m 0.9", "moco_m: 0.999 before, 0.9 now"),
        ("--moco-k 32", "moco_k: 64 before, 32 now"),
        ("--moco-dim 64", "moco_dim: 32 before, 64 now"),
        ("--moco-t 0.2", "objective: '3 * align(alpha=2) + 1 * uniform(t=3, with intra-batch"),
        ("--moco-unif-t 2", "uniform(t=2, with intra-batch pairs)' now"),
        ("--image-size 24", "image_size: 16 before, 24 now"),
        ("--no-blur", "blur: True before, False now"),
        ("--crop-scale 0.5 1", "crop_scale: [0.2, 1.0] before, [0.5, 1.0] now"),
        ("--amp bf16", "amp: 'off' before, 'bf16' now"),
        ("--accumulate 2 --bn-splits 1", "accumulate: 1 before, 2 now"),
        ("--symmetric", "symmetric: False before, True now"),
        ("--images-per-class 20", "images: 96 before, 40 now"),
        ("--seed 2", "seed: 1 before, 2 now"),
        ("-a resnet8x4", "is of arch resnet8, this run is of resnet8x4"),
    ],
)
def test_changes_of_what_is_learned_are_refused(flags, said, half, data) -> None:
    message = refusal(half, data, *flags.split())
    assert said in message and "step_00000008.pth.tar" in message


def test_all_changes_are_listed_and_what_does_not_matter_may_change(half, data) -> None:
    message = refusal(half, data, "--lr", 0.05, "--seed", 2, "--epochs", 4)
    assert all(f"{name}: " in message for name in ("lr", "seed", "epochs"))
    assert "--allow-changes" in message
    assert refusal(half, data, "-j", 5, "-p", 7, "--save-steps", 9, "--keep-last", 2) == ""
    assert refusal(half, data, "--max-steps", 9, "--save-minutes", 1) == ""
    assert refusal(half, data, "--channels-last", "--deterministic", "--profile") == ""


def test_arguments_that_an_older_checkpoint_does_not_know_had_their_defaults(half, data) -> None:
    path = half / "step_00000008.pth.tar"
    before = path.read_bytes()
    content = torch.load(path, weights_only=True)
    for name in ("accumulate", "symmetric", "init_from", "channels_last"):
        del content["args"][name]
    try:
        checkpoint.write_checkpoint(path, content)
        assert refusal(half, data) == ""
        assert "symmetric: False before, True now" in refusal(half, data, "--symmetric")
    finally:
        path.write_bytes(before)


def test_other_data_are_refused_and_moved_data_are_not(half, data, tmp_path) -> None:
    """The same number of images under other names would be other samples at each index."""
    moved = Path(shutil.copytree(data, tmp_path / "moved"))
    assert refusal(half, moved) == ""
    image = next((moved / "train" / "class_0").iterdir())
    image.rename(image.with_name("renamed.png"))
    assert "images_digest" in refusal(half, moved)


def test_allowed_changes_are_made_and_logged(stopped, data) -> None:
    flags = ["--wd", 0.01, "--momentum", 0.5]
    refused = start(stopped, data, *flags)
    assert refused.wait() == [1] and "Traceback" not in refused.output()
    said = finish(stopped, data, *flags, "--allow-changes")
    assert "changed in mid-run: weight_decay: 0.0001 before, 0.01 now" in said
    (event,) = events(stopped, "changes")
    assert event["step"] == 8 and len(event["changes"]) == 2
    (group,) = final_state(stopped)["checkpoint"]["optimizer"]["param_groups"]
    assert (group["weight_decay"], group["momentum"]) == (0.01, 0.5)


def test_the_batch_changes_between_epochs_only_and_all_epochs_are_trained(stopped, data) -> None:
    """Within an epoch the rest would be other samples; steps are counted in the new size."""
    flags = ["--batch-size", 32, "--bn-splits", 4, "--allow-changes"]
    refused = start(stopped, data, *flags)
    assert refused.wait() == [1] and "stands within an epoch" in refused.output()
    (stopped / "step_00000008.pth.tar").unlink()
    finish(stopped, data, *flags, "--resume", stopped / "checkpoint_0000.pth.tar")
    final = final_state(stopped)["checkpoint"]
    assert (final["epoch"], final["step_in_epoch"], final["step"]) == (3, 0, 3 * 3)


# ------------------------------------------------------------------------------------------------
# --resume
# ------------------------------------------------------------------------------------------------


def test_auto_passes_over_a_truncated_file_and_says_so(stopped, data, whole) -> None:
    newest = stopped / "step_00000008.pth.tar"
    newest.write_bytes(newest.read_bytes()[:5000])
    said = finish(stopped, data)
    assert "passing over a checkpoint" in said and newest.name in said
    assert "checkpoint_0000.pth.tar: 1 epochs and 0 steps done" in said
    assert_same_end(stopped, whole[1])


@pytest.mark.parametrize("processes", [1, 2])
def test_auto_does_not_start_over_when_no_checkpoint_is_whole(processes, stopped, data) -> None:
    for path in checkpoint.run_checkpoints(stopped):
        path.write_bytes(path.read_bytes()[:1000])
    failed = start(stopped, data, processes=processes)
    assert failed.wait() == [1] * processes
    assert "checkpoints in" in failed.output(0) and "can be read" in failed.output(0)
    assert "Traceback" not in failed.output()


def test_a_checkpoint_that_is_missing_is_an_error(data, tmp_path) -> None:
    missing = tmp_path / "nowhere.pth.tar"
    failed = start(tmp_path / "run", data, "--resume", missing)
    assert failed.wait() == [2]
    assert f"no such checkpoint: {missing}" in failed.output()
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_of_upstream_moco_goes_on_and_what_is_missing_is_said(
    half, data, tmp_path
) -> None:
    """Upstream's file has epoch, arch, state_dict and optimizer; its optimizer lists both encoders
    and has the options that torch knew in 2020."""
    ours = checkpoint.read_checkpoint(half / "checkpoint_0000.pth.tar")
    theirs = {name: ours[name] for name in ("epoch", "arch", "state_dict", "optimizer")}
    known = ("lr", "momentum", "dampening", "weight_decay", "nesterov", "params")
    (group,) = theirs["optimizer"]["param_groups"]
    theirs["optimizer"]["param_groups"] = [{name: group[name] for name in known}]
    theirs["state_dict"]["module.scalar_label"] = torch.zeros((), dtype=torch.int64)
    torch.save(theirs, tmp_path / "theirs.pth.tar")
    run = tmp_path / "run"
    said = finish(run, data, "--resume", tmp_path / "theirs.pth.tar", "--max-steps", PER_EPOCH + 1)
    assert "1 epochs and 0 steps done" in said and "it is not of this project" in said
    assert "random states start anew" in said and "weights, queue and optimizer go on" in said
    final = final_state(run)["checkpoint"]
    assert (final["epoch"], final["step_in_epoch"]) == (1, 1)
    assert final["state_dict"]["module.queue_ptr"].item() == (PER_EPOCH + 1) * BATCH % 64
    # The momentum of both runs' next step is the same: only the key shuffle differs.
    assert len(final["optimizer"]["state"]) == len(ours["optimizer"]["state"])


# ------------------------------------------------------------------------------------------------
# Run folders
# ------------------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("kind", ["a run", "a run without checkpoints", "another run's file"])
def test_a_run_folder_is_not_overwritten_by_another_run(
    kind, stopped, data, tmp_path, capsys
) -> None:
    flags = [flag for flag in FLAGS if flag not in ("--resume", "auto")]
    if kind == "a run without checkpoints":
        for path in checkpoint.run_checkpoints(stopped):
            path.unlink()
    if kind == "another run's file":
        other = tmp_path / "other.pth.tar"
        shutil.copy(stopped / "step_00000008.pth.tar", other)
        flags += ["--resume", str(other)]
    before = contents(stopped)
    with pytest.raises(SystemExit) as exit_info:
        cli.pretrain_config([*flags, "--save-dir", str(stopped), str(data)])
    assert exit_info.value.code == 2
    assert "already holds a run" in capsys.readouterr().err
    assert contents(stopped) == before


def test_an_older_checkpoint_of_the_same_run_may_be_resumed(stopped, data, whole) -> None:
    """Once the later ones are out of the way; the log then ends where it was written."""
    older = stopped / "step_00000004.pth.tar"
    refused = start(stopped, data, "--resume", older)
    assert refused.wait() == [2] and "later checkpoint" in refused.output()
    for path in checkpoint.run_checkpoints(stopped):
        if path.name > older.name or path.name.startswith("checkpoint"):
            path.unlink()
    finish(stopped, data, "--resume", older)
    assert_same_end(stopped, whole[1])


def test_the_checkpoint_that_a_run_was_resumed_from_is_kept(stopped, data) -> None:
    """Whatever is written after it: it may be the last good one."""
    resumed = stopped / "step_00000008.pth.tar"
    finish(stopped, data, "--keep-last", 1, "--keep-every", 0)
    assert checkpoint.run_checkpoints(stopped) == [resumed, stopped / "checkpoint_0002.pth.tar"]


def test_the_log_drops_the_lines_after_the_checkpoint(tmp_path) -> None:
    lines = [json.dumps({"kind": "train", "step": step, "loss": step / 2}) for step in range(1, 7)]
    path = tmp_path / "log.jsonl"
    path.write_text("\n".join(lines) + '\n{"kind": "train", "st', encoding="utf-8")
    log = RunLog(tmp_path, first_step=4)
    log.scalars("train", 5, {"loss": 9.0})
    log.close()
    found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [line["step"] for line in found] == [1, 2, 3, 4, 5]
    assert found[-1]["loss"] == 9.0 and found[3]["loss"] == 2.0


def test_what_a_killed_writer_left_is_removed(stopped, data) -> None:
    left = stopped / ".step_00000009.pth.tar.123.tmp"
    left.write_bytes(b"half a checkpoint")
    finish(stopped, data, "--max-steps", 9)
    assert not left.exists()


def test_a_folder_that_cannot_be_made_is_one_line(data, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    failed = start(tmp_path / "run", data, "--save-dir", tmp_path / "file" / "run")
    assert failed.wait() == [1]
    assert "cannot write to the run folder" in failed.output()
    assert "Traceback" not in failed.output()


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_one_line(stopped, data) -> None:
    stopped.chmod(0o500)
    try:
        failed = start(stopped, data)
        assert failed.wait() == [1]
    finally:
        stopped.chmod(0o700)
    assert "cannot write to the run folder" in failed.output()


# ------------------------------------------------------------------------------------------------
# Saving in the background
# ------------------------------------------------------------------------------------------------


def writer_of(folder: Path, keep_last: int = 5, keep_every: int = 0) -> BackgroundWriter:
    return BackgroundWriter(folder, keep_last=keep_last, keep_every=keep_every)


def test_two_writes_never_overlap_and_keep_their_order(tmp_path, monkeypatch) -> None:
    happened, write = [], checkpoint.write_checkpoint

    def slowly(path: Path, content: dict) -> None:
        happened.append(("starts", path.name))
        time.sleep(0.1)
        write(path, content)
        happened.append(("ends", path.name))

    monkeypatch.setattr(checkpoint, "write_checkpoint", slowly)
    writer = writer_of(tmp_path)
    weights = torch.zeros(3)
    for step in range(3):
        weights.fill_(step)
        writer.write(checkpoint.step_path(tmp_path, step), {"weights": weights, "step": step})
        assert threading.active_count() >= 2 or happened[-1][0] == "ends"
    weights.fill_(-1)  # training goes on while the last file is written
    writer.finish()
    names = [checkpoint.step_path(tmp_path, step).name for step in range(3)]
    assert happened == [(what, name) for name in names for what in ("starts", "ends")]
    for step in range(3):
        saved = checkpoint.read_checkpoint(checkpoint.step_path(tmp_path, step))
        assert saved["weights"].tolist() == [step] * 3


@pytest.mark.parametrize("error", [OSError("disk full"), RuntimeError("zip"), KeyError("x")])
def test_an_error_of_the_thread_is_raised_by_the_next_call(error, tmp_path, monkeypatch) -> None:
    def fail(*_) -> None:
        raise error

    writer = writer_of(tmp_path)
    writer.write(checkpoint.step_path(tmp_path, 1), {"a": 1})
    writer.finish()
    assert not writer.failed()
    monkeypatch.setattr(checkpoint, "write_checkpoint", fail)
    writer.write(checkpoint.step_path(tmp_path, 2), {"a": 1})
    writer.thread.join()
    assert writer.failed()
    for call in (writer.finish, lambda: writer.write(tmp_path / "x", {})):
        with pytest.raises(CheckpointError, match="last good checkpoint is step_0+1"):
            call()


def test_a_folder_that_vanishes_is_an_error(tmp_path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    writer = writer_of(folder)
    folder.rmdir()
    writer.write(checkpoint.step_path(folder, 1), {"a": 1})
    with pytest.raises(CheckpointError, match="could not save"):
        writer.finish()


# From the third save on, files of this process may not grow beyond 20 kB, as on a full disk.
FULL_DISK = """
import resource
from moco import checkpoint
write, saves = checkpoint.write_checkpoint, []
def limited(path, content):
    saves.append(path)
    if len(saves) == 3:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200000, 200000))
    write(path, content)
checkpoint.write_checkpoint = limited
"""


@pytest.mark.long
@pytest.mark.parametrize("processes", [1, 2])
def test_a_save_that_fails_stops_training_on_all_ranks(processes, data, tmp_path) -> None:
    run = tmp_path / "run"
    failed = start(run, data, "--save-steps", 2, processes=processes, before=FULL_DISK)
    assert failed.wait() == [1] * processes
    said = failed.output(0)
    assert "could not save" in said and "training stops" in said and "Traceback" not in said
    assert "File too large" in said, "the reason that the system gave"
    assert "the last good checkpoint is step_00000004.pth.tar" in said
    if processes == 2:
        assert "Traceback" not in failed.output(1)
    assert [path.name for path in checkpoint.run_checkpoints(run)] == [
        "step_00000002.pth.tar", "step_00000004.pth.tar",
    ]  # fmt: skip
    assert checkpoint.newest_valid(run, print)[1]["step"] == 4
    assert unfinished(run) == []
    assert logged_steps(run) <= 9, "training went on as if saved"


@pytest.mark.long
def test_a_save_that_fails_at_the_very_end_is_no_success(data, tmp_path) -> None:
    """The last file is written after the last step: nothing would look at its error later."""
    run = tmp_path / "run"
    failed = start(
        run, data, "--max-steps", 3, "--save-steps", 1, processes=2, before=FULL_DISK
    )  # fmt: skip
    assert failed.wait() == [1, 1]
    assert "could not save" in failed.output(0)
    assert "rank 0 could not save" in failed.output(1)
    assert "done:" not in failed.output()


def test_a_log_that_cannot_be_written_is_one_line(data, tmp_path) -> None:
    before = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))"
    before += "\nfrom moco import checkpoint\ncheckpoint.write_checkpoint = lambda *_: None"
    failed = start(tmp_path / "run", data, before=before)
    assert failed.wait() == [1]
    # TensorBoard's thread shows its trace as well.
    assert "cannot write the log: File too large" in failed.output().splitlines()[-1]


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="only root may mount")
def test_a_full_disk_stops_training(data, tmp_path) -> None:
    """A real one: a file system of 1.2 MB, where two checkpoints find room."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1200k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("mounting is not permitted here")
    try:
        failed = start(tmp_path / "run", data, "--save-steps", 1, "--save-dir", disk / "run")
        assert failed.wait() == [1]
        assert "No space left on device" in failed.output(), failed.output()
        assert "Traceback" not in failed.output(), failed.output()
        assert checkpoint.newest_valid(disk / "run", print) is not None
        assert unfinished(disk / "run") == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_the_last_the_every_mth_and_the_final_checkpoint_are_kept(tmp_path) -> None:
    writer = writer_of(tmp_path, keep_last=2, keep_every=3)
    for epoch in range(8):
        writer.write(checkpoint.epoch_path(tmp_path, epoch), {"epoch": epoch + 1})
    writer.write(checkpoint.step_path(tmp_path, 85), {"epoch": 8})  # the end of the run
    writer.finish()
    assert [path.name for path in checkpoint.run_checkpoints(tmp_path)] == [
        "checkpoint_0002.pth.tar", "checkpoint_0005.pth.tar", "checkpoint_0007.pth.tar",
        "step_00000085.pth.tar",
    ]  # fmt: skip


@pytest.mark.long
def test_saves_by_minutes_happen(data, tmp_path) -> None:
    run = tmp_path / "run"
    finish(run, data, "--save-minutes", 1e-6, "--max-steps", 4, processes=2)
    names = [path.name for path in checkpoint.run_checkpoints(run)]
    assert names == [f"step_{step:08d}.pth.tar" for step in range(1, 5)]


# ------------------------------------------------------------------------------------------------
# Damaged files
# ------------------------------------------------------------------------------------------------


def test_a_checkpoint_truncated_anywhere_is_refused_and_the_older_one_is_used(
    half, tmp_path
) -> None:
    older, newer = tmp_path / "step_00000004.pth.tar", tmp_path / "step_00000008.pth.tar"
    for path in (older, newer):
        shutil.copy(half / path.name, path)
    whole_file = newer.read_bytes()
    size = len(whole_file)
    positions = {0, 1, 3, 4, 30, 64, size - 1, size - 2, size - 22, size - 100}
    positions |= {size * i // 31 for i in range(1, 31)}
    assert len(positions) >= 40
    for position in sorted(positions):
        newer.write_bytes(whole_file[:position])
        os.utime(newer, (2e9, 2e9))
        with pytest.raises(CheckpointError, match="step_00000008"):
            checkpoint.read_checkpoint(newer)
        said: list[str] = []
        path, content = checkpoint.newest_valid(tmp_path, said.append)
        assert (path, content["step"]) == (older, 4)
        assert len(said) == 1 and "step_00000008" in said[0]


@pytest.mark.parametrize("name", ["module.queue", "module.encoder_q.conv1.weight"])
def test_the_checksum_sees_one_changed_element(name, half, tmp_path) -> None:
    """Saved again with the old checksum, so that the zip archive's own CRCs are right."""
    content = torch.load(half / "step_00000008.pth.tar", weights_only=True)
    torch.save(content, tmp_path / "same.pth.tar")
    checkpoint.read_checkpoint(tmp_path / "same.pth.tar")
    content["state_dict"][name][3, 1] += 1e-3
    torch.save(content, tmp_path / "changed.pth.tar")
    with pytest.raises(CheckpointError, match="checksum"):
        checkpoint.read_checkpoint(tmp_path / "changed.pth.tar")


def test_the_checksum_covers_what_is_no_tensor(half, tmp_path) -> None:
    for change in ({"step": 9}, {"args": {}}, {"extra": 1}):
        content = torch.load(half / "step_00000008.pth.tar", weights_only=True)
        torch.save({**content, **change}, tmp_path / "changed.pth.tar")
        with pytest.raises(CheckpointError, match="checksum"):
            checkpoint.read_checkpoint(tmp_path / "changed.pth.tar")


# ------------------------------------------------------------------------------------------------
# How processes end
# ------------------------------------------------------------------------------------------------


def test_an_unexpected_error_ends_a_run_that_has_loader_workers(data, tmp_path) -> None:
    """Workers ignore SIGTERM, by which Python ends its children: it would wait for ever."""
    before = "from moco.train import guards\nguards.CollapseAlarm.check = lambda *_: 1 / 0"
    failed = start(tmp_path / "run", data, workers=2, before=before)
    assert failed.wait() == [1]
    assert "ZeroDivisionError" in failed.output()


@pytest.mark.long
def test_chaos_counts_mismatches_and_lost_steps(tmp_path) -> None:
    code = MAIN.replace("main_moco.py", "scripts/chaos.py")
    trials = Processes(tmp_path / "chaos", "--trials", 2, "--kills", 2, code=code)
    assert trials.wait() == [0], trials.output()
    assert "2 trials" in trials.output() and ": 0 mismatches" in trials.output()
    assert trials.output().count("equal") == 2


def test_chaos_sees_a_single_bit() -> None:
    one = {"a": [torch.ones(3), 1.5], "b": {"c": torch.zeros(2)}}
    assert differences(one, {"a": [torch.ones(3), 1.5], "b": {"c": torch.zeros(2)}}) == []
    changed = {"a": [torch.ones(3), 1.5], "b": {"c": torch.tensor([0.0, -0.0])}}
    assert differences(one, changed) == ["/b/c"]
    changed = {"a": [torch.ones(3).nextafter(torch.tensor(2.0)), 1.0], "b": one["b"]}
    assert len(differences(one, changed)) == 2
