"""No run is lost: bit-exact resume, run folders, saving in the background, damaged files."""

from __future__ import annotations

import contextlib
import shutil
import threading
import time
from pathlib import Path

import helpers
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

import main_moco
from moco import checkpoint, cli, distributed
from moco.data import loader
from moco.errors import CheckpointError
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
    assert expected["log"][-1]["step"] == STEPS and any("loss" in line for line in expected["log"])
    assert {"module.queue", "module.queue_ptr"} <= set(expected["checkpoint"]["state_dict"])
    assert {"optimizer", "shuffle_generator", "rng", "means"} <= set(expected["checkpoint"])
    assert differences(expected, final_state(run)) == []


# ---- Bit for bit ---------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize(("processes", "workers", "workers_then"), [(1, 0, 2), (2, 2, 0)])
def test_a_killed_run_goes_on_bit_for_bit(
    processes, workers, workers_then, data, whole, tmp_path
) -> None:
    """SIGKILL to all processes in mid-epoch, then --resume auto, also with other workers."""
    run = tmp_path / "run"
    flags = ["--save-steps", 2]
    killed = start(run, data, *flags, processes=processes, workers=workers, hold_at=9)
    wait_for_step(run, 9, killed)
    killed.kill()
    killed.wait()
    assert saved_step(run) >= 6
    said = finish(run, data, *flags, processes=processes, workers=workers_then)
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
def test_a_run_of_4_processes_goes_on_with_2_and_with_1(images, tmp_path) -> None:
    """A group of 8 images on two devices each, then one on each, then both on one: one recipe, and
    but for rounding one result. No groups are asked for: they are the checkpoint's."""
    groups = ["--bn-splits", "auto", "--group-size", 8]
    run, whole = tmp_path / "run", tmp_path / "whole"
    said = finish(run, images, *groups, "--max-steps", 4, processes=4)
    assert "groups: 2 of 8 images, each over 2 devices" in said
    said = finish(run, images, "--bn-splits", "auto", "--max-steps", 8, processes=2)
    assert "groups: 2 of 8 images, 1 on each device" in said
    assert "written by 4 process(es), this run has 2" in said and "not bit for bit" in said
    finish(run, images, "--bn-splits", "auto")
    finish(whole, images, *groups)
    assert logged_steps(run) == logged_steps(whole) == STEPS
    ours, wanted = (final_state(each)["checkpoint"]["state_dict"] for each in (run, whole))
    for name, tensor in wanted.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-3, atol=1e-3, msg=name)


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


# ---- What may change between two starts ----------------------------------------------------------


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
        ("--bn-splits 4", "bn_group_size: 8 before, 4 now"),
        ("--moco-t 0.2", "objective: '3 * align(alpha=2) + 1 * uniform(t=3, with intra-batch"),
        ("--crop-scale 0.5 1", "crop_scale: [0.2, 1.0] before, [0.5, 1.0] now"),
        ("--images-per-class 20", "images: 96 before, 40 now"),
        ("-a resnet8x4", "is of arch resnet8, this run is of resnet8x4"),
    ],
)
def test_changes_of_what_is_learned_are_refused(flags, said, stopped, data) -> None:
    """Of every field in tests/core/test_config.py."""
    message = refusal(stopped, data, *flags.split())
    assert said in message and "step_00000008.pth.tar" in message


def test_all_changes_are_listed_and_what_does_not_matter_may_change(stopped, data) -> None:
    message = refusal(stopped, data, "--lr", 0.05, "--seed", 2, "--epochs", 4)
    assert all(f"{name}: " in message for name in ("lr", "seed", "epochs"))
    assert "--allow-changes" in message
    assert refusal(stopped, data, "-j", 5, "-p", 7, "--save-steps", 9, "--keep-last", 2) == ""
    assert refusal(stopped, data, "--max-steps", 9, "--save-minutes", 1) == ""
    assert refusal(stopped, data, "--channels-last", "--deterministic", "--profile") == ""


def test_other_data_are_refused_and_moved_data_are_not(stopped, data, tmp_path) -> None:
    """The same number of images under other names would be other samples at each index."""
    moved = Path(shutil.copytree(data, tmp_path / "moved"))
    assert refusal(stopped, moved) == ""
    image = next((moved / "train" / "class_0").iterdir())
    image.rename(image.with_name("renamed.png"))
    assert "images_digest" in refusal(stopped, moved)


