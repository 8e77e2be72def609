"""Compare runs: groups that differ in the seed only, paired permutation tests, rank correlation."""

from __future__ import annotations

import functools
import itertools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from moco.packages import import_optional
from moco.runs.evaluations import KNN, LOGGED, LOWER, PLACE, SPECTRAL, Protocol
from moco.runs.figures import places
from moco.runs.folder import RunFolder, common_accuracy

stats = import_optional("scipy.stats", "the report")

# Figures that always have a column, if only an empty one; PLACE stands behind all accuracies, and
# what else needs no labels behind it.
FIRST = (KNN, "linear last", "linear best", "linear folds")
TITLES = {KNN: "k-NN", "linear last": "linear evaluation", "uniformity": "alignment and uniformity"}
WITHOUT_LABELS = (*PLACE, *SPECTRAL)
# Up to so many seeds the test goes through every way to swap, 2^16; beyond, through as many.
EXACT_SEEDS = 16


class Column(NamedTuple):
    """A figure that runs are compared by, of one protocol. Accuracies are in percent; where less
    is better the title says so."""

    title: str
    values: Callable[[RunFolder], Sequence[float]]  # one for each evaluation
    decimals: int


@dataclass
class Group:
    """Runs that differ in the seed only."""

    objective: str
    recipe: dict[str, str]
    runs: list[RunFolder]

    @property
    def name(self) -> str:
        return self.objective if self.runs[0].steps else "untrained"

    def values(self, column: Column) -> list[float]:
        """One of each run; of a single run one of each of its evaluations."""
        found = [values for run in self.runs if (values := column.values(run))]
        if len(self.runs) == 1 and found:
            return list(found[0])
        return [statistics.fmean(values) for values in found]

    def health(self) -> str:
        """The last verdicts that the runs gave on themselves, "healthy, collapsing"."""
        return ", ".join(dict.fromkeys(run.health() or "" for run in self.runs)).strip(", ")

    def by_seed(self, column: Column) -> dict[int, float]:
        """Mean of the runs of each seed."""
        found: dict[int, list[float]] = {}
        for run in self.runs:
            if values := column.values(run):
                found.setdefault(run.seed, []).append(statistics.fmean(values))
        return {seed: statistics.fmean(values) for seed, values in found.items()}

    def differences(self, reference: Group) -> list[str]:
        """Arguments in which two groups differ, beside the objective."""
        names = dict.fromkeys((*reference.recipe, *self.recipe))
        return [name for name in names if self.recipe.get(name) != reference.recipe.get(name)]

    def flags(self, reference: Group) -> list[str]:
        """The same with the values: "lr 0.03, not 0.06"."""
        return [
            f"{name} {self.recipe.get(name, 'unknown')}, "
            f"not {reference.recipe.get(name, 'unknown')}"
            for name in self.differences(reference)
        ]


class Comparison:
    """Groups of runs: first those of the recipe that most runs have, else as they were given."""

    def __init__(self, runs: Sequence[RunFolder], left_out: Sequence[tuple[str, str]] = ()) -> None:
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
        self.runs = [run for group in self.groups for run in group.runs]
        # Figures that any run has, by name, with their protocols; the first always have a column.
        self.protocols: dict[str, list[Protocol]] = {name: [] for name in FIRST}
        for name, protocol in (kind for run in self.runs for kind in run.final):
            known = self.protocols.setdefault(name, [])
            if protocol not in known:
                known.append(protocol)
        places = {name: self.protocols.pop(name, []) for name in WITHOUT_LABELS}
        self.protocols |= {n: found for n, found in places.items() if found or n in PLACE}
        self.tested = [column for name in self.protocols for column in self._columns(name)]
        self.columns = [
            *self.tested,
            Column("hours", lambda run: _known(run.hours()), 3),
            Column("images/s", lambda run: _known(run.images_per_s()), 0),
        ]

    def _columns(self, name: str) -> list[Column]:
        """One for each protocol; where there are several, the title has what tells them apart."""
        decimals = 3 if name in WITHOUT_LABELS else 4 if name.endswith(LOWER) else 2
        protocols = self.protocols[name]
        shared = set.intersection(*map(set, protocols)) if protocols else set()
        columns = []
        for protocol in protocols:
            own = [" ".join(setting).strip() for setting in protocol if setting not in shared]
            title = ", ".join([name, *own])
            values = functools.partial(_of_kind, (name, protocol))
            columns.append(Column(title, values, decimals))
        return columns or [Column(name, lambda run: (), decimals)]

    def differing(self) -> list[str]:
        """Arguments of the recipe in which any two groups differ."""
        names = dict.fromkeys(name for group in self.groups for name in group.recipe)
        return [name for name in names if len({g.recipe.get(name) for g in self.groups}) > 1]

    def evaluation_differences(self) -> list[str]:
        """In what the evaluations of the runs are not alike."""
        found = []
        for name, protocols in self.protocols.items():
            if name.partition(",")[0].endswith((" best", " folds", "alignment", *SPECTRAL)):
                continue  # of the same evaluations as another name
            title = TITLES.get(name, name)
            evaluated = [dict(protocol) for protocol in protocols if LOGGED not in protocol]
            for setting in dict.fromkeys(s for protocol in evaluated for s in protocol):
                values = dict.fromkeys(protocol.get(setting, "not given") for protocol in evaluated)
                if len(values) > 1:
                    found.append(f"{title}: {setting} is {' or '.join(values)}")
            sources = [LOGGED in p for run in self.runs for n, p in run.final if n == name]
            if 0 < sum(sources) < len(sources):
                shares = f"{sum(sources)} of {len(sources)} runs"
                found.append(f"{title}: logged while training for {shares}")
        for column in self.tested:
            most = max((len(column.values(run)) for run in self.runs), default=0)
            if most > 1:
                found.append(
                    f"{column.title}: a run's figure is the mean of up to {most} evaluations"
                )
        return found


