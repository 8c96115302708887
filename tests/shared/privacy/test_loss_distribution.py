"""Composed loss distributions against exact answers, against a method without transforms, and against dp-accounting's cells."""

from __future__ import annotations

import functools
import math
from functools import lru_cache

import dp_accounting
import mpmath
import numpy as np
import pytest
from dp_accounting.pld.pld_pmf import DensePLDPmf
from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution, from_gaussian_mechanism
from dp_accounting.rdp.rdp_privacy_accountant import RdpAccountant
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import ndtr

from shared.privacy.accountant.loss_distribution import (
    StepLoss,
    TiltedDivergence,
    composed_epsilon,
    step_divergence,
    step_loss,
)
from shared.privacy.accounting import GaussianSteps, calibrate_noise_multiplier, compose_epsilon

DELTAS = [0.3, 1e-5, 1e-9, 1e-12, 1e-14, 1e-20, 1e-30]
EDGES = [
    (1.0, 1.0, 7),
    (5.0, 1.0, 1),
    (0.3, 0.001, 1),
    (0.2, 0.5, 2),
    (300.0, 0.9, 50),
    (1.0, 1e-4, 100_000),
    (2.0, 0.999, 30),
]


def random_settings(count: int) -> list[tuple[float, float, int]]:
    """Noise from 0.4 to 20, rates from 1e-4 to 1/2, up to 100,000 steps; epsilon stays below a few hundred."""
    generator = np.random.default_rng(20_260_102)
    found: list[tuple[float, float, int]] = []
    while len(found) < count:
        low, high = np.log([0.4, 1e-4, 1.0]), np.log([20.0, 0.5, 1e5])
        sigma, rate, steps = np.exp(generator.uniform(low, high)).tolist()
        if steps * rate**2 * math.expm1(1 / sigma**2) < 30:
            found.append((sigma, rate, round(steps)))
    return found


def of(sigma: float, rate: float, steps: int, delta: float) -> float:
    return compose_epsilon([GaussianSteps(noise_multiplier=sigma, sample_rate=rate, steps=steps)], delta)


# --- against closed forms, in 50 digits ---


def exact_divergence(epsilon: mpmath.mpf, mu: mpmath.mpf) -> mpmath.mpf:
    """Balle and Wang 2018, theorem 8: delta of the Gaussian mechanism with sensitivity mu and noise 1."""
    return mpmath.ncdf(mu / 2 - epsilon / mu) - mpmath.exp(epsilon) * mpmath.ncdf(-mu / 2 - epsilon / mu)


def exact_epsilon(mu: mpmath.mpf, delta: float) -> float:
    with mpmath.workdps(50):
        if exact_divergence(mpmath.mpf(0), mu) <= delta:
            return 0.0
        low, high = mpmath.mpf(0), mpmath.mpf(1)
        while exact_divergence(high, mu) > delta:
            high *= 2
        for _ in range(100):
            middle = (low + high) / 2
            low, high = (middle, high) if exact_divergence(middle, mu) > delta else (low, middle)
        return float(low)


@pytest.mark.parametrize("delta", DELTAS)
@pytest.mark.parametrize(
    ("sigma", "steps"),
    [
        (1.0, 1),
        (0.2, 1),
        (2.0, 10),
        (0.5, 4),
        (10.0, 1000),
        (20.0, 1000),
        (1000.0, 100_000),
        (1e4, 1 << 24),
        (3.0, 2000),
        (1e4, 1),
    ],
)
def test_without_sampling_it_is_just_above_the_exact_epsilon(sigma: float, steps: int, delta: float) -> None:
    """T full-batch steps are one Gaussian of sigma / sqrt(T). Of these, delta 1e-12 and 1e-14 once fell short by 0.2."""
    exact = exact_epsilon(mpmath.sqrt(steps) / mpmath.mpf(sigma), delta)
    assert exact <= of(sigma, 1.0, steps, delta) <= exact * 1.03 + 1e-5


