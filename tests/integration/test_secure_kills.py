"""Secure aggregation under fifty kills: nothing acknowledged is lost, nothing is used twice, nothing is charged too little.

Half of the kills are at moments with a name (`tests.integration.dying`), each of them at least once; the others at random ones.
"""

from __future__ import annotations

import json
import os
import random
import secrets
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from client.site.home import open_site
from server.rounds.secure.attempts import ATTEMPTS_FILE
from server.store.submission import Submission
from shared.job.job import Job
from shared.tools.compare_logs import compare
from shared.trust.audit_log import Event
from shared.trust.certificates import spki
from shared.trust.node_keys import load_private_key
from shared.trust.receipts import proven_releases, read_receipts
from simulations.federation.processes import Federation
from tests.integration.books import assert_books_agree, coordinator_entries, rounds_of
from tests.integration.dying import COORDINATOR_MOMENTS, MOMENTS, NEEDS_A_DEAD_SITE, SITE_MOMENTS
from tests.integration.told import (
    Told,
    assert_masks_hide,
    assert_nothing_twice,
    ledger_lines,
    masked_of,
    recounted,
    told,
)

ROOT = Path(__file__).parents[2]
SITES = ("a", "b", "c", "d")
KILLS, ROUNDS, SPARE = 50, 12, 80
RANDOM_SECONDS = 4.0
MOMENT_SECONDS = 300.0
RULES = {
    "max_attempts_per_round": SPARE,
    "max_steps": 1000,
    "max_epsilon_per_job": 500.0,
    "min_noise_multiplier": 0.1,
}


@dataclass
class Kills:
    """A federation whose processes are killed and started again; a job is submitted whenever none is open.

    Attributes:
        submissions: of all jobs, oldest first.
        died: how often whom, by "coordinator" and name of the site.
        hit: the moments at which somebody died.
    """

    federation: Federation
    folder: Path
    chance: random.Random
    submit: Callable[[int], Submission]
    submissions: list[Submission] = field(default_factory=list)
    died: Counter[str] = field(default_factory=Counter)
    hit: Counter[str] = field(default_factory=Counter)
    known: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    acknowledged: dict[str, list[int]] = field(default_factory=dict)

    def start(self, name: str) -> None:
        role = "coordinator" if name == "coordinator" else "site"
        program = ("-m", "tests.integration.dying", role)
        if role == "site":
            self.federation.start_site(name, program=program)
        else:
            home = str(self.federation.coordinator.path)
            self.federation._spawn("coordinator", ["coordinator", "start", home], program=program)

    def keep_busy(self) -> None:
        if not self.submissions or not self.submissions[-1].is_open:
            self.submissions.append(self.submit(len(self.submissions)))

    def at_random(self) -> None:
        """Kill somebody, whatever it is doing; it may be about to start."""
        time.sleep(self.chance.uniform(0.0, RANDOM_SECONDS))
        name = self.chance.choice(("coordinator", *SITES))
        self.federation.processes[name].kill()
        self._dead(name, "at random")

    def at_moment(self, role: str, moment: str) -> None:
        """Wait until a process of a role has died at a moment; of several sites, the first that got there."""
        (self.folder / f"{role}.new").write_text(moment)
        (self.folder / f"{role}.new").rename(self.folder / f"{role}.at")
        deadline = time.monotonic() + MOMENT_SECONDS
        while not (dead := self._found_dead()):
            self.keep_busy()
            assert time.monotonic() < deadline, f"nobody came to the moment {role}, {moment!r}"
            time.sleep(0.02)
        for name in dead:
            self._dead(name, f"{role}, {moment}")

    def _found_dead(self) -> list[str]:
        return [name for name, process in self.federation.processes.items() if process.poll() is not None]

    def _dead(self, name: str, moment: str) -> None:
        process = self.federation.processes.pop(name)
        assert process.wait() == -9, f"{name} ended by itself: {self.federation.log_of(name)[-2000:]}"
        self.died[name] += 1
        self.hit[moment] += 1
        self.look()
        self.start(name)

    def look(self) -> None:
        """Check that every round that was acknowledged is there as it was."""
        for submission in self.submissions:
            durable, completed = rounds_of(submission), _completed(self.federation, submission)
            known, acknowledged = self.known.get(submission.name, []), self.acknowledged.get(submission.name, [])
            assert durable[: len(known)] == known, "a round that was on the disk was lost or changed"
            assert completed[: len(acknowledged)] == acknowledged
            assert {record["round"] for record in durable} >= set(completed), "the log tells what is on the disk"
            self.known[submission.name], self.acknowledged[submission.name] = durable, completed


@pytest.fixture
def kills(
    found_federation: Callable[..., Federation],
    federation_job: Callable[..., Job],
    evaluation_records: list[dict[str, Any]],
    tmp_path: Path,
) -> Kills:
    seed = int(os.environ.get("SILOTUNE_KILLS_SEED") or secrets.randbits(32))
    print(f"SILOTUNE_KILLS_SEED={seed}")  # noqa: T201
    environment = {"DYING": str(tmp_path), "PYTHONPATH": str(ROOT)}
    federation = found_federation(SITES, epsilon=500.0, policy=RULES, environment=environment)

    def submit(number: int) -> Submission:
        job = federation_job(
            name=f"kills-{number}",
            training={"rounds": ROUNDS, "local_steps": 1},
            privacy={
                "mechanism": "distributed",
                "max_colluding": 1,
                "noise_multiplier": 1.0,
                "sample_rate": 0.25,
                "epsilon": 500.0,
                "epsilon_alone": 500.0,
                "spare_attempts": SPARE,
            },
            federation={"min_sites": 3, "round_timeout_seconds": 20.0},
        )
        return federation.submit(job, evaluation_records)

    return Kills(federation, tmp_path, random.Random(seed), submit)


