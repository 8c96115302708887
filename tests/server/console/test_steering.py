"""Stopping and resuming a run from the console: as the command line does, with a name to it, and safe to be killed at."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from server.store.home import CoordinatorHome
from server.store.submission import Submission
from shared.errors import RunError, TrustError
from shared.trust.audit_log import AuditLog, Event, read
from shared.web.roles import Role
from tests.client.console.conftest import Browser, Serving, text_of
from tests.conftest import Outcome
from tests.server.console.homes import go_on, job_of, make_home, say, submit

RUN = "/runs/0001-triage"


@pytest.fixture
def submission(home: CoordinatorHome) -> Submission:
    made = Submission(home.jobs / "0001-triage")
    (made.path / "stop").unlink(missing_ok=True)
    made.note("running")
    return made


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> CoordinatorHome:
    home = make_home(tmp_path_factory.mktemp("federation"), ("north",))
    go_on(submit(home, job_of(), 1, state="running"), 2, sites=("north",))
    say(home, sites=("north",), online=("north",), job="0001-triage")
    return home


@pytest.fixture
def browser(serving: Serving) -> Browser:
    return serving.signed_in("engineer")


def shown(browser: Browser) -> str:
    """Return the state that the run's page shows, as its form sends it."""
    found = re.search(r'name="seen" value="([^"]+)"', browser.get(RUN).text)
    assert found
    return found[1]


def actions(home: CoordinatorHome) -> list[str]:
    """Return what accounts did, signing in left out."""
    found = [entry.details for entry in read(home.audit) if entry.event == Event.CONSOLE_ACTION]
    return [f"{one['account']} {one['action']} {one['name']}" for one in found if one["action"] in ("stop", "resume")]


