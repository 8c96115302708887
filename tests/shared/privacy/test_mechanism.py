"""Sampling, clipping and noise: sensitivity for any gradients and any micro-batches, and exact scales."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from opacus.optimizers import DPOptimizer
from pydantic import ValidationError
from scipy import stats
from torch import Tensor

import shared.privacy.mechanism as mechanism_module
from shared.errors import PrivacyError
from shared.job.privacy import PrivacyConfig
from shared.limits import MAX_GRAD_NORM, MIN_GRAD_NORM
from shared.privacy.mechanism import (
    CLIP_MARGIN,
    ClippedSum,
    PlainSum,
    add_gaussian_noise,
    norms_of_rows,
    per_example_gradients,
    poisson_sample,
)
from shared.privacy.randomness import KeyStream, SiteRandomness

SHAPES = [torch.Size([2, 3]), torch.Size([4])]
DIMENSION = 10
NASTY = [0.0, 1.0, -1.0, 1e-45, 1e-38, 1e-20, 1e19, -1e20, 3.4e38, -3.4e38, float("inf"), float("-inf"), float("nan")]
VALUES = st.one_of(st.sampled_from(NASTY), st.floats(width=32))
ROWS = st.lists(st.lists(VALUES, min_size=DIMENSION, max_size=DIMENSION), min_size=1, max_size=6)


def stream(name: str) -> KeyStream:
    return SiteRandomness.injected(name).stream("noise", round_number=1, step=0)


def parts_of(rows: Tensor) -> list[Tensor]:
    """Cut gradient vectors [n, 10] into one tensor for each of SHAPES."""
    return [rows[:, :6].reshape(-1, 2, 3), rows[:, 6:]]


def clipped_sum(rows: Tensor, bound: float, cuts: list[int] | None = None) -> tuple[Tensor, ClippedSum]:
    total = ClippedSum(SHAPES, bound)
    edges = sorted({0, len(rows), *[cut % (len(rows) + 1) for cut in cuts or []]})
    for start, stop in pairwise(edges):
        total.add(parts_of(rows[start:stop]))
    return torch.cat([part.flatten() for part in total.sums]), total


@settings(max_examples=400, deadline=None, derandomize=True)
@given(
    rows=ROWS,
    bound=st.sampled_from([1e-3, 1.0, 7.5, 1e4]),
    cuts=st.lists(st.integers(0, 6), max_size=3),
    other_cuts=st.lists(st.integers(0, 6), max_size=3),
    index=st.integers(0, 5),
)
@example(rows=[[3.4e38] * 10, [1.0] * 10], bound=1.0, cuts=[], other_cuts=[], index=0)
@example(rows=[[float("nan")] + [1.0] * 9, [1.0] * 10], bound=1.0, cuts=[1], other_cuts=[], index=0)
def test_one_example_moves_the_sum_by_at_most_the_bound(
    rows: list[list[float]], bound: float, cuts: list[int], other_cuts: list[int], index: int
) -> None:
    """Add or remove one example: at most C over all parameters together, however both batches are cut."""
    data = torch.tensor(rows, dtype=torch.float32)
    with_it, total = clipped_sum(data, bound, cuts)
    index %= len(rows)
    without, _ = clipped_sum(torch.cat([data[:index], data[index + 1 :]]), bound, other_cuts)
    assert torch.isfinite(with_it).all()
    assert float((with_it - without).norm()) <= bound
    assert total.num_examples == len(rows)
    assert total.num_non_finite == int((~data.isfinite().all(dim=1)).sum())


def test_long_sums_and_vectors_stay_within_the_bound() -> None:
    """Sizes at which float32 would round by more than the margin: 4 million coordinates, 20,000 equal examples."""
    large = ClippedSum([torch.Size([4_000_000])], 1.0)
    large.add([torch.full((1, 4_000_000), 0.1)])
    assert float(large.sums[0].norm()) <= 1.0
    same = torch.full((20_000, DIMENSION), 0.37)
    everyone, _ = clipped_sum(same, 1.0)
    without, _ = clipped_sum(same[1:], 1.0, [7, 4000])
    assert float((everyone - without).norm()) <= 1.0
    assert float((everyone - without).norm()) == pytest.approx(CLIP_MARGIN, abs=1e-9)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(rows=ROWS, cuts=st.lists(st.integers(0, 6), max_size=4), values=st.sampled_from([1, 2 * DIMENSION, 2**20]))
def test_the_sum_is_the_same_to_the_last_bit_in_any_order_and_cut(
    rows: list[list[float]], cuts: list[int], values: int
) -> None:
    data = torch.tensor(rows, dtype=torch.float32)
    whole, a = clipped_sum(data, 1.5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mechanism_module, "_VALUES_AT_ONCE", values)
        pieces, b = clipped_sum(data.flip(0), 1.5, cuts)
    assert torch.equal(whole, pieces)
    assert (a.num_examples, a.num_clipped, a.num_non_finite) == (b.num_examples, b.num_clipped, b.num_non_finite)


def test_the_others_part_of_a_long_sum_is_the_same_to_the_last_bit() -> None:
    """What an example adds is what it is alone, whatever thousands of others make of the sum before it."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(3_000, DIMENSION, generator=generator) * torch.logspace(-9, 9, 3_000)[:, None]
    everyone, _ = clipped_sum(rows, 0.1, [1, 17, 1_000])
    for row in (0, 1_500, 2_999):
        alone, _ = clipped_sum(rows[row : row + 1], 0.1)
        without, _ = clipped_sum(torch.cat([rows[:row], rows[row + 1 :]]), 0.1, [400])
        assert torch.equal(everyone - without, alone)