@pytest.mark.endurance
@pytest.mark.timeout(3600)
def test_fifty_kills_lose_no_round_use_nothing_twice_and_charge_no_less_than_was_sent(kills: Kills) -> None:
    federation = kills.federation
    started = time.monotonic()
    for name in ("coordinator", *SITES):
        kills.start(name)
    plan: list[tuple[str, str] | None] = [(role, moment) for role, moments in MOMENTS.items() for moment in moments]
    plan += [None] * max(0, KILLS - len(plan))
    kills.chance.shuffle(plan)
    for one in plan:
        kills.keep_busy()
        if one is None:
            kills.at_random()
            continue
        if one[1] in NEEDS_A_DEAD_SITE:
            kills.at_moment("site", "masked: roster accepted")
        kills.at_moment(*one)
    assert sum(kills.died.values()) >= KILLS
    assert set(kills.died) == {"coordinator", *SITES}
    assert len(kills.hit) == len(SITE_MOMENTS) + len(COORDINATOR_MOMENTS) + 1
    for submission in kills.submissions:
        state = federation.wait(submission, timeout=600)
        assert state["state"] == "completed", state
    kills.look()
    federation.stop()
    seconds = time.monotonic() - started
    print(f"{dict(kills.died)} in {seconds:.0f} s, {len(kills.submissions)} jobs")  # noqa: T201
    of_sites, of_coordinator = told(kills.folder, "site"), told(kills.folder, "coordinator")
    assert_nothing_twice(of_sites)
    assert_masks_hide(of_coordinator)
    assert {one["site"] for one in of_coordinator} == set(SITES)
    for submission in kills.submissions:
        _assert_rounds_are_there_once(federation, submission)
        assert_books_agree(federation, submission, sites=SITES)
        _assert_logs_agree(federation, submission)
        for name in SITES:
            _assert_charged_as_sent(kills, submission, name, of_sites, of_coordinator)
    for name in SITES:
        _assert_accounts_are_recounted(federation, name)


def _completed(federation: Federation, submission: Submission) -> list[int]:
    if not (federation.coordinator.audit / "head.json").exists():
        return []
    return [entry.details["round"] for entry in coordinator_entries(federation, submission, Event.ROUND_COMPLETED)]


def _assert_rounds_are_there_once(federation: Federation, submission: Submission) -> None:
    assert [record["round"] for record in rounds_of(submission)] == list(range(ROUNDS + 1))
    assert _completed(federation, submission) == list(range(1, ROUNDS + 1))
    # However often a round was attempted, it began at the same adapter.
    asked = {
        (e.details["round"], e.details["adapter_sha256"])
        for e in coordinator_entries(federation, submission, Event.READY_ASKED)
    }
    assert sorted(number for number, _ in asked) == list(range(1, ROUNDS + 1))
    # No number of an attempt served for two rosters.
    rosters = [e.details["adapter_sha256"] for e in coordinator_entries(federation, submission, Event.ROUND_ASKED)]
    assert len(rosters) == len(set(rosters))
    attempts = json.loads((submission.run_folder / ATTEMPTS_FILE).read_text())["rounds"]
    assert len(rosters) <= len(attempts) <= ROUNDS + SPARE


def _assert_logs_agree(federation: Federation, submission: Submission) -> None:
    receipts = read_receipts(submission.run_folder / "receipts.jsonl")
    for name in SITES:
        home = federation.site(name)
        key = spki(load_private_key(home.key, None).public_key())
        proven = proven_releases(receipts, [key], site=name)
        jobs = [submission.state()["job_sha256"]]  # whose receipts these are
        found = compare(home.audit, federation.coordinator.audit, site=name, proven=proven, jobs=jobs)
        assert [difference for difference in found if difference.contradicts] == []


def _assert_charged_as_sent(
    kills: Kills, submission: Submission, name: str, of_sites: list[Told], of_coordinator: list[Told]
) -> None:
    """Check that what was masked was charged, once, and that no more was than the kills account for."""
    job = submission.state()["job_sha256"]
    reserved = [
        (line["payload"]["round"], line["payload"]["attempt"])
        for line in ledger_lines(kills.federation.site(name).audit)
        if line["kind"] == "reserve" and line["payload"]["job_id"] == job
    ]
    assert len(reserved) == len(set(reserved)), "an attempt was charged twice"
    masked = masked_of(of_sites, name, job)
    assert masked <= set(reserved), "an input was masked that was not charged"
    assert len(set(reserved) - masked) <= kills.died[name], "a charge without an input, and nobody died of it"
    came = {(*one["place"],) for one in of_coordinator if (one["site"], one["job"]) == (name, job)}
    assert came <= masked


def _assert_accounts_are_recounted(federation: Federation, name: str) -> None:
    """Check both accounts, of each job and of all, against dp-accounting and the text of the audit log alone."""
    home = federation.site(name)
    ledger, delta = open_site(home, passphrase=None).ledger(), home.load_config().budget.delta
    lines = ledger_lines(home.audit)
    for job in {line["payload"]["job_id"] for line in lines if line["kind"] == "reserve"} | {None}:
        theirs = recounted(lines, delta, job)
        ours = (ledger.spent_epsilon(job), ledger.spent_epsilon(job, promise="alone"))
        assert ours == pytest.approx(theirs, rel=2e-3), job
        assert all(mine >= other * (1 - 1e-6) for mine, other in zip(ours, theirs, strict=True)), "never too little"
        assert ours[0] < ours[1]
