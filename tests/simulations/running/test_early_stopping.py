"""Early stopping in whole simulated runs: ledgers, statement, reports, baselines and repeats follow what was executed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from client.ledger.ledger import Budget, Ledger
from server.rounds.observer import Observer
from server.runs.folder import load_job
from server.store.checkpoint import Checkpoint, load_checkpoint
from shared.epsilons import rounded_up
from shared.errors import ConfigError
from shared.job.compute import ComputeConfig
from shared.privacy.accounting import GaussianSteps, compose_epsilon
from shared.privacy.statement import STOPPED_EARLY
from shared.runtime.export.peft import load_state
from shared.runtime.inference import load_tuned
from simulations.running.engine import run_scenario
from simulations.scenario import load_scenario

MakeScenario = Callable[..., Path]

# Accuracy cannot improve by 1: the run stops after as many evaluations as the patience says.
NEVER = {"patience": 2, "min_delta": 1.0}


def stopping(rule: dict[str, Any], **sections: Any) -> dict[str, Any]:
    return {"training": {"rounds": 5, "early_stopping": rule}, "data": {"kind": "synthetic"}, **sections}


def run(path: Path, folder: Path, **options: Any) -> Checkpoint:
    return run_scenario(load_scenario(path), folder, observer=lambda arm: Observer(), **options)


def test_everything_follows_the_executed_rounds(
    scenario_file: MakeScenario, tmp_path: Path, silotune: Callable[..., Any]
) -> None:
    path, folder = scenario_file(**stopping(NEVER, baselines={"arms": ["non-private"]})), tmp_path / "run"
    assert run(path, folder).round_number == 2
    executed = GaussianSteps(noise_multiplier=1.0, sample_rate=0.25, steps=4)
    epsilon = compose_epsilon([executed], 1e-5)
    promised = compose_epsilon([replace(executed, steps=10)], 1e-5)
    for number in (1, 2, 3):
        site = folder / "sites" / f"site-{number}"
        ledger = Ledger(
            site / "home" / "ledger.db",
            dataset=f"small-site-{number}",
            unit="record",
            budget=Budget(epsilon=99, delta=1e-5),
        )
        assert sum(event.steps for event in ledger.events()) == 4
        # Charged is what was executed; the account, whose composition is "fixed", has to hold the plan.
        job_id = json.loads((folder / "run.json").read_text())["job_sha256"]
        assert ledger.spent_epsilon(job_id) == pytest.approx(epsilon, rel=1e-9)
        assert ledger.spent_epsilon() == pytest.approx(compose_epsilon([replace(executed, steps=10)], 1e-5), rel=1e-9)
        record = json.loads((site / "privacy.json").read_text())
        assert (record["steps_executed"], record["steps_planned"]) == (4, 10)
        assert record["epsilon_spent"] == record["epsilon_bound"] == epsilon
        assert record["epsilon_planned"] == promised > epsilon
        assert "4 executed steps" in record["statement"]
    statement = json.loads((folder / "statement.json").read_text())
    assert statement["up_to_m_sites"][0]["epsilon"] == promised
    assert f"({rounded_up(promised)}, 1e-05)" in statement["one_site"]
    assert f"of the executed ones it is {rounded_up(epsilon)}" in statement["one_site"]
    assert statement["not_covered"][-1] == STOPPED_EARLY
    assert json.loads((folder / "run.json").read_text())["status"] == "completed"
    # The baseline has settings and a rule of its own, and ran because the federated arm had ended.
    baseline = folder / "baselines" / "non-private"
    assert (baseline / "evaluation.json").exists()
    report = (folder / "report.html").read_text()
    assert "2 of 5" in report
    assert "The run ended after round 2 of 5" in report
    assert "stopped before its end" not in report
    assert silotune("report", folder, "--format", "html").status == 0
    compliance = (folder / "compliance-report.html").read_text()
    assert "ended by the job&#39;s rule of early stopping" in compliance
    assert "none found" in compliance
    # Each site's own statement, too, promises the plan.
    assert compliance.count(f"of the executed ones it is {rounded_up(epsilon)}") == 4
    audited = silotune("audit", folder, "--json")
    assert json.loads(audited.out)["claim"] == pytest.approx(epsilon)


def test_the_best_adapter_is_the_one_that_is_written(scenario_file: MakeScenario, tmp_path: Path) -> None:
    path = scenario_file(**stopping({**NEVER, "keep": "best"}, privacy={"mechanism": "none"}))
    folder = tmp_path / "run"
    finished = run(path, folder)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    accuracies = [line["metrics"]["accuracy"] for line in lines]
    evaluation = json.loads((folder / "evaluation.json").read_text())
    assert evaluation["round"] == accuracies.index(max(accuracies))
    assert evaluation["metrics"] == lines[evaluation["round"]]["metrics"]
    job = load_job(folder)
    runtime = load_tuned(folder, job, ComputeConfig())
    for state in (load_state(folder / "adapter", runtime, job), finished.result):
        assert all((state[name] == tensor).all() for name, tensor in finished.best_adapter.items())
    # A second process that resumes the finished run hands out the same one.
    assert run(path, folder, resume=True).round_number == 2
    assert json.loads((folder / "evaluation.json").read_text()) == evaluation
    durable = load_checkpoint(folder / "checkpoint.safetensors", job_sha256=job.sha256)
    assert durable is not None
    assert durable.best_adapter.keys() == finished.best_adapter.keys()


def test_a_stopped_run_goes_on_and_ends_where_a_whole_one_does(scenario_file: MakeScenario, tmp_path: Path) -> None:
    path = scenario_file(**stopping({**NEVER, "keep": "best"}))
    whole = run(path, tmp_path / "whole", injected_seed="x")
    first = run(path, tmp_path / "parts", injected_seed="x", stop_after=1)
    assert first.round_number == 1
    assert json.loads((tmp_path / "parts" / "run.json").read_text())["status"] == "stopped"
    resumed = run(path, tmp_path / "parts", injected_seed="x", resume=True)
    assert (resumed.round_number, whole.round_number) == (2, 2)
    assert resumed.releases == whole.releases
    for one, other in ((resumed.adapter, whole.adapter), (resumed.result, whole.result)):
        assert all((one[name] == other[name]).all() for name in other)


def test_site_metrics_come_once_after_an_early_end(scenario_file: MakeScenario, tmp_path: Path) -> None:
    data = {"kind": "synthetic", "evaluation_share": 0.3}
    path = scenario_file(**stopping(NEVER, data=data, site_metrics={"names": ["accuracy"], "noise_multiplier": 2.0}))
    folder = tmp_path / "run"
    assert run(path, folder).round_number == 2
    assert run(path, folder, resume=True).round_number == 2
    assert json.loads((folder / "site_metrics.json").read_text())["sites"].keys() == {"site-1", "site-2", "site-3"}
    ledger = Ledger(
        folder / "sites" / "site-1" / "home" / "ledger.db",
        dataset="small-site-1",
        unit="record",
        budget=Budget(epsilon=99, delta=1e-5),
    )
    events = [(event.noise_multiplier, event.sample_rate, event.steps) for event in ledger.events()]
    assert sorted(events) == [(1.0, 0.25, 2), (1.0, 0.25, 2), (2.0, 1.0, 1)]


@pytest.mark.parametrize(
    ("data", "key"),
    [({}, "data.kind"), ({"kind": "private"}, "data.kind"), ({"test": True, "test_kind": "private"}, "data.test_kind")],
)
def test_private_evaluation_records_may_not_decide(
    scenario_file: MakeScenario, tmp_path: Path, data: dict[str, Any], key: str
) -> None:
    if data.pop("test", False):
        data["test"] = {"path": "train.csv", "columns": {"text": "review", "label": "verdict"}}
    path = scenario_file(**stopping(NEVER, data=data))
    with pytest.raises(ConfigError, match=f"count as private.*Declare {key} = "):
        run(path, tmp_path / "run")
    assert not (tmp_path / "run").exists()
