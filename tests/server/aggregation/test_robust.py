"""Robust rules: what each is, that order changes nothing, that memory is bounded, and what one poisoned update can do."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from server.aggregation import Aggregation
from server.aggregation import robust as robust_module
from server.aggregation.robust import (
    RobustMean,
    centred_clipping,
    geometric_median,
    robust_mean,
    trimmed_mean,
    weighted_median,
)
from server.rounds.loop import run_rounds
from shared.errors import AdapterError, ConfigError
from shared.job.federation import AggregationConfig, RobustRule
from shared.tensors.adapters import encode
from tests.server.rounds.central_sites import make_job as central_job
from tests.server.rounds.test_loop import INITIAL, UPDATES, coordinator, grid_of, lying, make_job

RULES: tuple[RobustRule, ...] = ("trimmed_mean", "geometric_median", "centred_clipping")
SHAPES = {"b": torch.Size([3]), "w": torch.Size([4, 5])}
START = {name: torch.zeros(shape) for name, shape in SHAPES.items()}


def rows_of(seed: int, count: int, size: int = 23) -> list[Any]:
    return list(np.random.default_rng(seed).normal(size=(count, size)).astype(np.float32))


def equal(count: int) -> Any:
    return np.full(count, 1 / count)


def aggregated(
    rule: RobustRule, updates: Sequence[dict[str, torch.Tensor]], sizes: Sequence[int]
) -> dict[str, torch.Tensor]:
    config = AggregationConfig(robust=rule)
    made = Aggregation(START, {}, SHAPES, sizes, config=config, exact_scaling=None)
    for update, size in zip(updates, sizes, strict=True):
        made.add(update, size)
    return made.result()[0]


def updates_of(seed: int, count: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [{name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()} for _ in range(count)]


@pytest.mark.parametrize("rule", RULES)
def test_the_order_of_arrivals_changes_no_bit(rule: RobustRule) -> None:
    updates, sizes = updates_of(0, 4), [64, 64, 256, 512]
    expected = aggregated(rule, updates, sizes)
    for order in itertools.permutations(range(4)):
        found = aggregated(rule, [updates[i] for i in order], [sizes[i] for i in order])
        assert all(torch.equal(found[name], expected[name]) for name in SHAPES)


@pytest.mark.parametrize("rule", RULES)
def test_of_equal_updates_it_is_that_update(rule: RobustRule) -> None:
    rows = [rows_of(1, 1)[0]] * 5
    np.testing.assert_allclose(
        robust_mean(rule, rows, equal(5), trim=0.2), rows[0], rtol=1e-3 if rule[0] == "c" else 1e-6
    )
    single = robust_mean(rule, rows[:1], equal(1), trim=0.2)
    np.testing.assert_allclose(single, rows[0], rtol=1e-6)


@pytest.mark.parametrize("rule", RULES)
def test_no_value_leaves_what_the_sites_sent_and_zero(rule: RobustRule) -> None:
    """The bounds by which sites judge an adapter hold for means of updates, and so for these."""
    for seed in range(5):
        rows = rows_of(seed, 6)
        found = robust_mean(rule, rows, equal(6), trim=0.2)
        assert (found <= np.maximum(np.max(rows, axis=0), 0) + 1e-9).all()
        assert (found >= np.minimum(np.min(rows, axis=0), 0) - 1e-9).all()


@pytest.mark.parametrize("rule", RULES)
def test_one_of_six_sites_moves_the_result_no_further_than_the_others_lie_apart(rule: RobustRule) -> None:
    honest = [row + 3 for row in rows_of(2, 5)]
    mean = np.mean(honest, axis=0)
    apart = max(np.linalg.norm(row - mean) for row in honest)
    for poison in (1e3, -1e3, 1e6):
        bad = np.full(23, poison, np.float32)
        found = robust_mean(rule, [*honest, bad], equal(6), trim=0.2)
        assert np.linalg.norm(found - mean) < apart
        assert np.linalg.norm(np.mean([*honest, bad], axis=0) - mean) > 100 * apart


def test_the_trimmed_mean_is_the_one_of_yin_et_al() -> None:
    rows = rows_of(3, 5)
    expected = np.sort(np.array(rows, np.float64), axis=0)[1:-1].mean(axis=0)
    np.testing.assert_allclose(trimmed_mean(rows, equal(5), 0.2), expected, rtol=1e-9)
    # By weight: three sites of which one has half of it; a quarter is cut off at either end.
    values = [np.array([value], np.float32) for value in (1.0, 2.0, 10.0)]
    weights = np.array([0.5, 0.25, 0.25])
    assert trimmed_mean(values, weights, 0.25) == pytest.approx((0.25 * 1 + 0.25 * 2) / 0.5)


@given(seed=st.integers(0, 1000), count=st.integers(1, 7), block=st.sampled_from([3, 1 << 14]))
@settings(max_examples=20, deadline=None)
def test_the_trimmed_mean_does_not_depend_on_how_it_is_cut(seed: int, count: int, block: int) -> None:
    rows, weights = rows_of(seed, count), np.random.default_rng(seed).dirichlet(np.ones(count))
    expected = trimmed_mean(rows, weights, 0.1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(robust_module, "_BLOCK", block)
        assert np.array_equal(trimmed_mean(rows, weights, 0.1), expected)


def test_the_geometric_median_has_the_least_sum_of_distances() -> None:
    for seed in range(5):
        rows, weights = rows_of(seed, 6, 4), np.random.default_rng(seed).dirichlet(np.ones(6) * 5)

        def total(centre: Any, rows: Any = rows, weights: Any = weights) -> float:
            return float(sum(w * np.linalg.norm(row - centre) for w, row in zip(weights, rows, strict=True)))

        best = minimize(
            total, np.zeros(4), method="Nelder-Mead", options={"xatol": 1e-7, "fatol": 1e-10, "maxiter": 20_000}
        )
        assert total(geometric_median(rows, weights)) <= best.fun + 1e-3
    # Where more than half of the weight is at one point, it is that point.
    same = rows_of(9, 1)[0]
    found = geometric_median([same, same, same, *rows_of(10, 2)], equal(5))
    np.testing.assert_allclose(found, same, atol=1e-4)


def test_centred_clipping_stands_where_the_clipped_updates_cancel() -> None:
    rows, weights = [row + 5 for row in rows_of(4, 6)], equal(6)
    centre = centred_clipping(rows, weights)
    distances = np.array([np.linalg.norm(row - centre) for row in rows])
    radius = weighted_median(distances, weights)
    pull = sum(w * (row - centre) * min(1.0, radius / d) for w, row, d in zip(weights, rows, distances, strict=True))
    assert np.linalg.norm(pull) < 0.01 * np.linalg.norm(rows[0])


def test_the_weighted_median() -> None:
    values = np.array([3.0, 1.0, 2.0])
    assert weighted_median(values, equal(3)) == 2.0
    assert weighted_median(values, np.array([0.6, 0.2, 0.2])) == 3.0
    assert weighted_median(values, np.array([0.2, 0.5, 0.3])) == 1.0


@pytest.mark.parametrize("rule", RULES)
def test_what_is_kept_is_bounded(rule: RobustRule, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(robust_module, "MOST_BYTES", 4 * 23 * 10)
    RobustMean(rule, SHAPES, 10, num_sites=10, trim=0.2)
    with pytest.raises(ConfigError, match=r"keeps the updates of all sites .*Set federation\.sites_per_round"):
        RobustMean(rule, SHAPES, 11, num_sites=11, trim=0.2)


def test_what_a_mean_refuses_is_refused() -> None:
    rule = RobustMean("geometric_median", SHAPES, 3, num_sites=3, trim=0.2)
    with pytest.raises(AdapterError, match="expected at most 4096"):
        rule.add({name: torch.full(shape, 1e4) for name, shape in SHAPES.items()}, 1)
    with pytest.raises(ValueError, match="no update was added"):
        rule.result()


@pytest.mark.parametrize("rule", RULES)
def test_a_run_by_a_rule(rule: RobustRule) -> None:
    job = make_job(aggregation={"robust": rule})
    last = run_rounds(grid_of(), coordinator(job), None)
    assert last.history[-1].sites == ["a", "b", "c"]
    assert 0 < float(last.adapter["w"][0, 0]) < 12
    # One site sends as much as the bounds let through, against the others.
    against = {"w": torch.full((2, 3), -15.0), "head.b": torch.zeros(2)}
    names = ["a", "b", "c", "d", "e", "f"]
    poisoned = run_rounds(grid_of({"f": lying(update=encode(against))}, names=names), coordinator(job), None)
    mean = run_rounds(grid_of({"f": lying(update=encode(against))}, names=names), coordinator(make_job()), None)
    assert float(mean.adapter["w"][0, 0]) < 0 < float(poisoned.adapter["w"][0, 0])
    assert UPDATES["a"]["w"][0, 0] > 0
    assert INITIAL["w"][0, 0] == 0


def test_a_rule_needs_updates_that_add_up_and_leaves_old_jobs_their_hash() -> None:
    with pytest.raises(
        ConfigError, match=r"acts on updates, but with lora\.train 'both' products of them are averaged"
    ):
        make_job(lora={"train": "both"}, aggregation={"robust": "geometric_median"})
    assert make_job(aggregation={"robust": "none", "trim": 0.2}).sha256 == make_job(aggregation={}).sha256
    for key, value in (("robust", "trimmed_mean"), ("trim", 0.1)):  # what one site can add is bounded by clipping there
        with pytest.raises(ConfigError, match=f"aggregation.{key} .* would change what one site can add"):
            central_job(aggregation={"weights": "equal", key: value})
    with pytest.raises(ConfigError, match="trim"):
        make_job(aggregation={"robust": "trimmed_mean", "trim": 0.5})
