"""A real federation: separate processes, gRPC over TLS, authentication, signed jobs, audit logs on both sides."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from client.ledger.audit_mirror import recount
from client.site.home import open_site
from server.store.submission import Submission
from shared.job.job import Job
from shared.tools.compare_logs import compare
from shared.trust import audit_log
from shared.trust.audit_log import Event
from shared.trust.certificates import spki
from shared.trust.node_keys import load_private_key
from shared.trust.receipts import check_release, proven_releases, read_receipts
from shared.trust.signed_folder import verify_folder
from shared.trust.signing import load_verify_key
from simulations.federation.processes import HOST, Federation, change_toml, round_overheads
from tests.conftest import Outcome


@dataclass
class Finished:
    """A federation whose one job is complete and whose processes have ended."""

    federation: Federation
    submission: Submission
    job: Job
    alpn: str | None
    tls_version: str


@pytest.fixture(scope="module")
def finished(
    found_federation: Callable[..., Federation],
    federation_job: Callable[..., Job],
    evaluation_records: list[dict[str, Any]],
) -> Finished:
    federation = found_federation(["a", "b", "c"])
    # Sites a and b release what they measure, c does not.
    for name in "ab":
        change_toml(federation.site(name).config, evaluation_share=0.4)
        change_toml(federation.site(name).policy, metrics=["accuracy"])
    change_toml(federation.site("c").config, compute={"device": "cpu", "processes": 2})
    federation.start_coordinator()
    facts = federation.tls()
    for name in "abc":
        federation.start_site(name)
    job = federation_job(
        federation={"min_sites": 3},
        site_metrics={"names": ["accuracy"], "noise_multiplier": 2.0},
        privacy={"epsilon": 50},
    )
    submission = federation.submit(job, evaluation_records)
    state = federation.wait(submission, timeout=180)
    federation.stop()
    assert state["state"] == "completed", state
    return Finished(federation, submission, job, facts.alpn, facts.tls_version)


def test_the_run_is_complete_over_tls_1_3(finished: Finished) -> None:
    records = [json.loads(line) for line in (finished.submission.run_folder / "metrics.jsonl").read_text().splitlines()]
    assert [record["round"] for record in records] == [0, 1, 2]
    assert all(record["sites"] == ["a", "b", "c"] for record in records[1:])
    assert (finished.tls_version, finished.alpn) == ("TLSv1.3", "h2")
    for name in "abc":
        assert f"connected to {HOST}:{finished.federation.port} as {name}" in finished.federation.log_of(name)


def test_a_site_of_two_processes_takes_part_and_leaves_none(finished: Finished) -> None:
    log = finished.federation.log_of("c")
    (pid,) = re.findall(r"computed by 2 processes, 1 threads each: (\d+) beside", log)
    assert not Path(f"/proc/{pid}").exists()
    assert "computed by" not in finished.federation.log_of("a")


def test_both_sides_logged_the_same_updates(finished: Finished) -> None:
    federation = finished.federation
    taken = {
        (entry.details["site"], entry.details["round"]): entry.details["sha256"]
        for entry in audit_log.read(federation.coordinator.audit)
        if entry.event == Event.UPDATE_ACCEPTED
    }
    given = {
        (name, entry.details["round"]): entry.details["sha256"]
        for name in "abc"
        for entry in audit_log.read(federation.site(name).audit)
        if entry.event == Event.RELEASE_STORED
    }
    metrics = {
        (entry.details["site"], finished.job.training.rounds + 1): entry.details["sha256"]
        for entry in audit_log.read(federation.coordinator.audit)
        if entry.event == Event.METRICS_ACCEPTED
    }
    assert taken | metrics == given
    assert (len(taken), len(metrics)) == (6, 2)


def test_every_release_that_counts_has_a_receipt_by_its_sites_key(finished: Finished) -> None:
    federation = finished.federation
    receipts = read_receipts(finished.submission.run_folder / "receipts.jsonl")
    accepted = {
        (entry.details["site"], entry.details["sha256"])
        for entry in audit_log.read(federation.coordinator.audit)
        if entry.event in (Event.UPDATE_ACCEPTED, Event.METRICS_ACCEPTED)
    }
    assert {(receipt.what.site, receipt.what.release_sha256) for receipt in receipts} == accepted
    for receipt in receipts:
        key = spki(load_private_key(federation.site(receipt.what.site).key, None).public_key())
        assert check_release([key], receipt.what, receipt.signature) == receipt.key


def test_the_logs_of_both_sides_agree_and_receipts_with_them(
    finished: Finished, silotune: Callable[..., Outcome]
) -> None:
    path = finished.submission.run_folder / "receipts.jsonl"
    logs = [finished.federation.coordinator.audit]
    for name in "abc":
        site = finished.federation.site(name)
        key = load_private_key(site.key, None).public_key()
        proven = proven_releases(read_receipts(path), [spki(key)], site=name)
        assert len(proven) == 2 + (name in "ab")
        assert compare(site.audit, *logs, site=name, proven=proven) == []
        command: list[Any] = ["audit-log", "compare", site.audit, *logs, "--site", name, "--receipts", path]
        shown = silotune(*command, "--certificate", site.certificate)
        assert (shown.status, shown.out) == (0, f"both logs are unbroken and say the same of {name}\n")
    other = finished.federation.site("a").certificate
    shown = silotune(*command, "--certificate", other)
    assert shown.status == 1
    assert "no receipt by the site's key is for it" in shown.out
    assert "--receipts and --certificate go together" in silotune(*command).err


def test_only_sites_whose_policy_says_so_release_metrics(finished: Finished) -> None:
    record = json.loads((finished.submission.run_folder / "site_metrics.json").read_text())
    assert sorted(record["sites"]) == ["a", "b"]
    (refused,) = (
        entry.details
        for entry in audit_log.read(finished.federation.coordinator.audit)
        if entry.event == Event.METRICS_REFUSED
    )
    assert refused["site"] == "c"
    assert "this site does not release the metrics accuracy; its policy allows none" in refused["reason"]


def test_the_audit_logs_hold_and_are_signed(finished: Finished) -> None:
    federation = finished.federation
    for name in "abc":
        home = federation.site(name)
        assert audit_log.verify(home.audit, verify_head=load_verify_key(home.path / "log.pub")).signature_checked
    key = load_verify_key(federation.coordinator.path / "round.pub")
    assert audit_log.verify(federation.coordinator.audit, verify_head=key).signature_checked


def test_the_ledger_equals_a_recount_and_what_the_coordinator_states(finished: Finished) -> None:
    for name in "abc":
        home = finished.federation.site(name)
        ledger = open_site(home, passphrase=None).ledger()
        spent = ledger.spent_epsilon()
        config = home.load_config()
        counted = recount(home.audit, delta=config.budget.delta, dataset=config.dataset, unit="record")
        stated = json.loads((finished.submission.run_folder / "sites" / name / "privacy.json").read_text())
        assert spent == pytest.approx(counted, rel=1e-9)
        assert spent == pytest.approx(stated["epsilon_spent"], rel=1e-9)


def test_the_adapter_is_signed_by_the_coordinator(finished: Finished) -> None:
    key = load_verify_key(finished.federation.coordinator.path / "round.pub")
    assert verify_folder(finished.submission.run_folder / "adapter", key) == key


def test_nothing_that_a_site_keeps_shows_its_content(finished: Finished) -> None:
    home = finished.federation.site("a")
    ledger = (home.path / "ledger.db").read_bytes()
    assert finished.job.sha256.encode() not in ledger
    assert b"noise_multiplier" not in ledger
    stored = list(home.path.glob("rounds/*/*.*"))
    assert len(stored) == 3
    for path in stored:
        data = path.read_bytes()
        assert b"optimizer/" not in data
        assert b"request_sha256" not in data
        assert b"accuracy" not in data


def test_every_round_pays_little_beyond_training(finished: Finished) -> None:
    overheads = round_overheads(finished.federation, finished.submission, "abc")
    assert len(overheads) == 2
    assert all(seconds > 0 for seconds in overheads)
