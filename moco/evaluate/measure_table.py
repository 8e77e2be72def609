"""What was measured of an encoder, as a table for people."""

from __future__ import annotations


def table(result: dict) -> str:
    """A column for each layer of a report of `moco.evaluate.measure` or `.sentences`."""
    layers = result["layers"]
    first, *_ = results = list(layers.values())
    width = 40 if first["intervals"] else 20
    lines = [*_head(result), ""]

    def row(title: str, cells: list[str]) -> None:
        lines.append(f"{title:28}" + "".join(f"{cell:>{width}}" for cell in cells))

    def values(title: str, name: str, decimals: int, key: str | None = None) -> None:
        row(title, [_cell(one, name, decimals, key) for one in results])

    row("", list(layers))
    row("dimensions", [str(one["dim"]) for one in results])
    for alpha in first["alignment"] or ():
        values(f"alignment, alpha {alpha}", "alignment", 4, alpha)
    for t in first["uniformity"]:
        values(f"uniformity, t {t} (best)", "uniformity", 4, t)
    values("Wasserstein uniformity", "wasserstein_uniformity", 4)
    values("effective rank", "effective_rank", 1)
    values("alpha-ReQ", "alpha_req", 3)
    if first["lidar"] is not None:
        values(f"LiDAR, {first['lidar_images']} x {first['lidar_views']} views", "lidar", 1)
    values("deviation * sqrt(dim)", "deviation", 4)
    if knn := first["knn"]:
        for key, top in {"top1": 1, "top5": min(5, knn["classes"])}.items():
            row(f"k-NN top{top}, k {knn['k']}", [f"{one['knn'][key]:.2f} %" for one in results])
        lines.append(f"k-NN: {knn['queries']} queries, bank of {knn['bank']}")
    return "\n".join(lines + [f"note: {note}" for note in result["notes"]])


def _head(result: dict) -> list[str]:
    epoch = result.get("epoch")
    title = [
        result.get("checkpoint") or result["features"],
        result.get("arch"),
        None if epoch is None else f"epoch {epoch}",
        result.get("objective"),
    ]
    measured = f"{result['images']} {result.get('unit', 'images')}"
    if "data" in result:
        measured += f" of {result['data']}"
    if "data" in result and "seed" in result:
        measured += f", two views each (seed {result['seed']})"
    return [", ".join(filter(None, title)), measured]


def _cell(one: dict, name: str, decimals: int, key: str | None) -> str:
    """A value, the least that there is of uniformity, and an interval where there is one."""
    value, interval = one[name], (one["intervals"] or {}).get(name)
    if key is not None:
        value, interval = value[key], interval and interval[key]
    if value is None:
        return "-"
    best = f" ({one['uniformity_infimum'][key]:.4f})" if name == "uniformity" else ""
    low_high = " [{:.{d}f}, {:.{d}f}]".format(*interval, d=decimals) if interval else ""
    return f"{value:.{decimals}f}{best}{low_high}"
