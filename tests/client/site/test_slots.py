"""Answers leave in slots, whatever they are and however long they took."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Message

from client.app import make_client_app
from client.node.node import answer
from client.site.site import Site
from client.site.slots import Slots
from shared.errors import ConfigError
from shared.job.job import Job
from shared.wire.messages import DESCRIBE, TRAIN, TrainRequest, describe_request, pack_request
from tests.client.node.test_node import message_of


class Clock:
    """Time that passes only by waiting and by work."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.waited: list[float] = []

    def __call__(self) -> float:
        return self.now

    def pause(self, seconds: float) -> None:
        self.waited.append(seconds)
        self.now += seconds


@pytest.mark.parametrize(("work", "leaves"), [(0.0, 10.0), (0.1, 10.0), (9.9, 10.0), (10.0, 10.0), (10.1, 20.0)])
def test_an_answer_leaves_at_the_end_of_a_slot(work: float, leaves: float, caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    slots = Slots(clock=clock, pause=clock.pause)
    with slots.next_after_now(lambda: 10.0):
        clock.now += work
    assert clock.now - 1000.0 == pytest.approx(leaves)
    assert ("took 2 slots of 10 s" in caplog.text) == (leaves > 10)


def test_an_error_waits_for_the_slot_too() -> None:
    clock = Clock()

    def fails() -> None:
        with Slots(clock=clock, pause=clock.pause).next_after_now(lambda: 10.0):
            clock.now += 3
            raise ValueError("x")

    with pytest.raises(ValueError, match="x"):
        fails()
    assert clock.now == 1010.0


def test_without_slots_nothing_waits() -> None:
    clock = Clock()
    with Slots(clock=clock, pause=clock.pause).next_after_now(lambda: 0.0):
        clock.now += 3
    assert clock.waited == []


@pytest.mark.parametrize("outcome", ["update", "refusal", "unreadable", "defect"])
def test_every_kind_of_answer_of_a_site_leaves_at_the_same_time(
    site_home: Callable[..., Path],
    private_job: Callable[..., Job],
    request_for: Callable[..., TrainRequest],
    monkeypatch: pytest.MonkeyPatch,
    outcome: str,
) -> None:
    site, clock = Site(site_home(answers={"slot_seconds": 30.0})), Clock()

    def works(*_: Any) -> Any:
        clock.now += {"refusal": 0.5, "defect": 2.0}.get(outcome, 12.0)
        if outcome == "refusal":
            return site.refuse_unreadable(ConfigError("x"))
        if outcome == "defect":
            raise KeyError("x")
        return Site.answer(site, *_)

    monkeypatch.setattr(site, "answer", works)
    app = make_client_app(lambda context: site, slots=Slots(clock=clock, pause=clock.pause))
    content = describe_request() if outcome == "unreadable" else pack_request(request_for(private_job()))
    reply = answer(app, message_of(TRAIN, content), 1)
    assert reply.has_error() == (outcome == "defect")
    assert clock.now == 1030.0


def test_the_real_clock_keeps_the_slot(site_home: Callable[..., Path]) -> None:
    site = Site(site_home(answers={"slot_seconds": 0.5}))
    app = make_client_app(lambda context: site)
    seconds = []
    for _ in range(3):
        began = time.monotonic()
        reply: Message = app(
            message_of(DESCRIBE, describe_request()),
            Context(run_id=0, node_id=1, node_config={}, state=describe_request(), run_config={}),
        )
        assert reply.has_content()
        seconds.append(time.monotonic() - began)
    assert min(seconds) >= 0.5
    assert min(seconds) < 0.6  # a busy machine may wake one of them late
