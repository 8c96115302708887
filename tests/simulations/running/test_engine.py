"""The engine: everything is checked before anything is written, and sites are never mixed up."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import dp_accounting
import pytest
import tomli_w
from dp_accounting.pld import pld_privacy_accountant

from client.ledger.ledger import Budget, Ledger
from server.rounds.observer import Observer
from server.store.checkpoint import Checkpoint
from shared.errors import ConfigError, DataError, ModelError, PrivacyError, RunError, SilotuneError
from shared.models.frozen_cache import shared_cache
from shared.privacy.accounting import compose_epsilon
from simulations.audit.run import audit_run_mechanism
from simulations.federation.run import run_federation
from simulations.running.engine import run_scenario
from simulations.scenario import load_scenario

MakeScenario = Callable[..., Path]


def run(path: Path, folder: Path, *, overrides: tuple[str, ...] = (), **options: object) -> Checkpoint:
    scenario = load_scenario(path, overrides)
    return run_scenario(scenario, folder, observer=lambda arm: Observer(), **options)  # type: ignore[arg-type]


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_run_leaves_a_folder_that_stands_alone(scenario_file: MakeScenario, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    arms = ["central-dp", "non-private", "federated-non-private"]
    finished = run(scenario_file(baselines={"arms": arms, "non_private": {"training": {"rounds": 1}}}), folder)
    assert finished.round_number == 3
    for name in ("job.json", "checkpoint.safetensors", "metrics.jsonl", "statement.json", "report.html", "run.json"):
        assert (folder / name).stat().st_size > 0, name
    assert json.loads((folder / "run.json").read_text())["status"] == "completed"
    # How many private records there are is told by no arm: each site's declared size is public, the exact number is not.
    for recorded in [folder / "run.json", *folder.glob("baselines/*/run.json")]:
        assert "train_records" not in json.loads(recorded.read_text())["dataset"]
    for number in (1, 2, 3):
        home = folder / "sites" / f"site-{number}" / "home"
        rows = [json.loads(line) for line in (home / "data.jsonl").read_text().splitlines()]
        assert len(rows) == 16
        ledger = Ledger(
            home / "ledger.db", dataset=f"small-site-{number}", unit="record", budget=Budget(epsilon=99, delta=1e-5)
        )
        assert sum(event.steps for event in ledger.events()) == 6
        privacy = json.loads((folder / "sites" / f"site-{number}" / "privacy.json").read_text())
        assert privacy["steps_executed"] == privacy["steps_planned"] == 6
        assert privacy["epsilon_spent"] == pytest.approx(ledger.spent_epsilon(), rel=1e-9)
        assert privacy["epsilon_spent"] <= privacy["epsilon_budget"] * (1 + 1e-9)
    # Baselines: one trusted site with all records, or all sites without noise.
    for arm, sites, private in (
        ("central-dp", 1, True),
        ("non-private", 1, False),
        ("federated-non-private", 3, False),
    ):
        records = [json.loads(p.read_text()) for p in sorted((folder / "baselines" / arm).glob("sites/*/privacy.json"))]
        assert [record["private"] for record in records] == [private] * sites
        assert (folder / "baselines" / arm / "evaluation.json").exists()
    assert "WITHOUT noise" in (folder / "baselines" / "non-private" / "statement.json").read_text()


def test_texts_that_pass_through_the_frozen_layers_are_told_of(scenario_file: MakeScenario, tmp_path: Path) -> None:
    class Told(Observer):
        """Keeps what it hears of."""

        seen: ClassVar[list[int]] = []

        def preparing(self, done: int, of: int) -> None:
            """Note how many there are."""
            self.seen.append(of)

    shared_cache.cache_clear()
    scenario = load_scenario(scenario_file(training={"rounds": 1}, seed=4711))
    run_scenario(scenario, tmp_path / "run", observer=lambda arm: Told())
    assert 20 < max(Told.seen) <= 36  # so many different texts there are


@pytest.mark.parametrize(
    ("sections", "error", "message"),
    [
        ({"lora": {"target_modules": ["quary"]}}, ModelError, "did you mean 'query'"),
        ({"lora": {"last_layers": 9}}, ModelError, "the backbone has 3 layers"),
        ({"model": {"backbone": "/no/such/folder"}}, ModelError, "is not a folder"),
        ({"model": {"max_length": 999}}, ConfigError, "64 positions"),
        ({"partition": {"num_sites": 49}}, DataError, "48 records cannot give 49 sites"),
        ({"federation": {"min_sites": 4}}, DataError, "the partition has 3 sites"),
        ({"privacy": {"delta": 0.07}}, PrivacyError, "site-1: privacy.delta is 0.07"),
        (
            {"task": {"labels": ["bad", "fine"]}},
            DataError,
            "that is not among task.labels (bad, fine)",
        ),
        ({"partition": {"kind": "column", "column": "label", "num_sites": 2}}, DataError, "one and the same label"),
        ({"task": {"kind": "causal_lm", "labels": []}}, ModelError, "left-to-right"),
        ({"baselines": {"arms": ["central-dp"], "central_dp": {"lora": {"rang": 1}}}}, ConfigError, "lora.rang"),
        (
            {"baselines": {"arms": ["central-dp"], "central_dp": {"lora": {"target_modules": ["zz"]}}}},
            ModelError,
            "'zz', which matches no linear layer",
        ),
        ({"data": {"num_test": 60}}, DataError, ""),
    ],
)
def test_a_mistake_is_found_before_anything_is_written(
    scenario_file: MakeScenario, tmp_path: Path, sections: dict[str, object], error: type[SilotuneError], message: str
) -> None:
    with pytest.raises(error) as refused:
        run(scenario_file(**sections), tmp_path / "run")
    assert message in str(refused.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "changes", [{}, {"privacy": {"unit": "patient", "records_per_person": 1}}, {"data": {"num_test": 47}}]
)
def test_a_record_that_does_not_fit_is_named_by_its_row_in_the_file(
    scenario_file: MakeScenario, tmp_path: Path, changes: dict[str, dict[str, Any]]
) -> None:
    """Whichever site has it, in whatever place, and also if it was held out."""
    scenario = scenario_file(task={"kind": "token_classification", "labels": ["O", "B-x"]}, **changes)
    records = [{"words": [f"a{row}", "film"], "marks": ["O", "B-x"], "who": f"p{row}"} for row in range(60)]
    records[36]["words"] = ["a", " "]
    (tmp_path / "words.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    raw = tomllib.loads(scenario.read_text())
    columns = {"tokens": "words", "tags": "marks"} | ({"person": "who"} if "privacy" in changes else {})
    raw["data"]["train"] = {"path": "words.jsonl", "columns": columns}
    scenario.write_text(tomli_w.dumps(raw))
    with pytest.raises(
        DataError, match=r"^(site-\d|the evaluation data): row 37 of the file has no words, or an empty one"
    ):
        run(scenario, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_real_processes_are_not_started_for_too_few_sites(scenario_file: MakeScenario, tmp_path: Path) -> None:
    scenario = load_scenario(scenario_file(federation={"min_sites": 4}))
    with pytest.raises(
        DataError, match=r"the partition has 3 sites, federation\.min_sites is 4; lower it or add sites\."
    ):
        run_federation(scenario, tmp_path / "run", as_json=True)
    assert not (tmp_path / "run").exists()


def test_a_test_file_with_a_foreign_label_is_found_before_anything_is_written(
    scenario_file: MakeScenario, tmp_path: Path
) -> None:
    (tmp_path / "test.csv").write_text("review,verdict\nfine,good\nodd,unknown\n")
    columns = {"text": "review", "label": "verdict"}
    data = {"train": {"path": "train.csv", "columns": columns}, "test": {"path": "test.csv", "columns": columns}}
    with pytest.raises(DataError, match=r"test\.csv: 1 of 2 rows have a label in column 'verdict' .* at row 2\."):
        run(scenario_file(data=data), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_nothing_is_written_into_a_folder_that_is_taken(scenario_file: MakeScenario, tmp_path: Path) -> None:
    path, folder = scenario_file(), tmp_path / "run"
    run(path, folder, stop_after=1)
    before = snapshot(folder)
    with pytest.raises(RunError, match="holds a run already; resume it with --resume"):
        run(path, folder)
    with pytest.raises(RunError, match="another configuration"):
        run(path, folder, overrides=("training.rounds=4",), resume=True)
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunError, match="is a file"):
        run(path, tmp_path / "file")
    assert snapshot(folder) == before


@pytest.mark.parametrize("change", ["more sites", "fewer sites", "other data", "other seed"])
def test_a_run_is_not_resumed_on_other_data(scenario_file: MakeScenario, tmp_path: Path, change: str) -> None:
    """Homes with their ledgers are kept, so a changed partition must not silently meet the old data."""
    folder = tmp_path / "run"
    path = scenario_file()
    run(path, folder, stop_after=1)
    before = {n: b for n, b in snapshot(folder).items() if n != "run.json"}
    rows = [(f"another text {i}", ["good", "bad"][i % 2]) for i in range(60)]
    changed = {
        "more sites": lambda: scenario_file(partition={"num_sites": 4}),
        "fewer sites": lambda: scenario_file(partition={"num_sites": 2}),
        "other data": lambda: scenario_file(rows=rows),
        "other seed": lambda: scenario_file(partition={"kind": "quantity", "alpha": 0.5}),
    }[change]()
    with pytest.raises(RunError, match="with the scenario that the run was started with"):
        run(changed, folder, resume=True)
    assert {n: b for n, b in snapshot(folder).items() if n != "run.json"} == before
    assert run(scenario_file(), folder, resume=True).round_number == 3


def test_settings_that_only_change_speed_may_change_on_the_way(scenario_file: MakeScenario, tmp_path: Path) -> None:
    path, folder = scenario_file(), tmp_path / "run"
    run(path, folder, stop_after=1)
    changed = ("compute.micro_batch_tokens=64", "compute.cache_frozen_layers=false")
    assert run(path, folder, resume=True, overrides=changed).round_number == 3


def test_drop_outs_are_recorded_and_cost_no_privacy(scenario_file: MakeScenario, tmp_path: Path) -> None:
    path = scenario_file(simulation={"dropout_probability": 0.4}, training={"rounds": 5, "local_steps": 1}, seed=5)
    finished = run(path, tmp_path / "run")
    lost = [name for record in finished.history for name in record.failed]
    assert lost
    for name, release in finished.releases.items():
        assert release.steps == 5 - lost.count(name)
    assert all("dropped out" in reason for record in finished.history for reason in record.failed.values())


def test_exact_aggregation_runs_through(scenario_file: MakeScenario, tmp_path: Path) -> None:
    finished = run(scenario_file(lora={"train": "both"}, training={"rounds": 2}), tmp_path / "run")
    residuals = [tensor for name, tensor in finished.adapter.items() if name.endswith(".residual")]
    assert len(residuals) == 4
    assert all(bool(tensor.any()) for tensor in residuals)


def test_site_metrics_are_released_once_and_paid_for(scenario_file: MakeScenario, tmp_path: Path) -> None:
    rows = [(f"{text} {i}", ["good", "bad"][i % 2]) for i, text in enumerate(["a warm film", "a dull plot"] * 60)]
    path = scenario_file(
        rows=rows,
        data={"evaluation_share": 0.4},
        site_metrics={"names": ["accuracy", "confusion", "loss"], "noise_multiplier": 2.0},
        baselines={"arms": ["federated-non-private", "central-dp"]},
    )
    finished = run(path, tmp_path / "run")
    record = json.loads((tmp_path / "run" / "site_metrics.json").read_text())
    assert sorted(record["sites"]) == ["site-1", "site-2", "site-3"]
    assert [found["metric"] for found in record["estimates"]] == ["accuracy", "confusion", "loss"]
    assert "On the sites' own records" in (tmp_path / "run" / "report.html").read_text()
    for name, release in finished.releases.items():
        privacy = json.loads((tmp_path / "run" / "sites" / name / "privacy.json").read_text())
        # An accountant alone, from the file.
        accountant = pld_privacy_accountant.PLDAccountant(value_discretization_interval=1e-3)
        for event in privacy["events"]:
            noise = dp_accounting.GaussianDpEvent(event["noise_multiplier"])
            accountant.compose(dp_accounting.PoissonSampledDpEvent(event["sample_rate"], noise), event["steps"])
        assert accountant.get_epsilon(1e-5) == pytest.approx(privacy["epsilon_spent"], rel=1e-6)
        assert privacy["epsilon_spent"] > compose_epsilon(release.events, 1e-5) + 0.1
        assert privacy["metrics"]["names"] == ["accuracy", "confusion", "loss"]
        assert "one release of counts (accuracy, confusion, loss)" in privacy["statement"]
        home = tmp_path / "run" / "sites" / name / "home"
        ledger = Ledger(
            home / "ledger.db", dataset=f"small-{name}", unit="record", budget=Budget(epsilon=99, delta=1e-5)
        )
        assert ledger.spent_epsilon() == pytest.approx(release.epsilon, rel=1e-9)
    for arm in ("federated-non-private", "central-dp"):
        assert (tmp_path / "run" / "baselines" / arm / "site_metrics.json").exists() == (arm == "central-dp")
    assert run(path, tmp_path / "run", resume=True).site_metrics == finished.site_metrics
    assert audit_run_mechanism(tmp_path / "run").verdict == "consistent"
    record = tmp_path / "run" / "sites" / "site-1" / "privacy.json"
    claimed = json.loads(record.read_text())
    training_alone = compose_epsilon(finished.releases["site-1"].events, 1e-5)
    for path in (tmp_path / "run").glob("sites/*/privacy.json"):
        path.write_text(json.dumps(claimed | {"epsilon_spent": training_alone}))
    assert "accounting" in audit_run_mechanism(tmp_path / "run").failed


def test_runs_in_one_process_never_meet_each_others_sites(
    write_scenario: MakeScenario, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, name in enumerate(("first", "second")):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        scenario = write_scenario(Path(), name=name, partition={"num_sites": 2 + number}, training={"rounds": 1})
        run(scenario, Path("run"))
        for home in sorted(Path("run/sites").glob("*/home")):
            ledger = Ledger(
                home / "ledger.db",
                dataset=f"{name}-{home.parent.name}",
                unit="record",
                budget=Budget(epsilon=99, delta=1e-5),
            )
            assert sum(event.steps for event in ledger.events()) == 2
