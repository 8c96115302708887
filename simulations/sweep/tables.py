"""The tables of a sweep for the terminal: every trial, and the frontier."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.table import Table

from shared.epsilons import rounded_up
from simulations.sweep.frontier import FrontierPoint
from simulations.sweep.journal import TrialResult
from simulations.sweep.spec import shown

MOST_ROWS = 60


def trials_table(results: Sequence[TrialResult]) -> Table:
    """Return one row a trial, in the order in which they were run; of many, the last ones."""
    hidden = max(0, len(results) - MOST_ROWS)
    title = "trials" if not hidden else f"trials (the last {MOST_ROWS}; all {len(results)} are in trials.jsonl)"
    axes = list(results[0].setting) if results else []
    confirmed = any(result.confirmation for result in results)
    metric = results[0].metric if results else ""
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for axis in axes:
        table.add_column(_short(axis, axes), justify="right")
    for heading in ("seed", "epsilon", metric, *(["confirmed"] if confirmed else []), "seconds"):
        table.add_column(heading, justify="right")
    for result in results[hidden:]:
        cells = [shown(result.setting[axis]) for axis in axes] + [str(result.seed)]
        if result.completed:
            cells += [_epsilon(result.epsilon), f"{result.value():.4f}"]
            cells += [f"{result.value(confirmation=True):.4f}" if result.confirmation else ""] if confirmed else []
        else:
            cells += ["", "failed", *([""] if confirmed else [])]
        table.add_row(*cells, f"{result.seconds:.0f}", style=None if result.completed else "yellow")
    return table


def frontier_table(points: Sequence[FrontierPoint]) -> Table:
    """Return one row a budget."""
    axes = list(points[0].best.setting)
    confirmed = any(point.best.confirmation_mean is not None for point in points)
    metric = points[0].best.metric
    table = Table(
        title="frontier: the best setting at each budget",
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    headings = [
        "epsilon",
        f"{metric}, mean",
        "sd",
        *(["confirmed, mean", "sd"] if confirmed else []),
        "seeds",
        "best of",
    ]
    for heading in [*headings, *(_short(axis, axes) for axis in axes)]:
        table.add_column(heading, justify="right")
    for point in points:
        best = point.best
        cells = [_epsilon(best.epsilon), f"{best.mean:.4f}", _number(best.sd)]
        cells += [_number(best.confirmation_mean), _number(best.confirmation_sd)] if confirmed else []
        cells += [str(best.num_seeds), str(point.num_settings)]
        table.add_row(*cells, *(shown(best.setting[axis]) for axis in axes))
    return table


def _epsilon(value: float | None) -> str:
    return "inf" if value is None else rounded_up(value)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _short(axis: str, axes: Sequence[Any]) -> str:
    """Return the last part of a key; a budget is told from the executed epsilon, and like names from each other."""
    last = axis.rpartition(".")[2]
    if last == "epsilon":
        return "budget"
    return last if sum(other.rpartition(".")[2] == last for other in axes) == 1 else axis
