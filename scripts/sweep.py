#!/usr/bin/env python
"""Run a sweep: many recipes, several seeds, over local GPUs or as SLURM arrays; then compare.

    python scripts/sweep.py scripts/sweeps/figure7.toml DIR --out results/figure7 --seeds 0 1 2
    python scripts/sweep.py SPEC DIR --out FOLDER --scale cifar10 --jobs 8
    python scripts/sweep.py SPEC DIR --out FOLDER --slurm "--gpus=1 --time=24:00:00"

Each run is `scripts/run_recipe.py --run` in FOLDER/NAME-sSEED, with its output in log.txt there.
Runs that are done are passed over and those that were cut off go on, so the same command is
repeated until all are done; it ends in FOLDER/report.html.

SPEC is a TOML file: `title`; `recipe`, the protocol of all runs (see run_recipe.py --list); `run`,
a list of runs with any of `name`, `recipe`, `pretrain` and `lincls` (more flags for the two mains)
and `after` (start from the encoder of that run); or `[grid]`, a list of values for each flag of
main_moco.py, of which every combination is run (true and false for flags without a value).
scripts/sweeps/ has one for each of the paper's figures.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import itertools
import os
import queue
import re
import shlex
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from scripts import run_recipe  # noqa: E402

SWEEP = "sweep.json"
STOPPED = 75  # exit status of a run that was asked to stop and has saved


def build_parser() -> argparse.ArgumentParser:
    # fmt: off
    parser = argparse.ArgumentParser(description="run a sweep and compare its runs")
    parser.add_argument("spec", type=Path, metavar="SPEC", help="TOML file")
    parser.add_argument("data", metavar="DIR", help="folder with train/ and val/")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="%(default)s")
    parser.add_argument("--scale", choices=("full", *run_recipe.SCALES), default="full",
                        help="as of run_recipe.py (%(default)s)")
    parser.add_argument("--jobs", type=int, default=1, metavar="N",
                        help="runs at a time, each with its share of the GPUs (%(default)s)")
    parser.add_argument("--pretrain", default="", metavar="FLAGS", help="more flags for all runs")
    parser.add_argument("--lincls", default="", metavar="FLAGS", help="more flags for all runs")
    parser.add_argument("--slurm", metavar="FLAGS",
                        help="submit job arrays with these flags of sbatch")
    parser.add_argument("--dry-run", action="store_true", help="print the runs, start nothing")
    parser.add_argument("--only", type=int, metavar="I", help=argparse.SUPPRESS)  # of an array
    # fmt: on
    return parser


def main() -> None:
    parser = build_parser()
    args = parser.parse_args()
    if args.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {args.jobs}")
    try:
        spec = read_spec(args.spec)
        runs = plan(spec, args)
        if args.dry_run:
            for run in runs:
                if run["after"]:
                    print(f"# with --init-from the last checkpoint in {run['after'] / 'pretrain'}:")
                print(shlex.join(["python", *run["command"]]))
            return
        if args.slurm is None and not Path(args.data).is_dir():
            raise ValueError(f"no such data folder: {args.data}")
        claim_folder(args.out, {"spec": spec, "data": args.data, "scale": args.scale,
                                "pretrain": args.pretrain, "lincls": args.lincls})  # fmt: skip
    except (ValueError, OSError) as error:
        parser.error(str(error))
    if args.slurm is not None:
        submit(runs, args)
        return
    children = Children()
    if args.only is not None:
        sys.exit(children.run(runs[args.only], {}))
    failed = run_all(runs, args.jobs, children)
    for name in failed:
        print(f"not done: {name}, see {args.out / name / 'log.txt'}")
    if children.stopped:
        sys.exit(STOPPED)
    report = args.out / "report.html"
    done = [str(run["folder"]) for run in runs if (run["folder"] / "lincls/lincls.json").is_file()]
    if done:
        command = [
            sys.executable,
            str(ROOT / "scripts/compare_runs.py"),
            *done,
            "--out",
            str(report),
        ]
        failed += ["report"] if subprocess.run(command).returncode else []
    print(f"{len(done)} of {len(runs)} runs done; {report if done else 'no report'}")
    sys.exit(1 if failed else 0)


# ------------------------------------------------------------------------------------------------
# What to run
# ------------------------------------------------------------------------------------------------


def read_spec(path: Path) -> dict:
    """The settings of a sweep.

    Raises:
        ValueError: not TOML, or with other keys than the ones above.
    """
    try:
        spec = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} is no TOML file: {error}") from None
    unknown = set(spec) - {"title", "recipe", "run", "grid"}
    runs, grid = spec.get("run", []), spec.get("grid", {})
    if ("run" in spec) == ("grid" in spec) or not (runs or grid) or not isinstance(grid, dict):
        raise ValueError(f"{path} must have either a list `run` or a table `grid`")
    if not isinstance(runs, list) or not all(isinstance(run, dict) for run in runs):
        raise ValueError(f"{path}: `run` must be a list of tables, got {runs!r}")
    unknown |= {key for run in runs for key in run} - {
        "name", "recipe", "pretrain", "lincls", "after"
    }  # fmt: skip
    if unknown:
        raise ValueError(f"{path} has unknown keys: {', '.join(sorted(unknown))}")
    for key, value in ((key, value) for table in (spec, *runs) for key, value in table.items()):
        if key not in ("run", "grid") and not isinstance(value, str):
            raise ValueError(f"{path}: {key} must be a text, got {value!r}")
    for flag, values in grid.items():
        if not isinstance(values, list) or not values:
            raise ValueError(f"{path}: grid.{flag} must be a list of values, got {values!r}")
    return spec


def settings(spec: dict) -> list[dict]:
    """One table for each run of the sweep, the seed aside."""
    if "run" in spec:
        return spec["run"]
    combined = []
    for values in itertools.product(*spec["grid"].values()):
        words, parts = [], []
        for flag, value in zip(spec["grid"], values, strict=True):
            if value is not False:
                words += [f"--{flag}"] + ([] if value is True else [f"{value}"])
                parts.append(flag.removeprefix("moco-") + ("" if value is True else f"-{value}"))
        combined.append({"name": "_".join(parts) or "plain", "pretrain": shlex.join(words)})
    return combined


def plan(spec: dict, args: argparse.Namespace) -> list[dict]:
    """Each run of each seed: name, folder, command, after (the folder of the run whose encoder it
    starts from, or None) and level (how many runs must be done before it, one after another).

    Raises:
        ValueError: a run without a recipe or with one that does not exist, two of one name, or
            `after` a run that does not exist.
    """
    tables = run_recipe.read_tables()
    runs: list[dict] = []
    index: dict[str, int] = {}
    for seed, run in itertools.product(dict.fromkeys(args.seeds), settings(spec)):
        recipe = run.get("recipe", spec.get("recipe"))
        if recipe is None:
            raise ValueError(f"{args.spec}: run {run} names no recipe, and neither does the sweep")
        try:
            run_recipe.find(tables, recipe)
        except KeyError as error:
            raise ValueError(f"{args.spec}: {error.args[0]}") from None
        name = f"{run.get('name', recipe.replace(':', '-'))}-s{seed}"
        if not re.fullmatch(r"[\w.-]+", name) or name in index:
            what = "stands there twice" if name in index else "is no name of a folder"
            raise ValueError(f"{args.spec}: {name} {what}; give each run a name of its own")
        pretrain = f"{run.get('pretrain', '')} {args.pretrain}".strip()
        lincls = f"{run.get('lincls', '')} {args.lincls}".strip()
        before = None
        if "after" in run:
            if f"{run['after']}-s{seed}" not in index:
                raise ValueError(f"{args.spec}: {name} is after {run['after']}, no run before it")
            before = runs[index[f"{run['after']}-s{seed}"]]
        index[name] = len(runs)
        folder = args.out / name
        command = [str(ROOT / "scripts/run_recipe.py"), recipe, args.data, "--run", "--scale",
                   args.scale, "--seed", str(seed), "--out", str(folder),
                   f"--pretrain={pretrain}", f"--lincls={lincls}"]  # fmt: skip
        level = 0 if before is None else before["level"] + 1
        runs.append({"name": name, "folder": folder, "command": command, "level": level,
                     "after": before and before["folder"]})  # fmt: skip
    return runs


def claim_folder(out: Path, facts: dict) -> None:
    """One folder holds one sweep.

    Raises:
        ValueError: it holds another one, or something else.
    """
    if out.exists() and not (out / SWEEP).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and holds no sweep; choose another --out")
    run_recipe.claim(out / SWEEP, facts)


# ------------------------------------------------------------------------------------------------
# Running
# ------------------------------------------------------------------------------------------------


class Children:
    """The running runs. A request to stop is handed on to them: they save, and go on next time."""

    def __init__(self) -> None:
        self.processes: list[subprocess.Popen] = []
        self.stopped = False
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._stop)

    def _stop(self, *_) -> None:
        self.stopped = True
        for process in self.processes:
            if process.poll() is None:
                process.terminate()

    def run(self, run: dict, environment: dict[str, str]) -> int:
        """Start one run, wait for it and return its exit status."""
        if self.stopped:
            return STOPPED
        command = [sys.executable, *run["command"]]
        if run["after"] is not None:
            encoders = sorted(run["after"].glob("pretrain/checkpoint_*.pth.tar"))
            if not encoders:
                print(f"{run['name']}: no encoder in {run['after']} to start from", flush=True)
                return 1
            flag = next(i for i, word in enumerate(command) if word.startswith("--pretrain="))
            command[flag] += f" --init-from {shlex.quote(str(encoders[-1]))}"
        run["folder"].mkdir(parents=True, exist_ok=True)
        with open(run["folder"] / "log.txt", "a", encoding="utf-8") as log:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                env={**os.environ, **environment}, start_new_session=True,
            )  # fmt: skip
            self.processes.append(process)
            return process.wait()


def run_all(runs: list[dict], jobs: int, children: Children) -> list[str]:
    """Run what is not done, `jobs` at a time; returns the names of those that failed."""
    shares: queue.SimpleQueue[dict[str, str]] = queue.SimpleQueue()
    for share in device_shares(jobs):
        shares.put(share)

    def one(run: dict) -> bool:
        share = shares.get()
        print(f"start {run['name']}", flush=True)
        status = children.run(run, share)
        shares.put(share)
        print(f"{'done' if status == 0 else f'status {status}'} {run['name']}", flush=True)
        return status == 0

    failed = []
    for level in range(1 + max(run["level"] for run in runs)):
        due = [run for run in runs if run["level"] == level and not is_done(run)]
        with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
            done = list(pool.map(one, due))
        failed += [run["name"] for run, well in zip(due, done, strict=True) if not well]
    return failed


def is_done(run: dict) -> bool:
    """The last of a run's files is there."""
    return (run["folder"] / "align_uniform.json").is_file()


