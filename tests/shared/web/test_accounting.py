"""Accounting for pages: one at a time, and nobody who waits for it shuts the others out."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor, wait

import pytest

from shared.web.accounting import accounted
from shared.web.turns import MOST_WAITING, Busy


def test_so_many_wait_for_a_plan_that_takes_long_and_the_others_are_told() -> None:
    """A request that waits holds one of some forty threads: a plan of seconds, and sixty charts, would leave none."""
    begun, done = threading.Event(), threading.Event()

    def last_long() -> str:
        begun.set()
        assert done.wait(20)
        return "long"

    with ThreadPoolExecutor(MOST_WAITING + 9) as asking:
        long = asking.submit(accounted, last_long)
        assert begun.wait(20)
        others = [asking.submit(accounted, lambda: "short") for _ in range(MOST_WAITING + 8)]
        refused = []
        while len(refused) < 8:  # at once, while it still runs
            refused = [one for one in others if one.done()]
        done.set()
        wait(others)
        assert long.result() == "long"
        assert {type(one.exception()) for one in refused} == {Busy}
        assert [one.result() for one in others if one not in refused] == ["short"] * MOST_WAITING


def test_what_is_accounted_may_ask_for_more() -> None:
    assert accounted(lambda: accounted(lambda: "more")) == "more"


def test_what_goes_wrong_is_told_and_lets_the_next_one() -> None:
    with pytest.raises(ZeroDivisionError):
        accounted(lambda: 1 // 0)
    assert accounted(lambda: "next") == "next"
