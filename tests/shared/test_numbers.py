"""Text is a number only if it reads as one; Python's own readers take more."""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction

import pytest

from shared.numbers import read_number, read_whole


@pytest.mark.parametrize(
    ("value", "number"),
    [
        ("13", 13),
        (" -1.5e3\n", -1500),
        ("+.5", 0.5),
        ("2.", 2),
        ("１３", 13),
        (7, 7),
        (Decimal("0.25"), 0.25),
        (Fraction(1, 4), 0.25),
    ],
)
def test_numbers(value: object, number: float) -> None:
    assert read_number(value) == number


@pytest.mark.parametrize(
    "value",
    [
        *("1_3", "1 3", "1,3", "", "nan", "inf", "-Infinity", "1e999", "0x10", "1e", "."),
        *(True, None, b"13", [1], 10**400, float("nan"), float("inf"), 1j),
    ],
)
def test_no_numbers(value: object) -> None:
    with pytest.raises(ValueError, match="no number") as caught:
        read_number(value)
    assert "1" not in str(caught.value)


def test_whole_numbers() -> None:
    assert [read_whole(text) for text in ("7", " -12 ", "+3")] == [7, -12, 3]
    for text in ("1_000", "1.0", "", "a", "9" * 5000):
        with pytest.raises(ValueError, match=r"whole number|digits"):
            read_whole(text)
