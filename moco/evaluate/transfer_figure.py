"""The figure of a transfer: accuracy over shots, a panel for each data set."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from align_uniform.figures import line_style, styled


@styled
def transfer_figure(found: dict) -> Figure:
    """Args: found: as `moco.evaluate.transfer.transfer` gives it."""
    sets = found["data"]
    figure = Figure(figsize=(3.4 * len(sets) + 0.4, 3.4))
    all_axes = figure.subplots(1, len(sets), squeeze=False)[0]
    for axes, one in zip(all_axes, sets, strict=True):
        for i, (spec, result) in enumerate(one["results"].items()):
            style = line_style(i)
            shots = [int(n) for n in result["shots"]]
            places = [*range(len(shots)), len(shots)]  # the last: all images
            means = [shot["mean"] for shot in result["shots"].values()]
            low, high = result["logistic"]["interval"]
            spreads = [shot["sd"] or 0 for shot in result["shots"].values()]
            top1 = result["logistic"]["top1"]
            axes.errorbar(
                places,
                [*means, top1],
                yerr=[[*spreads, top1 - low], [*spreads, high - top1]],
                label=Path(spec).name,
                capsize=2,
                **style,
            )
            axes.set_xticks(places, [*map(str, shots), "all"])
        axes.set_title(f"{one['name']}, {one['classes']} classes")
        axes.set_xlabel("training images of each class")
    all_axes[0].set_ylabel("top-1 (%), logistic regression")
    all_axes[0].legend()
    return figure
