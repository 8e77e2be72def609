"""Comparison of runs: what is one row, what differs, the statistics."""

from __future__ import annotations

import csv
import itertools
import json
import re
import shutil
import statistics

import pytest
import torch
from run_folders import ALIGN, NCE, column, compare, make_measure, make_probe, make_run
from scipy import stats

from moco.runs import report
from moco.runs.compare import (
    Comparison,
    encoder_places,
    rank_correlation,
    rank_interval,
    sign_flip_p,
)
from moco.runs.folder import common_accuracy, read_runs


def test_seeds_are_one_row_with_mean_and_deviation(two_objectives, tmp_path) -> None:
    rows, screen = compare(two_objectives)
    assert column(rows, "objective") == [ALIGN, NCE]
    assert column(rows, "seeds") == ["0, 1, 2"] * 2
    deviation = statistics.stdev([50, 52, 57])
    assert column(rows, "linear last")[0] == f"53.00 ± {deviation:.2f} (of 3)"
    assert column(rows, "linear best")[0] == f"54.00 ± {deviation:.2f} (of 3)"
    spread = statistics.stdev([45, 48, 49])
    assert column(rows, "k-NN top-1")[1] == f"{112 / 3:.2f} ± {spread:.2f} (of 3)"
    assert column(rows, "alignment")[0] == f"0.530 ± {deviation / 100:.3f} (of 3)"
    assert column(rows, "uniformity")[0] == f"-2.650 ± {deviation / 20:.3f} (of 3)"
    # 20 steps at 2 steps a second; the clock of the log, with its pauses, says 1800 s.
    assert column(rows, "hours")[0] == f"{10 / 3600:.3f} ± 0.000 (of 3)"
    assert column(rows, "images/s")[0] == "16 ± 0 (of 3)"
    assert column(rows, "differs from row 1 in") == ["", ""]
    assert "Left out" not in screen
    for text in (ALIGN, NCE, f"53.00 ± {deviation:.2f}", "67.69", "cited"):
        assert text in screen


def test_paired_differences_are_by_seed(two_objectives, tmp_path) -> None:
    shutil.rmtree(two_objectives / "b1")  # seed 1 has no partner now
    _, screen = compare(two_objectives)
    (line,) = [li for li in screen.splitlines() if li.startswith("| 1 − 2 | linear last")]
    assert "| 1 − 2 | linear last | 0, 2 |" in line
    assert f"+6.500 ± {statistics.stdev([5, 8]):.3f} | 0.5 | 0.5 |" in line


def test_seeds_that_start_from_encoders_of_their_own_are_one_row(tmp_path) -> None:
    for seed in (0, 1):
        start = make_run(tmp_path / f"start-s{seed}" / "pretrain", NCE, seed)
        path = str(start / "checkpoint_0003.pth.tar")
        make_run(tmp_path / f"both-s{seed}" / "pretrain", ALIGN, seed, init_from=path)
    make_run(tmp_path / "alone", ALIGN, 2, init_from="/else/checkpoint_0003.pth.tar")
    rows, _ = compare(tmp_path)
    by_seeds = dict(zip(column(rows, "seeds"), column(rows, "objective"), strict=False))
    assert sorted(column(rows, "seeds")) == ["0, 1", "0, 1", "2"] and by_seeds["2"] == ALIGN
    flags = " ".join(column(rows, "differs from row 1 in"))
    assert f"{NCE}, epoch 4" in flags and "/else/checkpoint_0003.pth.tar" in flags
    assert str(tmp_path) not in flags


def test_cross_validation_has_a_column(tmp_path) -> None:
    settings = [{"mean": 40.0}, {"mean": None}, {"mean": 47.0}]
    for seed, found in enumerate((settings, [1, {}])):
        folds = {"count": 3, "settings": found}
        make_probe(make_run(tmp_path / f"{seed}", seed=seed), 50.0, folds=folds)
    rows, _ = compare(tmp_path)
    assert column(rows, "linear folds") == ["47.00 (of 1)"]


def test_only_different_objectives_are_tested(tmp_path) -> None:
    for seed in (0, 1):
        for lr in (0.03, 0.06):
            make_measure(make_run(tmp_path / f"{lr}-{seed}", NCE, seed, lr=lr), lr, -1.0)
    _, screen = compare(tmp_path)
    assert "Paired differences" not in screen


@pytest.mark.parametrize("n", range(1, 9))
def test_sign_flip_test_counts_all_signs(n: int) -> None:
    generator = torch.Generator().manual_seed(n)
    differences = (torch.randn(n, generator=generator) + 0.4).tolist()
    sums = [
        abs(sum(s * d for s, d in zip(signs, differences, strict=True)))
        for signs in itertools.product((1, -1), repeat=n)
    ]
    expected = sum(s >= abs(sum(differences)) - 1e-12 for s in sums) / 2**n
    assert sign_flip_p(differences) == expected
    assert sign_flip_p([-d for d in differences]) == expected


