"""Mechanism audit: does the code that runs add the noise, clip and sample as the plan says?

A white-box test of tier 1: the trainer is run on canary records whose gradients are known, and the noisy sums that it
hands to its optimiser are compared with what the plan promises. It is cheap and knows nothing of how the mechanism is
written, so it also judges a changed one.

Formal guarantees (tests: tests/client/training/test_faults.py)
    * A mechanism that executes its plan exactly is called "violated" with probability at most `alpha`: all tests share
      `alpha` by Bonferroni. It passes at least 99 of 100 repeats.
    * Every fault of that file that weakens noise, clipping, sampling or accounting is called "violated"; a sum divided
      by the drawn batch size is "inconclusive". Faults of ledger and loss are caught by their own checks.
    * The verdict is never "verified": an audit can refute a claim, not prove it. It says nothing about the data, about
      losses that couple records (see `client.training.proof`), or about what happens outside of the audited function.

What is tested, with canary gradients along random orthonormal directions c (so that adapter and head mix):
    steps        one noisy sum for each logical step of the plan.
    noise        <noisy sum, c> / (sigma C) of a direction that no record has is N(0, 1): chi-square for every step of
                 an empty, a small and a full data set. A whole step, or a part of one, without noise fails.
    independence these scores are uncorrelated over steps and over releases: exact test of the largest correlation.
    signal       scores of canaries with gradient norm C are N(1/sigma, 1). With the noise above this bounds the effective
                 noise multiplier from above, hence epsilon from below.
    sensitivity  adding one record, with an ordinary, a dominating or a non-finite gradient, moves the sum by at most C
                 (with a tolerance of 1 %, so that noise of another scale is not mistaken for it).
    inclusion    with next to no noise, who was sampled can be read off: sample sizes and each record's count are
                 binomial (two-sided: sizes that never vary are a shuffle), and no two steps share a sample.
    accounting   the claimed epsilon is not below that of the steps observed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from shared.epsilons import bound_rounded_down, delta_rounded_up, noise_rounded_down, rounded_up
from shared.errors import PrivacyError
from shared.privacy.accounting import GaussianSteps, compose_epsilon
from shared.privacy.plan import PrivacyPlan
from simulations.audit.result import AuditResult, Verdict, check_alpha

Array = NDArray[np.float64]
Release = Callable[[PrivacyPlan, Array], Array]
"""Train one round with this plan on records with these gradients, float64 [records, dimension]. Returns the noisy sums
[steps, dimension] that the optimiser received, before the division by the expected batch size."""

_SHARP = 1e-3  # noise multiplier at which single records can be seen in the sum
_TOLERANCE = 0.01
_ACCOUNTANTS = 1e-3  # relative: versions of an accountant differ by their discretisation
_LEAST_NOISE, _MOST_NOISE = 0.1, 1e6  # outside, epsilon is without meaning and slow to compute


@dataclass(frozen=True, kw_only=True)
class MechanismAudit:
    """Result of one audit.

    Attributes:
        claim: epsilon that is claimed for `steps` steps, at `delta`.
        sample_rate, steps: of what the claim speaks of, for the lower bound.
        observed_steps: noisy steps that the audited trainings took together.
        noise_multiplier: the claimed one.
        noise_multiplier_interval: (lower, upper) confidence limits of the one in effect, confidence 1 - alpha.
        p_values: the smallest p-value of every kind of test, corrected for the tests of its kind; 0.0 if a hard
            requirement failed. A claim falls at alpha / number of kinds.
        alpha: probability of calling a correct mechanism "violated".
        verdict: "violated" if a test failed; "inconclusive" if the noise is above the claimed one, or if too little was
            seen to tell half the noise from all of it; else "consistent".
        noise_above: whether the noise is above the claimed one.
    """

    claim: float
    delta: float
    sample_rate: float
    steps: int
    observed_steps: int
    noise_multiplier: float
    noise_multiplier_interval: tuple[float, float]
    p_values: Mapping[str, float]
    alpha: float
    verdict: Verdict
    noise_above: bool = False

    @property
    def failed(self) -> tuple[str, ...]:
        """Names of the tests that refute the claim."""
        return tuple(name for name, p in self.p_values.items() if p < self.alpha / len(self.p_values))

    @property
    def epsilon_lower_bound(self) -> float:
        """Epsilon of the best-protecting mechanism that the observations allow, with confidence 1 - alpha."""
        return self._epsilon_of(self.noise_multiplier_interval[1])

    @property
    def ceiling(self) -> float:
        """The largest lower bound that this audit gives: that of a noise multiplier below which it does not tell apart."""
        return self._epsilon_of(_LEAST_NOISE)

    def _epsilon_of(self, noise_multiplier: float) -> float:
        sigma = min(max(noise_multiplier, _LEAST_NOISE), _MOST_NOISE)
        return _epsilon(sigma, self.sample_rate, self.steps, self.delta)

    def text(self) -> str:
        """Return the result in one line."""
        low, high = self.noise_multiplier_interval
        found = f" ({', '.join(self.failed)})" if self.failed else ""
        return (
            f"CLAIM epsilon {rounded_up(self.claim)} at delta {delta_rounded_up(self.delta)} / LOWER BOUND "
            f"{bound_rounded_down(self.epsilon_lower_bound)} / CEILING {bound_rounded_down(self.ceiling)} / noise "
            f"multiplier {noise_rounded_down(self.noise_multiplier)}, in effect {noise_rounded_down(low)} to "
            f"{rounded_up(high, 4)} / {self.verdict}{found} at alpha {self.alpha:g}"
        )

    def _why_inconclusive(self) -> str:
        if self.noise_above:
            low, high = self.noise_multiplier_interval
            return (
                f"the noise multiplier in effect is {noise_rounded_down(low)} to {rounded_up(high, 4)}, above the claimed "
                f"{noise_rounded_down(self.noise_multiplier)}. That refutes nothing: more noise protects more. But it is not "
                "what the plan says, so the trainer, not the claim, should be looked at."
            )
        return (
            f"{self.observed_steps:,} noisy steps are too few to tell half of the noise from all of it. That speaks neither "
            "for the claim nor against it; audit a run of more steps, or this one by --tier 2."
        )

    def result(self, audited: str) -> AuditResult:
        """Return the same in the form that all tiers share; `audited` says what was run."""
        reasons = tuple(f"the test of {name} failed (p = {self.p_values[name]:.2g})." for name in self.failed)
        if not reasons and self.verdict == "inconclusive":
            reasons = (self._why_inconclusive(),)
        return AuditResult(
            tier=1,
            audited=audited,
            claim=self.claim,
            delta=self.delta,
            alpha=self.alpha,
            lower_bound=self.epsilon_lower_bound,
            ceiling=self.ceiling,
            verdict=self.verdict,
            reasons=reasons or ("no test contradicts the plan; that proves nothing.",),
            details={
                "noise_multiplier": self.noise_multiplier,
                "noise_multiplier_in_effect": list(self.noise_multiplier_interval),
                "sample_rate": self.sample_rate,
                "steps": self.steps,
                "observed_steps": self.observed_steps,
                "p_values": dict(self.p_values),
                "failed": list(self.failed),
            },
        )


def audit_mechanism(
    release: Release,
    plan: PrivacyPlan,
    *,
    dimension: int,
    claim: float | None = None,
    claimed_steps: int | None = None,
    alpha: float = 1e-3,
    seed: int = 0,
) -> MechanismAudit:
    """Audit the mechanism behind `release`.

    Args:
        release: see `Release`; it runs the production trainer. Randomness is its own, fresh for every call.
        plan: what is claimed; `planned_steps` is the number of logical steps of one call.
        dimension: number of trainable parameters that `release` gives gradients for, at least 16.
        claim: epsilon that is printed for `claimed_steps`; by default the plan's own.
        claimed_steps: steps that the claim speaks of, if one call of `release` takes fewer; by default those of a call.
        alpha: significance of the whole audit, at most 1e-3.
        seed: public seed of the canary directions.

    Raises:
        PrivacyError: if the plan is not private or the arguments leave nothing to test.
    """
    if not plan.private:
        raise PrivacyError("this plan adds no noise, so there is no claim to audit.")
    check_alpha(alpha)
    if dimension < 16:
        raise PrivacyError(f"an audit needs a dimension of 16 or more; got {dimension}.")
    claimed_steps = claimed_steps or plan.planned_steps
    claim = plan.epsilon(claimed_steps) if claim is None else claim
    directions = np.linalg.qr(np.random.default_rng(seed).normal(size=(dimension, dimension)))[0]
    present, absent = directions[: dimension // 2], directions[dimension // 2 :]
    observer = _Observer(release, plan.planned_steps)

    unit, certain = plan.max_grad_norm, replace(plan, sample_rate=1.0)
    data_sets = [present[:size] * 2 * unit for size in (0, 1, len(present))]
    noise = np.concatenate([observer.scores(plan, data, absent) for data in data_sets for _ in range(2)])
    repeats = _signal_repeats(plan, len(present))
    signal = np.concatenate([observer.scores(certain, present * unit, present) for _ in range(repeats)])
    interval = _noise_interval(noise, signal, alpha)
    sensitivity = _corrected(*_sensitivity_p_values(observer, certain, present))
    inclusion = _corrected(*_inclusion_p_values(observer, plan, directions))
    spent_steps = math.ceil(claimed_steps * observer.most_steps / plan.planned_steps)
    spent = _epsilon(plan.noise_multiplier, plan.sample_rate, spent_steps, plan.delta, plan.metrics)
    p_values = {
        "noise": _corrected(*stats.chi2.cdf((noise**2).sum(axis=1), noise.shape[1])),
        "noise overall": float(stats.chi2.cdf((noise**2).sum(), noise.size)),
        "independence": _correlation_p_value(noise),
        "signal": float(stats.norm.sf((signal.mean() - 1 / plan.noise_multiplier) * np.sqrt(signal.size))),
        "sensitivity": sensitivity,
        "inclusion": inclusion,
        "steps": 1.0 if observer.steps_as_planned else 0.0,
        "accounting": 1.0 if claim * (1 + _ACCOUNTANTS) >= spent else 0.0,
    }
    threshold = alpha / len(p_values)
    enough = stats.chi2.cdf(4 * stats.chi2.ppf(threshold, noise.size), noise.size) > 1 - alpha
    excessive = stats.chi2.sf((noise**2).sum(), noise.size) < threshold
    verdict: Verdict = "consistent" if enough and not excessive else "inconclusive"
    if any(p < threshold for p in p_values.values()):
        verdict = "violated"
    return MechanismAudit(
        claim=claim,
        delta=plan.delta,
        sample_rate=plan.sample_rate,
        steps=claimed_steps,
        observed_steps=observer.observed_steps,
        noise_multiplier=plan.noise_multiplier,
        noise_multiplier_interval=interval,
        p_values=p_values,
        alpha=alpha,
        verdict=verdict,
        noise_above=bool(excessive),
    )


class _Observer:
    """Calls the audited function and keeps account of the steps it took."""

    def __init__(self, release: Release, planned_steps: int) -> None:
        self._release = release
        self._planned_steps = planned_steps
        self.most_steps = self.observed_steps = 0
        self.steps_as_planned = True

    def sums(self, plan: PrivacyPlan, gradients: Array) -> Array:
        """Return the noisy sums [steps, dimension]."""
        sums = np.asarray(self._release(plan, gradients), dtype=np.float64)
        self.most_steps = max(self.most_steps, len(sums))
        self.observed_steps += len(sums)
        self.steps_as_planned &= len(sums) == self._planned_steps
        return sums

    def scores(self, plan: PrivacyPlan, gradients: Array, directions: Array) -> Array:
        """Return <noisy sum, c> / (sigma C), [steps, directions]: N(0, 1), or N(1 / sigma, 1) where c was in the data."""
        return self.sums(plan, gradients) @ directions.T / (plan.noise_multiplier * plan.max_grad_norm)


def _signal_repeats(plan: PrivacyPlan, canaries: int) -> int:
    """Return how many calls bring the error of the mean signal to an eighth of it, 3 to 40: 1 / sigma is hard to see."""
    return min(max(math.ceil(64 * plan.noise_multiplier**2 / (canaries * plan.planned_steps)), 3), 40)


def _epsilon(
    noise_multiplier: float, sample_rate: float, steps: int, delta: float, metrics: GaussianSteps | None = None
) -> float:
    """Return epsilon from the numbers alone, past whatever the plan says of itself."""
    event = GaussianSteps(noise_multiplier=noise_multiplier, sample_rate=sample_rate, steps=steps)
    return compose_epsilon([event, metrics] if metrics else [event], delta)


def _corrected(*p_values: float) -> float:
    """Return the smallest p-value times their number; one that is not a number counts as failed."""
    smallest = min((0.0 if np.isnan(p) else float(p)) for p in p_values)
    return min(1.0, smallest * len(p_values))


def _noise_interval(noise: Array, signal: Array, alpha: float) -> tuple[float, float]:
    """Return confidence limits of the noise multiplier in effect: standard deviation over signal, each at alpha / 4."""
    total, tail = float((noise**2).sum()), alpha / 4
    below, above = (np.sqrt(total / stats.chi2.ppf(q, noise.size)) for q in (1 - tail, tail))
    error = float(stats.norm.isf(tail)) * above / np.sqrt(signal.size)
    weak, strong = max(float(signal.mean()) - error, 1e-9), max(float(signal.mean()) + error, 1e-9)
    return float(below / strong), float(max(above, 1e-12) / weak)


def _correlation_p_value(noise: Array) -> float:
    """Return the p-value of the largest correlation between two rows (mean known to be 0; Student's t, exact)."""
    length = np.linalg.norm(noise, axis=1, keepdims=True)
    rows = noise / np.where(length > 0, length, 1.0)
    first, second = np.triu_indices(len(rows), k=1)
    correlation = np.clip((rows @ rows.T)[first, second], -1.0, 1.0)
    freedom = noise.shape[1] - 1
    t = np.abs(correlation) * np.sqrt(freedom / np.maximum(1 - correlation**2, 1e-15))
    return _corrected(*(2 * stats.t.sf(t, freedom)))


def _sensitivity_p_values(observer: _Observer, certain: PrivacyPlan, present: Array) -> Iterator[float]:
    """Yield p-values for "adding record 0 moves every step's sum by at most C", with every record in every step."""
    bound, sharp = certain.max_grad_norm, replace(certain, noise_multiplier=_SHARP)
    ordinary = present * 2 * bound
    without = observer.sums(sharp, ordinary[1:])
    for size in (1.0, 1000.0, np.inf):
        added = ordinary.copy()
        added[0] *= size
        with np.errstate(invalid="ignore"):
            moved = (observer.sums(sharp, added) - without) / bound
        # |moved|^2 / (2 sigma^2) is non-central chi-square; its non-centrality is at most 1 / (2 sigma^2), if |moved| <= C.
        spread = 2 * _SHARP**2
        yield from stats.ncx2.sf((moved**2).sum(axis=1) / spread, moved.shape[1], (1 + _TOLERANCE) ** 2 / spread)


def _inclusion_p_values(observer: _Observer, plan: PrivacyPlan, directions: Array) -> Iterator[float]:
    """Yield two-sided p-values for independent coins with probability `sample_rate`."""
    rate, sharp = plan.sample_rate, replace(plan, noise_multiplier=_SHARP)
    records = directions * 2 * plan.max_grad_norm
    sums = [observer.sums(sharp, records) @ directions.T / plan.max_grad_norm for _ in range(4)]
    included = np.concatenate(sums) > 0.5  # [4 releases x steps, records]
    if rate == 1:
        yield 1.0 if bool(included.all()) else 0.0
        return
    yield from _binomial_p_values(included.sum(), included.size, rate)
    for axis in (1, 0):  # sizes of the samples, then how often each record was in one
        trials, counts = included.shape[axis], included.sum(axis=axis)
        variance = trials * rate * (1 - rate)
        if variance >= 4:  # below, chi-square is no approximation
            far = np.abs(counts - trials * rate)
            wider, narrower = (far + 0.5) ** 2 / variance, np.maximum(far - 0.5, 0) ** 2 / variance  # continuity
            yield min(1.0, 2 * float(stats.chi2.cdf(wider.sum(), len(counts))))
            yield min(1.0, 2 * float(stats.chi2.sf(narrower.sum(), len(counts))))
    first, second = np.triu_indices(len(included), k=1)
    shared = (included[first] == included[second]).sum(axis=1)
    yield from _binomial_p_values(shared, included.shape[1], rate**2 + (1 - rate) ** 2)


def _binomial_p_values(counts: NDArray[np.int_], trials: int, probability: float) -> Array:
    """Return exact two-sided p-values (twice the smaller tail)."""
    tails = np.minimum(stats.binom.cdf(counts, trials, probability), stats.binom.sf(counts - 1, trials, probability))
    return np.atleast_1d(np.minimum(1.0, 2 * tails))
