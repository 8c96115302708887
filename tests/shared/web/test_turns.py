"""Requests that wait: how many, how long, and what the others are told."""

from __future__ import annotations

import threading
import time

import pytest

from shared.web.turns import Busy, Places, Turn


def test_none_waits_longer_than_it_may() -> None:
    turn = Turn(places=Places(1), seconds=0.05)
    with turn:
        began = time.monotonic()
        with pytest.raises(Busy) as raised, turn:
            pass
        assert 0.04 < time.monotonic() - began < 5
        assert (raised.value.status, raised.value.key, turn.taken) == (503, "busy", True)
    with turn:
        pass
    assert not turn.taken


def test_few_wait_and_the_others_are_told_at_once() -> None:
    """One computes, two wait and get their turn, all the others hold no thread."""
    places = Places(2)
    turns = Turn(places=places), Turn(places=places)
    told: list[str] = []

    def wait(turn: Turn) -> None:
        try:
            with turn:
                told.append("had a turn")
        except Busy:
            told.append("busy")

    with turns[0], turns[1]:
        threads = [threading.Thread(target=wait, args=(turns[number % 2],)) for number in range(20)]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + 10
        while len(told) < 18 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert told == ["busy"] * 18
    for thread in threads:
        thread.join(10)
    assert told[18:] == ["had a turn"] * 2
