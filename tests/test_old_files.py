"""Run folders, homes, ledgers, logs and signatures of version 0.1.0 still open, with the facts that they were written with.

The files are those of tests/fixtures/README.md; a test that changes them works on a copy of its own.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tarfile
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from shared.trust import audit_log
from shared.trust.signed_file import Signer, sign_file, signature_file, verify_file
from shared.trust.signed_folder import SIGNATURE_FILE, sign_folder, verify_folder
from shared.trust.signed_job import SignedJob, round_fields, sign_job
from shared.trust.signing import Purpose, SigningKey

ARCHIVE = Path(__file__).parent / "fixtures" / "before_rooms.tar.xz"
JOB = "934a084f3530c8128a1d01b36fd5dfa0eee8d5ed5423c4cfbbbbfb867997d75d"
SPENT = 3.702088356383871

SIGNED = ARCHIVE.parent / "before_envelope"
SIGNER = SigningKey.from_bytes(hashlib.sha256(b"silotune test signer").digest())

Silotune = Callable[..., Any]


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """The old files, unpacked; the site's data has moved along."""
    with tarfile.open(ARCHIVE) as packed:
        packed.extractall(tmp_path, filter="data")
    settings = tmp_path / "federation" / "homes" / "clinic" / "site.toml"
    data = tmp_path / "federation" / "clinic.csv"
    settings.write_text(re.sub(r'path = ".*"', f'path = "{data}"', settings.read_text()))
    return tmp_path


def answer(silotune: Silotune, *arguments: object) -> Any:
    """Return the JSON that a command prints."""
    outcome = silotune(*arguments)
    assert outcome.status == 0, outcome.err
    return json.loads(outcome.out)


def test_the_archive_is_small() -> None:
    assert ARCHIVE.stat().st_size < 1 << 20


# --- runs ---


@pytest.mark.parametrize(("name", "epsilon", "unit"), [("images", "1.357", "record"), ("persons", "5.598", "patient")])
def test_a_run_is_reported_anew_with_its_epsilon(
    old: Path, silotune: Silotune, name: str, epsilon: str, unit: str
) -> None:
    run = old / name / "run"
    statement = (run / "statement.json").read_bytes()
    assert silotune("report", run).status == 0
    assert epsilon in (run / "report.html").read_text()
    outcome = silotune("report", run, "--format", "html", "--out", old / "compliance.html")
    assert outcome.status == 0, outcome.err
    text = (old / "compliance.html").read_text()
    assert epsilon in text
    assert unit in text
    for site in ("golden-site-1", "golden-site-2", "golden-site-3"):
        assert site in text, "the account in the simulated site's ledger"
    assert (run / "statement.json").read_bytes() == statement


def test_a_run_labels_as_it_did(old: Path, silotune: Silotune) -> None:
    found = answer(silotune, "predict", old / "federation/coordinator/jobs/0001-golden/run", "a quiet joy", "--json")
    assert found["label"] == "good"
    assert found["probability"] == pytest.approx(0.96065, abs=2e-3)


def test_a_stopped_run_goes_on(old: Path, silotune: Silotune) -> None:
    folder = old / "images" / "stopped"
    before = (folder / "metrics.jsonl").read_text()
    found = answer(silotune, "simulate", old / "images" / "scenario.toml", "--out", folder, "--resume", "--json")
    after = (folder / "metrics.jsonl").read_text()
    assert len(before.splitlines()) == 2
    assert after.startswith(before)
    assert len(after.splitlines()) == 3
    assert found["epsilon_max_site"] == 1.3563


def test_a_run_under_central_dp_states_the_same(old: Path, silotune: Silotune) -> None:
    run = old / "central" / "run"
    stated = json.loads((run / "privacy.json").read_text())
    outcome = silotune("report", run, "--format", "html", "--out", old / "compliance.html")
    assert outcome.status == 0, outcome.err
    assert "0.450" in (old / "compliance.html").read_text()
    assert stated["epsilon_spent"] == pytest.approx(0.449129, abs=1e-6)


# --- a site ---


def test_a_sites_ledger_holds_its_charges(old: Path, silotune: Silotune) -> None:
    home, account = old / "federation/homes/clinic", old / "account.json"
    found = answer(silotune, "site", "ledger", home, "--json", "--export", account)
    assert found["epsilon_spent"] == pytest.approx(SPENT, rel=1e-9)
    assert found["entries"] == 6
    assert [*found["jobs"]] == [JOB]
    then = json.loads((old / "federation" / "account.json").read_text())
    assert json.loads(account.read_text())["charges"] == then["charges"]


def test_a_sites_home_passes_its_checks(old: Path, silotune: Silotune) -> None:
    home, job = old / "federation/homes/clinic", old / "federation/job.toml"
    outcome = silotune("site", "check", home, "--offline", "--job", job, "--json")
    found = {finding["name"]: finding for finding in json.loads(outcome.out)}
    assert {name for name, finding in found.items() if finding["outcome"] == "failed"} == set()
    assert "unbroken, 13 entries" in found["audit log"]["text"]
    assert "48 records" in found["data"]["text"]


def test_what_was_changed_in_old_files_is_still_noticed(old: Path, silotune: Silotune) -> None:
    home = old / "federation/homes/clinic"
    log = home / "audit" / "audit-00001.jsonl"
    log.write_text(log.read_text().replace('"sequence":4', '"sequence":5', 1))
    outcome = silotune("audit-log", "verify", home / "audit")
    assert outcome.status == 1
    report = old / "federation" / "report.html"
    report.write_text(report.read_text().replace("golden", "silver", 1))
    assert silotune("report", "verify", report).status == 1


