"""Folders of sites with a past, made by the product's own code: keys, certificate, charges, releases, refusals."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.serialization import Encoding

import cli
from client.approval.facts import Facts
from client.approval.request import Request, Rules
from client.approval.requests import Approvals
from client.ledger.account import Charge
from client.ledger.audit_mirror import AuditMirror
from client.ledger.ledger import Ledger
from client.policy.policy import load_policy
from client.site.approving import ApprovalDesk
from client.site.home import SiteHome, open_log
from shared.data.datasets import write_jsonl
from shared.errors import AwaitingApproval
from shared.job.job import Job
from shared.job.parsing import parse
from shared.privacy.accounting import GaussianSteps
from shared.trust.audit_log import AuditLog, Event
from shared.trust.keystore import Seal, load_secret
from shared.trust.pki import approve, create_ca
from shared.trust.signed_job import sign_job
from shared.trust.signing import SigningKey, load_signing_key
from tests.client.approval.budget_oracle import lines_by

JOBS = ("discharge letters", "triage", "readmission")
SIGNER, COORDINATOR = (SigningKey.from_bytes(bytes([number]) * 32) for number in (1, 2))


def silotune(*arguments: object) -> None:
    """Run a command line that has to succeed."""
    status: object = 0
    try:
        cli.main([str(argument) for argument in arguments])
    except SystemExit as end:
        status = end.code
    assert not status, arguments


def make_home(folder: Path, *, name: str = "north", epsilon: float = 8.0) -> SiteHome:
    """Return a site's folder with keys and certificate, as its engineer makes it."""
    folder.mkdir(parents=True, exist_ok=True)
    home = SiteHome(folder / name)
    write_jsonl(folder / "notes.jsonl", [{"text": "seen on the ward", "label": "urgent"}] * 40)
    signer = SIGNER.verify_key.text
    options = ["--name", name, "--coordinator", "127.0.0.1:9", "--data", folder / "notes.jsonl", "--epsilon", epsilon]
    columns = ["--column", "text=text", "--column", "label=label", "--signer", f"consortium={signer}"]
    silotune("site", "init", home.path, *options, *columns)
    create_ca(folder / "ca", name="Consortium", passphrase=None)
    request = (home.path / f"{name}.csr").read_bytes()
    certificate = approve(folder / "ca", request, role="site", passphrase=None).public_bytes(Encoding.PEM)
    (folder / "site.crt").write_bytes(certificate)
    silotune("site", "install", home.path, "--certificate", folder / "site.crt", "--ca", folder / "ca" / "ca.crt")
    return home


def charge(
    home: SiteHome,
    *,
    jobs: Sequence[str] = JOBS,
    rounds: int = 8,
    begin: datetime = datetime(2026, 10, 5, 8, tzinfo=UTC),
    secure: bool = False,
) -> None:
    """Let a site take part in jobs: requests, charges, releases, as its node writes them."""
    now = begin
    log = AuditLog(home.audit, seal_head=load_signing_key(home.log_key, None), clock=lambda: now)
    config = home.load_config()
    ledger = Ledger(
        home.path / "ledger.db",
        dataset=config.dataset,
        unit=config.budget.unit,
        budget=config.budget.caps(),
        cipher=Seal(load_secret(home.storage_key, passphrase=None)),
        mirror=AuditMirror(log),
        clock=lambda: now,
    )
    log.append(Event.NODE_STARTED, version="0.2.0")
    log.append(Event.NODE_CONNECTED, coordinator="127.0.0.1:9", software="0.2.0")
    for number, job in enumerate(jobs):
        sha256 = hashlib.sha256(job.encode()).hexdigest()
        log.append(Event.JOB_PREPARED, job=sha256, name=job, signer="ed25519:00", backbone="bert")
        for round_number in range(rounds):
            now += timedelta(hours=5, minutes=7)
            log.append(
                Event.REQUEST_RECEIVED, job=sha256, name=job, round=round_number, signer="ed25519:00", bytes=4096
            )
            step = GaussianSteps(noise_multiplier=2.0 + number, sample_rate=0.05, steps=4)
            together = GaussianSteps(noise_multiplier=6.0 + number, sample_rate=0.05, steps=4) if secure else None
            asked = hashlib.sha256(f"{job} {round_number}".encode()).hexdigest()
            reserved = ledger.reserve(
                Charge(job_id=sha256, round=round_number, request_sha256=asked, mechanism=step, together=together)
            )
            now += timedelta(minutes=3)
            if (number, round_number) == (len(jobs) - 1, rounds - 1):
                break  # the last round is still going on
            release = hashlib.sha256(f"update {asked}".encode()).hexdigest()
            ledger.commit(reserved, executed_steps=4 if round_number % 3 else 3, release_sha256=release)
            spent = ledger.spent_epsilon()
            size = 37_000 + 512 * number
            log.append(
                Event.RELEASE_STORED, job=sha256, round=round_number, sha256=release, bytes=size, epsilon_spent=spent
            )
            log.append(Event.RELEASE_SENT, message_type="train", bytes=size + 700)
        now += timedelta(days=2)
    log.append(Event.REQUEST_REFUSED, job="ab" * 32, round=0, code="PolicyError", reason="its task is not accepted")
    ledger.close()


