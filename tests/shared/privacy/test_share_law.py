"""Why shares of noise protect as the accountant's Gaussian does: the numbers of the argument in docs/secure-aggregation.md.

Each bound is computed where it applies and where it is wide enough to be seen; the conclusion is compared with the accountant's
divergence at coarse grids, where a share without smoothing fails.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import mpmath
import numpy as np
import pytest
from numpy.typing import NDArray

from shared.limits import MAX_STEPS
from shared.privacy import mechanism
from shared.privacy.accountant.loss_distribution import step_divergence
from shared.privacy.shares import GRID_STEPS, SMOOTHING, share_variance

DIGITS = 320


def weights_around(centre: mpmath.mpf, variance: int | mpmath.mpf) -> mpmath.mpf:
    """Return the sum over all integers k of exp(-(k - centre)^2 / 2 variance), to `DIGITS` digits."""
    reach = int(mpmath.sqrt(2 * variance * DIGITS * mpmath.log(10))) + 2
    middle = int(mpmath.floor(centre))
    return mpmath.fsum(
        mpmath.exp(-((k - centre) ** 2) / (2 * mpmath.mpf(variance))) for k in range(middle - reach, middle + reach + 1)
    )


def eta(variance: float) -> mpmath.mpf:
    """Return how far the sum of weights is from constant at most, relative."""
    return mpmath.mpf("2.01") * mpmath.exp(-2 * mpmath.pi**2 * variance)


def discrete_gaussian(variance: int) -> Callable[[int], mpmath.mpf]:
    """Return the probabilities of N_Z(0, variance), from the definition."""
    total = weights_around(mpmath.mpf(0), variance)
    return lambda k: mpmath.exp(-(mpmath.mpf(k) ** 2) / (2 * variance)) / total


# --- the parts of the argument ---


@pytest.mark.parametrize("variance", [0.5, 1, 2.5, 16, 17])
def test_the_sum_of_weights_hardly_depends_on_its_centre(variance: float) -> None:
    with mpmath.workdps(DIGITS):
        plain = mpmath.sqrt(2 * mpmath.pi * variance)
        wrong = [abs(weights_around(mpmath.mpf(tenth) / 10, variance) / plain - 1) for tenth in range(-10, 11)]
        assert max(wrong) <= eta(variance) <= 1.02 * max(wrong)


def test_what_sixteen_leaves() -> None:
    """The figures of the document."""
    with mpmath.workdps(50):
        assert mpmath.mpf("1.3e-137") < eta(SMOOTHING) < mpmath.mpf("1.4e-137")
        over_a_job = 8 * eta(SMOOTHING) * mechanism._MOST_COORDINATES * MAX_STEPS
        assert mpmath.mpf("1.8e-121") < over_a_job < mpmath.mpf("1.9e-121")
        least = share_variance(0.02)
        assert least > 2**36
        assert eta(least / 2) < mpmath.mpf(10) ** -1000


@pytest.mark.parametrize(("variance", "smoothing"), [(4, 0.25), (4, 0.5), (9, 1.0), (30, 1.0), (40, 2.0)])
def test_a_gaussian_that_is_rounded_at_random_is_a_discrete_gaussian(variance: int, smoothing: float) -> None:
    """K around a continuous X: within the factors of the argument, which at so little smoothing can be seen."""
    inner, slack = variance - smoothing, math.exp(3 * float(eta(smoothing)))
    exact = np.exp(-(np.arange(400) ** 2) / (2 * variance))
    exact /= 2 * exact.sum() - 1
    x = np.linspace(
        -80, 80, 160_001
    )  # of smooth functions that vanish at the ends, plain sums are integrals to all digits
    density = np.exp(-(x**2) / (2 * inner)) / math.sqrt(2 * math.pi * inner) * 1e-3
    near = sum(np.exp(-((j + np.rint(x) - x) ** 2) / (2 * smoothing)) for j in range(-40, 41))
    ratios = np.array(
        [(density * np.exp(-((k - x) ** 2) / (2 * smoothing)) / near).sum() / exact[k] for k in (0, 1, 2, 5, 11)]
    )
    assert np.all(ratios <= slack + 1e-11)
    assert np.all(ratios >= 1 / slack - 1e-11)
    if smoothing < 0.5:
        assert np.abs(ratios - 1).max() > 1e-6  # it is no identity


@pytest.mark.parametrize(("one", "other"), [(2, 2), (3, 6), (17, 51)])
def test_two_discrete_gaussians_add_up_to_one(one: int, other: int) -> None:
    with mpmath.workdps(DIGITS):
        first, second, both = (discrete_gaussian(variance) for variance in (one, other, one + other))
        reach = int(mpmath.sqrt(2 * (one + other) * DIGITS * mpmath.log(10))) + 60
        bound = mpmath.exp(4.1 * eta(one * other / (one + other)))
        for k in (0, 1, 3, 10, 40):
            ratio = mpmath.fsum(first(j) * second(k - j) for j in range(-reach, reach + 1)) / both(k)
            assert 1 / bound <= ratio <= bound
            if one == 2:
                assert abs(ratio - 1) > 1e-12  # seen, and small


# --- the conclusion: no more is lost than the accountant says ---


@cache
def masses(variance: float, shares: int) -> NDArray[np.float64]:
    """Return the probabilities of the sum of `shares` draws of N_Z(0, variance), around the middle of the array."""
    reach = 14 * math.isqrt(math.ceil(variance)) + 14
    one = np.exp(-(np.arange(-reach, reach + 1) ** 2) / (2 * variance))
    total = one / one.sum()
    for _ in range(shares - 1):
        total = np.convolve(total, one / one.sum())
    return total


def divergences(
    noise: NDArray[np.float64], shift: int, rate: float, epsilons: NDArray[np.float64], *, removed: bool
) -> NDArray[np.float64]:
    """Return the hockey-stick divergences of one sampled step of an integer sum that a record moves by `shift`."""
    without, one = np.pad(noise, (0, shift)), np.pad(noise, (shift, 0))
    larger = rate * one + (1 - rate) * without
    p, q = (larger, without) if removed else (without, larger)
    return np.array([np.maximum(p - math.exp(epsilon) * q, 0.0).sum() for epsilon in epsilons])


def excess(variance: float, grid_steps: int, sigma: float, shares: int, rate: float) -> float:
    """Return by how much, relative, the divergence of shares passes that of the accountant's Gaussian."""
    epsilons, worst = np.linspace(0.0, 4.0, 81), -math.inf
    for removed in (True, False):
        for shift in range(1, grid_steps + 1):  # also of shorter vectors
            found = divergences(masses(variance, shares), shift, rate, epsilons, removed=removed)
            allowed, _ = step_divergence(epsilons, sigma * math.sqrt(shares), rate, removed)
            told = allowed > 1e-12
            worst = max(worst, float((found[told] / allowed[told] - 1).max()))
    return worst


