"""Confidence intervals of counted shares."""

from __future__ import annotations

from functools import lru_cache


@lru_cache(maxsize=65_536)
def wilson(count: int, total: int) -> tuple[float, float]:
    """Return Wilson's score interval at 95 % of a share counted over `total` independent records (Wilson 1927).

    It begins at exactly 0 for a count of 0 and ends at exactly 1 for a count of `total`, so no bar of a figure is negative.
    """
    from scipy.stats import binomtest

    low, high = binomtest(count, total).proportion_ci(0.95, method="wilson")
    return float(low), float(high)
