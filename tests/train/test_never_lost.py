"""Faults of disks, logs, people and other jobs that must not cost a run (issue: nothing silent)."""

from __future__ import annotations

import shutil
import signal
import socket

import pytest
from harness import (
    FLAGS,
    STEPS,
    Processes,
    finish,
    start,
    wait_for_step,
)
from helpers import read_log

FAULTS = """
import errno, os
from moco.train.saver import BackgroundWriter
BackgroundWriter.pauses = (0.01,) * 3
names = {names} * {times}
replace, faults = os.replace, [OSError(n, os.strerror(n)) for n in map(errno.__dict__.get, names)]
def replaced(source, target):
    if str(target).endswith("step_00000004.pth.tar") and faults:
        raise faults.pop()
    return replace(source, target)
os.replace = replaced
"""


def test_a_fault_that_passes_is_met_by_trying_again(images, tmp_path) -> None:
    run = tmp_path / "run"
    before = FAULTS.format(names=["ESTALE", "EIO", "ETIMEDOUT"], times=1)
    said = finish(run, images, "--save-steps", 4, "--keep-last", 50, before=before)
    assert said.count("warning: could not save step_00000004.pth.tar") == 3
    assert "training goes on" in said and f"done: {STEPS} steps" in said
    assert (run / "step_00000004.pth.tar").is_file()


@pytest.mark.parametrize(("name", "status"), [("EIO", 75), ("ENOSPC", 1)])
def test_a_fault_that_stays_stops_the_run_in_one_line(name, status, images, tmp_path) -> None:
    """With the status that asks for another try where one may help."""
    before = FAULTS.format(names=[name], times=99)
    stopped = start(tmp_path / "run", images, "--save-steps", 4, before=before)
    assert stopped.wait() == [status], stopped.output()
    said = stopped.output()
    assert "could not save in" in said and "the last good checkpoint is none" in said
    assert "Traceback" not in said and said.count("trying again") == (3 if status == 75 else 0)


@pytest.mark.long
def test_a_last_file_that_cannot_be_written_is_an_error_of_all_ranks(images, tmp_path) -> None:
    before = FAULTS.format(names=["ENOSPC"], times=99)
    ranks = start(tmp_path / "run", images, "--max-steps", 4, processes=2, before=before)
    assert ranks.wait() == [1, 1], ranks.output()
    assert "could not save in" in ranks.output(0)
    assert "error: rank 0 could not save; training stops" in ranks.output(1)


DAMAGED = [b'{"kind": "train", "st\n', b"\xff\xfe\n", b"[1]\n", b"null\n", b'{"kind": "train"}\n',
           b'{"kind": "train", "step": null}\n', b"[" * 100_000 + b"\n",
           b"\0" * 4096 + b"\n"]  # fmt: skip


def test_damaged_lines_of_the_log_cost_those_lines_only(half, images, tmp_path) -> None:
    run = tmp_path / "run"
    log = run / "log.jsonl"
    shutil.copytree(half, run)
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join([*lines[:2], *DAMAGED, *lines[2:]]))
    said = finish(run, images)
    assert "8 damaged line(s) of log.jsonl are now in log.jsonl.damaged" in said
    assert (run / "log.jsonl.damaged").read_bytes() == b"".join(DAMAGED)
    assert [line["step"] for line in read_log(run)] == list(range(1, STEPS + 1))


AT_ONCE = 120  # seconds, on a busy machine


def test_a_second_ctrl_c_ends_it_at_once_in_one_line(images, tmp_path) -> None:
    never_ends = """
import time
from moco import stop
stop._SAME_KEYSTROKE = 0.05
from moco.train import loop
def hangs(*_):
    print("in the step", flush=True)
    while True:
        time.sleep(0.01)
loop.train_step = hangs
"""
    run = start(tmp_path / "run", images, before=never_ends)
    run.wait_until(lambda: "in the step" in run.output())
    for _ in range(2):
        run.send(0, signal.SIGINT)
        signal.sigtimedwait([], 0.3)
    assert run.wait(AT_ONCE) == [130]
    assert run.output().strip().endswith("main_moco.py: interrupted")
    assert "Traceback" not in run.output()


def test_a_second_ctrl_c_does_not_wait_for_more_tries_to_save(images, tmp_path) -> None:
    """The first one wants to save, and so waits for the file that is being tried again."""
    run = tmp_path / "run"
    never = """
import errno
from moco import checkpoint, stop
from moco.train.saver import BackgroundWriter
BackgroundWriter.pauses = (3600,)
stop._SAME_KEYSTROKE = 0.0
def write_checkpoint(path, content):
    raise OSError(errno.EIO, "no answer")
checkpoint.write_checkpoint = write_checkpoint
"""
    stuck = start(run, images, "--save-steps", 2, before=never)
    stuck.wait_until(lambda: "trying again in 3600 s" in stuck.output())
    stuck.send(0, signal.SIGINT)
    stuck.wait_until(lambda: "Ctrl-C again" in stuck.output())
    stuck.send(0, signal.SIGINT)
    assert stuck.wait(AT_ONCE) == [130], stuck.output()
    said = stuck.output()
    assert said.strip().splitlines()[-1] == "main_moco.py: interrupted" and "Traceback" not in said


