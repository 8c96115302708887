"""Ensembles of run folders: how good they are on public records beside their members, and what they reveal together.

Formal guarantee (test: tests/server/reports/test_ensembles.py)
    * The epsilon stated for an ensemble is the composition (PLD) of what its runs executed, recomputed from their records, for
      one unit of privacy whose data took part in all of them, at one site in each. Where one run has no epsilon, none is stated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from server.reports.compliance.reading import read_facts
from server.reports.run.formats import format_metric, metric_title
from server.rounds.public_records import hold_back
from server.runs.folder import load_job
from shared import terminal
from shared.data.datasets import DataSource, read_records
from shared.epsilons import delta_rounded_up, rounded_up
from shared.errors import ConfigError, DataError
from shared.job.compute import ComputeConfig
from shared.job.parsing import nearest, parse
from shared.options import named_once
from shared.privacy.accounting import GaussianSteps, compose_epsilon, merged
from shared.runtime.ensembles import Ensemble, Member
from shared.tasks import Record, task_of


@dataclass(frozen=True, kw_only=True)
class ComposedPrivacy:
    """What a record (or patient, customer, site) that was in every run is protected with; None if none is stated."""

    epsilon: float
    delta: float
    unit: str
    runs: int


def open_ensemble(runs: Sequence[Path], compute: ComputeConfig | None = None) -> Ensemble:
    """Return the ensemble of run folders.

    Raises:
        RunError, ConfigError: if one is no run folder, or they do not fit together.
    """
    return Ensemble([Member(run=run, job=load_job(run)) for run in runs], compute or ComputeConfig())


def composed_privacy(runs: Sequence[Path]) -> ComposedPrivacy | None:
    """Return the composition of everything that the runs executed, or None if one of them is not protected, or by another unit.

    Of each run the most steps of any site count, mechanism by mechanism: at least what any one site executed.

    Raises:
        RunError: if a privacy record is missing or malformed.
    """
    events: list[GaussianSteps] = []
    deltas, units = set(), set()
    for run in runs:
        facts = read_facts(run)
        if not facts.private:
            return None
        sites = [[*site.release.possible_events] for site in facts.sites]
        if facts.central is not None:
            sites = [[*facts.central.record.events]]
        events += _most_of(sites)
        deltas |= {facts.central.record.delta} if facts.central else {site.release.delta for site in facts.sites}
        units |= {facts.central.record.unit} if facts.central else {site.release.unit for site in facts.sites}
    if len(units) != 1:
        return None
    delta = max(deltas)
    return ComposedPrivacy(epsilon=compose_epsilon(events, delta), delta=delta, unit=units.pop(), runs=len(runs))


def _most_of(sites: Sequence[Sequence[GaussianSteps]]) -> list[GaussianSteps]:
    """Return for each mechanism the largest number of steps that a site executed of it."""
    most: dict[tuple[float, float], GaussianSteps] = {}
    for event in (event for events in sites for event in merged(events)):
        key = (event.noise_multiplier, event.sample_rate)
        most[key] = max(most.get(key, event), event)
    return sorted(most.values())


def public_records(
    runs: Sequence[Path], data: Path | None, columns: dict[str, str], reading: Mapping[str, Any] | None = None
) -> Sequence[Record]:
    """Return the public evaluation records: those of `data`, else those that were submitted with the first run.

    Args:
        data: a file, or None.
        columns: column in the file by role of the task, where they differ.
        reading: further keys of `DataSource` for `data`, such as quoting.

    Raises:
        ConfigError, DataError: if there are none, or the file cannot be read so, or lacks a column.
    """
    roles = task_of(load_job(runs[0])).roles
    if unknown := [role for role in columns if role not in roles]:
        raise ConfigError(f"--column names the role {unknown[0]!r}; {nearest(unknown[0], list(roles))}")
    if data is not None:
        source = {"path": str(data.resolve()), "columns": {role: columns.get(role, role) for role in roles}}
        return read_records(parse(DataSource, source | dict(reading or {}), source="what was asked for"))
    submitted = runs[0].resolve().parent / "evaluation.jsonl"
    if not submitted.exists():
        raise DataError(
            f"no public evaluation records lie beside {runs[0]}; give --data FILE, or --scenario FILE for the runs of a "
            "simulation."
        )
    return read_records(DataSource(path=str(submitted), columns={role: role for role in roles}))


def measure_ensemble(
    runs: Sequence[Path],
    *,
    records: Sequence[Record] | None,
    data: Path | None,
    columns: Sequence[str],
    reading: Mapping[str, Any] | None = None,
    as_json: bool,
) -> None:
    """Print the metrics of the ensemble beside those of its members, and what they reveal together.

    Args:
        records: public evaluation records; None reads them, see `public_records`.
        columns: ROLE=NAME items.
        reading: see `public_records`.

    Raises:
        RunError, ConfigError, DataError, AdapterError: as their texts say.
    """
    found = open_ensemble(runs)
    if records is None:
        records = public_records(runs, data, named_once(columns, "--column", "ROLE=NAME"), reading)
    if data is None:  # of the runs' own public records a part has decided about their members
        records = hold_back(records, task_of(load_job(runs[0])).roles[0]).reported
    together, single = found.evaluate(records)
    privacy = composed_privacy(runs)
    task = task_of(load_job(runs[0]))
    if as_json:
        figures = {
            "primary_metric": task.primary_metric,
            "records": len(records),
            "ensemble": together.metrics,
            "members": [{"run": str(run), "metrics": one.metrics} for run, one in zip(runs, single, strict=True)],
            "epsilon": privacy.epsilon if privacy else None,
            "delta": privacy.delta if privacy else None,
            "unit": privacy.unit if privacy else None,
        }
        terminal.print_json(figures)
        return
    console = terminal.console()
    names = [task.primary_metric, *(name for name in together.metrics if name != task.primary_metric)]
    table = Table("", *(metric_title(name) for name in names), box=None)
    for title, metrics in [
        *((str(run), one.metrics) for run, one in zip(runs, single, strict=True)),
        ("ensemble", together.metrics),
    ]:
        table.add_row(title, *(format_metric(name, metrics.get(name)) for name in names))
    console.print(table)
    console.print(f"on {len(records):,} public records", soft_wrap=True)
    console.print(_privacy_in_words(privacy), soft_wrap=True)


def _privacy_in_words(privacy: ComposedPrivacy | None) -> str:
    if privacy is None:
        return "No epsilon is stated for the ensemble: a member is not protected, or they are of different units of privacy."
    return (
        f"Privacy of the ensemble: a {privacy.unit} that was at one site in each of the {privacy.runs} runs is protected with "
        f"epsilon {rounded_up(privacy.epsilon)} at delta {delta_rounded_up(privacy.delta)}, the composition of the runs."
    )
