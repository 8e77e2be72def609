#!/usr/bin/env python
"""Compare finished runs: a Markdown table on the screen and a page with curves as one HTML file.

    python scripts/compare_runs.py RUN... [--out report.html]

RUN is a run folder of main_moco.py or main_lincls.py, or any folder that has such folders in it
(and results of `measure_align_uniform.py --out`). A linear evaluation or a measurement belongs to
the run whose checkpoint it names. Runs that differ in their seed only make one row: mean and
standard deviation. Where two objectives were run with the same seeds, their differences are tested,
seed by seed. Rows that differ from the first in more than the objective are flagged, with what
differs. Folders that cannot be compared are listed with the reason.
"""

from __future__ import annotations

import argparse
import csv
import html
import itertools
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from align_uniform import figures  # noqa: E402
from moco.cli import report_user_errors  # noqa: E402
from moco.runs.folder import Run, common_accuracy, mean, read_runs  # noqa: E402

PUBLISHED = Path(__file__).with_name("published.csv")

# Title, value of a run, decimals. Accuracies are in percent.
COLUMNS: tuple[tuple[str, Callable[[Run], float | None], int], ...] = (
    ("k-NN top-1", Run.knn, 2),
    ("linear last", lambda run: run.linear("last"), 2),
    ("linear best", lambda run: run.linear("best"), 2),
    ("linear folds", Run.cross_validated, 2),
    ("alignment", lambda run: run.measured("alignment"), 3),
    ("uniformity", lambda run: run.measured("uniformity"), 3),
    ("hours", Run.hours, 3),
    ("images/s", Run.images_per_s, 0),
)
TESTED = COLUMNS[:6]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="compare run folders")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder, or a folder of them")
    parser.add_argument("--out", type=Path, default=Path("report.html"), metavar="FILE.html",
                        help="the page (%(default)s)")  # fmt: skip
    args = parser.parse_args(argv)
    if args.out.suffix.lower() not in (".html", ".htm"):
        parser.exit(2, f"{parser.prog}: error: --out must end in .html, got {args.out}\n")
    runs, left_out = read_runs(args.runs)
    if not runs:
        reasons = "; ".join(f"{path} {reason}" for path, reason in left_out[:4])
        more = f"; and {len(left_out) - 4} more" if len(left_out) > 4 else ""
        parser.exit(2, f"{parser.prog}: error: no finished run to compare: {reasons}{more}\n")
    comparison = Comparison(runs, left_out)
    with report_user_errors():
        args.out.write_text(report(comparison), encoding="utf-8")
    print(markdown(comparison))
    print(f"wrote {args.out}", file=sys.stderr)


# ------------------------------------------------------------------------------------------------
# What is compared
# ------------------------------------------------------------------------------------------------


@dataclass
class Group:
    """Runs that differ in the seed only."""

    objective: str
    recipe: dict[str, str]
    runs: list[Run]

    @property
    def name(self) -> str:
        return self.objective if self.runs[0].steps else "untrained"

    def values(self, of: Callable[[Run], float | None]) -> list[float]:
        return [value for value in map(of, self.runs) if value is not None]

    def by_seed(self, of: Callable[[Run], float | None]) -> dict[int, float]:
        """Mean of the runs of each seed."""
        seeds = {run.seed for run in self.runs}
        means = {s: mean(of(run) for run in self.runs if run.seed == s) for s in seeds}
        return {seed: value for seed, value in means.items() if value is not None}


