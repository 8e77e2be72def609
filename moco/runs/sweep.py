"""Sweeps: many recipes with several seeds, run at a time on local devices or as SLURM arrays."""

from __future__ import annotations

import concurrent.futures
import itertools
import os
import queue
import re
import shlex
import subprocess
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from moco.runs import recipes
from moco.runs.command import Children
from moco.stop import EXIT_PREEMPTED

SWEEP = "sweep.json"


@dataclass(frozen=True)
class SweepRun:
    """One run of a sweep: a command of run_recipe.py with a folder of its own."""

    name: str
    folder: Path
    command: list[str]
    after: SweepRun | None  # the run from whose encoder it starts

    @property
    def level(self) -> int:
        """How many runs must be done before it, one after another."""
        return 0 if self.after is None else self.after.level + 1

    @property
    def evaluated(self) -> bool:
        return any(self.folder.glob("*/lincls.json")) or any(self.folder.glob("*/depth.json"))

    @property
    def done(self) -> bool:
        """The last of its files is there."""
        return (self.folder / "align_uniform.json").is_file()


def read_spec(path: Path) -> dict:
    """The settings of a sweep: a TOML file with `title`, `recipe` and `run` or `grid`.

    Raises:
        OSError: it cannot be read.
        ValueError: not TOML, or with other keys.
    """
    try:
        spec = tomllib.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no TOML file: {error}") from None
    unknown = set(spec) - {"title", "recipe", "run", "grid"}
    runs, grid = spec.get("run", []), spec.get("grid", {})
    if ("run" in spec) == ("grid" in spec) or not (runs or grid) or not isinstance(grid, dict):
        raise ValueError(f"{path} must have either a list `run` or a table `grid`")
    if not isinstance(runs, list) or not all(isinstance(run, dict) for run in runs):
        raise ValueError(f"{path}: `run` must be a list of tables, got {runs!r}")
    known = {"name", "recipe", "pretrain", "lincls", "after"}
    unknown |= {key for run in runs for key in run} - known
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


def plan(
    path: Path,
    tables: recipes.Tables,
    script: Path,
    data: str,
    out: Path,
    *,
    scale: str = "full",
    seeds: Sequence[int] = (0,),
    pretrain: str = "",
    lincls: str = "",
) -> list[SweepRun]:
    """Every run of the sweep in the file `path`, for each seed.

    Args:
        script: run_recipe.py.
        data: the data folder, which is not looked at.
        out: the folder of the sweep; each run has OUT/NAME-sSEED.
        pretrain, lincls: more flags for the two mains, for all runs.

    Raises:
        OSError: `path` cannot be read.
        ValueError: it is no sweep, or it has a run without a recipe or with one that does not
            exist, two runs of one name, or a run after one that does not exist.
    """
    spec = read_spec(path)
    runs: dict[str, SweepRun] = {}
    for seed, run in itertools.product(dict.fromkeys(seeds), settings(spec)):
        recipe = run.get("recipe", spec.get("recipe"))
        if recipe is None:
            raise ValueError(f"{path}: run {run} names no recipe, and neither does the sweep")
        try:
            tables.find(recipe)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        name = f"{run.get('name', recipe.replace(':', '-'))}-s{seed}"
        if not re.fullmatch(r"[\w.-]+", name) or name in runs:
            what = "stands there twice" if name in runs else "is no name of a folder"
            raise ValueError(f"{path}: {name} {what}; give each run a name of its own")
        after = f"{run['after']}-s{seed}" if "after" in run else None
        if after is not None and after not in runs:
            raise ValueError(f"{path}: {name} is after {run['after']}, no run before it")
        command = [str(script), recipe, data, "--run", "--scale", scale, "--seed", str(seed)]
        command += ["--out", str(out / name)]
        for program, flags in (("pretrain", pretrain), ("lincls", lincls)):
            command.append(f"--{program}=" + f"{run.get(program, '')} {flags}".strip())
        runs[name] = SweepRun(name, out / name, command, runs.get(after))
    return list(runs.values())


def claim_folder(out: Path, facts: dict) -> None:
    """One folder holds one sweep.

    Raises:
        ValueError: it holds another one, or something else.
    """
    if out.exists() and not (out / SWEEP).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and holds no sweep; choose another --out")
    recipes.claim(out / SWEEP, facts, "another sweep")


