"""Pages while another process keeps the audit log locked, as a node that opens a ledger of years: they do not wait for it."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from client.approval.policy_changes import PolicyChanges
from client.site.home import SiteHome, open_log
from shared.trust.audit_chain import Held
from shared.web import opening
from shared.web.roles import Role
from tests.client.console.conftest import Serving, text_of
from tests.client.console.homes import approvals_of, ask, charge, make_home, say, want_people

MOST_SECONDS = 5.0
"""For a page on a busy machine; it would be as long as the other process likes."""
HOLDS = """
import fcntl, os, sys
fcntl.flock(os.open(sys.argv[1], os.O_RDWR), fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


@contextmanager
def held(home: SiteHome) -> Iterator[None]:
    """Another process has the log's lock."""
    command = [sys.executable, "-c", HOLDS, str(home.audit / "audit.lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdin
        assert other.stdout
        assert other.stdout.readline()
        yield
        other.stdin.close()


@pytest.fixture(scope="module")
def asked(serve: Callable[..., Serving], tmp_path_factory: pytest.TempPathFactory) -> Serving:
    """The console of a site with a past, at which a job waits."""
    home = make_home(tmp_path_factory.mktemp("site"))
    charge(home)
    say(home)
    want_people(home)
    ask(home)
    serving = serve(home)
    serving.console.content.read_ahead()
    return serving


def test_pages_that_only_read_do_not_wait(asked: Serving) -> None:
    browsers = {role: asked.signed_in(role.value) for role in (Role.OFFICER, Role.ENGINEER, Role.ADMINISTRATOR)}
    requests, policies = asked.console.content.requests, asked.console.content.policies
    (shown,) = requests.all()
    requests.facts(shown)
    (budget,) = asked.console.content.budgets.all()
    paths = [
        "/requests",
        f"/requests/{shown.request.id}",
        f"/requests/{shown.request.id}/facts",
        "/policy",
        "/policy/edit",
    ]
    paths += ["/policy/versions/1", "/budget", f"/budget/{budget.id}/jobs", "/releases", "/releases/log", "/health"]
    with held(asked.home):
        for role, browser in browsers.items():
            for path in paths:
                requests.forget_count()
                policies._counted = (-1e9, 0)
                began = time.monotonic()
                answer = browser.get(path)
                assert time.monotonic() - began < MOST_SECONDS, (role, path)
                assert answer.status_code in (200, 403), (role, path)
        assert "triage-2" in text_of(browsers[Role.OFFICER].get("/requests").text)


def test_the_chain_is_checked_up_to_its_end(asked: Serving) -> None:
    officer = asked.signed_in("officer")
    with held(asked.home):
        words = text_of(officer.get("/releases/verified").text)
    assert "unbroken" in words
    assert "another process kept the log locked" in words
    assert "kept the log locked" not in text_of(officer.get("/releases/verified").text), "such a check is not kept"


def test_what_has_to_be_noted_waits_and_then_is_not_done(asked: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    officer = asked.signed_in("officer")
    monkeypatch.setattr(opening, "_PATIENCE", 0.1)
    with held(asked.home):
        answer = officer.get("/releases/export.csv")
        assert (answer.status_code, "try again in a moment" in text_of(answer.text)) == (503, True)
    assert officer.get("/releases/export.csv").status_code == 200


def test_what_ended_meanwhile_is_shown_as_ended_and_noted_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = make_home(tmp_path)
    want_people(home)
    ask(home)
    approvals, rules = approvals_of(home)
    monkeypatch.setattr(approvals, "_clock", lambda: datetime.now(UTC) + timedelta(days=40))
    before = home.approvals.read_bytes()
    with held(home):
        told = approvals.listed(rules)
        assert [state for _, state in told] == ["expired"]
        assert home.approvals.read_bytes() == before
    assert approvals.listed(rules) == told
    assert home.approvals.read_bytes() != before


def test_a_change_that_is_under_way_is_not_shown_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file comes before the log: what it holds counts only once the log says so."""
    home = make_home(tmp_path)
    want_people(home)
    ask(home)
    approvals, rules = approvals_of(home)
    other, _ = approvals_of(home)
    monkeypatch.setattr(other._store, "_tell", lambda *_: None)  # it goes no further than this
    other.approve("triage-2", rules, by="Olga")
    monkeypatch.setattr("client.approval.store._LONGEST_GLANCE", 0.1)
    with held(home), pytest.raises(Held, match="another process writes"):
        approvals.listed(rules)


def test_threads_of_one_console_do_not_wait_for_each_other(tmp_path: Path) -> None:
    home = make_home(tmp_path)
    log = open_log(home, passphrase=None)
    changes = PolicyChanges(home.policy, log=log)
    assert len(changes.versions()) == 1
    with held(home), pytest.raises(Held), log.locked(patience=0.05):
        pytest.fail("it is another's")
    with log.locked():
        assert len(changes.versions()) == 1
