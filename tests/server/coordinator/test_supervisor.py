"""The coordinator's process against a link and a folder in trouble; the real ones: tests/integration."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

import server.coordinator.journal as journal_module
import server.coordinator.supervisor as supervisor_module
from server.coordinator.attempt import Attempt, lasts
from server.coordinator.journal import Journal
from server.coordinator.production import _Recorder
from server.coordinator.progress import Progress
from server.coordinator.run_file import RunSettings, submit
from server.coordinator.supervisor import Supervisor
from server.link.admission import SiteFacts
from server.link.server import SiteState
from server.records.rounds import RoundRecord
from server.runs.folder import RunFolder
from server.store.checkpoint import Checkpoint
from server.store.home import CoordinatorHome
from server.store.submission import Submission
from shared.data.datasets import DataSource
from shared.errors import ConfigError, RunError, RunHeld, TrustError
from shared.job.job import Job
from shared.job.parsing import parse
from shared.trust import audit_log
from shared.trust.audit_log import AuditLog, Event
from shared.trust.signing import SigningKey, load_verify_key
from shared.wire.messages import SiteDescription, TrainReply
from simulations.federation.processes import Federation


class StandInLink:
    """The link; a test sets what it says."""

    alive = True
    problem: str | None = None

    def __init__(self) -> None:
        self.states: dict[str, SiteState] = {}
        self.started = 0

    def start(self) -> None:
        self.alive = True
        self.started += 1

    def stop(self) -> None:
        self.alive = False

    def close(self) -> None:
        pass

    def sites(self) -> tuple[dict[str, SiteState], str | None]:
        return self.states, self.problem


class StandInAttempt:
    """One attempt at a job, which ends when a test says so."""

    made: ClassVar[list[StandInAttempt]] = []
    held = False

    def __init__(self, home: CoordinatorHome, submission: Submission, link: Any, watched: Any) -> None:
        self.submission, self.alive, self.halted, self.progress = submission, True, False, Progress()
        self.made.append(self)

    def halt(self) -> None:
        self.halted = True

    def join(self, timeout: float) -> bool:
        return not self.alive


@pytest.fixture
def home(tmp_path: Path) -> CoordinatorHome:
    federation = Federation(tmp_path)
    federation.found()
    return federation.coordinator


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, which only the test moves."""
    now = [1000.0]
    monkeypatch.setattr(supervisor_module.time, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def attempts(monkeypatch: pytest.MonkeyPatch) -> list[StandInAttempt]:
    monkeypatch.setattr(StandInAttempt, "made", [])
    monkeypatch.setattr(supervisor_module, "Attempt", StandInAttempt)
    return StandInAttempt.made


@pytest.fixture
def link(monkeypatch: pytest.MonkeyPatch) -> StandInLink:
    made = StandInLink()
    monkeypatch.setattr(supervisor_module, "LinkServer", lambda *_, **__: made)
    return made


@pytest.fixture
def supervisor(
    home: CoordinatorHome, link: StandInLink, attempts: list[StandInAttempt], clock: list[float]
) -> Supervisor:
    return Supervisor(home)


@pytest.fixture
def submitted(home: CoordinatorHome) -> Submission:
    raw = {
        "name": "demo",
        "task": {"kind": "sequence_classification", "labels": ["x", "y"]},
        "training": {"rounds": 2, "local_steps": 2},
        "privacy": {"noise_multiplier": 1.0},
    }
    settings = RunSettings(evaluation=DataSource(path="x.jsonl", columns={"text": "text", "label": "label"}))
    records: list[Any] = [{"text": "a film", "label": "x"}]
    coordinator = load_verify_key(home.path / "round.pub")
    job = parse(Job, raw, source="test")
    return submit(home.jobs, job, settings, records, signer=SigningKey.generate(), coordinator=coordinator)


def status_of(home: CoordinatorHome) -> dict[str, Any]:
    return dict(json.loads(home.status.read_text()))


def test_a_run_that_ends_early_is_started_again_later_each_time(
    supervisor: Supervisor, submitted: Submission, attempts: list[StandInAttempt], clock: list[float]
) -> None:
    supervisor._turn()
    assert submitted.state()["started"]
    waits = []
    for number in range(2, 10):
        attempts[-1].alive = False
        supervisor._turn()
        started = clock[0]
        while len(attempts) < number:
            clock[0] += 0.5
            supervisor._turn()
        waits.append(clock[0] - started)
    assert waits == sorted(waits)
    assert waits[0] <= 0.5
    assert waits[-1] == pytest.approx(30.0, abs=1.0)
    assert submitted.is_open, "a full disk or a lost network may go away after any time"


def test_progress_makes_the_next_attempt_prompt_again(
    supervisor: Supervisor, submitted: Submission, attempts: list[StandInAttempt], clock: list[float]
) -> None:
    supervisor._turn()
    for _ in range(5):
        attempts[-1].alive = False
        supervisor._turn()
        clock[0] += 60
        supervisor._turn()
    submitted.run_folder.mkdir()
    (submitted.run_folder / "metrics.jsonl").write_text("{}\n{}\n")
    attempts[-1].alive = False
    before = len(attempts)
    supervisor._turn()
    supervisor._turn()
    assert len(attempts) == before + 1


def test_a_defect_that_stays_ends_the_job_with_its_reason(
    supervisor: Supervisor,
    submitted: Submission,
    attempts: list[StandInAttempt],
    clock: list[float],
    home: CoordinatorHome,
) -> None:
    for _ in range(20):
        supervisor._turn()
        if not submitted.is_open:
            break
        submitted.note(problem="ZeroDivisionError; see the log", defect=True)
        attempts[-1].alive = False
        clock[0] += 60
    state = submitted.state()
    assert state["state"] == "failed"
    assert "8 attempts without a new round; the last one: ZeroDivisionError" in state["problem"]
    (ended,) = [entry for entry in audit_log.read(home.audit) if entry.event == Event.JOB_FINISHED]
    assert ended.details["state"] == "failed"


def test_a_job_that_a_person_must_look_at_rests_until_the_next_process(
    supervisor: Supervisor,
    submitted: Submission,
    attempts: list[StandInAttempt],
    clock: list[float],
    home: CoordinatorHome,
) -> None:
    """Trying again would cost its sites a charge each time."""
    supervisor._turn()
    attempts[-1].held, attempts[-1].alive = True, False
    for _ in range(20):
        clock[0] += 60
        supervisor._turn()
    assert len(attempts) == 1
    assert submitted.is_open
    Supervisor(home)._turn()
    assert len(attempts) == 2
    submitted.request_stop()
    supervisor._turn()
    assert submitted.state()["state"] == "stopped"


def test_other_jobs_do_not_wait_for_one_that_rests(
    supervisor: Supervisor, submitted: Submission, attempts: list[StandInAttempt], home: CoordinatorHome
) -> None:
    supervisor._turn()
    attempts[-1].held, attempts[-1].alive = True, False
    other = home.jobs / "0002-other"
    shutil.copytree(submitted.path, other)
    Submission(other).note("submitted")
    supervisor._turn()
    assert [attempt.submission.name for attempt in attempts] == [submitted.name, "0002-other"]


@pytest.mark.parametrize(("error", "held"), [(RunHeld("look"), True), (RunError("again"), False)])
def test_an_attempt_says_that_its_run_is_held(
    home: CoordinatorHome, submitted: Submission, monkeypatch: pytest.MonkeyPatch, error: RunError, held: bool
) -> None:
    def run(*_: Any) -> None:
        raise error

    submitted.note("running")
    monkeypatch.setattr("server.coordinator.attempt.LinkGrid", lambda *_, **__: StandInLink())
    monkeypatch.setattr("server.coordinator.production.run_submission", run)
    attempt = Attempt(home, submitted, StandInLink())  # type: ignore[arg-type]
    assert attempt.join(60)
    assert attempt.held == held
    assert submitted.state()["state"] == "running"
    assert submitted.state()["problem"] == str(error)


def test_the_status_tells_what_sites_do(
    supervisor: Supervisor, submitted: Submission, attempts: list[StandInAttempt], home: CoordinatorHome
) -> None:
    supervisor._turn()
    assert json.loads(home.status.read_text())["round"] is None
    attempts[0].progress.asked(1, ["a", "b"])
    attempts[0].progress.failed("b", "PolicyError: MARKER", replied=False)
    supervisor._turn()
    told = json.loads(home.status.read_text())["round"]
    assert told == {"round": 1, "sites": {"a": "training", "b": "refused"}, "codes": {"b": "PolicyError"}}
    assert "MARKER" not in home.status.read_text()


@pytest.mark.parametrize("held", [False, True])
def test_a_job_that_was_stopped_is_resumed(
    supervisor: Supervisor, submitted: Submission, attempts: list[StandInAttempt], held: bool
) -> None:
    supervisor._turn()
    attempts[0].held, attempts[0].alive = held, not held
    supervisor._turn()  # one that is held rests from here on
    submitted.request_stop()
    supervisor._turn()
    attempts[0].alive = False
    supervisor._turn()
    assert submitted.state()["state"] == "stopped"
    submitted.resume()
    supervisor._turn()
    assert len(attempts) == 2
    assert submitted.state()["state"] == "running"


def test_a_job_that_was_stopped_ends_once_its_attempt_has(
    supervisor: Supervisor, submitted: Submission, attempts: list[StandInAttempt]
) -> None:
    supervisor._turn()
    submitted.request_stop()
    supervisor._turn()
    assert attempts[0].halted
    assert submitted.is_open, "its thread still works in the run folder"
    attempts[0].alive = False
    supervisor._turn()
    assert submitted.state()["state"] == "stopped"
    supervisor._turn()
    assert len(attempts) == 1


def test_a_job_that_completed_while_it_was_being_stopped_is_complete(
    supervisor: Supervisor, submitted: Submission, attempts: list[StandInAttempt]
) -> None:
    supervisor._turn()
    submitted.request_stop()
    submitted.note("completed")
    attempts[0].alive = False
    supervisor._turn()
    assert submitted.state()["state"] == "completed"


def test_a_link_that_ended_is_opened_again_and_the_run_resumes(
    supervisor: Supervisor,
    submitted: Submission,
    attempts: list[StandInAttempt],
    link: StandInLink,
    home: CoordinatorHome,
    clock: list[float],
) -> None:
    supervisor._turn()
    link.alive = False
    supervisor._turn()
    assert (link.started, attempts[0].halted) == (1, True)
    attempts[0].alive = False
    supervisor._turn()
    clock[0] += 1
    supervisor._turn()
    assert len(attempts) == 2
    (entry,) = [entry for entry in audit_log.read(home.audit) if entry.event == Event.LINK_RESTARTED]
    assert entry.details == {"reason": "it ended"}


def test_a_link_that_cannot_be_opened_fills_no_log(
    supervisor: Supervisor,
    link: StandInLink,
    home: CoordinatorHome,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def taken() -> None:
        raise RunError("cannot listen on 0.0.0.0:9092; another process may use the port.")

    link.alive = False
    with monkeypatch.context() as patch:
        patch.setattr(link, "start", taken)
        for _ in range(5):
            supervisor._turn()
    assert status_of(home)["problem"].startswith("cannot listen")
    assert caplog.text.count("cannot listen") == 1
    supervisor._turn()
    assert status_of(home)["state"] == "running"
    assert [entry.event for entry in audit_log.read(home.audit)].count(Event.LINK_RESTARTED) == 1


def test_a_certificate_that_is_half_there_does_not_silence_the_status(
    supervisor: Supervisor, home: CoordinatorHome
) -> None:
    supervisor._turn()
    before = status_of(home)
    whole = home.server_certificate.read_bytes()
    home.server_certificate.write_bytes(whole[: len(whole) // 2])
    supervisor._turn()
    said = status_of(home)
    assert (said["state"], said["certificate_until"]) == ("running", before["certificate_until"])
    assert str(home.server_certificate) in said["certificate_problem"]
    home.server_certificate.write_bytes(whole)
    supervisor._turn()
    assert status_of(home)["certificate_problem"] is None


UNTIL = datetime(2027, 1, 1, tzinfo=UTC)


def site_state(*valid: int, refused: Mapping[int, str] | None = None, seen: float | None = 0.0) -> SiteState:
    facts = SiteFacts(valid=dict.fromkeys(valid, UNTIL), refused=refused or {})
    return SiteState(online=seen == 0.0, seen_before=seen, facts=facts)


def test_who_may_connect_and_who_may_not_any_more_is_noted_once(
    supervisor: Supervisor, link: StandInLink, home: CoordinatorHome, caplog: pytest.LogCaptureFixture
) -> None:
    link.states = {"a": site_state(1, seen=None), "b": site_state(2), "c": site_state(refused={3: "revoked: it was"})}
    supervisor._turn()
    supervisor._turn()
    said = status_of(home)["sites"]
    assert (said["a"]["online"], said["a"]["last_seen"], said["b"]["online"]) == (False, None, True)
    assert datetime.now(UTC) - datetime.fromisoformat(said["b"]["last_seen"]) < timedelta(minutes=1)
    assert "c" not in said
    # The key of b is exchanged, then the old one revoked.
    link.states = {"a": link.states["a"], "b": site_state(2, 4)}
    supervisor._turn()
    link.states = {"a": link.states["a"], "b": site_state(4, refused={2: "revoked: the certificate of b was revoked"})}
    supervisor._turn()
    assert "a key of site b may not connect any more: revoked: the certificate of b was revoked" in caplog.text
    link.states, link.problem = {}, "the trust store cannot be read"
    supervisor._turn()
    noted = [(entry.event, dict(entry.details)) for entry in audit_log.read(home.audit)]
    until = "2027-01-01T00:00:00+00:00"
    assert noted == [
        (Event.SITE_REGISTERED, {"site": "a", "until": until}),
        (Event.SITE_REGISTERED, {"site": "b", "until": until}),
        (Event.SITE_REGISTERED, {"site": "b", "until": until}),
        (Event.SITE_REMOVED, {"site": "b", "reason": "revoked: the certificate of b was revoked"}),
        (Event.TRUST_BROKEN, {"reason": "the trust store cannot be read"}),
        (Event.SITE_REMOVED, {"site": "a", "reason": "the trust store cannot be read"}),
        (Event.SITE_REMOVED, {"site": "b", "reason": "the trust store cannot be read"}),
    ]


def test_what_the_link_tells_stands_in_the_log_and_cannot_flood_it(
    home: CoordinatorHome, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(journal_module.time, "monotonic", lambda: now[0])
    journal = Journal(home.open_log(home.load_round_key(None)))
    for turn in range(100):
        now[0] += 0.5
        journal.connected("a", f"ipv4:10.0.0.1:{turn}", "0.2.0")
        journal.disconnected("a", "the connection ended")
        journal.write()
    journal.twin("a", "ipv4:10.0.0.9:1")
    journal.refused("b", "ipv4:10.0.0.2:1", "revoked")
    journal.write(everything=True)
    noted = [(entry.event, dict(entry.details)) for entry in audit_log.read(home.audit)]
    assert noted == [
        (Event.SITE_CONNECTED, {"site": "a", "peer": "ipv4:10.0.0.1:0", "software": "0.2.0"}),
        (Event.SITE_DISCONNECTED, {"site": "a", "reason": "the connection ended"}),
        (Event.SITE_CONNECTED, {"site": "a", "peer": "ipv4:10.0.0.1:99", "software": "0.2.0", "times": 99}),
        (Event.SITE_DISCONNECTED, {"site": "a", "reason": "the connection ended", "times": 99}),
        (Event.TWIN_REFUSED, {"site": "a", "peer": "ipv4:10.0.0.9:1"}),
        (Event.CONNECTION_REFUSED, {"site": "b", "peer": "ipv4:10.0.0.2:1", "reason": "revoked"}),
    ]


@pytest.mark.parametrize("trouble", [OSError("disk"), RunError("the link does not answer"), TrustError("log")])
def test_trouble_is_told_and_lived_through(
    supervisor: Supervisor, home: CoordinatorHome, monkeypatch: pytest.MonkeyPatch, trouble: Exception
) -> None:
    def fails() -> None:
        raise trouble

    with monkeypatch.context() as patch:
        patch.setattr(supervisor, "_drive", fails)
        supervisor._turn()
    assert status_of(home)["state"] == "troubled"
    assert status_of(home)["problem"] == str(trouble)
    supervisor._turn()
    assert status_of(home)["state"] == "running"


def test_a_status_that_cannot_be_written_ends_nothing(supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, value: Any) -> None:
        raise RunError("the disk is full")

    monkeypatch.setattr(supervisor_module, "write_json", full)
    supervisor._turn()


def test_names_that_are_silent_make_room_for_others_in_the_journal(
    home: CoordinatorHome, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(journal_module.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(journal_module, "_MOST_KEPT", 3)
    journal = Journal(home.open_log(home.load_round_key(None)))
    for name in "abcd":
        journal.disconnected(name, "it left")
    journal.write()
    now[0] += 61.0
    journal.write()
    journal.twin("d", "ipv4:10.0.0.9:1")
    journal.write()
    assert [entry.details["site"] for entry in audit_log.read(home.audit)] == ["a", "b", "c", "d"]


def test_an_attempt_whose_log_cannot_be_opened_says_so(home: CoordinatorHome, submitted: Submission) -> None:
    submitted.log.mkdir()

    class Link:
        mailroom = None

        def call(self, *_: Any) -> None: ...

    class Mailroom:
        withdraw = None

    link: Any = Link()
    link.mailroom = Mailroom()
    attempt = Attempt(home, submitted, link)
    assert attempt.join(30.0)
    state = submitted.state()
    assert state["problem"] == "IsADirectoryError; see the coordinator's log"
    assert state["defect"] is False


def test_a_round_of_many_sites_is_noted_whole(home: CoordinatorHome, submitted: Submission) -> None:
    from server.coordinator.production import _Recorder

    sites = [SiteDescription(site=f"{'x' * 60}-{i}", declared_records=8, version="1") for i in range(1000)]
    recorder = _Recorder(submitted, submitted.signed_job().job, home.open_log(home.load_round_key(None)))
    recorder.roster(sites)
    recorder.round_started(1, [site.site for site in sites], b"adapter")
    assert {one.site.site for one in recorder.asked_since(0)} == {site.site for site in sites}


# --- what the ServerApp makes of an error ---


def test_only_what_cannot_go_away_ends_a_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert lasts(ConfigError("no such task"))
    assert lasts(TrustError("the signature does not hold"))
    assert not lasts(RunError("too few sites"))
    log = AuditLog(tmp_path / "audit")
    monkeypatch.setattr("os.write", _full)
    with pytest.raises(TrustError, match="cannot be written") as caught:
        log.append(Event.JOB_SUBMITTED)
    assert not lasts(caught.value), "space can be freed"


def _full(*_: Any) -> int:
    raise OSError(28, "No space left on device")


def an_update() -> TrainReply:
    return TrainReply(
        site="a",
        round_number=2,
        job_sha256="0" * 64,
        update=b"update",
        declared_records=8,
        noise_multiplier=1.0,
        sample_rate=0.1,
        max_grad_norm=1.0,
        delta=1e-5,
        steps=2,
        randomness="os",
        epsilon_budget=8.0,
    )


def test_the_recorder_finds_in_the_log_what_an_earlier_process_was_at(
    home: CoordinatorHome, submitted: Submission, checkpoint_after: Callable[[int], Checkpoint]
) -> None:
    from server.coordinator.production import _Recorder

    key = home.load_round_key(None)
    first = _Recorder(submitted, submitted.signed_job().job, home.open_log(key))
    first.roster(
        [SiteDescription(site=name, declared_records=size, version="1") for name, size in (("a", 8), ("b", 64))]
    )
    first.round_started(1, ["a", "b"], b"adapter")
    first.round_started(2, ["a"], b"other")
    reply = an_update()
    first.update_judged(2, "a", reply, None)
    first.update_doubted(2, "a", "its update is too short")
    assert submitted.state()["doubted"] == {"a": "round 2: its update is too short"}
    [noted] = [entry for entry in audit_log.read(home.audit) if entry.event == Event.UPDATE_DOUBTED]
    assert (noted.details["site"], noted.details["round"]) == ("a", 2)
    first.round_started(2, ["a"], b"another")
    second = _Recorder(submitted, submitted.signed_job().job, home.open_log(key))
    second.update_doubted(3, "b", "its update is too short")
    assert sorted(submitted.state()["doubted"]) == ["a", "b"]
    found = second.asked_since(0)
    assert [(one.site.site, one.site.declared_records, one.round_number) for one in found] == [
        ("a", 8, 1),
        ("b", 64, 1),
        ("a", 8, 2),
        ("a", 8, 2),
    ]
    assert [one.adapter_sha256[:8] for one in found] == [
        hashlib.sha256(adapter).hexdigest()[:8] for adapter in (b"adapter", b"adapter", b"other", b"another")
    ]
    assert [one.update_sha256 for one in found] == [None, None, hashlib.sha256(reply.update).hexdigest(), None]
    assert second.asked_since(1) == found[2:]
    assert second.asked_since(2) == []
    # Of an update the log says where its randomness came from, so nobody guesses it of a round that was given up.
    assert {one.randomness for one in found} == {"os"}
    first.update_judged(1, "b", replace(reply, randomness="injected"), None)
    assert [(one.site.site, one.randomness) for one in second.asked_since(0)] == [
        ("a", "os"),
        ("b", "injected"),
        ("a", "os"),
        ("a", "os"),
    ]
    second.resumed(checkpoint_after(1))
    second.resumed(checkpoint_after(1))
    completed = [entry for entry in audit_log.read(home.audit) if entry.event == Event.ROUND_COMPLETED]
    assert [entry.details["round"] for entry in completed] == [1], "it was durable, and its entry was missing"


@pytest.fixture
def checkpoint_after(submitted: Submission) -> Callable[[int], Checkpoint]:
    from server.store.checkpoint import RoundRecord

    def make(number: int) -> Checkpoint:
        history = [RoundRecord(round=n, sites=["a", "b"]) for n in range(number + 1)]
        return Checkpoint(job_sha256=submitted.state()["job_sha256"], round_number=number, adapter={}, history=history)

    return make


def test_a_coordinator_gives_signs_of_life_only_while_its_link_answers(
    supervisor: Supervisor, link: StandInLink, monkeypatch: pytest.MonkeyPatch, clock: list[float]
) -> None:
    signs: list[float] = []
    monkeypatch.setattr(supervisor._manager, "alive", lambda: signs.append(clock[0]))
    supervisor._turn()
    assert len(signs) == 1

    def silent() -> Any:
        raise RunError("the link to the sites does not answer.")

    with monkeypatch.context() as patched:
        patched.setattr(link, "sites", silent)
        supervisor._turn()
        supervisor._turn()
    assert len(signs) == 1, "systemd starts it anew"
    # A disk that is full goes away by itself.
    with monkeypatch.context() as patched:
        patched.setattr(supervisor._journal, "write", lambda: (_ for _ in ()).throw(TrustError("no space left")))
        supervisor._turn()
    assert len(signs) == 2


def test_a_stop_after_the_coordinator_died_states_what_was_asked(
    supervisor: Supervisor, submitted: Submission, home: CoordinatorHome, attempts: list[StandInAttempt]
) -> None:
    """Nobody attempts such a run again, so nobody else would state it."""
    job, key = submitted.signed_job().job, home.load_round_key(None)
    recorder = _Recorder(submitted, job, home.open_log(key))
    recorder.roster([SiteDescription(site=name, declared_records=64, version="1") for name in "ab"])
    before = Checkpoint(
        job_sha256=job.sha256,
        round_number=0,
        adapter={"w": torch.zeros(2)},
        history=[RoundRecord(round=0, metrics={"loss": 0.0})],
    )
    with RunFolder(submitted.run_folder, job, resume=False) as folder:
        folder.write_run_info("running", {"mode": "federation"})
        folder.save_checkpoint(before)
        recorder.round_started(1, ["a", "b"], b"adapter")
    submitted.note("running")
    submitted.request_stop()
    supervisor._drive()
    assert submitted.state()["state"] == "stopped"
    assert not attempts
    run = json.loads((submitted.run_folder / "run.json").read_text())
    assert (run["status"], run["mode"]) == ("stopped", "federation")
    for name in "ab":
        stated = json.loads((submitted.run_folder / "sites" / name / "privacy.json").read_text())
        assert stated["rounds_unanswered"] == [1]
        assert stated["epsilon_bound"] > 0.0
    # What cannot be read keeps nobody from giving it up, and is told.
    submitted.note("running", problem=None)
    (submitted.run_folder / "checkpoint.safetensors").write_bytes(b"x")
    supervisor._finish(submitted, "stopped")
    assert "could not all be stated" in submitted.state()["problem"]