def run_one(run: SweepRun, environment: dict[str, str], children: Children) -> int:
    """Run one to its end; its exit status. Its output goes to log.txt in its folder."""
    command = list(run.command)
    if run.after is not None:
        encoders = sorted(run.after.folder.glob("pretrain/checkpoint_*.pth.tar"))
        if not encoders:
            print(f"{run.name}: no encoder in {run.after.folder} to start from", flush=True)
            return 1
        flag = next(i for i, word in enumerate(command) if word.startswith("--pretrain="))
        command[flag] += f" --init-from {shlex.quote(str(encoders[-1]))}"
    run.folder.mkdir(parents=True, exist_ok=True)
    with open(run.folder / "log.txt", "a", encoding="utf-8") as log:
        options = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
        return children.run(command, env={**os.environ, **environment}, **options)


def run_all(
    runs: Sequence[SweepRun], shares: Sequence[dict[str, str]], children: Children
) -> list[str]:
    """Run what is not done, as many at a time as there are shares of the devices (environment
    variables, see `device_shares`); returns the names of those that failed."""
    free: queue.SimpleQueue[dict[str, str]] = queue.SimpleQueue()
    for share in shares:
        free.put(share)

    def finish(run: SweepRun) -> bool:
        share = free.get()
        print(f"start {run.name}", flush=True)
        try:
            status = run_one(run, share, children)
        except OSError as error:  # a full disk is no reason to leave the others out
            print(f"{run.name}: {error}", flush=True)
            status = 1
        finally:
            free.put(share)
        print(f"{'done' if status == 0 else f'status {status}'} {run.name}", flush=True)
        return status == 0

    failed = []
    for _, due in _levels(runs):
        with concurrent.futures.ThreadPoolExecutor(len(shares)) as pool:
            done = list(pool.map(finish, due))
        failed += [run.name for run, well in zip(due, done, strict=True) if not well]
    return failed


def _levels(runs: Sequence[SweepRun]) -> Iterator[tuple[list[int], list[SweepRun]]]:
    """Numbers and runs that are not done, those first that others come after."""
    for level in range(1 + max(run.level for run in runs)):
        due = [(i, run) for i, run in enumerate(runs) if run.level == level and not run.done]
        yield [i for i, _ in due], [run for _, run in due]


def device_shares(jobs: int, gpus: int) -> list[dict[str, str]]:
    """What each of the jobs that run at a time may use, as environment variables.

    Args:
        gpus: how many this machine has; with 0 the jobs share its cores.
    """
    if not gpus:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        threads = os.environ.get("OMP_NUM_THREADS", str(max(1, cores // jobs)))
        return [{"OMP_NUM_THREADS": threads}] * jobs
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus)))).split(",")
    if jobs > gpus:
        return [{"CUDA_VISIBLE_DEVICES": visible[job % gpus]} for job in range(jobs)]
    return [{"CUDA_VISIBLE_DEVICES": ",".join(visible[job:gpus:jobs])} for job in range(jobs)]


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


def submit(runs: Sequence[SweepRun], out: Path, command: Sequence[str], flags: str) -> str:
    """Submit an array for each level, each after the one before it, and a job for the report.

    Args:
        command: this very sweep, which passes over what is done.
        flags: of sbatch.

    Returns:
        The number of the last job.

    Raises:
        ValueError: there is no sbatch, or it refuses.
    """
    script = out / "array.sbatch"
    text = ARRAY.format(command=shlex.join(command), stopped=EXIT_PREEMPTED)
    script.write_text(text, encoding="utf-8", errors="surrogateescape")  # names are bytes
    before: list[str] = []
    for numbers, _ in _levels(runs):
        if numbers:
            array = f"--array={','.join(map(str, numbers))}"
            before = [f"--dependency=afterany:{sbatch(flags, array, *before, str(script))}"]
    return sbatch(flags, *before, f"--wrap={shlex.join(command)}")


def sbatch(flags: str, *words: str) -> str:
    """Submit, and return the number of the job."""
    try:
        done = subprocess.run(
            ["sbatch", "--parsable", *shlex.split(flags), *words], capture_output=True, text=True
        )
    except FileNotFoundError:
        raise ValueError("there is no sbatch here; leave --slurm out to run locally") from None
    if done.returncode:
        raise ValueError(f"sbatch refused: {done.stderr.strip()}")
    return done.stdout.strip().split(";")[0]
