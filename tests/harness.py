"""Real training processes for tests and for scripts/chaos.py: start, hold, kill, compare.

Importing torch takes seconds, so one server process does it once and forks a child for each rank
of each run. A child executes a piece of code (`MAIN` is what `python main_moco.py` does) with an
environment, a command line and an output file of its own. Forking from pytest itself would copy
whatever threads the tests before have left. The server ends what it started when its input ends,
so nothing outlives the tests, however they end.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import multiprocessing.util
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # for the server, and for scripts/chaos.py
PROGRAM = str(ROOT / "main_moco.py")
MAIN = f"import runpy; runpy.run_path({PROGRAM!r}, run_name='__main__')"
# For `before`: what `launch` starts are forks, not Python processes that import torch for seconds.
# As it starts them otherwise: tests/core/test_distributed.py.
FORKING = """
import functools, torch.multiprocessing as processes
processes.spawn = functools.partial(processes.start_processes, start_method="fork")
"""
LIMIT = 600  # seconds until what hangs fails the test; nothing that works takes as long

# The run that the tests cut off in many ways: 3 epochs of 6 steps.
IMAGES, BATCH, EPOCHS, STEPS = 96, 16, 3, 18
FLAGS = (
    f"-a resnet8 --image-size 16 --batch-size {BATCH} --moco-k 64 --moco-dim 32 --bn-splits 2 "
    f"--mlp --cos --aug-plus --epochs {EPOCHS} --lr 0.1 --seed 1 -p 1 --check-every 5 --resume auto"
).split()
# What may differ between two lines of a log.
TIMES = ("time", "images_per_s", "data_share", "seconds")


def serve() -> None:
    """Fork a child per line of JSON on stdin and answer with its process id; or, for a line with
    `poll`, with its exit status, None while it runs."""
    import torch

    import moco.cli  # noqa: F401

    torch.set_num_threads(1)
    groups = set()
    for line in sys.stdin:
        order = json.loads(line)
        if "poll" in order:
            pid, status = os.waitpid(order["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            answer = os.fork() or child(order)
            groups.add(order["group"] or answer)
            with contextlib.suppress(ProcessLookupError):  # it has ended already
                os.setpgid(answer, order["group"])  # before the next one wants to join the group
        print(json.dumps(answer), flush=True)
    for group in groups:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)


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
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, __file__], env=environment, **pipes)
    atexit.register(process.communicate)  # its input ends, and it with all that it started
    return process


def ask(order: dict) -> int | None:
    server().stdin.write(json.dumps(order) + "\n")
    server().stdin.flush()
    return json.loads(server().stdout.readline())


_started: list[Processes | subprocess.Popen] = []


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
        self.statuses: dict[int, int] = {}
        _started.append(self)
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

    def running(self) -> list[int]:
        for pid in self.pids:
            if pid not in self.statuses and (status := ask({"poll": pid})) is not None:
                self.statuses[pid] = status
        return [pid for pid in self.pids if pid not in self.statuses]

    def wait(self, limit: float = LIMIT) -> list[int]:
        """Exit statuses by rank; what hangs for `limit` seconds fails the test, with the output."""
        until(lambda: not self.running(), self.output, limit)
        return [self.statuses[pid] for pid in self.pids]

    def wait_until(self, happened: Callable[[], bool]) -> None:
        """The same for something that must happen before any process ends."""

        def now() -> bool:
            alive = len(self.running()) == len(self.pids)
            found = happened()
            assert alive or found, f"ended too early:\n{self.output()}"
            return found

        until(now, self.output)

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal to the whole process group, loader workers included."""
        with contextlib.suppress(ProcessLookupError):  # it has ended
            os.killpg(self.pids[0], number)

    def send(self, rank: int, number: int) -> None:
        os.kill(self.pids[rank], number)

    def output(self, rank: int | None = None) -> str:
        """What rank `rank`, or all of them one after another, have printed."""
        paths = self.outs if rank is None else [self.outs[rank]]
        return "\n".join(path.read_text() if path.exists() else "" for path in paths)


def on_ranks(worker: Callable, folder: Path, *, count: int) -> None:
    """`launch(worker, folder)` on `count` ranks. Where `launch` spawns, they are forked here: a
    Python process that imports torch costs seconds. `worker` is a function of a test module."""
    file = sys.modules[worker.__module__].__file__
    code = f"""
import importlib.util
from moco.config import Launch
from moco.launch import launch
spec = importlib.util.spec_from_file_location({worker.__module__!r}, {file!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
launch(module.{worker.__name__}, {str(folder)!r}, Launch(device="cpu"))
"""
    ranks = Processes(folder / "out", count=count, code=code)
    assert ranks.wait() == [0] * count, ranks.output()


