"""The lock of a run folder, between real processes."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time

import pytest
from harness import Processes

from moco import lock
from moco.errors import TrainingError
from moco.lock import FolderLock

HOLD = """
import sys, time
from moco.lock import FolderLock
held = FolderLock(sys.argv[1])
assert held.is_held()
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds tmp_path/run; ended with the test."""
    process = Processes(tmp_path / "out", tmp_path / "run", code=HOLD)
    while "held" not in process.output():
        assert process.running(), process.output()
        time.sleep(0.01)
    yield process
    if process.running():
        process.kill()


def test_a_second_process_is_refused_and_told_who_holds_the_folder(holder, tmp_path) -> None:
    """Also after looks at the lock, though closing any descriptor of a file drops a process's
    locks of it."""
    for _ in range(2):  # the refusal itself lets go of nothing
        with pytest.raises(TrainingError) as refused:
            FolderLock(tmp_path / "run")
        said = str(refused.value)
        assert f"run is in use by process {holder.pids[0]} on " in said
        assert "choose another --save-dir" in said and "\n" not in said


def test_a_holder_that_was_killed_is_taken_over(holder, tmp_path) -> None:
    holder.kill(signal.SIGKILL)
    holder.wait()
    with FolderLock(tmp_path / "run") as mine:
        assert mine.is_held()


def test_folders_that_were_made_for_nothing_go_again(tmp_path) -> None:
    folder = tmp_path / "results" / "run"
    with FolderLock(folder):
        assert folder.is_dir()
    assert list(tmp_path.iterdir()) == []
    with FolderLock(folder):
        (folder / "args.json").touch()
    assert {path.name for path in folder.iterdir()} == {lock.NAME, "args.json"}
    (tmp_path / "mine").mkdir()
    FolderLock(tmp_path / "mine").release()
    assert (tmp_path / "mine" / lock.NAME).exists(), "it was there before"


def test_a_holder_sees_that_its_file_is_gone_or_another_one(tmp_path) -> None:
    with FolderLock(tmp_path) as mine:
        for _ in range(3):
            assert mine.is_held()
        (tmp_path / lock.NAME).rename(tmp_path / "elsewhere")
        assert not mine.is_held()
        (tmp_path / lock.NAME).write_text(json.dumps(mine.me))
        assert not mine.is_held()


@pytest.fixture
def no_locks(monkeypatch):
    """As on a network file system without locks."""

    def refuse(*_):
        raise OSError(lock.errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "lockf", refuse)
    for name in lock._JOB_IDS:
        monkeypatch.delenv(name, raising=False)


ME, DEAD = lock.socket.gethostname(), 2**22 + 1  # above any process number


@pytest.mark.parametrize(
    ("host", "pid", "job", "age", "holds"),
    [
        ("another-host", 7, None, 0, True),
        ("another-host", 7, None, 2 * lock.DEAD_AFTER, False),  # its heart has stopped
        (ME, os.getpid(), None, 0, True),
        (ME, DEAD, None, 0, False),
        ("another-host", 7, "42", 0, True),
        ("another-host", 7, "41", 0, False),  # a requeue of this job
    ],
    # Not by the process numbers, which differ between test processes.
    ids=["elsewhere", "dead elsewhere", "here", "dead here", "another job", "requeued"],
)
def test_without_locks_a_holder_that_lives_keeps_the_folder(
    host, pid, job, age, holds, tmp_path, no_locks, monkeypatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "41")
    path = tmp_path / lock.NAME
    path.write_text(json.dumps({"host": host, "pid": pid, "start": 0, "job": job}))
    os.utime(path, (time.time() - age,) * 2)
    said = f"process {pid} on {host}" + (".*, job 42" if job == "42" else "")
    with pytest.raises(TrainingError, match=said) if holds else contextlib.nullcontext():
        FolderLock(tmp_path).release()


@pytest.mark.parametrize("content", [b"", b"\xff\0", b"[1]", b"[" * 100_000, b'{"pid": "x"}'])
def test_a_file_with_anything_in_it_does_not_keep_a_folder(content, tmp_path) -> None:
    (tmp_path / lock.NAME).write_bytes(content)
    with FolderLock(tmp_path) as mine:
        assert mine.is_held()
