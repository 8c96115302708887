"""A sweep as the console shows it: every setting that was tried, over all seeds, from the sweep's own files.

A sweep whose tuning was accounted for released one trial and nothing else (`simulations.sweep.private`), so it is a run here:
the selected trial, with the epsilon of the whole selection.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from server.records.metrics import Metrics, in_range
from shared.errors import RunError, printable
from shared.files.json_files import Count, Finite, Positive, Share, damaged
from simulations.console.files import Reader, Stamp
from simulations.console.runs import FEDERATED, Arm, Run, broken, id_of
from simulations.sweep import FORMAT, OUTCOME, RUNS, SWEEP, TRIALS
from simulations.sweep.journal import TrialResult


@dataclass(frozen=True, kw_only=True)
class Tried:
    """One setting of a sweep over all its seeds.

    Attributes:
        setting: value of every axis.
        executed: the largest epsilon that a trial executed; None without noise.
        budget: what it was calibrated to; None without noise, or where noise was given.
        best: the sweep chose it at its budget.
        trials: keys of its trials, which name their folders.
    """

    setting: Mapping[str, Any]
    executed: float | None
    budget: float | None
    mean: float
    sd: float | None
    best: bool
    trials: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """One sweep; of one that cannot be read, `problem` says why.

    Attributes:
        path: of its folder beneath the folder of runs.
        delta: of every epsilon in it.
        tried: its settings, in the order in which they were tried; empty while it runs.
        notes: what to mind about its figures, as it wrote them.
        stamps: see `Reader`.
    """

    id: str
    path: str
    name: str
    problem: str = ""
    status: str = ""
    metric: str = ""
    higher: bool = True
    delta: float | None = None
    num_trials: int = 0
    tried: tuple[Tried, ...] = ()
    notes: tuple[str, ...] = ()
    stamps: Mapping[Path, Stamp] = field(default_factory=dict)

    def folder_of(self, trial: str) -> str:
        """Return the path of a trial's folder beneath the folder of runs; it may not be there."""
        return f"{self.path}/{RUNS}/{trial}" if self.path else f"{RUNS}/{trial}"


@dataclass(frozen=True, kw_only=True)
class _Setting:
    setting: dict[str, Any]
    epsilon: Positive | None
    mean: Finite
    sd: Positive | None = None


@dataclass(frozen=True, kw_only=True)
class _File:
    """`sweep.json`, as far as it is shown here; see `simulations.sweep.results`."""

    format: str
    name: str
    status: str
    metric: str = ""
    higher_is_better: bool = True
    num_trials: Count = 0
    frontier: tuple[_Setting, ...] = ()
    settings_tried: tuple[_Setting, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class _Selected:
    metric: str
    score: Finite | None = None
    metrics: Metrics = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class _Outcome:
    """`outcome.json`; see `simulations.sweep.private`."""

    name: str
    epsilon: Positive
    delta: Share
    selected: _Selected | None = None


def read_sweep(folder: Path, path: str) -> Sweep:
    """Return the sweep in a folder; one that is damaged has a `problem`. Never raises for what lies in the folder."""
    reader, fields = Reader(), dict[str, Any]()
    try:
        fields = _read(folder, reader)
    except (RunError, OSError, ValueError, RecursionError) as error:
        fields = broken(folder, error)
    return Sweep(id=id_of(path), path=printable(path), stamps=reader.stamps, **fields)


def read_selection(folder: Path, path: str) -> Run:
    """Return what a sweep with accounted tuning released, as a run."""
    reader, fields = Reader(), dict[str, Any]()
    try:
        found = reader.record(folder / OUTCOME, _Outcome)
        if found is None:
            raise damaged(folder / OUTCOME, "it is missing")
        chosen = found.selected
        metrics = {} if chosen is None else {**chosen.metrics, chosen.metric: chosen.score}
        fields = {
            "name": found.name,
            "status": "selected",
            "mechanism": "dp-sgd",
            "unit": "record",
            "executed": found.epsilon,
            "delta": found.delta,
            "metric": "" if chosen is None else chosen.metric,
            "arms": (Arm(name=FEDERATED, private=True, metrics=metrics),),
        }
    except (RunError, OSError, ValueError, RecursionError) as error:
        fields = broken(folder, error)
    return Run(id=id_of(path), path=printable(path), folder=folder, stamps=reader.stamps, **fields)


def _read(folder: Path, reader: Reader) -> dict[str, Any]:
    found = reader.record(folder / SWEEP, _File)
    if found is None:
        raise damaged(folder / SWEEP, "it is missing")
    if found.format != FORMAT:
        raise damaged(folder / SWEEP, f"its format is not {FORMAT}, the one that this version reads")
    for one in (*found.settings_tried, *found.frontier):
        in_range(found.metric, one.mean)
    trials = list(_trials(folder / TRIALS, reader))
    best = [one.setting for one in found.frontier]
    tried = []
    for one in found.settings_tried:
        own = [trial for trial in trials if trial.completed and trial.setting == one.setting]
        budgets = {trial.budget for trial in own if isinstance(trial.budget, float)}
        tried.append(
            Tried(
                setting=one.setting,
                executed=one.epsilon,
                budget=max(budgets, default=None),
                mean=one.mean,
                sd=one.sd,
                best=one.setting in best,
                trials=tuple(trial.key for trial in sorted(own, key=lambda trial: trial.seed)),
            )
        )
    return {
        "name": found.name,
        "status": found.status,
        "metric": found.metric,
        "higher": found.higher_is_better,
        "delta": max((trial.delta for trial in trials), default=None),
        "num_trials": found.num_trials or len(trials),
        "tried": tuple(tried),
        "notes": found.notes,
    }


def _trials(path: Path, reader: Reader) -> Iterable[TrialResult]:
    """Return the latest result of each trial; a last line without its end is not there yet."""
    found: dict[str, TrialResult] = {}
    for number, line in enumerate((reader.text(path) or "").split("\n")[:-1], start=1):
        try:
            trial = TrialResult.model_validate_json(line)
        except ValidationError:
            raise damaged(path, f"line {number} is not a trial's result") from None
        found[trial.key] = trial
    return found.values()
