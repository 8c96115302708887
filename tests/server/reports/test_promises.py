"""What stands beside a run's epsilon: the second promise of shared noise, or what sharing would make of the first."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from server.records.privacy import SiteRecord
from server.reports.run.promises import promise_beside
from server.reports.run.run_data import Arm
from shared.privacy.accounting import GaussianSteps, calibrate_noise_multiplier, compose_epsilon
from shared.privacy.shared_noise import SharedNoise
from shared.privacy.statement import SiteRelease

DEMO = {"epsilon": 8.0, "delta": 1e-5, "sample_rate": 0.125, "steps": 16}


def release(name: str, **changes: Any) -> SiteRelease:
    noise = calibrate_noise_multiplier(**DEMO)
    found = SiteRelease(
        site=name,
        delta=1e-5,
        max_grad_norm=1.0,
        declared_records=1024,
        randomness="os",
        epsilon_budget=8.0,
        steps_planned=16,
        events=(GaussianSteps(noise_multiplier=noise, sample_rate=0.125, steps=16),),
        rounds=(1, 2, 3, 4),
        updates=("a" * 64,) * 4,
    )
    return replace(found, **changes)


def arm_of(releases: list[SiteRelease]) -> Arm:
    sites = tuple(SiteRecord.of(one, "run") for one in releases)
    return Arm(name="federated", job={}, private=True, rounds=(), evaluation=None, sites=sites)


def test_the_demo_would_have_another_epsilon_were_its_noise_shared() -> None:
    found = promise_beside(arm_of([release(f"site-{n}") for n in range(8)]))
    assert found is not None
    assert found.title == "Epsilon, were the noise shared"
    assert 1.53 <= float(found.value) <= 1.54  # the agreement's table: six honest sites of eight
    assert "up to 2 sites that work with it" in found.note


def test_metrics_count_with_their_own_noise() -> None:
    metrics = GaussianSteps(noise_multiplier=1.0, sample_rate=1.0, steps=1)
    told = {"metrics": ("accuracy",), "metrics_mechanism": metrics, "metrics_sha256": "b" * 64}
    found = promise_beside(arm_of([release(f"site-{n}", **told) for n in range(8)]))
    assert found is not None
    assert float(found.value) >= compose_epsilon([metrics], 1e-5)


def test_of_shares_the_second_promise_is_told() -> None:
    shared = SharedNoise(honest=6, colluding=2)
    releases = [release(f"site-{n}", shared=shared) for n in range(8)]
    found = promise_beside(arm_of(releases))
    assert found is not None
    assert found.title == "Epsilon of an upload alone"
    assert float(found.value) == pytest.approx(8.0, abs=0.02)
    assert 1.5 < releases[0].epsilon_stated(stopped_early=False) < 1.6


@pytest.mark.parametrize(
    "releases",
    [
        [],
        [release("a"), release("b"), release("c")],
        [release(f"site-{n}", randomness="injected") for n in range(8)],
        [release(f"site-{n}", private=False, events=()) for n in range(8)],
    ],
    ids=["nobody", "too few", "test randomness", "no noise"],
)
def test_where_nothing_can_be_said_nothing_is(releases: list[SiteRelease]) -> None:
    assert promise_beside(arm_of(releases)) is None
