"""Reports on a comparison of runs: Markdown for the screen, and one HTML page with charts."""

from __future__ import annotations

import csv
import io
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from moco.packages import import_optional
from moco.printable import printable
from moco.runs.compare import (
    Comparison,
    encoder_places,
    least_p,
    paired_differences,
    rank_correlations,
)
from moco.runs.folder import short_names

jinja2 = import_optional("jinja2", "the report")
Markup = import_optional("markupsafe", "the report").Markup

Rows = list[list[str]]

MOST_POINTS = 400  # of a curve
# What is drawn first, where it was logged; other scalars follow in the order of the alphabet.
_FIRST_CURVES = ("loss", "contr", "align", "unif", "alignment", "uniformity", "knn top1")


def markdown(comparison: Comparison, published: Path) -> str:
    """The tables of a comparison; `published` is a CSV file of cited figures."""
    return _render("report.md", comparison, published)


def page(comparison: Comparison, published: Path, figures: ModuleType | None) -> str:
    """The whole report in one HTML file that loads nothing from elsewhere.

    Args:
        figures: align_uniform.figures, which needs torch and matplotlib; None leaves charts out.
    """
    charts = _charts(comparison, figures) if figures else {}
    return _render("report.html", comparison, published, charts=charts)


def _render(name: str, comparison: Comparison, published: Path, **more: object) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=jinja2.select_autoescape(["html"]),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=name.endswith(".html"),
    )
    environment.filters |= {"cell": markdown_cell, "kind": cell_kind}
    if name.endswith(".html"):
        environment.finalize = lambda value: printable(value) if type(value) is str else value
    accuracy, places = encoder_places(comparison)
    return environment.get_template(name).render(
        comparison=comparison,
        results=result_rows(comparison),
        tests=test_rows(comparison),
        recipe=recipe_rows(comparison),
        runs=run_rows(comparison),
        published=published_rows(published),
        left_out=[["left out", "because it"], *map(list, comparison.left_out)],
        accuracy=accuracy,
        encoders=len(places),
        correlations=rank_correlations(comparison),
        **more,
    )


def spread(values: Sequence[float], decimals: int, expected: int = 1) -> str:
    """Mean, standard deviation and number of values, "43.65 ± 0.31 (of 3)"; a single one that was
    expected stands alone."""
    if not values:
        return "–"
    text = f"{statistics.fmean(values):.{decimals}f}"
    if len(values) > 1:
        text += f" ± {statistics.stdev(values):.{decimals}f}"
    return text if len(values) == expected == 1 else f"{text} (of {len(values)})"


def result_rows(comparison: Comparison) -> Rows:
    titles = [column.title for column in comparison.columns]
    rows = [["#", "objective", "differs from row 1 in", "seeds", "ranks", "health", *titles]]
    for i, group in enumerate(comparison.groups, start=1):
        cells = [
            spread(group.values(column), column.decimals, len(group.runs))
            for column in comparison.columns
        ]
        seeds = ", ".join(str(run.seed) for run in group.runs)
        flag = "; ".join(group.flags(comparison.groups[0]))
        flag = f"⚠ {flag}" if flag else ""
        facts = [seeds, group.recipe["processes"], group.health() or "–"]
        rows.append([str(i), group.name, flag, *facts, *cells])
    return rows


def test_rows(comparison: Comparison) -> Rows:
    titles = ["rows", "", "seeds", "mean difference ± deviation", "p", "least p possible"]
    rows = [[*titles, "differ also in"]]
    for test in paired_differences(comparison):
        a, b = (comparison.groups[i - 1] for i in (test.first, test.second))
        places = test.column.decimals + 1
        mean, deviation = statistics.fmean(test.differences), statistics.stdev(test.differences)
        names = ", ".join(a.differences(b))
        rows.append(
            [
                f"{test.first} − {test.second}",
                test.column.title,
                ", ".join(map(str, test.seeds)),
                f"{mean:+.{places}f} ± {deviation:.{places}f}",
                f"{test.p:.3g}",
                f"{least_p(len(test.seeds)):.3g}",
                f"⚠ {names}" if names else "",
            ]
        )
    return rows