@pytest.mark.long
def test_a_second_job_in_the_folder_is_refused_and_changes_nothing(images, tmp_path) -> None:
    """The first is asked to stop by a hang-up."""
    run = tmp_path / "run"
    first = start(run, images, "--epochs", 400, "--keep-last", 1000)
    wait_for_step(run, 2, first)
    before = (run / "args.json").read_bytes()
    second = Processes(tmp_path / "second", *FLAGS, "--lr", 9, "-j", 0, "--save-dir", run, images)
    assert second.wait() == [1]
    said = second.output()
    assert f"{run} is in use by process {first.pids[0]} on" in said and "Traceback" not in said
    assert (run / "args.json").read_bytes() == before
    first.send(0, signal.SIGHUP)
    assert first.wait() == [75]
    assert "stopped by SIGHUP after step" in first.output()


def test_a_run_deletes_nothing_once_another_job_has_its_folder(images, tmp_path) -> None:
    """Whoever took the lock may be writing beside it: each save from then on stays."""
    take = """
import pathlib, sys
from moco.train import loop
step = loop.train_step
def steps(task, model, state, guard, batch):
    if state.step == 2:
        lock = pathlib.Path(sys.argv[sys.argv.index("--save-dir") + 1]) / ".lock"
        lock.rename(lock.with_name("taken"))
        lock.write_text("another job")
    return step(task, model, state, guard, batch)
loop.train_step = steps
"""
    run = tmp_path / "run"
    flags = ["--save-steps", 1, "--max-steps", 6, "--keep-last", 1, "--keep-every", 0]
    finish(run, images, *flags, before=take)
    assert len(list(run.glob("*.pth.tar"))) >= 4


@pytest.mark.long
@pytest.mark.parametrize(
    ("other", "named"),
    [
        (
            "sys.argv[-1:-1] = '--moco-unif-w', '0'",
            "unif_w 0.0, rank 0 has 1.0: give all ranks the",
        ),
        ("sys.argv[-1:-1] = '--save-steps', '5'", "save_steps 5, rank 0 has 0: give all ranks the"),
        ("images.names_digest = lambda _: '1'", "images_digest '1'"),
        ("handshake.provenance = lambda: {'git': '1'}", "git version '1'"),
    ],
)
def test_ranks_with_other_arguments_images_or_code_are_named_on_every_rank(
    other, named, images, tmp_path
) -> None:
    before = "import os, sys\nfrom moco import handshake\nfrom moco.tasks import images\n"
    before += f"if os.environ['RANK'] == '1': {other}"
    ranks = start(tmp_path / "run", images, processes=2, before=before)
    assert ranks.wait() == [1, 1]
    for rank in range(2):
        lines = ranks.output(rank).strip().splitlines()
        assert f"rank 1 has {named}" in lines[-1] and "Traceback" not in lines[0]
    assert not (tmp_path / "run" / "args.json").exists()


@pytest.mark.long
def test_a_rank_that_fails_alone_ends_the_job(images, tmp_path) -> None:
    """The other one is inside a collective: nobody waits for it to be destroyed in order."""
    fails = """
import os
from moco.train import loop
step = loop.train_step
def fails(task, model, state, guard, batch):
    if os.environ["RANK"] == "1" and state.step == 3:
        raise RuntimeError("a fault of one rank alone")
    return step(task, model, state, guard, batch)
loop.train_step = fails
"""
    ranks = start(tmp_path / "run", images, processes=2, before=fails)
    assert ranks.wait() == [1, 1]
    assert "a fault of one rank alone" in ranks.output(1)
    (line,) = [text for text in ranks.output(0).splitlines() if "error" in text]
    assert "rank 0 could not talk to the others in epoch 0, step 3" in line


@pytest.mark.long
def test_ranks_that_cannot_meet_say_so_in_one_line(images, tmp_path) -> None:
    """Something else listens on the port; rank 0 cannot, rank 1 gets no answer from it."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = f"import os; os.environ['MASTER_PORT'] = '{other.getsockname()[1]}'"
        flags = ["--timeout-minutes", 0.02]
        ranks = start(tmp_path / "run", images, *flags, processes=2, before=port)
        assert ranks.wait() == [1, 1]
    for rank in range(2):
        (line,) = [text for text in ranks.output(rank).splitlines() if "error" in text]
        assert f"rank {rank} of 2 could not meet the others at MASTER_ADDR=127.0.0.1" in line
    assert "Traceback" not in ranks.output()
