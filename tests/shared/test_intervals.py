"""When two counted shares differ: against a computation by hand, and in cases that readers met."""

from __future__ import annotations

from math import comb

import pytest

from shared.intervals import may_be_chance


def fisher(count: int, other: int, total: int) -> float:
    """Return the p-value: of all tables with these sums, the share of those that are no more likely than this one."""
    right = count + other
    ways = [comb(total, some) * comb(total, right - some) if some <= right else 0 for some in range(total + 1)]
    return sum(way for way in ways if way <= ways[count]) / comb(2 * total, right)


@pytest.mark.parametrize("total", [7, 20, 60])
def test_it_is_fishers_exact_test(total: int) -> None:
    for count in range(0, total + 1, 3):
        for other in range(total + 1):
            assert may_be_chance(count, other, total) == (fisher(count, other, total) > 0.05)


@pytest.mark.parametrize(
    ("count", "other", "total", "chance"),
    [
        (534, 567, 683, False),  # 78.2 and 83.0 %, whose intervals overlap
        (552, 567, 683, True),
        (0, 0, 10, True),
        (0, 10, 10, False),
        (50_000, 50_300, 100_000, True),
        (50_000, 50_600, 100_000, False),
    ],
)
def test_cases(count: int, other: int, total: int, chance: bool) -> None:
    assert may_be_chance(count, other, total) == may_be_chance(other, count, total) == chance