class Comparison:
    """Groups of runs: first those of the recipe that most runs have, else as they were given."""

    def __init__(self, runs: Sequence[Run], left_out: Sequence[tuple[str, str]]) -> None:
        self.left_out = left_out
        groups: dict[tuple, Group] = {}
        for run in runs:
            recipe = run.recipe()
            key = (run.objective, *sorted(recipe.items()))
            groups.setdefault(key, Group(run.objective, recipe, [])).runs.append(run)
        recipes = [run.recipe() for run in runs]
        self.groups = sorted(groups.values(), key=lambda group: -recipes.count(group.recipe))
        for group in self.groups:
            group.runs.sort(key=lambda run: run.seed)

    def differing(self) -> list[str]:
        """Arguments of the recipe in which any two groups differ."""
        names = list(dict.fromkeys(name for group in self.groups for name in group.recipe))
        return [name for name in names if len({g.recipe.get(name) for g in self.groups}) > 1]

    def evaluation_differences(self) -> list[str]:
        """In what the evaluations of the runs are not alike."""
        found = []
        for title, part in (("linear evaluation", "protocol"), ("k-NN", "knn")):
            settings = [
                probe[part]
                for run in self.runs()
                for probe in run.final_probes()
                if isinstance(probe.get(part), dict)
            ]
            names = dict.fromkeys(name for setting in settings for name in setting)
            for name in (name for name in names if name not in ("seed", "top1", "top5")):
                values = list(dict.fromkeys(str(setting.get(name)) for setting in settings))
                if len(values) > 1:
                    found.append(f"{title}: {name} is {' or '.join(values)}")
        for title, has, evaluated in (
            ("k-NN", lambda run: run.knn() is not None,
             lambda run: any("knn" in probe for probe in run.final_probes())),
            ("alignment and uniformity", lambda run: run.measured("uniformity") is not None,
             lambda run: any(measure["epoch"] == run.epochs for measure in run.measures)),
        ):  # fmt: skip
            known = [run for run in self.runs() if has(run)]
            live = [run for run in known if not evaluated(run)]
            if live and len(live) < len(known):
                found.append(f"{title}: logged while training for {len(live)} of {len(known)} runs")
        return found

    def runs(self) -> list[Run]:
        return [run for group in self.groups for run in group.runs]


def flags(group: Group, reference: Group) -> list[str]:
    """In what else than the objective two groups differ: "lr 0.03, not 0.06"."""
    names = dict.fromkeys((*reference.recipe, *group.recipe))
    return [
        f"{name} {group.recipe.get(name, 'unknown')}, not {reference.recipe.get(name, 'unknown')}"
        for name in names
        if group.recipe.get(name) != reference.recipe.get(name)
    ]


@dataclass
class Paired:
    """Differences of two groups over the seeds that both have."""

    first: int
    second: int
    column: str
    seeds: list[int]
    difference: float
    deviation: float
    p: float


def paired_tests(comparison: Comparison) -> list[Paired]:
    """For each pair of groups of different objectives with at least two seeds in common."""
    found = []
    for (i, a), (j, b) in itertools.combinations(enumerate(comparison.groups, start=1), 2):
        if a.objective == b.objective:
            continue
        for title, value, _ in TESTED:
            mine, other = a.by_seed(value), b.by_seed(value)
            seeds = sorted(mine.keys() & other.keys())
            if 2 <= len(seeds) <= 40:
                differences = [mine[seed] - other[seed] for seed in seeds]
                found.append(
                    Paired(i, j, title, seeds, statistics.fmean(differences),
                           statistics.stdev(differences), sign_flip_p(differences))
                )  # fmt: skip
    return found


def sign_flip_p(differences: Sequence[float]) -> float:
    """Exact two-sided p of the paired permutation test: the share of all 2^n ways to give the n
    differences signs whose sum is at least as far from 0 as the one seen. At least 2 / 2^n.

    Sums of the two halves are formed and matched, so 2^(n/2) of them are held.
    """
    observed = abs(sum(differences))
    tolerance = 1e-9 * sum(map(abs, differences))
    halves = []
    for part in (differences[::2], differences[1::2]):
        sums = torch.zeros(1, dtype=torch.float64)
        for difference in part:
            sums = torch.cat([sums + difference, sums - difference])
        halves.append(sums)
    a, b = halves[0], halves[1].sort().values
    # Counted on both sides, each sum once: |a + b| >= observed.
    above = len(b) - torch.searchsorted(b, observed - tolerance - a)
    below = torch.searchsorted(b, -observed + tolerance - a, right=True)
    as_extreme = len(b) * torch.ones_like(above) if observed <= tolerance else above + below
    return as_extreme.sum().item() / 2 ** len(differences)


def spearman(xs: Sequence[float], ys: Sequence[float]) -> float | None:
    """Rank correlation, ties sharing their mean rank; None for fewer than 3 or constant values."""
    if len(xs) < 3 or len(set(xs)) == 1 or len(set(ys)) == 1:
        return None
    return statistics.correlation(_ranks(xs), _ranks(ys))


def _ranks(values: Sequence[float]) -> list[float]:
    return [
        sum(other < value for other in values) + (sum(other == value for other in values) + 1) / 2
        for value in values
    ]


