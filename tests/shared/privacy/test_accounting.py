"""Accounting against published numbers, against dp-accounting used directly, and against the PRV accountant."""

from __future__ import annotations

import contextlib
import math

import dp_accounting
import numpy as np
import pytest
from dp_accounting.pld import pld_privacy_accountant
from scipy import stats
from scipy.optimize import brentq

import shared.privacy.accounting as accounting
from shared.errors import PrivacyError
from shared.limits import MAX_STEPS, MIN_NOISE_MULTIPLIER
from shared.privacy.accountant.cross_check import prv_cross_check
from shared.privacy.accountant.loss_distribution import largest_loss
from shared.privacy.accounting import (
    SIGMA_TOLERANCE,
    GaussianSteps,
    affordable_steps,
    calibrate_noise_multiplier,
    check_delta,
    compose_epsilon,
    epsilon_at_sites,
    mean_loss,
)
from tests.shared.privacy.counted_cells import Cells

# n, B, E; noise multipliers for epsilon 1, 3, 8 at delta = 1 / n^1.1, sample rate B / n, round(E n / B) steps (PLD).
TABLE = [
    (2_000, 256, 3, (2.149, 1.088, 0.668)),
    (2_000, 1024, 10, (6.959, 2.822, 1.366)),
    (10_000, 256, 10, (1.934, 0.984, 0.660)),
    (10_000, 512, 10, (2.636, 1.224, 0.758)),
    (50_000, 512, 10, (1.456, 0.827, 0.594)),
    (50_000, 1024, 3, (1.300, 0.811, 0.569)),
]
CASES = [
    (n, batch, epochs, epsilon, sigma)
    for n, batch, epochs, sigmas in TABLE
    for epsilon, sigma in zip((1.0, 3.0, 8.0), sigmas, strict=True)
]


def setting(n: int, batch: int, epochs: int) -> tuple[float, int, float]:
    return batch / n, round(epochs * n / batch), n**-1.1


def steps(sigma: float, rate: float, num: int) -> GaussianSteps:
    return GaussianSteps(noise_multiplier=sigma, sample_rate=rate, steps=num)


@pytest.mark.parametrize(("n", "batch", "epochs", "epsilon", "sigma"), CASES)
def test_noise_multipliers_are_the_published_ones(
    n: int, batch: int, epochs: int, epsilon: float, sigma: float
) -> None:
    rate, num, delta = setting(n, batch, epochs)
    found = calibrate_noise_multiplier(epsilon=epsilon, delta=delta, sample_rate=rate, steps=num)
    assert found == pytest.approx(sigma, rel=0.005)
    spent = compose_epsilon([steps(found, rate, num)], delta)
    assert spent <= epsilon
    # The least noise that does it: half a percent less is too little.
    assert compose_epsilon([steps(found * 0.995, rate, num)], delta) > epsilon


@pytest.mark.parametrize("row", [TABLE[0], TABLE[3]])
@pytest.mark.parametrize("cell", [1e-4, 1e-3])
def test_epsilon_agrees_with_dp_accounting_directly(row: tuple[int, int, int, tuple[float, ...]], cell: float) -> None:
    n, batch, epochs, sigmas = row
    rate, num, delta = setting(n, batch, epochs)
    accountant = pld_privacy_accountant.PLDAccountant(value_discretization_interval=cell)
    event = dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(sigmas[1]))
    accountant.compose(dp_accounting.SelfComposedDpEvent(event, num))
    ours = compose_epsilon([steps(sigmas[1], rate, num)], delta)
    # On a grid like ours the same; a finer one is a little less pessimistic.
    assert ours == pytest.approx(accountant.get_epsilon(delta), abs=1e-5 if cell == 1e-3 else 2e-3)


