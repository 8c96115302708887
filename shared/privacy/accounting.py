"""Epsilon of Poisson-subsampled Gaussian steps, by privacy loss distributions (PLD).

Formal guarantees
    * `compose_epsilon` is an upper bound on epsilon, at every delta from 1e-30 on, of running all the given events one after
      the other on one data set, under the add-or-remove-one relation, against an observer of every noisy sum; the rounding of
      the computation is bounded and part of it (tests/shared/privacy/test_loss_distribution.py, against exact answers;
      tests/shared/privacy/test_accounting.py, table of published noise multipliers and the PRV accountant of Opacus).
    * `calibrate_noise_multiplier` returns a noise multiplier whose epsilon, by the same function, is at most the target, and
      `affordable_steps` a number of steps (same tests). Estimates only decide where the searches look first.
    * Every answer, a refusal included, comes within seconds and a few hundred megabytes: what would take longer has no epsilon
      that says anything, and is answered by `inf` (tests/shared/privacy/test_accounting.py::test_extremes_are_answered_in_time).

Sources: Koskela, Jälkö, Honkela 2020 and Doroshenko et al. 2022 (PLD); Gopi, Lee, Wutschitz 2021 (PRV, Opacus); Bu, Dong,
Long, Su 2020 (the central limit of many steps, from which searches start).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache

import numpy as np
from scipy.optimize import bisect
from scipy.special import log_ndtr, ndtr

from shared.epsilons import as_set, rounded_up
from shared.errors import PrivacyError, excerpt
from shared.limits import MAX_EPSILON, MAX_NOISE_MULTIPLIER, MAX_STEPS, MIN_DELTA, MIN_NOISE_MULTIPLIER, MIN_SAMPLE_RATE
from shared.privacy.accountant.crossing import crossing
from shared.privacy.accountant.loss_distribution import composed_epsilon, largest_loss
from shared.privacy.accountant.several_sites import MOST_SITES, weights

# Widest cell of the discretised privacy loss. The discretisation is pessimistic: a wider cell gives a larger epsilon, here by
# less than 1e-3 as a rule. Where one step loses little, cells are narrower: at most half of its standard deviation.
PLD_DISCRETIZATION = 1e-3
_CELLS_PER_DEVIATION = 2
# Most cells of a composition, about: beyond them cells are wider, which only tells where epsilon is in the hundreds, or where
# steps that lose much and steps that lose little are composed.
_MOST_CELLS = 1 << 18
_DEVIATIONS = 20  # width of a composition, about
_USUAL_TAIL = 10.0  # standard deviations of the noise
# Relative accuracy of the calibrated noise multiplier; the returned value always errs on the private side.
SIGMA_TOLERANCE = 1e-4
# By which calibration stays below the target, relative: another processor may round otherwise, and must not find it exceeded.
_ROUNDING = 1e-6
# Of `decimals`: above 10 a noise multiplier is the least up to this share.
_DIGITS_SLACK = 1e-5
MAX_MEAN_LOSS = 1000.0
"""Mean privacy loss above which no epsilon is computed: it would be of about that size, and take gigabytes."""
# Below this a step hides next to nothing, and the exponential of its largest loss would leave double precision; above the
# other one the accountant counts less noise than there is.
_LEAST_ACCOUNTED, _MOST_ACCOUNTED = 0.05, 1e5
_TOO_MANY_STEPS = 1 << 53  # from here on double precision no longer counts
# Of the grid on which a search for noise begins, in units of epsilon; no number that is returned was found on it alone.
_COARSE_CELL, _COARSEST_CELL, _COARSE_SLACK, _COARSE_STEPS = 1e-2, 0.05, 3e-3, 2000


@dataclass(frozen=True, kw_only=True, order=True)
class GaussianSteps:
    """`steps` Poisson-subsampled Gaussian releases with the same parameters.

    Attributes:
        noise_multiplier: standard deviation of the noise divided by `max_grad_norm`, > 0.
        sample_rate: probability with which each record enters a step, in (0, 1].
        steps: number of executed noisy steps, >= 0 and below 2^53.
    """

    noise_multiplier: float
    sample_rate: float
    steps: int

    def __post_init__(self) -> None:
        if not (math.isfinite(self.noise_multiplier) and self.noise_multiplier > 0):
            raise PrivacyError(
                f"noise_multiplier is {self.noise_multiplier}; a finite number above 0 is needed to account for it."
            )
        if not 0 < self.sample_rate <= 1:
            raise PrivacyError(f"sample_rate is {self.sample_rate}; expected a probability in (0, 1].")
        if self.steps < 0:
            raise PrivacyError(f"steps is {self.steps}; expected 0 or more.")
        if self.steps >= _TOO_MANY_STEPS:
            raise PrivacyError(f"steps is {excerpt(self.steps)}; expected a number below 2^53.")


def merged(events: Iterable[GaussianSteps]) -> tuple[GaussianSteps, ...]:
    """Return `events` with equal mechanisms added up, in order of first appearance."""
    steps: Counter[tuple[float, float]] = Counter()
    for event in events:
        steps[event.noise_multiplier, event.sample_rate] += event.steps
    return tuple(GaussianSteps(noise_multiplier=s, sample_rate=q, steps=n) for (s, q), n in steps.items())


def check_delta(delta: float) -> None:
    """Raise `PrivacyError` unless `delta` lies between 1e-30 and 1, strictly below 1."""
    if not MIN_DELTA <= delta < 1:
        raise PrivacyError(f"delta is {delta}; expected a number from {MIN_DELTA:g} to below 1, for example 1e-5.")


def check_epsilon(epsilon: float) -> None:
    """Raise `PrivacyError` unless `epsilon` is a target that can be asked for."""
    if not 0 < epsilon <= MAX_EPSILON:
        raise PrivacyError(
            f"epsilon is {as_set(epsilon)}; expected a number above 0 and at most {MAX_EPSILON:g}, for example 8."
        )


def compose_epsilon(events: Iterable[GaussianSteps], delta: float) -> float:
    """Return epsilon at `delta` of all `events` composed, by PLD, add-or-remove-one relation.

    Args:
        events: executed mechanisms, in any order; equal parameters are merged first.
        delta: failure probability, in (0, 1).

    Returns:
        epsilon >= 0; 0.0 when no step was executed; `inf` when the accountant cannot bound it.
    """
    check_delta(delta)
    return _epsilon_on_grid(events, delta, PLD_DISCRETIZATION)


def epsilon_at_sites(
    shared: Iterable[GaussianSteps], sites: int, delta: float, *, apart: Iterable[GaussianSteps] = ()
) -> float:
    """Return epsilon at `delta` of a person with data at several sites of which only the sum is seen.

    At each site a coin of its own decides whether the person enters a step, there with a vector of norm C at most. What the
    coins bring adds up *inside* one noisy sum: a composition of so many accounts would say less than is lost.

    Args:
        shared: steps over the sum of the sites; noise multiplier of the whole noise in it.
        sites: number of sites with data of the person, 1 to 32.
        delta: failure probability, in (0, 1).
        apart: what each of these sites releases by itself besides.

    Returns:
        As `compose_epsilon`.
    """
    check_delta(delta)
    if not 1 <= sites <= MOST_SITES:
        raise PrivacyError(f"a person with data at {sites} sites cannot be accounted for; expected 1 to {MOST_SITES}.")
    several = [replace(event, steps=event.steps * sites) for event in apart]
    return _epsilon_on_grid(several, delta, PLD_DISCRETIZATION, shared=shared, sites=sites)


def mean_loss(event: GaussianSteps, sites: int = 1) -> float:
    """Return an upper bound on the mean privacy loss: KL is convex in the mixture, and at most chi-square.

    Args:
        event: steps of one mechanism.
        sites: number of sites at which one person has data that adds up in each step.
    """
    sigma, rate = event.noise_multiplier, event.sample_rate
    square = rate if sites == 1 else sites * rate * (1 - rate) + (sites * rate) ** 2
    return event.steps * min(square / (2 * sigma**2), _chi_square(sigma, rate, sites))


def _chi_square(sigma: float, rate: float, sites: int) -> float:
    """Return the mean of exp(j k / sigma^2) - 1 over two independent numbers j, k of coins."""
    if sites == 1:
        return rate**2 * math.expm1(min(1 / sigma**2, 700.0))
    numbers = np.arange(sites + 1)
    powers = np.expm1(np.minimum(np.outer(numbers, numbers) / sigma**2, 700.0))
    return float(weights(rate, sites) @ powers @ weights(rate, sites))


def _epsilon_on_grid(
    events: Iterable[GaussianSteps],
    delta: float,
    widest: float,
    *,
    shared: Iterable[GaussianSteps] = (),
    sites: int = 1,
) -> float:
    merged: Counter[tuple[float, float, int]] = Counter()
    for event, at in [*((event, 1) for event in events), *((event, sites) for event in shared)]:
        if event.steps and event.noise_multiplier < _LEAST_ACCOUNTED * at:
            return math.inf
        # Monotone in both: the accountant may count less noise and a higher rate.
        counted = (min(event.noise_multiplier, _MOST_ACCOUNTED), max(event.sample_rate, MIN_SAMPLE_RATE), at)
        merged[counted] += event.steps
    key = tuple(sorted((sigma, q, steps, at) for (sigma, q, at), steps in merged.items() if steps))
    return _compose_epsilon(key, delta, widest) if key else 0.0


@lru_cache(maxsize=4096)
def _compose_epsilon(events: tuple[tuple[float, float, int, int], ...], delta: float, widest: float) -> float:
    total = sum(
        mean_loss(GaussianSteps(noise_multiplier=sigma, sample_rate=q, steps=n), at) for sigma, q, n, at in events
    )
    if total > MAX_MEAN_LOSS:
        return math.inf
    cell = _cell(events, total, widest)
    found = composed_epsilon(events, delta, cell)
    if found == 0.0 or cell >= widest:
        return found
    # Both are upper bounds: for few steps that lose next to nothing, rounding tells more than the width of cells.
    return min(found, composed_epsilon(events, delta, widest))


def _cell(events: tuple[tuple[float, float, int, int], ...], total_mean_loss: float, widest: float) -> float:
    """Return the width of cells: `widest` times a power of two, so that steps of one mechanism share a grid."""
    deviations = (at / sigma if q == 1 else math.sqrt(_chi_square(sigma, q, at)) for sigma, q, _, at in events)
    wanted = min(widest, *(deviation / _CELLS_PER_DEVIATION for deviation in deviations))
    width = _DEVIATIONS * math.sqrt(2 * total_mean_loss)
    width = max(width, *(largest_loss(sigma, q, True, _USUAL_TAIL, at) for sigma, q, _, at in events))
    power = max(math.floor(math.log2(wanted / widest)), math.ceil(math.log2(width / _MOST_CELLS / widest)))
    return float(widest * 2.0**power)


@lru_cache(maxsize=256)
def calibrate_noise_multiplier(
    *,
    epsilon: float,
    delta: float,
    sample_rate: float,
    steps: int,
    others: tuple[GaussianSteps, ...] = (),
    decimals: int | None = None,
) -> float:
    """Return the smallest noise multiplier that keeps `steps` steps, together with `others`, within `(epsilon, delta)`.

    The answer is never below the smallest and exceeds it by `SIGMA_TOLERANCE` (relative) at most. With `decimals` it is the
    smallest of so many decimals, to five digits if it is above 10.

    Raises:
        PrivacyError: if a parameter is out of range or the target cannot be reached with any sensible noise.
    """
    check_delta(delta)
    check_epsilon(epsilon)
    if not 0 < sample_rate <= 1:
        raise PrivacyError(f"sample_rate is {sample_rate}; expected a probability in (0, 1].")
    if not 1 <= steps <= MAX_STEPS:
        raise PrivacyError(f"steps is {steps:,}; noise can be calibrated for 1 to {MAX_STEPS:,} of them.")
    if others and (fixed := compose_epsilon(others, delta)) >= epsilon:
        raise PrivacyError(
            f"what the plan releases besides its steps alone costs epsilon {rounded_up(fixed)}, the target is "
            f"{as_set(epsilon)}. Raise site_metrics.noise_multiplier, name fewer metrics, or raise epsilon."
        )

    # In whole multiples of a millionth, or of the last decimal.
    scale: int = 10 ** (6 if decimals is None else decimals)
    target = epsilon * (1 - _ROUNDING) if decimals is None else epsilon

    def search(guess: float, slack: float, cell: float) -> int:
        def cost(n: int) -> float:
            step = GaussianSteps(noise_multiplier=n / scale, sample_rate=sample_rate, steps=steps)
            return _epsilon_on_grid([step, *others], delta, cell)

        least, most = math.ceil(MIN_NOISE_MULTIPLIER * scale), int(MAX_NOISE_MULTIPLIER) * scale
        slope = -(1 + 0.7 * (scale / guess) ** 2)  # seen over many settings; the limit's is close for much noise only
        return crossing(cost, target, rising=False, least=least, most=most, guess=guess, slope=slope, slack=slack)[1]

    # Wide cells are quick, and mislead where many steps each lose far less than a cell.
    found: float = _limit_sigma(_limit_mu(epsilon, delta), sample_rate, steps, others) * scale
    coarse = min(epsilon * _COARSE_CELL, _COARSEST_CELL)
    if coarse > PLD_DISCRETIZATION and steps <= _COARSE_STEPS:
        found = search(found, _COARSE_SLACK, coarse)
    found = search(found, SIGMA_TOLERANCE if decimals is None else _DIGITS_SLACK, PLD_DISCRETIZATION)
    if found > int(MAX_NOISE_MULTIPLIER) * scale:
        raise PrivacyError(
            f"epsilon {epsilon} at delta {delta} needs a noise multiplier above 10,000 for {steps} steps at "
            f"sample_rate {sample_rate}. Raise epsilon, or lower the number of steps or sample_rate."
        )
    return found / scale


def affordable_steps(
    spent: Iterable[GaussianSteps],
    *,
    noise_multiplier: float,
    sample_rate: float,
    budget: float,
    delta: float,
) -> int:
    """Return how many more steps of one mechanism keep the composition with `spent` within `budget`, up to 2^24.

    Args:
        spent: what was charged so far.
        noise_multiplier, sample_rate: the mechanism to be repeated.
        budget: cap on epsilon at `delta`.
    """
    past = tuple(spent)

    def cost(steps: int) -> float:
        more = GaussianSteps(noise_multiplier=noise_multiplier, sample_rate=sample_rate, steps=steps)
        return compose_epsilon([*past, more], delta)

    if budget <= 0:
        return 0
    guess = likely_steps(past, noise_multiplier=noise_multiplier, sample_rate=sample_rate, budget=budget, delta=delta)
    return crossing(cost, budget, rising=True, least=1, most=MAX_STEPS, guess=guess)[0]


def noise_of_sum(noise_multiplier: float, count: int) -> float:
    """Return the noise multiplier of a sum to which `count` parties each added noise of their own: never above the exact one.

    Independent Gaussian noise adds up in variance, so it is `noise_multiplier` times the square root of `count`.
    """
    return _root(Fraction(noise_multiplier) ** 2 * count, above=False)


def noise_of_share(noise_multiplier: float, count: int) -> float:
    """Return the least noise multiplier of each of `count` parties that makes the sum's at least `noise_multiplier`."""
    return _root(Fraction(noise_multiplier) ** 2 / count, above=True)


