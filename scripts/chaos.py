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
between two saves. The trials are those of tests/harness.py.
"""

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import harness


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
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    print(f"{harness.STEPS} steps in each run, a save every {args.save_steps}; folder {folder}")
    started, trials = time.monotonic(), []
    options = {name: getattr(args, name) for name in ("kills", "seed", "processes", "workers")}
    for trial in harness.trials(folder, args.trials, "--save-steps", args.save_steps, **options):
        print(trial, flush=True)
        trials.append(trial)
    lost = [steps for trial in trials for steps in trial.lost]
    late = sum(trial.late for trial in trials)
    mismatches = sum(bool(trial.different) for trial in trials)
    print(
        f"\n{args.trials} trials, {len(lost)} kills ({late} came too late), "
        f"{args.processes} process(es), {args.workers} worker(s): {mismatches} mismatches; "
        f"steps lost per kill: mean {statistics.fmean(lost or [0]):.2f}, max {max(lost or [0])}; "
        f"{(time.monotonic() - started) / 60:.1f} minutes"
    )
    if mismatches:
        sys.exit(1)
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
