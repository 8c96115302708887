"""Coordinator and sites are killed thirty times in one run of ten rounds, in all phases: nothing is lost or paid twice."""

from __future__ import annotations

import os
import random
import secrets
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import psutil
import pytest

from server.store.submission import Submission
from shared.job.job import Job
from shared.tools.compare_logs import compare
from shared.trust import audit_log
from shared.trust.audit_chain import Entry
from shared.trust.audit_log import Event
from shared.trust.certificates import spki
from shared.trust.node_keys import load_private_key
from shared.trust.receipts import proven_releases, read_receipts
from simulations.federation.processes import Federation
from tests.integration.books import (
    assert_books_agree,
    charges_of,
    coordinator_entries,
    ledger_epsilon,
    privacy_record,
    rounds_of,
)
from tests.integration.eventually import eventually

ROUNDS = 10
SITES = ("a", "b")
KILLS = 30
# Whom to kill: at a random moment of a range of seconds after the next event of this kind in its own log.
PHASES: dict[str, tuple[Event, tuple[float, float]]] = {
    "coordinator, asking": (Event.ROUND_ASKED, (0.0, 0.3)),
    "coordinator, training": (Event.ROUND_ASKED, (0.3, 2.0)),
    "coordinator, collecting": (Event.UPDATE_ACCEPTED, (0.0, 0.1)),
    "coordinator, checkpointing": (Event.ROUND_COMPLETED, (0.0, 0.1)),
} | {
    f"{name}, {phase}": when
    for name in SITES
    for phase, when in {
        "asked": (Event.REQUEST_RECEIVED, (0.0, 0.05)),
        "training": (Event.LEDGER_ENTRY, (0.0, 1.0)),
        "storing": (Event.RELEASE_STORED, (0.0, 0.05)),
        "sending": (Event.RELEASE_SENT, (0.0, 0.05)),
    }.items()
}
# The other kills come so soon after the one before (seconds at most) that processes die while they start, connect or resume. The
# shorter times are for the last two rounds, which are to be open until the last kill.
SOON_SECONDS = {0: 3.0, ROUNDS - 2: 1.0, ROUNDS - 1: 0.3}


@pytest.mark.endurance
@pytest.mark.timeout(2400)
def test_thirty_kills_of_either_side_lose_nothing_and_charge_nothing_twice(
    found_federation: Callable[..., Federation],
    federation_job: Callable[..., Job],
    evaluation_records: list[dict[str, Any]],
) -> None:
    seed = int(os.environ.get("SILOTUNE_KILLS_SEED") or secrets.randbits(32))
    print(f"SILOTUNE_KILLS_SEED={seed}")  # noqa: T201
    generator = random.Random(seed)
    federation = found_federation(SITES, epsilon=500.0, policy={"max_steps": 10_000})
    federation.start_coordinator()
    for name in SITES:
        federation.start_site(name)
    job = federation_job(
        training={"rounds": ROUNDS, "local_steps": 200},
        privacy={"noise_multiplier": 8.0},
        federation={"round_timeout_seconds": 300.0},
    )
    submission = federation.submit(job, evaluation_records)
    _kill_all(federation, submission, generator)
    assert submission.state()["state"] == "completed", submission.state()
    records = rounds_of(submission)
    assert [record["round"] for record in records] == list(range(ROUNDS + 1))
    assert all(record["sites"] == list(SITES) for record in records[1:])
    # A round that was asked for again went out with the same adapter, and each site's answer was the same.
    for event, key in ((Event.ROUND_ASKED, "adapter_sha256"), (Event.UPDATE_ACCEPTED, "sha256")):
        seen = {
            (e.details["round"], e.details.get("site"), e.details[key])
            for e in coordinator_entries(federation, submission, event)
        }
        assert max(Counter((number, site) for number, site, _ in seen).values()) == 1
    assert _completed(federation, submission) == list(range(1, ROUNDS + 1)), "each round was completed once"
    assert_books_agree(federation, submission, sites=SITES)
    for name in SITES:
        _assert_charged_once(federation, submission, name)
        _assert_logs_agree(federation, submission, name)