def test_allowed_changes_are_made_and_logged(stopped, data) -> None:
    flags = ["--wd", 0.01, "--momentum", 0.5]
    refused = start(stopped, data, *flags)
    assert refused.wait() == [1] and "Traceback" not in refused.output()
    said = finish(stopped, data, *flags, "--allow-changes")
    assert "changed in mid-run: weight_decay: 0.0001 before, 0.01 now" in said
    (event,) = (line for line in log_lines(stopped) if line["kind"] == "changes")
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


# ---- --resume ------------------------------------------------------------------------------------


def test_auto_passes_over_a_truncated_file_and_says_so(stopped, data, whole) -> None:
    """And what a killed writer left is removed, of the log half a line."""
    left = stopped / ".step_00000009.pth.tar.123.tmp"
    left.write_bytes(b"half a checkpoint")
    newest = stopped / "step_00000008.pth.tar"
    newest.write_bytes(newest.read_bytes()[:5000])
    with open(stopped / "log.jsonl", "a") as log:
        log.write('{"kind": "train", "st')
    said = finish(stopped, data)
    assert "passing over a checkpoint" in said and newest.name in said
    assert "checkpoint_0000.pth.tar: 1 epochs and 0 steps done" in said and not left.exists()
    assert_same_end(stopped, whole[1])


def test_auto_does_not_start_over_when_no_checkpoint_is_whole(stopped, data) -> None:
    for path in checkpoint.run_checkpoints(stopped):
        path.write_bytes(path.read_bytes()[:1000])
    failed = start(stopped, data, processes=2)
    assert failed.wait() == [1, 1]
    assert "checkpoints in" in failed.output(0) and "can be read" in failed.output(0)
    assert "Traceback" not in failed.output()


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
    assert "does not say by which objective it was trained; this run goes on with 3 * al" in said
    assert "random states start anew" in said and "weights, queue and optimizer go on" in said
    final = final_state(run)["checkpoint"]
    assert (final["epoch"], final["step_in_epoch"]) == (1, 1)
    assert final["state_dict"]["module.queue_ptr"].item() == (PER_EPOCH + 1) * BATCH % 64
    # The momentum of both runs' next step is the same: only the key shuffle differs.
    assert len(final["optimizer"]["state"]) == len(ours["optimizer"]["state"])


# ---- Run folders ---------------------------------------------------------------------------------


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
    before = {path: path.read_bytes() for path in stopped.iterdir()}
    with pytest.raises(SystemExit) as exit_info:
        cli.pretrain_config([*flags, "--save-dir", str(stopped), str(data)])
    assert exit_info.value.code == 2
    assert "already holds a run" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in stopped.iterdir()} == before


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


def test_a_folder_that_cannot_be_made_is_one_line(data, tmp_path, capsys) -> None:
    (tmp_path / "file").write_text("")
    argv = [*FLAGS, "-j", "0", "--save-dir", tmp_path / "file" / "run", data]
    status, line = helpers.refusal(main_moco.main, argv, capsys)
    assert status == 1 and "cannot write to the run folder" in line


# ---- Saving in the background --------------------------------------------------------------------