def encoder_points(comparison: Comparison) -> tuple[str, list[figures.Point]]:
    """What the accuracy is, and every run that has alignment and uniformity."""
    runs = [
        (i, run)
        for i, group in enumerate(comparison.groups, start=1)
        for run in group.runs
        if run.measured("alignment") is not None and run.measured("uniformity") is not None
    ]
    name, accuracy = common_accuracy([(run, run.epochs) for _, run in runs])
    return name, [
        figures.Point(
            run.measured("alignment"), run.measured("uniformity"), accuracy(run, run.epochs), str(i)
        )
        for i, run in runs
    ]


def rank_correlations(points: Sequence[figures.Point]) -> list[tuple[str, float]]:
    known = [point for point in points if point.accuracy is not None]
    accuracies = [point.accuracy for point in known]
    found = []
    for name in ("alignment", "uniformity"):
        rho = spearman([getattr(point, name) for point in known], accuracies)
        if rho is not None:
            found.append((name, rho))
    return found


# ------------------------------------------------------------------------------------------------
# Tables, as rows of text
# ------------------------------------------------------------------------------------------------


def spread(values: Sequence[float], decimals: int) -> str:
    """Mean and standard deviation, "43.65 ± 0.31"; without the latter for one value."""
    if not values:
        return "–"
    text = f"{statistics.fmean(values):.{decimals}f}"
    return f"{text} ± {statistics.stdev(values):.{decimals}f}" if len(values) > 1 else text


def result_rows(comparison: Comparison) -> list[list[str]]:
    head = ["#", "objective", "differs from row 1 in", "seeds", "ranks",
            *(title for title, _, _ in COLUMNS)]  # fmt: skip
    rows = [head]
    for i, group in enumerate(comparison.groups, start=1):
        cells = []
        for _, value, decimals in COLUMNS:
            values = group.values(value)
            cells.append(spread(values, decimals))
            if values and len(values) < len(group.runs):
                cells[-1] += f" (of {len(values)})"
        seeds = ", ".join(str(run.seed) for run in group.runs)
        flag = "; ".join(flags(group, comparison.groups[0]))
        rows.append([str(i), group.name, f"⚠ {flag}" if flag else "", seeds,
                     group.recipe["processes"], *cells])  # fmt: skip
    return rows


def test_rows(comparison: Comparison) -> list[list[str]]:
    rows = [["rows", "", "seeds", "mean difference ± deviation", "p", "least p possible",
             "differ also in"]]  # fmt: skip
    decimals = {title: places for title, _, places in COLUMNS}
    for test in paired_tests(comparison):
        a, b = (comparison.groups[i - 1] for i in (test.first, test.second))
        places = decimals[test.column] + 1
        names = [flag.split(" ")[0] for flag in flags(a, b)]
        rows.append([
            f"{test.first} − {test.second}", test.column, ", ".join(map(str, test.seeds)),
            f"{test.difference:+.{places}f} ± {test.deviation:.{places}f}", f"{test.p:.3g}",
            f"{2 / 2 ** len(test.seeds):.3g}", f"⚠ {', '.join(names)}" if names else "",
        ])  # fmt: skip
    return rows if len(rows) > 1 else []


def recipe_rows(comparison: Comparison) -> list[list[str]]:
    """Arguments as rows: those that differ first, then those that all share."""
    differing = comparison.differing()
    names = dict.fromkeys(name for group in comparison.groups for name in group.recipe)
    rows = [["argument", *(f"row {i}" for i in range(1, len(comparison.groups) + 1))]]
    for name in (*differing, *(name for name in names if name not in differing)):
        mark = "⚠ " if name in differing else ""
        rows.append([mark + name, *(g.recipe.get(name, "unknown") for g in comparison.groups)])
    return rows


def run_rows(comparison: Comparison) -> list[list[str]]:
    rows = [["row", "seed", *(title for title, _, _ in COLUMNS), "code", "folder"]]
    for i, group in enumerate(comparison.groups, start=1):
        for run in group.runs:
            cells = [spread([v] if (v := value(run)) is not None else [], places)
                     for _, value, places in COLUMNS]  # fmt: skip
            code = run.args.get("provenance")
            versions = [f"{k} {v}" for k, v in code.items()] if isinstance(code, dict) else []
            rows.append([str(i), str(run.seed), *cells, ", ".join(versions), str(run.folder)])
    return rows


