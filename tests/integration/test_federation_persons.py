"""A real federation whose job protects patients: sites that do take part, one that counts records refuses, no id leaves.

Its coordinator tells a tracker, and counts what it draws.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from client.ledger.audit_mirror import recount
from client.site.home import open_site
from server.store.submission import Submission
from shared.job.job import Job
from shared.models.backbones import backbone_sha256
from simulations.federation.processes import Federation
from tests.integration.conftest import site_records

MARKER = "zyxomma"


@pytest.mark.slow
def test_patients_are_protected_over_the_wire(
    found_federation: Callable[..., Federation],
    federation_job: Callable[..., Job],
    evaluation_records: list[dict[str, Any]],
    tiny_bert: Path,
) -> None:
    federation = found_federation([])
    policy = {"backbones": {str(tiny_bert): backbone_sha256(tiny_bert)}}
    for index, (name, unit) in enumerate({"a": "patient", "b": "patient", "c": "record"}.items()):
        rows = [record | {"person": f"{MARKER}-{index}-{row % 7}"} for row, record in enumerate(site_records(index))]
        federation.join(name, rows, epsilon=8.0, unit=unit, policy=policy)  # type: ignore[arg-type]
    pytest.importorskip("tensorboard", reason="the tracker's library is not installed")
    board = federation.folder / "board"
    federation.start_coordinator("--track", f"tensorboard:{board}", "--energy", "--price-per-kwh", "0.30 EUR")
    for name in "abc":
        federation.start_site(name)
    job = federation_job(privacy={"unit": "patient", "records_per_person": 3})
    submission = federation.submit(job, evaluation_records)
    state = federation.wait(submission, timeout=180)
    federation.stop()
    assert state["state"] == "completed", state
    for name in "ab":
        home = federation.site(name)
        stated = json.loads((submission.run_folder / "sites" / name / "privacy.json").read_text())
        assert (stated["unit"], stated["records_per_person"], stated["declared_records"]) == ("patient", 3, 4)
        ledger = open_site(home, passphrase=None).ledger()
        config = home.load_config()
        counted = recount(home.audit, delta=config.budget.delta, dataset=config.dataset, unit="patient")
        assert ledger.spent_epsilon() == pytest.approx(counted, rel=1e-9)
        assert stated["epsilon_spent"] == pytest.approx(counted, rel=1e-9)
    assert not (submission.run_folder / "sites" / "c").exists()
    assert "keeps its budget by the record, but the job's privacy.unit is 'patient'" in federation.log_of("c")
    text = json.loads((submission.run_folder / "statement.json").read_text())["text"]
    assert "under add or remove one patient with all their records" in text
    _check_told(board, submission)
    # The ids are in the sites' own files only, which lie beside the sites' folders.
    own = {federation.folder / f"{name}.jsonl" for name in "abc"}
    files = [path for path in federation.folder.rglob("*") if path.is_file() and path not in own]
    assert len(files) > 20
    assert not [path for path in files if MARKER.encode() in path.read_bytes()]


def _check_told(board: Path, submission: Submission) -> None:
    """What the tracker's own reader finds is what the run recorded, and the energy stands beside it."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (events,) = {path.parent for path in board.rglob("events.out.tfevents.*")}
    read = EventAccumulator(str(events)).Reload()
    recorded = [json.loads(line) for line in (submission.run_folder / "metrics.jsonl").read_text().splitlines()]
    told = {event.step: event.value for event in read.Scalars("public/accuracy")}
    assert told == pytest.approx({line["round"]: line["metrics"]["accuracy"] for line in recorded}, abs=1e-6)
    assert read.Scalars("privacy/epsilon_spent")
    energy = json.loads((submission.run_folder / "energy.json").read_text())
    (session,) = energy["sessions"]
    assert session["parts"] or session["not_counted"]
