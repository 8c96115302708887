"""One-run audit: canaries are in or out of the data by independent fair coins; who is in is guessed from what comes out.

Two bounds on how often a private mechanism can let the guesses be right, each for a number of guesses that was fixed
before (all other canaries are abstained from):
    * (epsilon, delta)-DP: Steinke, Nasr, Jagielski 2023, "Privacy auditing with one (1) training run", theorem 5.2 in
      the computable form of their appendix D; assumes nothing but the claim at one delta.
    * f-DP: Mahloujifar, Melis, Chaudhuri 2024, "Auditing f-differential privacy in one run": the claim is the plan's
      whole trade-off curve. Far stronger, because a Gaussian leaks much less than its (epsilon, delta) allows.

Formal guarantees (tests: tests/simulations/audit/test_one_run_audit.py)
    * A mechanism that keeps its claim is called "violated" with probability at most `alpha`: every pair of bound and
      number of guesses has its share by Bonferroni.
    * The coins may be public; they must be fair, independent, and unknown to the mechanism and to the scores.
    * Scores may be anything that is computed from the output. A bad score weakens the audit, never its validity.
    * Several independent trainings are judged together without assuming anything within one of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import dp_accounting
import numpy as np
from dp_accounting.pld.privacy_loss_distribution import from_gaussian_mechanism
from numpy.typing import NDArray
from scipy import stats

from shared.errors import PrivacyError
from shared.privacy.accounting import GaussianSteps, compose_epsilon
from simulations.audit.result import AuditResult, check_alpha, judge

Array = NDArray[np.float64]
Coins = NDArray[np.bool_]

GUESS_RULE = ((1 / 2, 1 / 2), (1 / 8, 1 / 8), (1 / 8, 0.0), (1 / 32, 0.0))
"""Shares of the canaries with the highest scores that are guessed "in", and with the lowest guessed "out"."""

_STEEPEST = 20.0  # epsilon above which e^epsilon loses the digits of a rate; such lines may be left out
_OCTAVE = 16  # noise multipliers are tried in steps of 2 ** (1 / 16), down to a quarter and up to 16 times the claimed
_LEAST_NOISE, _MOST_NOISE = 0.3, 1e4  # outside, epsilon is slow to compute or without meaning
_CELL = 1e-2  # of the privacy loss; a wide cell is quick and pessimistic, so it never accuses
_DELTAS = tuple(float(d) for d in np.geomspace(1e-12, 0.9, 32))


@dataclass(frozen=True, kw_only=True)
class Guesses:
    """How one line of `GUESS_RULE` came out.

    Attributes:
        made: guesses r, fixed before.
        correct: right ones v.
    """

    made: int
    correct: int


def draw_coins(num_canaries: int, *, seed: int) -> Coins:
    """Return who is in, [canaries], from a public seed. The mechanism under test must not know it."""
    return np.random.default_rng([seed, 0xC0115]).random(num_canaries) < 0.5


def guess(scores: Array, included: Coins) -> list[Guesses]:
    """Guess by `GUESS_RULE` and count. A score that is not a number counts as the lowest; ties fall by position.

    Args:
        scores: float [canaries]; higher speaks for "in".
        included: the coins, bool [canaries].
    """
    order = np.argsort(np.nan_to_num(scores, nan=-np.inf), kind="stable")
    counts = [(math.floor(high * len(scores)), math.floor(low * len(scores))) for high, low in GUESS_RULE]
    return [
        Guesses(
            made=high + low,
            correct=int(included[order[len(order) - high :]].sum()) + int((~included[order[:low]]).sum()),
        )
        for high, low in counts
    ]


# --- (epsilon, delta)-DP ---


def p_value(num_canaries: int, guesses: Guesses, *, epsilon: float, delta: float) -> float:
    """Return a bound on the chance of so many correct guesses under (`epsilon`, `delta`)-DP, in [0, 1].

    Source: Steinke et al. 2023, theorem 5.2 and appendix D: P[Bin(r, q) >= v] + 2 m delta max_i P[v > Bin >= v - i] / i
    with q = e^epsilon / (1 + e^epsilon). All terms are positive, so nothing cancels.
    """
    r, v = guesses.made, guesses.correct
    q = 1 / (1 + math.exp(-epsilon))
    tail = float(stats.binom.sf(v - 1, r, q))
    if v == 0 or delta == 0:
        return min(1.0, tail)
    below = np.cumsum(stats.binom.pmf(np.arange(v - 1, -1, -1), r, q)) / np.arange(1, v + 1)
    return min(1.0, tail + 2 * num_canaries * delta * float(below.max()))


def epsilon_lower_bound(num_canaries: int, guesses: Guesses, *, delta: float, alpha: float) -> float:
    """Return the epsilon below which (epsilon, `delta`)-DP is refuted at level `alpha`; 0.0 if nothing is.

    Raises:
        PrivacyError: if the counts contradict each other.
    """
    if not 0 <= guesses.correct <= guesses.made <= num_canaries:
        raise PrivacyError(
            f"{guesses.correct} correct of {guesses.made} guesses about {num_canaries} canaries; expected correct <= "
            "guesses <= canaries."
        )
    return _epsilon_lower_bound(num_canaries, guesses, delta, alpha)


@lru_cache(maxsize=4096)
def _epsilon_lower_bound(num_canaries: int, guesses: Guesses, delta: float, alpha: float) -> float:
    def refuted(epsilon: float) -> bool:
        return p_value(num_canaries, guesses, epsilon=epsilon, delta=delta) < alpha

    if not refuted(0.0):
        return 0.0
    low, high = 0.0, 1.0
    while refuted(high):
        low, high = high, high + 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return low


# --- f-DP ---


@dataclass(frozen=True, kw_only=True)
class TradeOff:
    """A trade-off curve as points (epsilon, delta) that a mechanism satisfies at once, both arrays [points]."""

    epsilons: Array
    deltas: Array

    @cached_property
    def _lines(self) -> tuple[Array, Array]:
        """Slopes and intercepts of the lines below which no test lies, both directions of every (epsilon, delta)."""
        small = self.epsilons <= _STEEPEST
        epsilons, deltas = self.epsilons[small], self.deltas[small]
        slopes = np.concatenate([np.exp(-self.epsilons), np.exp(epsilons)])
        intercepts = np.concatenate([-self.deltas * np.exp(-self.epsilons), 1 - deltas - np.exp(epsilons)])
        return slopes, intercepts

    def least_false_positives(self, power: float) -> float:
        """Return the smallest rate of false positives at which a test can have this power (1 - f, inverted).

        Both directions (adding and removing the record) of every (epsilon, delta) hold; fewer points only make the
        result smaller, that is, the audit weaker.
        """
        slopes, intercepts = self._lines
        return max(0.0, float((slopes * power + intercepts).max()))


def trade_off(steps: GaussianSteps) -> TradeOff:
    """Return the trade-off curve of Poisson-subsampled Gaussian steps, from their privacy loss distribution."""
    return _trade_off(steps)


@lru_cache(maxsize=512)
def _trade_off(steps: GaussianSteps) -> TradeOff:
    one = from_gaussian_mechanism(
        standard_deviation=steps.noise_multiplier,
        sampling_prob=steps.sample_rate,
        value_discretization_interval=_CELL,
        neighboring_relation=dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE,
    )
    composed = one.self_compose(steps.steps)
    pairs = [(float(composed.get_epsilon_for_delta(delta)), delta) for delta in _DELTAS]
    finite = [(epsilon, delta) for epsilon, delta in pairs if math.isfinite(epsilon)]
    return TradeOff(epsilons=np.array([e for e, _ in finite]), deltas=np.array([d for _, d in finite]))


def refutes(num_canaries: int, guesses: Guesses, curve: TradeOff, *, alpha: float) -> bool:
    """Return whether `curve`-DP would let so many guesses be correct with probability below `alpha` only.

    Source: Mahloujifar et al. 2024, the theorem for two choices with abstentions and the recursion that evaluates it.
    Let p_i be the chance of exactly i correct guesses, R_i = sum_{l >= i} l p_l / m and H_i = sum_{l >= i} (r - l) p_l / m.
    Flipping the coin of one random canary gives R_i <= 1 - f(H_{i-1}). The recursion finds the least total mass that a
    tail of `alpha` at the observed count needs; more than 1 is impossible.
    """
    m, r, v = num_canaries, guesses.made, guesses.correct
    right, wrong = alpha * v / m, alpha * (r - v) / m
    for i in range(v, 0, -1):
        if right + wrong > r / m:
            return True
        needed = curve.least_false_positives(right)
        if needed <= wrong:
            return False  # from here on nothing would change any more
        right += (i - 1) / (r - i + 1) * (needed - wrong)
        wrong = needed
    return right + wrong > r / m


def least_refuted_noise(
    num_canaries: int, trainings: Sequence[Sequence[Guesses]], claim: GaussianSteps, *, alpha: float
) -> float | None:
    """Return the smallest noise multiplier that every training refutes at level `alpha`; None if there is none.

    Args:
        num_canaries: of each training.
        trainings: outcomes of the same guess rule in each training; each outcome has an equal share of `alpha`.
        claim: the plan; only its noise multiplier is varied, in steps of 2 ** (1 / 16), down to a quarter.
    """

    def refuted(index: int) -> bool:
        curve = trade_off(_with_noise(claim, index))
        return all(
            any(refutes(num_canaries, one, curve, alpha=alpha / len(lines)) for one in lines) for lines in trainings
        )

    # More noise allows less, so it is refuted sooner. Out from the claim in doubling strides: little noise is slow.
    least, most = _range_of(claim.noise_multiplier)
    low = high = 0
    if refuted(0):
        while refuted(low):
            if low == least:
                return _with_noise(claim, least).noise_multiplier
            low, high = max(least, 2 * low - 1), low
    else:
        while not refuted(high):
            if high == most:
                return None
            low, high = high, min(most, 2 * high + 1)
    while high - low > 1:  # refuted at `high`, not at `low`
        middle = (low + high) // 2
        low, high = (low, middle) if refuted(middle) else (middle, high)
    return _with_noise(claim, high).noise_multiplier


def _with_noise(claim: GaussianSteps, index: int) -> GaussianSteps:
    sigma = claim.noise_multiplier * 2 ** (index / _OCTAVE)
    return GaussianSteps(noise_multiplier=sigma, sample_rate=claim.sample_rate, steps=claim.steps)


def _range_of(sigma: float) -> tuple[int, int]:
    least = max(-2 * _OCTAVE, math.ceil(_OCTAVE * math.log2(_LEAST_NOISE / sigma)))
    most = min(4 * _OCTAVE, math.floor(_OCTAVE * math.log2(_MOST_NOISE / sigma)))
    return min(least, 0), max(most, 0)


# --- the audit ---


_RAISED_BY = {
    2: "More trainings (--trainings) raise the ceiling most, more canaries (--num-canaries) a little.",
    3: "More attacked models (--trainings), or a run with more records, raise the ceiling.",
}


@dataclass(frozen=True, kw_only=True)
class Training:
    """One independent training on its own canaries.

    Attributes:
        scores: float [canaries]; higher speaks for "in".
        included: the coins, bool [canaries].
    """

    scores: Array
    included: Coins


def audit_one_run(
    trainings: Sequence[Training],
    plan: GaussianSteps,
    *,
    claim: float,
    delta: float,
    alpha: float,
    audited: str,
    tier: int = 2,
) -> AuditResult:
    """Judge `claim` by the guesses about the canaries of one or more independent trainings.

    With k trainings a claim falls only if each of them refutes it at level alpha ** (1 / k): they are independent, so
    all of them err together with probability `alpha` at most. A mechanism that may leak everything with a small
    probability (as delta allows) cannot be told from a faulty one by one training at a small alpha; by several it can.

    Args:
        trainings: all with the same number of canaries.
        plan: what is claimed to have been executed, for the f-DP bound.
        claim: epsilon at `delta`.
        alpha: significance of the whole audit, at most 1e-3.
        audited: what was run, in words.

    Raises:
        PrivacyError: if there are fewer than 32 canaries, or the trainings differ in their number.
    """
    check_alpha(alpha)
    sizes = {len(training.scores) for training in trainings} | {len(training.included) for training in trainings}
    if len(sizes) != 1 or (size := sizes.pop()) < 32:
        raise PrivacyError(f"an audit needs trainings with one number of canaries, at least 32; found {sorted(sizes)}.")
    lines = [guess(training.scores, training.included) for training in trainings]
    bounds = _bounds(size, lines, plan, delta, alpha)
    ceilings = _ceilings(size, len(lines), plan, delta, alpha)
    lower_bound, ceiling = max(bounds.values()), max(ceilings.values())
    verdict, reasons = judge(claim=claim, lower_bound=lower_bound, ceiling=ceiling, raised_by=_RAISED_BY[tier])
    details: dict[str, Any] = {
        "canaries": size,
        "trainings": len(lines),
        "level_of_each_training": alpha ** (1 / len(lines)),
        "guesses": [[{"made": one.made, "correct": one.correct} for one in line] for line in lines],
        "lower_bounds": bounds,
        "ceilings": ceilings,
    }
    return AuditResult(
        tier=tier,
        audited=audited,
        claim=claim,
        delta=delta,
        alpha=alpha,
        lower_bound=lower_bound,
        ceiling=ceiling,
        verdict=verdict,
        reasons=reasons,
        details=details,
    )


@lru_cache(maxsize=16)
def _ceilings(size: int, trainings: int, plan: GaussianSteps, delta: float, alpha: float) -> dict[str, float]:
    """Return the bounds if every guess were right."""
    perfect = [Guesses(made=one.made, correct=one.made) for one in guess(np.zeros(size), np.ones(size, dtype=bool))]
    return _bounds(size, [perfect] * trainings, plan, delta, alpha)


def _bounds(
    size: int, trainings: Sequence[Sequence[Guesses]], plan: GaussianSteps, delta: float, alpha: float
) -> dict[str, float]:
    """Return both lower bounds on epsilon; half of alpha each."""
    level = (alpha / 2) ** (1 / len(trainings))
    of_each = [
        max(epsilon_lower_bound(size, one, delta=delta, alpha=level / len(lines)) for one in lines)
        for lines in trainings
    ]
    sigma = least_refuted_noise(size, trainings, plan, alpha=level)
    f_dp = 0.0
    if sigma is not None:
        event = GaussianSteps(noise_multiplier=sigma, sample_rate=plan.sample_rate, steps=plan.steps)
        f_dp = compose_epsilon([event], delta)
    return {"epsilon_delta": min(of_each), "f_dp": f_dp}
