"""The filter: valid under adaptive choices, never below an independent composition, and how much it costs."""

from __future__ import annotations

import math
import random
from collections import Counter
from functools import cache, reduce
from itertools import pairwise

import dp_accounting
import numpy as np
import pytest
from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution, from_gaussian_mechanism
from dp_accounting.rdp.rdp_privacy_accountant import _compute_rdp_poisson_subsampled_gaussian
from hypothesis import example, given, settings
from hypothesis import strategies as st
from opacus.accountants.analysis import rdp as opacus_rdp
from scipy.integrate import quad
from scipy.optimize import minimize_scalar
from scipy.special import logsumexp
from scipy.stats import norm

from shared.errors import PrivacyError
from shared.limits import MAX_STEPS
from shared.privacy.accounting import GaussianSteps, compose_epsilon
from shared.privacy.filter import (
    MAX_ORDER,
    Composition,
    SpendingRule,
    filter_epsilon,
    filter_orders,
    renyi_divergence,
)

DELTA = 1e-5
ORDERS = (3, 4)


def steps(sigma: float, rate: float, num: int) -> GaussianSteps:
    return GaussianSteps(noise_multiplier=sigma, sample_rate=rate, steps=num)


# --- divergences ---


def integrated_divergence(sigma: float, rate: float, order: int, *, swapped: bool) -> float:
    """Return the Rényi divergence of N(0) and (1 - q) N(0) + q N(1), noise sigma, by quadrature."""

    def integrand(x: float) -> float:
        log_one = norm.logpdf(x, 0, sigma)
        log_other = np.logaddexp(
            math.log1p(-rate) + log_one if rate < 1 else -math.inf, math.log(rate) + norm.logpdf(x, 1, sigma)
        )
        upper, lower = (log_one, log_other) if swapped else (log_other, log_one)
        return math.exp(order * upper - (order - 1) * lower)

    # The mass lies around 0 and, for the tilted density, around the order; swapped, left of 0.
    edges = [-order - 12 * sigma, -3 * sigma, 0, 1, order, order + 12 * sigma]
    mass = sum(quad(integrand, a, b, epsabs=0, epsrel=1e-11, limit=500)[0] for a, b in pairwise(edges))
    return math.log(mass) / (order - 1)


@pytest.mark.parametrize("order", [2, 3, 4, 8])
@pytest.mark.parametrize(("sigma", "rate"), [(0.7, 0.02), (1.0, 0.05), (2.0, 0.5), (5.0, 0.01), (1.5, 1.0)])
def test_divergence_against_numerical_integration(sigma: float, rate: float, order: int) -> None:
    found = renyi_divergence(sigma, rate, order)
    one, other = (integrated_divergence(sigma, rate, order, swapped=swapped) for swapped in (False, True))
    assert found >= max(one, other) * (1 - 1e-10)
    assert found == pytest.approx(max(one, other), rel=1e-6)


@pytest.mark.parametrize("order", [2, 5, 12, 64, 307])
@pytest.mark.parametrize(("sigma", "rate"), [(0.5, 0.001), (1.0, 0.05), (8.0, 0.3), (2.0, 1.0), (0.3, 0.999)])
def test_divergence_against_a_second_library(sigma: float, rate: float, order: int) -> None:
    theirs = float(opacus_rdp.compute_rdp(q=rate, noise_multiplier=sigma, steps=1, orders=[order])[0])
    assert theirs < renyi_divergence(sigma, rate, order) <= theirs * (1 + 1e-6) + 1e-11


@pytest.mark.parametrize("order", [2, 3, 16, 307])
@pytest.mark.parametrize("sigma", [1e-3, 0.7, 1.3, 40.0, 1e100])
def test_the_divergence_is_that_of_dp_accounting_to_the_last_bit(sigma: float, order: int) -> None:
    """Ledgers were counted by it, and go on as they were; the package itself is not loaded where nothing else needs it."""
    for rate in (1e-9, 0.0123, 0.5, 0.999, 1.0):
        (theirs,) = _compute_rdp_poisson_subsampled_gaussian(rate, sigma, [order])
        assert renyi_divergence(sigma, rate, order) == max(float(theirs), 0.0) * (1 + 1e-9) + 1e-12


