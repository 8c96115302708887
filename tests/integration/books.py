"""After every failure the books must agree: ledgers, audit logs and what the coordinator states."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest

from client.ledger.audit_mirror import recount
from client.ledger.ledger import Ledger
from client.site.home import open_site
from server.store.submission import Submission
from shared.privacy.accounting import compose_epsilon
from shared.trust import audit_log
from shared.trust.audit_log import Entry, Event
from shared.trust.signing import load_verify_key
from simulations.federation.processes import Federation


def assert_books_agree(federation: Federation, submission: Submission, *, sites: Sequence[str]) -> None:
    """Check ledgers, audit logs and the statement of an ended job against each other."""
    # 1. The coordinator's log is unbroken and signed.
    coordinator = federation.coordinator
    key = load_verify_key(coordinator.path / "round.pub")
    assert audit_log.verify(coordinator.audit, verify_head=key).signature_checked
    job = submission.state()["job_sha256"]
    accepted = coordinator_entries(federation, submission, Event.UPDATE_ACCEPTED)
    for name in sites:
        home = federation.site(name)
        ledger = open_site(home, passphrase=None).ledger()
        # 2. So is the site's, and a recount from it alone gives what the ledger says.
        assert audit_log.verify(home.audit, verify_head=load_verify_key(home.path / "log.pub")).signature_checked
        config = home.load_config()
        counted = recount(home.audit, delta=config.budget.delta, dataset=config.dataset, unit="record")
        assert ledger.spent_epsilon() == pytest.approx(counted, rel=1e-9)
        # 3. Every update that reached the coordinator was charged, and no release was charged twice.
        charged = charges(ledger, job)
        arrived = {(entry.details["round"], entry.details["sha256"]) for entry in accepted if of_site(entry, name)}
        assert all(charged[number] >= count for number, count in Counter(number for number, _ in arrived).items())
        released = [entry.payload["release_sha256"] for entry in ledger.entries() if entry.kind == "commit"]
        assert len(released) == len(set(released))
        # 4. The coordinator states every update that its log holds, and no more than the ledger.
        stated = privacy_record(submission, name)
        if stated is None:
            assert not arrived
            continue
        counted_here = set(zip(stated["rounds"], stated["update_sha256"], strict=True))
        assert all(update in counted_here or update[0] in stated["rounds_unanswered"] for update in arrived)
        assert compose_epsilon(ledger.events(job), stated["delta"]) >= stated["epsilon_spent"] * (1 - 1e-9)


def privacy_record(submission: Submission, name: str) -> dict[str, Any] | None:
    """Return what the coordinator states about a site, or None."""
    path = submission.run_folder / "sites" / name / "privacy.json"
    return dict(json.loads(path.read_text())) if path.exists() else None


def charges(ledger: Ledger, job: str) -> Counter[int]:
    """Return how often each round of a job was charged."""
    return Counter(
        entry.payload["round"]
        for entry in ledger.entries()
        if entry.kind == "reserve" and entry.payload["job_id"] == job
    )


def charges_of(federation: Federation, name: str, submission: Submission) -> Counter[int]:
    """Return how often a site charged each round of a job."""
    return charges(open_site(federation.site(name), passphrase=None).ledger(), submission.state()["job_sha256"])


def ledger_epsilon(federation: Federation, name: str, submission: Submission) -> float:
    """Return what a site's ledger says about one job."""
    return open_site(federation.site(name), passphrase=None).ledger().spent_epsilon(submission.state()["job_sha256"])


def coordinator_entries(federation: Federation, submission: Submission, event: Event) -> list[Entry]:
    """Return what the coordinator's log says about a job."""
    job = submission.state()["job_sha256"]
    return [
        entry
        for entry in audit_log.read(federation.coordinator.audit)
        if entry.event == event and entry.details.get("job") == job
    ]


def site_entries(federation: Federation, name: str, event: Event) -> list[Entry]:
    """Return what a site's log says of one kind."""
    return [entry for entry in audit_log.read(federation.site(name).audit) if entry.event == event]


def of_site(entry: Entry, name: str) -> bool:
    """Return whether an entry of the coordinator's log is about a site."""
    return bool(entry.details["site"] == name)


def rounds_of(submission: Submission) -> list[dict[str, Any]]:
    """Return the durable rounds."""
    path = submission.run_folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