@pytest.mark.parametrize(
    ("differences", "p"),
    [
        ([0.1] * 5, 2 / 32),
        ([0.0, 0.0], 1),
        # A sum that is zero but for rounding: nothing is nearer.
        ([-19.9, -4.7, 23.8, -3.9, -3.2, 7.9], 1),
        ([1.0, -1.0], 1),
        ([0.1, 0.2, 0.3], 0.25),
        ([1.0] * 40, 1 / (2**16 + 1)),  # not exact: none of 2^16 random ways
    ],
)
def test_sign_flip_test_with_ties_and_zeros(differences, p) -> None:
    assert sign_flip_p(differences) == p


def test_rank_correlation_is_scipys() -> None:
    xs, ys = [3.0, 1.0, 4.0, 1.0, 5.0, 9.0], [2.0, 7.0, 1.0, 8.0, 2.0, 8.0]
    assert rank_correlation(xs, ys) == pytest.approx(stats.spearmanr(xs, ys).statistic)
    assert rank_correlation([1, 2], [1, 2]) is None
    assert rank_correlation([1, 1, 1], [1, 2, 3]) is None


def test_the_interval_of_a_rank_correlation_is_the_bootstraps() -> None:
    xs = [3.0, 1.0, 4.0, 1.0, 5.0, 9.0, 2.0, 6.0]
    ys = [2.0, 1.0, 6.0, 3.0, 4.0, 9.0, 2.0, 5.0]
    reference = stats.bootstrap(
        (xs, ys), lambda x, y: stats.spearmanr(x, y).statistic, paired=True, vectorized=False,
        n_resamples=2000, method="percentile", random_state=1,
    ).confidence_interval  # fmt: skip
    low, high = rank_interval(xs, ys)
    assert (low, high) == pytest.approx((reference.low, reference.high), abs=0.05)
    assert low < rank_correlation(xs, ys) < high <= 1 + 1e-9
    assert rank_interval([1, 2, 3, 4], [2, 4, 6, 8]) == pytest.approx((1, 1))  # constant ones aside


def test_the_figures_of_every_run_as_csv(two_objectives, tmp_path) -> None:
    comparison = Comparison(*read_runs([str(two_objectives)]))
    rows = list(csv.DictReader(report.run_table(comparison).splitlines()))
    assert [(row["run"], row["seed"]) for row in rows] == list(
        zip(["a0", "a1", "a2", "b0", "b1", "b2"], "012012", strict=True)
    )
    assert [float(row["linear last"]) for row in rows] == [50, 52, 57, 45, 48, 49]
    assert rows[0]["objective"] == ALIGN and "linear folds" not in rows[0]
    title, (first, *others) = encoder_places(comparison)
    assert title == "linear top-1, last (%)" and len(others) == 5
    assert first == (0.5, -2.5, 50.0, "1")  # alignment, uniformity, accuracy, row


def test_each_number_without_labels_is_correlated_with_accuracy(two_objectives) -> None:
    """Over the runs that have it, and with a column of its own."""
    for i, name in enumerate(("a0", "a1", "a2", "b0", "b1", "b2")):
        top1 = (50, 52, 57, 45, 48, 49)[i]
        layer = {"alignment": {"2": top1 / 100}, "uniformity": {"2": -top1 / 20}}
        layer |= {"wasserstein_uniformity": 1 - top1 / 100, "effective_rank": 10.0 + (i == 0)}
        layer |= {"lidar": float(top1), "lidar_images": 100, "lidar_views": 10}
        if i < 2:
            layer["alpha_req"] = 1.0 + i
        make_measure(two_objectives / name, 0, 0, layers={"projection": layer})
    rows, screen = compare(two_objectives)
    for name, rho in (("alignment", "+1.00"), ("uniformity", "-1.00"), ("LiDAR", "+1.00"),
                      ("Wasserstein uniformity", "-1.00")):  # fmt: skip
        text = f"{rho} (6 encoders; 95 %: {rho} to"
        assert f"correlation of {name} and linear top-1, last (%): {text}" in screen
    assert "correlation of effective rank" in screen and "correlation of alpha-ReQ" not in screen
    assert column(rows, "LiDAR") == ["53.000 ± 3.606 (of 3)", "47.333 ± 2.082 (of 3)"]