def until(happened: Callable[[], bool], output: Callable[[], str], limit: float = LIMIT) -> None:
    deadline = time.monotonic() + limit
    while not happened():
        assert time.monotonic() < deadline, f"nothing for {limit} s:\n{output()}"
        time.sleep(0.005)


def watch(process: subprocess.Popen) -> subprocess.Popen:
    """Let `end_all` end it too: a process that is not forked from the server, and that leads a
    session of its own."""
    _started.append(process)
    return process


def end_all(folder: Path) -> None:
    """End what a test has started and not waited for: its process groups, and what those have put
    into groups of their own, known by `folder` on its command line."""
    for process in _started:
        if isinstance(process, Processes):
            if process.running():
                process.kill()
                process.wait()
        else:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            for pid in processes_of(folder):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
    _started.clear()


def processes_of(path: Path) -> list[int]:
    """Ids of all other processes that name `path`, or what is in it, on their command line. (This
    one's may: pytest --basetemp.) Not those of path-2, another session's."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended
            words = (folder / "cmdline").read_text().replace("\0", "/")
            if f"{path}/" in words and folder.name != str(os.getpid()):
                found.append(int(folder.name))
    return found


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


# Rank 0 logs a step and waits there, so that what the test does next does not race with training.
HOLD = """
import os, time
from moco.log import RunLog
event = RunLog.event
def held(self, kind, step, **facts):
    event(self, kind, step, **facts)
    while step >= {step} and not os.path.exists({go!r}):
        time.sleep(0.01)
RunLog.event = held
"""


def write_images(folder: Path) -> None:
    """The images that the run of `FLAGS` trains on."""
    import numpy as np
    from PIL import Image

    draw = np.random.default_rng(0)
    for index in range(IMAGES):
        path = folder / "train" / f"class_{index % 2}" / f"{index:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (24, 24, 3), dtype=np.uint8)).save(path)


def poison(step: int) -> str:
    """For `before`: in that step (number of those done) rank 1, or the only process, sees a
    uniformity loss of NaN; rank 0 sees nothing unusual."""
    return f"""
import os
from moco.builder import MoCo
losses_of = MoCo._losses
def poisoned(self, q, k):
    losses = losses_of(self, q, k)
    if os.environ.get("RANK", "1") == "1" and self._steps == {step}:
        losses.loss_unif = losses.loss_unif * float("nan")
    return losses
