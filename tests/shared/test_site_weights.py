"""Weights of sites, their share of the noise, and when to warn about it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import ConfigError
from shared.job.federation import AggregationConfig
from shared.job.job import Job
from shared.job.parsing import parse
from shared.site_weights import SiteWeights, noise_warnings, site_shares

UNEVEN = [64, 128, 256, 512, 1024, 1024]
sizes_of_sites = st.lists(st.integers(1, 1 << 62), min_size=1, max_size=30)


def named(sizes: list[int]) -> dict[str, int]:
    return {f"site-{number}": size for number, size in enumerate(sizes, start=1)}


def config(**keys: Any) -> AggregationConfig:
    return AggregationConfig.model_validate(keys)


def test_a_site_counts_by_its_declared_size_unless_the_job_says_otherwise() -> None:
    assert [SiteWeights(UNEVEN, config()).of(size) for size in UNEVEN] == UNEVEN
    assert [SiteWeights(UNEVEN, config(weights="equal")).of(size) for size in UNEVEN] == [1] * 6
    squared = SiteWeights(UNEVEN, config(weights="inverse-variance"))
    assert [squared.of(size) for size in UNEVEN] == [size**2 for size in UNEVEN]


@pytest.mark.parametrize("kind", ["equal", "declared", "inverse-variance"])
def test_the_share_of_the_noise_is_what_a_simulated_mean_has(kind: str) -> None:
    """Draw the sites' noise, average it with the weights, and see whose part of the variance is how large."""
    weights = SiteWeights(UNEVEN, config(weights=kind))
    generator = np.random.default_rng(0)
    share = np.array([weights.of(size) for size in UNEVEN]) / weights.total
    noise = generator.normal(size=(200_000, 6)) / np.array(UNEVEN) * share
    measured = noise.var(axis=0) / noise.sum(axis=1).var()
    shares = site_shares(named(UNEVEN), config(weights=kind))
    assert [found.noise for found in shares] == pytest.approx(measured, abs=0.01)
    assert sum(found.noise for found in shares) == pytest.approx(1)
    assert sum(found.weight for found in shares) == pytest.approx(1)


@given(sizes=sizes_of_sites, limit=st.sampled_from([0.5, 0.6, 0.9]))
def test_whatever_a_site_declares_it_has_no_more_than_its_limit(sizes: list[int], limit: float) -> None:
    weights = SiteWeights(sizes, config(weights="declared", largest_share=limit))
    assert weights.total == sum(map(weights.of, sizes))
    assert all(weights.of(size) >= 1 for size in sizes)
    if len(sizes) > 2:
        assert max(map(weights.of, sizes)) <= max(limit * weights.total * (1 + 1e-9), 1)
    if len(sizes) == 2:
        assert [weights.of(size) for size in sizes] == sizes


def test_a_site_that_declares_a_huge_size_has_half_of_the_weight() -> None:
    shares = site_shares(named([1000, 1000, 1000, 4 * 10**18]), config())
    assert [share.weight for share in shares] == pytest.approx([1 / 6, 1 / 6, 1 / 6, 1 / 2])


def test_a_size_that_is_no_size_counts_as_one() -> None:
    assert SiteWeights([0, -5, 8], config(weights="declared")).total == 10


def test_a_site_with_a_share_of_the_noise_far_above_its_records_is_named() -> None:
    assert noise_warnings(named(UNEVEN), config()) == []
    assert noise_warnings(named([500] * 6), config(weights="equal")) == []
    assert noise_warnings(named([64]), config(weights="equal")) == []
    (warning,) = noise_warnings(named(UNEVEN), config(weights="equal"))
    assert warning.startswith("site-1 declares 64 records, 2.1% of all, but brings 74.9% of the noise of every round")
    assert 'Set aggregation.weights = "declared"' in warning
    (warning,) = noise_warnings(named([16, 2048]), config(weights="equal"))
    assert "site-1 declares 16 records" in warning


def job(**sections: Any) -> Job:
    task = {"kind": "sequence_classification", "labels": ["a", "b"]}
    return parse(Job, {"name": "j", "task": task, "training": {"rounds": 1}, **sections}, source="job")


def test_a_job_that_says_nothing_weighs_by_declared_size_and_writes_it_out() -> None:
    assert '"aggregation":{"largest_share":0.5,' in job().canonical_json()
    assert job().aggregation.weights == "declared"


@pytest.mark.parametrize("weights", ["equal", "declared"])
def test_a_job_that_an_older_version_wrote_keeps_its_hash_and_meaning(weights: str) -> None:
    """Older versions wrote `weights` out and knew no limit."""
    older = job(aggregation={"weights": weights})
    assert older.aggregation.largest_share is None
    assert '"largest_share"' not in older.canonical_json()
    again = parse(Job, older.model_dump(mode="json"), source="job.json")
    assert again == older
    assert again.sha256 == older.sha256


def test_sites_of_a_trusted_coordinator_count_the_same() -> None:
    privacy = {"mechanism": "central", "unit": "site", "delta": 1e-5, "central": {"num_sites": 100}}
    central = job(privacy=privacy, federation={"min_sites": 100})
    assert central.aggregation.weights == "equal"
    assert '"largest_share"' not in central.canonical_json()
    for key, value in (("weights", "declared"), ("weights", "inverse-variance"), ("largest_share", 0.5)):
        with pytest.raises(ConfigError, match=f"aggregation.{key} {value!r} would change what one site can add"):
            job(privacy=privacy, federation={"min_sites": 100}, aggregation={key: value})
