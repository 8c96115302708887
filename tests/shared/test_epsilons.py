"""Every printed epsilon rounds up, and there is one place that prints one."""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.epsilons import (
    as_set,
    bound_rounded_down,
    delta_rounded_up,
    noise_rounded_down,
    rate_rounded_up,
    rounded_up,
    rounded_up_short,
)
from simulations.audit.commands import result_table
from simulations.audit.result import AuditResult

ROOT = Path(__file__).parents[2]
AN_EPSILON = re.compile(r"epsilon|spent|claim|\bcap\b")
OF_THE_MECHANISM = re.compile(r"noise_multiplier|sample_rate|max_grad_norm|count_noise|\bsigma\b|\bdelta$|\brate\b")


@given(st.floats(0, 1e4), st.integers(0, 8))
def test_no_epsilon_is_printed_below_its_value(epsilon: float, decimals: int) -> None:
    text = rounded_up(epsilon, decimals)
    assert 0 <= Fraction(text) - Fraction(epsilon) < Fraction(1, 10**decimals)
    assert Fraction(rounded_up_short(epsilon)) >= Fraction(epsilon)
    assert float(as_set(epsilon)) == pytest.approx(epsilon, rel=1e-14)


def test_examples() -> None:
    assert [rounded_up(e) for e in (0.0, 1e-12, 3.0, 7.9999999, 8.0000000001)] == [
        "0.000",
        "0.001",
        "3.000",
        "8.000",
        "8.001",
    ]
    assert [rounded_up_short(e) for e in (0.0, 0.0123, 2.341)] == ["0.00", "0.013", "2.35"]
    assert [as_set(e) for e in (8.0, 0.3, 1234567.0)] == ["8", "0.3", "1234567"]
    assert rounded_up(math.inf) == rounded_up(math.nan) == rounded_up_short(math.nan) == "unbounded"
    assert [rounded_up(-0.0), rounded_up(-1e-9), rounded_up_short(-0.0)] == ["0.000", "0.000", "0.00"]
    assert rounded_up(np.float32(1.25)) == "1.250"  # type: ignore[arg-type]


@given(st.floats(1e-30, 0.999), st.integers(2, 8))
def test_no_delta_of_a_guarantee_is_printed_below_its_value(delta: float, digits: int) -> None:
    text = delta_rounded_up(delta, digits)
    assert Fraction(repr(delta)) <= Fraction(text) <= Fraction(repr(delta)) * (1 + Fraction(1, 10 ** (digits - 1)))


def test_a_delta_that_somebody_chose_is_printed_as_it_was_chosen() -> None:
    assert [delta_rounded_up(d) for d in (1e-5, 5e-6, 1.25e-12, 1e-30, 0.05)] == [
        "1e-05",
        "5e-06",
        "1.25e-12",
        "1e-30",
        "0.05",
    ]
    # The default for 300,000 records: 3.33333e-07 is below it, and there the stated epsilon does not hold.
    assert delta_rounded_up(1 / 3_000_000) == "3.33334e-07"
    assert delta_rounded_up(1 / 300_000, 3) == "3.34e-06"


@given(st.floats(1e-9, 1), st.integers(2, 8))
def test_no_sampling_rate_is_printed_below_its_value(rate: float, digits: int) -> None:
    text = rate_rounded_up(rate, digits)
    assert Fraction(repr(rate)) <= Fraction(text) <= Fraction(repr(rate)) * (1 + Fraction(1, 10 ** (digits - 1)))


@given(st.floats(0.2, 1e4), st.integers(0, 8))
def test_no_noise_is_printed_above_its_value(noise: float, decimals: int) -> None:
    text = noise_rounded_down(noise, decimals)
    assert 0 <= Fraction(repr(noise)) - Fraction(text) < Fraction(1, 10**decimals)


def test_noise_and_rates_that_somebody_chose_are_printed_as_they_were_chosen() -> None:
    assert [noise_rounded_down(n) for n in (1.0, 0.3, 1.1, 0.81239, 4.10996)] == [
        "1.0000",
        "0.3000",
        "1.1000",
        "0.8123",
        "4.1099",
    ]
    assert noise_rounded_down(math.inf) == noise_rounded_down(math.nan) == "unknown"
    assert [rate_rounded_up(r) for r in (0.05, 1.0, 1 / 3, 2 / 3, 1e-9)] == [
        "0.05",
        "1",
        "0.333334",
        "0.666667",
        "1e-09",
    ]


def _shown_numbers() -> Iterator[tuple[str, str]]:
    """Yield (place, expression) for every f-string with a format, and every `round`, in the code."""
    for path in (
        p for folder in ("shared", "client", "server", "simulations", "cli") for p in (ROOT / folder).rglob("*.py")
    ):
        if path.name == "epsilons.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            formatted = (
                isinstance(node, ast.FormattedValue) and node.format_spec is not None and ast.unparse(node.value)
            )
            rounded = isinstance(node, ast.Call) and ast.unparse(node.func) == "round" and ast.unparse(node)
            if text := formatted or rounded:
                yield f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}", text


def test_nothing_else_in_the_code_formats_an_epsilon() -> None:
    """No f-string with a format, and no `round`, takes one: these round down half of the time."""
    found = [
        f"{place}: {text}"
        for place, text in _shown_numbers()
        if AN_EPSILON.search(text) and "delta" not in text.split(".")[-1]
    ]
    assert not [line for line in found if "lower_bound" not in line]  # a lower bound is no promise


def test_nothing_else_in_the_code_formats_what_an_epsilon_was_computed_from() -> None:
    """To the nearest is half of the time more noise, or a smaller rate, than was executed."""
    found = [
        f"{place}: {text}"
        for place, text in _shown_numbers()
        if OF_THE_MECHANISM.search(text) and not text.startswith("round(")  # numbers of steps and records
    ]
    assert found == []


@pytest.mark.parametrize(
    ("bound", "shown"), [(1.6888, "1.688"), (2.0, "2.000"), (0.0, "0.000"), (math.inf, "unbounded")]
)
def test_bounds_of_an_audit_are_never_above_their_value(bound: float, shown: str) -> None:
    assert bound_rounded_down(bound) == shown


def test_an_audits_table_rounds_away_from_comfort() -> None:
    """The claim up, what was found down."""
    result = AuditResult(
        tier=1, claim=2.9991, lower_bound=1.6888, ceiling=5.0999, delta=1e-5, alpha=1e-3, verdict="consistent",
        audited="x", reasons=(), details={},
    )  # fmt: skip
    assert [next(iter(column.cells)) for column in result_table(result).columns[:3]] == ["3.000", "1.688", "5.099"]
