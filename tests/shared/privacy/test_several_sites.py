"""A person at several sites of one sum: divergences in 60 digits, epsilons of dp-accounting, figures of the agreement."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import mpmath
import numpy as np
import pytest
from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution, from_mixture_gaussian_mechanism
from numpy.typing import NDArray
from scipy import stats

import shared.privacy.accountant.several_sites as module
from shared.errors import PrivacyError
from shared.privacy.accountant.loss_distribution import composed_epsilon, step_divergence, step_loss
from shared.privacy.accountant.several_sites import MOST_SITES, shared_divergence, weights
from shared.privacy.accounting import (
    GaussianSteps,
    calibrate_noise_multiplier,
    compose_epsilon,
    epsilon_at_sites,
    mean_loss,
)
from tests.shared.privacy.counted_cells import Cells

RATE, STEPS, DELTA, HONEST = 0.125, 16, 1e-5, 4
"""Of the demo's plan, whose one upload has epsilon 8."""


def steps(sigma: float, rate: float, number: int) -> GaussianSteps:
    return GaussianSteps(noise_multiplier=sigma, sample_rate=rate, steps=number)


def exact_divergence(epsilon: float, sigma: float, rate: float, sites: int, *, removed: bool) -> mpmath.mpf:
    """Hockey-stick divergence of one step, from the definition: where P > e^epsilon Q, P less e^epsilon Q, or the other way."""
    sigma, rate, bound = mpmath.mpf(sigma), mpmath.mpf(rate), mpmath.exp(mpmath.mpf(epsilon))
    chances = [mpmath.binomial(sites, k) * rate**k * (1 - rate) ** (sites - k) for k in range(sites + 1)]
    wanted = (bound if removed else 1 / bound) - chances[0]
    if wanted <= 0:
        return mpmath.mpf(0)
    numbers = [k for k in range(1, sites + 1) if chances[k] > 0]
    starts = {k: mpmath.log(chances[k]) - k**2 / (2 * sigma**2) for k in numbers}
    edge = min((mpmath.log(wanted) - starts[k]) / k for k in numbers)  # x / sigma^2, not below the root
    for _ in range(100):  # log of the sum is convex in x: Newton's steps come from the right
        terms = {k: mpmath.exp(starts[k] + k * edge) for k in numbers}
        total = mpmath.fsum(terms.values())
        step = mpmath.log(total / wanted) * total / mpmath.fsum(k * term for k, term in terms.items())
        edge -= step
        if abs(step) < mpmath.mpf(10) ** -50 * (1 + abs(edge)):
            break
    edge *= sigma**2
    if removed:
        one = mpmath.fsum(chance * mpmath.ncdf((k - edge) / sigma) for k, chance in enumerate(chances))
        return one - bound * mpmath.ncdf(-edge / sigma)
    one = mpmath.fsum(chance * mpmath.ncdf((edge - k) / sigma) for k, chance in enumerate(chances))
    return mpmath.ncdf(edge / sigma) - bound * one


def of_dp_accounting(
    sigma: float, rate: float, sites: int, cell: float, *, pessimistic: bool
) -> PrivacyLossDistribution:
    return from_mixture_gaussian_mechanism(
        standard_deviation=sigma,
        sensitivities=list(range(sites + 1)),
        sampling_probs=weights(rate, sites).tolist(),
        value_discretization_interval=cell,
        pessimistic_estimate=pessimistic,
    )


# --- one step ---


