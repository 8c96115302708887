"""The site's process: what it says of itself, and what of an exception leaves it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord, Context, Message, Metadata, RecordDict
from flwr.clientapp import ClientApp

from client.app import make_client_app
from client.link.answering import answering
from client.node import node as node_module
from client.node.node import Node, Work
from client.node.status import StatusFile, read_status
from client.site.home import SiteHome
from client.site.site import Site
from shared.errors import LedgerError, RunError
from shared.link.envelope import message as made_message
from shared.link.envelope import seal_envelope
from shared.link.frames import Welcome
from shared.link.line import Parcel
from shared.service.machine import STALE_SECONDS
from shared.trust import audit_log
from shared.trust.audit_log import Event
from shared.wire.messages import DESCRIBE, TRAIN, WITHHELD, describe_request
from simulations.federation.processes import Federation
from tests.conftest import Outcome
from tests.integration.eventually import eventually
from tests.integration.service_manager import Heard

ROOT = Path(__file__).parents[3]
CONFIDENTIAL = "patient Quagmire has a broken leg"


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Federation:
    """CA and certificates; no coordinator runs."""
    made = Federation(tmp_path_factory.mktemp("federation"))
    made.found()
    return made


@pytest.fixture
def home(federation: Federation, request: pytest.FixtureRequest) -> SiteHome:
    """A site of its own for each test, whose coordinator does not answer."""
    name = f"site-{abs(hash(request.node.name)):x}"
    return federation.join(name, [{"text": f"{CONFIDENTIAL} {i}", "label": "good"} for i in range(20)], epsilon=8.0)


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Return a starter of real nodes; all are ended."""
    made: list[subprocess.Popen[str]] = []

    def launch(home: SiteHome, environment: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "cli", "site", "start", str(home.path)]
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        made.append(subprocess.Popen(command, cwd=ROOT, env=os.environ | (environment or {}), **pipes))
        return made[-1]

    yield launch
    for process in made:
        if process.poll() is None:
            process.kill()
            process.communicate()


def message_of(kind: str, content: RecordDict | None = None) -> Message:
    metadata = Metadata(1, "01" * 16, 1, 2, "", "", time.time(), 60.0, kind)
    return made_message(content or RecordDict({"x": ConfigRecord({"y": 1})}), metadata)


# --- what of an exception leaves ---


class QuietSite:
    """What a node asks of a site beside its answers."""

    left_out: str | None = None

    def __init__(self, home: SiteHome) -> None:
        opened = node_module.open_site(home, passphrase=None)
        self.guard, self.config = opened.guard, opened.config

    def anticipate(self) -> None: ...


def work_of(home: SiteHome, client_app: ClientApp) -> Work:
    site: Any = QuietSite(home)
    return Work(home, site, client_app, StatusFile(home))


def raising(error: Exception) -> ClientApp:
    def open_site(context: Context) -> Site:
        raise error

    return make_client_app(open_site)


def test_a_request_is_no_other_connection(home: SiteHome, monkeypatch: pytest.MonkeyPatch) -> None:
    times = (f"2026-10-05T08:00:{second:02}+00:00" for second in range(60))
    monkeypatch.setattr("client.node.status._now", lambda: next(times))
    status = StatusFile(home)
    status.say("connected")
    (first, state) = (status.facts()[name] for name in ("connected_since", "since"))
    status.say("working")
    status.say("connected")
    assert status.facts()["connected_since"] == first
    assert status.facts()["since"] > state, "each request is a state"
    status.say("waiting")
    status.say("connected")
    assert status.facts()["connected_since"] > first


@pytest.mark.parametrize(
    "error", [ValueError(CONFIDENTIAL), KeyError(CONFIDENTIAL), RuntimeError(CONFIDENTIAL), OSError(5, CONFIDENTIAL)]
)
@pytest.mark.parametrize("kind", [DESCRIBE, TRAIN])
def test_of_an_exception_nothing_leaves_but_that_there_was_one(home: SiteHome, error: Exception, kind: str) -> None:
    reply = work_of(home, raising(error)).answer(message_of(kind, describe_request()), 1, 0.0)
    assert reply.has_error()
    assert reply.error.reason == WITHHELD
    assert CONFIDENTIAL not in str(reply)
    assert CONFIDENTIAL.encode() not in seal_envelope(reply)


def test_a_message_that_no_app_knows_is_answered_with_an_error(home: SiteHome) -> None:
    reply = work_of(home, raising(RunError("unused"))).answer(message_of("query.steal"), 1, 0.0)
    assert reply.has_error()
    assert reply.error.reason == WITHHELD


def test_a_site_that_cannot_be_opened_does_not_say_why(home: SiteHome) -> None:
    reply = work_of(home, raising(RunError(CONFIDENTIAL))).answer(message_of(DESCRIBE, describe_request()), 1, 0.0)
    assert not reply.has_error()
    assert dict(reply.content.config_records["silotune"]) == {
        "kind": "refusal",
        "site": "",
        "code": WITHHELD,
        "reason": "see the site's own log",
    }


