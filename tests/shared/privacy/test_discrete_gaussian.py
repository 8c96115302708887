"""Discrete Gaussian noise: the law of the definition, the same on the quick and the exact path; wrong laws are told apart."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable
from fractions import Fraction

import mpmath
import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

import shared.privacy.discrete_gaussian as module
from shared.errors import PrivacyError
from shared.privacy.discrete_gaussian import MAX_VARIANCE, Uniform, discrete_gaussian
from shared.privacy.randomness import KeyStream

LARGE = [2**20 + 1, 2**48 + 12345, 10**8 * 2**48, MAX_VARIANCE]
EXACT = mpmath.mp.clone()
EXACT.dps = 80


def stream(name: object) -> KeyStream:
    return KeyStream(hashlib.sha256(str(name).encode()).digest())


class Scripted(KeyStream):
    """Gives the words that a test wrote down, and counts how many were taken."""

    def __init__(self, words: list[int]) -> None:
        self.words = list(words)

    def uint64(self, count: int) -> NDArray[np.uint64]:
        taken, self.words = self.words[:count], self.words[count:]
        assert len(taken) == count
        return np.array(taken, dtype=np.uint64)


def fit(draws: NDArray[np.int64], variance: int) -> float:
    """Return the p-value of the probabilities of the definition, cells that are expected less than ten times put together."""
    furthest = 40 * math.isqrt(variance) + 40
    numbers = np.arange(-furthest, furthest + 1)
    probabilities = np.exp(-(numbers**2) / (2 * variance))
    expected = probabilities / probabilities.sum() * len(draws)
    observed = np.bincount(draws + furthest, minlength=len(numbers))
    usual = expected >= 10
    return float(
        stats.chisquare(
            np.append(observed[usual], observed[~usual].sum()), np.append(expected[usual], expected[~usual].sum())
        ).pvalue
    )


# --- the law ---


def test_probabilities_are_those_of_the_definition() -> None:
    """Variances 1 to 50, each at one seed."""
    values = [fit(discrete_gaussian(variance, 100_000, stream(variance)), variance) for variance in range(1, 51)]
    assert min(values) > 1e-5
    assert stats.kstest(values, "uniform").pvalue > 1e-4


@pytest.mark.parametrize("variance", [1, 2, 3, 17, 50])
def test_probabilities_are_those_of_the_definition_at_many_seeds(variance: int) -> None:
    values = [fit(discrete_gaussian(variance, 30_000, stream((variance, seed))), variance) for seed in range(40)]
    assert min(values) > 1e-5
    assert stats.kstest(values, "uniform").pvalue > 1e-4


@pytest.mark.parametrize("variance", LARGE)
def test_much_noise_is_normal_down_to_its_last_bits(variance: int) -> None:
    count = 300_000
    draws = discrete_gaussian(variance, count, stream(variance))
    unit = draws / math.sqrt(variance)
    assert stats.kstest(unit, "norm").pvalue > 1e-4
    assert abs(unit.mean()) * math.sqrt(count) < 4
    square = float((unit**2).sum())
    assert 1e-4 < stats.chi2.cdf(square, count) < 1 - 1e-4
    for wrong in (0.98, 1.02):
        assert not 1e-4 < stats.chi2.cdf(square * wrong**2, count) < 1 - 1e-4
    assert abs(float((unit**4).mean()) - 3) < 4 * math.sqrt(96 / count)
    for bit in (0, 1, 5):  # where noise of single precision has zeros
        assert stats.binomtest(int(((draws >> bit) & 1).sum()), count).pvalue > 1e-4
    assert abs(np.corrcoef(unit[:-1], unit[1:])[0, 1]) * math.sqrt(count) < 4


def test_noise_in_single_precision_has_other_last_bits() -> None:
    """The check above can fail."""
    rounded = (stream("rounded").normal(1000) * math.sqrt(MAX_VARIANCE)).astype(np.float32).astype(np.int64)
    assert stats.binomtest(int((rounded & 1).sum()), 1000).pvalue < 1e-4


# --- both paths ---


@pytest.mark.parametrize("variance", [1, 2, 3, 8, 50, *LARGE])
def test_the_exact_path_gives_the_same_numbers_bit_by_bit(monkeypatch: pytest.MonkeyPatch, variance: int) -> None:
    quick = discrete_gaussian(variance, 1500, stream("paths"))
    decided: list[int] = []
    decide = module._decide

    def counted(*arguments: object) -> tuple[int, bool]:
        decided.append(1)
        return decide(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "_decide", counted)
    assert np.array_equal(discrete_gaussian(variance, 1500, stream("paths")), quick)
    assert decided == []
    monkeypatch.setattr(module, "_DOUBT", 2.0)  # doubts everything
    assert np.array_equal(discrete_gaussian(variance, 1500, stream("paths")), quick)
    assert len(decided) > 3000


def test_doubt_is_wider_than_what_double_precision_loses(monkeypatch: pytest.MonkeyPatch) -> None:
    """The chance that is compared is far nearer to the true one than the doubt allows for."""
    seen: list[tuple[NDArray[np.float64], NDArray[np.float64]]] = []
    exp = np.exp

    def noted(values: NDArray[np.float64]) -> NDArray[np.float64]:
        seen.append((values, exp(values)))
        return seen[-1][1]

    monkeypatch.setattr(module.np, "exp", noted)
    for variance in (1, 3, *LARGE):
        bits = variance.bit_length() // 2
        words = stream(("doubt", variance)).uint64(600).reshape(3, 200)
        words = words.copy()
        words[1, :45] = module._POWERS + np.uint64(1)  # every possible height
        seen.clear()
        module._candidates(variance, 200, Scripted(words.flatten().tolist() + [0] * 1000))
        ((_, chances),) = seen
        for place, height, chance in zip(words[0], words[1], chances, strict=True):
            block = int(np.count_nonzero(height < module._POWERS))
            size = (int(place) & ((1 << bits) - 1)) + (block << bits)
            exponent = Fraction(size**2, 2 * variance) + Fraction(variance, 2 * 4**bits) - block
            assert exponent >= 0
            true = EXACT.exp(-EXACT.mpf(exponent.numerator) / exponent.denominator)
            assert abs(EXACT.mpf(float(chance)) - true) < 2.0**-44 < module._DOUBT / 8


def test_powers_are_rounded_down_from_the_exact_ones() -> None:
    expected = [int(EXACT.floor(EXACT.exp(-k) * 2**64)) for k in range(45, 0, -1)]
    assert module._POWERS.tolist() == expected
    assert (expected[0], expected[-1]) == (0, 6786177901268885274)


@pytest.mark.parametrize(
    "exponent", [Fraction(1), Fraction(44), Fraction(1, 3), Fraction(10**19 + 7, 10**18), Fraction(60)]
)
@pytest.mark.parametrize("words", [1, 2, 3])
def test_a_word_on_the_edge_is_decided_by_further_bits(exponent: Fraction, words: int) -> None:
    bits = 64 * words
    edge = int(EXACT.floor(EXACT.exp(-EXACT.mpf(exponent.numerator) / exponent.denominator) * EXACT.mpf(2) ** bits))
    known = [(edge >> 64 * place) % 2**64 for place in reversed(range(words))]
    for following, below in (([0], True), ([2**64 - 1], False)):
        source = Scripted(known[1:] + following)
        assert Uniform(known[0], source).is_below_exp(exponent) is below
        assert source.words == []
    # One unit of the last word to either side needs nothing further.
    for step, below in ((-1, True), (1, False)) if edge else ():
        beside = edge + step
        first, *rest = [(beside >> 64 * place) % 2**64 for place in reversed(range(words))]
        assert Uniform(first, Scripted(rest)).is_below_exp(exponent) is below


def test_everything_is_below_one() -> None:
    assert Uniform(2**64 - 2, Scripted([])).is_below_exp(Fraction(0))
    assert Uniform(2**64 - 1, Scripted([2**64 - 1, 5])).is_below_exp(Fraction(0))


@pytest.mark.parametrize(("following", "block"), [(0, 1), (2**64 - 1, 0)])
def test_a_height_on_the_edge_is_decided_by_further_bits(following: int, block: int) -> None:
    """The height is e^-1 to 64 bits, and the coin keeps whatever comes."""
    height = int(module._POWERS[-1])
    source = Scripted([3, height, 0, following])  # u = 3 of t = 4
    assert module._candidates(16, 1, source).tolist() == [3 + 4 * block]
    assert source.words == []


def test_a_height_of_zero_goes_beyond_the_table() -> None:
    """64 zeros and a one: some number from e^-45 on."""
    known = EXACT.mpf(2**63 + 1) / EXACT.mpf(2) ** 128
    height, coin = Uniform(0, Scripted([2**63 + 1, 0])), Uniform(2**63, Scripted([]))
    size, _ = module._decide(2**96, 48, 5, height, coin)
    assert size == 5 + (int(EXACT.floor(-EXACT.log(known))) << 48)
    assert size >> 48 == 45


# --- how it is called ---


def test_many_are_drawn_in_little_time() -> None:
    def seconds() -> float:
        begin = time.perf_counter()
        discrete_gaussian(2**48, 300_000, stream("time"))
        return time.perf_counter() - begin

    assert min(seconds() for _ in range(3)) < 1.0


@pytest.mark.parametrize("count", [0, 1, 7, 100_000])
def test_as_many_come_as_are_asked_for_and_no_two_calls_agree(count: int) -> None:
    source = stream("count")
    first, second = (discrete_gaussian(2**92, count, source) for _ in range(2))
    assert first.shape == second.shape == (count,)
    assert first.dtype == np.int64
    assert len(np.intersect1d(first, second)) == 0
    assert len(np.unique(first)) == count


@pytest.mark.parametrize("variance", [0, -1, MAX_VARIANCE + 1])
def test_a_variance_out_of_range_is_refused(variance: int) -> None:
    with pytest.raises(PrivacyError, match=r"expected 1 to 2\^96"):
        discrete_gaussian(variance, 1, stream("refused"))


# --- planted faults ---


@pytest.mark.parametrize("variance", [2, 9, 50])
def test_fault_variance_halved(variance: int) -> None:
    assert fit(discrete_gaussian((variance + 1) // 2, 100_000, stream("halved")), variance) < 1e-9


@pytest.mark.parametrize("variance", [1, 5, 50])
def test_fault_zero_counts_twice(monkeypatch: pytest.MonkeyPatch, variance: int) -> None:
    monkeypatch.setattr(module, "_signed", lambda sizes, negative: np.where(negative, -sizes, sizes))
    assert fit(discrete_gaussian(variance, 100_000, stream("zero")), variance) < 1e-9


@pytest.mark.parametrize("cut", [np.rint, np.trunc, np.floor], ids=["to the nearest", "towards zero", "down"])
@pytest.mark.parametrize("variance", [1, 2, 4])
def test_fault_a_continuous_gaussian_is_rounded(
    cut: Callable[[NDArray[np.float64]], NDArray[np.float64]], variance: int
) -> None:
    draws = cut(stream("rounded").normal(1_000_000) * math.sqrt(variance)).astype(np.int64)
    assert fit(draws, variance) < 1e-9


def test_fault_the_largest_blocks_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A table that ends early: tails are cut."""
    monkeypatch.setattr(module, "_POWERS", module._POWERS[-3:])
    assert fit(discrete_gaussian(4, 100_000, stream("tails")), 4) < 1e-9
