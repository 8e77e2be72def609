"""scripts/theorem1.py: closed forms against sums, and the two rates of convergence."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import scipy.special
import torch
from helpers import refusal

from align_uniform import contrastive_loss
from moco.evaluate import theorem1
from scripts import theorem1 as script


@pytest.mark.parametrize("kappa", [0.0, 0.5, 4.0])
def test_samples_have_unit_rows_and_the_mean_of_their_distribution(kappa: float) -> None:
    rows = theorem1.sample(np.random.default_rng(0), 200_000, 5, kappa)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-12)
    mean = scipy.special.iv(2.5, kappa) / scipy.special.iv(1.5, kappa) if kappa else 0.0
    np.testing.assert_allclose(rows.mean(axis=0), [mean, 0, 0, 0, 0], atol=5e-3)
    assert theorem1.mean_similarity(5, kappa, 1.0) == pytest.approx(mean**2, abs=1e-9)
    assert theorem1.mean_similarity(5, kappa, 0.0) == 1


@pytest.mark.parametrize("kappa", [0.0, 3.0])
def test_the_potential_in_closed_form_is_the_mean_over_many_samples(kappa: float) -> None:
    rng = np.random.default_rng(1)
    anchors = theorem1.sample(rng, 4, 6, kappa)
    others = theorem1.sample(rng, 500_000, 6, kappa)
    means = np.log(np.exp(anchors @ others.T / 0.4).mean(axis=1))
    np.testing.assert_allclose(theorem1.log_potential(anchors, 0.4, kappa), means, atol=0.02)


def test_the_deviation_is_that_of_the_loss_users_train_with() -> None:
    """The mean over anchors, with the control variate put back, is InfoNCE - log M - limit."""
    args = theorem1.Theorem1()
    m, kappa = 512, 2.0
    deviation, _, second = theorem1.repeat(np.random.default_rng(3), m, kappa, args)

    rng = np.random.default_rng(3)  # the same draws again
    x = theorem1.sample(rng, theorem1.ANCHORS, args.dim, kappa)
    independent = rng.random(theorem1.ANCHORS) < args.unaligned
    other = theorem1.sample(rng, theorem1.ANCHORS, args.dim, kappa)
    y = np.where(independent[:, None], other, x)
    negatives = theorem1.sample(rng, m, args.dim, kappa)
    loss = contrastive_loss(*map(torch.from_numpy, (x, y, negatives.T)), args.tau).item()
    potential = theorem1.log_potential(x, args.tau, kappa)
    error = (np.exp(x @ negatives.T / args.tau).mean(axis=1) / np.exp(potential) - 1).mean()
    limit = second - (x * y).sum(axis=1).mean() / args.tau
    assert loss - math.log(m) - limit == pytest.approx(deviation + error, abs=1e-12)


def test_the_command_reports_both_rates(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "out"
    script.main(["--repeats", "60", "--negatives", *"64 256 1024 4096".split(), "--out", str(out)])
    assert "slope of the expected loss" in capsys.readouterr().out
    report = json.loads((out / "theorem1.json").read_text())
    for result in report["results"]:
        # About 1/M for the expected loss, M^(-1/2) per anchor, as the proof bounds it.
        expected, anchor = result["slope_of_the_expected_loss"], result["slope_per_anchor"]
        assert expected["low"] < expected["slope"] < expected["high"]
        assert expected["slope"] == pytest.approx(-1, abs=0.03)
        assert anchor["slope"] == pytest.approx(-0.5, abs=0.04)
        parts = result["alignment_part"] + result["uniformity_part"]
        assert result["limit"] == pytest.approx(parts, abs=1e-12)
        assert result["uniformity_part"] >= result["uniformity_of_the_uniform"] - 1e-9
    uniform = report["results"][0]
    assert uniform["uniformity_part"] == pytest.approx(uniform["uniformity_of_the_uniform"])
    by_m = {row["M"]: row["deviation"] for row in uniform["rows"]}
    # Figures of an independent trial with dimension 8 and tau 0.5 (issue 7).
    for m, deviation in ((64, 0.067), (256, 0.017), (1024, 0.0043)):
        assert by_m[m] == pytest.approx(deviation, rel=0.05)
    assert (out / "theorem1.png").stat().st_size > 10_000
    assert "<svg" in (out / "theorem1.svg").read_text()[:1000]


@pytest.mark.parametrize("flags", ["--tau 0", "--dim 1", "--negatives 8 16", "--unaligned 2"])
def test_impossible_arguments_are_refused(flags: str, capsys: pytest.CaptureFixture) -> None:
    status, line = refusal(script.main, flags.split(), capsys)
    assert status == 2 and "expected" in line