def test_without_sampling_epsilon_is_that_of_one_gaussian() -> None:
    """T full-batch steps are one Gaussian with sigma / sqrt(T), whose delta is known in closed form."""
    sigma, num, delta = 5.0, 3, 1e-5
    mu = math.sqrt(num) / sigma

    def excess(epsilon: float) -> float:
        def phi(x: float) -> float:
            return math.erfc(-x / math.sqrt(2)) / 2

        return phi(-epsilon / mu + mu / 2) - math.exp(epsilon) * phi(-epsilon / mu - mu / 2) - delta

    exact = brentq(excess, 0.01, 10)
    found = compose_epsilon([steps(sigma, 1.0, num)], delta)
    assert exact - 1e-9 <= found <= exact + 2e-3


@pytest.mark.parametrize(("row", "index"), [(TABLE[0], 0), (TABLE[3], 1)])
def test_prv_accountant_agrees_within_one_percent_of_sigma(
    row: tuple[int, int, int, tuple[float, ...]], index: int
) -> None:
    n, batch, epochs, _ = row
    rate, num, delta = setting(n, batch, epochs)
    epsilon = (1.0, 3.0, 8.0)[index]
    pld = calibrate_noise_multiplier(epsilon=epsilon, delta=delta, sample_rate=rate, steps=num)

    def excess(sigma: float) -> float:
        found = prv_cross_check([steps(sigma, rate, num)], delta).epsilon
        assert found is not None
        return found - epsilon

    # Epsilon falls with sigma: the root lies within one percent of ours, on either side.
    assert excess(pld * 0.99) > 0 > excess(pld * 1.01)


def test_runs_compose_as_published() -> None:
    """k runs of n = 10,000, B = 512, 10 epochs at epsilon 3, delta = 4e-5: the ledger's 4.3 / 5.4 / 7.2 / 10.8."""
    rate, num, _ = setting(10_000, 512, 10)
    delta = 4e-5
    sigma = calibrate_noise_multiplier(epsilon=3.0, delta=delta, sample_rate=rate, steps=num)
    composed = [compose_epsilon([steps(sigma, rate, num)] * k, delta) for k in (1, 2, 3, 5, 10)]
    assert composed == pytest.approx([3.0, 4.3, 5.4, 7.2, 10.8], abs=0.06)
    eight = calibrate_noise_multiplier(epsilon=8.0, delta=delta, sample_rate=rate, steps=num)
    both = compose_epsilon([steps(sigma, rate, num), steps(eight, rate, num)], delta)
    assert both == pytest.approx(8.64, abs=0.03)


def test_composition_ignores_order_and_grouping() -> None:
    a, b = steps(1.0, 0.1, 20), steps(2.0, 0.05, 10)
    split = [steps(1.0, 0.1, 5), b, steps(1.0, 0.1, 15)]
    assert compose_epsilon([a, b], 1e-5) == compose_epsilon([b, a], 1e-5) == compose_epsilon(split, 1e-5)
    assert compose_epsilon([a, b], 1e-5) > compose_epsilon([a], 1e-5) > 0
    assert compose_epsilon([], 1e-5) == compose_epsilon([steps(1.0, 0.1, 0)], 1e-5) == 0.0
    assert prv_cross_check([], 1e-5).epsilon == prv_cross_check([steps(1.0, 0.1, 0)], 1e-5).epsilon == 0.0


@pytest.mark.parametrize("spent", [[], [steps(1.5, 0.1, 30)]])
def test_affordable_steps_is_exact(spent: list[GaussianSteps]) -> None:
    delta = 1e-5
    budget, sigma = (2.5, 1.0) if spent else (0.9, 2.0)
    found = affordable_steps(spent, noise_multiplier=sigma, sample_rate=0.05, budget=budget, delta=delta)
    assert found > 1
    assert compose_epsilon([*spent, steps(sigma, 0.05, found)], delta) <= budget
    assert compose_epsilon([*spent, steps(sigma, 0.05, found + 1)], delta) > budget