# --- logs, jobs and signatures ---


def test_audit_logs_are_unbroken_and_signed(old: Path, silotune: Silotune) -> None:
    federation = old / "federation"
    for folder, key, entries in (
        ("homes/clinic", "log.pub", 13),
        ("coordinator", "round.pub", 11),
    ):
        home = federation / folder
        found = answer(silotune, "audit-log", "verify", home / "audit", "--key", home / key, "--json")
        assert (found["entries"], found["signature_checked"]) == (entries, True)


def test_a_coordinators_home_tells_its_job(old: Path, silotune: Silotune) -> None:
    home = old / "federation" / "coordinator"
    outcome = silotune("coordinator", "status", home, "--json")
    (job,) = json.loads(outcome.out)["jobs"]
    assert (job["name"], job["state"], job["rounds_durable"]) == ("0001-golden", "completed", 2)
    assert job["job_sha256"] == JOB
    adapter = home / "jobs/0001-golden/run/adapter"
    assert silotune("coordinator", "verify", adapter, "--key", home / "round.pub").status == 0


def test_a_signed_job_keeps_hash_and_cost(old: Path, silotune: Silotune) -> None:
    signed = old / "federation/coordinator/jobs/0001-golden/signed_job.json"
    account = old / "federation" / "account.json"
    found = answer(silotune, "plan", "--job", signed, "--ledger", account, "--json")
    assert found["job"]["sha256"] == JOB
    (point,), (site,) = found["points"], found["sites"]
    assert point["epsilon"] == pytest.approx(2.9999018, abs=1e-6)
    assert site["epsilon_now"] == pytest.approx(SPENT, rel=1e-9)
    assert site["epsilon_after"][0] == pytest.approx(4.0933572, abs=1e-6)
    assert site["verdict"] == "yes, all three"


@pytest.mark.parametrize(
    ("report", "role", "key"),
    [
        ("report.html", "coordinator", "coordinator/round.pub"),
        ("site-report.html", "site", "homes/clinic/log.pub"),
    ],
)
def test_signed_reports_verify(old: Path, silotune: Silotune, report: str, role: str, key: str) -> None:
    federation = old / "federation"
    found = answer(silotune, "report", "verify", federation / report, "--key", federation / key, "--json")
    assert (found["role"], found["key_checked"]) == (role, True)


# --- one of each kind that is signed: it verifies, and is signed today with the same bytes ---


def test_a_signed_job_is_read_and_written_as_ever() -> None:
    text = (SIGNED / "job.json").read_text()
    old = SignedJob.from_json(text, source="job.json")
    assert (old.job.name, old.signer, old.coordinator) == ("old", SIGNER.verify_key, SIGNER.verify_key)
    times = {"issued": old.issued, "not_after": old.not_after}
    assert sign_job(old.job, signer=SIGNER, coordinator=SIGNER.verify_key, **times).to_json() == text


def test_a_signed_round_is_verified_and_signed_as_ever() -> None:
    fields = json.loads((SIGNED / "round.json").read_text()) | {"adapter": b"adapter"}
    signature = bytes.fromhex(fields.pop("signature"))
    SIGNER.verify_key.verify(Purpose.ROUND, round_fields(**fields), signature)
    assert SIGNER.sign(Purpose.ROUND, round_fields(**fields)) == signature


def test_a_signed_file_is_verified_and_signed_as_ever(tmp_path: Path) -> None:
    old = verify_file(SIGNED / "report.txt", SIGNER.verify_key)
    assert (old.role, old.name, old.bytes) == ("coordinator", "Köln", 37)
    copy = Path(shutil.copy(SIGNED / "report.txt", tmp_path))
    made = sign_file(copy, Signer(role="coordinator", name="Köln", key=SIGNER), now=datetime(2026, 3, 2, 9, tzinfo=UTC))
    assert made.read_bytes() == signature_file(SIGNED / "report.txt").read_bytes()


def test_a_signed_folder_is_verified_and_signed_as_ever(tmp_path: Path) -> None:
    assert verify_folder(SIGNED / "adapter", SIGNER.verify_key) == SIGNER.verify_key
    shutil.copytree(SIGNED / "adapter", tmp_path / "adapter")
    sign_folder(tmp_path / "adapter", SIGNER)
    assert (tmp_path / "adapter" / SIGNATURE_FILE).read_bytes() == (SIGNED / "adapter" / SIGNATURE_FILE).read_bytes()


def test_a_signed_log_is_verified_and_signed_as_ever(tmp_path: Path) -> None:
    assert audit_log.verify(SIGNED / "log", verify_head=SIGNER.verify_key).entries == 2
    noon = datetime(2026, 3, 2, 9, tzinfo=UTC)
    log = audit_log.AuditLog(tmp_path / "log", seal_head=SIGNER, clock=lambda: noon)
    log.append(audit_log.Event.COORDINATOR_STARTED, name="Köln")
    log.append(audit_log.Event.COORDINATOR_STOPPED)
    for name in ("audit-00001.jsonl", "head.json"):
        assert (tmp_path / "log" / name).read_bytes() == (SIGNED / "log" / name).read_bytes()
