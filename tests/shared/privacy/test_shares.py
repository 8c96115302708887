"""Noise shares: one unit moves the sum of integers by at most C, exactly; shares have their variance; nothing wraps around."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

import shared.privacy.shares as shares_module
from shared.errors import PrivacyError
from shared.limits import MAX_GRAD_NORM, MAX_NOISE_MULTIPLIER, MAX_RECORDS, MAX_SITES, MIN_GRAD_NORM
from shared.privacy.discrete_gaussian import MAX_VARIANCE
from shared.privacy.mechanism import CLIP_MARGIN, ClippedSum
from shared.privacy.persons import Persons, PersonSum
from shared.privacy.randomness import KeyStream, SiteRandomness
from shared.privacy.shares import (
    GRID_STEPS,
    SMOOTHING,
    IntegerSum,
    check_reach,
    check_sizes,
    gradient_of,
    share_variance,
    with_share,
)

SHAPES = [torch.Size([2, 3]), torch.Size([4])]
DIMENSION = 10
NASTY = [0.0, 1.0, -1.0, 1e-45, 1e-38, 1e-20, 1e19, -1e20, 3.4e38, -3.4e38, float("inf"), float("-inf"), float("nan")]
VALUES = st.one_of(st.sampled_from(NASTY), st.floats(width=32))
ROWS = st.lists(st.lists(VALUES, min_size=DIMENSION, max_size=DIMENSION), min_size=1, max_size=6)
BOUNDS = [MIN_GRAD_NORM, 1e-3, 0.1, 1.0, 7.5, 1e4, MAX_GRAD_NORM]


def stream(name: object) -> KeyStream:
    return SiteRandomness.injected(str(name)).stream("noise", round_number=1, step=0)


def parts_of(rows: Tensor) -> list[Tensor]:
    """Cut gradient vectors [n, 10] into one tensor for each of SHAPES."""
    return [rows[:, :6].reshape(-1, 2, 3), rows[:, 6:]]


def integer_sum(rows: Tensor, bound: float, cuts: Sequence[int] = ()) -> IntegerSum:
    total = IntegerSum(SHAPES, bound)
    edges = sorted({0, len(rows), *[cut % (len(rows) + 1) for cut in cuts]})
    for start, stop in pairwise(edges):
        total.add(parts_of(rows[start:stop]))
    return total


def squared_norm(steps: NDArray[np.int64]) -> int:
    """Return the square of a norm in steps of the grid, without rounding."""
    return sum(int(step) ** 2 for step in steps)


# --- sensitivity ---


@settings(max_examples=400, deadline=None, derandomize=True)
@given(
    rows=ROWS,
    bound=st.sampled_from(BOUNDS),
    cuts=st.lists(st.integers(0, 6), max_size=3),
    other_cuts=st.lists(st.integers(0, 6), max_size=3),
    index=st.integers(0, 5),
)
@example(rows=[[3.4e38] * 10, [1.0] * 10], bound=1.0, cuts=[], other_cuts=[], index=0)
@example(rows=[[float("nan")] + [1.0] * 9, [1.0] * 10], bound=1.0, cuts=[1], other_cuts=[], index=0)
def test_one_example_moves_the_total_by_at_most_the_bound(
    rows: list[list[float]], bound: float, cuts: list[int], other_cuts: list[int], index: int
) -> None:
    """Add or remove one example: at most 2^24 steps over all parameters, and by what it is alone, however batches are cut."""
    data = torch.tensor(rows, dtype=torch.float32)
    index %= len(rows)
    everyone = integer_sum(data, bound, cuts)
    without = integer_sum(torch.cat([data[:index], data[index + 1 :]]).flip(0), bound, other_cuts)
    alone = integer_sum(data[index : index + 1], bound)
    assert everyone.total.dtype == np.int64
    assert everyone.total.shape == (DIMENSION,)
    assert np.array_equal(everyone.total - without.total, alone.total)
    assert squared_norm(alone.total) <= GRID_STEPS**2
    assert (everyone.num_examples, everyone.num_non_finite) == (len(rows), int((~data.isfinite().all(dim=1)).sum()))


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e20, 1e37])
def test_the_bound_holds_to_the_last_step_for_many_coordinates(bound: float, size: float) -> None:
    """And is not far away: clipping leaves 1 - 1e-5 of it, cutting half a step of each coordinate on average."""
    total = IntegerSum([torch.Size([100_000])], bound)
    total.add([size * torch.randn(1, 100_000, generator=torch.Generator().manual_seed(0))])
    assert squared_norm(total.total) <= GRID_STEPS**2
    if size >= bound:
        assert squared_norm(total.total) >= (GRID_STEPS * (1 - 2e-5)) ** 2


@pytest.mark.parametrize("bound", [1e-3, 1.0, 0.3])
def test_it_is_the_clipped_sum_cut_towards_zero(bound: float) -> None:
    rows = bound * torch.randn(50, DIMENSION, generator=torch.Generator().manual_seed(0)).mul(
        torch.logspace(-2, 2, 50)[:, None]
    )
    integers, floats = integer_sum(rows, bound, [3, 5]), ClippedSum(SHAPES, bound)
    floats.add(parts_of(rows))
    for count in ("num_examples", "num_clipped", "num_non_finite"):
        assert getattr(integers, count) == getattr(floats, count)
    for mine, theirs in zip(integers.sums, floats.sums, strict=True):
        assert (mine.dtype, mine.shape) == (torch.float64, theirs.shape)
        assert float((mine - theirs).abs().max()) <= 50 * bound / GRID_STEPS
    for row in rows:
        alone, exact = integer_sum(row[None], bound), ClippedSum(SHAPES, bound)
        exact.add(parts_of(row[None]))
        steps = torch.cat([part.flatten() for part in exact.sums]).numpy() / bound * GRID_STEPS
        # The grid of `ClippedSum` is 64 times finer, and rounds.
        assert (np.abs(alone.total) <= np.abs(steps) + 2**-6).all()
        assert (np.abs(alone.total) > np.abs(steps) - 1 - 2**-6).all()


def test_persons_count_with_one_vector_each() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(12, DIMENSION, generator=generator) * torch.logspace(0, 3, 12)[:, None]
    persons = Persons(np.array([0, 1, 2, 0, 1, 0, 3, 3, 3, 0, 0, 0]))
    groups = persons.choose(range(4), 20, stream("persons"))

    def summed(chosen: list[list[int]], cuts: Sequence[int]) -> NDArray[np.int64]:
        total = IntegerSum(SHAPES, 1.0)
        by_person = PersonSum(total, chosen)
        order = [row for group in chosen for row in group]
        for start, stop in pairwise(sorted({0, len(order), *cuts})):
            by_person.add(parts_of(rows[order[start:stop]]), order[start:stop])
        by_person.close()
        return total.total

    everyone = summed(groups, [2, 7])
    for person in range(4):
        alone = summed([groups[person]], [1])
        assert np.array_equal(everyone - summed(groups[:person] + groups[person + 1 :], [4]), alone)
        assert GRID_STEPS**2 // 2 < squared_norm(alone) <= GRID_STEPS**2


def test_an_empty_sample_is_a_sum_of_zeros() -> None:
    total = IntegerSum(SHAPES, 1.0)
    assert total.total.tolist() == [0] * DIMENSION
    assert total.num_examples == 0


# --- shares ---


@pytest.mark.parametrize("sigma", [1e-6, 0.1, 0.7071067811865476, 1.1, math.pi, 1e4])
@pytest.mark.parametrize("steps", [1, 1000, GRID_STEPS])
def test_the_variance_is_rounded_up_exactly(sigma: float, steps: int) -> None:
    exact = (Fraction(sigma) * steps) ** 2
    assert 0 <= share_variance(sigma, steps) - SMOOTHING - exact < 1
    assert SMOOTHING == 16


def test_the_largest_noise_that_a_job_may_ask_for_can_be_drawn() -> None:
    assert share_variance(MAX_NOISE_MULTIPLIER) < MAX_VARIANCE


@pytest.mark.parametrize("sigma", [0.0, -1.0, math.nan, math.inf])
def test_a_share_without_noise_is_refused(sigma: float) -> None:
    with pytest.raises(PrivacyError, match="expected a finite number above 0"):
        share_variance(sigma)


@pytest.mark.parametrize("sigma", [0.05, 1.0, 30.0])
def test_shares_have_their_variance(sigma: float) -> None:
    total = np.arange(200_000, dtype=np.int64) - 100_000
    words = with_share(total, noise_multiplier=sigma, stream=stream(sigma))
    assert words.dtype == np.uint64
    noise = (words.view(np.int64) - total) / (sigma * GRID_STEPS)
    assert stats.kstest(noise, "norm").pvalue > 1e-4
    for factor in (0.98, 1.0, 1.02):
        inside = 1e-4 < stats.chi2.cdf(float((noise**2).sum()) * factor**2, len(noise)) < 1 - 1e-4
        assert inside == (factor == 1.0)
    assert total[0] == -100_000  # the sum itself is left alone


def test_large_sums_are_never_clamped() -> None:
    largest = (1 << 62) - 1
    words = with_share(np.array([largest, -largest]), noise_multiplier=1e-4, stream=stream("large"))
    noise = [(int(word) - sign * largest + 2**63) % 2**64 - 2**63 for word, sign in zip(words, (1, -1), strict=True)]
    assert all(abs(value) < 20_000 for value in noise)


def test_the_sum_of_sites_becomes_one_gradient() -> None:
    rows = torch.randn(30, DIMENSION, generator=torch.Generator().manual_seed(1))
    sums = [integer_sum(rows[start : start + 10], 0.5) for start in (0, 10, 20)]
    words = [with_share(total.total, noise_multiplier=1e-6, stream=stream(site)) for site, total in enumerate(sums)]
    opened = np.zeros(DIMENSION, dtype=np.uint64)
    for part in words:
        opened = opened + part
    found = gradient_of(opened.view(np.int64), SHAPES, max_grad_norm=0.5, expected_batch_size=12.5)
    assert [part.shape for part in found] == SHAPES
    assert all(part.dtype == torch.float32 for part in found)
    expected = ClippedSum(SHAPES, 0.5)
    expected.add(parts_of(rows))
    for mine, theirs in zip(found, expected.sums, strict=True):
        torch.testing.assert_close(mine, (theirs / 12.5).float(), rtol=0, atol=1e-5)


# --- reach ---


def test_a_worst_sum_beyond_the_reach_is_refused() -> None:
    """The message's number is the largest that passes."""
    plan = {"num_sites": 100, "noise_multiplier": 2.0}
    with pytest.raises(PrivacyError, match=r"could pass 2\^62 steps") as refused:
        check_reach(num_units=2**38, **plan)
    most = int(str(refused.value).split("there may be ")[1].split(".")[0].replace(",", ""))
    assert 2**38 - 1000 < most < 2**38
    check_reach(num_units=most, **plan)
    with pytest.raises(PrivacyError):
        check_reach(num_units=most + 1, **plan)


