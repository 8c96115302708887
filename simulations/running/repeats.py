"""The same scenario under several seeds: what is chance and what is not."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from server.records.results import REPEATS_FILE, read_evaluation
from server.reports.ensembles import composed_privacy, open_ensemble
from server.reports.run import write_report_if_possible
from server.rounds.early_stopping import is_over
from server.rounds.public_records import hold_back
from server.store.checkpoint import Checkpoint
from shared.files.atomic import write_json
from shared.runtime.ensembles import can_be_averaged
from shared.tasks import Record, task_of
from simulations.running.engine import FEDERATED, MakeObserver, arm_folder, run_scenario
from simulations.scenario import Scenario


def run_repeats(
    scenario: Scenario,
    folder: Path,
    *,
    observer: MakeObserver,
    resume: bool = False,
    stop_after: int | None = None,
    report: bool = True,
) -> Checkpoint:
    """Run `scenario` into `folder` and its repeats into `folder/repeats/seed-N`, and return the first's checkpoint.

    With repeats, `repeats.json` holds the final primary metric of every arm and seed, and what the adapters of all seeds say
    together (`shared.runtime.ensembles`) where the task can be averaged; the report shows mean, spread and ensemble. See
    `simulations.running.engine.run_scenario` for the arguments.
    """
    alone = scenario.simulation.repeats == 1
    finished = run_scenario(
        scenario, folder, observer=observer, resume=resume, stop_after=stop_after, report=report or not alone
    )
    if alone or not is_over(finished, scenario.job):
        return finished
    folders = {scenario.seed: folder}
    for seed in range(scenario.seed + 1, scenario.seed + scenario.simulation.repeats):
        folders[seed] = folder / "repeats" / f"seed-{seed}"
        run_scenario(with_seed(scenario, seed), folders[seed], observer=observer, resume=resume)
    # A baseline that diverged so far that it could not go on has no figure.
    arms = [
        arm
        for arm in (FEDERATED, *scenario.baselines.arms)
        if all((arm_folder(place, arm) / "evaluation.json").exists() for place in folders.values())
    ]
    values = {arm: [_final_metric(place, arm) for place in folders.values()] for arm in arms}
    if any(value is None for found in values.values() for value in found):
        return finished  # the evaluation data leaves the metric undefined, so it has no mean
    summary: dict[str, Any] = {"seeds": list(folders), "arms": values}
    if can_be_averaged(scenario.job):
        _, public = scenario.load_data()
        test = hold_back(public, task_of(scenario.job).roles[0]).reported
        places = {arm: [arm_folder(place, arm) for place in folders.values()] for arm in arms}
        summary["ensembles"] = {arm: _ensemble(runs, scenario, test) for arm, runs in places.items()}
    write_json(folder / REPEATS_FILE, summary)
    if report:
        write_report_if_possible(folder)
    return finished


def with_seed(scenario: Scenario, seed: int) -> Scenario:
    """Return `scenario` under another public seed: other partition, initial weights and drop-outs, same test records."""
    job = scenario.job.model_copy(update={"seed": seed})
    return scenario.model_copy(update={"seed": seed, "job": job})


def _ensemble(runs: Sequence[Path], scenario: Scenario, test: Sequence[Record]) -> dict[str, Any]:
    """Return the ensemble's metrics, and epsilon of a record that trained in all runs (None where none is stated)."""
    together, _ = open_ensemble(runs, scenario.compute).evaluate(test)
    privacy = composed_privacy(runs)
    return {
        "metrics": together.metrics,
        "epsilon": privacy.epsilon if privacy else None,
        "delta": privacy.delta if privacy else None,
    }


def _final_metric(folder: Path, arm: str) -> float | None:
    return read_evaluation(arm_folder(folder, arm) / "evaluation.json").primary
