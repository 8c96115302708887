"""What a resumed run means is settled when it starts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from server.rounds.observer import Observer
from server.runs.folder import load_job
from shared.errors import RunError
from simulations.running.engine import run_scenario
from simulations.scenario import load_scenario

MakeScenario = Callable[..., Path]


def run(path: Path, folder: Path, *overrides: str, **options: object) -> int:
    scenario = load_scenario(path, overrides)
    return run_scenario(scenario, folder, observer=lambda arm: Observer(), **options).round_number  # type: ignore[arg-type]


def test_a_run_keeps_the_weights_it_was_started_with(scenario_file: MakeScenario, tmp_path: Path) -> None:
    """Version 0 weighed equally where a scenario did not say; its run folders say so in their job.json."""
    path, folder = scenario_file(), tmp_path / "run"
    assert run(path, folder, "aggregation.weights=equal", stop_after=1) == 1
    started = load_job(folder)
    assert started.aggregation.weights == "equal"
    assert run(path, folder, resume=True) == 3
    assert load_job(folder).sha256 == started.sha256
    assert json.loads((folder / "run.json").read_text())["status"] == "completed"
    assert load_scenario(path).job.aggregation.weights == "declared"


@pytest.mark.parametrize("said", ["training.learning_rate=0.02", "aggregation.weights=declared"])
def test_what_the_scenario_says_is_not_overruled(scenario_file: MakeScenario, tmp_path: Path, said: str) -> None:
    path, folder = scenario_file(), tmp_path / "run"
    run(path, folder, "aggregation.weights=equal", stop_after=1)
    with pytest.raises(RunError, match="holds a run with another configuration"):
        run(path, folder, said, resume=True)


def test_a_new_run_takes_nothing_from_elsewhere(scenario_file: MakeScenario, tmp_path: Path) -> None:
    path, folder = scenario_file(), tmp_path / "run"
    run(path, folder, "aggregation.weights=equal", stop_after=1)
    with pytest.raises(RunError, match="holds a run"):
        run(path, folder)