def test_the_reach_is_exact() -> None:
    """Sixteen standard deviations and a bit of noise, on top of one bound for each unit, may be 2^62 and not a step more."""
    whole = 2**38 - 16 * 3
    # Of this share isqrt(variance) is 3 * 2^24 - 1, so that noise is 16 * 3 * 2^24 steps.
    just_below = 3 - 2**-24
    check_reach(num_units=whole, num_sites=1, noise_multiplier=just_below)
    for plan in (
        {"num_units": whole, "noise_multiplier": 3.0},
        {"num_units": whole + 1, "noise_multiplier": just_below},
    ):
        with pytest.raises(PrivacyError, match=r"could pass 2\^62 steps"):
            check_reach(num_sites=1, **plan)


def test_declared_sizes_count_twice() -> None:
    """Each site has fewer than twice what it declares; how they share the units does not matter."""
    share = {"noise_multiplier": 2.0}
    with pytest.raises(PrivacyError) as refused:
        check_sizes([2**37, 2**37 - 1], **share)
    most = int(str(refused.value).split("there may be ")[1].split(".")[0].replace(",", ""))
    check_sizes([most // 2 - 5, 5], **share)
    with pytest.raises(PrivacyError, match="at 2 sites"):
        check_sizes([most // 2 - 4, 5], **share)


def test_noise_alone_may_pass_the_reach() -> None:
    check_reach(num_units=0, num_sites=MAX_SITES, noise_multiplier=MAX_NOISE_MULTIPLIER)
    with pytest.raises(PrivacyError, match="there may be 0"):
        check_reach(num_units=0, num_sites=10**25, noise_multiplier=MAX_NOISE_MULTIPLIER)


def test_a_hundred_of_the_largest_sites_fit() -> None:
    check_reach(num_units=100 * 2 * MAX_RECORDS, num_sites=100, noise_multiplier=10.0)


def test_the_tail_that_the_reach_leaves_out_is_tiny() -> None:
    """Over 1e8 coordinates and 2^24 steps: below 2^-100 (Canonne, Kamath, Steinke 2020, corollary 17)."""
    furthest = shares_module._FURTHEST
    assert math.log2(2 * 1e8 * 2**24) - furthest**2 / 2 / math.log(2) < -100


# --- planted faults ---


@pytest.mark.parametrize(("cut", "sign"), [(torch.round, 1), (torch.ceil, 1), (torch.floor, -1)])
def test_fault_rounding_to_nearest(monkeypatch: pytest.MonkeyPatch, cut: Callable[[Tensor], Tensor], sign: int) -> None:
    """Of so many equal coordinates, each half a step more: beyond the bound, margin included. The tests above would fail."""

    def half(size: int) -> float:
        return abs(CLIP_MARGIN * GRID_STEPS / math.sqrt(size) % 1 - 0.51)

    size = min(range(400_000, 400_100), key=half)
    assert half(size) < 0.01

    def squared() -> int:
        total = IntegerSum([torch.Size([size])], 0.7)
        total.add([torch.full((1, size), sign * 5.0)])
        return squared_norm(total.total)

    assert GRID_STEPS**2 * (1 - 1e-4) < squared() <= GRID_STEPS**2
    monkeypatch.setattr(
        IntegerSum, "_as_added", lambda self, clipped: cut(clipped.mul_(GRID_STEPS / self.max_grad_norm))
    )
    assert squared() > GRID_STEPS**2


def test_fault_the_sum_is_rounded_once() -> None:
    """What a unit adds then depends on the others: it moves the total by more than it is alone."""
    rows = torch.full((2, DIMENSION), 0.6 / GRID_STEPS, dtype=torch.float64)
    both, one = (np.trunc(part.sum(dim=0).numpy() * GRID_STEPS) for part in (rows, rows[:1]))
    assert (both - one != one).all()
    assert np.array_equal(
        integer_sum(rows, 1.0).total - integer_sum(rows[1:], 1.0).total, integer_sum(rows[:1], 1.0).total
    )
