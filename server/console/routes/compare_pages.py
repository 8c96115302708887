"""Runs side by side: settings that differ, what they promise and spent, curves over each other."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

from fastapi import Query
from fastapi.responses import JSONResponse, Response

from server.console.content import content_of
from server.console.routes.run_pages import EPSILON, Metric, chart, run_of
from server.console.runs import Curves, Run
from shared.errors import SilotuneError
from shared.files.json_files import canonical_json
from shared.web.asked import Asked, Here, Routes
from shared.web.roles import Action

ROUTES = Routes()

MOST = 6
_MOST_CHARACTERS = 200
_LABELS = "task.labels"
_KEY = secrets.token_bytes(32)
"""Of the marks of labels: without it, a guess could be tried on them."""

Names = Annotated[list[str], Query(alias="run", max_length=50)]


@ROUTES.page("/runs/compare", Action.SEE_RUNS)
def compare(asked: Here, names: Names = []) -> Response:  # noqa: B006 (FastAPI copies it)
    """Show some runs side by side."""
    runs = _runs(asked, names)
    if len(runs) < 2:
        return asked.page("compare.html", status=422, runs=[], differing=[], curves=[], most=MOST)
    found = [_curves(asked, run) for run in runs]
    metrics = sorted({name for one in found for name in one.metrics})
    first = [name for name in dict.fromkeys(run.metric for run in runs) if name in metrics]
    curves = [*first, *(name for name in metrics if name not in first)]
    if any(value is not None for one in found for value in one.epsilon):
        curves.append(EPSILON)
    return asked.page("compare.html", runs=runs, differing=_differing(asked, runs), curves=curves, most=MOST)


@ROUTES.page("/runs/compare/curve.json", Action.SEE_RUNS)
def curve(asked: Here, names: Names = [], metric: Metric = "") -> Response:  # noqa: B006 (FastAPI copies it)
    """Return how a metric went in each of some runs, for a chart."""
    runs = _runs(asked, names)
    found = [_curves(asked, run) for run in runs]
    rounds = sorted({number for one in found for number in one.rounds})
    lines: list[tuple[str, list[float | None]]] = []
    for run, one in zip(runs, found, strict=True):
        values = one.epsilon if metric == EPSILON else one.metrics.get(metric, [None] * len(one.rounds))
        by_round = dict(zip(one.rounds, values, strict=True))
        lines.append((run.id, [by_round.get(number) for number in rounds]))
    return JSONResponse(chart(asked, metric, rounds, lines))


def _runs(asked: Asked, names: list[str]) -> list[Run]:
    return [run_of(asked, name) for name in [*dict.fromkeys(names)][:MOST]]


def _curves(asked: Asked, run: Run) -> Curves:
    try:
        return content_of(asked).runs.curves(run)
    except SilotuneError:
        return Curves(rounds=[], metrics={}, epsilon=[], counted={})


def _differing(asked: Asked, runs: list[Run]) -> list[tuple[str, list[str]]]:
    """Return (setting, its value in each run) of all that are not the same in all."""
    settings = []
    for run in runs:
        try:
            settings.append(dict(_flat("", run.submission.signed_job().job.model_dump(mode="json"))))
        except SilotuneError:
            settings.append({})
    keys = sorted({key for one in settings for key in one} - {"name"})
    rows = [(key, [one.get(key, "–") for one in settings]) for key in keys]
    return [(key, [_told(asked, key, text) for text in values]) for key, values in rows if len({*values}) > 1]


def _told(asked: Asked, key: str, text: str) -> str:
    if key == _LABELS and text != "–":  # what a site's records are called is nobody's business here
        return asked.texts("compare.labels", mark=hmac.new(_KEY, text.encode(), hashlib.sha256).hexdigest()[:8])
    return text if len(text) <= _MOST_CHARACTERS else f"{text[:_MOST_CHARACTERS]}…"


def _flat(prefix: str, table: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for key, value in table.items():
        name = f"{prefix}.{key}" if prefix else key
        if isinstance(value, dict) and value:
            yield from _flat(name, value)
        else:
            yield name, value if isinstance(value, str) else canonical_json(value)
