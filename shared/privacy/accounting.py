"""Epsilon of Poisson-subsampled Gaussian steps, by privacy loss distributions (PLD).

Formal guarantees
    * `compose_epsilon` is an upper bound on epsilon, at the given delta, of running all the given events one
      after the other on one data set, under the add-or-remove-one relation, against an observer of every
      noisy sum (test: tests/shared/test_accounting.py, table of published noise multipliers; cross-check
      against the PRV accountant of Opacus).
    * `calibrate_noise_multiplier` returns a noise multiplier whose epsilon, by the same function, is at most
      the target (same tests).

Sources: Koskela, Jälkö, Honkela 2020 and Doroshenko et al. 2022 (PLD, `dp-accounting`); Gopi, Lee, Wutschitz
2021 (PRV, Opacus).
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache, reduce

import dp_accounting
from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution, from_gaussian_mechanism
from scipy.optimize import brentq

from shared.errors import PrivacyError

# Width of one cell of the discretised privacy loss. The discretisation is pessimistic: a wider cell gives a larger
# epsilon. Against cells of 1e-4, cells of 1e-3 add up to 0.01 to epsilon at very small rates and many steps, usually less
# than 1e-4, and take a tenth of the time.
PLD_DISCRETIZATION = 1e-3
# Relative accuracy of the calibrated noise multiplier; the returned value always errs on the private side.
SIGMA_TOLERANCE = 1e-4
# Below this the accountant is slow and the claim is without meaning; more noise than asked for is never wrong.
MIN_NOISE_MULTIPLIER = 0.2


@dataclass(frozen=True, kw_only=True, order=True)
class GaussianSteps:
    """`steps` Poisson-subsampled Gaussian releases with the same parameters.

    Attributes:
        noise_multiplier: standard deviation of the noise divided by `max_grad_norm`, > 0.
        sample_rate: probability with which each record enters a step, in (0, 1].
        steps: number of executed noisy steps, >= 0.
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


def check_delta(delta: float) -> None:
    """Raise `PrivacyError` unless `delta` lies strictly between 0 and 1."""
    if not 0 < delta < 1:
        raise PrivacyError(f"delta is {delta}; expected a number strictly between 0 and 1, for example 1e-5.")


def compose_epsilon(events: Iterable[GaussianSteps], delta: float) -> float:
    """Return epsilon at `delta` of all `events` composed, by PLD, add-or-remove-one relation.

    Args:
        events: executed mechanisms, in any order; equal parameters are merged first.
        delta: failure probability, in (0, 1).

    Returns:
        epsilon >= 0; 0.0 when no step was executed; `inf` when the accountant cannot bound it.
    """
    check_delta(delta)
    merged: Counter[tuple[float, float]] = Counter()
    for event in events:
        merged[(event.noise_multiplier, event.sample_rate)] += event.steps
    key = tuple(sorted((sigma, q, steps) for (sigma, q), steps in merged.items() if steps))
    return _compose_epsilon(key, delta, PLD_DISCRETIZATION) if key else 0.0


@lru_cache(maxsize=4096)
def _compose_epsilon(events: tuple[tuple[float, float, int], ...], delta: float, cell: float) -> float:
    composed = reduce(lambda one, other: one.compose(other), (_steps_pld(*event, cell) for event in events))
    return float(composed.get_epsilon_for_delta(delta))


@lru_cache(maxsize=4)
def _steps_pld(sigma: float, q: float, steps: int, cell: float) -> PrivacyLossDistribution:
    return _step_pld(sigma, q, cell).self_compose(steps)


# Discretising one step takes longer than composing it many times, and every round asks for the same step.
@lru_cache(maxsize=4)
def _step_pld(sigma: float, q: float, cell: float) -> PrivacyLossDistribution:
    return from_gaussian_mechanism(
        standard_deviation=sigma,
        sampling_prob=q,
        value_discretization_interval=cell,
        neighboring_relation=dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE,
    )