def _kill_all(federation: Federation, submission: Submission, generator: random.Random) -> None:
    """Kill whoever is drawn, start it again, and see each time that every round that was acknowledged stays."""
    plan: list[str | None] = [*PHASES, *[None] * (KILLS - len(PHASES))]
    generator.shuffle(plan)
    hit: Counter[str] = Counter()
    known, acknowledged = list[dict[str, Any]](), list[int]()
    for phase in plan:
        rounds = len(known) - 1
        if phase is not None and rounds < ROUNDS - 2:
            name = phase.split(",")[0]
            _wait_for(federation, submission, phase, generator)
        else:
            name = generator.choice(("coordinator", *SITES))
            phase = f"{name}, any moment"
            soon = max(number for number in SOON_SECONDS if number <= max(rounds, 0))
            time.sleep(generator.uniform(0.0, SOON_SECONDS[soon]))
        _kill(federation, name)
        hit[phase] += 1
        durable, completed = rounds_of(submission), _completed(federation, submission)
        assert durable[: len(known)] == known
        assert completed[: len(acknowledged)] == acknowledged
        assert {record["round"] for record in durable} >= set(completed), "the log tells what is on the disk"
        known, acknowledged = durable, completed
        _start(federation, name)
    print(dict(sorted(hit.items())))  # noqa: T201
    assert submission.is_open, "the run ended before the last kill"
    assert {phase.split(",")[0] for phase in hit} == {"coordinator", *SITES}
    assert len(hit.keys() & PHASES.keys()) >= len(PHASES) / 2
    federation.wait(submission, timeout=600)
    assert rounds_of(submission)[: len(known)] == known
    assert _completed(federation, submission)[: len(acknowledged)] == acknowledged


def _wait_for(federation: Federation, submission: Submission, phase: str, generator: random.Random) -> None:
    """Return at a random moment of a phase."""
    name, (event, delays) = phase.split(",")[0], PHASES[phase]
    before = _number_of(federation, submission, name, event)
    eventually(lambda: _number_of(federation, submission, name, event) > before, timeout=300)
    time.sleep(generator.uniform(*delays))


def _number_of(federation: Federation, submission: Submission, name: str, event: Event) -> int:
    folder = federation.coordinator.audit if name == "coordinator" else federation.site(name).audit
    if not (folder / "head.json").exists():
        return 0  # it has only just been started for the first time
    return sum(entry.event == event for entry in audit_log.read(folder))


def _completed(federation: Federation, submission: Submission) -> list[int]:
    """Return the rounds that the coordinator's log says are on the disk, as often as it says so."""
    return [entry.details["round"] for entry in coordinator_entries(federation, submission, Event.ROUND_COMPLETED)]


def _kill(federation: Federation, name: str) -> None:
    """Kill a process, which has started nothing that could outlive it."""
    assert psutil.Process(federation.processes[name].pid).children(recursive=True) == []
    federation.kill(name)


def _start(federation: Federation, name: str) -> None:
    federation.spawn_coordinator() if name == "coordinator" else federation.start_site(name)


def _assert_charged_once(federation: Federation, submission: Submission, name: str) -> None:
    """Check that a site charged a round again only if it had died with the round charged and nothing of it stored."""
    job = submission.state()["job_sha256"]
    charged: Counter[int] = Counter()
    open_round, died = None, False
    for entry in audit_log.read(federation.site(name).audit):
        if entry.event == Event.NODE_STARTED:
            died = True
        elif entry.event in (Event.RELEASE_STORED, Event.RELEASE_REPEATED):
            open_round = None
        elif _is_charge(entry, job):
            number = entry.details["payload"]["round"]
            assert open_round is None or (died and open_round == number), f"{name}, round {number}"
            assert open_round is not None or number not in charged, (
                f"{name} charged round {number}, which it had stored"
            )
            charged[number] += 1
            open_round, died = number, False
    assert charged == charges_of(federation, name, submission)
    assert set(charged) == set(range(1, ROUNDS + 1))
    stated = privacy_record(submission, name)
    assert stated is not None
    assert stated["rounds"] == list(range(1, ROUNDS + 1))
    if charged.total() == ROUNDS:
        assert ledger_epsilon(federation, name, submission) == pytest.approx(stated["epsilon_spent"], rel=1e-9)
    print(f"{name}: {charged.total() - ROUNDS} rounds died with their charge")  # noqa: T201


def _is_charge(entry: Entry, job: str) -> bool:
    kind = entry.details.get("kind") if entry.event == Event.LEDGER_ENTRY else None
    return kind == "reserve" and entry.details["payload"]["job_id"] == job


def _assert_logs_agree(federation: Federation, submission: Submission, name: str) -> None:
    """Check that both logs, and what the site signed, contradict each other nowhere."""
    home = federation.site(name)
    key = spki(load_private_key(home.key, None).public_key())
    proven = proven_releases(read_receipts(submission.run_folder / "receipts.jsonl"), [key], site=name)
    assert {number for _, number, _ in proven} == set(range(1, ROUNDS + 1))
    found = compare(home.audit, federation.coordinator.audit, site=name, proven=proven)
    assert [difference for difference in found if difference.contradicts] == []