def exact_step_divergence(epsilon: float, sigma: float, rate: float, *, removed: bool) -> mpmath.mpf:
    """Hockey-stick divergence of one sampled step, from the definition: where P > e^epsilon Q, P less e^epsilon Q."""
    sigma, rate, bound = mpmath.mpf(sigma), mpmath.mpf(rate), mpmath.exp(mpmath.mpf(epsilon))
    ratio = (bound if removed else 1 / bound) - (1 - rate)  # q times the likelihood ratio at the edge
    if ratio <= 0:
        return mpmath.mpf(1) - bound if removed else mpmath.mpf(0)
    edge = sigma**2 * mpmath.log(ratio / rate) + mpmath.mpf("0.5")
    if removed:  # the noisy sum is above the edge
        without, one = mpmath.ncdf(-edge / sigma), mpmath.ncdf((1 - edge) / sigma)
        return rate * one + (1 - rate) * without - bound * without
    without, one = mpmath.ncdf(edge / sigma), mpmath.ncdf((edge - 1) / sigma)
    return without - bound * (rate * one + (1 - rate) * without)


@pytest.mark.parametrize("removed", [True, False])
@pytest.mark.parametrize("sigma", [0.2, 1.0, 7.0, 1e4])
@pytest.mark.parametrize("rate", [1.0, 0.3, 1e-3, 1e-9])
def test_the_rounding_of_one_step_is_within_its_bound(sigma: float, rate: float, removed: bool) -> None:
    largest = min(60.0, 5 / sigma**2 + 5 / sigma)
    epsilons = np.concatenate([[0.0], np.geomspace(1e-12, largest, 60)])
    found, errors = step_divergence(epsilons, sigma, rate, removed)
    with mpmath.workdps(60):
        exact = [exact_step_divergence(epsilon, sigma, rate, removed=removed) for epsilon in epsilons]
        worst = max(abs(mpmath.mpf(a) - b) - mpmath.mpf(e) for a, b, e in zip(found, exact, errors, strict=True))
    assert worst <= 1e-300  # what lies below the least number is 0
    # And the bound is no blank cheque.
    assert np.all(errors <= 1e-10 * rate)


@pytest.mark.parametrize("delta", [1e-5, 1e-12, 1e-20])
@pytest.mark.parametrize("rate", [0.5, 0.01, 1e-4])
@pytest.mark.parametrize("sigma", [0.3, 1.0])
def test_one_sampled_step_is_just_above_its_exact_epsilon(sigma: float, rate: float, delta: float) -> None:
    found = of(sigma, rate, 1, delta)
    with mpmath.workdps(50):
        above, below = found + 1e-12, max(0.0, 0.95 * found - 1e-3)
        both = (True, False)
        assert max(exact_step_divergence(above, sigma, rate, removed=way) for way in both) <= delta
        # Of one rare record a bound on rounding is all that can be said at so small a delta: up to 0.1 too much.
        loose = rate < 0.01 and delta < 1e-5
        assert loose or max(exact_step_divergence(below, sigma, rate, removed=way) for way in both) > delta


# --- against sums of positive terms: no transform, no difference, so small masses keep their digits ---


@lru_cache(maxsize=4)
def losses_rounded(sigma: float, rate: float, cell: float, *, removed: bool) -> tuple[int, NDArray[np.float64]]:
    """Mass of one step between multiples of `cell`, from the normal distribution directly; (first cell, masses)."""
    noise = np.linspace(-13 * sigma, 13 * sigma + 1, 2_000_001)
    z = (noise[:-1] + noise[1:]) / 2
    width = noise[1] - noise[0]
    without = np.exp(-0.5 * (z / sigma) ** 2) * width / (sigma * math.sqrt(2 * math.pi))
    with_one = np.exp(-0.5 * ((z - 1) / sigma) ** 2) * width / (sigma * math.sqrt(2 * math.pi))
    larger = rate * with_one + (1 - rate) * without
    loss = np.log(larger) - np.log(without)
    loss, mass = (loss, larger) if removed else (-loss, without)
    number = np.floor(loss / cell).astype(int)
    low = int(number.min())
    return low, np.bincount(number - low, weights=mass)