@pytest.mark.parametrize("num", [1, 2, 3])
def test_affordable_steps_at_the_edges(num: int) -> None:
    budget = compose_epsilon([steps(1.0, 0.05, num)], 1e-5)
    found = affordable_steps([], noise_multiplier=1.0, sample_rate=0.05, budget=budget, delta=1e-5)
    assert found == num
    for budget in (0.01, 0.0, -1.0):
        assert affordable_steps([], noise_multiplier=1.0, sample_rate=0.05, budget=budget, delta=1e-5) == 0
    # No budget is none, also for steps that cost nothing at this delta.
    assert compose_epsilon([steps(1e4, 1.0, 1)], 0.01) == 0.0
    assert affordable_steps([], noise_multiplier=1e4, sample_rate=1.0, budget=0.0, delta=0.01) == 0


@pytest.mark.parametrize(
    "wrong",
    [
        {"noise_multiplier": 0.0},
        {"noise_multiplier": -1.0},
        {"noise_multiplier": math.nan},
        {"noise_multiplier": math.inf},
        {"sample_rate": 0.0},
        {"sample_rate": 1.1},
        {"sample_rate": math.nan},
        {"steps": -1},
    ],
)
def test_steps_that_cannot_be_accounted_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(PrivacyError, match=next(iter(wrong))):
        GaussianSteps(**{"noise_multiplier": 1.0, "sample_rate": 0.1, "steps": 1, **wrong})


@pytest.mark.parametrize("delta", [0.0, 1e-31, 1.0, -1e-5, math.nan])
def test_a_bad_delta_is_refused(delta: float) -> None:
    with pytest.raises(PrivacyError, match="delta"):
        check_delta(delta)
    with pytest.raises(PrivacyError, match="delta"):
        compose_epsilon([steps(1.0, 0.1, 1)], delta)


@pytest.mark.parametrize(
    "wrong",
    [
        {"epsilon": 0.0},
        {"epsilon": math.inf},
        {"epsilon": math.nan},
        {"delta": 0.0},
        {"sample_rate": 0.0},
        {"sample_rate": 2.0},
        {"steps": 0},
        {"steps": MAX_STEPS + 1},
        {"epsilon": 1e6},
    ],
)
def test_a_calibration_without_meaning_is_refused(wrong: dict[str, float]) -> None:
    right = {"epsilon": 3.0, "delta": 1e-5, "sample_rate": 0.1, "steps": 10}
    with pytest.raises(PrivacyError, match=next(iter(wrong))):
        calibrate_noise_multiplier(**{**right, **wrong})


@pytest.mark.parametrize(
    ("rate", "num", "epsilon"),
    [
        (0.2, 12_669, 3.2),
        (0.001, 30_000, 1.0),
        (0.3, 41_000, 6.3),
        (0.0002, 1_500, 4.6),
        (1.0, 4, 0.5),
        (1e-4, 20_000, 1.5),
    ],
)
def test_the_least_noise_is_found_also_where_wide_cells_mislead(rate: float, num: int, epsilon: float) -> None:
    """Many steps at small rates: a search on a coarse grid alone would ask for up to a quarter more noise."""
    found = calibrate_noise_multiplier(epsilon=epsilon, delta=1e-5, sample_rate=rate, steps=num)
    rounded = calibrate_noise_multiplier(epsilon=epsilon, delta=1e-5, sample_rate=rate, steps=num, decimals=4)
    assert compose_epsilon([steps(found, rate, num)], 1e-5) < epsilon
    assert compose_epsilon([steps(found * (1 - 2 * SIGMA_TOLERANCE), rate, num)], 1e-5) > epsilon
    assert rounded == round(rounded, 4)
    assert compose_epsilon([steps(rounded, rate, num)], 1e-5) <= epsilon
    assert compose_epsilon([steps(rounded - max(1e-4, 2e-5 * rounded), rate, num)], 1e-5) > epsilon


