"""A run of a scenario with audit and report (`simulate`), and how `silotune demo` and `simulate` show it (`run_scenario`)."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from server.energy import energy_figures, energy_line, together
from server.records.energy import ENERGY_FILE, EnergyRecord
from server.records.privacy import CoordinatorRecord, read_sites
from server.records.results import FOLDS_FILE, REPEATS_FILE, AuditRecord, Folds, Repeats, read_evaluation
from server.reports.run import read_arm, write_report_if_possible
from server.reports.run.trivial import never_answered, trivial
from server.rounds.early_stopping import is_over, stopped_early
from server.rounds.observer import Observers
from server.runs.folder import check_place, peak_rss_mb
from server.store.checkpoint import Checkpoint
from server.tracking import Watched
from shared import terminal
from shared.epsilons import rounded_up
from shared.files.json_files import read_if_there, read_record
from shared.privacy.statement import Statement
from shared.stopping import saying
from shared.tasks import task_of
from simulations.audit.run import audit_run_mechanism
from simulations.data.small_gpt2 import prepare_backbone
from simulations.running.folds import run_folds
from simulations.running.live import LiveView
from simulations.running.repeats import run_repeats
from simulations.running.watching import Watching
from simulations.scenario import Scenario


def run_scenario(
    scenario: Scenario,
    folder: Path,
    *,
    resume: bool = False,
    stop_after: int | None = None,
    as_json: bool = False,
    watched: Watched | None = None,
) -> None:
    """Run a scenario with its baselines, audit and report, or continue it.

    Args:
        stop_after: the round after which the run is left for later.
        watched: trackers and the meter of energy; none by default.
    """
    with saying(lambda: how_to_continue(folder)):
        started = time.monotonic()
        console = terminal.console(as_json=as_json)
        finished = simulate(scenario, folder, console, resume=resume, stop_after=stop_after, watched=watched)
        figures = summary(folder, scenario, seconds=time.monotonic() - started)
        if as_json:
            terminal.print_json(figures)
        else:
            _tell(console, scenario, folder, finished, figures)


def simulate(
    scenario: Scenario,
    folder: Path,
    console: Console,
    *,
    resume: bool = False,
    stop_after: int | None = None,
    watched: Watched | None = None,
) -> Checkpoint:
    """Run a scenario with its baselines, audit and report, or continue it; only progress goes to `console`.

    Args:
        stop_after: the round after which the run is left for later.
        watched: trackers and the meter of energy; none by default.

    Returns:
        The state of the federated arm after its last round.

    Raises:
        SilotuneError: saying what will not do; what was durable before stays and can be resumed.
    """
    check_place(folder)  # before a backbone is trained or data is read
    prepare_backbone(scenario.job.model.backbone, console)
    audited = scenario.job.privacy.mechanism != "none"
    view = LiveView(console)
    with Watching(watched or Watched(), folder, view.warn) as watching:
        with view:
            run = run_repeats if scenario.simulation.folds is None else run_folds
            finished = run(
                scenario,
                folder,
                observer=lambda arm: Observers(view.observer(arm), watching.observer(scenario, arm)),
                resume=resume,
                stop_after=stop_after,
                report=not audited,
            )
        if is_over(finished, scenario.job) and audited:
            try:
                with console.status("auditing the mechanism on canaries"):
                    audit_run_mechanism(folder)
            finally:
                write_report_if_possible(folder)
    return finished


def summary(folder: Path, scenario: Scenario, *, seconds: float) -> dict[str, Any]:
    """Return the figures of a finished run, read back from its folder."""
    metric = task_of(scenario.job).primary_metric
    arms = _arms(folder, scenario)
    result: dict[str, Any] = {"run_dir": str(folder)}
    for name, place in arms.items():
        evaluation = place / "evaluation.json"
        if evaluation.exists():
            value = read_evaluation(evaluation).metrics[metric]
            result[f"{metric}_{name}"] = None if value is None else round(value, 4)
    result |= _beside_trivial(arms)
    spreads: dict[tuple[str, str], tuple[float, ...]] = {}
    if (repeats := read_if_there(folder / REPEATS_FILE, Repeats)) is not None:
        spreads |= {(arm, ""): values for arm, values in repeats.arms.items()}
    if (folds := read_if_there(folder / FOLDS_FILE, Folds)) is not None:
        # A metric may be undefined in a fold.
        spreads |= {(arm, "_fold"): found[metric] for arm, found in folds.arms.items() if metric in found}
    for (arm, which), values in spreads.items():
        name = next(iter(arms)) if arm == "federated" else arm.replace("-", "_")
        result[f"{metric}_{name}{which}_mean"] = round(statistics.mean(values), 4)
        result[f"{metric}_{name}{which}_std"] = round(statistics.stdev(values), 4)
    # A run that ended early promises the epsilon of its whole plan.
    records = read_sites(folder)
    result["epsilon_max_site"] = _largest(
        r.epsilon_spent if r.epsilon_planned is None else r.epsilon_planned for r in records
    )
    if any(record.shared is not None for record in records):
        result["epsilon_alone"] = _largest(record.epsilon_alone for record in records)
    if scenario.job.privacy.central and (folder / "privacy.json").exists():
        record = read_record(folder / "privacy.json", CoordinatorRecord)
        result |= {
            "unit": record.unit,
            "epsilon": None if (promised := record.epsilon_stated) is None else float(rounded_up(promised, 4)),
            "num_sites": record.num_sites_declared,
        }
    result["delta"] = scenario.job.privacy.delta
    audited = read_if_there(folder / "audit" / "tier1.json", AuditRecord)
    result["audit"] = audited.verdict if audited else None
    result |= _calibration(folder) | _thresholds(folder)
    result["diverged"] = {name: reason for name, place in arms.items() if (reason := _diverged(place, name))}
    if (energy := _energy(arms)) is not None:
        result["energy"] = energy_figures(energy)
    result["seconds"] = round(seconds, 1)
    result["peak_rss_mb"] = round(peak_rss_mb())
    return result


def how_to_continue(folder: Path) -> str:
    """Return what to tell when a simulation was stopped."""
    if not (folder / "job.json").exists():
        return "nothing was written; start the command again."
    return f"continue with the same command and --resume --out {folder}"


def _largest(epsilons: Iterable[float | None]) -> float | None:
    """Return the largest epsilon that is stated, rounded up to four decimals; None if none is."""
    known = [epsilon for epsilon in epsilons if epsilon is not None]
    return float(rounded_up(max(known), 4)) if known else None


def _beside_trivial(arms: Mapping[str, Path]) -> dict[str, Any]:
    """Return what the trivial predictor reaches, if known, and what is said of arms that are no better or leave a label out."""
    paths = {name: path for name, folder in arms.items() if (path := folder / "evaluation.json").exists()}
    evaluations = {name: read_evaluation(path) for name, path in paths.items()}
    found = {name: one for name, evaluation in evaluations.items() if (one := trivial(evaluation)) is not None}
    # The same of every arm, for it depends on the records alone.
    return {one.key: round(one.value, 4) for one in found.values()} | {
        "no_better_than_trivial": {name: one.warning for name, one in found.items() if one.warning},
        "never_answered": {
            name: said for name, one in evaluations.items() if (said := never_answered(one)) is not None
        },
    }


def _calibration(folder: Path) -> dict[str, float]:
    """Return the run's temperature and what it did to the expected calibration error, where it has one."""
    path = folder / "evaluation.json"
    found = read_evaluation(path).calibration if path.exists() else None
    if found is None:
        return {}
    after = {"temperature": round(found.temperature, 4), "calibration_error": round(found.error_after, 4)}
    return (after if found.fitted_on else {}) | {"calibration_error_without_temperature": round(found.error_before, 4)}