@pytest.mark.parametrize("removed", [True, False])
@pytest.mark.parametrize("sigma", [0.4, 1.0, 7.0, 1e4])
@pytest.mark.parametrize("rate", [1.0, 0.3, 1e-3, 1e-9])
@pytest.mark.parametrize("sites", [1, 2, 3, 7])
def test_the_rounding_of_one_step_is_within_its_bound(sites: int, rate: float, sigma: float, removed: bool) -> None:
    largest = min(60.0, 5 * sites**2 / sigma**2 + 5 * sites / sigma)
    epsilons = np.concatenate([[0.0], np.geomspace(1e-12, largest, 30)])
    if not removed and rate < 1:  # around the epsilon from which on nothing is lost
        none = -sites * math.log1p(-rate)
        epsilons = np.concatenate([epsilons, none * (1 + np.array([-1e-6, -1e-12, -1e-15, 0.0, 1e-15, 1e-12]))])
    found, errors = shared_divergence(epsilons, sigma, rate, sites, removed)
    with mpmath.workdps(80):
        exact = [exact_divergence(epsilon, sigma, rate, sites, removed=removed) for epsilon in epsilons]
        worst = max(abs(mpmath.mpf(a) - b) - mpmath.mpf(e) for a, b, e in zip(found, exact, errors, strict=True))
    assert worst <= 1e-300  # what lies below the least number is 0
    # And the bound is no blank cheque.
    assert np.all(errors <= 1e-12 * rate * sites)


@pytest.mark.parametrize("removed", [True, False])
@pytest.mark.parametrize(("sigma", "rate"), [(0.3, 0.1), (1.0, 1.0), (2.0, 0.125), (50.0, 1e-4)])
def test_one_site_is_a_sampled_step(sigma: float, rate: float, removed: bool) -> None:
    epsilons = np.linspace(0.0, 5.0, 40_000)  # more than are handled at once
    found, errors = shared_divergence(epsilons, sigma, rate, 1, removed)
    expected, others = step_divergence(epsilons, sigma, rate, removed)
    assert np.all(np.abs(found - expected) <= errors + others + 1e-300)
    assert found[0] > 0


@pytest.mark.parametrize(("sigma", "rate", "sites"), [(0.3, 0.1, 5), (1.0, 1e-9, 7), (30.0, 0.5, 3), (1e4, 0.9, 2)])
def test_an_edge_is_as_near_as_it_says(sigma: float, rate: float, sites: int) -> None:
    numbers = np.arange(1, sites + 1)[:, None]
    logs, shift = np.log(weights(rate, sites)[1:, None]), numbers / sigma
    wanted = np.concatenate([-np.geomspace(1e-9, 30, 40), np.linspace(0, 60, 40)])
    edges, missed = module._edge(wanted, logs, shift)
    assert np.all(missed < 1e-10)
    with mpmath.workdps(40):
        for edge, log_ratio, bound in zip(edges, wanted, missed, strict=True):
            total = mpmath.fsum(
                mpmath.exp(
                    mpmath.mpf(float(log)) + mpmath.mpf(float(by)) * mpmath.mpf(edge) - mpmath.mpf(float(by)) ** 2 / 2
                )
                for log, by in zip(logs[:, 0], shift[:, 0], strict=True)
            )
            off = abs(mpmath.log(total) - mpmath.mpf(log_ratio))
            assert off <= bound
            nearest = max(abs(float(edge)), 1.0) * 2.0**-53 * float(shift[0, 0])
            assert bound >= nearest  # no edge of double precision could be nearer for sure


@pytest.mark.parametrize("share", [-0.5, -0.25, 0.5, 1.0])
@pytest.mark.parametrize(
    ("epsilon", "rate", "sites", "removed"),
    [
        (0.5, 0.125, 1, True),
        (3.0, 0.125, 1, True),
        (6.0, 0.125, 2, True),
        (3.0, 0.7, 4, True),
        (0.5, 0.5, 1, False),
        (3.0, 0.99, 1, False),
        (3.0, 0.7, 4, False),
        (4.0, 0.9, 2, False),
    ],
)
def test_what_rounding_may_have_moved_of_an_edge_is_within_the_bound(
    monkeypatch: pytest.MonkeyPatch, epsilon: float, rate: float, sites: int, share: float, removed: bool
) -> None:
    """T at the edge is known up to rounding; here up to half of what was found less, or as much more."""
    epsilons, real = np.array([epsilon]), module._ratios
    expected, _ = shared_divergence(epsilons, 1.0, rate, sites, removed)
    assert expected[0] > 0

    def moved(epsilons: NDArray[np.float64], *others: Any) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        ratio, _ = real(epsilons, *others)
        found = ratio / (1 + share)
        return found, np.abs(share) * found

    monkeypatch.setattr(module, "_ratios", moved)
    found, errors = shared_divergence(epsilons, 1.0, rate, sites, removed)
    assert abs(found[0] - expected[0]) <= errors[0]