def test_noise_beside_other_releases_leaves_room_for_them() -> None:
    others = (steps(10.0, 1.0, 3), steps(2.0, 0.05, 40))
    found = calibrate_noise_multiplier(epsilon=3.0, delta=1e-5, sample_rate=0.05, steps=200, others=others)
    alone = calibrate_noise_multiplier(epsilon=3.0, delta=1e-5, sample_rate=0.05, steps=200)
    assert found > alone
    assert compose_epsilon([steps(found, 0.05, 200), *others], 1e-5) < 3.0
    assert compose_epsilon([steps(found * 0.9998, 0.05, 200), *others], 1e-5) > 3.0
    dear = (steps(10.0, 1.0, 3), steps(1.0, 0.05, 40))
    for epsilon in (1.0, compose_epsilon(dear, 1e-5)):
        with pytest.raises(PrivacyError, match="besides its steps alone costs"):
            calibrate_noise_multiplier(epsilon=epsilon, delta=1e-5, sample_rate=0.05, steps=200, others=dear)


@pytest.mark.parametrize(("decimals", "slack"), [(None, 1e-4), (4, 1e-5)])
def test_the_answer_is_above_the_least_by_less_than_half_of_what_is_allowed(decimals: int | None, slack: float) -> None:
    for epsilon, rate, num in ((0.5, 1.0, 4), (0.2, 1.0, 1), (0.5, 1.0, 40)):
        options = {"epsilon": epsilon, "delta": 1e-5, "sample_rate": rate, "steps": num}
        found = calibrate_noise_multiplier(**options, decimals=decimals)
        assert found == round(found, 6 if decimals is None else decimals)

        def excess(sigma: float, epsilon: float = epsilon, rate: float = rate, num: int = num) -> float:
            return compose_epsilon([steps(sigma, rate, num)], 1e-5) - epsilon

        least = brentq(excess, found * 0.99, found)
        assert least * (1 - 1e-9) < found < least * (1 + slack / 2) + (2e-6 if decimals is None else 1e-4)


def test_targets_and_lengths_are_accepted_up_to_their_limits() -> None:
    accounting.check_epsilon(1000.0)
    for epsilon in (0.0, 1000.1, math.nan):
        with pytest.raises(PrivacyError, match=r"expected a number above 0 and at most 1000, for example 8\."):
            accounting.check_epsilon(epsilon)
    options = {"epsilon": 8.0, "delta": 1e-5, "sample_rate": 1e-9}
    assert calibrate_noise_multiplier(steps=MAX_STEPS, **options) == MIN_NOISE_MULTIPLIER


def test_noise_has_a_floor_and_a_ceiling() -> None:
    assert calibrate_noise_multiplier(epsilon=300.0, delta=1e-5, sample_rate=0.01, steps=1) == MIN_NOISE_MULTIPLIER
    # In whole numbers the floor is 1: it is rounded up.
    assert calibrate_noise_multiplier(epsilon=300.0, delta=1e-5, sample_rate=0.01, steps=1, decimals=0) == 1.0
    with pytest.raises(PrivacyError, match="above 10,000"):
        calibrate_noise_multiplier(epsilon=1e-3, delta=1e-9, sample_rate=1.0, steps=10_000)


def test_calibration_stays_a_millionth_below_its_target_unless_decimals_are_given() -> None:
    """Seen at the ceiling, where the largest noise multiplier either just suffices or just does not."""
    options = {"delta": 1e-5, "sample_rate": 1.0, "steps": 10_000}
    least = compose_epsilon([steps(1e4, 1.0, 10_000)], 1e-5)
    assert calibrate_noise_multiplier(epsilon=least * (1 + 1.05e-6), **options) == 1e4
    with pytest.raises(PrivacyError, match="above 10,000"):
        calibrate_noise_multiplier(epsilon=least * (1 + 0.95e-6), **options)
    assert calibrate_noise_multiplier(epsilon=least, **options, decimals=2) == 1e4
    with pytest.raises(PrivacyError, match="above 10,000"):
        calibrate_noise_multiplier(epsilon=least * (1 - 1e-9), **options, decimals=2)