def test_more_than_the_objective_is_flagged(two_objectives, tmp_path) -> None:
    make_run(tmp_path / "other", NCE, 0, lr=0.06, processes=8, schedule=[60, 80])
    rows, screen = compare(two_objectives, tmp_path / "other")
    assert column(rows, "differs from row 1 in")[:2] == ["", ""]
    flag = column(rows, "differs from row 1 in")[2]
    assert flag.startswith("⚠")
    for text in ("lr 0.06, not 0.03", "processes 8, not 1", "schedule [60, 80], not [120, 160]"):
        assert text in flag
    assert column(rows, "ranks") == ["1", "1", "8"]
    # Named in the paired tests as well, as soon as there are two seeds.
    make_run(tmp_path / "other1", NCE, 1, lr=0.06, processes=8, schedule=[60, 80])
    for seed in (0, 1):
        make_probe(tmp_path / f"other{seed or ''}", 40 + seed)
    _, screen = compare(two_objectives, tmp_path)
    (line,) = [li for li in screen.splitlines() if li.startswith("| 1 − 3 | linear last")]
    assert {"lr", "processes", "schedule"} <= set(re.findall(r"\w+", line.split("⚠")[1]))


def test_row_1_is_of_the_recipe_that_most_have(two_objectives, tmp_path) -> None:
    make_run(tmp_path / "alone", ALIGN, 0, lr=1.0)
    rows, _ = compare(tmp_path / "alone", two_objectives)
    assert column(rows, "differs from row 1 in") == ["", "", "⚠ lr 1, not 0.03"]


def test_no_runs_differ_in_nothing() -> None:
    assert Comparison([]).evaluation_differences() == []


def test_probes_made_otherwise_are_named(two_objectives, tmp_path) -> None:
    path = two_objectives / "a0-lincls" / "lincls.json"
    content = json.loads(path.read_text())
    content["protocol"]["lr"] = 7.5
    content["knn"]["k"] = 20
    path.write_text(json.dumps(content))
    _, screen = compare(two_objectives)
    for text in ("linear evaluation: lr is 7.5 or 30.0", "k-NN: k is 20 or 200"):
        assert text in screen


def test_values_logged_while_training_are_used_where_nothing_else_is(tmp_path) -> None:
    run = make_run(tmp_path / "a")
    with open(run / "log.jsonl", "a") as log:
        line = {"kind": "train", "step": 20, "alignment": 0.4, "uniformity": -2.5}
        log.write(json.dumps(line) + "\n")
        for step, top1 in ((8, 30.0), (20, 33.0)):
            log.write(json.dumps({"kind": "knn", "step": step, "top1": top1, "top5": 80.0}) + "\n")
    rows, _ = compare(run)
    assert column(rows, "k-NN top-1") == ["33.00"]
    assert column(rows, "alignment") == ["0.400"] and column(rows, "uniformity") == ["-2.500"]
    other = make_run(tmp_path / "b", NCE)
    make_measure(other, 0.5, -3.0)
    make_probe(other, 60.0, knn=44.0)
    _, screen = compare(tmp_path)
    for title in ("k-NN", "alignment and uniformity"):
        assert f"⚠ {title}: logged while training for 1 of 2 runs" in screen
    shutil.rmtree(other)
    make_measure(run, 0.5, -3.0)
    make_probe(run, 60.0, knn=44.0)
    rows, _ = compare(run, f"{run}-lincls")
    assert column(rows, "k-NN top-1") == ["44.00"] and column(rows, "alignment") == ["0.500"]


CACHED = {"lr": 30.0, "cached": True}
FINETUNE = {"lr": 0.2, "finetune": True}
EVALUATIONS = {  # what is in lincls.json -> the title of its column
    "linear last": {},
    "cached last": {"evaluation": "cached", "protocol": CACHED},
    "cached last, 4 views": {"evaluation": "cached", "protocol": {**CACHED, "cached_views": 4}},
    "linear last, chosen by 3 folds": {
        "folds": {"count": 3, "settings": [{"mean": 40.0}]},
        "protocol": {"lr": [1.0, 30.0], "folds": 3},
    },
    "linear last, best of 2 settings": {"heads": [{}, {}], "protocol": {"lr": [1.0, 30.0]}},
    "fine-tune last": {"evaluation": "finetune", "protocol": FINETUNE},
    "fine-tune last, 10 % of labels": {
        "evaluation": "finetune",
        "labels": {"of": 10.0, "digest": "ab"},
        "protocol": {**FINETUNE, "labels_digest": "ab"},
    },
    "linear last, labels of mine.txt": {"labels": {"of": "/data/mine.txt", "digest": "cd"}},
    "linear last, 5 images per class": {"protocol": {"lr": 30.0, "images_per_class": 5}},
    "linear last, bf16": {"protocol": {"lr": 30.0, "amp": "bf16"}},
    "imagined last": {"evaluation": "imagined"},
}


