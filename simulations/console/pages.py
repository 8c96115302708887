"""The pages of the research console: the table of runs, one run, several side by side, sweeps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any

from fastapi import Depends, Path, Query
from fastapi.responses import HTMLResponse, JSONResponse, Response

from shared.errors import RunError
from shared.numbers import read_number
from shared.web.asked import Asked, Denied, Here, Routes
from shared.web.console import Entry
from shared.web.exports import as_csv, as_json_lines
from shared.web.guarding import SANDBOXED
from shared.web.roles import Action
from simulations.console import comparing, numbers
from simulations.console.comparing import MOST_RUNS, curves, differences, final_metrics, measured, metrics_of
from simulations.console.content import SORTS, STATES, Wanted, chosen, content_of, labels, state_of
from simulations.console.index import Found
from simulations.console.runs import Run

ROUTES = Routes()
NAVIGATION = (
    Entry(key="runs", path="/runs", action=Action.SEE_RESULTS),
    Entry(key="sweeps", path="/sweeps", action=Action.SEE_RESULTS),
    Entry(key="frontier", path="/frontier", action=Action.SEE_RESULTS),
    Entry(key="accounts", path="/accounts", action=Action.MANAGE_ACCOUNTS),
)
FILTERS: Mapping[str, Callable[..., Any]] = {
    "epsilon": numbers.epsilon,
    "asked": numbers.asked,
    "exact": repr,
    "delta": numbers.delta,
    "metric": numbers.metric,
    "spread": numbers.spread,
    "gap": numbers.gap,
    "called": numbers.title,
    "duration": numbers.duration,
    "day": numbers.day,
    "setting": numbers.setting,
    "state": state_of,
}
_A_PAGE = 50
_COLUMNS = (
    *("id", "path", "name", "status", "problem", "task", "backbone", "data", "partition", "num_sites"),
    *("mechanism", "unit", "delta", "epsilon_executed", "epsilon_planned", "epsilon_asked", "epsilon_alone"),
    *("metric", "value", "sd", "num_seeds", "central_dp", "non_private", "gap", "created", "seconds"),
)
_CURVE_COLUMNS = ("id", "path", "name", "round", "metric", "value")

Word = Annotated[str, Query(max_length=200)]
Search = Annotated[str, Query(alias="q", max_length=200)]
Id = Annotated[str, Path(max_length=64)]
Form = Annotated[str, Path(max_length=8)]
Number = Annotated[str, Query(max_length=30)]
Ids = Annotated[list[str], Query(alias="run", max_length=500, default_factory=list)]


def wanted(
    search: Search = "",
    task: Word = "",
    data: Word = "",
    sweep: Word = "",
    state: Word = "",
    least: Number = "",
    most: Number = "",
    sort: Word = "created",
    down: bool = True,
) -> Wanted:
    """Return which runs a request asks for; a field that was left empty, or holds no number, asks for nothing."""
    return Wanted(
        search=search,
        task=task,
        data=data,
        sweep=sweep,
        state=state,
        least=_positive(least),
        most=_positive(most),
        sort=sort if sort in SORTS else "created",
        down=down,
    )


Asking = Annotated[Wanted, Depends(wanted)]


# --- runs ---


@ROUTES.page("/runs", Action.SEE_RESULTS)
def runs(asked: Here, asking: Asking, page: Annotated[int, Query(ge=1, le=2**31)] = 1) -> Response:
    """Show the table."""
    found = content_of(asked).index.now()
    fitting = asking.of(found.runs.values())
    return asked.page(
        "runs.html",
        found=found,
        runs=fitting[(page - 1) * _A_PAGE : page * _A_PAGE],
        num_found=len(fitting),
        page=page,
        num_pages=max(1, -(-len(fitting) // _A_PAGE)),
        asking=asking,
        tasks=_each(run.task for run in found.runs.values()),
        datasets=_each(run.data for run in found.runs.values()),
        states=STATES,
        sorts=list(SORTS),
        most=MOST_RUNS,
    )


@ROUTES.page("/runs/export.{form}", Action.SEE_RESULTS)
def export_runs(asked: Here, asking: Asking, form: Form) -> Response:
    """Return the runs that fit as a file."""
    found = asking.of(content_of(asked).index.now().runs.values())
    return exported("runs", form, _COLUMNS, map(_row, found))


@ROUTES.page("/runs/compare", Action.SEE_RESULTS)
def compare(asked: Here, ids: Ids, metric: Word = "", log: bool = False) -> Response:
    """Show several runs side by side."""
    found = content_of(asked).index.now()
    side_by_side = chosen(found, ids, most=MOST_RUNS)
    known = metrics_of(side_by_side)
    metric = metric if metric in known else next(iter(known), "")
    return asked.page(
        "compare.html",
        runs=side_by_side,
        labels=labels(side_by_side),
        num_asked=len(dict.fromkeys(ids)),
        most=MOST_RUNS,
        metrics=known,
        metric=metric,
        log=log,
        curves=curves(side_by_side, metric),
        differences=differences(side_by_side),
        finals=final_metrics(side_by_side),
    )


@ROUTES.page("/runs/curves.json", Action.SEE_RESULTS)
def curves_json(asked: Here, ids: Ids, metric: Word = "", log: bool = False) -> Response:
    """Return a metric of several runs by round, for the chart."""
    found = curves(chosen(content_of(asked).index.now(), ids, most=MOST_RUNS), metric)
    every = sorted({number for curve in found for number in curve.values})
    return JSONResponse(
        {
            "rounds": every,
            "series": [
                {"label": label, "values": [curve.values.get(number) for number in every]}
                for curve, label in zip(found, labels([curve.run for curve in found]), strict=True)
            ],
            "x": asked.texts("compare.round"),
            "y": numbers.title(metric),
            "log": log and all(value > 0 for curve in found for value in curve.values.values()),
        }
    )


@ROUTES.page("/runs/curves/export.{form}", Action.SEE_RESULTS)
def export_curves(asked: Here, form: Form, ids: Ids) -> Response:
    """Return every metric of several runs by round as a file."""
    found = chosen(content_of(asked).index.now(), ids, most=MOST_RUNS)
    rows = (
        {"id": run.id, "path": run.path, "name": run.name, "round": number, "metric": name, "value": value}
        for run in found
        for number, metrics in measured(run)
        for name, value in metrics.items()
    )
    return exported("curves", form, _CURVE_COLUMNS, rows)


@ROUTES.page("/runs/{run_id}", Action.SEE_RESULTS)
def one_run(asked: Here, run_id: Id) -> Response:
    """Show one run."""
    found = content_of(asked).index.now()
    return _page(asked, found, _run(found, run_id))


def _page(asked: Asked, found: Found, run: Run, *, problem: str = "", status: int = 200) -> Response:
    return asked.page(
        "run.html",
        status=status,
        problem=problem,
        run=run,
        sweep=found.sweeps.get(run.sweep),
        settings={} if run.problem else comparing.settings(run),
        finals=final_metrics([run]),
    )


@ROUTES.page("/runs/{run_id}/report", Action.SEE_RESULTS)
def report(asked: Here, run_id: Id) -> Response:
    """Show the report of a run, which somebody else may have made: as a document without scripts, in an origin of its own."""
    content = content_of(asked)
    found = content.index.now()
    run = _run(found, run_id)
    try:
        document = content.reports.of(run)
    except RunError as error:
        return _page(asked, found, run, problem=str(error), status=409)
    return HTMLResponse(document, headers={"content-security-policy": SANDBOXED})


# --- sweeps ---


@ROUTES.page("/sweeps", Action.SEE_RESULTS)
def sweeps(asked: Here) -> Response:
    """Show all sweeps."""
    return asked.page("sweeps.html", sweeps=list(content_of(asked).index.now().sweeps.values()))


# --- small parts ---


def exported(what: str, form: str, columns: tuple[str, ...], rows: Iterable[Mapping[str, Any]]) -> Response:
    """Return rows as a file of one of the two forms."""
    if form not in ("csv", "jsonl"):
        raise Denied(404, "missing")
    return as_csv(what, columns, rows) if form == "csv" else as_json_lines(what, rows)


def _run(found: Found, run_id: str) -> Run:
    if run_id not in found.runs:
        raise Denied(404, "missing")
    return found.runs[run_id]


def _each(values: Iterable[str]) -> list[str]:
    return sorted({value for value in values if value})


def _positive(text: str) -> float | None:
    try:
        number = read_number(text)
    except ValueError:
        return None
    return number if number >= 0 else None


def _row(run: Run) -> dict[str, Any]:
    return {
        **{name: getattr(run, name) for name in ("id", "path", "name", "problem", "task", "backbone", "data")},
        **{name: getattr(run, name) for name in ("partition", "num_sites", "mechanism", "unit", "delta", "metric")},
        "status": state_of(run),
        "epsilon_executed": run.executed,
        "epsilon_planned": run.planned,
        "epsilon_asked": run.asked,
        "epsilon_alone": run.alone,
        "value": run.value,
        "sd": run.spread.sd if run.spread else None,
        "num_seeds": run.spread.num if run.spread else 1,
        "central_dp": run.central,
        "non_private": run.open,
        "gap": run.gap,
        "created": None if run.created is None else run.created.isoformat(),
        "seconds": run.seconds,
    }