def test_steps_that_hide_nothing_are_infinite() -> None:
    assert renyi_divergence(1e-200, 0.5, 3) == math.inf
    assert filter_epsilon([steps(1e-200, 0.5, 1), steps(1.0, 0.5, 1)], delta=DELTA, orders=ORDERS) == math.inf
    assert filter_epsilon([steps(1e-200, 0.5, 0)], delta=DELTA, orders=ORDERS) == 0.0
    assert filter_epsilon([steps(1e-3, 1.0, 10**9)], delta=DELTA, orders=ORDERS) == math.inf
    assert 9e5 < filter_epsilon([steps(1.0, 1.0, 600_000)], delta=DELTA, orders=ORDERS) < 1e6
    assert 0 < renyi_divergence(100.0, 1e-12, 3) < 2e-12


# --- the spend ---


def fits(mechanisms: Counter[tuple[float, float]], *, cap: float, orders: tuple[int, ...], delta: float) -> float:
    """Return by how much, in nats, condition (*) of `shared.privacy.filter` holds for `cap`; negative: it does not.

    Written from the condition, not from the formula that follows from it, with the divergences of another library.
    """
    sums = [sum(n * _opacus(sigma, q, order) for (sigma, q), n in mechanisms.items()) for order in orders]

    def log_ratio(x: float) -> float:
        log_terms = [(order - 1) * (cap + x - s) for order, s in zip(orders, sums, strict=True)]
        return math.log(-math.expm1(-x)) - float(np.logaddexp.reduce(log_terms)) + math.log(len(orders))

    best = minimize_scalar(lambda x: -log_ratio(x), bounds=(1e-4, 1.5), method="bounded", options={"xatol": 1e-9})
    return math.log(delta) + float(best.fun)


@cache
def _opacus(sigma: float, rate: float, order: int) -> float:
    return float(opacus_rdp.compute_rdp(q=rate, noise_multiplier=sigma, steps=1, orders=[order])[0])


# Cells of 2e-3: pessimistic, so the composition comes out larger than with narrower ones (by up to 1e-2 here), and the
# filter has to be above even that.
_CELL = 2e-3
_GRID = ((0.8, 0.02), (1.0, 0.05), (1.5, 0.1), (2.0, 0.01), (4.0, 0.4), (6.0, 1.0))


@cache
def _pld(mechanism: tuple[float, float]) -> PrivacyLossDistribution:
    return from_gaussian_mechanism(
        standard_deviation=mechanism[0],
        sampling_prob=mechanism[1],
        value_discretization_interval=_CELL,
        neighboring_relation=dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE,
    )


def composed_epsilon(mechanisms: Counter[tuple[float, float]]) -> float:
    """Return epsilon of everything released, by PLD: what an observer learns at least, if not at most."""
    parts = [_pld(mechanism).self_compose(num) for mechanism, num in mechanisms.items()]
    return float(reduce(lambda one, other: one.compose(other), parts).get_epsilon_for_delta(DELTA))


def test_adaptive_sequences_stop_exactly_before_the_cap() -> None:
    """150 analysts, each of whom chooses the next run by what the earlier ones showed."""
    num_borderline = num_refused = 0
    for seed in range(150):
        chance = random.Random(seed)
        cap = chance.choice((1.0, 3.0, 8.0, 10.0))
        orders = filter_orders(epsilon=cap, delta=DELTA)
        favourites = chance.choice((chance.sample(_GRID, 2), [chance.choice(_GRID)] * 2))
        done: Counter[tuple[float, float]] = Counter()
        spend, loss = 0.0, 0.0
        for _ in range(40):
            # What was seen decides: after a large loss the analyst takes bolder steps of another mechanism.
            sigma, rate = mechanism = favourites[loss > 0.5 or spend > cap * 0.7]
            share = chance.choice((0.6, 0.3, 0.1)) if loss < 2 else 0.3
            num = max(1, round(share * cap / (rate / sigma) ** 2 / 20))
            with_it = done + Counter({mechanism: num})
            new = filter_epsilon([steps(*m, n) for m, n in with_it.items()], delta=DELTA, orders=orders)
            margin = fits(with_it, cap=cap, orders=orders, delta=DELTA)
            if abs(margin) < 1e-6:
                num_borderline += 1
            else:
                assert (new <= cap) == (margin > 0), (seed, new, cap, margin)
            assert new > spend
            if new > cap:
                num_refused += 1
                break
            done, spend = with_it, new
            loss += chance.gauss(0, math.sqrt(num) * rate / sigma)
        if done:
            assert composed_epsilon(done) <= spend <= cap, (seed, done)
    assert num_borderline <= 2, "the comparison saw nothing"
    assert num_refused > 135, "too few sequences reached their cap"