def test_it_is_noted_first(
    browser: Browser, home: CoordinatorHome, submission: Submission, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise TrustError("the audit log cannot be written")

    with monkeypatch.context() as patched:
        patched.setattr(AuditLog, "append", full)
        assert browser.post(f"{RUN}/stop", seen=shown(browser)).status_code == 503
    assert not submission.stop_requested
    before = len(actions(home))
    assert browser.post(f"{RUN}/stop", seen=shown(browser)).status_code == 303
    assert submission.stop_requested
    assert actions(home)[before:] == ["engineer stop 0001-triage"]
    assert "is being stopped" in browser.get(RUN).text


def test_killed_between_the_note_and_the_deed_it_is_asked_again(
    browser: Browser, home: CoordinatorHome, submission: Submission, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        """What a process meets that is killed: nothing after it runs."""

    def die(_: Submission) -> None:
        raise Killed

    before = len(actions(home))
    with monkeypatch.context() as patched:
        patched.setattr(Submission, "request_stop", die)
        assert browser.post(f"{RUN}/stop", seen=shown(browser)).status_code == 500
    assert not submission.stop_requested
    assert browser.post(f"{RUN}/stop", seen=shown(browser)).status_code == 303
    assert len(actions(home)) == before + 2


def test_a_run_that_was_stopped_goes_on(browser: Browser, home: CoordinatorHome, submission: Submission) -> None:
    submission.request_stop()
    submission.note("stopped")  # as the coordinator does
    page = browser.get(RUN).text
    assert ("Resume this run" in page, "Stop this run" in page) == (True, False)
    assert browser.post(f"{RUN}/resume", seen=shown(browser)).status_code == 303
    assert (submission.state()["state"], submission.stop_requested) == ("submitted", False)
    assert actions(home)[-1] == "engineer resume 0001-triage"


def test_a_page_of_before_does_nothing(browser: Browser, home: CoordinatorHome, submission: Submission) -> None:
    before, earlier = actions(home), shown(browser)
    file = submission.path / "state.json"  # it was stopped and resumed since
    file.write_text(json.dumps(json.loads(file.read_text()) | {"since": "2026-12-01T10:00:00+00:00"}))
    for path, seen in (
        ("stop", "submitted"),
        ("stop", ""),
        ("stop", earlier),
        ("resume", "stopped"),
        ("resume", earlier),
    ):
        answer = browser.post(f"{RUN}/{path}", seen=seen)
        assert (answer.status_code, "Nothing was done" in answer.text) == (409, True), path
    assert not submission.stop_requested
    seen = shown(browser)
    submission.note("completed")
    assert browser.post(f"{RUN}/stop", seen=seen).status_code == 409
    assert actions(home) == before


@pytest.mark.parametrize("role", [role for role in Role if role is not Role.ENGINEER])
def test_nobody_else_steers(serving: Serving, submission: Submission, role: Role) -> None:
    browser = serving.signed_in(role.value)
    assert browser.post(f"{RUN}/stop", seen="running").status_code == 403
    assert browser.post(f"{RUN}/resume", seen="running").status_code == 403
    assert "Stop this run" not in browser.get(RUN).text
    assert not submission.stop_requested


def test_a_run_that_is_not_there(browser: Browser) -> None:
    for name in ("0009-none", "..%2f..%2fkeys"):
        assert browser.post(f"/runs/{name}/stop", seen="running").status_code == 404


def test_a_job_whose_signature_has_expired_is_not_resumed(
    browser: Browser, submission: Submission, monkeypatch: pytest.MonkeyPatch
) -> None:
    def expired(_: Submission) -> None:
        raise TrustError("the signed job expired")

    submission.note("stopped")
    with monkeypatch.context() as patched:
        patched.setattr(Submission, "check_resumable", expired)
        answer = browser.post(f"{RUN}/resume", seen=shown(browser))
    assert (answer.status_code, "has expired" in answer.text) == (409, True)


def test_the_command_line_resumes_too(
    home: CoordinatorHome, submission: Submission, silotune: Callable[..., Outcome]
) -> None:
    told = silotune("coordinator", "resume", home.path, "--job", "1")
    assert (told.status, "only a job that was stopped can be resumed" in told.err) == (1, True)
    submission.request_stop()
    submission.note("stopped")
    told = silotune("coordinator", "resume", home.path, "--job", "triage")
    assert told.status == 0, told.err
    assert "0001-triage goes on from round 2." in told.out
    with pytest.raises(RunError, match="is submitted"):
        submission.resume()


def test_a_broken_signature_is_told(tmp_path: Path) -> None:
    home = make_home(tmp_path, ())
    submission = submit(home, job_of(), 1, state="stopped")
    signed = json.loads((submission.path / "signed_job.json").read_text())
    (submission.path / "signed_job.json").write_text(json.dumps(signed | {"not_after": "2099-01-01T00:00:00Z"}))
    with pytest.raises(TrustError):
        submission.resume()
    assert submission.state()["state"] == "stopped"


def test_a_run_that_ended_is_not_stopped(browser: Browser, serving: Serving, submission: Submission) -> None:
    """What can be asked of a run follows it, and only then: a form that is swapped takes the keyboard's place with it."""

    def part(browser: Browser, page: str) -> str:
        found = re.search(r'id="live" hx-get="([^"]+)"', page)
        assert found
        return browser.get(html.unescape(found[1]), headers={"hx-request": "true"}).text

    page = browser.get(RUN).text
    assert "Stop this run" in page.partition('id="steer"')[2]
    assert "hx-swap-oob" not in part(browser, page)
    submission.request_stop()
    assert "is being stopped" in part(browser, page).partition('<div id="steer" hx-swap-oob="true">')[2]
    submission.note("stopped")
    assert "Resume this run" in part(browser, page).partition('<div id="steer" hx-swap-oob="true">')[2]
    viewer = serving.signed_in("viewer")
    page = viewer.get(RUN).text
    submission.note("completed")
    found = part(browser, page)
    assert '<div id="steer" hx-swap-oob="true">' in found
    for text in (found, part(viewer, page)):
        assert "this run</button>" not in text


def test_nobody_is_waited_for_once_a_run_is_over(browser: Browser, submission: Submission, silotune: Any) -> None:
    submission.note("running", awaiting=["north", "west"], sites=["north"])
    assert "north waiting for approval" in text_of(browser.get(RUN).text)
    home = str(submission.path.parents[1])
    assert "west is waiting for approval" in silotune("coordinator", "status", home).out
    submission.note("completed")
    words = text_of(browser.get(RUN).text)
    assert "waiting for approval" not in words
    assert "west not approved while it ran" in words
    assert "waiting for approval" not in silotune("coordinator", "status", home).out