def test_weights_are_binomial() -> None:
    assert weights(0.5, 3).tolist() == [0.125, 0.375, 0.375, 0.125]
    assert weights(1.0, 3).tolist() == [0.0, 0.0, 0.0, 1.0]
    np.testing.assert_allclose(weights(0.125, 7), stats.binom.pmf(range(8), 7, 0.125), rtol=1e-13)
    assert weights(1e-9, MOST_SITES)[-1] > 1e-300


@pytest.mark.parametrize("angle", [0.0, 0.3, math.pi / 2, 2.5, math.pi])
@pytest.mark.parametrize("lengths", [(1.0, 1.0), (1.0, 0.4), (0.2, 0.0)])
def test_no_other_vectors_lose_more(angle: float, lengths: tuple[float, float]) -> None:
    """Two sites' vectors in a plane, by a sum over a fine lattice: only two that are equal reach the divergence."""
    sigma, rate = 0.8, 0.3
    line = np.arange(-8, 10, 0.01)
    x, y = np.meshgrid(line, line)
    one, two = (lengths[0], 0.0), (lengths[1] * math.cos(angle), lengths[1] * math.sin(angle))
    shifts = [(0.0, 0.0), one, two, (one[0] + two[0], one[1] + two[1])]
    chances = [(1 - rate) ** 2, rate * (1 - rate), rate * (1 - rate), rate**2]
    without = np.exp(-(x**2 + y**2) / (2 * sigma**2)) * 0.01**2 / (2 * math.pi * sigma**2)
    ratio = sum(
        chance * np.exp((x * a + y * b) / sigma**2 - (a**2 + b**2) / (2 * sigma**2))
        for chance, (a, b) in zip(chances, shifts, strict=True)
    )
    for epsilon, removed in product([0.0, 0.3, 1.0, 2.0], [True, False]):
        factor = math.exp(epsilon)
        lost = ratio - factor if removed else 1 - factor * ratio
        found = float((without * np.maximum(lost, 0)).sum())
        ((bound,), _) = shared_divergence(np.array([epsilon]), sigma, rate, 2, removed)
        assert found <= bound + 1e-5
        if angle == 0.0 and lengths == (1.0, 1.0):
            assert found == pytest.approx(bound, abs=1e-5)
        elif bound > 1e-3:
            assert found < 0.995 * bound


# --- many steps ---


def test_figures_of_the_agreement() -> None:
    """Sums of 2 to 67 honest sites, then persons at two and three sites of a sum of four; and what a composition would say."""
    sigma = calibrate_noise_multiplier(epsilon=8.0, delta=DELTA, sample_rate=RATE, steps=STEPS)
    for honest, expected in ((2, 4.01), (4, 2.13), (6, 1.53), (14, 0.83), (67, 0.31)):
        one = compose_epsilon([steps(sigma * math.sqrt(honest), RATE, STEPS)], DELTA)
        assert one == pytest.approx(expected, abs=0.005)
    together = sigma * math.sqrt(HONEST)
    for sites, expected, composed in ((2, 4.68, 2.86), (3, 7.51, 3.44)):
        assert epsilon_at_sites([steps(together, RATE, STEPS)], sites, DELTA) == pytest.approx(expected, abs=0.005)
        assert compose_epsilon([steps(together, RATE, STEPS * sites)], DELTA) == pytest.approx(composed, abs=0.005)


