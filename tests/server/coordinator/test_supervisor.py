"""The coordinator's process against a SuperLink and a folder in trouble; the real ones: tests/integration."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

import server.coordinator.supervisor as supervisor_module
from server.coordinator.production import _lasts
from server.coordinator.run_file import RunSettings, submit
from server.coordinator.superlink import FlowerRun
from server.coordinator.supervisor import Supervisor
from server.store.checkpoint import Checkpoint
from server.store.home import CoordinatorHome
from server.store.submission import Submission
from shared.data.datasets import DataSource
from shared.errors import ConfigError, RunError, TrustError
from shared.job.job import Job
from shared.job.parsing import parse
from shared.trust import audit_log
from shared.trust.audit_log import AuditLog, Event
from shared.trust.signing import SigningKey, load_verify_key
from shared.wire.messages import TrainReply
from simulations.federation.processes import Federation


class StandInControl:
    """The Control API; a test sets what it answers."""

    def __init__(self) -> None:
        self.runs: dict[int, FlowerRun] = {}
        self.registered: list[Any] = []
        self.stopped: list[int] = []

    def nodes(self) -> list[Any]:
        return self.registered

    def start_run(self, bundle: bytes, config: Any) -> int:
        number = len(self.runs) + 1
        self.runs[number] = FlowerRun(run_id=number, status="running", details="")
        return number

    def run(self, run_id: int) -> FlowerRun | None:
        return self.runs.get(run_id)

    def stop_run(self, run_id: int) -> None:
        self.stopped.append(run_id)

    def end(self, details: str = "Task failed") -> None:
        number = max(self.runs)
        self.runs[number] = FlowerRun(run_id=number, status="finished:failed", details=details)


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
def control() -> StandInControl:
    return StandInControl()


@pytest.fixture
def supervisor(
    home: CoordinatorHome, control: StandInControl, clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> Supervisor:
    made = Supervisor(home)
    made._certificate = home.server_certificate.read_bytes()
    monkeypatch.setattr(made._superlink, "alive", lambda: True)
    monkeypatch.setattr(made, "_control", lambda: control)
    return made


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
    supervisor: Supervisor, submitted: Submission, control: StandInControl, clock: list[float]
) -> None:
    supervisor._turn()
    assert submitted.state()["flower_run"] == 1
    waits = []
    for number in range(2, 10):
        control.end()
        supervisor._turn()
        started = clock[0]
        while len(control.runs) < number:
            clock[0] += 0.5
            supervisor._turn()
        waits.append(clock[0] - started)
    assert waits == sorted(waits)
    assert waits[0] <= 0.5
    assert waits[-1] == pytest.approx(30.0, abs=1.0)
    assert submitted.is_open, "a full disk or a lost network may go away after any time"


def test_progress_makes_the_next_attempt_prompt_again(
    supervisor: Supervisor, submitted: Submission, control: StandInControl, clock: list[float]
) -> None:
    supervisor._turn()
    for _ in range(5):
        control.end()
        supervisor._turn()
        clock[0] += 60
        supervisor._turn()
    submitted.run_folder.mkdir()
    (submitted.run_folder / "metrics.jsonl").write_text("{}\n{}\n")
    control.end()
    runs = len(control.runs)
    supervisor._turn()
    supervisor._turn()
    assert len(control.runs) == runs + 1


def test_a_defect_that_stays_ends_the_job_with_its_reason(
    supervisor: Supervisor, submitted: Submission, control: StandInControl, clock: list[float], home: CoordinatorHome
) -> None:
    for _ in range(20):
        supervisor._turn()
        if not submitted.is_open:
            break
        submitted.note(problem="ZeroDivisionError; see the log", defect=True)
        control.end()
        clock[0] += 60
    state = submitted.state()
    assert state["state"] == "failed"
    assert "8 attempts without a new round; the last one: ZeroDivisionError" in state["problem"]
    (ended,) = [entry for entry in audit_log.read(home.audit) if entry.event == Event.JOB_FINISHED]
    assert ended.details["state"] == "failed"


def test_a_job_that_was_stopped_is_stopped_in_flower_too(
    supervisor: Supervisor, submitted: Submission, control: StandInControl
) -> None:
    supervisor._turn()
    submitted.request_stop()
    supervisor._turn()
    assert control.stopped == [1]
    assert submitted.state()["state"] == "stopped"
    supervisor._turn()
    assert len(control.runs) == 1


@pytest.mark.parametrize(
    "trouble", [httpx.ConnectError("refused"), OSError("disk"), RunError("the SuperLink refused"), TrustError("log")]
)
def test_trouble_is_told_and_lived_through(
    supervisor: Supervisor, home: CoordinatorHome, monkeypatch: pytest.MonkeyPatch, trouble: Exception
) -> None:
    def fails(control: Any) -> None:
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


def test_a_broken_server_certificate_is_told_and_the_old_one_stays_in_use(
    supervisor: Supervisor, home: CoordinatorHome, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = home.server_certificate.read_bytes()
    restarted: list[bool] = []
    monkeypatch.setattr(supervisor._superlink, "stop", lambda: restarted.append(True))
    home.server_certificate.write_bytes(b"half a certifi")
    supervisor._turn()
    home.server_certificate.write_bytes(good)
    supervisor._turn()
    assert restarted == []
    assert status_of(home)["state"] == "running"


# --- what the ServerApp makes of an error ---


def test_only_what_cannot_go_away_ends_a_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _lasts(ConfigError("no such task"))
    assert _lasts(TrustError("the signature does not hold"))
    assert not _lasts(RunError("too few sites"))
    log = AuditLog(tmp_path / "audit")
    monkeypatch.setattr("os.write", _full)
    with pytest.raises(TrustError, match="cannot be written") as caught:
        log.append(Event.JOB_SUBMITTED)
    assert not _lasts(caught.value), "space can be freed"


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
    from shared.wire.messages import SiteDescription

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
