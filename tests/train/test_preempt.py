"""Preemption and faults, with real processes: signals, torchrun, killed and hanging ranks."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import pytest
from harness import (
    FLAGS,
    FORKING,
    HOLD,
    MAIN,
    STEPS,
    Processes,
    differences,
    final_state,
    finish,
    free_port,
    go_on,
    logged_steps,
    saved_step,
    start,
    until,
    wait_for_step,
)
from helpers import start_python

from moco import checkpoint

pytestmark = pytest.mark.long

# A run that would take minutes, for those that are interrupted before its end.
LONG = ["--epochs", 300]


def assert_same_end(run: Path, reference: Path) -> None:
    assert differences(final_state(reference), final_state(run)) == []


# ---- A request to stop ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "processes", "workers", "whom"),
    [
        (signal.SIGUSR1, 1, 2, "all"),
        (signal.SIGTERM, 2, 0, "rank 1"),
        (signal.SIGINT, 1, 0, "rank 0"),  # the first Ctrl-C
    ],
)
def test_a_request_to_stop_saves_and_the_run_goes_on_bit_for_bit(
    number, processes, workers, whom, images, whole, tmp_path
) -> None:
    """The step is finished, all ranks save together and end with one status; also when loader
    workers get the signal as well, or when one rank alone does."""
    run = tmp_path / "run"
    asked = start(run, images, processes=processes, workers=workers, hold_at=8)
    wait_for_step(run, 8, asked)
    if whom == "all":
        asked.kill(number)
    else:
        asked.send(int(whom[-1]), number)
    go_on(run)
    status = 130 if number == signal.SIGINT else 75
    assert asked.wait() == [status] * processes, asked.output()
    done = logged_steps(run)
    assert 8 <= done < STEPS and saved_step(run) == done, "nothing is lost"
    by = signal.Signals(number).name if whom != "rank 1" else "a signal to another rank"
    assert f"stopped by {by} after step {done}" in asked.output(0)
    assert "Traceback" not in asked.output()
    said = finish(run, images, processes=processes, workers=workers)
    assert f"{done // 6} epochs and {done % 6} steps done" in said
    assert_same_end(run, whole[processes])


# ---- torchrun ------------------------------------------------------------------------------------


class Torchrun:
    """Two processes of torchrun, which wait in step 8 for `go_on`."""

    def __init__(self, run: Path, images: Path, *flags: object, options: str = "") -> None:
        self.run, self.out = run, run.with_suffix(".txt")
        program = run.with_suffix(".py")
        go = str(run.with_suffix(".go"))
        program.write_text(f"{HOLD.format(step=8, go=go)}\n{MAIN}\n")
        command = ["-m", "torch.distributed.run", "--nproc-per-node", "2"]
        command += [f"--master-port={free_port()}", *options.split(), program]
        command += [*FLAGS, "-j", 2, "--save-dir", run, *flags, images]
        with open(self.out, "w") as out:
            self.process = start_python(*command, cwd=run.parent, stdout=out, stderr=out)

    def wait_for_step(self, step: int) -> None:
        def there() -> bool:
            assert self.process.poll() is None, self.output()
            return logged_steps(self.run) >= step

        until(there, self.output)

    def training(self) -> list[int]:
        """Process ids of the training processes, which are torchrun's children."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return sorted(map(int, children.read_text().split()))

    def wait(self) -> int:
        until(lambda: self.process.poll() is not None, self.output)
        return self.process.returncode

    def output(self) -> str:
        return self.out.read_text()


def test_torchrun_restarts_after_a_rank_is_killed_and_has_saved_when_asked_to_stop(
    images, tmp_path
) -> None:
    """SIGKILL to one of two ranks in mid-training: the other one says who, when and that it does
    not answer; torchrun starts both anew, and --resume auto goes on. SIGTERM to torchrun, which
    hands it on, and ends with a status of its own."""
    run = tmp_path / "run"
    torchrun = Torchrun(run, images, *LONG, "--save-steps", 2, options="--max-restarts 2")
    torchrun.wait_for_step(8)
    os.kill(torchrun.training()[-1], signal.SIGKILL)
    go_on(run)
    until(lambda: "resuming" in torchrun.output(), torchrun.output)
    said = torchrun.output()
    assert re.search(r"resuming .*: \d+ epochs and \d steps done", said)
    error = re.search(r"rank (\d) could not talk to the others in epoch (\d+), step (\d+)", said)
    assert error and int(error[3]) >= 7, said
    assert f"no answer from rank {1 - int(error[1])}" in said

    torchrun.wait_for_step(logged_steps(run) + 2)
    torchrun.process.send_signal(signal.SIGTERM)
    assert torchrun.wait() != 0
    done = logged_steps(run)
    assert saved_step(run) == done
    assert f"stopped by SIGTERM after step {done}" in torchrun.output()
    assert "main_moco.py: error" not in torchrun.output().partition("resuming")[2]


# ---- Ranks that are killed or hang ---------------------------------------------------------------


def test_a_rank_that_hangs_is_named_after_the_time_out(images, tmp_path) -> None:
    """SIGSTOP: the connection stays open, so only the time-out can tell."""
    run, victim = tmp_path / "run", 1
    flags = [*LONG, "--timeout-minutes", 0.2, "--save-steps", 2]
    hanging = start(run, images, *flags, processes=2)
    wait_for_step(run, 8, hanging)
    hanging.send(victim, signal.SIGSTOP)
    until(lambda: hanging.pids[1 - victim] not in hanging.running(), hanging.output)
    said = hanging.output(1 - victim)
    assert f"no answer from rank {victim}" in said and "Traceback" not in said
    assert re.search(rf"rank {1 - victim} could not talk .* in epoch \d+, step \d+", said), said
    hanging.send(victim, signal.SIGKILL)
    hanging.wait()
    assert checkpoint.newest_valid(run, print) is not None


def test_the_barrier_names_the_ranks_that_do_not_come(tmp_path) -> None:
    """Gloo's monitored barrier, with the time-out that was asked for."""
    code = """
import time
from moco import distributed
from moco.config import Launch
from moco.launch import launch
def work(device, args):
    if distributed.rank() == 1:
        time.sleep(3600)
    try:
        distributed.barrier()
    except RuntimeError as error:
        print(error, flush=True)
launch(work, None, Launch(device="cpu", timeout_minutes=0.1))
"""
    waiting = Processes(tmp_path / "out", count=3, code=code)
    until(lambda: waiting.pids[0] not in waiting.running(), waiting.output)
    assert "Ranks 1 failed to pass monitoredBarrier in 6000 ms" in waiting.output(0)


def test_launch_hands_a_request_to_stop_to_the_processes_it_started(tmp_path) -> None:
    """As for several GPUs without torchrun: the signal goes to the process that was started."""
    code = """
import sys, time
from moco.config import Launch, Placement
from moco.launch import launch
from moco.stop import StopRequest
def work(device, args):
    stop = StopRequest()
    print("ready\\n", end="", flush=True)
    while not stop.requested:
        time.sleep(0.05)
    print(f"heard {stop.name}\\n", end="", flush=True)
    sys.exit(75)
two = Placement(devices=("cpu", "cpu"), processes=2, local_processes=2)
launch(work, None, Launch(), two)
"""
    started = Processes(tmp_path / "out", code=code, before=FORKING)
    started.wait_until(lambda: started.output().count("ready\n") == 2)
    started.send(0, signal.SIGUSR1)
    assert started.wait() == [75]
    assert started.output().count("heard SIGUSR1") == 2
