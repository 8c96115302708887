"""Noise shares: the two promises of one job, and the jobs that could not keep them."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import ConfigError, PrivacyError
from shared.job.job import Job
from shared.job.parsing import parse
from shared.limits import MIN_NOISE_MULTIPLIER
from shared.privacy.accounting import (
    GaussianSteps,
    calibrate_noise_multiplier,
    compose_epsilon,
    noise_of_share,
    noise_of_sum,
)
from shared.privacy.plan import PrivacyPlan
from shared.privacy.randomness import SiteRandomness

# The plan of the demonstration.
STEPS, RATE, DELTA = 16, 0.125, 1e-5
SHARES = {"mechanism": "distributed", "sample_rate": RATE, "delta": DELTA, "max_colluding": 1, "epsilon_alone": 8.0}


def make_job(**sections: Any) -> Job:
    raw: dict[str, Any] = {
        "name": "shares",
        "task": {"kind": "sequence_classification", "labels": ["x", "y"]},
        "training": {"rounds": STEPS, "local_steps": 1},
        "privacy": SHARES | {"epsilon": 1.0, "spare_attempts": 0},
        "federation": {"min_sites": 5},
    }
    return parse(Job, raw | sections, source="job.toml")


def honest(count: int, **privacy: Any) -> PrivacyPlan:
    """Return the plan of a job with so many honest sites and no spare attempts."""
    privacy = SHARES | {"spare_attempts": 0} | privacy
    return PrivacyPlan.from_job(make_job(privacy=privacy, federation={"min_sites": count + privacy["max_colluding"]}))


# --- the noise ---


@given(sigma=st.floats(0.01, 1e4), count=st.integers(1, 10**7))
def test_the_noise_of_a_sum_is_never_above_that_of_its_shares(sigma: float, count: int) -> None:
    exact = Fraction(sigma) ** 2 * count
    found = noise_of_sum(sigma, count)
    assert Fraction(found) ** 2 <= exact < Fraction(math.nextafter(found, math.inf)) ** 2
    share = noise_of_share(sigma, count)
    assert Fraction(math.nextafter(share, 0.0)) ** 2 * count < Fraction(sigma) ** 2 <= Fraction(share) ** 2 * count
    assert noise_of_sum(share, count) >= sigma


def test_of_four_times_as_many_shares_the_noise_doubles_exactly() -> None:
    assert (noise_of_sum(1.2, 4), noise_of_share(1.2, 4), noise_of_sum(0.7, 1)) == (2.4, 0.6, 0.7)


@pytest.mark.parametrize(
    ("alone", "by_honest"),
    [
        (8.0, {2: 4.01, 4: 2.13, 6: 1.53, 14: 0.83, 67: 0.31}),
        (3.0, {2: 1.65, 4: 0.99, 6: 0.75, 14: 0.44, 67: 0.18}),
    ],
)
def test_what_the_sum_promises_where_each_upload_promises_enough(alone: float, by_honest: dict[int, float]) -> None:
    """Computed for the agreement by another program: the same noise and accuracy, told of the sum."""
    for count, epsilon in by_honest.items():
        plan = honest(count, epsilon=alone, epsilon_alone=alone)
        assert plan.epsilon() == pytest.approx(alone, rel=1e-3)
        assert plan.of_sum.epsilon() == pytest.approx(epsilon, abs=0.006)


@pytest.mark.parametrize(
    ("epsilon", "by_honest"), [(1.0, {2: 1.7, 4: 3.1, 6: 4.5, 14: 10.6, 67: 55}), (8.0, {2: 16, 4: 34, 6: 52})]
)
def test_what_one_upload_promises_where_the_sum_promises_enough(epsilon: float, by_honest: dict[int, float]) -> None:
    for count, alone in by_honest.items():
        plan = honest(count, epsilon=epsilon, epsilon_alone=1000.0)
        assert plan.of_sum.epsilon() == pytest.approx(epsilon, rel=1e-3)
        assert plan.epsilon() == pytest.approx(alone, rel=0.03)


def test_a_share_is_never_less_than_the_least_noise_that_a_job_can_ask_for() -> None:
    plan = honest(14, epsilon=8.0, epsilon_alone=1000.0)  # 125 for one upload would be enough
    assert plan.noise_multiplier == MIN_NOISE_MULTIPLIER
    assert plan.of_sum.epsilon() < 7.2


@pytest.mark.parametrize("alone", [1.0, 3.1, 8.0, 100.0])
@pytest.mark.parametrize("metrics", [(), ("accuracy", "loss")])
def test_both_promises_are_kept_with_the_least_noise(alone: float, metrics: tuple[str, ...]) -> None:
    asked = {"names": list(metrics), "noise_multiplier": 20.0}
    job = make_job(privacy=SHARES | {"epsilon": 1.0, "epsilon_alone": alone}, site_metrics=asked)
    plan = PrivacyPlan.from_job(job)
    assert plan.of_sum.epsilon() <= 1.0
    assert plan.epsilon() <= alone
    less = replace(plan, noise_multiplier=plan.noise_multiplier * 0.999)
    together = replace(plan.of_sum, noise_multiplier=plan.of_sum.noise_multiplier * 0.999)
    assert less.epsilon() > alone or together.epsilon() > 1.0
    # Metrics are no part of the sum: each site releases them by itself, with their own noise.
    released = () if not metrics else (GaussianSteps(noise_multiplier=20.0, sample_rate=1.0, steps=len(metrics)),)
    assert plan.of_sum.events[1:] == plan.events[1:] == released


def test_the_plan_is_the_job_s() -> None:
    job = make_job(privacy=SHARES | {"noise_multiplier": 0.75, "max_grad_norm": 0.3})
    plan = PrivacyPlan.from_job(job)
    assert (plan.honest, plan.of_sum.honest) == (4, None)
    assert (plan.noise_multiplier, plan.of_sum.noise_multiplier) == (0.75, 1.5)
    assert (plan.private, plan.sample_rate, plan.max_grad_norm) == (True, RATE, 0.3)
    assert (job.spare_attempts, plan.planned_steps, plan.of_sum.planned_steps) == (2, 18, 18)
    events = [GaussianSteps(noise_multiplier=sigma, sample_rate=RATE, steps=18) for sigma in (0.75, 1.5)]
    assert plan.epsilon() == compose_epsilon(events[:1], DELTA)
    assert plan.of_sum.epsilon() == compose_epsilon(events[1:], DELTA)


@pytest.mark.parametrize(
    ("rounds", "set_to", "spare"), [(16, None, 2), (10, None, 1), (1, None, 1), (16, 0, 0), (16, 40, 40)]
)
def test_spare_attempts_are_part_of_both_promises(rounds: int, set_to: int | None, spare: int) -> None:
    training = {"rounds": rounds, "local_steps": 1}
    job = make_job(training=training, privacy=SHARES | {"epsilon": 1.0, "spare_attempts": set_to})
    plan = PrivacyPlan.from_job(job)
    assert job.spare_attempts == spare
    assert plan.planned_steps == plan.of_sum.planned_steps == rounds + spare
    assert plan.of_sum.epsilon() == plan.of_sum.epsilon(rounds + spare)


def test_a_spare_attempt_costs_what_the_agreement_says() -> None:
    sigma = calibrate_noise_multiplier(epsilon=8.0, delta=DELTA, sample_rate=RATE, steps=STEPS)
    plan = honest(4, noise_multiplier=sigma, spare_attempts=1)
    assert plan.epsilon() == pytest.approx(8.18, abs=0.005)


def test_a_share_by_itself_is_never_added_as_if_it_were_all() -> None:
    """A path that knows nothing of shares must not release an update with a fraction of the noise."""
    plan = honest(4, epsilon=1.0)
    stream = SiteRandomness.injected("share").stream("noise", round_number=1, step=0)
    with pytest.raises(PrivacyError, match="nothing but a sum over sites may be released"):
        plan.add_noise([torch.zeros(3, dtype=torch.float64)], stream)
    assert plan.of_sum.add_noise([torch.zeros(3, dtype=torch.float64)], stream)


def test_other_jobs_have_no_shares() -> None:
    job = make_job(privacy={"epsilon": 1.0}, training={"rounds": 3, "local_steps": 4})
    plan = PrivacyPlan.from_job(job)
    assert (job.spare_attempts, job.charged_steps, plan.honest) == (0, 12, None)
    assert (plan.of_sum, plan.together(1)) == (plan, None)


# --- jobs ---


@pytest.mark.parametrize(
    ("sections", "reasons"),
    [
        ({"privacy": {"epsilon_alone": 8.0}}, ["epsilon_alone is for the mechanism 'distributed'", "is 'dp-sgd'"]),
        ({"privacy": {"max_colluding": 1, "spare_attempts": 1}}, ["remove max_colluding, spare_attempts"]),
        ({"privacy": {"mechanism": "none", "spare_attempts": 0}}, ["spare_attempts is for", "is 'none'"]),
        ({"privacy": SHARES | {"epsilon": 1.0, "max_colluding": None}}, ["max_colluding must say", "for example 1"]),
        ({"privacy": SHARES | {"epsilon": 1.0, "epsilon_alone": None}}, ["epsilon_alone must say", "for example 8"]),
        ({"privacy": SHARES | {"epsilon": 8.5}}, ["epsilon_alone is 8 and epsilon 8.5", "lower epsilon"]),
        ({"privacy": SHARES | {"unit": "site"}}, ["belong together"]),
        ({"privacy": SHARES | {"max_colluding": -1}}, ["privacy.max_colluding", "found -1"]),
        ({"privacy": SHARES | {"spare_attempts": 100_001}}, ["privacy.spare_attempts", "found 100001"]),
        ({"training": {"rounds": 16}}, ["training.local_steps is 4", "Set it to 1"]),
        ({"federation": {"min_sites": 2}}, ["min_sites is 2 and privacy.max_colluding 1", "to 3 or more"]),
        ({"federation": {}}, ["min_sites is 1", "to 3 or more"]),
        ({"federation": {"min_sites": 5, "sites_per_round": 4}}, ["federation.sites_per_round is 4"]),
        ({"federation": {"min_sites": 1001}}, ["federation.min_sites is 1,001", "at most 1,000 sites"]),
        (
            {"federation": {"min_sites": 5, "sites_per_round": 1001}},
            ["federation.sites_per_round is 1,001", "at most 1,000 sites"],
        ),
        ({"federation": {"min_sites": 5, "update_dtype": "int8"}}, ["federation.update_dtype is 'int8'", "Remove it"]),
        ({"aggregation": {"robust": "trimmed_mean"}}, ["aggregation.robust is 'trimmed_mean'", "Leave it at 'none'"]),
        ({"aggregation": {"server_optimizer": "adam"}}, ["aggregation.server_optimizer is 'adam'"]),
        ({"aggregation": {"server_learning_rate": 0.5}}, ["aggregation.server_learning_rate is 0.5"]),
        ({"aggregation": {"weights": "equal"}}, ["aggregation.", "leaving out the section"]),
        ({"aggregation": {"largest_share": 0.7}}, ["aggregation.largest_share is 0.7"]),
    ],
)
def test_jobs_that_could_not_keep_the_promises_are_refused(sections: dict[str, Any], reasons: list[str]) -> None:
    with pytest.raises(ConfigError) as refused:
        make_job(**sections)
    for reason in reasons:
        assert reason in str(refused.value)


@pytest.mark.parametrize(
    "sections",
    [
        {"lora": {"train": "both"}},
        {"privacy": SHARES | {"epsilon": 8.0}},
        {"privacy": SHARES | {"epsilon": 1.0, "unit": "patient", "records_per_person": 4}},
        {"privacy": {"mechanism": "distributed", "max_colluding": 0, "noise_multiplier": 1.0}},
        {"federation": {"min_sites": 3, "sites_per_round": 3}},
        {"site_metrics": {"names": ["accuracy"]}},
        {"training": {"rounds": 16, "local_steps": 1, "early_stopping": {"patience": 2}}},
    ],
)
def test_jobs_that_can_are_accepted_and_read_back(sections: dict[str, Any]) -> None:
    job = make_job(**sections)
    again = Job.model_validate_json(job.canonical_json())
    assert (again, again.sha256) == (job, job.sha256)
    assert PrivacyPlan.from_job(again).private


def test_what_is_not_set_is_not_written_out() -> None:
    text = make_job(privacy={"epsilon": 1.0}).canonical_json()
    assert not [key for key in ("epsilon_alone", "max_colluding", "spare_attempts") if key in text]
    text = make_job(privacy=SHARES | {"epsilon": 1.0}).canonical_json()
    assert '"max_colluding":1' in text
    assert "spare_attempts" not in text


def test_a_plan_keeps_how_many_sites_may_collude() -> None:
    for colluding in (0, 1, 2):
        job = make_job(privacy={**SHARES, "max_colluding": colluding, "epsilon": 4.0}, federation={"min_sites": 5})
        assert PrivacyPlan.from_job(job).colluding == colluding