@pytest.mark.parametrize(("bound", "unit"), [(1.0, 2.0**-30), (0.75, 2.0**-31), (3.0, 2.0**-29), (1e-3, 2.0**-40)])
def test_the_grid_is_the_power_of_two_below_2_to_the_minus_30_of_the_bound(bound: float, unit: float) -> None:
    total = ClippedSum(SHAPES, bound)
    given = torch.tensor([0.0, 0.49, 0.51, -0.51, 1.49, -7.0, 2.0**20 + 0.3], dtype=torch.float64) * unit
    assert (total.on_grid(given.clone()) / unit).tolist() == [0.0, 0.0, 1.0, -1.0, 1.0, -7.0, 2.0**20]


def test_more_coordinates_than_the_margin_is_for_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PrivacyError, match="100,000,001 trained values are more than the 100,000,000"):
        ClippedSum([torch.Size([10**8]), torch.Size([1])], 1.0)
    monkeypatch.setattr(mechanism_module, "_MOST_COORDINATES", DIMENSION)
    ClippedSum(SHAPES, 1.0)
    with pytest.raises(PrivacyError, match="11 trained values"):
        ClippedSum([*SHAPES, torch.Size([1])], 1.0)


def test_the_grid_is_finer_than_the_margin_at_any_bound() -> None:
    for bound in (1e-6, 0.1, 1.0, 1.9, 1e6):
        total = ClippedSum([torch.Size([100_000])], bound)
        total.add([torch.randn(1, 100_000, generator=torch.Generator().manual_seed(0)) * bound])
        assert CLIP_MARGIN * bound * (1 - 1e-6) <= float(total.sums[0].norm()) <= bound * (1 - 9e-6)


def test_clipping_scales_the_whole_vector_and_leaves_small_ones_alone() -> None:
    rows = torch.tensor([[3.0] + [0.0] * 8 + [4.0], [0.3] + [0.0] * 8 + [0.4]])
    large, _ = clipped_sum(rows[:1], 1.0)
    small, _ = clipped_sum(rows[1:], 1.0)
    torch.testing.assert_close(large, CLIP_MARGIN * rows[0].double() / 5, rtol=0, atol=2**-31)
    torch.testing.assert_close(small, rows[1].double(), rtol=0, atol=2**-31)
    both, total = clipped_sum(rows, 1.0)
    assert torch.equal(both, large + small)
    assert (total.num_examples, total.num_clipped, total.num_non_finite) == (2, 1, 0)


