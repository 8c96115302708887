"""Exact discrete Gaussian noise over the integers: P(x) proportional to exp(-x^2 / (2 variance)).

Formal guarantees (tests: tests/shared/privacy/test_discrete_gaussian.py)
    * Given uniform independent bits the law is exact, whatever floating point does. Each question "is the uniform number u below
      exp(-gamma)?", gamma rational, is answered from double precision only where a proven bound on its error leaves no doubt;
      elsewhere in decimal arithmetic of any length, with further bits of u where 64 do not decide
      (test_the_exact_path_gives_the_same_numbers_bit_by_bit, test_probabilities_are_those_of_the_definition).
    * How many bits and how much time a call takes follows from `variance`, `count` and from candidates that were rejected,
      which tell nothing about those that were accepted; only the rare question that double precision leaves open, about one in
      10^12, takes longer. Nothing depends on a record. Whoever must not learn the noise should still not be shown how long a
      call took: draw before the first message (docs/privacy.md).

How a number is drawn. Canonne, Kamath, Steinke 2020 (arXiv:2004.00010), algorithms 2 and 3: the absolute value of a candidate
is y = u + t v, u uniform below t, v geometric, P(v >= k) = exp(-k); it is kept with probability
exp(-u / t) exp(-(y - variance / t)^2 / (2 variance)), and the negative zero is not. Their t is floor(sigma) + 1, but any does;
here it is the power of two next to sigma, so that u is a few bits. The product of both probabilities is exp(-gamma),
    gamma = y^2 / (2 variance) - v + variance / (2 t^2) >= 0.

What doubt double precision leaves. Where v is decided by the table it is at most 44, so y^2 / (2 variance) <= gamma + 44. It
is rounded five times, the other terms once each and their sum once: gamma is wrong by (6 gamma + 300) 2^-53 at most, and
exp(-gamma) by 2^-44. A library's exponential may add 2^-44, the 53 bits of u add 2^-53: together less than `_DOUBT`.
"""

from __future__ import annotations

from decimal import MAX_EMAX, MIN_EMIN, Context, Decimal
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from shared.errors import PrivacyError
from shared.privacy.randomness import KeyStream

MAX_VARIANCE = 1 << 96
"""Beyond it a draw might not fit into 64 bits."""

_DOUBT = 2.0**-40
_BLOCK = 1 << 16  # candidates at once, so that they stay in the processor's cache
_CANDIDATES = 2.5  # for each number that is kept, at most about

# floor(2^64 e^-k) for k = 45 (where it is 0) down to 1. A 64-bit word below it is below e^-k, one above it is not; equal ones are
# decided by further bits.
_POWERS = np.array([int(Context(prec=50).exp(Decimal(-k)) * 2**64) for k in range(45, 0, -1)], dtype=np.uint64)


def discrete_gaussian(variance: int, count: int, stream: KeyStream) -> NDArray[np.int64]:
    """Return `count` independent draws, shape [count].

    Args:
        variance: parameter sigma^2, from 1 to 2^96; the variance of the draws is below it by a relative 3e-7 at most.
        count: number of draws.
        stream: whose bits are taken, as many as are needed.

    Raises:
        PrivacyError: if `variance` is out of range.
    """
    if not 1 <= variance <= MAX_VARIANCE:
        raise PrivacyError(
            f"the variance of discrete Gaussian noise is {variance:.3g}, expected 1 to 2^96 steps of the grid squared."
        )
    drawn, found = np.empty(count, dtype=np.int64), 0
    while found < count:
        num_candidates = min(_BLOCK, int(_CANDIDATES * (count - found)) + 16)
        kept = _candidates(variance, num_candidates, stream)[: count - found]
        drawn[found : found + len(kept)] = kept
        found += len(kept)
    return drawn


def _candidates(variance: int, count: int, stream: KeyStream) -> NDArray[np.int64]:
    """Return those of `count` candidates that are kept."""
    bits = variance.bit_length() // 2  # t = 2^bits, between sigma / sqrt(2) and sqrt(2) sigma
    places, heights, coins = stream.uint64(3 * count).reshape(3, count)
    negative = (places >> np.uint64(63)).astype(np.bool_)
    offsets = (places & np.uint64((1 << bits) - 1)).astype(np.int64)  # u

    ranks = np.searchsorted(_POWERS, heights, side="right")
    blocks = len(_POWERS) - ranks  # v
    sizes = offsets + (blocks << bits)  # y
    exponents = sizes.astype(np.float64) ** 2 / (2 * variance) + (variance / (2 << 2 * bits) - blocks)
    chances = np.exp(-exponents)
    uniforms = (coins >> np.uint64(11)) * 2.0**-53
    kept = uniforms < chances

    open_questions = (np.abs(uniforms - chances) <= _DOUBT) | (_POWERS[ranks - 1] == heights)
    for index in np.flatnonzero(open_questions):
        height, coin = Uniform(int(heights[index]), stream), Uniform(int(coins[index]), stream)
        sizes[index], kept[index] = _decide(variance, bits, int(offsets[index]), height, coin)
    return _signed(sizes[kept], negative[kept])


def _signed(sizes: NDArray[np.int64], negative: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return the candidates with their signs, without the negative zeros: or zero would come twice as often."""
    signed: NDArray[np.int64] = np.where(negative, -sizes, sizes)[~negative | (sizes != 0)]
    return signed


def _decide(variance: int, bits: int, offset: int, height: Uniform, coin: Uniform) -> tuple[int, bool]:
    """Return the absolute value of one candidate and whether it is kept, exactly."""
    block = 0
    while height.is_below_exp(Fraction(block + 1)):
        block += 1
    size = offset + (block << bits)
    exponent = Fraction(size**2, 2 * variance) + Fraction(variance, 2 << 2 * bits) - block
    return size, coin.is_below_exp(exponent)


class Uniform:
    """A uniform real number in [0, 1) of which as many bits are known as its questions needed."""

    def __init__(self, word: int, stream: KeyStream) -> None:
        """Begin with the first 64 bits; further ones come from `stream`."""
        self._word, self._bits, self._stream = word, 64, stream

    def is_below_exp(self, exponent: Fraction) -> bool:
        """Return whether the number is below exp(-exponent), exponent >= 0."""
        while True:
            digits = self._bits // 3 + 20  # 20 more than the bits have
            context = Context(prec=digits, Emin=MIN_EMIN, Emax=MAX_EMAX)
            rounded = context.divide(Decimal(-exponent.numerator), Decimal(exponent.denominator))
            scaled = context.multiply(context.exp(rounded), Decimal(1 << self._bits))
            # Each of the three operations is rounded correctly, the first of them inside the exponential.
            slack = context.multiply(scaled, context.scaleb(context.subtract(2, rounded), 3 - digits))
            if self._word + 1 <= context.subtract(scaled, slack):
                return True
            if self._word >= context.add(scaled, slack):
                return False
            self._word = self._word << 64 | int(self._stream.uint64(1)[0])
            self._bits += 64
