"""Run folders as main_moco.py, main_lincls.py and measure_align_uniform.py leave them, without
training: files with numbers that a test chooses."""

from __future__ import annotations

import json
from pathlib import Path

from helpers import ROOT

from moco.runs import report
from moco.runs.compare import Comparison
from moco.runs.folder import read_runs

ALIGN = "3 * align(alpha=2) + 1 * uniform(t=3, with intra-batch pairs)"
NCE = "1 * InfoNCE(tau=0.2)"


def make_run(
    folder: Path, objective: str = ALIGN, seed: int = 0, *, steps: int = 20, **args
) -> Path:
    """A run folder of 5 epochs of 4 steps of 8 images, as main_moco.py leaves it."""
    folder.mkdir(parents=True)
    args = {
        "objective": objective, "seed": seed, "epochs": 5, "batch_size": 8, "images": 35,
        "processes": 1, "arch": "resnet8", "lr": 0.03, "max_steps": None, "schedule": [120, 160],
        "save_dir": str(folder), "print_freq": 2,
        "provenance": {"git": "abc", "torch": "2.15"}, **args,
    }  # fmt: skip
    (folder / "args.json").write_text(json.dumps(args))
    lines = []
    for step in range(2, steps + 1, 2):
        facts = {"epoch": (step - 1) // 4, "loss": 1 / step + seed, "lr": 0.03}
        rates = {"images_per_s": 16.0, "data_share": 0.1}  # 2 steps of 8 images take 1 s
        lines.append({"kind": "train", "step": step, "time": 1e9 + 100 * step, **facts, **rates})
        lines.append({"kind": "features", "step": step, "time": 0, "std": 0.5})
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def make_probe(
    run: Path,
    last: float,
    *,
    knn: float | None = None,
    epoch: int = 5,
    name: str = "lincls",
    **more,
) -> Path:
    folder = run.with_name(f"{run.name}-{name}")
    folder.mkdir()
    (folder / "args.json").write_text(json.dumps({"pretrained": "x", "epochs": 100}))
    content = {
        "checkpoint": str(run / f"checkpoint_{epoch - 1:04d}.pth.tar"), "arch": "resnet8",
        "pretrained_epochs": epoch, "best": {"top1": last + 1, "top5": 99.0, "epoch": 3},
        "last": {"top1": last, "top5": 98.0, "epoch": 9}, "protocol": {"lr": 30.0, "seed": 0},
        **more,
    }  # fmt: skip
    if knn is not None:
        content["knn"] = {"top1": knn, "top5": 90.0, "k": 200, "temperature": 0.1, "images": 50}
    (folder / "lincls.json").write_text(json.dumps(content))
    return folder


def make_measure(run: Path, alignment: float, uniformity: float, epoch: int = 5, **more) -> Path:
    path = run / f"measured_{epoch}.json"
    content = {
        "checkpoint": str(run / f"checkpoint_{epoch - 1:04d}.pth.tar"), "layer": "projection",
        "alpha": 2.0, "t": 2.0, "alignment": alignment, "uniformity": uniformity, **more,
    }  # fmt: skip
    path.write_text(json.dumps(content))
    return path


def cut_log(run: Path) -> None:
    """As of a run that was killed while it wrote."""
    lines = (run / "log.jsonl").read_text().splitlines(keepends=True)
    (run / "log.jsonl").write_text("".join(lines[:-4]) + lines[-4][:20])


def compare(*paths: object) -> tuple[list[list[str]], str]:
    """Rows of the first table of a comparison, and all that stands on the screen."""
    comparison = Comparison(*read_runs(paths))
    text = report.markdown(comparison, ROOT / "scripts" / "published.csv")
    return report.result_rows(comparison), text


def column(rows: list[list[str]], name: str) -> list[str]:
    return [row[rows[0].index(name)] for row in rows[1:]]
