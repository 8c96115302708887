"""How long an opened sum can be: what honest sites add up to passes, what a site makes up does not; sites follow what passes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chi2, norm

from client.training.adapter_bounds import AdapterBounds, check_bounds
from server.rounds.loop import run_rounds
from server.rounds.secure.sum_bounds import SumBounds
from server.rounds.update_bounds import longest_noise
from shared.errors import AdapterError, RunHeld
from shared.limits import MAX_ADAPTER_VALUE
from shared.privacy.plan import PrivacyPlan
from shared.privacy.randomness import SiteRandomness
from shared.privacy.shares import GRID_STEPS, share_variance, with_share
from tests.server.rounds.secure.secure_sites import SimpleSite, grid_of, secure_job
from tests.server.rounds.secure.test_round import coordinator

WORDS = 500


def plan_of(**privacy: Any) -> PrivacyPlan:
    return PrivacyPlan.from_job(secure_job(privacy=privacy))


def opened(plan: PrivacyPlan, units: list[int], direction: np.ndarray, seed: int) -> np.ndarray:
    """The sum of sites of which so many units were drawn, all of whose gradients point the same way."""
    total = np.zeros(len(direction), np.uint64)
    for site, count in enumerate(units):
        clipped = np.trunc(direction / np.linalg.norm(direction) * GRID_STEPS).astype(np.int64) * count
        stream = SiteRandomness.injected(f"{seed}/{site}").stream("noise", round_number=1, step=1)
        total += with_share(clipped, noise_multiplier=plan.noise_multiplier, stream=stream)
    return total.view(np.int64)


@pytest.mark.parametrize("rate", [0.25, 1.0])
@pytest.mark.parametrize("declared", [[1, 1], [8, 40, 8], [1000] * 20])
def test_what_honest_sites_add_up_to_passes(rate: float, declared: list[int]) -> None:
    plan, rng = plan_of(sample_rate=rate), np.random.default_rng(0)
    bounds = SumBounds(plan, declared, WORDS)
    for seed in range(10):
        # As many units as a site can have, in one coordinate or in all of them.
        units = [int(rng.binomial(2 * size - 1, rate)) for size in declared]
        for direction in (np.eye(1, WORDS)[0], np.ones(WORDS), -np.eye(1, WORDS)[0]):
            assert bounds.problem(opened(plan, units, direction, seed)) is None


@pytest.mark.parametrize("words", [1, 8, 500, 37_000, 1 << 24])
@pytest.mark.parametrize("sites", [2, 100])
def test_the_bounds_are_those_of_the_noise_and_of_all_units(words: int, sites: int) -> None:
    """With probability one every unit is drawn; then only the noise is left to chance, which is compared with its quantiles."""
    plan = plan_of(sample_rate=1.0, noise_multiplier=3.0)
    bounds = SumBounds(plan, [1] * sites, words)
    signal, deviation = sites * GRID_STEPS, math.sqrt(sites * share_variance(3.0))
    length, largest = ((bound - signal) / deviation for bound in (bounds.norm, bounds.coordinate))
    # Each of both with the probability of one of three events.
    assert length == pytest.approx(longest_noise(words, 1e-10), rel=1e-9)
    assert largest == pytest.approx(math.sqrt(2 * math.log(2 * words / 1e-10)), rel=1e-9)
    exact = math.sqrt(chi2.isf(1e-10, words))
    assert exact <= length <= 1.35 * exact
    exact = float(norm.isf(1e-10 / 2 / words))
    assert exact <= largest <= 1.1 * exact
    assert largest <= 10  # what sites grant each value


@pytest.mark.parametrize("sites", [[4, 4], [64] * 8])
def test_what_a_site_makes_up_does_not_pass(sites: list[int]) -> None:
    plan = plan_of()
    bounds = SumBounds(plan, sites, WORDS)
    honest = opened(plan, [size // 2 for size in sites], np.ones(WORDS), 0)
    assert bounds.problem(honest) is None
    for made_up in (1 << 60, -(1 << 60), -(1 << 63), int(2 * bounds.coordinate)):
        total = honest.copy()
        total[3] = made_up
        problem = bounds.problem(total)
        assert problem is not None
        assert "C" in problem
    # No coordinate stands out, and all of them together do.
    spread = np.full(WORDS, int(0.9 * bounds.coordinate))
    length = np.linalg.norm(spread.astype(float)) / GRID_STEPS
    most = bounds.norm / GRID_STEPS
    assert bounds.problem(spread) == f"is {length:.3g} C long, where honest ones reach {most:.3g} C"
    # What is as long as it may be passes.
    bounds.norm = float(np.linalg.norm(spread.astype(float)))
    assert bounds.problem(spread) is None
    bounds = SumBounds(plan, sites, WORDS)
    # Nor are both bounds one: a coordinate within the norm of all can be too large for one.
    if bounds.norm > 1.01 * bounds.coordinate:
        total = np.zeros(WORDS, np.int64)
        total[0] = -int(1.005 * bounds.coordinate)
        found, most = abs(int(total[0])) / GRID_STEPS, bounds.coordinate / GRID_STEPS
        assert bounds.problem(total) == f"has a coordinate of {found:.3g} C, where honest ones reach {most:.3g} C"


@pytest.mark.parametrize("rate", [0.001, 0.25, 1.0])
@pytest.mark.parametrize("noise", [0.2, 1.0, 30.0])
@pytest.mark.parametrize("declared", [[1, 1], [8, 40, 8], [1000] * 100])
def test_what_passes_moves_nothing_further_than_sites_grant(rate: float, noise: float, declared: list[int]) -> None:
    job = secure_job(
        privacy={"sample_rate": rate, "noise_multiplier": noise, "max_grad_norm": 0.5},
        training={"rounds": 1, "learning_rate": 0.01, "momentum": 0.9},
    )
    plan = PrivacyPlan.from_job(job)
    bounds = SumBounds(plan, declared, WORDS)
    gradient = bounds.coordinate / GRID_STEPS * plan.max_grad_norm / plan.expected_batch_size(sum(declared))
    moved = job.training.learning_rate * gradient / (1 - job.training.momentum)
    assert moved <= AdapterBounds(job, plan).limit("a.lora_B", 1, largest_initial=0.0)


def test_few_units_are_granted_less_than_many() -> None:
    plan = plan_of(sample_rate=0.01)
    make: Callable[[list[int]], SumBounds] = lambda sizes: SumBounds(plan, sizes, 1)  # noqa: E731
    few, many = make([1000, 1000]), make([10_000, 10_000])
    assert few.coordinate < many.coordinate
    # About 40 of 3,998 are drawn, and far fewer than all of them are granted.
    noise = 10 * math.sqrt(2 * share_variance(plan.noise_multiplier))
    assert 40 * GRID_STEPS < few.coordinate < 120 * GRID_STEPS + noise


def test_an_adapter_as_far_from_its_start_as_sites_take_is_not_saved(tmp_path: Path) -> None:
    """No value is above what sites take, but they count from where the seed puts it: the run would have ended for good."""
    job, moved = secure_job(training={"learning_rate": 1000.0}), 10_000.1
    start = {"w": torch.full((2, 3), -0.5), "head.b": torch.zeros(2)}
    following = {"w": start["w"] + moved, "head.b": torch.zeros(2)}
    assert float(following["w"].max()) <= MAX_ADAPTER_VALUE
    with pytest.raises(AdapterError, match="10000"):
        check_bounds(job, PrivacyPlan.from_job(job), start, following, rounds_before=1)
    steps = -round(moved / 4000 * GRID_STEPS)  # of two sites that declare one record each
    sites, saved = [SimpleSite(n, steps, declared=1) for n in "ab"], []
    asked = replace(coordinator(job, tmp_path, saved=saved), initial_adapter=start)
    with pytest.raises(RunHeld, match=r"a value of 1e\+04, and sites take none above 10000 or as far from its start"):
        run_rounds(grid_of(sites), asked, None)
    assert saved[-1].round_number == 0


def test_an_adapter_that_is_no_number_anywhere_is_not_saved(tmp_path: Path) -> None:
    job = secure_job(training={"momentum": 0.5}, privacy={"spare_attempts": 2})
    sites = [SimpleSite(n, GRID_STEPS) for n in "ab"]
    first = run_rounds(grid_of(sites), coordinator(job, tmp_path), None, stop_after=1)
    assert len(first.server_state) == 2
    for name, value in first.server_state.items():
        state = first.server_state | {name: torch.full_like(value, math.nan)}
        with pytest.raises(RunHeld, match="would have a value of nan"):
            run_rounds(grid_of(sites), coordinator(job, tmp_path), replace(first, server_state=state))