def _root(square: Fraction, *, above: bool) -> float:
    """Return the square root, or where it is no float the next one: above it, or below."""
    root = math.nextafter(
        math.nextafter(math.sqrt(square), 0.0), 0.0
    )  # two floats lower is below, however `sqrt` rounded
    while Fraction(higher := math.nextafter(root, math.inf)) ** 2 <= square:
        root = higher
    return higher if above and Fraction(root) ** 2 < square else root


# --- where to look first ---


def likely_steps(
    spent: Iterable[GaussianSteps], *, noise_multiplier: float, sample_rate: float, budget: float, delta: float
) -> float:
    """Return an estimate of `affordable_steps`, at least 1: where to look first, never an answer."""
    step = GaussianSteps(noise_multiplier=noise_multiplier, sample_rate=sample_rate, steps=1)
    left = _limit_mu(budget, delta) ** 2 - sum(map(_limit_mu_squared, spent))
    return min(max(left / _limit_mu_squared(step), 1.0), float(MAX_STEPS))


def _limit_mu(epsilon: float, delta: float) -> float:
    """Return the mu of the Gaussian mechanism that is (epsilon, delta)-DP (Dong, Roth, Su 2022, corollary 2.13), about."""

    def excess(log_mu: float) -> float:
        mu = math.exp(log_mu)
        return float(ndtr(mu / 2 - epsilon / mu) - math.exp(epsilon + log_ndtr(-mu / 2 - epsilon / mu)) - delta)

    least, most = math.log(1e-6), math.log(1e3)
    if excess(least) >= 0:
        return math.exp(least)
    if excess(most) <= 0:
        return math.exp(most)
    return math.exp(float(bisect(excess, least, most, xtol=1e-3)))


def _limit_mu_squared(event: GaussianSteps) -> float:
    """Return mu^2 of the limit of many steps: q^2 T (exp(1 / sigma^2) - 1) (Bu, Dong, Long, Su 2020), exact for q = 1."""
    inverse = min(1 / event.noise_multiplier**2, 700.0)
    return event.steps * (inverse if event.sample_rate == 1 else event.sample_rate**2 * math.expm1(inverse))


def _limit_sigma(mu: float, sample_rate: float, steps: int, others: Iterable[GaussianSteps]) -> float:
    """Return the noise multiplier that, in the limit, leaves `steps` steps what `others` leave of `mu`."""
    left = max(mu**2 - sum(map(_limit_mu_squared, others)), 1e-3 * mu**2) / steps
    return 1 / math.sqrt(left if sample_rate == 1 else math.log1p(left / sample_rate**2))