def say(home: SiteHome, **facts: object) -> None:
    """Write what a node that runs would say of itself; its process is this one."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    said = {"pid": os.getpid(), "state": "connected", "since": now, "updated": now, "started": now}
    said |= {"coordinator": "127.0.0.1:9", "last_connected": now, "descriptors": {"used": 20, "limit": 1024}}
    home.status.write_text(json.dumps(said | facts))


def ask(home: SiteHome, name: str = "triage-2", *, signer: SigningKey = SIGNER, **sections: Any) -> Request:
    """Return the request for a job, which a node keeps once its coordinator asks for it."""
    raw: dict[str, Any] = {
        "name": name,
        "model": {"backbone": "embedded:all-minilm-l6-v2"},
        "task": {"kind": "sequence_classification", "labels": ["urgent", "routine"]},
        "training": {"rounds": 4, "local_steps": 2},
        "privacy": {"noise_multiplier": 3.0, "sample_rate": 0.25},
        "federation": {"min_sites": 3},
    }
    now = datetime.now(UTC).replace(microsecond=0)
    signed = sign_job(
        parse(Job, raw | sections, source="test job"),
        signer=signer,
        coordinator=COORDINATOR.verify_key,
        issued=now,
        not_after=now + timedelta(days=30),
    )
    approvals, rules = approvals_of(home)
    with contextlib.suppress(AwaitingApproval):
        approvals.admit(signed, rules)
    return approvals.find(Request.of(signed, now=now).id, rules, by_id=True)[0]


def facts_by_ledger(home: SiteHome, request: Request) -> Facts:
    """Return the facts of a request, its budget by the ledger as the node opens it."""
    config = home.load_config()
    seal = Seal(load_secret(home.storage_key, passphrase=None))
    with contextlib.closing(
        Ledger(
            home.path / "ledger.db",
            dataset=config.dataset,
            unit=config.budget.unit,
            budget=config.budget.caps(),
            cipher=seal,
        )
    ) as ledger:
        account = ledger.export(site=config.name, declared_records=1)
    lines = lines_by(account, config.budget.caps())
    return ApprovalDesk(home, passphrase=None).facts(request.id, by_id=True, lines=lines)


def approvals_of(home: SiteHome) -> tuple[Approvals, Rules]:
    """Return the approvals of a site as its node opens them, and what its policy says of them."""
    seal = Seal(load_secret(home.storage_key, passphrase=None))
    approvals = Approvals(home.approvals, site="north", seal=seal, log=open_log(home, passphrase=None))
    return approvals, Rules.of(load_policy(home.policy))


def want_people(home: SiteHome, needed: int = 1) -> None:
    """Let a policy want so many people to approve each job."""
    text = home.policy.read_text()
    text = re.sub("(?m)^approval = .*$", 'approval = "required"', text)
    home.policy.write_text(re.sub("(?m)^approvals_needed = .*$", f"approvals_needed = {needed}", text))
