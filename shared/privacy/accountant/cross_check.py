"""A second opinion on epsilon, by the PRV accountant of Opacus: optional, and bounded before it starts.

Formal guarantees (tests: tests/shared/privacy/test_cross_check.py)
    * Whatever the second accountant does, this returns: its epsilon, or why there is none. Nothing that was paid for with
      budget depends on it.
    * A grid that would take more than a second or two, or some hundred megabytes, is not begun.

Source: Gopi, Lee, Wutschitz 2021 (PRV); its upper bound, which lies about 0.01 above its estimate.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from shared.epsilons import delta_rounded_up
from shared.privacy.accounting import GaussianSteps

_MOST_CELLS = 1 << 20  # of the grid, summed over distinct mechanisms
_EPSILON_ERROR, _DELTA_PARTS = 0.01, 1000  # Opacus's defaults


@dataclass(frozen=True, kw_only=True)
class CrossCheck:
    """What the PRV accountant says.

    Attributes:
        epsilon: its upper bound; None if there is none.
        reason: why there is none, one sentence; None if there is one.
    """

    epsilon: float | None = None
    reason: str | None = None


def prv_cross_check(events: Iterable[GaussianSteps], delta: float) -> CrossCheck:
    """Return epsilon of all `events` by PRV, or the reason why it was not computed; never raises."""
    return _cross_check(tuple(event for event in events if event.steps), delta)


@lru_cache(maxsize=1024)  # the sites of a run mostly executed the same
def _cross_check(events: tuple[GaussianSteps, ...], delta: float) -> CrossCheck:
    if not events:
        return CrossCheck(epsilon=0.0)
    try:
        return _computed(events, delta)
    except Exception as error:
        return CrossCheck(reason=f"The PRV accountant failed ({type(error).__name__}).")


def _computed(events: tuple[GaussianSteps, ...], delta: float) -> CrossCheck:
    from opacus.accountants import PRVAccountant
    from opacus.accountants.analysis.prv import PoissonSubsampledGaussianPRV

    accountant = PRVAccountant()
    accountant.history = [(e.noise_multiplier, e.sample_rate, e.steps) for e in events]
    # Opacus logs a warning about its own mesh; the caller compares the two numbers instead.
    logging.getLogger("opacus").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        domain = accountant._get_domain(
            prvs=[PoissonSubsampledGaussianPRV(e.sample_rate, e.noise_multiplier) for e in events],
            num_self_compositions=[e.steps for e in events],
            eps_error=_EPSILON_ERROR,
            delta_error=delta / _DELTA_PARTS,
        )
        if domain.size * len(events) > _MOST_CELLS:
            return CrossCheck(reason="The PRV accountant would need a grid too large for a cross-check.")
        if np.finfo(np.float64).eps * domain.size > delta * (1 - 1 / _DELTA_PARTS):
            return CrossCheck(
                reason=f"At delta {delta_rounded_up(delta)} the PRV accountant would be ruled by its own rounding."
            )
        # Finding the grid takes nearly all of the time, and the accountant would find this very one again.
        accountant._get_domain = lambda **options: domain
        found = float(accountant.get_epsilon(delta=delta))
    if not math.isfinite(found):
        return CrossCheck(reason="The PRV accountant found no finite bound.")
    return CrossCheck(epsilon=found)