def test_each_kind_of_evaluation_has_a_column_of_its_own(tmp_path) -> None:
    run = make_run(tmp_path / "a")
    usual = {"evaluation": "standard", "protocol": {"lr": 30.0, "seed": 0, "amp": "off"}}
    for i, more in enumerate(EVALUATIONS.values()):
        make_probe(run, 50.0 + i, name=f"probe{i}", **{**usual, **more})
    (row, values), _ = compare(tmp_path)
    found = dict(zip(row, values, strict=True))
    assert {title for title in row if " last" in title} == set(EVALUATIONS)
    assert [found[title] for title in EVALUATIONS] == [f"{50 + i:.2f}" for i in range(11)]
    assert found["linear folds"] == "40.00"
    assert not any("folds" in title for title in row if "best" in title), "it has only a last"


@pytest.mark.parametrize(
    ("older", "expected"),
    [
        ({"amp": "bf16"}, {"linear last": "50.00", "linear last, bf16": "70.00"}),
        ({"amp": "off"}, {"linear last": "60.00 ± 14.14 (of 2)"}),
        ({"device": "cpu"}, {"linear last": "60.00 ± 14.14 (of 2)"}),
        ({}, {"linear last, amp off": "50.00", "linear last, amp unknown": "70.00"}),
    ],
)
def test_older_files_tell_their_precision_among_the_arguments(older, expected, tmp_path) -> None:
    run = make_run(tmp_path / "a")
    make_probe(run, 50.0, name="new", protocol={"lr": 30.0, "amp": "off"})
    probe = make_probe(run, 70.0, name="old")
    (probe / "args.json").write_text(json.dumps({"pretrained": "x", **older}))
    (titles, cells), _ = compare(tmp_path)
    assert {t: c for t, c in zip(titles, cells, strict=True) if " last" in t} == expected


def test_no_mean_is_over_two_protocols(tmp_path) -> None:
    """Three seeds of one objective, each evaluated and measured otherwise, and each in two ways."""
    for seed in range(3):
        run = make_run(tmp_path / f"a{seed}", seed=seed)
        for probe_seed, top1 in ((0, 40.0), (1, 42.0)):
            protocol = {"lr": 10.0 + seed, "seed": probe_seed, "amp": "off"}
            name = f"lincls{probe_seed}"
            make_probe(run, top1 + seed, name=name, protocol=protocol)
        make_probe(run, 0, knn=60.0 + seed, name="knn", protocol={"lr": 9.0, "amp": "off"})
        path = tmp_path / f"a{seed}-knn" / "lincls.json"
        path.write_text(path.read_text().replace('"k": 200', f'"k": {seed}'))
        make_measure(run, 0.5 + seed, -1.0, images=100 * (1 + seed), data=f"/machine{seed}/val")
    rows, text = compare(tmp_path)
    for seed in range(3):
        title = f"linear last, lr 1{seed}.0"
        assert column(rows, title) == [f"{41 + seed:.2f} (of 1)"]
        assert f"⚠ {title}: a run's figure is the mean of up to 2 evaluations" in text
        assert column(rows, f"k-NN top-1, k {seed}") == [f"{60 + seed:.2f} (of 1)"]
        assert column(rows, f"alignment, images {100 * (1 + seed)}") == [f"{0.5 + seed:.3f} (of 1)"]
    assert "⚠ linear evaluation: lr is 9.0 or 10.0 or 11.0 or 12.0" in text
    assert "⚠ k-NN: k is 0 or 1 or 2" in text
    assert "⚠ alignment and uniformity: images is 100 or 200 or 300" in text
    rows, _ = compare(tmp_path / "a1", *tmp_path.glob("a1-*"))
    assert column(rows, "linear last, lr 11.0") == ["42.00 ± 1.41 (of 2)"]


def test_another_draw_of_the_same_share_of_labels_is_the_same_protocol(tmp_path) -> None:
    for seed in range(2):
        digest = f"{seed:012d}"
        make_probe(
            make_run(tmp_path / f"a{seed}", seed=seed),
            40.0 + 2 * seed,
            labels={"of": 1.0, "digest": digest},
            protocol={"lr": 1.0, "labels_digest": digest},
        )
    rows, _ = compare(tmp_path)
    assert column(rows, "linear last, 1 % of labels") == ["41.00 ± 1.41 (of 2)"]


def test_encoders_are_compared_by_one_protocol(tmp_path) -> None:
    for seed in range(3):
        run = make_run(tmp_path / f"a{seed}", seed=seed)
        make_probe(run, 40.0 + seed, protocol={"lr": 10.0 + seed}, name="own")
        make_probe(run, 50.0 + seed, evaluation="cached", name="cached")
    runs, _ = read_runs([tmp_path])
    name, accuracy = common_accuracy([(run, run.epochs) for run in runs])
    assert name == "cached top-1, last (%)"
    assert [accuracy(run, run.epochs) for run in runs] == [50.0, 51.0, 52.0]
    assert runs[0].value("linear last") == 40.0 and runs[0].value("linear last", 3) is None