def _thresholds(folder: Path) -> dict[str, float]:
    """Return macro F1 of the run before and after its thresholds, where some were fitted."""
    path = folder / "evaluation.json"
    found = read_evaluation(path).thresholds if path.exists() else None
    if found is None or not found.fitted_on:
        return {}
    return {
        "macro_f1_without_thresholds": round(found.macro_f1_before, 4),
        "macro_f1_with_thresholds": round(found.macro_f1_after, 4),
    }


def _arms(folder: Path, scenario: Scenario) -> dict[str, Path]:
    """Return the run folder of every training by the name that figures have."""
    arms = {"federated" if scenario.job.privacy.mechanism == "none" else "federated_dp": folder}
    return arms | {name.replace("-", "_"): folder / "baselines" / name for name in scenario.baselines.arms}


def _energy(arms: Mapping[str, Path]) -> EnergyRecord | None:
    """Return what all trainings drew, where that was counted; repeats and folds have records of their own."""
    return together(
        [found for place in arms.values() if (found := read_if_there(place / ENERGY_FILE, EnergyRecord)) is not None]
    )


def _what_took(scenario: Scenario) -> str:
    """Return what the seconds of the command are of."""
    trainings = 1 + len(scenario.baselines.arms)
    times = scenario.simulation.folds or scenario.simulation.repeats
    return f"{trainings * times} training{'s' if trainings * times > 1 else ''} with evaluation, audit and report"


def _diverged(folder: Path, name: str) -> str | None:
    """Return why the arm in `folder` counts as diverged, or None."""
    return read_arm(folder, name=name).diverged if (folder / "job.json").exists() else None


def _tell(console: Console, scenario: Scenario, folder: Path, finished: Checkpoint, figures: dict[str, Any]) -> None:
    """Print the figures, what is to be minded about them, and where the report is."""
    for name, warning in (figures.pop("no_better_than_trivial") | figures.pop("never_answered")).items():
        console.print(f"warning: {name}: {warning}", style="yellow", soft_wrap=True, markup=False)
    for name, reason in figures.pop("diverged").items():
        console.print(f"warning: {name} diverged: {reason}", style="yellow", soft_wrap=True)
    if (energy := _energy(_arms(folder, scenario))) is not None:
        figures["energy"] = energy_line(energy)
    figures["seconds"] = (
        f"{figures['seconds']} (this command: {_what_took(scenario)}; the report's time is of one training)"
    )
    for key, value in figures.items():
        console.print(f"{key:>28}  {value}", soft_wrap=True)
    if stopped_early(finished, scenario.job):
        console.print(
            f"stopped early after round {finished.round_number} of {scenario.job.training.rounds}: no improvement on the public "
            "records; the epsilon of all planned rounds is what was promised, and the statement names both",
            soft_wrap=True,
        )
    if not is_over(finished, scenario.job):
        console.print(
            f"stopped after round {finished.round_number}; continue with --resume --out {folder}",
            soft_wrap=True,
        )
        return
    console.print(f"\nreport: {folder / 'report.html'}", soft_wrap=True)
    statement = read_if_there(folder / "statement.json", Statement)
    console.print(statement.one_site if statement else False)
