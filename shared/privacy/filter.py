"""Spending against a cap when each run may be chosen after seeing the results of earlier ones: a Rényi privacy filter.

Composition by privacy loss distributions (`shared.privacy.accounting`) holds for plans that were fixed in advance. If
noise, rate and steps of the next run are chosen after looking at the last one, the sum of the losses is itself random, and
only a *filter* holds: a rule that stops before a cap that was fixed beforehand (Rogers, Roth, Ullman, Vadhan 2016).

The rule. Fix orders alpha_1 < ... < alpha_K, all integers >= 2, before the first charge, and let w = 1/K. Let S_k be
the sum of the Rényi divergences of order alpha_k of all steps charged so far. The spend is

    epsilon = z + log(1 - delta M(z)), at the z with   sum_k w alpha_k exp((alpha_k - 1)(z - S_k)) = 1 / delta,
    where M(y) = sum_k w exp((alpha_k - 1)(y - S_k)).

A charge is refused if the spend with it would exceed the cap. With one order this is the filter of Feldman and Zrnic
2021 (theorem 3.1: stop before the sum of divergences of one fixed order crosses a bound; also Lécuyer 2021), with the
conversion of Canonne, Kamath, Steinke 2020 (proposition 12). With several it is their mixture, as in Whitehouse, Ramdas,
Rogers, Wu 2023 (method of mixtures); taking the better of two orders afterwards, without it, would not be valid.

Proof. Let P, Q be the laws of everything released on two neighbouring data sets, Z = log dP/dQ, S_k the sums at the end,
both random. Given any past, the next step has D_alpha(P || Q) <= its charge, so E_P[exp((alpha_k - 1)(Z - S_k))] <= 1
for each k by induction over the steps, hence E_P[M(Z)] <= 1. Let c be the cap and suppose that for all y
(*) max(0, 1 - exp(c - y)) <= delta M(y). Then P(E) - e^c Q(E) <= E_P[max(0, 1 - exp(c - Z))] <= delta E_P[M(Z)] <= delta
for every event E: (c, delta)-DP. As log(1 - exp(c - y)) - log M(y) is concave in y, (*) need only be checked where its
derivative is 0; that the maximum there equals log(delta) is the equation above, and it falls as c grows. So (*) holds
exactly for c >= epsilon. The charges count the larger of D_alpha(P || Q) and D_alpha(Q || P), so both directions hold.

Formal guarantees (tests: tests/shared/privacy/test_filter.py)
    * Whoever chooses each mechanism by everything released before, and stops before `filter_epsilon` exceeds a cap that is
      fixed, has released something (cap, delta)-DP under add-or-remove-one
      (test_adaptive_sequences_stop_exactly_before_the_cap).
    * The spend never falls below PLD composition of what was released, and never falls when something is added (same test,
      test_the_spend_is_monotone).
    * Divergences are upper bounds for both directions (test_divergence_against_numerical_integration).
    * If the cap is changed after seeing results, with the orders kept, E_P[max(0, 1 - exp(c - Z))] <= delta still holds for
      the cap c in force at the end, since (*) does; a guarantee that does not depend on the results is the one at the largest
      cap that would ever be set.

It is no odometer: at a moment that was not fixed as a cap beforehand, the spend tells how much of the cap is used, and
is no (epsilon, delta) of its own.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import repeat
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq, minimize_scalar
from scipy.special import gammaln, logsumexp

from shared.errors import PrivacyError
from shared.limits import MAX_STEPS
from shared.privacy.accounting import GaussianSteps, affordable_steps, check_delta, compose_epsilon

Composition = Literal["adaptive", "fixed"]

MAX_ORDER = 512
# Rényi divergences are rounded up by more than the error of adding some hundred terms in double precision.
_RELATIVE_SLACK, _ABSOLUTE_SLACK = 1e-9, 1e-12
# The root is found to this accuracy and the spend raised by as much.
_ROOT_TOLERANCE = 1e-10
# Below the first a step hides nothing, above the second everything; beyond, squares would leave double precision.
_LEAST_NOISE_MULTIPLIER, _MOST_NOISE_MULTIPLIER = 1e-3, 1e100
# Above this a spend is called infinite, as double precision would no longer resolve the root.
_LARGEST_SPEND = 1e6
# The orders are the one that is best for plain Gaussian noise, and this share of it: sampling a small part of the
# records with little noise makes lower orders better (docs/decisions/0008).
_LOWER_ORDER = 0.6


@dataclass(frozen=True, kw_only=True)
class SpendingRule:
    """How one account measures what was charged against its cap.

    Attributes:
        composition: "adaptive": the filter above, for runs chosen one after the other. "fixed": PLD, for plans that were all
            fixed before the first of them started.
        delta: failure probability, in (0, 1).
        orders: of the filter, ascending, distinct, in [2, `MAX_ORDER`]; fixed before the first charge.
    """

    composition: Composition
    delta: float
    orders: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.composition not in ("adaptive", "fixed"):
            raise PrivacyError(f"composition is {self.composition!r}; expected 'adaptive' or 'fixed'.")
        check_delta(self.delta)
        check_orders(self.orders)

    def epsilon(self, mechanisms: Iterable[GaussianSteps] | Counter[GaussianSteps]) -> float:
        """Return the spend of all `mechanisms` by this rule; `inf` if it cannot be bounded.

        Args:
            mechanisms: each as often as it was charged, in any order; or how often each was, which is the same to the last bit.
        """
        if self.composition == "fixed":
            counted = Counter(mechanisms).items()
            return compose_epsilon((replace(m, steps=n * m.steps) for m, n in counted), self.delta)
        return filter_epsilon(mechanisms, delta=self.delta, orders=self.orders)

    def affordable_steps(
        self, spent: Iterable[GaussianSteps], *, noise_multiplier: float, sample_rate: float, cap: float
    ) -> int:
        """Return how many more steps of one mechanism keep the spend within `cap`."""
        if self.composition == "fixed":
            return affordable_steps(
                spent, noise_multiplier=noise_multiplier, sample_rate=sample_rate, budget=cap, delta=self.delta
            )
        step = GaussianSteps(noise_multiplier=noise_multiplier, sample_rate=sample_rate, steps=1)
        past, more = _sums(spent, self.orders), _sums([step], self.orders)

        def fits(steps: int) -> bool:
            return _spend(past + steps * more, self.delta, self.orders) <= cap

        low, high = 0, MAX_STEPS + 1  # `low` steps fit, or it is 0; `high` do not, or are more than may be asked for
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return low


def filter_orders(*, epsilon: float, delta: float) -> tuple[int, ...]:
    """Return the orders for a cap: a function of the cap alone, so they cannot depend on results.

    The upper one would let a plain Gaussian mechanism, whose divergence is rho alpha, spend the largest rho.
    """
    check_delta(delta)
    if not (math.isfinite(epsilon) and epsilon > 0):
        raise PrivacyError(f"epsilon is {epsilon}; expected a finite number above 0, for example 8.")

    def unused(order: float) -> float:
        return -(epsilon - math.log1p(-1 / order) + math.log(order * delta) / (order - 1)) / order

    best = float(minimize_scalar(unused, bounds=(1.01, MAX_ORDER - 1), method="bounded", options={"xatol": 1e-3}).x)
    return tuple(sorted({max(2, math.ceil(_LOWER_ORDER * best)), max(2, math.ceil(best))}))


def check_orders(orders: Sequence[int]) -> None:
    """Raise `PrivacyError` unless `orders` are ascending distinct integers in [2, `MAX_ORDER`], at least one."""
    if not orders or list(orders) != sorted(set(orders)) or not all(_is_order(order) for order in orders):
        raise PrivacyError(
            f"the filter's orders are {list(orders)}; expected ascending whole numbers from 2 to {MAX_ORDER}, each once. "
            "They were fixed when the account's cap was set; restore them."
        )


def filter_epsilon(
    mechanisms: Iterable[GaussianSteps] | Counter[GaussianSteps], *, delta: float, orders: Sequence[int]
) -> float:
    """Return the spend of the filter: it stays within a cap exactly as long as the cap's guarantee holds.

    Args:
        mechanisms: everything charged, in any order.
        delta: failure probability, in (0, 1).
        orders: integers >= 2, fixed before the first charge, by `filter_orders`.

    Returns:
        epsilon >= 0; 0.0 when no step was executed; `inf` when it would exceed a million.
    """
    check_delta(delta)
    check_orders(orders)
    return _spend(_sums(mechanisms, orders), delta, orders)


@lru_cache(maxsize=4096)
def renyi_divergence(noise_multiplier: float, sample_rate: float, order: int) -> float:
    """Return an upper bound on the Rényi divergence of one Poisson-subsampled Gaussian step, in nats, both directions.

    Mironov, Talwar, Zhang 2019: theorem 5 (the direction computed here is the larger one) and section 3.3 (integer orders).
    """
    if noise_multiplier < _LEAST_NOISE_MULTIPLIER:
        return math.inf
    counted = min(noise_multiplier, _MOST_NOISE_MULTIPLIER)  # less noise may be counted than there is
    bound = max(_divergence(counted, sample_rate, order), 0.0) * (1 + _RELATIVE_SLACK) + _ABSOLUTE_SLACK
    return math.inf if math.isnan(bound) else bound


def _divergence(noise_multiplier: float, sample_rate: float, order: int) -> float:
    """Return the divergence by the binomial sum of section 3.3, before it is rounded up.

    Term by term as dp_accounting has it, to the last bit, so the spend of a ledger is what it always was. That package would
    bring `scipy.stats`, and so 30 MB and half a second, into every process that looks at a budget.
    """
    if sample_rate == 1:
        return order / (2 * noise_multiplier**2)
    log_sum, taken, left = -math.inf, math.log(sample_rate), math.log1p(-sample_rate)
    for k in range(order + 1):
        ways = float(gammaln(order + 1) - gammaln(k + 1) - gammaln(order - k + 1))
        term = ways + k * taken + (order - k) * left + (k * k - k) / (2 * noise_multiplier**2)
        low, high = min(log_sum, term), max(log_sum, term)
        log_sum = high if low == -math.inf else math.log1p(math.exp(low - high)) + high
    return log_sum / (order - 1)


def _is_order(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 2 <= value <= MAX_ORDER


def _sums(mechanisms: Iterable[GaussianSteps] | Counter[GaussianSteps], orders: Sequence[int]) -> NDArray[np.float64]:
    """Return the sum of the divergences of all steps, for each order."""
    charged = [
        (m, n) for m, n in Counter(mechanisms).items() if m.steps
    ]  # 0 steps of infinite divergence are still nothing

    def terms(order: int) -> Iterator[float]:
        """Yield one term a charge: `fsum` makes the sum independent of their order, to the last bit."""
        for m, n in charged:
            yield from repeat(m.steps * renyi_divergence(m.noise_multiplier, m.sample_rate, order), n)

    return np.array([math.fsum(terms(order)) for order in orders])


def _spend(sums: NDArray[np.float64], delta: float, orders: Sequence[int]) -> float:
    if not sums.any():
        return 0.0
    order = np.array(orders, dtype=np.float64)
    log_share, log_delta = -math.log(len(orders)), math.log(delta)

    def excess(z: float) -> float:
        return float(logsumexp(log_share + np.log(order) + (order - 1) * (z - sums))) + log_delta

    # Each order alone meets the equation at `alone`, so all together do before the first of these, and not before
    # K times their largest term does.
    alone = sums - (log_share + np.log(order) + log_delta) / (order - 1)
    high = float(alone.min())
    if not high <= _LARGEST_SPEND:
        return math.inf
    low = float((alone + log_share / (order - 1)).min()) - 1e-6
    z = float(brentq(excess, low, high + 1e-6, xtol=_ROOT_TOLERANCE))
    mixture = math.exp(float(logsumexp(log_share + (order - 1) * (z - sums))))
    return max(0.0, z + math.log1p(-delta * mixture)) + 2 * _ROOT_TOLERANCE
