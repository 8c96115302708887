"""The search: right for every monotone cost, whatever the guess; few evaluations for the costs it is made for."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.privacy.accountant.crossing import crossing


@given(
    steps=st.lists(st.floats(0, 10), min_size=1, max_size=60),
    budget=st.floats(0.01, 11),
    rising=st.booleans(),
    least=st.integers(1, 1000),
    guess=st.floats(0, 2000),
)
def test_both_sides_of_any_monotone_cost(
    steps: list[float], budget: float, rising: bool, least: int, guess: float
) -> None:
    """Also with plateaus, zeros, infinities and jumps."""
    values = [math.inf if value > 9 else value for value in sorted(steps, reverse=not rising)]
    most = least + len(values) - 1
    asked: list[int] = []

    def cost(number: int) -> float:
        asked.append(number)
        return values[number - least]

    low, high = crossing(cost, budget, rising=rising, least=least, most=most, guess=guess)
    assert high == low + 1
    assert len(set(asked)) == len(asked)
    assert low == least - 1 or (values[low - least] > budget) != rising
    assert high == most + 1 or (values[high - least] > budget) == rising


@pytest.mark.parametrize("guess", [1, 1e3, 1e6, 1e9, math.inf])
@pytest.mark.parametrize("root", [7.5, 1234.5, 7_654_321.5])
def test_powers_take_few_evaluations(guess: float, root: float) -> None:
    for power, rising in ((0.6, True), (1.0, True), (-1.1, False)):
        asked: list[int] = []

        def cost(number: int, power: float = power, asked: list[int] = asked) -> float:
            asked.append(number)
            return (number / root) ** power

        low, high = crossing(cost, 1.0, rising=rising, least=1, most=1 << 24, guess=guess)
        assert low < root < high == low + 1
        assert len(asked) < 20


def test_with_slack_the_ends_are_as_close_as_that() -> None:
    low, high = crossing(lambda n: (n / 765_432.1) ** 0.7, 1.0, rising=True, least=1, most=10**9, guess=1e5, slack=1e-4)
    assert low < 765_432.1 < high
    assert 1 < high - low <= 77


def test_nothing_or_everything_is_crossed() -> None:
    assert crossing(lambda n: 2.0, 1.0, rising=True, least=5, most=99, guess=50) == (4, 5)
    assert crossing(lambda n: 0.5, 1.0, rising=True, least=5, most=99, guess=50) == (99, 100)
    assert crossing(lambda n: math.inf, 1.0, rising=False, least=5, most=99, guess=50) == (99, 100)
    assert crossing(lambda n: 0.0, 1.0, rising=False, least=5, most=99, guess=50) == (4, 5)
    assert crossing(lambda n: 2.0, 1.0, rising=True, least=5, most=5, guess=1) == (4, 5)


@pytest.mark.parametrize("slope", [-1.2, 0.7, None])
@pytest.mark.parametrize("rising", [True, False])
@pytest.mark.parametrize("inside", [0.0, 0.99, 1.0, 1e-300])
@pytest.mark.parametrize("outside", [1.0000001, 1e300, math.inf])
@pytest.mark.parametrize("guess", [1.0, 3.3e7, 1e10])
def test_the_search_ends_soon_for_any_cost(
    slope: float | None, rising: bool, inside: float, outside: float, guess: float
) -> None:
    """Steps, plateaus, zeros: once a cost of exactly 0 made the search move by 1 of 30 million."""
    for root in (2, 12_345_678, 29_999_999):
        asked: list[int] = []

        def cost(number: int, root: int = root, asked: list[int] = asked) -> float:
            asked.append(number)
            return inside if (number <= root) == rising else outside

        found = crossing(cost, 1.0, rising=rising, least=1, most=30_000_000, guess=guess, slope=slope)
        assert found == (root, root + 1)
        assert len(asked) <= 110


# Costs with their root at 1, rising and falling: straight in logarithms, bent, without a logarithm on one side or on both.
COSTS: dict[str, tuple[bool, Callable[[float], float]]] = {
    "usual, rising": (True, lambda x: x**0.7),
    "steep, rising": (True, lambda x: x**1.6),
    "bent, rising": (True, lambda x: math.expm1(x) / math.expm1(1.0) if x < 50 else math.inf),
    "nothing below": (True, lambda x: 0.0 if x < 0.3 else x**0.6),
    "infinity above": (True, lambda x: math.inf if x > 1.7 else x),
    "usual, falling": (False, lambda x: x**-1.2),
    "flat, falling": (False, lambda x: x**-0.5),
    "bent, falling": (False, lambda x: math.expm1(1 / x**2) / math.expm1(1.0) if x > 0.05 else math.inf),
    "a step": (False, lambda x: 5.0 if x <= 1 else 0.2),
}
EVALUATIONS = {  # without slack, with it
    "usual, rising": (85, 85),
    "steep, rising": (94, 92),
    "bent, rising": (126, 119),
    "nothing below": (99, 99),
    "infinity above": (92, 92),
    "usual, falling": (85, 85),
    "flat, falling": (97, 97),
    "bent, falling": (134, 129),
    "a step": (421, 313),
}


@pytest.mark.parametrize("slack", [0.0, 1e-3])
@pytest.mark.parametrize("name", COSTS)
def test_evaluations_are_dear(name: str, slack: float) -> None:
    """How many the search takes on the whole from good guesses and bad ones; more would be a step back."""
    rising, shape = COSTS[name]
    taken = 0
    for root in (3.5, 2345.5, 3_456_789.5):
        for factor in (1.0, 1.2, 0.8, 3.0, 0.2, 500.0, 1e-4):
            asked: list[int] = []

            def cost(number: int, root: float = root, asked: list[int] = asked) -> float:
                asked.append(number)
                return shape(number / root)

            low, high = crossing(cost, 1.0, rising=rising, least=1, most=1 << 24, guess=root * factor, slack=slack)
            assert low < root < high
            assert high - low <= max(1, low * slack)
            taken += len(asked)
    assert taken <= EVALUATIONS[name][slack > 0]
