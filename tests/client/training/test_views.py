"""Several views of a record: their mean gradient is clipped, once, as the record's (`training.augmentation`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import client.training.trainer as trainer_module
from client.training.trainer import LocalWork, clipped_sums, draw, per_example_hooks, pool_of
from shared.errors import ConfigError
from shared.job.compute import ComputeConfig
from shared.job.job import Job
from shared.models.batches import Example
from shared.privacy.persons import Persons, PersonSum
from shared.privacy.plan import PrivacyPlan
from shared.privacy.randomness import SiteRandomness
from shared.runtime.runtime import Runtime, load_runtime
from shared.tasks.views import views_of
from tests.client.training.test_person_faults import ClippedPerMicroBatch, ClippedPerRecord
from tests.client.training.test_trainer import plain_gradients

CPU = ComputeConfig(device="cpu", precision="float32", micro_batch_tokens=64)
VIEWS = 4


@pytest.fixture
def job(classification_job: Callable[..., Any]) -> Job:
    found: Job = classification_job(
        training={"augmentation": {"views": VIEWS, "token_dropout": 0.3}}, privacy={"sample_rate": 1.0}
    )
    return found


@pytest.fixture
def runtime(job: Job) -> Runtime:
    return load_runtime(job, CPU)


def work_of(runtime: Runtime, job: Job, records: Sequence[Any], persons: Persons | None = None) -> LocalWork:
    examples = runtime.encode(records)
    return LocalWork(
        examples=examples,
        declared_records=len(examples),
        randomness=SiteRandomness.injected("views"),
        persons=persons,
        views=views_of(examples, job, runtime.tokenizer),
    )


def sums(runtime: Runtime, plan: PrivacyPlan, *works: LocalWork) -> list[Tensor]:
    """The clipped sum of each site, flat, float64."""
    runtime.load(runtime.initial)
    values = {
        parameter: parameter.detach().repeat(len(works), *[1] * parameter.ndim)
        for parameter in runtime.model.parameters()
        if parameter.requires_grad
    }
    with per_example_hooks(runtime.model, values if len(works) > 1 else None) as hooks:
        drawn = [draw(plan, replace(work, randomness=SiteRandomness.injected("views")), 1, 0) for work in works]
        totals, _ = clipped_sums(runtime, pool_of(works), works, drawn, plan, hooks)
    return [torch.cat([part.flatten() for part in total.sums]).double() for total in totals]


def by_hand(runtime: Runtime, plan: PrivacyPlan, groups: Sequence[Sequence[Example]]) -> Tensor:
    """Mean over a group, clipped, summed over groups; every gradient by plain autograd, alone."""
    runtime.load(runtime.initial)
    total = torch.zeros(0)
    for group in groups:
        mean = torch.cat([value.double().mean(dim=0).flatten() for value in plain_gradients(runtime, group).values()])
        clipped = mean * min(1.0, plan.max_grad_norm / float(mean.norm()))
        total = clipped if not len(total) else total + clipped
    return total


@pytest.mark.parametrize("max_grad_norm", [0.05, 100.0])
@pytest.mark.parametrize("by_person", [False, True])
def test_the_mean_over_all_views_is_clipped(
    runtime: Runtime, job: Job, records: list[dict[str, Any]], max_grad_norm: float, by_person: bool
) -> None:
    persons = Persons.from_ids(["a", "b", "a", "b", "c", "a", "c"]) if by_person else None
    work = work_of(runtime, job, records[:7], persons)
    plan = replace(PrivacyPlan.from_job(job), max_grad_norm=max_grad_norm)
    if by_person:
        plan = replace(plan, unit="patient", records_per_person=9)
    groups = [[0, 2, 5], [1, 3], [4, 6]] if by_person else [[row] for row in range(7)]
    every = [[work.examples[r], *work.views[(VIEWS - 1) * r : (VIEWS - 1) * (r + 1)]] for r in range(7)]
    expected = by_hand(runtime, plan, [[one for row in group for one in every[row]] for group in groups])
    (found,) = sums(runtime, plan, work)
    assert float((found - expected).norm()) <= 1e-4 * float(expected.norm())


def test_sites_side_by_side_get_what_they_get_alone(runtime: Runtime, job: Job, records: list[dict[str, Any]]) -> None:
    plan = PrivacyPlan.from_job(job)
    works = [work_of(runtime, job, records[:3]), work_of(runtime, job, records[5:10])]
    for alone, together in zip(
        [sums(runtime, plan, work)[0] for work in works], sums(runtime, plan, *works), strict=True
    ):
        assert float((alone - together).norm()) <= 1e-5 * float(alone.norm())


def test_one_record_more_moves_the_sum_by_what_it_is_alone(
    runtime: Runtime, job: Job, records: list[dict[str, Any]]
) -> None:
    plan = replace(PrivacyPlan.from_job(job), max_grad_norm=0.05)
    (with_it,), (without,) = (sums(runtime, plan, work_of(runtime, job, records[:count])) for count in (6, 5))
    assert float((with_it - without).norm()) <= plan.max_grad_norm


@pytest.mark.parametrize("fault", [ClippedPerRecord, ClippedPerMicroBatch])
def test_fault_views_are_clipped_one_by_one(
    runtime: Runtime, job: Job, records: list[dict[str, Any]], fault: type[PersonSum], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = replace(PrivacyPlan.from_job(job), max_grad_norm=0.05)
    work = work_of(runtime, job, records[2:3])
    assert float(sums(runtime, plan, work)[0].norm()) <= plan.max_grad_norm
    monkeypatch.setattr(trainer_module, "PersonSum", fault)
    assert float(sums(runtime, plan, work)[0].norm()) > 1.5 * plan.max_grad_norm


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"views": 1}, "greater than or equal to 2"),
        ({"views": 2, "token_dropout": 1.0}, "less than 1"),
        ({"views": 2, "shift": 1}, "training.augmentation.shift is not for sequence_classification"),
    ],
)
def test_settings_that_will_not_do(
    settings: dict[str, Any], message: str, classification_job: Callable[..., Any], language_job: Callable[..., Any]
) -> None:
    with pytest.raises(ConfigError, match=message):
        classification_job(training={"augmentation": settings})
    with pytest.raises(ConfigError, match="'causal_lm'; remove it"):
        language_job(training={"augmentation": {"views": 2}})