@pytest.mark.parametrize("epsilon", [25.0, 30.0, 33.2, 60.0])
def test_a_weak_target_is_kept_too(epsilon: float) -> None:
    sigma = calibrate_noise_multiplier(epsilon=epsilon, delta=1e-5, sample_rate=1.0, steps=1)
    assert compose_epsilon([GaussianSteps(noise_multiplier=sigma, sample_rate=1.0, steps=1)], 1e-5) <= epsilon
    assert sigma >= 0.2


EXTREMES = [
    # (epsilon, delta, sample rate, steps)
    (0.001, 1e-2, 0.05, 1),
    (1e-9, 1e-5, 0.25, 1),
    (1e-6, 1e-30, 1e-9, MAX_STEPS),
    (1000.0, 1e-30, 1.0, MAX_STEPS),
    (1000.0, 0.5, 1e-9, 1),
    (8.0, 1e-5, 1e-9, MAX_STEPS),
]


@pytest.mark.parametrize(("epsilon", "delta", "rate", "num"), EXTREMES)
def test_extremes_are_answered_in_time(epsilon: float, delta: float, rate: float, num: int, cells: Cells) -> None:
    """A number or a refusal: these searches had no end, or took gigabytes."""
    with contextlib.suppress(PrivacyError):
        found = calibrate_noise_multiplier(epsilon=epsilon, delta=delta, sample_rate=rate, steps=num)
        assert compose_epsilon([steps(found, rate, num)], delta) <= epsilon
    affordable_steps([], noise_multiplier=MIN_NOISE_MULTIPLIER, sample_rate=rate, budget=epsilon, delta=delta)
    assert 0 < max(cells.composed) <= 1.01 * 2**19
    assert max(cells.of_steps) <= 2**20
    assert sum(cells.composed) < 2**24
    assert sum(cells.of_steps) < 2**25


def test_what_would_take_gigabytes_is_answered_by_infinity() -> None:
    assert compose_epsilon([steps(0.2, 0.25, 10**10)], 1e-5) == math.inf
    assert compose_epsilon([steps(1e-200, 1e-9, 1)], 1e-5) == math.inf
    assert compose_epsilon([steps(1e-200, 1e-9, 0)], 1e-5) == 0.0


def test_beyond_its_range_the_accountant_counts_less_noise_and_a_higher_rate() -> None:
    for delta in (1e-5, 1e-12):
        assert compose_epsilon([steps(1e9, 1.0, 1)], delta) == compose_epsilon([steps(1e5, 1.0, 1)], delta)
    assert compose_epsilon([steps(1e5, 1.0, 1)], 1e-12) < compose_epsilon([steps(0.99e5, 1.0, 1)], 1e-12)
    assert compose_epsilon([steps(1e5, 1.0, 1)], 1e-12) > compose_epsilon([steps(2e5, 1.0, 1)], 0.5) == 0.0
    assert compose_epsilon([steps(1.0, 1e-300, 1)], 1e-12) == compose_epsilon([steps(1.0, 1e-9, 1)], 1e-12)


# --- where to look first: near the answer, so that few evaluations are needed ---


@pytest.mark.parametrize("mu", [0.01, 0.5, 3.0, 20.0])
@pytest.mark.parametrize("delta", [1e-9, 1e-5, 0.1])
def test_the_mu_of_a_budget_is_that_of_the_gaussian_mechanism(mu: float, delta: float) -> None:
    epsilon = compose_epsilon([steps(1 / mu, 1.0, 1)], delta)
    if epsilon > 0:
        assert accounting._limit_mu(epsilon, delta) == pytest.approx(mu, rel=1e-2)


def test_the_mu_of_a_budget_stays_within_limits() -> None:
    assert accounting._limit_mu(1e-9, 1e-12) == pytest.approx(1e-6)
    assert accounting._limit_mu(1e9, 0.5) == pytest.approx(1e3)


