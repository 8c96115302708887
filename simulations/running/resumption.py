"""A run that is resumed keeps the meaning it was started with, whatever has become of the defaults since.

Guarantee (tests/simulations/running/test_resumption.py): what the scenario says, the resumed job has; what it does not say, the
job keeps as it was recorded when the run was started. A scenario that says something else than the recorded job is refused as
before.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from server.runs.folder import load_job
from shared.errors import ConfigError
from shared.job.job import Job
from simulations.running.baselines import merged
from simulations.scenario import Scenario, changed_job


def as_started(scenario: Scenario, folder: Path) -> Scenario:
    """Return `scenario` with what it leaves open as the run in `folder` was started, if there is one."""
    said = scenario.job.model_dump(mode="json", exclude_unset=True)
    return scenario.model_copy(update={"job": job_as_started(scenario.job, said, folder)})


def arm_as_started(scenario: Scenario, name: str, job: Job, folder: Path) -> Job:
    """Return `job`, that of baseline `name`, with what the scenario leaves open as the arm in `folder` was started."""
    said = scenario.job.model_dump(mode="json", exclude_unset=True, include={"name", "seed", "model", "lora", "task"})
    return job_as_started(job, merged(said, scenario.baselines.changes(name)), folder)


def job_as_started(job: Job, said: Mapping[str, Any], folder: Path) -> Job:
    """Return the recorded job of `folder` if it is one that `said` describes, else `job`."""
    if not (folder / "job.json").exists():
        return job
    recorded = load_job(folder)
    try:
        same = _overlaid(recorded, said).sha256 == recorded.sha256
    except ConfigError:  # what is said does not go together with what was recorded
        same = False
    return recorded if same else job


def _overlaid(recorded: Job, said: Mapping[str, Any]) -> Job:
    changes = {key: value for key, value in said.items() if key != "schema_version"}
    return changed_job(recorded, changes, source="the job of the run folder")