@pytest.mark.parametrize(
    ("sigma", "rate", "number", "sites"),
    [
        (1.4, 0.125, 16, 3),
        (3.0, 0.02, 300, 2),
        (3.0, 0.02, 300, 5),
        (8.0, 0.5, 20, 3),
        (6.0, 1.0, 3, 2),
        (6.0, 1.0, 3, 5),
    ],
)
def test_it_agrees_with_dp_accounting_in_both_directions(sigma: float, rate: float, number: int, sites: int) -> None:
    cell = 1e-3 if rate < 0.1 else 4e-3  # theirs searches for an edge in every cell; both have the same
    theirs, below = (of_dp_accounting(sigma, rate, sites, cell, pessimistic=way) for way in (True, False))
    for expected, removed in ((theirs._pmf_remove, True), (theirs._pmf_add, False)):
        dense, part = expected.to_dense_pmf(), step_loss(sigma, rate, removed, cell, 50, sites)
        shift = part.lower - dense._lower_loss
        first, last = max(0, -shift), min(len(part.probs), dense.size - shift)
        mine = np.zeros(dense.size)
        mine[first + shift : last + shift] = part.probs[first:last]
        np.testing.assert_allclose(mine, dense._probs, rtol=0, atol=1e-9)  # they search for edges
    many, fewer = theirs.self_compose(number), below.self_compose(number)
    for delta in (1e-3, 1e-5, 1e-6):
        found = composed_epsilon([(sigma, rate, number, sites)], delta, cell)
        assert found == pytest.approx(many.get_epsilon_for_delta(delta), abs=5e-5, rel=1e-5)
        assert found >= fewer.get_epsilon_for_delta(delta)
        assert epsilon_at_sites([steps(sigma, rate, number)], sites, delta) <= found + 1e-9


@pytest.mark.parametrize("sites", [2, 5])
@pytest.mark.parametrize("delta", [1e-5, 1e-12, 1e-20, 1e-30])
def test_without_coins_it_is_noise_divided_by_the_number_of_sites(sites: int, delta: float) -> None:
    found = epsilon_at_sites([steps(8.0, 1.0, 6)], sites, delta)
    assert found == pytest.approx(compose_epsilon([steps(8.0 / sites, 1.0, 6)], delta), rel=2e-3)


@pytest.mark.parametrize("delta", [1e-5, 1e-9, 1e-14, 1e-20, 1e-30])
def test_small_deltas_are_never_below_one_step_s_exact_epsilon(delta: float) -> None:
    for sigma, rate, sites in ((1.0, 0.125, 2), (2.0, 0.01, 3), (0.5, 0.5, 2)):
        found = epsilon_at_sites([steps(sigma, rate, 1)], sites, delta)
        with mpmath.workdps(80):
            at = [exact_divergence(found + 1e-12, sigma, rate, sites, removed=way) for way in (True, False)]
            under = [exact_divergence(0.95 * found - 2e-3, sigma, rate, sites, removed=way) for way in (True, False)]
        assert max(at) <= delta
        assert max(under) > delta or delta < 1e-9  # where rounding alone is more than that


def test_one_site_is_the_usual_epsilon_and_more_sites_are_more_than_their_composition() -> None:
    found = [epsilon_at_sites([steps(2.0, 0.1, 50)], sites, 1e-6) for sites in range(1, 7)]
    assert found[0] == compose_epsilon([steps(2.0, 0.1, 50)], 1e-6)
    composed = [compose_epsilon([steps(2.0, 0.1, 50 * sites)], 1e-6) for sites in range(1, 7)]
    assert all(np.diff(found) > 0)
    assert all(mine > theirs for mine, theirs in zip(found[1:], composed[1:], strict=True))