def device_shares(jobs: int) -> list[dict[str, str]]:
    """What each of the jobs that run at a time may use, as environment variables."""
    import torch  # takes seconds, which `--dry-run` need not wait for

    count = torch.cuda.device_count()
    if not count:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        threads = os.environ.get("OMP_NUM_THREADS", str(max(1, cores // jobs)))
        return [{"OMP_NUM_THREADS": threads}] * jobs
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count)))).split(",")
    if jobs > count:
        return [{"CUDA_VISIBLE_DEVICES": visible[job % count]} for job in range(jobs)]
    return [{"CUDA_VISIBLE_DEVICES": ",".join(visible[job:count:jobs])} for job in range(jobs)]


ARRAY = """#!/usr/bin/env bash
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=USR1@180
# A task that is asked to stop saves, ends with status {stopped} and is put back into the queue.
trap : TERM USR1
status=0
srun {command} --only "$SLURM_ARRAY_TASK_ID" || status=$?
if [ "$status" -eq {stopped} ]; then
    scontrol requeue "${{SLURM_ARRAY_JOB_ID}}_${{SLURM_ARRAY_TASK_ID}}"
fi
exit "$status"
"""


def submit(runs: list[dict], args: argparse.Namespace) -> None:
    """Submit an array for each level, each after the one before it, and a job for the report: this
    very command, which passes over what is done."""
    words = [sys.executable, str(Path(__file__).resolve()), str(args.spec.resolve()), args.data,
             "--out", str(args.out), "--scale", args.scale, f"--pretrain={args.pretrain}",
             f"--lincls={args.lincls}", "--seeds", *map(str, args.seeds)]  # fmt: skip
    script = args.out / "array.sbatch"
    script.write_text(ARRAY.format(command=shlex.join(words), stopped=STOPPED), encoding="utf-8")
    before: list[str] = []
    for level in range(1 + max(run["level"] for run in runs)):
        due = [i for i, run in enumerate(runs) if run["level"] == level and not is_done(run)]
        if due:
            array = f"--array={','.join(map(str, due))}"
            before = [f"--dependency=afterany:{sbatch(args.slurm, array, *before, str(script))}"]
    job = sbatch(args.slurm, *before, f"--wrap={shlex.join(words)}")
    print(f"submitted {script} and, for {args.out / 'report.html'}, job {job}")


def sbatch(flags: str, *words: str) -> str:
    """Submit, and return the number of the job."""
    try:
        done = subprocess.run(
            ["sbatch", "--parsable", *shlex.split(flags), *words], capture_output=True, text=True
        )
    except FileNotFoundError:
        sys.exit("sweep.py: error: there is no sbatch here; leave --slurm out to run locally")
    if done.returncode:
        sys.exit(f"sweep.py: error: sbatch refused: {done.stderr.strip()}")
    return done.stdout.strip().split(";")[0]


if __name__ == "__main__":
    main()