def test_status_and_audit_log_hold_nothing_of_an_exception(home: SiteHome, caplog: pytest.LogCaptureFixture) -> None:
    work = work_of(home, raising(ValueError(CONFIDENTIAL)))
    work.connected(Welcome(2, "a", "0.2.0"))
    asked = message_of(DESCRIBE, describe_request())
    assert work.answer(asked, 2, 0.0).error.reason == WITHHELD
    assert read_status(home)["state"] == "working"
    work.answered()
    assert read_status(home)["state"] == "connected"
    work.delivered(Parcel(bytes(16), bytes.fromhex(asked.metadata.message_id), b"reply"), declined=False)
    assert CONFIDENTIAL not in home.status.read_text()
    noted = list(audit_log.read(home.audit))
    assert CONFIDENTIAL not in "".join(entry.line() for entry in noted)
    assert [(entry.event, entry.details.get("bytes")) for entry in noted] == [
        (Event.NODE_CONNECTED, None),
        (Event.REPLY_SENT, 5),
    ]
    # The site's own people see its kind and place: the text may quote a record.
    assert CONFIDENTIAL not in caplog.text
    assert "failed: ValueError\n" in caplog.text


def test_a_reply_that_the_coordinator_did_not_take_is_noted_as_that(home: SiteHome) -> None:
    work = work_of(home, raising(RunError("unused")))
    for declined in (False, True):
        work.delivered(Parcel(bytes(16), bytes(16), b"reply"), declined=declined)
    assert [entry.details.get("declined") for entry in audit_log.read(home.audit)] == [None, True]


def test_settings_that_are_broken_meanwhile_do_not_cost_the_connection(home: SiteHome) -> None:
    work = work_of(home, raising(RunError("unused")))
    coordinator = home.load_config().coordinator
    home.config.write_text("name = ")
    work.connected(Welcome(2, "a", "0.2.0"))
    assert (read_status(home)["state"], read_status(home)["coordinator"]) == ("connected", coordinator)


def test_trouble_shows_until_the_connection_is_there_again(home: SiteHome) -> None:
    work = work_of(home, raising(RunError("unused")))
    work.trouble(RunError("the line was cut"))
    assert (read_status(home)["state"], read_status(home)["problem"]) == ("waiting", "the line was cut")
    work.connected(Welcome(2, "a", "0.2.0"))
    assert (read_status(home)["state"], read_status(home)["problem"]) == ("connected", None)


def test_a_request_that_nobody_waits_for_any_more_is_not_trained() -> None:
    """It waited behind another one; its release would be charged for nothing."""
    answered: list[float] = []

    def answer(message: Message, node: int, waited: float) -> Message:
        answered.append(waited)
        return Message(RecordDict(), reply_to=message)

    handle = answering(answer)
    payload, welcome = seal_envelope(message_of(TRAIN)), Welcome(2, "a", "0.2.0")
    assert handle(Parcel(bytes(16), b"", payload, since=time.monotonic() - 61.0), welcome) is None
    assert answered == []
    assert handle(Parcel(bytes(16), b"", payload, since=time.monotonic() - 30.0), welcome)
    assert answered == [pytest.approx(30.0, abs=5.0)]


# --- what it says of itself ---


def said(home: SiteHome, **facts: Any) -> dict[str, Any]:
    now = datetime.now(UTC).isoformat(timespec="seconds")
    home.status.write_text(json.dumps({"pid": os.getpid(), "state": "connected", "updated": now} | facts))
    return read_status(home)


def not_running(home: SiteHome) -> dict[str, Any]:
    text = f"it does not run; start it with: silotune site start {home.path}"
    return {"state": "not running", "healthy": False, "troubles": [text]}


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"state": "waiting", "problem": "the line was cut"}, "the line was cut"),
        ({"state": "starting"}, "it is starting."),
        (
            {"descriptors": {"used": 4000, "limit": 4096}},
            "more than 80% of 4096 file descriptors are in use; raise LimitNOFILE.",
        ),
        (
            {"clock": {"set_by": 7.25, "set_at": datetime.now(UTC).isoformat()}},
            "the clock was set by +7.2 s at",
        ),
    ],
)
def test_what_is_wrong_is_said(
    home: SiteHome, silotune: Callable[..., Outcome], changes: dict[str, Any], text: str
) -> None:
    (found,) = said(home, **changes)["troubles"]
    assert text in found
    shown = silotune("site", "status", home.path)
    assert (shown.status, f"trouble: {found}" in shown.out) == (1, True)


def test_a_certificate_that_ends_soon_is_said(home: SiteHome, monkeypatch: pytest.MonkeyPatch) -> None:
    assert said(home)["healthy"]
    monkeypatch.setattr("shared.service.machine.CERTIFICATE_DAYS", 100_000)
    certificate, ca = said(home)["troubles"]
    assert certificate.startswith("the certificate of this site ends on ")
    assert certificate.endswith(f"run: silotune site rotate {home.path}")
    assert ca.startswith("the CA's certificate ends on ")


