"""The pages about runs: all of them, one of them live, and how they compare."""

from __future__ import annotations

import hashlib
import logging
from typing import Annotated, Any

from fastapi import Path, Query
from fastapi.responses import JSONResponse, Response

from server.console.content import CoordinatorContent, content_of
from server.console.run_sites import sites_of
from server.console.runs import Curves, Run, mark_of, matching
from server.console.said import Told
from shared.errors import SilotuneError
from shared.web.asked import Asked, Denied, Here, Routes
from shared.web.roles import Action, allowed

log = logging.getLogger("silotune.console")

ROUTES = Routes()

A_PAGE = 50
STATES = ("submitted", "running", "completed", "stopped", "failed", "damaged")
EPSILON = "epsilon"
"""As a curve, beside the names of metrics."""

Search = Annotated[str, Query(alias="q", max_length=100)]
State = Annotated[str, Query(max_length=20)]
Number = Annotated[int, Query(ge=1, le=2**31)]
Id = Annotated[str, Path(max_length=100)]
Since = Annotated[str, Query(max_length=100)]
Metric = Annotated[str, Query(max_length=60)]


@ROUTES.page("/runs", Action.SEE_RUNS)
def runs(asked: Here, search: Search = "", state: State = "", page: Number = 1) -> Response:
    """Show all runs."""
    return asked.page("runs.html", **_listed(asked, search, state, page))


@ROUTES.page("/runs/listed", Action.SEE_RUNS)
def listed(asked: Here, search: Search = "", state: State = "", page: Number = 1) -> Response:
    """Show the table of all runs; a part of the page, which follows what happens."""
    template = "runs-listed.html" if asked.is_fragment else "runs.html"
    return asked.page(template, **_listed(asked, search, state, page))


@ROUTES.page("/runs/events", Action.SEE_RUNS)
def all_events(asked: Here, since: Since = "") -> Response:
    """Say when the list changes."""
    content = content_of(asked)

    def mark() -> str:
        return _mark_of_all(content.said.now(), content.runs.all())

    return content.streams.answer(asked, Action.SEE_RUNS, mark, since=since)


@ROUTES.page("/runs/{run}", Action.SEE_RUNS)
def one_run(asked: Here, run: Id) -> Response:
    """Show a run."""
    return page_of(asked, run_of(asked, run))


@ROUTES.page("/runs/{run}/live", Action.SEE_RUNS)
def live(asked: Here, run: Id, seen: Since = "") -> Response:
    """Show what changes of a run; a part of its page, with what can be asked of it if that is not as it was `seen`."""
    found = run_of(asked, run)
    if not asked.is_fragment:
        return page_of(asked, found)
    may_steer = allowed(asked.me().role, Action.STEER_RUNS)
    return asked.page("run-live-part.html", seen=seen, may_steer=may_steer, **_live(asked, found))


@ROUTES.page("/runs/{run}/curves", Action.SEE_RUNS)
def curves_of(asked: Here, run: Id) -> Response:
    """Show the places of the curves, once there are any; a part of its page."""
    found = run_of(asked, run)
    return asked.page("run-curves.html", **_live(asked, found)) if asked.is_fragment else page_of(asked, found)


@ROUTES.page("/runs/{run}/events", Action.SEE_RUNS)
def events(asked: Here, run: Id, since: Since = "") -> Response:
    """Say when a run changes."""
    content, found = content_of(asked), run_of(asked, run)

    def mark() -> str:
        now = content.runs.find(found.id)
        return "gone" if now is None else _mark(content, now)

    return content.streams.answer(asked, Action.SEE_RUNS, mark, since=since)


@ROUTES.page("/runs/{run}/curve.json", Action.SEE_RUNS)
def curve(asked: Here, run: Id, metric: Metric = "") -> Response:
    """Return how a run's metric went from round to round, for a chart."""
    found = run_of(asked, run)
    curves = _curves(content_of(asked), found)
    values = curves.epsilon if metric == EPSILON else curves.metrics.get(metric)
    if values is None:
        raise Denied(404, "missing")
    return JSONResponse(chart(asked, metric, curves.rounds, [(found.id, values)]))


@ROUTES.page("/runs/{run}/promises", Action.SEE_RUNS)
def promises(asked: Here, run: Id) -> Response:
    """Show what a run promises; a part of its page that comes later, as it takes a moment."""
    content, found = content_of(asked), run_of(asked, run)
    try:
        promised, is_told = content.planner.of(found.submission.signed_job().job), True
    except SilotuneError as error:
        log.warning("what %s promises cannot be told: %s", found.id, error)
        promised, is_told = None, False
    template = "promises.html" if asked.is_fragment else "promises-page.html"
    return asked.page(template, run=found, promised=promised, is_told=is_told)


# --- small parts ---


def page_of(asked: Asked, run: Run, *, problem: str = "", status: int = 200) -> Response:
    """Return the page of a run, with what was in the way if somebody asked for something."""
    role = asked.me().role
    return asked.page(
        "run.html",
        status=status,
        problem=problem,
        may_steer=allowed(role, Action.STEER_RUNS),
        may_report=allowed(role, Action.SEE_REPORTS),
        **_live(asked, run),
    )


def run_of(asked: Asked, run: str) -> Run:
    """Return the run of an address.

    Raises:
        Denied: there is none.
    """
    found = content_of(asked).runs.find(run)
    if found is None:
        raise Denied(404, "missing")
    return found


def chart(asked: Asked, metric: str, rounds: list[int], series: list[tuple[str, list[float | None]]]) -> dict[str, Any]:
    """Return lines for charts.js."""
    t = asked.texts
    return {
        "rounds": rounds,
        "series": [{"label": label, "values": values} for label, values in series],
        "upwards": metric == EPSILON,
        "y": t("runs.spent") if metric == EPSILON else metric,
        "x": t("runs.round"),
    }


def _listed(asked: Asked, search: str, state: str, page: int) -> dict[str, Any]:
    content = content_of(asked)
    told, everything = content.said.now(), content.runs.all()
    found = matching(everything, search, state)
    return {
        "runs": found[(page - 1) * A_PAGE : page * A_PAGE],
        "told": told,
        "num_found": len(found),
        "page": page,
        "num_pages": max(1, -(-len(found) // A_PAGE)),
        "search": search,
        "state": state if state in STATES else "",
        "states": STATES,
        "mark": _mark_of_all(told, everything),
    }


def _live(asked: Asked, run: Run) -> dict[str, Any]:
    content = content_of(asked)
    told = content.said.now()
    mark = _mark(content, run)
    curves = _curves(content, run)
    first = [run.metric] if run.metric in curves.metrics else []
    drawn = [*first, *(name for name in curves.metrics if name != run.metric)]
    return {
        "run": run,
        "told": told,
        "at_hand": run.is_open and told.job == run.id,
        "sites": sites_of(run, told, curves.counted),
        "curves": [*drawn, *([EPSILON] if any(value is not None for value in curves.epsilon) else [])],
        "mark": mark,
    }


def _curves(content: CoordinatorContent, run: Run) -> Curves:
    """Return what a run's rounds say; nothing if they cannot be read."""
    try:
        return content.runs.curves(run)
    except SilotuneError as error:
        log.warning("the rounds of %s cannot be told: %s", run.id, error)
        return Curves(rounds=[], metrics={}, epsilon=[], counted={})


def _mark(content: CoordinatorContent, run: Run) -> str:
    told = content.said.now()
    return _short(f"{run.mark} {told.mark if run.is_open else ''}")


def _mark_of_all(told: Told, everything: list[Run]) -> str:
    return _short(f"{mark_of(everything)} {told.alive} {told.job}")


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
