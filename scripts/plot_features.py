#!/usr/bin/env python
"""Draw the figures of arXiv:2005.10242 from features or from run folders, as PNG or SVG.

    python scripts/plot_features.py 3 FEATURES... --out FILE...    pairs, densities on the circle
    python scripts/plot_features.py 4 [FEATURES...] --out FILE...  average pairwise potential
    python scripts/plot_features.py map FEATURES --out FILE...     t-SNE from any dimension
    python scripts/plot_features.py 5 RUN... --out FILE...         alignment, uniformity, accuracy
    python scripts/plot_features.py 7 RUN... --out FILE...         the same against the loss weights
    python scripts/plot_features.py 8 RUN... --out FILE...         the same while training goes on
    python scripts/plot_features.py 10 --out FILE...               0F1 against the dimension
    python scripts/plot_features.py 11 --out FILE...               optimal uniformity against it

FEATURES is an .npz or .safetensors file with `features` (N, C) and, where known, `labels` (N,),
`classes` (their names) and `features_2` (N, C), a second view of each image, as extract_features.py
writes it. Figures 3 and 4 need unit rows of two dimensions: train with --moco-dim 2 and extract
with --layer projection --normalize --views 2. RUN is what compare_runs.py takes.
"""

import argparse
import functools
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from moco.errors import report_user_errors
from moco.packages import import_optional

FIGURES = ("3", "4", "5", "7", "8", "10", "11", "map")
_OF_RUNS, _OF_NOTHING = ("5", "7", "8"), ("10", "11")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="the figures of arXiv:2005.10242")
    add = parser.add_argument
    add("figure", choices=FIGURES, metavar="FIGURE", help=", ".join(FIGURES))
    add("inputs", nargs="*", metavar="INPUT", help="features or run folders")
    add("--out", nargs="+", required=True, metavar="FILE", help=".png or .svg")
    shown = "names or numbers of classes to show (3: the first 4; map: 10)"
    add("--classes", nargs="+", metavar="NAME", help=shown)
    add("--normalize", action="store_true", help="scale rows to unit length first")
    add("--t", type=float, default=2.0, help="of figure 4 (%(default)s)")
    most = "images on a map, equally many of each class (%(default)s)"
    add("--most", type=int, default=2000, metavar="N", help=most)
    drawn = "map: draw the images, up to 300, that the file names, from this folder"
    add("--images", metavar="DIR", help=drawn)
    add("--seed", type=int, default=0, help="of maps and samples (%(default)s)")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    parser = build_parser()
    args = parser.parse_args(argv)
    reason = refusal(args)
    if reason:
        parser.exit(2, f"{parser.prog}: error: {reason}\n")
    with report_user_errors():
        import_optional("matplotlib", "a figure")
        from align_uniform import figures

        figure = draw(args)
        for path in args.out:
            figures.save(figure, path)
            print(f"wrote {path}")


def refusal(args: argparse.Namespace) -> str | None:
    """What is wrong with the arguments, if anything."""
    wrong = [path for path in args.out if Path(path).suffix.lower() not in (".png", ".svg")]
    if wrong:
        return f"--out files must end in .png or .svg, got {wrong[0]}"
    if args.figure in _OF_NOTHING and args.inputs:
        return f"figure {args.figure} takes no input, got {args.inputs[0]}"
    if args.figure in ("3", "map", *_OF_RUNS) and not args.inputs:
        kind = "run folder" if args.figure in _OF_RUNS else "file of features"
        return f"figure {args.figure} needs at least one {kind}"
    if args.figure == "map" and len(args.inputs) > 1:
        return f"a map is of one file of features, got {len(args.inputs)}"
    if args.images is not None and (args.figure != "map" or not Path(args.images).is_dir()):
        wrong = "is for a map" if args.figure != "map" else f"no such folder: {args.images}"
        return f"--images: {wrong}"
    if args.most < 2:
        return f"--most must be at least 2, got {args.most}"
    if not 0 <= args.seed < 2**32:
        return f"--seed must be in [0, 2^32), got {args.seed}"
    return None


def draw(args: argparse.Namespace):
    """The matplotlib figure that the arguments ask for."""
    from align_uniform import figures
    from moco.evaluate.feature_figures import draw_figure_3, draw_figure_4, draw_map

    inputs, unit = args.inputs, {"normalize": args.normalize}
    if args.figure in _OF_NOTHING:
        return figures.figure_10() if args.figure == "10" else figures.figure_11()
    if args.figure in _OF_RUNS:
        return draw_runs(args.figure, inputs)
    if args.figure == "3":
        return draw_figure_3(inputs, args.classes, **unit)
    if args.figure == "4":
        return draw_figure_4(inputs, t=args.t, seed=args.seed, **unit)
    more = {"most": args.most, "seed": args.seed, "images": args.images}
    return draw_map(inputs[0], args.classes, **more, **unit)


def draw_runs(figure: str, folders: Sequence[str]):
    from align_uniform.figures import Point, scatter, trajectories, weights_sweep
    from moco.runs.figures import final_points, paths_of_training, sweep_lines
    from moco.runs.folder import read_runs

    say = functools.partial(print, file=sys.stderr)
    runs, left_out = read_runs(folders)
    for path, reason in left_out:
        say(f"left out: {path} {reason}")
    if figure == "5":
        kind, points = final_points(runs)
        return scatter([Point(*point) for point in points], accuracy=kind)
    if figure == "7":
        kind, lines = sweep_lines(runs, say)
        lines = {n: [(share, Point(*p)) for share, p in line] for n, line in lines.items()}
        return weights_sweep(lines, accuracy=kind)
    kind, paths = paths_of_training(runs, say)
    return trajectories({n: [Point(*p) for p in path] for n, path in paths.items()}, accuracy=kind)


if __name__ == "__main__":
    main()
