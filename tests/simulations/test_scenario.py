"""Scenario files: one file, one job, every key known."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shared.errors import ConfigError, DataError
from simulations.scenario import Scenario, builtin_scenario, changed_job, load_scenario


def test_a_scenario_holds_its_job_and_finds_its_data(scenario_file: Callable[..., Path], tmp_path: Path) -> None:
    scenario = load_scenario(scenario_file(seed=7))
    assert scenario.job.name == scenario.name == "small"
    assert scenario.job.seed == scenario.seed == 7
    assert scenario.base == tmp_path
    train, test = scenario.load_data()
    assert (len(train), len(test)) == (48, 12)
    assert set(train[0]) == {"text", "label"}


def test_the_held_out_records_follow_their_own_seed_and_are_not_trained_on(scenario_file: Callable[..., Path]) -> None:
    rows = [(f"text {i}", ["good", "bad"][i % 2]) for i in range(40)]
    path = scenario_file(rows=rows)
    train, test = load_scenario(path).load_data()
    assert {r["text"] for r in train}.isdisjoint({r["text"] for r in test})
    assert load_scenario(path).load_data() == (train, test)
    assert load_scenario(path, ["data.split_seed=1"]).load_data() != (train, test)
    # Repeats with other seeds stay comparable: they are measured on the same records.
    assert load_scenario(path, ["seed=1"]).load_data() == (train, test)


def test_a_test_file_of_its_own(scenario_file: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "test.jsonl").write_text('{"t": "fine", "l": "good"}\n{"t": "poor", "l": "bad"}\n')
    columns = {"columns": {"text": "review", "label": "verdict"}}
    data = {
        "train": {"path": "train.csv", **columns},
        "test": {"path": "test.jsonl", "columns": {"text": "t", "label": "l"}},
    }
    train, test = load_scenario(scenario_file(data=data)).load_data()
    assert (len(train), len(test)) == (60, 2)
    (tmp_path / "test.jsonl").unlink()
    with pytest.raises(DataError, match=r"test\.jsonl does not exist"):
        load_scenario(tmp_path / "scenario.toml").load_data()


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"trainning": {}}, "unknown key 'trainning'; did you mean 'training'?"),
        ({"partition": {"num_site": 3}}, "unknown key 'partition.num_site'; did you mean 'num_sites'?"),
        ({"simulation": {"backend": "dask"}}, "simulation.backend"),
        ({"simulation": {"dropout_probability": 1.0}}, "simulation.dropout_probability"),
        ({"data": {"builtin": "movie-reviews"}}, "not both"),
        ({"baselines": {"arms": ["central"]}}, "baselines.arms"),
        ({"job": {}}, "unknown key 'job'"),
        ({"base": "/"}, "unknown key 'base'"),
        ({"privacy": {"epsilon": "much"}}, "privacy.epsilon"),
        ({"name": "a/b"}, "name"),
        ({"compute": {"device": "tpu"}}, "compute.device"),
    ],
)
def test_a_bad_key_is_refused(scenario_file: Callable[..., Path], sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load_scenario(scenario_file(**sections))
    assert message in str(refused.value)
    assert "scenario.toml" in str(refused.value)


def test_overrides_reach_the_job_and_the_rest(scenario_file: Callable[..., Path]) -> None:
    path = scenario_file()
    scenario = load_scenario(path, ["training.rounds=9", "partition.num_sites=4", "lora.train=both"])
    assert (scenario.job.training.rounds, scenario.partition.num_sites, scenario.job.lora.train) == (9, 4, "both")
    with pytest.raises(ConfigError, match="unknown key 'trainning'"):
        load_scenario(path, ["trainning.rounds=9"])


def test_builtin_scenarios_are_valid() -> None:
    demo = builtin_scenario("demo", ["training.rounds=2"])
    assert isinstance(demo, Scenario)
    assert demo.job.training.rounds == 2
    for arm in demo.baselines.arms:
        changed_job(demo.job, demo.baselines.changes(arm), source=arm)
    with pytest.raises(ConfigError, match="no built-in scenario 'dmeo'; did you mean 'demo'"):
        builtin_scenario("dmeo")


def test_a_changed_job_keeps_what_is_not_named(scenario_file: Callable[..., Path]) -> None:
    job = load_scenario(scenario_file()).job
    changed = changed_job(job, {"training": {"rounds": 8}}, source="x")
    assert changed.training.rounds == 8
    assert changed.training.learning_rate == job.training.learning_rate
    with pytest.raises(ConfigError, match=r"unknown key 'training\.round'"):
        changed_job(job, {"training": {"round": 8}}, source="x")
