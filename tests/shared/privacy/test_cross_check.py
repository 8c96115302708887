"""The second opinion: a number, or a reason; never an exception, never a long wait."""

from __future__ import annotations

import time

import pytest

from shared.privacy import cross_check
from shared.privacy.accounting import GaussianSteps, compose_epsilon
from shared.privacy.cross_check import prv_cross_check


def steps(sigma: float, rate: float, num: int) -> GaussianSteps:
    return GaussianSteps(noise_multiplier=sigma, sample_rate=rate, steps=num)


def test_it_agrees_where_it_answers() -> None:
    found = prv_cross_check([steps(1.0, 0.05, 40), steps(10.0, 1.0, 3)], 1e-5)
    assert found.reason is None
    assert found.epsilon == pytest.approx(compose_epsilon([steps(1.0, 0.05, 40), steps(10.0, 1.0, 3)], 1e-5), abs=0.03)


@pytest.mark.parametrize(
    ("event", "delta", "words"),
    [
        (steps(0.5, 0.05, 10), 1e-14, "rounding"),
        (steps(0.2, 0.05, 500), 1e-5, "too large"),  # once 13 seconds and a gigabyte
        (steps(0.2, 1.0, 1 << 24), 1e-5, ""),
        (steps(1e-6, 1.0, 10), 1e-5, ""),
        (steps(1e4, 1e-9, 1), 1e-30, ""),
    ],
)
def test_it_gives_a_reason_at_once(event: GaussianSteps, delta: float, words: str) -> None:
    started = time.process_time()
    found = prv_cross_check([event], delta)
    assert time.process_time() - started < 10
    assert (found.epsilon is None) == (found.reason is not None)
    if words:
        assert found.epsilon is None
        assert words in (found.reason or "")


def test_whatever_fails_inside_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise MemoryError("5 GB")

    monkeypatch.setattr(cross_check, "_computed", fail)
    found = prv_cross_check([steps(1.0, 0.1, 17)], 1e-5)
    assert found.epsilon is None
    assert "MemoryError" in (found.reason or "")
