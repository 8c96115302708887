"""The plan: one set of numbers behind sampling, clipping, noise and accounting."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import FrozenInstanceError, replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from shared.errors import PrivacyError
from shared.job.job import Job
from shared.privacy import plan as plan_module
from shared.privacy import planned as planned_module
from shared.privacy.accounting import GaussianSteps, compose_epsilon
from shared.privacy.mechanism import CLIP_MARGIN, PlainSum
from shared.privacy.persons import Persons
from shared.privacy.plan import PrivacyPlan
from shared.privacy.randomness import SiteRandomness
from shared.privacy.sizes import declared_size, default_delta, least_delta_refused

JobBuilder = Callable[..., Any]
SHAPES = [torch.Size([100, 200]), torch.Size([7])]


def stream(name: str, purpose: str = "noise") -> Any:
    return SiteRandomness.injected(name).stream(purpose, round_number=1, step=0)


@pytest.fixture
def plan(classification_job: JobBuilder) -> PrivacyPlan:
    return PrivacyPlan.from_job(classification_job(privacy={"max_grad_norm": 0.3}))


def test_the_plan_is_the_job_s(classification_job: JobBuilder) -> None:
    job = classification_job(privacy={"noise_multiplier": 1.7, "sample_rate": 0.1, "max_grad_norm": 0.3})
    plan = PrivacyPlan.from_job(job)
    assert (plan.private, plan.unit) == (True, "record")
    assert (plan.noise_multiplier, plan.sample_rate, plan.max_grad_norm) == (1.7, 0.1, 0.3)
    assert (plan.delta, plan.planned_steps) == (1e-5, 6)
    with pytest.raises(FrozenInstanceError):
        plan.sample_rate = 0.5


@pytest.mark.parametrize("epsilon", [1.0, 8.0])
def test_noise_is_calibrated_to_the_target(classification_job: JobBuilder, epsilon: float) -> None:
    plan = PrivacyPlan.from_job(classification_job(privacy={"epsilon": epsilon}))
    assert epsilon * 0.99 <= plan.epsilon() <= epsilon
    assert plan.epsilon() == compose_epsilon([plan.mechanism(6)], plan.delta)
    assert plan.epsilon(3) < plan.epsilon() < plan.epsilon(12)
    assert plan.epsilon(0) == 0.0


def test_accounted_numbers_are_executed_numbers(plan: PrivacyPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    """`sample`, `new_sum` and `add_noise` use what `mechanism` accounts for, whatever the three numbers are."""
    for changed in (plan, replace(plan, sample_rate=0.11), replace(plan, noise_multiplier=2.5, max_grad_norm=4.0)):
        event = changed.mechanism(5)
        assert event == GaussianSteps(
            noise_multiplier=changed.noise_multiplier, sample_rate=changed.sample_rate, steps=5
        )
        used: dict[str, float] = {}
        with monkeypatch.context() as patch:
            patch.setattr(plan_module, "poisson_sample", lambda n, q, s: used.update(rate=q))  # noqa: B023
            patch.setattr(plan_module, "add_gaussian_noise", lambda t, std, s: used.update(std=std))  # noqa: B023
            patch.setattr(plan_module, "ClippedSum", lambda shapes, bound: used.update(bound=bound))  # noqa: B023
            changed.sample(10, stream("x"))
            changed.add_noise([], stream("x"))
            changed.new_sum(SHAPES)
        assert used["rate"] == event.sample_rate
        assert used["std"] / used["bound"] == pytest.approx(event.noise_multiplier, rel=1e-12)


def test_noise_is_calibrated_to_the_clipping_norm(plan: PrivacyPlan) -> None:
    """Standard deviation sigma C per coordinate, on an empty sum as on a full one; wrong scales are rejected."""
    for rows in (0, 3):
        total = plan.new_sum(SHAPES)
        if rows:
            total.add([torch.full((rows, *shape), 9.0) for shape in SHAPES])
        noisy = plan.add_noise(total.sums, stream(f"plan {rows}"))
        clean = torch.cat([part.flatten() for part in total.sums])
        noise = (torch.cat([part.flatten() for part in noisy]) - clean).numpy()
        assert float(clean.norm()) == pytest.approx(rows * CLIP_MARGIN * 0.3, rel=1e-7)  # cut to the grid
        for factor, right in ((1.0, True), (0.95, False), (1.05, False), (1 / 0.3, False), (0.3, False)):
            std = plan.noise_multiplier * plan.max_grad_norm * factor
            p = stats.chi2.cdf(float((noise**2).sum()) / std**2, noise.size)
            assert bool(1e-4 < p < 1 - 1e-4) is right


def test_sample_rate_does_not_depend_on_the_data(plan: PrivacyPlan) -> None:
    """Sites of 10 and of 100,000 records sample with the same, public rate: their samples grow with the data."""
    for num_records in (10, 1_000, 100_000):
        counts = [
            len(plan.sample(num_records, SiteRandomness.injected(str(k)).stream("sampling", round_number=1, step=0)))
            for k in range(30)
        ]
        trials = 30 * num_records
        assert stats.binomtest(int(np.sum(counts)), trials, plan.sample_rate).pvalue > 1e-4
        if num_records > 10:
            assert stats.binomtest(int(np.sum(counts)), trials, plan.sample_rate * 0.9).pvalue < 1e-4
    assert plan.sample(0, stream("none", "sampling")).size == 0


def test_the_divisor_is_public(plan: PrivacyPlan) -> None:
    assert plan.expected_batch_size(400) == plan.sample_rate * 400 == 100.0


def test_a_delta_that_would_allow_to_publish_a_record_is_refused(plan: PrivacyPlan) -> None:
    plan.check_size(99_999)
    plan.check_size(0)
    with pytest.raises(PrivacyError, match="below 1/n"):
        plan.check_size(100_000)
    replace(plan, private=False).check_size(10**9)


def test_a_plan_by_the_patient_needs_persons_and_counts_them(classification_job: JobBuilder) -> None:
    plan = PrivacyPlan.from_job(classification_job(privacy={"unit": "patient", "records_per_person": 4}))
    by_record = PrivacyPlan.from_job(classification_job())
    assert (plan.unit, plan.records_per_person) == ("patient", 4)
    assert plan.epsilon() == by_record.epsilon()  # the same accountant, with persons in the place of records
    persons = Persons.from_ids(["a", "b", "a"])
    plan.check_persons(persons)
    by_record.check_persons(None)
    with pytest.raises(PrivacyError, match="unit of privacy is the patient, but no persons are known; nothing"):
        plan.check_persons(None)
    with pytest.raises(PrivacyError, match="unit of privacy is the record, but records come with persons; nothing"):
        by_record.check_persons(persons)
    with pytest.raises(PrivacyError, match="with 100,000 patients it must be below"):
        plan.check_size(100_000)


def test_without_privacy_there_is_no_epsilon(classification_job: JobBuilder) -> None:
    plan = PrivacyPlan.from_job(classification_job(privacy={"mechanism": "none"}))
    assert (plan.private, plan.noise_multiplier) == (False, 0.0)
    assert isinstance(plan.new_sum(SHAPES), PlainSum)
    sums = [torch.ones(2, dtype=torch.float64)]
    assert torch.equal(plan.add_noise(sums, stream("plain"))[0], sums[0])
    for ask in (plan.epsilon, lambda: plan.mechanism(3)):
        with pytest.raises(PrivacyError, match="no epsilon"):
            ask()


@pytest.mark.parametrize(
    ("records", "bucket"), [(0, 0), (1, 1), (2, 2), (3, 2), (1023, 512), (1024, 1024), (1025, 1024)]
)
def test_declared_size_is_a_power_of_two_not_above(records: int, bucket: int) -> None:
    assert declared_size(records) == bucket


def test_a_delta_is_refused_from_one_over_twice_the_declared_size_on() -> None:
    assert [least_delta_refused(declared) for declared in (0, 1, 2, 64)] == [0.5, 0.5, 0.25, 1 / 128]


def test_a_noise_multiplier_of_a_mean_loss_of_a_thousand_is_the_last_to_have_an_epsilon(
    classification_job: JobBuilder,
) -> None:
    # Without sampling the mean loss is T / (2 sigma^2).
    privacy = classification_job(privacy={"noise_multiplier": 0.5, "sample_rate": 1.0}).privacy
    assert planned_module._noise_multiplier(privacy, 1.0, 500) == 0.5
    with pytest.raises(PrivacyError, match="rate 1 over 501 steps: it would be about a thousand or more"):
        planned_module._noise_multiplier(privacy, 1.0, 501)


def test_default_delta() -> None:
    assert default_delta(0) == default_delta(100) == default_delta(10_000) == 1e-5
    assert default_delta(1_000_000) == 1e-7
    assert default_delta(20_000) == 5e-6
    assert default_delta(10_003) == 9e-6  # one digit: 9.997e-06 would tell how many records there are


def test_noise_that_leaves_no_epsilon_is_refused_wherever_a_plan_is_made(
    classification_job: Callable[..., Job],
) -> None:
    """Scenario, policy and site all make their plan here, so a signed job cannot keep any of them busy."""
    job = classification_job(
        training={"rounds": 4000, "local_steps": 4000}, privacy={"noise_multiplier": 0.2, "sample_rate": 1.0}
    )
    with pytest.raises(PrivacyError, match=r"privacy\.noise_multiplier 0\.2 .* about a thousand or more"):
        PrivacyPlan.from_job(job)


def test_everything_that_is_planned_counts_site_metrics_too(classification_job: Callable[..., Job]) -> None:
    """The promise of a job is for its steps and its metrics together, in events, in epsilon and in calibrated noise."""
    metrics = {"names": ["accuracy", "loss"], "noise_multiplier": 3.0}
    plan = PrivacyPlan.from_job(classification_job(site_metrics=metrics, privacy={"noise_multiplier": 1.0}))
    without = classification_job(privacy={"noise_multiplier": 1.0})
    assert PrivacyPlan.from_job(without).metrics is None
    assert len(PrivacyPlan.from_job(without).events) == 1
    release = GaussianSteps(noise_multiplier=3.0, sample_rate=1.0, steps=2)
    assert plan.events == (plan.mechanism(plan.planned_steps), release)
    assert plan.epsilon() == compose_epsilon([plan.mechanism(plan.planned_steps), release], plan.delta)
    assert plan.epsilon() > plan.epsilon(plan.planned_steps)
    asked = PrivacyPlan.from_job(
        classification_job(site_metrics=metrics, privacy={"noise_multiplier": None, "epsilon": 4.0})
    )
    assert compose_epsilon(asked.events, asked.delta) <= 4.0
