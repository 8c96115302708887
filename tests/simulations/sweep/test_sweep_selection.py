"""The cost of a private selection: the paper's formulas, an exact counterexample to forgetting it, and the draws."""

from __future__ import annotations

import math
import random
from collections import Counter
from itertools import islice

import dp_accounting
import numpy as np
import pytest
from dp_accounting import dp_event
from dp_accounting.rdp import RdpAccountant
from scipy import optimize, stats

from shared.errors import ConfigError
from shared.privacy.accounting import GaussianSteps, compose_epsilon
from simulations.sweep.selection import DISTRIBUTIONS, Distribution, NumTrials, draw_num_trials, selection_epsilon

DELTA = 1e-5


def gaussian(noise: float, steps: int = 1) -> GaussianSteps:
    return GaussianSteps(noise_multiplier=noise, sample_rate=1.0, steps=steps)


def epsilon_by_theorem_2(rho: float, *, eta: float, gamma: float, mean: float) -> float:
    """Theorem 2 of arXiv:2110.03620 for a mechanism with divergence rho alpha, both orders optimised over all reals."""

    def spent(inner: float) -> float:
        return (1 - 1 / inner) * rho * inner + math.log(1 / gamma) / inner

    second = (1 + eta) * optimize.minimize_scalar(spent, bounds=(1.0 + 1e-9, 1e4), method="bounded").fun

    def epsilon(order: float) -> float:
        divergence = rho * order + second + math.log(mean) / (order - 1)
        return divergence + math.log1p(-1 / order) - math.log(DELTA * order) / (order - 1)

    return float(optimize.minimize_scalar(epsilon, bounds=(1.01, 512), method="bounded").fun)


@pytest.mark.parametrize(("noise", "steps"), [(4.0, 1), (2.0, 3), (1.0, 1)])
@pytest.mark.parametrize("mean", [2.0, 10.0, 100.0])
def test_epsilon_is_that_of_the_papers_formula(noise: float, steps: int, mean: float) -> None:
    rho = steps / (2 * noise**2)
    law = NumTrials(distribution="geometric", mean=mean)
    expected = epsilon_by_theorem_2(rho, eta=1, gamma=1 / mean, mean=mean)
    found = selection_epsilon([gaussian(noise, steps)], law, delta=DELTA)
    assert expected * (1 - 1e-6) <= found <= expected * 1.02, "on a grid of orders, so never below"


def test_logarithmic_and_poisson_follow_their_theorems() -> None:
    noise, mean = 2.0, 10.0
    rho = 1 / (2 * noise**2)
    gamma = optimize.brentq(lambda g: (1 / g - 1) / math.log(1 / g) - mean, 1e-6, 0.999)
    expected = epsilon_by_theorem_2(rho, eta=0, gamma=gamma, mean=mean)
    found = selection_epsilon([gaussian(noise)], NumTrials(distribution="logarithmic", mean=mean), delta=DELTA)
    assert expected * (1 - 1e-6) <= found <= expected * 1.02

    def delta_of(epsilon: float) -> float:
        def log_delta(order: float) -> float:
            return (order - 1) * (rho * order - epsilon + math.log1p(-1 / order)) - math.log(order)

        return math.exp(min(0.0, optimize.minimize_scalar(log_delta, bounds=(1.01, 512), method="bounded").fun))

    def by_theorem_6(order: float) -> float:
        divergence = rho * order + mean * delta_of(math.log1p(1 / (order - 1))) + math.log(mean) / (order - 1)
        return divergence + math.log1p(-1 / order) - math.log(DELTA * order) / (order - 1)

    expected = min(by_theorem_6(order) for order in np.linspace(1.5, 64, 500))
    found = selection_epsilon([gaussian(noise)], NumTrials(distribution="poisson", mean=mean), delta=DELTA)
    assert expected * 0.99 <= found <= expected * 1.05


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_it_is_the_accountants_own_event(distribution: Distribution) -> None:
    law = NumTrials(distribution=distribution, mean=8.0)
    steps = GaussianSteps(noise_multiplier=1.1, sample_rate=0.125, steps=16)
    step = dp_accounting.PoissonSampledDpEvent(0.125, dp_accounting.GaussianDpEvent(1.1))
    trial = dp_accounting.SelfComposedDpEvent(step, 16)
    event = dp_event.RepeatAndSelectDpEvent(trial, law.mean, law.shape)
    ours = selection_epsilon([steps], law, delta=DELTA)
    # Ours interpolates between whole orders, from above: not below the accountant at fractions, nor above it at whole ones.
    finer = RdpAccountant().compose(event).get_epsilon(DELTA)
    coarser = RdpAccountant(list(range(2, 65))).compose(event).get_epsilon(DELTA)
    assert finer * (1 - 1e-9) <= ours <= coarser * (1 + 1e-9)
    assert ours > compose_epsilon([steps], DELTA)


