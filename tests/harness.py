"""Real training processes for tests, started within milliseconds.

Importing torch takes seconds, so one server process does it once and forks a child for each rank
of each run. A child executes a piece of code (`MAIN` is what `python main_moco.py` does) with an
environment, a command line and an output file of its own. Forking from pytest itself would copy
whatever threads the tests before have left.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import multiprocessing.util
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = str(ROOT / "main_moco.py")
MAIN = f"import runpy; runpy.run_path({PROGRAM!r}, run_name='__main__')"
LIMIT = 100  # seconds that any run may take before the test fails: no test can hang

# The run that the tests cut off in many ways: 3 epochs of 6 steps.
IMAGES, BATCH, EPOCHS, STEPS = 96, 16, 3, 18
FLAGS = (
    f"-a resnet8 --image-size 16 --batch-size {BATCH} --moco-k 64 --moco-dim 32 --bn-splits 2 "
    f"--mlp --cos --aug-plus --epochs {EPOCHS} --lr 0.1 --seed 1 -p 1 --check-every 5 --resume auto"
).split()


# ------------------------------------------------------------------------------------------------
# Server
# ------------------------------------------------------------------------------------------------


def serve() -> None:
    """Fork a child per line of JSON on stdin and answer with its process id; or, for a line with
    `poll`, with its exit status, None while it runs."""
    sys.path.insert(0, str(ROOT))
    import torch

    import moco.cli  # noqa: F401

    torch.set_num_threads(1)
    for line in sys.stdin:
        order = json.loads(line)
        if "poll" in order:
            pid, status = os.waitpid(order["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            answer = os.fork() or child(order)
            with contextlib.suppress(ProcessLookupError):  # it has ended already
                os.setpgid(answer, order["group"])  # before the next one wants to join the group
        print(json.dumps(answer), flush=True)


def child(order: dict) -> None:
    status = 1
    try:
        os.setpgid(0, order["group"])
        os.environ.update(order["environment"])
        out = os.open(order["out"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for target, source in ((0, nothing), (1, out), (2, out)):
            os.dup2(source, target)
        sys.argv = [PROGRAM, *order["argv"]]
        exec(compile(order["code"], "<test>", "exec"), {"__name__": "__child__"})
        status = 0
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        # As at the end of an interpreter: threads are waited for, children ended.
        threading._shutdown()
        multiprocessing.util._exit_function()
        sys.stdout.flush()
        os._exit(status)


@functools.cache
def server() -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    atexit.register(process.kill)
    return process


def ask(order: dict) -> int | None:
    server().stdin.write(json.dumps(order) + "\n")
    server().stdin.flush()
    return json.loads(server().stdout.readline())


# ------------------------------------------------------------------------------------------------
# Runs
# ------------------------------------------------------------------------------------------------


class Processes:
    """One or several processes in a process group of their own, numbered as torchrun does.

    Args:
        out: files `out.0`, `out.1`, ... take what they print.
        argv: the command line.
        count: number of processes.
        code: what each executes, after `before`.
    """

    def __init__(
        self, out: Path, *argv: object, count: int = 1, code: str = MAIN, before: str = ""
    ) -> None:
        self.outs = [Path(f"{out}.{rank}") for rank in range(count)]
        self.pids: list[int] = []
        port = str(free_port())
        for rank in range(count):
            several = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count),
                       "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}  # fmt: skip
            order = {
                "argv": list(map(str, argv)),
                "environment": several if count > 1 else {},
                "out": str(self.outs[rank]),
                "group": self.pids[0] if self.pids else 0,
                "code": f"{before}\n{code}",
            }
            self.pids.append(ask(order))
        self.statuses: dict[int, int] = {}

    def running(self) -> list[int]:
        for pid in self.pids:
            if pid not in self.statuses and (status := ask({"poll": pid})) is not None:
                self.statuses[pid] = status
        return [pid for pid in self.pids if pid not in self.statuses]

    def wait(self, limit: float = LIMIT) -> list[int]:
        """Exit statuses by rank; the test fails, with the output, when it takes too long."""
        deadline = time.monotonic() + limit
        while self.running():
            if time.monotonic() > deadline:
                self.kill()
                raise AssertionError(f"still running after {limit} s:\n{self.output()}")
            time.sleep(0.02)
        return [self.statuses[pid] for pid in self.pids]

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal to the whole process group, loader workers included."""
        os.killpg(self.pids[0], number)

    def send(self, rank: int, number: int) -> None:
        os.kill(self.pids[rank], number)

    def output(self, rank: int | None = None) -> str:
        """What rank `rank`, or all of them one after another, have printed."""
        paths = self.outs if rank is None else [self.outs[rank]]
        return "\n".join(path.read_text() if path.exists() else "" for path in paths)


def start(
    run: Path, data: Path, *flags: object, processes: int = 1, workers: int = 0, before: str = ""
) -> Processes:
    """Start the run of `FLAGS` in the folder `run`."""
    more = ["-j", workers * processes, "--save-dir", run, *flags, data]
    return Processes(run.with_suffix(".out"), *FLAGS, *more, count=processes, before=before)


def finish(run: Path, data: Path, *flags: object, **options) -> str:
    """The same to its end; what it has printed."""
    processes = start(run, data, *flags, **options)
    statuses = processes.wait()
    assert not any(statuses), (statuses, processes.output())
    return processes.output()


def wait_for_step(run: Path, step: int, processes: Processes, limit: float = LIMIT) -> None:
    """Until `step` has been logged."""
    deadline = time.monotonic() + limit
    while chaos()["logged_steps"](run) < step:
        assert time.monotonic() < deadline, processes.output()
        assert processes.running(), f"ended too early:\n{processes.output()}"
        time.sleep(0.005)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@functools.cache
def chaos() -> dict:
    """The functions of scripts/chaos.py: what a run has left, and in what two of them differ."""
    return runpy.run_path(str(ROOT / "scripts" / "chaos.py"))


if __name__ == "__main__":
    serve()
