"""Several runs side by side: curves by round, the settings in which they differ, final metrics."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shared.errors import RunError
from simulations.console.files import Reader
from simulations.console.numbers import setting
from simulations.console.runs import Run, read_job, read_rounds

MOST_RUNS = 12
_SAME_ANYWAY = ("name",)


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One metric of one run by round."""

    run: Run
    values: Mapping[int, float]


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A setting in which runs differ: its values, one for each run."""

    key: str
    values: Sequence[str]


def curves(runs: Sequence[Run], metric: str) -> list[Curve]:
    """Return a metric of each run by round; of a run that cannot be read, or never measured it, an empty curve."""
    return [
        Curve(run=run, values={number: metrics[metric] for number, metrics in measured(run) if metric in metrics})
        for run in runs
    ]


def measured(run: Run) -> Iterator[tuple[int, dict[str, float]]]:
    """Yield the rounds of a run that were measured, with every metric that is defined there."""
    try:
        rounds = read_rounds(run.folder, Reader())
    except RunError:
        return  # the run's own page has the reason
    for record in rounds:
        if found := {name: value for name, value in record.metrics.items() if value is not None}:
            yield record.round, found


def metrics_of(runs: Sequence[Run]) -> list[str]:
    """Return every metric that some round of the runs has: their primary ones first, then loss, then the others."""
    known = dict.fromkeys(run.metric for run in runs if run.metric)
    every = sorted({name for run in runs for _, metrics in measured(run) for name in metrics})
    return [name for name in dict.fromkeys([*known, "loss", *every]) if name in every]


def final_metrics(runs: Sequence[Run]) -> list[str]:
    """Return every metric of the final models, the primary ones first."""
    own = [run.arms[0].metrics for run in runs if run.arms]
    return list(
        dict.fromkeys([*(run.metric for run in runs if run.metric), *(name for found in own for name in found)])
    )


def settings(run: Run) -> dict[str, str]:
    """Return every setting of a run's job as text, with what else decides about its figures; {} if it cannot be read."""
    try:
        job = read_job(run.folder, Reader())
    except RunError:
        return {}
    told = dict(_flat("", {key: value for key, value in job.items() if key not in _SAME_ANYWAY}))
    return told | {"data": run.data, "partition": run.partition}


def differences(runs: Sequence[Run]) -> list[Difference]:
    """Return the settings that are not the same in all runs."""
    told = [settings(run) for run in runs]
    keys = dict.fromkeys(key for one in told for key in one)
    found = [Difference(key=key, values=[one.get(key, setting(None)) for one in told]) for key in keys]
    return [one for one in found if len(set(one.values)) > 1]


def _flat(prefix: str, table: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for key, value in table.items():
        name = f"{prefix}.{key}" if prefix else key
        if isinstance(value, dict) and value:
            yield from _flat(name, value)
        elif value is not None:
            yield name, setting(value)
