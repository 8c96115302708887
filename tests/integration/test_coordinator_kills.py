"""The coordinator is killed twenty times in one run of ten rounds, in every phase, and nothing is lost or paid twice."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import psutil
import pytest

from server.store.submission import Submission
from shared.job.job import Job
from shared.trust.audit_log import Event
from simulations.federation.processes import Federation
from tests.integration.books import assert_books_agree, charges_of, coordinator_entries, rounds_of
from tests.integration.eventually import eventually

ROUNDS = 10
KILLS = 20
# What to wait for after a restart, and the range of seconds after it in which the kill falls.
PHASES: dict[str, tuple[Event | None, tuple[float, float]]] = {
    "start-up": (None, (0.0, 4.0)),
    "submission": (None, (0.0, 4.0)),  # counted from the start of the attempt
    "asking": (Event.ROUND_ASKED, (0.0, 0.3)),
    "training": (Event.ROUND_ASKED, (0.3, 2.0)),
    "collecting": (Event.UPDATE_ACCEPTED, (0.0, 0.1)),
    "checkpointing": (Event.ROUND_COMPLETED, (0.0, 0.1)),
}
BEFORE_ROUNDS = ("start-up", "submission")


@pytest.mark.endurance
@pytest.mark.timeout(2400)
def test_twenty_kills_of_the_coordinator_lose_nothing_and_charge_nothing_twice(
    found_federation: Callable[..., Federation],
    federation_job: Callable[..., Job],
    evaluation_records: list[dict[str, Any]],
) -> None:
    federation = found_federation(["a", "b"], epsilon=500.0, policy={"max_steps": 10_000})
    for name in "ab":
        federation.start_site(name)
    job = federation_job(
        training={"rounds": ROUNDS, "local_steps": 50},
        privacy={"noise_multiplier": 8.0},
        federation={"round_timeout_seconds": 120.0},
    )
    submission = federation.submit(job, evaluation_records)
    generator = random.Random(20)
    phases = [phase for phase in PHASES for _ in range(KILLS // len(PHASES))]
    phases += generator.choices(BEFORE_ROUNDS, k=KILLS - len(phases))
    generator.shuffle(phases)
    hit: Counter[str] = Counter()
    known: list[dict[str, Any]] = []
    for phase in phases:
        if len(known) > ROUNDS - 2 and phase not in BEFORE_ROUNDS:
            phase = "start-up"  # the last rounds are for the end
        _run_until(federation, submission, phase, generator)
        _kill(federation)
        hit[phase] += 1
        # Whatever was durable stays as it was.
        durable = rounds_of(submission)
        assert durable[: len(known)] == known
        known = durable
    assert submission.is_open, "the run ended before the last kill"
    assert all(hit[phase] for phase in PHASES), hit

    federation.start_coordinator()
    state = federation.wait(submission, timeout=300)
    assert state["state"] == "completed", state
    records = rounds_of(submission)
    assert records[: len(known)] == known
    assert [record["round"] for record in records] == list(range(ROUNDS + 1))
    assert all(record["sites"] == ["a", "b"] for record in records[1:])
    # A round that was asked for again went out with the same adapter, and each site's answer was the same.
    for event, key in ((Event.ROUND_ASKED, "adapter_sha256"), (Event.UPDATE_ACCEPTED, "sha256")):
        seen = {
            (e.details["round"], e.details.get("site"), e.details[key]) for e in _entries(federation, submission, event)
        }
        assert max(Counter((number, site) for number, site, _ in seen).values()) == 1
    completed = [e.details["round"] for e in _entries(federation, submission, Event.ROUND_COMPLETED)]
    assert completed == list(range(1, ROUNDS + 1)), "each round was completed once"
    for name in "ab":
        assert charges_of(federation, name, submission) == dict.fromkeys(range(1, ROUNDS + 1), 1)
    assert_books_agree(federation, submission, sites=["a", "b"])


def _run_until(federation: Federation, submission: Submission, phase: str, generator: random.Random) -> None:
    """Start the coordinator and return at a random moment of a phase."""
    event, delays = PHASES[phase]
    before = len(_entries(federation, submission, event)) if event else 0
    earlier = submission.state().get("started")
    federation.spawn_coordinator()
    if event is not None:
        eventually(lambda: len(_entries(federation, submission, event)) > before, timeout=180)
    elif phase == "submission":
        eventually(lambda: submission.state().get("started") != earlier, timeout=180)
    time.sleep(generator.uniform(*delays))


def _kill(federation: Federation) -> None:
    """Kill the coordinator, which has started nothing that could outlive it."""
    assert psutil.Process(federation.processes["coordinator"].pid).children(recursive=True) == []
    federation.kill("coordinator")


def _entries(federation: Federation, submission: Submission, event: Event) -> list[Any]:
    if not (federation.coordinator.audit / "head.json").exists():
        return []
    return coordinator_entries(federation, submission, event)
