"""What each role sees of a site's console, and that the numbers are those of the ledger and the audit log."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from fastapi.routing import APIRoute

from client.console.pages import NAVIGATION
from client.console.state import clock_offset
from client.site.home import SiteHome, open_log, open_site
from shared.epsilons import rounded_up
from shared.trust.audit_log import Event, read
from shared.trust.signing import load_verify_key
from shared.web.asked import Gate
from shared.web.entries import Line
from shared.web.roles import Action, Role, allowed
from tests.client.console.conftest import ROLES, Serving, files_of, text_of
from tests.client.console.homes import make_home, say


def action_of(route: Any) -> Action:
    assert isinstance(route, APIRoute)
    (gate,) = [one.dependency for one in route.dependencies if isinstance(one.dependency, Gate)]
    return gate.action


def test_every_route_answers_those_who_may_and_nobody_else(serving: Serving) -> None:
    """Role x route, over HTTP: 403 exactly where the table says no; signed out, the way to sign in."""
    account = serving.console.content.budgets.all()[0].id
    request = serving.console.content.requests.all()[0].request.id
    browsers = {role: serving.signed_in(role.value) for role in ROLES}
    tokens = {role: browser.token("/account") for role, browser in browsers.items()}
    guest = serving.browser()
    asked = 0
    for route, role in itertools.product(serving.app.routes, Role):
        if route.path in ("/sign-out", "/account/sign-out-everywhere"):
            continue
        path = (
            route.path.replace("{account}", account)
            .replace("{form}", "csv")
            .replace("{request}", request)
            .replace("{name}", "console.css")
        )
        action, browser = action_of(route), browsers[role]
        if "GET" in route.methods:
            status = browser.get(path).status_code
        else:
            # Every form lacks something, so that nothing is changed.
            headers = {"origin": serving.address}
            status = browser.http.post(path, data={"csrf_token": tokens[role]}, headers=headers).status_code
        assert (status == 403) == (not allowed(role, action)), (role, path, status)
        asked += 1
        if role is Role.VIEWER and action is not Action.BE_A_GUEST and "GET" in route.methods:
            assert guest.get(path).headers["location"].startswith("/sign-in")
    assert asked > 100


def test_the_navigation_shows_what_the_role_may_see(serving: Serving) -> None:
    for role in ROLES:
        page = serving.signed_in(role.value).get("/", follow_redirects=True).text
        (nav,) = re.findall(r"<nav class=\"side\".*?</nav>", page, flags=re.DOTALL)
        shown = re.findall(r"href=\"([^\"]*)\"", nav)
        assert shown == [one.path for one in NAVIGATION if allowed(role, one.action)]


def test_the_budget_is_the_ledgers_to_all_digits(serving: Serving) -> None:
    ledger = open_site(serving.home, passphrase=None).ledger()
    browser = serving.signed_in("viewer")
    page = browser.get("/budget").text
    spent = ledger.spent_epsilon()
    assert repr(spent) in page
    assert rounded_up(spent, 4) in text_of(page)
    (account,) = serving.console.content.budgets.all()
    line = browser.get(f"/budget/{account.id}/line.json").json()
    assert line["series"][0]["values"][-1] == pytest.approx(spent, abs=1e-12)
    assert line["series"][0]["cap"] == 8.0
    assert len(line["times"]) == 24
    assert line["times"] == sorted(line["times"])
    jobs = browser.get(f"/budget/{account.id}/jobs").text
    for job in account.jobs:
        assert repr(ledger.spent_epsilon(job.job)) in jobs
    assert "discharge letters" in jobs


def test_what_left_stands_there(serving: Serving) -> None:
    browser = serving.signed_in("officer")
    stored = [entry.details for entry in read(serving.home.audit) if entry.event == Event.RELEASE_STORED]
    page = browser.get("/releases").text
    assert f"{len(stored)} in all" in page
    for details in stored:
        assert details["sha256"] in page
        assert repr(details["epsilon_spent"]) in page
    found = browser.get("/releases", params={"q": "TRIAGE"}).text
    assert "8 in all" in found
    assert "discharge letters" not in found
    assert "0 in all" in browser.get("/releases", params={"q": "nothing like that"}).text
    assert browser.get("/releases", params={"page": 99}).status_code == 200


def test_the_chain_is_checked_when_it_is_asked(serving: Serving) -> None:
    browser = serving.signed_in("engineer")
    assert "are unbroken" in browser.get("/releases/verified", headers={"hx-request": "true"}).text
    (log,) = serving.home.audit.glob("audit-*.jsonl")
    whole = log.read_bytes()
    try:
        log.write_bytes(whole.replace(b'"round":3', b'"round":4', 1))
        told = text_of(browser.get("/releases/verified").text)
        assert "The chain does not hold." in told
        assert "was changed after it was written" in told
    finally:
        log.write_bytes(whole)


def test_the_log_is_searched(serving: Serving) -> None:
    browser = serving.signed_in("engineer")

    def rows(**query: str) -> list[int]:
        page = browser.get("/releases/log", params=query).text
        return [int(number) for number in re.findall(r"<tr><td [^>]*class=\"num\">(\d+)</td>", page)]

    entries = list(read(serving.home.audit))
    newest = rows()
    assert len(newest) == 50
    assert newest == sorted(newest, reverse=True)
    older = rows(before=str(newest[-1]))
    assert older[0] == newest[-1] - 1
    refused = [entry.sequence for entry in entries if entry.event == Event.REQUEST_REFUSED]
    assert rows(event="request.refused") == refused
    assert rows(q="ITS TASK IS NOT ACCEPTED") == refused
    assert rows(q="no such text") == []
    assert rows(event='release"') == []


def test_everything_that_is_done_stands_in_the_signed_log(serving: Serving) -> None:
    browser = serving.signed_in("administrator")
    answer = browser.post("/accounts", name="Zoë", role="viewer")
    assert answer.status_code == 200
    (code,) = re.findall(r"<code class=\"secret\">([A-Z0-9-]{19})</code>", answer.text)
    (zoe,) = [one for one in serving.console.accounts.all() if one.name == "Zoë"]
    for path, data in (("role", {"role": "officer"}), ("disable", {}), ("enable", {}), ("end-sessions", {})):
        assert browser.post(f"/accounts/{zoe.id}/{path}", **data).status_code == 303
    officer = serving.signed_in("officer")
    assert officer.get("/releases/export.csv").status_code == 200
    told = [entry.details for entry in read(serving.home.audit) if entry.event == Event.CONSOLE_ACTION]
    assert [(one["account"], one["action"]) for one in told][-7:] == [
        ("administrator", "account.invited"),
        ("administrator", "account.changed"),
        ("administrator", "account.changed"),
        ("administrator", "account.changed"),
        ("administrator", "account.signed-out"),
        ("officer", "sign-in"),
        ("officer", "export"),
    ]
    assert code not in json.dumps(told)
    from shared.trust.audit_log import verify

    assert verify(serving.home.audit, verify_head=load_verify_key(serving.home.path / "log.pub")).signature_checked


def test_without_the_log_nothing_is_done(serving: Serving) -> None:
    browser, before = serving.signed_in("administrator"), serving.console.accounts.all()
    (log,) = serving.home.audit.glob("audit-*.jsonl")
    whole = log.read_bytes()
    try:
        log.write_bytes(whole[:-20])
        answer = browser.post("/accounts", name="Yara", role="viewer")
        assert (answer.status_code, "cannot be trusted" in answer.text) == (503, True)
    finally:
        log.write_bytes(whole)
    assert serving.console.accounts.all() == before


def test_looking_changes_nothing(serving: Serving) -> None:
    browser = serving.signed_in("engineer")
    before = files_of(serving.home.path)
    for entry in NAVIGATION:
        browser.get(entry.path)
    account = serving.console.content.budgets.all()[0].id
    for path in (f"/budget/{account}/line.json", f"/budget/{account}/jobs", "/releases/verified", "/releases/log"):
        assert browser.get(path).status_code == 200
    assert files_of(serving.home.path) == before


def test_health_and_policy(serving: Serving) -> None:
    browser = serving.signed_in("engineer")
    health = text_of(browser.get("/health").text)
    assert "nothing is wrong" in health
    assert re.search(r"this site .* 36\d", health)
    assert "readmission, round 7" in health
    policy = browser.get("/policy").text
    assert "max_epsilon_per_job" in text_of(policy)
    assert "# What this site accepts" in policy


@pytest.mark.parametrize(
    ("sent_at", "waited", "told"),
    [
        ("2026-12-02T08:59:20+00:00", 38.0, (2.0, "ok")),
        ("2026-12-02T10:00:00+01:00", 0.0, (0.0, "ok")),
        ("2026-12-02T09:01:00+00:00", 0.0, (-60.0, "warning")),
        ("2026-12-02T08:58:00+00:00", 60, (60.0, "warning")),
        (None, 0.0, None),
        ("yesterday", 0.0, None),
        ("2026-12-02T08:59:20+00:00", None, None),
    ],
)
def test_the_clock_is_compared_with_the_coordinators(sent_at: object, waited: object, told: object) -> None:
    details = {"sent_at": sent_at, "waited_seconds": waited}
    request = Line(sequence=1, time="2026-12-02T09:00:00.000+00:00", event="", details=details, sha256="", text="")
    found = clock_offset(request)
    assert (found and (found.seconds, found.outcome)) == told
    assert clock_offset(None) is None


def test_how_far_the_clocks_are_apart_is_shown_or_said_not_to_be_known(
    serve: Callable[..., Serving], tmp_path: Path
) -> None:
    home = make_home(tmp_path)
    browser = serve(home).signed_in("engineer")
    assert "is not known: no request has told" in text_of(browser.get("/health").text)
    sent = (datetime.now(UTC) + timedelta(seconds=90)).isoformat(timespec="milliseconds")
    more = {"job": "ab", "name": "triage", "round": 1, "sent_at": sent, "waited_seconds": 0.0}
    open_log(home, passphrase=None).append(Event.REQUEST_RECEIVED, **more)
    found = re.search(r"([0-9.]+) s behind the coordinator", text_of(browser.get("/health").text))
    assert found
    assert float(found[1]) == pytest.approx(90, abs=10)


def test_a_request_is_no_other_connection(serving: Serving) -> None:
    browser, connected, asked = serving.signed_in("engineer"), "2026-12-01T07:00:00+00:00", "2026-12-02T09:30:00+00:00"
    try:
        say(serving.home, state="working", since=asked, connected_since=connected)
        assert "Since 2026-12-01 07:00:00" in text_of(browser.get("/health").text)
        say(serving.home, state="waiting", since=asked, connected_since=connected)
        assert "Since 2026-12-02 09:30:00" in text_of(browser.get("/health").text)
    finally:
        say(serving.home)


def test_a_node_that_does_not_run_is_told(serving: Serving) -> None:
    home: SiteHome = serving.home
    kept = home.status.read_bytes()
    home.status.unlink()
    try:
        told = text_of(serving.signed_in("engineer").get("/health").text)
        assert "it does not run; start it with: silotune site start" in told
    finally:
        home.status.write_bytes(kept)


def test_language_and_theme_are_remembered(serving: Serving) -> None:
    browser = serving.browser()
    assert '<html lang="zh" data-theme="auto">' in browser.get("/sign-in", headers={"accept-language": "zh-TW"}).text
    browser.post("/preferences", page="/sign-in", language="zh", next="/sign-in")
    browser.post("/preferences", page="/sign-in", theme="dark", next="/sign-in")
    assert '<html lang="zh" data-theme="dark">' in browser.get("/sign-in").text
    assert "登录" in browser.get("/sign-in").text