def published_rows() -> list[list[str]]:
    with open(PUBLISHED, encoding="utf-8", newline="") as file:
        cited = list(csv.DictReader(file))
    rows = [["data", "encoder", "objective", "epochs", "batch", "lr", "linear top-1", "k-NN top-1",
             "runs", "cited from"]]  # fmt: skip
    for row in cited:
        linear = row["linear_top1"] + (f" ± {row['linear_sd']}" if row["linear_sd"] else "")
        rows.append([
            row["data"], row["encoder"], row["objective"], row["epochs"], row["batch_size"],
            row["lr"] or "–", linear or "–", row["knn_top1"] or "–", row["runs"], row["source"],
        ])  # fmt: skip
    return rows


NOTE_RESULTS = (
    "Accuracies in percent; ± is the standard deviation over seeds. Linear last and best: of the "
    "epochs of the probe on the last encoder; folds: held-out folds of the training set (--folds), "
    "to choose by. Alignment (alpha 2) and uniformity (t 2): lower is "
    "better, of the projections of held-out images where they were measured, else as last logged "
    "while training. Hours: training alone, without the time a run lay still."
)
NOTE_TESTS = (
    "Exact paired permutation test, two-sided: of all ways to swap the two objectives within "
    "seeds, the share that puts their means at least this far apart. With n seeds p cannot be "
    "below 2/2ⁿ: five seeds or fewer cannot reach 0.05. Not corrected for the number of tests."
)
NOTE_PUBLISHED = (
    "Cited, not run here: other data or code than the rows above, unless you have made them alike."
)


# ------------------------------------------------------------------------------------------------
# Markdown
# ------------------------------------------------------------------------------------------------


def markdown(comparison: Comparison) -> str:
    parts = ["## Runs", markdown_table(result_rows(comparison)), NOTE_RESULTS]
    parts += [f"⚠ {text}" for text in comparison.evaluation_differences()]
    tests = test_rows(comparison)
    if tests:
        parts += ["## Paired differences", markdown_table(tests), NOTE_TESTS]
    accuracy, points = encoder_points(comparison)
    for name, rho in rank_correlations(points):
        parts.append(f"Spearman's rank correlation of {name} and {accuracy}: {rho:+.2f} "
                     f"({len(points)} encoders)")  # fmt: skip
    if comparison.left_out:
        rows = [["left out", "because it"], *map(list, comparison.left_out)]
        parts += ["## Left out", markdown_table(rows)]
    parts += ["## Published figures (cited)", markdown_table(published_rows()), NOTE_PUBLISHED]
    return "\n\n".join(parts)


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(_markdown_cell(cell) for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def _markdown_cell(text: str) -> str:
    return " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")


# ------------------------------------------------------------------------------------------------
# HTML
# ------------------------------------------------------------------------------------------------

_STYLE = """
:root { color-scheme: light dark; --line: #8885; --soft: #8882; --warn: #b34700; }
@media (prefers-color-scheme: dark) { :root { --warn: #ffb066; } }
body { font: 15px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 1320px; padding: 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.84rem; }
th, td { border-bottom: 1px solid var(--line); padding: 0.3rem 0.45rem; text-align: left;
  vertical-align: top; font-variant-numeric: tabular-nums; }
th { background: var(--soft); white-space: nowrap; }
td.number { text-align: right; white-space: nowrap; }
.warn { color: var(--warn); }
.note { font-size: 0.87rem; max-width: 60rem; opacity: 0.85; }
svg { height: auto; max-width: 100%; }
svg.key { width: 36px; height: 10px; margin-right: 0.6rem; }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(18rem, 1fr)); gap: 1rem; }
.panels svg { width: 100%; }
"""
_DASH_ARRAYS = {"-": "", "--": "9 5", ":": "3 4", "-.": "9 4 3 4"}
_MOST_POINTS = 400

# What is drawn first, where it was logged; other scalars follow in the order of the alphabet.
_FIRST_CURVES = ("loss", "contr", "align", "unif", "alignment", "uniformity", "knn top1")


