"""Whoever simulates is told of evaluation records that are trained on as well."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from simulations.running.engine import check_arm, plan_arms
from simulations.scenario import load_scenario


@pytest.mark.parametrize("shared", [0, 4])
def test_evaluation_records_that_are_trained_on_are_told(
    scenario_file: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture, shared: int
) -> None:
    """A split of one file keeps equal texts on one side; a test file of its own may hold what the sites have."""
    columns = {"text": "review", "label": "verdict"}
    path = scenario_file(data={"test": {"path": "test.csv", "columns": columns}})
    lines = (path.parent / "train.csv").read_text(encoding="utf-8").splitlines()
    others = [f"something else {i},good" for i in range(12 - shared)]
    (path.parent / "test.csv").write_text("\n".join([*lines[: 1 + shared], *others]), encoding="utf-8")
    scenario = load_scenario(path)
    train, test = scenario.load_data()
    with caplog.at_level(logging.WARNING, logger="silotune.simulation"):
        check_arm(scenario, plan_arms(scenario, tmp_path / "run", train)[0], test)
    told = f"federated: {shared} of 12 evaluation records stand in the sites' training data as well"
    assert (told in caplog.text) == bool(shared)