MECHANISMS = st.lists(
    st.builds(steps, st.sampled_from((0.6, 1.0, 3.0)), st.sampled_from((1e-4, 0.05, 1.0)), st.integers(0, 300)),
    max_size=5,
)


@given(mechanisms=MECHANISMS, more=MECHANISMS, orders=st.sampled_from([(2,), (3, 4), (5, 8), (2, 64, 512)]))
@settings(max_examples=200, deadline=None)
def test_the_spend_is_monotone(
    mechanisms: list[GaussianSteps], more: list[GaussianSteps], orders: tuple[int, ...]
) -> None:
    def spend(charged: list[GaussianSteps]) -> float:
        return filter_epsilon(charged, delta=DELTA, orders=orders)

    # To the accuracy of the root, by which the spend is raised.
    assert 0.0 <= spend(mechanisms) <= spend([*mechanisms, *more]) + 2e-10
    assert spend([*more, *mechanisms]) == spend([*mechanisms, *more])


@given(mechanisms=MECHANISMS.filter(lambda found: any(m.steps for m in found)), delta=st.floats(1e-12, 0.1))
@example(mechanisms=[GaussianSteps(noise_multiplier=3.0, sample_rate=0.05, steps=205)], delta=0.046875)
@settings(max_examples=100, deadline=None)
def test_the_spend_meets_the_condition_of_the_proof(mechanisms: list[GaussianSteps], delta: float) -> None:
    """One order alone gives the known conversion; several meet (*) of the module everywhere.

    They cost no more than delta / K for each order. They may cost a hair less than the best of them alone (the example).
    """

    def divergence(order: int) -> float:
        return sum(m.steps * renyi_divergence(m.noise_multiplier, m.sample_rate, order) for m in mechanisms)

    def by_one(order: int, delta: float) -> float:
        return max(0.0, divergence(order) + math.log1p(-1 / order) - math.log(order * delta) / (order - 1))

    for order in (2, 3, 4, 12):
        assert filter_epsilon(mechanisms, delta=delta, orders=[order]) == pytest.approx(by_one(order, delta), abs=1e-8)
    orders = np.array([3, 4, 12])
    spend = filter_epsilon(mechanisms, delta=delta, orders=orders.tolist())
    assert spend <= min(by_one(k, delta / 3) for k in orders) + 1e-8
    if spend == 0.0:
        return
    # (*), in logarithms: log(1 - exp(c - y)) <= log(delta) + log M(y) for all y > c.
    y = spend + np.geomspace(1e-6, 50.0, 20_000)
    sums = np.array([divergence(int(k)) for k in orders])
    log_m = logsumexp((orders - 1) * (y[:, None] - sums), axis=1) - math.log(3)
    excess = np.log(-np.expm1(spend - y)) - math.log(delta) - log_m
    assert excess.max() <= 1e-6


def test_orders_follow_from_the_cap_alone() -> None:
    found = {
        epsilon: filter_orders(epsilon=epsilon, delta=DELTA) for epsilon in (0.01, 1.0, 3.0, 8.0, 10.0, 20.0, 500.0)
    }
    assert found == {
        0.01: (307, 511),
        1.0: (11, 18),
        3.0: (5, 8),
        8.0: (3, 4),
        10.0: (3, 4),
        20.0: (2, 3),
        500.0: (2,),
    }


@pytest.mark.parametrize(("epsilon", "delta"), [(1.0, 1e-6), (3.0, 1e-6), (7.0, 1e-3), (20.0, 1e-9)])
def test_the_upper_order_is_the_best_for_plain_noise(epsilon: float, delta: float) -> None:
    """By a dense search: rho = (epsilon - log(1 - 1/alpha) + log(alpha delta) / (alpha - 1)) / alpha is largest there."""
    alphas = np.linspace(1.01, 100, 1_000_000)
    rho = (epsilon - np.log1p(-1 / alphas) + np.log(alphas * delta) / (alphas - 1)) / alphas
    best = float(alphas[rho.argmax()])
    assert filter_orders(epsilon=epsilon, delta=delta) == tuple(sorted({math.ceil(0.6 * best), math.ceil(best)}))


