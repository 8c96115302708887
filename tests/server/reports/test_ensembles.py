"""What an ensemble of runs reveals is the composition of what they executed; its figures are those of its members' folders."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from server.reports.ensembles import composed_privacy, open_ensemble
from server.rounds.observer import Observer
from shared.errors import ConfigError, DataError
from shared.privacy.accounting import GaussianSteps, compose_epsilon
from simulations.running.engine import run_scenario
from simulations.running.repeats import run_repeats
from simulations.scenario import load_scenario

MakeScenario = Callable[..., Path]


@pytest.fixture(scope="module")
def repeated(write_scenario: MakeScenario, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A scenario under two seeds, with a baseline; one site is left out of each round, so sites differ in their steps.

    All of it stops early: the repeats go on after that.
    """
    place = tmp_path_factory.mktemp("repeated")
    path = write_scenario(
        place,
        simulation={"threads": 1, "repeats": 2},
        baselines={"arms": ["non-private"]},
        federation={"sites_per_round": 2},
        training={"rounds": 3, "early_stopping": {"patience": 2, "min_delta": 1.0}},
        data={"kind": "synthetic"},
    )
    run_repeats(load_scenario(path), place / "run", observer=lambda arm: Observer())
    return path, place / "run"


def most_steps(run: Path) -> int:
    records = [json.loads(file.read_text()) for file in run.glob("sites/*/privacy.json")]
    return max(int(record["steps_executed"]) for record in records)


def test_the_epsilon_is_the_composition(repeated: tuple[Path, Path]) -> None:
    _, run = repeated
    runs = [run, run / "repeats" / "seed-1"]
    found = composed_privacy(runs)
    assert found is not None
    steps = sum(map(most_steps, runs))
    assert steps > most_steps(run)
    executed = GaussianSteps(noise_multiplier=1.0, sample_rate=0.25, steps=steps)
    assert found.epsilon == pytest.approx(compose_epsilon([executed], 1e-5), rel=1e-6)
    assert (found.delta, found.unit, found.runs) == (1e-5, "record", 2)
    single = max(json.loads(file.read_text())["epsilon_spent"] for file in run.glob("sites/*/privacy.json"))
    assert found.epsilon > single
    # One run without noise, and nothing is stated.
    assert composed_privacy([run, run / "baselines" / "non-private"]) is None


def test_injected_randomness_states_nothing(
    repeated: tuple[Path, Path], scenario_file: MakeScenario, tmp_path: Path
) -> None:
    scenario = load_scenario(scenario_file(training={"rounds": 1}))
    run_scenario(scenario, tmp_path / "run", observer=lambda arm: Observer(), injected_seed="x")
    assert composed_privacy([repeated[1], tmp_path / "run"]) is None


def test_repeats_hold_the_ensemble_beside_mean_and_spread(repeated: tuple[Path, Path]) -> None:
    path, run = repeated
    found = json.loads((run / "repeats.json").read_text())
    assert found["seeds"] == [0, 1]
    runs = [run, run / "repeats" / "seed-1"]
    _, test = load_scenario(path).load_data()
    together, single = open_ensemble(runs).evaluate(test)
    assert found["ensembles"]["federated"]["metrics"] == pytest.approx(together.metrics, abs=1e-5)
    assert [one.metrics["accuracy"] for one in single] == pytest.approx(found["arms"]["federated"])
    privacy = composed_privacy(runs)
    assert privacy is not None
    assert found["ensembles"]["federated"]["epsilon"] == privacy.epsilon
    assert found["ensembles"]["non-private"]["epsilon"] is None
    report = (run / "report.html").read_text()
    assert "Ensemble of all" in report
    assert "the composition of" in report


def test_the_command_compares_and_states_the_composition(
    repeated: tuple[Path, Path], silotune: Callable[..., Any], tmp_path: Path
) -> None:
    path, run = repeated
    runs = [run, run / "repeats" / "seed-1"]
    privacy = composed_privacy(runs)
    assert privacy is not None
    done = silotune("ensemble", *runs, "--scenario", path, "--json")
    assert done.status == 0, done.err
    figures = json.loads(done.out)
    assert (figures["epsilon"], figures["records"], figures["primary_metric"]) == (privacy.epsilon, 12, "accuracy")
    for member, place in zip(figures["members"], runs, strict=True):
        assert member["run"] == str(place)
        metrics = json.loads((place / "evaluation.json").read_text())["metrics"]
        assert member["metrics"] == pytest.approx(metrics, abs=1e-5)
    data = ["--data", path.parent / "train.csv", "--column", "text=review", "--column", "label=verdict"]
    plain = silotune("ensemble", *runs, *data)
    assert plain.status == 0, plain.err
    assert "on 60 public records" in plain.out
    assert "the composition of the runs" in plain.out
    assert "Accuracy" in plain.out
    quoted = tmp_path / "quoted.tsv"
    quoted.write_text('review\tverdict\n"so" quiet\tgood\na dull plot\tbad\n')
    told = [*runs, "--data", quoted, *data[2:]]
    assert "on 2 public records" in silotune("ensemble", *told, "--quoting", "none").out
    for wrong, error, message in (
        (told, DataError, "--quoting none"),
        ([*runs, "--quoting", "none"], ConfigError, "--quoting says how --data is read, but no --data was given"),
        ([*told, "--delimiter", "||"], ConfigError, "delimiter"),
        ([runs[0]], ConfigError, "at least two runs"),
        ([*runs, "--scenario", path, *data], ConfigError, "give one of them"),
        ([*runs], DataError, "no public evaluation records lie beside"),
        ([*runs, *data[:2], "--column", "review"], ConfigError, "not of the form ROLE=NAME"),
        ([*runs, *data, "--column", "text=verdict"], ConfigError, "--column names 'text' twice"),
        ([*runs, *data[:2], "--column", "lable=verdict"], ConfigError, "the role 'lable'; did you mean 'label'?"),
    ):
        refused = silotune("ensemble", *wrong)
        assert (refused.status, message in refused.err) == (error("").exit_code, True), refused.err
