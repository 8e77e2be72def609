"""Commands that run others: stop signals, Ctrl-C, and children that end with their parent."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
from pathlib import Path

import pytest
from helpers import ROOT
from run_folders import make_probe, make_run

from moco.run_files import write_text

# A parent as sweep.py and run_recipe.py are, of two generations, and a program that saves when it
# is asked to stop. Files tell what they do.
PARENT = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from moco.runs import command
children = command.Children("parent.py")
sys.exit(children.run(sys.argv[1:]))
"""
CHILD = """
import pathlib, signal, sys, time
folder, saves = pathlib.Path(sys.argv[1]), sys.argv[2] == "saves"
def stop(number, _):
    (folder / f"asked-{number}").touch()
    if saves:
        sys.exit(75)
signal.signal(signal.SIGTERM, stop)
(folder / "ready").touch()
time.sleep(3600)
"""


@pytest.fixture
def family(tmp_path, processes):
    """family(saves) -> the parent process, its child running."""
    (tmp_path / "parent.py").write_text(PARENT)
    (tmp_path / "child.py").write_text(CHILD)

    def family(saves: bool = True, generations: int = 1, before: str = "") -> subprocess.Popen:
        (tmp_path / "parent.py").write_text(before + PARENT)
        words = [tmp_path / "parent.py"] * generations
        words += [tmp_path / "child.py", tmp_path, "saves" if saves else "goes on"]
        process = processes.start(*words, stderr=subprocess.PIPE)
        processes.until((tmp_path / "ready").exists, process)
        return process

    return family


@pytest.mark.parametrize(
    ("number", "status"),
    [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGHUP, 75), (signal.SIGINT, 130)],
)
def test_a_request_to_stop_is_handed_on(number, status, family, processes, tmp_path) -> None:
    # Children inherit what pytest was started with, and under nohup a hang-up is ignored.
    before = signal.signal(number, signal.SIG_DFL)
    try:
        process = family(generations=2)
    finally:
        signal.signal(number, before)
    process.send_signal(number)
    _, err = process.communicate(timeout=processes.LIMIT)
    assert process.returncode == status and (tmp_path / "asked-15").exists()
    assert err.startswith("parent.py: stopping: ") and "Traceback" not in err
    assert len(err.splitlines()) == 2, "a line of each generation"
    assert not processes.running()


def test_the_second_interrupt_ends_all_at_once(family, processes, tmp_path) -> None:
    process = family(saves=False)
    process.send_signal(signal.SIGINT)
    processes.until((tmp_path / "asked-15").exists, process)
    process.send_signal(signal.SIGINT)
    assert process.wait(processes.LIMIT) == 130
    processes.until(lambda: not processes.running())


@pytest.mark.parametrize("generations", [1, 2])
@pytest.mark.parametrize("platform", ["linux", "darwin"])
def test_children_end_with_a_parent_that_is_killed(
    platform, generations, family, processes, tmp_path
) -> None:
    """By the kernel on Linux, by a process that watches elsewhere."""
    tied = (ROOT / "moco" / "runs" / "tied.py").read_text()
    (tmp_path / "tied.py").write_text(tied.replace("sys.platform", repr(platform)))
    before = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from moco.runs import tied
tied.__file__ = {str(tmp_path / "tied.py")!r}
"""
    process = family(generations=generations, before=before)
    process.kill()
    process.wait()
    processes.until((tmp_path / "asked-15").exists)
    processes.until(lambda: not processes.running())


def test_what_nohup_ignores_stays_ignored(family) -> None:
    process = family(before="import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)")
    status = Path(f"/proc/{process.pid}/status").read_text()
    ignored = int(status.partition("SigIgn:")[2].split()[0], 16)
    assert ignored & 1 << signal.SIGHUP - 1 and not ignored & 1 << signal.SIGTERM - 1


def test_a_program_that_fails_gives_its_own_status(processes, tmp_path) -> None:
    (tmp_path / "parent.py").write_text(PARENT)
    (tmp_path / "child.py").write_text("raise SystemExit(7)")
    assert processes.start(tmp_path / "parent.py", tmp_path / "child.py").wait() == 7


@pytest.mark.parametrize(
    ("command", "words", "step"),
    [
        ("compare_runs", "a --out out.html", "moco.runs.folder.read_runs"),
        ("run_recipe", "table10:1 a --run --out out.html", "moco.runs.recipes.check_classes"),
        ("sweep", "spec.toml a --out out.html", "moco.runs.sweep.plan"),
    ],
)
def test_an_interrupt_before_anything_runs_is_one_line(
    command, words, step, processes, tmp_path
) -> None:
    """In a step of the command that is made to take an hour."""
    make_run(tmp_path / "a")
    module, _, name = step.rpartition(".")
    code = f"""
import pathlib, runpy, sys, time
sys.path.insert(0, {str(ROOT)!r})
import {module}
def wait(*_, **__):
    pathlib.Path("ready").touch()
    time.sleep(3600)
{module}.{name} = wait
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
    script = ROOT / "scripts" / f"{command}.py"
    process = processes.start("-c", code, script, *words.split(), cwd=tmp_path, stderr=-1)
    processes.until((tmp_path / "ready").exists, process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=processes.LIMIT)
    assert process.returncode == 130 and err == f"{command}.py: interrupted\n"
    assert not (tmp_path / "out.html").exists()


def test_a_report_that_is_not_written_whole_leaves_the_one_before(tmp_path) -> None:
    path = tmp_path / "report.html"
    write_text(path, "before")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "after \ud800")
    with pytest.raises(OSError, match="report.html"):
        write_text(tmp_path / "none" / "report.html", "")
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
    assert path.read_text() == "before"


@pytest.mark.parametrize("name", [os.fsdecode(b"od\xff\nd"), "n" * 300])
def test_odd_names_of_folders_are_no_traceback(name, processes, tmp_path) -> None:
    """Output goes to a file by an encoding that refuses what is no character."""
    folder = tmp_path / name
    possible = len(name) < 300
    if possible:
        make_probe(make_run(folder / "a"), 50.0)
        make_run(folder / "unfinished", steps=4)
    spec = ROOT / "scripts" / "sweeps" / "example.toml"
    commands = [
        ("compare_runs", [folder, "--out", folder / "r.html"], 0 if possible else 2),
        ("run_recipe", ["table10:1", folder, "--out", folder], 0),
        ("run_recipe", ["table10:1", folder, "--out", folder, "--run"], 2),
        ("sweep", [spec, folder, "--out", folder, "--dry-run"], 0),
        ("sweep", [folder / "spec.toml", folder, "--out", folder], 2),
        ("sweep", [spec, folder, "--out", folder], 2),
    ]
    for command, words, status in commands:
        script = ROOT / "scripts" / f"{command}.py"
        process = processes.start(script, *words, stdout=-1, stderr=-1, errors="surrogateescape")
        out, err = process.communicate(timeout=processes.LIMIT)
        assert process.returncode == status, (command, err)
        assert len(err.splitlines()) <= 1 and "Traceback" not in err, err
        assert status == 0 or err.startswith(f"{command}.py: error: ")
        if status == 0 and command != "compare_runs":  # a command that can be copied
            assert shlex.quote(str(folder)) in out
