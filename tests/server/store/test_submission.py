"""A submitted job's folder: complete or not there, and readable whatever happened."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import server.coordinator.run_file as run_file
from server.coordinator.run_file import RunSettings, evaluation_records, settings_of, submit
from server.store.submission import Submission, find, submissions
from shared.data.datasets import DataSource
from shared.errors import RunError, SilotuneError
from shared.job.job import Job
from shared.job.parsing import parse
from shared.trust.signing import SigningKey

RECORDS: list[dict[str, Any]] = [{"text": "a film", "label": "good"}, {"text": "a plot", "label": "bad"}]
SIGNER, COORDINATOR = SigningKey.generate(), SigningKey.generate()


def make_job(**sections: Any) -> Job:
    raw: dict[str, Any] = {
        "name": "demo",
        "task": {"kind": "sequence_classification", "labels": ["bad", "good"]},
        "training": {"rounds": 2, "local_steps": 2},
        "privacy": {"noise_multiplier": 1.0},
    }
    return parse(Job, raw | sections, source="test")


def submitted(jobs: Path, **sections: Any) -> Submission:
    settings = RunSettings(evaluation=DataSource(path="x.jsonl", columns={"text": "text", "label": "label"}))
    return submit(jobs, make_job(**sections), settings, RECORDS, signer=SIGNER, coordinator=COORDINATOR.verify_key)


def test_a_submission_holds_everything_that_a_run_needs(tmp_path: Path) -> None:
    made = submitted(tmp_path / "jobs")
    assert made.name == "0001-demo"
    signed = made.signed_job()
    assert signed.job == make_job()
    assert signed.signer == SIGNER.verify_key
    assert signed.coordinator == COORDINATOR.verify_key
    assert list(evaluation_records(made, signed.job)) == RECORDS
    assert settings_of(made).evaluate_every == 1
    assert made.state()["state"] == "submitted"
    assert made.is_open
    assert made.progress() == 0


def test_the_very_same_job_is_not_submitted_twice(tmp_path: Path) -> None:
    submitted(tmp_path)
    with pytest.raises(RunError, match="submitted before, as 0001-demo"):
        submitted(tmp_path)
    assert submitted(tmp_path, seed=1).name == "0002-demo"
    assert [submission.name for submission in submissions(tmp_path)] == ["0001-demo", "0002-demo"]


def test_a_submission_that_failed_half_way_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(path: Path, value: Any) -> None:
        if path.name == "state.json":
            raise RunError("the disk is full")
        real(path, value)

    real = run_file.write_json
    monkeypatch.setattr(run_file, "write_json", fails)
    with pytest.raises(RunError, match="the disk is full"):
        submitted(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_draft_that_a_killed_process_left_is_not_a_job(tmp_path: Path) -> None:
    (tmp_path / ".draft-x").mkdir()
    (tmp_path / ".draft-x" / "state.json").write_text("{}")
    (tmp_path / "0007-half").mkdir()
    assert submissions(tmp_path) == []
    assert submitted(tmp_path).name == "0001-demo"


def test_a_job_is_found_by_number_and_name_and_the_newest_without(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="holds no job yet"):
        find(tmp_path, None)
    submitted(tmp_path)
    submitted(tmp_path, seed=1)
    submitted(tmp_path, name="other")
    for name, expected in (
        (None, "0003-other"),
        ("1", "0001-demo"),
        ("0001", "0001-demo"),
        ("0001-demo", "0001-demo"),
        ("demo", "0002-demo"),
        ("other", "0003-other"),
    ):
        assert find(tmp_path, name).name == expected
    with pytest.raises(RunError, match="no job 'none'; there are: 0001-demo"):
        find(tmp_path, "none")


def test_a_note_keeps_what_was_known(tmp_path: Path) -> None:
    made = submitted(tmp_path)
    made.note("running", started="2026")
    made.note(round=3)
    made.note("completed", problem=None)
    state = made.state()
    assert (state["state"], state["started"], state["round"]) == ("completed", "2026", 3)
    assert state["signer"] == SIGNER.verify_key.text
    assert not made.is_open


def test_a_stop_is_remembered(tmp_path: Path) -> None:
    made = submitted(tmp_path)
    assert not made.stop_requested
    made.request_stop()
    assert Submission(made.path).stop_requested


def test_a_changed_job_is_not_run(tmp_path: Path) -> None:
    made = submitted(tmp_path)
    file = made.path / "signed_job.json"
    file.write_text(file.read_text().replace("demo", "ode!"))
    with pytest.raises(SilotuneError):
        made.signed_job()
    file.unlink()
    with pytest.raises(RunError, match="cannot be read"):
        made.signed_job()