def test_what_sites_release_apart_is_composed_once_for_each() -> None:
    metric, shared = steps(20.0, 1.0, 2), steps(2.0, 0.1, 50)
    found = epsilon_at_sites([shared], 3, 1e-6, apart=[metric])
    assert found == pytest.approx(composed_epsilon([(2.0, 0.1, 50, 3), (20.0, 1.0, 6)], 1e-6, 1e-3), rel=1e-3)
    assert (
        epsilon_at_sites([shared], 3, 1e-6) < epsilon_at_sites([shared], 3, 1e-6, apart=[steps(20.0, 1.0, 1)]) < found
    )
    assert epsilon_at_sites([], 3, 1e-6, apart=[metric]) == compose_epsilon([steps(20.0, 1.0, 6)], 1e-6)


@pytest.mark.parametrize(("sigma", "rate", "sites"), [(1.0, 0.125, 2), (3.0, 0.5, 3), (0.6, 1e-3, 2), (9.0, 1.0, 4)])
def test_the_mean_loss_is_not_above_its_bound(sigma: float, rate: float, sites: int) -> None:
    x = np.linspace(-12 * sigma, 12 * sigma + sites, 400_001)
    without = stats.norm.pdf(x, scale=sigma)
    shifted: NDArray[np.float64] = sum(
        weight * stats.norm.pdf(x - number, scale=sigma) for number, weight in enumerate(weights(rate, sites))
    )
    one = float((shifted * np.log(shifted / without)).sum() * (x[1] - x[0]))
    bound = mean_loss(steps(sigma, rate, 10), sites)
    assert 10 * one <= bound * (1 + 1e-9)
    assert bound <= 10 * one * 4
    assert mean_loss(steps(sigma, rate, 10), 1) == mean_loss(steps(sigma, rate, 10)) < bound


# --- extremes ---


@pytest.mark.parametrize("sites", [0, -1, MOST_SITES + 1])
def test_a_number_of_sites_out_of_range_is_refused(sites: int) -> None:
    with pytest.raises(PrivacyError, match=f"at {sites} sites cannot be accounted for; expected 1 to 32"):
        epsilon_at_sites([steps(1.0, 0.1, 1)], sites, 1e-5)


@pytest.mark.parametrize("sigma", [0.05, 0.3, 1.0, 30.0, 1e4])
@pytest.mark.parametrize(("rate", "number"), [(1.0, 1), (0.3, 16), (1e-3, 10_000), (1e-9, 1 << 24)])
@pytest.mark.parametrize("delta", [0.5, 1e-5, 1e-30])
def test_extremes_are_answered_in_time(sigma: float, rate: float, number: int, delta: float, cells: Cells) -> None:
    for sites in (2, MOST_SITES):
        assert epsilon_at_sites([steps(sigma, rate, number)], sites, delta) >= 0
    assert epsilon_at_sites([steps(sigma, rate, 0)], 2, delta) == 0.0
    assert max(cells.composed, default=0) <= 1.01 * 2**19
    assert sum(cells.composed) < 2**21
    assert max(cells.of_steps, default=0) <= 2 * 2**20
    assert sum(cells.of_steps) < 2**23


def test_too_little_noise_for_so_many_sites_has_no_epsilon() -> None:
    assert epsilon_at_sites([steps(0.149, 0.1, 1)], 3, 1e-5) == math.inf
    assert epsilon_at_sites([steps(0.151, 0.1, 1)], 3, 1e-5) < math.inf


# --- planted fault ---


def test_fault_a_composition_in_place_of_the_sum() -> None:
    """What m accounts would say is refuted by the exact divergence of a single step."""
    for sigma, rate in ((1.0, 0.125), (2.0, 1.0), (0.7, 0.5)):
        claimed = compose_epsilon([steps(sigma, rate, 2)], 1e-5)
        with mpmath.workdps(40):
            assert exact_divergence(claimed, sigma, rate, 2, removed=True) > 1e-5
            true = epsilon_at_sites([steps(sigma, rate, 1)], 2, 1e-5)
            assert max(exact_divergence(true, sigma, rate, 2, removed=way) for way in (True, False)) <= 1e-5
