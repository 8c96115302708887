"""Folders of coordinators with a past, made by the product's own code: keys, certificates, jobs, rounds, a status."""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.serialization import Encoding

from server.records.rounds import RoundRecord, write_rounds
from server.store.home import CoordinatorHome
from server.store.submission import Submission, now_text
from shared.files.atomic import write_json, write_text
from shared.job.job import Job
from shared.job.parsing import parse
from shared.trust.pki import approve, make_request, publish
from shared.trust.signed_job import sign_job
from shared.trust.signing import SigningKey, load_verify_key
from simulations.federation.processes import Federation

SIGNER = SigningKey.from_bytes(b"\1" * 32)
SITES = ("charite", "north", "st-anna")


def make_home(folder: Path, sites: tuple[str, ...] = SITES) -> CoordinatorHome:
    """Return a coordinator's folder with keys, certificate and admitted sites, as its operator makes it."""
    federation = Federation(folder)
    federation.found()
    for name in sites:
        (folder / f"{name}.crt").write_bytes(certificate(folder, name))
        federation.admit(folder / f"{name}.crt")
    publish(federation.ca, federation.coordinator.trust)
    return federation.coordinator


def certificate(folder: Path, name: str) -> bytes:
    """Return a site's certificate (PEM) from the CA of a folder."""
    _, request = make_request(name=name, role="site", hosts=())
    return approve(folder / "ca", request, role="site", passphrase=None, rotate=True).public_bytes(Encoding.PEM)


def job_of(name: str = "triage", **sections: Any) -> Job:
    """Return a small job; keyword arguments replace sections."""
    raw: dict[str, Any] = {
        "name": name,
        "task": {"kind": "sequence_classification", "labels": ["routine", "urgent"]},
        "training": {"rounds": 8, "local_steps": 2},
        "privacy": {"noise_multiplier": 2.0, "sample_rate": 0.25},
        "federation": {"min_sites": 2},
    }
    return parse(Job, raw | sections, source="test job")


def submit(home: CoordinatorHome, job: Job, number: int = 1, **state: Any) -> Submission:
    """Put a job where `silotune coordinator submit` does; by hand, because a thousand of them must not take a minute."""
    now = datetime.now(UTC).replace(microsecond=0)
    coordinator = load_verify_key(home.path / "round.pub")
    signed = sign_job(job, signer=SIGNER, coordinator=coordinator, issued=now, not_after=now + timedelta(days=30))
    folder = home.jobs / f"{number:04d}-{job.name}"
    folder.mkdir(parents=True)
    write_text(folder / "signed_job.json", signed.to_json())
    facts = {"state": "submitted", "since": now_text(), "job_sha256": job.sha256, "signer": SIGNER.verify_key.text}
    write_json(folder / "state.json", facts | state)
    return Submission(folder)


def go_on(submission: Submission, rounds: int, *, first: int = 0, sites: tuple[str, ...] = SITES, **more: Any) -> None:
    """Let a run do so many rounds."""
    records = [
        RoundRecord(
            round=number,
            metrics={"accuracy": 0.5 + 0.04 * number, "loss": 0.7 - 0.02 * number},
            epsilon_max=0.31 * number if number else None,
            sites=list(sites) if number else [],
            **(more if number else {}),
        )
        for number in range(first, rounds + 1)
    ]
    submission.run_folder.mkdir(exist_ok=True)
    write_text(submission.run_folder / "job.json", submission.signed_job().job.canonical_json())
    write_rounds(submission.run_folder / "metrics.jsonl", records)
    submission.note(round=rounds, metrics=dict(records[-1].metrics), sites=list(sites))


def say(
    home: CoordinatorHome, *, online: tuple[str, ...] = SITES, sites: tuple[str, ...] = SITES, **facts: Any
) -> None:
    """Write what a coordinator that runs would say of itself; its process is this one."""
    now = datetime.now(UTC)
    told = {
        name: {
            "online": name in online,
            "until": str(now + timedelta(days=90)),
            "last_seen": now.isoformat(timespec="seconds") if name in online else None,
        }
        for name in sites
    }
    said = {"pid": os.getpid(), "state": "running", "updated": now.isoformat(timespec="seconds"), "job": None}
    said |= {"sites": told, "round": None} | facts
    temporary = home.status.with_suffix(".new")
    temporary.write_text(json.dumps(said))
    temporary.replace(home.status)  # as `write_json` does, without waiting for the disk


def copy(submission: Submission, numbers: range) -> None:
    """Put copies of a job beside it, under other numbers."""
    files = {path.relative_to(submission.path): path for path in submission.path.rglob("*") if path.is_file()}
    contents = {place: path.read_bytes() for place, path in files.items()}
    for number in numbers:
        for place, content in contents.items():
            path = submission.path.parent / f"{number:04d}-{submission.name.partition('-')[2]}" / place
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