def composed_directly(sigma: float, rate: float, steps: int, delta: float, cell: float, up: int) -> float:
    """Epsilon when each loss is rounded down (up = 0: too small an answer) or up (up = 1: too large a one)."""
    worst = 0.0
    for removed in (True, False):
        low, mass = losses_rounded(sigma, rate, cell, removed=removed)
        total = mass
        for _ in range(steps - 1):
            total = np.convolve(total, mass)
        losses = (steps * (low + up) + np.arange(len(total))) * cell

        def divergence(
            epsilon: float, total: NDArray[np.float64] = total, losses: NDArray[np.float64] = losses
        ) -> float:
            return float(np.sum(total * np.maximum(-np.expm1(epsilon - losses), 0.0)))

        least, most = 0.0, float(losses[-1])
        if divergence(0.0) > delta:
            for _ in range(60):
                middle = (least + most) / 2
                least, most = (middle, most) if divergence(middle) > delta else (least, middle)
            worst = max(worst, least)
    return worst


@pytest.mark.parametrize("delta", [1e-5, 1e-12, 1e-14, 1e-20])
@pytest.mark.parametrize(("sigma", "rate", "steps"), [(1.0, 0.02, 12), (0.8, 0.2, 8), (3.0, 0.5, 12)])
def test_sampled_steps_lie_between_losses_rounded_down_and_up(
    sigma: float, rate: float, steps: int, delta: float
) -> None:
    found, cell = of(sigma, rate, steps, delta), 4e-3
    least = composed_directly(sigma, rate, steps, delta, cell, 0)
    assert least <= found <= composed_directly(sigma, rate, steps, delta, cell, 1)
    assert found - least > 0


# --- against an integral along a line, in which losses stand as they are, on no grid ---


def integrated_epsilon(
    sigma: float, rate: float, steps: int, delta: float, near: float, *, removed: bool, points: int = 1200
) -> float:
    """Epsilon of many small losses L, from the moments M(s) = E[exp(s L)] of one step at complex s.

    What a loss counts, 1 - exp(epsilon - L) above epsilon, is a Laplace integral over exp(s (L - epsilon)) / (s (s + 1)), so that
    delta is one over M(s)^steps exp(-s epsilon) / (s (s + 1)) along any line s = tilt + i t, tilt > 0. Both it and the moments
    are sums of smooth functions that vanish at their ends, at equal distances: their error falls exponentially.
    """
    noise = np.arange(-13 * sigma, 13 * sigma + 1, sigma / 16)
    ratio = rate * np.expm1((2 * noise - 1) / (2 * sigma**2))  # likelihood ratio, less 1
    mass = np.exp(-0.5 * (noise / sigma) ** 2) / 16 / math.sqrt(2 * math.pi)
    loss = np.log1p(ratio) if removed else -np.log1p(ratio)
    mass = mass * (1 + ratio) if removed else mass
    tilt = 1 / near
    tilted = mass * np.exp(tilt * loss) / (mass @ np.exp(tilt * loss))
    deviation = math.sqrt(steps * (tilted @ (loss - tilted @ loss) ** 2))
    line = tilt + 1j * np.linspace(0, 12 / deviation, points)
    moments = steps * np.log1p(np.expm1(np.multiply.outer(line, loss)) @ mass)

    def excess(epsilon: float) -> float:
        parts = (np.exp(moments - line * epsilon) / (line * (line + 1))).real
        return float(np.trapezoid(parts, line.imag)) / math.pi - delta

    return float(brentq(excess, near / 3, near * 3, xtol=1e-12))


@pytest.mark.parametrize(
    ("sigma", "rate", "steps", "delta"),
    [
        (5.0, 0.001, 5000, 1e-5),  # where cells of 1e-4 are half of what a step loses
        (5.0, 0.001, 5000, 1e-9),
        (10.0, 1e-3, 20_000, 1e-5),
        (20.0, 1e-4, 100_000, 1e-9),
        (1.5, 0.01, 3000, 1e-5),
        (2.0, 0.01, 1000, 1e-6),
        (8.0, 0.3, 400, 1e-8),
    ],
)
def test_many_small_steps_are_just_above_an_integral_over_no_grid(
    sigma: float, rate: float, steps: int, delta: float
) -> None:
    found = of(sigma, rate, steps, delta)
    exact = max(integrated_epsilon(sigma, rate, steps, delta, found, removed=way) for way in (True, False))
    assert exact <= found <= 1.03 * exact