def report(comparison: Comparison) -> str:
    """The page: everything in one file, nothing loaded from elsewhere."""
    runs = len(comparison.runs())
    parts = [
        f"<h1>{len(comparison.groups)} objectives or recipes, {runs} runs</h1>",
        _section("Results", result_rows(comparison), NOTE_RESULTS),
        *(
            f'<p class="warn">⚠ {html.escape(text)}</p>'
            for text in comparison.evaluation_differences()
        ),
    ]
    tests = test_rows(comparison)
    if tests:
        parts.append(_section("Paired differences", tests, NOTE_TESTS))
    if comparison.left_out:
        rows = [["left out", "because it"], *map(list, comparison.left_out)]
        parts.append(_section("Left out", rows))
    parts.append(_scatter_part(comparison))
    parts.append(_curves_part(comparison))
    parts += [
        _section("Recipe", recipe_rows(comparison), "⚠ not the same in all rows."),
        _section("Each run", run_rows(comparison)),
        _section("Published figures (cited)", published_rows(), NOTE_PUBLISHED),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        "<title>Comparison of runs</title>\n"
        f"<style>{_STYLE}</style>\n</head>\n<body>\n" + "\n".join(parts) + "\n</body>\n</html>\n"
    )


def _section(title: str, rows: Sequence[Sequence[str]], note: str = "") -> str:
    return f"<h2>{html.escape(title)}</h2>\n{html_table(rows)}" + (
        f'\n<p class="note">{html.escape(note)}</p>' if note else ""
    )


def html_table(rows: Sequence[Sequence[str]]) -> str:
    def cell(text: str) -> str:
        kind = "warn" if text.startswith("⚠") else "number" if _is_number(text) else ""
        return f"<td{f' class={kind}' if kind else ''}>{html.escape(text)}</td>"

    head = "".join(f"<th>{html.escape(text)}</th>" for text in rows[0])
    body = "\n".join("<tr>" + "".join(map(cell, row)) + "</tr>" for row in rows[1:])
    return f'<div class="wide"><table>\n<tr>{head}</tr>\n{body}\n</table></div>'


def _is_number(text: str) -> bool:
    return bool(re.fullmatch(r"–|[-+]?\d[\d.e-]*( ± [\d.]+)?( \(of \d+\))?", text))


def _scatter_part(comparison: Comparison) -> str:
    accuracy, points = encoder_points(comparison)
    title = "<h2>Alignment, uniformity, accuracy</h2>\n"
    if not points:
        return title + (
            "<p>No run has both measured: scripts/measure_align_uniform.py CHECKPOINT DIR --out "
            "FILE.json, with the file in one of the folders given.</p>"
        )
    correlations = ", ".join(f"{name} {rho:+.2f}" for name, rho in rank_correlations(points))
    note = "One point for each run, numbered by its row, as in Figures 5 and 9 of arXiv:2005.10242."
    if correlations:
        note += f" Spearman's rank correlation with accuracy: {correlations} ({len(points)} runs)."
    drawn = figures.inline_svg(figures.scatter(points, accuracy=accuracy))
    return f'{title}<div>{drawn}</div>\n<p class="note">{note}</p>'


def _curves_part(comparison: Comparison) -> str:
    panels: dict[str, list] = {}
    legend = []
    for i, group in enumerate(comparison.groups):
        style = figures.line_style(i)
        legend.append(
            f'<svg class="key" viewBox="0 0 36 10"><path d="M0 5H36" stroke="{style["color"]}" '
            f'stroke-width="3" stroke-dasharray="{_DASH_ARRAYS[style["linestyle"]]}"/></svg>'
            f"{i + 1}: {html.escape('; '.join([group.name, *flags(group, comparison.groups[0])]))}"
        )
        for run in group.runs:
            for name, (xs, ys) in run.scalars().items():
                panels.setdefault(name, []).append((i, thinned(xs), thinned(ys)))
    if not panels:
        return ""
    names = [name for name in _FIRST_CURVES if name in panels]
    names += sorted(panels.keys() - set(names))
    drawn = "\n".join(figures.inline_svg(figures.curves(name, panels[name])) for name in names)
    note = (
        "One line for each run, as logged while training; runs of one row look alike. Losses of "
        "different objectives are different quantities. align and unif are the terms of the loss, "
        f"with the exponent and t of the objective. Of more than {_MOST_POINTS} lines of a log, "
        "means over neighbours are drawn."
    )
    return (
        f'<h2>Curves</h2>\n<p class="legend">{"<br>".join(legend)}</p>\n'
        f'<div class="panels">\n{drawn}\n</div><p class="note">{note}</p>'
    )


def thinned(values: Sequence[float]) -> list[float]:
    """Means over equally many neighbours, few enough for a curve on a page."""
    size = -(-len(values) // _MOST_POINTS)
    return [statistics.fmean(values[i : i + size]) for i in range(0, len(values), size)]


if __name__ == "__main__":
    main()
