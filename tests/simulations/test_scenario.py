"""Scenario files: one file, one job, every key known."""

from __future__ import annotations

import csv
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shared.errors import ConfigError, DataError, ModelError
from simulations.scenario import Scenario, builtin_scenario, changed_job, load_scenario
from simulations.sweep.spec import load_sweep


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
        ({"epsilon": 3}, "unknown key 'epsilon'; did you mean 'privacy.epsilon'?"),
        ({"num_sites": 3}, "unknown key 'num_sites'; did you mean 'partition.num_sites'?"),
        ({"training": {"rounds": "many"}}, "training.rounds: expected a whole number (found 'many')"),
        ({"privacy": {"epsilon": -1}}, "privacy.epsilon: expected a number greater than or equal to 1e-06 (found -1)"),
        ({"privacy": 3}, "privacy: expected named keys, as a section has (found 3)"),
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


def test_a_scenario_that_ships_goes_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_scenario(Path("demo"), ["training.rounds=2"]).job == builtin_scenario("demo", ["training.rounds=2"]).job
    assert load_sweep(Path("demo"), axes=["training.rounds=1,2"]).name == "demo"
    with pytest.raises(ConfigError, match="nor is it the name of a scenario that ships; did you mean 'demo'"):
        load_scenario(Path("dmeo"))
    for other in ("demo.toml", "here/demo"):
        with pytest.raises(ConfigError, match="does not exist; check the path"):
            load_scenario(Path(other))
    (tmp_path / "demo").write_text("name = 'mine'")
    with pytest.raises(ConfigError, match="demo is not valid"):  # a file of that name counts
        load_scenario(Path("demo"))


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


def test_a_relative_backbone_starts_from_the_scenario_or_from_where_one_stands(
    scenario_file: Callable[..., Path], tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside, elsewhere = tmp_path / "models" / "bert", tmp_path / "elsewhere"
    shutil.copytree(tiny_bert, beside)
    shutil.copytree(tiny_bert, elsewhere / "here")
    path = scenario_file(model={"backbone": "models/bert"})
    monkeypatch.chdir(elsewhere)
    assert load_scenario(path).job.model.backbone == str(beside)
    assert load_scenario(path, ["model.backbone=./here"]).job.model.backbone == str(elsewhere / "here")
    assert load_scenario(path, ["model.backbone=someone/bert"]).job.model.backbone == "someone/bert"
    with pytest.raises(ModelError, match=r"'\./gone' is not a folder below .* nor .*elsewhere; check the path"):
        load_scenario(path, ["model.backbone=./gone"])


def test_a_run_with_a_relative_backbone_works_from_every_folder(
    silotune: Callable[..., Any],
    scenario_file: Callable[..., Path],
    tiny_bert: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shutil.copytree(tiny_bert, tmp_path / "bert")
    path, run = scenario_file(model={"backbone": "./bert"}), tmp_path / "run"
    monkeypatch.chdir(tmp_path)
    assert silotune("simulate", path.name, "--out", "run", "--stop-after", 1).status == 0
    monkeypatch.chdir("/")
    for words in (["simulate", path, "--out", run, "--resume"], ["predict", run, "a dull plot"], ["report", run]):
        outcome = silotune(*words)
        assert outcome.status == 0, outcome.err
    assert json.loads((run / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        tmp_path / "bert"
    )


def test_sites_are_shown_by_their_own_names(
    silotune: Callable[..., Any], scenario_file: Callable[..., Path], tmp_path: Path
) -> None:
    path = scenario_file(partition={"kind": "column", "column": "place", "num_sites": 4})
    names = ["北京", "上海", "Köln", "Koln"]
    rows = [(f"a dull plot {i}", ["good", "bad"][i % 2], names[i // 2 % 4]) for i in range(80)]
    with (tmp_path / "train.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("review", "verdict", "place"), *rows])
    outcome = silotune("simulate", path, "--out", tmp_path / "run", "--set", "data.train.columns.place=place")
    assert outcome.status == 0, outcome.err
    kept = json.loads((tmp_path / "run" / "run.json").read_text())["dataset"]["site_names"]
    assert kept == {"xn--1lq90i": "北京", "xn--fhqz97e": "上海", "koln": "Koln", "koln-2": "Köln"}
    assert silotune("report", tmp_path / "run", "--format", "html").status == 0
    for page in ("report.html", "compliance-report.html"):
        text = (tmp_path / "run" / page).read_text(encoding="utf-8")
        assert all(f"{real} ({name})" in text for name, real in kept.items()), page
        assert "site, 上海 (xn--fhqz97e)." in text or "site 上海 (xn--fhqz97e) released" in text
        bare = r"(?<![(\w/-])xn--(1lq90i|fhqz97e)"  # but for paths and the names of data sets
        assert not re.search(bare, text), page
    assert "(this command: 1 training with evaluation, audit and report; the report's time is" in outcome.out
