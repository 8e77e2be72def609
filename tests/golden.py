#!/usr/bin/env python
"""Golden runs: prove that a refactoring leaves the arithmetic untouched, bit for bit.

    git worktree add ../old COMMIT
    python tests/golden.py compare ../old .          run both checkouts and compare them
    python tests/golden.py record ../old OUT         or run the old one now, keep its files in OUT
    python tests/golden.py compare OUT .             and compare with them as often as wanted

Each checkout does the same tiny runs on the CPU (RUNS below) through its command lines alone. All
that they leave is compared: every tensor and number in every checkpoint (weights, queue, pointer,
optimizer, random states, means), args.json, lincls.json, and log.jsonl but for times. A run that is
resumed in mid-epoch must end as the one that was never cut off; the new checkout must go on with
the old one's checkpoints to the same end. Both evaluate the old one's encoder.
One line per run gives the user CPU seconds of both, start-up included, and "equal" or what differs
(exit status 1). What only the new files hold is counted, not refused. Digests hold for one machine
and one set of libraries. Both checkouts together take 4 to 5 minutes of one core.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import resource
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import PIL
import torch
import torchvision
from fixtures.write import environment, write_images

LIMIT, SHOWN, RECORD = 600, 3, "golden.json"  # seconds for a run; differences named for each
VARYING = {"time", "seconds", "images_per_s", "data_share", "provenance", "checksum"}

# 2 epochs of 4 steps, saved after steps 3, 4, 6 and 8, logged after every second one.
PRETRAIN = (
    "main_moco.py data -a resnet8 --image-size 32 --batch-size 16 --bn-splits 2 --moco-dim 16 "
    "--moco-k 64 --moco-m 0.99 --mlp --aug-plus --epochs 2 --lr 0.1 --schedule 1 --seed 1 -p 2 "
    "-j 0 --save-steps 3 --keep-last 20 --check-every 2 "
)
ENCODER = "plain"  # the run whose encoder is evaluated
EVALUATE = (
    "main_lincls.py data --pretrained encoder/checkpoint_0001.pth.tar --batch-size 16 --epochs 2 "
    "--lr 1 --schedule 1 --seed 1 -p 2 -j 0 "
)


@dataclass(frozen=True)
class Run:
    command: str
    processes: int = 1
    resumes: str | None = None  # go on in a copy of this run's folder, with its first checkpoint
    ends_as: str | None = None  # the run that must have left the same


RUNS = {
    "plain": Run(PRETRAIN),
    "plain-resumed": Run(PRETRAIN + "--resume auto", resumes="plain", ends_as="plain"),
    "infonce": Run(PRETRAIN + "--moco-t 0.2 --cos --warmup-epochs 1"),
    "symmetric": Run(PRETRAIN + "--symmetric --moco-align-alpha 1 --moco-unif-no-intra-batch -j 1"),
    "accumulate": Run(PRETRAIN + "--accumulate 2"),
    "bf16": Run(PRETRAIN + "--amp bf16"),
    "views-on-device": Run(PRETRAIN + "--views device"),
    "channels-last": Run(PRETRAIN + "--channels-last", ends_as="plain"),  # the default on a CPU
    "no-channels-last": Run(PRETRAIN + "--no-channels-last"),
    "init-from": Run(PRETRAIN + "--init-from encoder/checkpoint_0001.pth.tar --max-steps 5"),
    "two-ranks": Run(PRETRAIN, 2),
    "two-ranks-resumed": Run(PRETRAIN + "--resume auto", 2, "two-ranks", ends_as="two-ranks"),
    "linear": Run(EVALUATE),
    "linear-half": Run(EVALUATE + "--epochs 1"),
    "linear-resumed": Run(EVALUATE + "--resume auto", resumes="linear-half", ends_as="linear"),
    "linear-two-ranks": Run(EVALUATE + "--lr 1,3 --wd 0,1e-4", 2),
    "linear-cached": Run(EVALUATE + "--cached"),
    "linear-folds": Run(EVALUATE + "--lr 1,3 --folds 2"),
    "finetune": Run(EVALUATE + "--finetune --lr 0.1 --lr-backbone 0.01"),
    "knn": Run(EVALUATE + "--epochs 0 --knn"),
}


def play(sides: list[tuple[Path, Path]], encoder: Path, repeats: int) -> list[dict]:
    """Do all runs with each (checkout, folder) in turn; for each of them the versions, and for each
    run its seconds and what it has left. `encoder`: the run folder that is evaluated."""
    results: list[dict] = [{"versions": versions(), "runs": {}} for _ in sides]
    for checkout, folder in sides:
        write_images(folder / "data")
        (folder / "encoder").symlink_to(encoder)
        start_up = [sys.executable, checkout / "main_moco.py", "--help"]  # compiles the modules
        if subprocess.run(start_up, env=environment(), stdout=subprocess.DEVNULL).returncode:
            sys.exit(f"{checkout} does not start")
    for name, run in RUNS.items():
        for _ in range(repeats):
            for (checkout, folder), result in zip(sides, results, strict=True):
                start = folder / run.resumes if run.resumes else None
                about = result["runs"].setdefault(name, {"seconds": []})
                about["seconds"].append(execute(checkout, folder, name, start))
                about["left"] = dict(leavings(folder, name))
        print(f"ran {name}", file=sys.stderr, flush=True)
    return results


def execute(checkout: Path, folder: Path, name: str, start: Path | None) -> float:
    """Run `name` with the code of `checkout` into folder/name; user CPU seconds of all processes.
    `start`: the run folder to go on with, a copy of it."""
    run, target = RUNS[name], folder / name
    shutil.rmtree(target, ignore_errors=True)
    if start is not None and start.exists():  # it does not where that run has failed
        shutil.copytree(start, target)
        for later in (*target.glob("checkpoint_*"), *sorted(target.glob("step_*"))[1:]):
            later.unlink()
    program, *words = f"{run.command} --save-dir {name}".split()
    command = [sys.executable, checkout / program, *words]
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        torchrun = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(listener.getsockname()[1])}
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    processes = []
    with open(folder / f"{name}.out", "w") as out:
        for rank in map(str, range(run.processes)):
            torchrun |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": str(run.processes)}
            env = environment(**(torchrun if run.processes > 1 else {}))
            processes.append(subprocess.Popen(command, cwd=folder, env=env, stdout=out, stderr=out))
        end = time.monotonic() + LIMIT
        try:
            while None in (statuses := [p.poll() for p in processes]):
                if any(statuses) or time.monotonic() > end:
                    break  # the other rank would wait for the one that has failed
                time.sleep(0.01)
        finally:
            for process in processes:
                process.kill()  # nothing where it has ended
                process.wait()
    if any(status != 0 for status in statuses):
        shutil.rmtree(target, ignore_errors=True)
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before


def versions() -> str:
    libraries = " ".join(f"{m.__name__} {m.__version__}" for m in (torch, torchvision, PIL))
    return f"python {sys.version.split()[0]} {libraries} {torch.backends.cpu.get_cpu_capability()}"


def leavings(folder: Path, name: str) -> Iterator[tuple[str, str]]:
    """Name and value of everything that a run has left; of a tensor a digest."""
    target = folder / name
    if not target.exists():
        yield "failed", (folder / f"{name}.out").read_text().strip().rpartition("\n")[2]
        return
    for path in sorted(target.glob("*.pth.tar")):
        yield from flat(path.name, torch.load(path, map_location="cpu", weights_only=True))
    for path in target.glob("*.json"):
        yield from flat(path.name, json.loads(path.read_text()))
    seen: Counter[str] = Counter()
    for text in (target / "log.jsonl").read_text().splitlines():
        line = json.loads(text)
        where = f"log.jsonl/{line['kind']} {line['step']}"
        seen[where] += 1
        yield from flat(f"{where} ({seen[where]})", line)


def flat(where: str, value: object) -> Iterator[tuple[str, str]]:
    if isinstance(value, (list, tuple)):
        value = dict(enumerate(value))
    if isinstance(value, dict):
        for key in (key for key in value if key not in VARYING):
            yield from flat(f"{where}/{key}", value[key])
    elif isinstance(value, torch.Tensor):
        data = value.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        yield where, f"{value.dtype} {[*value.shape]} {hashlib.sha256(data).hexdigest()[:16]}"
    else:
        yield where, repr(value)


def verdict(old: dict[str, str], new: dict[str, str], with_args: bool = True) -> str:
    """What differs, by name, or "equal"."""
    if "failed" in new:
        return f"FAILED: {new['failed']}"
    if not with_args:
        old, new = ({k: v for k, v in left.items() if "args" not in k} for left in (old, new))
    names = [name for name in old if new.get(name) != old[name]]
    if not names:
        return f"equal ({len(old)} values, {len(new.keys() - old.keys())} new)"
    kinds = Counter(name.split("/")[".tar/" in name] for name in names)
    names.sort(key=lambda name: "log.jsonl" not in name)  # numbers that can be read come first
    shown = [f"{name}: {old[name]} -> {new.get(name, 'missing')}" for name in names[:SHOWN]]
    title = f"DIFFERENT in {len(names)} of {len(old)}: {dict(kinds)}, such as"
    return "\n    ".join([title, *shown])


def compare(old: Path, new: Path, repeats: int) -> Iterator[tuple[str, str, str]]:
    """Name, seconds of both and verdict of each comparison."""
    with tempfile.TemporaryDirectory(prefix="golden-") as temporary:
        folder, base = Path(temporary) / "new", Path(temporary) / "old"
        if (old / RECORD).is_file():
            base, known = old, json.loads((old / RECORD).read_text())
            if known["versions"] != versions():
                sys.exit(f"{old} was recorded with {known['versions']}, this is {versions()}")
            (now,) = play([(new, folder)], base / ENCODER, repeats)
        else:
            known, now = play([(old, base), (new, folder)], base / ENCODER, repeats)
        for name, run in RUNS.items():
            before, after = known["runs"][name], now["runs"][name]
            spent = [f"{statistics.median(about['seconds']):7.1f}" for about in (before, after)]
            yield name, "".join(spent), verdict(before["left"], after["left"])
            if run.ends_as:
                whole = now["runs"][run.ends_as]["left"]
                yield f"{name} ends as {run.ends_as}", "", verdict(whole, after["left"], False)
            if run.resumes:
                execute(new, folder, name, base / run.resumes)
                left = dict(leavings(folder, name))
                yield f"new resumes old's {run.resumes}", "", verdict(before["left"], left)


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("verb", choices=("record", "compare"))
    parser.add_argument("old", type=Path, help="checkout; for compare also what record has made")
    parser.add_argument("new", type=Path, help="checkout; for record the folder to make")
    parser.add_argument("--repeats", type=int, default=1, help="CPU seconds are the median of N")
    args = parser.parse_args()
    old, new = args.old.resolve(), args.new.resolve()
    if args.verb == "record":
        if new.exists():
            parser.error(f"{new} exists; choose another OUT")
        (result,) = play([(old, new)], Path(ENCODER), args.repeats)
        (new / RECORD).write_text(json.dumps(result, indent=1))
        return
    print(f"{'user CPU seconds':<38}{'old':>7}{'new':>7}")
    different = []
    for name, seconds, found in compare(old, new, args.repeats):
        print(f"{name:<38}{seconds:14}  {found}", flush=True)
        if not found.startswith("equal"):
            different.append(name)
    if different:
        sys.exit(f"different: {', '.join(different)}")


if __name__ == "__main__":
    main()
