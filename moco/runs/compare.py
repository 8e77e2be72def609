"""Compare runs: groups that differ in the seed only, paired permutation tests, rank correlation."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy import stats

from moco.runs.evaluations import KNN, LOGGED
from moco.runs.folder import RunFolder, common_accuracy

# Up to so many seeds the test goes through every way to swap, 2^16; beyond, through as many.
EXACT_SEEDS = 16


class Column(NamedTuple):
    """A figure that runs are compared by. Accuracies are in percent."""

    title: str
    value: Callable[[RunFolder], float | None]
    decimals: int


COLUMNS = (
    Column(KNN, RunFolder.knn, 2),
    *(Column(n, lambda run, n=n: run.value(n), 2)
      for n in ("linear last", "linear best", "linear folds")),
    *(Column(n, lambda run, n=n: run.value(n), 3) for n in ("alignment", "uniformity")),
    Column("hours", RunFolder.hours, 3),
    Column("images/s", RunFolder.images_per_s, 0),
)  # fmt: skip
TESTED = COLUMNS[:6]


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
        return [value for value in map(column.value, self.runs) if value is not None]

    def by_seed(self, column: Column) -> dict[int, float]:
        """Mean of the runs of each seed."""
        found: dict[int, list[float]] = {}
        for run in self.runs:
            value = column.value(run)
            if value is not None:
                found.setdefault(run.seed, []).append(value)
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

    def differing(self) -> list[str]:
        """Arguments of the recipe in which any two groups differ."""
        names = dict.fromkeys(name for group in self.groups for name in group.recipe)
        return [name for name in names if len({g.recipe.get(name) for g in self.groups}) > 1]

    def evaluation_differences(self) -> list[str]:
        """In what the evaluations of the runs are not alike."""
        found = []
        for title, name in (("linear evaluation", "linear last"), ("k-NN", KNN)):
            protocols = [
                dict(protocol)
                for run in self.runs
                for n, protocol in run.found()
                if n == name and LOGGED not in protocol
            ]
            for setting in dict.fromkeys(s for protocol in protocols for s in protocol):
                values = dict.fromkeys(protocol.get(setting, "None") for protocol in protocols)
                if len(values) > 1:
                    found.append(f"{title}: {setting} is {' or '.join(values)}")
        for title, name in (("k-NN", KNN), ("alignment and uniformity", "uniformity")):
            sources = [LOGGED in p for run in self.runs for n, p in run.found() if n == name]
            if 0 < sum(sources) < len(sources):
                found.append(
                    f"{title}: logged while training for {sum(sources)} of {len(sources)} runs"
                )
        return found


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


def paired_differences(groups: Sequence[Group]) -> list[Paired]:
    """Of each pair of groups of different objectives with at least two seeds in common."""
    found = []
    for (i, a), (j, b) in itertools.combinations(enumerate(groups, start=1), 2):
        for column in TESTED if a.objective != b.objective else ():
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
    runs = [
        (str(i), run, run.measured("alignment"), run.measured("uniformity"))
        for i, group in enumerate(comparison.groups, start=1)
        for run in group.runs
    ]
    runs = [row for row in runs if None not in row]
    name, accuracy = common_accuracy([(run, run.epochs) for _, run, *_ in runs])
    return name, [Place(a, u, accuracy(run, run.epochs), i) for i, run, a, u in runs]


def rank_correlations(places: Sequence[Place]) -> list[tuple[str, float]]:
    """Of alignment and of uniformity with accuracy, where they can be told."""
    known = [place for place in places if place.accuracy is not None]
    accuracies = [place.accuracy for place in known]
    pairs = [
        (name, rank_correlation([getattr(place, name) for place in known], accuracies))
        for name in ("alignment", "uniformity")
    ]
    return [(name, rho) for name, rho in pairs if rho is not None]
