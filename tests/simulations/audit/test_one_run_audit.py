"""The one-run audit: the bounds of its papers, their ceilings, no false alarm, and no excuse for a leaking mechanism."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats
from scipy.optimize import linprog

from shared.errors import PrivacyError
from shared.privacy.accounting import GaussianSteps
from shared.privacy.plan import PrivacyPlan
from simulations.audit.canaries import log_likelihood_ratio, orthonormal_directions, train_on_gradient_canaries
from simulations.audit.one_run import (
    GUESS_RULE,
    Guesses,
    TradeOff,
    Training,
    audit_one_run,
    draw_coins,
    epsilon_lower_bound,
    guess,
    least_refuted_noise,
    p_value,
    refutes,
    trade_off,
)
from simulations.audit.result import AuditResult

PLAN = PrivacyPlan(
    private=True,
    unit="record",
    sample_rate=0.25,
    noise_multiplier=1.5,
    max_grad_norm=0.5,
    delta=1e-5,
    planned_steps=4,
)
CLAIM = PLAN.epsilon()
SIZE = 400


def perfect(count: int) -> Guesses:
    return Guesses(made=count, correct=count)


# --- (epsilon, delta) ---


@pytest.mark.parametrize(("canaries", "ceiling"), [(100, 3.5), (500, 5.1), (1000, 5.8), (5000, 7.3), (10000, 7.8)])
def test_ceilings_are_those_of_the_paper(canaries: int, ceiling: float) -> None:
    """All guesses right, 95 %, delta 1e-5."""
    bound = epsilon_lower_bound(canaries, perfect(canaries), delta=1e-5, alpha=0.05)
    assert bound == pytest.approx(ceiling, abs=0.05)


def literal_p_value(m: int, r: int, v: int, epsilon: float, delta: float) -> float:
    """Theorem 5.2 word for word: one term after the other."""
    q = math.exp(epsilon) / (1 + math.exp(epsilon))
    chance = [math.comb(r, k) * q**k * (1 - q) ** (r - k) for k in range(r + 1)]
    tail = sum(chance[v:])
    worst = max((sum(chance[v - i : v]) / i for i in range(1, v + 1)), default=0.0)
    return min(1.0, tail + 2 * m * delta * worst)


@pytest.mark.parametrize("made", [1, 7, 40])
def test_p_value_is_the_theorem_term_by_term(made: int) -> None:
    for correct, epsilon, delta in itertools.product(range(made + 1), (0.0, 0.7, 3.0), (0.0, 1e-5, 1e-2)):
        expected = literal_p_value(60, made, correct, epsilon, delta)
        found = p_value(60, Guesses(made=made, correct=correct), epsilon=epsilon, delta=delta)
        assert found == pytest.approx(expected, rel=1e-9), (correct, epsilon, delta)


def test_bound_is_where_the_p_value_crosses_alpha() -> None:
    outcome = Guesses(made=300, correct=280)
    bound = epsilon_lower_bound(1000, outcome, delta=1e-6, alpha=1e-3)
    assert p_value(1000, outcome, epsilon=bound * 0.999, delta=1e-6) < 1e-3
    assert p_value(1000, outcome, epsilon=bound * 1.001, delta=1e-6) > 1e-3
    assert epsilon_lower_bound(1000, Guesses(made=300, correct=150), delta=1e-6, alpha=1e-3) == 0.0


def test_randomised_response_is_accused_at_most_at_alpha() -> None:
    """The mechanism for which the theorem is tight: each coin is told truly with probability q."""
    q, rng = 1 / (1 + math.exp(-1.0)), np.random.default_rng(0)
    correct = rng.binomial(500, q, size=20_000)
    bounds = [epsilon_lower_bound(500, Guesses(made=500, correct=int(v)), delta=0.0, alpha=0.01) for v in correct]
    share = float(np.mean([bound > 1.0 for bound in bounds]))
    assert 0.005 < share <= 0.013


def test_impossible_counts_are_refused() -> None:
    with pytest.raises(PrivacyError, match="correct <= guesses"):
        epsilon_lower_bound(10, Guesses(made=5, correct=6), delta=0.0, alpha=1e-3)


# --- f-DP ---


class GaussianCurve(TradeOff):
    """The exact trade-off curve of one Gaussian with mean shift mu."""

    def __init__(self, mu: float) -> None:
        object.__setattr__(self, "mu", mu)

    def least_false_positives(self, power: float) -> float:
        return float(stats.norm.cdf(stats.norm.ppf(min(power, 1.0)) - self.mu))  # type: ignore[attr-defined]


def test_trade_off_of_one_gaussian_is_below_the_exact_one_and_near_it() -> None:
    curve, exact = trade_off(GaussianSteps(noise_multiplier=1.0, sample_rate=1.0, steps=1)), GaussianCurve(1.0)
    for power in (1e-4, 1e-3, 0.01, 0.1, 0.5, 0.9, 0.99):
        found, least = curve.least_false_positives(power), exact.least_false_positives(power)
        assert 0.8 * least <= found <= least * (1 + 1e-3)


def largest_tail(m: int, r: int, v: int, mu: float) -> float:
    """The largest P[correct >= v] that the theorem allows, by a linear programme over the p_i.

    The concave constraint R_i <= 1 - f(H_{i-1}) is replaced by its tangents, which allows a little more.
    """
    levels = np.arange(r + 1)
    rows, limits = [], []
    for i in range(1, r + 1):
        right = np.where(levels >= i, levels, 0) / m
        wrong = np.where(levels >= i - 1, r - levels, 0) / m
        for point in np.concatenate([np.geomspace(1e-9, 0.5, 60), 1 - np.geomspace(1e-6, 0.5, 30)]):
            x = stats.norm.ppf(point)
            value, slope = stats.norm.cdf(x + mu), math.exp(-mu * x - mu**2 / 2)
            rows.append(right - slope * wrong)
            limits.append(value - slope * point)
    goal = -(levels >= v).astype(float)
    found = linprog(goal, A_ub=rows, b_ub=limits, A_eq=[np.ones(r + 1)], b_eq=[1.0], bounds=(0, 1))
    return float(-found.fun)


@pytest.mark.parametrize(("made", "correct", "mu"), [(12, 12, 1.0), (12, 10, 0.5), (8, 8, 1.5), (6, 5, 0.3)])
def test_recursion_finds_the_largest_tail_of_the_theorem(made: int, correct: int, mu: float) -> None:
    tail = largest_tail(12, made, correct, mu)
    outcome = Guesses(made=made, correct=correct)
    assert not refutes(12, outcome, GaussianCurve(mu), alpha=tail * 0.95)
    assert refutes(12, outcome, GaussianCurve(mu), alpha=min(tail * 1.05, 1.0))


def test_independent_gaussians_are_accused_less_often_than_alpha() -> None:
    rng, curve = np.random.default_rng(1), GaussianCurve(1.0)
    accused = 0
    for _ in range(300):
        included = rng.random(200) < 0.5
        correct = int(((rng.normal(size=200) + included > 0.5) == included).sum())
        accused += refutes(200, Guesses(made=200, correct=correct), curve, alpha=0.05)
    assert accused <= 15


def test_a_mechanism_that_rarely_tells_all_is_no_violation() -> None:
    """With a small probability nearly everything may leak, so one training at a small alpha proves nothing."""
    curve = trade_off(GaussianSteps(noise_multiplier=1.0, sample_rate=1.0, steps=1))
    nearly_all = Guesses(made=1000, correct=980)
    assert not refutes(1000, nearly_all, curve, alpha=1e-4)
    assert refutes(1000, nearly_all, curve, alpha=0.05)


def test_least_refuted_noise_lies_between_the_truth_and_the_claim() -> None:
    claim = GaussianSteps(noise_multiplier=2.0, sample_rate=1.0, steps=1)
    outcome = Guesses(made=1000, correct=round(1000 * float(stats.norm.cdf(1.0))))  # noise multiplier 0.5
    sigma = least_refuted_noise(1000, [[outcome]], claim, alpha=0.05)
    assert sigma is not None
    assert 0.5 < sigma < 2.0
    assert least_refuted_noise(1000, [[outcome], [Guesses(made=1000, correct=500)]], claim, alpha=0.05) is None


# --- guesses and verdict ---


def test_guesses_follow_the_rule_and_count_what_is_right() -> None:
    included = np.array([True] * 32 + [False] * 32)
    lines = guess(np.arange(64, 0, -1).astype(float), included)
    assert lines == [perfect(math.floor(64 * high) + math.floor(64 * low)) for high, low in GUESS_RULE]
    assert all(line.correct == 0 for line in guess(np.arange(64).astype(float), included))
    assert guess(np.full(64, np.nan), included)[0].made == 64


def test_coins_are_fair_and_public() -> None:
    coins = draw_coins(10_000, seed=3)
    assert abs(int(coins.sum()) - 5000) < 200
    assert (coins == draw_coins(10_000, seed=3)).all()
    assert (coins != draw_coins(10_000, seed=4)).any()


def exact_release(plan: PrivacyPlan, gradients: np.ndarray, rng: np.random.Generator, noise: float) -> np.ndarray:
    """DP-SGD in three lines, with `noise` times its standard deviation."""
    norms = np.linalg.norm(gradients, axis=1, keepdims=True)
    clipped = gradients * np.minimum(1.0, plan.max_grad_norm / np.maximum(norms, 1e-30))
    sampled = rng.random((plan.planned_steps, len(gradients))) < plan.sample_rate
    std = noise * plan.noise_multiplier * plan.max_grad_norm
    return sampled @ clipped + rng.normal(size=(plan.planned_steps, gradients.shape[1])) * std


def audit(seed: int, *, noise: float = 1.0, claim: float = CLAIM, size: int = SIZE, trainings: int = 5) -> AuditResult:
    rng = np.random.default_rng(seed)
    done = [
        train_on_gradient_canaries(
            lambda plan, gradients: exact_release(plan, gradients, rng, noise),
            PLAN,
            num_canaries=size,
            seed=1000 * seed + number,
        )
        for number in range(trainings)
    ]
    return audit_one_run(
        done, PLAN.mechanism(4), claim=claim, delta=PLAN.delta, alpha=1e-3, audited="a reference implementation"
    )


def test_correct_mechanism_is_consistent_99_of_100_times() -> None:
    results = [audit(seed) for seed in range(100)]
    assert sum(result.verdict == "consistent" for result in results) >= 99
    assert max(result.lower_bound for result in results) < CLAIM < results[0].ceiling
    assert np.median([result.lower_bound for result in results]) > 0, "the audit must see something"


@pytest.mark.parametrize("noise", [0.0, 0.1, 0.25])
def test_too_little_noise_is_violated(noise: float) -> None:
    result = audit(0, noise=noise)
    assert result.verdict == "violated", result.text()
    assert CLAIM < result.lower_bound <= result.ceiling


def test_claim_above_the_ceiling_is_inconclusive_and_says_so() -> None:
    result = audit(0, noise=0.0, claim=100.0, size=40, trainings=1)
    assert result.ceiling < 100.0
    assert result.verdict == "inconclusive"
    assert "cannot falsify" in result.reasons[0]
    assert "neither for the claim nor against it. More trainings (--trainings)" in result.reasons[0]
    more = audit(0, noise=0.0, claim=100.0, size=40, trainings=3)
    assert more.ceiling > audit(0, noise=0.0, claim=100.0, size=80, trainings=1).ceiling > result.ceiling
    assert "CEILING" in result.text()


def test_too_few_canaries_and_a_loose_alpha_are_refused() -> None:
    some = Training(scores=np.zeros(8), included=np.ones(8, dtype=bool))
    with pytest.raises(PrivacyError, match="at least 32"):
        audit_one_run([some], PLAN.mechanism(4), claim=1.0, delta=1e-5, alpha=1e-3, audited="")
    with pytest.raises(PrivacyError, match="alpha"):
        audit_one_run([some], PLAN.mechanism(4), claim=1.0, delta=1e-5, alpha=0.05, audited="")


# --- gradient canaries ---


def test_canary_directions_are_orthonormal_and_spread_over_all_coordinates() -> None:
    directions = orthonormal_directions(128, seed=0)
    np.testing.assert_allclose(directions @ directions.T, np.eye(128), atol=1e-12)
    assert np.abs(directions).max() < 0.2


@pytest.mark.parametrize("rate", [0.25, 1.0])
def test_score_is_the_log_likelihood_ratio(rate: float) -> None:
    plan = PrivacyPlan(**{**vars(PLAN), "sample_rate": rate})
    seen = np.array([[0.3, 1.2], [-2.0, 5.0]])
    outside = stats.norm.pdf(seen, 0, plan.noise_multiplier)
    inside = (1 - rate) * outside + rate * stats.norm.pdf(seen, 1, plan.noise_multiplier)
    np.testing.assert_allclose(log_likelihood_ratio(seen, plan), np.log(inside / outside).sum(axis=0), rtol=1e-9)
