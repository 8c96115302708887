"""When an approval holds although something moved since its person read the request."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest

from client.approval.facts import BudgetLine
from client.approval.grounds import Grounds, Part, moved_told, told_against

PARTS: dict[Part, str] = {"request": "r", "validity": "in time", "policy": "p", "settings": "s", "compared": ""}
LINE = BudgetLine(promise="together", spent=1.0, after=4.9375, cap=8.0)
SHOWN = Grounds(parts=PARTS, budget=(LINE, replace(LINE, promise="alone")))


def now(**changed: Any) -> Grounds:
    """Return what is so now: the first cap with other figures."""
    return replace(SHOWN, budget=(replace(LINE, **changed), *SHOWN.budget[1:]))


def test_what_did_not_move_holds() -> None:
    assert SHOWN.against(now()) == []
    assert SHOWN.moved(now()) == {}


def test_a_figure_may_move_below_its_cap() -> None:
    for changed in ({"spent": 3.0, "after": 7.9}, {"spent": 0.5, "after": 4.0}, {"after": 8.0}):
        assert SHOWN.against(now(**changed)) == [], changed


def test_what_moved_is_told_with_what_was_shown() -> None:
    moved = SHOWN.moved(now(spent=1.5, after=5.0625))
    assert moved == {"together": {"shown": {"spent": 1.0, "after": 4.9375}, "now": {"spent": 1.5, "after": 5.0625}}}
    assert moved_told(moved) == [
        "a round was charged meanwhile: once this job has run, 5.0625 is spent, not 4.9375",
    ]
    endless = now(after=math.inf).moved(now())
    assert json.loads(json.dumps(endless, allow_nan=False))["together"]["shown"]["after"] is None


@pytest.mark.parametrize("after", [8.0000001, math.inf, math.nan])
def test_a_verdict_that_turned_is_told(after: float) -> None:
    (found,) = SHOWN.against(now(after=after))
    assert (found.what, found.promise, found.before) == ("budget", "together", "4.9375")
    assert "not 4.9375" in told_against([found])


def test_what_was_overrun_when_it_was_shown_may_not_be_worse() -> None:
    shown = now(after=9.0)
    assert shown.against(now(after=9.0)) == []
    assert shown.against(now(after=8.5)) == []
    assert [one.now for one in shown.against(now(after=9.125))] == ["9.1250"]


def test_what_is_no_figure_has_to_be_the_same() -> None:
    for part in PARTS:
        (found,) = SHOWN.against(replace(SHOWN, parts={**PARTS, part: "another"}))
        assert found.what == part
        assert told_against([found])
    for cap in (7.0, 9.0):
        assert len(SHOWN.against(now(cap=cap))) == 1, "another cap is another budget"
    assert len(SHOWN.against(replace(SHOWN, budget=()))) == 1, "what cannot be told any more"
    assert len(replace(SHOWN, budget=()).against(SHOWN)) == 1, "what could not be told before"
