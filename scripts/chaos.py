#!/usr/bin/env python
"""Kill training runs at random steps, resume them, and compare with the run that nobody touched.

    python scripts/chaos.py                             50 trials, one process, two loader workers
    python scripts/chaos.py --trials 20 --processes 2   gloo, two processes
    python scripts/chaos.py --workers 0 --kills 3       three kills in each trial

Each trial trains a tiny network on the CPU, SIGKILLs the whole process group (training processes
and loader workers) somewhere within a random step, resumes it by `--resume auto`, lets it finish,
and compares with an uninterrupted run bit for bit: weights, queue, pointer, optimizer, generators,
and every logged number but times. Exit status 1 when anything differs.

Steps lost are steps that had been logged as done and had to be done again: at most what lies
between two saves. A run is a process of its own, forked after the imports; its code path is that of
`python main_moco.py`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import runpy
import shutil
import signal
import socket
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from moco import checkpoint  # noqa: E402

IMAGES, BATCH, EPOCHS = 96, 16, 3
STEPS = IMAGES // BATCH * EPOCHS
FLAGS = (
    f"-a resnet8 --image-size 16 --batch-size {BATCH} --moco-k 64 --bn-splits 2 --mlp --cos "
    f"--aug-plus --epochs {EPOCHS} --lr 0.1 --seed 1 -p 1 --check-every 5 --resume auto"
).split()
# What may differ between two lines of a log.
TIMES = ("time", "images_per_s", "data_share", "seconds")
LIMIT = 120  # seconds for one run


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=50)
    parser.add_argument("--processes", type=int, default=1, choices=(1, 2))
    parser.add_argument("--workers", type=int, default=2, help="loader workers of each process")
    parser.add_argument("--kills", type=int, default=1, help="kills in each trial")
    parser.add_argument("--save-steps", type=int, default=3, help="steps between saves")
    parser.add_argument("--seed", type=int, default=0, help="of the kill points")
    args = parser.parse_args()
    torch.set_num_threads(1)  # also of the runs, which are forked from here
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    write_images(folder / "data")
    print(f"{STEPS} steps in each run, a save every {args.save_steps} steps; folder {folder}")

    reference = folder / "reference"
    status = Training(reference, args).wait()
    if status != 0:
        sys.exit(f"the run without a kill ended with status {status}: {output(reference)}")
    expected = final_state(reference)
    print(f"reference: {len(expected['log'])} logged lines", flush=True)

    draw = random.Random(args.seed)
    mismatches, lost, late, started = 0, [], 0, time.monotonic()
    for trial in range(1, args.trials + 1):
        run = folder / f"trial_{trial:03d}"
        losses, said = [], []
        for _ in range(args.kills):
            done = logged_steps(run)
            if STEPS - done < 3:
                break
            training = Training(run, args)
            if training.kill_after(draw.randint(done + 1, STEPS - 2), draw.random()):
                at = logged_steps(run)
                said.append(f"killed after step {at}")
                losses.append(at)
            else:
                late += 1
            if losses:
                # What is lost shows when the next run tells where it goes on.
                losses[-1] = (losses[-1], saved_step(run))
        status = Training(run, args).wait()
        steps = [at - saved for at, saved in losses]
        lost += steps
        found = final_state(run) if status == 0 else {}
        different = [f"exit status {status}"] if status else differences(expected, found)
        mismatches += bool(different)
        verdict = f"DIFFERENT ({'; '.join(different[:3])}), see {run}" if different else "equal"
        print(
            f"trial {trial:3d}: {', '.join(said) or 'not killed'}, "
            f"lost {'+'.join(map(str, steps)) or 0} steps: {verdict}",
            flush=True,
        )
        if not different:
            shutil.rmtree(run)
    minutes = (time.monotonic() - started) / 60
    print(
        f"\n{args.trials} trials, {len(lost)} kills ({late} came too late), "
        f"{args.processes} process(es), {args.workers} worker(s): {mismatches} mismatches; "
        f"steps lost per kill: mean {statistics.fmean(lost or [0]):.2f}, max {max(lost or [0])}; "
        f"{minutes:.1f} minutes"
    )
    if mismatches:
        sys.exit(1)
    shutil.rmtree(folder)


# ------------------------------------------------------------------------------------------------
# Runs
# ------------------------------------------------------------------------------------------------


def write_images(folder: Path) -> None:
    draw = np.random.default_rng(0)
    for index in range(IMAGES):
        path = folder / "train" / f"class_{index % 2}" / f"{index:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (24, 24, 3), dtype=np.uint8)).save(path)


class Training:
    """One run of main_moco.py in a process group of its own, all ranks of it."""

    def __init__(self, run: Path, args: argparse.Namespace) -> None:
        self.run = run
        argv = [*FLAGS, "-j", str(args.workers * args.processes)]
        argv += ["--save-steps", str(args.save_steps), "--save-dir", str(run)]
        argv += [str(run.parent / "data")]
        port = str(free_port())
        fork = multiprocessing.get_context("fork")
        self.ranks, self.group = [], 0
        sys.stdout.flush()
        for rank in range(args.processes):
            environment = {}
            if args.processes > 1:  # as torchrun does
                environment = {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_PORT": port,
                               "MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "2"}  # fmt: skip
            process = fork.Process(target=train, args=(argv, environment, run, self.group))
            process.start()
            self.group = self.group or process.pid
            self.ranks.append(process)

    def wait(self) -> int:
        """Exit status of the first rank that failed, or 0."""
        deadline = time.monotonic() + LIMIT
        for process in self.ranks:
            process.join(max(0.0, deadline - time.monotonic()))
        if any(process.is_alive() for process in self.ranks):
            self.kill()
            return -signal.SIGALRM
        return next((process.exitcode for process in self.ranks if process.exitcode), 0)

    def kill_after(self, step: int, share: float) -> bool:
        """SIGKILL everything once `step` has been logged and `share` of another step's time has
        gone by. False when the run was over before."""
        deadline, before, seen = time.monotonic() + LIMIT, time.monotonic(), 0
        pace = 0.02
        while all(process.is_alive() for process in self.ranks) and time.monotonic() < deadline:
            now = logged_steps(self.run)
            if now > seen:
                pace = 0.5 * pace + 0.5 * min(0.2, time.monotonic() - before)
                before, seen = time.monotonic(), now
            if now >= step:
                time.sleep(share * pace)
                break
            time.sleep(0.001)
        alive = all(process.is_alive() for process in self.ranks)
        self.kill()
        return alive

    def kill(self) -> None:
        try:
            os.killpg(self.group, signal.SIGKILL)
        except ProcessLookupError:
            pass
        for process in self.ranks:
            process.join()


def train(argv: list[str], environment: dict[str, str], run: Path, group: int) -> None:
    os.setpgid(0, group)
    os.environ.update(environment)
    out = os.open(f"{run}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.argv = [str(ROOT / "main_moco.py"), *argv]
    runpy.run_path(sys.argv[0], run_name="__main__")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


# ------------------------------------------------------------------------------------------------
# What is left of them
# ------------------------------------------------------------------------------------------------


def output(run: Path) -> str:
    return Path(f"{run}.txt").read_text(encoding="utf-8")[-2000:]


def log_lines(run: Path) -> list[dict]:
    path = run / "log.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]  # the last may be cut off


def logged_steps(run: Path) -> int:
    """The last step that the log calls done."""
    return max((line["step"] for line in log_lines(run)), default=0)


def saved_step(run: Path) -> int:
    """The step of the newest whole checkpoint."""
    found = checkpoint.newest_valid(run, lambda _: None)
    return found[1]["step"] if found else 0


def final_state(run: Path) -> dict:
    _, content = checkpoint.newest_valid(run, lambda _: None)
    del content["args"]  # holds the folder's name
    log = [
        {name: value for name, value in line.items() if name not in TIMES}
        for line in log_lines(run)
    ]
    return {"checkpoint": content, "log": log}


def differences(a: object, b: object, name: str = "") -> list[str]:
    """Names of everything in nested dicts and lists that is not equal bit for bit."""
    if type(a) is not type(b):
        return [f"{name}: {type(a).__name__}, {type(b).__name__}"]
    if isinstance(a, Tensor):
        same = a.dtype == b.dtype and a.shape == b.shape
        same = same and a.numpy().tobytes() == b.numpy().tobytes()
        return [] if same else [name]
    if isinstance(a, dict):
        if list(a) != list(b):
            return [f"{name}: keys {sorted(set(a) ^ set(b), key=str)}"]
        return [found for key in a for found in differences(a[key], b[key], f"{name}.{key}")]
    if isinstance(a, (list, tuple)):
        if len(a) != len(b):
            return [f"{name}: {len(a)} entries, {len(b)}"]
        return [
            found
            for i, (x, y) in enumerate(zip(a, b, strict=True))
            for found in differences(x, y, f"{name}[{i}]")
        ]
    return [] if a == b else [f"{name}: {a!r}, {b!r}"]


if __name__ == "__main__":
    main()