@pytest.mark.parametrize("mean", [3.0, 30.0])
def test_the_bound_holds_where_a_single_trials_epsilon_does_not(mean: float) -> None:
    """Exactly, by integration: the best of a geometric number of Gaussian outputs, whose score is the output itself."""
    noise = 2.0
    law = NumTrials(distribution="geometric", mean=mean)
    x = np.linspace(-40, 40, 400_001)

    def best_of_many(centre: float) -> np.ndarray:
        one = stats.norm(centre, noise)
        gamma = 1 / mean
        return gamma * one.pdf(x) / (1 - (1 - gamma) * one.cdf(x)) ** 2

    p, q = best_of_many(1.0), best_of_many(0.0)
    assert np.trapezoid(p, x) == pytest.approx(1, abs=1e-6)

    def delta_at(epsilon: float) -> float:
        factor = math.exp(epsilon)
        return float(max(np.trapezoid(np.maximum(a - factor * b, 0), x) for a, b in ((p, q), (q, p))))

    assert delta_at(selection_epsilon([gaussian(noise)], law, delta=DELTA)) <= DELTA
    assert delta_at(compose_epsilon([gaussian(noise)], DELTA)) > DELTA


def test_several_mechanisms_count_as_the_worst_at_each_order() -> None:
    law = NumTrials(distribution="geometric", mean=5.0)
    weak, strong = gaussian(1.0), gaussian(3.0)
    both = selection_epsilon([weak, strong], law, delta=DELTA)
    assert both == pytest.approx(selection_epsilon([weak], law, delta=DELTA))
    # Two curves that cross: neither alone bounds the mixture.
    rare = GaussianSteps(noise_multiplier=0.6, sample_rate=0.01, steps=10)
    each = [selection_epsilon([m], law, delta=DELTA) for m in (rare, gaussian(4.0, 8))]
    assert selection_epsilon([rare, gaussian(4.0, 8)], law, delta=DELTA) >= max(each) * (1 - 1e-12)
    with pytest.raises(ConfigError, match="no setting"):
        selection_epsilon([], law, delta=DELTA)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("mean", [1.5, 10.0, 300.0])
def test_probabilities_are_the_laws_of_the_paper(distribution: Distribution, mean: float) -> None:
    law = NumTrials(distribution=distribution, mean=mean)
    pairs = list(islice(law.probabilities(), 60_000))
    numbers = np.array([number for number, _ in pairs])
    found = np.array([probability for _, probability in pairs])
    assert numbers[0] == (0 if distribution == "poisson" else 1)
    assert found.sum() == pytest.approx(1, abs=1e-9)
    assert (numbers * found).sum() == pytest.approx(mean, rel=1e-6)
    share = 2 * found[1] / found[0] if distribution == "logarithmic" else 0.5  # 1 - gamma, by the first ratio
    known = {"geometric": stats.geom(1 / mean), "poisson": stats.poisson(mean), "logarithmic": stats.logser(share)}
    np.testing.assert_allclose(found, known[distribution].pmf(numbers), rtol=1e-6, atol=1e-200)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_draws_follow_the_distribution_and_reject_others(distribution: Distribution) -> None:
    law, wrong = (NumTrials(distribution=distribution, mean=mean) for mean in (4.0, 5.0))
    generator = random.Random(1)
    drawn = Counter(draw_num_trials(law, draw=generator.getrandbits) for _ in range(4000))
    assert p_value(drawn, law) > 1e-3
    assert p_value(drawn, wrong) < 1e-9


def test_a_poisson_law_of_a_large_mean_is_drawn_too() -> None:
    for mean in (70.0, 1000.0):
        law, generator = NumTrials(distribution="poisson", mean=mean), random.Random(2)
        drawn = [draw_num_trials(law, draw=generator.getrandbits) for _ in range(200)]
        assert abs(sum(drawn) / 200 - mean) < 4 * math.sqrt(mean / 200)


def p_value(drawn: Counter[int], law: NumTrials) -> float:
    """Chi-squared test of the draws; values that are expected fewer than 20 times stand together."""
    total = drawn.total()
    bins = [
        (number, probability) for number, probability in islice(law.probabilities(), 200) if probability * total >= 20
    ]
    observed = [drawn[number] for number, _ in bins]
    expected = [probability * total for _, probability in bins]
    return float(stats.chisquare([*observed, total - sum(observed)], [*expected, total - sum(expected)]).pvalue)


def test_the_number_comes_from_the_operating_system(monkeypatch: pytest.MonkeyPatch) -> None:
    """No seed of Python or NumPy repeats it."""
    law = NumTrials(distribution="geometric", mean=500.0)
    drawn = []
    for _ in range(2):
        random.seed(0)
        np.random.seed(0)
        drawn.append([draw_num_trials(law) for _ in range(8)])
    assert drawn[0] != drawn[1]
    assert draw_num_trials(law, draw=lambda bits: 0) == 1
    assert draw_num_trials(law, draw=lambda bits: 2**bits - 1) > 5000


@pytest.mark.parametrize(
    ("distribution", "mean"),
    [("geometric", 1.0), ("geometric", math.nan), ("poisson", 2000.0), ("uniform", 5.0)],
)
def test_a_law_that_cannot_be_accounted_is_refused(distribution: Distribution, mean: float) -> None:
    with pytest.raises(ConfigError, match="number of trials"):
        NumTrials(distribution=distribution, mean=mean)
