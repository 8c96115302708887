"""A real federation whose job protects patients: sites that do take part, one that counts records refuses, no id leaves."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from client.ledger.audit_mirror import recount
from client.site.home import open_site
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
    federation.start_coordinator()
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
    # The ids are in the sites' own files only, which lie beside the sites' folders.
    own = {federation.folder / f"{name}.jsonl" for name in "abc"}
    files = [path for path in federation.folder.rglob("*") if path.is_file() and path not in own]
    assert len(files) > 20
    assert not [path for path in files if MARKER.encode() in path.read_bytes()]
