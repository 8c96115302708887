"""What a sweep varies: read, checked and refused before a trial runs."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from shared.errors import ConfigError
from simulations.sweep.spec import Range, Sweep, load_sweep, parse_axis, settings_sha256

ROOT = Path(__file__).parents[3]
MakeScenario = Callable[..., Path]
CALIBRATED = {"epsilon": 4.0, "delta": 1e-5, "sample_rate": 0.25}


@pytest.fixture
def scenario(tmp_path: Path, scenario_file: MakeScenario) -> Path:
    """A scenario whose noise is calibrated to its epsilon."""
    return calibrated(scenario_file())


def calibrated(path: Path) -> Path:
    path.write_text(re.sub(r"noise_multiplier = .*\n", "", path.read_text()))
    return path


def sweep_file(scenario: Path, **content: Any) -> Path:
    path = scenario.parent / "sweep.toml"
    path.write_text(tomli_w.dumps({"scenario": scenario.name, **content}))
    return path


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("privacy.epsilon=1,3,8", ("privacy.epsilon", [1, 3, 8])),
        ("training.learning_rate=1e-3,3e-3", ("training.learning_rate", [0.001, 0.003])),
        ("training.optimizer=sgd,adamw", ("training.optimizer", ["sgd", "adamw"])),
        ('lora.target_modules=["query"],["query","value"]', ("lora.target_modules", [["query"], ["query", "value"]])),
        (
            "training.learning_rate=1e-3:1",
            ("training.learning_rate", {"low": 0.001, "high": 1.0, "log": False, "integer": False}),
        ),
        (
            "training.learning_rate=1e-3:1:log",
            ("training.learning_rate", {"low": 0.001, "high": 1.0, "log": True, "integer": False}),
        ),
        ("lora.rank=2:8:int", ("lora.rank", {"low": 2.0, "high": 8.0, "log": False, "integer": True})),
    ],
)
def test_axes_of_the_command_line(text: str, expected: tuple[str, Any]) -> None:
    assert parse_axis(text) == expected


def test_an_axis_that_toml_cannot_read_is_text() -> None:
    for text in ("[" * 100_000, "9" * 5000, "1]\nx = [2"):
        assert parse_axis(f"lora.rank={text}") == ("lora.rank", [text])


@pytest.mark.parametrize("text", ["training.learning_rate", "=1", "training.learning_rate=", "lora.rank=2:8:cubic"])
def test_an_axis_of_another_form_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--axis"):
        parse_axis(text)


def test_an_axis_that_is_named_twice_is_refused(scenario: Path) -> None:
    with pytest.raises(ConfigError, match=r"--axis names 'privacy\.epsilon' twice; give all its values to one"):
        load_sweep(scenario, axes=["privacy.epsilon=1", "privacy.epsilon=2"])


def test_a_scenario_with_axes_and_a_sweep_file_say_the_same(scenario: Path) -> None:
    axes = {"privacy.epsilon": [1, 3], "training.learning_rate": [0.01, 0.1]}
    from_file = load_sweep(sweep_file(scenario, axes=axes, seeds=[0, 1], fixed={"training.rounds": 2}))
    from_line = load_sweep(
        scenario,
        axes=["privacy.epsilon=1,3", "training.learning_rate=0.01,0.1"],
        seeds="0,1",
        overrides=["training.rounds=2"],
    )
    assert settings_sha256(from_file.settings("x")) == settings_sha256(from_line.settings("x"))
    assert from_file.grid() == [
        {"privacy.epsilon": e, "training.learning_rate": rate} for e in (1, 3) for rate in (0.01, 0.1)
    ]
    trial = from_file.scenario({"privacy.epsilon": 3, "training.learning_rate": 0.1}, 1)
    assert (trial.job.privacy.epsilon, trial.job.training.learning_rate, trial.job.training.rounds) == (3, 0.1, 2)
    assert trial.seed == trial.job.seed == 1


def test_infinity_is_a_budget_without_mechanism_and_finite_ones_have_it(scenario: Path) -> None:
    for sweep in (
        load_sweep(scenario, axes=["privacy.epsilon=2,inf"]),
        load_sweep(sweep_file(scenario, axes={"privacy.epsilon": [2.0, float("inf")]})),
        load_sweep(scenario, axes=["privacy.epsilon=2,inf"], overrides=["privacy.mechanism=none"]),
    ):
        trials = [sweep.scenario(setting, 0).job.privacy for setting in sweep.grid()]
        assert [privacy.mechanism for privacy in trials] == ["dp-sgd", "none"]
        assert trials[0].epsilon == 2


def test_sites_that_share_the_noise_share_it_at_every_budget(scenario: Path) -> None:
    shares = ["mechanism=distributed", "max_colluding=0", "epsilon_alone=9", "noise_multiplier=none"]
    overrides = [f"privacy.{item}" for item in shares] + ["training.local_steps=1", "federation.min_sites=2"]
    sweep = load_sweep(scenario, axes=["privacy.epsilon=2,inf"], overrides=overrides)
    shared, none = (sweep.scenario(setting, 0).job.privacy for setting in sweep.grid())
    assert (shared.mechanism, shared.epsilon, shared.epsilon_alone) == ("distributed", 2, 9)
    assert (none.mechanism, none.epsilon_alone, none.max_colluding) == ("none", None, None)


def test_an_axis_may_complete_a_table_that_is_only_begun(scenario: Path) -> None:
    axes, begun = ["training.augmentation.views=2,3"], ["training.augmentation.token_dropout=0.2"]
    sweep = load_sweep(scenario, axes=axes, overrides=begun)
    trials = [sweep.scenario(setting, 0).job.training.augmentation for setting in sweep.grid()]
    assert [(trial.views, trial.token_dropout) for trial in trials if trial is not None] == [(2, 0.2), (3, 0.2)]


def test_how_a_task_is_trained_may_be_an_axis_and_what_it_asks_may_not(scenario: Path) -> None:
    axes = ["task.class_weights=[1.0, 1.0],[0.5, 1.0]", "task.label_smoothing=0,0.1", "task.thresholds=none,public"]
    sweep = load_sweep(scenario, axes=axes)
    trials = [sweep.scenario(setting, 0).job.task for setting in sweep.grid()]
    assert [trial.class_weights for trial in trials] == [(1, 1)] * 4 + [(0.5, 1)] * 4
    assert [trial.label_smoothing for trial in trials[:4]] == [0, 0, 0.1, 0.1]
    assert [trial.thresholds for trial in trials[:2]] == ["none", "public"]
    assert not {"class_weights", "label_smoothing", "thresholds"} & {*sweep.settings(None)["job"]["task"]}


def test_baselines_and_repeats_become_seeds(scenario_file: MakeScenario) -> None:
    path = calibrated(scenario_file(seed=4, simulation={"repeats": 3}, baselines={"arms": ["non-private"]}))
    sweep = load_sweep(path, axes=["training.learning_rate=0.1,0.2"])
    assert sweep.seeds == (4, 5, 6)
    trial = sweep.scenario(sweep.first(), 5)
    assert trial.baselines.arms == ()
    assert trial.simulation.repeats == 1


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        (["training.learning_rat=1,2"], "training.learning_rat"),
        (["trainin.learning_rate=1,2"], "did you mean 'training'"),
        (["seed=1,2"], "--seeds"),
        (["privacy.delta=1e-5,1e-6"], "one frontier"),
        (["privacy.mechanism=none,dp-sgd"], "write inf"),
        (["data.num_test=10,12"], "cannot be compared"),
        (["task.labels=['a','b'],['c','d']"], "of the task label_smoothing, class_weights"),
        (["compute.device=cpu,auto"], "cannot be an axis"),
        (["training.learning_rate=1,1.0"], "holds a value twice"),
        (["training.learning_rate=1,inf"], "only privacy.epsilon takes"),
        (["training.learning_rate=1,-2"], "training.learning_rate -2"),
        (["training.learning_rate=1,2020-01-01"], "finite numbers, texts"),
        (["privacy.epsilon=1,much"], "expected numbers above 0, or inf"),
        (["training.learning_rate=0.1:1"], "a range, which only search = 'optuna' takes"),
        (["privacy.epsilon=1,3", "privacy.noise_multiplier=1,2"], "cannot be varied beside it"),
        ([], "names no axes"),
    ],
)
def test_a_bad_axis_is_refused(scenario: Path, axes: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load_sweep(scenario, axes=axes)
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"search": "optuna"}, "needs `trials`"),
        ({"trials": 3}, "a grid runs every combination"),
        ({"search": "random"}, "search"),
        ({"seeds": "0,0"}, "distinct"),
        ({"seeds": "0,a"}, "--seeds"),
        ({"seeds": "0,1_3"}, "--seeds"),
        ({"search": "optuna", "trials": 2, "axes": ["privacy.epsilon=1,2"]}, "besides privacy.epsilon"),
        ({"search": "optuna", "trials": 2, "axes": ["privacy.epsilon=1:2"]}, "not a range"),
        ({"search": "optuna", "trials": 2, "axes": ["training.learning_rate=0:2:log"]}, "logarithmic"),
        ({"search": "optuna", "trials": 2, "axes": ["lora.rank=2.5:4:int"]}, "fraction"),
        (
            {
                "axes": [
                    f"training.local_steps={','.join(map(str, range(1, 200)))}",
                    f"training.rounds={','.join(map(str, range(1, 100)))}",
                ]
            },
            "19,701 settings",
        ),
    ],
)
def test_a_bad_search_is_refused(scenario: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load_sweep(scenario, **{"axes": ["training.learning_rate=0.1,0.2"], **options})
    assert message in str(refused.value)


def test_epsilon_is_no_axis_where_the_noise_is_given(scenario_file: MakeScenario) -> None:
    with pytest.raises(ConfigError, match=r"sets privacy\.noise_multiplier, which decides the noise"):
        load_sweep(scenario_file(), axes=["privacy.epsilon=1,3"])


def test_unknown_keys_of_a_sweep_file_are_refused(scenario: Path) -> None:
    with pytest.raises(ConfigError, match="unknown key 'seed'; did you mean 'seeds'"):
        load_sweep(sweep_file(scenario, axes={"lora.rank": [2]}, seed=[1]))


def identity(path: Path, **options: Any) -> str:
    return settings_sha256(load_sweep(path, **{"axes": ["training.learning_rate=0.1,0.2"], **options}).settings("data"))


def test_the_identity_of_a_sweep_follows_what_decides_results_and_nothing_else(scenario: Path) -> None:
    same = identity(scenario)
    assert identity(scenario, overrides=["compute.micro_batch_tokens=64", "simulation.threads=2"]) == same
    assert identity(scenario, overrides=["training.learning_rate=9"]) == same, "the axis decides that key"
    for options in (
        {"axes": ["training.learning_rate=0.1"]},
        {"seeds": "0,1"},
        {"overrides": ["training.rounds=7"]},
        {"overrides": ["partition.num_sites=2"]},
        {"overrides": ["simulation.dropout_probability=0.1"]},
        {"overrides": ["privacy.epsilon=1"]},
        {"overrides": ["data.split_seed=1"]},
    ):
        assert identity(scenario, **options) != same, options
    sweep = load_sweep(scenario, axes=["training.learning_rate=0.1,0.2"])
    assert settings_sha256(sweep.settings("other data")) != same


def test_optuna_may_be_asked_for_more_settings_later(scenario: Path) -> None:
    axes = ["training.learning_rate=0.01:1:log"]
    few, many = (identity(scenario, axes=axes, search="optuna", trials=number) for number in (2, 9))
    assert few == many
    config = load_sweep(scenario, axes=axes, search="optuna", trials=2).config
    assert config.axes["training.learning_rate"] == Range(low=0.01, high=1.0, log=True)


def test_the_sweep_file_of_the_documentation_is_valid(tmp_path: Path) -> None:
    blocks = re.findall(r"```toml\n(.*?)```", (ROOT / "docs" / "sweeps.md").read_text(), flags=re.DOTALL)
    assert blocks
    path = tmp_path / "sweep.toml"
    path.write_text(blocks[0].replace("simulations/demo.toml", str(ROOT / "simulations" / "demo.toml")))
    sweep = load_sweep(path)
    assert isinstance(sweep, Sweep)
    assert sweep.scenario(sweep.first(), sweep.seeds[0]).data.declared_kind == "public"