def test_limits_of_many_steps_are_those_of_the_central_limit_theorem() -> None:
    assert accounting._limit_mu_squared(steps(2.0, 1.0, 8)) == 8 / 4
    assert accounting._limit_mu_squared(steps(2.0, 0.1, 8)) == pytest.approx(8 * 0.01 * math.expm1(0.25), rel=1e-12)
    assert math.isfinite(accounting._limit_mu_squared(steps(1e-3, 0.1, 1)))
    for rate in (1.0, 0.1):
        others = (steps(3.0, 0.2, 5), steps(4.0, 1.0, 2))
        sigma = accounting._limit_sigma(1.7, rate, 60, others)
        total = sum(accounting._limit_mu_squared(event) for event in (steps(sigma, rate, 60), *others))
        assert total == pytest.approx(1.7**2, rel=1e-9)
    # What others leave nothing of still has a guess.
    full = accounting._limit_sigma(0.1, 1.0, 4, (steps(1.0, 1.0, 1),))
    assert full == pytest.approx(math.sqrt(4 / (1e-3 * 0.1**2)), rel=1e-9)


@pytest.mark.parametrize(
    ("epsilon", "rate", "num", "decimals", "most"),
    [
        (3.0, 0.1, 10, None, 9),
        (1.0, 0.05, 60, None, 8),
        (8.0, 0.2, 20, 4, 9),
        (0.5, 1.0, 4, None, 6),
        (20.0, 0.3, 5, 4, 10),
        (0.1, 0.02, 200, 2, 4),
        (3.0, 0.01, 3000, None, 6),
    ],
)
def test_a_calibration_takes_few_compositions(
    epsilon: float, rate: float, num: int, decimals: int | None, most: int
) -> None:
    """Each takes up to a second; more than these would be a step back."""
    accounting.calibrate_noise_multiplier.cache_clear()
    accounting._compose_epsilon.cache_clear()
    calibrate_noise_multiplier(epsilon=epsilon, delta=1e-5, sample_rate=rate, steps=num, decimals=decimals)
    assert accounting._compose_epsilon.cache_info().misses <= most


def test_likely_steps_are_near_those_that_fit() -> None:
    spent = [steps(8.0, 1.0, 20)]
    for sigma, rate in ((1.0, 0.02), (20.0, 1.0)):
        options = {"noise_multiplier": sigma, "sample_rate": rate, "budget": 3.0, "delta": 1e-5}
        found = affordable_steps(spent, **options)
        # The limit is close for much noise only.
        assert accounting.likely_steps(spent, **options) == pytest.approx(found, rel=0.05 if rate == 1 else 0.6)
    nothing = accounting.likely_steps(spent, noise_multiplier=1.0, sample_rate=0.1, budget=0.01, delta=1e-5)
    assert nothing == 1.0
    most = accounting.likely_steps([], noise_multiplier=1e4, sample_rate=1e-9, budget=9.0, delta=1e-5)
    assert most == MAX_STEPS


@pytest.mark.parametrize(
    ("event", "expected"),
    [
        (steps(2.0, 1.0, 8), 8 / (2 * 4)),
        (steps(2.0, 0.1, 8), 8 * 0.01 * math.expm1(0.25)),
        (steps(0.1, 0.5, 8), 8 * 0.5 / (2 * 0.01)),
        (steps(0.01, 1e-3, 3), 3 * 1e-3 / (2 * 1e-4)),
    ],
)
def test_the_mean_loss_is_bounded_by_both_formulas(event: GaussianSteps, expected: float) -> None:
    assert accounting.mean_loss(event) == pytest.approx(expected, rel=1e-12)


def test_no_epsilon_is_computed_above_a_mean_loss_of_a_thousand() -> None:
    assert compose_epsilon([steps(0.5, 1.0, 500)], 1e-5) < math.inf
    assert compose_epsilon([steps(0.5, 1.0, 501)], 1e-5) == math.inf
    assert compose_epsilon([steps(0.5, 1.0, 400), steps(1.0, 1.0, 402)], 1e-5) == math.inf


def at_one_site(events: tuple[tuple[float, float, int], ...]) -> tuple[tuple[float, float, int, int], ...]:
    return tuple((*event, 1) for event in events)