def test_the_integral_is_exact_and_so_are_fine_grids() -> None:
    """Twice the points and another line change nothing; dp-accounting's finest grids close in on it from both sides."""
    exact = integrated_epsilon(5.0, 0.001, 5000, 1e-5, 0.04, removed=True)
    assert integrated_epsilon(5.0, 0.001, 5000, 1e-5, 0.02, removed=True, points=2400) == pytest.approx(exact, rel=1e-8)
    low, high = (
        from_gaussian_mechanism(
            5.0, sampling_prob=0.001, value_discretization_interval=1e-6, pessimistic_estimate=way, use_connect_dots=way
        )
        .self_compose(5000)
        .get_epsilon_for_delta(1e-5)
        for way in (False, True)
    )
    assert 0.9 * exact < low <= exact <= high < 1.0001 * exact
    # A whole Gaussian, too, is such a sum.
    exact = exact_epsilon(mpmath.sqrt(1000) / mpmath.mpf(100), 1e-5)
    assert integrated_epsilon(100.0, 1.0, 1000, 1e-5, exact, removed=True) == pytest.approx(exact, rel=1e-8)


@functools.lru_cache
def renyi(sigma: float, rate: float, steps: int) -> RdpAccountant:
    accountant = RdpAccountant([1.5, *range(2, 65), 80, 100, 128, 160, 200, 256, 512, 1024, 4096])
    accountant.compose(dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(sigma)), steps)
    return accountant


@pytest.mark.parametrize("delta", DELTAS)
@pytest.mark.parametrize(
    ("sigma", "rate", "steps"),
    [
        (1.0149, 0.001, 5000),
        (0.8, 0.01, 1000),
        (1.0, 0.005, 3000),
        (1.2, 0.02, 2000),
        (0.6, 0.3, 60),
        (1.0, 1e-6, 1 << 24),
        (0.5, 1e-9, 1 << 24),
        *random_settings(6),
    ],
)
def test_it_is_below_the_bound_by_renyi_divergences(sigma: float, rate: float, steps: int, delta: float) -> None:
    """Also an upper bound, without any transform: an answer ruled by rounding would leave it."""
    assert of(sigma, rate, steps, delta) <= renyi(sigma, rate, steps).get_epsilon(delta) + 1e-6


def test_small_deltas_continue_large_ones_without_a_step() -> None:
    """delta(epsilon) of sampled steps is nearly straight in logarithms; rounding showed as a plateau."""
    found = [of(0.8, 0.01, 1000, 10.0**-power) for power in range(5, 31)]
    slopes = np.diff(found)
    assert np.all(slopes > 0)
    assert np.all(np.abs(np.diff(slopes)) < 0.05)


@pytest.mark.parametrize(
    ("epsilon", "delta", "rate", "steps"),
    [(25.0, 1e-12, 1.0, 1000), (10.0, 1e-13, 1.0, 1000), (3.0, 1e-14, 1.0, 50), (1e-3, 1e-12, 1.0, 1)],
)
def test_noise_calibrated_at_a_small_delta_keeps_the_exact_epsilon(
    epsilon: float, delta: float, rate: float, steps: int
) -> None:
    sigma = calibrate_noise_multiplier(epsilon=epsilon, delta=delta, sample_rate=rate, steps=steps)
    with mpmath.workdps(50):
        assert exact_divergence(mpmath.mpf(epsilon), mpmath.sqrt(steps) / mpmath.mpf(sigma)) <= delta
        assert exact_divergence(mpmath.mpf(epsilon), mpmath.sqrt(steps) / mpmath.mpf(sigma * 0.99)) > delta


# --- the parts of the bound ---


def tilted(sigma: float, rate: float, steps: int, tilt: float) -> TiltedDivergence:
    part = step_loss(sigma, rate, True, 1e-3, 50)
    return TiltedDivergence([(part, steps)], tilt, lambda t: steps * part.log_moment(t))


def test_no_tilt_is_optimistic() -> None:
    """Every tilt bounds the same delta: far from the best one the bound is looser, never lower."""
    exact = float(exact_divergence(mpmath.mpf(3), mpmath.sqrt(100) / mpmath.mpf(10)))
    best = tilted(10.0, 1.0, 100, 3.0)(3.0)
    assert exact <= best <= exact * 1.001
    for tilt in (0.05, 0.5, 1.0, 8.0, 20.0, 60.0):
        assert tilted(10.0, 1.0, 100, tilt)(3.0) >= exact