MoCo._losses = poisoned
"""


def start(
    run: Path, data: Path, *flags: object, processes: int = 1, workers: int = 0, before: str = "",
    hold_at: int | None = None,
) -> Processes:  # fmt: skip
    """Start the run of `FLAGS`; with `hold_at` it waits in that step, once logged, for `go_on`."""
    if hold_at is not None:
        before = HOLD.format(step=hold_at, go=str(run.with_suffix(".go"))) + before
    more = ["-j", workers * processes, "--save-dir", run, *flags, data]
    return Processes(run.with_suffix(".out"), *FLAGS, *more, count=processes, before=before)


def go_on(run: Path) -> None:
    run.with_suffix(".go").touch()


def finish(run: Path, data: Path, *flags: object, **options) -> str:
    """`start`, then wait for the end; what has been printed."""
    processes = start(run, data, *flags, **options)
    statuses = processes.wait()
    assert not any(statuses), (statuses, processes.output())
    return processes.output()


def wait_for_step(run: Path, step: int, processes: Processes) -> None:
    """Until `step` has been logged."""
    processes.wait_until(lambda: logged_steps(run) >= step)


def log_lines(run: Path) -> list[dict]:
    from moco.run_files import LOG, read_log

    path = run / LOG
    return read_log(path)[0] if path.is_file() else []


def logged_steps(run: Path) -> int:
    """The last step that the log calls done. (The line of the very first one is always there.)"""
    return max((line["step"] for line in log_lines(run) if line["kind"] != "start"), default=0)


def saved_step(run: Path) -> int:
    """The step of the newest whole checkpoint."""
    from moco.checkpoint import newest_valid

    found = newest_valid(run, lambda _: None)
    return found[1]["step"] if found else 0


def final_state(run: Path) -> dict:
    """The newest checkpoint, and the log without times."""
    from moco.checkpoint import newest_valid

    _, content = newest_valid(run, lambda _: None)
    del content["args"]  # holds the folder's name
    log = [{name: v for name, v in line.items() if name not in TIMES} for line in log_lines(run)]
    return {"checkpoint": content, "log": log}


def differences(a: object, b: object, name: str = "") -> list[str]:
    """Names of everything in nested dicts and lists that is not equal bit for bit.

    The checksum of a checkpoint is passed over: it is of the arguments and paths as well.
    """
    from torch import Tensor

    if type(a) is not type(b):
        return [f"{name}: {type(a).__name__}, {type(b).__name__}"]
    if isinstance(a, Tensor):
        same = a.dtype == b.dtype and a.shape == b.shape
        return [] if same and a.numpy().tobytes() == b.numpy().tobytes() else [name]
    if isinstance(a, (list, tuple)):
        if len(a) != len(b):
            return [f"{name}: {len(a)} entries, {len(b)}"]
        a, b = dict(enumerate(a)), dict(enumerate(b))
    if isinstance(a, dict):
        a, b = ({k: v for k, v in nest.items() if k != "checksum"} for nest in (a, b))
        alone = [f"{name}/{key} in one only" for key in sorted(a.keys() ^ b.keys(), key=str)]
        both = [key for key in a if key in b]
        return alone + [d for key in both for d in differences(a[key], b[key], f"{name}/{key}")]
    return [] if a == b else [f"{name}: {a!r}, {b!r}"]


@dataclass
class Trial:
    """A run that was killed, resumed and compared with one that nobody touched.

    Args:
        killed_after: the last step that had been logged, for each kill.
        lost: how many of these steps had to be done again, for each kill.
        late: kills that came after the end of the run.
        different: what differs from the other run.
    """

    run: Path
    killed_after: list[int] = field(default_factory=list)
    lost: list[int] = field(default_factory=list)
    late: int = 0
    different: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        kills = ", ".join(f"killed after step {step}" for step in self.killed_after)
        verdict = f"DIFFERENT ({'; '.join(self.different[:3])}), see {self.run}"
        return (
            f"{self.run.name}: {kills or 'not killed'}, lost "
            f"{'+'.join(map(str, self.lost)) or 0} steps: {verdict if self.different else 'equal'}"
        )


def trials(
    folder: Path, count: int, *flags: object, kills: int, seed: int, **options
) -> Iterator[Trial]:
    """Make images and the run that nobody touches in `folder`, then `count` times SIGKILL a run
    within random steps, resume it, and compare the ends. The folders of equal ones are removed."""
    data, draw = folder / "data", random.Random(seed)
    write_images(data)
    finish(folder / "reference", data, *flags, **options)
    expected = final_state(folder / "reference")
    for number in range(1, count + 1):
        run = folder / f"trial_{number:03d}"
        trial = Trial(run)
        for _ in range(kills):
            done = logged_steps(run)
            if STEPS - done < 3:
                break
            processes = start(run, data, *flags, **options)
            if kill_after(run, processes, draw.randint(done + 1, STEPS - 2), draw.random()):
                trial.killed_after.append(logged_steps(run))
                trial.lost.append(trial.killed_after[-1] - saved_step(run))
            else:
                trial.late += 1
        statuses = start(run, data, *flags, **options).wait()
        failed = [f"exit status {status}" for status in statuses if status]
        trial.different = failed or differences(expected, final_state(run))
        if not trial.different:
            shutil.rmtree(run)
        yield trial


def kill_after(run: Path, processes: Processes, step: int, share: float) -> bool:
    """SIGKILL everything once `step` has been logged and `share` of another step's time has gone
    by. False when the run was over before."""
    count, seen, before, pace = len(processes.pids), 0, time.monotonic(), 0.02

    def reached() -> bool:
        nonlocal seen, before, pace
        if (now := logged_steps(run)) > seen:
            pace = 0.5 * pace + 0.5 * min(0.2, time.monotonic() - before)
            seen, before = now, time.monotonic()
        return now >= step or len(processes.running()) < count

    until(reached, processes.output)
    time.sleep(share * pace)
    alive = len(processes.running()) == count
    processes.kill()
    processes.wait()
    return alive


if __name__ == "__main__":
    serve()