@pytest.mark.parametrize(
    "events",
    [((20.0, 0.01, 100),), ((1.0, 0.2, 30),), ((5.0, 1.0, 4), (50.0, 0.01, 300)), ((2000.0, 1.0, 10),)],
)
def test_a_cell_is_at_most_half_a_deviation_of_a_step(events: tuple[tuple[float, float, int], ...]) -> None:
    """And 1e-3 over a power of two."""
    total = sum(accounting.mean_loss(steps(*event)) for event in events)
    cell = accounting._cell(at_one_site(events), total, 1e-3)
    deviation = min(1 / sigma if rate == 1 else rate * math.sqrt(math.expm1(sigma**-2)) for sigma, rate, _ in events)
    assert math.log2(cell / 1e-3) == round(math.log2(cell / 1e-3))
    assert min(deviation / 4, 1e-3) < cell <= min(deviation / 2, 1e-3) or cell == 1e-3 <= deviation / 2


def test_a_cell_follows_the_deviation_of_one_step_and_the_width_of_all() -> None:
    assert accounting._cell(((0.5, 1.0, 1, 1),), 1.0, 8.0) == 1.0  # half of 1 / sigma, without sampling
    # Twenty deviations of the composition in 2^18 cells: a little more, and they are twice as wide.
    for share, expected in ((0.99, 1.0), (1.01, 2.0)):
        assert accounting._cell(((0.5, 1.0, 1, 1),), (share * (1 << 18) / 20) ** 2 / 2, 1.0) == expected


def test_rounding_alone_is_no_loss() -> None:
    """Two steps that together differ by less than delta: narrow cells alone would leave the last digit of the search."""
    assert compose_epsilon([steps(5.0, 1e-9, 2)], 1e-9) == 0.0


def test_cells_are_wider_where_there_would_be_too_many() -> None:
    events = ((10.0, 1e-4, 1), (0.5, 1.0, 480))
    total = sum(accounting.mean_loss(steps(*event)) for event in events)
    # Twenty deviations of the composition in at most 2^18 cells, about.
    least = 20 * math.sqrt(2 * total) / (1 << 18)
    assert least <= accounting._cell(at_one_site(events), total, 1e-3) < 2 * least
    # And the largest loss of one step, at ten deviations of the noise.
    events = ((1e4, 1e-4, 1), (0.3, 1e-6, 1))
    total = sum(accounting.mean_loss(steps(*event)) for event in events)
    least = largest_loss(0.3, 1e-6, True, 10.0) / (1 << 18)
    assert least <= accounting._cell(at_one_site(events), total, 1e-3) < 2 * least


@pytest.mark.parametrize("delta", [1e-5, 1e-12, 1e-30])
def test_the_accountant_begins_where_a_step_hides_something(delta: float) -> None:
    """With less noise the exponential of a loss overflowed, and the search for epsilon failed on a number that is none."""
    assert compose_epsilon([steps(0.0499, 1e-9, 1)], delta) == math.inf
    assert compose_epsilon([steps(0.05, 1e-9, 1)], delta) == pytest.approx(0.0 if delta == 1e-5 else 300, abs=200)


@pytest.mark.parametrize("sites", [1, 2, 3, 8])
def test_the_mean_loss_counts_the_squares_of_all_coins(sites: int) -> None:
    # Of so little noise the bound by convexity is the smaller one: E[K^2] / (2 sigma^2), K the number of `sites` coins.
    sigma, numbers = 0.1, np.arange(sites + 1)
    expected = float(stats.binom.pmf(numbers, sites, 0.125) @ numbers**2) / (2 * sigma**2)
    assert mean_loss(steps(sigma, 0.125, 1), sites) == pytest.approx(expected)


def test_too_little_noise_for_what_several_sites_add_is_not_accounted_for() -> None:
    little = steps(0.06, 0.125, 1)
    assert epsilon_at_sites([little], 1, 1e-5) < math.inf
    assert epsilon_at_sites([little], 2, 1e-5) == math.inf
