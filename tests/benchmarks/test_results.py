"""`make results` measures a row from its scenario, resumes, leaves alone what has not changed, and fills the README's tables."""

from __future__ import annotations

import io
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from benchmarks import results
from benchmarks.accuracy_tables import ROWS, Row, best_non_private, figure, fill_tables, when
from server.rounds.observer import Observer
from simulations.running.engine import run_scenario
from simulations.scenario import load_scenario

ROOT = Path(__file__).resolve().parents[2]
PAGE = "before\n<!-- results: tasks -->\nold\n<!-- end of results -->\nafter\n"
ROW = Row(name="digits", scenario="scenario", changes=("privacy.noise_multiplier=1.5",))


def measured(folder: Path, *, seeds: int = 2) -> tuple[dict[str, Any], str]:
    """Run the row; return what the JSON file holds of it, and what was told."""
    told = io.StringIO()
    out, readme = folder / "results.json", folder / "README.md"
    if not readme.exists():
        readme.write_text(PAGE)
    failed = results.run(
        [ROW],
        seeds=seeds,
        out=out,
        readme=readme,
        work=folder / "work",
        again=False,
        console=Console(file=told),
        scenarios=folder,
    )
    assert failed == []
    return json.loads(out.read_text())["rows"]["digits"], told.getvalue()


@pytest.mark.endurance
def test_a_row_is_measured_resumed_kept_and_written(scenario_file: Callable[..., Path], tmp_path: Path) -> None:
    path = scenario_file(
        training={"rounds": 1, "local_steps": 1},
        baselines={"arms": ["non-private"], "non_private": {"training": {"rounds": 1, "local_steps": 1}}},
    )
    # Somebody stopped the first run in its first seed.
    scenario = load_scenario(path, [*ROW.changes, "simulation.repeats=2"])
    run_scenario(scenario, tmp_path / "work" / "digits", observer=lambda arm: Observer(), stop_after=1)
    row, told = measured(tmp_path)
    assert told == "digits: 2 seeds\n"
    assert (row["seeds"], row["metric"], row["test_records"]) == (2, "accuracy", 12)
    assert {name: len(values) for name, values in row["arms"].items()} == {"federated": 2, "non-private": 2}
    assert row["epsilon_largest"] > 0
    assert row["machine"]["cores"] >= 1
    assert not (tmp_path / "work" / "digits").exists()
    page = (tmp_path / "README.md").read_text()
    values = row["arms"]["federated"]
    assert f"{100 * statistics.mean(values):.1f} % ± {100 * statistics.stdev(values):.1f}" in page
    assert page.startswith("before\n<!-- results: tasks -->\nMean ± standard deviation. 2 seeds, ")
    assert page.endswith("<!-- end of results -->\nafter\n")
    assert "old" not in page

    again, told = measured(tmp_path)
    assert "as it is, measured" in told
    assert again == row

    path.write_text(path.read_text().replace("local_steps = 1", "local_steps = 2"))
    changed, told = measured(tmp_path, seeds=1)
    assert told == "digits: 1 seeds\n"
    assert changed["seeds"] == 1
    assert changed["job_sha256"] != row["job_sha256"]


def test_a_row_that_fails_is_named_and_nothing_is_written(scenario_file: Callable[..., Path], tmp_path: Path) -> None:
    path = scenario_file(data={"num_test": 10_000})
    (tmp_path / "README.md").write_text(PAGE)
    told = io.StringIO()
    failed = results.run(
        [ROW],
        seeds=3,
        out=tmp_path / "results.json",
        readme=tmp_path / "README.md",
        work=tmp_path / "work",
        again=False,
        console=Console(file=told),
        scenarios=path.parent,
    )
    assert failed == ["digits"]
    assert "digits: failed: " in told.getvalue()
    assert (tmp_path / "README.md").read_text() == PAGE
    assert not (tmp_path / "results.json").exists()


def row_of(**changes: Any) -> dict[str, Any]:
    machine = {"cores": 2, "processor": "X", "bfloat16_in_hardware": True}
    plain = {"metric": "accuracy", "higher_is_better": True, "seeds": 3, "date": "2026-01-02", "machine": machine}
    return {**plain, "arms": {"federated": [0.5, 0.6, 0.7]}, **changes}


def test_figures_are_mean_and_deviation() -> None:
    assert figure(row_of(), "federated") == "60.0 % ± 10.0"
    assert figure(row_of(), "central-dp") == "–"
    assert figure(None, "federated") == "–"
    assert figure(row_of(arms={"federated": [0.5]}), "federated") == "50.0 %"
    assert figure(row_of(arms={"federated": [0.5, None, 0.7]}), "federated") == "diverged"
    large = row_of(metric="perplexity", arms={"federated": [1000.0, 1100.0, 1200.0]})
    assert figure(large, "federated") == "1,100 ± 100"
    assert figure(row_of(metric="mae", arms={"federated": [1.0, 1.1, 1.2]}), "federated") == "1.100 ± 0.100"


def test_the_yardstick_is_the_best_arm_without_noise() -> None:
    arms = {"non-private": [0.7] * 3, "non-private-all-layers": [0.8] * 3}
    assert best_non_private(row_of(arms=arms)) == "80.0 % ± 0.0"
    assert best_non_private(row_of(arms=arms, higher_is_better=False)) == "70.0 % ± 0.0"
    assert best_non_private(row_of(arms=arms | {"non-private-all-layers": [None] * 3})) == "70.0 % ± 0.0"


def test_seeds_date_and_machine_are_told() -> None:
    assert when([row_of(), row_of(seeds=1), None]) == (
        "Mean ± standard deviation. 3 seeds, 2026-01-02, 2 cores of X, bfloat16; one seed, 2026-01-02, 2 cores of X, "
        "bfloat16. Anew: `make results`.\n"
    )
    assert "Not measured yet" in when([None])


def test_the_readme_holds_what_the_results_say() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = json.loads(results.RESULTS.read_text(encoding="utf-8"))["rows"]
    assert fill_tables(text, rows) == text
    assert text.count("<!-- results: ") == text.count("<!-- end of results -->") == 6


def test_every_row_is_of_a_scenario_that_ships() -> None:
    for row in ROWS.values():
        assert results.asked(row)["job_sha256"]


@pytest.mark.parametrize(
    ("arguments", "part"), [(["no-such-row"], "unknown row 'no-such-row'"), (["--seeds", "2"], "three or more")]
)
def test_wrong_arguments_are_told(arguments: list[str], part: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        results.main(arguments)
    assert part in capsys.readouterr().err
