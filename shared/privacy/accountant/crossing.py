"""Where a monotone cost of a whole number crosses a budget, in few evaluations.

The cost is slow (an epsilon of many steps), nearly a straight line in logarithms, and dearest far from the answer. So the
search starts from a guess, walks by secants of the logarithms, and bisects only between numbers that it has evaluated.

Formal guarantees (tests: tests/shared/privacy/test_crossing.py)
    * Both numbers of the answer were evaluated, or lie just outside [least, most]: how good the guess is decides how long it
      takes, never on which side of the budget they are (test_both_sides_of_any_monotone_cost).
    * The search ends whatever the cost: between two numbers that were evaluated every third evaluation at the latest halves the
      interval in logarithms, and before that the strides grow (test_the_search_ends_soon_for_any_cost).
"""

from __future__ import annotations

import math
from collections.abc import Callable

_LONGEST_STRIDE = 1.0  # in log n, at first: too far off, one evaluation would take gigabytes
_GROWTH = 4.0  # of the margin beyond the expected root, as long as the cost does not cross there
_PATIENCE = 2  # secants that may fail to halve the interval before it is bisected


def crossing(
    cost: Callable[[int], float],
    budget: float,
    *,
    rising: bool,
    least: int,
    most: int,
    guess: float,
    slope: float | None = None,
    slack: float = 0.0,
) -> tuple[int, int]:
    """Return (n, m), least - 1 <= n < m <= most + 1, on either side of the crossing: neighbours, or m - n <= n `slack`.

    If `rising`, n is within `budget` and m above it; else n is above it and m within it. With n = least - 1 all of
    [m, most] lie beyond the crossing; with m = most + 1 none was found beyond it.

    Args:
        cost: monotone, >= 0, may be `inf`; asked for numbers in [least, most] only.
        budget: finite, > 0.
        least, most: 1 <= least <= most.
        guess: where to look first.
        slope: of log cost in log n there, about; by default 0.7 or -1.2, as of epsilon in steps or in much noise.
    """
    low, high = least - 1, most + 1
    slope = slope or (0.7 if rising else -1.2)
    logs: dict[int, float] = {}
    number, streak, last = _between(guess, low, high), 0, None
    secants, halved = 0, math.inf
    while True:
        value = cost(number)
        logs[number] = math.log(value) if value > 0 else math.nan
        crossed = (value > budget) == rising
        low, high = (low, number) if crossed else (number, high)
        if high - low <= max(1, int(low * slack)):
            return low, high
        streak = streak + 1 if crossed is last else 0
        last = crossed
        if low in logs and high in logs:
            width = math.log(high / low)
            secants, halved = (0, width) if width <= halved / 2 else (secants + 1, halved)
            # A cost of 0 or infinity has no logarithm, so no secant leads from it.
            if secants >= _PATIENCE or not math.isfinite(logs[number]):
                number = _between(math.sqrt(low * high), low, high)
                continue
        limit = _LONGEST_STRIDE * 2 ** min(streak, 4)
        root = number * math.exp(min(max(_stride(logs, number, math.log(budget), slope, crossed), -limit), limit))
        # A little beyond the root, so that the interval closes from its other side too.
        margin = max(root * slack / 3, 0.5) * _GROWTH ** min(streak, 32)
        number = _between(root - margin if crossed else root + margin, low, high)


def _stride(logs: dict[int, float], number: int, target: float, slope: float, crossed: bool) -> float:
    """Return how far the root lies from `number`, in logarithms, by the secant through the nearest known number."""
    here = logs[number]
    if not math.isfinite(here):
        return -math.inf if crossed else math.inf
    others = [n for n in logs if n != number and math.isfinite(logs[n])]
    if others:
        nearest = min(others, key=lambda n: abs(math.log(n / number)))
        found = (logs[nearest] - here) / math.log(nearest / number)
        slope = found if found * slope > 0 else slope
    return (target - here) / slope


def _between(number: float, low: int, high: int) -> int:
    return round(min(max(number, low + 1), high - 1))
