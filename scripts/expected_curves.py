#!/usr/bin/env python
"""What a run should look like, and how it looks when something is wrong: four small runs, drawn.

    python scripts/expected_curves.py [--data DIR] [--out FOLDER]

A healthy run, one that collapses (no uniformity term), one without alignment, one with a learning
rate of nearly nothing: each by the command that is printed, some minutes on one CPU core. Loss,
alignment, uniformity and k-NN accuracy of all of them, and the healthy one's first steps, while the
queue still holds the random keys that it starts with, go to FOLDER/expected_curves.{png,svg}.
What has been finished in FOLDER is not run again.
"""

import argparse
import shlex
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

try:
    from matplotlib.figure import Figure

    from align_uniform.figures import COLOURS, DASHES, save, styled
except ModuleNotFoundError as missing:
    name = missing.name.partition(".")[0]
    sys.exit(f"expected_curves.py: error: figures need {name}: pip install {name}")

from align_uniform.bounds import uniformity_infimum  # noqa: E402
from moco.runs.command import run_shown  # noqa: E402
from moco.runs.folder import read_runs  # noqa: E402
from moco.runs.recipes import resumed  # noqa: E402

BATCH, QUEUE, DIM, EPOCHS = 64, 1024, 128, 16
SHARED = (
    f"-a resnet8x2s2 --image-size 32 --batch-size {BATCH} --bn-splits 8 --moco-k {QUEUE} "
    f"--moco-m 0.99 --moco-dim {DIM} --wd 1e-4 --mlp --aug-plus --cos --seed 0 "
    f"--epochs {EPOCHS} --print-freq 1 --knn-every 1 --check-every 0 --keep-last 1 --keep-every 0"
)
HEALTHY = "healthy"
RUNS = {
    HEALTHY: "--lr 0.03 --moco-align-w 2 --moco-unif-w 1 --moco-unif-t 2",
    "collapse: --moco-unif-w 0": "--lr 0.03 --moco-align-w 2 --moco-unif-w 0",
    "no alignment: --moco-align-w 0": "--lr 0.03 --moco-align-w 0 --moco-unif-w 1 --moco-unif-t 2",
    "dead: --lr 1e-6": "--lr 1e-6 --moco-align-w 2 --moco-unif-w 1 --moco-unif-t 2",
}
PANELS = {
    "loss": "loss (of each objective)",
    "alignment": "alignment (alpha 2; 0 is best)",
    "uniformity": "uniformity (t 2; dotted: its infimum)",
    "knn top1": "k-NN top-1 (%)",
}

Curves = dict[str, tuple[list[float], list[float]]]  # of each panel: (epochs, values)


def main() -> None:
    parser = argparse.ArgumentParser(description="draw what healthy and failing runs look like")
    parser.add_argument(
        "--data", type=Path, metavar="DIR",
        help="DIR/{train,val}/CLASS/IMAGE (default: the toy dataset, made in data/toy)",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "expected-curves")
    args = parser.parse_args()
    if args.data is not None and not args.data.is_dir():
        parser.error(f"no such data folder: {args.data}")
    data = args.data
    if data is None:
        data = ROOT / "data" / "toy"
        run_shown(ROOT / "scripts" / "make_toy_dataset.py", str(data))
    curves = {}
    for i, (name, flags) in enumerate(RUNS.items()):
        run = args.out / f"run-{i}"
        if not (run / f"checkpoint_{EPOCHS - 1:04d}.pth.tar").is_file():
            argv = shlex.split(f"{SHARED} {flags}")
            run_shown(ROOT / "main_moco.py", *argv, *resumed(run), str(data))
        found, left_out = read_runs([run])
        if not found:
            parser.exit(2, f"{parser.prog}: error: {left_out[0][0]} {left_out[0][1]}\n")
        curves[name] = found[0].scalars()
    figure = draw(curves)
    for suffix in ("png", "svg"):
        save(figure, args.out / f"expected_curves.{suffix}")
    print_table(curves)
    print(f"{args.out / 'expected_curves.png'} and .svg")


@styled
def draw(curves: dict[str, Curves]) -> Figure:
    """All runs above, the first steps of the healthy one below."""
    filled = QUEUE // BATCH
    figure = Figure(figsize=(12, 5.2))
    whole, beginning = figure.subplots(2, 4)
    for axes, (name, title) in zip(whole, PANELS.items(), strict=True):
        axes.set(title=title, xlabel="epoch")
        every = 1 if name == "knn top1" else 2  # a file of half the size
        for i, (run, panels) in enumerate(curves.items()):
            epochs, values = panels[name]
            axes.plot(epochs[::every], values[::every], label=run, color=COLOURS[i],
                      linestyle=DASHES[i], linewidth=1.2, markersize=3,
                      marker="o" if name == "knn top1" else "")  # fmt: skip
    for axes, name in zip(beginning, list(PANELS)[:3], strict=False):
        axes.set(title=f"healthy, first steps: {name}", xlabel="step")
        values = curves[HEALTHY][name][1][: 4 * filled]
        axes.plot(range(1, 1 + len(values)), values, color=COLOURS[0], linewidth=1.2)
        axes.axvline(filled, color="0.4", linewidth=0.8)
    beginning[0].annotate(f"queue of {QUEUE}\nfilled once", (filled, 0.1),
                          xycoords=("data", "axes fraction"), xytext=(4, 0),
                          textcoords="offset points", fontsize=8)  # fmt: skip
    for axes in (whole[2], beginning[2]):
        bound = axes.axhline(uniformity_infimum(DIM, 2), color="0.4", linestyle=":",
                             label=f"infimum of uniformity, {DIM} dimensions")  # fmt: skip
    beginning[3].axis("off")
    beginning[3].legend(handles=[*whole[0].lines, bound], loc="center")
    return figure


def print_table(curves: dict[str, Curves]) -> None:
    wide = max(map(len, curves))
    print(f"\n{'':{wide}}  " + "  ".join(f"{name.split()[-1]:>10}" for name in PANELS))
    for run, panels in curves.items():
        last = (panels[name][1][-1] for name in PANELS)
        print(f"{run:{wide}}  " + "  ".join(f"{value:10.3f}" for value in last))


if __name__ == "__main__":
    main()