def test_two_writes_never_overlap_and_keep_their_order(tmp_path, monkeypatch) -> None:
    happened, write = [], checkpoint.write_checkpoint

    def slowly(path: Path, content: dict) -> None:
        happened.append(("starts", path.name))
        time.sleep(0.1)
        write(path, content)
        happened.append(("ends", path.name))

    monkeypatch.setattr(checkpoint, "write_checkpoint", slowly)
    writer = BackgroundWriter(tmp_path, keep_last=5, keep_every=0)
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

    writer = BackgroundWriter(tmp_path, keep_last=5, keep_every=0)
    writer.write(checkpoint.step_path(tmp_path, 1), {"a": 1})
    writer.finish()
    assert writer.error is None
    monkeypatch.setattr(checkpoint, "write_checkpoint", fail)
    monkeypatch.setattr(BackgroundWriter, "pauses", (0.01,))  # it tries again, for minutes
    writer.write(checkpoint.step_path(tmp_path, 2), {"a": 1})
    writer.thread.join()
    assert writer.error is error
    for call in (writer.finish, lambda: writer.write(tmp_path / "x", {})):
        with pytest.raises(CheckpointError, match="last good checkpoint is step_0+1"):
            call()


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
def test_a_save_that_fails_stops_training_on_all_ranks(data, tmp_path) -> None:
    run = tmp_path / "run"
    failed = start(run, data, "--save-steps", 2, processes=2, before=FULL_DISK)
    assert failed.wait() == [1, 1]
    said = failed.output(0)
    assert "could not save" in said and "training stops" in said and "Traceback" not in said
    assert "File too large" in said, "the reason that the system gave"
    assert "the last good checkpoint is step_00000004.pth.tar" in said
    assert "Traceback" not in failed.output(1)
    assert [path.name for path in checkpoint.run_checkpoints(run)] == [
        "step_00000002.pth.tar", "step_00000004.pth.tar",
    ]  # fmt: skip
    assert checkpoint.newest_valid(run, print)[1]["step"] == 4
    assert not list(run.glob("*.tmp"))
    assert logged_steps(run) <= 9, "training went on as if saved"


def test_a_log_that_cannot_be_written_is_one_line(data, tmp_path) -> None:
    before = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))"
    before += "\nfrom moco import checkpoint\ncheckpoint.write_checkpoint = lambda *_: None"
    failed = start(tmp_path / "run", data, before=before)
    assert failed.wait() == [1]
    # TensorBoard's thread shows its trace as well.
    assert "cannot write the log: File too large" in failed.output().splitlines()[-1]


# ---- How processes end ---------------------------------------------------------------------------


def test_an_unexpected_error_ends_a_run_that_has_loader_workers(data, tmp_path) -> None:
    """Workers ignore SIGTERM, by which Python ends its children: it would wait for ever."""
    before = "from moco.train import guards\nguards.CollapseAlarm.check = lambda *_: 1 / 0"
    failed = start(tmp_path / "run", data, workers=2, before=before)
    assert failed.wait() == [1]
    assert "ZeroDivisionError" in failed.output()


@pytest.mark.long
def test_chaos_counts_mismatches_and_lost_steps(tmp_path) -> None:
    code = MAIN.replace("main_moco.py", "scripts/chaos.py")
    trials = Processes(tmp_path / "chaos", "--trials", 1, "--kills", 2, code=code)
    assert trials.wait() == [0], trials.output()
    assert "1 trials" in trials.output() and ": 0 mismatches" in trials.output()
    assert trials.output().count("equal") == 1


def test_chaos_sees_a_single_bit() -> None:
    one = {"a": [torch.ones(3), 1.5], "b": {"c": torch.zeros(2)}}
    assert differences(one, {"a": [torch.ones(3), 1.5], "b": {"c": torch.zeros(2)}}) == []
    changed = {"a": [torch.ones(3), 1.5], "b": {"c": torch.tensor([0.0, -0.0])}}
    assert differences(one, changed) == ["/b/c"]
    changed = {"a": [torch.ones(3).nextafter(torch.tensor(2.0)), 1.0], "b": one["b"]}
    assert len(differences(one, changed)) == 2


SEES = """
import os
from moco import checkpoint
seen, mapped = {seen}, checkpoint.map_checkpoint
def counted(path, mark):
    content = mapped(path, mark) if os.environ["RANK"] in seen else None
    print("mapped", content is not None, flush=True)
    return content
checkpoint.map_checkpoint = counted
"""


@pytest.mark.long
def test_ranks_map_the_checkpoint_or_are_handed_it(data, whole, tmp_path) -> None:
    """Where rank 1 sees the file, and where it does not: the run goes on bit for bit."""
    cut = tmp_path / "cut"
    finish(cut, data, "--max-steps", 8, "--save-steps", 4, processes=2)
    for seen in (["1"], []):
        run = tmp_path / f"seen by {len(seen)}"
        shutil.copytree(cut, run)
        said = finish(run, data, "--save-steps", 4, processes=2, before=SEES.format(seen=seen))
        assert said.count("mapped") == 1 and f"mapped {bool(seen)}" in said
        assert differences(final_state(run), final_state(whole[2])) == []