@pytest.mark.parametrize(
    ("state", "healthy"),
    [("connected", True), ("working", True), ("starting", False), ("waiting", False)],
)
def test_a_node_is_healthy_while_it_is_connected_or_works(home: SiteHome, state: str, healthy: bool) -> None:
    status = said(home, state=state)
    assert (status["state"], status["healthy"]) == (state, healthy)


def test_a_node_that_stopped_is_not_running(home: SiteHome) -> None:
    status = said(home, state="stopped")
    assert (status["state"], status["healthy"]) == ("not running", False)


def test_a_node_that_died_is_not_running(home: SiteHome) -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    status = said(home, pid=child.pid)
    assert (status["state"], status["healthy"]) == ("not running", False)


def test_a_node_that_hangs_is_not_running(home: SiteHome) -> None:
    for seconds in (-STALE_SECONDS - 1, 3600):  # the clock was put back since
        then = datetime.now(UTC) + timedelta(seconds=seconds)
        status = said(home, updated=then.isoformat())
        assert (status["state"], status["healthy"]) == ("not running", False)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "[1]", "null", "{}", '{"pid": 1}', '{"pid": "x", "updated": "2026-01-01T00:00:00+00:00"}'],
)
def test_a_status_that_cannot_be_read_is_not_running(home: SiteHome, text: str) -> None:
    home.status.write_text(text)
    assert read_status(home) == not_running(home)


@pytest.mark.parametrize(
    "changes",
    [
        {"pid": 10**30},
        {"pid": 0},
        {"pid": -1},
        {"updated": "2026-01-01T00:00:00"},
        {"updated": 5},
        {"pid": None},
        {"descriptors": {"used": "x"}},
        {"clock": 7},
    ],
)
def test_a_status_with_odd_values_is_not_running(home: SiteHome, changes: dict[str, Any]) -> None:
    assert said(home, **changes) == not_running(home)


def test_since_when_a_state_holds_is_kept(home: SiteHome) -> None:
    status = StatusFile(home)
    status.say("connected", coordinator="x:1")
    since = read_status(home)["since"]
    status.say()
    status.say("connected", problem=None)
    assert read_status(home)["since"] == since
    assert read_status(home)["coordinator"] == "x:1"


# --- the process ---


def test_a_node_waits_for_its_coordinator_and_ends_when_it_is_told(
    home: SiteHome,
    start: Callable[..., subprocess.Popen[str]],
    silotune: Callable[..., Outcome],
    tmp_path: Path,
) -> None:
    heard = Heard(tmp_path, watchdog_seconds=1.0)
    process = start(home, heard.environment)
    # 1. Nobody answers, and whoever asks is told so.
    eventually(lambda: process.poll() is None and read_status(home)["state"] == "waiting")
    shown = silotune("site", "status", home.path)
    assert shown.status == 1
    assert "cannot be reached" in shown.out
    assert "check the address, that the coordinator runs, and that the firewall" in shown.out
    # The service manager is told that it is up all the same, and that it lives.
    assert heard.lines()[0] == "READY=1"
    eventually(lambda: heard.lines().count("WATCHDOG=1") >= 2)
    assert "STATUS=waiting for the coordinator" in heard.lines()
    # 2. A second node in the same folder is turned away.
    second = silotune("site", "start", home.path)
    assert second.status == 1
    assert f"error: another node works in {home.path}; stop it first." in second.err
    assert read_status(home)["pid"] == process.pid
    # 3. It ends in an orderly way.
    started = time.monotonic()
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert time.monotonic() - started < 30
    assert "Traceback" not in output
    assert json.loads(home.status.read_text())["state"] == "stopped"
    assert heard.lines()[-1] == "STOPPING=1"
    events = [entry.event for entry in audit_log.read(home.audit)]
    assert events[-1] == Event.NODE_STOPPED
    assert events.count(Event.NODE_STARTED) == 1
    assert CONFIDENTIAL not in output + home.status.read_text() + "".join(e.line() for e in audit_log.read(home.audit))


def test_ctrl_c_ends_a_node_and_says_how_to_go_on(home: SiteHome, start: Callable[..., subprocess.Popen[str]]) -> None:
    process = start(home)
    eventually(lambda: process.poll() is None and read_status(home)["state"] == "waiting")
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in output
    assert output.strip().endswith(f"stopped; go on with: silotune site start {home.path}")
    assert json.loads(home.status.read_text())["state"] == "stopped"


def test_a_folder_is_free_again_when_its_node_has_ended(home: SiteHome) -> None:
    with home.locked(), pytest.raises(RunError, match="another node works in"), home.locked():
        pass
    with home.locked():
        pass


def test_a_node_whose_ledger_was_replaced_does_not_start(home: SiteHome) -> None:
    node_module.open_site(home, passphrase=None).ledger()
    (home.path / "ledger.db").unlink()
    with pytest.raises(LedgerError, match="was replaced by an older copy, or by another ledger"):
        Node(home, passphrase=None).run()
    assert Event.NODE_STARTED not in [entry.event for entry in audit_log.read(home.audit)]
