"""The adjusted count: exact on exact counts, right on average on sampled ones, where the plain count is not."""

from __future__ import annotations

import numpy as np
import pytest

from shared.tools.monitor.quantification import AdjustedCount, to_simplex

BINARY = [[800, 200], [200, 800]]
THREE = [[70, 20, 10], [5, 90, 5], [20, 20, 60]]


@pytest.mark.parametrize(
    ("confusion", "true"), [(BINARY, [0.95, 0.05]), (BINARY, [0.0, 1.0]), (THREE, [0.2, 0.5, 0.3]), (THREE, [1, 0, 0])]
)
def test_exact_counts_give_the_true_shares(confusion: list[list[int]], true: list[float]) -> None:
    rates = np.array(confusion) / np.sum(confusion, axis=1, keepdims=True)
    predicted = np.round(np.array(true) @ rates * 100_000).astype(int).tolist()
    found = AdjustedCount(confusion)(predicted)
    assert [a.share for a in found] == pytest.approx(true, abs=1e-4)
    assert all(a.low <= a.share <= a.high for a in found)
    if true == [0.95, 0.05]:
        assert predicted[1] / 100_000 == pytest.approx(0.23), "Forman's example: the plain count is far off"


def test_the_interval_covers_the_true_share() -> None:
    """Evaluation records and windows are both drawn anew; 95 % of 400 is 380, five standard errors are 22."""
    random = np.random.default_rng(5)
    rates, true, covered, plain = np.array([[0.8, 0.2], [0.3, 0.7]]), np.array([0.7, 0.3]), 0, 0
    for seed in range(400):
        confusion = [random.multinomial(300, row).tolist() for row in rates]
        counts = random.multinomial(500, true @ rates).tolist()
        found = AdjustedCount(confusion, draws=400, seed=seed)(counts)[1]
        covered += found.low <= true[1] <= found.high
        half = 1.96 * np.sqrt(counts[1] * counts[0] / 500**3)
        plain += abs(counts[1] / 500 - true[1]) <= half
    assert 358 <= covered <= 398
    assert plain < 300


def test_the_same_counts_have_the_same_interval() -> None:
    adjust = AdjustedCount(THREE)
    first = adjust([30, 50, 20])
    adjust([9, 9, 9])
    assert adjust([30, 50, 20]) == first == AdjustedCount(THREE)([30, 50, 20])
    assert AdjustedCount(THREE, seed=1)([30, 50, 20]) != first


def test_a_useless_classifier_has_a_wide_interval() -> None:
    found = AdjustedCount([[50, 50], [49, 51]])([60, 40])
    assert found[0].high - found[0].low > 0.9


def test_many_classes_stay_small() -> None:
    size = 150
    confusion = (np.eye(size, dtype=int) * 20 + 1).tolist()
    adjust = AdjustedCount(confusion)
    assert adjust._inverses.size <= 2_300_000
    assert sum(a.share for a in adjust([1] * size)) == pytest.approx(1)


def test_the_simplex() -> None:
    rows = np.array([[0.2, 0.8], [1.4, -0.4], [0.6, 0.6], [-5.0, -4.0]])
    assert to_simplex(rows) == pytest.approx(np.array([[0.2, 0.8], [1, 0], [0.5, 0.5], [0, 1]]))


@pytest.mark.parametrize("wrong", [[[1, 2], [0, 0]], [[1, 2]], []])
def test_a_class_without_records_is_refused(wrong: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="record of every class"):
        AdjustedCount(wrong)
