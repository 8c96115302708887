"""One trial: a normal simulation of one setting under one seed, and what is read back from its run folder.

Guarantee: nothing is trained here. A trial is `simulations.running.engine.run_scenario`, which `silotune simulate` calls too,
and every number of its result comes from the files of its run; the epsilon is the executed one, of the site with the largest.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from server.records.privacy import read_sites
from server.records.results import read_evaluation
from server.rounds.observer import Observer, Observers
from server.runs.folder import foreign_entries
from server.store.checkpoint import Checkpoint
from server.tracking.run_told import flat
from shared.errors import RunError
from shared.files.outputs import listed
from shared.runtime.runtime import load_runtime
from shared.tasks import Record, task_of
from simulations.running.engine import Arm, run_scenario
from simulations.running.watching import Watching
from simulations.scenario import Scenario
from simulations.sweep.journal import TrialResult
from simulations.sweep.spec import Setting, Sweep

RoundDone = Callable[[int, int], None]


def run_trial(
    sweep: Sweep,
    setting: Setting,
    seed: int,
    folder: Path,
    *,
    confirmation: list[Record],
    round_done: RoundDone = lambda done, total: None,
    watching: Watching | None = None,
) -> TrialResult:
    """Run one trial into `folder`, which is emptied first: half a trial is no trial.

    Args:
        confirmation: records that select nothing; empty for none.
        round_done: told (rounds done, rounds of the trial).
        watching: trackers and the meter of energy.

    Returns:
        The result; one with status "failed" if the run started and could not be completed.

    Raises:
        DataError, ConfigError, ModelError, PrivacyError: mistakes that are found before anything is written.
    """
    scenario = sweep.scenario(setting, seed)
    key, started = sweep.key(setting, seed), time.monotonic()
    _remove(folder)
    task = task_of(scenario.job)
    result: dict[str, Any] = {
        "key": key,
        "setting": setting,
        "seed": seed,
        "budget": budget_of(scenario),
        "delta": scenario.job.privacy.delta,
        "metric": task.primary_metric,
        "higher_is_better": task.higher_is_better,
        "job_sha256": scenario.job.sha256,
    }

    def observer(arm: Arm) -> Observer:
        rounds = _Rounds(arm.job.training.rounds, round_done)
        watch = watching.observer(scenario, arm, flat(setting) | {"seed": seed}) if watching else Observer()
        return Observers(rounds, watch)

    try:
        finished = run_scenario(scenario, folder, observer=observer)
        result |= {"status": "completed", **_scores(folder), "epsilon": executed_epsilon(folder)}
        if confirmation:
            result["confirmation"] = _confirm(scenario, finished, confirmation)
    except RunError as error:
        result |= {"status": "failed", "reason": str(error)}
    return TrialResult.model_validate({**result, "seconds": round(time.monotonic() - started, 3)})


def budget_of(scenario: Scenario) -> float | Literal["inf"] | None:
    """Return the epsilon that a trial is calibrated to: "inf" without noise, None if its noise multiplier is given."""
    privacy = scenario.job.privacy
    if privacy.mechanism == "none":
        return "inf"
    return privacy.epsilon if privacy.noise_multiplier is None else None


def executed_epsilon(folder: Path) -> float | None:
    """Return the largest epsilon that a site of a finished run spent, None if one of them is not protected.

    It counts what arrived. In a simulation that is all that was executed: a site that drops out is never asked.

    Raises:
        RunError: if the run folder holds no privacy record.
    """
    records = read_sites(folder)
    if not records:
        raise RunError(f"{folder} holds no privacy record of a site; no epsilon can be stated for it.")
    found = [record.epsilon_spent for record in records]
    return None if None in found else max(epsilon for epsilon in found if epsilon is not None)


class _Rounds(Observer):
    """Passes on how many rounds are done."""

    def __init__(self, total: int, round_done: RoundDone) -> None:
        self._total, self._round_done = total, round_done

    def round_done(self, checkpoint: Checkpoint) -> None:
        """See `Observer`."""
        self._round_done(checkpoint.round_number, self._total)


def _scores(folder: Path) -> dict[str, Any]:
    evaluation = read_evaluation(folder / "evaluation.json")
    metrics = evaluation.metrics
    if not all(math.isfinite(value) for value in metrics.values() if value is not None):
        raise RunError("the training diverged: a metric is not a finite number. Try a smaller learning rate.")
    if evaluation.primary is None:
        raise RunError(
            f"the evaluation data leaves {evaluation.primary_metric} undefined, so settings cannot be compared by it; give "
            "other evaluation data."
        )
    return {"score": evaluation.primary, "metrics": metrics}


def _confirm(scenario: Scenario, finished: Checkpoint, records: list[Record]) -> dict[str, float | None]:
    runtime = load_runtime(scenario.job, scenario.compute)
    examples = runtime.encode(records)
    runtime.warm_cache(examples)
    runtime.load(finished.result)
    return runtime.evaluate(examples).metrics


def _remove(folder: Path) -> None:
    try:
        if folder.exists() and (foreign := foreign_entries(folder)):
            raise RunError(f"{folder} would be emptied, but holds {listed(foreign)}; move that away, then resume.")
        if folder.exists():
            shutil.rmtree(folder)
    except OSError as error:
        raise RunError(f"{folder} cannot be removed ({error.strerror}); mend the permissions, then resume.") from None