def test_bad_arguments_are_refused() -> None:
    for orders in ((), (1,), (4, 3), (3, 3), (2.5,), (MAX_ORDER + 1,), (True, 3)):
        with pytest.raises(PrivacyError, match="orders"):
            filter_epsilon([], delta=DELTA, orders=orders)  # type: ignore[arg-type]
    for delta in (0.0, 1.0, math.nan):
        with pytest.raises(PrivacyError, match="delta"):
            filter_epsilon([], delta=delta, orders=ORDERS)
    for delta in (0.0, 1e-31, 1.0, math.nan):
        with pytest.raises(PrivacyError, match="delta"):
            filter_orders(epsilon=8.0, delta=delta)
    for epsilon in (0.0, math.inf, math.nan):
        with pytest.raises(PrivacyError, match="epsilon"):
            filter_orders(epsilon=epsilon, delta=DELTA)
    for bad in ((1.0, 0.05, -1), (math.nan, 0.05, 1), (1.0, math.nan, 1), (1.0, 0.0, 1), (0.0, 0.05, 1)):
        with pytest.raises(PrivacyError):
            steps(*bad)
    with pytest.raises(PrivacyError, match="composition is 'none'"):
        SpendingRule(composition="none", delta=DELTA, orders=ORDERS)  # type: ignore[arg-type]


@pytest.mark.parametrize("composition", ["adaptive", "fixed"])
def test_affordable_steps_are_the_most_that_fit(composition: Composition) -> None:
    rule = SpendingRule(composition=composition, delta=DELTA, orders=ORDERS)
    past = [steps(1.0, 0.05, 100), steps(2.0, 0.1, 30)]
    found = rule.affordable_steps(past, noise_multiplier=1.2, sample_rate=0.05, cap=8.0)
    assert rule.epsilon([*past, steps(1.2, 0.05, found)]) <= 8.0 < rule.epsilon([*past, steps(1.2, 0.05, found + 1)])
    assert rule.affordable_steps(past, noise_multiplier=0.3, sample_rate=1.0, cap=8.0) == 0
    assert rule.affordable_steps([steps(1.0, 1.0, 1000)], noise_multiplier=9.0, sample_rate=0.01, cap=8.0) == 0


@pytest.mark.parametrize(
    ("sigma", "rate", "cap", "at_least"),
    # Runs of epsilon 1, 2, 3 and 8 alone, by PLD at delta 1e-5: n = 10,000, B = 512, 10 epochs; the last, n = 50,000,
    # B = 1024, 3 epochs, has so little noise that no order is good.
    [(2.871, 0.0512, 8.0, 0.83), (1.689, 0.0512, 8.0, 0.82), (1.298, 0.0512, 10.0, 0.83), (0.562, 0.02048, 8.0, 0.28)],
)
def test_what_adaptivity_costs(sigma: float, rate: float, cap: float, at_least: float) -> None:
    """The share of steps that the filter allows of those that PLD would, as docs/decisions/0008 states it."""
    rules = [
        SpendingRule(composition=c, delta=DELTA, orders=filter_orders(epsilon=cap, delta=DELTA))
        for c in ("adaptive", "fixed")
    ]
    adaptive, fixed = (rule.affordable_steps([], noise_multiplier=sigma, sample_rate=rate, cap=cap) for rule in rules)
    assert at_least <= adaptive / fixed < at_least + 0.04


def test_the_spend_exceeds_composition_from_the_first_step_on() -> None:
    for num in (1, 10, 100, 1000):
        charged = [steps(1.0, 0.05, num)]
        assert filter_epsilon(charged, delta=DELTA, orders=ORDERS) > compose_epsilon(charged, DELTA)


@pytest.mark.parametrize("delta", [1e-3, 1e-6, 1e-12])
def test_a_fixed_account_spends_at_its_own_delta(delta: float) -> None:
    """Not at any other one, in what is spent and in what is left."""
    charged = [GaussianSteps(noise_multiplier=s, sample_rate=0.1, steps=20) for s in (1.0, 2.0)]
    rule = SpendingRule(composition="fixed", delta=delta, orders=filter_orders(epsilon=8.0, delta=1e-5))
    spent = rule.epsilon(charged)
    assert spent == compose_epsilon(charged, delta)
    left = rule.affordable_steps(charged, noise_multiplier=1.0, sample_rate=0.1, cap=spent + 1.0)
    more = [GaussianSteps(noise_multiplier=1.0, sample_rate=0.1, steps=left + extra) for extra in (0, 1)]
    within, above = (compose_epsilon([*charged, step], delta) for step in more)
    assert within <= spent + 1.0 < above


def test_a_rule_needs_orders_that_were_fixed() -> None:
    for orders in ((), (3, 2), (2, 2), (1, 3), (2, 513)):
        with pytest.raises(PrivacyError, match="the filter's orders are"):
            SpendingRule(composition="adaptive", delta=1e-5, orders=orders)
    assert SpendingRule(composition="adaptive", delta=1e-5, orders=(2, 512)).orders == (2, 512)


