"""What a run writes of itself is read back as it was: the same type writes and reads each file."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from server.records.privacy import CoordinatorRecord, SiteRecord, read_site
from server.records.results import (
    AuditRecord,
    Diverged,
    EvaluationRecord,
    Folds,
    Repeats,
    SiteMetrics,
    read_audits,
    read_evaluation,
)
from server.records.rounds import RoundRecord, read_rounds, write_rounds
from server.records.run import RunRecord
from shared.errors import RunError
from shared.files.atomic import write_json
from shared.files.json_files import read_record
from shared.job.job import Job
from shared.job.parsing import parse
from shared.privacy.accounting import GaussianSteps
from shared.privacy.central_statement import CentralRelease
from shared.privacy.plan import PrivacyPlan
from shared.privacy.statement import SiteRelease, run_statement
from shared.runtime.calibration import Bin, Calibration
from shared.runtime.site_metrics import Estimate

EVENT = GaussianSteps(noise_multiplier=1.2, sample_rate=0.25, steps=4)
METRIC = GaussianSteps(noise_multiplier=3.0, sample_rate=1.0, steps=1)
RELEASE = SiteRelease(
    site="north",
    unit="patient",
    records_per_person=2,
    delta=1e-5,
    max_grad_norm=0.5,
    declared_records=256,
    randomness="os",
    epsilon_budget=8.0,
    steps_planned=8,
    events=(EVENT,),
    rounds=(1, 2),
    updates=("a" * 64, "b" * 64),
    metrics=("accuracy",),
    metrics_mechanism=METRIC,
    metrics_sha256="c" * 64,
)
CENTRAL = CentralRelease(
    num_sites_declared=200,
    delta=1e-4,
    clip_norm_first=0.1,
    update_noise_multiplier=1.3,
    count_noise=None,
    steps_planned=4,
    rounds=(1, 2, 2, 3),
    events=(EVENT,),
    randomness="os",
    epsilon_budget=5.0,
)
BINS = tuple(Bin(count=count, confidence=0.5, accuracy=0.25) for count in range(3))
CALIBRATION = Calibration(
    temperature=1.5,
    fitted_on=40,
    reported_on=160,
    loss_before=0.7,
    loss_after=0.6,
    error_before=0.2,
    error_after=0.1,
    bins_before=BINS,
    bins_after=BINS,
)
RECORDS: list[Any] = [
    SiteRecord.of(RELEASE, "run", stopped_early=True),
    CoordinatorRecord.of(CENTRAL, "run", stopped_early=True),
    run_statement([RELEASE, replace(RELEASE, site="south")], "run"),
    SiteMetrics(
        noise_multiplier=2.0,
        largest_loss=5.0,
        labels=("bad", "good"),
        sites={"north": {"accuracy": [1.5, 2.5]}},
        estimates=(Estimate(metric="accuracy", value=None, standard_error=None, votes=4.0, sites=1),),
    ),
    Repeats(seeds=(0, 1), arms={"federated": (0.5, 0.6)}),
    Folds(folds=2, test_records=(6, 7), arms={"federated": {"accuracy": (0.5, 0.6)}}),
    Diverged(reason="its values grew too large"),
    RunRecord(status="running", versions={"torch": None}),
]


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: type(record).__name__)
def test_what_was_written_is_read(tmp_path: Path, record: Any) -> None:
    write_json(tmp_path / "file.json", record)
    assert read_record(tmp_path / "file.json", type(record)) == record


def test_a_record_gives_back_what_was_executed(tmp_path: Path) -> None:
    write_json(tmp_path / "privacy.json", SiteRecord.of(RELEASE, "run"))
    privacy = {"unit": "patient", "records_per_person": 2, "noise_multiplier": 1.2, "sample_rate": 0.25}
    task = {"kind": "sequence_classification", "labels": ["bad", "good"]}
    training = {"rounds": 2, "local_steps": 2, "learning_rate": 0.1}
    job = parse(Job, {"name": "run", "task": task, "training": training, "privacy": privacy}, source="test")
    # What was promised follows from the job, whatever the record says of it.
    plan = PrivacyPlan.from_job(job)
    promised = replace(RELEASE, steps_planned=plan.planned_steps, per_round=plan.mechanism(job.training.local_steps))
    assert read_site(tmp_path / "privacy.json").release(job) == promised
    write_json(tmp_path / "privacy.json", CoordinatorRecord.of(CENTRAL, "run"))
    found = read_record(tmp_path / "privacy.json", CoordinatorRecord)
    for field in fields(CentralRelease):
        assert getattr(found, field.name) == getattr(CENTRAL, field.name), field.name
    assert found.epsilon == CENTRAL.epsilon == found.epsilon_spent


def test_rounds_are_read_as_they_were_written(tmp_path: Path) -> None:
    rounds = (
        RoundRecord(round=0, metrics={"loss": 0.7, "auc": None}),
        RoundRecord(round=1, epsilon_max=1.5, sites=["north"], failed={"south": "dropped out"}, bytes_up=None),
    )
    write_rounds(tmp_path / "metrics.jsonl", rounds)
    assert read_rounds(tmp_path / "metrics.jsonl", complete=True) == rounds


def test_results_are_read_as_they_were_written(tmp_path: Path) -> None:
    evaluation = EvaluationRecord(
        primary_metric="accuracy",
        higher_is_better=True,
        round=2,
        metrics={"accuracy": 0.5, "loss": 0.7},
        labels=("bad", "good"),
        confusion=[[1, 2], [3, 4]],
        roc=[[0.0, 0.0], [1.0, 1.0]],
        calibration=CALIBRATION,
    )
    write_json(tmp_path / "evaluation.json", evaluation)
    assert read_evaluation(tmp_path / "evaluation.json") == evaluation
    audit = AuditRecord(
        tier=1,
        audited="the trainer",
        claim=None,
        delta=1e-5,
        alpha=1e-3,
        lower_bound=0.5,
        ceiling=None,
        verdict="consistent",
        seeds=(0,),
    )
    write_json(tmp_path / "audit" / "tier1.json", audit)
    assert read_audits(tmp_path) == (audit,)


@pytest.mark.parametrize(
    ("key", "value"),
    [("roc", [[0.0]]), ("roc", [[0.0, 1.5], [0.0, 0.0]]), ("confusion", [[-1]]), ("confusion_cells", [[0, 1]])],
)
def test_numbers_out_of_their_range_are_refused_by_name(tmp_path: Path, key: str, value: Any) -> None:
    content = {"primary_metric": "a", "metrics": {"a": 1.0}, key: value}
    (tmp_path / "evaluation.json").write_text(json.dumps(content))
    with pytest.raises(RunError, match=rf"evaluation\.json is damaged .*{key}"):
        read_evaluation(tmp_path / "evaluation.json")
