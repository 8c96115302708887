"""Sums on a grid against exact fractions, in every order."""

from __future__ import annotations

import random
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import shared.tensors.grid_sum as grid_sum_module
from shared.tensors.grid_sum import GridSum

REACH = 100.0
terms = st.lists(
    st.tuples(
        st.floats(-1, 1) | st.sampled_from([1.0, 0.5, 2.0**-9]),
        st.lists(st.floats(-10, 10, width=32), min_size=3, max_size=3),
    ),
    min_size=1,
    max_size=10,
)


def add(total: GridSum, term: dict[str, torch.Tensor], factor: float = 1.0) -> None:
    total.stage(term)
    total.add(factor)


def total_of(some: list[tuple[float, list[float]]], *, towards_zero: bool) -> list[float]:
    total = GridSum({"a": torch.Size([2]), "b": torch.Size([])}, reach=REACH, towards_zero=towards_zero)
    for factor, (x, y, z) in some:
        add(total, {"b": torch.tensor(z), "a": torch.tensor([x, y])}, factor)
    parts = total.total()
    return [*parts["a"].tolist(), float(parts["b"])]


@given(terms=terms, order=st.randoms(use_true_random=False), towards_zero=st.booleans())
def test_the_order_changes_no_bit_and_the_error_is_bounded(
    terms: list[tuple[float, list[float]]], order: random.Random, towards_zero: bool
) -> None:
    found = total_of(terms, towards_zero=towards_zero)
    assert total_of(order.sample(terms, len(terms)), towards_zero=towards_zero) == found
    step = Fraction(GridSum({}, reach=REACH).step)
    for place, value in enumerate(found):
        assert Fraction(value) % step == 0
        products = [Fraction(factor) * Fraction(numbers[place]) for factor, numbers in terms]
        from_grid = len(terms) * step / (1 if towards_zero else 2)
        assert abs(Fraction(value) - sum(products)) <= from_grid + Fraction(2.0**-52) * sum(map(abs, products))


@given(st.floats(-REACH, REACH))
def test_cutting_towards_zero_makes_nothing_longer(value: float) -> None:
    total = GridSum({"x": torch.Size([1])}, reach=REACH, towards_zero=True, dtype=np.float64)
    add(total, {"x": torch.tensor([value], dtype=torch.float64)})
    assert abs(float(total.total()["x"])) <= abs(value)


@pytest.mark.parametrize(
    ("reach", "step"), [(4096.0, 2.0**-40), (4097.0, 2.0**-39), (0.75, 2.0**-52), (1e-7, 2.0**-75)]
)
def test_the_step_is_the_finest_on_which_the_reach_is_exact(reach: float, step: float) -> None:
    total = GridSum({"x": torch.Size([1])}, reach=reach, dtype=np.float64)
    assert total.step == step
    for sign in (1.0, -1.0, 1.0):
        add(total, {"x": torch.tensor([reach], dtype=torch.float64)}, sign)
        add(total, {"x": torch.tensor([step], dtype=torch.float64)})
    assert float(total.total()["x"]) == round(reach / step) * step + 3 * step


def test_blocks_and_layout_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randn(60, 7, generator=torch.Generator().manual_seed(0))
    totals = []
    for block in (1 << 15, 13):
        monkeypatch.setattr(grid_sum_module, "_BLOCK", block)
        for layout in (values, values.T.contiguous().T):
            total = GridSum({"x": values.shape}, reach=REACH)
            add(total, {"x": layout}, 0.3)
            totals.append(total.total()["x"])
    assert all(torch.equal(total, totals[0]) for total in totals)
    assert torch.allclose(totals[0], values.double() * 0.3, atol=1e-12)


def test_a_term_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match="'x' has 3 numbers, expected 2"):
        GridSum({"x": torch.Size([2])}, reach=1.0).stage({"x": torch.zeros(3)})