def test_a_micro_batch_without_examples_adds_nothing() -> None:
    total = ClippedSum([torch.Size([2, 3])], 1.0)
    total.add([torch.zeros(0, 2, 3)])
    assert (total.num_examples, total.num_clipped, total.num_non_finite) == (0, 0, 0)
    assert torch.equal(total.sums[0], torch.zeros(2, 3, dtype=torch.float64))
    norms = norms_of_rows(torch.zeros(0, 6, dtype=torch.float64))
    assert (norms.shape, norms.dtype) == ((0,), torch.float64)


def test_an_example_that_is_not_finite_counts_and_contributes_nothing() -> None:
    rows = torch.ones(3, DIMENSION)
    rows[0, 2], rows[1, 9] = float("nan"), float("-inf")
    with_them, total = clipped_sum(rows, 1.0)
    without, _ = clipped_sum(rows[2:], 1.0)
    assert torch.equal(with_them, without)
    assert (total.num_examples, total.num_non_finite, total.num_clipped) == (3, 2, 1)


def test_agrees_with_opacus_without_noise() -> None:
    """DPOptimizer.clip_and_accumulate of Opacus on the same per-example gradients."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(50, DIMENSION, generator=generator) * torch.logspace(-2, 2, 50)[:, None]
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in SHAPES]
    optimizer = DPOptimizer(
        torch.optim.SGD(parameters, lr=1.0),
        noise_multiplier=0.0,
        max_grad_norm=0.7,
        expected_batch_size=50,
        loss_reduction="sum",
    )
    for parameter, part in zip(parameters, parts_of(rows), strict=True):
        parameter.grad_sample = part.clone()
    optimizer.clip_and_accumulate()
    theirs = torch.cat([parameter.summed_grad.flatten() for parameter in parameters]).double()
    ours, total = clipped_sum(rows, 0.7, [11, 30])
    # They divide by norm + 1e-6, we keep a margin of 1e-5: each of 50 rows may differ by that much of 0.7.
    assert float((ours - theirs).norm()) <= 50 * 0.7 * 2e-5
    assert 5 < total.num_clipped < 45


def test_plain_sum_does_not_clip() -> None:
    total = PlainSum(SHAPES)
    rows = torch.full((3, DIMENSION), 1e6)
    total.add(parts_of(rows))
    torch.testing.assert_close(torch.cat([p.flatten() for p in total.sums]), rows.double().sum(dim=0))


def test_noise_has_the_given_deviation_everywhere() -> None:
    std = 0.37
    sums = [torch.full((300, 200), 5.0, dtype=torch.float64), torch.full((40_001,), -3.0, dtype=torch.float64)]
    noisy = add_gaussian_noise(sums, std, stream("noise"))
    assert [part.shape for part in noisy] == [part.shape for part in sums]
    assert all(part.dtype == torch.float64 for part in noisy)
    for before, after in zip(sums, noisy, strict=True):
        noise = (after - before).flatten().numpy() / std
        assert stats.kstest(noise, "norm").pvalue > 1e-4
        statistic = float((noise**2).sum())
        assert 1e-4 < stats.chi2.cdf(statistic, noise.size) < 1 - 1e-4
        for wrong in (0.96, 1.04):  # four percent less or more is told apart
            assert not 1e-4 < stats.chi2.cdf(statistic * wrong**2, noise.size) < 1 - 1e-4
    assert float(sums[0].mean()) == 5.0  # the input is left alone
    joint = torch.cat([(after - before).flatten() for before, after in zip(sums, noisy, strict=True)])
    assert len(joint.unique()) == len(joint)  # no value is used twice


def test_noise_is_the_stream_added_in_the_order_of_the_parameters() -> None:
    sums = [torch.full(shape, 5.0, dtype=torch.float64) for shape in SHAPES]
    noisy = torch.cat([part.flatten() for part in add_gaussian_noise(sums, 0.5, stream("order"))])
    assert torch.equal(noisy, 5.0 + 0.5 * torch.from_numpy(stream("order").normal(DIMENSION)))


def test_a_gradient_as_long_as_the_bound_is_not_counted_as_clipped() -> None:
    rows = torch.zeros(2, DIMENSION)
    rows[0, 1], rows[1, 7] = 2.0, 2.0000002
    _, total = clipped_sum(rows, 2.0)
    assert (total.num_clipped, type(total.num_clipped), type(total.num_non_finite)) == (1, int, int)


def test_poisson_sample_gives_every_record_its_own_coin() -> None:
    num, rate, repeats = 200, 0.15, 1000
    source = SiteRandomness.injected("sample")
    masks = np.zeros((repeats, num), dtype=bool)
    for step in range(repeats):
        chosen = poisson_sample(num, rate, source.stream("sampling", round_number=1, step=step))
        assert (np.diff(chosen) > 0).all()
        masks[step, chosen] = True
    assert stats.binomtest(int(masks.sum()), masks.size, rate).pvalue > 1e-4
    assert stats.binomtest(int(masks.sum()), masks.size, rate * 1.05).pvalue < 1e-4
    variance = num * rate * (1 - rate)
    for counts, trials in ((masks.sum(axis=1), num), (masks.sum(axis=0), repeats)):
        statistic = ((counts - trials * rate) ** 2).sum() / (trials * rate * (1 - rate))
        assert 1e-4 < stats.chi2.cdf(statistic, len(counts)) < 1 - 1e-4
    assert masks.sum(axis=1).var() > variance / 2  # a fixed batch size has none
    assert poisson_sample(0, rate, stream("none")).size == 0
    assert poisson_sample(5, 1.0, stream("all")).tolist() == [0, 1, 2, 3, 4]


def test_per_example_gradients_are_taken_and_cleared() -> None:
    parameter = torch.nn.Parameter(torch.zeros(3))
    parameter.grad_sample, parameter.grad = torch.ones(2, 3), torch.ones(3)
    (taken,) = per_example_gradients([parameter], 2)
    assert torch.equal(taken, torch.ones(2, 3))
    assert parameter.grad_sample is None
    assert parameter.grad is None


@pytest.mark.parametrize(
    ("gradient", "found"),
    [(None, "none"), (torch.ones(3), r"\(3,\)"), (torch.ones(1, 3), r"\(1, 3\)"), ([torch.ones(2, 3)] * 2, "list")],
)
def test_a_gradient_that_would_escape_clipping_is_refused(gradient: object, found: str) -> None:
    parameter = SimpleNamespace(grad_sample=gradient, shape=torch.Size([3]), grad=None)
    with pytest.raises(PrivacyError, match=f"per-example gradient {found}, expected shape"):
        per_example_gradients([parameter], 2)


@pytest.mark.parametrize("bound", [MIN_GRAD_NORM, MAX_GRAD_NORM])
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e20, 1e37])
def test_no_vector_is_longer_than_any_bound_that_a_job_may_ask_for(bound: float, size: float) -> None:
    """At 1e-314, where numbers have few digits left, it was 1.002 times as long."""
    total = ClippedSum([torch.Size([100])], bound)
    total.add([size * torch.randn(1, 100, generator=torch.Generator().manual_seed(0))])
    assert float((total.sums[0] / bound).norm()) <= 1.0


@pytest.mark.parametrize("bound", [MIN_GRAD_NORM, 8e-12, MAX_GRAD_NORM])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 100_000])
def test_nor_is_one_of_the_largest_gradients_there_are(bound: float, dtype: torch.dtype, size: int) -> None:
    """Of float64 gradients of 1.7e308 it was, at 8e-12, 1.00002 times as long: none are computed in float64."""
    total = ClippedSum([torch.Size([size])], bound)
    total.add([torch.full((1, size), torch.finfo(dtype).max, dtype=dtype)])
    assert 1 - 2e-5 < float((total.sums[0] / bound).norm()) <= 1.0


@pytest.mark.parametrize("bound", [1e-314, 1e-13, 1e13])
def test_a_job_cannot_ask_for_another_bound(bound: float) -> None:
    with pytest.raises(ValidationError, match="max_grad_norm"):
        PrivacyConfig(max_grad_norm=bound)
