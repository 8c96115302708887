"""The frontier: metric against epsilon, of chosen runs, of all runs, or of a sweep."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from fastapi.responses import Response

from server.records.metrics import is_share
from shared.web.asked import Asked, Denied, Here, Routes
from shared.web.roles import Action
from simulations.console.content import chosen, content_of
from simulations.console.drawing import BOTTOM, HEIGHT, LEFT, NO_PRIVACY, RIGHT, TOP, draw
from simulations.console.frontier import Point, Promise, metrics, of_runs, of_sweep, promises
from simulations.console.numbers import NOTHING
from simulations.console.pages import Form, Ids, Word, exported
from simulations.console.runs import Run
from simulations.console.sweeps import Sweep

ROUTES = Routes()
_MOST = 500
_COLUMNS = ("label", "runs", "executed", "planned", "value", "sd", "num", "front")


@dataclass(frozen=True, kw_only=True)
class _Shown:
    """What a frontier is of, and its points."""

    sweep: Sweep | None
    data: str
    metric: str
    promise: Promise | None
    points: list[Point]
    num_without: int
    choices: dict[str, list[str]]


@ROUTES.page("/frontier", Action.SEE_RESULTS)
def frontier(
    asked: Here, ids: Ids, sweep: Word = "", data: Word = "", metric: Word = "", promise: Word = ""
) -> Response:
    """Draw the frontier."""
    shown = _shown(asked, ids, sweep, data, metric, promise)
    return asked.page(
        "frontier.html",
        shown=shown,
        ids=ids,
        drawing=draw(shown.points[:_MOST], most=1.0 if is_share(shown.metric) else None),
        more=max(0, len(shown.points) - _MOST),
        names={run.id: run for run in content_of(asked).index.now().runs.values()},
        place={"height": HEIGHT, "top": TOP, "bottom": BOTTOM, "left": LEFT, "right": RIGHT, "none": NO_PRIVACY},
    )


@ROUTES.page("/frontier/export.{form}", Action.SEE_RESULTS)
def export_frontier(
    asked: Here,
    form: Form,
    ids: Ids,
    sweep: Word = "",
    data: Word = "",
    metric: Word = "",
    promise: Word = "",
) -> Response:
    """Return the points as a file."""
    shown = _shown(asked, ids, sweep, data, metric, promise)
    rows: list[dict[str, Any]] = [{**asdict(point), "runs": list(point.runs)} for point in shown.points]
    return exported("frontier", form, _COLUMNS, rows)


def _shown(asked: Asked, ids: list[str], sweep: str, data: str, metric: str, promise: str) -> _Shown:
    """Return what is asked for; what is left open is what most runs have."""
    found = content_of(asked).index.now()
    if sweep:
        return _of_sweep(found.sweeps.get(sweep), list(found.runs.values()))
    runs = chosen(found, ids, most=_MOST) if ids else list(found.runs.values())
    datasets = _by_frequency([run for run in runs if run.value is not None])
    data = data if data in datasets else next(iter(datasets), "")
    runs = [run for run in runs if _data(run) == data]
    names = metrics(runs)
    metric = metric if metric in names else next(iter(names), "")
    of_metric = [run for run in runs if run.metric == metric]
    kinds = {one.key: one for one in promises(of_metric)}
    chosen_promise = kinds.get(promise) or next(iter(kinds.values()), None)
    points, num_without = of_runs(of_metric, metric=metric, promise=chosen_promise)
    return _Shown(
        sweep=None,
        data=data,
        metric=metric,
        promise=chosen_promise,
        points=points,
        num_without=num_without,
        choices={"data": datasets, "metric": names, "promise": list(kinds)},
    )


def _of_sweep(sweep: Sweep | None, runs: list[Run]) -> _Shown:
    if sweep is None:
        raise Denied(404, "missing")
    own = [run for run in runs if run.sweep == sweep.id]
    promise = next(iter(promises(own)), None)
    return _Shown(
        sweep=sweep,
        data=next((run.data for run in own), ""),
        metric=sweep.metric,
        promise=promise,
        points=of_sweep(sweep, own),
        num_without=0,
        choices={},
    )


def _by_frequency(runs: list[Run]) -> list[str]:
    return [data for data, _ in Counter(map(_data, runs)).most_common()]


def _data(run: Run) -> str:
    """Return what the data of a run are called; a federation's coordinator does not know."""
    return run.data or NOTHING
