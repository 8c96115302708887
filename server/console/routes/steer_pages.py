"""Stopping and resuming a run, as `silotune coordinator stop` and `resume` do.

Formal guarantees (tests: tests/server/console/test_steering.py)
    * Who asked stands in the audit log before anything is asked (test_it_is_noted_first).
    * What was asked for on a page of before does nothing (test_a_page_of_before_does_nothing).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

from fastapi import Form
from fastapi.responses import Response

from server.console.content import content_of
from server.console.routes.run_pages import Id, page_of, run_of
from server.console.runs import Run
from shared.errors import RunError, TrustError
from shared.web.asked import Asked, Here, Routes
from shared.web.roles import Action

ROUTES = Routes()

Seen = Annotated[str, Form(max_length=80)]


@ROUTES.page("/runs/{run}/stop", Action.STEER_RUNS, method="POST")
def stop(asked: Here, run: Id, seen: Seen = "") -> Response:
    """Ask the coordinator to stop a run."""
    found = run_of(asked, run)
    if not found.is_open or found.is_stopping:
        return page_of(asked, found, problem=asked.texts("steer.changed"), status=409)
    return _steered(asked, found, "stop", found.submission.request_stop, seen)


@ROUTES.page("/runs/{run}/resume", Action.STEER_RUNS, method="POST")
def resume(asked: Here, run: Id, seen: Seen = "") -> Response:
    """Let a run that was stopped go on."""
    found = run_of(asked, run)
    if found.state != "stopped":
        return page_of(asked, found, problem=asked.texts("steer.changed"), status=409)
    try:
        found.submission.check_resumable()
    except TrustError:
        return page_of(asked, found, problem=asked.texts("steer.expired"), status=409)
    return _steered(asked, found, "resume", found.submission.resume, seen)


def _steered(asked: Asked, run: Run, action: str, do: Callable[[], None], seen: str) -> Response:
    if seen != run.seen:
        return page_of(asked, run, problem=asked.texts("steer.changed"), status=409)
    content_of(asked).record(asked.me().name, action, {"name": run.id, "job": run.job, "address": asked.address})
    try:
        do()
    except RunError:  # it ended meanwhile
        return page_of(asked, run_of(asked, run.id), problem=asked.texts("steer.changed"), status=409)
    return asked.to(f"/runs/{run.id}")