def _of_kind(kind: tuple[str, Protocol], run: RunFolder) -> list[float]:
    return run.final.get(kind, [])


def _known(value: float | None) -> list[float]:
    return [] if value is None else [value]


class Paired(NamedTuple):
    """Differences of two groups over the seeds that both have."""

    first: int  # numbers of groups, from 1
    second: int
    column: Column
    seeds: list[int]
    differences: list[float]

    @property
    def p(self) -> float:
        return sign_flip_p(self.differences)


def paired_differences(comparison: Comparison) -> list[Paired]:
    """Of each pair of groups of different objectives with at least two seeds in common."""
    found = []
    for (i, a), (j, b) in itertools.combinations(enumerate(comparison.groups, start=1), 2):
        for column in comparison.tested if a.objective != b.objective else ():
            mine, other = a.by_seed(column), b.by_seed(column)
            seeds = sorted(mine.keys() & other.keys())
            if len(seeds) >= 2:
                differences = [mine[seed] - other[seed] for seed in seeds]
                found.append(Paired(i, j, column, seeds, differences))
    return found


def least_p(seeds: int) -> float:
    """The smallest p that `sign_flip_p` can give."""
    return 2 / 2**seeds if seeds <= EXACT_SEEDS else 1 / (2**EXACT_SEEDS + 1)


def sign_flip_p(differences: Sequence[float]) -> float:
    """Two-sided p of the paired permutation test: the share of all 2^n ways to give the n
    differences signs whose sum is at least as far from 0 as the one seen.

    Exact up to 16 differences; of more, 2^16 random ways are tried, by a fixed seed.
    """
    scale = sum(map(abs, differences))
    if len(differences) < 2 or not scale:
        return 1.0

    def distance(signed: np.ndarray, axis: int) -> np.ndarray:
        # scipy takes values for equal that differ by rounding, as a share of the value: the 1 makes
        # it a share of the largest sum there is.
        return 1 + np.abs(signed.sum(axis=axis)) / scale

    result = stats.permutation_test(
        (np.array(differences),),
        distance,
        permutation_type="samples",
        alternative="greater",
        vectorized=True,
        n_resamples=2**EXACT_SEEDS,
        random_state=0,
    )
    return float(result.pvalue)


def rank_correlation(xs: Sequence[float], ys: Sequence[float]) -> float | None:
    """Spearman's, ties sharing their mean rank; None for fewer than 3 or constant values."""
    if len(xs) < 3 or len(set(xs)) == 1 or len(set(ys)) == 1:
        return None
    return float(stats.spearmanr(xs, ys).statistic)


class Place(NamedTuple):
    """Where an encoder stands, as align_uniform.figures draws it: accuracy in percent or None."""

    alignment: float
    uniformity: float
    accuracy: float | None
    label: str


def encoder_places(comparison: Comparison) -> tuple[str, list[Place]]:
    """What the accuracy is, and every run that has alignment and uniformity; labels are rows."""
    rows = [(run, str(i)) for i, group in enumerate(comparison.groups, 1) for run in group.runs]
    name, found = places([(run, row) for run, row in rows if None not in run.place_of()])
    return name, [Place(*place) for place in found]


def rank_interval(xs: Sequence[float], ys: Sequence[float]) -> tuple[float, float]:
    """95 % interval of `rank_correlation`: percentiles of 10,000 bootstrap samples of the pairs, by
    a fixed seed. Pairs count as independent: runs that share a setting make it too narrow."""
    picked = np.random.default_rng(0).integers(len(xs), size=(10_000, len(xs)))
    x, y = (stats.rankdata(np.asarray(values)[picked], axis=1) for values in (xs, ys))
    x, y = (ranks - ranks.mean(axis=1, keepdims=True) for ranks in (x, y))
    scale = np.sqrt((x**2).sum(axis=1) * (y**2).sum(axis=1))
    rhos = (x * y).sum(axis=1)[scale > 0] / scale[scale > 0]
    low, high = np.quantile(rhos, (0.025, 0.975))
    return float(low), float(high)


class Correlation(NamedTuple):
    """Spearman's rank correlation with accuracy."""

    name: str  # of what needs no labels
    rho: float
    interval: tuple[float, float]  # 95 %
    encoders: int


def rank_correlations(comparison: Comparison) -> list[Correlation]:
    """Of each number that needs no labels with accuracy, over the runs of `encoder_places` that
    have both, where it can be told."""
    runs = [run for run in comparison.runs if None not in run.place_of()]
    _, accuracy = common_accuracy([(run, run.epochs) for run in runs])
    found = []
    for name in WITHOUT_LABELS:
        pairs = [(run.value(name), accuracy(run, run.epochs)) for run in runs]
        pairs = [pair for pair in pairs if None not in pair]
        rho = rank_correlation(*zip(*pairs, strict=True)) if pairs else None
        if rho is not None:
            interval = rank_interval(*zip(*pairs, strict=True))
            found.append(Correlation(name, rho, interval, len(pairs)))
    return found
