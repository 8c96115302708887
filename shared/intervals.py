"""Confidence intervals of counted shares, and whether two of them differ."""

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


@lru_cache(maxsize=65_536)
def may_be_chance(count: int, other: int, total: int) -> bool:
    """Return whether two shares, each counted over `total` records, do not differ at 5 %: Fisher's exact test, two-sided.

    The test takes the two samples to be independent. Of two models on the same records, which mostly err on the same ones, it
    is conservative: it calls rather too many differences chance.
    """
    from scipy.stats import fisher_exact

    table = [[count, total - count], [other, total - other]]
    return bool(fisher_exact(table).pvalue > 0.05)
