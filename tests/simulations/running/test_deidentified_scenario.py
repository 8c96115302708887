"""A scenario whose data is masked as it is read: homes, tokens and held-out records hold placeholders only."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from simulations.scenario import load_scenario
from tests.conftest import Outcome

ROWS = [
    (f"Mr Fezziwig saw it on {i % 28 + 1} May 2020, a warm film number {i}", ["good", "bad"][i % 2]) for i in range(60)
]
COLUMNS = {"text": "review", "label": "verdict"}


def test_train_and_held_out_records_are_masked(scenario_file: Callable[..., Path]) -> None:
    data = {"train": {"path": "train.csv", "columns": COLUMNS, "deidentify": True}, "num_test": 12}
    train, test = load_scenario(scenario_file(rows=ROWS, data=data)).load_data()
    assert (len(train), len(test)) == (48, 12)
    assert all(record["text"].startswith("Mr [NAME] saw it on [DATE], a warm film") for record in [*train, *test])


def test_a_simulation_keeps_no_unmasked_text_and_resumes(
    scenario_file: Callable[..., Path], tmp_path: Path, silotune: Callable[..., Outcome]
) -> None:
    data = {"train": {"path": "train.csv", "columns": COLUMNS, "deidentify": {"engine": "rules"}}, "num_test": 12}
    scenario, out = scenario_file(rows=ROWS, data=data), tmp_path / "run"
    first = silotune("simulate", scenario, "--out", out, "--stop-after", "1")
    assert first.status == 0, first.err
    homes = list(out.rglob("data.jsonl"))
    assert homes
    for path in out.rglob("*"):
        assert not path.is_file() or b"Fezziwig" not in path.read_bytes(), path.name
    assert all("[NAME]" in home.read_text() for home in homes)
    resumed = silotune("simulate", scenario, "--out", out, "--resume")
    assert resumed.status == 0, resumed.err
    # Without masking it is another data set, and a run does not go on with it.
    changed = silotune("simulate", scenario, "--out", out, "--resume", "--set", "data.train.deidentify=false")
    assert changed.status != 0
    assert "data" in changed.err