@pytest.mark.parametrize("num", [1, 2, 3, 7, 40])
def test_steps_up_to_exactly_the_cap_are_affordable(num: int) -> None:
    rule = SpendingRule(composition="adaptive", delta=1e-5, orders=filter_orders(epsilon=3.0, delta=1e-5))
    spent = [GaussianSteps(noise_multiplier=2.0, sample_rate=0.1, steps=5)]
    cap = rule.epsilon([*spent, GaussianSteps(noise_multiplier=1.1, sample_rate=0.05, steps=num)])
    options = {"noise_multiplier": 1.1, "sample_rate": 0.05}
    assert rule.affordable_steps(spent, cap=cap, **options) == num
    assert rule.affordable_steps(spent, cap=cap - 1e-9, **options) == num - 1


@pytest.mark.parametrize("composition", ["adaptive", "fixed"])
def test_no_more_steps_are_affordable_than_a_plan_may_have(composition: Composition) -> None:
    rule = SpendingRule(composition=composition, delta=DELTA, orders=ORDERS)
    assert rule.affordable_steps([], noise_multiplier=1e4, sample_rate=1e-9, cap=8.0) == MAX_STEPS


@pytest.mark.parametrize("delta", [0.0, 1.0, math.nan])
def test_a_rule_needs_a_delta(delta: float) -> None:
    with pytest.raises(PrivacyError, match="delta"):
        SpendingRule(composition="adaptive", delta=delta, orders=ORDERS)


@pytest.mark.parametrize(("sigma", "order"), [(2.0, 3), (1e3, 2), (0.1, 100)])
def test_a_divergence_is_rounded_up_by_a_billionth_and_a_trillionth(sigma: float, order: int) -> None:
    exact = order / (2 * sigma**2)  # without sampling
    assert renyi_divergence(sigma, 1.0, order) == pytest.approx(exact * (1 + 1e-9) + 1e-12, rel=1e-11, abs=1e-14)


def test_a_spend_above_a_million_is_infinite() -> None:
    for num, is_finite in ((999_000, True), (1_001_000, False)):
        found = filter_epsilon([steps(1.0, 1.0, num)], delta=DELTA, orders=(2,))
        assert (found == pytest.approx(num, rel=1e-4)) if is_finite else (found == math.inf)


def test_the_divergence_of_noise_without_end_is_that_of_much_noise() -> None:
    assert renyi_divergence(1e308, 0.5, 8) == renyi_divergence(1e100, 0.5, 8) < 1e-11


def test_the_divergence_of_next_to_no_noise_is_infinite() -> None:
    assert renyi_divergence(0.999e-3, 1e-9, 2) == math.inf
    assert renyi_divergence(1e-3, 1.0, 2) == pytest.approx(1e6, rel=1e-6)


@pytest.mark.parametrize(("order", "num"), [(2, 1), (9, 40), (64, 3)])
def test_the_spend_of_one_order_is_that_of_the_closed_form_and_never_below(order: int, num: int) -> None:
    """z = S - log(alpha delta) / (alpha - 1), and the spend z + log(1 - 1/alpha): Canonne, Kamath, Steinke 2020."""
    event = GaussianSteps(noise_multiplier=1.5, sample_rate=0.1, steps=num)
    total = num * renyi_divergence(1.5, 0.1, order)
    exact = total - math.log(order * 1e-5) / (order - 1) + math.log1p(-1 / order)
    assert 1e-10 < filter_epsilon([event], delta=1e-5, orders=(order,)) - exact < 3.1e-10


@pytest.mark.parametrize("composition", ["adaptive", "fixed"])
def test_how_often_each_was_charged_is_as_good_as_a_list(composition: Composition) -> None:
    """To the last bit, however often; steps that were charged in other portions are other terms of the filter's sum."""
    some = [GaussianSteps(noise_multiplier=0.9 + n / 7, sample_rate=0.013, steps=1 + n % 3) for n in range(7)]
    charged = [some[n * n % 7] for n in range(900)]
    rule = SpendingRule(composition=composition, delta=1e-5, orders=(6, 11))
    spent = rule.epsilon(charged)
    assert rule.epsilon(Counter(charged)) == rule.epsilon(iter(charged[::-1])) == spent > 1
    assert rule.epsilon(Counter(charged[:-1])) < spent
    assert rule.epsilon(Counter()) == 0.0
