"""Two hundred rounds of sums over sites: their noise is what the plan says, and planted faults are found."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

import shared.privacy.shares as shares_module
from shared.privacy.mechanism import poisson_sample
from shared.privacy.randomness import KeyStream, SiteRandomness
from shared.privacy.shares import GRID_STEPS, IntegerSum, share_variance, with_share
from tests.shared.privacy.executed_noise import faults_of_noise, moves_by_at_most_the_bound

ROUNDS, SITES, MIN_SITES, COORDINATES, RECORDS = 200, 7, 4, 256, 20
RATE, BOUND, SIGMA = 0.25, 0.7, 0.4
Noise = Callable[[int, int], KeyStream]
"""Stream of a site's share in a round."""


def own_noise(run: str) -> Noise:
    sources = [SiteRandomness.injected(f"{run}/{site}") for site in range(SITES)]
    return lambda site, number: sources[site].stream("noise", round_number=number, step=0)


def executed(
    run: str, attendance: int, noise: Noise, sigmas: list[float] | None = None
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Run all rounds, of sites that are drawn anew each time; return their noise and its planned variances."""
    generator = torch.Generator().manual_seed(0)
    records = torch.randn(SITES, RECORDS, COORDINATES, generator=generator) / 8
    coins = SiteRandomness.injected(f"{run}/coins").stream("sampling", round_number=1, step=0)
    found = np.zeros((ROUNDS, COORDINATES), dtype=np.int64)
    for number in range(ROUNDS):
        opened, exact = np.zeros(COORDINATES, dtype=np.uint64), np.zeros(COORDINATES, dtype=np.int64)
        for site in np.argsort(coins.uint64(SITES))[:attendance].tolist():
            total = IntegerSum([torch.Size([COORDINATES])], BOUND)
            total.add([records[site][poisson_sample(RECORDS, RATE, coins)]])
            sigma = SIGMA if sigmas is None else sigmas[site]
            opened = opened + with_share(total.total, noise_multiplier=sigma, stream=noise(site, number))
            exact = exact + total.total
        found[number] = opened.view(np.int64) - exact
    return found, np.full(ROUNDS, float(attendance * share_variance(SIGMA)))


@pytest.mark.parametrize("attendance", [MIN_SITES, SITES])
def test_noise_of_two_hundred_rounds_is_what_was_planned(attendance: int) -> None:
    for run in range(3):
        assert faults_of_noise(*executed(f"control {run}", attendance, own_noise(f"control {run}"))) == []


def test_rounds_of_different_attendance_count_each_with_its_own_noise() -> None:
    few, many = (executed(f"mixed {n}", n, own_noise(f"mixed {n}")) for n in (MIN_SITES, SITES))
    noise, variances = (np.concatenate([one[::2], other[1::2]]) for one, other in zip(few, many, strict=True))
    assert faults_of_noise(noise, variances) == []
    assert "too much" in faults_of_noise(noise, np.full(ROUNDS, variances[0]))


# --- planted faults ---


@pytest.mark.parametrize("attendance", [MIN_SITES, SITES])
def test_fault_a_share_too_small(attendance: int) -> None:
    everybody, one = [0.98 * SIGMA] * SITES, [0.7 * SIGMA] + [SIGMA] * (SITES - 1)
    for run, sigmas in (("all", everybody), ("one", one)):
        assert faults_of_noise(*executed(run, attendance, own_noise(run), sigmas)) == ["too little"]


def test_fault_a_share_is_missing() -> None:
    noise, variances = executed("missing", MIN_SITES - 1, own_noise("missing"))
    assert "too little" in faults_of_noise(noise, variances * MIN_SITES / (MIN_SITES - 1))


def test_fault_noise_of_a_whole_site_on_every_share() -> None:
    """More noise is no danger to privacy, but not what was planned either."""
    assert "too much" in faults_of_noise(*executed("whole", SITES, own_noise("whole"), [2 * SIGMA] * SITES))


def fresh(*label: object) -> KeyStream:
    return SiteRandomness.injected("/".join(map(str, label))).stream("noise", round_number=1, step=0)


@pytest.mark.parametrize(
    "noise",
    [
        lambda site, number: fresh(site),
        lambda site, number: fresh(site, number % 100) if site == 0 else fresh("other", site, number),
        lambda site, number: fresh(site, number if number < 199 else 7),
        lambda site, number: fresh(number),
        lambda site, number: fresh(max(site, 1), number),
    ],
    ids=["in every round", "by one site after 100 rounds", "in two rounds by all", "by all sites", "by two sites"],
)
def test_fault_a_share_is_used_twice(noise: Noise) -> None:
    assert faults_of_noise(*executed("twice", SITES, noise))


def test_fault_one_draw_for_several_coordinates(monkeypatch: pytest.MonkeyPatch) -> None:
    def repeated(variance: int, count: int, stream: KeyStream) -> NDArray[np.int64]:
        drawn = draw(variance, count, stream)
        drawn[-1] = drawn[0]
        return drawn

    draw = shares_module.discrete_gaussian
    monkeypatch.setattr(shares_module, "discrete_gaussian", repeated)
    assert faults_of_noise(*executed("coordinates", SITES, own_noise("coordinates"))) == ["reused"]


def test_fault_rounding_to_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a unit of so many coordinates, by its difference under equal noise."""
    size = 400_010  # so that clipping leaves each coordinate half a step above a whole number of them

    def words(records: Tensor) -> NDArray[np.uint64]:
        total = IntegerSum([torch.Size([size])], BOUND)
        total.add([records])
        return with_share(total.total, noise_multiplier=SIGMA, stream=fresh("equal"))

    others = torch.randn(3, size, generator=torch.Generator().manual_seed(0))
    unit = torch.ones(1, size)
    everybody, without = words(torch.cat([others, unit])), words(others)
    assert moves_by_at_most_the_bound(everybody, without)
    assert not moves_by_at_most_the_bound(everybody, without - np.uint64(1))
    monkeypatch.setattr(IntegerSum, "_as_added", lambda self, clipped: clipped.mul_(GRID_STEPS / BOUND).round_())
    assert not moves_by_at_most_the_bound(words(torch.cat([others, unit])), words(others))
