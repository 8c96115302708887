"""How an epsilon and what it was computed from are written, everywhere: on screens, in statements, reports and refusals.

Guarantee (tests: tests/shared/test_epsilons.py, which also looks for any other way to write one in the code)
    * What is written never claims more privacy than was computed or executed. An epsilon is never written below its value, and
      neither is its delta, a sampling rate or a clipping bound; a noise multiplier is never written above.
"""

from __future__ import annotations

import math
from decimal import ROUND_CEILING, ROUND_FLOOR, Context, Decimal

_EXACT = Context(prec=400)  # a float has its value as a decimal number, of so many digits


def rounded_up(epsilon: float, decimals: int = 3) -> str:
    """Return a computed epsilon with so many decimals, never below its value; "unbounded" where there is none."""
    if not math.isfinite(epsilon):
        return "unbounded"
    return _written(Decimal(float(epsilon)), decimals, ROUND_CEILING)


def bound_rounded_down(bound: float, decimals: int = 3) -> str:
    """Return what an audit found that epsilon is at least, or can find at most: never above its value, or it would claim more."""
    if not math.isfinite(bound):
        return "unbounded"
    return _written(Decimal(float(bound)), decimals, ROUND_FLOOR)


def rounded_up_short(epsilon: float) -> str:
    """Return a computed epsilon with two decimals, below 0.1 with two significant digits, never below its value."""
    if not 0 < epsilon < 0.1:  # also what is no number
        return rounded_up(epsilon, 2)
    return rounded_up(epsilon, 1 - math.floor(math.log10(epsilon)))


def as_set(epsilon: float) -> str:
    """Return a cap or a target as somebody set it: every digit, no trailing zeros."""
    return f"{epsilon:.15g}"


# Settings such as 1e-5 are no numbers of a computer; what is meant is the shortest decimal number that stands for each.


def delta_rounded_up(delta: float, digits: int = 6) -> str:
    """Return the delta of a guarantee with so many significant digits at most, never below what stands in the job."""
    context = Context(prec=digits, rounding=ROUND_CEILING)
    return f"{float(context.create_decimal(repr(float(delta)))):.{digits}g}"


def rate_rounded_up(rate: float, digits: int = 6) -> str:
    """Return a sampling rate or a clipping bound likewise: a larger one hides a record less."""
    return delta_rounded_up(rate, digits)


def noise_rounded_down(noise_multiplier: float, decimals: int = 4) -> str:
    """Return a noise multiplier, or the standard deviation of noise, with so many decimals, never above what was added."""
    exact = Decimal(repr(float(noise_multiplier)))
    if not exact.is_finite():
        return "unknown"
    return _written(exact, decimals, ROUND_FLOOR)


def _written(value: Decimal, decimals: int, rounding: str) -> str:
    rounded = value.quantize(Decimal(1).scaleb(-decimals), rounding, _EXACT)
    return f"{rounded if rounded else abs(rounded):f}"  # of zeros there is one