def recipe_rows(comparison: Comparison) -> Rows:
    """Arguments as rows: those that differ first, then those that all share."""
    differing = comparison.differing()
    names = dict.fromkeys(name for group in comparison.groups for name in group.recipe)
    rows = [["argument", *(f"row {i}" for i in range(1, len(comparison.groups) + 1))]]
    for name in (*differing, *(name for name in names if name not in differing)):
        mark = "⚠ " if name in differing else ""
        rows.append([mark + name, *(g.recipe.get(name, "unknown") for g in comparison.groups)])
    return rows


def run_rows(comparison: Comparison) -> Rows:
    rows = [["row", "seed", *(column.title for column in comparison.columns), "code", "folder"]]
    for i, group in enumerate(comparison.groups, start=1):
        for run in group.runs:
            cells = [spread(c.values(run), c.decimals) for c in comparison.columns]
            code = run.args.get("provenance")
            versions = [f"{k} {v}" for k, v in code.items()] if isinstance(code, dict) else []
            rows.append([str(i), str(run.seed), *cells, ", ".join(versions), str(run.folder)])
    return rows


def run_table(comparison: Comparison) -> str:
    """The figures of every run as CSV, a line each; a mean where a run was evaluated repeatedly.
    Figures that no run has get no column."""
    names = short_names(comparison.runs)
    columns = [c for c in comparison.columns if any(c.values(run) for run in comparison.runs)]
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["run", "objective", "seed", *(column.title for column in columns)])
    for name, run in zip(names, comparison.runs, strict=True):
        found = [column.values(run) for column in columns]
        cells = [f"{statistics.fmean(values):.6g}" if values else "" for values in found]
        writer.writerow([printable(name), printable(run.objective), run.seed, *cells])
    return file.getvalue()


def published_rows(path: Path) -> Rows:
    with open(path, encoding="utf-8", newline="") as file:
        cited = list(csv.DictReader(file))
    titles = ["data", "encoder", "objective", "epochs", "batch", "lr", "linear top-1"]
    rows = [[*titles, "k-NN top-1", "runs", "cited from"]]
    for row in cited:
        linear = row["linear_top1"] + (f" ± {row['linear_sd']}" if row["linear_sd"] else "")
        rows.append(
            [
                row["data"],
                row["encoder"],
                row["objective"],
                row["epochs"],
                row["batch_size"],
                row["lr"] or "–",
                linear or "–",
                row["knn_top1"] or "–",
                row["runs"],
                row["source"],
            ]
        )
    return rows


def markdown_cell(text: str) -> str:
    return printable(text).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")


def cell_kind(text: str) -> str:
    """The CSS class of a cell."""
    number = re.fullmatch(r"–|[-+]?\d[\d.e-]*( ± [\d.]+)?( \(of \d+\))?", text)
    return "warn" if text.startswith("⚠") else "number" if number else ""


def _charts(comparison: Comparison, figures: ModuleType) -> dict[str, object]:
    """The scatter, the curves and their legend, as the template takes them."""
    accuracy, places = encoder_places(comparison)
    curves: dict[str, list] = {}
    legend = []
    for i, group in enumerate(comparison.groups):
        name = "; ".join([group.name, *group.flags(comparison.groups[0])])
        style = figures.line_style(i)
        legend.append((style["color"], _CSS_DASHES[style["linestyle"]], f"{i + 1}: {name}"))
        for run in group.runs:
            for scalar, (xs, ys) in run.scalars().items():
                curves.setdefault(scalar, []).append((i, thinned(xs), thinned(ys)))
    names = [name for name in _FIRST_CURVES if name in curves]
    names += sorted(curves.keys() - set(names))
    drawn = [figures.curves(printable(name)[:80], curves[name]) for name in names]
    scatter = figures.scatter(places, accuracy=accuracy) if places else None
    return {
        "legend": legend,
        "curves": [Markup(figures.inline_svg(figure)) for figure in drawn],
        "scatter": Markup(figures.inline_svg(scatter)) if scatter else None,
    }


_CSS_DASHES = {"-": "solid", "--": "dashed", ":": "dotted", "-.": "double"}


def thinned(values: Sequence[float]) -> list[float]:
    """Means over equally many neighbours, few enough for a curve on a page."""
    size = -(-len(values) // MOST_POINTS)
    return [statistics.fmean(values[i : i + size]) for i in range(0, len(values), size)]
