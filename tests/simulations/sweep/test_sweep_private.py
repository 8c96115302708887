"""Tuning on private data: refused unless its cost is counted, and then only the selected trial is left."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shared.errors import ConfigError
from shared.privacy.plan import PrivacyPlan
from simulations.sweep import private, run
from simulations.sweep.journal import TrialResult
from simulations.sweep.selection import NumTrials, selection_epsilon
from simulations.sweep.spec import load_sweep

MakeScenario = Callable[..., Path]
Silotune = Callable[..., Any]
AXIS = ("--axis", "training.learning_rate=0.01,0.1")
ACCOUNT = ("--account-tuning", "--mean-trials", "2")


@pytest.fixture
def scenario(scenario_file: MakeScenario, tmp_path: Path) -> Path:
    """Private records at one site, a public file for evaluation."""
    return write(scenario_file, tmp_path)


def write(scenario_file: MakeScenario, folder: Path, **sections: Any) -> Path:
    columns = {"text": "review", "label": "verdict"}
    rows = [
        f"{text},{label}"
        for text in ("a fine film", "a quiet joy", "dull plot", "it bores")
        for label in ("good", "bad")
    ]
    (folder / "test.csv").write_text("\n".join(["review,verdict", *rows]))
    data = {
        "train": {"path": "train.csv", "columns": columns},
        "test": {"path": "test.csv", "columns": columns},
        "kind": "private",
        "test_kind": "public",
    }
    defaults: dict[str, Any] = {
        "data": data,
        "partition": {"num_sites": 1},
        "training": {"rounds": 1, "local_steps": 2},
        "privacy": {"delta": 1e-5, "sample_rate": 0.25, "noise_multiplier": 1.0},
    }
    for name, value in sections.items():
        defaults[name] = {**defaults[name], **value}
    return scenario_file(**defaults)


def fixed_number(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    monkeypatch.setattr(private, "draw_num_trials", lambda law: number)


def test_only_the_selected_trial_is_left(
    scenario: Path, tmp_path: Path, silotune: Silotune, monkeypatch: pytest.MonkeyPatch
) -> None:
    fixed_number(monkeypatch, 4)
    real, scores = run.run_trial, []

    def noted(*arguments: Any, **options: Any) -> TrialResult:
        result = real(*arguments, **options)
        # Scores that stand nowhere else, so that a leak of one can be searched for.
        result = result.model_copy(update={"score": float(f"0.12345{len(scores)}")})
        scores.append(result)
        return result

    monkeypatch.setattr(run, "run_trial", noted)
    outcome = silotune("sweep", scenario, *AXIS, *ACCOUNT, "--out", tmp_path / "out")
    assert outcome.status == 0, outcome.err
    assert len(scores) == 4
    left = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert {"outcome.json", ".lock", "selected/evaluation.json", "selected/job.json"} <= left
    assert all(
        name.startswith("selected/adapter/")
        for name in left - {"outcome.json", ".lock", "selected/evaluation.json", "selected/job.json"}
    )
    content = json.loads((tmp_path / "out" / "outcome.json").read_text())
    assert content["selected"]["score"] == 0.123453, "the best, which was the last"
    everything = (
        outcome.out
        + outcome.err
        + "".join(p.read_text(errors="replace") for p in (tmp_path / "out").rglob("*") if p.is_file())
    )
    for hidden in ("0.123450", "0.12345,", "0.12345\n", "0.123451", "0.123452", "created", '"seconds"', "data.jsonl"):
        assert hidden not in everything, hidden
    # The records themselves, and the SHA-256 of the data, are not there either.
    assert "the film is a quiet joy from start to end a dull plot" not in everything
    job = json.loads((tmp_path / "out" / "selected" / "job.json").read_text())
    assert job["training"]["learning_rate"] == content["selected"]["setting"]["training.learning_rate"]
    predicted = silotune("predict", tmp_path / "out" / "selected", "a quiet joy")
    assert predicted.status == 0, predicted.err


def test_the_statement_names_the_total_and_what_it_covers(
    scenario: Path, tmp_path: Path, silotune: Silotune, monkeypatch: pytest.MonkeyPatch
) -> None:
    fixed_number(monkeypatch, 1)
    outcome = silotune("sweep", scenario, *AXIS, *ACCOUNT, "--out", tmp_path / "out", "--json")
    assert outcome.status == 0, outcome.err
    content = json.loads(outcome.out)
    plan = PrivacyPlan.from_job(load_sweep(scenario, axes=[AXIS[1]]).scenario({}, 0).job)
    law = NumTrials(distribution="geometric", mean=2.0)
    expected = selection_epsilon([plan.mechanism(plan.planned_steps)], law, delta=1e-5)
    assert content["epsilon"] == pytest.approx(expected, rel=1e-12)
    assert content["epsilon_one_trial"] == pytest.approx(plan.epsilon(), rel=1e-9)
    assert content["epsilon"] > content["epsilon_one_trial"]
    for text in (
        f"{math.ceil(expected * 1000) / 1000:.3f}, 1e-05",
        "geometric",
        "mean 2",
        "uniformly among 2",
        "one record",
    ):
        assert text in content["statement"]
    assert any("How many trials" in text for text in content["not_covered"])
    again = silotune("sweep", scenario, *AXIS, *ACCOUNT, "--out", tmp_path / "out", "--resume", "--json")
    assert json.loads(again.out) == content
    refused = silotune("sweep", scenario, *AXIS, *ACCOUNT, "--out", tmp_path / "out")
    assert refused.status == 1
    assert "a second one costs again" in refused.err


def test_number_and_settings_are_drawn_once_and_survive_an_interruption(
    scenario: Path, tmp_path: Path, silotune: Silotune, monkeypatch: pytest.MonkeyPatch
) -> None:
    fixed_number(monkeypatch, 5)
    real, ran = run.run_trial, []

    def interrupted(sweep: Any, setting: Any, *arguments: Any, **options: Any) -> TrialResult:
        if len(ran) == 2:
            raise KeyboardInterrupt
        ran.append(setting)
        return real(sweep, setting, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(run, "run_trial", interrupted)
        assert silotune("sweep", scenario, *AXIS, *ACCOUNT, "--out", tmp_path / "out").status == 130
    state = tmp_path / "out" / ".private" / "state.json"
    drawn = json.loads(state.read_text())["choices"]
    assert len(drawn) == 5
    assert state.parent.stat().st_mode & 0o077 == 0, "only the owner reads what is not released"
    assert not (tmp_path / "out" / "outcome.json").exists()
    fixed_number(monkeypatch, 1)  # a second draw would be seen
    refused = silotune("sweep", scenario, *AXIS, *ACCOUNT, "--out", tmp_path / "out")
    assert "unfinished selection" in refused.err
    other = silotune(
        "sweep", scenario, *AXIS, *ACCOUNT, "--out", tmp_path / "out", "--resume", "--set", "training.rounds=2"
    )
    assert "other settings or other data" in other.err
    rest: list[Any] = []
    monkeypatch.setattr(
        run, "run_trial", lambda s, setting, *a, **k: (rest.append(setting), real(s, setting, *a, **k))[1]
    )
    done = silotune("sweep", scenario, *AXIS, *ACCOUNT, "--out", tmp_path / "out", "--resume")
    assert done.status == 0, done.err
    grid = load_sweep(scenario, axes=[AXIS[1]]).grid()
    assert ran + rest == [grid[place] for place, _ in drawn]
    assert not state.parent.exists()


def test_a_failed_trial_counts_as_the_worst_and_is_not_drawn_again(tmp_path: Path, scenario: Path) -> None:
    sweep = load_sweep(scenario, axes=[AXIS[1]])
    selection = private.plan_selection(sweep, NumTrials(distribution="geometric", mean=3.0))
    calls: list[Path] = []

    def run_one(setting: Any, seed: int, place: Path) -> TrialResult:
        calls.append(place)
        failed = len(calls) == 1
        for name in ("evaluation.json", "job.json", "adapter/x"):
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            (place / name).write_text(place.name)
        return TrialResult(
            key="", setting=setting, seed=seed, status="failed" if failed else "completed", reason="x", delta=1e-5,
            metric="m", higher_is_better=True, score=None if failed else -1.0 * len(calls), seconds=1, job_sha256="",
        )  # fmt: skip

    work = tmp_path / "out"
    work.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(private, "draw_num_trials", lambda law: 3)
        outcome = private.run_selection(selection, work, run_one=run_one, data_sha256="", resume=False)
    assert len(calls) == 3
    assert outcome["selected"]["score"] == -2.0
    assert (work / "selected" / "job.json").read_text() == "1"


def test_no_trial_at_all_is_an_outcome_of_a_poisson_number(
    scenario: Path, tmp_path: Path, silotune: Silotune, monkeypatch: pytest.MonkeyPatch
) -> None:
    fixed_number(monkeypatch, 0)
    outcome = silotune("sweep", scenario, *AXIS, *ACCOUNT, "--trial-distribution", "poisson", "--out", tmp_path / "out")
    assert outcome.status == 0, outcome.err
    assert "nothing was selected" in outcome.out
    content = json.loads((tmp_path / "out" / "outcome.json").read_text())
    assert content["selected"] is None
    assert "theorem 6" in content["statement"]


@pytest.mark.parametrize(
    ("sections", "arguments", "message"),
    [
        ({"data": {"test_kind": "private"}}, (), "selects by a score on public records"),
        ({"partition": {"num_sites": 2}}, (), "one record more or less moves others"),
        ({"privacy": {"mechanism": "none"}}, (), "adds no noise"),
        ({}, ("--search", "optuna", "--trials", "3"), "looks at earlier trials"),
        ({}, ("--mean-trials", "1"), "above 1"),
        ({}, ("--trial-distribution", "fixed"), "expected one of geometric"),
        ({}, ("--axis", "partition.num_sites=1,2"), "one record more or less moves others"),
    ],
)
def test_what_cannot_be_accounted_is_refused_before_anything_is_written(
    scenario_file: MakeScenario, tmp_path: Path, silotune: Silotune,
    sections: dict[str, Any], arguments: tuple[str, ...], message: str,
) -> None:  # fmt: skip
    path = write(scenario_file, tmp_path, **sections)
    outcome = silotune("sweep", path, *AXIS, *ACCOUNT, *arguments, "--out", tmp_path / "out")
    assert outcome.status in (1, 2)
    assert message in outcome.err
    assert "Traceback" not in outcome.err
    assert not (tmp_path / "out").exists()


def test_held_out_private_records_are_no_public_evaluation(
    scenario_file: MakeScenario, tmp_path: Path, silotune: Silotune
) -> None:
    path = scenario_file(partition={"num_sites": 1})
    outcome = silotune("sweep", path, *AXIS, *ACCOUNT, "--out", tmp_path / "out")
    assert outcome.status == 1
    assert "data.test_kind" in outcome.err


def test_several_budgets_are_refused(scenario: Path) -> None:
    text = scenario.read_text().replace("noise_multiplier = 1.0\n", "")
    scenario.write_text(text)
    sweep = load_sweep(scenario, axes=["privacy.epsilon=1,3"])
    with pytest.raises(ConfigError, match="takes one budget"):
        private.plan_selection(sweep, NumTrials(distribution="geometric", mean=3.0))


def test_two_promises_of_a_job_are_not_accounted_as_one(scenario: Path) -> None:
    changes = [
        "privacy.mechanism=distributed",
        "privacy.max_colluding=0",
        "training.local_steps=1",
        "federation.min_sites=2",
    ]
    sweep = load_sweep(scenario, axes=["training.learning_rate=0.1,0.2"], overrides=changes)
    with pytest.raises(ConfigError, match=r"jobs of privacy\.mechanism 'distributed' make two"):
        private.plan_selection(sweep, NumTrials(distribution="geometric", mean=3.0))


def test_a_folder_with_other_things_is_left_alone(scenario: Path, tmp_path: Path, silotune: Silotune) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("x")
    outcome = silotune("sweep", scenario, *AXIS, *ACCOUNT, "--out", tmp_path / "out")
    assert outcome.status == 1
    assert "holds no selection" in outcome.err
