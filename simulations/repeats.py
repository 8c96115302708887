"""The same scenario under several seeds: what is chance and what is not."""

from __future__ import annotations

import json
from pathlib import Path

from server.checkpoint import Checkpoint
from server.early_stopping import is_over
from server.report import write_report
from shared.atomic import write_json
from simulations.engine import FEDERATED, MakeObserver, run_scenario
from simulations.scenario import Scenario


def run_repeats(
    scenario: Scenario, folder: Path, *, observer: MakeObserver, resume: bool = False, stop_after: int | None = None
) -> Checkpoint:
    """Run `scenario` into `folder` and its repeats into `folder/repeats/seed-N`, and return the first's checkpoint.

    With repeats, `repeats.json` holds the final primary metric of every arm and seed, and the report shows mean and
    spread. See `simulations.engine.run_scenario` for the arguments.
    """
    finished = run_scenario(scenario, folder, observer=observer, resume=resume, stop_after=stop_after)
    if scenario.simulation.repeats == 1 or not is_over(finished, scenario.job):
        return finished
    folders = {scenario.seed: folder}
    for seed in range(scenario.seed + 1, scenario.seed + scenario.simulation.repeats):
        folders[seed] = folder / "repeats" / f"seed-{seed}"
        run_scenario(with_seed(scenario, seed), folders[seed], observer=observer, resume=resume)
    arms = [FEDERATED, *scenario.baselines.arms]
    values = {arm: [_final_metric(place, arm) for place in folders.values()] for arm in arms}
    write_json(folder / "repeats.json", {"seeds": list(folders), "arms": values})
    write_report(folder)
    return finished


def with_seed(scenario: Scenario, seed: int) -> Scenario:
    """Return `scenario` under another public seed: other partition, initial weights and drop-outs, same test records."""
    job = scenario.job.model_copy(update={"seed": seed})
    return scenario.model_copy(update={"seed": seed, "job": job})


def _final_metric(folder: Path, arm: str) -> float:
    place = folder if arm == FEDERATED else folder / "baselines" / arm
    evaluation = json.loads((place / "evaluation.json").read_text(encoding="utf-8"))
    return float(evaluation["metrics"][evaluation["primary_metric"]])
