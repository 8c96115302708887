"""Site metrics: one unit of privacy, one vote; the noise that is accounted for; what can be read off noisy counts."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from shared.errors import ConfigError, PrivacyError
from shared.job.compute import ComputeConfig
from shared.job.job import Job
from shared.job.parsing import parse
from shared.job.privacy import METRICS
from shared.privacy.accounting import compose_epsilon
from shared.privacy.plan import PrivacyPlan
from shared.privacy.randomness import SiteRandomness
from shared.runtime.runtime import load_runtime
from shared.runtime.site_metrics import cast_votes, count_votes, estimate, noisy_counts, num_bins, votes

LABELS = ["a", "b", "c"]


def make_job(*names: str, **changes: Any) -> Job:
    raw = {
        "name": "metrics",
        "task": {"kind": "sequence_classification", "labels": LABELS},
        "training": {"rounds": 2},
        "site_metrics": {"names": list(names), **changes},
    }
    return parse(Job, raw, source="test")


JOB = make_job(*METRICS)
losses = st.lists(st.floats(allow_nan=True, allow_infinity=True, width=32), min_size=1, max_size=40)


@settings(max_examples=200, deadline=None)
@given(losses=losses, data=st.data())
def test_one_unit_moves_the_counts_by_at_most_one_vote(losses: list[float], data: st.DataObject) -> None:
    size = len(losses)
    classes = [
        torch.tensor(data.draw(st.lists(st.integers(0, len(LABELS) - 1), min_size=size, max_size=size)))
        for _ in range(2)
    ]
    owners = np.array(data.draw(st.lists(st.integers(0, 4), min_size=size, max_size=size)), dtype=np.intp)
    gone = data.draw(st.sampled_from(sorted(set(owners.tolist()))))
    for metric in METRICS:
        cast = votes(metric, JOB, losses=torch.tensor(losses), classes=(classes[0], classes[1]))
        assert cast.shape == (size, num_bins(metric, JOB))
        assert bool((cast >= 0).all())
        assert torch.allclose(cast.sum(dim=1), torch.ones(size, dtype=torch.float64))
        # One record.
        moved = count_votes(cast) - count_votes(cast[1:])
        assert 0.3 < float(moved.norm()) <= 1.0
        # One person with all records.
        rest = torch.from_numpy(owners != gone)
        moved = count_votes(cast, owners) - count_votes(cast[rest], owners[owners != gone])
        assert 0.3 < float(moved.norm()) <= 1.0


def test_a_vote_does_not_depend_on_other_records(
    classification_job: Callable[..., Job], records: list[dict[str, Any]]
) -> None:
    job = classification_job(site_metrics={"names": ["accuracy", "loss"]})
    runtime = load_runtime(job, ComputeConfig(device="cpu", precision="float32"))
    runtime.load(runtime.initial)
    examples = runtime.encode(records)
    together = cast_votes(runtime, examples, job)
    without = cast_votes(runtime, [*examples[:7], *examples[8:]], job)
    for name, cast in together.items():
        assert torch.equal(torch.cat([cast[:7], cast[8:]]), without[name])
    assert 0 < float(together["accuracy"][:, 0].sum()) < len(records)


def test_the_noise_has_the_stated_standard_deviation() -> None:
    counts, sigma = torch.tensor([40.0, 2.0, 0.0], dtype=torch.float64), 3.0
    drawn = np.array(
        [
            noisy_counts(
                counts,
                noise_multiplier=sigma,
                stream=SiteRandomness.injected(f"{i}").stream("noise", round_number=1, step=0),
            )
            for i in range(1500)
        ]
    )
    scores = (drawn - counts.numpy()) / sigma
    assert stats.kstest(scores.ravel(), "norm").pvalue > 1e-4
    assert abs(np.corrcoef(scores.T) - np.eye(3)).max() < 0.12
    assert np.all(drawn * 1024 == np.round(drawn * 1024)), "the last bits of a sum could tell it"


@pytest.mark.parametrize("metric", sorted(METRICS))
def test_an_estimate_finds_the_metric_within_its_error(metric: str) -> None:
    job, generator, sites, records, share = (
        make_job(metric, noise_multiplier=8.0),
        np.random.default_rng(7),
        4,
        250,
        0.7,
    )
    covered = 0
    for _ in range(300):
        counts = []
        for _ in range(sites):
            hits = generator.binomial(records, share)
            exact = np.array([hits, records - hits], dtype=float)
            if metric == "confusion":
                exact = np.zeros((3, 3))
                exact[0, 0], exact[1, 1], exact[2, 1] = hits / 2, hits / 2, records - hits
            counts.append((exact.ravel() + generator.normal(0, 8.0, exact.size)).tolist())
        found = estimate(metric, counts, job)
        assert found.value is not None
        assert found.standard_error is not None
        scale = job.site_metrics.largest_loss if metric == "loss" else 1.0
        covered += abs(found.value - share * scale) < 1.96 * found.standard_error
    assert 270 <= covered <= 299


def test_too_few_votes_for_the_noise_give_no_number() -> None:
    job = make_job("accuracy", noise_multiplier=10.0)
    assert estimate("accuracy", [[12.0, 8.0]], job).value is None
    assert estimate("accuracy", [[-30.0, 8.0]], job).value is None
    assert estimate("accuracy", [[60.0, 40.0]], job).value == 0.6


def test_the_plan_pays_for_the_metrics() -> None:
    plain, asked = (
        PrivacyPlan.from_job(make_job(*names, noise_multiplier=5.0)) for names in ((), ("accuracy", "loss"))
    )
    assert plain.metrics is None
    assert asked.metrics is not None
    assert (asked.metrics.noise_multiplier, asked.metrics.sample_rate, asked.metrics.steps) == (5.0, 1.0, 2)
    assert asked.noise_multiplier > plain.noise_multiplier
    for plan in (plain, asked):
        assert 7.9 < plan.epsilon() <= 8.0
    training = compose_epsilon([asked.mechanism(asked.planned_steps)], asked.delta)
    assert training < 7.95
    assert asked.epsilon() == compose_epsilon([*asked.events], asked.delta)


def test_metrics_that_cost_more_than_the_budget_are_refused() -> None:
    with pytest.raises(PrivacyError, match=r"besides its steps alone costs epsilon .* site_metrics.noise_multiplier"):
        PrivacyPlan.from_job(make_job("accuracy", noise_multiplier=0.3))


def test_a_job_that_cannot_release_them_is_refused(language_job: Callable[..., Job]) -> None:
    with pytest.raises(ConfigError, match="has no classes"):
        language_job(site_metrics={"names": ["accuracy"]})
    with pytest.raises(ConfigError, match="charges nothing"):
        language_job(site_metrics={"names": ["loss"]}, privacy={"mechanism": "none"})
    with pytest.raises(ConfigError, match="name each once"):
        make_job("loss", "loss")


def test_a_job_without_them_keeps_the_hash_that_it_had() -> None:
    assert "site_metrics" not in make_job().canonical_json()
    assert "site_metrics" in make_job("loss").canonical_json()
    assert math.isfinite(make_job("loss").site_metrics.largest_loss)
