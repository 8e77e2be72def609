"""The lock of a run folder, between real processes."""

from __future__ import annotations

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


def test_looking_at_the_lock_does_not_let_go_of_it(tmp_path) -> None:
    """Closing any descriptor of a file drops a process's locks of it."""
    with FolderLock(tmp_path / "run") as mine:
        assert mine.is_held()
        second = Processes(tmp_path / "out", tmp_path / "run", code=HOLD)
        assert second.wait() == [1]
        assert "is in use by process" in second.output()


@pytest.fixture
def no_locks(monkeypatch):
    """As on a network file system without locks."""

    def refuse(*_):
        raise OSError(lock.errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "lockf", refuse)
    for name in lock._JOB_IDS:
        monkeypatch.delenv(name, raising=False)


def claim_of(host: str, pid: int, job: str | None = None) -> str:
    return json.dumps({"host": host, "pid": pid, "start": 0, "job": job})


def test_without_locks_the_heartbeat_decides(tmp_path, no_locks) -> None:
    path = tmp_path / lock.NAME
    path.write_text(claim_of("another-host", 7))
    with pytest.raises(TrainingError, match="process 7 on another-host"):
        FolderLock(tmp_path)
    old = time.time() - 2 * lock.DEAD_AFTER
    os.utime(path, (old, old))
    FolderLock(tmp_path).release()


def test_without_locks_a_dead_process_of_this_host_is_taken_over(tmp_path, no_locks) -> None:
    host = lock.socket.gethostname()
    (tmp_path / lock.NAME).write_text(claim_of(host, os.getpid()))
    with pytest.raises(TrainingError, match=f"process {os.getpid()} on"):
        FolderLock(tmp_path)
    (tmp_path / lock.NAME).write_text(claim_of(host, 2**22 + 1))  # above any process number
    FolderLock(tmp_path).release()


def test_without_locks_a_requeue_of_the_same_job_goes_on(tmp_path, no_locks, monkeypatch) -> None:
    (tmp_path / lock.NAME).write_text(claim_of("another-host", 7, job="42"))
    monkeypatch.setenv("SLURM_JOB_ID", "41")
    with pytest.raises(TrainingError, match="job 42"):
        FolderLock(tmp_path)
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    FolderLock(tmp_path).release()


@pytest.mark.parametrize("content", [b"", b"\xff\0", b"[1]", b"[" * 100_000, b'{"pid": "x"}'])
def test_a_file_with_anything_in_it_does_not_keep_a_folder(content, tmp_path) -> None:
    (tmp_path / lock.NAME).write_bytes(content)
    with FolderLock(tmp_path) as mine:
        assert mine.is_held()
