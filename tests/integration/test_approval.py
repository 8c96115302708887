"""People of one site approve, refuse and withdraw jobs while coordinator and nodes run as processes of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from client.node.status import read_status
from server.store.submission import Submission
from shared.job.job import Job
from shared.trust import audit_log
from shared.trust.audit_log import Entry, Event
from simulations.federation.processes import Federation, change_toml
from tests.conftest import Outcome
from tests.integration.eventually import eventually

ACCOUNT, REASON = "marker.account", "marker-reason-of-the-board"
SAID_NO = "PolicyError: site a refuses the job {}: its people said no."


@pytest.fixture(scope="module")
def federation(found_federation: Callable[..., Federation]) -> Federation:
    """Coordinator and the sites a and b run; at a two people approve each job."""
    made = found_federation(["a", "b"], epsilon=50.0, policy={"max_steps": 1900})
    change_toml(made.site("a").policy, approval="required", approvals_needed=2)
    made.start_coordinator()
    for name in "ab":
        made.start_site(name)
    for name in "ab":
        eventually(lambda name=name: read_status(made.site(name))["healthy"])
    return made


@pytest.fixture
def submit(
    federation: Federation, federation_job: Callable[..., Job], evaluation_records: list[dict[str, Any]]
) -> Iterator[Callable[..., Submission]]:
    """Return what submits a job and waits until it awaits approval at a."""
    submitted: list[Submission] = []

    def make(name: str, **sections: Any) -> Submission:
        submission = federation.submit(federation_job(name=name, **sections), evaluation_records)
        submitted.append(submission)
        eventually(lambda: submission.state().get("awaiting") == ["a"])
        return submission

    yield make
    for submission in submitted:
        if submission.is_open:
            submission.request_stop()
            federation.wait(submission, timeout=90)


@pytest.fixture
def people(federation: Federation, silotune: Callable[..., Outcome]) -> Callable[..., str]:
    """Return `silotune site COMMAND a ...` of this process, beside the running node."""

    def run(command: str, *arguments: str) -> str:
        done = silotune("site", command, federation.site("a").path, *arguments)
        assert (done.status, done.err) == (0, ""), done
        return done.out

    return run


def log_of(federation: Federation, name: str, event: Event) -> list[Entry]:
    folder = federation.coordinator.audit if name == "coordinator" else federation.site(name).audit
    return [entry for entry in audit_log.read(folder) if entry.event == event]


def restarted(federation: Federation, name: str) -> None:
    """Kill a node and start it again; a site that comes back is asked at once."""
    federation.kill(name)
    federation.start_site(name)


def what_left_the_site(federation: Federation) -> Iterator[tuple[Path, bytes]]:
    """Yield every file that is not the site's own, what the coordinator printed among them."""
    own = federation.site("a").path
    for path in sorted(federation.folder.rglob("*")):
        if path.is_file() and not path.is_relative_to(own) and path.name != "a.log":
            yield path, path.read_bytes()


def test_a_job_waits_is_approved_by_two_and_runs(
    federation: Federation,
    submit: Callable[..., Submission],
    people: Callable[..., str],
    silotune: Callable[..., Outcome],
) -> None:
    submission = submit("approved")
    status = silotune("coordinator", "status", federation.coordinator.path).out
    assert "a is waiting for approval" in status
    assert "(a: waiting for approval)" in str(eventually(lambda: submission.state().get("waiting")))
    (asked,) = log_of(federation, "a", Event.APPROVAL_ASKED)
    (told,) = log_of(federation, "coordinator", Event.SITE_AWAITS)
    assert (told.details["site"], told.details["job"]) == ("a", asked.details["job"])
    # Nothing was prepared for it, let alone trained.
    assert log_of(federation, "a", Event.JOB_PREPARED) == []
    assert "waits for approval" in people("requests")
    assert "rules of policy.toml: 12 of 12 kept" in people("request", "approved")
    assert "still waits" in people("approve", "approved", "--by", ACCOUNT, "--reason", REASON)
    restarted(federation, "a")  # one of two holds, and is kept
    eventually(lambda: len(log_of(federation, "a", Event.REQUEST_REFUSED)) > 1)
    assert submission.state()["awaiting"] == ["a"]
    assert len(log_of(federation, "a", Event.APPROVAL_ASKED)) == 1
    assert "is approved" in people("approve", "approved", "--by", f"{ACCOUNT}-2", "--reason", REASON)
    restarted(federation, "a")
    state = federation.wait(submission, timeout=240)
    assert state["state"] == "completed", state
    assert state["awaiting"] == []
    assert len(log_of(federation, "a", Event.APPROVAL_BEGUN)) == 1
    assert "approved and begun" in people("requests")
    assert len(log_of(federation, "a", Event.RELEASE_STORED)) == 2


def test_a_refused_job_never_runs_and_nobody_learns_why(
    federation: Federation, submit: Callable[..., Submission], people: Callable[..., str]
) -> None:
    submission = submit("unwanted")
    job = submission.state()["job_sha256"]
    people("refuse", "unwanted", "--by", ACCOUNT, "--reason", REASON)
    restarted(federation, "a")
    eventually(lambda: submission.state().get("refused") == {"a": SAID_NO.format("unwanted")})
    assert submission.state()["awaiting"] == []
    assert not submission.state().get("round")
    for event in (Event.RELEASE_STORED, Event.JOB_PREPARED):
        assert [entry for entry in log_of(federation, "a", event) if entry.details["job"] == job] == []
    (refused,) = log_of(federation, "a", Event.APPROVAL_REFUSED)
    assert (refused.details["by"], refused.details["reason"]) == (ACCOUNT, REASON)


def test_a_job_is_withdrawn_while_it_runs(
    federation: Federation, submit: Callable[..., Submission], people: Callable[..., str]
) -> None:
    submission = submit(
        "long",
        training={"rounds": 1900, "local_steps": 1},
        privacy={"noise_multiplier": 30.0, "sample_rate": 0.1},
        federation={"min_sites": 2},
    )
    job = submission.state()["job_sha256"]
    for name in (ACCOUNT, f"{ACCOUNT}-2"):
        people("approve", "long", "--by", name)
    restarted(federation, "a")
    eventually(lambda: submission.state().get("round", 0) >= 1, timeout=240)
    people("refuse", "long", "--by", ACCOUNT, "--reason", REASON)

    def refusals() -> list[Entry]:
        return [
            entry
            for entry in log_of(federation, "coordinator", Event.UPDATE_REFUSED)
            if entry.details["site"] == "a" and "its people said no" in entry.details["reason"]
        ]

    eventually(refusals)
    (withdrawn,) = log_of(federation, "a", Event.APPROVAL_WITHDRAWN)
    # At most the round at hand was finished; from then on nothing of the job leaves.
    later = [
        entry
        for entry in log_of(federation, "a", Event.RELEASE_STORED)
        if entry.details["job"] == job and entry.sequence > withdrawn.sequence
    ]
    assert len(later) <= 1


def test_what_people_said_is_nowhere_but_at_the_site(federation: Federation) -> None:
    """After all of the above: neither account nor reason, in no file of the coordinator, in nothing that it printed."""
    assert len(log_of(federation, "a", Event.APPROVAL_GIVEN)) >= 4
    seen = list(what_left_the_site(federation))
    assert len(seen) > 30
    assert [path for path, content in seen if b"marker" in content] == []
    assert b"is waiting for approval" in b"".join(content for _, content in seen)