def test_what_was_lost_is_part_of_the_bound() -> None:
    one = tilted(1.0, 0.01, 1000, 10.0)
    assert one.lost(3.0) > 0
    assert one.infinite > 0
    assert one(1e6) == pytest.approx(one.infinite, rel=1e-9, abs=0)


def test_rounding_of_one_step_s_cells_is_within_their_bounds() -> None:
    """Sums of a step's cells over a range are normal probabilities, which SciPy knows by itself."""
    part = step_loss(2.0, 1.0, True, 1e-3, 50)
    assert isinstance(part, StepLoss)
    # P = N(1/sigma, 1): loss above l where z > sigma l - 1/(2 sigma), in units of the noise.
    for loss in (-1.0, 0.0, 0.5, 2.0, 4.0):
        above = float(part.probs[part.losses > loss + 5e-4].sum()) + part.infinite
        low, high = (float(ndtr(-(2.0 * (loss + shift) - 0.25))) for shift in (2e-3, -2e-3))
        assert low <= above <= high
    assert float(part.probs.sum()) + part.infinite == pytest.approx(1.0, abs=float(part.errors.sum()) + 1e-15)


# --- against dp-accounting, where its own rounding allows ---


def of_dp_accounting(sigma: float, rate: float, cell: float) -> PrivacyLossDistribution:
    return from_gaussian_mechanism(
        standard_deviation=sigma,
        sampling_prob=rate,
        value_discretization_interval=cell,
        neighboring_relation=dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE,
    )


def on_cells(part: StepLoss, like: DensePLDPmf) -> NDArray[np.float64]:
    """Masses of `part` on the cells of another distribution; mass beyond them is below what either cut off."""
    found = np.zeros(like.size)
    shift = part.lower - like._lower_loss
    first, last = max(0, -shift), min(len(part.probs), like.size - shift)
    found[first + shift : last + shift] = part.probs[first:last]
    return found


@pytest.mark.parametrize(("sigma", "rate", "steps"), [*EDGES, *random_settings(25)])
def test_it_agrees_with_dp_accounting(sigma: float, rate: float, steps: int) -> None:
    theirs = of_dp_accounting(sigma, rate, 1e-3)
    for expected, removed in ((theirs._pmf_remove, True), (theirs._pmf_add, False)):
        dense = expected.to_dense_pmf()
        np.testing.assert_allclose(
            on_cells(step_loss(sigma, rate, removed, 1e-3, 50), dense), dense._probs, rtol=0, atol=2e-12
        )
    many = theirs.self_compose(steps)
    for delta in (1e-3, 1e-5, 1e-6):
        found, expected = composed_epsilon([(sigma, rate, steps)], delta, 1e-3), many.get_epsilon_for_delta(delta)
        assert found == pytest.approx(expected, abs=2e-5, rel=1e-5)


@pytest.mark.parametrize("rates", [(0.1, 0.02), (1.0, 0.1), (0.1, 1.0), (1.0, 1.0)])
def test_different_mechanisms_compose_as_there(rates: tuple[float, float]) -> None:
    one, other = ((2.0, rates[0], 20), (3.0, rates[1], 7))
    theirs = (
        of_dp_accounting(*one[:2], 1e-3).self_compose(20).compose(of_dp_accounting(*other[:2], 1e-3).self_compose(7))
    )
    assert composed_epsilon([one, other], 1e-5, 1e-3) == pytest.approx(theirs.get_epsilon_for_delta(1e-5), abs=1e-5)


def test_epsilon_at_the_edges() -> None:
    assert composed_epsilon([(1.0, 0.1, 1)], 0.9, 1e-3) == 0.0
    # A grid far too wide says more, never less.
    assert composed_epsilon([(1.0, 0.1, 10)], 1e-16, 1.0) > composed_epsilon([(1.0, 0.1, 10)], 1e-16, 1e-3)


@pytest.mark.parametrize("cell", [2e-3, 1e-2, 5e-2])
def test_wider_cells_are_never_optimistic(cell: float) -> None:
    for event in random_settings(8):
        assert composed_epsilon([event], 1e-5, cell) >= composed_epsilon([event], 1e-5, 1e-3) - 1e-6
