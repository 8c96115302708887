"""The second opinion: a number, or a reason; never an exception, never a long wait."""

from __future__ import annotations

import logging
import math
import time
from types import SimpleNamespace

import pytest
from opacus.accountants import PRVAccountant

from shared.privacy.accountant import cross_check
from shared.privacy.accountant.cross_check import prv_cross_check
from shared.privacy.accounting import GaussianSteps, compose_epsilon


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
    assert found.reason == "The PRV accountant failed (MemoryError)."


def test_the_grid_is_found_once_and_is_what_the_accountant_alone_would_find(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = PRVAccountant()
    alone.history = [(1.0, 0.1, 11), (2.0, 0.1, 5)]
    expected = float(alone.get_epsilon(delta=1e-5))
    found: list[object] = []
    real = PRVAccountant._get_domain

    def counted(self: PRVAccountant, **options: object) -> object:
        found.append(options)
        return real(self, **options)

    monkeypatch.setattr(PRVAccountant, "_get_domain", counted)
    assert cross_check._computed((steps(1.0, 0.1, 11), steps(2.0, 0.1, 5)), 1e-5).epsilon == expected
    assert len(found) == 1


def test_nothing_costs_nothing() -> None:
    assert prv_cross_check([], 1e-5).epsilon == prv_cross_check([steps(1.0, 0.1, 0)], 1e-5).epsilon == 0.0
    assert prv_cross_check([steps(1.0, 0.1, 9), steps(0.3, 0.1, 0)], 1e-5) == prv_cross_check(
        [steps(1.0, 0.1, 9)], 1e-5
    )


def test_the_grid_has_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the edge of each; grid and answer of the other accountant are set, since none of its own lies just there."""
    asked: dict[str, object] = {}
    answer = {"size": 1 << 19, "epsilon": 1.5}

    def domain(self: PRVAccountant, **options: object) -> SimpleNamespace:
        asked.update(options)
        return SimpleNamespace(size=answer["size"])

    monkeypatch.setattr(PRVAccountant, "_get_domain", domain)
    monkeypatch.setattr(PRVAccountant, "get_epsilon", lambda self, delta: answer["epsilon"])
    logging.getLogger("opacus").setLevel(logging.INFO)
    two = (steps(1.0, 0.1, 9), steps(2.0, 0.1, 5))
    assert cross_check._computed(two, 1e-5).epsilon == 1.5
    assert (asked["eps_error"], asked["num_self_compositions"]) == (0.01, [9, 5])
    assert asked["delta_error"] == pytest.approx(1e-8, rel=1e-12, abs=0)
    assert logging.getLogger("opacus").level == logging.ERROR
    answer["size"] += 1
    assert cross_check._computed(two, 1e-5).reason == (
        "The PRV accountant would need a grid too large for a cross-check."
    )
    assert cross_check._computed(two[:1], 1e-5).epsilon == 1.5
    rounding = 2.0**-52 * answer["size"]
    assert cross_check._computed(two[:1], rounding / 0.9985).epsilon == 1.5
    just = rounding / (1 - 1e-3)
    assert just * (1 - 1e-3) == rounding
    assert cross_check._computed(two[:1], just).epsilon == 1.5
    found = cross_check._computed(two[:1], rounding)
    assert found.reason == "At delta 1.16416e-10 the PRV accountant would be ruled by its own rounding."
    answer["epsilon"] = math.inf
    assert cross_check._computed(two[:1], 1e-5).reason == "The PRV accountant found no finite bound."