@pytest.mark.parametrize("rate", [1.0, 0.125])
@pytest.mark.parametrize("shares", [1, 3])
@pytest.mark.parametrize(("grid_steps", "sigma"), [(1, 1.0), (2, 0.5), (5, 1.4), (20, 0.7)])
def test_shares_lose_no_more_than_the_accountant_says(grid_steps: int, sigma: float, shares: int, rate: float) -> None:
    assert excess(share_variance(sigma, grid_steps), grid_steps, sigma, shares, rate) <= 1e-9


def test_fault_shares_without_smoothing() -> None:
    """At a coarse grid they lose more."""
    assert excess(1.0, 1, 1.0, 1, 1.0) > 1e-2
    assert excess(1.0, 2, 0.5, 1, 0.125) > 1e-3


def test_fault_a_variance_too_small() -> None:
    variance = share_variance(0.7, 100)
    assert excess(variance, 100, 0.7, 1, 0.125) <= 1e-9
    assert excess((0.68 * 100) ** 2, 100, 0.7, 1, 0.125) > 1e-3


def test_the_grid_is_so_fine_that_smoothing_costs_nothing() -> None:
    for sigma in (0.05, 0.7, 5.0):
        assert math.sqrt(share_variance(sigma)) / (sigma * GRID_STEPS) - 1 < 2e-11
