"""What stands in the README's tables follows from the figures alone."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.accuracy_tables import LOCAL, ROWS, SHARED_NOISE, fill_tables
from benchmarks.results import SCENARIOS
from simulations.scenario import load_scenario

MACHINE = {"cores": 2, "processor": "A", "bfloat16_in_hardware": False}


def measured(**arms: list[float]) -> dict[str, Any]:
    about = {"metric": "accuracy", "higher_is_better": True, "seeds": 2, "date": "2026-12-01", "machine": MACHINE}
    return about | {"arms": {name.replace("_", "-"): values for name, values in arms.items()}}


def test_the_share_of_the_gap_is_between_four_steps_and_one_place() -> None:
    rows = {
        LOCAL["demo", "four-steps"].name: measured(federated=[0.70, 0.72]),
        LOCAL["demo", "one-step"].name: measured(federated=[0.74, 0.74]),
        LOCAL["banking77", "one-step"].name: measured(federated=[0.5, 0.5]),
        SHARED_NOISE["demo", "iid", 3].name: measured(federated=[0.0], central_dp=[0.77, 0.77]),
    }
    page = fill_tables("<!-- results: local -->\n<!-- end of results -->\n", rows)
    (movies,) = [line for line in page.splitlines() if line.startswith("| movie reviews")]
    cells = [cell.strip() for cell in movies.strip("|").split("|")]
    assert cells == ["movie reviews", "71.0 % ± 1.4", "74.0 % ± 0.0 (50 % of the gap)", "–", "–", "77.0 % ± 0.0"]
    (bank,) = [line for line in page.splitlines() if line.startswith("| bank questions")]
    assert "50.0 % ± 0.0 |" in bank  # without the others there is no gap
    assert "of the gap" not in bank


@pytest.mark.parametrize("name", [row.name for row in (*LOCAL.values(), *SHARED_NOISE.values())])
def test_every_row_is_a_scenario_of_eight_sites(name: str) -> None:
    row = ROWS[name]
    scenario = load_scenario(SCENARIOS / f"{row.scenario}.toml", list(row.changes))
    assert scenario.partition.num_sites == scenario.job.federation.min_sites == 8
    assert scenario.job.lora.train == "none"
    assert f"-{scenario.job.privacy.epsilon:g}" in name or scenario.job.privacy.epsilon == 3
    passes = scenario.job.training.rounds * scenario.job.training.local_steps * scenario.job.privacy.sample_rate
    assert passes == 16