@lru_cache(maxsize=256)
def calibrate_noise_multiplier(
    *, epsilon: float, delta: float, sample_rate: float, steps: int, others: tuple[GaussianSteps, ...] = ()
) -> float:
    """Return the smallest noise multiplier that keeps `steps` steps, together with `others`, within `(epsilon, delta)`.

    The answer is never below the smallest and exceeds it by a few `SIGMA_TOLERANCE` (relative) at most.

    Raises:
        PrivacyError: if a parameter is out of range or the target cannot be reached with any sensible noise.
    """
    check_delta(delta)
    if not (math.isfinite(epsilon) and epsilon > 0):
        raise PrivacyError(f"epsilon is {epsilon}; expected a finite number above 0, for example 8.")
    if not 0 < sample_rate <= 1:
        raise PrivacyError(f"sample_rate is {sample_rate}; expected a probability in (0, 1].")
    if steps < 1:
        raise PrivacyError(f"steps is {steps}; at least one step is needed to calibrate noise.")

    # Wide cells are quick and pessimistic, so their root lies on the private side of the true one.
    # (Not narrower than 1e-5: memory grows with the number of cells.)
    cell = max(1e-5, min(1e-2, epsilon / 500))

    if others and (fixed := compose_epsilon(others, delta)) >= epsilon:
        raise PrivacyError(
            f"what the plan releases besides its steps alone costs epsilon {fixed:.4g}, the target is {epsilon:g}. Raise "
            "site_metrics.noise_multiplier, name fewer metrics, or raise epsilon."
        )
    beside = tuple((event.noise_multiplier, event.sample_rate, event.steps) for event in others)

    def excess(log_sigma: float) -> float:
        return _compose_epsilon(((math.exp(log_sigma), sample_rate, steps), *beside), delta, cell) - epsilon

    low = high = 0.0
    while excess(high) > 0:
        low, high = high, high + 1.0
        if high > math.log(1e4):
            raise PrivacyError(
                f"epsilon {epsilon} at delta {delta} needs a noise multiplier above 10,000 for {steps} steps at "
                f"sample_rate {sample_rate}. Raise epsilon, or lower the number of steps or sample_rate."
            )
    while low == high:  # the first guess of 1.0 was private enough: look below it
        low = max(low - 0.5, math.log(MIN_NOISE_MULTIPLIER))
        if excess(low) <= 0:
            if low == math.log(MIN_NOISE_MULTIPLIER):
                return MIN_NOISE_MULTIPLIER
            high = low
    sigma = math.exp(float(brentq(excess, low, high, xtol=SIGMA_TOLERANCE / 4)) + SIGMA_TOLERANCE / 4)
    while True:
        events = [GaussianSteps(noise_multiplier=sigma, sample_rate=sample_rate, steps=steps), *others]
        if compose_epsilon(events, delta) <= epsilon:
            return sigma
        sigma *= 1 + SIGMA_TOLERANCE / 4


def affordable_steps(
    spent: Iterable[GaussianSteps],
    *,
    noise_multiplier: float,
    sample_rate: float,
    budget: float,
    delta: float,
) -> int:
    """Return how many more steps of one mechanism keep the composition with `spent` within `budget`.

    Args:
        spent: what was charged so far.
        noise_multiplier, sample_rate: the mechanism to be repeated.
        budget: cap on epsilon at `delta`.
    """
    past = tuple(spent)

    def fits(steps: int) -> bool:
        more = GaussianSteps(noise_multiplier=noise_multiplier, sample_rate=sample_rate, steps=steps)
        return compose_epsilon([*past, more], delta) <= budget

    if not fits(1):
        return 0
    high = 2
    while fits(high):
        high *= 2
        if high > 1 << 24:
            return high
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def prv_epsilon(events: Iterable[GaussianSteps], delta: float) -> float:
    """Return epsilon by the PRV accountant of Opacus: an independent check of `compose_epsilon`, upper bound."""
    from opacus.accountants import PRVAccountant

    accountant = PRVAccountant()
    accountant.history = [(e.noise_multiplier, e.sample_rate, e.steps) for e in events if e.steps]
    if not accountant.history:
        return 0.0
    # Opacus logs a warning about its own mesh; the caller compares the two numbers instead.
    logging.getLogger("opacus").setLevel(logging.ERROR)
    return float(accountant.get_epsilon(delta=delta))
