#!/usr/bin/env python
"""Compare three encoders under one budget, from pretraining to one table.

    bash scripts/quickstart.sh [--data DIR] [--out FOLDER]

align + uniform, InfoNCE (MoCo v2) and an untrained encoder: each is pretrained, evaluated (linear
probe and k-NN) and measured (alignment, uniformity) by the commands that are printed, which can be
run by hand as well. What has been finished in FOLDER is not run again.

Each objective was chosen among three on toy images of another seed (docs/results.md).
"""

import argparse
import json
import shlex
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from moco.run_files import LINCLS_RESULT
from moco.runs import command, recipes

ROOT = Path(__file__).resolve().parent.parent
# Everything that the encoders share: the budget.
SHARED = "-a resnet8x2s2 --image-size 32 --batch-size 64 --bn-splits 8 --moco-k 128 --moco-m 0.99 "
SHARED += "--lr 0.03 --wd 1e-4 --mlp --aug-plus --cos --seed 0"
EPOCHS = 20
ENCODERS = {
    "align + uniform": "--moco-align-w 2 --moco-align-alpha 2 --moco-unif-w 1 --moco-unif-t 2",
    "InfoNCE (MoCo v2)": "--moco-t 0.1",
    "untrained": "--max-steps 0",
}
PROBE = "--batch-size 64 --lr 7.5 --knn --seed 0"
PROBE_EPOCHS = 20  # the learning rate drops at 60 % and 80 %, as in the published protocol
T = "2"  # of the uniformity that is reported, the same for all encoders


def main() -> None:
    parser = argparse.ArgumentParser(description="compare three encoders under one budget")
    parser.add_argument(
        "--data", type=Path, metavar="DIR",
        help="DIR/{train,val}/CLASS/IMAGE (default: the toy dataset, made in data/toy)",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="default: results/quickstart-<data>"
    )
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="pretraining (%(default)s)")
    parser.add_argument(
        "--probe-epochs", type=int, default=PROBE_EPOCHS, help="linear probe (%(default)s)"
    )
    args = parser.parse_args()
    if args.data is not None and not args.data.is_dir():
        parser.error(f"no such data folder: {args.data}")

    started = time.perf_counter()
    data = args.data
    if data is None:
        data = ROOT / "data" / "toy"
        command.run_shown(ROOT / "scripts" / "make_toy_dataset.py", str(data))
    out = args.out or ROOT / "results" / f"quickstart-{data.resolve().name}"
    drops = f"{args.probe_epochs * 6 // 10} {args.probe_epochs * 8 // 10}"
    settings = {
        "data": str(data.resolve()),
        "pretrain": f"{SHARED} --epochs {args.epochs}",
        "probe": f"{PROBE} --epochs {args.probe_epochs} --schedule {drops}",
        "encoders": ENCODERS,
        "t": T,
    }
    try:
        recipes.claim(out / "settings.json", settings, "results of other settings")
    except ValueError as error:
        parser.error(str(error))
    print_table({name: evaluate(name, f, out, data, settings) for name, f in ENCODERS.items()})
    print(f"\ndata {data}, files in {out}, {time.perf_counter() - started:.0f} s")


def evaluate(name: str, flags: str, out: Path, data: Path, settings: dict) -> tuple[dict, dict]:
    """Pretrain, probe and measure one encoder, leaving out what is there already; the results of
    the probe and of the measurement."""
    print(f"\n== {name}", flush=True)
    slug = name.split()[0].lower()
    pretrained, probed = out / f"{slug}-pretrain", out / f"{slug}-lincls"
    measured, result = out / f"{slug}-align-uniform.json", probed / LINCLS_RESULT
    pretrain = shlex.split(f"{settings['pretrain']} {flags}")
    epochs = int(pretrain[pretrain.index("--epochs") + 1])
    last = "step_00000000" if "--max-steps" in pretrain else f"checkpoint_{epochs - 1:04d}"
    file = pretrained / f"{last}.pth.tar"
    probe = [*shlex.split(settings["probe"]), "--pretrained", str(file)]
    for path, words in (
        (file, ["main_moco.py", *pretrain, *recipes.resumed(pretrained), str(data)]),
        (result, ["main_lincls.py", *probe, *recipes.resumed(probed), str(data)]),
        (measured, ["scripts/measure_align_uniform.py", str(file), str(data), "--t", T,
                    "--lidar-views", "0", "--out", str(measured)]),
    ):  # fmt: skip
        if not path.is_file():
            command.run_shown(ROOT / words[0], *words[1:])
    linear, metrics = (json.loads(p.read_text(encoding="utf-8")) for p in (result, measured))
    return linear, metrics


def print_table(found: dict[str, tuple[dict, dict]]) -> None:
    wide = max(map(len, found))
    print(f"\n{'encoder':{wide}}  linear top-1  k-NN top-1  L_align  L_uniform")
    for name, (linear, metrics) in found.items():
        print(
            f"{name:{wide}}  {linear['last']['top1']:10.1f} %  {linear['knn']['top1']:8.1f} %"
            f"  {metrics['alignment']:7.3f}  {metrics['uniformity']:9.3f}"
        )
    print(
        f"\nL_align (alpha 2, 0 is best) and L_uniform (t {T}, {metrics['uniformity_infimum']:.3f} "
        f"is best) of the projections of {metrics['images']} held-out images"
    )
    for name, (linear, _) in found.items():
        print(f"{name:{wide}}  {'none' if name == 'untrained' else linear['objective']}")


if __name__ == "__main__":
    main()
