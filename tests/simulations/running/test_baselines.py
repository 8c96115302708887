"""Arms without noise have settings of their own, which converge; one that diverges is called that, and the run goes on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from server.reports.run import read_arm
from server.rounds.observer import Observer
from server.runs.folder import load_job
from shared.errors import ConfigError
from shared.job.job import Job
from shared.privacy.plan import PrivacyPlan
from shared.runtime.inference import load_tuned, predict
from simulations.running.baselines import arm_changes
from simulations.running.engine import run_scenario
from simulations.scenario import builtin_scenario, changed_job, load_scenario

MakeScenario = Callable[..., Path]
WORDS = {"good": ["joy", "warm", "bright", "clever"], "bad": ["dull", "worse", "late", "drags"]}


def rows(count: int) -> list[tuple[str, str]]:
    """Texts whose label is in their words; all are different, so that a part of the public ones can be held back."""
    found = []
    for number in range(count):
        label = ["good", "bad"][number % 2]
        words = WORDS[label]
        spelt = " ".join("abcdefghij"[int(digit)] for digit in str(number))
        found.append((f"the film is {words[number % 4]} and {words[number // 4 % 4]} {spelt}", label))
    return found


def learnable(scenario_file: MakeScenario, **sections: Any) -> Path:
    """A scenario whose own settings are made for noise: without any, such a learning rate diverges."""
    data = {"train": {"path": "train.csv", "columns": {"text": "review", "label": "verdict"}}}
    plain: dict[str, Any] = {
        "rows": rows(370),
        "data": {**data, "num_test": 250, "kind": "public"},
        "training": {"rounds": 2, "optimizer": "sgd", "learning_rate": 30.0},
        "simulation": {"threads": 1, "evaluate_every": 1},
        "baselines": {"arms": ["non-private", "non-private-all-layers", "federated-non-private"]},
    }
    return scenario_file(**(plain | sections))


def simulate(path: Path, folder: Path, **options: Any) -> None:
    run_scenario(load_scenario(path), folder, observer=lambda arm: Observer(), **options)


def evaluation(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "evaluation.json").read_text())
    return found


def test_arms_without_noise_converge_where_the_jobs_own_settings_would_not(
    scenario_file: MakeScenario, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    simulate(learnable(scenario_file), folder)
    reported = json.loads((folder / "run.json").read_text())["public_records"]["reported"]
    for name in ("non-private", "non-private-all-layers", "federated-non-private"):
        arm = folder / "baselines" / name
        job, found = load_job(arm), evaluation(arm)
        assert job.privacy.mechanism == "none"
        assert job.training.optimizer == ("sgd" if name == "federated-non-private" else "adamw")
        assert found["metrics"]["accuracy"] > 0.9, name
        assert found["metrics"]["loss"] < 0.5, name
        assert found["calibration"]["reported_on"] == reported == 250 - found["calibration"]["fitted_on"]
        assert read_arm(arm, name=name).diverged is None
        history = [json.loads(line) for line in (arm / "metrics.jsonl").read_text().splitlines()]
        assert all(record["deciding"] for record in history if record["metrics"])
        best = min((record for record in history if record["metrics"]), key=lambda record: record["deciding"]["loss"])
        assert found["round"] == best["round"]
    assert load_job(folder / "baselines" / "non-private-all-layers").lora.last_layers is None
    report = (folder / "report.html").read_text()
    assert "Gap to the best without privacy" in report


def test_a_temperature_is_used_by_whoever_loads_the_run(scenario_file: MakeScenario, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    path = learnable(scenario_file, baselines={"arms": []})
    simulate(path, folder)
    found = evaluation(folder)["calibration"]
    assert found["temperature"] > 1.5, "with such a learning rate it is far too sure of itself"
    assert found["error_after"] < found["error_before"]
    scenario = load_scenario(path)
    runtime = load_tuned(folder, scenario.job, scenario.compute)
    assert runtime.temperature == found["temperature"]
    (warm,) = predict(runtime, ["the film is joy and warm"])
    runtime.temperature = 1.0
    (cold,) = predict(runtime, ["the film is joy and warm"])
    assert warm["label"] == cold["label"]
    assert warm["probability"] < cold["probability"]


def test_records_that_count_as_private_fit_no_temperature(scenario_file: MakeScenario, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    data = {"train": {"path": "train.csv", "columns": {"text": "review", "label": "verdict"}}, "num_test": 250}
    simulate(learnable(scenario_file, data=data, baselines={"arms": ["non-private"]}), folder)
    assert evaluation(folder)["calibration"]["fitted_on"] == 0
    assert evaluation(folder)["calibration"]["temperature"] == 1
    assert not (folder / "adapter" / "calibration.json").exists()
    # No budget pays for a run without noise, and nothing is promised of it.
    assert evaluation(folder / "baselines" / "non-private")["calibration"]["fitted_on"] > 0


@pytest.mark.parametrize("rate", [2e1, 1e3])
def test_an_arm_that_diverges_is_called_that_and_is_no_yardstick(
    scenario_file: MakeScenario, tmp_path: Path, rate: float
) -> None:
    folder = tmp_path / "run"
    changed = {
        "training": {
            "optimizer": "sgd",
            "learning_rate": rate,
            "weight_decay": 0.0,
            "rounds": 3,
            "local_steps": 5,
        }
    }
    baselines = {"arms": ["non-private", "central-dp"], "non_private": changed}
    simulate(learnable(scenario_file, baselines=baselines), folder)
    arm = read_arm(folder / "baselines" / "non-private", name="non-private")
    assert arm.diverged
    report = (folder / "report.html").read_text()
    assert "Non-private diverged:" in report
    assert "Gap to non-private" not in report
    assert (folder / "baselines" / "central-dp" / "evaluation.json").exists(), "the other arms were run"
    simulate(learnable(scenario_file, baselines=baselines), folder, resume=True)


def job_of(**sections: Any) -> Job:
    return changed_job(builtin_scenario("demo").job, sections, source="test")


@pytest.mark.parametrize("records", [1, 20, 500, 10_000, 2_000_000])
@pytest.mark.parametrize("name", ["non-private", "non-private-all-layers", "federated-non-private"])
def test_settings_fit_any_size(name: str, records: int) -> None:
    job = job_of()
    changes = arm_changes(name, job, num_records=records, num_sites=8, evaluate_every=3)
    arm = changed_job(job, changes, source=name)
    training, rate = arm.training, arm.privacy.sample_rate
    assert 0 < rate <= 1
    passes = training.planned_steps * rate
    assert passes >= 2.99
    assert training.rounds % 3 == 0
    assert training.early_stopping is not None
    assert training.early_stopping.metric == "loss"


@pytest.mark.parametrize("noise", [None, 0.7])
def test_one_site_adds_what_the_honest_sites_of_a_sum_do(noise: float | None) -> None:
    """Else the baseline would be compared under less privacy than the sum has."""
    shares = {"mechanism": "distributed", "max_colluding": 2, "epsilon": 2.0, "epsilon_alone": 9.0}
    job = job_of(
        privacy=shares | {"noise_multiplier": noise},
        training={"rounds": 16, "local_steps": 1},
        aggregation={"weights": "declared", "largest_share": 0.5, "server_optimizer": "none"},
        federation={"min_sites": 8, "update_dtype": "float32"},
    )
    together = PrivacyPlan.from_job(job).of_sum
    changes = arm_changes("central-dp", job, num_records=2000, num_sites=8, evaluate_every=1)
    arm = changed_job(job, changes, source="central-dp")
    assert (arm.privacy.mechanism, arm.federation.min_sites) == ("dp-sgd", 1)
    if noise is not None:
        assert PrivacyPlan.from_job(arm).noise_multiplier == together.noise_multiplier
    assert PrivacyPlan.from_job(arm).epsilon() <= (2.0 if noise is None else together.epsilon())
    without = changed_job(
        job, arm_changes("non-private", job, num_records=2000, num_sites=8, evaluate_every=1), source="n"
    )
    assert without.privacy.mechanism == "none"


@pytest.mark.parametrize(("train", "expected"), [("b", "b"), ("both", "both"), ("none", "b")])
def test_all_layers_are_trained_where_the_job_trains_a_head_alone(train: str, expected: str) -> None:
    job = job_of(lora={"train": train})
    arm = "non-private-all-layers"
    changes = arm_changes(arm, job, num_records=2000, num_sites=8, evaluate_every=1)
    lora = changed_job(job, changes, source=arm).lora
    assert (lora.train, lora.last_layers) == (expected, None)


def test_an_arm_that_makes_no_sense_is_refused() -> None:
    with pytest.raises(ConfigError, match="use non-private"):
        arm_changes(
            "non-private-all-layers", builtin_scenario("digits").job, num_records=9, num_sites=3, evaluate_every=1
        )
