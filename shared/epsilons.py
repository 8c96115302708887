"""How an epsilon is written, everywhere: on screens, in statements, reports and refusals.

Guarantee (tests: tests/shared/test_epsilons.py, which also looks for any other way to write one in the code)
    * What was computed is never written below its value: a guarantee that was rounded down would be false.
"""

from __future__ import annotations

import math
from decimal import ROUND_CEILING, Context, Decimal

_EXACT = Context(prec=400)  # a float has its value as a decimal number, of so many digits


def rounded_up(epsilon: float, decimals: int = 3) -> str:
    """Return a computed epsilon with so many decimals, never below its value; "unbounded" where there is none."""
    if not math.isfinite(epsilon):
        return "unbounded"
    return f"{Decimal(epsilon).quantize(Decimal(1).scaleb(-decimals), ROUND_CEILING, _EXACT):f}"


def rounded_up_short(epsilon: float) -> str:
    """Return a computed epsilon with two decimals, below 0.1 with two significant digits, never below its value."""
    if epsilon == 0 or epsilon >= 0.1:
        return rounded_up(epsilon, 2)
    return rounded_up(epsilon, 1 - math.floor(math.log10(epsilon)))


def as_set(epsilon: float) -> str:
    """Return a cap or a target as somebody set it: every digit, no trailing zeros."""
    return f"{epsilon:.15g}"
