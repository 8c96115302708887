"""LiRA: its statistics against literal ones, and a verdict that needs no independence of records."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from shared.errors import PrivacyError
from shared.privacy.accounting import GaussianSteps
from simulations.audit.lira import (
    Rate,
    audit_lira,
    clopper_pearson,
    epsilon_from_rates,
    lira_scores,
    logit_confidence,
    roc,
    tpr_at_fpr,
)
from simulations.audit.one_run import Training
from simulations.audit.result import AuditResult

STEPS = GaussianSteps(noise_multiplier=1.5, sample_rate=0.25, steps=4)


def test_logit_confidence_is_finite_and_right() -> None:
    probability = np.array([0.5, 0.9, 0.01])
    np.testing.assert_allclose(
        logit_confidence(-np.log(probability)), np.log(probability / (1 - probability)), rtol=1e-9
    )
    assert np.isfinite(logit_confidence(np.array([0.0, 1e-300, 800.0]))).all()


@pytest.mark.parametrize(("hits", "trials"), [(0, 50), (3, 50), (50, 50)])
def test_clopper_pearson_limits_are_where_the_tails_are(hits: int, trials: int) -> None:
    rate = clopper_pearson(hits, trials, tail=0.005)
    assert rate.low <= rate.value <= rate.high
    if hits:
        assert stats.binom.sf(hits - 1, trials, rate.low) == pytest.approx(0.005)
    if hits < trials:
        assert stats.binom.cdf(hits, trials, rate.high) == pytest.approx(0.005)


def test_scores_of_records_that_are_out_are_standard_normal() -> None:
    rng = np.random.default_rng(0)
    inside = rng.random((64, 4000)) < 0.5
    shadows = rng.normal(loc=np.linspace(-5, 5, 4000), scale=2.0, size=(64, 4000)) + 3.0 * inside
    target = rng.normal(loc=np.linspace(-5, 5, 4000), scale=2.0)
    scores = lira_scores(target, shadows, inside)
    assert abs(scores.mean()) < 0.06
    assert scores.std() == pytest.approx(1.0, abs=0.04)


def test_a_record_that_is_in_every_shadow_model_is_refused() -> None:
    inside = np.ones((4, 3), dtype=bool)
    with pytest.raises(PrivacyError, match="use more shadow models"):
        lira_scores(np.zeros(3), np.zeros((4, 3)), inside)


def test_roc_and_rate_at_few_false_positives() -> None:
    scores = np.array([5.0, 4.0, 4.0, 3.0, 2.0, 1.0])
    included = np.array([True, True, False, True, False, False])
    false, true = roc(scores, included)
    np.testing.assert_allclose(false, [0, 0, 1 / 3, 1 / 3, 2 / 3, 1])
    np.testing.assert_allclose(true, [0, 1 / 3, 2 / 3, 1, 1, 1])
    assert tpr_at_fpr(scores, included, fpr=0.001, tail=0.01).value == pytest.approx(1 / 3)
    assert tpr_at_fpr(scores, included, fpr=0.34, tail=0.01).value == 1.0


def test_epsilon_from_rates_is_the_definition() -> None:
    true = Rate(hits=0, trials=0, low=0.3, high=1.0)
    false = Rate(hits=0, trials=0, low=0.0, high=0.01)
    assert epsilon_from_rates(true, false, delta=0.1) == pytest.approx(math.log(0.2 / 0.01))
    assert epsilon_from_rates(false, true, delta=0.1) == 0.0


def audit(shift: float, *, claim: float, seed: int = 0, size: int = 400) -> AuditResult:
    """Attack five models whose members score `shift` standard deviations higher."""
    rng = np.random.default_rng(seed)
    targets = []
    for _ in range(5):
        included = rng.random(size) < 0.5
        targets.append(Training(scores=rng.normal(size=size) + shift * included, included=included))
    return audit_lira(targets, STEPS, claim=claim, delta=1e-5, alpha=1e-3, audited="synthetic scores")


def test_verdicts() -> None:
    claim = 3.0
    assert audit(0.3, claim=claim).verdict == "consistent"
    leaking = audit(12.0, claim=claim)
    assert leaking.verdict == "violated"
    assert leaking.details["tpr_at_0.1%_fpr"] == 1.0
    assert 3.0 < leaking.lower_bound <= leaking.ceiling
    hopeless = audit(12.0, claim=200.0)
    assert hopeless.verdict == "inconclusive"
    assert "cannot falsify" in hopeless.reasons[0]
    assert "More attacked models (--trainings)" in hopeless.reasons[0]


def test_no_leak_is_consistent_in_99_of_100_repeats() -> None:
    results = [audit(0.0, claim=3.0, seed=seed) for seed in range(100)]
    assert sum(result.verdict == "consistent" for result in results) >= 99


def test_the_figure_that_assumes_independent_records_accuses_nobody() -> None:
    """One of five models recognises every member, as a mechanism with a small chance of failure may: no violation."""
    rng = np.random.default_rng(0)
    targets = []
    for shift in (20.0, 0.0, 0.0, 0.0, 0.0):
        included = rng.random(4000) < 0.5
        targets.append(Training(scores=np.clip(rng.normal(size=4000), -3, 3) + shift * included, included=included))
    result = audit_lira(targets, STEPS, claim=2.6, delta=1e-5, alpha=1e-3, audited="synthetic scores")
    assert result.details["epsilon_if_records_were_independent"] > 2.6 > result.lower_bound
    assert result.verdict == "inconclusive"
    assert "independent" in result.reasons[0]
