"""What the Grid of a run remembers of it; with a link beneath it: tests/integration/link/test_link.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from flwr.app import ConfigRecord, RecordDict

import server.link.grid as grid_module
from server.link.grid import LinkGrid
from server.link.mailroom import KEPT_SECONDS, Mailroom


class HereServer:
    """A link whose thread is the caller's."""

    def __init__(self) -> None:
        self.mailroom = Mailroom(clock=lambda: grid_module.time.monotonic())

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return function(*arguments)


def test_what_is_never_answered_is_forgotten_in_the_middle_of_a_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """A job of thousands of rounds with a site that never answers must not grow."""
    now = [1000.0]
    monkeypatch.setattr(grid_module.time, "monotonic", lambda: now[0])
    server: Any = HereServer()
    grid = LinkGrid(server, 1)
    content = RecordDict({"x": ConfigRecord({"y": 1})})
    for number in range(50):
        grid.push_messages([grid.create_message(content, "train", 7, str(number), 60.0)])
        now[0] += KEPT_SECONDS / 10
        server.mailroom.tick()
    assert len(grid._open) <= 21
    open_now = dict(grid._open)
    assert grid.pull_messages(open_now), "and what is young enough is still answered"
    grid.close()
    assert not grid._open
    assert not server.mailroom._answers
